//! Arguments of what happens between projection and attention, and of the KV cache.

use crate::error::{Error, Result, check_len};
use crate::spec::{QkNorm, QkvPrep, Rope};
use crate::view::{View, ViewMut};

/// cos and sin per position, each `[num_positions, rotary_dim / 2]` (see [`Rope::table`]).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RopeTable<'a, S = f32> {
    /// cos
    pub cos: View<'a, S, 2>,
    /// sin
    pub sin: View<'a, S, 2>,
}

impl<'a, S> RopeTable<'a, S> {
    /// Both tables.
    pub const fn new(cos: View<'a, S, 2>, sin: View<'a, S, 2>) -> Self {
        RopeTable { cos, sin }
    }

    /// Checks the tables, and that every position is in them.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Value`] for a position outside the table.
    pub fn check(&self, rope: &Rope, positions: &[u32], num_tokens: usize) -> Result<()> {
        let [rows, _] = self.cos.shape();
        self.cos.check("cos", [rows, rope.rotary_dim / 2])?;
        self.sin.check("sin", [rows, rope.rotary_dim / 2])?;
        check_len("positions", positions.len(), num_tokens)?;
        match positions.iter().enumerate().find(|(_, p)| **p as usize >= rows) {
            Some((t, p)) => Err(Error::value(format!("positions[{t}]"), format!("below {rows}, the table's rows"), p)),
            None => Ok(()),
        }
    }
}

/// Projected rows and what prepares them for attention.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct QkvInput<'a, T, S = f32> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: View<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, head_dim]`
    pub k: View<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, value_dim]`
    pub v: View<'a, T, 3>,
    /// `[head_dim]` per head, `[num_heads * head_dim]` over all heads.
    pub q_norm: Option<&'a [S]>,
    /// `[head_dim]` per head, `[num_kv_heads * head_dim]` over all heads.
    pub k_norm: Option<&'a [S]>,
    /// cos and sin.
    pub rope: Option<RopeTable<'a, S>>,
    /// `[num_tokens]`: rows of the table; needed for RoPE and the query temperature, else may be empty.
    pub positions: &'a [u32],
}

/// Prepared rows.
#[derive(Debug)]
#[non_exhaustive]
pub struct QkvOutput<'a, O> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: ViewMut<'a, O, 3>,
    /// `[num_tokens, num_kv_heads, head_dim]`
    pub k: ViewMut<'a, O, 3>,
    /// `[num_tokens, num_kv_heads, value_dim]`
    pub v: ViewMut<'a, O, 3>,
}

impl<'a, O> QkvOutput<'a, O> {
    /// All three.
    pub const fn new(q: ViewMut<'a, O, 3>, k: ViewMut<'a, O, 3>, v: ViewMut<'a, O, 3>) -> Self {
        QkvOutput { q, k, v }
    }
}

impl<'a, T, S> QkvInput<'a, T, S> {
    /// Rows and positions; no norm weights, no table.
    pub const fn new(q: View<'a, T, 3>, k: View<'a, T, 3>, v: View<'a, T, 3>, positions: &'a [u32]) -> Self {
        QkvInput { q, k, v, q_norm: None, k_norm: None, rope: None, positions }
    }

    /// Validates the specification and every argument; gives the number of tokens.
    ///
    /// # Errors
    /// Those of [`QkvPrep::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Value`] for a position
    /// outside the table; [`Error::Presence`] where specification and arguments disagree.
    pub fn check<O>(&self, spec: &QkvPrep, output: &QkvOutput<'_, O>) -> Result<usize> {
        spec.validate()?;
        let n = self.q.shape()[0];
        let (heads, kv_heads) = (spec.num_heads, spec.num_kv_heads);
        self.q.check("q", [n, heads, spec.head_dim])?;
        self.k.check("k", [n, kv_heads, spec.head_dim])?;
        self.v.check("v", [n, kv_heads, spec.value_dim])?;
        for (name, weight, heads) in [("q_norm", self.q_norm, heads), ("k_norm", self.k_norm, kv_heads)] {
            match (weight, spec.qk_norm) {
                (Some(w), Some(QkNorm::PerHead)) => check_len(name, w.len(), spec.head_dim)?,
                (Some(w), Some(QkNorm::Full)) => check_len(name, w.len(), heads.saturating_mul(spec.head_dim))?,
                (None, None | Some(QkNorm::L2AfterRope)) => {}
                (None, _) => return Err(Error::missing(name, "the specification has this norm")),
                (Some(_), _) => return Err(Error::unexpected(name, "the specification has no such weights")),
            }
        }
        match (&spec.rope, &self.rope) {
            (Some(rope), Some(table)) => table.check(rope, self.positions, n)?,
            (Some(_), None) => return Err(Error::missing("rope", "the specification rotates queries and keys")),
            (None, Some(_)) => return Err(Error::unexpected("rope", "the specification does not rotate")),
            (None, None) if spec.q_temperature.is_some() => check_len("positions", self.positions.len(), n)?,
            (None, None) => {}
        }
        output.q.check("out.q", [n, heads, spec.head_dim])?;
        output.k.check("out.k", [n, kv_heads, spec.head_dim])?;
        output.v.check("out.v", [n, kv_heads, spec.value_dim])?;
        Ok(n)
    }
}

/// A KV cache that is written; layouts as [`super::Kv`].
#[derive(Debug)]
#[non_exhaustive]
pub enum KvCacheMut<'a, T> {
    /// The same room for every sequence: `[num_seqs, capacity, num_kv_heads, width]`.
    #[non_exhaustive]
    Contiguous {
        /// Keys.
        k: ViewMut<'a, T, 4>,
        /// Values.
        v: ViewMut<'a, T, 4>,
    },
    /// Pages: `[num_pages, page_size, num_kv_heads, width]`.
    #[non_exhaustive]
    Paged {
        /// Keys.
        k: ViewMut<'a, T, 4>,
        /// Values.
        v: ViewMut<'a, T, 4>,
        /// `[num_seqs, max_pages]`
        block_table: View<'a, u32, 2>,
    },
}

impl<'a, T> KvCacheMut<'a, T> {
    /// The same room for every sequence.
    pub const fn contiguous(k: ViewMut<'a, T, 4>, v: ViewMut<'a, T, 4>) -> Self {
        KvCacheMut::Contiguous { k, v }
    }

    /// Pages.
    pub const fn paged(k: ViewMut<'a, T, 4>, v: ViewMut<'a, T, 4>, block_table: View<'a, u32, 2>) -> Self {
        KvCacheMut::Paged { k, v, block_table }
    }
}

/// New rows for a KV cache: row `i` of sequence `s` goes to row `kv_lens[s] + i` of its cache.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KvCache<'a, T> {
    /// `[num_tokens, num_kv_heads, head_dim]`
    pub k: View<'a, T, 3>,
    /// `[num_tokens, num_kv_heads, value_dim]`
    pub v: View<'a, T, 3>,
    /// `[num_seqs + 1]`: sequence `s` owns the new rows `cu_seqlens[s] .. cu_seqlens[s + 1]`. `None`: one sequence.
    pub cu_seqlens: Option<&'a [u32]>,
    /// `[num_seqs]`: rows that are in the cache already.
    pub kv_lens: &'a [u32],
}

impl<'a, T> KvCache<'a, T> {
    /// All fields.
    pub const fn new(k: View<'a, T, 3>, v: View<'a, T, 3>, cu_seqlens: Option<&'a [u32]>, kv_lens: &'a [u32]) -> Self {
        KvCache { k, v, cu_seqlens, kv_lens }
    }

    /// New rows of a sequence.
    pub fn rows(&self, seq: usize) -> std::ops::Range<usize> {
        self.cu_seqlens.map_or(0..self.k.shape()[0], |c| c[seq] as usize..c[seq + 1] as usize)
    }

    /// Checks every argument; gives the number of sequences.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Value`] for prefix sums, lengths or pages out of range;
    /// [`Error::Overlap`] if two sequences would write the same page.
    pub fn check<O>(&self, cache: &KvCacheMut<'_, O>) -> Result<usize> {
        let [n, heads, head_dim] = self.k.shape();
        let value_dim = self.v.shape()[2];
        self.k.check("k", [n, heads, head_dim])?;
        self.v.check("v", [n, heads, value_dim])?;
        let num_seqs = match self.cu_seqlens {
            None => 1,
            Some(sums) => {
                super::check_prefix_sums("cu_seqlens", sums, n)?;
                sums.len() - 1
            }
        };
        check_len("kv_lens", self.kv_lens.len(), num_seqs)?;
        let (KvCacheMut::Contiguous { k, v } | KvCacheMut::Paged { k, v, .. }) = cache;
        let [blocks, block_rows, _, _] = k.shape();
        k.check("cache.k", [blocks, block_rows, heads, head_dim])?;
        v.check("cache.v", [blocks, block_rows, heads, value_dim])?;
        let room = match cache {
            KvCacheMut::Contiguous { k, .. } => {
                if blocks != num_seqs {
                    let expected = vec![num_seqs, block_rows, heads, head_dim];
                    let found = k.shape().to_vec();
                    return Err(Error::Shape { argument: "cache.k".into(), expected, found });
                }
                block_rows
            }
            KvCacheMut::Paged { block_table, .. } => {
                let [_, max_pages] = block_table.shape();
                block_table.check("block_table", [num_seqs, max_pages])?;
                if block_rows == 0 {
                    return Err(Error::value("cache.k.shape[1]", "at least 1 row per page", 0));
                }
                max_pages.saturating_mul(block_rows)
            }
        };
        for seq in 0..num_seqs {
            let end = self.rows(seq).len().saturating_add(self.kv_lens[seq] as usize);
            if end > room {
                let expected = format!("at most {room} rows with the new ones");
                return Err(Error::value(format!("kv_lens[{seq}]"), expected, end));
            }
        }
        if let KvCacheMut::Paged { block_table, .. } = cache {
            self.check_pages(block_table, num_seqs, blocks, block_rows)?;
        }
        Ok(num_seqs)
    }

    /// Pages that a sequence's new rows go to.
    fn pages(&self, seq: usize, page_size: usize) -> std::ops::Range<usize> {
        let (start, rows) = (self.kv_lens[seq] as usize, self.rows(seq).len());
        start / page_size..if rows == 0 { start / page_size } else { (start + rows).div_ceil(page_size) }
    }

    fn check_pages(&self, table: &View<'_, u32, 2>, num_seqs: usize, num_pages: usize, page_size: usize) -> Result<()> {
        for seq in 0..num_seqs {
            for page in self.pages(seq, page_size) {
                let id = table.at([seq, page]);
                let name = format!("block_table[{seq}, {page}]");
                if id as usize >= num_pages {
                    return Err(Error::value(name, format!("a page below {num_pages}"), id));
                }
                for other in 0..=seq {
                    for other_page in self.pages(other, page_size) {
                        if (other, other_page) < (seq, page) && table.at([other, other_page]) == id {
                            let other = format!("block_table[{other}, {other_page}]");
                            return Err(Error::Overlap { argument: name, other });
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
