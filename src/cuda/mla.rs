//! Multi-head latent attention: the two products with `kv_b` that its absorbed form needs, on weights as checkpoints have them.

use crate::args::mla_kv_b_shape;
use crate::cuda::linear::launch_heads;
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::element::Element;
use crate::error::Result;
use crate::spec::Mla;

/// The query of the absorbed form: `out[t, h, c] = sum_d q_nope[t, h, d] * kv_b[h, d, c]`.
///
/// * `q_nope`: `[num_tokens, num_heads, nope_dim]`
/// * `kv_b`: `[num_heads, nope_dim + value_dim, kv_lora_rank]`, of which the first `nope_dim` rows make keys
/// * `out`: `[num_tokens, num_heads, kv_lora_rank]`; the rotated part of the query goes behind it
///
/// Numerics as [`linear`](super::linear()); f32 is multiplied in full, whatever the queue says. No token is a legal call.
///
/// # Errors
/// Those of [`Mla::validate`]; [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride),
/// [`Error::Len`](crate::Error::Len); [`Error::Value`](crate::Error::Value) for widths that are no multiple of 16 bytes. Nothing is
/// written then.
///
/// DeepSeek-V2, arXiv:2405.04434.
pub fn mla_absorb_query<T: Element>(
    queue: &mut Queue<'_>,
    spec: &Mla,
    q_nope: DeviceView<'_, T, 3>,
    kv_b: DeviceView<'_, T, 3>,
    out: DeviceViewMut<'_, T, 3>,
) -> Result<()> {
    spec.validate()?;
    let num_tokens = q_nope.shape()[0];
    q_nope.check("q_nope", [num_tokens, spec.num_heads, spec.nope_dim])?;
    out.check("out", [num_tokens, spec.num_heads, spec.kv_lora_rank])?;
    kv_b.check("kv_b", mla_kv_b_shape(spec))?;
    launch_heads(queue, q_nope, kv_b, true, out)
}

/// From latent rows to values, for the keys of the expanded form and the outputs of the absorbed one:
/// `out[t, h, d] = sum_c kv_b[h, nope_dim + d, c] * latent[t, h, c]`.
///
/// * `latent`: `[num_tokens, num_heads, kv_lora_rank]`, `out`: `[num_tokens, num_heads, value_dim]`
/// * `kv_b`: as in [`mla_absorb_query`]; its last `value_dim` rows make values
///
/// Numerics as [`linear`](super::linear()). No token is a legal call.
///
/// # Errors
/// As [`mla_absorb_query`].
///
/// DeepSeek-V2, arXiv:2405.04434.
pub fn mla_project_value<T: Element>(
    queue: &mut Queue<'_>,
    spec: &Mla,
    latent: DeviceView<'_, T, 3>,
    kv_b: DeviceView<'_, T, 3>,
    out: DeviceViewMut<'_, T, 3>,
) -> Result<()> {
    spec.validate()?;
    let num_tokens = latent.shape()[0];
    latent.check("latent", [num_tokens, spec.num_heads, spec.kv_lora_rank])?;
    out.check("out", [num_tokens, spec.num_heads, spec.value_dim])?;
    kv_b.check("kv_b", mla_kv_b_shape(spec))?;
    launch_heads(queue, latent, kv_b.skip(spec.nope_dim * kv_b.strides()[1]), false, out)
}
