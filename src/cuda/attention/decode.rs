//! Attention of few queries over many keys: keys are split at fixed rows, each split is attended on its own, and the parts
//! are merged in order. Where one split has room for all keys, its kernel writes the result, with the bits of the merge.

use super::AttentionArgs;
use super::problem::{Geometry, KvShape, attention_params};
use crate::cuda::driver::{Driver, Launch, Limits, Stream};
use crate::cuda::kernels::{Kernel, attention_decode, attention_decode_f32, attention_merge};
use crate::cuda::memory::Parts;
use crate::element::Dtype;
use crate::error::{Error, Result};

/// Queries of a sequence times heads of a group, up to which a call with several queries is a decode: four tiles of 16 rows,
/// which read the same keys.
const MAX_ROWS: u32 = 64;

/// Keys and values wider than this, the latent rows of MLA, are a decode whatever else the call is.
const MAX_PREFILL_COLS: u32 = 256;

/// Most splits: the y extent of a grid.
const MAX_SPLITS: u32 = 65535;

/// Most CTAs: the x extent of a grid.
const MAX_CTAS: u64 = i32::MAX as u64;

/// A kernel for the parts, and what a launch needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Part {
    kernel: &'static Kernel,
    /// Rows of a CTA.
    rows: u32,
    /// Keys of a split.
    split: u32,
    dynamic_shared_bytes: u32,
}

/// A call of the decode kernels. The result of a query depends on its own keys alone: splits stand at fixed rows of a sequence,
/// and those that it does not see change no bit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct DecodePlan {
    geometry: Geometry,
    /// Keys and values at multiples of 16 bytes; `None`: never, by strides or widths.
    aligned: Option<Part>,
    /// Any.
    unaligned: Part,
    /// For values that are the first columns of the keys, where widths and strides allow that.
    shared_kv: Option<Part>,
    num_splits: u32,
    /// `None`: one split is all.
    merge: Option<MergeStep>,
}

/// The second step: its kernel, and its CTAs along tokens and heads, and along columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct MergeStep {
    kernel: &'static Kernel,
    ctas: [u32; 2],
}

/// Bytes of a row of keys or queries of f32, as the kernel asks for it: an odd number of 16 bytes.
fn f32_k_row_bytes(head_dim: u32) -> u32 {
    16 * (head_dim.div_ceil(4) | 1)
}

impl DecodePlan {
    /// Whether a call is a decode: one query a sequence, or a few, or latent rows.
    pub fn serves(geometry: &Geometry) -> bool {
        geometry.max_q_len <= 1
            || u64::from(geometry.max_q_len) * u64::from(geometry.group_size()) <= u64::from(MAX_ROWS)
            || geometry.head_dim.max(geometry.value_dim) > MAX_PREFILL_COLS
    }

    /// # Errors
    /// [`Error::Unsupported`] for widths that no kernel has, or more shared memory than `limits` allow; [`Error::Value`] for more
    /// CTAs than a grid has.
    pub fn new(geometry: Geometry, limits: &Limits) -> Result<Self> {
        let (head_dim, value_dim) = (geometry.head_dim, geometry.value_dim);
        let unsupported = || {
            let Limits { shared_bytes, .. } = *limits;
            let what =
                format!("a decode of keys of width {head_dim} and values of width {value_dim} in {}", geometry.dtype);
            Error::unsupported("cuda", format!("{what} with {shared_bytes} bytes of shared memory"))
        };
        let fits = |part: &Part| part.dynamic_shared_bytes + part.kernel.static_shared_bytes <= limits.shared_bytes;
        let (mut aligned, mut shared_kv, unaligned);
        if geometry.dtype == Dtype::F32 {
            let instance = &attention_decode_f32::INSTANCES[0];
            let (rows, keys, split) = (instance.rows, instance.keys, instance.split);
            let scratch = rows * 4 * (keys + 32) + 16 * split;
            let bytes = u64::from(rows + keys) * u64::from(f32_k_row_bytes(head_dim.min(1 << 20)))
                + u64::from(keys * 16) * u64::from(value_dim.div_ceil(4))
                + u64::from(scratch);
            let dynamic_shared_bytes = u32::try_from(bytes).unwrap_or(u32::MAX / 2);
            let part = Part { kernel: &instance.kernel, rows, split, dynamic_shared_bytes };
            (aligned, shared_kv) = (None, None);
            unaligned = Some(part).filter(|part| value_dim <= instance.max_value_cols && fits(part));
        } else {
            // Rows of a CTA only as many as there are heads: queries of a call are never a reason to choose another kernel.
            let group_size = geometry.group_size();
            // The table goes from narrow to wide, and from few rows to many.
            let find = |is_aligned: bool, is_shared: bool| {
                let mut fitting = attention_decode::INSTANCES
                    .iter()
                    .filter(|i| i.dtype == geometry.dtype && i.aligned == is_aligned && i.shared_kv == is_shared)
                    .filter(|i| head_dim <= i.key_cols && value_dim <= i.value_cols)
                    .filter(|i| i.row_groups == 1 || group_size > 32)
                    .map(|i| Part {
                        kernel: &i.kernel,
                        rows: 16 * i.row_groups,
                        split: i.split,
                        dynamic_shared_bytes: i.shared_bytes,
                    })
                    .filter(fits);
                if is_shared { fitting.next_back() } else { fitting.next() }
            };
            aligned = find(true, false);
            shared_kv = find(true, true);
            unaligned = find(false, false);
            if !geometry.aligned() {
                (aligned, shared_kv) = (None, None);
            }
            let strides = if matches!(geometry.kv, KvShape::Ragged { .. }) { 1..3 } else { 0..3 };
            let same_rows = geometry.k_strides[strides.clone()] == geometry.v_strides[strides];
            let wide = head_dim.max(value_dim) > MAX_PREFILL_COLS;
            if !same_rows || value_dim > head_dim || !wide {
                shared_kv = None;
            }
        }
        let unaligned = unaligned.ok_or_else(unsupported)?;
        let dtype = geometry.dtype;
        let merge = attention_merge::INSTANCES.iter().find(|i| i.parts == Dtype::F32 && i.out == dtype);
        let merge = merge.ok_or_else(unsupported)?;
        let num_splits = geometry.max_kv_len.div_ceil(unaligned.split).max(1);
        if num_splits > MAX_SPLITS {
            let limit = u64::from(MAX_SPLITS) * u64::from(unaligned.split);
            return Err(Error::value("max_kv_len", format!("at most {limit}"), geometry.max_kv_len));
        }
        let rows = u64::from(geometry.num_tokens) * u64::from(geometry.num_heads);
        let ctas = [rows as u32, value_dim.div_ceil(merge.cols_per_cta)]; // at most 2^31 - 1 rows, seen below
        let merge = (num_splits > 1).then_some(MergeStep { kernel: &merge.kernel, ctas });
        let plan = DecodePlan { aligned, unaligned, shared_kv, num_splits, merge, geometry };
        if plan.parts().any(|part| plan.ctas(part) > MAX_CTAS) || rows > MAX_CTAS {
            let expected = format!("at most {MAX_CTAS} CTAs");
            return Err(Error::value("num_seqs * num_kv_heads * max_q_len", expected, plan.ctas(&unaligned)));
        }
        Ok(plan)
    }

    /// The kernels of the first step, one of which a launch takes.
    fn parts(&self) -> impl Iterator<Item = &Part> {
        [self.shared_kv.as_ref(), self.aligned.as_ref(), Some(&self.unaligned)].into_iter().flatten()
    }

    /// CTAs for the rows of one sequence and key/value head.
    fn row_blocks(&self, part: &Part) -> u32 {
        let rows = u64::from(self.geometry.max_q_len) * u64::from(self.geometry.group_size());
        u32::try_from(rows.div_ceil(u64::from(part.rows))).unwrap_or(u32::MAX)
    }

    /// CTAs of a split.
    fn ctas(&self, part: &Part) -> u64 {
        let heads = u64::from(self.geometry.num_seqs) * u64::from(self.geometry.num_kv_heads);
        heads.saturating_mul(u64::from(self.row_blocks(part)))
    }

    /// The kernel that runs if arrays are aligned and, where that is possible, values are the first columns of the keys; then the merge.
    pub fn kernels(&self) -> Vec<&'static str> {
        let merge = self.merge.map(|merge| merge.kernel.entry);
        self.parts().next().map(|part| part.kernel.entry).into_iter().chain(merge).collect()
    }

    /// Offsets of parts, largest scores and sums in the workspace, and its size; nothing without a merge.
    fn layout(&self) -> ([u64; 3], usize) {
        let splits = if self.merge.is_some() { self.num_splits as usize } else { 0 };
        let rows = splits * self.geometry.num_tokens as usize * self.geometry.num_heads as usize;
        let mut layout = Parts::default();
        let parts = layout.part(rows.saturating_mul(self.geometry.value_dim as usize), 4);
        let (maxes, sums) = (layout.part(rows, 4), layout.part(rows, 4));
        ([parts, maxes, sums].map(|offset| offset as u64), layout.bytes())
    }

    pub fn workspace_bytes(&self) -> usize {
        self.layout().1
    }

    /// # Errors
    /// As [`AttentionPlan::warmup`](super::AttentionPlan::warmup).
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        let merge = self.merge.map(|merge| merge.kernel);
        self.parts().map(|part| part.kernel).chain(merge).try_for_each(|kernel| driver.load(kernel))
    }

    /// # Errors
    /// As [`AttentionPlan::launch`](super::AttentionPlan::launch).
    ///
    /// # Safety
    /// As [`AttentionPlan::launch`](super::AttentionPlan::launch).
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &AttentionArgs, stream: Stream) -> Result<()> {
        let geometry = &self.geometry;
        if geometry.num_tokens == 0 || geometry.num_seqs == 0 || geometry.max_q_len == 0 {
            return Ok(());
        }
        geometry.check_args(args)?;
        let (offsets, bytes) = self.layout();
        if bytes > 0 && (args.workspace == 0 || !args.workspace.is_multiple_of(256)) {
            let expected = format!("{bytes} bytes of device memory, aligned to 256");
            return Err(Error::value("workspace", expected, format_args!("{:#x}", args.workspace)));
        }
        // Without a merge the kernels take a null pointer and write the result.
        let [parts_ptr, maxes_ptr, sums_ptr] =
            offsets.map(|offset| if self.merge.is_some() { args.workspace + offset } else { 0 });
        let out = if self.merge.is_some() { 0 } else { args.out };
        let is_aligned = [args.q, args.k, args.v, out].iter().all(|ptr| ptr.is_multiple_of(16));
        let part = match (&self.shared_kv, &self.aligned) {
            (Some(part), _) if is_aligned && args.k == args.v => part,
            (_, Some(part)) if is_aligned => part,
            _ => &self.unaligned,
        };
        let mut launch = Launch::grid([self.ctas(part) as u32, self.num_splits, 1]); // at most 2^31 - 1, seen by `new`
        launch.dynamic_shared_bytes = part.dynamic_shared_bytes;
        let (num_kv_heads, row_blocks) = (geometry.num_kv_heads, self.row_blocks(part));
        let params = if geometry.dtype == Dtype::F32 {
            let params = attention_params!(attention_decode_f32, geometry, args, {
                parts_ptr: parts_ptr,
                maxes_ptr: maxes_ptr,
                sums_ptr: sums_ptr,
                num_kv_heads: num_kv_heads,
                row_blocks: row_blocks,
                k_row_bytes: f32_k_row_bytes(geometry.head_dim),
                v_row_bytes: 16 * geometry.value_dim.div_ceil(4),
            });
            ParamBlock::F32(params.to_bytes())
        } else {
            let params = attention_params!(attention_decode, geometry, args, {
                parts_ptr: parts_ptr,
                maxes_ptr: maxes_ptr,
                sums_ptr: sums_ptr,
                num_kv_heads: num_kv_heads,
                row_blocks: row_blocks,
            });
            ParamBlock::Half(params.to_bytes())
        };
        // SAFETY: pointers are there, not null and aligned as the kernel requires, checked above; that they hold the arrays
        // that the plan describes, and the rest, is the caller's promise. The workspace has room for all splits.
        unsafe { driver.launch(part.kernel, &launch, params.bytes(), stream)? };
        let Some(merge) = self.merge else { return Ok(()) };
        let f32_bytes = |n: u32| u64::from(n) * 4;
        let (heads, value_dim) = (u64::from(geometry.num_heads), geometry.value_dim);
        let rows = u64::from(geometry.num_tokens) * heads;
        let lse_strides = geometry.lse_strides.unwrap_or_default();
        let params = attention_merge::Params {
            outs_ptr: parts_ptr,
            lses_ptr: maxes_ptr,
            sums_ptr,
            sinks_ptr: args.sinks.unwrap_or(0),
            out_ptr: args.out,
            lse_ptr: args.lse.unwrap_or(0),
            outs_part_stride_bytes: rows * f32_bytes(value_dim),
            outs_token_stride_bytes: heads * f32_bytes(value_dim),
            outs_head_stride_bytes: f32_bytes(value_dim),
            lses_part_stride_bytes: rows * 4,
            lses_token_stride_bytes: heads * 4,
            out_token_stride_bytes: geometry.out_strides[0],
            out_head_stride_bytes: geometry.out_strides[1],
            lse_token_stride_bytes: lse_strides[0],
            lse_head_stride_bytes: lse_strides[1],
            num_parts: self.num_splits,
            num_heads: geometry.num_heads,
            value_dim,
            split: part.split,
            cu_seqlens_q_ptr: args.cu_seqlens_q.unwrap_or(0),
            kv_lens_ptr: args.kv_lens.unwrap_or(0),
            num_seqs: geometry.num_seqs,
            num_tokens: geometry.num_tokens,
            num_kv_rows: geometry.num_kv_rows(),
            kv_layout: geometry.kv_layout()[0],
            max_q_len: geometry.max_q_len,
            max_kv_len: geometry.max_kv_len,
        };
        let launch = Launch::grid([merge.ctas[0], merge.ctas[1], 1]);
        // SAFETY: as above; the parts that the merge reads were written by the kernel before it on the stream: both take the same
        // queries and splits from the same lengths.
        unsafe { driver.launch(merge.kernel, &launch, &params.to_bytes(), stream) }
    }
}

/// Parameter blocks of the two kernels, without an allocation.
#[allow(clippy::large_enum_variant)]
enum ParamBlock<const N: usize, const M: usize> {
    Half([u8; N]),
    F32([u8; M]),
}

impl<const N: usize, const M: usize> ParamBlock<N, M> {
    fn bytes(&self) -> &[u8] {
        match self {
            ParamBlock::Half(bytes) => bytes,
            ParamBlock::F32(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::attention::AttentionProblem;
    use crate::spec::{Attention, Mla};

    /// Largest shared memory of a CTA, in KiB: RTX, A100, H100.
    const SHARED: [u32; 3] = [99, 163, 227];

    fn plan_of(problem: &AttentionProblem, shared_kib: u32) -> Result<DecodePlan> {
        DecodePlan::new(Geometry::new(problem)?, &Limits::new(90, 132, shared_kib << 10))
    }

    /// Decode of 4 sequences with a cache of 1000 rows.
    fn problem(dtype: Dtype, heads: (usize, usize), dims: (usize, usize)) -> AttentionProblem {
        let mut spec = Attention::causal(heads.0, heads.1, dims.0);
        spec.value_dim = dims.1;
        let mut problem = AttentionProblem::new(spec, dtype, 4, 4, KvShape::cache(1000));
        problem.max_q_len = 1;
        problem
    }

    #[test]
    fn kernels() {
        for shared in SHARED {
            let kernel = |problem: &AttentionProblem| plan_of(problem, shared).unwrap().kernels()[0];
            for (dims, name) in [
                ((64, 64), "gatefold_attention_decode_bf16_64_64"),
                ((80, 80), "gatefold_attention_decode_bf16_128_128"),
                ((128, 128), "gatefold_attention_decode_bf16_128_128"),
                ((192, 128), "gatefold_attention_decode_bf16_192_128"),
                ((256, 256), "gatefold_attention_decode_bf16_256_256"),
                ((64, 256), "gatefold_attention_decode_bf16_256_256"),
                ((33, 33), "gatefold_attention_decode_bf16_64_64_unaligned"),
                ((65, 33), "gatefold_attention_decode_bf16_256_256_unaligned"),
                ((576, 512), "gatefold_attention_decode_bf16_576_512"),
                ((575, 512), "gatefold_attention_decode_bf16_576_512_unaligned"),
            ] {
                assert_eq!(kernel(&problem(Dtype::BF16, (8, 2), dims)), name, "{dims:?}, {shared} KiB");
            }
            assert_eq!(kernel(&problem(Dtype::F32, (8, 2), (576, 512))), "gatefold_attention_decode_f32_f32");
        }
    }

    /// Values that are columns of the keys: one tile for both, more rows in a CTA where there is room.
    #[test]
    fn shared_rows() {
        let kernel = |heads: usize, shared| {
            let mla = Mla::new(heads, 512, 128, 64, 128);
            let spec = mla.absorbed(&mla.expanded());
            let mut problem = AttentionProblem::new(spec, Dtype::F16, 4, 4, KvShape::paged(100, 64, 20));
            problem.max_q_len = 1;
            problem.v_strides = problem.k_strides;
            plan_of(&problem, shared).unwrap().kernels()[0]
        };
        for shared in SHARED {
            assert_eq!(kernel(16, shared), "gatefold_attention_decode_f16_576_512_shared_16", "{shared} KiB");
        }
        assert_eq!(kernel(128, 99), "gatefold_attention_decode_f16_576_512_shared_16");
        assert_eq!(kernel(128, 163), "gatefold_attention_decode_f16_576_512_shared_64");
        assert_eq!(kernel(128, 227), "gatefold_attention_decode_f16_576_512_shared_64");
    }

    /// The workspace has a row per split, token and head; the grid a CTA per sequence, key/value head and 16 rows.
    #[test]
    fn sizes() {
        let plan = plan_of(&problem(Dtype::BF16, (8, 2), (128, 128)), 99).unwrap();
        assert_eq!(plan.num_splits, 4);
        assert_eq!(plan.workspace_bytes(), 4 * 4 * 8 * (128 + 2) * 4);
        assert_eq!(plan.ctas(&plan.unaligned), 8);
        let mut appended = problem(Dtype::BF16, (8, 2), (128, 128));
        appended.max_q_len = 16;
        appended.num_tokens = 64;
        let plan = plan_of(&appended, 99).unwrap();
        assert_eq!(plan.ctas(&plan.unaligned), 8 * 4);
        // One split is all: neither workspace nor merge.
        for max_kv_len in [0, 1, 256] {
            let problem = AttentionProblem { max_kv_len, ..problem(Dtype::BF16, (8, 2), (128, 128)) };
            let plan = plan_of(&problem, 99).unwrap();
            assert_eq!((plan.workspace_bytes(), plan.kernels().len()), (0, 1), "{max_kv_len}");
        }
    }

    #[test]
    fn bad_sizes() {
        let message = |problem: &AttentionProblem, shared| plan_of(problem, shared).unwrap_err().to_string();
        assert_eq!(
            message(&problem(Dtype::BF16, (8, 2), (584, 512)), 227),
            "unsupported by cuda: a decode of keys of width 584 and values of width 512 in bf16 with 232448 bytes of \
             shared memory"
        );
        assert_eq!(
            message(&problem(Dtype::F32, (8, 2), (64, 520)), 99),
            "unsupported by cuda: a decode of keys of width 64 and values of width 520 in f32 with 101376 bytes of \
             shared memory"
        );
        let mut long = problem(Dtype::BF16, (8, 2), (64, 64));
        long.kv = KvShape::cache(20_000_000);
        long.max_kv_len = 20_000_000;
        assert_eq!(message(&long, 99), "`max_kv_len` is 20000000, expected at most 16776960");
    }
}
