//! The attention over all keys from attentions over parts of them.

use super::softmax::{negated, weight};
use crate::args::{AttentionOutput, check_merge};
use crate::cpu::level::dispatch;
use crate::cpu::parallel::{self, Shared};
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::workspace::part_bytes;
use crate::cpu::{Cpu, Float};
use crate::error::Result;
use crate::view::View;

/// Rows of an item: some microseconds of work.
const ROWS: usize = 32;

/// The attention over all keys from the attentions over parts of them, which other calls (or machines) have computed.
///
/// ```text
/// lse[t, h] = ln(sum_p exp(lses[p, t, h]))
/// out[t, h] = sum_p exp(lses[p, t, h] - lse[t, h]) * outs[p, t, h]
/// ```
///
/// * `outs`: `[num_parts, num_tokens, num_heads, value_dim]`, `lses`: `[num_parts, num_tokens, num_heads]`
/// * `out`: `[num_tokens, num_heads, value_dim]`, `lse`: `[num_tokens, num_heads]`
///
/// A part with `lse = -inf` is not read. All parts `-inf`, or no parts: `out = 0`, `lse = -inf`. Parts with `lse = inf` share all of
/// the weight; a NaN makes its row NaN. Sinks belong to one part alone. Parts are added in order, in f32.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride), [`Error::Len`](crate::Error::Len).
/// Nothing is written then.
///
/// Dao et al. 2022, arXiv:2205.14135; Ye et al. 2024, "Cascade Inference".
pub fn merge<T: Float, O: Float>(
    cpu: &mut Cpu,
    outs: View<'_, T, 4>,
    lses: View<'_, f32, 3>,
    output: AttentionOutput<'_, O, f32>,
) -> Result<()> {
    let [num_parts, num_tokens, num_heads, value_dim] = check_merge(&outs, &lses, &output)?;
    if value_dim == 0 && output.lse.is_none() {
        return Ok(()); // no memory bounds the number of rows then
    }
    let rows = num_tokens * num_heads;
    let items = rows.div_ceil(ROWS);
    let words = part_bytes::<f32>(value_dim) / size_of::<f32>();
    let mut carver = cpu.workspace.carve(merge_workspace_bytes(num_tokens, num_heads, value_dim));
    let scratch = Shared::new(carver.part::<f32>(parallel::workers_for(items) * words));
    let AttentionOutput { out, lse } = output;
    let out_strides = out.strides();
    let merge = Merge {
        outs,
        lses,
        sizes: [num_parts, num_heads, value_dim],
        out: Shared::new(out.into_data()),
        out_strides,
        lse: lse.map(|lse| (lse.strides(), lse)).map(|(strides, lse)| (Shared::new(lse.into_data()), strides)),
    };
    let level = cpu.level;
    parallel::run(items, |worker, item| {
        // SAFETY: no two calls with the same worker overlap, and workers have separate ranges.
        let sum = unsafe { scratch.part(worker * words, value_dim) };
        let rows = item * ROWS..((item + 1) * ROWS).min(rows);
        dispatch(level, MergeRows { merge: &merge, rows, sum });
    });
    Ok(())
}

/// Workspace of [`merge`], in the rayon pool of the caller.
pub fn merge_workspace_bytes(num_tokens: usize, num_heads: usize, value_dim: usize) -> usize {
    let workers = parallel::workers_for(num_tokens.saturating_mul(num_heads).div_ceil(ROWS));
    part_bytes::<f32>(value_dim).saturating_mul(workers)
}

struct Merge<'a, T, O> {
    outs: View<'a, T, 4>,
    lses: View<'a, f32, 3>,
    /// Parts, heads, width of a value.
    sizes: [usize; 3],
    out: Shared<'a, O>,
    out_strides: [usize; 3],
    lse: Option<(Shared<'a, f32>, [usize; 2])>,
}

struct MergeRows<'a, 'b, T, O> {
    merge: &'a Merge<'b, T, O>,
    /// Rows `token * num_heads + head`.
    rows: std::ops::Range<usize>,
    sum: &'a mut [f32],
}

impl<T: Float, O: Float> Kernel for MergeRows<'_, '_, T, O> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let MergeRows { merge, rows, sum } = self;
        let [num_parts, num_heads, value_dim] = merge.sizes;
        for row in rows {
            let (token, head) = (row / num_heads, row % num_heads);
            let lse_of = |part: usize| merge.lses.at([part, token, head]);
            // A NaN is not greater than anything, so it leaves the maximum as it is.
            let max = (0..num_parts).map(lse_of).fold(f32::NEG_INFINITY, |max, lse| if lse > max { lse } else { max });
            let minus_max = negated(simd, simd.splat(max));
            let mut total = simd.zero();
            sum.fill(0.0);
            for part in (0..num_parts).filter(|part| lse_of(*part) != f32::NEG_INFINITY) {
                let share = weight(simd, simd.splat(lse_of(part)), simd.splat(1.0), minus_max);
                total = simd.add(total, share);
                let src = merge.outs.row(&[part, token, head]);
                for (sum, src) in sum.chunks_mut(S::LANES).zip(src.chunks(S::LANES)) {
                    let added = simd.fma(share, T::load_partial(simd, src), simd.load_partial(sum));
                    simd.store_partial(sum, added);
                }
            }
            let at = token * merge.out_strides[0] + head * merge.out_strides[1];
            // SAFETY: every row belongs to one item, and the check of the arguments has shown that output rows do not overlap.
            let out = unsafe { merge.out.part(at, value_dim) };
            let mut all = [0.0f32; crate::cpu::simd::MAX_LANES];
            simd.store(&mut all, total);
            let saw_nothing = all[0] == 0.0;
            let factor = if saw_nothing { simd.zero() } else { simd.div(simd.splat(1.0), total) };
            for (out, sum) in out.chunks_mut(S::LANES).zip(sum.chunks(S::LANES)) {
                O::store_partial(simd, out, simd.mul(simd.load_partial(sum), factor));
            }
            if let Some((lse, strides)) = &merge.lse {
                let value = f64::from(max) + f64::from(all[0]).ln();
                // SAFETY: as above.
                let lse = unsafe { lse.part(token * strides[0] + head * strides[1], 1) };
                lse[0] = if saw_nothing { f32::NEG_INFINITY } else { value as f32 };
            }
        }
    }
}
