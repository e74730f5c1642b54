//! Feed-forward blocks, experts, whole mixtures.

use super::{Staged, StagedMut, StagedRoute, vector};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::spec::{ExpertFfn, Ffn, Moe, Router};
use gatefold::{Element, Result, View, ViewMut, args};

/// Weights of one block on the device.
pub struct StagedFfn<'a, T> {
    gate: Option<Staged<'a, T, 2>>,
    up: Staged<'a, T, 2>,
    down: Staged<'a, T, 2>,
    /// Gate, up, down.
    biases: [Option<Staged<'a, f32, 1>>; 3],
}

impl<'a, T: Element> StagedFfn<'a, T> {
    pub fn new(driver: &'a dyn Driver, weights: &args::FfnWeights<'_, T>) -> Result<Self> {
        let bias = |bias: Option<&[f32]>| bias.map(|bias| vector(driver, bias)).transpose();
        Ok(StagedFfn {
            gate: Staged::option(driver, weights.gate)?,
            up: Staged::new(driver, weights.up)?,
            down: Staged::new(driver, weights.down)?,
            biases: [bias(weights.gate_bias)?, bias(weights.up_bias)?, bias(weights.down_bias)?],
        })
    }

    pub fn weights(&self) -> cuda::FfnWeights<'_, T> {
        let gate = self.gate.as_ref().map(Staged::view);
        let mut weights = cuda::FfnWeights::new(gate, self.up.view(), self.down.view());
        [weights.gate_bias, weights.up_bias, weights.down_bias] =
            self.biases.each_ref().map(|bias| bias.as_ref().map(Staged::view));
        weights
    }
}

/// Weights of all experts on the device.
pub struct StagedExperts<'a, T> {
    gate: Option<Staged<'a, T, 3>>,
    up: Staged<'a, T, 3>,
    down: Staged<'a, T, 3>,
    /// Gate, up, down.
    biases: [Option<Staged<'a, f32, 2>>; 3],
}

impl<'a, T: Element> StagedExperts<'a, T> {
    pub fn new(driver: &'a dyn Driver, weights: &args::ExpertWeights<'_, T>) -> Result<Self> {
        let bias = |bias: Option<View<'_, f32, 2>>| Staged::option(driver, bias);
        Ok(StagedExperts {
            gate: Staged::option(driver, weights.gate)?,
            up: Staged::new(driver, weights.up)?,
            down: Staged::new(driver, weights.down)?,
            biases: [bias(weights.gate_bias)?, bias(weights.up_bias)?, bias(weights.down_bias)?],
        })
    }

    pub fn weights(&self) -> cuda::ExpertWeights<'_, T> {
        let gate = self.gate.as_ref().map(Staged::view);
        let mut weights = cuda::ExpertWeights::separate(gate, self.up.view(), self.down.view());
        [weights.gate_bias, weights.up_bias, weights.down_bias] =
            self.biases.each_ref().map(|bias| bias.as_ref().map(Staged::view));
        weights
    }
}

/// Weights of a mixture on the device.
pub struct StagedMoe<'a, T, Q> {
    pub router: Staged<'a, Q, 2>,
    pub router_bias: Option<Staged<'a, f32, 1>>,
    pub selection_bias: Option<Staged<'a, f32, 1>>,
    pub experts: StagedExperts<'a, T>,
    pub shared: Option<StagedFfn<'a, T>>,
    pub shared_gate: Option<Staged<'a, T, 2>>,
}

impl<'a, T: Element, Q: Element> StagedMoe<'a, T, Q> {
    pub fn new(driver: &'a dyn Driver, weights: &args::MoeWeights<'_, T, f32, Q>) -> Result<Self> {
        Ok(StagedMoe {
            router: Staged::new(driver, weights.router)?,
            router_bias: weights.router_bias.map(|bias| vector(driver, bias)).transpose()?,
            selection_bias: weights.selection_bias.map(|bias| vector(driver, bias)).transpose()?,
            experts: StagedExperts::new(driver, &weights.experts)?,
            shared: weights.shared.as_ref().map(|shared| StagedFfn::new(driver, shared)).transpose()?,
            shared_gate: Staged::option(driver, weights.shared_gate)?,
        })
    }

    pub fn weights(&self) -> cuda::MoeWeights<'_, T, Q> {
        let mut weights = cuda::MoeWeights::new(self.router.view(), self.experts.weights());
        weights.router_bias = self.router_bias.as_ref().map(Staged::view);
        weights.selection_bias = self.selection_bias.as_ref().map(Staged::view);
        weights.shared = self.shared.as_ref().map(StagedFfn::weights);
        weights.shared_gate = self.shared_gate.as_ref().map(Staged::view);
        weights
    }
}

/// A routing on the device.
pub struct StagedRouting<'a> {
    ids: Staged<'a, i32, 2>,
    weights: Staged<'a, f32, 2>,
}

impl<'a> StagedRouting<'a> {
    pub fn new(driver: &'a dyn Driver, routing: &args::Routing<'_>) -> Result<Self> {
        let ids = Staged::new(driver, routing.topk_ids)?;
        Ok(StagedRouting { ids, weights: Staged::new(driver, routing.topk_weights)? })
    }

    pub fn routing(&self) -> cuda::Routing<'_> {
        cuda::Routing::new(self.ids.view(), self.weights.view())
    }
}

/// As `cpu::mlp`, on weights as they are.
pub fn mlp<T: Element, O: Element>(
    driver: &dyn Driver,
    spec: &Ffn,
    x: View<'_, T, 2>,
    weights: &args::FfnWeights<'_, T>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    mlp_with(&mut Queue::new(driver), spec, x, &StagedFfn::new(driver, weights)?, out)
}

/// [`mlp`] with weights that are on the device already.
pub fn mlp_with<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    spec: &Ffn,
    x: View<'_, T, 2>,
    weights: &StagedFfn<'_, T>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    let driver = queue.driver();
    let x = Staged::new(driver, x)?;
    let mut result = StagedMut::new(driver, &out)?;
    cuda::mlp(queue, spec, x.view(), &weights.weights(), result.view())?;
    result.finish(queue.stream(), out)
}

/// As `cpu::expert_ffn`, on weights as they are.
pub fn expert_ffn<T: Element>(
    driver: &dyn Driver,
    spec: &ExpertFfn,
    hidden: View<'_, T, 2>,
    routing: &args::Routing<'_>,
    weights: &args::ExpertWeights<'_, T>,
    out: ViewMut<'_, T, 2>,
) -> Result<()> {
    expert_ffn_with(&mut Queue::new(driver), spec, hidden, routing, &StagedExperts::new(driver, weights)?, out)
}

/// [`expert_ffn`] with weights that are on the device already.
pub fn expert_ffn_with<T: Element>(
    queue: &mut Queue<'_>,
    spec: &ExpertFfn,
    hidden: View<'_, T, 2>,
    routing: &args::Routing<'_>,
    weights: &StagedExperts<'_, T>,
    out: ViewMut<'_, T, 2>,
) -> Result<()> {
    let driver = queue.driver();
    let hidden = Staged::new(driver, hidden)?;
    let routing = StagedRouting::new(driver, routing)?;
    let mut result = StagedMut::new(driver, &out)?;
    cuda::expert_ffn(queue, spec, hidden.view(), &routing.routing(), &weights.weights(), result.view())?;
    result.finish(queue.stream(), out)
}

/// As `cpu::moe`, on weights as they are.
pub fn moe<T: Element, Q: Element>(
    driver: &dyn Driver,
    spec: &Moe,
    input: &args::MoeInput<'_, T>,
    weights: &args::MoeWeights<'_, T, f32, Q>,
    output: args::MoeOutput<'_, T>,
) -> Result<()> {
    moe_with(&mut Queue::new(driver), spec, input, &StagedMoe::new(driver, weights)?, output)
}

/// [`moe`] with weights that are on the device already.
pub fn moe_with<T: Element, Q: Element>(
    queue: &mut Queue<'_>,
    spec: &Moe,
    input: &args::MoeInput<'_, T>,
    weights: &StagedMoe<'_, T, Q>,
    output: args::MoeOutput<'_, T>,
) -> Result<()> {
    let driver = queue.driver();
    let hidden = Staged::new(driver, input.hidden)?;
    let mask = input.token_mask.map(|mask| vector(driver, mask)).transpose()?;
    let routing = input.routing.as_ref().map(|routing| StagedRouting::new(driver, routing)).transpose()?;
    let mut on_device = cuda::MoeInput::new(hidden.view());
    on_device.token_mask = mask.as_ref().map(Staged::view);
    on_device.routing = routing.as_ref().map(StagedRouting::routing);
    on_device.seed = input.seed;
    let args::MoeOutput { out, route, .. } = output;
    let mut result = StagedMut::new(driver, &out)?;
    let mut route = route.map(|route| StagedRoute::new(driver, route)).transpose()?;
    let mut there = cuda::MoeOutput::new(result.view());
    there.route = route.as_mut().map(StagedRoute::output);
    cuda::moe(queue, spec, &on_device, &weights.weights(), there)?;
    if let Some(route) = route {
        route.finish(queue.stream())?;
    }
    result.finish(queue.stream(), out)
}

/// The router's logits of a mixture.
pub fn router_logits_with<T: Element, Q: Element>(
    driver: &dyn Driver,
    spec: &Router,
    hidden: View<'_, T, 2>,
    weights: &StagedMoe<'_, T, Q>,
    seed: u64,
    logits: ViewMut<'_, f32, 2>,
) -> Result<()> {
    let mut queue = Queue::new(driver);
    let hidden = Staged::new(driver, hidden)?;
    let mut result = StagedMut::new(driver, &logits)?;
    let bias = weights.router_bias.as_ref().map(Staged::view);
    cuda::router_logits(&mut queue, spec, hidden.view(), weights.router.view(), bias, seed, result.view())?;
    result.finish(queue.stream(), logits)
}
