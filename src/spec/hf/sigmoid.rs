//! Mixtures with a bias that chooses or with latent attention: GLM-4.5, MiniMax-M2, DeepSeek. Defaults and meaning are those of
//! transformers 5.23.0; where a comment says so, those of the published code.

use super::HfConfig;
use super::decoder::{Decoder, Defaults, groups, head_dim_floor, product};
use super::fields::Fields;
use super::rope::{self, RopeRules};
use crate::error::{Error, Result};
use crate::spec::{
    AttentionBlock, AuxLoss, GqaBlock, GroupScore, Layer, Mask, Mla, MlaBlock, Mlp, Moe, QkNorm, Renormalize,
    RopeStyle, Router, Score, SharedExpert,
};

/// The router of DeepSeek-V3 and GLM-4.5.
fn sigmoid_groups(f: &Fields, num_experts: usize, groups_default: (usize, usize), scaling: f64) -> Result<Router> {
    f.expect_word("scoring_func", &["sigmoid"])?;
    f.expect_word("topk_method", &["noaux_tc"])?;
    let renormalize = match f.flag("norm_topk_prob", true)? {
        true => Renormalize::Sum { eps: 1e-20, floor: 0.0 },
        false => Renormalize::None,
    };
    Ok(Router {
        score: Score::Sigmoid,
        groups: groups(f, groups_default, GroupScore::Top2Sum)?,
        renormalize,
        scaling_factor: f.number("routed_scaling_factor", scaling)?,
        ..Router::new(num_experts, f.size("num_experts_per_tok", 8)?)
    })
}

/// The mixture of DeepSeek and GLM-4.5: shared experts are one wide one.
fn with_shared(d: &Decoder, router: Router, intermediate: usize, shared_default: usize) -> Result<Moe> {
    let f = d.f;
    if f.is_null("n_shared_experts") {
        // The package takes no null here, the code published with the models reads it as none.
        return Err(f.error("n_shared_experts", "a number", "null"));
    }
    let width = product(f, "n_shared_experts", intermediate, f.count("n_shared_experts", shared_default)?)?;
    let mut moe = d.moe(router, intermediate);
    moe.shared = (width > 0).then(|| SharedExpert::new(d.dense(width)));
    Ok(moe)
}

pub(super) fn glm4_moe(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { eps: 1e-5, max_position: 131_072, ..Defaults::new(151_552, 4096, 46, 96, 8) };
    // The class divides, without looking for a remainder, where `head_dim` is missing.
    let d = Decoder::read(f, &Defaults { head_dim: head_dim_floor(f, 4096, 96)?, ..defaults })?;
    let (intermediate, moe_intermediate) =
        (f.size("intermediate_size", 10_944)?, f.size("moe_intermediate_size", 1408)?);
    let num_experts = f.size_of(&["n_routed_experts", "num_local_experts"], 128)?;
    let router = sigmoid_groups(f, num_experts, (1, 1), 1.0)?;
    let mut moe = with_shared(&d, router, moe_intermediate, 1)?;
    moe.selection_bias = true;
    let first_moe = f.count("first_k_dense_replace", 1)?;
    let bias = f.flag("attention_bias", false)?;
    let qk_norm = f.flag("use_qk_norm", false)?.then_some(QkNorm::PerHead);
    let rope = rope::read(f, &RopeRules { partial: Some(0.5), ..d.rope_rules(RopeStyle::Half) })?;
    d.model(rope.long.clone(), |n| {
        let attention = GqaBlock {
            qkv_bias: bias,
            qk_norm,
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(d.attention(Mask::causal()))
        };
        let mlp = if n >= first_moe { Mlp::Moe(Box::new(moe.clone())) } else { Mlp::Dense(d.dense(intermediate)) };
        Ok(Ok(d.layer(attention, mlp)))
    })
}

pub(super) fn minimax_m2(f: &Fields) -> Result<HfConfig> {
    let defaults =
        Defaults { head_dim: 128, max_position: 196_608, theta: 5e6, ..Defaults::new(200_064, 3072, 62, 48, 8) };
    let d = Decoder::read(f, &defaults)?;
    f.expect_flag("use_qk_norm", true)?;
    f.expect_word("qk_norm_type", &["per_layer"])?;
    f.expect_word("scoring_func", &["sigmoid"])?;
    f.expect_number("shared_intermediate_size", 0.0)?;
    let types = f.indices("attn_type_list", 2)?;
    let intermediate = f.size("intermediate_size", 1536)?;
    let num_experts = f.size_of(&["num_local_experts", "num_experts"], 256)?;
    let router = Router {
        score: Score::Sigmoid,
        renormalize: Renormalize::sum(),
        aux_loss: Some(AuxLoss::TopK),
        ..Router::new(num_experts, f.size("num_experts_per_tok", 8)?)
    };
    let moe = Moe { selection_bias: f.flag("use_routing_bias", true)?, ..d.moe(router, intermediate) };
    // `rotary_dim` stands for the partial factor in the published files.
    let partial = match f.optional_size("rotary_dim", None)? {
        Some(n) if n > d.head_dim => {
            return Err(f.error("rotary_dim", format!("at most `head_dim` ({})", d.head_dim), n.to_string()));
        }
        Some(n) => n as f64 / d.head_dim as f64,
        None => 1.0,
    };
    let rope = rope::read(f, &RopeRules { partial: Some(partial), ..d.rope_rules(RopeStyle::Half) })?;
    d.model(rope.long.clone(), |n| {
        if types.as_ref().is_some_and(|t| t.get(n) != Some(&1)) {
            return Ok(Err("linear attention".into()));
        }
        let attention = GqaBlock {
            qk_norm: Some(QkNorm::Full),
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(d.attention(Mask::causal()))
        };
        Ok(Ok(d.layer(attention, Mlp::Moe(Box::new(moe.clone())))))
    })
}

/// Latent attention of DeepSeek.
fn mla(d: &Decoder, style: RopeStyle) -> Result<MlaBlock> {
    let f = d.f;
    if d.kv_heads != d.heads {
        let expected = format!("`num_attention_heads` ({}), as latent attention has no groups", d.heads);
        return Err(f.error("num_key_value_heads", expected, d.kv_heads.to_string()));
    }
    let (nope, rope_dim) = (f.size("qk_nope_head_dim", 128)?, f.size("qk_rope_head_dim", 64)?);
    let mla = Mla {
        q_lora_rank: f.optional_size("q_lora_rank", Some(1536))?,
        ..Mla::new(d.heads, f.size("kv_lora_rank", 512)?, nope, rope_dim, f.size("v_head_dim", 128)?)
    };
    let bias = f.flag("attention_bias", false)?;
    if bias && mla.q_lora_rank.is_none() {
        // The package gives `kv_a_proj` a bias then, but `q_proj` none.
        return Err(f.error("attention_bias", "false without `q_lora_rank`", "true"));
    }
    let rope = rope::read(f, &RopeRules { head_dim: rope_dim, ..d.rope_rules(style) })?;
    if rope.long.is_some() {
        return Err(Error::unsupported("the config.json reader", "rope type \"longrope\" with latent attention"));
    }
    let mut block = MlaBlock { qkv_bias: bias, out_bias: bias, ..MlaBlock::new(mla, rope.rope) };
    block.attention.softmax_scale *= rope.softmax_factor;
    Ok(block)
}

/// The layers of DeepSeek: dense ones first, then those with experts.
fn deepseek(d: &Decoder, attention: &MlaBlock, moe: &Moe, intermediate: usize, first_moe: usize) -> Result<HfConfig> {
    // As in the code published with the models; the package knows only 1.
    let frequency = d.f.size("moe_layer_freq", 1)?;
    d.model(None, |n| {
        let mlp = if n >= first_moe && n.is_multiple_of(frequency) {
            Mlp::Moe(Box::new(moe.clone()))
        } else {
            Mlp::Dense(d.dense(intermediate))
        };
        Ok(Ok(Layer::new(d.hidden, d.norm, AttentionBlock::Mla(attention.clone()), mlp)))
    })
}

pub(super) fn deepseek_v2(f: &Fields) -> Result<HfConfig> {
    // Heads have widths of their own: `head_dim` is not read.
    let defaults = Defaults::new(102_400, 4096, 32, 32, 0);
    let d = Decoder::read(f, &Defaults { head_dim: head_dim_floor(f, 4096, 32)?, ..defaults })?;
    f.expect_flag("mlp_bias", false)?;
    f.expect_word("scoring_func", &["softmax"])?;
    // The package never renormalises; the code published with the models does, in place of the scaling.
    f.expect_flag("norm_topk_prob", false)?;
    let (intermediate, moe_intermediate) =
        (f.size("intermediate_size", 11_008)?, f.size("moe_intermediate_size", 1407)?);
    let num_experts = f.size_of(&["n_routed_experts", "num_experts"], 64)?;
    let Some(top_k) = f.optional_size("num_experts_per_tok", None)? else {
        return Err(f.error("num_experts_per_tok", "a number", "nothing"));
    };
    f.expect_word("topk_method", &["greedy", "group_limited_greedy"])?;
    let groups = match f.word("topk_method")? {
        Some("group_limited_greedy") => groups(f, (1, 1), GroupScore::Max)?,
        _ => None,
    };
    let _ = (f.get("n_group"), f.get("topk_group"));
    let router =
        Router { groups, scaling_factor: f.number("routed_scaling_factor", 1.0)?, ..Router::new(num_experts, top_k) };
    let moe = with_shared(&d, router, moe_intermediate, 2)?;
    let first_moe = f.count("first_k_dense_replace", 0)?;
    deepseek(&d, &mla(&d, RopeStyle::Interleaved)?, &moe, intermediate, first_moe)
}

pub(super) fn deepseek_v3(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { max_position: 4096, ..Defaults::new(129_280, 7168, 61, 128, 128) };
    let d = Decoder::read(f, &Defaults { head_dim: head_dim_floor(f, 7168, 128)?, ..defaults })?;
    let (intermediate, moe_intermediate) =
        (f.size("intermediate_size", 18_432)?, f.size("moe_intermediate_size", 2048)?);
    let num_experts = f.size_of(&["n_routed_experts", "num_local_experts"], 256)?;
    let router = sigmoid_groups(f, num_experts, (8, 4), 2.5)?;
    let mut moe = with_shared(&d, router, moe_intermediate, 1)?;
    moe.selection_bias = true;
    let first_moe = f.count("first_k_dense_replace", 3)?;
    let style = if f.flag("rope_interleave", true)? { RopeStyle::InterleavedToHalf } else { RopeStyle::Half };
    deepseek(&d, &mla(&d, style)?, &moe, intermediate, first_moe)
}
