//! Norms, RoPE, preparation of q, k and v, KV append, projections.

use crate::common::{Rng, assert_close};
use crate::with;
use gatefold::args::{AttentionInput, AttentionOutput, Kv, KvCache, KvCacheMut, QkvInput, QkvOutput, RopeTable};
use gatefold::spec::{Attention, Norm, QTemperature, QkNorm, QkvPrep, Rope, RopeScaling, RopeStyle};
use gatefold::{View, ViewMut, reference};

fn norm_row(spec: &Norm, x: &[f64], weight: Option<&[f64]>, bias: Option<&[f64]>) -> Vec<f64> {
    let mut out = vec![9.0; x.len()];
    reference::norm(spec, View::new(x, [1, x.len()]), weight, bias, ViewMut::new(&mut out, [1, x.len()])).unwrap();
    out
}

#[test]
fn norms() {
    let rms = Norm::rms(0.0);
    assert_eq!(norm_row(&rms, &[-3.0, 3.0, 3.0, -3.0], None, None), [-1.0, 1.0, 1.0, -1.0]);
    assert_eq!(norm_row(&rms, &[3.0, 4.0, 0.0, 0.0], Some(&[1.0, 2.0, 3.0, 4.0]), None), [1.2, 3.2, 0.0, 0.0]);
    // Gemma stores weight - 1.
    let offset = with!(rms, weight_offset: 1.0);
    assert_eq!(norm_row(&offset, &[2.0, -2.0], Some(&[0.0, 0.5]), None), [1.0, -1.5]);
    assert_eq!(norm_row(&offset, &[2.0, -2.0], None, None), [1.0, -1.0], "no weight: no factor");
    // eps under the root: x^2 = 0.
    assert_eq!(norm_row(&Norm::rms(4.0), &[0.0, 0.0], None, None), [0.0, 0.0]);
    assert_close("eps", &norm_row(&Norm::rms(7.0), &[3.0, 3.0], None, None), &[0.75, 0.75], 1e-15);

    let layer = with!(Norm::layer(0.0), bias: true);
    let out = norm_row(&layer, &[10.0, 12.0, 14.0, 16.0], Some(&[1.0; 4]), Some(&[0.0; 4]));
    let root = 5f64.sqrt(); // the variance, biased
    assert_close("layer", &out, &[-3.0 / root, -1.0 / root, 1.0 / root, 3.0 / root], 1e-15);
    let out = norm_row(&layer, &[1.0, 3.0], Some(&[2.0, 5.0]), Some(&[0.5, -0.5]));
    assert_close("layer", &out, &[-1.5, 4.5], 1e-15);
    // Any number of dimensions, any strides, no rows.
    let x = [1.0, -1.0, 9.0, 2.0, 2.0, 9.0];
    let mut out = vec![0.0; 4];
    let view = View::with_strides(&x, [1, 2, 2], [0, 3, 1]);
    reference::norm::<f64, f64, 3>(&rms, view, None, None, ViewMut::new(&mut out, [1, 2, 2])).unwrap();
    assert_eq!(out, [1.0, -1.0, 1.0, 1.0]);
    let none: [f64; 0] = [];
    reference::norm::<f64, f64, 2>(&rms, View::new(&none, [0, 4]), None, None, ViewMut::new(&mut [], [0, 4])).unwrap();
}

#[test]
fn element_wise() {
    let mut out = [0.0; 4];
    let (x, y) = ([1.0, 2.0, 3.0, 4.0], [10.0, 0.0, -1.0, 0.5]);
    let shape = [2, 2];
    reference::add(View::new(&x, shape), View::new(&y, shape), 0.5, ViewMut::new(&mut out, shape)).unwrap();
    assert_eq!(out, [6.0, 2.0, 2.5, 4.25]);
    let gate = [0.0, f64::INFINITY, f64::NEG_INFINITY, 3f64.ln()];
    reference::sigmoid_mul(View::new(&x, shape), View::new(&gate, shape), ViewMut::new(&mut out, shape)).unwrap();
    assert_close("gated", &out, &[0.5, 2.0, 0.0, 3.0], 1e-15);
}

#[test]
fn linear_is_the_product_with_the_transpose() {
    let (x, w) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 0.0, 0.0, 0.0, 2.0]);
    let mut out = [0.0; 4];
    let out_view = ViewMut::new(&mut out, [2, 2]);
    reference::linear(View::new(&x, [2, 3]), View::new(&w, [2, 3]), Some(&[0.5, -1.0]), out_view).unwrap();
    assert_eq!(out, [1.5, 5.0, 4.5, 11.0]);
    // No inputs: the bias.
    let none: [f64; 0] = [];
    let empty = View::new(&none, [2, 0]);
    reference::linear(empty, empty, Some(&[7.0, 8.0]), ViewMut::new(&mut out, [2, 2])).unwrap();
    assert_eq!(out, [7.0, 8.0, 7.0, 8.0]);
}

fn rotated(spec: &Rope, x: &[f64], head_dim: usize, positions: &[u32]) -> Vec<f64> {
    let (cos, sin) = spec.table(1000);
    let half = spec.rotary_dim / 2;
    let table = RopeTable::new(View::new(&cos, [1000, half]), View::new(&sin, [1000, half]));
    let shape = [positions.len(), x.len() / positions.len() / head_dim, head_dim];
    let mut out = vec![9.0; x.len()];
    reference::rope(spec, View::new(x, shape), positions, &table, ViewMut::new(&mut out, shape)).unwrap();
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn rope_keeps_norms_and_sees_differences_of_positions() {
    let mut rng = Rng::new(5);
    let (q, k): (Vec<f64>, Vec<f64>) = (rng.normals(12, 1.0), rng.normals(12, 1.0));
    for style in [RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf] {
        for rotary_dim in [2, 8, 12] {
            let spec = Rope::new(style, rotary_dim, 10_000.0);
            let at = |x: &[f64], p: u32| rotated(&spec, x, 12, &[p]);
            assert!((dot(&at(&q, 77), &at(&q, 77)) - dot(&q, &q)).abs() < 1e-12);
            let (near, far) = (dot(&at(&q, 15), &at(&k, 8)), dot(&at(&q, 907), &at(&k, 900)));
            assert!((near - far).abs() < 1e-11, "{style:?} {rotary_dim}: {near} {far}");
            assert_eq!(at(&q, 31)[rotary_dim..], q[rotary_dim..], "the other dimensions stay");
            if style != RopeStyle::InterleavedToHalf {
                assert_eq!(at(&q, 0), q);
            }
        }
    }
}

#[test]
fn rope_styles_are_the_same_rotation_of_other_pairs() {
    let x = [1.0, 2.0, 3.0, 4.0];
    let spec = |style| with!(Rope::new(style, 4, 10_000.0), scaling: RopeScaling::given(vec![1.0, 0.1]));
    let turn = |a: f64, b: f64, angle: f64| [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
    let ([a, b], [c, d]) = (turn(1.0, 3.0, 2.0), turn(2.0, 4.0, 0.2));
    assert_close("half", &rotated(&spec(RopeStyle::Half), &x, 4, &[2]), &[a, c, b, d], 1e-15);
    let ([a, b], [c, d]) = (turn(1.0, 2.0, 2.0), turn(3.0, 4.0, 0.2));
    assert_close("interleaved", &rotated(&spec(RopeStyle::Interleaved), &x, 4, &[2]), &[a, b, c, d], 1e-15);
    let to_half = rotated(&spec(RopeStyle::InterleavedToHalf), &x, 4, &[2]);
    assert_close("interleaved to half", &to_half, &[a, c, b, d], 1e-15);
    let scaled = with!(spec(RopeStyle::Half), cos_sin_scale: 1.5);
    let want: Vec<f64> = rotated(&spec(RopeStyle::Half), &x, 4, &[2]).iter().map(|x| 1.5 * x).collect();
    assert_close("scaled", &rotated(&scaled, &x, 4, &[2]), &want, 1e-15);
}

#[test]
fn preparation_is_its_steps_in_order() {
    let (n, heads, kv_heads, dim, value_dim) = (3, 4, 2, 8, 5);
    let mut rng = Rng::new(8);
    let q: Vec<f64> = rng.normals(n * heads * dim, 2.0);
    let k: Vec<f64> = rng.normals(n * kv_heads * dim, 2.0);
    let v: Vec<f64> = rng.normals(n * kv_heads * value_dim, 2.0);
    let positions = [5, 0, 9];
    let rope = Rope::new(RopeStyle::Half, 4, 100.0);
    let (cos, sin) = rope.table(10);
    let table = RopeTable::new(View::new(&cos, [10, 2]), View::new(&sin, [10, 2]));
    for qk_norm in [None, Some(QkNorm::PerHead), Some(QkNorm::Full), Some(QkNorm::L2AfterRope)] {
        let mut spec = with!(QkvPrep::new(heads, kv_heads, dim), value_dim: value_dim, qk_norm: qk_norm);
        spec.norm = with!(Norm::rms(1e-3), weight_offset: 0.25);
        spec.clip = Some(0.9);
        spec.rope = Some(rope.clone());
        spec.q_temperature = Some(QTemperature::new(2.0, 0.3));
        let width = |heads: usize| match qk_norm {
            Some(QkNorm::PerHead) => dim,
            Some(QkNorm::Full) => heads * dim,
            _ => 0,
        };
        let (qw, kw): (Vec<f64>, Vec<f64>) = (rng.normals(width(heads), 1.0), rng.normals(width(kv_heads), 1.0));
        let qs = View::new(&q, [n, heads, dim]);
        let ks = View::new(&k, [n, kv_heads, dim]);
        let mut input = QkvInput::<f64, f64>::new(qs, ks, View::new(&v, [n, kv_heads, value_dim]), &positions);
        input.rope = Some(table);
        if matches!(qk_norm, Some(QkNorm::PerHead | QkNorm::Full)) {
            input.q_norm = Some(&qw);
            input.k_norm = Some(&kw);
        }
        let (mut oq, mut ok, mut ov) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let output = QkvOutput::new(
            ViewMut::new(&mut oq, [n, heads, dim]),
            ViewMut::new(&mut ok, [n, kv_heads, dim]),
            ViewMut::new(&mut ov, [n, kv_heads, value_dim]),
        );
        reference::prepare_qkv(&spec, &input, output).unwrap();

        // The same through the single functions.
        let norm = |x: &[f64], width: usize, weight: Option<&[f64]>| {
            let shape = [x.len() / width, width];
            let mut out = vec![0.0; x.len()];
            reference::norm(&spec.norm, View::new(x, shape), weight, None, ViewMut::new(&mut out, shape)).unwrap();
            out
        };
        let steps = |x: &[f64], heads: usize, weight: &[f64]| {
            let mut x = x.to_vec();
            if qk_norm == Some(QkNorm::Full) {
                x = norm(&x, heads * dim, Some(weight));
            }
            x.iter_mut().for_each(|x| *x = x.clamp(-0.9, 0.9));
            if qk_norm == Some(QkNorm::PerHead) {
                x = norm(&x, dim, Some(weight));
            }
            let shape = [n, heads, dim];
            let mut out = vec![0.0; x.len()];
            reference::rope(&rope, View::new(&x, shape), &positions, &table, ViewMut::new(&mut out, shape)).unwrap();
            if qk_norm == Some(QkNorm::L2AfterRope) { norm(&out, dim, None) } else { out }
        };
        let mut want = steps(&q, heads, &qw);
        for (t, row) in want.chunks_mut(heads * dim).enumerate() {
            let factor = 1.0 + 0.3 * (1.0 + ((f64::from(positions[t]) + 1.0) / 2.0).floor()).ln();
            row.iter_mut().for_each(|x| *x *= factor);
        }
        assert_close("q", &oq, &want, 1e-14);
        assert_close("k", &ok, &steps(&k, kv_heads, &kw), 1e-14);
        let clipped: Vec<f64> = v.iter().map(|x| x.clamp(-0.9, 0.9)).collect();
        assert_close("v", &ov, &clipped, 0.0);
    }
}

#[test]
fn appended_rows_are_found_by_attention() {
    let (heads, dim, value_dim) = (2, 3, 2);
    let mut rng = Rng::new(1);
    // Two sequences: 4 + 3 rows, 0 + 2 rows.
    let (k, v): (Vec<f32>, Vec<f32>) = (rng.normals(9 * heads * dim, 1.0), rng.normals(9 * heads * value_dim, 1.0));
    let table = [3, 0, 5, 1, 2, 9];
    let table = View::new(&table, [2, 3]);
    let (mut pages_k, mut pages_v) = (vec![-1.0f32; 6 * 3 * heads * dim], vec![-1.0f32; 6 * 3 * heads * value_dim]);
    let (mut flat_k, mut flat_v) = (vec![-1.0f32; 2 * 8 * heads * dim], vec![-1.0f32; 2 * 8 * heads * value_dim]);
    for (rows, cu, before) in [([0..4, 7..7], [0u32, 4, 4], [0u32, 0]), ([4..7, 7..9], [0, 3, 5], [4, 0])] {
        let take = |x: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|r| x[r.start * heads * width..r.end * heads * width].to_vec()).collect()
        };
        let (k, v) = (take(&k, dim), take(&v, value_dim));
        let n = cu[2] as usize;
        let input =
            KvCache::new(View::new(&k, [n, heads, dim]), View::new(&v, [n, heads, value_dim]), Some(&cu), &before);
        let (pk, pv) =
            (ViewMut::new(&mut pages_k, [6, 3, heads, dim]), ViewMut::new(&mut pages_v, [6, 3, heads, value_dim]));
        reference::kv_append(&input, KvCacheMut::paged(pk, pv, table)).unwrap();
        let (fk, fv) =
            (ViewMut::new(&mut flat_k, [2, 8, heads, dim]), ViewMut::new(&mut flat_v, [2, 8, heads, value_dim]));
        reference::kv_append(&input, KvCacheMut::contiguous(fk, fv)).unwrap();
    }
    assert_eq!(flat_k[7 * heads * dim..8 * heads * dim], [-1.0; 6], "the row behind the last one is untouched");

    let spec = with!(Attention::causal(heads, heads, dim), value_dim: value_dim);
    let q: Vec<f32> = rng.normals(3 * heads * dim, 1.0);
    let run = |kv: Kv<'_, f32>| {
        let mut input = AttentionInput::<f32>::new(View::new(&q, [3, heads, dim]), kv);
        input.cu_seqlens_q = Some(&[0, 2, 3]);
        let mut out = vec![0.0; 3 * heads * value_dim];
        reference::attention(&spec, &input, AttentionOutput::new(ViewMut::new(&mut out, [3, heads, value_dim])))
            .unwrap();
        out
    };
    let lens = [7, 2];
    let (k, v) = (View::new(&k, [9, heads, dim]), View::new(&v, [9, heads, value_dim]));
    let want = run(Kv::ragged(k, v, Some(&[0, 7, 9])));
    let (k, v) = (View::new(&pages_k, [6, 3, heads, dim]), View::new(&pages_v, [6, 3, heads, value_dim]));
    assert_eq!(run(Kv::paged(k, v, table, &lens)), want);
    let (k, v) = (View::new(&flat_k, [2, 8, heads, dim]), View::new(&flat_v, [2, 8, heads, value_dim]));
    assert_eq!(run(Kv::cache(k, v, &lens)), want);
}
