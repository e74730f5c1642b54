//! Assignments in expert order on the GPU: a stable counting sort, and the tiles that the experts' rows fall into.

use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, group_count, group_scan, group_scatter, group_tokens as one_cta};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Parts, Queue};
use crate::cuda::rows::{Rows, stride_bytes};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::ExpertFfn;
use crate::view::contiguous;

/// What to sort: the assignments, (token, slot) pairs, whose expert is local, by (expert, token, slot).
///
/// * `topk_ids`, `topk_weights`: `[num_tokens, slots]`, each with its own distance between rows. Ids outside of
///   `first_expert .. first_expert + num_local_experts`, and -1, are skipped
/// * `expert_offsets`: `[num_local_experts + 1]`, exclusive prefix sums of the rows per expert
/// * `row_token`, `row_weight`: `[num_tokens * slots]`, token and weight of each row; what is behind the last row is not
///   written
/// * `position`: `[num_tokens, slots]`, the row of each assignment, or [`GroupTokens::SKIPPED`]
/// * `tile_counts`: `[4]`; `tiles`: `[4, max_tiles, 4]`, see [`GroupTokens::TILE_ROWS`]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct GroupTokens {
    /// Tokens; 0 is legal.
    pub num_tokens: usize,
    /// Assignments per token; 0 is legal.
    pub slots: usize,
    /// First expert of this rank.
    pub first_expert: usize,
    /// Experts of this rank; 0 is legal.
    pub num_local_experts: usize,
    /// Elements from one row of `topk_ids` to the next.
    pub topk_ids_stride: usize,
    /// Elements from one row of `topk_weights` to the next.
    pub topk_weights_stride: usize,
}

impl GroupTokens {
    /// `position` of an assignment that has no row.
    pub const SKIPPED: u32 = u32::MAX;

    /// Rows of a tile in the four lists. An expert with n rows has one tile in the first list that takes n rows, or
    /// `ceil(n / 128)` tiles in the last one. A tile is four `u32`: local expert, first row, rows, 0. In each list experts ascend.
    pub const TILE_ROWS: [u32; 4] = [16, 32, 64, 128];

    /// Contiguous arrays for the experts of a specification.
    pub fn new(spec: &ExpertFfn, num_tokens: usize, slots: usize) -> Self {
        GroupTokens {
            num_tokens,
            slots,
            first_expert: spec.first_expert,
            num_local_experts: spec.num_local_experts,
            topk_ids_stride: slots,
            topk_weights_stride: slots,
        }
    }

    /// Length of `row_token`, `row_weight` and `position`: all assignments. Saturates.
    pub fn assignments(&self) -> usize {
        self.num_tokens.saturating_mul(self.slots)
    }

    /// Room for tiles in each of the four lists: whatever the ids are, no list is longer.
    pub fn max_tiles(&self) -> usize {
        // sum of ceil(n / 128) over the experts with rows
        let (experts, assignments) = (self.num_local_experts, self.assignments());
        assignments / 128 + experts.min(assignments)
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupTokensArgs {
    /// Read.
    pub topk_ids: u64,
    /// Weights, where they are wanted by row.
    pub weights: Option<GroupWeightsArgs>,
    /// Written.
    pub expert_offsets: u64,
    /// Written.
    pub row_token: u64,
    /// Written.
    pub position: u64,
    /// Written.
    pub tile_counts: u64,
    /// Written; a multiple of 16.
    pub tiles: u64,
    /// [`GroupTokensPlan::workspace_bytes`] bytes, a multiple of 4; any number if there are none.
    pub workspace: u64,
}

/// Device pointers of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupWeightsArgs {
    /// Read.
    pub topk_weights: u64,
    /// Written.
    pub row_weight: u64,
}

impl GroupTokensArgs {
    /// Without weights and workspace.
    pub fn new(
        topk_ids: u64,
        expert_offsets: u64,
        row_token: u64,
        position: u64,
        tile_counts: u64,
        tiles: u64,
    ) -> Self {
        let (weights, workspace) = (None, 0);
        GroupTokensArgs { topk_ids, weights, expert_offsets, row_token, position, tile_counts, tiles, workspace }
    }

    /// The same with weights.
    pub fn with_weights(self, topk_weights: u64, row_weight: u64) -> Self {
        GroupTokensArgs { weights: Some(GroupWeightsArgs { topk_weights, row_weight }), ..self }
    }

    /// The same with a workspace.
    pub fn with_workspace(self, workspace: u64) -> Self {
        GroupTokensArgs { workspace, ..self }
    }
}

/// Tiles of the sort: of one round each, until there are so many. Two for each multiprocessor of an H200, and what each of
/// the 32 warps of group_scan has in flight.
const MAX_SORT_TILES: usize = 256;

/// Warps of a CTA that sorts.
const WARPS: u32 = one_cta::INSTANCES[0].threads / 32;

/// Assignments that one CTA sorts at once.
const ROUND: usize = (one_cta::INSTANCES[0].threads * one_cta::INSTANCES[0].items) as usize;

/// [`GroupTokens`] with its kernels and grids: one launch for up to 4096 assignments, three for more. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupTokensPlan {
    problem: GroupTokens,
    topk_ids_stride_bytes: u64,
    topk_weights_stride_bytes: u64,
    /// `index * magic >> shift = index / slots` for every assignment.
    magic: u32,
    shift: u32,
    /// Local experts up to a multiple of 8, not 0.
    padded_experts: u32,
    /// CTAs that sort; 1 stands for a single launch.
    sort_tiles: u32,
    /// Rounds of each of several CTAs.
    rounds: u32,
}

impl GroupTokensPlan {
    /// Checks the shapes and chooses the kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for 2^31 and more assignments or more than 2048 local experts; [`Error::Value`] if ids cannot name the
    /// experts; [`Error::Stride`] if rows leave the address space.
    pub fn new(problem: &GroupTokens) -> Result<Self> {
        let &GroupTokens { num_tokens, slots, first_expert, num_local_experts, .. } = problem;
        let assignments = problem.assignments();
        if assignments > i32::MAX as usize || num_tokens > i32::MAX as usize || slots > i32::MAX as usize {
            return Err(Error::unsupported("cuda", format!("{num_tokens} tokens with {slots} experts each")));
        }
        if num_local_experts > one_cta::INSTANCES[0].max_experts as usize {
            return Err(Error::unsupported("cuda", format!("{num_local_experts} local experts")));
        }
        if first_expert > i32::MAX as usize - num_local_experts {
            let expected = format!("at most {}", i32::MAX as usize - num_local_experts);
            return Err(Error::value("first_expert", expected, first_expert));
        }
        let bytes = |name, stride| stride_bytes(name, Dtype::F32, num_tokens, stride);
        let topk_ids_stride_bytes = bytes("topk_ids", problem.topk_ids_stride)?;
        let topk_weights_stride_bytes = bytes("topk_weights", problem.topk_weights_stride)?;
        let (magic, shift) = division(slots as u32); // at most 2^31 - 1, seen above
        let (sort_tiles, rounds) = if assignments <= ROUND {
            (1, 1)
        } else {
            let rounds = assignments.div_ceil(ROUND).div_ceil(MAX_SORT_TILES);
            (assignments.div_ceil(ROUND * rounds), rounds)
        };
        Ok(GroupTokensPlan {
            problem: problem.clone(),
            topk_ids_stride_bytes,
            topk_weights_stride_bytes,
            magic,
            shift,
            padded_experts: num_local_experts.max(1).next_multiple_of(8) as u32,
            sort_tiles: sort_tiles as u32,
            rounds: rounds as u32,
        })
    }

    /// What was planned.
    pub fn problem(&self) -> &GroupTokens {
        &self.problem
    }

    /// Names of the kernels that run, in order.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.steps().iter().map(|kernel| kernel.entry)
    }

    /// The kernels that run, in order.
    pub(super) fn used(&self) -> impl Iterator<Item = &'static Kernel> {
        self.steps().iter().copied()
    }

    fn steps(&self) -> &'static [&'static Kernel] {
        static ONE: [&Kernel; 1] = [&one_cta::INSTANCES[0].kernel];
        static THREE: [&Kernel; 3] =
            [&group_count::INSTANCES[0].kernel, &group_scan::INSTANCES[0].kernel, &group_scatter::INSTANCES[0].kernel];
        if self.sort_tiles == 1 { &ONE } else { &THREE }
    }

    /// Offsets of the counts per tile and of the totals in the workspace, and its size.
    fn parts(&self) -> (u64, u64, usize) {
        let mut parts = Parts::default();
        if self.sort_tiles == 1 {
            return (0, 0, 0);
        }
        let counts = parts.part(self.sort_tiles as usize * self.problem.num_local_experts, 4);
        let totals = parts.part(self.problem.num_local_experts, 4);
        (counts as u64, totals as u64, parts.bytes())
    }

    /// Device memory that [`GroupTokensPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        self.parts().2
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.steps().iter().try_for_each(|kernel| driver.load(kernel))
    }

    /// Queues the work on a stream. Does not wait; after [`GroupTokensPlan::warmup`] it neither allocates nor loads. Whatever the
    /// ids are, nothing outside of the arrays is touched.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer of an array that is not empty is null or not aligned; [`Error::Overlap`] if an output shares
    /// memory with another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the outputs and the workspace meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &GroupTokensArgs, stream: Stream) -> Result<()> {
        let problem = &self.problem;
        let (assignments, experts) = (problem.assignments(), problem.num_local_experts);
        let (slots, max_tiles) = (problem.slots, problem.max_tiles());
        let (counts, totals, workspace_bytes) = self.parts();
        let matrix = |name, ptr, stride_bytes| Rows {
            name,
            ptr,
            num_rows: if slots == 0 { 0 } else { problem.num_tokens },
            row_bytes: 4 * slots as u64,
            stride_bytes,
        };
        let array = |name, ptr, len: usize| Rows {
            name,
            ptr,
            num_rows: usize::from(len > 0),
            row_bytes: 4 * len as u64,
            stride_bytes: 0,
        };
        let (topk_weights, row_weight) = args.weights.map_or((0, 0), |w| (w.topk_weights, w.row_weight));
        let weighted = if args.weights.is_some() { assignments } else { 0 };
        let inputs = [
            matrix("topk_ids", args.topk_ids, self.topk_ids_stride_bytes),
            Rows {
                num_rows: if weighted == 0 { 0 } else { problem.num_tokens },
                ..matrix("topk_weights", topk_weights, self.topk_weights_stride_bytes)
            },
        ];
        let outputs = [
            array("expert_offsets", args.expert_offsets, experts + 1),
            array("row_token", args.row_token, assignments),
            array("row_weight", row_weight, weighted),
            array("position", args.position, assignments),
            array("tile_counts", args.tile_counts, 4),
            array("tiles", args.tiles, 4 * 4 * max_tiles),
            array("workspace", args.workspace, workspace_bytes / 4),
        ];
        let present = |rows: &&Rows| rows.num_rows > 0;
        inputs.iter().chain(&outputs).filter(present).try_for_each(|rows| rows.check(Dtype::F32))?;
        if !args.tiles.is_multiple_of(16) {
            return Err(Error::value("tiles", "a multiple of 16", format_args!("{:#x}", args.tiles)));
        }
        for (i, output) in outputs.iter().enumerate().filter(|(_, rows)| rows.num_rows > 0) {
            let others = inputs.iter().chain(&outputs[i + 1..]);
            others.filter(present).try_for_each(|other| output.check_separate(other))?;
        }

        let [num_assignments, slots] = [assignments, slots].map(|n| n as u32); // below 2^31, seen by `new`
        let [first_expert, num_experts] = [problem.first_expert, experts].map(|n| n as u32); // likewise
        let tile_list_bytes = 16 * max_tiles as u64;
        // A warp's counts are of 16 bits, all warps' and their totals; 32 bits for the first rows.
        let sort_shared_bytes = (2 * (WARPS + 1) + 4) * self.padded_experts;
        let launch = |ctas, dynamic_shared_bytes| Launch { dynamic_shared_bytes, ..Launch::grid([ctas, 1, 1]) };
        if self.sort_tiles == 1 {
            let params = one_cta::Params {
                topk_ids_ptr: args.topk_ids,
                topk_weights_ptr: topk_weights,
                expert_offsets_ptr: args.expert_offsets,
                row_token_ptr: args.row_token,
                row_weight_ptr: row_weight,
                position_ptr: args.position,
                tile_counts_ptr: args.tile_counts,
                tiles_ptr: args.tiles,
                topk_ids_stride_bytes: self.topk_ids_stride_bytes,
                topk_weights_stride_bytes: self.topk_weights_stride_bytes,
                tile_list_bytes,
                num_assignments,
                slots,
                slots_magic: self.magic,
                slots_shift: self.shift,
                first_expert,
                num_experts,
                padded_experts: self.padded_experts,
                num_items: num_assignments.div_ceil(one_cta::INSTANCES[0].threads),
            };
            let launch = launch(1, sort_shared_bytes);
            // SAFETY: pointers are aligned and arrays separate, checked above; sizes are those that `new` has seen and the
            // header asks for; that the pointers hold the arrays of the plan is the caller's promise.
            return unsafe { driver.launch(&one_cta::INSTANCES[0].kernel, &launch, &params.to_bytes(), stream) };
        }
        let (counts_ptr, totals_ptr) = (args.workspace + counts, args.workspace + totals);
        let count = group_count::Params {
            topk_ids_ptr: args.topk_ids,
            tile_counts_ptr: counts_ptr,
            topk_ids_stride_bytes: self.topk_ids_stride_bytes,
            num_assignments,
            slots,
            slots_magic: self.magic,
            slots_shift: self.shift,
            first_expert,
            num_experts,
            rounds: self.rounds,
        };
        let scan = group_scan::Params { counts_ptr, totals_ptr, num_tiles: self.sort_tiles, num_experts };
        let scatter = group_scatter::Params {
            topk_ids_ptr: args.topk_ids,
            topk_weights_ptr: topk_weights,
            expert_offsets_ptr: args.expert_offsets,
            row_token_ptr: args.row_token,
            row_weight_ptr: row_weight,
            position_ptr: args.position,
            tile_counts_ptr: args.tile_counts,
            tiles_ptr: args.tiles,
            tile_starts_ptr: counts_ptr,
            totals_ptr,
            topk_ids_stride_bytes: self.topk_ids_stride_bytes,
            topk_weights_stride_bytes: self.topk_weights_stride_bytes,
            tile_list_bytes,
            num_assignments,
            slots,
            slots_magic: self.magic,
            slots_shift: self.shift,
            first_expert,
            num_experts,
            padded_experts: self.padded_experts,
            rounds: self.rounds,
        };
        let [count_kernel, scan_kernel, scatter_kernel] = self.steps() else {
            unreachable!("several tiles: three steps")
        };
        // SAFETY: as above, and the workspace has the two parts that its size was made of.
        unsafe {
            let shared = 4 * num_experts;
            driver.launch(count_kernel, &launch(self.sort_tiles, shared), &count.to_bytes(), stream)?;
            if num_experts > 0 {
                driver.launch(scan_kernel, &launch(num_experts.div_ceil(32), 0), &scan.to_bytes(), stream)?;
            }
            driver.launch(scatter_kernel, &launch(self.sort_tiles, sort_shared_bytes), &scatter.to_bytes(), stream)
        }
    }
}

/// A factor and a shift so that `n * factor >> shift = n / divisor` for all `n < 2^31`; 0 counts as 1.
///
/// Granlund and Montgomery 1994, Division by invariant integers using multiplication: with `shift = 31 + ceil(log2 d)` the rounded-up
/// factor is at most `2^(shift - 31) / d` too large, too little to reach the next integer.
pub(super) fn division(divisor: u32) -> (u32, u32) {
    let divisor = u64::from(divisor.max(1));
    let shift = 31 + divisor.next_power_of_two().trailing_zeros();
    (((1_u64 << shift) / divisor + 1) as u32, shift)
}

/// What [`group_tokens`] writes; see [`GroupTokens`].
#[derive(Debug)]
#[non_exhaustive]
pub struct GroupTokensOutput<'a> {
    /// `[num_local_experts + 1]`
    pub expert_offsets: DeviceViewMut<'a, u32, 1>,
    /// `[num_tokens * slots]`
    pub row_token: DeviceViewMut<'a, u32, 1>,
    /// `[num_tokens * slots]`
    pub row_weight: DeviceViewMut<'a, f32, 1>,
    /// `[num_tokens, slots]`, contiguous
    pub position: DeviceViewMut<'a, u32, 2>,
    /// `[4]`
    pub tile_counts: DeviceViewMut<'a, u32, 1>,
    /// `[4, max_tiles, 4]`, contiguous
    pub tiles: DeviceViewMut<'a, u32, 3>,
}

impl<'a> GroupTokensOutput<'a> {
    /// All arrays.
    pub const fn new(
        expert_offsets: DeviceViewMut<'a, u32, 1>,
        row_token: DeviceViewMut<'a, u32, 1>,
        row_weight: DeviceViewMut<'a, f32, 1>,
        position: DeviceViewMut<'a, u32, 2>,
        tile_counts: DeviceViewMut<'a, u32, 1>,
        tiles: DeviceViewMut<'a, u32, 3>,
    ) -> Self {
        GroupTokensOutput { expert_offsets, row_token, row_weight, position, tile_counts, tiles }
    }
}

/// Sorts the assignments of local experts by (expert, token, slot), and cuts each expert's rows into tiles: [`GroupTokens`] says what
/// comes out.
///
/// # Errors
/// Those of [`GroupTokensPlan::new`] and [`ExpertFfn::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`];
/// [`Error::Overlap`]; [`Error::Driver`]. Nothing is written then.
pub fn group_tokens(
    queue: &mut Queue<'_>,
    spec: &ExpertFfn,
    topk_ids: DeviceView<'_, i32, 2>,
    topk_weights: DeviceView<'_, f32, 2>,
    output: GroupTokensOutput<'_>,
) -> Result<()> {
    queue.check_homes(&[
        topk_ids.home(),
        topk_weights.home(),
        output.expert_offsets.home(),
        output.row_token.home(),
        output.row_weight.home(),
        output.position.home(),
        output.tile_counts.home(),
        output.tiles.home(),
    ])?;
    spec.validate()?;
    let shape @ [num_tokens, slots] = topk_ids.shape();
    let mut problem = GroupTokens::new(spec, num_tokens, slots);
    problem.topk_ids_stride = topk_ids.strides()[0];
    problem.topk_weights_stride = topk_weights.strides()[0];
    let (plan, assignments) = (GroupTokensPlan::new(&problem)?, problem.assignments());
    topk_ids.check("topk_ids", shape)?;
    topk_weights.check("topk_weights", shape)?;
    output.expert_offsets.check("expert_offsets", [spec.num_local_experts + 1])?;
    output.row_token.check("row_token", [assignments])?;
    output.row_weight.check("row_weight", [assignments])?;
    output.position.check("position", shape)?;
    output.tile_counts.check("tile_counts", [4])?;
    let tiles = [4, problem.max_tiles(), 4];
    output.tiles.check("tiles", tiles)?;
    dense("position", shape, output.position.strides())?;
    dense("tiles", tiles, output.tiles.strides())?;
    let args = GroupTokensArgs::new(
        topk_ids.ptr(),
        output.expert_offsets.ptr(),
        output.row_token.ptr(),
        output.position.ptr(),
        output.tile_counts.ptr(),
        output.tiles.ptr(),
    )
    .with_weights(topk_weights.ptr(), output.row_weight.ptr())
    .with_workspace(queue.workspace(plan.workspace_bytes())?);
    // SAFETY: the views are memory of the queue's device with the shapes and strides checked above, borrowed for as long as
    // the queue's work may use them; the workspace is the queue's.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}

/// An array without gaps.
pub(super) fn dense<const N: usize>(name: &str, shape: [usize; N], strides: [usize; N]) -> Result<()> {
    let wanted = contiguous(shape);
    if shape.contains(&0) || (0..N).all(|i| shape[i] == 1 || strides[i] == wanted[i]) {
        return Ok(());
    }
    Err(Error::Stride { argument: name.into(), expected: format!("{wanted:?}"), found: strides.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, Ffn};

    fn problem(num_tokens: usize, slots: usize, experts: usize) -> GroupTokens {
        GroupTokens::new(&ExpertFfn::new(experts, Ffn::gated(8, 8, Activation::Silu)), num_tokens, slots)
    }

    #[test]
    fn kernels() {
        let names = |problem: &GroupTokens| GroupTokensPlan::new(problem).unwrap().kernels().collect::<Vec<_>>();
        let three = ["gatefold_group_count_u32", "gatefold_group_scan_u32", "gatefold_group_scatter_u32"];
        assert_eq!(names(&problem(0, 8, 128)), ["gatefold_group_tokens_u32"]);
        assert_eq!(names(&problem(512, 8, 2048)), ["gatefold_group_tokens_u32"]);
        assert_eq!(names(&problem(4097, 1, 1)), three);
    }

    #[test]
    fn workspace() {
        let bytes = |problem: &GroupTokens| GroupTokensPlan::new(problem).unwrap().workspace_bytes();
        assert_eq!(bytes(&problem(512, 8, 128)), 0);
        assert_eq!(bytes(&problem(16384, 8, 128)), 32 * 128 * 4 + 512);
        let plan = GroupTokensPlan::new(&problem(i32::MAX as usize, 1, 2048)).unwrap();
        assert_eq!((plan.sort_tiles, plan.rounds), (256, 2048));
        assert_eq!(plan.workspace_bytes(), (256 + 1) * 2048 * 4);
        let plan = GroupTokensPlan::new(&problem(137_500, 8, 8)).unwrap();
        assert_eq!((plan.sort_tiles, plan.rounds), (135, 2));
    }

    #[test]
    fn divisions() {
        let mut divisors: Vec<u32> = (0..=4097).collect();
        divisors.extend((12..31).flat_map(|i| [(1 << i) - 1, 1 << i, (1 << i) + 1]));
        divisors.push(i32::MAX as u32);
        for divisor in divisors {
            let (factor, shift) = division(divisor);
            let divide = |n: u64| (n * u64::from(factor)) >> shift;
            let d = u64::from(divisor.max(1));
            let last = i32::MAX as u64;
            for q in [0, 1, 2, 3, last / d / 2, last / d] {
                for n in [(q * d).saturating_sub(1), q * d, q * d + 1, q * d + d - 1] {
                    let n = n.min(last);
                    assert_eq!(divide(n), n / d, "{n} / {d}");
                }
            }
        }
    }

    #[test]
    fn bad_problems() {
        let message = |problem: GroupTokens| GroupTokensPlan::new(&problem).unwrap_err().to_string();
        assert_eq!(message(problem(1, 1, 2049)), "unsupported by cuda: 2049 local experts");
        assert_eq!(message(problem(1 << 30, 2, 8)), "unsupported by cuda: 1073741824 tokens with 2 experts each");
        assert_eq!(
            message(GroupTokens { first_expert: i32::MAX as usize, ..problem(1, 1, 8) }),
            "`first_expert` is 2147483647, expected at most 2147483639"
        );
        assert_eq!(
            message(GroupTokens { topk_ids_stride: usize::MAX / 4, ..problem(8, 1, 8) }),
            format!("`topk_ids` has strides [{}, 1], expected rows within 2^63 bytes", usize::MAX / 4)
        );
    }
}
