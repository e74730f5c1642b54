//! Options of a call, each with its values, and tables of calls in which every pair of values of two options occurs.

pub mod experts;
pub mod mixture;
pub mod route;

use super::pairs::{Pairs, pairwise};
use std::rc::Rc;

/// A value of an option: its name and what it changes.
type Value<C> = (&'static str, Rc<dyn Fn(&mut C)>);

/// Options of a call, each with its values.
pub struct Table<C> {
    pub options: Vec<(&'static str, Vec<Value<C>>)>,
}

/// An option as it is written down: its name and its values.
pub type Written<C> = (&'static str, Vec<(&'static str, fn(&mut C))>);

impl<C: Clone + 'static> Table<C> {
    pub fn new(options: Vec<Written<C>>) -> Self {
        let value = |(name, change): (&'static str, fn(&mut C))| -> Value<C> { (name, Rc::new(change)) };
        let option = |(name, values): Written<C>| (name, values.into_iter().map(value).collect());
        Table { options: options.into_iter().map(option).collect() }
    }

    /// The same options of a part of another call.
    pub fn of<D: Clone + 'static>(self, part: fn(&mut D) -> &mut C) -> Table<D> {
        let value = |(name, change): Value<C>| -> Value<D> { (name, Rc::new(move |call: &mut D| change(part(call)))) };
        let option = |(name, values): (_, Vec<Value<C>>)| (name, values.into_iter().map(value).collect());
        Table { options: self.options.into_iter().map(option).collect() }
    }

    /// The options of both.
    pub fn and(mut self, other: Self) -> Self {
        self.options.extend(other.options);
        self
    }

    /// The options but these.
    pub fn without(mut self, names: &[&str]) -> Self {
        self.options.retain(|(name, _)| !names.contains(name));
        self
    }

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

    /// The table of rows, another one for each seed; prints its coverage, which must be complete.
    pub fn rows(&self, what: &str, base: &C, seed: u64, valid: impl Fn(&C) -> bool) -> Pairs {
        let sizes: Vec<usize> = self.options.iter().map(|(_, values)| values.len()).collect();
        let pairs = pairwise(&sizes, seed, |row| valid(&self.apply(base, row)));
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
