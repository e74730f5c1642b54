//! Offsets beyond 2^31 elements, on memory that is reserved but hardly touched: three rows, 1.2 * 2^30 elements apart.

#![cfg(target_pointer_width = "64")]

mod common;

use common::Rng;
use common::skip::skipped;
use gatefold::args::*;
use gatefold::cpu::{self, Cpu, Level};
use gatefold::spec::{Activation, Attention, ExpertFfn, Ffn, Moe, Norm, Rope, RopeStyle, Router, SharedExpert};
use gatefold::{Dtype, View, ViewMut, reference};
use half::bf16;
use std::sync::Mutex;

/// Elements between the rows; odd, so that nothing is aligned.
const STRIDE: usize = 1_288_490_189;

/// One large mapping at a time.
static ONE: Mutex<()> = Mutex::new(());

/// Room for 3 rows of up to 4096 elements: 5 GiB of zeros, of which the system gives pages as they are touched.
fn with_room(test: impl FnOnce(&mut [bf16])) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let len = 2 * STRIDE + 4096;
    if Vec::<u16>::new().try_reserve_exact(len).is_err() {
        skipped("no address space for 5 GiB");
        return;
    }
    // Zeroed by the system, page by page: `vec![0; n]` asks for zeroed memory instead of writing it.
    let mut room = vec![0u16; len];
    test(bytemuck::cast_slice_mut(&mut room));
}

fn fill(room: &mut [bf16], row: usize, values: &[bf16]) {
    room[row * STRIDE..row * STRIDE + values.len()].copy_from_slice(values);
}

fn rows(room: &[bf16], width: usize) -> Vec<bf16> {
    (0..3).flat_map(|r| room[r * STRIDE..][..width].to_vec()).collect()
}

/// Three rows of normal numbers; the same, contiguous.
fn random(room: &mut [bf16], width: usize) -> Vec<bf16> {
    let mut rng = Rng::new(3);
    for row in 0..3 {
        let values = rng.normals(width, 1.0);
        fill(room, row, &values);
    }
    rows(room, width)
}

fn levels(mut test: impl FnMut(&mut Cpu)) {
    for level in Level::available() {
        test(&mut Cpu::with_level(level));
    }
}

#[test]
fn inputs_of_rows() {
    with_room(|room| {
        let near = random(room, 64);
        let (far, near) = (View::with_strides(room, [3, 64], [STRIDE, 1]), View::new(&near, [3, 64]));
        let spec = Norm::rms(1e-6);
        let run = |x| {
            let mut out = [0.0; 192];
            reference::norm::<_, f32, 2>(&spec, x, None, None, ViewMut::new(&mut out, [3, 64])).unwrap();
            out
        };
        assert_eq!(run(far), run(near));
        levels(|cpu| {
            let mut run = |x| {
                let mut out = [0.0f32; 192];
                cpu::norm(cpu, &spec, x, None, None, ViewMut::new(&mut out, [3, 64])).unwrap();
                out
            };
            assert_eq!(run(far), run(near));
        });
        let weight: Vec<bf16> = Rng::new(4).normals(32 * 64, 0.2);
        let packed = cpu::PackedLinear::pack(View::new(&weight, [32, 64])).unwrap();
        levels(|cpu| {
            let mut run = |x| {
                let mut out = [0.0f32; 96];
                cpu::linear(cpu, x, &packed, None, ViewMut::new(&mut out, [3, 32])).unwrap();
                out
            };
            assert_eq!(run(far), run(near));
        });
    });
}

#[test]
fn weights() {
    with_room(|room| {
        let near = random(room, 64);
        let x: Vec<bf16> = Rng::new(5).normals(2 * 64, 1.0);
        let far = cpu::PackedLinear::pack(View::with_strides(room, [3, 64], [STRIDE, 1])).unwrap();
        let near = cpu::PackedLinear::pack(View::new(&near, [3, 64])).unwrap();
        levels(|cpu| {
            let mut run = |w| {
                let mut out = [0.0f32; 6];
                cpu::linear(cpu, View::new(&x, [2, 64]), w, None, ViewMut::new(&mut out, [2, 3])).unwrap();
                out
            };
            assert_eq!(run(&far), run(&near));
        });
    });
}

#[test]
fn outputs_of_rows() {
    let x: Vec<bf16> = Rng::new(6).normals(3 * 64, 1.0);
    let x = View::new(&x, [3, 64]);
    levels(|cpu| {
        let mut near = [bf16::ZERO; 192];
        cpu::norm(cpu, &Norm::rms(1e-6), x, None, None, ViewMut::new(&mut near, [3, 64])).unwrap();
        with_room(|room| {
            let out = ViewMut::with_strides(room, [3, 64], [STRIDE, 1]);
            cpu::norm(cpu, &Norm::rms(1e-6), x, None, None, out).unwrap();
            assert_eq!(rows(room, 64), near);
        });
    });
}

#[test]
fn rotation() {
    with_room(|room| {
        let near = random(room, 2 * 16);
        let rope = Rope::new(RopeStyle::Half, 16, 1e4);
        let (cos, sin) = rope.table(8);
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            (cos.iter().map(|x| *x as f32).collect(), sin.iter().map(|x| *x as f32).collect());
        let table = RopeTable::new(View::new(&cos, [8, 8]), View::new(&sin, [8, 8]));
        let far = View::with_strides(room, [3, 2, 16], [STRIDE, 16, 1]);
        let near = View::new(&near, [3, 2, 16]);
        levels(|cpu| {
            let mut run = |x| {
                let mut out = [bf16::ZERO; 96];
                cpu::rope(cpu, &rope, x, &[1, 5, 7], &table, ViewMut::new(&mut out, [3, 2, 16])).unwrap();
                out
            };
            assert_eq!(run(far), run(near));
        });
    });
}

/// One query each for two sequences, over pages of 4 rows.
fn paged<'a>(q: &'a [bf16], kv: View<'a, bf16, 4>) -> AttentionInput<'a, bf16> {
    let table = View::new(&[2, 0, 1, 1, 2, 0], [2, 3]);
    let mut input = AttentionInput::new(View::new(q, [2, 4, 16]), Kv::paged(kv, kv, table, &[11, 9]));
    input.cu_seqlens_q = Some(&[0, 1, 2]);
    input
}

/// Pages of a cache: the third lies beyond 2^31 elements.
#[test]
fn pages() {
    with_room(|room| {
        let near = random(room, 4 * 2 * 16);
        let far = View::with_strides(room, [3, 4, 2, 16], [STRIDE, 32, 16, 1]);
        let near = View::new(&near, [3, 4, 2, 16]);
        let q: Vec<bf16> = Rng::new(7).normals(2 * 4 * 16, 1.0);
        let spec = Attention::causal(4, 2, 16);
        let truth = |kv| {
            let mut out = [0.0; 128];
            let output = AttentionOutput::new(ViewMut::new(&mut out, [2, 4, 16]));
            reference::attention(&spec, &paged(&q, kv), output).unwrap();
            out
        };
        assert_eq!(truth(far), truth(near));
        levels(|cpu| {
            let mut run = |kv| {
                let mut out = [bf16::ZERO; 128];
                let output = AttentionOutput::new(ViewMut::new(&mut out, [2, 4, 16]));
                cpu::attention(cpu, &spec, &paged(&q, kv), output).unwrap();
                out
            };
            assert_eq!(run(far), run(near));
        });
    });
}

/// Rows of keys far from one another, in a cache that is one sequence's.
#[test]
fn rows_of_a_cache() {
    with_room(|room| {
        let near = random(room, 32);
        let far = View::with_strides(room, [1, 3, 2, 16], [1, STRIDE, 16, 1]);
        let near = View::new(&near, [1, 3, 2, 16]);
        let q: Vec<bf16> = Rng::new(7).normals(4 * 16, 1.0);
        let spec = Attention::causal(4, 2, 16);
        levels(|cpu| {
            let mut run = |kv| {
                let mut out = [bf16::ZERO; 64];
                let output = AttentionOutput::new(ViewMut::new(&mut out, [1, 4, 16]));
                let input = AttentionInput::new(View::new(&q, [1, 4, 16]), Kv::cache(kv, kv, &[3]));
                cpu::attention(cpu, &spec, &input, output).unwrap();
                out
            };
            assert_eq!(run(far), run(near));
        });
    });
}

#[test]
fn append() {
    let new: Vec<bf16> = Rng::new(8).normals(5 * 2 * 16, 1.0);
    let new = View::new(&new, [5, 2, 16]);
    let table = View::new(&[2, 0, 1, 9], [2, 2]);
    let input = KvCache::new(new, new, Some(&[0, 3, 5]), &[2, 1]);
    let mut near = vec![bf16::ZERO; 3 * 128];
    let mut values = near.clone();
    let (k, v) = (ViewMut::new(&mut near, [3, 4, 2, 16]), ViewMut::new(&mut values, [3, 4, 2, 16]));
    reference::kv_append(&input, KvCacheMut::paged(k, v, table)).unwrap();
    with_room(|room| {
        levels(|cpu| {
            let mut values = vec![bf16::ZERO; 3 * 128];
            let k = ViewMut::with_strides(room, [3, 4, 2, 16], [STRIDE, 32, 16, 1]);
            let v = ViewMut::new(&mut values, [3, 4, 2, 16]);
            cpu::kv_append(cpu, &input, KvCacheMut::paged(k, v, table)).unwrap();
            assert_eq!(rows(room, 128), near);
            (0..3).for_each(|row| fill(room, row, &[bf16::ZERO; 128]));
        });
    });
}

/// Logits of three tokens, in f32 by twice the stride in bytes: the third row begins beyond 2^32 bytes.
#[test]
fn logits() {
    with_room(|room| {
        let half = STRIDE / 2;
        let (head, floats, tail) = bytemuck::pod_align_to_mut::<bf16, f32>(room);
        assert!(head.is_empty() && tail.len() < 2);
        let near: Vec<f32> = Rng::new(9).normals(3 * 8, 2.0);
        for row in 0..3 {
            floats[row * half..row * half + 8].copy_from_slice(&near[row * 8..][..8]);
        }
        let far = View::with_strides(floats, [3, 8], [half, 1]);
        let router = Router::new(8, 2);
        levels(|cpu| {
            let mut run = |logits| {
                let (mut ids, mut weights) = ([0; 6], [0.0f32; 6]);
                let output = RouteOutput::new(ViewMut::new(&mut ids, [3, 2]), ViewMut::new(&mut weights, [3, 2]));
                cpu::route(cpu, &router, &RouteInput::new(logits), output).unwrap();
                (ids, weights)
            };
            assert_eq!(run(far), run(View::new(&near, [3, 8])));
        });
    });
}

/// Three experts of 24 x 16, each in a row of the room; gate and up in one array.
fn experts(room: &[bf16], stride: usize) -> ExpertWeights<'_, bf16> {
    let gate_up = View::with_strides(room, [3, 32, 24], [stride, 24, 1]);
    ExpertWeights::halves(gate_up, View::with_strides(&room[768..], [3, 24, 16], [stride, 16, 1]))
}

/// Experts that lie beyond 2^31 elements, in arrays that are read as they are and in arrays that are packed; in a mixture the
/// router's rows lie there too.
#[test]
fn weights_of_experts() {
    let x: Vec<bf16> = Rng::new(10).normals(5 * 24, 1.0);
    let x = View::new(&x, [5, 24]);
    let (ids, topk_weights) = ([0, 2, 1, 0, 2, 1, 2, -1, 1, 2], [0.5f32; 10]);
    let routing = Routing::new(View::new(&ids, [5, 2]), View::new(&topk_weights, [5, 2]));
    let spec = ExpertFfn::new(3, Ffn::gated(24, 16, Activation::Silu));
    let mut mixture = Moe::new(Router::new(3, 2), spec);
    mixture.shared = Some(SharedExpert::new(spec.ffn));
    with_room(|room| {
        let near = random(room, 1200);
        let truth = |weights: &ExpertWeights<'_, bf16>| {
            let mut out = [0.0; 120];
            reference::expert_ffn(&spec, x, &routing, weights, ViewMut::new(&mut out, [5, 24])).unwrap();
            out
        };
        let (far, near) = ((&*room, STRIDE), (near.as_slice(), 1200));
        assert_eq!(truth(&experts(far.0, far.1)), truth(&experts(near.0, near.1)));
        let packed = [far, near].map(|(room, stride)| {
            let experts = experts(room, stride);
            let mut weights = MoeWeights::<bf16>::new(View::with_strides(&room[1160..], [3, 24], [stride, 1]), experts);
            weights.shared = Some(experts.expert(2));
            cpu::PackedMoe::pack(&mixture, &weights).unwrap()
        });
        levels(|cpu| {
            let [far, near] = packed.each_ref().map(|packed| {
                let mut out = [[0.0f32; 120]; 2];
                let view = ViewMut::new(&mut out[0], [5, 24]);
                cpu::expert_ffn(cpu, &spec, x, &routing, packed.experts(), view).unwrap();
                let output = MoeOutput::new(ViewMut::new(&mut out[1], [5, 24]));
                cpu::moe(cpu, &mixture, &MoeInput::new(x), packed, output).unwrap();
                out
            });
            assert_eq!(far, near);
            assert_ne!(far[0], far[1]);
        });
    });
}

/// Tokens, their experts and their results in rows far from one another.
#[test]
fn tokens_of_experts() {
    let weights: Vec<bf16> = Rng::new(11).normals(3 * 1152, 0.2);
    let mut mixture = Moe::new(Router::new(3, 2), ExpertFfn::new(3, Ffn::gated(24, 16, Activation::Silu)));
    mixture.shared = Some(SharedExpert::new(mixture.experts.ffn));
    let router: Vec<bf16> = Rng::new(12).normals(3 * 24, 1.0);
    let experts = experts(&weights, 1152);
    let mut all = MoeWeights::<bf16>::new(View::new(&router, [3, 24]), experts);
    all.shared = Some(experts.expert(1));
    let packed = cpu::PackedMoe::pack(&mixture, &all).unwrap();
    with_room(|room| {
        let x = random(room, 24);
        levels(|cpu| {
            let mut near = [bf16::ZERO; 72];
            let output = MoeOutput::new(ViewMut::new(&mut near, [3, 24]));
            cpu::moe(cpu, &mixture, &MoeInput::new(View::new(&x, [3, 24])), &packed, output).unwrap();
            let mut far = [bf16::ZERO; 72];
            let hidden = View::with_strides(room, [3, 24], [STRIDE, 1]);
            let output = MoeOutput::new(ViewMut::new(&mut far, [3, 24]));
            cpu::moe(cpu, &mixture, &MoeInput::new(hidden), &packed, output).unwrap();
            assert_eq!(far, near);
            let output = MoeOutput::new(ViewMut::with_strides(&mut room[100..], [3, 24], [STRIDE, 1]));
            cpu::moe(cpu, &mixture, &MoeInput::new(View::new(&x, [3, 24])), &packed, output).unwrap();
            assert_eq!(rows(&room[100..], 24), near);
        });
    });
}

/// Sizes of packed weights, which are where experts are found: DeepSeek-V3's have 11 * 2^30 values a layer.
#[test]
fn sizes_of_packed_experts() {
    let bytes = |experts, hidden, inter, dtype| {
        cpu::PackedExperts::packed_bytes(&ExpertFfn::new(experts, Ffn::gated(hidden, inter, Activation::Silu)), dtype)
    };
    assert_eq!(bytes(256, 7168, 2048, Dtype::BF16), 256 * 3 * 7168 * 2048 * 2);
    assert_eq!(bytes(256, 7168, 2048, Dtype::F32), 256 * 3 * 7168 * 2048 * 4);
    // One expert, one matrix, one row beyond 2^31 values.
    assert_eq!(bytes(1, 1 << 17, 1 << 15, Dtype::BF16), 3 << 33);
    assert_eq!(cpu::PackedLinear::packed_bytes(32, 1 << 32, Dtype::BF16), 1 << 38);
    assert_eq!(bytes(1 << 20, 1 << 20, 1 << 20, Dtype::F16), 3 << 61);
    assert_eq!(bytes(1 << 30, 1 << 20, 1 << 20, Dtype::F16), usize::MAX);
}
