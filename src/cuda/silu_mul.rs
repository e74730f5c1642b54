//! The gated activation on the GPU: `silu(gate) * up`.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, silu_mul as kernels};
use crate::cuda::rows::{Rows, check_output_stride, check_sizes, stride_bytes, strides_aligned};
use crate::element::Dtype;
use crate::error::{Error, Result};

/// What to compute: `out[t, i] = silu(gate[t, i]) * up[t, i]`, where `silu(g) = g / (1 + exp(-g))`.
///
/// `gate`, `up`, `out`: `[num_tokens, intermediate_size]`, each with its own distance between rows, so `gate` and `up`
/// may be the halves of one matrix.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct SiluMul {
    /// Element type of all three: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Columns.
    pub intermediate_size: usize,
    /// Elements from one row of `gate` to the next.
    pub gate_stride: usize,
    /// Elements from one row of `up` to the next.
    pub up_stride: usize,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl SiluMul {
    /// Three contiguous matrices.
    pub fn new(dtype: Dtype, num_tokens: usize, intermediate_size: usize) -> Self {
        let stride = intermediate_size;
        SiluMul { dtype, num_tokens, intermediate_size, gate_stride: stride, up_stride: stride, out_stride: stride }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SiluMulArgs {
    /// Read.
    pub gate: u64,
    /// Read.
    pub up: u64,
    /// Written; may be `gate` or `up` itself.
    pub out: u64,
}

impl SiluMulArgs {
    /// Pointers by value.
    pub fn new(gate: u64, up: u64, out: u64) -> Self {
        SiluMulArgs { gate, up, out }
    }
}

/// [`SiluMul`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SiluMulPlan {
    problem: SiluMul,
    gate_stride_bytes: u64,
    up_stride_bytes: u64,
    out_stride_bytes: u64,
    grid: [u32; 3],
    /// For rows that begin at multiples of 16 bytes; `None` where widths and strides rule that out.
    aligned: Option<&'static Kernel>,
    /// For any rows; the same bits.
    unaligned: &'static Kernel,
}

impl SiluMulPlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// [`Error::Dtype`]; [`Error::Value`] if `intermediate_size` is 0 or above 2^30, or `num_tokens` above 2^31 - 1;
    /// [`Error::Stride`] if rows of `out` overlap or rows leave the address space.
    pub fn new(problem: &SiluMul) -> Result<Self> {
        let &SiluMul { dtype, num_tokens, intermediate_size, gate_stride, up_stride, out_stride } = problem;
        check_sizes(("num_tokens", num_tokens), ("intermediate_size", intermediate_size))?;
        check_output_stride("out", num_tokens, intermediate_size, out_stride)?;
        let instance = |aligned| kernels::INSTANCES.iter().find(|i| i.dtype == dtype && i.aligned == aligned);
        let (Some(aligned), Some(unaligned)) = (instance(true), instance(false)) else {
            return Err(Error::Dtype {
                argument: "gate, up and out".into(),
                expected: "bf16, f16 or f32".into(),
                found: dtype.to_string(),
            });
        };
        let gate_stride_bytes = stride_bytes("gate", dtype, num_tokens, gate_stride)?;
        let up_stride_bytes = stride_bytes("up", dtype, num_tokens, up_stride)?;
        let out_stride_bytes = stride_bytes("out", dtype, num_tokens, out_stride)?;
        let row_bytes = (intermediate_size * dtype.size_bytes()) as u64;
        let can_align = strides_aligned(row_bytes, &[gate_stride_bytes, up_stride_bytes, out_stride_bytes]);
        let tiles = intermediate_size.div_ceil(aligned.cols_per_cta as usize) as u32;
        if tiles > 65535 {
            let expected = format!("at most {}", 65535 * aligned.cols_per_cta);
            return Err(Error::value("intermediate_size", expected, intermediate_size));
        }
        Ok(SiluMulPlan {
            problem: problem.clone(),
            gate_stride_bytes,
            up_stride_bytes,
            out_stride_bytes,
            grid: [num_tokens as u32, tiles, 1],
            aligned: can_align.then_some(&aligned.kernel),
            unaligned: &unaligned.kernel,
        })
    }

    /// Name of the kernel that runs when all pointers are multiples of 16. Others take its `_unaligned` twin, with the
    /// same bits.
    pub fn kernel(&self) -> &'static str {
        self.aligned.unwrap_or(self.unaligned).entry
    }

    /// Device memory that [`SiluMulPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        0
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.aligned.iter().chain([&self.unaligned]).try_for_each(|kernel| driver.load(kernel))
    }

    /// Queues the work on a stream. Does not wait; after [`SiluMulPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if `out` shares memory with
    /// `gate` or `up` other than row for row; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shape and strides, valid until the work has ended;
    /// no other work writes `gate` and `up` or touches `out` meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &SiluMulArgs, stream: Stream) -> Result<()> {
        let num_rows = self.problem.num_tokens;
        if num_rows == 0 {
            return Ok(());
        }
        let dtype = self.problem.dtype;
        let row_bytes = (self.problem.intermediate_size * dtype.size_bytes()) as u64;
        let rows = |name, ptr, stride_bytes| Rows { name, ptr, num_rows, row_bytes, stride_bytes };
        let gate = rows("gate", args.gate, self.gate_stride_bytes);
        let up = rows("up", args.up, self.up_stride_bytes);
        let out = rows("out", args.out, self.out_stride_bytes);
        [gate, up, out].iter().try_for_each(|rows| rows.check(dtype))?;
        [gate, up].iter().try_for_each(|input| out.check_same_or_separate(input))?;
        let kernel = match self.aligned {
            Some(kernel) if [gate, up, out].iter().all(Rows::aligned) => kernel,
            _ => self.unaligned,
        };
        let params = kernels::Params {
            gate_ptr: gate.ptr,
            up_ptr: up.ptr,
            out_ptr: out.ptr,
            gate_stride_bytes: gate.stride_bytes,
            up_stride_bytes: up.stride_bytes,
            out_stride_bytes: out.stride_bytes,
            intermediate_size: self.problem.intermediate_size as u32, // at most 2^30, seen by `new`
        };
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the rows that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(kernel, &Launch::grid(self.grid), &params.to_bytes(), stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels() {
        let plan = |dtype, width| SiluMulPlan::new(&SiluMul::new(dtype, 3, width)).unwrap();
        assert_eq!(plan(Dtype::BF16, 768).kernel(), "gatefold_silu_mul_bf16");
        assert_eq!(plan(Dtype::BF16, 769).kernel(), "gatefold_silu_mul_bf16_unaligned");
        assert_eq!(plan(Dtype::F32, 4).kernel(), "gatefold_silu_mul_f32");
        assert_eq!(plan(Dtype::F16, 4).kernel(), "gatefold_silu_mul_f16_unaligned");
        assert_eq!(plan(Dtype::F16, 1025).grid, [3, 2, 1]);
        assert_eq!(plan(Dtype::F32, 513).grid, [3, 2, 1]);
    }

    #[test]
    fn bad_shapes() {
        let message = |problem: &SiluMul| SiluMulPlan::new(problem).unwrap_err().to_string();
        assert_eq!(
            message(&SiluMul::new(Dtype::F64, 1, 8)),
            "`gate, up and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(message(&SiluMul::new(Dtype::F32, 1, 0)), "`intermediate_size` is 0, expected 1 to 1073741824");
        assert_eq!(
            message(&SiluMul::new(Dtype::F32, 1 << 31, 8)),
            "`num_tokens` is 2147483648, expected at most 2147483647"
        );
        assert_eq!(
            message(&SiluMul { out_stride: 7, ..SiluMul::new(Dtype::F32, 2, 8) }),
            "`out` has strides [7, 1], expected rows that do not overlap (at least 8 apart)"
        );
        assert_eq!(
            message(&SiluMul { gate_stride: usize::MAX, ..SiluMul::new(Dtype::F32, 2, 8) }),
            format!("`gate` has strides [{}, 1], expected rows within 2^63 bytes", usize::MAX)
        );
    }
}
