//! The router's logits: a linear layer whose input may be jittered.

use super::linear::{linear_bytes, linear_in};
use super::rows::{RowKernel, SharedView, for_rows, rows_per_item};
use super::simd::Simd;
use super::workspace::{Carver, part_bytes};
use super::{Cpu, Float, Level, PackedLinear};
use crate::args::check_router_logits;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::Router;
use crate::view::{View, ViewMut};
use std::ops::Range;

/// The router's logits: `logits[t, e] = sum_d x[t, d] * weight[e, d] + bias[e]`.
///
/// `x[t, d] = hidden[t, d]`, with [`Router::jitter`] `hidden[t, d] * (1 + jitter * (2 u - 1))`, where `u` is draw `d` of token `t`
/// ([`crate::random::uniform`] with `seed`).
///
/// * `hidden`: `[num_tokens, hidden_size]`, `weight`: packed from `[num_experts, hidden_size]`, `bias`: `[num_experts]`
/// * `logits`: `[num_tokens, num_experts]`
///
/// Numerics as [`linear`](super::linear()); jittered rows are f32, whatever `T` is.
///
/// # Errors
/// Those of [`Router::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]. Nothing is written then.
pub fn router_logits<T: Float>(
    cpu: &mut Cpu,
    spec: &Router,
    hidden: View<'_, T, 2>,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    seed: u64,
    logits: ViewMut<'_, f32, 2>,
) -> Result<()> {
    let num_tokens = check_router_logits(spec, &hidden, bias, &logits)?;
    let width = hidden.shape()[1];
    let (expected, found) = ([1, spec.num_experts, width], [weight.num_heads(), weight.outputs(), weight.inputs()]);
    if expected != found {
        return Err(Error::Shape { argument: "weight".into(), expected: expected.to_vec(), found: found.to_vec() });
    }
    let mut carver = cpu.workspace.carve(router_logits_workspace_bytes::<T>(cpu, spec, weight, num_tokens));
    router_logits_in(cpu.level, &mut carver, spec, hidden, weight, bias, seed, logits);
    Ok(())
}

/// [`router_logits`] without its checks, in memory that is already there.
#[allow(clippy::too_many_arguments)]
pub(super) fn router_logits_in<T: Float>(
    level: Level,
    carver: &mut Carver<'_>,
    spec: &Router,
    hidden: View<'_, T, 2>,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    seed: u64,
    logits: ViewMut<'_, f32, 2>,
) {
    let [num_tokens, width] = hidden.shape();
    let Some(jitter) = spec.jitter else {
        return linear_in(level, carver, hidden, weight, bias, logits);
    };
    let jittered = carver.part::<f32>(num_tokens * width);
    let mut rows = ViewMut::new(jittered, [num_tokens, width]);
    let kernel = Jitter { hidden, jitter: jitter as f32, seed, out: SharedView::new(&mut rows) };
    for_rows(level, num_tokens, rows_per_item(32 * width), &kernel);
    linear_in(level, carver, rows.as_view(), weight, bias, logits);
}

/// Workspace of [`router_logits`] for activations `T`, in the thread pool of the caller.
pub fn router_logits_workspace_bytes<T: Float>(
    cpu: &Cpu,
    spec: &Router,
    weight: &PackedLinear,
    num_tokens: usize,
) -> usize {
    match spec.jitter {
        None => linear_bytes(cpu.level, T::DTYPE, weight, num_tokens),
        Some(_) => part_bytes::<f32>(num_tokens.saturating_mul(weight.inputs())).saturating_add(linear_bytes(
            cpu.level,
            Dtype::F32,
            weight,
            num_tokens,
        )),
    }
}

struct Jitter<'a, T> {
    hidden: View<'a, T, 2>,
    jitter: f32,
    seed: u64,
    out: SharedView<'a, f32, 2>,
}

impl<T: Float> RowKernel for Jitter<'_, T> {
    #[inline(always)]
    fn eval<S: Simd>(&self, _: S, _: usize, rows: Range<usize>) {
        for t in rows {
            // SAFETY: every token belongs to one item.
            let out = unsafe { self.out.row(&[t]) };
            for (d, (out, x)) in out.iter_mut().zip(self.hidden.row(&[t])).enumerate() {
                let u = crate::random::uniform(self.seed, t as u64, d as u64);
                *out = x.to_f32() * (1.0 + self.jitter * (2.0 * u - 1.0));
            }
        }
    }
}
