//! Tensor-core arithmetic: `D = A * B + C` on whole dense tiles.
//!
//! Tensor cores do not add in IEEE steps. One fused step takes all its products exactly, and C, aligns everything to the largest exponent,
//! keeps F fraction bits below it, truncates each term towards zero, adds exactly, and then rounds once: to f32 by truncation, to f16 to
//! nearest even. [`Numerics::Exact`] does this with the F and the number of steps of an architecture; [`Numerics::Fast`] adds f32 products in
//! order of k, for tests that only need a reasonable sum. Integer types are exact in both.
//!
//! The model and its constants are those that the authors of MMA-Sim (Microsoft, 2025) found to agree with hardware bit for bit; arXiv
//! 2512.07004 measures the same widths. The exponent of a product is the sum of the exponents of its factors, without normalising; a
//! subnormal has the exponent of the smallest normal number. A zero term does not take part in the alignment. An exact zero result is +0.
//!
//! A tile is M x N with N a multiple of 8. Work goes column block by column block, 8 lanes wide, so that the compiler can vectorise it.

#[cfg(target_arch = "x86_64")]
#[path = "mma_avx2.rs"]
mod avx2;

use super::float::{BF16, E4M3, E5M2, F16, F32, Format, Round, TF32};

/// Element type of A or B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// `.f16`
    F16,
    /// `.bf16`
    Bf16,
    /// `.tf32`: the low 13 bits of each register are ignored.
    Tf32,
    /// `.e4m3`
    E4m3,
    /// `.e5m2`
    E5m2,
    /// `.s8`
    S8,
    /// `.u8`
    U8,
}

impl Input {
    /// Bits of one element.
    pub const fn bits(self) -> u32 {
        match self {
            Input::Tf32 => 32,
            Input::F16 | Input::Bf16 => 16,
            Input::E4m3 | Input::E5m2 | Input::S8 | Input::U8 => 8,
        }
    }
    /// Whether the type is an integer.
    pub const fn is_int(self) -> bool {
        matches!(self, Input::S8 | Input::U8)
    }
    const fn format(self) -> Format {
        match self {
            Input::F16 => F16,
            Input::Bf16 => BF16,
            Input::Tf32 => TF32,
            Input::E4m3 => E4M3,
            Input::E5m2 | Input::S8 | Input::U8 => E5M2,
        }
    }
    const fn is_fp8(self) -> bool {
        matches!(self, Input::E4m3 | Input::E5m2)
    }
}

/// Type of C and D.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accumulator {
    /// `.f32`
    F32,
    /// `.f16`
    F16,
    /// `.s32`; `true` with `.satfinite`, which clamps instead of wrapping.
    S32(bool),
}

/// Generation of tensor cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// sm_80, sm_86
    Ampere,
    /// sm_89
    Ada,
    /// sm_90
    Hopper,
    /// sm_100, sm_120
    Blackwell,
}

/// Which instruction computes: the widths differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// `mma.sync`
    Mma,
    /// `wgmma.mma_async`
    Wgmma,
}

/// How floating-point sums are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// As the hardware does, bit for bit as far as it is known.
    Exact(Arch),
    /// f32 multiplications and additions in order of k.
    Fast,
}

/// Everything about an instruction that its arithmetic depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Type of A.
    pub a: Input,
    /// Type of B.
    pub b: Input,
    /// Type of C and D.
    pub acc: Accumulator,
    /// Instruction.
    pub unit: Unit,
    /// Model of the sums.
    pub numerics: Numerics,
}

/// Widths of one fused step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Fraction bits kept below the largest exponent.
    pub fraction: u32,
    /// Number of sequential steps that K is cut into, low K first.
    pub steps: usize,
    /// Fraction bits of an f32 result: 23, or 13 where the datapath is narrower.
    pub result: u32,
}

/// The widths of `spec` on `arch` for an instruction with `k` products per element.
pub fn widths(spec: &Spec, arch: Arch, k: usize) -> Widths {
    let fp8 = spec.a.is_fp8();
    let full = |fraction, steps| Widths { fraction, steps, result: 23 };
    match (spec.unit, arch) {
        (Unit::Wgmma, _) if fp8 => Widths { fraction: 13, steps: 1, result: 13 },
        (Unit::Wgmma, _) => full(25, 1),
        (Unit::Mma, Arch::Hopper | Arch::Blackwell) => full(25, 1),
        (Unit::Mma, Arch::Ada) if fp8 => Widths { fraction: 13, steps: 2, result: 13 },
        // a step takes 16 bytes of K on Ampere and Ada: k8 of 16-bit types, k4 of tf32
        (Unit::Mma, Arch::Ampere | Arch::Ada) => full(24, (k * spec.a.bits() as usize / 128).max(1)),
    }
}

/// Buffers that are reused from tile to tile; holds no result.
#[derive(Default, Debug)]
pub struct Scratch {
    a: Vec<Term>,
    b: Vec<[i32; LANES]>,
    b_exp: Vec<[i32; LANES]>,
    a_float: Vec<f32>,
    b_float: Vec<[f32; LANES]>,
}

const LANES: usize = 8;
/// Exponent of a zero factor: low enough that no product with it is the largest, whatever the other factor is.
const ZERO_EXP: i32 = -2000;
/// Largest number of products whose sum cannot leave 32 bits: each is below 4 * 2^25.
const SAFE_TERMS: usize = 8;

#[derive(Clone, Copy, Default, Debug)]
struct Term {
    mantissa: i32,
    exp: i32,
}

/// `d = a * b + c` for one tile.
///
/// * `a`: `[m, k]`, `b`: `[n, k]` (k contiguous in both), raw element bits in the low bits of each `u32`
/// * `c`, `d`: `[m, n]`, raw f32, f16 or s32 bits
///
/// # Panics
/// If the lengths do not fit `m`, `n`, `k`, or `n` is not a multiple of 8.
#[allow(clippy::too_many_arguments)]
pub fn tile(
    spec: &Spec,
    m: usize,
    n: usize,
    k: usize,
    a: &[u32],
    b: &[u32],
    c: &[u32],
    d: &mut [u32],
    scratch: &mut Scratch,
) {
    assert_eq!((a.len(), b.len(), c.len(), d.len()), (m * k, n * k, m * n, m * n), "tile of {m} x {n} x {k}");
    assert_eq!(n % LANES, 0, "n = {n} is not a multiple of {LANES}");
    if spec.a.is_int() {
        return integer(spec, m, n, k, a, b, c, d);
    }
    match spec.numerics {
        Numerics::Fast => fast(spec, m, n, k, a, b, c, d, scratch),
        Numerics::Exact(arch) => {
            let finite =
                all_finite(spec.a, a) && all_finite(spec.b, b) && c.iter().all(|&c| is_finite_acc(spec.acc, c));
            let widths = widths(spec, arch, k);
            if finite {
                exact_dispatch(spec, widths, n, k, a, b, c, d, scratch);
            } else {
                exact_with_specials(spec, widths, m, n, k, a, b, c, d);
            }
        }
    }
}

/// The pattern of a NaN result (PTX ISA 9.7.14.5: the result of a NaN input is canonical).
fn nan(acc: Accumulator) -> u32 {
    if acc == Accumulator::F16 { F16.nan() } else { F32.nan() }
}

fn acc_format(acc: Accumulator) -> Format {
    if acc == Accumulator::F16 { F16 } else { F32 }
}

fn is_finite_acc(acc: Accumulator, bits: u32) -> bool {
    let inf = acc_format(acc).inf();
    bits & inf != inf
}

fn all_finite(input: Input, values: &[u32]) -> bool {
    match input {
        Input::E4m3 => values.iter().all(|v| v & 0x7f != 0x7f),
        _ => {
            let inf = input.format().inf();
            values.iter().all(|v| v & inf != inf)
        }
    }
}

/// Significand (with `frac` fraction bits) and exponent of a finite pattern.
#[inline(always)]
fn split(format: Format, frac: u32, bits: u32) -> Term {
    let bits = bits.wrapping_shr(format.pad_bits); // tf32: the unused low bits are ignored
    let fraction = bits & 1u32.wrapping_shl(format.frac_bits).wrapping_sub(1);
    let field = bits.wrapping_shr(format.frac_bits) & 1u32.wrapping_shl(format.exp_bits).wrapping_sub(1);
    let sign = -(bits.wrapping_shr(format.exp_bits + format.frac_bits) as i32 & 1);
    let implicit = u32::from(field != 0).wrapping_shl(format.frac_bits);
    let magnitude = (fraction | implicit).wrapping_shl(frac - format.frac_bits);
    let exp = if magnitude == 0 { ZERO_EXP } else { (field.max(1) as i32).wrapping_sub(format.bias()) };
    Term { mantissa: (magnitude as i32 ^ sign).wrapping_sub(sign), exp }
}

/// Fraction bits to which the significands of A and B are brought: those of the wider of the two types.
fn common_fraction(spec: &Spec) -> u32 {
    spec.a.format().frac_bits.max(spec.b.format().frac_bits)
}

#[allow(clippy::too_many_arguments)]
fn exact_dispatch(
    spec: &Spec,
    widths: Widths,
    n: usize,
    k: usize,
    a: &[u32],
    b: &[u32],
    c: &[u32],
    d: &mut [u32],
    scratch: &mut Scratch,
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        #[allow(clippy::too_many_arguments)]
        fn with_avx2(
            spec: &Spec,
            widths: Widths,
            n: usize,
            k: usize,
            a: &[u32],
            b: &[u32],
            c: &[u32],
            d: &mut [u32],
            scratch: &mut Scratch,
        ) {
            // the closure has the features of the function around it
            exact(spec, widths, n, k, a, b, c, d, scratch, |shift, a, b, e, acc| {
                avx2::fused_step(spec, widths, shift, a, b, e, acc);
            });
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2, as just detected.
            return unsafe { with_avx2(spec, widths, n, k, a, b, c, d, scratch) };
        }
    }
    exact(spec, widths, n, k, a, b, c, d, scratch, |shift, a, b, e, acc| fused_step(spec, widths, shift, a, b, e, acc));
}

/// The model for finite inputs.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn exact(
    spec: &Spec,
    widths: Widths,
    n: usize,
    k: usize,
    a: &[u32],
    b: &[u32],
    c: &[u32],
    d: &mut [u32],
    scratch: &mut Scratch,
    step_of: impl Fn(u32, &[Term], &[[i32; LANES]], &[[i32; LANES]], &mut [u32; LANES]),
) {
    let frac = common_fraction(spec);
    let (format_a, format_b) = (spec.a.format(), spec.b.format());
    scratch.a.resize(a.len(), Term::default());
    for (term, &x) in scratch.a.iter_mut().zip(a) {
        *term = split(format_a, frac, x);
    }
    scratch.b.clear();
    scratch.b.resize(n / LANES * k, [0; LANES]);
    scratch.b_exp.clear();
    scratch.b_exp.resize(n / LANES * k, [0; LANES]);
    for (col, column) in b.chunks_exact(k).enumerate() {
        for (i, &x) in column.iter().enumerate() {
            let term = split(format_b, frac, x);
            scratch.b[col / LANES * k + i][col % LANES] = term.mantissa;
            scratch.b_exp[col / LANES * k + i][col % LANES] = term.exp;
        }
    }
    // a product has 2 * frac fraction bits; it is brought to `fraction` of them before the alignment
    let shift_up = widths.fraction - 2 * frac;
    let per_step = k / widths.steps;
    for (row, d_row) in d.chunks_exact_mut(n).enumerate() {
        let a_row = &scratch.a[row * k..(row + 1) * k];
        let c_row = &c[row * n..(row + 1) * n];
        for (block, d8) in d_row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            d8.copy_from_slice(&c_row[block * LANES..(block + 1) * LANES]);
            for step in 0..widths.steps {
                let range = block * k + step * per_step..block * k + (step + 1) * per_step;
                let a_step = &a_row[step * per_step..(step + 1) * per_step];
                let before = *d8;
                step_of(shift_up, a_step, &scratch.b[range.clone()], &scratch.b_exp[range], d8);
                if step > 0 {
                    // an earlier step overflowed: infinity stays
                    for lane in 0..LANES {
                        d8[lane] = if is_finite_acc(spec.acc, before[lane]) { d8[lane] } else { before[lane] };
                    }
                }
            }
        }
    }
}

/// One fused step for 8 columns; `acc` holds C on entry and D on return. Wrapping operators keep the loops free of overflow branches, which
/// would prevent vectorising in test builds; nothing here wraps.
#[inline(always)]
fn fused_step(
    spec: &Spec,
    widths: Widths,
    shift_up: u32,
    a: &[Term],
    b: &[[i32; LANES]],
    b_exp: &[[i32; LANES]],
    acc: &mut [u32; LANES],
) {
    let format_c = acc_format(spec.acc);
    let mut c_mantissa = [0i32; LANES];
    let mut c_exp = [0i32; LANES];
    for lane in 0..LANES {
        let c = split(format_c, format_c.frac_bits, acc[lane]);
        (c_mantissa[lane], c_exp[lane]) = (c.mantissa, c.exp);
    }
    let mut largest = c_exp;
    for (a, exp) in a.iter().zip(b_exp) {
        for lane in 0..LANES {
            largest[lane] = largest[lane].max(a.exp.wrapping_add(exp[lane]));
        }
    }
    // sums of integers below 2^53: exact in f64
    let mut total = [0f64; LANES];
    for ((a, b), exp) in a.chunks(SAFE_TERMS).zip(b.chunks(SAFE_TERMS)).zip(b_exp.chunks(SAFE_TERMS)) {
        let mut part = [0i32; LANES];
        for ((a, b), exp) in a.iter().zip(b).zip(exp) {
            for lane in 0..LANES {
                let product = a.mantissa.wrapping_mul(b[lane]);
                let sign = product >> 31;
                let magnitude = (product ^ sign).wrapping_sub(sign).wrapping_shl(shift_up);
                let behind = largest[lane].wrapping_sub(a.exp.wrapping_add(exp[lane])).min(31);
                let kept = magnitude.wrapping_shr(behind as u32);
                part[lane] = part[lane].wrapping_add((kept ^ sign).wrapping_sub(sign));
            }
        }
        for lane in 0..LANES {
            total[lane] += f64::from(part[lane]);
        }
    }
    // C has 23 (10) fraction bits; truncation towards zero whichever way it shifts
    let up = (widths.fraction as i32).wrapping_sub(format_c.frac_bits as i32).max(0) as u32;
    let down = (format_c.frac_bits as i32).wrapping_sub(widths.fraction as i32).max(0);
    let mut result = [0f64; LANES];
    for lane in 0..LANES {
        let sign = c_mantissa[lane] >> 31;
        let magnitude = (c_mantissa[lane] ^ sign).wrapping_sub(sign).wrapping_shl(up);
        let behind = largest[lane].wrapping_sub(c_exp[lane]).wrapping_add(down).min(31);
        let kept = magnitude.wrapping_shr(behind as u32);
        let sum = total[lane] + f64::from((kept ^ sign).wrapping_sub(sign));
        // the scale is far inside the range of f64 unless every term is zero
        let scale = largest[lane].wrapping_sub(widths.fraction as i32).max(-1000);
        result[lane] = sum * f64::from_bits((scale.wrapping_add(1023) as u64) << 52);
    }
    round_results(spec.acc, widths, &result, acc);
}

/// The exact sums as D: f32 by truncation, f16 to nearest even; too large becomes infinity, zero is +0.
#[inline(always)]
fn round_results(acc: Accumulator, widths: Widths, sums: &[f64; LANES], out: &mut [u32; LANES]) {
    if acc == Accumulator::F16 {
        for lane in 0..LANES {
            out[lane] = F16.encode(sums[lane] + 0.0, Round::Nearest, false);
        }
        return;
    }
    // Clearing the low bits of the f64 truncates; the conversion is then exact for results that are normal or too large.
    let keep = if widths.result == 13 { !0u64 << 39 } else { !0u64 << 29 };
    let mut subnormal = false;
    for lane in 0..LANES {
        let sum = sums[lane] + 0.0; // -0 becomes +0
        subnormal |= sum.abs() < f64::from(f32::MIN_POSITIVE) && sum != 0.0;
        out[lane] = (f64::from_bits(sum.to_bits() & keep) as f32).to_bits();
    }
    if subnormal {
        round_subnormals(widths, sums, out);
    }
}

/// f32 results by truncation where one of them is subnormal: rare.
#[cold]
#[inline(never)]
fn round_subnormals(widths: Widths, sums: &[f64; LANES], out: &mut [u32; LANES]) {
    let cut = if widths.result == 13 { !0x3ff } else { !0 };
    for lane in 0..LANES {
        let sum = sums[lane] + 0.0;
        if sum.abs() < f64::from(f32::MIN_POSITIVE) {
            out[lane] = F32.encode(sum, Round::Zero, false) & cut;
        }
    }
}

/// The model where NaN or infinity is among the inputs: rare, so element by element.
#[allow(clippy::too_many_arguments)]
fn exact_with_specials(
    spec: &Spec,
    widths: Widths,
    m: usize,
    n: usize,
    k: usize,
    a: &[u32],
    b: &[u32],
    c: &[u32],
    d: &mut [u32],
) {
    let truncate = |input: Input, x: u32| if input == Input::Tf32 { x & !0x1fff } else { x };
    let frac = common_fraction(spec);
    let per_step = k / widths.steps;
    for row in 0..m {
        for col in 0..n {
            let mut acc = c[row * n + col];
            for step in 0..widths.steps {
                let range = step * per_step..(step + 1) * per_step;
                let (a, b) = (&a[row * k..][range.clone()], &b[col * k..][range]);
                let value = |input: Input, x: u32| input.format().decode(truncate(input, x));
                let mut sum = acc_format(spec.acc).decode(acc);
                for (&x, &y) in a.iter().zip(b) {
                    let product = value(spec.a, x) * value(spec.b, y);
                    // finite products are added below; here only what can make NaN or infinity counts
                    sum += if product.is_finite() { 0.0 } else { product };
                }
                acc = if sum.is_nan() {
                    nan(spec.acc)
                } else if sum.is_infinite() {
                    acc_format(spec.acc).encode(sum, Round::Nearest, false)
                } else {
                    let a: Vec<Term> = a.iter().map(|&x| split(spec.a.format(), frac, x)).collect();
                    let b: Vec<Term> = b.iter().map(|&x| split(spec.b.format(), frac, x)).collect();
                    let mantissas: Vec<_> = b.iter().map(|t| [t.mantissa; LANES]).collect();
                    let exps: Vec<_> = b.iter().map(|t| [t.exp; LANES]).collect();
                    let mut lanes = [acc; LANES];
                    fused_step(spec, widths, widths.fraction - 2 * frac, &a, &mantissas, &exps, &mut lanes);
                    lanes[0]
                };
            }
            d[row * n + col] = acc;
        }
    }
}

/// f32 sums in order of k, starting from C.
#[allow(clippy::too_many_arguments)]
fn fast(
    spec: &Spec,
    m: usize,
    n: usize,
    k: usize,
    a: &[u32],
    b: &[u32],
    c: &[u32],
    d: &mut [u32],
    scratch: &mut Scratch,
) {
    let Scratch { a_float, b_float, .. } = scratch;
    a_float.clear();
    a_float.extend(a.iter().map(|&x| to_f32(spec.a, x)));
    b_float.clear();
    b_float.resize(n / LANES * k, [0.0; LANES]);
    for (col, column) in b.chunks_exact(k).enumerate() {
        for (i, &x) in column.iter().enumerate() {
            b_float[col / LANES * k + i][col % LANES] = to_f32(spec.b, x);
        }
    }
    let half = spec.acc == Accumulator::F16;
    for row in 0..m {
        let a_row = &a_float[row * k..(row + 1) * k];
        for block in 0..n / LANES {
            let at = row * n + block * LANES;
            let mut sum = [0f32; LANES];
            for lane in 0..LANES {
                sum[lane] = if half { to_f32(Input::F16, c[at + lane]) } else { f32::from_bits(c[at + lane]) };
            }
            for (&a, b) in a_row.iter().zip(&b_float[block * k..(block + 1) * k]) {
                for lane in 0..LANES {
                    sum[lane] += a * b[lane];
                }
            }
            for lane in 0..LANES {
                d[at + lane] = if half {
                    F16.encode(f64::from(sum[lane]), Round::Nearest, false)
                } else if sum[lane].is_nan() {
                    F32.nan()
                } else {
                    sum[lane].to_bits()
                };
            }
        }
    }
}

#[inline]
fn to_f32(input: Input, bits: u32) -> f32 {
    match input {
        Input::Bf16 => f32::from_bits(bits << 16),
        Input::Tf32 => f32::from_bits(bits & !0x1fff),
        _ => {
            let format = input.format();
            let magnitude = bits & (format.sign_bit() - 1);
            let field = magnitude >> format.frac_bits;
            let largest = (1 << format.exp_bits) - 1;
            if field == 0 || (field == largest && (format.has_inf || format.is_nan(bits))) {
                return format.decode(bits) as f32;
            }
            let rebias = (127 - format.bias() as u32) << 23;
            f32::from_bits(
                (bits & format.sign_bit()) << (32 - format.width()) | ((magnitude << (23 - format.frac_bits)) + rebias),
            )
        }
    }
}

/// s8 and u8: exact, wrapped to 32 bits or clamped with `.satfinite` (PTX ISA 9.7.14.5: the sum with C is clamped).
#[allow(clippy::too_many_arguments)]
fn integer(spec: &Spec, m: usize, n: usize, k: usize, a: &[u32], b: &[u32], c: &[u32], d: &mut [u32]) {
    let widen = |input: Input, x: u32| if input == Input::S8 { i32::from(x as u8 as i8) } else { i32::from(x as u8) };
    let a: Vec<i32> = a.iter().map(|&x| widen(spec.a, x)).collect();
    let b: Vec<i32> = b.iter().map(|&x| widen(spec.b, x)).collect();
    for row in 0..m {
        for col in 0..n {
            let dot: i32 = a[row * k..(row + 1) * k].iter().zip(&b[col * k..(col + 1) * k]).map(|(x, y)| x * y).sum();
            let c = c[row * n + col] as i32;
            d[row * n + col] =
                if spec.acc == Accumulator::S32(true) { c.saturating_add(dot) } else { c.wrapping_add(dot) } as u32;
        }
    }
}

#[cfg(test)]
#[path = "mma_tests.rs"]
mod tests;
