//! The naive method of the numerical contract: the textbook formula with sequential f32 sums, rounded to the storage type
//! exactly where the CPU backend stores. Its error against f64 is the yardstick for the backend's.

use super::array::Array;
use super::backend::{Backend, Block, FfnArrays, Matrix, Mixture, MoeArrays, in_blocks};
use super::textbook::{dot, inner, norm, rotate, sigmoid};
use gatefold::args::{
    AttentionInput, AttentionOutput, KvCache, KvCacheMut, MoeInput, MoeOutput, QkvInput, QkvOutput, RopeTable,
    RouteInput, RouteOutput, Routing, WkvInput, WkvOutput,
};
use gatefold::cpu::Float;
use gatefold::spec::*;
use gatefold::{Element, Result, View, ViewMut, reference};
use std::marker::PhantomData;

/// Names of backends that store as the CUDA backend does.
pub const DEVICES: [&str; 2] = ["cuda", "simulator"];

/// Naive computation with activations of type `T`.
pub struct Naive<T> {
    /// The level multiplies pairs of bf16: probabilities and weighted inputs are rounded to it, too, and the instruction adds the
    /// second product of a pair first.
    pairs: bool,
    /// The tensor cores of a device multiply in the storage type, and the results of experts are kept in it. Weights on the input
    /// multiply the sums.
    device: bool,
    _type: PhantomData<T>,
}

impl<T: Element> Naive<T> {
    /// As the CPU level or the device of this name stores.
    pub fn for_level(level: &str) -> Self {
        let pairs = level == "avx512bf16" && T::DTYPE == gatefold::Dtype::BF16;
        Naive { pairs, device: DEVICES.contains(&level), _type: PhantomData }
    }

    fn factor(&self, x: f32) -> f32 {
        if self.pairs || self.device { T::from_f32(x).to_f32() } else { x }
    }

    /// The result of an expert as it is kept for the sum.
    fn kept(&self, y: f32) -> f32 {
        if self.device { T::from_f32(y).to_f32() } else { y }
    }

    /// One block on one row: `x` in f32, result in f32 before it is stored.
    fn ffn(&self, spec: &Ffn, x: &[f32], w: &FfnRow<'_>) -> Vec<f32> {
        let (gate, up, down) = w.block.matrices();
        let (inter, hidden) = (spec.intermediate_size, spec.hidden_size);
        let row: Vec<f32> = (0..inter)
            .map(|i| {
                let up = up.dot(x, w.index * inter + i, self.pairs) + w.bias(1, i, inter);
                let gate = gate.map(|g| g.dot(x, w.index * inter + i, self.pairs) + w.bias(0, i, inter));
                self.factor(inner(spec.activation, gate, up))
            })
            .collect();
        (0..hidden).map(|o| down.dot(&row, w.index * hidden + o, self.pairs) + w.bias(2, o, hidden)).collect()
    }

    fn routed(&self, spec: &ExpertFfn, x: &[f32], ids: &[i32], weights: &[f32], w: &dyn Block) -> Vec<f32> {
        let mut sum = vec![0.0f32; spec.ffn.hidden_size];
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|k| ids[*k]);
        for k in order {
            let Some(e) = spec.local_expert(ids[k]) else { continue };
            let row = FfnRow { block: w, index: e };
            let y: Vec<f32> = match spec.weight_on {
                WeightOn::Input => {
                    let round = |x: f32| if self.pairs { T::from_f32(x).to_f32() } else { x };
                    let scaled: Vec<f32> = x.iter().map(|v| round(v * weights[k])).collect();
                    self.ffn(&spec.ffn, &scaled, &row).iter().map(|y| self.kept(*y)).collect()
                }
                _ => self.ffn(&spec.ffn, x, &row).iter().map(|y| self.kept(*y) * weights[k]).collect(),
            };
            for (s, y) in sum.iter_mut().zip(y) {
                *s += y;
            }
        }
        sum.iter().map(|s| s * spec.combine_scale as f32).collect()
    }
}

/// One block among several: its number tells its rows.
struct FfnRow<'a> {
    block: &'a dyn Block,
    index: usize,
}

impl FfnRow<'_> {
    /// Bias of gate (0), up (1) or down (2) at `row`.
    fn bias(&self, part: usize, row: usize, rows: usize) -> f32 {
        self.block.vectors()[part].map_or(0.0, |b| b.data[self.index * rows + row] as f32)
    }
}

/// The product with one row of many, whose numbers f32 holds.
fn dot_with(x: &[f32], w: &[f64], row: usize, width: usize) -> f32 {
    let row: Vec<f32> = w[row * width..(row + 1) * width].iter().map(|w| *w as f32).collect();
    dot(x, &row)
}

fn store<T: Element>(to: &mut [T], from: &[f32]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = T::from_f32(*x);
    }
}

fn load<T: Element>(row: &[T]) -> Vec<f32> {
    row.iter().map(|x| x.to_f32()).collect()
}

impl<T: Element> Backend for Naive<T> {
    type A = T;
    type S = f32;
    type Linear<'a> = &'a dyn Matrix;
    type Mlp<'a> = &'a dyn Block;
    type Moe<'a> = &'a dyn Mixture;
    type Mla<'a> = Array<f64>;

    fn name(&self) -> String {
        "naive".into()
    }

    fn pack_linear<'a, W: Float>(&mut self, weight: &'a Array<W>) -> Result<&'a dyn Matrix> {
        Ok(weight)
    }
    fn pack_mlp<'a, W: Float>(&mut self, _: &Ffn, weights: &'a FfnArrays<W>) -> Result<&'a dyn Block> {
        Ok(weights)
    }
    fn pack_moe<'a, W: Float>(&mut self, _: &Moe, weights: &'a MoeArrays<W>) -> Result<&'a dyn Mixture> {
        Ok(weights)
    }
    fn pack_mla<W: Float>(&mut self, _: &Mla, kv_b: &Array<W>) -> Result<Array<f64>> {
        Ok(kv_b.cast())
    }

    fn norm<const N: usize>(
        &mut self,
        spec: &Norm,
        x: View<'_, T, N>,
        weight: Option<&[f32]>,
        bias: Option<&[f32]>,
        mut out: ViewMut<'_, T, N>,
    ) -> Result<()> {
        let shape = x.shape();
        let rows: usize = shape[..N - 1].iter().product();
        for flat in 0..rows {
            let (mut index, mut rest) = ([0; N], flat);
            for i in (0..N - 1).rev() {
                (index[i], rest) = (rest % shape[i], rest / shape[i]);
            }
            let row = load(x.row(&index[..N - 1]));
            let weight = |i: usize| weight.map_or(1.0, |w| w[i] + spec.weight_offset as f32);
            let y = norm(spec.kind, spec.eps, &row, weight, |i| bias.map_or(0.0, |b| b[i]));
            store(out.row_mut(&index[..N - 1]), &y);
        }
        Ok(())
    }

    fn linear(
        &mut self,
        x: View<'_, T, 2>,
        weight: &&dyn Matrix,
        bias: Option<&[f32]>,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        let ([outs, _], odd_first) = (weight.size(), self.pairs);
        in_blocks(x, out, |x, mut out| {
            for t in 0..x.shape()[0] {
                let row = load(x.row(&[t]));
                let y: Vec<f32> =
                    (0..outs).map(|o| weight.dot(&row, o, odd_first) + bias.map_or(0.0, |b| b[o])).collect();
                store(out.row_mut(&[t]), &y);
            }
            Ok(())
        })
    }

    fn prepare_qkv(&mut self, spec: &QkvPrep, input: &QkvInput<'_, T, f32>, output: QkvOutput<'_, T>) -> Result<()> {
        let QkvOutput { q: mut out_q, k: mut out_k, v: mut out_v, .. } = output;
        let clip = |x: &mut [f32]| {
            if let Some(c) = spec.clip {
                x.iter_mut().for_each(|v| *v = v.clamp(-c as f32, c as f32));
            }
        };
        let offset = spec.norm.weight_offset as f32;
        let rms = |x: &[f32], weight: &dyn Fn(usize) -> f32| norm(NormKind::Rms, spec.norm.eps, x, weight, |_| 0.0);
        for t in 0..input.q.shape()[0] {
            for (is_q, x, weight, heads, out) in [
                (true, &input.q, input.q_norm, spec.num_heads, &mut out_q),
                (false, &input.k, input.k_norm, spec.num_kv_heads, &mut out_k),
            ] {
                let mut all: Vec<f32> = (0..heads).flat_map(|h| load(x.row(&[t, h]))).collect();
                if let (Some(QkNorm::Full), Some(w)) = (spec.qk_norm, weight) {
                    all = rms(&all, &|i| w[i] + offset);
                }
                clip(&mut all);
                for (h, head) in all.chunks_mut(spec.head_dim).enumerate() {
                    if let (Some(QkNorm::PerHead), Some(w)) = (spec.qk_norm, weight) {
                        head.copy_from_slice(&rms(head, &|i| w[i] + offset));
                    }
                    if let (Some(rope), Some(table)) = (&spec.rope, &input.rope) {
                        let p = input.positions[t] as usize;
                        rotate(rope, head, table.cos.row(&[p]), table.sin.row(&[p]));
                    }
                    if spec.qk_norm == Some(QkNorm::L2AfterRope) {
                        head.copy_from_slice(&rms(head, &|_| 1.0));
                    }
                    if let (true, Some(temperature)) = (is_q, &spec.q_temperature) {
                        let factor = temperature.factor(input.positions[t]) as f32;
                        head.iter_mut().for_each(|v| *v *= factor);
                    }
                    store(out.row_mut(&[t, h]), head);
                }
            }
            for g in 0..spec.num_kv_heads {
                let mut row = load(input.v.row(&[t, g]));
                clip(&mut row);
                store(out_v.row_mut(&[t, g]), &row);
            }
        }
        Ok(())
    }

    fn rope(
        &mut self,
        spec: &Rope,
        x: View<'_, T, 3>,
        positions: &[u32],
        table: &RopeTable<'_, f32>,
        mut out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        let [n, heads, _] = x.shape();
        for t in 0..n {
            for h in 0..heads {
                let mut row = load(x.row(&[t, h]));
                let p = positions[t] as usize;
                rotate(spec, &mut row, table.cos.row(&[p]), table.sin.row(&[p]));
                store(out.row_mut(&[t, h]), &row);
            }
        }
        Ok(())
    }

    fn kv_append(&mut self, input: &KvCache<'_, T>, cache: KvCacheMut<'_, T>) -> Result<()> {
        reference::kv_append(input, cache)
    }

    fn attention(
        &mut self,
        spec: &Attention,
        input: &AttentionInput<'_, T, f32>,
        output: AttentionOutput<'_, T, f32>,
    ) -> Result<()> {
        let shape = input.check(spec, &output)?;
        let AttentionOutput { mut out, mut lse, .. } = output;
        for s in 0..shape.num_seqs {
            let seq = input.sequence(s);
            for i in 0..seq.q_len {
                let t = seq.q_begin + i;
                let visible = seq.visible_rows(spec, i);
                for h in 0..spec.num_heads {
                    let g = h / spec.group_size();
                    let q = load(input.q.row(&[t, h]));
                    let mut scores = vec![f32::NEG_INFINITY; seq.kv_len];
                    for j in visible.clone() {
                        if input.mask.is_some_and(|m| m.at_broadcast([s, h, i, j]) == 0) {
                            continue;
                        }
                        let k = input.kv.key(s, j, g, spec.head_dim);
                        let mut score = dot(&q, k) * spec.softmax_scale as f32;
                        if let Some(c) = spec.softcap {
                            score = c as f32 * (score / c as f32).tanh();
                        }
                        if let Some(bias) = &input.bias {
                            score += bias.at_broadcast([s, h, i, j]);
                        }
                        let (qi, kj) = (seq.q_start + i as i64, seq.k_start + j as i64);
                        if let Some(slopes) = input.alibi_slopes {
                            score += match &input.alibi_positions {
                                Some(p) => slopes[h] * p.at_broadcast([s, j]),
                                None => -slopes[h] * (qi - kj).abs() as f32,
                            };
                        }
                        if let (Some(r), Some(table)) = (&spec.relative_bias, &input.relative_bias) {
                            score += table.at([r.bucket(kj - qi), h]);
                        }
                        scores[j] = score;
                    }
                    let sink = input.sinks.map_or(f32::NEG_INFINITY, |s| s[h]);
                    let max = scores.iter().fold(sink, |m, s| m.max(*s));
                    let row = out.row_mut(&[t, h]);
                    if max == f32::NEG_INFINITY {
                        row.fill(T::default());
                        if let Some(lse) = &mut lse {
                            lse.set([t, h], f32::NEG_INFINITY);
                        }
                        continue;
                    }
                    let mut sum = if sink == f32::NEG_INFINITY { 0.0 } else { (sink - max).exp() };
                    let mut acc = vec![0.0f32; spec.value_dim];
                    for (j, score) in scores.iter().enumerate().filter(|(_, s)| **s != f32::NEG_INFINITY) {
                        let p = (score - max).exp();
                        sum += p;
                        let p = self.factor(p);
                        for (a, v) in acc.iter_mut().zip(input.kv.value(s, j, g, spec.value_dim)) {
                            *a += p * v.to_f32();
                        }
                    }
                    acc.iter_mut().for_each(|a| *a /= sum);
                    store(row, &acc);
                    if let Some(lse) = &mut lse {
                        lse.set([t, h], max + sum.ln());
                    }
                }
            }
        }
        Ok(())
    }

    fn mla_absorb_query(
        &mut self,
        spec: &Mla,
        q_nope: View<'_, T, 3>,
        kv_b: &Array<f64>,
        mut out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        let (head, rank) = (spec.nope_dim + spec.value_dim, spec.kv_lora_rank);
        for t in 0..q_nope.shape()[0] {
            for h in 0..spec.num_heads {
                let q = load(q_nope.row(&[t, h]));
                let y: Vec<f32> = (0..rank)
                    .map(|c| {
                        let w = |d: usize| kv_b.data[(h * head + d) * rank + c] as f32;
                        q.iter().enumerate().fold(0.0, |sum, (d, q)| sum + q * w(d))
                    })
                    .collect();
                store(out.row_mut(&[t, h]), &y);
            }
        }
        Ok(())
    }

    fn mla_project_value(
        &mut self,
        spec: &Mla,
        latent: View<'_, T, 3>,
        kv_b: &Array<f64>,
        mut out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        let (head, rank) = (spec.nope_dim + spec.value_dim, spec.kv_lora_rank);
        for t in 0..latent.shape()[0] {
            for h in 0..spec.num_heads {
                let x = load(latent.row(&[t, h]));
                let y: Vec<f32> =
                    (0..spec.value_dim).map(|d| dot_with(&x, &kv_b.data, h * head + spec.nope_dim + d, rank)).collect();
                store(out.row_mut(&[t, h]), &y);
            }
        }
        Ok(())
    }

    fn sigmoid_mul(&mut self, x: View<'_, T, 2>, gate: View<'_, T, 2>, mut out: ViewMut<'_, T, 2>) -> Result<()> {
        for t in 0..x.shape()[0] {
            let y: Vec<f32> =
                x.row(&[t]).iter().zip(gate.row(&[t])).map(|(x, g)| x.to_f32() * sigmoid(g.to_f32())).collect();
            store(out.row_mut(&[t]), &y);
        }
        Ok(())
    }

    fn add(&mut self, x: View<'_, T, 2>, y: View<'_, T, 2>, multiplier: f64, mut out: ViewMut<'_, T, 2>) -> Result<()> {
        for t in 0..x.shape()[0] {
            let sum: Vec<f32> =
                x.row(&[t]).iter().zip(y.row(&[t])).map(|(x, y)| x.to_f32() + multiplier as f32 * y.to_f32()).collect();
            store(out.row_mut(&[t]), &sum);
        }
        Ok(())
    }

    fn mlp(&mut self, spec: &Ffn, x: View<'_, T, 2>, w: &&dyn Block, mut out: ViewMut<'_, T, 2>) -> Result<()> {
        for t in 0..x.shape()[0] {
            let y = self.ffn(spec, &load(x.row(&[t])), &FfnRow { block: *w, index: 0 });
            store(out.row_mut(&[t]), &y);
        }
        Ok(())
    }

    fn router_logits(
        &mut self,
        _: &Router,
        hidden: View<'_, T, 2>,
        weights: &&dyn Mixture,
        mut logits: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        let (router, bias) = weights.router();
        let [experts, _] = router.size();
        for t in 0..hidden.shape()[0] {
            let x = load(hidden.row(&[t]));
            for e in 0..experts {
                logits.set([t, e], router.dot(&x, e, self.pairs) + bias.map_or(0.0, |b| b[e] as f32));
            }
        }
        Ok(())
    }

    /// Ids are the reference's; the weights are computed anew in f32.
    fn route(&mut self, spec: &Router, input: &RouteInput<'_, f32>, output: RouteOutput<'_, f32>) -> Result<()> {
        let n = input.logits.shape()[0];
        let slots = spec.slots();
        let RouteOutput { mut topk_ids, mut topk_weights, .. } = output;
        let mut exact = vec![0.0f64; n * slots];
        reference::route(spec, input, RouteOutput::new(topk_ids.reborrow(), ViewMut::new(&mut exact, [n, slots])))?;
        for t in 0..n {
            let logits = input.logits.row(&[t]);
            let ids: Vec<i32> = topk_ids.as_view().row(&[t]).to_vec();
            let chosen = naive_weights(spec, logits, &ids);
            // Where nothing simple stands for it, the reference's weight rounded to f32.
            for (k, to) in topk_weights.row_mut(&[t]).iter_mut().enumerate() {
                *to = chosen.as_ref().map_or(exact[t * slots + k] as f32, |w| w[k]);
            }
        }
        Ok(())
    }

    fn expert_ffn(
        &mut self,
        spec: &ExpertFfn,
        hidden: View<'_, T, 2>,
        routing: &Routing<'_, f32>,
        weights: &&dyn Mixture,
        mut out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        for t in 0..hidden.shape()[0] {
            let (ids, w) = (routing.topk_ids.row(&[t]), routing.topk_weights.row(&[t]));
            let y = self.routed(spec, &load(hidden.row(&[t])), ids, w, weights.experts());
            store(out.row_mut(&[t]), &y);
        }
        Ok(())
    }

    /// With the routing given.
    fn moe(
        &mut self,
        spec: &Moe,
        input: &MoeInput<'_, T, f32>,
        weights: &&dyn Mixture,
        output: MoeOutput<'_, T, f32>,
    ) -> Result<()> {
        let mut out = output.out;
        let routing = input.routing.ok_or_else(|| gatefold::Error::Unsupported {
            backend: "the naive method".into(),
            case: "a mixture without a given routing".into(),
        })?;
        for t in 0..input.hidden.shape()[0] {
            let x = load(input.hidden.row(&[t]));
            let (ids, w) = (routing.topk_ids.row(&[t]), routing.topk_weights.row(&[t]));
            let mut y = self.routed(&spec.experts, &x, ids, w, weights.experts());
            if let (Some(shared), Some((block, gate))) = (&spec.shared, weights.shared()) {
                let gate = gate.map_or(1.0, |g| sigmoid(g.dot(&x, 0, self.pairs)));
                for (y, s) in y.iter_mut().zip(self.ffn(&shared.ffn, &x, &FfnRow { block, index: 0 })) {
                    *y += gate * self.kept(s);
                }
            }
            store(out.row_mut(&[t]), &y);
        }
        Ok(())
    }

    fn wkv(&mut self, input: &WkvInput<'_, T, f32>, output: WkvOutput<'_, T, f32>) -> Result<()> {
        let WkvOutput { mut out, mut state_out, .. } = output;
        let [batch, seq, channels] = input.k.shape();
        for b in 0..batch {
            for c in 0..channels {
                let (decay, first) = (-input.decay[c].exp(), input.first[c]);
                let start = |part: usize, empty: f32| input.state_in.map_or(empty, |s| s.at([part, b, c]));
                let (mut num, mut den, mut max) = (start(0, 0.0), start(1, 0.0), start(2, -1e38));
                for i in 0..seq {
                    let (k, v) = (input.k.at([b, i, c]).to_f32(), input.v.at([b, i, c]).to_f32());
                    let m = max.max(k + first);
                    let (old, new) = ((max - m).exp(), (k + first - m).exp());
                    out.set([b, i, c], T::from_f32((old * num + new * v) / (old * den + new)));
                    let m = (max + decay).max(k);
                    let (old, new) = ((max + decay - m).exp(), (k - m).exp());
                    (num, den, max) = (old * num + new * v, old * den + new, m);
                }
                if let Some(state) = &mut state_out {
                    for (part, x) in [num, den, max].into_iter().enumerate() {
                        state.set([part, b, c], x);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Weights of given experts by the plain formula in f32; `None` where the selection has a formula of its own.
fn naive_weights(spec: &Router, logits: &[f32], ids: &[i32]) -> Option<Vec<f32>> {
    if !matches!(spec.selection, Selection::TopK | Selection::Sinkhorn { .. }) || ids.contains(&-1) {
        return None;
    }
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let sum: f32 = logits.iter().fold(0.0, |s, l| s + (l - max).exp());
    let mut w: Vec<f32> = ids
        .iter()
        .map(|id| {
            let l = logits[*id as usize];
            match spec.score {
                Score::Sigmoid => sigmoid(l),
                Score::SqrtSoftplus => l.exp().ln_1p().sqrt(),
                Score::Raw => l,
                _ => (l - max).exp() / sum,
            }
        })
        .collect();
    match spec.renormalize {
        Renormalize::Sum { eps, floor } => {
            let sum = (w.iter().sum::<f32>() + eps as f32).max(floor as f32);
            w.iter_mut().for_each(|w| *w /= sum);
        }
        Renormalize::L2 => {
            let norm = w.iter().map(|w| w * w).sum::<f32>().sqrt();
            w.iter_mut().for_each(|w| *w /= norm);
        }
        Renormalize::Softmax => {
            let max = w.iter().fold(f32::NEG_INFINITY, |m, w| m.max(*w));
            let exps: Vec<f32> = w.iter().map(|w| (w - max).exp()).collect();
            let sum: f32 = exps.iter().sum();
            w = exps.iter().map(|e| e / sum).collect();
        }
        _ => {}
    }
    w.iter_mut().for_each(|w| *w *= spec.scaling_factor as f32);
    Some(w)
}
