//! Retention and `wkv`.

use crate::common::{Rng, assert_close};
use crate::with;
use gatefold::args::{RetentionInput, RetentionOutput, WkvInput, WkvOutput};
use gatefold::spec::{Retention, RetentionForm};
use gatefold::{View, ViewMut, reference};

struct Case {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    decay: Vec<f64>,
    state: Vec<f64>,
}

const HEADS: usize = 2;
const DIM: usize = 3;
const VALUE_DIM: usize = 4;

fn case(n: usize, decay: &[f64]) -> Case {
    let mut rng = Rng::new(9);
    Case {
        q: rng.normals(n * HEADS * DIM, 1.0),
        k: rng.normals(n * HEADS * DIM, 1.0),
        v: rng.normals(n * HEADS * VALUE_DIM, 1.0),
        decay: decay.to_vec(),
        state: rng.normals(HEADS * DIM * VALUE_DIM, 1.0),
    }
}

/// Tokens `start .. end`.
fn run(case: &Case, form: RetentionForm, start: usize, end: usize, state: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
    let spec = with!(Retention::new(HEADS, DIM, VALUE_DIM), form: form);
    let n = end - start;
    let rows = |x: &'_ [f64], width: usize| x[start * HEADS * width..end * HEADS * width].to_vec();
    let (q, k, v) = (rows(&case.q, DIM), rows(&case.k, DIM), rows(&case.v, VALUE_DIM));
    let shape = [n, HEADS, DIM];
    let mut input = RetentionInput::<f64, f64>::new(
        View::new(&q, shape),
        View::new(&k, shape),
        View::new(&v, [n, HEADS, VALUE_DIM]),
        &case.decay,
    );
    input.state_in = state.map(|s| View::new(s, [HEADS, DIM, VALUE_DIM]));
    let (mut out, mut state_out) = (vec![9.0; n * HEADS * VALUE_DIM], vec![9.0; HEADS * DIM * VALUE_DIM]);
    let output = RetentionOutput::with_state(
        ViewMut::new(&mut out, [n, HEADS, VALUE_DIM]),
        ViewMut::new(&mut state_out, [HEADS, DIM, VALUE_DIM]),
    );
    reference::retention(&spec, &input, output).unwrap();
    (out, state_out)
}

#[test]
fn the_forms_of_retention_agree() {
    let case = case(23, &[0.9, 0.6]);
    for state in [None, Some(case.state.as_slice())] {
        let (out, after) = run(&case, RetentionForm::Parallel, 0, 23, state);
        let chunks = [1, 4, 22, 23, 24, usize::MAX];
        for form in chunks.map(RetentionForm::Chunkwise).into_iter().chain([RetentionForm::Recurrent]) {
            let (other, other_after) = run(&case, form, 0, 23, state);
            assert_close(&format!("{form:?}: out"), &other, &out, 1e-13);
            assert_close(&format!("{form:?}: state"), &other_after, &after, 1e-13);
        }
        // In two calls, the state handed over.
        let (first, between) = run(&case, RetentionForm::Chunkwise(3), 0, 10, state);
        let (second, end) = run(&case, RetentionForm::Parallel, 10, 23, Some(&between));
        assert_close("two calls", &[first, second].concat(), &out, 1e-13);
        assert_close("two calls: state", &end, &after, 1e-13);
    }
}

#[test]
fn retention_without_memory_and_with_full_memory() {
    let case = case(6, &[0.0, 1.0]);
    let (out, _) = run(&case, RetentionForm::Parallel, 0, 6, None);
    let scale = (DIM as f64).sqrt().recip();
    let row = |x: &[f64], t: usize, h: usize, width: usize| x[(t * HEADS + h) * width..][..width].to_vec();
    let dot = |i: usize, j: usize, h: usize| -> f64 {
        row(&case.q, i, h, DIM).iter().zip(row(&case.k, j, h, DIM)).map(|(q, k)| q * k).sum()
    };
    for t in 0..6 {
        // Decay 0: the own token alone. Decay 1: all tokens so far alike.
        for (h, first) in [(0, t), (1, 0)] {
            let want: Vec<f64> = (0..VALUE_DIM)
                .map(|d| (first..=t).map(|j| scale * dot(t, j, h) * row(&case.v, j, h, VALUE_DIM)[d]).sum())
                .collect();
            assert_close("out", &row(&out, t, h, VALUE_DIM), &want, 1e-14);
        }
    }
}

#[test]
fn retention_of_nothing_keeps_the_state() {
    let case = case(0, &[0.5, 0.5]);
    for form in [RetentionForm::Parallel, RetentionForm::Recurrent, RetentionForm::Chunkwise(2)] {
        let (out, state) = run(&case, form, 0, 0, Some(&case.state));
        assert_eq!((out, state), (vec![], case.state.clone()));
    }
}

#[test]
fn wkv_is_the_weighted_average_it_stands_for() {
    let (batch, seq, channels) = (2, 9, 3);
    let mut rng = Rng::new(4);
    let k: Vec<f64> = rng.normals(batch * seq * channels, 1.0);
    let v: Vec<f64> = rng.normals(batch * seq * channels, 1.0);
    let (decay, first): (Vec<f64>, Vec<f64>) = (rng.normals(channels, 0.7), rng.normals(channels, 0.7));
    let shape = [batch, seq, channels];
    let run = |rows: std::ops::Range<usize>, state: Option<&[f64]>| {
        let n = rows.len();
        let cut = |x: &[f64]| -> Vec<f64> {
            (0..batch)
                .flat_map(|b| x[(b * seq + rows.start) * channels..(b * seq + rows.end) * channels].to_vec())
                .collect()
        };
        let (k, v) = (cut(&k), cut(&v));
        let shape = [batch, n, channels];
        let mut input = WkvInput::<f64, f64>::new(View::new(&k, shape), View::new(&v, shape), &decay, &first);
        input.state_in = state.map(|s| View::new(s, [3, batch, channels]));
        let (mut out, mut state) = (vec![9.0; k.len()], vec![9.0; 3 * batch * channels]);
        let output =
            WkvOutput::with_state(ViewMut::new(&mut out, shape), ViewMut::new(&mut state, [3, batch, channels]));
        reference::wkv(&input, output).unwrap();
        (out, state)
    };
    let (out, _) = run(0..seq, None);
    let at = |x: &[f64], b: usize, t: usize, c: usize| x[(b * shape[1] + t) * channels + c];
    for (b, t, c) in (0..batch).flat_map(|b| (0..seq).flat_map(move |t| (0..channels).map(move |c| (b, t, c)))) {
        // exp(-(t - 1 - i) exp(decay) + k_i) for the tokens before, exp(first + k_t) for the own one.
        let weight = |i: usize| {
            let exponent = if i == t { first[c] } else { -((t - 1 - i) as f64) * decay[c].exp() };
            (exponent + at(&k, b, i, c)).exp()
        };
        let sum: f64 = (0..=t).map(weight).sum();
        let want = (0..=t).map(|i| weight(i) * at(&v, b, i, c)).sum::<f64>() / sum;
        assert!((at(&out, b, t, c) - want).abs() < 1e-13, "row {b}, token {t}, channel {c}");
    }
    let (head, state) = run(0..4, None);
    let (tail, _) = run(4..seq, Some(&state));
    for b in 0..batch {
        let joined = [&head[b * 4 * channels..(b + 1) * 4 * channels], &tail[b * 5 * channels..(b + 1) * 5 * channels]];
        assert_close("two calls", &joined.concat(), &out[b * seq * channels..(b + 1) * seq * channels], 1e-14);
    }
    // No token: the state goes through.
    let (none, same) = run(0..0, Some(&state));
    assert_eq!((none.len(), same), (0, state));
}

/// Keys far beyond the range of exp: the state keeps its exponent apart.
#[test]
fn wkv_does_not_overflow() {
    let (k, v) = ([900.0, -900.0, 901.0], [1.0, 2.0, 3.0]);
    let mut out = [0.0; 3];
    let input = WkvInput::<f64, f64>::new(View::new(&k, [1, 3, 1]), View::new(&v, [1, 3, 1]), &[0.0], &[0.0]);
    reference::wkv(&input, WkvOutput::new(ViewMut::new(&mut out, [1, 3, 1]))).unwrap();
    // The third token: the first has faded by one step of exp(-1), so it stands at 899 against 901.
    assert_close("out", &out, &[1.0, 1.0, ((-2f64).exp() + 3.0) / (1.0 + (-2f64).exp())], 1e-14);
}
