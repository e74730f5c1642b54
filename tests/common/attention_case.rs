//! A call of attention with all its arguments, made from options and a seed.

use super::buffer::{Array, Layout, Output};
use super::data::Rng;
use gatefold::args::{AttentionInput, AttentionOutput, Kv};
use gatefold::spec::{Attention, Mask, RelativeBias};
use gatefold::{Element, Result};

/// Where keys and values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvLayout {
    Ragged,
    Cache,
    /// Rows per page.
    Paged(usize),
}

/// An additive bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseBias {
    None,
    /// `[1, num_heads, max_q_len, max_kv_len]`
    PerHead,
    /// `[num_seqs, 1, 1, max_kv_len]`, some of it -inf.
    PerKey,
}

/// An explicit mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseMask {
    None,
    /// `[num_seqs, num_heads, max_q_len, max_kv_len]`
    Full,
    /// `[num_seqs, 1, 1, max_kv_len]`
    PerKey,
}

/// ALiBi.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alibi {
    None,
    Distance,
    Positions,
}

/// Sink logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sinks {
    None,
    Finite,
    /// Head 0 has -inf.
    WithMinusInf,
}

/// Everything that can be chosen about a call.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// Query heads, key/value heads.
    pub heads: (usize, usize),
    /// Width of keys, of values.
    pub dims: (usize, usize),
    /// `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    pub mask: Mask,
    pub softcap: Option<f64>,
    pub bias: DenseBias,
    pub dense_mask: DenseMask,
    pub alibi: Alibi,
    /// Bidirectional or not.
    pub relative_bias: Option<bool>,
    pub sinks: Sinks,
    pub kv: KvLayout,
    /// Length of queries and keys of each sequence.
    pub lens: Vec<(usize, usize)>,
    /// The first keys of every other sequence are padding.
    pub left_padding: bool,
    /// Positions of queries and keys are given.
    pub starts: bool,
    pub layout: Layout,
}

impl AttentionOptions {
    /// Self-attention of one sequence with nothing optional.
    pub fn new(heads: (usize, usize), dim: usize, lens: &[(usize, usize)]) -> Self {
        AttentionOptions {
            heads,
            dims: (dim, dim),
            scale: None,
            mask: Mask::default(),
            softcap: None,
            bias: DenseBias::None,
            dense_mask: DenseMask::None,
            alibi: Alibi::None,
            relative_bias: None,
            sinks: Sinks::None,
            kv: KvLayout::Ragged,
            lens: lens.to_vec(),
            left_padding: false,
            starts: false,
            layout: Layout::Contiguous,
        }
    }

    pub fn spec(&self) -> Attention {
        let mut spec = Attention::new(self.heads.0, self.heads.1, self.dims.0);
        spec.value_dim = self.dims.1;
        if let Some(scale) = self.scale {
            spec.softmax_scale = scale;
        }
        spec.mask = self.mask;
        spec.softcap = self.softcap;
        spec.relative_bias = self.relative_bias.map(|both| RelativeBias::new(8, 20, both));
        spec.alibi = self.alibi != Alibi::None;
        spec.sinks = self.sinks != Sinks::None;
        spec
    }
}

/// The arguments. Keys and values that no query may see by position or length are NaN, and so is everything around the arrays.
#[derive(Clone, Debug)]
pub struct AttentionCase<T> {
    pub spec: Attention,
    pub options: AttentionOptions,
    pub q: Array<T, 3>,
    /// `[1, num_kv_tokens, ..]` for ragged rows.
    pub k: Array<T, 4>,
    pub v: Array<T, 4>,
    pub block_table: Array<u32, 2>,
    pub kv_lens: Vec<u32>,
    pub cu_seqlens_q: Vec<u32>,
    pub cu_seqlens_kv: Vec<u32>,
    pub kv_begin: Option<Vec<u32>>,
    pub q_start: Option<Vec<i64>>,
    pub k_start: Option<Vec<i64>>,
    pub mask: Option<Array<u8, 4>>,
    pub bias: Option<Array<f32, 4>>,
    pub alibi_slopes: Option<Vec<f32>>,
    pub alibi_positions: Option<Array<f32, 2>>,
    pub relative_bias: Option<Array<f32, 2>>,
    pub sinks: Option<Vec<f32>>,
}

/// What a run gives, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionResult<O, R> {
    pub out: Vec<O>,
    pub lse: Vec<R>,
}

/// The place of key row `j` of a sequence in the array of keys.
fn place(options: &AttentionOptions, cu: &[u32], table: &Array<u32, 2>, seq: usize, j: usize) -> [usize; 2] {
    match options.kv {
        KvLayout::Ragged => [0, cu[seq] as usize + j],
        KvLayout::Cache => [seq, j],
        KvLayout::Paged(size) => [table.at([seq, j / size]) as usize, j % size],
    }
}

impl<T: Element> AttentionCase<T> {
    /// Queries and keys with deviation 1, so that scores have deviation 1.
    pub fn new(options: &AttentionOptions, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let spec = options.spec();
        let ((heads, kv_heads), (dim, value_dim)) = (options.heads, options.dims);
        let num_seqs = options.lens.len();
        let sums = |len: &dyn Fn(&(usize, usize)) -> usize| -> Vec<u32> {
            let mut sums = vec![0];
            options.lens.iter().for_each(|l| sums.push(sums[sums.len() - 1] + len(l) as u32));
            sums
        };
        let (cu_seqlens_q, cu_seqlens_kv) = (sums(&|l| l.0), sums(&|l| l.1));
        let num_tokens = cu_seqlens_q[num_seqs] as usize;
        let max_q = options.lens.iter().map(|l| l.0).max().unwrap_or(0);
        let max_kv = options.lens.iter().map(|l| l.1).max().unwrap_or(0);

        let (blocks, rows, table) = match options.kv {
            KvLayout::Ragged => (1, cu_seqlens_kv[num_seqs] as usize, Array::new([0, 0], Layout::Contiguous, &[])),
            KvLayout::Cache => (num_seqs, max_kv + 3, Array::new([0, 0], Layout::Contiguous, &[])),
            KvLayout::Paged(size) => {
                let max_pages = max_kv.div_ceil(size) + 1;
                let order = rng.permutation(num_seqs * max_pages + 2);
                let mut ids = vec![u32::MAX; num_seqs * max_pages];
                for (seq, (_, kv_len)) in options.lens.iter().enumerate() {
                    for page in 0..kv_len.div_ceil(size) {
                        ids[seq * max_pages + page] = order[seq * max_pages + page] as u32;
                    }
                }
                (order.len(), size, Array::new([num_seqs, max_pages], options.layout, &ids))
            }
        };
        let nan = T::from_f64(f64::NAN);
        let empty = |width: usize| {
            let shape = [blocks, rows, kv_heads, width];
            Array::new(shape, options.layout, &vec![nan; shape.iter().product()])
        };
        let q_values = rng.normals(num_tokens * heads * dim, 1.0);
        let full = [num_seqs, heads, max_q, max_kv];
        let mut case = AttentionCase {
            q: Array::new([num_tokens, heads, dim], options.layout, &q_values),
            k: empty(dim),
            v: empty(value_dim),
            block_table: table,
            kv_lens: options.lens.iter().map(|l| l.1 as u32).collect(),
            cu_seqlens_q,
            cu_seqlens_kv,
            kv_begin: options.left_padding.then(|| {
                options.lens.iter().enumerate().map(|(s, l)| if s % 2 == 0 { (l.1 / 3) as u32 } else { 0 }).collect()
            }),
            q_start: options.starts.then(|| {
                options.lens.iter().enumerate().map(|(s, l)| 5 + s as i64 + l.1 as i64 - l.0 as i64).collect()
            }),
            k_start: options.starts.then(|| (0..num_seqs).map(|s| 4 + s as i64).collect()),
            mask: None,
            bias: None,
            alibi_slopes: None,
            alibi_positions: None,
            relative_bias: None,
            sinks: None,
            options: options.clone(),
            spec,
        };
        let broadcast = |keep: [bool; 4]| -> [usize; 4] { std::array::from_fn(|i| if keep[i] { full[i] } else { 1 }) };
        case.mask = match options.dense_mask {
            DenseMask::None => None,
            DenseMask::Full => Some(broadcast([true; 4])),
            DenseMask::PerKey => Some(broadcast([true, false, false, true])),
        }
        .map(|shape| {
            let values: Vec<u8> = (0..shape.iter().product()).map(|_| u8::from(rng.chance(0.7)) * 3).collect();
            Array::new(shape, options.layout, &values)
        });
        case.bias = match options.bias {
            DenseBias::None => None,
            DenseBias::PerHead => Some((broadcast([false, true, true, true]), 0.0)),
            DenseBias::PerKey => Some((broadcast([true, false, false, true]), 0.2)),
        }
        .map(|(shape, hidden)| {
            let mut values: Vec<f32> = rng.normals(shape.iter().product(), 1.0);
            values.iter_mut().filter(|_| rng.chance(hidden)).for_each(|x| *x = f32::NEG_INFINITY);
            Array::new(shape, options.layout, &values)
        });
        if options.alibi != Alibi::None {
            case.alibi_slopes = Some((0..heads).map(|h| 0.5f32.powi(h as i32 + 1)).collect());
        }
        if options.alibi == Alibi::Positions {
            let values: Vec<f32> = (0..num_seqs * max_kv).map(|_| rng.below(9) as f32).collect();
            case.alibi_positions = Some(Array::new([num_seqs, max_kv], options.layout, &values));
        }
        if options.relative_bias.is_some() {
            case.relative_bias = Some(Array::new([8, heads], options.layout, &rng.normals(8 * heads, 1.0)));
        }
        if options.sinks != Sinks::None {
            let mut sinks: Vec<f32> = rng.normals(heads, 1.0);
            if options.sinks == Sinks::WithMinusInf {
                sinks[0] = f32::NEG_INFINITY;
            }
            case.sinks = Some(sinks);
        }
        case.fill(&mut rng);
        case
    }

    /// Numbers in the keys and values that some query may see.
    fn fill(&mut self, rng: &mut Rng) {
        for seq in 0..self.options.lens.len() {
            let rows = {
                let input = self.input();
                let s = input.sequence(seq);
                let visible: Vec<_> = (0..s.q_len).map(|i| s.visible_rows(&self.spec, i)).collect();
                (0..s.kv_len).filter(|j| visible.iter().any(|r| r.contains(j))).collect::<Vec<_>>()
            };
            for j in rows {
                let [block, row] = self.place(seq, j);
                for g in 0..self.options.heads.1 {
                    for d in 0..self.options.dims.0 {
                        self.k.set([block, row, g, d], T::from_f64(rng.normal()));
                    }
                    for d in 0..self.options.dims.1 {
                        self.v.set([block, row, g, d], T::from_f64(rng.normal()));
                    }
                }
            }
        }
    }

    /// Block and row of key `j` in `k` and `v`.
    pub fn place(&self, seq: usize, j: usize) -> [usize; 2] {
        place(&self.options, &self.cu_seqlens_kv, &self.block_table, seq, j)
    }

    pub fn input(&self) -> AttentionInput<'_, T, f32> {
        let (k, v) = (self.k.view(), self.v.view());
        let kv = match self.options.kv {
            KvLayout::Ragged => Kv::ragged(first(k), first(v), Some(&self.cu_seqlens_kv)),
            KvLayout::Cache => Kv::cache(k, v, &self.kv_lens),
            KvLayout::Paged(_) => Kv::paged(k, v, self.block_table.view(), &self.kv_lens),
        };
        let mut input = AttentionInput::new(self.q.view(), kv);
        input.cu_seqlens_q = Some(&self.cu_seqlens_q);
        input.kv_begin = self.kv_begin.as_deref();
        input.q_start = self.q_start.as_deref();
        input.k_start = self.k_start.as_deref();
        input.mask = self.mask.as_ref().map(Array::view);
        input.bias = self.bias.as_ref().map(Array::view);
        input.alibi_slopes = self.alibi_slopes.as_deref();
        input.alibi_positions = self.alibi_positions.as_ref().map(Array::view);
        input.relative_bias = self.relative_bias.as_ref().map(Array::view);
        input.sinks = self.sinks.as_deref();
        input
    }

    /// Runs it between guard values.
    pub fn run<O: Element, R: Element>(
        &self,
        attention: impl FnOnce(&Attention, &AttentionInput<'_, T, f32>, AttentionOutput<'_, O, R>) -> Result<()>,
    ) -> AttentionResult<O, R> {
        let [num_tokens, heads, _] = self.q.shape();
        let mut out = Output::new([num_tokens, heads, self.spec.value_dim], self.options.layout);
        let mut lse = Output::new([num_tokens, heads], self.options.layout);
        attention(&self.spec, &self.input(), AttentionOutput::with_lse(out.view(), lse.view())).unwrap();
        AttentionResult { out: out.finish("out"), lse: lse.finish("lse") }
    }
}

/// The rows of the only block.
fn first<T>(view: gatefold::View<'_, T, 4>) -> gatefold::View<'_, T, 3> {
    let ([_, rows, heads, dim], [_, row, head, one]) = (view.shape(), view.strides());
    gatefold::View::with_strides(view.data(), [rows, heads, dim], [row, head, one])
}
