//! Encoder-decoder models, of which the encoder is read: Switch Transformers and NLLB-MoE. Defaults and meaning are those of
//! transformers 5.23.0; where a comment says so, those of the published code.

use super::HfConfig;
use super::decoder::{Decoder, activation, epsilon};
use super::fields::Fields;
use crate::error::Result;
use crate::spec::{
    Activation, Attention, AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertFfn, Ffn, GqaBlock, Layer, Mask, Mlp,
    Moe, Norm, RelativeBias, Renormalize, Router,
};

/// The encoder's layers, then the decoder's, which attend to the encoder's output and are no [`Layer`].
fn encoder_decoder(d: &Decoder, decoder_layers: usize, layer: impl Fn(usize) -> Layer) -> Result<HfConfig> {
    let _ = d.f.count("decoder_sparse_step", 0)?;
    let mut config = d.model(None, |n| Ok(Ok(layer(n))))?;
    config.max_position = None;
    for n in 0..decoder_layers {
        config.layers.push(config.kinds.len());
        config.kinds.push(Err(format!("decoder layer {n}: attention to the encoder's output")));
    }
    Ok(config)
}

pub(super) fn switch(f: &Fields) -> Result<HfConfig> {
    f.expect_flag("is_gated_act", false)?;
    f.expect_flag("batch_prioritized_routing", false)?;
    f.expect_word("router_type", &["tokens_masked"])?;
    f.expect_number("num_selected_experts", 1.0)?;
    let layers = f.layers("num_layers", 12)?;
    let decoder_layers = f.layers("num_decoder_layers", layers)?;
    let activation = match f.word("dense_act_fn")? {
        None => Activation::Relu,
        Some(_) => activation(f, "dense_act_fn")?,
    };
    f.expect_word("feed_forward_proj", &[f.word("dense_act_fn")?.unwrap_or("relu")])?;
    let d = Decoder {
        f,
        vocab: f.size("vocab_size", 32_128)?,
        hidden: f.size("d_model", 768)?,
        layers,
        heads: f.size("num_heads", 12)?,
        kv_heads: f.size("num_heads", 12)?,
        head_dim: f.size("d_kv", 64)?,
        norm: Norm::rms(epsilon(f, "layer_norm_epsilon", 1e-6)?),
        max_position: 1,
        theta: 0.0,
        activation,
        tie: f.flag("tie_word_embeddings", true)?,
    };
    let sparse_layers = f.count("num_sparse_encoder_layers", 3)?;
    let step = f.count("encoder_sparse_step", layers.checked_div(sparse_layers).unwrap_or(layers))?;
    let bias = RelativeBias::new(
        f.size("relative_attention_num_buckets", 32)?,
        f.size("relative_attention_max_distance", 128)?,
        true,
    );
    let num_experts = f.size("num_experts", 8)?;
    let router = Router {
        capacity: Some(Capacity::new(CapacityLimit::Tokens(f.size("expert_capacity", 64)?))),
        aux_loss: Some(AuxLoss::Switch { group_len: None }),
        ..Router::new(num_experts, 1)
    };
    let ffn = Ffn::plain(d.hidden, f.size("d_ff", 2048)?, d.activation);
    let moe = Moe { router_bias: f.flag("router_bias", false)?, ..Moe::new(router, ExpertFfn::new(num_experts, ffn)) };
    let mut config = encoder_decoder(&d, decoder_layers, |n| {
        // The table belongs to layer 0 of the checkpoint; all layers add its bias. Nothing is scaled by the width.
        let attention = Attention { softmax_scale: 1.0, relative_bias: Some(bias), ..d.attention(Mask::default()) };
        let sparse = step > 0 && (step == 1 || n % step == 1);
        let mlp = if sparse { Mlp::Moe(Box::new(moe.clone())) } else { Mlp::Dense(ffn) };
        d.layer(GqaBlock::new(attention), mlp)
    })?;
    if d.tie {
        config.logits_scaling = (d.hidden as f64).sqrt();
    }
    Ok(config)
}

pub(super) fn nllb_moe(f: &Fields) -> Result<HfConfig> {
    let (hidden, heads) = (f.size("d_model", 1024)?, f.size("encoder_attention_heads", 16)?);
    if !hidden.is_multiple_of(heads) {
        let expected = format!("a multiple of `encoder_attention_heads` ({heads})");
        return Err(f.error("d_model", expected, hidden.to_string()));
    }
    let activation = match f.word("activation_function")? {
        None => Activation::Relu,
        Some(_) => activation(f, "activation_function")?,
    };
    f.expect_word("router_type", &["tokens_masked"])?;
    let layers = f.layers("encoder_layers", 12)?;
    let d = Decoder {
        f,
        vocab: f.size("vocab_size", 128_112)?,
        hidden,
        layers,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        // torch's default epsilon: the layer norms have no field for it.
        norm: Norm { bias: true, ..Norm::layer(1e-5) },
        max_position: 1,
        theta: 0.0,
        activation,
        tie: f.flag("tie_word_embeddings", true)?,
    };
    // "random" keeps the second expert by its weight before renormalisation, "sampling" adds noise to the logits.
    f.expect_word("second_expert_policy", &["all"])?;
    let num_experts = f.size("num_experts", 128)?;
    let fraction = f.number("moe_eval_capacity_token_fraction", 1.0)?;
    let limit = if fraction > 0.0 {
        // So many of all tokens: the factor counts two slots and divides by the experts.
        CapacityLimit::Factor(fraction * num_experts as f64 / 2.0)
    } else if f.is_null("expert_capacity") {
        return Err(f.error("expert_capacity", "a number, as there is no `moe_eval_capacity_token_fraction`", "null"));
    } else {
        CapacityLimit::Tokens(f.size("expert_capacity", 64)?)
    };
    let by_score = f.flag("batch_prioritized_routing", false)?;
    let capacity = Capacity {
        order: if by_score { CapacityOrder::Score } else { CapacityOrder::Position },
        normalize_after_drop: !f.flag("normalize_router_prob_before_dropping", false)?,
        ..Capacity::new(limit)
    };
    let router = Router {
        renormalize: Renormalize::Sum { eps: 0.0, floor: f64::from(f32::EPSILON) },
        capacity: Some(capacity),
        aux_loss: Some(AuxLoss::Switch { group_len: None }),
        ..Router::new(num_experts, 2)
    };
    let ffn =
        Ffn { up_bias: true, down_bias: true, ..Ffn::plain(hidden, f.size("encoder_ffn_dim", 4096)?, d.activation) };
    let dropout = f.number("moe_token_dropout", 0.2)?;
    // At inference the experts' outputs are scaled down by what training dropped. (Release 5.23.0 of the package sends every
    // token to its first two experts, whatever the router says; earlier ones follow the router, as here.)
    let experts = ExpertFfn { combine_scale: 1.0 - dropout, ..ExpertFfn::new(num_experts, ffn) };
    let moe = Moe { router_bias: f.flag("router_bias", false)?, ..Moe::new(router, experts) };
    let step = f.count("encoder_sparse_step", 4)?;
    let mut config = encoder_decoder(&d, f.layers("decoder_layers", 12)?, |n| {
        let attention = GqaBlock { qkv_bias: true, out_bias: true, ..GqaBlock::new(d.attention(Mask::default())) };
        let sparse = step > 0 && (n + 1).is_multiple_of(step);
        let mlp = if sparse { Mlp::Moe(Box::new(moe.clone())) } else { Mlp::Dense(ffn) };
        d.layer(attention, mlp)
    })?;
    config.max_position = Some(f.position("max_position_embeddings", 1024)?);
    config.sinusoidal_positions = true;
    if f.flag("scale_embedding", true)? {
        config.embedding_multiplier = (hidden as f64).sqrt();
    }
    Ok(config)
}
