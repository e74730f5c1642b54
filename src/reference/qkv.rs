//! Between projection and attention: norms, clipping, rotation, temperature, and the KV cache.

use super::norm::normalize;
use crate::args::{KvCache, KvCacheMut, QkvInput, QkvOutput, RopeTable};
use crate::spec::{QkNorm, QkvPrep, Rope, RopeStyle};
use crate::view::{View, ViewMut};
use crate::{Element, Result};

/// Projected rows made ready for attention, in this order:
///
/// 1. [`QkNorm::Full`]: RMS norm of q and of k over all their heads together
/// 2. q, k and v clamped to `[-clip, clip]`
/// 3. [`QkNorm::PerHead`]: RMS norm of each head of q and k
/// 4. [`rope`] on q and k
/// 5. [`QkNorm::L2AfterRope`]: RMS norm without weights of each head of q and k
/// 6. `q *= 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))` (see [`crate::spec::QTemperature`])
///
/// * `q`: `[num_tokens, num_heads, head_dim]`, `k`: `[num_tokens, num_kv_heads, head_dim]`, `v`: the same with `value_dim`
/// * `positions`: `[num_tokens]`, rows of the cos and sin tables
///
/// # Errors
/// Those of [`QkvInput::check`]. Nothing is written then.
pub fn prepare_qkv<T: Element, S: Element>(
    spec: &QkvPrep,
    input: &QkvInput<'_, T, S>,
    mut output: QkvOutput<'_, f64>,
) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    for t in 0..num_tokens {
        let mut q = heads(&input.q, t);
        let mut k = heads(&input.k, t);
        let mut v = heads(&input.v, t);
        for (row, weight) in [(&mut q, input.q_norm), (&mut k, input.k_norm)] {
            if spec.qk_norm == Some(QkNorm::Full) {
                *row = normalize(&spec.norm, row, weight, None);
            }
        }
        if let Some(clip) = spec.clip {
            for x in q.iter_mut().chain(&mut k).chain(&mut v) {
                *x = x.clamp(-clip, clip);
            }
        }
        for (row, weight) in [(&mut q, input.q_norm), (&mut k, input.k_norm)] {
            for head in row.chunks_exact_mut(spec.head_dim) {
                if spec.qk_norm == Some(QkNorm::PerHead) {
                    head.copy_from_slice(&normalize(&spec.norm, head, weight, None));
                }
                if let (Some(rope), Some(table)) = (&spec.rope, &input.rope) {
                    head.copy_from_slice(&rotate(rope, head, table, input.positions[t]));
                }
                if spec.qk_norm == Some(QkNorm::L2AfterRope) {
                    head.copy_from_slice(&normalize::<S>(&spec.norm, head, None, None));
                }
            }
        }
        if let Some(temperature) = &spec.q_temperature {
            let factor = temperature.factor(input.positions[t]);
            q.iter_mut().for_each(|x| *x *= factor);
        }
        for (row, out) in [(q, &mut output.q), (k, &mut output.k), (v, &mut output.v)] {
            let width = out.shape()[2];
            for (h, head) in row.chunks_exact(width).enumerate() {
                out.row_mut(&[t, h]).copy_from_slice(head);
            }
        }
    }
    Ok(())
}

/// All heads of a token, one behind the other.
fn heads<T: Element>(x: &View<'_, T, 3>, t: usize) -> Vec<f64> {
    (0..x.shape()[1]).flat_map(|h| x.row(&[t, h])).map(|x| x.to_f64()).collect()
}

/// Rotary position embedding: the first `rotary_dim` dimensions of every head turn, the others are copied.
///
/// Pair `n` of a head at `position`, with `c = cos[position, n]` and `s = sin[position, n]`: `(a, b) -> (a c - b s, b c + a s)`.
/// Where the pair lies is the [`RopeStyle`].
///
/// * `x`, `out`: `[num_tokens, num_heads, head_dim]`; `positions`: `[num_tokens]`
/// * `table`: cos and sin, each `[num_positions, rotary_dim / 2]` ([`Rope::table`])
///
/// # Errors
/// Those of [`Rope::validate`] and [`RopeTable::check`]; [`crate::Error::Shape`], [`crate::Error::Stride`],
/// [`crate::Error::Len`]. Nothing is written then.
///
/// Su et al. 2021, arXiv:2104.09864.
pub fn rope<T: Element, S: Element>(
    spec: &Rope,
    x: View<'_, T, 3>,
    positions: &[u32],
    table: &RopeTable<'_, S>,
    mut out: ViewMut<'_, f64, 3>,
) -> Result<()> {
    crate::args::check_rope(spec, &x, positions, table, &out)?;
    let [num_tokens, num_heads, _] = x.shape();
    for t in 0..num_tokens {
        for h in 0..num_heads {
            let head: Vec<f64> = x.row(&[t, h]).iter().map(|x| x.to_f64()).collect();
            out.row_mut(&[t, h]).copy_from_slice(&rotate(spec, &head, table, positions[t]));
        }
    }
    Ok(())
}

/// One head, rotated.
fn rotate<S: Element>(spec: &Rope, head: &[f64], table: &RopeTable<'_, S>, position: u32) -> Vec<f64> {
    let half = spec.rotary_dim / 2;
    let mut out = head.to_vec();
    for n in 0..half {
        let (from, to) = match spec.style {
            RopeStyle::Half => ((n, n + half), (n, n + half)),
            RopeStyle::Interleaved => ((2 * n, 2 * n + 1), (2 * n, 2 * n + 1)),
            RopeStyle::InterleavedToHalf => ((2 * n, 2 * n + 1), (n, n + half)),
        };
        let (cos, sin) = (table.cos.at([position as usize, n]).to_f64(), table.sin.at([position as usize, n]).to_f64());
        let (a, b) = (head[from.0], head[from.1]);
        out[to.0] = a * cos - b * sin;
        out[to.1] = b * cos + a * sin;
    }
    out
}

/// New rows of keys and values into a cache: row `i` of sequence `s` goes to row `kv_lens[s] + i` of its cache. A plain copy; all
/// other rows stay as they are.
///
/// * `k`, `v`: `[num_tokens, num_kv_heads, width]`; the cache: [`KvCacheMut`]
///
/// # Errors
/// Those of [`KvCache::check`]. Nothing is written then.
pub fn kv_append<T: Element>(input: &KvCache<'_, T>, mut cache: KvCacheMut<'_, T>) -> Result<()> {
    let num_seqs = input.check(&cache)?;
    let num_heads = input.k.shape()[1];
    for seq in 0..num_seqs {
        for (i, token) in input.rows(seq).enumerate() {
            let row = input.kv_lens[seq] as usize + i;
            let (k, v, block, row) = match &mut cache {
                KvCacheMut::Contiguous { k, v } => (k, v, seq, row),
                KvCacheMut::Paged { k, v, block_table } => {
                    let page_size = k.shape()[1];
                    (k, v, block_table.at([seq, row / page_size]) as usize, row % page_size)
                }
            };
            for h in 0..num_heads {
                k.row_mut(&[block, row, h]).copy_from_slice(input.k.row(&[token, h]));
                v.row_mut(&[block, row, h]).copy_from_slice(input.v.row(&[token, h]));
            }
        }
    }
    Ok(())
}
