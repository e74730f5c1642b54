//! A call of attention in the kernels' terms: sizes, strides in bytes, and the checks that all kernels share.

use crate::cuda::attention::AttentionArgs;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::Attention;

/// Where keys and values lie, and how many there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvShape {
    /// Rows of all sequences one behind the other.
    #[non_exhaustive]
    Ragged {
        /// Rows of `k` and `v`.
        num_rows: usize,
    },
    /// A cache with the same room for every sequence.
    #[non_exhaustive]
    Cache {
        /// Rows of a sequence.
        capacity: usize,
    },
    /// A cache in pages.
    #[non_exhaustive]
    Paged {
        /// Pages of `k` and `v`.
        num_pages: usize,
        /// Rows of a page.
        page_size: usize,
        /// Columns of the block table.
        max_pages: usize,
        /// Elements from one row of the block table to the next.
        block_table_stride: usize,
    },
}

impl KvShape {
    /// Rows of all sequences one behind the other.
    pub const fn ragged(num_rows: usize) -> Self {
        KvShape::Ragged { num_rows }
    }

    /// A cache with the same room for every sequence.
    pub const fn cache(capacity: usize) -> Self {
        KvShape::Cache { capacity }
    }

    /// A cache in pages, with a contiguous block table.
    pub const fn paged(num_pages: usize, page_size: usize, max_pages: usize) -> Self {
        KvShape::Paged { num_pages, page_size, max_pages, block_table_stride: max_pages }
    }

    /// Most keys that a sequence can have.
    pub const fn max_len(&self) -> usize {
        match *self {
            KvShape::Ragged { num_rows } => num_rows,
            KvShape::Cache { capacity } => capacity,
            KvShape::Paged { page_size, max_pages, .. } => page_size.saturating_mul(max_pages),
        }
    }
}

/// What to compute: [`Attention`] with sizes, strides in elements, and which optional arrays there are.
///
/// Lengths of sequences are on the device; the numbers here bound them. Sequences beyond a bound are cut off at it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionProblem {
    /// Heads, widths, mask and what is done to a score.
    pub spec: Attention,
    /// Element type of `q`, `k`, `v` and `out`: bf16, f16 or f32. All else is f32.
    pub dtype: Dtype,
    /// Sequences; 0 is legal.
    pub num_seqs: usize,
    /// Query rows over all sequences; 0 is legal.
    pub num_tokens: usize,
    /// Bound of the query rows of a sequence.
    pub max_q_len: usize,
    /// Bound of the keys of a sequence.
    pub max_kv_len: usize,
    /// Where keys and values lie.
    pub kv: KvShape,
    /// Elements between tokens and between heads of `q`.
    pub q_strides: [usize; 2],
    /// Elements between blocks (sequences of a cache, pages; unused for ragged rows), rows and heads of `k`.
    pub k_strides: [usize; 3],
    /// The same of `v`.
    pub v_strides: [usize; 3],
    /// Elements between tokens and between heads of `out`.
    pub out_strides: [usize; 2],
    /// Elements between tokens and between heads of `lse`; `None`: it is not wanted.
    pub lse_strides: Option<[usize; 2]>,
    /// Elements between sequences, heads, queries and keys of the explicit mask, 0 where one stands for all; `None`: none.
    pub mask_strides: Option<[usize; 4]>,
    /// The same of the additive bias.
    pub bias_strides: Option<[usize; 4]>,
    /// Elements between sequences of the ALiBi positions, 0 where one stands for all; `None`: none.
    pub alibi_positions_stride: Option<usize>,
    /// Elements between rows of the table of the relative bias, where the specification has one.
    pub relative_bias_stride: usize,
}

impl AttentionProblem {
    /// Contiguous arrays, without `lse` and without masks and biases besides those of the specification.
    pub fn new(spec: Attention, dtype: Dtype, num_seqs: usize, num_tokens: usize, kv: KvShape) -> Self {
        let (heads, kv_heads) = (spec.num_heads, spec.num_kv_heads);
        let rows = match kv {
            KvShape::Ragged { num_rows } => num_rows,
            KvShape::Cache { capacity } => capacity,
            KvShape::Paged { page_size, .. } => page_size,
        };
        let strides = |width: usize| {
            let row = kv_heads.saturating_mul(width);
            [rows.saturating_mul(row), row, width]
        };
        AttentionProblem {
            dtype,
            num_seqs,
            num_tokens,
            max_q_len: num_tokens,
            max_kv_len: kv.max_len(),
            kv,
            q_strides: [heads.saturating_mul(spec.head_dim), spec.head_dim],
            k_strides: strides(spec.head_dim),
            v_strides: strides(spec.value_dim),
            out_strides: [heads.saturating_mul(spec.value_dim), spec.value_dim],
            lse_strides: None,
            mask_strides: None,
            bias_strides: None,
            alibi_positions_stride: None,
            relative_bias_stride: heads,
            spec,
        }
    }
}

/// Bits of the kernels' parameter `features`: what is done to a score besides scale and visible range.
mod feature {
    pub const SOFTCAP: u32 = 1;
    pub const MASK: u32 = 2;
    pub const BIAS: u32 = 4;
    pub const ALIBI: u32 = 8;
    pub const ALIBI_POSITIONS: u32 = 16;
    pub const RELATIVE_BIAS: u32 = 32;
    pub const RELATIVE_BIDIRECTIONAL: u32 = 64;
}

/// A distance that no two positions have: positions lie within 2^48, lengths within 2^31.
const NO_LIMIT: u64 = 1 << 50;

/// Starts of the logarithmic buckets that fit the parameter block: enough for 64 buckets per direction, T5 has 16 or 32.
pub(super) const BUCKET_STARTS: usize = 31;

/// Sizes, lengths and numbers of rows are 32-bit in the kernels.
const MAX_LEN: usize = i32::MAX as usize;

/// An [`AttentionProblem`] that has been checked, with the values that every attention kernel takes. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Geometry {
    pub dtype: Dtype,
    pub num_seqs: u32,
    pub num_tokens: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub value_dim: u32,
    pub max_q_len: u32,
    pub max_kv_len: u32,
    pub kv: KvShape,
    // Numbers by their bits, so that plans are equal and hash.
    pub softmax_scale: u32,
    pub softcap: u32,
    pub sinks: bool,
    pub features: u32,
    pub window_left: u64,
    pub window_right: u64,
    pub chunk: u64,
    pub exact_buckets: u32,
    pub num_buckets: u32,
    pub bucket_starts: [u64; BUCKET_STARTS],
    pub q_strides: [u64; 2],
    pub k_strides: [u64; 3],
    pub v_strides: [u64; 3],
    pub out_strides: [u64; 2],
    pub lse_strides: Option<[u64; 2]>,
    pub mask_strides: [u64; 4],
    pub bias_strides: [u64; 4],
    pub alibi_positions_stride: u64,
    pub relative_bias_stride: u64,
}

impl Geometry {
    /// # Errors
    /// Those of [`Attention::validate`]; [`Error::Dtype`]; [`Error::Value`] for a size that the kernels cannot count or a number that
    /// f32 does not have; [`Error::Stride`] for strides that leave the address space or let rows of an output overlap;
    /// [`Error::Presence`]; [`Error::Unsupported`].
    pub fn new(problem: &AttentionProblem) -> Result<Self> {
        let spec = &problem.spec;
        spec.validate()?;
        let dtype = problem.dtype;
        if dtype == Dtype::F64 {
            let (expected, found) = ("bf16, f16 or f32".into(), dtype.to_string());
            return Err(Error::Dtype { argument: "q, k, v and out".into(), expected, found });
        }
        let size = |name: &str, size: usize, least: usize| match u32::try_from(size) {
            Ok(size) if size as usize >= least && size as usize <= MAX_LEN => Ok(size),
            _ => Err(Error::value(name, format!("{least} to {MAX_LEN}"), size)),
        };
        let number = |name: &str, value: f64| match value as f32 {
            single if single.is_finite() && single >= f32::MIN_POSITIVE => Ok(single.to_bits()),
            _ => Err(Error::value(name, "a positive number that is normal in f32", value)),
        };
        match problem.kv {
            KvShape::Ragged { num_rows } => drop(size("kv.num_rows", num_rows, 0)?),
            KvShape::Cache { capacity } => drop(size("kv.capacity", capacity, 0)?),
            KvShape::Paged { num_pages, page_size, max_pages, .. } => {
                size("kv.num_pages", num_pages, 0)?;
                size("kv.page_size", page_size, 1)?;
                size("kv.max_pages", max_pages, 0)?;
            }
        }
        let mut features = 0;
        let mut set = |bit: u32, on: bool| features |= if on { bit } else { 0 };
        set(feature::SOFTCAP, spec.softcap.is_some());
        set(feature::MASK, problem.mask_strides.is_some());
        set(feature::BIAS, problem.bias_strides.is_some());
        set(feature::ALIBI, spec.alibi);
        set(feature::ALIBI_POSITIONS, problem.alibi_positions_stride.is_some());
        set(feature::RELATIVE_BIAS, spec.relative_bias.is_some());
        set(feature::RELATIVE_BIDIRECTIONAL, spec.relative_bias.is_some_and(|bias| bias.bidirectional));
        if problem.alibi_positions_stride.is_some() && !spec.alibi {
            return Err(Error::unexpected("alibi_positions", "the specification has no ALiBi"));
        }
        let (mut exact_buckets, mut num_buckets, mut bucket_starts) = (0, 0, [u64::MAX; BUCKET_STARTS]);
        if let Some(bias) = &spec.relative_bias {
            let per_direction = if bias.bidirectional { bias.num_buckets / 2 } else { bias.num_buckets };
            if per_direction > 2 * (BUCKET_STARTS + 1) {
                let limit = 2 * (BUCKET_STARTS + 1);
                return Err(Error::unsupported(
                    "cuda",
                    format!("a relative bias of more than {limit} buckets per direction"),
                ));
            }
            (exact_buckets, num_buckets) = (per_direction as u32 / 2, per_direction as u32);
            // The logarithm is taken here, once, as the specification takes it; the kernels compare with whole numbers.
            for (i, start) in bucket_starts.iter_mut().enumerate().take(per_direction - 1 - per_direction / 2) {
                *start = first_distance(bias, per_direction / 2 + i + 1);
            }
        }
        let window = |window: Option<usize>| window.map_or(NO_LIMIT, |w| (w as u64).min(NO_LIMIT));
        let elem = dtype.size_bytes();
        let (heads, kv_heads) = (spec.num_heads, spec.num_kv_heads);
        let blocks = match problem.kv {
            KvShape::Ragged { num_rows } => [1, num_rows],
            KvShape::Cache { capacity } => [problem.num_seqs, capacity],
            KvShape::Paged { num_pages, page_size, .. } => [num_pages, page_size],
        };
        let kv_shape = [blocks[0], blocks[1], kv_heads];
        let scores = [problem.num_seqs, heads, problem.max_q_len, problem.max_kv_len];
        let tokens = [problem.num_tokens, heads];
        check_output("out", tokens, spec.value_dim, problem.out_strides)?;
        if let Some(strides) = problem.lse_strides {
            check_output("lse", tokens, 1, strides)?;
        }
        Ok(Geometry {
            dtype,
            num_seqs: size("num_seqs", problem.num_seqs, 0)?,
            num_tokens: size("num_tokens", problem.num_tokens, 0)?,
            num_heads: size("num_heads", heads, 1)?,
            num_kv_heads: size("num_kv_heads", kv_heads, 1)?,
            head_dim: size("head_dim", spec.head_dim, 1)?,
            value_dim: size("value_dim", spec.value_dim, 1)?,
            max_q_len: size("max_q_len", problem.max_q_len, 0)?.min(problem.num_tokens as u32),
            max_kv_len: problem.max_kv_len.min(problem.kv.max_len()).min(MAX_LEN) as u32,
            kv: problem.kv,
            softmax_scale: number("softmax_scale", spec.softmax_scale)?,
            softcap: spec.softcap.map_or(Ok(0), |cap| number("softcap", cap))?,
            sinks: spec.sinks,
            features,
            window_left: window(spec.mask.window_left),
            window_right: if spec.mask.causal { 0 } else { window(spec.mask.window_right) },
            chunk: spec.mask.chunk.map_or(0, |chunk| (chunk as u64).min(NO_LIMIT)),
            exact_buckets,
            num_buckets,
            bucket_starts,
            q_strides: bytes("q", elem, tokens, problem.q_strides)?,
            k_strides: bytes("k", elem, kv_shape, problem.k_strides)?,
            v_strides: bytes("v", elem, kv_shape, problem.v_strides)?,
            out_strides: bytes("out", elem, tokens, problem.out_strides)?,
            lse_strides: problem.lse_strides.map(|strides| bytes("lse", 4, tokens, strides)).transpose()?,
            mask_strides: bytes("mask", 1, scores, problem.mask_strides.unwrap_or_default())?,
            bias_strides: bytes("bias", 4, scores, problem.bias_strides.unwrap_or_default())?,
            alibi_positions_stride: bytes(
                "alibi_positions",
                4,
                [problem.num_seqs],
                [problem.alibi_positions_stride.unwrap_or_default()],
            )?[0],
            relative_bias_stride: bytes(
                "relative_bias",
                4,
                [spec.relative_bias.map_or(0, |bias| bias.num_buckets)],
                [problem.relative_bias_stride],
            )?[0],
        })
    }

    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> u32 {
        self.num_heads / self.num_kv_heads
    }

    /// Whether every head of `q`, `k`, `v` and `out` begins at a multiple of 16 bytes if the arrays do, and is a multiple
    /// of 16 bytes long.
    pub fn aligned(&self) -> bool {
        self.unaligned_argument().is_none()
    }

    /// The first array that is not [`Geometry::aligned`], with its strides in bytes.
    pub fn unaligned_argument(&self) -> Option<(&'static str, Vec<u64>)> {
        let elem = self.dtype.size_bytes() as u64;
        let widths = [("q", self.head_dim), ("out", self.value_dim)];
        let odd_width = widths.into_iter().find(|(_, width)| !(u64::from(*width) * elem).is_multiple_of(16));
        if let Some((name, width)) = odd_width {
            return Some((name, vec![u64::from(width) * elem]));
        }
        let k = if matches!(self.kv, KvShape::Ragged { .. }) { &self.k_strides[1..] } else { &self.k_strides[..] };
        let v = if matches!(self.kv, KvShape::Ragged { .. }) { &self.v_strides[1..] } else { &self.v_strides[..] };
        [("q", &self.q_strides[..]), ("k", k), ("v", v), ("out", &self.out_strides[..])]
            .into_iter()
            .find(|(_, strides)| strides.iter().any(|stride| !stride.is_multiple_of(16)))
            .map(|(name, strides)| (name, strides.to_vec()))
    }

    /// Rows that the kernels may address: those of all sequences, of a sequence of a cache, of a row of the block table.
    pub fn num_kv_rows(&self) -> u32 {
        self.kv.max_len().min(MAX_LEN) as u32
    }

    /// The kernels' parameter `kv_layout`, then `page_size` and `num_pages`.
    pub fn kv_layout(&self) -> [u32; 3] {
        match self.kv {
            KvShape::Ragged { .. } => [0, 1, 0],
            KvShape::Cache { .. } => [1, 1, 0],
            KvShape::Paged { num_pages, page_size, .. } => [2, page_size as u32, num_pages as u32],
        }
    }

    /// Bytes from one row of the block table to the next.
    pub fn block_table_stride(&self) -> u64 {
        match self.kv {
            KvShape::Paged { block_table_stride, .. } => block_table_stride as u64 * 4,
            _ => 0,
        }
    }

    /// The pointers are there where they must be, not null, and aligned to their elements; `out` and `lse` are not inputs.
    ///
    /// # Errors
    /// [`Error::Value`] for a pointer that is null or not aligned; [`Error::Presence`] for one that the plan does not have, or lacks;
    /// [`Error::Overlap`].
    pub fn check_args(&self, args: &AttentionArgs) -> Result<()> {
        let elem = self.dtype.size_bytes() as u64;
        for (name, ptr, size) in
            [("q", args.q, elem), ("k", args.k, elem), ("v", args.v, elem), ("out", args.out, elem)]
        {
            let unused = matches!(name, "k" | "v") && self.max_kv_len == 0;
            if !unused {
                check_pointer(name, ptr, size)?;
            }
        }
        let has = |bit: u32| self.features & bit != 0;
        let paged = matches!(self.kv, KvShape::Paged { .. });
        let ragged = matches!(self.kv, KvShape::Ragged { .. });
        // Name, pointer, element size, and whether it must be there (`None`: it may).
        for (name, ptr, size, wanted) in [
            ("lse", args.lse, 4, Some(self.lse_strides.is_some())),
            ("cu_seqlens_q", args.cu_seqlens_q, 4, (self.num_seqs != 1).then_some(true)),
            ("kv_lens", args.kv_lens, 4, (!ragged || self.num_seqs != 1).then_some(true)),
            ("block_table", args.block_table, 4, Some(paged)),
            ("kv_begin", args.kv_begin, 4, None),
            ("q_start", args.q_start, 8, None),
            ("k_start", args.k_start, 8, None),
            ("mask", args.mask, 1, Some(has(feature::MASK))),
            ("bias", args.bias, 4, Some(has(feature::BIAS))),
            ("alibi_slopes", args.alibi_slopes, 4, Some(has(feature::ALIBI))),
            ("alibi_positions", args.alibi_positions, 4, Some(has(feature::ALIBI_POSITIONS))),
            ("relative_bias", args.relative_bias, 4, Some(has(feature::RELATIVE_BIAS))),
            ("sinks", args.sinks, 4, Some(self.sinks)),
        ] {
            match (ptr, wanted) {
                (None, Some(true)) => return Err(Error::missing(name, "the plan asks for it")),
                (Some(_), Some(false)) => return Err(Error::unexpected(name, "the plan has none")),
                (Some(ptr), _) => check_pointer(name, ptr, size)?,
                (None, _) => {}
            }
        }
        for (name, input) in [("q", args.q), ("k", args.k), ("v", args.v)] {
            for (output, ptr) in [("out", Some(args.out)), ("lse", args.lse)] {
                if ptr == Some(input) {
                    return Err(Error::Overlap { argument: output.into(), other: name.into() });
                }
            }
        }
        Ok(())
    }
}

/// Smallest distance whose bucket is at least `bucket` (one of the logarithmic ones), as the specification rounds.
fn first_distance(bias: &crate::spec::RelativeBias, bucket: usize) -> u64 {
    // Behind the query, so that both kinds count from 0.
    let reaches = |distance: u64| bias.bucket(-(distance as i64)) >= bucket;
    let (mut below, mut from) = (0, 1 << 62);
    if !reaches(from) {
        return u64::MAX;
    }
    while from - below > 1 {
        let middle = below + (from - below) / 2;
        if reaches(middle) {
            from = middle;
        } else {
            below = middle;
        }
    }
    from
}

/// Strides in bytes, if the last element still has an address.
fn bytes<const N: usize>(name: &str, elem: usize, shape: [usize; N], strides: [usize; N]) -> Result<[u64; N]> {
    let fits = strides.iter().zip(shape).try_fold(elem as u64, |end, (stride, n)| {
        let step = (*stride as u64).checked_mul(elem as u64)?;
        end.checked_add(step.checked_mul(n.max(1) as u64)?).filter(|end| *end <= i64::MAX as u64)
    });
    match fits {
        // A dimension of one element has no stride, whatever the caller says.
        Some(_) => Ok(std::array::from_fn(|i| if shape[i] > 1 { (strides[i] * elem) as u64 } else { 0 })),
        None => {
            let expected = "rows within 2^63 bytes".into();
            Err(Error::Stride { argument: name.into(), expected, found: strides.to_vec() })
        }
    }
}

/// Rows of an output must not overlap.
fn check_output(name: &str, shape: [usize; 2], width: usize, strides: [usize; 2]) -> Result<()> {
    crate::view::check_disjoint(name, &[shape[0], shape[1], width], &[strides[0], strides[1], 1])
}

fn check_pointer(name: &str, ptr: u64, size: u64) -> Result<()> {
    if ptr == 0 || !ptr.is_multiple_of(size) {
        let expected = format!("a device pointer that is a multiple of {size}");
        return Err(Error::value(name, expected, format_args!("{ptr:#x}")));
    }
    Ok(())
}

/// The values of all parameters in `lib/attention.ptx`, as the `Params` of one kernel; the kernel's own follow in braces.
macro_rules! attention_params {
    ($kernel:ident, $geometry:expr, $args:expr, { $($field:ident: $value:expr),* $(,)? }) => {{
        let (geometry, args): (&$crate::cuda::attention::problem::Geometry, &$crate::cuda::attention::AttentionArgs) =
            ($geometry, $args);
        let [kv_layout, page_size, num_pages] = geometry.kv_layout();
        let lse_strides = geometry.lse_strides.unwrap_or_default();
        $kernel::Params {
            q_ptr: args.q,
            k_ptr: args.k,
            v_ptr: args.v,
            out_ptr: args.out,
            lse_ptr: args.lse.unwrap_or(0),
            cu_seqlens_q_ptr: args.cu_seqlens_q.unwrap_or(0),
            kv_lens_ptr: args.kv_lens.unwrap_or(0),
            block_table_ptr: args.block_table.unwrap_or(0),
            kv_begin_ptr: args.kv_begin.unwrap_or(0),
            q_start_ptr: args.q_start.unwrap_or(0),
            k_start_ptr: args.k_start.unwrap_or(0),
            mask_ptr: args.mask.unwrap_or(0),
            bias_ptr: args.bias.unwrap_or(0),
            alibi_slopes_ptr: args.alibi_slopes.unwrap_or(0),
            alibi_positions_ptr: args.alibi_positions.unwrap_or(0),
            relative_bias_ptr: args.relative_bias.unwrap_or(0),
            sinks_ptr: args.sinks.unwrap_or(0),
            q_token_stride: geometry.q_strides[0],
            q_head_stride: geometry.q_strides[1],
            k_block_stride: geometry.k_strides[0],
            k_row_stride: geometry.k_strides[1],
            k_head_stride: geometry.k_strides[2],
            v_block_stride: geometry.v_strides[0],
            v_row_stride: geometry.v_strides[1],
            v_head_stride: geometry.v_strides[2],
            out_token_stride: geometry.out_strides[0],
            out_head_stride: geometry.out_strides[1],
            lse_token_stride: lse_strides[0],
            lse_head_stride: lse_strides[1],
            block_table_stride: geometry.block_table_stride(),
            mask_seq_stride: geometry.mask_strides[0],
            mask_head_stride: geometry.mask_strides[1],
            mask_query_stride: geometry.mask_strides[2],
            mask_key_stride: geometry.mask_strides[3],
            bias_seq_stride: geometry.bias_strides[0],
            bias_head_stride: geometry.bias_strides[1],
            bias_query_stride: geometry.bias_strides[2],
            bias_key_stride: geometry.bias_strides[3],
            alibi_positions_stride: geometry.alibi_positions_stride,
            relative_bias_stride: geometry.relative_bias_stride,
            window_left: geometry.window_left,
            window_right: geometry.window_right,
            chunk: geometry.chunk,
            bucket_start_0: geometry.bucket_starts[0],
            bucket_start_1: geometry.bucket_starts[1],
            bucket_start_2: geometry.bucket_starts[2],
            bucket_start_3: geometry.bucket_starts[3],
            bucket_start_4: geometry.bucket_starts[4],
            bucket_start_5: geometry.bucket_starts[5],
            bucket_start_6: geometry.bucket_starts[6],
            bucket_start_7: geometry.bucket_starts[7],
            bucket_start_8: geometry.bucket_starts[8],
            bucket_start_9: geometry.bucket_starts[9],
            bucket_start_10: geometry.bucket_starts[10],
            bucket_start_11: geometry.bucket_starts[11],
            bucket_start_12: geometry.bucket_starts[12],
            bucket_start_13: geometry.bucket_starts[13],
            bucket_start_14: geometry.bucket_starts[14],
            bucket_start_15: geometry.bucket_starts[15],
            bucket_start_16: geometry.bucket_starts[16],
            bucket_start_17: geometry.bucket_starts[17],
            bucket_start_18: geometry.bucket_starts[18],
            bucket_start_19: geometry.bucket_starts[19],
            bucket_start_20: geometry.bucket_starts[20],
            bucket_start_21: geometry.bucket_starts[21],
            bucket_start_22: geometry.bucket_starts[22],
            bucket_start_23: geometry.bucket_starts[23],
            bucket_start_24: geometry.bucket_starts[24],
            bucket_start_25: geometry.bucket_starts[25],
            bucket_start_26: geometry.bucket_starts[26],
            bucket_start_27: geometry.bucket_starts[27],
            bucket_start_28: geometry.bucket_starts[28],
            bucket_start_29: geometry.bucket_starts[29],
            bucket_start_30: geometry.bucket_starts[30],
            num_seqs: geometry.num_seqs,
            num_tokens: geometry.num_tokens,
            num_heads: geometry.num_heads,
            group_size: geometry.group_size(),
            head_dim: geometry.head_dim,
            value_dim: geometry.value_dim,
            num_kv_rows: geometry.num_kv_rows(),
            kv_layout,
            page_size,
            num_pages,
            max_q_len: geometry.max_q_len,
            max_kv_len: geometry.max_kv_len,
            features: geometry.features,
            exact_buckets: geometry.exact_buckets,
            num_buckets: geometry.num_buckets,
            softmax_scale: f32::from_bits(geometry.softmax_scale),
            softcap: f32::from_bits(geometry.softcap),
            $($field: $value),*
        }
    }};
}
pub(super) use attention_params;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::RelativeBias;

    fn problem() -> AttentionProblem {
        AttentionProblem::new(Attention::causal(4, 2, 64), Dtype::BF16, 2, 30, KvShape::ragged(50))
    }

    fn message(change: impl FnOnce(&mut AttentionProblem)) -> String {
        let mut problem = problem();
        change(&mut problem);
        Geometry::new(&problem).unwrap_err().to_string()
    }

    #[test]
    fn bad_problems() {
        assert_eq!(
            message(|p| p.dtype = Dtype::F64),
            "`q, k, v and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(message(|p| p.num_seqs = 1 << 31), "`num_seqs` is 2147483648, expected 0 to 2147483647");
        assert_eq!(message(|p| p.kv = KvShape::paged(4, 0, 4)), "`kv.page_size` is 0, expected 1 to 2147483647");
        assert_eq!(
            message(|p| p.spec.softmax_scale = 1e300),
            format!("`softmax_scale` is {}, expected a positive number that is normal in f32", 1e300)
        );
        assert_eq!(
            message(|p| p.alibi_positions_stride = Some(0)),
            "`alibi_positions` is given, expected it to be absent: the specification has no ALiBi"
        );
        assert_eq!(
            message(|p| p.spec.relative_bias = Some(RelativeBias::new(130, 1000, false))),
            "unsupported by cuda: a relative bias of more than 64 buckets per direction"
        );
        assert_eq!(
            message(|p| p.out_strides = [64, 64]),
            "`out` has strides [64, 64, 1], expected rows that do not overlap"
        );
        let far = usize::MAX / 100;
        assert_eq!(
            message(|p| p.q_strides = [far, 64]),
            format!("`q` has strides [{far}, 64], expected rows within 2^63 bytes")
        );
    }

    #[test]
    fn bad_arguments() {
        let geometry = Geometry::new(&problem()).unwrap();
        let good = AttentionArgs {
            cu_seqlens_q: Some(0x500),
            kv_lens: Some(0x600),
            ..AttentionArgs::new(0x100, 0x200, 0x300, 0x400)
        };
        let message = |args: AttentionArgs| geometry.check_args(&args).unwrap_err().to_string();
        geometry.check_args(&good).unwrap();
        assert_eq!(
            message(AttentionArgs { v: 0, ..good }),
            "`v` is 0x0, expected a device pointer that is a multiple of 2"
        );
        assert_eq!(
            message(AttentionArgs { kv_lens: None, ..good }),
            "`kv_lens` is absent, expected it to be given: the plan asks for it"
        );
        assert_eq!(
            message(AttentionArgs { lse: Some(0x700), ..good }),
            "`lse` is given, expected it to be absent: the plan has none"
        );
        assert_eq!(
            message(AttentionArgs { q_start: Some(0x704), ..good }),
            "`q_start` is 0x704, expected a device pointer that is a multiple of 8"
        );
        assert_eq!(message(AttentionArgs { out: 0x100, ..good }), "`out` overlaps `q`, expected separate memory");
    }

    /// Buckets by comparing with starts are the specification's buckets.
    #[test]
    fn bucket_starts() {
        for (buckets, max_distance, both) in [(8, 20, true), (32, 128, true), (32, 128, false), (64, 1 << 40, false)] {
            let bias = RelativeBias::new(buckets, max_distance, both);
            let mut problem = problem();
            problem.spec.relative_bias = Some(bias);
            let geometry = Geometry::new(&problem).unwrap();
            for distance in (0..3000).chain((12..41).flat_map(|e| [(1 << e) - 1, 1 << e])) {
                let found = if distance < u64::from(geometry.exact_buckets) {
                    distance as usize
                } else {
                    let beyond = geometry.bucket_starts.iter().filter(|start| **start <= distance).count();
                    geometry.exact_buckets as usize + beyond
                };
                assert_eq!(found, bias.bucket(-(distance as i64)), "{bias:?} {distance}");
            }
        }
    }

    #[test]
    fn alignment() {
        let aligned = |change: &dyn Fn(&mut AttentionProblem)| {
            let mut problem = problem();
            change(&mut problem);
            Geometry::new(&problem).unwrap().unaligned_argument()
        };
        assert_eq!(aligned(&|_| ()), None);
        assert_eq!(aligned(&|p| p.v_strides[1] = 130), Some(("v", vec![260, 128])));
        assert_eq!(aligned(&|p| p.k_strides[0] = 3), None, "ragged rows have no blocks");
        // A dimension of one element has no stride.
        let one_head = Attention::new(1, 1, 64);
        let mut problem = AttentionProblem::new(one_head, Dtype::BF16, 1, 30, KvShape::ragged(50));
        problem.q_strides[1] = 3;
        assert_eq!(Geometry::new(&problem).unwrap().unaligned_argument(), None);
    }
}
