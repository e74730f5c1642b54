//! What can be sent to and shared between threads: everything but what a driver forbids.

use gatefold::args::*;
use gatefold::cpu::{Cpu, Level, PackedLinear};
use gatefold::spec::*;
use gatefold::{Dtype, Error, View, ViewMut};
use half::bf16;

const fn both<T: Send + Sync + 'static>() {}

#[test]
fn send_and_sync() {
    both::<Error>();
    both::<Dtype>();
    both::<View<'static, bf16, 3>>();
    both::<ViewMut<'static, bf16, 3>>();
    both::<(Attention, Mask, RelativeBias, Mla, Rope, Norm, QkvPrep, QTemperature)>();
    both::<(Router, ExpertFfn, Ffn, Moe, SharedExpert, Layer, AttentionBlock, Mlp, Retention)>();
    both::<(AttentionInput<'static, bf16>, AttentionOutput<'static, bf16>, Kv<'static, bf16>)>();
    both::<(QkvInput<'static, bf16>, QkvOutput<'static, bf16>, RopeTable<'static>)>();
    both::<(KvCache<'static, bf16>, KvCacheMut<'static, bf16>)>();
    both::<(RouteInput<'static>, RouteOutput<'static>, Routing<'static>)>();
    both::<(ExpertWeights<'static, bf16>, FfnWeights<'static, bf16>, MoeWeights<'static, bf16>)>();
    both::<(MoeInput<'static, bf16>, MoeOutput<'static, bf16>)>();
    both::<(RetentionInput<'static, bf16>, RetentionOutput<'static, bf16>)>();
    both::<(WkvInput<'static, bf16>, WkvOutput<'static, bf16>)>();
    both::<(Cpu, Level, PackedLinear)>();
}

#[test]
#[cfg(feature = "cuda")]
fn send_and_sync_cuda() {
    use gatefold::cuda::*;
    both::<Device>();
    both::<(AttentionPlan, MergePlan, QkvPlan, RetentionPlan, WkvPlan, NormPlan, ElementwisePlan, GroupedGemmPlan)>();
    both::<(RouterLogitsPlan, RoutePlan, GroupTokensPlan, MlpPlan, ExpertFfnPlan, CombinePlan, MoePlan)>();
    let exports = include_str!("../src/cuda.rs").split("pub use ").skip(1);
    let names = exports.flat_map(|list| list.split(['{', '}', ',', ';', ' '])).map(str::trim);
    for plan in names.filter(|name| name.ends_with("Plan")) {
        let named = |text: &str| text.split(['(', ',', ' ', ')']).any(|word| word == plan);
        assert!(named(include_str!("send_sync.rs")), "{plan} is not named here");
    }
}
