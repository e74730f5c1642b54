//! Calls of routing and of the experts with all their arguments, made from options and a seed.

use super::buffer::{Array, Flat, Layout, Output};
use super::data::Rng;
use gatefold::args::{ExpertWeights, RouteInput, RouteOutput, Routing};
use gatefold::spec::{ExpertFfn, Router, Selection};
use gatefold::{Element, Result, View, ViewMut};

/// Logits and what goes with them.
#[derive(Clone, Debug)]
pub struct RouteCase {
    pub spec: Router,
    pub logits: Array<f32, 2>,
    pub selection_bias: Option<Vec<f32>>,
    pub token_mask: Option<Vec<u8>>,
    pub loss_mask: Option<Vec<u8>>,
    pub seed: u64,
    pub layout: Layout,
}

/// What a run gives, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteResult<R> {
    pub ids: Vec<i32>,
    pub weights: Vec<R>,
    pub tokens_per_expert: Vec<u32>,
    pub dropped: u64,
    /// Expert choice only.
    pub expert_tokens: Vec<i32>,
    /// 0 where the specification names none.
    pub aux_loss: R,
    pub z_loss: R,
}

impl RouteCase {
    /// Logits of deviation 2, rounded to eighths in every third case so that there are ties; no bias, no masks.
    pub fn new(spec: &Router, num_tokens: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut logits: Vec<f32> = rng.normals(num_tokens * spec.num_experts, 2.0);
        if seed.is_multiple_of(3) {
            logits.iter_mut().for_each(|l| *l = (*l * 8.0).round() / 8.0);
        }
        Self::with_logits(spec, num_tokens, &logits, seed)
    }

    pub fn with_logits(spec: &Router, num_tokens: usize, logits: &[f32], seed: u64) -> Self {
        RouteCase {
            spec: spec.clone(),
            logits: Array::new([num_tokens, spec.num_experts], Layout::Padded, logits),
            selection_bias: None,
            token_mask: None,
            loss_mask: None,
            seed,
            layout: Layout::Padded,
        }
    }

    /// A selection bias of deviation 0.3.
    pub fn with_bias(mut self) -> Self {
        self.selection_bias = Some(Rng::new(self.seed ^ 1).normals(self.spec.num_experts, 0.3));
        self
    }

    /// About a quarter of the tokens masked, another quarter out of the losses.
    pub fn with_masks(mut self) -> Self {
        let mut rng = Rng::new(self.seed ^ 2);
        let n = self.logits.shape()[0];
        self.token_mask = Some((0..n).map(|_| u8::from(rng.chance(0.75)) * 5).collect());
        self.loss_mask = Some((0..n).map(|_| u8::from(rng.chance(0.75))).collect());
        self
    }

    pub fn input(&self) -> RouteInput<'_, f32> {
        let mut input = RouteInput::new(self.logits.view());
        input.selection_bias = self.selection_bias.as_deref();
        input.token_mask = self.token_mask.as_deref();
        input.loss_mask = self.loss_mask.as_deref();
        input.seed = self.seed;
        input
    }

    /// Runs it between guard values, asking for every output.
    pub fn run<R: Element>(
        &self,
        route: impl FnOnce(&Router, &RouteInput<'_, f32>, RouteOutput<'_, R>) -> Result<()>,
    ) -> RouteResult<R> {
        let n = self.logits.shape()[0];
        let choice = self.spec.selection == Selection::ExpertChoice;
        let mut ids = Output::new([n, self.spec.slots()], self.layout);
        let mut weights = Output::new([n, self.spec.slots()], self.layout);
        let mut counts = Flat::new(self.spec.num_experts);
        let per_expert = if choice { self.spec.expert_choice_tokens(n) } else { 0 };
        let mut tokens = Output::new([self.spec.num_experts, per_expert], self.layout);
        let (mut dropped, mut aux, mut z) = (0, R::default(), R::default());
        let mut output = RouteOutput::new(ids.view(), weights.view());
        output.tokens_per_expert = Some(counts.slice());
        output.dropped = Some(&mut dropped);
        output.aux_loss = self.spec.aux_loss.is_some().then_some(&mut aux);
        output.z_loss = Some(&mut z);
        output.expert_tokens = choice.then(|| tokens.view());
        route(&self.spec, &self.input(), output).unwrap();
        RouteResult {
            ids: ids.finish("topk_ids"),
            weights: weights.finish("topk_weights"),
            tokens_per_expert: counts.finish("tokens_per_expert"),
            dropped,
            expert_tokens: if choice { tokens.finish("expert_tokens") } else { Vec::new() },
            aux_loss: aux,
            z_loss: z,
        }
    }
}

/// How gate and up lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    Separate,
    Halves,
    Interleaved,
}

/// What can be chosen about a call of the experts beyond its specification.
#[derive(Clone, Copy, Debug)]
pub struct ExpertOptions {
    pub num_tokens: usize,
    pub slots: usize,
    pub gate_up: GateUp,
    pub layout: Layout,
}

/// Hidden states, routing and weights. About one id in eight is -1.
#[derive(Clone, Debug)]
pub struct ExpertCase<T, W> {
    pub spec: ExpertFfn,
    pub options: ExpertOptions,
    pub hidden: Array<T, 2>,
    pub ids: Array<i32, 2>,
    pub topk_weights: Array<f32, 2>,
    /// Gate (where there is one) and up: one array, or two.
    pub gate_up: Vec<Array<W, 3>>,
    pub down: Array<W, 3>,
    pub gate_bias: Option<Array<f32, 2>>,
    pub up_bias: Option<Array<f32, 2>>,
    pub down_bias: Option<Array<f32, 2>>,
}

impl<T: Element, W: Element> ExpertCase<T, W> {
    pub fn new(spec: &ExpertFfn, options: ExpertOptions, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (n, ffn, layout) = (spec.num_local_experts, &spec.ffn, options.layout);
        let (hidden, inter) = (ffn.hidden_size, ffn.intermediate_size);
        let mut weights = |rows: usize, cols: usize| {
            let deviation = (cols as f64).sqrt().recip();
            Array::new([n, rows, cols], layout, &rng.normals::<W>(n * rows * cols, deviation))
        };
        let gate_up = match (ffn.gated, options.gate_up) {
            (false, _) => vec![weights(inter, hidden)],
            (true, GateUp::Separate) => vec![weights(inter, hidden), weights(inter, hidden)],
            (true, _) => vec![weights(2 * inter, hidden)],
        };
        let down = weights(hidden, inter);
        let mut bias = |wanted: bool, width: usize| {
            wanted.then(|| Array::new([n, width], layout, &rng.normals::<f32>(n * width, 0.3)))
        };
        let (gate_bias, up_bias) = (bias(ffn.up_bias && ffn.gated, inter), bias(ffn.up_bias, inter));
        let down_bias = bias(ffn.down_bias, hidden);
        let mut ids = Vec::new();
        for _ in 0..options.num_tokens {
            let order = rng.permutation(spec.num_experts);
            for slot in 0..options.slots {
                ids.push(if rng.chance(0.125) { -1 } else { order[slot % order.len()] as i32 });
            }
        }
        let tw: Vec<f32> = ids.iter().map(|_| 0.2 + rng.uniform() as f32).collect();
        let shape = [options.num_tokens, options.slots];
        let x = rng.normals(options.num_tokens * hidden, 1.0);
        ExpertCase {
            spec: *spec,
            options,
            hidden: Array::new([options.num_tokens, hidden], layout, &x),
            ids: Array::new(shape, layout, &ids),
            topk_weights: Array::new(shape, layout, &tw),
            gate_up,
            down,
            gate_bias,
            up_bias,
            down_bias,
        }
    }

    pub fn routing(&self) -> Routing<'_, f32> {
        Routing::new(self.ids.view(), self.topk_weights.view())
    }

    pub fn weights(&self) -> ExpertWeights<'_, W, f32> {
        let (first, down) = (self.gate_up[0].view(), self.down.view());
        let mut weights = match (self.spec.ffn.gated, self.options.gate_up) {
            (false, _) => ExpertWeights::separate(None, first, down),
            (true, GateUp::Separate) => ExpertWeights::separate(Some(first), self.gate_up[1].view(), down),
            (true, GateUp::Halves) => ExpertWeights::halves(first, down),
            (true, GateUp::Interleaved) => ExpertWeights::interleaved(first, down),
        };
        weights.gate_bias = self.gate_bias.as_ref().map(Array::view);
        weights.up_bias = self.up_bias.as_ref().map(Array::view);
        weights.down_bias = self.down_bias.as_ref().map(Array::view);
        weights
    }

    /// Runs it between guard values. Weights are left to the closure, which may have packed them.
    pub fn run<O: Element>(
        &self,
        experts: impl FnOnce(&ExpertFfn, View<'_, T, 2>, &Routing<'_, f32>, ViewMut<'_, O, 2>) -> Result<()>,
    ) -> Vec<O> {
        let mut out = Output::new(self.hidden.shape(), self.options.layout);
        experts(&self.spec, self.hidden.view(), &self.routing(), out.view()).unwrap();
        out.finish("out")
    }
}
