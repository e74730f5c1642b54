//! The sum of a token's experts on the GPU, with the shared expert and the residual.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::group_tokens::dense;
use crate::cuda::kernels::{Kernel, combine as kernels};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::cuda::rows::{Rows, check_output_stride, check_sizes, stride_bytes, strides_aligned};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};

/// What to compute:
///
/// `out[t] = residual[t] + residual_multiplier * (combine_scale * sum_s w[t, s] * y[position[t, s]] + g[t] * shared[t])`
///
/// with `g[t] = sigmoid(shared_logit[t])`, or 1 without logits. Without a shared expert or a residual their terms are 0, and without
/// a residual there is no multiplier.
///
/// * `y`: `[num_rows, hidden_size]`, the experts' results in the order of [`GroupTokens`](super::GroupTokens)
/// * `position`: `[num_tokens, slots]`, contiguous; rows of `num_rows` and more are skipped, also if their weight is NaN
/// * `topk_weights`: `[num_tokens, slots]`; without weights each is 1 (they were applied to the input)
/// * `shared`, `residual`, `out`: `[num_tokens, hidden_size]`; `shared_logit`: `[num_tokens]` in f32
///
/// A token's rows are added in ascending order, which is that of its experts, in f32; `out` is rounded once. The bits of a token
/// depend on nothing else in the call.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Combine {
    /// Element type of `y`, `shared`, `residual` and `out`: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Tokens; 0 is legal.
    pub num_tokens: usize,
    /// Assignments per token; 0 is legal.
    pub slots: usize,
    /// Rows of `y`; 0 is legal.
    pub num_rows: usize,
    /// Columns.
    pub hidden_size: usize,
    /// Factor on the sum of the routed experts.
    pub combine_scale: f64,
    /// Factor on everything but the residual, where there is one.
    pub residual_multiplier: f64,
    /// Elements from one row of `y` to the next.
    pub y_stride: usize,
    /// Elements from one row of `topk_weights` to the next.
    pub topk_weights_stride: usize,
    /// Elements from one row of `shared` to the next.
    pub shared_stride: usize,
    /// Elements from one token's `shared_logit` to the next.
    pub shared_logit_stride: usize,
    /// Elements from one row of `residual` to the next.
    pub residual_stride: usize,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl Combine {
    /// Contiguous arrays with a row for each assignment, factors of 1.
    pub fn new(dtype: Dtype, num_tokens: usize, slots: usize, hidden_size: usize) -> Self {
        Combine {
            dtype,
            num_tokens,
            slots,
            num_rows: num_tokens.saturating_mul(slots),
            hidden_size,
            combine_scale: 1.0,
            residual_multiplier: 1.0,
            y_stride: hidden_size,
            topk_weights_stride: slots,
            shared_stride: hidden_size,
            shared_logit_stride: 1,
            residual_stride: hidden_size,
            out_stride: hidden_size,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CombineArgs {
    /// Read.
    pub y: u64,
    /// Read.
    pub position: u64,
    /// Read, where there are any.
    pub topk_weights: Option<u64>,
    /// Read, where there is a shared expert.
    pub shared: Option<CombineSharedArgs>,
    /// Read, where there is one.
    pub residual: Option<u64>,
    /// Written; may be `shared` or `residual` itself.
    pub out: u64,
}

/// Device pointers of the shared expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineSharedArgs {
    /// Its result.
    pub rows: u64,
    /// What the sigmoid of its gate takes, where it has one.
    pub logit: Option<u64>,
}

impl CombineArgs {
    /// Routed experts alone, each with weight 1.
    pub fn new(y: u64, position: u64, out: u64) -> Self {
        CombineArgs { y, position, topk_weights: None, shared: None, residual: None, out }
    }

    /// The same with weights.
    pub fn with_weights(self, topk_weights: u64) -> Self {
        CombineArgs { topk_weights: Some(topk_weights), ..self }
    }

    /// The same with a shared expert and what its gate's sigmoid takes.
    pub fn with_shared(self, rows: u64, logit: Option<u64>) -> Self {
        CombineArgs { shared: Some(CombineSharedArgs { rows, logit }), ..self }
    }

    /// The same with a residual.
    pub fn with_residual(self, residual: u64) -> Self {
        CombineArgs { residual: Some(residual), ..self }
    }
}

/// Most assignments per token: two lists of them fill the 48 KiB of shared memory that every device gives.
const MAX_SLOTS: usize = (48 << 10) / 16 - 1;

/// [`Combine`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CombinePlan {
    dtype: Dtype,
    num_tokens: usize,
    slots: usize,
    num_rows: usize,
    hidden_size: usize,
    // Two numbers by their bits, so that plans are equal and hash.
    combine_scale: u32,
    residual_multiplier: u32,
    y_stride_bytes: u64,
    topk_weights_stride_bytes: u64,
    shared_stride_bytes: u64,
    shared_logit_stride_bytes: u64,
    residual_stride_bytes: u64,
    out_stride_bytes: u64,
    /// CTAs along a row.
    column_blocks: u32,
    /// For rows that begin at multiples of 16 bytes; `None` where widths and strides rule that out.
    aligned: Option<&'static Kernel>,
    /// For any rows; the same bits.
    unaligned: &'static Kernel,
}

impl CombinePlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// [`Error::Dtype`]; [`Error::Value`] if `hidden_size` is 0 or too large, there are 2^31 and more tokens or rows, or a factor is
    /// not finite in f32; [`Error::Unsupported`] for 2^31 and more assignments or more than 3071 per token; [`Error::Stride`] if rows
    /// of `out` overlap or rows leave the address space.
    pub fn new(problem: &Combine) -> Result<Self> {
        let &Combine { dtype, num_tokens, slots, num_rows, hidden_size, .. } = problem;
        check_sizes(("num_tokens", num_tokens), ("hidden_size", hidden_size))?;
        check_sizes(("num_rows", num_rows), ("hidden_size", hidden_size))?;
        if slots > MAX_SLOTS || num_tokens * slots > i32::MAX as usize {
            return Err(Error::unsupported("cuda", format!("{num_tokens} tokens with {slots} experts each")));
        }
        let single = |name, value: f64| match value as f32 {
            single if single.is_finite() => Ok(single.to_bits()),
            _ => Err(Error::value(name, "a finite number in f32", value)),
        };
        let combine_scale = single("combine_scale", problem.combine_scale)?;
        let residual_multiplier = single("residual_multiplier", problem.residual_multiplier)?;
        check_output_stride("out", num_tokens, hidden_size, problem.out_stride)?;
        let instance = |aligned| kernels::INSTANCES.iter().find(|i| i.dtype == dtype && i.aligned == aligned);
        let (Some(aligned), Some(unaligned)) = (instance(true), instance(false)) else {
            return Err(Error::Dtype {
                argument: "y, shared, residual and out".into(),
                expected: "bf16, f16 or f32".into(),
                found: dtype.to_string(),
            });
        };
        let y_stride_bytes = stride_bytes("y", dtype, num_rows, problem.y_stride)?;
        let rows = |name, stride| stride_bytes(name, dtype, num_tokens, stride);
        let shared_stride_bytes = rows("shared", problem.shared_stride)?;
        let residual_stride_bytes = rows("residual", problem.residual_stride)?;
        let out_stride_bytes = rows("out", problem.out_stride)?;
        let singles = |name, stride| stride_bytes(name, Dtype::F32, num_tokens, stride);
        let topk_weights_stride_bytes = singles("topk_weights", problem.topk_weights_stride)?;
        let shared_logit_stride_bytes = singles("shared_logit", problem.shared_logit_stride)?;
        let can_align = strides_aligned(
            (hidden_size * dtype.size_bytes()) as u64,
            &[y_stride_bytes, shared_stride_bytes, residual_stride_bytes, out_stride_bytes],
        );
        let column_blocks = hidden_size.div_ceil(aligned.cols_per_cta as usize) as u32; // hidden_size is at most 2^30
        if column_blocks > 65535 {
            let expected = format!("at most {}", 65535 * aligned.cols_per_cta);
            return Err(Error::value("hidden_size", expected, hidden_size));
        }
        Ok(CombinePlan {
            dtype,
            num_tokens,
            slots,
            num_rows,
            hidden_size,
            combine_scale,
            residual_multiplier,
            y_stride_bytes,
            topk_weights_stride_bytes,
            shared_stride_bytes,
            shared_logit_stride_bytes,
            residual_stride_bytes,
            out_stride_bytes,
            column_blocks,
            aligned: can_align.then_some(&aligned.kernel),
            unaligned: &unaligned.kernel,
        })
    }

    /// Name of the kernel that runs when all pointers are multiples of 16. Others take its `_unaligned` twin, with the
    /// same bits.
    pub fn kernel(&self) -> &'static str {
        self.aligned.unwrap_or(self.unaligned).entry
    }

    /// Device memory that [`CombinePlan::launch`] needs besides its arguments.
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

    /// Queues the work on a stream. Does not wait; after [`CombinePlan::warmup`] it neither allocates nor loads. Whatever the
    /// positions are, nothing outside of the arrays is touched.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if `out` shares memory with another
    /// array other than row for row with `shared` or `residual`; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended;
    /// no other work writes the inputs or touches `out` meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &CombineArgs, stream: Stream) -> Result<()> {
        let num_tokens = self.num_tokens;
        if num_tokens == 0 {
            return Ok(());
        }
        let row_bytes = (self.hidden_size * self.dtype.size_bytes()) as u64;
        let rows = |name, ptr, stride_bytes| Rows { name, ptr, num_rows: num_tokens, row_bytes, stride_bytes };
        let singles = |name, ptr, stride_bytes, len: usize| Rows {
            name,
            ptr,
            num_rows: num_tokens,
            row_bytes: 4 * len as u64,
            stride_bytes,
        };
        let (slots, some) = (self.slots, self.slots > 0);
        let routed = some && self.num_rows > 0;
        let y = routed.then(|| Rows { num_rows: self.num_rows, ..rows("y", args.y, self.y_stride_bytes) });
        let position = some.then(|| singles("position", args.position, 4 * slots as u64, slots));
        let weights = args.topk_weights.filter(|_| some);
        let weights = weights.map(|ptr| singles("topk_weights", ptr, self.topk_weights_stride_bytes, slots));
        let shared = args.shared.map(|shared| rows("shared", shared.rows, self.shared_stride_bytes));
        let logit = args.shared.and_then(|shared| shared.logit);
        let logit = logit.map(|ptr| singles("shared_logit", ptr, self.shared_logit_stride_bytes, 1));
        let residual = args.residual.map(|ptr| rows("residual", ptr, self.residual_stride_bytes));
        let out = rows("out", args.out, self.out_stride_bytes);
        let vectors = [y, shared, residual, Some(out)];
        vectors.iter().flatten().try_for_each(|rows| rows.check(self.dtype))?;
        [position, weights, logit].iter().flatten().try_for_each(|rows| rows.check(Dtype::F32))?;
        [y, position, weights, logit].iter().flatten().try_for_each(|read| out.check_separate(read))?;
        [shared, residual].iter().flatten().try_for_each(|read| out.check_same_or_separate(read))?;
        let kernel = match self.aligned {
            Some(kernel) if vectors.iter().flatten().all(Rows::aligned) => kernel,
            _ => self.unaligned,
        };
        let ptr = |rows: Option<Rows>| rows.map_or(0, |rows| rows.ptr);
        let params = kernels::Params {
            y_ptr: ptr(y),
            position_ptr: ptr(position),
            weight_ptr: ptr(weights),
            shared_ptr: ptr(shared),
            shared_logit_ptr: ptr(logit),
            residual_ptr: ptr(residual),
            out_ptr: out.ptr,
            y_stride_bytes: self.y_stride_bytes,
            weight_stride_bytes: self.topk_weights_stride_bytes,
            shared_stride_bytes: self.shared_stride_bytes,
            shared_logit_stride_bytes: self.shared_logit_stride_bytes,
            residual_stride_bytes: self.residual_stride_bytes,
            out_stride_bytes: self.out_stride_bytes,
            // Sizes are below 2^31, seen by `new`.
            num_rows: self.num_rows as u32,
            slots: slots as u32,
            hidden_size: self.hidden_size as u32,
            combine_scale: f32::from_bits(self.combine_scale),
            residual_multiplier: f32::from_bits(self.residual_multiplier),
        };
        let grid = [num_tokens as u32, self.column_blocks, 1];
        let launch = Launch { dynamic_shared_bytes: 16 * slots as u32, ..Launch::grid(grid) };
        // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold the arrays that
        // the plan describes, and the rest, is the caller's promise.
        unsafe { driver.launch(kernel, &launch, &params.to_bytes(), stream) }
    }
}

/// What [`combine`] reads.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CombineInput<'a, T> {
    /// `[num_rows, hidden_size]`
    pub y: DeviceView<'a, T, 2>,
    /// `[num_tokens, slots]`, contiguous
    pub position: DeviceView<'a, u32, 2>,
    /// `[num_tokens, slots]`: each is 1 without them.
    pub topk_weights: Option<DeviceView<'a, f32, 2>>,
    /// `[num_tokens, hidden_size]`: the shared expert's result.
    pub shared: Option<DeviceView<'a, T, 2>>,
    /// `[num_tokens, 1]`: what the sigmoid of the shared expert's gate takes; its factor is 1 without them.
    pub shared_logit: Option<DeviceView<'a, f32, 2>>,
    /// `[num_tokens, hidden_size]`
    pub residual: Option<DeviceView<'a, T, 2>>,
    /// Factor on the sum of the routed experts.
    pub combine_scale: f64,
    /// Factor on everything but the residual, where there is one.
    pub residual_multiplier: f64,
}

impl<'a, T> CombineInput<'a, T> {
    /// Routed experts alone, each with weight 1, factors of 1.
    pub const fn new(y: DeviceView<'a, T, 2>, position: DeviceView<'a, u32, 2>) -> Self {
        CombineInput {
            y,
            position,
            topk_weights: None,
            shared: None,
            shared_logit: None,
            residual: None,
            combine_scale: 1.0,
            residual_multiplier: 1.0,
        }
    }

    /// Checks every array; gives `[num_tokens, slots]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`] for an array that does not fit; [`Error::Presence`] for a logit without a
    /// shared expert.
    pub fn check(&self, out: &DeviceViewMut<'_, T, 2>) -> Result<[usize; 2]> {
        let [num_rows, hidden_size] = self.y.shape();
        self.y.check("y", [num_rows, hidden_size])?;
        let [num_tokens, slots] = self.position.shape();
        self.position.check("position", [num_tokens, slots])?;
        dense("position", [num_tokens, slots], self.position.strides())?;
        if let Some(weights) = &self.topk_weights {
            weights.check("topk_weights", [num_tokens, slots])?;
        }
        for (name, rows) in [("shared", &self.shared), ("residual", &self.residual)] {
            if let Some(rows) = rows {
                rows.check(name, [num_tokens, hidden_size])?;
            }
        }
        if let Some(logit) = &self.shared_logit {
            if self.shared.is_none() {
                return Err(Error::unexpected("shared_logit", "there is no shared expert"));
            }
            logit.check("shared_logit", [num_tokens, 1])?;
        }
        out.check("out", [num_tokens, hidden_size])?;
        Ok([num_tokens, slots])
    }
}

/// The weighted sum of each token's rows of experts, with the shared expert and the residual: [`Combine`] has the formula.
///
/// * `y`: `[num_rows, hidden_size]`, in the order of [`group_tokens`](crate::cuda::group_tokens), whose `position` this takes
/// * `out`: `[num_tokens, hidden_size]`
///
/// A position of `num_rows` and more is skipped, whatever its weight; a token without rows gets what is left of the formula. Rows are
/// added in ascending order in f32, `out` is rounded once, and the bits of a token depend on nothing else in the call. No token is
/// a legal call.
///
/// # Errors
/// Those of [`CombineInput::check`], [`CombinePlan::new`] and [`CombinePlan::launch`]; [`Error::Value`] for arrays that are lent to
/// another stream. Nothing is written then.
pub fn combine<T: Element>(
    queue: &mut Queue<'_>,
    input: &CombineInput<'_, T>,
    out: DeviceViewMut<'_, T, 2>,
) -> Result<()> {
    let CombineInput { y, position, topk_weights, shared, shared_logit, residual, .. } = input;
    let [num_tokens, slots] = input.check(&out)?;
    queue.check_homes(&[
        y.home(),
        position.home(),
        topk_weights.and_then(|view| view.home()),
        shared.and_then(|view| view.home()),
        shared_logit.and_then(|view| view.home()),
        residual.and_then(|view| view.home()),
        out.home(),
    ])?;
    let [num_rows, hidden_size] = y.shape();
    let mut problem = Combine::new(T::DTYPE, num_tokens, slots, hidden_size);
    problem.num_rows = num_rows;
    (problem.combine_scale, problem.residual_multiplier) = (input.combine_scale, input.residual_multiplier);
    problem.y_stride = y.strides()[0];
    problem.out_stride = out.strides()[0];
    let mut args = CombineArgs::new(y.ptr(), position.ptr(), out.ptr());
    if let Some(weights) = topk_weights {
        problem.topk_weights_stride = weights.strides()[0];
        args = args.with_weights(weights.ptr());
    }
    if let Some(shared) = shared {
        problem.shared_stride = shared.strides()[0];
        problem.shared_logit_stride = shared_logit.map_or(1, |logit| logit.strides()[0]);
        args = args.with_shared(shared.ptr(), shared_logit.map(|logit| logit.ptr()));
    }
    if let Some(residual) = residual {
        problem.residual_stride = residual.strides()[0];
        args = args.with_residual(residual.ptr());
    }
    let plan = CombinePlan::new(&problem)?;
    // SAFETY: the views are memory of the queue's device with the shapes and strides checked above, borrowed for as long as
    // the queue's work may use them.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(dtype: Dtype, hidden_size: usize) -> Combine {
        Combine::new(dtype, 3, 2, hidden_size)
    }

    #[test]
    fn kernels() {
        let kernel = |problem: &Combine| CombinePlan::new(problem).unwrap().kernel();
        assert_eq!(kernel(&problem(Dtype::BF16, 2048)), "gatefold_combine_bf16");
        assert_eq!(kernel(&problem(Dtype::F16, 2044)), "gatefold_combine_f16_unaligned");
        assert_eq!(kernel(&problem(Dtype::F32, 2044)), "gatefold_combine_f32");
        let strided = Combine { y_stride: 2049, ..problem(Dtype::F32, 2044) };
        assert_eq!(kernel(&strided), "gatefold_combine_f32_unaligned");
    }

    #[test]
    fn bad_problems() {
        let message = |problem: Combine| CombinePlan::new(&problem).unwrap_err().to_string();
        let good = || problem(Dtype::BF16, 8);
        assert_eq!(
            message(problem(Dtype::F64, 8)),
            "`y, shared, residual and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(message(problem(Dtype::F32, 1 << 30)), "`hidden_size` is 1073741824, expected at most 33553920");
        assert_eq!(message(Combine { slots: 3072, ..good() }), "unsupported by cuda: 3 tokens with 3072 experts each");
        assert_eq!(
            message(Combine { combine_scale: f64::INFINITY, ..good() }),
            "`combine_scale` is inf, expected a finite number in f32"
        );
        assert_eq!(
            message(Combine { out_stride: 7, ..good() }),
            "`out` has strides [7, 1], expected rows that do not overlap (at least 8 apart)"
        );
        assert_eq!(
            message(Combine { num_rows: 1 << 31, ..good() }),
            "`num_rows` is 2147483648, expected at most 2147483647"
        );
    }
}
