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

/// Every bucket of widths, and multiples of 8 within them; values of another width than keys. flash-attention#28, #277 (80), llama.cpp#20375 (88).
#[test]
fn head_widths_28() {
    on_devices(false, |driver| {
        for dims in [
            (72, 72),
            (80, 80),
            (88, 88),
            (96, 64),
            (120, 128),
            (192, 128),
            (136, 104),
            (256, 256),
            (200, 248),
            (64, 256),
        ] {
            let mut options = AttentionOptions::new((4, 2), 0, &[(2, 70), (1, 290)]);
            options.dims = dims;
            options.mask = Mask::causal();
            check_all(driver, &options, 3);
        }
    });
}

/// flash-attention#801, #2427, flashinfer#3576: heads wider than 256, up to 512 (Gemma).
#[test]
fn wide_heads_2427() {
    on_devices(false, |driver| {
        for (dims, lens) in [((512, 512), [(1, 40), (2, 530)]), ((264, 264), [(1, 33), (3, 20)])] {
            let mut options = AttentionOptions::new((4, 2), 0, &lens);
            (options.dims, options.mask) = (dims, Mask::causal());
            check_all(driver, &options, 3);
        }
    });
}

/// flash-attention#1471: absorbed MLA on devices with the shared memory of an A100 or a consumer card.
#[test]
fn mla_on_small_devices_1471() {
    for shared_kib in [99, 163] {
        let driver = Simulator::with_limits(true, Limits::new(80, 108, shared_kib << 10));
        for heads in [8, 40] {
            let mut options = AttentionOptions::new((heads, 1), 0, &[(1, 40), (1, 530)]);
            (options.dims, options.kv) = ((576, 512), KvLayout::Paged(64));
            check_values(&driver, &AttentionCase::<bf16>::new(&options, 4), Values::OfKeys);
        }
    }
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

/// flash-attention#1897, #2450, #2604, flashinfer#1675.
#[test]
fn batch_invariance_1897() {
    on_devices(true, |driver| {
        check_bits::<bf16>(driver);
        check_bits::<f16>(driver);
        check_bits::<f32>(driver);
    });
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

/// vllm#51902: a query's bits do not depend on how many queries the longest sequence has.
#[test]
fn longest_query_51902() {
    on_devices(true, |driver| {
        let options = with!(AttentionOptions::new((4, 1), 64, &[(1, 290), (9, 40)]), mask: Mask::causal());
        let case = AttentionCase::<bf16>::new(&options, 6);
        let mut lengths = Lengths::of(&case);
        let (expected, _) = launch(driver, &case, &lengths, Values::Own);
        for max_q_len in [10, 16] {
            lengths.max_q_len = max_q_len;
            let (found, _) = launch(driver, &case, &lengths, Values::Own);
            assert!(bits(&found, 0..10, 4) == bits(&expected, 0..10, 4), "{max_q_len}");
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

/// flash-attention#978: rows that see nothing give `out = 0` and `lse = -inf` (or the sink), exactly, also next to rows that do; flash-attention#2199:
/// windows that leave a row empty.
#[test]
fn rows_without_keys_978() {
    on_devices(true, |driver| {
        let mut options = AttentionOptions::new((2, 1), 64, &[(4, 2), (2, 0), (3, 290)]);
        options.mask = Mask::causal();
        options.left_padding = true;
        let mut run = |sinks| {
            options.sinks = sinks;
            let case = AttentionCase::<bf16>::new(&options, 8);
            check(driver, &case);
            (case.run(|spec, input, output| staged::attention::<bf16>(driver, spec, input, output)), case.sinks)
        };
        let (got, _) = run(Sinks::None);
        for row in [0, 1, 2, 3, 8, 9, 10, 11] {
            assert!(got.out[row * 64..(row + 1) * 64].iter().all(|x| x.to_bits() == 0), "row {row}");
            assert_eq!(got.lse[row], f32::NEG_INFINITY, "row {row}");
        }
        let (got, sinks) = run(Sinks::Finite);
        for row in [0, 1, 2, 3, 8, 9, 10, 11] {
            assert_eq!(got.lse[row], sinks.as_ref().unwrap()[row % 2], "row {row}");
        }
        options.lens = vec![(3, 600)];
        options.sinks = Sinks::None;
        options.starts = true;
        options.mask = Mask::default();
        (options.mask.window_left, options.mask.window_right) = (Some(0), Some(0));
        check(driver, &AttentionCase::<bf16>::new(&options, 8));
    });
}

/// flash-attention#1745, #2374, flashinfer#4971: a NaN beyond the length, before the padding or in another sequence stays there. (The cases
/// of all tests here have NaN in every key that no query sees.)
#[test]
fn nan_of_another_sequence_1745() {
    on_devices(true, |driver| {
        let mut options = AttentionOptions::new((2, 1), 64, &[(1, 40), (2, 300), (1, 20)]);
        options.mask = Mask::causal();
        options.kv = KvLayout::Paged(16);
        let mut case = AttentionCase::<f16>::new(&options, 9);
        let attend = |case: &AttentionCase<f16>| -> AttentionResult<f16, f32> {
            case.run(|spec, input, output| staged::attention(driver, spec, input, output))
        };
        let clean = attend(&case);
        for j in [0, 31, 270] {
            let [block, row] = case.place(1, j);
            case.k.set([block, row, 0, 3], f16::NAN);
            case.v.set([block, row, 0, 5], f16::INFINITY);
        }
        let found = attend(&case);
        for token in [0, 3] {
            assert!(bits(&found, token..token + 1, 2) == bits(&clean, token..token + 1, 2), "token {token}");
        }
        assert!(found.lse[2].is_nan() && found.out[128].is_nan());
        // Hidden by a mask for all heads and queries, they stay away from their own sequence, too.
        options.dense_mask = DenseMask::PerKey;
        let mut case = AttentionCase::<f16>::new(&options, 9);
        let mask = case.mask.as_mut().unwrap();
        [0, 31, 270].iter().for_each(|j| mask.set([1, 0, 0, *j], 0));
        let clean = attend(&case);
        for j in [0, 31, 270] {
            let [block, row] = case.place(1, j);
            case.v.set([block, row, 0, 5], f16::NAN);
        }
        assert!(bits(&attend(&case), 0..4, 2) == bits(&clean, 0..4, 2));
    });
}

/// A NaN value whose key a mask or a bias hides from every query and head of its group stays there, whatever heads and queries
/// share.
fn check_hidden_nan<T: Element>(driver: &dyn Driver) {
    for (mask, bias) in [
        (DenseMask::PerKey, DenseBias::None),
        (DenseMask::None, DenseBias::PerKey),
        (DenseMask::PerKey, DenseBias::PerHead),
        (DenseMask::Full, DenseBias::PerKey),
        (DenseMask::Full, DenseBias::None),
    ] {
        for kv in [KvLayout::Ragged, KvLayout::Paged(7)] {
            let lens = [(2, 300), (1, 9), (3, 45), (1, 3)];
            let mut options = AttentionOptions::new((4, 2), 64, &lens);
            (options.kv, options.left_padding, options.dense_mask, options.bias) = (kv, true, mask, bias);
            let mut case = AttentionCase::<T>::new(&options, 4);
            let clean = case.run(|spec, input, output| staged::attention::<T>(driver, spec, input, output));
            for (seq, (q_len, len)) in lens.into_iter().enumerate() {
                for j in (0..len).filter(|j| j % 4 == 1) {
                    if let Some(mask) = case.mask.as_mut().filter(|_| mask == DenseMask::PerKey) {
                        mask.set([seq, 0, 0, j], 0);
                    } else if let Some(bias) = case.bias.as_mut().filter(|_| bias == DenseBias::PerKey) {
                        bias.set([seq, 0, 0, j], f32::NEG_INFINITY);
                    } else if let Some(mask) = case.mask.as_mut() {
                        (0..4).for_each(|h| (0..q_len).for_each(|i| mask.set([seq, h, i, j], 0)));
                    }
                }
            }
            let hidden = case.run(|spec, input, output| staged::attention::<T>(driver, spec, input, output));
            assert!(hidden != clean);
            for (seq, (_, len)) in lens.into_iter().enumerate() {
                for j in (0..len).filter(|j| j % 4 == 1) {
                    let [block, row] = case.place(seq, j);
                    for g in 0..2 {
                        (0..64).for_each(|d| case.v.set([block, row, g, d], T::from_f32(f32::NAN)));
                        case.k.set([block, row, g, 3], T::from_f32(f32::NAN));
                    }
                }
            }
            let got = case.run(|spec, input, output| staged::attention::<T>(driver, spec, input, output));
            let tokens = got.lse.len() / 4;
            assert!(bits(&got, 0..tokens, 4) == bits(&hidden, 0..tokens, 4), "{} {mask:?} {bias:?} {kv:?}", T::DTYPE);
        }
    }
}

#[test]
fn nan_of_a_hidden_key_1745() {
    on_devices(true, |driver| {
        check_hidden_nan::<f16>(driver);
        check_hidden_nan::<f32>(driver);
    });
}

/// flash-attention#1745: a NaN value stays where the queries that see its key by position are those that the mask or the bias hides it from.
fn check_nan_by_position<T: Element>(driver: &dyn Driver) {
    for (window, bias) in [(None, false), (Some(40), false), (None, true), (Some(40), true)] {
        // Causal: key 300 - 1 is seen by the last query alone, with a window key 300 - 4 - 40 + 1 by the first one.
        let mut options = AttentionOptions::new((4, 2), 64, &[(4, 300), (1, 9)]);
        options.mask = Mask::causal();
        options.mask.window_left = window;
        (options.dense_mask, options.bias) =
            if bias { (DenseMask::None, DenseBias::PerHead) } else { (DenseMask::Full, DenseBias::None) };
        let mut case = AttentionCase::<T>::new(&options, 4);
        let mut hidden = vec![(3, 299)];
        hidden.extend(window.map(|left| (0, 296 - left)));
        for (i, j) in hidden.iter().copied() {
            for h in 0..4 {
                case.mask.iter_mut().for_each(|mask| mask.set([0, h, i, j], 0));
                case.bias.iter_mut().for_each(|bias| bias.set([0, h, i, j], f32::NEG_INFINITY));
            }
        }
        check(driver, &case);
        let attend = |case: &AttentionCase<T>| -> AttentionResult<T, f32> {
            case.run(|spec, input, output| staged::attention(driver, spec, input, output))
        };
        let clean = attend(&case);
        for (_, j) in hidden {
            let [block, row] = case.place(0, j);
            for g in 0..2 {
                (0..64).for_each(|d| case.v.set([block, row, g, d], T::from_f32(f32::NAN)));
            }
        }
        assert!(bits(&attend(&case), 0..5, 4) == bits(&clean, 0..5, 4), "{} {window:?} {bias}", T::DTYPE);
    }
}

#[test]
fn nan_hidden_by_position_and_mask_1745() {
    on_devices(true, |driver| {
        check_nan_by_position::<bf16>(driver);
        check_nan_by_position::<f32>(driver);
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

/// ik_llama.cpp#2344, cubecl#1070: a first tile and a first split that are hidden as a whole, with sinks and without.
#[test]
fn leading_hidden_keys_2344() {
    on_devices(false, |driver| {
        for (hidden, sinks) in
            [(64, Sinks::None), (64, Sinks::Finite), (256, Sinks::Finite), (290, Sinks::WithMinusInf)]
        {
            let mut options = AttentionOptions::new((4, 2), 64, &[(2, 300)]);
            (options.sinks, options.dense_mask) = (sinks, DenseMask::Full);
            let mut case = AttentionCase::<bf16>::new(&options, 4);
            let mask = case.mask.as_mut().unwrap();
            for (h, i) in [0, 1, 2, 3].into_iter().flat_map(|h| [(h, 0), (h, 1)]) {
                (0..hidden).for_each(|j| mask.set([0, h, i, j], 0));
            }
            check(driver, &case);
            check(driver, &AttentionCase::<f32> { mask: case.mask.clone(), ..AttentionCase::new(&options, 4) });
        }
    });
}

/// flashinfer#4401: scores that are very low are scores; nothing stands for -inf but itself.
#[test]
fn low_scores_are_no_sentinel_4401() {
    let inf = f32::INFINITY;
    let cases = [
        ([-5e4, -inf, -9e4], -inf),
        ([-1e30, -inf, -inf], -inf),
        ([-inf, -inf, -3e38], -inf),
        ([-5e4, -inf, -inf], -7e4),
    ];
    on_devices(false, |driver| {
        check_scores::<f32>(driver, &cases);
        check_scores::<bf16>(driver, &cases);
    });
}

/// transformers#39408, vllm#3385, flash-attention#1133, #1366: windows whose edge lies at the edge of a tile or of a split, or beside it.
#[test]
fn window_edges_39408() {
    on_devices(false, |driver| {
        let mut rng = Rng::new(seed());
        for edge in [0, 1, 31, 32, 33, 63, 64, 65, 255, 256, 257, 299] {
            // The last query's first key is `edge`, the first one's two before it.
            let mut options = AttentionOptions::new((2, 1), 64, &[(3, 300)]);
            options.mask = Mask::causal();
            options.mask.window_left = Some(299 - edge);
            options.starts = rng.chance(0.5);
            check(driver, &AttentionCase::<bf16>::new(&options, rng.next()));
            check(driver, &AttentionCase::<f32>::new(&options, rng.next()));
        }
    });
}

/// flash-attention#1576, #352: the tree of a speculative decode: each query sees the prompt, its ancestors and itself.
#[test]
fn tree_mask_1576() {
    on_devices(false, |driver| {
        let parents = [0, 0, 0, 1, 1, 2, 5];
        let (queries, prompt) = (parents.len(), 270);
        let lens = [(queries, prompt + queries), (queries, 10 + queries)];
        for kv in [KvLayout::Ragged, KvLayout::Paged(16)] {
            let mut options = AttentionOptions::new((4, 1), 64, &lens);
            (options.kv, options.dense_mask) = (kv, DenseMask::Full);
            let mut case = AttentionCase::<bf16>::new(&options, 4);
            let mask = case.mask.as_mut().unwrap();
            for (seq, (_, len)) in lens.into_iter().enumerate() {
                for (h, i) in (0..4).flat_map(|h| (0..queries).map(move |i| (h, i))) {
                    let tail = len - queries;
                    (0..len).for_each(|j| mask.set([seq, h, i, j], u8::from(j < tail)));
                    let mut node = i;
                    while node > 0 {
                        mask.set([seq, h, i, tail + node], 1);
                        node = parents[node];
                    }
                    mask.set([seq, h, i, tail], 1);
                }
            }
            check(driver, &case);
        }
    });
}

/// flash-attention#1797, #1819, flashinfer's sinks: a sink counts once, whatever the number of splits. Here it has most of the weight.
#[test]
fn sinks_over_splits_1797() {
    on_devices(false, |driver| {
        for kv_len in [3, 256, 257, 800] {
            let options = AttentionOptions::new((4, 2), 64, &[(1, kv_len), (2, kv_len)]);
            let options = with!(options, sinks: Sinks::Finite);
            let sinks = Some((0..4).map(|h| (kv_len as f32).ln() + h as f32).collect());
            check(driver, &with!(AttentionCase::<bf16>::new(&options, 5), sinks: sinks.clone()));
            check(driver, &with!(AttentionCase::<f32>::new(&options, 5), sinks: sinks));
        }
    });
}

/// vllm#40737: a dimension of one element has no stride, whatever the caller says.
#[test]
fn stride_of_one_element_40737() {
    on_devices(true, |driver| {
        let options = AttentionOptions::new((1, 1), 64, &[(1, 70)]);
        let case = AttentionCase::<bf16>::new(&options, 10);
        let expected: AttentionResult<bf16, f32> =
            case.run(|spec, input, output| staged::attention(driver, spec, input, output));
        let found: AttentionResult<bf16, f32> = case.run(|spec, input, output| {
            let odd = usize::MAX / 64 - 1;
            let q = View::with_strides(input.q.data(), [1, 1, 64], [odd, 7, 1]);
            staged::attention(driver, spec, &with!(*input, q: q), output)
        });
        assert!(bits(&found, 0..1, 1) == bits(&expected, 0..1, 1));
        let mut problem = AttentionProblem::new(case.spec.clone(), bf16::DTYPE, 1, 1, KvShape::ragged(70));
        (problem.q_strides, problem.k_strides[2], problem.out_strides) = ([3, 7], 5, [9, 11]);
        let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
        assert_eq!(plan.kernels()[0], "gatefold_attention_decode_bf16_64_64");
    });
}

/// flash-attention#1500, #1311, sglang#20389: keys, values and queries more than 2^31 elements apart. Needs 13 GB on the device.
#[test]
fn far_offsets_1500() {
    on_large_devices(|driver| {
        let options = with!(AttentionOptions::new((2, 1), 64, &[(1, 40), (1, 33)]), kv: KvLayout::Cache);
        let case = AttentionCase::<bf16>::new(&options, 10);
        let near: AttentionResult<bf16, f32> =
            case.run(|spec, input, output| staged::attention(driver, spec, input, output));
        let far = (1_usize << 31) + 64;
        let mut problem = AttentionProblem::new(case.spec.clone(), bf16::DTYPE, 2, 2, KvShape::cache(43));
        problem.max_q_len = 1;
        (problem.k_strides[0], problem.v_strides[0], problem.q_strides[0]) = (far, far, far);
        problem.out_strides[0] = far;
        let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
        // Two blocks of `width` elements each, `far` apart.
        let spread = |data: &[bf16], width: usize| {
            let buffer = Buffer::new(driver, (far + width) * 2).unwrap();
            for (i, block) in data.chunks_exact(width).enumerate() {
                // SAFETY: the buffer has room for both blocks, and nothing runs.
                unsafe {
                    driver.copy_to_device(buffer.ptr() + (i * far * 2) as u64, bytemuck::cast_slice(block)).unwrap()
                };
            }
            buffer
        };
        let (q, k) = (spread(&case.q.values(), 128), spread(&case.k.values(), 43 * 64));
        let (v, out) = (spread(&case.v.values(), 43 * 64), spread(&[], 128));
        let cu = Buffer::from_slice(driver, &case.cu_seqlens_q).unwrap();
        let lens = Buffer::from_slice(driver, &case.kv_lens).unwrap();
        let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
        let mut args = AttentionArgs::new(q.ptr(), k.ptr(), v.ptr(), out.ptr());
        (args.cu_seqlens_q, args.kv_lens) = (Some(cu.ptr()), Some(lens.ptr()));
        args.workspace = workspace.ptr();
        // SAFETY: all buffers have the shapes and strides of the problem; the copies below wait.
        unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
        driver.synchronize(Stream::LEGACY).unwrap();
        for token in 0..2 {
            let mut found = vec![bf16::ZERO; 128];
            // SAFETY: `out` holds two rows, and nothing runs.
            unsafe {
                let at = out.ptr() + (token * far * 2) as u64;
                driver.copy_to_host(bytemuck::cast_slice_mut(&mut found), at).unwrap();
            }
            assert!(found == near.out[token * 128..(token + 1) * 128], "token {token}");
        }
    });
}

/// Automodel#3802: elements of a mask and of a bias, and entries of a block table, more than 2^31 bytes apart. Needs 15 GB on the device.
#[test]
fn far_mask_3802() {
    on_large_devices(|driver| {
        let mut options = AttentionOptions::new((2, 1), 64, &[(2, 40), (2, 33)]);
        (options.kv, options.dense_mask, options.bias) = (KvLayout::Paged(16), DenseMask::Full, DenseBias::PerKey);
        let case = AttentionCase::<bf16>::new(&options, 10);
        let (near, _) = launch(driver, &case, &Lengths::of(&case), Values::Own);
        let far = (1_usize << 31) + 64;
        let mut shape = KvShape::paged(case.k.shape()[0], 16, case.block_table.shape()[1]);
        if let KvShape::Paged { block_table_stride, .. } = &mut shape {
            *block_table_stride = far / 4;
        }
        let mut problem = AttentionProblem::new(case.spec.clone(), bf16::DTYPE, 2, 4, shape);
        (problem.max_q_len, problem.max_kv_len) = (2, 40);
        problem.lse_strides = Some([2, 1]);
        problem.mask_strides = Some([far, 80, 40, 1]);
        problem.bias_strides = Some([far / 4, 0, 0, 1]);
        let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
        // The halves of an array, `far` bytes apart.
        let spread = |data: &[u8]| {
            let half = data.len() / 2;
            let buffer = Buffer::new(driver, far + half).unwrap();
            for (i, block) in data.chunks_exact(half).enumerate() {
                // SAFETY: the buffer has room for both halves, and nothing runs.
                unsafe { driver.copy_to_device(buffer.ptr() + (i * far) as u64, block).unwrap() };
            }
            buffer
        };
        let mask = spread(&case.mask.as_ref().unwrap().values());
        let bias = spread(bytemuck::cast_slice(&case.bias.as_ref().unwrap().values()));
        let table = spread(bytemuck::cast_slice(&case.block_table.values()));
        let [q, k, v] =
            [case.q.values(), case.k.values(), case.v.values()].map(|data| Buffer::from_slice(driver, &data).unwrap());
        let (out, lse) = (Buffer::new(driver, 4 * 128 * 2).unwrap(), Buffer::new(driver, 4 * 2 * 4).unwrap());
        let cu = Buffer::from_slice(driver, &case.cu_seqlens_q).unwrap();
        let lens = Buffer::from_slice(driver, &case.kv_lens).unwrap();
        let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
        let mut args = AttentionArgs::new(q.ptr(), k.ptr(), v.ptr(), out.ptr());
        (args.cu_seqlens_q, args.kv_lens, args.block_table) = (Some(cu.ptr()), Some(lens.ptr()), Some(table.ptr()));
        (args.mask, args.bias, args.lse) = (Some(mask.ptr()), Some(bias.ptr()), Some(lse.ptr()));
        args.workspace = workspace.ptr();
        // SAFETY: all buffers have the shapes and strides of the problem; the reads below wait.
        unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
        let out = out.to_vec::<bf16>(Stream::LEGACY).unwrap();
        let found = AttentionResult { out, lse: lse.to_vec(Stream::LEGACY).unwrap() };
        assert!(bits(&found, 0..4, 2) == bits(&near, 0..4, 2));
    });
}

/// Widths between the kernels' own: keys and values are read at their width, none of the padding. Sectors, and instructions for a KiB of keys
/// and values. 1024 keys of one key/value head, 8 heads.
#[test]
fn decode_counters_between_widths() {
    let mut counted = Vec::new();
    for (dims, layout) in [
        ((64, 64), Layout::Contiguous),
        ((80, 80), Layout::Contiguous),
        ((96, 96), Layout::Contiguous),
        ((128, 128), Layout::Contiguous),
        ((192, 128), Layout::Contiguous),
        ((192, 192), Layout::Contiguous),
        ((256, 256), Layout::Contiguous),
        ((64, 64), Layout::Padded),
        ((80, 80), Layout::Padded),
        ((256, 256), Layout::Padded),
    ] {
        let simulator = Simulator::new(false);
        let options = AttentionOptions::new((8, 1), 0, &[(1, 1024)]);
        let case = AttentionCase::<bf16>::new(&with!(options, dims: dims, layout: layout), 1);
        let _: AttentionResult<bf16, f32> =
            case.run(|spec, input, output| staged::attention(&simulator, spec, input, output));
        let (entry, counters) = simulator.take_counters()[0];
        let (kv_bytes, sectors) = (1024 * 2 * (dims.0 + dims.1) as u64, counters.global_sectors);
        if layout == Layout::Contiguous {
            // Beside them: queries once a split, parts in f32, and what tells where all that lies.
            let others = 4 * (8 * (dims.0 / 16 + dims.1 / 8) + 2 * 16 + 8) as u64;
            let kv = kv_bytes / 32;
            assert!((kv..=kv + others).contains(&sectors), "{entry}: {sectors} sectors of {kv} + {others}");
        }
        let instructions = 1024 * counters.instructions / kv_bytes;
        println!("{entry}, {dims:?} {layout:?}: {sectors} sectors, {instructions} instructions a KiB");
        counted.push((dims, layout, sectors, instructions));
    }
    let expected = [
        ((64, 64), Layout::Contiguous, 8648, 133),
        ((80, 80), Layout::Contiguous, 10792, 134),
        ((96, 96), Layout::Contiguous, 12936, 112),
        ((128, 128), Layout::Contiguous, 17224, 84),
        ((192, 128), Layout::Contiguous, 21448, 69),
        ((192, 192), Layout::Contiguous, 25800, 67),
        ((256, 256), Layout::Contiguous, 34376, 50),
        // Copied element by element: a sector counts for each request that touches it.
        ((64, 64), Layout::Padded, 75148, 231),
        ((80, 80), Layout::Padded, 100_200, 447),
        ((256, 256), Layout::Padded, 300_552, 139),
    ];
    assert_eq!(counted, expected);
}

/// What speed depends on, in counts: no bank conflict, whole sectors, keys and values read once. 1024 keys of one key/value head.
#[test]
fn decode_counters() {
    let counters = |heads: usize, dims: (usize, usize), values: Values, kv: KvLayout| {
        let simulator = Simulator::new(false);
        let mut options = AttentionOptions::new((heads, 1), 0, &[(1, 1024)]);
        (options.dims, options.kv) = (dims, kv);
        let case = AttentionCase::<bf16>::new(&options, 1);
        let _: AttentionResult<bf16, f32> =
            run(&case, values, |spec, input, output| staged::attention(&simulator, spec, input, output));
        let counters = simulator.take_counters();
        assert_eq!(counters.len(), 2, "one kernel for the parts, one for the merge");
        for (entry, counters) in &counters {
            assert_eq!(counters.conflict_degree(), 1.0, "{entry}");
        }
        counters[0]
    };
    let (mut counted, mut expected) = (Vec::new(), Vec::new());
    // Warp instructions, wavefronts of shared memory, sectors of global memory, all in the kernel of the parts.
    for (heads, dims, values, entry, recorded) in [
        (8, (64, 64), Values::Own, "gatefold_attention_decode_bf16_64_64", [34224, 8560, 8648]),
        (8, (128, 128), Values::Own, "gatefold_attention_decode_bf16_128_128", [43184, 13232, 17224]),
        (8, (192, 128), Values::Own, "gatefold_attention_decode_bf16_192_128", [44608, 15600, 21448]),
        (8, (256, 256), Values::Own, "gatefold_attention_decode_bf16_256_256", [51712, 22576, 34376]),
        (16, (576, 512), Values::OfKeys, "gatefold_attention_decode_bf16_576_512_shared_16", [63440, 49848, 40104]),
        (64, (576, 512), Values::OfKeys, "gatefold_attention_decode_bf16_576_512_shared_64", [180558, 165728, 49760]),
    ] {
        let (name, c) = counters(heads, dims, values, KvLayout::Ragged);
        assert_eq!(name, entry);
        counted.push((entry, [c.instructions, c.shared_wavefronts, c.global_sectors]));
        expected.push((entry, recorded));
        // Keys and values once, and little else: queries, parts, and what tells where all that lies.
        let kv_sectors = 1024 * (dims.0 + if values == Values::Own { dims.1 } else { 0 }) / 16;
        let (splits, rows) = (if dims.0 > 256 { 2 } else { 4 }, heads.next_multiple_of(16));
        let others = splits * (heads * (dims.0 / 16 + dims.1 / 8) + 2 * rows + 8);
        let sectors = c.global_sectors as usize;
        assert!((kv_sectors..=kv_sectors + others).contains(&sectors), "{entry}: {sectors} of {kv_sectors} + {others}");
        // 16 rows an MMA, of which `heads` are there.
        assert_eq!(c.mma_flops as usize, 1024 * 2 * rows * (dims.0 + dims.1), "{entry}");
        let [row_warps, col_warps, keys, of_scores, of_values, ..] = budget(entry)[..] else {
            panic!("{entry}: its header")
        };
        assert_eq!(c.class(Class::Matrix), 1024 / keys * row_warps * col_warps * (of_scores + of_values), "{entry}");
        let (_, paged) = counters(heads, dims, values, KvLayout::Paged(16));
        assert!(paged.global_sectors <= c.global_sectors + 16 * splits as u64, "{entry}: a block table is read once");
    }
    assert_eq!(counted, expected);
}

/// 128 more keys of a split in f32: no bank conflict, keys and values once in whole sectors, the multiply-adds of the header.
#[test]
fn decode_counters_f32() {
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for (dims, recorded) in
        [((64, 64), 45_204), ((128, 128), 54_932), ((192, 128), 62_612), ((256, 256), 74_388), ((576, 512), 120_980)]
    {
        let counted = |kv_len: usize| {
            let simulator = Simulator::new(false);
            let mut options = AttentionOptions::new((8, 1), 0, &[(1, kv_len)]);
            options.dims = dims;
            let case = AttentionCase::<f32>::new(&options, 1);
            let _: AttentionResult<f32, f32> =
                run(&case, Values::Own, |spec, input, output| staged::attention(&simulator, spec, input, output));
            let [(entry, counters)] = simulator.take_counters()[..] else { panic!("one launch") };
            (entry, counters)
        };
        let ((entry, few), (_, many)) = (counted(128), counted(256));
        assert_eq!(entry, "gatefold_attention_decode_f32_f32");
        assert_eq!(many.conflict_degree(), 1.0, "{dims:?}");
        let bytes = (128 * (dims.0 + dims.1) * 4) as u64;
        assert_eq!(many.global_bytes - few.global_bytes, bytes, "{dims:?}: keys and values, each once");
        assert_eq!(many.global_sectors - few.global_sectors, bytes / 32, "{dims:?}: in whole sectors");
        // Besides the products: a factor for each sum, and the softmax, which is the same for all widths.
        let [fma, keys, sums, ..] = budget(entry)[..] else { panic!("{entry}: what its header has") };
        let warps = 128 / keys * 4;
        let floats = many.class(Class::Float) - few.class(Class::Float);
        found.push((dims, many.instructions - few.instructions, floats - warps * (dims.0 as u64 + fma + sums)));
        expected.push((dims, recorded, warps * 44));
    }
    assert_eq!(found, expected, "instructions, those of the softmax");
}

/// 32 more parts of 2 heads, 128 columns each: no bank conflict, the parts once in whole sectors, and what tells their weights.
#[test]
fn merge_counters() {
    fn count<T: Element, O: Element>() -> (&'static str, u64, u64) {
        let counted = |parts: usize| {
            let simulator = Simulator::new(false);
            let shape = [parts, 1, 2, 128];
            let outs = Array::<T, 4>::new(shape, Layout::Contiguous, &vec![T::from_f32(1.0); parts * 256]);
            let lses = Array::<f32, 3>::new([parts, 1, 2], Layout::Contiguous, &vec![0.0; parts * 2]);
            let mut out = Output::<O, 3>::new([1, 2, 128], Layout::Contiguous);
            staged::merge(&simulator, outs.view(), lses.view(), AttentionOutput::new(out.view())).unwrap();
            let [(entry, counters)] = simulator.take_counters()[..] else { panic!("one launch") };
            assert_eq!(counters.conflict_degree(), 1.0, "{entry}");
            (entry, counters)
        };
        let ((entry, few), (_, many)) = (counted(32), counted(64));
        let parts = (32 * 2 * 128 * size_of::<T>() / 32) as u64;
        (entry, many.instructions - few.instructions, many.global_sectors - few.global_sectors - parts)
    }
    let found = [count::<f32, f32>(), count::<f32, bf16>(), count::<bf16, bf16>(), count::<f16, f32>()];
    // A lane each for the largest, every second element of 8 sectors; then one by one with the part.
    let lses = 2 * (8 + 32);
    let expected = [
        ("gatefold_attention_merge_f32_f32", 3772, lses),
        ("gatefold_attention_merge_f32_bf16", 3772, lses),
        ("gatefold_attention_merge_bf16_bf16", 4796, lses),
        ("gatefold_attention_merge_f16_f32", 4284, lses),
    ];
    assert_eq!(found, expected, "instructions, sectors besides those of the parts");
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
