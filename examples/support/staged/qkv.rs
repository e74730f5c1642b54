//! What happens between projection and attention, and the KV cache.

use super::{Staged, StagedMut, vector};
use gatefold::args::{KvCache, KvCacheMut, QkvInput, QkvOutput, RopeTable};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, KvRows, Queue};
use gatefold::spec::{QkvPrep, Rope};
use gatefold::{Element, Result, View, ViewMut};

/// [`cuda::rope`].
pub fn rope<T: Element>(
    driver: &dyn Driver,
    spec: &Rope,
    x: View<'_, T, 3>,
    positions: &[u32],
    table: &RopeTable<'_>,
    out: ViewMut<'_, T, 3>,
) -> Result<()> {
    let (x, positions) = (Staged::new(driver, x)?, vector(driver, positions)?);
    let (cos, sin) = (Staged::new(driver, table.cos)?, Staged::new(driver, table.sin)?);
    let mut staged = StagedMut::new(driver, &out)?;
    let mut queue = Queue::new(driver);
    let table = cuda::RopeTable::new(cos.view(), sin.view());
    cuda::rope(&mut queue, spec, x.view(), positions.view(), &table, staged.view())?;
    staged.finish(queue.stream(), out)
}

/// Everything that [`QkvInput`] refers to.
struct Input<'a, T> {
    q: Staged<'a, T, 3>,
    k: Staged<'a, T, 3>,
    v: Staged<'a, T, 3>,
    q_norm: Option<Staged<'a, f32, 1>>,
    k_norm: Option<Staged<'a, f32, 1>>,
    tables: Option<[Staged<'a, f32, 2>; 2]>,
    positions: Staged<'a, u32, 1>,
}

impl<'a, T: Element> Input<'a, T> {
    fn new(driver: &'a dyn Driver, input: &QkvInput<'_, T>) -> Result<Self> {
        Ok(Input {
            q: Staged::new(driver, input.q)?,
            k: Staged::new(driver, input.k)?,
            v: Staged::new(driver, input.v)?,
            q_norm: input.q_norm.map(|weight| vector(driver, weight)).transpose()?,
            k_norm: input.k_norm.map(|weight| vector(driver, weight)).transpose()?,
            tables: match input.rope {
                Some(table) => Some([Staged::new(driver, table.cos)?, Staged::new(driver, table.sin)?]),
                None => None,
            },
            positions: vector(driver, input.positions)?,
        })
    }

    fn view(&self) -> cuda::QkvInput<'_, T> {
        let mut input = cuda::QkvInput::new(self.q.view(), self.k.view(), self.v.view(), self.positions.view());
        input.q_norm = self.q_norm.as_ref().map(Staged::view);
        input.k_norm = self.k_norm.as_ref().map(Staged::view);
        input.rope = self.tables.as_ref().map(|[cos, sin]| cuda::RopeTable::new(cos.view(), sin.view()));
        input
    }
}

/// [`cuda::prepare_qkv`].
pub fn prepare_qkv<T: Element>(
    driver: &dyn Driver,
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    output: QkvOutput<'_, T>,
) -> Result<()> {
    let input = Input::new(driver, input)?;
    let mut q = StagedMut::new(driver, &output.q)?;
    let mut k = StagedMut::new(driver, &output.k)?;
    let mut v = StagedMut::new(driver, &output.v)?;
    let mut queue = Queue::new(driver);
    let staged = cuda::QkvOutput::new(q.view(), k.view(), v.view());
    cuda::prepare_qkv(&mut queue, spec, &input.view(), staged)?;
    q.finish(queue.stream(), output.q)?;
    k.finish(queue.stream(), output.k)?;
    v.finish(queue.stream(), output.v)
}

/// [`cuda::prepare_qkv_append`].
pub fn prepare_qkv_append<T: Element>(
    driver: &dyn Driver,
    spec: &QkvPrep,
    input: &QkvInput<'_, T>,
    (cu_seqlens, kv_lens): (Option<&[u32]>, &[u32]),
    q: ViewMut<'_, T, 3>,
    cache: KvCacheMut<'_, T>,
) -> Result<()> {
    let input = Input::new(driver, input)?;
    let cu_seqlens = cu_seqlens.map(|sums| vector(driver, sums)).transpose()?;
    let kv_lens = vector(driver, kv_lens)?;
    let mut staged = StagedMut::new(driver, &q)?;
    let mut queue = Queue::new(driver);
    with_cache(driver, cache, |cache| {
        let rows = KvRows::new(cu_seqlens.as_ref().map(Staged::view), kv_lens.view());
        cuda::prepare_qkv_append(&mut queue, spec, &input.view(), &rows, staged.view(), cache)
    })?;
    staged.finish(queue.stream(), q)
}

/// [`cuda::kv_append`].
pub fn kv_append<T: Element>(driver: &dyn Driver, input: &KvCache<'_, T>, cache: KvCacheMut<'_, T>) -> Result<()> {
    let (k, v) = (Staged::new(driver, input.k)?, Staged::new(driver, input.v)?);
    let cu_seqlens = input.cu_seqlens.map(|sums| vector(driver, sums)).transpose()?;
    let kv_lens = vector(driver, input.kv_lens)?;
    let mut queue = Queue::new(driver);
    with_cache(driver, cache, |cache| {
        let cu_seqlens = cu_seqlens.as_ref().map(Staged::view);
        let input = cuda::KvCache::new(k.view(), v.view(), cu_seqlens, kv_lens.view());
        cuda::kv_append(&mut queue, &input, cache)
    })
}

/// Runs a call that writes a cache, and copies the cache back.
fn with_cache<T: Element>(
    driver: &dyn Driver,
    cache: KvCacheMut<'_, T>,
    call: impl FnOnce(cuda::KvCacheMut<'_, T>) -> Result<()>,
) -> Result<()> {
    let (k, v, table) = match cache {
        KvCacheMut::Contiguous { k, v, .. } => (k, v, None),
        KvCacheMut::Paged { k, v, block_table, .. } => (k, v, Some(Staged::new(driver, block_table)?)),
        _ => unreachable!("a cache is contiguous or paged"),
    };
    let (mut staged_k, mut staged_v) = (StagedMut::new(driver, &k)?, StagedMut::new(driver, &v)?);
    call(match &table {
        None => cuda::KvCacheMut::contiguous(staged_k.view(), staged_v.view()),
        Some(table) => cuda::KvCacheMut::paged(staged_k.view(), staged_v.view(), table.view()),
    })?;
    let stream = cuda::Stream::LEGACY; // a new queue's
    staged_k.finish(stream, k)?;
    staged_v.finish(stream, v)
}
