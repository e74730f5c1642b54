//! The two products for blocks of few query rows, as in decode: keys and values are read once, where they are stored.
//!
//! The panels of [`product`](super::product) have one lane for each row; with 8 heads to a key/value head and one token, half
//! or more of the lanes are idle, and each packed value feeds one instruction. Here the lanes are keys, then columns of the
//! values, and the numbers of the rows are broadcast. For 1 KiB of keys and 8 rows, in vectors of 16: 16 loads, 64 shuffles (a
//! transpose in registers) and 128 multiply-adds, instead of 256; for 1 KiB of values 16 loads and 128 multiply-adds.
//!
//! Each element of a result is the same chain of multiply-adds as in `product`, in the same order, so that the bits do not tell
//! which of the two computed it.

use super::TILE;
use super::operand::{Operand, transpose_rows};
use super::problem::{Block, Problem};
use crate::cpu::Float;
use crate::cpu::simd::{MAX_LANES, Simd};

/// Narrow blocks have at most this many rows.
pub const ROWS: usize = 8;

/// Blocks of at most this many rows are narrow, at this level and for this type. Where conversions take many instructions,
/// doing them once for every four rows costs more than idle lanes.
pub const fn most_rows<S: Simd, T>() -> usize {
    if S::TILE_TOKENS <= 4 && size_of::<T>() < 4 { 4 } else { ROWS }
}

/// Columns of a result of [`values`] as stored: whole pairs of vectors.
pub const fn padded_columns(value_dim: usize) -> usize {
    value_dim.next_multiple_of(2 * MAX_LANES)
}

/// The rows of a key tile and its values, where they are stored.
pub struct Rows<'a, T> {
    keys: [&'a [T]; TILE],
    /// Each as long as `zeros`.
    values: [&'a [T]; TILE],
    zeros: &'a [T],
}

impl<'a, T: Float> Rows<'a, T> {
    /// No rows. `zeros`: `value_dim` zeros.
    #[inline(always)]
    pub fn new(zeros: &'a [T]) -> Self {
        Rows { keys: [&[]; TILE], values: [zeros; TILE], zeros }
    }

    /// Keys of the tile at `start`, a row of the sequence. Beyond the sequence they repeat.
    #[inline(always)]
    pub fn find_keys(&mut self, problem: &Problem<'a, T>, block: &Block, panel: usize, start: usize) {
        let (kv, width) = (&problem.input.kv, problem.spec.head_dim);
        let (data, stride, head) = (kv.data().0, kv.row_strides().0, kv.head_strides().0);
        let rows = (block.sequence.kv_len - start).min(TILE);
        let mut j = 0;
        while j < rows {
            // Rows at a constant distance: the rest of the sequence, or of a page.
            let run = kv.run(block.sequence.index, start + j);
            let len = run.len.min(rows - j);
            let at = run.k_offset + (block.kv_head + panel) * head;
            for (i, key) in self.keys[j..j + len].iter_mut().enumerate() {
                *key = &data[at + i * stride..][..width];
            }
            j += len;
        }
        let first = self.keys[0];
        self.keys[rows..].fill(first);
    }

    /// Values of the tile at `start`. Beyond the sequence they are 0, and where no row sees them, so that a NaN in them stays
    /// there.
    #[inline(always)]
    pub fn find_values(
        &mut self,
        problem: &Problem<'a, T>,
        block: &Block,
        panel: usize,
        start: usize,
        seen: &[bool; TILE],
    ) {
        let kv = &problem.input.kv;
        let (data, stride, head) = (kv.data().1, kv.row_strides().1, kv.head_strides().1);
        let rows = (block.sequence.kv_len - start).min(TILE);
        let mut j = 0;
        while j < rows {
            let run = kv.run(block.sequence.index, start + j);
            let len = run.len.min(rows - j);
            let at = run.v_offset + (block.kv_head + panel) * head;
            for (i, (value, seen)) in self.values[j..j + len].iter_mut().zip(&seen[j..]).enumerate() {
                *value = if *seen { &data[at + i * stride..][..self.zeros.len()] } else { self.zeros };
            }
            j += len;
        }
        self.values[rows..].fill(self.zeros);
    }
}

/// Keys that [`scores`] takes at a time.
pub const fn step<S: Simd>() -> usize {
    2 * S::LANES
}

/// Cache lines of rows that are needed next. They are asked for a few at a time between products, row after row: a core waits
/// for few lines at once, so asking for many would stall it, and memory would be idle during the products.
pub struct Ahead<'a, T> {
    rows: [&'a [T]; TILE],
    /// The row that is asked for, and the end of `rows`.
    row: usize,
    end: usize,
    /// Element of the row, and elements of each row.
    at: usize,
    width: usize,
}

impl<'a, T: Float> Ahead<'a, T> {
    /// No rows.
    #[inline(always)]
    pub fn none() -> Self {
        Ahead { rows: [&[]; TILE], row: 0, end: 0, at: 0, width: 0 }
    }

    /// Keys (or values) of the tile at `start`, up to the row `last`: a panel's share of the rows of all heads of the block if
    /// heads are neighbours, else all rows of its head.
    #[inline(always)]
    pub fn find(
        problem: &Problem<'a, T>,
        block: &Block,
        panel: usize,
        (start, last): (usize, usize),
        keys: bool,
    ) -> Self {
        let (kv, spec) = (&problem.input.kv, problem.spec);
        let (data, stride, head, width) = match keys {
            true => (kv.data().0, kv.row_strides().0, kv.head_strides().0, spec.head_dim),
            false => (kv.data().1, kv.row_strides().1, kv.head_strides().1, spec.value_dim),
        };
        let are_neighbours = head == width;
        let (first, end, kv_head, len) = match are_neighbours {
            true => {
                let share = |panel| start + panel * TILE / block.heads;
                (share(panel), share(panel + 1), block.kv_head, block.heads * width)
            }
            false => (start, start + TILE, block.kv_head + panel, width),
        };
        let mut ahead = Ahead { width: len, ..Ahead::none() };
        let mut j = first;
        while j < end.min(last) {
            let run = kv.run(block.sequence.index, j);
            let at = kv_head * head + if keys { run.k_offset } else { run.v_offset };
            let rows = run.len.min(end.min(last) - j);
            for i in 0..rows {
                ahead.rows[ahead.end] = &data[at + i * stride..][..len];
                ahead.end += 1;
            }
            j += rows;
        }
        ahead
    }
}

impl<T> Ahead<'_, T> {
    /// Elements in a cache line.
    const LINE: usize = 64 / size_of::<T>();

    /// Asks for the lines of `rows` that are a step's share, when each of the steps uses up `elements` elements.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S, elements: usize) {
        for _ in 0..elements.div_ceil(Self::LINE) {
            if self.row < self.end {
                simd.prefetch_l2(self.rows[self.row % TILE].as_ptr().wrapping_add(self.at));
                self.at += Self::LINE;
                if self.at >= self.width {
                    (self.row, self.at) = (self.row + 1, 0);
                }
            }
        }
    }
}

/// `scores[j][row] = keys[j] . q[row]` for `j` in `first..end`, both multiples of [`step`]; lanes beyond the rows get 0.
///
/// * `queries`: `[key_width][LANES]`
/// * `chunk`: `[key_width][2 * LANES]`, scratch memory
/// * `scores`: `[TILE][LANES]`
///
/// Asks for the keys of `ahead` meanwhile.
#[inline(always)]
pub fn scores<S: Simd, T: Float, E: Operand>(
    simd: S,
    tile: &Rows<'_, T>,
    ahead: &mut Ahead<'_, T>,
    (queries, rows): (&[E], usize),
    chunk: &mut [E],
    (first, end): (usize, usize),
    scores: &mut [f32],
) {
    let mut dots = [0.0; ROWS * 2 * MAX_LANES];
    for j in (first..end).step_by(step::<S>()) {
        for half in [0, S::LANES] {
            transpose_rows(simd, &tile.keys[j + half..][..S::LANES], (&mut chunk[half..], 2 * S::LANES));
        }
        if S::LANES == 16 && rows > 4 {
            dot::<S, T, E, 8>(simd, queries, chunk, 0, ahead, &mut dots);
        } else {
            for row in (0..rows).step_by(4) {
                dot::<S, T, E, 4>(simd, queries, chunk, row, ahead, &mut dots);
            }
        }
        for half in [0, S::LANES] {
            let mut by_row = [simd.zero(); MAX_LANES];
            for row in 0..ROWS {
                by_row[row] = simd.load(&dots[row * 2 * S::LANES + half..]);
            }
            simd.transpose(&by_row, &mut scores[(j + half) * S::LANES..], S::LANES);
        }
    }
}

/// `dots[row + r][..] = sum_step queries[step][row + r] * chunk[step][..]` for `r` in `0..COUNT`.
#[inline(always)]
fn dot<S: Simd, T: Float, E: Operand, const COUNT: usize>(
    simd: S,
    queries: &[E],
    chunk: &[E],
    row: usize,
    ahead: &mut Ahead<'_, T>,
    dots: &mut [f32],
) {
    let mut acc = [[simd.zero(); 2]; COUNT];
    let steps = queries.len() / S::LANES;
    assert!(row + COUNT <= S::LANES && chunk.len() >= steps * 2 * S::LANES);
    for step in 0..steps {
        ahead.ask(simd, 2 * S::LANES * E::DEPTH);
        let at = step * 2 * S::LANES;
        // SAFETY: `step < steps`, so both ranges end within `steps * 2 * LANES`, asserted above.
        let (low, high) =
            unsafe { (chunk.get_unchecked(at..at + S::LANES), chunk.get_unchecked(at + S::LANES..at + 2 * S::LANES)) };
        let keys = [E::load(simd, low), E::load(simd, high)];
        for r in 0..COUNT {
            // SAFETY: `step < steps` and `row + r < LANES`: within the `steps * LANES` queries.
            let x = E::splat(simd, unsafe { *queries.get_unchecked(step * S::LANES + row + r) });
            for v in 0..2 {
                acc[r][v] = E::multiply_add(simd, x, keys[v], acc[r][v]);
            }
        }
    }
    for r in 0..COUNT {
        let dots = &mut dots[(row + r) * 2 * S::LANES..];
        simd.store(dots, acc[r][0]);
        simd.store(&mut dots[S::LANES..], acc[r][1]);
    }
}

/// `out[row][..] = decay[row] * out[row][..] + sum_j weights[j][row] * values[j][..]` for `j` in `first..end`.
///
/// * `weights`: `[TILE / DEPTH][LANES]`
/// * `decay`: `[LANES]`
/// * `out`: `[ROWS][padded_columns(value_dim)]`
///
/// Asks for the values of `ahead` meanwhile.
#[inline(always)]
pub fn values<S: Simd, T: Float, E: Operand>(
    simd: S,
    tile: &Rows<'_, T>,
    ahead: &mut Ahead<'_, T>,
    (weights, rows): (&[E], usize),
    (first, end): (usize, usize),
    decay: &[f32],
    out: &mut [f32],
) {
    if S::LANES == 16 && rows > 4 {
        weigh::<S, T, E, 8>(simd, tile, ahead, weights, 0, (first, end), (decay, out));
    } else {
        for row in (0..rows).step_by(4) {
            weigh::<S, T, E, 4>(simd, tile, ahead, weights, row, (first, end), (decay, &mut *out));
        }
    }
}

/// [`values`] for `COUNT` rows.
#[inline(always)]
fn weigh<S: Simd, T: Float, E: Operand, const COUNT: usize>(
    simd: S,
    tile: &Rows<'_, T>,
    ahead: &mut Ahead<'_, T>,
    weights: &[E],
    row: usize,
    (first, end): (usize, usize),
    (decay, out): (&[f32], &mut [f32]),
) {
    let columns = out.len() / ROWS;
    let width = tile.zeros.len();
    let steps = (end - first) / E::DEPTH;
    let weights = &weights[first / E::DEPTH * S::LANES..];
    assert!(end <= TILE && row + COUNT <= S::LANES && weights.len() >= steps * S::LANES);
    for at in (0..width).step_by(2 * S::LANES) {
        let mut acc = [[simd.zero(); 2]; COUNT];
        for r in 0..COUNT {
            let decay = simd.splat(decay[row + r]);
            for v in 0..2 {
                acc[r][v] = simd.mul(simd.load(&out[(row + r) * columns + at + v * S::LANES..]), decay);
            }
        }
        let len = (width - at).min(2 * S::LANES);
        for step in 0..steps {
            ahead.ask(simd, 2 * S::LANES * E::DEPTH);
            let j = first + step * E::DEPTH;
            // SAFETY: `j + DEPTH <= end <= TILE`, asserted above; every row of `Rows::values` has `width` elements, at least
            // `at + len`.
            let (low, high) = unsafe {
                let (low, high) = (tile.values.get_unchecked(j), tile.values.get_unchecked(j + E::DEPTH - 1));
                debug_assert!(low.len() == width && high.len() == width);
                (low.get_unchecked(at..at + len), high.get_unchecked(at..at + len))
            };
            let value = E::load_columns(simd, [low, high]);
            for r in 0..COUNT {
                // SAFETY: `step < steps` and `row + r < LANES`: within the `steps * LANES` weights asserted above.
                let x = E::splat(simd, unsafe { *weights.get_unchecked(step * S::LANES + row + r) });
                for v in 0..2 {
                    acc[r][v] = E::multiply_add(simd, x, value[v], acc[r][v]);
                }
            }
        }
        for r in 0..COUNT {
            for v in 0..2 {
                simd.store(&mut out[(row + r) * columns + at + v * S::LANES..], acc[r][v]);
            }
        }
    }
}

/// `columns[c][row] = out[row][c]`: the result of [`values`] in the form of a partial result. Lanes beyond the rows get 0.
///
/// * `columns`: `[..][LANES]`, a multiple of 16 of them
#[inline(always)]
pub fn unload<S: Simd>(simd: S, out: &[f32], columns: &mut [f32]) {
    let stride = out.len() / ROWS;
    for (block, dst) in columns.chunks_exact_mut(S::LANES * S::LANES).enumerate() {
        let mut by_row = [simd.zero(); MAX_LANES];
        for row in 0..ROWS {
            by_row[row] = simd.load(&out[row * stride + block * S::LANES..]);
        }
        simd.transpose(&by_row, dst, S::LANES);
    }
}
