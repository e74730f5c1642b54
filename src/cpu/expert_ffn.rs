//! `expert_ffn` and `mlp`: feed-forward blocks over packed weights, for one token or for thousands.

mod activation;
mod packed;
mod passes;
mod plan;
mod sort;

pub use packed::{PackedExperts, PackedFfn};
pub(super) use passes::{Always, Routed};

use super::float::Float;
use super::level::dispatch;
use super::workspace::Carver;
use super::{Cpu, Level};
use crate::args::{Routing, check_expert_ffn, check_mlp};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::{ExpertFfn, Ffn};
use crate::view::{View, ViewMut};
use passes::{Call, Run, Size};
use plan::Sizes;

/// The routed experts.
///
/// ```text
/// out[t] = combine_scale * sum_k w[t, k] * FFN_e(x[t])          WeightOn::Output,  e = topk_ids[t, k]
/// out[t] = combine_scale * sum_k FFN_e(w[t, k] * x[t])          WeightOn::Input
/// ```
///
/// over the slots `k` whose expert is local; other ids, and -1, are skipped, also if their weight is NaN. A token without any
/// local expert gets 0. An expert may stand in several slots.
///
/// * `hidden`, `out`: `[num_tokens, hidden_size]`; `topk_ids`, `topk_weights`: `[num_tokens, slots]`
/// * `weights`: packed for `spec`, of which `weight_on` and `combine_scale` may change from call to call
///
/// Numerics: sums in f32 as in [`linear`](super::linear()); experts are added in ascending order, in f32, and rounded once at
/// the store. Inner values are f32; with bf16 activations and weights at level `avx512bf16` they are rounded to bf16. A token's
/// result is the same bits whatever else is in the call.
///
/// # Errors
/// Those of [`ExpertFfn::validate`] and [`Routing::check`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`];
/// [`Error::Value`] if the weights were packed for another specification; [`Error::Unsupported`] for 2^32 and more
/// assignments. Nothing is written then.
///
/// Shazeer et al. 2017, arXiv:1701.06538.
pub fn expert_ffn<T: Float, O: Float>(
    cpu: &mut Cpu,
    spec: &ExpertFfn,
    hidden: View<'_, T, 2>,
    routing: &Routing<'_, f32>,
    weights: &PackedExperts,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    let num_tokens = check_expert_ffn(spec, &hidden, routing, &out)?;
    weights.check(spec)?;
    let slots = routing.topk_ids.shape()[1];
    check_assignments(slots)?;
    if num_tokens == 0 {
        return Ok(());
    }
    let mut carver = cpu.workspace.carve(experts_bytes(cpu.level, T::DTYPE, Some((weights, slots)), None, num_tokens));
    let routed = Routed { spec, experts: weights, routing: *routing };
    experts_in(cpu.level, &mut carver, hidden, Some(routed), None, out);
    Ok(())
}

/// Workspace of [`expert_ffn`] for activations `T`, in the rayon pool of the caller; 0 for more slots than a call takes.
pub fn expert_ffn_workspace_bytes<T: Float>(
    cpu: &Cpu,
    weights: &PackedExperts,
    num_tokens: usize,
    slots: usize,
) -> usize {
    experts_bytes(cpu.level, T::DTYPE, Some((weights, slots)), None, num_tokens)
}

/// One feed-forward block.
///
/// ```text
/// gated:  out = down(act(gate(x)) * up(x))          plain:  out = down(act(up(x)))
/// ```
///
/// * `x`, `out`: `[num_tokens, hidden_size]`; `weights`: packed for `spec`
///
/// Numerics as [`expert_ffn`].
///
/// # Errors
/// Those of [`Ffn::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Value`] if the weights were
/// packed for another specification. Nothing is written then.
///
/// Shazeer 2020, arXiv:2002.05202.
pub fn mlp<T: Float, O: Float>(
    cpu: &mut Cpu,
    spec: &Ffn,
    x: View<'_, T, 2>,
    weights: &PackedFfn,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    let num_tokens = check_mlp(spec, &x, &out)?;
    weights.as_experts().check(&ExpertFfn::new(1, *spec))?;
    if num_tokens == 0 {
        return Ok(());
    }
    let mut carver =
        cpu.workspace.carve(experts_bytes(cpu.level, T::DTYPE, None, Some(weights.as_experts()), num_tokens));
    let always = Always { experts: weights.as_experts(), factors: None };
    experts_in(cpu.level, &mut carver, x, None, Some(always), out);
    Ok(())
}

/// Workspace of [`mlp`] for activations `T`, in the rayon pool of the caller.
pub fn mlp_workspace_bytes<T: Float>(cpu: &Cpu, weights: &PackedFfn, num_tokens: usize) -> usize {
    experts_bytes(cpu.level, T::DTYPE, None, Some(weights.as_experts()), num_tokens)
}

/// Assignments of a chunk of tokens are numbered in 32 bits.
pub(super) fn check_assignments(slots: usize) -> Result<()> {
    if slots <= u32::MAX as usize / (2 * plan::CHUNK_TOKENS) {
        Ok(())
    } else {
        Err(Error::unsupported("cpu", format!("{slots} experts per token")))
    }
}

/// Workspace of [`experts_in`]; routed experts come with their slots. 0 for so many slots that the call is an error.
pub(super) fn experts_bytes(
    level: Level,
    activations: Dtype,
    routed: Option<(&PackedExperts, usize)>,
    always: Option<&PackedExperts>,
    num_tokens: usize,
) -> usize {
    if routed.is_some_and(|(_, slots)| check_assignments(slots).is_err()) {
        return 0;
    }
    let routed = routed.map(|(experts, slots)| Sizes { experts, slots });
    let sizes = [routed, always.map(|experts| Sizes { experts, slots: 1 })];
    let hidden_size = sizes.iter().flatten().next().map_or(0, |s| s.experts.spec().ffn.hidden_size);
    dispatch(level, Size { activations, num_tokens, hidden_size, sizes })
}

/// The computation without its checks, in memory that is already there. Routed experts and the one of all tokens have the same
/// element type and width.
pub(super) fn experts_in<'a, T: Float, O: Float>(
    level: Level,
    carver: &mut Carver<'_>,
    hidden: View<'a, T, 2>,
    routed: Option<Routed<'a>>,
    always: Option<Always<'a>>,
    mut out: ViewMut<'a, O, 2>,
) {
    let out_stride = out.strides()[0];
    let out = O::any_shared(out.data_mut());
    run_any(level, Run { carver, call: Call { hidden: T::any_view(hidden), routed, always, out, out_stride } });
}

/// The computation, compiled once, not in every crate that calls it.
fn run_any(level: Level, run: Run<'_, '_>) {
    dispatch(level, run);
}
