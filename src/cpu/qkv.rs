//! Between projection and attention: norms, clipping, rotation and temperature in one pass, and the KV cache.

use super::norm::RowNorm;
use super::parallel::{self, Shared};
use super::rows::{RowKernel, SharedView, for_rows, rows_per_item, workers};
use super::simd::Simd;
use super::workspace::part_bytes;
use super::{Cpu, Float};
use crate::Result;
use crate::args::{KvCache, KvCacheMut, QkvInput, QkvOutput, RopeTable, check_rope};
use crate::spec::{Norm, QkNorm, QkvPrep, Rope, RopeStyle};
use crate::view::{View, ViewMut};
use std::ops::Range;

/// Projected rows made ready for attention, in this order, with one rounding to `T` at the end:
///
/// 1. [`QkNorm::Full`]: RMS norm of q and of k over all their heads together
/// 2. q, k and v clamped to `[-clip, clip]`
/// 3. [`QkNorm::PerHead`]: RMS norm of each head of q and k
/// 4. [`rope()`] on q and k
/// 5. [`QkNorm::L2AfterRope`]: RMS norm without weights of each head of q and k
/// 6. `q *= 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))` (see [`crate::spec::QTemperature`])
///
/// * `q`: `[num_tokens, num_heads, head_dim]`, `k`: `[num_tokens, num_kv_heads, head_dim]`, `v`: the same with `value_dim`
/// * `positions`: `[num_tokens]`, rows of the cos and sin tables
///
/// # Errors
/// Those of [`QkvInput::check`]. Nothing is written then.
pub fn prepare_qkv<T: Float>(
    cpu: &mut Cpu,
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    mut output: QkvOutput<'_, T>,
) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    if num_tokens == 0 {
        return Ok(());
    }
    let per_item = prepare_per_item(spec);
    let scratch_len = prepare_scratch_len(spec);
    let mut carver = cpu.workspace.carve(prepare_qkv_workspace_bytes(spec, num_tokens));
    let kernel = PrepareRows {
        spec,
        input,
        q: SharedView::new(&mut output.q),
        k: SharedView::new(&mut output.k),
        v: SharedView::new(&mut output.v),
        scratch_len,
        scratch: Shared::new(carver.part(workers(num_tokens, per_item) * scratch_len)),
    };
    for_rows(cpu.level, num_tokens, per_item, &kernel);
    Ok(())
}

/// Workspace of [`prepare_qkv`] in the current thread pool.
pub fn prepare_qkv_workspace_bytes(spec: &QkvPrep, num_tokens: usize) -> usize {
    part_bytes::<f32>(workers(num_tokens, prepare_per_item(spec)).saturating_mul(prepare_scratch_len(spec)))
}

fn prepare_per_item(spec: &QkvPrep) -> usize {
    let heads = spec.num_heads.saturating_add(spec.num_kv_heads);
    rows_per_item(heads.saturating_mul(spec.head_dim).saturating_mul(4))
}

/// All heads of a row, and one head more. A multiple of a cache line, so that no two workers share one.
fn prepare_scratch_len(spec: &QkvPrep) -> usize {
    let heads = spec.num_heads.max(spec.num_kv_heads).saturating_mul(spec.head_dim.max(spec.value_dim));
    heads.saturating_add(spec.head_dim).saturating_add(15) / 16 * 16
}

struct PrepareRows<'a, 'b, T> {
    spec: &'a QkvPrep,
    input: &'a QkvInput<'b, T>,
    q: SharedView<'a, T, 3>,
    k: SharedView<'a, T, 3>,
    v: SharedView<'a, T, 3>,
    scratch_len: usize,
    scratch: Shared<'a, f32>,
}

impl<T: Float> RowKernel for PrepareRows<'_, '_, T> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, worker: usize, rows: Range<usize>) {
        // SAFETY: no two items with the same worker overlap in time.
        let scratch = unsafe { self.scratch.part(worker * self.scratch_len, self.scratch_len) };
        let (spec, input) = (self.spec, self.input);
        for t in rows {
            let temperature = spec.q_temperature.map(|temperature| temperature.factor(input.positions[t]) as f32);
            for (x, weight, out, factor) in
                [(&input.q, input.q_norm, &self.q, temperature), (&input.k, input.k_norm, &self.k, None)]
            {
                self.prepare(simd, t, x, weight, out, factor, scratch);
            }
            for h in 0..spec.num_kv_heads {
                // SAFETY: every token belongs to one item.
                let out = unsafe { self.v.row(&[t, h]) };
                let from = self.input.v.row(&[t, h]);
                match spec.clip {
                    Some(clip) => {
                        let head = &mut scratch[..from.len()];
                        widen(simd, from, head);
                        clamp(head, clip as f32);
                        narrow(simd, head, out);
                    }
                    None => out.copy_from_slice(from),
                }
            }
        }
    }
}

impl<T: Float> PrepareRows<'_, '_, T> {
    /// All heads of a token's query or key.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn prepare<S: Simd>(
        &self,
        simd: S,
        t: usize,
        x: &View<'_, T, 3>,
        weight: Option<&[f32]>,
        out: &SharedView<'_, T, 3>,
        factor: Option<f32>,
        scratch: &mut [f32],
    ) {
        let (spec, width) = (self.spec, self.spec.head_dim);
        let (row, spare) = scratch.split_at_mut(scratch.len() - width);
        let row = &mut row[..x.shape()[1] * width];
        for (h, head) in row.chunks_exact_mut(width).enumerate() {
            widen(simd, x.row(&[t, h]), head);
        }
        if spec.qk_norm == Some(QkNorm::Full) {
            RowNorm::new(&spec.norm, weight, None).apply_in_place(simd, row);
        }
        if let Some(clip) = spec.clip {
            clamp(row, clip as f32);
        }
        for (h, head) in row.chunks_exact_mut(width).enumerate() {
            if spec.qk_norm == Some(QkNorm::PerHead) {
                RowNorm::new(&spec.norm, weight, None).apply_in_place(simd, head);
            }
            if let (Some(rope), Some(table)) = (&spec.rope, &self.input.rope) {
                rotate(rope, table, self.input.positions[t], head, spare);
            }
            if spec.qk_norm == Some(QkNorm::L2AfterRope) {
                let norm = Norm { weight_offset: 0.0, ..spec.norm };
                RowNorm::new(&norm, None, None).apply_in_place(simd, head);
            }
            if let Some(factor) = factor {
                head.iter_mut().for_each(|x| *x *= factor);
            }
            // SAFETY: every token belongs to one item.
            narrow(simd, head, unsafe { out.row(&[t, h]) });
        }
    }
}

#[inline(always)]
fn widen<S: Simd, T: Float>(simd: S, from: &[T], to: &mut [f32]) {
    let whole = from.len() / S::LANES * S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        simd.store(&mut to[at..], T::load(simd, &from[at..]));
    }
    simd.store_partial(&mut to[whole..from.len()], T::load_partial(simd, &from[whole..]));
}

#[inline(always)]
fn narrow<S: Simd, T: Float>(simd: S, from: &[f32], to: &mut [T]) {
    let whole = from.len() / S::LANES * S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        T::store(simd, &mut to[at..], simd.load(&from[at..]));
    }
    T::store_partial(simd, &mut to[whole..from.len()], simd.load_partial(&from[whole..]));
}

/// NaN stays NaN.
#[inline(always)]
fn clamp(row: &mut [f32], clip: f32) {
    for x in row {
        *x = if *x > clip { clip } else { *x };
        *x = if *x < -clip { -clip } else { *x };
    }
}

/// Rotary position embedding: the first `rotary_dim` dimensions of every head turn, the others are copied.
///
/// Pair `n` of a head at `position`, with `c = cos[position, n]` and `s = sin[position, n]`: `(a, b) -> (a c - b s, b c + a s)`.
/// Where the pair lies is the [`RopeStyle`].
///
/// * `x`, `out`: `[num_tokens, num_heads, head_dim]`; `positions`: `[num_tokens]`
/// * `table`: cos and sin, each `[num_positions, rotary_dim / 2]` ([`Rope::table`])
///
/// # Errors
/// Those of [`Rope::validate`] and [`RopeTable::check`]; [`Error::Shape`](crate::Error::Shape),
/// [`Error::Stride`](crate::Error::Stride), [`Error::Len`](crate::Error::Len). Nothing is written then.
///
/// Su et al. 2021, arXiv:2104.09864.
pub fn rope<T: Float>(
    cpu: &mut Cpu,
    spec: &Rope,
    x: View<'_, T, 3>,
    positions: &[u32],
    table: &RopeTable<'_>,
    mut out: ViewMut<'_, T, 3>,
) -> Result<()> {
    check_rope(spec, &x, positions, table, &out)?;
    let shape @ [num_tokens, _, _] = x.shape();
    if num_tokens == 0 {
        return Ok(());
    }
    let per_item = rope_per_item(shape);
    let scratch_len = rope_scratch_len(shape);
    let mut carver = cpu.workspace.carve(rope_workspace_bytes(shape));
    let kernel = RopeRows {
        spec,
        x,
        positions,
        table,
        out: SharedView::new(&mut out),
        scratch_len,
        scratch: Shared::new(carver.part(workers(num_tokens, per_item) * scratch_len)),
    };
    for_rows(cpu.level, num_tokens, per_item, &kernel);
    Ok(())
}

/// Workspace of [`rope()`] for an array of that shape, in the current thread pool.
pub fn rope_workspace_bytes(shape: [usize; 3]) -> usize {
    part_bytes::<f32>(workers(shape[0], rope_per_item(shape)).saturating_mul(rope_scratch_len(shape)))
}

fn rope_per_item([_, num_heads, head_dim]: [usize; 3]) -> usize {
    rows_per_item(num_heads.saturating_mul(head_dim).saturating_mul(3))
}

/// A head before and after.
fn rope_scratch_len([_, _, head_dim]: [usize; 3]) -> usize {
    head_dim.saturating_mul(2).saturating_add(15) / 16 * 16
}

struct RopeRows<'a, T> {
    spec: &'a Rope,
    x: View<'a, T, 3>,
    positions: &'a [u32],
    table: &'a RopeTable<'a>,
    out: SharedView<'a, T, 3>,
    scratch_len: usize,
    scratch: Shared<'a, f32>,
}

impl<T: Float> RowKernel for RopeRows<'_, T> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, worker: usize, rows: Range<usize>) {
        let [_, num_heads, width] = self.x.shape();
        // SAFETY: no two items with the same worker overlap in time.
        let scratch = unsafe { self.scratch.part(worker * self.scratch_len, self.scratch_len) };
        let (head, spare) = scratch.split_at_mut(width);
        for t in rows {
            for h in 0..num_heads {
                widen(simd, self.x.row(&[t, h]), head);
                rotate(self.spec, self.table, self.positions[t], head, spare);
                // SAFETY: every token belongs to one item.
                narrow(simd, head, unsafe { self.out.row(&[t, h]) });
            }
        }
    }
}

/// Rotates a head in place; `spare` is as long.
#[inline(always)]
fn rotate(rope: &Rope, table: &RopeTable<'_>, position: u32, head: &mut [f32], spare: &mut [f32]) {
    let half = rope.rotary_dim / 2;
    let (cos, sin) = (table.cos.row(&[position as usize]), table.sin.row(&[position as usize]));
    let (cos, sin) = (&cos[..half], &sin[..half]);
    let head = &mut head[..2 * half];
    match rope.style {
        RopeStyle::Half => {
            let (low, high) = head.split_at_mut(half);
            for n in 0..half {
                let (a, b) = (low[n], high[n]);
                low[n] = a * cos[n] - b * sin[n];
                high[n] = b * cos[n] + a * sin[n];
            }
        }
        RopeStyle::Interleaved => {
            let (pairs, _) = head.as_chunks_mut::<2>();
            for (n, pair) in pairs.iter_mut().enumerate() {
                let [a, b] = *pair;
                *pair = [a * cos[n] - b * sin[n], b * cos[n] + a * sin[n]];
            }
        }
        RopeStyle::InterleavedToHalf => {
            let spare = &mut spare[..2 * half];
            spare.copy_from_slice(head);
            let (pairs, _) = spare.as_chunks::<2>();
            let (low, high) = head.split_at_mut(half);
            for (n, [a, b]) in pairs.iter().enumerate() {
                low[n] = a * cos[n] - b * sin[n];
                high[n] = b * cos[n] + a * sin[n];
            }
        }
    }
}

/// New rows of keys and values into a cache: row `i` of sequence `s` goes to row `kv_lens[s] + i` of its cache. A plain copy; all
/// other rows stay as they are.
///
/// * `k`, `v`: `[num_tokens, num_kv_heads, width]`; the cache: [`KvCacheMut`]
///
/// # Errors
/// Those of [`KvCache::check`]. Nothing is written then.
pub fn kv_append<T: Float>(_: &mut Cpu, input: &KvCache<'_, T>, mut cache: KvCacheMut<'_, T>) -> Result<()> {
    let num_seqs = input.check(&cache)?;
    let [_, num_heads, head_dim] = input.k.shape();
    let width = head_dim.saturating_add(input.v.shape()[2]);
    if num_heads == 0 || width == 0 {
        return Ok(());
    }
    let (k, v, block_table) = match &mut cache {
        KvCacheMut::Contiguous { k, v } => (k, v, None),
        KvCacheMut::Paged { k, v, block_table } => (k, v, Some(*block_table)),
    };
    let page_size = k.shape()[1];
    let (k, v) = (SharedView::new(k), SharedView::new(v));
    let per_item = rows_per_item(num_heads.saturating_mul(width));
    for seq in 0..num_seqs {
        let tokens = input.rows(seq);
        parallel::run(tokens.len().div_ceil(per_item), |_, item| {
            for i in item * per_item..tokens.len().min((item + 1) * per_item) {
                let row = input.kv_lens[seq] as usize + i;
                let (block, row) = match &block_table {
                    Some(table) => (table.at([seq, row / page_size]) as usize, row % page_size),
                    None => (seq, row),
                };
                for h in 0..num_heads {
                    // SAFETY: tokens go to different rows: `check` has seen that no page is written through two entries of
                    // the table, and rows of one sequence differ.
                    let (k, v) = unsafe { (k.row(&[block, row, h]), v.row(&[block, row, h])) };
                    k.copy_from_slice(input.k.row(&[tokens.start + i, h]));
                    v.copy_from_slice(input.v.row(&[tokens.start + i, h]));
                }
            }
        });
    }
    Ok(())
}
