//! Softmax attention, and the merge of partial results.

use super::softmax::{exp_below, max_of};
use crate::args::{AttentionInput, AttentionOutput, Sequence};
use crate::spec::Attention;
use crate::view::View;
use crate::{Element, Result};

/// Scaled dot-product attention with grouped key/value heads.
///
/// For query row `i` (at position `qi`) of a sequence and head `h`, with `g = h / (num_heads / num_kv_heads)`, over the
/// key rows `j` (at positions `kj`) of that sequence that it sees:
///
/// ```text
/// s[j] = softmax_scale * q[i, h] . k[j, g]
/// s[j] = softcap * tanh(s[j] / softcap)                  with a softcap
/// s[j] = s[j] + bias[seq, h, i, j]                       with a bias
///             - alibi_slopes[h] * |qi - kj|              with ALiBi; with `alibi_positions`: + slope * position[seq, j]
///             + relative_bias[bucket(kj - qi), h]        with a relative bias
/// lse  = ln(sum_j exp(s[j]) + exp(sinks[h]))             the sink where there are sinks
/// out  = sum_j exp(s[j] - lse) * v[j, g]
/// ```
///
/// * `q`: `[num_tokens, num_heads, head_dim]`, `out`: `[num_tokens, num_heads, value_dim]`, `lse`: `[num_tokens, num_heads]`
/// * keys and values: see [`crate::args::Kv`]; all other arguments: [`AttentionInput`]
///
/// A query sees a key if the specification's mask allows it by position, the explicit mask is not 0, the bias is not
/// -inf, and the key is neither padding on the left (`kv_begin`) nor beyond the length of its sequence. Keys that it does
/// not see are not read for it, so that a NaN there stays there.
///
/// A query that sees no key gets `out = 0` and `lse = -inf`, or `lse = sinks[h]`. Infinite scores follow the limit: the keys
/// with `s = inf` share the weight, a sink of `inf` takes it all; keys with `s = -inf` and sinks of `-inf` have none. A NaN among the scores
/// that a row sees makes its `out` and `lse` NaN.
///
/// # Errors
/// Those of [`AttentionInput::check`]. Nothing is written then.
///
/// Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; sinks: Xiao et al. 2023,
/// arXiv:2309.17453; soft-cap: Gemma 2, arXiv:2408.00118.
pub fn attention<T: Element, S: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, S>,
    mut output: AttentionOutput<'_, f64, f64>,
) -> Result<()> {
    let shape = input.check(spec, &output)?;
    for index in 0..shape.num_seqs {
        let seq = input.sequence(index);
        for i in 0..seq.q_len {
            for h in 0..spec.num_heads {
                let token = seq.q_begin + i;
                let lse = attend(spec, input, &seq, i, h, output.out.row_mut(&[token, h]));
                if let Some(out) = &mut output.lse {
                    out.set([token, h], lse);
                }
            }
        }
    }
    Ok(())
}

/// One row of the output; gives its `lse`.
fn attend<T: Element, S: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, S>,
    seq: &Sequence,
    i: usize,
    h: usize,
    out: &mut [f64],
) -> f64 {
    let g = h / spec.group_size();
    let keys: Vec<usize> = (0..seq.kv_len).filter(|j| sees(spec, input, seq, i, *j, h)).collect();
    let scores: Vec<f64> = keys.iter().map(|j| score(spec, input, seq, i, *j, h)).collect();
    let sink = input.sinks.map_or(f64::NEG_INFINITY, |s| s[h].to_f64());
    out.fill(0.0);
    if sink == f64::NEG_INFINITY && scores.iter().all(|s| *s == f64::NEG_INFINITY) {
        return f64::NEG_INFINITY;
    }
    let max = max_of(scores.iter().copied()).max(sink);
    let sum = scores.iter().map(|s| exp_below(*s, max)).sum::<f64>() + exp_below(sink, max);
    for (j, s) in keys.iter().zip(&scores) {
        let p = exp_below(*s, max) / sum;
        for (out, v) in out.iter_mut().zip(input.kv.value(seq.index, *j, g, spec.value_dim)) {
            *out += p * v.to_f64();
        }
    }
    max + sum.ln()
}

/// Whether query row `i` sees key row `j` of its sequence.
fn sees<T: Element, S: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, S>,
    seq: &Sequence,
    i: usize,
    j: usize,
    h: usize,
) -> bool {
    let index = [seq.index, h, i, j];
    j >= seq.kv_begin
        && spec.mask.visible(seq.q_start + i as i64, seq.k_start + j as i64)
        && input.mask.is_none_or(|mask| mask.at_broadcast(index) != 0)
        && input.bias.is_none_or(|bias| bias.at_broadcast(index).to_f64() != f64::NEG_INFINITY)
}

/// `s[j]` of the formula.
fn score<T: Element, S: Element>(
    spec: &Attention,
    input: &AttentionInput<'_, T, S>,
    seq: &Sequence,
    i: usize,
    j: usize,
    h: usize,
) -> f64 {
    let q = input.q.row(&[seq.q_begin + i, h]);
    let k = input.kv.key(seq.index, j, h / spec.group_size(), spec.head_dim);
    let distance = (seq.k_start + j as i64) - (seq.q_start + i as i64);
    let mut s = spec.softmax_scale * q.iter().zip(k).map(|(q, k)| q.to_f64() * k.to_f64()).sum::<f64>();
    if let Some(cap) = spec.softcap {
        s = cap * (s / cap).tanh();
    }
    if let Some(bias) = input.bias {
        s += bias.at_broadcast([seq.index, h, i, j]).to_f64();
    }
    if let Some(slopes) = input.alibi_slopes {
        s += slopes[h].to_f64()
            * match input.alibi_positions {
                Some(positions) => positions.at_broadcast([seq.index, j]).to_f64(),
                None => -(distance.abs() as f64),
            };
    }
    if let (Some(bias), Some(table)) = (&spec.relative_bias, input.relative_bias) {
        s += table.at([bias.bucket(distance), h]).to_f64();
    }
    s
}

/// The attention over all keys from the attentions over parts of them.
///
/// ```text
/// lse[t, h] = ln(sum_p exp(lses[p, t, h]))
/// out[t, h] = sum_p exp(lses[p, t, h] - lse[t, h]) * outs[p, t, h]
/// ```
///
/// * `outs`: `[num_parts, num_tokens, num_heads, value_dim]`, `lses`: `[num_parts, num_tokens, num_heads]`
/// * `out`: `[num_tokens, num_heads, value_dim]`, `lse`: `[num_tokens, num_heads]`
///
/// A part with `lse = -inf` is not read. All parts `-inf`, or no parts: `out = 0`, `lse = -inf`. Sinks belong to one part alone.
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`]. Nothing is written then.
///
/// Dao et al. 2022, arXiv:2205.14135; Ye et al. 2024 (cascade inference).
pub fn merge<T: Element, S: Element>(
    outs: View<'_, T, 4>,
    lses: View<'_, S, 3>,
    mut output: AttentionOutput<'_, f64, f64>,
) -> Result<()> {
    let [num_parts, num_tokens, num_heads, value_dim] = crate::args::check_merge(&outs, &lses, &output)?;
    if value_dim == 0 && output.lse.is_none() {
        return Ok(()); // no memory bounds the number of rows then
    }
    for t in 0..num_tokens {
        for h in 0..num_heads {
            let lse_of = |p: usize| lses.at([p, t, h]).to_f64();
            let parts: Vec<usize> = (0..num_parts).filter(|p| lse_of(*p) != f64::NEG_INFINITY).collect();
            let max = max_of(parts.iter().map(|p| lse_of(*p)));
            let sum: f64 = parts.iter().map(|p| exp_below(lse_of(*p), max)).sum();
            let out = output.out.row_mut(&[t, h]);
            out.fill(0.0);
            for p in &parts {
                let share = exp_below(lse_of(*p), max) / sum;
                for (out, part) in out.iter_mut().zip(outs.row(&[*p, t, h])) {
                    *out += share * part.to_f64();
                }
            }
            if let Some(lse) = &mut output.lse {
                lse.set([t, h], if parts.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() });
            }
        }
    }
    Ok(())
}
