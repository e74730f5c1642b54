//! The simulator against the GPU, bit for bit: calls in which every instruction rounds correctly. The others are left out: attention,
//! experts and linear layers in 16 bits and products in TF32 run on tensor cores, whose sums have no documented order, and
//! functions of 16-bit results use `ex2.approx` and `rcp.approx`.

use super::group::SortCase;
use super::mixture_bits::routers;
use super::moe::{experts_of, mixture_of, options, with_shared};
use crate::common::attention_case::{DenseBias, KvLayout, Sinks};
use crate::common::glue_case::{AppendCase, NormCase, PairCase, QkvCase};
use crate::common::linear_case::{RetentionCase, WkvCase};
use crate::common::simulator::Simulator;
use crate::common::{AttentionCase, AttentionOptions, ExpertCase, Layout, MoeCase, Rng};
use crate::{is_simulated, on_gpu, staged};
use gatefold::Element;
use gatefold::cuda::driver::Driver;
use gatefold::cuda::kernels;
use gatefold::spec::{
    Activation, ExpertFfn, Ffn, Mask, Norm, QTemperature, QkNorm, QkvPrep, Retention, RetentionForm, Rope, RopeStyle,
};
use gatefold::{View, ViewMut};
use half::{bf16, f16};

/// A call with inputs of its own: what it writes, in digits that tell all numbers apart.
type Call = fn(&dyn Driver) -> String;

const CALLS: [(&str, Call); 17] = [
    ("linear", linear),
    ("experts", experts),
    ("mixtures", mixtures),
    ("group_tokens", group_tokens),
    ("attention of many queries", |driver| attention(driver, &[(70, 90), (33, 33)], KvLayout::Ragged)),
    ("attention of few queries", |driver| attention(driver, &[(1, 600), (2, 33)], KvLayout::Paged(16))),
    ("norm of f32", norm::<f32>),
    ("norm of bf16", norm::<bf16>),
    ("add and sigmoid_mul", pairs),
    ("prepare_qkv of f32", qkv::<f32>),
    ("prepare_qkv of bf16", qkv::<bf16>),
    ("kv_append of f32", append::<f32>),
    ("kv_append of f16", append::<f16>),
    ("retention of f32", retention::<f32>),
    ("retention of bf16", retention::<bf16>),
    ("wkv of f32", wkv::<f32>),
    ("wkv of bf16", wkv::<bf16>),
];

fn linear(driver: &dyn Driver) -> String {
    let mut rng = Rng::new(1);
    let (x, weight) = (rng.normals::<f32>(70 * 72, 1.0), rng.normals::<f32>(40 * 72, 1.0));
    let (bias, mut out) = (rng.normals::<f32>(40, 1.0), [0.0f32; 70 * 40]);
    let (x, weight) = (View::new(&x, [70, 72]), View::new(&weight, [40, 72]));
    staged::linear(driver, x, weight, Some(&bias), ViewMut::new(&mut out, [70, 40])).unwrap();
    format!("{out:?}")
}

fn experts(driver: &dyn Driver) -> String {
    let activations = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::GeluErf,
        Activation::ReluSquared,
        Activation::SwigluClamped { alpha: 1.7, limit: 7.0 },
    ];
    let call = |activation| {
        let ffn = Ffn::gated(40, 24, activation);
        experts_of(driver, &ExpertCase::<f32, f32>::new(&ExpertFfn::new(4, ffn), options(50, 2), 2))
    };
    format!("{:?}", activations.map(call))
}

fn mixtures(driver: &dyn Driver) -> String {
    let call = |(_, spec)| {
        let case = MoeCase::<f32, f32, f32>::new(&with_shared(spec), options(33, 2), 3).with_mask();
        mixture_of(driver, &case, None, true)
    };
    format!("{:?}", routers().into_iter().map(call).collect::<Vec<_>>())
}

fn group_tokens(driver: &dyn Driver) -> String {
    let case = |tokens| SortCase::random(&mut Rng::new(4), 24, 8, tokens).run(driver);
    format!("{:?}", [case(9), case(1000)])
}

fn attention(driver: &dyn Driver, lens: &[(usize, usize)], kv: KvLayout) -> String {
    let mut options = AttentionOptions::new((4, 2), 64, lens);
    (options.kv, options.mask, options.softcap) = (kv, Mask::causal(), Some(20.0));
    (options.bias, options.sinks) = (DenseBias::PerHead, Sinks::Finite);
    let case = AttentionCase::<f32>::new(&options, 5);
    let result = case.run::<f32, f32>(|spec, input, output| staged::attention(driver, spec, input, output));
    format!("{result:?}")
}

fn norm<T: Element>(driver: &dyn Driver) -> String {
    let call = |spec| {
        let case = NormCase::<T>::new(&spec, [5, 1, 520], Layout::Contiguous, true, 6);
        case.run::<T>(|spec, x, weight, bias, out| staged::norm(driver, spec, x, weight, bias, out))
    };
    format!("{:?}", [Norm::rms(1e-6), Norm::layer(1e-5)].map(call))
}

fn pairs(driver: &dyn Driver) -> String {
    let case = PairCase::<f32>::new([5, 129], Layout::Contiguous, 7);
    let sum = case.run::<f32>(|x, y, out| staged::add(driver, x, y, 0.22, out));
    let gated = case.run::<f32>(|x, y, out| staged::sigmoid_mul(driver, x, y, out));
    format!("{sum:?} {gated:?}")
}

fn qkv<T: Element>(driver: &dyn Driver) -> String {
    let call = |norm| {
        let mut spec = QkvPrep::new(4, 2, 64);
        (spec.qk_norm, spec.clip, spec.q_temperature) = (Some(norm), Some(2.0), Some(QTemperature::new(8.0, 0.1)));
        spec.rope = Some(Rope::new(RopeStyle::Half, 32, 1000.0));
        let case = QkvCase::<T>::new(&spec, 9, Layout::Contiguous, 8);
        case.run::<T>(|spec, input, out| staged::prepare_qkv(driver, spec, input, out))
    };
    format!("{:?}", [QkNorm::PerHead, QkNorm::Full, QkNorm::L2AfterRope].map(call))
}

fn append<T: Element>(driver: &dyn Driver) -> String {
    let case = AppendCase::<T>::new(3, [24, 16], true, Layout::Contiguous, 9);
    format!("{:?}", case.run(|input, cache| staged::kv_append(driver, input, cache)))
}

fn retention<T: Element>(driver: &dyn Driver) -> String {
    let call = |form| {
        let mut spec = Retention::new(2, 32, 48);
        spec.form = form;
        let case = RetentionCase::<T>::new(&spec, 33, Layout::Contiguous, true, 10);
        case.run::<T, f32>(|spec, input, output| staged::retention(driver, spec, input, output))
    };
    format!("{:?}", [RetentionForm::Parallel, RetentionForm::Recurrent, RetentionForm::Chunkwise(16)].map(call))
}

fn wkv<T: Element>(driver: &dyn Driver) -> String {
    let case = WkvCase::<T>::new([2, 23, 70], Layout::Contiguous, true, 11);
    format!("{:?}", case.run::<T, f32>(|input, output| staged::wkv(driver, input, output)))
}

/// Whether no instruction of a kernel leaves a choice to the hardware.
fn is_exact(entry: &str) -> bool {
    let kernel = kernels::ALL.iter().find(|kernel| kernel.entry == entry).unwrap();
    let mut code = kernel.ptx.lines().map(|line| line.split("//").next().unwrap_or_default());
    !code.any(|code| code.contains(".approx") || code.contains("mma."))
}

/// The same bits on both devices, which may be one that orders its warps otherwise each time.
fn check((name, call): &(&str, Call), simulator: &Simulator, other: &dyn Driver) {
    let bits = call(simulator);
    let launches = simulator.take_counters();
    assert!(!launches.is_empty(), "{name}");
    for (entry, _) in launches {
        assert!(is_exact(entry), "{name}: {entry} is not exact");
    }
    assert!(!bits.contains("NaN"), "{name}: a NaN has more than one pattern of bits");
    assert!(call(other) == bits, "{name}");
}

#[test]
fn the_simulator_gives_the_bits_of_the_gpu() {
    if is_simulated() {
        let simulator = Simulator::new(false);
        CALLS.iter().for_each(|call| check(call, &simulator, &simulator));
    }
    on_gpu(|gpu| {
        let simulator = Simulator::with_limits(false, gpu.limits());
        CALLS.iter().for_each(|call| check(call, &simulator, gpu));
    });
}
