//! Feed-forward: a projection, a whole block, and the routed experts.

use super::erf::erfc;
use super::norm::sigmoid;
use crate::args::{ExpertWeights, FfnWeights, Routing, check_expert_ffn, check_linear, check_mlp};
use crate::spec::{Activation, ExpertFfn, Ffn, WeightFormat, WeightOn};
use crate::view::{View, ViewMut};
use crate::{Element, Error, Result};
use std::f64::consts::{PI, SQRT_2};

/// A projection: `out[t, o] = sum_i x[t, i] * weight[o, i] + bias[o]`.
///
/// * `x`: `[num_tokens, in_features]`, `weight`: `[out_features, in_features]`, `bias`: `[out_features]`
/// * `out`: `[num_tokens, out_features]`
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]. Nothing is written then.
pub fn linear<T: Element, W: Element, S: Element>(
    x: View<'_, T, 2>,
    weight: View<'_, W, 2>,
    bias: Option<&[S]>,
    mut out: ViewMut<'_, f64, 2>,
) -> Result<()> {
    let [out_features, _] = weight.shape();
    let num_tokens = check_linear(&x, weight.shape(), bias, &out)?;
    weight.check("weight", weight.shape())?;
    if out_features == 0 {
        return Ok(());
    }
    for t in 0..num_tokens {
        let row: Vec<f64> = x.row(&[t]).iter().map(|x| x.to_f64()).collect();
        for o in 0..out_features {
            out.set([t, o], dot(&row, weight.row(&[o])) + bias.map_or(0.0, |b| b[o].to_f64()));
        }
    }
    Ok(())
}

pub(super) fn dot<W: Element>(x: &[f64], w: &[W]) -> f64 {
    x.iter().zip(w).map(|(x, w)| x * w.to_f64()).sum()
}

/// One feed-forward block.
///
/// ```text
/// gated:  out = down(act(gate(x)) * up(x))          plain:  out = down(act(up(x)))
/// ```
///
/// with the projections as in [`linear`], each with a bias where the specification has one, and `act` an [`Activation`].
///
/// * `x`, `out`: `[num_tokens, hidden_size]`; weights: [`FfnWeights`]
///
/// # Errors
/// Those of [`Ffn::validate`] and [`FfnWeights::check`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]. Nothing is written then.
///
/// Shazeer 2020, arXiv:2002.05202.
pub fn mlp<T: Element, W: Element, S: Element>(
    spec: &Ffn,
    x: View<'_, T, 2>,
    weights: &FfnWeights<'_, W, S>,
    mut out: ViewMut<'_, f64, 2>,
) -> Result<()> {
    let num_tokens = check_mlp(spec, &x, &out)?;
    weights.check(spec)?;
    for t in 0..num_tokens {
        let row: Vec<f64> = x.row(&[t]).iter().map(|x| x.to_f64()).collect();
        out.row_mut(&[t]).copy_from_slice(&block(spec, &row, weights));
    }
    Ok(())
}

/// The block for one row.
pub(super) fn block<W: Element, S: Element>(spec: &Ffn, x: &[f64], weights: &FfnWeights<'_, W, S>) -> Vec<f64> {
    let project = |x: &[f64], weight: &View<'_, W, 2>, bias: Option<&[S]>| -> Vec<f64> {
        (0..weight.shape()[0]).map(|o| dot(x, weight.row(&[o])) + bias.map_or(0.0, |b| b[o].to_f64())).collect()
    };
    let up = project(x, &weights.up, weights.up_bias);
    let inner: Vec<f64> = match &weights.gate {
        Some(gate) => {
            let gate = project(x, gate, weights.gate_bias);
            gate.iter().zip(&up).map(|(gate, up)| gated(spec.activation, *gate, *up)).collect()
        }
        None => up.iter().map(|up| activate(spec.activation, *up)).collect(),
    };
    project(&inner, &weights.down, weights.down_bias)
}

/// `act(gate) * up`
fn gated(activation: Activation, gate: f64, up: f64) -> f64 {
    if let Activation::SwigluClamped { alpha, limit } = activation {
        let gate = if gate > limit { limit } else { gate };
        let up = up.clamp(-limit, limit);
        (up + 1.0) * gate * sigmoid(alpha * gate)
    } else {
        activate(activation, gate) * up
    }
}

/// `act(x)`; NaN stays NaN.
fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        // 1 + erf(z) = erfc(-z), without the cancellation.
        Activation::GeluErf => x / 2.0 * erfc(-x / SQRT_2),
        // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), which does not cancel where tanh(z) is near -1.
        Activation::GeluTanh => x / (1.0 + (-2.0 * (2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).exp()),
        Activation::Relu => relu(x),
        Activation::ReluSquared => relu(x).powi(2),
        Activation::SwigluClamped { .. } => unreachable!("`Ffn::validate` has refused a clamped SwiGLU without a gate"),
    }
}

fn relu(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

/// The routed experts.
///
/// ```text
/// out[t] = combine_scale * sum_k w[t, k] * FFN_e(x[t])          WeightOn::Output,  e = topk_ids[t, k]
/// out[t] = combine_scale * sum_k FFN_e(w[t, k] * x[t])          WeightOn::Input
/// ```
///
/// over the slots `k`, in order, whose expert is local (`first_expert .. first_expert + num_local_experts`); other ids, and -1, are
/// skipped, also if their weight is NaN. A token without any local expert gets 0. An expert may stand in several slots.
///
/// * `hidden`, `out`: `[num_tokens, hidden_size]`; `topk_ids`, `topk_weights`: `[num_tokens, slots]`
/// * weights: [`ExpertWeights`], of the local experts alone
///
/// # Errors
/// Those of [`ExpertFfn::validate`], [`Routing::check`] and [`ExpertWeights::check`]; [`Error::Shape`], [`Error::Stride`],
/// [`Error::Len`]; [`Error::Unsupported`] for weights that are not stored as [`WeightFormat::Float`]. Nothing is written then.
///
/// Shazeer et al. 2017, arXiv:1701.06538.
pub fn expert_ffn<T: Element, W: Element, S: Element, R: Element>(
    spec: &ExpertFfn,
    hidden: View<'_, T, 2>,
    routing: &Routing<'_, R>,
    weights: &ExpertWeights<'_, W, S>,
    mut out: ViewMut<'_, f64, 2>,
) -> Result<()> {
    let num_tokens = check_expert_ffn(spec, &hidden, routing, &out)?;
    weights.check(spec)?;
    supported(spec)?;
    for t in 0..num_tokens {
        let x: Vec<f64> = hidden.row(&[t]).iter().map(|x| x.to_f64()).collect();
        let mut sum = vec![0.0; spec.ffn.hidden_size];
        for (id, w) in routing.topk_ids.row(&[t]).iter().zip(routing.topk_weights.row(&[t])) {
            let Some(expert) = spec.local_expert(*id) else { continue };
            let w = w.to_f64();
            let (on_input, on_output) = match spec.weight_on {
                WeightOn::Input => (w, 1.0),
                WeightOn::Output => (1.0, w),
            };
            let x: Vec<f64> = x.iter().map(|x| on_input * x).collect();
            let y = block(&spec.ffn, &x, &weights.expert(expert));
            for (sum, y) in sum.iter_mut().zip(y) {
                *sum += on_output * y;
            }
        }
        for (out, sum) in out.row_mut(&[t]).iter_mut().zip(sum) {
            *out = spec.combine_scale * sum;
        }
    }
    Ok(())
}

/// Plain floating-point weights only.
pub(super) fn supported(spec: &ExpertFfn) -> Result<()> {
    match spec.weight_format {
        WeightFormat::Float => Ok(()),
        other => Err(Error::unsupported("reference", format!("weight_format {other:?}"))),
    }
}
