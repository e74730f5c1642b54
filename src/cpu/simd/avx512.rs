//! Sixteen lanes in a zmm register: AVX-512 F, BW, VL and DQ, and the same with BF16 and VNNI.
//!
//! The two levels differ in one method, [`Simd::dot_bf16`], so they share one implementation with a constant.

use super::{Kernel, MAX_LANES, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof of AVX-512 F/BW/VL/DQ, AVX2, FMA and F16C, and with `BF16` of AVX512-BF16 and VNNI: only `detect` makes one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WithZmm<const BF16: bool>(());

/// AVX-512 without bf16 arithmetic.
pub type Avx512 = WithZmm<false>;
/// AVX-512 with bf16 arithmetic (`vdpbf16ps`).
pub type Avx512Bf16 = WithZmm<true>;

const LANES: usize = 16;

/// Word `2 i` comes from word `i` of the lower half, word `2 i + 1` from word `i` of the upper half.
static INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Words of two vectors in turns: `i` from the first, `32 + i` from the second, for the lower and the upper half of `i`.
static ZIP: [[u16; 32]; 2] = {
    let mut order = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        order[i / 32][i % 32] = (i / 2 + i % 2 * 32) as u16;
        i += 1;
    }
    order
};

impl<const BF16: bool> WithZmm<BF16> {
    /// The level, if this CPU has it. The list is that of `run`.
    pub fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let bf16 = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
        (base && (bf16 || !BF16)).then_some(WithZmm(()))
    }

    /// The first `n` lanes on, all of them for more.
    #[inline(always)]
    fn first(n: usize) -> __mmask16 {
        if n >= LANES { !0 } else { (1 << n) - 1 }
    }

    /// The upper half onto the lower, until one lane is left.
    #[inline(always)]
    fn fold(self, x: __m512, f256: impl Fn(__m256, __m256) -> __m256, f: impl Fn(__m128, __m128) -> __m128) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F and DQ.
        unsafe {
            let x = f256(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = f(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = f(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(f(x, _mm_movehdup_ps(x)))
        }
    }

    /// bf16 bits of each lane, to nearest even; a NaN gets its quiet bit. (`vcvtneps2bf16` would flush subnormals.)
    #[inline(always)]
    fn round_bf16(self, x: __m512) -> __m256i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let bits = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x0040_0000));
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits))
        }
    }

    /// The first `min(32, len)` values, the rest 0.
    #[inline(always)]
    fn load_halves(self, src: &[bf16]) -> __m512i {
        if src.len() >= 2 * LANES {
            // SAFETY: `src` holds 32 values of 2 bytes; `self` exists, so the CPU has AVX-512 F.
            unsafe { _mm512_loadu_si512(src.as_ptr().cast()) }
        } else {
            // SAFETY: the mask has `src.len() < 32` lanes on; `self` exists, so the CPU has AVX-512 BW.
            unsafe { _mm512_maskz_loadu_epi16((1 << src.len()) - 1, src.as_ptr().cast()) }
        }
    }

    /// 16 bf16 values as `f32`.
    #[inline(always)]
    fn widen_bf16(self, bits: __m256i) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) }
    }
}

impl<const BF16: bool> Simd for WithZmm<BF16> {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 12; // 12 x 2 accumulators, 2 to 4 weight vectors and a broadcast in 32 registers
    const HAS_DOT_BF16: bool = BF16;
    type F32 = __m512;
    type Mask = __mmask16;
    type Pairs = __m512i;
    type F64 = __m512d;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn eval<K: Kernel, const BF16: bool>(simd: WithZmm<BF16>, kernel: K) -> K::Output {
            kernel.eval(simd)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,avx512vnni")]
        fn eval_bf16<K: Kernel, const BF16: bool>(simd: WithZmm<BF16>, kernel: K) -> K::Output {
            kernel.eval(simd)
        }
        // SAFETY: `self` exists, so `detect` has seen the features of the first list, and with `BF16` those of the second.
        unsafe { if BF16 { eval_bf16(self, kernel) } else { eval(self, kernel) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> __m512 {
        let src = &src[..LANES];
        // SAFETY: `src` holds 16 values; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_loadu_ps(src.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, dst: &mut [f32], x: __m512) {
        let dst = &mut dst[..LANES];
        // SAFETY: `dst` holds 16 values; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> __m512 {
        // SAFETY: the mask has at most `src.len()` lanes on; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_maskz_loadu_ps(Self::first(src.len()), src.as_ptr()) }
    }
    #[inline(always)]
    fn store_partial(self, dst: &mut [f32], x: __m512) {
        // SAFETY: the mask has at most `dst.len()` lanes on; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_mask_storeu_ps(dst.as_mut_ptr(), Self::first(dst.len()), x) }
    }

    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> __m512 {
        let src = &src[..LANES];
        // SAFETY: `src` holds 16 values of 2 bytes; `self` exists, so the CPU has AVX-512 F.
        self.widen_bf16(unsafe { _mm256_loadu_si256(src.as_ptr().cast()) })
    }
    #[inline(always)]
    fn store_bf16(self, dst: &mut [bf16], x: __m512) {
        let dst = &mut dst[..LANES];
        // SAFETY: `dst` holds 16 values of 2 bytes; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), self.round_bf16(x)) }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> __m512 {
        let src = &src[..LANES];
        // SAFETY: `src` holds 16 values of 2 bytes; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, dst: &mut [f16], x: __m512) {
        let dst = &mut dst[..LANES];
        // SAFETY: `dst` holds 16 values of 2 bytes; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn load_partial_bf16(self, src: &[bf16]) -> __m512 {
        // SAFETY: the mask has at most `src.len()` lanes on; `self` exists, so the CPU has AVX-512 BW and VL.
        self.widen_bf16(unsafe { _mm256_maskz_loadu_epi16(Self::first(src.len()), src.as_ptr().cast()) })
    }
    #[inline(always)]
    fn store_partial_bf16(self, dst: &mut [bf16], x: __m512) {
        let mask = Self::first(dst.len());
        // SAFETY: the mask has at most `dst.len()` lanes on; `self` exists, so the CPU has AVX-512 BW and VL.
        unsafe { _mm256_mask_storeu_epi16(dst.as_mut_ptr().cast(), mask, self.round_bf16(x)) }
    }
    #[inline(always)]
    fn load_partial_f16(self, src: &[f16]) -> __m512 {
        // SAFETY: the mask has at most `src.len()` lanes on; `self` exists, so the CPU has AVX-512 BW and VL.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Self::first(src.len()), src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_partial_f16(self, dst: &mut [f16], x: __m512) {
        let mask = Self::first(dst.len());
        // SAFETY: the mask has at most `dst.len()` lanes on; `self` exists, so the CPU has AVX-512 BW and VL.
        unsafe {
            _mm256_mask_storeu_epi16(dst.as_mut_ptr().cast(), mask, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn neg(self, x: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 DQ.
        unsafe { _mm512_xor_ps(x, _mm512_set1_ps(-0.0)) }
    }
    #[inline(always)]
    fn abs(self, x: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 DQ.
        unsafe { _mm512_andnot_ps(_mm512_set1_ps(-0.0), x) }
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn scale_pow2(self, x: __m512, n: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_scalef_ps(x, n) }
    }

    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn le(self, a: __m512, b: __m512) -> __mmask16 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_mask_blend_ps(mask, b, a) }
    }

    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        self.fold(x, |a, b| unsafe { _mm256_add_ps(a, b) }, |a, b| unsafe { _mm_add_ps(a, b) })
    }
    #[inline(always)]
    fn max_lane(self, x: __m512) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        self.fold(x, |a, b| unsafe { _mm256_max_ps(a, b) }, |a, b| unsafe { _mm_max_ps(a, b) })
    }

    #[inline(always)]
    fn load_pairs(self, src: &[u32]) -> __m512i {
        let src = &src[..LANES];
        // SAFETY: `src` holds 16 words; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_loadu_si512(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_pairs(self, pair: u32) -> __m512i {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_set1_epi32(pair as i32) }
    }
    #[inline(always)]
    fn store_pairs(self, dst: &mut [u32], even: __m512, odd: __m512) {
        let dst = &mut dst[..LANES];
        if BF16 {
            // SAFETY: `self` exists with `BF16`, so the CPU has AVX512-BF16 and BW; both types are 512 plain bits; `dst` holds
            // 16 words.
            unsafe {
                let halves = _mm512_cvtne2ps_pbh(odd, even); // even values in the lower half
                let halves = std::mem::transmute::<__m512bh, __m512i>(halves);
                let order = _mm512_loadu_si512(INTERLEAVE.as_ptr().cast());
                _mm512_storeu_si512(dst.as_mut_ptr().cast(), _mm512_permutexvar_epi16(order, halves));
            }
        } else {
            // SAFETY: `self` exists, so the CPU has AVX-512 F; `dst` holds 16 words.
            unsafe {
                let low = _mm512_cvtepu16_epi32(self.round_bf16(even));
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(self.round_bf16(odd)));
                _mm512_storeu_si512(dst.as_mut_ptr().cast(), _mm512_or_si512(low, high));
            }
        }
    }
    #[inline(always)]
    fn even(self, pairs: __m512i) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)) }
    }
    #[inline(always)]
    fn odd(self, pairs: __m512i) -> __m512 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32))) }
    }
    #[inline(always)]
    fn dot_bf16(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        if BF16 {
            // SAFETY: `self` exists with `BF16`, so the CPU has AVX512-BF16; both types are 512 plain bits.
            unsafe {
                let (a, b) = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
                _mm512_dpbf16_ps(acc, a, b)
            }
        } else {
            let acc = self.fma(self.odd(a), self.odd(b), acc);
            self.fma(self.even(a), self.even(b), acc)
        }
    }

    #[inline(always)]
    fn load_neighbours(self, src: &[bf16]) -> __m512 {
        let src = &src[..2 * LANES];
        // SAFETY: `src` holds 32 values of 2 bytes; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_castsi512_ps(_mm512_loadu_si512(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn zip_pairs(self, even: &[bf16], odd: &[bf16]) -> [__m512i; 2] {
        let (even, odd) = (self.load_halves(even), self.load_halves(odd));
        // SAFETY: `self` exists, so the CPU has AVX-512 F and BW; each order has 32 words. (A closure in `map` might not be
        // inlined.)
        unsafe {
            let orders = [_mm512_loadu_si512(ZIP[0].as_ptr().cast()), _mm512_loadu_si512(ZIP[1].as_ptr().cast())];
            [_mm512_permutex2var_epi16(even, orders[0], odd), _mm512_permutex2var_epi16(even, orders[1], odd)]
        }
    }
    #[inline(always)]
    fn transpose(self, rows: &[__m512; MAX_LANES], dst: &mut [f32], stride: usize) {
        assert!(stride >= LANES && dst.len() >= (LANES - 1) * stride + LANES);
        let (mut pairs, mut quads) = (*rows, *rows);
        // SAFETY: `self` exists, so the CPU has AVX-512 F and DQ; stores of 16 values start at most at `15 * stride`, asserted.
        unsafe {
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            for i in 0..8 {
                let (a, b) = (pairs[i / 2 * 4 + i % 2], pairs[i / 2 * 4 + i % 2 + 2]);
                let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
                quads[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                quads[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
            // `quads[4 i + c]` has column `c` of each 4 columns, of rows `4 i .. 4 i + 4`.
            for c in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x44>(quads[c], quads[4 + c]);
                let high = _mm512_shuffle_f32x4::<0xee>(quads[c], quads[4 + c]);
                let low_2 = _mm512_shuffle_f32x4::<0x44>(quads[8 + c], quads[12 + c]);
                let high_2 = _mm512_shuffle_f32x4::<0xee>(quads[8 + c], quads[12 + c]);
                let dst = dst.as_mut_ptr();
                _mm512_storeu_ps(dst.add(c * stride), _mm512_shuffle_f32x4::<0x88>(low, low_2));
                _mm512_storeu_ps(dst.add((4 + c) * stride), _mm512_shuffle_f32x4::<0xdd>(low, low_2));
                _mm512_storeu_ps(dst.add((8 + c) * stride), _mm512_shuffle_f32x4::<0x88>(high, high_2));
                _mm512_storeu_ps(dst.add((12 + c) * stride), _mm512_shuffle_f32x4::<0xdd>(high, high_2));
            }
        }
    }

    #[inline(always)]
    fn load_f64(self, src: &[f64]) -> __m512d {
        let src = &src[..LANES / 2];
        // SAFETY: `src` holds 8 values; `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_loadu_pd(src.as_ptr()) }
    }
    #[inline(always)]
    fn min_f64(self, a: __m512d, b: __m512d) -> __m512d {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_min_pd(a, b) }
    }
    #[inline(always)]
    fn max_f64(self, a: __m512d, b: __m512d) -> __m512d {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_max_pd(a, b) }
    }
    #[inline(always)]
    fn shift_f64(self, x: __m512d, by: usize) -> __m512d {
        debug_assert!(matches!(by, 1 | 2 | 4));
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe {
            let bits = _mm512_castpd_si512(x);
            _mm512_castsi512_pd(match by {
                1 => _mm512_alignr_epi64::<1>(bits, bits),
                2 => _mm512_alignr_epi64::<2>(bits, bits),
                _ => _mm512_alignr_epi64::<4>(bits, bits),
            })
        }
    }
    #[inline(always)]
    fn first_f64(self, x: __m512d) -> f64 {
        // SAFETY: `self` exists, so the CPU has AVX-512 F.
        unsafe { _mm512_cvtsd_f64(x) }
    }

    #[inline(always)]
    fn prefetch<T>(self, at: *const T) {
        // SAFETY: a prefetch reads nothing and faults on no address; every x86-64 CPU has SSE.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_l2<T>(self, at: *const T) {
        // SAFETY: a prefetch reads nothing and faults on no address; every x86-64 CPU has SSE.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}
