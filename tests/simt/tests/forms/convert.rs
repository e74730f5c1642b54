//! `cvt` (PTX ISA 9.7.9.21): every pair of types and every modifier of the subset.

use simt::model::float::{BF16, E4M3, E5M2, F16, F32, Format, Round, TF32};

use super::int::{mask, value};
use super::{Domain, Form, ident, lane};

const INTS: [(&str, u32, bool); 8] = [
    ("u8", 8, false),
    ("u16", 16, false),
    ("u32", 32, false),
    ("u64", 64, false),
    ("s8", 8, true),
    ("s16", 16, true),
    ("s32", 32, true),
    ("s64", 64, true),
];

/// Register width of a type: 8-bit values live in 16-bit registers.
fn reg(bits: u32) -> u32 {
    bits.max(16)
}

const ROUNDS: [(&str, Round); 4] = [("n", Round::Nearest), ("z", Round::Zero), ("m", Round::Down), ("p", Round::Up)];

fn integral(x: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => x.round_ties_even(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        _ => x.ceil(),
    }
}

/// The patterns of a narrower register are extended by the sign of the type into the register.
fn extend(x: i128, bits: u32, signed: bool) -> u64 {
    let low = x as u64 & mask(bits);
    value(low, bits, signed) as u64 & mask(reg(bits))
}

fn float_domain(format: Format) -> (u32, Domain) {
    match format {
        F32 => (32, Domain::F32),
        F16 => (16, Domain::F16),
        _ => (16, Domain::Bf16),
    }
}

pub fn add(all: &mut Vec<Form>) {
    // between integers; .sat is illegal where the destination holds every source value
    for (to, to_bits, to_signed) in INTS {
        for (from, from_bits, from_signed) in INTS {
            let holds_all = match (to_signed, from_signed) {
                (true, true) | (false, false) => to_bits >= from_bits,
                (true, false) => to_bits > from_bits,
                (false, true) => false,
            };
            for sat in [false, true] {
                if sat && holds_all {
                    continue;
                }
                let m = format!("cvt{}.{to}.{from}", if sat { ".sat" } else { "" });
                let input = [(reg(from_bits), Domain::Int(from_bits))];
                all.push(lane(ident(&m), "sm_80", &input, &[reg(to_bits)], format!("{m} d0, a0;"), move |a| {
                    let x = value(a[0], from_bits, from_signed);
                    let (low, high) = if to_signed {
                        (-(1i128 << (to_bits - 1)), (1i128 << (to_bits - 1)) - 1)
                    } else {
                        (0, (1i128 << to_bits) - 1)
                    };
                    vec![extend(if sat { x.clamp(low, high) } else { x }, to_bits, to_signed)]
                }));
            }
        }
    }
    for (name, format, target) in [("f32", F32, "sm_80"), ("f16", F16, "sm_80"), ("bf16", BF16, "sm_90")] {
        let (width, domain) = float_domain(format);
        for (int, bits, signed) in INTS {
            if name == "bf16" && bits == 8 {
                continue; // there is no such pair
            }
            for (r, round) in ROUNDS {
                // float to integer: clamped; NaN is 0, and 1 << 63 for 64-bit destinations
                for ftz in [false, true] {
                    for sat in ["", ".sat"] {
                        if ftz && format != F32 || !sat.is_empty() && (r != "n" || ftz || name == "bf16") {
                            continue;
                        }
                        let m = format!("cvt.r{r}i{}{sat}.{int}.{name}", if ftz { ".ftz" } else { "" });
                        all.push(lane(
                            ident(&m),
                            target,
                            &[(width, domain)],
                            &[reg(bits)],
                            format!("{m} d0, a0;"),
                            move |a| {
                                let x = format.decode(if ftz { format.flush(a[0] as u32) } else { a[0] as u32 });
                                if x.is_nan() {
                                    return vec![if bits == 64 { 1 << 63 } else { 0 }];
                                }
                                let y = integral(x, round);
                                let whole = match (bits, signed) {
                                    (64, false) => i128::from(y as u64),
                                    (64, true) => i128::from(y as i64),
                                    (_, false) => (y as i128).clamp(0, (1 << bits) - 1),
                                    _ => (y as i128).clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
                                };
                                vec![extend(whole, bits, signed)]
                            },
                        ));
                    }
                }
                // integer to float; from a nearest value and its distance
                for sat in ["", ".sat"] {
                    if !sat.is_empty() && (r != "n" || name == "bf16") {
                        continue;
                    }
                    let m = format!("cvt.r{r}{sat}.{name}.{int}");
                    let has_sat = !sat.is_empty();
                    all.push(lane(
                        ident(&m),
                        target,
                        &[(reg(bits), Domain::Int(bits))],
                        &[width],
                        format!("{m} d0, a0;"),
                        move |a| {
                            let x = value(a[0], bits, signed);
                            let d = from_int(x, format, round);
                            let one = format.encode(1.0, Round::Zero, false);
                            vec![u64::from(match () {
                                () if has_sat && x <= 0 => 0,
                                () if has_sat => d.min(one),
                                () => d,
                            })]
                        },
                    ));
                }
            }
        }
    }
    floats(all);
    double(all);
}

/// An integer rounded to the significand of the format; beyond the largest finite value the mode decides (IEEE 754, 7.4).
fn from_int(x: i128, format: Format, round: Round) -> u32 {
    let negative = x < 0;
    let magnitude = x.unsigned_abs();
    let shift = (128 - magnitude.leading_zeros()).saturating_sub(format.frac_bits + 1);
    let (kept, rest) = (magnitude >> shift, magnitude & ((1 << shift) - 1));
    let up = match round {
        Round::Zero => false,
        Round::Down => negative && rest != 0,
        Round::Up => !negative && rest != 0,
        _ => shift > 0 && (2 * rest > 1 << shift || (2 * rest == 1 << shift && kept & 1 == 1)),
    };
    let rounded = ((kept + u128::from(up)) << shift) as f64; // one significand: exact
    let sign = if negative { format.sign_bit() } else { 0 };
    if rounded > format.decode(format.max_finite()) {
        let stays = match round {
            Round::Zero => true,
            Round::Down => !negative,
            Round::Up => negative,
            _ => false,
        };
        return sign | if stays { format.max_finite() } else { format.inf() };
    }
    sign | format.encode(rounded, Round::Zero, false)
}

/// f64 from f32 and integers, and back to f32; without NaN, whose payload is not specified.
fn double(all: &mut Vec<Form>) {
    let m = "cvt.f64.f32";
    all.push(lane(ident(m), "sm_80", &[(32, Domain::Moderate(140))], &[64], format!("{m} d0, a0;"), |a| {
        vec![f64::from(f32::from_bits(a[0] as u32)).to_bits()]
    }));
    let m = "cvt.rn.f32.f64";
    all.push(lane(ident(m), "sm_80", &[(64, Domain::F64 { finite: true })], &[32], format!("{m} d0, a0;"), |a| {
        vec![u64::from((f64::from_bits(a[0]) as f32).to_bits())]
    }));
    for (from, bits, signed) in INTS.into_iter().filter(|(_, bits, _)| *bits >= 32) {
        let m = format!("cvt.rn.f64.{from}");
        all.push(lane(ident(&m), "sm_80", &[(bits, Domain::Int(bits))], &[64], format!("{m} d0, a0;"), move |a| {
            vec![(value(a[0], bits, signed) as f64).to_bits()]
        }));
    }
}

fn floats(all: &mut Vec<Form>) {
    // widening: exact
    for (name, format) in [("f16", F16), ("bf16", BF16)] {
        let (width, domain) = float_domain(format);
        for ftz in ["", ".ftz"] {
            for sat in ["", ".sat"] {
                // bf16 sources take no .ftz or .sat in older versions of the document: only the plain form is tested there
                if name == "bf16" && !(ftz.is_empty() && sat.is_empty()) {
                    continue;
                }
                let m = format!("cvt{ftz}{sat}.f32.{name}");
                let (ftz, sat) = (!ftz.is_empty(), !sat.is_empty());
                all.push(lane(ident(&m), "sm_80", &[(width, domain)], &[32], format!("{m} d0, a0;"), move |a| {
                    if format == BF16 {
                        return vec![a[0] << 16]; // a shift: ptxas emits SHF.L, so that a NaN keeps its bits
                    }
                    let x = format.decode(a[0] as u32) as f32;
                    let x = if ftz && x.is_subnormal() { 0f32.copysign(x) } else { x };
                    vec![match () {
                        () if x.is_nan() => {
                            if sat {
                                0
                            } else {
                                0x7fff_ffff
                            }
                        }
                        () if sat => u64::from(if x > 0.0 { x.min(1.0) } else { 0.0 }.to_bits()),
                        () => u64::from(x.to_bits()),
                    }]
                }));
            }
        }
    }
    // f32 to an integral f32
    for (r, round) in ROUNDS {
        for (ftz, sat) in [(false, false), (true, false), (false, true)] {
            let m = format!("cvt.r{r}i{}{}.f32.f32", if ftz { ".ftz" } else { "" }, if sat { ".sat" } else { "" });
            all.push(lane(ident(&m), "sm_80", &[(32, Domain::F32)], &[32], format!("{m} d0, a0;"), move |a| {
                let x = f32::from_bits(a[0] as u32);
                let x = if ftz && x.is_subnormal() { 0f32.copysign(x) } else { x };
                let y = integral(f64::from(x), round) as f32;
                vec![match () {
                    () if x.is_nan() => {
                        if sat {
                            0
                        } else {
                            0x7fff_ffff
                        }
                    }
                    () if sat => u64::from(if y > 0.0 { y.min(1.0) } else { 0.0 }.to_bits()),
                    () => u64::from(y.to_bits()),
                }]
            }));
        }
    }
    // narrowing, one value and pairs (first source in the upper half)
    for (name, format) in [("f16", F16), ("bf16", BF16)] {
        for (r, round) in ROUNDS {
            for relu in [false, true] {
                for satfinite in [false, true] {
                    let modified = relu || satfinite;
                    let narrow = move |x: u64| {
                        let d = format.encode(f64::from(f32::from_bits(x as u32)), round, satfinite);
                        u64::from(if relu && !format.is_nan(d) && d & format.sign_bit() != 0 { 0 } else { d })
                    };
                    let suffix =
                        format!("{}{}", if relu { ".relu" } else { "" }, if satfinite { ".satfinite" } else { "" });
                    // .rm and .rp exist for .f16.f32 alone, without modifiers; .satfinite of bf16 needs a newer document
                    let directed = r == "m" || r == "p";
                    if !(directed && (modified || name == "bf16")) {
                        let m = format!("cvt.r{r}{suffix}.{name}.f32");
                        all.push(lane(
                            ident(&m),
                            "sm_80",
                            &[(32, Domain::F32)],
                            &[16],
                            format!("{m} d0, a0;"),
                            move |a| vec![narrow(a[0])],
                        ));
                    }
                    if !directed {
                        let m = format!("cvt.r{r}{suffix}.{name}x2.f32");
                        all.push(lane(
                            ident(&m),
                            "sm_80",
                            &[(32, Domain::F32); 2],
                            &[32],
                            format!("{m} d0, a0, a1;"),
                            move |a| vec![narrow(a[0]) << 16 | narrow(a[1])],
                        ));
                    }
                }
            }
        }
    }
    // tf32: .rna from sm_80, .rn and .rz with .relu from sm_90. A NaN keeps the canonical pattern of f32.
    for (r, round, relu, target) in [
        ("rna", Round::Away, false, "sm_80"),
        ("rn", Round::Nearest, false, "sm_90"),
        ("rn", Round::Nearest, true, "sm_90"),
        ("rz", Round::Zero, false, "sm_90"),
        ("rz", Round::Zero, true, "sm_90"),
    ] {
        let m = format!("cvt.{r}{}.tf32.f32", if relu { ".relu" } else { "" });
        all.push(lane(ident(&m), target, &[(32, Domain::F32)], &[32], format!("{m} d0, a0;"), move |a| {
            let x = f64::from(f32::from_bits(a[0] as u32));
            let d = TF32.encode(x, round, false);
            vec![u64::from(if relu && !x.is_nan() && d >> 31 == 1 { 0 } else { d })]
        }));
    }
    // 8-bit floats, in pairs
    for (name, format) in [("e4m3x2", E4M3), ("e5m2x2", E5M2)] {
        for relu in [false, true] {
            let r = if relu { ".relu" } else { "" };
            let clamp = move |format: Format, d: u32| {
                u64::from(if relu && !format.is_nan(d) && d & format.sign_bit() != 0 { 0 } else { d })
            };
            let m = format!("cvt.rn.satfinite{r}.{name}.f32");
            all.push(lane(ident(&m), "sm_89", &[(32, Domain::F32); 2], &[16], format!("{m} d0, a0, a1;"), move |a| {
                let one =
                    |x: u64| clamp(format, format.encode(f64::from(f32::from_bits(x as u32)), Round::Nearest, true));
                vec![one(a[0]) << 8 | one(a[1])]
            }));
            let m = format!("cvt.rn.satfinite{r}.{name}.f16x2");
            all.push(lane(ident(&m), "sm_89", &[(32, Domain::F16x2)], &[16], format!("{m} d0, a0;"), move |a| {
                let one = |x: u64| clamp(format, format.encode(F16.decode(x as u32 & 0xffff), Round::Nearest, true));
                vec![one(a[0] >> 16) << 8 | one(a[0])]
            }));
            let m = format!("cvt.rn{r}.f16x2.{name}");
            let mut form =
                lane(ident(&m), "sm_89", &[(16, Domain::Bytes(2))], &[32], format!("{m} d0, a0;"), move |a| {
                    // every 8-bit value is exact in f16
                    let one = |x: u64| clamp(F16, F16.encode(format.decode(x as u32 & 0xff), Round::Nearest, false));
                    vec![one(a[0] >> 8) << 16 | one(a[0])]
                });
            form.blocks = 4; // 256 bytes
            all.push(form);
        }
    }
}
