//! `route`: from the logits of 4096 tokens to experts and weights. Logits are f32, whatever the type of the activations.

use crate::support::array::Array;
use crate::{Suite, Work, mixture, random, samples};
use gatefold::args::{RouteInput, RouteOutput};
use gatefold::cpu::{Cpu, route};
use gatefold::{Dtype, reference};

const TOKENS: usize = 4096;
/// Largest error of a weight, which is at most 1 before scaling: a rounding of f32 for each of score, sum, quotient, scale.
const TOLERANCE: f64 = 4.0 * f32::EPSILON as f64;

/// Softmax of 128 with renormalised weights; the best 4 of 32, then softmax; sigmoid of 256 in groups, with a bias.
pub fn benches(suite: &mut Suite) {
    for model in ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"] {
        top_k(suite, model);
    }
}

fn top_k(suite: &mut Suite, model: &str) {
    let moe = mixture(model);
    let spec = moe.router;
    let (experts, shape) = (spec.num_experts, [TOKENS, spec.slots()]);
    suite.bench("route", model, Dtype::F32, Work::Tokens(TOKENS), || {
        let logits = random::<f32>(1, &[TOKENS, experts], 1.0);
        let bias = moe.selection_bias.then(|| random::<f32>(2, &[experts], 0.1).data);
        let input = |logits| {
            let mut input = RouteInput::new(logits);
            input.selection_bias = bias.as_deref();
            input
        };
        let mut ids = Array::new(vec![0; shape[0] * shape[1]], &shape);
        let (mut cpu, mut weights) = (Cpu::new().expect("a level"), Array::<f32>::zeros(&shape));
        let output = RouteOutput::new(ids.view_mut(), weights.view_mut());
        route(&mut cpu, &spec, &input(logits.view()), output).expect("shapes that fit");

        let (rows, some) = (samples(TOKENS), [samples(TOKENS).len(), shape[1]]);
        let (mut true_ids, mut truth) = (Array::new(vec![0; some[0] * some[1]], &some), Array::zeros(&some));
        let output = RouteOutput::new(true_ids.view_mut(), truth.view_mut());
        reference::route(&spec, &input(logits.pick(&rows).view()), output).expect("shapes that fit");
        assert_eq!(ids.pick(&rows), true_ids, "route/{model}: experts of the sampled tokens");
        let error = |(x, y): (&f32, &f64)| (f64::from(*x) - y).abs();
        let worst = weights.pick(&rows).data.iter().zip(&truth.data).map(error).fold(0.0, f64::max);
        let allowed = TOLERANCE * spec.scaling_factor.abs().max(1.0);
        assert!(worst <= allowed, "route/{model}: a weight is wrong by {worst:.1e}, allowed are {allowed:.1e}");

        move || {
            let mut input = RouteInput::new(logits.view());
            input.selection_bias = bias.as_deref();
            let output = RouteOutput::new(ids.view_mut(), weights.view_mut());
            route(&mut cpu, &spec, &input, output).expect("shapes that fit");
        }
    });
}
