//! Softmax attention: heads, widths, mask and what is done to a score.

use super::{Mask, finite, positive, positive_number};
use crate::error::{Error, Result};

/// Scaled dot-product attention with grouped key/value heads.
///
/// For query `i` and head `h`, with `g = h / (num_heads / num_kv_heads)`:
///
/// ```text
/// s[j]   = softmax_scale * q[i, h] . k[j, g]
/// s[j]   = softcap * tanh(s[j] / softcap)                      with a softcap
/// s[j]  += bias + ALiBi + relative bias                        each where given
/// s[j]   = -inf where the mask, the explicit mask or the lengths hide key j
/// lse    = ln(sum_j exp(s[j]) + exp(sink[h]))                  the sink where given
/// out    = sum_j exp(s[j] - lse) * v[j, g]
/// ```
///
/// A query that sees no key gets `out = 0`; its `lse` is `-inf`, or the sink.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Attention {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`. Fewer than `num_heads`: grouped-query attention; 1: multi-query.
    pub num_kv_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor on the dot product; a positive number. The constructor takes `1 / sqrt(head_dim)`.
    pub softmax_scale: f64,
    /// Which key a query may see, by position.
    pub mask: Mask,
    /// `s = softcap * tanh(s / softcap)` after scaling, before biases and mask.
    pub softcap: Option<f64>,
    /// T5's bias by bucketed distance; the call gives the table.
    pub relative_bias: Option<RelativeBias>,
    /// The call gives one ALiBi slope per head.
    pub alibi: bool,
    /// The call gives one sink logit per head: a score without a value, in the denominator and the `lse` only.
    pub sinks: bool,
}

impl Default for Attention {
    /// One head of width 64, no mask.
    fn default() -> Self {
        Attention::new(1, 1, 64)
    }
}

impl Attention {
    /// No mask, scale `1 / sqrt(head_dim)`, values as wide as keys.
    pub fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        Attention {
            num_heads,
            num_kv_heads,
            head_dim,
            value_dim: head_dim,
            softmax_scale: (head_dim as f64).sqrt().recip(),
            mask: Mask::default(),
            softcap: None,
            relative_bias: None,
            alibi: false,
            sinks: false,
        }
    }

    /// [`Attention::new`] with a causal mask.
    pub fn causal(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        Attention { mask: Mask::causal(), ..Attention::new(num_heads, num_kv_heads, head_dim) }
    }

    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// # Errors
    /// [`Error::Value`] for a size of 0, heads that do not divide, a scale or soft-cap that is not a positive number.
    pub fn validate(&self) -> Result<()> {
        positive("num_heads", self.num_heads)?;
        positive("num_kv_heads", self.num_kv_heads)?;
        positive("head_dim", self.head_dim)?;
        positive("value_dim", self.value_dim)?;
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let expected = format!("a divisor of num_heads ({})", self.num_heads);
            return Err(Error::value("num_kv_heads", expected, self.num_kv_heads));
        }
        positive_number("softmax_scale", self.softmax_scale)?;
        self.mask.validate()?;
        if let Some(softcap) = self.softcap {
            positive_number("softcap", softcap)?;
        }
        if let Some(bias) = &self.relative_bias {
            bias.validate()?;
        }
        Ok(())
    }
}

/// T5's relative-position bias: `bias[h, i, j] = table[bucket(kj - qi), h]`, near distances exactly, far ones by logarithm.
///
/// Raffel et al. 2020, arXiv:1910.10683.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct RelativeBias {
    /// Rows of the table.
    pub num_buckets: usize,
    /// Distances from here on share the last bucket.
    pub max_distance: usize,
    /// Half of the buckets for keys behind the query; otherwise those count as distance 0.
    pub bidirectional: bool,
}

impl RelativeBias {
    /// All three fields.
    pub const fn new(num_buckets: usize, max_distance: usize, bidirectional: bool) -> Self {
        RelativeBias { num_buckets, max_distance, bidirectional }
    }

    /// Buckets for one direction, and how many of them stand for exactly one distance.
    fn buckets(&self) -> (usize, usize) {
        let n = if self.bidirectional { self.num_buckets / 2 } else { self.num_buckets };
        (n, n / 2)
    }

    /// # Errors
    /// [`Error::Value`] if there are too few buckets, or if `max_distance` lies within the exact ones.
    pub fn validate(&self) -> Result<()> {
        let (_, exact) = self.buckets();
        if exact == 0 {
            let least = if self.bidirectional { 4 } else { 2 };
            return Err(Error::value("num_buckets", format!("at least {least}"), self.num_buckets));
        }
        if self.max_distance <= exact {
            return Err(Error::value("max_distance", format!("more than {exact}"), self.max_distance));
        }
        Ok(())
    }

    /// Row of the table for a key `distance = kj - qi` behind the query (negative: before it).
    ///
    /// With `n` buckets for one direction, `m = n / 2` and `r = |distance|`: `r` if `r < m`, otherwise
    /// `min(n - 1, m + trunc(ln(r / m) / ln(max_distance / m) * (n - m)))`. The logarithms are taken in f64.
    pub fn bucket(&self, distance: i64) -> usize {
        let (n, exact) = self.buckets();
        let mut base = 0;
        let r = if self.bidirectional {
            if distance > 0 {
                base = n;
            }
            distance.unsigned_abs()
        } else {
            distance.min(0).unsigned_abs()
        };
        if r < exact as u64 {
            return base + r as usize;
        }
        let log = (r as f64 / exact as f64).ln() / (self.max_distance as f64 / exact as f64).ln();
        base + (n - 1).min(exact + (log * (n - exact) as f64) as usize)
    }
}

/// Widths are added; sums of a few this large fit any `usize`.
const MAX_WIDTH: usize = 1 << 28;

/// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from one latent row
/// per token, which is what the cache holds.
///
/// With `w_uk[h]: [nope_dim, kv_lora_rank]` and `w_uv[h]: [value_dim, kv_lora_rank]` the rows of `kv_b_proj`:
/// * expanded: `k[h] = [w_uk[h] c | k_rope]`, `v[h] = w_uv[h] c`, then attention with `head_dim = nope_dim + rope_dim`
/// * absorbed: `q'[h] = [w_uk[h]^T q_nope | q_rope]`, attention with one key/value head of width
///   `kv_lora_rank + rope_dim` whose value is its first `kv_lora_rank` columns, then `out[h] = w_uv[h] o[h]`
#[derive(Clone, Debug, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Mla {
    /// Heads.
    pub num_heads: usize,
    /// Width of the compressed query, where queries are compressed.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent row.
    pub kv_lora_rank: usize,
    /// Width of the part of a query or key head that is not rotated.
    pub nope_dim: usize,
    /// Width of the rotated part; its key is shared by all heads.
    pub rope_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Epsilon of the RMS norms of the compressed rows.
    pub latent_norm_eps: f64,
}

impl Mla {
    /// Queries from the hidden state directly, norms with epsilon 1e-6.
    pub fn new(num_heads: usize, kv_lora_rank: usize, nope_dim: usize, rope_dim: usize, value_dim: usize) -> Self {
        Mla { num_heads, q_lora_rank: None, kv_lora_rank, nope_dim, rope_dim, value_dim, latent_norm_eps: 1e-6 }
    }

    /// Width of a query or key head in the expanded form.
    pub fn head_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }

    /// The attention of the expanded form, causal, scale `1 / sqrt(head_dim)`.
    pub fn expanded(&self) -> Attention {
        Attention { value_dim: self.value_dim, ..Attention::causal(self.num_heads, self.num_heads, self.head_dim()) }
    }

    /// The attention of the absorbed form for the same mask and scale as `expanded`.
    pub fn absorbed(&self, expanded: &Attention) -> Attention {
        Attention {
            num_kv_heads: 1,
            head_dim: self.kv_lora_rank + self.rope_dim,
            value_dim: self.kv_lora_rank,
            ..expanded.clone()
        }
    }

    /// # Errors
    /// [`Error::Value`] for a size of 0, widths whose sum is beyond all memory, or a negative epsilon.
    pub fn validate(&self) -> Result<()> {
        positive("num_heads", self.num_heads)?;
        for (name, width) in [
            ("kv_lora_rank", self.kv_lora_rank),
            ("nope_dim", self.nope_dim),
            ("rope_dim", self.rope_dim),
            ("value_dim", self.value_dim),
        ] {
            positive(name, width)?;
            if width > MAX_WIDTH {
                return Err(Error::value(name, format!("at most {MAX_WIDTH}"), width));
            }
        }
        if let Some(rank) = self.q_lora_rank {
            positive("q_lora_rank", rank)?;
        }
        finite("latent_norm_eps", self.latent_norm_eps)?;
        super::non_negative_number("latent_norm_eps", self.latent_norm_eps)
    }
}
