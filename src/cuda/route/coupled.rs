//! Routers whose tokens are coupled: capacity and second experts by chance, expert choice, Sinkhorn.
//!
//! ```text
//! sinkhorn        before the choice: the balanced logits, which top-k compares
//! expert_choice   in its place: every expert takes its tokens
//! drop            after it: second experts by chance, queues; then the weights of what is left
//! sort            places in a queue, and tokens of an expert, best first
//! ```
//!
//! The plan calls these steps in place of [`Tokens`] with weights. `tokens_per_expert` and `dropped` are 0 when they begin.

mod drop;
mod expert_choice;
mod sinkhorn;
mod sort;

use super::problem::{Route, RouteArgs};
use super::tokens::{Extra, Gives, Tokens};
use crate::cuda::driver::{Driver, Stream};
use crate::cuda::kernels::Kernel;
use crate::cuda::memory::Parts;
use crate::error::Result;
use crate::spec::{Router, SecondExpert, Selection};
use drop::Drop;
use expert_choice::ExpertChoice;
use sinkhorn::Sinkhorn;

/// Tokens of a CTA, in every kernel here that gives one a warp.
const WARPS: usize = 4;

/// Whether a token's experts depend on other tokens, or on its number.
pub(super) fn is_coupled(spec: &Router) -> bool {
    matches!(spec.selection, Selection::ExpertChoice | Selection::Sinkhorn { .. }) || drops(spec)
}

/// Whether slots may be dropped after the choice.
fn drops(spec: &Router) -> bool {
    spec.selection != Selection::ExpertChoice && (spec.capacity.is_some() || spec.second_expert == SecondExpert::Random)
}

/// The steps of a coupled router.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Coupled {
    num_tokens: usize,
    choice: Choice,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Choice {
    Experts(Box<ExpertChoice>),
    Tokens(Box<TokenChoice>),
}

/// Tokens choose; what comes before and after.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TokenChoice {
    sinkhorn: Option<Sinkhorn>,
    tokens: Tokens,
    drop: Option<Drop>,
}

impl Coupled {
    /// Lays out its part of the workspace.
    pub(super) fn new(problem: &Route, parts: &mut Parts) -> Result<Self> {
        let spec = &problem.spec;
        let choice = if spec.selection == Selection::ExpertChoice {
            Choice::Experts(Box::new(ExpertChoice::new(problem, parts)?))
        } else {
            let sinkhorn = match spec.selection {
                Selection::Sinkhorn { iterations } => Some(Sinkhorn::new(problem, iterations, parts)?),
                _ => None,
            };
            let gives = if drops(spec) { Gives::Scores } else { Gives::Weights };
            Choice::Tokens(Box::new(TokenChoice {
                tokens: Tokens::new(problem, gives, sinkhorn.is_some())?,
                drop: if drops(spec) { Some(Drop::new(problem, parts)?) } else { None },
                sinkhorn,
            }))
        };
        Ok(Coupled { num_tokens: problem.num_tokens, choice })
    }

    /// Every kernel that a launch may use.
    pub(super) fn kernels(&self) -> Vec<&'static Kernel> {
        match &self.choice {
            Choice::Experts(choice) => choice.kernels(),
            Choice::Tokens(choice) => {
                let TokenChoice { sinkhorn, tokens, drop } = &**choice;
                let mut kernels = sinkhorn.as_ref().map_or(Vec::new(), Sinkhorn::kernels);
                kernels.push(tokens.kernel());
                kernels.extend(drop.as_ref().map_or(Vec::new(), Drop::kernels));
                kernels
            }
        }
    }

    /// Queues the steps; there may be no token.
    ///
    /// # Safety
    /// `args` holds the arrays of the plan's problem, checked as `RoutePlan::launch` does, and a workspace that is large enough.
    pub(super) unsafe fn launch(&self, driver: &dyn Driver, args: &RouteArgs, stream: Stream) -> Result<()> {
        if self.num_tokens == 0 {
            return Ok(());
        }
        match &self.choice {
            // SAFETY: the caller's promise; every step finds its arrays in the part of the workspace that it laid out.
            Choice::Experts(choice) => unsafe { choice.launch(driver, args, stream) },
            Choice::Tokens(choice) => {
                let TokenChoice { sinkhorn, tokens, drop } = &**choice;
                let mut extra = Extra::default();
                if let Some(sinkhorn) = sinkhorn {
                    // SAFETY: as above.
                    extra.values = unsafe { sinkhorn.launch(driver, args, stream)? };
                }
                match drop {
                    Some(drop) => extra.scores = drop.scores(args),
                    None => extra.counts = args.tokens_per_expert.unwrap_or(0),
                }
                // SAFETY: as above; what the choice reads and writes is what it was planned for.
                unsafe { tokens.launch(driver, args, extra, stream)? };
                match drop {
                    // SAFETY: as above.
                    Some(drop) => unsafe { drop.launch(driver, args, stream) },
                    None => Ok(()),
                }
            }
        }
    }
}
