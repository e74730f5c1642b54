//! Integer arithmetic (PTX ISA 9.7.1), comparison and selection (9.7.6, 9.7.7), logic and shifts (9.7.8), moves (9.7.9.3).

use super::{Domain, Form, ident, lane};

/// The integer types: name, width, signedness.
pub const TYPES: [(&str, u32, bool); 6] = [
    ("u16", 16, false),
    ("u32", 32, false),
    ("u64", 64, false),
    ("s16", 16, true),
    ("s32", 32, true),
    ("s64", 64, true),
];

pub fn mask(bits: u32) -> u64 {
    if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// The value of a register read as a type.
pub fn value(x: u64, bits: u32, signed: bool) -> i128 {
    let x = x & mask(bits);
    if signed && x >> (bits - 1) == 1 { i128::from(x) - (1i128 << bits) } else { i128::from(x) }
}

pub fn add(all: &mut Vec<Form>) {
    arithmetic(all);
    bits(all);
    compare(all);
    moves(all);
}

/// An operation of two operands of one type, described in unbounded integers; the result is taken modulo 2^bits.
fn two(all: &mut Vec<Form>, op: &str, ty: (&str, u32, bool), f: fn(i128, i128) -> i128) {
    let (name, bits, signed) = ty;
    let mnemonic = format!("{op}.{name}");
    all.push(lane(
        ident(&mnemonic),
        "sm_80",
        &[(bits, Domain::Int(bits)), (bits, Domain::Int(bits))],
        &[bits],
        format!("{mnemonic} d0, a0, a1;"),
        move |a| vec![f(value(a[0], bits, signed), value(a[1], bits, signed)) as u64 & mask(bits)],
    ));
}

fn one(all: &mut Vec<Form>, op: &str, name: &str, bits: u32, out: u32, f: impl Fn(u64) -> u64 + 'static) {
    let mnemonic = format!("{op}.{name}");
    all.push(lane(
        ident(&mnemonic),
        "sm_80",
        &[(bits, Domain::Int(bits))],
        &[out],
        format!("{mnemonic} d0, a0;"),
        move |a| vec![f(a[0]) & mask(out)],
    ));
}

fn arithmetic(all: &mut Vec<Form>) {
    for ty in TYPES {
        two(all, "add", ty, |a, b| a + b);
        two(all, "sub", ty, |a, b| a - b);
        two(all, "mul.lo", ty, |a, b| a.wrapping_mul(b));
        two(all, "min", ty, |a, b| a.min(b));
        two(all, "max", ty, |a, b| a.max(b));
        let (name, bits, signed) = ty;
        // 9.7.1.3: .hi is the upper half of the full product, .wide the whole of it
        let high = move |a: u64, b: u64| {
            let product = if signed {
                value(a, bits, true).wrapping_mul(value(b, bits, true)) as u128
            } else {
                u128::from(a) * u128::from(b)
            };
            (product >> bits) as u64 & mask(bits)
        };
        let ab = [(bits, Domain::Int(bits)), (bits, Domain::Int(bits))];
        all.push(lane(
            format!("mul_hi_{name}"),
            "sm_80",
            &ab,
            &[bits],
            format!("mul.hi.{name} d0, a0, a1;"),
            move |a| vec![high(a[0], a[1])],
        ));
        let abc = [ab[0], ab[1], ab[0]];
        all.push(lane(
            format!("mad_lo_{name}"),
            "sm_80",
            &abc,
            &[bits],
            format!("mad.lo.{name} d0, a0, a1, a2;"),
            move |a| vec![a[0].wrapping_mul(a[1]).wrapping_add(a[2]) & mask(bits)],
        ));
        all.push(lane(
            format!("mad_hi_{name}"),
            "sm_80",
            &abc,
            &[bits],
            format!("mad.hi.{name} d0, a0, a1, a2;"),
            move |a| vec![high(a[0], a[1]).wrapping_add(a[2]) & mask(bits)],
        ));
        if bits < 64 {
            let wide = move |a: u64, b: u64| (value(a, bits, signed) * value(b, bits, signed)) as u64 & mask(2 * bits);
            all.push(lane(
                format!("mul_wide_{name}"),
                "sm_80",
                &ab,
                &[2 * bits],
                format!("mul.wide.{name} d0, a0, a1;"),
                move |a| vec![wide(a[0], a[1])],
            ));
            let abc = [ab[0], ab[1], (2 * bits, Domain::Int(2 * bits))];
            all.push(lane(
                format!("mad_wide_{name}"),
                "sm_80",
                &abc,
                &[2 * bits],
                format!("mad.wide.{name} d0, a0, a1, a2;"),
                move |a| vec![wide(a[0], a[1]).wrapping_add(a[2]) & mask(2 * bits)],
            ));
        }
        // division by zero is reported, so the divisor is made nonzero (setting its lowest bit)
        let or = if bits == 16 {
            "b16"
        } else if bits == 32 {
            "b32"
        } else {
            "b64"
        };
        for (op, f) in [("div", (|a, b| a / b) as fn(i128, i128) -> i128), ("rem", |a, b| a % b)] {
            all.push(lane(
                format!("{op}_{name}"),
                "sm_80",
                &ab,
                &[bits],
                format!("or.{or} a1, a1, 1;\n{op}.{name} d0, a0, a1;"),
                move |a| vec![f(value(a[0], bits, signed), value(a[1] | 1, bits, signed)) as u64 & mask(bits)],
            ));
        }
        if signed {
            one(all, "abs", name, bits, bits, move |a| value(a, bits, true).unsigned_abs() as u64);
            one(all, "neg", name, bits, bits, move |a| (a as i64).wrapping_neg() as u64);
        }
    }
    // 9.7.1.1, 9.7.1.2: .sat clamps to MININT..MAXINT, .s32 only
    for (op, f) in [("add.sat", (|a, b| a + b) as fn(i128, i128) -> i128), ("sub.sat", |a, b| a - b)] {
        let ab = [(32, Domain::Int(32)), (32, Domain::Int(32))];
        all.push(lane(ident(&format!("{op}.s32")), "sm_80", &ab, &[32], format!("{op}.s32 d0, a0, a1;"), move |a| {
            vec![
                f(value(a[0], 32, true), value(a[1], 32, true)).clamp(i32::MIN.into(), i32::MAX.into()) as u64
                    & mask(32),
            ]
        }));
    }
}

fn bits(all: &mut Vec<Form>) {
    for bits in [32, 64] {
        let name = format!("b{bits}");
        one(all, "popc", &name, bits, 32, |a| u64::from(a.count_ones()));
        one(all, "clz", &name, bits, 32, move |a| u64::from(a.leading_zeros()) - (64 - u64::from(bits)));
        one(all, "brev", &name, bits, bits, move |a| a.reverse_bits() >> (64 - bits));
        // 9.7.1.19: len and pos are 8-bit; beyond the msb a signed field repeats the sign bit
        for signed in [false, true] {
            let ty = format!("{}{bits}", if signed { "s" } else { "u" });
            let abc = [(bits, Domain::Int(bits)), (32, Domain::Below(80)), (32, Domain::Below(80))];
            all.push(lane(
                format!("bfe_{ty}"),
                "sm_80",
                &abc,
                &[bits],
                format!("bfe.{ty} d0, a0, a1, a2;"),
                move |a| {
                    let (x, pos, len) = (a[0], a[1] & 0xff, a[2] & 0xff);
                    let msb = u64::from(bits) - 1;
                    let bit = |i: u64| x >> i & 1;
                    let sign = if !signed || len == 0 { 0 } else { bit((pos + len - 1).min(msb)) };
                    vec![
                        (0..=msb)
                            .fold(0, |d, i| d | (if i < len && pos + i <= msb { bit(pos + i) } else { sign }) << i),
                    ]
                },
            ));
        }
        let abcd =
            [(bits, Domain::Int(bits)), (bits, Domain::Int(bits)), (32, Domain::Below(80)), (32, Domain::Below(80))];
        all.push(lane(
            format!("bfi_{name}"),
            "sm_80",
            &abcd,
            &[bits],
            format!("bfi.{name} d0, a0, a1, a2, a3;"),
            move |a| {
                let (from, into, pos, len) = (a[0], a[1], a[2] & 0xff, a[3] & 0xff);
                let mut d = into;
                for i in 0..len {
                    if pos + i < u64::from(bits) && i < u64::from(bits) {
                        d = d & !(1 << (pos + i)) | (from >> i & 1) << (pos + i);
                    }
                }
                vec![d]
            },
        ));
    }
    for bits in [16, 32, 64] {
        let ty = format!("b{bits}");
        for (op, f) in [("and", (|a, b| a & b) as fn(u64, u64) -> u64), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)] {
            let ab = [(bits, Domain::Int(bits)), (bits, Domain::Int(bits))];
            all.push(lane(format!("{op}_{ty}"), "sm_80", &ab, &[bits], format!("{op}.{ty} d0, a0, a1;"), move |a| {
                vec![f(a[0], a[1])]
            }));
        }
        one(all, "not", &ty, bits, bits, |a| !a);
        // 9.7.8.7, 9.7.8.8: shift amounts above the width are clamped to it (kept below the width here: larger ones are reported)
        let shift = [(bits, Domain::Int(bits)), (32, Domain::Below(u64::from(bits)))];
        all.push(lane(format!("shl_{ty}"), "sm_80", &shift, &[bits], format!("shl.{ty} d0, a0, a1;"), move |a| {
            vec![a[0] << a[1] & mask(bits)]
        }));
        for kind in ["b", "u", "s"] {
            all.push(lane(
                format!("shr_{kind}{bits}"),
                "sm_80",
                &shift,
                &[bits],
                format!("shr.{kind}{bits} d0, a0, a1;"),
                move |a| vec![(value(a[0], bits, kind == "s") >> a[1]) as u64 & mask(bits)],
            ));
        }
    }
    // 9.7.8.6: funnel shift of b:a; .wrap takes c modulo 32, .clamp limits it to 32
    for mode in ["wrap", "clamp"] {
        let abc = [(32, Domain::Int(32)), (32, Domain::Int(32)), (32, Domain::Below(40))];
        for dir in ["l", "r"] {
            all.push(lane(
                format!("shf_{dir}_{mode}_b32"),
                "sm_80",
                &abc,
                &[32],
                format!("shf.{dir}.{mode}.b32 d0, a0, a1, a2;"),
                move |a| {
                    let n = if mode == "wrap" { a[2] & 31 } else { a[2].min(32) };
                    let both = u128::from(a[1] << 32 | a[0]);
                    vec![(if dir == "l" { both << n >> 32 } else { both >> n }) as u64 & mask(32)]
                },
            ));
        }
    }
    // 9.7.8.5: immLut is the function applied to 0xF0, 0xCC, 0xAA
    for (table, f) in [
        (0x96, (|a, b, c| a ^ b ^ c) as fn(u64, u64, u64) -> u64),
        (0xe8, |a, b, c| a & b | a & c | b & c),
        (0xca, |a, b, c| a & b | !a & c),
        (0x01, |a, b, c| !(a | b | c)),
        (0xfe, |a, b, c| a | b | c),
    ] {
        let abc = [(32, Domain::Int(32)); 3];
        all.push(lane(
            format!("lop3_b32_{table:02x}"),
            "sm_80",
            &abc,
            &[32],
            format!("lop3.b32 d0, a0, a1, a2, {table};"),
            move |a| vec![f(a[0], a[1], a[2]) & mask(32)],
        ));
    }
    // 9.7.9.7: byte i of d is byte (selector nibble i) of b:a, or its sign replicated if the nibble's top bit is set
    let abc = [(32, Domain::Int(32)), (32, Domain::Int(32)), (32, Domain::Below(1 << 16))];
    all.push(lane("prmt_b32", "sm_80", &abc, &[32], "prmt.b32 d0, a0, a1, a2;", |a| {
        let both = a[1] << 32 | a[0];
        vec![(0..4).fold(0, |d, i| {
            let nibble = a[2] >> (4 * i) & 15;
            let byte = both >> (8 * (nibble & 7)) & 0xff;
            d | (if nibble & 8 == 0 { byte } else { 0xff * (byte >> 7) }) << (8 * i)
        })]
    }));
    // predicates
    for (op, f) in [("and", (|a, b| a & b) as fn(bool, bool) -> bool), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)] {
        let body = format!(
            ".reg .pred p, q, r;\nsetp.ne.u32 p, a0, 0;\nsetp.ne.u32 q, a1, 0;\n{op}.pred r, p, q;\nselp.u32 d0, 1, 0, r;"
        );
        all.push(lane(format!("{op}_pred"), "sm_80", &[(32, Domain::Below(2)); 2], &[32], body, move |a| {
            vec![u64::from(f(a[0] != 0, a[1] != 0))]
        }));
    }
    let body = ".reg .pred p, q, r;\nsetp.ne.u32 p, a0, 0;\nnot.pred q, p;\nmov.pred r, q;\nselp.u32 d0, 1, 0, r;";
    all.push(lane("not_pred", "sm_80", &[(32, Domain::Below(2))], &[32], body, |a| vec![1 - a[0]]));
}

fn order(cmp: &str, ordering: std::cmp::Ordering) -> bool {
    match cmp {
        "eq" => ordering.is_eq(),
        "ne" => ordering.is_ne(),
        "lt" | "lo" => ordering.is_lt(),
        "le" | "ls" => ordering.is_le(),
        "gt" | "hi" => ordering.is_gt(),
        _ => ordering.is_ge(),
    }
}

fn compare(all: &mut Vec<Form>) {
    // 9.7.6.2: lo ls hi hs are unsigned, bit types take only eq and ne
    for (ty, bits, signed) in TYPES.into_iter().chain([("b16", 16, false), ("b32", 32, false), ("b64", 64, false)]) {
        let all_cmps: &[&str] = match (ty.as_bytes()[0], signed) {
            (b'b', _) => &["eq", "ne"],
            (_, true) => &["eq", "ne", "lt", "le", "gt", "ge"],
            _ => &["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"],
        };
        // few distinct values, so that equality happens
        let (a, b) = ((bits, Domain::Int(bits)), (32, Domain::Below(4)));
        let near = if bits == 64 { "cvt.u64.u32" } else { "mov.b32" };
        let make_b = match bits {
            16 => ".reg .b16 near;\ncvt.u16.u32 near, a1;\nadd.u16 near, a0, near;\nsub.u16 near, near, 1;".to_string(),
            _ => format!(
                ".reg .b{bits} near;\n{near} near, a1;\nadd.u{bits} near, a0, near;\nsub.u{bits} near, near, 1;"
            ),
        };
        for &cmp in all_cmps {
            let body = format!(
                "{make_b}\n.reg .pred p, q;\nsetp.{cmp}.{ty} p|q, a0, near;\nselp.u32 d0, 1, 0, p;\nselp.u32 d1, 1, 0, q;"
            );
            all.push(lane(format!("setp_{cmp}_{ty}"), "sm_80", &[a, b], &[32, 32], body, move |a| {
                let near = a[0].wrapping_add(a[1]).wrapping_sub(1);
                let p = order(cmp, value(a[0], bits, signed).cmp(&value(near, bits, signed)));
                vec![u64::from(p), u64::from(!p)]
            }));
            for dtype in ["u32", "s32", "f32"] {
                let body = format!("{make_b}\nset.{cmp}.{dtype}.{ty} d0, a0, near;");
                all.push(lane(format!("set_{cmp}_{dtype}_{ty}"), "sm_80", &[a, b], &[32], body, move |a| {
                    let near = a[0].wrapping_add(a[1]).wrapping_sub(1);
                    let p = order(cmp, value(a[0], bits, signed).cmp(&value(near, bits, signed)));
                    // 9.7.6.1: true is 0xffffffff for integer destinations, 1.0 for .f32
                    vec![match (p, dtype) {
                        (false, _) => 0,
                        (true, "f32") => 0x3f80_0000,
                        _ => 0xffff_ffff,
                    }]
                }));
            }
        }
        // the combined forms: p = (a lt b) op c, q = (a ge b) op c
        for (op, f) in [("and", (|a, b| a & b) as fn(bool, bool) -> bool), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)]
        {
            let cmp = if ty.starts_with('b') { "ne" } else { "lt" };
            let abc = [a, b, (32, Domain::Below(2))];
            let body = format!(
                "{make_b}\n.reg .pred c, p, q;\nsetp.eq.u32 c, a2, 1;\nsetp.{cmp}.{op}.{ty} p|q, a0, near, c;\n\
                 selp.u32 d0, 1, 0, p;\nselp.u32 d1, 1, 0, q;\nset.{cmp}.{op}.u32.{ty} d2, a0, near, !c;"
            );
            all.push(lane(format!("setp_{cmp}_{op}_{ty}"), "sm_80", &abc, &[32, 32, 32], body, move |a| {
                let near = a[0].wrapping_add(a[1]).wrapping_sub(1);
                let c = a[2] == 1;
                let t = order(cmp, value(a[0], bits, signed).cmp(&value(near, bits, signed)));
                vec![u64::from(f(t, c)), u64::from(f(!t, c)), if f(t, !c) { 0xffff_ffff } else { 0 }]
            }));
        }
    }
    for ty in ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"] {
        let bits: u32 = ty[1..].parse().unwrap();
        let abc = [(bits, Domain::Int(bits)), (bits, Domain::Int(bits)), (32, Domain::Below(2))];
        let body = format!(".reg .pred p;\nsetp.eq.u32 p, a2, 1;\nselp.{ty} d0, a0, a1, p;");
        all.push(lane(format!("selp_{ty}"), "sm_80", &abc, &[bits], body, |a| vec![a[1 - a[2] as usize]]));
        if ty != "f64" {
            // 9.7.6.4: slct takes a where c >= 0
            let abc = [abc[0], abc[1], (32, Domain::Int(32))];
            all.push(lane(
                format!("slct_{ty}_s32"),
                "sm_80",
                &abc,
                &[bits],
                format!("slct.{ty}.s32 d0, a0, a1, a2;"),
                |a| vec![if (a[2] as i32) >= 0 { a[0] } else { a[1] }],
            ));
            let abc = [abc[0], abc[1], (32, Domain::F32)];
            for ftz in ["", ".ftz"] {
                all.push(lane(
                    ident(&format!("slct{ftz}.{ty}.f32")),
                    "sm_80",
                    &abc,
                    &[bits],
                    format!("slct{ftz}.{ty}.f32 d0, a0, a1, a2;"),
                    move |a| {
                        let c = f32::from_bits(a[2] as u32);
                        // -0 and, with .ftz, subnormals count as zero; NaN takes b
                        let flushed = !ftz.is_empty() && c.is_subnormal();
                        vec![if c >= 0.0 || flushed { a[0] } else { a[1] }]
                    },
                ));
            }
        }
    }
}

fn moves(all: &mut Vec<Form>) {
    for ty in ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"] {
        let bits: u32 = ty[1..].parse().unwrap();
        one(all, "mov", ty, bits, bits, |a| a);
    }
    // 9.7.9.4: packing and unpacking, lowest element first
    let four = [(16, Domain::Int(16)); 4];
    all.push(lane("mov_pack_b64_v4", "sm_80", &four, &[64], "mov.b64 d0, {a0, a1, a2, a3};", |a| {
        vec![a[0] | a[1] << 16 | a[2] << 32 | a[3] << 48]
    }));
    all.push(lane("mov_pack_b64_v2", "sm_80", &[(32, Domain::Int(32)); 2], &[64], "mov.b64 d0, {a0, a1};", |a| {
        vec![a[0] | a[1] << 32]
    }));
    all.push(lane("mov_pack_b32_v2", "sm_80", &four[..2], &[32], "mov.b32 d0, {a0, a1};", |a| vec![a[0] | a[1] << 16]));
    all.push(lane(
        "mov_unpack_b64_v4",
        "sm_80",
        &[(64, Domain::Int(64))],
        &[16; 4],
        "mov.b64 {d0, d1, d2, d3}, a0;",
        |a| (0..4).map(|i| a[0] >> (16 * i) & 0xffff).collect(),
    ));
    all.push(lane("mov_unpack_b64_v2", "sm_80", &[(64, Domain::Int(64))], &[32, 32], "mov.b64 {d0, d1}, a0;", |a| {
        vec![a[0] & mask(32), a[0] >> 32]
    }));
    all.push(lane("mov_unpack_b32_v2", "sm_80", &[(32, Domain::Int(32))], &[16], "mov.b32 {_, d0}, a0;", |a| {
        vec![a[0] >> 16]
    }));
    // special registers of a block of 32 threads, in a grid of 8
    let body = "mov.u32 d0, %tid.x;\nmov.u32 d1, %laneid;\nmov.u32 d2, %ntid.x;\nmov.u32 d3, %lanemask_lt;\nmov.u32 d4, %lanemask_ge;\n\
                mov.u32 d5, %lanemask_eq;\nmov.u32 d6, %lanemask_le;\nmov.u32 d7, %lanemask_gt;\nmov.u32 d8, %nctaid.x;\nadd.u32 d8, d8, a0;";
    all.push(super::block("mov_special", "sm_80", &[(32, Domain::Below(1))], &[32; 9], body, |_| {
        let per = |f: fn(u32) -> u32| (0..32).map(|t| u64::from(f(t))).collect();
        vec![
            per(|t| t),
            per(|t| t),
            per(|_| 32),
            per(|t| (1 << t) - 1),
            per(|t| !((1u32 << t) - 1)),
            per(|t| 1 << t),
            per(|t| ((2u64 << t) - 1) as u32),
            per(|t| !(((2u64 << t) - 1) as u32)),
            per(|_| 8),
        ]
    }));
}
