//! Every token chooses its experts by itself: top-k, prototypes, the sparse mixer.

use super::problem::{Route, RouteArgs};
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, route as kernels};
use crate::cuda::rows::stride_bytes;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::{GroupScore, Renormalize, Score, Selection};

/// What the choice gives, besides the ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Gives {
    /// `topk_weights` as the caller wants them, and the counts.
    Weights,
    /// Scores of the chosen in f64, neither renormalised nor scaled (of the sparse mixer: the weights), for a step that drops
    /// slots and writes the weights: [`Extra::scores`]. `topk_weights` is not written.
    #[allow(dead_code)] // for `coupled`
    Scores,
}

/// Memory beyond the arrays of the call.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extra {
    /// `[num_tokens, num_experts]` f32, contiguous: compared in place of what the specification says (top-k only); 0: none.
    pub values: u64,
    /// `[num_tokens, top_k]` f64, contiguous, written for [`Gives::Scores`]; a masked token's are 0.
    pub scores: u64,
    /// `[num_tokens]` f32: the largest softmax probability, NaN if a logit is; a masked token's is 0. 0: not wanted.
    pub largest: u64,
    /// `[num_experts]` u32 to which the ids are added; 0: not wanted.
    pub counts: u64,
}

/// The kernel and its scalar parameters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tokens {
    kernel: &'static Kernel,
    gives: Gives,
    num_blocks: u32,
    num_tokens: u32,
    num_experts: u32,
    top_k: u32,
    logits_stride_bytes: u64,
    ids_stride_bytes: u64,
    weights_stride_bytes: u64,
    score: u32,
    compare: u32,
    softmax_over: u32,
    renormalize: Scale,
    groups: [u32; 5],
}

/// [`Renormalize`] and the scaling factor as kernels take them: rule, then f64 by their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Scale {
    pub rule: u32,
    pub eps: u64,
    pub floor: u64,
    pub scaling: u64,
}

impl Scale {
    /// Of a problem's weights.
    pub(super) fn new(problem: &Route) -> Self {
        let spec = &problem.spec;
        let (rule, scaling) = match spec.selection {
            Selection::SparseMixer { .. } => (Renormalize::None, 1.0),
            _ => (spec.renormalize, spec.scaling_factor),
        };
        let (rule, eps, floor) = match rule {
            Renormalize::None => (0, 0.0f64, 0.0f64),
            Renormalize::Sum { eps, floor } => (1, eps, floor),
            Renormalize::L2 => (2, 0.0, 0.0),
            Renormalize::Softmax => (3, 0.0, 0.0),
        };
        Scale { rule, eps: eps.to_bits(), floor: floor.to_bits(), scaling: scaling.to_bits() }
    }
}

/// Number of a score function in kernels.
pub(super) fn score_number(score: Score) -> u32 {
    match score {
        Score::Softmax => 0,
        Score::Sigmoid => 1,
        Score::SqrtSoftplus => 2,
        Score::Raw => 3,
    }
}

impl Tokens {
    /// With `values`, the launch gives what is compared.
    pub(super) fn new(problem: &Route, gives: Gives, values: bool) -> Result<Self> {
        let spec = &problem.spec;
        if !matches!(spec.selection, Selection::TopK | Selection::Sinkhorn { .. }) {
            return Err(Error::unsupported("cuda", format!("{:?}", spec.selection)));
        }
        // Found: the table has an instance for 1024 experts, and `Route::check` has seen that there are no more.
        let instance = kernels::INSTANCES
            .iter()
            .find(|instance| 32 * instance.values as usize >= spec.num_experts)
            .ok_or_else(|| Error::unsupported("cuda", format!("{} experts", spec.num_experts)))?;
        let by_score = !values && !spec.selects_on_logits(problem.selection_bias);
        let scale = Scale::new(problem);
        // A divisor that grows with the scores makes the sum over all experts cancel; any other shift will do then.
        let cancels = matches!(spec.renormalize, Renormalize::L2)
            || spec.renormalize == Renormalize::Sum { eps: 0.0, floor: 0.0 };
        let softmax_over = match spec.score {
            Score::Softmax if gives == Gives::Weights && !by_score && cancels => 2,
            Score::Softmax => 1,
            _ => 0,
        };
        let mut groups = [0; 5];
        if let Some(g) = &spec.groups
            && g.top_groups < g.num_groups
        {
            let size = spec.num_experts / g.num_groups;
            let magic = (1usize << 20).div_ceil(size);
            let sum = u32::from(g.score == GroupScore::Top2Sum);
            groups = [g.num_groups as u32, g.top_groups as u32, size as u32, magic as u32, sum];
        }
        let stride = |name, stride| stride_bytes(name, Dtype::F32, problem.num_tokens, stride);
        Ok(Tokens {
            kernel: &instance.kernel,
            gives,
            num_blocks: problem.num_tokens.div_ceil(instance.warps as usize) as u32, // at most 2^31 - 1 tokens
            num_tokens: problem.num_tokens as u32,
            num_experts: spec.num_experts as u32,
            top_k: spec.top_k as u32,
            logits_stride_bytes: stride("logits", problem.logits_stride)?,
            ids_stride_bytes: stride("topk_ids", problem.topk_ids_stride)?,
            weights_stride_bytes: stride("topk_weights", problem.topk_weights_stride)?,
            score: score_number(spec.score),
            compare: u32::from(by_score),
            softmax_over,
            renormalize: scale,
            groups,
        })
    }

    pub(super) fn kernel(&self) -> &'static Kernel {
        self.kernel
    }

    /// Queues it; there must be a token.
    ///
    /// # Safety
    /// `args` holds the arrays of the plan's problem, checked as `RoutePlan::launch` does; `extra` memory as it says.
    pub(super) unsafe fn launch(
        &self,
        driver: &dyn Driver,
        args: &RouteArgs,
        extra: Extra,
        stream: Stream,
    ) -> Result<()> {
        let weights = self.gives == Gives::Weights;
        let params = kernels::Params {
            logits_ptr: args.logits,
            values_ptr: extra.values,
            bias_ptr: args.selection_bias.unwrap_or(0),
            mask_ptr: args.token_mask.unwrap_or(0),
            ids_ptr: args.topk_ids,
            weights_ptr: if weights { args.topk_weights } else { 0 },
            scores_ptr: if weights { 0 } else { extra.scores },
            largest_ptr: extra.largest,
            counts_ptr: extra.counts,
            logits_stride_bytes: self.logits_stride_bytes,
            ids_stride_bytes: self.ids_stride_bytes,
            weights_stride_bytes: self.weights_stride_bytes,
            eps_bits: self.renormalize.eps,
            floor_bits: self.renormalize.floor,
            scaling_bits: self.renormalize.scaling,
            num_tokens: self.num_tokens,
            num_experts: self.num_experts,
            top_k: self.top_k,
            score: self.score,
            compare: self.compare,
            softmax_over: self.softmax_over,
            rule: self.renormalize.rule,
            num_groups: self.groups[0],
            top_groups: self.groups[1],
            group_size: self.groups[2],
            group_magic: self.groups[3],
            group_sum: self.groups[4],
        };
        let launch = Launch::grid([self.num_blocks, 1, 1]);
        // SAFETY: the caller's promise.
        unsafe { driver.launch(self.kernel, &launch, &params.to_bytes(), stream) }
    }
}
