//! Normalisation, and what happens to queries, keys and values between their projection and attention.

use super::{Rope, finite, non_negative_number, positive, positive_number};
use crate::error::{Error, Result};

/// Which norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`. Zhang and Sennrich 2019, arXiv:1910.07467.
    #[default]
    Rms,
    /// `(x - mean) / sqrt(variance + eps) * (weight + weight_offset) + bias`, biased variance. Ba et al. 2016, arXiv:1607.06450.
    Layer,
}

/// A norm over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Norm {
    /// Which norm.
    pub kind: NormKind,
    /// Added under the root; at least 0.
    pub eps: f64,
    /// Added to the weight (1 where a model stores `weight - 1`).
    pub weight_offset: f64,
    /// The model gives a bias (layer norm only).
    pub bias: bool,
}

impl Default for Norm {
    fn default() -> Self {
        Norm::rms(1e-6)
    }
}

impl Norm {
    /// RMS norm.
    pub const fn rms(eps: f64) -> Self {
        Norm { kind: NormKind::Rms, eps, weight_offset: 0.0, bias: false }
    }

    /// Layer norm without bias.
    pub const fn layer(eps: f64) -> Self {
        Norm { kind: NormKind::Layer, eps, weight_offset: 0.0, bias: false }
    }

    /// # Errors
    /// [`Error::Value`] for a negative epsilon or an offset that is not finite, or a bias on an RMS norm.
    pub fn validate(&self) -> Result<()> {
        non_negative_number("norm.eps", self.eps)?;
        finite("norm.weight_offset", self.weight_offset)?;
        if self.bias && self.kind == NormKind::Rms {
            return Err(Error::value("norm.bias", "false for an RMS norm", "true"));
        }
        Ok(())
    }
}

/// Norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum QkNorm {
    /// RMS norm of each head by itself, weights `[head_dim]`, before RoPE.
    PerHead,
    /// RMS norm over all heads together, weights `[heads * head_dim]`, before RoPE (and before clipping).
    Full,
    /// RMS norm of each head without weights, after RoPE (Llama-4).
    L2AfterRope,
}

/// Llama-4's temperature: `q *= 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct QTemperature {
    /// Positions per step.
    pub floor_scale: f64,
    /// Strength.
    pub attn_scale: f64,
}

impl QTemperature {
    /// Both fields.
    pub const fn new(floor_scale: f64, attn_scale: f64) -> Self {
        QTemperature { floor_scale, attn_scale }
    }

    /// The factor on the query at `position`.
    pub fn factor(&self, position: u32) -> f64 {
        1.0 + self.attn_scale * ((f64::from(position) + 1.0) / self.floor_scale).floor().ln_1p()
    }
}

/// From projected rows to what attention reads, in this order: norm over all heads ([`QkNorm::Full`]), clipping of q, k
/// and v, norm per head, RoPE, norm without weights ([`QkNorm::L2AfterRope`]), query temperature.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct QkvPrep {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Norm of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Epsilon and weight offset of `qk_norm`; always an RMS norm.
    pub norm: Norm,
    /// q, k and v are clamped to `[-clip, clip]`.
    pub clip: Option<f64>,
    /// Rotary embedding; the call gives the table.
    pub rope: Option<Rope>,
    /// Factor on the query by position.
    pub q_temperature: Option<QTemperature>,
}

impl Default for QkvPrep {
    fn default() -> Self {
        QkvPrep::new(1, 1, 64)
    }
}

impl QkvPrep {
    /// Nothing but the heads.
    pub fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        QkvPrep {
            num_heads,
            num_kv_heads,
            head_dim,
            value_dim: head_dim,
            qk_norm: None,
            norm: Norm::default(),
            clip: None,
            rope: None,
            q_temperature: None,
        }
    }

    /// # Errors
    /// [`Error::Value`] for a size of 0, a norm that is not RMS, a clip that is not positive, RoPE wider than a head.
    pub fn validate(&self) -> Result<()> {
        positive("num_heads", self.num_heads)?;
        positive("num_kv_heads", self.num_kv_heads)?;
        positive("head_dim", self.head_dim)?;
        positive("value_dim", self.value_dim)?;
        self.norm.validate()?;
        if self.norm.kind != NormKind::Rms {
            return Err(Error::value("norm.kind", "Rms for queries and keys", "Layer"));
        }
        if let Some(clip) = self.clip {
            positive_number("clip", clip)?;
        }
        if let Some(rope) = &self.rope {
            rope.validate(self.head_dim)?;
        }
        if let Some(t) = &self.q_temperature {
            positive_number("q_temperature.floor_scale", t.floor_scale)?;
            finite("q_temperature.attn_scale", t.attn_scale)?;
        }
        Ok(())
    }
}
