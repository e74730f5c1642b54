//! Softmax attention on the GPU: one plan for prompts and appended tokens, one for decoding.

mod decode;
mod merge;
mod prefill;
mod problem;

pub use merge::{Merge, MergeArgs, MergePlan, merge};
pub use problem::{AttentionProblem, KvShape};

use crate::cuda::driver::{Driver, Limits, Stream};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Home, Queue};
use crate::element::Element;
use crate::error::{Error, Result, check_len, check_presence, why};
use crate::spec::Attention;
use decode::DecodePlan;
use prefill::PrefillPlan;
use problem::Geometry;

/// Device pointers of one call; what the problem does not have is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttentionArgs {
    /// Read.
    pub q: u64,
    /// Read; not looked at if no sequence can have a key.
    pub k: u64,
    /// Read; not looked at if no sequence can have a key.
    pub v: u64,
    /// Written.
    pub out: u64,
    /// f32, written.
    pub lse: Option<u64>,
    /// u32 `[num_seqs + 1]`; `None`: one sequence.
    pub cu_seqlens_q: Option<u64>,
    /// Ragged rows: `cu_seqlens_kv`, u32 `[num_seqs + 1]`, `None`: one sequence. Otherwise `kv_lens`, u32 `[num_seqs]`.
    pub kv_lens: Option<u64>,
    /// u32 `[num_seqs, max_pages]`.
    pub block_table: Option<u64>,
    /// u32 `[num_seqs]`.
    pub kv_begin: Option<u64>,
    /// i64 `[num_seqs]`.
    pub q_start: Option<u64>,
    /// i64 `[num_seqs]`.
    pub k_start: Option<u64>,
    /// u8.
    pub mask: Option<u64>,
    /// f32.
    pub bias: Option<u64>,
    /// f32 `[num_heads]`.
    pub alibi_slopes: Option<u64>,
    /// f32.
    pub alibi_positions: Option<u64>,
    /// f32 `[num_buckets, num_heads]`.
    pub relative_bias: Option<u64>,
    /// f32 `[num_heads]`.
    pub sinks: Option<u64>,
    /// Memory of the plan's `workspace_bytes`, aligned to 256; 0 if it needs none.
    pub workspace: u64,
}

impl AttentionArgs {
    /// The arrays that every call has.
    pub fn new(q: u64, k: u64, v: u64, out: u64) -> Self {
        AttentionArgs { q, k, v, out, ..AttentionArgs::default() }
    }
}

/// [`AttentionProblem`] with its kernels and grids. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttentionPlan {
    kind: Kind,
}

/// The two entry points: a query's bits are the same in every call of one of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Decode(DecodePlan),
    Prefill(PrefillPlan),
}

impl AttentionPlan {
    /// Checks the shapes and chooses the kernels.
    ///
    /// # Errors
    /// Those of [`Attention::validate`]; [`Error::Dtype`]; [`Error::Value`] for a size that the kernels cannot count or a number that
    /// f32 does not have; [`Error::Stride`] for strides that leave the address space, let rows of an output overlap, or are not
    /// aligned as the kernels need them; [`Error::Presence`]; [`Error::Unsupported`] naming the case.
    pub fn new(problem: &AttentionProblem, limits: &Limits) -> Result<Self> {
        let geometry = Geometry::new(problem)?;
        let kind = if DecodePlan::serves(&geometry) {
            Kind::Decode(DecodePlan::new(geometry, limits)?)
        } else {
            Kind::Prefill(PrefillPlan::new(geometry, limits)?)
        };
        Ok(AttentionPlan { kind })
    }

    /// Names of the kernels that run, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        match &self.kind {
            Kind::Decode(plan) => plan.kernels(),
            Kind::Prefill(plan) => vec![plan.kernel()],
        }
    }

    /// Device memory that [`AttentionPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        match &self.kind {
            Kind::Decode(plan) => plan.workspace_bytes(),
            Kind::Prefill(_) => 0,
        }
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        match &self.kind {
            Kind::Decode(plan) => plan.warmup(driver),
            Kind::Prefill(plan) => plan.warmup(driver),
        }
    }

    /// Queues the work on a stream. Does not wait; after [`AttentionPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned; [`Error::Presence`] if an array is missing or unexpected;
    /// [`Error::Overlap`] if `out` or `lse` is an input; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the shapes and strides of the problem, valid until the work has
    /// ended; no other work writes the inputs or touches the outputs meanwhile. `stream` is of that device. What lengths, prefix
    /// sums and pages say is no part of the promise: the kernels cut it off. Tokens of no sequence, and those beyond the bound of
    /// the queries, are left as they are; a token that several sequences have gets some result.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &AttentionArgs, stream: Stream) -> Result<()> {
        match &self.kind {
            // SAFETY: the caller's promise.
            Kind::Decode(plan) => unsafe { plan.launch(driver, args, stream) },
            // SAFETY: the caller's promise.
            Kind::Prefill(plan) => unsafe { plan.launch(driver, args, stream) },
        }
    }
}

/// Keys and values on the device; otherwise as [`args::Kv`](crate::args::Kv).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Kv<'a, T> {
    /// The rows of all sequences one behind the other.
    #[non_exhaustive]
    Ragged {
        /// Keys, `[num_kv_tokens, num_kv_heads, head_dim]`.
        k: DeviceView<'a, T, 3>,
        /// Values, the same with `value_dim`.
        v: DeviceView<'a, T, 3>,
        /// `[num_seqs + 1]`; `None`: one sequence.
        cu_seqlens_kv: Option<DeviceView<'a, u32, 1>>,
    },
    /// A cache with the same room for every sequence.
    #[non_exhaustive]
    Cache {
        /// Keys, `[num_seqs, capacity, num_kv_heads, head_dim]`.
        k: DeviceView<'a, T, 4>,
        /// Values, the same with `value_dim`.
        v: DeviceView<'a, T, 4>,
        /// `[num_seqs]`: filled rows.
        kv_lens: DeviceView<'a, u32, 1>,
    },
    /// A cache in pages.
    #[non_exhaustive]
    Paged {
        /// Keys, `[num_pages, page_size, num_kv_heads, head_dim]`.
        k: DeviceView<'a, T, 4>,
        /// Values, the same with `value_dim`.
        v: DeviceView<'a, T, 4>,
        /// `[num_seqs, max_pages]`.
        block_table: DeviceView<'a, u32, 2>,
        /// `[num_seqs]`: filled rows.
        kv_lens: DeviceView<'a, u32, 1>,
    },
}

impl<'a, T> Kv<'a, T> {
    /// One sequence, or several with `cu_seqlens_kv`.
    pub const fn ragged(
        k: DeviceView<'a, T, 3>,
        v: DeviceView<'a, T, 3>,
        cu_seqlens_kv: Option<DeviceView<'a, u32, 1>>,
    ) -> Self {
        Kv::Ragged { k, v, cu_seqlens_kv }
    }

    /// A cache with the same room for every sequence.
    pub const fn cache(k: DeviceView<'a, T, 4>, v: DeviceView<'a, T, 4>, kv_lens: DeviceView<'a, u32, 1>) -> Self {
        Kv::Cache { k, v, kv_lens }
    }

    /// A cache in pages.
    pub const fn paged(
        k: DeviceView<'a, T, 4>,
        v: DeviceView<'a, T, 4>,
        block_table: DeviceView<'a, u32, 2>,
        kv_lens: DeviceView<'a, u32, 1>,
    ) -> Self {
        Kv::Paged { k, v, block_table, kv_lens }
    }

    /// Shape for a plan; strides of blocks, rows and heads; pointers.
    fn check(&self, spec: &Attention, num_seqs: usize) -> Result<(KvShape, [[usize; 3]; 2], [u64; 2])> {
        let heads = spec.num_kv_heads;
        let check4 = |k: &DeviceView<'a, T, 4>, v: &DeviceView<'a, T, 4>, blocks: usize| {
            let rows = k.shape()[1];
            k.check("k", [blocks, rows, heads, spec.head_dim])?;
            v.check("v", [blocks, rows, heads, spec.value_dim])?;
            let ([kb, kr, kh, _], [vb, vr, vh, _]) = (k.strides(), v.strides());
            Ok(([[kb, kr, kh], [vb, vr, vh]], [k.ptr(), v.ptr()]))
        };
        match self {
            Kv::Ragged { k, v, cu_seqlens_kv } => {
                let num_rows = k.shape()[0];
                k.check("k", [num_rows, heads, spec.head_dim])?;
                v.check("v", [num_rows, heads, spec.value_dim])?;
                match cu_seqlens_kv {
                    Some(sums) => sums.check("cu_seqlens_kv", [num_seqs + 1])?,
                    None if num_seqs == 1 => {}
                    None => return Err(Error::missing("cu_seqlens_kv", "there is more than one sequence of queries")),
                }
                let ([kr, kh, _], [vr, vh, _]) = (k.strides(), v.strides());
                Ok((KvShape::ragged(num_rows), [[0, kr, kh], [0, vr, vh]], [k.ptr(), v.ptr()]))
            }
            Kv::Cache { k, v, kv_lens } => {
                kv_lens.check("kv_lens", [num_seqs])?;
                let (strides, pointers) = check4(k, v, num_seqs)?;
                Ok((KvShape::cache(k.shape()[1]), strides, pointers))
            }
            Kv::Paged { k, v, block_table, kv_lens } => {
                kv_lens.check("kv_lens", [num_seqs])?;
                let (strides, pointers) = check4(k, v, k.shape()[0])?;
                let [_, max_pages] = block_table.shape();
                block_table.check("block_table", [num_seqs, max_pages])?;
                let [num_pages, page_size, _, _] = k.shape();
                let block_table_stride = block_table.strides()[0];
                let shape = KvShape::Paged { num_pages, page_size, max_pages, block_table_stride };
                Ok((shape, strides, pointers))
            }
        }
    }
}

/// Queries, keys, values, and all that comes with them, on the device; otherwise as
/// [`args::AttentionInput`](crate::args::AttentionInput). Lengths are never read by the host: the kernels cut off what is out of
/// range.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttentionInput<'a, T> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: DeviceView<'a, T, 3>,
    /// Keys and values.
    pub kv: Kv<'a, T>,
    /// `[num_seqs + 1]`; `None`: one sequence.
    pub cu_seqlens_q: Option<DeviceView<'a, u32, 1>>,
    /// Bound of the query rows of a sequence; `None`: `num_tokens`. A small one lets a call take the kernels for decoding.
    pub max_q_len: Option<usize>,
    /// Bound of the keys of a sequence; `None`: what there is room for.
    pub max_kv_len: Option<usize>,
    /// `[num_seqs]`: keys before this row of a sequence are padding. `None`: 0.
    pub kv_begin: Option<DeviceView<'a, u32, 1>>,
    /// `[num_seqs]`: absolute position of the first query. `None`: `k_start + kv_len - q_len`.
    pub q_start: Option<DeviceView<'a, i64, 1>>,
    /// `[num_seqs]`: absolute position of key row 0. `None`: 0.
    pub k_start: Option<DeviceView<'a, i64, 1>>,
    /// `[num_seqs or 1, num_heads or 1, q or 1, kv or 1]`: 0 hides the key. Bounds the lengths by its shape.
    pub mask: Option<DeviceView<'a, u8, 4>>,
    /// `[num_seqs or 1, num_heads or 1, q or 1, kv or 1]`, added to the scores; -inf hides the key. Bounds the lengths by
    /// its shape.
    pub bias: Option<DeviceView<'a, f32, 4>>,
    /// `[num_heads]`
    pub alibi_slopes: Option<DeviceView<'a, f32, 1>>,
    /// `[num_seqs or 1, kv]`. Bounds the lengths by its shape.
    pub alibi_positions: Option<DeviceView<'a, f32, 2>>,
    /// `[num_buckets, num_heads]`
    pub relative_bias: Option<DeviceView<'a, f32, 2>>,
    /// `[num_heads]`
    pub sinks: Option<DeviceView<'a, f32, 1>>,
}

/// What attention writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct AttentionOutput<'a, T> {
    /// `[num_tokens, num_heads, value_dim]`
    pub out: DeviceViewMut<'a, T, 3>,
    /// `[num_tokens, num_heads]`: natural logarithm of the sum of the exponentials of the scores, sink included.
    pub lse: Option<DeviceViewMut<'a, f32, 2>>,
}

impl<'a, T> AttentionOutput<'a, T> {
    /// Without `lse`.
    pub const fn new(out: DeviceViewMut<'a, T, 3>) -> Self {
        AttentionOutput { out, lse: None }
    }

    /// With `lse`.
    pub const fn with_lse(out: DeviceViewMut<'a, T, 3>, lse: DeviceViewMut<'a, f32, 2>) -> Self {
        AttentionOutput { out, lse: Some(lse) }
    }
}

impl<'a, T: Element> AttentionInput<'a, T> {
    /// One sequence (with [`Kv::Ragged`]) and nothing optional.
    pub const fn new(q: DeviceView<'a, T, 3>, kv: Kv<'a, T>) -> Self {
        AttentionInput {
            q,
            kv,
            cu_seqlens_q: None,
            max_q_len: None,
            max_kv_len: None,
            kv_begin: None,
            q_start: None,
            k_start: None,
            mask: None,
            bias: None,
            alibi_slopes: None,
            alibi_positions: None,
            relative_bias: None,
            sinks: None,
        }
    }

    /// Validates the specification and every argument; the problem and its pointers.
    ///
    /// # Errors
    /// Those of [`Attention::validate`]; [`Error::Shape`], [`Error::Stride`] and [`Error::Len`] for an array that does not
    /// fit; [`Error::Presence`] where specification and arguments disagree; [`Error::Overlap`].
    pub fn check(
        &self,
        spec: &Attention,
        output: &AttentionOutput<'_, T>,
    ) -> Result<(AttentionProblem, AttentionArgs)> {
        spec.validate()?;
        let num_tokens = self.q.shape()[0];
        self.q.check("q", [num_tokens, spec.num_heads, spec.head_dim])?;
        let num_seqs = match &self.cu_seqlens_q {
            None => 1,
            Some(sums) => sums.shape()[0]
                .checked_sub(1)
                .ok_or_else(|| Error::value("cu_seqlens_q", "at least 1 prefix sum", 0))?,
        };
        if let Some(sums) = &self.cu_seqlens_q {
            sums.check("cu_seqlens_q", [num_seqs + 1])?;
        }
        let (kv, [k_strides, v_strides], [k, v]) = self.kv.check(spec, num_seqs)?;
        let mut problem = AttentionProblem::new(spec.clone(), T::DTYPE, num_seqs, num_tokens, kv);
        let [token, head, _] = self.q.strides();
        problem.q_strides = [token, head];
        (problem.k_strides, problem.v_strides) = (k_strides, v_strides);
        problem.max_q_len = self.max_q_len.unwrap_or(num_tokens).min(num_tokens);
        problem.max_kv_len = self.max_kv_len.unwrap_or(usize::MAX).min(kv.max_len());
        let mut args = AttentionArgs::new(self.q.ptr(), k, v, output.out.ptr());
        args.cu_seqlens_q = self.cu_seqlens_q.map(|sums| sums.ptr());
        (args.kv_lens, args.block_table) = match &self.kv {
            Kv::Ragged { cu_seqlens_kv, .. } => (cu_seqlens_kv.map(|sums| sums.ptr()), None),
            Kv::Cache { kv_lens, .. } => (Some(kv_lens.ptr()), None),
            Kv::Paged { kv_lens, block_table, .. } => (Some(kv_lens.ptr()), Some(block_table.ptr())),
        };
        let per_seq = |name, len: Option<usize>| len.map_or(Ok(()), |len| check_len(name, len, num_seqs));
        per_seq("kv_begin", self.kv_begin.map(|x| x.shape()[0]))?;
        per_seq("q_start", self.q_start.map(|x| x.shape()[0]))?;
        per_seq("k_start", self.k_start.map(|x| x.shape()[0]))?;
        self.kv_begin.map_or(Ok(()), |x| x.check("kv_begin", [num_seqs]))?;
        self.q_start.map_or(Ok(()), |x| x.check("q_start", [num_seqs]))?;
        self.k_start.map_or(Ok(()), |x| x.check("k_start", [num_seqs]))?;
        args.kv_begin = self.kv_begin.map(|x| x.ptr());
        args.q_start = self.q_start.map(|x| x.ptr());
        args.k_start = self.k_start.map(|x| x.ptr());
        // The shapes of mask and bias bound the lengths, so that the kernels stay inside.
        for shape in [self.mask.map(|x| x.shape()), self.bias.map(|x| x.shape())].into_iter().flatten() {
            for (bound, n) in [(&mut problem.max_q_len, shape[2]), (&mut problem.max_kv_len, shape[3])] {
                *bound = if n == 1 { *bound } else { n.min(*bound) };
            }
        }
        if let Some(positions) = &self.alibi_positions {
            problem.max_kv_len = problem.max_kv_len.min(positions.shape()[1]);
        }
        let scores = |shape: [usize; 4]| [num_seqs, spec.num_heads, shape[2], shape[3]];
        if let Some(mask) = &self.mask {
            mask.check_broadcast("mask", scores(mask.shape()))?;
            (problem.mask_strides, args.mask) = (Some(mask.broadcast_strides()), Some(mask.ptr()));
        }
        if let Some(bias) = &self.bias {
            bias.check_broadcast("bias", scores(bias.shape()))?;
            (problem.bias_strides, args.bias) = (Some(bias.broadcast_strides()), Some(bias.ptr()));
        }
        if let Some(slopes) = check_presence("alibi_slopes", self.alibi_slopes, spec.alibi, why::ALIBI)? {
            slopes.check("alibi_slopes", [spec.num_heads])?;
        }
        args.alibi_slopes = self.alibi_slopes.map(|x| x.ptr());
        if let Some(positions) = &self.alibi_positions {
            if !spec.alibi {
                return Err(Error::unexpected("alibi_positions", "the specification has no ALiBi"));
            }
            let [seqs, keys] = positions.shape();
            positions.check("alibi_positions", [if seqs == 1 { 1 } else { num_seqs }, keys])?;
            problem.alibi_positions_stride = Some(if seqs == 1 { 0 } else { positions.strides()[0] });
            args.alibi_positions = Some(positions.ptr());
        }
        let has_table = spec.relative_bias.is_some();
        let table = check_presence("relative_bias", self.relative_bias, has_table, why::RELATIVE_BIAS)?;
        if let (Some(table), Some(bias)) = (table, &spec.relative_bias) {
            table.check("relative_bias", [bias.num_buckets, spec.num_heads])?;
            (problem.relative_bias_stride, args.relative_bias) = (table.strides()[0], Some(table.ptr()));
        }
        if let Some(sinks) = check_presence("sinks", self.sinks, spec.sinks, why::SINKS)? {
            sinks.check("sinks", [spec.num_heads])?;
        }
        args.sinks = self.sinks.map(|x| x.ptr());
        output.out.check("out", [num_tokens, spec.num_heads, spec.value_dim])?;
        let [token, head, _] = output.out.strides();
        problem.out_strides = [token, head];
        if let Some(lse) = &output.lse {
            lse.check("lse", [num_tokens, spec.num_heads])?;
            (problem.lse_strides, args.lse) = (Some(lse.strides()), Some(lse.ptr()));
        }
        self.check_separate(output)?;
        Ok((problem, args))
    }

    /// Where its arrays may be used.
    fn homes(&self) -> [Home; 15] {
        let (k, v, lens, table) = match &self.kv {
            Kv::Ragged { k, v, cu_seqlens_kv } => (k.home(), v.home(), cu_seqlens_kv.and_then(|x| x.home()), None),
            Kv::Cache { k, v, kv_lens } => (k.home(), v.home(), kv_lens.home(), None),
            Kv::Paged { k, v, block_table, kv_lens } => (k.home(), v.home(), kv_lens.home(), block_table.home()),
        };
        [
            self.q.home(),
            k,
            v,
            lens,
            table,
            self.cu_seqlens_q.and_then(|x| x.home()),
            self.kv_begin.and_then(|x| x.home()),
            self.q_start.and_then(|x| x.home()),
            self.k_start.and_then(|x| x.home()),
            self.mask.and_then(|x| x.home()),
            self.bias.and_then(|x| x.home()),
            self.alibi_slopes.and_then(|x| x.home()),
            self.alibi_positions.and_then(|x| x.home()),
            self.relative_bias.and_then(|x| x.home()),
            self.sinks.and_then(|x| x.home()),
        ]
    }

    /// Outputs share no memory with inputs, nor with each other.
    fn check_separate(&self, output: &AttentionOutput<'_, T>) -> Result<()> {
        let overlap =
            |argument: &str, other: &str| Err(Error::Overlap { argument: argument.into(), other: other.into() });
        let kv = |meets: &dyn Fn(DeviceView<'_, T, 4>) -> bool| match &self.kv {
            Kv::Ragged { k, v, .. } => [as_blocks(k), as_blocks(v)].map(meets),
            Kv::Cache { k, v, .. } | Kv::Paged { k, v, .. } => [*k, *v].map(meets),
        };
        let out = output.out.as_view();
        if out.meets(&self.q) {
            return overlap("out", "q");
        }
        let lse = output.lse.as_ref().map(|lse| lse.as_view());
        if lse.is_some_and(|lse| lse.meets(&self.q)) {
            return overlap("lse", "q");
        }
        if lse.is_some_and(|lse| lse.meets(&out)) {
            return overlap("lse", "out");
        }
        for (name, meets) in [("out", kv(&|x| out.meets(&x))), ("lse", kv(&|x| lse.is_some_and(|lse| lse.meets(&x))))] {
            for (other, meets) in ["k", "v"].into_iter().zip(meets) {
                if meets {
                    return overlap(name, other);
                }
            }
        }
        Ok(())
    }
}

/// Ragged rows as one block.
fn as_blocks<'a, T>(rows: &DeviceView<'a, T, 3>) -> DeviceView<'a, T, 4> {
    let ([n, heads, width], [row, head, one]) = (rows.shape(), rows.strides());
    rows.with_strides([1, n, heads, width], [0, row, head, one])
}

/// Scaled dot-product attention with grouped key/value heads: [`reference::attention`](crate::reference::attention) on the device.
///
/// Calls of few queries per sequence (bounded by [`AttentionInput::max_q_len`]) take the kernels for decoding, others those for
/// prompts; within each of the two a query's bits depend on nothing else in the call. Bounds of the lengths size the grid and, for
/// decoding, the workspace: give tight ones. Where the bound of the keys is a split (256 keys, 512 of MLA's latent rows), a decode is one
/// kernel without workspace. Tokens of no sequence, and those beyond the bound of the queries, are left as they are.
///
/// # Numerics
/// f32 is f32 throughout, with an exponential of 1 ulp. In bf16 and f16 the exponential is that of the hardware (2 ulp of f32), which
/// shows in a decode's `lse` near 0: its error may be 2.5e-7. A prompt sums exponentials of 0.7 ulp for `lse`, besides those for `out`:
/// asking for it costs time, and changes no bit of `out`. Weights are rounded to the type of the values.
///
/// Keys that no query of the sequence sees, whether position, length, explicit mask or a bias of -inf hides them, add nothing: a NaN or
/// an infinity in them stays there. One in the value of a key that some query sees may reach other queries of that sequence.
///
/// # Errors
/// Those of [`AttentionInput::check`] and [`AttentionPlan::new`]; [`Error::Driver`]. Nothing is written then.
pub fn attention<T: Element>(
    queue: &mut Queue<'_>,
    spec: &Attention,
    input: &AttentionInput<'_, T>,
    output: AttentionOutput<'_, T>,
) -> Result<()> {
    let (problem, mut args) = input.check(spec, &output)?;
    queue.check_homes(&input.homes())?;
    queue.check_homes(&[output.out.home(), output.lse.as_ref().and_then(DeviceViewMut::home)])?;
    let plan = AttentionPlan::new(&problem, &queue.driver().limits())?;
    args.workspace = queue.workspace(plan.workspace_bytes())?;
    // SAFETY: the views are memory of the queue's device with the shapes and strides that the problem has, checked above, and
    // are borrowed until the call returns, which the queue's stream orders before whatever their owner does next.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}
