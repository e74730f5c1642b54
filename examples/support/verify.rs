//! Checks a run on sampled rows: every stage from its own input, and the whole layer with the routing replayed, against the
//! reference in f64; the naive method tells how large an error may be.

use super::array::Array;
use super::backend::{Backend, Reference};
use super::layer::{Cache, LayerWeights, Options, PackedLayer, Qkv, Raw, Rows, Trace, run};
use super::measure::{Contract, relative_error};
use super::naive::Naive;
use gatefold::cpu::Float;
use gatefold::spec::{Layer, Mlp};
use gatefold::{Dtype, Element, Result};

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Checked {
    pub stage: &'static str,
    /// `max |a - b| / max(1, max |b|)`
    pub error: f64,
    /// Largest error over what the numerical contract allows.
    pub share: f64,
}

/// What was run: a single sequence.
pub struct Subject<'a, T, W> {
    pub spec: &'a Layer,
    pub weights: &'a LayerWeights<W>,
    pub level: &'a str,
    pub trace: &'a Trace<T, f32>,
    pub rows: &'a Rows,
    /// The cache after the run.
    pub cache: &'a Cache<T>,
    /// The cache before the run.
    pub before: &'a Cache<T>,
    pub max_positions: usize,
    pub absorbed: bool,
}

struct Report {
    dtype: Dtype,
    lines: Vec<Checked>,
}

impl Report {
    fn add<T: Element>(&mut self, stage: &'static str, got: &Array<T>, naive: &Array<T>, exact: &Array<f64>) {
        let dtype = if T::DTYPE == Dtype::F32 { Dtype::F32 } else { self.dtype };
        let mut contract = Contract::default();
        let width = got.shape.last().copied().unwrap_or(1).max(1);
        contract.rows(dtype, width, &got.data, &naive.data, &exact.data);
        let error = relative_error(&got.to_f64(), &exact.data);
        match self.lines.iter_mut().find(|l| l.stage == stage) {
            Some(line) => (line.error, line.share) = (line.error.max(error), line.share.max(contract.worst)),
            None => self.lines.push(Checked { stage, error, share: contract.worst }),
        }
    }
}

fn widen<T: Element>(cache: &Cache<T>) -> Cache<f64> {
    Cache { k: cache.k.cast(), v: cache.v.cast(), lens: cache.lens.clone(), k_start: cache.k_start.clone() }
}

/// `[rows, ..]` in the shape that the array has behind its first dimension.
fn pick<T: Element>(x: &Array<T>, sample: &[usize]) -> Array<T> {
    let shape: Vec<usize> = std::iter::once(sample.len()).chain(x.shape[1..].iter().copied()).collect();
    x.clone().flat(x.shape[0]).pick(sample).reshape(&shape)
}

/// Recomputes the sampled rows of every stage from the stage's own input, then the whole layer from its input with the
/// experts of each token replayed.
///
/// # Errors
/// Those of the functions.
pub fn verify<T: Element, W: Float>(s: &Subject<'_, T, W>, sample: &[usize]) -> Result<Vec<Checked>> {
    let (mut exact, mut naive) = (Reference, Naive::<T>::for_level(s.level));
    let truth = PackedLayer::pack(&mut exact, s.spec, s.weights, s.max_positions)?;
    let plain = PackedLayer::pack(&mut naive, s.spec, s.weights, s.max_positions)?;
    let (e, n) = (&mut exact, &mut naive);
    let mut report = Report { dtype: T::DTYPE, lines: Vec::new() };
    let t = s.trace;
    let at = |x: &Array<T>| pick(x, sample);

    let x = at(&t.input);
    report.add("attention norm", &at(&t.attn_normed), &plain.attn_norm(n, &x)?, &truth.attn_norm(e, &x.cast())?);
    let x = at(&t.attn_normed);
    let (a, b) = (plain.project_qkv(n, &x)?, truth.project_qkv(e, &x.cast())?);
    let raw = Raw { q: at(&t.raw.q), k: at(&t.raw.k), v: at(&t.raw.v) };
    report.add("qkv projection", &raw.q, &a.q, &b.q);
    report.add("qkv projection", &raw.k, &a.k, &b.k);
    report.add("qkv projection", &raw.v, &a.v, &b.v);
    let positions: Vec<u32> = sample.iter().map(|i| s.rows.positions[*i]).collect();
    let wide = Raw { q: raw.q.cast(), k: raw.k.cast(), v: raw.v.cast() };
    let (a, b) = (plain.prepare(n, &raw, &positions, s.absorbed)?, truth.prepare(e, &wide, &positions, s.absorbed)?);
    let qkv = Qkv { q: at(&t.qkv.q), k: at(&t.qkv.k), v: at(&t.qkv.v) };
    report.add("qk norm, rope", &qkv.q, &a.q, &b.q);
    report.add("qk norm, rope", &qkv.k, &a.k, &b.k);
    report.add("qk norm, rope", &qkv.v, &a.v, &b.v);
    let start = s.before.k_start[0] + i64::from(s.before.lens[0]);
    let starts: Vec<i64> = sample.iter().map(|i| start + *i as i64).collect();
    let single = Rows { cu_seqlens: (0..=sample.len() as u32).collect(), positions, ..Rows::default() };
    let (wide, q) = (widen(s.cache), qkv.q.cast());
    let a = plain.attend(n, &qkv.q, &raw.q, &single, s.cache, &starts, s.absorbed)?;
    let b = truth.attend(e, &q, &raw.q.cast(), &single, &wide, &starts, s.absorbed)?;
    // Head by head: the contract's rows are those of one head.
    let value_dim = s.spec.attention().value_dim.max(1);
    let heads = |x: usize| [x / value_dim, value_dim];
    let size = a.data.len();
    report.add(
        "attention",
        &at(&t.attention).reshape(&heads(size)),
        &a.reshape(&heads(size)),
        &b.reshape(&heads(size)),
    );
    let x = at(&t.attention);
    report.add(
        "out projection",
        &at(&t.projected),
        &plain.out_projection(n, &x)?,
        &truth.out_projection(e, &x.cast())?,
    );
    let (x, y) = (at(&t.input), at(&t.projected));
    let b = truth.after_attention(e, &x.cast(), &y.cast())?;
    report.add("residual", &at(&t.after_attention), &plain.after_attention(n, &x, &y)?, &b);
    let x = at(&t.after_attention);
    report.add("mlp norm", &at(&t.mlp_normed), &plain.mlp_norm(n, &x)?, &truth.mlp_norm(e, &x.cast())?);
    let x = at(&t.mlp_normed);
    let mut options = Options { absorbed: s.absorbed, sample: Some(sample.to_vec()), replay: None };
    match &s.spec.mlp {
        Mlp::Moe(moe) => {
            report.add("router", &pick(&t.logits, sample), &plain.logits(n, &x)?, &truth.logits(e, &x.cast())?);
            // Tokens that share an expert's capacity decide together: all rows then.
            let all: Vec<usize> = (0..t.logits.shape[0]).collect();
            let rows = if moe.router.capacity.is_some() { &all } else { sample };
            let (logits, ids) = (pick(&t.logits, rows), t.topk_ids.pick(rows));
            let (_, a) = plain.top_k(n, &logits, None)?;
            let (expected, b) = truth.top_k(e, &logits.cast(), None)?;
            if ids.data == expected.data {
                report.add("top-k", &pick(&t.topk_weights, rows), &a, &b);
            } else {
                report.lines.push(Checked { stage: "top-k", error: f64::INFINITY, share: f64::INFINITY });
            }
            let (ids, weights) = (t.topk_ids.pick(sample), pick(&t.topk_weights, sample));
            let (a, b) = (plain.experts(n, &x, &ids, &weights)?, truth.experts(e, &x.cast(), &ids, &weights.cast())?);
            report.add("experts", &at(&t.mlp_out), &a, &b);
            options.replay = Some((ids, weights.cast()));
        }
        _ => report.add("mlp", &at(&t.mlp_out), &plain.dense(n, &x)?, &truth.dense(e, &x.cast())?),
    }
    let (x, y) = (at(&t.after_attention), at(&t.mlp_out));
    report.add("residual", &at(&t.out), &plain.finish(n, &x, &y)?, &truth.finish(e, &x.cast(), &y.cast())?);

    let a = run(n, &plain, &t.input, s.rows, &mut s.before.clone(), &options)?;
    let b = run(e, &truth, &t.input.cast(), s.rows, &mut widen(s.before), &options)?;
    report.add("whole layer", &at(&t.out), &a.out, &b.out);
    Ok(report.lines)
}

/// A backend's name for the table.
pub fn used<B: Backend>(b: &B, dtype: Dtype) -> String {
    format!("{} {dtype}", b.name())
}
