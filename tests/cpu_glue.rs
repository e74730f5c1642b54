//! The glue functions of the CPU backend against the reference: every level and element type, strides, guard values, the derived
//! tolerance, and the same bits whatever the threads and the other tokens.

mod common;

use common::data::Rng;
use common::sums::{assert_sums, naive_sum, starts_for};
use common::*;
use gatefold::args::{
    KvCache, KvCacheMut, QkvInput, QkvOutput, RetentionInput, RetentionOutput, RopeTable, WkvInput, WkvOutput,
};
use gatefold::cpu::{self, Cpu, Float, Level, PackedLinear, PackedMla};
use gatefold::spec::{
    Mla, Norm, NormKind, QTemperature, QkNorm, QkvPrep, Retention, RetentionForm, Rope, RopeStyle, Router,
};
use gatefold::{Element, View, ViewMut, reference};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

/// Runs a call at every level, with one and with several threads, which must not matter; gives the results of the levels.
fn at_every_level<O: Element>(call: impl Fn(&mut Cpu) -> Vec<O> + Sync) -> Vec<(Level, Vec<O>)> {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (one, several) = (pool(1), pool(3));
    let run = |level| {
        let got = one.install(|| call(&mut Cpu::with_level(level)));
        assert_bits("threads", &several.install(|| call(&mut Cpu::with_level(level))), &got);
        (level, got)
    };
    Level::available().into_iter().map(run).collect()
}

fn assert_bits<O: Element>(what: &str, got: &[O], want: &[O]) {
    assert_eq!(bytemuck::cast_slice::<O, u8>(got), bytemuck::cast_slice::<O, u8>(want), "{what}");
}

fn element() -> impl Strategy<Value = gatefold::Dtype> {
    select(vec![gatefold::Dtype::F32, gatefold::Dtype::BF16, gatefold::Dtype::F16])
}

/// `$test::<T>(..)` for the element type.
macro_rules! with_type {
    ($dtype:expr, $test:ident ( $($arg:expr),* )) => {
        match $dtype {
            gatefold::Dtype::BF16 => $test::<bf16>($($arg),*),
            gatefold::Dtype::F16 => $test::<f16>($($arg),*),
            _ => $test::<f32>($($arg),*),
        }
    };
}

/// Widths around the vectors.
fn width() -> impl Strategy<Value = usize> {
    select(vec![1usize, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 129, 512])
}

fn vector(rng: &mut Rng, len: usize) -> Vec<f32> {
    rng.normals(len, 1.0)
}

fn array<T: Element, const N: usize>(rng: &mut Rng, shape: [usize; N], layout: Layout) -> Array<T, N> {
    let mut values: Vec<T> = rng.normals(shape.iter().product(), 1.0);
    if rng.chance(0.3) {
        rng.sprinkle(&mut values);
    }
    Array::new(shape, layout, &values)
}

fn run<O: bytemuck::Pod, const N: usize>(
    shape: [usize; N],
    layout: Layout,
    f: impl FnOnce(ViewMut<'_, O, N>) -> gatefold::Result<()>,
) -> Vec<O> {
    let mut out = Output::new(shape, layout);
    f(out.view()).unwrap();
    out.finish("out")
}

/// What an exponential in f32 may be wrong by, in units in the last place.
const EXP_ERROR: f32 = 1.5;

/// An exponential that is wrong by so much.
fn exp(x: f32, error: f32) -> f32 {
    x.exp() * (1.0 + error * f32::EPSILON)
}

/// How a norm in f32 may go wrong: at which eighth of the row its sums begin, and by how many units in the last place the
/// factor of the row is off (`1 / sqrt` in f32 is two roundings).
#[derive(Clone, Copy)]
struct Variant {
    start: usize,
    ulp: f32,
}

fn variants() -> impl Iterator<Item = Variant> {
    let starts = (0..8).map(|start| Variant { start, ulp: 0.0 });
    starts.chain([1.0, -1.0].map(|ulp| Variant { start: 0, ulp }))
}

/// [`naive::norm`] of one row, in one of several ways.
fn naive_norm(spec: &Norm, x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, variant: Variant) -> Vec<f32> {
    let n = x.len() as f32;
    let (head, tail) = x.split_at(variant.start * x.len() / 8);
    let in_order = || tail.iter().chain(head);
    let mean = if spec.kind == NormKind::Layer { in_order().fold(0.0, |s, x| s + x) / n } else { 0.0 };
    let variance = in_order().fold(0.0, |s, x| s + (x - mean) * (x - mean)) / n;
    let scale = (1.0 + variant.ulp * f32::EPSILON) / (variance + spec.eps as f32).sqrt();
    let factor = |i: usize| weight.map_or(1.0, |w| w[i] + spec.weight_offset as f32);
    (0..x.len()).map(|i| (x[i] - mean) * scale * factor(i) + bias.map_or(0.0, |b| b[i])).collect()
}

/// Of several ways to compute something, element by element the one furthest from the truth.
fn worst_of<O: Element>(truth: &[f64], ways: impl Iterator<Item = Vec<f32>>) -> Vec<O> {
    let mut worst: Option<Vec<O>> = None;
    for way in ways {
        let way: Vec<O> = way.into_iter().map(O::from_f32).collect();
        match &mut worst {
            Some(worst) => take_worse(worst, &way, truth),
            None => worst = Some(way),
        }
    }
    worst.unwrap_or_default()
}

fn check_norm<T: Float, O: Float>(spec: &Norm, shape: [usize; 3], layout: Layout, weighted: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let width = shape[2];
    let mut x = array::<T, 3>(&mut rng, shape, layout);
    if shape[0] > 1 {
        // A row of zeros, and where there is room one with a mean far from 0.
        (0..width).for_each(|i| x.set([0, 0, i], T::default()));
        (0..width).for_each(|i| x.set([1, 0, i], T::from_f64(100.0 + x.at([1, 0, i]).to_f64())));
    }
    let weight = weighted.then(|| vector(&mut rng, width));
    let bias = spec.bias.then(|| vector(&mut rng, width));
    let (weight, bias) = (weight.as_deref(), bias.as_deref());
    let truth = run(shape, layout, |out| reference::norm(spec, x.view(), weight, bias, out));
    let x32: Vec<f32> = x.values().iter().map(|x| x.to_f32()).collect();
    let all_rows = |variant| x32.chunks(width).flat_map(|x| naive_norm(spec, x, weight, bias, variant)).collect();
    let naive: Vec<O> = worst_of(&truth, variants().map(all_rows));
    for (level, got) in
        at_every_level(|cpu| run::<O, 3>(shape, layout, |out| cpu::norm(cpu, spec, x.view(), weight, bias, out)))
    {
        assert_rows(&format!("{level}"), &got, &truth, &naive, width);
        for t in 0..shape[0].min(3) {
            let one = Array::new([shape[1], width], Layout::Contiguous, &values_of(&x, t));
            let alone = run::<O, 2>([shape[1], width], layout, |out| {
                cpu::norm(&mut Cpu::with_level(level), spec, one.view(), weight, bias, out)
            });
            assert_bits("alone", &alone, &got[t * shape[1] * width..][..shape[1] * width]);
        }
    }
}

/// What lies at the first index.
fn values_of<T: Element, const N: usize>(x: &Array<T, N>, first: usize) -> Vec<T> {
    let len: usize = x.shape()[1..].iter().product();
    x.values()[first * len..][..len].to_vec()
}

fn check_elementwise<T: Float>(shape: [usize; 2], layout: Layout, multiplier: f64, seed: u64) {
    let mut rng = Rng::new(seed);
    let (x, y) = (array::<T, 2>(&mut rng, shape, layout), array::<T, 2>(&mut rng, shape, layout));
    let pairs = || x.values().into_iter().zip(y.values()).map(|(x, y)| (x.to_f32(), y.to_f32()));

    let truth = run(shape, layout, |out| reference::add(x.view(), y.view(), multiplier, out));
    let naive: Vec<T> = pairs().map(|(x, y)| T::from_f32(x + multiplier as f32 * y)).collect();
    for (level, got) in
        at_every_level(|cpu| run::<T, 2>(shape, layout, |out| cpu::add(cpu, x.view(), y.view(), multiplier, out)))
    {
        assert_rows(&format!("add, {level}"), &got, &truth, &naive, shape[1]);
    }

    let truth = run(shape, layout, |out| reference::sigmoid_mul(x.view(), y.view(), out));
    let gated = |error: f32| pairs().map(|(x, y)| x * (1.0 / (1.0 + exp(-y, error)))).collect();
    let naive: Vec<T> = worst_of(&truth, [0.0, EXP_ERROR, -EXP_ERROR].into_iter().map(gated));
    for (level, got) in
        at_every_level(|cpu| run::<T, 2>(shape, layout, |out| cpu::sigmoid_mul(cpu, x.view(), y.view(), out)))
    {
        assert_rows(&format!("sigmoid_mul, {level}"), &got, &truth, &naive, shape[1]);
    }
}

/// cos and sin in f32, and positions within them.
fn table(rng: &mut Rng, rope: &Rope, num_tokens: usize) -> ([Array<f32, 2>; 2], Vec<u32>) {
    let (cos, sin) = rope.table(50);
    let shape = [50, rope.rotary_dim / 2];
    let f32s = |x: Vec<f64>| Array::new(shape, Layout::Padded, &x.iter().map(|x| *x as f32).collect::<Vec<_>>());
    ([f32s(cos), f32s(sin)], (0..num_tokens).map(|_| rng.below(50) as u32).collect())
}

fn check_rope<T: Float>(shape: [usize; 3], style: RopeStyle, rotary_dim: usize, layout: Layout, seed: u64) {
    let mut rng = Rng::new(seed);
    let spec = Rope::new(style, rotary_dim, 1000.0);
    let x = array::<T, 3>(&mut rng, shape, layout);
    let ([cos, sin], positions) = table(&mut rng, &spec, shape[0]);
    let table = RopeTable::new(cos.view(), sin.view());
    let truth = run(shape, layout, |out| reference::rope(&spec, x.view(), &positions, &table, out));
    let naive = naive::rope::<T, T>(&spec, &x.view(), &positions, &cos.view(), &sin.view());
    for (level, got) in
        at_every_level(|cpu| run::<T, 3>(shape, layout, |out| cpu::rope(cpu, &spec, x.view(), &positions, &table, out)))
    {
        assert_rows(&format!("{level}"), &got, &truth, &naive, shape[2]);
    }
}

/// Queries, keys and values, one behind the other.
fn run_qkv<T: Element, O: bytemuck::Pod>(
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    layout: Layout,
    f: impl FnOnce(QkvOutput<'_, O>) -> gatefold::Result<()>,
) -> [Vec<O>; 3] {
    let n = input.q.shape()[0];
    let mut q = Output::new([n, spec.num_heads, spec.head_dim], layout);
    let mut k = Output::new([n, spec.num_kv_heads, spec.head_dim], layout);
    let mut v = Output::new([n, spec.num_kv_heads, spec.value_dim], layout);
    f(QkvOutput::new(q.view(), k.view(), v.view())).unwrap();
    [q.finish("q"), k.finish("k"), v.finish("v")]
}

/// The steps of [`reference::prepare_qkv`] on one token's query or key in f32, by the naive functions.
fn naive_qk(
    variant: Variant,
    spec: &QkvPrep,
    input: &QkvInput<'_, f32>,
    x: &[f32],
    weight: Option<&[f32]>,
    t: usize,
    query: bool,
) -> Vec<f32> {
    let normed = |x: &[f32], weight: Option<&[f32]>, width: usize| -> Vec<f32> {
        x.chunks(width).flat_map(|x| naive_norm(&spec.norm, x, weight, None, variant)).collect()
    };
    let dim = spec.head_dim;
    let mut x = x.to_vec();
    if spec.qk_norm == Some(QkNorm::Full) {
        x = normed(&x, weight, x.len());
    }
    if let Some(clip) = spec.clip {
        x.iter_mut().for_each(|x| *x = x.clamp(-clip as f32, clip as f32));
    }
    if spec.qk_norm == Some(QkNorm::PerHead) {
        x = normed(&x, weight, dim);
    }
    if let (Some(rope), Some(table)) = (&spec.rope, &input.rope) {
        let shape = [1, x.len() / dim, dim];
        x = naive::rope::<f32, f32>(rope, &View::new(&x, shape), &input.positions[t..=t], &table.cos, &table.sin);
    }
    if spec.qk_norm == Some(QkNorm::L2AfterRope) {
        x = normed(&x, None, dim);
    }
    if let (Some(temperature), true) = (&spec.q_temperature, query) {
        x.iter_mut().for_each(|x| *x *= temperature.factor(input.positions[t]) as f32);
    }
    x
}

fn check_prepare_qkv<T: Float>(spec: &QkvPrep, n: usize, layout: Layout, seed: u64) {
    let mut rng = Rng::new(seed);
    let (heads, kv_heads, dim) = (spec.num_heads, spec.num_kv_heads, spec.head_dim);
    let q = array::<T, 3>(&mut rng, [n, heads, dim], layout);
    let k = array::<T, 3>(&mut rng, [n, kv_heads, dim], layout);
    let v = array::<T, 3>(&mut rng, [n, kv_heads, spec.value_dim], layout);
    let widths = match spec.qk_norm {
        Some(QkNorm::PerHead) => Some((dim, dim)),
        Some(QkNorm::Full) => Some((heads * dim, kv_heads * dim)),
        _ => None,
    };
    let weights = widths.map(|(q, k)| (vector(&mut rng, q), vector(&mut rng, k)));
    let (tables, positions) = table(&mut rng, spec.rope.as_ref().unwrap_or(&Rope::default()), n);
    let mut input = QkvInput::new(q.view(), k.view(), v.view(), &positions);
    (input.q_norm, input.k_norm) = (weights.as_ref().map(|w| &w.0[..]), weights.as_ref().map(|w| &w.1[..]));
    input.rope = spec.rope.as_ref().map(|_| RopeTable::new(tables[0].view(), tables[1].view()));

    let truth = run_qkv(spec, &input, layout, |out| reference::prepare_qkv(spec, &input, out));
    let empty = View::new(&[0.0f32; 0], [0, 0, 0]);
    let mut f32s = QkvInput::new(empty, empty, empty, &positions);
    f32s.rope = input.rope;
    let naive = |x: &Array<T, 3>, truth: &[f64], weight: Option<&[f32]>, query: bool| -> Vec<T> {
        let row = |t: usize| values_of(x, t).iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let all_rows =
            |variant| (0..n).flat_map(|t| naive_qk(variant, spec, &f32s, &row(t), weight, t, query)).collect();
        worst_of(truth, variants().map(all_rows))
    };
    let naive_q = naive(&q, &truth[0], input.q_norm, true);
    let naive_k = naive(&k, &truth[1], input.k_norm, false);
    let clip = |x: &T| match spec.clip {
        Some(clip) => T::from_f32(x.to_f32().clamp(-clip as f32, clip as f32)),
        None => *x,
    };
    let expected_v: Vec<T> = v.values().iter().map(clip).collect();
    for (level, got) in at_every_level(|cpu| {
        run_qkv::<T, T>(spec, &input, layout, |out| cpu::prepare_qkv(cpu, spec, &input, out)).concat()
    }) {
        let (got_q, rest) = got.split_at(truth[0].len());
        let (got_k, got_v) = rest.split_at(truth[1].len());
        assert_rows(&format!("q, {level}"), got_q, &truth[0], &naive_q, dim);
        assert_rows(&format!("k, {level}"), got_k, &truth[1], &naive_k, dim);
        assert!(got_v.iter().zip(&expected_v).all(|(got, want)| got.to_f64() == want.to_f64()), "v, {level}");
        // The last token alone.
        if n > 1 {
            let last = |x: &Array<T, 3>| Array::new([1, x.shape()[1], x.shape()[2]], layout, &values_of(x, n - 1));
            let (q, k, v) = (last(&q), last(&k), last(&v));
            let mut one = QkvInput::new(q.view(), k.view(), v.view(), &positions[n - 1..]);
            (one.q_norm, one.k_norm, one.rope) = (input.q_norm, input.k_norm, input.rope);
            let mut cpu = Cpu::with_level(level);
            cpu.reserve(cpu::prepare_qkv_workspace_bytes(spec, 1));
            let bytes = cpu.workspace_bytes();
            let alone = run_qkv::<T, T>(spec, &one, layout, |out| cpu::prepare_qkv(&mut cpu, spec, &one, out));
            assert_bits("q alone", &alone[0], &got_q[got_q.len() - alone[0].len()..]);
            assert_bits("k alone", &alone[1], &got_k[got_k.len() - alone[1].len()..]);
            assert_eq!(cpu.workspace_bytes(), bytes);
        }
    }
}

fn check_retention<T: Float>(spec: &Retention, n: usize, layout: Layout, with_state: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let (heads, dim, value_dim) = (spec.num_heads, spec.head_dim, spec.value_dim);
    let q = array::<T, 3>(&mut rng, [n, heads, dim], layout);
    let k = array::<T, 3>(&mut rng, [n, heads, dim], layout);
    let v = array::<T, 3>(&mut rng, [n, heads, value_dim], layout);
    let decay: Vec<f32> = (0..heads).map(|h| 1.0 - 0.5f32.powi(2 + h as i32)).collect();
    let state = Array::new([heads, dim, value_dim], layout, &vector(&mut rng, heads * dim * value_dim));
    let mut input = RetentionInput::new(q.view(), k.view(), v.view(), &decay);
    input.state_in = with_state.then(|| state.view());

    let truth = run_two([n, heads, value_dim], [heads, dim, value_dim], layout, |out, state| {
        reference::retention(spec, &input, RetentionOutput::with_state(out, state))
    });
    // Every product by itself, summed in f32.
    let starts = starts_for(truth.0.len());
    let power = |h: usize, n: usize| f64::from(decay[h]).powi(n as i32) as f32;
    let mut naive = Vec::new();
    for i in 0..n * heads * value_dim {
        let (t, h, c) = (i / value_dim / heads, i / value_dim % heads, i % value_dim);
        let mut terms = Vec::new();
        for d in 0..dim {
            let q = spec.scale as f32 * q.at([t, h, d]).to_f32();
            if with_state {
                terms.push(power(h, t + 1) * q * state.at([h, d, c]));
            }
            terms.extend((0..=t).map(|j| power(h, t - j) * q * k.at([j, h, d]).to_f32() * v.at([j, h, c]).to_f32()));
        }
        naive.push(T::from_f32(naive_sum(&terms, 0.0, truth.0[i], starts)));
    }
    let mut naive_state = Vec::new();
    for i in 0..heads * dim * value_dim {
        let (h, d, c) = (i / value_dim / dim, i / value_dim % dim, i % value_dim);
        let mut terms = vec![if with_state { power(h, n) * state.at([h, d, c]) } else { 0.0 }];
        terms.extend((0..n).map(|j| power(h, n - 1 - j) * k.at([j, h, d]).to_f32() * v.at([j, h, c]).to_f32()));
        naive_state.push(naive_sum(&terms, 0.0, truth.1[i], starts));
    }
    if spec.form != RetentionForm::Parallel {
        // Token by token, as the definition of the recurrent form has it: the state is rounded at every step.
        for h in 0..heads {
            let mut s = if with_state { values_of(&state, h) } else { vec![0.0; dim * value_dim] };
            for t in 0..n {
                let mut row = vec![0.0f32; value_dim];
                for (i, x) in s.iter_mut().enumerate() {
                    let (d, c) = (i / value_dim, i % value_dim);
                    *x = decay[h] * *x + k.at([t, h, d]).to_f32() * v.at([t, h, c]).to_f32();
                    row[c] += q.at([t, h, d]).to_f32() * *x;
                }
                let row: Vec<T> = row.iter().map(|x| T::from_f32(spec.scale as f32 * x)).collect();
                let at = (t * heads + h) * value_dim..(t * heads + h + 1) * value_dim;
                take_worse(&mut naive[at.clone()], &row, &truth.0[at]);
            }
            let at = h * dim * value_dim..(h + 1) * dim * value_dim;
            take_worse(&mut naive_state[at.clone()], &s, &truth.1[at]);
        }
    }
    for (level, got) in at_every_level(|cpu| {
        let bytes = cpu::retention_workspace_bytes(spec, n);
        cpu.reserve(bytes);
        let (bytes, got) = (cpu.workspace_bytes(), {
            let got = run_two([n, heads, value_dim], [heads, dim, value_dim], layout, |out, state| {
                cpu::retention(cpu, spec, &input, RetentionOutput::with_state(out, state))
            });
            f32s::<T>(got)
        });
        assert_eq!(cpu.workspace_bytes(), bytes);
        got
    }) {
        let (out, got_state) = got.split_at(truth.0.len());
        let out: Vec<T> = out.iter().map(|x| T::from_f32(*x)).collect();
        assert_sums(&format!("out, {level}"), &out, &truth.0, &naive, value_dim);
        assert_sums(&format!("state, {level}"), got_state, &truth.1, &naive_state, value_dim);
    }
}

/// Runs a call with an output in the storage type and a state in f32.
fn run_two<O: bytemuck::Pod, R: bytemuck::Pod>(
    shape: [usize; 3],
    state_shape: [usize; 3],
    layout: Layout,
    f: impl FnOnce(ViewMut<'_, O, 3>, ViewMut<'_, R, 3>) -> gatefold::Result<()>,
) -> (Vec<O>, Vec<R>) {
    let (mut out, mut state) = (Output::new(shape, layout), Output::new(state_shape, layout));
    f(out.view(), state.view()).unwrap();
    (out.finish("out"), state.finish("state_out"))
}

/// Both outputs as f32, which holds them exactly.
fn f32s<T: Element>((out, state): (Vec<T>, Vec<f32>)) -> Vec<f32> {
    out.iter().map(|x| x.to_f32()).chain(state).collect()
}

fn check_wkv<T: Float>([batch, seq, channels]: [usize; 3], layout: Layout, with_state: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let shape = [batch, seq, channels];
    let (k, v) = (array::<T, 3>(&mut rng, shape, layout), array::<T, 3>(&mut rng, shape, layout));
    let (decay, first) = (vector(&mut rng, channels), vector(&mut rng, channels));
    let mut state: Vec<f32> = vector(&mut rng, 3 * batch * channels);
    state[batch * channels..2 * batch * channels].iter_mut().for_each(|den| *den = 0.5 + den.abs());
    let state = Array::new([3, batch, channels], layout, &state);
    let mut input = WkvInput::new(k.view(), v.view(), &decay, &first);
    input.state_in = with_state.then(|| state.view());

    let truth = run_two(shape, [3, batch, channels], layout, |out, state| {
        reference::wkv(&input, WkvOutput::with_state(out, state))
    });
    let naive = |past_error: f32, now_error: f32| -> (Vec<T>, Vec<f32>) {
        let (mut naive, mut naive_state) = (vec![T::default(); truth.0.len()], vec![0.0f32; truth.1.len()]);
        for (b, c) in (0..batch * channels).map(|i| (i / channels, i % channels)) {
            let fade = -decay[c].exp();
            let initial = [0.0, 0.0, -1e38];
            let [mut num, mut den, mut max] =
                std::array::from_fn(|i| if with_state { state.at([i, b, c]) } else { initial[i] });
            for t in 0..seq {
                let (k, v) = (k.at([b, t, c]).to_f32(), v.at([b, t, c]).to_f32());
                let m = max.max(k + first[c]);
                let (past, now) = (exp(max - m, past_error), exp(k + first[c] - m, now_error));
                naive[(b * seq + t) * channels + c] = T::from_f32((past * num + now * v) / (past * den + now));
                let m = (max + fade).max(k);
                let (past, now) = (exp(max + fade - m, past_error), exp(k - m, now_error));
                (num, den, max) = (past * num + now * v, past * den + now, m);
            }
            for (i, x) in [num, den, max].into_iter().enumerate() {
                naive_state[(i * batch + b) * channels + c] = x;
            }
        }
        (naive, naive_state)
    };
    let mut worst = naive(0.0, 0.0);
    for (past, now) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
        let other = naive(past * EXP_ERROR, now * EXP_ERROR);
        take_worse(&mut worst.0, &other.0, &truth.0);
        take_worse(&mut worst.1, &other.1, &truth.1);
    }
    for (level, got) in at_every_level(|cpu| {
        f32s::<T>(run_two(shape, [3, batch, channels], layout, |out, state| {
            cpu::wkv(cpu, &input, WkvOutput::with_state(out, state))
        }))
    }) {
        let (out, got_state) = got.split_at(truth.0.len());
        let out: Vec<T> = out.iter().map(|x| T::from_f32(*x)).collect();
        assert_sums(&format!("out, {level}"), &out, &truth.0, &worst.0, channels);
        assert_sums(&format!("state, {level}"), got_state, &truth.1, &worst.1, channels);
    }
}

/// The value further from the truth.
fn take_worse<O: Element>(worst: &mut [O], other: &[O], truth: &[f64]) {
    for ((worst, other), truth) in worst.iter_mut().zip(other).zip(truth) {
        if (other.to_f64() - truth).abs() > (worst.to_f64() - truth).abs() {
            *worst = *other;
        }
    }
}

fn check_mla<T: Float>(spec: &Mla, n: usize, layout: Layout, seed: u64) {
    let mut rng = Rng::new(seed);
    let (heads, rank, nope, value) = (spec.num_heads, spec.kv_lora_rank, spec.nope_dim, spec.value_dim);
    let kv_b =
        Array::<T, 3>::new([heads, nope + value, rank], layout, &rng.normals(heads * (nope + value) * rank, 0.3));
    let packed = PackedMla::pack(spec, kv_b.view()).unwrap();
    let q = array::<T, 3>(&mut rng, [n, heads, nope], layout);
    let latent = array::<T, 3>(&mut rng, [n, heads, rank], layout);
    let naive = |x: &Array<T, 3>, outputs: usize, truth: &[f64], weight: &dyn Fn(usize, usize, usize) -> T| -> Vec<T> {
        let starts = starts_for(truth.len());
        let sum = |i: usize| {
            let (t, h, o) = (i / outputs / heads, i / outputs % heads, i % outputs);
            let term = |i| x.at([t, h, i]).to_f32() * weight(h, o, i).to_f32();
            let terms: Vec<f32> = (0..x.shape()[2]).map(term).collect();
            T::from_f32(naive_sum(&terms, 0.0, truth[i], starts))
        };
        (0..truth.len()).map(sum).collect()
    };

    let shape = [n, heads, rank];
    let truth = run(shape, layout, |out| reference::mla_absorb_query(spec, q.view(), kv_b.view(), out));
    let naive_rows = naive(&q, rank, &truth, &|h, c, d| kv_b.at([h, d, c]));
    for (level, got) in at_every_level(|cpu| {
        cpu.reserve(cpu::mla_workspace_bytes::<T>(cpu, &packed, n));
        let bytes = cpu.workspace_bytes();
        let got = run::<T, 3>(shape, layout, |out| cpu::mla_absorb_query(cpu, spec, q.view(), &packed, out));
        assert_eq!(cpu.workspace_bytes(), bytes);
        got
    }) {
        assert_sums(&format!("absorb, {level}"), &got, &truth, &naive_rows, rank);
    }
    let shape = [n, heads, value];
    let truth = run(shape, layout, |out| reference::mla_project_value(spec, latent.view(), kv_b.view(), out));
    let naive_rows = naive(&latent, value, &truth, &|h, d, c| kv_b.at([h, nope + d, c]));
    for (level, got) in at_every_level(|cpu| {
        run::<T, 3>(shape, layout, |out| cpu::mla_project_value(cpu, spec, latent.view(), &packed, out))
    }) {
        assert_sums(&format!("project, {level}"), &got, &truth, &naive_rows, value);
    }
}

fn check_router_logits<T: Float>(
    n: usize,
    hidden: usize,
    experts: usize,
    jitter: Option<f64>,
    layout: Layout,
    seed: u64,
) {
    let mut rng = Rng::new(seed);
    let mut spec = Router::new(experts, 1);
    spec.jitter = jitter;
    let x = array::<T, 2>(&mut rng, [n, hidden], layout);
    let weight = Array::<T, 2>::new([experts, hidden], layout, &rng.normals(experts * hidden, 0.3));
    let packed = PackedLinear::pack(weight.view()).unwrap();
    let bias = rng.chance(0.5).then(|| vector(&mut rng, experts));
    let bias = bias.as_deref();
    let truth =
        run([n, experts], layout, |out| reference::router_logits(&spec, x.view(), weight.view(), bias, seed, out));
    let jittered: Vec<f32> = (0..n * hidden)
        .map(|i| {
            let u = gatefold::random::uniform(seed, (i / hidden) as u64, (i % hidden) as u64);
            x.at([i / hidden, i % hidden]).to_f32() * (1.0 + jitter.unwrap_or(0.0) as f32 * (2.0 * u - 1.0))
        })
        .collect();
    let naive: Vec<f32> = (0..n * experts)
        .map(|i| {
            let (t, e) = (i / experts, i % experts);
            let terms: Vec<f32> = (0..hidden).map(|d| jittered[t * hidden + d] * weight.at([e, d]).to_f32()).collect();
            naive_sum(&terms, bias.map_or(0.0, |b| b[e]), truth[i], starts_for(n * experts))
        })
        .collect();
    for (level, got) in at_every_level(|cpu| {
        cpu.reserve(cpu::router_logits_workspace_bytes::<T>(cpu, &spec, &packed, n));
        let bytes = cpu.workspace_bytes();
        let got = run::<f32, 2>([n, experts], layout, |out| {
            cpu::router_logits(cpu, &spec, x.view(), &packed, bias, seed, out)
        });
        assert_eq!(cpu.workspace_bytes(), bytes);
        got
    }) {
        assert_sums(&format!("{level}"), &got, &truth, &naive, experts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn norms(
        kind in select(vec![NormKind::Rms, NormKind::Layer]),
        shape in (0usize..4, 1usize..4, width()).prop_map(|(a, b, c)| [a, b, c]),
        layout in strategies::layout(),
        weighted in any::<bool>(),
        bias in any::<bool>(),
        offset in select(vec![0.0, 1.0]),
        eps in select(vec![1e-6, 1e-3]),
        dtypes in (element(), any::<bool>()),
        seed in any::<u64>(),
    ) {
        let mut spec = Norm::rms(eps);
        (spec.kind, spec.weight_offset, spec.bias) = (kind, offset, bias && kind == NormKind::Layer);
        match dtypes {
            (gatefold::Dtype::BF16, true) => check_norm::<bf16, f32>(&spec, shape, layout, weighted, seed),
            (gatefold::Dtype::BF16, false) => check_norm::<bf16, bf16>(&spec, shape, layout, weighted, seed),
            (gatefold::Dtype::F16, true) => check_norm::<f16, f32>(&spec, shape, layout, weighted, seed),
            (gatefold::Dtype::F16, false) => check_norm::<f16, f16>(&spec, shape, layout, weighted, seed),
            (_, true) => check_norm::<f32, bf16>(&spec, shape, layout, weighted, seed),
            (_, false) => check_norm::<f32, f32>(&spec, shape, layout, weighted, seed),
        }
    }

    #[test]
    fn elementwise(
        shape in (0usize..4, width()).prop_map(|(a, b)| [a, b]),
        layout in strategies::layout(),
        multiplier in select(vec![1.0, 0.22, -3.0]),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_elementwise(shape, layout, multiplier, seed));
    }

    #[test]
    fn rotations(
        shape in (0usize..4, 1usize..4).prop_map(|(a, b)| [a, b]),
        dims in select(vec![(2usize, 2usize), (8, 4), (16, 16), (33, 20), (64, 64), (64, 32), (80, 80), (128, 128), (130, 66)]),
        style in select(vec![RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf]),
        layout in strategies::layout(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_rope([shape[0], shape[1], dims.0], style, dims.1, layout, seed));
    }

    #[test]
    fn prepared_qkv(
        heads in select(vec![(1usize, 1usize), (4, 2), (6, 1), (3, 3)]),
        dims in select(vec![(8usize, 8usize, 8usize), (16, 16, 8), (33, 20, 32), (64, 64, 64), (80, 40, 20), (128, 128, 128)]),
        norm in select(vec![None, Some(QkNorm::PerHead), Some(QkNorm::Full), Some(QkNorm::L2AfterRope)]),
        offset in select(vec![0.0, 1.0]),
        clip in proptest::option::of(select(vec![0.5, 2.0])),
        style in proptest::option::of(select(vec![RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf])),
        temperature in any::<bool>(),
        call in (0usize..5, strategies::layout(), element(), any::<u64>()),
    ) {
        let mut spec = QkvPrep::new(heads.0, heads.1, dims.0);
        (spec.value_dim, spec.qk_norm, spec.norm.weight_offset, spec.clip) = (dims.1, norm, offset, clip);
        spec.rope = style.map(|style| Rope::new(style, dims.2, 1000.0));
        spec.q_temperature = temperature.then(|| QTemperature::new(8.0, 0.1));
        let (n, layout, dtype, seed) = call;
        with_type!(dtype, check_prepare_qkv(&spec, n, layout, seed));
    }

    #[test]
    fn retentions(
        n in select(vec![0usize, 1, 2, 7, 16, 17]),
        dims in select(vec![(1usize, 1usize, 16usize), (2, 8, 16), (3, 17, 5), (2, 32, 33), (1, 64, 64)]),
        form in select(vec![
            RetentionForm::Parallel,
            RetentionForm::Recurrent,
            RetentionForm::Chunkwise(1),
            RetentionForm::Chunkwise(5),
            RetentionForm::Chunkwise(100),
        ]),
        layout in strategies::layout(),
        with_state in any::<bool>(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        let mut spec = Retention::new(dims.0, dims.1, dims.2);
        spec.form = form;
        with_type!(dtype, check_retention(&spec, n, layout, with_state, seed));
    }

    #[test]
    fn wkvs(
        shape in (1usize..4, select(vec![0usize, 1, 2, 9, 40]), width()).prop_map(|(a, b, c)| [a, b, c]),
        layout in strategies::layout(),
        with_state in any::<bool>(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_wkv(shape, layout, with_state, seed));
    }

    #[test]
    fn latent_attention(
        n in select(vec![0usize, 1, 3, 13]),
        dims in select(vec![(1usize, 8usize, 4usize, 5usize), (2, 33, 17, 31), (4, 64, 32, 32), (2, 65, 33, 64)]),
        layout in strategies::layout(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        let spec = Mla::new(dims.0, dims.1, dims.2, 8, dims.3);
        with_type!(dtype, check_mla(&spec, n, layout, seed));
    }

    #[test]
    fn logits_of_the_router(
        n in select(vec![0usize, 1, 5, 13]),
        sizes in select(vec![(1usize, 1usize), (16, 8), (65, 33), (129, 60)]),
        jitter in proptest::option::of(select(vec![0.01, 0.3])),
        layout in strategies::layout(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_router_logits(n, sizes.0, sizes.1, jitter, layout, seed));
    }
}

/// Rows whose squares f32 cannot hold, with and without an epsilon.
#[test]
fn norms_of_very_large_and_very_small_rows() {
    for eps in [0.0, 1e-6] {
        for scale in [1e-42f32, 1e-30, 1e-20, 1e18, 1e25, 3e38] {
            for spec in [Norm::rms(eps), Norm::layer(eps)] {
                let x: Vec<f32> = (0..70).map(|i| scale * ((i * 37 % 70) as f32 / 70.0 - 0.4)).collect();
                let x = Array::new([1, 70], Layout::Padded, &x);
                let truth =
                    run([1, 70], Layout::Padded, |out| reference::norm::<_, f32, 2>(&spec, x.view(), None, None, out));
                for (level, got) in at_every_level(|cpu| {
                    run::<f32, 2>([1, 70], Layout::Padded, |out| cpu::norm(cpu, &spec, x.view(), None, None, out))
                }) {
                    for (got, truth) in got.iter().zip(&truth) {
                        let close = (f64::from(*got) - truth).abs() <= 1e-6 * (1.0 + truth.abs());
                        assert!(close, "{spec:?} of {scale:e} at {level}: {got:e}, expected {truth:e}");
                    }
                }
            }
        }
    }
}

/// NaN and infinity stay in their row.
#[test]
fn a_nan_stays_in_its_row() {
    let mut values = vec![1.0f32; 3 * 40];
    values[45] = f32::NAN;
    let x = Array::new([3, 40], Layout::Padded, &values);
    for (level, got) in at_every_level(|cpu| {
        run::<f32, 2>([3, 40], Layout::Padded, |out| cpu::norm(cpu, &Norm::rms(1e-6), x.view(), None, None, out))
    }) {
        assert!(got[..40].iter().chain(&got[80..]).all(|x| x.is_finite()), "{level}");
        assert!(got[40..80].iter().all(|x| x.is_nan()), "{level}");
    }
}

#[test]
fn kv_append_copies() {
    let mut rng = Rng::new(seed());
    for layout in Layout::ALL {
        for paged in [false, true] {
            let (heads, dims) = (3, [16, 5]);
            let cu_seqlens = [0u32, 4, 4, 11];
            let kv_lens = [7u32, 2, 0];
            let table = Array::new([3, 4], layout, &[5u32, 1, 9, 0, 2, 2, 2, 2, 7, 3, 4, 8]);
            let new =
                dims.map(|dim| Array::<bf16, 3>::new([11, heads, dim], layout, &rng.normals(11 * heads * dim, 1.0)));
            let input = KvCache::new(new[0].view(), new[1].view(), Some(&cu_seqlens), &kv_lens);
            let shapes = dims.map(|dim| if paged { [10, 4, heads, dim] } else { [3, 12, heads, dim] });
            let append = |f: &dyn Fn(KvCacheMut<'_, bf16>)| {
                let mut old = shapes.map(|shape| {
                    let old: Vec<bf16> = Rng::new(9).normals(shape.iter().product(), 1.0);
                    let mut out = Output::<bf16, 4>::new(shape, layout);
                    for (i, x) in old.iter().enumerate() {
                        let [_, b, c, d] = shape;
                        out.view().set([i / d / c / b, i / d / c % b, i / d % c, i % d], *x);
                    }
                    out
                });
                let [k, v] = &mut old;
                f(match paged {
                    true => KvCacheMut::paged(k.view(), v.view(), table.view()),
                    false => KvCacheMut::contiguous(k.view(), v.view()),
                });
                old.map(|x| x.finish("cache")).concat()
            };
            let want = append(&|cache| reference::kv_append(&input, cache).unwrap());
            for (level, got) in at_every_level(|cpu| {
                let cpu = std::sync::Mutex::new(cpu);
                append(&|cache| cpu::kv_append(&mut cpu.lock().unwrap(), &input, cache).unwrap())
            }) {
                assert_bits(&format!("{level}, paged: {paged}"), &got, &want);
            }
        }
    }
}

/// What was packed for another specification is an error.
#[test]
fn packed_weights_are_checked() {
    let spec = Mla::new(2, 8, 4, 4, 4);
    let kv_b = vec![0.0f32; 2 * 8 * 8];
    let packed = PackedMla::pack(&spec, View::new(&kv_b, [2, 8, 8])).unwrap();
    let other = Mla::new(2, 8, 5, 4, 3);
    let (q, mut out) = ([0.0f32; 10], [7.0f32; 16]);
    let mut cpu = Cpu::with_level(Level::best());
    let error =
        cpu::mla_absorb_query(&mut cpu, &other, View::new(&q, [1, 2, 5]), &packed, ViewMut::new(&mut out, [1, 2, 8]));
    assert_eq!(
        error.unwrap_err().to_string(),
        "`kv_b` is packed for nope_dim 4 and value_dim 4, expected nope_dim 5 and value_dim 3"
    );
    let error = PackedMla::pack(&spec, View::new(&kv_b, [2, 4, 16])).unwrap_err();
    assert_eq!(error.to_string(), "`kv_b` has shape [2, 4, 16], expected [2, 8, 8]");
    let packed = PackedLinear::pack(View::new(&kv_b, [8, 16])).unwrap();
    let logits = ViewMut::new(&mut out, [2, 8]);
    let error = cpu::router_logits(&mut cpu, &Router::new(8, 2), View::new(&q, [2, 5]), &packed, None, 0, logits);
    assert_eq!(error.unwrap_err().to_string(), "`weight` has shape [1, 8, 16], expected [1, 8, 5]");
    assert_eq!(out, [7.0; 16]);
}
