//! What long sums need: a picture of the naive method that does not hang on one order, and pools of threads.

use super::tolerance::check_rows;
use gatefold::Element;

/// So many sums give the error of a method; fewer give its luck.
const ENOUGH: usize = 128;

/// [`check_rows`], with rows narrower than [`ENOUGH`] taken together with their neighbours.
#[track_caller]
pub fn assert_sums<O: Element>(what: &str, got: &[O], truth: &[f64], naive: &[O], width: usize) -> f64 {
    let width = width.max(1);
    match check_rows(what, got, truth, naive, width * ENOUGH.div_ceil(width)) {
        Ok(worst) => worst,
        Err(message) => panic!("{message}"),
    }
}

/// The sequential f32 sum of `terms`, begun at that of the `starts` equally spaced places which gives the largest error,
/// `extra` added last.
///
/// An error depends on how far the running sum strays on its way, which has a long tail: of several hundred sums in one
/// order, the worst is easily three times that of another order. Where to begin is anyone's choice, so the worst of several
/// is the picture of the method.
pub fn naive_sum(terms: &[f32], extra: f32, exact: f64, starts: usize) -> f32 {
    let mut worst = (-1.0, f32::NAN);
    for i in 0..starts.max(1) {
        let (head, tail) = terms.split_at(i * terms.len() / starts.max(1));
        let sum = tail.iter().chain(head).fold(0.0f32, |sum, x| sum + x) + extra;
        let error = (f64::from(sum) - exact).abs();
        if i == 0 || error > worst.0 {
            worst = (error, sum);
        }
    }
    worst.1
}

/// Starts for [`naive_sum`] when there are so many sums.
pub fn starts_for(sums: usize) -> usize {
    (4096 / sums.max(1)).clamp(8, 64)
}

/// Bits, to compare exactly.
pub fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values.iter().map(|x| x.to_f64().to_bits()).collect()
}

/// Runs in a pool of so many threads.
pub fn with_threads<R: Send>(threads: usize, run: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(run)
}
