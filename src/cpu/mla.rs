//! Multi-head latent attention: the two products with `kv_b` that its absorbed form needs, on weights packed per head.

use super::linear::{linear_bytes, linear_heads};
use super::{Cpu, Float, PackedLinear};
use crate::args::{check_mla_absorb_query, check_mla_project_value, mla_kv_b_shape};
use crate::error::{Error, Result};
use crate::spec::Mla;
use crate::view::{View, ViewMut};

/// `kv_b` rearranged once for both products: `nope_dim` rows transposed per head, `value_dim` rows as they are.
#[derive(Debug)]
pub struct PackedMla {
    /// `[num_heads, kv_lora_rank, nope_dim]`
    absorb: PackedLinear,
    /// `[num_heads, value_dim, kv_lora_rank]`
    project: PackedLinear,
}

impl PackedMla {
    /// Packs `kv_b`: `[num_heads, nope_dim + value_dim, kv_lora_rank]`, in parallel.
    ///
    /// # Errors
    /// Those of [`Mla::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`].
    pub fn pack<W: Float>(spec: &Mla, kv_b: View<'_, W, 3>) -> Result<PackedMla> {
        spec.validate()?;
        let shape @ [heads, _, rank] = mla_kv_b_shape(spec);
        kv_b.check("kv_b", shape)?;
        let strides = kv_b.strides();
        let keys = View::with_strides(kv_b.data(), [heads, spec.nope_dim, rank], strides);
        let values = &kv_b.data()[spec.nope_dim * strides[1]..];
        let values = View::with_strides(values, [heads, spec.value_dim, rank], strides);
        Ok(PackedMla { absorb: PackedLinear::pack_heads_transposed(keys)?, project: PackedLinear::pack_heads(values)? })
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.absorb.bytes() + self.project.bytes()
    }

    /// What was packed must be what the specification says.
    fn check(&self, spec: &Mla) -> Result<()> {
        let (nope, value) = (self.absorb.inputs(), self.project.outputs());
        let found = [self.absorb.num_heads(), nope + value, self.absorb.outputs()];
        let expected = mla_kv_b_shape(spec);
        if found != expected {
            return Err(Error::Shape { argument: "kv_b".into(), expected: expected.to_vec(), found: found.to_vec() });
        }
        if nope != spec.nope_dim {
            let expected = format!("nope_dim {} and value_dim {}", spec.nope_dim, spec.value_dim);
            return Err(Error::value("kv_b", expected, format!("packed for nope_dim {nope} and value_dim {value}")));
        }
        Ok(())
    }
}

/// The query of the absorbed form: `out[t, h, c] = sum_d q_nope[t, h, d] * kv_b[h, d, c]`.
///
/// * `q_nope`: `[num_tokens, num_heads, nope_dim]`
/// * `kv_b`: `[num_heads, nope_dim + value_dim, kv_lora_rank]`, packed, of which the first `nope_dim` rows make keys
/// * `out`: `[num_tokens, num_heads, kv_lora_rank]`; the rotated part of the query goes behind it
///
/// Numerics as [`linear`](super::linear()). No token is a legal call.
///
/// # Errors
/// Those of [`Mla::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]. Nothing is written then.
///
/// DeepSeek-V2, arXiv:2405.04434.
pub fn mla_absorb_query<T: Float>(
    cpu: &mut Cpu,
    spec: &Mla,
    q_nope: View<'_, T, 3>,
    kv_b: &PackedMla,
    out: ViewMut<'_, T, 3>,
) -> Result<()> {
    check_mla_absorb_query(spec, &q_nope, &out)?;
    kv_b.check(spec)?;
    linear_heads(cpu, q_nope, &kv_b.absorb, out)
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
/// Those of [`Mla::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]. Nothing is written then.
///
/// DeepSeek-V2, arXiv:2405.04434.
pub fn mla_project_value<T: Float>(
    cpu: &mut Cpu,
    spec: &Mla,
    latent: View<'_, T, 3>,
    kv_b: &PackedMla,
    out: ViewMut<'_, T, 3>,
) -> Result<()> {
    check_mla_project_value(spec, &latent, &out)?;
    kv_b.check(spec)?;
    linear_heads(cpu, latent, &kv_b.project, out)
}

/// Workspace of [`mla_absorb_query`] and [`mla_project_value`] for activations `T`, in the thread pool of the caller.
pub fn mla_workspace_bytes<T: Float>(cpu: &Cpu, kv_b: &PackedMla, num_tokens: usize) -> usize {
    let bytes = |weight| linear_bytes(cpu.level, T::DTYPE, weight, num_tokens);
    bytes(&kv_b.absorb).max(bytes(&kv_b.project))
}
