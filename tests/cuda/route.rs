//! Routing: experts and weights of each token, losses, the router's logits.

use crate::budget::budget;
use crate::common::data::Rng;
use crate::common::routing::{LogitsCase, awkward_logits, check_route, option_table, takes_bias};
use crate::common::simulator::Simulator;
use crate::common::{Layout, RouteCase, RouteResult, seed, strategies};
use crate::{on_devices, on_gpu, on_large_devices, staged};
use gatefold::Element;
use gatefold::cuda::driver::{Buffer, Driver, Limits};
use gatefold::cuda::{Route, RouteArgs, RoutePlan, RouterLogits, RouterLogitsArgs, RouterLogitsPlan, Stream};
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, SelectOn, Selection,
};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};
use simt::Class;

fn run(driver: &dyn Driver, case: &RouteCase) -> RouteResult<f32> {
    case.run(|spec, input, output| staged::route(driver, spec, input, output))
}

fn check(driver: &dyn Driver, case: &RouteCase) -> Result<(), TestCaseError> {
    check_route("cuda", case, &run(driver, case)).map_err(TestCaseError::fail)
}

#[track_caller]
fn assert_route(driver: &dyn Driver, case: &RouteCase) {
    check_route("cuda", case, &run(driver, case)).unwrap();
}

/// Routers whose tokens are not coupled.
fn is_alone(spec: &Router) -> bool {
    !matches!(spec.selection, Selection::ExpertChoice | Selection::Sinkhorn { .. })
        && spec.capacity.is_none()
        && spec.second_expert == SecondExpert::Always
}

/// The same router without what couples tokens.
fn alone(mut spec: Router) -> Router {
    spec.capacity = None;
    spec.second_expert = SecondExpert::Always;
    if matches!(spec.selection, Selection::ExpertChoice | Selection::Sinkhorn { .. }) {
        spec.selection = Selection::TopK;
    }
    spec
}

pub fn runner(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() })
}

#[track_caller]
pub fn report<T: std::fmt::Debug>(result: Result<(), TestError<T>>) {
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn any_router() {
    let sizes = prop_oneof![0usize..20, Just(33)];
    let strategy = (strategies::router().prop_map(alone), sizes, any::<u64>(), any::<bool>(), any::<bool>());
    on_devices(false, |driver| {
        report(runner(500).run(&strategy, |(spec, n, seed, bias, masks)| {
            let mut case = RouteCase::new(&spec, n, seed);
            if bias && takes_bias(&spec) {
                case = case.with_bias();
            }
            if masks {
                case = case.with_masks();
            }
            check(driver, &case)
        }));
    });
}

/// Infinite, NaN, equal and very large logits: ids stay unique and in range, because they are those of the reference.
#[test]
fn any_logits() {
    let strategy = (strategies::router().prop_map(alone), 1usize..10, any::<u64>(), any::<bool>(), 0usize..4);
    on_devices(false, |driver| {
        report(runner(500).run(&strategy, |(spec, n, seed, bias, kind)| {
            let logits = awkward_logits(&mut Rng::new(seed), n * spec.num_experts, kind);
            let mut case = RouteCase::with_logits(&spec, n, &logits, seed);
            if bias && takes_bias(&spec) {
                case = case.with_bias();
            }
            check(driver, &case)
        }));
    });
}

#[test]
fn pairwise_options() {
    let seed = seed();
    let (cases, table) = option_table(seed, is_alone);
    on_devices(false, |driver| {
        for (i, (router, bias, masks)) in cases.iter().enumerate() {
            let mut case = RouteCase::new(router, 13, seed + i as u64);
            if *bias {
                case = case.with_bias();
            }
            if *masks {
                case = case.with_masks();
            }
            assert_route(driver, &case);
        }
    });
    println!("pairs of router options: {} of {} covered by {} cases", table.covered, table.total, table.rows.len());
    assert_eq!(table.covered, table.total);
}

#[test]
fn sizes_around_the_blocking() {
    on_devices(false, |driver| {
        for experts in [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 256, 257, 511, 513, 1023, 1024] {
            for top_k in [1, 2, 8, 31, 32] {
                if top_k > experts || (experts > 257 && top_k > 8) {
                    continue;
                }
                for score in [Score::Softmax, Score::Sigmoid] {
                    let mut router = Router::new(experts, top_k);
                    (router.score, router.renormalize) = (score, Renormalize::sum());
                    let case = RouteCase::new(&router, 2, (experts + top_k) as u64);
                    assert_route(driver, &case);
                    assert_route(driver, &case.with_bias());
                }
            }
        }
        let mut router = Router::new(1024, 32);
        router.groups = Some(ExpertGroups::new(1024, 40, GroupScore::Max));
        assert_route(driver, &RouteCase::new(&router, 3, 4));
        for tokens in [0, 1, 3, 4, 5, 8, 17, 65] {
            let mut router = Router::new(20, 3);
            for loss in [AuxLoss::TopK, AuxLoss::Switch { group_len: None }, AuxLoss::Switch { group_len: Some(9) }] {
                router.aux_loss = Some(loss);
                assert_route(driver, &RouteCase::new(&router, tokens, tokens as u64));
                assert_route(driver, &RouteCase::new(&router, tokens, tokens as u64).with_masks());
            }
        }
    });
}

#[test]
fn deepseek_v3() {
    let mut router = Router::new(256, 8);
    router.score = Score::Sigmoid;
    router.groups = Some(ExpertGroups::new(8, 4, GroupScore::Top2Sum));
    router.renormalize = Renormalize::Sum { eps: 1e-20, floor: 0.0 };
    router.scaling_factor = 2.5;
    on_devices(false, |driver| {
        for seed in 0..3 {
            assert_route(driver, &RouteCase::new(&router, 30, seed).with_bias());
        }
    });
    on_gpu(|driver| assert_route(driver, &RouteCase::new(&router, 5000, 7).with_bias()));
}

/// All equal: the lowest experts, equal weights.
#[test]
fn ties_go_to_the_lower_expert() {
    let mut router = Router::new(40, 5);
    router.renormalize = Renormalize::sum();
    on_devices(true, |driver| {
        for value in [0.0, -0.0, 3.5, f32::INFINITY, f32::NEG_INFINITY, 1e-45] {
            let got = run(driver, &RouteCase::with_logits(&router, 3, &[value; 120], 1));
            assert_eq!(got.ids, [0, 1, 2, 3, 4].repeat(3), "{value}");
            assert!(got.weights.iter().all(|w| *w == 0.2), "{value}: {:?}", got.weights);
        }
    });
}

/// vllm-project/vllm#39391: rows of NaN, as padding of a graph leaves them, gave expert 0 in every slot.
#[test]
fn rows_of_nan_choose_distinct_experts() {
    on_devices(true, |driver| {
        for experts in [8, 33, 128, 300] {
            let logits = vec![f32::NAN; 2 * experts];
            let mut router = Router::new(experts, 8);
            for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw] {
                router.score = score;
                let case = RouteCase::with_logits(&router, 2, &logits, 1);
                for case in [case.clone(), case.with_bias()] {
                    assert_eq!(run(driver, &case).ids, (0..8).collect::<Vec<i32>>().repeat(2), "{experts} {score:?}");
                }
            }
        }
    });
}

/// MetaX-MACA/vLLM-metax#270: weights are those of the scores without the bias, for every bucket of experts.
#[test]
fn a_bias_chooses_but_does_not_weigh() {
    on_devices(false, |driver| {
        for experts in [16, 64, 128, 256, 512, 1024] {
            let mut router = Router::new(experts, 8);
            for (score, select_on) in [
                (Score::Sigmoid, SelectOn::Scores),
                (Score::SqrtSoftplus, SelectOn::Scores),
                (Score::Softmax, SelectOn::Scores),
                (Score::Softmax, SelectOn::Logits),
            ] {
                (router.score, router.select_on) = (score, select_on);
                assert_route(driver, &RouteCase::new(&router, 3, experts as u64).with_bias());
            }
        }
    });
}

fn bits(weights: &[f32]) -> Vec<u32> {
    weights.iter().map(|w| w.to_bits()).collect()
}

/// Run to run, and for a token alone.
#[test]
fn same_bits_for_any_batch() {
    on_devices(true, |driver| {
        for (seed, score) in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw].into_iter().enumerate() {
            for rule in [Renormalize::None, Renormalize::sum(), Renormalize::L2, Renormalize::Softmax] {
                let mut router = Router::new(60, 7);
                (router.score, router.renormalize) = (score, rule);
                router.aux_loss = Some(AuxLoss::Switch { group_len: Some(11) });
                let case = RouteCase::new(&router, 25, seed as u64).with_masks();
                let all = run(driver, &case);
                assert_eq!(run(driver, &case), all);
                for t in [0, 3, 24] {
                    let logits = &case.logits.values()[60 * t..60 * (t + 1)];
                    let mut one = RouteCase::with_logits(&router, 1, logits, 0);
                    one.token_mask = case.token_mask.as_ref().map(|mask| vec![mask[t]]);
                    let one = run(driver, &one);
                    assert_eq!(one.ids, all.ids[7 * t..7 * (t + 1)], "token {t} alone");
                    assert_eq!(bits(&one.weights), bits(&all.weights[7 * t..7 * (t + 1)]), "token {t} alone");
                }
            }
        }
    });
}

// --- the logits ---------------------------------------------------------------------------------------------------------

fn check_logits<T: Element, W: Element>(driver: &dyn Driver) {
    let mut seed = 0;
    // Tokens around the tiles of 2, 8 and 32; experts around those of 4, 16 and 64; columns around a vector and a round.
    for (n, experts, hidden) in [
        (1, 1, 1),
        (2, 3, 7),
        (3, 16, 8),
        (7, 17, 40),
        (9, 5, 129),
        (33, 33, 264),
        (1, 65, 1030),
        (8, 128, 512),
        (5, 20, 1288),
        (0, 4, 8),
    ] {
        for layout in [Layout::Contiguous, Layout::Padded] {
            for jitter in [None, Some(0.1)] {
                if jitter.is_some() && hidden > 512 {
                    continue;
                }
                seed += 1;
                let case = LogitsCase::<T, W>::new(n, hidden, experts, jitter, layout, seed);
                case.check("cuda", &run_logits(driver, &case));
            }
        }
    }
}

fn run_logits<T: Element, W: Element>(driver: &dyn Driver, case: &LogitsCase<T, W>) -> Vec<f32> {
    case.run(|spec, x, w, bias, seed, out| staged::router_logits(driver, spec, x, w, bias, seed, out))
}

#[test]
fn router_logits() {
    on_devices(false, |driver| {
        check_logits::<f32, f32>(driver);
        check_logits::<f32, bf16>(driver);
        check_logits::<f32, f16>(driver);
        check_logits::<bf16, f32>(driver);
        check_logits::<bf16, bf16>(driver);
        check_logits::<bf16, f16>(driver);
        check_logits::<f16, f32>(driver);
        check_logits::<f16, bf16>(driver);
        check_logits::<f16, f16>(driver);
    });
}

/// The bits of a logit depend on its two rows alone: not on other tokens, nor on the tile, nor on where the rows lie.
fn check_logits_bits<T: Element, W: Element>(driver: &dyn Driver) {
    let (n, hidden, experts) = (70, 296, 70);
    let mut case = LogitsCase::<T, W>::new(n, hidden, experts, None, Layout::Contiguous, 3);
    case.bias = None;
    let all = run_logits(driver, &case);
    let (x, w) = (Buffer::from_slice(driver, &case.hidden.values()), Buffer::from_slice(driver, &case.weight.values()));
    let (x, w, out) = (x.unwrap(), w.unwrap(), Buffer::from_slice(driver, &vec![0.0f32; n * experts]).unwrap());
    let mut names = std::collections::BTreeSet::new();
    for num_sms in [1, 10, 1000] {
        let mut problem = RouterLogits::new(T::DTYPE, n, experts, hidden);
        problem.weight_dtype = W::DTYPE;
        let plan =
            RouterLogitsPlan::new(&problem, &gatefold::cuda::driver::Limits::new(80, num_sms, 99 << 10)).unwrap();
        names.insert(plan.kernel());
        // SAFETY: the buffers hold the plan's arrays and outlive the read, which waits.
        unsafe {
            plan.warmup(driver).unwrap();
            plan.launch(driver, &RouterLogitsArgs::new(x.ptr(), w.ptr(), out.ptr()), Stream::LEGACY).unwrap();
        }
        assert_eq!(bits(&out.to_vec::<f32>(Stream::LEGACY).unwrap()), bits(&all), "{}", plan.kernel());
    }
    let tiles = if T::DTYPE == W::DTYPE && T::DTYPE != gatefold::Dtype::F32 { 3 } else { 2 };
    assert_eq!(names.len(), tiles, "every tile: {names:?}");
    case.layout = Layout::Padded; // rows at odd places
    case.hidden = case.hidden.with_layout(Layout::Padded);
    case.weight = case.weight.with_layout(Layout::Padded);
    assert_eq!(bits(&run_logits(driver, &case)), bits(&all));
    for t in [0, 1, 69] {
        let mut one = LogitsCase::<T, W>::new(1, hidden, experts, None, Layout::Contiguous, 3);
        let row = &case.hidden.values()[t * hidden..(t + 1) * hidden];
        one.hidden = crate::common::Array::new([1, hidden], Layout::Contiguous, row);
        (one.weight, one.bias) = (case.weight.clone(), None);
        assert_eq!(bits(&run_logits(driver, &one)), bits(&all[t * experts..(t + 1) * experts]), "token {t} alone");
    }
}

#[test]
fn router_logits_bits() {
    on_devices(true, |driver| {
        check_logits_bits::<bf16, bf16>(driver);
        check_logits_bits::<f16, f16>(driver);
        check_logits_bits::<f32, f32>(driver);
        check_logits_bits::<bf16, f32>(driver);
        check_logits_bits::<f32, f16>(driver);
    });
}

// --- far rows and counters ----------------------------------------------------------------------------------------------

/// Rows more than 2^31 elements apart: offsets that do not fit 32 bits (vllm-project/vllm#34279). Every router, and the losses.
/// Needs 69 GB on the device.
#[test]
fn far_rows() {
    let mut routers = vec![Router::new(6, 2); 7];
    routers[1].selection = Selection::Prototypes;
    routers[2].selection = Selection::SparseMixer { jitter_eps: 0.1 };
    routers[3].selection = Selection::Sinkhorn { iterations: 2 };
    routers[4].second_expert = SecondExpert::Random;
    let mut capacity = Capacity::new(CapacityLimit::Factor(1.0));
    capacity.order = CapacityOrder::Score;
    routers[5].capacity = Some(capacity);
    routers[6] = Router::new(3, 2); // has a far row for each expert
    routers[6].capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
    routers[6].selection = Selection::ExpertChoice;
    routers.iter_mut().for_each(|router| router.aux_loss = Some(AuxLoss::TopK));
    on_large_devices(|driver| routers.iter().for_each(|router| check_far_rows(driver, router)));
}

fn check_far_rows(driver: &dyn Driver, router: &Router) {
    let (n, apart, experts, slots) = (3, (1_usize << 31) + 64, router.num_experts, router.slots());
    let far = |rows: usize, width: usize| Buffer::new(driver, ((rows - 1) * apart + width) * 4).unwrap();
    let row_at = |buffer: &Buffer<'_>, row: usize| buffer.ptr() + (4 * row * apart) as u64;
    let case = RouteCase::new(router, n, 5);
    let (logits, ids, weights) = (far(n, experts), far(n, slots), far(n, slots));
    for (t, row) in case.logits.values().chunks_exact(experts).enumerate() {
        // SAFETY: the address has room for a row, and nothing runs.
        unsafe { driver.copy_to_device(row_at(&logits, t), bytemuck::cast_slice(row)).unwrap() };
    }
    let choice = router.selection == Selection::ExpertChoice;
    let per_expert = router.expert_choice_tokens(n);
    let expert_tokens = choice.then(|| far(experts, per_expert));
    let (aux, z) = (Buffer::new(driver, 4).unwrap(), Buffer::new(driver, 4).unwrap());
    let mut problem = Route::new(router, n);
    (problem.logits_stride, problem.topk_ids_stride, problem.topk_weights_stride) = (apart, apart, apart);
    (problem.aux_loss, problem.z_loss) = (true, true);
    problem.expert_tokens_stride = choice.then_some(apart);
    let plan = RoutePlan::new(&problem).unwrap();
    let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
    let mut args = RouteArgs::new(logits.ptr(), ids.ptr(), weights.ptr());
    (args.aux_loss, args.z_loss, args.seed) = (Some(aux.ptr()), Some(z.ptr()), case.seed);
    (args.expert_tokens, args.workspace) = (expert_tokens.as_ref().map(Buffer::ptr), workspace.ptr());
    // SAFETY: the buffers hold the plan's rows and outlive the reads below, which wait.
    unsafe {
        plan.warmup(driver).unwrap();
        plan.launch(driver, &args, Stream::LEGACY).unwrap();
    }
    driver.synchronize(Stream::LEGACY).unwrap();
    fn row<T: bytemuck::Pod>(driver: &dyn Driver, at: u64, width: usize) -> Vec<T> {
        let mut row = vec![T::zeroed(); width];
        // SAFETY: the address holds a row, and nothing runs.
        unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(&mut row), at).unwrap() };
        row
    }
    let want = run(driver, &case);
    for t in 0..n {
        let of = t * slots..(t + 1) * slots;
        assert_eq!(row::<i32>(driver, row_at(&ids, t), slots), want.ids[of.clone()], "{router:?}");
        assert_eq!(bits(&row(driver, row_at(&weights, t), slots)), bits(&want.weights[of]), "{router:?}");
    }
    for (e, tokens) in want.expert_tokens.chunks_exact(per_expert.max(1)).enumerate() {
        let found: Vec<i32> = row(driver, row_at(expert_tokens.as_ref().unwrap(), e), per_expert);
        assert_eq!(found, tokens, "{router:?}");
    }
    let losses = [aux, z].map(|loss| loss.to_vec::<f32>(Stream::LEGACY).unwrap()[0]);
    assert_eq!(bits(&losses), bits(&[want.aux_loss, want.z_loss]), "{router:?}");
}

/// The same for the logits: every tile. In the simulator only: the tiles take more rows than a GPU has room for so far apart.
#[test]
fn far_rows_of_logits() {
    fn check<T: Element>(tiles: usize) {
        let simulator = Simulator::new(false);
        let driver: &dyn Driver = &simulator;
        let (apart, n, experts, hidden) = ((1_usize << 31) + 64, 70, 70, 40);
        let case = LogitsCase::<T, T>::new(n, hidden, experts, None, Layout::Contiguous, 4);
        let place = |rows: usize, width: usize, size: usize, values: &[T]| {
            let buffer = Buffer::new(driver, ((rows - 1) * apart + width) * size).unwrap();
            for (i, row) in values.chunks_exact(width).enumerate() {
                let at = buffer.ptr() + (i * apart * size) as u64;
                // SAFETY: the address has room for a row, and nothing runs.
                unsafe { driver.copy_to_device(at, bytemuck::cast_slice(row)).unwrap() };
            }
            buffer
        };
        let x = place(n, hidden, size_of::<T>(), &case.hidden.values());
        let w = place(experts, hidden, size_of::<T>(), &case.weight.values());
        let out = place(n, experts, 4, &[]);
        let bias = case.bias.as_ref().map(|bias| Buffer::from_slice(driver, bias).unwrap());
        let mut problem = RouterLogits::new(T::DTYPE, n, experts, hidden);
        (problem.hidden_stride, problem.weight_stride, problem.logits_stride) = (apart, apart, apart);
        let mut args = RouterLogitsArgs::new(x.ptr(), w.ptr(), out.ptr());
        args.bias = bias.as_ref().map(Buffer::ptr);
        let want = run_logits(driver, &case);
        let mut names = std::collections::BTreeSet::new();
        for num_sms in [1, 10, 1000] {
            let limits = gatefold::cuda::driver::Limits::new(80, num_sms, 99 << 10);
            let plan = RouterLogitsPlan::new(&problem, &limits).unwrap();
            names.insert(plan.kernel());
            // SAFETY: the buffers hold the plan's rows and outlive the reads below, which wait.
            unsafe {
                plan.warmup(driver).unwrap();
                plan.launch(driver, &args, Stream::LEGACY).unwrap();
            }
            driver.synchronize(Stream::LEGACY).unwrap();
            for (t, want) in want.chunks_exact(experts).enumerate() {
                let mut row = vec![0f32; experts];
                let at = out.ptr() + (4 * t * apart) as u64;
                // SAFETY: the address holds a row, and nothing runs.
                unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(&mut row), at).unwrap() };
                assert_eq!(bits(&row), bits(want), "{}, token {t}", plan.kernel());
            }
        }
        assert_eq!(names.len(), tiles, "{names:?}");
    }
    check::<bf16>(3);
    check::<f32>(2);
}

/// Many models' case, 64 tokens, 128 experts, top 8 renormalised: whole sectors, and instructions that do not grow unseen.
#[test]
fn counters_of_top_k() {
    let simulator = Simulator::new(false);
    let driver: &dyn Driver = &simulator;
    let mut router = Router::new(128, 8);
    router.renormalize = Renormalize::sum();
    let logits: Vec<f32> = Rng::new(1).normals(64 * 128, 2.0);
    let logits = Buffer::from_slice(driver, &logits).unwrap();
    let (ids, weights) = (Buffer::new(driver, 64 * 32).unwrap(), Buffer::new(driver, 64 * 32).unwrap());
    let plan = RoutePlan::new(&Route::new(&router, 64)).unwrap();
    // SAFETY: the buffers hold the plan's arrays; the simulator has run the work when the call returns.
    unsafe {
        plan.launch(driver, &RouteArgs::new(logits.ptr(), ids.ptr(), weights.ptr()), Stream::LEGACY).unwrap();
    }
    let counters = simulator.take_counters();
    let [(entry, c)] = &counters[..] else { panic!("{counters:?}") };
    assert_eq!(*entry, "gatefold_route_e128");
    println!("{c:?}");
    // Per token: 16 sectors of logits, one of ids, one of weights; and the chosen logits again, 8 words in at most 8 sectors.
    assert!(c.global_sectors <= 64 * (16 + 1 + 1 + 8), "{}", c.global_sectors);
    assert_eq!(c.global_bytes, 64 * (512 + 32 + 32 + 32));
    assert_eq!(c.shared_requests, 0);
    assert_eq!(c.instructions, 64 * 498);
}

/// 64 tokens, 128 experts, 2048 columns of bf16: whole sectors, no bank conflict, each matrix once per tile of the other.
#[test]
fn counters_of_logits() {
    let simulator = Simulator::new(false);
    let driver: &dyn Driver = &simulator;
    let (n, experts, hidden) = (64, 128, 2048);
    let case = LogitsCase::<bf16, bf16>::new(n, hidden, experts, None, Layout::Contiguous, 1);
    let x = Buffer::from_slice(driver, &case.hidden.values()).unwrap();
    let w = Buffer::from_slice(driver, &case.weight.values()).unwrap();
    let out = Buffer::new(driver, n * experts * 4).unwrap();
    let problem = RouterLogits::new(gatefold::Dtype::BF16, n, experts, hidden);
    let plan = RouterLogitsPlan::new(&problem, &driver.limits()).unwrap();
    // SAFETY: the buffers hold the plan's arrays; the simulator has run the work when the call returns.
    unsafe { plan.launch(driver, &RouterLogitsArgs::new(x.ptr(), w.ptr(), out.ptr()), Stream::LEGACY).unwrap() };
    let counters = simulator.take_counters();
    let [(entry, c)] = &counters[..] else { panic!("{counters:?}") };
    assert_eq!(*entry, "gatefold_router_logits_mma_bf16_16x8");
    println!("{c:?}");
    let tiles = (n / 8 * (experts / 16)) as u64;
    let bytes = tiles * (24 * hidden * 2) as u64 + (n * experts * 4) as u64;
    assert_eq!(c.global_bytes, bytes);
    assert_eq!(c.global_sectors, bytes / 32);
    assert_eq!(c.conflict_degree(), 1.0);
    assert_eq!(c.mma_flops, 2 * (n * experts * hidden) as u64);
    assert_eq!(c.instructions, 140_288);
}

/// What 2048 more columns of 32 tokens and 64 experts cost, by entry: warp instructions, MMA (or other f32) among them, sectors fetched.
fn logits_loop_cost<T: Element, W: Element>(num_sms: u32) -> (&'static str, u64, u64, u64) {
    let count = |hidden: usize| {
        let simulator = Simulator::with_limits(false, Limits::new(90, num_sms, 227 << 10));
        let driver: &dyn Driver = &simulator;
        let (n, experts) = (32, 64);
        let case = LogitsCase::<T, W>::new(n, hidden, experts, None, Layout::Contiguous, 1);
        let x = Buffer::from_slice(driver, &case.hidden.values()).unwrap();
        let w = Buffer::from_slice(driver, &case.weight.values()).unwrap();
        let out = Buffer::new(driver, n * experts * 4).unwrap();
        let mut problem = RouterLogits::new(T::DTYPE, n, experts, hidden);
        problem.weight_dtype = W::DTYPE;
        let plan = RouterLogitsPlan::new(&problem, &driver.limits()).unwrap();
        // SAFETY: the buffers hold the plan's arrays; the simulator has run the work when the call returns.
        unsafe { plan.launch(driver, &RouterLogitsArgs::new(x.ptr(), w.ptr(), out.ptr()), Stream::LEGACY).unwrap() };
        let counters = simulator.take_counters();
        let [(entry, counters)] = &counters[..] else { panic!("{counters:?}") };
        assert!(counters.conflict_degree() <= 1.0, "{entry}: bank conflicts"); // 0 without shared memory
        (*entry, *counters)
    };
    let ((entry, short), (_, long)) = (count(2048), count(4096));
    let class = if entry.contains("mma") { Class::Matrix } else { Class::Float };
    let [instructions, products, sectors] = [
        long.instructions - short.instructions,
        long.class(class) - short.class(class),
        long.global_sectors - short.global_sectors,
    ];
    assert_eq!(32 * sectors, long.global_bytes - short.global_bytes, "{entry}: sectors that are not used whole");
    let budget = budget(entry);
    // "2 MMAs of m16n8k16 and 3 loads of 16 bytes", or "8 FMA per 48 bytes that a lane fetches": what the header says.
    let bytes = if entry.contains("mma") { budget[1] * budget[2] } else { budget[1] };
    assert_eq!(products * bytes, budget[0] * sectors, "{entry}: {budget:?}");
    (entry, instructions, products, sectors)
}

/// The main loops of the logits, from the smallest tile to the largest: whole sectors, and no more instructions than these.
#[test]
fn logits_counters() {
    let found = [
        logits_loop_cost::<bf16, bf16>(16),
        logits_loop_cost::<bf16, bf16>(4),
        logits_loop_cost::<bf16, bf16>(1),
        logits_loop_cost::<f32, f32>(1000),
        logits_loop_cost::<f32, f32>(1),
        logits_loop_cost::<bf16, f32>(1000),
        logits_loop_cost::<bf16, f32>(1),
    ];
    let expected = [
        ("gatefold_router_logits_mma_bf16_16x8", 22_272, 2048, 49_152),
        ("gatefold_router_logits_mma_bf16_16x32", 12_544, 2048, 24_576),
        ("gatefold_router_logits_mma_bf16_64x32", 7680, 2048, 12_288),
        ("gatefold_router_logits_f32_f32_t2", 651_264, 131_072, 786_432),
        ("gatefold_router_logits_f32_f32_t8", 270_336, 131_072, 196_608),
        ("gatefold_router_logits_bf16_f32_t2", 716_800, 131_072, 524_288),
        ("gatefold_router_logits_bf16_f32_t8", 286_720, 131_072, 131_072),
    ];
    assert_eq!(found, expected);
}
