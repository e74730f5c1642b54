//! Attention of few queries over many keys, and the merge of parts.

use crate::budget::budget;
use crate::common::attention_case::{DenseBias, DenseMask, KvLayout, Sinks};
use crate::common::simulator::Simulator;
use crate::common::tolerance::ulp;
use crate::common::{
    Array, AttentionCase, AttentionOptions, AttentionPairs, AttentionResult, Layout, Output, Rng, assert_rows, naive,
    seed,
};
use crate::{on_devices, on_gpu, on_large_devices, staged};
use gatefold::args::{AttentionInput, AttentionOutput, Kv};
use gatefold::cuda::driver::{Buffer, Driver, Limits};
use gatefold::cuda::{AttentionArgs, AttentionPlan, AttentionProblem, KvShape, Stream};
use gatefold::spec::{Attention, Mask};
use gatefold::{Element, Result, View, ViewMut, reference};
use half::{bf16, f16};
use simt::Class;

mod bugs;
mod counters;

// --- merge ------------------------------------------------------------------------------------------------------------

/// `merge` against the reference, whatever is infinite, NaN or absent.
fn check_merge<T: Element, O: Element>(driver: &dyn Driver, layout: Layout, shape: [usize; 4], rng: &mut Rng) {
    let [parts, tokens, heads, dv] = shape;
    let outs = Array::<T, 4>::new(shape, layout, &rng.normals(parts * tokens * heads * dv, 1.0));
    let mut values: Vec<f32> = rng.normals(parts * tokens * heads, 3.0);
    let special = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, f32::NEG_INFINITY];
    values.iter_mut().filter(|_| rng.chance(0.2)).enumerate().for_each(|(i, x)| *x = special[i % 4]);
    let lses = Array::<f32, 3>::new([parts, tokens, heads], layout, &values);
    let (mut truth, mut truth_lse) = (vec![0.0; tokens * heads * dv], vec![0.0; tokens * heads]);
    let output = AttentionOutput::with_lse(
        ViewMut::new(&mut truth, [tokens, heads, dv]),
        ViewMut::new(&mut truth_lse, [tokens, heads]),
    );
    reference::merge(outs.view(), lses.view(), output).unwrap();
    let mut out = Output::<O, 3>::new([tokens, heads, dv], layout);
    let mut lse = Output::<f32, 2>::new([tokens, heads], layout);
    let output = AttentionOutput::with_lse(out.view(), lse.view());
    staged::merge(driver, outs.view(), lses.view(), output).unwrap();
    // Sums of a few shares, each of them below 1: some roundings of the largest part, and that of the result.
    let out: Vec<f64> = out.finish("out").iter().map(|x| x.to_f64()).collect();
    let lse: Vec<f64> = lse.finish("lse").iter().map(|x| x.to_f64()).collect();
    let rounding = 0.5 * ulp(O::DTYPE, 1.0);
    for (what, got, truth, relative) in [("out", out, truth, rounding), ("lse", lse, truth_lse, 0.0)] {
        for (got, truth) in got.iter().zip(&truth) {
            let same = got.is_nan() && truth.is_nan() || got == truth;
            let allowed = 3e-6 + relative * truth.abs();
            assert!(same || (got - truth).abs() <= allowed, "{what} {shape:?}: {got}, expected {truth}");
        }
    }
}

/// FlagGems#5235: also without an access beyond the parts.
#[test]
fn merge_is_the_reference_5235() {
    on_devices(false, |driver| {
        let mut rng = Rng::new(seed());
        // Around the 8 warps, the 32 parts of a round, and the 128 columns of a block.
        for shape in [
            [0, 3, 2, 5],
            [1, 1, 1, 1],
            [2, 7, 3, 40],
            [5, 3, 4, 17],
            [3, 0, 2, 4],
            [9, 2, 1, 128],
            [33, 1, 2, 129],
            [300, 1, 1, 33],
            [2, 2, 2, 0],
        ] {
            for layout in Layout::ALL {
                check_merge::<bf16, bf16>(driver, layout, shape, &mut rng);
                check_merge::<bf16, f32>(driver, layout, shape, &mut rng);
                check_merge::<f16, f16>(driver, layout, shape, &mut rng);
                check_merge::<f32, f32>(driver, layout, shape, &mut rng);
                check_merge::<f32, bf16>(driver, layout, shape, &mut rng);
            }
        }
    });
}

/// Parts without weight behind the others, in between, or none: the same bits, also without `lse`.
#[test]
fn merge_bits() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(seed());
        let (tokens, heads, dv) = (3, 2, 130);
        let outs: Vec<f32> = rng.normals(13 * tokens * heads * dv, 1.0);
        let lses: Vec<f32> = rng.normals(13 * tokens * heads, 3.0);
        let run = |parts: usize, pad: usize| {
            let mut outs = outs[..parts * tokens * heads * dv].to_vec();
            outs.resize((parts + pad) * tokens * heads * dv, f32::NAN);
            let mut lses = lses[..parts * tokens * heads].to_vec();
            lses.resize((parts + pad) * tokens * heads, f32::NEG_INFINITY);
            let outs = Array::<f32, 4>::new([parts + pad, tokens, heads, dv], Layout::Contiguous, &outs);
            let lses = Array::<f32, 3>::new([parts + pad, tokens, heads], Layout::Contiguous, &lses);
            let mut out = Output::<f32, 3>::new([tokens, heads, dv], Layout::Padded);
            staged::merge(driver, outs.view(), lses.view(), AttentionOutput::new(out.view())).unwrap();
            out.finish("out").iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        for parts in [1, 5, 13] {
            let alone = run(parts, 0);
            assert_eq!(alone, run(parts, 0), "twice");
            for pad in [1, 40, 300] {
                assert_eq!(alone, run(parts, pad), "{parts} parts and {pad} without weight");
            }
        }
    });
}

// --- attention --------------------------------------------------------------------------------------------------------

/// The values of a case: its own, or the first columns of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    Own,
    OfKeys,
}

/// Runs a case, with `v` as the first columns of `k` if asked for.
fn run<T: Element, O: Element, R: Element>(
    case: &AttentionCase<T>,
    values: Values,
    attention: impl FnOnce(&Attention, &AttentionInput<'_, T, f32>, AttentionOutput<'_, O, R>) -> Result<()>,
) -> AttentionResult<O, R> {
    case.run(|spec, input, output| {
        let input =
            with!(*input, kv: if values == Values::OfKeys { of_keys(input.kv, spec.value_dim) } else { input.kv });
        attention(spec, &input, output)
    })
}

/// The same keys, whose first columns are the values.
fn of_keys<T>(kv: Kv<'_, T>, value_dim: usize) -> Kv<'_, T> {
    fn narrow<T>(k: View<'_, T, 4>, value_dim: usize) -> View<'_, T, 4> {
        let [blocks, rows, heads, _] = k.shape();
        View::with_strides(k.data(), [blocks, rows, heads, value_dim], k.strides())
    }
    match kv {
        Kv::Ragged { k, cu_seqlens_kv, .. } => {
            let [rows, heads, _] = k.shape();
            Kv::ragged(k, View::with_strides(k.data(), [rows, heads, value_dim], k.strides()), cu_seqlens_kv)
        }
        Kv::Cache { k, kv_lens, .. } => Kv::cache(k, narrow(k, value_dim), kv_lens),
        Kv::Paged { k, block_table, kv_lens, .. } => Kv::paged(k, narrow(k, value_dim), block_table, kv_lens),
        _ => unreachable!("three layouts"),
    }
}

/// `cuda::attention` against the reference; gives the share of the tolerance that is used.
fn check_values<T: Element>(driver: &dyn Driver, case: &AttentionCase<T>, values: Values) -> f64 {
    let truth = run(case, values, reference::attention);
    let got = run(case, values, |spec, input, output| staged::attention(driver, spec, input, output));
    // 16-bit types: the weights are rounded for the product with the values.
    let mut naive = None;
    run::<T, T, f32>(case, values, |spec, input, _| {
        let of_truth = (&truth.out[..], &truth.lse[..]);
        naive = Some(naive::attention_unlucky::<T, T>(spec, input, naive::Store::Storage, of_truth));
        Ok(())
    });
    let naive = naive.expect("it ran");
    let context = |what| format!("{what} of {} {:?}, values {values:?}", T::DTYPE, case.options);
    let out = assert_rows(&context("out"), &got.out, &truth.out, &naive.out, case.spec.value_dim);
    out.max(assert_rows(&context("lse"), &got.lse, &truth.lse, &naive.lse, 1))
}

fn check<T: Element>(driver: &dyn Driver, case: &AttentionCase<T>) -> f64 {
    check_values(driver, case, Values::Own)
}

fn check_all(driver: &dyn Driver, options: &AttentionOptions, seed: u64) {
    check(driver, &AttentionCase::<f32>::new(options, seed));
    check(driver, &AttentionCase::<bf16>::new(options, seed));
    check(driver, &AttentionCase::<f16>::new(options, seed));
}

/// Lengths around the tile (32 keys) and the split (256 keys), widths around the buckets, aligned and not.
#[test]
fn shapes() {
    on_devices(false, |driver| {
        let mut rng = Rng::new(seed());
        let lens = [0, 1, 2, 31, 32, 33, 64, 65, 255, 256, 257, 300, 513, 800];
        for (i, kv_len) in lens.into_iter().enumerate() {
            for (q_len, heads) in [(1, (4, 1)), (1, (2, 2)), (3, (6, 2)), (2, (20, 1))] {
                let mut options = AttentionOptions::new(heads, 0, &[(q_len, kv_len)]);
                options.dims = *rng.pick(&[(64, 64), (8, 16), (40, 24), (80, 80), (128, 128), (33, 20), (1, 1)]);
                options.kv =
                    [KvLayout::Ragged, KvLayout::Paged(16), KvLayout::Cache, KvLayout::Paged(7)][(i + q_len) % 4];
                options.layout = *rng.pick(&[Layout::Contiguous, Layout::Contiguous, Layout::Padded, Layout::Permuted]);
                options.mask.causal = rng.chance(0.5);
                match rng.below(4) {
                    0 => check(driver, &AttentionCase::<f32>::new(&options, rng.next())),
                    1 => check(driver, &AttentionCase::<f16>::new(&options, rng.next())),
                    _ => check(driver, &AttentionCase::<bf16>::new(&options, rng.next())),
                };
            }
        }
        check_all(driver, &AttentionOptions::new((2, 1), 16, &[]), 1);
        check_all(driver, &AttentionOptions::new((2, 1), 16, &[(0, 7), (0, 0)]), 1);
    });
}

/// Absorbed MLA: one key/value head of width 576 whose first 512 columns are the values; few heads, many heads, values apart.
#[test]
fn mla_absorbed() {
    on_devices(false, |driver| {
        for (heads, lens) in [(16, [(1, 40), (1, 530)]), (40, [(1, 33), (1, 1)]), (3, [(2, 70), (3, 515)])] {
            let mut options = AttentionOptions::new((heads, 1), 0, &lens);
            options.dims = (576, 512);
            options.mask = Mask::causal();
            options.kv = KvLayout::Paged(64);
            options.scale = Some(1.0 / 192f64.sqrt());
            let case = AttentionCase::<bf16>::new(&options, 4);
            check_values(driver, &case, Values::OfKeys);
            check_values(driver, &AttentionCase::<f16>::new(&options, 4), Values::OfKeys);
            if heads == 3 {
                check(driver, &case);
                options.layout = Layout::Padded;
                check(driver, &AttentionCase::<f16>::new(&options, 5));
                check(driver, &AttentionCase::<f32>::new(&options, 5));
                options.dims = (264, 40);
                check(driver, &AttentionCase::<bf16>::new(&options, 5));
            }
        }
    });
}

/// Every pair of values of two options.
#[test]
fn pairs_of_options() {
    let pairs = AttentionPairs {
        heads: &[(2, 2), (4, 2), (6, 1), (8, 1)],
        dims: &[(16, 16), (8, 40), (64, 32)],
        lens: &[
            &[(5, 66), (0, 3), (1, 90), (7, 4)],
            &[(1, 130)],
            &[(4, 40), (1, 1), (3, 270)],
            &[(1, 30), (1, 300), (2, 64), (0, 0)],
        ],
        window_left: 70,
        page: 1,
        sinks: false,
    };
    on_devices(false, |driver| pairs.check(2, |options, seed| check_all(driver, options, seed)));
}

/// The bits of a query's result.
fn bits<T: Element>(result: &AttentionResult<T, f32>, tokens: std::ops::Range<usize>, heads: usize) -> Vec<u8> {
    let width = result.out.len() / result.lse.len() * heads;
    let out: &[u8] = bytemuck::cast_slice(&result.out[tokens.start * width..tokens.end * width]);
    let lse: &[u8] = bytemuck::cast_slice(&result.lse[tokens.start * heads..tokens.end * heads]);
    [out, lse].concat()
}

/// The case with the rows of the first `lens.len()` sequences of another one, as far as `lens` go, from the last query back.
fn same_rows<T: Element>(from: &AttentionCase<T>, options: &AttentionOptions, seqs: &[usize]) -> AttentionCase<T> {
    let mut case = AttentionCase::<T>::new(options, 77);
    let ((heads, kv_heads), (dim, value_dim)) = (options.heads, options.dims);
    for (seq, of) in seqs.iter().copied().enumerate() {
        let ((q_len, kv_len), (of_q_len, of_kv_len)) = (options.lens[seq], from.options.lens[of]);
        for i in 0..q_len {
            // The query at the same position.
            let of_i = of_q_len + kv_len + i - of_kv_len - q_len;
            let (to_token, of_token) = (case.cu_seqlens_q[seq] as usize + i, from.cu_seqlens_q[of] as usize + of_i);
            for h in 0..heads {
                (0..dim).for_each(|d| case.q.set([to_token, h, d], from.q.at([of_token, h, d])));
            }
        }
        for j in 0..kv_len {
            let ([block, row], [of_block, of_row]) = (case.place(seq, j), from.place(of, j));
            for g in 0..kv_heads {
                (0..dim).for_each(|d| case.k.set([block, row, g, d], from.k.at([of_block, of_row, g, d])));
                (0..value_dim).for_each(|d| case.v.set([block, row, g, d], from.v.at([of_block, of_row, g, d])));
            }
        }
    }
    case.sinks = from.sinks.clone();
    case
}

/// The same bits twice, alone and in a batch, in one call and token by token, wherever keys lie, whatever the alignment.
fn check_bits<T: Element>(driver: &dyn Driver) {
    let attend = |case: &AttentionCase<T>| -> AttentionResult<T, f32> {
        case.run(|spec, input, output| staged::attention(driver, spec, input, output))
    };
    for (heads, dims, window, sinks) in
        [((4, 1), (64, 64), None, Sinks::None), ((6, 2), (40, 24), Some(100), Sinks::Finite)]
    {
        let mut options = AttentionOptions::new(heads, 0, &[(5, 540), (2, 3), (1, 290)]);
        (options.dims, options.mask, options.sinks) = (dims, Mask::causal(), sinks);
        options.mask.window_left = window;
        let whole = AttentionCase::<T>::new(&options, 6);
        let expected = attend(&whole);
        let all = |result: &AttentionResult<T, f32>| bits(result, 0..8, heads.0);
        assert!(all(&attend(&whole)) == all(&expected), "twice");
        for kv in [KvLayout::Cache, KvLayout::Paged(1), KvLayout::Paged(7), KvLayout::Paged(16), KvLayout::Paged(64)] {
            for layout in [Layout::Contiguous, Layout::Padded] {
                let other = same_rows(&whole, &AttentionOptions { kv, layout, ..options.clone() }, &[0, 1, 2]);
                assert!(all(&attend(&other)) == all(&expected), "{} {kv:?} {layout:?}", T::DTYPE);
            }
        }
        // Query `i` of the first sequence alone: it sees fewer keys, and the other sequences are gone or others.
        for i in 0..5 {
            let mine = bits(&expected, i..i + 1, heads.0);
            let alone = AttentionOptions { lens: vec![(1, 536 + i)], ..options.clone() };
            let alone = attend(&same_rows(&whole, &alone, &[0]));
            assert!(bits(&alone, 0..1, heads.0) == mine, "{} query {i} alone", T::DTYPE);
            let lens = vec![(1, 290), (1, 536 + i), (1, 900)];
            let batch = AttentionOptions { lens, kv: KvLayout::Paged(16), ..options.clone() };
            let batch = attend(&same_rows(&whole, &batch, &[2, 0]));
            assert!(bits(&batch, 1..2, heads.0) == mine, "{} query {i} in a batch", T::DTYPE);
            assert!(bits(&batch, 0..1, heads.0) == bits(&expected, 7..8, heads.0), "{} another one", T::DTYPE);
        }
    }
}

/// What a device is told about the lengths of a case, and which bounds its plan has.
#[derive(Clone, Debug)]
struct Lengths {
    cu_seqlens_q: Vec<u32>,
    /// Prefix sums for ragged rows, else lengths.
    kv_lens: Vec<u32>,
    block_table: Vec<u32>,
    max_q_len: usize,
    max_kv_len: usize,
}

impl Lengths {
    /// Those of the case.
    fn of<T: Element>(case: &AttentionCase<T>) -> Self {
        let longest = |len: fn(&(usize, usize)) -> usize| case.options.lens.iter().map(len).max().unwrap_or(0);
        Lengths {
            cu_seqlens_q: case.cu_seqlens_q.clone(),
            kv_lens: if case.options.kv == KvLayout::Ragged { &case.cu_seqlens_kv } else { &case.kv_lens }.clone(),
            block_table: case.block_table.values(),
            max_q_len: longest(|lens| lens.0),
            max_kv_len: longest(|lens| lens.1),
        }
    }
}

/// What stands in the outputs before a launch.
const UNTOUCHED: u8 = 0xa5;

/// Launches a case of contiguous arrays with these lengths; gives the names of the kernels, too.
fn launch<T: Element>(
    driver: &dyn Driver,
    case: &AttentionCase<T>,
    lengths: &Lengths,
    values: Values,
) -> (AttentionResult<T, f32>, Vec<&'static str>) {
    fn upload<'a, U: bytemuck::NoUninit>(driver: &'a dyn Driver, data: &[U]) -> Buffer<'a> {
        Buffer::from_slice(driver, data).unwrap()
    }
    fn strides<U: bytemuck::Pod>(array: &Array<U, 4>) -> [usize; 4] {
        let shape = array.shape();
        std::array::from_fn(|i| if shape[i] == 1 { 0 } else { shape[i + 1..].iter().product() })
    }
    let (spec, [num_tokens, heads, _], [blocks, rows, ..]) = (&case.spec, case.q.shape(), case.k.shape());
    let kv = match case.options.kv {
        KvLayout::Ragged => KvShape::ragged(rows),
        KvLayout::Cache => KvShape::cache(rows),
        KvLayout::Paged(size) => KvShape::paged(blocks, size, case.block_table.shape()[1]),
    };
    let num_seqs = lengths.cu_seqlens_q.len() - 1;
    let mut problem = AttentionProblem::new(spec.clone(), T::DTYPE, num_seqs, num_tokens, kv);
    (problem.max_q_len, problem.max_kv_len) = (lengths.max_q_len, lengths.max_kv_len);
    problem.lse_strides = Some([heads, 1]);
    problem.mask_strides = case.mask.as_ref().map(strides);
    problem.bias_strides = case.bias.as_ref().map(strides);
    if values == Values::OfKeys {
        problem.v_strides = problem.k_strides;
    }
    let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
    let [q, k, v] = [case.q.values(), case.k.values(), case.v.values()].map(|data| upload(driver, &data));
    let (cu, lens) = (upload(driver, &lengths.cu_seqlens_q), upload(driver, &lengths.kv_lens));
    let table = upload(driver, &lengths.block_table);
    let mask = case.mask.as_ref().map(|mask| upload(driver, &mask.values()));
    let bias = case.bias.as_ref().map(|bias| upload(driver, &bias.values()));
    let sinks = case.sinks.as_ref().map(|sinks| upload(driver, sinks));
    let begin = case.kv_begin.as_ref().map(|begin| upload(driver, begin));
    let out = upload(driver, &vec![UNTOUCHED; num_tokens * heads * spec.value_dim * size_of::<T>()]);
    let lse = upload(driver, &vec![UNTOUCHED; num_tokens * heads * 4]);
    let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
    let v = if values == Values::OfKeys { &k } else { &v };
    let mut args = AttentionArgs::new(q.ptr(), k.ptr(), v.ptr(), out.ptr());
    (args.lse, args.workspace) = (Some(lse.ptr()), workspace.ptr());
    (args.cu_seqlens_q, args.kv_lens) = (Some(cu.ptr()), Some(lens.ptr()));
    args.block_table = matches!(case.options.kv, KvLayout::Paged(_)).then_some(table.ptr());
    (args.mask, args.bias) = (mask.as_ref().map(Buffer::ptr), bias.as_ref().map(Buffer::ptr));
    (args.sinks, args.kv_begin) = (sinks.as_ref().map(Buffer::ptr), begin.as_ref().map(Buffer::ptr));
    // SAFETY: all buffers have the sizes of the problem and outlive the reads below, which wait.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    let result = AttentionResult { out: out.to_vec(Stream::LEGACY).unwrap(), lse: lse.to_vec(Stream::LEGACY).unwrap() };
    (result, plan.kernels())
}

/// The bits of one split that is written at once are those of the merge.
fn check_one_split<T: Element>(driver: &dyn Driver) {
    let mut options = AttentionOptions::new((4, 2), 0, &[(3, 200), (1, 256), (2, 0), (4, 2), (1, 100)]);
    options.left_padding = true;
    for (dims, sinks, causal, mask, bias) in [
        ((64, 64), Sinks::None, true, DenseMask::None, DenseBias::None),
        ((128, 128), Sinks::Finite, true, DenseMask::None, DenseBias::None),
        ((192, 128), Sinks::None, false, DenseMask::Full, DenseBias::None),
        ((72, 136), Sinks::WithMinusInf, true, DenseMask::PerKey, DenseBias::PerKey),
        ((33, 20), Sinks::Finite, true, DenseMask::Full, DenseBias::PerHead),
        ((40, 250), Sinks::None, true, DenseMask::None, DenseBias::PerKey),
    ] {
        options.mask = if causal { Mask::causal() } else { Mask::default() };
        (options.dims, options.sinks, options.dense_mask, options.bias) = (dims, sinks, mask, bias);
        let mut case = AttentionCase::<T>::new(&options, 12);
        for special in [None, Some(f32::INFINITY), Some(f32::NAN)] {
            if let Some(special) = special {
                let [block, row] = case.place(0, 199);
                case.v.set([block, row, 1, 3], T::from_f32(special));
                case.k.set([block, row, 0, 3], T::from_f32(special));
                case.sinks.iter_mut().for_each(|sinks| sinks[1] = special);
            }
            let mut lengths = Lengths::of(&case);
            let (whole, kernels) = launch(driver, &case, &lengths, Values::Own);
            assert_eq!(kernels.len(), 1);
            lengths.max_kv_len = 512;
            let (merged, kernels) = launch(driver, &case, &lengths, Values::Own);
            assert_eq!(kernels.len(), 2);
            let tokens = whole.lse.len() / 4;
            let same = bits(&whole, 0..tokens, 4) == bits(&merged, 0..tokens, 4);
            assert!(same, "{} {options:?} {special:?}", T::DTYPE);
        }
    }
}

#[test]
fn one_split_has_the_bits_of_the_merge() {
    on_devices(true, |driver| {
        check_one_split::<bf16>(driver);
        check_one_split::<f16>(driver);
        check_one_split::<f32>(driver);
        for (heads, values) in [(16, Values::OfKeys), (40, Values::OfKeys), (8, Values::Own)] {
            let mut options = AttentionOptions::new((heads, 1), 0, &[(1, 500), (1, 70)]);
            (options.dims, options.sinks) = ((576, 512), Sinks::Finite);
            let case = AttentionCase::<bf16>::new(&options, 12);
            let mut lengths = Lengths::of(&case);
            let (whole, kernels) = launch(driver, &case, &lengths, values);
            lengths.max_kv_len = 570;
            let (merged, merge) = launch(driver, &case, &lengths, values);
            assert_eq!((kernels.len(), merge.len()), (1, 2));
            assert!(bits(&whole, 0..2, heads) == bits(&merged, 0..2, heads), "{heads} heads, values {values:?}");
        }
    });
}

/// Tokens of no sequence, and those beyond the bound of the queries, are left as they are, whatever the workspace held.
fn check_left<T: Element>(driver: &dyn Driver) {
    for kv in [KvLayout::Ragged, KvLayout::Paged(16)] {
        let options =
            with!(AttentionOptions::new((2, 1), 64, &[(2, 300), (3, 40), (2, 20)]), kv: kv, sinks: Sinks::Finite);
        let case = AttentionCase::<T>::new(&options, 9);
        for max_kv_len in [300, 256, 0] {
            let lengths = with!(Lengths::of(&case), max_kv_len: max_kv_len);
            let (all, _) = launch(driver, &case, &lengths, Values::Own);
            // Which tokens are left; a sequence that is there as a whole has its bits.
            for (cu_seqlens_q, max_q_len, left) in [
                (vec![0, 2, 5, 7], 3, vec![]),
                (vec![0, 2, 5, 5], 3, vec![5, 6]),
                (vec![0, 2], 3, vec![2, 3, 4, 5, 6]),
                (vec![2, 2, 5, 7], 3, vec![0, 1]),
                (vec![0, 2, 5, 7], 2, vec![4]),
                (vec![0, 0, 0, 0], 3, vec![0, 1, 2, 3, 4, 5, 6]),
            ] {
                let lengths = Lengths { cu_seqlens_q, max_q_len, ..lengths.clone() };
                let (found, _) = launch(driver, &case, &lengths, Values::Own);
                for token in 0..7 {
                    let (row, expected) = (bits(&found, token..token + 1, 2), bits(&all, token..token + 1, 2));
                    let untouched = row.iter().all(|byte| *byte == UNTOUCHED);
                    assert_eq!(untouched, left.contains(&token), "{} token {token}: {kv:?} {lengths:?}", T::DTYPE);
                    // The second sequence has other positions where its queries are cut off.
                    let cut = max_q_len == 2 && (2..5).contains(&token);
                    assert!(untouched || cut || row == expected, "{} token {token}: {kv:?} {lengths:?}", T::DTYPE);
                }
            }
        }
    }
}

#[test]
fn tokens_of_no_sequence_are_left() {
    on_devices(true, |driver| {
        check_left::<bf16>(driver);
        check_left::<f32>(driver);
    });
}

/// MLA's bits: in pages, alone and in a batch.
#[test]
fn mla_bits() {
    on_devices(true, |driver| {
        let attend = |case: &AttentionCase<bf16>| -> AttentionResult<bf16, f32> {
            run(case, Values::OfKeys, |spec, input, output| staged::attention(driver, spec, input, output))
        };
        for heads in [16, 48] {
            let mut options = AttentionOptions::new((heads, 1), 0, &[(1, 600), (1, 3)]);
            (options.dims, options.mask) = ((576, 512), Mask::causal());
            let whole = AttentionCase::<bf16>::new(&options, 6);
            let expected = attend(&whole);
            let paged = AttentionOptions { kv: KvLayout::Paged(7), ..options.clone() };
            let paged = attend(&same_rows(&whole, &paged, &[0, 1]));
            assert!(bits(&paged, 0..2, heads) == bits(&expected, 0..2, heads), "pages, {heads} heads");
            let alone = AttentionOptions { lens: vec![(1, 600)], ..options.clone() };
            let alone = attend(&same_rows(&whole, &alone, &[0]));
            assert!(bits(&alone, 0..1, heads) == bits(&expected, 0..1, heads), "alone, {heads} heads");
        }
    });
}

/// `cuda::attention` against the reference with scores of the keys by way of the bias, and a sink; in one split and over several.
fn check_scores<T: Element>(driver: &dyn Driver, cases: &[([f32; 3], f32)]) {
    let inf = f32::INFINITY;
    let mut spec = Attention::new(1, 1, 8);
    spec.sinks = true;
    let number = |x: &f32| T::from_f32(*x);
    let q: Vec<T> = [0.5f32, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0].iter().map(number).collect();
    for (bias, sink) in cases.iter().copied() {
        // Next to one another; or each of them the last of 150 keys, so that they stand in splits of their own.
        for apart in [1, 150] {
            let rows = bias.len() * apart;
            let mut keys = vec![T::from_f32(0.25); rows * 8];
            let mut values = vec![T::from_f32(1.0); rows * 8];
            let mut all = vec![-inf; rows];
            for (i, score) in bias.iter().enumerate() {
                let j = (i + 1) * apart - 1;
                all[j] = *score;
                keys[j * 8] = T::from_f32(i as f32 + 1.0);
                (0..8).for_each(|d| values[j * 8 + d] = T::from_f32((1 << i) as f32 * (d as f32 - 3.0)));
            }
            let kv = Kv::ragged(View::new(&keys, [rows, 1, 8]), View::new(&values, [rows, 1, 8]), None);
            let mut input = AttentionInput::new(View::new(&q, [1, 1, 8]), kv);
            input.bias = Some(View::new(&all, [1, 1, 1, rows]));
            let sinks = [sink];
            input.sinks = Some(&sinks);
            let (mut truth, mut truth_lse) = ([0.0; 8], [0.0]);
            let output =
                AttentionOutput::with_lse(ViewMut::new(&mut truth, [1, 1, 8]), ViewMut::new(&mut truth_lse, [1, 1]));
            reference::attention(&spec, &input, output).unwrap();
            let (mut out, mut lse) = ([T::from_f32(7.0); 8], [7.0f32]);
            let output = AttentionOutput::with_lse(ViewMut::new(&mut out, [1, 1, 8]), ViewMut::new(&mut lse, [1, 1]));
            staged::attention(driver, &spec, &input, output).unwrap();
            let rounding = ulp(T::DTYPE, 1.0) * 2.0 + 1e-5;
            let near =
                |x: f64, y: f64| (x.is_nan() && y.is_nan()) || x == y || (x - y).abs() < rounding * y.abs().max(0.1);
            let good =
                out.iter().zip(&truth).all(|(x, y)| near(x.to_f64(), *y)) && near(f64::from(lse[0]), truth_lse[0]);
            assert!(
                good,
                "{} {bias:?}, {sink}, {apart} apart: {out:?} {lse:?}, expected {truth:?} {truth_lse:?}",
                T::DTYPE
            );
        }
    }
}

/// Infinite and NaN scores and sinks follow the limit of the formula.
#[test]
fn infinite_and_nan() {
    let inf = f32::INFINITY;
    let cases = [
        ([0.0, inf, 1.0], -inf),
        ([inf, 0.0, inf], 3.0),
        ([0.0, 1.0, 2.0], inf),
        ([inf, 1.0, 2.0], inf),
        ([-inf, -inf, -inf], -inf),
        ([-inf, -inf, -inf], 1.5),
        ([0.0, -inf, 3e38], -inf),
        ([-3e38, -inf, -inf], -inf),
        ([0.0, f32::NAN, 1.0], 0.0),
        ([f32::NAN, -inf, -inf], -inf),
        ([1.0, 2.0, 3.0], -inf),
        ([0.0, inf, f32::NAN], -inf),
    ];
    on_devices(false, |driver| {
        check_scores::<f32>(driver, &cases);
        check_scores::<bf16>(driver, &cases);
        check_scores::<f16>(driver, &cases);
    });
}

/// The largest number is a score like others: its `lse` is finite, and an infinite score has all of its weight.
#[test]
fn largest_number_is_finite() {
    let (inf, max) = (f32::INFINITY, f32::MAX);
    let cases = [
        ([0.0, max, 1.0], -inf),
        ([max, 0.0, -inf], 3.0),
        ([max, 1.0, inf], -inf),
        ([inf, max, inf], 3.0),
        ([inf, inf, max], max),
        ([0.0, 1.0, 2.0], max),
        ([max, 1.0, 2.0], inf),
        ([-max, -inf, -inf], -inf),
        ([-max, -inf, max], -max),
    ];
    on_devices(false, |driver| {
        check_scores::<f32>(driver, &cases);
        check_scores::<bf16>(driver, &cases);
        check_scores::<f16>(driver, &cases);
    });
}

/// Lengths, prefix sums and pages that are wrong lead nowhere: the kernels stay inside of the arrays, and other sequences are right.
fn check_wrong_lengths<T: Element>(driver: &dyn Driver) {
    const MAX: u32 = u32::MAX;
    for kv in [KvLayout::Ragged, KvLayout::Cache, KvLayout::Paged(16)] {
        let options = AttentionOptions::new((2, 1), 64, &[(1, 40), (1, 300), (1, 20)]);
        let options = with!(options, kv: kv, mask: Mask::causal());
        let case = AttentionCase::<T>::new(&options, 9);
        let right = Lengths::of(&case);
        let (clean, _) = launch(driver, &case, &right, Values::Own);
        let check = |wrong: Lengths, good: &[usize]| {
            let (found, _) = launch(driver, &case, &wrong, Values::Own);
            for token in good.iter().copied() {
                let same = bits(&found, token..token + 1, 2) == bits(&clean, token..token + 1, 2);
                assert!(same, "{} token {token}: {kv:?} {wrong:?}", T::DTYPE);
            }
        };
        // Keys of the second sequence.
        for kv_lens in match kv {
            KvLayout::Ragged => vec![[0, 40, MAX, MAX], [0, 40, 7, 27], [0, 40, 40, 9], [0, 40, 1 << 31, 5]],
            _ => vec![[40, MAX, 20, 0], [40, 1 << 31, 20, 0], [40, 0, 20, 0]],
        } {
            let good: &[usize] = if kv == KvLayout::Ragged { &[0] } else { &[0, 2] };
            check(with!(right.clone(), kv_lens: kv_lens.to_vec()), good);
        }
        if let KvLayout::Paged(_) = kv {
            let width = case.block_table.shape()[1];
            let mut wrong = with!(right.clone(), kv_lens: vec![40, MAX, 20]);
            wrong.block_table[width..2 * width].fill(MAX - 3);
            check(wrong, &[0, 2]);
        }
        // Queries: decreasing, beyond the array, and none that begins at 0; the bound keeps sequences from sharing a token. Those
        // whose both ends are right have their bits.
        for (sums, max_q_len, good) in [
            ([0, 2, 1, 3], 1, vec![]),
            ([0, 3, 2, 3], 2, vec![]),
            ([0, 1, 9, MAX], 1, vec![0, 1]),
            ([0, 1, 9, MAX], 3, vec![0]),
            ([0, 1, 2, MAX], 3, vec![0, 1, 2]),
            ([MAX, 0, 1, 2], 3, vec![]),
            ([3, 2, 1, 0], 3, vec![]),
            ([5, 5, 5, 5], 3, vec![]),
            ([1 << 31, 1 << 31, 2, 3], 3, vec![2]),
            ([0, 1, 1, 3], 3, vec![0]),
        ] {
            check(Lengths { cu_seqlens_q: sums.to_vec(), max_q_len, ..right.clone() }, &good);
        }
    }
}

#[test]
fn wrong_lengths_are_cut_off() {
    on_devices(true, |driver| {
        check_wrong_lengths::<f16>(driver);
        check_wrong_lengths::<f32>(driver);
    });
}

/// 32k keys in pages, eight query heads for each of two key heads, where there is a GPU.
#[test]
fn real_sizes() {
    on_gpu(|driver| {
        let mut options = AttentionOptions::new((16, 2), 128, &[(1, 32_768), (2, 9001)]);
        (options.kv, options.mask) = (KvLayout::Paged(16), Mask::causal());
        check(driver, &AttentionCase::<bf16>::new(&options, 1));
        check(driver, &AttentionCase::<f16>::new(&options, 2));
    });
}
