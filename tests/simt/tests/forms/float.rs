//! Floating-point arithmetic (PTX ISA 9.7.3 for f32, 9.7.4 for half precision) and comparison (9.7.6.2).
//!
//! f32 with `.rn` is checked against the CPU's own IEEE arithmetic; half precision against exact products and sums in `f64` rounded once.

use simt::model::approx::Bound;
use simt::model::float::{BF16, F16, F32, Format, Round};

use super::{Domain, Expect, Form, ident, lane};

pub fn add(all: &mut Vec<Form>) {
    single(all);
    half(all);
    min_max(all);
    compare(all);
    double(all);
}

/// f64 against the CPU's own arithmetic. The payload of a NaN result is not specified, so no form has one.
fn double(all: &mut Vec<Form>) {
    let finite = (64, Domain::F64 { finite: true });
    let any = (64, Domain::F64 { finite: false });
    let mut push = |m: String, inputs: &[super::Input], body: String, op: fn(f64, f64, f64) -> f64| {
        let get = |a: &[u64], i: usize| f64::from_bits(a.get(i).copied().unwrap_or(0));
        let expect = move |a: &[u64]| vec![op(get(a, 0), get(a, 1), get(a, 2)).to_bits()];
        all.push(lane(ident(&m), "sm_80", inputs, &[64], body.replace("$", &m), expect));
    };
    for rn in ["", ".rn"] {
        push(format!("add{rn}.f64"), &[finite; 2], "$ d0, a0, a1;".into(), |a, b, _| a + b);
        push(format!("sub{rn}.f64"), &[finite; 2], "$ d0, a0, a1;".into(), |a, b, _| a - b);
        push(format!("mul{rn}.f64"), &[finite; 2], "$ d0, a0, a1;".into(), |a, b, _| a * b);
    }
    // an overflowing product minus infinity would be NaN: there is none
    push("fma.rn.f64".into(), &[finite; 3], "$ d0, a0, a1, a2;".into(), f64::mul_add);
    // no division of 0 by 0
    let nonzero = "or.b64 a1, a1, 1;\n$ d0, a0, a1;";
    push("div.rn.f64".into(), &[finite; 2], nonzero.into(), |a, b, _| a / f64::from_bits(b.to_bits() | 1));
    push("rcp.rn.f64".into(), &[finite], "$ d0, a0;".into(), |a, _, _| 1.0 / a);
    push("sqrt.rn.f64".into(), &[finite], "abs.f64 a0, a0;\n$ d0, a0;".into(), |a, _, _| a.abs().sqrt());
    push("abs.f64".into(), &[finite], "$ d0, a0;".into(), |a, _, _| a.abs());
    push("neg.f64".into(), &[finite], "$ d0, a0;".into(), |a, _, _| -a);
    // 9.7.3.11: +0.0 > -0.0
    push("min.f64".into(), &[finite; 2], "$ d0, a0, a1;".into(), |a, b, _| {
        if a < b || (a == b && a.is_sign_negative()) { a } else { b }
    });
    push("max.f64".into(), &[finite; 2], "$ d0, a0, a1;".into(), |a, b, _| {
        if a < b || (a == b && a.is_sign_negative()) { b } else { a }
    });
    for cmp in ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"] {
        let m = format!("setp.{cmp}.f64");
        let body = format!(".reg .pred p, q;\n{m} p|q, a0, a1;\nselp.u32 d0, 1, 0, p;\nselp.u32 d1, 1, 0, q;");
        all.push(lane(ident(&m), "sm_80", &[any; 2], &[32, 32], body, move |a| {
            let p = holds(cmp, f64::from_bits(a[0]), f64::from_bits(a[1]));
            vec![u64::from(p), u64::from(!p)]
        }));
    }
    for (op, func) in [("and", (|a, b| a & b) as fn(bool, bool) -> bool), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)] {
        let m = format!("setp.lt.{op}.f64");
        let body = format!(".reg .pred c, p;\nsetp.eq.u32 c, a2, 1;\n{m} p, a0, a1, c;\nselp.u32 d0, 1, 0, p;");
        all.push(lane(ident(&m), "sm_80", &[any, any, (32, Domain::Below(2))], &[32], body, move |a| {
            vec![u64::from(func(f64::from_bits(a[0]) < f64::from_bits(a[1]), a[2] == 1))]
        }));
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn saturate(x: f32) -> f32 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

fn bits(x: f32) -> u64 {
    if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) }
}

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

/// Inputs flushed with `.ftz`, the result flushed and clamped.
fn with(ftz: bool, sat: bool, a: &[u64], op: impl Fn(f32, f32, f32) -> f32) -> u64 {
    let get = |i: usize| a.get(i).map_or(0.0, |&x| if ftz { flush(f(x)) } else { f(x) });
    let d = op(get(0), get(1), get(2));
    let d = if ftz { flush(d) } else { d };
    bits(if sat { saturate(d) } else { d })
}

fn single(all: &mut Vec<Form>) {
    let ab = [(32, Domain::F32), (32, Domain::F32)];
    let abc = [ab[0], ab[1], (32, Domain::F32)];
    for (ftz, sat) in [(false, false), (true, false), (false, true), (true, true)] {
        let suffix = format!("{}{}.f32", if ftz { ".ftz" } else { "" }, if sat { ".sat" } else { "" });
        for (op, func) in
            [("add", (|a, b, _| a + b) as fn(f32, f32, f32) -> f32), ("sub", |a, b, _| a - b), ("mul", |a, b, _| a * b)]
        {
            for rn in ["", ".rn"] {
                let m = format!("{op}{rn}{suffix}");
                all.push(lane(ident(&m), "sm_80", &ab, &[32], format!("{m} d0, a0, a1;"), move |a| {
                    vec![with(ftz, sat, a, func)]
                }));
            }
        }
        let m = format!("fma.rn{suffix}");
        all.push(lane(ident(&m), "sm_80", &abc, &[32], format!("{m} d0, a0, a1, a2;"), move |a| {
            vec![with(ftz, sat, a, |a, b, c| a.mul_add(b, c))]
        }));
    }
    for ftz in [false, true] {
        let z = if ftz { ".ftz" } else { "" };
        for (op, func) in [("sqrt.rn", (|a, _, _| a.sqrt()) as fn(f32, f32, f32) -> f32), ("rcp.rn", |a, _, _| 1.0 / a)]
        {
            let m = format!("{op}{z}.f32");
            all.push(lane(ident(&m), "sm_80", &ab[..1], &[32], format!("{m} d0, a0;"), move |a| {
                vec![with(ftz, false, a, func)]
            }));
        }
        let m = format!("div.rn{z}.f32");
        all.push(lane(ident(&m), "sm_80", &ab, &[32], format!("{m} d0, a0, a1;"), move |a| {
            vec![with(ftz, false, a, |a, b, _| a / b)]
        }));
        for full in [false, true] {
            let m = format!("div.{}{z}.f32", if full { "full" } else { "approx" });
            let mut form = lane(ident(&m), "sm_80", &ab, &[32], format!("{m} d0, a0, a1;"), |_| vec![]);
            form.expect = Expect::Division { ftz, full };
            all.push(form);
        }
        // 9.7.3.9, 9.7.3.10: NaN inputs give an unspecified NaN, so none is given
        for (op, func) in [("abs", f32::abs as fn(f32) -> f32), ("neg", |x: f32| -x)] {
            let m = format!("{op}{z}.f32");
            all.push(lane(
                ident(&m),
                "sm_80",
                &[(32, Domain::Moderate(140))],
                &[32],
                format!("{m} d0, a0;"),
                move |a| vec![with(ftz, false, a, |a, _, _| func(a))],
            ));
        }
    }
}

/// 9.7.3.8: within 2 ulp; `div.approx` is 0 (NaN for an infinite dividend) for divisors beyond 2^126.
pub fn division_allows(a: u32, b: u32, ftz: bool, full: bool, got: u32) -> Result<(), String> {
    let (x, y) = (f(u64::from(a)), f(u64::from(b)));
    let (x, y) = if ftz { (flush(x), flush(y)) } else { (x, y) };
    let want = if !full && y.abs() > 2f32.powi(126) && y.is_finite() {
        if x.is_finite() { 0f32.copysign(x) * y.signum() } else { f32::NAN }
    } else {
        x / y
    };
    let want = if ftz { flush(want) } else { want };
    if want.is_nan() {
        return if got == 0x7fff_ffff { Ok(()) } else { Err("NaN".into()) };
    }
    let exact = x == 0.0 || y == 0.0 || !x.is_finite() || !y.is_finite();
    let quotient = f64::from(x) / f64::from(y);
    let close = Bound::Ulp(2.0).allows(F32, quotient, f64::from(f(u64::from(got))));
    // the smallest normal number and zero are neighbours with .ftz
    let near_flush =
        ftz && quotient.abs() < 2f64.powi(-125) && (got & 0x7fff_ffff == 0 || got & 0x7fff_ffff <= 0x0080_0002);
    let same_sign = got >> 31 == want.to_bits() >> 31;
    if got == want.to_bits() || same_sign && (!exact && close || near_flush) {
        Ok(())
    } else {
        Err(format!("about {want:e} ({:#x})", want.to_bits()))
    }
}

/// `f(a, b, c)` on each 16-bit part, in exact `f64` arithmetic where the operation is exact there, rounded once.
fn parts(format: Format, pair: bool, a: &[u64], op: impl Fn(&[u32]) -> u32) -> u64 {
    let part = |h: u32| {
        let args: Vec<u32> = a.iter().map(|x| (x >> (16 * h)) as u32 & 0xffff).collect();
        u64::from(op(&args))
    };
    let _ = format;
    if pair { part(0) | part(1) << 16 } else { part(0) }
}

/// One rounding of the exact value of `a * b + c`, worked out in integers: f16 and bf16 values are multiples of a power of two.
fn exact_fma(format: Format, a: u32, b: u32, c: u32) -> u32 {
    let (x, y, z) = (format.decode(a), format.decode(b), format.decode(c));
    let product = x * y; // exact: two significands of at most 11 bits
    if !product.is_finite() || !z.is_finite() || product == 0.0 || z == 0.0 {
        return format.encode(product + z, Round::Nearest, false);
    }
    let sum = product + z;
    // the error of the f64 sum; it only matters to break ties, so half a unit of the last f64 bit stands for it
    let back = sum - product;
    let error = (product - (sum - back)) + (z - back);
    if error == 0.0 || sum == 0.0 {
        return format.encode(sum, Round::Nearest, false);
    }
    // sum is far more precise than the format: a tie of the format plus the sign of the error decides
    let (low, high) = if error > 0.0 { (sum, sum.next_up()) } else { (sum.next_down(), sum) };
    let (l, h) = (format.encode(low, Round::Nearest, false), format.encode(high, Round::Nearest, false));
    if error > 0.0 {
        if l == h { l } else { format.encode(high, Round::Nearest, false) }
    } else if l == h {
        l
    } else {
        format.encode(low, Round::Nearest, false)
    }
}

fn clamp(format: Format, x: u32, sat: bool, relu: bool) -> u32 {
    let one = format.encode(1.0, Round::Nearest, false);
    let negative = x >> 15 == 1;
    match () {
        () if format.is_nan(x) => {
            if sat {
                0
            } else {
                format.nan()
            }
        }
        () if (sat || relu) && negative => 0,
        () if sat && x > one => one,
        () => x,
    }
}

fn half(all: &mut Vec<Form>) {
    for (name, format, pair) in
        [("f16", F16, false), ("f16x2", F16, true), ("bf16", BF16, false), ("bf16x2", BF16, true)]
    {
        let is_f16 = format == F16;
        let width = if pair { 32 } else { 16 };
        let domain = match (is_f16, pair) {
            (true, false) => Domain::F16,
            (true, true) => Domain::F16x2,
            (false, false) => Domain::Bf16,
            (false, true) => Domain::Bf16x2,
        };
        let one = format.encode(1.0, Round::Nearest, false);
        let variants: &[(bool, bool)] =
            if is_f16 { &[(false, false), (true, false), (false, true), (true, true)] } else { &[(false, false)] };
        // add, sub, mul of bf16 need sm_90
        let target = if is_f16 { "sm_80" } else { "sm_90" };
        for &(ftz, sat) in variants {
            let flush = move |x: u32| if ftz { format.flush(x) } else { x };
            for op in ["add", "sub", "mul"] {
                for rn in ["", ".rn"] {
                    let m =
                        format!("{op}{rn}{}{}.{name}", if ftz { ".ftz" } else { "" }, if sat { ".sat" } else { "" });
                    all.push(lane(
                        ident(&m),
                        target,
                        &[(width, domain); 2],
                        &[width],
                        format!("{m} d0, a0, a1;"),
                        move |a| {
                            vec![parts(format, pair, a, |p| {
                                let (x, y) = (flush(p[0]), flush(p[1]));
                                let d = match op {
                                    "add" => exact_fma(format, x, one, y),
                                    "sub" if format.is_nan(y) => format.nan(),
                                    "sub" => exact_fma(format, x, one, y ^ 0x8000),
                                    _ => format.encode(format.decode(x) * format.decode(y), Round::Nearest, false),
                                };
                                clamp(format, flush(d), sat, false)
                            })]
                        },
                    ));
                }
            }
        }
        for ftz in [false, true] {
            if ftz && !is_f16 {
                continue;
            }
            for (sat, relu) in [(false, false), (true, false), (false, true)] {
                if sat && !is_f16 {
                    continue;
                }
                let flush = move |x: u32| if ftz { format.flush(x) } else { x };
                let m = format!(
                    "fma.rn{}{}{}.{name}",
                    if ftz { ".ftz" } else { "" },
                    if sat { ".sat" } else { "" },
                    if relu { ".relu" } else { "" }
                );
                all.push(lane(
                    ident(&m),
                    "sm_80",
                    &[(width, domain); 3],
                    &[width],
                    format!("{m} d0, a0, a1, a2;"),
                    move |a| {
                        vec![parts(format, pair, a, |p| {
                            clamp(format, flush(exact_fma(format, flush(p[0]), flush(p[1]), flush(p[2]))), sat, relu)
                        })]
                    },
                ));
            }
        }
        // 9.7.4.6 to 9.7.4.8: the NaN of neg and abs is unspecified; bytes of finite numbers only
        let finite = if is_f16 { Domain::Below(0x7c00) } else { Domain::Below(0x7f80) };
        let inputs = if pair { vec![(16, finite), (16, finite)] } else { vec![(16, finite)] };
        for (op, flip) in [("neg", 0x8000u64), ("abs", 0)] {
            for ftz in ["", ".ftz"] {
                if !ftz.is_empty() && !is_f16 {
                    continue;
                }
                let m = format!("{op}{ftz}.{name}");
                let body = if pair {
                    format!(".reg .b32 x;\nmov.b32 x, {{a0, a1}};\nxor.b32 x, x, 0x8000;\n{m} d0, x;")
                } else {
                    format!("{m} d0, a0;")
                };
                let ftz = !ftz.is_empty();
                all.push(lane(ident(&m), "sm_80", &inputs, &[width], body, move |a| {
                    let z = |x: u64| u64::from(if ftz { format.flush(x as u32) } else { x as u32 });
                    vec![if pair {
                        // the lower half enters negative
                        z(a[0]) | (z(a[1]) | flip) << 16
                    } else {
                        z(a[0]) | flip
                    }]
                }));
            }
        }
    }
}

fn min_max(all: &mut Vec<Form>) {
    for (name, format, pair, width) in [
        ("f32", F32, false, 32),
        ("f16", F16, false, 16),
        ("f16x2", F16, true, 32),
        ("bf16", BF16, false, 16),
        ("bf16x2", BF16, true, 32),
    ] {
        let domain = match name {
            "f32" => Domain::F32,
            "f16" => Domain::F16,
            "f16x2" => Domain::F16x2,
            "bf16" => Domain::Bf16,
            _ => Domain::Bf16x2,
        };
        for op in ["min", "max"] {
            for ftz in [false, true] {
                if ftz && format == BF16 {
                    continue;
                }
                for nan in [false, true] {
                    let m = format!("{op}{}{}.{name}", if ftz { ".ftz" } else { "" }, if nan { ".NaN" } else { "" });
                    all.push(lane(
                        ident(&m),
                        "sm_80",
                        &[(width, domain); 2],
                        &[width],
                        format!("{m} d0, a0, a1;"),
                        move |a| {
                            let pick = |x: u32, y: u32| -> u32 {
                                let (x, y) = if ftz { (format.flush(x), format.flush(y)) } else { (x, y) };
                                match (format.is_nan(x), format.is_nan(y)) {
                                    (true, true) => format.nan(),
                                    (true, false) | (false, true) if nan => format.nan(),
                                    (true, false) => y,
                                    (false, true) => x,
                                    _ => {
                                        let (u, v) = (format.decode(x), format.decode(y));
                                        // 9.7.3.11: +0.0 > -0.0
                                        let x_less = u < v || (u == v && u.is_sign_negative() && !v.is_sign_negative());
                                        if x_less == (op == "min") { x } else { y }
                                    }
                                }
                            };
                            vec![match width {
                                32 if !pair => u64::from(pick(a[0] as u32, a[1] as u32)),
                                _ => parts(format, pair, a, |p| pick(p[0], p[1])),
                            }]
                        },
                    ));
                }
            }
        }
    }
}

/// 9.7.6.2: ordered comparisons are false with a NaN, the `u` forms true; `num` is true without a NaN, `nan` with one.
fn holds(cmp: &str, a: f64, b: f64) -> bool {
    let nan = a.is_nan() || b.is_nan();
    match cmp {
        "eq" => a == b,
        "ne" => !nan && a != b,
        "lt" => a < b,
        "le" => a <= b,
        "gt" => a > b,
        "ge" => a >= b,
        "equ" => nan || a == b,
        "neu" => nan || a != b,
        "ltu" => nan || a < b,
        "leu" => nan || a <= b,
        "gtu" => nan || a > b,
        "geu" => nan || a >= b,
        "num" => !nan,
        _ => nan,
    }
}

fn compare(all: &mut Vec<Form>) {
    let cmps = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];
    for (name, format, width, domain, target) in [
        ("f32", F32, 32, Domain::F32, "sm_80"),
        ("f16", F16, 16, Domain::F16, "sm_80"),
        ("bf16", BF16, 16, Domain::Bf16, "sm_90"),
    ] {
        for ftz in ["", ".ftz"] {
            if !ftz.is_empty() && name == "bf16" {
                continue;
            }
            let flush = !ftz.is_empty();
            let read = move |x: u64| format.decode(if flush { format.flush(x as u32) } else { x as u32 });
            for cmp in cmps {
                // half precision has one predicate result only
                let second = if name == "f32" { "|q" } else { "" };
                let other = if name == "f32" { "" } else { "not.pred q, p;\n" };
                let body = format!(
                    ".reg .pred p, q;\nsetp.{cmp}{ftz}.{name} p{second}, a0, a1;\n{other}selp.u32 d0, 1, 0, p;\nselp.u32 d1, 1, 0, q;"
                );
                let m = format!("setp.{cmp}{ftz}.{name}");
                all.push(lane(ident(&m), target, &[(width, domain); 2], &[32, 32], body, move |a| {
                    let p = holds(cmp, read(a[0]), read(a[1]));
                    vec![u64::from(p), u64::from(!p)]
                }));
                if name == "f32" {
                    for dtype in ["u32", "s32", "f32"] {
                        let m = format!("set.{cmp}{ftz}.{dtype}.f32");
                        all.push(lane(
                            ident(&m),
                            target,
                            &[(width, domain); 2],
                            &[32],
                            format!("{m} d0, a0, a1;"),
                            move |a| {
                                vec![match (holds(cmp, read(a[0]), read(a[1])), dtype) {
                                    (false, _) => 0,
                                    (true, "f32") => 0x3f80_0000,
                                    _ => 0xffff_ffff,
                                }]
                            },
                        ));
                    }
                }
            }
            for (op, func) in
                [("and", (|a, b| a & b) as fn(bool, bool) -> bool), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)]
            {
                let set = if name == "f32" {
                    format!("set.ltu.{op}{ftz}.u32.f32 d2, a0, a1, c;")
                } else {
                    "mov.u32 d2, 0;".into()
                };
                let combined = if name == "f32" {
                    format!("setp.lt.{op}{ftz}.f32 p|q, a0, a1, c;")
                } else {
                    format!("setp.lt.{op}{ftz}.{name} p, a0, a1, c;\nsetp.geu.{op}{ftz}.{name} q, a0, a1, c;")
                };
                let body = format!(
                    ".reg .pred c, p, q;\nsetp.eq.u32 c, a2, 1;\n{combined}\nselp.u32 d0, 1, 0, p;\nselp.u32 d1, 1, 0, q;\n{set}"
                );
                let inputs = [(width, domain), (width, domain), (32, Domain::Below(2))];
                all.push(lane(
                    ident(&format!("setp.lt.{op}{ftz}.{name}")),
                    target,
                    &inputs,
                    &[32, 32, 32],
                    body,
                    move |a| {
                        let (x, y, c) = (read(a[0]), read(a[1]), a[2] == 1);
                        let p = holds("lt", x, y);
                        let s = if name == "f32" && func(holds("ltu", x, y), c) { 0xffff_ffff } else { 0 };
                        vec![u64::from(func(p, c)), u64::from(func(!p, c)), s]
                    },
                ));
            }
        }
    }
}
