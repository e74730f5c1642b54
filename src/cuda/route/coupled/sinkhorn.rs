//! Sinkhorn's iteration on the logits of all tokens (see [`crate::spec::Selection::Sinkhorn`]).

use super::super::problem::{Route, RouteArgs};
use super::WARPS;
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{
    Kernel, route_sinkhorn_columns, route_sinkhorn_exp, route_sinkhorn_rows, route_sinkhorn_values,
};
use crate::cuda::memory::Parts;
use crate::cuda::rows::stride_bytes;
use crate::element::Dtype;
use crate::error::Result;

/// The iterations, and where their numbers lie.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sinkhorn {
    iterations: usize,
    num_tokens: usize,
    num_experts: u32,
    logits_stride_bytes: u64,
    /// Offsets of `[num_tokens, num_experts]`, `[num_tokens]` and `[num_experts]` f64, the number of tokens as one f64, and
    /// `[num_tokens, num_experts]` f32.
    c: usize,
    row: usize,
    col: usize,
    live: usize,
    values: usize,
}

impl Sinkhorn {
    pub(super) fn new(problem: &Route, iterations: usize, parts: &mut Parts) -> Result<Self> {
        let (num_tokens, num_experts) = (problem.num_tokens, problem.spec.num_experts);
        let count = num_tokens.saturating_mul(num_experts);
        Ok(Sinkhorn {
            iterations,
            num_tokens,
            num_experts: num_experts as u32, // at most 1024
            logits_stride_bytes: stride_bytes("logits", Dtype::F32, num_tokens, problem.logits_stride)?,
            c: parts.part(count, 8),
            row: parts.part(num_tokens, 8),
            col: parts.part(num_experts, 8),
            live: parts.part(1, 8),
            values: parts.part(count, 4),
        })
    }

    pub(super) fn kernels(&self) -> Vec<&'static Kernel> {
        vec![
            &route_sinkhorn_exp::INSTANCES[0].kernel,
            &route_sinkhorn_rows::INSTANCES[0].kernel,
            &route_sinkhorn_columns::INSTANCES[0].kernel,
            &route_sinkhorn_values::INSTANCES[0].kernel,
        ]
    }

    /// Queues it, and gives the balanced values; there must be a token.
    ///
    /// # Safety
    /// As for `Coupled::launch`.
    pub(super) unsafe fn launch(&self, driver: &dyn Driver, args: &RouteArgs, stream: Stream) -> Result<u64> {
        let at = |offset: usize| args.workspace + offset as u64;
        let (c_ptr, row_ptr, col_ptr, live_ptr) = (at(self.c), at(self.row), at(self.col), at(self.live));
        let (num_tokens, num_experts) = (self.num_tokens as u32, self.num_experts); // at most 2^31 - 1
        let mask_ptr = args.token_mask.unwrap_or(0);
        let by_token = Launch::grid([self.num_tokens.div_ceil(WARPS) as u32, 1, 1]);

        let params = route_sinkhorn_exp::Params {
            logits_ptr: args.logits,
            mask_ptr,
            c_ptr,
            col_ptr,
            live_ptr,
            logits_stride_bytes: self.logits_stride_bytes,
            num_tokens,
            num_experts,
        };
        // SAFETY: the caller's promise, also below.
        unsafe { driver.launch(&route_sinkhorn_exp::INSTANCES[0].kernel, &by_token, &params.to_bytes(), stream)? };
        for _ in 0..self.iterations {
            let params =
                route_sinkhorn_rows::Params { c_ptr, mask_ptr, col_ptr, live_ptr, row_ptr, num_tokens, num_experts };
            let kernel = &route_sinkhorn_rows::INSTANCES[0].kernel;
            let launch = Launch::grid([num_tokens.div_ceil(kernel.threads), 1, 1]);
            // SAFETY: as above.
            unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream)? };
            let params = route_sinkhorn_columns::Params { c_ptr, mask_ptr, row_ptr, col_ptr, num_tokens, num_experts };
            let kernel = &route_sinkhorn_columns::INSTANCES[0].kernel;
            let launch = Launch::grid([num_experts.div_ceil(kernel.threads), 1, 1]);
            // SAFETY: as above.
            unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream)? };
        }
        let values_ptr = at(self.values);
        let params = route_sinkhorn_values::Params { c_ptr, row_ptr, col_ptr, values_ptr, num_tokens, num_experts };
        // SAFETY: as above.
        unsafe { driver.launch(&route_sinkhorn_values::INSTANCES[0].kernel, &by_token, &params.to_bytes(), stream)? };
        Ok(values_ptr)
    }
}
