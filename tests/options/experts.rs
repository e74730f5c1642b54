//! Experts: the reference against a dense mixture, expert by expert, and every CPU level against the reference.

use crate::common::naive::Store;
use crate::common::sums::{assert_sums, inner_store, naive_experts};
use crate::common::tables::experts::{Call, base, table, valid};
use crate::common::{ExpertCase, assert_close, naive};
use gatefold::cpu::{self, Cpu, Float, Level, PackedExperts};
use gatefold::spec::{Activation, WeightOn};
use gatefold::{Dtype, Element, View, reference};
use half::{bf16, f16};

/// Expert by expert over all tokens, with other formulas of the same activations.
fn dense<T: Element, W: Element>(case: &ExpertCase<T, W>) -> Vec<f64> {
    let (spec, ffn) = (&case.spec, &case.spec.ffn);
    let sigmoid = |x: f64| 0.5 + 0.5 * (x / 2.0).tanh();
    let act = |x: f64| match ffn.activation {
        Activation::Silu => x * sigmoid(x),
        Activation::GeluErf => x * (0.5 + 0.5 * naive::erf(x * 0.5f64.sqrt())),
        Activation::GeluTanh => x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)),
        Activation::Relu => (x + x.abs()) / 2.0,
        _ => ((x + x.abs()) / 2.0).powi(2),
    };
    let [n, hidden] = case.hidden.shape();
    let mut out = vec![0.0; n * hidden];
    let weights = case.weights();
    for local in 0..spec.num_local_experts {
        let w = weights.expert(local);
        let times = |m: &View<'_, W, 2>, b: Option<&[f32]>, x: &[f64]| -> Vec<f64> {
            let [rows, cols] = m.shape();
            let row = |r: usize| (0..cols).rev().map(|c| m.at([r, c]).to_f64() * x[c]).sum::<f64>();
            (0..rows).map(|r| row(r) + b.map_or(0.0, |b| f64::from(b[r]))).collect()
        };
        for (t, s) in (0..n).flat_map(|t| (0..case.options.slots).map(move |s| (t, s))) {
            if case.ids.at([t, s]) != (spec.first_expert + local) as i32 {
                continue;
            }
            let weight = f64::from(case.topk_weights.at([t, s]));
            let (on_x, on_y) = if spec.weight_on == WeightOn::Input { (weight, 1.0) } else { (1.0, weight) };
            let x: Vec<f64> = (0..hidden).map(|d| on_x * case.hidden.at([t, d]).to_f64()).collect();
            let up = times(&w.up, w.up_bias, &x);
            let inner: Vec<f64> = match &w.gate {
                None => up.iter().map(|u| act(*u)).collect(),
                Some(gate) => {
                    let gate = times(gate, w.gate_bias, &x);
                    match ffn.activation {
                        Activation::SwigluClamped { alpha, limit } => gate
                            .iter()
                            .zip(&up)
                            .map(|(g, u)| {
                                let g = g.min(limit);
                                (u.min(limit).max(-limit) + 1.0) * g * sigmoid(alpha * g)
                            })
                            .collect(),
                        _ => gate.iter().zip(&up).map(|(g, u)| act(*g) * u).collect(),
                    }
                }
            };
            for (d, y) in times(&w.down, w.down_bias, &inner).iter().enumerate() {
                out[t * hidden + d] += spec.combine_scale * on_y * y;
            }
        }
    }
    out
}

fn compare<T: Element, W: Element>(call: &Call, what: &str, seed: u64) {
    let case = ExpertCase::<T, W>::new(&call.spec, call.options, seed);
    let weights = case.weights();
    let got = case.run(|spec, x, routing, out| reference::expert_ffn(spec, x, routing, &weights, out));
    assert_close(what, &got, &dense(&case), 1e-12);
}

/// Calls a generic function with the types of a call.
#[macro_export]
macro_rules! with_types {
    ($types:expr, $function:ident, $($argument:expr),*) => {
        match $types {
            (Dtype::F32, Dtype::F32) => $function::<f32, f32>($($argument),*),
            (Dtype::F32, Dtype::BF16) => $function::<f32, bf16>($($argument),*),
            (Dtype::F32, _) => $function::<f32, f16>($($argument),*),
            (Dtype::BF16, Dtype::F32) => $function::<bf16, f32>($($argument),*),
            (Dtype::BF16, Dtype::BF16) => $function::<bf16, bf16>($($argument),*),
            (Dtype::BF16, _) => $function::<bf16, f16>($($argument),*),
            (_, Dtype::F32) => $function::<f16, f32>($($argument),*),
            (_, Dtype::BF16) => $function::<f16, bf16>($($argument),*),
            (_, _) => $function::<f16, f16>($($argument),*),
        }
    };
}

fn on_every_level<T: Float, W: Float>(call: &Call, what: &str, seed: u64) {
    let case = ExpertCase::<T, W>::new(&call.spec, call.options, seed);
    let truth = case.run(|spec, x, routing, out| reference::expert_ffn(spec, x, routing, &case.weights(), out));
    let packed = PackedExperts::pack(&call.spec, &case.weights()).unwrap();
    for level in Level::available() {
        let what = format!("{what} at {level}");
        if call.wide {
            at_level::<T, W, f32>(&case, &packed, &truth, level, &what);
        } else {
            at_level::<T, W, T>(&case, &packed, &truth, level, &what);
        }
    }
}

fn at_level<T: Float, W: Float, O: Float>(
    case: &ExpertCase<T, W>,
    packed: &PackedExperts,
    truth: &[f64],
    level: Level,
    what: &str,
) {
    let mut cpu = Cpu::with_level(level);
    let got: Vec<O> = case.run(|spec, x, routing, out| cpu::expert_ffn(&mut cpu, spec, x, routing, packed, out));
    let naive = naive_experts::<T, W, O>(case, inner_store::<T, W>(level), Store::F32);
    let ffn = &case.spec.ffn;
    // The outputs of a token share its inner values, so the luck of a few sums: more tokens where those are few.
    assert_sums(what, &got, truth, &naive, ffn.hidden_size * 128usize.div_ceil(ffn.intermediate_size));
}

#[test]
fn every_pair_of_options_against_a_dense_mixture_and_on_every_level() {
    let (table, base) = (table(), base());
    let pairs = table.rows("experts", &base, 1, valid);
    for (seed, row) in pairs.rows.iter().enumerate() {
        let (call, what) = (table.apply(&base, row), table.describe(row));
        with_types!(call.types, compare, &call, &what, seed as u64);
        with_types!(call.types, on_every_level, &call, &what, seed as u64);
    }
    for ((a, x), (b, y)) in pairs.impossible {
        let names = [table.options[a].1[x].0, table.options[b].1[y].0];
        let plain = (table.options[a].0, names[0]) == ("gated", "no");
        assert!(plain && matches!(names[1], "clamped" | "halves" | "interleaved"), "{names:?}");
    }
}
