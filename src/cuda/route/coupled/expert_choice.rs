//! Experts that choose their tokens (Zhou et al. 2022, arXiv:2202.09368).

use super::super::problem::{Route, RouteArgs};
use super::super::tokens::{Scale, score_number};
use super::WARPS;
use super::sort::Sort;
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::group_tokens::division;
use crate::cuda::kernels::{Kernel, route_choice_keys, route_choice_mark, route_choice_weights};
use crate::cuda::memory::Parts;
use crate::cuda::rows::stride_bytes;
use crate::element::Dtype;
use crate::error::{Error, Result};

/// Keys by expert, sorted; the best tokens of each expert; then ids and weights by token.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ExpertChoice {
    num_tokens: usize,
    num_experts: u32,
    /// Tokens of an expert.
    tokens: u32,
    logits_stride_bytes: u64,
    ids_stride_bytes: u64,
    weights_stride_bytes: u64,
    expert_tokens_stride_bytes: u64,
    score: u32,
    by_score: bool,
    scale: Scale,
    /// Offsets of `[num_experts, num_tokens]` u32 and `[num_tokens, num_experts]` u8.
    keys: usize,
    chosen: usize,
    /// `None` without a token.
    sort: Option<Sort>,
}

impl ExpertChoice {
    pub(super) fn new(problem: &Route, parts: &mut Parts) -> Result<Self> {
        let (spec, num_tokens) = (&problem.spec, problem.num_tokens);
        let count = num_tokens.saturating_mul(spec.num_experts);
        if count > i32::MAX as usize {
            let case = format!("a choice of {} experts among {num_tokens} tokens", spec.num_experts);
            return Err(Error::unsupported("cuda", case));
        }
        let stride = |name, rows, stride| stride_bytes(name, Dtype::F32, rows, stride);
        let expert_tokens_stride = problem.expert_tokens_stride.unwrap_or(0);
        Ok(ExpertChoice {
            num_tokens,
            num_experts: spec.num_experts as u32, // at most 1024
            tokens: spec.expert_choice_tokens(num_tokens) as u32,
            logits_stride_bytes: stride("logits", num_tokens, problem.logits_stride)?,
            ids_stride_bytes: stride("topk_ids", num_tokens, problem.topk_ids_stride)?,
            weights_stride_bytes: stride("topk_weights", num_tokens, problem.topk_weights_stride)?,
            expert_tokens_stride_bytes: stride("expert_tokens", spec.num_experts, expert_tokens_stride)?,
            score: score_number(spec.score),
            by_score: !spec.selects_on_logits(false),
            scale: Scale::new(problem),
            keys: parts.part(count, 4),
            chosen: parts.part(count, 1),
            sort: if num_tokens > 0 { Some(Sort::new(count, num_tokens, false, parts)?) } else { None },
        })
    }

    pub(super) fn kernels(&self) -> Vec<&'static Kernel> {
        let mut kernels = vec![
            &route_choice_keys::INSTANCES[0].kernel,
            &route_choice_mark::INSTANCES[0].kernel,
            &route_choice_weights::INSTANCES[0].kernel,
        ];
        kernels.extend(self.sort.iter().flat_map(Sort::kernels));
        kernels
    }

    /// Queues it.
    ///
    /// # Safety
    /// As for `Coupled::launch`.
    pub(super) unsafe fn launch(&self, driver: &dyn Driver, args: &RouteArgs, stream: Stream) -> Result<()> {
        let Some(sort) = &self.sort else { return Ok(()) };
        let (keys_ptr, chosen_ptr) = (args.workspace + self.keys as u64, args.workspace + self.chosen as u64);
        let num_tokens = self.num_tokens as u32; // at most 2^31 - 1, as is the product with the experts
        let by_token = Launch::grid([self.num_tokens.div_ceil(WARPS) as u32, 1, 1]);

        let params = route_choice_keys::Params {
            logits_ptr: args.logits,
            mask_ptr: args.token_mask.unwrap_or(0),
            keys_ptr,
            logits_stride_bytes: self.logits_stride_bytes,
            num_tokens,
            num_experts: self.num_experts,
            score: self.score,
            by_score: u32::from(self.by_score),
        };
        // SAFETY: the caller's promise, also below.
        unsafe { driver.launch(&route_choice_keys::INSTANCES[0].kernel, &by_token, &params.to_bytes(), stream)? };
        // SAFETY: as above; the keys are as many as the sort was told.
        let order_ptr = unsafe { sort.launch(driver, keys_ptr, args.workspace, stream)? };

        let (len_magic, len_shift) = division(num_tokens);
        let params = route_choice_mark::Params {
            order_ptr,
            keys_ptr,
            chosen_ptr,
            expert_tokens_ptr: args.expert_tokens.unwrap_or(0),
            expert_tokens_stride_bytes: self.expert_tokens_stride_bytes,
            num_tokens,
            num_experts: self.num_experts,
            tokens_of_expert: self.tokens,
            len_magic,
            len_shift,
        };
        let kernel = &route_choice_mark::INSTANCES[0].kernel;
        let launch = Launch::grid([(num_tokens * self.num_experts).div_ceil(kernel.threads), 1, 1]);
        // SAFETY: as above.
        unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream)? };

        let params = route_choice_weights::Params {
            logits_ptr: args.logits,
            chosen_ptr,
            ids_ptr: args.topk_ids,
            weights_ptr: args.topk_weights,
            counts_ptr: args.tokens_per_expert.unwrap_or(0),
            logits_stride_bytes: self.logits_stride_bytes,
            ids_stride_bytes: self.ids_stride_bytes,
            weights_stride_bytes: self.weights_stride_bytes,
            eps_bits: self.scale.eps,
            floor_bits: self.scale.floor,
            scaling_bits: self.scale.scaling,
            num_tokens,
            num_experts: self.num_experts,
            score: self.score,
            rule: self.scale.rule,
        };
        // SAFETY: as above.
        unsafe { driver.launch(&route_choice_weights::INSTANCES[0].kernel, &by_token, &params.to_bytes(), stream) }
    }
}
