//! A CPU call after `reserve` allocates nothing: counted by an allocator, on every level, in pools of one and of three threads.
//!
//! In a pool of one thread everything runs on that thread, and the count must be 0. With more threads the pool itself may allocate now and then
//! (blocks of its queues); every call runs so often that an allocation of ours, once per call, could not hide among those.

mod common;

use common::attention_case::{Alibi, DenseBias, DenseMask, KvLayout, Sinks};
use common::{
    AttentionCase, AttentionOptions, ExpertCase, ExpertOptions, GateUp, Layout as ArrayLayout, MoeCase, Rng, RouteCase,
};
use gatefold::args::*;
use gatefold::cpu::{self, Cpu, Level};
use gatefold::spec::*;
use gatefold::{View, ViewMut};
use half::bf16;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the allocations of the threads of one pool: those of the pool before may still be busy ending.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static COUNTED_POOL: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static POOL: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    if POOL.get() != 0 && POOL.get() == COUNTED_POOL.load(Ordering::Relaxed) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise about `start` and `layout` is passed on.
        unsafe { System.dealloc(start, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise about `start`, `layout` and `new_size` is passed on.
        unsafe { System.realloc(start, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One pool at a time.
static ONE: Mutex<()> = Mutex::new(());

const CALLS: usize = 200;

/// Runs `call` at every level in both pools, in a workspace of what `bytes` tells.
fn check(name: &str, bytes: impl Fn(&Cpu) -> usize + Sync, mut call: impl FnMut(&mut Cpu) + Send) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    for threads in [1, 3] {
        let number = COUNTED_POOL.fetch_add(1, Ordering::Relaxed) + 1;
        let counted = move |_| POOL.set(number);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(counted).build().unwrap();
        pool.broadcast(|_| {}); // every thread has started
        for level in Level::available() {
            pool.install(|| {
                let mut cpu = Cpu::with_level(level);
                let bytes = bytes(&cpu);
                cpu.reserve(bytes);
                let reserved = cpu.workspace_bytes();
                call(&mut cpu); // threads start, thread-locals are made
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                (0..CALLS).for_each(|_| call(&mut cpu));
                let count = ALLOCATIONS.load(Ordering::Relaxed) - before;
                assert_eq!(cpu.workspace_bytes(), reserved, "{name} at {level}: {bytes} bytes were not enough");
                let allowed = if threads == 1 { 0 } else { CALLS / 4 };
                assert!(count <= allowed, "{name} at {level}, {threads} threads: {count} allocations in {CALLS} calls");
            });
        }
    }
}

#[test]
fn linear() {
    let mut rng = Rng::new(1);
    let weight = cpu::PackedLinear::pack(View::new(&rng.normals::<bf16>(64 * 48, 0.1), [64, 48])).unwrap();
    for n in [1, 40] {
        let x: Vec<bf16> = rng.normals(n * 48, 1.0);
        let mut out = vec![bf16::ZERO; n * 64];
        check(
            "linear",
            |cpu| cpu::linear_workspace_bytes::<bf16>(cpu, &weight, n),
            |cpu| cpu::linear(cpu, View::new(&x, [n, 48]), &weight, None, ViewMut::new(&mut out, [n, 64])).unwrap(),
        );
    }
    let heads = cpu::PackedLinear::pack_heads(View::new(&rng.normals::<bf16>(3 * 20 * 16, 0.1), [3, 20, 16])).unwrap();
    for n in [1, 40] {
        let x: Vec<bf16> = rng.normals(n * 48, 1.0);
        let mut out = vec![bf16::ZERO; n * 60];
        check(
            "linear_heads",
            |cpu| cpu::linear_workspace_bytes::<bf16>(cpu, &heads, n),
            |cpu| {
                let (x, out) = (View::new(&x, [n, 3, 16]), ViewMut::new(&mut out, [n, 3, 20]));
                cpu::linear_heads(cpu, x, &heads, out).unwrap();
            },
        );
    }
}

#[test]
fn latent_attention() {
    let spec = Mla::new(4, 24, 16, 8, 20);
    let kv_b = cpu::PackedMla::pack(&spec, View::new(&vec![0.5f32; 4 * 36 * 24], [4, 36, 24])).unwrap();
    for n in [1, 40] {
        let (q, latent) = (vec![1.0f32; n * 4 * 16], vec![1.0f32; n * 4 * 24]);
        let bytes = |cpu: &Cpu| cpu::mla_workspace_bytes::<f32>(cpu, &kv_b, n);
        let mut out = vec![0.0; n * 4 * 24];
        check("mla_absorb_query", bytes, |cpu| {
            let (q, out) = (View::new(&q, [n, 4, 16]), ViewMut::new(&mut out, [n, 4, 24]));
            cpu::mla_absorb_query(cpu, &spec, q, &kv_b, out).unwrap();
        });
        check("mla_project_value", bytes, |cpu| {
            let (latent, out) = (View::new(&latent, [n, 4, 24]), ViewMut::new(&mut out[..n * 80], [n, 4, 20]));
            cpu::mla_project_value(cpu, &spec, latent, &kv_b, out).unwrap();
        });
    }
}

#[test]
fn attention() {
    let decode = AttentionOptions { kv: KvLayout::Paged(16), ..AttentionOptions::new((8, 2), 64, &[(1, 700), (1, 3)]) };
    let mut all = AttentionOptions::new((4, 2), 40, &[(33, 70), (0, 4), (5, 5)]);
    all.mask = Mask { causal: true, window_left: Some(50), ..Mask::default() };
    all.softcap = Some(20.0);
    (all.bias, all.dense_mask, all.alibi) = (DenseBias::PerHead, DenseMask::PerKey, Alibi::Positions);
    (all.relative_bias, all.sinks, all.left_padding) = (Some(true), Sinks::Finite, true);
    all.layout = ArrayLayout::Padded;
    for options in [decode, all] {
        let case = AttentionCase::<bf16>::new(&options, 2);
        let input = case.input();
        let [n, heads, _] = case.q.shape();
        let shape = [n, heads, case.spec.value_dim];
        let (mut out, mut lse) = (vec![bf16::ZERO; shape.iter().product()], vec![0.0; n * heads]);
        let added = input.bias.is_some() || input.mask.is_some() || input.relative_bias.is_some();
        let sizes = {
            let output = AttentionOutput::<bf16>::new(ViewMut::new(&mut out, shape));
            input.check(&case.spec, &output).unwrap()
        };
        check(
            "attention",
            |cpu| cpu::attention_workspace_bytes::<bf16>(cpu, &case.spec, &sizes, added),
            |cpu| {
                let lse = ViewMut::new(&mut lse, [n, heads]);
                let output = AttentionOutput::with_lse(ViewMut::new(&mut out, shape), lse);
                cpu::attention(cpu, &case.spec, &input, output).unwrap();
            },
        );
    }
}

#[test]
fn merge() {
    let (parts, n, heads, width) = (3, 40, 4, 24);
    let (outs, lses) = (vec![0.5f32; parts * n * heads * width], vec![1.0f32; parts * n * heads]);
    let (mut out, mut lse) = (vec![0.0f32; n * heads * width], vec![0.0; n * heads]);
    check(
        "merge",
        |_| cpu::merge_workspace_bytes(n, heads, width),
        |cpu| {
            let (out, lse) = (ViewMut::new(&mut out, [n, heads, width]), ViewMut::new(&mut lse, [n, heads]));
            let (outs, lses) = (View::new(&outs, [parts, n, heads, width]), View::new(&lses, [parts, n, heads]));
            cpu::merge(cpu, outs, lses, AttentionOutput::with_lse(out, lse)).unwrap();
        },
    );
}

#[test]
fn linear_attention() {
    let (n, heads, dim, width) = (37, 4, 16, 24);
    let (q, v) = (vec![0.1f32; n * heads * dim], vec![0.1f32; n * heads * width]);
    let (mut out, mut state) = (vec![0.0; n * heads * width], vec![0.0; heads * dim * width]);
    for form in [RetentionForm::Parallel, RetentionForm::Recurrent, RetentionForm::Chunkwise(8)] {
        let mut spec = Retention::new(heads, dim, width);
        spec.form = form;
        let (q, v) = (View::new(&q, [n, heads, dim]), View::new(&v, [n, heads, width]));
        check(
            "retention",
            |_| cpu::retention_workspace_bytes(&spec, n),
            |cpu| {
                let (out, state) =
                    (ViewMut::new(&mut out, [n, heads, width]), ViewMut::new(&mut state, [heads, dim, width]));
                let input = RetentionInput::new(q, q, v, &[0.9, 0.8, 0.7, 0.6]);
                cpu::retention(cpu, &spec, &input, RetentionOutput::with_state(out, state)).unwrap();
            },
        );
    }
    let shape @ [batch, _, channels] = [2, 9, 100];
    let x = vec![0.1f32; shape.iter().product()];
    let vector = vec![0.2; channels];
    let (mut out, mut state) = (vec![0.0; x.len()], vec![0.0; 3 * batch * channels]);
    check(
        "wkv",
        |_| cpu::wkv_workspace_bytes(channels),
        |cpu| {
            let (out, state) = (ViewMut::new(&mut out, shape), ViewMut::new(&mut state, [3, batch, channels]));
            let input = WkvInput::new(View::new(&x, shape), View::new(&x, shape), &vector, &vector);
            cpu::wkv(cpu, &input, WkvOutput::with_state(out, state)).unwrap();
        },
    );
}

/// A mixture with everything, for a few tokens and for more than a tile.
fn mixture(n: usize) -> MoeCase<bf16, bf16, f32> {
    let mut router = Router::new(8, 2);
    (router.jitter, router.aux_loss, router.second_expert) = (Some(0.1), Some(AuxLoss::TopK), SecondExpert::Random);
    router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.5)));
    let mut spec = Moe::new(router, ExpertFfn::new(8, Ffn::gated(40, 24, Activation::Silu)));
    (spec.experts.ffn.up_bias, spec.experts.ffn.down_bias) = (true, true);
    (spec.router_bias, spec.selection_bias) = (true, true);
    let mut shared = SharedExpert::new(Ffn::gated(40, 30, Activation::GeluErf));
    shared.sigmoid_gate = true;
    spec.shared = Some(shared);
    let options = ExpertOptions { num_tokens: n, slots: 2, gate_up: GateUp::Halves, layout: ArrayLayout::Contiguous };
    MoeCase::new(&spec, options, 5)
}

#[test]
fn experts() {
    for n in [1, 40] {
        let case: ExpertCase<bf16, bf16> = mixture(n).experts;
        let mut out = vec![bf16::ZERO; n * 40];
        let packed = cpu::PackedExperts::pack(&case.spec, &case.weights()).unwrap();
        check(
            "expert_ffn",
            |cpu| cpu::expert_ffn_workspace_bytes::<bf16>(cpu, &packed, n, 2),
            |cpu| {
                let out = ViewMut::new(&mut out, [n, 40]);
                cpu::expert_ffn(cpu, &case.spec, case.hidden.view(), &case.routing(), &packed, out).unwrap();
            },
        );
        let block = cpu::PackedFfn::pack(&case.spec.ffn, &case.weights().expert(0)).unwrap();
        check(
            "mlp",
            |cpu| cpu::mlp_workspace_bytes::<bf16>(cpu, &block, n),
            |cpu| {
                let out = ViewMut::new(&mut out, [n, 40]);
                cpu::mlp(cpu, &case.spec.ffn, case.hidden.view(), &block, out).unwrap();
            },
        );
    }
}

#[test]
fn mixtures() {
    for n in [1, 40] {
        let case = mixture(n);
        let packed = cpu::PackedMoe::pack(&case.spec, &case.weights()).unwrap();
        let router = cpu::PackedLinear::pack(case.router.view()).unwrap();
        let mut logits = vec![0.0; n * 8];
        check(
            "router_logits",
            |cpu| cpu::router_logits_workspace_bytes::<bf16>(cpu, &case.spec.router, &router, n),
            |cpu| {
                let (spec, x) = (&case.spec.router, case.experts.hidden.view());
                let out = ViewMut::new(&mut logits, [n, 8]);
                cpu::router_logits(cpu, spec, x, &router, case.router_bias.as_deref(), 3, out).unwrap();
            },
        );
        let mut out = vec![bf16::ZERO; n * 40];
        let (mut ids, mut weights) = (vec![0; n * 2], vec![0.0; n * 2]);
        for (given, asked) in [(false, false), (false, true), (true, false)] {
            check(
                "moe",
                |cpu| cpu::moe_workspace_bytes::<bf16>(cpu, &case.spec, &packed, n),
                |cpu| {
                    let mut input = case.input();
                    input.routing = given.then(|| case.experts.routing());
                    let mut output = MoeOutput::new(ViewMut::new(&mut out, [n, 40]));
                    let weights = ViewMut::new(&mut weights, [n, 2]);
                    output.route = asked.then(|| RouteOutput::new(ViewMut::new(&mut ids, [n, 2]), weights));
                    cpu::moe(cpu, &case.spec, &input, &packed, output).unwrap();
                },
            );
        }
    }
}

/// Every function of the backend is counted here, or it only tells a size.
#[test]
fn no_function_is_missing() {
    for name in common::cpu_functions() {
        assert!(include_str!("alloc.rs").contains(&format!("cpu::{name}(cpu, ")), "cpu::{name} is not counted");
    }
}

#[test]
fn route() {
    let mut specs = vec![Router::new(64, 8), Router::new(16, 2), Router::new(16, 2), Router::new(16, 4)];
    specs[0].groups = Some(ExpertGroups::new(8, 4, GroupScore::Top2Sum));
    specs[1].capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
    specs[2].selection = Selection::ExpertChoice;
    specs[2].capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
    specs[3].selection = Selection::Sinkhorn { iterations: 3 };
    specs[3].aux_loss = Some(AuxLoss::TopK);
    for spec in specs {
        let n = 50;
        let case = RouteCase::new(&spec, n, 4);
        let slots = spec.slots();
        let (mut ids, mut weights) = (vec![0; n * slots], vec![0.0; n * slots]);
        let (mut counts, mut loss) = (vec![0; spec.num_experts], 0.0);
        check(
            "route",
            |_| cpu::route_workspace_bytes(&spec, n),
            |cpu| {
                let weights = ViewMut::new(&mut weights, [n, slots]);
                let mut output = RouteOutput::new(ViewMut::new(&mut ids, [n, slots]), weights);
                output.tokens_per_expert = Some(&mut counts);
                output.z_loss = Some(&mut loss);
                cpu::route(cpu, &spec, &case.input(), output).unwrap();
            },
        );
    }
}

#[test]
fn glue() {
    let mut rng = Rng::new(1);
    let n = 40;
    let x: Vec<bf16> = rng.normals(n * 96, 1.0);
    let weight: Vec<f32> = rng.normals(96, 1.0);
    let mut out = vec![bf16::ZERO; n * 96];
    let flat = View::new(&x, [n, 96]);
    let none = |_: &Cpu| 0;
    for spec in [Norm::rms(1e-6), Norm::layer(1e-6)] {
        let weight = Some(weight.as_slice());
        check("norm", none, |cpu| cpu::norm(cpu, &spec, flat, weight, None, ViewMut::new(&mut out, [n, 96])).unwrap());
    }
    check("add", none, |cpu| cpu::add(cpu, flat, flat, 0.5, ViewMut::new(&mut out, [n, 96])).unwrap());
    check("sigmoid_mul", none, |cpu| cpu::sigmoid_mul(cpu, flat, flat, ViewMut::new(&mut out, [n, 96])).unwrap());

    let rope = Rope::new(RopeStyle::InterleavedToHalf, 16, 1e4);
    let (cos, sin): (Vec<f32>, Vec<f32>) = (rng.normals(50 * 8, 1.0), rng.normals(50 * 8, 1.0));
    let table = RopeTable::new(View::new(&cos, [50, 8]), View::new(&sin, [50, 8]));
    let positions: Vec<u32> = (0..n as u32).collect();
    let heads = View::new(&x, [n, 4, 24]);
    check(
        "rope",
        |_| cpu::rope_workspace_bytes([n, 4, 24]),
        |cpu| cpu::rope(cpu, &rope, heads, &positions, &table, ViewMut::new(&mut out, [n, 4, 24])).unwrap(),
    );

    let (mut k_out, mut v_out) = (vec![bf16::ZERO; n * 96], vec![bf16::ZERO; n * 96]);
    for (norm, width) in [(QkNorm::PerHead, 24), (QkNorm::Full, 96)] {
        let mut spec = QkvPrep::new(4, 4, 24);
        (spec.qk_norm, spec.clip, spec.rope) = (Some(norm), Some(2.0), Some(rope.clone()));
        let mut input = QkvInput::new(heads, heads, heads, &positions);
        (input.q_norm, input.k_norm, input.rope) = (Some(&weight[..width]), Some(&weight[..width]), Some(table));
        check(
            "prepare_qkv",
            |_| cpu::prepare_qkv_workspace_bytes(&spec, n),
            |cpu| {
                let shape = [n, 4, 24];
                let (k, v) = (ViewMut::new(&mut k_out, shape), ViewMut::new(&mut v_out, shape));
                cpu::prepare_qkv(cpu, &spec, &input, QkvOutput::new(ViewMut::new(&mut out, shape), k, v)).unwrap();
            },
        );
    }
    let mut cache = vec![bf16::ZERO; 64 * 96];
    let mut values = cache.clone();
    let input = KvCache::new(heads, heads, None, &[7]);
    check("kv_append", none, |cpu| {
        let (k, v) = (ViewMut::new(&mut cache, [1, 64, 4, 24]), ViewMut::new(&mut values, [1, 64, 4, 24]));
        cpu::kv_append(cpu, &input, KvCacheMut::contiguous(k, v)).unwrap();
    });
}
