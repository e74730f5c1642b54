//! What a call is: which arrays, which strides, which cache; and its kernel, with every check that a launch makes.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::qkv as kernels;
use crate::cuda::rows::{MAX_ROWS, MAX_WIDTH, Rows, Twins, strides_aligned};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::{QkNorm, QkvPrep, RopeStyle};
use crate::view::check_disjoint;

/// Which of q, k and v a call takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QkvArrays {
    /// All three.
    #[default]
    All,
    /// Queries: a rotation by itself.
    Query,
    /// Keys and values: an append by itself.
    KeyValue,
    /// Keys: an append to a cache whose values have width 0.
    Key,
    /// Values: an append to a cache whose keys have width 0.
    Value,
}

/// A KV cache that takes the keys and values of a call: row `i` of sequence `s` goes to its row `kv_lens[s] + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct QkvCache {
    /// Sequences.
    pub num_seqs: usize,
    /// Whether `cu_seqlens` tells their first rows; else there is one sequence.
    pub ragged: bool,
    /// Blocks: one per sequence, or pages.
    pub num_blocks: usize,
    /// Rows of a block.
    pub block_rows: usize,
    /// Pages per sequence in the block table, and elements from one row of it to the next. `None`: block `s` for sequence `s`.
    pub pages: Option<[usize; 2]>,
}

impl QkvCache {
    /// The same room for each of so many sequences.
    pub const fn contiguous(num_seqs: usize, capacity: usize) -> Self {
        QkvCache { num_seqs, ragged: true, num_blocks: num_seqs, block_rows: capacity, pages: None }
    }

    /// Pages, with a contiguous block table `[num_seqs, max_pages]`.
    pub const fn paged(num_seqs: usize, num_pages: usize, page_size: usize, max_pages: usize) -> Self {
        let pages = Some([max_pages, max_pages]);
        QkvCache { num_seqs, ragged: true, num_blocks: num_pages, block_rows: page_size, pages }
    }
}

/// What to compute: the steps of [`prepare_qkv`](crate::cuda::prepare_qkv).
///
/// * `q`: `[num_tokens, num_heads, head_dim]`, `k`: `[num_tokens, num_kv_heads, head_dim]`, `v`: the same with `value_dim`
/// * outputs: the same, or for keys and values a cache `[num_blocks, block_rows, num_kv_heads, width]`
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct QkvProblem {
    /// Heads and steps.
    pub spec: QkvPrep,
    /// Element type of activations and cache: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Which arrays there are.
    pub arrays: QkvArrays,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Rows of the cos and sin tables.
    pub num_positions: usize,
    /// Where keys and values go; `None`: to rows of the same numbers.
    pub cache: Option<QkvCache>,
    /// Elements between tokens and between heads of `q`.
    pub q_strides: [usize; 2],
    /// The same of `k`.
    pub k_strides: [usize; 2],
    /// The same of `v`.
    pub v_strides: [usize; 2],
    /// The same of the prepared `q`.
    pub q_out_strides: [usize; 2],
    /// Elements between blocks, rows and heads of the prepared keys; without a cache there is one block.
    pub k_out_strides: [usize; 3],
    /// The same of the values.
    pub v_out_strides: [usize; 3],
    /// Elements from one row of the cos table to the next.
    pub cos_stride: usize,
    /// Elements from one row of the sin table to the next.
    pub sin_stride: usize,
}

impl QkvProblem {
    /// Contiguous arrays, no cache.
    pub fn new(spec: QkvPrep, dtype: Dtype, num_tokens: usize, num_positions: usize) -> Self {
        let q = [spec.num_heads.saturating_mul(spec.head_dim), spec.head_dim];
        let k = [spec.num_kv_heads.saturating_mul(spec.head_dim), spec.head_dim];
        let v = [spec.num_kv_heads.saturating_mul(spec.value_dim), spec.value_dim];
        let half = spec.rope.as_ref().map_or(0, |rope| rope.rotary_dim / 2);
        QkvProblem {
            spec,
            dtype,
            arrays: QkvArrays::All,
            num_tokens,
            num_positions,
            cache: None,
            q_strides: q,
            k_strides: k,
            v_strides: v,
            q_out_strides: q,
            k_out_strides: [0, k[0], k[1]],
            v_out_strides: [0, v[0], v[1]],
            cos_stride: half,
            sin_stride: half,
        }
    }

    /// The same into a contiguous cache.
    pub fn with_cache(mut self, cache: QkvCache) -> Self {
        for strides in [&mut self.k_out_strides, &mut self.v_out_strides] {
            strides[0] = strides[1].saturating_mul(cache.block_rows);
        }
        QkvProblem { cache: Some(cache), ..self }
    }
}

/// Device pointers of one call; 0 where there is no such array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QkvArgs {
    /// Read.
    pub q: u64,
    /// Read.
    pub k: u64,
    /// Read.
    pub v: u64,
    /// Written; may be `q` itself unless the rotation is [`RopeStyle::InterleavedToHalf`].
    pub q_out: u64,
    /// Written; without a cache it may be `k` itself, with the same exception.
    pub k_out: u64,
    /// Written; without a cache it may be `v` itself.
    pub v_out: u64,
    /// f32, read: `[head_dim]`, or `[num_heads * head_dim]` for [`QkNorm::Full`].
    pub q_norm: u64,
    /// f32, read: `[head_dim]`, or `[num_kv_heads * head_dim]` for [`QkNorm::Full`].
    pub k_norm: u64,
    /// f32 `[num_positions, rotary_dim / 2]`, read.
    pub cos: u64,
    /// f32 `[num_positions, rotary_dim / 2]`, read.
    pub sin: u64,
    /// u32 `[num_tokens]`, read; a row of the tables at most, larger ones count as the last.
    pub positions: u64,
    /// u32 `[num_seqs + 1]`, read: first row of each sequence.
    pub cu_seqlens: u64,
    /// u32 `[num_seqs]`, read: rows that are in the cache already.
    pub kv_lens: u64,
    /// u32 `[num_seqs, max_pages]`, read.
    pub block_table: u64,
}

/// One of q, k and v with its output: sizes and strides in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Array {
    heads: usize,
    width: usize,
    /// token, head
    strides: [u64; 2],
    /// block, row, head
    out_strides: [u64; 3],
    ctas: u32,
}

/// [`QkvProblem`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct QkvPlan {
    dtype: Dtype,
    num_tokens: usize,
    num_positions: usize,
    cache: Option<QkvCache>,
    /// q, k, v; one that is absent has no CTAs.
    arrays: [Array; 3],
    norm: u32,
    style: u32,
    rotary_half: usize,
    lanes_log2: u32,
    cos_stride: u64,
    sin_stride: u64,
    floor_scale: u32,
    // Numbers by their bits, so that plans are equal and hash.
    attn_scale: u32,
    clip: u32,
    epsilon: u32,
    weight_offset: u32,
    kernels: Twins,
}

const NAMES: [&str; 3] = ["q", "k", "v"];
/// Outputs without and with a cache.
const OUT_NAMES: [[&str; 2]; 3] = [["out.q"; 2], ["out.k", "cache.k"], ["out.v", "cache.v"]];
/// Number of [`RopeStyle::InterleavedToHalf`] in the kernel.
const TO_HALF: u32 = 2;

impl QkvPlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// Those of [`QkvPrep::validate`]; [`Error::Dtype`]; [`Error::Unsupported`] for a query temperature whose `floor_scale` is
    /// not a whole number below 2^32; [`Error::Value`] for sizes beyond 2^31 rows and heads or 2^30 columns, a table without
    /// rows, or a number out of its range in f32; [`Error::Stride`] if rows of an output overlap or leave the address space.
    pub fn new(problem: &QkvProblem) -> Result<Self> {
        let QkvProblem { spec, dtype, arrays, num_tokens, num_positions, cache, .. } = problem;
        let (dtype, num_tokens, num_positions) = (*dtype, *num_tokens, *num_positions);
        spec.validate()?;
        let instance = |aligned| kernels::INSTANCES.iter().find(|i| i.dtype == dtype && i.aligned == aligned);
        let (Some(aligned), Some(unaligned)) = (instance(true), instance(false)) else {
            return Err(Error::Dtype {
                argument: "q, k, v and out".into(),
                expected: "bf16, f16 or f32".into(),
                found: dtype.to_string(),
            });
        };
        let number = |name: &str, value: f64| match value as f32 {
            single if single.is_finite() => Ok(single.to_bits()),
            _ => Err(Error::value(name, "a finite number in f32", value)),
        };
        let [has_query, has_key, has_value] = match arrays {
            QkvArrays::All => [true; 3],
            QkvArrays::Query => [true, false, false],
            QkvArrays::KeyValue => [false, true, true],
            QkvArrays::Key => [false, true, false],
            QkvArrays::Value => [false, false, true],
        };
        let has_dim = has_query || has_key; // columns of queries or keys
        let rotary_half = spec.rope.as_ref().map_or(0, |rope| rope.rotary_dim / 2);
        let style = match spec.rope.as_ref().map_or(RopeStyle::Half, |rope| rope.style) {
            RopeStyle::Half => 0,
            RopeStyle::Interleaved => 1,
            RopeStyle::InterleavedToHalf => TO_HALF,
        };
        let norm = match spec.qk_norm {
            None => 0,
            Some(QkNorm::PerHead) => 1,
            Some(QkNorm::Full) => 2,
            Some(QkNorm::L2AfterRope) => 3,
        };
        let (mut floor_scale, mut attn_scale) = (0, 0);
        if let Some(temperature) = spec.q_temperature.filter(|_| has_query) {
            floor_scale = temperature.floor_scale as u32;
            if f64::from(floor_scale) != temperature.floor_scale {
                let case = "a query temperature whose floor_scale is not a whole number below 2^32";
                return Err(Error::unsupported("cuda", format!("{case}: {}", temperature.floor_scale)));
            }
            attn_scale = number("q_temperature.attn_scale", temperature.attn_scale)?;
        }
        if num_positions > u32::MAX as usize || rotary_half > 0 && num_positions == 0 && num_tokens > 0 {
            return Err(Error::value("num_positions", format!("1 to {}", u32::MAX), num_positions));
        }
        if let Some(cache) = cache {
            check_cache(cache)?;
        }

        // Lanes of a head: enough for its vectors in pairs, at most a warp.
        let vec = aligned.vec as usize;
        let units = |width: usize, half: usize| half.div_ceil(vec) + (width - 2 * half).div_ceil(2 * vec);
        let dim_units = if has_dim { units(spec.head_dim, rotary_half) } else { 0 };
        let units = dim_units.max(if has_value { units(spec.value_dim, 0) } else { 0 });
        let lanes = units.min(32).next_power_of_two();
        let layout = |i: usize, present: bool, heads, width, strides: [usize; 2], out: [usize; 3]| -> Result<Array> {
            let (name, out_name) = (NAMES[i], OUT_NAMES[i][usize::from(cache.is_some())]);
            let total = num_tokens.saturating_mul(heads);
            if present && total > MAX_ROWS {
                return Err(Error::value("num_tokens", format!("at most {}", MAX_ROWS / heads), num_tokens));
            }
            if present && heads.saturating_mul(width) > MAX_WIDTH {
                return Err(Error::value(format!("{name}.shape[2]"), format!("at most {}", MAX_WIDTH / heads), width));
            }
            if !present || num_tokens == 0 {
                return Ok(Array { heads, width, strides: [0; 2], out_strides: [0; 3], ctas: 0 });
            }
            let out_strides = match cache {
                Some(cache) if i > 0 => {
                    let shape = [cache.num_blocks, cache.block_rows, heads];
                    check_disjoint(out_name, &[shape[0], shape[1], heads, width], &[out[0], out[1], out[2], 1])?;
                    strides_bytes(out_name, dtype, shape, out)?
                }
                _ => {
                    check_disjoint(out_name, &[num_tokens, heads, width], &[out[1], out[2], 1])?;
                    let [token, head] = strides_bytes(out_name, dtype, [num_tokens, heads], [out[1], out[2]])?;
                    [0, token, head]
                }
            };
            let ctas = match norm {
                2 if i < 2 => num_tokens,
                _ => total.div_ceil(aligned.kernel.threads as usize / lanes),
            };
            Ok(Array {
                heads,
                width,
                strides: strides_bytes(name, dtype, [num_tokens, heads], strides)?,
                out_strides,
                ctas: if i > 0 && cache.is_some_and(|cache| cache.num_seqs == 0) { 0 } else { ctas as u32 },
            })
        };
        let [a, b] = problem.q_out_strides;
        let (q_heads, kv_heads, dim) = (spec.num_heads, spec.num_kv_heads, spec.head_dim);
        let arrays = [
            layout(0, has_query, q_heads, dim, problem.q_strides, [0, a, b])?,
            layout(1, has_key, kv_heads, dim, problem.k_strides, problem.k_out_strides)?,
            layout(2, has_value, kv_heads, spec.value_dim, problem.v_strides, problem.v_out_strides)?,
        ];
        let table = |name, stride| strides_bytes(name, Dtype::F32, [num_positions.max(1)], [stride]);
        let [cos_stride] = if rotary_half > 0 { table("cos", problem.cos_stride)? } else { [0] };
        let [sin_stride] = if rotary_half > 0 { table("sin", problem.sin_stride)? } else { [0] };
        let widths_align = (!has_dim || [dim, rotary_half].iter().all(|width| width.is_multiple_of(vec)))
            && (!has_value || spec.value_dim.is_multiple_of(vec));
        let can_align = widths_align
            && arrays.iter().all(|a| strides_aligned(0, &a.strides) && strides_aligned(0, &a.out_strides))
            && strides_aligned(0, &[cos_stride, sin_stride]);
        Ok(QkvPlan {
            dtype,
            num_tokens,
            num_positions,
            cache: cache.filter(|_| has_key || has_value),
            arrays,
            norm,
            style,
            rotary_half,
            lanes_log2: lanes.trailing_zeros(),
            cos_stride,
            sin_stride,
            floor_scale,
            attn_scale,
            clip: spec.clip.map_or(Ok(f32::INFINITY.to_bits()), |clip| number("clip", clip))?,
            epsilon: number("norm.eps", spec.norm.eps)?,
            weight_offset: number("norm.weight_offset", spec.norm.weight_offset)?,
            kernels: Twins::new(can_align, &aligned.kernel, &unaligned.kernel),
        })
    }

    /// Name of the kernel that runs when all pointers are multiples of 16. Others take its `_unaligned` twin, with the
    /// same bits.
    pub fn kernel(&self) -> &'static str {
        self.kernels.name()
    }

    /// Device memory that [`QkvPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        0
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.kernels.warmup(driver)
    }

    /// Queues the work on a stream. Does not wait; after [`QkvPlan::warmup`] it neither allocates nor loads. Positions, lengths,
    /// prefix sums and pages are read by the kernel: what lies outside of an array is not written.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to its elements; [`Error::Overlap`] if an output shares memory with
    /// another array, other than in place as [`QkvArgs`] allows; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended; no
    /// other work writes the inputs or touches the outputs meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &QkvArgs, stream: Stream) -> Result<()> {
        let ctas = self.arrays.map(|array| array.ctas);
        let grid: u32 = ctas.iter().sum(); // below 2^31, since each has at most 2^31 heads of a quarter of a CTA
        if grid == 0 {
            return Ok(());
        }
        let pointers_aligned = self.check(args)?;
        let kernel = self.kernels.pick(pointers_aligned);
        let [q, k, v] = self.arrays;
        let has_pages = self.cache.is_some_and(|cache| cache.pages.is_some());
        let only = |present: bool, ptr: u64| if present { ptr } else { 0 };
        let params = kernels::Params {
            q_ptr: args.q,
            q_token_bytes: q.strides[0],
            q_head_bytes: q.strides[1],
            q_out_ptr: args.q_out,
            q_out_block_bytes: q.out_strides[0],
            q_out_row_bytes: q.out_strides[1],
            q_out_head_bytes: q.out_strides[2],
            k_ptr: args.k,
            k_token_bytes: k.strides[0],
            k_head_bytes: k.strides[1],
            k_out_ptr: args.k_out,
            k_out_block_bytes: k.out_strides[0],
            k_out_row_bytes: k.out_strides[1],
            k_out_head_bytes: k.out_strides[2],
            v_ptr: args.v,
            v_token_bytes: v.strides[0],
            v_head_bytes: v.strides[1],
            v_out_ptr: args.v_out,
            v_out_block_bytes: v.out_strides[0],
            v_out_row_bytes: v.out_strides[1],
            v_out_head_bytes: v.out_strides[2],
            q_norm_ptr: args.q_norm,
            k_norm_ptr: args.k_norm,
            cos_ptr: args.cos,
            sin_ptr: args.sin,
            cos_stride_bytes: self.cos_stride,
            sin_stride_bytes: self.sin_stride,
            positions_ptr: args.positions,
            cu_seqlens_ptr: only(self.cache.is_some_and(|cache| cache.ragged), args.cu_seqlens),
            kv_lens_ptr: only(self.cache.is_some(), args.kv_lens),
            block_table_ptr: only(has_pages, args.block_table),
            table_stride_bytes: self.cache.and_then(|cache| cache.pages).map_or(0, |[_, stride]| stride as u64 * 4),
            // All below 2^32, seen by `new`.
            num_tokens: self.num_tokens as u32,
            q_heads: q.heads as u32,
            kv_heads: k.heads as u32,
            head_dim: q.width as u32,
            value_dim: v.width as u32,
            q_ctas: ctas[0],
            k_ctas: ctas[1],
            lanes_log2: self.lanes_log2,
            norm: self.norm,
            style: self.style,
            rotary_half: self.rotary_half as u32,
            num_positions: self.num_positions as u32,
            num_seqs: self.cache.map_or(0, |cache| cache.num_seqs) as u32,
            num_blocks: self.cache.map_or(0, |cache| cache.num_blocks) as u32,
            block_rows: self.cache.map_or(0, |cache| cache.block_rows) as u32,
            room: self.cache.map_or(0, room),
            floor_scale: self.floor_scale,
            attn_scale: f32::from_bits(self.attn_scale),
            clip: f32::from_bits(self.clip),
            epsilon: f32::from_bits(self.epsilon),
            weight_offset: f32::from_bits(self.weight_offset),
        };
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the arrays that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(kernel, &Launch::grid([grid, 1, 1]), &params.to_bytes(), stream) }
    }

    /// The checks that need addresses; whether all of them are multiples of 16.
    fn check(&self, args: &QkvArgs) -> Result<bool> {
        let size = self.dtype.size_bytes() as u64;
        let mut inputs: [Option<Rows>; 12] = [None; 12];
        let mut outputs: [Option<Rows>; 3] = [None; 3];
        let sources = [[args.q, args.q_out], [args.k, args.k_out], [args.v, args.v_out]];
        for (i, (array, [ptr, out])) in self.arrays.iter().zip(sources).enumerate() {
            if array.ctas == 0 {
                continue;
            }
            let width = array.width as u64 * size;
            let [token, head] = array.strides;
            inputs[i] = Some(nested(NAMES[i], ptr, width, [(self.num_tokens, token), (array.heads, head)]));
            let (blocks, rows) = match self.cache {
                Some(cache) if i > 0 => (cache.num_blocks, cache.block_rows),
                _ => (1, self.num_tokens),
            };
            let name = OUT_NAMES[i][usize::from(self.cache.is_some())];
            let [block, row, head] = array.out_strides;
            if blocks == 0 || rows == 0 {
                continue;
            }
            outputs[i] = Some(match blocks {
                1 => nested(name, out, width, [(rows, row), (array.heads, head)]),
                // Blocks that follow one another are as many rows of one.
                _ if block == rows as u64 * row => {
                    nested(name, out, width, [(blocks.saturating_mul(rows), row), (array.heads, head)])
                }
                _ => {
                    let inner = (rows as u64 - 1) * row + (array.heads as u64 - 1) * head + width;
                    nested(name, out, inner, [(blocks, block), (1, 0)])
                }
            });
        }
        let vector = |name, ptr, len: usize| nested(name, ptr, len as u64 * 4, [(1, 0), (1, 0)]);
        if let 1 | 2 = self.norm {
            for (i, name, ptr) in [(0, "q_norm", args.q_norm), (1, "k_norm", args.k_norm)] {
                let Array { heads, width, ctas, .. } = self.arrays[i];
                let len = if self.norm == 2 { heads * width } else { width };
                inputs[3 + i] = (ctas > 0).then(|| vector(name, ptr, len));
            }
        }
        let turns = self.rotary_half > 0 && (self.arrays[0].ctas > 0 || self.arrays[1].ctas > 0);
        if turns {
            let width = self.rotary_half as u64 * 4;
            inputs[5] = Some(nested("cos", args.cos, width, [(self.num_positions, self.cos_stride), (1, 0)]));
            inputs[6] = Some(nested("sin", args.sin, width, [(self.num_positions, self.sin_stride), (1, 0)]));
        }
        if turns || self.floor_scale > 0 {
            inputs[7] = Some(vector("positions", args.positions, self.num_tokens));
        }
        if let Some(cache) = self.cache.filter(|cache| cache.num_seqs > 0) {
            inputs[8] = Some(vector("kv_lens", args.kv_lens, cache.num_seqs));
            inputs[9] = cache.ragged.then(|| vector("cu_seqlens", args.cu_seqlens, cache.num_seqs + 1));
            inputs[10] = cache.pages.map(|[pages, stride]| {
                nested("block_table", args.block_table, pages as u64 * 4, [(cache.num_seqs, stride as u64 * 4), (1, 0)])
            });
        }
        for (i, rows) in inputs.iter().enumerate() {
            rows.iter().try_for_each(|rows| rows.check(if i < 3 { self.dtype } else { Dtype::F32 }))?;
        }
        outputs.iter().flatten().try_for_each(|rows| rows.check(self.dtype))?;
        for (i, output) in outputs.iter().enumerate() {
            let Some(output) = output else { continue };
            for (j, input) in inputs.iter().enumerate() {
                let Some(input) = input else { continue };
                // In place: the same rows, and no lane writes what another still reads.
                let [block, row, head] = self.arrays[i].out_strides;
                let same = i == j && output.ptr == input.ptr && [row, head] == self.arrays[i].strides;
                let cached = i > 0 && self.cache.is_some();
                let moves = i < 2 && self.rotary_half > 0 && self.style == TO_HALF;
                if !same || block != 0 || cached || moves {
                    output.check_separate(input)?;
                }
            }
            for other in outputs[i + 1..].iter().flatten() {
                output.check_separate(other)?;
            }
        }
        // Arrays of u32 are read one element at a time.
        Ok(inputs[..7].iter().chain(&outputs).flatten().all(Rows::aligned))
    }
}

/// An array of two leading dimensions, as rows of one stride: each by itself where they follow one another (so that heads of
/// keys and values may alternate), all of an outer index together where they lie within it, else everything as one row.
fn nested(name: &'static str, ptr: u64, width: u64, [outer, inner]: [(usize, u64); 2]) -> Rows {
    if inner.0 > 1 && (outer.0 <= 1 || outer.1 == inner.0 as u64 * inner.1) && width <= inner.1 {
        return Rows { name, ptr, num_rows: outer.0 * inner.0, row_bytes: width, stride_bytes: inner.1 };
    }
    let row_bytes = (inner.0.max(1) as u64 - 1) * inner.1 + width;
    if outer.0 <= 1 || row_bytes <= outer.1 || inner.0 <= 1 {
        return Rows { name, ptr, num_rows: outer.0, row_bytes, stride_bytes: outer.1 };
    }
    let row_bytes = row_bytes + (outer.0 as u64 - 1) * outer.1;
    Rows { name, ptr, num_rows: 1, row_bytes, stride_bytes: 0 }
}

/// Strides in bytes, 0 where there is but one, if the last element still has an address.
fn strides_bytes<const N: usize>(name: &str, dtype: Dtype, shape: [usize; N], strides: [usize; N]) -> Result<[u64; N]> {
    let mut bytes = [0u64; N];
    let mut end = 0u64;
    for ((bytes, n), stride) in bytes.iter_mut().zip(shape).zip(strides) {
        if n > 1 {
            *bytes = (stride as u64).saturating_mul(dtype.size_bytes() as u64);
            end = end.saturating_add(bytes.saturating_mul(n as u64));
        }
    }
    if end > i64::MAX as u64 {
        let expected = "rows within 2^63 bytes".into();
        let found = strides.into_iter().chain([1]).collect();
        return Err(Error::Stride { argument: name.into(), expected, found });
    }
    Ok(bytes)
}

/// Sizes that a kernel can index.
fn check_cache(cache: &QkvCache) -> Result<()> {
    let max = u32::MAX as usize;
    let [pages, stride] = cache.pages.unwrap_or([1, 1]);
    for (name, size) in [("num_seqs", cache.num_seqs), ("cache.k.shape[0]", cache.num_blocks)] {
        if size >= max {
            return Err(Error::value(name, format!("below {max}"), size));
        }
    }
    if cache.block_rows > max || cache.pages.is_some() && cache.block_rows == 0 {
        return Err(Error::value("cache.k.shape[1]", format!("1 to {max} rows"), cache.block_rows));
    }
    if !cache.ragged && cache.num_seqs != 1 {
        return Err(Error::value("num_seqs", "1 without cu_seqlens", cache.num_seqs));
    }
    if cache.pages.is_none() && cache.num_blocks != cache.num_seqs {
        return Err(Error::value(
            "cache.k.shape[0]",
            format!("{}, one per sequence", cache.num_seqs),
            cache.num_blocks,
        ));
    }
    if pages > max {
        return Err(Error::value("block_table.shape[1]", format!("at most {max}"), pages));
    }
    strides_bytes("block_table", Dtype::F32, [cache.num_seqs], [stride]).map(|_| ())
}

/// Rows of a sequence that the cache can hold.
fn room(cache: QkvCache) -> u32 {
    let pages = cache.pages.map_or(1, |[pages, _]| pages as u64);
    (cache.block_rows as u64).saturating_mul(pages).min(u64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[rows, heads, 2, width]`: keys and values alternate and do not overlap.
    #[test]
    fn alternating_heads_are_separate() {
        let array = |ptr, rows| nested("k_out", ptr, 32, [(rows, 4 * 64), (4, 64)]);
        for rows in [0, 1, 6] {
            assert!(array(0x1000, rows).check_separate(&array(0x1020, rows)).is_ok(), "{rows} rows");
        }
        for ptr in [0x1000, 0x1010, 0x1040, 0x1050] {
            assert!(array(0x1000, 6).check_separate(&array(ptr, 6)).is_err(), "{ptr:#x}");
        }
        assert!(array(0x1000, 6).check_separate(&array(0x1000 + 6 * 256, 6)).is_ok());
    }
}
