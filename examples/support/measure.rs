//! Measures of error: the golden files' own, and the bound of the numerical contract.

use super::array::Array;
use gatefold::{Dtype, Element};

/// `max |a - b| / max(1, max |b|)`; NaN counts as infinite.
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut worst, mut scale) = (0.0f64, 1.0f64);
    for (x, y) in a.iter().zip(b) {
        let error = (x - y).abs();
        worst = worst.max(if x.is_nan() || y.is_nan() { f64::INFINITY } else { error });
        scale = scale.max(y.abs());
    }
    worst / scale
}

/// Distance between the numbers of a type around `x`.
pub fn ulp(dtype: Dtype, x: f64) -> f64 {
    let (fraction_bits, least_exponent) = match dtype {
        Dtype::F32 => (23, -126),
        Dtype::BF16 => (7, -126),
        Dtype::F16 => (10, -14),
        _ => (52, -1022),
    };
    let exponent = if x == 0.0 { least_exponent } else { (x.abs().log2().floor() as i32).max(least_exponent) };
    2f64.powi(exponent - fraction_bits)
}

/// How far an output is from the truth, in units of what the contract allows: per row, the largest error may be twice that
/// of the naive method in the row, plus one ulp of the row's largest magnitude. At most 1 is within.
#[derive(Clone, Copy, Debug, Default)]
pub struct Contract {
    /// Largest error over allowed error.
    pub worst: f64,
    /// Largest error of any row.
    pub error: f64,
    /// What was allowed in the row with the worst ratio.
    pub allowed: f64,
}

impl Contract {
    /// Adds the rows of one output.
    pub fn rows<T: Element>(&mut self, dtype: Dtype, width: usize, got: &[T], naive: &[T], truth: &[f64]) {
        assert!(got.len() == truth.len() && naive.len() == truth.len());
        for ((got, naive), truth) in got.chunks(width).zip(naive.chunks(width)).zip(truth.chunks(width)) {
            let error = |row: &[T]| {
                row.iter().zip(truth).fold(0.0f64, |worst, (x, y)| {
                    let e = (x.to_f64() - y).abs();
                    if x.to_f64() == *y { worst } else { worst.max(if e.is_nan() { f64::INFINITY } else { e }) }
                })
            };
            let top = truth.iter().fold(0.0f64, |top, y| top.max(y.abs()));
            let allowed = 2.0 * error(naive) + ulp(dtype, top);
            let found = error(got);
            self.error = self.error.max(found);
            if found / allowed > self.worst {
                (self.worst, self.allowed) = (found / allowed, allowed);
            }
        }
    }

    pub fn holds(&self) -> bool {
        self.worst <= 1.0
    }
}

/// Says where an answer is not the reference's. Of a row's largest number, the error may be two units in the last place of the
/// type (rounding of the result and of what is kept in that type on the way) and 1e-5 (sums in f32): enough to find a call
/// that computes something else. The tests hold the sharper contract.
pub fn near<T: Element>(got: &Array<T>, truth: &Array<f64>) -> Result<(), String> {
    if got.shape != truth.shape {
        return Err(format!("shape {:?}, the reference says {:?}", got.shape, truth.shape));
    }
    let width = truth.shape.last().copied().unwrap_or(1).max(1);
    for (row, (got, truth)) in got.data.chunks(width).zip(truth.data.chunks(width)).enumerate() {
        let top = truth.iter().fold(0.0f64, |top, x| top.max(x.abs()));
        let allowed = 2.0 * ulp(T::DTYPE, top) + 1e-5 * top;
        for (i, (x, y)) in got.iter().zip(truth).enumerate() {
            if (x.to_f64() - y).abs() > allowed || x.to_f64().is_nan() {
                return Err(format!("row {row}: [{i}] is {x:?}, the reference says {y}; allowed error: {allowed:.1e}"));
            }
        }
    }
    Ok(())
}
