//! The activations of `kernels/lib/activation.ptx` value by value, against the reference in f64: every exponent, subnormal numbers,
//! zeros, infinities, NaN, and densely where they bend. A value comes as a bias of sums that are 0, so it reaches the activation as it is.

use crate::common::Rng;
use crate::common::tolerance::ulp;
use crate::on_devices;
use gatefold::args::FfnWeights;
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{F32Products, GroupedGemm, GroupedGemmArgs, GroupedGemmPlan, Stream};
use gatefold::spec::{Activation, Ffn};
use gatefold::{Dtype, View, ViewMut, reference};

/// Every exponent of both signs with mantissas at the ends and between; the bends and the tails densely.
fn values() -> Vec<f32> {
    let mut rng = Rng::new(crate::common::seed());
    let mut values = vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN];
    for exponent in 0..255u32 {
        let mantissas = [0, 1, 0x7f_ffff, rng.below(1 << 23) as u32, rng.below(1 << 23) as u32];
        for mantissa in mantissas {
            let bits = exponent << 23 | mantissa;
            values.extend([f32::from_bits(bits), f32::from_bits(bits | 1 << 31)]);
        }
    }
    values.extend((0..6000).map(|i| (i as f64 * 0.01 - 30.0 + 0.01 * rng.uniform()) as f32));
    values.extend((0..1500).map(|i| (-120.0 + 0.05 * (i as f64 + rng.uniform())) as f32)); // where e^x becomes subnormal, then 0
    values
}

/// `activation(x) * 1` of every value, stored in f32.
fn run(driver: &dyn Driver, kernel: Kernel, activation: Activation, gated: bool, x: &[f32]) -> Vec<f32> {
    let (n, inputs) = (x.len(), 8);
    let mut problem = GroupedGemm::linear(kernel.dtype, 1, n, inputs);
    (problem.out_dtype, problem.f32_products) = (Dtype::F32, kernel.products);
    (problem.activation, problem.gated) = (Some(activation), gated);
    let plan = GroupedGemmPlan::new(&problem, &driver.limits()).unwrap();
    let upload = |values: &[f32]| Buffer::from_slice(driver, values).unwrap();
    let zeros = upload(&vec![0.0; n * inputs]); // of any type
    let (values, ones) = (upload(x), upload(&vec![1.0 - offset(activation); n]));
    let out = upload(&vec![0.0; n]);
    let mut args = GroupedGemmArgs::new(zeros.ptr(), zeros.ptr(), out.ptr());
    if gated {
        args = args.with_gate(zeros.ptr());
        (args.gate_bias, args.up_bias) = (Some(values.ptr()), Some(ones.ptr()));
    } else {
        args.up_bias = Some(values.ptr());
    }
    // SAFETY: the buffers have the plan's shapes and outlive the read below, which waits.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    out.to_vec(Stream::LEGACY).unwrap()
}

/// What a gated product adds to `up`.
fn offset(activation: Activation) -> f32 {
    if matches!(activation, Activation::SwigluClamped { .. }) { 1.0 } else { 0.0 }
}

/// The same from the reference, whose sums are 0 too.
fn truth(activation: Activation, gated: bool, x: f32) -> f64 {
    let ffn = if gated { Ffn::gated } else { Ffn::plain }(1, 1, activation);
    let ffn = with!(ffn, up_bias: true);
    let zero = View::new(&[0.0f64], [1, 1]);
    let one = View::new(&[1.0f64], [1, 1]);
    let (x, up) = ([x], [1.0 - offset(activation)]);
    let mut weights = FfnWeights::new(gated.then_some(zero), zero, one);
    weights.gate_bias = gated.then_some(&x);
    weights.up_bias = Some(if gated { &up } else { &x });
    let mut out = [0.0];
    reference::mlp::<f64, f64, f32>(&ffn, zero, &weights, ViewMut::new(&mut out, [1, 1])).unwrap();
    out[0]
}

/// Which product the activation stands behind: those that are stored in 16 bits and those of tf32 take the fast ones; the latter show
/// them in f32.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    dtype: Dtype,
    products: F32Products,
}

const EXACT: [Kernel; 2] = [
    Kernel { dtype: Dtype::F32, products: F32Products::Full },
    Kernel { dtype: Dtype::BF16, products: F32Products::Full },
];
const FAST: Kernel = Kernel { dtype: Dtype::F32, products: F32Products::Tf32 };

/// The bound that `lib/activation.ptx` states, in ulp of the result, and how many steps of 2^-149 besides.
///
/// Errors are counted in 2^-24 of a value, which is at most 1 ulp, half the rounding of a correctly rounded instruction counted in full.
/// What is wrong in the exponent of e^-|s| by so many times |s| makes the result wrong by as much.
fn bound(activation: Activation, fast: bool, x: f64) -> (f64, f64) {
    let x = match activation {
        Activation::SwigluClamped { limit, .. } => x.min(limit),
        _ => x,
    };
    // The sigmoid's argument, and the roundings in it.
    let (s, roundings) = match activation {
        Activation::Silu => (x, 0.0),
        Activation::SwigluClamped { alpha, .. } => (alpha * x, 2.0),
        _ => (1.6 * x * (1.0 + 0.044715 * (x * x).min(1e4)), 4.0),
    };
    match (activation, fast) {
        (Activation::Relu, _) => (0.0, 0.0),
        (Activation::ReluSquared, _) => (0.5, 0.0),
        (Activation::GeluErf, false) => (8.0, 1.0),
        (Activation::GeluErf, true) => (24.0 + 4.0 * x * x, 1.0 + 2.0 * x.abs()),
        (_, false) => (6.0 + roundings * s.abs(), 1.0),
        (_, true) => (9.0 + (2.0 + roundings) * s.abs(), 1.0 + 3.0 * x.abs()),
    }
}

fn check(driver: &dyn Driver, kernel: Kernel, activation: Activation, gated: bool, x: &[f32]) {
    let found = run(driver, kernel, activation, gated, x);
    let fast = kernel.products == F32Products::Tf32;
    let mut worst = (0.0, 0.0);
    for (&x, &found) in x.iter().zip(&found) {
        let truth = truth(activation, gated, x);
        let what = format!("{activation:?} {kernel:?} of {x:e}: {found:e}, expected {truth:e}");
        if truth.is_nan() {
            assert!(found.is_nan(), "{what}");
            continue;
        }
        if (truth as f32).is_infinite() {
            assert!(f64::from(found) == f64::from(truth as f32), "{what}");
            continue;
        }
        let (ulps, least) = bound(activation, fast, f64::from(x));
        let error = (f64::from(found) - truth).abs();
        let size = ulp(Dtype::F32, truth);
        assert!(error <= ulps * size + least * 2f64.powi(-149), "{what}: {:.2} of {ulps:.2} ulp", error / size);
        if truth.abs() > 1e-30 && error / size > worst.0 {
            worst = (error / size, x);
        }
    }
    println!("{activation:?} {kernel:?} gated {gated}: {:.2} ulp at {:e}", worst.0, worst.1);
}

const PLAIN: [Activation; 5] =
    [Activation::Silu, Activation::GeluErf, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared];
const CLAMPED: [Activation; 2] =
    [Activation::SwigluClamped { alpha: 1.702, limit: 7.0 }, Activation::SwigluClamped { alpha: 1.0, limit: 1e30 }];

fn check_all(driver: &dyn Driver, kernel: Kernel, x: &[f32]) {
    PLAIN.into_iter().for_each(|activation| check(driver, kernel, activation, false, x));
    PLAIN.into_iter().chain(CLAMPED).for_each(|activation| check(driver, kernel, activation, true, x));
}

#[test]
fn exact_activations_over_all_values() {
    let x = values();
    on_devices(false, |driver| EXACT.into_iter().for_each(|kernel| check_all(driver, kernel, &x)));
}

#[test]
fn fast_activations_over_all_values() {
    let x = values();
    on_devices(false, |driver| check_all(driver, FAST, &x));
}
