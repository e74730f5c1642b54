//! `cpu::expert_ffn` and `cpu::mlp` at every level against the reference.

use crate::common::moe_case::{ExpertCase, ExpertOptions, GateUp};
use crate::common::naive::Store;
use crate::common::sums::{assert_sums, bits, inner_store, naive_experts, with_threads};
use crate::common::{Array, Layout, Output, strategies};
use gatefold::args::Routing;
use gatefold::cpu::{self, Cpu, Float, Level, PackedExperts, PackedFfn};
use gatefold::spec::{Activation, ExpertFfn, Ffn, WeightOn};
use gatefold::{Dtype, Error, View, ViewMut, reference};
use half::{bf16, f16};
use proptest::prelude::*;

/// A call at a level, in so many threads, for some of the tokens.
fn call<T: Float, W: Float, O: Float>(
    case: &ExpertCase<T, W>,
    packed: &PackedExperts,
    level: Level,
    threads: usize,
    tokens: std::ops::Range<usize>,
) -> Vec<O> {
    let rows = |len: usize, stride: usize| (tokens.start * stride).min(len);
    let (hidden, ids, weights) = (case.hidden.view(), case.ids.view(), case.topk_weights.view());
    fn part<'a, E>(view: View<'a, E, 2>, skip: usize, count: usize) -> View<'a, E, 2> {
        View::with_strides(&view.data()[skip..], [count, view.shape()[1]], view.strides())
    }
    let hidden = part(hidden, rows(hidden.data().len(), hidden.strides()[0]), tokens.len());
    let ids = part(ids, rows(ids.data().len(), ids.strides()[0]), tokens.len());
    let weights = part(weights, rows(weights.data().len(), weights.strides()[0]), tokens.len());
    let mut out = Output::<O, 2>::new(hidden.shape(), case.options.layout);
    with_threads(threads, || {
        let mut cpu = Cpu::with_level(level);
        cpu.reserve(cpu::expert_ffn_workspace_bytes::<T>(&cpu, packed, tokens.len(), case.options.slots));
        let reserved = cpu.workspace_bytes();
        cpu::expert_ffn(&mut cpu, &case.spec, hidden, &Routing::new(ids, weights), packed, out.view()).unwrap();
        assert_eq!(cpu.workspace_bytes(), reserved, "the workspace grew");
    });
    out.finish("out")
}

fn check<T: Float, W: Float, O: Float>(case: &ExpertCase<T, W>, threads: usize, seed: u64) {
    let (spec, width, num_tokens) = (&case.spec, case.spec.ffn.hidden_size, case.options.num_tokens);
    let weights = case.weights();
    let truth: Vec<f64> =
        case.run(|spec, hidden, routing, out| reference::expert_ffn(spec, hidden, routing, &weights, out));
    let packed = with_threads(threads, || PackedExperts::pack(spec, &weights).unwrap());
    assert_eq!(packed.bytes(), PackedExperts::packed_bytes(spec, W::DTYPE));
    let mut naive: Vec<(Store, Vec<O>)> = Vec::new();
    for level in Level::available() {
        let what = format!("{level} {:?} x {:?} -> {:?}, {spec:?}, {:?}", T::DTYPE, W::DTYPE, O::DTYPE, case.options);
        let store = inner_store::<T, W>(level);
        if !naive.iter().any(|(s, _)| *s == store) {
            naive.push((store, naive_experts::<T, W, O>(case, store, Store::F32)));
        }
        let (_, naive) = naive.iter().find(|(s, _)| *s == store).unwrap();
        let got = call::<T, W, O>(case, &packed, level, threads, 0..num_tokens);
        // The outputs of a token share its inner values, so the luck of a few sums: more tokens where those are few.
        let rows = 128usize.div_ceil(spec.ffn.intermediate_size);
        assert_sums(&what, &got, &truth, naive, width * rows);
        let other = call::<T, W, O>(case, &packed, level, threads % 3 + 1, 0..num_tokens);
        assert!(bits(&got) == bits(&other), "{what}: another number of threads");
        if num_tokens > 0 {
            let first = seed as usize % num_tokens;
            let end = first + 1 + (seed >> 32) as usize % (num_tokens - first);
            for part in [first..end, first..first + 1] {
                let alone = call::<T, W, O>(case, &packed, level, threads, part.clone());
                assert!(
                    bits(&got[part.start * width..part.end * width]) == bits(&alone),
                    "{what}: tokens {part:?} alone"
                );
            }
        }
    }
}

fn run<T: Float, W: Float, O: Float>((spec, options): (ExpertFfn, ExpertOptions), threads: usize, seed: u64) {
    check::<T, W, O>(&ExpertCase::<T, W>::new(&spec, options, seed), threads, seed);
}

/// Around tiles of 12 tokens, panels of 32 outputs, panels of 16 pairs of gate and up.
fn calls() -> impl Strategy<Value = (ExpertFfn, ExpertOptions)> {
    prop_oneof![strategies::experts(12, 32, 16), strategies::experts(48, 64, 32), strategies::experts(3, 33, 17)]
}

/// [`calls`] with sums that are long enough to have an error that is not luck: results in f32 are compared in these alone, and
/// small blocks in types that round more.
fn long_calls() -> impl Strategy<Value = (ExpertFfn, ExpertOptions)> {
    calls().prop_map(|(mut spec, options)| {
        spec.ffn.hidden_size = spec.ffn.hidden_size.max(15);
        spec.ffn.intermediate_size = spec.ffn.intermediate_size.max(15);
        (spec, options)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn f32_f32_f32(call in long_calls(), threads in 1usize..4, seed: u64) { run::<f32, f32, f32>(call, threads, seed); }
    #[test]
    fn bf16_bf16_bf16(call in calls(), threads in 1usize..4, seed: u64) { run::<bf16, bf16, bf16>(call, threads, seed); }
    #[test]
    fn bf16_bf16_f32(call in long_calls(), threads in 1usize..4, seed: u64) { run::<bf16, bf16, f32>(call, threads, seed); }
    #[test]
    fn f32_bf16_f32(call in long_calls(), threads in 1usize..4, seed: u64) { run::<f32, bf16, f32>(call, threads, seed); }
    #[test]
    fn f16_f16_f16(call in calls(), threads in 1usize..4, seed: u64) { run::<f16, f16, f16>(call, threads, seed); }
    #[test]
    fn mixed(call in calls(), threads in 1usize..4, seed: u64) {
        run::<f32, f32, f16>(call, threads, seed);
        run::<bf16, f32, bf16>(call, threads, seed);
        run::<f16, bf16, f16>(call, threads, seed);
        run::<f32, f16, bf16>(call, threads, seed);
    }
}

fn options(num_tokens: usize, slots: usize) -> ExpertOptions {
    ExpertOptions { num_tokens, slots, gate_up: GateUp::Halves, layout: Layout::Padded }
}

/// Every expert of one token; one expert for all tokens; thousands of experts of which few are used.
#[test]
fn extreme_routings() {
    let ffn = Ffn::gated(40, 24, Activation::Silu);
    let all = ExpertFfn::new(16, ffn);
    check::<f32, f32, f32>(&ExpertCase::new(&all, options(13, 16), 1), 2, 5);
    let mut skewed = ExpertCase::<f32, f32>::new(&all, options(230, 2), 2);
    skewed.ids = Array::new([230, 2], Layout::Padded, &[[7, -1]; 230].concat());
    check::<f32, f32, f32>(&skewed, 3, 1 << 33);
    let many = ExpertFfn::new(1024, Ffn::gated(24, 8, Activation::Silu));
    check::<bf16, bf16, f32>(&ExpertCase::new(&many, options(30, 8), 3), 2, 9);
    // Twice the same expert counts twice.
    let mut twice = ExpertCase::<f32, f32>::new(&all, options(9, 2), 4);
    twice.ids = Array::new([9, 2], Layout::Padded, &[3; 18]);
    check::<f32, f32, f32>(&twice, 2, 3);
}

/// Ids of others are skipped, whatever their weight; a token without experts gets 0; NaN stays in its token.
#[test]
fn what_is_skipped_and_what_spreads() {
    let mut spec = ExpertFfn::new(8, Ffn::gated(33, 17, Activation::GeluTanh));
    (spec.first_expert, spec.num_local_experts) = (2, 3);
    let mut case = ExpertCase::<f32, f32>::new(&spec, options(14, 2), 6);
    let strangers = [-1, i32::MIN, i32::MAX, 0, 1, 5, 7, 8];
    let ids: Vec<i32> = (0..28).map(|i| if i < 16 { strangers[i % 8] } else { 2 + i as i32 % 3 }).collect();
    let weights: Vec<f32> = (0..28).map(|i| if i < 16 { f32::NAN } else { 0.5 }).collect();
    case.ids = Array::new([14, 2], Layout::Padded, &ids);
    case.topk_weights = Array::new([14, 2], Layout::Padded, &weights);
    case.hidden.set([10, 4], f32::NAN);
    case.hidden.set([12, 4], f32::INFINITY);
    let packed = PackedExperts::pack(&spec, &case.weights()).unwrap();
    for level in Level::available() {
        let out = call::<f32, f32, f32>(&case, &packed, level, 2, 0..14);
        for (t, row) in out.chunks(33).enumerate() {
            match t {
                0..8 => assert!(row.iter().all(|x| x.to_bits() == 0), "token {t} at {level}"),
                10 => assert!(row.iter().all(|x| x.is_nan()), "token {t} at {level}"),
                12 => assert!(row.iter().all(|x| !x.is_finite()), "token {t} at {level}"),
                _ => assert!(row.iter().all(|x| x.is_finite()), "token {t} at {level}"),
            }
        }
    }
}

/// More tokens than are computed at once: each is what it is alone.
#[test]
fn more_tokens_than_a_chunk() {
    let spec = ExpertFfn::new(4, Ffn::gated(16, 16, Activation::Silu));
    let case = ExpertCase::<bf16, bf16>::new(&spec, options(4100, 2), 8);
    let packed = PackedExperts::pack(&spec, &case.weights()).unwrap();
    for level in Level::available() {
        let all = call::<bf16, bf16, f32>(&case, &packed, level, 2, 0..4100);
        for part in [0..1, 4090..4100] {
            let alone = call::<bf16, bf16, f32>(&case, &packed, level, 1, part.clone());
            assert!(bits(&all[part.start * 16..part.end * 16]) == bits(&alone), "{part:?} at {level}");
        }
    }
}

/// A dense block is the only expert with weight 1.
#[test]
fn mlp_is_the_only_expert() {
    let mut ffn = Ffn::gated(50, 37, Activation::SwigluClamped { alpha: 1.7, limit: 7.0 });
    (ffn.up_bias, ffn.down_bias) = (true, true);
    let spec = ExpertFfn::new(1, ffn);
    let mut case = ExpertCase::<bf16, bf16>::new(&spec, options(29, 1), 9);
    case.ids = Array::new([29, 1], Layout::Padded, &[0; 29]);
    case.topk_weights = Array::new([29, 1], Layout::Padded, &[1.0; 29]);
    let weights = case.weights();
    let (experts, block) =
        (PackedExperts::pack(&spec, &weights).unwrap(), PackedFfn::pack(&ffn, &weights.expert(0)).unwrap());
    assert_eq!(block.bytes(), PackedFfn::packed_bytes(&ffn, Dtype::BF16));
    for level in Level::available() {
        let want = call::<bf16, bf16, f32>(&case, &experts, level, 2, 0..29);
        let mut out = Output::<f32, 2>::new([29, 50], Layout::Padded);
        let mut cpu = Cpu::with_level(level);
        cpu.reserve(cpu::mlp_workspace_bytes::<bf16>(&cpu, &block, 29));
        let reserved = cpu.workspace_bytes();
        cpu::mlp(&mut cpu, &ffn, case.hidden.view(), &block, out.view()).unwrap();
        assert_eq!(cpu.workspace_bytes(), reserved);
        assert!(bits(&out.finish("out")) == bits(&want), "{level}");
    }
}

#[test]
fn errors_name_the_argument_and_nothing_is_written() {
    let spec = ExpertFfn::new(4, Ffn::gated(16, 8, Activation::Silu));
    let case = ExpertCase::<f32, f32>::new(&spec, options(3, 2), 1);
    let packed = PackedExperts::pack(&spec, &case.weights()).unwrap();
    let mut cpu = Cpu::new().unwrap();
    let mut out = Output::<f32, 2>::new([3, 16], Layout::Padded);
    let mut fails = |spec: &ExpertFfn, hidden: View<'_, f32, 2>, routing: &Routing<'_, f32>, want: &str| {
        let error = cpu::expert_ffn(&mut cpu, spec, hidden, routing, &packed, out.view()).unwrap_err();
        assert!(error.to_string().starts_with(want), "{error}");
        out.assert_untouched("out");
    };
    let (hidden, routing) = (case.hidden.view(), case.routing());
    let short = vec![0.0; 32];
    fails(&spec, View::new(&short, [2, 16]), &routing, "`topk_ids` has shape [3, 2], expected [2, 2]");
    fails(&spec, View::new(&short, [3, 16]), &routing, "`hidden` has 32 elements, its shape asks for 48");
    let one_weight = Routing::new(case.ids.view(), View::new(&short, [3, 1]));
    fails(&spec, hidden, &one_weight, "`topk_weights` has shape [3, 1], expected [3, 2]");
    let mut other = spec;
    other.first_expert = 1;
    fails(&other, hidden, &routing, "`num_local_experts` is 1 + 4, expected at most num_experts (4)");
    other = ExpertFfn::new(4, Ffn::gated(16, 8, Activation::Relu));
    fails(&other, hidden, &routing, "`weights` is packed for ExpertFfn");
    let mut on_input = spec;
    (on_input.weight_on, on_input.combine_scale) = (WeightOn::Input, 2.0);
    cpu::expert_ffn(&mut cpu, &on_input, hidden, &routing, &packed, out.view()).unwrap();
    let plain = ExpertFfn::new(4, Ffn::plain(16, 8, Activation::Silu));
    assert!(matches!(PackedExperts::pack(&plain, &case.weights()), Err(Error::Presence { .. })));
    let mut mxfp4 = spec;
    mxfp4.weight_format = gatefold::spec::WeightFormat::Mxfp4;
    assert!(matches!(PackedExperts::pack(&mxfp4, &case.weights()), Err(Error::Unsupported { .. })));
    let mut none = vec![0f32; 0];
    let (no_ids, no_weights): ([i32; 0], [f32; 0]) = ([], []);
    let nobody = Routing::new(View::new(&no_ids, [0, 2]), View::new(&no_weights, [0, 2]));
    let nothing = View::<f32, 2>::new(&[], [0, 16]);
    cpu::expert_ffn(&mut cpu, &spec, nothing, &nobody, &packed, ViewMut::new(&mut none, [0, 16])).unwrap();
}
