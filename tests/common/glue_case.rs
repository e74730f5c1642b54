//! Cases of the glue around attention (norms, element-wise functions, rotation, preparation of q, k and v, the KV cache): all
//! arguments of a call, owned, with the truth and the naive method beside it.

use super::buffer::{Array, Layout, Output};
use super::data::Rng;
use super::naive;
use super::tolerance::assert_rows;
use gatefold::args::{KvCache, KvCacheMut, QkvInput, QkvOutput, RopeTable};
use gatefold::spec::{Norm, NormKind, QkNorm, QkvPrep, Rope, RopeStyle};
use gatefold::{Element, Result, View, ViewMut, reference};

/// Compares bits.
#[track_caller]
pub fn assert_bits<O: Element>(what: &str, got: &[O], want: &[O]) {
    assert_eq!(bytemuck::cast_slice::<O, u8>(got), bytemuck::cast_slice::<O, u8>(want), "{what}");
}

/// `$test::<T>(..)` for the element type.
#[macro_export]
macro_rules! with_type {
    ($dtype:expr, $test:ident ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            gatefold::Dtype::BF16 => $test::<half::bf16>($($arg),*),
            gatefold::Dtype::F16 => $test::<half::f16>($($arg),*),
            _ => $test::<f32>($($arg),*),
        }
    };
}

/// Widths around the vectors.
pub const WIDTHS: [usize; 15] = [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 129, 512];

pub fn vector(rng: &mut Rng, len: usize) -> Vec<f32> {
    rng.normals(len, 1.0)
}

pub fn array<T: Element, const N: usize>(rng: &mut Rng, shape: [usize; N], layout: Layout) -> Array<T, N> {
    let mut values: Vec<T> = rng.normals(shape.iter().product(), 1.0);
    if rng.chance(0.3) {
        rng.sprinkle(&mut values);
    }
    Array::new(shape, layout, &values)
}

pub fn run<O: bytemuck::Pod, const N: usize>(
    shape: [usize; N],
    layout: Layout,
    f: impl FnOnce(ViewMut<'_, O, N>) -> Result<()>,
) -> Vec<O> {
    let mut out = Output::new(shape, layout);
    f(out.view()).unwrap();
    out.finish("out")
}

/// What an exponential in f32 may be wrong by, in units in the last place.
pub const EXP_ERROR: f32 = 1.5;

/// An exponential that is wrong by so much.
pub fn exp(x: f32, error: f32) -> f32 {
    x.exp() * (1.0 + error * f32::EPSILON)
}

/// How a norm in f32 may go wrong: at which eighth of the row its sums begin, and by how many units in the last place the
/// factor of the row is off (`1 / sqrt` in f32 is two roundings).
#[derive(Clone, Copy)]
pub struct Variant {
    pub start: usize,
    pub ulp: f32,
}

pub fn variants() -> impl Iterator<Item = Variant> {
    let starts = (0..8).map(|start| Variant { start, ulp: 0.0 });
    starts.chain([1.0, -1.0].map(|ulp| Variant { start: 0, ulp }))
}

/// [`naive::norm`] of one row, in one of several ways.
pub fn naive_norm(spec: &Norm, x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, variant: Variant) -> Vec<f32> {
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
pub fn worst_of<O: Element>(truth: &[f64], ways: impl Iterator<Item = Vec<f32>>) -> Vec<O> {
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

/// The value further from the truth.
pub fn take_worse<O: Element>(worst: &mut [O], other: &[O], truth: &[f64]) {
    for ((worst, other), truth) in worst.iter_mut().zip(other).zip(truth) {
        if (other.to_f64() - truth).abs() > (worst.to_f64() - truth).abs() {
            *worst = *other;
        }
    }
}

/// What lies at the first index.
pub fn values_of<T: Element, const N: usize>(x: &Array<T, N>, first: usize) -> Vec<T> {
    let len: usize = x.shape()[1..].iter().product();
    x.values()[first * len..][..len].to_vec()
}

/// The same, as an array of one.
fn only<T: Element>(x: &Array<T, 3>, first: usize, layout: Layout) -> Array<T, 3> {
    let [_, b, c] = x.shape();
    Array::new([1, b, c], layout, &values_of(x, first))
}

/// One call of `norm`.
pub struct NormCase<T> {
    pub spec: Norm,
    pub x: Array<T, 3>,
    pub weight: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
    pub layout: Layout,
}

impl<T: Element> NormCase<T> {
    pub fn new(spec: &Norm, shape: [usize; 3], layout: Layout, weighted: bool, seed: u64) -> Self {
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
        NormCase { spec: *spec, x, weight, bias, layout }
    }

    /// One of the outer rows by itself.
    pub fn alone(&self, t: usize) -> Self {
        let (weight, bias) = (self.weight.clone(), self.bias.clone());
        NormCase { spec: self.spec, x: only(&self.x, t, self.layout), weight, bias, layout: self.layout }
    }

    pub fn run<O: Element>(
        &self,
        f: impl FnOnce(&Norm, View<'_, T, 3>, Option<&[f32]>, Option<&[f32]>, ViewMut<'_, O, 3>) -> Result<()>,
    ) -> Vec<O> {
        let (weight, bias) = (self.weight.as_deref(), self.bias.as_deref());
        run(self.x.shape(), self.layout, |out| f(&self.spec, self.x.view(), weight, bias, out))
    }

    /// The truth, and the naive method.
    pub fn expected<O: Element>(&self) -> (Vec<f64>, Vec<O>) {
        let truth = self.run(reference::norm);
        let x: Vec<f32> = self.x.values().iter().map(|x| x.to_f32()).collect();
        let (weight, bias) = (self.weight.as_deref(), self.bias.as_deref());
        let width = self.x.shape()[2];
        let all = |variant| x.chunks(width).flat_map(|x| naive_norm(&self.spec, x, weight, bias, variant)).collect();
        let naive = worst_of(&truth, variants().map(all));
        (truth, naive)
    }
}

/// Two matrices for `add` and `sigmoid_mul`.
pub struct PairCase<T> {
    pub x: Array<T, 2>,
    pub y: Array<T, 2>,
    pub layout: Layout,
}

impl<T: Element> PairCase<T> {
    pub fn new(shape: [usize; 2], layout: Layout, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        PairCase { x: array(&mut rng, shape, layout), y: array(&mut rng, shape, layout), layout }
    }

    pub fn run<O: Element>(
        &self,
        f: impl FnOnce(View<'_, T, 2>, View<'_, T, 2>, ViewMut<'_, O, 2>) -> Result<()>,
    ) -> Vec<O> {
        run(self.x.shape(), self.layout, |out| f(self.x.view(), self.y.view(), out))
    }

    fn pairs(&self) -> impl Iterator<Item = (f32, f32)> {
        self.x.values().into_iter().zip(self.y.values()).map(|(x, y)| (x.to_f32(), y.to_f32()))
    }

    /// The truth of `add`, and the naive method.
    pub fn sum(&self, multiplier: f64) -> (Vec<f64>, Vec<T>) {
        let truth = self.run(|x, y, out| reference::add(x, y, multiplier, out));
        (truth, self.pairs().map(|(x, y)| T::from_f32(x + multiplier as f32 * y)).collect())
    }

    /// The truth of `sigmoid_mul`, and the naive method.
    pub fn gated(&self) -> (Vec<f64>, Vec<T>) {
        let truth = self.run(reference::sigmoid_mul);
        let gated = |error: f32| self.pairs().map(|(x, y)| x * (1.0 / (1.0 + exp(-y, error)))).collect();
        let naive = worst_of(&truth, [0.0, EXP_ERROR, -EXP_ERROR].into_iter().map(gated));
        (truth, naive)
    }
}

/// cos and sin in f32, and positions within them.
pub fn table(rng: &mut Rng, rope: &Rope, num_tokens: usize) -> ([Array<f32, 2>; 2], Vec<u32>) {
    let (cos, sin) = rope.table(50);
    let shape = [50, rope.rotary_dim / 2];
    let f32s = |x: Vec<f64>| Array::new(shape, Layout::Padded, &x.iter().map(|x| *x as f32).collect::<Vec<_>>());
    ([f32s(cos), f32s(sin)], (0..num_tokens).map(|_| rng.below(50) as u32).collect())
}

/// One call of `rope`.
pub struct RopeCase<T> {
    pub spec: Rope,
    pub x: Array<T, 3>,
    pub positions: Vec<u32>,
    pub tables: [Array<f32, 2>; 2],
    pub layout: Layout,
}

impl<T: Element> RopeCase<T> {
    pub fn new(shape: [usize; 3], style: RopeStyle, rotary_dim: usize, layout: Layout, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let spec = Rope::new(style, rotary_dim, 1000.0);
        let x = array::<T, 3>(&mut rng, shape, layout);
        let (tables, positions) = table(&mut rng, &spec, shape[0]);
        RopeCase { spec, x, positions, tables, layout }
    }

    pub fn run<O: Element>(
        &self,
        f: impl FnOnce(&Rope, View<'_, T, 3>, &[u32], &RopeTable<'_>, ViewMut<'_, O, 3>) -> Result<()>,
    ) -> Vec<O> {
        let table = RopeTable::new(self.tables[0].view(), self.tables[1].view());
        run(self.x.shape(), self.layout, |out| f(&self.spec, self.x.view(), &self.positions, &table, out))
    }

    /// The truth, and the naive method.
    pub fn expected(&self) -> (Vec<f64>, Vec<T>) {
        let [cos, sin] = [self.tables[0].view(), self.tables[1].view()];
        (self.run(reference::rope), naive::rope(&self.spec, &self.x.view(), &self.positions, &cos, &sin))
    }
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

/// One call of `prepare_qkv`.
pub struct QkvCase<T> {
    pub spec: QkvPrep,
    pub q: Array<T, 3>,
    pub k: Array<T, 3>,
    pub v: Array<T, 3>,
    pub weights: Option<(Vec<f32>, Vec<f32>)>,
    pub tables: [Array<f32, 2>; 2],
    pub positions: Vec<u32>,
    pub layout: Layout,
}

/// Truth or naive method of q and k; v exactly.
pub struct QkvExpected<T> {
    pub truth: [Vec<f64>; 2],
    pub naive: [Vec<T>; 2],
    pub v: Vec<T>,
}

impl<T: Element> QkvCase<T> {
    pub fn new(spec: &QkvPrep, n: usize, layout: Layout, seed: u64) -> Self {
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
        QkvCase { spec: spec.clone(), q, k, v, weights, tables, positions, layout }
    }

    /// A token by itself.
    pub fn alone(&self, t: usize) -> Self {
        let one = |x: &Array<T, 3>| only(x, t, self.layout);
        QkvCase {
            spec: self.spec.clone(),
            q: one(&self.q),
            k: one(&self.k),
            v: one(&self.v),
            weights: self.weights.clone(),
            tables: self.tables.clone(),
            positions: vec![self.positions[t]],
            layout: self.layout,
        }
    }

    pub fn input(&self) -> QkvInput<'_, T> {
        let mut input = QkvInput::new(self.q.view(), self.k.view(), self.v.view(), &self.positions);
        input.q_norm = self.weights.as_ref().map(|w| &w.0[..]);
        input.k_norm = self.weights.as_ref().map(|w| &w.1[..]);
        input.rope = self.spec.rope.as_ref().map(|_| RopeTable::new(self.tables[0].view(), self.tables[1].view()));
        input
    }

    /// Queries, keys and values.
    pub fn run<O: Element>(
        &self,
        f: impl FnOnce(&QkvPrep, &QkvInput<'_, T>, QkvOutput<'_, O>) -> Result<()>,
    ) -> [Vec<O>; 3] {
        let mut q = Output::new(self.q.shape(), self.layout);
        let mut k = Output::new(self.k.shape(), self.layout);
        let mut v = Output::new(self.v.shape(), self.layout);
        f(&self.spec, &self.input(), QkvOutput::new(q.view(), k.view(), v.view())).unwrap();
        [q.finish("q"), k.finish("k"), v.finish("v")]
    }

    pub fn expected(&self) -> QkvExpected<T> {
        let [q, k, _] = self.run(reference::prepare_qkv);
        let empty = View::new(&[0.0f32; 0], [0, 0, 0]);
        let mut f32s = QkvInput::new(empty, empty, empty, &self.positions);
        f32s.rope = self.input().rope;
        let naive = |x: &Array<T, 3>, truth: &[f64], weight: Option<&[f32]>, query: bool| -> Vec<T> {
            let row = |t: usize| values_of(x, t).iter().map(|x| x.to_f32()).collect::<Vec<_>>();
            let token = |variant, t| naive_qk(variant, &self.spec, &f32s, &row(t), weight, t, query);
            let all = |variant| (0..x.shape()[0]).flat_map(|t| token(variant, t)).collect();
            worst_of(truth, variants().map(all))
        };
        let naive_q = naive(&self.q, &q, self.weights.as_ref().map(|w| &w.0[..]), true);
        let naive_k = naive(&self.k, &k, self.weights.as_ref().map(|w| &w.1[..]), false);
        let clip = |x: &T| match self.spec.clip {
            Some(clip) => T::from_f32(x.to_f32().clamp(-clip as f32, clip as f32)),
            None => *x,
        };
        let v = self.v.values().iter().map(clip).collect();
        QkvExpected { truth: [q, k], naive: [naive_q, naive_k], v }
    }
}

impl<T: Element> QkvExpected<T> {
    /// Compares a result.
    #[track_caller]
    pub fn check(&self, what: &str, head_dim: usize, [q, k, v]: [&[T]; 3]) {
        assert_rows(&format!("q, {what}"), q, &self.truth[0], &self.naive[0], head_dim);
        assert_rows(&format!("k, {what}"), k, &self.truth[1], &self.naive[1], head_dim);
        assert!(v.len() == self.v.len() && v.iter().zip(&self.v).all(|(a, b)| a.to_f64() == b.to_f64()), "v, {what}");
    }
}

/// New rows of three sequences, one of them without new rows, and caches for them.
pub struct AppendCase<T> {
    pub new: [Array<T, 3>; 2],
    pub cu_seqlens: [u32; 4],
    pub kv_lens: [u32; 3],
    pub table: Array<u32, 2>,
    pub paged: bool,
    pub layout: Layout,
}

impl<T: Element> AppendCase<T> {
    pub fn new(heads: usize, dims: [usize; 2], paged: bool, layout: Layout, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let new = dims.map(|dim| Array::<T, 3>::new([11, heads, dim], layout, &rng.normals(11 * heads * dim, 1.0)));
        let table = Array::new([3, 4], layout, &[5u32, 1, 9, 0, 2, 2, 2, 2, 7, 3, 4, 8]);
        AppendCase { new, cu_seqlens: [0, 4, 4, 11], kv_lens: [7, 2, 0], table, paged, layout }
    }

    /// Both caches after the call, with what was in them before.
    pub fn run(&self, f: impl FnOnce(&KvCache<'_, T>, KvCacheMut<'_, T>) -> Result<()>) -> Vec<T> {
        let input = KvCache::new(self.new[0].view(), self.new[1].view(), Some(&self.cu_seqlens), &self.kv_lens);
        self.run_into(|cache| f(&input, cache))
    }

    /// The same for any call that writes the caches.
    pub fn run_into(&self, f: impl FnOnce(KvCacheMut<'_, T>) -> Result<()>) -> Vec<T> {
        let [_, heads, _] = self.new[0].shape();
        let shape = |dim| if self.paged { [10, 4, heads, dim] } else { [3, 12, heads, dim] };
        let [mut k, mut v] = [0, 1].map(|i| {
            let shape = shape(self.new[i].shape()[2]);
            let old: Vec<T> = Rng::new(9).normals(shape.iter().product(), 1.0);
            let mut out = Output::<T, 4>::new(shape, self.layout);
            for (i, x) in old.iter().enumerate() {
                let [_, b, c, d] = shape;
                out.view().set([i / d / c / b, i / d / c % b, i / d % c, i % d], *x);
            }
            out
        });
        f(match self.paged {
            true => KvCacheMut::paged(k.view(), v.view(), self.table.view()),
            false => KvCacheMut::contiguous(k.view(), v.view()),
        })
        .unwrap();
        [k.finish("cache.k"), v.finish("cache.v")].concat()
    }
}
