//! The reader of Hugging Face configurations: published sizes, the golden files' own configurations against what was
//! recorded from the real classes, and both spellings.

#![cfg(feature = "serde")]

use gatefold::spec::*;
use gatefold::{Dtype, Error};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn tests_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// Name and text of every file in `tests/configs`.
fn published() -> Vec<(String, String)> {
    let mut files: Vec<_> = fs::read_dir(tests_dir().join("configs"))
        .expect("tests/configs")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .map(|path| {
            let name = path.file_stem().expect("stem").to_str().expect("utf-8").to_owned();
            (name, fs::read_to_string(path).expect("text"))
        })
        .collect();
    files.sort();
    files
}

fn model(name: &str) -> HfConfig {
    let path = tests_dir().join("configs").join(format!("{name}.json"));
    HfConfig::from_json(&fs::read_to_string(path).expect(name)).expect(name)
}

fn object(name: &str) -> Map<String, Value> {
    let path = tests_dir().join("configs").join(format!("{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).expect(name)).expect(name)
}

fn parse(value: Value) -> Result<HfConfig, Error> {
    HfConfig::from_json(&value.to_string())
}

fn gqa(layer: &Layer) -> &GqaBlock {
    match &layer.attention {
        AttentionBlock::Gqa(block) => block,
        other => panic!("{other:?}"),
    }
}

fn mla(layer: &Layer) -> &MlaBlock {
    match &layer.attention {
        AttentionBlock::Mla(block) => block,
        other => panic!("{other:?}"),
    }
}

fn moe(layer: &Layer) -> &Moe {
    match &layer.mlp {
        Mlp::Moe(moe) => moe,
        other => panic!("{other:?}"),
    }
}

fn dense(layer: &Layer) -> &Ffn {
    match &layer.mlp {
        Mlp::Dense(ffn) => ffn,
        other => panic!("{other:?}"),
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * b.abs()
}

// ---------------------------------------------------------------- published sizes

/// Key facts of a model: `heads` are query heads, key/value heads and head width; `experts` are their number, top-k and
/// width, zeros without any; `moe_layers` has experts, `other` is neither attention nor feed-forward.
struct Facts {
    name: &'static str,
    family: Family,
    layers: usize,
    hidden: usize,
    vocab: usize,
    heads: [usize; 3],
    experts: [usize; 3],
    dense_layers: &'static [usize],
    other_layers: usize,
    dtype: Dtype,
    tied: bool,
}

#[rustfmt::skip]
fn facts() -> Vec<Facts> {
    let f = |name, family, layers, hidden, vocab, heads, experts| Facts {
        name, family, layers, hidden, vocab, heads, experts, dense_layers: &[], other_layers: 0, dtype: Dtype::BF16, tied: false,
    };
    vec![
        Facts { dense_layers: &[0, 2, 4, 6, 8, 10], other_layers: 12, dtype: Dtype::F32, tied: true,
                ..f("switch-base-8", Family::Switch, 12, 768, 32_128, [12, 12, 64], [8, 1, 3072]) },
        Facts { dense_layers: &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22], other_layers: 24, dtype: Dtype::F32, tied: true,
                ..f("nllb-moe-54b", Family::NllbMoe, 24, 2048, 256_206, [16, 16, 128], [128, 2, 8192]) },
        f("mixtral-8x7b", Family::Mixtral, 32, 4096, 32_000, [32, 8, 128], [8, 2, 14_336]),
        f("mixtral-8x22b", Family::Mixtral, 56, 6144, 32_000, [48, 8, 128], [8, 2, 16_384]),
        f("olmoe-1b-7b", Family::Olmoe, 16, 2048, 50_304, [16, 16, 128], [64, 8, 1024]),
        f("qwen1.5-moe-a2.7b", Family::Qwen2Moe, 24, 2048, 151_936, [16, 16, 128], [60, 4, 1408]),
        f("qwen2-57b-a14b", Family::Qwen2Moe, 28, 3584, 151_936, [28, 4, 128], [64, 8, 2560]),
        f("qwen3-30b-a3b", Family::Qwen3Moe, 48, 2048, 151_936, [32, 4, 128], [128, 8, 768]),
        f("qwen3-235b-a22b", Family::Qwen3Moe, 94, 4096, 151_936, [64, 4, 128], [128, 8, 1536]),
        Facts { other_layers: 36, ..f("qwen3-next-80b-a3b", Family::Qwen3Next, 48, 2048, 151_936, [16, 2, 256], [512, 10, 512]) },
        Facts { dense_layers: &[0], ..f("deepseek-v2-lite", Family::DeepseekV2, 27, 2048, 102_400, [16, 16, 192], [64, 6, 1408]) },
        Facts { dense_layers: &[0], ..f("deepseek-v2", Family::DeepseekV2, 60, 5120, 102_400, [128, 128, 192], [160, 6, 1536]) },
        Facts { dense_layers: &[0, 1, 2], ..f("deepseek-v3", Family::DeepseekV3, 61, 7168, 129_280, [128, 128, 192], [256, 8, 2048]) },
        Facts { dense_layers: &[0], ..f("kimi-k2", Family::DeepseekV3, 61, 7168, 163_840, [64, 64, 192], [384, 8, 2048]) },
        f("gpt-oss-120b", Family::GptOss, 36, 2880, 201_088, [64, 8, 64], [128, 4, 2880]),
        Facts { dense_layers: &[0, 1, 2], ..f("glm-4.5", Family::Glm4Moe, 92, 5120, 151_552, [96, 8, 128], [160, 8, 1536]) },
        Facts { dense_layers: &[0], ..f("glm-4.5-air", Family::Glm4Moe, 46, 4096, 151_552, [96, 8, 128], [128, 8, 1408]) },
        f("llama-4-scout", Family::Llama4, 48, 5120, 202_048, [40, 8, 128], [16, 1, 8192]),
        Facts { dense_layers: &[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46],
                ..f("llama-4-maverick", Family::Llama4, 48, 5120, 202_048, [40, 8, 128], [128, 1, 8192]) },
        f("phi-3.5-moe", Family::PhiMoe, 32, 4096, 32_064, [32, 8, 128], [16, 2, 6400]),
        f("dbrx", Family::Dbrx, 40, 6144, 100_352, [48, 8, 128], [16, 4, 10_752]),
        // Attention at 4, 12, 20 and 28, experts in odd layers: never both.
        Facts { dense_layers: &[4, 12, 20, 28], other_layers: 28, ..f("jamba", Family::Jamba, 32, 4096, 65_536, [32, 8, 128], [0, 0, 0]) },
        f("minimax-m2", Family::MiniMaxM2, 62, 3072, 200_064, [48, 8, 128], [256, 8, 1536]),
        Facts { dense_layers: &[0], tied: true, ..f("ernie-4.5-21b-a3b", Family::Ernie45Moe, 28, 2560, 103_424, [20, 4, 128], [64, 6, 1536]) },
        Facts { dense_layers: &[0, 1, 2], tied: true, ..f("ernie-4.5-300b-a47b", Family::Ernie45Moe, 54, 8192, 103_424, [64, 8, 128], [64, 8, 3584]) },
        f("llama-3-8b", Family::Llama, 32, 4096, 128_256, [32, 8, 128], [0, 0, 0]),
        f("mistral-7b", Family::Mistral, 32, 4096, 32_000, [32, 8, 128], [0, 0, 0]),
        Facts { tied: true, ..f("granite-3.0-3b-a800m", Family::GraniteMoe, 32, 1536, 49_155, [24, 8, 64], [40, 8, 512]) },
    ]
}

/// These two published files name no element type.
const NO_DTYPE: [&str; 2] = ["gpt-oss-20b", "granite-3.0-1b-a400m"];

#[test]
fn published_models_have_their_sizes() {
    let mut facts = facts();
    // The smaller sizes of two families differ from the larger ones in these numbers only.
    let smaller = |f: &Facts, name, layers, hidden, vocab, heads, experts| Facts {
        name,
        layers,
        hidden,
        vocab,
        heads,
        experts,
        ..Facts { dense_layers: f.dense_layers, ..*f }
    };
    let gpt_oss = facts.iter().find(|f| f.name == "gpt-oss-120b").expect("facts");
    let gpt_oss = smaller(gpt_oss, "gpt-oss-20b", 24, 2880, 201_088, [64, 8, 64], [32, 4, 2880]);
    let granite = facts.iter().find(|f| f.name == "granite-3.0-3b-a800m").expect("facts");
    let granite = smaller(granite, "granite-3.0-1b-a400m", 24, 1024, 49_152, [16, 8, 64], [32, 8, 512]);
    facts.extend([gpt_oss, granite]);
    let files = published();
    assert_eq!(files.len(), facts.len());
    for (name, text) in files {
        let config = HfConfig::from_json(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        let want = facts.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no facts of {name}"));
        assert_eq!(config.family, want.family, "{name}");
        assert_eq!(config.num_layers, want.layers, "{name}");
        assert_eq!((config.hidden_size, config.vocab_size), (want.hidden, want.vocab), "{name}");
        assert_eq!(config.tie_word_embeddings, want.tied, "{name}");
        let dtype = if NO_DTYPE.contains(&name.as_str()) { None } else { Some(want.dtype) };
        assert_eq!(config.dtype, dtype, "{name}");
        let (mut dense_layers, mut other) = (Vec::new(), 0);
        let total = config.num_layers
            + match config.family {
                Family::Switch | Family::NllbMoe => want.other_layers,
                _ => 0,
            };
        for n in 0..total {
            let layer = match config.layer(n) {
                Ok(layer) => layer,
                Err(Error::Unsupported { case, .. }) => {
                    assert!(case.contains(&format!("layer {n}")), "{name}: {case}");
                    other += 1;
                    continue;
                }
                Err(e) => panic!("{name} layer {n}: {e}"),
            };
            layer.validate().unwrap_or_else(|e| panic!("{name} layer {n}: {e}"));
            let a = layer.attention();
            assert_eq!([a.num_heads, a.num_kv_heads, a.head_dim], want.heads, "{name} layer {n}");
            match &layer.mlp {
                Mlp::Dense(_) => dense_layers.push(n),
                Mlp::Moe(m) => {
                    let found = [m.router.num_experts, m.router.top_k, m.experts.ffn.intermediate_size];
                    assert_eq!(found, want.experts, "{name} layer {n}");
                }
                other => panic!("{name} layer {n}: {other:?}"),
            }
        }
        let dense_wanted: Vec<usize> =
            if want.experts == [0; 3] && other == 0 { (0..want.layers).collect() } else { want.dense_layers.to_vec() };
        assert_eq!(dense_layers, dense_wanted, "{name}");
        assert_eq!(other, want.other_layers, "{name}");
        assert!(matches!(config.layer(total), Err(Error::Value { .. })), "{name}");
    }
}

#[test]
fn each_file_says_where_its_numbers_come_from() {
    for (name, text) in published() {
        let value: Value = serde_json::from_str(&text).expect("JSON");
        let source = value["_source"].as_str().unwrap_or_else(|| panic!("{name} has no _source"));
        assert!(!source.contains('\n'), "{name}");
        assert!(source.starts_with("class defaults of transformers ") || source.starts_with("unverified: "), "{name}");
    }
}

#[test]
fn checkpoints_parse() {
    let want = [
        ("llama", Family::Llama, 2, Dtype::F32),
        ("mistral", Family::Mistral, 3, Dtype::BF16),
        ("mixtral", Family::Mixtral, 3, Dtype::BF16),
        ("qwen3_moe", Family::Qwen3Moe, 3, Dtype::BF16),
        ("qwen2_moe", Family::Qwen2Moe, 3, Dtype::F32),
        ("deepseek_v3", Family::DeepseekV3, 3, Dtype::BF16),
        ("gpt_oss", Family::GptOss, 4, Dtype::BF16),
    ];
    for (name, family, layers, dtype) in want {
        let text = fs::read_to_string(tests_dir().join("checkpoints").join(name).join("config.json")).expect(name);
        let config = HfConfig::from_json(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((config.family, config.num_layers, config.dtype), (family, layers, Some(dtype)), "{name}");
        for n in 0..layers {
            config.layer(n).and_then(|l| l.validate()).unwrap_or_else(|e| panic!("{name} {n}: {e}"));
        }
    }
    let text = fs::read_to_string(tests_dir().join("checkpoints/deepseek_v3/config.json")).expect("file");
    let config = HfConfig::from_json(&text).expect("config");
    let block = mla(&config.layer(0).expect("layer")).clone();
    let m = |m: f64| 0.1 * m * 8f64.ln() + 1.0;
    assert!(close(block.attention.softmax_scale, 32f64.powf(-0.5) * m(0.8).powi(2)));
    assert!(close(block.rope.cos_sin_scale, m(1.0) / m(0.8)));
    assert_eq!(block.rope.scaling, RopeScaling::yarn(8.0, 1024.0, 32.0, 1.0, true));
    assert_eq!(dense(&config.layer(0).expect("layer")).intermediate_size, 96);
}

// ---------------------------------------------------------------- what is special in each family

#[test]
fn switch_and_nllb() {
    let config = model("switch-base-8");
    assert!(close(config.logits_scaling, 768f64.sqrt()));
    let layer = config.layer(1).expect("layer");
    let block = gqa(&layer);
    assert_eq!(block.attention.mask, Mask::default());
    assert_eq!(block.attention.softmax_scale, 1.0);
    assert_eq!(block.attention.relative_bias, Some(RelativeBias::new(32, 128, true)));
    assert_eq!(block.rope, None);
    assert_eq!(layer.norm, Norm::rms(1e-6));
    let moe = moe(&layer);
    assert_eq!(moe.experts.ffn, Ffn::plain(768, 3072, Activation::Relu));
    assert_eq!((moe.router.score, moe.router.renormalize), (Score::Softmax, Renormalize::None));
    assert_eq!(moe.router.capacity, Some(Capacity::new(CapacityLimit::Tokens(64))));
    assert_eq!(*dense(&config.layer(0).expect("layer")), Ffn::plain(768, 3072, Activation::Relu));

    let config = model("nllb-moe-54b");
    assert!(close(config.embedding_multiplier, 2048f64.sqrt()) && config.sinusoidal_positions);
    let layer = config.layer(3).expect("layer");
    assert_eq!((layer.norm.kind, layer.norm.eps, layer.norm.bias), (NormKind::Layer, 1e-5, true));
    let block = gqa(&layer);
    assert!(block.qkv_bias && block.out_bias && block.attention.mask == Mask::default());
    let moe = self::moe(&layer);
    assert!(moe.experts.ffn.up_bias && moe.experts.ffn.down_bias && !moe.experts.ffn.gated);
    assert!(close(moe.experts.combine_scale, 0.8));
    let capacity = moe.router.capacity.expect("capacity");
    assert!(capacity.normalize_after_drop && capacity.order == CapacityOrder::Position);
    for tokens in [1, 7, 500] {
        assert_eq!(capacity.tokens(tokens, 2, 128), tokens);
    }
    assert_eq!(moe.router.renormalize, Renormalize::Sum { eps: 0.0, floor: f64::from(f32::EPSILON) });
}

#[test]
fn softmax_families() {
    let layer = model("mixtral-8x7b").layer(0).expect("layer");
    assert_eq!(moe(&layer).router.renormalize, Renormalize::sum());
    assert_eq!(gqa(&layer).rope, Some(Rope::new(RopeStyle::Half, 128, 1e6)));
    assert_eq!(layer.norm, Norm::rms(1e-5));

    let layer = model("olmoe-1b-7b").layer(0).expect("layer");
    assert_eq!((gqa(&layer).qk_norm, gqa(&layer).clip_qkv), (Some(QkNorm::Full), None));
    assert_eq!((moe(&layer).router.renormalize, layer.norm.eps), (Renormalize::None, 1e-5));

    let layer = model("qwen1.5-moe-a2.7b").layer(0).expect("layer");
    assert!(gqa(&layer).qkv_bias && !gqa(&layer).out_bias);
    assert_eq!(gqa(&layer).attention.mask, Mask::causal());
    let shared = moe(&layer).shared.expect("shared");
    assert!(shared.sigmoid_gate && shared.ffn.intermediate_size == 5632);
    assert_eq!(moe(&layer).router.renormalize, Renormalize::None);

    let layer = model("qwen3-30b-a3b").layer(0).expect("layer");
    assert_eq!(gqa(&layer).qk_norm, Some(QkNorm::PerHead));
    assert_eq!((moe(&layer).router.renormalize, moe(&layer).shared), (Renormalize::sum(), None));

    let config = model("qwen3-next-80b-a3b");
    assert!(matches!(config.layer(0), Err(Error::Unsupported { case, .. }) if case.contains("delta-net")));
    let layer = config.layer(3).expect("layer");
    assert_eq!((layer.norm.weight_offset, config.final_norm.weight_offset), (1.0, 1.0));
    assert!(gqa(&layer).output_gate);
    assert_eq!(gqa(&layer).rope, Some(Rope::new(RopeStyle::Half, 64, 1e7)));
    assert!(moe(&layer).shared.expect("shared").sigmoid_gate);

    let config = model("jamba");
    assert!(matches!(config.layer(3), Err(Error::Unsupported { case, .. }) if case.contains("Mamba")));
    assert_eq!(gqa(&config.layer(4).expect("layer")).rope, None);

    let layer = model("dbrx").layer(0).expect("layer");
    assert_eq!((layer.norm, gqa(&layer).clip_qkv), (Norm::layer(1e-5), Some(8.0)));
    assert_eq!(gqa(&layer).rope, Some(Rope::new(RopeStyle::Half, 128, 5e5)));
    assert_eq!(moe(&layer).router.renormalize, Renormalize::sum());

    let layer = model("ernie-4.5-21b-a3b").layer(27).expect("layer");
    assert!(moe(&layer).selection_bias);
    assert_eq!(moe(&layer).router.score, Score::Softmax);
    assert_eq!(moe(&layer).router.renormalize, Renormalize::Sum { eps: 0.0, floor: 1e-12 });
    assert_eq!(moe(&layer).shared.expect("shared").ffn.intermediate_size, 3072);
    assert_eq!(gqa(&layer).rope.as_ref().expect("rope").style, RopeStyle::Interleaved);
    assert_eq!(moe(&model("ernie-4.5-300b-a47b").layer(3).expect("layer")).shared, None);
}

#[test]
fn families_that_select_by_logit() {
    let config = model("gpt-oss-20b");
    assert_eq!(config.weight_format, WeightFormat::Mxfp4);
    let (sliding, full) = (config.layer(0).expect("layer"), config.layer(1).expect("layer"));
    assert_eq!(gqa(&sliding).attention.mask, Mask { window_left: Some(127), ..Mask::causal() });
    assert_eq!(gqa(&full).attention.mask, Mask::causal());
    assert!(gqa(&full).attention.sinks && gqa(&full).qkv_bias && gqa(&full).out_bias);
    let rope = gqa(&full).rope.clone().expect("rope");
    assert_eq!(rope.scaling, RopeScaling::yarn(32.0, 4096.0, 32.0, 1.0, false));
    assert!(close(rope.cos_sin_scale, 0.1 * 32f64.ln() + 1.0));
    let moe = self::moe(&full);
    assert!(moe.router_bias && moe.experts.ffn.up_bias && moe.experts.ffn.down_bias);
    assert_eq!(moe.experts.ffn.activation, Activation::SwigluClamped { alpha: 1.702, limit: 7.0 });
    let r = &moe.router;
    assert_eq!((r.score, r.select_on, r.renormalize), (Score::Raw, SelectOn::Logits, Renormalize::Softmax));

    let config = model("granite-3.0-1b-a400m");
    assert_eq!((config.embedding_multiplier, config.logits_scaling), (12.0, 6.0));
    let layer = config.layer(0).expect("layer");
    assert_eq!((layer.residual_multiplier, gqa(&layer).attention.softmax_scale), (0.22, 0.015625));
    assert_eq!(self::moe(&layer).router.renormalize, Renormalize::Softmax);

    let config = model("llama-4-scout");
    assert!(!config.tie_word_embeddings);
    let (local, global) = (config.layer(2).expect("layer"), config.layer(3).expect("layer"));
    assert_eq!(gqa(&local).attention.mask, Mask { chunk: Some(8192), ..Mask::causal() });
    assert_eq!((gqa(&local).qk_norm, gqa(&local).q_temperature), (Some(QkNorm::L2AfterRope), None));
    let rope = gqa(&local).rope.clone().expect("rope");
    assert_eq!(
        (rope.style, rope.scaling.clone()),
        (RopeStyle::Interleaved, RopeScaling::llama3(16.0, 1.0, 1.0, 8192.0))
    );
    assert!(rope.inv_freq().iter().all(|f| f.is_finite() && *f > 0.0));
    assert_eq!(gqa(&global).attention.mask, Mask::causal());
    assert_eq!((gqa(&global).qk_norm, gqa(&global).rope.clone()), (None, None));
    assert_eq!(gqa(&global).q_temperature, Some(QTemperature::new(8192.0, 0.1)));
    let moe = self::moe(&local);
    assert_eq!(moe.experts.weight_on, WeightOn::Input);
    assert_eq!((moe.router.score, moe.router.select_on), (Score::Sigmoid, SelectOn::Logits));
    let shared = moe.shared.expect("shared");
    assert!(!shared.sigmoid_gate && shared.ffn.intermediate_size == 8192);
    let maverick = model("llama-4-maverick").layer(0).expect("layer");
    assert_eq!((dense(&maverick).intermediate_size, gqa(&maverick).qk_norm), (16_384, None));

    let config = model("phi-3.5-moe");
    assert!(config.head_bias);
    let (short, long) = (config.layer_for(0, 4096).expect("layer"), config.layer_for(0, 4097).expect("layer"));
    assert_eq!(short, config.layer(0).expect("layer"));
    for (layer, last) in [(&short, 1.049_999_952_316_284_2), (&long, 44.000_003_814_697_266)] {
        let rope = gqa(layer).rope.clone().expect("rope");
        assert_eq!(rope.cos_sin_scale, 1.243_163_121_016_122);
        assert!(close(rope.inv_freq()[63], 1e4f64.powf(-126.0 / 128.0) / last));
    }
    assert_eq!(gqa(&short).attention.mask, Mask { window_left: Some(131_071), ..Mask::causal() });
    assert_eq!((short.norm.kind, short.norm.bias, short.norm.eps), (NormKind::Layer, true, 1e-5));
    assert_eq!(self::moe(&short).router.selection, Selection::SparseMixer { jitter_eps: 0.01 });
}

#[test]
fn families_with_sigmoid_scores_or_latent_attention() {
    let layer = model("deepseek-v2-lite").layer(1).expect("layer");
    let block = mla(&layer);
    assert_eq!(block.mla, Mla::new(16, 512, 128, 64, 128));
    assert!(close(block.attention.softmax_scale, (0.1 * 0.707 * 40f64.ln() + 1.0).powi(2) / 192f64.sqrt()));
    assert_eq!((block.rope.cos_sin_scale, block.rope.style), (1.0, RopeStyle::Interleaved));
    let r = &moe(&layer).router;
    assert_eq!((r.score, r.renormalize, r.scaling_factor, r.groups), (Score::Softmax, Renormalize::None, 1.0, None));
    assert_eq!(moe(&layer).shared.expect("shared").ffn.intermediate_size, 2816);

    let layer = model("deepseek-v2").layer(1).expect("layer");
    assert_eq!(mla(&layer).mla.q_lora_rank, Some(1536));
    let r = &moe(&layer).router;
    assert_eq!((r.scaling_factor, r.groups), (16.0, Some(ExpertGroups::new(8, 3, GroupScore::Max))));

    let config = model("deepseek-v3");
    assert_eq!(config.weight_format, WeightFormat::Fp8Block);
    let layer = config.layer(3).expect("layer");
    assert_eq!(mla(&layer).rope.style, RopeStyle::InterleavedToHalf);
    assert!(moe(&layer).selection_bias);
    let r = &moe(&layer).router;
    assert_eq!(r.groups, Some(ExpertGroups::new(8, 4, GroupScore::Top2Sum)));
    assert_eq!((r.score, r.scaling_factor), (Score::Sigmoid, 2.5));
    assert_eq!(r.renormalize, Renormalize::Sum { eps: 1e-20, floor: 0.0 });

    let layer = model("kimi-k2").layer(1).expect("layer");
    assert_eq!((moe(&layer).router.groups, moe(&layer).router.scaling_factor), (None, 2.827));
    assert_eq!(mla(&layer).rope.scaling, RopeScaling::yarn(32.0, 4096.0, 1.0, 1.0, true));
    assert!(mla(&layer).rope.inv_freq().iter().all(|f| f.is_finite()));

    let layer = model("glm-4.5").layer(3).expect("layer");
    assert_eq!(gqa(&layer).qk_norm, Some(QkNorm::PerHead));
    assert!(gqa(&layer).qkv_bias && !gqa(&layer).out_bias);
    assert_eq!(gqa(&layer).rope, Some(Rope::new(RopeStyle::Half, 64, 1e6)));
    assert!(moe(&layer).selection_bias && moe(&layer).router.scaling_factor == 2.5);
    assert_eq!(gqa(&model("glm-4.5-air").layer(3).expect("layer")).qk_norm, None);

    let layer = model("minimax-m2").layer(0).expect("layer");
    assert_eq!(gqa(&layer).qk_norm, Some(QkNorm::Full));
    assert_eq!(gqa(&layer).rope, Some(Rope::new(RopeStyle::Half, 64, 5e6)));
    let m = moe(&layer);
    assert!(m.selection_bias && m.router.score == Score::Sigmoid && m.router.renormalize == Renormalize::sum());

    let layer = model("mistral-7b").layer(0).expect("layer");
    assert_eq!(gqa(&layer).attention.mask, Mask { window_left: Some(4095), ..Mask::causal() });
}

// ---------------------------------------------------------------- against what was recorded from the real classes

struct Golden {
    meta: Value,
    inv_freq: Option<Vec<f64>>,
}

fn golden(path: &Path) -> Golden {
    let data = fs::read(path).expect("file");
    let (_, header) = safetensors::SafeTensors::read_metadata(&data).expect("header");
    let meta = header.metadata().as_ref().expect("metadata")["golden"].clone();
    let tensors = safetensors::SafeTensors::deserialize(&data).expect("tensors");
    let inv_freq = tensors
        .tensor("layer.rope.inv_freq")
        .ok()
        .map(|t| t.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect());
    Golden { meta: serde_json::from_str(&meta).expect("JSON"), inv_freq }
}

/// A mixture in the words of the golden format.
fn moe_words(moe: &Moe) -> Value {
    let (r, e) = (&moe.router, &moe.experts);
    let (weight_norm, eps, floor) = match r.renormalize {
        Renormalize::None => ("none", 0.0, 0.0),
        Renormalize::Sum { eps, floor } => ("sum", eps, floor),
        Renormalize::L2 => ("l2", 0.0, 0.0),
        Renormalize::Softmax => ("softmax_selected", 0.0, 0.0),
        other => panic!("{other:?}"),
    };
    let (activation, params) = match e.ffn.activation {
        Activation::Silu => ("silu", json!({})),
        Activation::Relu => ("relu", json!({})),
        Activation::GeluErf => ("gelu_erf", json!({})),
        Activation::GeluTanh => ("gelu_tanh", json!({})),
        Activation::SwigluClamped { alpha, limit } => ("swiglu_clamped", json!({"alpha": alpha, "limit": limit})),
        other => panic!("{other:?}"),
    };
    let score = match (r.score, r.selection) {
        (_, Selection::SparseMixer { .. }) => "sparsemixer",
        (Score::Softmax, _) => "softmax",
        (Score::Sigmoid, _) => "sigmoid",
        (Score::Raw, _) => "identity",
        (other, _) => panic!("{other:?}"),
    };
    let group = |g: ExpertGroups| {
        let score = if g.score == GroupScore::Max { "max" } else { "top2_sum" };
        json!({"n_group": g.num_groups, "topk_group": g.top_groups, "group_score": score})
    };
    let limit = |c: Capacity| match c.limit {
        CapacityLimit::Tokens(n) => json!(n),
        other => panic!("{other:?}"),
    };
    json!({
        "score_fn": score, "select_on": if r.select_on == SelectOn::Logits && r.score != Score::Raw { "logits" } else { "scores" },
        "weight_norm": weight_norm, "norm_eps": eps, "norm_min": floor, "routed_scale": r.scaling_factor,
        "groups": r.groups.map(group), "activation": activation, "act_params": params,
        "expert_form": if e.ffn.gated { "gated" } else { "plain" },
        "apply_weight": if e.weight_on == WeightOn::Input { "input" } else { "output" },
        "combine_scale": e.combine_scale, "n_experts": r.num_experts, "top_k": r.top_k,
        "hidden": e.ffn.hidden_size, "inter": e.ffn.intermediate_size,
        "shared": moe.shared.map(|s| json!({"inter": s.ffn.intermediate_size, "gate": if s.sigmoid_gate { "sigmoid" } else { "none" }})),
        "capacity": r.capacity.map(|c| json!({"limit": limit(c), "order": "position", "scope": "row"})),
    })
}

/// The attention core in the words of the golden format.
fn attn_words(a: &Attention) -> Value {
    json!({
        "heads_q": a.num_heads, "heads_kv": a.num_kv_heads, "dim_qk": a.head_dim, "dim_v": a.value_dim, "scale": a.softmax_scale,
        "causal": a.mask.causal, "window": a.mask.window_left.map(|w| w + 1), "chunk": a.mask.chunk, "softcap": a.softcap,
    })
}

/// The layer around it in the words of the golden format.
fn layer_words(layer: &Layer) -> Value {
    let rope_words = |rope: Option<&Rope>| match rope {
        None => json!({"style": "none"}),
        Some(r) => json!({
            "style": match r.style {
                RopeStyle::Half => "half",
                RopeStyle::Interleaved => "interleaved",
                RopeStyle::InterleavedToHalf => "interleaved_to_half",
                other => panic!("{other:?}"),
            },
            "rotary_dim": r.rotary_dim, "theta": r.theta, "cos_sin_scale": r.cos_sin_scale,
        }),
    };
    let norm = json!({
        "type": if layer.norm.kind == NormKind::Rms { "rmsnorm" } else { "layernorm" },
        "eps": layer.norm.eps, "weight_offset": layer.norm.weight_offset,
    });
    let mlp = if matches!(layer.mlp, Mlp::Moe(_)) { "moe" } else { "dense" };
    let mut words = json!({"norm": norm, "mlp": mlp, "residual_multiplier": layer.residual_multiplier});
    match &layer.attention {
        AttentionBlock::Gqa(b) => {
            words["attention"] = json!("gqa");
            words["rope"] = rope_words(b.rope.as_ref());
            words["clip_qkv"] = json!(b.clip_qkv);
            words["qk_norm"] = match b.qk_norm {
                None => Value::Null,
                Some(QkNorm::Full) => json!("full_rms"),
                Some(QkNorm::PerHead) => json!("per_head_rms"),
                Some(QkNorm::L2AfterRope) => json!("l2_after_rope"),
                Some(other) => panic!("{other:?}"),
            };
            words["q_temperature"] =
                json!(b.q_temperature.map(|t| json!({"floor_scale": t.floor_scale, "attn_scale": t.attn_scale})));
        }
        AttentionBlock::Mla(b) => {
            words["attention"] = json!("mla");
            words["rope"] = rope_words(Some(&b.rope));
            words["mla"] = json!({
                "q_lora_rank": b.mla.q_lora_rank, "kv_lora_rank": b.mla.kv_lora_rank, "nope_dim": b.mla.nope_dim,
                "rope_dim": b.mla.rope_dim, "dim_v": b.mla.value_dim, "latent_norm_eps": b.mla.latent_norm_eps,
            });
        }
        other => panic!("{other:?}"),
    }
    words
}

/// The first field of `ours` that `recorded` has with another value; numbers may differ in the last digits.
fn difference(ours: &Value, recorded: &Value) -> Option<String> {
    match (ours, recorded) {
        (Value::Object(a), Value::Object(b)) => a.iter().find_map(|(key, a)| {
            let b = b.get(key)?;
            difference(a, b).map(|d| format!("{key}: {d}"))
        }),
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64()?, b.as_f64()?);
            (!(a == b || close(a, b))).then(|| format!("{a} for {b}"))
        }
        (a, b) => (a != b).then(|| format!("{a} for {b}")),
    }
}

#[test]
fn golden_configurations_give_the_recorded_semantics() {
    let mut compared = [0; 3];
    for entry in fs::read_dir(tests_dir().join("golden")).expect("tests/golden") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let name = path.file_stem().expect("stem").to_string_lossy().into_owned();
        let golden = golden(&path);
        let config = match HfConfig::from_json(&golden.meta["config"].to_string()) {
            Ok(config) => config,
            Err(Error::Parse { source_name, .. }) if source_name.contains("model_type") => continue,
            Err(e) => panic!("{name}: {e}"),
        };
        let layers: Vec<Layer> = (0..config.num_layers).filter_map(|n| config.layer(n).ok()).collect();
        let check = |part: &str, words: &dyn Fn(&Layer) -> Option<Value>| -> usize {
            let recorded = &golden.meta[part];
            if recorded.is_null() {
                return 0;
            }
            // One layer of the model was recorded.
            let found: Vec<_> = layers.iter().filter_map(words).map(|w| difference(&w, recorded)).collect();
            assert!(found.contains(&None), "{name}, {part}: {found:?}");
            1
        };
        compared[0] += check("moe", &|l| match &l.mlp {
            Mlp::Moe(moe) => Some(moe_words(moe)),
            _ => None,
        });
        compared[1] += check("attn", &|l| Some(attn_words(l.attention())));
        compared[2] += check("layer", &|l| Some(layer_words(l)));
        if let (Some(recorded), true) = (&golden.inv_freq, !golden.meta["layer"].is_null()) {
            let rope = match &layers[0].attention {
                AttentionBlock::Gqa(b) => b.rope.clone(),
                AttentionBlock::Mla(b) => Some(b.rope.clone()),
                other => panic!("{other:?}"),
            };
            if let Some(rope) = rope {
                let ours = rope.inv_freq();
                assert_eq!(ours.len(), recorded.len(), "{name}");
                assert!(ours.iter().zip(recorded).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "{name}: {ours:?}");
            }
        }
    }
    assert!(compared.iter().all(|n| *n >= 12), "{compared:?}");
}

// ---------------------------------------------------------------- spellings

/// The same configuration as transformers 5 would write it.
fn newer(config: &Map<String, Value>) -> Map<String, Value> {
    let mut new = config.clone();
    if let Some(dtype) = new.remove("torch_dtype") {
        new.insert("dtype".into(), dtype);
    }
    let inside = new.get_mut("attn_config").and_then(|a| a.as_object_mut()).and_then(|a| a.remove("rope_theta"));
    if let Some(theta) = new.remove("rope_theta").or(inside) {
        let mut rope = match new.remove("rope_scaling") {
            Some(Value::Object(rope)) => rope,
            _ => Map::new(),
        };
        let kind = rope.remove("type").or(rope.remove("rope_type")).unwrap_or(json!("default"));
        rope.insert("rope_type".into(), kind);
        rope.insert("rope_theta".into(), theta);
        if let Some(partial) = new.remove("partial_rotary_factor") {
            rope.insert("partial_rotary_factor".into(), partial);
        }
        new.insert("rope_parameters".into(), Value::Object(rope));
    }
    if let Some(Value::Object(text)) = new.get("text_config").cloned() {
        new.insert("text_config".into(), Value::Object(newer(&text)));
    }
    new
}

/// The same configuration as it was written before.
fn older(config: &Map<String, Value>) -> Map<String, Value> {
    let mut old = config.clone();
    if let Some(dtype) = old.remove("dtype") {
        old.insert("torch_dtype".into(), dtype);
    }
    if let Some(Value::Object(mut rope)) = old.remove("rope_parameters") {
        for key in ["rope_theta", "partial_rotary_factor"] {
            if let Some(value) = rope.remove(key) {
                old.insert(key.into(), value);
            }
        }
        let kind = rope.remove("rope_type").unwrap_or(json!("default"));
        let scaling = if kind == "default" && rope.is_empty() {
            Value::Null
        } else {
            rope.insert("type".into(), kind);
            Value::Object(rope)
        };
        old.insert("rope_scaling".into(), scaling);
    }
    old
}

#[test]
fn both_spellings_are_the_same() {
    let mut changed = 0;
    for (name, text) in published() {
        let config: Map<String, Value> = serde_json::from_str(&text).expect("JSON");
        let want = HfConfig::from_json(&text).expect("config");
        for other in [newer(&config), older(&config), older(&newer(&config))] {
            changed += usize::from(other != config);
            assert_eq!(parse(Value::Object(other)).unwrap_or_else(|e| panic!("{name}: {e}")), want, "{name}");
        }
    }
    assert!(changed > 40);
}

#[test]
fn missing_null_and_default_are_the_same() {
    // These three files are the defaults of their class.
    for name in ["mixtral-8x7b", "gpt-oss-120b", "ernie-4.5-21b-a3b"] {
        let (full, want) = (object(name), model(name));
        let bare = json!({"model_type": full["model_type"], "dtype": full["dtype"]});
        assert_eq!(parse(bare).expect(name), want, "{name}");
        for key in full.keys().filter(|k| !["model_type", "dtype", "rope_parameters"].contains(&k.as_str())) {
            let mut missing = full.clone();
            missing.remove(key);
            assert_eq!(parse(Value::Object(missing.clone())).expect(key), want, "{name} without {key}");
            // Null is a value of its own for these.
            if !["sliding_window", "num_key_value_heads", "head_dim"].contains(&key.as_str()) {
                missing.insert(key.clone(), Value::Null);
                assert_eq!(parse(Value::Object(missing)).expect(key), want, "{name} with {key} null");
            }
        }
    }
    // head_dim null is hidden_size / num_attention_heads, num_key_value_heads null is num_attention_heads.
    let config = parse(json!({"model_type": "llama", "hidden_size": 96, "num_attention_heads": 3, "head_dim": null}));
    let layer = config.expect("config").layer(0).expect("layer");
    assert_eq!((layer.attention().head_dim, layer.attention().num_kv_heads), (32, 3));
    // Mistral's window: missing is the class's 4096, null is none.
    for (config, left) in [
        (json!({"model_type": "mistral"}), Some(4095)),
        (json!({"model_type": "mistral", "sliding_window": null}), None),
        (json!({"model_type": "mistral", "sliding_window": 10}), Some(9)),
    ] {
        let layer = parse(config).expect("config").layer(0).expect("layer");
        assert_eq!(layer.attention().mask, Mask { window_left: left, ..Mask::causal() });
    }
}

/// A configuration that says nothing but its family is that of the class: vocabulary, width, layers; query heads, key/value heads,
/// head width; experts, top-k and their width of the last layer that has some.
#[test]
#[rustfmt::skip]
fn bare_configurations_are_those_of_the_class() {
    let cases = [
        (json!({"model_type": "switch_transformers"}), [32_128, 768, 12], [12, 12, 64], Some([8, 1, 2048])),
        (json!({"model_type": "nllb-moe"}), [128_112, 1024, 12], [16, 16, 64], Some([128, 2, 4096])),
        (json!({"model_type": "mixtral"}), [32_000, 4096, 32], [32, 8, 128], Some([8, 2, 14_336])),
        (json!({"model_type": "olmoe"}), [50_304, 2048, 16], [16, 16, 128], Some([64, 8, 2048])),
        (json!({"model_type": "qwen2_moe"}), [151_936, 2048, 24], [16, 16, 128], Some([60, 4, 1408])),
        (json!({"model_type": "qwen3_moe"}), [151_936, 2048, 24], [32, 4, 64], Some([128, 8, 768])),
        (json!({"model_type": "qwen3_next"}), [151_936, 2048, 48], [16, 2, 256], Some([512, 10, 512])),
        // The class has no default for top-k.
        (json!({"model_type": "deepseek_v2", "num_experts_per_tok": 6}), [102_400, 4096, 32], [32, 32, 192], Some([64, 6, 1407])),
        (json!({"model_type": "deepseek_v3"}), [129_280, 7168, 61], [128, 128, 192], Some([256, 8, 2048])),
        (json!({"model_type": "kimi_k2"}), [129_280, 7168, 61], [128, 128, 192], Some([256, 8, 2048])),
        (json!({"model_type": "gpt_oss"}), [201_088, 2880, 36], [64, 8, 64], Some([128, 4, 2880])),
        // Half of the class's own head of 42 cannot turn.
        (json!({"model_type": "glm4_moe", "head_dim": 128}), [151_552, 4096, 46], [96, 8, 128], Some([128, 8, 1408])),
        (json!({"model_type": "llama4_text"}), [202_048, 5120, 48], [40, 8, 128], Some([16, 1, 8192])),
        (json!({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}), [202_048, 5120, 48], [40, 8, 128], Some([16, 1, 8192])),
        (json!({"model_type": "phimoe"}), [32_064, 4096, 32], [32, 8, 128], Some([16, 2, 6400])),
        (json!({"model_type": "granitemoe"}), [32_000, 4096, 32], [32, 32, 128], Some([8, 2, 11_008])),
        (json!({"model_type": "dbrx"}), [32_000, 2048, 24], [16, 1, 128], Some([4, 1, 3584])),
        (json!({"model_type": "jamba"}), [65_536, 4096, 32], [32, 8, 128], None),
        (json!({"model_type": "minimax_m2"}), [200_064, 3072, 62], [48, 8, 128], Some([256, 8, 1536])),
        (json!({"model_type": "ernie4_5_moe"}), [103_424, 2560, 28], [20, 4, 128], Some([64, 6, 1536])),
        (json!({"model_type": "llama"}), [32_000, 4096, 32], [32, 32, 128], None),
        (json!({"model_type": "mistral"}), [32_000, 4096, 32], [32, 8, 128], None),
    ];
    for (text, sizes, heads, experts) in cases {
        let config = parse(text.clone()).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!([config.vocab_size, config.hidden_size, config.num_layers], sizes, "{text}");
        assert_eq!((config.dtype, config.weight_format), (None, WeightFormat::Float), "{text}");
        let layers: Vec<Layer> = (0..config.num_layers).filter_map(|n| config.layer(n).ok()).collect();
        for layer in &layers {
            let a = layer.attention();
            assert_eq!([a.num_heads, a.num_kv_heads, a.head_dim], heads, "{text}");
        }
        let found = layers.iter().rev().find_map(|layer| match &layer.mlp {
            Mlp::Moe(m) => Some([m.router.num_experts, m.router.top_k, m.experts.ffn.intermediate_size]),
            _ => None,
        });
        assert_eq!(found, experts, "{text}");
    }
}

#[test]
fn per_layer_choices() {
    let qwen = |extra: Value| {
        let mut config = json!({"model_type": "qwen3_moe", "num_hidden_layers": 6});
        config.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        let config = parse(config).expect("config");
        (0..6).filter(|n| matches!(config.layer(*n).expect("layer").mlp, Mlp::Moe(_))).collect::<Vec<_>>()
    };
    assert_eq!(qwen(json!({})), [0, 1, 2, 3, 4, 5]);
    assert_eq!(qwen(json!({"decoder_sparse_step": 2})), [1, 3, 5]);
    assert_eq!(qwen(json!({"decoder_sparse_step": 2, "mlp_only_layers": [3]})), [1, 5]);
    assert_eq!(qwen(json!({"num_experts": 0})), [0usize; 0]);

    let jamba =
        parse(json!({"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1,
                             "expert_layer_period": 2, "expert_layer_offset": 1}))
        .expect("config");
    let kinds: Vec<_> = (0..8).map(|n| jamba.layer(n).map(|l| matches!(l.mlp, Mlp::Moe(_))).ok()).collect();
    assert_eq!(kinds, [None, Some(true), None, None, None, Some(true), None, None]);

    let ernie = parse(json!({"model_type": "ernie4_5_moe", "num_hidden_layers": 8, "moe_layer_start_index": 2,
                             "moe_layer_end_index": 6, "moe_layer_interval": 2}))
    .expect("config");
    let sparse: Vec<_> = (0..8).filter(|n| matches!(ernie.layer(*n).expect("layer").mlp, Mlp::Moe(_))).collect();
    assert_eq!(sparse, [3, 5]);

    let llama4 = parse(json!({"model_type": "llama4_text", "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0],
                              "moe_layers": [2], "attn_temperature_tuning": 4}))
    .expect("config");
    for n in 0..4 {
        let layer = llama4.layer(n).expect("layer");
        let turns = n == 1 || n == 2;
        assert_eq!(gqa(&layer).rope.is_some(), turns);
        assert_eq!(gqa(&layer).q_temperature.is_some(), !turns);
        assert_eq!(layer.attention().mask.chunk.is_some(), turns);
        assert_eq!(matches!(layer.mlp, Mlp::Moe(_)), n == 2);
    }
    let off = parse(json!({"model_type": "llama4_text", "attn_temperature_tuning": false})).expect("config");
    assert_eq!(gqa(&off.layer(3).expect("layer")).q_temperature, None);

    let deepseek =
        parse(json!({"model_type": "deepseek_v3", "num_hidden_layers": 8, "moe_layer_freq": 2})).expect("config");
    let sparse: Vec<_> = (0..8).filter(|n| matches!(deepseek.layer(*n).expect("layer").mlp, Mlp::Moe(_))).collect();
    assert_eq!(sparse, [4, 6]);

    let next = parse(json!({"model_type": "qwen3_next", "num_hidden_layers": 6, "full_attention_interval": 3}))
        .expect("config");
    let full: Vec<_> = (0..6).filter(|n| next.layer(*n).is_ok()).collect();
    assert_eq!(full, [2, 5]);
}

#[test]
fn rope_types() {
    let rope = |extra: Value| {
        let config = parse(json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8,
                                  "max_position_embeddings": 4096, "rope_scaling": extra}))?;
        Ok::<_, Error>(gqa(&config.layer(0)?).rope.clone().expect("rope"))
    };
    assert_eq!(rope(json!({"type": "linear", "factor": 2.0})).expect("rope").scaling, RopeScaling::linear(2.0));
    let yarn = rope(json!({"rope_type": "yarn", "factor": 4.0})).expect("rope");
    assert_eq!(yarn.scaling, RopeScaling::yarn(4.0, 4096.0, 32.0, 1.0, true));
    assert!(close(yarn.cos_sin_scale, 0.1 * 4f64.ln() + 1.0));
    let yarn =
        rope(json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 0})).expect("rope");
    assert_eq!((yarn.cos_sin_scale, yarn.scaling), (1.5, RopeScaling::yarn(4.0, 4096.0, 32.0, 1.0, true)));
    let long = rope(json!({"type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8],
                           "original_max_position_embeddings": 1024}))
    .expect("rope");
    assert_eq!(long.scaling, RopeScaling::long_rope(vec![1.0, 2.0, 3.0, 4.0]));
    assert!(close(long.cos_sin_scale, (1.0 + 4f64.ln() / 1024f64.ln()).sqrt()));
    assert!(
        matches!(rope(json!({"type": "dynamic", "factor": 2.0})), Err(Error::Unsupported { case, .. }) if case.contains("dynamic"))
    );
}
