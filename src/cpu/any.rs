//! Arrays whose element type is a value: what reads and writes them is compiled once per level, not once per type of the caller.

use super::float::Float;
use super::parallel::Shared;
use super::simd::Simd;
use crate::element::Dtype;
use crate::view::View;
use half::{bf16, f16};

/// A [`View`] of any element type.
#[derive(Clone, Copy)]
pub enum AnyView<'a, const N: usize> {
    F32(View<'a, f32, N>),
    Bf16(View<'a, bf16, N>),
    F16(View<'a, f16, N>),
}

impl<'a, const N: usize> AnyView<'a, N> {
    /// Extents, slowest first.
    pub fn shape(&self) -> [usize; N] {
        match self {
            AnyView::F32(x) => x.shape(),
            AnyView::Bf16(x) => x.shape(),
            AnyView::F16(x) => x.shape(),
        }
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        match self {
            AnyView::F32(_) => Dtype::F32,
            AnyView::Bf16(_) => Dtype::BF16,
            AnyView::F16(_) => Dtype::F16,
        }
    }

    /// The contiguous last dimension at the leading indices (`N - 1` of them).
    #[inline(always)]
    pub fn row(&self, index: &[usize]) -> AnyRow<'a> {
        match self {
            AnyView::F32(x) => AnyRow::F32(x.row(index)),
            AnyView::Bf16(x) => AnyRow::Bf16(x.row(index)),
            AnyView::F16(x) => AnyRow::F16(x.row(index)),
        }
    }
}

/// A row of an [`AnyView`].
#[derive(Clone, Copy)]
pub enum AnyRow<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl AnyRow<'_> {
    /// Number of values.
    #[inline(always)]
    pub fn len(&self) -> usize {
        match self {
            AnyRow::F32(x) => x.len(),
            AnyRow::Bf16(x) => x.len(),
            AnyRow::F16(x) => x.len(),
        }
    }
}

/// A [`Shared`] slice of any element type.
#[derive(Clone, Copy)]
pub enum AnyShared<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
    F16(Shared<'a, f16>),
}

impl AnyShared<'_> {
    /// Writes `len` values from `at`, rounded once; `values` has at least as many, in whole vectors.
    ///
    /// # Safety
    /// As [`Shared::part`] for these values.
    #[inline(always)]
    pub unsafe fn store<S: Simd>(self, simd: S, at: usize, len: usize, values: &[f32]) {
        // SAFETY: the caller keeps parts disjoint.
        unsafe {
            match self {
                AnyShared::F32(out) => store_all(simd, out.part(at, len), values),
                AnyShared::Bf16(out) => store_all(simd, out.part(at, len), values),
                AnyShared::F16(out) => store_all(simd, out.part(at, len), values),
            }
        }
    }
}

// Not a closure per vector: one that is called from three places is not inlined into the code of the level.
#[inline(always)]
fn store_all<S: Simd, O: Float>(simd: S, out: &mut [O], values: &[f32]) {
    for at in (0..out.len()).step_by(S::LANES) {
        O::store_partial(simd, &mut out[at..], simd.load(&values[at..]));
    }
}
