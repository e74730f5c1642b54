//! Routers whose tokens are coupled: capacity and second experts by chance, expert choice, Sinkhorn.
//!
//! The plan calls these steps in place of [`Tokens`](super::tokens::Tokens) with weights. `tokens_per_expert` and `dropped` are 0
//! when they begin.

use super::problem::{Route, RouteArgs};
use crate::cuda::driver::{Driver, Stream};
use crate::cuda::kernels::Kernel;
use crate::cuda::memory::Parts;
use crate::error::{Error, Result};
use crate::spec::{Router, SecondExpert, Selection};

/// Whether a token's experts depend on other tokens, or on its number.
pub(super) fn is_coupled(spec: &Router) -> bool {
    matches!(spec.selection, Selection::ExpertChoice | Selection::Sinkhorn { .. })
        || spec.capacity.is_some()
        || spec.second_expert == SecondExpert::Random
}

/// The steps of a coupled router.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Coupled {}

impl Coupled {
    /// Lays out its part of the workspace.
    pub(super) fn new(problem: &Route, _parts: &mut Parts) -> Result<Self> {
        let spec = &problem.spec;
        let case = match spec.selection {
            Selection::ExpertChoice => "expert choice",
            Selection::Sinkhorn { .. } => "Sinkhorn",
            _ if spec.capacity.is_some() => "a capacity",
            _ => "a second expert by chance",
        };
        Err(Error::unsupported("cuda", format!("routing with {case}")))
    }

    /// Every kernel that a launch may use.
    pub(super) fn kernels(&self) -> Vec<&'static Kernel> {
        Vec::new()
    }

    /// Queues the steps; there may be no token.
    ///
    /// # Safety
    /// `args` holds the arrays of the plan's problem, checked as `RoutePlan::launch` does, and a workspace that is large enough.
    pub(super) unsafe fn launch(&self, _driver: &dyn Driver, _args: &RouteArgs, _stream: Stream) -> Result<()> {
        Ok(())
    }
}
