//! What to compute, as plain data: every option of every function, validated in one place, without a word about where
//! the arrays live. The same structs drive all backends.
//!
//! A specification is made by its constructor (or `default()`), then its public fields are set; every function that
//! takes one calls its `validate` first. With the feature `serde` all of them read from and write to JSON.

mod attention;
mod ffn;
#[cfg(feature = "serde")]
mod hf;
mod layer;
mod linear_attention;
mod mask;
mod norm;
mod rope;
mod router;

pub use attention::{Attention, Mla, RelativeBias};
pub use ffn::{Activation, ExpertFfn, Ffn, Moe, SharedExpert, WeightFormat, WeightOn};
#[cfg(feature = "serde")]
pub use hf::{Family, HfConfig};
pub use layer::{AttentionBlock, GqaBlock, Layer, MlaBlock, Mlp};
pub use linear_attention::{Retention, RetentionForm};
pub use mask::Mask;
pub use norm::{Norm, NormKind, QTemperature, QkNorm, QkvPrep};
pub use rope::{Rope, RopeScaling, RopeStyle};
pub use router::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, SelectOn, Selection,
};

use crate::error::{Error, Result};

/// `Ok` if `value` is at least 1.
pub(crate) fn positive(argument: &str, value: usize) -> Result<()> {
    if value > 0 { Ok(()) } else { Err(Error::value(argument, "at least 1", value)) }
}

/// `Ok` if `value` is finite and above 0.
pub(crate) fn positive_number(argument: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err(Error::value(argument, "a positive number", value)) }
}

/// `Ok` if `value` is finite and not below 0.
pub(crate) fn non_negative_number(argument: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(Error::value(argument, "a number of at least 0", value))
    }
}

/// `Ok` if `value` is finite.
pub(crate) fn finite(argument: &str, value: f64) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(Error::value(argument, "a finite number", value)) }
}
