//! Routing: from logits to the experts of each token and their weights.
//!
//! ```text
//! tokens          experts and scores of each token by itself, in parallel (`top_k`, `select`, `exp`)
//! sinkhorn        before that: the balanced logits
//! expert_choice   in its place: every expert takes its tokens
//! capacity        after it: second experts by chance, queues; then the weights of what is left
//! losses          a pass of its own
//! ```

mod capacity;
mod exact;
mod exp;
mod expert_choice;
mod losses;
mod select;
mod sinkhorn;
mod tokens;
mod top_k;

use super::Cpu;
use super::level::Level;
use super::parallel;
use super::workspace::{Carver, part_bytes};
use crate::Result;
use crate::args::{RouteInput, RouteOutput};
use crate::spec::{Router, SecondExpert, Selection};

/// From logits to the experts of each token and their weights.
///
/// Per token, with logits `l`:
/// 1. Scores ([`crate::spec::Score`]) and selection values: what the values are, and at which point they are rounded to f32, stands at
///    [`Router`]. A value of NaN ranks below every number, also below -inf; equal values go to the lower expert.
/// 2. Experts, as [`Router::groups`] and [`Selection`] say, best first.
/// 3. `w = score[topk_ids]`, then [`Router::renormalize`] over the slots in order, then times [`Router::scaling_factor`].
/// 4. [`Router::second_expert`], then [`Router::capacity`] may drop slots: id -1, weight 0.
///
/// * `logits`: `[num_tokens, num_experts]`; outputs: [`RouteOutput`]
///
/// A masked token (`token_mask` 0) gets ids -1 and weights 0, queues nowhere, and counts in no loss; it does count in the number of tokens that a
/// capacity factor multiplies, so that the limit does not depend on the data. With [`Selection::ExpertChoice`] no expert takes it: where
/// too few tokens are left, the rest of `expert_tokens` is -1.
///
/// `dropped` counts the slots of unmasked tokens that step 4 dropped; `tokens_per_expert` what is left. The losses are those of
/// [`crate::spec::AuxLoss`] and `mean(lse(l)^2)`, over the tokens that neither mask leaves out; 0 if there are none.
///
/// Ids are always distinct and in range, whatever the logits, and the same at every level. Weights are computed in f64 and rounded
/// once. Weights of a token with a NaN logit may be NaN; so may those of a token whose renormalisation divides by 0, which
/// an epsilon or a floor prevents.
///
/// # Errors
/// Those of [`RouteInput::check`]. Nothing is written then.
///
/// Shazeer et al. 2017, arXiv:1701.06538; GShard, arXiv:2006.16668; Switch, arXiv:2101.03961; DeepSeek-V3, arXiv:2412.19437;
/// other sources stand at the options.
pub fn route(cpu: &mut Cpu, spec: &Router, input: &RouteInput<'_>, mut output: RouteOutput<'_>) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    let mut carver = cpu.workspace.carve(route_workspace_bytes(spec, num_tokens));
    route_in(cpu.level, &mut carver, spec, input, &mut output);
    Ok(())
}

/// Workspace of [`route`] in the current thread pool; 0 for a specification that is not valid, whose call is an error.
pub fn route_workspace_bytes(spec: &Router, num_tokens: usize) -> usize {
    if spec.validate().is_err() {
        return 0;
    }
    let experts = spec.num_experts;
    let own = if spec.selection == Selection::ExpertChoice {
        expert_choice::workspace_bytes(spec, num_tokens)
    } else {
        let mut bytes = tokens::workspace_bytes(spec, num_tokens);
        if matches!(spec.selection, Selection::Sinkhorn { .. }) {
            bytes = bytes.saturating_add(sinkhorn::workspace_bytes(experts, num_tokens));
        }
        if drops(spec) {
            bytes = bytes.saturating_add(capacity::workspace_bytes(spec, num_tokens));
        }
        bytes
    };
    own.saturating_add(losses::workspace_bytes(spec, num_tokens))
        .saturating_add(part_bytes::<u32>(parallel::max_workers().saturating_mul(counts_len(experts))))
}

/// Whether slots may be dropped after the choice.
fn drops(spec: &Router) -> bool {
    spec.capacity.is_some() || spec.second_expert == SecondExpert::Random
}

/// Counters of one worker: no two workers share a cache line.
fn counts_len(num_experts: usize) -> usize {
    num_experts.saturating_add(15) / 16 * 16
}

/// [`route`] for arguments that were checked, in memory that [`route_workspace_bytes`] has told.
pub(super) fn route_in(
    level: Level,
    carver: &mut Carver<'_>,
    spec: &Router,
    input: &RouteInput<'_>,
    output: &mut RouteOutput<'_>,
) {
    let counts = carver.part::<u32>(parallel::max_workers() * counts_len(spec.num_experts));
    counts.fill(0);
    let mut dropped = 0;
    if spec.selection == Selection::ExpertChoice {
        expert_choice::route(level, carver, spec, input, output, counts);
    } else {
        let balanced = match spec.selection {
            Selection::Sinkhorn { iterations } => Some(sinkhorn::balance(level, carver, input, iterations)),
            _ => None,
        };
        if drops(spec) {
            let scores = capacity::scores(carver, spec, input);
            tokens::choose(level, carver, spec, input, balanced.as_ref(), Some(&mut *scores), output, counts);
            dropped = capacity::drop(carver, spec, input, scores, output, counts);
        } else {
            tokens::choose(level, carver, spec, input, balanced.as_ref(), None, output, counts);
        }
    }
    if let Some(out) = &mut output.tokens_per_expert {
        sum_counts(counts, out);
    }
    if let Some(out) = &mut output.dropped {
        **out = dropped;
    }
    losses::losses(level, carver, spec, input, output);
}

/// The counts of all workers.
fn sum_counts(counts: &[u32], out: &mut [u32]) {
    out.fill(0);
    for worker in counts.chunks_exact(counts_len(out.len())) {
        for (out, count) in out.iter_mut().zip(worker) {
            *out += count;
        }
    }
}
