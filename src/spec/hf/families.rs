//! The closed list of families, and the check of what a family does not read.

use super::fields::{Fields, describe};
use super::{Family, HfConfig, encoder, logits, sigmoid, softmax};
use crate::error::Result;
use serde_json::Value;

type Build = fn(&Fields) -> Result<HfConfig>;

/// `model_type`, the family, its reader.
const FAMILIES: [(&str, Family, Build); 22] = [
    ("switch_transformers", Family::Switch, encoder::switch),
    ("nllb-moe", Family::NllbMoe, encoder::nllb_moe),
    ("nllb_moe", Family::NllbMoe, encoder::nllb_moe),
    ("mixtral", Family::Mixtral, softmax::mixtral),
    ("olmoe", Family::Olmoe, softmax::olmoe),
    ("qwen2_moe", Family::Qwen2Moe, softmax::qwen2_moe),
    ("qwen3_moe", Family::Qwen3Moe, softmax::qwen3_moe),
    ("qwen3_next", Family::Qwen3Next, softmax::qwen3_next),
    ("deepseek_v2", Family::DeepseekV2, sigmoid::deepseek_v2),
    ("deepseek_v3", Family::DeepseekV3, sigmoid::deepseek_v3),
    ("kimi_k2", Family::DeepseekV3, sigmoid::deepseek_v3),
    ("gpt_oss", Family::GptOss, logits::gpt_oss),
    ("glm4_moe", Family::Glm4Moe, sigmoid::glm4_moe),
    ("llama4_text", Family::Llama4, logits::llama4),
    ("phimoe", Family::PhiMoe, logits::phimoe),
    ("granitemoe", Family::GraniteMoe, logits::granitemoe),
    ("dbrx", Family::Dbrx, softmax::dbrx),
    ("jamba", Family::Jamba, softmax::jamba),
    ("minimax_m2", Family::MiniMaxM2, sigmoid::minimax_m2),
    ("ernie4_5_moe", Family::Ernie45Moe, softmax::ernie4_5_moe),
    ("llama", Family::Llama, softmax::llama),
    ("mistral", Family::Mistral, softmax::mistral),
];

/// The reader for the `model_type` of `f`.
pub(super) fn find(f: &Fields) -> Result<(Family, Build)> {
    let known = || FAMILIES.map(|(name, ..)| name).join(", ");
    let Some(model_type) = f.word("model_type")? else {
        return Err(f.error("model_type", format!("one of {}", known()), "nothing"));
    };
    FAMILIES
        .iter()
        .find(|(name, ..)| *name == model_type)
        .map(|(_, family, build)| (*family, *build))
        .ok_or_else(|| f.error("model_type", format!("one of {}", known()), describe(&model_type.into())))
}

/// Fields that change the computation in some family: where a family does not read them, they must be neutral.
pub(super) fn check_unread(f: &Fields) -> Result<()> {
    let neutral = |name: &str| -> Option<&'static [&'static str]> {
        Some(match name {
            "sliding_window"
            | "shared_expert_intermediate_size"
            | "shared_intermediate_size"
            | "n_shared_experts"
            | "num_shared_experts"
            | "moe_num_shared_experts"
            | "first_k_dense_replace" => &["0"],
            "use_sliding_window"
            | "attention_bias"
            | "qkv_bias"
            | "mlp_bias"
            | "use_bias"
            | "router_bias"
            | "lm_head_bias"
            | "is_gated_act"
            | "use_qk_norm"
            | "attn_temperature_tuning"
            | "scale_embedding" => &["false"],
            "embedding_multiplier" | "logits_scaling" | "residual_multiplier" | "routed_scaling_factor" => {
                &["1", "1.0"]
            }
            "moe_layer_freq" | "decoder_sparse_step" | "interleave_moe_layer_step" | "partial_rotary_factor" => {
                &["1", "1.0"]
            }
            "n_group" | "topk_group" => &["0", "1"],
            "norm_topk_prob" => &["true"],
            "mlp_only_layers" | "no_rope_layers" => &["[]"],
            "clip_qkv"
            | "attn_logit_softcapping"
            | "final_logit_softcapping"
            | "attention_multiplier"
            | "swiglu_limit"
            | "swiglu_alpha"
            | "attention_chunk_size"
            | "q_lora_rank"
            | "kv_lora_rank"
            | "rope_scaling"
            | "rope_parameters"
            | "rotary_dim"
            | "scoring_func"
            | "topk_method"
            | "moe_layers"
            | "attn_config"
            | "ffn_config"
            | "text_config" => &[],
            _ => return None,
        })
    };
    for (name, value) in f.unread() {
        let is_neutral = match (name, value) {
            ("layer_types", Value::Array(types)) => types.iter().all(|t| t == "full_attention"),
            ("layer_types", _) => false,
            _ => neutral(name).is_none_or(|allowed| allowed.contains(&value.to_string().as_str())),
        };
        if !is_neutral {
            return Err(f.error(name, "nothing: this model does not have it", describe(value)));
        }
    }
    Ok(())
}
