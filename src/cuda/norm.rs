//! RMS norm and layer norm on the GPU, with the residual addition before them.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::norm as kernels;
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::cuda::rows::{Rows, Twins, check_output_stride, check_sizes, stride_bytes, strides_aligned};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result, check_len, check_presence, why};
use crate::spec::{Norm, NormKind};
use crate::view::check_disjoint;

/// What to compute, with `h = residual_multiplier * x + residual`, or `h = x` without a residual:
///
/// ```text
/// rms:    out = h / sqrt(mean(h^2) + eps) * (weight + weight_offset)
/// layer:  out = (h - mean(h)) / sqrt(mean((h - mean(h))^2) + eps) * (weight + weight_offset) + bias
/// ```
///
/// * `x`, `out`: `[rows[0], rows[1], rows[2], hidden_size]`, each with its own strides
/// * `residual`, `residual_out`: `[num_tokens, hidden_size]`, each with its own distance between rows
/// * `weight`, `bias`: `[hidden_size]`; without a weight, the factor is 1 and `weight_offset` has no effect
///
/// With a residual, `h` is rounded to the element type, stored in `residual_out`, and normalised as stored: the same
/// bits as an addition followed by a norm.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct NormProblem {
    /// Kind, epsilon, weight offset, and whether there is a bias.
    pub norm: Norm,
    /// Element type of activations: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Element type of `weight` and `bias`: f32 or `dtype`.
    pub weight_dtype: Dtype,
    /// Leading dimensions, slowest first; 0 is legal. With a residual the first two are 1.
    pub rows: [usize; 3],
    /// Columns.
    pub hidden_size: usize,
    /// Factor on `x` where there is a residual.
    pub residual_multiplier: f64,
    /// Elements between neighbours of `x` in each leading dimension.
    pub x_strides: [usize; 3],
    /// Elements between neighbours of `out` in each leading dimension.
    pub out_strides: [usize; 3],
    /// Elements from one row of `residual` to the next.
    pub residual_stride: usize,
    /// Elements from one row of `residual_out` to the next.
    pub residual_out_stride: usize,
}

impl NormProblem {
    /// Contiguous rows, weights in f32, `x` added to the residual as it is.
    pub fn new(norm: Norm, dtype: Dtype, num_tokens: usize, hidden_size: usize) -> Self {
        NormProblem {
            norm,
            dtype,
            weight_dtype: Dtype::F32,
            rows: [1, 1, num_tokens],
            hidden_size,
            residual_multiplier: 1.0,
            x_strides: [0, 0, hidden_size],
            out_strides: [0, 0, hidden_size],
            residual_stride: hidden_size,
            residual_out_stride: hidden_size,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NormArgs {
    /// Read.
    pub x: u64,
    /// Read, where there is one.
    pub weight: Option<u64>,
    /// Read, where the norm has one.
    pub bias: Option<u64>,
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

impl NormArgs {
    /// A norm without weight, bias and residual.
    pub fn new(x: u64, out: u64) -> Self {
        NormArgs { x, weight: None, bias: None, residual: None, out }
    }

    /// The same with a weight.
    pub fn with_weight(self, weight: u64) -> Self {
        NormArgs { weight: Some(weight), ..self }
    }

    /// The same with a bias.
    pub fn with_bias(self, bias: u64) -> Self {
        NormArgs { bias: Some(bias), ..self }
    }

    /// The same with a residual.
    pub fn with_residual(self, input: u64, output: u64) -> Self {
        NormArgs { residual: Some(ResidualArgs { input, output }), ..self }
    }
}

/// [`NormProblem`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NormPlan {
    kind: NormKind,
    bias: bool,
    dtype: Dtype,
    weight_dtype: Dtype,
    rows: [usize; 3],
    hidden_size: usize,
    // Three numbers by their bits, so that plans are equal and hash.
    epsilon: u32,
    weight_offset: u32,
    residual_multiplier: u32,
    x_strides_bytes: [u64; 3],
    out_strides_bytes: [u64; 3],
    residual_stride_bytes: u64,
    residual_out_stride_bytes: u64,
    kernels: Twins,
}

impl NormPlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// Those of [`Norm::validate`]; [`Error::Dtype`]; [`Error::Value`] if `hidden_size` is 0 or above 2^30, there are more than
    /// 2^31 - 1 rows, or a number of `norm` or `residual_multiplier` is out of its range in f32; [`Error::Stride`] if rows of
    /// an output overlap or rows leave the address space.
    pub fn new(problem: &NormProblem) -> Result<Self> {
        let &NormProblem { norm, dtype, weight_dtype, rows, hidden_size, x_strides, out_strides, .. } = problem;
        norm.validate()?;
        let num_rows = rows.iter().try_fold(1usize, |product, n| product.checked_mul(*n)).unwrap_or(usize::MAX);
        let num_rows = if rows.contains(&0) { 0 } else { num_rows };
        check_sizes(("num_tokens", num_rows), ("hidden_size", hidden_size))?;
        let single = |name, value: f64| match value as f32 {
            single if single.is_finite() => Ok(single.to_bits()),
            _ => Err(Error::value(name, "a finite number in f32", value)),
        };
        let epsilon = single("norm.eps", norm.eps)?;
        let weight_offset = single("norm.weight_offset", norm.weight_offset)?;
        let residual_multiplier = single("residual_multiplier", problem.residual_multiplier)?;
        let [a, b, c] = rows;
        let [sa, sb, sc] = out_strides;
        check_disjoint("out", &[a, b, c, hidden_size], &[sa, sb, sc, 1])?;
        check_output_stride("residual_out", num_rows, hidden_size, problem.residual_out_stride)?;
        let with_dtype = || kernels::INSTANCES.iter().filter(|i| i.dtype == dtype);
        let instance = |aligned| with_dtype().find(|i| i.weight == weight_dtype && i.aligned == aligned);
        let (Some(aligned), Some(unaligned)) = (instance(true), instance(false)) else {
            let (argument, expected, found) = match with_dtype().next() {
                None => ("x, residual and out", "bf16, f16 or f32".into(), dtype),
                Some(_) => ("weight", format!("f32 or {dtype}"), weight_dtype),
            };
            return Err(Error::Dtype { argument: argument.into(), expected, found: found.to_string() });
        };
        let strides_bytes = |name, strides: [usize; 3]| -> Result<[u64; 3]> {
            let mut bytes = [0; 3];
            let mut extent = 0u64;
            for ((bytes, stride), n) in bytes.iter_mut().zip(strides).zip(rows) {
                *bytes = stride_bytes(name, dtype, n, stride)?;
                extent = extent.saturating_add(*bytes * n as u64);
            }
            if extent > i64::MAX as u64 {
                let [a, b, c] = strides;
                let expected = "rows within 2^63 bytes".into();
                return Err(Error::Stride { argument: name.into(), expected, found: vec![a, b, c, 1] });
            }
            Ok(bytes)
        };
        let x_strides_bytes = strides_bytes("x", x_strides)?;
        let out_strides_bytes = strides_bytes("out", out_strides)?;
        let residual_stride_bytes = stride_bytes("residual", dtype, num_rows, problem.residual_stride)?;
        let residual_out_stride_bytes = stride_bytes("residual_out", dtype, num_rows, problem.residual_out_stride)?;
        let can_align = strides_aligned((hidden_size * dtype.size_bytes()) as u64, &x_strides_bytes)
            && strides_aligned(0, &out_strides_bytes)
            && strides_aligned(0, &[residual_stride_bytes, residual_out_stride_bytes]);
        Ok(NormPlan {
            kind: norm.kind,
            bias: norm.bias,
            dtype,
            weight_dtype,
            rows,
            hidden_size,
            epsilon,
            weight_offset,
            residual_multiplier,
            x_strides_bytes,
            out_strides_bytes,
            residual_stride_bytes,
            residual_out_stride_bytes,
            kernels: Twins::new(can_align, &aligned.kernel, &unaligned.kernel),
        })
    }

    /// Name of the kernel that runs when all pointers are multiples of 16. Others take its `_unaligned` twin, with the
    /// same bits.
    pub fn kernel(&self) -> &'static str {
        self.kernels.name()
    }

    /// Device memory that [`NormPlan::launch`] needs besides its arguments.
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

    /// Queues the work on a stream. Does not wait; after [`NormPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Presence`] for a bias that the norm does not have, or lacks; [`Error::Unsupported`] for a residual with rows in
    /// more than one dimension; [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if an
    /// output shares memory with another array other than row for row; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shape and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the outputs meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &NormArgs, stream: Stream) -> Result<()> {
        let [outer, middle, inner] = self.rows;
        let num_rows = outer * middle * inner; // at most 2^31 - 1, seen by `new`
        if num_rows == 0 {
            return Ok(());
        }
        check_presence("bias", args.bias, self.bias, why::NORM_BIAS)?;
        if args.residual.is_some() && outer * middle != 1 {
            return Err(Error::unsupported("cuda", "a residual with rows in more than one dimension"));
        }
        let row_bytes = (self.hidden_size * self.dtype.size_bytes()) as u64;
        let x = self.array("x", args.x, self.x_strides_bytes);
        let out = self.array("out", args.out, self.out_strides_bytes);
        let vector = |name, ptr| {
            let row_bytes = (self.hidden_size * self.weight_dtype.size_bytes()) as u64;
            Rows { name, ptr, num_rows: 1, row_bytes, stride_bytes: 0 }
        };
        let weight = args.weight.map(|ptr| vector("weight", ptr));
        let bias = args.bias.map(|ptr| vector("bias", ptr));
        let rows = |name, ptr, stride_bytes| Rows { name, ptr, num_rows, row_bytes, stride_bytes };
        let residual = args.residual.map(|residual| {
            let input = rows("residual", residual.input, self.residual_stride_bytes);
            (input, rows("residual_out", residual.output, self.residual_out_stride_bytes))
        });
        let (input, output) = residual.unzip();
        [Some(x), Some(out), input, output].iter().flatten().try_for_each(|rows| rows.check(self.dtype))?;
        [weight, bias].iter().flatten().try_for_each(|vector| vector.check(self.weight_dtype))?;
        // In several dimensions, arrays are the same if all their strides are.
        let in_place = out.ptr == x.ptr && self.x_strides_bytes == self.out_strides_bytes;
        if !in_place {
            out.check_same_or_separate(&x)?;
        }
        for written in [Some(out), output].iter().flatten() {
            [weight, bias].iter().flatten().try_for_each(|vector| written.check_separate(vector))?;
        }
        if let Some((input, output)) = residual {
            [x, input].iter().try_for_each(|read| output.check_same_or_separate(read))?;
            out.check_same_or_separate(&input)?;
            out.check_separate(&output)?;
        }
        let kernel =
            self.kernels.pick([Some(x), Some(out), weight, bias, input, output].iter().flatten().all(Rows::aligned));
        let [x_stride0_bytes, x_stride1_bytes, x_stride2_bytes] = self.x_strides_bytes;
        let [out_stride0_bytes, out_stride1_bytes, out_stride2_bytes] = self.out_strides_bytes;
        let params = kernels::Params {
            x_ptr: x.ptr,
            residual_ptr: input.map_or(0, |rows| rows.ptr),
            weight_ptr: args.weight.unwrap_or(0),
            bias_ptr: args.bias.unwrap_or(0),
            out_ptr: out.ptr,
            residual_out_ptr: output.map_or(0, |rows| rows.ptr),
            x_stride0_bytes,
            x_stride1_bytes,
            x_stride2_bytes,
            out_stride0_bytes,
            out_stride1_bytes,
            out_stride2_bytes,
            residual_stride_bytes: self.residual_stride_bytes,
            residual_out_stride_bytes: self.residual_out_stride_bytes,
            rows1: middle as u32,
            rows2: inner as u32,
            hidden_size: self.hidden_size as u32, // at most 2^30, seen by `new`
            centered: u32::from(self.kind == NormKind::Layer),
            epsilon: f32::from_bits(self.epsilon),
            weight_offset: f32::from_bits(self.weight_offset),
            residual_multiplier: f32::from_bits(self.residual_multiplier),
        };
        let launch = Launch::grid([num_rows as u32, 1, 1]);
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the rows that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream) }
    }

    /// `x` or `out`, as rows of one stride where they are, else as one row from the first element to the last.
    fn array(&self, name: &'static str, ptr: u64, strides_bytes: [u64; 3]) -> Rows {
        let row_bytes = (self.hidden_size * self.dtype.size_bytes()) as u64;
        let [outer, middle, inner] = self.rows;
        if outer * middle == 1 {
            return Rows { name, ptr, num_rows: inner, row_bytes, stride_bytes: strides_bytes[2] };
        }
        let last: u64 = self.rows.iter().zip(strides_bytes).map(|(n, stride)| (*n as u64 - 1) * stride).sum();
        Rows { name, ptr, num_rows: 1, row_bytes: last + row_bytes, stride_bytes: 0 }
    }
}

/// RMS norm or layer norm over the last dimension, one rounding to `T` at the end. No row is a legal call, and so are rows of no
/// columns.
///
/// ```text
/// rms:    out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
/// layer:  out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * (weight + weight_offset) + bias
/// ```
///
/// * `x`, `out`: `[.., width]`, at most three leading dimensions; `weight`, `bias`: `[width]`. Without a weight there is no
///   factor at all.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Presence`] for a bias that the specification does not have, or
/// lacks; [`Error::Unsupported`] for more leading dimensions; those of [`NormPlan::new`] and [`NormPlan::launch`]. Nothing is
/// written then.
pub fn norm<T: Element, const N: usize>(
    queue: &mut Queue<'_>,
    spec: &Norm,
    x: DeviceView<'_, T, N>,
    weight: Option<DeviceView<'_, f32, 1>>,
    bias: Option<DeviceView<'_, f32, 1>>,
    out: DeviceViewMut<'_, T, N>,
) -> Result<()> {
    let home = |view: Option<DeviceView<'_, f32, 1>>| view.and_then(|view| view.home());
    queue.check_homes(&[x.home(), home(weight), home(bias), out.home()])?;
    spec.validate()?;
    let (shape, width) = (x.shape(), x.shape()[N - 1]);
    x.check("x", shape)?;
    for (name, vector) in [("weight", weight), ("bias", bias)] {
        if let Some(vector) = vector {
            check_len(name, vector.shape()[0], width)?;
            vector.check(name, [width])?;
        }
    }
    check_presence("bias", bias, spec.bias, why::NORM_BIAS)?;
    out.check("out", shape)?;
    if shape.contains(&0) {
        return Ok(());
    }
    if N > 4 {
        return Err(Error::unsupported("cuda", "a norm of an array with more than three leading dimensions"));
    }
    let mut problem = NormProblem::new(*spec, T::DTYPE, 1, width);
    for (i, at) in (0..N - 1).rev().zip((0..3).rev()) {
        problem.rows[at] = shape[i];
        problem.x_strides[at] = x.strides()[i];
        problem.out_strides[at] = out.strides()[i];
    }
    let plan = NormPlan::new(&problem)?;
    let mut args = NormArgs::new(x.ptr(), out.ptr());
    args.weight = weight.map(|weight| weight.ptr());
    args.bias = bias.map(|bias| bias.ptr());
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(dtype: Dtype, hidden_size: usize) -> NormProblem {
        NormProblem::new(Norm::rms(1e-6), dtype, 3, hidden_size)
    }

    #[test]
    fn kernels() {
        let kernel = |problem: &NormProblem| NormPlan::new(problem).unwrap().kernel();
        assert_eq!(kernel(&problem(Dtype::BF16, 2048)), "gatefold_norm_bf16_f32");
        assert_eq!(kernel(&problem(Dtype::F16, 2047)), "gatefold_norm_f16_f32_unaligned");
        assert_eq!(kernel(&problem(Dtype::F32, 2044)), "gatefold_norm_f32");
        let own = NormProblem { weight_dtype: Dtype::BF16, ..problem(Dtype::BF16, 2048) };
        assert_eq!(kernel(&own), "gatefold_norm_bf16");
        let heads = NormProblem { rows: [2, 3, 4], x_strides: [800, 7, 100], ..problem(Dtype::F32, 64) };
        let heads = NormProblem { out_strides: [12 * 64, 4 * 64, 64], ..heads };
        assert_eq!(kernel(&heads), "gatefold_norm_f32_unaligned");
        assert_eq!(kernel(&NormProblem { x_strides: [800, 8, 100], ..heads }), "gatefold_norm_f32");
    }

    #[test]
    fn bad_shapes() {
        let message = |problem: NormProblem| NormPlan::new(&problem).unwrap_err().to_string();
        let good = || problem(Dtype::BF16, 8);
        assert_eq!(
            message(problem(Dtype::F64, 8)),
            "`x, residual and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(
            message(NormProblem { weight_dtype: Dtype::F16, ..good() }),
            "`weight` has element type f16, expected f32 or bf16"
        );
        assert_eq!(
            message(problem(Dtype::F32, (1 << 30) + 1)),
            "`hidden_size` is 1073741825, expected 1 to 1073741824"
        );
        assert_eq!(
            message(NormProblem { rows: [1 << 20, 1 << 20, 1 << 30], ..good() }),
            format!("`num_tokens` is {}, expected at most 2147483647", usize::MAX)
        );
        assert_eq!(
            message(NormProblem { norm: Norm::rms(1e300), ..good() }),
            format!("`norm.eps` is {}, expected a finite number in f32", 1e300)
        );
        assert_eq!(
            message(NormProblem { residual_multiplier: f64::NAN, ..good() }),
            "`residual_multiplier` is NaN, expected a finite number in f32"
        );
        assert_eq!(
            message(NormProblem { residual_out_stride: 0, ..good() }),
            "`residual_out` has strides [0, 1], expected rows that do not overlap (at least 8 apart)"
        );
        assert_eq!(
            message(NormProblem { rows: [2, 1, 3], out_strides: [8, 0, 8], ..good() }),
            "`out` has strides [8, 0, 8, 1], expected rows that do not overlap"
        );
        assert_eq!(
            message(NormProblem {
                rows: [2, 2, 2],
                x_strides: [1 << 60, 1 << 60, 8],
                out_strides: [32, 16, 8],
                ..good()
            }),
            format!("`x` has strides [{0}, {0}, 8, 1], expected rows within 2^63 bytes", 1usize << 60)
        );
    }
}
