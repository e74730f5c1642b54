//! Offsets beyond 2^31 elements, on memory that is reserved but hardly touched: three rows, 1.2 * 2^30 elements apart.

#![cfg(target_pointer_width = "64")]

mod common;

use common::Rng;
use common::skip::skipped;
use gatefold::args::*;
use gatefold::cpu::{self, Cpu, Level};
use gatefold::spec::{Attention, Norm, Rope, RopeStyle, Router};
use gatefold::{View, ViewMut, reference};
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
