//! What users of other libraries' products of experts have hit, each as a test that says so: offsets, caps, memory that nobody wrote,
//! experts without tokens, lost parameters, exchanged halves, wrong tiles, wrong rows, alignment and refused shapes.

use super::gemm::{CLASSES, Data, Grouped, Weights, check_grouped, run_grouped};
use crate::common::naive::Store;
use crate::common::simulator::Simulator;
use crate::common::sums::{assert_sums, bits, naive_experts};
use crate::common::{Array, ExpertCase, ExpertOptions, GateUp, Layout, Rng};
use crate::{on_devices, on_large_devices, staged};
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{
    DeviceView, DeviceViewMut, ExpertFfnArgs, ExpertFfnPlan, ExpertFfnProblem, FfnArgs, GemmRows, GroupedGemm,
    GroupedGemmArgs, GroupedGemmPlan, Queue, Stream, linear,
};
use gatefold::spec::{Activation, ExpertFfn, Ffn};
use gatefold::{Element, Error, View, ViewMut, reference};
use half::{bf16, f16};

const LAYOUTS: [GateUp; 3] = [GateUp::Separate, GateUp::Halves, GateUp::Interleaved];

fn options(num_tokens: usize, slots: usize, gate_up: GateUp) -> ExpertOptions {
    ExpertOptions { num_tokens, slots, gate_up, layout: Layout::Aligned }
}

fn experts_of<T: Element>(driver: &dyn Driver, case: &ExpertCase<T, T>) -> Vec<T> {
    let weights = case.weights();
    case.run(|spec, hidden, routing, out| staged::expert_ffn(driver, spec, hidden, routing, &weights, out))
}

fn check_experts<T: Element>(driver: &dyn Driver, case: &ExpertCase<T, T>) {
    let (spec, weights) = (&case.spec, case.weights());
    let truth: Vec<f64> =
        case.run(|spec, hidden, routing, out| reference::expert_ffn(spec, hidden, routing, &weights, out));
    let naive: Vec<T> = naive_experts(case, Store::Storage, Store::Storage);
    // The outputs of a token share its inner values, so the luck of a few sums: more tokens where those are few.
    let width = spec.ffn.hidden_size * 128usize.div_ceil(spec.ffn.intermediate_size);
    assert_sums(&format!("{spec:?} {:?} {}", case.options, T::DTYPE), &experts_of(driver, case), &truth, &naive, width);
}

// --- sizes --------------------------------------------------------------------------------------------------------------

/// Widths that are odd multiples of 8 (pytorch/torchtitan#2255, #2262: padding was left to the caller), in both products, where gate and up
/// are separate, halves, and every other row; with experts that no token chose.
fn check_multiples_of_8<T: Element>(driver: &dyn Driver) {
    for (i, (hidden, inter)) in [(8, 24), (24, 8), (40, 8), (56, 40), (104, 136)].into_iter().enumerate() {
        for (j, gate_up) in LAYOUTS.into_iter().enumerate() {
            let spec = ExpertFfn::new(7, Ffn::gated(hidden, inter, Activation::Silu));
            let mut case = ExpertCase::<T, T>::new(&spec, options([1, 17, 40][(i + j) % 3], 2, gate_up), 3);
            let ids: Vec<i32> = case.ids.values().iter().map(|id| if [2, 5].contains(id) { -1 } else { *id }).collect();
            case.ids = Array::new(case.ids.shape(), Layout::Aligned, &ids);
            check_experts(driver, &case);
        }
    }
}

#[test]
fn widths_of_odd_multiples_of_8() {
    on_devices(false, |driver| {
        check_multiples_of_8::<bf16>(driver);
        check_multiples_of_8::<f16>(driver);
        check_multiples_of_8::<f32>(driver);
    });
}

/// (hidden, intermediate, experts) that others refuse or pad: 768 split over four ranks, widths that are no multiple of 64 or 128, 2880,
/// and numbers of experts that are no power of two (deepseek-ai/DeepGEMM#106, #238, sgl-project/sglang#30595).
#[test]
fn shapes_that_others_refuse() {
    on_devices(false, |driver| {
        for (i, (hidden, inter, experts)) in
            [(64, 192, 3), (2880, 40, 5), (40, 2880, 2), (72, 768, 7), (24, 88, 288)].into_iter().enumerate()
        {
            let spec = ExpertFfn::new(experts, Ffn::gated(hidden, inter, Activation::Silu));
            let case = ExpertCase::<bf16, bf16>::new(&spec, options([5, 3, 2, 3, 20][i], 2, LAYOUTS[i % 3]), i as u64);
            check_experts(driver, &case);
        }
    });
}

/// There is no largest number of rows but that of 31 bits (Dao-AILab/sonic-moe#4: 50 000, vllm-project/vllm#6029: 65 536).
#[test]
fn more_rows_than_65536() {
    on_devices(true, |driver| {
        let (period, rows) = (70, 65_536 + 70);
        let mut rng = Rng::new(1);
        let x = rng.normals::<bf16>(period * 8, 1.0);
        let weight = rng.normals::<bf16>(5 * 8, 1.0);
        let run = |rows: usize| {
            let x: Vec<bf16> = x.iter().copied().cycle().take(rows * 8).collect();
            let mut out = vec![bf16::ZERO; rows * 5];
            let view = ViewMut::new(&mut out, [rows, 5]);
            staged::linear(driver, View::new(&x, [rows, 8]), View::new(&weight, [5, 8]), None, view).unwrap();
            out
        };
        let (few, many) = (run(period), run(rows));
        many.chunks(few.len()).for_each(|part| assert!(part == &few[..part.len()]));
    });
}

// --- offsets ------------------------------------------------------------------------------------------------------------

/// Row numbers whose product with the width does not fit 32 bits, in rows without gaps: of the gathered rows, of their numbers and
/// weights, and of the results (vllm-project/vllm#5938, #34279, #45884, sgl-project/sglang#4856, linkedin/Liger-Kernel#1248,
/// deepseek-ai/DeepGEMM#226). Needs 12 GB on the device.
#[test]
fn row_times_width_beyond_2_31() {
    on_large_devices(|driver| {
        let (inputs, outputs, first) = (40, 24, (1usize << 31) / 24 + 5);
        let mut case = Grouped::new(&[3], outputs, inputs);
        case.row_weight = true;
        let data = Data::<bf16>::new(&case);
        let near = run_grouped(driver, &case, &data, None);
        let place = |bytes: &[u8], at: usize| {
            let memory = Buffer::new(driver, at + bytes.len()).unwrap();
            // SAFETY: the buffer has room for them there, and nothing runs.
            unsafe { driver.copy_to_device(memory.ptr() + at as u64, bytes).unwrap() };
            memory
        };
        let a = place(bytemuck::cast_slice(&data.a), first * inputs * 2);
        let tokens: Vec<u32> = (0..3).map(|r| (first + r) as u32).collect();
        let tokens = place(bytemuck::cast_slice(&tokens), first * 4);
        let factors = place(bytemuck::cast_slice(&data.row_weight), first * 4);
        let up = Buffer::from_slice(driver, &data.weights[1]).unwrap();
        let out = Buffer::new(driver, (first + 3) * outputs * 2).unwrap();
        let mut problem = GroupedGemm::experts(bf16::DTYPE, 1, first + 3, outputs, inputs);
        problem.rows = GemmRows::Listed { max_rows: first + 3, max_group_rows: 3, max_tiles: 1 };
        let counts = Buffer::from_slice(driver, &[1u32, 0, 0, 0]).unwrap();
        let mut lists = [u32::MAX; 16];
        lists[..4].copy_from_slice(&[0, first as u32, 3, 0]);
        let lists = Buffer::from_slice(driver, &lists).unwrap();
        let mut args = GroupedGemmArgs::new(a.ptr(), up.ptr(), out.ptr()).with_tiles(counts.ptr(), lists.ptr());
        (args.row_token, args.row_weight) = (Some(tokens.ptr()), Some(factors.ptr()));
        let plan = GroupedGemmPlan::new(&problem, &driver.limits()).unwrap();
        let mut found = vec![bf16::ZERO; 3 * outputs];
        // SAFETY: the buffers have the plan's shapes, though only the last rows hold anything, and the list names no other; what is
        // read is read after the wait.
        unsafe {
            plan.launch(driver, &args, Stream::LEGACY).unwrap();
            driver.synchronize(Stream::LEGACY).unwrap();
            let at = out.ptr() + (first * outputs * 2) as u64;
            driver.copy_to_host(bytemuck::cast_slice_mut(&mut found), at).unwrap();
        }
        assert!(bits(&found) == bits(&near));
    });
}

/// Tokens, experts and results so far apart that no offset fits 32 bits, through the whole of the experts (sgl-project/sglang#4727,
/// vllm-project/vllm#34086). Needs 30 GB on the device.
#[test]
fn experts_farther_apart_than_2_31() {
    on_large_devices(|driver| {
        let (hidden, inter, far) = (40, 24, (1usize << 31) + 64);
        let spec = ExpertFfn::new(2, Ffn::gated(hidden, inter, Activation::Silu));
        let mut case = ExpertCase::<bf16, bf16>::new(&spec, options(2, 2, GateUp::Separate), 4);
        case.ids = Array::new([2, 2], Layout::Aligned, &[1, 0, 1, -1]);
        let near = experts_of(driver, &case);
        let place = |values: &[bf16]| {
            let len = values.len() / 2;
            let memory = Buffer::new(driver, (far + len) * 2).unwrap();
            for (i, part) in values.chunks_exact(len).enumerate() {
                // SAFETY: the buffer has room for two parts `far` apart, and nothing runs.
                unsafe {
                    driver.copy_to_device(memory.ptr() + (i * far * 2) as u64, bytemuck::cast_slice(part)).unwrap()
                };
            }
            memory
        };
        let rows = place(&case.hidden.values());
        let [gate, up, down] = [&case.gate_up[0], &case.gate_up[1], &case.down].map(|array| place(&array.values()));
        let ids = Buffer::from_slice(driver, &case.ids.values()).unwrap();
        let chosen = Buffer::from_slice(driver, &case.topk_weights.values()).unwrap();
        let out = Buffer::new(driver, (far + hidden) * 2).unwrap();
        let mut problem = ExpertFfnProblem::new(&spec, bf16::DTYPE, 2, 2);
        (problem.hidden_stride, problem.out_stride) = (far, far);
        let strides = &mut problem.weights;
        (strides.gate[0], strides.up[0], strides.down[0]) = (far, far, far);
        let plan = ExpertFfnPlan::new(&problem, &driver.limits()).unwrap();
        let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
        let weights = FfnArgs::new(gate.ptr(), up.ptr(), down.ptr());
        let args = ExpertFfnArgs::new(rows.ptr(), ids.ptr(), chosen.ptr(), weights, out.ptr(), workspace.ptr());
        // SAFETY: the buffers have the plan's shapes and strides and outlive the reads below, which come after the wait.
        unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
        driver.synchronize(Stream::LEGACY).unwrap();
        for (i, near) in near.chunks_exact(hidden).enumerate() {
            let mut row = vec![bf16::ZERO; hidden];
            // SAFETY: `out` holds two rows `far` apart, and nothing runs.
            unsafe {
                driver.copy_to_host(bytemuck::cast_slice_mut(&mut row), out.ptr() + (i * far * 2) as u64).unwrap();
            }
            assert!(bits(&row) == bits(near), "row {i}");
        }
    });
}

// --- rows and experts of nobody -----------------------------------------------------------------------------------------

/// Assignments that are skipped leave rows of the workspace that nobody writes: whatever lies there, NaN too, nobody reads
/// (pytorch/pytorch#193633, pytorch/torchtitan#1237).
#[test]
fn skipped_rows_in_the_workspace_poison_nothing() {
    on_devices(true, |driver| {
        let spec = ExpertFfn::new(4, Ffn::gated(40, 24, Activation::Silu));
        let mut case = ExpertCase::<bf16, bf16>::new(&spec, options(30, 3, GateUp::Separate), 5);
        let ids: Vec<i32> =
            case.ids.values().iter().enumerate().map(|(i, id)| if i % 7 < 4 { -1 } else { *id }).collect();
        case.ids = Array::new([30, 3], Layout::Aligned, &ids);
        let upload = |values: &[bf16]| Buffer::from_slice(driver, values).unwrap();
        let rows = upload(&case.hidden.values());
        let [gate, up, down] = [&case.gate_up[0], &case.gate_up[1], &case.down].map(|array| upload(&array.values()));
        let ids = Buffer::from_slice(driver, &ids).unwrap();
        let chosen = Buffer::from_slice(driver, &case.topk_weights.values()).unwrap();
        let plan = ExpertFfnPlan::new(&ExpertFfnProblem::new(&spec, bf16::DTYPE, 30, 3), &driver.limits()).unwrap();
        let workspace = Buffer::from_slice(driver, &vec![0xffu8; plan.workspace_bytes()]).unwrap();
        let out = upload(&[bf16::NAN; 30 * 40]);
        let weights = FfnArgs::new(gate.ptr(), up.ptr(), down.ptr());
        let args = ExpertFfnArgs::new(rows.ptr(), ids.ptr(), chosen.ptr(), weights, out.ptr(), workspace.ptr());
        // SAFETY: the buffers have the plan's shapes and outlive the read below, which waits.
        unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
        let found: Vec<bf16> = out.to_vec(Stream::LEGACY).unwrap();
        assert!(bits(&found) == bits(&experts_of(driver, &case)));
        assert!(found.iter().all(|x| x.is_finite()));
    });
}

/// Weights of an expert that no token chose are not read: they may be NaN, and more such experts cost no byte and no instruction in the
/// products. A rank without tokens gives zeros (pytorch/torchtitan#1166, NVIDIA/Megatron-LM#3626, #4851, sgl-project/sglang#25397,
/// vllm-project/vllm#51984).
#[test]
fn experts_without_tokens_cost_nothing() {
    let cost = |experts: usize| {
        let sim = Simulator::new(false);
        let mut sizes = vec![0; experts];
        (sizes[1], sizes[2]) = (20, 3);
        let mut case = Grouped::new(&sizes, 40, 72);
        (case.gated, case.activation) = (true, Some(Activation::Silu));
        let mut data = Data::<bf16>::new(&case);
        let len = 40 * 72;
        data.weights = data.weights.map(|mut weights| {
            weights[..len].fill(bf16::NAN);
            weights[3 * len..].fill(bf16::NAN);
            weights
        });
        let found = run_grouped(&sim, &case, &data, None);
        assert!(found.iter().all(|x| x.is_finite()), "{experts} experts");
        let all = sim.take_counters();
        let sum = |count: fn(&simt::Counters) -> u64| all.iter().map(|(_, counters)| count(counters)).sum::<u64>();
        [sum(|c| c.global_bytes), sum(|c| c.global_sectors), sum(|c| c.instructions)]
    };
    assert_eq!(cost(30), cost(300));
    on_devices(true, |driver| {
        let spec = ExpertFfn::new(4, Ffn::gated(40, 24, Activation::Silu));
        let mut case = ExpertCase::<f32, f32>::new(&spec, options(9, 2, GateUp::Halves), 5);
        case.ids = Array::new([9, 2], Layout::Aligned, &[-1, 4].repeat(9));
        assert!(experts_of(driver, &case).iter().all(|x| x.to_bits() == 0));
    });
}

// --- what the activation gets -------------------------------------------------------------------------------------------

/// sgl-project/sglang#39920: a limit and an alpha that did not arrive. Sums beyond the limit, of both signs: without one of the two the result
/// is another.
fn check_clamp<T: Element>(driver: &dyn Driver) {
    let with = |alpha: f64, limit: f64| {
        let mut case = Grouped::new(&[9, 20], 24, 40);
        (case.gated, case.activation) = (true, Some(Activation::SwigluClamped { alpha, limit }));
        check_grouped::<T, T>(driver, &case);
        bits(&run_grouped(driver, &case, &Data::<T>::new(&case), None))
    };
    let base = with(1.702, 2.0);
    let differ = |other: &[u64]| base.iter().zip(other).filter(|(a, b)| a != b).count();
    let [alpha, limit] = [differ(&with(1.0, 2.0)), differ(&with(1.702, 7.0))];
    assert!(alpha > base.len() / 2 && limit > base.len() / 4, "{alpha} and {limit} of {}", base.len());
}

#[test]
fn alpha_and_limit_of_the_clamp_arrive() {
    on_devices(true, |driver| {
        check_clamp::<bf16>(driver);
        check_clamp::<f32>(driver);
    });
}

/// ROCm/ATOM#885: gate and up in the other order. The same weights give the same bits in every layout, and others where gate and up are
/// exchanged.
#[test]
fn gate_and_up_are_not_exchanged() {
    on_devices(true, |driver| {
        for class in 0..CLASSES.len() {
            let mut case = Grouped::new(&[5, 0, 70], 40, 72);
            (case.gated, case.activation) = (true, Some(Activation::Silu));
            let mut data = Data::<bf16>::new(&case);
            let separate = bits(&run_grouped(driver, &case, &data, Some(class)));
            for weights in [Weights::Halves, Weights::Swapped, Weights::Interleaved] {
                case.weights = weights;
                assert!(bits(&run_grouped(driver, &case, &data, Some(class))) == separate, "{weights:?}");
            }
            data.weights.reverse();
            assert!(bits(&run_grouped(driver, &case, &data, Some(class))) != separate);
        }
    });
}

// --- tiles and rows -----------------------------------------------------------------------------------------------------

/// Dao-AILab/sonic-moe#63: garbage in one tile behind a gate, which an absolute tolerance hid. Results of 10^-5 and less, in every tile and
/// with a gate, by a tolerance that is relative to them.
fn check_small_results<T: Element>(driver: &dyn Driver, scale: f32) {
    for class in 0..CLASSES.len() {
        for gated in [false, true] {
            let mut case = Grouped::new(&[CLASSES[class], 3, 130], 72, 40);
            case.gated = gated;
            case.activation = Some(Activation::Silu);
            let mut data = Data::<T>::new(&case);
            data.a.iter_mut().for_each(|x| *x = T::from_f32(scale * x.to_f32()));
            let found = run_grouped(driver, &case, &data, Some(class));
            super::gemm::check_result(&case, &data, &found);
            assert!(found.iter().all(|x| x.to_f64().abs() < 1e-4));
        }
    }
}

#[test]
fn small_results_are_right_in_every_tile() {
    on_devices(false, |driver| {
        check_small_results::<bf16>(driver, 1e-5);
        check_small_results::<bf16>(driver, 1e-12);
        check_small_results::<f16>(driver, 1e-5);
        check_small_results::<f32>(driver, 1e-5);
        check_small_results::<f32>(driver, 1e-12);
    });
}

/// ByteDance-Seed/Triton-distributed#180: every row was written to row 0. Row `r`, column `n` is a number that only this place has: rows that
/// land on one another show.
#[test]
fn every_row_lands_in_its_place() {
    on_devices(true, |driver| {
        for class in 0..CLASSES.len() {
            for gated in [false, true] {
                let mut case = Grouped::new(&[3, 0, 150, 17], 24, 8);
                (case.gated, case.activation) = (gated, Some(Activation::Relu));
                case.tokens = Some(170);
                let mut data = Data::<f32>::new(&case);
                data.a
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = if i % 8 == 0 { 1.0 + (i / 8) as f32 } else { 0.0 });
                let [gate, up] = &mut data.weights;
                gate.iter_mut().for_each(|w| *w = 0.0);
                up.iter_mut()
                    .enumerate()
                    .for_each(|(i, w)| *w = if i % 8 == 0 { 1.0 + (i / 8) as f32 / 128.0 } else { 0.0 });
                // Gates of one, whatever the row: from the bias.
                case.bias = gated;
                data.biases = [vec![1.0; 4 * 24], vec![0.0; 4 * 24]];
                let found = run_grouped(driver, &case, &data, Some(class));
                let groups = [0usize; 3].into_iter().chain([2; 150]).chain([3; 17]);
                for (r, group) in groups.enumerate() {
                    for n in 0..24 {
                        let expected = (1.0 + data.row_token[r] as f32) * (1.0 + (group * 24 + n) as f32 / 128.0);
                        assert_eq!(found[r * 24 + n], expected, "row {r}, column {n}, class {class}, gated: {gated}");
                    }
                }
            }
        }
    });
}

// --- alignment ----------------------------------------------------------------------------------------------------------

/// pytorch/pytorch#150374, deepseek-ai/DeepGEMM#96: strides that are no multiple of 16 bytes gave wrong results. Rows of inputs that do not
/// begin at such multiples are an error that says so; results may lie anywhere.
#[test]
fn rows_off_16_bytes_are_an_error_or_right() {
    on_devices(true, |driver| {
        let (tokens, outputs, inputs) = (5, 9, 16);
        let mut rng = Rng::new(1);
        let x = rng.normals::<bf16>(tokens * 24, 1.0);
        let w = rng.normals::<bf16>(outputs * inputs, 1.0);
        let mut near = vec![bf16::ZERO; tokens * outputs];
        let wide = View::with_strides(&x, [tokens, inputs], [24, 1]);
        let view = ViewMut::new(&mut near, [tokens, outputs]);
        staged::linear(driver, wide, View::new(&w, [outputs, inputs]), None, view).unwrap();
        let (x, w) = (Buffer::from_slice(driver, &x).unwrap(), Buffer::from_slice(driver, &w).unwrap());
        let out = Buffer::from_slice(driver, &[bf16::ZERO; 5 * 11 + 1]).unwrap();
        let mut queue = Queue::new(driver);
        let mut run = |x_at: usize, x_stride: usize, out_at: usize, out_stride: usize| {
            // SAFETY: the views stay within the buffers, which outlive the queue's work.
            unsafe {
                let at = |buffer: &Buffer<'_>, skip: usize| (buffer.ptr() + 2 * skip as u64, buffer.bytes() / 2 - skip);
                let ((x, x_len), (w, w_len), (out, out_len)) = (at(&x, x_at), at(&w, 0), at(&out, out_at));
                let x = DeviceView::<bf16, 2>::from_raw(x, x_len, [tokens, inputs], [x_stride, 1]);
                let w = DeviceView::<bf16, 2>::from_raw(w, w_len, [outputs, inputs], [inputs, 1]);
                let out = DeviceViewMut::<bf16, 2>::from_raw(out, out_len, [tokens, outputs], [out_stride, 1]);
                linear(&mut queue, x, w, None, out)
            }
        };
        let strided = run(0, 20, 0, 9).unwrap_err();
        assert!(matches!(&strided, Error::Stride { argument, .. } if argument == "x"), "{strided}");
        let moved = run(4, 24, 0, 9).unwrap_err();
        assert!(matches!(&moved, Error::Value { argument, .. } if argument == "x"), "{moved}");
        for (at, stride) in [(0, 9), (1, 9), (0, 10), (1, 10), (0, 11), (1, 11)] {
            run(0, 24, at, stride).unwrap();
            let found: Vec<bf16> = out.to_vec(Stream::LEGACY).unwrap();
            for (t, near) in near.chunks_exact(outputs).enumerate() {
                assert!(bits(&found[at + t * stride..][..outputs]) == bits(near), "row {t} at {at}, {stride}");
            }
        }
    });
}
