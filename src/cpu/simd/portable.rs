//! Eight lanes in a plain array: any CPU, in instructions that the compiler finds.

use super::{Kernel, Simd};
use half::{bf16, f16};

/// Needs nothing, so anyone may make one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn map(x: [f32; LANES], f: impl Fn(f32) -> f32) -> [f32; LANES] {
    let mut out = x;
    for x in &mut out {
        *x = f(*x);
    }
    out
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = a;
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

#[inline(always)]
fn compare(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> bool) -> [bool; LANES] {
    let mut out = [false; LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

#[inline(always)]
fn fold(x: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut x = x;
    for half in [4, 2, 1] {
        for i in 0..half {
            x[i] = f(x[i], x[i + half]);
        }
    }
    x[0]
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 4; // 4 x 2 vectors of 8 fill the 32 registers of NEON, two registers to a vector
    const HAS_DOT_BF16: bool = false;
    type F32 = [f32; LANES];
    type Mask = [bool; LANES];
    type Pairs = [u32; LANES];
    type F64 = [f64; LANES / 2];

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.eval(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> Self::F32 {
        let mut out = [0.0; LANES];
        out.copy_from_slice(&src[..LANES]);
        out
    }
    #[inline(always)]
    fn store(self, dst: &mut [f32], x: Self::F32) {
        dst[..LANES].copy_from_slice(&x);
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> Self::F32 {
        let mut out = [0.0; LANES];
        let n = src.len().min(LANES);
        out[..n].copy_from_slice(&src[..n]);
        out
    }
    #[inline(always)]
    fn store_partial(self, dst: &mut [f32], x: Self::F32) {
        let n = dst.len().min(LANES);
        dst[..n].copy_from_slice(&x[..n]);
    }

    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> Self::F32 {
        let src = &src[..LANES];
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::from_bits((src[i].to_bits() as u32) << 16);
        }
        out
    }
    #[inline(always)]
    fn store_bf16(self, dst: &mut [bf16], x: Self::F32) {
        let dst = &mut dst[..LANES];
        for i in 0..LANES {
            dst[i] = bf16::from_f32(x[i]);
        }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> Self::F32 {
        let src = &src[..LANES];
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = src[i].to_f32();
        }
        out
    }
    #[inline(always)]
    fn store_f16(self, dst: &mut [f16], x: Self::F32) {
        let dst = &mut dst[..LANES];
        for i in 0..LANES {
            dst[i] = f16::from_f32(x[i]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        let mut out = c;
        for i in 0..LANES {
            // One instruction on aarch64; on x86-64 without FMA a call into the C library, so two roundings there.
            out[i] = if cfg!(target_arch = "aarch64") { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] };
        }
        out
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn neg(self, x: Self::F32) -> Self::F32 {
        map(x, |x| -x)
    }
    #[inline(always)]
    fn abs(self, x: Self::F32) -> Self::F32 {
        map(x, f32::abs)
    }
    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        map(x, |x| {
            // Adding 2^23 leaves no bits for a fraction. Larger values are integers, or not finite.
            let large = 8388608.0f32.copysign(x);
            if x.abs() < 8388608.0 { ((x + large) - large).copysign(x) } else { x }
        })
    }
    #[inline(always)]
    fn scale_pow2(self, x: Self::F32, n: Self::F32) -> Self::F32 {
        zip(x, n, |x, n| {
            // Two factors, because 2^n alone may be out of range. The first product is exact.
            let n = n as i32;
            let first = n >> 1;
            let pow2 = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
            x * pow2(first) * pow2(n - first)
        })
    }

    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        compare(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn le(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        compare(a, b, |a, b| a <= b)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        let mut out = b;
        for i in 0..LANES {
            out[i] = if mask[i] { a[i] } else { b[i] };
        }
        out
    }

    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        fold(x, |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self, x: Self::F32) -> f32 {
        fold(x, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn load_pairs(self, src: &[u32]) -> Self::Pairs {
        let mut out = [0; LANES];
        out.copy_from_slice(&src[..LANES]);
        out
    }
    #[inline(always)]
    fn splat_pairs(self, pair: u32) -> Self::Pairs {
        [pair; LANES]
    }
    #[inline(always)]
    fn even(self, pairs: Self::Pairs) -> Self::F32 {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::from_bits(pairs[i] << 16);
        }
        out
    }
    #[inline(always)]
    fn odd(self, pairs: Self::Pairs) -> Self::F32 {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::from_bits(pairs[i] & 0xffff_0000);
        }
        out
    }

    #[inline(always)]
    fn load_f64(self, src: &[f64]) -> Self::F64 {
        let mut out = [0.0; LANES / 2];
        out.copy_from_slice(&src[..LANES / 2]);
        out
    }
    #[inline(always)]
    fn min_f64(self, a: Self::F64, b: Self::F64) -> Self::F64 {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn max_f64(self, a: Self::F64, b: Self::F64) -> Self::F64 {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn shift_f64(self, x: Self::F64, by: usize) -> Self::F64 {
        std::array::from_fn(|i| x[(i + by) % (LANES / 2)])
    }
    #[inline(always)]
    fn first_f64(self, x: Self::F64) -> f64 {
        x[0]
    }

    #[inline(always)]
    fn prefetch<T>(self, _at: *const T) {}
    #[inline(always)]
    fn prefetch_l2<T>(self, _at: *const T) {}
}
