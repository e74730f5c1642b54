//! What the reader of Hugging Face configurations refuses, specifications as JSON, and arbitrary input.

#![cfg(feature = "serde")]

#[path = "common/peak.rs"]
mod peak;

use gatefold::spec::*;
use gatefold::{Dtype, Error};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

#[global_allocator]
static PEAK: peak::Peak = peak::Peak;

fn configs_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configs")
}

/// The text of every file in `tests/configs`, in the order of their names.
fn published() -> &'static [String] {
    static TEXTS: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    TEXTS.get_or_init(|| {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(configs_dir()).expect("tests/configs").map(|entry| entry.expect("entry").path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
        paths.sort();
        assert_eq!(paths.len(), NUM_FILES);
        paths.iter().map(|path| fs::read_to_string(path).expect("text")).collect()
    })
}

const NUM_FILES: usize = 30;

fn object(name: &str) -> Map<String, Value> {
    let text = fs::read_to_string(configs_dir().join(format!("{name}.json"))).expect(name);
    serde_json::from_str(&text).expect(name)
}

fn parse(value: Value) -> Result<HfConfig, Error> {
    HfConfig::from_json(&value.to_string())
}

// ---------------------------------------------------------------- what is refused

#[test]
fn values_that_are_not_implemented_are_errors() {
    // The file, the change, the field that the message names.
    let cases: &[(&str, Value, &str)] = &[
        ("mixtral-8x7b", json!({"model_type": "bert"}), "model_type"),
        ("mixtral-8x7b", json!({"model_type": null}), "model_type"),
        ("mixtral-8x7b", json!({"model_type": 3}), "model_type"),
        ("mixtral-8x7b", json!({"hidden_act": "mish"}), "hidden_act"),
        ("mixtral-8x7b", json!({"hidden_size": "4096"}), "hidden_size"),
        ("mixtral-8x7b", json!({"hidden_size": -1}), "hidden_size"),
        ("mixtral-8x7b", json!({"hidden_size": 4096.5}), "hidden_size"),
        ("mixtral-8x7b", json!({"hidden_size": 1e18}), "hidden_size"),
        ("mixtral-8x7b", json!({"num_hidden_layers": 1_000_000_000}), "num_hidden_layers"),
        ("mixtral-8x7b", json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
        ("mixtral-8x7b", json!({"num_key_value_heads": 7}), "num_kv_heads"),
        ("mixtral-8x7b", json!({"num_experts_per_tok": 9}), "top_k"),
        ("mixtral-8x7b", json!({"num_experts": 16}), "num_experts"),
        ("mixtral-8x7b", json!({"dtype": "int8"}), "dtype"),
        ("mixtral-8x7b", json!({"torch_dtype": "float16"}), "torch_dtype"),
        ("mixtral-8x7b", json!({"sliding_window": 0}), "sliding_window"),
        ("mixtral-8x7b", json!({"attention_bias": true}), "attention_bias"),
        ("mixtral-8x7b", json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping"),
        ("mixtral-8x7b", json!({"layer_types": ["sliding_attention"]}), "layer_types"),
        ("mixtral-8x7b", json!({"n_shared_experts": 1}), "n_shared_experts"),
        ("mixtral-8x7b", json!({"rope_parameters": {"rope_type": "mrope"}}), "rope_parameters.rope_type"),
        ("mixtral-8x7b", json!({"rope_parameters": {"type": 7}}), "rope_parameters.type"),
        ("mixtral-8x7b", json!({"rope_parameters": {"mrope_section": [1, 2]}}), "rope_parameters.mrope_section"),
        ("mixtral-8x7b", json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "full_attention"),
        ("mixtral-8x7b", json!({"rope_parameters": {"rope_type": "linear"}}), "factor"),
        ("mixtral-8x7b", json!({"rope_parameters": {"rope_type": "linear", "factor": 0}}), "factor"),
        ("mixtral-8x7b", json!({"rope_parameters": {"rope_theta": 0.5}}), "rope_theta"),
        ("mixtral-8x7b", json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
        ("mixtral-8x7b", json!({"rope_scaling": {"type": "linear", "factor": 2}}), "rope_scaling"),
        (
            "mixtral-8x7b",
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}),
            "high_freq_factor",
        ),
        ("mixtral-8x7b", json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config.quant_method"),
        ("mixtral-8x7b", json!({"quantization_config": {}}), "quantization_config.quant_method"),
        ("deepseek-v3", json!({"quantization_config": {"quant_method": "fp8"}}), "weight_block_size"),
        ("deepseek-v3", json!({"scoring_func": "softmax"}), "scoring_func"),
        ("deepseek-v3", json!({"topk_method": "greedy"}), "topk_method"),
        ("deepseek-v3", json!({"n_group": 7}), "num_groups"),
        ("deepseek-v3", json!({"num_key_value_heads": 8}), "num_key_value_heads"),
        ("deepseek-v3", json!({"n_shared_experts": null}), "n_shared_experts"),
        ("deepseek-v3", json!({"q_lora_rank": null, "attention_bias": true}), "attention_bias"),
        ("deepseek-v2", json!({"norm_topk_prob": true}), "norm_topk_prob"),
        ("deepseek-v2", json!({"num_experts_per_tok": null}), "num_experts_per_tok"),
        ("qwen2-57b-a14b", json!({"use_sliding_window": true}), "layer_types"),
        ("qwen3-next-80b-a3b", json!({"partial_rotary_factor": 0.254}), "rotary_dim"),
        ("qwen3-next-80b-a3b", json!({"layer_types": ["full_attention"]}), "layer_types"),
        ("gpt-oss-20b", json!({"hidden_act": "gelu"}), "hidden_act"),
        ("gpt-oss-20b", json!({"sliding_window": null}), "sliding_window"),
        ("gpt-oss-20b", json!({"swiglu_limit": 0}), "swiglu_limit"),
        ("phi-3.5-moe", json!({"rope_scaling": {"type": "linear", "factor": 2}}), "rope_scaling.type"),
        ("phi-3.5-moe", json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}), "short_factor"),
        ("phi-3.5-moe", json!({"num_experts_per_tok": 3}), "top_k"),
        ("dbrx", json!({"ffn_config": {"moe_normalize_expert_weights": 3}}), "ffn_config.moe_normalize_expert_weights"),
        ("dbrx", json!({"ffn_config": {"ffn_act_fn": {"name": "mish"}}}), "ffn_config.ffn_act_fn.name"),
        ("dbrx", json!({"attn_config": 7}), "attn_config"),
        ("dbrx", json!({"rope_theta": 10000}), "attn_config.rope_theta"),
        ("jamba", json!({"attn_layer_offset": 8}), "attn_layer_offset"),
        ("jamba", json!({"rope_scaling": {"type": "linear", "factor": 2}}), "rope_scaling"),
        ("minimax-m2", json!({"use_qk_norm": false}), "use_qk_norm"),
        ("minimax-m2", json!({"rotary_dim": 256}), "rotary_dim"),
        ("ernie-4.5-21b-a3b", json!({"use_bias": true}), "use_bias"),
        ("switch-base-8", json!({"is_gated_act": true}), "is_gated_act"),
        ("switch-base-8", json!({"feed_forward_proj": "gated-gelu"}), "feed_forward_proj"),
        ("nllb-moe-54b", json!({"second_expert_policy": "random"}), "second_expert_policy"),
        ("granite-3.0-1b-a400m", json!({"attention_multiplier": 0}), "attention_multiplier"),
        ("llama-3-8b", json!({"hidden_size": 4097}), "hidden_size"),
    ];
    for (name, change, field) in cases {
        let mut config = object(name);
        config.extend(change.as_object().expect("object").clone());
        let Err(error) = parse(Value::Object(config)) else { panic!("{name} with {change} is taken") };
        assert!(error.to_string().contains(field), "{name} with {change}: {error}");
        let (expected, found) = match &error {
            Error::Parse { expected, found, .. } | Error::Value { expected, found, .. } => (expected, found),
            other => panic!("{name} with {change}: {other:?}"),
        };
        assert!(!expected.is_empty() && !found.is_empty(), "{error}");
    }
    for text in ["", "null", "[]", "{", "{\"model_type\": 1e999}", "\u{0}"] {
        assert!(matches!(HfConfig::from_json(text), Err(Error::Parse { .. })), "{text}");
    }
    let deep = "[".repeat(100_000);
    assert!(matches!(HfConfig::from_json(&deep), Err(Error::Parse { .. })));
}

// ---------------------------------------------------------------- specifications as JSON

#[test]
fn specifications_survive_json() {
    let mut layers = Vec::new();
    for text in published() {
        let config = HfConfig::from_json(text).expect("config");
        layers.extend((0..config.num_layers.min(8)).filter_map(|n| config.layer_for(n, usize::MAX).ok()));
    }
    for layer in &layers {
        let text = serde_json::to_string(layer).expect("text");
        assert_eq!(serde_json::from_str::<Layer>(&text).expect(&text), *layer);
        // Every object refuses a field that it does not have.
        let value: Value = serde_json::from_str(&text).expect("value");
        let mut paths = Vec::new();
        struct_paths(&value, String::new(), &mut paths);
        for path in paths {
            let mut changed = value.clone();
            let object = changed.pointer_mut(&path).expect("path").as_object_mut().expect("object");
            object.insert("no_such_field".into(), json!(1));
            assert!(serde_json::from_value::<Layer>(changed).is_err(), "{path}");
        }
    }
    fn round<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T) {
        let text = serde_json::to_string(value).expect("text");
        assert_eq!(&serde_json::from_str::<T>(&text).expect(&text), value);
    }
    round(&Attention::causal(8, 2, 64));
    round(&Mask { causal: true, window_left: Some(7), window_right: Some(0), chunk: Some(16) });
    round(&RelativeBias::new(32, 128, true));
    round(&Mla::new(4, 16, 8, 4, 8));
    let mut rope = Rope::new(RopeStyle::Interleaved, 6, 1e4);
    rope.scaling = RopeScaling::given(vec![0.1, 1e-300, 1.0 / 3.0]);
    round(&rope);
    round(&RopeScaling::long_rope(vec![1.0, 2.5]));
    round(&Router::new(8, 2));
    round(&ExpertFfn::default());
    round(&Ffn::default());
    round(&SharedExpert::new(Ffn::default()));
    round(&Moe::default());
    round(&Norm::default());
    round(&QkvPrep::default());
    round(&QTemperature::new(8192.0, 0.1));
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F64] {
        round(&dtype);
    }
}

/// Paths of all objects that stand for a struct: those of an enum's variant with fields have exactly one key, its name.
fn struct_paths(value: &Value, path: String, out: &mut Vec<String>) {
    if let Value::Object(map) = value {
        let is_variant = map.len() == 1 && map.values().all(|v| v.is_object() || v.is_array());
        if !is_variant {
            out.push(path.clone());
        }
        for (key, value) in map {
            // The fields of an enum's variant are not a struct of their own.
            let inside_variant = is_variant && !matches!(key.as_str(), "gqa" | "mla" | "dense" | "moe");
            if !inside_variant {
                struct_paths(value, format!("{path}/{key}"), out);
            }
        }
    }
}

// ---------------------------------------------------------------- arbitrary input

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u32..40).prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..6)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// Memory that so many bytes of text justify: a value takes some bytes of text, and some dozens as a node of a tree.
fn justified(text: &[u8]) -> usize {
    (1 << 17) + 200 * text.len()
}

/// Reads, and asks for what is there: nothing may panic, nor take memory for what a number says.
fn exercise(bytes: &[u8]) {
    peak::within(justified(bytes), || read_config(bytes));
}

fn read_config(bytes: &[u8]) {
    if let Ok(config) = HfConfig::from_slice(bytes) {
        for n in 0..config.num_layers.min(5) {
            for seq_len in [0, usize::MAX] {
                if let Ok(layer) = config.layer_for(n, seq_len) {
                    layer.validate().expect("layers of a configuration are valid");
                }
            }
        }
        assert!(config.layer(usize::MAX).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise(&bytes);
    }

    #[test]
    fn arbitrary_json(value in any_json()) {
        exercise(value.to_string().as_bytes());
    }

    #[test]
    fn truncated_and_damaged_text(file in 0..NUM_FILES, cut in 0.0f64..1.0, byte: u8) {
        let mut bytes = published()[file].clone().into_bytes();
        let at = (cut * bytes.len() as f64) as usize;
        bytes[at] = byte;
        exercise(&bytes);
        bytes.truncate(at);
        exercise(&bytes);
    }

    #[test]
    fn mutated_configurations(file in 0..NUM_FILES, mutations in mutations()) {
        let mut config: Value = serde_json::from_str(&published()[file]).expect("JSON");
        mutate(&mut config, mutations);
        exercise(config.to_string().as_bytes());
    }

    #[test]
    fn specifications_from_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..100), value in any_json()) {
        specifications(&bytes);
        specifications(value.to_string().as_bytes());
    }

    #[test]
    fn mutated_specifications(index: prop::sample::Index, mutations in mutations(), cut: prop::sample::Index, byte: u8) {
        let mut value: Value = index.get(valid_specifications()).clone();
        mutate(&mut value, mutations);
        let mut bytes = value.to_string().into_bytes();
        specifications(&bytes);
        let at = cut.index(bytes.len());
        bytes[at] = byte;
        specifications(&bytes);
        bytes.truncate(at);
        specifications(&bytes);
    }

    /// Any value of any field of a family gives a typed error or valid layers.
    #[test]
    fn single_fields(file in 0..NUM_FILES, index: prop::sample::Index, value in any_json()) {
        let mut config: Map<String, Value> = serde_json::from_str(&published()[file]).expect("JSON");
        let keys: Vec<String> = config.keys().cloned().collect();
        config.insert(index.get(&keys).clone(), value);
        exercise(Value::Object(config).to_string().as_bytes());
    }
}

type Mutation = (prop::sample::Index, u8, Value);

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    prop::collection::vec((any::<prop::sample::Index>(), 0u8..8, any_json()), 1..5)
}

/// Fields dropped, nulled, retyped or made huge, also within nested objects.
fn mutate(value: &mut Value, mutations: Vec<Mutation>) {
    for (index, kind, other) in mutations {
        let mut paths = Vec::new();
        leaf_paths(value, String::new(), &mut paths);
        if paths.is_empty() {
            *value = other;
            break;
        }
        let path = index.get(&paths).clone();
        let Some((parent, key)) = path.rsplit_once('/') else { continue };
        let Some(Value::Object(parent)) = value.pointer_mut(parent) else { continue };
        let new = match kind {
            0 => {
                parent.remove(key);
                continue;
            }
            1 => Value::Null,
            2 => json!(u64::MAX),
            3 => json!(1e300),
            4 => json!(0),
            5 => json!(1e18),
            6 => json!(-1),
            _ => other,
        };
        parent.insert(key.into(), new);
    }
}

/// Some valid values of every specification.
fn valid_specifications() -> &'static [Value] {
    static VALUES: std::sync::OnceLock<Vec<Value>> = std::sync::OnceLock::new();
    VALUES.get_or_init(|| {
        let mut values = Vec::new();
        fn add<T: serde::Serialize>(values: &mut Vec<Value>, spec: T) {
            values.push(serde_json::to_value(spec).expect("a value"));
        }
        for text in published() {
            let config = HfConfig::from_json(text).expect("config");
            let layers = (0..config.num_layers.min(8)).filter_map(|n| config.layer_for(n, usize::MAX).ok());
            for layer in layers {
                let value = serde_json::to_value(&layer).expect("a value");
                if !values.contains(&value) {
                    values.push(value);
                }
            }
        }
        let mut attention = Attention::causal(8, 2, 64);
        attention.relative_bias = Some(RelativeBias::new(32, 128, true));
        add(&mut values, attention.relative_bias);
        add(&mut values, attention);
        add(&mut values, Mask { causal: true, window_left: Some(7), window_right: Some(0), chunk: Some(16) });
        add(&mut values, Mla::new(4, 16, 8, 4, 8));
        let mut rope = Rope::new(RopeStyle::Interleaved, 6, 1e4);
        let scalings = [
            RopeScaling::Default,
            RopeScaling::linear(2.0),
            RopeScaling::yarn(4.0, 4096.0, 32.0, 1.0, true),
            RopeScaling::llama3(8.0, 1.0, 4.0, 8192.0),
            RopeScaling::long_rope(vec![1.0, 2.0, 3.0]),
            RopeScaling::given(vec![0.1, 0.2, 0.3]),
        ];
        for scaling in scalings {
            add(&mut values, scaling.clone());
            rope.scaling = scaling;
            add(&mut values, &rope);
        }
        let mut router = Router::new(8, 2);
        router.groups = Some(ExpertGroups::new(4, 2, GroupScore::Top2Sum));
        add(&mut values, router.groups);
        add(&mut values, &router);
        router.groups = None;
        router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.25)));
        (router.jitter, router.aux_loss) = (Some(0.01), Some(AuxLoss::Switch { group_len: Some(4) }));
        (router.renormalize, router.second_expert) = (Renormalize::sum(), SecondExpert::Random);
        add(&mut values, router.capacity);
        add(&mut values, router.renormalize);
        add(&mut values, router.aux_loss);
        add(&mut values, &router);
        for selection in [Selection::Sinkhorn { iterations: 3 }, Selection::SparseMixer { jitter_eps: 0.1 }] {
            add(&mut values, selection);
            (router.selection, router.second_expert) = (selection, SecondExpert::Always);
            add(&mut values, &router);
        }
        let ffn = Ffn::gated(16, 8, Activation::SwigluClamped { alpha: 1.7, limit: 7.0 });
        let mut experts = ExpertFfn::new(8, ffn);
        experts.weight_format = WeightFormat::Int4 { group_size: 4 };
        let mut moe = Moe::new(Router::new(8, 2), experts);
        moe.shared = Some(SharedExpert::new(ffn));
        add(&mut values, ffn.activation);
        add(&mut values, ffn);
        add(&mut values, experts.weight_format);
        add(&mut values, experts);
        add(&mut values, moe.shared);
        add(&mut values, moe);
        add(&mut values, Norm::layer(1e-5));
        let mut prep = QkvPrep::new(4, 2, 16);
        (prep.qk_norm, prep.clip, prep.rope) = (Some(QkNorm::PerHead), Some(8.0), Some(rope));
        prep.q_temperature = Some(QTemperature::new(8192.0, 0.1));
        add(&mut values, prep.q_temperature);
        add(&mut values, prep);
        let mut retention = Retention::new(4, 8, 16);
        retention.form = RetentionForm::Chunkwise(8);
        add(&mut values, retention);
        add(&mut values, Dtype::BF16);
        values
    })
}

/// Reads the bytes as every type that can be read; what is read is validated, and the same when it was written and read again.
fn specifications(bytes: &[u8]) {
    fn valid<T>(_: &T) -> gatefold::Result<()> {
        Ok(())
    }
    fn read<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(
        bytes: &[u8],
        validate: impl Fn(&T) -> gatefold::Result<()>,
    ) {
        let Ok(spec) = serde_json::from_slice::<T>(bytes) else { return };
        if let Err(error) = validate(&spec) {
            assert!(error.to_string().contains('`'), "{error}");
        }
        let text = serde_json::to_string(&spec).expect("text");
        assert_eq!(serde_json::from_str::<T>(&text).expect(&text), spec);
    }
    peak::within(justified(bytes), || {
        read::<Layer>(bytes, Layer::validate);
        read::<AttentionBlock>(bytes, valid);
        read::<GqaBlock>(bytes, valid);
        read::<MlaBlock>(bytes, valid);
        read::<Mlp>(bytes, valid);
        read::<Attention>(bytes, Attention::validate);
        read::<RelativeBias>(bytes, RelativeBias::validate);
        read::<Mask>(bytes, Mask::validate);
        read::<Mla>(bytes, |mla| mla.validate().map(|()| assert!(mla.expanded().validate().is_ok())));
        read::<Rope>(bytes, |rope| rope.validate(64).map(|()| assert_eq!(rope.inv_freq().len(), rope.rotary_dim / 2)));
        read::<RopeScaling>(bytes, valid);
        read::<RopeStyle>(bytes, valid);
        read::<Router>(bytes, |router| {
            // The numbers that outputs are shaped by.
            router.validate().map(|()| assert!(router.slots() <= router.num_experts.max(router.top_k)))
        });
        read::<Score>(bytes, valid);
        read::<SelectOn>(bytes, valid);
        read::<Selection>(bytes, valid);
        read::<Renormalize>(bytes, valid);
        read::<ExpertGroups>(bytes, valid);
        read::<GroupScore>(bytes, valid);
        read::<Capacity>(bytes, valid);
        read::<CapacityLimit>(bytes, valid);
        read::<CapacityOrder>(bytes, valid);
        read::<SecondExpert>(bytes, valid);
        read::<AuxLoss>(bytes, valid);
        read::<Ffn>(bytes, Ffn::validate);
        read::<Activation>(bytes, valid);
        read::<ExpertFfn>(bytes, ExpertFfn::validate);
        read::<WeightOn>(bytes, valid);
        read::<WeightFormat>(bytes, valid);
        read::<SharedExpert>(bytes, valid);
        read::<Moe>(bytes, Moe::validate);
        read::<Norm>(bytes, Norm::validate);
        read::<NormKind>(bytes, valid);
        read::<QkNorm>(bytes, valid);
        read::<QkvPrep>(bytes, QkvPrep::validate);
        read::<QTemperature>(bytes, valid);
        read::<Retention>(bytes, Retention::validate);
        read::<RetentionForm>(bytes, valid);
        read::<Dtype>(bytes, valid);
    });
}

/// Every valid value is read as what it is; every type of the vocabulary that has a JSON form is in the list.
#[test]
fn all_specifications_are_read() {
    valid_specifications().iter().for_each(|value| specifications(value.to_string().as_bytes()));
    let tests = include_str!("config_input.rs");
    for source in [
        include_str!("../src/spec/attention.rs"),
        include_str!("../src/spec/ffn.rs"),
        include_str!("../src/spec/layer.rs"),
        include_str!("../src/spec/linear_attention.rs"),
        include_str!("../src/spec/mask.rs"),
        include_str!("../src/spec/norm.rs"),
        include_str!("../src/spec/rope.rs"),
        include_str!("../src/spec/router.rs"),
        include_str!("../src/element.rs"),
    ] {
        for part in source.split("serde::Deserialize").skip(1) {
            let item =
                part.lines().find_map(|line| line.strip_prefix("pub struct ").or(line.strip_prefix("pub enum ")));
            let name = item.expect("an item").split([' ', '<']).next().unwrap_or_default();
            assert!(tests.contains(&format!("read::<{name}>(bytes, ")), "{name} is not read");
        }
    }
}

/// Paths of all fields, `/a/b`.
fn leaf_paths(value: &Value, path: String, out: &mut Vec<String>) {
    if let Value::Object(map) = value {
        for (key, value) in map {
            let path = format!("{path}/{key}");
            out.push(path.clone());
            leaf_paths(value, path, out);
        }
    }
}
