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
#[derive(Clone, Copy, Debug)]
pub struct Block {
    pub sequence: Sequence,
    pub kv_head: usize,
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
        self.rows.div_ceil(self.width)
    }

    /// Rows of a panel.
    pub fn panel_rows(&self, panel: usize) -> usize {
        (self.rows - panel * self.width).min(self.width)
    }

    /// Token (within the sequence) and query head of row `row + at`.
    pub fn token_and_head(&self, spec: &Attention, at: usize) -> (usize, usize) {
        let group = spec.group_size();
        let row = self.row + at;
        (row / group, self.kv_head * group + row % group)
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
