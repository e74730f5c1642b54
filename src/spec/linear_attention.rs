//! Linear attention with a state instead of a cache: RetNet's retention.

use super::{finite, positive};
use crate::error::Result;

/// In which order retention is computed; all forms give the same numbers up to rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RetentionForm {
    /// All pairs of a query and a key, the state only at the ends.
    #[default]
    Parallel,
    /// One token after the other through the state.
    Recurrent,
    /// Pairs within chunks, the state between them.
    Chunkwise(usize),
}

/// Retention (Sun et al. 2023, arXiv:2307.08621) without rotation and group norm, which are glue around it:
///
/// ```text
/// out[i, h] = sum_{j <= i} decay[h]^(i - j) * scale * (q[i, h] . k[j, h]) * v[j, h] + decay[h]^(i + 1) * scale * q[i, h] S_in[h]
/// S_out[h]  = sum_j decay[h]^(n - 1 - j) * k[j, h]^T v[j, h] + decay[h]^n * S_in[h]
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Retention {
    /// Heads.
    pub num_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor on the dot product.
    pub scale: f64,
    /// Order of computation.
    pub form: RetentionForm,
}

impl Default for Retention {
    fn default() -> Self {
        Retention::new(1, 64, 64)
    }
}

impl Retention {
    /// Scale `1 / sqrt(head_dim)`, parallel form.
    pub fn new(num_heads: usize, head_dim: usize, value_dim: usize) -> Self {
        let scale = (head_dim as f64).sqrt().recip();
        Retention { num_heads, head_dim, value_dim, scale, form: RetentionForm::Parallel }
    }

    /// # Errors
    /// [`crate::Error::Value`] for a size of 0, a scale that is not finite, chunks of 0.
    pub fn validate(&self) -> Result<()> {
        positive("num_heads", self.num_heads)?;
        positive("head_dim", self.head_dim)?;
        positive("value_dim", self.value_dim)?;
        finite("scale", self.scale)?;
        match self.form {
            RetentionForm::Chunkwise(chunk) => positive("form.chunkwise", chunk),
            RetentionForm::Parallel | RetentionForm::Recurrent => Ok(()),
        }
    }
}
