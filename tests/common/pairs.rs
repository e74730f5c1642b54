//! Pairwise tables: few cases in which every pair of values of two options occurs.

use super::data::Rng;
use std::collections::BTreeSet;

/// Options `0 .. sizes.len()`; option `i` takes the values `0 .. sizes[i]`. A row has one value per option.
pub struct Pairs {
    pub rows: Vec<Vec<usize>>,
    pub covered: usize,
    /// Pairs that some valid row has.
    pub total: usize,
    /// Pairs `((option, value), (option, value))` that no valid row has.
    pub impossible: Vec<Pair>,
}

pub type Pair = ((usize, usize), (usize, usize));

fn pairs_of(row: &[usize]) -> impl Iterator<Item = Pair> {
    (0..row.len()).flat_map(move |a| (a + 1..row.len()).map(move |b| ((a, row[a]), (b, row[b]))))
}

/// A greedy table. Rows that `valid` refuses are never taken; pairs that occur in no valid row are reported as impossible, after
/// a search around each of them.
pub fn pairwise(sizes: &[usize], seed: u64, valid: impl Fn(&[usize]) -> bool) -> Pairs {
    let mut rng = Rng::new(seed);
    let mut open: BTreeSet<Pair> = BTreeSet::new();
    for a in 0..sizes.len() {
        for b in a + 1..sizes.len() {
            for x in 0..sizes[a] {
                open.extend((0..sizes[b]).map(|y| ((a, x), (b, y))));
            }
        }
    }
    let all = open.len();
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut impossible = Vec::new();
    while let Some(first) = open.iter().next().copied() {
        let ((a, x), (b, y)) = first;
        // Of many random rows with this pair, the valid one that covers the most open pairs.
        let mut best: Option<(usize, Vec<usize>)> = None;
        for attempt in 0..4000 {
            let mut row: Vec<usize> = sizes.iter().map(|n| rng.below(*n)).collect();
            (row[a], row[b]) = (x, y);
            if !valid(&row) {
                continue;
            }
            let gain = pairs_of(&row).filter(|p| open.contains(p)).count();
            if best.as_ref().is_none_or(|(most, _)| gain > *most) {
                best = Some((gain, row));
            }
            if attempt > 150 && best.is_some() {
                break;
            }
        }
        match best {
            Some((_, row)) => {
                pairs_of(&row).for_each(|p| {
                    open.remove(&p);
                });
                rows.push(row);
            }
            None => {
                open.remove(&first);
                impossible.push(first);
            }
        }
    }
    // Count again from the rows alone.
    let covered = rows.iter().flat_map(|row| pairs_of(row)).collect::<BTreeSet<_>>().len();
    Pairs { rows, covered, total: all - impossible.len(), impossible }
}
