//! The two passes over all experts: gate and up with the activation, then down with the sum over experts.

use super::activation::Activate;
use super::packed::PackedExperts;
use super::plan::{GroupPlan, Plan, Sizes};
use super::sort::{Block, RawBlock, cut_blocks, sort_assignments};
use crate::args::Routing;
use crate::cpu::any::{AnyRow, AnyShared, AnyView};
use crate::cpu::gemm::pack::{PackedRows, Rows, transpose};
use crate::cpu::gemm::product::{Product, ProductKernel, with_product};
use crate::cpu::gemm::{Activations, Epilogue, Following, MAX_TILE, PANEL, TileSpan, multiply, padded_rows};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::workspace::Carver;
use crate::element::Dtype;
use crate::spec::{ExpertFfn, WeightOn};
use std::ops::Range;

/// The routed experts of a call.
#[derive(Clone, Copy)]
pub struct Routed<'a> {
    pub spec: &'a ExpertFfn,
    pub experts: &'a PackedExperts,
    pub routing: Routing<'a, f32>,
}

/// The expert that every token visits.
#[derive(Clone, Copy)]
pub struct Always<'a> {
    pub experts: &'a PackedExperts,
    /// Factor of each token's output.
    pub factors: Option<&'a [f32]>,
}

/// `out[t] = combine_scale * sum_k w FFN_e(x[t]) + factor[t] * FFN_always(x[t])`
pub struct Call<'a> {
    pub hidden: AnyView<'a, 2>,
    pub routed: Option<Routed<'a>>,
    pub always: Option<Always<'a>>,
    pub out: AnyShared<'a>,
    pub out_stride: usize,
}

impl<'a> Call<'a> {
    fn sizes(&self) -> [Option<Sizes<'a>>; 2] {
        [
            self.routed.map(|r| Sizes { experts: r.experts, slots: r.routing.topk_ids.shape()[1] }),
            self.always.map(|a| Sizes { experts: a.experts, slots: 1 }),
        ]
    }
}

/// Element type of the weights; both sets have the same.
fn dtype(sizes: &[Option<Sizes<'_>>; 2]) -> Dtype {
    sizes.iter().flatten().next().map_or(Dtype::F32, |s| s.experts.dtype())
}

/// Bytes of workspace.
pub struct Size<'a> {
    pub activations: Dtype,
    pub num_tokens: usize,
    pub hidden_size: usize,
    pub sizes: [Option<Sizes<'a>>; 2],
}

impl Kernel for Size<'_> {
    type Output = usize;
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> usize {
        with_product(simd, self.activations, dtype(&self.sizes), self)
    }
}

impl<S: Simd> ProductKernel<S> for Size<'_> {
    type Output = usize;
    #[inline(always)]
    fn eval<P: Product>(self, _: S) -> usize {
        let num_experts = self.sizes.map(|s| s.map_or(0, |s| s.experts.spec().num_local_experts));
        Plan::new::<S, P>(self.num_tokens, self.hidden_size, self.sizes).bytes(num_experts)
    }
}

/// The whole call.
pub struct Run<'a, 'c> {
    pub carver: &'a mut Carver<'c>,
    pub call: Call<'a>,
}

impl Kernel for Run<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        with_product(simd, self.call.hidden.dtype(), dtype(&self.call.sizes()), self);
    }
}

/// One set of experts, while a chunk of tokens is computed.
struct Group<'a, A> {
    plan: GroupPlan,
    experts: &'a PackedExperts,
    blocks: &'a [RawBlock],
    /// Token of each assignment, within the chunk; `None`: its number.
    tokens: Option<&'a [u32]>,
    /// Weight of each assignment; `None`: 1.
    weights: Option<&'a [f32]>,
    weight_on: WeightOn,
    inner: Shared<'a, A>,
}

impl<A> Group<'_, A> {
    fn token(&self, assignment: usize) -> usize {
        self.tokens.map_or(assignment, |tokens| tokens[assignment] as usize)
    }

    /// Items of the first pass.
    fn items(&self) -> usize {
        self.blocks.len() * self.plan.panels.up.div_ceil(self.plan.up_panels)
    }
}

impl<S: Simd> ProductKernel<S> for Run<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn eval<P: Product>(self, simd: S) {
        let Run { carver, call } = self;
        let [num_tokens, hidden_size] = call.hidden.shape();
        let plan = Plan::new::<S, P>(num_tokens, hidden_size, call.sizes());
        let words = Shared::new(carver.part::<P::A>(plan.workers * plan.words_len));
        let sums = Shared::new(carver.part::<f32>(plan.workers * plan.sums_len));
        let totals = Shared::new(carver.part::<f32>(plan.workers * plan.totals_len));
        let mut room = [0, 1].map(|i| {
            let (group, sizes) = (plan.groups[i]?, call.sizes()[i]?);
            let offsets = carver.part::<u32>(sizes.experts.spec().num_local_experts + 1);
            let tokens = carver.part::<u32>(group.assignments);
            let weights = carver.part::<f32>(group.assignments);
            let blocks = carver.part::<RawBlock>(group.max_blocks);
            Some((group, offsets, tokens, weights, blocks, Shared::new(carver.part::<P::A>(group.inner_len))))
        });
        let [routed_room, always_room] = &mut room;

        for start in (0..num_tokens).step_by(plan.chunk.max(1)) {
            let chunk = start..(start + plan.chunk).min(num_tokens);
            let routed = match (call.routed, &mut *routed_room) {
                (Some(routed), Some((group, offsets, tokens, weights, blocks, inner))) => {
                    sort_assignments(routed.spec, &routed.routing, chunk.clone(), offsets, tokens, weights);
                    let n = cut_blocks(S::TILE_TOKENS, plan.block, offsets, blocks);
                    Some(Group {
                        plan: *group,
                        experts: routed.experts,
                        blocks: &blocks[..n],
                        tokens: Some(&**tokens),
                        weights: Some(&**weights),
                        weight_on: routed.spec.weight_on,
                        inner: *inner,
                    })
                }
                _ => None,
            };
            let always = match (call.always, &mut *always_room) {
                (Some(always), Some((group, offsets, _, _, blocks, inner))) => {
                    offsets.copy_from_slice(&[0, chunk.len() as u32]);
                    let n = cut_blocks(S::TILE_TOKENS, plan.block, offsets, blocks);
                    Some(Group {
                        plan: *group,
                        experts: always.experts,
                        blocks: &blocks[..n],
                        tokens: None,
                        weights: always.factors.map(|f| &f[chunk.clone()]),
                        weight_on: WeightOn::Output,
                        inner: *inner,
                    })
                }
                _ => None,
            };
            let groups = [routed, always];
            let items: [usize; 2] = [0, 1].map(|i| groups[i].as_ref().map_or(0, Group::items));
            parallel::run(items[0] + items[1], |worker, item| {
                // SAFETY: no two items with the same worker run at the same time.
                let (words, sums) = unsafe {
                    (
                        words.part(worker * plan.words_len, plan.words_len),
                        sums.part(worker * plan.sums_len, plan.sums_len),
                    )
                };
                let (group, item) = if item < items[0] { (&groups[0], item) } else { (&groups[1], item - items[0]) };
                let Some(group) = group else { return };
                let (hidden, chunk, workers) = (call.hidden, chunk.clone(), plan.workers);
                simd.run(UpItem::<P> { group, hidden, chunk, item, workers, words, sums });
            });
            let panels = hidden_size.div_ceil(PANEL);
            parallel::run(panels.div_ceil(plan.down_panels), |worker, item| {
                // SAFETY: no two items with the same worker run at the same time.
                let (sums, totals) = unsafe {
                    (
                        sums.part(worker * plan.sums_len, plan.sums_len),
                        totals.part(worker * plan.totals_len, plan.totals_len),
                    )
                };
                let panels = item * plan.down_panels..((item + 1) * plan.down_panels).min(panels);
                let scale = call.routed.map_or(1.0, |routed| routed.spec.combine_scale as f32);
                let (chunk, call, groups) = (chunk.clone(), &call, &groups);
                simd.run(DownItem::<P> { groups, call, chunk, panels, scale, sums, totals });
            });
        }
    }
}

/// First pass: one block of assignments against some panels of gate and up.
struct UpItem<'a, P: Product> {
    group: &'a Group<'a, P::A>,
    hidden: AnyView<'a, 2>,
    chunk: Range<usize>,
    item: usize,
    workers: usize,
    words: &'a mut [P::A],
    sums: &'a mut [f32],
}

impl<P: Product> Kernel for UpItem<'_, P> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let (group, plan) = (self.group, &self.group.plan);
        // The blocks of one expert are next to each other, so that workers share its panels in the last level cache.
        let place = |item: usize| {
            let block = Block::from_raw(group.blocks[item % group.blocks.len()]);
            (block, item / group.blocks.len() * plan.up_panels)
        };
        let (block, first_panel) = place(self.item);
        let panels = first_panel..(first_panel + plan.up_panels).min(plan.panels.up);
        let weights = |expert: usize| group.experts.panels::<P::W>(expert)[0];
        // Each of the other workers takes an item in the meantime.
        let mut following = Following::NONE;
        if self.item + self.workers < group.items() {
            let (block, first_panel) = place(self.item + self.workers);
            following.weights = &weights(block.expert)[first_panel * plan.up_steps * P::STEP_WEIGHTS..];
        }
        let rows = Gather { hidden: self.hidden, start: self.chunk.start, group, first: block.first };
        let mut activations = PackedRows { rows, tokens: block.len, words: self.words };
        let mut epilogue = StoreInner::<P> { group, block };
        multiply::<S, P>(
            simd,
            block.len,
            plan.up_steps,
            panels,
            weights(block.expert),
            following,
            &mut activations,
            self.sums,
            &mut epilogue,
        );
    }
}

/// The tokens of a block.
struct Gather<'a, A> {
    hidden: AnyView<'a, 2>,
    start: usize,
    group: &'a Group<'a, A>,
    first: usize,
}

impl<A: Send + Sync> Rows for Gather<'_, A> {
    #[inline(always)]
    fn row(&self, index: usize) -> AnyRow<'_> {
        self.hidden.row(&[self.start + self.group.token(self.first + index)])
    }
}

/// Activation, then the inner values as packed rows of the second pass.
struct StoreInner<'a, P: Product> {
    group: &'a Group<'a, P::A>,
    block: Block,
}

impl<S: Simd, P: Product> Epilogue<S> for StoreInner<'_, P> {
    #[inline(always)]
    fn tile(&mut self, simd: S, panel: usize, tile: TileSpan, c: &mut [f32]) {
        const CHUNK: usize = 16;
        let (group, block, plan) = (self.group, self.block, &self.group.plan);
        let ffn = &group.experts.spec().ffn;
        let factors = match group.weight_on {
            WeightOn::Input => group.weights.map(|w| &w[block.first + tile.token..][..tile.tokens]),
            WeightOn::Output => None,
        };
        let bias = group.experts.biases(block.expert)[0].map(|bias| &bias[panel * PANEL..][..PANEL]);
        simd.run(Activate { ffn, c, factors, bias });

        // Inner value k of row r belongs at word `k / k_per_word`, row r of the tile.
        let k_per_word = P::STEP_K / P::A_WORDS;
        let zero: P::A = bytemuck::Zeroable::zeroed();
        let mut words = [[zero; CHUNK]; MAX_TILE];
        for at in (0..plan.panels.inner_per_panel).step_by(CHUNK) {
            let k = panel * plan.panels.inner_per_panel + at;
            let first_word = k / k_per_word;
            let n = (CHUNK / k_per_word).min(plan.inner_row.saturating_sub(first_word));
            if n == 0 {
                break;
            }
            // Past the last inner column only the padding of its word or step is left: zero, whatever stands there.
            let valid = CHUNK.min(ffn.intermediate_size.saturating_sub(k));
            for (words, row) in words.iter_mut().zip(c.chunks_exact_mut(PANEL)) {
                row[at + valid..at + CHUNK].fill(0.0);
                P::words_from_f32(simd, &row[at..at + CHUNK], &mut words[..n]);
            }
            let start = (block.row + tile.row) * plan.inner_row + first_word * tile.rows;
            // SAFETY: the rows of a tile belong to one block, and these words of them to one panel, so to one item.
            let out = unsafe { group.inner.part(start, n * tile.rows) };
            transpose(simd, &words, tile.rows, out);
        }
    }
}

/// Second pass: all experts, in ascending order, against some panels of down; these columns of all tokens belong to the item.
struct DownItem<'a, P: Product> {
    groups: &'a [Option<Group<'a, P::A>>; 2],
    call: &'a Call<'a>,
    chunk: Range<usize>,
    panels: Range<usize>,
    scale: f32,
    sums: &'a mut [f32],
    totals: &'a mut [f32],
}

impl<P: Product> Kernel for DownItem<'_, P> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let width = self.panels.len() * PANEL;
        let totals = &mut self.totals[..self.chunk.len() * width];
        totals.fill(0.0);
        for (i, group) in self.groups.iter().enumerate() {
            let Some(group) = group else { continue };
            let plan = &group.plan;
            for (i, block) in group.blocks.iter().enumerate() {
                let block = Block::from_raw(*block);
                let down = |expert: usize| group.experts.panels::<P::W>(expert)[1];
                let first_weight = self.panels.start * plan.down_steps * P::STEP_WEIGHTS;
                let inner = |block: Block| {
                    let len = padded_rows(S::TILE_TOKENS, block.len) * plan.inner_row;
                    // SAFETY: the first pass is over, and nobody writes inner rows in the second.
                    unsafe { group.inner.read(block.row * plan.inner_row, len) }
                };
                let following = match group.blocks.get(i + 1).map(|next| Block::from_raw(*next)) {
                    Some(next) => Following { weights: &down(next.expert)[first_weight..], words: inner(next) },
                    None => Following::NONE,
                };
                let inner = inner(block);
                let mut activations = InnerRows::<P> { inner, inner_row: plan.inner_row };
                let mut epilogue =
                    Combine { group, block, first_panel: self.panels.start, width, totals: &mut *totals };
                multiply::<S, P>(
                    simd,
                    block.len,
                    plan.down_steps,
                    self.panels.clone(),
                    down(block.expert),
                    following,
                    &mut activations,
                    self.sums,
                    &mut epilogue,
                );
            }
            // The scale belongs to the routed experts' sum, before the shared expert.
            if i == 0 && self.scale != 1.0 {
                let scale = simd.splat(self.scale);
                for total in totals.chunks_exact_mut(S::LANES) {
                    let scaled = simd.mul(simd.load(total), scale);
                    simd.store(total, scaled);
                }
            }
        }
        let column = self.panels.start * PANEL;
        let columns = width.min(self.call.hidden.shape()[1] - column);
        for (i, total) in totals.chunks_exact(width).enumerate() {
            let first = (self.chunk.start + i) * self.call.out_stride + column;
            // SAFETY: `out` was checked to have rows that do not overlap, and these columns belong to this item.
            unsafe { self.call.out.store(simd, first, columns, total) };
        }
    }
}

/// What the first pass has packed.
struct InnerRows<'a, P: Product> {
    inner: &'a [P::A],
    inner_row: usize,
}

impl<S: Simd, P: Product> Activations<S, P> for InnerRows<'_, P> {
    #[inline(always)]
    fn prepare(&mut self, _: S, _: Range<usize>) {}

    #[inline(always)]
    fn tile(&self, tile: TileSpan, steps: Range<usize>) -> &[P::A] {
        let words = steps.start * P::A_WORDS..steps.end * P::A_WORDS;
        let tile_words = &self.inner[tile.row * self.inner_row..][..tile.rows * self.inner_row];
        &tile_words[words.start * tile.rows..words.end * tile.rows]
    }
}

/// `total[token] += weight * (y + bias)`
struct Combine<'a, A> {
    group: &'a Group<'a, A>,
    block: Block,
    first_panel: usize,
    width: usize,
    totals: &'a mut [f32],
}

impl<S: Simd, A> Epilogue<S> for Combine<'_, A> {
    #[inline(always)]
    fn tile(&mut self, simd: S, panel: usize, tile: TileSpan, c: &mut [f32]) {
        let group = self.group;
        let bias = group.experts.biases(self.block.expert)[1].map(|bias| &bias[panel * PANEL..][..PANEL]);
        let first = self.block.first + tile.token;
        for (i, sums) in c.chunks_exact(PANEL).take(tile.tokens).enumerate() {
            let at = group.token(first + i) * self.width + (panel - self.first_panel) * PANEL;
            let totals = &mut self.totals[at..][..PANEL];
            let weight = match group.weight_on {
                WeightOn::Output => simd.splat(group.weights.map_or(1.0, |w| w[first + i])),
                WeightOn::Input => simd.splat(1.0),
            };
            for at in (0..PANEL).step_by(S::LANES) {
                let mut y = simd.load(&sums[at..]);
                if let Some(bias) = bias {
                    y = simd.add(y, simd.load(&bias[at..]));
                }
                let total = simd.fma(weight, y, simd.load(&totals[at..]));
                simd.store(&mut totals[at..], total);
            }
        }
    }
}
