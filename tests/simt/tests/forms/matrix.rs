//! Warp matrix instructions (PTX ISA 9.7.14.5): `ldmatrix`, `stmatrix`, `movmatrix`, `mma.sync`; and the dense oracle that they and `wgmma`
//! are compared to.
//!
//! The oracle shares no code with the simulator: elements are found by the formulas of the ISA (`groupID`, `threadID_in_group`), values are
//! `f64`, and the sum of a step is done in integers on the grid that the alignment leaves.

use simt::model::float::{BF16, E4M3, E5M2, F16, F32, Format, Round, TF32};

use super::{Domain, Element, Form, Values, block, ident, random};

pub fn add(all: &mut Vec<Form>) {
    moves(all);
    float_mma(all);
    integer_mma(all);
}

/// A 32-bit word of matrix elements. Most blocks hold moderate numbers with some zeros; block 6 mixes in special values, block 7 subnormals and
/// extreme exponents.
pub fn element_word(element: Element, block: u32, r: u64, state: &mut u64) -> u64 {
    let format = match element {
        Element::F32 => F32,
        Element::F16 => F16,
        Element::Bf16 => BF16,
        Element::Tf32 => TF32,
        Element::E4m3 => E4M3,
        Element::E5m2 => E5M2,
        Element::Int8 | Element::Int32 => return r >> 32,
    };
    let parts = 32 / format.width();
    (0..parts).fold(0, |word, part| {
        let r = random(state);
        let unit = (r >> 40) as f64 / (1u64 << 23) as f64 - 1.0;
        let spread = if format.exp_bits == 4 { 5 } else { 9 };
        let exp = (r >> 8 & 0xff) as i32 % (2 * spread + 1) - spread;
        let bits = match (block, r % 13) {
            (6, 0) => [format.inf(), format.inf() | format.sign_bit(), format.nan(), format.max_finite()]
                [(r >> 20) as usize % 4],
            (7, 0..=5) => (r >> 30) as u32 & ((1 << format.frac_bits) - 1) << format.pad_bits,
            (7, 6) => format.encode(unit * 2f64.powi(format.bias() / 3), Round::Nearest, true),
            (_, 1) => 0,
            (1, _) => format.encode((unit * 4.0).round(), Round::Nearest, true),
            _ => format.encode(unit * 2f64.powi(exp), Round::Nearest, true),
        };
        // tf32: whatever stands in the low bits is ignored
        let bits =
            if element == Element::Tf32 && r.is_multiple_of(3) { bits | (r >> 50) as u32 & 0x1fff } else { bits };
        word | u64::from(bits) << (part * format.width())
    })
}

/// `(row, k)` of element i of an A fragment and `(k, n)` of B, as 9.7.14.5.7 to 9.7.14.5.10 give them: for elements of `bits` bits, groups of
/// `e = 32 / bits` neighbours, rows alternating by register, k moving on every second register.
pub fn a_position(bits: usize, lane: usize, i: usize) -> (usize, usize) {
    let e = 32 / bits;
    let (group, t) = (lane >> 2, lane % 4);
    let register = i / e;
    (group + 8 * (register % 2), t * e + i % e + 4 * e * (register / 2))
}

pub fn b_position(bits: usize, lane: usize, i: usize) -> (usize, usize) {
    let e = 32 / bits;
    (lane % 4 * e + i % e + 4 * e * (i / e), lane >> 2)
}

/// `(row, column)` of accumulator element i.
pub fn c_position(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + if i % 4 < 2 { 0 } else { 8 }, i / 4 * 8 + lane % 4 * 2 + i % 2)
}

/// What the tensor core does with one element of D on Hopper (mma.sync: 25 fraction bits; wgmma of 8-bit floats: 13 bits, in D too).
#[derive(Clone, Copy)]
pub struct Oracle {
    pub a: Format,
    pub b: Format,
    /// Format of C and D.
    pub acc: Format,
    pub fraction: i32,
    pub result_bits: u32,
}

impl Oracle {
    fn exponent(format: Format, x: f64) -> i32 {
        (((x.to_bits() >> 52 & 0x7ff) as i32) - 1023).max(1 - format.bias())
    }

    /// `c + sum a b` from raw bits.
    pub fn dot(&self, pairs: &[(u32, u32)], c: u32) -> u32 {
        let read = |format: Format, x: u32| format.decode(if format == TF32 { x & !0x1fff } else { x });
        let values: Vec<(f64, f64)> = pairs.iter().map(|&(x, y)| (read(self.a, x), read(self.b, y))).collect();
        let c_value = self.acc.decode(c);
        let plain = values.iter().fold(c_value, |s, (x, y)| s + x * y);
        if !plain.is_finite() {
            return self.acc.encode(plain, Round::Nearest, false);
        }
        let mut terms: Vec<(f64, i32)> = values
            .iter()
            .filter(|(x, y)| x * y != 0.0)
            .map(|&(x, y)| (x * y, Self::exponent(self.a, x) + Self::exponent(self.b, y)))
            .collect();
        if c_value != 0.0 {
            terms.push((c_value, Self::exponent(self.acc, c_value)));
        }
        let Some(largest) = terms.iter().map(|t| t.1).max() else { return 0 };
        let unit = 2f64.powi(largest - self.fraction);
        let sum: i64 = terms.iter().map(|t| (t.0 / unit) as i64).sum(); // `as` truncates towards zero
        if sum == 0 {
            return 0;
        }
        let exact = sum as f64 * unit;
        if self.acc == F16 {
            return F16.encode(exact, Round::Nearest, false);
        }
        if exact.abs() >= 2f64.powi(128) {
            return F32.encode(exact, Round::Nearest, false);
        }
        F32.encode(exact, Round::Zero, false) & !((1 << (23 - self.result_bits)) - 1)
    }
}

fn moves(all: &mut Vec<Form>) {
    // every thread stores 16 bytes of a column of rows and gives the address of one
    let head = ".shared .align 16 .b8 smem[512];\n.reg .b32 p;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 16, p;\n";
    let half = |v: &Values, row: usize, col: usize| v[col / 4][row] >> (16 * (col % 4)) & 0xffff;
    for n in [1usize, 2, 4] {
        for trans in [false, true] {
            for space in ["shared", "shared::cta", ""] {
                if space.is_empty() && (trans || n != 4) {
                    continue;
                }
                let t = if trans { ".trans" } else { "" };
                let s = if space.is_empty() { String::new() } else { format!(".{space}") };
                let m = format!("ldmatrix.sync.aligned.m8n8.x{n}{t}{s}.b16");
                let regs: Vec<String> = (0..n).map(|i| format!("d{i}")).collect();
                let load = if space.is_empty() {
                    format!(".reg .b64 g;\ncvt.u64.u32 g, p;\ncvta.shared.u64 g, g;\n{m} {{{}}}, [g];", regs.join(", "))
                } else {
                    format!("{m} {{{}}}, [p];", regs.join(", "))
                };
                let body = format!("{head}st.shared.v2.b64 [p], {{a0, a1}};\nbar.warp.sync 0xffffffff;\n{load}");
                all.push(block(ident(&m), "sm_80", &[(64, Domain::Int(64)); 2], &vec![32; n], body, move |v| {
                    (0..n)
                        .map(|i| {
                            (0..32)
                                .map(|lane| {
                                    let (g, t) = (lane / 4, lane % 4);
                                    // 9.7.14.5.15: row g, elements 2t, 2t + 1; with .trans the matrix is transposed
                                    let at = |k: usize| {
                                        let (row, col) = if trans { (2 * t + k, g) } else { (g, 2 * t + k) };
                                        half(v, 8 * i + row, col)
                                    };
                                    at(0) | at(1) << 16
                                })
                                .collect()
                        })
                        .collect()
                }));
                if space.is_empty() {
                    continue;
                }
                let m = format!("stmatrix.sync.aligned.m8n8.x{n}{t}{s}.b16");
                let regs: Vec<String> = (0..n).map(|i| format!("a{i}")).collect();
                let body = format!(
                    "{head}st.shared.v2.b64 [p], {{0, 0}};\nbar.warp.sync 0xffffffff;\n{m} [p], {{{}}};\nbar.warp.sync 0xffffffff;\n\
                     ld.shared.v2.b64 {{d0, d1}}, [p];",
                    regs.join(", ")
                );
                all.push(block(ident(&m), "sm_90", &vec![(32, Domain::Int(32)); n], &[64, 64], body, move |v| {
                    let mut d = vec![vec![0; 32]; 2];
                    for i in 0..n {
                        for lane in 0..32 {
                            for k in 0..2 {
                                let (g, t) = (lane / 4, lane % 4);
                                let (row, col) = if trans { (2 * t + k, g) } else { (g, 2 * t + k) };
                                d[col / 4][8 * i + row] |= (v[i][lane] >> (16 * k) & 0xffff) << (16 * (col % 4));
                            }
                        }
                    }
                    d
                }));
            }
        }
    }
    let m = "movmatrix.sync.aligned.m8n8.trans.b16";
    all.push(block(ident(m), "sm_80", &[(32, Domain::Int(32))], &[32], format!("{m} d0, a0;"), |v| {
        let at = |row: usize, col: usize| v[0][row * 4 + col / 2] >> (16 * (col % 2)) & 0xffff;
        vec![(0..32).map(|lane| at(2 * (lane % 4), lane / 4) | at(2 * (lane % 4) + 1, lane / 4) << 16).collect()]
    }));
}

fn format_of(name: &str) -> (Format, Element) {
    match name {
        "f16" => (F16, Element::F16),
        "bf16" => (BF16, Element::Bf16),
        "tf32" => (TF32, Element::Tf32),
        "e4m3" => (E4M3, Element::E4m3),
        "e5m2" => (E5M2, Element::E5m2),
        _ => (F32, Element::F32),
    }
}

/// Raw element i of a thread's operand that starts at input `first`.
pub fn raw(v: &Values, first: usize, lane: usize, bits: usize, i: usize) -> u32 {
    let e = 32 / bits;
    let word = v[first + i / e][lane];
    (word >> (bits * (i % e))) as u32 & (u64::MAX >> (64 - bits)) as u32
}

/// Text and operand lists of an `mma` with the given register counts.
fn mma_body(m: &str, na: usize, nb: usize, nc: usize) -> String {
    let list = |first: usize, n: usize| (first..first + n).map(|i| format!("a{i}")).collect::<Vec<_>>().join(", ");
    let d = (0..nc).map(|i| format!("d{i}")).collect::<Vec<_>>().join(", ");
    format!("{m} {{{d}}}, {{{}}}, {{{}}}, {{{}}};", list(0, na), list(na, nb), list(na + nb, nc))
}

fn float_mma(all: &mut Vec<Form>) {
    let shapes: [(&str, &str, &str, usize, &str); 12] = [
        // D, A, B, k, target
        ("f32", "f16", "f16", 16, "sm_80"),
        ("f32", "f16", "f16", 8, "sm_80"),
        ("f16", "f16", "f16", 16, "sm_80"),
        ("f16", "f16", "f16", 8, "sm_80"),
        ("f32", "bf16", "bf16", 16, "sm_80"),
        ("f32", "bf16", "bf16", 8, "sm_80"),
        ("f32", "tf32", "tf32", 8, "sm_80"),
        ("f32", "tf32", "tf32", 4, "sm_80"),
        ("f32", "e4m3", "e4m3", 32, "sm_89"),
        ("f32", "e4m3", "e5m2", 32, "sm_89"),
        ("f32", "e5m2", "e4m3", 32, "sm_89"),
        ("f32", "e5m2", "e5m2", 32, "sm_89"),
    ];
    for (d, a, b, k, target) in shapes {
        let ((fa, ea), (fb, eb), (fc, ec)) = (format_of(a), format_of(b), format_of(d));
        let bits = fa.width() as usize;
        let (na, nb) = (16 * k * bits / 1024, 8 * k * bits / 1024);
        let nc = if d == "f16" { 2 } else { 4 };
        let m = format!("mma.sync.aligned.m16n8k{k}.row.col.{d}.{a}.{b}.{d}");
        let mut inputs = vec![(32, Domain::Matrix(ea)); na];
        inputs.extend(vec![(32, Domain::Matrix(eb)); nb]);
        inputs.extend(vec![(32, Domain::Matrix(ec)); nc]);
        let oracle = Oracle { a: fa, b: fb, acc: fc, fraction: 25, result_bits: 23 };
        all.push(block(ident(&m), target, &inputs, &vec![32; nc], mma_body(&m, na, nb, nc), move |v| {
            let (mut dense_a, mut dense_b) = (vec![vec![0; k]; 16], vec![vec![0; k]; 8]);
            for lane in 0..32 {
                for i in 0..na * 32 / bits {
                    let (row, col) = a_position(bits, lane, i);
                    dense_a[row][col] = raw(v, 0, lane, bits, i);
                }
                for i in 0..nb * 32 / bits {
                    let (row, col) = b_position(bits, lane, i);
                    dense_b[col][row] = raw(v, na, lane, bits, i);
                }
            }
            let width = fc.width() as usize;
            let mut out = vec![vec![0; 32]; nc];
            for lane in 0..32 {
                for i in 0..4 {
                    let (row, col) = c_position(lane, i);
                    let pairs: Vec<_> = dense_a[row].iter().copied().zip(dense_b[col].iter().copied()).collect();
                    let d = oracle.dot(&pairs, raw(v, na + nb, lane, width, i));
                    out[i * width / 32][lane] |= u64::from(d) << (i * width % 32);
                }
            }
            out
        }));
    }
}

fn integer_mma(all: &mut Vec<Form>) {
    for k in [16usize, 32] {
        for (a, b) in [("s8", "s8"), ("u8", "u8"), ("s8", "u8"), ("u8", "s8")] {
            for satfinite in [false, true] {
                let m = format!(
                    "mma.sync.aligned.m16n8k{k}.row.col{}.s32.{a}.{b}.s32",
                    if satfinite { ".satfinite" } else { "" }
                );
                let (na, nb) = (k / 8, k / 16);
                let mut inputs = vec![(32, Domain::Matrix(Element::Int8)); na + nb];
                inputs.extend([(32, Domain::Int(32)); 4]);
                all.push(block(ident(&m), "sm_80", &inputs, &[32; 4], mma_body(&m, na, nb, 4), move |v| {
                    let read = |ty: &str, x: u32| if ty == "s8" { i64::from(x as u8 as i8) } else { i64::from(x) };
                    let (mut dense_a, mut dense_b) = (vec![vec![0; k]; 16], vec![vec![0; k]; 8]);
                    for lane in 0..32 {
                        for i in 0..na * 4 {
                            let (row, col) = a_position(8, lane, i);
                            dense_a[row][col] = read(a, raw(v, 0, lane, 8, i));
                        }
                        for i in 0..nb * 4 {
                            let (row, col) = b_position(8, lane, i);
                            dense_b[col][row] = read(b, raw(v, na, lane, 8, i));
                        }
                    }
                    (0..4)
                        .map(|i| {
                            (0..32)
                                .map(|lane| {
                                    let (row, col) = c_position(lane, i);
                                    let dot: i64 = dense_a[row].iter().zip(&dense_b[col]).map(|(x, y)| x * y).sum();
                                    let sum = dot + i64::from(v[na + nb + i][lane] as i32);
                                    let sum = if satfinite { sum.clamp(i32::MIN.into(), i32::MAX.into()) } else { sum };
                                    u64::from(sum as u32)
                                })
                                .collect()
                        })
                        .collect()
                }));
            }
        }
    }
}
