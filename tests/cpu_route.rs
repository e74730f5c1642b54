//! Routing on the CPU against the reference: every option, every level, ids to the bit.

mod common;

use common::data::Rng;
use common::tolerance::ulp;
use common::*;
use gatefold::cpu::{self, Cpu, Level};
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, SelectOn, Selection,
};
use gatefold::{Dtype, reference};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn run(case: &RouteCase, level: Level) -> RouteResult<f32> {
    let mut cpu = Cpu::with_level(level);
    case.run(|spec, input, output| cpu::route(&mut cpu, spec, input, output))
}

/// Everything that is an integer is equal; weights are the truth rounded once, give or take the last bit; losses are within a few.
///
/// Where the truth is NaN or infinite in f32 (such a logit, or a division by 0), a weight may be anything.
fn check(case: &RouteCase, level: Level) -> Result<(), TestCaseError> {
    let truth = case.run(reference::route);
    let got = run(case, level);
    let what = format!("{level}: {:?}", case.spec);
    prop_assert_eq!(&got.ids, &truth.ids, "{}", &what);
    prop_assert_eq!(&got.tokens_per_expert, &truth.tokens_per_expert, "{}", &what);
    prop_assert_eq!(got.dropped, truth.dropped, "{}", &what);
    prop_assert_eq!(&got.expert_tokens, &truth.expert_tokens, "{}", &what);
    for (i, (got, truth)) in got.weights.iter().zip(&truth.weights).enumerate() {
        let close = (f64::from(*got) - truth).abs() <= 0.51 * ulp(Dtype::F32, *truth);
        prop_assert!(!(*truth as f32).is_finite() || close, "weight {}: {:e}, expected {:e}; {}", i, got, truth, &what);
    }
    for (name, got, truth) in [("aux_loss", got.aux_loss, truth.aux_loss), ("z_loss", got.z_loss, truth.z_loss)] {
        let close = got == truth as f32 || (f64::from(got) - truth).abs() <= 0.51 * ulp(Dtype::F32, truth);
        prop_assert!(close || (truth.is_nan() && got.is_nan()), "{}: {:e}, expected {:e}; {}", name, got, truth, &what);
    }
    Ok(())
}

fn assert_all_levels(case: &RouteCase) {
    for level in Level::available() {
        check(case, level).unwrap();
    }
}

fn takes_bias(spec: &Router) -> bool {
    matches!(spec.selection, Selection::TopK | Selection::Prototypes)
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
        let awkward = [
            f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 1e-45, -1e-45, f32::MAX, f32::MIN, 1.0, -1.0, 700.0, -800.0, 88.0, -104.0,
        ];
        let logits: Vec<f32> = (0..n * spec.num_experts)
            .map(|_| match kind {
                0 => *rng.pick(&awkward),
                1 if rng.chance(0.9) => rng.normal() as f32,
                1 => *rng.pick(&awkward[..3]),
                2 => *rng.pick(&[1.0, 1.0 + f32::EPSILON, 1.0 - f32::EPSILON]),
                _ => (rng.normal() * 40.0) as f32,
            })
            .collect();
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
    let scores = [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw];
    let selections = [
        Selection::TopK,
        Selection::ExpertChoice,
        Selection::Sinkhorn { iterations: 2 },
        Selection::SparseMixer { jitter_eps: 0.1 },
        Selection::Prototypes,
    ];
    let rules = [
        Renormalize::None,
        Renormalize::sum(),
        Renormalize::Sum { eps: 1e-20, floor: 0.25 },
        Renormalize::L2,
        Renormalize::Softmax,
    ];
    let build = |row: &[usize]| -> (Router, bool, bool) {
        let mut r = Router::new(24, [1, 2, 4, 8, 12][row[0]]);
        r.score = scores[row[1]];
        r.select_on = [SelectOn::Scores, SelectOn::Logits][row[2]];
        r.groups = [None, Some(GroupScore::Max), Some(GroupScore::Top2Sum)][row[3]].map(|s| ExpertGroups::new(4, 2, s));
        r.selection = selections[row[4]];
        r.renormalize = rules[row[5]];
        r.scaling_factor = [1.0, 2.5][row[6]];
        r.capacity = [None, Some(CapacityLimit::Tokens(3)), Some(CapacityLimit::Factor(1.25))][row[7]].map(|limit| {
            let mut c = Capacity::new(limit);
            c.order = [CapacityOrder::Position, CapacityOrder::Score][row[8]];
            c.group_len = [None, Some(7)][row[9]];
            c.normalize_after_drop = row[10] == 1;
            c
        });
        r.second_expert = [SecondExpert::Always, SecondExpert::Random][row[11]];
        r.aux_loss = [None, Some(AuxLoss::TopK), Some(AuxLoss::Switch { group_len: Some(5) })][row[12]];
        (r, row[13] == 1, row[14] == 1)
    };
    let sizes = [5, 4, 2, 3, 5, 5, 2, 3, 2, 2, 2, 2, 3, 2, 2];
    let seed = seed();
    let table = pairs::pairwise(&sizes, seed, |row| {
        let (router, bias, _) = build(row);
        // Without a capacity its options are not options.
        let no_capacity_options = row[7] > 0 || row[8..11].iter().all(|v| *v == 0);
        router.validate().is_ok() && (!bias || takes_bias(&router)) && no_capacity_options
    });
    for (i, row) in table.rows.iter().enumerate() {
        let (router, bias, masks) = build(row);
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
