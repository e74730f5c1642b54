//! Between router and experts: assignments in expert order, and the sum of a token's experts.

use crate::common::buffer::{Array, Layout, Output};
use crate::common::data::Rng;
use crate::common::simulator::Simulator;
use crate::staged::{Staged, StagedMut};
use crate::{on_devices, on_gpu, on_large_devices};
use gatefold::cuda::driver::{Buffer, Driver, Limits};
use gatefold::cuda::{GroupTokens, GroupTokensArgs, GroupTokensOutput, GroupTokensPlan, Queue, Stream, group_tokens};
use gatefold::spec::{Activation, ExpertFfn, Ffn};

// --- group_tokens -----------------------------------------------------------------------------------------------------

/// What `group_tokens` writes, tiles without the room that is left.
#[derive(Debug, PartialEq)]
pub struct Sorted {
    offsets: Vec<u32>,
    token: Vec<u32>,
    weight: Vec<u32>,
    pub position: Vec<u32>,
    tiles: [Vec<[u32; 4]>; 4],
}

/// Ids and weights with the experts of a rank.
pub struct SortCase {
    spec: ExpertFfn,
    slots: usize,
    pub ids: Vec<i32>,
    weights: Vec<f32>,
    layout: Layout,
}

impl SortCase {
    /// All experts are local.
    pub fn new(experts: usize, slots: usize, ids: Vec<i32>) -> Self {
        let spec = ExpertFfn::new(experts, Ffn::gated(8, 8, Activation::Silu));
        // Every weight is its assignment's number, so that nothing can be mixed up.
        let weights = (0..ids.len()).map(|i| i as f32).collect();
        SortCase { spec, slots, ids, weights, layout: Layout::Contiguous }
    }

    /// Random experts, most of them of this rank.
    pub fn random(rng: &mut Rng, experts: usize, slots: usize, tokens: usize) -> Self {
        let ids = (0..tokens * slots).map(|_| rng.below(experts + 1 + experts / 8) as i32 - 1).collect();
        SortCase::new(experts, slots, ids)
    }

    fn problem(&self) -> GroupTokens {
        GroupTokens::new(&self.spec, self.ids.len().checked_div(self.slots).unwrap_or(0), self.slots)
    }

    /// The same by a sort.
    pub fn expected(&self) -> Sorted {
        let mut order: Vec<(usize, usize)> =
            self.ids.iter().enumerate().filter_map(|(i, id)| Some((self.spec.local_expert(*id)?, i))).collect();
        order.sort_unstable();
        let experts = self.spec.num_local_experts;
        let mut offsets = vec![0; experts + 1];
        for (expert, _) in &order {
            offsets[expert + 1] += 1;
        }
        for e in 0..experts {
            offsets[e + 1] += offsets[e];
        }
        let mut position = vec![GroupTokens::SKIPPED; self.ids.len()];
        for (row, (_, i)) in order.iter().enumerate() {
            position[*i] = row as u32;
        }
        let mut tiles: [Vec<[u32; 4]>; 4] = Default::default();
        for e in 0..experts {
            let (start, end) = (offsets[e], offsets[e + 1]);
            let list = GroupTokens::TILE_ROWS.iter().position(|rows| end - start <= *rows).unwrap_or(3);
            for first in (start..end).step_by(128) {
                tiles[list].push([e as u32, first, (end - first).min(128), 0]);
            }
        }
        Sorted {
            offsets,
            token: order.iter().map(|(_, i)| (i / self.slots) as u32).collect(),
            weight: order.iter().map(|(_, i)| self.weights[*i].to_bits()).collect(),
            position,
            tiles,
        }
    }

    /// The same on a device, after a look at what must be left alone.
    pub fn run(&self, driver: &dyn Driver) -> Sorted {
        let problem = self.problem();
        let (tokens, assignments, max_tiles) = (problem.num_tokens, problem.assignments(), problem.max_tiles());
        let shape = [tokens, self.slots];
        let ids = Array::new(shape, self.layout, &self.ids);
        let weights = Array::new(shape, self.layout, &self.weights);
        let mut offsets = Output::<u32, 1>::new([self.spec.num_local_experts + 1], Layout::Contiguous);
        let mut row_token = Output::<u32, 1>::new([assignments], Layout::Contiguous);
        let mut row_weight = Output::<f32, 1>::new([assignments], Layout::Contiguous);
        let mut position = Output::<u32, 2>::new(shape, Layout::Contiguous);
        let mut counts = Output::<u32, 1>::new([4], Layout::Contiguous);
        let mut tiles = Output::<u32, 3>::new([4, max_tiles, 4], Layout::Contiguous);
        let queue = &mut Queue::new(driver);
        let given = (Staged::new(driver, ids.view()).unwrap(), Staged::new(driver, weights.view()).unwrap());
        let mut staged = (
            StagedMut::new(driver, &offsets.view()).unwrap(),
            StagedMut::new(driver, &row_token.view()).unwrap(),
            StagedMut::new(driver, &row_weight.view()).unwrap(),
            StagedMut::new(driver, &position.view()).unwrap(),
            StagedMut::new(driver, &counts.view()).unwrap(),
            StagedMut::new(driver, &tiles.view()).unwrap(),
        );
        let output = GroupTokensOutput::new(
            staged.0.view(),
            staged.1.view(),
            staged.2.view(),
            staged.3.view(),
            staged.4.view(),
            staged.5.view(),
        );
        group_tokens(queue, &self.spec, given.0.view(), given.1.view(), output).unwrap();
        staged.0.finish(queue.stream(), offsets.view()).unwrap();
        staged.1.finish(queue.stream(), row_token.view()).unwrap();
        staged.2.finish(queue.stream(), row_weight.view()).unwrap();
        staged.3.finish(queue.stream(), position.view()).unwrap();
        staged.4.finish(queue.stream(), counts.view()).unwrap();
        staged.5.finish(queue.stream(), tiles.view()).unwrap();

        let untouched = 0xa5a5_a5a5;
        let offsets = offsets.finish("expert_offsets");
        let rows = *offsets.last().unwrap() as usize;
        let mut token = row_token.finish("row_token");
        let mut weight: Vec<u32> = row_weight.finish("row_weight").iter().map(|w| w.to_bits()).collect();
        for rest in [token.split_off(rows), weight.split_off(rows)] {
            assert!(rest.iter().all(|x| *x == untouched), "rows behind the last one are written");
        }
        let (counts, tiles) = (counts.finish("tile_counts"), tiles.finish("tiles"));
        let lists = std::array::from_fn(|c| {
            let list = &tiles[c * 4 * max_tiles..][..4 * max_tiles];
            let (used, rest) = list.split_at(4 * counts[c] as usize);
            assert!(rest.iter().all(|x| *x == untouched), "tiles behind the last one are written");
            used.chunks_exact(4).map(|tile| [tile[0], tile[1], tile[2], tile[3]]).collect()
        });
        Sorted { offsets, token, weight, position: position.finish("position"), tiles: lists }
    }

    fn check(&self, driver: &dyn Driver, what: &str) {
        let (found, expected) = (self.run(driver), self.expected());
        let [experts, tokens] = [self.spec.num_local_experts, self.ids.len().checked_div(self.slots).unwrap_or(0)];
        let what = format!("{what}: {experts} experts, {tokens} tokens of {} slots", self.slots);
        assert_eq!(found.offsets, expected.offsets, "{what}");
        assert_eq!(found.position, expected.position, "{what}");
        assert!(found == expected, "{what}: rows {:?}, tiles {:?}", found.token, found.tiles);
    }
}

/// Sizes around lanes, warps, one CTA, one tile; experts around the words of the counts and the threads of the CTA.
#[test]
fn group_tokens_of_all_sizes() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(crate::common::seed());
        for tokens in [0, 1, 31, 32, 33, 511, 512, 513, 1023, 1024, 4095, 4096, 4097, 8192, 12289] {
            for experts in [1, 7, 8, 128] {
                SortCase::random(&mut rng, experts, 1, tokens).check(driver, "random");
            }
        }
        for experts in [2, 9, 31, 256, 511, 512, 513, 1023, 1024, 2048] {
            for (tokens, slots) in [(3, 1), (64, 8), (100, 7), (700, 6)] {
                SortCase::random(&mut rng, experts, slots, tokens).check(driver, "random");
            }
        }
        SortCase::random(&mut rng, 384, 4, 17500).check(driver, "random");
        SortCase::random(&mut rng, 8, 0, 5).check(driver, "no slots");
    });
}

#[test]
fn group_tokens_with_strides_and_rank_slices() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(crate::common::seed());
        for (tokens, slots) in [(1, 1), (40, 3), (640, 8)] {
            for layout in Layout::ALL {
                for (first, local) in [(0, 5), (17, 16), (63, 1), (40, 0)] {
                    let mut case = SortCase::random(&mut rng, 64, slots, tokens);
                    (case.spec.first_expert, case.spec.num_local_experts) = (first, local);
                    case.layout = layout;
                    case.check(driver, "slice");
                }
            }
        }
    });
}

/// Experts of every class of tiles, at the edges of the classes, between empty ones.
#[test]
fn group_tokens_tiles() {
    on_devices(true, |driver| {
        for sizes in [
            vec![0, 1, 15, 16, 17, 0, 31, 32, 33, 63, 64, 65, 127, 128, 129, 0],
            vec![65, 257, 16, 300, 0, 0, 1, 384],
            vec![0, 0, 4000],
            vec![5000, 0, 70, 4225, 31],
        ] {
            let mut ids: Vec<i32> = (0..).zip(&sizes).flat_map(|(e, n)| vec![e; *n]).collect();
            // Not in order of experts.
            for i in 0..ids.len() {
                ids.swap(i, (i * 7919 + 13) % (i + 1));
            }
            SortCase::new(sizes.len(), 1, ids).check(driver, &format!("{sizes:?}"));
        }
    });
}

/// vllm-project/vllm#39391, sgl-project/sglang#25852: padding must neither count nor be sorted; torchtitan#1166 and
/// Megatron-LM#3626: experts and ranks without tokens.
#[test]
fn group_tokens_skips_padding_and_garbage() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(crate::common::seed());
        for assignments in [320, 6000] {
            SortCase::new(128, 8, vec![-1; assignments]).check(driver, "all skipped");
            SortCase::new(128, 8, vec![77; assignments]).check(driver, "all on one expert");
            SortCase::new(1, 8, vec![0; assignments]).check(driver, "one expert");
            let mut padded = SortCase::random(&mut rng, 16, 8, assignments / 8);
            padded.ids[assignments / 2..].fill(-1);
            padded.check(driver, "padding at the end");
            for (first, local) in [(0, 3), (0x7FFF_FFF0, 15), (5, 1000)] {
                let ids = (0..assignments)
                    .map(|i| match i % 4 {
                        0 => [i32::MIN, i32::MAX, i32::MIN + 1, -2, 1 << 20][i / 4 % 5],
                        1 => first,
                        _ => rng.below(u32::MAX as usize) as u32 as i32,
                    })
                    .collect();
                let mut garbage = SortCase::new(i32::MAX as usize, 8, ids);
                (garbage.spec.first_expert, garbage.spec.num_local_experts) = (first as usize, local);
                garbage.check(driver, "garbage");
            }
        }
    });
}

/// Rows of ids and weights more than 2^31 elements apart, for one CTA and for several: offsets that do not fit 32 bits
/// (vllm-project/vllm#5938, #34086). Needs 35 GB on the device.
#[test]
fn group_tokens_of_far_rows() {
    on_large_devices(|driver| {
        let apart = (1_usize << 31) + 64;
        for slots in [8, 2100] {
            let case = SortCase::random(&mut Rng::new(crate::common::seed()), 12, slots, 3);
            let place = |bytes: &[u8]| {
                let buffer = Buffer::new(driver, (2 * apart + slots) * 4).unwrap();
                for (t, row) in bytes.chunks_exact(4 * slots).enumerate() {
                    // SAFETY: the buffer has room for three rows, and nothing runs.
                    unsafe { driver.copy_to_device(buffer.ptr() + (4 * t * apart) as u64, row).unwrap() };
                }
                buffer
            };
            let (ids, weights) = (place(bytemuck::cast_slice(&case.ids)), place(bytemuck::cast_slice(&case.weights)));
            let mut problem = case.problem();
            (problem.topk_ids_stride, problem.topk_weights_stride) = (apart, apart);
            let plan = GroupTokensPlan::new(&problem).unwrap();
            assert_eq!(plan.kernels().count(), if slots == 8 { 1 } else { 3 });
            let words = |len: usize| Buffer::new(driver, 4 * len).unwrap();
            let (assignments, offsets) = (problem.assignments(), words(13));
            let (token, weight, position) = (words(assignments), words(assignments), words(assignments));
            let (counts, tiles) = (words(4), words(16 * problem.max_tiles()));
            let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
            let args =
                GroupTokensArgs::new(ids.ptr(), offsets.ptr(), token.ptr(), position.ptr(), counts.ptr(), tiles.ptr())
                    .with_weights(weights.ptr(), weight.ptr())
                    .with_workspace(workspace.ptr());
            // SAFETY: the buffers hold the plan's arrays and outlive the reads below, which wait.
            unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
            let want = case.expected();
            assert_eq!(offsets.to_vec::<u32>(Stream::LEGACY).unwrap(), want.offsets, "{slots} slots");
            assert_eq!(position.to_vec::<u32>(Stream::LEGACY).unwrap(), want.position, "{slots} slots");
            for (i, row) in want.position.iter().enumerate().filter(|(_, row)| **row != GroupTokens::SKIPPED) {
                let mut found = [0u32; 1];
                // SAFETY: the address holds a weight, and nothing runs.
                unsafe {
                    driver
                        .copy_to_host(bytemuck::cast_slice_mut(&mut found), weight.ptr() + 4 * u64::from(*row))
                        .unwrap();
                }
                assert_eq!(found[0], case.weights[i].to_bits(), "{slots} slots: assignment {i}");
            }
        }
    });
}

/// The order is the same on every schedule, and for both sets of kernels.
#[test]
fn group_tokens_bits() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(crate::common::seed());
        let case = SortCase::random(&mut rng, 24, 8, 512);
        let first = case.run(driver);
        for _ in 0..3 {
            assert_eq!(case.run(driver), first);
        }
        // One more token of nobody makes it too large for one CTA.
        let mut more = SortCase::new(24, 8, case.ids.clone());
        more.ids.extend([-1; 8]);
        more.weights.extend([0.0; 8]);
        let more = more.run(driver);
        assert_eq!((&more.offsets, &more.token), (&first.offsets, &first.token));
        assert_eq!((&more.weight, &more.tiles), (&first.weight, &first.tiles));
        assert_eq!(more.position[..4096], first.position);
    });
}

/// Several rounds in one tile of the sort: above a million assignments.
#[test]
fn group_tokens_by_the_million() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(crate::common::seed());
        SortCase::random(&mut rng, 8, 8, 137_501).check(driver, "two rounds");
    });
    on_gpu(|driver| {
        let mut rng = Rng::new(crate::common::seed());
        for (experts, tokens) in [(8, 1 << 19), (256, 600_001), (1024, 1 << 20)] {
            SortCase::random(&mut rng, experts, 8, tokens).check(driver, "large");
        }
        SortCase::new(16, 1, vec![3; 5_000_000]).check(driver, "all on one expert");
    });
}

/// The one launch of a decode step stays as short as it is, and fits the smallest shared memory.
#[test]
fn group_tokens_counters() {
    let simulator = Simulator::with_limits(false, Limits::new(86, 84, 99 << 10));
    let count = |experts: usize, slots, tokens| {
        let mut rng = Rng::new(1);
        let ids = (0..tokens * slots).map(|_| rng.below(experts) as i32).collect();
        let case = SortCase::new(experts, slots, ids);
        case.check(&simulator, "counted");
        let counters = simulator.take_counters();
        let [(_, c)] = &counters[..] else { panic!("{} launches", counters.len()) };
        // Experts name the bank, here and there two of a warp the same.
        assert!(c.conflict_degree() < 1.6, "{}", c.conflict_degree());
        [c.instructions / 16, c.barriers / 16, c.global_requests]
    };
    // Instructions and barriers per warp, requests to global memory.
    assert_eq!(count(128, 8, 1), [304, 5, 17]);
    assert_eq!(count(128, 8, 64), [304, 5, 93]);
    assert_eq!(count(2048, 8, 512), [1384, 11, 773]);
}

/// 64 experts in turn, for one CTA and for several: no bank conflicts, arrays in whole sectors, once each; but the row of each assignment,
/// which lies anywhere, costs a sector for its token and one for its weight.
#[test]
fn group_tokens_sectors() {
    let simulator = Simulator::new(false);
    let count = |assignments: u64| {
        let ids = (0..assignments as i32).map(|i| i % 64).collect();
        SortCase::new(64, 8, ids).check(&simulator, "counted");
        let counters = simulator.take_counters();
        for (entry, c) in &counters {
            assert_eq!(c.conflict_degree(), 1.0, "{entry}");
        }
        counters.iter().map(|(_, c)| (c.instructions, c.global_sectors)).collect::<Vec<_>>()
    };
    // Ids, weights and positions; rows; offsets, a tile for each expert, counts of tiles.
    assert_eq!(count(512), [(4761, 3 * 64 + 2 * 512 + 9 + 64 / 2 + 4)]);
    // Four tiles of the sort with 64 counts each.
    let counts = 4 * 64 / 8;
    let [count, scan, scatter] = count(16384)[..] else { panic!("three launches") };
    assert_eq!(count, (12_968, 2048 + counts));
    assert_eq!(scan, (20_352, 3 * counts + 64 / 8));
    // As one CTA does, with two tiles for each expert; where each tile begins, and all totals for each tile.
    assert_eq!(scatter, (46_596, 3 * 2048 + 2 * 16384 + 9 + 2 * 64 / 2 + 4 + counts + 4 * 64 / 8));
}
