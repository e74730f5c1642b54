//! The routed experts on the GPU: assignments sorted by expert, the two products of every expert in one launch each (one per size
//! of row tiles), and the weighted sum per token.

use crate::cuda::combine::{Combine, CombineArgs, CombinePlan};
use crate::cuda::driver::{Driver, Limits, Stream};
use crate::cuda::ffn::{Block, BlockPlan, BlockRows, ExpertWeights, FfnArgs, FfnStrides};
use crate::cuda::group_tokens::{GroupTokens, GroupTokensArgs, GroupTokensPlan};
use crate::cuda::grouped_gemm::{F32Products, GemmRows};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Parts, Queue};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::spec::{ExpertFfn, WeightFormat, WeightOn};

/// Experts of each token and their weights.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Routing<'a> {
    /// `[num_tokens, slots]`: ids that are not of this rank, and -1, are skipped.
    pub topk_ids: DeviceView<'a, i32, 2>,
    /// `[num_tokens, slots]`
    pub topk_weights: DeviceView<'a, f32, 2>,
}

impl<'a> Routing<'a> {
    /// Both arrays.
    pub const fn new(topk_ids: DeviceView<'a, i32, 2>, topk_weights: DeviceView<'a, f32, 2>) -> Self {
        Routing { topk_ids, topk_weights }
    }

    /// Checks both shapes; gives the slots.
    pub(super) fn check(&self, num_tokens: usize) -> Result<usize> {
        let [_, slots] = self.topk_ids.shape();
        self.topk_ids.check("topk_ids", [num_tokens, slots])?;
        self.topk_weights.check("topk_weights", [num_tokens, slots])?;
        Ok(slots)
    }
}

/// What to compute: see [`expert_ffn`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpertFfnProblem {
    /// The experts.
    pub spec: ExpertFfn,
    /// Element type of activations, weights and `out`: bf16, f16 or f32.
    pub dtype: Dtype,
    /// How f32 is multiplied; of no meaning for other types.
    pub f32_products: F32Products,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Experts per token; 0 is legal.
    pub slots: usize,
    /// The ids of a token differ from one another, as those of [`route`](crate::cuda::route) do. Then an expert has no more rows
    /// than there are tokens, and few tokens need fewer launches. If it is not true, rows may be missing in the sums.
    pub distinct_ids: bool,
    /// Elements from one row of `hidden` to the next.
    pub hidden_stride: usize,
    /// Elements from one row of `topk_ids` to the next.
    pub topk_ids_stride: usize,
    /// Elements from one row of `topk_weights` to the next.
    pub topk_weights_stride: usize,
    /// How the weights lie.
    pub weights: FfnStrides,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl ExpertFfnProblem {
    /// Contiguous arrays, gate and up separate.
    pub fn new(spec: &ExpertFfn, dtype: Dtype, num_tokens: usize, slots: usize) -> Self {
        ExpertFfnProblem {
            spec: *spec,
            dtype,
            f32_products: F32Products::Full,
            num_tokens,
            slots,
            distinct_ids: false,
            hidden_stride: spec.ffn.hidden_size,
            topk_ids_stride: slots,
            topk_weights_stride: slots,
            weights: FfnStrides::separate(&spec.ffn),
            out_stride: spec.ffn.hidden_size,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExpertFfnArgs {
    /// Read.
    pub hidden: u64,
    /// Read.
    pub topk_ids: u64,
    /// Read.
    pub topk_weights: u64,
    /// Read.
    pub weights: FfnArgs,
    /// Written.
    pub out: u64,
    /// [`ExpertFfnPlan::workspace_bytes`] bytes, a multiple of 256.
    pub workspace: u64,
}

impl ExpertFfnArgs {
    /// Pointers by value.
    pub fn new(hidden: u64, topk_ids: u64, topk_weights: u64, weights: FfnArgs, out: u64, workspace: u64) -> Self {
        ExpertFfnArgs { hidden, topk_ids, topk_weights, weights, out, workspace }
    }
}

/// What the shared expert adds to each token.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedRows {
    /// `[num_tokens, hidden_size]` of the activations' type, contiguous.
    pub rows: u64,
    /// `[num_tokens]` f32, before the sigmoid.
    pub gate: Option<u64>,
}

/// Where things lie in the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Offsets {
    expert_offsets: usize,
    row_token: usize,
    row_weight: usize,
    position: usize,
    tile_counts: usize,
    tiles: usize,
    group: usize,
    inner: usize,
    rows: usize,
    bytes: usize,
}

/// [`ExpertFfnProblem`] with its kernels, grids and workspace. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExpertFfnPlan {
    num_tokens: usize,
    group: GroupTokensPlan,
    block: BlockPlan,
    combine: CombinePlan,
    on_input: bool,
    offsets: Offsets,
}

impl ExpertFfnPlan {
    /// Checks the shapes and chooses kernels and grids for a device.
    ///
    /// # Errors
    /// Those of [`ExpertFfn::validate`]; [`Error::Dtype`]; [`Error::Value`] and [`Error::Stride`] as of
    /// [`GroupedGemmPlan::new`](crate::cuda::GroupedGemmPlan::new) and [`GroupTokensPlan::new`], in the words of the experts;
    /// [`Error::Unsupported`] for weights that are quantised.
    pub fn new(problem: &ExpertFfnProblem, limits: &Limits) -> Result<Self> {
        let &ExpertFfnProblem { spec, dtype, num_tokens, slots, .. } = problem;
        spec.validate()?;
        if spec.weight_format != WeightFormat::Float {
            return Err(Error::unsupported("cuda", format!("{:?} weights", spec.weight_format)));
        }
        let mut sort = GroupTokens::new(&spec, num_tokens, slots);
        sort.topk_ids_stride = problem.topk_ids_stride;
        sort.topk_weights_stride = problem.topk_weights_stride;
        let group = GroupTokensPlan::new(&sort)?;
        let max_rows = sort.assignments();
        let block = Block {
            ffn: &spec.ffn,
            strides: &problem.weights,
            dtype,
            out_dtype: dtype,
            f32_products: problem.f32_products,
            num_blocks: spec.num_local_experts,
            num_tokens,
            hidden_stride: problem.hidden_stride,
            out_stride: spec.ffn.hidden_size,
            rows: GemmRows::Listed {
                max_rows,
                max_group_rows: if problem.distinct_ids { num_tokens } else { max_rows },
                max_tiles: sort.max_tiles(),
            },
        };
        let block = BlockPlan::new(&block, limits)?;
        let on_input = spec.weight_on == WeightOn::Input;
        let mut sum = Combine::new(dtype, num_tokens, slots, spec.ffn.hidden_size);
        sum.combine_scale = spec.combine_scale;
        sum.topk_weights_stride = problem.topk_weights_stride;
        sum.out_stride = problem.out_stride;
        let combine = CombinePlan::new(&sum)?;
        let mut parts = Parts::default();
        let row_bytes = spec.ffn.hidden_size.saturating_mul(dtype.size_bytes());
        let mut offsets = Offsets {
            expert_offsets: parts.part(spec.num_local_experts + 1, 4),
            row_token: parts.part(max_rows, 4),
            row_weight: parts.part(if on_input { max_rows } else { 0 }, 4),
            position: parts.part(max_rows, 4),
            tile_counts: parts.part(4, 4),
            tiles: parts.part(sort.max_tiles().saturating_mul(4), 16),
            group: parts.part(group.workspace_bytes(), 1),
            inner: parts.part(block.inner_bytes(), 1),
            rows: parts.part(max_rows, row_bytes),
            bytes: 0,
        };
        offsets.bytes = parts.bytes();
        Ok(ExpertFfnPlan { num_tokens, group, block, combine, on_input, offsets })
    }

    /// Names of the kernels, in the order of their launches.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.group.kernels().chain(self.block.kernels()).chain([self.combine.kernel()])
    }

    /// Device memory that [`ExpertFfnPlan::launch`] needs besides its arguments: what lies between its kernels.
    pub fn workspace_bytes(&self) -> usize {
        self.offsets.bytes
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.group.warmup(driver)?;
        self.block.warmup(driver)?;
        self.combine.warmup(driver)
    }

    /// Queues the work on a stream. Does not wait; after [`ExpertFfnPlan::warmup`] it neither allocates nor loads. The routing is
    /// read on the device alone.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned (`hidden` and the weights to 16 bytes, the workspace to 256, others to
    /// their elements); [`Error::Presence`] if a bias is there that the experts do not have, or the other way round;
    /// [`Error::Overlap`] if an output shares memory with another array; [`Error::Driver`]. `out` is not written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the output and the workspace meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &ExpertFfnArgs, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.launch_with_shared(driver, args, None, stream) }
    }

    /// The same with a shared expert in the sum.
    ///
    /// # Safety
    /// As for [`ExpertFfnPlan::launch`].
    pub(super) unsafe fn launch_with_shared(
        &self,
        driver: &dyn Driver,
        args: &ExpertFfnArgs,
        shared: Option<SharedRows>,
        stream: Stream,
    ) -> Result<()> {
        if self.num_tokens == 0 {
            return Ok(());
        }
        if args.workspace == 0 || !args.workspace.is_multiple_of(256) {
            let expected = "a device pointer that is a multiple of 256";
            return Err(Error::value("workspace", expected, format_args!("{:#x}", args.workspace)));
        }
        let at = |offset: usize| args.workspace + offset as u64;
        let o = &self.offsets;
        let mut sort = GroupTokensArgs::new(
            args.topk_ids,
            at(o.expert_offsets),
            at(o.row_token),
            at(o.position),
            at(o.tile_counts),
            at(o.tiles),
        )
        .with_workspace(at(o.group));
        if self.on_input {
            sort = sort.with_weights(args.topk_weights, at(o.row_weight));
        }
        let rows = BlockRows {
            hidden: args.hidden,
            row_token: Some(at(o.row_token)),
            row_weight: self.on_input.then(|| at(o.row_weight)),
            tile_counts: at(o.tile_counts),
            tiles: at(o.tiles),
            inner: at(o.inner),
            out: at(o.rows),
        };
        let mut sum = CombineArgs::new(at(o.rows), at(o.position), args.out);
        if !self.on_input {
            sum = sum.with_weights(args.topk_weights);
        }
        if let Some(shared) = shared {
            sum = sum.with_shared(shared.rows, shared.gate);
        }
        // SAFETY: the parts of the workspace have the sizes that the plans tell, laid out by `new`; the lists of rows and tiles
        // are those that the first step writes before, for the same numbers of tokens, slots and experts; the rest is the
        // caller's promise.
        unsafe {
            self.group.launch(driver, &sort, stream)?;
            self.block.launch(driver, &rows, &args.weights, stream)?;
            self.combine.launch(driver, &sum, stream)
        }
    }
}

/// The routed experts, as [`cpu::expert_ffn`](crate::cpu::expert_ffn):
///
/// ```text
/// out[t] = combine_scale * sum_k w[t, k] * FFN_{ids[t, k]}(x[t])          weight on the output
/// out[t] = combine_scale * sum_k FFN_{ids[t, k]}(w[t, k] * x[t])          weight on the input
/// ```
///
/// * `hidden`: `[num_tokens, hidden_size]`
/// * `weights`: as checkpoints have them, `in` contiguous, rows at multiples of 16 bytes; of the type of `hidden`
/// * `out`: `[num_tokens, hidden_size]`
///
/// Sums are f32 in a fixed order, experts in ascending order. What an expert makes between its projections, and its result, are
/// rounded to the type of `hidden`; a weight on the input multiplies the f32 sums of gate and up. The same bits for a token whatever
/// else is in the call. f32 is multiplied as [`Queue::f32_products`] tells. Ids of other ranks, and -1, are skipped; a token without
/// experts gets 0. No token is a legal call.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`], [`Error::Presence`] for an argument that does not fit; those of
/// [`ExpertFfnPlan`]. Nothing is written then.
pub fn expert_ffn<T: Element>(
    queue: &mut Queue<'_>,
    spec: &ExpertFfn,
    hidden: DeviceView<'_, T, 2>,
    routing: &Routing<'_>,
    weights: &ExpertWeights<'_, T>,
    out: DeviceViewMut<'_, T, 2>,
) -> Result<()> {
    spec.validate()?;
    let num_tokens = hidden.shape()[0];
    hidden.check("hidden", [num_tokens, spec.ffn.hidden_size])?;
    let slots = routing.check(num_tokens)?;
    weights.check(spec)?;
    out.check("out", [num_tokens, spec.ffn.hidden_size])?;
    queue.check_homes(&[hidden.home(), routing.topk_ids.home(), routing.topk_weights.home(), out.home()])?;
    queue.check_homes(&weights.homes())?;
    let problem = ExpertFfnProblem {
        f32_products: queue.f32_products(),
        hidden_stride: hidden.strides()[0],
        topk_ids_stride: routing.topk_ids.strides()[0],
        topk_weights_stride: routing.topk_weights.strides()[0],
        weights: weights.strides()?,
        out_stride: out.strides()[0],
        ..ExpertFfnProblem::new(spec, T::DTYPE, num_tokens, slots)
    };
    let plan = ExpertFfnPlan::new(&problem, &queue.driver().limits())?;
    let workspace = queue.workspace(plan.workspace_bytes())?;
    let (ids, chosen) = (routing.topk_ids.ptr(), routing.topk_weights.ptr());
    let args = ExpertFfnArgs::new(hidden.ptr(), ids, chosen, weights.args(), out.ptr(), workspace);
    // SAFETY: the views are device memory with the plan's shapes and strides, checked above, borrowed from those who own them:
    // what the queue's stream does later comes after this work, also what uses the workspace.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}
