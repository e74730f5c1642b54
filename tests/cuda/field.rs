//! What users of other systems have hit, on whole mixtures: a test for each, named after what went wrong. Wrong bits from run to run and
//! from batch to batch are in `mixture_bits`, bugs of routing alone in `route` and `coupled`, of products in `gemm`.

use super::mixture_bits::{rank_of, routers};
use super::moe::{check_mixture, mixture_of, options, small, with_shared};
use crate::common::simulator::Simulator;
use crate::common::sums::bits;
use crate::common::{ExpertOptions, Layout, MoeCase, RouteResult};
use crate::{on_devices, on_large_devices};
use gatefold::Element;
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{
    self, DeviceView, DeviceViewMut, ExpertWeights, FfnArgs, FfnStrides, MoeArgs, MoeInput, MoeOutput, MoePlan,
    MoeProblem, MoeWeights, Queue, Stream,
};
use gatefold::spec::{Activation, ExpertFfn, Ffn, Moe, Router, Selection};
use half::bf16;
use std::marker::PhantomData;

fn contiguous(num_tokens: usize, slots: usize) -> ExpertOptions {
    ExpertOptions { layout: Layout::Contiguous, ..options(num_tokens, slots) }
}

/// Softmax and top-k over experts of these sizes.
fn plain(experts: usize, top_k: usize, hidden: usize, inter: usize) -> Moe {
    Moe::new(Router::new(experts, top_k), ExpertFfn::new(experts, Ffn::gated(hidden, inter, Activation::Silu)))
}

// --- sizes ------------------------------------------------------------------------------------------------------------

/// Matrices of one size that lie [`Far::APART`] elements apart.
struct Far<'a, T> {
    buffer: Buffer<'a>,
    count: usize,
    size: [usize; 2],
    _type: PhantomData<T>,
}

impl<'a, T: Element> Far<'a, T> {
    const APART: usize = (1 << 31) + 64;

    fn new(driver: &'a dyn Driver, count: usize, size: [usize; 2], values: &[T]) -> Self {
        let len = size[0] * size[1];
        let buffer = Buffer::new(driver, ((count - 1) * Self::APART + len) * size_of::<T>()).unwrap();
        let far = Far { buffer, count, size, _type: PhantomData };
        for (i, part) in values.chunks_exact(len).enumerate() {
            // SAFETY: the buffer has room for every matrix, and nothing runs.
            unsafe { driver.copy_to_device(far.at(i), bytemuck::cast_slice(part)).unwrap() };
        }
        far
    }

    fn at(&self, i: usize) -> u64 {
        self.buffer.ptr() + (i * Self::APART * size_of::<T>()) as u64
    }

    fn view(&self) -> DeviceView<'_, T, 3> {
        let [rows, cols] = self.size;
        let len = (self.count - 1) * Self::APART + rows * cols;
        // SAFETY: the buffer holds the matrices, `APART` elements apart.
        unsafe { DeviceView::from_raw(self.buffer.ptr(), len, [self.count, rows, cols], [Self::APART, cols, 1]) }
    }

    /// Of matrices of one row: these.
    fn rows(&self) -> DeviceView<'_, T, 2> {
        self.view().with_strides([self.count, self.size[1]], [Self::APART, 1])
    }

    fn rows_mut(&mut self) -> DeviceViewMut<'_, T, 2> {
        let [len, shape, strides] = [[self.view().len(); 2], self.rows().shape(), self.rows().strides()];
        // SAFETY: as above, and the buffer is borrowed for as long as the view lives.
        unsafe { DeviceViewMut::from_raw(self.buffer.ptr(), len[0], shape, strides) }
    }

    fn values(&self, driver: &dyn Driver) -> Vec<T> {
        let mut values = vec![T::default(); self.count * self.size[0] * self.size[1]];
        for (i, part) in values.chunks_exact_mut(self.size[0] * self.size[1]).enumerate() {
            // SAFETY: the address holds a matrix, and nothing runs.
            unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(part), self.at(i)).unwrap() };
        }
        values
    }
}

/// vllm-project/vllm#5938, #34279, #34086, #45884, sgl-project/sglang#4727, #4856: offsets of 32 bits. Tokens, rows of the router and experts lie more than
/// 2^31 elements apart. Needs 44 GB on the device.
#[test]
fn offsets_beyond_32_bits() {
    on_large_devices(|driver| {
        let case = MoeCase::<bf16, bf16, bf16>::new(&plain(3, 2, 40, 24), contiguous(3, 2), 5);
        let near = mixture_of(driver, &case, None, false);
        let far = |size: [usize; 2], values: &[bf16]| Far::new(driver, 3, size, values);
        let hidden = far([1, 40], &case.experts.hidden.values());
        let router = far([1, 40], &case.router.values());
        let gate_up = far([48, 40], &case.experts.gate_up[0].values());
        let down = far([40, 24], &case.experts.down.values());
        let mut out = far([1, 40], &[]);
        let weights = MoeWeights::new(router.rows(), ExpertWeights::halves(gate_up.view(), down.view()));
        let output = MoeOutput::new(out.rows_mut());
        cuda::moe(&mut Queue::new(driver), &case.spec, &MoeInput::new(hidden.rows()), &weights, output).unwrap();
        driver.synchronize(Stream::LEGACY).unwrap();
        assert!(bits(&out.values(driver)) == bits(&near.out));
    });
}

/// Dao-AILab/sonic-moe#4, vllm-project/vllm#6029: limits at 50 000 and 65 536 tokens. Most of these are padding, so that it takes seconds.
#[test]
fn more_than_65536_tokens() {
    let n = (1 << 16) + 70;
    let mut case = MoeCase::<bf16, bf16, bf16>::new(&plain(4, 1, 16, 8), contiguous(n, 1), 5);
    let live = |t: usize| t >= n - 30 || t.is_multiple_of(9973);
    case.token_mask = Some((0..n).map(|t| u8::from(live(t))).collect());
    on_devices(true, |driver| {
        let got = mixture_of(driver, &case, None, false);
        for t in (0..n).filter(|t| !live(*t)) {
            assert!(got.out[16 * t..16 * (t + 1)].iter().all(|x| x.to_bits() == 0), "token {t} is padding");
        }
        let last = mixture_of(driver, &case.part(n - 30..n), None, false);
        assert!(bits(&got.out[16 * (n - 30)..]) == bits(&last.out), "the last tokens alone");
    });
}

/// Intermediate sizes that are no multiple of 128 once they are split over ranks (768 / 4), widths of 2880 and 768, experts that are no power
/// of two (vllm-project/vllm's choice of backends, deepseek-ai/DeepGEMM#106, #238, sgl-project/sglang#30595): refused, or a crash.
#[test]
fn no_shape_is_refused_for_its_divisors() {
    on_devices(true, |driver| {
        for (hidden, inter, experts, top_k) in [
            (2880, 24, 3, 2),
            (24, 2880, 3, 1),
            (768, 192, 2, 1),
            (40, 8, 7, 5),
            (8, 136, 60, 4),
            (72, 40, 160, 6),
            (16, 24, 288, 8),
            (24, 16, 513, 10),
            (16, 16, 1, 1),
        ] {
            let case = MoeCase::<bf16, bf16, bf16>::new(&plain(experts, top_k, hidden, inter), contiguous(3, top_k), 2);
            check_mixture(driver, &case, false, true);
        }
        let case = MoeCase::<f32, f32, f32>::new(&plain(3, 2, 200, 72), contiguous(3, 2), 2);
        check_mixture(driver, &case, false, true);
    });
}

// --- memory and rows that nobody wrote --------------------------------------------------------------------------------

/// pytorch/pytorch#193633, pytorch/torchtitan#1237: rows behind the last assignment came into sums as 0 * NaN. All memory between the
/// kernels is NaN, or -1, when the call begins.
#[test]
fn rows_that_nobody_wrote_are_not_read() {
    fn check<T: Element>(driver: &dyn Driver, n: usize, first: usize, count: usize) {
        let mut whole = MoeCase::<T, T, T>::new(&small(2), contiguous(n, 2), 9);
        whole.token_mask = Some((0..n).map(|t| u8::from(t % 4 != 2)).collect());
        let case = rank_of(&whole, first, count);
        let want = mixture_of(driver, &case, None, false);
        let copy = |values: &[T]| Buffer::from_slice(driver, values).unwrap();
        let (gate_up, down) = (copy(&case.experts.gate_up[0].values()), copy(&case.experts.down.values()));
        let (hidden, router) = (copy(&case.experts.hidden.values()), copy(&case.router.values()));
        let mask = Buffer::from_slice(driver, case.token_mask.as_ref().unwrap()).unwrap();
        let out = copy(&vec![T::from_f32(f32::NAN); n * 40]);
        let mut problem = MoeProblem::new(&case.spec, T::DTYPE, n);
        problem.experts = FfnStrides::halves(&case.spec.experts.ffn);
        let plan = MoePlan::new(&problem, &driver.limits()).unwrap();
        let workspace = Buffer::from_slice(driver, &vec![0xff_u8; plan.workspace_bytes()]).unwrap();
        let up = gate_up.ptr() + (24 * 40 * size_of::<T>()) as u64;
        let experts = FfnArgs::new(gate_up.ptr(), up, down.ptr());
        let mut args = MoeArgs::new(hidden.ptr(), router.ptr(), experts, out.ptr(), workspace.ptr());
        args.token_mask = Some(mask.ptr());
        // SAFETY: the buffers hold the arrays of the plan and outlive the read below, which waits.
        unsafe {
            plan.warmup(driver).unwrap();
            plan.launch(driver, &args, Stream::LEGACY).unwrap();
        }
        assert!(bits(&out.to_vec::<T>(Stream::LEGACY).unwrap()) == bits(&want.out), "{n} tokens");
        assert!(want.out.iter().all(|x| x.to_f32().is_finite()));
    }
    on_devices(true, |driver| {
        for n in [3, 20, 150] {
            for (first, count) in [(0, 8), (2, 3)] {
                check::<bf16>(driver, n, first, count);
                check::<f32>(driver, n, first, count);
            }
        }
    });
}

/// pytorch/torchtitan#1166, NVIDIA/Megatron-LM#3626, #4851, sgl-project/sglang#25397, vllm-project/vllm#51984: a hang, or a crash. Experts without tokens are not
/// even read: their weights are NaN here.
#[test]
fn experts_and_ranks_without_tokens() {
    fn check<T: Element>(driver: &dyn Driver) {
        let mut spec = with_shared(small(1));
        spec.router_bias = true;
        for n in [1, 8, 70] {
            let mut case = MoeCase::<T, T, T>::new(&spec, contiguous(n, 1), 4);
            case.router_bias = Some((0..8).map(|e| if e == 5 { 1000.0 } else { 0.0 }).collect());
            check_mixture(driver, &case, false, true);
            let whole = mixture_of(driver, &case, None, true);
            assert_eq!(whole.route.as_ref().unwrap().tokens_per_expert, [0, 0, 0, 0, 0, n as u32, 0, 0]);
            let mut nan = case.clone();
            for array in nan.experts.gate_up.iter_mut().chain([&mut nan.experts.down]) {
                let [_, rows, cols] = array.shape();
                for e in (0..8).filter(|e| *e != 5) {
                    (0..rows * cols).for_each(|i| array.set([e, i / cols, i % cols], T::from_f32(f32::NAN)));
                }
            }
            assert!(
                bits(&mixture_of(driver, &nan, None, true).out) == bits(&whole.out),
                "{n} tokens: weights of others"
            );
            // Ranks to which no token goes, and one without experts: what is left is the shared expert's.
            let mut shared = case.clone();
            shared.token_mask = Some(vec![0; n]);
            let shared = mixture_of(driver, &shared, None, false);
            for (first, count) in [(0, 5), (6, 2), (8, 0)] {
                let part = mixture_of(driver, &rank_of(&nan, first, count), None, false);
                assert!(bits(&part.out) == bits(&shared.out), "{n} tokens, experts {first} + {count}");
            }
        }
        let nobody = MoeCase::<T, T, T>::new(&spec, contiguous(0, 1), 4);
        assert!(mixture_of(driver, &nobody, None, true).out.is_empty());
    }
    on_devices(true, |driver| {
        check::<bf16>(driver);
        check::<f32>(driver);
    });
}

// --- which experts ------------------------------------------------------------------------------------------------------

/// vllm-project/vllm#39391: rows of NaN, as padding of a graph leaves them, gave the same expert in every slot, and a sort crashed.
#[test]
fn rows_of_nan_do_not_repeat_experts() {
    on_devices(true, |driver| {
        for (name, spec) in routers() {
            for nan in [vec![0], vec![3, 4, 11], (0..12).collect()] {
                let mut case = MoeCase::<bf16, bf16, bf16>::new(&spec, options(12, 2), 6);
                nan.iter().for_each(|t| case.experts.hidden.set([*t, 17], bf16::NAN));
                let got = mixture_of(driver, &case, None, true);
                assert_ids(name, &got.route.unwrap());
            }
        }
    });
}

/// Experts of a token differ from one another and exist.
fn assert_ids(what: &str, route: &RouteResult<f32>) {
    for (t, ids) in route.ids.chunks(route.ids.len() / 12).enumerate() {
        let mut seen: Vec<i32> = ids.iter().copied().filter(|id| *id != -1).collect();
        assert!(seen.iter().all(|id| (0..8).contains(id)), "{what}, token {t}: {ids:?}");
        seen.sort_unstable();
        assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "{what}, token {t}: {ids:?}");
    }
}

/// vllm-project/vllm#55514, #52679, sgl-project/sglang#13969: equal scores went to whoever came first. The lower expert has them; where
/// experts choose, the lower token.
#[test]
fn equal_scores_go_to_the_lower_expert() {
    on_devices(true, |driver| {
        for (name, mut spec) in routers() {
            (spec.router_bias, spec.selection_bias) = (false, false);
            let case = MoeCase::<bf16, bf16, bf16>::new(&spec, options(8, 2), 6);
            let case = case.with_hidden(&[bf16::ZERO; 320]);
            let ids = mixture_of(driver, &case, None, true).route.unwrap().ids;
            for (t, ids) in ids.chunks(spec.router.slots()).enumerate() {
                let want: Vec<i32> = match (spec.router.selection, spec.router.capacity) {
                    (Selection::Prototypes, _) => vec![0, 4],
                    (Selection::ExpertChoice, _) => (0..8).map(|e| if t < 2 { e } else { -1 }).collect(),
                    (_, Some(_)) => {
                        if t < 2 {
                            vec![0, 1]
                        } else {
                            vec![-1, -1]
                        }
                    }
                    _ if name == "second expert by chance" => vec![0, ids[1].min(1)],
                    _ => vec![0, 1],
                };
                assert_eq!(ids, want, "{name}, token {t}");
            }
        }
    });
}

// --- what is paid for -------------------------------------------------------------------------------------------------

/// Bytes that the products of one call move.
fn product_bytes(case: &MoeCase<bf16, bf16, bf16>) -> u64 {
    let simulator = Simulator::new(false);
    mixture_of(&simulator, case, None, false);
    let counters = simulator.take_counters();
    counters.iter().filter(|(entry, _)| entry.contains("grouped_gemm")).map(|(_, c)| c.global_bytes).sum()
}

/// sgl-project/sglang#25852: padding of a graph went to experts, whose weights were loaded for nothing. vllm-project/vllm#39327: nine tenths
/// of what a decode step moved were rows of padding. Each used expert is read once, and little else is moved.
#[test]
fn padding_loads_no_expert() {
    let (hidden, inter) = (256, 128);
    let expert = (3 * hidden * inter * 2) as u64;
    let case = MoeCase::<bf16, bf16, bf16>::new(&plain(16, 2, hidden, inter), contiguous(48, 2), 3);
    let live = case.part(0..4);
    let mut padded = case.clone();
    padded.token_mask = Some((0..48).map(|t| u8::from(t < 4)).collect());
    let route = mixture_of(&Simulator::new(false), &live, None, true).route.unwrap();
    let used = route.tokens_per_expert.iter().filter(|count| **count > 0).count() as u64;
    let (alone, padded) = (product_bytes(&live), product_bytes(&padded));
    println!("{used} experts of {expert} bytes: {alone} bytes for 4 tokens, {padded} with 44 more of padding");
    assert!(alone < used * expert * 5 / 4, "{alone}");
    assert!(padded < alone + expert / 2, "{padded}, without padding {alone}");
}

/// pytorch/pytorch#186620: the host waited for the counts and launched expert by expert. Launches are as many whatever the routing, and
/// whatever the number of experts.
#[test]
fn launches_do_not_depend_on_the_routing() {
    let launches = |experts: usize, bias: f32| {
        let simulator = Simulator::new(false);
        let mut spec = plain(experts, 2, 16, 8);
        spec.router_bias = true;
        let mut case = MoeCase::<bf16, bf16, bf16>::new(&spec, contiguous(40, 2), 3);
        case.router_bias = Some((0..experts).map(|e| if e < 2 { bias } else { 0.0 }).collect());
        mixture_of(&simulator, &case, None, false);
        simulator.take_counters().into_iter().map(|(entry, _)| entry).collect::<Vec<_>>()
    };
    let spread = launches(128, 0.0);
    assert_eq!(launches(128, 1000.0), spread, "all tokens on two experts");
    assert_eq!(launches(4, 0.0).len(), spread.len(), "4 experts");
    println!("{spread:?}");
}
