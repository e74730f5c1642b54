//! One item: rows of a sequence against a range of its keys, tile by tile.
//!
//! Tiles start at multiples of [`TILE`] and parts at multiples of [`SPLIT`], counted from row 0 of the sequence, whatever the
//! call; a row's result is folded from its parts in order. That makes it independent of everything else in the call.

use super::narrow;
use super::operand::{Operand, transpose_rows};
use super::plan::{Item, Plan};
use super::problem::{Block, Problem};
use super::product::{self, block_rows};
use super::scores::{self, Place, Ranges};
use super::softmax::{self, Partial};
use super::{MAX_PANELS, MAX_WIDTH, SPLIT, TILE};
use crate::cpu::Float;
use crate::cpu::parallel::Shared;
use crate::cpu::simd::{Kernel, MAX_LANES, Simd};
use std::sync::atomic::{AtomicU32, Ordering};

/// An item with the memory of its worker.
pub struct RunItem<'a, 'p, T, E> {
    pub problem: &'a Problem<'p, T>,
    pub plan: &'a Plan,
    pub item: Item,
    /// Partial results of divided blocks.
    pub partials: Shared<'a, f32>,
    /// Items of each divided block that are not finished.
    pub unfinished: &'a [AtomicU32],
    /// [`Plan::scratch_words`], of this worker alone.
    pub scratch: &'a mut [f32],
    pub operand: std::marker::PhantomData<E>,
}

impl<T: Float, E: Operand> Kernel for RunItem<'_, '_, T, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let block = self.item.block(self.plan, self.problem.input);
        if block.width == S::LANES {
            run::<S, T, E, 1>(simd, self, &block);
        } else {
            run::<S, T, E, 2>(simd, self, &block);
        }
    }
}

/// The next `len` values of the scratch memory.
#[inline(always)]
fn take<'a, E: bytemuck::Pod>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [E] {
    let (part, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    bytemuck::cast_slice_mut(part)
}

#[inline(always)]
fn run<S: Simd, T: Float, E: Operand, const VECS: usize>(simd: S, run: RunItem<'_, '_, T, E>, block: &Block) {
    let RunItem { problem, plan, item, partials, unfinished, mut scratch, .. } = run;
    let spec = problem.spec;
    let width = VECS * S::LANES;
    let panels = block.panels();
    let (key_width, columns) = (plan.key_width, plan.columns);
    let partial_len = Partial::len(width, columns);

    let scratch = &mut scratch;
    let keys: &mut [E] = take(scratch, TILE * key_width);
    let values: &mut [E] = take(scratch, TILE / E::DEPTH * columns);
    // Few rows are multiplied with keys and values where they are stored.
    let is_narrow = VECS == 1 && block.is_narrow();
    let tiles = if is_narrow { panels } else { 1 };
    let tile_scores: &mut [f32] = take(scratch, tiles * TILE * width);
    let added: &mut [f32] = take(scratch, if problem.has_added() { panels * TILE * width } else { 0 });
    let queries: &mut [E] = take(scratch, panels * key_width * width);
    let total: &mut [f32] = take(scratch, panels * partial_len);
    let own_part: &mut [f32] = take(scratch, panels * partial_len);
    let decay: &mut [f32] = take(scratch, tiles * width);
    let results: &mut [f32] = take(scratch, S::LANES * columns);
    let zeros: &mut [T] = take(scratch, columns);
    let zeros = &mut zeros[..spec.value_dim];
    zeros.fill(T::default());
    let mut tile = narrow::Rows::new(zeros);
    let narrow_len = narrow::ROWS * narrow::padded_columns(spec.value_dim);
    let narrow_out: &mut [f32] = take(scratch, block.heads * narrow_len);

    pack_queries::<S, T, E>(simd, problem, block, key_width, queries);
    if !is_narrow {
        // The columns beyond `value_dim` are never packed, and must not hold NaN.
        values.fill(E::zeroed());
    }
    let mut ranges = [Ranges::new(spec, &block.sequence, block.row, 0); MAX_PANELS];
    for (panel, ranges) in ranges[..panels].iter_mut().enumerate() {
        *ranges = Ranges::new(spec, &block.sequence, block.panel_row(panel), block.panel_rows(panel));
    }
    let ranges = &ranges[..panels];
    if !item.is_divided() {
        total.chunks_exact_mut(partial_len).for_each(|total| Partial::new(total, width, columns).clear());
    }

    let (any_first, any_end) = block.keys(spec);
    let last = any_end.min(item.end_part as usize * SPLIT);
    for index in item.first_part as usize..item.end_part as usize {
        let part: &mut [f32] = if item.is_divided() {
            let at = item.partials as usize + (index - item.first_of_block as usize) * panels * partial_len;
            // SAFETY: each part of a divided block belongs to one item, and blocks have separate ranges of `partials`. Others
            // read it only after the counter has told them that this item is finished.
            unsafe { partials.part(at, panels * partial_len) }
        } else {
            &mut *own_part
        };
        part.chunks_exact_mut(partial_len).for_each(|part| Partial::new(part, width, columns).clear());
        narrow_out.fill(0.0);
        let first = (index * SPLIT).max(any_first / TILE * TILE);
        let end = ((index + 1) * SPLIT).min(any_end);
        for start in (first..end).step_by(TILE) {
            // Keys that rows see: of all panels, but for a narrow block of each.
            let mut seen = [[false; TILE]; MAX_PANELS];
            if problem.has_added() {
                for (panel, ranges) in ranges.iter().enumerate() {
                    let added = &mut added[panel * TILE * width..(panel + 1) * TILE * width];
                    let seen = &mut seen[if is_narrow { panel } else { 0 }];
                    scores::added_terms(problem, block, panel, ranges, start, added, seen);
                }
            } else {
                let positions = any_first.saturating_sub(start)..(end - start).min(TILE);
                seen[..if is_narrow { panels } else { 1 }]
                    .iter_mut()
                    .for_each(|seen| seen[positions.clone()].fill(true));
            }
            let next = start + TILE;
            let has_next = next < last;
            if is_narrow {
                let step = narrow::step::<S>();
                let (ranges, rows) = (&ranges[0], ranges[0].in_tile(start, step)); // all heads have the same
                if rows.0 >= rows.1 {
                    continue;
                }
                // Meanwhile memory is on its way. All heads' keys, then all heads' values: the values, then the keys of the next
                // tile, so that the cache holds little. Pairs are multiplied faster than memory answers: a head at a time, and
                // what the next tile has of the same.
                let together = if E::DEPTH == 1 { panels } else { 1 };
                let of_keys = if E::DEPTH == 1 { (start, false) } else { (next, true) };
                let of_values = (next, E::DEPTH == 1);
                for first in (0..panels).step_by(together) {
                    for panel in first..first + together {
                        tile.find_keys(problem, block, panel, start);
                        let mut ahead = narrow::Ahead::find(problem, block, panel, (of_keys.0, last), of_keys.1);
                        let queries = &queries[panel * key_width * width..(panel + 1) * key_width * width];
                        let chunk = &mut keys[..key_width * step];
                        let scores = &mut tile_scores[panel * TILE * width..(panel + 1) * TILE * width];
                        narrow::scores::<S, T, E>(simd, &tile, &mut ahead, (queries, block.rows), chunk, rows, scores);
                    }
                    for panel in first..first + together {
                        let of_panel = panel * TILE * width..(panel + 1) * TILE * width;
                        let added = problem.has_added().then(|| &added[of_panel.clone()]);
                        let scores = &mut tile_scores[of_panel];
                        let mut part = Partial::new(&mut part[panel * partial_len..], width, columns);
                        let decay = &mut decay[panel * width..(panel + 1) * width];
                        let place = Place { panel, start, rows };
                        let state = (&mut part, decay);
                        weigh_scores::<S, T, E, VECS>(simd, problem, block, place, ranges, (added, scores), state);
                    }
                    for panel in first..first + together {
                        tile.find_values(problem, block, panel, start, &seen[panel]);
                        let mut ahead = narrow::Ahead::find(problem, block, panel, (of_values.0, last), of_values.1);
                        let weights = &tile_scores[panel * TILE * width..(panel + 1) * TILE * width];
                        let weights = (bytemuck::cast_slice::<f32, E>(weights), block.rows);
                        let decay = &decay[panel * width..(panel + 1) * width];
                        let out = &mut narrow_out[panel * narrow_len..(panel + 1) * narrow_len];
                        narrow::values::<S, T, E>(simd, &tile, &mut ahead, weights, rows, decay, out);
                    }
                }
                continue;
            }
            pack_tile::<S, T, E>(simd, problem, block, start, &seen[0], (keys, key_width), (values, columns));
            for (panel, ranges) in ranges.iter().enumerate() {
                let rows = ranges.in_tile(start, block_rows::<S>(VECS));
                if rows.0 >= rows.1 {
                    continue;
                }
                let queries = &queries[panel * key_width * width..(panel + 1) * key_width * width];
                // The rows of the next tile are on their way while this one is multiplied.
                let ahead = |part, parts, keys| {
                    if has_next && panel == 0 {
                        prefetch(simd, problem, block, (next, last), (part, parts), keys);
                    }
                };
                product::scores::<S, E, VECS>(simd, keys, queries, key_width, rows, tile_scores, |part, parts| {
                    ahead(part, parts, true);
                });
                let added = problem.has_added().then(|| &added[panel * TILE * width..(panel + 1) * TILE * width]);
                let mut part = Partial::new(&mut part[panel * partial_len..], width, columns);
                let place = Place { panel, start, rows };
                let state = (&mut part, &mut *decay);
                weigh_scores::<S, T, E, VECS>(simd, problem, block, place, ranges, (added, &mut *tile_scores), state);
                let weights: &[E] = bytemuck::cast_slice(tile_scores);
                let out = (&*decay, part.out);
                product::values::<S, E, VECS>(simd, values, weights, columns, rows, out, |part, parts| {
                    ahead(part, parts, false);
                });
            }
        }
        if is_narrow {
            for (out, part) in narrow_out.chunks_exact(narrow_len).zip(part.chunks_exact_mut(partial_len)) {
                narrow::unload(simd, out, Partial::new(part, width, columns).out);
            }
        }
        if !item.is_divided() {
            fold_panels::<S, VECS>(simd, total, part, columns);
        }
    }
    if item.is_divided() {
        // Release: what this item wrote; acquire: what the others did, if this is the last.
        if unfinished[item.counter as usize].fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        total.chunks_exact_mut(partial_len).for_each(|total| Partial::new(total, width, columns).clear());
        for index in 0..(item.end_of_block - item.first_of_block) as usize {
            // SAFETY: all items of the block are finished, so nobody else has a part of its range.
            let part =
                unsafe { partials.part(item.partials as usize + index * panels * partial_len, panels * partial_len) };
            fold_panels::<S, VECS>(simd, total, part, columns);
        }
    }
    for panel in 0..panels {
        let total = Partial::new(&mut total[panel * partial_len..], width, columns);
        finish::<S, T, VECS>(simd, problem, block, panel, total, results);
    }
}

/// Turns the dot products of a panel and a tile into softmax weights, in place; tells the factor on what is summed up so far.
#[inline(always)]
fn weigh_scores<S: Simd, T: Float, E: Operand, const VECS: usize>(
    simd: S,
    problem: &Problem<'_, T>,
    block: &Block,
    place: Place,
    ranges: &Ranges,
    (added, scores): (Option<&[f32]>, &mut [f32]),
    (part, decay): (&mut Partial<'_>, &mut [f32]),
) {
    let Place { start, rows, .. } = place;
    let mut scale = problem.spec.softmax_scale as f32;
    if problem.has_terms() {
        scores::apply_terms::<S, T, VECS>(simd, problem, block, place, added, scores);
        scale = 1.0;
    } else if let Some(added) = added {
        scores::hide_masked::<S, VECS>(simd, rows, added, scores);
    }
    if !ranges.covers(start, rows) {
        scores::hide::<S, VECS>(simd, ranges, start, rows, scores);
    }
    softmax::update::<S, E, VECS>(simd, scores, rows, scale, part.max, part.sum, decay);
}

/// Folds a partial result of each panel into the totals.
#[inline(always)]
fn fold_panels<S: Simd, const VECS: usize>(simd: S, total: &mut [f32], part: &mut [f32], columns: usize) {
    let width = VECS * S::LANES;
    let len = Partial::len(width, columns);
    for (total, part) in total.chunks_exact_mut(len).zip(part.chunks_exact_mut(len)) {
        Partial::new(total, width, columns).fold::<S, VECS>(simd, &Partial::new(part, width, columns));
    }
}

/// `queries[panel][step][lane]`; lanes without a row are 0.
#[inline(always)]
fn pack_queries<S: Simd, T: Float, E: Operand>(
    simd: S,
    problem: &Problem<'_, T>,
    block: &Block,
    key_width: usize,
    queries: &mut [E],
) {
    let q = &problem.input.q;
    let width = block.width;
    for (panel, queries) in queries.chunks_exact_mut(key_width * width).enumerate() {
        let rows = block.panel_rows(panel);
        if rows < width {
            queries.fill(E::zeroed());
        }
        let row = |lane: usize| {
            let (token, head) = block.token_and_head(problem.spec, panel * width + lane);
            q.row(&[block.sequence.q_begin + token, head])
        };
        let whole = rows - rows % S::LANES;
        for first in (0..whole).step_by(S::LANES) {
            let mut group: [&[T]; MAX_LANES] = [&[]; MAX_LANES];
            for (i, of_lane) in group[..S::LANES].iter_mut().enumerate() {
                *of_lane = row(first + i);
            }
            transpose_rows(simd, &group[..S::LANES], (&mut queries[first..], width));
        }
        for lane in whole..rows {
            let src = row(lane);
            for (step, column) in queries.chunks_exact_mut(width).enumerate() {
                column[lane] = E::gather(src, step);
            }
        }
    }
}

/// Packs the keys and values of the tile at `start`: contiguous, in the type that the products take. Rows of the tile beyond
/// the sequence, and values of keys that no row of the block sees, are 0, so that a NaN in them stays there.
#[inline(always)]
fn pack_tile<S: Simd, T: Float, E: Operand>(
    simd: S,
    problem: &Problem<'_, T>,
    block: &Block,
    start: usize,
    seen: &[bool; TILE],
    (keys, key_width): (&mut [E], usize),
    (values, columns): (&mut [E], usize),
) {
    let spec = problem.spec;
    let kv = &problem.input.kv;
    let (k_data, v_data) = kv.data();
    let (k_stride, v_stride) = kv.row_strides();
    let (k_head, v_head) = kv.head_strides();
    let (k_head, v_head) = (block.kv_head * k_head, block.kv_head * v_head);
    let sequence = &block.sequence;
    let rows = (sequence.kv_len - start).min(TILE);
    keys[rows * key_width..].fill(E::zeroed());
    let mut pair: [Option<&[T]>; 2] = [None; 2];
    let mut j = 0;
    while j < TILE {
        // Rows at a constant distance: the rest of the sequence, or of a page.
        let run = if j < rows { Some(kv.run(sequence.index, start + j)) } else { None };
        let len = run.map_or(TILE - j, |run| run.len.min(rows - j));
        for i in 0..len {
            let at = j + i;
            let mut value = None;
            if let Some(run) = run {
                let k_at = run.k_offset + k_head + i * k_stride;
                let k_row = &k_data[k_at..k_at + spec.head_dim];
                E::pack_row(simd, k_row, &mut keys[at * key_width..(at + 1) * key_width]);
                if seen[at] {
                    let v_at = run.v_offset + v_head + i * v_stride;
                    value = Some(&v_data[v_at..v_at + spec.value_dim]);
                }
            }
            pair[at % E::DEPTH] = value;
            if at % E::DEPTH == E::DEPTH - 1 {
                let dst = &mut values[at / E::DEPTH * columns..][..spec.value_dim];
                E::pack_rows(simd, pair, dst);
            }
        }
        j += len;
    }
}

/// Asks for share `part` of `parts` of the keys (or values) of the tile at `start`, up to the key row `last`.
#[inline(always)]
fn prefetch<S: Simd, T: Float>(
    simd: S,
    problem: &Problem<'_, T>,
    block: &Block,
    (start, last): (usize, usize),
    (part, parts): (usize, usize),
    keys: bool,
) {
    let kv = &problem.input.kv;
    let (data, head, width) = match keys {
        true => (kv.data().0, kv.head_strides().0, problem.spec.head_dim),
        false => (kv.data().1, kv.head_strides().1, problem.spec.value_dim),
    };
    let line = 64 / size_of::<T>();
    for j in part * TILE / parts..(part + 1) * TILE / parts {
        if start + j >= last {
            break;
        }
        let run = kv.run(block.sequence.index, start + j);
        let at = if keys { run.k_offset } else { run.v_offset } + block.kv_head * head;
        for column in (0..width).step_by(line) {
            simd.prefetch(data.as_ptr().wrapping_add(at + column));
        }
    }
}

/// Divides by the sum and writes the rows of one panel.
///
/// * `results`: `[LANES][columns]`, scratch memory
#[inline(always)]
fn finish<S: Simd, T: Float, const VECS: usize>(
    simd: S,
    problem: &Problem<'_, T>,
    block: &Block,
    panel: usize,
    mut total: Partial<'_>,
    results: &mut [f32],
) {
    let spec = problem.spec;
    let width = VECS * S::LANES;
    let rows = block.panel_rows(panel);
    let mut sinks = [f32::NEG_INFINITY; MAX_WIDTH];
    if let Some(all) = problem.input.sinks {
        for lane in 0..rows {
            sinks[lane] = all[block.token_and_head(spec, panel * width + lane).1];
        }
    }
    total.finish::<S, VECS>(simd, spec.sinks.then_some(&sinks[..]));
    let columns = results.len() / S::LANES;
    for lane in 0..rows {
        if lane % S::LANES == 0 {
            // The next rows, from columns.
            for (block, src) in total.out.chunks_exact(S::LANES * width).enumerate() {
                let mut vectors = [simd.zero(); MAX_LANES];
                for (vector, column) in vectors.iter_mut().zip(src.chunks_exact(width)) {
                    *vector = simd.load(&column[lane..]);
                }
                simd.transpose(&vectors, &mut results[block * S::LANES..], columns);
            }
        }
        let (token, head) = block.token_and_head(spec, panel * width + lane);
        let token = block.sequence.q_begin + token;
        let row = &mut results[lane % S::LANES * columns..][..spec.value_dim];
        let saw_nothing = total.sum[lane] == 0.0;
        if saw_nothing {
            row.fill(0.0);
        }
        let at = token * problem.out_strides[0] + head * problem.out_strides[1];
        // SAFETY: each pair of token and head is a row of exactly one block, which is finished by one item, and the check of
        // the arguments has shown that output rows do not overlap.
        let out = unsafe { problem.out.part(at, spec.value_dim) };
        let whole = row.len() - row.len() % S::LANES;
        for (out, row) in out.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
            T::store(simd, out, simd.load(row));
        }
        T::store_partial(simd, &mut out[whole..], simd.load_partial(&row[whole..]));
        if let Some((lse, strides)) = &problem.lse {
            let value = f64::from(total.max[lane]) + f64::from(total.sum[lane]).ln();
            // SAFETY: as above.
            let lse = unsafe { lse.part(token * strides[0] + head * strides[1], 1) };
            lse[0] = if saw_nothing { f32::NEG_INFINITY } else { value as f32 };
        }
    }
}
