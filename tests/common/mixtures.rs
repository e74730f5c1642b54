//! What tests of whole mixtures share: any mixture, the textbook method, and how a routing is compared.

use super::buffer::Array;
use super::mixture_case::MoeCase;
use super::moe_case::{ExpertCase, ExpertOptions, RouteResult};
use super::naive::Store;
use super::strategies;
use super::sums::{naive_experts, naive_sum};
use super::tolerance::ulp;
use gatefold::args::Routing;
use gatefold::spec::{Moe, Router, SecondExpert, Selection, SharedExpert};
use gatefold::{Dtype, Element};
use proptest::prelude::*;
use proptest::sample::select;

/// Ids and weights of a routing, to give to a call.
pub struct Chosen {
    pub ids: Array<i32, 2>,
    pub weights: Array<f32, 2>,
}

impl Chosen {
    pub fn of<T: Element, W: Element, Q: Element>(case: &MoeCase<T, W, Q>, route: &RouteResult<f32>) -> Chosen {
        let shape = [case.num_tokens(), case.spec.router.slots()];
        let layout = case.experts.options.layout;
        Chosen { ids: Array::new(shape, layout, &route.ids), weights: Array::new(shape, layout, &route.weights) }
    }

    pub fn routing(&self) -> Routing<'_, f32> {
        Routing::new(self.ids.view(), self.weights.view())
    }
}

/// The textbook method: experts one slot after the other, then the shared one times its gate. `inner` and `rows`: as for
/// [`naive_experts`].
pub fn naive_mixture<T: Element, W: Element, Q: Element, O: Element>(
    case: &MoeCase<T, W, Q>,
    chosen: &Chosen,
    inner: Store,
    rows: Store,
) -> Vec<O> {
    let experts = ExpertCase { ids: chosen.ids.clone(), topk_weights: chosen.weights.clone(), ..case.experts.clone() };
    let mut out = naive_experts::<T, W, f32>(&experts, inner, rows);
    if let Some(shared) = &case.shared {
        let (n, layout) = (case.num_tokens(), case.experts.options.layout);
        let factor = |t: usize| {
            case.shared_gate.as_ref().map_or(1.0, |gate| {
                let pairs = || case.experts.hidden.view().row(&[t]).iter().zip(gate.view().row(&[0]));
                let terms: Vec<f32> = pairs().map(|(x, w)| x.to_f32() * w.to_f32()).collect();
                let exact = pairs().map(|(x, w)| x.to_f64() * w.to_f64()).sum();
                1.0 / (1.0 + (-naive_sum(&terms, 0.0, exact, 64)).exp())
            })
        };
        let factors: Vec<f32> = (0..n).map(factor).collect();
        let mut shared = shared.clone();
        shared.ids = Array::new([n, 1], layout, &vec![0; n]);
        shared.topk_weights = Array::new([n, 1], layout, &factors);
        let shared = naive_experts::<T, W, f32>(&shared, inner, rows);
        out.iter_mut().zip(shared).for_each(|(out, shared)| *out += shared);
    }
    out.into_iter().map(O::from_f32).collect()
}

/// What is an integer is equal; weights and losses are the truth rounded once, give or take the last bit. Weights whose truth is
/// NaN or infinite may be anything.
#[track_caller]
pub fn assert_route(what: &str, got: &RouteResult<f32>, truth: &RouteResult<f64>) {
    assert_eq!(got.ids, truth.ids, "{what}");
    assert_eq!(got.tokens_per_expert, truth.tokens_per_expert, "{what}");
    assert_eq!(got.dropped, truth.dropped, "{what}");
    assert_eq!(got.expert_tokens, truth.expert_tokens, "{what}");
    let close = |got: f32, truth: f64| (f64::from(got) - truth).abs() <= 0.51 * ulp(Dtype::F32, truth);
    for (got, truth) in got.weights.iter().zip(&truth.weights) {
        assert!(!(*truth as f32).is_finite() || close(*got, *truth), "{what}: weight {got:e}, expected {truth:e}");
    }
    for (got, truth) in [(got.aux_loss, truth.aux_loss), (got.z_loss, truth.z_loss)] {
        assert!(close(got, truth) || (got.is_nan() && truth.is_nan()), "{what}: loss {got:e}, expected {truth:e}");
    }
}

/// Whether a token's experts depend on the other tokens, or on its place among them (random numbers do).
pub fn coupled(router: &Router) -> bool {
    router.capacity.is_some()
        || router.jitter.is_some()
        || router.second_expert == SecondExpert::Random
        || matches!(router.selection, Selection::ExpertChoice | Selection::Sinkhorn { .. })
}

/// Any mixture with few experts and sizes around these blocks. Sums are long enough to have an error that is not luck.
pub fn mixtures(
    row_block: usize,
    hidden_block: usize,
    inter_block: usize,
) -> impl Strategy<Value = (Moe, ExpertOptions, bool)> {
    let shared = (strategies::ffn(hidden_block, 2 * inter_block), any::<bool>());
    let router = strategies::router().prop_filter("few experts", |router| router.num_experts <= 16);
    let options = (any::<[bool; 3]>(), prop::option::weighted(0.2, select(vec![0.01, 0.3])));
    (router, strategies::experts(row_block, hidden_block, inter_block), prop::option::weighted(0.6, shared), options)
        .prop_map(|(mut router, (mut experts, mut options), shared, ([router_bias, selection_bias, mask], jitter))| {
            let n = router.num_experts;
            (experts.first_expert, experts.num_local_experts) = match (experts.first_expert, experts.num_local_experts)
            {
                (3, _) => (n / 3, n.div_ceil(2)),
                (5, _) => (n, 0),
                _ => (0, n),
            };
            experts.num_experts = n;
            experts.ffn.hidden_size = experts.ffn.hidden_size.max(15);
            experts.ffn.intermediate_size = experts.ffn.intermediate_size.max(15);
            options.slots = options.slots.min(n);
            router.jitter = jitter;
            let takes_bias = matches!(router.selection, Selection::TopK | Selection::Prototypes);
            let mut spec = Moe::new(router, experts);
            (spec.router_bias, spec.selection_bias) = (router_bias, selection_bias && takes_bias);
            spec.shared = shared.map(|(mut ffn, sigmoid_gate)| {
                ffn.hidden_size = experts.ffn.hidden_size;
                ffn.intermediate_size = ffn.intermediate_size.max(15);
                let mut shared = SharedExpert::new(ffn);
                shared.sigmoid_gate = sigmoid_gate;
                shared
            });
            spec.validate().expect("the strategy makes valid mixtures");
            (spec, options, mask)
        })
}
