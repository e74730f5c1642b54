//! Experts that choose their tokens (Zhou et al. 2022, arXiv:2202.09368).

use super::capacity::{rank_index, rank_key, renormalize_used};
use super::select::{self, Values};
use super::{counts_len, exact};
use crate::args::{RouteInput, RouteOutput};
use crate::cpu::level::Level;
use crate::cpu::parallel::{self, Shared};
use crate::cpu::rows::{RowKernel, SharedView, for_rows, rows_per_item};
use crate::cpu::simd::Simd;
use crate::cpu::workspace::{Carver, part_bytes};
use crate::spec::Router;
use std::ops::Range;

/// Workspace of [`route`].
pub fn workspace_bytes(spec: &Router, num_tokens: usize) -> usize {
    let (experts, workers) = (spec.num_experts, parallel::max_workers());
    part_bytes::<f32>(num_tokens.saturating_mul(experts))
        .saturating_add(part_bytes::<u64>(workers.saturating_mul(num_tokens.saturating_add(8))))
        .saturating_add(part_bytes::<i32>(experts.saturating_mul(spec.expert_choice_tokens(num_tokens))))
        .saturating_add(part_bytes::<u32>(num_tokens))
        .saturating_add(part_bytes::<f64>(workers.saturating_mul(2 * experts.saturating_add(8))))
}

/// Writes everything but the losses.
pub fn route(
    level: Level,
    carver: &mut Carver<'_>,
    spec: &Router,
    input: &RouteInput<'_>,
    output: &mut RouteOutput<'_>,
    counts: &mut [u32],
) {
    let [num_tokens, num_experts] = input.logits.shape();
    let capacity = spec.expert_choice_tokens(num_tokens);
    let workers = parallel::max_workers();
    let is_live = |t: usize| input.token_mask.is_none_or(|mask| mask[t] != 0);

    let values = carver.part::<f32>(num_tokens * num_experts);
    let keys_len = num_tokens + 8; // cache lines apart
    let keys = Shared::new(carver.part::<u64>(workers * keys_len));
    let chosen = carver.part::<i32>(num_experts * capacity);
    let used = carver.part::<u32>(num_tokens);
    let room_len = 2 * (num_experts + 8);
    let room = Shared::new(carver.part::<f64>(workers * room_len));

    let kernel = ValueRows { spec, input, values: Shared::new(&mut *values), room, room_len };
    for_rows(level, num_tokens, rows_per_item(8 * num_experts), &kernel);

    // The best tokens of each expert.
    {
        let (values, chosen) = (&*values, Shared::new(&mut *chosen));
        parallel::run(num_experts, |worker, e| {
            // SAFETY: no two items with the same worker overlap in time; every expert is one item.
            let (keys, chosen) =
                unsafe { (keys.part(worker * keys_len, num_tokens), chosen.part(e * capacity, capacity)) };
            let mut live = 0;
            for t in (0..num_tokens).filter(|t| is_live(*t)) {
                keys[live] = rank_key(values[t * num_experts + e], t);
                live += 1;
            }
            let keys = &mut keys[..live];
            if capacity > 0 && capacity < live {
                keys.select_nth_unstable_by(capacity - 1, |a, b| b.cmp(a));
            }
            let best = &mut keys[..capacity.min(live)];
            best.sort_unstable_by(|a, b| b.cmp(a));
            chosen.fill(-1);
            for (out, key) in chosen.iter_mut().zip(best) {
                *out = rank_index(*key) as i32;
            }
        });
    }

    // The same by token, experts ascending.
    used.fill(0);
    for t in 0..num_tokens {
        output.topk_ids.row_mut(&[t]).fill(-1);
    }
    for (e, tokens) in chosen.chunks_exact(capacity.max(1)).enumerate() {
        for t in tokens.iter().filter(|t| **t >= 0) {
            let slot = &mut used[*t as usize];
            output.topk_ids.row_mut(&[*t as usize])[*slot as usize] = e as i32;
            *slot += 1;
            counts[e] += 1;
        }
    }
    debug_assert!(counts.len() >= counts_len(num_experts));

    let (ids, weights) = (output.topk_ids.as_view(), SharedView::new(&mut output.topk_weights));
    let (_, scaling) = select::scale(spec);
    let per_item = rows_per_item(16 * num_experts);
    parallel::run(num_tokens.div_ceil(per_item), |worker, item| {
        // SAFETY: no two items with the same worker overlap in time.
        let room = unsafe { room.part(worker * room_len, room_len) };
        let (scores, room) = room.split_at_mut(num_experts);
        for t in item * per_item..num_tokens.min((item + 1) * per_item) {
            let (ids, logits) = (ids.row(&[t]), input.logits.row(&[t]));
            // SAFETY: every token belongs to one item.
            let weights = unsafe { weights.row(&[t]) };
            weights.fill(0.0);
            let slots = used[t] as usize;
            if slots == 0 {
                continue;
            }
            let softmax = exact::softmax_of(spec.score, logits);
            for (score, id) in scores.iter_mut().zip(&ids[..slots]) {
                *score = exact::score(spec.score, logits[*id as usize], softmax);
            }
            renormalize_used(spec, &ids[..slots], scores, room);
            for (weight, w) in weights.iter_mut().zip(&room[..slots]) {
                *weight = (w * scaling) as f32;
            }
        }
    });

    if let Some(out) = &mut output.expert_tokens {
        for e in 0..num_experts {
            out.row_mut(&[e]).copy_from_slice(&chosen[e * capacity..][..capacity]);
        }
    }
}

/// What the experts compare.
struct ValueRows<'a, 'b> {
    spec: &'a Router,
    input: &'a RouteInput<'b>,
    values: Shared<'a, f32>,
    room: Shared<'a, f64>,
    room_len: usize,
}

impl RowKernel for ValueRows<'_, '_> {
    #[inline(always)]
    fn eval<S: Simd>(&self, _: S, worker: usize, tokens: Range<usize>) {
        let n = self.spec.num_experts;
        // SAFETY: no two items with the same worker overlap in time.
        let room = unsafe { self.room.part(worker * self.room_len, self.room_len) };
        for t in tokens {
            // SAFETY: every token belongs to one item.
            let values = unsafe { self.values.part(t * n, n) };
            let logits = self.input.logits.row(&[t]);
            match Values::new(self.spec, None) {
                Values::Scores(_) => select::scores_f32(self.spec, logits, room, values),
                _ => values.copy_from_slice(logits),
            }
        }
    }
}
