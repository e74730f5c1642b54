//! One small call of every CPU function on arrays that are no longer than they must be, for valgrind: an access beyond their ends is an
//! error there (`.ci/run memcheck`). Widths are odd, so that every vector loop has a rest.
//!
//! The level is the best one that `GATEFOLD_CPU_LEVEL` allows. Run as a plain test, this checks that every element of an output
//! is written.

mod common;

use common::Rng;
use gatefold::args::*;
use gatefold::cpu::{self, Cpu, Float};
use gatefold::spec::*;
use gatefold::{Element, View, ViewMut};
use half::bf16;

/// An input: exactly `len` elements.
fn x<T: Element>(len: usize) -> Box<[T]> {
    Rng::new(len as u64).normals(len, 0.5).into()
}

/// An output of exactly `N` dimensions' elements; afterwards none is what it was.
fn written<T: bytemuck::Pod, const N: usize>(what: &str, shape: [usize; N], write: impl FnOnce(ViewMut<'_, T, N>)) {
    let mut guard = T::zeroed();
    bytemuck::bytes_of_mut(&mut guard).fill(0xa5);
    let mut out: Box<[T]> = vec![guard; shape.iter().product()].into();
    write(ViewMut::new(&mut out, shape));
    let untouched = out.iter().filter(|x| bytemuck::bytes_of(*x) == bytemuck::bytes_of(&guard)).count();
    assert_eq!(untouched, 0, "{what}: elements of {shape:?} that nobody wrote");
}

fn v<T, const N: usize>(data: &[T], shape: [usize; N]) -> View<'_, T, N> {
    assert_eq!(data.len(), shape.iter().product::<usize>());
    View::new(data, shape)
}

fn attention<T: Float>(cpu: &mut Cpu) {
    // Two prompts of 5 and 9 tokens with 7 and 9 keys; everything that can be added to the scores.
    let (heads, kv_heads, dim, value_dim, n, rows) = (3, 1, 19, 13, 14, 16);
    let mut spec = Attention::causal(heads, kv_heads, dim);
    (spec.value_dim, spec.softcap, spec.sinks, spec.mask.window_left) = (value_dim, Some(9.0), true, Some(6));
    let (q, k, values) = (x::<T>(n * heads * dim), x::<T>(rows * dim), x::<T>(rows * value_dim));
    let (bias, mask, sinks) = (x::<f32>(2 * heads * 9 * 9), vec![1u8; 2 * 9 * 9], x::<f32>(heads));
    let kv = Kv::ragged(v(&k, [rows, 1, dim]), v(&values, [rows, 1, value_dim]), Some(&[0, 7, 16]));
    let mut input = AttentionInput::new(v(&q, [n, heads, dim]), kv);
    input.cu_seqlens_q = Some(&[0, 5, 14]);
    (input.sinks, input.bias) = (Some(&sinks[..]), Some(v(&bias, [2, heads, 9, 9])));
    input.mask = Some(v(&mask, [2, 1, 9, 9]));
    written::<T, 3>("attention", [n, heads, value_dim], |out| {
        written("lse", [n, heads], |lse| {
            cpu::attention(cpu, &spec, &input, AttentionOutput::with_lse(out, lse)).unwrap();
        });
    });

    // Decode from pages of 5 rows.
    let spec = Attention::causal(heads, kv_heads, dim);
    let (q, pages) = (x::<T>(2 * heads * dim), x::<T>(5 * 5 * dim));
    let (pages, table) = (v(&pages, [5, 5, 1, dim]), [4, 0, 2, 1, 3, 0]);
    let kv = Kv::paged(pages, pages, v(&table, [2, 3]), &[11, 6]);
    let mut input = AttentionInput::new(v(&q, [2, heads, dim]), kv);
    input.cu_seqlens_q = Some(&[0, 1, 2]);
    written::<T, 3>("attention", [2, heads, dim], |out| {
        cpu::attention(cpu, &spec, &input, AttentionOutput::new(out)).unwrap();
    });

    let (outs, lses) = (x::<T>(2 * n * heads * dim), x::<f32>(2 * n * heads));
    written::<T, 3>("merge", [n, heads, dim], |out| {
        written("lse", [n, heads], |lse| {
            let (outs, lses) = (v(&outs, [2, n, heads, dim]), v(&lses, [2, n, heads]));
            cpu::merge(cpu, outs, lses, AttentionOutput::with_lse(out, lse)).unwrap();
        });
    });

    let spec = Mla::new(heads, 21, 7, 4, 11);
    let kv_b = x::<T>(heads * 18 * 21);
    let kv_b = cpu::PackedMla::pack(&spec, v(&kv_b, [heads, 18, 21])).unwrap();
    for n in [1, 13] {
        let (q, latent) = (x::<T>(n * heads * 7), x::<T>(n * heads * 21));
        written("mla_absorb_query", [n, heads, 21], |out| {
            cpu::mla_absorb_query(cpu, &spec, v(&q, [n, heads, 7]), &kv_b, out).unwrap();
        });
        written("mla_project_value", [n, heads, 11], |out| {
            cpu::mla_project_value(cpu, &spec, v(&latent, [n, heads, 21]), &kv_b, out).unwrap();
        });
    }
}

fn linear_attention<T: Float>(cpu: &mut Cpu) {
    let (n, heads, dim, value_dim) = (7, 2, 9, 21);
    let (q, values) = (x::<T>(n * heads * dim), x::<T>(n * heads * value_dim));
    let state = x::<f32>(heads * dim * value_dim);
    for form in [RetentionForm::Parallel, RetentionForm::Recurrent, RetentionForm::Chunkwise(3)] {
        let mut spec = Retention::new(heads, dim, value_dim);
        spec.form = form;
        let q = v(&q, [n, heads, dim]);
        let mut input = RetentionInput::new(q, q, v(&values, [n, heads, value_dim]), &[0.9, 0.7]);
        input.state_in = Some(v(&state, [heads, dim, value_dim]));
        written::<T, 3>("retention", [n, heads, value_dim], |out| {
            written("state_out", [heads, dim, value_dim], |state| {
                cpu::retention(cpu, &spec, &input, RetentionOutput::with_state(out, state)).unwrap();
            });
        });
    }
    let (k, side) = (x::<T>(2 * 3 * 45), x::<f32>(45));
    let input = WkvInput::new(v(&k, [2, 3, 45]), v(&k, [2, 3, 45]), &side, &side);
    written::<T, 3>("wkv", [2, 3, 45], |out| {
        written("state_out", [3, 2, 45], |state| {
            cpu::wkv(cpu, &input, WkvOutput::with_state(out, state)).unwrap();
        });
    });
}

fn glue<T: Float>(cpu: &mut Cpu) {
    let (n, heads, dim) = (5, 3, 14);
    let width = heads * dim;
    let (rows, side) = (x::<T>(n * width), x::<f32>(width));
    let flat = v(&rows, [n, width]);
    for mut spec in [Norm::rms(1e-6), Norm::layer(1e-6)] {
        spec.bias = spec.kind == NormKind::Layer;
        written::<T, 2>("norm", [n, width], |out| {
            let bias = spec.bias.then_some(&side[..]);
            cpu::norm(cpu, &spec, flat, Some(&side), bias, out).unwrap();
        });
    }
    written::<T, 2>("add", [n, width], |out| cpu::add(cpu, flat, flat, 0.5, out).unwrap());
    written::<T, 2>("sigmoid_mul", [n, width], |out| cpu::sigmoid_mul(cpu, flat, flat, out).unwrap());

    let heads_of = v(&rows, [n, heads, dim]);
    let (angles, positions) = (x::<f32>(8 * 5), [0, 7, 3, 3, 6]);
    let table = RopeTable::new(v(&angles, [8, 5]), v(&angles, [8, 5]));
    for style in [RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf] {
        let rope = Rope::new(style, 10, 1e4);
        written("rope", [n, heads, dim], |out| cpu::rope(cpu, &rope, heads_of, &positions, &table, out).unwrap());
        let mut spec = QkvPrep::new(heads, heads, dim);
        (spec.qk_norm, spec.clip, spec.rope) = (Some(QkNorm::PerHead), Some(0.8), Some(rope));
        let mut input = QkvInput::new(heads_of, heads_of, heads_of, &positions);
        (input.q_norm, input.k_norm, input.rope) = (Some(&side[..dim]), Some(&side[..dim]), Some(table));
        let shape = [n, heads, dim];
        written("q", shape, |q| {
            written("k", shape, |k| {
                written("v", shape, |v| cpu::prepare_qkv(cpu, &spec, &input, QkvOutput::new(q, k, v)).unwrap());
            });
        });
    }
    let input = KvCache::new(heads_of, heads_of, None, &[0]);
    written("kv_append", [1, n, heads, dim], |k| {
        written("kv_append", [1, n, heads, dim], |v| {
            cpu::kv_append(cpu, &input, KvCacheMut::contiguous(k, v)).unwrap();
        });
    });

    let weight = x::<T>(35 * width);
    let linear = cpu::PackedLinear::pack(v(&weight, [35, width])).unwrap();
    let per_head = cpu::PackedLinear::pack_heads(v(&weight, [heads, 35, dim])).unwrap();
    for n in [1, 5] {
        let x = &rows[rows.len() - n * width..];
        written::<T, 2>("linear", [n, 35], |out| {
            cpu::linear(cpu, v(x, [n, width]), &linear, Some(&side[..35]), out).unwrap();
        });
        written::<T, 3>("linear_heads", [n, heads, 35], |out| {
            cpu::linear_heads(cpu, v(x, [n, heads, dim]), &per_head, out).unwrap();
        });
    }
}

fn routers(cpu: &mut Cpu) {
    let n = 9;
    let mut specs =
        vec![Router::new(21, 3), Router::new(6, 2), Router::new(6, 2), Router::new(6, 2), Router::new(6, 2)];
    specs[0].groups = Some(ExpertGroups::new(7, 2, GroupScore::Top2Sum));
    (specs[1].capacity, specs[1].aux_loss) =
        (Some(Capacity::new(CapacityLimit::Factor(1.0))), Some(AuxLoss::Switch { group_len: Some(4) }));
    (specs[2].capacity, specs[2].selection) =
        (Some(Capacity::new(CapacityLimit::Factor(1.0))), Selection::ExpertChoice);
    specs[3].selection = Selection::Sinkhorn { iterations: 2 };
    specs[4].selection = Selection::SparseMixer { jitter_eps: 0.1 };
    for spec in specs {
        let logits = x::<f32>(n * spec.num_experts);
        let bias = x::<f32>(spec.num_experts);
        let mut input = RouteInput::new(v(&logits, [n, spec.num_experts]));
        input.selection_bias = (spec.selection == Selection::TopK).then_some(&bias);
        written("topk_ids", [n, spec.slots()], |ids| {
            written("topk_weights", [n, spec.slots()], |weights| {
                let (mut counts, mut loss) = (vec![0; spec.num_experts], 0.0);
                let mut output = RouteOutput::new(ids, weights);
                (output.tokens_per_expert, output.z_loss) = (Some(&mut counts[..]), Some(&mut loss));
                cpu::route(cpu, &spec, &input, output).unwrap();
            });
        });
    }
}

fn experts<T: Float>(cpu: &mut Cpu) {
    let (hidden, inter, num_experts) = (37, 19, 5);
    let mut ffn = Ffn::gated(hidden, inter, Activation::Silu);
    (ffn.up_bias, ffn.down_bias) = (true, true);
    let mut shared = SharedExpert::new(Ffn::plain(hidden, 7, Activation::GeluErf));
    shared.sigmoid_gate = true;
    let mut spec = Moe::new(Router::new(num_experts, 2), ExpertFfn::new(num_experts, ffn));
    (spec.router_bias, spec.selection_bias, spec.router.jitter, spec.shared) = (true, true, Some(0.1), Some(shared));
    let (up, down) = (x::<T>(num_experts * inter * hidden), x::<T>(num_experts * hidden * inter));
    let (up_bias, down_bias) = (x::<f32>(num_experts * inter), x::<f32>(num_experts * hidden));
    let up = v(&up, [num_experts, inter, hidden]);
    let mut weights = ExpertWeights::separate(Some(up), up, v(&down, [num_experts, hidden, inter]));
    let bias = Some(v(&up_bias, [num_experts, inter]));
    (weights.gate_bias, weights.up_bias) = (bias, bias);
    weights.down_bias = Some(v(&down_bias, [num_experts, hidden]));
    let (router, side, always) = (x::<T>(num_experts * hidden), x::<f32>(num_experts), x::<T>(7 * hidden));
    let mut all = MoeWeights::<T, f32, T>::new(v(&router, [num_experts, hidden]), weights);
    (all.router_bias, all.selection_bias) = (Some(&side[..]), Some(&side[..]));
    all.shared = Some(FfnWeights::new(None, v(&always, [7, hidden]), v(&always, [hidden, 7])));
    all.shared_gate = Some(v(&router[..hidden], [1, hidden]));
    let packed = cpu::PackedMoe::pack(&spec, &all).unwrap();
    let block = cpu::PackedFfn::pack(&ffn, &weights.expert(num_experts - 1)).unwrap();
    for n in [1, 13] {
        let (hidden_states, factors) = (x::<T>(n * hidden), x::<f32>(n * 2));
        let tokens = v(&hidden_states, [n, hidden]);
        let ids: Box<[i32]> = (0..2 * n as i32).map(|i| i * 3 % 7 - 1).collect();
        let routing = Routing::new(v(&ids, [n, 2]), v(&factors, [n, 2]));
        written::<T, 2>("expert_ffn", [n, hidden], |out| {
            cpu::expert_ffn(cpu, &spec.experts, tokens, &routing, packed.experts(), out).unwrap();
        });
        written::<T, 2>("mlp", [n, hidden], |out| cpu::mlp(cpu, &ffn, tokens, &block, out).unwrap());
        written("router_logits", [n, num_experts], |logits| {
            cpu::router_logits(cpu, &spec.router, tokens, packed.router(), Some(&side), 3, logits).unwrap();
        });
        written::<T, 2>("moe", [n, hidden], |out| {
            written("topk_ids", [n, 2], |ids| {
                written("topk_weights", [n, 2], |weights| {
                    let mut output = MoeOutput::new(out);
                    output.route = Some(RouteOutput::new(ids, weights));
                    cpu::moe(cpu, &spec, &MoeInput::new(tokens), &packed, output).unwrap();
                });
            });
        });
    }
}

fn everything<T: Float>(cpu: &mut Cpu) {
    attention::<T>(cpu);
    linear_attention::<T>(cpu);
    glue::<T>(cpu);
    experts::<T>(cpu);
}

#[test]
fn every_function_stays_inside_its_arrays() {
    let level = Cpu::new().unwrap().level();
    println!("level {level}");
    for threads in [1, 3] {
        common::sums::with_threads(threads, || {
            let cpu = &mut Cpu::with_level(level);
            everything::<f32>(cpu);
            everything::<bf16>(cpu);
            routers(cpu);
        });
    }
}

#[test]
fn no_function_is_missing() {
    for name in common::cpu_functions() {
        assert!(include_str!("memcheck.rs").contains(&format!("cpu::{name}(cpu, ")), "cpu::{name} is not called");
    }
}

/// What valgrind is there to see: `.ci/run memcheck` runs this too, and fails if it passes.
#[test]
#[ignore = "it reads beyond an array"]
fn reads_beyond_an_array() {
    let x = x::<f32>(21);
    let end = std::hint::black_box(x.as_ptr().wrapping_add(x.len()));
    // SAFETY: none. The allocator rounds sizes up, so that nothing else happens.
    let beyond = unsafe { end.read_volatile() };
    std::hint::black_box(beyond);
}
