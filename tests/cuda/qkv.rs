//! Between projection and attention: what went wrong elsewhere (the numbers are those of the reports), caches with one side alone, and
//! what a launch refuses.

use crate::common::glue_case::{AppendCase, QkvCase};
use crate::common::simulator::Simulator;
use crate::common::{Array, Layout, Output, Rng};
use crate::{on_devices, staged};
use gatefold::args::{KvCache, KvCacheMut};
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{
    ElementwiseArgs, ElementwiseOp, ElementwisePlan, ElementwiseProblem, NormPlan, NormProblem, QkvArgs, QkvArrays,
    QkvCache, QkvPlan, QkvProblem, RetentionPlan, RetentionProblem, Stream, WkvPlan, WkvProblem,
};
use gatefold::spec::{Norm, QTemperature, QkNorm, QkvPrep, Retention, Rope, RopeStyle};
use gatefold::{Element, View, reference};
use half::{bf16, f16};

fn bits<T: Element>(data: &[T]) -> &[u8] {
    bytemuck::cast_slice(data)
}

/// Everything at once: norm, clipping, rotation, temperature.
fn full_spec(norm: QkNorm, dim: usize) -> QkvPrep {
    let mut spec = QkvPrep::new(4, 2, dim);
    (spec.qk_norm, spec.clip, spec.q_temperature) = (Some(norm), Some(2.0), Some(QTemperature::new(8.0, 0.1)));
    spec.rope = Some(Rope::new(RopeStyle::Half, dim / 4 * 2, 1000.0));
    spec
}

fn prepare<T: Element>(driver: &dyn Driver, case: &QkvCase<T>) -> [Vec<T>; 3] {
    case.run::<T>(|spec, input, out| staged::prepare_qkv(driver, spec, input, out))
}

// --- a side of width 0 ------------------------------------------------------------------------------------------------

fn check_one_side<T: Element>(driver: &dyn Driver) {
    for dims in [[24, 0], [0, 24], [5, 0], [0, 0]] {
        for paged in [false, true] {
            for layout in Layout::ALL {
                let case = AppendCase::<T>::new(3, dims, paged, layout, 1);
                let want = case.run(reference::kv_append);
                let got = case.run(|input, cache| staged::kv_append(driver, input, cache));
                assert_eq!(bits(&got), bits(&want), "{} {dims:?}, paged: {paged}, {layout:?}", T::DTYPE);
            }
        }
    }
}

/// Latent attention keeps keys alone.
#[test]
fn append_of_keys_or_values_alone() {
    on_devices(true, |driver| {
        check_one_side::<bf16>(driver);
        check_one_side::<f16>(driver);
        check_one_side::<f32>(driver);
    });
}

/// What a call does not take, it does not need: no pointer, no width that fits.
#[test]
fn the_absent_side_is_not_looked_at() {
    let driver = &Simulator::new(false);
    let rows: Vec<f32> = Rng::new(2).normals(2 * 8, 1.0);
    let [new, cache] = [(); 2].map(|()| Buffer::from_slice(driver, &rows).unwrap());
    let lens = Buffer::from_slice(driver, &[0u32]).unwrap();
    for arrays in [QkvArrays::Key, QkvArrays::Value] {
        let mut problem = QkvProblem::new(QkvPrep::new(1, 1, 8), f32::DTYPE, 2, 0);
        (problem.arrays, problem.cache) = (arrays, Some(QkvCache::contiguous(1, 2)));
        problem.cache.as_mut().unwrap().ragged = false;
        let mut args = QkvArgs::default();
        args.kv_lens = lens.ptr();
        if arrays == QkvArrays::Key {
            (args.k, args.k_out, problem.spec.value_dim) = (new.ptr(), cache.ptr(), 3);
        } else {
            (args.v, args.v_out, problem.spec.head_dim) = (new.ptr(), cache.ptr(), 3);
        }
        let plan = QkvPlan::new(&problem).unwrap();
        assert_eq!(plan.kernel(), "gatefold_qkv_f32", "the other side's width does not matter");
        // SAFETY: both arrays hold two rows of 8.
        unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
        assert_eq!(cache.to_vec::<f32>(Stream::LEGACY).unwrap(), rows);
    }
}

// --- what went wrong elsewhere ----------------------------------------------------------------------------------------

/// flash-attention#1897, vllm#51902: a token's bits do not depend on how many others are in the call.
#[test]
fn a_token_in_any_batch_1897() {
    on_devices(true, |driver| {
        for norm in [QkNorm::PerHead, QkNorm::Full, QkNorm::L2AfterRope] {
            let all = QkvCase::<bf16>::new(&full_spec(norm, 64), 37, Layout::Contiguous, 3);
            let out = prepare(driver, &all);
            assert!(out == prepare(driver, &all), "run to run");
            for n in [1, 2, 9, 10, 33] {
                let first = |x: &Array<bf16, 3>| {
                    let [_, heads, width] = x.shape();
                    Array::new([n, heads, width], Layout::Contiguous, &x.values()[..n * heads * width])
                };
                let mut some = QkvCase::<bf16>::new(&all.spec, 0, Layout::Contiguous, 3);
                (some.q, some.k, some.v) = (first(&all.q), first(&all.k), first(&all.v));
                (some.weights, some.positions) = (all.weights.clone(), all.positions[..n].to_vec());
                for (some, all) in prepare(driver, &some).iter().zip(&out) {
                    assert_eq!(bits(some), bits(&all[..some.len()]), "{n} tokens, {norm:?}");
                }
            }
        }
    });
}

/// flash-attention#1745, #2374: a NaN stays in its head, in its token with a norm over all heads.
#[test]
fn a_nan_stays_in_its_token_1745() {
    on_devices(true, |driver| {
        for (norm, poisoned) in [(QkNorm::PerHead, 64), (QkNorm::Full, 256), (QkNorm::L2AfterRope, 64)] {
            let clean = QkvCase::<bf16>::new(&full_spec(norm, 64), 5, Layout::Padded, 4);
            let mut case = QkvCase::<bf16>::new(&full_spec(norm, 64), 5, Layout::Padded, 4);
            case.q.set([2, 1, 7], bf16::NAN);
            let ([q, k, v], [clean_q, clean_k, clean_v]) = (prepare(driver, &case), prepare(driver, &clean));
            assert_eq!([bits(&k), bits(&v)], [bits(&clean_k), bits(&clean_v)]);
            let start = 2 * 256 + if poisoned == 64 { 64 } else { 0 };
            for (i, (x, clean)) in q.iter().zip(&clean_q).enumerate() {
                if (start..start + poisoned).contains(&i) {
                    assert!(x.is_nan(), "element {i}, {norm:?}");
                } else {
                    assert_eq!(x.to_bits(), clean.to_bits(), "element {i}, {norm:?}");
                }
            }
        }
    });
}

/// flash-attention#28, #1471, #2427, llama.cpp#20375: heads of any width, 88, 512 and 576 among them.
#[test]
fn head_widths_20375() {
    on_devices(false, |driver| {
        for dim in (2..40).step_by(2).chain((40..=256).step_by(8)).chain([320, 512, 576]) {
            for norm in [QkNorm::PerHead, QkNorm::L2AfterRope] {
                let mut spec = full_spec(norm, dim);
                spec.rope = (dim >= 4).then(|| Rope::new(RopeStyle::Interleaved, dim / 4 * 2, 1000.0));
                let case = QkvCase::<bf16>::new(&spec, 2, Layout::Contiguous, dim as u64);
                let [q, k, v] = prepare(driver, &case);
                case.expected().check(&format!("head_dim {dim}, {norm:?}"), dim, [&q, &k, &v]);
            }
        }
    });
}

/// flash-attention#2468, flashinfer#4971: pages of any size hold what a contiguous cache holds.
#[test]
fn pages_of_any_size_4971() {
    on_devices(true, |driver| {
        let (tokens, heads, width, seqs) = (300, 2, 16, 2);
        let x: Vec<bf16> = Rng::new(5).normals(tokens * heads * width, 1.0);
        let (sums, lens) = ([0u32, 257, 300], [3u32, 41]);
        for page in [1, 2, 3, 15, 16, 17, 64, 128, 256, 1000] {
            // Pages in reverse order, those of both sequences in turn.
            let max_pages = 260_usize.div_ceil(page);
            let num_pages = seqs * max_pages;
            let place = |seq: usize, page: usize| num_pages - 1 - (page * seqs + seq);
            let table: Vec<u32> = (0..num_pages).map(|i| place(i / max_pages, i % max_pages) as u32).collect();
            let mut caches = [(); 2].map(|()| Output::<bf16, 4>::new([num_pages, page, heads, width], Layout::Padded));
            let [k, v] = &mut caches;
            let zeros = vec![bf16::ZERO; num_pages * page * heads * width];
            for cache in [&mut *k, &mut *v] {
                for (i, zero) in zeros.iter().enumerate() {
                    let (row, head) = (i / width / heads, i / width % heads);
                    cache.view().set([row / page, row % page, head, i % width], *zero);
                }
            }
            let new = View::new(&x, [tokens, heads, width]);
            let views = KvCacheMut::paged(k.view(), v.view(), View::new(&table, [seqs, max_pages]));
            staged::kv_append(driver, &KvCache::new(new, new, Some(&sums), &lens), views).unwrap();
            let mut want = zeros;
            for (seq, len) in lens.iter().enumerate() {
                for token in sums[seq]..sums[seq + 1] {
                    let row = (len + token - sums[seq]) as usize;
                    let to = (place(seq, row / page) * page + row % page) * heads * width;
                    want[to..][..heads * width].copy_from_slice(&x[token as usize * heads * width..][..heads * width]);
                }
            }
            for cache in &caches {
                assert!(cache.finish("cache") == want, "pages of {page} rows");
            }
        }
    });
}

/// vllm#40737: the stride of a dimension of one element may be anything, and does not choose a slower kernel.
#[test]
fn strides_of_single_rows_40737() {
    let wild = usize::MAX / 2 + 1;
    let problem = NormProblem::new(Norm::rms(1e-6), bf16::DTYPE, 1, 64);
    let mut single = NormProblem::new(Norm::rms(1e-6), bf16::DTYPE, 1, 64);
    (single.x_strides, single.out_strides) = ([wild; 3], [wild; 3]);
    (single.residual_stride, single.residual_out_stride) = (wild, wild);
    assert_eq!(NormPlan::new(&single).unwrap(), NormPlan::new(&problem).unwrap());

    let problem = ElementwiseProblem::new(ElementwiseOp::SiluMul, bf16::DTYPE, 1, 64);
    let mut single = problem.clone();
    (single.x_stride, single.y_stride, single.out_stride) = (wild, wild, wild);
    assert_eq!(ElementwisePlan::new(&single).unwrap(), ElementwisePlan::new(&problem).unwrap());

    let mut problem = QkvProblem::new(QkvPrep::new(1, 1, 64), bf16::DTYPE, 1, 1);
    problem.spec.rope = Some(Rope::new(RopeStyle::Half, 64, 1e4));
    (problem.cos_stride, problem.sin_stride) = (32, 32);
    let mut single = problem.clone();
    (single.q_strides, single.k_strides, single.v_strides) = ([wild; 2], [wild; 2], [wild; 2]);
    (single.q_out_strides, single.k_out_strides, single.v_out_strides) = ([wild; 2], [wild; 3], [wild; 3]);
    (single.cos_stride, single.sin_stride) = (wild, wild);
    assert_eq!(QkvPlan::new(&single).unwrap(), QkvPlan::new(&problem).unwrap());

    let mut single = WkvProblem::new(bf16::DTYPE, 1, 1, 64);
    (single.k_strides, single.v_strides, single.out_strides) = ([wild; 2], [wild; 2], [wild; 2]);
    (single.state_in_strides[1], single.state_out_strides[1]) = (wild, wild);
    WkvPlan::new(&single).unwrap();
    let mut single = RetentionProblem::new(Retention::new(1, 1, 64), bf16::DTYPE, 1);
    (single.q_strides, single.k_strides, single.v_strides) = ([wild; 2], [wild; 2], [wild; 2]);
    (single.out_strides, single.state_in_strides, single.state_out_strides) = ([wild; 2], [wild; 2], [wild; 2]);
    RetentionPlan::new(&single).unwrap();

    // And the kernel takes them.
    on_devices(true, |driver| {
        let x: Vec<bf16> = Rng::new(6).normals(64, 1.0);
        let [input, output] = [(); 2].map(|()| Buffer::from_slice(driver, &x).unwrap());
        let mut single = ElementwiseProblem::new(ElementwiseOp::add(1.0), bf16::DTYPE, 1, 64);
        (single.x_stride, single.y_stride, single.out_stride) = (wild, wild, wild);
        let args = ElementwiseArgs::new(input.ptr(), input.ptr(), output.ptr());
        // SAFETY: both hold one row of 64 and outlive the read below, which waits.
        unsafe { ElementwisePlan::new(&single).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        let twice: Vec<bf16> = x.iter().map(|x| bf16::from_f32(2.0 * x.to_f32())).collect();
        assert_eq!(output.to_vec::<bf16>(Stream::LEGACY).unwrap(), twice);
    });
}

/// pytorch#170813: pointers that are multiples of an element alone, each by itself, give the bits of aligned ones.
#[test]
fn misaligned_pointers_170813() {
    on_devices(true, |driver| {
        let (tokens, heads, width) = (3, 2, 64);
        let len = tokens * heads * width;
        let x: Vec<f16> = Rng::new(7).normals(len + 8, 1.0);
        let spec = {
            let mut spec = QkvPrep::new(heads, heads, width);
            (spec.qk_norm, spec.rope) = (Some(QkNorm::PerHead), Some(Rope::new(RopeStyle::Half, width, 1000.0)));
            spec
        };
        let table = Rng::new(8).normals::<f32>(9 * 32 + 4, 1.0);
        let positions = Buffer::from_slice(driver, &[4u32, 0, 8]).unwrap();
        // Which of q, its output, the weights and cos lies one element off.
        let run = |off: usize| {
            let shift = |i: usize| usize::from(off == i);
            let spread = |data: &[f16], shift: usize| {
                let mut all = vec![f16::ZERO; shift];
                all.extend_from_slice(&data[..len]);
                Buffer::from_slice(driver, &all).unwrap()
            };
            let (q, out) = (spread(&x, shift(1)), spread(&x, shift(2)));
            let floats = |data: &[f32], shift: usize| {
                let mut all = vec![0.0; shift];
                all.extend_from_slice(data);
                Buffer::from_slice(driver, &all).unwrap()
            };
            let (weights, cos, sin) = (floats(&table[..64], shift(3)), floats(&table, shift(4)), floats(&table, 0));
            let mut problem = QkvProblem::new(spec.clone(), f16::DTYPE, tokens, 9);
            problem.arrays = QkvArrays::Query;
            let mut args = QkvArgs::default();
            (args.q, args.q_out) = (q.ptr() + 2 * shift(1) as u64, out.ptr() + 2 * shift(2) as u64);
            (args.q_norm, args.cos) = (weights.ptr() + 4 * shift(3) as u64, cos.ptr() + 4 * shift(4) as u64);
            (args.sin, args.positions) = (sin.ptr(), positions.ptr());
            // SAFETY: all hold the arrays that the problem describes and outlive the read below, which waits.
            unsafe { QkvPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
            out.to_vec::<f16>(Stream::LEGACY).unwrap()[shift(2)..].to_vec()
        };
        let aligned = run(0);
        (1..5).for_each(|off| assert_eq!(bits(&run(off)), bits(&aligned), "array {off}"));
    });
}

// --- what a launch refuses --------------------------------------------------------------------------------------------

/// Each message names the argument, what was expected and what was found; nothing is launched.
#[test]
fn refusals_of_a_launch() {
    let driver = &Simulator::new(false);
    let memory = Buffer::new(driver, 1 << 16).unwrap();
    let at = |part: u64| memory.ptr() + 4096 * part;
    let mut spec = QkvPrep::new(2, 2, 8);
    (spec.qk_norm, spec.rope) = (Some(QkNorm::PerHead), Some(Rope::new(RopeStyle::InterleavedToHalf, 8, 1e4)));
    let good = || {
        let mut args = QkvArgs::default();
        (args.q, args.k, args.v, args.q_norm, args.k_norm) = (at(0), at(1), at(2), at(3), at(4));
        (args.q_out, args.k_out, args.v_out, args.cos, args.sin) = (at(5), at(6), at(7), at(8), at(9));
        (args.positions, args.cu_seqlens, args.kv_lens, args.block_table) = (at(10), at(11), at(12), at(13));
        args
    };
    let mut problem = QkvProblem::new(spec, f32::DTYPE, 3, 9);
    let plain = QkvPlan::new(&problem).unwrap();
    problem = problem.with_cache(QkvCache::paged(2, 4, 2, 2));
    let paged = QkvPlan::new(&problem).unwrap();
    type Edit<'a> = &'a dyn Fn(&mut QkvArgs);
    let pointer =
        |name: &str, found: u64| format!("`{name}` is {found:#x}, expected a device pointer that is a multiple of 4");
    let overlap = |name: &str, other: &str| format!("`{name}` overlaps `{other}`, expected separate memory");
    let cases: [(&QkvPlan, Edit<'_>, String); 18] = [
        (&plain, &|a| a.q = 0, pointer("q", 0)),
        (&plain, &|a| a.k = 0, pointer("k", 0)),
        (&plain, &|a| a.v += 2, pointer("v", at(2) + 2)),
        (&plain, &|a| a.q_norm = 0, pointer("q_norm", 0)),
        (&plain, &|a| a.k_norm += 1, pointer("k_norm", at(4) + 1)),
        (&plain, &|a| a.cos = 0, pointer("cos", 0)),
        (&plain, &|a| a.sin = 0, pointer("sin", 0)),
        (&plain, &|a| a.positions = 0, pointer("positions", 0)),
        (&plain, &|a| a.q_out = 0, pointer("out.q", 0)),
        (&plain, &|a| a.k_out = 0, pointer("out.k", 0)),
        (&paged, &|a| a.v_out = 0, pointer("cache.v", 0)),
        (&paged, &|a| a.kv_lens = 0, pointer("kv_lens", 0)),
        (&paged, &|a| a.cu_seqlens = 0, pointer("cu_seqlens", 0)),
        (&paged, &|a| a.block_table = 0, pointer("block_table", 0)),
        (&plain, &|a| a.q_out = a.q, overlap("out.q", "q")),
        (&paged, &|a| a.k_out = a.k, overlap("cache.k", "k")),
        (&paged, &|a| a.v_out = a.k_out + 64, overlap("cache.k", "cache.v")),
        (&plain, &|a| a.v_out = a.positions, overlap("out.v", "positions")),
    ];
    for (plan, edit, message) in cases {
        let mut args = good();
        edit(&mut args);
        // SAFETY: refused.
        let error = unsafe { plan.launch(driver, &args, Stream::LEGACY) }.unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    assert!(driver.take_counters().is_empty());
    let mut args = good();
    args.q = u64::MAX - 3;
    // SAFETY: refused.
    let error = unsafe { plain.launch(driver, &args, Stream::LEGACY) }.unwrap_err();
    assert_eq!(error.to_string(), "`q` is 0xfffffffffffffffc, expected 192 bytes below the end of the address space");
}
