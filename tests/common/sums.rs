//! What long sums need: a picture of the naive method that does not hang on one order, and pools of threads.

use super::moe_case::ExpertCase;
use super::naive::Store;
use super::tolerance::check_rows;
use gatefold::cpu::Level;
use gatefold::spec::WeightOn;
use gatefold::{Dtype, Element};

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

/// How the CPU keeps the inner values of experts: products of two bf16 have bf16 inputs.
pub fn inner_store<T: Element, W: Element>(level: Level) -> Store {
    let dot = level.name() == "avx512bf16" && T::DTYPE == Dtype::BF16 && W::DTYPE == Dtype::BF16;
    if dot { Store::Storage } else { Store::F32 }
}

/// [`super::naive::expert_ffn`] with every sum as [`naive_sum`] makes it; the fewer values share an error's luck, the more
/// starts. `inner` and `rows` tell how values between the projections, and results of an expert, are kept.
pub fn naive_experts<T: Element, W: Element, O: Element>(case: &ExpertCase<T, W>, inner: Store, rows: Store) -> Vec<O> {
    let (spec, weights) = (&case.spec, case.weights());
    let (hidden, ids, topk_weights) = (case.hidden.view(), case.ids.view(), case.topk_weights.view());
    let (ffn, mut terms, mut out) = (&spec.ffn, Vec::new(), Vec::new());
    let inner_starts = (512 / ffn.intermediate_size).clamp(8, 64);
    let down_starts = (4096 / (hidden.shape()[0] * ffn.hidden_size).max(1)).clamp(8, 16);
    let mut sum = |x: &[f32], w: &[W], bias: Option<f32>, starts: usize| {
        terms.clear();
        terms.extend(x.iter().zip(w).map(|(x, w)| x * w.to_f32()));
        let bias = bias.unwrap_or(0.0);
        let exact = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w.to_f64()).sum::<f64>() + f64::from(bias);
        naive_sum(&terms, bias, exact, starts)
    };
    let round = |x: f32, store: Store| store.round::<T>(x);
    let inner_store = inner;
    for t in 0..hidden.shape()[0] {
        let mut total = vec![0.0f32; ffn.hidden_size];
        for (id, weight) in ids.row(&[t]).iter().zip(topk_weights.row(&[t])) {
            let Some(expert) = spec.local_expert(*id) else { continue };
            let w = weights.expert(expert);
            let on_input = spec.weight_on == WeightOn::Input;
            let factor = if on_input { *weight } else { 1.0 };
            let x: Vec<f32> = hidden.row(&[t]).iter().map(|x| factor * x.to_f32()).collect();
            let inner: Vec<f32> = (0..ffn.intermediate_size)
                .map(|i| {
                    let gate = w.gate.map(|g| sum(&x, g.row(&[i]), w.gate_bias.map(|b| b[i]), inner_starts));
                    let up = sum(&x, w.up.row(&[i]), w.up_bias.map(|b| b[i]), inner_starts);
                    round(super::naive::inner(ffn.activation, gate, up), inner_store)
                })
                .collect();
            for (o, total) in total.iter_mut().enumerate() {
                let y = round(sum(&inner, w.down.row(&[o]), w.down_bias.map(|b| b[o]), down_starts), rows);
                *total += if on_input { y } else { weight * y };
            }
        }
        out.extend(total.iter().map(|x| O::from_f32(spec.combine_scale as f32 * x)));
    }
    out
}

/// Bits, to compare exactly.
pub fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values.iter().map(|x| x.to_f64().to_bits()).collect()
}

/// Runs in a pool of so many threads.
pub fn with_threads<R: Send>(threads: usize, run: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(run)
}
