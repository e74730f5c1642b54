//! Multi-head latent attention: the two products with `kv_b` that its absorbed form needs.

use crate::args::{check_mla_absorb_query, check_mla_project_value, mla_kv_b_shape};
use crate::spec::Mla;
use crate::view::{View, ViewMut};
use crate::{Element, Result};

/// The query of the absorbed form: `out[t, h, c] = sum_d q_nope[t, h, d] * kv_b[h, d, c]`.
///
/// * `q_nope`: `[num_tokens, num_heads, nope_dim]`
/// * `kv_b`: `[num_heads, nope_dim + value_dim, kv_lora_rank]`, of which the first `nope_dim` rows make keys
/// * `out`: `[num_tokens, num_heads, kv_lora_rank]`; the rotated part of the query goes behind it
///
/// # Errors
/// Those of [`Mla::validate`]; [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`]. Nothing is written then.
///
/// DeepSeek-V2, arXiv:2405.04434.
pub fn mla_absorb_query<T: Element, W: Element>(
    spec: &Mla,
    q_nope: View<'_, T, 3>,
    kv_b: View<'_, W, 3>,
    mut out: ViewMut<'_, f64, 3>,
) -> Result<()> {
    let num_tokens = check_mla_absorb_query(spec, &q_nope, &out)?;
    kv_b.check("kv_b", mla_kv_b_shape(spec))?;
    for t in 0..num_tokens {
        for h in 0..spec.num_heads {
            let out = out.row_mut(&[t, h]);
            out.fill(0.0);
            for (d, q) in q_nope.row(&[t, h]).iter().enumerate() {
                for (out, w) in out.iter_mut().zip(kv_b.row(&[h, d])) {
                    *out += q.to_f64() * w.to_f64();
                }
            }
        }
    }
    Ok(())
}

/// From latent rows to values, for the keys of the expanded form and the outputs of the absorbed one:
/// `out[t, h, d] = sum_c kv_b[h, nope_dim + d, c] * latent[t, h, c]`.
///
/// * `latent`: `[num_tokens, num_heads, kv_lora_rank]`, `out`: `[num_tokens, num_heads, value_dim]`
/// * `kv_b`: as in [`mla_absorb_query`]; its last `value_dim` rows make values
///
/// # Errors
/// Those of [`Mla::validate`]; [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`]. Nothing is written then.
///
/// DeepSeek-V2, arXiv:2405.04434.
pub fn mla_project_value<T: Element, W: Element>(
    spec: &Mla,
    latent: View<'_, T, 3>,
    kv_b: View<'_, W, 3>,
    mut out: ViewMut<'_, f64, 3>,
) -> Result<()> {
    let num_tokens = check_mla_project_value(spec, &latent, &out)?;
    kv_b.check("kv_b", mla_kv_b_shape(spec))?;
    for t in 0..num_tokens {
        for h in 0..spec.num_heads {
            let latent = latent.row(&[t, h]);
            for d in 0..spec.value_dim {
                let w = kv_b.row(&[h, spec.nope_dim + d]);
                out.set([t, h, d], latent.iter().zip(w).map(|(c, w)| c.to_f64() * w.to_f64()).sum());
            }
        }
    }
    Ok(())
}
