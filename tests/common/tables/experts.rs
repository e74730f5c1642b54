//! Options of the experts.

use super::Table;
use crate::common::{ExpertOptions, GateUp, Layout};
use gatefold::Dtype;
use gatefold::spec::{Activation, ExpertFfn, Ffn, WeightOn};

#[derive(Clone)]
pub struct Call {
    pub spec: ExpertFfn,
    pub options: ExpertOptions,
    /// Types of activations and weights.
    pub types: (Dtype, Dtype),
    /// The output is f32, not of the type of the activations.
    pub wide: bool,
}

pub fn base() -> Call {
    Call {
        spec: ExpertFfn::new(6, Ffn::gated(20, 18, Activation::Silu)),
        options: ExpertOptions { num_tokens: 7, slots: 2, gate_up: GateUp::Separate, layout: Layout::Contiguous },
        types: (Dtype::F32, Dtype::F32),
        wide: false,
    }
}

pub fn valid(call: &Call) -> bool {
    // One array for gate and up needs a gate.
    call.spec.validate().is_ok() && (call.spec.ffn.gated || call.options.gate_up == GateUp::Separate)
}

pub fn table() -> Table<Call> {
    Table::new(vec![
        ("gated", vec![("yes", |_| {}), ("no", |c| c.spec.ffn.gated = false)]),
        (
            "activation",
            vec![
                ("silu", |_| {}),
                ("gelu_erf", |c| c.spec.ffn.activation = Activation::GeluErf),
                ("gelu_tanh", |c| c.spec.ffn.activation = Activation::GeluTanh),
                ("relu", |c| c.spec.ffn.activation = Activation::Relu),
                ("relu2", |c| c.spec.ffn.activation = Activation::ReluSquared),
                ("clamped", |c| c.spec.ffn.activation = Activation::SwigluClamped { alpha: 1.702, limit: 0.8 }),
            ],
        ),
        ("up_bias", vec![("no", |_| {}), ("yes", |c| c.spec.ffn.up_bias = true)]),
        ("down_bias", vec![("no", |_| {}), ("yes", |c| c.spec.ffn.down_bias = true)]),
        (
            "gate_up",
            vec![
                ("separate", |_| {}),
                ("halves", |c| c.options.gate_up = GateUp::Halves),
                ("interleaved", |c| c.options.gate_up = GateUp::Interleaved),
            ],
        ),
        (
            "layout",
            vec![
                ("contiguous", |_| {}),
                ("padded", |c| c.options.layout = Layout::Padded),
                ("permuted", |c| c.options.layout = Layout::Permuted),
            ],
        ),
        ("weight_on", vec![("output", |_| {}), ("input", |c| c.spec.weight_on = WeightOn::Input)]),
        ("combine_scale", vec![("1", |_| {}), ("0.5", |c| c.spec.combine_scale = 0.5)]),
        (
            "slice",
            vec![
                ("all", |_| {}),
                ("2..5", |c| (c.spec.first_expert, c.spec.num_local_experts) = (2, 3)),
                ("none", |c| (c.spec.first_expert, c.spec.num_local_experts) = (6, 0)),
            ],
        ),
        ("slots", vec![("2", |_| {}), ("1", |c| c.options.slots = 1), ("6", |c| c.options.slots = 6)]),
        (
            "tokens",
            vec![
                ("7", |_| {}),
                ("0", |c| c.options.num_tokens = 0),
                ("1", |c| c.options.num_tokens = 1),
                ("40", |c| {
                    c.options.num_tokens = 40;
                }),
            ],
        ),
        (
            "activations",
            vec![("f32", |_| {}), ("bf16", |c| c.types.0 = Dtype::BF16), ("f16", |c| c.types.0 = Dtype::F16)],
        ),
        ("weights", vec![("f32", |_| {}), ("bf16", |c| c.types.1 = Dtype::BF16), ("f16", |c| c.types.1 = Dtype::F16)]),
        ("output", vec![("as activations", |_| {}), ("f32", |c| c.wide = true)]),
    ])
}
