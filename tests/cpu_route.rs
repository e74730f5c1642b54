//! Routing on the CPU against the reference: every option, every level, ids to the bit.

mod common;

use common::data::Rng;
use common::routing::{check_route, option_table, takes_bias};
use common::*;
use gatefold::cpu::{self, Cpu, Level};
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, ExpertGroups, GroupScore, Renormalize, Router, Score, SecondExpert, Selection,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn run(case: &RouteCase, level: Level) -> RouteResult<f32> {
    let mut cpu = Cpu::with_level(level);
    case.run(|spec, input, output| cpu::route(&mut cpu, spec, input, output))
}

fn check(case: &RouteCase, level: Level) -> Result<(), TestCaseError> {
    check_route(&level.to_string(), case, &run(case, level)).map_err(TestCaseError::fail)
}

fn assert_all_levels(case: &RouteCase) {
    for level in Level::available() {
        check(case, level).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_router(
        spec in strategies::router(),
        n in prop_oneof![0usize..40, Just(129), Just(300)],
        seed in any::<u64>(),
        bias in any::<bool>(),
        masks in any::<bool>(),
    ) {
        let mut case = RouteCase::new(&spec, n, seed);
        if bias && takes_bias(&spec) {
            case = case.with_bias();
        }
        if masks {
            case = case.with_masks();
        }
        for level in Level::available() {
            check(&case, level)?;
        }
    }

    /// Infinite, NaN, equal and very large logits.
    #[test]
    fn awkward_logits(spec in strategies::router(), n in 1usize..20, seed in any::<u64>(), bias in any::<bool>(), kind in 0usize..4) {
        let mut rng = Rng::new(seed);
        let logits = routing::awkward_logits(&mut rng, n * spec.num_experts, kind);
        let mut case = RouteCase::with_logits(&spec, n, &logits, seed);
        if bias && takes_bias(&spec) {
            case = case.with_bias();
        }
        for level in Level::available() {
            check(&case, level)?;
        }
    }
}

/// A table over all options in which every pair of values occurs.
#[test]
fn pairwise_options() {
    let seed = seed();
    let (cases, table) = option_table(seed, |_| true);
    for (i, (router, bias, masks)) in cases.into_iter().enumerate() {
        let mut case = RouteCase::new(&router, 45, seed + i as u64);
        if bias {
            case = case.with_bias();
        }
        if masks {
            case = case.with_masks();
        }
        assert_all_levels(&case);
    }
    println!("pairs of router options: {} of {} covered by {} cases", table.covered, table.total, table.rows.len());
    assert_eq!(table.covered, table.total);
}

#[test]
fn sizes_around_the_blocking() {
    for experts in [1, 2, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256, 1024] {
        for top_k in [1, 2, 7, 8, 9, 16, 17, 32, 63, 64, 65, experts] {
            if top_k > experts {
                continue;
            }
            for score in [Score::Softmax, Score::Sigmoid] {
                let mut router = Router::new(experts, top_k);
                (router.score, router.renormalize) = (score, Renormalize::sum());
                assert_all_levels(&RouteCase::new(&router, 5, (experts + top_k) as u64));
                assert_all_levels(&RouteCase::new(&router, 5, (experts + top_k) as u64).with_bias());
            }
        }
    }
    for tokens in [0, 1, 7, 8, 9, 127, 128, 129, 257] {
        let mut router = Router::new(128, 8);
        router.aux_loss = Some(AuxLoss::TopK);
        assert_all_levels(&RouteCase::new(&router, tokens, tokens as u64));
    }
}

#[test]
fn deepseek_v3() {
    let mut router = Router::new(256, 8);
    router.score = Score::Sigmoid;
    router.groups = Some(ExpertGroups::new(8, 4, GroupScore::Top2Sum));
    router.renormalize = Renormalize::Sum { eps: 1e-20, floor: 0.0 };
    router.scaling_factor = 2.5;
    for seed in 0..6 {
        assert_all_levels(&RouteCase::new(&router, 300, seed).with_bias());
    }
}

/// All equal: the lowest experts, equal weights.
#[test]
fn ties_go_to_the_lower_expert() {
    let mut router = Router::new(40, 5);
    router.renormalize = Renormalize::sum();
    for value in [0.0, -0.0, 3.5, f32::INFINITY, f32::NEG_INFINITY, 1e-45] {
        let case = RouteCase::with_logits(&router, 3, &[value; 120], 1);
        for level in Level::available() {
            let got = run(&case, level);
            assert_eq!(got.ids, [0, 1, 2, 3, 4].repeat(3), "{value} at {level}");
            assert!(got.weights.iter().all(|w| *w == 0.2), "{value} at {level}: {:?}", got.weights);
        }
    }
}

/// Same bits for any number of threads, run to run, at every level; and for a token alone where tokens are not coupled.
#[test]
fn same_bits_for_any_number_of_threads_and_tokens() {
    let mut all = Vec::new();
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw] {
        for (i, rule) in
            [Renormalize::None, Renormalize::sum(), Renormalize::L2, Renormalize::Softmax].into_iter().enumerate()
        {
            let mut router = Router::new(60, 7);
            (router.score, router.renormalize) = (score, rule);
            router.aux_loss = [None, Some(AuxLoss::TopK), Some(AuxLoss::Switch { group_len: Some(100) }), None][i];
            all.push((router, true));
        }
    }
    let mut router = Router::new(60, 7);
    router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
    all.push((router, false));
    let mut router = Router::new(60, 7);
    router.selection = Selection::Sinkhorn { iterations: 4 };
    all.push((router, false));
    let mut router = Router::new(60, 2);
    router.selection = Selection::ExpertChoice;
    router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
    all.push((router, false));
    let mut router = Router::new(60, 2);
    router.second_expert = SecondExpert::Random;
    all.push((router, false)); // the draw depends on the token's number
    for (seed, (router, alone)) in all.iter().enumerate() {
        let n = 500;
        let case = RouteCase::new(router, n, seed as u64).with_masks();
        let mut first = None;
        for level in Level::available() {
            let mut cpu = Cpu::with_level(level);
            for threads in [1, 2, 3, 5] {
                let got = pool(threads).install(|| case.run(|spec, input, out| cpu::route(&mut cpu, spec, input, out)));
                let first = first.get_or_insert_with(|| got.clone());
                assert_eq!(&got, first, "{threads} threads at {level}: {router:?}");
            }
            if !alone {
                continue;
            }
            let logits = case.logits.values();
            for t in [0, 1, 63, 64, 255, 256, n - 1] {
                let logits = &logits[t * router.num_experts..][..router.num_experts];
                let mut one = RouteCase::with_logits(router, 1, logits, 0);
                one.token_mask = case.token_mask.as_ref().map(|m| vec![m[t]]);
                let got = run(&one, level);
                let first = first.as_ref().unwrap();
                let row = t * router.top_k..(t + 1) * router.top_k;
                assert_eq!(got.ids, first.ids[row.clone()], "token {t} alone at {level}");
                let bits = |w: &[f32]| w.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got.weights), bits(&first.weights[row]), "token {t} alone at {level}");
            }
        }
    }
}

/// A workspace of the size that is told is not outgrown.
#[test]
fn the_workspace_is_as_large_as_told() {
    let strategy = (strategies::router(), 0usize..200);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..300 {
        let (spec, n) = strategy.new_tree(&mut runner).unwrap().current();
        let case = RouteCase::new(&spec, n, 5);
        let mut cpu = Cpu::with_level(Level::best());
        cpu.reserve(cpu::route_workspace_bytes(&spec, n));
        let bytes = cpu.workspace_bytes();
        case.run(|spec, input, out| cpu::route(&mut cpu, spec, input, out));
        assert_eq!(cpu.workspace_bytes(), bytes);
    }
}

#[test]
fn errors_write_nothing() {
    use gatefold::args::{RouteInput, RouteOutput};
    use gatefold::{View, ViewMut};
    let mut cpu = Cpu::with_level(Level::best());
    let (mut ids, mut weights) = ([7; 6], [7.0; 6]);
    let logits = [0.0f32; 12];
    let mut attempt = |spec: &Router, tokens: usize, message: &str| {
        let input = RouteInput::new(View::new(&logits, [tokens, 4]));
        let output = RouteOutput::new(ViewMut::new(&mut ids, [3, 2]), ViewMut::new(&mut weights, [3, 2]));
        let error = cpu::route(&mut cpu, spec, &input, output).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert!(ids == [7; 6] && weights == [7.0; 6]);
    };
    attempt(&Router::new(4, 5), 3, "`top_k` is 5, expected at most the selectable experts (4)");
    attempt(&Router::new(5, 2), 3, "`logits` has shape [3, 4], expected [3, 5]");
    attempt(&Router::new(4, 2), 4, "`logits` has 12 elements, its shape asks for 16");
    attempt(&Router::new(4, 1), 3, "`topk_ids` has shape [3, 2], expected [3, 1]");
}
