//! Load-balancing loss and z-loss: chunks of tokens, then groups, then the losses, each sum in a fixed order.

use super::problem::{Route, RouteArgs};
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, route_losses, route_losses_groups, route_losses_total};
use crate::cuda::memory::Parts;
use crate::cuda::rows::stride_bytes;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::AuxLoss;

/// Chunks of a group at most, which run at the same time: two for each multiprocessor of a large device.
const MAX_CHUNKS: usize = 256;

/// Tokens of a chunk at least: its sums are as large as two rows of logits in f64.
const MIN_CHUNK: usize = 8;

/// The kernels and the cut of tokens into groups and chunks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Losses {
    kernel: &'static Kernel,
    num_tokens: u32,
    num_experts: u32,
    logits_stride_bytes: u64,
    /// Largest logits of a token that count as chosen; 0: no balance is wanted.
    chosen: u32,
    mean_of_groups: bool,
    group_len: u32,
    chunk_len: u32,
    chunks_per_group: u32,
    groups: u32,
    /// Where the sums of chunks and of groups lie in the workspace.
    partial: usize,
    sums: usize,
}

impl Losses {
    /// What the problem asks for, if anything; lays out its part of the workspace.
    pub(super) fn new(problem: &Route, parts: &mut Parts) -> Result<Option<Self>> {
        if !problem.aux_loss && !problem.z_loss {
            return Ok(None);
        }
        let (spec, all) = (&problem.spec, problem.num_tokens.max(1));
        let (chosen, group_len, mean_of_groups) = match spec.aux_loss {
            Some(AuxLoss::TopK) if problem.aux_loss => (spec.top_k, all, false),
            Some(AuxLoss::Switch { group_len }) if problem.aux_loss => (1, group_len.map_or(all, |n| n.min(all)), true),
            _ => (0, all, false),
        };
        // The table has an instance for 1024 experts, and `Route::check` has seen that there are no more.
        let instance = route_losses::INSTANCES
            .iter()
            .find(|instance| 32 * instance.values as usize >= spec.num_experts)
            .ok_or_else(|| Error::unsupported("cuda", format!("{} experts", spec.num_experts)))?;
        let groups = problem.num_tokens.div_ceil(group_len);
        let chunk_len = group_len.div_ceil(MAX_CHUNKS).max(MIN_CHUNK).min(group_len);
        let chunks_per_group = group_len.div_ceil(chunk_len);
        let sums_of_chunk = if chosen > 0 { 2 * spec.num_experts + 2 } else { 2 };
        let chunks = groups.saturating_mul(chunks_per_group);
        if chunks > i32::MAX as usize {
            return Err(Error::value("aux_loss.group_len", "groups of which a grid holds all chunks", group_len));
        }
        Ok(Some(Losses {
            kernel: &instance.kernel,
            num_tokens: problem.num_tokens as u32, // at most 2^31 - 1, as all that is made of it
            num_experts: spec.num_experts as u32,
            logits_stride_bytes: stride_bytes("logits", Dtype::F32, problem.num_tokens, problem.logits_stride)?,
            chosen: chosen as u32,
            mean_of_groups,
            group_len: group_len as u32,
            chunk_len: chunk_len as u32,
            chunks_per_group: chunks_per_group as u32,
            groups: groups as u32,
            partial: parts.part(chunks.saturating_mul(sums_of_chunk), 8),
            sums: parts.part(groups.saturating_mul(3), 8),
        }))
    }

    /// Every kernel that a launch may use.
    pub(super) fn kernels(&self) -> [&'static Kernel; 3] {
        [self.kernel, &route_losses_groups::INSTANCES[0].kernel, &route_losses_total::INSTANCES[0].kernel]
    }

    /// Queues the three kernels; without a token, the last one alone.
    ///
    /// # Safety
    /// `args` holds the arrays of the plan's problem, checked as `RoutePlan::launch` does, and a workspace that is large enough.
    pub(super) unsafe fn launch(&self, driver: &dyn Driver, args: &RouteArgs, stream: Stream) -> Result<()> {
        let [chunks_kernel, groups_kernel, total_kernel] = self.kernels();
        let (partial, sums) = (args.workspace + self.partial as u64, args.workspace + self.sums as u64);
        if self.groups > 0 {
            let params = route_losses::Params {
                logits_ptr: args.logits,
                mask_ptr: args.token_mask.unwrap_or(0),
                loss_mask_ptr: args.loss_mask.unwrap_or(0),
                partial_ptr: partial,
                logits_stride_bytes: self.logits_stride_bytes,
                num_tokens: self.num_tokens,
                num_experts: self.num_experts,
                chosen: self.chosen,
                group_len: self.group_len,
                chunk_len: self.chunk_len,
                chunks_per_group: self.chunks_per_group,
            };
            let launch = Launch::grid([self.groups * self.chunks_per_group, 1, 1]);
            // SAFETY: the caller's promise; the workspace holds the sums of all chunks.
            unsafe { driver.launch(chunks_kernel, &launch, &params.to_bytes(), stream)? };
            let params = route_losses_groups::Params {
                partial_ptr: partial,
                sums_ptr: sums,
                num_experts: self.num_experts,
                chunks_per_group: self.chunks_per_group,
                balance: u32::from(self.chosen > 0),
            };
            // SAFETY: as above, and those of all groups.
            unsafe { driver.launch(groups_kernel, &Launch::grid([self.groups, 1, 1]), &params.to_bytes(), stream)? };
        }
        let params = route_losses_total::Params {
            sums_ptr: sums,
            aux_ptr: args.aux_loss.unwrap_or(0),
            z_ptr: args.z_loss.unwrap_or(0),
            num_groups: self.groups,
            factor: self.num_experts,
            mean_of_groups: u32::from(self.mean_of_groups),
        };
        // SAFETY: as above.
        unsafe { driver.launch(total_kernel, &Launch::grid([1; 3]), &params.to_bytes(), stream) }
    }
}
