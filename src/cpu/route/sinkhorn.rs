//! Sinkhorn's iteration on the logits of all tokens (see [`crate::spec::Selection::Sinkhorn`]).
//!
//! The balanced values decide, so every sum is taken in f64 and in the order of the formula: over experts for a token, over
//! tokens for an expert. Tokens are independent in the first, experts in the second.

use super::exact;
use crate::args::RouteInput;
use crate::cpu::level::Level;
use crate::cpu::parallel::{self, Shared};
use crate::cpu::rows::{RowKernel, for_rows, rows_per_item};
use crate::cpu::simd::Simd;
use crate::cpu::workspace::{Carver, part_bytes};
use std::ops::Range;

/// `row[t] * c[t, e] * col[e]`
pub struct Balanced<'a> {
    /// `[num_tokens, num_experts]`
    c: &'a [f64],
    row: &'a [f64],
    col: &'a [f64],
}

impl Balanced<'_> {
    /// The values of one token, rounded to f32.
    #[inline(always)]
    pub fn values(&self, token: usize, out: &mut [f32]) {
        let c = &self.c[token * self.col.len()..][..self.col.len()];
        for ((out, c), col) in out.iter_mut().zip(c).zip(self.col) {
            *out = (self.row[token] * c * col) as f32;
        }
    }
}

/// Workspace of [`balance`].
pub fn workspace_bytes(num_experts: usize, num_tokens: usize) -> usize {
    part_bytes::<f64>(num_tokens.saturating_mul(num_experts))
        .saturating_add(part_bytes::<f64>(num_tokens))
        .saturating_add(part_bytes::<f64>(num_experts))
}

/// Runs the iterations over the unmasked tokens.
pub fn balance<'a>(level: Level, carver: &mut Carver<'a>, input: &RouteInput<'_>, iterations: usize) -> Balanced<'a> {
    let [num_tokens, num_experts] = input.logits.shape();
    let c = carver.part::<f64>(num_tokens * num_experts);
    let row = carver.part::<f64>(num_tokens);
    let col = carver.part::<f64>(num_experts);
    row.fill(1.0);
    col.fill(1.0);
    let is_live = |t: usize| input.token_mask.is_none_or(|mask| mask[t] != 0);
    let live = (0..num_tokens).filter(|t| is_live(*t)).count() as f64;
    let per_item = rows_per_item(8 * num_experts);

    {
        let c = Shared::new(&mut *c);
        parallel::run(num_tokens.div_ceil(per_item), |_, item| {
            for t in item * per_item..num_tokens.min((item + 1) * per_item) {
                let logits = input.logits.row(&[t]);
                let max = exact::max(logits.iter().map(|l| f64::from(*l)));
                // SAFETY: every token belongs to one item.
                let c = unsafe { c.part(t * num_experts, num_experts) };
                for (c, l) in c.iter_mut().zip(logits) {
                    *c = exact::exp_below(f64::from(*l), max);
                }
            }
        });
    }
    for _ in 0..iterations {
        {
            let row = Shared::new(&mut *row);
            let (c, col) = (&*c, &*col);
            parallel::run(num_tokens.div_ceil(per_item), |_, item| {
                for t in (item * per_item..num_tokens.min((item + 1) * per_item)).filter(|t| is_live(*t)) {
                    let c = &c[t * num_experts..][..num_experts];
                    let sum: f64 = col.iter().zip(c).map(|(col, c)| col * c).sum();
                    // SAFETY: every token belongs to one item.
                    let row = unsafe { row.part(t, 1) };
                    row[0] = 1.0 / (live * (sum + 1e-8));
                }
            });
        }
        let kernel = Columns { c, row, col: Shared::new(&mut *col), is_live: &is_live, num_experts };
        for_rows(level, num_experts, EXPERTS, &kernel);
    }
    Balanced { c, row, col }
}

/// Experts whose sums run side by side: one load of a row serves a cache line of them.
const EXPERTS: usize = 8;

struct Columns<'a, F> {
    c: &'a [f64],
    row: &'a [f64],
    col: Shared<'a, f64>,
    is_live: &'a F,
    num_experts: usize,
}

impl<F: Fn(usize) -> bool + Sync> RowKernel for Columns<'_, F> {
    #[inline(always)]
    fn eval<S: Simd>(&self, _: S, _: usize, experts: Range<usize>) {
        let mut sums = [0.0; EXPERTS];
        for (t, row) in self.row.iter().enumerate() {
            if (self.is_live)(t) {
                let c = &self.c[t * self.num_experts..][experts.clone()];
                for (sum, c) in sums.iter_mut().zip(c) {
                    *sum += row * c;
                }
            }
        }
        // SAFETY: every expert belongs to one item.
        let col = unsafe { self.col.part(experts.start, experts.len()) };
        for (col, sum) in col.iter_mut().zip(sums) {
            *col = 1.0 / (self.num_experts as f64 * (sum + 1e-8));
        }
    }
}
