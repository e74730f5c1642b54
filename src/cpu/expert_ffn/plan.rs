//! How a call is cut into items, and the memory that it takes: a function of the sizes alone, not of the routing.

use super::packed::{PackedExperts, Panels};
use super::sort::{RawBlock, max_blocks, max_rows};
use crate::cpu::gemm::cache;
use crate::cpu::gemm::product::Product;
use crate::cpu::gemm::{Blocking, PANEL, block_tokens, panels_per_item};
use crate::cpu::parallel;
use crate::cpu::simd::Simd;
use crate::cpu::workspace::part_bytes;

/// Tokens that are computed together; a larger call goes through them in turn. With this many, weights are read often enough
/// to hide what reading them costs, and the workspace stays small.
pub const CHUNK_TOKENS: usize = 4096;

/// Experts and how many assignments they may get.
#[derive(Clone, Copy)]
pub struct Sizes<'a> {
    pub experts: &'a PackedExperts,
    /// Assignments per token.
    pub slots: usize,
}

/// The part of a plan that belongs to the routed experts, or to the shared one.
#[derive(Clone, Copy)]
pub struct GroupPlan {
    pub panels: Panels,
    /// Assignments at most.
    pub assignments: usize,
    pub max_blocks: usize,
    /// Steps of gate and up.
    pub up_steps: usize,
    /// Panels of gate and up in an item.
    pub up_panels: usize,
    /// Steps of down.
    pub down_steps: usize,
    /// Words of an inner row, and of all inner rows.
    pub inner_row: usize,
    pub inner_len: usize,
}

#[derive(Clone, Copy)]
pub struct Plan {
    /// Tokens of a chunk, at most.
    pub chunk: usize,
    /// Assignments in a block, at most.
    pub block: usize,
    /// Routed, shared.
    pub groups: [Option<GroupPlan>; 2],
    pub workers: usize,
    /// Panels of down in an item.
    pub down_panels: usize,
    /// Scratch of a worker: words of packed activations, sums of a block, sums of tokens.
    pub words_len: usize,
    pub sums_len: usize,
    pub totals_len: usize,
}

impl Plan {
    pub fn new<S: Simd, P: Product>(num_tokens: usize, hidden_size: usize, sizes: [Option<Sizes<'_>>; 2]) -> Plan {
        let chunk = num_tokens.min(CHUNK_TOKENS);
        // Whole tiles, so that the rows of a block start at its first assignment.
        let block = block_tokens(S::TILE_TOKENS).min(chunk.max(1).next_multiple_of(S::TILE_TOKENS));
        let workers = parallel::max_workers();
        let (mut words_len, mut sums_len) = (0, 0);
        // A pass over the tokens of an item adds into `chunk * columns` totals, which should stay in the second level cache, and
        // reads all inner rows.
        let fit = (cache::sizes().l2 / 2 / (chunk.max(1) * PANEL * 4)).clamp(1, 8);
        let down_panels = panels_per_item(hidden_size.div_ceil(PANEL), fit, 1, workers);
        let groups = sizes.map(|sizes| {
            let Sizes { experts, slots } = sizes?;
            let (ffn, num_experts) = (&experts.spec().ffn, experts.spec().num_local_experts);
            let panels = Panels::new(ffn);
            let assignments = chunk * slots;
            let (up_steps, down_steps) = (P::steps(ffn.hidden_size), P::steps(ffn.intermediate_size));
            let up_blocking = Blocking::new::<P>(S::TILE_TOKENS, block, up_steps);
            let down_blocking = Blocking::new::<P>(S::TILE_TOKENS, block, down_steps);
            let likely_blocks = max_blocks(num_experts, assignments, block);
            let up_panels = panels_per_item(panels.up, up_blocking.panels, likely_blocks, workers);
            words_len = words_len.max(up_blocking.words_len);
            sums_len = sums_len.max(up_blocking.sums_len(up_panels)).max(down_blocking.sums_len(down_panels));
            let inner_row = down_steps * P::A_WORDS;
            let max_rows = max_rows(num_experts, assignments, block);
            Some(GroupPlan {
                panels,
                assignments,
                max_blocks: max_blocks(num_experts, assignments, block),
                up_steps,
                up_panels,
                down_steps,
                inner_row,
                inner_len: max_rows * inner_row,
            })
        });
        Plan {
            chunk,
            block,
            groups,
            workers,
            down_panels,
            words_len: words_len.next_multiple_of(16),
            sums_len: sums_len.next_multiple_of(16),
            totals_len: chunk * down_panels * PANEL,
        }
    }

    /// What the parts below add up to, plus the sorted assignments.
    pub fn bytes(&self, num_experts: [usize; 2]) -> usize {
        let mut bytes = part_bytes::<u32>(self.workers * self.words_len)
            .saturating_add(part_bytes::<f32>(self.workers * self.sums_len))
            .saturating_add(part_bytes::<f32>(self.workers * self.totals_len));
        for (group, experts) in self.groups.iter().zip(num_experts) {
            if let Some(group) = group {
                bytes = bytes
                    .saturating_add(part_bytes::<u32>(experts + 1))
                    .saturating_add(2 * part_bytes::<u32>(group.assignments))
                    .saturating_add(part_bytes::<RawBlock>(group.max_blocks))
                    .saturating_add(part_bytes::<u32>(group.inner_len));
            }
        }
        bytes
    }
}
