//! Retention in its three forms: heads in parallel, the values of a head side by side in vectors.

use super::parallel::{self, Shared};
use super::rows::{RowKernel, SharedView, for_rows};
use super::simd::Simd;
use super::workspace::part_bytes;
use super::{Cpu, Float};
use crate::Result;
use crate::args::{RetentionInput, RetentionOutput};
use crate::spec::{Retention, RetentionForm};
use std::ops::Range;

/// Retention over one sequence of `n` tokens.
///
/// ```text
/// out[i, h]    = sum_{j <= i} decay[h]^(i - j) * scale * (q[i, h] . k[j, h]) * v[j, h] + decay[h]^(i + 1) * scale * q[i, h] state_in[h]
/// state_out[h] = sum_j decay[h]^(n - 1 - j) * k[j, h]^T v[j, h] + decay[h]^n * state_in[h]
/// ```
///
/// * `q`, `k`: `[num_tokens, num_heads, head_dim]`; `v`, `out`: `[num_tokens, num_heads, value_dim]`; `decay`: `[num_heads]`
/// * `state_in`, `state_out`: `[num_heads, head_dim, value_dim]`
///
/// The form says in which order this is computed ([`RetentionForm`]); the numbers are the same up to rounding. Zero tokens: `state_out`
/// is `state_in`. The state and all sums are f32, powers of the decay are rounded once; one rounding to `T` at the end.
///
/// # Errors
/// Those of [`RetentionInput::check`]. Nothing is written then.
///
/// Sun et al. 2023, arXiv:2307.08621.
pub fn retention<T: Float>(
    cpu: &mut Cpu,
    spec: &Retention,
    input: &RetentionInput<'_, T>,
    mut output: RetentionOutput<'_, T>,
) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    if num_tokens == 0 && output.state_out.is_none() {
        return Ok(());
    }
    let layout = Layout::new(spec, num_tokens);
    let mut carver = cpu.workspace.carve(retention_workspace_bytes(spec, num_tokens));
    let kernel = Heads {
        spec,
        input,
        num_tokens,
        out: SharedView::new(&mut output.out),
        state_out: output.state_out.as_mut().map(SharedView::new),
        scratch: Shared::new(carver.part(parallel::workers_for(spec.num_heads) * layout.len())),
        layout,
    };
    for_rows(cpu.level, spec.num_heads, 1, &kernel);
    Ok(())
}

/// Workspace of [`retention`] in the current thread pool.
pub fn retention_workspace_bytes(spec: &Retention, num_tokens: usize) -> usize {
    part_bytes::<f32>(parallel::workers_for(spec.num_heads).saturating_mul(Layout::new(spec, num_tokens).len()))
}

/// Scratch of a worker, in f32: the state, one row each of q, k, v and of the output, powers of the decay.
struct Layout {
    dim: usize,
    value_dim: usize,
    chunk: usize,
}

impl Layout {
    fn new(spec: &Retention, num_tokens: usize) -> Self {
        let chunk = match spec.form {
            RetentionForm::Parallel => num_tokens,
            RetentionForm::Chunkwise(chunk) => chunk.min(num_tokens),
            RetentionForm::Recurrent => 1,
        };
        Layout { dim: spec.head_dim, value_dim: spec.value_dim, chunk: chunk.max(1) }
    }

    /// Whole cache lines, so that no two workers share one.
    fn len(&self) -> usize {
        let state = self.dim.saturating_mul(self.value_dim);
        let rows = self.dim.saturating_add(self.value_dim).saturating_mul(2);
        state.saturating_add(rows).saturating_add(self.chunk).saturating_add(1 + 15) / 16 * 16
    }
}

struct Heads<'a, 'b, T> {
    spec: &'a Retention,
    input: &'a RetentionInput<'b, T>,
    num_tokens: usize,
    out: SharedView<'a, T, 3>,
    state_out: Option<SharedView<'a, f32, 3>>,
    scratch: Shared<'a, f32>,
    layout: Layout,
}

impl<T: Float> RowKernel for Heads<'_, '_, T> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, worker: usize, heads: Range<usize>) {
        let (dim, value_dim) = (self.layout.dim, self.layout.value_dim);
        // SAFETY: no two items with the same worker overlap in time.
        let scratch = unsafe { self.scratch.part(worker * self.layout.len(), self.layout.len()) };
        let (state, rest) = scratch.split_at_mut(dim * value_dim);
        let (q, rest) = rest.split_at_mut(dim);
        let (k, rest) = rest.split_at_mut(dim);
        let (v, rest) = rest.split_at_mut(value_dim);
        let (sum, powers) = rest.split_at_mut(value_dim);
        for h in heads {
            for (d, row) in state.chunks_exact_mut(value_dim).enumerate() {
                match &self.input.state_in {
                    Some(given) => row.copy_from_slice(given.row(&[h, d])),
                    None => row.fill(0.0),
                }
            }
            let decay = f64::from(self.input.decay[h]);
            for (n, power) in powers[..=self.layout.chunk].iter_mut().enumerate() {
                *power = decay.powf(n as f64) as f32;
            }
            let mut head = Head { state, q, k, v, sum, powers, scale: self.spec.scale as f32 };
            for start in (0..self.num_tokens).step_by(self.layout.chunk) {
                let end = (start + self.layout.chunk).min(self.num_tokens);
                if self.spec.form == RetentionForm::Recurrent {
                    head.step(simd, self, h, start);
                    self.store(simd, start, h, head.sum);
                } else {
                    for i in start..end {
                        head.pairs(simd, self, h, start, i);
                        self.store(simd, i, h, head.sum);
                    }
                    head.advance(simd, self, h, start..end);
                }
            }
            if let Some(out) = &self.state_out {
                for (d, row) in head.state.chunks_exact(value_dim).enumerate() {
                    // SAFETY: every head belongs to one item.
                    unsafe { out.row(&[h, d]) }.copy_from_slice(row);
                }
            }
        }
    }
}

impl<T: Float> Heads<'_, '_, T> {
    #[inline(always)]
    fn store<S: Simd>(&self, simd: S, t: usize, h: usize, sum: &[f32]) {
        // SAFETY: every head belongs to one item.
        let out = unsafe { self.out.row(&[t, h]) };
        for (out, sum) in out.chunks_mut(S::LANES).zip(sum.chunks(S::LANES)) {
            T::store_partial(simd, out, simd.load_partial(sum));
        }
    }
}

/// One head at work.
struct Head<'a> {
    /// `[head_dim][value_dim]`
    state: &'a mut [f32],
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// The row that is being computed.
    sum: &'a mut [f32],
    /// `powers[n]`: the decay to the power of `n`.
    powers: &'a [f32],
    scale: f32,
}

impl Head<'_> {
    /// `state = decay * state + k^T v`, `sum = scale * q state`
    #[inline(always)]
    fn step<S: Simd, T: Float>(&mut self, simd: S, call: &Heads<'_, '_, T>, h: usize, t: usize) {
        widen(simd, call.input.q.row(&[t, h]), self.q);
        widen(simd, call.input.k.row(&[t, h]), self.k);
        widen(simd, call.input.v.row(&[t, h]), self.v);
        let (width, decay) = (self.v.len(), simd.splat(self.powers[1]));
        for at in (0..width).step_by(S::LANES) {
            let end = (at + S::LANES).min(width);
            let v = simd.load_partial(&self.v[at..end]);
            let mut sum = simd.zero();
            for (row, (q, k)) in self.state.chunks_exact_mut(width).zip(self.q.iter().zip(&*self.k)) {
                let state = &mut row[at..end];
                let x = simd.fma(simd.splat(*k), v, simd.mul(decay, simd.load_partial(state)));
                simd.store_partial(state, x);
                sum = simd.fma(simd.splat(*q), x, sum);
            }
            simd.store_partial(&mut self.sum[at..end], simd.mul(sum, simd.splat(self.scale)));
        }
    }

    /// `sum`: the output of token `i` from the pairs with the tokens from `start` on, and from the state before `start`.
    #[inline(always)]
    fn pairs<S: Simd, T: Float>(&mut self, simd: S, call: &Heads<'_, '_, T>, h: usize, start: usize, i: usize) {
        widen(simd, call.input.q.row(&[i, h]), self.q);
        let width = self.v.len();
        let factor = simd.splat(self.powers[i - start + 1] * self.scale);
        for at in (0..width).step_by(S::LANES) {
            let end = (at + S::LANES).min(width);
            let mut sum = simd.zero();
            for (row, q) in self.state.chunks_exact(width).zip(&*self.q) {
                sum = simd.fma(simd.splat(*q), simd.load_partial(&row[at..end]), sum);
            }
            simd.store_partial(&mut self.sum[at..end], simd.mul(sum, factor));
        }
        for j in start..=i {
            let dot = dot(simd, self.q, call.input.k.row(&[j, h]));
            let factor = simd.splat(self.powers[i - j] * self.scale * dot);
            let v = call.input.v.row(&[j, h]);
            for (sum, v) in self.sum.chunks_mut(S::LANES).zip(v.chunks(S::LANES)) {
                simd.store_partial(sum, simd.fma(factor, T::load_partial(simd, v), simd.load_partial(sum)));
            }
        }
    }

    /// The state after some tokens, all at once.
    #[inline(always)]
    fn advance<S: Simd, T: Float>(&mut self, simd: S, call: &Heads<'_, '_, T>, h: usize, tokens: Range<usize>) {
        let width = self.v.len();
        let fade = self.powers[tokens.len()];
        self.state.iter_mut().for_each(|x| *x *= fade);
        for j in tokens.clone() {
            widen(simd, call.input.k.row(&[j, h]), self.k);
            widen(simd, call.input.v.row(&[j, h]), self.v);
            let power = self.powers[tokens.end - 1 - j];
            for (row, k) in self.state.chunks_exact_mut(width).zip(&*self.k) {
                let factor = simd.splat(power * k);
                for (x, v) in row.chunks_mut(S::LANES).zip(self.v.chunks(S::LANES)) {
                    simd.store_partial(x, simd.fma(factor, simd.load_partial(v), simd.load_partial(x)));
                }
            }
        }
    }
}

#[inline(always)]
fn widen<S: Simd, T: Float>(simd: S, from: &[T], to: &mut [f32]) {
    for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
        simd.store_partial(to, T::load_partial(simd, from));
    }
}

/// The sum of products, in two vectors of partial sums.
#[inline(always)]
fn dot<S: Simd, T: Float>(simd: S, a: &[f32], b: &[T]) -> f32 {
    let mut parts = [simd.zero(); 2];
    for (i, (a, b)) in a.chunks(S::LANES).zip(b.chunks(S::LANES)).enumerate() {
        parts[i % 2] = simd.fma(simd.load_partial(a), T::load_partial(simd, b), parts[i % 2]);
    }
    simd.sum(simd.add(parts[0], parts[1]))
}
