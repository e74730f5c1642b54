//! What other systems got wrong in decode, each with its number.

use super::*;

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

/// flash-attention#1897, #2450, #2604, flashinfer#1675.
#[test]
fn batch_invariance_1897() {
    on_devices(true, |driver| {
        check_bits::<bf16>(driver);
        check_bits::<f16>(driver);
        check_bits::<f32>(driver);
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
