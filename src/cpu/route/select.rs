//! One token: selection values, groups, the experts; and the rules that bring scores to weights.

use super::sinkhorn::Balanced;
use super::{exact, exp, top_k};
use crate::cpu::simd::Simd;
use crate::spec::{ExpertGroups, GroupScore, Renormalize, Router, Selection};

/// Scratch of a worker for one token.
pub struct Room<'a> {
    keys: &'a mut [f64],
    best: &'a mut [f64],
    scores: &'a mut [f64],
    values: &'a mut [f32],
    kept: &'a mut [f32],
    groups: &'a mut [f32],
}

impl<'a> Room<'a> {
    /// Most keys of one choice: all experts, or all groups.
    fn keys_len(spec: &Router) -> usize {
        top_k::num_keys(spec.num_experts)
    }

    pub fn len_f64(spec: &Router) -> usize {
        Self::keys_len(spec).saturating_add(spec.num_experts.saturating_mul(3))
    }

    pub fn len_f32(spec: &Router) -> usize {
        spec.num_experts.saturating_mul(3)
    }

    pub fn new(spec: &Router, f64s: &'a mut [f64], f32s: &'a mut [f32]) -> Self {
        let n = spec.num_experts;
        let (keys, rest) = f64s.split_at_mut(Self::keys_len(spec));
        let (best, scores) = rest.split_at_mut(2 * n);
        let (values, rest) = f32s.split_at_mut(n);
        let (kept, groups) = rest.split_at_mut(n);
        Room { keys, best, scores: &mut scores[..n], values, kept, groups: &mut groups[..n] }
    }

    /// Room for one f64 per expert.
    pub fn scores(&mut self) -> &mut [f64] {
        self.scores
    }
}

/// What top-k compares.
pub enum Values<'a> {
    /// The logits.
    Logits,
    /// The logits plus a bias.
    BiasedLogits(&'a [f32]),
    /// The scores, plus a bias.
    Scores(Option<&'a [f32]>),
}

impl<'a> Values<'a> {
    pub fn new(spec: &Router, bias: Option<&'a [f32]>) -> Self {
        match (spec.selects_on_logits(bias.is_some()), bias) {
            (true, None) => Values::Logits,
            (true, Some(bias)) => Values::BiasedLogits(bias),
            (false, bias) => Values::Scores(bias),
        }
    }
}

/// Scores of all experts in f32, as selection compares them.
#[inline(always)]
pub fn scores_f32(spec: &Router, logits: &[f32], room: &mut [f64], out: &mut [f32]) {
    // Prototypes: a softmax over the experts of each group.
    let size = if spec.selection == Selection::Prototypes { spec.num_experts / spec.top_k } else { spec.num_experts };
    for (logits, out) in logits.chunks_exact(size).zip(out.chunks_exact_mut(size)) {
        exp::scores_f32(spec.score, logits, room, out);
    }
}

/// The experts of one token, best first.
#[inline(always)]
pub fn experts<S: Simd>(
    simd: S,
    spec: &Router,
    values: &Values<'_>,
    logits: &[f32],
    balanced: Option<(&Balanced<'_>, usize)>,
    room: &mut Room<'_>,
    ids: &mut [i32],
) {
    let Room { keys, best, scores, values: own, kept, groups } = room;
    let values: &[f32] = match (balanced, values) {
        (Some((balanced, token)), _) => {
            balanced.values(token, own);
            own
        }
        (None, Values::Logits) => logits,
        (None, Values::BiasedLogits(bias)) => {
            for ((own, l), b) in own.iter_mut().zip(logits).zip(*bias) {
                *own = l + b;
            }
            own
        }
        (None, Values::Scores(bias)) => {
            scores_f32(spec, logits, scores, own);
            if let Some(bias) = bias {
                own.iter_mut().zip(*bias).for_each(|(own, b)| *own += b);
            }
            own
        }
    };
    if spec.selection == Selection::Prototypes {
        let size = spec.num_experts / spec.top_k;
        for (g, (id, group)) in ids.iter_mut().zip(values.chunks_exact(size)).enumerate() {
            *id = (g * size + best_two(group).0) as i32;
        }
        return;
    }
    let Some(rule) = &spec.groups else {
        return best_of(simd, values, keys, best, ids);
    };
    // The values of the kept groups side by side, in order: the lower position is the lower expert.
    let size = spec.num_experts / rule.num_groups;
    let (numbers, best) = best.split_at_mut(rule.top_groups);
    best_groups(simd, rule, values, groups, keys, numbers);
    let kept = &mut kept[..rule.top_groups * size];
    for (g, kept) in numbers.iter().zip(kept.chunks_exact_mut(size)) {
        kept.copy_from_slice(&values[*g as usize * size..][..size]);
    }
    best_of(simd, kept, keys, best, ids);
    for id in ids {
        let at = *id as usize;
        *id = (numbers[at / size] as usize * size + at % size) as i32;
    }
}

/// The numbers of the best groups, ascending. `room` holds a value for each group.
#[inline(always)]
fn best_groups<S: Simd>(
    simd: S,
    rule: &ExpertGroups,
    values: &[f32],
    room: &mut [f32],
    keys: &mut [f64],
    numbers: &mut [f64],
) {
    let group_values = &mut room[..rule.num_groups];
    for (value, group) in group_values.iter_mut().zip(values.chunks_exact(values.len() / rule.num_groups)) {
        let (first, second) = best_two(group);
        *value = match rule.score {
            GroupScore::Max => group[first],
            GroupScore::Top2Sum => group[first] + group[second],
        };
    }
    let keys = &mut keys[..top_k::num_keys(rule.num_groups)];
    top_k::write_keys(group_values, keys);
    top_k::top_k(simd, keys, numbers);
    for number in numbers.iter_mut() {
        *number = top_k::index(*number) as f64;
    }
    numbers.sort_unstable_by(f64::total_cmp);
}

/// The best of some values, best first.
#[inline(always)]
fn best_of<S: Simd>(simd: S, values: &[f32], keys: &mut [f64], best: &mut [f64], ids: &mut [i32]) {
    let keys = &mut keys[..top_k::num_keys(values.len())];
    let best = &mut best[..ids.len()];
    top_k::write_keys(values, keys);
    top_k::top_k(simd, keys, best);
    for (id, key) in ids.iter_mut().zip(best) {
        *id = top_k::index(*key) as i32;
    }
}

/// Where the two largest values lie: equal ones in order, NaN last. (With one value, twice that.)
#[inline(always)]
fn best_two(values: &[f32]) -> (usize, usize) {
    let above = |a: f32, b: f32| a > b || (b.is_nan() && !a.is_nan());
    let (mut first, mut second) = (0, usize::MAX);
    for i in 1..values.len() {
        if above(values[i], values[first]) {
            (first, second) = (i, first);
        } else if second == usize::MAX || above(values[i], values[second]) {
            second = i;
        }
    }
    (first, if second == usize::MAX { first } else { second })
}

/// Scores of a token's experts by the textbook formulas; of the sparse mixer: its weights.
pub fn scores_by_formula(spec: &Router, logits: &[f32], ids: &[i32], out: &mut [f64]) {
    match spec.selection {
        Selection::SparseMixer { jitter_eps } => sparse_mixer(logits, ids, jitter_eps, out),
        Selection::Prototypes => {
            let size = spec.num_experts / spec.top_k;
            for ((out, id), group) in out.iter_mut().zip(ids).zip(logits.chunks_exact(size)) {
                *out = exact::score(spec.score, logits[*id as usize], exact::softmax_of(spec.score, group));
            }
        }
        _ => {
            let softmax = exact::softmax_of(spec.score, logits);
            for (out, id) in out.iter_mut().zip(ids) {
                *out = exact::score(spec.score, logits[*id as usize], softmax);
            }
        }
    }
}

/// Phi's weights: each expert's share of a softmax over the logits near its own, the second's without the first.
fn sparse_mixer(logits: &[f32], ids: &[i32], jitter_eps: f64, out: &mut [f64]) {
    for (s, out) in out.iter_mut().enumerate() {
        let top = f64::from(logits[ids[s] as usize]);
        let is_far = |l: f64| (top - l) / f64::max(l.abs(), top) > 2.0 * jitter_eps;
        let near = || {
            let others = logits.iter().enumerate().filter(|(e, _)| !ids[..s].contains(&(*e as i32)));
            others.map(|(_, l)| f64::from(*l)).filter(|l| !is_far(*l))
        };
        let max = exact::max(near());
        let sum: f64 = near().map(|l| exact::exp_below(l, max)).sum();
        *out = if is_far(top) { f64::NAN } else { exact::exp_below(top, max) / sum };
    }
}

/// Renormalisation and factor of the weights.
pub fn scale(spec: &Router) -> (Renormalize, f64) {
    match spec.selection {
        Selection::SparseMixer { .. } => (Renormalize::None, 1.0),
        _ => (spec.renormalize, spec.scaling_factor),
    }
}

/// What scores are divided by. For [`Renormalize::Softmax`] they are exponentials by now.
#[inline(always)]
pub fn divisor(rule: Renormalize, scores: &[f64]) -> f64 {
    match rule {
        Renormalize::None => 1.0,
        Renormalize::Sum { eps, floor } => {
            let sum = scores.iter().sum::<f64>() + eps;
            // A NaN stays NaN.
            if sum < floor { floor } else { sum }
        }
        Renormalize::L2 => scores.iter().map(|w| w * w).sum::<f64>().sqrt(),
        Renormalize::Softmax => scores.iter().sum(),
    }
}

/// Scores to renormalised weights by the textbook formulas, in place.
pub fn renormalize(rule: Renormalize, scores: &mut [f64]) {
    if rule == Renormalize::Softmax {
        let max = exact::max(scores.iter().copied());
        scores.iter_mut().for_each(|x| *x = exact::exp_below(*x, max));
    }
    let divisor = divisor(rule, scores);
    if rule != Renormalize::None {
        scores.iter_mut().for_each(|x| *x /= divisor);
    }
}
