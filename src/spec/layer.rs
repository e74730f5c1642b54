//! A whole decoder (or encoder) layer as data: what a model's configuration says about one layer.

use super::{Attention, Ffn, Mla, Moe, Norm, QTemperature, QkNorm, QkvPrep, Rope, finite, positive};
use crate::error::{Error, Result};

/// One pre-norm layer: `h = x + r * post(attention(norm(x)))`, `out = h + r * post(mlp(norm(h)))`.
///
/// Data only: the functions of a backend (`rms_norm`, `linear`, `prepare_qkv`, `attention`, `moe`, ...) compute it, and
/// `examples/support` shows how.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Layer {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The norms in front of attention and feed-forward (and behind them, where there are any).
    pub norm: Norm,
    /// A norm behind attention, before the residual sum.
    pub post_attention_norm: bool,
    /// A norm behind the feed-forward part, before the residual sum.
    pub post_mlp_norm: bool,
    /// The attention part.
    pub attention: AttentionBlock,
    /// The feed-forward part.
    pub mlp: Mlp,
    /// The factor `r` on what is added to the residual stream.
    pub residual_multiplier: f64,
}

/// The attention part of a layer.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum AttentionBlock {
    /// Query, key and value projections.
    Gqa(GqaBlock),
    /// Latent attention.
    Mla(MlaBlock),
}

/// `attention(prepare(x wq^T + bq, x wk^T + bk, x wv^T + bv)) wo^T + bo`.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct GqaBlock {
    /// Heads, widths, scale, mask.
    pub attention: Attention,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// Norm of queries and keys, with the layer's epsilon and weight offset.
    pub qk_norm: Option<QkNorm>,
    /// q, k and v are clamped.
    pub clip_qkv: Option<f64>,
    /// Rotary embedding.
    pub rope: Option<Rope>,
    /// Query temperature.
    pub q_temperature: Option<QTemperature>,
    /// The query projection gives, per head, a query and a gate of the value's width behind it; attention's output is
    /// multiplied by `sigmoid(gate)` (Qwen3-Next).
    pub output_gate: bool,
}

impl GqaBlock {
    /// Nothing but projections and attention.
    pub const fn new(attention: Attention) -> Self {
        GqaBlock {
            attention,
            qkv_bias: false,
            out_bias: false,
            qk_norm: None,
            clip_qkv: None,
            rope: None,
            q_temperature: None,
            output_gate: false,
        }
    }

    /// What happens between projection and attention, in a layer with this norm.
    pub fn qkv_prep(&self, norm: &Norm) -> QkvPrep {
        let a = &self.attention;
        QkvPrep {
            value_dim: a.value_dim,
            qk_norm: self.qk_norm,
            norm: Norm { weight_offset: norm.weight_offset, ..Norm::rms(norm.eps) },
            clip: self.clip_qkv,
            rope: self.rope.clone(),
            q_temperature: self.q_temperature,
            ..QkvPrep::new(a.num_heads, a.num_kv_heads, a.head_dim)
        }
    }
}

/// Latent attention with its projections.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct MlaBlock {
    /// Ranks and widths.
    pub mla: Mla,
    /// The attention of the expanded form: mask and scale.
    pub attention: Attention,
    /// Rotary embedding of the `rope_dim` part.
    pub rope: Rope,
    /// Biases on the projections from the hidden state (`q_a` or `q`, and `kv_a`).
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
}

impl MlaBlock {
    /// Causal, scale `1 / sqrt(nope_dim + rope_dim)`, no biases.
    pub fn new(mla: Mla, rope: Rope) -> Self {
        MlaBlock { attention: mla.expanded(), mla, rope, qkv_bias: false, out_bias: false }
    }
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Mlp {
    /// One block for all tokens.
    Dense(Ffn),
    /// A mixture of experts.
    Moe(Box<Moe>),
}

impl Layer {
    /// No norms behind the parts, residual factor 1.
    pub const fn new(hidden_size: usize, norm: Norm, attention: AttentionBlock, mlp: Mlp) -> Self {
        Layer {
            hidden_size,
            norm,
            post_attention_norm: false,
            post_mlp_norm: false,
            attention,
            mlp,
            residual_multiplier: 1.0,
        }
    }

    /// The attention that the layer computes (of latent attention: the expanded form).
    pub fn attention(&self) -> &Attention {
        match &self.attention {
            AttentionBlock::Gqa(block) => &block.attention,
            AttentionBlock::Mla(block) => &block.attention,
        }
    }

    /// # Errors
    /// Those of its parts; [`Error::Value`] where they do not fit one another.
    pub fn validate(&self) -> Result<()> {
        positive("hidden_size", self.hidden_size)?;
        self.norm.validate()?;
        match &self.attention {
            AttentionBlock::Gqa(block) => {
                block.attention.validate()?;
                block.qkv_prep(&self.norm).validate()?;
            }
            AttentionBlock::Mla(block) => {
                block.mla.validate()?;
                block.attention.validate()?;
                block.rope.validate(block.mla.rope_dim)?;
                if block.rope.rotary_dim != block.mla.rope_dim {
                    let expected = format!("rope_dim ({})", block.mla.rope_dim);
                    return Err(Error::value("rope.rotary_dim", expected, block.rope.rotary_dim));
                }
                let (a, m) = (&block.attention, &block.mla);
                let found = [a.num_heads, a.num_kv_heads, a.head_dim, a.value_dim];
                let expected = [m.num_heads, m.num_heads, m.head_dim(), m.value_dim];
                if found != expected {
                    return Err(Error::value(
                        "attention",
                        format!("heads and widths {expected:?}"),
                        format!("{found:?}"),
                    ));
                }
            }
        }
        let hidden_size = match &self.mlp {
            Mlp::Dense(ffn) => {
                ffn.validate()?;
                ffn.hidden_size
            }
            Mlp::Moe(moe) => {
                moe.validate()?;
                moe.experts.ffn.hidden_size
            }
        };
        if hidden_size != self.hidden_size {
            let expected = format!("the layer's ({})", self.hidden_size);
            return Err(Error::value("mlp.hidden_size", expected, hidden_size));
        }
        finite("residual_multiplier", self.residual_multiplier)
    }
}
