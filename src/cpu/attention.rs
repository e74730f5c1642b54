//! Softmax attention: prefill, append and decode in one function, and the merge of partial results.

mod block;
mod merge;
mod narrow;
mod operand;
mod plan;
mod problem;
mod product;
mod scores;
mod softmax;

use super::level::dispatch;
use super::parallel::{self, Shared};
use super::simd::{Kernel, MAX_LANES, Simd};
use super::workspace::part_bytes;
use super::{Cpu, Float};
use crate::args::{AttentionInput, AttentionOutput, AttentionShape};
use crate::element::Dtype;
use crate::error::Result;
use crate::spec::Attention;
use block::RunItem;
pub use merge::{merge, merge_workspace_bytes};
use operand::Operand;
use plan::{Costs, Item, Plan};
use problem::Problem;
use scores::Buckets;
use std::marker::PhantomData;
use std::sync::atomic::AtomicU32;

/// Keys that are packed and multiplied together. Their scores for a panel of 32 rows take 8 KiB of a 32 or 48 KiB cache.
const TILE: usize = 64;
/// A row's keys are summed in parts of this many, which are then folded in order: what divides the keys of one query among
/// threads. Packing a query once more for each part costs under 2 %.
const SPLIT: usize = 8 * TILE;
/// The most rows in a panel.
const MAX_WIDTH: usize = 2 * MAX_LANES;
/// The most panels of a block: 256 rows make the packing of a tile 2 % of its products.
const MAX_PANELS: usize = 8;

/// Scaled dot-product attention over ragged sequences, a contiguous cache or pages, with all options of the specification.
///
/// The formula, with its masks, biases, sinks and the rule for queries that see no key, is that of [`Attention`]; shapes and
/// defaults are those of [`AttentionInput`] and [`AttentionOutput`]. Any strides with a contiguous last dimension; zero
/// tokens and empty sequences are legal.
///
/// * Prefill, append and decode are one function with one order of sums, fixed by absolute key rows: a query's result has
///   the same bits alone or in a batch, for a prompt whole or in chunks, for ragged, contiguous and paged storage, for any
///   number of threads. It depends on the level alone.
/// * Sums are in f32. `bf16` at the level `avx512bf16` multiplies bf16 values exactly and rounds the softmax weights to bf16
///   before they meet the values; subnormal products and weights count as zero there. Other combinations widen to f32.
/// * Values are weighed before the division by the sum: values beyond about `1e38 / min(kv_len, 512)` overflow.
/// * Infinite scores follow the limit of the formula: keys with a score of inf share all of the weight, and `lse` is inf. A
///   bias of -inf hides a key whatever its score. A NaN score makes its query's result NaN.
/// * Keys that no query sees are not read into any sum: a NaN there stays there. A NaN or infinity in the value of a key that
///   some query sees may reach other queries of that sequence, but for those that see no key.
///
/// Memory beyond `input` and `output`: [`attention_workspace_bytes`].
///
/// # Errors
/// Those of [`AttentionInput::check`]. Nothing is written then.
///
/// Online softmax after Milakov and Gimelshein 2018, arXiv:1805.02867; division of the keys after Dao et al. 2023,
/// "Flash-Decoding for long-context inference".
pub fn attention<T: Float>(
    cpu: &mut Cpu,
    spec: &Attention,
    input: &AttentionInput<'_, T, f32>,
    output: AttentionOutput<'_, T, f32>,
) -> Result<()> {
    let shape = input.check(spec, &output)?;
    if shape.num_tokens == 0 {
        return Ok(());
    }
    T::attention(Call { cpu, spec, input, output, shape });
    Ok(())
}

/// The computation for one element type, compiled in this crate: it is what [`Float::attention`] calls.
pub fn attention_of<T: Float>(call: Call<'_, '_, T>) {
    let level = call.cpu.level;
    dispatch(level, call);
}

/// Workspace that [`attention`] needs at most for calls of this shape, in the rayon pool that the caller is in. `has_added`:
/// whether the call gives an explicit mask, a bias or a relative bias.
pub fn attention_workspace_bytes<T: Float>(
    cpu: &Cpu,
    spec: &Attention,
    shape: &AttentionShape,
    has_added: bool,
) -> usize {
    struct Bytes<'a, T>(&'a Attention, &'a AttentionShape, bool, PhantomData<T>);
    impl<T: Float> Kernel for Bytes<'_, T> {
        type Output = usize;
        #[inline(always)]
        fn eval<S: Simd>(self, _: S) -> usize {
            let Bytes(spec, shape, has_added, _) = self;
            let depth = if takes_pairs::<S, T>() { u32::DEPTH } else { f32::DEPTH };
            workspace_bytes(spec, &plan::<S, T>(spec, shape, depth, has_added))
        }
    }
    dispatch(cpu.level, Bytes(spec, shape, has_added, PhantomData::<T>))
}

/// Whether products are of pairs of bf16.
const fn takes_pairs<S: Simd, T: Float>() -> bool {
    S::HAS_DOT_BF16 && matches!(T::DTYPE, Dtype::BF16)
}

fn plan<S: Simd, T: Float>(spec: &Attention, shape: &AttentionShape, depth: usize, has_added: bool) -> Plan {
    let (narrow_rows, threads) = (narrow::most_rows::<S, T>(), parallel::max_workers());
    Plan::new(spec, shape, Costs { lanes: S::LANES, depth, narrow_rows, threads, has_added })
}

fn workspace_bytes(spec: &Attention, plan: &Plan) -> usize {
    let parts = [
        part_bytes::<Item>(plan.max_items),
        part_bytes::<u32>(plan.max_counters),
        part_bytes::<u32>(spec.relative_bias.as_ref().map_or(0, Buckets::len)),
        part_bytes::<f32>(plan.max_partials),
        part_bytes::<f32>(parallel::workers_for(plan.max_items).saturating_mul(plan.scratch_words())),
    ];
    parts.into_iter().fold(0, usize::saturating_add)
}

/// A checked call.
pub struct Call<'a, 'b, T> {
    cpu: &'a mut Cpu,
    spec: &'a Attention,
    input: &'a AttentionInput<'b, T, f32>,
    output: AttentionOutput<'a, T, f32>,
    shape: AttentionShape,
}

impl<T: Float> Kernel for Call<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        if takes_pairs::<S, T>() {
            run::<S, T, u32>(simd, self);
        } else {
            run::<S, T, f32>(simd, self);
        }
    }
}

fn run<S: Simd, T: Float, E: Operand>(simd: S, call: Call<'_, '_, T>) {
    let Call { cpu, spec, input, output, shape } = call;
    let has_added = input.mask.is_some() || input.bias.is_some() || input.relative_bias.is_some();
    let plan = plan::<S, T>(spec, &shape, E::DEPTH, has_added);
    let mut carver = cpu.workspace.carve(workspace_bytes(spec, &plan));
    let items = carver.part::<Item>(plan.max_items);
    let counters = carver.part::<u32>(plan.max_counters);
    let table = carver.part::<u32>(spec.relative_bias.as_ref().map_or(0, Buckets::len));
    let partials = Shared::new(carver.part::<f32>(plan.max_partials));

    let count = plan.fill(spec, input, &shape, items, counters);
    let items = &items[..count];
    let words = plan.scratch_words();
    let scratch = Shared::new(carver.part::<f32>(parallel::workers_for(plan.max_items) * words));
    // SAFETY: `AtomicU32` has the layout of `u32`, and nobody uses the slice otherwise while this lives.
    let unfinished = unsafe { &*(std::ptr::from_mut(counters) as *const [AtomicU32]) };
    let AttentionOutput { mut out, lse } = output;
    let out_strides = out.strides();
    let problem = Problem {
        spec,
        input,
        buckets: spec.relative_bias.map(|bias| Buckets::new(bias, table)),
        out: Shared::new(out.data_mut()),
        out_strides,
        lse: lse.map(|lse| (lse.strides(), lse)).map(|(strides, lse)| (Shared::new(lse.into_data()), strides)),
    };
    parallel::run(count, |worker, item| {
        // SAFETY: no two calls with the same worker overlap, and workers have separate ranges.
        let scratch = unsafe { scratch.part(worker * words, words) };
        simd.run(RunItem {
            problem: &problem,
            plan: &plan,
            item: items[item],
            partials,
            unfinished,
            scratch,
            operand: PhantomData::<E>,
        });
    });
}
