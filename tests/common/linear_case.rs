//! Cases of linear attention: retention in its forms and RWKV-4's `wkv`, with the truth and the naive method beside them.

use super::buffer::{Array, Layout, Output};
use super::data::Rng;
use super::glue_case::{EXP_ERROR, array, exp, take_worse, values_of, vector};
use super::sums::{assert_sums, naive_sum, starts_for};
use gatefold::args::{RetentionInput, RetentionOutput, WkvInput, WkvOutput};
use gatefold::spec::{Retention, RetentionForm};
use gatefold::{Element, Result, ViewMut, reference};

/// Outputs in the storage type, and a state.
pub type WithState<O, R> = (Vec<O>, Vec<R>);

/// Runs a call with an output in the storage type and a state in f32.
fn run_two<O: bytemuck::Pod, R: bytemuck::Pod>(
    shape: [usize; 3],
    state_shape: [usize; 3],
    layout: Layout,
    f: impl FnOnce(ViewMut<'_, O, 3>, ViewMut<'_, R, 3>) -> Result<()>,
) -> (Vec<O>, Vec<R>) {
    let (mut out, mut state) = (Output::new(shape, layout), Output::new(state_shape, layout));
    f(out.view(), state.view()).unwrap();
    (out.finish("out"), state.finish("state_out"))
}

/// Both outputs as f32, which holds them exactly.
pub fn f32s<T: Element>((out, state): (Vec<T>, Vec<f32>)) -> Vec<f32> {
    out.iter().map(|x| x.to_f32()).chain(state).collect()
}

/// One call of `retention`.
pub struct RetentionCase<T> {
    pub spec: Retention,
    pub q: Array<T, 3>,
    pub k: Array<T, 3>,
    pub v: Array<T, 3>,
    pub decay: Vec<f32>,
    pub state: Option<Array<f32, 3>>,
    pub layout: Layout,
}

impl<T: Element> RetentionCase<T> {
    pub fn new(spec: &Retention, n: usize, layout: Layout, with_state: bool, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (heads, dim, value_dim) = (spec.num_heads, spec.head_dim, spec.value_dim);
        let q = array::<T, 3>(&mut rng, [n, heads, dim], layout);
        let k = array::<T, 3>(&mut rng, [n, heads, dim], layout);
        let v = array::<T, 3>(&mut rng, [n, heads, value_dim], layout);
        let decay: Vec<f32> = (0..heads).map(|h| 1.0 - 0.5f32.powi(2 + h as i32)).collect();
        let state = Array::new([heads, dim, value_dim], layout, &vector(&mut rng, heads * dim * value_dim));
        RetentionCase { spec: spec.clone(), q, k, v, decay, state: with_state.then_some(state), layout }
    }

    pub fn run<O: Element, R: Element>(
        &self,
        f: impl FnOnce(&Retention, &RetentionInput<'_, T>, RetentionOutput<'_, O, R>) -> Result<()>,
    ) -> WithState<O, R> {
        let mut input = RetentionInput::new(self.q.view(), self.k.view(), self.v.view(), &self.decay);
        input.state_in = self.state.as_ref().map(|state| state.view());
        let state_shape = [self.spec.num_heads, self.spec.head_dim, self.spec.value_dim];
        run_two(self.v.shape(), state_shape, self.layout, |out, state| {
            f(&self.spec, &input, RetentionOutput::with_state(out, state))
        })
    }

    /// The truth, and the naive method.
    pub fn expected(&self) -> (WithState<f64, f64>, WithState<T, f32>) {
        let RetentionCase { spec, q, k, v, decay, .. } = self;
        let [n, heads, value_dim] = v.shape();
        let dim = spec.head_dim;
        let truth = self.run(reference::retention);
        // Every product by itself, summed in f32.
        let starts = starts_for(truth.0.len());
        let power = |h: usize, n: usize| f64::from(decay[h]).powi(n as i32) as f32;
        let mut naive = Vec::new();
        for i in 0..n * heads * value_dim {
            let (t, h, c) = (i / value_dim / heads, i / value_dim % heads, i % value_dim);
            let mut terms = Vec::new();
            for d in 0..dim {
                let q = spec.scale as f32 * q.at([t, h, d]).to_f32();
                if let Some(state) = &self.state {
                    terms.push(power(h, t + 1) * q * state.at([h, d, c]));
                }
                terms
                    .extend((0..=t).map(|j| power(h, t - j) * q * k.at([j, h, d]).to_f32() * v.at([j, h, c]).to_f32()));
            }
            naive.push(T::from_f32(naive_sum(&terms, 0.0, truth.0[i], starts)));
        }
        let mut naive_state = Vec::new();
        for i in 0..heads * dim * value_dim {
            let (h, d, c) = (i / value_dim / dim, i / value_dim % dim, i % value_dim);
            let mut terms = vec![self.state.as_ref().map_or(0.0, |state| power(h, n) * state.at([h, d, c]))];
            terms.extend((0..n).map(|j| power(h, n - 1 - j) * k.at([j, h, d]).to_f32() * v.at([j, h, c]).to_f32()));
            naive_state.push(naive_sum(&terms, 0.0, truth.1[i], starts));
        }
        if spec.form != RetentionForm::Parallel {
            // Token by token, as the definition of the recurrent form has it: the state is rounded at every step.
            for h in 0..heads {
                let mut s = self.state.as_ref().map_or(vec![0.0; dim * value_dim], |state| values_of(state, h));
                for t in 0..n {
                    let mut row = vec![0.0f32; value_dim];
                    for (i, x) in s.iter_mut().enumerate() {
                        let (d, c) = (i / value_dim, i % value_dim);
                        *x = decay[h] * *x + k.at([t, h, d]).to_f32() * v.at([t, h, c]).to_f32();
                        row[c] += q.at([t, h, d]).to_f32() * *x;
                    }
                    let row: Vec<T> = row.iter().map(|x| T::from_f32(spec.scale as f32 * x)).collect();
                    let at = (t * heads + h) * value_dim..(t * heads + h + 1) * value_dim;
                    take_worse(&mut naive[at.clone()], &row, &truth.0[at]);
                }
                let at = h * dim * value_dim..(h + 1) * dim * value_dim;
                take_worse(&mut naive_state[at.clone()], &s, &truth.1[at]);
            }
        }
        (truth, (naive, naive_state))
    }
}

/// Compares outputs and state with the truth, by the naive method.
#[track_caller]
pub fn assert_with_state<T: Element>(
    what: &str,
    (got, got_state): (&[T], &[f32]),
    (truth, naive): &(WithState<f64, f64>, WithState<T, f32>),
    width: usize,
) {
    assert_sums(&format!("out, {what}"), got, &truth.0, &naive.0, width);
    assert_sums(&format!("state, {what}"), got_state, &truth.1, &naive.1, width);
}

/// One call of `wkv`.
pub struct WkvCase<T> {
    pub k: Array<T, 3>,
    pub v: Array<T, 3>,
    pub decay: Vec<f32>,
    pub first: Vec<f32>,
    pub state: Option<Array<f32, 3>>,
    pub layout: Layout,
}

impl<T: Element> WkvCase<T> {
    pub fn new(shape @ [batch, _, channels]: [usize; 3], layout: Layout, with_state: bool, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (k, v) = (array::<T, 3>(&mut rng, shape, layout), array::<T, 3>(&mut rng, shape, layout));
        let (decay, first) = (vector(&mut rng, channels), vector(&mut rng, channels));
        let mut state: Vec<f32> = vector(&mut rng, 3 * batch * channels);
        state[batch * channels..2 * batch * channels].iter_mut().for_each(|den| *den = 0.5 + den.abs());
        let state = Array::new([3, batch, channels], layout, &state);
        WkvCase { k, v, decay, first, state: with_state.then_some(state), layout }
    }

    pub fn run<O: Element, R: Element>(
        &self,
        f: impl FnOnce(&WkvInput<'_, T>, WkvOutput<'_, O, R>) -> Result<()>,
    ) -> WithState<O, R> {
        let mut input = WkvInput::new(self.k.view(), self.v.view(), &self.decay, &self.first);
        input.state_in = self.state.as_ref().map(|state| state.view());
        let [batch, _, channels] = self.k.shape();
        run_two(self.k.shape(), [3, batch, channels], self.layout, |out, state| {
            f(&input, WkvOutput::with_state(out, state))
        })
    }

    /// The truth, and the naive method.
    pub fn expected(&self) -> (WithState<f64, f64>, WithState<T, f32>) {
        let WkvCase { k, v, decay, first, .. } = self;
        let [batch, seq, channels] = k.shape();
        let truth = self.run(reference::wkv);
        let naive = |past_error: f32, now_error: f32| -> (Vec<T>, Vec<f32>) {
            let (mut naive, mut naive_state) = (vec![T::default(); truth.0.len()], vec![0.0f32; truth.1.len()]);
            for (b, c) in (0..batch * channels).map(|i| (i / channels, i % channels)) {
                let fade = -decay[c].exp();
                let initial = [0.0, 0.0, -1e38];
                let [mut num, mut den, mut max] =
                    std::array::from_fn(|i| self.state.as_ref().map_or(initial[i], |state| state.at([i, b, c])));
                for t in 0..seq {
                    let (k, v) = (k.at([b, t, c]).to_f32(), v.at([b, t, c]).to_f32());
                    let m = max.max(k + first[c]);
                    let (past, now) = (exp(max - m, past_error), exp(k + first[c] - m, now_error));
                    naive[(b * seq + t) * channels + c] = T::from_f32((past * num + now * v) / (past * den + now));
                    let m = (max + fade).max(k);
                    let (past, now) = (exp(max + fade - m, past_error), exp(k - m, now_error));
                    (num, den, max) = (past * num + now * v, past * den + now, m);
                }
                for (i, x) in [num, den, max].into_iter().enumerate() {
                    naive_state[(i * batch + b) * channels + c] = x;
                }
            }
            (naive, naive_state)
        };
        let mut worst = naive(0.0, 0.0);
        for (past, now) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
            let other = naive(past * EXP_ERROR, now * EXP_ERROR);
            take_worse(&mut worst.0, &other.0, &truth.0);
            take_worse(&mut worst.1, &other.1, &truth.1);
        }
        (truth, worst)
    }
}
