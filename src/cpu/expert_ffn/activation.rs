//! What lies between the two projections, on a tile that is still in the first level cache.

use crate::cpu::gemm::PANEL;
use crate::cpu::math::{gelu_erf, gelu_tanh, relu, sigmoid, silu};
use crate::cpu::simd::{Kernel, Simd};
use crate::spec::{Activation, Ffn};

/// Turns the sums of a tile into inner values, in place: row `i` of `c` (`[rows][PANEL]`) holds gate and up sums, 16 each, or
/// 32 up sums, and afterwards 16 or 32 inner values at its start.
pub struct Activate<'a> {
    pub ffn: &'a Ffn,
    pub c: &'a mut [f32],
    /// Factor of each row's sums: the router's weight on the input.
    pub factors: Option<&'a [f32]>,
    /// Of the panel's outputs.
    pub bias: Option<&'a [f32]>,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let up_at = if self.ffn.gated { PANEL / 2 } else { 0 };
        for (i, row) in self.c.chunks_exact_mut(PANEL).enumerate() {
            // `w (x . gate)` is `(w x) . gate` without rounding `w x` to the storage type. Rows beyond the factors are padding.
            let factor = self.factors.map(|f| simd.splat(f.get(i).copied().unwrap_or(0.0)));
            let sum = |row: &[f32], at: usize| {
                let mut sum = simd.load(&row[at..]);
                if let Some(factor) = factor {
                    sum = simd.mul(sum, factor);
                }
                if let Some(bias) = self.bias {
                    sum = simd.add(sum, simd.load(&bias[at..]));
                }
                sum
            };
            for at in (0..PANEL - up_at).step_by(S::LANES) {
                let up = sum(row, up_at + at);
                let inner = if self.ffn.gated {
                    gated(simd, self.ffn.activation, sum(row, at), up)
                } else {
                    activate(simd, self.ffn.activation, up)
                };
                simd.store(&mut row[at..], inner);
            }
        }
    }
}

/// `act(gate) * up`
#[inline(always)]
fn gated<S: Simd>(simd: S, activation: Activation, gate: S::F32, up: S::F32) -> S::F32 {
    if let Activation::SwigluClamped { alpha, limit } = activation {
        let (limit, alpha) = (simd.splat(limit as f32), simd.splat(alpha as f32));
        // The operand that comes last is what NaN gives.
        let gate = simd.min(limit, gate);
        let up = simd.max(simd.neg(limit), simd.min(limit, up));
        let glu = simd.mul(gate, sigmoid(simd, simd.mul(alpha, gate)));
        simd.mul(simd.add(up, simd.splat(1.0)), glu)
    } else {
        simd.mul(activate(simd, activation, gate), up)
    }
}

/// `act(x)`
#[inline(always)]
fn activate<S: Simd>(simd: S, activation: Activation, x: S::F32) -> S::F32 {
    match activation {
        Activation::Silu => silu(simd, x),
        Activation::GeluErf => gelu_erf(simd, x),
        Activation::GeluTanh => gelu_tanh(simd, x),
        Activation::Relu => relu(simd, x),
        Activation::ReluSquared => {
            let x = relu(simd, x);
            simd.mul(x, x)
        }
        Activation::SwigluClamped { .. } => unreachable!("`Ffn::validate` refuses a clamped SwiGLU without a gate"),
    }
}
