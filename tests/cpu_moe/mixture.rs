//! `cpu::moe` at every level against the reference: any router, with the routing computed inside or given, and any shared expert.

use crate::common::mixtures::{Backend, check_mixture, mixtures};
use crate::common::naive::Store;
use crate::common::sums::{bits, inner_store, with_threads};
use crate::common::tables::{Table, mixture};
use crate::common::{ExpertOptions, GateUp, Layout, MoeCase, MoeResult, Output};
use gatefold::args::{MoeInput, MoeOutput, RouteOutput, Routing};
use gatefold::cpu::{self, Cpu, Float, Level, PackedLinear, PackedMoe};
use gatefold::spec::{Activation, AuxLoss, ExpertFfn, Ffn, Moe, Renormalize, Router, Score, SharedExpert, WeightOn};
use gatefold::{Dtype, Error, View, ViewMut};
use half::{bf16, f16};
use proptest::prelude::*;
use std::cell::Cell;

fn call<T: Float, W: Float, Q: Float, O: Float>(
    case: &MoeCase<T, W, Q>,
    packed: &PackedMoe,
    level: Level,
    threads: usize,
    given: Option<Routing<'_, f32>>,
    ask: bool,
) -> MoeResult<O, f32> {
    with_threads(threads, || {
        let mut cpu = Cpu::with_level(level);
        cpu.reserve(cpu::moe_workspace_bytes::<T>(&cpu, &case.spec, packed, case.num_tokens()));
        let reserved = cpu.workspace_bytes();
        let slots = given.as_ref().map_or(0, |routing| routing.topk_ids.shape()[1]);
        let result = case.run(given, ask, |spec, input, output| cpu::moe(&mut cpu, spec, input, packed, output));
        let more_slots = slots > case.spec.router.slots();
        assert!(more_slots || cpu.workspace_bytes() == reserved, "the workspace grew");
        result
    })
}

/// The logits that this level computes.
fn logits<T: Float, W: Float, Q: Float>(case: &MoeCase<T, W, Q>, level: Level) -> Vec<f32> {
    let shape = [case.num_tokens(), case.spec.router.num_experts];
    let router = PackedLinear::pack(case.router.view()).unwrap();
    let mut logits = vec![0.0; shape[0] * shape[1]];
    let (spec, hidden, bias) = (&case.spec.router, case.experts.hidden.view(), case.router_bias.as_deref());
    let out = ViewMut::new(&mut logits, shape);
    cpu::router_logits(&mut Cpu::with_level(level), spec, hidden, &router, bias, case.seed, out).unwrap();
    logits
}

/// On every level, with another number of threads in every call. The routing is computed inside, or (`given`) that of the case is used.
pub fn check<T: Float, W: Float, Q: Float, O: Float>(case: &MoeCase<T, W, Q>, given: bool, threads: usize) {
    let packed = with_threads(threads, || PackedMoe::pack(&case.spec, &case.weights()).unwrap());
    for level in Level::available() {
        let calls = Cell::new(threads);
        let backend = Backend::<T, W, Q, O> {
            who: level.to_string(),
            inner: inner_store::<T, W>(level),
            rows: Store::F32,
            exact: true,
            moe: &|case, given, ask| {
                let threads = 1 + calls.replace(calls.get() + 1) % 3;
                call(case, &packed, level, threads, given, ask)
            },
            logits: &|case| logits(case, level),
        };
        check_mixture(&backend, case, given);
    }
}

fn run<T: Float, W: Float, Q: Float, O: Float>(
    (spec, options, mask): &(Moe, ExpertOptions, bool),
    given: bool,
    threads: usize,
    seed: u64,
) {
    let mut case = MoeCase::<T, W, Q>::new(spec, *options, seed);
    if *mask {
        case = case.with_mask();
    }
    check::<T, W, Q, O>(&case, given, threads);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn f32_everywhere(m in mixtures(12, 32, 16), given: bool, threads in 1usize..4, seed: u64) {
        run::<f32, f32, f32, f32>(&m, given, threads, seed);
    }
    #[test]
    fn bf16_everywhere(m in mixtures(12, 32, 16), given: bool, threads in 1usize..4, seed: u64) {
        run::<bf16, bf16, bf16, bf16>(&m, given, threads, seed);
    }
    #[test]
    fn bf16_with_a_router_in_f32(m in mixtures(12, 32, 16), given: bool, threads in 1usize..4, seed: u64) {
        run::<bf16, bf16, f32, f32>(&m, given, threads, seed);
    }
    #[test]
    fn f16_everywhere(m in mixtures(12, 32, 16), given: bool, threads in 1usize..4, seed: u64) {
        run::<f16, f16, f16, f16>(&m, given, threads, seed);
    }
    #[test]
    fn mixed_types(m in mixtures(12, 32, 16), given: bool, threads in 1usize..4, seed: u64) {
        match seed % 3 {
            0 => run::<f32, bf16, f32, f32>(&m, given, threads, seed),
            1 => run::<bf16, f32, f16, bf16>(&m, given, threads, seed),
            _ => run::<f16, bf16, f32, f16>(&m, given, threads, seed),
        }
    }
}

/// Every pair of values of two options of router, experts and mixture.
#[test]
fn every_pair_of_options() {
    fn check_row<T: Float, W: Float>(call: &mixture::Call, seed: u64) {
        match call.router {
            Dtype::F32 => check_as::<T, W, f32>(call, seed),
            _ => check_as::<T, W, bf16>(call, seed),
        }
    }
    fn check_as<T: Float, W: Float, Q: Float>(call: &mixture::Call, seed: u64) {
        let (spec, options) = mixture::finish(call);
        let mut case = MoeCase::<T, W, Q>::new(&spec, options, seed);
        if call.route.token_mask {
            case = case.with_mask();
        }
        check::<T, W, Q, T>(&case, call.given.is_some(), 2);
    }
    let table = mixture::table().and(Table::new(vec![
        (
            "layout",
            vec![
                ("contiguous", |_| {}),
                ("padded", |c| c.experts.options.layout = Layout::Padded),
                ("permuted", |c| c.experts.options.layout = Layout::Permuted),
            ],
        ),
        (
            "types",
            vec![
                ("f32", |_| {}),
                ("bf16", |c| c.experts.types = (Dtype::BF16, Dtype::BF16)),
                ("f16", |c| c.experts.types = (Dtype::F16, Dtype::F16)),
                ("f32 x bf16", |c| c.experts.types.1 = Dtype::BF16),
                ("bf16 x f32", |c| c.experts.types.0 = Dtype::BF16),
            ],
        ),
        ("router", vec![("f32", |_| {}), ("bf16", |c| c.router = Dtype::BF16)]),
    ]));
    let base = mixture::base(20, 18);
    let pairs = table.rows("mixtures", &base, 1, mixture::valid);
    for (seed, row) in pairs.rows.iter().enumerate() {
        let call = table.apply(&base, row);
        println!("{}", table.describe(row));
        match call.experts.types {
            (Dtype::F32, Dtype::F32) => check_row::<f32, f32>(&call, seed as u64),
            (Dtype::F32, _) => check_row::<f32, bf16>(&call, seed as u64),
            (Dtype::F16, _) => check_row::<f16, f16>(&call, seed as u64),
            (_, Dtype::F32) => check_row::<bf16, f32>(&call, seed as u64),
            _ => check_row::<bf16, bf16>(&call, seed as u64),
        }
    }
}

/// 8 experts of a block of 40 x 24.
fn small(top_k: usize) -> Moe {
    Moe::new(Router::new(8, top_k), ExpertFfn::new(8, Ffn::gated(40, 24, Activation::Silu)))
}

fn with_shared(mut spec: Moe) -> Moe {
    let mut shared = SharedExpert::new(Ffn::gated(40, 30, Activation::Silu));
    shared.sigmoid_gate = true;
    spec.shared = Some(shared);
    spec
}

fn options(num_tokens: usize, slots: usize) -> ExpertOptions {
    ExpertOptions { num_tokens, slots, gate_up: GateUp::Halves, layout: Layout::Padded }
}

/// All tokens on one expert; every expert for every token; weights on the input and a scale.
#[test]
fn extreme_routings() {
    let mut one = small(1);
    (one.router_bias, one.router.score) = (true, Score::Sigmoid);
    let mut case = MoeCase::<f32, f32, f32>::new(&one, options(130, 1), 3);
    case.router_bias = Some((0..8).map(|e| if e == 5 { 1000.0 } else { 0.0 }).collect());
    check::<f32, f32, f32, f32>(&case, false, 3);
    let mut all = with_shared(small(8));
    (all.router.renormalize, all.experts.weight_on, all.experts.combine_scale) =
        (Renormalize::sum(), WeightOn::Input, 0.5);
    for n in [1, 13, 100] {
        check::<f32, f32, f32, f32>(&MoeCase::new(&all, options(n, 8), 4), false, 2);
        check::<bf16, bf16, f32, f32>(&MoeCase::new(&all, options(n, 8), 5), false, 2);
    }
}

/// Nothing is computed, and what is asked for is there: no tokens counted, none dropped, no loss.
#[test]
fn zero_tokens() {
    let mut spec = with_shared(small(2));
    spec.router.aux_loss = Some(AuxLoss::TopK);
    let case = MoeCase::<bf16, bf16, bf16>::new(&spec, options(0, 2), 1);
    let packed = PackedMoe::pack(&spec, &case.weights()).unwrap();
    for level in Level::available() {
        for threads in [1, 3] {
            let got = call::<_, _, _, f32>(&case, &packed, level, threads, None, true);
            assert!(got.out.is_empty());
            let route = got.route.unwrap();
            assert_eq!((route.tokens_per_expert, route.dropped), (vec![0; 8], 0));
            call::<_, _, _, f32>(&case, &packed, level, threads, Some(case.experts.routing()), false);
        }
    }
    check::<bf16, bf16, bf16, f32>(&case, false, 2);
}

/// A masked token gets the shared expert alone, without one 0; NaN stays in its token.
#[test]
fn masks_and_nan() {
    for shared in [true, false] {
        let spec = if shared { with_shared(small(2)) } else { small(2) };
        let mut case = MoeCase::<f32, f32, f32>::new(&spec, options(20, 2), 7);
        case.token_mask = Some((0..20).map(|t| u8::from(t % 5 != 0)).collect());
        let packed = PackedMoe::pack(&spec, &case.weights()).unwrap();
        let mut nan = case.clone();
        nan.experts.hidden.set([7, 33], f32::NAN);
        for level in Level::available() {
            let got = call::<_, _, _, f32>(&case, &packed, level, 2, None, true);
            let spread = call::<_, _, _, f32>(&nan, &packed, level, 2, None, true);
            let ids = got.route.unwrap().ids;
            for t in 0..20 {
                let of = t * 40..(t + 1) * 40;
                if t % 5 == 0 {
                    assert_eq!(ids[t * 2..][..2], [-1, -1]);
                    assert!(shared || got.out[of.clone()].iter().all(|x| x.to_bits() == 0), "token {t} at {level}");
                }
                if t == 7 {
                    assert!(spread.out[of].iter().all(|x| x.is_nan()), "token {t} at {level}");
                } else {
                    assert_eq!(bits(&spread.out[of.clone()]), bits(&got.out[of]), "token {t} at {level}");
                }
            }
        }
    }
}

/// The router's options may change from call to call; what was packed may not.
#[test]
fn options_of_a_call() {
    let packed_for = with_shared(small(2));
    let mut case = MoeCase::<f32, f32, f32>::new(&packed_for, options(9, 2), 2);
    let packed = PackedMoe::pack(&packed_for, &case.weights()).unwrap();
    (case.spec.router.top_k, case.spec.router.score, case.spec.experts.combine_scale) = (3, Score::Sigmoid, 2.0);
    let fresh = PackedMoe::pack(&case.spec, &case.weights()).unwrap();
    for level in Level::available() {
        let [got, want] = [&packed, &fresh].map(|w| call::<_, _, _, f32>(&case, w, level, 2, None, true));
        assert_eq!(got, want, "{level}");
    }
}

#[test]
fn errors_name_the_argument_and_nothing_is_written() {
    type Edit = fn(&mut Moe, &mut MoeInput<'static, f32>);
    static F: [f32; 200] = [0.5; 200];
    static IDS: [i32; 20] = [1; 20];
    let edits: [(&str, Edit); 15] = [
        ("`top_k` is 9", |s, _| s.router.top_k = 9),
        ("`experts.num_experts` is 8", |s, _| s.router.num_experts = 4),
        ("`hidden` has shape [5, 39]", |_, i| i.hidden = View::new(&F[..195], [5, 39])),
        ("`hidden` has 199 elements", |_, i| i.hidden = View::new(&F[..199], [5, 40])),
        ("`token_mask` has 3 elements", |_, i| i.token_mask = Some(&[1, 1, 1])),
        ("`topk_ids` has shape [4, 2]", |_, i| {
            i.routing = Some(Routing::new(View::new(&IDS[..8], [4, 2]), View::new(&F[..8], [4, 2])));
        }),
        ("`topk_weights` has shape [5, 1]", |_, i| {
            i.routing = Some(Routing::new(View::new(&IDS[..10], [5, 2]), View::new(&F[..5], [5, 1])));
        }),
        ("`route` is given", |_, i| {
            i.routing = Some(Routing::new(View::new(&IDS[..10], [5, 2]), View::new(&F[..10], [5, 2])));
        }),
        ("`topk_ids` has shape [5, 2], expected [5, 3]", |s, _| s.router.top_k = 3),
        ("`weights` is packed for", |s, _| s.router_bias = true),
        ("`weights` is packed for", |s, _| s.selection_bias = true),
        ("`weights` is packed for", |s, _| s.shared = None),
        ("`weights` is packed for", |s, _| s.experts.ffn.activation = Activation::GeluErf),
        ("`weights` is packed for", |s, _| s.experts.num_local_experts = 7),
        ("`shared.hidden_size` is 39", |s, _| s.shared.as_mut().unwrap().ffn.hidden_size = 39),
    ];
    let spec = with_shared(small(2));
    let case = MoeCase::<f32, f32, f32>::new(&spec, options(5, 2), 2);
    let packed = PackedMoe::pack(&spec, &case.weights()).unwrap();
    let mut cpu = Cpu::new().unwrap();
    let mut out = Output::<f32, 2>::new([5, 40], Layout::Padded);
    let (mut ids, mut weights) = (Output::new([5, 2], Layout::Padded), Output::new([5, 2], Layout::Padded));
    let mut fails = |want: &str, spec: &Moe, input: &MoeInput<'_, f32>, shape: [usize; 2]| {
        let mut view = out.view();
        let strides = view.strides();
        let mut output = MoeOutput::new(ViewMut::with_strides(view.data_mut(), shape, strides));
        let mut route = RouteOutput::new(ids.view(), weights.view());
        let (mut counts, mut loss) = ([77; 8], 77.0);
        route.tokens_per_expert = Some(&mut counts);
        route.z_loss = Some(&mut loss);
        output.route = Some(route);
        let error = cpu::moe(&mut cpu, spec, input, &packed, output).unwrap_err();
        assert!(error.to_string().starts_with(want), "{error}");
        out.assert_untouched("out");
        ids.assert_untouched("topk_ids");
        weights.assert_untouched("topk_weights");
        assert!(counts == [77; 8] && loss == 77.0, "{error}");
    };
    for (want, edit) in edits {
        let (mut spec, mut input) = (spec.clone(), MoeInput::new(View::new(&F, [5, 40])));
        edit(&mut spec, &mut input);
        fails(want, &spec, &input, [5, 40]);
    }
    fails("`out` has shape [4, 40], expected [5, 40]", &spec, &MoeInput::new(View::new(&F, [5, 40])), [4, 40]);
    let mut many = MoeInput::new(View::new(&F, [5, 40]));
    let slots = 1 << 30;
    many.routing = Some(Routing::new(
        View::with_strides(&[], [0, slots], [slots, 1]),
        View::with_strides(&[], [0, slots], [slots, 1]),
    ));
    many.hidden = View::new(&[], [0, 40]);
    let nothing = MoeOutput::<f32>::new(ViewMut::new(&mut [], [0, 40]));
    let error = cpu::moe(&mut cpu, &spec, &many, &packed, nothing).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}
