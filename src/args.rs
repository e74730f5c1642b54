//! Arguments of the functions: views of the caller's memory in structs with the same names on every backend, checked in
//! one place against the specification.
//!
//! `T` is the element type of activations, `W` of weights, `S` of small side inputs (biases, tables, norm weights):
//! `f32`, or `f64` for a reference in full precision. `O` and `R` are the types of outputs.

mod attention;
mod glue;
mod linear_attention;
mod moe;
mod qkv;

pub use attention::{AttentionInput, AttentionOutput, AttentionShape, Kv, KvRun, Sequence};
pub use linear_attention::{RetentionInput, RetentionOutput, WkvInput, WkvOutput};
pub use moe::{ExpertWeights, FfnWeights, MoeInput, MoeOutput, MoeWeights, RouteInput, RouteOutput, Routing};
pub use qkv::{KvCache, KvCacheMut, QkvInput, QkvOutput, RopeTable};

pub(crate) use glue::{
    check_elementwise, check_expert_ffn, check_linear, check_merge, check_mla_absorb_query, check_mla_project_value,
    check_mlp, check_norm, check_rope, check_router_logits, mla_kv_b_shape,
};

use crate::error::{Error, Result};

/// `[num_seqs + 1]` prefix sums: start at 0, never fall, end at `total`.
pub(crate) fn check_prefix_sums(name: &str, sums: &[u32], total: usize) -> Result<()> {
    let Some((&first, &last)) = sums.first().zip(sums.last()) else {
        return Err(Error::Len { argument: name.into(), expected: 1, found: 0 });
    };
    if first != 0 {
        return Err(Error::value(format!("{name}[0]"), "0", first));
    }
    for (i, pair) in sums.windows(2).enumerate() {
        if pair[1] < pair[0] {
            return Err(Error::value(format!("{name}[{}]", i + 1), format!("at least {}", pair[0]), pair[1]));
        }
    }
    if last as usize != total {
        return Err(Error::value(format!("{name}[{}]", sums.len() - 1), format!("{total}, the number of rows"), last));
    }
    Ok(())
}
