//! `linear` on the GPU: a weight matrix times rows, and the same for one matrix per head.

use crate::cuda::ffn::renamed;
use crate::cuda::grouped_gemm::{F32Products, GroupedGemm, GroupedGemmArgs, GroupedGemmPlan};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::element::Element;
use crate::error::{Error, Result};

/// `out[t, o] = sum_i x[t, i] * weight[o, i] + bias[o]`
///
/// * `x`: `[num_tokens, inputs]`
/// * `weight`: `[outputs, inputs]`
/// * `bias`: `[outputs]`
/// * `out`: `[num_tokens, outputs]`, of the type of `x` or f32
///
/// Sums are f32 in the order of `i`, rounded once at the store, the same bits for a token whatever else is in the call. No token
/// is a legal call. f32 is multiplied as [`Queue::f32_products`] tells.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride), [`Error::Len`](crate::Error::Len) for an argument
/// that does not fit the others, or whose rows do not begin at multiples of 16 bytes (`x`, `weight`); those of
/// [`GroupedGemmPlan::new`] and [`GroupedGemmPlan::launch`]. Nothing is written then.
pub fn linear<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    x: DeviceView<'_, T, 2>,
    weight: DeviceView<'_, T, 2>,
    bias: Option<DeviceView<'_, f32, 1>>,
    out: DeviceViewMut<'_, O, 2>,
) -> Result<()> {
    queue.check_homes(&[x.home(), weight.home(), bias.and_then(|bias| bias.home()), out.home()])?;
    let ([num_tokens, _], [outputs, inputs]) = (x.shape(), weight.shape());
    x.check("x", [num_tokens, inputs])?;
    weight.check("weight", [outputs, inputs])?;
    bias.map_or(Ok(()), |bias| bias.check("bias", [outputs]))?;
    out.check("out", [num_tokens, outputs])?;
    let mut problem = GroupedGemm::linear(T::DTYPE, num_tokens, outputs, inputs);
    problem.out_dtype = O::DTYPE;
    problem.f32_products = queue.f32_products();
    problem.a_stride = x.strides()[0];
    problem.up_stride = weight.strides()[0];
    problem.out_stride = out.strides()[0];
    let plan = GroupedGemmPlan::new(&problem, &queue.driver().limits()).map_err(named)?;
    let args = GroupedGemmArgs {
        up_bias: bias.map(|bias| bias.ptr()),
        ..GroupedGemmArgs::new(x.ptr(), weight.ptr(), out.ptr())
    };
    // SAFETY: the views are device memory with the plan's shapes and strides, checked above, borrowed from those who own them:
    // what the queue's stream does later comes after this work.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }.map_err(named)
}

/// Errors of a product in the words of a layer.
fn named(error: Error) -> Error {
    renamed(
        error,
        &[
            ("a", "x"),
            ("a, gate and up", "x and weight"),
            ("up", "weight"),
            ("up_bias", "bias"),
            ("rows", "num_tokens"),
            ("source_rows", "num_tokens"),
            ("num_groups", "heads"),
        ],
    )
}

/// One matrix for each head: `out[t, h, o] = sum_i x[t, h, i] * weight[h, o, i]`.
///
/// * `x`: `[num_tokens, heads, inputs]`
/// * `weight`: `[heads, outputs, inputs]`
/// * `out`: `[num_tokens, heads, outputs]`, of the type of `x` or f32
///
/// Numerics as [`linear`].
///
/// # Errors
/// As [`linear`].
pub fn linear_heads<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    x: DeviceView<'_, T, 3>,
    weight: DeviceView<'_, T, 3>,
    out: DeviceViewMut<'_, O, 3>,
) -> Result<()> {
    let ([num_tokens, _, _], [heads, outputs, inputs]) = (x.shape(), weight.shape());
    x.check("x", [num_tokens, heads, inputs])?;
    weight.check("weight", [heads, outputs, inputs])?;
    out.check("out", [num_tokens, heads, outputs])?;
    launch_heads(queue, x, weight, false, out)
}

/// [`linear_heads`] after its checks, or with `weight` as `[heads, inputs, outputs]`.
pub(super) fn launch_heads<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    x: DeviceView<'_, T, 3>,
    weight: DeviceView<'_, T, 3>,
    transposed: bool,
    out: DeviceViewMut<'_, O, 3>,
) -> Result<()> {
    queue.check_homes(&[x.home(), weight.home(), out.home()])?;
    let ([num_tokens, heads, inputs], [_, _, outputs]) = (x.shape(), out.shape());
    let mut problem = GroupedGemm::linear(T::DTYPE, num_tokens, outputs, inputs);
    problem.out_dtype = O::DTYPE;
    problem.num_groups = heads;
    problem.transposed = transposed;
    // There is no tf32 product with transposed weights.
    problem.f32_products = if transposed { F32Products::Full } else { queue.f32_products() };
    [problem.a_stride, problem.a_group_stride, _] = x.strides();
    [problem.up_group_stride, problem.up_stride, _] = weight.strides();
    [problem.out_stride, problem.out_group_stride, _] = out.strides();
    let plan = GroupedGemmPlan::new(&problem, &queue.driver().limits()).map_err(named)?;
    let args = GroupedGemmArgs::new(x.ptr(), weight.ptr(), out.ptr());
    // SAFETY: the views are device memory with the plan's shapes and strides, checked by the callers; the rest as in `linear`.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }.map_err(named)
}
