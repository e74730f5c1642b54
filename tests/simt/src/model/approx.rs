//! The approximate functions: `ex2`, `lg2`, `rcp`, `rsqrt`, `sqrt`, `div`, `tanh`, `sin`, `cos`.
//!
//! The PTX ISA documents special values and an error bound, and leaves the bits to the hardware. So does this model: a result is any value of
//! the format within the bound, chosen by a hash of the seed, the operation and the input. A kernel that is right under every seed does not
//! rest on the luck of one chip. The same input gives the same output within one seed, as on hardware. Special values are exact.

use super::float::{BF16, F16, F32, Format, Round};

/// An approximate function of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Function {
    /// `2^x`, PTX ISA 9.7.3.21 and 9.7.4.10.
    Ex2,
    /// `log2(x)`, 9.7.3.20.
    Lg2,
    /// `1 / x`, 9.7.3.13.
    Rcp,
    /// `1 / sqrt(x)`, 9.7.3.16.
    Rsqrt,
    /// `sqrt(x)`, 9.7.3.15.
    Sqrt,
    /// `tanh(x)`, 9.7.3.22 and 9.7.4.9.
    Tanh,
    /// `sin(x)`, 9.7.3.18.
    Sin,
    /// `cos(x)`, 9.7.3.19.
    Cos,
}

/// The documented error bound of one result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Units in the last place of the correctly rounded result.
    Ulp(f64),
    /// Relative to the exact result.
    Relative(f64),
    /// Absolute.
    Absolute(f64),
}

impl Bound {
    /// Whether `got` is an allowed result where the exact one is `exact`; both finite.
    pub fn allows(self, format: Format, exact: f64, got: f64) -> bool {
        let nearest = format.decode(format.encode(exact, Round::Nearest, false));
        if got == nearest {
            return true;
        }
        match self {
            Bound::Ulp(n) => (got - nearest).abs() <= n * ulp(format, nearest),
            Bound::Relative(r) => (got - exact).abs() <= r * exact.abs(),
            Bound::Absolute(a) => (got - exact).abs() <= a,
        }
    }
}

/// The spacing of `format` at `x`.
fn ulp(format: Format, x: f64) -> f64 {
    let exp_min = 1 - format.bias();
    let exp = if x == 0.0 { exp_min } else { ((x.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(exp_min) };
    2f64.powi(exp - format.frac_bits as i32)
}

/// The error bound of `function` in `format` at argument `x`, from the notes of its section.
pub fn bound(function: Function, format: Format, x: f64) -> Bound {
    let two_to = |e: f64| e.exp2();
    match (function, format) {
        (Function::Ex2, F16) => Bound::Relative(two_to(-9.9)),
        (Function::Ex2, BF16) => Bound::Relative(two_to(-7.0)),
        (Function::Ex2, _) => Bound::Ulp(2.0),
        (Function::Lg2, _) if 0.5 < x && x < 2.0 => Bound::Absolute(two_to(-22.0)),
        (Function::Lg2, _) => Bound::Relative(two_to(-22.0)),
        (Function::Rcp, _) => Bound::Ulp(1.0),
        (Function::Rsqrt, _) => Bound::Relative(two_to(-22.9)),
        (Function::Sqrt, _) => Bound::Relative(two_to(-23.0)),
        (Function::Tanh, F16) => Bound::Absolute(two_to(-10.987)),
        (Function::Tanh, BF16) => Bound::Absolute(two_to(-8.0)),
        (Function::Tanh, _) => Bound::Relative(two_to(-11.0)),
        // documented in [-2 pi, 2 pi] and in [-100 pi, 100 pi]; nothing is promised further out
        (Function::Sin | Function::Cos, _) if x.abs() <= std::f64::consts::TAU => Bound::Absolute(two_to(-20.5)),
        (Function::Sin | Function::Cos, _) if x.abs() <= 50.0 * std::f64::consts::TAU => Bound::Absolute(two_to(-14.7)),
        (Function::Sin | Function::Cos, _) => Bound::Absolute(2.0),
    }
}

/// The exact (to `f64` precision) value, infinities and NaN as the section's table of special values has them.
pub fn exact(function: Function, x: f64) -> f64 {
    match function {
        Function::Ex2 => x.exp2(),
        Function::Lg2 => x.log2(),
        Function::Rcp => 1.0 / x,
        // -0 gives -infinity, +0 gives +infinity; every other negative gives NaN
        Function::Rsqrt if x == 0.0 => 1.0 / x,
        Function::Rsqrt => 1.0 / x.sqrt(),
        Function::Sqrt => x.sqrt(),
        Function::Tanh => x.tanh(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
    }
}

/// Chooses the errors. Without a seed every result is the correctly rounded one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Approx {
    /// The seed of the errors.
    pub seed: Option<u64>,
}

impl Approx {
    /// `function.approx` on one value of `format`. `ftz` flushes subnormal inputs and results to zero of the same sign.
    pub fn call(self, function: Function, format: Format, bits: u32, ftz: bool) -> u32 {
        let bits = if ftz { format.flush(bits) } else { bits };
        let x = format.decode(bits);
        let value = exact(function, x);
        if function == Function::Tanh && format == F32 && format.is_subnormal(bits) {
            return bits; // 9.7.3.22: subnormal inputs are passed through
        }
        // zeros, infinities and NaN are exact in every table; so is 2^0
        let special = x == 0.0 || !x.is_finite() || !value.is_finite();
        let noise = if special { 0 } else { self.noise(function as u64, u64::from(bits)) };
        let out = perturb(format, value, bound(function, format, x), noise);
        if ftz { format.flush(out) } else { out }
    }

    /// `div.approx.f32`: `a * (1 / b)`, at most 2 ulp for `|b|` in `[2^-126, 2^126]`; for `2^126 < |b| < 2^128` the result is 0, and NaN if
    /// `a` is infinite (PTX ISA 9.7.3.8).
    pub fn div(self, a: u32, b: u32, ftz: bool) -> u32 {
        let magnitude = f32::from_bits(b & 0x7fff_ffff);
        if magnitude > 2f32.powi(126) && magnitude.is_finite() {
            let a = f32::from_bits(a);
            return if a.is_nan() || a.is_infinite() { F32.nan() } else { (a.to_bits() ^ b) & 0x8000_0000 };
        }
        self.div_full(a, b, ftz)
    }

    /// `div.full.f32`: at most 2 ulp over the full range (PTX ISA 9.7.3.8).
    pub fn div_full(self, a: u32, b: u32, ftz: bool) -> u32 {
        let (a, b) = if ftz { (F32.flush(a), F32.flush(b)) } else { (a, b) };
        let (x, y) = (F32.decode(a), F32.decode(b));
        let value = x / y;
        let special = x == 0.0 || y == 0.0 || !x.is_finite() || !y.is_finite();
        let noise = if special { 0 } else { self.noise(100, u64::from(a) << 32 | u64::from(b)) };
        let out = perturb(F32, value, Bound::Ulp(2.0), noise);
        if ftz { F32.flush(out) } else { out }
    }

    /// 0 for no error, else a hash of everything that decides it.
    fn noise(self, function: u64, input: u64) -> u64 {
        let Some(seed) = self.seed else { return 0 };
        let mut h = seed ^ function.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ input.wrapping_mul(0xd6e8_feb8_6659_fd93);
        h = (h ^ h >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
        h = (h ^ h >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (h ^ h >> 32) | 1
    }
}

/// A value of `format` within `bound` of `value`, by `noise`; the nearest one where `noise` is 0 or the candidate is not allowed.
fn perturb(format: Format, value: f64, bound: Bound, noise: u64) -> u32 {
    let nearest = format.encode(value, Round::Nearest, false);
    if noise == 0 || !value.is_finite() {
        return nearest;
    }
    let unit = (noise >> 11) as f64 / (1u64 << 52) as f64 - 1.0; // in [-1, 1)
    let width = match bound {
        Bound::Ulp(n) => n * ulp(format, value),
        Bound::Relative(r) => r * value.abs(),
        Bound::Absolute(a) => a,
    };
    let candidate = format.encode(value + unit * width, Round::Nearest, false);
    let got = format.decode(candidate);
    // an error never turns a finite value into infinity, nor changes a sign, nor takes tanh, sin or cos beyond 1
    let tame = got.is_finite() && (got > 0.0) == (value > 0.0) && !(value.abs() <= 1.0 && got.abs() > 1.0);
    if tame && bound.allows(format, value, got) { candidate } else { nearest }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Function; 8] = [
        Function::Ex2,
        Function::Lg2,
        Function::Rcp,
        Function::Rsqrt,
        Function::Sqrt,
        Function::Tanh,
        Function::Sin,
        Function::Cos,
    ];
    const INF: u32 = 0x7f80_0000;
    const MINUS: u32 = 0x8000_0000;
    const NAN: u32 = 0x7fff_ffff;

    #[test]
    fn special_values_are_the_tables_of_the_isa() {
        let one = 1.0f32.to_bits();
        // (function, input, result without .ftz)
        let table = [
            // 9.7.3.21
            (Function::Ex2, MINUS | INF, 0),
            (Function::Ex2, MINUS, one),
            (Function::Ex2, 0, one),
            (Function::Ex2, INF, INF),
            (Function::Ex2, 0xffc0_0000, NAN),
            // 9.7.3.20
            (Function::Lg2, MINUS | INF, NAN),
            (Function::Lg2, MINUS | one, NAN),
            (Function::Lg2, MINUS, MINUS | INF),
            (Function::Lg2, 0, MINUS | INF),
            (Function::Lg2, INF, INF),
            // 9.7.3.13
            (Function::Rcp, MINUS | INF, MINUS),
            (Function::Rcp, MINUS, MINUS | INF),
            (Function::Rcp, 0, INF),
            (Function::Rcp, INF, 0),
            // 9.7.3.16
            (Function::Rsqrt, MINUS | INF, NAN),
            (Function::Rsqrt, MINUS | one, NAN),
            (Function::Rsqrt, MINUS, MINUS | INF),
            (Function::Rsqrt, 0, INF),
            (Function::Rsqrt, INF, 0),
            // 9.7.3.15
            (Function::Sqrt, MINUS | INF, NAN),
            (Function::Sqrt, MINUS | one, NAN),
            (Function::Sqrt, MINUS, MINUS),
            (Function::Sqrt, 0, 0),
            (Function::Sqrt, INF, INF),
            // 9.7.3.22
            (Function::Tanh, MINUS | INF, MINUS | one),
            (Function::Tanh, MINUS, MINUS),
            (Function::Tanh, 0, 0),
            (Function::Tanh, INF, one),
            (Function::Tanh, 0x8000_0123, 0x8000_0123),
            // 9.7.3.18, 9.7.3.19
            (Function::Sin, MINUS | INF, NAN),
            (Function::Sin, MINUS, MINUS),
            (Function::Sin, 0, 0),
            (Function::Sin, INF, NAN),
            (Function::Cos, MINUS | INF, NAN),
            (Function::Cos, MINUS, one),
            (Function::Cos, 0, one),
            (Function::Cos, INF, NAN),
        ];
        for seed in [None, Some(1), Some(2)] {
            for (function, input, want) in table {
                assert_eq!(Approx { seed }.call(function, F32, input, false), want, "{function:?} {input:#x}");
            }
            for function in ALL {
                assert_eq!(Approx { seed }.call(function, F32, 0x7f80_0001, true), NAN);
            }
        }
    }

    #[test]
    fn ftz_flushes_inputs_and_results() {
        let approx = Approx { seed: Some(9) };
        let one = 1.0f32.to_bits();
        assert_eq!(approx.call(Function::Ex2, F32, 0x8000_0001, true), one);
        assert_eq!(approx.call(Function::Ex2, F32, (-140.0f32).to_bits(), true), 0);
        assert_ne!(approx.call(Function::Ex2, F32, (-140.0f32).to_bits(), false), 0);
        assert_eq!(approx.call(Function::Lg2, F32, 1, true), MINUS | INF);
        assert_eq!(approx.call(Function::Lg2, F32, MINUS | 1, true), MINUS | INF);
        assert_eq!(approx.call(Function::Lg2, F32, MINUS | 1, false), NAN);
        assert_eq!(approx.call(Function::Rcp, F32, MINUS | 1, true), MINUS | INF);
        assert_eq!(approx.call(Function::Rcp, F32, 2f32.powi(127).to_bits(), true), 0);
        assert_eq!(approx.call(Function::Rsqrt, F32, MINUS | 1, true), MINUS | INF);
        assert_eq!(approx.call(Function::Sqrt, F32, 1, true), 0);
        // 9.7.4.10: ex2.approx.ftz.bf16 of a subnormal is 1, ex2 of f16 takes subnormals
        assert_eq!(approx.call(Function::Ex2, BF16, 0x8001, true), 0x3f80);
        assert_eq!(approx.call(Function::Ex2, F16, 0xfc00, false), 0);
        assert_eq!(approx.call(Function::Ex2, F16, 0x7c00, false), 0x7c00);
        assert_eq!(approx.call(Function::Tanh, F16, 0x8000, false), 0x8000);
        assert_eq!(approx.call(Function::Tanh, BF16, 0xff80, false), 0xbf80);
    }

    #[test]
    fn errors_stay_within_the_documented_bound_and_occur() {
        for format in [F32, F16, BF16] {
            for function in ALL {
                if format != F32 && !matches!(function, Function::Ex2 | Function::Tanh) {
                    continue;
                }
                let mut differ = 0;
                for i in 0..40_000u32 {
                    let x = match function {
                        Function::Ex2 if format == F16 => i as f64 / 40_000.0 * 30.0 - 15.0,
                        Function::Ex2 => i as f64 / 40_000.0 * 250.0 - 125.0,
                        Function::Tanh => i as f64 / 40_000.0 * 10.0 - 5.0,
                        Function::Sin | Function::Cos => i as f64 / 40_000.0 * 600.0 - 300.0,
                        _ => f64::from(f32::from_bits(i * 50_000 + 0x80_0001)),
                    };
                    let bits = format.encode(x, Round::Nearest, false);
                    let x = format.decode(bits);
                    let value = exact(function, x);
                    let got = Approx { seed: Some(u64::from(i)) }.call(function, format, bits, false);
                    let nearest = Approx::default().call(function, format, bits, false);
                    assert_eq!(nearest, format.encode(value, Round::Nearest, false));
                    assert!(
                        bound(function, format, x).allows(format, value, format.decode(got)),
                        "{function:?} {format:?} {x:e}: {:e}",
                        format.decode(got)
                    );
                    differ += u32::from(got != nearest);
                }
                assert!(differ > 500, "{function:?} {format:?} hardly ever differs: {differ}");
            }
        }
    }

    #[test]
    fn division() {
        let bits = |x: f32| x.to_bits();
        let approx = Approx { seed: Some(4) };
        for i in 1..20_000u32 {
            let (a, b) = (f32::from_bits(i * 70_001), f32::from_bits(i.wrapping_mul(98_765) % 0x7e00_0000 + 0x80_0000));
            let got = f32::from_bits(approx.div_full(bits(a), bits(b), false));
            let want = a / b;
            if want.is_finite() {
                assert!((f64::from(got) - f64::from(want)).abs() <= 2.0 * ulp(F32, f64::from(want)));
            }
        }
        // 9.7.3.8: 2^126 < |b| < 2^128
        assert_eq!(approx.div(bits(-3.0), bits(2f32.powi(127)), false), MINUS);
        assert_eq!(approx.div(INF, bits(2f32.powi(127)), false), NAN);
        assert_ne!(approx.div_full(bits(3.0), bits(2f32.powi(127)), false), 0);
        assert_eq!(approx.div(bits(1.0), 0, false), INF);
        assert_eq!(approx.div(0, 0, false), NAN);
        assert_eq!(approx.div(bits(1.0), INF, false), 0);
    }
}
