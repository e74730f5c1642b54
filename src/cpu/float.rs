//! Element types that the CPU backend computes with.

use super::any::{AnyShared, AnyView};
use super::attention::{Call, attention_of};
use super::parallel::Shared;
use super::simd::Simd;
use crate::element::Element;
use crate::view::View;
use half::{bf16, f16};

/// `f32`, `bf16` or `f16`: what activations and weights of the CPU backend may be. (`f64` is for the reference alone.)
///
/// The methods convert between slices and vectors of `f32`: exact when reading, rounded to nearest even when writing.
pub trait Float: Element {
    /// The first `LANES` values. Panics if there are fewer.
    #[doc(hidden)]
    fn load<S: Simd>(simd: S, src: &[Self]) -> S::F32;
    /// The first `min(LANES, len)` values, the other lanes 0.
    #[doc(hidden)]
    fn load_partial<S: Simd>(simd: S, src: &[Self]) -> S::F32;
    /// Writes the first `LANES` values. Panics if there is room for fewer.
    #[doc(hidden)]
    fn store<S: Simd>(simd: S, dst: &mut [Self], x: S::F32);
    /// Writes the first `min(LANES, len)` values.
    #[doc(hidden)]
    fn store_partial<S: Simd>(simd: S, dst: &mut [Self], x: S::F32);
    /// The view as one of any type.
    #[doc(hidden)]
    fn any_view<const N: usize>(view: View<'_, Self, N>) -> AnyView<'_, N>;
    /// The slice as one of any type.
    #[doc(hidden)]
    fn any_shared(slice: &mut [Self]) -> AnyShared<'_>;
    /// Attention for this type: compiled here, once, not in every crate that calls it.
    #[doc(hidden)]
    fn attention(call: Call<'_, '_, Self>);
}

/// The functions that are the same text for every type.
macro_rules! compiled_here {
    ($variant:ident) => {
        fn any_view<const N: usize>(view: View<'_, Self, N>) -> AnyView<'_, N> {
            AnyView::$variant(view)
        }
        fn any_shared(slice: &mut [Self]) -> AnyShared<'_> {
            AnyShared::$variant(Shared::new(slice))
        }
        fn attention(call: Call<'_, '_, Self>) {
            attention_of(call);
        }
    };
}

impl Float for f32 {
    compiled_here!(F32);
    #[inline(always)]
    fn load<S: Simd>(simd: S, src: &[f32]) -> S::F32 {
        simd.load(src)
    }
    #[inline(always)]
    fn load_partial<S: Simd>(simd: S, src: &[f32]) -> S::F32 {
        simd.load_partial(src)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, dst: &mut [f32], x: S::F32) {
        simd.store(dst, x);
    }
    #[inline(always)]
    fn store_partial<S: Simd>(simd: S, dst: &mut [f32], x: S::F32) {
        simd.store_partial(dst, x);
    }
}

impl Float for bf16 {
    compiled_here!(Bf16);
    #[inline(always)]
    fn load<S: Simd>(simd: S, src: &[bf16]) -> S::F32 {
        simd.load_bf16(src)
    }
    #[inline(always)]
    fn load_partial<S: Simd>(simd: S, src: &[bf16]) -> S::F32 {
        simd.load_partial_bf16(src)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, dst: &mut [bf16], x: S::F32) {
        simd.store_bf16(dst, x);
    }
    #[inline(always)]
    fn store_partial<S: Simd>(simd: S, dst: &mut [bf16], x: S::F32) {
        simd.store_partial_bf16(dst, x);
    }
}

impl Float for f16 {
    compiled_here!(F16);
    #[inline(always)]
    fn load<S: Simd>(simd: S, src: &[f16]) -> S::F32 {
        simd.load_f16(src)
    }
    #[inline(always)]
    fn load_partial<S: Simd>(simd: S, src: &[f16]) -> S::F32 {
        simd.load_partial_f16(src)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, dst: &mut [f16], x: S::F32) {
        simd.store_f16(dst, x);
    }
    #[inline(always)]
    fn store_partial<S: Simd>(simd: S, dst: &mut [f16], x: S::F32) {
        simd.store_partial_f16(dst, x);
    }
}
