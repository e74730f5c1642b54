//! One call as its items see it: the arguments, where results go, and which rows of which sequence a block has.

use super::scores::Buckets;
use crate::args::{AttentionInput, Sequence};
use crate::cpu::parallel::Shared;
use crate::spec::Attention;

/// What all items of a call share.
pub struct Problem<'a, T> {
    pub spec: &'a Attention,
    pub input: &'a AttentionInput<'a, T, f32>,
    /// Buckets of the relative bias, where the specification has one.
    pub buckets: Option<Buckets<'a>>,
    /// Values of all outputs, and their strides.
    pub out: Shared<'a, T>,
    pub out_strides: [usize; 3],
    pub lse: Option<(Shared<'a, f32>, [usize; 2])>,
}

impl<T> Problem<'_, T> {
    /// Whether scores are more than scaled dot products.
    pub fn has_terms(&self) -> bool {
        self.spec.softcap.is_some() || self.spec.alibi || self.input.bias.is_some() || self.buckets.is_some()
    }

    /// Whether there is something to add or hide for each pair of query and key.
    pub fn has_added(&self) -> bool {
        self.input.mask.is_some() || self.input.bias.is_some() || self.buckets.is_some()
    }
}

/// Consecutive query rows of one sequence and key/value head. Row `r` is the query of token `r / group_size` and of head
/// `r % group_size` of the group. Rows stand in panels of `width`, one row to a lane.
///
/// A narrow block has so few rows that they fit into one panel, and the same rows of several key/value heads, each with its
/// panel: a tile of all heads is contiguous memory where a tile of one is scattered.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub sequence: Sequence,
    pub kv_head: usize,
    /// Key/value heads; 0 if the block is not narrow, and has one.
    pub heads: usize,
    /// First row.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Lanes of a panel.
    pub width: usize,
}

impl Block {
    /// Number of panels; the last one may have lanes without a row.
    pub fn panels(&self) -> usize {
        if self.is_narrow() { self.heads } else { self.rows.div_ceil(self.width) }
    }

    /// Whether the panels are key/value heads.
    #[inline(always)]
    pub fn is_narrow(&self) -> bool {
        self.heads > 0
    }

    /// First row of a panel.
    pub fn panel_row(&self, panel: usize) -> usize {
        if self.is_narrow() { self.row } else { self.row + panel * self.width }
    }

    /// Rows of a panel.
    pub fn panel_rows(&self, panel: usize) -> usize {
        if self.is_narrow() { self.rows } else { (self.rows - panel * self.width).min(self.width) }
    }

    /// Token (within the sequence) and query head of lane `at % width` of panel `at / width`.
    pub fn token_and_head(&self, spec: &Attention, at: usize) -> (usize, usize) {
        let group = spec.group_size();
        let (kv_head, row) = match self.is_narrow() {
            true => (self.kv_head + at / self.width, self.row + at % self.width),
            false => (self.kv_head, self.row + at),
        };
        (row / group, kv_head * group + row % group)
    }

    /// Keys that the rows see by position lie in `first .. end`; empty if `first >= end`.
    pub fn keys(&self, spec: &Attention) -> (usize, usize) {
        let group = spec.group_size();
        // Both ends of the range never fall from one query to the next.
        let first = self.sequence.visible_rows(spec, self.row / group);
        let last = self.sequence.visible_rows(spec, (self.row + self.rows - 1) / group);
        (first.start, last.end)
    }
}
