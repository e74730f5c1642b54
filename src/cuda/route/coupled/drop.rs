//! Slots that are not used: second experts by chance, and requests beyond an expert's capacity; then the weights.

use super::super::problem::{Route, RouteArgs};
use super::super::tokens::{Largest, Scale};
use super::WARPS;
use super::sort::Sort;
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::group_tokens::division;
use crate::cuda::kernels::{Kernel, route_queue, route_weights};
use crate::cuda::memory::Parts;
use crate::cuda::rows::stride_bytes;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::{CapacityOrder, SecondExpert};

/// Drops slots of the ids, then writes weights from the scores, and counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Drop {
    num_tokens: usize,
    top_k: u32,
    ids_stride_bytes: u64,
    weights_stride_bytes: u64,
    scale: Scale,
    /// Second experts are used by chance.
    draws: bool,
    /// Dropped slots count as 0 in the weights.
    used_only: bool,
    queue: Option<Queue>,
    /// Offset of the scores.
    scores: usize,
}

/// Groups of tokens that queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Queue {
    num_experts: u32,
    group_len: u32,
    limit: u32,
    /// Of the last group, which may be shorter.
    last_limit: u32,
    order: Option<Order>,
}

/// The order of the queue by score.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Order {
    largest: Largest,
    /// Offset of the largest probabilities.
    keys: usize,
    sort: Sort,
}

impl Drop {
    pub(super) fn new(problem: &Route, parts: &mut Parts) -> Result<Self> {
        let (spec, num_tokens) = (&problem.spec, problem.num_tokens);
        let queue = match &spec.capacity {
            Some(capacity) if num_tokens > 0 => {
                let len = capacity.group_len.unwrap_or(num_tokens).min(num_tokens);
                let groups = num_tokens.div_ceil(len);
                let round = kernel_of_queue().threads as usize * route_queue::INSTANCES[0].items as usize;
                if len.saturating_mul(spec.top_k) > i32::MAX as usize - round {
                    let case = format!("queues of {len} tokens with {} experts each", spec.top_k);
                    return Err(Error::unsupported("cuda", case));
                }
                let limit = |tokens| u32::try_from(capacity.tokens(tokens, spec.top_k, spec.num_experts));
                let order = match capacity.order {
                    CapacityOrder::Position => None,
                    CapacityOrder::Score => Some(Order {
                        largest: Largest::new(problem)?,
                        keys: parts.part(num_tokens, 4),
                        sort: Sort::new(num_tokens, len, true, parts)?,
                    }),
                };
                Some(Queue {
                    num_experts: spec.num_experts as u32, // at most 1024
                    group_len: len as u32,
                    limit: limit(len).unwrap_or(u32::MAX),
                    last_limit: limit(num_tokens - (groups - 1) * len).unwrap_or(u32::MAX),
                    order,
                })
            }
            _ => None,
        };
        let stride = |name, stride| stride_bytes(name, Dtype::F32, num_tokens, stride);
        Ok(Drop {
            num_tokens,
            top_k: spec.top_k as u32, // at most 32
            ids_stride_bytes: stride("topk_ids", problem.topk_ids_stride)?,
            weights_stride_bytes: stride("topk_weights", problem.topk_weights_stride)?,
            scale: Scale::new(problem),
            draws: spec.second_expert == SecondExpert::Random,
            used_only: spec.capacity.is_some_and(|c| c.normalize_after_drop),
            queue,
            scores: parts.part(num_tokens.saturating_mul(spec.top_k), 8),
        })
    }

    pub(super) fn kernels(&self) -> Vec<&'static Kernel> {
        let mut kernels = vec![&route_weights::INSTANCES[0].kernel];
        if let Some(queue) = &self.queue {
            kernels.push(kernel_of_queue());
            if let Some(order) = &queue.order {
                kernels.push(order.largest.kernel());
                kernels.extend(order.sort.kernels());
            }
        }
        kernels
    }

    /// Where the scores of the chosen are wanted.
    pub(super) fn scores(&self, args: &RouteArgs) -> u64 {
        args.workspace + self.scores as u64
    }

    /// Queues it; there must be a token.
    ///
    /// # Safety
    /// `args` as for `Coupled::launch`; ids and scores were written.
    pub(super) unsafe fn launch(&self, driver: &dyn Driver, args: &RouteArgs, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let Some(queue) = &self.queue else { return self.weights(driver, args, self.draws, true, stream) };
            if self.draws {
                self.weights(driver, args, true, false, stream)?;
            }
            let order = match &queue.order {
                Some(order) => {
                    let keys = args.workspace + order.keys as u64;
                    order.largest.launch(driver, args, keys, stream)?;
                    order.sort.launch(driver, keys, args.workspace, stream)?
                }
                None => 0,
            };
            self.queue(driver, args, queue, order, stream)?;
            self.weights(driver, args, false, true, stream)
        }
    }

    /// # Safety
    /// As [`Drop::launch`]; `order` holds the tokens of each group, or is 0.
    unsafe fn queue(
        &self,
        driver: &dyn Driver,
        args: &RouteArgs,
        queue: &Queue,
        order: u64,
        stream: Stream,
    ) -> Result<()> {
        let kernel = kernel_of_queue();
        let (len_magic, len_shift) = division(queue.group_len);
        let padded_experts = queue.num_experts.next_multiple_of(8);
        let params = route_queue::Params {
            ids_ptr: args.topk_ids,
            order_ptr: order,
            ids_stride_bytes: self.ids_stride_bytes,
            num_tokens: self.num_tokens as u32, // at most 2^31 - 1
            top_k: self.top_k,
            group_len: queue.group_len,
            len_magic,
            len_shift,
            limit: queue.limit,
            last_limit: queue.last_limit,
            num_experts: queue.num_experts,
            padded_experts,
        };
        let launch = Launch {
            // 16-bit counts of every warp and of all; 32 bits for the requests so far
            dynamic_shared_bytes: (2 * (kernel.threads / 32 + 1) + 4) * padded_experts,
            ..Launch::grid([(self.num_tokens as u32).div_ceil(queue.group_len), 1, 1])
        };
        // SAFETY: the caller's promise.
        unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream) }
    }

    /// # Safety
    /// As [`Drop::launch`].
    unsafe fn weights(
        &self,
        driver: &dyn Driver,
        args: &RouteArgs,
        draws: bool,
        weighs: bool,
        stream: Stream,
    ) -> Result<()> {
        let params = route_weights::Params {
            scores_ptr: self.scores(args),
            mask_ptr: args.token_mask.unwrap_or(0),
            ids_ptr: args.topk_ids,
            weights_ptr: args.topk_weights,
            counts_ptr: args.tokens_per_expert.unwrap_or(0),
            dropped_ptr: args.dropped.unwrap_or(0),
            ids_stride_bytes: self.ids_stride_bytes,
            weights_stride_bytes: self.weights_stride_bytes,
            eps_bits: self.scale.eps,
            floor_bits: self.scale.floor,
            scaling_bits: self.scale.scaling,
            seed_low: args.seed as u32,
            seed_high: (args.seed >> 32) as u32,
            num_tokens: self.num_tokens as u32, // at most 2^31 - 1
            top_k: self.top_k,
            rule: self.scale.rule,
            draws: u32::from(draws),
            weighs: u32::from(weighs),
            used_only: u32::from(self.used_only),
        };
        let launch = Launch::grid([self.num_tokens.div_ceil(WARPS) as u32, 1, 1]);
        // SAFETY: the caller's promise.
        unsafe { driver.launch(&route_weights::INSTANCES[0].kernel, &launch, &params.to_bytes(), stream) }
    }
}

fn kernel_of_queue() -> &'static Kernel {
    &route_queue::INSTANCES[0].kernel
}
