//! Dense models, and mixtures whose score is the softmax over all experts: Llama, Mistral, Mixtral, OLMoE, Qwen, Jamba, ERNIE,
//! DBRX. Defaults and meaning are those of transformers 5.23.0; where a comment says so, those of the published code.

use super::HfConfig;
use super::decoder::{Decoder, Defaults, activation, causal, product, softmax_top_k};
use super::fields::{Fields, MAX_LAYERS};
use super::rope::{self, RopeRules};
use crate::error::Result;
use crate::spec::{
    Activation, Ffn, GqaBlock, Mask, Mlp, Moe, Norm, QkNorm, Renormalize, RopeStyle, Router, SharedExpert,
};

pub(super) fn llama(f: &Fields) -> Result<HfConfig> {
    let d = Decoder::read(f, &Defaults::new(32_000, 4096, 32, 32, 0))?;
    let intermediate = f.size("intermediate_size", 11_008)?;
    let (attention_bias, mlp_bias) = (f.flag("attention_bias", false)?, f.flag("mlp_bias", false)?);
    let rope = d.rope(RopeStyle::Half)?;
    d.model(rope.long.clone(), |_| {
        let attention = GqaBlock {
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(d.attention(Mask::causal()))
        };
        let ffn = Ffn { up_bias: mlp_bias, down_bias: mlp_bias, ..d.dense(intermediate) };
        Ok(Ok(d.layer(attention, Mlp::Dense(ffn))))
    })
}

pub(super) fn mistral(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { max_position: 131_072, ..Defaults::new(32_000, 4096, 32, 32, 8) };
    let d = Decoder::read(f, &defaults)?;
    let intermediate = f.size("intermediate_size", 14_336)?;
    let mask = causal(f.optional_size("sliding_window", Some(4096))?);
    let rope = d.rope(RopeStyle::Half)?;
    d.model(rope.long.clone(), |_| {
        let attention = GqaBlock { rope: Some(rope.rope.clone()), ..GqaBlock::new(d.attention(mask)) };
        Ok(Ok(d.layer(attention, Mlp::Dense(d.dense(intermediate)))))
    })
}

pub(super) fn mixtral(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { eps: 1e-5, max_position: 131_072, theta: 1e6, ..Defaults::new(32_000, 4096, 32, 32, 8) };
    let d = Decoder::read(f, &defaults)?;
    let intermediate = f.size("intermediate_size", 14_336)?;
    let num_experts = f.size_of(&["num_local_experts", "num_experts"], 8)?;
    let router = softmax_top_k(num_experts, f.size("num_experts_per_tok", 2)?, true);
    let mask = causal(f.optional_size("sliding_window", None)?);
    let rope = d.rope(RopeStyle::Half)?;
    d.model(rope.long.clone(), |_| {
        let attention = GqaBlock { rope: Some(rope.rope.clone()), ..GqaBlock::new(d.attention(mask)) };
        Ok(Ok(d.layer(attention, Mlp::Moe(Box::new(d.moe(router.clone(), intermediate))))))
    })
}

pub(super) fn olmoe(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { eps: 1e-5, max_position: 4096, ..Defaults::new(50_304, 2048, 16, 16, 0) };
    let d = Decoder::read(f, &defaults)?;
    let intermediate = f.size("intermediate_size", 2048)?;
    let num_experts = f.size_of(&["num_experts", "num_local_experts"], 64)?;
    let router = softmax_top_k(num_experts, f.size("num_experts_per_tok", 8)?, f.flag("norm_topk_prob", false)?);
    let (bias, clip_qkv) = (f.flag("attention_bias", false)?, f.optional_number("clip_qkv")?);
    let rope = d.rope(RopeStyle::Half)?;
    d.model(rope.long.clone(), |_| {
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: Some(QkNorm::Full),
            clip_qkv,
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(d.attention(Mask::causal()))
        };
        Ok(Ok(d.layer(attention, Mlp::Moe(Box::new(d.moe(router.clone(), intermediate))))))
    })
}

/// Which layers of Qwen2-MoE, Qwen3-MoE and Qwen3-Next have experts.
struct QwenMoe {
    intermediate: usize,
    mlp_only_layers: Vec<usize>,
    step: usize,
    moe: Option<Moe>,
}

impl QwenMoe {
    /// `shared`: default width of the shared expert behind a sigmoid gate, 0 for a family without one.
    fn read(d: &Decoder, intermediate: usize, moe: [usize; 3], norm_topk_prob: bool, shared: usize) -> Result<Self> {
        let f = d.f;
        let [moe_intermediate, num_experts, top_k] = moe;
        let moe_intermediate = f.size("moe_intermediate_size", moe_intermediate)?;
        let num_experts = f.size_of(&["num_experts", "num_local_experts"], num_experts)?;
        let top_k = f.size("num_experts_per_tok", top_k)?;
        let router = softmax_top_k(num_experts, top_k, f.flag("norm_topk_prob", norm_topk_prob)?);
        let mut block = d.moe(router, moe_intermediate);
        if shared > 0 {
            let width = f.count("shared_expert_intermediate_size", shared)?;
            let expert = SharedExpert { sigmoid_gate: true, ..SharedExpert::new(d.dense(width)) };
            block.shared = (width > 0).then_some(expert);
        }
        Ok(QwenMoe {
            intermediate: f.size("intermediate_size", intermediate)?,
            mlp_only_layers: f.indices("mlp_only_layers", MAX_LAYERS)?.unwrap_or_default(),
            step: f.size("decoder_sparse_step", 1)?,
            moe: (num_experts > 0).then_some(block),
        })
    }

    fn mlp(&self, d: &Decoder, n: usize) -> Mlp {
        match &self.moe {
            Some(moe) if !self.mlp_only_layers.contains(&n) && (n + 1).is_multiple_of(self.step) => {
                Mlp::Moe(Box::new(moe.clone()))
            }
            _ => Mlp::Dense(d.dense(self.intermediate)),
        }
    }
}

pub(super) fn qwen2_moe(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { max_position: 32_768, ..Defaults::new(151_936, 2048, 24, 16, 16) };
    let d = Decoder::read(f, &defaults)?;
    let mlp = QwenMoe::read(&d, 5632, [1408, 60, 4], false, 5632)?;
    let qkv_bias = f.flag("qkv_bias", true)?;
    let sliding = f.flag("use_sliding_window", false)?;
    let types = f.words("layer_types", d.layers, &["full_attention", "sliding_attention"])?;
    // A window of 0 stands for none where there is no sliding layer.
    let window = if sliding { f.optional_size("sliding_window", Some(4096))? } else { None };
    let _ = (f.get("sliding_window"), f.get("max_window_layers"));
    if sliding && types.is_none() {
        // Releases of the package disagree on which side of `max_window_layers` has the window.
        return Err(f.error("layer_types", "the type of each layer, as `use_sliding_window` is true", "nothing"));
    }
    let rope = d.rope(RopeStyle::Half)?;
    d.model(rope.long.clone(), |n| {
        let window = match types.as_ref().map(|t| t[n]) {
            Some("sliding_attention") => match window {
                Some(w) => Some(w),
                None => return Err(f.error("sliding_window", "a size for the sliding layers", "none")),
            },
            _ => None,
        };
        let attention =
            GqaBlock { qkv_bias, rope: Some(rope.rope.clone()), ..GqaBlock::new(d.attention(causal(window))) };
        Ok(Ok(d.layer(attention, mlp.mlp(&d, n))))
    })
}

pub(super) fn qwen3_moe(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { max_position: 32_768, ..Defaults::new(151_936, 2048, 24, 32, 4) };
    let d = Decoder::read(f, &defaults)?;
    let mlp = QwenMoe::read(&d, 6144, [768, 128, 8], false, 0)?;
    let bias = f.flag("attention_bias", false)?;
    f.expect_flag("use_qk_norm", true)?;
    let window = match f.flag("use_sliding_window", false)? {
        true => f.optional_size("sliding_window", Some(4096))?,
        false => None,
    };
    let _ = f.get("sliding_window");
    let mask = causal(window);
    let rope = d.rope(RopeStyle::Half)?;
    d.model(rope.long.clone(), |n| {
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: Some(QkNorm::PerHead),
            rope: Some(rope.rope.clone()),
            ..GqaBlock::new(d.attention(mask))
        };
        Ok(Ok(d.layer(attention, mlp.mlp(&d, n))))
    })
}

pub(super) fn qwen3_next(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { max_position: 32_768, head_dim: 256, ..Defaults::new(151_936, 2048, 48, 16, 2) };
    let mut d = Decoder::read(f, &defaults)?;
    d.norm.weight_offset = 1.0;
    let mlp = QwenMoe::read(&d, 5632, [512, 512, 10], true, 512)?;
    let bias = f.flag("attention_bias", false)?;
    let interval = f.size("full_attention_interval", 4)?;
    let types = f.words("layer_types", d.layers, &["full_attention", "linear_attention"])?;
    let rope = rope::read(f, &RopeRules { partial: Some(0.25), ..d.rope_rules(RopeStyle::Half) })?;
    d.model(rope.long.clone(), |n| {
        let full = types.as_ref().map_or((n + 1).is_multiple_of(interval), |t| t[n] == "full_attention");
        if !full {
            return Ok(Err("linear attention (gated delta-net)".into()));
        }
        let attention = GqaBlock {
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: Some(QkNorm::PerHead),
            rope: Some(rope.rope.clone()),
            output_gate: true,
            ..GqaBlock::new(d.attention(Mask::causal()))
        };
        Ok(Ok(d.layer(attention, mlp.mlp(&d, n))))
    })
}

pub(super) fn jamba(f: &Fields) -> Result<HfConfig> {
    let defaults = Defaults { max_position: 262_144, ..Defaults::new(65_536, 4096, 32, 32, 8) };
    let d = Decoder::read(f, &defaults)?;
    let intermediate = f.size("intermediate_size", 14_336)?;
    let num_experts = f.size_of(&["num_experts", "num_local_experts"], 16)?;
    let router = softmax_top_k(num_experts, f.size("num_experts_per_tok", 2)?, false);
    f.expect_flag("norm_topk_prob", false)?;
    let period = |kind: &str, period: usize, offset: usize| -> Result<(usize, usize)> {
        let (a, b) = (format!("{kind}_layer_period"), format!("{kind}_layer_offset"));
        let (period, offset) = (f.size(&a, period)?, f.count(&b, offset)?);
        if offset < period {
            Ok((period, offset))
        } else {
            Err(f.error(&b, format!("below `{a}` ({period})"), offset.to_string()))
        }
    };
    let (attention_every, expert_every) = (period("attn", 8, 4)?, period("expert", 2, 1)?);
    d.model(None, |n| {
        if n % attention_every.0 != attention_every.1 {
            return Ok(Err("a Mamba layer".into()));
        }
        let mlp = if num_experts > 1 && n % expert_every.0 == expert_every.1 {
            Mlp::Moe(Box::new(d.moe(router.clone(), intermediate)))
        } else {
            Mlp::Dense(d.dense(intermediate))
        };
        Ok(Ok(d.layer(GqaBlock::new(d.attention(Mask::causal())), mlp)))
    })
}

pub(super) fn ernie4_5_moe(f: &Fields) -> Result<HfConfig> {
    let defaults =
        Defaults { eps: 1e-5, max_position: 131_072, theta: 5e5, tie: true, ..Defaults::new(103_424, 2560, 28, 20, 4) };
    let d = Decoder::read(f, &defaults)?;
    // Releases of the package disagree on whether experts have biases then.
    f.expect_flag("use_bias", false)?;
    f.expect_word("moe_gate", &["topk", "topk_fused"])?;
    let intermediate = f.size("intermediate_size", 12_288)?;
    let moe_intermediate = f.size("moe_intermediate_size", 1536)?;
    let num_experts = f.size_of(&["moe_num_experts", "num_experts"], 64)?;
    let top_k = f.size_of(&["moe_k", "num_experts_per_tok"], 6)?;
    let floor = f.number("moe_norm_min", 1e-12)?;
    let router =
        Router { renormalize: Renormalize::Sum { eps: 0.0, floor }, ..softmax_top_k(num_experts, top_k, true) };
    let mut moe = d.moe(router, moe_intermediate);
    // The package always has the bias; it is zero for models trained without.
    moe.selection_bias = f.flag("moe_use_aux_free", true)?;
    let shared = product(f, "moe_num_shared_experts", moe_intermediate, f.count("moe_num_shared_experts", 2)?)?;
    moe.shared = (shared > 0).then(|| SharedExpert::new(d.dense(shared)));
    let start = f.count("moe_layer_start_index", 1)?;
    let interval = f.size("moe_layer_interval", 1)?;
    let end = match f.get("moe_layer_end_index") {
        Some(v) if v.as_i64() == Some(-1) => d.layers - 1,
        _ => f.count("moe_layer_end_index", d.layers - 1)?,
    };
    let rope = d.rope(RopeStyle::Interleaved)?;
    d.model(rope.long.clone(), |n| {
        let attention = GqaBlock { rope: Some(rope.rope.clone()), ..GqaBlock::new(d.attention(Mask::causal())) };
        let mlp = if (start..=end).contains(&n) && (n + 1).is_multiple_of(interval) {
            Mlp::Moe(Box::new(moe.clone()))
        } else {
            Mlp::Dense(d.dense(intermediate))
        };
        Ok(Ok(d.layer(attention, mlp)))
    })
}

pub(super) fn dbrx(f: &Fields) -> Result<HfConfig> {
    let empty = serde_json::Map::new();
    let none = || Fields::new(&empty, "");
    let (attn, ffn) = (f.object("attn_config")?.unwrap_or_else(none), f.object("ffn_config")?.unwrap_or_else(none));
    let (hidden, heads) = (f.size("d_model", 2048)?, f.size("n_heads", 16)?);
    if !hidden.is_multiple_of(heads) {
        return Err(f.error("d_model", format!("a multiple of `n_heads` ({heads})"), hidden.to_string()));
    }
    let act = ffn.object("ffn_act_fn")?;
    // torch's default epsilon: DBRX's layer norms have no field for it.
    let norm = Norm::layer(1e-5);
    let d = Decoder {
        f,
        vocab: f.size("vocab_size", 32_000)?,
        hidden,
        layers: f.layers("n_layers", 24)?,
        heads,
        kv_heads: attn.size("kv_n_heads", 1)?,
        head_dim: hidden / heads,
        norm,
        max_position: f.position("max_seq_len", 2048)?,
        // Published files have it within `attn_config`, transformers 5 writes `rope_parameters`.
        theta: attn.positive("rope_theta", 10_000.0)?,
        activation: act.map_or(Ok(Activation::Silu), |a| activation(&a, "name"))?,
        tie: f.flag("tie_word_embeddings", false)?,
    };
    f.expect_flag("tie_word_embeddings", false)?;
    let clip_qkv = attn.optional_number("clip_qkv")?;
    let (num_experts, top_k) = (ffn.size("moe_num_experts", 4)?, ffn.size("moe_top_k", 1)?);
    let intermediate = ffn.size("ffn_hidden_size", 3584)?;
    // Which p-norm of the weights becomes 1; null for none.
    let p = if ffn.is_null("moe_normalize_expert_weights") {
        None
    } else {
        Some(ffn.number("moe_normalize_expert_weights", 1.0)?)
    };
    let renormalize = match p {
        None => Renormalize::None,
        Some(1.0) => Renormalize::sum(),
        Some(2.0) => Renormalize::L2,
        Some(p) => return Err(ffn.error("moe_normalize_expert_weights", "1, 2 or null", p.to_string())),
    };
    let router = Router { renormalize, ..softmax_top_k(num_experts, top_k, false) };
    let rope = d.rope(RopeStyle::Half)?;
    if attn.get("rope_theta").is_some() && rope.rope.theta != d.theta {
        return Err(attn.error("rope_theta", format!("{} as elsewhere", rope.rope.theta), d.theta.to_string()));
    }
    d.model(rope.long.clone(), |_| {
        let attention =
            GqaBlock { clip_qkv, rope: Some(rope.rope.clone()), ..GqaBlock::new(d.attention(Mask::causal())) };
        Ok(Ok(d.layer(attention, Mlp::Moe(Box::new(d.moe(router.clone(), intermediate))))))
    })
}
