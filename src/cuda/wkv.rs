//! RWKV-4's `wkv` on the GPU: a thread per channel walks the tokens.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::Kernel;
use crate::cuda::kernels::wkv as kernels;
use crate::cuda::memory::{DeviceView, DeviceViewMut, Queue};
use crate::cuda::rows::{MAX_ROWS, MAX_WIDTH};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result, check_len};
use crate::view::check_disjoint;

/// Most sequences: the y extent of a grid.
const MAX_BATCH: usize = 65535;

/// What to compute: [`wkv`] of `batch` sequences of `seq` tokens. Strides count elements.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WkvProblem {
    /// Element type of `k`, `v` and `out`: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Sequences; 0 is legal.
    pub batch: usize,
    /// Tokens of each; 0 is legal.
    pub seq: usize,
    /// Channels; 0 is legal.
    pub channels: usize,
    /// Between sequences and between tokens of `k`.
    pub k_strides: [usize; 2],
    /// The same of `v`.
    pub v_strides: [usize; 2],
    /// The same of `out`.
    pub out_strides: [usize; 2],
    /// Between the three parts and between sequences of `state_in`.
    pub state_in_strides: [usize; 2],
    /// The same of `state_out`.
    pub state_out_strides: [usize; 2],
}

impl WkvProblem {
    /// Contiguous arrays.
    pub fn new(dtype: Dtype, batch: usize, seq: usize, channels: usize) -> Self {
        let tokens = [seq.saturating_mul(channels), channels];
        let state = [batch.saturating_mul(channels), channels];
        WkvProblem {
            dtype,
            batch,
            seq,
            channels,
            k_strides: tokens,
            v_strides: tokens,
            out_strides: tokens,
            state_in_strides: state,
            state_out_strides: state,
        }
    }
}

/// Device pointers of one call; 0 where there is no such array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WkvArgs {
    /// Read.
    pub k: u64,
    /// Read.
    pub v: u64,
    /// f32 `[channels]`, read.
    pub decay: u64,
    /// f32 `[channels]`, read.
    pub first: u64,
    /// f32, read; 0: the state is `(0, 0, -1e38)`.
    pub state_in: u64,
    /// Written.
    pub out: u64,
    /// f32, written; 0: not wanted. May be `state_in` itself.
    pub state_out: u64,
}

/// [`WkvProblem`] with its kernel and grid. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WkvPlan {
    problem: WkvProblem,
    grid: [u32; 3],
    kernel: &'static Kernel,
}

impl WkvPlan {
    /// Checks the shapes and chooses the kernel.
    ///
    /// # Errors
    /// [`Error::Dtype`]; [`Error::Value`] for more than 65535 sequences, 2^31 - 1 tokens or 2^30 channels; [`Error::Stride`] if
    /// rows of an output overlap or rows leave the address space.
    pub fn new(problem: &WkvProblem) -> Result<Self> {
        let &WkvProblem { dtype, batch, seq, channels, .. } = problem;
        let Some(instance) = kernels::INSTANCES.iter().find(|i| i.dtype == dtype) else {
            let (argument, expected) = ("k, v and out".into(), "bf16, f16 or f32".into());
            return Err(Error::Dtype { argument, expected, found: dtype.to_string() });
        };
        for (name, found, most) in
            [("batch", batch, MAX_BATCH), ("seq", seq, MAX_ROWS), ("channels", channels, MAX_WIDTH)]
        {
            if found > most {
                return Err(Error::value(name, format!("at most {most}"), found));
            }
        }
        for (name, size, rows, [outer, inner]) in [
            ("k", dtype.size_bytes(), [batch, seq], problem.k_strides),
            ("v", dtype.size_bytes(), [batch, seq], problem.v_strides),
            ("out", dtype.size_bytes(), [batch, seq], problem.out_strides),
            ("state_in", 4, [3, batch], problem.state_in_strides),
            ("state_out", 4, [3, batch], problem.state_out_strides),
        ] {
            if name.ends_with("out") {
                check_disjoint(name, &[rows[0], rows[1], channels], &[outer, inner, 1])?;
            }
            if extent_bytes(size, rows, channels, [outer, inner]) > i64::MAX as u64 {
                let expected = "rows within 2^63 bytes".into();
                return Err(Error::Stride { argument: name.into(), expected, found: vec![outer, inner, 1] });
            }
        }
        let ctas = channels.div_ceil(instance.kernel.threads as usize) as u32;
        Ok(WkvPlan { problem: problem.clone(), grid: [ctas, batch as u32, 1], kernel: &instance.kernel })
    }

    /// Name of the kernel.
    pub fn kernel(&self) -> &'static str {
        self.kernel.entry
    }

    /// Device memory that [`WkvPlan::launch`] needs besides its arguments.
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

    /// Queues the work on a stream. Does not wait; after [`WkvPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element; [`Error::Overlap`] if an output shares memory with
    /// another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended; no
    /// other work writes the inputs or touches the outputs meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &WkvArgs, stream: Stream) -> Result<()> {
        let WkvProblem { dtype, batch, seq, channels, .. } = self.problem;
        if batch == 0 || channels == 0 || seq == 0 && args.state_out == 0 {
            return Ok(());
        }
        let problem = &self.problem;
        let size = dtype.size_bytes();
        let tokens = |strides| extent_bytes(size, [batch, seq], channels, strides);
        let state = |strides| extent_bytes(4, [3, batch], channels, strides);
        let inputs = [
            ("k", args.k, size as u64, tokens(problem.k_strides)),
            ("v", args.v, size as u64, tokens(problem.v_strides)),
            ("decay", args.decay, 4, channels as u64 * 4),
            ("first", args.first, 4, channels as u64 * 4),
            ("state_in", args.state_in, 4, state(problem.state_in_strides)),
        ];
        let outputs = [
            ("out", args.out, size as u64, tokens(problem.out_strides)),
            ("state_out", args.state_out, 4, state(problem.state_out_strides)),
        ];
        let absent = |name: &str, ptr: u64, bytes: u64| bytes == 0 || ptr == 0 && name.starts_with("state");
        for (name, ptr, size, bytes) in inputs.into_iter().chain(outputs).filter(|a| !absent(a.0, a.1, a.3)) {
            if ptr == 0 || !ptr.is_multiple_of(size) || ptr.checked_add(bytes).is_none() {
                let expected = format!("a device pointer that is a multiple of {size}");
                return Err(Error::value(name, expected, format_args!("{ptr:#x}")));
            }
        }
        for (i, out) in outputs.iter().enumerate().filter(|(_, a)| !absent(a.0, a.1, a.3)) {
            let in_place = |name: &str, ptr: u64| {
                let same = problem.state_in_strides == problem.state_out_strides;
                out.0 == "state_out" && name == "state_in" && ptr == out.1 && same
            };
            for other in inputs.iter().chain(&outputs[..i]).filter(|a| !absent(a.0, a.1, a.3)) {
                if !in_place(other.0, other.1) && out.1 < other.1 + other.3 && other.1 < out.1 + out.3 {
                    return Err(Error::Overlap { argument: out.0.into(), other: other.0.into() });
                }
            }
        }
        let bytes = |strides: [usize; 2], size: usize| strides.map(|stride| (stride as u64).wrapping_mul(size as u64));
        let [k_batch_bytes, k_token_bytes] = bytes(problem.k_strides, size);
        let [v_batch_bytes, v_token_bytes] = bytes(problem.v_strides, size);
        let [out_batch_bytes, out_token_bytes] = bytes(problem.out_strides, size);
        let [state_in_part_bytes, state_in_batch_bytes] = bytes(problem.state_in_strides, 4);
        let [state_out_part_bytes, state_out_batch_bytes] = bytes(problem.state_out_strides, 4);
        let params = kernels::Params {
            k_ptr: args.k,
            k_batch_bytes,
            k_token_bytes,
            v_ptr: args.v,
            v_batch_bytes,
            v_token_bytes,
            out_ptr: args.out,
            out_batch_bytes,
            out_token_bytes,
            state_in_ptr: args.state_in,
            state_in_part_bytes,
            state_in_batch_bytes,
            state_out_ptr: args.state_out,
            state_out_part_bytes,
            state_out_batch_bytes,
            decay_ptr: args.decay,
            first_ptr: args.first,
            seq: seq as u32,
            channels: channels as u32,
        };
        // SAFETY: pointers are not null and aligned to their elements, checked above; that they hold the arrays that the plan
        // describes, and the rest, is the caller's promise.
        unsafe { driver.launch(self.kernel, &Launch::grid(self.grid), &params.to_bytes(), stream) }
    }
}

/// Bytes from the first element to one past the last; saturates.
fn extent_bytes(size: usize, rows: [usize; 2], width: usize, strides: [usize; 2]) -> u64 {
    if rows.contains(&0) || width == 0 {
        return 0;
    }
    let last = |n: usize, stride: usize| (n as u64 - 1).saturating_mul(stride as u64);
    let elements = last(rows[0], strides[0]).saturating_add(last(rows[1], strides[1])).saturating_add(width as u64);
    elements.saturating_mul(size as u64)
}

/// Sequences of equal length for [`wkv`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WkvInput<'a, T> {
    /// `[batch, seq, channels]`
    pub k: DeviceView<'a, T, 3>,
    /// `[batch, seq, channels]`
    pub v: DeviceView<'a, T, 3>,
    /// `[channels]`: the state fades by `exp(-exp(decay))` per token.
    pub decay: DeviceView<'a, f32, 1>,
    /// `[channels]`: added to the key of the token itself.
    pub first: DeviceView<'a, f32, 1>,
    /// `[3, batch, channels]`: the state after the tokens before these. `None`: `(0, 0, -1e38)`.
    pub state_in: Option<DeviceView<'a, f32, 3>>,
}

impl<'a, T> WkvInput<'a, T> {
    /// Sequences from their start.
    pub const fn new(
        k: DeviceView<'a, T, 3>,
        v: DeviceView<'a, T, 3>,
        decay: DeviceView<'a, f32, 1>,
        first: DeviceView<'a, f32, 1>,
    ) -> Self {
        WkvInput { k, v, decay, first, state_in: None }
    }
}

/// What [`wkv`] writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct WkvOutput<'a, T> {
    /// `[batch, seq, channels]`
    pub out: DeviceViewMut<'a, T, 3>,
    /// `[3, batch, channels]`: the state after the last token.
    pub state_out: Option<DeviceViewMut<'a, f32, 3>>,
}

impl<'a, T> WkvOutput<'a, T> {
    /// Without the state.
    pub const fn new(out: DeviceViewMut<'a, T, 3>) -> Self {
        WkvOutput { out, state_out: None }
    }

    /// With the state.
    pub const fn with_state(out: DeviceViewMut<'a, T, 3>, state_out: DeviceViewMut<'a, f32, 3>) -> Self {
        WkvOutput { out, state_out: Some(state_out) }
    }
}

/// RWKV-4's weighted average of the values so far. Per batch row and channel, with `w = -exp(decay)` and the state
/// `(num, den, max)`, for each token:
///
/// ```text
/// m   = max(max, k + first)
/// out = (e^(max - m) num + e^(k + first - m) v) / (e^(max - m) den + e^(k + first - m))
/// m   = max(max + w, k)
/// num = e^(max + w - m) num + e^(k - m) v,  den = e^(max + w - m) den + e^(k - m),  max = m
/// ```
///
/// * `k`, `v`, `out`: `[batch, seq, channels]`; `decay`, `first`: `[channels]`
/// * `state_in`, `state_out`: `[3, batch, channels]`; the state starts as `(0, 0, -1e38)`
///
/// All in f32, one rounding to `T` at the end. No sequence and no channel is a legal call; without tokens `state_out` is the state
/// that there was.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; those of [`WkvPlan::new`] and [`WkvPlan::launch`]. Nothing is written then.
///
/// Peng et al. 2023, arXiv:2305.13048.
pub fn wkv<T: Element>(queue: &mut Queue<'_>, input: &WkvInput<'_, T>, output: WkvOutput<'_, T>) -> Result<()> {
    queue.check_homes(&[
        input.k.home(),
        input.v.home(),
        input.decay.home(),
        input.first.home(),
        input.state_in.and_then(|view| view.home()),
        output.out.home(),
        output.state_out.as_ref().and_then(|view| view.home()),
    ])?;
    let shape @ [batch, seq, channels] = input.k.shape();
    input.k.check("k", shape)?;
    input.v.check("v", shape)?;
    for (name, vector) in [("decay", input.decay), ("first", input.first)] {
        check_len(name, vector.shape()[0], channels)?;
        vector.check(name, [channels])?;
    }
    input.state_in.map_or(Ok(()), |state| state.check("state_in", [3, batch, channels]))?;
    output.out.check("out", shape)?;
    output.state_out.as_ref().map_or(Ok(()), |state| state.check("state_out", [3, batch, channels]))?;
    let leading = |strides: [usize; 3]| [strides[0], strides[1]];
    let mut problem = WkvProblem::new(T::DTYPE, batch, seq, channels);
    (problem.k_strides, problem.v_strides) = (leading(input.k.strides()), leading(input.v.strides()));
    problem.out_strides = leading(output.out.strides());
    let mut args = WkvArgs { k: input.k.ptr(), v: input.v.ptr(), out: output.out.ptr(), ..WkvArgs::default() };
    (args.decay, args.first) = (input.decay.ptr(), input.first.ptr());
    if let Some(state) = &input.state_in {
        (problem.state_in_strides, args.state_in) = (leading(state.strides()), state.ptr());
    }
    if let Some(state) = &output.state_out {
        (problem.state_out_strides, args.state_out) = (leading(state.strides()), state.ptr());
    }
    // SAFETY: the views hold memory of these shapes and strides, checked above, on the queue's device and in its order.
    unsafe { WkvPlan::new(&problem)?.launch(queue.driver(), &args, queue.stream()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_shapes() {
        let message = |problem: WkvProblem| WkvPlan::new(&problem).unwrap_err().to_string();
        let good = || WkvProblem::new(Dtype::BF16, 2, 3, 8);
        assert_eq!(
            message(WkvProblem { dtype: Dtype::F64, ..good() }),
            "`k, v and out` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(message(WkvProblem { batch: 65536, ..good() }), "`batch` is 65536, expected at most 65535");
        assert_eq!(
            message(WkvProblem { out_strides: [24, 7], ..good() }),
            "`out` has strides [24, 7, 1], expected rows that do not overlap"
        );
        assert_eq!(
            message(WkvProblem { k_strides: [usize::MAX, 8], ..good() }),
            format!("`k` has strides [{}, 8, 1], expected rows within 2^63 bytes", usize::MAX)
        );
    }
}
