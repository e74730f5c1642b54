//! Slots that are not used: second experts by chance, and requests beyond an expert's capacity.

use super::Slots;
use super::select::ranked;
use crate::reference::softmax::softmax;
use crate::spec::{CapacityOrder, Router, SecondExpert, Selection};

/// GShard's second expert: kept if `u < 2 w` in f32, `w` its weight before scaling.
pub(super) fn drop_second_experts(spec: &Router, seed: u64, slots: &mut [Slots]) {
    if spec.second_expert != SecondExpert::Random {
        return;
    }
    for (t, token) in slots.iter_mut().enumerate() {
        let kept = crate::random::uniform(seed, t as u64, 0) < 2.0 * token.weights[1] as f32;
        if !kept {
            token.ids[1] = -1;
        }
    }
}

/// Each group of tokens queues, slot by slot, for the experts; requests beyond the limit are dropped.
pub(super) fn drop_over_capacity(spec: &Router, logits: &[Vec<f64>], slots: &mut [Slots]) {
    let (Some(capacity), false) = (&spec.capacity, spec.selection == Selection::ExpertChoice) else { return };
    let num_tokens = slots.len();
    let group_len = capacity.group_len.unwrap_or(num_tokens).max(1);
    for start in (0..num_tokens).step_by(group_len) {
        let end = start.saturating_add(group_len).min(num_tokens);
        let limit = capacity.tokens(end - start, spec.top_k, spec.num_experts);
        let order: Vec<usize> = match capacity.order {
            CapacityOrder::Position => (start..end).collect(),
            CapacityOrder::Score => {
                let best: Vec<f32> = logits[start..end].iter().map(|l| largest_probability(l)).collect();
                ranked(&best).into_iter().map(|i| start + i).collect()
            }
        };
        let mut requests = vec![0; spec.num_experts];
        for slot in 0..spec.top_k {
            for t in &order {
                let id = &mut slots[*t].ids[slot];
                if *id >= 0 {
                    let queue = &mut requests[*id as usize];
                    if *queue >= limit {
                        *id = -1;
                    }
                    *queue += 1;
                }
            }
        }
    }
}

/// The largest softmax probability over all experts, in f32; NaN if any is.
fn largest_probability(logits: &[f64]) -> f32 {
    let p = softmax(logits);
    p.iter().fold(0.0, |best, p| if *p > best || p.is_nan() { *p } else { best }) as f32
}
