//! Options outside their range.

use super::Found;
use crate::with;
use gatefold::spec::*;

pub fn errors(found: &mut Found) {
    let nan = f64::NAN;
    let a = || Attention::new(4, 2, 8);
    for (name, spec) in [
        ("no heads", with!(a(), num_heads: 0)),
        ("no kv heads", with!(a(), num_kv_heads: 0)),
        ("no head_dim", with!(a(), head_dim: 0)),
        ("no value_dim", with!(a(), value_dim: 0)),
        ("heads that do not divide", with!(a(), num_kv_heads: 3)),
        ("scale 0", with!(a(), softmax_scale: 0.0)),
        ("scale NaN", with!(a(), softmax_scale: nan)),
        ("scale inf", with!(a(), softmax_scale: f64::INFINITY)),
        ("softcap", with!(a(), softcap: Some(-1.0))),
        ("chunk 0", with!(a(), mask: Mask { chunk: Some(0), ..Mask::default() })),
        ("few buckets", with!(a(), relative_bias: Some(RelativeBias::new(3, 100, true)))),
        ("few buckets, one way", with!(a(), relative_bias: Some(RelativeBias::new(1, 100, false)))),
        ("max_distance", with!(a(), relative_bias: Some(RelativeBias::new(32, 8, true)))),
    ] {
        found.add(&format!("Attention, {name}"), spec.validate());
    }
    let m = || Mla::new(2, 4, 6, 2, 8);
    for (name, spec) in [
        ("no heads", with!(m(), num_heads: 0)),
        ("no rank", with!(m(), kv_lora_rank: 0)),
        ("no nope_dim", with!(m(), nope_dim: 0)),
        ("no rope_dim", with!(m(), rope_dim: 0)),
        ("no value_dim", with!(m(), value_dim: 0)),
        ("no q rank", with!(m(), q_lora_rank: Some(0))),
        ("eps", with!(m(), latent_norm_eps: -1.0)),
    ] {
        found.add(&format!("Mla, {name}"), spec.validate());
    }
    found.add("Norm, eps", Norm::rms(-1e-6).validate());
    found.add("Norm, offset", with!(Norm::rms(0.0), weight_offset: nan).validate());
    found.add("Norm, bias", with!(Norm::rms(0.0), bias: true).validate());
    let q = || QkvPrep::new(2, 1, 4);
    for (name, spec) in [
        ("no heads", with!(q(), num_heads: 0)),
        ("no kv heads", with!(q(), num_kv_heads: 0)),
        ("no head_dim", with!(q(), head_dim: 0)),
        ("no value_dim", with!(q(), value_dim: 0)),
        ("layer norm", with!(q(), norm: Norm::layer(0.0))),
        ("clip", with!(q(), clip: Some(0.0))),
        ("wide rope", with!(q(), rope: Some(Rope::new(RopeStyle::Half, 6, 1e4)))),
        ("floor_scale", with!(q(), q_temperature: Some(QTemperature::new(0.0, 1.0)))),
        ("attn_scale", with!(q(), q_temperature: Some(QTemperature::new(1.0, nan)))),
    ] {
        found.add(&format!("QkvPrep, {name}"), spec.validate());
    }
    let r = || Rope::new(RopeStyle::Half, 4, 1e4);
    for (name, spec) in [
        ("no dims", with!(r(), rotary_dim: 0)),
        ("odd", with!(r(), rotary_dim: 3)),
        ("theta", with!(r(), theta: 0.0)),
        ("cos_sin_scale", with!(r(), cos_sin_scale: nan)),
        ("linear", with!(r(), scaling: RopeScaling::linear(0.0))),
        ("yarn factor", with!(r(), scaling: RopeScaling::yarn(-1.0, 64.0, 32.0, 1.0, true))),
        ("yarn position", with!(r(), scaling: RopeScaling::yarn(2.0, 0.0, 32.0, 1.0, true))),
        ("yarn fast", with!(r(), scaling: RopeScaling::yarn(2.0, 64.0, 0.0, 1.0, true))),
        ("yarn slow", with!(r(), scaling: RopeScaling::yarn(2.0, 64.0, 32.0, nan, true))),
        ("llama3 factor", with!(r(), scaling: RopeScaling::llama3(0.0, 1.0, 4.0, 64.0))),
        ("llama3 order", with!(r(), scaling: RopeScaling::llama3(8.0, 4.0, 1.0, 64.0))),
        ("longrope length", with!(r(), scaling: RopeScaling::long_rope(vec![1.0]))),
        ("longrope value", with!(r(), scaling: RopeScaling::long_rope(vec![1.0, 0.0]))),
        ("given length", with!(r(), scaling: RopeScaling::given(vec![1.0; 3]))),
        ("given value", with!(r(), scaling: RopeScaling::given(vec![1.0, nan]))),
    ] {
        found.add(&format!("Rope, {name}"), spec.validate(8));
    }
    let x = || Router::new(8, 2);
    let choice =
        || with!(x(), selection: Selection::ExpertChoice, capacity: Some(Capacity::new(CapacityLimit::Tokens(2))));
    let groups = |n, top, score| Some(ExpertGroups::new(n, top, score));
    let limit = |limit| Some(Capacity::new(limit));
    for (name, spec) in [
        ("no experts", with!(x(), num_experts: 0)),
        ("too many experts", with!(x(), num_experts: 1 << 31)),
        ("top_k 0", with!(x(), top_k: 0)),
        ("top_k", with!(x(), top_k: 9)),
        ("no groups", with!(x(), groups: groups(0, 1, GroupScore::Max))),
        ("groups", with!(x(), groups: groups(3, 1, GroupScore::Max))),
        ("top_groups 0", with!(x(), groups: groups(4, 0, GroupScore::Max))),
        ("top_groups", with!(x(), groups: groups(4, 5, GroupScore::Max))),
        ("groups of one", with!(x(), groups: groups(8, 4, GroupScore::Top2Sum))),
        ("top_k beyond groups", with!(x(), top_k: 5, groups: groups(4, 2, GroupScore::Max))),
        ("groups of prototypes", with!(x(), groups: groups(4, 2, GroupScore::Max), selection: Selection::Prototypes)),
        ("choice without capacity", with!(choice(), capacity: None)),
        (
            "choice in groups",
            with!(choice(), capacity: Some(with!(Capacity::new(CapacityLimit::Tokens(2)), group_len: Some(2)))),
        ),
        ("choice, softmax", with!(choice(), renormalize: Renormalize::Softmax)),
        ("sinkhorn", with!(x(), selection: Selection::Sinkhorn { iterations: 0 })),
        ("mixer eps", with!(x(), selection: Selection::SparseMixer { jitter_eps: -0.1 })),
        ("mixer top_k", with!(x(), top_k: 3, selection: Selection::SparseMixer { jitter_eps: 0.1 })),
        ("prototypes", with!(x(), top_k: 3, selection: Selection::Prototypes)),
        ("eps", with!(x(), renormalize: Renormalize::Sum { eps: -1.0, floor: 0.0 })),
        ("floor", with!(x(), renormalize: Renormalize::Sum { eps: 0.0, floor: nan })),
        ("scaling", with!(x(), scaling_factor: nan)),
        ("limit 0", with!(x(), capacity: limit(CapacityLimit::Tokens(0)))),
        ("factor", with!(x(), capacity: limit(CapacityLimit::Factor(0.0)))),
        ("group_len", with!(x(), capacity: Some(with!(Capacity::new(CapacityLimit::Tokens(1)), group_len: Some(0))))),
        ("second of one", with!(x(), top_k: 1, second_expert: SecondExpert::Random)),
        ("jitter", with!(x(), jitter: Some(1.0))),
        ("jitter NaN", with!(x(), jitter: Some(nan))),
        ("loss group", with!(x(), aux_loss: Some(AuxLoss::Switch { group_len: Some(0) }))),
    ] {
        found.add(&format!("Router, {name}"), spec.validate());
    }
    let f = || Ffn::gated(4, 6, Activation::Silu);
    let clamped = |alpha, limit| Activation::SwigluClamped { alpha, limit };
    for (name, spec) in [
        ("no hidden", with!(f(), hidden_size: 0)),
        ("no inner", with!(f(), intermediate_size: 0)),
        ("plain clamped", with!(f(), gated: false, activation: clamped(1.0, 1.0))),
        ("alpha", with!(f(), activation: clamped(nan, 1.0))),
        ("limit", with!(f(), activation: clamped(1.0, 0.0))),
    ] {
        found.add(&format!("Ffn, {name}"), spec.validate());
    }
    let e = || ExpertFfn::new(8, f());
    for (name, spec) in [
        ("block", with!(e(), ffn: with!(f(), hidden_size: 0))),
        ("no experts", with!(e(), num_experts: 0)),
        ("too many experts", with!(e(), num_experts: 1 << 31)),
        ("slice", with!(e(), first_expert: 3, num_local_experts: 6)),
        ("slice overflow", with!(e(), first_expert: usize::MAX)),
        ("int4 group", with!(e(), weight_format: WeightFormat::Int4 { group_size: 0 })),
        ("combine_scale", with!(e(), combine_scale: nan)),
    ] {
        found.add(&format!("ExpertFfn, {name}"), spec.validate());
    }
    let moe = || Moe::new(x(), e());
    found.add("Moe, router", with!(moe(), router: Router::new(8, 9)).validate());
    found.add("Moe, experts", with!(moe(), router: Router::new(7, 2)).validate());
    let shared = SharedExpert::new(with!(f(), hidden_size: 5));
    found.add("Moe, shared", with!(moe(), shared: Some(shared)).validate());
    let t = || Retention::new(2, 4, 4);
    for (name, spec) in [
        ("no heads", with!(t(), num_heads: 0)),
        ("no head_dim", with!(t(), head_dim: 0)),
        ("no value_dim", with!(t(), value_dim: 0)),
        ("scale", with!(t(), scale: nan)),
        ("chunk", with!(t(), form: RetentionForm::Chunkwise(0))),
    ] {
        found.add(&format!("Retention, {name}"), spec.validate());
    }
    let rope = Rope::new(RopeStyle::Half, 2, 1e4);
    let gqa = || AttentionBlock::Gqa(GqaBlock::new(a()));
    let layer = || Layer::new(4, Norm::default(), gqa(), Mlp::Dense(f()));
    let mla = MlaBlock::new(m(), rope.clone());
    for (name, spec) in [
        ("no hidden", with!(layer(), hidden_size: 0)),
        ("norm", with!(layer(), norm: Norm::rms(nan))),
        ("attention", with!(layer(), attention: AttentionBlock::Gqa(GqaBlock::new(with!(a(), num_heads: 0))))),
        ("clip", with!(layer(), attention: AttentionBlock::Gqa(with!(GqaBlock::new(a()), clip_qkv: Some(0.0))))),
        ("mla rope", with!(layer(), attention: AttentionBlock::Mla(with!(mla.clone(), mla: Mla::new(2, 4, 6, 4, 8))))),
        ("mla heads", with!(layer(), attention: AttentionBlock::Mla(with!(mla, attention: a())))),
        ("mlp", with!(layer(), hidden_size: 5)),
        ("moe", with!(layer(), mlp: Mlp::Moe(Box::new(with!(moe(), router: Router::new(7, 2)))))),
        ("multiplier", with!(layer(), residual_multiplier: nan)),
    ] {
        found.add(&format!("Layer, {name}"), spec.validate());
    }
}
