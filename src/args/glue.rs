//! Checks of the functions that take plain views instead of a struct. Weights are not among them where a backend packs
//! them: there their shape comes as an argument.

use super::{RopeTable, Routing};
use crate::error::{Result, check_len, check_presence, why};
use crate::spec::{ExpertFfn, Ffn, Mla, Norm, Rope, Router};
use crate::view::{View, ViewMut};

/// [`crate::reference::norm`].
pub(crate) fn check_norm<T, S, O, const N: usize>(
    spec: &Norm,
    x: &View<'_, T, N>,
    weight: Option<&[S]>,
    bias: Option<&[S]>,
    out: &ViewMut<'_, O, N>,
) -> Result<()> {
    spec.validate()?;
    let width = x.shape()[N - 1];
    x.check("x", x.shape())?;
    weight.map_or(Ok(()), |w| check_len("weight", w.len(), width))?;
    if let Some(bias) = check_presence("bias", bias, spec.bias, why::NORM_BIAS)? {
        check_len("bias", bias.len(), width)?;
    }
    out.check("out", x.shape())
}

/// Two inputs and an output of one shape: [`crate::reference::add`], [`crate::reference::sigmoid_mul`].
pub(crate) fn check_elementwise<T, U, O>(
    x: &View<'_, T, 2>,
    name: &str,
    other: &View<'_, U, 2>,
    out: &ViewMut<'_, O, 2>,
) -> Result<()> {
    x.check("x", x.shape())?;
    other.check(name, x.shape())?;
    out.check("out", x.shape())
}

/// [`crate::reference::linear`] with a weight of shape `[out_features, in_features]`; gives the number of rows.
pub(crate) fn check_linear<T, S, O>(
    x: &View<'_, T, 2>,
    [out_features, in_features]: [usize; 2],
    bias: Option<&[S]>,
    out: &ViewMut<'_, O, 2>,
) -> Result<usize> {
    let rows = x.shape()[0];
    x.check("x", [rows, in_features])?;
    bias.map_or(Ok(()), |b| check_len("bias", b.len(), out_features))?;
    out.check("out", [rows, out_features])?;
    Ok(rows)
}

/// [`crate::reference::mlp`] but for the weights; gives the number of rows.
pub(crate) fn check_mlp<T, O>(spec: &Ffn, x: &View<'_, T, 2>, out: &ViewMut<'_, O, 2>) -> Result<usize> {
    spec.validate()?;
    let rows = x.shape()[0];
    x.check("x", [rows, spec.hidden_size])?;
    out.check("out", [rows, spec.hidden_size])?;
    Ok(rows)
}

/// [`crate::reference::rope`].
pub(crate) fn check_rope<T, S, O>(
    spec: &Rope,
    x: &View<'_, T, 3>,
    positions: &[u32],
    table: &RopeTable<'_, S>,
    out: &ViewMut<'_, O, 3>,
) -> Result<()> {
    let [num_tokens, _, head_dim] = x.shape();
    spec.validate(head_dim)?;
    x.check("x", x.shape())?;
    table.check(spec, positions, num_tokens)?;
    out.check("out", x.shape())
}

/// [`crate::reference::router_logits`] but for the weight, which is `[num_experts, hidden_size]`; gives the number of tokens.
pub(crate) fn check_router_logits<T, S, O>(
    spec: &Router,
    hidden: &View<'_, T, 2>,
    bias: Option<&[S]>,
    logits: &ViewMut<'_, O, 2>,
) -> Result<usize> {
    spec.validate()?;
    let num_tokens = hidden.shape()[0];
    hidden.check("hidden", hidden.shape())?;
    bias.map_or(Ok(()), |b| check_len("bias", b.len(), spec.num_experts))?;
    logits.check("logits", [num_tokens, spec.num_experts])?;
    Ok(num_tokens)
}

/// [`crate::reference::expert_ffn`] but for the weights; gives the number of tokens.
pub(crate) fn check_expert_ffn<T, R, O>(
    spec: &ExpertFfn,
    hidden: &View<'_, T, 2>,
    routing: &Routing<'_, R>,
    out: &ViewMut<'_, O, 2>,
) -> Result<usize> {
    spec.validate()?;
    let num_tokens = hidden.shape()[0];
    hidden.check("hidden", [num_tokens, spec.ffn.hidden_size])?;
    routing.check(num_tokens)?;
    out.check("out", [num_tokens, spec.ffn.hidden_size])?;
    Ok(num_tokens)
}

/// [`crate::reference::mla_absorb_query`] but for `kv_b`; gives the number of tokens.
pub(crate) fn check_mla_absorb_query<T, O>(
    spec: &Mla,
    q_nope: &View<'_, T, 3>,
    out: &ViewMut<'_, O, 3>,
) -> Result<usize> {
    spec.validate()?;
    let num_tokens = q_nope.shape()[0];
    q_nope.check("q_nope", [num_tokens, spec.num_heads, spec.nope_dim])?;
    out.check("out", [num_tokens, spec.num_heads, spec.kv_lora_rank])?;
    Ok(num_tokens)
}

/// [`crate::reference::mla_project_value`] but for `kv_b`; gives the number of tokens.
pub(crate) fn check_mla_project_value<T, O>(
    spec: &Mla,
    latent: &View<'_, T, 3>,
    out: &ViewMut<'_, O, 3>,
) -> Result<usize> {
    spec.validate()?;
    let num_tokens = latent.shape()[0];
    latent.check("latent", [num_tokens, spec.num_heads, spec.kv_lora_rank])?;
    out.check("out", [num_tokens, spec.num_heads, spec.value_dim])?;
    Ok(num_tokens)
}

/// Shape of `kv_b`: `[num_heads, nope_dim + value_dim, kv_lora_rank]`.
pub(crate) fn mla_kv_b_shape(spec: &Mla) -> [usize; 3] {
    [spec.num_heads, spec.nope_dim + spec.value_dim, spec.kv_lora_rank]
}

/// [`crate::reference::merge`]; gives `[num_parts, num_tokens, num_heads, value_dim]`.
pub(crate) fn check_merge<T, S, O, R>(
    outs: &View<'_, T, 4>,
    lses: &View<'_, S, 3>,
    output: &super::AttentionOutput<'_, O, R>,
) -> Result<[usize; 4]> {
    let shape @ [num_parts, num_tokens, num_heads, value_dim] = outs.shape();
    outs.check("outs", shape)?;
    lses.check("lses", [num_parts, num_tokens, num_heads])?;
    output.out.check("out", [num_tokens, num_heads, value_dim])?;
    if let Some(lse) = &output.lse {
        lse.check("lse", [num_tokens, num_heads])?;
    }
    Ok(shape)
}
