//! The whole mixture: router, experts, shared expert.

use super::ffn::{block, dot, expert_ffn, supported};
use super::norm::sigmoid;
use super::{route, router_logits};
use crate::args::{MoeInput, MoeOutput, MoeWeights, RouteInput, RouteOutput, Routing};
use crate::spec::Moe;
use crate::view::{View, ViewMut};
use crate::{Element, Result};

/// A mixture of experts.
///
/// ```text
/// logits = router_logits(x)                                       see [`router_logits`], kept in f64
/// ids, w = route(logits)                                          see [`route`]; or given by the call
/// out    = expert_ffn(x, ids, w) + gate * FFN_shared(x)           see [`expert_ffn`]; gate = sigmoid(x . shared_gate), or 1
/// ```
///
/// * `hidden`, `out`: `[num_tokens, hidden_size]`; weights: [`MoeWeights`]
///
/// A masked token gets no routed expert, only the shared one. Given ids and weights are used as they are: neither the token mask nor capacity
/// touches them.
///
/// # Errors
/// Those of [`MoeInput::check`] and [`MoeWeights::check`]; [`crate::Error::Unsupported`] as in [`expert_ffn`]. Nothing is
/// written then.
pub fn moe<T: Element, W: Element, S: Element, Q: Element>(
    spec: &Moe,
    input: &MoeInput<'_, T, S>,
    weights: &MoeWeights<'_, W, S, Q>,
    mut output: MoeOutput<'_, f64, f64>,
) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    weights.check(spec)?;
    supported(&spec.experts)?;
    let hidden = input.hidden;
    let experts = &weights.experts;

    if let Some(routing) = &input.routing {
        expert_ffn(&spec.experts, hidden, routing, experts, output.out.reborrow())?;
    } else {
        let mut logits = vec![0.0; num_tokens * spec.router.num_experts];
        let shape = [num_tokens, spec.router.num_experts];
        let logits_out = ViewMut::new(&mut logits, shape);
        router_logits(&spec.router, hidden, weights.router, weights.router_bias, input.seed, logits_out)?;
        let bias: Option<Vec<f64>> = weights.selection_bias.map(|b| b.iter().map(|b| b.to_f64()).collect());
        let mut route_input = RouteInput::new(View::new(&logits, shape));
        route_input.selection_bias = bias.as_deref();
        route_input.token_mask = input.token_mask;
        route_input.seed = input.seed;

        let slots = [num_tokens, spec.router.slots()];
        let (mut ids, mut w) = (vec![0; num_tokens * slots[1]], vec![0.0; num_tokens * slots[1]]);
        let here = RouteOutput::new(ViewMut::new(&mut ids, slots), ViewMut::new(&mut w, slots));
        route(&spec.router, &route_input, here)?;
        if let Some(wanted) = output.route.take() {
            route(&spec.router, &route_input, wanted)?;
        }
        let routing = Routing::new(View::new(&ids, slots), View::new(&w, slots));
        expert_ffn(&spec.experts, hidden, &routing, experts, output.out.reborrow())?;
    }

    if let (Some(shared), Some(shared_weights)) = (&spec.shared, &weights.shared) {
        for t in 0..num_tokens {
            let x: Vec<f64> = hidden.row(&[t]).iter().map(|x| x.to_f64()).collect();
            let gate = weights.shared_gate.map_or(1.0, |gate| sigmoid(dot(&x, gate.row(&[0]))));
            let y = block(&shared.ffn, &x, shared_weights);
            for (out, y) in output.out.row_mut(&[t]).iter_mut().zip(y) {
                *out += gate * y;
            }
        }
    }
    Ok(())
}
