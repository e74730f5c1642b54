//! The naive method of the tolerance: textbook order, sequential f32 sums, rounded to the storage type where a backend stores. Its rows
//! are those of the examples, which hold themselves to the same bound.

#[path = "../../examples/support/textbook.rs"]
mod textbook;

pub use textbook::{erf, inner};

use gatefold::args::{AttentionInput, ExpertWeights, FfnWeights, Routing};
use gatefold::spec::{Attention, ExpertFfn, Ffn, Norm, Rope, WeightOn};
use gatefold::{Element, View};
use textbook::dot;

/// Whether a backend keeps an intermediate value in f32, or stores it in the type of its activations (as a
/// product of two bf16 matrices makes it do).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    F32,
    Storage,
    /// As tf32, which the next product makes of its f32 factors.
    Tf32,
}

/// Rounded to 11 significant bits, to nearest, ties away from zero.
pub fn tf32(x: f32) -> f32 {
    if x.is_finite() { f32::from_bits((x.to_bits() + 0x1000) & !0x1fff) } else { x }
}

impl Store {
    pub fn round<T: Element>(self, x: f32) -> f32 {
        match self {
            Store::F32 => x,
            Store::Storage => T::from_f32(x).to_f32(),
            Store::Tf32 => tf32(x),
        }
    }
}

/// `out` in the type of the output, `lse` in f32.
pub struct Attended<O> {
    pub out: Vec<O>,
    pub lse: Vec<f32>,
}

/// Scores, their largest, exponentials, sum, weights (in f32 or in storage, as the backend does), weighted sum.
pub fn attention<T: Element, O: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, f32>,
    weights: Store,
) -> Attended<O> {
    attention_with_deviation(spec, input, weights).0
}

/// As [`attention`], but no element is right by luck: where one is nearer to the truth than three standard deviations of its
/// rounding errors (to first order, every rounding independent), it is moved that far off.
///
/// A row may be as narrow as one value, and then a single draw says little about the error of the method. One in four hundred
/// draws lies beyond three deviations; twice that, which the tolerance allows, is one in 10^9.
pub fn attention_unlucky<T: Element, O: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, f32>,
    weights: Store,
    truth: (&[f64], &[f64]),
) -> Attended<O> {
    let (mut naive, deviation) = attention_with_deviation::<T, O>(spec, input, weights);
    move_off(&mut naive.out, &deviation.out, truth.0);
    move_off(&mut naive.lse, &deviation.lse, truth.1);
    naive
}

fn move_off<O: Element>(naive: &mut [O], deviation: &[f64], truth: &[f64]) {
    for ((naive, deviation), truth) in naive.iter_mut().zip(deviation).zip(truth) {
        if (naive.to_f64() - truth).abs() < 3.0 * deviation {
            *naive = O::from_f64(truth + 3.0 * deviation);
        }
    }
}

/// Standard deviations of the errors of a result.
struct Deviation {
    out: Vec<f64>,
    lse: Vec<f64>,
}

/// The result, and the standard deviation of its error before it is rounded to its type.
fn attention_with_deviation<T: Element, O: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, f32>,
    weights: Store,
) -> (Attended<O>, Deviation) {
    // A rounding is off by a share between -u and u of the value.
    let variance = |u: f64| u * u / 3.0;
    let of_f32 = variance(2f64.powi(-24));
    let of_weight = match (weights, T::DTYPE) {
        (Store::Storage, gatefold::Dtype::BF16) => variance(2f64.powi(-9)),
        (Store::Storage, gatefold::Dtype::F16) => variance(2f64.powi(-12)),
        _ => of_f32,
    };
    let num_tokens = input.q.shape()[0];
    let (rows, values) = (num_tokens * spec.num_heads, num_tokens * spec.num_heads * spec.value_dim);
    let mut result = Attended { out: vec![O::default(); values], lse: vec![f32::NEG_INFINITY; rows] };
    let mut deviation = Deviation { out: vec![0.0; values], lse: vec![0.0; rows] };
    let num_seqs = input.cu_seqlens_q.map_or(1, |c| c.len() - 1);
    for index in 0..num_seqs {
        let seq = input.sequence(index);
        for i in 0..seq.q_len {
            for h in 0..spec.num_heads {
                let g = h / spec.group_size();
                let mut keys = Vec::new();
                for j in seq.visible_rows(spec, i) {
                    let at = [index, h, i, j];
                    let hidden = input.mask.is_some_and(|m| m.at_broadcast(at) == 0)
                        || input.bias.is_some_and(|b| b.at_broadcast(at) == f32::NEG_INFINITY);
                    if hidden {
                        continue;
                    }
                    // With the sum of the squares of everything that is rounded.
                    let (mut dot, mut squares) = (0.0f32, 0.0f64);
                    let q = input.q.row(&[seq.q_begin + i, h]);
                    for (q, k) in q.iter().zip(input.kv.key(index, j, g, spec.head_dim)) {
                        let product = q.to_f32() * k.to_f32();
                        dot += product;
                        squares += f64::from(product).powi(2) + f64::from(dot).powi(2);
                    }
                    squares *= spec.softmax_scale.powi(2);
                    let mut s = spec.softmax_scale as f32 * dot;
                    if let Some(cap) = spec.softcap {
                        s = cap as f32 * (s / cap as f32).tanh();
                    }
                    squares += 3.0 * f64::from(s).powi(2);
                    let distance = (seq.k_start + j as i64) - (seq.q_start + i as i64);
                    let mut add = |x: f32| {
                        s += x;
                        squares += f64::from(x).powi(2) + f64::from(s).powi(2);
                    };
                    if let Some(bias) = &input.bias {
                        add(bias.at_broadcast(at));
                    }
                    if let Some(slopes) = input.alibi_slopes {
                        add(match &input.alibi_positions {
                            Some(p) => slopes[h] * p.at_broadcast([index, j]),
                            None => -slopes[h] * distance.abs() as f32,
                        });
                    }
                    if let (Some(bias), Some(table)) = (&spec.relative_bias, &input.relative_bias) {
                        add(table.at([bias.bucket(distance), h]));
                    }
                    keys.push((input.kv.value(index, j, g, spec.value_dim), s, squares * of_f32));
                }
                let sink = input.sinks.map_or(f32::NEG_INFINITY, |s| s[h]);
                let max = keys.iter().fold(sink, |m, (_, s, _)| m.max(*s));
                if max == f32::NEG_INFINITY && !keys.iter().any(|(_, s, _)| s.is_nan()) {
                    continue;
                }
                let exp = |s: f32| if s == max { 1.0 } else { (s - max).exp() };
                let sum = keys.iter().fold(0.0, |sum, (_, s, _)| sum + exp(*s)) + exp(sink);
                let row = (seq.q_begin + i) * spec.num_heads + h;
                result.lse[row] = max + sum.ln();
                let mut lse_variance = of_f32 * (f64::from(max).powi(2) + f64::from(result.lse[row]).powi(2));
                for (_, s, of_score) in &keys {
                    lse_variance += f64::from(exp(*s) / sum).powi(2) * (of_score + of_f32);
                }
                deviation.lse[row] = lse_variance.sqrt();
                for d in 0..spec.value_dim {
                    let at = row * spec.value_dim + d;
                    let x =
                        keys.iter().fold(0.0f32, |x, (v, s, _)| x + weights.round::<T>(exp(*s) / sum) * v[d].to_f32());
                    let (mut of_out, mut partial) = (of_f32 * f64::from(x).powi(2), 0.0);
                    for (v, s, of_score) in &keys {
                        let (p, v) = (f64::from(exp(*s) / sum), v[d].to_f64());
                        partial += p * v;
                        of_out += (p * (v - f64::from(x))).powi(2) * (of_score + 2.0 * of_f32);
                        of_out += (p * v).powi(2) * of_weight + partial.powi(2) * of_f32;
                    }
                    result.out[at] = O::from_f32(x);
                    deviation.out[at] = of_out.sqrt();
                }
            }
        }
    }
    (result, deviation)
}

/// `x weight^T + bias`
pub fn linear<T: Element, W: Element, O: Element>(
    x: &View<'_, T, 2>,
    weight: &View<'_, W, 2>,
    bias: Option<&[f32]>,
) -> Vec<O> {
    let ([rows, _], [cols, _]) = (x.shape(), weight.shape());
    let mut out = Vec::with_capacity(rows * cols);
    for t in 0..rows {
        for o in 0..cols {
            out.push(O::from_f32(dot(x.row(&[t]), weight.row(&[o])) + bias.map_or(0.0, |b| b[o])));
        }
    }
    out
}

/// One row of a block, in f32; the inner row as the backend stores it.
fn block<T: Element, W: Element>(ffn: &Ffn, x: &[f32], w: &FfnWeights<'_, W, f32>, store: Store) -> Vec<f32> {
    let project = |x: &[f32], w: &View<'_, W, 2>, b: Option<&[f32]>| -> Vec<f32> {
        (0..w.shape()[0]).map(|o| dot(x, w.row(&[o])) + b.map_or(0.0, |b| b[o])).collect()
    };
    let up = project(x, &w.up, w.up_bias);
    let gate = w.gate.as_ref().map(|g| project(x, g, w.gate_bias));
    let row: Vec<f32> =
        (0..up.len()).map(|i| store.round::<T>(inner(ffn.activation, gate.as_ref().map(|g| g[i]), up[i]))).collect();
    project(&row, &w.down, w.down_bias)
}

/// A whole block.
pub fn mlp<T: Element, W: Element, O: Element>(
    ffn: &Ffn,
    x: &View<'_, T, 2>,
    weights: &FfnWeights<'_, W, f32>,
    store: Store,
) -> Vec<O> {
    let mut out = Vec::new();
    for t in 0..x.shape()[0] {
        let row: Vec<f32> = x.row(&[t]).iter().map(|x| x.to_f32()).collect();
        out.extend(block::<T, W>(ffn, &row, weights, store).iter().map(|x| O::from_f32(*x)));
    }
    out
}

/// The routed experts: inner rows (and rows scaled on the input) as the backend stores them, the sum over slots in f32.
pub fn expert_ffn<T: Element, W: Element, O: Element>(
    spec: &ExpertFfn,
    hidden: &View<'_, T, 2>,
    routing: &Routing<'_, f32>,
    weights: &ExpertWeights<'_, W, f32>,
    store: Store,
) -> Vec<O> {
    let mut out = Vec::new();
    for t in 0..hidden.shape()[0] {
        let mut sum = vec![0.0f32; spec.ffn.hidden_size];
        for (id, w) in routing.topk_ids.row(&[t]).iter().zip(routing.topk_weights.row(&[t])) {
            let Some(expert) = spec.local_expert(*id) else { continue };
            let on_input = spec.weight_on == WeightOn::Input;
            let x: Vec<f32> = hidden
                .row(&[t])
                .iter()
                .map(|x| if on_input { store.round::<T>(w * x.to_f32()) } else { x.to_f32() })
                .collect();
            for (sum, y) in sum.iter_mut().zip(block::<T, W>(&spec.ffn, &x, &weights.expert(expert), store)) {
                *sum += if on_input { y } else { w * y };
            }
        }
        out.extend(sum.iter().map(|x| O::from_f32(spec.combine_scale as f32 * x)));
    }
    out
}

/// RMS or layer norm of rows.
pub fn norm<T: Element, O: Element>(
    spec: &Norm,
    x: &View<'_, T, 2>,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
) -> Vec<O> {
    let mut out = Vec::new();
    for t in 0..x.shape()[0] {
        let row: Vec<f32> = x.row(&[t]).iter().map(|x| x.to_f32()).collect();
        let weight = |i: usize| weight.map_or(1.0, |w| w[i] + spec.weight_offset as f32);
        let row = textbook::norm(spec.kind, spec.eps, &row, weight, |i| bias.map_or(0.0, |b| b[i]));
        out.extend(row.iter().map(|x| O::from_f32(*x)));
    }
    out
}

/// Rotation of every head.
pub fn rope<T: Element, O: Element>(
    spec: &Rope,
    x: &View<'_, T, 3>,
    positions: &[u32],
    cos: &View<'_, f32, 2>,
    sin: &View<'_, f32, 2>,
) -> Vec<O> {
    let [num_tokens, heads, _] = x.shape();
    let mut out = Vec::new();
    for t in 0..num_tokens {
        for h in 0..heads {
            let mut row: Vec<f32> = x.row(&[t, h]).iter().map(|x| x.to_f32()).collect();
            let p = positions[t] as usize;
            textbook::rotate(spec, &mut row, cos.row(&[p]), sin.row(&[p]));
            out.extend(row.iter().map(|x| O::from_f32(*x)));
        }
    }
    out
}
