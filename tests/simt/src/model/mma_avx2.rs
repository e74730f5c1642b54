//! One fused step of eight columns in AVX2: the same integers as `fused_step`, which the tests compare it to.

use std::arch::x86_64::{
    __m256d, __m256i, _CMP_LT_OQ, _CMP_NEQ_OQ, _mm_cvtsi32_si128, _mm_storeu_ps, _mm256_abs_epi32, _mm256_add_epi32,
    _mm256_add_pd, _mm256_and_pd, _mm256_andnot_pd, _mm256_castsi256_pd, _mm256_castsi256_si128, _mm256_cmp_pd,
    _mm256_cvtepi32_epi64, _mm256_cvtepi32_pd, _mm256_cvtpd_ps, _mm256_extracti128_si256, _mm256_loadu_si256,
    _mm256_max_epi32, _mm256_min_epi32, _mm256_movemask_pd, _mm256_mul_pd, _mm256_mullo_epi32, _mm256_or_pd,
    _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_pd, _mm256_setzero_pd, _mm256_setzero_si256, _mm256_sign_epi32,
    _mm256_sll_epi32, _mm256_slli_epi64, _mm256_srlv_epi32, _mm256_storeu_pd, _mm256_sub_epi32,
};

use super::{Accumulator, LANES, SAFE_TERMS, Spec, Term, Widths, acc_format, round_results, round_subnormals, split};

#[inline]
#[target_feature(enable = "avx2")]
fn load(x: &[i32; LANES]) -> __m256i {
    // SAFETY: `x` holds 32 bytes; the load takes any alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

/// The two halves of eight integers as f64.
#[inline]
#[target_feature(enable = "avx2")]
fn wide(x: __m256i) -> [__m256d; 2] {
    [_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)), _mm256_cvtepi32_pd(_mm256_extracti128_si256::<1>(x))]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fused_step(
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
    let (c_mantissa, c_exp) = (load(&c_mantissa), load(&c_exp));
    let mut largest = c_exp;
    for (a, exp) in a.iter().zip(b_exp) {
        largest = _mm256_max_epi32(largest, _mm256_add_epi32(_mm256_set1_epi32(a.exp), load(exp)));
    }
    let limit = _mm256_set1_epi32(31);
    let up = _mm_cvtsi32_si128(shift_up as i32);
    let mut total = [_mm256_setzero_pd(); 2];
    for ((a, b), exp) in a.chunks(SAFE_TERMS).zip(b.chunks(SAFE_TERMS)).zip(b_exp.chunks(SAFE_TERMS)) {
        let mut part = _mm256_setzero_si256();
        for ((a, b), exp) in a.iter().zip(b).zip(exp) {
            let product = _mm256_mullo_epi32(_mm256_set1_epi32(a.mantissa), load(b));
            let behind = _mm256_sub_epi32(largest, _mm256_add_epi32(_mm256_set1_epi32(a.exp), load(exp)));
            let magnitude = _mm256_sll_epi32(_mm256_abs_epi32(product), up);
            let kept = _mm256_srlv_epi32(magnitude, _mm256_min_epi32(behind, limit));
            part = _mm256_add_epi32(part, _mm256_sign_epi32(kept, product));
        }
        for (total, part) in total.iter_mut().zip(wide(part)) {
            *total = _mm256_add_pd(*total, part);
        }
    }
    let shift = widths.fraction as i32 - format_c.frac_bits as i32;
    let magnitude = _mm256_sll_epi32(_mm256_abs_epi32(c_mantissa), _mm_cvtsi32_si128(shift.max(0)));
    let behind = _mm256_add_epi32(_mm256_sub_epi32(largest, c_exp), _mm256_set1_epi32((-shift).max(0)));
    let kept = _mm256_sign_epi32(_mm256_srlv_epi32(magnitude, _mm256_min_epi32(behind, limit)), c_mantissa);
    let exponent = _mm256_max_epi32(
        _mm256_sub_epi32(largest, _mm256_set1_epi32(widths.fraction as i32)),
        _mm256_set1_epi32(-1000),
    );
    let field = _mm256_add_epi32(exponent, _mm256_set1_epi32(1023));
    let scale = [_mm256_castsi256_si128(field), _mm256_extracti128_si256::<1>(field)]
        .map(|x| _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_cvtepi32_epi64(x))));
    let c = wide(kept);
    let zero = _mm256_setzero_pd();
    let sums: [__m256d; 2] = std::array::from_fn(|i| {
        _mm256_add_pd(_mm256_mul_pd(_mm256_add_pd(total[i], c[i]), scale[i]), zero) // -0 becomes +0
    });
    let mut spilled = [0f64; LANES];
    let spill = |spilled: &mut [f64; LANES]| {
        for (half, sum) in spilled.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
            // SAFETY: `half` holds 32 bytes; the store takes any alignment.
            unsafe { _mm256_storeu_pd(half.as_mut_ptr(), sum) };
        }
    };
    if spec.acc == Accumulator::F16 {
        spill(&mut spilled);
        return round_results(spec.acc, widths, &spilled, acc);
    }
    // As in `round_results`: truncate in f64, convert exactly.
    let keep = _mm256_castsi256_pd(_mm256_set1_epi64x(if widths.result == 13 { -1 << 39 } else { -1 << 29 }));
    let smallest = _mm256_set1_pd(f64::from(f32::MIN_POSITIVE));
    let mut subnormal = zero;
    for (half, sum) in acc.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
        let magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), sum);
        let small = _mm256_cmp_pd::<_CMP_LT_OQ>(magnitude, smallest);
        subnormal = _mm256_or_pd(subnormal, _mm256_and_pd(small, _mm256_cmp_pd::<_CMP_NEQ_OQ>(sum, zero)));
        let rounded = _mm256_cvtpd_ps(_mm256_and_pd(sum, keep));
        // SAFETY: `half` holds 16 bytes; the store takes any alignment.
        unsafe { _mm_storeu_ps(half.as_mut_ptr().cast(), rounded) };
    }
    if _mm256_movemask_pd(subnormal) != 0 {
        spill(&mut spilled);
        round_subnormals(widths, &spilled, acc);
    }
}
