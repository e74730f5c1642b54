//! Every token chooses its experts by itself: top-k, prototypes, the sparse mixer.

use super::problem::{Route, RouteArgs};
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, route, route_largest, route_prototypes, route_sparse_mixer};
use crate::cuda::rows::stride_bytes;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::{GroupScore, Renormalize, Router, Score, Selection};

/// Tokens of a CTA, in every kernel here: a warp each.
const WARPS: usize = 4;

/// What the choice gives, besides the ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Gives {
    /// `topk_weights` as the caller wants them, and the counts.
    Weights,
    /// Scores of the chosen in f64, neither renormalised nor scaled (of the sparse mixer: the weights), for a step that drops
    /// slots and writes the weights: [`Extra::scores`]. `topk_weights` is not written.
    Scores,
}

/// Memory beyond the arrays of the call.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extra {
    /// `[num_tokens, num_experts]` f32, contiguous: compared in place of what the specification says (top-k only); 0: none.
    pub values: u64,
    /// `[num_tokens, top_k]` f64, contiguous, written for [`Gives::Scores`]; a masked token's are 0.
    pub scores: u64,
    /// `[num_experts]` u32 to which the ids are added; 0: not wanted.
    pub counts: u64,
}

/// The kernel and its scalar parameters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tokens {
    rule: Rule,
    gives: Gives,
    num_ctas: u32,
    num_tokens: u32,
    num_experts: u32,
    top_k: u32,
    logits_stride_bytes: u64,
    ids_stride_bytes: u64,
    weights_stride_bytes: u64,
    score: u32,
    compare: u32,
    scale: Scale,
}

/// How experts are found, with what that needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Rule {
    TopK {
        kernel: &'static Kernel,
        softmax_over: u32,
        groups: Groups,
    },
    Prototypes {
        group_size: u32,
    },
    SparseMixer {
        /// An f64 by its bits.
        twice_jitter: u64,
    },
}

/// Groups of experts as kernels take them; all 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Groups {
    num: u32,
    top: u32,
    size: u32,
    /// `ceil(2^20 / size)`: `(e * magic) >> 20` is `e / size` for up to 1024 experts.
    magic: u32,
    sum: u32,
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
        let by_score = !values && !spec.selects_on_logits(problem.selection_bias);
        let rule = match spec.selection {
            Selection::Prototypes => Rule::Prototypes { group_size: (spec.num_experts / spec.top_k) as u32 },
            Selection::SparseMixer { jitter_eps } => Rule::SparseMixer { twice_jitter: (2.0 * jitter_eps).to_bits() },
            Selection::TopK | Selection::Sinkhorn { .. } => {
                // The table has an instance for 1024 experts, and `Route::check` has seen that there are no more.
                let instance = route::INSTANCES
                    .iter()
                    .find(|instance| 32 * instance.values as usize >= spec.num_experts)
                    .ok_or_else(|| Error::unsupported("cuda", format!("{} experts", spec.num_experts)))?;
                // A divisor that grows with the scores makes the sum over all experts cancel; any other shift will do then.
                let cancels = matches!(spec.renormalize, Renormalize::L2) || spec.renormalize == Renormalize::sum();
                let softmax_over = match spec.score {
                    Score::Softmax if gives == Gives::Weights && !by_score && cancels => 2,
                    Score::Softmax => 1,
                    _ => 0,
                };
                Rule::TopK { kernel: &instance.kernel, softmax_over, groups: groups(spec) }
            }
            Selection::ExpertChoice => return Err(Error::unsupported("cuda", "tokens that choose, for expert choice")),
        };
        let stride = |name, stride| stride_bytes(name, Dtype::F32, problem.num_tokens, stride);
        Ok(Tokens {
            rule,
            gives,
            num_ctas: problem.num_tokens.div_ceil(WARPS) as u32, // at most 2^31 - 1 tokens
            num_tokens: problem.num_tokens as u32,
            num_experts: spec.num_experts as u32,
            top_k: spec.top_k as u32,
            logits_stride_bytes: stride("logits", problem.logits_stride)?,
            ids_stride_bytes: stride("topk_ids", problem.topk_ids_stride)?,
            weights_stride_bytes: stride("topk_weights", problem.topk_weights_stride)?,
            score: score_number(spec.score),
            compare: u32::from(by_score),
            scale: Scale::new(problem),
        })
    }

    pub(super) fn kernel(&self) -> &'static Kernel {
        match &self.rule {
            Rule::TopK { kernel, .. } => kernel,
            Rule::Prototypes { .. } => &route_prototypes::INSTANCES[0].kernel,
            Rule::SparseMixer { .. } => &route_sparse_mixer::INSTANCES[0].kernel,
        }
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
        let launch = Launch::grid([self.num_ctas, 1, 1]);
        let (weights_ptr, scores_ptr) = match self.gives {
            Gives::Weights => (args.topk_weights, 0),
            Gives::Scores => (0, extra.scores),
        };
        let (bias_ptr, mask_ptr) = (args.selection_bias.unwrap_or(0), args.token_mask.unwrap_or(0));
        let Tokens { logits_stride_bytes, ids_stride_bytes, weights_stride_bytes, .. } = *self;
        let Tokens { num_tokens, num_experts, top_k, score, compare, .. } = *self;
        let Scale { rule, eps: eps_bits, floor: floor_bits, scaling: scaling_bits } = self.scale;
        let launch_with = |params: &[u8]| {
            // SAFETY: the caller's promise.
            unsafe { driver.launch(self.kernel(), &launch, params, stream) }
        };
        match self.rule {
            Rule::TopK { softmax_over, groups, .. } => launch_with(
                &route::Params {
                    logits_ptr: args.logits,
                    values_ptr: extra.values,
                    bias_ptr,
                    mask_ptr,
                    ids_ptr: args.topk_ids,
                    weights_ptr,
                    scores_ptr,
                    counts_ptr: extra.counts,
                    logits_stride_bytes,
                    ids_stride_bytes,
                    weights_stride_bytes,
                    eps_bits,
                    floor_bits,
                    scaling_bits,
                    num_tokens,
                    num_experts,
                    top_k,
                    score,
                    compare,
                    softmax_over,
                    rule,
                    num_groups: groups.num,
                    top_groups: groups.top,
                    group_size: groups.size,
                    group_magic: groups.magic,
                    group_sum: groups.sum,
                }
                .to_bytes(),
            ),
            Rule::Prototypes { group_size } => launch_with(
                &route_prototypes::Params {
                    logits_ptr: args.logits,
                    bias_ptr,
                    mask_ptr,
                    ids_ptr: args.topk_ids,
                    weights_ptr,
                    scores_ptr,
                    counts_ptr: extra.counts,
                    logits_stride_bytes,
                    ids_stride_bytes,
                    weights_stride_bytes,
                    eps_bits,
                    floor_bits,
                    scaling_bits,
                    num_tokens,
                    top_k,
                    group_size,
                    score,
                    compare,
                    rule,
                }
                .to_bytes(),
            ),
            Rule::SparseMixer { twice_jitter } => launch_with(
                &route_sparse_mixer::Params {
                    logits_ptr: args.logits,
                    mask_ptr,
                    ids_ptr: args.topk_ids,
                    weights_ptr,
                    scores_ptr,
                    counts_ptr: extra.counts,
                    logits_stride_bytes,
                    ids_stride_bytes,
                    weights_stride_bytes,
                    twice_jitter_bits: twice_jitter,
                    num_tokens,
                    num_experts,
                }
                .to_bytes(),
            ),
        }
    }
}

/// Groups that leave something out.
fn groups(spec: &Router) -> Groups {
    match &spec.groups {
        Some(g) if g.top_groups < g.num_groups => {
            let size = spec.num_experts / g.num_groups;
            Groups {
                num: g.num_groups as u32,
                top: g.top_groups as u32,
                size: size as u32,
                magic: (1usize << 20).div_ceil(size) as u32,
                sum: u32::from(g.score == GroupScore::Top2Sum),
            }
        }
        _ => Groups::default(),
    }
}

/// The largest softmax probability of every token, in f32: the order of a queue by score.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Largest {
    num_tokens: usize,
    num_experts: u32,
    logits_stride_bytes: u64,
}

impl Largest {
    pub(super) fn new(problem: &Route) -> Result<Self> {
        Ok(Largest {
            num_tokens: problem.num_tokens,
            num_experts: problem.spec.num_experts as u32, // at most 1024
            logits_stride_bytes: stride_bytes("logits", Dtype::F32, problem.num_tokens, problem.logits_stride)?,
        })
    }

    pub(super) fn kernel(&self) -> &'static Kernel {
        &route_largest::INSTANCES[0].kernel
    }

    /// Queues it; there must be a token. `largest`: `[num_tokens]` f32; of masked tokens, too.
    ///
    /// # Safety
    /// `args` holds the arrays of the plan's problem, checked as `RoutePlan::launch` does; `largest` memory as it says.
    pub(super) unsafe fn launch(
        &self,
        driver: &dyn Driver,
        args: &RouteArgs,
        largest: u64,
        stream: Stream,
    ) -> Result<()> {
        let params = route_largest::Params {
            logits_ptr: args.logits,
            largest_ptr: largest,
            logits_stride_bytes: self.logits_stride_bytes,
            num_tokens: self.num_tokens as u32, // at most 2^31 - 1
            num_experts: self.num_experts,
        };
        let launch = Launch::grid([self.num_tokens.div_ceil(WARPS) as u32, 1, 1]);
        // SAFETY: the caller's promise.
        unsafe { driver.launch(self.kernel(), &launch, &params.to_bytes(), stream) }
    }
}
