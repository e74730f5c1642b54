//! Blocks, experts and whole mixtures: sort, products and sums in a row, against the reference.

use super::route::{report, runner};
use crate::common::mixtures;
use crate::common::naive::Store;
use crate::common::simulator::Simulator;
use crate::common::sums::{assert_sums, bits, naive_experts};
use crate::common::tables::{Table, mixture};
use crate::common::{Array, ExpertCase, ExpertOptions, GateUp, Layout, MoeCase, MoeResult, Output, Rng, strategies};
use crate::{is_simulated, on_devices, on_gpu, staged};
use gatefold::args::Routing;
use gatefold::cuda::driver::Driver;
use gatefold::spec::{
    Activation, Capacity, CapacityLimit, ExpertFfn, Ffn, Moe, Renormalize, Router, Score, SharedExpert, WeightOn,
};
use gatefold::{Dtype, Element, ViewMut, reference};
use half::{bf16, f16};
use proptest::prelude::*;

// --- experts ----------------------------------------------------------------------------------------------------------

/// Sizes that the products take: rows of whole 16 bytes, arrays whose rows stay there.
fn aligned((mut spec, mut options): (ExpertFfn, ExpertOptions)) -> (ExpertFfn, ExpertOptions) {
    let ffn = &mut spec.ffn;
    ffn.hidden_size = ffn.hidden_size.next_multiple_of(8).max(16);
    ffn.intermediate_size = ffn.intermediate_size.next_multiple_of(8).max(16);
    if options.layout != Layout::Contiguous {
        options.layout = Layout::Aligned;
    }
    (spec, options)
}

pub fn experts_of<T: Element>(driver: &dyn Driver, case: &ExpertCase<T, T>) -> Vec<T> {
    let weights = case.weights();
    case.run(|spec, hidden, routing, out| staged::expert_ffn(driver, spec, hidden, routing, &weights, out))
}

/// Some of the tokens of a call.
fn part<T: Element>(case: &ExpertCase<T, T>, tokens: std::ops::Range<usize>) -> ExpertCase<T, T> {
    fn rows<E: bytemuck::Pod>(array: &Array<E, 2>, tokens: &std::ops::Range<usize>, layout: Layout) -> Array<E, 2> {
        let width = array.shape()[1];
        Array::new([tokens.len(), width], layout, &array.values()[tokens.start * width..tokens.end * width])
    }
    let mut part = case.clone();
    part.options.num_tokens = tokens.len();
    part.hidden = rows(&case.hidden, &tokens, case.options.layout);
    part.ids = rows(&case.ids, &tokens, case.options.layout);
    part.topk_weights = rows(&case.topk_weights, &tokens, case.options.layout);
    part
}

/// Against the reference, then bit for bit: again, and some of the tokens alone. `exact`: the device's instructions do not err at
/// random.
fn check_experts<T: Element>(driver: &dyn Driver, case: &ExpertCase<T, T>, exact: bool, seed: u64) {
    let (spec, width, n) = (&case.spec, case.spec.ffn.hidden_size, case.options.num_tokens);
    let what = format!("{:?}, {spec:?}, {:?}", T::DTYPE, case.options);
    let weights = case.weights();
    let truth: Vec<f64> =
        case.run(|spec, hidden, routing, out| reference::expert_ffn(spec, hidden, routing, &weights, out));
    let naive: Vec<T> = naive_experts(case, Store::Storage, Store::Storage);
    let got = experts_of(driver, case);
    // The outputs of a token share its inner values, so the luck of a few sums: more tokens where those are few.
    assert_sums(&what, &got, &truth, &naive, width * 128usize.div_ceil(spec.ffn.intermediate_size));
    if exact && n > 0 {
        assert!(bits(&got) == bits(&experts_of(driver, case)), "{what}: again");
        let first = seed as usize % n;
        let end = first + 1 + (seed >> 32) as usize % (n - first);
        for tokens in [first..end, first..first + 1] {
            let alone = experts_of(driver, &part(case, tokens.clone()));
            assert!(bits(&got[tokens.start * width..tokens.end * width]) == bits(&alone), "{what}: {tokens:?} alone");
        }
    }
}

/// Random calls, each with or without errors of the instructions in the simulator; the same on a GPU.
fn random_calls<S: Strategy>(cases: u32, calls: S, check: impl Fn(&dyn Driver, S::Value, bool, u64)) {
    let calls = (calls, any::<bool>(), any::<u64>());
    let run = |gpu: Option<&dyn Driver>| {
        report(runner(cases).run(&calls, |(call, exact, seed)| {
            match gpu {
                Some(driver) => check(driver, call, true, seed),
                None => check(&Simulator::new(!exact), call, exact, seed),
            }
            Ok(())
        }));
    };
    if is_simulated() {
        run(None);
    }
    on_gpu(|driver| run(Some(driver)));
}

fn run_experts<T: Element>(driver: &dyn Driver, call: (ExpertFfn, ExpertOptions), exact: bool, seed: u64) {
    let (spec, options) = aligned(call);
    check_experts(driver, &ExpertCase::<T, T>::new(&spec, options, seed), exact, seed);
}

#[test]
fn experts_bf16() {
    random_calls(6, strategies::experts(16, 32, 16), run_experts::<bf16>);
}

#[test]
fn experts_f16() {
    random_calls(6, strategies::experts(17, 24, 40), run_experts::<f16>);
}

#[test]
fn experts_f32() {
    random_calls(6, strategies::experts(12, 32, 16), run_experts::<f32>);
}

pub fn options(num_tokens: usize, slots: usize) -> ExpertOptions {
    ExpertOptions { num_tokens, slots, gate_up: GateUp::Halves, layout: Layout::Aligned }
}

/// Every expert of one token; one expert for all tokens, across all classes of row tiles; many experts of which few are used; the
/// same expert twice.
#[test]
fn extreme_routings() {
    let ffn = Ffn::gated(40, 24, Activation::Silu);
    let all = ExpertFfn::new(16, ffn);
    on_devices(true, |driver| {
        check_experts(driver, &ExpertCase::<bf16, bf16>::new(&all, options(13, 16), 1), true, 5);
        for n in [17, 40, 130] {
            let mut skewed = ExpertCase::<f32, f32>::new(&all, options(n, 2), 2);
            skewed.ids = Array::new([n, 2], Layout::Aligned, &[7, -1].repeat(n));
            check_experts(driver, &skewed, true, 1 << 33);
        }
        let many = ExpertFfn::new(1024, Ffn::gated(24, 8, Activation::Silu));
        check_experts(driver, &ExpertCase::<bf16, bf16>::new(&many, options(9, 8), 3), true, 9);
        let mut twice = ExpertCase::<f32, f32>::new(&all, options(9, 2), 4);
        twice.ids = Array::new([9, 2], Layout::Aligned, &[3; 18]);
        check_experts(driver, &twice, true, 3);
    });
}

/// Ids of others are skipped, whatever their weight; a token without experts gets 0; NaN stays in its token.
#[test]
fn what_is_skipped_and_what_spreads() {
    let mut spec = ExpertFfn::new(8, Ffn::gated(32, 24, Activation::GeluTanh));
    (spec.first_expert, spec.num_local_experts) = (2, 3);
    let mut case = ExpertCase::<f32, f32>::new(&spec, options(14, 2), 6);
    let strangers = [-1, i32::MIN, i32::MAX, 0, 1, 5, 7, 8];
    let ids: Vec<i32> = (0..28).map(|i| if i < 16 { strangers[i % 8] } else { 2 + i as i32 % 3 }).collect();
    let weights: Vec<f32> = (0..28).map(|i| if i < 16 { f32::NAN } else { 0.5 }).collect();
    case.ids = Array::new([14, 2], Layout::Aligned, &ids);
    case.topk_weights = Array::new([14, 2], Layout::Aligned, &weights);
    case.hidden.set([10, 4], f32::NAN);
    case.hidden.set([12, 4], f32::INFINITY);
    on_devices(true, |driver| {
        for (t, row) in experts_of(driver, &case).chunks(32).enumerate() {
            match t {
                0..8 => assert!(row.iter().all(|x| x.to_bits() == 0), "token {t}"),
                10 => assert!(row.iter().all(|x| x.is_nan()), "token {t}"),
                12 => assert!(row.iter().all(|x| !x.is_finite()), "token {t}"),
                _ => assert!(row.iter().all(|x| x.is_finite()), "token {t}"),
            }
        }
    });
}

/// A rank's slice of the experts, added up over the ranks, is the whole; a rank without experts gives 0.
#[test]
fn ranks_add_up() {
    let whole = ExpertFfn::new(8, Ffn::gated(32, 16, Activation::Silu));
    let case = ExpertCase::<f32, f32>::new(&whole, options(21, 3), 7);
    on_devices(true, |driver| {
        let want = experts_of(driver, &case);
        let mut sums = vec![0.0; want.len()];
        for (first, count) in [(0, 3), (3, 5), (8, 0)] {
            let mut rank = case.clone();
            (rank.spec.first_expert, rank.spec.num_local_experts) = (first, count);
            let cut = |array: &Array<f32, 3>| {
                let [_, rows, cols] = array.shape();
                let values = &array.values()[first * rows * cols..(first + count) * rows * cols];
                Array::new([count, rows, cols], Layout::Contiguous, values)
            };
            rank.gate_up = case.gate_up.iter().map(cut).collect();
            rank.down = cut(&case.down);
            let part = experts_of(driver, &rank);
            assert!(count > 0 || part.iter().all(|x| x.to_bits() == 0));
            sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        for (sum, want) in sums.iter().zip(&want) {
            assert!((sum - want).abs() <= 1e-6 * (1.0 + want.abs()), "{sum} {want}");
        }
    });
}

// --- one block ----------------------------------------------------------------------------------------------------------

fn check_mlp<T: Element>(driver: &dyn Driver, ffn: &Ffn, num_tokens: usize, seed: u64) {
    // The only expert, with weight 1.
    let mut case = ExpertCase::<T, T>::new(&ExpertFfn::new(1, *ffn), options(num_tokens, 1), seed);
    case.ids = Array::new([num_tokens, 1], Layout::Aligned, &vec![0; num_tokens]);
    case.topk_weights = Array::new([num_tokens, 1], Layout::Aligned, &vec![1.0; num_tokens]);
    let weights = case.weights();
    let mut out = Output::<T, 2>::new([num_tokens, ffn.hidden_size], Layout::Aligned);
    staged::mlp(driver, ffn, case.hidden.view(), &weights.expert(0), out.view()).unwrap();
    let got = out.finish("out");
    // As the experts do it, bit for bit: a rounding of the row before the sum changes nothing.
    assert!(bits(&got) == bits(&experts_of(driver, &case)), "{ffn:?}, {num_tokens} tokens");
    let truth: Vec<f64> =
        case.run(|spec, hidden, routing, out| reference::expert_ffn(spec, hidden, routing, &weights, out));
    let naive: Vec<T> = naive_experts(&case, Store::Storage, Store::Storage);
    assert_sums(&format!("{ffn:?}, {num_tokens} tokens"), &got, &truth, &naive, ffn.hidden_size * 4);
}

#[test]
fn mlp_is_the_only_expert() {
    let mut clamped = Ffn::gated(48, 40, Activation::SwigluClamped { alpha: 1.7, limit: 7.0 });
    (clamped.up_bias, clamped.down_bias) = (true, true);
    on_devices(true, |driver| {
        for n in [0, 1, 29, 65] {
            check_mlp::<bf16>(driver, &clamped, n, 9);
            check_mlp::<f32>(driver, &Ffn::plain(32, 64, Activation::ReluSquared), n, 8);
        }
    });
}

// --- mixtures -----------------------------------------------------------------------------------------------------------

pub fn mixture_of<T: Element, Q: Element>(
    driver: &dyn Driver,
    case: &MoeCase<T, T, Q>,
    given: Option<Routing<'_, f32>>,
    ask: bool,
) -> MoeResult<T, f32> {
    let weights = case.weights();
    case.run(given, ask, |spec, input, output| staged::moe(driver, spec, input, &weights, output))
}

/// The routing is computed inside, or (`given`) that of the case is used. `exact`: the device's instructions do not err at random.
pub fn check_mixture<T: Element, Q: Element>(driver: &dyn Driver, case: &MoeCase<T, T, Q>, given: bool, exact: bool) {
    let backend = mixtures::Backend::<T, T, Q, T> {
        who: "cuda".into(),
        inner: Store::Storage,
        rows: Store::Storage,
        exact,
        moe: &|case, given, ask| mixture_of(driver, case, given, ask),
        logits: &|case| {
            let shape = [case.num_tokens(), case.spec.router.num_experts];
            let mut logits = vec![0.0; shape[0] * shape[1]];
            let (spec, hidden, router) = (&case.spec.router, case.experts.hidden.view(), case.router.view());
            let (bias, out) = (case.router_bias.as_deref(), ViewMut::new(&mut logits, shape));
            staged::router_logits(driver, spec, hidden, router, bias, case.seed, out).unwrap();
            logits
        },
    };
    mixtures::check_mixture(&backend, case, given);
}

/// The routing is computed inside in half of the calls.
fn run_mixture<T: Element, Q: Element>(
    driver: &dyn Driver,
    (mut spec, mut options, mask): (Moe, ExpertOptions, bool),
    exact: bool,
    seed: u64,
) {
    (spec.experts, options) = aligned((spec.experts, options));
    if let Some(shared) = &mut spec.shared {
        shared.ffn.hidden_size = spec.experts.ffn.hidden_size;
        shared.ffn.intermediate_size = shared.ffn.intermediate_size.next_multiple_of(8);
    }
    let mut case = MoeCase::<T, T, Q>::new(&spec, options, seed);
    if mask {
        case = case.with_mask();
    }
    check_mixture(driver, &case, seed.is_multiple_of(2), exact);
}

#[test]
fn mixtures_bf16() {
    random_calls(8, mixtures::mixtures(16, 32, 16), run_mixture::<bf16, bf16>);
}

#[test]
fn mixtures_bf16_with_a_router_in_f32() {
    random_calls(8, mixtures::mixtures(12, 24, 32), run_mixture::<bf16, f32>);
}

#[test]
fn mixtures_f16() {
    random_calls(8, mixtures::mixtures(12, 24, 32), run_mixture::<f16, f16>);
}

#[test]
fn mixtures_f32() {
    random_calls(8, mixtures::mixtures(12, 32, 16), run_mixture::<f32, f32>);
}

/// Every pair of values of two options of router, experts and mixture, in another table and with other numbers for each seed.
#[test]
fn every_pair_of_options_of_a_mixture() {
    fn check_row<T: Element>(driver: &dyn Driver, call: &mixture::Call, exact: bool, seed: u64) {
        match call.router {
            Dtype::F32 => check_as::<T, f32>(driver, call, exact, seed),
            Dtype::BF16 => check_as::<T, bf16>(driver, call, exact, seed),
            _ => check_as::<T, f16>(driver, call, exact, seed),
        }
    }
    fn check_as<T: Element, Q: Element>(driver: &dyn Driver, call: &mixture::Call, exact: bool, seed: u64) {
        let (spec, options) = mixture::finish(call);
        let mut case = MoeCase::<T, T, Q>::new(&spec, options, seed);
        if call.route.token_mask {
            case = case.with_mask();
        }
        check_mixture(driver, &case, call.given.is_some(), exact);
    }
    let table = mixture::table().and(Table::new(vec![
        ("layout", vec![("contiguous", |_| {}), ("aligned", |c| c.experts.options.layout = Layout::Aligned)]),
        (
            "type",
            vec![
                ("f32", |_| {}),
                ("bf16", |c| c.experts.types.0 = Dtype::BF16),
                ("f16", |c| c.experts.types.0 = Dtype::F16),
            ],
        ),
        ("router", vec![("f32", |_| {}), ("bf16", |c| c.router = Dtype::BF16), ("f16", |c| c.router = Dtype::F16)]),
    ]));
    let base = mixture::base(40, 24);
    let run = |gpu: Option<&dyn Driver>| {
        for seed in 0..3 {
            let pairs = table.rows("mixtures", &base, seed, mixture::valid);
            for (i, row) in pairs.rows.iter().enumerate() {
                let call = table.apply(&base, row);
                let (exact, seed) = ((i as u64 + seed).is_multiple_of(2), 1000 * seed + i as u64);
                let simulator = Simulator::new(!exact);
                let (driver, exact) = gpu.map_or((&simulator as &dyn Driver, exact), |gpu| (gpu, true));
                println!("{}", table.describe(row));
                match call.experts.types.0 {
                    Dtype::F32 => check_row::<f32>(driver, &call, exact, seed),
                    Dtype::BF16 => check_row::<bf16>(driver, &call, exact, seed),
                    _ => check_row::<f16>(driver, &call, exact, seed),
                }
            }
        }
    };
    if is_simulated() {
        run(None);
    }
    on_gpu(|driver| run(Some(driver)));
}

/// 8 experts of a block of 40 x 24.
pub fn small(top_k: usize) -> Moe {
    Moe::new(Router::new(8, top_k), ExpertFfn::new(8, Ffn::gated(40, 24, Activation::Silu)))
}

pub fn with_shared(mut spec: Moe) -> Moe {
    let mut shared = SharedExpert::new(Ffn::gated(40, 32, Activation::Silu));
    shared.sigmoid_gate = true;
    spec.shared = Some(shared);
    spec
}

/// All tokens on one expert; every expert for every token; weights on the input and a scale; no tokens, also with jitter, a capacity
/// and a mask.
#[test]
fn extreme_mixtures() {
    let mut one = small(1);
    (one.router_bias, one.router.score) = (true, Score::Sigmoid);
    let mut all = with_shared(small(8));
    (all.router.renormalize, all.experts.weight_on, all.experts.combine_scale) =
        (Renormalize::sum(), WeightOn::Input, 0.5);
    let mut jittered = Moe::new(Router::new(1, 1), ExpertFfn::new(1, Ffn::plain(16, 16, Activation::Silu)));
    (jittered.router.jitter, jittered.router.capacity) = (Some(0.01), Some(Capacity::new(CapacityLimit::Tokens(2))));
    (jittered.experts.weight_on, jittered.experts.combine_scale) = (WeightOn::Input, 0.5);
    jittered.shared = Some(SharedExpert::new(Ffn::plain(16, 16, Activation::Relu)));
    jittered.shared.as_mut().unwrap().sigmoid_gate = true;
    on_devices(true, |driver| {
        let mut case = MoeCase::<f32, f32, f32>::new(&one, options(70, 1), 3);
        case.router_bias = Some((0..8).map(|e| if e == 5 { 1000.0 } else { 0.0 }).collect());
        check_mixture(driver, &case, false, true);
        for n in [0, 1, 13] {
            check_mixture(driver, &MoeCase::<bf16, bf16, bf16>::new(&all, options(n, 8), 5), false, true);
        }
        check_mixture(driver, &MoeCase::<f32, f32, f32>::new(&jittered, options(0, 1), 7).with_mask(), false, true);
        check_mixture(driver, &MoeCase::<bf16, bf16, f32>::new(&jittered, options(0, 1), 7).with_mask(), false, true);
        let nobody = mixture_of(driver, &MoeCase::<bf16, bf16, bf16>::new(&all, options(0, 8), 1), None, true);
        let route = nobody.route.unwrap();
        assert_eq!((route.tokens_per_expert, route.dropped), (vec![0; 8], 0));
    });
}

/// A masked token gets the shared expert alone, without one 0; NaN stays in its token, and its experts are distinct all the same.
#[test]
fn masks_and_nan() {
    for shared in [true, false] {
        let spec = if shared { with_shared(small(2)) } else { small(2) };
        let mut case = MoeCase::<f32, f32, f32>::new(&spec, options(20, 2), 7);
        case.token_mask = Some((0..20).map(|t| u8::from(t % 5 != 0)).collect());
        let mut nan = case.clone();
        nan.experts.hidden.set([7, 33], f32::NAN);
        on_devices(true, |driver| {
            let got = mixture_of(driver, &case, None, true);
            let spread = mixture_of(driver, &nan, None, true);
            let (ids, nan_ids) = (got.route.unwrap().ids, spread.route.unwrap().ids);
            for t in 0..20 {
                let of = t * 40..(t + 1) * 40;
                if t % 5 == 0 {
                    assert_eq!(ids[t * 2..][..2], [-1, -1]);
                    assert!(shared || got.out[of.clone()].iter().all(|x| x.to_bits() == 0), "token {t}");
                }
                if t == 7 {
                    assert!(spread.out[of].iter().all(|x| x.is_nan()), "token {t}");
                    assert!(nan_ids[14] != nan_ids[15] && nan_ids[14..16].iter().all(|id| (0..8).contains(id)));
                } else {
                    assert_eq!(bits(&spread.out[of.clone()]), bits(&got.out[of]), "token {t}");
                }
            }
        });
    }
}

/// Some of the tokens of a large call: their bits, which are those that they have alone, against the reference.
fn check_sampled(driver: &dyn Driver, experts: usize, hidden: usize, inter: usize, num_tokens: &[usize]) {
    let ffn = Ffn::gated(hidden, inter, Activation::Silu);
    let mut spec = Moe::new(Router::new(experts, 8), ExpertFfn::new(experts, ffn));
    spec.router.renormalize = Renormalize::sum();
    let options = ExpertOptions { layout: Layout::Contiguous, ..options(num_tokens[num_tokens.len() - 1], 8) };
    spec.experts.num_local_experts = 0; // their weights come below
    let mut case = MoeCase::<bf16, bf16, bf16>::new(&spec, options, 1);
    // The same numbers again and again: one for each weight would take minutes.
    let values: Vec<bf16> = Rng::new(2).normals((1 << 16) + 1, (hidden as f64).sqrt().recip());
    let weights = |rows: usize, cols: usize| {
        let values: Vec<bf16> = values.iter().copied().cycle().take(experts * rows * cols).collect();
        Array::new([experts, rows, cols], Layout::Contiguous, &values)
    };
    (case.experts.gate_up, case.experts.down) = (vec![weights(2 * inter, hidden)], weights(hidden, inter));
    (case.spec.experts.num_local_experts, case.experts.spec.num_local_experts) = (experts, experts);
    for n in num_tokens {
        let all = mixture_of(driver, &case.part(0..*n), None, false);
        for t in [0, n / 2, n - 1] {
            let one = case.part(t..t + 1);
            check_mixture(driver, &one, false, true);
            let alone = mixture_of(driver, &one, None, false);
            assert!(bits(&alone.out) == bits(&all.out[t * hidden..(t + 1) * hidden]), "token {t} of {n}");
        }
    }
}

/// Qwen3-30B-A3B (`tests/configs`), where there is a GPU.
#[test]
fn real_sizes() {
    on_devices(true, |driver| check_sampled(driver, 16, 40, 24, &[5, 40]));
    on_gpu(|driver| check_sampled(driver, 128, 2048, 768, &[512, 4096]));
}
