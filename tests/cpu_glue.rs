//! The glue functions of the CPU backend against the reference: every level and element type, strides, guard values, the derived
//! tolerance, and the same bits whatever the threads and the other tokens.

mod common;

use common::data::Rng;
use common::glue_case::*;
use common::linear_case::{RetentionCase, WithState, WkvCase, assert_with_state, f32s};
use common::routing::LogitsCase;
use common::sums::{assert_sums, naive_sum, starts_for};
use common::*;
use gatefold::cpu::{self, Cpu, Float, Level, PackedLinear, PackedMla};
use gatefold::spec::{
    Mla, Norm, NormKind, QTemperature, QkNorm, QkvPrep, Retention, RetentionForm, Rope, RopeStyle, Router,
};
use gatefold::{Element, View, ViewMut, reference};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

/// Runs a call at every level, with one and with several threads, which must not matter; gives the results of the levels.
fn at_every_level<O: Element>(call: impl Fn(&mut Cpu) -> Vec<O> + Sync) -> Vec<(Level, Vec<O>)> {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (one, several) = (pool(1), pool(3));
    let run = |level| {
        let got = one.install(|| call(&mut Cpu::with_level(level)));
        assert_bits("threads", &several.install(|| call(&mut Cpu::with_level(level))), &got);
        (level, got)
    };
    Level::available().into_iter().map(run).collect()
}

fn element() -> impl Strategy<Value = gatefold::Dtype> {
    select(vec![gatefold::Dtype::F32, gatefold::Dtype::BF16, gatefold::Dtype::F16])
}

/// Widths around the vectors.
fn width() -> impl Strategy<Value = usize> {
    select(WIDTHS.to_vec())
}

fn check_norm<T: Float, O: Float>(spec: &Norm, shape: [usize; 3], layout: Layout, weighted: bool, seed: u64) {
    let case = NormCase::<T>::new(spec, shape, layout, weighted, seed);
    let (truth, naive) = case.expected::<O>();
    let norm =
        |cpu: &mut Cpu, case: &NormCase<T>| -> Vec<O> { case.run(|s, x, w, b, out| cpu::norm(cpu, s, x, w, b, out)) };
    for (level, got) in at_every_level(|cpu| norm(cpu, &case)) {
        assert_rows(&format!("{level}"), &got, &truth, &naive, shape[2]);
        for t in 0..shape[0].min(3) {
            let alone = norm(&mut Cpu::with_level(level), &case.alone(t));
            assert_bits("alone", &alone, &got[t * shape[1] * shape[2]..][..shape[1] * shape[2]]);
        }
    }
}

fn check_elementwise<T: Float>(shape: [usize; 2], layout: Layout, multiplier: f64, seed: u64) {
    let case = PairCase::<T>::new(shape, layout, seed);
    let (truth, naive) = case.sum(multiplier);
    for (level, got) in at_every_level(|cpu| case.run::<T>(|x, y, out| cpu::add(cpu, x, y, multiplier, out))) {
        assert_rows(&format!("add, {level}"), &got, &truth, &naive, shape[1]);
    }
    let (truth, naive) = case.gated();
    for (level, got) in at_every_level(|cpu| case.run::<T>(|x, y, out| cpu::sigmoid_mul(cpu, x, y, out))) {
        assert_rows(&format!("sigmoid_mul, {level}"), &got, &truth, &naive, shape[1]);
    }
}

fn check_rope<T: Float>(shape: [usize; 3], style: RopeStyle, rotary_dim: usize, layout: Layout, seed: u64) {
    let case = RopeCase::<T>::new(shape, style, rotary_dim, layout, seed);
    let (truth, naive) = case.expected();
    for (level, got) in at_every_level(|cpu| case.run::<T>(|s, x, p, table, out| cpu::rope(cpu, s, x, p, table, out))) {
        assert_rows(&format!("{level}"), &got, &truth, &naive, shape[2]);
    }
}

fn check_prepare_qkv<T: Float>(spec: &QkvPrep, n: usize, layout: Layout, seed: u64) {
    let case = QkvCase::<T>::new(spec, n, layout, seed);
    let expected = case.expected();
    for (level, got) in
        at_every_level(|cpu| case.run::<T>(|spec, input, out| cpu::prepare_qkv(cpu, spec, input, out)).concat())
    {
        let (q, rest) = got.split_at(expected.truth[0].len());
        let (k, v) = rest.split_at(expected.truth[1].len());
        expected.check(&format!("{level}"), spec.head_dim, [q, k, v]);
        // The last token alone.
        if n > 1 {
            let mut cpu = Cpu::with_level(level);
            cpu.reserve(cpu::prepare_qkv_workspace_bytes(spec, 1));
            let bytes = cpu.workspace_bytes();
            let alone = case.alone(n - 1).run::<T>(|spec, input, out| cpu::prepare_qkv(&mut cpu, spec, input, out));
            assert_bits("q alone", &alone[0], &q[q.len() - alone[0].len()..]);
            assert_bits("k alone", &alone[1], &k[k.len() - alone[1].len()..]);
            assert_eq!(cpu.workspace_bytes(), bytes);
        }
    }
}

fn check_retention<T: Float>(spec: &Retention, n: usize, layout: Layout, with_state: bool, seed: u64) {
    let case = RetentionCase::<T>::new(spec, n, layout, with_state, seed);
    let expected = case.expected();
    for (level, got) in at_every_level(|cpu| {
        cpu.reserve(cpu::retention_workspace_bytes(spec, n));
        let bytes = cpu.workspace_bytes();
        let got = f32s::<T>(case.run(|spec, input, out| cpu::retention(cpu, spec, input, out)));
        assert_eq!(cpu.workspace_bytes(), bytes);
        got
    }) {
        check_with_state(level, &got, &expected, spec.value_dim);
    }
}

/// Outputs and state as f32, which holds them exactly.
fn check_with_state<T: Float>(
    level: Level,
    got: &[f32],
    expected: &(WithState<f64, f64>, WithState<T, f32>),
    width: usize,
) {
    let (out, state) = got.split_at(expected.1.0.len());
    let out: Vec<T> = out.iter().map(|x| T::from_f32(*x)).collect();
    assert_with_state(&format!("{level}"), (&out, state), expected, width);
}

fn check_wkv<T: Float>(shape: [usize; 3], layout: Layout, with_state: bool, seed: u64) {
    let case = WkvCase::<T>::new(shape, layout, with_state, seed);
    let expected = case.expected();
    for (level, got) in at_every_level(|cpu| f32s::<T>(case.run(|input, out| cpu::wkv(cpu, input, out)))) {
        check_with_state(level, &got, &expected, shape[2]);
    }
}

fn check_mla<T: Float>(spec: &Mla, n: usize, layout: Layout, seed: u64) {
    let mut rng = Rng::new(seed);
    let (heads, rank, nope, value) = (spec.num_heads, spec.kv_lora_rank, spec.nope_dim, spec.value_dim);
    let kv_b =
        Array::<T, 3>::new([heads, nope + value, rank], layout, &rng.normals(heads * (nope + value) * rank, 0.3));
    let packed = PackedMla::pack(spec, kv_b.view()).unwrap();
    let q = array::<T, 3>(&mut rng, [n, heads, nope], layout);
    let latent = array::<T, 3>(&mut rng, [n, heads, rank], layout);
    let naive = |x: &Array<T, 3>, outputs: usize, truth: &[f64], weight: &dyn Fn(usize, usize, usize) -> T| -> Vec<T> {
        let starts = starts_for(truth.len());
        let sum = |i: usize| {
            let (t, h, o) = (i / outputs / heads, i / outputs % heads, i % outputs);
            let term = |i| x.at([t, h, i]).to_f32() * weight(h, o, i).to_f32();
            let terms: Vec<f32> = (0..x.shape()[2]).map(term).collect();
            T::from_f32(naive_sum(&terms, 0.0, truth[i], starts))
        };
        (0..truth.len()).map(sum).collect()
    };

    let shape = [n, heads, rank];
    let truth = run(shape, layout, |out| reference::mla_absorb_query(spec, q.view(), kv_b.view(), out));
    let naive_rows = naive(&q, rank, &truth, &|h, c, d| kv_b.at([h, d, c]));
    for (level, got) in at_every_level(|cpu| {
        cpu.reserve(cpu::mla_workspace_bytes::<T>(cpu, &packed, n));
        let bytes = cpu.workspace_bytes();
        let got = run::<T, 3>(shape, layout, |out| cpu::mla_absorb_query(cpu, spec, q.view(), &packed, out));
        assert_eq!(cpu.workspace_bytes(), bytes);
        got
    }) {
        assert_sums(&format!("absorb, {level}"), &got, &truth, &naive_rows, rank);
    }
    let shape = [n, heads, value];
    let truth = run(shape, layout, |out| reference::mla_project_value(spec, latent.view(), kv_b.view(), out));
    let naive_rows = naive(&latent, value, &truth, &|h, d, c| kv_b.at([h, nope + d, c]));
    for (level, got) in at_every_level(|cpu| {
        run::<T, 3>(shape, layout, |out| cpu::mla_project_value(cpu, spec, latent.view(), &packed, out))
    }) {
        assert_sums(&format!("project, {level}"), &got, &truth, &naive_rows, value);
    }
}

fn check_router_logits<T: Float>(
    n: usize,
    hidden: usize,
    experts: usize,
    jitter: Option<f64>,
    layout: Layout,
    seed: u64,
) {
    let case = LogitsCase::<T, T>::new(n, hidden, experts, jitter, layout, seed);
    let packed = PackedLinear::pack(case.weight.view()).unwrap();
    for (level, got) in at_every_level(|cpu| {
        cpu.reserve(cpu::router_logits_workspace_bytes::<T>(cpu, &case.spec, &packed, n));
        let bytes = cpu.workspace_bytes();
        let got = case.run(|spec, x, _, bias, seed, out| cpu::router_logits(cpu, spec, x, &packed, bias, seed, out));
        assert_eq!(cpu.workspace_bytes(), bytes);
        got
    }) {
        case.check(&level.to_string(), &got);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn norms(
        kind in select(vec![NormKind::Rms, NormKind::Layer]),
        shape in (0usize..4, 1usize..4, width()).prop_map(|(a, b, c)| [a, b, c]),
        layout in strategies::layout(),
        weighted in any::<bool>(),
        bias in any::<bool>(),
        offset in select(vec![0.0, 1.0]),
        eps in select(vec![1e-6, 1e-3]),
        dtypes in (element(), any::<bool>()),
        seed in any::<u64>(),
    ) {
        let mut spec = Norm::rms(eps);
        (spec.kind, spec.weight_offset, spec.bias) = (kind, offset, bias && kind == NormKind::Layer);
        match dtypes {
            (gatefold::Dtype::BF16, true) => check_norm::<bf16, f32>(&spec, shape, layout, weighted, seed),
            (gatefold::Dtype::BF16, false) => check_norm::<bf16, bf16>(&spec, shape, layout, weighted, seed),
            (gatefold::Dtype::F16, true) => check_norm::<f16, f32>(&spec, shape, layout, weighted, seed),
            (gatefold::Dtype::F16, false) => check_norm::<f16, f16>(&spec, shape, layout, weighted, seed),
            (_, true) => check_norm::<f32, bf16>(&spec, shape, layout, weighted, seed),
            (_, false) => check_norm::<f32, f32>(&spec, shape, layout, weighted, seed),
        }
    }

    #[test]
    fn elementwise(
        shape in (0usize..4, width()).prop_map(|(a, b)| [a, b]),
        layout in strategies::layout(),
        multiplier in select(vec![1.0, 0.22, -3.0]),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_elementwise(shape, layout, multiplier, seed));
    }

    #[test]
    fn rotations(
        shape in (0usize..4, 1usize..4).prop_map(|(a, b)| [a, b]),
        dims in select(vec![(2usize, 2usize), (8, 4), (16, 16), (33, 20), (64, 64), (64, 32), (80, 80), (128, 128), (130, 66)]),
        style in select(vec![RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf]),
        layout in strategies::layout(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_rope([shape[0], shape[1], dims.0], style, dims.1, layout, seed));
    }

    #[test]
    fn prepared_qkv(
        heads in select(vec![(1usize, 1usize), (4, 2), (6, 1), (3, 3)]),
        dims in select(vec![(8usize, 8usize, 8usize), (16, 16, 8), (33, 20, 32), (64, 64, 64), (80, 40, 20), (128, 128, 128)]),
        norm in select(vec![None, Some(QkNorm::PerHead), Some(QkNorm::Full), Some(QkNorm::L2AfterRope)]),
        offset in select(vec![0.0, 1.0]),
        clip in proptest::option::of(select(vec![0.5, 2.0])),
        style in proptest::option::of(select(vec![RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf])),
        temperature in any::<bool>(),
        call in (0usize..5, strategies::layout(), element(), any::<u64>()),
    ) {
        let mut spec = QkvPrep::new(heads.0, heads.1, dims.0);
        (spec.value_dim, spec.qk_norm, spec.norm.weight_offset, spec.clip) = (dims.1, norm, offset, clip);
        spec.rope = style.map(|style| Rope::new(style, dims.2, 1000.0));
        spec.q_temperature = temperature.then(|| QTemperature::new(8.0, 0.1));
        let (n, layout, dtype, seed) = call;
        with_type!(dtype, check_prepare_qkv(&spec, n, layout, seed));
    }

    #[test]
    fn retentions(
        n in select(vec![0usize, 1, 2, 7, 16, 17]),
        dims in select(vec![(1usize, 1usize, 16usize), (2, 8, 16), (3, 17, 5), (2, 32, 33), (1, 64, 64)]),
        form in select(vec![
            RetentionForm::Parallel,
            RetentionForm::Recurrent,
            RetentionForm::Chunkwise(1),
            RetentionForm::Chunkwise(5),
            RetentionForm::Chunkwise(100),
        ]),
        layout in strategies::layout(),
        with_state in any::<bool>(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        let mut spec = Retention::new(dims.0, dims.1, dims.2);
        spec.form = form;
        with_type!(dtype, check_retention(&spec, n, layout, with_state, seed));
    }

    #[test]
    fn wkvs(
        shape in (1usize..4, select(vec![0usize, 1, 2, 9, 40]), width()).prop_map(|(a, b, c)| [a, b, c]),
        layout in strategies::layout(),
        with_state in any::<bool>(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_wkv(shape, layout, with_state, seed));
    }

    #[test]
    fn latent_attention(
        n in select(vec![0usize, 1, 3, 13]),
        dims in select(vec![(1usize, 8usize, 4usize, 5usize), (2, 33, 17, 31), (4, 64, 32, 32), (2, 65, 33, 64)]),
        layout in strategies::layout(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        let spec = Mla::new(dims.0, dims.1, dims.2, 8, dims.3);
        with_type!(dtype, check_mla(&spec, n, layout, seed));
    }

    #[test]
    fn logits_of_the_router(
        n in select(vec![0usize, 1, 5, 13]),
        sizes in select(vec![(1usize, 1usize), (16, 8), (65, 33), (129, 60)]),
        jitter in proptest::option::of(select(vec![0.01, 0.3])),
        layout in strategies::layout(),
        dtype in element(),
        seed in any::<u64>(),
    ) {
        with_type!(dtype, check_router_logits(n, sizes.0, sizes.1, jitter, layout, seed));
    }
}

/// Rows whose squares f32 cannot hold, with and without an epsilon.
#[test]
fn norms_of_very_large_and_very_small_rows() {
    for eps in [0.0, 1e-6] {
        for scale in [1e-42f32, 1e-30, 1e-20, 1e18, 1e25, 3e38] {
            for spec in [Norm::rms(eps), Norm::layer(eps)] {
                let x: Vec<f32> = (0..70).map(|i| scale * ((i * 37 % 70) as f32 / 70.0 - 0.4)).collect();
                let x = Array::new([1, 70], Layout::Padded, &x);
                let truth =
                    run([1, 70], Layout::Padded, |out| reference::norm::<_, f32, 2>(&spec, x.view(), None, None, out));
                for (level, got) in at_every_level(|cpu| {
                    run::<f32, 2>([1, 70], Layout::Padded, |out| cpu::norm(cpu, &spec, x.view(), None, None, out))
                }) {
                    for (got, truth) in got.iter().zip(&truth) {
                        let close = (f64::from(*got) - truth).abs() <= 1e-6 * (1.0 + truth.abs());
                        assert!(close, "{spec:?} of {scale:e} at {level}: {got:e}, expected {truth:e}");
                    }
                }
            }
        }
    }
}

/// NaN and infinity stay in their row.
#[test]
fn a_nan_stays_in_its_row() {
    let mut values = vec![1.0f32; 3 * 40];
    values[45] = f32::NAN;
    let x = Array::new([3, 40], Layout::Padded, &values);
    for (level, got) in at_every_level(|cpu| {
        run::<f32, 2>([3, 40], Layout::Padded, |out| cpu::norm(cpu, &Norm::rms(1e-6), x.view(), None, None, out))
    }) {
        assert!(got[..40].iter().chain(&got[80..]).all(|x| x.is_finite()), "{level}");
        assert!(got[40..80].iter().all(|x| x.is_nan()), "{level}");
    }
}

#[test]
fn kv_append_copies() {
    for layout in Layout::ALL {
        for paged in [false, true] {
            let case = AppendCase::<bf16>::new(3, [16, 5], paged, layout, seed());
            let want = case.run(reference::kv_append);
            for (level, got) in at_every_level(|cpu| case.run(|input, cache| cpu::kv_append(cpu, input, cache))) {
                assert_bits(&format!("{level}, paged: {paged}"), &got, &want);
            }
        }
    }
}

/// What was packed for another specification is an error.
#[test]
fn packed_weights_are_checked() {
    let spec = Mla::new(2, 8, 4, 4, 4);
    let kv_b = vec![0.0f32; 2 * 8 * 8];
    let packed = PackedMla::pack(&spec, View::new(&kv_b, [2, 8, 8])).unwrap();
    let other = Mla::new(2, 8, 5, 4, 3);
    let (q, mut out) = ([0.0f32; 10], [7.0f32; 16]);
    let mut cpu = Cpu::with_level(Level::best());
    let error =
        cpu::mla_absorb_query(&mut cpu, &other, View::new(&q, [1, 2, 5]), &packed, ViewMut::new(&mut out, [1, 2, 8]));
    assert_eq!(
        error.unwrap_err().to_string(),
        "`kv_b` is packed for nope_dim 4 and value_dim 4, expected nope_dim 5 and value_dim 3"
    );
    let error = PackedMla::pack(&spec, View::new(&kv_b, [2, 4, 16])).unwrap_err();
    assert_eq!(error.to_string(), "`kv_b` has shape [2, 4, 16], expected [2, 8, 8]");
    let packed = PackedLinear::pack(View::new(&kv_b, [8, 16])).unwrap();
    let logits = ViewMut::new(&mut out, [2, 8]);
    let error = cpu::router_logits(&mut cpu, &Router::new(8, 2), View::new(&q, [2, 5]), &packed, None, 0, logits);
    assert_eq!(error.unwrap_err().to_string(), "`weight` has shape [1, 8, 16], expected [1, 8, 5]");
    assert_eq!(out, [7.0; 16]);
}

/// No rows, no columns, no sequence, no channels and no tokens are legal; without tokens a state stays.
#[test]
fn empty_calls() {
    use gatefold::args::{WkvInput, WkvOutput};
    let mut cpu = Cpu::new().unwrap();
    for shape in [[0, 8], [3, 0]] {
        let (x, weight, mut out) = ([0.0f32; 0], vec![1.0; shape[1]], [0.0f32; 0]);
        let out = ViewMut::new(&mut out, shape);
        cpu::norm(&mut cpu, &Norm::rms(1e-5), View::new(&x, shape), Some(&weight), None, out).unwrap();
    }
    for [batch, channels] in [[0, 4], [2, 0], [2, 4]] {
        let (none, ones, mut out) = ([0.0f32; 0], vec![1.0; channels], [0.0f32; 0]);
        let state: Vec<f32> = (0..3 * batch * channels).map(|i| i as f32).collect();
        let mut state_out = vec![0.0; state.len()];
        let rows = View::new(&none, [batch, 0, channels]);
        let mut input = WkvInput::new(rows, rows, &ones, &ones);
        input.state_in = Some(View::new(&state, [3, batch, channels]));
        let mut output = WkvOutput::new(ViewMut::new(&mut out, [batch, 0, channels]));
        output.state_out = Some(ViewMut::new(&mut state_out, [3, batch, channels]));
        cpu::wkv(&mut cpu, &input, output).unwrap();
        assert_eq!(state_out, state);
    }
    let spec = Mla::new(2, 16, 8, 4, 8);
    let kv_b = vec![1.0f32; 2 * 16 * 16];
    let packed = PackedMla::pack(&spec, View::new(&kv_b, [2, 16, 16])).unwrap();
    let (none, mut out) = ([0.0f32; 0], [0.0f32; 0]);
    cpu::mla_absorb_query(&mut cpu, &spec, View::new(&none, [0, 2, 8]), &packed, ViewMut::new(&mut out, [0, 2, 16]))
        .unwrap();
    cpu::mla_project_value(&mut cpu, &spec, View::new(&none, [0, 2, 16]), &packed, ViewMut::new(&mut out, [0, 2, 8]))
        .unwrap();
}
