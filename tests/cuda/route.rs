//! Routing: experts and weights of each token, losses, the router's logits.

use crate::common::data::Rng;
use crate::common::routing::{awkward_logits, check_route, option_table, takes_bias};
use crate::common::{RouteCase, RouteResult, seed, strategies};
use crate::{on_devices, on_gpu, staged};
use gatefold::cuda::driver::Driver;
use gatefold::spec::{
    AuxLoss, ExpertGroups, GroupScore, Renormalize, Router, Score, SecondExpert, SelectOn, Selection,
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

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() })
}

#[track_caller]
fn report<T: std::fmt::Debug>(result: Result<(), TestError<T>>) {
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
