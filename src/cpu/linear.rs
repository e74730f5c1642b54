//! `linear`: a packed weight matrix times rows, and the same for one matrix per head.

use super::any::{AnyRow, AnyShared, AnyView};
use super::float::Float;
use super::gemm::pack::{PackedRows, Rows, pack_panel, pack_panel_transposed, packed_len, panel_len};
use super::gemm::product::{Product, ProductKernel, with_product};
use super::gemm::{
    Blocking, Epilogue, Following, PANEL, TileSpan, block_tokens, multiply, num_panels, panels_per_item,
};
use super::level::dispatch;
use super::parallel::{self, Shared};
use super::simd::{Kernel, Simd};
use super::workspace::{AlignedBytes, Carver, part_bytes};
use super::{Cpu, Level};
use crate::args::check_linear;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::view::{View, ViewMut};

/// Weights of a linear layer, or of one per head, rearranged once for all levels: `[heads, outputs, inputs]`.
///
/// Packing reads `[outputs, inputs]` as checkpoints store it and keeps the element type. The caller owns the result; it may
/// be used by any level and from several threads.
pub struct PackedLinear {
    heads: usize,
    outputs: usize,
    inputs: usize,
    dtype: Dtype,
    bytes: AlignedBytes,
}

impl PackedLinear {
    /// Bytes that packing `[outputs, inputs]` of a type takes: outputs are rounded up to 32, inputs of bf16 to 2.
    pub const fn packed_bytes(outputs: usize, inputs: usize, dtype: Dtype) -> usize {
        packed_len(dtype, outputs, inputs).saturating_mul(dtype.size_bytes())
    }

    /// Packs `weight`: `[outputs, inputs]`, in parallel.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`] if the view is not sound.
    pub fn pack<W: Float>(weight: View<'_, W, 2>) -> Result<PackedLinear> {
        let ([outputs, inputs], [row, col]) = (weight.shape(), weight.strides());
        weight.check("weight", [outputs, inputs])?;
        PackedLinear::pack_heads(View::with_strides(weight.data(), [1, outputs, inputs], [0, row, col]))
    }

    /// Packs one matrix for each head: `[heads, outputs, inputs]`.
    ///
    /// # Errors
    /// As [`PackedLinear::pack`].
    pub fn pack_heads<W: Float>(weight: View<'_, W, 3>) -> Result<PackedLinear> {
        let [heads, outputs, inputs] = weight.shape();
        weight.check("weight", [heads, outputs, inputs])?;
        Ok(PackedLinear::fill::<W>(heads, outputs, inputs, |head, first, panel| {
            let row = |output: usize| (first + output < outputs).then(|| weight.row(&[head, first + output]));
            pack_panel(inputs, row, panel);
        }))
    }

    /// Packs one transposed matrix for each head: `weight` is `[heads, inputs, outputs]`, as for the absorbed form of latent
    /// attention, which multiplies queries with a key projection from the other side.
    ///
    /// # Errors
    /// As [`PackedLinear::pack`].
    pub fn pack_heads_transposed<W: Float>(weight: View<'_, W, 3>) -> Result<PackedLinear> {
        let [heads, inputs, outputs] = weight.shape();
        weight.check("weight", [heads, inputs, outputs])?;
        Ok(PackedLinear::fill::<W>(heads, outputs, inputs, |head, first, panel| {
            let end = (first + PANEL).min(outputs);
            pack_panel_transposed(inputs, |k| &weight.row(&[head, k])[first..end], panel);
        }))
    }

    /// Fills all panels in parallel: `fill(head, first output, panel)`.
    fn fill<W: Float>(
        heads: usize,
        outputs: usize,
        inputs: usize,
        fill: impl Fn(usize, usize, &mut [W]) + Sync,
    ) -> PackedLinear {
        let bytes = PackedLinear::packed_bytes(outputs, inputs, W::DTYPE).saturating_mul(heads);
        let mut bytes = AlignedBytes::zeroed(bytes);
        let (panels, len) = (num_panels(outputs), panel_len(W::DTYPE, inputs));
        if bytes.as_slice().is_empty() {
            return PackedLinear { heads, outputs, inputs, dtype: W::DTYPE, bytes };
        }
        let all = Shared::new(bytemuck::cast_slice_mut::<u8, W>(bytes.as_mut_slice()));
        parallel::run(heads * panels, |_, item| {
            // SAFETY: each item has its own panel.
            let panel = unsafe { all.part(item * len, len) };
            fill(item / panels, item % panels * PANEL, panel);
        });
        PackedLinear { heads, outputs, inputs, dtype: W::DTYPE, bytes }
    }

    /// Matrices; 1 for a plain layer.
    pub fn num_heads(&self) -> usize {
        self.heads
    }

    /// Width of the result.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Width of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Element type of the weights.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.bytes.as_slice().len()
    }

    /// The panels of one head.
    fn panels<W: Float>(&self, head: usize) -> &[W] {
        let len = packed_len(self.dtype, self.outputs, self.inputs);
        &bytemuck::cast_slice::<u8, W>(self.bytes.as_slice())[head * len..][..len]
    }
}

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape = [self.heads, self.outputs, self.inputs];
        f.debug_struct("PackedLinear").field("shape", &shape).field("dtype", &self.dtype).finish()
    }
}

/// `out[t, o] = sum_i x[t, i] * weight[o, i] + bias[o]`
///
/// * `x`: `[num_tokens, inputs]`
/// * `weight`: packed from `[outputs, inputs]`
/// * `bias`: `[outputs]`
/// * `out`: `[num_tokens, outputs]`
///
/// Any mix of element types. Sums are f32 in the order of `i`, rounded once at the store, the same bits for a token whatever
/// else is in the call. Activations and weights that are both bf16 are multiplied by `vdpbf16ps` at level `avx512bf16`:
/// exact products, but subnormal numbers count as zero; everywhere else both are widened to f32. No token is a legal call.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`], [`Error::Len`] for an argument that does not fit the weight. Nothing is written then.
pub fn linear<T: Float, O: Float>(
    cpu: &mut Cpu,
    x: View<'_, T, 2>,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    if weight.heads != 1 {
        return Err(Error::value("weight", "one matrix, not one per head", format!("{} heads", weight.heads)));
    }
    let num_tokens = check_linear(&x, [weight.outputs, weight.inputs], bias, &out)?;
    let mut carver = cpu.workspace.carve(linear_bytes(cpu.level, T::DTYPE, weight, num_tokens));
    linear_in(cpu.level, &mut carver, x, weight, bias, out);
    Ok(())
}

/// One matrix for each head: `out[t, h, o] = sum_i x[t, h, i] * weight[h, o, i]`.
///
/// * `x`: `[num_tokens, heads, inputs]`
/// * `weight`: packed from `[heads, outputs, inputs]`, or transposed
/// * `out`: `[num_tokens, heads, outputs]`
///
/// Numerics as [`linear`].
///
/// # Errors
/// As [`linear`].
pub fn linear_heads<T: Float, O: Float>(
    cpu: &mut Cpu,
    x: View<'_, T, 3>,
    weight: &PackedLinear,
    out: ViewMut<'_, O, 3>,
) -> Result<()> {
    let num_tokens = x.shape()[0];
    x.check("x", [num_tokens, weight.heads, weight.inputs])?;
    out.check("out", [num_tokens, weight.heads, weight.outputs])?;
    let mut carver = cpu.workspace.carve(linear_bytes(cpu.level, T::DTYPE, weight, num_tokens));
    run(cpu.level, &mut carver, x, weight, None, out);
    Ok(())
}

/// Workspace of [`linear`] and [`linear_heads`] for activations `T`, in the rayon pool of the caller.
pub fn linear_workspace_bytes<T: Float>(cpu: &Cpu, weight: &PackedLinear, num_tokens: usize) -> usize {
    linear_bytes(cpu.level, T::DTYPE, weight, num_tokens)
}

/// [`linear_workspace_bytes`] for functions that contain a linear layer.
pub(crate) fn linear_bytes(level: Level, activations: Dtype, weight: &PackedLinear, num_tokens: usize) -> usize {
    dispatch(level, Size { activations, weight, num_tokens })
}

/// [`linear`] without its checks, in memory that is already there.
pub(crate) fn linear_in<T: Float, O: Float>(
    level: Level,
    carver: &mut Carver<'_>,
    x: View<'_, T, 2>,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    out: ViewMut<'_, O, 2>,
) {
    let ([tokens, inputs], [row, col]) = (x.shape(), x.strides());
    let x = View::with_strides(x.data(), [tokens, 1, inputs], [row, 0, col]);
    let ([_, outputs], [row, col]) = (out.shape(), out.strides());
    let mut out = out;
    let out = ViewMut::with_strides(out.data_mut(), [tokens, 1, outputs], [row, 0, col]);
    run(level, carver, x, weight, bias, out);
}

fn run<T: Float, O: Float>(
    level: Level,
    carver: &mut Carver<'_>,
    x: View<'_, T, 3>,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    mut out: ViewMut<'_, O, 3>,
) {
    let strides = out.strides();
    run_any(level, Linear { carver, x: T::any_view(x), weight, bias, out: O::any_shared(out.data_mut()), strides });
}

/// The computation, compiled once, not in every crate that calls it.
fn run_any(level: Level, call: Linear<'_, '_>) {
    dispatch(level, call);
}

/// How a call is cut into items.
struct Plan {
    block: usize,
    blocks: usize,
    panels: usize,
    item_panels: usize,
    groups: usize,
    items: usize,
    workers: usize,
    steps: usize,
    words_len: usize,
    sums_len: usize,
}

impl Plan {
    fn new<S: Simd, P: Product>(weight: &PackedLinear, num_tokens: usize) -> Plan {
        let block = block_tokens(S::TILE_TOKENS);
        let blocks = num_tokens.div_ceil(block);
        let (steps, panels) = (P::steps(weight.inputs), num_panels(weight.outputs));
        let blocking = Blocking::new::<P>(S::TILE_TOKENS, num_tokens, steps);
        let item_panels = panels_per_item(panels, blocking.panels, blocks * weight.heads, parallel::max_workers());
        let groups = panels.div_ceil(item_panels);
        let items = weight.heads * groups * blocks;
        Plan {
            block,
            blocks,
            panels,
            item_panels,
            groups,
            items,
            workers: parallel::workers_for(items),
            steps,
            words_len: blocking.words_len.next_multiple_of(16),
            sums_len: blocking.sums_len(item_panels).next_multiple_of(16),
        }
    }

    /// Head, group of panels and block of an item. Blocks are next to each other, so that workers share the panels in the last
    /// level cache; the last block, which may be short, comes after all others.
    fn place(&self, item: usize) -> [usize; 3] {
        let long = self.blocks - 1;
        let items = self.items / self.blocks * long;
        let (block, rest) = if item < items { (item % long, item / long) } else { (long, item - items) };
        [rest / self.groups, rest % self.groups, block]
    }

    fn bytes(&self) -> usize {
        part_bytes::<u32>(self.workers * self.words_len) + part_bytes::<f32>(self.workers * self.sums_len)
    }
}

struct Size<'a> {
    activations: Dtype,
    weight: &'a PackedLinear,
    num_tokens: usize,
}

impl Kernel for Size<'_> {
    type Output = usize;
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> usize {
        with_product(simd, self.activations, self.weight.dtype, self)
    }
}

impl<S: Simd> ProductKernel<S> for Size<'_> {
    type Output = usize;
    #[inline(always)]
    fn eval<P: Product>(self, _: S) -> usize {
        Plan::new::<S, P>(self.weight, self.num_tokens).bytes()
    }
}

/// A checked call.
struct Linear<'a, 'c> {
    carver: &'a mut Carver<'c>,
    x: AnyView<'a, 3>,
    weight: &'a PackedLinear,
    bias: Option<&'a [f32]>,
    out: AnyShared<'a>,
    strides: [usize; 3],
}

impl Kernel for Linear<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        with_product(simd, self.x.dtype(), self.weight.dtype, self);
    }
}

impl<S: Simd> ProductKernel<S> for Linear<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<P: Product>(self, simd: S) {
        let plan = Plan::new::<S, P>(self.weight, self.x.shape()[0]);
        let words = Shared::new(self.carver.part::<P::A>(plan.workers * plan.words_len));
        let sums = Shared::new(self.carver.part::<f32>(plan.workers * plan.sums_len));
        let call = Call { x: self.x, weight: self.weight, bias: self.bias, out: self.out, strides: self.strides };
        parallel::run(plan.items, |worker, item| {
            // SAFETY: no two items with the same worker run at the same time.
            let (words, sums) = unsafe {
                (words.part(worker * plan.words_len, plan.words_len), sums.part(worker * plan.sums_len, plan.sums_len))
            };
            simd.run(Item::<P> { plan: &plan, call: &call, item, words, sums });
        });
    }
}

/// What all items share.
struct Call<'a> {
    x: AnyView<'a, 3>,
    weight: &'a PackedLinear,
    bias: Option<&'a [f32]>,
    out: AnyShared<'a>,
    strides: [usize; 3],
}

/// One block of tokens against some panels of one head.
struct Item<'a, P: Product> {
    plan: &'a Plan,
    call: &'a Call<'a>,
    item: usize,
    words: &'a mut [P::A],
    sums: &'a mut [f32],
}

impl<P: Product> Kernel for Item<'_, P> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let (plan, call) = (self.plan, self.call);
        let [head, group, block] = plan.place(self.item);
        let first = block * plan.block;
        let tokens = plan.block.min(call.x.shape()[0] - first);
        let panels = group * plan.item_panels..((group + 1) * plan.item_panels).min(plan.panels);
        let rows = HeadRows { x: call.x, first, head };
        let mut activations = PackedRows { rows, tokens, words: self.words };
        let mut store = Store { call, first, head };
        let weights = call.weight.panels::<P::W>(head);
        // Each of the other workers takes an item in the meantime.
        let mut following = Following::NONE;
        if self.item + plan.workers < plan.items {
            let [head, group, _] = plan.place(self.item + plan.workers);
            let first = group * plan.item_panels * plan.steps * P::STEP_WEIGHTS;
            following.weights = &call.weight.panels::<P::W>(head)[first..];
        }
        multiply::<S, P>(simd, tokens, plan.steps, panels, weights, following, &mut activations, self.sums, &mut store);
    }
}

/// Rows of one head from a first token.
struct HeadRows<'a> {
    x: AnyView<'a, 3>,
    first: usize,
    head: usize,
}

impl Rows for HeadRows<'_> {
    #[inline(always)]
    fn row(&self, index: usize) -> AnyRow<'_> {
        self.x.row(&[self.first + index, self.head])
    }
}

/// Bias and rounding.
struct Store<'a> {
    call: &'a Call<'a>,
    first: usize,
    head: usize,
}

impl<S: Simd> Epilogue<S> for Store<'_> {
    #[inline(always)]
    fn tile(&mut self, simd: S, panel: usize, tile: TileSpan, c: &mut [f32]) {
        let call = self.call;
        let output = panel * PANEL;
        let width = PANEL.min(call.weight.outputs - output);
        let [token_stride, head_stride, _] = call.strides;
        for (i, sums) in c.chunks_exact_mut(PANEL).take(tile.tokens).enumerate() {
            let at = (self.first + tile.token + i) * token_stride + self.head * head_stride + output;
            if let Some(bias) = call.bias {
                for start in (0..width).step_by(S::LANES) {
                    let end = (output + start + S::LANES).min(bias.len());
                    let sum = simd.add(simd.load(&sums[start..]), simd.load_partial(&bias[output + start..end]));
                    simd.store(&mut sums[start..], sum);
                }
            }
            // SAFETY: `out` was checked: no two (token, head, output) are the same place, and items do not share them.
            unsafe { call.out.store(simd, at, width, sums) };
        }
    }
}
