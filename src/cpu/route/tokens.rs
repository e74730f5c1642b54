//! Tokens that choose their experts, each by itself and in parallel.

use super::select::{self, Room, Values};
use super::sinkhorn::Balanced;
use super::{counts_len, drops, exact, exp};
use crate::args::{RouteInput, RouteOutput};
use crate::cpu::level::Level;
use crate::cpu::parallel::{self, Shared};
use crate::cpu::rows::{RowKernel, SharedView, for_rows};
use crate::cpu::simd::Simd;
use crate::cpu::workspace::{Carver, part_bytes};
use crate::spec::{Renormalize, Router, Score, Selection};
use std::ops::Range;

/// Tokens that an item takes: some 10 us.
fn tokens_per_item(spec: &Router) -> usize {
    (16_384 / (spec.num_experts.saturating_add(8 * spec.top_k))).clamp(8, 256)
}

/// What a worker needs: room for choosing, then selected scores, largest logits and sums of the tokens of an item.
struct Layout {
    room: usize,
    slots: usize,
    tokens: usize,
}

impl Layout {
    fn new(spec: &Router) -> Self {
        let tokens = tokens_per_item(spec);
        Layout { room: Room::len_f64(spec), slots: tokens.saturating_mul(spec.top_k), tokens }
    }

    fn len_f64(&self) -> usize {
        self.room.saturating_add(self.slots).saturating_add(2 * self.tokens).saturating_add(7) / 8 * 8
    }

    fn len_f32(spec: &Router) -> usize {
        Room::len_f32(spec).saturating_add(15) / 16 * 16
    }
}

/// Workspace of [`choose`].
pub fn workspace_bytes(spec: &Router, num_tokens: usize) -> usize {
    let workers = parallel::workers_for(num_tokens.div_ceil(tokens_per_item(spec)));
    part_bytes::<f64>(workers.saturating_mul(Layout::new(spec).len_f64()))
        .saturating_add(part_bytes::<f32>(workers.saturating_mul(Layout::len_f32(spec))))
}

/// Writes ids and, where nothing is dropped later, weights and counts; else the exact scores, `[num_tokens, top_k]`.
#[allow(clippy::too_many_arguments)]
pub fn choose(
    level: Level,
    carver: &mut Carver<'_>,
    spec: &Router,
    input: &RouteInput<'_>,
    balanced: Option<&Balanced<'_>>,
    scores: Option<&mut [f64]>,
    output: &mut RouteOutput<'_>,
    counts: &mut [u32],
) {
    let num_tokens = input.logits.shape()[0];
    let per_item = tokens_per_item(spec);
    let workers = parallel::workers_for(num_tokens.div_ceil(per_item));
    let layout = Layout::new(spec);
    let kernel = Tokens {
        spec,
        input,
        values: Values::new(spec, input.selection_bias),
        balanced,
        // Prototypes: a softmax over each group. The mixer: weights of its own.
        by_formula: drops(spec)
            || matches!(spec.selection, Selection::SparseMixer { .. })
            || (spec.selection == Selection::Prototypes && spec.score == Score::Softmax),
        ids: SharedView::new(&mut output.topk_ids),
        weights: SharedView::new(&mut output.topk_weights),
        scores: scores.map(Shared::new),
        counts: Shared::new(counts),
        f64s: Shared::new(carver.part(workers * layout.len_f64())),
        f32s: Shared::new(carver.part(workers * Layout::len_f32(spec))),
        layout,
    };
    for_rows(level, num_tokens, per_item, &kernel);
}

struct Tokens<'a, 'b> {
    spec: &'a Router,
    input: &'a RouteInput<'b>,
    values: Values<'a>,
    balanced: Option<&'a Balanced<'a>>,
    /// Scores by the textbook formulas, token by token.
    by_formula: bool,
    ids: SharedView<'a, i32, 2>,
    weights: SharedView<'a, f32, 2>,
    scores: Option<Shared<'a, f64>>,
    counts: Shared<'a, u32>,
    f64s: Shared<'a, f64>,
    f32s: Shared<'a, f32>,
    layout: Layout,
}

impl RowKernel for Tokens<'_, '_> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, worker: usize, tokens: Range<usize>) {
        let (spec, k) = (self.spec, self.spec.top_k);
        let (len64, len32, counts) = (self.layout.len_f64(), Layout::len_f32(spec), counts_len(spec.num_experts));
        // SAFETY: no two items with the same worker overlap in time.
        let (f64s, f32s, counts) = unsafe {
            (
                self.f64s.part(worker * len64, len64),
                self.f32s.part(worker * len32, len32),
                self.counts.part(worker * counts, spec.num_experts),
            )
        };
        let (room64, rest) = f64s.split_at_mut(self.layout.room);
        let (selected, rest) = rest.split_at_mut(self.layout.slots);
        let (largest, sums) = rest.split_at_mut(self.layout.tokens);
        let selected = &mut selected[..tokens.len() * k];
        let mut room = Room::new(spec, room64, f32s);
        let needs_sum = self.needs_sum();

        for (i, t) in tokens.clone().enumerate() {
            // SAFETY: every token belongs to one item.
            let ids = unsafe { self.ids.row(&[t]) };
            let selected = &mut selected[i * k..][..k];
            if self.is_masked(t) {
                ids.fill(-1);
                selected.fill(0.0);
                continue;
            }
            let logits = self.input.logits.row(&[t]);
            let balanced = self.balanced.map(|balanced| (balanced, t));
            select::experts(simd, spec, &self.values, logits, balanced, &mut room, ids);
            if self.by_formula {
                select::scores_by_formula(spec, logits, ids, selected);
                continue;
            }
            for (x, id) in selected.iter_mut().zip(&*ids) {
                *x = f64::from(logits[*id as usize]);
            }
            if spec.score == Score::Softmax {
                (largest[i], sums[i]) = if needs_sum {
                    let max = exp::max(logits);
                    (max, exp::exp_row(logits, max, room.scores()))
                } else {
                    // The sum over all experts would cancel, and so would any other shift.
                    (exact::max(selected.iter().copied()), 1.0)
                };
                for x in &mut *selected {
                    *x = if *x == largest[i] { 0.0 } else { *x - largest[i] };
                }
            }
        }
        if let Some(scores) = &self.scores {
            // SAFETY: every token belongs to one item.
            unsafe { scores.part(tokens.start * k, selected.len()) }.copy_from_slice(selected);
            return;
        }
        if !self.by_formula {
            self.scores_of_selected(selected, sums);
        }
        self.finish(tokens, selected, counts);
    }
}

impl Tokens<'_, '_> {
    fn is_masked(&self, t: usize) -> bool {
        self.input.token_mask.is_some_and(|mask| mask[t] == 0)
    }

    /// Whether the sum of a softmax over all experts enters the weights.
    fn needs_sum(&self) -> bool {
        self.spec.score == Score::Softmax
            && match self.spec.renormalize {
                Renormalize::Sum { eps, floor } => eps > 0.0 || floor > 0.0,
                Renormalize::L2 => false,
                Renormalize::None | Renormalize::Softmax => true,
            }
    }

    /// From logits (for a softmax: less the largest) to scores, all slots of an item at once.
    #[inline(always)]
    fn scores_of_selected(&self, selected: &mut [f64], sums: &[f64]) {
        match self.spec.score {
            Score::Softmax => {
                for x in selected.iter_mut() {
                    *x = exp::exp(*x);
                }
                if self.needs_sum() {
                    for (token, sum) in selected.chunks_exact_mut(self.spec.top_k).zip(sums) {
                        let inverse = sum.recip();
                        token.iter_mut().for_each(|x| *x *= inverse);
                    }
                }
            }
            Score::Sigmoid => {
                for x in selected.iter_mut() {
                    *x = 1.0 / (1.0 + exp::exp(-*x));
                }
            }
            Score::SqrtSoftplus => {
                for x in selected.iter_mut() {
                    *x = exact::score(Score::SqrtSoftplus, *x as f32, (0.0, 1.0));
                }
            }
            Score::Raw => {}
        }
    }

    /// From scores to weights.
    #[inline(always)]
    fn finish(&self, tokens: Range<usize>, selected: &mut [f64], counts: &mut [u32]) {
        let k = self.spec.top_k;
        let (rule, scaling) = select::scale(self.spec);
        if rule == Renormalize::Softmax {
            for token in selected.chunks_exact_mut(k) {
                let max = exact::max(token.iter().copied());
                token.iter_mut().for_each(|x| *x = if *x == max { 0.0 } else { *x - max });
            }
            for x in selected.iter_mut() {
                *x = exp::exp(*x);
            }
        }
        for (t, scores) in tokens.zip(selected.chunks_exact(k)) {
            // SAFETY: every token belongs to one item.
            let (ids, weights) = unsafe { (self.ids.row(&[t]), self.weights.row(&[t])) };
            if self.is_masked(t) {
                weights.fill(0.0);
                continue;
            }
            let factor = scaling / select::divisor(rule, scores);
            for ((id, weight), score) in ids.iter().zip(weights).zip(scores) {
                *weight = (score * factor) as f32;
                counts[*id as usize] += 1;
            }
        }
    }
}
