//! Routing on the GPU: from logits to the experts of each token and their weights.
//!
//! ```text
//! problem     what a call is, and its device pointers
//! plan        which kernels run, what a launch checks
//! tokens      experts and weights of each token by itself
//! coupled     in its place: capacity, second experts by chance, expert choice, Sinkhorn
//! losses      load balance and z-loss
//! ```

mod coupled;
mod losses;
mod plan;
mod problem;
mod tokens;

pub use plan::RoutePlan;
pub use problem::{Route, RouteArgs};

use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::error::{Error, Result};
use crate::spec::{Router, Selection};

/// Logits and what goes with them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RouteInput<'a> {
    /// `[num_tokens, num_experts]`
    pub logits: DeviceView<'a, f32, 2>,
    /// `[num_experts]`: chooses but does not weigh.
    pub selection_bias: Option<DeviceView<'a, f32, 1>>,
    /// `[num_tokens]`: 0 marks padding: ids -1, weights 0, no part in queues and losses.
    pub token_mask: Option<DeviceView<'a, u8, 1>>,
    /// `[num_tokens]`: 0 leaves the token out of the losses, but not out of routing.
    pub loss_mask: Option<DeviceView<'a, u8, 1>>,
    /// Key of the random numbers. A recording (a CUDA graph) keeps it.
    pub seed: u64,
}

/// What routing writes. Scalars are arrays of one element.
#[derive(Debug)]
#[non_exhaustive]
pub struct RouteOutput<'a> {
    /// `[num_tokens, slots]` (see [`Router::slots`]): expert of each slot, best first; -1 for a dropped slot, a masked token,
    /// an unused slot of expert choice (there experts ascend).
    pub topk_ids: DeviceViewMut<'a, i32, 2>,
    /// `[num_tokens, slots]`: weight of each slot, 0 where the id is -1.
    pub topk_weights: DeviceViewMut<'a, f32, 2>,
    /// `[num_experts]`: how often each expert stands in `topk_ids`.
    pub tokens_per_expert: Option<DeviceViewMut<'a, u32, 1>>,
    /// `[1]`: slots dropped for capacity or because a second expert was not used.
    pub dropped: Option<DeviceViewMut<'a, u64, 1>>,
    /// Expert choice only, `[num_experts, expert_choice_tokens]`: the tokens of each expert, best first.
    pub expert_tokens: Option<DeviceViewMut<'a, i32, 2>>,
    /// `[1]`: the auxiliary loss of [`Router::aux_loss`].
    pub aux_loss: Option<DeviceViewMut<'a, f32, 1>>,
    /// `[1]`: `mean over tokens of lse(logits)^2` (ST-MoE, arXiv:2202.08906).
    pub z_loss: Option<DeviceViewMut<'a, f32, 1>>,
}

impl<'a> RouteInput<'a> {
    /// Nothing but logits.
    pub const fn new(logits: DeviceView<'a, f32, 2>) -> Self {
        RouteInput { logits, selection_bias: None, token_mask: None, loss_mask: None, seed: 0 }
    }

    /// Validates the specification and every argument; gives the number of tokens.
    ///
    /// # Errors
    /// Those of [`Router::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`] for an array that does not fit;
    /// [`Error::Presence`] for an output that the specification does not have.
    pub fn check(&self, spec: &Router, output: &RouteOutput<'_>) -> Result<usize> {
        spec.validate()?;
        let [num_tokens, _] = self.logits.shape();
        self.logits.check("logits", [num_tokens, spec.num_experts])?;
        if let Some(bias) = self.selection_bias {
            bias.check("selection_bias", [spec.num_experts])?;
            if !matches!(spec.selection, Selection::TopK | Selection::Prototypes) {
                return Err(Error::unexpected("selection_bias", "this selection has none"));
            }
        }
        for (name, mask) in [("token_mask", self.token_mask), ("loss_mask", self.loss_mask)] {
            if let Some(mask) = mask {
                mask.check(name, [num_tokens])?;
            }
        }
        output.check(spec, num_tokens)?;
        Ok(num_tokens)
    }
}

impl<'a> RouteOutput<'a> {
    /// Ids and weights only.
    pub const fn new(topk_ids: DeviceViewMut<'a, i32, 2>, topk_weights: DeviceViewMut<'a, f32, 2>) -> Self {
        RouteOutput {
            topk_ids,
            topk_weights,
            tokens_per_expert: None,
            dropped: None,
            expert_tokens: None,
            aux_loss: None,
            z_loss: None,
        }
    }

    /// Checks every output against the specification.
    ///
    /// # Errors
    /// As [`RouteInput::check`].
    pub fn check(&self, spec: &Router, num_tokens: usize) -> Result<()> {
        if num_tokens > i32::MAX as usize {
            return Err(Error::value("num_tokens", "at most 2^31 - 1", num_tokens));
        }
        self.topk_ids.check("topk_ids", [num_tokens, spec.slots()])?;
        self.topk_weights.check("topk_weights", [num_tokens, spec.slots()])?;
        if let Some(counts) = &self.tokens_per_expert {
            counts.check("tokens_per_expert", [spec.num_experts])?;
        }
        if let Some(dropped) = &self.dropped {
            dropped.check("dropped", [1])?;
        }
        if let Some(tokens) = &self.expert_tokens {
            if spec.selection != Selection::ExpertChoice {
                return Err(Error::unexpected("expert_tokens", "only expert choice gives them"));
            }
            tokens.check("expert_tokens", [spec.num_experts, spec.expert_choice_tokens(num_tokens)])?;
        }
        for (name, loss) in [("aux_loss", &self.aux_loss), ("z_loss", &self.z_loss)] {
            if let Some(loss) = loss {
                loss.check(name, [1])?;
            }
        }
        if self.aux_loss.is_some() && spec.aux_loss.is_none() {
            return Err(Error::unexpected("aux_loss", "the specification names no auxiliary loss"));
        }
        Ok(())
    }
}

/// From logits to the experts of each token and their weights: as [`cpu::route`](crate::cpu::route), with the same ids.
///
/// Weights are computed in f64 and rounded once. Ids are always distinct and in range, whatever the logits. Up to 1024 experts and
/// 32 experts per token.
///
/// # Errors
/// Those of [`RouteInput::check`] and of [`RoutePlan`]; [`Error::Value`] for arrays that are lent to another stream. Nothing is
/// written then.
pub fn route(queue: &mut Queue<'_>, spec: &Router, input: &RouteInput<'_>, output: RouteOutput<'_>) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    queue.check_homes(&[
        input.logits.home(),
        input.selection_bias.and_then(|bias| bias.home()),
        input.token_mask.and_then(|mask| mask.home()),
        input.loss_mask.and_then(|mask| mask.home()),
        output.topk_ids.home(),
        output.topk_weights.home(),
        output.tokens_per_expert.as_ref().and_then(DeviceViewMut::home),
        output.dropped.as_ref().and_then(DeviceViewMut::home),
        output.expert_tokens.as_ref().and_then(DeviceViewMut::home),
        output.aux_loss.as_ref().and_then(DeviceViewMut::home),
        output.z_loss.as_ref().and_then(DeviceViewMut::home),
    ])?;
    let mut problem = Route::new(spec, num_tokens);
    problem.logits_stride = input.logits.strides()[0];
    problem.topk_ids_stride = output.topk_ids.strides()[0];
    problem.topk_weights_stride = output.topk_weights.strides()[0];
    problem.expert_tokens_stride = output.expert_tokens.as_ref().map(|tokens| tokens.strides()[0]);
    problem.selection_bias = input.selection_bias.is_some();
    problem.aux_loss = output.aux_loss.is_some();
    problem.z_loss = output.z_loss.is_some();
    let plan = RoutePlan::new(&problem)?;
    let args = RouteArgs {
        selection_bias: input.selection_bias.map(|bias| bias.ptr()),
        token_mask: input.token_mask.map(|mask| mask.ptr()),
        loss_mask: input.loss_mask.map(|mask| mask.ptr()),
        seed: input.seed,
        tokens_per_expert: output.tokens_per_expert.as_ref().map(DeviceViewMut::ptr),
        dropped: output.dropped.as_ref().map(DeviceViewMut::ptr),
        expert_tokens: output.expert_tokens.as_ref().map(DeviceViewMut::ptr),
        aux_loss: output.aux_loss.as_ref().map(DeviceViewMut::ptr),
        z_loss: output.z_loss.as_ref().map(DeviceViewMut::ptr),
        workspace: queue.workspace(plan.workspace_bytes())?,
        ..RouteArgs::new(input.logits.ptr(), output.topk_ids.ptr(), output.topk_weights.ptr())
    };
    // SAFETY: the views are memory of the queue's device, with the shapes that `check` has seen; outputs are borrowed alone.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}
