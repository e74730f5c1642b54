//! The four ways in which a word of activations meets a vector of weights.
//!
//! | product | weights | activations | a step |
//! |---|---|---|---|
//! | [`F32`] | f32 | f32 | one k |
//! | [`F16`] | f16, widened in registers | f32 | one k |
//! | [`Bf16Wide`] | bf16, widened in registers | f32 | two k, even then odd |
//! | [`Bf16Dot`] | bf16 | bf16 | two k, one instruction; subnormals count as zero |

use super::PANEL;
use crate::cpu::any::AnyRow;
use crate::cpu::float::Float;
use crate::cpu::simd::Simd;
use crate::element::Dtype;
use half::{bf16, f16};
use std::ops::Range;

/// One way to multiply. A step is the least number of k that the layout of its panel allows.
pub trait Product: Send + Sync + 'static {
    /// A word of activations: what is broadcast to all lanes.
    type A: bytemuck::Pod + Send + Sync + std::fmt::Debug;
    /// Element of the weights.
    type W: Float;
    /// k in a step.
    const STEP_K: usize;
    /// Words per token in a step.
    const A_WORDS: usize;
    /// Weights of a panel in a step: `PANEL * STEP_K`.
    const STEP_WEIGHTS: usize = PANEL * Self::STEP_K;

    /// `acc[i][v] += a[i] * w` over one step: `a` holds `A_WORDS * M` words, `w` the step's weights of a panel, of which the
    /// vectors from output `output` are used.
    fn step<S: Simd, const M: usize>(simd: S, acc: &mut [[S::F32; 2]; M], a: &[Self::A], w: &[Self::W], output: usize);

    /// The words of one token for some of k (`k.start` at a step); words past the end of the row's k are 0.
    fn words<S: Simd>(simd: S, row: AnyRow<'_>, words: Range<usize>, out: &mut [Self::A]);

    /// `LANES` words of one token from word `word`, bit for bit as f32; all are within the row.
    fn lanes<S: Simd>(simd: S, row: AnyRow<'_>, word: usize) -> S::F32;

    /// Writes words from f32 values, `STEP_K / A_WORDS` values to a word: `out.len()` words.
    fn words_from_f32<S: Simd>(simd: S, values: &[f32], out: &mut [Self::A]);

    /// Steps that `k` takes.
    fn steps(k: usize) -> usize {
        k.div_ceil(Self::STEP_K)
    }
}

/// Words are f32: the row widened. The same for three of the products.
#[inline(always)]
fn widen<S: Simd, T: Float>(simd: S, row: &[T], words: Range<usize>, out: &mut [f32]) {
    let from = &row[words.start.min(row.len())..words.end.min(row.len())];
    let whole = from.len() / S::LANES * S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        simd.store(&mut out[at..], T::load(simd, &from[at..]));
    }
    if whole < from.len() {
        simd.store_partial(&mut out[whole..from.len()], T::load_partial(simd, &from[whole..]));
    }
    out[from.len()..words.len()].fill(0.0);
}

#[inline(always)]
fn widen_any<S: Simd>(simd: S, row: AnyRow<'_>, words: Range<usize>, out: &mut [f32]) {
    match row {
        AnyRow::F32(row) => widen(simd, row, words, out),
        AnyRow::Bf16(row) => widen(simd, row, words, out),
        AnyRow::F16(row) => widen(simd, row, words, out),
    }
}

#[inline(always)]
fn widen_lanes<S: Simd>(simd: S, row: AnyRow<'_>, word: usize) -> S::F32 {
    match row {
        AnyRow::F32(row) => simd.load(&row[word..]),
        AnyRow::Bf16(row) => simd.load_bf16(&row[word..]),
        AnyRow::F16(row) => simd.load_f16(&row[word..]),
    }
}

/// f32 weights.
pub struct F32;

impl Product for F32 {
    type A = f32;
    type W = f32;
    const STEP_K: usize = 1;
    const A_WORDS: usize = 1;

    #[inline(always)]
    fn step<S: Simd, const M: usize>(simd: S, acc: &mut [[S::F32; 2]; M], a: &[f32], w: &[f32], output: usize) {
        let w = [simd.load(&w[output..]), simd.load(&w[output + S::LANES..])];
        add_products(simd, acc, &a[..M], w);
    }
    #[inline(always)]
    fn words<S: Simd>(simd: S, row: AnyRow<'_>, words: Range<usize>, out: &mut [f32]) {
        widen_any(simd, row, words, out);
    }
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, row: AnyRow<'_>, word: usize) -> S::F32 {
        widen_lanes(simd, row, word)
    }
    #[inline(always)]
    fn words_from_f32<S: Simd>(_: S, values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(&values[..out.len()]);
    }
}

/// `acc[i] += a[i] * w`
#[inline(always)]
fn add_products<S: Simd, const M: usize>(simd: S, acc: &mut [[S::F32; 2]; M], a: &[f32], w: [S::F32; 2]) {
    for i in 0..M {
        let a = simd.splat(a[i]);
        acc[i][0] = simd.fma(a, w[0], acc[i][0]);
        acc[i][1] = simd.fma(a, w[1], acc[i][1]);
    }
}

/// f16 weights, widened.
pub struct F16;

impl Product for F16 {
    type A = f32;
    type W = f16;
    const STEP_K: usize = 1;
    const A_WORDS: usize = 1;

    #[inline(always)]
    fn step<S: Simd, const M: usize>(simd: S, acc: &mut [[S::F32; 2]; M], a: &[f32], w: &[f16], output: usize) {
        let w = [simd.load_f16(&w[output..]), simd.load_f16(&w[output + S::LANES..])];
        add_products(simd, acc, &a[..M], w);
    }
    #[inline(always)]
    fn words<S: Simd>(simd: S, row: AnyRow<'_>, words: Range<usize>, out: &mut [f32]) {
        widen_any(simd, row, words, out);
    }
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, row: AnyRow<'_>, word: usize) -> S::F32 {
        widen_lanes(simd, row, word)
    }
    #[inline(always)]
    fn words_from_f32<S: Simd>(_: S, values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(&values[..out.len()]);
    }
}

/// bf16 weights, widened.
pub struct Bf16Wide;

impl Product for Bf16Wide {
    type A = f32;
    type W = bf16;
    const STEP_K: usize = 2;
    const A_WORDS: usize = 2;

    #[inline(always)]
    fn step<S: Simd, const M: usize>(simd: S, acc: &mut [[S::F32; 2]; M], a: &[f32], w: &[bf16], output: usize) {
        let w = [load_pairs(simd, w, output), load_pairs(simd, w, output + S::LANES)];
        add_products(simd, acc, &a[..M], [simd.even(w[0]), simd.even(w[1])]);
        add_products(simd, acc, &a[M..2 * M], [simd.odd(w[0]), simd.odd(w[1])]);
    }
    #[inline(always)]
    fn words<S: Simd>(simd: S, row: AnyRow<'_>, words: Range<usize>, out: &mut [f32]) {
        widen_any(simd, row, words, out);
    }
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, row: AnyRow<'_>, word: usize) -> S::F32 {
        widen_lanes(simd, row, word)
    }
    #[inline(always)]
    fn words_from_f32<S: Simd>(_: S, values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(&values[..out.len()]);
    }
}

/// Pairs of the outputs from `output`.
#[inline(always)]
fn load_pairs<S: Simd>(simd: S, w: &[bf16], output: usize) -> S::Pairs {
    let w = &w[2 * output..2 * (output + S::LANES)];
    // SAFETY: `w` holds `2 * LANES` values of 2 bytes, which are `LANES` words; it is aligned to 64 bytes, as all panels are,
    // because `output` is a multiple of 8.
    let words = unsafe {
        debug_assert!(w.as_ptr().cast::<u32>().is_aligned());
        std::slice::from_raw_parts(w.as_ptr().cast::<u32>(), S::LANES)
    };
    simd.load_pairs(words)
}

/// bf16 weights and activations, multiplied in pairs.
pub struct Bf16Dot;

impl Product for Bf16Dot {
    type A = u32;
    type W = bf16;
    const STEP_K: usize = 2;
    const A_WORDS: usize = 1;

    #[inline(always)]
    fn step<S: Simd, const M: usize>(simd: S, acc: &mut [[S::F32; 2]; M], a: &[u32], w: &[bf16], output: usize) {
        let w = [load_pairs(simd, w, output), load_pairs(simd, w, output + S::LANES)];
        let a = &a[..M];
        for i in 0..M {
            let a = simd.splat_pairs(a[i]);
            acc[i][0] = simd.dot_bf16(acc[i][0], a, w[0]);
            acc[i][1] = simd.dot_bf16(acc[i][1], a, w[1]);
        }
    }
    #[inline(always)]
    fn words<S: Simd>(_: S, row: AnyRow<'_>, words: Range<usize>, out: &mut [u32]) {
        let AnyRow::Bf16(row) = row else { unreachable!("pairs are made from bf16") };
        let bits: &[u16] = bytemuck::cast_slice(row);
        let from = &bits[(2 * words.start).min(bits.len())..(2 * words.end).min(bits.len())];
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let (pairs, odd) = from.as_chunks::<2>();
        for (out, [low, high]) in out.iter_mut().zip(pairs) {
            *out = pair(*low, *high);
        }
        let mut written = pairs.len();
        if let [last] = odd {
            out[written] = pair(*last, 0);
            written += 1;
        }
        out[written..words.len()].fill(0);
    }
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, row: AnyRow<'_>, word: usize) -> S::F32 {
        let AnyRow::Bf16(row) = row else { unreachable!("pairs are made from bf16") };
        simd.load_neighbours(&row[2 * word..])
    }
    #[inline(always)]
    fn words_from_f32<S: Simd>(simd: S, values: &[f32], out: &mut [u32]) {
        let mut rounded = [bf16::ZERO; PANEL];
        for at in (0..2 * out.len()).step_by(S::LANES) {
            simd.store_bf16(&mut rounded[at..], simd.load_partial(&values[at..]));
        }
        for (out, [low, high]) in out.iter_mut().zip(rounded.as_chunks::<2>().0) {
            *out = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        }
    }
}

/// Code that is generic over the product; [`with_product`] chooses it.
pub trait ProductKernel<S: Simd> {
    /// What `eval` returns.
    type Output;
    /// Runs with the product that fits weights and activations.
    fn eval<P: Product>(self, simd: S) -> Self::Output;
}

/// Runs a kernel with the product for activations and weights of these types.
#[inline(always)]
pub fn with_product<S: Simd, K: ProductKernel<S>>(simd: S, activations: Dtype, weights: Dtype, kernel: K) -> K::Output {
    match weights {
        Dtype::BF16 if S::HAS_DOT_BF16 && activations == Dtype::BF16 => kernel.eval::<Bf16Dot>(simd),
        Dtype::BF16 => kernel.eval::<Bf16Wide>(simd),
        Dtype::F16 => kernel.eval::<F16>(simd),
        // Packing takes nothing but the three types.
        Dtype::F32 | Dtype::F64 => kernel.eval::<F32>(simd),
    }
}
