//! All features compose: every pair of values of two options of attention, routing and experts occurs in a generated table, and every
//! row of the table is computed by the reference and by a second, independent formula, and on every CPU level. Each test prints how
//! many of the possible pairs its table covers; pairs that no valid call has are checked to be refused.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod experts;
mod route;

use common::pairs::{Pairs, pairwise};

/// A value of an option: its name and what it changes.
type Value<C> = (&'static str, fn(&mut C));

/// Options of a call, each with its values.
pub(crate) struct Table<C> {
    pub options: Vec<(&'static str, Vec<Value<C>>)>,
}

impl<C: Clone> Table<C> {
    /// The call of a row.
    pub fn apply(&self, base: &C, row: &[usize]) -> C {
        let mut call = base.clone();
        for ((_, values), value) in self.options.iter().zip(row) {
            (values[*value].1)(&mut call);
        }
        call
    }

    pub fn describe(&self, row: &[usize]) -> String {
        let words: Vec<String> = self
            .options
            .iter()
            .zip(row)
            .map(|((name, values), value)| format!("{name}={}", values[*value].0))
            .collect();
        words.join(" ")
    }

    /// The table of rows; prints its coverage, which must be complete.
    pub fn rows(&self, what: &str, base: &C, valid: impl Fn(&C) -> bool) -> Pairs {
        let sizes: Vec<usize> = self.options.iter().map(|(_, values)| values.len()).collect();
        let pairs = pairwise(&sizes, 1, |row| valid(&self.apply(base, row)));
        println!(
            "{what}: {} calls cover {} of {} pairs of option values ({:.1} %); {} pairs exclude one another",
            pairs.rows.len(),
            pairs.covered,
            pairs.total,
            100.0 * pairs.covered as f64 / pairs.total as f64,
            pairs.impossible.len()
        );
        for ((a, x), (b, y)) in &pairs.impossible {
            let name = |o: usize, v: usize| format!("{}={}", self.options[o].0, self.options[o].1[v].0);
            println!("  excluded: {} with {}", name(*a, *x), name(*b, *y));
        }
        assert_eq!(pairs.covered, pairs.total);
        pairs
    }
}
