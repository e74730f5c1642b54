//! What a call of routing is: sizes, strides, what is there; and its device pointers.

use crate::error::{Error, Result};
use crate::spec::{Router, Selection};

use crate::cuda::rows::{MAX_ROWS, check_output_stride};

/// Most experts of a router.
pub(super) const MAX_EXPERTS: usize = 1024;

/// Most slots of a token that chooses experts: one per lane of a warp.
pub(super) const MAX_TOP_K: usize = 32;

/// What to compute: see [`route`](super::route). All arrays hold f32, `topk_ids` i32.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Route {
    /// The router.
    pub spec: Router,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Elements from one row of `logits` to the next.
    pub logits_stride: usize,
    /// Elements from one row of `topk_ids` to the next.
    pub topk_ids_stride: usize,
    /// Elements from one row of `topk_weights` to the next.
    pub topk_weights_stride: usize,
    /// Elements from one row of `expert_tokens` to the next, where it is wanted.
    pub expert_tokens_stride: Option<usize>,
    /// Whether there is a selection bias.
    pub selection_bias: bool,
    /// Whether the call asks for `aux_loss`.
    pub aux_loss: bool,
    /// Whether the call asks for `z_loss`.
    pub z_loss: bool,
}

impl Route {
    /// Contiguous arrays, no bias, no losses.
    pub fn new(spec: &Router, num_tokens: usize) -> Self {
        Route {
            spec: spec.clone(),
            num_tokens,
            logits_stride: spec.num_experts,
            topk_ids_stride: spec.slots(),
            topk_weights_stride: spec.slots(),
            expert_tokens_stride: None,
            selection_bias: false,
            aux_loss: false,
            z_loss: false,
        }
    }

    /// The rules that every router obeys here.
    pub(super) fn check(&self) -> Result<()> {
        let spec = &self.spec;
        spec.validate()?;
        if self.num_tokens > MAX_ROWS {
            return Err(Error::value("num_tokens", format!("at most {MAX_ROWS}"), self.num_tokens));
        }
        if spec.num_experts > MAX_EXPERTS {
            return Err(Error::unsupported("cuda", format!("{} experts (at most {MAX_EXPERTS})", spec.num_experts)));
        }
        if spec.selection != Selection::ExpertChoice && spec.top_k > MAX_TOP_K {
            return Err(Error::unsupported("cuda", format!("{} experts per token (at most {MAX_TOP_K})", spec.top_k)));
        }
        check_output_stride("topk_ids", self.num_tokens, spec.slots(), self.topk_ids_stride)?;
        check_output_stride("topk_weights", self.num_tokens, spec.slots(), self.topk_weights_stride)?;
        if self.selection_bias && !matches!(spec.selection, Selection::TopK | Selection::Prototypes) {
            return Err(Error::unexpected("selection_bias", "this selection has none"));
        }
        if let Some(stride) = self.expert_tokens_stride {
            if spec.selection != Selection::ExpertChoice {
                return Err(Error::unexpected("expert_tokens", "only expert choice gives them"));
            }
            let width = spec.expert_choice_tokens(self.num_tokens);
            check_output_stride("expert_tokens", spec.num_experts, width, stride)?;
        }
        if self.aux_loss && spec.aux_loss.is_none() {
            return Err(Error::unexpected("aux_loss", "the specification names no auxiliary loss"));
        }
        Ok(())
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouteArgs {
    /// Read.
    pub logits: u64,
    /// Read, where the plan has one.
    pub selection_bias: Option<u64>,
    /// `[num_tokens]` u8, read.
    pub token_mask: Option<u64>,
    /// `[num_tokens]` u8, read.
    pub loss_mask: Option<u64>,
    /// Key of the random numbers. A recording (a CUDA graph) keeps it.
    pub seed: u64,
    /// Written.
    pub topk_ids: u64,
    /// Written.
    pub topk_weights: u64,
    /// `[num_experts]` u32, written.
    pub tokens_per_expert: Option<u64>,
    /// One u64, written.
    pub dropped: Option<u64>,
    /// Written, where the plan has it.
    pub expert_tokens: Option<u64>,
    /// One f32, written, where the plan has it.
    pub aux_loss: Option<u64>,
    /// One f32, written, where the plan has it.
    pub z_loss: Option<u64>,
    /// As large as [`RoutePlan::workspace_bytes`](super::RoutePlan::workspace_bytes) tells, a multiple of 256; 0 if that is 0.
    pub workspace: u64,
}

impl RouteArgs {
    /// Ids and weights only.
    pub fn new(logits: u64, topk_ids: u64, topk_weights: u64) -> Self {
        RouteArgs {
            logits,
            selection_bias: None,
            token_mask: None,
            loss_mask: None,
            seed: 0,
            topk_ids,
            topk_weights,
            tokens_per_expert: None,
            dropped: None,
            expert_tokens: None,
            aux_loss: None,
            z_loss: None,
            workspace: 0,
        }
    }
}
