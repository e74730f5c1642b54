//! Files of the golden format written here, with every value of its vocabulary and the truth by the formulas of the format's
//! document (independent of the crate's own), then read back and run. The recorded files use only a part of the vocabulary.

#![cfg(feature = "serde")]

#[path = "../examples/support/mod.rs"]
mod support;

use gatefold::Dtype;
use gatefold::cpu::Level;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::HashMap;
use support::golden::{Case, Outcome, Runner};
use support::tensors::Tensors;

/// A stream of numbers from a seed: enough for test data.
struct Source(u64);

impl Source {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    fn flag(&mut self) -> bool {
        self.next().is_multiple_of(2)
    }
    /// Exact in f32.
    fn number(&mut self) -> f64 {
        f64::from((self.next() % 4001) as f32 / 1000.0 - 2.0)
    }
    fn numbers(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.number()).collect()
    }
    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }
}

/// Tensors of a file that is being written.
#[derive(Default)]
struct Writer {
    tensors: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
}

impl Writer {
    fn f32(&mut self, name: &str, shape: &[usize], data: &[f64]) {
        let bytes = data.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect();
        self.tensors.push((name.into(), safetensors::Dtype::F32, shape.into(), bytes));
    }
    fn f64(&mut self, name: &str, shape: &[usize], data: &[f64]) {
        let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.into(), safetensors::Dtype::F64, shape.into(), bytes));
    }
    fn i32(&mut self, name: &str, shape: &[usize], data: &[usize]) {
        let bytes = data.iter().flat_map(|x| (*x as i32).to_le_bytes()).collect();
        self.tensors.push((name.into(), safetensors::Dtype::I32, shape.into(), bytes));
    }
    fn u8(&mut self, name: &str, shape: &[usize], data: &[bool]) {
        self.tensors.push((
            name.into(),
            safetensors::Dtype::U8,
            shape.into(),
            data.iter().map(|x| u8::from(*x)).collect(),
        ));
    }
    fn finish(self, section: &str, description: Value) -> Vec<u8> {
        let meta = json!({ "format": "golden-1", "case": "written", "sections": [section], section: description,
            "tolerance": { "f32": 1e-5, "f64": 1e-10 }, "input_dtype": "f32" });
        let metadata = HashMap::from([("golden".to_string(), meta.to_string())]);
        let views = self.tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
        });
        safetensors::serialize(views, Some(metadata)).expect("a file")
    }
}

/// Reads the file back and runs it on the reference and the best CPU level.
fn run(file: &[u8], section: &str, narrow: bool) -> Result<(), TestCaseError> {
    let case = Case::new(Tensors::parse(file).expect("the file can be read")).expect("the metadata can be read");
    for runner in [Runner::Reference, Runner::Cpu(Level::best())] {
        for line in case.run(section, runner, Dtype::F32) {
            let good = matches!(line.outcome, Outcome::Ok { .. });
            prop_assert!(good, "{:?}", line);
        }
    }
    // In bf16 the reference on the rounded inputs is the truth. A row of a few numbers says nothing there: the naive method,
    // which sets the bound, may be exact by luck.
    if narrow {
        return Ok(());
    }
    for line in case.run(section, Runner::Cpu(Level::best()), Dtype::BF16) {
        let good = matches!(line.outcome, Outcome::Ok { .. });
        prop_assert!(good, "bf16 {:?}", line);
    }
    Ok(())
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

// ----------------------------------------------------------------------------- attention

/// Steps 1 to 7 of the document, index by index.
fn attention_file(seed: u64) -> (Vec<u8>, bool) {
    let s = &mut Source(seed);
    let (batch, heads_kv, group) = (1 + s.below(3), 1 + s.below(2), 1 + s.below(3));
    let (seq_q, cache, dim, dim_v) = (1 + s.below(6), s.below(5), 1 + s.below(9), 1 + s.below(40));
    let (heads, seq_k) = (heads_kv * group, seq_q + cache);
    let causal = s.flag();
    let window = s.flag().then(|| 1 + s.below(4));
    let chunk = s.flag().then(|| 1 + s.below(5));
    let softcap = s.flag().then(|| 1.5 + s.below(3) as f64);
    let k_start = s.below(7);
    let q_start = k_start + cache;
    let scale = 0.25 + 0.125 * s.below(4) as f64;
    let q = s.numbers(batch * heads * seq_q * dim);
    let k = s.numbers(batch * heads_kv * seq_k * dim);
    let v = s.numbers(batch * heads_kv * seq_k * dim_v);
    let key_mask: Option<Vec<bool>> = s.flag().then(|| (0..batch * seq_k).map(|_| s.below(4) > 0).collect());
    let sinks = s.flag().then(|| s.numbers(heads));
    let bias = s.flag().then(|| s.numbers(heads * seq_q * seq_k));
    let alibi = s.flag().then(|| (s.numbers(heads), (0..batch * seq_k).map(|_| s.below(9)).collect::<Vec<_>>()));

    let mut out = vec![0.0; batch * seq_q * heads * dim_v];
    let mut dead = vec![true; batch * seq_q];
    for b in 0..batch {
        for h in 0..heads {
            let g = h / group;
            for i in 0..seq_q {
                let mut scores = Vec::new();
                for j in 0..seq_k {
                    let (qi, kj) = ((i + q_start) as i64, (j + k_start) as i64);
                    let allowed = (!causal || kj <= qi)
                        && window.is_none_or(|w| kj > qi - w as i64)
                        && chunk.is_none_or(|c| kj / c as i64 == qi / c as i64)
                        && key_mask.as_ref().is_none_or(|m| m[b * seq_k + j]);
                    if !allowed {
                        continue;
                    }
                    let at = |d: usize| {
                        q[((b * heads + h) * seq_q + i) * dim + d] * k[((b * heads_kv + g) * seq_k + j) * dim + d]
                    };
                    let mut score = scale * (0..dim).map(at).sum::<f64>();
                    if let Some(c) = softcap {
                        score = c * (score / c).tanh();
                    }
                    if let Some(bias) = &bias {
                        score += bias[(h * seq_q + i) * seq_k + j];
                    }
                    if let Some((slopes, positions)) = &alibi {
                        score += slopes[h] * positions[b * seq_k + j] as f64;
                    }
                    scores.push((j, score));
                }
                if scores.is_empty() {
                    continue;
                }
                dead[b * seq_q + i] = false;
                let mut values: Vec<f64> = scores.iter().map(|s| s.1).collect();
                if let Some(sinks) = &sinks {
                    values.push(sinks[h]);
                }
                let p = softmax(&values);
                for ((j, _), p) in scores.iter().zip(p) {
                    for d in 0..dim_v {
                        out[((b * seq_q + i) * heads + h) * dim_v + d] +=
                            p * v[((b * heads_kv + g) * seq_k + j) * dim_v + d];
                    }
                }
            }
        }
    }
    let mut w = Writer::default();
    w.f32("attn.q", &[batch, heads, seq_q, dim], &q);
    w.f32("attn.k", &[batch, heads_kv, seq_k, dim], &k);
    w.f32("attn.v", &[batch, heads_kv, seq_k, dim_v], &v);
    w.f64("attn.out.f64", &[batch, seq_q, heads, dim_v], &out);
    if let Some(mask) = &key_mask {
        w.u8("attn.key_mask", &[batch, seq_k], mask);
    }
    if dead.contains(&true) {
        w.u8("attn.fully_masked", &[batch, seq_q], &dead);
    }
    if let Some(sinks) = &sinks {
        w.f32("attn.sinks", &[heads], sinks);
    }
    if let Some(bias) = &bias {
        w.f32("attn.bias", &[1, heads, seq_q, seq_k], bias);
    }
    if let Some((slopes, positions)) = &alibi {
        w.f64("attn.alibi_slopes", &[heads], slopes);
        w.i32("attn.alibi_pos", &[batch, seq_k], positions);
    }
    let file = w.finish(
        "attn",
        json!({ "heads_q": heads, "heads_kv": heads_kv, "dim_qk": dim, "dim_v": dim_v, "scale": scale,
        "causal": causal, "window": window, "chunk": chunk, "softcap": softcap, "q_start": q_start, "k_start": k_start,
        "cache_len": cache, "fully_masked_rows": if dead.contains(&true) { "zero" } else { "none" } }),
    );
    (file, dim_v < 16)
}

// ----------------------------------------------------------------------------- mixture of experts

fn activate(name: &str, x: f64) -> f64 {
    match name {
        "silu" => x * sigmoid(x),
        "relu" => x.max(0.0),
        _ => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    }
}

/// Weights of one block, `[out, in]`.
struct Block {
    gate: Option<Vec<f64>>,
    up: Vec<f64>,
    down: Vec<f64>,
    biases: Option<[Vec<f64>; 3]>,
}

impl Block {
    fn apply(&self, x: &[f64], inter: usize, activation: &str, params: (f64, f64)) -> Vec<f64> {
        let hidden = x.len();
        let bias = |part: usize, i: usize| self.biases.as_ref().map_or(0.0, |b| b[part][i]);
        let dot = |w: &[f64], row: usize, x: &[f64]| w[row * x.len()..].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let inner: Vec<f64> = (0..inter)
            .map(|i| {
                let up = dot(&self.up, i, x) + bias(1, i);
                match &self.gate {
                    None => activate(activation, up),
                    Some(gate) => {
                        let gate = dot(gate, i, x) + bias(0, i);
                        if activation == "swiglu_clamped" {
                            let (alpha, limit) = params;
                            let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
                            (u + 1.0) * g * sigmoid(alpha * g)
                        } else {
                            activate(activation, gate) * up
                        }
                    }
                }
            })
            .collect();
        (0..hidden).map(|o| dot(&self.down, o, &inner) + bias(2, o)).collect()
    }
}

/// The indices of the largest, best first; equal ones in order.
fn top(x: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].total_cmp(&x[*a]));
    order.truncate(k);
    order
}

/// Whether the best `k` are clearly better than the others.
fn clear(x: &[f64], k: usize) -> bool {
    let order = top(x, x.len());
    order.windows(2).take(k).all(|w| x[w[0]] - x[w[1]] > 1e-3 || x[w[1]] == f64::NEG_INFINITY)
}

/// `None` where some choice is too close to call.
fn moe_file(seed: u64) -> Option<Vec<u8>> {
    let s = &mut Source(seed);
    let (batch, seq, hidden, inter) = (1 + s.below(2), 1 + s.below(5), 2 + s.below(7), 1 + s.below(7));
    let tokens = batch * seq;
    let score_fn = s.pick(&["softmax", "sigmoid", "identity", "sparsemixer"]);
    let sparse = score_fn == "sparsemixer";
    let grouped = !sparse && s.flag();
    let experts = if grouped { 8 } else { 3 + s.below(6) };
    let top_k = if sparse { 2 } else { 1 + s.below(3) };
    let select_on = s.pick(&["scores", "logits"]);
    let weight_norm = s.pick(&["none", "sum", "l2", "softmax_selected"]);
    let (norm_eps, norm_min) = (0.125 * s.below(2) as f64, 0.5 * s.below(2) as f64);
    let (routed_scale, combine_scale) = (1.0 + 0.5 * s.below(3) as f64, 1.0 + 0.25 * s.below(3) as f64);
    let jitter_eps = 0.05;
    let (n_group, topk_group) = (4, 2);
    let group_score = s.pick(&["max", "top2_sum"]);
    let apply_weight = s.pick(&["output", "input"]);
    let gated = s.flag();
    let activation = if gated {
        s.pick(&["silu", "relu", "gelu_tanh", "swiglu_clamped"])
    } else {
        s.pick(&["silu", "relu", "gelu_tanh"])
    };
    let params = (1.5, 1.25);
    let capacity = (!sparse && s.flag()).then(|| (1 + s.below(3), s.flag(), s.flag(), s.flag()));
    let token_mask: Option<Vec<bool>> = s.flag().then(|| (0..tokens).map(|_| s.below(4) > 0).collect());

    let x = s.numbers(tokens * hidden);
    let router = s.numbers(experts * hidden);
    let router_bias = s.flag().then(|| s.numbers(experts));
    let correction = (!sparse && s.flag()).then(|| s.numbers(experts));
    let with_bias = s.flag();
    let blocks: Vec<Block> = (0..experts)
        .map(|_| Block {
            gate: gated.then(|| s.numbers(inter * hidden)),
            up: s.numbers(inter * hidden),
            down: s.numbers(hidden * inter),
            biases: with_bias.then(|| [s.numbers(inter), s.numbers(inter), s.numbers(hidden)]),
        })
        .collect();
    // The shared expert is always gated, with the same activation.
    let inter_shared = 1 + s.below(4);
    let shared = s.flag().then(|| {
        let block = Block {
            gate: Some(s.numbers(inter_shared * hidden)),
            up: s.numbers(inter_shared * hidden),
            down: s.numbers(hidden * inter_shared),
            biases: None,
        };
        (block, s.flag().then(|| s.numbers(hidden)))
    });

    // Steps 1 to 8.
    let rows: Vec<&[f64]> = x.chunks(hidden).collect();
    let mut logits = Vec::new();
    let (mut indices, mut weights) = (Vec::new(), Vec::new());
    let mut scores_of = Vec::new();
    for row in &rows {
        let l: Vec<f64> = (0..experts)
            .map(|e| {
                let dot: f64 = row.iter().zip(&router[e * hidden..]).map(|(x, w)| x * w).sum();
                dot + router_bias.as_ref().map_or(0.0, |b| b[e])
            })
            .collect();
        if sparse {
            let (ids, w) = sparse_mixer(&l, jitter_eps)?;
            indices.push(ids);
            weights.push(w);
            scores_of.push(Vec::new());
            logits.extend(l);
            continue;
        }
        let score: Vec<f64> = match score_fn {
            "softmax" => softmax(&l),
            "sigmoid" => l.iter().map(|l| sigmoid(*l)).collect(),
            _ => l.clone(),
        };
        let mut c: Vec<f64> = if select_on == "scores" { score.clone() } else { l.clone() };
        if let Some(b) = &correction {
            c.iter_mut().zip(b).for_each(|(c, b)| *c += b);
        }
        if grouped {
            let size = experts / n_group;
            let values: Vec<f64> = c
                .chunks(size)
                .map(|g| {
                    let order = top(g, 2);
                    if group_score == "max" { g[order[0]] } else { g[order[0]] + g[order[1]] }
                })
                .collect();
            if !clear(&values, topk_group) {
                return None;
            }
            let keep = top(&values, topk_group);
            for (e, c) in c.iter_mut().enumerate() {
                if !keep.contains(&(e / size)) {
                    *c = f64::NEG_INFINITY;
                }
            }
        }
        if !clear(&c, top_k) {
            return None;
        }
        let ids = top(&c, top_k);
        weights.push(ids.iter().map(|e| score[*e]).collect::<Vec<f64>>());
        indices.push(ids);
        scores_of.push(softmax(&l));
        logits.extend(l);
    }
    let mut kept = vec![vec![true; top_k]; tokens];
    if let Some((limit, by_row, by_score, _)) = capacity {
        let groups: Vec<Vec<usize>> = if by_row {
            (0..batch).map(|b| (b * seq..(b + 1) * seq).collect()).collect()
        } else {
            vec![(0..tokens).collect()]
        };
        for mut order in groups {
            if by_score {
                let best = |t: usize| scores_of[t].iter().copied().fold(0.0, f64::max);
                let values: Vec<f64> = order.iter().map(|t| best(*t)).collect();
                let sorted = top(&values, values.len());
                if sorted.windows(2).any(|w| values[w[0]] - values[w[1]] < 1e-4) {
                    return None;
                }
                order = sorted.iter().map(|i| order[*i]).collect();
            }
            let mut used = vec![0; experts];
            for slot in 0..top_k {
                for t in &order {
                    let live = token_mask.as_ref().is_none_or(|m| m[*t]);
                    let e = indices[*t][slot];
                    kept[*t][slot] = live && used[e] < limit;
                    used[e] += usize::from(live);
                }
            }
        }
    }
    let after_drop = capacity.is_some_and(|c| c.3);
    // The document speaks of a sum; what a dropped pair is to a softmax it does not say.
    if after_drop && weight_norm == "softmax_selected" {
        return None;
    }
    for (t, w) in weights.iter_mut().enumerate().filter(|_| !sparse) {
        if after_drop {
            w.iter_mut().zip(&kept[t]).for_each(|(w, k)| *w *= f64::from(u8::from(*k)));
        }
        match weight_norm {
            "sum" => {
                let sum = (w.iter().sum::<f64>() + norm_eps).max(norm_min);
                // A sum of raw scores may be anything; near 0 nothing is well defined.
                if sum.abs() < 0.1 {
                    return None;
                }
                w.iter_mut().for_each(|w| *w /= sum);
            }
            "l2" => {
                let norm = w.iter().map(|w| w * w).sum::<f64>().sqrt();
                if norm < 0.05 {
                    return None;
                }
                w.iter_mut().for_each(|w| *w /= norm);
            }
            "softmax_selected" => *w = softmax(w),
            _ => {}
        }
        w.iter_mut().zip(&kept[t]).for_each(|(w, k)| *w *= routed_scale * f64::from(u8::from(*k)));
    }
    // Steps 10 and 11.
    let (mut routed, mut out) = (Vec::new(), Vec::new());
    for (t, row) in rows.iter().enumerate() {
        let mut sum = vec![0.0; hidden];
        for (slot, e) in indices[t].iter().enumerate().filter(|(slot, _)| kept[t][*slot]) {
            let w = weights[t][slot];
            let y = if apply_weight == "input" {
                let scaled: Vec<f64> = row.iter().map(|x| x * w).collect();
                blocks[*e].apply(&scaled, inter, activation, params)
            } else {
                blocks[*e].apply(row, inter, activation, params).iter().map(|y| y * w * combine_scale).collect()
            };
            sum.iter_mut().zip(y).for_each(|(s, y)| *s += y);
        }
        routed.extend(&sum);
        if let Some((block, gate)) = &shared {
            let g = gate.as_ref().map_or(1.0, |g| sigmoid(g.iter().zip(*row).map(|(g, x)| g * x).sum()));
            sum.iter_mut().zip(block.apply(row, inter_shared, activation, params)).for_each(|(s, y)| *s += g * y);
        }
        out.extend(sum);
    }

    let mut w = Writer::default();
    let stack = |part: &dyn Fn(&Block) -> Vec<f64>| -> Vec<f64> { blocks.iter().flat_map(part).collect() };
    w.f32("moe.x", &[batch, seq, hidden], &x);
    w.f32("moe.router.weight", &[experts, hidden], &router);
    if let Some(b) = &router_bias {
        w.f32("moe.router.bias", &[experts], b);
    }
    if let Some(b) = &correction {
        w.f32("moe.router.correction_bias", &[experts], b);
    }
    if let Some(mask) = &token_mask {
        w.u8("moe.token_mask", &[batch, seq], mask);
    }
    if gated {
        w.f32("moe.experts.gate", &[experts, inter, hidden], &stack(&|b| b.gate.clone().unwrap_or_default()));
    }
    w.f32("moe.experts.up", &[experts, inter, hidden], &stack(&|b| b.up.clone()));
    w.f32("moe.experts.down", &[experts, hidden, inter], &stack(&|b| b.down.clone()));
    if with_bias {
        let bias = |part: usize| stack(&|b: &Block| b.biases.as_ref().map(|b| b[part].clone()).unwrap_or_default());
        if gated {
            w.f32("moe.experts.gate_bias", &[experts, inter], &bias(0));
        }
        w.f32("moe.experts.up_bias", &[experts, inter], &bias(1));
        w.f32("moe.experts.down_bias", &[experts, hidden], &bias(2));
    }
    if let Some((block, gate)) = &shared {
        w.f32("moe.shared.gate", &[inter_shared, hidden], block.gate.as_deref().unwrap_or_default());
        w.f32("moe.shared.up", &[inter_shared, hidden], &block.up);
        w.f32("moe.shared.down", &[hidden, inter_shared], &block.down);
        if let Some(gate) = gate {
            w.f32("moe.shared.router", &[1, hidden], gate);
        }
    }
    w.f64("moe.router.logits.f64", &[tokens, experts], &logits);
    w.i32("moe.router.indices", &[tokens, top_k], &indices.concat());
    w.f64("moe.router.weights.f64", &[tokens, top_k], &weights.concat());
    if capacity.is_some() {
        w.u8("moe.router.kept", &[tokens, top_k], &kept.concat());
    }
    w.f64("moe.out.routed.f64", &[batch, seq, hidden], &routed);
    w.f64("moe.out.f64", &[batch, seq, hidden], &out);
    let groups = grouped.then(|| json!({ "n_group": n_group, "topk_group": topk_group, "group_score": group_score }));
    let capacity = capacity.map(|(limit, by_row, by_score, after)| {
        let mut c = json!({ "scope": if by_row { "row" } else { "all" }, "limit": limit,
            "order": if by_score { "score" } else { "position" } });
        if after {
            c["normalise"] = json!("after_drop");
        }
        c
    });
    let shared = shared
        .map(|(_, gate)| json!({ "inter": inter_shared, "gate": if gate.is_some() { "sigmoid" } else { "none" } }));
    Some(w.finish("moe", json!({ "n_experts": experts, "top_k": top_k, "hidden": hidden, "inter": inter, "tokens": tokens,
        "score_fn": score_fn, "select_on": select_on, "jitter_eps": jitter_eps, "groups": groups, "weight_norm": weight_norm,
        "norm_eps": norm_eps, "norm_min": norm_min, "routed_scale": routed_scale, "combine_scale": combine_scale,
        "apply_weight": apply_weight, "capacity": capacity, "shared": shared, "ties": false, "aux_loss": null,
        "expert_form": if gated { "gated" } else { "plain" }, "activation": activation,
        "act_params": { "alpha": params.0, "limit": params.1 }, "fused_layout": "separate" })))
}

/// Two experts and their weights; `None` where a comparison is too close to call.
fn sparse_mixer(l: &[f64], eps: f64) -> Option<(Vec<usize>, Vec<f64>)> {
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    let mut current = l.to_vec();
    for _ in 0..2 {
        if !clear(&current, 1) {
            return None;
        }
        let best = top(&current, 1)[0];
        let top = current[best];
        let band: Vec<f64> = l.iter().map(|x| (top - x) / x.abs().max(top)).collect();
        if band.iter().any(|b| (b - 2.0 * eps).abs() < 1e-3) {
            return None;
        }
        let masked: Vec<f64> =
            current.iter().zip(&band).map(|(x, b)| if *b > 2.0 * eps { f64::NEG_INFINITY } else { *x }).collect();
        weights.push(softmax(&masked)[best]);
        ids.push(best);
        current[best] = f64::NEG_INFINITY;
    }
    Some((ids, weights))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn attention(seed in any::<u64>()) {
        let (file, narrow) = attention_file(seed);
        run(&file, "attn", narrow)?;
    }

    #[test]
    fn mixture(seed in any::<u64>()) {
        let file = moe_file(seed);
        prop_assume!(file.is_some());
        run(&file.unwrap_or_default(), "moe", false)?;
    }

    /// Whatever the bytes are: an error or a case, never a panic.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Tensors::parse(&bytes).map(Case::new);
    }

    /// A file with some bytes changed: whatever it says, running it does not panic.
    #[test]
    fn damaged(seed in any::<u64>(), places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut file = attention_file(seed).0;
        for (place, byte) in places {
            let at = place.index(file.len());
            file[at] = byte;
        }
        if let Ok(case) = Tensors::parse(&file).and_then(Case::new) {
            for section in case.sections() {
                let _ = case.run(&section, Runner::Reference, Dtype::F32);
            }
        }
    }
}
