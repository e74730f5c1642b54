//! Scores, selection values, and which experts they choose.

use super::Slots;
use crate::Element;
use crate::reference::softmax::{exp_below, max_of, softmax};
use crate::spec::{GroupScore, Router, Score, Selection};
use std::cmp::Ordering;

/// Indices, best value first; equal values in order, NaN last.
pub(super) fn ranked(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (values[*a], values[*b]);
        b.partial_cmp(&a).unwrap_or(match (a.is_nan(), b.is_nan()) {
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            _ => Ordering::Equal,
        })
    });
    order
}

/// Score of every expert.
fn scores(spec: &Router, logits: &[f64]) -> Vec<f64> {
    match (spec.score, spec.selection) {
        (Score::Softmax, Selection::Prototypes) => {
            logits.chunks_exact(spec.num_experts / spec.top_k).flat_map(softmax).collect()
        }
        (Score::Softmax, _) => softmax(logits),
        (Score::Sigmoid, _) => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
        (Score::SqrtSoftplus, _) => logits.iter().map(|l| (l.max(0.0) + (-l.abs()).exp().ln_1p()).sqrt()).collect(),
        (Score::Raw, _) => logits.to_vec(),
    }
}

/// What top-k compares, in f32.
fn selection_values<S: Element>(spec: &Router, logits: &[f64], bias: Option<&[S]>) -> Vec<f32> {
    let values = if spec.selects_on_logits(bias.is_some()) { logits.to_vec() } else { scores(spec, logits) };
    values.iter().enumerate().map(|(e, v)| *v as f32 + bias.map_or(0.0, |b| b[e].to_f32())).collect()
}

/// Every unmasked token chooses its experts.
pub(super) fn token_choice<S: Element>(
    spec: &Router,
    logits: &[Vec<f64>],
    live: &[bool],
    bias: Option<&[S]>,
) -> Vec<Slots> {
    let mut values: Vec<Vec<f32>> = logits.iter().map(|l| selection_values(spec, l, bias)).collect();
    if let Selection::Sinkhorn { iterations } = spec.selection {
        values = sinkhorn(logits, live, iterations);
    }
    let masked = || Slots { ids: vec![-1; spec.top_k], scores: vec![0.0; spec.top_k], weights: Vec::new() };
    let choose = |t: usize| match spec.selection {
        Selection::SparseMixer { jitter_eps } => sparse_mixer(&logits[t], &values[t], jitter_eps),
        Selection::Prototypes => slots(spec, &logits[t], best_of_each(&values[t], spec.num_experts / spec.top_k)),
        _ => slots(spec, &logits[t], best_experts(spec, &values[t])),
    };
    (0..logits.len()).map(|t| if live[t] { choose(t) } else { masked() }).collect()
}

/// Experts with their scores.
fn slots(spec: &Router, logits: &[f64], experts: Vec<usize>) -> Slots {
    let scores = scores(spec, logits);
    Slots {
        ids: experts.iter().map(|e| *e as i32).collect(),
        scores: experts.iter().map(|e| scores[*e]).collect(),
        weights: Vec::new(),
    }
}

/// The `top_k` best, out of the best groups where there are groups.
fn best_experts(spec: &Router, values: &[f32]) -> Vec<usize> {
    let mut order = ranked(values);
    if let Some(groups) = &spec.groups {
        let size = spec.num_experts / groups.num_groups;
        let group_values: Vec<f32> = values
            .chunks_exact(size)
            .map(|group| {
                let best = ranked(group);
                match groups.score {
                    GroupScore::Max => group[best[0]],
                    GroupScore::Top2Sum => group[best[0]] + group[best[1]],
                }
            })
            .collect();
        let kept = &ranked(&group_values)[..groups.top_groups];
        order.retain(|e| kept.contains(&(e / size)));
    }
    order.truncate(spec.top_k);
    order
}

/// The best of each group of `size`.
fn best_of_each(values: &[f32], size: usize) -> Vec<usize> {
    values.chunks_exact(size).enumerate().map(|(g, group)| g * size + ranked(group)[0]).collect()
}

/// `row[t] * c[t, e] * col[e]` after Sinkhorn's iterations over the unmasked tokens.
fn sinkhorn(logits: &[Vec<f64>], live: &[bool], iterations: usize) -> Vec<Vec<f32>> {
    let num_experts = logits.first().map_or(0, Vec::len);
    let tokens: Vec<usize> = (0..logits.len()).filter(|t| live[*t]).collect();
    let c: Vec<Vec<f64>> = logits
        .iter()
        .map(|l| {
            let max = max_of(l.iter().copied());
            l.iter().map(|l| exp_below(*l, max)).collect()
        })
        .collect();
    let mut row = vec![1.0; logits.len()];
    let mut col = vec![1.0; num_experts];
    for _ in 0..iterations {
        for t in &tokens {
            let sum: f64 = (0..num_experts).map(|e| col[e] * c[*t][e]).sum();
            row[*t] = 1.0 / (tokens.len() as f64 * (sum + 1e-8));
        }
        for e in 0..num_experts {
            let sum: f64 = tokens.iter().map(|t| row[*t] * c[*t][e]).sum();
            col[e] = 1.0 / (num_experts as f64 * (sum + 1e-8));
        }
    }
    (0..logits.len()).map(|t| (0..num_experts).map(|e| (row[t] * c[t][e] * col[e]) as f32).collect()).collect()
}

/// Phi's two experts: `values` are the logits in f32, which choose; the rest is f64.
fn sparse_mixer(logits: &[f64], values: &[f32], jitter_eps: f64) -> Slots {
    let order = ranked(values);
    let mut out = Slots { ids: Vec::new(), scores: Vec::new(), weights: Vec::new() };
    for (s, best) in order[..2].iter().enumerate() {
        let top = logits[*best];
        let far = |l: f64| (top - l) / f64::max(l.abs(), top) > 2.0 * jitter_eps;
        let kept: Vec<usize> = (0..logits.len()).filter(|e| !far(logits[*e]) && !order[..s].contains(e)).collect();
        let kept_logits: Vec<f64> = kept.iter().map(|e| logits[*e]).collect();
        let at_best = kept.iter().position(|e| e == best).map_or(f64::NAN, |i| softmax(&kept_logits)[i]);
        out.ids.push(*best as i32);
        out.scores.push(at_best);
    }
    out
}

/// Every expert chooses its tokens, best first.
pub(super) fn expert_choice(spec: &Router, logits: &[Vec<f64>], live: &[bool]) -> Vec<Vec<usize>> {
    let values: Vec<Vec<f32>> = logits.iter().map(|l| selection_values::<f32>(spec, l, None)).collect();
    (0..spec.num_experts)
        .map(|e| {
            let column: Vec<f32> = values.iter().map(|v| v[e]).collect();
            let mut tokens = ranked(&column);
            tokens.retain(|t| live[*t]);
            tokens.truncate(spec.expert_choice_tokens(logits.len()));
            tokens
        })
        .collect()
}

/// The experts that chose each token, ascending, in `num_experts` slots.
pub(super) fn slots_of_tokens(spec: &Router, logits: &[Vec<f64>], expert_tokens: &[Vec<usize>]) -> Vec<Slots> {
    (0..logits.len())
        .map(|t| {
            let experts = (0..spec.num_experts).filter(|e| expert_tokens[*e].contains(&t)).collect();
            let mut token = slots(spec, &logits[t], experts);
            token.ids.resize(spec.num_experts, -1);
            token.scores.resize(spec.num_experts, 0.0);
            token
        })
        .collect()
}
