//! The attention part: projections, rotation, cache, attention.

use super::super::layer::q_stride;
use super::weights::as_view;
use super::{DeviceLayer, unsupported};
use gatefold::Result;
use gatefold::cpu::Float;
use gatefold::cuda::{
    AttentionInput, AttentionOutput, DeviceView, Kv, KvCache, KvCacheMut, KvRows, QkvInput, attention, kv_append,
    linear_heads, mla_absorb_query, mla_project_value, norm, prepare_qkv_append, rope, sigmoid_mul,
};
use gatefold::spec::{Attention, AttentionBlock, GqaBlock, Layer, MlaBlock, Norm};

impl<T: Float> DeviceLayer<'_, T> {
    pub(super) fn project(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, tokens, .. } = self;
        let (n, hidden) = (tokens.n, spec.hidden_size);
        let x = a.attn_normed.view([n, hidden]);
        let q_raw = a.q_raw.view_mut([n, w.q.shape()[0]]);
        if let (Some(k), Some(v)) = (&w.k, &w.v) {
            w.q.run(queue, x, q_raw)?;
            k.run(queue, x, a.k_raw.view_mut([n, k.shape()[0]]))?;
            return v.run(queue, x, a.v_raw.view_mut([n, v.shape()[0]]));
        }
        let Some(latent) = &w.latent else { return Err(unsupported("attention block")) };
        match &latent.q_a {
            Some((q_a, weight)) => {
                let shape = [n, q_a.shape()[0]];
                q_a.run(queue, x, a.q_latent.view_mut(shape))?;
                let rms = Norm::rms(latent_of(spec)?.mla.latent_norm_eps);
                let (latent, normed) = (a.q_latent.view(shape), a.q_latent_normed.view_mut(shape));
                norm(queue, &rms, latent, Some(weight.view()), None, normed)?;
                w.q.run(queue, a.q_latent_normed.view(shape), q_raw)?;
            }
            None => w.q.run(queue, x, q_raw)?,
        }
        latent.kv_a.run(queue, x, a.k_raw.view_mut([n, latent.kv_a.shape()[0]]))
    }

    pub(super) fn prepare(&mut self) -> Result<()> {
        if self.weights.latent.is_some() { self.prepare_latent() } else { self.prepare_heads() }
    }

    pub(super) fn attend(&mut self) -> Result<()> {
        if self.weights.latent.is_some() { self.attend_latent() } else { self.attend_heads() }
    }

    /// Norms and rotation; keys and values go straight into the cache.
    fn prepare_heads(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, cache, tokens } = self;
        let block = heads_of(spec)?;
        let (n, dims) = (tokens.n, &block.attention);
        let (heads, kv_heads) = (dims.num_heads, dims.num_kv_heads);
        let stride = q_stride(block);
        let mut input = QkvInput::new(
            a.q_raw.strided(0, [n, heads, dims.head_dim], [heads * stride, stride, 1]),
            a.k_raw.view([n, kv_heads, dims.head_dim]),
            a.v_raw.view([n, kv_heads, dims.value_dim]),
            tokens.positions.view([n]),
        );
        (input.q_norm, input.k_norm) = (as_view(&w.q_norm), as_view(&w.k_norm));
        input.rope = w.rope_table();
        let k = cache.k.view_mut([1, cache.capacity, kv_heads, dims.head_dim]);
        let v = cache.v.view_mut([1, cache.capacity, kv_heads, dims.value_dim]);
        let rows = KvRows::new(None, tokens.old_len.view([1]));
        let q = a.q.view_mut([n, heads, dims.head_dim]);
        prepare_qkv_append(queue, &block.qkv_prep(&spec.norm), &input, &rows, q, KvCacheMut::contiguous(k, v))
    }

    fn attend_heads(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, cache, tokens } = self;
        let block = heads_of(spec)?;
        let (n, dims) = (tokens.n, &block.attention);
        let (heads, kv_heads, value_dim) = (dims.num_heads, dims.num_kv_heads, dims.value_dim);
        let k = cache.k.view([1, cache.capacity, kv_heads, dims.head_dim]);
        let v = cache.v.view([1, cache.capacity, kv_heads, value_dim]);
        let kv = Kv::cache(k, v, tokens.new_len.view([1]));
        let mut input = AttentionInput::new(a.q.view([n, heads, dims.head_dim]), kv);
        (input.sinks, input.alibi_slopes) = (as_view(&w.sinks), as_view(&w.alibi_slopes));
        input.relative_bias = w.relative_bias.as_ref().map(|table| table.view());
        let out = if block.output_gate { &mut a.ungated } else { &mut a.attention };
        attention(queue, dims, &input, AttentionOutput::new(out.view_mut([n, heads, value_dim])))?;
        if !block.output_gate {
            return Ok(());
        }
        // A head's gate stands behind its query: `[num_tokens * num_heads, value_dim]`, a query apart.
        let shape = [n * heads, value_dim];
        let gate = a.q_raw.strided(dims.head_dim, shape, [q_stride(block), 1]);
        sigmoid_mul(queue, a.ungated.view(shape), gate, a.attention.view_mut(shape))
    }

    /// A cache row is `[normed latent | rotated k_rope]`; queries are `[nope | rope]`, absorbed `[latent | rope]`.
    fn prepare_latent(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, cache, tokens } = self;
        let block = latent_of(spec)?;
        let (m, n, absorbed) = (&block.mla, tokens.n, tokens.absorbed);
        let (heads, nope, rope_dim, rank) = (m.num_heads, m.nope_dim, m.rope_dim, m.kv_lora_rank);
        let (Some(latent), Some(table)) = (&w.latent, w.rope_table()) else {
            return Err(unsupported("latent attention"));
        };
        let positions = tokens.positions.view([n]);
        let (row, q_head) = (rank + rope_dim, nope + rope_dim);
        let rms = Norm::rms(m.latent_norm_eps);
        let (raw, normed) = (a.k_raw.strided(0, [n, rank], [row, 1]), a.k_row.strided_mut(0, [n, rank], [row, 1]));
        norm(queue, &rms, raw, Some(latent.kv_a_norm.view()), None, normed)?;
        let k_rope = a.k_raw.strided(rank, [n, 1, rope_dim], [row, rope_dim, 1]);
        let rotated = a.k_row.strided_mut(rank, [n, 1, rope_dim], [row, rope_dim, 1]);
        rope(queue, &block.rope, k_rope, positions, &table, rotated)?;
        let no_values = a.k_row.strided(0, [n, 1, 0], [row, 0, 1]);
        let new = KvCache::new(a.k_row.view([n, 1, row]), no_values, None, tokens.old_len.view([1]));
        let rows = cache.k.view_mut([1, cache.capacity, 1, row]);
        kv_append(queue, &new, KvCacheMut::contiguous(rows, cache.v.view_mut([1, cache.capacity, 1, 0])))?;

        let first = if absorbed { rank } else { nope };
        let width = first + rope_dim;
        let q_rope = a.q_raw.strided(nope, [n, heads, rope_dim], [heads * q_head, q_head, 1]);
        let rotated = a.q.strided_mut(first, [n, heads, rope_dim], [heads * width, width, 1]);
        rope(queue, &block.rope, q_rope, positions, &table, rotated)?;
        let q_nope = a.q_raw.strided(0, [n, heads, nope], [heads * q_head, q_head, 1]);
        if absorbed {
            let out = a.q.strided_mut(0, [n, heads, rank], [heads * width, width, 1]);
            return mla_absorb_query(queue, m, q_nope, latent.kv_b.view(), out);
        }
        // Keys and values of all heads, from the new rows alone: nothing is in the cache before a prompt.
        let all = a.k_row.strided(0, [n, heads, rank], [row, 0, 1]);
        let k_nope = a.k_heads.strided_mut(0, [n, heads, nope], [heads * q_head, q_head, 1]);
        let of_keys = latent.kv_b.view();
        linear_heads(queue, all, of_keys.with_strides([heads, nope, rank], of_keys.strides()), k_nope)?;
        let k_rope = a.k_raw.strided(rank, [n, heads, rope_dim], [row, 0, 1]);
        let rotated = a.k_heads.strided_mut(nope, [n, heads, rope_dim], [heads * q_head, q_head, 1]);
        rope(queue, &block.rope, k_rope, positions, &table, rotated)?;
        mla_project_value(queue, m, all, latent.kv_b.view(), a.v_heads.view_mut([n, heads, m.value_dim]))?;
        // Rows appended to nothing: a copy of the part that is not rotated.
        let nothing = a.q_raw.strided(0, [n, heads, 0], [0, 0, 1]);
        let copy = KvCache::new(q_nope, nothing, None, tokens.zero.view([1]));
        let to = a.q.strided_mut(0, [1, n, heads, nope], [0, heads * q_head, q_head, 1]);
        kv_append(queue, &copy, KvCacheMut::contiguous(to, cache.v.view_mut([1, n, heads, 0])))
    }

    fn attend_latent(&mut self) -> Result<()> {
        let DeviceLayer { spec, queue, weights: w, arrays: a, cache, tokens } = self;
        let block = latent_of(spec)?;
        let (m, n) = (&block.mla, tokens.n);
        let (heads, rank, row) = (m.num_heads, m.kv_lora_rank, m.kv_lora_rank + m.rope_dim);
        let Some(latent) = &w.latent else { return Err(unsupported("latent attention")) };
        if !tokens.absorbed {
            let k = a.k_heads.view([n, heads, m.head_dim()]);
            let kv = Kv::ragged(k, a.v_heads.view([n, heads, m.value_dim]), None);
            let input = AttentionInput::new(a.q.view([n, heads, m.head_dim()]), kv);
            let out = AttentionOutput::new(a.attention.view_mut([n, heads, m.value_dim]));
            return attention(queue, &block.attention, &input, out);
        }
        // One head for all queries; the value is the first part of the key row: a view into the same cache.
        let k: DeviceView<'_, T, 4> = cache.k.view([1, cache.capacity, 1, row]);
        let v = k.with_strides([1, cache.capacity, 1, rank], k.strides());
        let input = AttentionInput::new(a.q.view([n, heads, row]), Kv::cache(k, v, tokens.new_len.view([1])));
        let absorbed: Attention = m.absorbed(&block.attention);
        attention(queue, &absorbed, &input, AttentionOutput::new(a.attended.view_mut([n, heads, rank])))?;
        let out = a.attention.view_mut([n, heads, m.value_dim]);
        mla_project_value(queue, m, a.attended.view([n, heads, rank]), latent.kv_b.view(), out)
    }
}

fn heads_of(spec: &Layer) -> Result<&GqaBlock> {
    match &spec.attention {
        AttentionBlock::Gqa(block) => Ok(block),
        _ => Err(unsupported("attention block")),
    }
}

fn latent_of(spec: &Layer) -> Result<&MlaBlock> {
    match &spec.attention {
        AttentionBlock::Mla(block) => Ok(block),
        _ => Err(unsupported("attention block")),
    }
}
