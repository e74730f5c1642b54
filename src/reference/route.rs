//! Routing: logits, experts and weights per token, queues, losses.

mod capacity;
mod losses;
mod select;

use crate::args::{RouteInput, RouteOutput, check_router_logits};
use crate::spec::{Renormalize, Router, Selection};
use crate::view::{View, ViewMut};
use crate::{Element, Result};

/// The router's logits: `logits[t, e] = sum_d x[t, d] * weight[e, d] + bias[e]`.
///
/// `x[t, d] = hidden[t, d]`, with [`Router::jitter`] `hidden[t, d] * (1 + jitter * (2 u - 1))`, where `u` is draw `d` of token `t`
/// ([`crate::random::uniform`] with `seed`).
///
/// * `hidden`: `[num_tokens, hidden_size]`, `weight`: `[num_experts, hidden_size]`, `bias`: `[num_experts]`
/// * `logits`: `[num_tokens, num_experts]`
///
/// # Errors
/// Those of [`Router::validate`]; [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`]. Nothing is
/// written then.
pub fn router_logits<T: Element, W: Element, S: Element>(
    spec: &Router,
    hidden: View<'_, T, 2>,
    weight: View<'_, W, 2>,
    bias: Option<&[S]>,
    seed: u64,
    mut logits: ViewMut<'_, f64, 2>,
) -> Result<()> {
    let num_tokens = check_router_logits(spec, &hidden, bias, &logits)?;
    weight.check("weight", [spec.num_experts, hidden.shape()[1]])?;
    for t in 0..num_tokens {
        let factor = |d: usize| match spec.jitter {
            Some(jitter) => 1.0 + jitter * (2.0 * f64::from(crate::random::uniform(seed, t as u64, d as u64)) - 1.0),
            None => 1.0,
        };
        let x: Vec<f64> = hidden.row(&[t]).iter().enumerate().map(|(d, x)| x.to_f64() * factor(d)).collect();
        for e in 0..spec.num_experts {
            logits.set([t, e], super::ffn::dot(&x, weight.row(&[e])) + bias.map_or(0.0, |b| b[e].to_f64()));
        }
    }
    Ok(())
}

/// The experts of one token, slot by slot.
#[derive(Clone)]
struct Slots {
    /// -1: dropped, masked or unused.
    ids: Vec<i32>,
    /// What the weights are made of: the score of each expert (of the sparse mixer: the weight itself).
    scores: Vec<f64>,
    /// The result.
    weights: Vec<f64>,
}

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
/// Ids are always distinct and in range, whatever the logits. Weights of a token with a NaN logit may be NaN; so may those of a token whose
/// renormalisation divides by 0, which an epsilon or a floor prevents.
///
/// # Errors
/// Those of [`RouteInput::check`]. Nothing is written then.
///
/// Shazeer et al. 2017, arXiv:1701.06538; GShard, arXiv:2006.16668; Switch, arXiv:2101.03961; DeepSeek-V3, arXiv:2412.19437;
/// other sources stand at the options.
pub fn route<S: Element>(spec: &Router, input: &RouteInput<'_, S>, mut output: RouteOutput<'_, f64>) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    let logits: Vec<Vec<f64>> =
        (0..num_tokens).map(|t| input.logits.row(&[t]).iter().map(|l| l.to_f64()).collect()).collect();
    let live: Vec<bool> = (0..num_tokens).map(|t| input.token_mask.is_none_or(|m| m[t] != 0)).collect();

    let mut expert_tokens = Vec::new();
    let mut slots = if num_tokens == 0 {
        Vec::new()
    } else if spec.selection == Selection::ExpertChoice {
        expert_tokens = select::expert_choice(spec, &logits, &live);
        select::slots_of_tokens(spec, &logits, &expert_tokens)
    } else {
        select::token_choice(spec, &logits, &live, input.selection_bias)
    };

    // Weights as if nothing were dropped.
    for token in &mut slots {
        token.weights = renormalize(spec, token);
    }
    let before: usize = slots.iter().map(in_use).sum();
    capacity::drop_second_experts(spec, input.seed, &mut slots);
    capacity::drop_over_capacity(spec, &logits, &mut slots);
    let dropped = before - slots.iter().map(in_use).sum::<usize>();

    for token in &mut slots {
        if spec.capacity.is_some_and(|c| c.normalize_after_drop) {
            token.weights = renormalize(spec, token);
        }
        let scaling = match spec.selection {
            Selection::SparseMixer { .. } => 1.0,
            _ => spec.scaling_factor,
        };
        for (w, id) in token.weights.iter_mut().zip(&token.ids) {
            *w = if *id < 0 { 0.0 } else { *w * scaling };
        }
    }

    for (t, token) in slots.iter().enumerate() {
        output.topk_ids.row_mut(&[t]).copy_from_slice(&token.ids);
        output.topk_weights.row_mut(&[t]).copy_from_slice(&token.weights);
    }
    if let Some(counts) = output.tokens_per_expert {
        counts.fill(0);
        for id in slots.iter().flat_map(|token| &token.ids).filter(|id| **id >= 0) {
            counts[*id as usize] += 1;
        }
    }
    if let Some(out) = output.dropped {
        *out = dropped as u64;
    }
    if let Some(out) = &mut output.expert_tokens {
        for (e, tokens) in expert_tokens.iter().enumerate() {
            let row = out.row_mut(&[e]);
            row.fill(-1);
            for (slot, t) in row.iter_mut().zip(tokens) {
                *slot = *t as i32;
            }
        }
    }
    let counted: Vec<bool> = (0..num_tokens).map(|t| live[t] && input.loss_mask.is_none_or(|m| m[t] != 0)).collect();
    if let (Some(out), Some(loss)) = (output.aux_loss, spec.aux_loss) {
        *out = losses::aux_loss(spec, loss, &logits, &counted);
    }
    if let Some(out) = output.z_loss {
        *out = losses::z_loss(&logits, &counted);
    }
    Ok(())
}

/// Slots with an expert.
fn in_use(token: &Slots) -> usize {
    token.ids.iter().filter(|id| **id >= 0).count()
}

/// The weights of a token's slots from their scores; slots without an expert count as 0 and get 0.
fn renormalize(spec: &Router, token: &Slots) -> Vec<f64> {
    let used: Vec<f64> = token.ids.iter().zip(&token.scores).filter(|(id, _)| **id >= 0).map(|(_, s)| *s).collect();
    let rule = match spec.selection {
        Selection::SparseMixer { .. } => Renormalize::None,
        _ => spec.renormalize,
    };
    let scaled: Vec<f64> = match rule {
        Renormalize::None => used,
        Renormalize::Sum { eps, floor } => {
            let sum = used.iter().sum::<f64>() + eps;
            // A NaN stays NaN.
            let divisor = if sum < floor { floor } else { sum };
            used.iter().map(|w| w / divisor).collect()
        }
        Renormalize::L2 => {
            let norm = used.iter().map(|w| w * w).sum::<f64>().sqrt();
            used.iter().map(|w| w / norm).collect()
        }
        Renormalize::Softmax => super::softmax::softmax(&used),
    };
    let mut scaled = scaled.into_iter();
    token.ids.iter().map(|id| if *id < 0 { 0.0 } else { scaled.next().unwrap_or(0.0) }).collect()
}
