//! Arguments of routing, feed-forward blocks, experts and mixtures; packed weights of the CPU backend.

use super::Found;
use crate::common::{Layout, Output};
use crate::with;
use gatefold::args::*;
use gatefold::spec::*;
use gatefold::{View, ViewMut, reference};

static F: [f32; 1000] = [0.0; 1000];
static IDS: [i32; 100] = [0; 100];
static M: [u8; 10] = [1; 10];

fn f<const N: usize>(shape: [usize; N]) -> View<'static, f32, N> {
    View::new(&F, shape)
}

pub fn errors(found: &mut Found) {
    route(found);
    blocks(found);
    mixture(found);
    #[cfg(feature = "cuda")]
    {
        use gatefold::cuda::{ElementwiseOp, ElementwisePlan, ElementwiseProblem};
        let problem = ElementwiseProblem::new(ElementwiseOp::SiluMul, gatefold::Dtype::F64, 3, 64);
        found.add("ElementwisePlan, dtype", ElementwisePlan::new(&problem));
    }
}

fn route(found: &mut Found) {
    type Edit = fn(&mut Router, &mut RouteInput<'static>);
    let edits: [(&str, Edit); 7] = [
        ("spec", |s, _| s.top_k = 9),
        ("logits", |_, i| i.logits = f([5, 7])),
        ("logits short", |_, i| i.logits = View::new(&F[..39], [5, 8])),
        ("logits stride", |_, i| i.logits = View::with_strides(&F, [5, 8], [16, 2])),
        ("selection_bias", |_, i| i.selection_bias = Some(&F[..7])),
        ("token_mask", |_, i| i.token_mask = Some(&M[..4])),
        ("loss_mask", |_, i| i.loss_mask = Some(&M[..6])),
    ];
    for (name, edit) in edits {
        let (mut spec, mut input) = (Router::new(8, 2), RouteInput::new(f([5, 8])));
        edit(&mut spec, &mut input);
        let (mut ids, mut weights) = (Output::new([5, 2], Layout::Padded), Output::new([5, 2], Layout::Padded));
        let output = RouteOutput::<f64>::new(ids.view(), weights.view());
        found.add(&format!("route, {name}"), reference::route(&spec, &input, output));
        ids.assert_untouched(name);
        weights.assert_untouched(name);
    }
    let choice = with!(
        Router::new(8, 2),
        selection: Selection::ExpertChoice,
        capacity: Some(Capacity::new(CapacityLimit::Tokens(3))),
    );
    let bias = with!(RouteInput::new(f([5, 8])), selection_bias: Some(&F[..8]));
    let plain = RouteInput::new(f([5, 8]));
    let top = Router::new(8, 2);
    let (mut ids, mut weights, mut counts) = ([77; 40], [7.0; 40], [77; 9]);
    let (mut tokens, mut loss) = ([77; 40], 7.0);
    let two = [5, 2];
    let mut call = |name: &str,
                    spec: &Router,
                    input: &RouteInput<'_>,
                    shapes: [[usize; 2]; 2],
                    n: usize,
                    per: Option<[usize; 2]>,
                    aux: bool| {
        let mut output = RouteOutput::new(ViewMut::new(&mut ids, shapes[0]), ViewMut::new(&mut weights, shapes[1]));
        output.tokens_per_expert = Some(&mut counts[..n]);
        output.expert_tokens = per.map(|shape| ViewMut::new(&mut tokens, shape));
        output.aux_loss = aux.then_some(&mut loss);
        found.add(&format!("route, {name}"), reference::route(spec, input, output));
    };
    call("topk_ids", &top, &plain, [[5, 3], two], 8, None, false);
    call("topk_weights", &top, &plain, [two, [2, 5]], 8, None, false);
    call("tokens_per_expert", &top, &plain, [two, two], 9, None, false);
    call("expert_tokens given", &top, &plain, [two, two], 8, Some([8, 3]), false);
    call("aux_loss given", &top, &plain, [two, two], 8, None, true);
    call("slots of expert choice", &choice, &plain, [two, two], 8, None, false);
    call("expert_tokens", &choice, &plain, [[5, 8], [5, 8]], 8, Some([8, 4]), false);
    call("bias of expert choice", &choice, &bias, [[5, 8], [5, 8]], 8, None, false);
    call(
        "bias of sinkhorn",
        &with!(top.clone(), selection: Selection::Sinkhorn { iterations: 1 }),
        &bias,
        [two, two],
        8,
        None,
        false,
    );
    assert!(ids.iter().chain(&tokens).all(|x| *x == 77) && counts == [77; 9]);
    assert!(weights.iter().all(|x| *x == 7.0) && loss == 7.0);

    let mut out = [7.0; 50];
    for (name, spec, hidden, weight, bias, shape) in [
        ("spec", with!(top.clone(), jitter: Some(2.0)), f([5, 4]), f([8, 4]), None, [5, 8]),
        ("hidden", top.clone(), View::new(&F[..19], [5, 4]), f([8, 4]), None, [5, 8]),
        ("weight", top.clone(), f([5, 4]), f([8, 5]), None, [5, 8]),
        ("bias", top.clone(), f([5, 4]), f([8, 4]), Some(&F[..5]), [5, 8]),
        ("logits", top.clone(), f([5, 4]), f([8, 4]), None, [5, 9]),
    ] {
        let logits = ViewMut::new(&mut out, shape);
        found.add(&format!("router_logits, {name}"), reference::router_logits(&spec, hidden, weight, bias, 0, logits));
    }
    assert_eq!(out, [7.0; 50]);
}

fn blocks(found: &mut Found) {
    type Edit = fn(&mut Ffn, &mut FfnWeights<'static, f32>);
    let edits: [(&str, Edit); 12] = [
        ("spec", |s, _| s.hidden_size = 0),
        ("gate absent", |_, w| w.gate = None),
        ("gate given", |s, _| s.gated = false),
        ("gate", |_, w| w.gate = Some(f([6, 5]))),
        ("up", |_, w| w.up = f([5, 4])),
        ("up stride", |_, w| w.up = View::with_strides(&F, [6, 4], [8, 2])),
        ("down", |_, w| w.down = f([6, 4])),
        ("gate_bias absent", |s, _| s.up_bias = true),
        ("up_bias given", |_, w| w.up_bias = Some(&F[..6])),
        ("up_bias length", |s, w| {
            s.up_bias = true;
            w.gate_bias = Some(&F[..6]);
            w.up_bias = Some(&F[..5]);
        }),
        ("down_bias absent", |s, _| s.down_bias = true),
        ("down_bias given", |_, w| w.down_bias = Some(&F[..4])),
    ];
    let mut out = [7.0; 20];
    for (name, edit) in edits {
        let mut spec = Ffn::gated(4, 6, Activation::Silu);
        let mut weights = FfnWeights::new(Some(f([6, 4])), f([6, 4]), f([4, 6]));
        edit(&mut spec, &mut weights);
        let result = reference::mlp(&spec, f([5, 4]), &weights, ViewMut::new(&mut out, [5, 4]));
        found.add(&format!("mlp, {name}"), result);
    }
    let (spec, weights) =
        (Ffn::gated(4, 6, Activation::Silu), FfnWeights::<f32>::new(Some(f([6, 4])), f([6, 4]), f([4, 6])));
    found.add("mlp, x", reference::mlp(&spec, f([4, 5]), &weights, ViewMut::new(&mut out, [5, 4])));
    found.add("mlp, out", reference::mlp(&spec, f([5, 4]), &weights, ViewMut::new(&mut out, [4, 5])));

    type ExpertEdit = fn(&mut ExpertFfn, &mut Routing<'static>, &mut ExpertWeights<'static, f32>);
    let edits: [(&str, ExpertEdit); 12] = [
        ("spec", |s, _, _| s.num_local_experts = 4),
        ("weight format", |s, _, _| s.weight_format = WeightFormat::Mxfp4),
        ("topk_ids", |_, r, _| r.topk_ids = View::new(&IDS, [4, 2])),
        ("topk_ids short", |_, r, _| r.topk_ids = View::new(&IDS[..9], [5, 2])),
        ("topk_weights", |_, r, _| r.topk_weights = f([5, 3])),
        ("local experts", |s, _, _| s.num_local_experts = 2),
        ("halves", |_, _, w| *w = ExpertWeights::halves(View::new(&F[..71], [3, 12, 4]), f([3, 4, 6]))),
        ("halves, odd", |_, _, w| *w = ExpertWeights::halves(f([3, 13, 4]), f([3, 4, 6]))),
        ("interleaved, odd", |_, _, w| *w = ExpertWeights::interleaved(f([3, 13, 4]), f([3, 4, 6]))),
        ("interleaved", |_, _, w| *w = ExpertWeights::interleaved(View::new(&F[..71], [3, 12, 4]), f([3, 4, 6]))),
        ("down", |_, _, w| w.down = View::new(&F[..71], [3, 4, 6])),
        ("gate_bias", |s, _, w| {
            s.ffn.up_bias = true;
            w.gate_bias = Some(f([2, 6]));
        }),
    ];
    for (name, edit) in edits {
        let mut spec = ExpertFfn::new(3, Ffn::gated(4, 6, Activation::Silu));
        let mut routing = Routing::new(View::new(&IDS, [5, 2]), f([5, 2]));
        let mut weights = ExpertWeights::separate(Some(f([3, 6, 4])), f([3, 6, 4]), f([3, 4, 6]));
        edit(&mut spec, &mut routing, &mut weights);
        let result = reference::expert_ffn(&spec, f([5, 4]), &routing, &weights, ViewMut::new(&mut out, [5, 4]));
        found.add(&format!("expert_ffn, {name}"), result);
    }
    let spec = ExpertFfn::new(3, Ffn::gated(4, 6, Activation::Silu));
    let routing = Routing::<f32>::new(View::new(&IDS, [5, 2]), f([5, 2]));
    let weights = ExpertWeights::<f32>::separate(Some(f([3, 6, 4])), f([3, 6, 4]), f([3, 4, 6]));
    let view = ViewMut::new(&mut out, [5, 4]);
    found.add("expert_ffn, hidden", reference::expert_ffn(&spec, f([5, 3]), &routing, &weights, view));
    let view = ViewMut::with_strides(&mut out, [5, 4], [3, 1]);
    found.add("expert_ffn, out rows overlap", reference::expert_ffn(&spec, f([5, 4]), &routing, &weights, view));
    assert_eq!(out, [7.0; 20]);
}

fn mixture(found: &mut Found) {
    type Edit = fn(&mut Moe, &mut MoeInput<'static, f32>, &mut MoeWeights<'static, f32>);
    let edits: Vec<(&str, Edit)> = vec![
        ("spec", |s, _, _| s.router.num_experts = 4),
        ("weight format", |s, _, _| s.experts.weight_format = WeightFormat::Fp8Block),
        ("hidden", |_, i, _| i.hidden = f([5, 5])),
        ("token_mask", |_, i, _| i.token_mask = Some(&M[..3])),
        ("routing", |_, i, _| i.routing = Some(Routing::new(View::new(&IDS, [4, 2]), f([4, 2])))),
        ("routing and route", |_, i, _| i.routing = Some(Routing::new(View::new(&IDS, [5, 2]), f([5, 2])))),
        ("router", |_, _, w| w.router = f([4, 3])),
        ("router_bias absent", |s, _, _| s.router_bias = true),
        ("router_bias given", |_, _, w| w.router_bias = Some(&F[..3])),
        ("router_bias length", |s, _, w| {
            s.router_bias = true;
            w.router_bias = Some(&F[..4]);
        }),
        ("selection_bias absent", |s, _, _| s.selection_bias = true),
        ("selection_bias given", |_, _, w| w.selection_bias = Some(&F[..3])),
        ("selection_bias of the sparse mixer", |s, _, w| {
            s.selection_bias = true;
            s.router.selection = Selection::SparseMixer { jitter_eps: 0.1 };
            w.selection_bias = Some(&F[..3]);
        }),
        ("experts", |_, _, w| w.experts.up = f([3, 6, 5])),
        ("shared absent", |s, _, _| s.shared = Some(SharedExpert::new(Ffn::gated(4, 2, Activation::Silu)))),
        ("shared given", |_, _, w| w.shared = Some(w.experts.expert(0))),
        ("shared shape", |s, _, w| {
            s.shared = Some(SharedExpert::new(Ffn::gated(4, 2, Activation::Silu)));
            w.shared = Some(w.experts.expert(0));
        }),
        ("shared_gate absent", |s, _, w| {
            s.shared = Some(with!(SharedExpert::new(Ffn::gated(4, 6, Activation::Silu)), sigmoid_gate: true));
            w.shared = Some(w.experts.expert(0));
        }),
        ("shared_gate given", |_, _, w| w.shared_gate = Some(f([1, 4]))),
        ("shared_gate shape", |s, _, w| {
            s.shared = Some(with!(SharedExpert::new(Ffn::gated(4, 6, Activation::Silu)), sigmoid_gate: true));
            w.shared = Some(w.experts.expert(0));
            w.shared_gate = Some(f([4, 1]));
        }),
    ];
    let spec = Moe::new(Router::new(3, 2), ExpertFfn::new(3, Ffn::gated(4, 6, Activation::Silu)));
    let experts = ExpertWeights::separate(Some(f([3, 6, 4])), f([3, 6, 4]), f([3, 4, 6]));
    for (name, edit) in edits {
        let (mut spec, mut input) = (spec.clone(), MoeInput::new(f([5, 4])));
        let mut weights = MoeWeights::new(f([3, 4]), experts);
        edit(&mut spec, &mut input, &mut weights);
        let (mut out, mut ids) = (Output::new([5, 4], Layout::Padded), Output::new([5, 2], Layout::Padded));
        let mut w = Output::new([5, 2], Layout::Padded);
        let mut output = MoeOutput::new(out.view());
        output.route = Some(RouteOutput::new(ids.view(), w.view()));
        found.add(&format!("moe, {name}"), reference::moe(&spec, &input, &weights, output));
        out.assert_untouched(name);
        ids.assert_untouched(name);
        w.assert_untouched(name);
    }
    let (mut out, mut ids, mut w) = ([7.0; 25], [77; 10], [7.0; 15]);
    let weights = MoeWeights::<f32>::new(f([3, 4]), experts);
    let output = MoeOutput::<f64, f64>::new(ViewMut::new(&mut out, [5, 5]));
    found.add("moe, out", reference::moe(&spec, &MoeInput::<f32>::new(f([5, 4])), &weights, output));
    let mut output = MoeOutput::<f64, f64>::new(ViewMut::new(&mut out, [5, 4]));
    output.route = Some(RouteOutput::new(ViewMut::new(&mut ids, [5, 2]), ViewMut::new(&mut w, [5, 3])));
    found.add("moe, route", reference::moe(&spec, &MoeInput::<f32>::new(f([5, 4])), &weights, output));
    assert!(out == [7.0; 25] && ids == [77; 10] && w == [7.0; 15]);
}
