//! What tests of whole mixtures share: any mixture, the textbook method, and how a routing is compared.

use super::buffer::Array;
use super::mixture_case::{MoeCase, MoeResult};
use super::moe_case::{ExpertCase, ExpertOptions, RouteCase, RouteResult};
use super::naive::Store;
use super::strategies;
use super::sums::{assert_sums, bits, naive_experts, naive_sum};
use super::tolerance::ulp;
use gatefold::args::Routing;
use gatefold::spec::{Moe, Router, SecondExpert, Selection, SharedExpert};
use gatefold::{Dtype, Element, reference};
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

type Call<'a, T, W, Q, O> = dyn Fn(&MoeCase<T, W, Q>, Option<Routing<'_, f32>>, bool) -> MoeResult<O, f32> + 'a;
type Logits<'a, T, W, Q> = dyn Fn(&MoeCase<T, W, Q>) -> Vec<f32> + 'a;

/// What a test of mixtures must know of a backend.
pub struct Backend<'a, T, W, Q, O> {
    /// For messages.
    pub who: String,
    /// How it keeps values between the projections.
    pub inner: Store,
    /// How it keeps the result of an expert.
    pub rows: Store,
    /// Whether the same call gives the same bits: a simulator may err at random.
    pub exact: bool,
    /// The call, with a routing that is given or asked for.
    pub moe: &'a Call<'a, T, W, Q, O>,
    /// The router's logits.
    pub logits: &'a Logits<'a, T, W, Q>,
}

/// Against the reference, then bit for bit: again, without asking for the routing, with the routing given, and some of the tokens
/// alone. The routing is computed inside, or (`given`) that of the case is used.
pub fn check_mixture<T: Element, W: Element, Q: Element, O: Element>(
    backend: &Backend<'_, T, W, Q, O>,
    case: &MoeCase<T, W, Q>,
    given: bool,
) {
    let (spec, weights, n) = (&case.spec, case.weights(), case.num_tokens());
    let width = spec.experts.ffn.hidden_size;
    let types = [T::DTYPE, W::DTYPE, Q::DTYPE, O::DTYPE];
    let what = format!("{} {types:?}, {spec:?}, {:?}, given: {given}", backend.who, case.experts.options);
    let (got, chosen) = if given {
        let got = (backend.moe)(case, Some(case.experts.routing()), false);
        (got, Chosen { ids: case.experts.ids.clone(), weights: case.experts.topk_weights.clone() })
    } else {
        let got = (backend.moe)(case, None, true);
        let route = got.route.as_ref().unwrap();
        // With jitter the logits differ in their last bits, and one of these may choose another expert.
        if spec.router.jitter.is_some() {
            let shape = [n, spec.router.num_experts];
            let mut routes = RouteCase::with_logits(&spec.router, shape[0], &(backend.logits)(case), case.seed);
            routes.selection_bias = case.selection_bias.clone();
            routes.token_mask = case.token_mask.clone();
            assert_route(&what, route, &routes.run(reference::route));
        } else {
            let truth =
                case.run::<f64, f64>(None, true, |spec, input, output| reference::moe(spec, input, &weights, output));
            assert_route(&what, route, truth.route.as_ref().unwrap());
        }
        let chosen = Chosen::of(case, route);
        (got, chosen)
    };
    let routing = Some(chosen.routing());
    let truth =
        case.run::<f64, f64>(routing, false, |spec, input, output| reference::moe(spec, input, &weights, output)).out;
    let naive = naive_mixture::<T, W, Q, O>(case, &chosen, backend.inner, backend.rows);
    // The outputs of a token share its inner values, so the luck of a few sums: more tokens where those are few.
    let inner = spec.shared.map_or(usize::MAX, |s| s.ffn.intermediate_size);
    let rows = 128usize.div_ceil(inner.min(spec.experts.ffn.intermediate_size));
    assert_sums(&what, &got.out, &truth, &naive, width * rows);
    if !backend.exact {
        return;
    }
    let replayed = (backend.moe)(case, routing, false);
    assert!(bits(&got.out) == bits(&replayed.out), "{what}: the same routing, given");
    if !given {
        let again = (backend.moe)(case, None, true);
        assert!(bits(&got.out) == bits(&again.out), "{what}: again");
        let [weights, weights_again] = [&got, &again].map(|result| bits(&result.route.as_ref().unwrap().weights));
        assert_eq!(weights, weights_again, "{what}: again");
        let unasked = (backend.moe)(case, None, false);
        assert!(bits(&got.out) == bits(&unasked.out), "{what}: the routing was not asked for");
    }
    if n > 0 {
        let first = case.seed as usize % n;
        let tokens = first..first + 1 + (case.seed >> 32) as usize % (n - first);
        let (slots, layout) = (chosen.ids.shape()[1], case.experts.options.layout);
        let (shape, of) = ([tokens.len(), slots], tokens.start * slots..tokens.end * slots);
        let (ids, weights) = (&chosen.ids.values()[of.clone()], &chosen.weights.values()[of]);
        let mut part = case.part(tokens.clone());
        part.experts.ids = Array::new(shape, layout, ids);
        part.experts.topk_weights = Array::new(shape, layout, weights);
        let want = bits(&got.out[tokens.start * width..tokens.end * width]);
        let alone = (backend.moe)(&part, Some(part.experts.routing()), false);
        assert!(bits(&alone.out) == want, "{what}: tokens {tokens:?} alone, their routing given");
        if !given && !coupled(&spec.router) {
            let alone = (backend.moe)(&part, None, true);
            assert!(bits(&alone.out) == want, "{what}: tokens {tokens:?} alone");
            assert_eq!(alone.route.unwrap().ids, ids, "{what}: tokens {tokens:?} alone");
        }
    }
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
