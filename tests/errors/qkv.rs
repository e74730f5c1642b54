//! Arguments between projection and attention, of the KV cache, of norms and of projections.

use super::Found;
use crate::common::{Layout, Output};
use crate::with;
use gatefold::args::*;
use gatefold::spec::{Norm, QTemperature, QkNorm, QkvPrep, Rope, RopeStyle};
use gatefold::{View, ViewMut, reference};

static F: [f32; 500] = [0.0; 500];

fn f<const N: usize>(shape: [usize; N]) -> View<'static, f32, N> {
    View::new(&F, shape)
}

fn table() -> RopeTable<'static> {
    RopeTable::new(f([9, 2]), f([9, 2]))
}

pub fn errors(found: &mut Found) {
    type Edit = fn(&mut QkvPrep, &mut QkvInput<'static, f32>);
    let edits: Vec<(&str, Edit)> = vec![
        ("spec", |s, _| s.clip = Some(-1.0)),
        ("q", |_, i| i.q = f([3, 1, 8])),
        ("k", |_, i| i.k = f([2, 2, 8])),
        ("v", |_, i| i.v = f([3, 2, 8])),
        ("q_norm absent", |s, _| s.qk_norm = Some(QkNorm::PerHead)),
        ("k_norm absent", |s, i| {
            s.qk_norm = Some(QkNorm::Full);
            i.q_norm = Some(&F[..32]);
        }),
        ("q_norm length", |s, i| {
            s.qk_norm = Some(QkNorm::Full);
            i.q_norm = Some(&F[..8]);
        }),
        ("k_norm length", |s, i| {
            s.qk_norm = Some(QkNorm::PerHead);
            i.q_norm = Some(&F[..8]);
            i.k_norm = Some(&F[..16]);
        }),
        ("q_norm given", |_, i| i.q_norm = Some(&F[..8])),
        ("k_norm given", |s, i| {
            s.qk_norm = Some(QkNorm::L2AfterRope);
            i.k_norm = Some(&F[..8]);
        }),
        ("rope absent", |s, _| s.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4))),
        ("rope given", |_, i| i.rope = Some(table())),
        ("cos", |s, i| {
            s.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4));
            i.rope = Some(RopeTable::new(f([9, 4]), f([9, 2])));
        }),
        ("sin", |s, i| {
            s.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4));
            i.rope = Some(RopeTable::new(f([9, 2]), f([8, 2])));
        }),
        ("positions", |s, i| {
            s.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4));
            i.rope = Some(table());
            i.positions = &[1, 2];
        }),
        ("position", |s, i| {
            s.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4));
            i.rope = Some(table());
            i.positions = &[1, 2, 9];
        }),
        ("positions for the temperature", |s, i| {
            s.q_temperature = Some(QTemperature::new(1.0, 1.0));
            i.positions = &[];
        }),
    ];
    for (name, edit) in edits {
        let mut spec = with!(QkvPrep::new(4, 2, 8), value_dim: 6);
        let mut input = QkvInput::new(f([3, 4, 8]), f([3, 2, 8]), f([3, 2, 6]), &[0, 1, 2]);
        edit(&mut spec, &mut input);
        let (mut q, mut k) = (Output::new([3, 4, 8], Layout::Padded), Output::new([3, 2, 8], Layout::Padded));
        let mut v = Output::new([3, 2, 6], Layout::Padded);
        let output = QkvOutput::new(q.view(), k.view(), v.view());
        found.add(&format!("prepare_qkv, {name}"), reference::prepare_qkv(&spec, &input, output));
        q.assert_untouched(name);
        k.assert_untouched(name);
        v.assert_untouched(name);
    }
    let mut out = [7.0; 200];
    let mut other = [[7.0; 96]; 2];
    let input = QkvInput::<f32>::new(f([3, 4, 8]), f([3, 2, 8]), f([3, 2, 6]), &[0, 1, 2]);
    for (name, shapes) in [
        ("out.q", [[3, 4, 6], [3, 2, 8], [3, 2, 6]]),
        ("out.k", [[3, 4, 8], [3, 4, 8], [3, 2, 6]]),
        ("out.v", [[3, 4, 8], [3, 2, 8], [3, 2, 8]]),
    ] {
        let [k, v] = &mut other;
        let output =
            QkvOutput::new(ViewMut::new(&mut out, shapes[0]), ViewMut::new(k, shapes[1]), ViewMut::new(v, shapes[2]));
        let spec = with!(QkvPrep::new(4, 2, 8), value_dim: 6);
        found.add(&format!("prepare_qkv, {name}"), reference::prepare_qkv(&spec, &input, output));
    }

    let rope = Rope::new(RopeStyle::Half, 4, 1e4);
    for (name, spec, x, positions, table, shape) in [
        ("spec", with!(rope.clone(), rotary_dim: 10), f([3, 2, 8]), &[0, 1, 2][..], table(), [3, 2, 8]),
        ("x", rope.clone(), View::with_strides(&F, [3, 2, 8], [16, 8, 2]), &[0, 1, 2], table(), [3, 2, 8]),
        ("positions", rope.clone(), f([3, 2, 8]), &[0, 1], table(), [3, 2, 8]),
        ("position", rope.clone(), f([3, 2, 8]), &[0, 1, 30], table(), [3, 2, 8]),
        ("cos", rope.clone(), f([3, 2, 8]), &[0, 1, 2], RopeTable::new(f([9, 3]), f([9, 2])), [3, 2, 8]),
        ("out", rope.clone(), f([3, 2, 8]), &[0, 1, 2], table(), [3, 2, 4]),
    ] {
        found
            .add(&format!("rope, {name}"), reference::rope(&spec, x, positions, &table, ViewMut::new(&mut out, shape)));
    }

    let layer = with!(Norm::layer(1e-5), bias: true);
    for (name, spec, x, weight, bias, shape) in [
        ("spec", Norm::rms(-1.0), f([3, 4]), None, None, [3, 4]),
        ("x", Norm::rms(0.0), View::with_strides(&F, [3, 4], [4, 2]), None, None, [3, 4]),
        ("weight", Norm::rms(0.0), f([3, 4]), Some(&F[..3]), None, [3, 4]),
        ("bias absent", layer, f([3, 4]), Some(&F[..4]), None, [3, 4]),
        ("bias given", Norm::rms(0.0), f([3, 4]), None, Some(&F[..4]), [3, 4]),
        ("bias length", layer, f([3, 4]), None, Some(&F[..5]), [3, 4]),
        ("out", Norm::rms(0.0), f([3, 4]), None, None, [4, 3]),
    ] {
        found.add(&format!("norm, {name}"), reference::norm(&spec, x, weight, bias, ViewMut::new(&mut out, shape)));
    }
    for (name, y, shape) in [("y", f([4, 3]), [3, 4]), ("out", f([3, 4]), [3, 5])] {
        found.add(&format!("add, {name}"), reference::add(f([3, 4]), y, 1.0, ViewMut::new(&mut out, shape)));
    }
    for (name, gate, shape) in [("gate", f([3, 3]), [3, 4]), ("out", f([3, 4]), [2, 4])] {
        found.add(
            &format!("sigmoid_mul, {name}"),
            reference::sigmoid_mul(f([3, 4]), gate, ViewMut::new(&mut out, shape)),
        );
    }
    let short = View::new(&F[..19], [5, 4]);
    for (name, x, weight, bias, shape) in [
        ("x", f([3, 5]), f([5, 4]), None, [3, 5]),
        ("weight", f([3, 4]), short, None, [3, 5]),
        ("bias", f([3, 4]), f([5, 4]), Some(&F[..4]), [3, 5]),
        ("out", f([3, 4]), f([5, 4]), None, [3, 4]),
    ] {
        found.add(&format!("linear, {name}"), reference::linear(x, weight, bias, ViewMut::new(&mut out, shape)));
    }
    assert!(out.iter().chain(other.as_flattened()).all(|x| *x == 7.0));
    append(found);
    #[cfg(feature = "cuda")]
    plan(found);
}

fn append(found: &mut Found) {
    static LENS: [u32; 2] = [3, 1];
    type Edit = fn(&mut KvCache<'static, f32>);
    let contiguous: [(&str, Edit); 6] = [
        ("k", |i| i.k = View::new(&F[..35], [3, 2, 6])),
        ("v", |i| i.v = f([2, 2, 4])),
        ("cu_seqlens", |i| i.cu_seqlens = Some(&[0, 2, 2])),
        ("kv_lens", |i| i.kv_lens = &LENS[..1]),
        ("room", |i| i.kv_lens = &[4, 0]),
        ("sequences", |i| {
            i.cu_seqlens = None;
            i.kv_lens = &[0];
        }),
    ];
    let new = || KvCache::new(f([3, 2, 6]), f([3, 2, 4]), Some(&[0, 2, 3]), &LENS);
    for (name, edit) in contiguous {
        let mut input = new();
        edit(&mut input);
        let (mut k, mut v) = (Output::new([2, 5, 2, 6], Layout::Padded), Output::new([2, 5, 2, 4], Layout::Padded));
        let cache = KvCacheMut::contiguous(k.view(), v.view());
        found.add(&format!("kv_append, {name}"), reference::kv_append(&input, cache));
        k.assert_untouched(name);
        v.assert_untouched(name);
    }
    for (name, k_shape, v_shape, table, table_shape) in [
        ("cache.k", [4, 2, 2, 5], [4, 2, 2, 4], &[0, 1, 2, 3, 0, 1][..], [2, 3]),
        ("cache.v", [4, 2, 2, 6], [3, 2, 2, 4], &[0, 1, 2, 3, 0, 1], [2, 3]),
        ("no rows", [4, 0, 2, 6], [4, 0, 2, 4], &[0, 1, 2, 3, 0, 1], [2, 3]),
        ("block_table", [4, 2, 2, 6], [4, 2, 2, 4], &[0, 1, 2], [1, 3]),
        ("pages", [4, 2, 2, 6], [4, 2, 2, 4], &[0, 1, 2, 3], [2, 2]),
        ("page", [4, 2, 2, 6], [4, 2, 2, 4], &[0, 1, 4, 3, 0, 1], [2, 3]),
        ("same page", [4, 2, 2, 6], [4, 2, 2, 4], &[0, 1, 2, 2, 0, 1], [2, 3]),
        ("page twice", [4, 2, 2, 6], [4, 2, 2, 4], &[0, 1, 1, 3, 0, 1], [2, 3]),
    ] {
        let input = if name == "pages" { with!(new(), kv_lens: &[3, 4]) } else { new() };
        let (mut k, mut v) = (Output::new(k_shape, Layout::Padded), Output::new(v_shape, Layout::Padded));
        let cache = KvCacheMut::paged(k.view(), v.view(), View::new(table, table_shape));
        found.add(&format!("kv_append, {name}"), reference::kv_append(&input, cache));
        k.assert_untouched(name);
        v.assert_untouched(name);
    }
}

/// What the plan of a launch refuses: sizes and numbers that the kernel cannot take.
#[cfg(feature = "cuda")]
fn plan(found: &mut Found) {
    use gatefold::Dtype;
    use gatefold::cuda::{QkvArrays, QkvCache, QkvPlan, QkvProblem};
    type Edit = fn(&mut QkvProblem);
    let edits: [(&str, Edit); 23] = [
        ("spec", |p| p.spec.value_dim = 0),
        ("dtype", |p| p.dtype = Dtype::F64),
        ("attn_scale", |p| p.spec.q_temperature = Some(QTemperature::new(8.0, 1e39))),
        ("floor_scale", |p| p.spec.q_temperature = Some(QTemperature::new(8.5, 0.1))),
        ("large floor_scale", |p| p.spec.q_temperature = Some(QTemperature::new(4294967296.0, 0.1))),
        ("clip", |p| p.spec.clip = Some(1e39)),
        ("eps", |p| p.spec.norm.eps = 1e39),
        ("weight_offset", |p| p.spec.norm.weight_offset = -1e39),
        ("positions", |p| p.spec.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4))),
        ("tokens", |p| p.num_tokens = 1 << 30),
        ("width", |p| p.spec.head_dim = 1 << 29),
        ("out.q", |p| p.q_out_strides = [31, 8]),
        ("out.k", |p| p.k_out_strides = [0, 8, 8]),
        ("far q", |p| p.q_strides[0] = usize::MAX),
        ("far out.v", |p| p.v_out_strides[1] = usize::MAX / 8),
        ("far cos", |p| {
            p.spec.rope = Some(Rope::new(RopeStyle::Half, 4, 1e4));
            (p.num_positions, p.cos_stride) = (9, usize::MAX);
        }),
        ("cache", |p| {
            p.cache = Some(QkvCache::contiguous(2, 5));
            p.k_out_strides = [79, 16, 8];
        }),
        ("far cache", |p| {
            *p = p.clone().with_cache(QkvCache::contiguous(2, 5));
            p.v_out_strides[0] = usize::MAX;
        }),
        ("sequences", |p| p.cache = Some(QkvCache::contiguous(usize::MAX, 5))),
        ("sequences of one", |p| p.cache = Some(with!(QkvCache::contiguous(2, 5), ragged: false))),
        ("blocks", |p| p.cache = Some(with!(QkvCache::contiguous(2, 5), num_blocks: 3))),
        ("no rows", |p| p.cache = Some(QkvCache::paged(2, 4, 0, 3))),
        ("pages", |p| p.cache = Some(QkvCache::paged(2, 4, 16, usize::MAX))),
    ];
    for (name, edit) in edits {
        let mut problem = QkvProblem::new(with!(QkvPrep::new(4, 2, 8), value_dim: 6), Dtype::BF16, 3, 0);
        edit(&mut problem);
        found.add(&format!("QkvPlan, {name}"), QkvPlan::new(&problem));
    }
    // What a call does not take is not looked at.
    let mut problem = QkvProblem::new(QkvPrep::new(1 << 20, 1, 1 << 20), Dtype::BF16, 3, 0);
    assert!(QkvPlan::new(&problem).is_err());
    problem.arrays = QkvArrays::Value;
    QkvPlan::new(&problem).unwrap();
}
