//! Retention on the GPU, in the order of its form: a warp per head and 32 columns of the values.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::Kernel;
use crate::cuda::kernels::retention as kernels;
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::cuda::rows::{MAX_ROWS, MAX_WIDTH};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result, check_len};
use crate::spec::{Retention, RetentionForm};
use crate::view::check_disjoint;

/// Columns of a warp.
const COLUMNS: usize = 32;
/// Widest key: a warp's state fits the 99 KiB that every device has.
const MAX_HEAD_DIM: usize = 99 * 1024 / (4 * COLUMNS);
/// Queries of a warp in the parallel form.
const TILE: usize = 16;
/// The y and the z extent of a grid.
const MAX_GRID: usize = 65535;

/// What to compute: [`retention`] of `num_tokens` tokens. Strides count elements.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RetentionProblem {
    /// Sizes, scale and form.
    pub spec: Retention,
    /// Element type of `q`, `k`, `v` and `out`: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Tokens; 0 is legal.
    pub num_tokens: usize,
    /// Between tokens and between heads of `q`.
    pub q_strides: [usize; 2],
    /// The same of `k`.
    pub k_strides: [usize; 2],
    /// The same of `v`.
    pub v_strides: [usize; 2],
    /// The same of `out`.
    pub out_strides: [usize; 2],
    /// Between heads and between rows of `state_in`.
    pub state_in_strides: [usize; 2],
    /// The same of `state_out`.
    pub state_out_strides: [usize; 2],
}

impl RetentionProblem {
    /// Contiguous arrays.
    pub fn new(spec: Retention, dtype: Dtype, num_tokens: usize) -> Self {
        let rows = |width: usize| [spec.num_heads.saturating_mul(width), width];
        let (keys, values) = (rows(spec.head_dim), rows(spec.value_dim));
        let state = [spec.head_dim.saturating_mul(spec.value_dim), spec.value_dim];
        RetentionProblem {
            spec,
            dtype,
            num_tokens,
            q_strides: keys,
            k_strides: keys,
            v_strides: values,
            out_strides: values,
            state_in_strides: state,
            state_out_strides: state,
        }
    }
}

/// Device pointers of one call; 0 where there is no such array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RetentionArgs {
    /// Read.
    pub q: u64,
    /// Read.
    pub k: u64,
    /// Read.
    pub v: u64,
    /// f32 `[num_heads]`, read.
    pub decay: u64,
    /// f32, read; 0: the state is zero.
    pub state_in: u64,
    /// Written.
    pub out: u64,
    /// f32, written; 0: not wanted.
    pub state_out: u64,
}

/// An array: element size, rows in two dimensions, columns, strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Array {
    size: u64,
    rows: [usize; 2],
    width: usize,
    strides: [usize; 2],
}

impl Array {
    /// Bytes from the first element to one past the last; saturates.
    fn extent_bytes(&self) -> u64 {
        if self.rows.contains(&0) {
            return 0;
        }
        let last = |i: usize| (self.rows[i] as u64 - 1).saturating_mul(self.strides[i] as u64);
        last(0).saturating_add(last(1)).saturating_add(self.width as u64).saturating_mul(self.size)
    }

    fn strides_bytes(&self) -> [u64; 2] {
        self.strides.map(|stride| (stride as u64).wrapping_mul(self.size)) // of a dimension of 1 it may be anything
    }
}

const NAMES: [&str; 6] = ["q", "k", "v", "state_in", "out", "state_out"];

/// [`RetentionProblem`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RetentionPlan {
    arrays: [Array; 6],
    num_heads: usize,
    num_tokens: usize,
    head_dim: usize,
    value_dim: usize,
    scale: u32,
    chunk: u32,
    tile: u32,
    recurrent: bool,
    grid: [u32; 3],
    kernel: &'static Kernel,
}

impl RetentionPlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// Those of [`Retention::validate`]; [`Error::Dtype`]; [`Error::Unsupported`] for a `head_dim` above 792; [`Error::Value`] for
    /// more than 65535 heads, 2^31 - 1 tokens or 2^30 columns, or a scale that f32 cannot hold; [`Error::Stride`] if rows of an
    /// output overlap or rows leave the address space.
    pub fn new(problem: &RetentionProblem) -> Result<Self> {
        let RetentionProblem { spec, dtype, num_tokens, .. } = problem;
        let (dtype, num_tokens) = (*dtype, *num_tokens);
        spec.validate()?;
        let &Retention { num_heads, head_dim, value_dim, .. } = spec;
        let Some(instance) = kernels::INSTANCES.iter().find(|i| i.dtype == dtype) else {
            let (argument, expected) = ("q, k, v and out".into(), "bf16, f16 or f32".into());
            return Err(Error::Dtype { argument, expected, found: dtype.to_string() });
        };
        if head_dim > MAX_HEAD_DIM {
            let case = format!("retention with a head_dim of {head_dim}, above {MAX_HEAD_DIM}");
            return Err(Error::unsupported("cuda", case));
        }
        for (name, found, most) in [
            ("num_heads", num_heads, MAX_GRID),
            ("num_tokens", num_tokens, MAX_ROWS),
            ("value_dim", value_dim, MAX_WIDTH),
        ] {
            if found > most {
                return Err(Error::value(name, format!("at most {most}"), found));
            }
        }
        if !(spec.scale as f32).is_finite() {
            return Err(Error::value("scale", "a finite number in f32", spec.scale));
        }
        let rows =
            |width, strides| Array { size: dtype.size_bytes() as u64, rows: [num_tokens, num_heads], width, strides };
        let state = |strides| Array { size: 4, rows: [num_heads, head_dim], width: value_dim, strides };
        let arrays = [
            rows(head_dim, problem.q_strides),
            rows(head_dim, problem.k_strides),
            rows(value_dim, problem.v_strides),
            state(problem.state_in_strides),
            rows(value_dim, problem.out_strides),
            state(problem.state_out_strides),
        ];
        for (i, (name, array)) in NAMES.iter().zip(&arrays).enumerate() {
            let ([a, b], [outer, inner]) = (array.rows, array.strides);
            if i >= 4 {
                check_disjoint(name, &[a, b, array.width], &[outer, inner, 1])?;
            }
            if array.extent_bytes() > i64::MAX as u64 {
                let expected = "rows within 2^63 bytes".into();
                return Err(Error::Stride { argument: (*name).into(), expected, found: vec![outer, inner, 1] });
            }
        }
        let all = num_tokens.max(1);
        let (chunk, tile) = match spec.form {
            RetentionForm::Parallel => (all, TILE.max(num_tokens.div_ceil(MAX_GRID - 1))),
            RetentionForm::Chunkwise(chunk) => (chunk.min(all), 0),
            RetentionForm::Recurrent => (1, 0),
        };
        let parts = if tile == 0 { 1 } else { num_tokens.div_ceil(tile) + 1 };
        Ok(RetentionPlan {
            arrays,
            num_heads,
            num_tokens,
            head_dim,
            value_dim,
            scale: (spec.scale as f32).to_bits(),
            chunk: chunk as u32,
            tile: tile as u32,
            recurrent: spec.form == RetentionForm::Recurrent,
            grid: [value_dim.div_ceil(COLUMNS) as u32, num_heads as u32, parts as u32],
            kernel: &instance.kernel,
        })
    }

    /// Name of the kernel.
    pub fn kernel(&self) -> &'static str {
        self.kernel.entry
    }

    /// Device memory that [`RetentionPlan::launch`] needs besides its arguments.
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

    /// Queues the work on a stream. Does not wait; after [`RetentionPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if an output shares memory with
    /// another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended; no
    /// other work writes the inputs or touches the outputs meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &RetentionArgs, stream: Stream) -> Result<()> {
        if self.num_tokens == 0 && args.state_out == 0 {
            return Ok(());
        }
        let pointers = [args.q, args.k, args.v, args.state_in, args.out, args.state_out];
        let extents = self.arrays.map(|array| array.extent_bytes());
        let absent = |i: usize| extents[i] == 0 || pointers[i] == 0 && NAMES[i].starts_with("state");
        let decay = (args.decay, self.num_heads as u64 * 4);
        let arrays = (0..6).filter(|i| !absent(*i)).map(|i| (NAMES[i], pointers[i], self.arrays[i].size, extents[i]));
        for (name, ptr, size, bytes) in arrays.chain([("decay", decay.0, 4, decay.1)]) {
            if ptr == 0 || !ptr.is_multiple_of(size) || ptr.checked_add(bytes).is_none() {
                let expected = format!("a device pointer that is a multiple of {size}");
                return Err(Error::value(name, expected, format_args!("{ptr:#x}")));
            }
        }
        for out in (4..6).filter(|i| !absent(*i)) {
            let meets = |ptr: u64, bytes: u64| pointers[out] < ptr + bytes && ptr < pointers[out] + extents[out];
            let other = (0..out).filter(|i| !absent(*i)).find(|i| meets(pointers[*i], extents[*i])).map(|i| NAMES[i]);
            if let Some(other) = other.or(meets(decay.0, decay.1).then_some("decay")) {
                return Err(Error::Overlap { argument: NAMES[out].into(), other: other.into() });
            }
        }
        let strides = self.arrays.map(|array| array.strides_bytes());
        let params = kernels::Params {
            q_ptr: args.q,
            q_token_bytes: strides[0][0],
            q_head_bytes: strides[0][1],
            k_ptr: args.k,
            k_token_bytes: strides[1][0],
            k_head_bytes: strides[1][1],
            v_ptr: args.v,
            v_token_bytes: strides[2][0],
            v_head_bytes: strides[2][1],
            out_ptr: args.out,
            out_token_bytes: strides[4][0],
            out_head_bytes: strides[4][1],
            state_in_ptr: args.state_in,
            state_in_head_bytes: strides[3][0],
            state_in_row_bytes: strides[3][1],
            state_out_ptr: args.state_out,
            state_out_head_bytes: strides[5][0],
            state_out_row_bytes: strides[5][1],
            decay_ptr: args.decay,
            // All below 2^31, seen by `new`.
            num_tokens: self.num_tokens as u32,
            head_dim: self.head_dim as u32,
            value_dim: self.value_dim as u32,
            chunk: self.chunk,
            tile: self.tile,
            recurrent: u32::from(self.recurrent),
            scale: f32::from_bits(self.scale),
        };
        let mut launch = Launch::grid(self.grid);
        launch.dynamic_shared_bytes = (4 * COLUMNS * self.head_dim) as u32;
        // SAFETY: pointers are not null and aligned to their elements, checked above; that they hold the arrays that the plan
        // describes, and the rest, is the caller's promise.
        unsafe { driver.launch(self.kernel, &launch, &params.to_bytes(), stream) }
    }
}

/// One sequence for [`retention`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RetentionInput<'a, T> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: DeviceView<'a, T, 3>,
    /// `[num_tokens, num_heads, head_dim]`
    pub k: DeviceView<'a, T, 3>,
    /// `[num_tokens, num_heads, value_dim]`
    pub v: DeviceView<'a, T, 3>,
    /// `[num_heads]`: the factor on the state from one token to the next.
    pub decay: DeviceView<'a, f32, 1>,
    /// `[num_heads, head_dim, value_dim]`: the state after the tokens before these. `None`: zero.
    pub state_in: Option<DeviceView<'a, f32, 3>>,
}

impl<'a, T> RetentionInput<'a, T> {
    /// A sequence from its start.
    pub const fn new(
        q: DeviceView<'a, T, 3>,
        k: DeviceView<'a, T, 3>,
        v: DeviceView<'a, T, 3>,
        decay: DeviceView<'a, f32, 1>,
    ) -> Self {
        RetentionInput { q, k, v, decay, state_in: None }
    }
}

/// What [`retention`] writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct RetentionOutput<'a, T> {
    /// `[num_tokens, num_heads, value_dim]`
    pub out: DeviceViewMut<'a, T, 3>,
    /// `[num_heads, head_dim, value_dim]`: the state after the last token.
    pub state_out: Option<DeviceViewMut<'a, f32, 3>>,
}

impl<'a, T> RetentionOutput<'a, T> {
    /// Without the state.
    pub const fn new(out: DeviceViewMut<'a, T, 3>) -> Self {
        RetentionOutput { out, state_out: None }
    }

    /// With the state.
    pub const fn with_state(out: DeviceViewMut<'a, T, 3>, state_out: DeviceViewMut<'a, f32, 3>) -> Self {
        RetentionOutput { out, state_out: Some(state_out) }
    }
}

/// Retention over one sequence of `n` tokens.
///
/// ```text
/// out[i, h]    = sum_{j <= i} decay[h]^(i - j) * scale * (q[i, h] . k[j, h]) * v[j, h] + decay[h]^(i + 1) * scale * q[i, h] state_in[h]
/// state_out[h] = sum_j decay[h]^(n - 1 - j) * k[j, h]^T v[j, h] + decay[h]^n * state_in[h]
/// ```
///
/// * `q`, `k`: `[num_tokens, num_heads, head_dim]`; `v`, `out`: `[num_tokens, num_heads, value_dim]`; `decay`: `[num_heads]`
/// * `state_in`, `state_out`: `[num_heads, head_dim, value_dim]`
///
/// The form says in which order this is computed ([`RetentionForm`]). Zero tokens: `state_out` is `state_in`. The state and all sums
/// are f32, powers of the decay are rounded once; one rounding to `T` at the end.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; those of [`RetentionPlan::new`] and [`RetentionPlan::launch`]. Nothing is
/// written then.
///
/// Sun et al. 2023, arXiv:2307.08621.
pub fn retention<T: Element>(
    queue: &mut Queue<'_>,
    spec: &Retention,
    input: &RetentionInput<'_, T>,
    output: RetentionOutput<'_, T>,
) -> Result<()> {
    queue.check_homes(&[
        input.q.home(),
        input.k.home(),
        input.v.home(),
        input.decay.home(),
        input.state_in.and_then(|view| view.home()),
        output.out.home(),
        output.state_out.as_ref().and_then(|view| view.home()),
    ])?;
    spec.validate()?;
    let n = input.q.shape()[0];
    let (heads, dim, value_dim) = (spec.num_heads, spec.head_dim, spec.value_dim);
    input.q.check("q", [n, heads, dim])?;
    input.k.check("k", [n, heads, dim])?;
    input.v.check("v", [n, heads, value_dim])?;
    check_len("decay", input.decay.shape()[0], heads)?;
    input.decay.check("decay", [heads])?;
    input.state_in.map_or(Ok(()), |state| state.check("state_in", [heads, dim, value_dim]))?;
    output.out.check("out", [n, heads, value_dim])?;
    output.state_out.as_ref().map_or(Ok(()), |state| state.check("state_out", [heads, dim, value_dim]))?;
    let leading = |strides: [usize; 3]| [strides[0], strides[1]];
    let mut problem = RetentionProblem::new(spec.clone(), T::DTYPE, n);
    (problem.q_strides, problem.k_strides) = (leading(input.q.strides()), leading(input.k.strides()));
    (problem.v_strides, problem.out_strides) = (leading(input.v.strides()), leading(output.out.strides()));
    let mut args = RetentionArgs { q: input.q.ptr(), k: input.k.ptr(), v: input.v.ptr(), ..RetentionArgs::default() };
    (args.decay, args.out) = (input.decay.ptr(), output.out.ptr());
    if let Some(state) = &input.state_in {
        (problem.state_in_strides, args.state_in) = (leading(state.strides()), state.ptr());
    }
    if let Some(state) = &output.state_out {
        (problem.state_out_strides, args.state_out) = (leading(state.strides()), state.ptr());
    }
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { RetentionPlan::new(&problem)?.launch(queue.driver(), &args, queue.stream()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_shapes() {
        let message = |problem: RetentionProblem| RetentionPlan::new(&problem).unwrap_err().to_string();
        let good = || RetentionProblem::new(Retention::new(2, 16, 8), Dtype::BF16, 3);
        assert_eq!(
            message(RetentionProblem { dtype: Dtype::F64, ..good() }),
            "`q, k, v and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(
            message(RetentionProblem::new(Retention::new(1, 793, 8), Dtype::F32, 1)),
            "unsupported by cuda: retention with a head_dim of 793, above 792"
        );
        assert_eq!(
            message(RetentionProblem::new(Retention::new(65536, 8, 8), Dtype::F32, 1)),
            "`num_heads` is 65536, expected at most 65535"
        );
        assert_eq!(
            message(RetentionProblem { out_strides: [16, 7], ..good() }),
            "`out` has strides [16, 7, 1], expected rows that do not overlap"
        );
    }
}
