//! Load balancing and z-loss.

use super::select::ranked;
use crate::reference::softmax::{log_sum_exp, softmax};
use crate::spec::{AuxLoss, Router};

/// See [`AuxLoss`]. The largest `p` are found on the logits in f32, ties to the lower expert.
pub(super) fn aux_loss(spec: &Router, loss: AuxLoss, logits: &[Vec<f64>], counted: &[bool]) -> f64 {
    let experts = spec.num_experts as f64;
    let all = logits.len().max(1);
    match loss {
        AuxLoss::TopK => experts * balance(spec, logits, counted, 0..logits.len(), spec.top_k).unwrap_or(0.0),
        AuxLoss::Switch { group_len } => {
            let group_len = group_len.unwrap_or(all);
            let groups: Vec<f64> = (0..logits.len())
                .step_by(group_len)
                .filter_map(|start| {
                    let group = start..start.saturating_add(group_len).min(logits.len());
                    balance(spec, logits, counted, group, 1)
                })
                .collect();
            let mean = groups.iter().sum::<f64>() / (groups.len() as f64 * experts);
            if groups.is_empty() { 0.0 } else { experts * experts * mean }
        }
    }
}

/// `sum_e f_e P_e` over the tokens of a group that count; `None` if there are none.
fn balance(
    spec: &Router,
    logits: &[Vec<f64>],
    counted: &[bool],
    group: std::ops::Range<usize>,
    top_k: usize,
) -> Option<f64> {
    let tokens: Vec<usize> = group.filter(|t| counted[*t]).collect();
    let mut chosen = vec![0.0; spec.num_experts];
    let mut mass = vec![0.0; spec.num_experts];
    for t in &tokens {
        let values: Vec<f32> = logits[*t].iter().map(|l| *l as f32).collect();
        for e in &ranked(&values)[..top_k] {
            chosen[*e] += 1.0;
        }
        for (mass, p) in mass.iter_mut().zip(softmax(&logits[*t])) {
            *mass += p;
        }
    }
    let n = tokens.len() as f64;
    let sum = chosen.iter().zip(&mass).map(|(f, p)| f / n * (p / n)).sum();
    (!tokens.is_empty()).then_some(sum)
}

/// `mean over tokens of ln(sum_e exp(l_e))^2`.
pub(super) fn z_loss(logits: &[Vec<f64>], counted: &[bool]) -> f64 {
    let squares: Vec<f64> =
        logits.iter().zip(counted).filter(|(_, c)| **c).map(|(l, _)| log_sum_exp(l).powi(2)).collect();
    if squares.is_empty() { 0.0 } else { squares.iter().sum::<f64>() / squares.len() as f64 }
}
