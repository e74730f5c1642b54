//! Feed-forward blocks, routed experts, the whole mixture.

use crate::common::{Array, ExpertCase, ExpertOptions, GateUp, Layout, Rng, RouteResult, assert_close, naive};
use crate::with;
use gatefold::args::{ExpertWeights, FfnWeights, MoeInput, MoeOutput, MoeWeights, RouteInput, RouteOutput, Routing};
use gatefold::spec::{Activation, Capacity, CapacityLimit, ExpertFfn, Ffn, Moe, Renormalize, Router, SharedExpert};
use gatefold::spec::{WeightFormat, WeightOn};
use gatefold::{Error, View, ViewMut, reference};

/// A block of width 1 with all weights 1: the activation itself.
fn activation(activation: Activation, gate: f64, up: Option<f64>) -> f64 {
    let one = [1.0];
    let weight = View::new(&one, [1, 1]);
    let (spec, gate_weight) = match up {
        Some(_) => (Ffn::gated(1, 1, activation), Some(weight)),
        None => (Ffn::plain(1, 1, activation), None),
    };
    let spec = with!(spec, up_bias: true);
    // Gate and up see the same x = 0: the biases make them differ.
    let (gate_bias, up_bias) = ([gate], [up.unwrap_or(gate)]);
    let mut weights = FfnWeights::<f64, f64>::new(gate_weight, weight, weight);
    weights.gate_bias = up.is_some().then_some(&gate_bias);
    weights.up_bias = Some(&up_bias);
    let mut out = [9.0];
    reference::mlp(&spec, View::new(&[0.0], [1, 1]), &weights, ViewMut::new(&mut out, [1, 1])).unwrap();
    out[0]
}

#[test]
fn activations() {
    let e = 1f64.exp();
    for (act, x, want) in [
        (Activation::Silu, 1.0, e / (1.0 + e)),
        (Activation::Silu, -800.0, 0.0),
        (Activation::GeluErf, 1.0, 0.841_344_746_068_542_9),
        (Activation::GeluErf, -1.0, -0.158_655_253_931_457_05),
        (Activation::GeluErf, -9.0, -9.0 * 1.128_588_405_953_840_6e-19),
        (Activation::GeluTanh, 1.0, 0.841_191_990_608_276_8),
        (Activation::Relu, -2.0, 0.0),
        (Activation::Relu, 2.0, 2.0),
        (Activation::ReluSquared, -2.0, 0.0),
        (Activation::ReluSquared, 3.0, 9.0),
    ] {
        let plain = activation(act, x, None);
        assert!((plain - want).abs() <= 4e-15 * want.abs(), "{act:?}({x}) = {plain:e}, expected {want:e}");
        let gated = activation(act, x, Some(3.0));
        assert!((gated - 3.0 * want).abs() <= 2e-14 * want.abs(), "gated {act:?}");
    }
    // Every activation propagates NaN.
    for act in [Activation::Silu, Activation::GeluErf, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared]
    {
        assert!(activation(act, f64::NAN, None).is_nan(), "{act:?}");
    }
    // erf against Simpson's rule.
    for i in -40..=40 {
        let x = f64::from(i) / 10.0;
        let want = x / 2.0 * (1.0 + naive::erf(x / std::f64::consts::SQRT_2));
        assert!((activation(Activation::GeluErf, x, None) - want).abs() < 1e-12, "gelu({x})");
    }
}

#[test]
fn clamped_swiglu() {
    let act = Activation::SwigluClamped { alpha: 2.0, limit: 3.0 };
    let value = |g: f64, u: f64| (u + 1.0) * g / (1.0 + (-2.0 * g).exp());
    for (gate, up, want) in [
        (1.0, 2.0, value(1.0, 2.0)),
        (50.0, 2.0, value(3.0, 2.0)),    // the gate is clamped above
        (-50.0, 2.0, value(-50.0, 2.0)), // and not below
        (1.0, 9.0, value(1.0, 3.0)),
        (1.0, -9.0, value(1.0, -3.0)),
    ] {
        assert!((activation(act, gate, Some(up)) - want).abs() < 1e-14, "gate {gate}, up {up}");
    }
    assert!(activation(act, f64::NAN, Some(1.0)).is_nan() && activation(act, 1.0, Some(f64::NAN)).is_nan());
}

#[test]
fn a_block_by_hand() {
    // relu(x W_gate^T) * (x W_up^T + b), then down: 2 -> 3 -> 2.
    let (gate, up, down) =
        ([1.0, 0.0, 0.0, 1.0, -1.0, 0.0], [1.0, 1.0, 2.0, 0.0, 5.0, 5.0], [1.0, 2.0, 3.0, 0.0, 1.0, 0.0]);
    let spec = with!(Ffn::gated(2, 3, Activation::Relu), up_bias: true, down_bias: true);
    let mut weights =
        FfnWeights::<f64, f64>::new(Some(View::new(&gate, [3, 2])), View::new(&up, [3, 2]), View::new(&down, [2, 3]));
    let (gb, ub, db) = ([0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [100.0, 200.0]);
    weights.gate_bias = Some(&gb);
    weights.up_bias = Some(&ub);
    weights.down_bias = Some(&db);
    let mut out = [0.0; 2];
    reference::mlp(&spec, View::new(&[2.0, 3.0], [1, 2]), &weights, ViewMut::new(&mut out, [1, 2])).unwrap();
    // gate (2, 3, -1) -> relu (2, 3, 0); up (5, 5, 25); inner (10, 15, 0).
    assert_eq!(out, [140.0, 215.0]);
}

fn options(num_tokens: usize, slots: usize) -> ExpertOptions {
    ExpertOptions { num_tokens, slots, gate_up: GateUp::Separate, layout: Layout::Contiguous }
}

fn run(case: &ExpertCase<f64, f64>) -> Vec<f64> {
    let weights = case.weights();
    case.run(|spec, x, routing, out| reference::expert_ffn(spec, x, routing, &weights, out))
}

/// The block of one expert for all tokens.
fn expert(case: &ExpertCase<f64, f64>, e: usize, x: &[f64]) -> Vec<f64> {
    let shape = case.hidden.shape();
    let mut out = vec![0.0; x.len()];
    let weights = case.weights().expert(e);
    reference::mlp(&case.spec.ffn, View::new(x, shape), &weights, ViewMut::new(&mut out, shape)).unwrap();
    out
}

#[test]
fn all_experts_selected_is_the_dense_mixture() {
    let ffn = with!(Ffn::gated(5, 7, Activation::Silu), up_bias: true, down_bias: true);
    for weight_on in [WeightOn::Output, WeightOn::Input] {
        let spec = with!(ExpertFfn::new(4, ffn), weight_on: weight_on, combine_scale: 0.5);
        let mut case = ExpertCase::<f64, f64>::new(&spec, options(6, 4), 3);
        for t in 0..6 {
            (0..4).for_each(|s| case.ids.set([t, s], (s as i32 + t as i32) % 4));
        }
        let x = case.hidden.values();
        let mut want = vec![0.0; x.len()];
        for e in 0..4 {
            let w = |t: usize| f64::from(case.topk_weights.at([t, (e + 4 - t % 4) % 4]));
            let scaled: Vec<f64> = x.iter().enumerate().map(|(i, x)| x * w(i / 5)).collect();
            let y = if weight_on == WeightOn::Input { expert(&case, e, &scaled) } else { expert(&case, e, &x) };
            for (i, y) in y.iter().enumerate() {
                want[i] += 0.5 * if weight_on == WeightOn::Input { *y } else { w(i / 5) * y };
            }
        }
        assert_close("out", &run(&case), &want, 1e-14);
    }
}

#[test]
fn slices_of_the_experts_sum_to_the_whole() {
    let spec = ExpertFfn::new(8, Ffn::plain(4, 6, Activation::GeluTanh));
    let case = ExpertCase::<f64, f64>::new(&spec, options(9, 3), 1);
    let whole = run(&case);
    let mut sum = vec![0.0; whole.len()];
    for (first, count) in [(0, 3), (3, 0), (3, 4), (7, 1)] {
        let mut part = case.clone();
        (part.spec.first_expert, part.spec.num_local_experts) = (first, count);
        let cut = |a: &Array<f64, 3>| {
            let [_, rows, cols] = a.shape();
            let values = a.values()[first * rows * cols..(first + count) * rows * cols].to_vec();
            Array::new([count, rows, cols], Layout::Padded, &values)
        };
        part.gate_up = vec![cut(&case.gate_up[0])];
        part.down = cut(&case.down);
        // Weights of somebody else's slots are not looked at.
        for (t, s) in (0..9).flat_map(|t| (0..3).map(move |s| (t, s))) {
            if part.spec.local_expert(case.ids.at([t, s])).is_none() {
                part.topk_weights.set([t, s], f32::NAN);
            }
        }
        sum.iter_mut().zip(run(&part)).for_each(|(sum, y)| *sum += y);
    }
    assert_close("sum", &sum, &whole, 1e-14);
}

#[test]
fn gate_and_up_in_one_array() {
    let spec = ExpertFfn::new(3, with!(Ffn::gated(4, 5, Activation::Silu), up_bias: true));
    let case = ExpertCase::<f64, f64>::new(&spec, options(5, 2), 2);
    let want = run(&case);
    let (gate, up) = (case.gate_up[0].values(), case.gate_up[1].values());
    for gate_up in [GateUp::Halves, GateUp::Interleaved] {
        let row = |e: usize, r: usize, half: &[f64]| half[(e * 5 + r) * 4..][..4].to_vec();
        let mut values = Vec::new();
        for e in 0..3 {
            if gate_up == GateUp::Halves {
                (0..5).for_each(|r| values.extend(row(e, r, &gate)));
                (0..5).for_each(|r| values.extend(row(e, r, &up)));
            } else {
                (0..5).for_each(|r| values.extend([row(e, r, &gate), row(e, r, &up)].concat()));
            }
        }
        for layout in Layout::ALL {
            let mut other = case.clone();
            other.options.gate_up = gate_up;
            other.gate_up = vec![Array::new([3, 10, 4], layout, &values)];
            assert_eq!(run(&other), want, "{gate_up:?} {layout:?}");
        }
    }
}

#[test]
fn edges_of_the_routing() {
    let spec = ExpertFfn::new(3, Ffn::gated(2, 3, Activation::Silu));
    let mut case = ExpertCase::<f64, f64>::new(&spec, options(2, 3), 5);
    for (s, (id, w)) in [(-1, f32::NAN), (7, f32::NAN), (i32::MIN, f32::INFINITY)].into_iter().enumerate() {
        case.ids.set([0, s], id);
        case.topk_weights.set([0, s], w);
    }
    // An expert may stand in several slots.
    (0..3).for_each(|s| case.ids.set([1, s], 1));
    let out = run(&case);
    assert_eq!(out[..2], [0.0, 0.0]);
    let w: f64 = (0..3).map(|s| f64::from(case.topk_weights.at([1, s]))).sum();
    let want: Vec<f64> = expert(&case, 1, &case.hidden.values())[2..].iter().map(|y| w * y).collect();
    assert_close("twice", &out[2..], &want, 1e-14);
    assert!(run(&ExpertCase::new(&spec, options(0, 3), 5)).is_empty());
    assert_eq!(run(&ExpertCase::new(&spec, options(2, 0), 5)), [0.0; 4]);
}

#[test]
fn formats_that_only_fast_backends_have() {
    for format in
        [WeightFormat::Fp8Tensor, WeightFormat::Int8, WeightFormat::Mxfp4, WeightFormat::Int4 { group_size: 4 }]
    {
        let spec = with!(ExpertFfn::new(3, Ffn::gated(2, 3, Activation::Silu)), weight_format: format);
        let case = ExpertCase::<f64, f64>::new(&spec, options(2, 1), 5);
        let mut out = [7.0; 4];
        let weights = case.weights();
        let error =
            reference::expert_ffn(&spec, case.hidden.view(), &case.routing(), &weights, ViewMut::new(&mut out, [2, 2]));
        assert!(matches!(&error, Err(Error::Unsupported { backend, .. }) if backend == "reference"), "{error:?}");
        assert_eq!(out, [7.0; 4]);
    }
}

/// Owned parts of a mixture.
struct Mixture {
    spec: Moe,
    case: ExpertCase<f64, f64>,
    router: Vec<f64>,
    router_bias: Vec<f64>,
    selection_bias: Vec<f64>,
    shared: ExpertCase<f64, f64>,
    shared_gate: Vec<f64>,
}

fn mixture(n: usize) -> Mixture {
    let experts = ExpertFfn::new(6, Ffn::gated(4, 5, Activation::Silu));
    let router = with!(Router::new(6, 2), renormalize: Renormalize::sum(), scaling_factor: 1.5);
    let shared = with!(SharedExpert::new(Ffn::gated(4, 3, Activation::Silu)), sigmoid_gate: true);
    let spec = with!(Moe::new(router, experts), router_bias: true, selection_bias: true, shared: Some(shared));
    let mut rng = Rng::new(6);
    Mixture {
        case: ExpertCase::new(&experts, options(n, 2), 7),
        shared: ExpertCase::new(&ExpertFfn::new(1, shared.ffn), options(0, 1), 8),
        router: rng.normals(24, 1.0),
        router_bias: rng.normals(6, 0.2),
        selection_bias: rng.normals(6, 0.2),
        shared_gate: rng.normals(4, 1.0),
        spec,
    }
}

impl Mixture {
    fn weights(&self) -> MoeWeights<'_, f64, f64> {
        let mut w = MoeWeights::new(View::new(&self.router, [6, 4]), widen(self.case.weights()));
        w.router_bias = Some(&self.router_bias);
        w.selection_bias = Some(&self.selection_bias);
        w.shared = Some(widen(self.shared.weights()).expert(0));
        w.shared_gate = Some(View::new(&self.shared_gate, [1, 4]));
        w
    }

    fn run<'a>(&'a self, edit: impl FnOnce(&mut MoeInput<'a, f64, f64>)) -> (Vec<f64>, RouteResult<f64>) {
        let n = self.case.hidden.shape()[0];
        let slots = [n, self.spec.router.slots()];
        let mut r = RouteResult {
            ids: vec![0; n * slots[1]],
            weights: vec![0.0; n * slots[1]],
            tokens_per_expert: vec![0; 6],
            dropped: 0,
            expert_tokens: vec![],
            aux_loss: 0.0,
            z_loss: 0.0,
        };
        let mut input = MoeInput::new(self.case.hidden.view());
        edit(&mut input);
        let mut route = RouteOutput::new(ViewMut::new(&mut r.ids, slots), ViewMut::new(&mut r.weights, slots));
        route.tokens_per_expert = Some(&mut r.tokens_per_expert);
        route.dropped = Some(&mut r.dropped);
        let mut out = vec![9.0; n * 4];
        let mut output = MoeOutput::new(ViewMut::new(&mut out, [n, 4]));
        output.route = input.routing.is_none().then_some(route);
        reference::moe(&self.spec, &input, &self.weights(), output).unwrap();
        (out, r)
    }

    /// The routed part from ids and weights, through `expert_ffn`, and the shared part, through `mlp`.
    fn parts(&self, r: &RouteResult<f64>) -> Vec<f64> {
        let n = self.case.hidden.shape()[0];
        let slots = [n, self.spec.router.slots()];
        let weights = self.weights();
        let (mut routed, mut shared) = (vec![0.0; n * 4], vec![0.0; n * 4]);
        let routing = Routing::new(View::new(&r.ids, slots), View::new(&r.weights, slots));
        let hidden = self.case.hidden.view();
        let out = ViewMut::new(&mut routed, [n, 4]);
        reference::expert_ffn(&self.spec.experts, hidden, &routing, &weights.experts, out).unwrap();
        let ffn = self.spec.shared.unwrap().ffn;
        reference::mlp(&ffn, hidden, &weights.shared.unwrap(), ViewMut::new(&mut shared, [n, 4])).unwrap();
        for t in 0..n {
            let x: f64 = hidden.row(&[t]).iter().zip(&self.shared_gate).map(|(x, w)| x * w).sum();
            (0..4).for_each(|d| routed[t * 4 + d] += shared[t * 4 + d] / (1.0 + (-x).exp()));
        }
        routed
    }
}

/// Weights without biases have no side inputs: any type will do for them.
fn widen(w: ExpertWeights<'_, f64, f32>) -> ExpertWeights<'_, f64, f64> {
    ExpertWeights::separate(w.gate, w.up, w.down)
}

#[test]
fn the_mixture_is_its_parts() {
    let mut m = mixture(7);
    for capacity in [None, Some(Capacity::new(CapacityLimit::Tokens(2)))] {
        m.spec.router.capacity = capacity;
        for mask in [None, Some([1, 0, 1, 1, 1, 0, 1].as_slice())] {
            let (out, r) = m.run(|i| i.token_mask = mask);
            let shape = [7, 6];
            let mut logits = vec![0.0; 42];
            let weights = m.weights();
            reference::router_logits(
                &m.spec.router,
                m.case.hidden.view(),
                weights.router,
                weights.router_bias,
                0,
                ViewMut::new(&mut logits, shape),
            )
            .unwrap();
            let mut input = RouteInput::<f64>::new(View::new(&logits, shape));
            input.selection_bias = Some(&m.selection_bias);
            input.token_mask = mask;
            let (mut ids, mut w) = (vec![0; 14], vec![0.0; 14]);
            let output = RouteOutput::new(ViewMut::new(&mut ids, [7, 2]), ViewMut::new(&mut w, [7, 2]));
            reference::route(&m.spec.router, &input, output).unwrap();
            assert_eq!((&r.ids, &r.weights), (&ids, &w));
            assert_close("out", &out, &m.parts(&r), 1e-15);
            // Replayed.
            let routing = Routing::new(View::new(&ids, [7, 2]), View::new(&w, [7, 2]));
            assert_eq!(m.run(|i| i.routing = Some(routing)).0, out);
        }
    }
    let (out, _) = mixture(0).run(|_| {});
    assert!(out.is_empty());
}

#[test]
fn a_masked_token_gets_the_shared_expert_alone() {
    let mut m = mixture(2);
    let (out, r) = m.run(|i| i.token_mask = Some(&[1, 0]));
    assert_eq!(r.ids[2..], [-1, -1]);
    let none = m.parts(&RouteResult { ids: vec![-1; 4], ..r });
    assert_close("out", &out[4..], &none[4..], 1e-15);
    // Without shared expert: 0.
    m.spec.shared = None;
    let weights = {
        let mut w = m.weights();
        (w.shared, w.shared_gate) = (None, None);
        w
    };
    let mut out = [9.0; 8];
    let mut input = MoeInput::<f64, f64>::new(m.case.hidden.view());
    input.token_mask = Some(&[0, 1]);
    reference::moe(&m.spec, &input, &weights, MoeOutput::new(ViewMut::new(&mut out, [2, 4]))).unwrap();
    assert_eq!(out[..4], [0.0; 4]);
}

#[test]
fn jitter_of_the_mixture_follows_the_seed() {
    let mut m = mixture(20);
    m.spec.router.jitter = Some(0.9);
    let run = |seed| m.run(|i| i.seed = seed).1.ids;
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
