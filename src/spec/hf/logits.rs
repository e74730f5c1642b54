//! Mixtures that select by logit: gpt-oss, Granite, Llama-4, Phi. Defaults and meaning are those of transformers 5.23.0;
//! where a comment says so, those of the published code.

use super::HfConfig;
use super::decoder::{Decoder, Defaults, causal, top_k_softmax};
use super::fields::{Fields, MAX_LAYERS};
use super::rope::{self, RopeRules};
use crate::error::Result;
use crate::spec::{
    Activation, Attention, AuxLoss, ExpertFfn, Ffn, GqaBlock, Layer, Mask, Mlp, Moe, Norm, QTemperature, QkNorm, Rope,
    RopeScaling, RopeStyle, Router, Score, SelectOn, Selection, SharedExpert, WeightOn,
};

pub(super) fn gpt_oss(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults {
        head_dim: 64,
        eps: 1e-5,
        max_position: 131_072,
        theta: 150_000.0,
        ..Defaults::new(201_088, 2880, 36, 64, 8)
    };
    let d = Decoder::read(f, &defaults)?;
    f.expect_word("hidden_act", &["silu"])?;
    let intermediate = f.size("intermediate_size", 2880)?;
    let num_experts = f.size_of(&["num_local_experts", "num_experts"], 128)?;
    let top_k = f.size_of(&["num_experts_per_tok", "experts_per_token"], 4)?;
    let alpha = f.number("swiglu_alpha", 1.702)?;
    let limit = f.positive("swiglu_limit", 7.0)?;
    let bias = f.flag("attention_bias", true)?;
    let window = f.optional_size("sliding_window", Some(128))?;
    let types = f.words("layer_types", d.layers, &["full_attention", "sliding_attention"])?;
    let yarn = Rope {
        scaling: RopeScaling::yarn(32.0, 4096.0, 32.0, 1.0, false),
        cos_sin_scale: 0.1 * 32f64.ln() + 1.0,
        ..Rope::default()
    };
    let rope = rope::read(f, &RopeRules { scaling: Some(yarn), ..d.rope_rules(RopeStyle::Half) })?;
    let ffn = Ffn {
        up_bias: true,
        down_bias: true,
        ..Ffn::gated(d.hidden, intermediate, Activation::SwigluClamped { alpha, limit })
    };
    let experts = ExpertFfn::new(num_experts, ffn);
    let moe = Moe { router_bias: true, ..Moe::new(top_k_softmax(num_experts, top_k), experts) };
    d.model(rope.long.clone(), |n| {
        let sliding = types.as_ref().map_or(n.is_multiple_of(2), |t| t[n] == "sliding_attention");
        let mask = match (sliding, window) {
            (false, _) => Mask::causal(),
            (true, Some(w)) => causal(Some(w)),
            (true, None) => return Err(f.error("sliding_window", "a size for the sliding layers", "none")),
        };
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(Attention { sinks: true, ..d.attention(mask) })
        };
        Ok(Ok(d.layer(attention, Mlp::Moe(Box::new(moe.clone())))))
    })
}

pub(super) fn granitemoe(f: &Fields) -> Result<HfConfig> {
    let d = Decoder::read(f, &Defaults::new(32_000, 4096, 32, 32, 0))?;
    let intermediate = f.size("intermediate_size", 11_008)?;
    let num_experts = f.size_of(&["num_local_experts", "num_experts"], 8)?;
    let router = top_k_softmax(num_experts, f.size("num_experts_per_tok", 2)?);
    let bias = f.flag("attention_bias", false)?;
    let softmax_scale = f.positive("attention_multiplier", 1.0)?;
    let residual_multiplier = f.number("residual_multiplier", 1.0)?;
    let rope = d.rope(RopeStyle::Half)?;
    let mut config = d.model(rope.long.clone(), |_| {
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(Attention { softmax_scale, ..d.attention(Mask::causal()) })
        };
        let mlp = Mlp::Moe(Box::new(d.moe(router.clone(), intermediate)));
        Ok(Ok(Layer { residual_multiplier, ..d.layer(attention, mlp) }))
    })?;
    config.embedding_multiplier = f.number("embedding_multiplier", 1.0)?;
    config.logits_scaling = f.positive("logits_scaling", 1.0)?;
    Ok(config)
}

pub(super) fn llama4(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults {
        head_dim: 128,
        eps: 1e-5,
        max_position: 131_072,
        theta: 5e5,
        ..Defaults::new(202_048, 5120, 48, 40, 8)
    };
    let d = Decoder::read(f, &defaults)?;
    let (intermediate, dense) = (f.size("intermediate_size", 8192)?, f.size("intermediate_size_mlp", 16_384)?);
    let num_experts = f.size_of(&["num_local_experts", "num_experts"], 16)?;
    let router = Router {
        score: Score::Sigmoid,
        select_on: SelectOn::Logits,
        aux_loss: Some(AuxLoss::TopK),
        ..Router::new(num_experts, f.size("num_experts_per_tok", 1)?)
    };
    let step = f.size("interleave_moe_layer_step", 1)?;
    let moe_layers = f.indices("moe_layers", MAX_LAYERS)?;
    let interval = f.size("no_rope_layer_interval", 4)?;
    // 1: with rotary embedding. An empty list means the interval.
    let rope_layers = f.indices("no_rope_layers", 2)?.filter(|list| !list.is_empty());
    if let Some(list) = &rope_layers
        && list.len() < d.layers
    {
        let expected = format!("at least {} entries", d.layers);
        return Err(f.error("no_rope_layers", expected, format!("an array of {}", list.len())));
    }
    let types = f.words("layer_types", d.layers, &["full_attention", "chunked_attention"])?;
    let chunk = f.optional_size("attention_chunk_size", Some(8192))?;
    let (bias, qk_norm) = (f.flag("attention_bias", false)?, f.flag("use_qk_norm", true)?);
    // Early files have a number for true.
    let tuning = match f.get("attn_temperature_tuning") {
        Some(v) if v.is_u64() => v.as_u64() != Some(0),
        _ => f.flag("attn_temperature_tuning", true)?,
    };
    let temperature = QTemperature::new(f.positive("floor_scale", 8192.0)?, f.number("attn_scale", 0.1)?);
    let rope = d.rope(RopeStyle::Interleaved)?;
    let mut moe = d.moe(router, intermediate);
    moe.experts.weight_on = WeightOn::Input;
    moe.shared = Some(SharedExpert::new(d.dense(intermediate)));
    d.model(rope.long.clone(), |n| {
        let turns = rope_layers.as_ref().map_or(!(n + 1).is_multiple_of(interval), |list| list[n] == 1);
        let chunked = types.as_ref().map_or(turns, |t| t[n] == "chunked_attention");
        if chunked && chunk.is_none() {
            return Err(f.error("attention_chunk_size", "a size for the chunked layers", "none"));
        }
        let mask = Mask { chunk: chunk.filter(|_| chunked), ..Mask::causal() };
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: (qk_norm && turns).then_some(QkNorm::L2AfterRope),
            rope: turns.then(|| rope.rope.clone()),
            q_temperature: (tuning && !turns).then_some(temperature),
            ..GqaBlock::new(d.attention(mask))
        };
        let sparse = moe_layers.as_ref().map_or((n + 1).is_multiple_of(step), |list| list.contains(&n));
        let mlp = if sparse { Mlp::Moe(Box::new(moe.clone())) } else { Mlp::Dense(d.dense(dense)) };
        Ok(Ok(d.layer(attention, mlp)))
    })
}

pub(super) fn phimoe(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { eps: 1e-5, max_position: 131_072, theta: 1e6, ..Defaults::new(32_064, 4096, 32, 32, 8) };
    let mut d = Decoder::read(f, &defaults)?;
    d.norm = Norm { bias: true, ..Norm::layer(d.norm.eps) };
    let intermediate = f.size("intermediate_size", 6400)?;
    let num_experts = f.size_of(&["num_local_experts", "num_experts"], 16)?;
    let jitter_eps = f.number("router_jitter_noise", 0.01)?;
    let router = Router {
        selection: Selection::SparseMixer { jitter_eps },
        aux_loss: Some(AuxLoss::TopK),
        ..Router::new(num_experts, f.size("num_experts_per_tok", 2)?)
    };
    let bias = f.flag("attention_bias", false)?;
    let mask = causal(f.optional_size("sliding_window", None)?);
    // Long factors beyond the training context as in the code published with the model; the package keeps the short ones.
    let rope = rope::read(f, &RopeRules { phi: true, ..d.rope_rules(RopeStyle::Half) })?;
    let mut config = d.model(rope.long.clone(), |_| {
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(d.attention(mask))
        };
        Ok(Ok(d.layer(attention, Mlp::Moe(Box::new(d.moe(router.clone(), intermediate))))))
    })?;
    config.head_bias = f.flag("lm_head_bias", false)?;
    Ok(config)
}
