//! Products of f32 arrays as tf32: where a caller asks for them by name, and nowhere else. Their tolerance is that of the textbook method
//! on factors that are rounded to tf32; that of f32 would neither hold nor say anything.

use super::gemm::{
    ACTIVATIONS, CLASSES, check_grouped_bits, check_grouped_nan, check_options, check_ragged, loop_cost,
};
use crate::common::mixtures::{Chosen, naive_mixture};
use crate::common::naive::{Store, tf32};
use crate::common::simulator::Simulator;
use crate::common::sums::{assert_sums, bits, naive_experts, naive_sum, starts_for};
use crate::common::{Array, ExpertCase, ExpertOptions, GateUp, Layout, MoeCase, Rng};
use crate::staged::{self, StagedExperts, StagedFfn, StagedMoe};
use crate::{on_devices, staged::Staged};
use gatefold::args::FfnWeights;
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{ExpertFfnProblem, F32Products, GroupedGemm, MlpProblem, MoeProblem, Queue};
use gatefold::spec::{Activation, ExpertFfn, Ffn, Mla, Moe, Router, SharedExpert};
use gatefold::{Dtype, View, ViewMut, reference};
use simt::Class;

fn tf32_queue(driver: &dyn Driver) -> Queue<'_> {
    let mut queue = Queue::new(driver);
    queue.set_f32_products(F32Products::Tf32);
    queue
}

/// `x * weight`, and the largest rounding error that the definition of tf32 admits in each sum.
fn check_linear(driver: &dyn Driver, tokens: usize, outputs: usize, inputs: usize) {
    let mut rng = Rng::new((tokens * outputs + inputs) as u64);
    let x = rng.normals::<f32>(tokens * inputs, 1.0);
    let weight = rng.normals::<f32>(outputs * inputs, 1.0);
    let (mut truth, mut naive, mut bound) = (Vec::new(), Vec::new(), Vec::new());
    let starts = starts_for(tokens * outputs);
    for x in x.chunks_exact(inputs) {
        for w in weight.chunks_exact(inputs) {
            let pairs = || x.iter().zip(w);
            let exact = pairs().map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
            let size = pairs().map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum::<f64>();
            let terms: Vec<f32> = pairs().map(|(x, w)| tf32(*x) * tf32(*w)).collect();
            truth.push(exact);
            naive.push(naive_sum(&terms, 0.0, exact, starts));
            // Both factors 2^-11 off; then up to two steps of five terms in an MMA of 8 k, each cut 2^-24 below the largest, and the
            // result 2^-23: no partial sum is larger than `size` and what the roundings add to it.
            let factors = 2.0 * 2f64.powi(-11) + 2f64.powi(-22);
            let steps = 2.0 * inputs.div_ceil(8) as f64 * (5.0 * 2f64.powi(-24) + 2f64.powi(-23));
            bound.push(size * (factors + steps * (1.0 + factors)));
        }
    }
    let mut found = vec![0.0f32; tokens * outputs];
    let staged_weight = Staged::new(driver, View::new(&weight, [outputs, inputs])).unwrap();
    let view = ViewMut::new(&mut found, [tokens, outputs]);
    let x = View::new(&x, [tokens, inputs]);
    staged::linear_with(&mut tf32_queue(driver), x, &staged_weight, None, view).unwrap();
    let what = format!("{tokens} x {outputs} x {inputs}");
    assert_sums(&what, &found, &truth, &naive, outputs);
    for ((found, truth), bound) in found.iter().zip(&truth).zip(&bound) {
        assert!((f64::from(*found) - truth).abs() <= *bound, "{what}: {found} for {truth}, {bound:e} is allowed");
    }
}

#[test]
fn tf32_linear() {
    on_devices(false, |driver| {
        for (i, tokens) in [1, 15, 16, 17, 33, 64, 129].into_iter().enumerate() {
            for (j, outputs) in [1, 8, 63, 130].into_iter().enumerate() {
                check_linear(driver, tokens, outputs, [4, 32, 36, 200][(i + j) % 4]);
            }
        }
        check_linear(driver, 3, 70, 4096);
    });
}

/// The values of f32 that tf32 has are multiplied without an error, the others are rounded to nearest, ties away from zero.
#[test]
fn tf32_rounds_factors_to_nearest() {
    let step = 2f32.powi(-10);
    let half = step / 2.0;
    let cases = [
        (1.0, 1.0),
        (1.0 + step, 1.0 + step),
        (1.0 + half - 2f32.powi(-23), 1.0),
        (1.0 + half, 1.0 + step),
        (-1.0 - half, -1.0 - step),
        (1.0 + 3.0 * half, 1.0 + 2.0 * step),
        (f32::MAX, f32::INFINITY),
        (2f32.powi(-130), 2f32.powi(-130)),
    ];
    on_devices(true, |driver| {
        for (value, expected) in cases {
            let x = [value, 0.0, 0.0, 0.0];
            let one = Staged::new(driver, View::new(&[1.0f32, 0.0, 0.0, 0.0], [1, 4])).unwrap();
            let mut out = [0.0f32];
            let view = ViewMut::new(&mut out, [1, 1]);
            staged::linear_with(&mut tf32_queue(driver), View::new(&x, [1, 4]), &one, None, view).unwrap();
            assert_eq!(out[0], expected, "{value:e}");
            assert_eq!(tf32(value), expected, "{value:e} in the textbook");
        }
    });
}

#[test]
fn tf32_grouped_options() {
    on_devices(false, |driver| check_options::<f32, f32>(driver, F32Products::Tf32));
}

#[test]
fn tf32_grouped_ragged() {
    on_devices(false, |driver| check_ragged::<f32, f32>(driver, F32Products::Tf32));
}

#[test]
fn tf32_grouped_bits() {
    on_devices(true, |driver| check_grouped_bits::<f32, f32>(driver, F32Products::Tf32));
}

#[test]
fn tf32_grouped_nan() {
    on_devices(true, |driver| check_grouped_nan::<f32>(driver, F32Products::Tf32));
}

fn rounded<const N: usize>(array: &Array<f32, N>, layout: Layout) -> Array<f32, N> {
    Array::new(array.shape(), layout, &array.values().into_iter().map(tf32).collect::<Vec<_>>())
}

/// The case as the products see it.
fn rounded_case(case: &ExpertCase<f32, f32>) -> ExpertCase<f32, f32> {
    let layout = case.options.layout;
    ExpertCase {
        hidden: rounded(&case.hidden, layout),
        gate_up: case.gate_up.iter().map(|weights| rounded(weights, layout)).collect(),
        down: rounded(&case.down, layout),
        ..case.clone()
    }
}

fn options(num_tokens: usize, slots: usize, gate_up: GateUp) -> ExpertOptions {
    ExpertOptions { num_tokens, slots, gate_up, layout: Layout::Aligned }
}

#[test]
fn tf32_experts() {
    on_devices(false, |driver| {
        for (i, gate_up) in [GateUp::Separate, GateUp::Halves, GateUp::Interleaved].into_iter().enumerate() {
            let spec = ExpertFfn::new(5, Ffn::gated(136, 72, ACTIVATIONS[i]));
            let case = ExpertCase::<f32, f32>::new(&spec, options([3, 20, 70][i], 2, gate_up), i as u64);
            let weights = case.weights();
            let truth: Vec<f64> =
                case.run(|spec, hidden, routing, out| reference::expert_ffn(spec, hidden, routing, &weights, out));
            let naive: Vec<f32> = naive_experts(&rounded_case(&case), Store::Tf32, Store::F32);
            let weights = StagedExperts::new(driver, &weights).unwrap();
            let found: Vec<f32> = case.run(|spec, hidden, routing, out| {
                staged::expert_ffn_with(&mut tf32_queue(driver), spec, hidden, routing, &weights, out)
            });
            assert_sums(&format!("{spec:?} {gate_up:?}"), &found, &truth, &naive, 136 * 2);
        }
    });
}

/// 8 experts and a shared one behind a gate.
fn mixture() -> Moe {
    let mut spec = Moe::new(Router::new(8, 2), ExpertFfn::new(8, Ffn::gated(72, 136, Activation::Silu)));
    let mut shared = SharedExpert::new(Ffn::gated(72, 40, Activation::Silu));
    shared.sigmoid_gate = true;
    spec.shared = Some(shared);
    spec
}

/// Experts and the shared one are tf32; logits, choice and weights are those of f32, bit for bit.
#[test]
fn tf32_mixtures() {
    on_devices(true, |driver| {
        for num_tokens in [1, 40] {
            let case = MoeCase::<f32, f32, f32>::new(&mixture(), options(num_tokens, 2, GateUp::Halves), 3);
            let weights = case.weights();
            let staged_weights = StagedMoe::new(driver, &weights).unwrap();
            let run = |queue: &mut Queue<'_>| {
                case.run::<f32, f32>(None, true, |spec, input, output| {
                    staged::moe_with(queue, spec, input, &staged_weights, output)
                })
            };
            let (full, found) = (run(&mut Queue::new(driver)), run(&mut tf32_queue(driver)));
            assert_eq!(full.route, found.route);
            assert!(bits(&full.out) != bits(&found.out), "the products are those of f32");
            let chosen = Chosen::of(&case, found.route.as_ref().unwrap());
            let truth = case.run::<f64, f64>(Some(chosen.routing()), false, |spec, input, output| {
                reference::moe(spec, input, &weights, output)
            });
            let mut seen = case.clone();
            seen.experts = rounded_case(&case.experts);
            seen.shared = case.shared.as_ref().map(rounded_case);
            let naive = naive_mixture::<f32, f32, f32, f32>(&seen, &chosen, Store::Tf32, Store::F32);
            assert_sums(&format!("{num_tokens} tokens"), &found.out, &truth.out, &naive, 72 * 4);
        }
    });
}

/// Every safe call and every problem that multiplies f32, without and with the option: no instruction of a tensor core, and some.
#[test]
fn f32_is_tf32_only_where_asked() {
    assert_eq!(F32Products::default(), F32Products::Full);
    let ffn = Ffn::gated(72, 40, Activation::Silu);
    let experts = ExpertFfn::new(8, ffn);
    for products in [
        GroupedGemm::linear(Dtype::F32, 3, 8, 16).f32_products,
        GroupedGemm::experts(Dtype::F32, 2, 3, 8, 16).f32_products,
        MlpProblem::new(&ffn, Dtype::F32, 3).f32_products,
        ExpertFfnProblem::new(&experts, Dtype::F32, 3, 2).f32_products,
        MoeProblem::new(&mixture(), Dtype::F32, 3).f32_products,
    ] {
        assert_eq!(products, F32Products::Full);
    }
    let sim = Simulator::new(false);
    for asked in [false, true] {
        let queue = || if asked { tf32_queue(&sim) } else { Queue::new(&sim) };
        let seen = |what: &str, mut expected: bool| {
            expected &= asked;
            let matrices: u64 = sim.take_counters().iter().map(|(_, counters)| counters.class(Class::Matrix)).sum();
            assert_eq!(matrices > 0, expected, "{what}, asked: {asked}: {matrices} instructions of tensor cores");
        };
        for tokens in [3, 40, 200] {
            let mut rng = Rng::new(1);
            let x = rng.normals::<f32>(tokens * 72, 1.0);
            let x = View::new(&x, [tokens, 72]);
            let weight = rng.normals::<f32>(40 * 72, 1.0);
            let weight = Staged::new(&sim, View::new(&weight, [40, 72])).unwrap();
            let mut out = vec![0.0f32; tokens * 40];
            staged::linear_with(&mut queue(), x, &weight, None, ViewMut::new(&mut out, [tokens, 40])).unwrap();
            seen("linear", true);

            let case = MoeCase::<f32, f32, f32>::new(&mixture(), options(tokens, 2, GateUp::Halves), 3);
            let weights = StagedMoe::new(&sim, &case.weights()).unwrap();
            case.run::<f32, f32>(None, true, |spec, input, output| {
                staged::moe_with(&mut queue(), spec, input, &weights, output)
            });
            seen("moe", true);
            let weights = StagedExperts::new(&sim, &case.experts.weights()).unwrap();
            case.experts.run::<f32>(|spec, hidden, routing, out| {
                staged::expert_ffn_with(&mut queue(), spec, hidden, routing, &weights, out)
            });
            seen("expert_ffn", true);
            let one = case.shared.as_ref().unwrap();
            let weights: FfnWeights<'_, f32> = one.weights().expert(0);
            let weights = StagedFfn::new(&sim, &weights).unwrap();
            let mut out = vec![0.0f32; tokens * 72];
            let view = ViewMut::new(&mut out, [tokens, 72]);
            staged::mlp_with(&mut queue(), &one.spec.ffn, x, &weights, view).unwrap();
            seen("mlp", true);

            let heads = rng.normals::<f32>(2 * 40 * 36, 1.0);
            let (x, heads) = (View::new(x.data(), [tokens, 2, 36]), View::new(&heads, [2, 40, 36]));
            let mut out = vec![0.0f32; tokens * 80];
            staged::linear_heads_with(&mut queue(), x, heads, ViewMut::new(&mut out, [tokens, 2, 40])).unwrap();
            seen("linear_heads", true);
            let spec = Mla::new(2, 8, 36, 8, 4);
            let kv_b = View::new(heads.data(), [2, 40, 8]);
            let mut out = vec![0.0f32; tokens * 16];
            staged::mla_absorb_query_with(&mut queue(), &spec, x, kv_b, ViewMut::new(&mut out, [tokens, 2, 8]))
                .unwrap();
            seen("mla_absorb_query", false);
        }
    }
}

/// As many instructions as for 16 bits of the same bytes, and the conversions.
#[test]
fn tf32_counters() {
    let mut found = Vec::new();
    for class in 0..CLASSES.len() {
        for gated in [false, true] {
            found.push(loop_cost::<f32, f32>(class, gated, F32Products::Tf32));
        }
    }
    let expected = [
        ("gatefold_grouped_gemm_tf32_m16", 7488, 512, 5120),
        ("gatefold_grouped_gemm_tf32_m16_gated", 15360, 1024, 10240),
        ("gatefold_grouped_gemm_tf32_m32", 9536, 1024, 6144),
        ("gatefold_grouped_gemm_tf32_m32_gated", 19456, 2048, 12288),
        ("gatefold_grouped_gemm_tf32_m64", 8992, 2048, 6144),
        ("gatefold_grouped_gemm_tf32_m64_gated", 18176, 4096, 12288),
        ("gatefold_grouped_gemm_tf32_m128", 16960, 4096, 8192),
        ("gatefold_grouped_gemm_tf32_m128_gated", 34304, 8192, 16384),
    ];
    assert_eq!(found, expected);
}
