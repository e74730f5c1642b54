//! Element types: what a slice may hold, and how it turns into `f32` and `f64`.

use half::{bf16, f16};

/// Element type of an array, as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// bfloat16: 8 bits of exponent, 7 of fraction.
    BF16,
    /// IEEE binary16.
    F16,
    /// IEEE binary64 (reference backend only).
    F64,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
        }
    }

    /// `"f32"`, `"bf16"`, `"f16"`, `"f64"`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::BF16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F64 => "f64",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A number that arrays may hold: `f32`, `bf16`, `f16`, and `f64` for the reference backend.
///
/// Conversions round to nearest, ties to even; widening is exact.
pub trait Element:
    Copy + Default + Send + Sync + PartialOrd + bytemuck::Pod + std::fmt::Debug + sealed::Sealed
{
    /// The type as data.
    const DTYPE: Dtype;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Exact but for `f64`.
    fn to_f32(self) -> f32;
    /// Rounded once.
    fn from_f64(value: f64) -> Self;
    /// Rounded once.
    fn from_f32(value: f32) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:expr, $to_f64:expr, $to_f32:expr, $from_f64:expr, $from_f32:expr) => {
        impl Element for $type {
            const DTYPE: Dtype = $dtype;
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to_f64(self)
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to_f32(self)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                $from_f64(value)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $from_f32(value)
            }
        }
    };
}

element!(f64, Dtype::F64, |x| x, |x| x as f32, |x| x, |x| x as f64);
element!(f32, Dtype::F32, |x| x as f64, |x| x, |x| x as f32, |x| x);
element!(bf16, Dtype::BF16, bf16::to_f64, bf16::to_f32, bf16::from_f64, bf16::from_f32);
element!(f16, Dtype::F16, f16::to_f64, f16::to_f32, f16::from_f64, f16::from_f32);
