//! f64 arithmetic, comparison and conversion over the 32 lanes of a warp: the CPU's own, which is IEEE 754 as PTX asks.

use crate::alu_int::{f1, f2, f3};
use crate::model::float;
use crate::op::{Compare, F1, F2, F3, Lanes};
use crate::ptx::types::Ty;

/// The bits of a result. The payload of a NaN is not specified (PTX ISA 9.7.3); here it is canonical.
#[inline(always)]
fn bits(value: f64) -> u64 {
    let bits = value.to_bits();
    if bits & (u64::MAX >> 1) > f64::INFINITY.to_bits() { u64::MAX >> 1 } else { bits }
}

/// `add`, `sub`, `mul`, `div.rn`, `min`, `max`.
pub(crate) fn binary(opcode: &str) -> F2 {
    macro_rules! arm {
        (|$a:ident, $b:ident| $e:expr) => {
            f2!(|x, y: u64| {
                let ($a, $b) = (f64::from_bits(x), f64::from_bits(y));
                bits($e)
            })
        };
    }
    match opcode {
        "add" => arm!(|a, b| a + b),
        "sub" => arm!(|a, b| a - b),
        "mul" => arm!(|a, b| a * b),
        "div" => arm!(|a, b| a / b),
        // 9.7.3.11: a NaN is ignored; +0 > -0
        "min" => arm!(|a, b| if a == b && a.is_sign_negative() { a } else { a.min(b) }),
        "max" => arm!(|a, b| if a == b && a.is_sign_positive() { a } else { a.max(b) }),
        other => unreachable!("{other}"),
    }
}

/// `fma.rn`.
pub(crate) fn fma() -> F3 {
    f3!(|a, b, c: u64| bits(f64::from_bits(a).mul_add(f64::from_bits(b), f64::from_bits(c))))
}

/// `sqrt.rn`, `rcp.rn`, and the sign bit alone: `abs`, `neg`.
pub(crate) fn unary(opcode: &str) -> F1 {
    match opcode {
        "sqrt" => f1!(|a: u64| bits(f64::from_bits(a).sqrt())),
        "rcp" => f1!(|a: u64| bits(1.0 / f64::from_bits(a))),
        "abs" => f1!(|a: u64| a & u64::MAX >> 1),
        "neg" => f1!(|a: u64| a ^ 1 << 63),
        other => unreachable!("{other}"),
    }
}

/// Comparisons, ordered and unordered (9.7.6.2).
#[allow(clippy::neg_cmp_op_on_partial_ord, clippy::nonminimal_bool, clippy::double_comparisons)]
pub(crate) fn compare(op: &str) -> Compare {
    macro_rules! arm {
        (|$a:ident, $b:ident| $e:expr) => {{
            fn over_lanes(x: &Lanes, y: &Lanes) -> u32 {
                let mut out = 0;
                for i in 0..32 {
                    let ($a, $b) = (f64::from_bits(x[i]), f64::from_bits(y[i]));
                    out |= u32::from($e) << i;
                }
                out
            }
            over_lanes as Compare
        }};
    }
    match op {
        "eq" => arm!(|a, b| a == b),
        "ne" => arm!(|a, b| a < b || a > b),
        "lt" => arm!(|a, b| a < b),
        "le" => arm!(|a, b| a <= b),
        "gt" => arm!(|a, b| a > b),
        "ge" => arm!(|a, b| a >= b),
        "equ" => arm!(|a, b| !(a < b || a > b)),
        "neu" => arm!(|a, b| a != b),
        "ltu" => arm!(|a, b| !(a >= b)),
        "leu" => arm!(|a, b| !(a > b)),
        "gtu" => arm!(|a, b| !(a <= b)),
        "geu" => arm!(|a, b| !(a < b)),
        "num" => arm!(|a, b| !a.is_nan() && !b.is_nan()),
        _ => arm!(|a, b| a.is_nan() || b.is_nan()),
    }
}

/// `cvt` between f64 and f32, and from an integer to f64, to nearest.
pub(crate) fn convert(to: Ty, from: Ty) -> F1 {
    match (to, from) {
        (Ty::F32, _) => f1!(|a: u64| float::canonical_f32(f64::from_bits(a) as f32)),
        (_, Ty::F32) => f1!(|a: u32| bits(f64::from(f32::from_bits(a)))),
        (_, Ty::U32) => f1!(|a: u32| f64::from(a).to_bits()),
        (_, Ty::S32) => f1!(|a: i32| f64::from(a).to_bits()),
        (_, Ty::S64) => f1!(|a: i64| (a as f64).to_bits()),
        _ => f1!(|a: u64| (a as f64).to_bits()),
    }
}
