//! Scores by the textbook formulas in f64, one at a time and summed in order: where a decision is taken on a score, it must
//! not depend on how the score was computed.

use crate::spec::Score;

/// The largest value; NaN does not count, nothing gives `-inf`.
pub fn max(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, f64::max)
}

/// `e^(x - max)`, and 1 for `x = max` also where both are infinite.
pub fn exp_below(x: f64, max: f64) -> f64 {
    if x == max { 1.0 } else { (x - max).exp() }
}

/// The largest of a row and the sum of `e^(l - max)`.
pub fn max_and_sum(logits: &[f32]) -> (f64, f64) {
    let values = || logits.iter().map(|l| f64::from(*l));
    let max = max(values());
    (max, values().map(|l| exp_below(l, max)).sum())
}

/// The score of one logit of a row; `softmax` is [`max_and_sum`] of the row.
pub fn score(score: Score, logit: f32, softmax: (f64, f64)) -> f64 {
    let l = f64::from(logit);
    match score {
        Score::Softmax => exp_below(l, softmax.0) / softmax.1,
        Score::Sigmoid => 1.0 / (1.0 + (-l).exp()),
        Score::SqrtSoftplus => (l.max(0.0) + (-l.abs()).exp().ln_1p()).sqrt(),
        Score::Raw => l,
    }
}

/// [`max_and_sum`] where the score needs it.
pub fn softmax_of(score: Score, logits: &[f32]) -> (f64, f64) {
    if score == Score::Softmax { max_and_sum(logits) } else { (0.0, 1.0) }
}

/// Scores of a row, rounded to f32.
pub fn scores_f32(kind: Score, logits: &[f32], out: &mut [f32]) {
    let softmax = softmax_of(kind, logits);
    for (out, l) in out.iter_mut().zip(logits) {
        *out = score(kind, *l, softmax) as f32;
    }
}

/// The largest softmax probability of a row, in f32; NaN if a logit is.
pub fn largest_probability(logits: &[f32]) -> f32 {
    let (_, sum) = max_and_sum(logits);
    // The largest logit has e^0.
    (1.0 / sum) as f32
}
