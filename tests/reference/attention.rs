//! Attention, merge and latent attention.

use crate::common::attention_case::{Alibi, KvLayout, Sinks};
use crate::common::{AttentionCase, AttentionOptions, Layout, Rng, assert_close};
use crate::with;
use gatefold::args::{AttentionInput, AttentionOutput, Kv};
use gatefold::spec::{Attention, Mask, Mla, RelativeBias};
use gatefold::{View, ViewMut, reference};

const INF: f64 = f64::INFINITY;

/// One sequence, one head; `out` and `lse`.
fn single<'a>(
    spec: &Attention,
    q: &'a [f64],
    k: &'a [f64],
    v: &'a [f64],
    edit: impl FnOnce(&mut AttentionInput<'a, f64, f64>),
) -> (Vec<f64>, Vec<f64>) {
    let (n, m) = (q.len() / spec.head_dim, k.len() / spec.head_dim);
    let kv = Kv::ragged(View::new(k, [m, 1, spec.head_dim]), View::new(v, [m, 1, spec.value_dim]), None);
    let mut input = AttentionInput::new(View::new(q, [n, 1, spec.head_dim]), kv);
    edit(&mut input);
    let (mut out, mut lse) = (vec![9.0; n * spec.value_dim], vec![9.0; n]);
    let output =
        AttentionOutput::with_lse(ViewMut::new(&mut out, [n, 1, spec.value_dim]), ViewMut::new(&mut lse, [n, 1]));
    reference::attention(spec, &input, output).unwrap();
    (out, lse)
}

#[test]
fn equal_scores_average_the_values() {
    let spec = with!(Attention::new(1, 1, 3), value_dim: 2);
    let (out, lse) = single(&spec, &[0.0; 3], &[0.7; 12], &[1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 6.0, 60.0], |_| {});
    assert_close("out", &out, &[3.0, 30.0], 1e-15);
    assert_close("lse", &lse, &[4f64.ln()], 1e-15);
}

#[test]
fn one_key_copies_its_value() {
    let spec = with!(Attention::new(1, 1, 2), value_dim: 2, softmax_scale: 0.5);
    let (out, lse) = single(&spec, &[3.0, -1.0], &[2.0, 4.0], &[-7.0, 0.25], |_| {});
    assert_eq!(out, [-7.0, 0.25]);
    assert_eq!(lse, [1.0]); // 0.5 * (3 * 2 - 4)
}

#[test]
fn scores_far_beyond_the_range_of_exp() {
    let spec = with!(Attention::new(1, 1, 1), softmax_scale: 1.0);
    let (out, lse) = single(&spec, &[1.0], &[5000.0, 5000.0 + 3f64.ln(), -5000.0], &[4.0, 8.0, 1e300], |_| {});
    assert_close("out", &out, &[7.0], 1e-12);
    assert_close("lse", &lse, &[5000.0 + 4f64.ln()], 1e-15);
}

#[test]
fn infinite_scores_follow_the_limit() {
    let spec = with!(Attention::new(1, 1, 1), softmax_scale: 1.0);
    let (k, v) = ([INF, 1.0, INF, -INF], [2.0, 99.0, 4.0, 50.0]);
    assert_eq!(single(&spec, &[1.0], &k, &v, |_| {}), (vec![3.0], vec![INF]));
    // The sign of the query turns it around: one key at +inf.
    assert_eq!(single(&spec, &[-1.0], &k, &v, |_| {}), (vec![50.0], vec![INF]));
    // All at -inf: as if there were no key.
    assert_eq!(single(&spec, &[1.0], &[-INF, -INF], &v[..2], |_| {}), (vec![0.0], vec![-INF]));
    let (out, lse) = single(&spec, &[1.0], &[f64::NAN, 1.0], &v[..2], |_| {});
    assert!(out[0].is_nan() && lse[0].is_nan());
    let (out, lse) = single(&spec, &[1.0], &[f64::NAN], &v[..1], |_| {});
    assert!(out[0].is_nan() && lse[0].is_nan());
}

#[test]
fn sinks_take_probability_and_have_no_value() {
    let spec = with!(Attention::new(1, 1, 1), sinks: true);
    let v = [3.0, 5.0, 7.0];
    let run = |sink: f64| {
        let sinks = [sink];
        single(&spec, &[0.0], &[1.0; 3], &v, |i| i.sinks = Some(&sinks))
    };
    let (out, lse) = run(3f64.ln());
    assert_close("out", &out, &[2.5], 1e-15); // half of the mean
    assert_close("lse", &lse, &[6f64.ln()], 1e-15);
    let (out, lse) = run(-INF);
    assert_close("out", &out, &[5.0], 1e-15);
    assert_close("lse", &lse, &[3f64.ln()], 1e-15);
    assert_eq!(run(INF), (vec![0.0], vec![INF]));
    assert!(run(f64::NAN).0[0].is_nan());
    // No key at all: the sink is the only term.
    let none = single(&spec, &[1.0], &[], &[], |i| i.sinks = Some(&[0.75]));
    assert_eq!(none, (vec![0.0], vec![0.75]));
    let none = single(&spec, &[1.0], &[], &[], |i| i.sinks = Some(&[-INF]));
    assert_eq!(none, (vec![0.0], vec![-INF]));
}

#[test]
fn softcap_bounds_the_scores() {
    let capped = |cap| {
        let spec = with!(Attention::new(1, 1, 1), softcap: Some(cap), softmax_scale: 1.0);
        single(&spec, &[1.0], &[4.0, -2.0], &[1.0, 0.0], |_| {})
    };
    // Small cap: both scores at its ends; large cap: no effect.
    let half = |difference: f64| 1.0 / (1.0 + (-difference).exp());
    assert_close("small", &capped(0.25).0, &[half(0.5 * (1.0 - 2.0 * (-16f64).exp()))], 1e-6);
    assert_close("large", &capped(1e8).0, &[half(6.0)], 1e-12);
    assert_close("exact", &capped(2.0).0, &[half(2.0 * (2f64.tanh() - (-1f64).tanh()))], 1e-15);
}

#[test]
fn biases_come_after_the_softcap_and_minus_infinity_hides() {
    let spec = with!(Attention::new(1, 1, 1), softcap: Some(1.0), softmax_scale: 1.0);
    let bias = &[5.0, -INF, 5.0];
    let edit = |i: &mut AttentionInput<'_, f64, f64>| i.bias = Some(View::new(bias, [1, 1, 1, 3]));
    let (out, lse) = single(&spec, &[0.0], &[1.0, f64::NAN, 1.0], &[2.0, f64::NAN, 4.0], edit);
    assert_close("out", &out, &[3.0], 1e-15);
    assert_close("lse", &lse, &[5.0 + 2f64.ln()], 1e-15);
}

#[test]
fn alibi_is_geometric_in_the_distance() {
    let spec = with!(Attention::causal(1, 1, 1), alibi: true);
    let slopes = [2f64.ln()]; // each step back halves the weight
    let (out, _) = single(&spec, &[0.0; 4], &[0.0; 4], &[1.0, 2.0, 4.0, 8.0], |i| {
        i.alibi_slopes = Some(&slopes);
    });
    let want = [1.0, (0.5 + 2.0) / 1.5, (0.25 + 1.0 + 4.0) / 1.75, (0.125 + 0.5 + 2.0 + 8.0) / 1.875];
    assert_close("out", &out, &want, 1e-14);
    // Positions 0, 1, 2, 3: another constant per row, the same weights.
    let (shifted, _) = single(&spec, &[0.0; 4], &[0.0; 4], &[1.0, 2.0, 4.0, 8.0], |i| {
        i.alibi_slopes = Some(&slopes);
        i.alibi_positions = Some(View::new(&[0.0, 1.0, 2.0, 3.0], [1, 4]));
    });
    assert_close("shifted", &shifted, &want, 1e-14);
}

/// Buckets of T5 as published (32 buckets, distance 128, both directions), and one direction with 8 buckets up to 20.
#[test]
fn relative_buckets_are_the_published_ones() {
    let bias = RelativeBias::new(32, 128, true);
    for (distances, bucket) in [
        (0..1, 0),
        (1..2, 1),
        (7..8, 7),
        (8..12, 8),
        (12..16, 9),
        (16..23, 10),
        (23..32, 11),
        (32..46, 12),
        (46..64, 13),
        (64..91, 14),
        (91..200, 15),
    ] {
        for d in distances {
            assert_eq!(bias.bucket(-d), bucket, "key {d} before the query");
            assert_eq!(bias.bucket(d), if d == 0 { 0 } else { bucket + 16 }, "key {d} behind the query");
        }
    }
    let bias = RelativeBias::new(8, 20, false);
    let want = [0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7];
    assert_eq!((0..21).map(|d| bias.bucket(-d)).collect::<Vec<_>>(), want);
    assert_eq!(bias.bucket(13), 0);
}

#[test]
fn relative_bias_is_looked_up_by_distance_and_head() {
    let mut options = AttentionOptions::new((2, 1), 4, &[(6, 6)]);
    options.relative_bias = Some(true);
    options.starts = true;
    let case = AttentionCase::<f64>::new(&options, 3);
    // The same numbers as a dense bias.
    let mut dense = case.clone();
    let table = case.relative_bias.as_ref().unwrap();
    let bias = case.spec.relative_bias.unwrap();
    let seq = case.input().sequence(0);
    let values: Vec<f32> = (0..2 * 36)
        .map(|n| {
            let (h, i, j) = (n / 36, n / 6 % 6, n % 6);
            table.at([bias.bucket(seq.k_start + j as i64 - seq.q_start - i as i64), h])
        })
        .collect();
    dense.bias = Some(crate::common::Array::new([1, 2, 6, 6], Layout::Contiguous, &values));
    (dense.relative_bias, dense.spec.relative_bias) = (None, None);
    assert_eq!(case.run(reference::attention), dense.run(reference::attention));
}

#[test]
fn a_window_of_one_copies_the_own_value() {
    let mut options = AttentionOptions::new((2, 2), 8, &[(5, 9)]);
    options.mask = Mask { causal: true, window_left: Some(0), ..Mask::default() };
    let case = AttentionCase::<f64>::new(&options, 1);
    let result = case.run(reference::attention);
    for i in 0..5 {
        for h in 0..2 {
            let v: Vec<f64> = (0..8).map(|d| case.v.at([0, 4 + i, h, d])).collect();
            assert_eq!(result.out[(i * 2 + h) * 8..][..8], v, "query {i} sees the key at its own position alone");
        }
    }
}

#[test]
fn causal_is_aligned_bottom_right() {
    let mut options = AttentionOptions::new((1, 1), 4, &[(4, 2)]);
    options.mask = Mask::causal();
    let case = AttentionCase::<f64>::new(&options, 1);
    let result = case.run(reference::attention);
    assert_eq!(result.out[..8], [0.0; 8]); // two queries before the first key
    assert_eq!(result.lse[..2], [-INF; 2]);
    let v: Vec<f64> = (0..4).map(|d| case.v.at([0, 0, 0, d])).collect();
    assert_eq!(result.out[8..12], v);
    assert!(result.lse[3].is_finite());
}

/// Each option of a mask against the plain inequalities, by which keys change the output.
#[test]
fn keys_that_are_not_seen_do_not_matter() {
    for (causal, left, right, chunk) in [
        (true, None, None, None),
        (false, Some(2), Some(1), None),
        (false, None, Some(0), None),
        (true, Some(3), None, Some(4)),
        (false, None, None, Some(3)),
    ] {
        let mut options = AttentionOptions::new((1, 1), 4, &[(7, 9)]);
        options.mask = Mask { causal, window_left: left, window_right: right, chunk };
        options.starts = true;
        let case = AttentionCase::<f64>::new(&options, 5);
        let base = case.run(reference::attention);
        let (q_start, k_start) = (7, 4);
        for j in 0..9 {
            let mut changed = case.clone();
            changed.v.set([0, j, 0, 0], 1e3);
            changed.k.set([0, j, 0, 0], f64::NAN);
            let result = changed.run(reference::attention);
            for i in 0..7 {
                let (qi, kj) = (q_start + i as i64, k_start + j as i64);
                let seen = (!causal || kj <= qi)
                    && left.is_none_or(|w| kj >= qi - w as i64)
                    && right.is_none_or(|w| kj <= qi + w as i64)
                    && chunk.is_none_or(|c| kj / c as i64 == qi / c as i64);
                let same = result.out[i * 4..][..4] == base.out[i * 4..][..4];
                assert_eq!(same, !seen, "mask {:?}, query {i}, key {j}", options.mask);
            }
        }
    }
}

#[test]
fn ragged_is_separate_calls() {
    let lens = [(3, 5), (0, 4), (4, 4), (2, 0), (1, 9)];
    let mut options = AttentionOptions::new((4, 2), 8, &lens);
    options.mask = Mask::causal();
    options.alibi = Alibi::Distance;
    let case = AttentionCase::<f64>::new(&options, 11);
    let whole = case.run(reference::attention);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (seq, (q_len, kv_len)) in lens.iter().enumerate() {
        let mut one = AttentionCase::<f64>::new(&AttentionOptions { lens: vec![lens[seq]], ..options.clone() }, 0);
        for (t, h, d) in grid([*q_len, 4, 8]) {
            one.q.set([t, h, d], case.q.at([case.cu_seqlens_q[seq] as usize + t, h, d]));
        }
        for (j, g, d) in grid([*kv_len, 2, 8]) {
            let from = case.cu_seqlens_kv[seq] as usize + j;
            one.k.set([0, j, g, d], case.k.at([0, from, g, d]));
            one.v.set([0, j, g, d], case.v.at([0, from, g, d]));
        }
        let part = one.run(reference::attention);
        out.extend(part.out);
        lse.extend(part.lse);
    }
    assert_eq!((whole.out, whole.lse), (out, lse));
}

fn grid([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |x| (0..b).flat_map(move |y| (0..c).map(move |z| (x, y, z))))
}

/// The same rows in another layout of the cache.
fn moved(case: &AttentionCase<f64>, kv: KvLayout, layout: Layout) -> AttentionCase<f64> {
    let options = AttentionOptions { kv, layout, ..case.options.clone() };
    let mut to = AttentionCase::<f64>::new(&options, 77);
    to.q = case.q.with_layout(layout);
    for (seq, (_, kv_len)) in case.options.lens.iter().enumerate() {
        for (j, g, d) in grid([*kv_len, options.heads.1, options.dims.0]) {
            let ([a, b], [x, y]) = (case.place(seq, j), to.place(seq, j));
            to.k.set([x, y, g, d], case.k.at([a, b, g, d]));
            if d < options.dims.1 {
                to.v.set([x, y, g, d], case.v.at([a, b, g, d]));
            }
        }
    }
    to.sinks.clone_from(&case.sinks);
    to
}

#[test]
fn paged_and_cached_are_the_same_as_ragged() {
    let mut options = AttentionOptions::new((4, 2), 8, &[(3, 17), (1, 0), (2, 8), (5, 16)]);
    options.mask = Mask { causal: true, window_left: Some(6), ..Mask::default() };
    options.left_padding = true;
    options.sinks = Sinks::Finite;
    let case = AttentionCase::<f64>::new(&options, 4);
    let want = case.run(reference::attention);
    for kv in [KvLayout::Cache, KvLayout::Paged(1), KvLayout::Paged(4), KvLayout::Paged(64)] {
        for layout in Layout::ALL {
            assert_eq!(moved(&case, kv, layout).run(reference::attention), want, "{kv:?} {layout:?}");
        }
    }
}

#[test]
fn left_padding_is_a_shorter_sequence_at_the_same_positions() {
    let mut options = AttentionOptions::new((2, 1), 4, &[(3, 9)]);
    options.mask = Mask { causal: true, chunk: Some(4), ..Mask::default() };
    options.left_padding = true; // the first 3 keys
    let case = AttentionCase::<f64>::new(&options, 6);
    let mut short = AttentionOptions { lens: vec![(3, 6)], left_padding: false, ..options };
    short.starts = true;
    let mut cut = AttentionCase::<f64>::new(&short, 6);
    (cut.q, cut.q_start, cut.k_start) = (case.q.clone(), Some(vec![6]), Some(vec![3]));
    for (j, g, d) in grid([6, 1, 4]) {
        cut.k.set([0, j, g, d], case.k.at([0, 3 + j, g, d]));
        cut.v.set([0, j, g, d], case.v.at([0, 3 + j, g, d]));
    }
    assert_eq!(cut.run(reference::attention), case.run(reference::attention));
}

#[test]
fn nothing_to_do() {
    for lens in [vec![], vec![(0, 0)], vec![(0, 5)], vec![(0, 0), (0, 0)]] {
        for kv in [KvLayout::Ragged, KvLayout::Cache, KvLayout::Paged(4)] {
            let case =
                AttentionCase::<f32>::new(&AttentionOptions { kv, ..AttentionOptions::new((2, 1), 4, &lens) }, 1);
            assert!(case.run(reference::attention).out.is_empty());
        }
    }
    let case = AttentionCase::<f32>::new(&AttentionOptions::new((2, 1), 4, &[(3, 0)]), 1);
    let result = case.run(reference::attention);
    assert_eq!((result.out, result.lse), (vec![0.0; 24], vec![-INF; 6]));
}

#[test]
fn merged_parts_are_the_whole() {
    let options = AttentionOptions { sinks: Sinks::Finite, ..AttentionOptions::new((3, 3), 8, &[(4, 20)]) };
    let case = AttentionCase::<f64>::new(&options, 8);
    let whole = case.run(reference::attention);
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (part, rows) in [(0..7), (7..7), (7..8), (8..20)].into_iter().enumerate() {
        // Sinks in the first part alone.
        let sinks = if part == 0 { Sinks::Finite } else { Sinks::None };
        let lens = vec![(4, rows.len())];
        let mut one = AttentionCase::<f64>::new(&AttentionOptions { lens, sinks, ..options.clone() }, 0);
        one.q = case.q.clone();
        one.sinks = (part == 0).then(|| case.sinks.clone().unwrap());
        for (j, g, d) in grid([rows.len(), 3, 8]) {
            one.k.set([0, j, g, d], case.k.at([0, rows.start + j, g, d]));
            one.v.set([0, j, g, d], case.v.at([0, rows.start + j, g, d]));
        }
        let result = one.run(reference::attention);
        outs.extend(result.out);
        lses.extend(result.lse);
    }
    // The empty part has nothing to say, whatever it holds.
    outs[4 * 3 * 8..2 * 4 * 3 * 8].fill(f64::NAN);
    let (mut out, mut lse) = (vec![0.0; 96], vec![0.0; 12]);
    let output = AttentionOutput::with_lse(ViewMut::new(&mut out, [4, 3, 8]), ViewMut::new(&mut lse, [4, 3]));
    reference::merge(View::new(&outs, [4, 4, 3, 8]), View::new(&lses, [4, 4, 3]), output).unwrap();
    assert_close("out", &out, &whole.out, 1e-14);
    assert_close("lse", &lse, &whole.lse, 1e-14);
}

#[test]
fn merging_nothing() {
    let merge = |outs: &[f64], lses: &[f64]| {
        let (mut out, mut lse) = ([9.0], [9.0]);
        let output = AttentionOutput::with_lse(ViewMut::new(&mut out, [1, 1, 1]), ViewMut::new(&mut lse, [1, 1]));
        let n = lses.len();
        reference::merge(View::new(outs, [n, 1, 1, 1]), View::new(lses, [n, 1, 1]), output).unwrap();
        (out[0], lse[0])
    };
    assert_eq!(merge(&[], &[]), (0.0, -INF));
    assert_eq!(merge(&[f64::NAN, 3.0], &[-INF, -INF]), (0.0, -INF));
    assert_eq!(merge(&[f64::NAN, 3.0], &[-INF, 1.0]), (3.0, 1.0));
    assert_eq!(merge(&[1.0, 3.0], &[INF, INF]), (2.0, INF));
}

#[test]
fn latent_attention_expanded_is_absorbed() {
    let mla = Mla::new(3, 6, 5, 4, 7);
    let (n, m, mut rng) = (4, 9, Rng::new(2));
    let q: Vec<f64> = rng.normals(n * 3 * 9, 1.0);
    let latent: Vec<f64> = rng.normals(m * 6, 1.0);
    let k_rope: Vec<f64> = rng.normals(m * 4, 1.0);
    let kv_b: Vec<f64> = rng.normals(3 * 12 * 6, 0.5);
    let kv_b = View::new(&kv_b, [3, 12, 6]);
    let attention = |spec: &Attention, q: &[f64], k: &[f64], v: &[f64]| {
        let g = spec.num_kv_heads;
        let kv = Kv::ragged(View::new(k, [m, g, spec.head_dim]), View::new(v, [m, g, spec.value_dim]), None);
        let mut out = vec![0.0; n * 3 * spec.value_dim];
        let output = AttentionOutput::new(ViewMut::new(&mut out, [n, 3, spec.value_dim]));
        let input = AttentionInput::<f64, f64>::new(View::new(q, [n, 3, spec.head_dim]), kv);
        reference::attention(spec, &input, output).unwrap();
        out
    };

    // Expanded: keys [w_uk c | k_rope], values w_uv c, in plain loops.
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for j in 0..m {
        for h in 0..3 {
            let row = |r: usize| (0..6).map(|c| kv_b.at([h, r, c]) * latent[j * 6 + c]).sum::<f64>();
            k.extend((0..5).map(row).chain(k_rope[j * 4..][..4].iter().copied()));
            v.extend((5..12).map(row));
        }
    }
    let expanded = attention(&mla.expanded(), &q, &k, &v);

    // Absorbed: one key/value head [c | k_rope], value c.
    let mut absorbed_q = vec![0.0; n * 3 * 6];
    let q_nope = View::with_strides(&q, [n, 3, 5], [27, 9, 1]);
    reference::mla_absorb_query(&mla, q_nope, kv_b, ViewMut::new(&mut absorbed_q, [n, 3, 6])).unwrap();
    let q2: Vec<f64> = (0..n * 3)
        .flat_map(|r| absorbed_q[r * 6..][..6].iter().chain(&q[r * 9 + 5..][..4]).copied().collect::<Vec<_>>())
        .collect();
    let k2: Vec<f64> = (0..m)
        .flat_map(|j| latent[j * 6..][..6].iter().chain(&k_rope[j * 4..][..4]).copied().collect::<Vec<_>>())
        .collect();
    let o = attention(&mla.absorbed(&mla.expanded()), &q2, &k2, &latent);
    let mut absorbed = vec![0.0; n * 3 * 7];
    reference::mla_project_value(&mla, View::new(&o, [n, 3, 6]), kv_b, ViewMut::new(&mut absorbed, [n, 3, 7])).unwrap();
    assert_close("absorbed", &absorbed, &expanded, 1e-13);
}
