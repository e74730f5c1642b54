//! Feed-forward blocks on the GPU: their weights as they lie in device memory, and the two products of a block. `mlp` is the block
//! of all tokens; the experts of a mixture are the same with one block per expert.

use crate::cuda::driver::{Driver, Limits, Stream};
use crate::cuda::grouped_gemm::{F32Products, GemmRows, GroupedGemm, GroupedGemmArgs, GroupedGemmPlan};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Home, Parts, Queue};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result, check_presence, why};
use crate::spec::{ExpertFfn, Ffn};

/// Weights of one block.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FfnWeights<'a, T> {
    /// `[intermediate_size, hidden_size]`; gated blocks only.
    pub gate: Option<DeviceView<'a, T, 2>>,
    /// `[intermediate_size, hidden_size]`
    pub up: DeviceView<'a, T, 2>,
    /// `[hidden_size, intermediate_size]`
    pub down: DeviceView<'a, T, 2>,
    /// `[intermediate_size]`
    pub gate_bias: Option<DeviceView<'a, f32, 1>>,
    /// `[intermediate_size]`
    pub up_bias: Option<DeviceView<'a, f32, 1>>,
    /// `[hidden_size]`
    pub down_bias: Option<DeviceView<'a, f32, 1>>,
}

/// Weights of all experts of a rank. Gate and up may be separate arrays, halves of one, or every other row of one.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ExpertWeights<'a, T> {
    /// `[num_local_experts, intermediate_size, hidden_size]`; gated blocks only.
    pub gate: Option<DeviceView<'a, T, 3>>,
    /// `[num_local_experts, intermediate_size, hidden_size]`
    pub up: DeviceView<'a, T, 3>,
    /// `[num_local_experts, hidden_size, intermediate_size]`
    pub down: DeviceView<'a, T, 3>,
    /// `[num_local_experts, intermediate_size]`
    pub gate_bias: Option<DeviceView<'a, f32, 2>>,
    /// `[num_local_experts, intermediate_size]`
    pub up_bias: Option<DeviceView<'a, f32, 2>>,
    /// `[num_local_experts, hidden_size]`
    pub down_bias: Option<DeviceView<'a, f32, 2>>,
}

impl<'a, T> FfnWeights<'a, T> {
    /// Without biases.
    pub const fn new(gate: Option<DeviceView<'a, T, 2>>, up: DeviceView<'a, T, 2>, down: DeviceView<'a, T, 2>) -> Self {
        FfnWeights { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }
    }

    /// The same weights as those of the only expert.
    pub fn as_expert(&self) -> ExpertWeights<'a, T> {
        ExpertWeights {
            gate: self.gate.map(one),
            up: one(self.up),
            down: one(self.down),
            gate_bias: self.gate_bias.map(row),
            up_bias: self.up_bias.map(row),
            down_bias: self.down_bias.map(row),
        }
    }
}

fn one<T>(view: DeviceView<'_, T, 2>) -> DeviceView<'_, T, 3> {
    let ([rows, cols], [row, col]) = (view.shape(), view.strides());
    view.with_strides([1, rows, cols], [0, row, col])
}

fn row<T>(view: DeviceView<'_, T, 1>) -> DeviceView<'_, T, 2> {
    view.with_strides([1, view.shape()[0]], [0, view.strides()[0]])
}

/// Rows of gate and of up in an array of both; all rows, which then do not fit, if their number is odd.
const fn half_of(rows: usize) -> usize {
    if rows.is_multiple_of(2) { rows / 2 } else { rows }
}

impl<'a, T> ExpertWeights<'a, T> {
    /// Gate and up as separate arrays (`gate`: `None` for plain experts), without biases.
    pub const fn separate(
        gate: Option<DeviceView<'a, T, 3>>,
        up: DeviceView<'a, T, 3>,
        down: DeviceView<'a, T, 3>,
    ) -> Self {
        ExpertWeights { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }
    }

    /// `gate_up`: `[num_local_experts, 2 * intermediate_size, hidden_size]`, gate rows first, then up rows. An odd number of
    /// rows is found by [`ExpertWeights::check`]: gate and up then have as many rows as the array.
    pub fn halves(gate_up: DeviceView<'a, T, 3>, down: DeviceView<'a, T, 3>) -> Self {
        let ([experts, rows, cols], strides) = (gate_up.shape(), gate_up.strides());
        let half = [experts, half_of(rows), cols];
        // An array that is too short is found by `check`; the cut must not panic.
        let skip = half[1].saturating_mul(strides[1]).min(gate_up.len());
        let gate = gate_up.with_strides(half, strides);
        ExpertWeights::separate(Some(gate), gate_up.skip(skip).with_strides(half, strides), down)
    }

    /// `gate_up`: `[num_local_experts, 2 * intermediate_size, hidden_size]`, gate in the even rows, up in the odd ones; an odd
    /// number of rows as in [`ExpertWeights::halves`].
    pub fn interleaved(gate_up: DeviceView<'a, T, 3>, down: DeviceView<'a, T, 3>) -> Self {
        let ([experts, rows, cols], [expert, row, col]) = (gate_up.shape(), gate_up.strides());
        let (half, strides) = ([experts, half_of(rows), cols], [expert, row.saturating_mul(2), col]);
        let gate = gate_up.with_strides(half, strides);
        ExpertWeights::separate(Some(gate), gate_up.skip(row.min(gate_up.len())).with_strides(half, strides), down)
    }

    /// Checks shapes and presence.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`] for an array that does not fit; [`Error::Presence`] where the
    /// specification and what is given disagree.
    pub fn check(&self, spec: &ExpertFfn) -> Result<()> {
        let (n, ffn) = (spec.num_local_experts, &spec.ffn);
        let (inter, hidden) = (ffn.intermediate_size, ffn.hidden_size);
        if let Some(gate) = check_presence("gate", self.gate, ffn.gated, why::GATE)? {
            gate.check("gate", [n, inter, hidden])?;
        }
        self.up.check("up", [n, inter, hidden])?;
        self.down.check("down", [n, hidden, inter])?;
        for (name, bias, wanted, width) in [
            ("gate_bias", self.gate_bias, ffn.up_bias && ffn.gated, inter),
            ("up_bias", self.up_bias, ffn.up_bias, inter),
            ("down_bias", self.down_bias, ffn.down_bias, hidden),
        ] {
            if let Some(bias) = check_presence(name, bias, wanted, why::BLOCK_BIAS)? {
                bias.check(name, [n, width])?;
            }
        }
        Ok(())
    }

    /// Where each array lies.
    pub(super) fn args(&self) -> FfnArgs {
        FfnArgs {
            gate: self.gate.map_or(0, |view| view.ptr()),
            up: self.up.ptr(),
            down: self.down.ptr(),
            gate_bias: self.gate_bias.map(|view| view.ptr()),
            up_bias: self.up_bias.map(|view| view.ptr()),
            down_bias: self.down_bias.map(|view| view.ptr()),
        }
    }

    /// How each array lies.
    ///
    /// # Errors
    /// [`Error::Stride`] if the two biases of several experts lie differently: the kernel steps through both alike.
    pub(super) fn strides(&self) -> Result<FfnStrides> {
        let matrix = |view: DeviceView<'a, T, 3>| [view.strides()[0], view.strides()[1]];
        let up_bias = self.up_bias.map_or(0, |view| view.strides()[0]);
        if let Some(gate_bias) = self.gate_bias
            && gate_bias.shape()[0] > 1
            && gate_bias.strides()[0] != up_bias
        {
            let expected = format!("[{up_bias}, 1], those of `up_bias`");
            return Err(Error::Stride { argument: "gate_bias".into(), expected, found: gate_bias.strides().to_vec() });
        }
        Ok(FfnStrides {
            gate: self.gate.map_or([0, 0], matrix),
            up: matrix(self.up),
            down: matrix(self.down),
            up_bias,
            down_bias: self.down_bias.map_or(0, |view| view.strides()[0]),
        })
    }

    pub(super) fn homes(&self) -> [Home; 6] {
        [
            self.gate.and_then(|view| view.home()),
            self.up.home(),
            self.down.home(),
            self.gate_bias.and_then(|view| view.home()),
            self.up_bias.and_then(|view| view.home()),
            self.down_bias.and_then(|view| view.home()),
        ]
    }
}

/// How the weights of blocks lie, in elements: from one block to the next, and from one row to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct FfnStrides {
    /// Of `gate`.
    pub gate: [usize; 2],
    /// Of `up`.
    pub up: [usize; 2],
    /// Of `down`.
    pub down: [usize; 2],
    /// From one block's gate bias to the next, and the same for up.
    pub up_bias: usize,
    /// From one block's down bias to the next.
    pub down_bias: usize,
}

impl FfnStrides {
    /// Separate arrays, all contiguous.
    pub fn separate(ffn: &Ffn) -> Self {
        let (hidden, inter) = (ffn.hidden_size, ffn.intermediate_size);
        let matrix = [hidden.saturating_mul(inter), hidden];
        FfnStrides {
            gate: matrix,
            up: matrix,
            down: [hidden.saturating_mul(inter), inter],
            up_bias: inter,
            down_bias: hidden,
        }
    }

    /// Gate and up in one contiguous array, gate rows first; up begins `intermediate_size * hidden_size` elements behind gate.
    pub fn halves(ffn: &Ffn) -> Self {
        let both = [ffn.hidden_size.saturating_mul(ffn.intermediate_size).saturating_mul(2), ffn.hidden_size];
        FfnStrides { gate: both, up: both, ..FfnStrides::separate(ffn) }
    }

    /// Gate and up in one contiguous array, gate in the even rows; up begins `hidden_size` elements behind gate.
    pub fn interleaved(ffn: &Ffn) -> Self {
        let [block, row] = FfnStrides::halves(ffn).gate;
        let both = [block, row.saturating_mul(2)];
        FfnStrides { gate: both, up: both, ..FfnStrides::separate(ffn) }
    }
}

/// Device pointers of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FfnArgs {
    /// Read; gated blocks only.
    pub gate: u64,
    /// Read.
    pub up: u64,
    /// Read.
    pub down: u64,
    /// f32, read, where the specification has it.
    pub gate_bias: Option<u64>,
    /// f32, read, where the specification has it.
    pub up_bias: Option<u64>,
    /// f32, read, where the specification has it.
    pub down_bias: Option<u64>,
}

impl FfnArgs {
    /// Without biases; `gate` is 0 for plain blocks.
    pub fn new(gate: u64, up: u64, down: u64) -> Self {
        FfnArgs { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }
    }

    /// Biases (gate, up, down) are there exactly where the specification has them.
    fn check(&self, biases: [bool; 3]) -> Result<()> {
        let found = [("gate_bias", self.gate_bias), ("up_bias", self.up_bias), ("down_bias", self.down_bias)];
        for ((name, bias), wanted) in found.into_iter().zip(biases) {
            check_presence(name, bias, wanted, why::BLOCK_BIAS)?;
        }
        Ok(())
    }
}

/// Both products of blocks: what `mlp`, the experts and the shared expert have in common.
pub(super) struct Block<'a> {
    pub ffn: &'a Ffn,
    pub strides: &'a FfnStrides,
    pub dtype: Dtype,
    /// Of the rows that come out.
    pub out_dtype: Dtype,
    pub f32_products: F32Products,
    pub num_blocks: usize,
    pub num_tokens: usize,
    pub hidden_stride: usize,
    pub out_stride: usize,
    pub rows: GemmRows,
}

/// [`Block`] with its kernels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlockPlan {
    /// Of gate, up and down.
    biases: [bool; 3],
    inner: GroupedGemmPlan,
    outer: GroupedGemmPlan,
    inner_bytes: usize,
}

/// Which rows a launch computes, besides the weights.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BlockRows {
    pub hidden: u64,
    pub row_token: Option<u64>,
    pub row_weight: Option<u64>,
    pub tile_counts: u64,
    pub tiles: u64,
    /// Between the products: as large as [`BlockPlan::inner_bytes`] tells.
    pub inner: u64,
    pub out: u64,
}

impl BlockPlan {
    pub(super) fn new(block: &Block<'_>, limits: &Limits) -> Result<Self> {
        let &Block { ffn, strides, dtype, num_blocks, .. } = block;
        ffn.validate()?;
        let num_rows = match block.rows {
            GemmRows::Equal(rows) => rows,
            GemmRows::Listed { max_rows, .. } => max_rows,
        };
        // Rows of the intermediate values begin at multiples of 16 bytes, because those of `down` must.
        let width = ffn.intermediate_size;
        let products = |inputs, outputs| GroupedGemm {
            rows: block.rows,
            num_groups: num_blocks,
            f32_products: block.f32_products,
            ..GroupedGemm::linear(dtype, num_rows, outputs, inputs)
        };
        let inner = GroupedGemm {
            gated: ffn.gated,
            activation: Some(ffn.activation),
            source_rows: block.num_tokens,
            a_stride: block.hidden_stride,
            gate_group_stride: strides.gate[0],
            gate_stride: strides.gate[1],
            up_group_stride: strides.up[0],
            up_stride: strides.up[1],
            bias_stride: strides.up_bias,
            ..products(ffn.hidden_size, width)
        };
        let outer = GroupedGemm {
            out_dtype: block.out_dtype,
            up_group_stride: strides.down[0],
            up_stride: strides.down[1],
            bias_stride: strides.down_bias,
            out_stride: block.out_stride,
            ..products(width, ffn.hidden_size)
        };
        Ok(BlockPlan {
            biases: [ffn.up_bias && ffn.gated, ffn.up_bias, ffn.down_bias],
            inner: GroupedGemmPlan::new(&inner, limits).map_err(named)?,
            outer: GroupedGemmPlan::new(&outer, limits).map_err(named_down)?,
            inner_bytes: num_rows.saturating_mul(width).saturating_mul(dtype.size_bytes()),
        })
    }

    /// Bytes of the values between the products.
    pub(super) fn inner_bytes(&self) -> usize {
        self.inner_bytes
    }

    pub(super) fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.inner.kernels().chain(self.outer.kernels())
    }

    pub(super) fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.inner.warmup(driver)?;
        self.outer.warmup(driver)
    }

    /// # Safety
    /// As for [`GroupedGemmPlan::launch`], for both products.
    pub(super) unsafe fn launch(
        &self,
        driver: &dyn Driver,
        rows: &BlockRows,
        weights: &FfnArgs,
        stream: Stream,
    ) -> Result<()> {
        weights.check(self.biases)?;
        let inner = GroupedGemmArgs {
            gate: weights.gate,
            gate_bias: weights.gate_bias,
            up_bias: weights.up_bias,
            row_token: rows.row_token,
            row_weight: rows.row_weight,
            tile_counts: rows.tile_counts,
            tiles: rows.tiles,
            ..GroupedGemmArgs::new(rows.hidden, weights.up, rows.inner)
        };
        let outer = GroupedGemmArgs {
            up_bias: weights.down_bias,
            tile_counts: rows.tile_counts,
            tiles: rows.tiles,
            ..GroupedGemmArgs::new(rows.inner, weights.down, rows.out)
        };
        // SAFETY: the caller's promise, passed on; the second product reads what the first has written before it on the stream.
        unsafe {
            self.inner.launch(driver, &inner, stream)?;
            self.outer.launch(driver, &outer, stream)
        }
    }
}

/// Errors of a product in the words of a block.
pub(super) fn renamed(error: Error, names: &[(&str, &str)]) -> Error {
    let rename = |argument: String| {
        names.iter().find(|(from, _)| *from == argument).map_or(argument, |(_, to)| (*to).to_string())
    };
    match error {
        Error::Value { argument, expected, found } => Error::Value { argument: rename(argument), expected, found },
        Error::Stride { argument, expected, found } => Error::Stride { argument: rename(argument), expected, found },
        Error::Dtype { argument, expected, found } => Error::Dtype { argument: rename(argument), expected, found },
        other => other,
    }
}

fn named(error: Error) -> Error {
    renamed(
        error,
        &[
            ("a", "hidden"),
            ("a, gate and up", "hidden and weights"),
            ("inputs", "hidden_size"),
            ("outputs", "intermediate_size"),
            ("rows", "num_tokens"),
            ("source_rows", "num_tokens"),
            ("num_groups", "num_local_experts"),
        ],
    )
}

fn named_down(error: Error) -> Error {
    renamed(
        error,
        &[
            ("up", "down"),
            ("bias", "down_bias"),
            ("inputs", "intermediate_size"),
            ("outputs", "hidden_size"),
            ("rows", "num_tokens"),
        ],
    )
}

/// What to compute: one block on every token, see [`mlp`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MlpProblem {
    /// The block.
    pub ffn: Ffn,
    /// Element type of activations and weights: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Element type of `out`: `dtype` or f32.
    pub out_dtype: Dtype,
    /// How f32 is multiplied; of no meaning for other types.
    pub f32_products: F32Products,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Elements from one row of `x` to the next.
    pub x_stride: usize,
    /// How the weights lie; what goes from block to block has no meaning.
    pub weights: FfnStrides,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl MlpProblem {
    /// Contiguous arrays, gate and up separate.
    pub fn new(ffn: &Ffn, dtype: Dtype, num_tokens: usize) -> Self {
        MlpProblem {
            ffn: *ffn,
            dtype,
            out_dtype: dtype,
            f32_products: F32Products::Full,
            num_tokens,
            x_stride: ffn.hidden_size,
            weights: FfnStrides::separate(ffn),
            out_stride: ffn.hidden_size,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MlpArgs {
    /// Read.
    pub x: u64,
    /// Read.
    pub weights: FfnArgs,
    /// Written.
    pub out: u64,
    /// [`MlpPlan::workspace_bytes`] bytes, a multiple of 256.
    pub workspace: u64,
}

impl MlpArgs {
    /// Pointers by value.
    pub fn new(x: u64, weights: FfnArgs, out: u64, workspace: u64) -> Self {
        MlpArgs { x, weights, out, workspace }
    }
}

/// [`MlpProblem`] with its kernels and grids. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MlpPlan {
    num_tokens: usize,
    block: BlockPlan,
}

impl MlpPlan {
    /// Checks the shapes and chooses kernels and grids for a device.
    ///
    /// # Errors
    /// Those of [`Ffn::validate`]; [`Error::Dtype`]; [`Error::Value`] and [`Error::Stride`] as of
    /// [`GroupedGemmPlan::new`](crate::cuda::GroupedGemmPlan::new), in the words of a block.
    pub fn new(problem: &MlpProblem, limits: &Limits) -> Result<Self> {
        let block = Block {
            ffn: &problem.ffn,
            strides: &problem.weights,
            dtype: problem.dtype,
            out_dtype: problem.out_dtype,
            f32_products: problem.f32_products,
            num_blocks: 1,
            num_tokens: problem.num_tokens,
            hidden_stride: problem.x_stride,
            out_stride: problem.out_stride,
            rows: GemmRows::Equal(problem.num_tokens),
        };
        let block = BlockPlan::new(&block, limits).map_err(|error| renamed(error, &[("hidden", "x")]))?;
        Ok(MlpPlan { num_tokens: problem.num_tokens, block })
    }

    /// Names of the kernels, in the order of their launches.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.block.kernels()
    }

    /// Device memory that [`MlpPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        let mut parts = Parts::default();
        parts.part(self.block.inner_bytes(), 1);
        parts.bytes()
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.block.warmup(driver)
    }

    /// Queues the work on a stream. Does not wait; after [`MlpPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// Those of [`GroupedGemmPlan::launch`](crate::cuda::GroupedGemmPlan::launch); [`Error::Presence`] if a bias is there that the
    /// block does not have, or the other way round.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the output and the workspace meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &MlpArgs, stream: Stream) -> Result<()> {
        if self.num_tokens == 0 {
            return Ok(());
        }
        let rows = BlockRows { hidden: args.x, inner: args.workspace, out: args.out, ..BlockRows::default() };
        // SAFETY: the caller's promise, passed on.
        unsafe { self.block.launch(driver, &rows, &args.weights, stream) }
    }
}

/// A feed-forward block: gated `down(act(gate(x)) * up(x))`, plain `down(act(up(x)))`, as [`cpu::mlp`](crate::cpu::mlp).
///
/// * `x`: `[num_tokens, hidden_size]`
/// * `weights`: as checkpoints have them, `in` contiguous, rows at multiples of 16 bytes; of the type of `x`
/// * `out`: `[num_tokens, hidden_size]`, of the type of `x` or f32
///
/// Sums are f32 in a fixed order; the values between the projections are rounded to the type of `x`, the results once at the
/// store. The same bits for a token whatever else is in the call. f32 is multiplied as [`Queue::f32_products`] tells. No token is a
/// legal call.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`], [`Error::Presence`] for an argument that does not fit; those of [`MlpPlan`].
/// Nothing is written then.
pub fn mlp<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    spec: &Ffn,
    x: DeviceView<'_, T, 2>,
    weights: &FfnWeights<'_, T>,
    out: DeviceViewMut<'_, O, 2>,
) -> Result<()> {
    spec.validate()?;
    let num_tokens = x.shape()[0];
    x.check("x", [num_tokens, spec.hidden_size])?;
    let weights = weights.as_expert();
    weights.check(&ExpertFfn::new(1, *spec))?;
    out.check("out", [num_tokens, spec.hidden_size])?;
    queue.check_homes(&[x.home(), out.home()])?;
    queue.check_homes(&weights.homes())?;
    let problem = MlpProblem {
        out_dtype: O::DTYPE,
        f32_products: queue.f32_products(),
        x_stride: x.strides()[0],
        weights: weights.strides()?,
        out_stride: out.strides()[0],
        ..MlpProblem::new(spec, T::DTYPE, num_tokens)
    };
    let plan = MlpPlan::new(&problem, &queue.driver().limits())?;
    let workspace = queue.workspace(plan.workspace_bytes())?;
    let args = MlpArgs::new(x.ptr(), weights.args(), out.ptr(), workspace);
    // SAFETY: the views are device memory with the plan's shapes and strides, checked above, borrowed from those who own them:
    // what the queue's stream does later comes after this work, also what uses the workspace.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}
