//! The exponentials of a softmax, with the limits at infinity.

/// The largest of some numbers; NaN does not count, nothing gives `-inf`.
pub(super) fn max_of(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(f64::NEG_INFINITY, f64::max)
}

/// `exp(x - max)`, and 1 for `x = max` also where both are infinite: the largest values share the weight, as in the limit.
pub(super) fn exp_below(x: f64, max: f64) -> f64 {
    if x == max { 1.0 } else { (x - max).exp() }
}

/// `exp(x - max) / sum exp(x - max)`, the sum in order.
pub(super) fn softmax(values: &[f64]) -> Vec<f64> {
    let max = max_of(values.iter().copied());
    let sum: f64 = values.iter().map(|x| exp_below(*x, max)).sum();
    values.iter().map(|x| exp_below(*x, max) / sum).collect()
}

/// `ln(sum exp(x))`.
pub(super) fn log_sum_exp(values: &[f64]) -> f64 {
    let max = max_of(values.iter().copied());
    let sum: f64 = values.iter().map(|x| exp_below(*x, max)).sum();
    // All -inf: the exponentials count as 1 above, but the sum is 0.
    if max == f64::NEG_INFINITY && !sum.is_nan() { max } else { max + sum.ln() }
}
