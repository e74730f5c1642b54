//! Arguments of attention, merge, latent and linear attention.

use super::Found;
use crate::common::{Layout, Output};
use crate::with;
use gatefold::args::*;
use gatefold::spec::{Attention, Mla, RelativeBias, Retention};
use gatefold::{View, ViewMut, reference};

static F: [f32; 1000] = [0.0; 1000];
static B: [u8; 1000] = [1; 1000];
static LENS: [u32; 2] = [5, 3];

fn f<const N: usize>(shape: [usize; N]) -> View<'static, f32, N> {
    View::new(&F, shape)
}

fn short<const N: usize>(shape: [usize; N]) -> View<'static, f32, N> {
    View::new(&F[..shape.iter().product::<usize>() - 1], shape)
}

fn gapped<const N: usize>(shape: [usize; N]) -> View<'static, f32, N> {
    View::with_strides(&F, shape, [2; N])
}

/// 4 heads over 2, widths 8 and 6; 3 tokens in sequences of 2 and 1, with 5 and 3 keys.
fn spec() -> Attention {
    with!(Attention::causal(4, 2, 8), value_dim: 6)
}

fn ragged() -> Kv<'static, f32> {
    Kv::ragged(f([8, 2, 8]), f([8, 2, 6]), Some(&[0, 5, 8]))
}

type Edit = fn(&mut Attention, &mut AttentionInput<'static, f32>);

fn attend(spec: &Attention, edit: Edit, out: ViewMut<'_, f64, 3>, lse: ViewMut<'_, f64, 2>) -> gatefold::Result<()> {
    let mut spec = spec.clone();
    let mut input = AttentionInput::new(f([3, 4, 8]), ragged());
    input.cu_seqlens_q = Some(&[0, 2, 3]);
    edit(&mut spec, &mut input);
    reference::attention(&spec, &input, AttentionOutput::with_lse(out, lse))
}

pub fn errors(found: &mut Found) {
    let edits: Vec<(&str, Edit)> = vec![
        ("spec", |s, _| s.softmax_scale = -1.0),
        ("q heads", |_, i| i.q = f([3, 2, 8])),
        ("q width", |_, i| i.q = f([3, 4, 7])),
        ("q short", |_, i| i.q = short([3, 4, 8])),
        ("q stride", |_, i| i.q = gapped([3, 4, 8])),
        ("q overflow", |_, i| i.q = View::with_strides(&F, [3, 4, 8], [usize::MAX, 8, 1])),
        ("k shape", |_, i| i.kv = Kv::ragged(f([8, 4, 8]), f([8, 2, 6]), Some(&[0, 5, 8]))),
        ("k short", |_, i| i.kv = Kv::ragged(short([8, 2, 8]), f([8, 2, 6]), Some(&[0, 5, 8]))),
        ("k stride", |_, i| i.kv = Kv::ragged(gapped([8, 2, 8]), f([8, 2, 6]), Some(&[0, 5, 8]))),
        ("v rows", |_, i| i.kv = Kv::ragged(f([8, 2, 8]), f([7, 2, 6]), Some(&[0, 5, 8]))),
        ("v short", |_, i| i.kv = Kv::ragged(f([8, 2, 8]), short([8, 2, 6]), Some(&[0, 5, 8]))),
        ("v stride", |_, i| i.kv = Kv::ragged(f([8, 2, 8]), gapped([8, 2, 6]), Some(&[0, 5, 8]))),
        ("cu_seqlens_q empty", |_, i| i.cu_seqlens_q = Some(&[])),
        ("cu_seqlens_q start", |_, i| i.cu_seqlens_q = Some(&[1, 2, 3])),
        ("cu_seqlens_q falls", |_, i| i.cu_seqlens_q = Some(&[0, 4, 3])),
        ("cu_seqlens_q end", |_, i| i.cu_seqlens_q = Some(&[0, 2, 4])),
        ("cu_seqlens_kv absent", |_, i| i.kv = Kv::ragged(f([8, 2, 8]), f([8, 2, 6]), None)),
        ("cu_seqlens_kv length", |_, i| i.kv = Kv::ragged(f([8, 2, 8]), f([8, 2, 6]), Some(&[0, 8]))),
        ("cu_seqlens_kv end", |_, i| i.kv = Kv::ragged(f([8, 2, 8]), f([8, 2, 6]), Some(&[0, 5, 9]))),
        ("cache sequences", |_, i| i.kv = Kv::cache(f([1, 5, 2, 8]), f([1, 5, 2, 6]), &LENS)),
        ("cache v", |_, i| i.kv = Kv::cache(f([2, 5, 2, 8]), f([2, 4, 2, 6]), &LENS)),
        ("cache lengths", |_, i| i.kv = Kv::cache(f([2, 5, 2, 8]), f([2, 5, 2, 6]), &LENS[..1])),
        ("cache length", |_, i| i.kv = Kv::cache(f([2, 4, 2, 8]), f([2, 4, 2, 6]), &LENS)),
        ("cache short", |_, i| i.kv = Kv::cache(short([2, 5, 2, 8]), f([2, 5, 2, 6]), &LENS)),
        ("pages of no rows", |_, i| {
            i.kv = Kv::paged(f([3, 0, 2, 8]), f([3, 0, 2, 6]), View::new(&[0, 1, 2, 0, 1, 2], [2, 3]), &LENS);
        }),
        ("page table shape", |_, i| {
            i.kv = Kv::paged(f([3, 2, 2, 8]), f([3, 2, 2, 6]), View::new(&[0, 1, 2], [1, 3]), &LENS);
        }),
        ("page table short", |_, i| {
            i.kv = Kv::paged(f([3, 2, 2, 8]), f([3, 2, 2, 6]), View::new(&[0, 1, 2], [2, 3]), &LENS);
        }),
        ("page table narrow", |_, i| {
            i.kv = Kv::paged(f([3, 2, 2, 8]), f([3, 2, 2, 6]), View::new(&[0, 1, 2, 0], [2, 2]), &LENS);
        }),
        ("page beyond the cache", |_, i| {
            i.kv = Kv::paged(f([3, 2, 2, 8]), f([3, 2, 2, 6]), View::new(&[0, 1, 2, 0, 3, 9], [2, 3]), &LENS);
        }),
        ("kv_begin length", |_, i| i.kv_begin = Some(&[0])),
        ("kv_begin beyond", |_, i| i.kv_begin = Some(&[0, 4])),
        ("q_start length", |_, i| i.q_start = Some(&[0, 0, 0])),
        ("q_start far", |_, i| i.q_start = Some(&[0, i64::MAX])),
        ("k_start length", |_, i| i.k_start = Some(&[])),
        ("k_start far", |_, i| i.k_start = Some(&[i64::MIN, 0])),
        ("mask shape", |_, i| i.mask = Some(View::new(&B, [2, 4, 2, 4]))),
        ("mask short", |_, i| i.mask = Some(View::new(&B[..79], [2, 4, 2, 5]))),
        ("bias shape", |_, i| i.bias = Some(f([3, 1, 1, 1]))),
        ("bias stride", |_, i| i.bias = Some(gapped([2, 1, 1, 5]))),
        ("slopes absent", |s, _| s.alibi = true),
        ("slopes given", |_, i| i.alibi_slopes = Some(&F[..4])),
        ("slopes length", |s, i| {
            s.alibi = true;
            i.alibi_slopes = Some(&F[..3]);
        }),
        ("alibi positions given", |_, i| i.alibi_positions = Some(f([2, 5]))),
        ("alibi positions shape", |s, i| {
            s.alibi = true;
            i.alibi_slopes = Some(&F[..4]);
            i.alibi_positions = Some(f([2, 4]));
        }),
        ("relative bias absent", |s, _| s.relative_bias = Some(RelativeBias::new(8, 20, true))),
        ("relative bias given", |_, i| i.relative_bias = Some(f([8, 4]))),
        ("relative bias shape", |s, i| {
            s.relative_bias = Some(RelativeBias::new(8, 20, true));
            i.relative_bias = Some(f([8, 2]));
        }),
        ("sinks absent", |s, _| s.sinks = true),
        ("sinks given", |_, i| i.sinks = Some(&F[..4])),
        ("sinks length", |s, i| {
            s.sinks = true;
            i.sinks = Some(&F[..2]);
        }),
    ];
    for (name, edit) in edits {
        let (mut out, mut lse) = (Output::new([3, 4, 6], Layout::Padded), Output::new([3, 4], Layout::Padded));
        found.add(&format!("attention, {name}"), attend(&spec(), edit, out.view(), lse.view()));
        out.assert_untouched(name);
        lse.assert_untouched(name);
    }
    let mut data = [7.0; 80];
    let mut lse = [7.0; 12];
    let shapes = [
        ("out shape", [3, 4, 8], [32, 8, 1], [3usize, 4], [4, 1]),
        ("out stride", [3, 4, 6], [24, 6, 2], [3, 4], [4, 1]),
        ("out rows overlap", [3, 4, 6], [6, 6, 1], [3, 4], [4, 1]),
        ("out short", [3, 4, 6], [30, 6, 1], [3, 4], [4, 1]),
        ("lse shape", [3, 4, 6], [24, 6, 1], [4, 3], [3, 1]),
    ];
    for (name, shape, strides, lse_shape, lse_strides) in shapes {
        let out = ViewMut::with_strides(&mut data, shape, strides);
        let lse = ViewMut::with_strides(&mut lse, lse_shape, lse_strides);
        found.add(&format!("attention, {name}"), attend(&spec(), |_, _| {}, out, lse));
    }
    assert!(data.iter().chain(&lse).all(|x| *x == 7.0));

    let mut out = Output::new([3, 4, 6], Layout::Contiguous);
    for (name, outs, lses, out_heads) in [
        ("outs short", short([2, 3, 4, 6]), f([2, 3, 4]), 4),
        ("lses", f([2, 3, 4, 6]), f([2, 4, 3]), 4),
        ("out", f([2, 3, 2, 6]), f([2, 3, 2]), 4),
        ("lse", f([2, 3, 4, 6]), f([2, 3, 4]), 3),
    ] {
        let mut flat = [7.0; 12];
        let lse = ViewMut::new(&mut flat[..3 * out_heads], [3, out_heads]);
        found.add(&format!("merge, {name}"), reference::merge(outs, lses, AttentionOutput::with_lse(out.view(), lse)));
        assert_eq!(flat, [7.0; 12]);
    }
    out.assert_untouched("out");

    let mla = Mla::new(2, 4, 3, 2, 5);
    let (mut out4, mut out5) = (Output::new([6, 2, 4], Layout::Padded), Output::new([6, 2, 5], Layout::Padded));
    for (name, mla, q, kv_b) in [
        ("spec", with!(mla.clone(), nope_dim: 0), f([6, 2, 3]), f([2, 8, 4])),
        ("q_nope", mla.clone(), f([6, 2, 4]), f([2, 8, 4])),
        ("kv_b", mla.clone(), f([6, 2, 3]), f([2, 8, 5])),
        ("out", mla.clone(), f([5, 2, 3]), f([2, 8, 4])),
    ] {
        found.add(&format!("mla_absorb_query, {name}"), reference::mla_absorb_query(&mla, q, kv_b, out4.view()));
    }
    for (name, latent, kv_b) in [
        ("latent", f([6, 2, 3]), f([2, 8, 4])),
        ("kv_b", f([6, 2, 4]), f([2, 7, 4])),
        ("out", f([5, 2, 4]), f([2, 8, 4])),
    ] {
        found.add(&format!("mla_project_value, {name}"), reference::mla_project_value(&mla, latent, kv_b, out5.view()));
    }
    out4.assert_untouched("out");
    out5.assert_untouched("out");

    linear(found);
}

fn linear(found: &mut Found) {
    type Edit = fn(&mut Retention, &mut RetentionInput<'static, f32>);
    let edits: [(&str, Edit); 7] = [
        ("spec", |s, _| s.scale = f64::NAN),
        ("q", |_, i| i.q = f([5, 2, 4])),
        ("k", |_, i| i.k = f([4, 2, 3])),
        ("v", |_, i| i.v = gapped([5, 2, 4])),
        ("decay", |_, i| i.decay = &F[..3]),
        ("state_in", |_, i| i.state_in = Some(f([2, 4, 3]))),
        ("v short", |_, i| i.v = short([5, 2, 4])),
    ];
    for (name, edit) in edits {
        let mut spec = Retention::new(2, 3, 4);
        let mut input = RetentionInput::new(f([5, 2, 3]), f([5, 2, 3]), f([5, 2, 4]), &F[..2]);
        edit(&mut spec, &mut input);
        let (mut out, mut state) = (Output::new([5, 2, 4], Layout::Padded), Output::new([2, 3, 4], Layout::Padded));
        let output = RetentionOutput::with_state(out.view(), state.view());
        found.add(&format!("retention, {name}"), reference::retention(&spec, &input, output));
        out.assert_untouched(name);
        state.assert_untouched(name);
    }
    let input = RetentionInput::new(f([5, 2, 3]), f([5, 2, 3]), f([5, 2, 4]), &F[..2]);
    let (mut out, mut state) = (vec![7.0; 40], vec![7.0; 24]);
    let output = RetentionOutput::new(ViewMut::new(&mut out, [4, 2, 5]));
    found.add("retention, out", reference::retention(&Retention::new(2, 3, 4), &input, output));
    let output = RetentionOutput::with_state(ViewMut::new(&mut out, [5, 2, 4]), ViewMut::new(&mut state, [2, 4, 3]));
    found.add("retention, state_out", reference::retention(&Retention::new(2, 3, 4), &input, output));

    type WkvEdit = fn(&mut WkvInput<'static, f32>);
    let edits: [(&str, WkvEdit); 5] = [
        ("k", |i| i.k = short([2, 3, 4])),
        ("v", |i| i.v = f([2, 4, 3])),
        ("decay", |i| i.decay = &F[..3]),
        ("first", |i| i.first = &F[..5]),
        ("state_in", |i| i.state_in = Some(f([3, 2, 3]))),
    ];
    for (name, edit) in edits {
        let mut input = WkvInput::new(f([2, 3, 4]), f([2, 3, 4]), &F[..4], &F[..4]);
        edit(&mut input);
        let output =
            WkvOutput::with_state(ViewMut::new(&mut out[..24], [2, 3, 4]), ViewMut::new(&mut state, [3, 2, 4]));
        found.add(&format!("wkv, {name}"), reference::wkv(&input, output));
    }
    let input = WkvInput::new(f([2, 3, 4]), f([2, 3, 4]), &F[..4], &F[..4]);
    let output = WkvOutput::new(ViewMut::new(&mut out, [2, 3, 5]));
    found.add("wkv, out", reference::wkv(&input, output));
    let output = WkvOutput::with_state(ViewMut::new(&mut out, [2, 3, 4]), ViewMut::new(&mut state, [2, 3, 4]));
    found.add("wkv, state_out", reference::wkv(&input, output));
    assert!(out.iter().chain(&state).all(|x| *x == 7.0));
}
