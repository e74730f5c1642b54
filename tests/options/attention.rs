//! Attention against dense matrices.

use super::Table;
use crate::common::attention_case::{Alibi, DenseBias, DenseMask, KvLayout, Sinks};
use crate::common::{AttentionCase, AttentionOptions, AttentionResult, Layout, assert_close};
use gatefold::args::AttentionOutput;
use gatefold::{ViewMut, reference};

pub fn table() -> Table<AttentionOptions> {
    Table::new(vec![
        (
            "heads",
            vec![
                ("1/1", |o| o.heads = (1, 1)),
                ("4/4", |o| o.heads = (4, 4)),
                ("6/2", |o| o.heads = (6, 2)),
                ("4/1", |o| o.heads = (4, 1)),
            ],
        ),
        (
            "dims",
            vec![
                ("16", |o| o.dims = (16, 16)),
                ("64", |o| o.dims = (64, 64)),
                ("24/16", |o| o.dims = (24, 16)),
                ("33/20", |o| o.dims = (33, 20)),
            ],
        ),
        ("scale", vec![("default", |_| {}), ("0.3", |o| o.scale = Some(0.3))]),
        ("causal", vec![("no", |_| {}), ("yes", |o| o.mask.causal = true)]),
        (
            "window_left",
            vec![("no", |_| {}), ("0", |o| o.mask.window_left = Some(0)), ("3", |o| o.mask.window_left = Some(3))],
        ),
        ("window_right", vec![("no", |_| {}), ("2", |o| o.mask.window_right = Some(2))]),
        ("chunk", vec![("no", |_| {}), ("5", |o| o.mask.chunk = Some(5))]),
        ("softcap", vec![("no", |_| {}), ("1.5", |o| o.softcap = Some(1.5))]),
        (
            "bias",
            vec![
                ("no", |_| {}),
                ("per head", |o| o.bias = DenseBias::PerHead),
                ("per key", |o| o.bias = DenseBias::PerKey),
            ],
        ),
        (
            "mask",
            vec![
                ("no", |_| {}),
                ("full", |o| o.dense_mask = DenseMask::Full),
                ("per key", |o| o.dense_mask = DenseMask::PerKey),
            ],
        ),
        (
            "alibi",
            vec![
                ("no", |_| {}),
                ("distance", |o| o.alibi = Alibi::Distance),
                ("positions", |o| o.alibi = Alibi::Positions),
            ],
        ),
        (
            "relative_bias",
            vec![
                ("no", |_| {}),
                ("one way", |o| o.relative_bias = Some(false)),
                ("both ways", |o| o.relative_bias = Some(true)),
            ],
        ),
        (
            "sinks",
            vec![
                ("no", |_| {}),
                ("finite", |o| o.sinks = Sinks::Finite),
                ("with -inf", |o| o.sinks = Sinks::WithMinusInf),
            ],
        ),
        (
            "kv",
            vec![
                ("ragged", |_| {}),
                ("cache", |o| o.kv = KvLayout::Cache),
                ("pages of 5", |o| o.kv = KvLayout::Paged(5)),
                ("pages of 16", |o| o.kv = KvLayout::Paged(16)),
            ],
        ),
        (
            "lengths",
            vec![
                ("prefill", |o| o.lens = vec![(19, 19)]),
                ("decode", |o| o.lens = vec![(1, 40), (1, 7), (1, 1)]),
                ("append", |o| o.lens = vec![(3, 17), (2, 65)]),
                ("with empty ones", |o| o.lens = vec![(4, 9), (0, 3), (5, 0), (0, 0), (20, 21)]),
                ("more queries than keys", |o| o.lens = vec![(9, 4), (17, 16)]),
            ],
        ),
        ("left_padding", vec![("no", |_| {}), ("yes", |o| o.left_padding = true)]),
        ("positions", vec![("default", |_| {}), ("given", |o| o.starts = true)]),
        (
            "layout",
            vec![
                ("contiguous", |_| {}),
                ("padded", |o| o.layout = Layout::Padded),
                ("permuted", |o| o.layout = Layout::Permuted),
            ],
        ),
    ])
}

/// One sequence and head at a time, over dense matrices: all scores, then a matrix of what is seen by the plain inequalities, then lse by
/// adding one key after the other in the log domain, then weights `exp(s - lse)`.
fn dense(case: &AttentionCase<f64>) -> AttentionResult<f64, f64> {
    let (o, spec) = (&case.options, &case.spec);
    let ((heads, kv_heads), (dim, value_dim)) = (o.heads, o.dims);
    let mut result = AttentionResult { out: Vec::new(), lse: Vec::new() };
    for (seq, (q_len, kv_len)) in o.lens.iter().copied().enumerate() {
        let k_start = if o.starts { 4 + seq as i64 } else { 0 };
        let q_start = if o.starts { 5 + seq as i64 } else { 0 } + kv_len as i64 - q_len as i64;
        let begin = if o.left_padding && seq.is_multiple_of(2) { kv_len / 3 } else { 0 };
        for i in 0..q_len {
            for h in 0..heads {
                let g = h * kv_heads / heads;
                let t = case.cu_seqlens_q[seq] as usize + i;
                let (mut lse, mut scores) = (f64::NEG_INFINITY, Vec::new());
                if let Some(sinks) = &case.sinks {
                    lse = f64::from(sinks[h]);
                }
                for j in begin..kv_len {
                    let (qi, kj) = (q_start + i as i64, k_start + j as i64);
                    let [block, row] = case.place(seq, j);
                    let mut s: f64 = (0..dim).rev().map(|d| case.q.at([t, h, d]) * case.k.at([block, row, g, d])).sum();
                    s *= o.scale.unwrap_or(1.0 / (dim as f64).sqrt());
                    if let Some(cap) = o.softcap {
                        let e = (2.0 * s / cap).exp();
                        s = cap * (e - 1.0) / (e + 1.0);
                    }
                    match o.alibi {
                        Alibi::None => {}
                        Alibi::Distance => s -= 0.5f64.powi(h as i32 + 1) * (qi - kj).abs() as f64,
                        Alibi::Positions => {
                            let p = case.alibi_positions.as_ref().unwrap();
                            s += 0.5f64.powi(h as i32 + 1) * f64::from(p.at([seq, j]));
                        }
                    }
                    if let Some(bias) = &spec.relative_bias {
                        s += f64::from(case.relative_bias.as_ref().unwrap().at([bias.bucket(kj - qi), h]));
                    }
                    match o.bias {
                        DenseBias::None => {}
                        DenseBias::PerHead => s += f64::from(case.bias.as_ref().unwrap().at([0, h, i, j])),
                        DenseBias::PerKey => s += f64::from(case.bias.as_ref().unwrap().at([seq, 0, 0, j])),
                    }
                    let shown = match o.dense_mask {
                        DenseMask::None => true,
                        DenseMask::Full => case.mask.as_ref().unwrap().at([seq, h, i, j]) != 0,
                        DenseMask::PerKey => case.mask.as_ref().unwrap().at([seq, 0, 0, j]) != 0,
                    };
                    let m = o.mask;
                    let seen = shown
                        && !(m.causal && kj > qi)
                        && m.window_left.is_none_or(|w| qi - kj <= w as i64)
                        && m.window_right.is_none_or(|w| kj - qi <= w as i64)
                        && m.chunk.is_none_or(|c| qi.div_euclid(c as i64) == kj.div_euclid(c as i64));
                    if seen && s != f64::NEG_INFINITY {
                        scores.push((block, row, s));
                        let (low, high) = if s < lse { (s, lse) } else { (lse, s) };
                        lse = high + (low - high).exp().ln_1p();
                    }
                }
                let value = |d: usize| scores.iter().map(|(b, r, s)| (s - lse).exp() * case.v.at([*b, *r, g, d])).sum();
                result.out.extend((0..value_dim).map(|d| if scores.is_empty() { 0.0 } else { value(d) }));
                result.lse.push(lse);
            }
        }
    }
    result
}

#[test]
fn every_pair_of_options_against_dense_matrices() {
    let (table, base) = (table(), AttentionOptions::new((1, 1), 16, &[]));
    let pairs = table.rows("attention", &base, 1, |_| true);
    assert!(pairs.impossible.is_empty(), "all features compose");
    for (seed, row) in pairs.rows.iter().enumerate() {
        let case = AttentionCase::<f64>::new(&table.apply(&base, row), seed as u64);
        let (got, want) = (case.run(reference::attention), dense(&case));
        let what = table.describe(row);
        assert_close(&format!("{what}: out"), &got.out, &want.out, 1e-13);
        assert_close(&format!("{what}: lse"), &got.lse, &want.lse, 1e-13);

        // Without lse.
        let [n, heads, _] = case.q.shape();
        let mut out = vec![9.0; got.out.len()];
        let output = AttentionOutput::new(ViewMut::new(&mut out, [n, heads, case.spec.value_dim]));
        reference::attention(&case.spec, &case.input(), output).unwrap();
        assert_eq!(out, got.out, "{what}");
    }
}
