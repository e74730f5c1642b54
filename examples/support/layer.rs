//! A whole layer as a sequence of the public functions: norm, projections, RoPE, attention with a KV cache, router, experts.

use super::array::{Array, cast};
use super::backend::{Backend, FfnArrays, MoeArrays};
use gatefold::args::{
    AttentionInput, AttentionOutput, Kv, KvCache, KvCacheMut, MoeInput, MoeOutput, QkvInput, QkvOutput, RopeTable,
    RouteInput, RouteOutput, Routing,
};
use gatefold::cpu::Float;
use gatefold::spec::{Attention, AttentionBlock, Ffn, GqaBlock, Layer, MlaBlock, Mlp, Moe, Norm, Rope};
use gatefold::{Element, Error, Result, View, ViewMut};
use std::time::{Duration, Instant};

/// Weights of a layer on the host: matrices `[out, in]` of type `W`, small vectors in f64. Names follow the projections.
#[derive(Clone, Debug, Default)]
pub struct LayerWeights<W> {
    pub attn_norm: NormWeights,
    pub mlp_norm: NormWeights,
    pub post_attn_norm: NormWeights,
    pub post_mlp_norm: NormWeights,
    pub attention: AttentionWeights<W>,
    pub mlp: Option<FfnArrays<W>>,
    pub moe: Option<MoeArrays<W>>,
}

/// Weight and bias of a norm.
#[derive(Clone, Debug, Default)]
pub struct NormWeights {
    pub weight: Option<Vec<f64>>,
    pub bias: Option<Vec<f64>>,
}

/// One projection.
#[derive(Clone, Debug, Default)]
pub struct Projection<W> {
    pub weight: Array<W>,
    pub bias: Option<Vec<f64>>,
}

/// Weights of the attention part.
#[derive(Clone, Debug, Default)]
pub struct AttentionWeights<W> {
    /// With an output gate: per head a query and a gate.
    pub q: Projection<W>,
    pub k: Projection<W>,
    pub v: Projection<W>,
    pub out: Projection<W>,
    pub q_norm: Option<Vec<f64>>,
    pub k_norm: Option<Vec<f64>>,
    pub sinks: Option<Vec<f64>>,
    pub alibi_slopes: Option<Vec<f64>>,
    /// `[num_buckets, num_heads]`
    pub relative_bias: Option<Array<f64>>,
    /// Latent attention, compressed queries: hidden to latent; `q` is then latent to heads.
    pub q_a: Option<Projection<W>>,
    pub q_a_norm: Option<Vec<f64>>,
    /// Latent attention: hidden to `[latent | k_rope]`.
    pub kv_a: Option<Projection<W>>,
    pub kv_a_norm: Option<Vec<f64>>,
    /// Latent attention: `[num_heads, nope_dim + value_dim, kv_lora_rank]`.
    pub kv_b: Option<Array<W>>,
}

/// A layer as a backend keeps it.
pub struct PackedLayer<'a, B: Backend> {
    pub spec: Layer,
    attn_norm: Small<B::S>,
    mlp_norm: Small<B::S>,
    post_attn_norm: Small<B::S>,
    post_mlp_norm: Small<B::S>,
    q: Packed<'a, B>,
    k: Option<Packed<'a, B>>,
    v: Option<Packed<'a, B>>,
    out: Packed<'a, B>,
    q_norm: Option<Vec<B::S>>,
    k_norm: Option<Vec<B::S>>,
    sinks: Option<Vec<B::S>>,
    alibi_slopes: Option<Vec<B::S>>,
    relative_bias: Option<Array<B::S>>,
    mla: Option<PackedMlaParts<'a, B>>,
    mlp: Option<B::Mlp<'a>>,
    moe: Option<B::Moe<'a>>,
    selection_bias: Option<Vec<B::S>>,
    rope: Option<Table<B::S>>,
}

struct PackedMlaParts<'a, B: Backend> {
    q_a: Option<(Packed<'a, B>, Vec<B::S>)>,
    kv_a: Packed<'a, B>,
    kv_a_norm: Vec<B::S>,
    kv_b: B::Mla<'a>,
    /// `kv_b` as one matrix, for the expanded form.
    kv_b_rows: B::Linear<'a>,
}

struct Packed<'a, B: Backend> {
    weight: B::Linear<'a>,
    bias: Option<Vec<B::S>>,
    shape: [usize; 2],
}

struct Small<S> {
    weight: Option<Vec<S>>,
    bias: Option<Vec<S>>,
}

struct Table<S> {
    cos: Array<S>,
    sin: Array<S>,
}

impl<S: Element> Table<S> {
    fn new(rope: &Rope, num_positions: usize) -> Self {
        let (cos, sin) = rope.table(num_positions);
        let shape = [num_positions, rope.rotary_dim / 2];
        Table { cos: Array::new(cast(&cos), &shape), sin: Array::new(cast(&sin), &shape) }
    }

    fn args(&self) -> RopeTable<'_, S> {
        RopeTable::new(self.cos.view(), self.sin.view())
    }
}

fn pack<'a, B: Backend, W: Float>(b: &mut B, p: &'a Projection<W>) -> Result<Packed<'a, B>> {
    let shape = p.weight.rows().shape();
    Ok(Packed { weight: b.pack_linear(&p.weight)?, bias: p.bias.as_deref().map(cast), shape })
}

fn small<S: Element>(norm: &NormWeights) -> Small<S> {
    Small { weight: norm.weight.as_deref().map(cast), bias: norm.bias.as_deref().map(cast) }
}

impl<'a, B: Backend> PackedLayer<'a, B> {
    /// Packs the weights; positions up to `max_positions` can then be run.
    ///
    /// # Errors
    /// Those of packing, and [`Error::Presence`] for weights that the specification asks for.
    pub fn pack<W: Float>(b: &mut B, spec: &Layer, weights: &'a LayerWeights<W>, max_positions: usize) -> Result<Self> {
        spec.validate()?;
        let missing = |name: &str| Error::Presence {
            argument: name.into(),
            expected: "given: the layer has it".into(),
            found: "absent".into(),
        };
        let a = &weights.attention;
        let (mla, rope) = match &spec.attention {
            AttentionBlock::Gqa(block) => (None, block.rope.as_ref()),
            AttentionBlock::Mla(block) => {
                let kv_b = a.kv_b.as_ref().ok_or_else(|| missing("kv_b"))?;
                let parts = PackedMlaParts {
                    q_a: match (&a.q_a, &a.q_a_norm) {
                        (Some(p), Some(norm)) => Some((pack(b, p)?, cast(norm))),
                        _ => None,
                    },
                    kv_a: pack(b, a.kv_a.as_ref().ok_or_else(|| missing("kv_a"))?)?,
                    kv_a_norm: cast(a.kv_a_norm.as_ref().ok_or_else(|| missing("kv_a_norm"))?),
                    kv_b: b.pack_mla(&block.mla, kv_b)?,
                    kv_b_rows: b.pack_linear(kv_b)?,
                };
                (Some(parts), Some(&block.rope))
            }
            _ => return Err(Error::Unsupported { backend: "this example".into(), case: "attention block".into() }),
        };
        let gqa = mla.is_none();
        Ok(PackedLayer {
            spec: spec.clone(),
            attn_norm: small(&weights.attn_norm),
            mlp_norm: small(&weights.mlp_norm),
            post_attn_norm: small(&weights.post_attn_norm),
            post_mlp_norm: small(&weights.post_mlp_norm),
            q: pack(b, &a.q)?,
            k: if gqa { Some(pack(b, &a.k)?) } else { None },
            v: if gqa { Some(pack(b, &a.v)?) } else { None },
            out: pack(b, &a.out)?,
            q_norm: a.q_norm.as_deref().map(cast),
            k_norm: a.k_norm.as_deref().map(cast),
            sinks: a.sinks.as_deref().map(cast),
            alibi_slopes: a.alibi_slopes.as_deref().map(cast),
            relative_bias: a.relative_bias.as_ref().map(Array::cast),
            mla,
            mlp: match (&spec.mlp, &weights.mlp) {
                (Mlp::Dense(ffn), Some(w)) => Some(b.pack_mlp(ffn, w)?),
                (Mlp::Dense(_), None) => return Err(missing("mlp")),
                _ => None,
            },
            moe: match (&spec.mlp, &weights.moe) {
                (Mlp::Moe(moe), Some(w)) => Some(b.pack_moe(moe, w)?),
                (Mlp::Moe(_), None) => return Err(missing("moe")),
                _ => None,
            },
            selection_bias: weights.moe.as_ref().and_then(|m| m.selection_bias.as_deref().map(cast)),
            rope: rope.map(|r| Table::new(r, max_positions)),
        })
    }

    /// Width and heads of a cache row: keys, values. Latent attention keeps `[latent | k_rope]` as the key alone.
    fn cache_shape(&self) -> (usize, usize, usize) {
        match &self.spec.attention {
            AttentionBlock::Mla(block) => (1, block.mla.kv_lora_rank + block.mla.rope_dim, 0),
            _ => {
                let a = self.spec.attention();
                (a.num_kv_heads, a.head_dim, a.value_dim)
            }
        }
    }

    /// An empty cache with room for `capacity` rows per sequence.
    pub fn cache(&self, num_seqs: usize, capacity: usize) -> Cache<B::A> {
        let (heads, k_dim, v_dim) = self.cache_shape();
        Cache {
            k: Array::zeros(&[num_seqs, capacity, heads, k_dim]),
            v: Array::zeros(&[num_seqs, capacity, heads, v_dim]),
            lens: vec![0; num_seqs],
            k_start: vec![0; num_seqs],
        }
    }
}

/// Keys and values of a layer: `[num_seqs, capacity, heads, width]`.
#[derive(Clone, Debug)]
pub struct Cache<T> {
    pub k: Array<T>,
    pub v: Array<T>,
    /// Filled rows.
    pub lens: Vec<u32>,
    /// Absolute position of row 0.
    pub k_start: Vec<i64>,
}

/// The rows of a call.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// `[num_seqs + 1]`
    pub cu_seqlens: Vec<u32>,
    /// `[num_tokens]`
    pub positions: Vec<u32>,
    /// `[num_seqs, 1, 1, keys]`: 0 hides a key.
    pub key_mask: Option<Array<u8>>,
    /// `[num_tokens]`: 0 marks padding for routers with a capacity.
    pub token_mask: Option<Vec<u8>>,
}

impl Rows {
    /// `num_seqs` sequences of `len` rows each, the first at `position`.
    pub fn equal(num_seqs: usize, len: usize, position: usize) -> Self {
        Rows {
            cu_seqlens: (0..=num_seqs).map(|s| (s * len) as u32).collect(),
            positions: (0..num_seqs).flat_map(|_| (position..position + len).map(|p| p as u32)).collect(),
            ..Rows::default()
        }
    }
}

impl<W: Element> Projection<W> {
    fn cast<V: Element>(&self) -> Projection<V> {
        Projection { weight: self.weight.cast(), bias: self.bias.clone() }
    }
}

impl<W: Element> LayerWeights<W> {
    /// Each matrix rounded to another type.
    pub fn cast<V: Element>(&self) -> LayerWeights<V> {
        let a = &self.attention;
        LayerWeights {
            attn_norm: self.attn_norm.clone(),
            mlp_norm: self.mlp_norm.clone(),
            post_attn_norm: self.post_attn_norm.clone(),
            post_mlp_norm: self.post_mlp_norm.clone(),
            attention: AttentionWeights {
                q: a.q.cast(),
                k: a.k.cast(),
                v: a.v.cast(),
                out: a.out.cast(),
                q_norm: a.q_norm.clone(),
                k_norm: a.k_norm.clone(),
                sinks: a.sinks.clone(),
                alibi_slopes: a.alibi_slopes.clone(),
                relative_bias: a.relative_bias.clone(),
                q_a: a.q_a.as_ref().map(Projection::cast),
                q_a_norm: a.q_a_norm.clone(),
                kv_a: a.kv_a.as_ref().map(Projection::cast),
                kv_a_norm: a.kv_a_norm.clone(),
                kv_b: a.kv_b.as_ref().map(Array::cast),
            },
            mlp: self.mlp.as_ref().map(FfnArrays::cast),
            moe: self.moe.as_ref().map(MoeArrays::cast),
        }
    }
}

/// How to run a layer.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Latent attention: scores against the latent cache in place of expanded keys.
    pub absorbed: bool,
    /// Experts and weights `[num_tokens, slots]` in place of the router's choice.
    pub replay: Option<(Array<i32>, Array<f64>)>,
    /// Only these rows of a single sequence, once all keys are in the cache; the output has one row for each.
    pub sample: Option<Vec<usize>>,
}

/// One stage of a run.
#[derive(Clone, Debug)]
pub struct Stage {
    pub name: &'static str,
    pub shape: String,
    pub time: Duration,
    pub flops: f64,
    pub bytes: f64,
}

/// Everything a run has computed.
#[derive(Clone, Debug, Default)]
pub struct Trace<A, S> {
    pub stages: Vec<Stage>,
    pub input: Array<A>,
    pub attn_normed: Array<A>,
    pub raw: Raw<A>,
    pub qkv: Qkv<A>,
    /// `[num_tokens, num_heads * value_dim]`
    pub attention: Array<A>,
    pub projected: Array<A>,
    pub after_attention: Array<A>,
    pub mlp_normed: Array<A>,
    pub logits: Array<S>,
    pub topk_ids: Array<i32>,
    pub topk_weights: Array<S>,
    pub mlp_out: Array<A>,
    pub out: Array<A>,
}

/// Projected rows. Latent attention: `k` is `[latent | k_rope]`, `v` is empty.
#[derive(Clone, Debug, Default)]
pub struct Raw<A> {
    pub q: Array<A>,
    pub k: Array<A>,
    pub v: Array<A>,
}

/// Rows as attention and the cache take them, `[num_tokens, heads, width]`.
#[derive(Clone, Debug, Default)]
pub struct Qkv<A> {
    pub q: Array<A>,
    pub k: Array<A>,
    pub v: Array<A>,
}

struct Clock {
    stages: Vec<Stage>,
}

impl Clock {
    fn run<R>(&mut self, name: &'static str, cost: Cost, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let start = Instant::now();
        let result = work()?;
        let Cost { shape, flops, bytes } = cost;
        self.stages.push(Stage { name, shape, time: start.elapsed(), flops, bytes });
        Ok(result)
    }
}

/// What a stage has to do: FLOPs (a multiply-add is two) and bytes that must be read or written once.
pub struct Cost {
    pub shape: String,
    pub flops: f64,
    pub bytes: f64,
}

fn size<A: Element>(elements: usize) -> f64 {
    (elements * A::DTYPE.size_bytes()) as f64
}

/// Rows of activations in and out, nothing to multiply.
pub fn rows_cost<A: Element>(rows: usize, width: usize, times: usize) -> Cost {
    Cost { shape: format!("{rows} x {width}"), flops: 0.0, bytes: size::<A>(times * rows * width) }
}

/// A product with weights of `outs x ins`.
pub fn product_cost<A: Element>(rows: usize, ins: usize, outs: usize) -> Cost {
    let shape = format!("{rows} x {ins} -> {outs}");
    Cost { shape, flops: 2.0 * (rows * outs * ins) as f64, bytes: size::<A>(outs * ins + rows * (ins + outs)) }
}

/// A feed-forward block.
pub fn block_cost<A: Element>(ffn: &Ffn, n: usize) -> Cost {
    let shape = format!("{n} x {} x {}", ffn.hidden_size, ffn.intermediate_size);
    Cost { shape, flops: 2.0 * (n * block_size(ffn)) as f64, bytes: size::<A>(block_size(ffn)) }
}

/// Weights of a block.
fn block_size(ffn: &Ffn) -> usize {
    ffn.hidden_size * ffn.intermediate_size * if ffn.gated { 3 } else { 2 }
}

/// Experts and shared expert. Weights are read once per expert that has a token.
pub fn experts_cost<A: Element>(moe: &Moe, n: usize, ids: &Array<i32>) -> Cost {
    let ffn = &moe.experts.ffn;
    let mut touched = vec![false; moe.router.num_experts];
    let mut assignments = 0;
    for id in ids.data.iter().filter(|id| **id >= 0) {
        touched[*id as usize] = true;
        assignments += 1;
    }
    let (block, shared) = (block_size(ffn), moe.shared.map_or(0, |s| block_size(&s.ffn)));
    let experts = touched.iter().filter(|t| **t).count();
    Cost {
        shape: format!("{assignments} x {} x {}, {experts} experts", ffn.hidden_size, ffn.intermediate_size),
        flops: 2.0 * (assignments * block + n * shared) as f64,
        bytes: size::<A>(experts * block + shared),
    }
}

/// Attention of rows that begin at `starts` to a cache with `lens` rows from position `k_start` on; more sequences than the
/// cache has share its first one.
pub fn attention_cost<A: Element>(
    spec: &Layer,
    cu_seqlens: &[u32],
    lens: &[u32],
    k_start: &[i64],
    starts: &[i64],
    absorbed: bool,
) -> Cost {
    let mut a = spec.attention().clone();
    if let (AttentionBlock::Mla(block), true) = (&spec.attention, absorbed) {
        a = block.mla.absorbed(&block.attention);
    }
    // Visible pairs of a query and a key.
    let mut pairs = 0.0;
    for (seq, start) in starts.iter().enumerate() {
        let of = seq.min(lens.len() - 1);
        for i in 0..cu_seqlens[seq + 1] - cu_seqlens[seq] {
            let visible = a.mask.visible_range(start + i64::from(i));
            let end = visible.end.min(k_start[of] + i64::from(lens[of]));
            pairs += (end - visible.start.max(k_start[of])).max(0) as f64;
        }
    }
    let keys = lens.iter().sum::<u32>() as usize;
    let width = a.head_dim + a.value_dim;
    let kv_width = if absorbed { a.head_dim } else { width };
    let n = cu_seqlens[starts.len()] as usize;
    let form = if absorbed { ", absorbed" } else { "" };
    Cost {
        shape: format!("{n} x {} heads, {keys} keys{form}", a.num_heads),
        flops: 2.0 * pairs * (a.num_heads * width) as f64,
        bytes: size::<A>(keys * a.num_kv_heads * kv_width + n * a.num_heads * width),
    }
}

fn project<B: Backend>(b: &mut B, p: &Packed<'_, B>, x: &Array<B::A>) -> Result<Array<B::A>> {
    let mut out = Array::zeros(&[x.rows().shape()[0], p.shape[0]]);
    b.linear(x.rows(), &p.weight, p.bias.as_deref(), out.rows_mut())?;
    Ok(out)
}

fn unsupported(case: &str) -> Error {
    Error::Unsupported { backend: "this example".into(), case: case.into() }
}

/// Runs a layer on `x` `[num_tokens, hidden_size]`, appending to the cache.
///
/// # Errors
/// Those of the backend.
pub fn run<B: Backend>(
    b: &mut B,
    layer: &PackedLayer<'_, B>,
    x: &Array<B::A>,
    rows: &Rows,
    cache: &mut Cache<B::A>,
    options: &Options,
) -> Result<Trace<B::A, B::S>> {
    let spec = &layer.spec;
    let (mut n, hidden) = (x.shape[0], spec.hidden_size);
    let mut t = Trace { input: x.clone(), ..Trace::default() };
    let mut clock = Clock { stages: Vec::new() };
    let mut rows = rows.clone();

    t.attn_normed = clock.run("attention norm", rows_cost::<B::A>(n, hidden, 2), || layer.attn_norm(b, x))?;
    let outs = layer.projected_width();
    t.raw =
        clock.run("qkv projection", product_cost::<B::A>(n, hidden, outs), || layer.project_qkv(b, &t.attn_normed))?;
    t.qkv = clock.run("qk norm, rope", rows_cost::<B::A>(n, outs, 2), || {
        layer.prepare(b, &t.raw, &rows.positions, options.absorbed)
    })?;
    let appended = t.qkv.k.data.len() + t.qkv.v.data.len();
    clock.run("kv append", rows_cost::<B::A>(n, appended / n.max(1), 2), || {
        let new = KvCache::new(t.qkv.k.view(), t.qkv.v.view(), Some(&rows.cu_seqlens), &cache.lens);
        b.kv_append(&new, KvCacheMut::contiguous(cache.k.view_mut(), cache.v.view_mut()))
    })?;
    let mut starts: Vec<i64> = cache.lens.iter().zip(&cache.k_start).map(|(l, s)| s + i64::from(*l)).collect();
    for (seq, len) in cache.lens.iter_mut().enumerate() {
        *len += rows.cu_seqlens[seq + 1] - rows.cu_seqlens[seq];
    }
    if let Some(sample) = &options.sample {
        // Each row becomes a sequence of its own over the same keys.
        starts = sample.iter().map(|i| starts[0] + *i as i64).collect();
        rows.positions = sample.iter().map(|i| rows.positions[*i]).collect();
        rows.cu_seqlens = (0..=sample.len() as u32).collect();
        let q_shape = [sample.len(), t.qkv.q.shape[1], t.qkv.q.shape[2]];
        t.qkv.q = std::mem::take(&mut t.qkv.q).flat(n).pick(sample).reshape(&q_shape);
        t.raw.q = t.raw.q.pick(sample);
        t.input = t.input.pick(sample);
        n = sample.len();
    }
    let cost = attention_cost::<B::A>(spec, &rows.cu_seqlens, &cache.lens, &cache.k_start, &starts, options.absorbed);
    t.attention = clock
        .run("attention", cost, || layer.attend(b, &t.qkv.q, &t.raw.q, &rows, cache, &starts, options.absorbed))?;
    let [out, ins] = layer.out.shape;
    t.projected =
        clock.run("out projection", product_cost::<B::A>(n, ins, out), || project(b, &layer.out, &t.attention))?;
    t.after_attention =
        clock.run("residual", rows_cost::<B::A>(n, hidden, 3), || layer.after_attention(b, &t.input, &t.projected))?;
    t.mlp_normed = clock.run("mlp norm", rows_cost::<B::A>(n, hidden, 2), || layer.mlp_norm(b, &t.after_attention))?;
    match &spec.mlp {
        Mlp::Dense(ffn) => {
            t.mlp_out = clock.run("mlp", block_cost::<B::A>(ffn, n), || layer.dense(b, &t.mlp_normed))?;
        }
        Mlp::Moe(moe) => {
            let experts = moe.router.num_experts;
            t.logits =
                clock.run("router", product_cost::<B::A>(n, hidden, experts), || layer.logits(b, &t.mlp_normed))?;
            (t.topk_ids, t.topk_weights) = match &options.replay {
                Some((ids, weights)) => (ids.clone(), weights.cast()),
                None => clock.run("top-k", rows_cost::<B::S>(n, experts, 1), || {
                    layer.top_k(b, &t.logits, rows.token_mask.as_deref())
                })?,
            };
            t.mlp_out = clock.run("experts", experts_cost::<B::A>(moe, n, &t.topk_ids), || {
                layer.experts(b, &t.mlp_normed, &t.topk_ids, &t.topk_weights)
            })?;
        }
        _ => return Err(unsupported("feed-forward part")),
    }
    t.out =
        clock.run("residual", rows_cost::<B::A>(n, hidden, 3), || layer.finish(b, &t.after_attention, &t.mlp_out))?;
    t.stages = clock.stages;
    Ok(t)
}

/// The stages, each from its inputs alone.
impl<'w, B: Backend> PackedLayer<'w, B> {
    fn norm(&self, b: &mut B, weights: &Small<B::S>, x: &Array<B::A>) -> Result<Array<B::A>> {
        let mut out = Array::zeros(&x.shape);
        b.norm(&self.spec.norm, x.rows(), weights.weight.as_deref(), weights.bias.as_deref(), out.rows_mut())?;
        Ok(out)
    }

    pub fn attn_norm(&self, b: &mut B, x: &Array<B::A>) -> Result<Array<B::A>> {
        self.norm(b, &self.attn_norm, x)
    }

    pub fn mlp_norm(&self, b: &mut B, x: &Array<B::A>) -> Result<Array<B::A>> {
        self.norm(b, &self.mlp_norm, x)
    }

    /// Columns of all projections from the hidden state together.
    fn projected_width(&self) -> usize {
        match &self.mla {
            Some(parts) => parts.q_a.as_ref().map_or(self.q.shape[0], |(p, _)| p.shape[0]) + parts.kv_a.shape[0],
            None => {
                self.q.shape[0] + [&self.k, &self.v].iter().map(|p| p.as_ref().map_or(0, |p| p.shape[0])).sum::<usize>()
            }
        }
    }

    pub fn project_qkv(&self, b: &mut B, x: &Array<B::A>) -> Result<Raw<B::A>> {
        match (&self.mla, &self.k, &self.v) {
            (None, Some(k), Some(v)) => {
                Ok(Raw { q: project(b, &self.q, x)?, k: project(b, k, x)?, v: project(b, v, x)? })
            }
            (Some(parts), _, _) => {
                let q = match &parts.q_a {
                    Some((down, norm)) => {
                        let latent = project(b, down, x)?;
                        let mut normed = Array::zeros(&latent.shape);
                        let spec = Norm::rms(self.latent()?.mla.latent_norm_eps);
                        b.norm(&spec, latent.rows(), Some(norm), None, normed.rows_mut())?;
                        project(b, &self.q, &normed)?
                    }
                    None => project(b, &self.q, x)?,
                };
                Ok(Raw { q, k: project(b, &parts.kv_a, x)?, v: Array::zeros(&[x.shape[0], 0]) })
            }
            _ => Err(unsupported("projections")),
        }
    }

    fn latent(&self) -> Result<&MlaBlock> {
        match &self.spec.attention {
            AttentionBlock::Mla(block) => Ok(block),
            _ => Err(unsupported("latent attention")),
        }
    }

    pub fn prepare(&self, b: &mut B, raw: &Raw<B::A>, positions: &[u32], absorbed: bool) -> Result<Qkv<B::A>> {
        match &self.spec.attention {
            AttentionBlock::Gqa(block) => self.prepare_heads(b, block, raw, positions),
            AttentionBlock::Mla(block) => self.prepare_latent(b, block, raw, positions, absorbed),
            _ => Err(unsupported("attention block")),
        }
    }

    fn prepare_heads(&self, b: &mut B, block: &GqaBlock, raw: &Raw<B::A>, positions: &[u32]) -> Result<Qkv<B::A>> {
        let (a, n) = (&block.attention, raw.q.shape[0]);
        let mut out = Qkv {
            q: Array::zeros(&[n, a.num_heads, a.head_dim]),
            k: Array::zeros(&[n, a.num_kv_heads, a.head_dim]),
            v: Array::zeros(&[n, a.num_kv_heads, a.value_dim]),
        };
        let mut input = QkvInput::new(
            raw.q.columns(0, a.num_heads, q_stride(block), a.head_dim),
            raw.k.columns(0, a.num_kv_heads, a.head_dim, a.head_dim),
            raw.v.columns(0, a.num_kv_heads, a.value_dim, a.value_dim),
            positions,
        );
        input.q_norm = self.q_norm.as_deref();
        input.k_norm = self.k_norm.as_deref();
        input.rope = self.rope.as_ref().map(Table::args);
        let output = QkvOutput::new(out.q.view_mut(), out.k.view_mut(), out.v.view_mut());
        b.prepare_qkv(&block.qkv_prep(&self.spec.norm), &input, output)?;
        Ok(out)
    }

    /// New cache rows are `[normed latent | rotated k_rope]`; queries `[nope | rope]`, absorbed `[latent | rope]`.
    fn prepare_latent(
        &self,
        b: &mut B,
        block: &MlaBlock,
        raw: &Raw<B::A>,
        positions: &[u32],
        absorbed: bool,
    ) -> Result<Qkv<B::A>> {
        let (m, n) = (&block.mla, raw.q.shape[0]);
        let (heads, nope, rope_dim, rank) = (m.num_heads, m.nope_dim, m.rope_dim, m.kv_lora_rank);
        let (Some(parts), Some(table)) = (&self.mla, &self.rope) else { return Err(unsupported("latent attention")) };
        let (row, q_head) = (rank + rope_dim, nope + rope_dim);
        let mut k = Array::zeros(&[n, row]);
        let latent = View::with_strides(&raw.k.data, [n, rank], [row, 1]);
        let out = ViewMut::with_strides(&mut k.data, [n, rank], [row, 1]);
        b.norm(&Norm::rms(m.latent_norm_eps), latent, Some(&parts.kv_a_norm), None, out)?;
        let k_rope = raw.k.columns(rank, 1, row, rope_dim);
        b.rope(&block.rope, k_rope, positions, &table.args(), k.columns_mut(rank, 1, row, rope_dim))?;

        let first = if absorbed { rank } else { nope };
        let width = first + rope_dim;
        let mut q = Array::zeros(&[n, heads * width]);
        let q_rope = raw.q.columns(nope, heads, q_head, rope_dim);
        b.rope(&block.rope, q_rope, positions, &table.args(), q.columns_mut(first, heads, width, rope_dim))?;
        let q_nope = raw.q.columns(0, heads, q_head, nope);
        if absorbed {
            b.mla_absorb_query(m, q_nope, &parts.kv_b, q.columns_mut(0, heads, width, rank))?;
        } else {
            for t in 0..n {
                for h in 0..heads {
                    let start = (t * heads + h) * width;
                    q.data[start..start + nope].copy_from_slice(q_nope.row(&[t, h]));
                }
            }
        }
        Ok(Qkv { q: q.reshape(&[n, heads, width]), k: k.reshape(&[n, 1, row]), v: Array::zeros(&[n, 1, 0]) })
    }

    /// Attention of `q` against the cache, heads one behind the other, times the output gate where there is one. More
    /// sequences than the cache has share its first one.
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        b: &mut B,
        q: &Array<B::A>,
        q_raw: &Array<B::A>,
        rows: &Rows,
        cache: &Cache<B::A>,
        starts: &[i64],
        absorbed: bool,
    ) -> Result<Array<B::A>> {
        match &self.spec.attention {
            AttentionBlock::Gqa(block) => {
                let (a, n) = (&block.attention, q.shape[0]);
                let (k, v) = (cache.k.view(), cache.v.view());
                let out = self.attend_to(b, a, q, (k, v), rows, cache, starts)?.flat(n);
                if !block.output_gate {
                    return Ok(out);
                }
                let mut gate = Array::zeros(&[n, a.num_heads * a.value_dim]);
                let columns = q_raw.columns(a.head_dim, a.num_heads, q_stride(block), a.value_dim);
                for (i, to) in gate.data.chunks_mut(a.value_dim).enumerate() {
                    to.copy_from_slice(columns.row(&[i / a.num_heads, i % a.num_heads]));
                }
                let mut gated = Array::zeros(&gate.shape);
                b.sigmoid_mul(out.rows(), gate.rows(), gated.rows_mut())?;
                Ok(gated)
            }
            AttentionBlock::Mla(block) => {
                let (m, n) = (&block.mla, q.shape[0]);
                let Some(parts) = &self.mla else { return Err(unsupported("latent attention")) };
                if !absorbed {
                    let (k, v) = self.expand(b, block, cache)?;
                    let kv = (k.view(), v.view());
                    return Ok(self.attend_to(b, &block.attention, q, kv, rows, cache, starts)?.flat(n));
                }
                // The value is the first part of the key row: a view into the same cache.
                let k: View<'_, B::A, 4> = cache.k.view();
                let [seqs, capacity, _, _] = k.shape();
                let v = View::with_strides(&cache.k.data, [seqs, capacity, 1, m.kv_lora_rank], k.strides());
                let a = m.absorbed(&block.attention);
                let latent = self.attend_to(b, &a, q, (k, v), rows, cache, starts)?;
                let mut out = Array::zeros(&[n, m.num_heads, m.value_dim]);
                b.mla_project_value(m, latent.view(), &parts.kv_b, out.view_mut())?;
                Ok(out.flat(n))
            }
            _ => Err(unsupported("attention block")),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_to(
        &self,
        b: &mut B,
        a: &Attention,
        q: &Array<B::A>,
        (k, v): (View<'_, B::A, 4>, View<'_, B::A, 4>),
        rows: &Rows,
        cache: &Cache<B::A>,
        starts: &[i64],
    ) -> Result<Array<B::A>> {
        let (seqs, shared) = (starts.len(), starts.len() > cache.lens.len());
        let widen = |view: View<'_, B::A, 4>| {
            let ([_, rows, heads, width], [_, row, head, one]) = (view.shape(), view.strides());
            ([seqs, rows, heads, width], [0, row, head, one])
        };
        let (k, v) = if shared {
            let ((k_shape, k_strides), (v_shape, v_strides)) = (widen(k), widen(v));
            (View::with_strides(k.data(), k_shape, k_strides), View::with_strides(v.data(), v_shape, v_strides))
        } else {
            (k, v)
        };
        let of = |seq: usize| if shared { 0 } else { seq };
        let lens: Vec<u32> = (0..seqs).map(|s| cache.lens[of(s)]).collect();
        let k_start: Vec<i64> = (0..seqs).map(|s| cache.k_start[of(s)]).collect();
        let mut input = AttentionInput::new(q.view(), Kv::cache(k, v, &lens));
        input.cu_seqlens_q = Some(&rows.cu_seqlens);
        input.q_start = Some(starts);
        input.k_start = Some(&k_start);
        input.mask = rows.key_mask.as_ref().map(Array::view);
        input.sinks = self.sinks.as_deref();
        input.alibi_slopes = self.alibi_slopes.as_deref();
        input.relative_bias = self.relative_bias.as_ref().map(Array::view);
        let mut out = Array::zeros(&[q.shape[0], a.num_heads, a.value_dim]);
        b.attention(a, &input, AttentionOutput::new(out.view_mut()))?;
        Ok(out)
    }

    /// Keys and values of all heads from the latent cache.
    fn expand(&self, b: &mut B, block: &MlaBlock, cache: &Cache<B::A>) -> Result<Pair<B::A>> {
        let m = &block.mla;
        let (heads, nope, rope_dim, rank) = (m.num_heads, m.nope_dim, m.rope_dim, m.kv_lora_rank);
        let Some(parts) = &self.mla else { return Err(unsupported("latent attention")) };
        let (seqs, capacity) = (cache.k.shape[0], cache.k.shape[1]);
        let (row, head) = (rank + rope_dim, nope + m.value_dim);
        let mut both = Array::zeros(&[seqs * capacity, heads * head]);
        let latent = View::with_strides(&cache.k.data, [seqs * capacity, rank], [row, 1]);
        b.linear(latent, &parts.kv_b_rows, None, both.rows_mut())?;
        let mut k = Array::zeros(&[seqs, capacity, heads, nope + rope_dim]);
        let mut v = Array::zeros(&[seqs, capacity, heads, m.value_dim]);
        for t in 0..seqs * capacity {
            let k_rope = &cache.k.data[t * row + rank..(t + 1) * row];
            for h in 0..heads {
                let source = &both.data[(t * heads + h) * head..][..head];
                let to = &mut k.data[(t * heads + h) * (nope + rope_dim)..][..nope + rope_dim];
                to[..nope].copy_from_slice(&source[..nope]);
                to[nope..].copy_from_slice(k_rope);
                v.data[(t * heads + h) * m.value_dim..][..m.value_dim].copy_from_slice(&source[nope..]);
            }
        }
        Ok((k, v))
    }

    pub fn out_projection(&self, b: &mut B, attention: &Array<B::A>) -> Result<Array<B::A>> {
        project(b, &self.out, attention)
    }

    fn residual(&self, b: &mut B, post: Option<&Small<B::S>>, x: &Array<B::A>, y: &Array<B::A>) -> Result<Array<B::A>> {
        let mut out = Array::zeros(&x.shape);
        let normed = post.map(|weights| self.norm(b, weights, y)).transpose()?;
        let y = normed.as_ref().unwrap_or(y);
        b.add(x.rows(), y.rows(), self.spec.residual_multiplier, out.rows_mut())?;
        Ok(out)
    }

    pub fn after_attention(&self, b: &mut B, x: &Array<B::A>, projected: &Array<B::A>) -> Result<Array<B::A>> {
        let post = self.spec.post_attention_norm.then_some(&self.post_attn_norm);
        self.residual(b, post, x, projected)
    }

    pub fn finish(&self, b: &mut B, x: &Array<B::A>, mlp_out: &Array<B::A>) -> Result<Array<B::A>> {
        let post = self.spec.post_mlp_norm.then_some(&self.post_mlp_norm);
        self.residual(b, post, x, mlp_out)
    }

    pub fn dense(&self, b: &mut B, x: &Array<B::A>) -> Result<Array<B::A>> {
        let (Mlp::Dense(ffn), Some(mlp)) = (&self.spec.mlp, &self.mlp) else { return Err(unsupported("dense block")) };
        let mut out = Array::zeros(&x.shape);
        b.mlp(ffn, x.rows(), mlp, out.rows_mut())?;
        Ok(out)
    }

    fn mixture(&self) -> Result<(&Moe, &B::Moe<'w>)> {
        match (&self.spec.mlp, &self.moe) {
            (Mlp::Moe(moe), Some(weights)) => Ok((moe, weights)),
            _ => Err(unsupported("mixture")),
        }
    }

    pub fn logits(&self, b: &mut B, x: &Array<B::A>) -> Result<Array<B::S>> {
        let (moe, weights) = self.mixture()?;
        let mut out = Array::zeros(&[x.shape[0], moe.router.num_experts]);
        b.router_logits(&moe.router, x.rows(), weights, out.view_mut())?;
        Ok(out)
    }

    pub fn top_k(
        &self,
        b: &mut B,
        logits: &Array<B::S>,
        token_mask: Option<&[u8]>,
    ) -> Result<(Array<i32>, Array<B::S>)> {
        let (moe, _) = self.mixture()?;
        let shape = [logits.shape[0], moe.router.slots()];
        let (mut ids, mut weights) = (Array::new(vec![-1; shape[0] * shape[1]], &shape), Array::zeros(&shape));
        let mut input = RouteInput::new(logits.view());
        input.selection_bias = self.selection_bias.as_deref();
        input.token_mask = token_mask;
        b.route(&moe.router, &input, RouteOutput::new(ids.view_mut(), weights.view_mut()))?;
        Ok((ids, weights))
    }

    /// Routed and shared experts with a given routing.
    pub fn experts(&self, b: &mut B, x: &Array<B::A>, ids: &Array<i32>, weights: &Array<B::S>) -> Result<Array<B::A>> {
        let (moe, packed) = self.mixture()?;
        let mut out = Array::zeros(&x.shape);
        let mut input = MoeInput::new(x.rows());
        input.routing = Some(Routing::new(ids.view(), weights.view()));
        b.moe(moe, &input, packed, MoeOutput::new(out.rows_mut()))?;
        Ok(out)
    }
}

/// Keys and values.
type Pair<A> = (Array<A>, Array<A>);

/// Columns from one head's query to the next: with an output gate each head has its query first, then its gate.
pub fn q_stride(block: &GqaBlock) -> usize {
    block.attention.head_dim + if block.output_gate { block.attention.value_dim } else { 0 }
}
