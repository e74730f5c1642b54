//! Linear attention with a state instead of a cache: retention in its three forms, and RWKV-4's `wkv`.

use crate::args::{RetentionInput, RetentionOutput, WkvInput, WkvOutput};
use crate::spec::{Retention, RetentionForm};
use crate::{Element, Result};

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
/// is `state_in`.
///
/// # Errors
/// Those of [`RetentionInput::check`]. Nothing is written then.
///
/// Sun et al. 2023, arXiv:2307.08621.
pub fn retention<T: Element, S: Element>(
    spec: &Retention,
    input: &RetentionInput<'_, T, S>,
    mut output: RetentionOutput<'_, f64, f64>,
) -> Result<()> {
    let n = input.check(spec, &output)?;
    if n == 0 && output.state_out.is_none() {
        return Ok(());
    }
    let chunk = match spec.form {
        RetentionForm::Parallel => n.max(1),
        RetentionForm::Chunkwise(chunk) => chunk,
        RetentionForm::Recurrent => 1,
    };
    for h in 0..spec.num_heads {
        let mut head = Head::new(spec, input, h);
        let mut start = 0;
        while start < n {
            let end = start.saturating_add(chunk).min(n);
            if spec.form == RetentionForm::Recurrent {
                head.step(start);
                output.out.row_mut(&[start, h]).copy_from_slice(&head.read(start, 1.0));
            } else {
                for i in start..end {
                    output.out.row_mut(&[i, h]).copy_from_slice(&head.pairs(start, i));
                }
                head.advance(start, end);
            }
            start = end;
        }
        if let Some(out) = &mut output.state_out {
            for (d, row) in head.state.iter().enumerate() {
                out.row_mut(&[h, d]).copy_from_slice(row);
            }
        }
    }
    Ok(())
}

/// One head's inputs in f64, and its state before the next token.
struct Head {
    q: Vec<Vec<f64>>,
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    decay: f64,
    scale: f64,
    /// `[head_dim][value_dim]`
    state: Vec<Vec<f64>>,
}

impl Head {
    fn new<T: Element, S: Element>(spec: &Retention, input: &RetentionInput<'_, T, S>, h: usize) -> Self {
        let rows = |x: &crate::View<'_, T, 3>| -> Vec<Vec<f64>> {
            (0..x.shape()[0]).map(|t| x.row(&[t, h]).iter().map(|x| x.to_f64()).collect()).collect()
        };
        let state = |d: usize| match &input.state_in {
            Some(state) => state.row(&[h, d]).iter().map(|x| x.to_f64()).collect(),
            None => vec![0.0; spec.value_dim],
        };
        Head {
            q: rows(&input.q),
            k: rows(&input.k),
            v: rows(&input.v),
            decay: input.decay[h].to_f64(),
            scale: spec.scale,
            state: (0..spec.head_dim).map(state).collect(),
        }
    }

    fn decay_pow(&self, n: usize) -> f64 {
        self.decay.powf(n as f64)
    }

    /// `state = decay * state + k[i]^T v[i]`
    fn step(&mut self, i: usize) {
        for (row, k) in self.state.iter_mut().zip(&self.k[i]) {
            for (state, v) in row.iter_mut().zip(&self.v[i]) {
                *state = self.decay * *state + k * v;
            }
        }
    }

    /// `factor * scale * q[i] state`
    fn read(&self, i: usize, factor: f64) -> Vec<f64> {
        let mut out = vec![0.0; self.v[i].len()];
        for (q, row) in self.q[i].iter().zip(&self.state) {
            for (out, state) in out.iter_mut().zip(row) {
                *out += q * state;
            }
        }
        out.iter().map(|x| factor * self.scale * x).collect()
    }

    /// The output of token `i` from the pairs with the tokens from `start` on, and from the state before `start`.
    fn pairs(&self, start: usize, i: usize) -> Vec<f64> {
        let mut out = self.read(i, self.decay_pow(i - start + 1));
        for j in start..=i {
            let dot: f64 = self.q[i].iter().zip(&self.k[j]).map(|(q, k)| q * k).sum();
            let factor = self.decay_pow(i - j) * self.scale * dot;
            for (out, v) in out.iter_mut().zip(&self.v[j]) {
                *out += factor * v;
            }
        }
        out
    }

    /// The state after the tokens `start .. end`, all at once.
    fn advance(&mut self, start: usize, end: usize) {
        let fade = self.decay_pow(end - start);
        self.state.iter_mut().flatten().for_each(|state| *state *= fade);
        for j in start..end {
            let factor = self.decay_pow(end - 1 - j);
            for (row, k) in self.state.iter_mut().zip(&self.k[j]) {
                for (state, v) in row.iter_mut().zip(&self.v[j]) {
                    *state += factor * k * v;
                }
            }
        }
    }
}

/// RWKV-4's weighted average of the values so far. Per batch row and channel, with `w = -exp(decay)` and the state
/// `(num, den, max)`, for each token:
///
/// ```text
/// m   = max(max, k + first)
/// out = (e^(max - m) num + e^(k + first - m) v) / (e^(max - m) den + e^(k + first - m))
/// m   = max(max + w, k)
/// num = e^(max + w - m) num + e^(k - m) v,  den = e^(max + w - m) den + e^(k - m),  max = m
/// ```
///
/// * `k`, `v`, `out`: `[batch, seq, channels]`; `decay`, `first`: `[channels]`
/// * `state_in`, `state_out`: `[3, batch, channels]`; the state starts as `(0, 0, -1e38)`
///
/// # Errors
/// Those of [`WkvInput::check`]. Nothing is written then.
///
/// Peng et al. 2023, arXiv:2305.13048.
pub fn wkv<T: Element, S: Element>(input: &WkvInput<'_, T, S>, mut output: WkvOutput<'_, f64, f64>) -> Result<()> {
    let [batch, seq, channels] = input.check(&output)?;
    if seq == 0 && output.state_out.is_none() {
        return Ok(());
    }
    for b in 0..batch {
        for c in 0..channels {
            let fade = -input.decay[c].to_f64().exp();
            let first = input.first[c].to_f64();
            let mut state = [0.0, 0.0, -1e38];
            if let Some(given) = &input.state_in {
                state = std::array::from_fn(|i| given.at([i, b, c]).to_f64());
            }
            let [mut num, mut den, mut max] = state;
            for t in 0..seq {
                let (k, v) = (input.k.at([b, t, c]).to_f64(), input.v.at([b, t, c]).to_f64());
                let m = max.max(k + first);
                let (past, now) = ((max - m).exp(), (k + first - m).exp());
                output.out.set([b, t, c], (past * num + now * v) / (past * den + now));

                let m = (max + fade).max(k);
                let (past, now) = ((max + fade - m).exp(), (k - m).exp());
                (num, den, max) = (past * num + now * v, past * den + now, m);
            }
            if let Some(out) = &mut output.state_out {
                for (i, x) in [num, den, max].into_iter().enumerate() {
                    out.set([i, b, c], x);
                }
            }
        }
    }
    Ok(())
}
