//! Attention of many query rows: prompts, appended tokens, encoders.

use super::AttentionArgs;
use super::problem::Geometry;
use crate::cuda::driver::{Driver, Limits, Stream};
use crate::error::{Error, Result};

/// A call of the prefill kernels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PrefillPlan {
    geometry: Geometry,
}

impl PrefillPlan {
    pub fn new(geometry: Geometry, _limits: &Limits) -> Result<Self> {
        Err(Error::unsupported("cuda", format!("attention of {} tokens", geometry.num_tokens)))
    }

    pub fn kernel(&self) -> &'static str {
        ""
    }

    pub fn warmup(&self, _driver: &dyn Driver) -> Result<()> {
        Ok(())
    }

    /// # Safety
    /// As [`AttentionPlan::launch`](super::AttentionPlan::launch).
    pub unsafe fn launch(&self, _driver: &dyn Driver, args: &AttentionArgs, _stream: Stream) -> Result<()> {
        self.geometry.check_args(args)
    }
}
