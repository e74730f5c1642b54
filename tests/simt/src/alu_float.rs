//! Floating-point arithmetic, comparison and conversion over the 32 lanes of a warp; the arithmetic itself is `model::float`.

use crate::alu_int::{f1, f2, f3};
use crate::model::float::{self, BF16, Cvt, E4M3, E5M2, F16, F32, Format, Mods, Round, TF32};
use crate::op::{Compare, F1, F2, F3, Lanes};
use crate::ptx::types::Ty;

/// Evaluates `$e` with a constant `Mods` called `$m` for each combination of `.ftz` with one more flag.
macro_rules! by_mods {
    ($ftz:expr, $sat:expr, $relu:expr, $m:ident => $e:expr) => {
        match ($ftz, $sat, $relu) {
            (false, false, false) => {
                const $m: Mods = Mods { round: Round::Nearest, ftz: false, sat: false, relu: false };
                $e
            }
            (true, false, false) => {
                const $m: Mods = Mods { round: Round::Nearest, ftz: true, sat: false, relu: false };
                $e
            }
            (false, true, _) => {
                const $m: Mods = Mods { round: Round::Nearest, ftz: false, sat: true, relu: false };
                $e
            }
            (true, true, _) => {
                const $m: Mods = Mods { round: Round::Nearest, ftz: true, sat: true, relu: false };
                $e
            }
            (false, false, true) => {
                const $m: Mods = Mods { round: Round::Nearest, ftz: false, sat: false, relu: true };
                $e
            }
            (true, false, true) => {
                const $m: Mods = Mods { round: Round::Nearest, ftz: true, sat: false, relu: true };
                $e
            }
        }
    };
}

/// Evaluates `$e` with a constant format and whether the register holds a pair of it.
macro_rules! by_format {
    ($ty:expr, $f:ident, $pair:ident => $e:expr) => {
        match $ty {
            Ty::F16 => {
                const $f: Format = F16;
                const $pair: bool = false;
                $e
            }
            Ty::F16x2 => {
                const $f: Format = F16;
                const $pair: bool = true;
                $e
            }
            Ty::Bf16 => {
                const $f: Format = BF16;
                const $pair: bool = false;
                $e
            }
            Ty::Bf16x2 => {
                const $f: Format = BF16;
                const $pair: bool = true;
                $e
            }
            _ => {
                const $f: Format = F32;
                const $pair: bool = false;
                $e
            }
        }
    };
}

/// Applies `f` to the value, or to both 16-bit halves.
#[inline(always)]
fn halves1(pair: bool, a: u32, f: impl Fn(u32) -> u32) -> u32 {
    if pair { f(a & 0xffff) | f(a >> 16) << 16 } else { f(a) }
}

#[inline(always)]
fn halves2(pair: bool, a: u32, b: u32, f: impl Fn(u32, u32) -> u32) -> u32 {
    if pair { f(a & 0xffff, b & 0xffff) | f(a >> 16, b >> 16) << 16 } else { f(a, b) }
}

#[inline(always)]
fn halves3(pair: bool, a: u32, b: u32, c: u32, f: impl Fn(u32, u32, u32) -> u32) -> u32 {
    if pair { f(a & 0xffff, b & 0xffff, c & 0xffff) | f(a >> 16, b >> 16, c >> 16) << 16 } else { f(a, b, c) }
}

/// Modifiers that change the result of an arithmetic instruction.
#[derive(Clone, Copy, Default)]
pub(crate) struct Flags {
    pub ftz: bool,
    pub sat: bool,
    pub relu: bool,
    /// `.NaN` of min and max.
    pub nan: bool,
}

/// `add`, `sub`, `mul`, `min`, `max` in f32, f16, bf16 and pairs.
#[rustfmt::skip]
pub(crate) fn binary(opcode: &str, ty: Ty, flags: Flags) -> F2 {
    let plain = ty == Ty::F32 && !flags.ftz && !flags.sat;
    match opcode {
        "add" if plain => f2!(|a, b: u32| float::add_f32_rn(a, b)),
        "sub" if plain => f2!(|a, b: u32| float::canonical_f32(f32::from_bits(a) - f32::from_bits(b))),
        "mul" if plain => f2!(|a, b: u32| float::mul_f32_rn(a, b)),
        "add" => by_format!(ty, F, PAIR => by_mods!(flags.ftz, flags.sat, flags.relu, M => f2!(|a, b: u32| halves2(PAIR, a, b, |a, b| float::add(F, a, b, M))))),
        "sub" => by_format!(ty, F, PAIR => by_mods!(flags.ftz, flags.sat, flags.relu, M => f2!(|a, b: u32| halves2(PAIR, a, b, |a, b| float::sub(F, a, b, M))))),
        "mul" => by_format!(ty, F, PAIR => by_mods!(flags.ftz, flags.sat, flags.relu, M => f2!(|a, b: u32| halves2(PAIR, a, b, |a, b| float::mul(F, a, b, M))))),
        "min" | "max" => min_max(opcode == "max", ty, flags),
        other => unreachable!("{other}"),
    }
}

#[rustfmt::skip]
fn min_max(want_max: bool, ty: Ty, flags: Flags) -> F2 {
    macro_rules! arm {
        ($max:literal, $nan:literal, $ftz:literal) => {
            by_format!(ty, F, PAIR => f2!(|a, b: u32| halves2(PAIR, a, b, |a, b| float::min_max(F, a, b, $max, $nan, $ftz))))
        };
    }
    match (want_max, flags.nan, flags.ftz) {
        (false, false, false) => arm!(false, false, false),
        (false, false, true) => arm!(false, false, true),
        (false, true, false) => arm!(false, true, false),
        (false, true, true) => arm!(false, true, true),
        (true, false, false) => arm!(true, false, false),
        (true, false, true) => arm!(true, false, true),
        (true, true, false) => arm!(true, true, false),
        (true, true, true) => arm!(true, true, true),
    }
}

/// `fma.rn`.
#[rustfmt::skip]
pub(crate) fn fma(ty: Ty, flags: Flags) -> F3 {
    if ty == Ty::F32 && !flags.ftz && !flags.sat {
        return f3!(|a, b, c: u32| float::fma_f32_rn(a, b, c));
    }
    by_format!(ty, F, PAIR => by_mods!(flags.ftz, flags.sat, flags.relu, M => f3!(|a, b, c: u32| halves3(PAIR, a, b, c, |a, b, c| float::fma(F, a, b, c, M)))))
}

/// `abs` and `neg`: the sign bit alone, after a flush with `.ftz`. A NaN stays a NaN.
#[rustfmt::skip]
pub(crate) fn sign(opcode: &str, ty: Ty, ftz: bool) -> F1 {
    match (opcode, ftz) {
        ("abs", false) => by_format!(ty, F, PAIR => f1!(|a: u32| halves1(PAIR, a, |a| a & !F.sign_bit()))),
        ("abs", true) => by_format!(ty, F, PAIR => f1!(|a: u32| halves1(PAIR, a, |a| F.flush(a) & !F.sign_bit()))),
        (_, false) => by_format!(ty, F, PAIR => f1!(|a: u32| halves1(PAIR, a, |a| a ^ F.sign_bit()))),
        (_, true) => by_format!(ty, F, PAIR => f1!(|a: u32| halves1(PAIR, a, |a| F.flush(a) ^ F.sign_bit()))),
    }
}

/// `sqrt.rn`, `rcp.rn`.
pub(crate) fn exact_unary(opcode: &str, ftz: bool) -> F1 {
    match (opcode, ftz) {
        ("sqrt", ftz) => by_mods!(ftz, false, false, M => f1!(|a: u32| float::sqrt(a, M))),
        (_, ftz) => by_mods!(ftz, false, false, M => f1!(|a: u32| float::rcp(a, M))),
    }
}

/// `div.rn.f32`.
pub(crate) fn div_rn(ftz: bool) -> F2 {
    by_mods!(ftz, false, false, M => f2!(|a, b: u32| float::div(a, b, M)))
}

macro_rules! compare {
    ($f:ident, $ftz:ident, |$a:ident, $b:ident| $e:expr) => {{
        fn over_lanes(x: &Lanes, y: &Lanes) -> u32 {
            let mut out = 0;
            for i in 0..32 {
                let (x, y) = (x[i] as u32, y[i] as u32);
                let ($a, $b) =
                    if $ftz { ($f.decode($f.flush(x)), $f.decode($f.flush(y))) } else { ($f.decode(x), $f.decode(y)) };
                out |= u32::from($e) << i;
            }
            out
        }
        over_lanes as Compare
    }};
}

/// Floating-point comparisons, ordered and unordered (9.7.6.2).
#[allow(clippy::neg_cmp_op_on_partial_ord, clippy::nonminimal_bool, clippy::double_comparisons)]
pub(crate) fn compare_float(op: &str, ty: Ty, ftz: bool) -> Compare {
    macro_rules! arms {
        ($ftz:ident) => {
            by_format!(ty, F, _PAIR => match op {
                "eq" => compare!(F, $ftz, |a, b| a == b),
                "ne" => compare!(F, $ftz, |a, b| a < b || a > b),
                "lt" => compare!(F, $ftz, |a, b| a < b),
                "le" => compare!(F, $ftz, |a, b| a <= b),
                "gt" => compare!(F, $ftz, |a, b| a > b),
                "ge" => compare!(F, $ftz, |a, b| a >= b),
                "equ" => compare!(F, $ftz, |a, b| !(a < b || a > b)),
                "neu" => compare!(F, $ftz, |a, b| a != b),
                "ltu" => compare!(F, $ftz, |a, b| !(a >= b)),
                "leu" => compare!(F, $ftz, |a, b| !(a > b)),
                "gtu" => compare!(F, $ftz, |a, b| !(a <= b)),
                "geu" => compare!(F, $ftz, |a, b| !(a < b)),
                "num" => compare!(F, $ftz, |a, b| !a.is_nan() && !b.is_nan()),
                _ => compare!(F, $ftz, |a, b| a.is_nan() || b.is_nan()),
            })
        };
    }
    if ftz {
        const FTZ: bool = true;
        arms!(FTZ)
    } else {
        const FTZ: bool = false;
        arms!(FTZ)
    }
}

/// The storage format of a scalar or packed type.
pub(crate) fn format(ty: Ty) -> Format {
    match ty {
        Ty::F16 | Ty::F16x2 => F16,
        Ty::Bf16 | Ty::Bf16x2 => BF16,
        Ty::Tf32 => TF32,
        Ty::E4m3 | Ty::E4m3x2 => E4M3,
        Ty::E5m2 | Ty::E5m2x2 => E5M2,
        _ => F32,
    }
}

/// A conversion that is not one of the fast ones.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Conversion {
    IntInt {
        from: Ty,
        to: Ty,
        sat: bool,
    },
    ToInt {
        from: Ty,
        to: Ty,
        round: Round,
        ftz: bool,
    },
    FromInt {
        from: Ty,
        to: Ty,
        how: Cvt,
    },
    Float {
        from: Format,
        to: Format,
        how: Cvt,
    },
    Integral {
        how: Cvt,
    },
    /// One packed pair to another.
    Pair {
        from: Format,
        to: Format,
        how: Cvt,
    },
}

impl Conversion {
    /// Converts one value.
    pub(crate) fn apply(self, bits: u64) -> u64 {
        match self {
            Conversion::IntInt { from, to, sat } => float::cvt_int(extend(bits, from), to.bits(), to.signed(), sat),
            Conversion::ToInt { from, to, round, ftz } => {
                let f = format(from);
                let bits = if ftz && from == Ty::F32 { f.flush(bits as u32) } else { bits as u32 };
                float::cvt_to_int(f.decode(bits), round, to.bits(), to.signed())
            }
            Conversion::FromInt { from, to, how } => {
                u64::from(float::cvt_from_int(extend(bits, from), format(to), how))
            }
            Conversion::Float { from, to, how } => u64::from(float::cvt(from, to, bits as u32, how)),
            Conversion::Integral { how } => u64::from(float::cvt_integral(F32, bits as u32, how)),
            Conversion::Pair { from, to, how } => u64::from(float::cvt_pair(from, to, bits as u32, how)),
        }
    }
}

/// The integer value of a lane of type `ty`.
pub(crate) fn extend(bits: u64, ty: Ty) -> i128 {
    match ty {
        Ty::S8 => i128::from(bits as i8),
        Ty::S16 => i128::from(bits as i16),
        Ty::S32 => i128::from(bits as i32),
        Ty::S64 => i128::from(bits as i64),
        Ty::U8 | Ty::B8 => i128::from(bits as u8),
        Ty::U16 | Ty::B16 => i128::from(bits as u16),
        Ty::U32 | Ty::B32 => i128::from(bits as u32),
        _ => i128::from(bits),
    }
}

/// `cvt.f32.bf16`, `cvt.f32.f16` without modifiers. The first is a shift (ptxas 13.0 emits `SHF.L`), so a NaN keeps its bits; the second is a
/// floating-point instruction (`HADD2.F32`), so a NaN becomes canonical.
pub(crate) fn widen(from: Ty) -> F1 {
    if from == Ty::Bf16 {
        f1!(|a: u32| a << 16)
    } else {
        f1!(|a: u32| float::canonical_f32(F16.decode(a & 0xffff) as f32))
    }
}

/// `cvt.rn.bf16x2.f32`, `cvt.rn.f16x2.f32`: the first source goes to the upper half.
pub(crate) fn pack_rn(to: Ty) -> F2 {
    const HOW: Cvt = Cvt::new(Round::Nearest);
    if to == Ty::Bf16x2 {
        f2!(|a, b: u32| float::bf16_from_f32_rn(a) << 16 | float::bf16_from_f32_rn(b))
    } else {
        f2!(|a, b: u32| float::cvt(F32, F16, a, HOW) << 16 | float::cvt(F32, F16, b, HOW))
    }
}

/// `cvt.rn.bf16.f32`, `cvt.rn.f16.f32`.
pub(crate) fn narrow_rn(to: Ty) -> F1 {
    const HOW: Cvt = Cvt::new(Round::Nearest);
    if to == Ty::Bf16 { f1!(|a: u32| float::bf16_from_f32_rn(a)) } else { f1!(|a: u32| float::cvt(F32, F16, a, HOW)) }
}
