//! Bugs of other implementations of attention, each a test with its number.

use super::*;
use crate::common::attention_case::{DenseBias, DenseMask, Sinks};
use crate::{is_simulated, on_large_devices};

/// Fully masked rows: `out = 0`, `lse = -inf`, never NaN, +inf or a large finite number (Dao-AILab/flash-attention#978,
/// flashinfer-ai/flashinfer#4452, #4401), also with sinks and behind a first tile that is hidden (ikawrakow/ik_llama.cpp#2344).
fn check_masked_rows<T: Element>(driver: &dyn Driver) {
    for sinks in [Sinks::None, Sinks::Finite] {
        let mut options = AttentionOptions::new((1, 1), 64, &[(40, 20), (17, 0)]);
        options.mask.causal = true;
        options.sinks = sinks;
        let case = AttentionCase::<T>::new(&prefill(&options), 1);
        check(driver, &case);
        let got = case.run(|spec, input, output| staged::attention::<T>(driver, spec, input, output));
        for row in (0..20).chain(40..57) {
            assert!(got.out[row * 64..(row + 1) * 64].iter().all(|x| x.to_f64() == 0.0));
            let lse = case.sinks.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks[0]);
            assert!((got.lse[row] - lse).abs() <= 1e-6 || got.lse[row] == lse, "{} {lse}", got.lse[row]);
        }
        // The first tile is seen by nobody, then some keys are.
        let mut options = AttentionOptions::new((1, 1), 64, &[(70, 150)]);
        options.sinks = sinks;
        let mut case = AttentionCase::<T>::new(&options, 2);
        let mask: Vec<u8> = (0..70 * 150).map(|i| u8::from(i % 150 >= 70 && (i / 150) % 3 > 0)).collect();
        case.mask = Some(crate::common::Array::new([1, 1, 70, 150], Layout::Padded, &mask));
        check(driver, &case);
    }
}

#[test]
fn flash_attention_978_fully_masked_rows() {
    on_devices(false, |driver| {
        check_masked_rows::<bf16>(driver);
        check_masked_rows::<f16>(driver);
        check_masked_rows::<f32>(driver);
    });
}

/// NaN in padding stays there: behind the length in a cache and in a page, before `kv_begin`, and where a mask hides the key from every
/// query (Dao-AILab/flash-attention#1745, #2374, #1395, flashinfer-ai/flashinfer#4971).
fn check_nan_padding<T: Element>(driver: &dyn Driver) {
    for kv in [KvLayout::Cache, KvLayout::Paged(16), KvLayout::Paged(7)] {
        let mut options = AttentionOptions::new((2, 1), 64, &[(20, 45), (5, 9), (33, 3)]);
        options.kv = kv;
        options.left_padding = true;
        check(driver, &AttentionCase::<T>::new(&options, 3));
        options.dense_mask = DenseMask::PerKey;
        let mut case = AttentionCase::<T>::new(&options, 4);
        for (seq, len) in [45, 9, 3].into_iter().enumerate() {
            for j in 0..len {
                if case.mask.as_ref().unwrap().at([seq, 0, 0, j]) == 0 {
                    let [block, row] = case.place(seq, j);
                    (0..64).for_each(|d| case.v.set([block, row, 0, d], T::from_f32(f32::NAN)));
                }
            }
        }
        let got = case.run(|spec, input, output| staged::attention::<T>(driver, spec, input, output));
        assert!(got.out.iter().all(|x| !x.to_f64().is_nan()));
    }
}

#[test]
fn flash_attention_1745_nan_in_padding() {
    on_devices(false, |driver| {
        check_nan_padding::<bf16>(driver);
        check_nan_padding::<f16>(driver);
        check_nan_padding::<f32>(driver);
    });
}

/// NaN and infinity in keys and values that only the explicit mask or a bias of -inf hides from every query of a head stay there, whatever
/// else hides them from some queries; where a query sees such a key, it is NaN (Dao-AILab/flash-attention#1745, #2374).
fn check_nan_behind_mask<T: Element>(driver: &dyn Driver) {
    // Key 3 is of the first tile; 66 of the second, which some warps pass over in a causal call; the last is of a tile of its own.
    let (queries, keys, hidden) = (135, 131, [3, 66, 130]);
    for (i, (dim, causal, masked, biased)) in
        [(64, false, true, false), (80, true, true, true), (128, true, false, true), (256, true, true, true)]
            .into_iter()
            .enumerate()
    {
        let mut options = AttentionOptions::new((2, 1), dim, &[(queries, keys)]);
        options.mask.causal = causal;
        options.kv = [KvLayout::Ragged, KvLayout::Paged(16)][i % 2];
        let mut case = AttentionCase::<T>::new(&options, i as u64);
        let spoils = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(T::from_f32);
        for (key, spoil) in hidden.into_iter().zip(spoils) {
            let [block, row] = case.place(0, key);
            (0..dim).for_each(|d| case.k.set([block, row, 0, d], spoil));
            (0..dim).for_each(|d| case.v.set([block, row, 0, d], spoil));
        }
        // Queries that may not see a key differ in what hides it from them; every tenth of the other keys is hidden, too.
        let is_hidden = |query: usize, key: usize| hidden.contains(&key) || (query * 7 + key).is_multiple_of(10);
        let by_mask = |query: usize, key: usize| masked && !(biased && (query + key).is_multiple_of(2));
        let pairs = || (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key)));
        let shape = [1, 1, queries, keys];
        if masked {
            let mask: Vec<u8> = pairs().map(|(i, j)| u8::from(!(is_hidden(i, j) && by_mask(i, j)))).collect();
            case.mask = Some(crate::common::Array::new(shape, Layout::Padded, &mask));
        }
        if biased {
            let bias = |(i, j)| if is_hidden(i, j) && !by_mask(i, j) { f32::NEG_INFINITY } else { 0.25 };
            case.bias = Some(crate::common::Array::new(shape, Layout::Padded, &pairs().map(bias).collect::<Vec<_>>()));
        }
        check(driver, &case);
        // The second head has a mask of its own, with which its query 50 sees the first of these keys.
        let mask: Vec<u8> = (0..2)
            .flat_map(|head| pairs().map(move |(i, j)| u8::from(!is_hidden(i, j) || (head, i, j) == (1, 50, 3))))
            .collect();
        case.mask = Some(crate::common::Array::new([1, 2, queries, keys], Layout::Padded, &mask));
        case.bias = None;
        let got = case.run(|spec, input, output| staged::attention::<T>(driver, spec, input, output));
        for (row, got) in got.out.chunks(dim).enumerate() {
            let is_finite = got.iter().all(|x| x.to_f64().is_finite());
            match (row / 2, row % 2) {
                (_, 0) => assert!(is_finite, "{} query {} of the first head", T::DTYPE, row / 2),
                (50, _) => assert!(got.iter().all(|x| x.to_f64().is_nan()), "{} query 50 sees NaN", T::DTYPE),
                _ => {} // may be NaN, too
            }
        }
    }
}

#[test]
fn flash_attention_1745_nan_behind_a_mask() {
    on_devices(false, |driver| {
        check_nan_behind_mask::<bf16>(driver);
        check_nan_behind_mask::<f16>(driver);
        check_nan_behind_mask::<f32>(driver);
    });
}

/// Window edges: off by one, and rows whose window is empty (huggingface/transformers#39408, vllm-project/vllm#3385,
/// Dao-AILab/flash-attention#1133, #2199).
#[test]
fn transformers_39408_window_edges() {
    on_devices(false, |driver| {
        for (i, (left, right)) in
            [(0, 0), (1, 0), (31, 0), (32, 32), (63, 1), (64, 0), (65, 70)].into_iter().enumerate()
        {
            for lens in [(70, 70), (70, 20), (20, 140)] {
                let mut options = AttentionOptions::new((1, 1), 64, &[lens]);
                options.mask.window_left = Some(left);
                options.mask.window_right = Some(right);
                options.starts = i % 2 == 1;
                check_all(driver, &options, i as u64);
            }
        }
    });
}

/// Head widths that have no kernel of their own (Dao-AILab/flash-attention#28, #277, ggml-org/llama.cpp#20375): 8 to 256 in steps of 8.
#[test]
fn flash_attention_28_head_widths() {
    on_devices(false, |driver| {
        for dim in (8..=256).step_by(8) {
            let mut options = AttentionOptions::new((1, 1), dim, &[(18, 37)]);
            options.dims.1 = (dim * 3 / 2) % 248 / 8 * 8 + 8;
            check(driver, &AttentionCase::<bf16>::new(&prefill(&options), dim as u64));
        }
    });
}

/// Offsets beyond 2^31 elements (Dao-AILab/flash-attention#1500, #1311, #767, sgl-project/sglang#20389, fla-org/flash-linear-attention#1080):
/// rows of q, k, v and out lie 2^31 elements apart, in memory that the simulator does not fill. A GPU has room for two rows, of so many heads that they are no decode.
fn check_far<T: Element>(driver: &dyn Driver, heads: usize, rows: usize) {
    let dim = 64;
    let near: Vec<T> = Rng::new(5).normals(rows * dim, 1.0);
    let queries: Vec<T> = Rng::new(6).normals(rows * heads * dim, 1.0);
    let spec = Attention::causal(heads, 1, dim);
    let kv = args::Kv::ragged(View::new(&near, [rows, 1, dim]), View::new(&near, [rows, 1, dim]), None);
    let mut expected = vec![T::default(); rows * heads * dim];
    let shape = [rows, heads, dim];
    let output = AttentionOutput::new(ViewMut::new(&mut expected, shape));
    staged::attention(driver, &spec, &AttentionInput::new(View::new(&queries, shape), kv), output).unwrap();

    let stride = (1_usize << 31) + 64;
    let bytes = stride * size_of::<T>();
    let len = (rows - 1) * bytes + heads * dim * size_of::<T>();
    let far = [(); 4].map(|()| Buffer::new(driver, len).unwrap());
    for (buffer, values) in far.iter().zip([&queries, &near, &near]) {
        for (i, row) in values.chunks_exact(values.len() / rows).enumerate() {
            // SAFETY: the buffer has room for the row, and nothing runs.
            unsafe { driver.copy_to_device(buffer.ptr() + (i * bytes) as u64, bytemuck::cast_slice(row)).unwrap() };
        }
    }
    let mut problem = AttentionProblem::new(spec, T::DTYPE, 1, rows, KvShape::ragged(rows));
    problem.q_strides[0] = stride;
    problem.k_strides[1] = stride;
    problem.v_strides[1] = stride;
    problem.out_strides[0] = stride;
    let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
    assert!(!plan.kernels()[0].contains("decode"), "{:?}", plan.kernels());
    let args = AttentionArgs::new(far[0].ptr(), far[1].ptr(), far[2].ptr(), far[3].ptr());
    // SAFETY: the buffers hold rows so far apart and outlive the reads below, which wait.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    driver.synchronize(Stream::LEGACY).unwrap();
    for (i, expected) in expected.chunks_exact(heads * dim).enumerate() {
        let mut found = vec![T::default(); heads * dim];
        // SAFETY: the buffer holds the row, and nothing runs.
        unsafe {
            driver.copy_to_host(bytemuck::cast_slice_mut(&mut found), far[3].ptr() + (i * bytes) as u64).unwrap()
        };
        assert_eq!(bytemuck::cast_slice::<T, u8>(&found), bytemuck::cast_slice::<T, u8>(expected));
    }
}

#[test]
fn flash_attention_1500_far_offsets() {
    if is_simulated() {
        let simulator = Simulator::new(false);
        check_far::<bf16>(&simulator, 1, 65);
        check_far::<f32>(&simulator, 1, 65);
    }
    on_large_devices(|driver| {
        check_far::<bf16>(driver, 64, 2);
        check_far::<f32>(driver, 64, 2);
    });
}

/// Rows of mask and bias that lie 2^31 elements apart (NVIDIA-NeMo/Automodel#3802), as above.
fn check_far_masks(driver: &dyn Driver, heads: usize, rows: usize) {
    let dim = 64;
    let stride = (1_usize << 31) + 64;
    let data: Vec<bf16> = Rng::new(7).normals(rows * dim, 1.0);
    let queries: Vec<bf16> = Rng::new(9).normals(rows * heads * dim, 1.0);
    let is_shown = |i: usize, j: usize| !(i + j).is_multiple_of(3);
    let mask: Vec<u8> = (0..rows * rows).map(|at| u8::from(is_shown(at / rows, at % rows))).collect();
    let bias: Vec<f32> = Rng::new(8).normals(rows * rows, 1.0);
    let spec = Attention::new(heads, 1, dim);
    let (shape, kv_shape) = ([rows, heads, dim], [rows, 1, dim]);
    let kv = args::Kv::ragged(View::new(&data, kv_shape), View::new(&data, kv_shape), None);
    let mut input = AttentionInput::new(View::new(&queries, shape), kv);
    input.mask = Some(View::new(&mask, [1, 1, rows, rows]));
    input.bias = Some(View::new(&bias, [1, 1, rows, rows]));
    let mut expected = vec![bf16::default(); rows * heads * dim];
    staged::attention(driver, &spec, &input, AttentionOutput::new(ViewMut::new(&mut expected, shape))).unwrap();

    let rows_of = |bytes: &[u8], width: usize, stride_bytes: usize| {
        let buffer = Buffer::new(driver, (rows - 1) * stride_bytes + width).unwrap();
        for (i, row) in bytes.chunks_exact(width).enumerate() {
            // SAFETY: the buffer has room for the row, and nothing runs.
            unsafe { driver.copy_to_device(buffer.ptr() + (i * stride_bytes) as u64, row).unwrap() };
        }
        buffer
    };
    let far_mask = rows_of(&mask, rows, stride);
    let far_bias = rows_of(bytemuck::cast_slice(&bias), rows * 4, stride * 4);
    let [q, k, v] = [&queries, &data, &data].map(|values| Buffer::from_slice(driver, values).unwrap());
    let out = Buffer::from_slice(driver, &vec![bf16::default(); rows * heads * dim]).unwrap();
    let mut problem = AttentionProblem::new(spec, Dtype::BF16, 1, rows, KvShape::ragged(rows));
    problem.mask_strides = Some([0, 0, stride, 1]);
    problem.bias_strides = Some([0, 0, stride, 1]);
    let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
    assert!(!plan.kernels()[0].contains("decode"), "{:?}", plan.kernels());
    let mut args = AttentionArgs::new(q.ptr(), k.ptr(), v.ptr(), out.ptr());
    (args.mask, args.bias) = (Some(far_mask.ptr()), Some(far_bias.ptr()));
    // SAFETY: the buffers hold what the problem describes and outlive the read below, which waits.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    let found = out.to_vec::<bf16>(Stream::LEGACY).unwrap();
    assert!(found == expected);
}

#[test]
fn automodel_3802_far_masks() {
    if is_simulated() {
        check_far_masks(&Simulator::new(false), 1, 65);
    }
    on_large_devices(|driver| check_far_masks(driver, 64, 2));
}

/// Prompts of heads wider than 256, up to the latent rows of MLA (Dao-AILab/flash-attention#801, #2427, #1471).
#[test]
fn flash_attention_801_wide_heads() {
    on_devices(false, |driver| {
        for (dims, lens) in [((264, 264), (70, 40)), ((512, 512), (66, 70)), ((576, 512), (33, 65))] {
            let mut options = AttentionOptions::new((2, 1), 0, &[lens]);
            options.dims = dims;
            options.mask.causal = true;
            check(driver, &AttentionCase::<bf16>::new(&options, 1));
        }
    });
}

/// No path that is missing or slow is taken silently (ggml-org/llama.cpp#28456, flashinfer-ai/flashinfer#3327): each width of a prompt has
/// the kernel that its name says, or an error that says what there is not.
#[test]
fn llama_cpp_28456_no_silent_path() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for dim in 1..=700 {
            let problem = AttentionProblem::new(Attention::causal(4, 4, dim), dtype, 1, 4096, KvShape::ragged(4096));
            let width = |widths: &[usize]| widths.iter().copied().find(|width| *width >= dim).unwrap();
            match AttentionPlan::new(&problem, &Limits::new(90, 132, 227 << 10)) {
                Ok(plan) if dim > 256 => {
                    assert!(plan.kernels()[0].starts_with("gatefold_attention_decode"), "{dtype} {dim}");
                }
                Ok(plan) => {
                    let expected = if dtype == Dtype::F32 {
                        format!("gatefold_attention_f32_d{}", width(&[64, 128, 256]))
                    } else {
                        let (w, rows) = (width(&[64, 80, 96, 128, 192, 256]), if dim > 128 { 64 } else { 128 });
                        format!("gatefold_attention_prefill_{dtype}_d{w}_{w}_m{rows}")
                    };
                    assert_eq!(plan.kernels(), [expected], "{dtype} {dim}");
                }
                Err(Error::Stride { argument, .. }) => {
                    assert!(dtype != Dtype::F32 && dim % 8 > 0 && argument == "q", "{dtype} {dim}");
                }
                Err(error) => {
                    assert!(dim > 512 && matches!(error, Error::Unsupported { .. }), "{dtype} {dim}: {error}")
                }
            }
        }
    }
}

/// A tree of proposals behind a prompt: each query sees the prompt and its own ancestors (Dao-AILab/flash-attention#1576).
#[test]
fn flash_attention_1576_tree_mask() {
    on_devices(false, |driver| {
        let (prompt, nodes) = (61, 70);
        let parent = |node: usize| node.checked_sub(1).map(|above| above / 2);
        let is_ancestor = |node: usize, other: usize| {
            std::iter::successors(Some(node), |node| parent(*node)).any(|ancestor| ancestor == other)
        };
        let mask: Vec<u8> = (0..nodes)
            .flat_map(|i| (0..prompt + nodes).map(move |j| (i, j)))
            .map(|(i, j)| u8::from(j < prompt || is_ancestor(i, j - prompt)))
            .collect();
        let options = AttentionOptions::new((2, 1), 128, &[(nodes, prompt + nodes)]);
        let mut case = AttentionCase::<bf16>::new(&options, 1);
        case.mask = Some(crate::common::Array::new([1, 1, nodes, prompt + nodes], Layout::Contiguous, &mask));
        check(driver, &case);
    });
}

/// A mask and a bias of each head, where heads share keys and values (flashinfer-ai/flashinfer#906, #1981, Dao-AILab/flash-attention#332).
#[test]
fn flashinfer_906_mask_per_head() {
    on_devices(false, |driver| {
        let (heads, queries, keys) = (4, 70, 90);
        let mut options = AttentionOptions::new((heads, 2), 64, &[(queries, keys)]);
        options.bias = DenseBias::PerHead;
        for shared in [false, true] {
            let mut case = AttentionCase::<f16>::new(&options, 1);
            let shape = [1, heads, if shared { 1 } else { queries }, keys];
            let mask: Vec<u8> =
                (0..shape.iter().product()).map(|at| u8::from((at / keys + at % keys * 3) % 5 > 1)).collect();
            case.mask = Some(crate::common::Array::new(shape, Layout::Padded, &mask));
            check(driver, &case);
        }
    });
}

/// T5's relative bias in a prompt (huggingface/transformers#27441, #47014), without and with a dense bias.
#[test]
fn transformers_27441_relative_bias() {
    on_devices(false, |driver| {
        for (i, both) in [true, false].into_iter().enumerate() {
            let mut options = AttentionOptions::new((2, 2), 64, &[(70, 130)]);
            options.relative_bias = Some(both);
            options.bias = [DenseBias::None, DenseBias::PerHead][i];
            options.scale = Some(1.0);
            check_all(driver, &options, i as u64);
        }
    });
}

/// Sinks that take next to nothing, a part, and nearly all, in every kernel (Dao-AILab/flash-attention#1797, #1819, #1895).
#[test]
fn flash_attention_1797_sinks() {
    on_devices(false, |driver| {
        for (i, dim) in [64, 80, 96, 128, 192, 256].into_iter().enumerate() {
            let mut options = AttentionOptions::new((4, 2), dim, &[(70, 75)]);
            options.mask.window_left = Some(33);
            options.mask.causal = true;
            options.sinks = Sinks::Finite;
            let mut case = AttentionCase::<bf16>::new(&options, i as u64);
            case.sinks = Some(vec![-200.0, -1.0, 3.0, 40.0]);
            check(driver, &case);
        }
    });
}

/// A longer neighbour, and with it another kernel, changes no bit (vllm-project/vllm#51902, flashinfer-ai/flashinfer#1675).
#[test]
fn vllm_51902_longest_query_of_a_call() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(9);
        for dim in [64, 128] {
            let spec = Attention::causal(2, 1, dim);
            let [tokens, neighbour] = [70, 200].map(|len| Tokens::<bf16>::new(&spec, len, &mut rng));
            let alone = call(driver, &spec, &[], &[(&tokens, 5..70)], None);
            for longest in [64, 65, 66, 200] {
                let (out, lse) = call(driver, &spec, &[], &[(&tokens, 5..70), (&neighbour, 200 - longest..200)], None);
                let same = bits(&alone) == bits(&(out[..65 * 2 * dim].to_vec(), lse[..65 * 2].to_vec()));
                assert!(same, "head_dim {dim} beside {longest} queries");
            }
            let short = call(driver, &spec, &[], &[(&tokens, 6..70)], None);
            let (out, lse) = (alone.0[2 * dim..].to_vec(), alone.1[2..].to_vec());
            assert!(bits(&short) == bits(&(out, lse)), "head_dim {dim}: 64 of 65 queries");
        }
    });
}

/// Cards with 99 KiB of shared memory have every width (Dao-AILab/flash-attention#1049).
#[test]
fn flash_attention_1049_consumer_cards() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for (head_dim, value_dim) in (8..=256).step_by(8).flat_map(|k| (8..=256).step_by(8).map(move |v| (k, v))) {
            let mut spec = Attention::causal(4, 4, head_dim);
            spec.value_dim = value_dim;
            for num_tokens in [65, 4096] {
                let problem = AttentionProblem::new(spec.clone(), dtype, 1, num_tokens, KvShape::ragged(num_tokens));
                for (arch, multiprocessors) in [(80, 108), (86, 84), (89, 128), (120, 170)] {
                    let plan = AttentionPlan::new(&problem, &Limits::new(arch, multiprocessors, 99 << 10));
                    assert_eq!(plan.unwrap().workspace_bytes(), 0, "{dtype} {head_dim} {value_dim}");
                }
            }
        }
    }
}

/// Pages cost what finds them, not the copying of rows: as many bytes, sectors and bank conflicts as without (Dao-AILab/flash-attention#2468).
#[test]
fn flash_attention_2468_cost_of_pages() {
    for dim in [64, 128] {
        let counted = |kv: KvLayout, kv_len: usize| {
            let simulator = Simulator::new(false);
            let mut options = AttentionOptions::new((1, 1), dim, &[(128, kv_len)]);
            options.kv = kv;
            let case = AttentionCase::<bf16>::new(&options, 1);
            case.run(|spec, input, output| staged::attention::<bf16>(&simulator, spec, input, output));
            let [(_, counters)] = &simulator.take_counters()[..] else { panic!("one launch") };
            *counters
        };
        let of_tiles = |kv: KvLayout| {
            let (few, many) = (counted(kv, 128), counted(kv, 384));
            assert_eq!(many.conflict_degree(), 1.0, "{kv:?}");
            let sectors = many.global_sectors - few.global_sectors;
            (many.global_bytes - few.global_bytes, sectors, many.instructions - few.instructions)
        };
        let ragged = of_tiles(KvLayout::Ragged);
        for page in [16, 64] {
            let paged = of_tiles(KvLayout::Paged(page));
            // A key's thread reads the entry of its page: 4 bytes more a key, and a sector or two a warp.
            let keys = 256;
            assert_eq!(paged.0 - ragged.0, 4 * keys, "bytes, pages of {page}");
            assert!(paged.1 - ragged.1 <= keys / 16, "sectors, pages of {page}: {} over {}", paged.1, ragged.1);
            assert!(paged.2 * 100 <= ragged.2 * 102, "instructions, pages of {page}: {} over {}", paged.2, ragged.2);
        }
    }
}

/// The stride of a dimension of one element means nothing, and need not be aligned (vllm-project/vllm#40737).
#[test]
fn vllm_40737_stride_of_one_head() {
    on_devices(true, |driver| {
        let (rows, dim) = (70, 64);
        let data: Vec<bf16> = Rng::new(10).normals(rows * dim, 1.0);
        let mut found = [3, dim].map(|head_stride| {
            let [q, k, v, out] = [(); 4].map(|()| Buffer::from_slice(driver, &data).unwrap());
            let mut problem =
                AttentionProblem::new(Attention::causal(1, 1, dim), Dtype::BF16, 1, rows, KvShape::ragged(rows));
            (problem.q_strides[1], problem.out_strides[1]) = (head_stride, head_stride);
            (problem.k_strides[2], problem.v_strides[2]) = (head_stride, head_stride);
            let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
            let args = AttentionArgs::new(q.ptr(), k.ptr(), v.ptr(), out.ptr());
            // SAFETY: the buffers hold what the problem describes and outlive the read below, which waits.
            unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
            driver.synchronize(Stream::LEGACY).unwrap();
            let mut found = vec![bf16::default(); rows * dim];
            // SAFETY: the buffer holds as many, and nothing runs.
            unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(&mut found), out.ptr()).unwrap() };
            found
        });
        let [odd, whole] = &mut found;
        assert!(odd == whole && *odd != data);
    });
}
