//! Two matrices into one, element by element: the residual sum, the output gate, the gated activation.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::elementwise as kernels;
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::cuda::rows::{Rows, Twins, check_output_stride, check_sizes, stride_bytes, strides_aligned};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};

/// Which function of two elements.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ElementwiseOp {
    /// `out = x + multiplier * y`
    #[non_exhaustive]
    Add {
        /// Factor on `y`.
        multiplier: f64,
    },
    /// `out = x * sigmoid(gate)`, where `gate` is the second matrix.
    SigmoidMul,
    /// `out = silu(gate) * up`, where `silu(g) = g * sigmoid(g)`, `gate` is the first matrix and `up` the second.
    SiluMul,
}

impl ElementwiseOp {
    /// [`ElementwiseOp::Add`].
    pub const fn add(multiplier: f64) -> Self {
        ElementwiseOp::Add { multiplier }
    }

    /// What the two matrices are called.
    const fn names(self) -> [&'static str; 2] {
        match self {
            ElementwiseOp::Add { .. } => ["x", "y"],
            ElementwiseOp::SigmoidMul => ["x", "gate"],
            ElementwiseOp::SiluMul => ["gate", "up"],
        }
    }
}

/// What to compute: `out[t, i] = op(x[t, i], y[t, i])`.
///
/// `x`, `y`, `out`: `[num_tokens, width]`, each with its own distance between rows, so `x` and `y` may be the halves of one
/// matrix. In errors they go by the names that `op` gives them.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ElementwiseProblem {
    /// The function.
    pub op: ElementwiseOp,
    /// Element type of all three: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Columns.
    pub width: usize,
    /// Elements from one row of `x` to the next.
    pub x_stride: usize,
    /// Elements from one row of `y` to the next.
    pub y_stride: usize,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl ElementwiseProblem {
    /// Three contiguous matrices.
    pub fn new(op: ElementwiseOp, dtype: Dtype, num_tokens: usize, width: usize) -> Self {
        ElementwiseProblem { op, dtype, num_tokens, width, x_stride: width, y_stride: width, out_stride: width }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ElementwiseArgs {
    /// Read.
    pub x: u64,
    /// Read.
    pub y: u64,
    /// Written; may be `x` or `y` itself.
    pub out: u64,
}

impl ElementwiseArgs {
    /// Pointers by value.
    pub fn new(x: u64, y: u64, out: u64) -> Self {
        ElementwiseArgs { x, y, out }
    }
}

/// [`ElementwiseProblem`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ElementwisePlan {
    names: [&'static str; 2],
    /// The kernel's number of the function, and the bits of its factor.
    op: u32,
    multiplier: u32,
    dtype: Dtype,
    num_tokens: usize,
    width: usize,
    x_stride_bytes: u64,
    y_stride_bytes: u64,
    out_stride_bytes: u64,
    grid: [u32; 3],
    kernels: Twins,
}

impl ElementwisePlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// [`Error::Dtype`]; [`Error::Value`] if `width` is 0 or too large, `num_tokens` above 2^31 - 1, or the multiplier not
    /// finite in f32; [`Error::Stride`] if rows of `out` overlap or rows leave the address space.
    pub fn new(problem: &ElementwiseProblem) -> Result<Self> {
        let &ElementwiseProblem { op, dtype, num_tokens, width, .. } = problem;
        let names = op.names();
        check_sizes(("num_tokens", num_tokens), ("width", width))?;
        check_output_stride("out", num_tokens, width, problem.out_stride)?;
        let instance = |aligned| kernels::INSTANCES.iter().find(|i| i.dtype == dtype && i.aligned == aligned);
        let (Some(aligned), Some(unaligned)) = (instance(true), instance(false)) else {
            return Err(Error::Dtype {
                argument: format!("{}, {} and out", names[0], names[1]),
                expected: "bf16, f16 or f32".into(),
                found: dtype.to_string(),
            });
        };
        let (op, multiplier) = match op {
            ElementwiseOp::Add { multiplier } => (0, multiplier),
            ElementwiseOp::SigmoidMul => (1, 0.0),
            ElementwiseOp::SiluMul => (2, 0.0),
        };
        if !(multiplier as f32).is_finite() {
            return Err(Error::value("multiplier", "a finite number in f32", multiplier));
        }
        let x_stride_bytes = stride_bytes(names[0], dtype, num_tokens, problem.x_stride)?;
        let y_stride_bytes = stride_bytes(names[1], dtype, num_tokens, problem.y_stride)?;
        let out_stride_bytes = stride_bytes("out", dtype, num_tokens, problem.out_stride)?;
        let row_bytes = (width * dtype.size_bytes()) as u64;
        let can_align = strides_aligned(row_bytes, &[x_stride_bytes, y_stride_bytes, out_stride_bytes]);
        let tiles = width.div_ceil(aligned.cols_per_cta as usize) as u32;
        if tiles > 65535 {
            return Err(Error::value("width", format!("at most {}", 65535 * aligned.cols_per_cta), width));
        }
        Ok(ElementwisePlan {
            names,
            op,
            multiplier: (multiplier as f32).to_bits(),
            dtype,
            num_tokens,
            width,
            x_stride_bytes,
            y_stride_bytes,
            out_stride_bytes,
            grid: [num_tokens as u32, tiles, 1],
            kernels: Twins::new(can_align, &aligned.kernel, &unaligned.kernel),
        })
    }

    /// Name of the kernel that runs when all pointers are multiples of 16. Others take its `_unaligned` twin, with the
    /// same bits.
    pub fn kernel(&self) -> &'static str {
        self.kernels.name()
    }

    /// Device memory that [`ElementwisePlan::launch`] needs besides its arguments.
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

    /// Queues the work on a stream. Does not wait; after [`ElementwisePlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if `out` shares memory with
    /// `x` or `y` other than row for row; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shape and strides, valid until the work has ended;
    /// no other work writes `x` and `y` or touches `out` meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &ElementwiseArgs, stream: Stream) -> Result<()> {
        let num_rows = self.num_tokens;
        if num_rows == 0 {
            return Ok(());
        }
        let row_bytes = (self.width * self.dtype.size_bytes()) as u64;
        let rows = |name, ptr, stride_bytes| Rows { name, ptr, num_rows, row_bytes, stride_bytes };
        let x = rows(self.names[0], args.x, self.x_stride_bytes);
        let y = rows(self.names[1], args.y, self.y_stride_bytes);
        let out = rows("out", args.out, self.out_stride_bytes);
        [x, y, out].iter().try_for_each(|rows| rows.check(self.dtype))?;
        [x, y].iter().try_for_each(|input| out.check_same_or_separate(input))?;
        let kernel = self.kernels.pick([x, y, out].iter().all(Rows::aligned));
        let params = kernels::Params {
            x_ptr: x.ptr,
            y_ptr: y.ptr,
            out_ptr: out.ptr,
            x_stride_bytes: x.stride_bytes,
            y_stride_bytes: y.stride_bytes,
            out_stride_bytes: out.stride_bytes,
            width: self.width as u32, // at most 2^30, seen by `new`
            op: self.op,
            multiplier: f32::from_bits(self.multiplier),
        };
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the rows that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(kernel, &Launch::grid(self.grid), &params.to_bytes(), stream) }
    }
}

/// The residual sum: `out = x + multiplier * y`, one rounding to `T` at the end.
///
/// * `x`, `y`, `out`: `[num_tokens, hidden_size]`
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; those of [`ElementwisePlan::new`] and [`ElementwisePlan::launch`].
/// Nothing is written then.
pub fn add<T: Element>(
    queue: &mut Queue<'_>,
    x: DeviceView<'_, T, 2>,
    y: DeviceView<'_, T, 2>,
    multiplier: f64,
    out: DeviceViewMut<'_, T, 2>,
) -> Result<()> {
    elementwise(queue, ElementwiseOp::add(multiplier), x, y, out)
}

/// An output gate: `out = x * sigmoid(gate)`, one rounding to `T` at the end.
///
/// * `x`, `gate`, `out`: `[num_tokens, width]`
///
/// # Errors
/// As [`add`].
pub fn sigmoid_mul<T: Element>(
    queue: &mut Queue<'_>,
    x: DeviceView<'_, T, 2>,
    gate: DeviceView<'_, T, 2>,
    out: DeviceViewMut<'_, T, 2>,
) -> Result<()> {
    elementwise(queue, ElementwiseOp::SigmoidMul, x, gate, out)
}

fn elementwise<T: Element>(
    queue: &mut Queue<'_>,
    op: ElementwiseOp,
    x: DeviceView<'_, T, 2>,
    y: DeviceView<'_, T, 2>,
    out: DeviceViewMut<'_, T, 2>,
) -> Result<()> {
    queue.check_homes(&[x.home(), y.home(), out.home()])?;
    let shape @ [num_tokens, width] = x.shape();
    let names = op.names();
    x.check(names[0], shape)?;
    y.check(names[1], shape)?;
    out.check("out", shape)?;
    if shape.contains(&0) {
        return Ok(());
    }
    let mut problem = ElementwiseProblem::new(op, T::DTYPE, num_tokens, width);
    problem.x_stride = row_stride(x.shape(), x.strides());
    problem.y_stride = row_stride(y.shape(), y.strides());
    problem.out_stride = row_stride(out.shape(), out.strides());
    let plan = ElementwisePlan::new(&problem)?;
    let args = ElementwiseArgs::new(x.ptr(), y.ptr(), out.ptr());
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}

/// Stride of the rows; that of a single row may be anything, and counts as 0.
fn row_stride([rows, _]: [usize; 2], [stride, _]: [usize; 2]) -> usize {
    if rows == 1 { 0 } else { stride }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(op: ElementwiseOp, dtype: Dtype, num_tokens: usize, width: usize) -> ElementwiseProblem {
        ElementwiseProblem::new(op, dtype, num_tokens, width)
    }

    #[test]
    fn kernels() {
        let plan = |dtype, width| ElementwisePlan::new(&problem(ElementwiseOp::SiluMul, dtype, 3, width)).unwrap();
        assert_eq!(plan(Dtype::BF16, 768).kernel(), "gatefold_elementwise_bf16");
        assert_eq!(plan(Dtype::BF16, 769).kernel(), "gatefold_elementwise_bf16_unaligned");
        assert_eq!(plan(Dtype::F32, 4).kernel(), "gatefold_elementwise_f32");
        assert_eq!(plan(Dtype::F16, 4).kernel(), "gatefold_elementwise_f16_unaligned");
        assert_eq!(plan(Dtype::F16, 1025).grid, [3, 2, 1]);
        assert_eq!(plan(Dtype::F32, 513).grid, [3, 2, 1]);
    }

    #[test]
    fn bad_shapes() {
        let message = |problem: &ElementwiseProblem| ElementwisePlan::new(problem).unwrap_err().to_string();
        let silu = |dtype, num_tokens, width| problem(ElementwiseOp::SiluMul, dtype, num_tokens, width);
        assert_eq!(
            message(&silu(Dtype::F64, 1, 8)),
            "`gate, up and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(message(&silu(Dtype::F32, 1, 0)), "`width` is 0, expected 1 to 1073741824");
        assert_eq!(message(&silu(Dtype::F32, 1 << 31, 8)), "`num_tokens` is 2147483648, expected at most 2147483647");
        assert_eq!(message(&silu(Dtype::F32, 1, 1 << 29)), "`width` is 536870912, expected at most 33553920");
        assert_eq!(
            message(&ElementwiseProblem { out_stride: 7, ..silu(Dtype::F32, 2, 8) }),
            "`out` has strides [7, 1], expected rows that do not overlap (at least 8 apart)"
        );
        assert_eq!(
            message(&ElementwiseProblem { x_stride: usize::MAX, ..silu(Dtype::F32, 2, 8) }),
            format!("`gate` has strides [{}, 1], expected rows within 2^63 bytes", usize::MAX)
        );
        assert_eq!(
            message(&problem(ElementwiseOp::add(1e39), Dtype::F32, 2, 8)),
            format!("`multiplier` is {}, expected a finite number in f32", 1e39)
        );
    }
}
