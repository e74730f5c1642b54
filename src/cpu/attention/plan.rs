//! How a call is cut into items, and the memory that takes. Nothing here changes a result: only who computes what, and where.
//!
//! A block has consecutive rows of one sequence and key/value head; more rows to a block share the packing of keys and values.
//! Where blocks are too few or too unequal for the threads, a block's keys are divided too, at multiples of [`SPLIT`]: its
//! items leave partial results, and the item that finishes last folds them in order.

use super::narrow;
use super::problem::Block;
use super::product::COLUMNS;
use super::softmax::Partial;
use super::{MAX_PANELS, SPLIT, TILE};
use crate::args::{AttentionInput, AttentionShape};
use crate::spec::Attention;

/// Sizes that depend on the specification, the level, the threads and the shape of a call.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    threads: usize,
    lanes: usize,
    /// Most rows of a narrow block.
    narrow_rows: usize,
    /// Most panels of a block.
    panels: usize,
    /// Most key/value heads of a narrow block.
    heads: usize,
    /// Values of a packed key row, or of a packed query.
    pub key_width: usize,
    /// Columns of a value tile.
    pub columns: usize,
    /// Whether workers need room for added terms.
    has_added: bool,
    /// Upper bounds.
    pub max_items: usize,
    pub max_counters: usize,
    pub max_partials: usize,
}

/// What a call has besides its shape, as far as memory depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    pub lanes: usize,
    /// Neighbours in one value of a packed row.
    pub depth: usize,
    /// Most rows of a narrow block.
    pub narrow_rows: usize,
    pub threads: usize,
    pub has_added: bool,
}

/// One unit of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Item {
    /// Work, for the order.
    cost: u64,
    row: u64,
    rows: u64,
    /// Where the partial results of the block start, if its keys are divided.
    pub partials: u64,
    sequence: u32,
    kv_head: u32,
    /// Parts of the keys that the item has: part `p` is `p * SPLIT .. (p + 1) * SPLIT`.
    pub first_part: u32,
    pub end_part: u32,
    /// Parts of the whole block.
    pub first_of_block: u32,
    pub end_of_block: u32,
    /// Items of the block that are not finished are counted here.
    pub counter: u32,
    /// 1 if the keys are divided among items.
    divided: u16,
    /// Key/value heads of a narrow block, else 0.
    heads: u16,
}

// SAFETY: plain integers; 4 * 8 + 7 * 4 + 2 * 2 bytes without padding, in C order.
unsafe impl bytemuck::Zeroable for Item {}
// SAFETY: as above; every bit pattern is a value.
unsafe impl bytemuck::Pod for Item {}

impl Item {
    /// Whether other items have the rest of the block's keys.
    pub fn is_divided(&self) -> bool {
        self.divided != 0
    }

    /// The block that this is (a part of).
    pub fn block<T, S: Copy>(&self, plan: &Plan, input: &AttentionInput<'_, T, S>) -> Block {
        let rows = self.rows as usize;
        Block {
            sequence: input.sequence(self.sequence as usize),
            kv_head: self.kv_head as usize,
            heads: self.heads as usize,
            row: self.row as usize,
            rows,
            width: plan.width(rows),
        }
    }
}

impl Plan {
    pub fn new(spec: &Attention, shape: &AttentionShape, costs: Costs) -> Self {
        let Costs { lanes, depth, narrow_rows, threads, has_added } = costs;
        let (key_width, columns) = (spec.head_dim.div_ceil(depth), spec.value_dim.next_multiple_of(COLUMNS));
        let group = spec.group_size();
        let width = 2 * lanes;
        let most = shape.max_q_len.saturating_mul(group).div_ceil(width).clamp(1, MAX_PANELS);
        let all_rows = shape.num_tokens.saturating_mul(group);
        let bytes = |panels: usize| panels * width * 4 * (key_width + 2 * columns);
        let mut panels = most;
        // Queries and results stay in the second-level cache (half of 1 MiB), and every thread gets some blocks.
        while panels > 1
            && (bytes(panels) > 512 << 10
                || (threads > 1 && all_rows.div_ceil(panels * width) * spec.num_kv_heads < 8 * threads))
        {
            panels = panels.div_ceil(2);
        }
        let parts = shape.max_kv_len.div_ceil(SPLIT).max(1);
        // Heads of a narrow block: as many as leave every thread some items.
        let mut heads = spec.num_kv_heads.clamp(1, MAX_PANELS);
        let units = shape.num_seqs.saturating_mul(parts);
        while heads > 1
            && (bytes(heads.div_ceil(2)) > 512 << 10
                || (threads > 1 && units.saturating_mul(spec.num_kv_heads.div_ceil(heads)) < 4 * threads))
        {
            heads = heads.div_ceil(2);
        }
        let blocks = (all_rows.div_ceil(panels * width) + shape.num_seqs).saturating_mul(spec.num_kv_heads);
        // Blocks are divided only if they have more than 1 / (4 threads) of the work: there are fewer than 4 threads of them.
        let divided = if threads > 1 { blocks.min(4 * threads) } else { 0 };
        Plan {
            threads,
            lanes,
            narrow_rows,
            panels,
            heads,
            key_width,
            columns,
            has_added,
            max_items: blocks.saturating_add(divided.saturating_mul(parts)),
            max_counters: divided,
            max_partials: divided
                .saturating_mul(parts)
                .saturating_mul(panels.max(heads.div_ceil(2)) * Partial::len(width, columns)),
        }
    }

    /// Lanes of the panels of a block with so many rows.
    pub fn width(&self, rows: usize) -> usize {
        if rows <= self.lanes { self.lanes } else { 2 * self.lanes }
    }

    /// Words of scratch memory for each worker, a multiple of a cache line.
    pub fn scratch_words(&self) -> usize {
        let width = 2 * self.lanes;
        let panels = self.panels.max(self.heads.div_ceil(2)); // those of a narrow block have half the width
        let added = if self.has_added { panels * TILE * width } else { 0 };
        let narrow = self.columns + self.heads * narrow::ROWS * narrow::padded_columns(self.columns);
        let each = self.key_width * width + 2 * Partial::len(width, self.columns);
        // Scores and decay: of one panel, or of all heads of a narrow block.
        let scores = (TILE + 1) * (2 * self.lanes).max(self.heads * self.lanes);
        let words = TILE * (self.key_width + self.columns)
            + scores
            + added
            + panels * each
            + self.lanes * self.columns
            + narrow;
        words.next_multiple_of(16)
    }

    /// Calls `add` for every block, with the keys that it sees.
    fn for_each_block<T, S: Copy>(
        &self,
        spec: &Attention,
        input: &AttentionInput<'_, T, S>,
        shape: &AttentionShape,
        mut add: impl FnMut(Block, (usize, usize)),
    ) {
        let block_rows = self.panels * 2 * self.lanes;
        for index in 0..shape.num_seqs {
            let sequence = input.sequence(index);
            let all = sequence.q_len * spec.group_size();
            let is_narrow = all <= self.narrow_rows;
            let step = if is_narrow { self.heads } else { 1 };
            for row in (0..all).step_by(block_rows) {
                let rows = (all - row).min(block_rows);
                let width = self.width(rows);
                for kv_head in (0..spec.num_kv_heads).step_by(step) {
                    let heads = if is_narrow { step.min(spec.num_kv_heads - kv_head) } else { 0 };
                    let block = Block { sequence, kv_head, heads, row, rows, width };
                    let (first, end) = block.keys(spec);
                    add(block, (first, end.max(first)));
                }
            }
        }
    }

    /// Fills `items`, longest first, and tells how many there are; `counters` gets the number of items of each divided block.
    pub fn fill<T, S: Copy>(
        &self,
        spec: &Attention,
        input: &AttentionInput<'_, T, S>,
        shape: &AttentionShape,
        items: &mut [Item],
        counters: &mut [u32],
    ) -> usize {
        let cost = |block: &Block, (first, end): (usize, usize)| {
            ((end - first).div_ceil(TILE) * block.panels() * block.width) as u64 + 1
        };
        let mut total = 0;
        self.for_each_block(spec, input, shape, |block, keys| total += cost(&block, keys));
        let (mut count, mut divided, mut partials) = (0, 0, 0);
        self.for_each_block(spec, input, shape, |block, (first, end)| {
            let cost = cost(&block, (first, end));
            let first_part = first / SPLIT;
            let end_part = if first < end { end.div_ceil(SPLIT) } else { first_part };
            let parts = end_part - first_part;
            let mut item = Item {
                cost,
                row: block.row as u64,
                rows: block.rows as u64,
                partials: 0,
                sequence: block.sequence.index as u32,
                kv_head: block.kv_head as u32,
                first_part: first_part as u32,
                end_part: end_part as u32,
                first_of_block: first_part as u32,
                end_of_block: end_part as u32,
                counter: 0,
                divided: 0,
                heads: block.heads as u16,
            };
            let threads = self.threads as u64;
            if self.threads > 1 && parts > 1 && cost * 4 * threads > total {
                // The first tile of an item was not asked for ahead; with several heads that is more to wait for. Where there is
                // but one block, every thread gets one piece, and memory is read in as many streams.
                let pieces_each = match block.heads {
                    0 | 1 => 8,
                    _ if cost == total => 1,
                    _ => 4,
                };
                let pieces = (cost * pieces_each * threads).div_ceil(total).min(parts as u64) as usize;
                let parts_each = parts.div_ceil(pieces);
                item.counter = divided as u32;
                item.divided = 1;
                item.partials = partials as u64;
                item.cost = cost / pieces as u64;
                for part in (first_part..end_part).step_by(parts_each) {
                    item.first_part = part as u32;
                    item.end_part = (part + parts_each).min(end_part) as u32;
                    items[count] = item;
                    count += 1;
                }
                counters[divided] = parts.div_ceil(parts_each) as u32;
                divided += 1;
                partials += parts * block.panels() * Partial::len(block.width, self.columns);
            } else {
                items[count] = item;
                count += 1;
            }
        });
        debug_assert!(partials <= self.max_partials);
        if self.threads > 1 {
            items[..count].sort_unstable_by_key(|item| std::cmp::Reverse(item.cost));
        }
        count
    }
}
