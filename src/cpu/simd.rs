//! Vectors of `f32` behind one trait. A value of a [`Simd`] type is proof that the CPU has its instructions.
//!
//! Every method is `#[inline(always)]`, so that it ends up inside the `#[target_feature]` function of [`Simd::run`]; code
//! above it is generic over `S: Simd`, `#[inline(always)]` too, and reached through a [`Kernel`]. A closure given to another
//! thread starts without the features: it calls `simd.run(kernel)` again.

pub mod portable;

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;

use half::{bf16, f16};

/// Code that runs at a level chosen at run time. `eval` is `#[inline(always)]`, and so is what it calls.
pub trait Kernel {
    /// What `eval` returns.
    type Output;
    /// Runs with the instructions of `S`.
    fn eval<S: Simd>(self, simd: S) -> Self::Output;
}

/// The most lanes that any level has.
pub const MAX_LANES: usize = 16;

/// Vectors of `f32` and conversions. Methods that take slices panic (or use part of the slice) as their name says; none
/// reads or writes outside.
pub trait Simd: Copy + Send + Sync + 'static {
    /// `f32` values in a vector.
    const LANES: usize;
    /// Tokens in the largest register tile of the GEMM (see `gemm`): what the register file holds.
    const TILE_TOKENS: usize;
    /// [`Simd::dot_bf16`] is one instruction, fast and with its rounding.
    const HAS_DOT_BF16: bool;
    /// `LANES` values.
    type F32: Copy;
    /// One truth value for each lane.
    type Mask: Copy;
    /// `LANES` pairs of bf16: the even element in the low half of each 32 bits.
    type Pairs: Copy;
    /// `LANES / 2` values of `f64`.
    type F64: Copy;

    /// Runs a kernel compiled for these instructions.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    /// All lanes the same.
    fn splat(self, x: f32) -> Self::F32;
    /// The first `LANES` values. Panics if there are fewer.
    fn load(self, src: &[f32]) -> Self::F32;
    /// Writes the first `LANES` values. Panics if there is room for fewer.
    fn store(self, dst: &mut [f32], x: Self::F32);
    /// The first `min(LANES, len)` values; the other lanes are 0.
    fn load_partial(self, src: &[f32]) -> Self::F32;
    /// Writes the first `min(LANES, len)` values.
    fn store_partial(self, dst: &mut [f32], x: Self::F32);

    /// The first `LANES` values, widened exactly. Panics if there are fewer.
    fn load_bf16(self, src: &[bf16]) -> Self::F32;
    /// Rounds to nearest even (NaN stays NaN, subnormals stay) and writes. Panics if there is room for fewer than `LANES`.
    fn store_bf16(self, dst: &mut [bf16], x: Self::F32);
    /// The first `LANES` values, widened exactly. Panics if there are fewer.
    fn load_f16(self, src: &[f16]) -> Self::F32;
    /// Rounds to nearest even (NaN stays NaN, subnormals stay) and writes. Panics if there is room for fewer than `LANES`.
    fn store_f16(self, dst: &mut [f16], x: Self::F32);

    /// The first `min(LANES, len)` values, widened; the other lanes are 0.
    #[inline(always)]
    fn load_partial_bf16(self, src: &[bf16]) -> Self::F32 {
        let mut all = [bf16::ZERO; MAX_LANES];
        let n = src.len().min(Self::LANES);
        all[..n].copy_from_slice(&src[..n]);
        self.load_bf16(&all)
    }
    /// Rounds and writes the first `min(LANES, len)` values.
    #[inline(always)]
    fn store_partial_bf16(self, dst: &mut [bf16], x: Self::F32) {
        let mut all = [bf16::ZERO; MAX_LANES];
        self.store_bf16(&mut all, x);
        let n = dst.len().min(Self::LANES);
        dst[..n].copy_from_slice(&all[..n]);
    }
    /// The first `min(LANES, len)` values, widened; the other lanes are 0.
    #[inline(always)]
    fn load_partial_f16(self, src: &[f16]) -> Self::F32 {
        let mut all = [f16::ZERO; MAX_LANES];
        let n = src.len().min(Self::LANES);
        all[..n].copy_from_slice(&src[..n]);
        self.load_f16(&all)
    }
    /// Rounds and writes the first `min(LANES, len)` values.
    #[inline(always)]
    fn store_partial_f16(self, dst: &mut [f16], x: Self::F32) {
        let mut all = [f16::ZERO; MAX_LANES];
        self.store_f16(&mut all, x);
        let n = dst.len().min(Self::LANES);
        dst[..n].copy_from_slice(&all[..n]);
    }

    /// `a + b`
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the CPU can, else twice.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a < b ? a : b`: `b` if either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a > b ? a : b`: `b` if either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `-x`: the sign bit flipped.
    fn neg(self, x: Self::F32) -> Self::F32;
    /// `|x|`: the sign bit cleared.
    fn abs(self, x: Self::F32) -> Self::F32;
    /// Nearest integer, ties to even.
    fn round(self, x: Self::F32) -> Self::F32;
    /// `x * 2^n`, rounded once, for integers `n` in `[-252, 254]` and `|x|` in `[0.5, 2]` or NaN.
    fn scale_pow2(self, x: Self::F32, n: Self::F32) -> Self::F32;

    /// `a < b`, false for NaN.
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a <= b`, false for NaN.
    fn le(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a` where the mask is true, else `b`.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;

    /// Sum of all lanes: the upper half onto the lower, until one is left.
    fn sum(self, x: Self::F32) -> f32;
    /// Largest lane by the rule of [`Simd::max`], in the order of [`Simd::sum`]; NaN lanes make it unspecified.
    fn max_lane(self, x: Self::F32) -> f32;

    /// The first `LANES` pairs. Panics if there are fewer.
    fn load_pairs(self, src: &[u32]) -> Self::Pairs;
    /// All pairs the same.
    fn splat_pairs(self, pair: u32) -> Self::Pairs;
    /// Rounds to nearest even (NaN stays NaN) and writes `LANES` pairs. Where [`Simd::dot_bf16`] is one instruction, subnormal
    /// values count as zero here too. Panics if there is room for fewer.
    #[inline(always)]
    fn store_pairs(self, dst: &mut [u32], even: Self::F32, odd: Self::F32) {
        let (mut low, mut high) = ([bf16::ZERO; MAX_LANES], [bf16::ZERO; MAX_LANES]);
        self.store_bf16(&mut low, even);
        self.store_bf16(&mut high, odd);
        for (dst, (low, high)) in dst[..Self::LANES].iter_mut().zip(low.iter().zip(&high)) {
            *dst = low.to_bits() as u32 | (high.to_bits() as u32) << 16;
        }
    }
    /// The low (even) elements, widened.
    fn even(self, pairs: Self::Pairs) -> Self::F32;
    /// The high (odd) elements, widened.
    fn odd(self, pairs: Self::Pairs) -> Self::F32;
    /// `acc + a.odd * b.odd + a.even * b.even` in each lane. Where it is one instruction (`HAS_DOT_BF16`), subnormal inputs
    /// and results count as zero.
    #[inline(always)]
    fn dot_bf16(self, acc: Self::F32, a: Self::Pairs, b: Self::Pairs) -> Self::F32 {
        let acc = self.fma(self.odd(a), self.odd(b), acc);
        self.fma(self.even(a), self.even(b), acc)
    }

    /// The bits of the first `LANES` pairs of neighbours. Panics if there are fewer.
    #[inline(always)]
    fn load_neighbours(self, src: &[bf16]) -> Self::F32 {
        let mut all = [0.0; MAX_LANES];
        for (all, pair) in all.iter_mut().zip(src[..2 * Self::LANES].chunks_exact(2)) {
            *all = f32::from_bits(pair[0].to_bits() as u32 | (pair[1].to_bits() as u32) << 16);
        }
        self.load(&all)
    }
    /// Pairs of the values at the same place of two slices of one length, `2 * LANES` of them; beyond the end they are 0.
    #[inline(always)]
    fn zip_pairs(self, even: &[bf16], odd: &[bf16]) -> [Self::Pairs; 2] {
        let mut all = [0; 2 * MAX_LANES];
        for (all, (even, odd)) in all.iter_mut().zip(even.iter().zip(odd)) {
            *all = even.to_bits() as u32 | (odd.to_bits() as u32) << 16;
        }
        [self.load_pairs(&all), self.load_pairs(&all[Self::LANES..])]
    }
    /// `dst[i * stride + j]` = lane `i` of `rows[j]`, bit for bit, for `i` and `j` below `LANES`. Panics if there is no room.
    #[inline(always)]
    fn transpose(self, rows: &[Self::F32; MAX_LANES], dst: &mut [f32], stride: usize) {
        for j in 0..Self::LANES {
            let mut row = [0.0; MAX_LANES];
            self.store(&mut row, rows[j]);
            for i in 0..Self::LANES {
                dst[i * stride + j] = row[i];
            }
        }
    }

    /// The first `LANES / 2` values. Panics if there are fewer.
    fn load_f64(self, src: &[f64]) -> Self::F64;
    /// `a < b ? a : b`: `b` if either is NaN.
    fn min_f64(self, a: Self::F64, b: Self::F64) -> Self::F64;
    /// `a > b ? a : b`: `b` if either is NaN.
    fn max_f64(self, a: Self::F64, b: Self::F64) -> Self::F64;
    /// Lane `i` gets lane `i + by`, for `by` of 1, 2 or 4 below `LANES / 2`; the last `by` lanes are unspecified.
    fn shift_f64(self, x: Self::F64, by: usize) -> Self::F64;
    /// Lane 0.
    fn first_f64(self, x: Self::F64) -> f64;

    /// Asks for the cache line at an address, which need not be valid.
    fn prefetch<T>(self, at: *const T);
    /// [`Simd::prefetch`] no further than into the second level cache.
    fn prefetch_l2<T>(self, at: *const T);

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::level::{Level, dispatch};

    /// Awkward values: signed zeros, subnormals of f32, bf16 and f16, halfway cases, infinities, NaN.
    fn values() -> Vec<f32> {
        let mut all = vec![
            0.0,
            -0.0,
            1.0,
            -1.5,
            1e-45,
            -1e-40,
            6e-8,
            3e-5,
            65504.0,
            65519.9,
            65520.0,
            3.39e38,
            -3.4e38,
            1e20,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
            1.0 + 1.0 / 2048.0,
            1.0 + 3.0 / 2048.0,
        ];
        let mut state = 1u32;
        while all.len() < 16 * 64 {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            all.push(f32::from_bits(state));
        }
        all
    }

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    struct Conversions<'a>(&'a [f32]);
    impl Kernel for Conversions<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            for chunk in self.0.chunks_exact(S::LANES) {
                let x = simd.load(chunk);
                let (mut b, mut h, mut f) = ([bf16::ONE; 16], [f16::ONE; 16], [7.0f32; 16]);
                simd.store_bf16(&mut b, x);
                simd.store_f16(&mut h, x);
                for i in 0..S::LANES {
                    assert_eq!(b[i].to_bits(), bf16::from_f32(chunk[i]).to_bits(), "bf16 of {:e}", chunk[i]);
                    let want = f16::from_f32(chunk[i]);
                    assert!(
                        h[i].to_bits() == want.to_bits() || (want.is_nan() && h[i].is_nan()),
                        "f16 of {:e}",
                        chunk[i]
                    );
                }
                simd.store(&mut f, simd.load_bf16(&b));
                assert!((0..S::LANES).all(|i| same(f[i], b[i].to_f32())));
                simd.store(&mut f, simd.load_f16(&h));
                assert!((0..S::LANES).all(|i| same(f[i], h[i].to_f32())));
                assert!(f[S::LANES..].iter().all(|f| *f == 7.0));
                for n in 0..=S::LANES {
                    let mut out = [7.0f32; 16];
                    simd.store_partial(&mut out[..n], x);
                    assert!((0..16).all(|i| same(out[i], if i < n { chunk[i] } else { 7.0 })));
                    simd.store(&mut out, simd.load_partial(&chunk[..n]));
                    assert!((0..S::LANES).all(|i| same(out[i], if i < n { chunk[i] } else { 0.0 })));
                    let mut out = [bf16::ONE; 16];
                    simd.store_partial_bf16(&mut out[..n], x);
                    assert!((0..16).all(|i| out[i].to_bits() == if i < n { b[i].to_bits() } else { 0x3f80 }));
                    simd.store(&mut f, simd.load_partial_bf16(&b[..n]));
                    assert!((0..S::LANES).all(|i| same(f[i], if i < n { b[i].to_f32() } else { 0.0 })));
                    let mut out = [f16::ONE; 16];
                    simd.store_partial_f16(&mut out[..n], x);
                    assert!((0..16).all(|i| out[i].to_bits() == if i < n { h[i].to_bits() } else { 0x3c00 }));
                    simd.store(&mut f, simd.load_partial_f16(&h[..n]));
                    assert!((0..S::LANES).all(|i| same(f[i], if i < n { h[i].to_f32() } else { 0.0 })));
                }
            }
        }
    }

    #[test]
    fn conversions_match_half() {
        for level in Level::available() {
            dispatch(level, Conversions(&values()));
        }
    }

    struct Lanewise<'a>(&'a [f32]);
    impl Kernel for Lanewise<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            let get = |x: S::F32| {
                let mut out = [0.0f32; MAX_LANES];
                simd.store(&mut out, x);
                out
            };
            for (a, b) in self.0.chunks_exact(S::LANES).zip(self.0[1..].chunks_exact(S::LANES)) {
                let (x, y) = (simd.load(a), simd.load(b));
                let got = [
                    simd.add(x, y),
                    simd.sub(x, y),
                    simd.mul(x, y),
                    simd.div(x, y),
                    simd.min(x, y),
                    simd.max(x, y),
                    simd.neg(x),
                    simd.abs(x),
                    simd.round(x),
                    simd.select(simd.lt(x, y), x, y),
                    simd.select(simd.le(x, y), y, x),
                    simd.fma(x, y, simd.zero()),
                ]
                .map(get);
                for i in 0..S::LANES {
                    let (a, b) = (a[i], b[i]);
                    let want = [
                        a + b,
                        a - b,
                        a * b,
                        a / b,
                        if a < b { a } else { b },
                        if a > b { a } else { b },
                        -a,
                        a.abs(),
                        a.round_ties_even(),
                        if a < b { a } else { b },
                        if a <= b { b } else { a },
                        a * b + 0.0,
                    ];
                    for (op, want) in want.into_iter().enumerate() {
                        // One rounding or two: the sign of a product that underflows may differ.
                        let equal = same(got[op][i], want) || (op == 11 && got[op][i] == want);
                        assert!(equal, "op {op} of {a:e}, {b:e}: {:e}, expected {want:e}", got[op][i]);
                    }
                }
            }
            let ramp: Vec<f64> = (0..S::LANES).map(|i| i as f64 - 1.0).collect();
            let x = simd.load_f64(&ramp);
            assert_eq!(simd.first_f64(x), -1.0);
            for by in [1, 2, 4].into_iter().filter(|by| *by < S::LANES / 2) {
                let y = simd.shift_f64(x, by);
                assert_eq!(simd.first_f64(y), by as f64 - 1.0);
                if by > 1 {
                    assert_eq!(simd.first_f64(simd.shift_f64(simd.shift_f64(x, by / 2), by / 2)), by as f64 - 1.0);
                }
                assert_eq!(simd.first_f64(simd.min_f64(x, y)), -1.0);
                assert_eq!(simd.first_f64(simd.max_f64(x, y)), by as f64 - 1.0);
            }
            let ramp: Vec<f32> = (0..S::LANES).map(|i| i as f32).collect();
            let n = S::LANES as f32;
            assert_eq!(simd.sum(simd.load(&ramp)), n * (n - 1.0) / 2.0);
            assert_eq!(simd.max_lane(simd.load(&ramp)), n - 1.0);
            assert_eq!(simd.max_lane(simd.neg(simd.load(&ramp))), 0.0);
            for n in -252..=254 {
                let want = (1.25f64 * 2f64.powi(n)) as f32;
                assert!(
                    same(get(simd.scale_pow2(simd.splat(1.25), simd.splat(n as f32)))[S::LANES - 1], want),
                    "2^{n}"
                );
            }
            let pairs: Vec<u32> = (0..S::LANES as u32).map(|i| (0x4000 + i) << 16 | (0x3f80 + i)).collect();
            let p = simd.load_pairs(&pairs);
            let (even, odd) = (get(simd.even(p)), get(simd.odd(p)));
            let dot = get(simd.dot_bf16(simd.splat(0.5), p, simd.splat_pairs(0x4080_3f80)));
            for i in 0..S::LANES {
                assert_eq!(even[i], bf16::from_bits(0x3f80 + i as u16).to_f32());
                assert_eq!(odd[i], bf16::from_bits(0x4000 + i as u16).to_f32());
                assert_eq!(dot[i], 0.5 + 4.0 * odd[i] + even[i]);
            }
            let halves: Vec<bf16> = (1..=4 * S::LANES as u16).map(bf16::from_bits).collect();
            for n in 0..=2 * S::LANES {
                let (low, high) = (&halves[..n], &halves[2 * S::LANES..][..n]);
                let bits = |half: Option<&bf16>| half.map_or(0, |half| half.to_bits() as u32);
                if n == 2 * S::LANES {
                    let got = get(simd.load_neighbours(low));
                    for i in 0..S::LANES {
                        assert_eq!(got[i].to_bits(), bits(low.get(2 * i)) | bits(low.get(2 * i + 1)) << 16);
                    }
                }
                let got = simd.zip_pairs(low, high).map(|pairs| (get(simd.even(pairs)), get(simd.odd(pairs))));
                for i in 0..2 * S::LANES {
                    let (even, odd) = (got[i / S::LANES].0[i % S::LANES], got[i / S::LANES].1[i % S::LANES]);
                    assert_eq!((even.to_bits() >> 16, odd.to_bits() >> 16), (bits(low.get(i)), bits(high.get(i))));
                }
            }
            let mut rows = [simd.zero(); MAX_LANES];
            for j in 0..S::LANES {
                rows[j] = simd.load(&self.0[j * S::LANES..]);
            }
            let mut transposed = [7.0; 20 * MAX_LANES];
            simd.transpose(&rows, &mut transposed, 20);
            for (at, value) in transposed.iter().enumerate() {
                let inside = at / 20 < S::LANES && at % 20 < S::LANES;
                let want = if inside { self.0[at % 20 * S::LANES + at / 20] } else { 7.0 };
                assert_eq!(value.to_bits(), want.to_bits());
            }
            for (a, b) in self.0.chunks_exact(S::LANES).zip(self.0[1..].chunks_exact(S::LANES)) {
                let mut pairs = [7u32; MAX_LANES];
                simd.store_pairs(&mut pairs, simd.load(a), simd.load(b));
                for i in 0..S::LANES {
                    for (x, got) in [(a[i], pairs[i] as u16), (b[i], (pairs[i] >> 16) as u16)] {
                        let (want, got) = (bf16::from_f32(x), bf16::from_bits(got));
                        let flushed = x.abs() < f32::MIN_POSITIVE && got.to_f32() == 0.0;
                        assert!(got.to_bits() == want.to_bits() || flushed || (x.is_nan() && got.is_nan()), "{x:e}");
                    }
                }
                assert!(pairs[S::LANES..].iter().all(|pair| *pair == 7));
            }
        }
    }

    #[test]
    fn lanewise_operations_match_scalar_ones() {
        for level in Level::available() {
            dispatch(level, Lanewise(&values()));
        }
    }
}
