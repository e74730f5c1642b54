//! Arguments of attention: queries, keys and values in three layouts, sequences, masks and biases.

use super::check_prefix_sums;
use crate::error::{Error, Result, check_len, check_presence, why};
use crate::spec::Attention;
use crate::view::{View, ViewMut};

/// Keys and values. Row `j` of a sequence is its key number `j`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Kv<'a, T> {
    /// The rows of all sequences one behind the other; `k`: `[num_kv_tokens, num_kv_heads, head_dim]`, `v`: the same with
    /// `value_dim`.
    #[non_exhaustive]
    Ragged {
        /// Keys.
        k: View<'a, T, 3>,
        /// Values.
        v: View<'a, T, 3>,
        /// `[num_seqs + 1]`: sequence `s` owns the rows `cu_seqlens_kv[s] .. cu_seqlens_kv[s + 1]`. `None`: one sequence.
        cu_seqlens_kv: Option<&'a [u32]>,
    },
    /// A cache with the same room for every sequence; `k`: `[num_seqs, capacity, num_kv_heads, head_dim]`, `v`: the same
    /// with `value_dim`.
    #[non_exhaustive]
    Cache {
        /// Keys.
        k: View<'a, T, 4>,
        /// Values.
        v: View<'a, T, 4>,
        /// `[num_seqs]`: filled rows.
        kv_lens: &'a [u32],
    },
    /// A cache in pages; `k`: `[num_pages, page_size, num_kv_heads, head_dim]`, `v`: the same with `value_dim`. Row `j` of
    /// sequence `s` is row `j % page_size` of page `block_table[s, j / page_size]`.
    #[non_exhaustive]
    Paged {
        /// Keys.
        k: View<'a, T, 4>,
        /// Values.
        v: View<'a, T, 4>,
        /// `[num_seqs, max_pages]`; entries beyond a sequence's last page are not read.
        block_table: View<'a, u32, 2>,
        /// `[num_seqs]`: filled rows.
        kv_lens: &'a [u32],
    },
}

/// Rows of keys and values that lie at a constant distance: row `i` of `len` has its key at `k_offset + i * k_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvRun {
    /// Rows.
    pub len: usize,
    /// First element of the first row's key (head 0).
    pub k_offset: usize,
    /// First element of the first row's value (head 0).
    pub v_offset: usize,
}

impl<'a, T> Kv<'a, T> {
    /// One sequence, or several with `cu_seqlens_kv`.
    pub const fn ragged(k: View<'a, T, 3>, v: View<'a, T, 3>, cu_seqlens_kv: Option<&'a [u32]>) -> Self {
        Kv::Ragged { k, v, cu_seqlens_kv }
    }

    /// A cache with the same room for every sequence.
    pub const fn cache(k: View<'a, T, 4>, v: View<'a, T, 4>, kv_lens: &'a [u32]) -> Self {
        Kv::Cache { k, v, kv_lens }
    }

    /// A cache in pages.
    pub const fn paged(
        k: View<'a, T, 4>,
        v: View<'a, T, 4>,
        block_table: View<'a, u32, 2>,
        kv_lens: &'a [u32],
    ) -> Self {
        Kv::Paged { k, v, block_table, kv_lens }
    }

    /// The slices of keys and values.
    pub const fn data(&self) -> (&'a [T], &'a [T]) {
        match self {
            Kv::Ragged { k, v, .. } => (k.data(), v.data()),
            Kv::Cache { k, v, .. } | Kv::Paged { k, v, .. } => (k.data(), v.data()),
        }
    }

    /// Elements between the rows of a run: keys, values.
    pub const fn row_strides(&self) -> (usize, usize) {
        match self {
            Kv::Ragged { k, v, .. } => (k.strides()[0], v.strides()[0]),
            Kv::Cache { k, v, .. } | Kv::Paged { k, v, .. } => (k.strides()[1], v.strides()[1]),
        }
    }

    /// Elements between heads: keys, values.
    pub const fn head_strides(&self) -> (usize, usize) {
        match self {
            Kv::Ragged { k, v, .. } => (k.strides()[1], v.strides()[1]),
            Kv::Cache { k, v, .. } | Kv::Paged { k, v, .. } => (k.strides()[2], v.strides()[2]),
        }
    }

    /// Number of sequences.
    pub fn num_seqs(&self) -> usize {
        match self {
            Kv::Ragged { cu_seqlens_kv, .. } => cu_seqlens_kv.map_or(1, |c| c.len().saturating_sub(1)),
            Kv::Cache { kv_lens, .. } | Kv::Paged { kv_lens, .. } => kv_lens.len(),
        }
    }

    /// Rows of a sequence.
    pub fn len(&self, seq: usize) -> usize {
        match self {
            Kv::Ragged { k, cu_seqlens_kv: None, .. } => k.shape()[0],
            Kv::Ragged { cu_seqlens_kv: Some(c), .. } => (c[seq + 1] - c[seq]) as usize,
            Kv::Cache { kv_lens, .. } | Kv::Paged { kv_lens, .. } => kv_lens[seq] as usize,
        }
    }

    /// Whether no sequence has a row.
    pub fn is_empty(&self) -> bool {
        (0..self.num_seqs()).all(|seq| self.len(seq) == 0)
    }

    /// The longest run of rows of sequence `seq` that starts at row `j < len(seq)`.
    pub fn run(&self, seq: usize, j: usize) -> KvRun {
        let left = self.len(seq) - j;
        match self {
            Kv::Ragged { k, v, cu_seqlens_kv } => {
                let row = cu_seqlens_kv.map_or(0, |c| c[seq] as usize) + j;
                KvRun { len: left, k_offset: row * k.strides()[0], v_offset: row * v.strides()[0] }
            }
            Kv::Cache { k, v, .. } => KvRun {
                len: left,
                k_offset: seq * k.strides()[0] + j * k.strides()[1],
                v_offset: seq * v.strides()[0] + j * v.strides()[1],
            },
            Kv::Paged { k, v, block_table, .. } => {
                let page_size = k.shape()[1];
                let page = block_table.at([seq, j / page_size]) as usize;
                let row = j % page_size;
                KvRun {
                    len: left.min(page_size - row),
                    k_offset: page * k.strides()[0] + row * k.strides()[1],
                    v_offset: page * v.strides()[0] + row * v.strides()[1],
                }
            }
        }
    }

    /// Key row `j` of a sequence, head `g`, of width `head_dim`.
    pub fn key(&self, seq: usize, j: usize, g: usize, head_dim: usize) -> &'a [T] {
        let start = self.run(seq, j).k_offset + g * self.head_strides().0;
        &self.data().0[start..start + head_dim]
    }

    /// Value row `j` of a sequence, head `g`, of width `value_dim`.
    pub fn value(&self, seq: usize, j: usize, g: usize, value_dim: usize) -> &'a [T] {
        let start = self.run(seq, j).v_offset + g * self.head_strides().1;
        &self.data().1[start..start + value_dim]
    }

    fn check(&self, spec: &Attention, num_seqs: usize) -> Result<()> {
        let heads = spec.num_kv_heads;
        let check4 = |k: &View<'a, T, 4>, v: &View<'a, T, 4>| {
            let [n, rows, _, _] = k.shape();
            k.check("k", [n, rows, heads, spec.head_dim])?;
            v.check("v", [n, rows, heads, spec.value_dim])
        };
        match self {
            Kv::Ragged { k, v, cu_seqlens_kv } => {
                let rows = k.shape()[0];
                k.check("k", [rows, heads, spec.head_dim])?;
                v.check("v", [rows, heads, spec.value_dim])?;
                match cu_seqlens_kv {
                    Some(sums) => {
                        check_len("cu_seqlens_kv", sums.len(), num_seqs + 1)?;
                        check_prefix_sums("cu_seqlens_kv", sums, rows)
                    }
                    None if num_seqs == 1 => Ok(()),
                    None => Err(Error::missing("cu_seqlens_kv", "there is more than one sequence of queries")),
                }
            }
            Kv::Cache { k, v, kv_lens } => {
                check4(k, v)?;
                check_len("kv_lens", kv_lens.len(), num_seqs)?;
                let [seqs, capacity, _, _] = k.shape();
                if seqs != num_seqs {
                    let expected = vec![num_seqs, capacity, heads, spec.head_dim];
                    return Err(Error::Shape { argument: "k".into(), expected, found: k.shape().to_vec() });
                }
                check_lens(kv_lens, capacity, "the capacity of the cache")
            }
            Kv::Paged { k, v, block_table, kv_lens } => {
                check4(k, v)?;
                check_len("kv_lens", kv_lens.len(), num_seqs)?;
                let [num_pages, page_size, _, _] = k.shape();
                let [_, max_pages] = block_table.shape();
                block_table.check("block_table", [num_seqs, max_pages])?;
                if page_size == 0 {
                    return Err(Error::value("k.shape[1]", "at least 1 row per page", 0));
                }
                check_lens(kv_lens, max_pages.saturating_mul(page_size), "the pages of the block table")?;
                for (seq, len) in kv_lens.iter().enumerate() {
                    for page in 0..(*len as usize).div_ceil(page_size) {
                        let id = block_table.at([seq, page]);
                        if id as usize >= num_pages {
                            let name = format!("block_table[{seq}, {page}]");
                            return Err(Error::value(name, format!("a page below {num_pages}"), id));
                        }
                    }
                }
                Ok(())
            }
        }
    }
}

fn check_lens(kv_lens: &[u32], limit: usize, what: &str) -> Result<()> {
    match kv_lens.iter().enumerate().find(|(_, len)| **len as usize > limit) {
        Some((seq, len)) => Err(Error::value(format!("kv_lens[{seq}]"), format!("at most {limit}, {what}"), len)),
        None => Ok(()),
    }
}

/// Queries, keys, values, and all that comes with them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttentionInput<'a, T, S = f32> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: View<'a, T, 3>,
    /// Keys and values.
    pub kv: Kv<'a, T>,
    /// `[num_seqs + 1]`: sequence `s` owns the query rows `cu_seqlens_q[s] .. cu_seqlens_q[s + 1]`. `None`: one sequence.
    pub cu_seqlens_q: Option<&'a [u32]>,
    /// `[num_seqs]`: keys before this row of a sequence are padding (on the left). `None`: 0.
    pub kv_begin: Option<&'a [u32]>,
    /// `[num_seqs]`: absolute position of the first query. `None`: `k_start + kv_len - q_len`.
    pub q_start: Option<&'a [i64]>,
    /// `[num_seqs]`: absolute position of key row 0. `None`: 0.
    pub k_start: Option<&'a [i64]>,
    /// `[num_seqs or 1, num_heads or 1, max_q_len or 1, max_kv_len or 1]`: 0 hides the key; on top of all other masks.
    pub mask: Option<View<'a, u8, 4>>,
    /// `[num_seqs or 1, num_heads or 1, max_q_len or 1, max_kv_len or 1]`, added to the scores. -inf hides the key.
    pub bias: Option<View<'a, S, 4>>,
    /// `[num_heads]`: ALiBi (Press et al. 2021, arXiv:2108.12409) adds `-slope * |qi - kj|`, with `alibi_positions`
    /// `slope * position`.
    pub alibi_slopes: Option<&'a [S]>,
    /// `[num_seqs or 1, max_kv_len]`: the position of each key for ALiBi.
    pub alibi_positions: Option<View<'a, S, 2>>,
    /// `[num_buckets, num_heads]`: table of the relative bias.
    pub relative_bias: Option<View<'a, S, 2>>,
    /// `[num_heads]`: sink logits.
    pub sinks: Option<&'a [S]>,
}

/// What attention writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct AttentionOutput<'a, O, R = f32> {
    /// `[num_tokens, num_heads, value_dim]`
    pub out: ViewMut<'a, O, 3>,
    /// `[num_tokens, num_heads]`: natural logarithm of the sum of the exponentials of the scores, sink included.
    pub lse: Option<ViewMut<'a, R, 2>>,
}

impl<'a, O, R> AttentionOutput<'a, O, R> {
    /// Without `lse`.
    pub const fn new(out: ViewMut<'a, O, 3>) -> Self {
        AttentionOutput { out, lse: None }
    }

    /// With `lse`.
    pub const fn with_lse(out: ViewMut<'a, O, 3>, lse: ViewMut<'a, R, 2>) -> Self {
        AttentionOutput { out, lse: Some(lse) }
    }
}

/// Sizes of a checked call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttentionShape {
    /// Sequences.
    pub num_seqs: usize,
    /// Query rows over all sequences.
    pub num_tokens: usize,
    /// Query rows of the longest sequence.
    pub max_q_len: usize,
    /// Key rows of the longest sequence.
    pub max_kv_len: usize,
}

/// One sequence of a checked call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sequence {
    /// Its number.
    pub index: usize,
    /// First query row.
    pub q_begin: usize,
    /// Query rows.
    pub q_len: usize,
    /// First key row that is not padding.
    pub kv_begin: usize,
    /// Key rows.
    pub kv_len: usize,
    /// Absolute position of the first query row.
    pub q_start: i64,
    /// Absolute position of key row 0.
    pub k_start: i64,
}

impl Sequence {
    /// Key rows that query row `i` may see by position and length: `start .. end`, empty if `start >= end`.
    pub fn visible_rows(&self, spec: &Attention, i: usize) -> std::ops::Range<usize> {
        let range = spec.mask.visible_range(self.q_start + i as i64);
        let row = |position: i64| position.saturating_sub(self.k_start).clamp(0, self.kv_len as i64) as usize;
        row(range.start).max(self.kv_begin)..row(range.end)
    }
}

impl<'a, T, S: Copy> AttentionInput<'a, T, S> {
    /// One sequence (with [`Kv::Ragged`]) and nothing optional.
    pub const fn new(q: View<'a, T, 3>, kv: Kv<'a, T>) -> Self {
        AttentionInput {
            q,
            kv,
            cu_seqlens_q: None,
            kv_begin: None,
            q_start: None,
            k_start: None,
            mask: None,
            bias: None,
            alibi_slopes: None,
            alibi_positions: None,
            relative_bias: None,
            sinks: None,
        }
    }

    /// Validates the specification and every argument.
    ///
    /// # Errors
    /// Those of [`Attention::validate`]; [`Error::Shape`], [`Error::Stride`] and [`Error::Len`] for an array that does not
    /// fit; [`Error::Value`] for prefix sums, lengths or pages out of range; [`Error::Presence`] where specification
    /// and arguments disagree.
    pub fn check<O, R>(&self, spec: &Attention, output: &AttentionOutput<'_, O, R>) -> Result<AttentionShape> {
        spec.validate()?;
        let num_tokens = self.q.shape()[0];
        self.q.check("q", [num_tokens, spec.num_heads, spec.head_dim])?;
        let num_seqs = match self.cu_seqlens_q {
            None => 1,
            Some(sums) => {
                check_prefix_sums("cu_seqlens_q", sums, num_tokens)?;
                sums.len() - 1
            }
        };
        self.kv.check(spec, num_seqs)?;
        let mut shape = AttentionShape { num_seqs, num_tokens, max_q_len: 0, max_kv_len: 0 };
        for (name, len) in [
            ("kv_begin", self.kv_begin.map(<[_]>::len)),
            ("q_start", self.q_start.map(<[_]>::len)),
            ("k_start", self.k_start.map(<[_]>::len)),
        ] {
            if let Some(len) = len {
                check_len(name, len, num_seqs)?;
            }
        }
        for (name, starts) in [("q_start", self.q_start), ("k_start", self.k_start)] {
            for (seq, start) in starts.unwrap_or_default().iter().enumerate() {
                // Positions stay far from the ends of i64, so that sums of them cannot overflow.
                if start.unsigned_abs() > 1 << 48 {
                    return Err(Error::value(format!("{name}[{seq}]"), "between -2^48 and 2^48", start));
                }
            }
        }
        for index in 0..num_seqs {
            let seq = self.sequence(index);
            shape.max_q_len = shape.max_q_len.max(seq.q_len);
            shape.max_kv_len = shape.max_kv_len.max(seq.kv_len);
            if seq.kv_begin > seq.kv_len {
                let expected = format!("at most {}, the keys of the sequence", seq.kv_len);
                return Err(Error::value(format!("kv_begin[{index}]"), expected, seq.kv_begin));
            }
        }
        let scores = [num_seqs, spec.num_heads, shape.max_q_len, shape.max_kv_len];
        if let Some(mask) = &self.mask {
            mask.check_broadcast("mask", scores)?;
        }
        if let Some(bias) = &self.bias {
            bias.check_broadcast("bias", scores)?;
        }
        if let Some(slopes) = check_presence("alibi_slopes", self.alibi_slopes, spec.alibi, why::ALIBI)? {
            check_len("alibi_slopes", slopes.len(), spec.num_heads)?;
        }
        if let Some(positions) = &self.alibi_positions {
            if !spec.alibi {
                return Err(Error::unexpected("alibi_positions", "the specification has no ALiBi"));
            }
            let seqs = if positions.shape()[0] == 1 { 1 } else { num_seqs };
            positions.check("alibi_positions", [seqs, shape.max_kv_len])?;
        }
        let has_table = spec.relative_bias.is_some();
        let table = check_presence("relative_bias", self.relative_bias, has_table, why::RELATIVE_BIAS)?;
        if let (Some(table), Some(bias)) = (table, &spec.relative_bias) {
            table.check("relative_bias", [bias.num_buckets, spec.num_heads])?;
        }
        if let Some(sinks) = check_presence("sinks", self.sinks, spec.sinks, why::SINKS)? {
            check_len("sinks", sinks.len(), spec.num_heads)?;
        }
        output.out.check("out", [num_tokens, spec.num_heads, spec.value_dim])?;
        if let Some(lse) = &output.lse {
            lse.check("lse", [num_tokens, spec.num_heads])?;
        }
        Ok(shape)
    }

    /// One sequence of arguments that [`AttentionInput::check`] has accepted.
    pub fn sequence(&self, index: usize) -> Sequence {
        let (q_begin, q_end) = match self.cu_seqlens_q {
            Some(sums) => (sums[index] as usize, sums[index + 1] as usize),
            None => (0, self.q.shape()[0]),
        };
        let (q_len, kv_len) = (q_end - q_begin, self.kv.len(index));
        let k_start = self.k_start.map_or(0, |s| s[index]);
        Sequence {
            index,
            q_begin,
            q_len,
            kv_begin: self.kv_begin.map_or(0, |b| b[index] as usize),
            kv_len,
            q_start: self.q_start.map_or(k_start + kv_len as i64 - q_len as i64, |s| s[index]),
            k_start,
        }
    }
}
