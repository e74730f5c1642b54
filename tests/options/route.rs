//! Routing against definitions by counting: who is better, who is ahead in the queue.

use crate::common::tables::route::{Call, base, finish, table, valid};
use crate::common::{RouteCase, RouteResult, assert_close};
use gatefold::spec::{AuxLoss, CapacityLimit, CapacityOrder, GroupScore, Renormalize, Score, SecondExpert, Selection};
use gatefold::{random, reference};

/// The case of a call, 25 tokens.
pub fn case(call: &Call, seed: u64) -> RouteCase {
    let mut case = RouteCase::new(&call.spec, 25, seed);
    if call.bias {
        case = case.with_bias();
    }
    let masks = case.clone().with_masks();
    case.token_mask = masks.token_mask.filter(|_| call.token_mask);
    case.loss_mask = masks.loss_mask.filter(|_| call.loss_mask);
    case
}

/// Whether the value at place `i` comes before the one at `j`: larger, or equal at a lower place; NaN after all numbers.
fn before(values: &[f32], i: usize, j: usize) -> bool {
    let (a, b) = (values[i], values[j]);
    a > b || (b.is_nan() && !a.is_nan()) || ((a == b || (a.is_nan() && b.is_nan())) && i < j)
}

/// How many of `among` come before place `i`.
fn rank(values: &[f32], i: usize, among: &[usize]) -> usize {
    among.iter().filter(|j| **j != i && before(values, **j, i)).count()
}

fn softmax_at(l: &[f64], e: usize) -> f64 {
    1.0 / l.iter().map(|x| (x - l[e]).exp()).sum::<f64>()
}

fn by_counting(case: &RouteCase) -> RouteResult<f64> {
    let spec = &case.spec;
    let [n, experts] = case.logits.shape();
    let flat = case.logits.values();
    let logits: Vec<Vec<f64>> = flat.chunks(experts).map(|l| l.iter().map(|l| f64::from(*l)).collect()).collect();
    let live = |t: usize| case.token_mask.as_ref().is_none_or(|m| m[t] != 0);
    let size = experts / spec.top_k.max(1);
    let score = |t: usize, e: usize| -> f64 {
        let l = &logits[t];
        match (spec.score, spec.selection) {
            (Score::Softmax, Selection::Prototypes) => softmax_at(&l[e / size * size..][..size], e % size),
            (Score::Softmax, _) => softmax_at(l, e),
            (Score::Sigmoid, _) => 0.5 + 0.5 * (l[e] / 2.0).tanh(),
            (Score::SqrtSoftplus, _) => l[e].exp().ln_1p().sqrt(),
            (_, _) => l[e],
        }
    };

    // Selection values. Where scores are compared, they must be the very bits that the contract names.
    let exact_score = |t: usize, e: usize| -> f64 {
        let l = &logits[t];
        match spec.score {
            Score::Softmax => {
                let group = if spec.selection == Selection::Prototypes {
                    e / size * size..(e / size + 1) * size
                } else {
                    0..experts
                };
                let m = l[group.clone()].iter().fold(f64::MIN, |m, x| m.max(*x));
                (l[e] - m).exp() / l[group].iter().map(|x| (x - m).exp()).sum::<f64>()
            }
            Score::Sigmoid => 1.0 / (1.0 + (-l[e]).exp()),
            Score::SqrtSoftplus => (l[e].max(0.0) + (-l[e].abs()).exp().ln_1p()).sqrt(),
            _ => l[e],
        }
    };
    let on_logits = spec.selects_on_logits(case.selection_bias.is_some());
    let mut values: Vec<Vec<f32>> = (0..n)
        .map(|t| {
            let value = |e: usize| if on_logits { logits[t][e] as f32 } else { exact_score(t, e) as f32 };
            (0..experts).map(|e| value(e) + case.selection_bias.as_ref().map_or(0.0, |b| b[e])).collect()
        })
        .collect();
    if let Selection::Sinkhorn { iterations } = spec.selection {
        let c = |t: usize, e: usize| (logits[t][e] - logits[t].iter().fold(f64::MIN, |m, x| m.max(*x))).exp();
        let alive: Vec<usize> = (0..n).filter(|t| live(*t)).collect();
        let (mut row, mut col) = (vec![1.0; n], vec![1.0; experts]);
        for _ in 0..iterations {
            for t in &alive {
                row[*t] = 1.0 / (alive.len() as f64 * ((0..experts).map(|e| col[e] * c(*t, e)).sum::<f64>() + 1e-8));
            }
            for (e, col) in col.iter_mut().enumerate() {
                *col = 1.0 / (experts as f64 * (alive.iter().map(|t| row[*t] * c(*t, e)).sum::<f64>() + 1e-8));
            }
        }
        values = (0..n).map(|t| (0..experts).map(|e| (row[t] * c(t, e) * col[e]) as f32).collect()).collect();
    }

    // Which experts, best first: by counting the better ones.
    let all: Vec<usize> = (0..experts).collect();
    let mut expert_tokens =
        vec![-1; if spec.selection == Selection::ExpertChoice { experts * spec.expert_choice_tokens(n) } else { 0 }];
    let mut ids = vec![-1i32; n * spec.slots()];
    for t in (0..n).filter(|t| live(*t)) {
        let row = &mut ids[t * spec.slots()..][..spec.slots()];
        match spec.selection {
            Selection::ExpertChoice => {
                let tokens: Vec<usize> = (0..n).filter(|t| live(*t)).collect();
                let (places, mut slot) = (spec.expert_choice_tokens(n), 0);
                for e in 0..experts {
                    let column: Vec<f32> = values.iter().map(|v| v[e]).collect();
                    let rank = rank(&column, t, &tokens);
                    if rank < places {
                        expert_tokens[e * places + rank] = t as i32;
                        row[slot] = e as i32;
                        slot += 1;
                    }
                }
            }
            Selection::Prototypes => {
                for e in 0..experts {
                    let group: Vec<usize> = (e / size * size..(e / size + 1) * size).collect();
                    if rank(&values[t], e, &group) == 0 {
                        row[e / size] = e as i32;
                    }
                }
            }
            _ => {
                let mut allowed = all.clone();
                if let Some(g) = &spec.groups {
                    let size = experts / g.num_groups;
                    let group_values: Vec<f32> = (0..g.num_groups)
                        .map(|i| {
                            let members: Vec<usize> = (i * size..(i + 1) * size).collect();
                            let nth = |r: usize| {
                                values[t][*members.iter().find(|e| rank(&values[t], **e, &members) == r).unwrap()]
                            };
                            if g.score == GroupScore::Max { nth(0) } else { nth(0) + nth(1) }
                        })
                        .collect();
                    let groups: Vec<usize> = (0..g.num_groups).collect();
                    allowed.retain(|e| rank(&group_values, e / size, &groups) < g.top_groups);
                }
                for e in &allowed {
                    let rank = rank(&values[t], *e, &allowed);
                    if rank < spec.top_k {
                        row[rank] = *e as i32;
                    }
                }
            }
        }
    }

    // Scores of the slots.
    let slots = spec.slots();
    let mut raw = vec![0.0; n * slots];
    for (i, id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
        let (t, slot, e) = (i / slots, i % slots, *id as usize);
        raw[i] = match spec.selection {
            Selection::SparseMixer { jitter_eps } => {
                let l = &logits[t];
                let gone = if slot == 1 { ids[t * slots] as usize } else { usize::MAX };
                let near: Vec<f64> = (0..experts)
                    .filter(|x| {
                        // 0 / 0, of two logits that are both 0, is near.
                        let distance = (l[e] - l[*x]) / l[*x].abs().max(l[e]);
                        *x != gone && (distance <= 2.0 * jitter_eps || distance.is_nan())
                    })
                    .map(|x| l[x])
                    .collect();
                1.0 / near.iter().map(|x| (x - l[e]).exp()).sum::<f64>()
            }
            _ => score(t, e),
        };
    }
    let mixer = matches!(spec.selection, Selection::SparseMixer { .. });
    let normalized = |ids: &[i32]| -> Vec<f64> {
        (0..n * slots)
            .map(|i| {
                let row = i / slots * slots..(i / slots + 1) * slots;
                let used: Vec<f64> = row.filter(|j| ids[*j] >= 0).map(|j| raw[j]).collect();
                let w = match spec.renormalize {
                    _ if ids[i] < 0 => 0.0,
                    _ if mixer => raw[i],
                    Renormalize::Sum { eps, floor } => raw[i] / (used.iter().sum::<f64>() + eps).max(floor),
                    Renormalize::L2 => raw[i] / used.iter().map(|w| w * w).sum::<f64>().sqrt(),
                    Renormalize::Softmax => 1.0 / used.iter().map(|w| (w - raw[i]).exp()).sum::<f64>(),
                    _ => raw[i],
                };
                w * if mixer { 1.0 } else { spec.scaling_factor }
            })
            .collect()
    };
    let mut weights = normalized(&ids);
    let wanted = ids.iter().filter(|id| **id >= 0).count();

    // Second experts by chance.
    if spec.second_expert == SecondExpert::Random {
        for t in 0..n {
            let w = weights[t * slots + 1] / spec.scaling_factor;
            if random::uniform(case.seed, t as u64, 0) >= 2.0 * w as f32 {
                ids[t * slots + 1] = -1;
            }
        }
    }
    // The queue: how many requests for the same expert in the same group of tokens are ahead.
    if let (Some(c), false) = (&spec.capacity, spec.selection == Selection::ExpertChoice) {
        let requests = ids.clone();
        let group = |t: usize| c.group_len.map_or(0, |len| t / len);
        let p: Vec<f32> = logits
            .iter()
            .map(|l| {
                let m = l.iter().fold(f64::MIN, |m, x| m.max(*x));
                (1.0 / l.iter().map(|x| (x - m).exp()).sum::<f64>()) as f32
            })
            .collect();
        for i in (0..n * slots).filter(|i| requests[*i] >= 0) {
            let ahead = (0..n * slots)
                .filter(|j| {
                    let (t, u) = (i / slots, j / slots);
                    let earlier = if c.order == CapacityOrder::Score { t != u && before(&p, u, t) } else { u < t };
                    requests[*j] == requests[i]
                        && group(t) == group(u)
                        && (j % slots < i % slots || (j % slots == i % slots && earlier))
                })
                .count();
            let tokens = (0..n).filter(|t| group(*t) == group(i / slots)).count();
            let limit = match c.limit {
                CapacityLimit::Tokens(limit) => limit,
                CapacityLimit::Factor(f) => {
                    ((f * (tokens * spec.top_k) as f64 / experts as f64).ceil() as usize).max(1)
                }
                _ => unreachable!(),
            };
            if ahead >= limit {
                ids[i] = -1;
            }
        }
    }
    if spec.capacity.is_some_and(|c| c.normalize_after_drop) {
        weights = normalized(&ids);
    }
    weights.iter_mut().zip(&ids).filter(|(_, id)| **id < 0).for_each(|(w, _)| *w = 0.0);

    // Losses, from sums over pairs.
    let counted: Vec<usize> =
        (0..n).filter(|t| live(*t) && case.loss_mask.as_ref().is_none_or(|m| m[*t] != 0)).collect();
    let balance = |tokens: &[usize], k: usize| -> f64 {
        let f = |e: usize| {
            tokens
                .iter()
                .filter(|t| {
                    let l: Vec<f32> = logits[**t].iter().map(|l| *l as f32).collect();
                    rank(&l, e, &all) < k
                })
                .count() as f64
        };
        let mass = |e: usize| tokens.iter().map(|t| softmax_at(&logits[*t], e)).sum::<f64>();
        (0..experts).map(|e| f(e) * mass(e)).sum::<f64>() / (tokens.len() * tokens.len()) as f64
    };
    let aux_loss = match spec.aux_loss {
        Some(AuxLoss::TopK) if !counted.is_empty() => experts as f64 * balance(&counted, spec.top_k),
        Some(AuxLoss::Switch { group_len }) => {
            let mut groups: Vec<Vec<usize>> = (0..n.div_ceil(group_len.unwrap_or(n)))
                .map(|g| counted.iter().copied().filter(|t| t / group_len.unwrap_or(n) == g).collect())
                .collect();
            groups.retain(|g| !g.is_empty());
            groups.iter().map(|g| balance(g, 1)).sum::<f64>() * experts as f64 / groups.len() as f64
        }
        _ => 0.0,
    };
    let lse = |t: usize| logits[t].iter().map(|l| l.exp()).sum::<f64>().ln();
    RouteResult {
        tokens_per_expert: (0..experts).map(|e| ids.iter().filter(|id| **id == e as i32).count() as u32).collect(),
        dropped: (wanted - ids.iter().filter(|id| **id >= 0).count()) as u64,
        aux_loss,
        z_loss: counted.iter().map(|t| lse(*t).powi(2)).sum::<f64>() / counted.len() as f64,
        ids,
        weights,
        expert_tokens,
    }
}

#[test]
fn every_pair_of_options_against_counting() {
    let (table, base) = (table(), base());
    let pairs = table.rows("route", &base, 1, valid);
    for (seed, row) in pairs.rows.iter().enumerate() {
        let case = case(&finish(table.apply(&base, row)), seed as u64);
        let (got, want) = (case.run(reference::route), by_counting(&case));
        let what = table.describe(row);
        assert_eq!(got.ids, want.ids, "{what}");
        assert_close(&what, &got.weights, &want.weights, 1e-13);
        assert_close(&what, &[got.aux_loss, got.z_loss], &[want.aux_loss, want.z_loss], 1e-13);
        assert_eq!(got.tokens_per_expert, want.tokens_per_expert, "{what}");
        assert_eq!(got.expert_tokens, want.expert_tokens, "{what}");
        assert_eq!(got.dropped, want.dropped, "{what}");
    }
}

/// What the table calls impossible is refused with an error, or is an option without effect.
#[test]
fn excluded_pairs_are_refused() {
    let (table, base) = (table(), base());
    let pairs = table.rows("route", &base, 1, valid);
    let name = |(option, value): (usize, usize)| (table.options[option].0, table.options[option].1[value].0);
    for (a, b) in pairs.impossible {
        let names = [name(a), name(b)];
        let has = |option: &str| names.iter().find(|n| n.0 == option).map(|n| n.1);
        let reason = match has("selection") {
            Some("expert choice") => {
                has("groups").is_some()
                    || has("capacity") == Some("no")
                    || has("group_len").is_some()
                    || has("renormalize") == Some("softmax")
                    || has("bias").is_some()
                    || has("second").is_some()
            }
            Some("sparse mixer") => {
                has("top_k").is_some() || has("groups").is_some() || has("bias").is_some() || has("second").is_some()
            }
            Some("sinkhorn") => has("groups").is_some() || has("bias").is_some() || has("second").is_some(),
            Some("prototypes") => has("groups").is_some() || has("second").is_some(),
            // A second expert by chance needs two; an order, a group length and a rule for drops need a capacity.
            _ => (has("second").is_some() && has("top_k").is_some()) || has("capacity") == Some("no"),
        };
        assert!(reason, "{names:?} exclude one another, and nobody knows why");
    }
}
