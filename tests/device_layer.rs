//! A layer that stays on a device (`examples/support/resident`): prompt and tokens after it, in the simulator and on a GPU where
//! there is one, each part against the reference on its own input, as the example `layer` does it for a model's shape. A recorded
//! step gives the same bits as a queued one.

#![cfg(all(feature = "serde", gatefold_simulator))]

#[cfg(feature = "cuda")]
#[path = "common/skip.rs"]
mod skip;
#[path = "../examples/support/mod.rs"]
mod support;

use gatefold::cpu::Float;
use gatefold::cuda::driver::{Driver, Recorder};
use gatefold::spec::{AttentionBlock, HfConfig, Layer};
use half::{bf16, f16};
#[cfg(feature = "cuda")]
use skip::skipped;
use std::path::Path;
use support::array::Array;
use support::layer::{Cache, LayerWeights, Rows};
use support::random::Maker;
use support::resident::DeviceLayer;
use support::simulator::Simulator;
use support::verify::{Subject, verify};

const TOKENS: usize = 6;
const STEPS: usize = 3;

/// A layer of a configuration in `tests`, its numbers changed where a row would be too narrow to show more than its luck.
fn layer(file: &str, number: usize, changes: &[(&str, usize)]) -> Layer {
    let path = format!("tests/{file}");
    // A test that was carried to another machine finds it where it is started.
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path));
    let text = text.or_else(|_| std::fs::read_to_string(&path)).expect("part of the repository");
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, value) in changes {
        json[name] = (*value).into();
    }
    HfConfig::from_json(&json.to_string()).unwrap().layer_for(number, TOKENS + STEPS).unwrap()
}

fn check<T: Float>(device: &dyn Recorder, name: &str, spec: &Layer) {
    let driver: &dyn Driver = device;
    let silent = |_: usize| {};
    let weights: LayerWeights<T> = Maker::new(3, &silent).layer(spec);
    let mut maker = Maker::new(4, &silent);
    let hidden = spec.hidden_size;
    let stream = device.create_stream().unwrap();
    // SAFETY: the stream is the device's, and destroyed behind the layer.
    let mut layer = unsafe { DeviceLayer::new(driver, stream, spec, &weights, TOKENS, TOKENS + STEPS).unwrap() };
    let verified = |layer: &mut DeviceLayer<'_, T>, before: &Cache<T>, n: usize, absorbed: bool| {
        let after = layer.cache().unwrap();
        let subject = Subject {
            spec,
            weights: &weights,
            level: "simulator",
            trace: &layer.trace().unwrap(),
            rows: &Rows::equal(1, n, before.lens[0] as usize),
            cache: &after,
            before,
            max_positions: TOKENS + STEPS,
            absorbed,
        };
        let lines = verify(&subject, &(0..n).collect::<Vec<_>>()).unwrap();
        for line in lines {
            assert!(line.share <= 1.0, "{name} {} {n} tokens: {line:?}", T::DTYPE);
        }
        after
    };

    let prompt: Array<T> = maker.array(&[TOKENS, hidden], 1.0);
    layer.begin(&prompt, 0, false).unwrap();
    let empty = layer.cache_of_len(0).unwrap();
    layer.step().unwrap();
    let mut cache = verified(&mut layer, &empty, TOKENS, false);

    let absorbed = matches!(spec.attention, AttentionBlock::Mla(_));
    let mut recording = None;
    for step in 0..STEPS {
        let x: Array<T> = maker.array(&[1, hidden], 1.0);
        layer.begin(&x, TOKENS + step, absorbed).unwrap();
        layer.step().unwrap();
        let queued = layer.output().unwrap();
        let recording = *recording.get_or_insert_with(|| layer.record(device).unwrap());
        layer.begin(&x, TOKENS + step, absorbed).unwrap();
        // SAFETY: the layer's arrays are alive, and nothing else runs on its stream.
        unsafe { device.replay(recording, stream).unwrap() };
        assert!(layer.output().unwrap() == queued, "{name}: a recorded step gives other numbers");
        cache = verified(&mut layer, &cache, 1, absorbed);
    }
    drop(layer);
    // SAFETY: made above, and nothing runs any more: outputs were read.
    unsafe {
        device.forget(recording.expect("there are steps")).unwrap();
        device.destroy_stream(stream).unwrap();
    }
}

fn on_devices(check: impl Fn(&dyn Recorder)) {
    // As tests/cuda: `GATEFOLD_SIMULATOR=0` leaves the simulator out.
    if std::env::var_os("GATEFOLD_SIMULATOR").is_none_or(|value| value != "0") {
        check(&Simulator::new(false));
    }
    #[cfg(feature = "cuda")]
    match gatefold::cuda::Device::open(0) {
        Ok(device) => check(&device),
        Err(error) => {
            assert!(std::env::var_os("GATEFOLD_REQUIRE_CUDA").is_none_or(|value| value != "1"), "{error}");
            skipped(format_args!("on a GPU: {error}"));
        }
    }
}

/// Norms of queries and keys, a mixture.
#[test]
fn qwen3_moe() {
    let spec = layer("checkpoints/qwen3_moe/config.json", 0, &[("head_dim", 128)]);
    on_devices(|device| {
        check::<f32>(device, "qwen3_moe", &spec);
        check::<bf16>(device, "qwen3_moe", &spec);
        check::<f16>(device, "qwen3_moe", &spec);
    });
}

/// Latent attention, expanded for the prompt and absorbed after it; a dense layer, and a mixture with groups and a shared expert.
#[test]
fn deepseek_v3() {
    let [dense, mixture] =
        [0, 1].map(|number| layer("checkpoints/deepseek_v3/config.json", number, &[("v_head_dim", 128)]));
    on_devices(|device| {
        check::<f32>(device, "deepseek_v3 dense", &dense);
        check::<bf16>(device, "deepseek_v3", &mixture);
    });
}

/// Sinks, a window, biases everywhere.
#[test]
fn gpt_oss() {
    let spec = layer("checkpoints/gpt_oss/config.json", 0, &[("head_dim", 128)]);
    on_devices(|device| check::<bf16>(device, "gpt_oss", &spec));
}

/// A gate on attention's output and on the shared expert; norms behind both parts, and a factor on what they add.
#[test]
fn qwen3_next() {
    let sizes = [
        ("hidden_size", 128),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 128),
        ("num_experts", 16),
        ("num_experts_per_tok", 3),
        ("moe_intermediate_size", 32),
        ("shared_expert_intermediate_size", 48),
    ];
    let mut spec = layer("configs/qwen3-next-80b-a3b.json", 3, &sizes);
    (spec.post_attention_norm, spec.post_mlp_norm, spec.residual_multiplier) = (true, true, 0.5);
    on_devices(|device| check::<bf16>(device, "qwen3_next", &spec));
}
