//! Rotary position embedding: which dimensions turn, and by what angle.

use super::{positive, positive_number};
use crate::error::{Error, Result};
use std::f64::consts::PI;

/// Which two dimensions of a head form pair `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RopeStyle {
    /// `(n, n + rotary_dim / 2)`: GPT-NeoX, Llama.
    #[default]
    Half,
    /// `(2n, 2n + 1)`, written back in place: GPT-J, Llama-4.
    Interleaved,
    /// Read from `(2n, 2n + 1)`, written to `(n, n + rotary_dim / 2)`: DeepSeek.
    InterleavedToHalf,
}

/// How the frequencies of a longer context come from those of training.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RopeScaling {
    /// `inv_freq[n] = theta^(-2n / rotary_dim)`.
    #[default]
    Default,
    /// Frequencies divided by a factor.
    #[non_exhaustive]
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN (Peng et al. 2023, arXiv:2309.00071): fast pairs keep their frequency, slow ones are divided, a ramp between.
    #[non_exhaustive]
    Yarn {
        /// The divisor of slow pairs.
        factor: f64,
        /// Context length of training.
        original_max_position: f64,
        /// Rotations over the training context above which a pair is fast.
        beta_fast: f64,
        /// Rotations below which a pair is slow.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
    },
    /// Llama 3.1: by wavelength, with a smooth middle.
    #[non_exhaustive]
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` stay.
        high_freq_factor: f64,
        /// Context length of training.
        original_max_position: f64,
    },
    /// LongRoPE (Ding et al. 2024, arXiv:2402.13753): one divisor per pair.
    #[non_exhaustive]
    LongRope {
        /// `[rotary_dim / 2]`
        factors: Vec<f64>,
    },
    /// The frequencies themselves, `[rotary_dim / 2]`, radians per position.
    #[non_exhaustive]
    Given {
        /// `[rotary_dim / 2]`
        inv_freq: Vec<f64>,
    },
}

impl RopeScaling {
    /// [`RopeScaling::Linear`].
    pub const fn linear(factor: f64) -> Self {
        RopeScaling::Linear { factor }
    }

    /// [`RopeScaling::Yarn`] with all fields.
    pub const fn yarn(factor: f64, original_max_position: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> Self {
        RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate }
    }

    /// [`RopeScaling::Llama3`] with all fields.
    pub const fn llama3(factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position: f64) -> Self {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position }
    }

    /// [`RopeScaling::LongRope`].
    pub const fn long_rope(factors: Vec<f64>) -> Self {
        RopeScaling::LongRope { factors }
    }

    /// [`RopeScaling::Given`].
    pub const fn given(inv_freq: Vec<f64>) -> Self {
        RopeScaling::Given { inv_freq }
    }
}

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pair `n` of the first `rotary_dim` dimensions of a head
/// turns by `position * inv_freq[n]`: `(a, b) -> (a cos - b sin, b cos + a sin)`; the other dimensions stay.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Rope {
    /// Which two dimensions form a pair.
    pub style: RopeStyle,
    /// Dimensions that turn; even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed.
    pub scaling: RopeScaling,
    /// Factor on cos and sin (YaRN's attention factor).
    pub cos_sin_scale: f64,
}

impl Default for Rope {
    fn default() -> Self {
        Rope::new(RopeStyle::Half, 64, 10_000.0)
    }
}

impl Rope {
    /// Default frequencies, no factor.
    pub const fn new(style: RopeStyle, rotary_dim: usize, theta: f64) -> Self {
        Rope { style, rotary_dim, theta, scaling: RopeScaling::Default, cos_sin_scale: 1.0 }
    }

    /// # Errors
    /// [`Error::Value`] if `rotary_dim` is odd, 0 or above `head_dim`, a number is not positive or a table has another length.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        positive("rope.rotary_dim", self.rotary_dim)?;
        if !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > head_dim {
            let expected = format!("even and at most head_dim ({head_dim})");
            return Err(Error::value("rope.rotary_dim", expected, self.rotary_dim));
        }
        positive_number("rope.theta", self.theta)?;
        positive_number("rope.cos_sin_scale", self.cos_sin_scale)?;
        match &self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive_number("rope.factor", *factor),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, .. } => {
                positive_number("rope.factor", *factor)?;
                positive_number("rope.original_max_position", *original_max_position)?;
                positive_number("rope.beta_fast", *beta_fast)?;
                positive_number("rope.beta_slow", *beta_slow)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive_number("rope.factor", *factor)?;
                positive_number("rope.original_max_position", *original_max_position)?;
                positive_number("rope.low_freq_factor", *low_freq_factor)?;
                positive_number("rope.high_freq_factor", *high_freq_factor)?;
                // Equal ones occur (Llama-4 Scout): then there is no middle.
                if high_freq_factor < low_freq_factor {
                    let expected = format!("at least low_freq_factor ({low_freq_factor})");
                    return Err(Error::value("rope.high_freq_factor", expected, high_freq_factor));
                }
                Ok(())
            }
            RopeScaling::LongRope { factors } => {
                crate::error::check_len("rope.factors", factors.len(), self.rotary_dim / 2)?;
                factors.iter().try_for_each(|f| positive_number("rope.factors", *f))
            }
            RopeScaling::Given { inv_freq } => {
                crate::error::check_len("rope.inv_freq", inv_freq.len(), self.rotary_dim / 2)?;
                inv_freq.iter().try_for_each(|f| super::finite("rope.inv_freq", *f))
            }
        }
    }

    /// `inv_freq[rotary_dim / 2]`, radians per position.
    pub fn inv_freq(&self) -> Vec<f64> {
        let half = self.rotary_dim / 2;
        let dim = self.rotary_dim as f64;
        let default = (0..half).map(|n| self.theta.powf(-2.0 * n as f64 / dim));
        match &self.scaling {
            RopeScaling::Default => default.collect(),
            RopeScaling::Linear { factor } => default.map(|f| f / factor).collect(),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate } => {
                // The pair that makes so many rotations over the training context.
                let pair = |rotations: f64| {
                    dim * (original_max_position / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                default
                    .enumerate()
                    .map(|(n, f)| {
                        let ramp = ((n as f64 - low) / width).clamp(0.0, 1.0);
                        f / factor * ramp + f * (1.0 - ramp)
                    })
                    .collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => default
                .map(|f| {
                    let rotations = original_max_position * f / (2.0 * PI);
                    if rotations < *low_freq_factor {
                        f / factor
                    } else if rotations >= *high_freq_factor {
                        f
                    } else {
                        let smooth = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
            RopeScaling::LongRope { factors } => default.zip(factors).map(|(f, divisor)| f / divisor).collect(),
            RopeScaling::Given { inv_freq } => inv_freq.clone(),
        }
    }

    /// `cos` and `sin`, each `[num_positions, rotary_dim / 2]`, of `position * inv_freq`, times `cos_sin_scale`, in f64.
    pub fn table(&self, num_positions: usize) -> (Vec<f64>, Vec<f64>) {
        let inv_freq = self.inv_freq();
        let angle = |position: usize| inv_freq.iter().map(move |f| position as f64 * f);
        let cos = (0..num_positions).flat_map(angle).map(|a| a.cos() * self.cos_sin_scale).collect();
        let sin = (0..num_positions).flat_map(angle).map(|a| a.sin() * self.cos_sin_scale).collect();
        (cos, sin)
    }
}
