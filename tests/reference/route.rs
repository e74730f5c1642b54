//! Routing by hand: small cases whose ids and weights can be written down.

use crate::common::{RouteCase, RouteResult, assert_close};
use crate::with;
use gatefold::args::{RouteInput, RouteOutput};
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, SelectOn, Selection,
};
use gatefold::{View, ViewMut, random, reference};

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

/// Logits in f64.
fn run<'a>(spec: &Router, logits: &'a [f64], edit: impl FnOnce(&mut RouteInput<'a, f64>)) -> RouteResult<f64> {
    let n = logits.len() / spec.num_experts;
    let slots = [n, spec.slots()];
    let choice = spec.selection == Selection::ExpertChoice;
    let per_expert = if choice { spec.expert_choice_tokens(n) } else { 0 };
    let mut r = RouteResult {
        ids: vec![77; n * slots[1]],
        weights: vec![9.0; n * slots[1]],
        tokens_per_expert: vec![77; spec.num_experts],
        dropped: 77,
        expert_tokens: vec![77; spec.num_experts * per_expert],
        aux_loss: 0.0,
        z_loss: 9.0,
    };
    let mut output = RouteOutput::new(ViewMut::new(&mut r.ids, slots), ViewMut::new(&mut r.weights, slots));
    output.tokens_per_expert = Some(&mut r.tokens_per_expert);
    output.dropped = Some(&mut r.dropped);
    output.expert_tokens = choice.then(|| ViewMut::new(&mut r.expert_tokens, [spec.num_experts, per_expert]));
    output.aux_loss = spec.aux_loss.is_some().then_some(&mut r.aux_loss);
    output.z_loss = Some(&mut r.z_loss);
    let mut input = RouteInput::new(View::new(logits, [n, spec.num_experts]));
    edit(&mut input);
    reference::route(spec, &input, output).unwrap();
    r
}

/// `ln` of each.
fn ln(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v.ln()).collect()
}

#[test]
fn softmax_then_top_k() {
    let r = run(&Router::new(4, 2), &ln(&[1.0, 2.0, 4.0, 1.0]), |_| {});
    assert_eq!(r.ids, [2, 1]);
    assert_close("weights", &r.weights, &[0.5, 0.25], 1e-15);
    assert_eq!(r.tokens_per_expert, [0, 1, 1, 0]);
    assert_eq!(r.dropped, 0);
    assert_close("z", &[r.z_loss], &[8f64.ln().powi(2)], 1e-15);
}

#[test]
fn scores() {
    let weights = |score, logit: f64| run(&with!(Router::new(1, 1), score: score), &[logit], |_| {}).weights[0];
    assert_close("sigmoid", &[weights(Score::Sigmoid, 3f64.ln())], &[0.75], 1e-15);
    assert_eq!(weights(Score::Sigmoid, -INF), 0.0);
    assert_eq!(weights(Score::Sigmoid, 1e4), 1.0);
    // ln(1 + e^l) = ln 4 for l = ln 3.
    assert_close("sqrt-softplus", &[weights(Score::SqrtSoftplus, 3f64.ln())], &[4f64.ln().sqrt()], 1e-15);
    assert_eq!(weights(Score::SqrtSoftplus, 1e4), 100.0);
    assert_eq!(weights(Score::SqrtSoftplus, -1e4), 0.0);
    assert_eq!(weights(Score::SqrtSoftplus, INF), INF);
    assert_eq!(weights(Score::Raw, -7.5), -7.5);
    assert_eq!(weights(Score::Softmax, -7.5), 1.0);
}

#[test]
fn renormalisation_and_scaling() {
    let raw = with!(Router::new(3, 2), score: Score::Raw);
    let weights = |rule, scale| {
        let spec = with!(raw.clone(), renormalize: rule, scaling_factor: scale);
        let r = run(&spec, &[3.0, 1.0, 4.0], |_| {});
        assert_eq!(r.ids, [2, 0]);
        r.weights
    };
    assert_eq!(weights(Renormalize::None, 2.0), [8.0, 6.0]);
    assert_close("sum", &weights(Renormalize::sum(), 14.0), &[8.0, 6.0], 1e-15);
    assert_eq!(weights(Renormalize::Sum { eps: 1.0, floor: 0.0 }, 1.0), [0.5, 0.375]);
    assert_eq!(weights(Renormalize::Sum { eps: 1.0, floor: 16.0 }, 1.0), [0.25, 0.1875]);
    assert_eq!(weights(Renormalize::L2, 1.0), [0.8, 0.6]);
    let e = 1f64.exp();
    assert_close("softmax", &weights(Renormalize::Softmax, 3.0), &[3.0 * e / (1.0 + e), 3.0 / (1.0 + e)], 1e-15);
    // Top-k, then softmax, is softmax over all, then renormalised.
    let logits = [0.3, -1.0, 2.0, 0.7, 0.1];
    let after = with!(Router::new(5, 3), score: Score::Raw, renormalize: Renormalize::Softmax);
    let before = with!(Router::new(5, 3), renormalize: Renormalize::sum());
    let (after, before) = (run(&after, &logits, |_| {}), run(&before, &logits, |_| {}));
    assert_eq!(after.ids, before.ids);
    assert_close("softmax over the selected", &after.weights, &before.weights, 1e-15);
}

#[test]
fn ties_go_to_the_lower_expert_and_nan_ranks_last() {
    for (logits, want) in [
        ([1.0, 2.0, 2.0, 2.0], [1, 2, 3]),
        ([0.0, -0.0, -0.0, 0.0], [0, 1, 2]),
        ([NAN, 1.0, NAN, -INF], [1, 3, 0]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2]),
        ([-INF, -INF, INF, INF], [2, 3, 0]),
        ([NAN, NAN, -INF, NAN], [2, 0, 1]),
        ([INF, NAN, -1e300, 1e300], [0, 3, 2]), // 1e300 is +inf in f32, and so ties with it
        ([1e300, NAN, -1e300, INF], [0, 3, 2]),
        // Below the resolution of f32: a tie.
        ([1.0, 1.0 + 1e-12, 1.0 - 1e-12, 0.0], [0, 1, 2]),
    ] {
        for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw] {
            let r = run(&with!(Router::new(4, 3), score: score), &logits, |_| {});
            assert_eq!(r.ids, want, "{score:?} {logits:?}");
        }
    }
    // Infinite logits share the softmax; NaN reaches its own token alone.
    let r = run(&Router::new(3, 3), &[INF, 0.0, INF, NAN, 1.0, 2.0, 1.0, 1.0, 1.0], |_| {});
    assert_eq!(r.weights[..3], [0.5, 0.5, 0.0]);
    assert!(r.weights[3..6].iter().all(|w| w.is_nan()));
    assert_close("equal", &r.weights[6..], &[1.0 / 3.0; 3], 1e-15);
    assert_eq!(run(&Router::new(2, 2), &[-INF, -INF], |_| {}).weights, [0.5, 0.5]);
}

#[test]
fn a_bias_chooses_but_does_not_weigh() {
    let spec = with!(Router::new(3, 2), score: Score::Sigmoid);
    let bias = [0.0, 0.0, 1.0];
    let r = run(&spec, &ln(&[3.0, 1.0, 1.0 / 3.0]), |i| i.selection_bias = Some(&bias));
    assert_eq!(r.ids, [2, 0]);
    assert_close("weights", &r.weights, &[0.25, 0.75], 1e-15);
    // On logits the bias is added to logits.
    let spec = with!(spec, select_on: SelectOn::Logits);
    let r = run(&spec, &[0.0, 10.0, 9.5], |i| i.selection_bias = Some(&bias));
    assert_eq!(r.ids, [2, 1]);
}

/// With a bias the f32 scores are compared: sigmoids that are 1 in f32 tie. Without one the logits are.
#[test]
fn values_are_rounded_where_the_contract_says() {
    let spec = with!(Router::new(3, 1), score: Score::Sigmoid);
    let logits = [30.0, 40.0, 31.0];
    assert_eq!(run(&spec, &logits, |_| {}).ids, [1]);
    assert_eq!(run(&spec, &logits, |i| i.selection_bias = Some(&[0.0; 3])).ids, [0]);
    // The sum of score and bias is an f32 sum: 2^24 swallows the difference.
    let logits = ln(&[1.0, 3.0, 1.0]);
    assert_eq!(run(&spec, &logits, |i| i.selection_bias = Some(&[16777216.0; 3])).ids, [0]);
}

#[test]
fn groups() {
    let spec =
        |score, top_k| with!(Router::new(6, top_k), score: Score::Raw, groups: Some(ExpertGroups::new(3, 1, score)));
    let logits = [5.0, -9.0, 3.0, 3.0, 4.0, 1.0];
    assert_eq!(run(&spec(GroupScore::Max, 2), &logits, |_| {}).ids, [0, 1], "out of the best group, whatever is in it");
    assert_eq!(run(&spec(GroupScore::Top2Sum, 2), &logits, |_| {}).ids, [2, 3]);
    // Equal groups: the lower one; a group with a NaN ranks last by sum, not by its largest.
    assert_eq!(run(&spec(GroupScore::Max, 1), &[1.0, 0.0, 0.5, 1.0, 1.0, 1.0], |_| {}).ids, [0]);
    let logits = [NAN, 100.0, 3.0, 3.0, 4.0, 1.0];
    assert_eq!(run(&spec(GroupScore::Max, 2), &logits, |_| {}).ids, [1, 0]);
    assert_eq!(run(&spec(GroupScore::Top2Sum, 2), &logits, |_| {}).ids, [2, 3]);
    // Two of three groups.
    let two = with!(Router::new(6, 3), score: Score::Raw, groups: Some(ExpertGroups::new(3, 2, GroupScore::Max)));
    assert_eq!(run(&two, &[5.0, -9.0, 3.5, 3.0, 4.0, 1.0], |_| {}).ids, [0, 4, 5]);
}

#[test]
fn prototypes_choose_one_of_each_group() {
    let spec = with!(Router::new(6, 2), selection: Selection::Prototypes);
    let r = run(&spec, &ln(&[1.0, 2.0, 1.0, 9.0, 9.0, 2.0]), |_| {});
    assert_eq!(r.ids, [1, 3]);
    assert_close("softmax within the group", &r.weights, &[0.5, 0.45], 1e-15);
}

#[test]
fn sparse_mixer() {
    let spec = with!(Router::new(4, 2), selection: Selection::SparseMixer { jitter_eps: 0.1 });
    // Near the best (10): within 20 %. Near the second (9): 7.5 is, 1 is not.
    let r = run(&spec, &[9.0, 10.0, 1.0, 7.5], |_| {});
    assert_eq!(r.ids, [1, 0]);
    let first = 1.0 / (1.0 + (-1f64).exp());
    let second = 1.0 / (1.0 + (-1.5f64).exp());
    assert_close("weights", &r.weights, &[first, second], 1e-15);
    // All logits 0: 0 / 0 keeps an expert in.
    let r = run(&spec, &[0.0; 4], |_| {});
    assert_eq!(r.ids, [0, 1]);
    assert_close("weights", &r.weights, &[0.25, 1.0 / 3.0], 1e-15);
    // Neither score, nor renormalisation, nor scaling apply.
    let other = with!(spec, score: Score::Sigmoid, renormalize: Renormalize::sum(), scaling_factor: 3.0);
    assert_eq!(run(&other, &[0.0; 4], |_| {}), r);
}

fn limited(limit: usize) -> Capacity {
    Capacity::new(CapacityLimit::Tokens(limit))
}

#[test]
fn tokens_beyond_the_capacity_are_dropped_by_position() {
    // Expert 0 is the first choice of all, expert 1 the second of tokens 0 and 2, expert 2 of the others.
    let logits = [3.0, 2.0, 1.0, 3.0, 1.0, 2.0, 3.0, 2.0, 1.0, 3.0, 1.0, 2.0];
    let spec = with!(Router::new(3, 2), score: Score::Raw, capacity: Some(limited(2)), renormalize: Renormalize::sum());
    let r = run(&spec, &logits, |_| {});
    assert_eq!(r.ids, [0, 1, 0, 2, -1, 1, -1, 2]);
    assert_close("weights", &r.weights, &[0.6, 0.4, 0.6, 0.4, 0.0, 0.4, 0.0, 0.4], 1e-15);
    assert_eq!((r.tokens_per_expert, r.dropped), (vec![2, 2, 2], 2));
    // Dropped slots out of the sum.
    let after = with!(spec.clone(), capacity: Some(with!(limited(2), normalize_after_drop: true)));
    let r = run(&after, &logits, |_| {});
    assert_close("weights", &r.weights, &[0.6, 0.4, 0.6, 0.4, 0.0, 1.0, 0.0, 1.0], 1e-15);
    // In groups of 3 tokens; the last has one.
    let rows = with!(spec.clone(), capacity: Some(with!(limited(2), group_len: Some(3))));
    assert_eq!(run(&rows, &logits, |_| {}).ids, [0, 1, 0, 2, -1, 1, 0, 2]);
    // A masked token does not queue.
    let r = run(&spec, &logits, |i| i.token_mask = Some(&[0, 1, 1, 1]));
    assert_eq!(r.ids, [-1, -1, 0, 2, 0, 1, -1, 2]);
    assert_eq!((r.weights[..2].to_vec(), r.dropped), (vec![0.0, 0.0], 1));
}

#[test]
fn slot_one_queues_behind_every_slot_zero() {
    // Token 0 wants 0 then 1; token 1 wants 1 then 0. One place each.
    let spec = with!(Router::new(2, 2), score: Score::Raw, capacity: Some(limited(1)));
    let r = run(&spec, &[2.0, 1.0, 1.0, 2.0], |_| {});
    assert_eq!(r.ids, [0, -1, 1, -1]);
    assert_eq!((r.weights, r.dropped), (vec![2.0, 0.0, 2.0, 0.0], 2));
}

#[test]
fn the_queue_by_score() {
    let spec = with!(Router::new(2, 1), capacity: Some(with!(limited(2), order: CapacityOrder::Score)));
    // All want expert 0, with probabilities 1/2, 3/4, 3/4, 9/10.
    let logits = ln(&[1.0, 1.0, 3.0, 1.0, 3.0, 1.0, 9.0, 1.0]);
    assert_eq!(run(&spec, &logits, |_| {}).ids, [-1, 0, -1, 0]);
    // NaN queues last.
    let r = run(&spec, &[NAN, 5.0, 0.0, 1.0, 0.0, 1.0], |_| {});
    assert_eq!(r.ids, [-1, 1, 1]);
}

#[test]
fn capacity_factor() {
    let c = |factor| Capacity::new(CapacityLimit::Factor(factor));
    assert_eq!(c(1.0).tokens(12, 2, 8), 3);
    assert_eq!(c(1.25).tokens(12, 2, 8), 4);
    assert_eq!(c(0.01).tokens(12, 2, 8), 1);
    let spec = with!(Router::new(2, 1), capacity: Some(c(1.0)));
    // 4 tokens, one of them masked: it counts for the limit of 2, but takes no place.
    let r = run(&spec, &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0], |i| i.token_mask = Some(&[0, 1, 1, 1]));
    assert_eq!(r.ids, [-1, 0, 0, -1]);
}

#[test]
fn second_experts_by_chance() {
    let spec = with!(Router::new(4, 2), renormalize: Renormalize::sum(), second_expert: SecondExpert::Random);
    let n = 400;
    let logits: Vec<f64> = (0..n).flat_map(|t| ln(&[1.0, 8.0, 1.0 + (t % 10) as f64 / 2.0, 1.0])).collect();
    let r = run(&spec, &logits, |i| i.seed = 99);
    let mut kept = 0;
    for t in 0..n {
        let second = 1.0 + (t % 10) as f64 / 2.0;
        let w = second / (8.0 + second);
        let keep = f64::from(random::uniform(99, t as u64, 0)) < 2.0 * w;
        // Of equal second logits the lower expert: 0 where expert 2 has no more.
        let id = if t % 10 == 0 { 0 } else { 2 };
        assert_eq!(r.ids[2 * t + 1], if keep { id } else { -1 }, "token {t}");
        assert!((r.weights[2 * t + 1] - if keep { w } else { 0.0 }).abs() < 1e-14);
        assert!((r.weights[2 * t] - (1.0 - w)).abs() < 1e-14, "the first expert's weight does not change");
        kept += usize::from(keep);
    }
    assert_eq!(r.dropped as usize, n - kept);
    assert!(kept > n / 3 && kept < n);
    // A second expert that is not used does not queue.
    let unused = (0..50).find(|seed| random::uniform(*seed, 0, 0) > 0.99).unwrap_or(0);
    let spec = with!(spec, capacity: Some(limited(1)));
    let r = run(&spec, &[ln(&[1.0, 8.0, 2.0, 0.1]), ln(&[1.0, 1.0, 8.0, 1.5])].concat(), |i| i.seed = unused);
    assert_eq!(r.ids[2], 2);
}

#[test]
fn experts_choose_tokens() {
    let two = Some(limited(2));
    let spec = with!(Router::new(3, 1), selection: Selection::ExpertChoice, capacity: two, score: Score::Raw);
    //            expert   0    1    2
    let logits = [
        /* token 0 */ 5.0, 1.0, 0.0, //
        /* token 1 */ 4.0, 1.0, 0.0, //
        /* token 2 */ 3.0, 2.0, NAN, //
        /* token 3 */ 2.0, 9.0, 0.0,
    ];
    let r = run(&spec, &logits, |_| {});
    assert_eq!(r.expert_tokens, [0, 1, 3, 2, 0, 1]);
    assert_eq!(r.ids, [0, 2, -1, 0, 2, -1, 1, -1, -1, 1, -1, -1]);
    assert_eq!(r.weights, [5.0, 0.0, 0.0, 4.0, 0.0, 0.0, 2.0, 0.0, 0.0, 9.0, 0.0, 0.0]);
    assert_eq!((r.tokens_per_expert, r.dropped), (vec![2, 2, 2], 0));
    // Masked tokens are not chosen; with too few left, the rest is -1.
    let r = run(&spec, &logits, |i| i.token_mask = Some(&[0, 0, 1, 0]));
    assert_eq!(r.expert_tokens, [2, -1, 2, -1, 2, -1]);
    assert_eq!(r.ids[6..9], [0, 1, 2]);
    assert_eq!(r.tokens_per_expert, [1, 1, 1]);
    // Renormalised over the experts that chose the token.
    let sum = with!(spec.clone(), renormalize: Renormalize::sum(), scaling_factor: 2.0);
    let r = run(&sum, &[1.0, 3.0, 0.0], |_| {});
    assert_eq!((r.ids, r.weights), (vec![0, 1, 2], vec![0.5, 1.5, 0.0]));
    // More places than tokens.
    let many = with!(spec, capacity: Some(limited(50)));
    assert_eq!(run(&many, &logits[..6], |_| {}).expert_tokens, [0, 1, 0, 1, 0, 1]);
}

/// Across tokens the order of softmax scores is not the order of logits.
#[test]
fn experts_compare_scores_of_tokens() {
    let spec = with!(Router::new(2, 1), selection: Selection::ExpertChoice, capacity: Some(limited(1)));
    let logits = [5.0, 5.0, 1.0, -1.0];
    let r = run(&spec, &logits, |_| {});
    assert_eq!(r.expert_tokens, [1, 0]);
    let on_logits = with!(spec, select_on: SelectOn::Logits);
    assert_eq!(run(&on_logits, &logits, |_| {}).expert_tokens, [0, 0]);
}

/// Sinkhorn's balanced matrix by its own definition: rows sum to 1 / T, columns to 1 / E; the choice is its largest entries.
#[test]
fn sinkhorn_balances() {
    let (n, experts, iterations) = (12, 4, 200);
    let case = RouteCase::new(&Router::new(experts, 1), n, 5);
    // Expert 0 is everybody's favourite.
    let raw = case.logits.values();
    let logits: Vec<f64> =
        (0..n * experts).map(|i| f64::from(raw[i]) + if i % experts == 0 { 3.0 } else { 0.0 }).collect();
    let mut m: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
    for _ in 0..iterations {
        for row in m.chunks_mut(experts) {
            let sum: f64 = row.iter().sum::<f64>() * n as f64;
            row.iter_mut().for_each(|x| *x /= sum);
        }
        for e in 0..experts {
            let sum: f64 = (0..n).map(|t| m[t * experts + e]).sum::<f64>() * experts as f64;
            (0..n).for_each(|t| m[t * experts + e] /= sum);
        }
    }
    for row in m.chunks(experts) {
        assert!((row.iter().sum::<f64>() - 1.0 / n as f64).abs() < 1e-9);
    }
    let want: Vec<i32> =
        m.chunks(experts).map(|row| (0..experts).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i32).collect();
    let spec = with!(Router::new(experts, 1), selection: Selection::Sinkhorn { iterations });
    let r = run(&spec, &logits, |_| {});
    assert_eq!(r.ids, want);
    let plain = run(&Router::new(experts, 1), &logits, |_| {});
    assert_ne!(r.ids, plain.ids, "balancing has changed something");
    for (t, id) in r.ids.iter().enumerate() {
        let row = &logits[t * experts..][..experts];
        let p = row[*id as usize].exp() / row.iter().map(|l| l.exp()).sum::<f64>();
        assert!((r.weights[t] - p).abs() < 1e-14, "weights are scores, not balanced values");
    }
    // One token has nothing to balance with: its own order.
    assert_eq!(run(&with!(spec, top_k: 3), &[1.0, 3.0, 2.0, 0.0], |_| {}).ids, [1, 2, 0]);
}

#[test]
fn losses_by_hand() {
    // Two experts, p = (3/4, 1/4), (1/2, 1/2), (1/4, 3/4).
    let logits = ln(&[3.0, 1.0, 2.0, 2.0, 1.0, 3.0]);
    let loss = |aux, top_k, masks: [Option<&'static [u8]>; 2]| {
        let spec = with!(Router::new(2, top_k), aux_loss: Some(aux));
        let r = run(&spec, &logits, |i| (i.token_mask, i.loss_mask) = (masks[0], masks[1]));
        (r.aux_loss, r.z_loss)
    };
    // f = (2/3, 1/3), P = (1/2, 1/2): a tie goes to expert 0.
    let (aux, z) = loss(AuxLoss::TopK, 1, [None, None]);
    assert_close("aux", &[aux, z], &[1.0, 4f64.ln().powi(2)], 1e-15);
    // Tokens 0 and 1: f = (1, 0), P = (5/8, 3/8).
    for masks in [[Some([1, 1, 0].as_slice()), None], [None, Some([1, 1, 0].as_slice())]] {
        assert_close("masked", &[loss(AuxLoss::TopK, 1, masks).0], &[1.25], 1e-15);
    }
    assert_eq!(loss(AuxLoss::TopK, 1, [Some(&[0, 1, 0]), Some(&[1, 0, 1])]), (0.0, 0.0), "no token counts");
    assert_close("both", &[loss(AuxLoss::TopK, 2, [None, None]).0], &[2.0], 1e-15);
    // Groups of two tokens: E^2 * mean over (group, expert) of f P = 4 * (5/8 + 3/4) / 4.
    let switch = AuxLoss::Switch { group_len: Some(2) };
    assert_close("switch", &[loss(switch, 1, [None, None]).0], &[5.0 / 8.0 + 3.0 / 4.0], 1e-15);
    // A group without a token that counts is no group.
    assert_close("switch", &[loss(switch, 1, [Some(&[1, 1, 0]), None]).0], &[2.0 * 5.0 / 8.0], 1e-15);
    assert_close("switch", &[loss(AuxLoss::Switch { group_len: None }, 1, [None, None]).0], &[1.0], 1e-15);
}

#[test]
fn balanced_routing_has_loss_top_k() {
    for (experts, top_k) in [(8, 1), (8, 3), (5, 5)] {
        let spec = with!(Router::new(experts, top_k), aux_loss: Some(AuxLoss::TopK));
        let r = run(&spec, &vec![0.25; 7 * experts], |_| {});
        assert_close("aux", &[r.aux_loss], &[top_k as f64], 1e-14);
        assert_close("z", &[r.z_loss], &[(0.25 + (experts as f64).ln()).powi(2)], 1e-14);
    }
}

#[test]
fn no_tokens_and_all_masked() {
    for selection in [Selection::TopK, Selection::ExpertChoice, Selection::Sinkhorn { iterations: 2 }] {
        let spec =
            with!(Router::new(4, 2), selection: selection, capacity: Some(limited(1)), aux_loss: Some(AuxLoss::TopK));
        let r = run(&spec, &[], |_| {});
        assert_eq!((r.tokens_per_expert, r.aux_loss, r.z_loss, r.dropped), (vec![0; 4], 0.0, 0.0, 0));
        let r = run(&spec, &[1.0; 8], |i| i.token_mask = Some(&[0, 0]));
        assert!(r.ids.iter().all(|id| *id == -1) && r.weights.iter().all(|w| *w == 0.0));
        assert_eq!((r.tokens_per_expert, r.aux_loss, r.z_loss, r.dropped), (vec![0; 4], 0.0, 0.0, 0));
    }
}

#[test]
fn jitter_stays_in_its_band_and_belongs_to_the_token() {
    let (n, hidden) = (64, 16);
    let x = vec![1.0; n * hidden];
    let one_hot: Vec<f64> = (0..hidden * hidden).map(|i| f64::from(i / hidden == i % hidden)).collect();
    let logits = |jitter, seed, n: usize| {
        let spec = with!(Router::new(hidden, 1), jitter: jitter);
        let mut out = vec![0.0; n * hidden];
        let (x, w) = (View::new(&x[..n * hidden], [n, hidden]), View::new(&one_hot, [hidden, hidden]));
        reference::router_logits::<_, _, f64>(&spec, x, w, None, seed, ViewMut::new(&mut out, [n, hidden])).unwrap();
        out
    };
    assert_eq!(logits(None, 1, n), x);
    assert_eq!(logits(Some(0.0), 1, n), x);
    let some = logits(Some(0.1), 1, n);
    assert!(some.iter().all(|l| (0.9..1.1).contains(l)));
    let (low, high) = (some.iter().copied().fold(2.0, f64::min), some.iter().copied().fold(0.0, f64::max));
    assert!(low < 0.905 && high > 1.095);
    assert_eq!(some[3 * hidden + 5], 1.0 + 0.1 * (2.0 * f64::from(random::uniform(1, 3, 5)) - 1.0));
    assert_ne!(some, logits(Some(0.1), 2, n));
    assert_eq!(some[..5 * hidden], logits(Some(0.1), 1, 5));
}
