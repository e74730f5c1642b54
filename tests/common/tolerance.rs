//! The derived tolerance: for every output row, the largest error against the f64 truth is at most twice the largest error of the naive
//! method in that row, plus one unit in the last place (of the storage type) of the row's largest magnitude.

use gatefold::{Dtype, Element};

/// Distance of neighbouring numbers of a type around `x`.
pub fn ulp(dtype: Dtype, x: f64) -> f64 {
    let (digits, least) = match dtype {
        Dtype::F64 => (52, -1074),
        Dtype::F32 => (23, -149),
        Dtype::BF16 => (7, -133),
        _ => (10, -24),
    };
    if !x.is_finite() || x == 0.0 {
        return 2f64.powi(least);
    }
    let exponent = x.abs().log2().floor() as i32;
    2f64.powi((exponent - digits).max(least))
}

/// Compares rows of `width`; gives the largest share of its tolerance that a row uses, or says which row is beyond it.
///
/// Where the truth is NaN or infinite, the result must be the same. Where the naive method overflows the storage type, so may the result.
pub fn check_rows<O: Element>(what: &str, got: &[O], truth: &[f64], naive: &[O], width: usize) -> Result<f64, String> {
    assert_eq!(got.len(), truth.len(), "{what}: lengths");
    assert_eq!(got.len(), naive.len(), "{what}: lengths");
    let mut worst = 0.0f64;
    for (row, ((got, truth), naive)) in
        got.chunks(width.max(1)).zip(truth.chunks(width.max(1))).zip(naive.chunks(width.max(1))).enumerate()
    {
        let mut naive_error = 0.0f64;
        let mut largest = 0.0f64;
        for (truth, naive) in truth.iter().zip(naive) {
            if truth.is_finite() && naive.to_f64().is_finite() {
                naive_error = naive_error.max((naive.to_f64() - truth).abs());
                largest = largest.max(truth.abs());
            }
        }
        let allowed = 2.0 * naive_error + ulp(O::DTYPE, largest);
        for (i, ((got, truth), naive)) in got.iter().zip(truth).zip(naive).enumerate() {
            let (got, naive) = (got.to_f64(), naive.to_f64());
            let good = if truth.is_nan() {
                got.is_nan()
            } else if truth.is_infinite() {
                got == *truth
            } else if naive.is_infinite() {
                got == naive || (got - truth).abs() <= ulp(O::DTYPE, *truth)
            } else {
                let error = (got - truth).abs();
                worst = worst.max(error / allowed);
                error <= allowed
            };
            if !good {
                return Err(format!(
                    "{what}: row {row}, element {i}: got {got:e}, truth {truth:e}, naive {naive:e}, allowed error {allowed:e} ({})",
                    O::DTYPE
                ));
            }
        }
    }
    Ok(worst)
}

/// [`check_rows`], as an assertion; gives the share of the tolerance that is used.
#[track_caller]
pub fn assert_rows<O: Element>(what: &str, got: &[O], truth: &[f64], naive: &[O], width: usize) -> f64 {
    match check_rows(what, got, truth, naive, width) {
        Ok(worst) => worst,
        Err(message) => panic!("{message}"),
    }
}

/// Two results in f64, by formulas that differ only in the order of operations.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let scale = want.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= tolerance * scale;
        assert!(same, "{what}: element {i}: got {got:e}, expected {want:e}");
    }
}
