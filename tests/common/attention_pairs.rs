//! Every pair of values of two options of attention: from the rows of a pairwise table to the options of a call.

use super::attention_case::{Alibi, AttentionOptions, DenseBias, DenseMask, KvLayout, Sinks};
use super::buffer::Layout;
use super::pairs::pairwise;
use super::seed;

/// The values that a backend's tests choose for themselves; all other options have the same ones everywhere.
pub struct AttentionPairs<'a> {
    /// Query heads, key/value heads.
    pub heads: &'a [(usize, usize)],
    /// Width of keys, of values.
    pub dims: &'a [(usize, usize)],
    /// Length of queries and keys of each sequence.
    pub lens: &'a [&'a [(usize, usize)]],
    /// The widest window on the left.
    pub window_left: usize,
    /// Rows of a page, besides 16.
    pub page: usize,
    /// Whether sinks are an option of the table; else they take turns.
    pub sinks: bool,
}

impl AttentionPairs<'_> {
    /// The options of row `i`.
    fn options(&self, i: usize, row: &[usize]) -> AttentionOptions {
        let mut options = AttentionOptions::new(self.heads[row[14]], 0, self.lens[row[15]]);
        options.dims = self.dims[row[13]];
        options.scale = [None, Some(0.7), Some(0.02)][row[0]];
        options.mask.causal = row[1] == 1;
        options.mask.window_left = [None, Some(0), Some(5), Some(self.window_left)][row[2]];
        options.mask.window_right = [None, Some(0), Some(33)][row[3]];
        options.mask.chunk = [None, Some(7), Some(64)][row[4]];
        options.softcap = [None, Some(2.0), Some(30.0)][row[5]];
        options.bias = [DenseBias::None, DenseBias::PerHead, DenseBias::PerKey][row[6]];
        options.dense_mask = [DenseMask::None, DenseMask::Full, DenseMask::PerKey][row[7]];
        options.alibi = [Alibi::None, Alibi::Distance, Alibi::Positions][row[8]];
        options.relative_bias = [None, Some(false), Some(true)][row[9]];
        options.kv = [KvLayout::Ragged, KvLayout::Cache, KvLayout::Paged(16), KvLayout::Paged(self.page)][row[10]];
        options.left_padding = row[11] == 1;
        options.starts = row[12] == 1;
        // Layouts take turns, within those of the sinks where these do.
        let (sinks, turn) = if self.sinks { (row[16], i) } else { (i % 3, i / 3) };
        options.sinks = [Sinks::None, Sinks::Finite, Sinks::WithMinusInf][sinks];
        options.layout = Layout::ALL[turn % 3];
        options
    }

    /// Runs a check, which takes a seed besides, on the options of every row of so many tables, each with other rows. All pairs must be
    /// in each.
    pub fn check(&self, tables: u64, mut check: impl FnMut(&AttentionOptions, u64)) {
        let seed = seed();
        (0..tables).for_each(|table| self.check_table(seed + 1000 * table, &mut check));
    }

    fn check_table(&self, seed: u64, mut check: impl FnMut(&AttentionOptions, u64)) {
        let mut sizes = vec![3, 2, 4, 3, 3, 3, 3, 3, 3, 3, 4, 2, 2];
        sizes.extend([self.dims.len(), self.heads.len(), self.lens.len()]);
        sizes.extend(self.sinks.then_some(3));
        let table = pairwise(&sizes, seed, |_| true);
        for (i, row) in table.rows.iter().enumerate() {
            check(&self.options(i, row), seed + i as u64);
        }
        println!("pairs of options: {} / {} in {} cases", table.covered, table.total, table.rows.len());
        assert_eq!(table.covered, table.total);
    }
}
