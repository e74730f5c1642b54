//! Calls of the whole mixture with all their arguments, made from options and a seed.

use super::buffer::{Array, Flat, Layout, Output};
use super::data::Rng;
use super::moe_case::{ExpertCase, ExpertOptions, GateUp, RouteResult};
use gatefold::args::{MoeInput, MoeOutput, MoeWeights, RouteOutput, Routing};
use gatefold::spec::{ExpertFfn, Moe, Selection};
use gatefold::{Element, Result};

/// Hidden states and the weights of router, experts and shared expert; a routing, for calls that give one.
///
/// The router's products are multiples of 1/64 whose sums f32 holds exactly, so that without jitter every backend sees the same
/// logits, with ties among them, and must choose the same experts.
#[derive(Clone, Debug)]
pub struct MoeCase<T, W, Q> {
    pub spec: Moe,
    /// Hidden states, the experts, and the routing.
    pub experts: ExpertCase<T, W>,
    pub router: Array<Q, 2>,
    pub router_bias: Option<Vec<f32>>,
    pub selection_bias: Option<Vec<f32>>,
    /// The shared expert is the only one of a case of its own.
    pub shared: Option<ExpertCase<T, W>>,
    pub shared_gate: Option<Array<W, 2>>,
    pub token_mask: Option<Vec<u8>>,
    pub seed: u64,
}

/// What a run gives, row-major; the routing where it was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeResult<O, R> {
    pub out: Vec<O>,
    pub route: Option<RouteResult<R>>,
}

/// Multiples of 1/8, at most `bound`.
fn eighths<T: Element>(rng: &mut Rng, len: usize, deviation: f64, bound: f64) -> Vec<T> {
    (0..len).map(|_| T::from_f64(((8.0 * deviation * rng.normal()).round() / 8.0).clamp(-bound, bound))).collect()
}

impl<T: Element, W: Element, Q: Element> MoeCase<T, W, Q> {
    pub fn new(spec: &Moe, options: ExpertOptions, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x6d6f_6500);
        let (width, num_experts, layout) = (spec.experts.ffn.hidden_size, spec.router.num_experts, options.layout);
        let mut experts = ExpertCase::new(&spec.experts, options, seed);
        let shape = experts.hidden.shape();
        experts.hidden = Array::new(shape, layout, &eighths::<T>(&mut rng, shape[0] * shape[1], 1.0, 4.0));
        let router = eighths::<Q>(&mut rng, num_experts * width, 0.3, 1.0);
        let bias: Vec<f32> = eighths(&mut rng, num_experts, 0.5, 2.0);
        let shared = spec.shared.map(|shared| {
            let gate_up = if shared.ffn.gated { options.gate_up } else { GateUp::Separate };
            let options = ExpertOptions { slots: 1, gate_up, ..options };
            ExpertCase {
                hidden: experts.hidden.clone(),
                ..ExpertCase::new(&ExpertFfn::new(1, shared.ffn), options, !seed)
            }
        });
        let gate = || rng.normals::<W>(width, (width as f64).sqrt().recip());
        let shared_gate = spec.shared.is_some_and(|s| s.sigmoid_gate).then(gate);
        MoeCase {
            spec: spec.clone(),
            experts,
            router: Array::new([num_experts, width], layout, &router),
            router_bias: spec.router_bias.then_some(bias),
            selection_bias: spec.selection_bias.then(|| rng.normals(num_experts, 0.3)),
            shared,
            shared_gate: shared_gate.map(|gate| Array::new([1, width], layout, &gate)),
            token_mask: None,
            seed,
        }
    }

    /// About a quarter of the tokens masked.
    pub fn with_mask(mut self) -> Self {
        let mut rng = Rng::new(self.seed ^ 2);
        self.token_mask = Some((0..self.num_tokens()).map(|_| u8::from(rng.chance(0.75)) * 3).collect());
        self
    }

    pub fn num_tokens(&self) -> usize {
        self.experts.hidden.shape()[0]
    }

    /// Side inputs are f32.
    pub fn weights(&self) -> MoeWeights<'_, W, f32, Q> {
        let mut weights = MoeWeights::new(self.router.view(), self.experts.weights());
        weights.router_bias = self.router_bias.as_deref();
        weights.selection_bias = self.selection_bias.as_deref();
        weights.shared = self.shared.as_ref().map(|shared| shared.weights().expert(0));
        weights.shared_gate = self.shared_gate.as_ref().map(Array::view);
        weights
    }

    pub fn input(&self) -> MoeInput<'_, T, f32> {
        let mut input = MoeInput::new(self.experts.hidden.view());
        input.token_mask = self.token_mask.as_deref();
        input.seed = self.seed;
        input
    }

    /// Runs it between guard values with the routing that is given, or asked for with all its outputs.
    pub fn run<O: Element, R: Element>(
        &self,
        given: Option<Routing<'_, f32>>,
        ask: bool,
        moe: impl FnOnce(&Moe, &MoeInput<'_, T, f32>, MoeOutput<'_, O, R>) -> Result<()>,
    ) -> MoeResult<O, R> {
        let (router, n, layout) = (&self.spec.router, self.num_tokens(), self.experts.options.layout);
        let choice = router.selection == Selection::ExpertChoice;
        let mut out = Output::new(self.experts.hidden.shape(), layout);
        let mut ids = Output::new([n, router.slots()], layout);
        let mut weights = Output::new([n, router.slots()], layout);
        let mut counts = Flat::new(router.num_experts);
        let per_expert = if choice { router.expert_choice_tokens(n) } else { 0 };
        let mut tokens = Output::new([router.num_experts, per_expert], layout);
        let (mut dropped, mut aux, mut z) = (0, R::default(), R::default());
        let mut input = self.input();
        input.routing = given;
        let mut output = MoeOutput::new(out.view());
        if ask {
            let mut route = RouteOutput::new(ids.view(), weights.view());
            route.tokens_per_expert = Some(counts.slice());
            route.dropped = Some(&mut dropped);
            route.aux_loss = router.aux_loss.is_some().then_some(&mut aux);
            route.z_loss = Some(&mut z);
            route.expert_tokens = choice.then(|| tokens.view());
            output.route = Some(route);
        }
        moe(&self.spec, &input, output).unwrap();
        let route = || RouteResult {
            ids: ids.finish("topk_ids"),
            weights: weights.finish("topk_weights"),
            tokens_per_expert: counts.finish("tokens_per_expert"),
            dropped,
            expert_tokens: if choice { tokens.finish("expert_tokens") } else { Vec::new() },
            aux_loss: aux,
            z_loss: z,
        };
        let route = ask.then(route);
        MoeResult { out: out.finish("out"), route }
    }

    /// The same call with other hidden states of as many tokens.
    pub fn with_hidden(&self, values: &[T]) -> Self {
        let mut case = self.clone();
        case.experts.hidden = Array::new(self.experts.hidden.shape(), self.experts.options.layout, values);
        if let Some(shared) = &mut case.shared {
            shared.hidden = case.experts.hidden.clone();
        }
        case
    }

    /// The same call of some of the tokens.
    pub fn part(&self, tokens: std::ops::Range<usize>) -> Self {
        fn rows<E: bytemuck::Pod>(array: &Array<E, 2>, tokens: &std::ops::Range<usize>, layout: Layout) -> Array<E, 2> {
            let width = array.shape()[1];
            let values = array.values();
            Array::new([tokens.len(), width], layout, &values[tokens.start * width..tokens.end * width])
        }
        let cut = |case: &ExpertCase<T, W>| {
            let mut case = case.clone();
            case.options.num_tokens = tokens.len();
            case.hidden = rows(&case.hidden, &tokens, case.options.layout);
            case.ids = rows(&case.ids, &tokens, case.options.layout);
            case.topk_weights = rows(&case.topk_weights, &tokens, case.options.layout);
            case
        };
        MoeCase {
            experts: cut(&self.experts),
            shared: self.shared.as_ref().map(cut),
            token_mask: self.token_mask.as_ref().map(|mask| mask[tokens.clone()].to_vec()),
            ..self.clone()
        }
    }
}
