//! What the decoders of all families have in common: sizes, defaults, the parts that a layer is put together from.

use super::fields::{Fields, MAX_HEAD_DIM, MAX_SIZE, describe};
use super::rope::{self, RopeRead, RopeRules};
use super::{Family, HfConfig};
use crate::error::Result;
use crate::spec::{
    Activation, Attention, AttentionBlock, AuxLoss, ExpertFfn, ExpertGroups, Ffn, GqaBlock, GroupScore, Layer, Mask,
    Mlp, Moe, Norm, Renormalize, Rope, RopeStyle, Router, Score, SelectOn, WeightFormat,
};

/// Defaults of a configuration class. A `head_dim` of 0 is `hidden_size / num_attention_heads`, `kv_heads` of 0 `heads`.
pub(super) struct Defaults {
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) eps: f64,
    pub(super) max_position: usize,
    pub(super) theta: f64,
    pub(super) tie: bool,
}

impl Defaults {
    /// Sizes; the rest as Llama has it.
    pub(super) const fn new(vocab: usize, hidden: usize, layers: usize, heads: usize, kv_heads: usize) -> Self {
        Defaults {
            vocab,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim: 0,
            eps: 1e-6,
            max_position: 2048,
            theta: 10_000.0,
            tie: false,
        }
    }
}

/// What all decoders have in common.
pub(super) struct Decoder<'a> {
    pub(super) f: &'a Fields<'a>,
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) norm: Norm,
    pub(super) max_position: usize,
    pub(super) theta: f64,
    pub(super) activation: Activation,
    pub(super) tie: bool,
}

impl<'a> Decoder<'a> {
    pub(super) fn read(f: &'a Fields<'a>, d: &Defaults) -> Result<Self> {
        let hidden = f.size("hidden_size", d.hidden)?;
        let heads = f.size("num_attention_heads", d.heads)?;
        // Null is one key/value head a query head, also where the class has another default.
        let missing = if d.kv_heads == 0 { None } else { Some(d.kv_heads) };
        let kv_heads = f.optional_size("num_key_value_heads", missing)?.unwrap_or(heads);
        let missing = if d.head_dim == 0 { None } else { Some(d.head_dim) };
        let head_dim = match f.optional_size("head_dim", missing)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a multiple of `num_attention_heads` ({heads}), as there is no `head_dim`");
                return Err(f.error("hidden_size", expected, hidden.to_string()));
            }
        };
        if head_dim > MAX_HEAD_DIM {
            return Err(f.error("head_dim", format!("at most {MAX_HEAD_DIM}"), head_dim.to_string()));
        }
        Ok(Decoder {
            f,
            vocab: f.size("vocab_size", d.vocab)?,
            hidden,
            layers: f.layers("num_hidden_layers", d.layers)?,
            heads,
            kv_heads,
            head_dim,
            norm: Norm::rms(epsilon(f, "rms_norm_eps", d.eps)?),
            max_position: f.position("max_position_embeddings", d.max_position)?,
            theta: d.theta,
            activation: activation(f, "hidden_act")?,
            tie: f.flag("tie_word_embeddings", d.tie)?,
        })
    }

    /// The rules of the rotary embedding over whole heads.
    pub(super) fn rope_rules(&self, style: RopeStyle) -> RopeRules {
        RopeRules::new(style, self.head_dim, self.theta, self.max_position)
    }

    pub(super) fn rope(&self, style: RopeStyle) -> Result<RopeRead> {
        rope::read(self.f, &self.rope_rules(style))
    }

    pub(super) fn attention(&self, mask: Mask) -> Attention {
        Attention { mask, ..Attention::new(self.heads, self.kv_heads, self.head_dim) }
    }

    pub(super) fn dense(&self, intermediate: usize) -> Ffn {
        Ffn::gated(self.hidden, intermediate, self.activation)
    }

    pub(super) fn moe(&self, router: Router, intermediate: usize) -> Moe {
        let experts = ExpertFfn::new(router.num_experts, self.dense(intermediate));
        Moe::new(router, experts)
    }

    pub(super) fn layer(&self, attention: GqaBlock, mlp: Mlp) -> Layer {
        Layer::new(self.hidden, self.norm, AttentionBlock::Gqa(attention), mlp)
    }

    /// The model from its layers.
    pub(super) fn model(
        &self,
        long_rope: Option<(usize, Rope)>,
        layer: impl Fn(usize) -> Result<Result<Layer, String>>,
    ) -> Result<HfConfig> {
        // Models have few kinds of layers: each is kept once.
        let (mut kinds, mut layers) = (Vec::new(), Vec::new());
        for n in 0..self.layers {
            let layer = layer(n)?;
            let kind = kinds.iter().position(|k| *k == layer).unwrap_or_else(|| {
                kinds.push(layer);
                kinds.len() - 1
            });
            layers.push(kind);
        }
        Ok(HfConfig {
            family: Family::Llama,
            num_layers: self.layers,
            hidden_size: self.hidden,
            vocab_size: self.vocab,
            max_position: Some(self.max_position),
            tie_word_embeddings: self.tie,
            head_bias: false,
            embedding_multiplier: 1.0,
            sinusoidal_positions: false,
            logits_scaling: 1.0,
            final_norm: self.norm,
            dtype: None,
            weight_format: WeightFormat::Float,
            kinds,
            layers,
            long_rope,
        })
    }
}

pub(super) fn epsilon(f: &Fields, name: &str, default: f64) -> Result<f64> {
    let eps = f.number(name, default)?;
    if (0.0..=1.0).contains(&eps) { Ok(eps) } else { Err(f.error(name, "a number from 0 to 1", eps.to_string())) }
}

pub(super) fn activation(f: &Fields, name: &str) -> Result<Activation> {
    match f.word(name)? {
        None | Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu") => Ok(Activation::GeluErf),
        Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some("relu") => Ok(Activation::Relu),
        Some("relu2") => Ok(Activation::ReluSquared),
        Some(other) => {
            let expected = "\"silu\", \"swish\", \"gelu\", \"gelu_new\", \"gelu_pytorch_tanh\", \"relu\" or \"relu2\"";
            Err(f.error(name, expected, describe(&other.into())))
        }
    }
}

/// Causal, with a Hugging Face sliding window: `sliding_window` keys, the query's own included.
pub(super) fn causal(sliding_window: Option<usize>) -> Mask {
    Mask { window_left: sliding_window.map(|w| w - 1), ..Mask::causal() }
}

/// A width made of two factors.
pub(super) fn product(f: &Fields, name: &str, a: usize, b: usize) -> Result<usize> {
    let width = a.checked_mul(b).filter(|width| *width <= MAX_SIZE);
    width.ok_or_else(|| f.error(name, format!("a width of at most {MAX_SIZE}"), format!("{a} times {b}")))
}

/// Softmax over all experts, then top-k.
pub(super) fn softmax_top_k(num_experts: usize, top_k: usize, renormalize: bool) -> Router {
    Router {
        renormalize: if renormalize { Renormalize::sum() } else { Renormalize::None },
        aux_loss: Some(AuxLoss::TopK),
        ..Router::new(num_experts, top_k)
    }
}

/// Top-k of the logits, softmax over the selected.
pub(super) fn top_k_softmax(num_experts: usize, top_k: usize) -> Router {
    Router {
        score: Score::Raw,
        select_on: SelectOn::Logits,
        renormalize: Renormalize::Softmax,
        aux_loss: Some(AuxLoss::TopK),
        ..Router::new(num_experts, top_k)
    }
}

/// Groups of experts, unless all of them may be selected from anyway.
pub(super) fn groups(f: &Fields, default: (usize, usize), score: GroupScore) -> Result<Option<ExpertGroups>> {
    let num_groups = f.size("n_group", default.0)?;
    let top_groups = f.size("topk_group", default.1)?;
    Ok((num_groups > 1).then(|| ExpertGroups::new(num_groups, top_groups, score)))
}

/// `hidden_size / num_attention_heads`, rounded down, at least 1.
pub(super) fn head_dim_floor(f: &Fields, hidden: usize, heads: usize) -> Result<usize> {
    Ok((f.size("hidden_size", hidden)? / f.size("num_attention_heads", heads)?).max(1))
}
