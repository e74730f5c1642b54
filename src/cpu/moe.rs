//! `moe`: router, experts and shared expert in one call over packed weights.

use super::expert_ffn::{Always, PackedExperts, PackedFfn, Routed, check_assignments, experts_bytes, experts_in};
use super::linear::{PackedLinear, linear_bytes, linear_in};
use super::route::{route_in, route_workspace_bytes};
use super::router_logits::{router_logits_in, router_logits_workspace_bytes};
use super::workspace::{Carver, part_bytes};
use super::{Cpu, Float};
use crate::args::{MoeInput, MoeOutput, MoeWeights, RouteInput, RouteOutput, Routing};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::spec::Moe;
use crate::view::{View, ViewMut};

/// Weights of a mixture of experts, packed once at load and owned by the caller.
#[derive(Debug)]
pub struct PackedMoe {
    spec: Moe,
    router: PackedLinear,
    router_bias: Option<Vec<f32>>,
    selection_bias: Option<Vec<f32>>,
    experts: PackedExperts,
    shared: Option<PackedFfn>,
    shared_gate: Option<PackedLinear>,
}

impl PackedMoe {
    /// Packs all weights, in parallel.
    ///
    /// # Errors
    /// Those of [`Moe::validate`], [`MoeWeights::check`] and [`PackedExperts::pack`].
    pub fn pack<W: Float, S: Element, Q: Float>(spec: &Moe, weights: &MoeWeights<'_, W, S, Q>) -> Result<PackedMoe> {
        spec.validate()?;
        weights.check(spec)?;
        let vector = |bias: Option<&[S]>| bias.map(|b| b.iter().map(|x| x.to_f32()).collect());
        Ok(PackedMoe {
            spec: spec.clone(),
            router: PackedLinear::pack(weights.router)?,
            router_bias: vector(weights.router_bias),
            selection_bias: vector(weights.selection_bias),
            experts: PackedExperts::pack(&spec.experts, &weights.experts)?,
            shared: match (&spec.shared, &weights.shared) {
                (Some(block), Some(weights)) => Some(PackedFfn::pack(&block.ffn, weights)?),
                _ => None,
            },
            shared_gate: weights.shared_gate.map(PackedLinear::pack).transpose()?,
        })
    }

    /// Bytes that packing takes, for a router of one element type and experts of another.
    pub fn packed_bytes(spec: &Moe, dtype: Dtype, router_dtype: Dtype) -> usize {
        let hidden = spec.experts.ffn.hidden_size;
        let shared = spec.shared.map_or(0, |s| {
            let gate = if s.sigmoid_gate { PackedLinear::packed_bytes(1, hidden, dtype) } else { 0 };
            PackedFfn::packed_bytes(&s.ffn, dtype).saturating_add(gate)
        });
        PackedLinear::packed_bytes(spec.router.num_experts, hidden, router_dtype)
            .saturating_add(PackedExperts::packed_bytes(&spec.experts, dtype))
            .saturating_add(shared)
    }

    /// What was packed.
    pub fn spec(&self) -> &Moe {
        &self.spec
    }

    /// The router's weights.
    pub fn router(&self) -> &PackedLinear {
        &self.router
    }

    /// The bias on the router's logits.
    pub fn router_bias(&self) -> Option<&[f32]> {
        self.router_bias.as_deref()
    }

    /// The bias that chooses but does not weigh.
    pub fn selection_bias(&self) -> Option<&[f32]> {
        self.selection_bias.as_deref()
    }

    /// The routed experts.
    pub fn experts(&self) -> &PackedExperts {
        &self.experts
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        let vectors = [&self.router_bias, &self.selection_bias];
        self.router.bytes()
            + self.experts.bytes()
            + self.shared.as_ref().map_or(0, PackedFfn::bytes)
            + self.shared_gate.as_ref().map_or(0, PackedLinear::bytes)
            + vectors.iter().map(|v| v.as_ref().map_or(0, |v| 4 * v.len())).sum::<usize>()
    }

    /// The call's specification may differ from the packed one in the router and in how results are weighed.
    fn check(&self, spec: &Moe) -> Result<()> {
        self.experts.check(&spec.experts)?;
        let parts = |moe: &Moe| (moe.router.num_experts, moe.router_bias, moe.selection_bias, moe.shared);
        if parts(spec) == parts(&self.spec) {
            Ok(())
        } else {
            let (expected, found) =
                (format!("packed for {:?}", parts(spec)), format!("packed for {:?}", parts(&self.spec)));
            Err(Error::Value { argument: "weights".into(), expected, found })
        }
    }
}

/// A mixture of experts.
///
/// ```text
/// out = expert_ffn(x, route(x)) + g(x) * FFN_shared(x)         g(x) = sigmoid(x . shared_gate), or 1 without a gate
/// ```
///
/// With [`MoeInput::routing`] the router is not asked. Without a shared expert the second term is 0.
///
/// * `hidden`, `out`: `[num_tokens, hidden_size]`; `weights`: packed for `spec`, of which the router's options, `weight_on` and
///   `combine_scale` may change from call to call
///
/// Logits and routing are those of [`router_logits`](super::router_logits()) and [`route`](super::route()); experts are added in
/// ascending order in f32, then the shared one, rounded once at the store. See [`expert_ffn`](super::expert_ffn()).
///
/// # Errors
/// Those of [`MoeInput::check`]; [`Error::Value`] if the weights were packed for another specification;
/// [`Error::Unsupported`] for 2^32 and more assignments. Nothing is written then.
pub fn moe<T: Float, O: Float>(
    cpu: &mut Cpu,
    spec: &Moe,
    input: &MoeInput<'_, T>,
    weights: &PackedMoe,
    output: MoeOutput<'_, O>,
) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    weights.check(spec)?;
    let slots = input.routing.as_ref().map_or(spec.router.slots(), |r| r.topk_ids.shape()[1]);
    check_assignments(slots)?;
    let MoeOutput { out, route } = output;
    let bytes = workspace_bytes::<T>(cpu, spec, weights, num_tokens, slots, input.routing.is_none(), route.is_none());
    let level = cpu.level;
    let carver = &mut cpu.workspace.carve(bytes);

    let factors = weights.shared_gate.as_ref().map(|gate| {
        let factors = carver.part::<f32>(num_tokens);
        linear_in(level, carver, input.hidden, gate, None, ViewMut::new(factors, [num_tokens, 1]));
        for factor in factors.iter_mut() {
            *factor = 1.0 / (1.0 + (-*factor).exp());
        }
        &*factors
    });
    let always = weights.shared.as_ref().map(|shared| Always { experts: shared.as_experts(), factors });
    let run = |routing: Routing<'_, f32>, carver: &mut Carver<'_>, out: ViewMut<'_, O, 2>| {
        let routed = Routed { spec: &spec.experts, experts: &weights.experts, routing };
        experts_in(level, carver, input.hidden, Some(routed), always, out);
    };
    if let Some(routing) = input.routing {
        run(routing, carver, out);
        return Ok(());
    }
    let experts = spec.router.num_experts;
    let logits = carver.part::<f32>(num_tokens * experts);
    let shape = [num_tokens, experts];
    let (router, bias) = (&weights.router, weights.router_bias());
    let view = ViewMut::new(logits, shape);
    router_logits_in(level, carver, &spec.router, input.hidden, router, bias, input.seed, view);
    let mut given = RouteInput::new(View::new(logits, shape));
    given.selection_bias = weights.selection_bias();
    given.token_mask = input.token_mask;
    given.seed = input.seed;
    match route {
        Some(mut route) => {
            route_in(level, carver, &spec.router, &given, &mut route);
            run(route.routing(), carver, out);
        }
        None => {
            let (ids, chosen) = (carver.part::<i32>(num_tokens * slots), carver.part::<f32>(num_tokens * slots));
            let shape = [num_tokens, slots];
            let mut route = RouteOutput::new(ViewMut::new(ids, shape), ViewMut::new(chosen, shape));
            route_in(level, carver, &spec.router, &given, &mut route);
            run(route.routing(), carver, out);
        }
    }
    Ok(())
}

/// Workspace of [`moe`] for activations `T`, in the rayon pool of the caller, whatever is given and asked for; a routing that is
/// given has at most [`Router::slots`](crate::spec::Router::slots) experts per token.
pub fn moe_workspace_bytes<T: Float>(cpu: &Cpu, spec: &Moe, weights: &PackedMoe, num_tokens: usize) -> usize {
    workspace_bytes::<T>(cpu, spec, weights, num_tokens, spec.router.slots(), true, true)
}

fn workspace_bytes<T: Float>(
    cpu: &Cpu,
    spec: &Moe,
    weights: &PackedMoe,
    num_tokens: usize,
    slots: usize,
    asks_router: bool,
    keeps_routing: bool,
) -> usize {
    let gate = weights.shared_gate.as_ref().map_or(0, |gate| {
        part_bytes::<f32>(num_tokens).saturating_add(linear_bytes(cpu.level, T::DTYPE, gate, num_tokens))
    });
    let always = weights.shared.as_ref().map(PackedFfn::as_experts);
    let mut bytes =
        experts_bytes(cpu.level, T::DTYPE, Some((&weights.experts, slots)), always, num_tokens).saturating_add(gate);
    if asks_router {
        let router = &spec.router;
        let logits = part_bytes::<f32>(num_tokens.saturating_mul(router.num_experts));
        bytes = bytes
            .saturating_add(logits)
            .saturating_add(router_logits_workspace_bytes::<T>(cpu, router, &weights.router, num_tokens))
            .saturating_add(route_workspace_bytes(router, num_tokens));
        if keeps_routing {
            bytes = bytes.saturating_add(part_bytes::<u32>(num_tokens.saturating_mul(slots)).saturating_mul(2));
        }
    }
    bytes
}
