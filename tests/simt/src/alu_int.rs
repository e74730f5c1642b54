//! Integer, logic, shift and comparison instructions as functions over the 32 lanes of a warp.
//!
//! Each is one loop over all lanes, inactive ones too (their results are dropped), so that it compiles to vector code.

use crate::op::{Compare, F1, F2, F3, Lanes};
use crate::ptx::types::Ty;

/// A machine word as a lane value.
pub(crate) trait Word: Copy {
    fn get(bits: u64) -> Self;
    fn put(self) -> u64;
}

macro_rules! words {
    ($($t:ty: $u:ty),*) => {$(
        impl Word for $t {
            #[inline(always)]
            fn get(bits: u64) -> Self { bits as $t }
            #[inline(always)]
            fn put(self) -> u64 { u64::from(self as $u) }
        }
    )*};
}
words!(u8: u8, u16: u16, u32: u32, u64: u64, i8: u8, i16: u16, i32: u32, i64: u64);

impl Word for bool {
    #[inline(always)]
    fn get(bits: u64) -> Self {
        bits & 1 != 0
    }
    #[inline(always)]
    fn put(self) -> u64 {
        u64::from(self)
    }
}

/// `f1!(|a: u32| expression)`: a function over lanes; the result is any word.
macro_rules! f1 {
    (|$a:ident: $t:ty| $e:expr) => {{
        fn over_lanes(o: &mut crate::op::Lanes, x: &crate::op::Lanes) {
            for i in 0..32 {
                let $a = <$t as crate::alu_int::Word>::get(x[i]);
                o[i] = crate::alu_int::Word::put($e);
            }
        }
        over_lanes as crate::op::F1
    }};
}

macro_rules! f2 {
    (|$a:ident: $t:ty, $b:ident: $u:ty| $e:expr) => {{
        fn over_lanes(o: &mut crate::op::Lanes, x: &crate::op::Lanes, y: &crate::op::Lanes) {
            for i in 0..32 {
                let $a = <$t as crate::alu_int::Word>::get(x[i]);
                let $b = <$u as crate::alu_int::Word>::get(y[i]);
                o[i] = crate::alu_int::Word::put($e);
            }
        }
        over_lanes as crate::op::F2
    }};
    (|$a:ident, $b:ident: $t:ty| $e:expr) => {
        f2!(|$a: $t, $b: $t| $e)
    };
}

macro_rules! f3 {
    (|$a:ident: $t:ty, $b:ident: $u:ty, $c:ident: $v:ty| $e:expr) => {{
        fn over_lanes(o: &mut crate::op::Lanes, x: &crate::op::Lanes, y: &crate::op::Lanes, z: &crate::op::Lanes) {
            for i in 0..32 {
                let $a = <$t as crate::alu_int::Word>::get(x[i]);
                let $b = <$u as crate::alu_int::Word>::get(y[i]);
                let $c = <$v as crate::alu_int::Word>::get(z[i]);
                o[i] = crate::alu_int::Word::put($e);
            }
        }
        over_lanes as crate::op::F3
    }};
    (|$a:ident, $b:ident, $c:ident: $t:ty| $e:expr) => {
        f3!(|$a: $t, $b: $t, $c: $t| $e)
    };
}
pub(crate) use {f1, f2, f3};

/// Evaluates an expression with `$t` standing for the Rust type of a PTX integer type.
macro_rules! by_type {
    ($ty:expr, $t:ident => $e:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => {
                type $t = u16;
                $e
            }
            Ty::U32 | Ty::B32 => {
                type $t = u32;
                $e
            }
            Ty::U64 | Ty::B64 => {
                type $t = u64;
                $e
            }
            Ty::S16 => {
                type $t = i16;
                $e
            }
            Ty::S32 => {
                type $t = i32;
                $e
            }
            Ty::S64 => {
                type $t = i64;
                $e
            }
            other => unreachable!("{other:?} is not an integer type"),
        }
    };
}

/// `wide` and `hi` need the type of twice the width.
macro_rules! by_type_wide {
    ($ty:expr, $t:ident, $w:ident => $e:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => {
                type $t = u16;
                type $w = u32;
                $e
            }
            Ty::U32 | Ty::B32 => {
                type $t = u32;
                type $w = u64;
                $e
            }
            Ty::U64 | Ty::B64 => {
                type $t = u64;
                type $w = u128;
                $e
            }
            Ty::S16 => {
                type $t = i16;
                type $w = i32;
                $e
            }
            Ty::S32 => {
                type $t = i32;
                type $w = i64;
                $e
            }
            Ty::S64 => {
                type $t = i64;
                type $w = i128;
                $e
            }
            other => unreachable!("{other:?} is not an integer type"),
        }
    };
}

/// Instructions with one integer source.
pub(crate) fn unary(opcode: &str, ty: Ty) -> F1 {
    match opcode {
        // abs of the most negative value is itself (9.7.1.12)
        "abs" => by_type!(ty, T => f1!(|a: T| if (a as i64) < 0 { (0 as T).wrapping_sub(a) } else { a })),
        "neg" => by_type!(ty, T => f1!(|a: T| (0 as T).wrapping_sub(a))),
        "not" => by_type!(ty, T => f1!(|a: T| !a)),
        "popc" => by_type!(ty, T => f1!(|a: T| a.count_ones())),
        "clz" => by_type!(ty, T => f1!(|a: T| a.leading_zeros())),
        "brev" => by_type!(ty, T => f1!(|a: T| a.reverse_bits())),
        other => unreachable!("{other}"),
    }
}

/// Instructions with two integer sources of one type.
#[rustfmt::skip]
pub(crate) fn binary(opcode: &str, variant: Option<&str>, ty: Ty) -> F2 {
    match (opcode, variant) {
        ("add", Some("sat")) => f2!(|a, b: i32| a.saturating_add(b)),
        ("sub", Some("sat")) => f2!(|a, b: i32| a.saturating_sub(b)),
        ("add", _) => by_type!(ty, T => f2!(|a, b: T| a.wrapping_add(b))),
        ("sub", _) => by_type!(ty, T => f2!(|a, b: T| a.wrapping_sub(b))),
        ("mul", Some("lo")) => by_type!(ty, T => f2!(|a, b: T| a.wrapping_mul(b))),
        ("mul", Some("hi")) => by_type_wide!(ty, T, W => f2!(|a, b: T| ((W::from(a) * W::from(b)) >> T::BITS) as T)),
        ("mul", Some("wide")) => match ty {
            Ty::U16 => f2!(|a, b: u16| u32::from(a) * u32::from(b)),
            Ty::S16 => f2!(|a, b: i16| i32::from(a) * i32::from(b)),
            Ty::U32 => f2!(|a, b: u32| u64::from(a) * u64::from(b)),
            _ => f2!(|a, b: i32| i64::from(a) * i64::from(b)),
        },
        // division by zero is unspecified (9.7.1.7): all ones here; the most negative over -1 wraps
        ("div", _) => by_type!(ty, T => f2!(|a, b: T| if b == 0 { !0 } else { a.wrapping_div(b) })),
        ("rem", _) => by_type!(ty, T => f2!(|a, b: T| if b == 0 { !0 } else { a.wrapping_rem(b) })),
        ("min", _) => by_type!(ty, T => f2!(|a, b: T| a.min(b))),
        ("max", _) => by_type!(ty, T => f2!(|a, b: T| a.max(b))),
        ("and", _) => by_type!(ty, T => f2!(|a, b: T| a & b)),
        ("or", _) => by_type!(ty, T => f2!(|a, b: T| a | b)),
        ("xor", _) => by_type!(ty, T => f2!(|a, b: T| a ^ b)),
        // amounts beyond the width act as the width (9.7.8.6, 9.7.8.7)
        ("shl", _) => by_type!(ty, T => f2!(|a: T, b: u32| if b >= T::BITS { 0 } else { a << b })),
        ("shr", _) => by_type!(ty, T => f2!(|a: T, b: u32| if b >= T::BITS { if (a as i64) < 0 && T::MIN != 0 { !0 } else { 0 } } else { a >> b })),
        other => unreachable!("{other:?}"),
    }
}

/// `mad.{lo,hi,wide}`: the third source has the type of the result.
pub(crate) fn mad(variant: &str, ty: Ty) -> F3 {
    match variant {
        "lo" => by_type!(ty, T => f3!(|a, b, c: T| a.wrapping_mul(b).wrapping_add(c))),
        "hi" => {
            by_type_wide!(ty, T, W => f3!(|a, b, c: T| (((W::from(a) * W::from(b)) >> T::BITS) as T).wrapping_add(c)))
        }
        _ => match ty {
            Ty::U16 => f3!(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c)),
            Ty::S16 => f3!(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c)),
            Ty::U32 => f3!(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)),
            _ => f3!(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c)),
        },
    }
}

/// `shf.{l,r}.{wrap,clamp}.b32 d, lo, hi, amount` (9.7.8.8): the 64-bit value `{hi, lo}` shifted; upper half for l, lower for r.
pub(crate) fn shf(left: bool, wrap: bool) -> F3 {
    match (left, wrap) {
        (true, true) => f3!(|a: u32, b: u32, c: u32| (join(a, b) << (c & 31) >> 32) as u32),
        (true, false) => f3!(|a: u32, b: u32, c: u32| (join(a, b) << c.min(32) >> 32) as u32),
        (false, true) => f3!(|a: u32, b: u32, c: u32| (join(a, b) >> (c & 31)) as u32),
        (false, false) => f3!(|a: u32, b: u32, c: u32| (join(a, b) >> c.min(32)) as u32),
    }
}

#[inline(always)]
fn join(lo: u32, hi: u32) -> u64 {
    u64::from(hi) << 32 | u64::from(lo)
}

/// `bfe d, a, position, length` (9.7.1.20).
pub(crate) fn bfe(ty: Ty) -> F3 {
    match ty {
        Ty::U32 => f3!(|a: u32, b: u32, c: u32| extract(u64::from(a), b, c, 32, false) as u32),
        Ty::S32 => f3!(|a: u32, b: u32, c: u32| extract(u64::from(a), b, c, 32, true) as u32),
        Ty::U64 => f3!(|a: u64, b: u32, c: u32| extract(a, b, c, 64, false)),
        _ => f3!(|a: u64, b: u32, c: u32| extract(a, b, c, 64, true)),
    }
}

/// The ISA's loop: bits from `pos`, `len` of them; bits outside are the sign bit, which is the last bit of the field or of the word.
fn extract(a: u64, pos: u32, len: u32, width: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let sign = if signed && len > 0 { a >> (pos + len - 1).min(width - 1) & 1 } else { 0 };
    let mut out = 0;
    for i in 0..width {
        let bit = if i < len && pos + i < width { a >> (pos + i) & 1 } else { sign };
        out |= bit << i;
    }
    out
}

/// `bfi d, field, base, position, length` for one lane (9.7.1.21).
pub(crate) fn insert(a: u64, b: u64, pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let mut out = b;
    for i in 0..len {
        if pos + i >= width {
            break;
        }
        out = out & !(1 << (pos + i)) | (a >> i & 1) << (pos + i);
    }
    out
}

/// `prmt.b32 d, a, b, selector` in the default mode (9.7.9.7).
pub(crate) fn prmt() -> F3 {
    fn select(a: u32, b: u32, selector: u32) -> u32 {
        let bytes = join(a, b);
        let mut out = 0;
        for i in 0..4 {
            let s = selector >> (4 * i);
            let byte = (bytes >> (8 * (s & 7))) as u8;
            let byte = if s & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
            out |= u32::from(byte) << (8 * i);
        }
        out
    }
    f3!(|a: u32, b: u32, c: u32| select(a, b, c))
}

/// `lop3.b32` with the truth table `table` (9.7.8.2): bit `4a + 2b + c` of the table is the result.
pub(crate) fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    let mut out = 0;
    for row in 0..8u32 {
        if table >> row & 1 != 0 {
            let pick = |v: u32, bit: u32| if row >> bit & 1 != 0 { v } else { !v };
            out |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    out
}

macro_rules! compare {
    (|$a:ident, $b:ident: $t:ty| $e:expr) => {{
        fn over_lanes(x: &Lanes, y: &Lanes) -> u32 {
            let mut out = 0;
            for i in 0..32 {
                let ($a, $b) = (<$t as Word>::get(x[i]), <$t as Word>::get(y[i]));
                out |= u32::from($e) << i;
            }
            out
        }
        over_lanes as Compare
    }};
}

/// Integer comparisons; `lo`, `ls`, `hi`, `hs` are for unsigned types (9.7.6.2).
pub(crate) fn compare_int(op: &str, ty: Ty) -> Result<Compare, String> {
    let ordered = !matches!(ty, Ty::B16 | Ty::B32 | Ty::B64);
    let unsigned = matches!(ty, Ty::U16 | Ty::U32 | Ty::U64);
    Ok(match op {
        "eq" => by_type!(ty, T => compare!(|a, b: T| a == b)),
        "ne" => by_type!(ty, T => compare!(|a, b: T| a != b)),
        _ if !ordered => return Err(format!("`.{op}` needs a signed or unsigned type")),
        "lo" | "ls" | "hi" | "hs" if !unsigned => return Err(format!("`.{op}` needs an unsigned type")),
        "lt" | "lo" => by_type!(ty, T => compare!(|a, b: T| a < b)),
        "le" | "ls" => by_type!(ty, T => compare!(|a, b: T| a <= b)),
        "gt" | "hi" => by_type!(ty, T => compare!(|a, b: T| a > b)),
        _ => by_type!(ty, T => compare!(|a, b: T| a >= b)),
    })
}
