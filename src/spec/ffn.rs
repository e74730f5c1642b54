//! Feed-forward: one block, the experts, the shared expert, and the whole mixture.

use super::{Router, Selection, finite, positive, positive_number};
use crate::error::{Error, Result};

/// What lies between the two projections.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    #[default]
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`. Hendrycks and Gimpel 2016, arXiv:1606.08415.
    GeluErf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`. So et al. 2021, arXiv:2109.08668.
    ReluSquared,
    /// Gated only (gpt-oss): `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`, `(u + 1) * g / (1 + exp(-alpha * g))`.
    SwigluClamped {
        /// Steepness.
        alpha: f64,
        /// Clamp.
        limit: f64,
    },
}

/// One feed-forward block.
///
/// * gated: `y = down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)
/// * plain: `y = down(act(up(x)))`
///
/// Each projection may have a bias.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Ffn {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Width between the projections.
    pub intermediate_size: usize,
    /// Whether there is a gate projection.
    pub gated: bool,
    /// The activation.
    pub activation: Activation,
    /// Biases on gate and up.
    pub up_bias: bool,
    /// Bias on down.
    pub down_bias: bool,
}

impl Default for Ffn {
    fn default() -> Self {
        Ffn::gated(64, 64, Activation::Silu)
    }
}

impl Ffn {
    /// Gated, without biases.
    pub const fn gated(hidden_size: usize, intermediate_size: usize, activation: Activation) -> Self {
        Ffn { hidden_size, intermediate_size, gated: true, activation, up_bias: false, down_bias: false }
    }

    /// Plain, without biases.
    pub const fn plain(hidden_size: usize, intermediate_size: usize, activation: Activation) -> Self {
        Ffn { hidden_size, intermediate_size, gated: false, activation, up_bias: false, down_bias: false }
    }

    /// # Errors
    /// [`Error::Value`] for a size of 0, a clamped SwiGLU without a gate or with parameters that are not positive.
    pub fn validate(&self) -> Result<()> {
        positive("hidden_size", self.hidden_size)?;
        positive("intermediate_size", self.intermediate_size)?;
        if let Activation::SwigluClamped { alpha, limit } = self.activation {
            if !self.gated {
                return Err(Error::value("activation", "another one for a plain block", "SwigluClamped"));
            }
            finite("activation.alpha", alpha)?;
            positive_number("activation.limit", limit)?;
        }
        Ok(())
    }
}

/// Where the router's weight enters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum WeightOn {
    /// `sum_k w_k * FFN(x)`.
    #[default]
    Output,
    /// `sum_k FFN(w_k * x)` (Llama-4).
    Input,
}

/// How weights are stored. Element types of plain floating-point weights are those of their slices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum WeightFormat {
    /// f32, bf16 or f16.
    #[default]
    Float,
    /// 8-bit floating point (e4m3), one scale per tensor.
    Fp8Tensor,
    /// 8-bit floating point, one scale per output row.
    Fp8Channel,
    /// 8-bit floating point, one scale per 128 x 128 block.
    Fp8Block,
    /// 8-bit integers, one scale per output row.
    Int8,
    /// 4-bit integers, one scale (and zero point) per group of inputs.
    Int4 {
        /// Inputs per group.
        group_size: usize,
    },
    /// 4-bit floating point (e2m1), one power-of-two scale per 32 inputs.
    Mxfp4,
}

/// The routed experts: `out[t] = combine_scale * sum_k w[t, k] * FFN_{ids[t, k]}(x[t])`, summed in a fixed order.
///
/// Experts `first_expert .. first_expert + num_local_experts` are here; other ids, and -1, are somebody else's and are
/// skipped. Weights are `[num_local_experts, out, in]`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct ExpertFfn {
    /// The block of one expert.
    pub ffn: Ffn,
    /// Experts over all ranks.
    pub num_experts: usize,
    /// First expert of this rank.
    pub first_expert: usize,
    /// Experts of this rank.
    pub num_local_experts: usize,
    /// Where the router's weight enters.
    pub weight_on: WeightOn,
    /// Factor on the sum.
    pub combine_scale: f64,
    /// How weights are stored.
    pub weight_format: WeightFormat,
}

impl Default for ExpertFfn {
    fn default() -> Self {
        ExpertFfn::new(1, Ffn::default())
    }
}

impl ExpertFfn {
    /// All experts here, weight on the output.
    pub const fn new(num_experts: usize, ffn: Ffn) -> Self {
        ExpertFfn {
            ffn,
            num_experts,
            first_expert: 0,
            num_local_experts: num_experts,
            weight_on: WeightOn::Output,
            combine_scale: 1.0,
            weight_format: WeightFormat::Float,
        }
    }

    /// Index of an expert among the local ones; `None` for somebody else's and for -1.
    #[inline]
    pub fn local_expert(&self, id: i32) -> Option<usize> {
        let local = usize::try_from(id).ok()?.checked_sub(self.first_expert)?;
        (local < self.num_local_experts).then_some(local)
    }

    /// # Errors
    /// [`Error::Value`] for a size of 0, a rank slice outside the experts, more experts than ids can name.
    pub fn validate(&self) -> Result<()> {
        self.ffn.validate()?;
        positive("num_experts", self.num_experts)?;
        if self.num_experts > i32::MAX as usize {
            return Err(Error::value("num_experts", "at most 2^31 - 1", self.num_experts));
        }
        if self.first_expert.checked_add(self.num_local_experts).is_none_or(|end| end > self.num_experts) {
            let expected = format!("at most num_experts ({}) with first_expert", self.num_experts);
            let found = format!("{} + {}", self.first_expert, self.num_local_experts);
            return Err(Error::value("num_local_experts", expected, found));
        }
        if let WeightFormat::Int4 { group_size } = self.weight_format {
            positive("weight_format.group_size", group_size)?;
        }
        finite("combine_scale", self.combine_scale)
    }
}

/// An expert that every token visits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct SharedExpert {
    /// Its block. Several shared experts of a model are one wide one.
    pub ffn: Ffn,
    /// Whether its output is multiplied by `sigmoid(x . shared_gate)`.
    pub sigmoid_gate: bool,
}

impl SharedExpert {
    /// Without a gate.
    pub const fn new(ffn: Ffn) -> Self {
        SharedExpert { ffn, sigmoid_gate: false }
    }
}

/// A mixture of experts: router, experts, shared expert.
///
/// `out = expert_ffn(x, route(x)) + gate * FFN_shared(x)`
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Moe {
    /// From token to experts.
    pub router: Router,
    /// The router has a bias on its logits.
    pub router_bias: bool,
    /// The router has a bias that chooses but does not weigh.
    pub selection_bias: bool,
    /// The experts.
    pub experts: ExpertFfn,
    /// The expert of all tokens.
    pub shared: Option<SharedExpert>,
}

impl Moe {
    /// Without biases and shared expert.
    pub const fn new(router: Router, experts: ExpertFfn) -> Self {
        Moe { router, router_bias: false, selection_bias: false, experts, shared: None }
    }

    /// # Errors
    /// Those of its parts; [`Error::Value`] where they do not fit one another.
    pub fn validate(&self) -> Result<()> {
        self.router.validate()?;
        self.experts.validate()?;
        if self.router.num_experts != self.experts.num_experts {
            let expected = format!("the router's ({})", self.router.num_experts);
            return Err(Error::value("experts.num_experts", expected, self.experts.num_experts));
        }
        if self.selection_bias && !matches!(self.router.selection, Selection::TopK | Selection::Prototypes) {
            let found = format!("{:?}", self.router.selection);
            return Err(Error::value("router.selection", "TopK or Prototypes with a selection bias", found));
        }
        if let Some(shared) = &self.shared {
            shared.ffn.validate()?;
            if shared.ffn.hidden_size != self.experts.ffn.hidden_size {
                let expected = format!("that of the experts ({})", self.experts.ffn.hidden_size);
                return Err(Error::value("shared.hidden_size", expected, shared.ffn.hidden_size));
            }
        }
        Ok(())
    }
}
