//! Seeded weights and inputs: the same numbers for any number of threads.

use super::array::Array;
use super::backend::{FfnArrays, MoeArrays};
use super::layer::{AttentionWeights, LayerWeights, NormWeights, Projection};
use gatefold::Element;
use gatefold::spec::{AttentionBlock, Ffn, Layer, Mlp, Norm, QkNorm};
use rayon::prelude::*;

/// Numbers in one piece of work.
const CHUNK: usize = 1 << 16;

/// Steele, Lea and Flood 2014: a bijective mix of a counter.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Makes arrays one after the other, each with a seed of its own, and tells how far it is.
pub struct Maker<'a> {
    seed: u64,
    progress: &'a (dyn Fn(usize) + Sync),
}

impl<'a> Maker<'a> {
    /// `progress` is called with the number of elements made since the last call.
    pub fn new(seed: u64, progress: &'a (dyn Fn(usize) + Sync)) -> Self {
        Maker { seed: mix(seed), progress }
    }

    /// Uniform numbers with mean 0 and this standard deviation.
    pub fn array<T: Element>(&mut self, shape: &[usize], deviation: f64) -> Array<T> {
        self.seed = mix(self.seed);
        let (seed, width) = (self.seed, (deviation * 12f64.sqrt()) as f32);
        let mut data = vec![T::default(); shape.iter().product()];
        data.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
            let base = seed.wrapping_add((chunk as u64) << 32);
            for (i, four) in out.chunks_mut(4).enumerate() {
                let bits = mix(base.wrapping_add(i as u64));
                for (j, x) in four.iter_mut().enumerate() {
                    let unit = f32::from((bits >> (16 * j)) as u16) / 65536.0 + 0.5 / 65536.0 - 0.5;
                    *x = T::from_f32(unit * width);
                }
            }
            (self.progress)(out.len());
        });
        Array::new(data, shape)
    }

    fn matrix<T: Element>(&mut self, outs: usize, ins: usize) -> Array<T> {
        self.array(&[outs, ins], (ins as f64).sqrt().recip())
    }

    fn projection<T: Element>(&mut self, outs: usize, ins: usize, bias: bool) -> Projection<T> {
        Projection { weight: self.matrix(outs, ins), bias: bias.then(|| self.vector(outs, 0.1)) }
    }

    fn vector(&mut self, len: usize, deviation: f64) -> Vec<f64> {
        self.array::<f32>(&[len], deviation).to_f64()
    }

    /// Near what multiplies by 1.
    fn norm_vector(&mut self, len: usize, offset: f64) -> Vec<f64> {
        self.vector(len, 0.1).iter().map(|x| f64::from((x + 1.0 - offset) as f32)).collect()
    }

    fn norm(&mut self, spec: &Norm, len: usize) -> NormWeights {
        NormWeights {
            weight: Some(self.norm_vector(len, spec.weight_offset)),
            bias: spec.bias.then(|| self.vector(len, 0.1)),
        }
    }

    fn block<T: Element>(&mut self, ffn: &Ffn, experts: Option<usize>) -> FfnArrays<T> {
        let (inter, hidden) = (ffn.intermediate_size, ffn.hidden_size);
        let mut matrix = |outs: usize, ins: usize| {
            let shape = experts.map_or(vec![outs, ins], |e| vec![e, outs, ins]);
            self.array(&shape, (ins as f64).sqrt().recip())
        };
        let (gate, up, down) = (ffn.gated.then(|| matrix(inter, hidden)), matrix(inter, hidden), matrix(hidden, inter));
        let mut bias = |there: bool, len: usize| {
            let shape = experts.map_or(vec![len], |e| vec![e, len]);
            there.then(|| self.array::<f32>(&shape, 0.1).cast())
        };
        FfnArrays {
            gate,
            up,
            down,
            gate_bias: bias(ffn.up_bias && ffn.gated, inter),
            up_bias: bias(ffn.up_bias, inter),
            down_bias: bias(ffn.down_bias, hidden),
        }
    }

    /// Weights of a whole layer.
    pub fn layer<T: Element>(&mut self, spec: &Layer) -> LayerWeights<T> {
        let (hidden, norm) = (spec.hidden_size, &spec.norm);
        let attention = match &spec.attention {
            AttentionBlock::Mla(block) => {
                let m = &block.mla;
                let q_width = m.num_heads * m.head_dim();
                AttentionWeights {
                    q: self.projection(
                        q_width,
                        m.q_lora_rank.unwrap_or(hidden),
                        block.qkv_bias && m.q_lora_rank.is_none(),
                    ),
                    q_a: m.q_lora_rank.map(|rank| self.projection(rank, hidden, block.qkv_bias)),
                    q_a_norm: m.q_lora_rank.map(|rank| self.norm_vector(rank, 0.0)),
                    kv_a: Some(self.projection(m.kv_lora_rank + m.rope_dim, hidden, block.qkv_bias)),
                    kv_a_norm: Some(self.norm_vector(m.kv_lora_rank, 0.0)),
                    kv_b: Some(self.matrix(m.num_heads * (m.nope_dim + m.value_dim), m.kv_lora_rank).reshape(&[
                        m.num_heads,
                        m.nope_dim + m.value_dim,
                        m.kv_lora_rank,
                    ])),
                    out: self.projection(hidden, m.num_heads * m.value_dim, block.out_bias),
                    ..AttentionWeights::default()
                }
            }
            AttentionBlock::Gqa(block) => {
                let a = &block.attention;
                let gate = if block.output_gate { a.num_heads * a.value_dim } else { 0 };
                let normed = |heads: usize| match block.qk_norm {
                    Some(QkNorm::PerHead) => Some(a.head_dim),
                    Some(QkNorm::Full) => Some(heads * a.head_dim),
                    _ => None,
                };
                let offset = norm.weight_offset;
                AttentionWeights {
                    q: self.projection(a.num_heads * a.head_dim + gate, hidden, block.qkv_bias),
                    k: self.projection(a.num_kv_heads * a.head_dim, hidden, block.qkv_bias),
                    v: self.projection(a.num_kv_heads * a.value_dim, hidden, block.qkv_bias),
                    out: self.projection(hidden, a.num_heads * a.value_dim, block.out_bias),
                    q_norm: normed(a.num_heads).map(|n| self.norm_vector(n, offset)),
                    k_norm: normed(a.num_kv_heads).map(|n| self.norm_vector(n, offset)),
                    sinks: a.sinks.then(|| self.vector(a.num_heads, 1.0)),
                    alibi_slopes: a.alibi.then(|| (0..a.num_heads).map(|h| 0.5f64.powi(h as i32 + 1)).collect()),
                    relative_bias: a
                        .relative_bias
                        .map(|r| self.array::<f32>(&[r.num_buckets, a.num_heads], 0.5).cast()),
                    ..AttentionWeights::default()
                }
            }
            _ => AttentionWeights::default(),
        };
        let mut weights = LayerWeights {
            attn_norm: self.norm(norm, hidden),
            mlp_norm: self.norm(norm, hidden),
            attention,
            ..LayerWeights::default()
        };
        if spec.post_attention_norm {
            weights.post_attn_norm = self.norm(norm, hidden);
        }
        if spec.post_mlp_norm {
            weights.post_mlp_norm = self.norm(norm, hidden);
        }
        match &spec.mlp {
            Mlp::Dense(ffn) => weights.mlp = Some(self.block(ffn, None)),
            Mlp::Moe(moe) => {
                let experts = moe.router.num_experts;
                weights.moe = Some(MoeArrays {
                    router: self.matrix(experts, hidden),
                    router_bias: moe.router_bias.then(|| self.vector(experts, 0.1)),
                    selection_bias: moe.selection_bias.then(|| self.vector(experts, 0.01)),
                    experts: self.block(&moe.experts.ffn, Some(experts)),
                    shared: moe.shared.map(|s| self.block(&s.ffn, None)),
                    shared_gate: moe.shared.filter(|s| s.sigmoid_gate).map(|_| self.matrix(1, hidden)),
                });
            }
            _ => {}
        }
        weights
    }
}

/// Matrix elements of a layer, to know its memory beforehand.
pub fn num_weights(spec: &Layer) -> usize {
    let hidden = spec.hidden_size;
    let block = |f: &Ffn| f.hidden_size * f.intermediate_size * if f.gated { 3 } else { 2 };
    let attention = match &spec.attention {
        AttentionBlock::Mla(b) => {
            let m = &b.mla;
            let q = m.num_heads * m.head_dim();
            m.q_lora_rank.map_or(q * hidden, |rank| rank * (q + hidden))
                + (m.kv_lora_rank + m.rope_dim) * hidden
                + m.num_heads * (m.nope_dim + m.value_dim) * m.kv_lora_rank
                + hidden * m.num_heads * m.value_dim
        }
        AttentionBlock::Gqa(b) => {
            let a = &b.attention;
            let gate = if b.output_gate { a.num_heads * a.value_dim } else { 0 };
            let kv = a.num_kv_heads * (a.head_dim + a.value_dim);
            hidden * (a.num_heads * (a.head_dim + a.value_dim) + gate + kv)
        }
        _ => 0,
    };
    attention
        + match &spec.mlp {
            Mlp::Dense(ffn) => block(ffn),
            Mlp::Moe(moe) => {
                moe.router.num_experts * (hidden + block(&moe.experts.ffn)) + moe.shared.map_or(0, |s| block(&s.ffn))
            }
            _ => 0,
        }
}
