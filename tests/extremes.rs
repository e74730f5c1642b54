//! Sizes at the ends of their types: an error or an answer, never a panic, never an allocation that the data does not justify. With zero
//! tokens, shapes are free of memory, so that widths may be anything.

mod common;

use gatefold::args::*;
use gatefold::cpu::{self, Cpu, Level, PackedExperts};
use gatefold::spec::*;
use gatefold::{Result, View, ViewMut, reference};

const HUGE: [usize; 7] = [1, 3, 1 << 31, (1 << 32) + 2, 1 << 48, usize::MAX / 2 + 1, usize::MAX];

fn v<const N: usize>(shape: [usize; N]) -> View<'static, f32, N> {
    View::new(&[0.0; 8], shape)
}

fn m<const N: usize>(shape: [usize; N]) -> ViewMut<'static, f64, N> {
    ViewMut::new(&mut [], shape)
}

/// An error is a good answer; its message must not panic either.
fn any<T>(result: Result<T>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) => !error.to_string().is_empty(),
    }
}

#[test]
fn attention_of_any_width() {
    for a in HUGE {
        for b in HUGE {
            let mut spec = Attention::new(a, 1, b);
            spec.value_dim = a;
            for n in [0, 1, a] {
                let kv = Kv::ragged(v([n, 1, b]), v([n, 1, a]), None);
                let input = AttentionInput::<f32>::new(v([n, a, b]), kv);
                assert!(any(reference::attention(&spec, &input, AttentionOutput::with_lse(m([n, a, a]), m([n, a])))));
                let kv = Kv::paged(v([b, a, 1, b]), v([b, a, 1, a]), View::new(&[0], [1, n]), &[0]);
                let input = AttentionInput::<f32>::new(v([0, a, b]), kv);
                assert!(any(reference::attention(&spec, &input, AttentionOutput::new(m([0, a, a])))));
            }
            assert!(any(reference::merge(
                v([a, 0, b, a]),
                v([a, 0, b]),
                AttentionOutput::with_lse(m([0, b, a]), m([0, b]))
            )));
            assert!(any(reference::merge(v([a, b, a, 0]), v([a, b, a]), AttentionOutput::new(m([b, a, 0])))));
            assert!(any(reference::merge(v([0, b, a, 0]), v([0, b, a]), AttentionOutput::new(m([b, a, 0])))));
            let mla = Mla::new(a, b, a, b, a);
            if mla.validate().is_ok() {
                assert!(mla.head_dim() > 1 && mla.expanded().validate().is_ok());
            }
            let rows = a.wrapping_add(a);
            assert!(any(reference::mla_absorb_query(&mla, v([0, a, a]), v([a, rows, b]), m([0, a, b]))));
            assert!(any(reference::mla_project_value(&mla, v([0, a, b]), v([a, rows, b]), m([0, a, a]))));
        }
    }
}

#[test]
fn glue_of_any_width() {
    for a in HUGE {
        for b in HUGE {
            let norm = Norm::rms(1e-6);
            assert!(any(reference::norm::<f32, f32, 3>(&norm, v([a, b, 0]), None, None, m([a, b, 0]))));
            assert!(any(reference::norm::<f32, f32, 3>(&norm, v([0, a, b]), None, None, m([0, a, b]))));
            assert!(any(reference::add(v([a, 0]), v([a, 0]), 1.0, m([a, 0]))));
            assert!(any(reference::sigmoid_mul(v([0, a]), v([0, a]), m([0, a]))));
            assert!(any(reference::linear::<f32, f32, f32>(v([a, 0]), v([0, 0]), None, m([a, 0]))));
            assert!(any(reference::linear::<f32, f32, f32>(v([0, a]), v([b, a]), None, m([0, b]))));
            let mut prep = QkvPrep::new(a, b, a);
            prep.qk_norm = Some(QkNorm::Full);
            let mut input = QkvInput::<f32>::new(v([0, a, a]), v([0, b, a]), v([0, b, a]), &[]);
            input.q_norm = Some(&[1.0]);
            input.k_norm = Some(&[1.0]);
            let output = QkvOutput::new(m([0, a, a]), m([0, b, a]), m([0, b, a]));
            assert!(any(reference::prepare_qkv(&prep, &input, output)));
            let rope = Rope::new(RopeStyle::Half, b, 1e4);
            let table = RopeTable::new(v([0, b / 2]), v([0, b / 2]));
            assert!(any(reference::rope(&rope, v([0, a, b]), &[], &table, m([0, a, b]))));
            for (n, heads) in [(0, b), (a, 0)] {
                let input = KvCache::<f32>::new(v([n, heads, b]), v([n, heads, a]), None, &[u32::MAX]);
                let (k, w): (&mut [f32], &mut [f32]) = (&mut [], &mut []);
                let cache =
                    KvCacheMut::contiguous(ViewMut::new(k, [1, 3, heads, b]), ViewMut::new(w, [1, 3, heads, a]));
                assert!(any(reference::kv_append(&input, cache)));
            }
        }
    }
}

#[test]
fn experts_of_any_width() {
    for a in HUGE {
        for b in HUGE {
            let ffn = Ffn::gated(a, b, Activation::Silu);
            let weights = FfnWeights::<f32>::new(Some(v([b, a])), v([b, a]), v([a, b]));
            assert!(any(reference::mlp(&ffn, v([0, a]), &weights, m([0, a]))));
            let mut experts = ExpertFfn::new(a, ffn);
            experts.num_local_experts = 0;
            let none = ExpertWeights::<f32>::separate(Some(v([0, b, a])), v([0, b, a]), v([0, a, b]));
            let routing = Routing::<f32>::new(View::new(&[], [0, a]), v([0, a]));
            assert!(any(reference::expert_ffn(&experts, v([0, a]), &routing, &none, m([0, a]))));
            let weights = ExpertWeights::<f32>::halves(v([a, b, a]), v([a, a, b]));
            assert!(any(weights.check(&ExpertFfn::new(a, ffn))));
            let weights =
                ExpertWeights::<f32>::interleaved(View::with_strides(&[0.0], [a, b, a], [a, b, a]), v([a, a, b]));
            assert!(any(weights.check(&ExpertFfn::new(a, ffn))));

            for selection in [Selection::TopK, Selection::ExpertChoice, Selection::Sinkhorn { iterations: b }] {
                let mut router = Router::new(a, b);
                router.selection = selection;
                router.capacity = Some(Capacity::new(CapacityLimit::Factor(1e300)));
                router.aux_loss = Some(AuxLoss::TopK);
                let slots = router.slots();
                let (mut loss, mut dropped) = (0.0, 0);
                let mut output = RouteOutput::<f64>::new(ViewMut::new(&mut [], [0, slots]), m([0, slots]));
                (output.aux_loss, output.dropped) = (Some(&mut loss), Some(&mut dropped));
                assert!(any(reference::route(&router, &RouteInput::<f32>::new(v([0, a])), output)));
                assert!(any(reference::router_logits::<f32, f32, f32>(
                    &router,
                    v([0, b]),
                    v([a, b]),
                    None,
                    0,
                    m([0, a])
                )));
                let _ = (router.expert_choice_tokens(b), Capacity::new(CapacityLimit::Factor(1e300)).tokens(a, b, a));
            }
        }
    }
}

#[test]
fn linear_attention_of_any_width() {
    for a in HUGE {
        for b in HUGE {
            let spec = Retention::new(a, b, a);
            let input = RetentionInput::<f32>::new(v([0, a, b]), v([0, a, b]), v([0, a, a]), &[0.5]);
            assert!(any(reference::retention(&spec, &input, RetentionOutput::new(m([0, a, a])))));
            let input = WkvInput::<f32>::new(v([a, 0, 1]), v([a, 0, 1]), &[0.5], &[0.5]);
            assert!(any(reference::wkv(&input, WkvOutput::new(m([a, 0, 1])))));
        }
    }
}

#[test]
fn specifications_with_any_numbers() {
    for a in HUGE {
        for b in HUGE {
            let mask = Mask { causal: true, window_left: Some(a), window_right: Some(b), chunk: Some(a) };
            for position in [i64::MIN, -1, 0, 1, i64::MAX] {
                let range = mask.visible_range(position);
                assert_eq!(range.contains(&0), mask.visible(position, 0), "{mask:?} {position}");
                let _ = mask.visible(position, i64::MAX);
            }
            for both in [false, true] {
                let bias = RelativeBias::new(a, b, both);
                if bias.validate().is_ok() {
                    for distance in [i64::MIN, -5, 0, 5, i64::MAX] {
                        assert!(bias.bucket(distance) < a);
                    }
                }
            }
            let mut router = Router::new(a, b);
            router.groups = Some(ExpertGroups::new(b, a, GroupScore::Top2Sum));
            assert!(any(router.validate()));
            let mut experts = ExpertFfn::new(a, Ffn::gated(b, a, Activation::Silu));
            experts.first_expert = b;
            assert!(any(experts.validate()));
            for id in [i32::MIN, -1, 0, i32::MAX] {
                let _ = experts.local_expert(id);
            }
        }
    }
}

/// The same on the CPU backend, whose workspaces must not follow sizes without data.
#[test]
fn cpu_with_any_numbers() {
    fn o<const N: usize>(shape: [usize; N]) -> ViewMut<'static, f32, N> {
        ViewMut::new(&mut [], shape)
    }
    for level in [Level::available()[0], Level::best()] {
        let cpu = &mut Cpu::with_level(level);
        for a in HUGE {
            for b in HUGE {
                let mut spec = Attention::new(a, 1, b);
                spec.value_dim = a;
                for n in [0, a] {
                    let kv = Kv::ragged(v([n, 1, b]), v([n, 1, a]), None);
                    let input = AttentionInput::<f32>::new(v([n, a, b]), kv);
                    let output = AttentionOutput::with_lse(o([n, a, a]), o([n, a]));
                    assert!(any(cpu::attention(cpu, &spec, &input, output)));
                }
                let norm = Norm::rms(1e-6);
                assert!(any(cpu::norm::<f32, f32, 3>(cpu, &norm, v([a, b, 0]), None, None, o([a, b, 0]))));
                assert!(any(cpu::norm::<f32, f32, 3>(cpu, &norm, v([0, a, b]), None, None, o([0, a, b]))));
                assert!(any(cpu::add(cpu, v([a, 0]), v([a, 0]), 1.0, o([a, 0]))));
                assert!(any(cpu::sigmoid_mul(cpu, v([0, a]), v([0, a]), o([0, a]))));
                let mut prep = QkvPrep::new(a, b, a);
                prep.qk_norm = Some(QkNorm::Full);
                let mut input = QkvInput::<f32>::new(v([0, a, a]), v([0, b, a]), v([0, b, a]), &[]);
                input.q_norm = Some(&[1.0]);
                input.k_norm = Some(&[1.0]);
                let output = QkvOutput::new(o([0, a, a]), o([0, b, a]), o([0, b, a]));
                assert!(any(cpu::prepare_qkv(cpu, &prep, &input, output)));
                prep.qk_norm = None;
                let input = QkvInput::<f32>::new(v([0, a, a]), v([0, b, a]), v([0, b, a]), &[]);
                let output = QkvOutput::new(o([0, a, a]), o([0, b, a]), o([0, b, a]));
                assert!(any(cpu::prepare_qkv(cpu, &prep, &input, output)));
                let rope = Rope::new(RopeStyle::Half, b, 1e4);
                let table = RopeTable::new(v([0, b / 2]), v([0, b / 2]));
                assert!(any(cpu::rope(cpu, &rope, v([0, a, b]), &[], &table, o([0, a, b]))));
                for (n, heads) in [(0, b), (a, 0)] {
                    let input = KvCache::<f32>::new(v([n, heads, b]), v([n, heads, a]), None, &[u32::MAX]);
                    let cache = KvCacheMut::contiguous(o([1, 3, heads, b]), o([1, 3, heads, a]));
                    assert!(any(cpu::kv_append(cpu, &input, cache)));
                }
                for selection in [Selection::TopK, Selection::ExpertChoice, Selection::Sinkhorn { iterations: 2 }] {
                    let mut router = Router::new(a, b);
                    router.selection = selection;
                    router.capacity = Some(Capacity::new(CapacityLimit::Factor(1e300)));
                    router.aux_loss = Some(AuxLoss::TopK);
                    let slots = router.slots();
                    let mut loss = 0.0;
                    let mut output = RouteOutput::new(ViewMut::new(&mut [], [0, slots]), o([0, slots]));
                    output.aux_loss = Some(&mut loss);
                    assert!(any(cpu::route(cpu, &router, &RouteInput::new(v([0, a])), output)));
                }
                let spec = Retention::new(a, b, a);
                let input = RetentionInput::<f32>::new(v([0, a, b]), v([0, a, b]), v([0, a, a]), &[0.5]);
                assert!(any(cpu::retention(cpu, &spec, &input, RetentionOutput::new(o([0, a, a])))));
                let input = WkvInput::<f32>::new(v([a, 0, 1]), v([a, 0, 1]), &[0.5], &[0.5]);
                assert!(any(cpu::wkv(cpu, &input, WkvOutput::new(o([a, 0, 1])))));
                let ffn = Ffn::gated(a, b, Activation::Silu);
                let mut experts = ExpertFfn::new(a, ffn);
                experts.num_local_experts = 0;
                let none = ExpertWeights::<f32>::separate(Some(v([0, b, a])), v([0, b, a]), v([0, a, b]));
                if let Ok(packed) = PackedExperts::pack(&experts, &none) {
                    let routing = Routing::<f32>::new(View::new(&[], [0, a]), v([0, a]));
                    assert!(any(cpu::expert_ffn(cpu, &experts, v([0, a]), &routing, &packed, o([0, a]))));
                }
                let output = AttentionOutput::with_lse(o([0, b, a]), o([0, b]));
                assert!(any(cpu::merge(cpu, v([a, 0, b, a]), v([a, 0, b]), output)));
                let output = AttentionOutput::new(o([b, a, 0]));
                assert!(any(cpu::merge(cpu, v([0, b, a, 0]), v([0, b, a]), output)));
                assert!(any(cpu::PackedMla::pack(&Mla::new(a, b, a, b, a), v([a, a.wrapping_add(a), b]))));
                let weights = FfnWeights::<f32>::new(Some(v([b, a])), v([b, a]), v([a, b]));
                assert!(any(cpu::PackedFfn::pack(&ffn, &weights)));
                assert!(any(cpu::PackedLinear::pack(v([a, 0]))));
                assert!(any(cpu::PackedLinear::pack(v([0, a]))));
                assert!(any(cpu::PackedLinear::pack(v([a, b]))));
                assert!(cpu.workspace_bytes() < 1 << 20, "{} bytes for no token", cpu.workspace_bytes());
            }
        }
    }
}

/// What a call of so many tokens takes is told, or at least a number that no memory has.
#[test]
fn workspaces_of_any_size() {
    let moe = Moe::new(Router::new(2, 1), ExpertFfn::new(2, Ffn::gated(2, 2, Activation::Silu)));
    let experts = ExpertWeights::<f32>::separate(Some(v([2, 2, 2])), v([2, 2, 2]), v([2, 2, 2]));
    let mixture = cpu::PackedMoe::pack(&moe, &MoeWeights::<f32>::new(v([2, 2]), experts)).unwrap();
    let block = cpu::PackedFfn::pack(&moe.experts.ffn, &experts.expert(0)).unwrap();
    let linear = cpu::PackedLinear::pack(v([2, 2])).unwrap();
    let kv_b = cpu::PackedMla::pack(&Mla::new(1, 2, 1, 2, 1), v([1, 2, 2])).unwrap();
    for level in Level::available() {
        let cpu = &Cpu::with_level(level);
        for a in HUGE {
            let sizes = [
                cpu::linear_workspace_bytes::<f32>(cpu, &linear, a),
                cpu::mla_workspace_bytes::<f32>(cpu, &kv_b, a),
                cpu::mlp_workspace_bytes::<f32>(cpu, &block, a),
                cpu::moe_workspace_bytes::<f32>(cpu, &moe, &mixture, a),
                cpu::router_logits_workspace_bytes::<f32>(cpu, &moe.router, &linear, a),
                cpu::wkv_workspace_bytes(a),
            ];
            assert!(sizes.iter().all(|bytes| *bytes >= 4), "{sizes:?} for {a} at {level}");
            for b in HUGE {
                let mut router = Router::new(a, b);
                for selection in [Selection::TopK, Selection::ExpertChoice, Selection::Sinkhorn { iterations: 2 }] {
                    router.selection = selection;
                    router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
                    cpu::route_workspace_bytes(&router, b);
                }
                let mut prep = QkvPrep::new(a, b, a);
                prep.rope = Some(Rope::new(RopeStyle::Half, b, 1e4));
                cpu::prepare_qkv_workspace_bytes(&prep, b);
                cpu::rope_workspace_bytes([a, b, a]);
                cpu::retention_workspace_bytes(&Retention::new(a, b, a), b);
                cpu::expert_ffn_workspace_bytes::<f32>(cpu, mixture.experts(), a, b);
                assert!(cpu::merge_workspace_bytes(a, a, b) >= b);
                let wide = Moe::new(Router::new(a, 1), ExpertFfn::new(a, Ffn::gated(b, a, Activation::Silu)));
                assert!(cpu::PackedMoe::packed_bytes(&wide, gatefold::Dtype::F32, gatefold::Dtype::F32) >= a.max(b));
            }
        }
    }
}
