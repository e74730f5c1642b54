//! Floating-point formats and scalar arithmetic, bit for bit.
//!
//! Every value of every format here fits an `f64` exactly, so a conversion is "decode to `f64`, round once on the way out" and an operation
//! is "compute in `f64` rounded to odd, round once on the way out". Rounding to odd keeps the lowest bit as a sticky bit, which makes the
//! second rounding exact in every mode, because 53 bits hold at least two more than the widest destination (Boldo and Melquiond 2008).
//!
//! Results that are NaN take the canonical pattern of the destination (PTX ISA 9.7.3: f32 NaN results are the canonical `0x7fffffff`).

/// Rounding modifier of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Round {
    /// `.rn`, `.rni`: to nearest, ties to even.
    Nearest,
    /// `.rz`, `.rzi`: towards zero.
    Zero,
    /// `.rm`, `.rmi`: towards negative infinity.
    Down,
    /// `.rp`, `.rpi`: towards positive infinity.
    Up,
    /// `.rna`: to nearest, ties away from zero.
    Away,
}

/// A binary floating-point storage format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Width of the exponent field.
    pub exp_bits: u32,
    /// Width of the fraction field.
    pub frac_bits: u32,
    /// Unused low bits (tf32 is stored in the upper 19 bits of an f32).
    pub pad_bits: u32,
    /// Whether the largest exponent holds infinities; e4m3 spends it on numbers and has a single NaN pattern per sign.
    pub has_inf: bool,
}

/// IEEE binary32.
pub const F32: Format = Format { exp_bits: 8, frac_bits: 23, pad_bits: 0, has_inf: true };
/// tf32: range of f32, fraction of f16; the low 13 bits of its 32-bit register are unused (PTX ISA 5.2.3).
pub const TF32: Format = Format { exp_bits: 8, frac_bits: 10, pad_bits: 13, has_inf: true };
/// IEEE binary16.
pub const F16: Format = Format { exp_bits: 5, frac_bits: 10, pad_bits: 0, has_inf: true };
/// bfloat16.
pub const BF16: Format = Format { exp_bits: 8, frac_bits: 7, pad_bits: 0, has_inf: true };
/// e4m3: no infinity, NaN is `0x7f` and `0xff` (PTX ISA 5.2.3).
pub const E4M3: Format = Format { exp_bits: 4, frac_bits: 3, pad_bits: 0, has_inf: false };
/// e5m2: IEEE-like, with infinities.
pub const E5M2: Format = Format { exp_bits: 5, frac_bits: 2, pad_bits: 0, has_inf: true };

impl Format {
    /// Bits of the storage, padding included.
    pub const fn width(self) -> u32 {
        1 + self.exp_bits + self.frac_bits + self.pad_bits
    }
    /// Exponent bias.
    pub const fn bias(self) -> i32 {
        (1 << (self.exp_bits - 1)) - 1
    }
    /// The sign bit.
    pub const fn sign_bit(self) -> u32 {
        1 << (self.width() - 1)
    }
    /// Positive infinity; for a format without infinities, NaN.
    pub const fn inf(self) -> u32 {
        if self.has_inf { ((1 << self.exp_bits) - 1) << (self.frac_bits + self.pad_bits) } else { self.nan() }
    }
    /// The canonical NaN: sign clear, all other bits set (`0x7fffffff`, `0x7fff`, `0x7f`).
    pub const fn nan(self) -> u32 {
        self.sign_bit() - 1
    }
    /// The largest finite value, MAX_NORM in PTX ISA 9.7.9.21.
    pub const fn max_finite(self) -> u32 {
        if self.has_inf { self.inf() - (1 << self.pad_bits) } else { self.nan() - 1 }
    }
    /// Whether `bits` is a NaN.
    pub const fn is_nan(self, bits: u32) -> bool {
        let magnitude = bits & (self.sign_bit() - 1);
        if self.has_inf { magnitude > self.inf() } else { magnitude == self.nan() }
    }
    /// Whether `bits` is subnormal (not zero).
    pub const fn is_subnormal(self, bits: u32) -> bool {
        let magnitude = bits & (self.sign_bit() - 1);
        magnitude != 0 && magnitude < 1 << (self.frac_bits + self.pad_bits)
    }
    /// Sign-preserving flush of subnormals to zero (`.ftz`).
    pub const fn flush(self, bits: u32) -> u32 {
        if self.is_subnormal(bits) { bits & self.sign_bit() } else { bits }
    }

    /// The exact value of `bits`. Padding counts: an f32 pattern read as tf32 must be truncated by the caller.
    #[inline]
    pub fn decode(self, bits: u32) -> f64 {
        if self == F32 {
            return f64::from(f32::from_bits(bits));
        }
        let frac_bits = self.frac_bits + self.pad_bits;
        let magnitude = bits & (self.sign_bit() - 1);
        let exp = (magnitude >> frac_bits) as i32;
        let frac = magnitude & ((1 << frac_bits) - 1);
        let value = if self.is_nan(bits) {
            f64::NAN
        } else if self.has_inf && magnitude >= self.inf() {
            f64::INFINITY
        } else if exp == 0 {
            f64::from(frac) * pow2(1 - self.bias() - frac_bits as i32)
        } else {
            f64::from(frac | 1 << frac_bits) * pow2(exp - self.bias() - frac_bits as i32)
        };
        if bits & self.sign_bit() != 0 { -value } else { value }
    }

    /// Rounds `value` once into this format. With `satfinite` everything beyond the largest finite value, infinity included, becomes the
    /// largest finite value with its sign (PTX ISA 9.7.9.21); without it overflow follows IEEE 754 for the rounding mode.
    #[inline]
    pub fn encode(self, value: f64, round: Round, satfinite: bool) -> u32 {
        let bits = value.to_bits();
        let negative = bits >> 63 != 0;
        let sign = if negative { self.sign_bit() } else { 0 };
        if value.is_nan() {
            return self.nan();
        }
        if value.is_infinite() {
            return sign | if satfinite { self.max_finite() } else { self.inf() };
        }
        if value == 0.0 {
            return sign;
        }
        let mut mantissa = bits & ((1 << 52) - 1);
        let mut exp = (bits >> 52 & 0x7ff) as i32;
        if exp == 0 {
            let shift = mantissa.leading_zeros() - 11;
            mantissa <<= shift;
            exp = 1 - shift as i32;
        } else {
            mantissa |= 1 << 52;
        }
        let exp = exp - 1023;
        let exp_min = 1 - self.bias();
        let drop = (52 - self.frac_bits as i32 + (exp_min - exp).max(0)).min(60) as u32;
        let mut kept = mantissa >> drop;
        let rest = mantissa & ((1 << drop) - 1);
        let half = 1u64 << (drop - 1);
        let increment = match round {
            Round::Nearest => rest > half || (rest == half && kept & 1 == 1),
            Round::Away => rest >= half,
            Round::Zero => false,
            Round::Down => negative && rest != 0,
            Round::Up => !negative && rest != 0,
        };
        kept += u64::from(increment);
        let magnitude = ((((exp.max(exp_min) - exp_min) as u64) << self.frac_bits) + kept) << self.pad_bits;
        if magnitude > u64::from(self.max_finite()) {
            let to_max = match round {
                Round::Nearest | Round::Away => false,
                Round::Zero => true,
                Round::Down => !negative,
                Round::Up => negative,
            };
            return sign | if satfinite || to_max { self.max_finite() } else { self.inf() };
        }
        sign | magnitude as u32
    }
}

/// `2^exp` for a normal result.
const fn pow2(exp: i32) -> f64 {
    f64::from_bits(((exp + 1023) as u64) << 52)
}

/// Modifiers of a floating-point instruction that change its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mods {
    /// Rounding mode.
    pub round: Round,
    /// `.ftz`: subnormal inputs and results become zero of the same sign.
    pub ftz: bool,
    /// `.sat`: clamp to `[0, 1]`, NaN to `+0`.
    pub sat: bool,
    /// `.relu`: negative results become 0, NaN results canonical.
    pub relu: bool,
}

/// `.rn` and nothing else.
pub const RN: Mods = Mods { round: Round::Nearest, ftz: false, sat: false, relu: false };

#[inline]
fn input(format: Format, bits: u32, mods: Mods) -> f64 {
    format.decode(if mods.ftz { format.flush(bits) } else { bits })
}

#[inline]
fn finish(format: Format, value: f64, mods: Mods) -> u32 {
    let bits = format.encode(value, mods.round, false);
    let bits = if mods.ftz { format.flush(bits) } else { bits };
    clamp(format, bits, mods.sat, mods.relu)
}

/// The clamps that come after rounding: `.sat` (NaN to `+0`) and `.relu` (NaN stays NaN). `-0` becomes `+0` in both.
#[inline]
pub fn clamp(format: Format, bits: u32, sat: bool, relu: bool) -> u32 {
    if !(sat || relu) {
        return bits;
    }
    if format.is_nan(bits) {
        return if sat { 0 } else { format.nan() };
    }
    if bits & format.sign_bit() != 0 {
        return 0;
    }
    let one = (format.bias() as u32) << (format.frac_bits + format.pad_bits);
    if sat && bits > one { one } else { bits }
}

/// Moves an inexact nearest result to the neighbour with an odd last bit, on the side that `error` points to.
#[inline]
fn to_odd(nearest: f64, error: f64) -> f64 {
    if error == 0.0 || !nearest.is_finite() || !error.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    let away = (error > 0.0) == (nearest > 0.0);
    f64::from_bits(if away { nearest.to_bits() + 1 } else { nearest.to_bits() - 1 })
}

/// `a + b` rounded to odd, with the sign of an exact zero that `round` asks for (IEEE 754: `-0` only towards negative infinity).
#[inline]
fn sum_odd(a: f64, b: f64, round: Round) -> f64 {
    let sum = a + b;
    let b_part = sum - a;
    let error = (a - (sum - b_part)) + (b - b_part);
    if sum == 0.0 {
        let opposite = a.is_sign_negative() != b.is_sign_negative();
        return if opposite && round == Round::Down { -0.0 } else { sum };
    }
    to_odd(sum, error)
}

/// `add` in any format (PTX ISA 9.7.3.3, 9.7.4.1).
#[inline]
pub fn add(format: Format, a: u32, b: u32, mods: Mods) -> u32 {
    finish(format, sum_odd(input(format, a, mods), input(format, b, mods), mods.round), mods)
}

/// `sub` in any format.
#[inline]
pub fn sub(format: Format, a: u32, b: u32, mods: Mods) -> u32 {
    finish(format, sum_odd(input(format, a, mods), -input(format, b, mods), mods.round), mods)
}

/// `mul` in any format; the product of two 24-bit significands is exact in an `f64`.
#[inline]
pub fn mul(format: Format, a: u32, b: u32, mods: Mods) -> u32 {
    finish(format, input(format, a, mods) * input(format, b, mods), mods)
}

/// `fma` in any format: one rounding.
#[inline]
pub fn fma(format: Format, a: u32, b: u32, c: u32, mods: Mods) -> u32 {
    let product = input(format, a, mods) * input(format, b, mods);
    finish(format, sum_odd(product, input(format, c, mods), mods.round), mods)
}

/// `div.rn`, `.rz`, `.rm`, `.rp` of f32.
pub fn div(a: u32, b: u32, mods: Mods) -> u32 {
    let (a, b) = (input(F32, a, mods), input(F32, b, mods));
    let quotient = a / b;
    let rest = (-quotient).mul_add(b, a);
    finish(F32, to_odd(quotient, rest * b.signum()), mods)
}

/// `sqrt.rn`, `.rz`, `.rm`, `.rp` of f32.
pub fn sqrt(a: u32, mods: Mods) -> u32 {
    let a = input(F32, a, mods);
    let root = a.sqrt();
    finish(F32, to_odd(root, (-root).mul_add(root, a)), mods)
}

/// `rcp.rn`, `.rz`, `.rm`, `.rp` of f32.
pub fn rcp(a: u32, mods: Mods) -> u32 {
    div(1.0f32.to_bits(), a, mods)
}

/// `add.rn.f32` without modifiers, the common case: one native addition.
#[inline]
pub fn add_f32_rn(a: u32, b: u32) -> u32 {
    canonical_f32(f32::from_bits(a) + f32::from_bits(b))
}

/// `mul.rn.f32` without modifiers.
#[inline]
pub fn mul_f32_rn(a: u32, b: u32) -> u32 {
    canonical_f32(f32::from_bits(a) * f32::from_bits(b))
}

/// `fma.rn.f32` without modifiers.
#[inline]
pub fn fma_f32_rn(a: u32, b: u32, c: u32) -> u32 {
    canonical_f32(f32::from_bits(a).mul_add(f32::from_bits(b), f32::from_bits(c)))
}

/// The bits of an f32 result, a NaN in its canonical form.
///
/// A test of the bits, not `is_nan`: an optimised build was seen to let the NaN of a negative number's root pass that.
#[inline]
pub fn canonical_f32(value: f32) -> u32 {
    let bits = value.to_bits();
    if F32.is_nan(bits) { F32.nan() } else { bits }
}

/// `min` (`max` with `want_max`) of f32, f16, bf16 (PTX ISA 9.7.3.11, 9.7.4.7): one NaN operand is ignored, unless `nan` (`.NaN`) asks to
/// return the canonical NaN; two NaNs give the canonical NaN; `+0 > -0`.
pub fn min_max(format: Format, a: u32, b: u32, want_max: bool, nan: bool, ftz: bool) -> u32 {
    let (a, b) = if ftz { (format.flush(a), format.flush(b)) } else { (a, b) };
    match (format.is_nan(a), format.is_nan(b)) {
        (true, true) => format.nan(),
        (true, false) => {
            if nan {
                format.nan()
            } else {
                b
            }
        }
        (false, true) => {
            if nan {
                format.nan()
            } else {
                a
            }
        }
        (false, false) => {
            let a_is_less = order_key(format, a) < order_key(format, b);
            if a_is_less != want_max { a } else { b }
        }
    }
}

/// A signed key that orders the numbers of a format, `-0` just below `+0`.
fn order_key(format: Format, bits: u32) -> i64 {
    let magnitude = i64::from(bits & (format.sign_bit() - 1));
    if bits & format.sign_bit() != 0 { -magnitude - 1 } else { magnitude }
}

/// `cvt` between floating-point formats, with every modifier (PTX ISA 9.7.9.21). `.ftz` concerns an f32 on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cvt {
    /// Rounding mode; ignored where the destination holds every value of the source.
    pub round: Round,
    /// `.ftz`.
    pub ftz: bool,
    /// `.sat`.
    pub sat: bool,
    /// `.satfinite`.
    pub satfinite: bool,
    /// `.relu`.
    pub relu: bool,
}

impl Cvt {
    /// Only a rounding mode.
    pub const fn new(round: Round) -> Self {
        Cvt { round, ftz: false, sat: false, satfinite: false, relu: false }
    }
}

/// Converts one value from `from` to `to`.
#[inline]
pub fn cvt(from: Format, to: Format, bits: u32, how: Cvt) -> u32 {
    let bits = if how.ftz && from == F32 { from.flush(bits) } else { bits };
    let out = to.encode(from.decode(bits), how.round, how.satfinite);
    let out = if how.ftz && to == F32 { to.flush(out) } else { out };
    clamp(to, out, how.sat, how.relu)
}

/// `cvt.rn.bf16.f32`, the common case.
#[inline]
pub fn bf16_from_f32_rn(bits: u32) -> u32 {
    if bits & 0x7fff_ffff > 0x7f80_0000 { BF16.nan() } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 }
}

/// Two f32 into a packed pair of 16-bit or 8-bit values: `cvt....x2.f32 d, a, b`, where `a` goes to the upper half.
#[inline]
pub fn cvt_pair_from_f32(to: Format, a: u32, b: u32, how: Cvt) -> u32 {
    cvt(F32, to, a, how) << to.width() | cvt(F32, to, b, how)
}

/// `cvt` between packed pairs of formats (f16x2 to e4m3x2 and back); the order of the halves stays.
#[inline]
pub fn cvt_pair(from: Format, to: Format, pair: u32, how: Cvt) -> u32 {
    let mask = ((1u64 << from.width()) - 1) as u32;
    cvt(from, to, pair >> from.width() & mask, how) << to.width() | cvt(from, to, pair & mask, how)
}

/// A floating-point value rounded to an integral value (`cvt.rni.f32.f32` and its kin), sign of zero kept.
pub fn round_to_integral(value: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => value.round_ties_even(),
        Round::Zero => value.trunc(),
        Round::Down => value.floor(),
        Round::Up => value.ceil(),
        Round::Away => value.round(),
    }
}

/// `cvt` from a floating-point format to itself with integer rounding.
pub fn cvt_integral(format: Format, bits: u32, how: Cvt) -> u32 {
    let bits = if how.ftz { format.flush(bits) } else { bits };
    let out = format.encode(round_to_integral(format.decode(bits), how.round), Round::Zero, false);
    clamp(format, out, how.sat, how.relu)
}

/// `cvt.r*i` from a floating-point value to an integer of `bits` bits, as the low bits of a `u64`. Out of range clamps (`.sat` is redundant);
/// a NaN gives 0, and `1 << 63` for 64-bit destinations (PTX ISA 9.7.9.21).
pub fn cvt_to_int(value: f64, round: Round, bits: u32, signed: bool) -> u64 {
    if value.is_nan() {
        return if bits == 64 { 1 << 63 } else { 0 };
    }
    let integral = round_to_integral(value, round);
    let (min, max) = int_range(bits, signed);
    let clamped = (integral as i128).clamp(min, max);
    clamped as u64 & mask(bits)
}

/// `cvt` from an integer to a floating-point format.
pub fn cvt_from_int(value: i128, to: Format, how: Cvt) -> u32 {
    let magnitude = value.unsigned_abs() as u64;
    let extra = 11u32.saturating_sub(magnitude.leading_zeros());
    let sticky = u64::from(magnitude & ((1 << extra) - 1) != 0);
    // at most 53 bits, the last of them sticky: exact in an f64
    let odd = ((magnitude >> extra | sticky) as f64) * pow2(extra as i32);
    clamp(to, to.encode(if value < 0 { -odd } else { odd }, how.round, how.satfinite), how.sat, how.relu)
}

/// `cvt` between integers: `value` (sign- or zero-extended by the source type) into `bits` bits, wrapped or, with `sat`, clamped.
pub fn cvt_int(value: i128, bits: u32, signed: bool, sat: bool) -> u64 {
    let (min, max) = int_range(bits, signed);
    let value = if sat { value.clamp(min, max) } else { value };
    value as u64 & mask(bits)
}

fn int_range(bits: u32, signed: bool) -> (i128, i128) {
    if signed { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) }
}

fn mask(bits: u32) -> u64 {
    if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
}

#[cfg(test)]
#[path = "float_tests.rs"]
mod tests;
