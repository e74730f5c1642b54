//! Attention.

use super::{Staged, StagedMut, vector};
use gatefold::args::{AttentionInput, AttentionOutput, Kv};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::spec::Attention;
use gatefold::{Element, Result, View};

/// `cuda::attention` on arrays of the host. The bounds of the lengths are the longest sequences.
pub fn attention<T: Element>(
    driver: &dyn Driver,
    spec: &Attention,
    input: &AttentionInput<'_, T, f32>,
    output: AttentionOutput<'_, T, f32>,
) -> Result<()> {
    let shape = input.check(spec, &output)?; // lengths on the device are not checked: here they are those of the reference
    let optional = |data: Option<&[u32]>| data.map(|data| vector(driver, data)).transpose();
    let starts = |data: Option<&[i64]>| data.map(|data| vector(driver, data)).transpose();
    let numbers = |data: Option<&[f32]>| data.map(|data| vector(driver, data)).transpose();
    let q = Staged::new(driver, input.q)?;
    let (cu_seqlens_q, kv_begin) = (optional(input.cu_seqlens_q)?, optional(input.kv_begin)?);
    let (q_start, k_start) = (starts(input.q_start)?, starts(input.k_start)?);
    let (mask, bias) = (Staged::option(driver, input.mask)?, Staged::option(driver, input.bias)?);
    let (slopes, sinks) = (numbers(input.alibi_slopes)?, numbers(input.sinks)?);
    let positions = Staged::option(driver, input.alibi_positions)?;
    let table = Staged::option(driver, input.relative_bias)?;

    // Keys and values, of whichever rank.
    let (k, v) = match input.kv {
        Kv::Ragged { k, v, .. } => (as_block(k), as_block(v)),
        Kv::Cache { k, v, .. } | Kv::Paged { k, v, .. } => (k, v),
        _ => unreachable!("three layouts"),
    };
    let same = std::ptr::eq(k.data(), v.data()); // values that are columns of the keys stay so
    let k = Staged::new(driver, k)?;
    let v = if same { None } else { Some(Staged::new(driver, v)?) };
    let v = match &v {
        Some(staged) => staged.view(),
        None => {
            let [blocks, rows, heads, _] = k.view().shape();
            k.view().with_strides([blocks, rows, heads, spec.value_dim], k.view().strides())
        }
    };
    let lens = match input.kv {
        Kv::Ragged { cu_seqlens_kv, .. } => optional(cu_seqlens_kv)?,
        Kv::Cache { kv_lens, .. } | Kv::Paged { kv_lens, .. } => optional(Some(kv_lens))?,
        _ => unreachable!("three layouts"),
    };
    let block_table = match input.kv {
        Kv::Paged { block_table, .. } => Some(Staged::new(driver, block_table)?),
        _ => None,
    };
    let lens = lens.as_ref().map(Staged::view);
    let kv = match (&block_table, lens, input.kv) {
        (Some(table), Some(lens), _) => cuda::Kv::paged(k.view(), v, table.view(), lens),
        (None, Some(lens), Kv::Cache { .. }) => cuda::Kv::cache(k.view(), v, lens),
        (_, lens, _) => cuda::Kv::ragged(rows(k.view()), rows(v), lens),
    };

    let mut staged = cuda::AttentionInput::new(q.view(), kv);
    staged.cu_seqlens_q = cu_seqlens_q.as_ref().map(Staged::view);
    staged.max_q_len = Some(shape.max_q_len);
    staged.max_kv_len = Some(shape.max_kv_len);
    staged.kv_begin = kv_begin.as_ref().map(Staged::view);
    staged.q_start = q_start.as_ref().map(Staged::view);
    staged.k_start = k_start.as_ref().map(Staged::view);
    staged.mask = mask.as_ref().map(Staged::view);
    staged.bias = bias.as_ref().map(Staged::view);
    staged.alibi_slopes = slopes.as_ref().map(Staged::view);
    staged.alibi_positions = positions.as_ref().map(Staged::view);
    staged.relative_bias = table.as_ref().map(Staged::view);
    staged.sinks = sinks.as_ref().map(Staged::view);

    let AttentionOutput { out, lse, .. } = output;
    let mut staged_out = StagedMut::new(driver, &out)?;
    let mut staged_lse = lse.as_ref().map(|lse| StagedMut::new(driver, lse)).transpose()?;
    let mut queue = Queue::new(driver);
    let staged_output = match &mut staged_lse {
        Some(lse) => cuda::AttentionOutput::with_lse(staged_out.view(), lse.view()),
        None => cuda::AttentionOutput::new(staged_out.view()),
    };
    cuda::attention(&mut queue, spec, &staged, staged_output)?;
    let stream = queue.stream();
    staged_out.finish(stream, out)?;
    staged_lse.zip(lse).map_or(Ok(()), |(staged, lse)| staged.finish(stream, lse))
}

/// Ragged rows as one block.
fn as_block<T>(rows: View<'_, T, 3>) -> View<'_, T, 4> {
    let ([n, heads, width], [row, head, one]) = (rows.shape(), rows.strides());
    View::with_strides(rows.data(), [1, n, heads, width], [0, row, head, one])
}

/// The rows of the only block.
fn rows<T>(block: cuda::DeviceView<'_, T, 4>) -> cuda::DeviceView<'_, T, 3> {
    let ([_, n, heads, width], [_, row, head, one]) = (block.shape(), block.strides());
    block.with_strides([n, heads, width], [row, head, one])
}
