//! Assignments in expert order: a stable counting sort, and the blocks that it falls into.

use crate::args::Routing;
use crate::cpu::gemm::padded_rows;
use crate::spec::ExpertFfn;
use std::ops::Range;

/// Up to a block's worth of assignments of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Local expert.
    pub expert: usize,
    /// First assignment, in expert order.
    pub first: usize,
    /// Assignments.
    pub len: usize,
    /// First row of the padded rows of all blocks.
    pub row: usize,
}

/// A [`Block`] as the workspace holds it.
pub type RawBlock = [u32; 4];

impl Block {
    pub fn to_raw(self) -> RawBlock {
        [self.expert as u32, self.first as u32, self.len as u32, self.row as u32]
    }

    pub fn from_raw(raw: RawBlock) -> Block {
        let [expert, first, len, row] = raw.map(|x| x as usize);
        Block { expert, first, len, row }
    }
}

/// Blocks that `assignments` assignments of `experts` experts fall into at most.
pub fn max_blocks(experts: usize, assignments: usize, block: usize) -> usize {
    assignments / block + experts.min(assignments)
}

/// Padded rows of those blocks at most: a block has one row of padding at most.
pub fn max_rows(experts: usize, assignments: usize, block: usize) -> usize {
    assignments + max_blocks(experts, assignments, block)
}

/// Sorts the assignments of some tokens by local expert, stably: by token, then by slot. Ids of others are left out.
///
/// `offsets`: room for `num_local_experts + 1`; `tokens` (counted from the first of the range) and `weights`: room for all
/// assignments. Gives the number of assignments.
pub fn sort_assignments(
    spec: &ExpertFfn,
    routing: &Routing<'_, f32>,
    range: Range<usize>,
    offsets: &mut [u32],
    tokens: &mut [u32],
    weights: &mut [f32],
) -> usize {
    offsets.fill(0);
    for t in range.clone() {
        for id in routing.topk_ids.row(&[t]) {
            if let Some(expert) = spec.local_expert(*id) {
                offsets[expert] += 1;
            }
        }
    }
    // Each expert's place to write next; after the pass it is where the next expert starts.
    let mut total = 0;
    for offset in offsets.iter_mut() {
        let count = *offset;
        *offset = total;
        total += count;
    }
    for t in range.clone() {
        for (id, weight) in routing.topk_ids.row(&[t]).iter().zip(routing.topk_weights.row(&[t])) {
            if let Some(expert) = spec.local_expert(*id) {
                let at = offsets[expert] as usize;
                offsets[expert] += 1;
                tokens[at] = (t - range.start) as u32;
                weights[at] = *weight;
            }
        }
    }
    for expert in (1..offsets.len()).rev() {
        offsets[expert] = offsets[expert - 1];
    }
    offsets[0] = 0;
    total as usize
}

/// Cuts sorted assignments into blocks of at most `block`; experts without any have none. Gives the number of blocks.
pub fn cut_blocks(tile_tokens: usize, block: usize, offsets: &[u32], blocks: &mut [RawBlock]) -> usize {
    let (mut count, mut row) = (0, 0);
    for (expert, ends) in offsets.windows(2).enumerate() {
        let (start, end) = (ends[0] as usize, ends[1] as usize);
        for first in (start..end).step_by(block) {
            let len = block.min(end - first);
            blocks[count] = Block { expert, first, len, row }.to_raw();
            count += 1;
            row += padded_rows(tile_tokens, len);
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, Ffn};
    use crate::view::View;

    #[test]
    fn sorted_by_expert_token_slot() {
        let mut spec = ExpertFfn::new(6, Ffn::gated(1, 1, Activation::Silu));
        (spec.first_expert, spec.num_local_experts) = (1, 4);
        let ids = [3, 1, 2, -1, 0, 3, 5, 2, i32::MIN, 3, 3, i32::MAX];
        let weights: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let routing = Routing::new(View::new(&ids, [6, 2]), View::new(&weights, [6, 2]));
        let (mut offsets, mut tokens, mut sorted) = ([9; 5], [9; 12], [9.0; 12]);
        let n = sort_assignments(&spec, &routing, 0..6, &mut offsets, &mut tokens, &mut sorted);
        assert_eq!(n, 7);
        assert_eq!(offsets, [0, 1, 3, 7, 7]);
        assert_eq!(tokens[..n], [0, 1, 3, 0, 2, 4, 5]);
        assert_eq!(sorted[..n], [1.0, 2.0, 7.0, 0.0, 5.0, 9.0, 10.0]);
        let n = sort_assignments(&spec, &routing, 2..4, &mut offsets, &mut tokens, &mut sorted);
        assert_eq!((n, offsets), (2, [0, 0, 1, 2, 2]));
        assert_eq!(tokens[..n], [1, 0]);
    }

    #[test]
    fn blocks() {
        let mut raw = [[0; 4]; 16];
        let n = cut_blocks(4, 8, &[0, 0, 5, 21, 22], &mut raw);
        let blocks: Vec<Block> = raw[..n].iter().map(|b| Block::from_raw(*b)).collect();
        let block = |expert, first, len, row| Block { expert, first, len, row };
        assert_eq!(blocks, [block(1, 0, 5, 0), block(2, 5, 8, 5), block(2, 13, 8, 13), block(3, 21, 1, 21)]);
        assert!(n <= max_blocks(4, 22, 8));
    }
}
