//! Between projection and attention on the GPU: norms, clipping, rotation and temperature in one pass, straight into the KV
//! cache where there is one. The same kernel rotates alone and appends alone.
//!
//! ```text
//! plan    what a call is, its kernel, what a launch checks
//! here    arguments on the device and the safe calls
//! ```

mod plan;

pub use plan::{QkvArgs, QkvArrays, QkvCache, QkvPlan, QkvProblem};

use crate::cuda::memory::{DeviceView, DeviceViewMut, Home, Queue};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::spec::{QkNorm, QkvPrep, Rope};

/// cos and sin per position, each `[num_positions, rotary_dim / 2]` (see [`Rope::table`]).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RopeTable<'a> {
    /// cos
    pub cos: DeviceView<'a, f32, 2>,
    /// sin
    pub sin: DeviceView<'a, f32, 2>,
}

impl<'a> RopeTable<'a> {
    /// Both tables.
    pub const fn new(cos: DeviceView<'a, f32, 2>, sin: DeviceView<'a, f32, 2>) -> Self {
        RopeTable { cos, sin }
    }

    fn check(&self, rope: &Rope, positions: &DeviceView<'_, u32, 1>, num_tokens: usize) -> Result<()> {
        let [rows, _] = self.cos.shape();
        self.cos.check("cos", [rows, rope.rotary_dim / 2])?;
        self.sin.check("sin", [rows, rope.rotary_dim / 2])?;
        positions.check("positions", [num_tokens])
    }
}

/// Projected rows and what prepares them for attention.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct QkvInput<'a, T> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: DeviceView<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, head_dim]`
    pub k: DeviceView<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, value_dim]`
    pub v: DeviceView<'a, T, 3>,
    /// `[head_dim]` per head, `[num_heads * head_dim]` over all heads.
    pub q_norm: Option<DeviceView<'a, f32, 1>>,
    /// `[head_dim]` per head, `[num_kv_heads * head_dim]` over all heads.
    pub k_norm: Option<DeviceView<'a, f32, 1>>,
    /// cos and sin.
    pub rope: Option<RopeTable<'a>>,
    /// `[num_tokens]`: rows of the table; needed for RoPE and the query temperature, else may be empty.
    pub positions: DeviceView<'a, u32, 1>,
}

impl<'a, T> QkvInput<'a, T> {
    fn homes(&self) -> [Home; 8] {
        [
            self.q.home(),
            self.k.home(),
            self.v.home(),
            self.q_norm.and_then(|view| view.home()),
            self.k_norm.and_then(|view| view.home()),
            self.rope.and_then(|table| table.cos.home()),
            self.rope.and_then(|table| table.sin.home()),
            self.positions.home(),
        ]
    }

    /// Rows and positions; no norm weights, no table.
    pub const fn new(
        q: DeviceView<'a, T, 3>,
        k: DeviceView<'a, T, 3>,
        v: DeviceView<'a, T, 3>,
        positions: DeviceView<'a, u32, 1>,
    ) -> Self {
        QkvInput { q, k, v, q_norm: None, k_norm: None, rope: None, positions }
    }

    /// Everything but the outputs; gives the number of tokens.
    fn check(&self, spec: &QkvPrep) -> Result<usize> {
        spec.validate()?;
        let n = self.q.shape()[0];
        let (heads, kv_heads) = (spec.num_heads, spec.num_kv_heads);
        self.q.check("q", [n, heads, spec.head_dim])?;
        self.k.check("k", [n, kv_heads, spec.head_dim])?;
        self.v.check("v", [n, kv_heads, spec.value_dim])?;
        for (name, weight, heads) in [("q_norm", self.q_norm, heads), ("k_norm", self.k_norm, kv_heads)] {
            let len = match spec.qk_norm {
                Some(QkNorm::PerHead) => spec.head_dim,
                Some(QkNorm::Full) => heads.saturating_mul(spec.head_dim),
                None | Some(QkNorm::L2AfterRope) if weight.is_none() => continue,
                _ => return Err(Error::unexpected(name, "the specification has no such weights")),
            };
            let Some(weight) = weight else {
                return Err(Error::missing(name, "the specification has this norm"));
            };
            check_len(name, weight.shape()[0], len)?;
            weight.check(name, [len])?;
        }
        match (&spec.rope, &self.rope) {
            (Some(rope), Some(table)) => table.check(rope, &self.positions, n)?,
            (Some(_), None) => return Err(Error::missing("rope", "the specification rotates queries and keys")),
            (None, Some(_)) => return Err(Error::unexpected("rope", "the specification does not rotate")),
            (None, None) if spec.q_temperature.is_some() => self.positions.check("positions", [n])?,
            (None, None) => {}
        }
        Ok(n)
    }
}

/// Prepared rows.
#[derive(Debug)]
#[non_exhaustive]
pub struct QkvOutput<'a, T> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: DeviceViewMut<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, head_dim]`
    pub k: DeviceViewMut<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, value_dim]`
    pub v: DeviceViewMut<'a, T, 3>,
}

impl<'a, T> QkvOutput<'a, T> {
    /// All three.
    pub const fn new(q: DeviceViewMut<'a, T, 3>, k: DeviceViewMut<'a, T, 3>, v: DeviceViewMut<'a, T, 3>) -> Self {
        QkvOutput { q, k, v }
    }
}

/// A KV cache that is written.
#[derive(Debug)]
#[non_exhaustive]
pub enum KvCacheMut<'a, T> {
    /// The same room for every sequence: `[num_seqs, capacity, num_kv_heads, width]`.
    #[non_exhaustive]
    Contiguous {
        /// Keys.
        k: DeviceViewMut<'a, T, 4>,
        /// Values.
        v: DeviceViewMut<'a, T, 4>,
    },
    /// Pages: `[num_pages, page_size, num_kv_heads, width]`.
    #[non_exhaustive]
    Paged {
        /// Keys.
        k: DeviceViewMut<'a, T, 4>,
        /// Values.
        v: DeviceViewMut<'a, T, 4>,
        /// `[num_seqs, max_pages]`
        block_table: DeviceView<'a, u32, 2>,
    },
}

impl<'a, T> KvCacheMut<'a, T> {
    fn homes(&self) -> [Home; 3] {
        match self {
            KvCacheMut::Contiguous { k, v } => [k.home(), v.home(), None],
            KvCacheMut::Paged { k, v, block_table } => [k.home(), v.home(), block_table.home()],
        }
    }

    /// The same room for every sequence.
    pub const fn contiguous(k: DeviceViewMut<'a, T, 4>, v: DeviceViewMut<'a, T, 4>) -> Self {
        KvCacheMut::Contiguous { k, v }
    }

    /// Pages.
    pub const fn paged(
        k: DeviceViewMut<'a, T, 4>,
        v: DeviceViewMut<'a, T, 4>,
        block_table: DeviceView<'a, u32, 2>,
    ) -> Self {
        KvCacheMut::Paged { k, v, block_table }
    }

    /// Checks the cache for so many sequences, heads and these widths, and enters it into a problem and its arguments.
    fn enter(
        &self,
        [num_seqs, heads, head_dim, value_dim]: [usize; 4],
        ragged: bool,
        problem: &mut QkvProblem,
        args: &mut QkvArgs,
    ) -> Result<()> {
        let (KvCacheMut::Contiguous { k, v } | KvCacheMut::Paged { k, v, .. }) = self;
        let [blocks, block_rows, _, _] = k.shape();
        k.check("cache.k", [blocks, block_rows, heads, head_dim])?;
        v.check("cache.v", [blocks, block_rows, heads, value_dim])?;
        let mut cache = QkvCache { num_seqs, ragged, num_blocks: blocks, block_rows, pages: None };
        match self {
            KvCacheMut::Contiguous { k, .. } => {
                if blocks != num_seqs {
                    let expected = vec![num_seqs, block_rows, heads, head_dim];
                    let found = k.shape().to_vec();
                    return Err(Error::Shape { argument: "cache.k".into(), expected, found });
                }
            }
            KvCacheMut::Paged { block_table, .. } => {
                let [_, max_pages] = block_table.shape();
                block_table.check("block_table", [num_seqs, max_pages])?;
                cache.pages = Some([max_pages, block_table.strides()[0]]);
                args.block_table = block_table.ptr();
            }
        }
        let strides = |view: &DeviceViewMut<'_, T, 4>| [view.strides()[0], view.strides()[1], view.strides()[2]];
        (problem.k_out_strides, problem.v_out_strides) = (strides(k), strides(v));
        (args.k_out, args.v_out) = (k.ptr(), v.ptr());
        problem.cache = Some(cache);
        Ok(())
    }
}

/// Which rows of the cache take the new ones: row `i` of sequence `s` goes to row `kv_lens[s] + i`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KvRows<'a> {
    /// `[num_seqs + 1]`: sequence `s` owns the new rows `cu_seqlens[s] .. cu_seqlens[s + 1]`. `None`: one sequence.
    pub cu_seqlens: Option<DeviceView<'a, u32, 1>>,
    /// `[num_seqs]`: rows that are in the cache already.
    pub kv_lens: DeviceView<'a, u32, 1>,
}

impl<'a> KvRows<'a> {
    /// Both.
    pub const fn new(cu_seqlens: Option<DeviceView<'a, u32, 1>>, kv_lens: DeviceView<'a, u32, 1>) -> Self {
        KvRows { cu_seqlens, kv_lens }
    }

    /// Checks the lengths, enters the pointers; gives the number of sequences.
    fn enter(&self, args: &mut QkvArgs) -> Result<usize> {
        let mut num_seqs = 1;
        if let Some(sums) = self.cu_seqlens {
            let [len] = sums.shape();
            if len == 0 {
                return Err(Error::Len { argument: "cu_seqlens".into(), expected: 1, found: 0 });
            }
            sums.check("cu_seqlens", [len])?;
            num_seqs = len - 1;
            args.cu_seqlens = sums.ptr();
        }
        check_len("kv_lens", self.kv_lens.shape()[0], num_seqs)?;
        self.kv_lens.check("kv_lens", [num_seqs])?;
        args.kv_lens = self.kv_lens.ptr();
        Ok(num_seqs)
    }
}

/// New rows for a KV cache: row `i` of sequence `s` goes to row `kv_lens[s] + i` of its cache.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KvCache<'a, T> {
    /// `[num_tokens, num_kv_heads, head_dim]`
    pub k: DeviceView<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, value_dim]`
    pub v: DeviceView<'a, T, 3>,
    /// `[num_seqs + 1]`: sequence `s` owns the new rows `cu_seqlens[s] .. cu_seqlens[s + 1]`. `None`: one sequence.
    pub cu_seqlens: Option<DeviceView<'a, u32, 1>>,
    /// `[num_seqs]`: rows that are in the cache already.
    pub kv_lens: DeviceView<'a, u32, 1>,
}

impl<'a, T> KvCache<'a, T> {
    /// All fields.
    pub const fn new(
        k: DeviceView<'a, T, 3>,
        v: DeviceView<'a, T, 3>,
        cu_seqlens: Option<DeviceView<'a, u32, 1>>,
        kv_lens: DeviceView<'a, u32, 1>,
    ) -> Self {
        KvCache { k, v, cu_seqlens, kv_lens }
    }
}

/// Strides of the leading dimensions.
fn leading<T>(view: &DeviceView<'_, T, 3>) -> [usize; 2] {
    [view.strides()[0], view.strides()[1]]
}

/// Projected rows made ready for attention, in this order, with one rounding to `T` at the end:
///
/// 1. [`QkNorm::Full`]: RMS norm of q and of k over all their heads together
/// 2. q, k and v clamped to `[-clip, clip]`
/// 3. [`QkNorm::PerHead`]: RMS norm of each head of q and k
/// 4. [`rope()`] on q and k
/// 5. [`QkNorm::L2AfterRope`]: RMS norm without weights of each head of q and k
/// 6. `q *= 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))` (see [`crate::spec::QTemperature`])
///
/// * `q`: `[num_tokens, num_heads, head_dim]`, `k`: `[num_tokens, num_kv_heads, head_dim]`, `v`: the same with `value_dim`
/// * `positions`: `[num_tokens]`, rows of the cos and sin tables; a position beyond them counts as the last
///
/// Sums of squares are f32: a head (or row) whose squares leave its range, values beyond about 1e18, comes out as 0.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Presence`] where specification and arguments disagree; those of
/// [`QkvPlan::new`] and [`QkvPlan::launch`]. Nothing is written then.
pub fn prepare_qkv<T: Element>(
    queue: &mut Queue<'_>,
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    output: QkvOutput<'_, T>,
) -> Result<()> {
    queue.check_homes(&input.homes())?;
    queue.check_homes(&[output.q.home(), output.k.home(), output.v.home()])?;
    let n = input.check(spec)?;
    output.q.check("out.q", [n, spec.num_heads, spec.head_dim])?;
    output.k.check("out.k", [n, spec.num_kv_heads, spec.head_dim])?;
    output.v.check("out.v", [n, spec.num_kv_heads, spec.value_dim])?;
    let (mut problem, mut args) = entered(spec, input, n, &output.q);
    let rows = |view: &DeviceViewMut<'_, T, 3>| [0, view.strides()[0], view.strides()[1]];
    (problem.k_out_strides, problem.v_out_strides) = (rows(&output.k), rows(&output.v));
    (args.k_out, args.v_out) = (output.k.ptr(), output.v.ptr());
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { QkvPlan::new(&problem)?.launch(queue.driver(), &args, queue.stream()) }
}

/// [`prepare_qkv`] with keys and values written to a cache as [`kv_append`] does it, in the same pass. A new row without room,
/// or on a page that does not exist, is not written.
///
/// # Errors
/// As [`prepare_qkv`] and [`kv_append`].
pub fn prepare_qkv_append<T: Element>(
    queue: &mut Queue<'_>,
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    rows: &KvRows<'_>,
    q: DeviceViewMut<'_, T, 3>,
    cache: KvCacheMut<'_, T>,
) -> Result<()> {
    queue.check_homes(&input.homes())?;
    queue.check_homes(&[rows.cu_seqlens.and_then(|view| view.home()), rows.kv_lens.home(), q.home()])?;
    queue.check_homes(&cache.homes())?;
    let n = input.check(spec)?;
    q.check("out.q", [n, spec.num_heads, spec.head_dim])?;
    let (mut problem, mut args) = entered(spec, input, n, &q);
    let num_seqs = rows.enter(&mut args)?;
    let sizes = [num_seqs, spec.num_kv_heads, spec.head_dim, spec.value_dim];
    cache.enter(sizes, rows.cu_seqlens.is_some(), &mut problem, &mut args)?;
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { QkvPlan::new(&problem)?.launch(queue.driver(), &args, queue.stream()) }
}

/// Problem and arguments with all inputs and the prepared queries.
fn entered<T: Element>(
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    num_tokens: usize,
    q_out: &DeviceViewMut<'_, T, 3>,
) -> (QkvProblem, QkvArgs) {
    let num_positions = input.rope.map_or(0, |table| table.cos.shape()[0]);
    let mut problem = QkvProblem::new(spec.clone(), T::DTYPE, num_tokens, num_positions);
    (problem.q_strides, problem.q_out_strides) = (leading(&input.q), leading(&q_out.as_view()));
    (problem.k_strides, problem.v_strides) = (leading(&input.k), leading(&input.v));
    let mut args = QkvArgs { q: input.q.ptr(), k: input.k.ptr(), v: input.v.ptr(), ..QkvArgs::default() };
    args.q_out = q_out.ptr();
    args.q_norm = input.q_norm.map_or(0, |weight| weight.ptr());
    args.k_norm = input.k_norm.map_or(0, |weight| weight.ptr());
    args.positions = input.positions.ptr();
    if let Some(table) = input.rope {
        (problem.cos_stride, problem.sin_stride) = (table.cos.strides()[0], table.sin.strides()[0]);
        (args.cos, args.sin) = (table.cos.ptr(), table.sin.ptr());
    }
    (problem, args)
}

/// Rotary position embedding: the first `rotary_dim` dimensions of every head turn, the others are copied.
///
/// Pair `n` of a head at `position`, with `c = cos[position, n]` and `s = sin[position, n]`: `(a, b) -> (a c - b s, b c + a s)`.
/// Where the pair lies is the [`RopeStyle`](crate::spec::RopeStyle).
///
/// * `x`, `out`: `[num_tokens, num_heads, head_dim]`; `positions`: `[num_tokens]`, one beyond the tables counts as the last
/// * `table`: cos and sin, each `[num_positions, rotary_dim / 2]` ([`Rope::table`])
///
/// # Errors
/// Those of [`Rope::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; those of [`QkvPlan::new`] and
/// [`QkvPlan::launch`]. Nothing is written then.
///
/// Su et al. 2021, arXiv:2104.09864.
pub fn rope<T: Element>(
    queue: &mut Queue<'_>,
    spec: &Rope,
    x: DeviceView<'_, T, 3>,
    positions: DeviceView<'_, u32, 1>,
    table: &RopeTable<'_>,
    out: DeviceViewMut<'_, T, 3>,
) -> Result<()> {
    queue.check_homes(&[x.home(), positions.home(), table.cos.home(), table.sin.home(), out.home()])?;
    let shape @ [num_tokens, num_heads, head_dim] = x.shape();
    spec.validate(head_dim)?;
    x.check("x", shape)?;
    table.check(spec, &positions, num_tokens)?;
    out.check("out", shape)?;
    if shape.contains(&0) {
        return Ok(());
    }
    let mut prep = QkvPrep::new(num_heads, 1, head_dim);
    prep.rope = Some(spec.clone());
    let mut problem = QkvProblem::new(prep, T::DTYPE, num_tokens, table.cos.shape()[0]);
    problem.arrays = QkvArrays::Query;
    (problem.q_strides, problem.q_out_strides) = (leading(&x), leading(&out.as_view()));
    (problem.cos_stride, problem.sin_stride) = (table.cos.strides()[0], table.sin.strides()[0]);
    let mut args = QkvArgs { q: x.ptr(), q_out: out.ptr(), positions: positions.ptr(), ..QkvArgs::default() };
    (args.cos, args.sin) = (table.cos.ptr(), table.sin.ptr());
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { QkvPlan::new(&problem)?.launch(queue.driver(), &args, queue.stream()) }
}

/// New rows of keys and values into a cache: row `i` of sequence `s` goes to row `kv_lens[s] + i` of its cache. A plain copy; all
/// other rows stay as they are. A new row without room, or on a page that does not exist, is not written; if two sequences name
/// the same row of the same page, either may win.
///
/// * `k`, `v`: `[num_tokens, num_kv_heads, width]`; a width may be 0: latent attention has no values of its own
/// * the cache: [`KvCacheMut`]
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; those of [`QkvPlan::new`] and [`QkvPlan::launch`]. Nothing is written
/// then.
pub fn kv_append<T: Element>(queue: &mut Queue<'_>, input: &KvCache<'_, T>, cache: KvCacheMut<'_, T>) -> Result<()> {
    let sums = input.cu_seqlens.and_then(|view| view.home());
    queue.check_homes(&[input.k.home(), input.v.home(), sums, input.kv_lens.home()])?;
    queue.check_homes(&cache.homes())?;
    let shape @ [n, heads, head_dim] = input.k.shape();
    let value_dim = input.v.shape()[2];
    input.k.check("k", shape)?;
    input.v.check("v", [n, heads, value_dim])?;
    let mut args = QkvArgs { k: input.k.ptr(), v: input.v.ptr(), ..QkvArgs::default() };
    let num_seqs = KvRows::new(input.cu_seqlens, input.kv_lens).enter(&mut args)?;
    // Widths of 0 are legal; there is nothing to copy on such a side.
    let mut prep = QkvPrep::new(1, heads.max(1), head_dim.max(1));
    prep.value_dim = value_dim.max(1);
    let mut problem = QkvProblem::new(prep, T::DTYPE, n, 0);
    problem.arrays = match (head_dim, value_dim) {
        (_, 0) => QkvArrays::Key,
        (0, _) => QkvArrays::Value,
        _ => QkvArrays::KeyValue,
    };
    (problem.k_strides, problem.v_strides) = (leading(&input.k), leading(&input.v));
    cache.enter([num_seqs, heads, head_dim, value_dim], input.cu_seqlens.is_some(), &mut problem, &mut args)?;
    if heads == 0 || head_dim == 0 && value_dim == 0 {
        return Ok(());
    }
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { QkvPlan::new(&problem)?.launch(queue.driver(), &args, queue.stream()) }
}
