//! Routers whose tokens are coupled: capacity and second experts by chance, expert choice, Sinkhorn.

use crate::common::data::Rng;
use crate::common::routing::{awkward_logits, check_route, option_table, takes_bias};
use crate::common::simulator::Simulator;
use crate::common::{RouteCase, RouteResult, seed, strategies};
use crate::{on_devices, on_gpu, staged};
use gatefold::cuda::driver::Driver;
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, Renormalize, Router, Score, SecondExpert, SelectOn, Selection,
};
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};

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

fn is_coupled(spec: &Router) -> bool {
    matches!(spec.selection, Selection::ExpertChoice | Selection::Sinkhorn { .. })
        || spec.capacity.is_some()
        || spec.second_expert == SecondExpert::Random
}

/// Runs a property on cases of a strategy whose tokens are coupled.
#[track_caller]
fn for_all<T: std::fmt::Debug>(
    cases: u32,
    strategy: impl Strategy<Value = T>,
    test: impl Fn(T) -> Result<(), TestCaseError>,
) {
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    match TestRunner::new(config).run(&strategy, test) {
        Err(TestError::Fail(why, case)) => panic!("{why}: {case:?}"),
        other => other.unwrap(),
    }
}

fn coupled_router() -> impl Strategy<Value = Router> {
    strategies::router().prop_filter("tokens are not coupled", is_coupled)
}

#[test]
fn any_coupled_router() {
    let sizes = prop_oneof![0usize..20, Just(33)];
    let strategy = (coupled_router(), sizes, any::<u64>(), any::<bool>(), any::<bool>());
    on_devices(false, |driver| {
        for_all(150, &strategy, |(spec, n, seed, bias, masks)| {
            let mut case = RouteCase::new(&spec, n, seed);
            if bias && takes_bias(&spec) {
                case = case.with_bias();
            }
            if masks {
                case = case.with_masks();
            }
            check(driver, &case)
        });
    });
}

/// Infinite, NaN, equal and very large logits: queues and choices are those of the reference.
#[test]
fn any_logits_of_coupled_routers() {
    let strategy = (coupled_router(), 1usize..10, any::<u64>(), any::<bool>(), 0usize..4);
    on_devices(false, |driver| {
        for_all(150, &strategy, |(spec, n, seed, bias, kind)| {
            let logits = awkward_logits(&mut Rng::new(seed), n * spec.num_experts, kind);
            let mut case = RouteCase::with_logits(&spec, n, &logits, seed);
            if bias && takes_bias(&spec) {
                case = case.with_bias();
            }
            check(driver, &case)
        });
    });
}

#[test]
fn pairwise_options_of_coupled_routers() {
    let seed = seed();
    let (rows, table) = option_table(seed, is_coupled);
    on_devices(false, |driver| {
        for (i, (router, bias, masks)) in rows.iter().enumerate() {
            let mut case = RouteCase::new(router, 45, seed + i as u64);
            if *bias {
                case = case.with_bias();
            }
            if *masks {
                case = case.with_masks();
            }
            assert_route(driver, &case);
        }
    });
    println!(
        "pairs of options of coupled routers: {} of {} covered by {} cases",
        table.covered,
        table.total,
        rows.len()
    );
    assert_eq!(table.covered, table.total);
}

fn with_capacity(experts: usize, top_k: usize, limit: CapacityLimit) -> Router {
    let mut router = Router::new(experts, top_k);
    router.capacity = Some(Capacity::new(limit));
    router
}

/// Queues of more than one round, experts around the words of their counts, groups of which the last is shorter.
#[test]
fn queues_of_all_sizes() {
    on_devices(false, |driver| {
        for (tokens, experts, top_k) in
            [(0, 4, 2), (1, 1, 1), (31, 7, 2), (512, 9, 1), (2049, 8, 2), (4097, 2, 1), (700, 64, 8), (100, 1024, 2)]
        {
            for order in [CapacityOrder::Position, CapacityOrder::Score] {
                for group_len in [None, Some(97), Some(1)] {
                    if tokens > 1000 && group_len == Some(1) {
                        continue;
                    }
                    let mut router = with_capacity(experts, top_k, CapacityLimit::Factor(0.75));
                    let mut capacity = router.capacity.unwrap();
                    (capacity.order, capacity.group_len) = (order, group_len);
                    router.capacity = Some(capacity);
                    assert_route(driver, &RouteCase::new(&router, tokens, tokens as u64).with_masks());
                }
            }
        }
    });
}

/// All tokens want one expert; a limit that nobody reaches; equal scores.
#[test]
fn queues_at_the_limit() {
    on_devices(false, |driver| {
        for limit in [1, 5, 40, usize::MAX] {
            for order in [CapacityOrder::Position, CapacityOrder::Score] {
                let mut router = with_capacity(3, 2, CapacityLimit::Tokens(limit));
                let mut capacity = router.capacity.unwrap();
                (capacity.order, capacity.normalize_after_drop) = (order, true);
                router.capacity = Some(capacity);
                router.renormalize = Renormalize::sum();
                let logits: Vec<f32> = (0..40 * 3).map(|i| [2.0, 1.0, -1.0][i % 3]).collect();
                assert_route(driver, &RouteCase::with_logits(&router, 40, &logits, 1));
            }
        }
    });
}

/// GShard: the second expert by Philox, with every byte of the seed.
#[test]
fn second_experts_by_chance() {
    on_devices(false, |driver| {
        for seed in [0, 1, 0xDEAD_BEEF_0123_4567, u64::MAX] {
            for score in [Score::Softmax, Score::Sigmoid] {
                let mut router = Router::new(8, 2);
                (router.score, router.second_expert) = (score, SecondExpert::Random);
                router.renormalize = Renormalize::sum();
                router.scaling_factor = 3.0;
                let mut case = RouteCase::new(&router, 200, 7).with_masks();
                case.seed = seed;
                assert_route(driver, &case);
                router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
                let mut case = RouteCase::new(&router, 200, 7);
                case.seed = seed;
                assert_route(driver, &case);
            }
        }
    });
}

#[test]
fn expert_choice_of_all_sizes() {
    on_devices(false, |driver| {
        for (tokens, experts) in [(0, 4), (1, 1), (33, 31), (70, 64), (129, 33), (600, 9), (3, 1024)] {
            for (i, score) in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw].into_iter().enumerate()
            {
                for select_on in [SelectOn::Scores, SelectOn::Logits] {
                    let factor = [0.5, 1.0, 2.0, 1e6][i]; // the last: all tokens, but the masked ones
                    let mut router = with_capacity(experts, 1, CapacityLimit::Factor(factor));
                    (router.selection, router.score, router.select_on) = (Selection::ExpertChoice, score, select_on);
                    router.renormalize = [Renormalize::None, Renormalize::sum(), Renormalize::L2][(i + tokens) % 3];
                    let case = RouteCase::new(&router, tokens, 3 * i as u64);
                    assert_route(driver, &case);
                    assert_route(driver, &case.with_masks());
                }
            }
        }
    });
}

#[test]
fn sinkhorn_of_all_sizes() {
    on_devices(false, |driver| {
        for (tokens, experts) in [(0, 4), (1, 1), (33, 31), (70, 64), (65, 33), (500, 3), (3, 1024)] {
            for iterations in [1, 3, 8] {
                let mut router = Router::new(experts, 1);
                router.selection = Selection::Sinkhorn { iterations };
                assert_route(driver, &RouteCase::new(&router, tokens, iterations as u64));
                assert_route(driver, &RouteCase::new(&router, tokens, iterations as u64).with_masks());
            }
        }
    });
}

/// The same bits on every schedule.
#[test]
fn coupled_bits() {
    on_devices(true, |driver| {
        let mut routers = vec![with_capacity(24, 4, CapacityLimit::Factor(1.0)); 3];
        routers[1].selection = Selection::ExpertChoice;
        routers[2].selection = Selection::Sinkhorn { iterations: 3 };
        for router in routers {
            let case = RouteCase::new(&router, 300, 5).with_masks();
            let first = run(driver, &case);
            for _ in 0..2 {
                assert_eq!(run(driver, &case), first, "{router:?}");
            }
        }
    });
}

/// Thousands of tokens in the simulator: many rounds of a queue, many tiles and segments of a sort, long sums of the losses.
#[test]
fn coupled_in_the_thousands() {
    let tokens = 4096;
    let simulator = Simulator::new(false);
    let mut score = with_capacity(128, 2, CapacityLimit::Factor(1.25));
    let mut capacity = score.capacity.unwrap();
    (capacity.order, capacity.group_len) = (CapacityOrder::Score, Some(1500));
    score.capacity = Some(capacity);
    score.aux_loss = Some(AuxLoss::TopK);
    let mut position = with_capacity(128, 8, CapacityLimit::Factor(1.0));
    position.aux_loss = Some(AuxLoss::Switch { group_len: Some(1000) });
    let mut sinkhorn = Router::new(128, 2);
    sinkhorn.selection = Selection::Sinkhorn { iterations: 2 };
    sinkhorn.aux_loss = Some(AuxLoss::Switch { group_len: None });
    for router in [score, position, sinkhorn] {
        assert_route(&simulator, &RouteCase::new(&router, tokens, 1).with_masks());
    }
    let mut choice = with_capacity(128, 2, CapacityLimit::Factor(1.0));
    choice.selection = Selection::ExpertChoice;
    assert_route(&simulator, &RouteCase::new(&choice, tokens / 2, 1).with_masks());
}

/// Sizes of training.
#[test]
fn coupled_at_scale() {
    on_gpu(|driver| {
        let mut score = with_capacity(64, 2, CapacityLimit::Factor(1.25));
        let mut capacity = score.capacity.unwrap();
        capacity.order = CapacityOrder::Score;
        score.capacity = Some(capacity);
        let mut choice = with_capacity(64, 2, CapacityLimit::Factor(1.0));
        choice.selection = Selection::ExpertChoice;
        let mut sinkhorn = Router::new(128, 1);
        sinkhorn.selection = Selection::Sinkhorn { iterations: 8 };
        for router in [with_capacity(128, 2, CapacityLimit::Factor(1.25)), score, choice, sinkhorn] {
            assert_route(driver, &RouteCase::new(&router, 16384, 1));
        }
    });
}
