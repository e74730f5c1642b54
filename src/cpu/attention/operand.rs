//! What the two products multiply: `f32` values, or pairs of bf16 where the CPU has a dot product of them.
//!
//! A pair holds two neighbours along the summed dimension, so a product has half as many steps. Everything outside this file
//! and the choice between the two is the same code.

use crate::cpu::Float;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::element::Dtype;
use half::bf16;

/// One step of a sum of products: `f32`, or `u32` for a pair of bf16 (first one in the low half).
pub trait Operand: bytemuck::Pod + Send + Sync {
    /// Neighbours along the summed dimension in one value.
    const DEPTH: usize;
    /// `LANES` values.
    type Vector<S: Simd>: Copy;
    /// All lanes the same.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// The first `LANES` values.
    fn load<S: Simd>(simd: S, src: &[Self]) -> Self::Vector<S>;
    /// `a * b + acc`
    fn multiply_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, acc: S::F32) -> S::F32;
    /// Copies a row whose width is summed over: `ceil(src.len() / DEPTH)` values, the last one filled up with 0.
    fn pack_row<S: Simd, T: Float>(simd: S, src: &[T], dst: &mut [Self]);
    /// Copies `DEPTH` rows that are summed over, element by element; a missing row is 0.
    fn pack_rows<S: Simd, T: Float>(simd: S, src: [Option<&[T]>; 2], dst: &mut [Self]);
    /// The bits of the first `LANES` values of what [`Operand::pack_row`] makes of a row. Panics if there are fewer.
    fn load_steps<S: Simd, T: Float>(simd: S, row: &[T]) -> S::F32;
    /// The first `2 * LANES` columns of what [`Operand::pack_rows`] makes of `DEPTH` rows of one width; 0 beyond it.
    fn load_columns<S: Simd, T: Float>(simd: S, rows: [&[T]; 2]) -> [Self::Vector<S>; 2];
    /// One value of [`Operand::pack_row`].
    fn gather<T: Float>(src: &[T], step: usize) -> Self;
    /// Softmax weights of `DEPTH` keys, rounded to the type, over the scores of these keys.
    fn store_weights<S: Simd>(simd: S, weights: [S::F32; 2], dst: &mut [Self]);
}

impl Operand for f32 {
    const DEPTH: usize = 1;
    type Vector<S: Simd> = S::F32;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: f32) -> S::F32 {
        simd.splat(x)
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, src: &[f32]) -> S::F32 {
        simd.load(src)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, a: S::F32, b: S::F32, acc: S::F32) -> S::F32 {
        simd.fma(a, b, acc)
    }
    #[inline(always)]
    fn pack_row<S: Simd, T: Float>(simd: S, src: &[T], dst: &mut [f32]) {
        let dst = &mut dst[..src.len()];
        let whole = src.len() - src.len() % S::LANES;
        for (src, dst) in src.chunks_exact(S::LANES).zip(dst.chunks_exact_mut(S::LANES)) {
            simd.store(dst, T::load(simd, src));
        }
        if whole < src.len() {
            simd.store_partial(&mut dst[whole..], T::load_partial(simd, &src[whole..]));
        }
    }
    #[inline(always)]
    fn pack_rows<S: Simd, T: Float>(simd: S, src: [Option<&[T]>; 2], dst: &mut [f32]) {
        match src[0] {
            Some(src) => Self::pack_row(simd, src, dst),
            None => dst.fill(0.0),
        }
    }
    #[inline(always)]
    fn load_steps<S: Simd, T: Float>(simd: S, row: &[T]) -> S::F32 {
        T::load(simd, row)
    }
    #[inline(always)]
    fn load_columns<S: Simd, T: Float>(simd: S, rows: [&[T]; 2]) -> [S::F32; 2] {
        let row = rows[0];
        if row.len() >= 2 * S::LANES {
            [T::load(simd, row), T::load(simd, &row[S::LANES..])]
        } else {
            let (low, high) = row.split_at(row.len().min(S::LANES));
            [T::load_partial(simd, low), T::load_partial(simd, high)]
        }
    }
    #[inline(always)]
    fn gather<T: Float>(src: &[T], step: usize) -> f32 {
        src[step].to_f32()
    }
    #[inline(always)]
    fn store_weights<S: Simd>(simd: S, weights: [S::F32; 2], dst: &mut [f32]) {
        simd.store(dst, weights[0]);
    }
}

/// The 16 bits of each element of a bf16 slice.
#[inline(always)]
fn bits<T: Float>(src: &[T]) -> &[u16] {
    assert!(T::DTYPE == Dtype::BF16);
    bytemuck::cast_slice(src)
}

/// The slice as what it is.
#[inline(always)]
fn halves<T: Float>(src: &[T]) -> &[bf16] {
    assert!(T::DTYPE == Dtype::BF16);
    bytemuck::cast_slice(src)
}

#[inline(always)]
fn pair(low: u16, high: u16) -> u32 {
    low as u32 | (high as u32) << 16
}

impl Operand for u32 {
    const DEPTH: usize = 2;
    type Vector<S: Simd> = S::Pairs;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: u32) -> S::Pairs {
        simd.splat_pairs(x)
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, src: &[u32]) -> S::Pairs {
        simd.load_pairs(src)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, a: S::Pairs, b: S::Pairs, acc: S::F32) -> S::F32 {
        simd.dot_bf16(acc, a, b)
    }
    #[inline(always)]
    fn pack_row<S: Simd, T: Float>(_: S, src: &[T], dst: &mut [u32]) {
        let src = bits(src);
        let dst = &mut dst[..src.len().div_ceil(2)];
        let (pairs, rest) = src.as_chunks::<2>();
        for (dst, [low, high]) in dst.iter_mut().zip(pairs) {
            *dst = pair(*low, *high);
        }
        if let ([low], Some(dst)) = (rest, dst.last_mut()) {
            *dst = pair(*low, 0);
        }
    }
    #[inline(always)]
    fn pack_rows<S: Simd, T: Float>(_: S, src: [Option<&[T]>; 2], dst: &mut [u32]) {
        match src {
            [None, None] => dst.fill(0),
            [Some(low), None] => dst.iter_mut().zip(bits(low)).for_each(|(dst, low)| *dst = pair(*low, 0)),
            [None, Some(high)] => dst.iter_mut().zip(bits(high)).for_each(|(dst, high)| *dst = pair(0, *high)),
            [Some(low), Some(high)] => {
                for ((dst, low), high) in dst.iter_mut().zip(bits(low)).zip(bits(high)) {
                    *dst = pair(*low, *high);
                }
            }
        }
    }
    #[inline(always)]
    fn load_steps<S: Simd, T: Float>(simd: S, row: &[T]) -> S::F32 {
        simd.load_neighbours(halves(row))
    }
    #[inline(always)]
    fn load_columns<S: Simd, T: Float>(simd: S, rows: [&[T]; 2]) -> [S::Pairs; 2] {
        simd.zip_pairs(halves(rows[0]), halves(rows[1]))
    }
    #[inline(always)]
    fn gather<T: Float>(src: &[T], step: usize) -> u32 {
        let src = bits(src);
        pair(src[2 * step], src.get(2 * step + 1).copied().unwrap_or(0))
    }
    #[inline(always)]
    fn store_weights<S: Simd>(simd: S, weights: [S::F32; 2], dst: &mut [u32]) {
        simd.store_pairs(dst, weights[0], weights[1]);
    }
}

/// `columns[step][lane]` = step `step` of what [`Operand::pack_row`] makes of `rows[lane]`, for `LANES` rows of one width; a step
/// takes `stride` values.
#[inline(always)]
pub fn transpose_rows<S: Simd, T: Float, E: Operand>(simd: S, rows: &[&[T]], (columns, stride): (&mut [E], usize)) {
    let width = rows[0].len();
    let whole = width - width % (S::LANES * E::DEPTH);
    for at in (0..whole).step_by(S::LANES * E::DEPTH) {
        let vectors = load_rows::<S, T, E>(simd, rows, at);
        let dst = bytemuck::cast_slice_mut(&mut columns[at / E::DEPTH * stride..]);
        simd.transpose(&vectors, dst, stride);
    }
    if whole < width {
        let mut ends = [[T::default(); 2 * MAX_LANES]; MAX_LANES];
        for (end, row) in ends.iter_mut().zip(rows) {
            end[..width - whole].copy_from_slice(&row[whole..]);
        }
        let vectors = load_rows::<S, T, E>(simd, &ends.each_ref().map(|end| &end[..]), 0);
        let mut steps = [0.0; MAX_LANES * MAX_LANES];
        simd.transpose(&vectors, &mut steps, S::LANES);
        let dst: &mut [f32] = bytemuck::cast_slice_mut(&mut columns[whole / E::DEPTH * stride..]);
        let count = (width - whole).div_ceil(E::DEPTH);
        for (dst, step) in dst.chunks_mut(stride).zip(steps.chunks_exact(S::LANES)).take(count) {
            dst[..S::LANES].copy_from_slice(step);
        }
    }
}

/// A vector of each of `LANES` rows, from element `at` on. (A loop would have to be unrolled for the vectors to stay in
/// registers, which the compiler does not promise.)
#[inline(always)]
fn load_rows<S: Simd, T: Float, E: Operand>(simd: S, rows: &[&[T]], at: usize) -> [S::F32; MAX_LANES] {
    #[inline(always)]
    fn load<S: Simd, T: Float, E: Operand>(simd: S, row: &[T], at: usize) -> S::F32 {
        E::load_steps(simd, &row[at..])
    }
    let mut vectors = [simd.zero(); MAX_LANES];
    macro_rules! load {
        ($($i:literal)*) => {$(vectors[$i] = load::<S, T, E>(simd, rows[$i], at);)*};
    }
    load!(0 1 2 3 4 5 6 7);
    if S::LANES == 16 {
        load!(8 9 10 11 12 13 14 15);
    }
    vectors
}
