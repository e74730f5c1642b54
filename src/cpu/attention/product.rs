//! The register-blocked products of a key tile with a panel of queries: scores `K q`, and values `V^T p`.
//!
//! A panel has `VECS * LANES` columns, one for each query row, so that everything about a row stays in its lane. The left
//! operand is read value by value and broadcast. Each element of a result is one chain of multiply-adds in the order of the
//! summed index, whatever the blocking: results do not depend on what shares the panel or the tile.

use super::TILE;
use super::operand::Operand;
use crate::cpu::simd::Simd;

/// Rows of the left operand that one block of registers holds; divides [`TILE`] and [`COLUMNS`].
///
/// With 32 registers (sixteen lanes) 8 x 2 or 16 x 1 accumulators, with 16 registers 4 x 2 or 8 x 1: at least 8 chains, which
/// is what two multiply-adds per cycle of 4 cycles each need.
pub const fn block_rows<S: Simd>(vecs: usize) -> usize {
    match (S::LANES, vecs) {
        (16, 2) => 8,
        (16, _) => 16,
        (_, 2) => 4,
        _ => 8,
    }
}

/// The columns of a value tile are filled up to a multiple of this.
pub const COLUMNS: usize = 16;

/// `acc[r][v] += sum_k a[r * row_stride + k * step] * b[k][v]` for `k` in `0..depth`, where `b` is `[depth][VECS * LANES]`.
#[inline(always)]
fn accumulate<S: Simd, E: Operand, const ROWS: usize, const VECS: usize>(
    simd: S,
    depth: usize,
    (a, row_stride, step): (&[E], usize, usize),
    b: &[E],
    acc: &mut [[S::F32; VECS]; ROWS],
) {
    if depth == 0 {
        return;
    }
    assert!(a.len() > (ROWS - 1) * row_stride + (depth - 1) * step);
    assert!(b.len() >= depth * VECS * S::LANES);
    for k in 0..depth {
        let mut columns = [E::splat(simd, E::zeroed()); VECS];
        for v in 0..VECS {
            let at = (k * VECS + v) * S::LANES;
            // SAFETY: `k < depth` and `v < VECS`, so the range ends within `depth * VECS * LANES`, asserted above.
            columns[v] = E::load(simd, unsafe { b.get_unchecked(at..at + S::LANES) });
        }
        for r in 0..ROWS {
            // SAFETY: `r < ROWS` and `k < depth`: at most the index asserted above.
            let x = E::splat(simd, unsafe { *a.get_unchecked(r * row_stride + k * step) });
            for v in 0..VECS {
                acc[r][v] = E::multiply_add(simd, x, columns[v], acc[r][v]);
            }
        }
    }
}

/// `scores[j][..] = keys[j] . q` for `j` in `first..end`, both multiples of [`block_rows`].
///
/// * `keys`: `[TILE][width]`
/// * `q`: `[width][VECS * LANES]`
/// * `scores`: `[TILE][VECS * LANES]`
///
/// `meanwhile(part, parts)` is called now and then.
#[inline(always)]
pub fn scores<S: Simd, E: Operand, const VECS: usize>(
    simd: S,
    keys: &[E],
    q: &[E],
    width: usize,
    (first, end): (usize, usize),
    scores: &mut [f32],
    meanwhile: impl Fn(usize, usize),
) {
    #[inline(always)]
    fn block<S: Simd, E: Operand, const ROWS: usize, const VECS: usize>(
        simd: S,
        keys: &[E],
        q: &[E],
        width: usize,
        scores: &mut [f32],
    ) {
        let mut acc = [[simd.zero(); VECS]; ROWS];
        accumulate(simd, width, (keys, width, 1), q, &mut acc);
        for (row, acc) in scores.chunks_exact_mut(VECS * S::LANES).zip(&acc) {
            for v in 0..VECS {
                simd.store(&mut row[v * S::LANES..], acc[v]);
            }
        }
    }
    let rows = block_rows::<S>(VECS);
    debug_assert!(first.is_multiple_of(rows) && end.is_multiple_of(rows) && end <= TILE);
    for j in (first..end).step_by(rows) {
        meanwhile((j - first) / rows, (end - first) / rows);
        let keys = &keys[j * width..(j + rows) * width];
        let scores = &mut scores[j * VECS * S::LANES..(j + rows) * VECS * S::LANES];
        match rows {
            16 => block::<S, E, 16, VECS>(simd, keys, q, width, scores),
            8 => block::<S, E, 8, VECS>(simd, keys, q, width, scores),
            _ => block::<S, E, 4, VECS>(simd, keys, q, width, scores),
        }
    }
}

/// `out[c][..] = decay * out[c][..] + sum_j values[j][c] * weights[j][..]` for `j` in `first..end`.
///
/// * `values`: `[TILE / DEPTH][columns]`, `columns` a multiple of [`COLUMNS`]
/// * `weights`: `[TILE / DEPTH][VECS * LANES]`
/// * `out`: `[columns][VECS * LANES]`
/// * `decay`: `[VECS * LANES]`
///
/// `meanwhile(part, parts)` is called now and then.
#[inline(always)]
pub fn values<S: Simd, E: Operand, const VECS: usize>(
    simd: S,
    values: &[E],
    weights: &[E],
    columns: usize,
    (first, end): (usize, usize),
    (decay, out): (&[f32], &mut [f32]),
    meanwhile: impl Fn(usize, usize),
) {
    #[inline(always)]
    fn block<S: Simd, E: Operand, const ROWS: usize, const VECS: usize>(
        simd: S,
        values: (&[E], usize),
        weights: &[E],
        depth: usize,
        decay: &[S::F32; VECS],
        out: &mut [f32],
    ) {
        let mut acc = [[simd.zero(); VECS]; ROWS];
        for (row, acc) in out.chunks_exact(VECS * S::LANES).zip(&mut acc) {
            for v in 0..VECS {
                acc[v] = simd.mul(simd.load(&row[v * S::LANES..]), decay[v]);
            }
        }
        accumulate(simd, depth, (values.0, 1, values.1), weights, &mut acc);
        for (row, acc) in out.chunks_exact_mut(VECS * S::LANES).zip(&acc) {
            for v in 0..VECS {
                simd.store(&mut row[v * S::LANES..], acc[v]);
            }
        }
    }
    let rows = block_rows::<S>(VECS);
    debug_assert!(columns.is_multiple_of(COLUMNS) && first.is_multiple_of(E::DEPTH) && end.is_multiple_of(E::DEPTH));
    let mut decays = [simd.zero(); VECS];
    for v in 0..VECS {
        decays[v] = simd.load(&decay[v * S::LANES..]);
    }
    let (first, depth) = (first / E::DEPTH, (end - first) / E::DEPTH);
    let weights = &weights[first * VECS * S::LANES..];
    for c in (0..columns).step_by(rows) {
        meanwhile(c / rows, columns / rows);
        let values = (&values[first * columns + c..], columns);
        let out = &mut out[c * VECS * S::LANES..(c + rows) * VECS * S::LANES];
        match rows {
            16 => block::<S, E, 16, VECS>(simd, values, weights, depth, &decays, out),
            8 => block::<S, E, 8, VECS>(simd, values, weights, depth, &decays, out),
            _ => block::<S, E, 4, VECS>(simd, values, weights, depth, &decays, out),
        }
    }
}
