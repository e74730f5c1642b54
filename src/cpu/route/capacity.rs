//! Slots that are not used: second experts by chance, and requests beyond an expert's capacity; then the weights.

use super::{counts_len, exact, select};
use crate::args::{RouteInput, RouteOutput};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::rows::{SharedView, rows_per_item};
use crate::cpu::workspace::{Carver, part_bytes};
use crate::spec::{Capacity, CapacityOrder, Router, SecondExpert};

/// Tokens of a group that queues by itself.
fn group_len(spec: &Router, num_tokens: usize) -> usize {
    spec.capacity.and_then(|c| c.group_len).unwrap_or(num_tokens).clamp(1, num_tokens.max(1))
}

/// Workspace of [`scores`] and [`drop`].
pub fn workspace_bytes(spec: &Router, num_tokens: usize) -> usize {
    let groups = num_tokens.div_ceil(group_len(spec, num_tokens));
    let workers = parallel::max_workers();
    part_bytes::<f64>(num_tokens.saturating_mul(spec.top_k))
        .saturating_add(part_bytes::<f64>(workers.saturating_mul(spec.top_k.saturating_add(8))))
        .saturating_add(part_bytes::<u64>(num_tokens))
        .saturating_add(part_bytes::<u32>(parallel::workers_for(groups).saturating_mul(counts_len(spec.num_experts))))
        .saturating_add(part_bytes::<u64>(workers.saturating_mul(8)))
}

/// Scores of the selected experts, `[num_tokens, top_k]`.
pub fn scores<'a>(carver: &mut Carver<'a>, spec: &Router, input: &RouteInput<'_>) -> &'a mut [f64] {
    carver.part(input.logits.shape()[0] * spec.top_k)
}

/// Drops slots of the ids in `output`, then writes weights from the scores, and counts; gives the number of dropped slots.
pub fn drop(
    carver: &mut Carver<'_>,
    spec: &Router,
    input: &RouteInput<'_>,
    scores: &[f64],
    output: &mut RouteOutput<'_>,
    counts: &mut [u32],
) -> u64 {
    let num_tokens = input.logits.shape()[0];
    let k = spec.top_k;
    let workers = parallel::max_workers();
    let room_len = k + 8; // whole cache lines apart
    let room = Shared::new(carver.part::<f64>(workers * room_len));
    let order = Shared::new(carver.part::<u64>(num_tokens));
    let ids = SharedView::new(&mut output.topk_ids);
    let weights = SharedView::new(&mut output.topk_weights);
    let (rule, scaling) = select::scale(spec);
    let per_item = rows_per_item(64 * k);
    let is_masked = |t: usize| input.token_mask.is_some_and(|mask| mask[t] == 0);

    // Weights as if nothing were dropped, and second experts by chance.
    parallel::run(num_tokens.div_ceil(per_item), |worker, item| {
        // SAFETY: no two items with the same worker overlap in time.
        let room = unsafe { room.part(worker * room_len, k) };
        for t in item * per_item..num_tokens.min((item + 1) * per_item) {
            // SAFETY: every token belongs to one item.
            let (ids, weights) = unsafe { (ids.row(&[t]), weights.row(&[t])) };
            if is_masked(t) {
                weights.fill(0.0);
                continue;
            }
            room.copy_from_slice(&scores[t * k..][..k]);
            select::renormalize(rule, room);
            if spec.second_expert == SecondExpert::Random {
                // With a weight of NaN it is not kept.
                let kept = crate::random::uniform(input.seed, t as u64, 0) < 2.0 * room[1] as f32;
                if !kept {
                    ids[1] = -1;
                }
            }
            write_weights(ids, room, scaling, weights);
        }
    });

    if let Some(capacity) = &spec.capacity {
        let group_len = group_len(spec, num_tokens);
        let groups = num_tokens.div_ceil(group_len);
        let requests_len = counts_len(spec.num_experts);
        let requests = Shared::new(carver.part::<u32>(parallel::workers_for(groups) * requests_len));
        parallel::run(groups, |worker, group| {
            let start = group * group_len;
            let len = group_len.min(num_tokens - start);
            // SAFETY: no two items with the same worker overlap in time; every token belongs to one group.
            let (requests, order) =
                unsafe { (requests.part(worker * requests_len, spec.num_experts), order.part(start, len)) };
            queue(spec, capacity, input, start, order, requests, &ids);
        });
    }

    let dropped_len = 8; // a cache line each
    let dropped = carver.part::<u64>(workers * dropped_len);
    dropped.fill(0);
    let counts_stride = counts_len(spec.num_experts);
    {
        let (dropped, counts) = (Shared::new(&mut *dropped), Shared::new(counts));
        let again = spec.capacity.is_some_and(|c| c.normalize_after_drop);
        parallel::run(num_tokens.div_ceil(per_item), |worker, item| {
            // SAFETY: no two items with the same worker overlap in time.
            let (room, dropped, counts) = unsafe {
                (
                    room.part(worker * room_len, k),
                    dropped.part(worker * dropped_len, 1),
                    counts.part(worker * counts_stride, spec.num_experts),
                )
            };
            for t in (item * per_item..num_tokens.min((item + 1) * per_item)).filter(|t| !is_masked(*t)) {
                // SAFETY: every token belongs to one item.
                let (ids, weights) = unsafe { (ids.row(&[t]), weights.row(&[t])) };
                if again {
                    renormalize_used(spec, ids, &scores[t * k..][..k], room);
                    write_weights(ids, room, scaling, weights);
                }
                for (id, weight) in ids.iter().zip(weights) {
                    if *id < 0 {
                        *weight = 0.0;
                        dropped[0] += 1;
                    } else {
                        counts[*id as usize] += 1;
                    }
                }
            }
        });
    }
    dropped.iter().step_by(dropped_len).sum()
}

fn write_weights(ids: &[i32], from: &[f64], scaling: f64, weights: &mut [f32]) {
    for ((weight, w), id) in weights.iter_mut().zip(from).zip(ids) {
        *weight = if *id < 0 { 0.0 } else { (w * scaling) as f32 };
    }
}

/// Renormalised scores of the slots in use, in `out` at their slots.
pub fn renormalize_used(spec: &Router, ids: &[i32], scores: &[f64], out: &mut [f64]) {
    let mut used = 0;
    for (id, score) in ids.iter().zip(scores) {
        if *id >= 0 {
            out[used] = *score;
            used += 1;
        }
    }
    select::renormalize(select::scale(spec).0, &mut out[..used]);
    // Back to their slots, last first: a slot is never before its place among the used.
    for slot in (0..ids.len()).rev() {
        if ids[slot] >= 0 {
            used -= 1;
            out[slot] = out[used];
        }
    }
}

/// One group of tokens queues, slot by slot; requests beyond the limit are dropped.
fn queue(
    spec: &Router,
    capacity: &Capacity,
    input: &RouteInput<'_>,
    start: usize,
    order: &mut [u64],
    requests: &mut [u32],
    ids: &SharedView<'_, i32, 2>,
) {
    let limit = capacity.tokens(order.len(), spec.top_k, spec.num_experts);
    for (i, key) in order.iter_mut().enumerate() {
        let best = match capacity.order {
            CapacityOrder::Position => 0.0,
            CapacityOrder::Score => exact::largest_probability(input.logits.row(&[start + i])),
        };
        *key = rank_key(best, i);
    }
    if capacity.order == CapacityOrder::Score {
        order.sort_unstable_by(|a, b| b.cmp(a));
    }
    requests.fill(0);
    for slot in 0..spec.top_k {
        for key in order.iter() {
            // SAFETY: every token belongs to one group, and `queue` has the group alone.
            let id = &mut unsafe { ids.row(&[start + rank_index(*key)]) }[slot];
            if *id >= 0 {
                let queue = &mut requests[*id as usize];
                if *queue as usize >= limit {
                    *id = -1;
                }
                *queue += 1;
            }
        }
    }
}

/// A number that is larger for a larger value, for equal values for the lower index, and least for NaN.
pub fn rank_key(value: f32, index: usize) -> u64 {
    let bits = (value + 0.0).to_bits(); // -0 is 0
    let rank = if value.is_nan() {
        0
    } else if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    };
    u64::from(rank) << 32 | u64::from(!(index as u32))
}

/// The index in a key.
pub fn rank_index(key: u64) -> usize {
    !(key as u32) as usize
}
