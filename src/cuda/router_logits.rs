//! The router's logits on the GPU: a linear layer with f32 results whose input may be jittered.

use crate::cuda::driver::{Driver, Launch, Limits, Stream};
use crate::cuda::kernels::{Kernel, router_jitter, router_logits as plain, router_logits_mma as mma};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Parts, Queue};
use crate::cuda::rows::{Rows, check_output_stride, check_sizes, stride_bytes};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::spec::Router;

/// What to compute: `logits[t, e] = sum_d x[t, d] * weight[e, d] + bias[e]`, with `x` the hidden states, or with
/// [`Router::jitter`] the jittered ones (see [`router_logits`]).
///
/// * `hidden`: `[num_tokens, hidden_size]`, `weight`: `[num_experts, hidden_size]`, `bias`: `[num_experts]` f32
/// * `logits`: `[num_tokens, num_experts]` f32
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RouterLogits {
    /// Element type of `hidden`: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Element type of `weight`: bf16, f16 or f32.
    pub weight_dtype: Dtype,
    /// Rows of `hidden`; 0 is legal.
    pub num_tokens: usize,
    /// Rows of `weight`.
    pub num_experts: usize,
    /// Columns of both.
    pub hidden_size: usize,
    /// [`Router::jitter`].
    pub jitter: Option<f64>,
    /// Elements from one row of `hidden` to the next.
    pub hidden_stride: usize,
    /// Elements from one row of `weight` to the next.
    pub weight_stride: usize,
    /// Elements from one row of `logits` to the next.
    pub logits_stride: usize,
}

impl RouterLogits {
    /// Contiguous arrays of one type, no jitter.
    pub fn new(dtype: Dtype, num_tokens: usize, num_experts: usize, hidden_size: usize) -> Self {
        RouterLogits {
            dtype,
            weight_dtype: dtype,
            num_tokens,
            num_experts,
            hidden_size,
            jitter: None,
            hidden_stride: hidden_size,
            weight_stride: hidden_size,
            logits_stride: num_experts,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouterLogitsArgs {
    /// Read.
    pub hidden: u64,
    /// Read.
    pub weight: u64,
    /// Read, where there is one.
    pub bias: Option<u64>,
    /// Written.
    pub logits: u64,
    /// Key of the random numbers, where there is jitter.
    pub seed: u64,
    /// As large as [`RouterLogitsPlan::workspace_bytes`] tells, a multiple of 256; 0 if that is 0.
    pub workspace: u64,
}

impl RouterLogitsArgs {
    /// No bias, seed 0, no workspace.
    pub fn new(hidden: u64, weight: u64, logits: u64) -> Self {
        RouterLogitsArgs { hidden, weight, bias: None, logits, seed: 0, workspace: 0 }
    }
}

/// [`RouterLogits`] with its kernels and grids. Pure data.
///
/// Two 16-bit types that are equal are multiplied on tensor cores, all others in f32. Every kernel of a pair of types adds in the
/// same order, so a logit's bits depend on its two rows alone; with jitter, also on the token's number.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RouterLogitsPlan {
    dtype: Dtype,
    weight_dtype: Dtype,
    num_tokens: usize,
    num_experts: usize,
    hidden_size: usize,
    hidden_stride_bytes: u64,
    weight_stride_bytes: u64,
    logits_stride_bytes: u64,
    /// Kernel and an f32 by its bits.
    jitter: Option<(&'static Kernel, u32)>,
    /// For rows that begin at multiples of a vector; `None` where widths and strides rule that out.
    aligned: Option<Tile>,
    /// For any rows; the same bits.
    unaligned: Tile,
    workspace_bytes: usize,
}

/// A kernel and what a CTA of it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Tile {
    kernel: &'static Kernel,
    tokens: usize,
    experts: usize,
    /// Bytes that rows of `hidden` and of `weight` begin at multiples of.
    vectors: [u64; 2],
}

impl Tile {
    fn ctas(&self, problem: &RouterLogits) -> usize {
        problem.num_tokens.div_ceil(self.tokens) * problem.num_experts.div_ceil(self.experts)
    }
}

/// The kernels for a pair of types, (aligned, from the largest tile to the smallest; unaligned).
fn tiles(x: Dtype, weight: Dtype) -> (Vec<Tile>, Option<Tile>) {
    let mut found: Vec<(bool, Tile)> = if x == weight && x != Dtype::F32 {
        let of_type = mma::INSTANCES.iter().filter(|i| i.dtype == x);
        of_type
            .map(|i| {
                let (tokens, experts) = (8 * i.token_tiles as usize, 16 * i.expert_tiles as usize);
                (i.aligned, Tile { kernel: &i.kernel, tokens, experts, vectors: [16; 2] })
            })
            .collect()
    } else {
        let of_types = plain::INSTANCES.iter().filter(|i| i.dtype == x && i.weight == weight);
        of_types
            .map(|i| {
                let (tokens, experts) = (i.tokens as usize, (i.experts * i.warps) as usize);
                let vectors = [x, weight].map(|dtype| 4 * dtype.size_bytes() as u64);
                (i.aligned, Tile { kernel: &i.kernel, tokens, experts, vectors })
            })
            .collect()
    };
    found.sort_by_key(|(_, tile)| std::cmp::Reverse(tile.tokens * tile.experts));
    let unaligned = found.iter().find(|(aligned, _)| !aligned).map(|(_, tile)| *tile);
    (found.into_iter().filter(|(aligned, _)| *aligned).map(|(_, tile)| tile).collect(), unaligned)
}

impl RouterLogitsPlan {
    /// Checks the shape and chooses the kernels: the largest tile of which there are as many as multiprocessors.
    ///
    /// # Errors
    /// [`Error::Dtype`] unless both types are bf16, f16 or f32; [`Error::Value`] for sizes and a jitter out of range;
    /// [`Error::Stride`] if rows of `logits` overlap, or the last row has no address; [`Error::Unsupported`] for too many experts.
    pub fn new(problem: &RouterLogits, limits: &Limits) -> Result<Self> {
        let RouterLogits { dtype, weight_dtype, num_tokens, num_experts, hidden_size, .. } = *problem;
        check_sizes(("num_tokens", num_tokens), ("hidden_size", hidden_size))?;
        for (name, dtype) in [("hidden", dtype), ("weight", weight_dtype)] {
            if !matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) {
                let expected = "bf16, f16 or f32".into();
                return Err(Error::Dtype { argument: name.into(), expected, found: dtype.to_string() });
            }
        }
        if let Some(jitter) = problem.jitter
            && !(0.0..1.0).contains(&jitter)
        {
            return Err(Error::value("jitter", "at least 0 and below 1", jitter));
        }
        if num_experts == 0 {
            return Err(Error::value("num_experts", "at least 1", num_experts));
        }
        check_output_stride("logits", num_tokens, num_experts, problem.logits_stride)?;
        let jitter_kernel = |kernel_of| router_jitter::INSTANCES.iter().find(|i| i.dtype == kernel_of);
        let jitter = match (problem.jitter, jitter_kernel(dtype)) {
            (Some(jitter), Some(instance)) => Some((&instance.kernel, (jitter as f32).to_bits())),
            _ => None,
        };
        // Jittered rows are f32 and contiguous, in the workspace.
        let (x, x_stride) = match jitter {
            Some(_) => (Dtype::F32, hidden_size),
            None => (dtype, problem.hidden_stride),
        };
        let mut parts = Parts::default();
        if jitter.is_some() {
            parts.part(num_tokens.saturating_mul(hidden_size), 4);
        }
        let (aligned, unaligned) = tiles(x, weight_dtype);
        let unaligned = unaligned.ok_or_else(|| Error::unsupported("cuda", format!("{x} times {weight_dtype}")))?;
        if num_experts.div_ceil(unaligned.experts) > 65535 {
            return Err(Error::unsupported("cuda", format!("{num_experts} experts")));
        }
        let x_stride_bytes = stride_bytes("hidden", x, num_tokens, x_stride)?;
        let weight_stride_bytes = stride_bytes("weight", weight_dtype, num_experts, problem.weight_stride)?;
        let enough = limits.num_sms.max(1) as usize;
        let wide = aligned.iter().find(|tile| tile.ctas(problem) >= enough).or(aligned.last()).copied();
        let aligned = wide.filter(|tile| {
            let row_bytes = [x, weight_dtype].map(|dtype| (hidden_size * dtype.size_bytes()) as u64);
            let strides = [x_stride_bytes, weight_stride_bytes];
            (0..2).all(|i| {
                row_bytes[i].is_multiple_of(tile.vectors[i])
                    && (strides[i].is_multiple_of(tile.vectors[i]) || [num_tokens, num_experts][i] == 1)
            })
        });
        Ok(RouterLogitsPlan {
            dtype,
            weight_dtype,
            num_tokens,
            num_experts,
            hidden_size,
            hidden_stride_bytes: stride_bytes("hidden", dtype, num_tokens, problem.hidden_stride)?,
            weight_stride_bytes,
            logits_stride_bytes: stride_bytes("logits", Dtype::F32, num_tokens, problem.logits_stride)?,
            jitter,
            aligned,
            unaligned,
            workspace_bytes: parts.bytes(),
        })
    }

    /// Name of the kernel that multiplies when all pointers are multiples of 16. Others take its unaligned twin, with the same bits.
    pub fn kernel(&self) -> &'static str {
        self.aligned.unwrap_or(self.unaligned).kernel.entry
    }

    /// Device memory that [`RouterLogitsPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        let tiles = self.aligned.iter().chain([&self.unaligned]).map(|tile| tile.kernel);
        tiles.chain(self.jitter.map(|(kernel, _)| kernel)).try_for_each(|kernel| driver.load(kernel))
    }

    /// Queues the work on a stream. Does not wait; after [`RouterLogitsPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element (the workspace: to 256); [`Error::Overlap`] if `logits`
    /// or the workspace shares memory with another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shape and strides, valid until the work has ended;
    /// no other work writes the inputs or touches `logits` and the workspace meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &RouterLogitsArgs, stream: Stream) -> Result<()> {
        let (tokens, experts) = (self.num_tokens, self.num_experts);
        if tokens == 0 {
            return Ok(());
        }
        let rows = |name, ptr, num_rows, width: usize, dtype: Dtype, stride_bytes| {
            (Rows { name, ptr, num_rows, row_bytes: (width * dtype.size_bytes()) as u64, stride_bytes }, dtype)
        };
        let hidden = rows("hidden", args.hidden, tokens, self.hidden_size, self.dtype, self.hidden_stride_bytes);
        let weight =
            rows("weight", args.weight, experts, self.hidden_size, self.weight_dtype, self.weight_stride_bytes);
        let bias = args.bias.map(|ptr| rows("bias", ptr, 1, experts, Dtype::F32, 0));
        let logits = rows("logits", args.logits, tokens, experts, Dtype::F32, self.logits_stride_bytes);
        let row_bytes = (self.hidden_size * 4) as u64;
        let jittered = self.jitter.map(|_| {
            let ptr = args.workspace;
            (Rows { name: "workspace", ptr, num_rows: tokens, row_bytes, stride_bytes: row_bytes }, Dtype::F32)
        });
        let inputs = [Some(hidden), Some(weight), bias];
        let all = inputs.iter().flatten().chain([&logits]).chain(&jittered);
        all.into_iter().try_for_each(|(rows, dtype)| rows.check(*dtype))?;
        for (written, _) in [Some(logits), jittered].iter().flatten() {
            inputs.iter().flatten().try_for_each(|(read, _)| written.check_separate(read))?;
        }
        if let Some((jittered, _)) = &jittered {
            if !jittered.ptr.is_multiple_of(256) {
                let found = format_args!("{:#x}", jittered.ptr);
                return Err(Error::value("workspace", "a device pointer that is a multiple of 256", found));
            }
            logits.0.check_separate(jittered)?;
        }
        if let (Some((kernel, jitter)), Some((jittered, _))) = (self.jitter, &jittered) {
            let params = router_jitter::Params {
                hidden_ptr: args.hidden,
                out_ptr: jittered.ptr,
                hidden_stride_bytes: self.hidden_stride_bytes,
                seed: args.seed,
                hidden_size: self.hidden_size as u32, // at most 2^30, seen by `new`
                jitter: f32::from_bits(jitter),
            };
            // SAFETY: pointers are not null and aligned to the element, checked above; the rest is the caller's promise.
            unsafe { driver.launch(kernel, &Launch::grid([tokens as u32, 1, 1]), &params.to_bytes(), stream)? };
        }
        let (x, _) = jittered.unwrap_or(hidden);
        let tile = match self.aligned {
            Some(tile) if [x.ptr, args.weight].iter().zip(tile.vectors).all(|(p, v)| p.is_multiple_of(v)) => tile,
            _ => self.unaligned,
        };
        let params = plain::Params {
            hidden_ptr: x.ptr,
            weight_ptr: args.weight,
            bias_ptr: args.bias.unwrap_or(0),
            logits_ptr: args.logits,
            hidden_stride_bytes: x.stride_bytes,
            weight_stride_bytes: self.weight_stride_bytes,
            logits_stride_bytes: self.logits_stride_bytes,
            num_tokens: tokens as u32, // at most 2^31 - 1, seen by `new`
            num_experts: experts as u32,
            hidden_size: self.hidden_size as u32,
        };
        // Both templates take the same parameters, which a test holds.
        let grid = [tokens.div_ceil(tile.tokens) as u32, experts.div_ceil(tile.experts) as u32, 1];
        // SAFETY: as above, and aligned as the kernel requires.
        unsafe { driver.launch(tile.kernel, &Launch::grid(grid), &params.to_bytes(), stream) }
    }
}

/// The router's logits: `logits[t, e] = sum_d x[t, d] * weight[e, d] + bias[e]`.
///
/// `x[t, d] = hidden[t, d]`, with [`Router::jitter`] `hidden[t, d] * (1 + jitter * (2 u - 1))`, where `u` is draw `d` of token `t`
/// ([`crate::random::uniform`] with `seed`).
///
/// * `hidden`: `[num_tokens, hidden_size]`, `weight`: `[num_experts, hidden_size]`, `bias`: `[num_experts]`
/// * `logits`: `[num_tokens, num_experts]`
///
/// Sums are f32, in an order that does not depend on the other tokens; jittered rows are f32, whatever `T` is.
///
/// # Errors
/// Those of [`Router::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; those of [`RouterLogitsPlan`];
/// [`Error::Value`] for arrays that are lent to another stream. Nothing is written then.
pub fn router_logits<T: Element, W: Element>(
    queue: &mut Queue<'_>,
    spec: &Router,
    hidden: DeviceView<'_, T, 2>,
    weight: DeviceView<'_, W, 2>,
    bias: Option<DeviceView<'_, f32, 1>>,
    seed: u64,
    logits: DeviceViewMut<'_, f32, 2>,
) -> Result<()> {
    spec.validate()?;
    let [num_tokens, width] = hidden.shape();
    hidden.check("hidden", [num_tokens, width])?;
    weight.check("weight", [spec.num_experts, width])?;
    bias.map_or(Ok(()), |bias| bias.check("bias", [spec.num_experts]))?;
    logits.check("logits", [num_tokens, spec.num_experts])?;
    queue.check_homes(&[hidden.home(), weight.home(), bias.and_then(|bias| bias.home()), logits.home()])?;
    let mut problem = RouterLogits::new(T::DTYPE, num_tokens, spec.num_experts, width);
    problem.weight_dtype = W::DTYPE;
    problem.jitter = spec.jitter;
    problem.hidden_stride = hidden.strides()[0];
    problem.weight_stride = weight.strides()[0];
    problem.logits_stride = logits.strides()[0];
    let plan = RouterLogitsPlan::new(&problem, &queue.driver().limits())?;
    let args = RouterLogitsArgs {
        bias: bias.map(|bias| bias.ptr()),
        seed,
        workspace: queue.workspace(plan.workspace_bytes())?,
        ..RouterLogitsArgs::new(hidden.ptr(), weight.ptr(), logits.ptr())
    };
    // SAFETY: the views are memory of the queue's device, with the shapes checked above; `logits` is borrowed alone.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: Limits = Limits::new(90, 132, 227 << 10);

    #[test]
    fn kernels() {
        let kernel = |problem: &RouterLogits| RouterLogitsPlan::new(problem, &LARGE).unwrap().kernel();
        let with = |dtype, weight_dtype, tokens, width| RouterLogits {
            weight_dtype,
            ..RouterLogits::new(dtype, tokens, 128, width)
        };
        let (bf16, f16, f32) = (Dtype::BF16, Dtype::F16, Dtype::F32);
        assert_eq!(kernel(&with(bf16, bf16, 1, 4096)), "gatefold_router_logits_mma_bf16_16x8");
        assert_eq!(kernel(&with(f16, f16, 1024, 4096)), "gatefold_router_logits_mma_f16_16x32");
        assert_eq!(kernel(&with(bf16, bf16, 4096, 4096)), "gatefold_router_logits_mma_bf16_64x32");
        assert_eq!(kernel(&with(bf16, bf16, 4096, 4095)), "gatefold_router_logits_mma_bf16_16x8_unaligned");
        assert_eq!(kernel(&with(bf16, f32, 1, 4096)), "gatefold_router_logits_bf16_f32_t2");
        assert_eq!(kernel(&with(f32, f32, 4096, 4100)), "gatefold_router_logits_f32_f32_t8");
        assert_eq!(kernel(&with(f32, bf16, 1, 4097)), "gatefold_router_logits_f32_bf16_unaligned");
        let jittered = RouterLogits { jitter: Some(0.01), ..with(bf16, bf16, 2, 64) };
        assert_eq!(kernel(&jittered), "gatefold_router_logits_f32_bf16_t2");
        assert_eq!(RouterLogitsPlan::new(&jittered, &LARGE).unwrap().workspace_bytes(), 512);
    }

    #[test]
    fn launch_parameters() {
        let params = plain::INSTANCES[0].kernel.params;
        assert!(mma::INSTANCES.iter().all(|instance| instance.kernel.params == params));
    }

    #[test]
    fn bad_problems() {
        let message = |problem: RouterLogits| RouterLogitsPlan::new(&problem, &LARGE).unwrap_err().to_string();
        let good = || RouterLogits::new(Dtype::BF16, 3, 8, 16);
        let bad = RouterLogits { weight_dtype: Dtype::F64, ..good() };
        assert_eq!(message(bad), "`weight` has element type f64, expected bf16, f16 or f32");
        assert_eq!(message(RouterLogits { hidden_size: 0, ..good() }), "`hidden_size` is 0, expected 1 to 1073741824");
        assert_eq!(message(RouterLogits { num_experts: 0, ..good() }), "`num_experts` is 0, expected at least 1");
        assert_eq!(
            message(RouterLogits { logits_stride: 7, ..good() }),
            "`logits` has strides [7, 1], expected rows that do not overlap (at least 8 apart)"
        );
        let jitter = RouterLogits { jitter: Some(1.0), ..good() };
        assert_eq!(message(jitter), "`jitter` is 1, expected at least 0 and below 1");
    }
}
