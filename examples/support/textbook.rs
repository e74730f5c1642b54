//! One row at a time by the textbook formulas, sums in f32 from the first to the last: what the naive method of the numerical
//! contract is made of. Independent of the library's backends, and of what surrounds it, so that the tests use it too.

use gatefold::Element;
use gatefold::spec::{Activation, NormKind, Rope, RopeStyle};

/// Sequential sum of products.
pub fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a.to_f32() * b.to_f32())
}

pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `act(gate) * up`, or `act(up)` of a plain block.
pub fn inner(activation: Activation, gate: Option<f32>, up: f32) -> f32 {
    let act = |x: f32| match activation {
        Activation::GeluErf => x * 0.5 * (1.0 + erf(f64::from(x) / std::f64::consts::SQRT_2) as f32),
        // 1 + tanh(z) = 2 sigmoid(2 z), which does not cancel.
        Activation::GeluTanh => x * sigmoid(2.0 * (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)),
        Activation::Relu => x.max(0.0),
        Activation::ReluSquared => x.max(0.0) * x.max(0.0),
        _ => x / (1.0 + (-x).exp()),
    };
    match (activation, gate) {
        (Activation::SwigluClamped { alpha, limit }, Some(gate)) => {
            let (gate, up) = (gate.min(limit as f32), up.clamp(-limit as f32, limit as f32));
            (up + 1.0) * gate / (1.0 + (-alpha as f32 * gate).exp())
        }
        (_, Some(gate)) => act(gate) * up,
        (_, None) => act(up),
    }
}

/// By Simpson's rule on `2 / sqrt(pi) * exp(-t^2)`: slow and simple, to about 1e-13.
pub fn erf(x: f64) -> f64 {
    let n = 2000;
    let (x, sign) = (x.abs().min(7.0), x.signum());
    let f = |i: usize| (-(x * i as f64 / n as f64).powi(2)).exp();
    let inside: f64 = (1..n).map(|i| f(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    sign * 2.0 / std::f64::consts::PI.sqrt() * (f(0) + inside + f(n)) * x / n as f64 / 3.0
}

/// `(x - mean) / sqrt(variance + eps) * weight + bias`; without mean for an RMS norm.
pub fn norm(
    kind: NormKind,
    eps: f64,
    row: &[f32],
    weight: impl Fn(usize) -> f32,
    bias: impl Fn(usize) -> f32,
) -> Vec<f32> {
    let width = row.len() as f32;
    let mean = if kind == NormKind::Layer { row.iter().fold(0.0, |s, x| s + x) / width } else { 0.0 };
    let variance = row.iter().fold(0.0, |s, x| s + (x - mean) * (x - mean)) / width;
    let scale = 1.0 / (variance + eps as f32).sqrt();
    row.iter().enumerate().map(|(i, x)| (x - mean) * scale * weight(i) + bias(i)).collect()
}

/// Rotates one head by the angles of its position.
pub fn rotate(rope: &Rope, row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = rope.rotary_dim / 2;
    let old = row.to_vec();
    for n in 0..half {
        let (from, to) = match rope.style {
            RopeStyle::Half => ([n, n + half], [n, n + half]),
            RopeStyle::Interleaved => ([2 * n, 2 * n + 1], [2 * n, 2 * n + 1]),
            _ => ([2 * n, 2 * n + 1], [n, n + half]),
        };
        let (a, b) = (old[from[0]], old[from[1]]);
        row[to[0]] = a * cos[n] - b * sin[n];
        row[to[1]] = b * cos[n] + a * sin[n];
    }
}
