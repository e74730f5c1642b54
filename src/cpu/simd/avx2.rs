//! Eight lanes in a ymm register: AVX2 with FMA and F16C.

use super::{Kernel, MAX_LANES, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof of AVX2, FMA and F16C: only [`Avx2::detect`] makes one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Avx2(());

const LANES: usize = 8;

/// A mask with the first `n` of eight lanes on is the eight words from `8 - n`.
static FIRST: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

impl Avx2 {
    /// The level, if this CPU has it. The list is that of `run`.
    pub fn detect() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }

    /// The first `n` lanes on.
    #[inline(always)]
    fn first(self, n: usize) -> __m256i {
        let words = &FIRST[LANES - n..][..LANES];
        // SAFETY: `words` holds 8 words; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
    }

    /// The upper half onto the lower, twice: two lanes are left.
    #[inline(always)]
    fn fold(self, x: __m256, f: impl Fn(__m128, __m128) -> __m128) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            let x = f(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = f(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(f(x, _mm_movehdup_ps(x)))
        }
    }
}

impl Simd for Avx2 {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 6; // 6 x 2 accumulators, 2 weight vectors and a broadcast in 16 registers
    const HAS_DOT_BF16: bool = false;
    type F32 = __m256;
    type Mask = __m256;
    type Pairs = __m256i;
    type F64 = __m256d;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn eval<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.eval(simd)
        }
        // SAFETY: `self` exists, so `detect` has seen AVX2, FMA and F16C.
        unsafe { eval(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> __m256 {
        let src = &src[..LANES];
        // SAFETY: `src` holds 8 values; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_loadu_ps(src.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, dst: &mut [f32], x: __m256) {
        let dst = &mut dst[..LANES];
        // SAFETY: `dst` holds 8 values; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_storeu_ps(dst.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> __m256 {
        let mask = self.first(src.len().min(LANES));
        // SAFETY: the mask has at most `src.len()` lanes on; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_maskload_ps(src.as_ptr(), mask) }
    }
    #[inline(always)]
    fn store_partial(self, dst: &mut [f32], x: __m256) {
        let mask = self.first(dst.len().min(LANES));
        // SAFETY: the mask has at most `dst.len()` lanes on; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_maskstore_ps(dst.as_mut_ptr(), mask, x) }
    }

    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> __m256 {
        let src = &src[..LANES];
        // SAFETY: `src` holds 8 values of 2 bytes; `self` exists, so the CPU has AVX2.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn store_bf16(self, dst: &mut [bf16], x: __m256) {
        let dst = &mut dst[..LANES];
        // SAFETY: `dst` holds 8 values of 2 bytes; `self` exists, so the CPU has AVX2.
        unsafe {
            // Nearest even: add just under half of the last kept bit, and that bit. A NaN gets its quiet bit instead.
            let bits = _mm256_castps_si256(x);
            let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let bits = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(bits, bits));
            _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> __m256 {
        let src = &src[..LANES];
        // SAFETY: `src` holds 8 values of 2 bytes; `self` exists, so the CPU has AVX2 and F16C.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, dst: &mut [f16], x: __m256) {
        let dst = &mut dst[..LANES];
        // SAFETY: `dst` holds 8 values of 2 bytes; `self` exists, so the CPU has AVX2 and F16C.
        unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn neg(self, x: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_xor_ps(x, _mm256_set1_ps(-0.0)) }
    }
    #[inline(always)]
    fn abs(self, x: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
    }
    #[inline(always)]
    fn round(self, x: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn scale_pow2(self, x: __m256, n: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            // Two factors, because 2^n alone may be out of range. The first product is exact.
            let n = _mm256_cvtps_epi32(n);
            let first = _mm256_srai_epi32::<1>(n);
            let second = _mm256_sub_epi32(n, first);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(first, bias)));
            let second = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(second, bias)));
            _mm256_mul_ps(_mm256_mul_ps(x, first), second)
        }
    }

    #[inline(always)]
    fn lt(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn le(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_cmp_ps::<_CMP_LE_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, mask: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_blendv_ps(b, a, mask) }
    }

    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        self.fold(x, |a, b| unsafe { _mm_add_ps(a, b) })
    }
    #[inline(always)]
    fn max_lane(self, x: __m256) -> f32 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        self.fold(x, |a, b| unsafe { _mm_max_ps(a, b) })
    }

    #[inline(always)]
    fn load_pairs(self, src: &[u32]) -> __m256i {
        let src = &src[..LANES];
        // SAFETY: `src` holds 8 words; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_loadu_si256(src.as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_pairs(self, pair: u32) -> __m256i {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_set1_epi32(pair as i32) }
    }
    #[inline(always)]
    fn even(self, pairs: __m256i) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)) }
    }
    #[inline(always)]
    fn odd(self, pairs: __m256i) -> __m256 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32 as i32))) }
    }

    #[inline(always)]
    fn transpose(self, rows: &[__m256; MAX_LANES], dst: &mut [f32], stride: usize) {
        assert!(stride >= LANES && dst.len() >= (LANES - 1) * stride + LANES);
        let mut quads = *rows;
        // SAFETY: `self` exists, so the CPU has AVX2; stores of 8 values start at most at `7 * stride`, asserted.
        unsafe {
            for i in [0, 4] {
                for half in 0..2 {
                    let unpack = |a, b| if half == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) };
                    let a = _mm256_castps_pd(unpack(rows[i], rows[i + 1]));
                    let b = _mm256_castps_pd(unpack(rows[i + 2], rows[i + 3]));
                    quads[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                    quads[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
                }
            }
            // `quads[i + c]` has column `c` of each 4 columns, of rows `i .. i + 4`.
            for c in 0..4 {
                let (a, b) = (quads[c], quads[4 + c]);
                _mm256_storeu_ps(dst.as_mut_ptr().add(c * stride), _mm256_permute2f128_ps::<0x20>(a, b));
                _mm256_storeu_ps(dst.as_mut_ptr().add((4 + c) * stride), _mm256_permute2f128_ps::<0x31>(a, b));
            }
        }
    }

    #[inline(always)]
    fn load_f64(self, src: &[f64]) -> __m256d {
        let src = &src[..LANES / 2];
        // SAFETY: `src` holds 4 values; `self` exists, so the CPU has AVX2.
        unsafe { _mm256_loadu_pd(src.as_ptr()) }
    }
    #[inline(always)]
    fn min_f64(self, a: __m256d, b: __m256d) -> __m256d {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_min_pd(a, b) }
    }
    #[inline(always)]
    fn max_f64(self, a: __m256d, b: __m256d) -> __m256d {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_max_pd(a, b) }
    }
    #[inline(always)]
    fn shift_f64(self, x: __m256d, by: usize) -> __m256d {
        debug_assert!(by == 1 || by == 2);
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe {
            match by {
                1 => _mm256_permute4x64_pd::<0b00_11_10_01>(x),
                _ => _mm256_permute4x64_pd::<0b01_00_11_10>(x),
            }
        }
    }
    #[inline(always)]
    fn first_f64(self, x: __m256d) -> f64 {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { _mm256_cvtsd_f64(x) }
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
