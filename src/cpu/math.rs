//! Elementary functions on vectors of `f32`.
//!
//! Errors against `f64` (in units in the last place of the result, subnormal results in units of 2^-149) are held by the tests
//! at every level. NaN gives NaN everywhere; no result is flushed to zero. Coefficients are minimax fits made for this crate.

use super::simd::Simd;

/// Polynomial by Horner's rule, lowest coefficient first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, x: S::F32, coefficients: [f32; N]) -> S::F32 {
    let mut sum = simd.splat(coefficients[N - 1]);
    for i in (0..N - 1).rev() {
        sum = simd.fma(sum, x, simd.splat(coefficients[i]));
    }
    sum
}

/// `e^x`, at most 1.5 ulp. `exp(-inf) = 0`, `exp(inf) = inf`; results below 2^-126 are subnormal, not zero.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, and `e^r = 1 + r + r^2 p(r)` (Cody and Waite 1980).
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    const LN2_HIGH: f32 = 355.0 / 512.0; // 9 bits: a product with |n| < 2^15 is exact
    const LN2_LOW: f32 = -2.121_944_4e-4; // ln 2 - LN2_HIGH
    // Beyond these bounds the result is 0 or infinite. The order of the operands keeps NaN.
    let x = simd.min(simd.splat(89.0), simd.max(simd.splat(-105.0), x));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.fma(n, simd.splat(-LN2_HIGH), x);
    let r = simd.fma(n, simd.splat(-LN2_LOW), r);
    let p = polynomial(simd, r, [0.5, 1.666_652_1e-1, 4.166_839e-2, 8.368_717e-3, 1.381_460_1e-3]);
    let e = simd.fma(simd.mul(r, r), p, r);
    simd.scale_pow2(simd.add(e, simd.splat(1.0)), n)
}

/// `1 / (1 + e^-x)`, at most 3 ulp, also where it is tiny.
#[inline(always)]
pub fn sigmoid<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    let e = exp(simd, simd.neg(simd.abs(x)));
    let numerator = simd.select(simd.lt(x, simd.zero()), e, one);
    simd.div(numerator, simd.add(one, e))
}

/// `tanh x`, at most 2 ulp.
#[inline(always)]
pub fn tanh<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    let size = simd.abs(x);
    // Small arguments: x + x^3 p(x^2). Others: 1 - 2 / (e^2x + 1).
    let square = simd.mul(x, x);
    let p = polynomial(simd, square, [-0.333_332_7, 1.333_115_3e-1, -5.371_410_8e-2, 2.055_172_4e-2, -5.603_919_3e-3]);
    let small = simd.fma(simd.mul(square, x), p, x);
    let e = exp(simd, simd.add(size, size));
    let large = simd.sub(one, simd.div(simd.splat(2.0), simd.add(e, one)));
    let large = simd.select(simd.lt(x, simd.zero()), simd.neg(large), large);
    simd.select(simd.lt(size, simd.splat(0.64)), small, large)
}

/// `e^(-scale x^2)` for `x >= 0`, without the error that rounding `x^2` would bring.
#[inline(always)]
fn gaussian<S: Simd>(simd: S, x: S::F32, scale: f32) -> S::F32 {
    // x = high + low, where high^2 is exact: x^2 = high^2 + low (x + high). Past 16 the result is 0. Keeps NaN.
    let x = simd.min(simd.splat(16.0), x);
    let high = simd.mul(simd.round(simd.mul(x, simd.splat(128.0))), simd.splat(1.0 / 128.0));
    let rest = simd.mul(simd.mul(simd.sub(x, high), simd.add(x, high)), simd.splat(-scale));
    let e = exp(simd, simd.mul(simd.mul(high, high), simd.splat(-scale)));
    let p = polynomial(simd, rest, [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0]);
    simd.mul(e, p)
}

/// `erfc(z) e^(z^2)` for `z` in `[1, 10.6]`, larger `z` as 10.6.
#[inline(always)]
fn scaled_erfc<S: Simd>(simd: S, z: S::F32) -> S::F32 {
    let z = simd.max(simd.min(z, simd.splat(10.6)), simd.splat(0.99));
    let two = simd.splat(2.0);
    let s = simd.div(simd.sub(z, two), simd.add(z, two));
    let p = polynomial(
        simd,
        s,
        [
            5.107_913_6e-1,
            1.672_110_1e-1,
            -2.038_442e-1,
            1.215_150_65e-1,
            -2.897_992_4e-2,
            -7.515_217_6e-3,
            4.826_541e-3,
            1.078_731_1e-3,
            -9.033_888e-4,
        ],
    );
    simd.div(p, z)
}

/// `erf(x)` for `|x| <= 1`: `x + x p(x^2)`.
#[inline(always)]
fn small_erf<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let p = polynomial(
        simd,
        simd.mul(x, x),
        [1.283_791_7e-1, -3.761_262_6e-1, 1.128_358_5e-1, -2.685_381_3e-2, 5.188_328e-3, -8.010_193_7e-4, 7.853_861e-5],
    );
    simd.fma(x, p, x)
}

/// `x sigmoid(x)`, at most 4 ulp, and `|x| 2^-149` more where the sigmoid is subnormal.
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    simd.mul(x, sigmoid(simd, x))
}

/// `x / 2 (1 + erf(x / sqrt 2))`, at most 8 ulp, and `|x| 2^-149` more where the factor of `x` is subnormal.
#[inline(always)]
pub fn gelu_erf<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let half = simd.splat(0.5);
    let z = simd.mul(simd.abs(x), simd.splat(std::f32::consts::FRAC_1_SQRT_2));
    // Probability of the tail beyond |x|; past z = 1 without the cancellation of 1 - erf.
    let small = simd.sub(half, simd.mul(half, small_erf(simd, z)));
    let large = simd.mul(simd.mul(gaussian(simd, simd.abs(x), 0.5), half), scaled_erfc(simd, z));
    let tail = simd.select(simd.lt(z, simd.splat(1.0)), small, large);
    let negative = simd.lt(x, simd.zero());
    simd.mul(x, simd.select(negative, tail, simd.sub(simd.splat(1.0), tail)))
}

/// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, which is `x sigmoid(2 u)` with `u` the argument of `tanh`.
///
/// At most 4 ulp for `x >= -1`; below, the rounding of `u` counts `u` times: at most `6 + 8 |u|` ulp,
/// and `|x| 2^-149` more where the sigmoid is subnormal.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769_2;
    let inner = simd.fma(simd.mul(simd.mul(x, x), x), simd.splat(0.044_715), x);
    simd.mul(x, sigmoid(simd, simd.mul(inner, simd.splat(TWICE_SQRT_2_OVER_PI))))
}

/// `max(x, 0)`; NaN stays NaN.
#[inline(always)]
pub fn relu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    simd.max(simd.zero(), x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::level::{Level, dispatch};
    use crate::cpu::simd::{Kernel, MAX_LANES};

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Function {
        Exp,
        Sigmoid,
        Tanh,
        Silu,
        GeluErf,
        GeluTanh,
        Relu,
    }
    use Function::*;

    struct Apply<'a>(Function, &'a mut [f32]);
    impl Kernel for Apply<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            for chunk in self.1.chunks_mut(S::LANES) {
                let x = simd.load_partial(chunk);
                let y = match self.0 {
                    Exp => exp(simd, x),
                    Sigmoid => sigmoid(simd, x),
                    Tanh => tanh(simd, x),
                    Silu => silu(simd, x),
                    GeluErf => gelu_erf(simd, x),
                    GeluTanh => gelu_tanh(simd, x),
                    Relu => relu(simd, x),
                };
                simd.store_partial(chunk, y);
            }
        }
    }

    /// `erfc(x)` for `x >= 0`: the power series of `erf` where it converges fast, else the continued fraction.
    fn erfc_f64(x: f64) -> f64 {
        if x < 2.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..80 {
                term *= -x * x / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let mut fraction = 0.0;
            for n in (1..200).rev() {
                fraction = n as f64 / 2.0 / (x + fraction);
            }
            (-x * x).exp() / (x + fraction) * std::f64::consts::FRAC_2_SQRT_PI / 2.0
        }
    }

    fn sigmoid_f64(x: f64) -> f64 {
        if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
    }

    fn tanh_argument(x: f64) -> f64 {
        (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))
    }

    /// The function in f64, and the bound in ulp that its documentation states.
    fn truth(function: Function, x: f64) -> (f64, f64) {
        match function {
            Exp => (x.exp(), 1.5),
            Sigmoid => (sigmoid_f64(x), 3.0),
            Tanh => (x.tanh(), 2.0),
            Silu => (x * sigmoid_f64(x), 4.0),
            GeluErf => {
                let z = x.abs() * std::f64::consts::FRAC_1_SQRT_2;
                let tail = 0.5 * erfc_f64(z);
                (x * if x < 0.0 { tail } else { 1.0 - tail }, 8.0)
            }
            GeluTanh => {
                let u = tanh_argument(x);
                (x * sigmoid_f64(2.0 * u), if x >= -1.0 { 4.0 } else { 6.0 + 8.0 * u.abs() })
            }
            Relu => (x.max(0.0), 0.0),
        }
    }

    /// One unit in the last place of `x` as an f32.
    fn ulp(x: f64) -> f64 {
        let exponent = if x == 0.0 { -149 } else { (x.abs().log2().floor() as i32 - 23).max(-149) };
        2f64.powi(exponent)
    }

    const ALL: [Function; 7] = [Exp, Sigmoid, Tanh, Silu, GeluErf, GeluTanh, Relu];

    #[test]
    fn within_the_stated_ulp() {
        let mut points: Vec<f32> = (-150_000..150_000).map(|i| i as f32 * 7.3e-4).collect();
        points.extend((0..40_000).flat_map(|i| {
            let x = f32::from_bits(i * 53_687);
            [x, -x]
        }));
        points.retain(|x| x.is_finite() && x.abs() < 110.0);
        for level in Level::available() {
            for function in ALL {
                let mut got = points.clone();
                dispatch(level, Apply(function, &mut got));
                let mut worst = (0.0, 0.0);
                for (x, got) in points.iter().zip(&got) {
                    let (want, bound) = truth(function, *x as f64);
                    if want.abs() > f32::MAX as f64 {
                        assert_eq!(*got, want as f32, "{function:?}({x}) at {level}");
                        continue;
                    }
                    let subnormal = matches!(function, Silu | GeluErf | GeluTanh) && want.abs() < 1e-36;
                    let bound = bound + if subnormal { x.abs() as f64 } else { 0.0 };
                    let error = (*got as f64 - want).abs() / ulp(want);
                    assert!(
                        error <= bound,
                        "{function:?}({x:e}) = {got:e} at {level}, expected {want:e}: {error:.2} ulp"
                    );
                    if error > worst.0 {
                        worst = (error, *x);
                    }
                }
                println!("{level:>12} {function:?}: {:.2} ulp at {:e}", worst.0, worst.1);
            }
        }
    }

    #[test]
    fn edges() {
        let inf = f32::INFINITY;
        for level in Level::available() {
            let eval = |function, x: f32| {
                let mut all = [x; MAX_LANES];
                dispatch(level, Apply(function, &mut all));
                assert!(all.iter().all(|y| y.to_bits() == all[0].to_bits()));
                all[0]
            };
            for function in ALL {
                assert!(eval(function, f32::NAN).is_nan(), "{function:?} at {level}");
            }
            assert_eq!(eval(Exp, -inf).to_bits(), 0);
            assert_eq!(eval(Exp, -200.0).to_bits(), 0);
            assert_eq!(eval(Exp, 0.0), 1.0);
            assert_eq!(eval(Exp, -103.0).to_bits(), (-103f64).exp().to_bits().min(1) as u32);
            assert_eq!(eval(Exp, inf), inf);
            assert_eq!(eval(Exp, 88.8), inf);
            for function in [Sigmoid, Tanh] {
                assert_eq!(eval(function, inf), 1.0);
                assert_eq!(eval(function, f32::MAX), 1.0);
                assert_eq!(eval(function, -inf), if function == Sigmoid { 0.0 } else { -1.0 });
            }
            for function in [Silu, GeluErf, GeluTanh, Relu] {
                assert_eq!(eval(function, inf), inf, "{function:?} at {level}");
                assert_eq!(eval(function, -f32::MAX), 0.0, "{function:?} at {level}");
                assert_eq!(eval(function, 0.0), 0.0);
            }
            assert_eq!(eval(Relu, -inf), 0.0);
            assert_eq!(eval(Tanh, -0.0), 0.0);
        }
    }
}
