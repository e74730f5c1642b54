//! The workloads with numbers: inputs made, weights packed, answers checked, ready to be called again and again.
//!
//! The matrices of the experts overlap in one array, each begins [`STEP`] numbers behind the one before: no two are the same, and
//! the memory of a whole mixture is only needed once, packed.

use crate::exchange::Folder;
use crate::support::array::Array;
use crate::support::measure::near;
use crate::support::random::Maker;
use crate::work::{Kind, Workload};
use gatefold::args::{
    AttentionInput, AttentionOutput, ExpertWeights, Kv, MoeInput, MoeOutput, MoeWeights, RouteInput, RouteOutput,
};
use gatefold::cpu::{self, Cpu, Float, Level, PackedLinear, PackedMoe};
use gatefold::spec::{Activation, Attention, ExpertFfn, Ffn, Moe, Renormalize, Router};
use gatefold::{View, ViewMut, reference};
use std::rc::Rc;

/// Numbers from one expert's matrix to the next one's.
const STEP: usize = 4099;
/// Inputs that decoding takes in turn.
const INPUTS: usize = 16;
/// Copies of keys and values that decoding takes in turn.
const CACHES: usize = 8;
/// Largest error of a routing weight, which is at most 1: a rounding of f32 each of score, sum and quotient, and one more.
const WEIGHT_TOLERANCE: f64 = 4.0 * f32::EPSILON as f64;

/// Something to time.
pub trait Job {
    /// The call; where there are several inputs, with the next one.
    fn call(&mut self) -> gatefold::Result<()>;

    /// Calls once with every input and compares sampled rows of the answers with the reference. What is wrong, if anything.
    fn check(&mut self) -> Result<(), String>;

    /// Bytes that one call reads and writes, each counted once; of several inputs the mean.
    fn bytes(&self) -> f64;

    /// Writes inputs and answers for other programs.
    fn write(&self, folder: &mut Folder) -> std::io::Result<()>;
}

/// Packed mixtures that several workloads share.
pub struct Kept<T>(Option<Rc<Mixture<T>>>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Kept(None)
    }
}

/// Makes the numbers of a workload.
pub fn prepare<T: Float>(work: &Workload, level: Level, kept: &mut Kept<T>) -> Result<Box<dyn Job>, String> {
    let cpu = Cpu::with_level(level);
    let job: Result<Box<dyn Job>, gatefold::Error> = match work.kind {
        Kind::Moe { hidden, inner, experts, top_k, tokens } => {
            let spec = mixture_spec(hidden, inner, experts, top_k);
            if kept.0.as_ref().is_none_or(|made| made.spec != spec) {
                kept.0 = None; // first, so that there are never two
                kept.0 = Some(Rc::new(Mixture::random(spec).map_err(|e| e.to_string())?));
            }
            let mixture = kept.0.clone().expect("made above");
            Ok(Box::new(MoeJob::new(cpu, mixture, tokens, top_k)))
        }
        Kind::Attention { queries, keys } => Ok(Box::new(AttentionJob::<T>::new(cpu, queries, keys))),
        Kind::Linear { rows, outputs, inputs } => {
            LinearJob::<T>::new(cpu, rows, outputs, inputs).map(|job| Box::new(job) as Box<dyn Job>)
        }
        Kind::Route { tokens, experts, top_k } => Ok(Box::new(RouteJob::new(cpu, tokens, experts, top_k))),
    };
    job.map_err(|e| e.to_string())
}

fn random<T: Float>(seed: u64, shape: &[usize], deviation: f64) -> Array<T> {
    Maker::new(seed, &|_| ()).array(shape, deviation)
}

fn weight_deviation(inputs: usize) -> f64 {
    (inputs as f64).sqrt().recip()
}

fn bytes_of<T>(array: &Array<T>) -> f64 {
    size_of_val(array.data.as_slice()) as f64
}

/// The first, the middle and the last.
fn samples(rows: usize) -> Vec<usize> {
    let mut samples = vec![0, rows / 2, rows - 1];
    samples.dedup();
    samples
}

/// Softmax over all experts, the best few, their weights with sum 1.
fn router_spec(experts: usize, top_k: usize) -> Router {
    let mut router = Router::new(experts, top_k);
    router.renormalize = Renormalize::Sum { eps: 0.0, floor: 0.0 };
    router
}

fn mixture_spec(hidden: usize, inner: usize, experts: usize, top_k: usize) -> Moe {
    let ffn = Ffn::gated(hidden, inner, Activation::Silu);
    Moe::new(router_spec(experts, top_k), ExpertFfn::new(experts, ffn))
}

// ----------------------------------------------------------------------------- experts

struct Mixture<T> {
    spec: Moe,
    router: Array<T>,
    numbers: Array<T>,
    packed: PackedMoe,
}

impl<T: Float> Mixture<T> {
    fn random(spec: Moe) -> gatefold::Result<Mixture<T>> {
        let (ffn, experts) = (spec.experts.ffn, spec.experts.num_experts);
        let router = random(1, &[experts, ffn.hidden_size], weight_deviation(ffn.hidden_size));
        let len = 3 * ffn.hidden_size * ffn.intermediate_size + (experts - 1) * STEP;
        let numbers = random(2, &[len], weight_deviation(ffn.hidden_size));
        let packed = PackedMoe::pack(&spec, &weights(&spec, &router, &numbers))?;
        Ok(Mixture { spec, router, numbers, packed })
    }

    fn weights(&self) -> MoeWeights<'_, T> {
        weights(&self.spec, &self.router, &self.numbers)
    }
}

/// Where the matrix of each kind (gate, up, down) begins, and its rows and columns.
fn matrices(ffn: &Ffn) -> [(usize, [usize; 2]); 3] {
    let (hidden, inner) = (ffn.hidden_size, ffn.intermediate_size);
    [(0, [inner, hidden]), (hidden * inner, [inner, hidden]), (2 * hidden * inner, [hidden, inner])]
}

fn weights<'a, T: Float>(spec: &Moe, router: &'a Array<T>, numbers: &'a Array<T>) -> MoeWeights<'a, T> {
    let experts = spec.experts.num_experts;
    let [gate, up, down] = matrices(&spec.experts.ffn).map(|(start, [rows, columns])| {
        View::with_strides(&numbers.data[start..], [experts, rows, columns], [STEP, columns, 1])
    });
    MoeWeights::new(router.view(), ExpertWeights::separate(Some(gate), up, down))
}

struct MoeJob<T> {
    cpu: Cpu,
    mixture: Rc<Mixture<T>>,
    /// Of one input.
    tokens: usize,
    /// Of all inputs.
    x: Array<T>,
    out: Array<T>,
    ids: Array<i32>,
    input: usize,
}

impl<T: Float> MoeJob<T> {
    fn new(cpu: Cpu, mixture: Rc<Mixture<T>>, tokens: usize, top_k: usize) -> Self {
        let inputs = if tokens <= 8 { INPUTS } else { 1 };
        let hidden = mixture.spec.experts.ffn.hidden_size;
        let x = random::<T>(4, &[inputs * tokens, hidden], 1.0);
        let out = Array::zeros(&x.shape);
        let ids = Array::new(vec![-1; inputs * tokens * top_k], &[inputs * tokens, top_k]);
        MoeJob { cpu, mixture, tokens, x, out, ids, input: 0 }
    }

    fn inputs(&self) -> usize {
        self.x.shape[0] / self.tokens
    }

    /// With the routing, where it is wanted.
    fn run(&mut self, route: bool) -> gatefold::Result<()> {
        let (hidden, top_k) = (self.x.shape[1], self.ids.shape[1]);
        let (rows, start) = (self.tokens, self.input * self.tokens);
        let mut weights = vec![0f32; if route { rows * top_k } else { 0 }];
        let x = View::new(&self.x.data[start * hidden..][..rows * hidden], [rows, hidden]);
        let mut output =
            MoeOutput::new(ViewMut::new(&mut self.out.data[start * hidden..][..rows * hidden], [rows, hidden]));
        if route {
            let ids = ViewMut::new(&mut self.ids.data[start * top_k..][..rows * top_k], [rows, top_k]);
            output.route = Some(RouteOutput::new(ids, ViewMut::new(&mut weights, [rows, top_k])));
        }
        cpu::moe(&mut self.cpu, &self.mixture.spec, &MoeInput::new(x), &self.mixture.packed, output)?;
        self.input = (self.input + 1) % self.inputs();
        Ok(())
    }
}

impl<T: Float> Job for MoeJob<T> {
    fn call(&mut self) -> gatefold::Result<()> {
        self.run(false)
    }

    fn check(&mut self) -> Result<(), String> {
        for _ in 0..self.inputs() {
            self.run(true).map_err(|e| e.to_string())?;
        }
        let rows = samples(self.x.shape[0]);
        let x = self.x.pick(&rows);
        let mut truth = Array::<f64>::zeros(&x.shape);
        let (spec, weights) = (&self.mixture.spec, self.mixture.weights());
        reference::moe(spec, &MoeInput::new(x.view()), &weights, MoeOutput::new(truth.view_mut()))
            .map_err(|e| e.to_string())?;
        near(&self.out.pick(&rows), &truth)
    }

    fn bytes(&self) -> f64 {
        let ffn = &self.mixture.spec.experts.ffn;
        let expert = 3 * ffn.hidden_size * ffn.intermediate_size * size_of::<T>();
        let per_input = self.ids.data.chunks(self.tokens * self.ids.shape[1]);
        let touched = per_input.map(|ids| ids.iter().collect::<std::collections::BTreeSet<_>>().len()).sum::<usize>();
        let rows = bytes_of(&self.x) + bytes_of(&self.out);
        bytes_of(&self.mixture.router) + (rows + (touched * expert) as f64) / self.inputs() as f64
    }

    fn write(&self, folder: &mut Folder) -> std::io::Result<()> {
        let (mixture, inputs) = (&self.mixture, self.inputs());
        let (hidden, experts) = (self.x.shape[1], mixture.spec.experts.num_experts);
        folder.array("router", &mixture.router)?;
        folder.data("experts", &mixture.numbers)?;
        for (name, (start, [rows, columns])) in
            ["gate", "up", "down"].into_iter().zip(matrices(&mixture.spec.experts.ffn))
        {
            folder.view(name, "experts", T::DTYPE, start, &[experts, rows, columns], &[STEP, columns, 1]);
        }
        folder.array("x", &self.x.clone().reshape(&[inputs, self.tokens, hidden]))?;
        folder.ids("ids", &self.ids.clone().reshape(&[inputs, self.tokens, self.ids.shape[1]]))?;
        folder.array("out", &self.out.clone().reshape(&[inputs, self.tokens, hidden]))
    }
}

// ----------------------------------------------------------------------------- attention

/// Keys or values, `[copies, rows, num_kv_heads, head_dim]`, from the start of a cache line on, where other libraries get them,
/// too: vectors across two lines are slower to read.
struct Cache<T> {
    data: Vec<T>,
    /// The first number in `data`.
    start: usize,
    shape: [usize; 4],
}

impl<T: Float> Cache<T> {
    const LINE_BYTES: usize = 64;

    fn random(seed: u64, shape: [usize; 4]) -> Self {
        let made = random(seed, &shape, 1.0).data;
        let mut data = vec![T::default(); made.len() + Self::LINE_BYTES / size_of::<T>()];
        let start = data.as_ptr().align_offset(Self::LINE_BYTES);
        data[start..][..made.len()].copy_from_slice(&made);
        Cache { data, start, shape }
    }

    fn all(&self) -> Array<T> {
        let len = self.shape.iter().product();
        Array::new(self.data[self.start..][..len].to_vec(), &self.shape)
    }

    /// One of the copies.
    fn view(&self, copy: usize) -> View<'_, T, 3> {
        let shape = [self.shape[1], self.shape[2], self.shape[3]];
        View::new(&self.data[self.start + copy * shape.iter().product::<usize>()..], shape)
    }

    fn bytes(&self) -> f64 {
        (self.shape.iter().product::<usize>() * size_of::<T>()) as f64
    }
}

struct AttentionJob<T> {
    cpu: Cpu,
    spec: Attention,
    /// `[num_tokens, num_heads, head_dim]`
    q: Array<T>,
    k: Cache<T>,
    v: Cache<T>,
    /// `[copies, num_tokens, num_heads, head_dim]`
    out: Array<T>,
    copy: usize,
}

impl<T: Float> AttentionJob<T> {
    fn new(cpu: Cpu, queries: usize, keys: usize) -> Self {
        let spec = Attention::causal(32, 4, 128);
        let copies = if queries == 1 { CACHES } else { 1 };
        let cache = |seed| Cache::random(seed, [copies, keys, spec.num_kv_heads, spec.head_dim]);
        let (k, v) = (cache(1), cache(2));
        let q = random(4, &[queries, spec.num_heads, spec.head_dim], 1.0);
        let out = Array::zeros(&[copies, queries, spec.num_heads, spec.head_dim]);
        AttentionJob { cpu, spec, q, k, v, out, copy: 0 }
    }
}

/// One of the copies.
fn copy_of<'a, T: Float>(k: &'a Cache<T>, v: &'a Cache<T>, copy: usize) -> Kv<'a, T> {
    Kv::ragged(k.view(copy), v.view(copy), None)
}

impl<T: Float> Job for AttentionJob<T> {
    fn call(&mut self) -> gatefold::Result<()> {
        let shape = self.q.view().shape();
        let len = self.q.data.len();
        let out = ViewMut::new(&mut self.out.data[self.copy * len..][..len], shape);
        let input = AttentionInput::new(self.q.view(), copy_of(&self.k, &self.v, self.copy));
        cpu::attention(&mut self.cpu, &self.spec, &input, AttentionOutput::new(out))?;
        self.copy = (self.copy + 1) % self.k.shape[0];
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        let [copies, keys, ..] = self.k.shape;
        let [queries, heads, width] = self.q.view().shape();
        for _ in 0..copies {
            self.call().map_err(|e| e.to_string())?;
        }
        for copy in samples(copies) {
            for row in samples(queries) {
                // A query by itself stands where it stood among the others: its mask ends at the same key.
                let position = [(keys - queries + row) as i64];
                let one = self.q.clone().flat(queries).pick(&[row]).reshape(&[1, heads, width]);
                let mut input = AttentionInput::<_, f32>::new(one.view(), copy_of(&self.k, &self.v, copy));
                input.q_start = Some(&position);
                let mut truth = Array::<f64>::zeros(&[1, heads, width]);
                let output = AttentionOutput::new(truth.view_mut());
                reference::attention(&self.spec, &input, output).map_err(|e| e.to_string())?;
                let got = self.out.clone().flat(copies * queries).pick(&[copy * queries + row]);
                near(&got.reshape(&truth.shape), &truth)?;
            }
        }
        Ok(())
    }

    fn bytes(&self) -> f64 {
        bytes_of(&self.q) + (self.k.bytes() + self.v.bytes() + bytes_of(&self.out)) / self.k.shape[0] as f64
    }

    fn write(&self, folder: &mut Folder) -> std::io::Result<()> {
        folder.array("q", &self.q)?;
        folder.array("k", &self.k.all())?;
        folder.array("v", &self.v.all())?;
        folder.array("out", &self.out)
    }
}

// ----------------------------------------------------------------------------- a matrix product

struct LinearJob<T> {
    cpu: Cpu,
    x: Array<T>,
    weight: Array<T>,
    packed: PackedLinear,
    out: Array<T>,
}

impl<T: Float> LinearJob<T> {
    fn new(cpu: Cpu, rows: usize, outputs: usize, inputs: usize) -> gatefold::Result<Self> {
        let weight = random::<T>(1, &[outputs, inputs], weight_deviation(inputs));
        let packed = PackedLinear::pack(weight.view())?;
        Ok(LinearJob { cpu, x: random(2, &[rows, inputs], 1.0), weight, packed, out: Array::zeros(&[rows, outputs]) })
    }
}

impl<T: Float> Job for LinearJob<T> {
    fn call(&mut self) -> gatefold::Result<()> {
        cpu::linear(&mut self.cpu, self.x.view(), &self.packed, None, self.out.view_mut())
    }

    fn check(&mut self) -> Result<(), String> {
        self.call().map_err(|e| e.to_string())?;
        let rows = samples(self.x.shape[0]);
        let mut truth = Array::<f64>::zeros(&[rows.len(), self.out.shape[1]]);
        let x = self.x.pick(&rows);
        reference::linear::<_, _, f32>(x.view(), self.weight.view(), None, truth.view_mut())
            .map_err(|e| e.to_string())?;
        near(&self.out.pick(&rows), &truth)
    }

    fn bytes(&self) -> f64 {
        bytes_of(&self.x) + bytes_of(&self.weight) + bytes_of(&self.out)
    }

    fn write(&self, folder: &mut Folder) -> std::io::Result<()> {
        folder.array("x", &self.x)?;
        folder.array("weight", &self.weight)?;
        folder.array("out", &self.out)
    }
}

// ----------------------------------------------------------------------------- routing

struct RouteJob {
    cpu: Cpu,
    spec: Router,
    logits: Array<f32>,
    ids: Array<i32>,
    weights: Array<f32>,
    counts: Vec<u32>,
}

impl RouteJob {
    fn new(cpu: Cpu, tokens: usize, experts: usize, top_k: usize) -> Self {
        let shape = [tokens, top_k];
        RouteJob {
            cpu,
            spec: router_spec(experts, top_k),
            logits: random(1, &[tokens, experts], 1.0),
            ids: Array::new(vec![-1; tokens * top_k], &shape),
            weights: Array::zeros(&shape),
            counts: vec![0; experts],
        }
    }
}

impl Job for RouteJob {
    fn call(&mut self) -> gatefold::Result<()> {
        let mut output = RouteOutput::new(self.ids.view_mut(), self.weights.view_mut());
        output.tokens_per_expert = Some(&mut self.counts);
        cpu::route(&mut self.cpu, &self.spec, &RouteInput::new(self.logits.view()), output)
    }

    /// All tokens.
    fn check(&mut self) -> Result<(), String> {
        self.call().map_err(|e| e.to_string())?;
        let (mut ids, mut truth) = (self.ids.clone(), Array::<f64>::zeros(&self.weights.shape));
        let mut counts = self.counts.clone();
        let mut output = RouteOutput::new(ids.view_mut(), truth.view_mut());
        output.tokens_per_expert = Some(&mut counts);
        reference::route(&self.spec, &RouteInput::new(self.logits.view()), output).map_err(|e| e.to_string())?;
        if ids != self.ids || counts != self.counts {
            return Err("experts are not the reference's".into());
        }
        let error = |(x, y): (&f32, &f64)| (f64::from(*x) - y).abs();
        let worst = self.weights.data.iter().zip(&truth.data).map(error).fold(0.0, f64::max);
        if worst > WEIGHT_TOLERANCE {
            return Err(format!("a weight is wrong by {worst:.1e}, allowed are {WEIGHT_TOLERANCE:.1e}"));
        }
        Ok(())
    }

    fn bytes(&self) -> f64 {
        bytes_of(&self.logits) + bytes_of(&self.ids) + bytes_of(&self.weights)
    }

    fn write(&self, folder: &mut Folder) -> std::io::Result<()> {
        folder.array("logits", &self.logits)?;
        folder.ids("ids", &self.ids)?;
        folder.array("out", &self.weights)
    }
}
