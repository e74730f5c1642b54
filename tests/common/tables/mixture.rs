//! Options of a whole mixture: those of its router and of its experts, and its own. How arrays lie and of what types they are is for a
//! backend to add.

use super::{Table, experts, route};
use crate::common::ExpertOptions;
use gatefold::Dtype;
use gatefold::spec::{Activation, ExpertFfn, Ffn, Moe, SharedExpert};

#[derive(Clone)]
pub struct Call {
    pub route: route::Call,
    pub experts: experts::Call,
    pub router_bias: bool,
    /// Type of the router's weights.
    pub router: Dtype,
    pub shared: Option<SharedExpert>,
    /// The routing is an input, with so many slots.
    pub given: Option<usize>,
}

/// 8 experts of `hidden` x `inter`, two for each of 7 tokens.
pub fn base(hidden: usize, inter: usize) -> Call {
    let route = route::base();
    let mut experts = experts::base();
    experts.spec = ExpertFfn::new(route.spec.num_experts, Ffn::gated(hidden, inter, Activation::Silu));
    Call { route, experts, router_bias: false, router: Dtype::F32, shared: None, given: None }
}

/// What is called.
pub fn finish(call: &Call) -> (Moe, ExpertOptions) {
    let mut spec = Moe::new(route::finish(call.route.clone()).spec, call.experts.spec);
    (spec.router_bias, spec.selection_bias) = (call.router_bias, call.route.bias);
    spec.shared = call.shared;
    if let Some(shared) = &mut spec.shared {
        shared.ffn.hidden_size = spec.experts.ffn.hidden_size;
    }
    (spec, ExpertOptions { slots: call.given.unwrap_or(2), ..call.experts.options })
}

pub fn valid(call: &Call) -> bool {
    route::valid(&call.route) && experts::valid(&call.experts) && finish(call).0.validate().is_ok()
}

/// The shared expert, of another width than the routed ones.
fn shared(ffn: Ffn, sigmoid_gate: bool) -> Option<SharedExpert> {
    let mut shared = SharedExpert::new(ffn);
    shared.sigmoid_gate = sigmoid_gate;
    Some(shared)
}

pub fn table() -> Table<Call> {
    let own: Table<Call> = Table::new(vec![
        ("routing", vec![("asked", |_| {}), ("2 given", |c| c.given = Some(2)), ("6 given", |c| c.given = Some(6))]),
        ("router_bias", vec![("no", |_| {}), ("yes", |c| c.router_bias = true)]),
        ("jitter", vec![("no", |_| {}), ("0.3", |c| c.route.spec.jitter = Some(0.3))]),
        (
            "shared",
            vec![
                ("no", |_| {}),
                ("gated", |c| c.shared = shared(Ffn::gated(1, 32, Activation::GeluErf), false)),
                ("behind a gate", |c| c.shared = shared(Ffn::gated(1, 16, Activation::Silu), true)),
                ("plain", |c| c.shared = shared(Ffn::plain(1, 40, Activation::ReluSquared), false)),
                ("biased, behind a gate", |c| {
                    let mut ffn = Ffn::gated(1, 24, Activation::SwigluClamped { alpha: 1.702, limit: 7.0 });
                    (ffn.up_bias, ffn.down_bias) = (true, true);
                    c.shared = shared(ffn, true);
                }),
            ],
        ),
    ]);
    let not_here = ["layout", "slots", "activations", "weights", "output"];
    route::table()
        .without(&["loss_mask"])
        .of(|call: &mut Call| &mut call.route)
        .and(experts::table().without(&not_here).of(|call: &mut Call| &mut call.experts))
        .and(own)
}
