//! A layer that stays on a GPU, as a framework would run it: weights, cache and activations lie in device memory, and a step is
//! a sequence of launches on one stream. The host writes the input rows, their positions and the length of the cache, and reads
//! the output.
//!
//! The calls are the safe ones of `gatefold::cuda`. Each checks its arguments, makes a plan and launches it. None waits, and once
//! the queue's workspace is as large as the largest call needs, none allocates: a step can be recorded into a graph, which
//! costs the host a single call ([`DeviceLayer::record`]).

mod arrays;
mod attention;
mod weights;

use super::array::Array;
use super::layer::{
    Cache, Cost, LayerWeights, Qkv, Raw, Stage, Trace, attention_cost, block_cost, experts_cost, product_cost,
    rows_cost,
};
use super::staged::StagedFfn;
use arrays::DeviceArray;
use gatefold::cpu::Float;
use gatefold::cuda::driver::{Driver, Recorder};
use gatefold::cuda::{
    MoeInput, MoeOutput, NormArgs, NormPlan, NormProblem, Queue, RouteOutput, Stream, add, mlp, moe, router_logits,
};
use gatefold::spec::{AttentionBlock, Layer, Mlp};
use gatefold::{Error, Result};
use std::time::Duration;
use weights::Weights;

/// Tells how long a device needs for the work that is queued meanwhile.
pub type Clock<'a> = dyn Fn(&mut dyn FnMut() -> Result<()>) -> Result<Duration> + 'a;

/// The parts of a step, in order: each one or more launches.
pub const PARTS: [Part; 8] = [
    Part::AttentionNorm,
    Part::Projection,
    Part::Prepare,
    Part::Attention,
    Part::OutProjection,
    Part::ResidualNorm,
    Part::Mlp,
    Part::Residual,
];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    AttentionNorm,
    Projection,
    /// Norms and rotation of queries and keys, which go straight into the cache.
    Prepare,
    Attention,
    OutProjection,
    /// The sum, and its norm, in one pass.
    ResidualNorm,
    Mlp,
    Residual,
}

/// One layer with the cache of one sequence.
pub struct DeviceLayer<'d, T> {
    spec: Layer,
    queue: Queue<'d>,
    weights: Weights<'d, T>,
    cache: DeviceCache<'d, T>,
    arrays: Arrays<'d, T>,
    tokens: Tokens<'d>,
}

/// Keys and values, `[capacity, heads, width]`; latent attention keeps `[latent | k_rope]` as the key alone.
struct DeviceCache<'d, T> {
    k: DeviceArray<'d, T>,
    v: DeviceArray<'d, T>,
    capacity: usize,
    /// Heads, width of a key, width of a value.
    shape: [usize; 3],
}

/// The tokens of a step.
struct Tokens<'d> {
    n: usize,
    /// Rows in the cache before it.
    past: usize,
    /// Latent attention: scores against the latent cache in place of expanded keys.
    absorbed: bool,
    positions: DeviceArray<'d, u32>,
    /// `[past]`, `[past + n]`, `[0]`: lengths are read on the device, so that a recorded step serves any.
    old_len: DeviceArray<'d, u32>,
    new_len: DeviceArray<'d, u32>,
    zero: DeviceArray<'d, u32>,
}

/// Activations, for as many tokens as the largest step has.
struct Arrays<'d, T> {
    input: DeviceArray<'d, T>,
    attn_normed: DeviceArray<'d, T>,
    q_latent: DeviceArray<'d, T>,
    q_latent_normed: DeviceArray<'d, T>,
    q_raw: DeviceArray<'d, T>,
    k_raw: DeviceArray<'d, T>,
    v_raw: DeviceArray<'d, T>,
    q: DeviceArray<'d, T>,
    k_row: DeviceArray<'d, T>,
    k_heads: DeviceArray<'d, T>,
    v_heads: DeviceArray<'d, T>,
    /// Attention in the latent space, and attention before its gate.
    attended: DeviceArray<'d, T>,
    ungated: DeviceArray<'d, T>,
    attention: DeviceArray<'d, T>,
    projected: DeviceArray<'d, T>,
    after_attention: DeviceArray<'d, T>,
    mlp_normed: DeviceArray<'d, T>,
    logits: DeviceArray<'d, f32>,
    topk_ids: DeviceArray<'d, i32>,
    topk_weights: DeviceArray<'d, f32>,
    mlp_out: DeviceArray<'d, T>,
    /// What a norm behind attention or feed-forward makes of its rows.
    post: DeviceArray<'d, T>,
    out: DeviceArray<'d, T>,
}

pub(super) fn unsupported(case: &str) -> Error {
    Error::Unsupported { backend: "this example".into(), case: case.into() }
}

impl<'d, T: Float> DeviceLayer<'d, T> {
    /// Copies the weights to the device and makes room for steps of at most `max_tokens` and a cache of `capacity` rows.
    ///
    /// # Safety
    /// `stream` belongs to the device and outlives the layer.
    pub unsafe fn new(
        driver: &'d dyn Driver,
        stream: Stream,
        spec: &Layer,
        weights: &LayerWeights<T>,
        max_tokens: usize,
        capacity: usize,
    ) -> Result<Self> {
        spec.validate()?;
        let weights = Weights::new(driver, spec, weights, capacity)?;
        let rows = |width: usize| DeviceArray::new(driver, max_tokens * width);
        let hidden = spec.hidden_size;
        let dims = spec.attention();
        let (heads, mut q_width, mut k_raw, mut latents) = (dims.num_heads, dims.head_dim, 0, [0; 4]);
        let shape = match &spec.attention {
            AttentionBlock::Mla(block) => {
                let m = &block.mla;
                k_raw = m.kv_lora_rank + m.rope_dim;
                q_width = q_width.max(k_raw);
                let q_latent =
                    weights.latent.as_ref().and_then(|l| l.q_a.as_ref()).map_or(0, |(q_a, _)| q_a.shape()[0]);
                latents = [q_latent, heads * m.head_dim(), heads * m.value_dim, heads * m.kv_lora_rank];
                [1, k_raw, 0]
            }
            _ => [dims.num_kv_heads, dims.head_dim, dims.value_dim],
        };
        let wide = |linear: &Option<weights::Linear<'d, T>>| linear.as_ref().map_or(0, |linear| linear.shape()[0]);
        let [experts, slots] = match &spec.mlp {
            Mlp::Moe(moe) => [moe.router.num_experts, moe.router.slots()],
            _ => [0, 0],
        };
        let attention = heads * dims.value_dim;
        let arrays = Arrays {
            input: rows(hidden)?,
            attn_normed: rows(hidden)?,
            q_latent: rows(latents[0])?,
            q_latent_normed: rows(latents[0])?,
            q_raw: rows(weights.q.shape()[0])?,
            k_raw: rows(k_raw.max(wide(&weights.k)))?,
            v_raw: rows(wide(&weights.v))?,
            q: rows(heads * q_width)?,
            k_row: rows(k_raw)?,
            k_heads: rows(latents[1])?,
            v_heads: rows(latents[2])?,
            attended: rows(latents[3])?,
            ungated: rows(if weights.latent.is_none() { attention } else { 0 })?,
            attention: rows(attention)?,
            projected: rows(hidden)?,
            after_attention: rows(hidden)?,
            mlp_normed: rows(hidden)?,
            logits: DeviceArray::new(driver, max_tokens * experts)?,
            topk_ids: DeviceArray::new(driver, max_tokens * slots)?,
            topk_weights: DeviceArray::new(driver, max_tokens * slots)?,
            mlp_out: rows(hidden)?,
            post: rows(hidden)?,
            out: rows(hidden)?,
        };
        let [kv_heads, k_dim, v_dim] = shape;
        let k = DeviceArray::new(driver, capacity * kv_heads * k_dim)?;
        let v = DeviceArray::new(driver, capacity * kv_heads * v_dim)?;
        let mut zero = DeviceArray::new(driver, 1)?;
        zero.write(stream, &[0])?;
        let tokens = Tokens {
            n: 0,
            past: 0,
            absorbed: false,
            positions: DeviceArray::new(driver, max_tokens)?,
            old_len: DeviceArray::new(driver, 1)?,
            new_len: DeviceArray::new(driver, 1)?,
            zero,
        };
        // SAFETY: the caller's promise.
        let queue = unsafe { Queue::on_stream(driver, stream) };
        let cache = DeviceCache { k, v, capacity, shape };
        Ok(DeviceLayer { spec: spec.clone(), queue, weights, cache, arrays, tokens })
    }

    /// Writes what a step reads: rows of input behind `past` rows of the cache.
    pub fn begin(&mut self, x: &Array<T>, past: usize, absorbed: bool) -> Result<()> {
        let (stream, n) = (self.queue.stream(), x.shape[0]);
        assert!(past + n <= self.cache.capacity, "{past} + {n} rows in a cache of {}", self.cache.capacity);
        let is_latent = matches!(self.spec.attention, AttentionBlock::Mla(_));
        if is_latent && past > 0 && !absorbed {
            return Err(unsupported("expanded keys of rows that are in the cache already"));
        }
        let t = &mut self.tokens;
        (t.n, t.past, t.absorbed) = (n, past, absorbed && is_latent);
        self.arrays.input.write(stream, &x.data)?;
        t.positions.write(stream, &(past..past + n).map(|p| p as u32).collect::<Vec<_>>())?;
        t.old_len.write(stream, &[past as u32])?;
        t.new_len.write(stream, &[(past + n) as u32])
    }

    /// Queues a whole step.
    pub fn step(&mut self) -> Result<()> {
        PARTS.into_iter().try_for_each(|part| self.run(part))
    }

    /// Records a step of as many tokens as the last one had. Its replay reads what [`DeviceLayer::begin`] has written since. It
    /// names the workspace as it is: run the largest step before.
    ///
    /// # Errors
    /// [`Error::Driver`], also where no such step has run before: kernels are loaded and the workspace grows the first time.
    pub fn record(&mut self, recorder: &dyn Recorder) -> Result<u64> {
        let stream = self.queue.stream();
        // SAFETY: the stream is this layer's.
        unsafe { recorder.record(stream, &mut || self.step()) }
    }

    /// Queues one part of a step.
    pub fn run(&mut self, part: Part) -> Result<()> {
        match part {
            Part::AttentionNorm => self.attn_norm(),
            Part::Projection => self.project(),
            Part::Prepare => self.prepare(),
            Part::Attention => self.attend(),
            Part::OutProjection => self.out_projection(),
            Part::ResidualNorm => self.residual_norm(),
            Part::Mlp => self.mlp(),
            Part::Residual => self.residual(),
        }
    }

    fn attn_norm(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, tokens, .. } = self;
        let shape = [tokens.n, spec.hidden_size];
        w.attn_norm.run(queue, &spec.norm, a.input.view(shape), a.attn_normed.view_mut(shape))
    }

    fn out_projection(&mut self) -> Result<()> {
        let DeviceLayer { queue, weights: w, arrays: a, tokens, .. } = self;
        let [outs, ins] = w.out.shape();
        w.out.run(queue, a.attention.view([tokens.n, ins]), a.projected.view_mut([tokens.n, outs]))
    }

    /// `after_attention = input + r * post(projected)`, `mlp_normed = norm(after_attention)`: one pass, which the plan has and
    /// no safe call.
    fn residual_norm(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, tokens, .. } = self;
        let shape = [tokens.n, spec.hidden_size];
        let mut x = a.projected.view(shape);
        if spec.post_attention_norm {
            w.post_attn_norm.run(queue, &spec.norm, x, a.post.view_mut(shape))?;
            x = a.post.view(shape);
        }
        let mut problem = NormProblem::new(spec.norm, T::DTYPE, tokens.n, spec.hidden_size);
        problem.residual_multiplier = spec.residual_multiplier;
        let plan = NormPlan::new(&problem)?;
        let (residual, sum) = (a.input.view(shape).ptr(), a.after_attention.view_mut(shape).ptr());
        let mut args = NormArgs::new(x.ptr(), a.mlp_normed.view_mut(shape).ptr()).with_residual(residual, sum);
        args.weight = weights::as_view(&w.mlp_norm.weight).map(|weight| weight.ptr());
        args.bias = weights::as_view(&w.mlp_norm.bias).map(|bias| bias.ptr());
        // SAFETY: all arrays hold rows of the plan's shape, the weights as many numbers as a row (the safe norm at the layer's
        // begin has the same), and only this stream uses them.
        unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
    }

    fn mlp(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, tokens, .. } = self;
        let shape = [tokens.n, spec.hidden_size];
        let (x, out) = (a.mlp_normed.view(shape), a.mlp_out.view_mut(shape));
        match (&spec.mlp, &w.mlp, &w.moe) {
            (Mlp::Dense(ffn), Some(weights), _) => mlp(queue, ffn, x, &StagedFfn::weights(weights), out),
            (Mlp::Moe(spec), _, Some(weights)) => {
                let slots = [tokens.n, spec.router.slots()];
                let mut output = MoeOutput::new(out);
                output.route = Some(RouteOutput::new(a.topk_ids.view_mut(slots), a.topk_weights.view_mut(slots)));
                moe(queue, spec, &MoeInput::new(x), &weights.weights(), output)
            }
            _ => Err(unsupported("feed-forward part")),
        }
    }

    fn residual(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, tokens, .. } = self;
        let shape = [tokens.n, spec.hidden_size];
        let mut y = a.mlp_out.view(shape);
        if spec.post_mlp_norm {
            w.post_mlp_norm.run(queue, &spec.norm, y, a.post.view_mut(shape))?;
            y = a.post.view(shape);
        }
        add(queue, a.after_attention.view(shape), y, spec.residual_multiplier, a.out.view_mut(shape))
    }
}

/// What came out, for tables and checks.
impl<T: Float> DeviceLayer<'_, T> {
    /// The output of the last step.
    pub fn output(&self) -> Result<Array<T>> {
        self.fetch(&self.arrays.out, &[self.tokens.n, self.spec.hidden_size])
    }

    fn fetch<E: bytemuck::Pod>(&self, array: &DeviceArray<'_, E>, shape: &[usize]) -> Result<Array<E>> {
        Ok(Array::new(array.read(self.queue.stream(), 0, shape.iter().product())?, shape))
    }

    /// The experts of each token, where the layer has any.
    pub fn experts(&self) -> Result<Array<i32>> {
        let Mlp::Moe(moe) = &self.spec.mlp else { return Ok(Array::default()) };
        self.fetch(&self.arrays.topk_ids, &[self.tokens.n, moe.router.slots()])
    }

    /// The cache with the rows of the last step.
    pub fn cache(&self) -> Result<Cache<T>> {
        self.cache_of_len(self.tokens.past + self.tokens.n)
    }

    /// The first rows of the cache; behind them there is whatever the memory held before.
    pub fn cache_of_len(&self, len: usize) -> Result<Cache<T>> {
        let DeviceCache { k, v, capacity, shape: [heads, k_dim, v_dim] } = &self.cache;
        let rows = |array: &DeviceArray<'_, T>, width: &usize| -> Result<Array<T>> {
            let mut data = array.read(self.queue.stream(), 0, len * heads * width)?;
            data.resize(capacity * heads * width, T::default());
            Ok(Array::new(data, &[1, *capacity, *heads, *width]))
        };
        Ok(Cache { k: rows(k, k_dim)?, v: rows(v, v_dim)?, lens: vec![len as u32], k_start: vec![0] })
    }

    /// Everything the last step has computed. The router's logits, which a mixture keeps in its workspace, are computed once
    /// more: the same kernel, the same bits.
    pub fn trace(&mut self) -> Result<Trace<T, f32>> {
        let (n, hidden) = (self.tokens.n, self.spec.hidden_size);
        let mut t = Trace::default();
        if let (Mlp::Moe(spec), Some(weights)) = (&self.spec.mlp, &self.weights.moe) {
            let (experts, slots) = (spec.router.num_experts, spec.router.slots());
            let (x, router) = (self.arrays.mlp_normed.view([n, hidden]), weights.weights());
            let logits = self.arrays.logits.view_mut([n, experts]);
            router_logits(&mut self.queue, &spec.router, x, router.router, router.router_bias, 0, logits)?;
            t.logits = self.fetch(&self.arrays.logits, &[n, experts])?;
            t.topk_ids = self.experts()?;
            t.topk_weights = self.fetch(&self.arrays.topk_weights, &[n, slots])?;
        }
        let (a, w) = (&self.arrays, &self.weights);
        let [heads, k_dim, v_dim] = self.cache.shape;
        let (q_heads, value_dim) = (self.spec.attention().num_heads, self.spec.attention().value_dim);
        let q_width = match (&self.spec.attention, self.tokens.absorbed) {
            (AttentionBlock::Mla(_), true) => k_dim,
            _ => self.spec.attention().head_dim,
        };
        let (past, stream) = (self.tokens.past, self.queue.stream());
        let new_rows = |array: &DeviceArray<'_, T>, width: usize| -> Result<Array<T>> {
            let row = heads * width;
            Ok(Array::new(array.read(stream, past * row, n * row)?, &[n, heads, width]))
        };
        let width = |linear: &Option<weights::Linear<'_, T>>, other| linear.as_ref().map_or(other, |l| l.shape()[0]);
        t.input = self.fetch(&a.input, &[n, hidden])?;
        t.attn_normed = self.fetch(&a.attn_normed, &[n, hidden])?;
        t.raw = Raw {
            q: self.fetch(&a.q_raw, &[n, w.q.shape()[0]])?,
            k: self.fetch(&a.k_raw, &[n, width(&w.k, k_dim)])?,
            v: self.fetch(&a.v_raw, &[n, width(&w.v, 0)])?,
        };
        t.qkv = Qkv {
            q: self.fetch(&a.q, &[n, q_heads, q_width])?,
            k: new_rows(&self.cache.k, k_dim)?,
            v: new_rows(&self.cache.v, v_dim)?,
        };
        t.attention = self.fetch(&a.attention, &[n, q_heads * value_dim])?;
        t.projected = self.fetch(&a.projected, &[n, hidden])?;
        t.after_attention = self.fetch(&a.after_attention, &[n, hidden])?;
        t.mlp_normed = self.fetch(&a.mlp_normed, &[n, hidden])?;
        t.mlp_out = self.fetch(&a.mlp_out, &[n, hidden])?;
        t.out = self.output()?;
        Ok(t)
    }

    /// Runs each part of a step by itself and takes its time.
    pub fn timed(&mut self, clock: &Clock<'_>) -> Result<Vec<Stage>> {
        let times: Result<Vec<Duration>> = PARTS.into_iter().map(|part| clock(&mut || self.run(part))).collect();
        let (times, ids) = (times?, self.experts()?);
        Ok(PARTS.into_iter().zip(times).map(|(part, time)| self.stage(part, time, &ids)).collect())
    }

    /// A part with what it has to do.
    fn stage(&self, part: Part, time: Duration, ids: &Array<i32>) -> Stage {
        let (spec, t, w) = (&self.spec, &self.tokens, &self.weights);
        let (n, hidden) = (t.n, spec.hidden_size);
        let (name, cost) = match part {
            Part::AttentionNorm => ("attention norm", rows_cost::<T>(n, hidden, 2)),
            Part::Projection => ("qkv projection", product_cost::<T>(n, hidden, w.projected_width())),
            Part::Prepare => ("rope, kv append", rows_cost::<T>(n, w.projected_width(), 2)),
            Part::Attention => {
                let cu_seqlens = [0, n as u32];
                let (lens, past) = ([(t.past + n) as u32], [t.past as i64]);
                ("attention", attention_cost::<T>(spec, &cu_seqlens, &lens, &[0], &past, t.absorbed))
            }
            Part::OutProjection => {
                let [outs, ins] = w.out.shape();
                ("out projection", product_cost::<T>(n, ins, outs))
            }
            Part::ResidualNorm => ("residual, norm", rows_cost::<T>(n, hidden, 4)),
            Part::Mlp => match &spec.mlp {
                Mlp::Dense(ffn) => ("mlp", block_cost::<T>(ffn, n)),
                Mlp::Moe(moe) => {
                    let router = product_cost::<T>(n, hidden, moe.router.num_experts);
                    let Cost { shape, flops, bytes } = experts_cost::<T>(moe, n, ids);
                    let (flops, bytes) = (flops + router.flops, bytes + router.bytes);
                    ("router, experts", Cost { shape, flops, bytes })
                }
                _ => ("feed-forward", rows_cost::<T>(n, hidden, 2)),
            },
            Part::Residual => ("residual", rows_cost::<T>(n, hidden, 3)),
        };
        let Cost { shape, flops, bytes } = cost;
        Stage { name, shape, time, flops, bytes }
    }
}
