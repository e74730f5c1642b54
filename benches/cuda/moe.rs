//! `moe`: router, experts, weighted sum. `experts`: the same with the routing given, without the shared expert.

use crate::case::{Case, Job, Twin, compare, mixture, random, samples};
use crate::support::array::Array;
use crate::support::folder::Folder;
use gatefold::cuda::{
    Device, ExpertWeights, FfnWeights, MoeInput, MoeOutput, MoeWeights, Queue, RouteOutput, Routing, expert_ffn, moe,
};
use gatefold::spec::{Activation, ExpertFfn, Ffn, Moe, Renormalize, Score, Selection, WeightOn};
use gatefold::{Element, Result, View, args, reference};
use half::bf16;
use std::collections::BTreeSet;

/// Small and large experts, few and many; those first that matter most where time is short, the largest last.
const MODELS: [&str; 15] = [
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "deepseek-v2-lite",
    "olmoe-1b-7b",
    "gpt-oss-20b",
    "qwen2-57b-a14b",
    "qwen3-next-80b-a3b",
    "glm-4.5-air",
    "llama-4-scout",
    "switch-base-8",
    "qwen3-235b-a22b",
    "gpt-oss-120b",
    "mixtral-8x22b",
    "deepseek-v3",
    "kimi-k2",
];
const TOKENS: [usize; 6] = [1, 8, 64, 512, 4096, 16384];

pub fn cases(cases: &mut Vec<Case>) {
    for model in MODELS {
        for tokens in TOKENS {
            for given in [false, true] {
                let group = if given { "experts" } else { "moe" };
                // Specifications are made anew in each closure: they are small, and the table is made before any is needed.
                let mut spec = mixture(model);
                if let Some(capacity) = &mut spec.router.capacity {
                    capacity.group_len = None; // all tokens are one row of the batch
                }
                let ffn = &spec.experts.ffn;
                let router = if given { 0 } else { spec.router.num_experts * ffn.hidden_size };
                let shared = spec.shared.filter(|_| !given).map_or(0, |shared| size(&shared.ffn));
                let per_token = router + spec.router.slots() * size(ffn) + shared;
                cases.push(Case {
                    name: format!("{group}/{model}/{tokens}/bf16"),
                    kind: if has_peer(&spec, given) { group } else { "alone" },
                    dtype: bf16::DTYPE,
                    flops: 2.0 * (tokens * per_token) as f64,
                    make: Box::new(move |device| Ok(Box::new(Layer::<bf16>::new(device, &spec, tokens, given)?))),
                });
            }
        }
    }
}

/// Whether `peers.py` has it: SwiGLU experts without biases, and for a whole mixture a softmax, renormalised, and nothing else.
fn has_peer(spec: &Moe, given: bool) -> bool {
    let (ffn, router) = (&spec.experts.ffn, &spec.router);
    let are_plain = ffn.gated
        && ffn.activation == Activation::Silu
        && !ffn.up_bias
        && !ffn.down_bias
        && spec.experts.weight_on == WeightOn::Output
        && spec.experts.combine_scale == 1.0;
    let is_plain = router.score == Score::Softmax
        && matches!(router.renormalize, Renormalize::Sum { .. } | Renormalize::Softmax)
        && router.selection == Selection::TopK
        && router.groups.is_none()
        && router.capacity.is_none()
        && router.scaling_factor == 1.0
        && !spec.router_bias
        && !spec.selection_bias
        && spec.shared.is_none();
    are_plain && (given || is_plain)
}

/// Weights of a block.
fn size(ffn: &Ffn) -> usize {
    (if ffn.gated { 3 } else { 2 }) * ffn.hidden_size * ffn.intermediate_size
}

/// Weights of a block for each of some experts: gate rows (where it is gated), then up rows; down; biases.
struct Block<T> {
    experts: usize,
    ffn: Ffn,
    gate_up: Twin<T>,
    down: Twin<T>,
    up_bias: Option<Twin<f32>>,
    down_bias: Option<Twin<f32>>,
}

impl<T: Element> Block<T> {
    fn random(device: &'static Device, seed: u64, experts: usize, ffn: Ffn) -> Result<Self> {
        let (inner, hidden) = (ffn.intermediate_size, ffn.hidden_size);
        let both = if ffn.gated { 2 * inner } else { inner };
        let matrix = |seed, rows, columns: usize| {
            Twin::new(device, random::<T>(seed, &[experts, rows, columns], (columns as f64).sqrt().recip()))
        };
        let vector = |seed, width| Twin::new(device, random::<f32>(seed, &[experts, width], 0.1));
        Ok(Block {
            experts,
            ffn,
            gate_up: matrix(seed, both, hidden)?,
            down: matrix(seed + 1, hidden, inner)?,
            up_bias: ffn.up_bias.then(|| vector(seed + 2, both)).transpose()?,
            down_bias: ffn.down_bias.then(|| vector(seed + 3, hidden)).transpose()?,
        })
    }

    fn device(&self) -> ExpertWeights<'_, T> {
        let (n, inner, hidden) = (self.experts, self.ffn.intermediate_size, self.ffn.hidden_size);
        if !self.ffn.gated {
            assert!(self.up_bias.is_none() && self.down_bias.is_none(), "no model of this bench has both");
            let up = self.gate_up.view([n, inner, hidden]);
            return ExpertWeights::separate(None, up, self.down.view([n, hidden, inner]));
        }
        let both = self.gate_up.view([n, 2 * inner, hidden]);
        let strides = both.strides();
        let half = both.with_strides([n, inner, hidden], strides);
        let up = both.skip(inner * hidden).with_strides([n, inner, hidden], strides);
        let mut weights = ExpertWeights::separate(Some(half), up, self.down.view([n, hidden, inner]));
        if let Some(bias) = &self.up_bias {
            let both = bias.view([n, 2 * inner]);
            weights.gate_bias = Some(both.with_strides([n, inner], both.strides()));
            weights.up_bias = Some(both.skip(inner).with_strides([n, inner], both.strides()));
        }
        weights.down_bias = self.down_bias.as_ref().map(|bias| bias.view([n, hidden]));
        weights
    }

    fn host(&self) -> args::ExpertWeights<'_, T> {
        let inner = self.ffn.intermediate_size;
        if !self.ffn.gated {
            return args::ExpertWeights::separate(None, self.gate_up.host.view(), self.down.host.view());
        }
        let mut weights = args::ExpertWeights::halves(self.gate_up.host.view(), self.down.host.view());
        if let Some(bias) = &self.up_bias {
            let (shape, strides) = ([self.experts, inner], [2 * inner, 1]);
            weights.gate_bias = Some(View::with_strides(&bias.host.data, shape, strides));
            weights.up_bias = Some(View::with_strides(&bias.host.data[inner..], shape, strides));
        }
        weights.down_bias = self.down_bias.as_ref().map(|bias| bias.host.view());
        weights
    }

    fn bytes_per_expert(&self) -> usize {
        size(&self.ffn) * size_of::<T>()
    }
}

struct Layer<T> {
    queue: Queue<'static>,
    spec: Moe,
    given: bool,
    x: Twin<T>,
    router: Twin<T>,
    router_bias: Option<Twin<f32>>,
    selection_bias: Option<Twin<f32>>,
    experts: Block<T>,
    shared: Option<Block<T>>,
    shared_gate: Option<Twin<T>>,
    out: Twin<T>,
    ids: Twin<i32>,
    weights: Twin<f32>,
    bytes: f64,
}

impl<T: Element> Layer<T> {
    /// With the routing computed once: for cases that are given it, and to know which experts are read.
    fn new(device: &'static Device, spec: &Moe, tokens: usize, given: bool) -> Result<Self> {
        let (hidden, slots) = (spec.experts.ffn.hidden_size, spec.router.slots());
        let experts = spec.router.num_experts;
        let router = random::<T>(2, &[experts, hidden], (hidden as f64).sqrt().recip());
        let bias = |has: bool, seed| has.then(|| Twin::new(device, random::<f32>(seed, &[experts], 0.1))).transpose();
        let gate = || Twin::new(device, random::<T>(5, &[1, hidden], (hidden as f64).sqrt().recip()));
        let mut layer = Layer {
            queue: Queue::new(device),
            given,
            x: Twin::new(device, random(1, &[tokens, hidden], 1.0))?,
            router: Twin::new(device, router)?,
            router_bias: bias(spec.router_bias, 3)?,
            selection_bias: bias(spec.selection_bias, 4)?,
            experts: Block::random(device, 10, experts, spec.experts.ffn)?,
            shared: spec.shared.map(|shared| Block::random(device, 20, 1, shared.ffn)).transpose()?,
            shared_gate: spec.shared.filter(|shared| shared.sigmoid_gate).map(|_| gate()).transpose()?,
            out: Twin::zeros(device, &[tokens, hidden])?,
            ids: Twin::zeros(device, &[tokens, slots])?,
            weights: Twin::zeros(device, &[tokens, slots])?,
            bytes: 0.0,
            spec: spec.clone(),
        };
        layer.run(true)?;
        layer.ids.fetch()?;
        layer.weights.fetch()?;
        let touched = layer.ids.host.data.iter().filter(|id| **id >= 0).collect::<BTreeSet<_>>().len();
        let shared = layer.shared.as_ref().filter(|_| !given).map_or(0, Block::bytes_per_expert);
        let rows = 2 * tokens * hidden * size_of::<T>();
        layer.bytes = (touched * layer.experts.bytes_per_expert() + shared + rows) as f64;
        Ok(layer)
    }

    /// The whole mixture; `ask`: the routing is written.
    fn run(&mut self, ask: bool) -> Result<()> {
        let Layer { queue, spec, x, router, experts, shared, out, ids, weights, .. } = self;
        let [tokens, hidden, slots] = [x.host.shape[0], x.host.shape[1], ids.host.shape[1]];
        let num_experts = spec.router.num_experts;
        let mut all = MoeWeights::new(router.view([num_experts, hidden]), experts.device());
        all.router_bias = self.router_bias.as_ref().map(|bias| bias.view([num_experts]));
        all.selection_bias = self.selection_bias.as_ref().map(|bias| bias.view([num_experts]));
        all.shared_gate = self.shared_gate.as_ref().map(|gate| gate.view([1, hidden]));
        all.shared = shared.as_ref().map(|block| {
            let (inner, both) = (block.ffn.intermediate_size, &block.gate_up);
            let view = both.view([2 * inner, hidden]);
            let gate = view.with_strides([inner, hidden], [hidden, 1]);
            let up = view.skip(inner * hidden).with_strides([inner, hidden], [hidden, 1]);
            FfnWeights::new(Some(gate), up, block.down.view([hidden, inner]))
        });
        let mut output = MoeOutput::new(out.view_mut([tokens, hidden]));
        if ask {
            output.route = Some(RouteOutput::new(ids.view_mut([tokens, slots]), weights.view_mut([tokens, slots])));
        }
        moe(queue, spec, &MoeInput::new(x.view([tokens, hidden])), &all, output)
    }
}

impl<T: Element> Job for Layer<T> {
    fn call(&mut self) -> Result<()> {
        if !self.given {
            return self.run(false);
        }
        let Layer { queue, spec, x, experts, out, ids, weights, .. } = self;
        let [tokens, hidden, slots] = [x.host.shape[0], x.host.shape[1], ids.host.shape[1]];
        let routing = Routing::new(ids.view([tokens, slots]), weights.view([tokens, slots]));
        let hidden = [tokens, hidden];
        expert_ffn(queue, &spec.experts, x.view(hidden), &routing, &experts.device(), out.view_mut(hidden))
    }

    fn check(&mut self) -> std::result::Result<(), String> {
        let text = |error: gatefold::Error| error.to_string();
        self.call().map_err(text)?;
        self.out.fetch().map_err(text)?;
        let rows = samples(self.x.host.shape[0]);
        let (x, ids, weights) = (self.x.host.pick(&rows), self.ids.host.pick(&rows), self.weights.host.pick(&rows));
        let mut truth = Array::<f64>::zeros(&[rows.len(), self.x.host.shape[1]]);
        let routing = args::Routing::new(ids.view(), weights.view());
        let spec: &ExpertFfn = &self.spec.experts;
        reference::expert_ffn(spec, x.view(), &routing, &self.experts.host(), truth.view_mut()).map_err(text)?;
        if let Some(block) = self.shared.as_ref().filter(|_| !self.given) {
            let mut shared = Array::<f64>::zeros(&truth.shape);
            reference::mlp(&block.ffn, x.view(), &block.host().expert(0), shared.view_mut()).map_err(text)?;
            let mut gates = Array::<f64>::zeros(&[rows.len(), 1]);
            if let Some(gate) = &self.shared_gate {
                reference::linear::<_, _, f32>(x.view(), gate.host.view(), None, gates.view_mut()).map_err(text)?;
                gates.data.iter_mut().for_each(|gate| *gate = 1.0 / (1.0 + (-*gate).exp()));
            } else {
                gates.data.fill(1.0);
            }
            let width = truth.shape[1];
            for (i, (sum, y)) in truth.data.iter_mut().zip(&shared.data).enumerate() {
                *sum += gates.data[i / width] * y;
            }
        }
        compare(&self.out.host, &rows, &truth)
    }

    fn write(&mut self, folder: &mut Folder) -> std::io::Result<()> {
        let matrices = [
            ("x", &self.x),
            ("router", &self.router),
            ("gate_up", &self.experts.gate_up),
            ("down", &self.experts.down),
            ("out", &self.out),
        ];
        matrices.into_iter().try_for_each(|(name, twin)| folder.array(name, &twin.host))?;
        folder.array("weights", &self.weights.host)?;
        folder.ids("ids", &self.ids.host)
    }

    fn bytes(&self) -> f64 {
        self.bytes
    }
}
