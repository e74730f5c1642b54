//! RMS norm on the GPU, with the residual addition before it.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, rms_norm as kernels};
use crate::cuda::rows::{Rows, check_output_stride, check_sizes, stride_bytes, strides_aligned};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::{Norm, NormKind};

/// What to compute, with `h = residual_multiplier * x + residual`, or `h = x` without a residual:
///
/// `out[t, i] = h[t, i] / sqrt(mean_i(h[t, i]^2) + eps) * (weight[i] + weight_offset)`
///
/// * `x`, `residual`, `residual_out`, `out`: `[num_tokens, hidden_size]`, each with its own distance between rows
/// * `weight`: `[hidden_size]`; without one, the factor is 1 and `weight_offset` has no effect
///
/// With a residual, `h` is rounded to the element type, stored in `residual_out`, and normalised as stored: the same
/// bits as an addition followed by a norm.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RmsNorm {
    /// Epsilon and weight offset.
    pub norm: Norm,
    /// Element type of activations: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Element type of `weight`: f32 or `dtype`.
    pub weight_dtype: Dtype,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Columns.
    pub hidden_size: usize,
    /// Factor on `x` where there is a residual.
    pub residual_multiplier: f64,
    /// Elements from one row of `x` to the next.
    pub x_stride: usize,
    /// Elements from one row of `residual` to the next.
    pub residual_stride: usize,
    /// Elements from one row of `residual_out` to the next.
    pub residual_out_stride: usize,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl RmsNorm {
    /// Contiguous arrays, weights in f32, `x` added to the residual as it is.
    pub fn new(norm: Norm, dtype: Dtype, num_tokens: usize, hidden_size: usize) -> Self {
        RmsNorm {
            norm,
            dtype,
            weight_dtype: Dtype::F32,
            num_tokens,
            hidden_size,
            residual_multiplier: 1.0,
            x_stride: hidden_size,
            residual_stride: hidden_size,
            residual_out_stride: hidden_size,
            out_stride: hidden_size,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RmsNormArgs {
    /// Read.
    pub x: u64,
    /// Read, where there is one.
    pub weight: Option<u64>,
    /// Read and written, where there are residuals.
    pub residual: Option<ResidualArgs>,
    /// Written; may be `x` or the residual's input itself.
    pub out: u64,
}

/// Device pointers of a residual connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidualArgs {
    /// `residual`, read.
    pub input: u64,
    /// `residual_out`, written; may be `x` or `input` itself.
    pub output: u64,
}

impl RmsNormArgs {
    /// A norm without weight and residual.
    pub fn new(x: u64, out: u64) -> Self {
        RmsNormArgs { x, weight: None, residual: None, out }
    }

    /// The same with a weight.
    pub fn with_weight(self, weight: u64) -> Self {
        RmsNormArgs { weight: Some(weight), ..self }
    }

    /// The same with a residual.
    pub fn with_residual(self, input: u64, output: u64) -> Self {
        RmsNormArgs { residual: Some(ResidualArgs { input, output }), ..self }
    }
}

/// [`RmsNorm`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RmsNormPlan {
    dtype: Dtype,
    weight_dtype: Dtype,
    num_tokens: usize,
    hidden_size: usize,
    // Three numbers by their bits, so that plans are equal and hash.
    epsilon: u32,
    weight_offset: u32,
    residual_multiplier: u32,
    x_stride_bytes: u64,
    residual_stride_bytes: u64,
    residual_out_stride_bytes: u64,
    out_stride_bytes: u64,
    /// For rows that begin at multiples of 16 bytes; `None` where widths and strides rule that out.
    aligned: Option<&'static Kernel>,
    /// For any rows; the same bits.
    unaligned: &'static Kernel,
}

impl RmsNormPlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// [`Error::Dtype`]; [`Error::Unsupported`] if `norm` is a layer norm; [`Error::Value`] if `hidden_size` is 0 or above
    /// 2^30, `num_tokens` above 2^31 - 1, or a number of `norm` or `residual_multiplier` is out of its range in f32;
    /// [`Error::Stride`] if rows of an output overlap or rows leave the address space.
    pub fn new(problem: &RmsNorm) -> Result<Self> {
        let &RmsNorm { norm, dtype, weight_dtype, num_tokens, hidden_size, .. } = problem;
        norm.validate()?;
        if norm.kind != NormKind::Rms {
            return Err(Error::unsupported("cuda", "a layer norm"));
        }
        check_sizes(("num_tokens", num_tokens), ("hidden_size", hidden_size))?;
        let single = |name, value: f64| match value as f32 {
            single if single.is_finite() => Ok(single.to_bits()),
            _ => Err(Error::value(name, "a finite number in f32", value)),
        };
        let epsilon = single("norm.eps", norm.eps)?;
        let weight_offset = single("norm.weight_offset", norm.weight_offset)?;
        let residual_multiplier = single("residual_multiplier", problem.residual_multiplier)?;
        check_output_stride("out", num_tokens, hidden_size, problem.out_stride)?;
        check_output_stride("residual_out", num_tokens, hidden_size, problem.residual_out_stride)?;
        let with_dtype = || kernels::INSTANCES.iter().filter(|i| i.dtype == dtype);
        let instance = |aligned| with_dtype().find(|i| i.weight == weight_dtype && i.aligned == aligned);
        let (Some(aligned), Some(unaligned)) = (instance(true), instance(false)) else {
            let (argument, expected, found) = match with_dtype().next() {
                None => ("x, residual and out", "bf16, f16 or f32".into(), dtype),
                Some(_) => ("weight", format!("f32 or {dtype}"), weight_dtype),
            };
            return Err(Error::Dtype { argument: argument.into(), expected, found: found.to_string() });
        };
        let bytes = |name, stride| stride_bytes(name, dtype, num_tokens, stride);
        let x_stride_bytes = bytes("x", problem.x_stride)?;
        let residual_stride_bytes = bytes("residual", problem.residual_stride)?;
        let residual_out_stride_bytes = bytes("residual_out", problem.residual_out_stride)?;
        let out_stride_bytes = bytes("out", problem.out_stride)?;
        let can_align = strides_aligned(
            (hidden_size * dtype.size_bytes()) as u64,
            &[x_stride_bytes, residual_stride_bytes, residual_out_stride_bytes, out_stride_bytes],
        );
        Ok(RmsNormPlan {
            dtype,
            weight_dtype,
            num_tokens,
            hidden_size,
            epsilon,
            weight_offset,
            residual_multiplier,
            x_stride_bytes,
            residual_stride_bytes,
            residual_out_stride_bytes,
            out_stride_bytes,
            aligned: can_align.then_some(&aligned.kernel),
            unaligned: &unaligned.kernel,
        })
    }

    /// Name of the kernel that runs when all pointers are multiples of 16. Others take its `_unaligned` twin, with the
    /// same bits.
    pub fn kernel(&self) -> &'static str {
        self.aligned.unwrap_or(self.unaligned).entry
    }

    /// Device memory that [`RmsNormPlan::launch`] needs besides its arguments.
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

    /// Queues the work on a stream. Does not wait; after [`RmsNormPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if an output shares memory
    /// with another array other than row for row; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shape and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the outputs meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &RmsNormArgs, stream: Stream) -> Result<()> {
        let num_rows = self.num_tokens;
        if num_rows == 0 {
            return Ok(());
        }
        let row_bytes = (self.hidden_size * self.dtype.size_bytes()) as u64;
        let rows = |name, ptr, stride_bytes| Rows { name, ptr, num_rows, row_bytes, stride_bytes };
        let x = rows("x", args.x, self.x_stride_bytes);
        let out = rows("out", args.out, self.out_stride_bytes);
        let weight = args.weight.map(|ptr| Rows {
            name: "weight",
            ptr,
            num_rows: 1,
            row_bytes: (self.hidden_size * self.weight_dtype.size_bytes()) as u64,
            stride_bytes: 0,
        });
        let residual = args.residual.map(|residual| {
            let input = rows("residual", residual.input, self.residual_stride_bytes);
            (input, rows("residual_out", residual.output, self.residual_out_stride_bytes))
        });
        let (input, output) = residual.unzip();
        [Some(x), Some(out), input, output].iter().flatten().try_for_each(|rows| rows.check(self.dtype))?;
        weight.iter().try_for_each(|weight| weight.check(self.weight_dtype))?;
        for written in [Some(out), output].iter().flatten() {
            [Some(x), input].iter().flatten().try_for_each(|read| written.check_same_or_separate(read))?;
            weight.iter().try_for_each(|weight| written.check_separate(weight))?;
        }
        output.iter().try_for_each(|output| out.check_separate(output))?;
        let kernel = match self.aligned {
            Some(kernel) if [Some(x), Some(out), weight, input, output].iter().flatten().all(Rows::aligned) => kernel,
            _ => self.unaligned,
        };
        let params = kernels::Params {
            x_ptr: x.ptr,
            residual_ptr: input.map_or(0, |rows| rows.ptr),
            weight_ptr: args.weight.unwrap_or(0),
            out_ptr: out.ptr,
            residual_out_ptr: output.map_or(0, |rows| rows.ptr),
            x_stride_bytes: self.x_stride_bytes,
            residual_stride_bytes: self.residual_stride_bytes,
            out_stride_bytes: self.out_stride_bytes,
            residual_out_stride_bytes: self.residual_out_stride_bytes,
            hidden_size: self.hidden_size as u32, // at most 2^30, seen by `new`
            epsilon: f32::from_bits(self.epsilon),
            weight_offset: f32::from_bits(self.weight_offset),
            residual_multiplier: f32::from_bits(self.residual_multiplier),
        };
        let launch = Launch::grid([num_rows as u32, 1, 1]); // at most 2^31 - 1, seen by `new`
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the rows that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(dtype: Dtype, hidden_size: usize) -> RmsNorm {
        RmsNorm::new(Norm::rms(1e-6), dtype, 3, hidden_size)
    }

    #[test]
    fn kernels() {
        let kernel = |problem: &RmsNorm| RmsNormPlan::new(problem).unwrap().kernel();
        assert_eq!(kernel(&problem(Dtype::BF16, 2048)), "gatefold_rms_norm_bf16_f32");
        assert_eq!(kernel(&problem(Dtype::F16, 2047)), "gatefold_rms_norm_f16_f32_unaligned");
        assert_eq!(kernel(&problem(Dtype::F32, 2044)), "gatefold_rms_norm_f32");
        let own = RmsNorm { weight_dtype: Dtype::BF16, ..problem(Dtype::BF16, 2048) };
        assert_eq!(kernel(&own), "gatefold_rms_norm_bf16");
    }

    #[test]
    fn bad_shapes() {
        let message = |problem: RmsNorm| RmsNormPlan::new(&problem).unwrap_err().to_string();
        let good = || problem(Dtype::BF16, 8);
        assert_eq!(
            message(problem(Dtype::F64, 8)),
            "`x, residual and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(
            message(RmsNorm { weight_dtype: Dtype::F16, ..good() }),
            "`weight` has element type f16, expected f32 or bf16"
        );
        assert_eq!(
            message(problem(Dtype::F32, (1 << 30) + 1)),
            "`hidden_size` is 1073741825, expected 1 to 1073741824"
        );
        assert_eq!(message(RmsNorm { norm: Norm::layer(1e-6), ..good() }), "unsupported by cuda: a layer norm");
        assert_eq!(
            message(RmsNorm { norm: Norm::rms(1e300), ..good() }),
            format!("`norm.eps` is {}, expected a finite number in f32", 1e300)
        );
        assert_eq!(
            message(RmsNorm { residual_multiplier: f64::NAN, ..good() }),
            "`residual_multiplier` is NaN, expected a finite number in f32"
        );
        assert_eq!(
            message(RmsNorm { residual_out_stride: 0, ..good() }),
            "`residual_out` has strides [0, 1], expected rows that do not overlap (at least 8 apart)"
        );
    }
}
