//! The attention over all keys from attentions over parts of them, on the GPU.

use super::AttentionOutput;
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::attention_merge as kernels;
use crate::cuda::{DeviceView, DeviceViewMut, Queue};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::view::{check_disjoint, contiguous, extent};

/// Most parts, rows and columns: indices stay far from the end of 32 bits.
const MAX_SIZE: usize = 1 << 30;

/// The largest y extent of a grid.
const MAX_GRID_Y: usize = 65535;

/// What to compute, for every token `t` and head `h`:
///
/// ```text
/// lse[t, h] = ln(sum_p exp(lses[p, t, h]))
/// out[t, h] = sum_p exp(lses[p, t, h] - lse[t, h]) * outs[p, t, h]
/// ```
///
/// * `outs`: `[num_parts, num_tokens, num_heads, value_dim]`, `lses`: `[num_parts, num_tokens, num_heads]`, f32
/// * `out`: `[num_tokens, num_heads, value_dim]`, `lse`: `[num_tokens, num_heads]`, f32
///
/// Strides count elements; the last dimension of each array is contiguous.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Merge {
    /// Element type of `outs`: bf16, f16 or f32.
    pub parts_dtype: Dtype,
    /// Element type of `out`: bf16, f16 or f32.
    pub out_dtype: Dtype,
    /// Parts; without any, `out = 0` and `lse = -inf`.
    pub num_parts: usize,
    /// Tokens; 0 is legal.
    pub num_tokens: usize,
    /// Heads.
    pub num_heads: usize,
    /// Columns.
    pub value_dim: usize,
    /// Strides of `outs`.
    pub outs_strides: [usize; 4],
    /// Strides of `lses`.
    pub lses_strides: [usize; 3],
    /// Strides of `out`.
    pub out_strides: [usize; 3],
    /// Strides of `lse`.
    pub lse_strides: [usize; 2],
}

impl Merge {
    /// Contiguous arrays of `[num_parts, num_tokens, num_heads, value_dim]`, the result in the type of the parts.
    pub fn new(parts_dtype: Dtype, shape: [usize; 4]) -> Self {
        let [num_parts, num_tokens, num_heads, value_dim] = shape;
        Merge {
            parts_dtype,
            out_dtype: parts_dtype,
            num_parts,
            num_tokens,
            num_heads,
            value_dim,
            outs_strides: contiguous(shape),
            lses_strides: contiguous([num_parts, num_tokens, num_heads]),
            out_strides: contiguous([num_tokens, num_heads, value_dim]),
            lse_strides: contiguous([num_tokens, num_heads]),
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeArgs {
    /// Read.
    pub outs: u64,
    /// Read.
    pub lses: u64,
    /// Written.
    pub out: u64,
    /// Written, where it is wanted.
    pub lse: Option<u64>,
}

impl MergeArgs {
    /// Without `lse`.
    pub fn new(outs: u64, lses: u64, out: u64) -> Self {
        MergeArgs { outs, lses, out, lse: None }
    }

    /// The same with `lse`.
    pub fn with_lse(self, lse: u64) -> Self {
        MergeArgs { lse: Some(lse), ..self }
    }
}

/// [`Merge`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MergePlan {
    problem: Merge,
    kernel: &'static crate::cuda::kernels::Kernel,
    grid: [u32; 3],
}

impl MergePlan {
    /// Checks the problem and chooses the kernel.
    ///
    /// # Errors
    /// [`Error::Dtype`], [`Error::Value`] for sizes that are too large, [`Error::Stride`].
    pub fn new(problem: &Merge) -> Result<Self> {
        let Merge { parts_dtype, out_dtype, num_parts, num_tokens, num_heads, value_dim, .. } = *problem;
        let supported = |dtype| matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        for (name, dtype) in [("outs", parts_dtype), ("out", out_dtype)] {
            if !supported(dtype) {
                let expected = "bf16, f16 or f32".into();
                return Err(Error::Dtype { argument: name.into(), expected, found: dtype.to_string() });
            }
        }
        let instance = kernels::INSTANCES.iter().find(|i| i.parts == parts_dtype && i.out == out_dtype);
        let Some(instance) = instance else {
            return Err(Error::unsupported("cuda", format!("a merge of {parts_dtype} to {out_dtype}")));
        };
        for (name, size, limit) in [
            ("num_parts", num_parts, MAX_SIZE),
            ("num_tokens * num_heads", num_tokens.saturating_mul(num_heads), MAX_SIZE),
            ("value_dim", value_dim, MAX_GRID_Y * instance.cols_per_cta as usize),
        ] {
            if size > limit {
                return Err(Error::value(name, format!("at most {limit}"), size));
            }
        }
        let check = |name: &str, shape: &[usize], strides: &[usize], dtype: Dtype, written: bool| {
            let argument = || name.into();
            if shape.last().is_some_and(|n| *n > 1) && strides.last().is_some_and(|s| *s != 1) {
                let expected = "the last dimension contiguous (stride 1)".into();
                return Err(Error::Stride { argument: argument(), expected, found: strides.to_vec() });
            }
            let bytes = extent(shape, strides).and_then(|n| n.checked_mul(dtype.size_bytes()));
            if bytes.is_none_or(|bytes| bytes > i64::MAX as usize) {
                let expected = "rows within 2^63 bytes".into();
                return Err(Error::Stride { argument: argument(), expected, found: strides.to_vec() });
            }
            if written { check_disjoint(name, shape, strides) } else { Ok(()) }
        };
        let shape = [num_parts, num_tokens, num_heads, value_dim];
        check("outs", &shape, &problem.outs_strides, parts_dtype, false)?;
        check("lses", &shape[..3], &problem.lses_strides, Dtype::F32, false)?;
        check("out", &shape[1..], &problem.out_strides, out_dtype, true)?;
        check("lse", &shape[1..3], &problem.lse_strides, Dtype::F32, true)?;
        let col_ctas = value_dim.div_ceil(instance.cols_per_cta as usize).max(1);
        let grid = [(num_tokens * num_heads) as u32, col_ctas as u32, 1];
        Ok(MergePlan { problem: problem.clone(), kernel: &instance.kernel, grid })
    }

    /// Name of the kernel.
    pub fn kernel(&self) -> &'static str {
        self.kernel.entry
    }

    /// Device memory that [`MergePlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        0
    }

    /// Loads the kernel, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        driver.load(self.kernel)
    }

    /// Queues the work on a stream. Does not wait; after [`MergePlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if an output shares memory
    /// with another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shape and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the outputs meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &MergeArgs, stream: Stream) -> Result<()> {
        let problem = &self.problem;
        if self.grid[0] == 0 || problem.value_dim == 0 && args.lse.is_none() {
            return Ok(());
        }
        let Merge { num_parts, num_tokens, num_heads, value_dim, .. } = *problem;
        let shape = [num_parts, num_tokens, num_heads, value_dim];
        let array = |name, ptr, shape: &[usize], strides: &[usize], dtype: Dtype| {
            let elements = extent(shape, strides).unwrap_or(usize::MAX); // fits, seen by `new`
            Array { name, ptr, bytes: (elements * dtype.size_bytes()) as u64, align: dtype.size_bytes() as u64 }
        };
        let outs = array("outs", args.outs, &shape, &problem.outs_strides, problem.parts_dtype);
        let lses = array("lses", args.lses, &shape[..3], &problem.lses_strides, Dtype::F32);
        let out = array("out", args.out, &shape[1..], &problem.out_strides, problem.out_dtype);
        let lse = args.lse.map(|ptr| array("lse", ptr, &shape[1..3], &problem.lse_strides, Dtype::F32));
        [Some(outs), Some(lses), Some(out), lse].iter().flatten().try_for_each(Array::check)?;
        for written in [Some(out), lse].iter().flatten() {
            [outs, lses].iter().try_for_each(|read| written.check_separate(read))?;
        }
        lse.iter().try_for_each(|lse| out.check_separate(lse))?;
        let bytes = |stride: usize, dtype: Dtype| stride as u64 * dtype.size_bytes() as u64;
        let of_f32 = |stride| bytes(stride, Dtype::F32);
        let params = kernels::Params {
            outs_ptr: outs.ptr,
            lses_ptr: lses.ptr,
            sums_ptr: 0,
            sinks_ptr: 0,
            out_ptr: out.ptr,
            lse_ptr: args.lse.unwrap_or(0),
            outs_part_stride_bytes: bytes(problem.outs_strides[0], problem.parts_dtype),
            outs_token_stride_bytes: bytes(problem.outs_strides[1], problem.parts_dtype),
            outs_head_stride_bytes: bytes(problem.outs_strides[2], problem.parts_dtype),
            lses_part_stride_bytes: of_f32(problem.lses_strides[0]),
            lses_token_stride_bytes: of_f32(problem.lses_strides[1]),
            out_token_stride_bytes: bytes(problem.out_strides[0], problem.out_dtype),
            out_head_stride_bytes: bytes(problem.out_strides[1], problem.out_dtype),
            lse_token_stride_bytes: of_f32(problem.lse_strides[0]),
            lse_head_stride_bytes: of_f32(problem.lse_strides[1]),
            num_parts: num_parts as u32, // at most 2^30, as all of them, seen by `new`
            num_heads: num_heads as u32,
            value_dim: value_dim as u32,
            split: 0, // all tokens and all parts: nothing else is looked at
            cu_seqlens_q_ptr: 0,
            kv_lens_ptr: 0,
            num_seqs: 0,
            num_tokens: 0,
            num_kv_rows: 0,
            kv_layout: 0,
            max_q_len: 0,
            max_kv_len: 0,
        };
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the arrays that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(self.kernel, &Launch::grid(self.grid), &params.to_bytes(), stream) }
    }
}

/// An array in device memory, for the checks that need addresses.
#[derive(Clone, Copy, Debug)]
struct Array {
    name: &'static str,
    ptr: u64,
    bytes: u64,
    align: u64,
}

impl Array {
    /// A pointer that is not null, aligned to the element, with all elements within the address space; an empty array has any.
    fn check(&self) -> Result<()> {
        if self.bytes > 0 && (self.ptr == 0 || !self.ptr.is_multiple_of(self.align)) {
            let expected = format!("a device pointer that is a multiple of {}", self.align);
            return Err(Error::value(self.name, expected, format_args!("{:#x}", self.ptr)));
        }
        if self.ptr.checked_add(self.bytes).is_none() {
            let expected = format!("{} bytes below the end of the address space", self.bytes);
            return Err(Error::value(self.name, expected, format_args!("{:#x}", self.ptr)));
        }
        Ok(())
    }

    /// An output and another array must not share memory.
    fn check_separate(&self, other: &Array) -> Result<()> {
        let meet = self.ptr < other.ptr + other.bytes && other.ptr < self.ptr + self.bytes;
        if meet && self.bytes > 0 && other.bytes > 0 {
            return Err(Error::Overlap { argument: self.name.into(), other: other.name.into() });
        }
        Ok(())
    }
}

/// The attention over all keys from the attentions over parts of them, which other calls (or devices) have computed.
///
/// ```text
/// lse[t, h] = ln(sum_p exp(lses[p, t, h]))
/// out[t, h] = sum_p exp(lses[p, t, h] - lse[t, h]) * outs[p, t, h]
/// ```
///
/// * `outs`: `[num_parts, num_tokens, num_heads, value_dim]`, `lses`: `[num_parts, num_tokens, num_heads]`
/// * `out`: `[num_tokens, num_heads, value_dim]`, `lse`: `[num_tokens, num_heads]`
///
/// A part with `lse = -inf` is not read. All parts `-inf`, or no parts: `out = 0`, `lse = -inf`. Parts with `lse = inf` share all of
/// the weight; a NaN makes its row NaN. Sinks belong to one part alone. The order of the sums depends on the numbers of the
/// parts alone: parts with `lse = -inf` behind the others change no bit.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`] and those of [`MergePlan::new`] and [`MergePlan::launch`]. Nothing is
/// written then.
///
/// Dao et al. 2022, arXiv:2205.14135; Ye et al. 2024, "Cascade Inference".
pub fn merge<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    outs: DeviceView<'_, T, 4>,
    lses: DeviceView<'_, f32, 3>,
    output: AttentionOutput<'_, O>,
) -> Result<()> {
    let shape @ [num_parts, num_tokens, num_heads, value_dim] = outs.shape();
    outs.check("outs", shape)?;
    lses.check("lses", [num_parts, num_tokens, num_heads])?;
    output.out.check("out", [num_tokens, num_heads, value_dim])?;
    let mut problem = Merge::new(T::DTYPE, shape);
    problem.out_dtype = O::DTYPE;
    problem.outs_strides = outs.strides();
    problem.lses_strides = lses.strides();
    problem.out_strides = output.out.strides();
    let mut args = MergeArgs::new(outs.ptr(), lses.ptr(), output.out.ptr());
    if let Some(lse) = &output.lse {
        lse.check("lse", [num_tokens, num_heads])?;
        problem.lse_strides = lse.strides();
        args = args.with_lse(lse.ptr());
    }
    let lse_home = output.lse.as_ref().and_then(DeviceViewMut::home);
    queue.check_homes(&[outs.home(), lses.home(), output.out.home(), lse_home])?;
    let plan = MergePlan::new(&problem)?;
    // SAFETY: the views hold their shapes, checked above, in memory of the queue's device that stays borrowed while work
    // is queued, by the promise of `DeviceView::from_raw`.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_grids() {
        let mut problem = Merge::new(Dtype::BF16, [3, 5, 4, 576]);
        let plan = MergePlan::new(&problem).unwrap();
        assert_eq!((plan.kernel(), plan.grid), ("gatefold_attention_merge_bf16_bf16", [20, 5, 1]));
        problem.out_dtype = Dtype::F32;
        problem.value_dim = 0;
        let plan = MergePlan::new(&problem).unwrap();
        assert_eq!((plan.kernel(), plan.grid), ("gatefold_attention_merge_bf16_f32", [20, 1, 1]));
    }

    #[test]
    fn bad_shapes() {
        let message = |problem: Merge| MergePlan::new(&problem).unwrap_err().to_string();
        let good = || Merge::new(Dtype::F16, [3, 5, 4, 16]);
        assert_eq!(
            message(Merge { out_dtype: Dtype::F64, ..good() }),
            "`out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(
            message(Merge { num_tokens: 1 << 40, ..good() }),
            format!("`num_tokens * num_heads` is {}, expected at most 1073741824", 1_u64 << 42)
        );
        assert_eq!(
            message(Merge { outs_strides: [320, 64, 16, 2], ..good() }),
            "`outs` has strides [320, 64, 16, 2], expected the last dimension contiguous (stride 1)"
        );
        assert_eq!(
            message(Merge { out_strides: [64, 8, 1], ..good() }),
            "`out` has strides [64, 8, 1], expected rows that do not overlap"
        );
        assert_eq!(
            message(Merge { outs_strides: [usize::MAX / 2, 64, 16, 1], ..good() }),
            format!("`outs` has strides [{}, 64, 16, 1], expected rows within 2^63 bytes", usize::MAX / 2)
        );
    }
}
