//! proptest strategies: shapes around the blocking, options of attention, routers, blocks.

use super::attention_case::{Alibi, AttentionOptions, DenseBias, DenseMask, KvLayout, Sinks};
use super::buffer::Layout;
use super::moe_case::{ExpertOptions, GateUp};
use gatefold::spec::{
    Activation, AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertFfn, ExpertGroups, Ffn, GroupScore, Mask,
    Renormalize, Router, Score, SecondExpert, SelectOn, Selection, WeightOn,
};
use proptest::prelude::*;
use proptest::sample::select;

/// 0, 1, and around one and two blocks.
pub fn around(block: usize) -> impl Strategy<Value = usize> + Clone {
    select(vec![0, 1, block - 1, block, block + 1, 2 * block - 1, 2 * block + 1])
}

/// As [`around`], but at least 1.
pub fn around_from_one(block: usize) -> impl Strategy<Value = usize> + Clone {
    around(block).prop_map(|n| n.max(1))
}

pub fn layout() -> impl Strategy<Value = Layout> {
    select(Layout::ALL.to_vec())
}

pub fn mask() -> impl Strategy<Value = Mask> {
    let window = || proptest::option::weighted(0.3, select(vec![0usize, 1, 5, 16, 100]));
    (any::<bool>(), window(), window(), proptest::option::weighted(0.2, select(vec![1usize, 7, 16, 64]))).prop_map(
        |(causal, window_left, window_right, chunk)| {
            let mut mask = Mask::default();
            (mask.causal, mask.window_left, mask.window_right, mask.chunk) = (causal, window_left, window_right, chunk);
            mask
        },
    )
}

/// Any call of attention, with sequence lengths around `q_block` and `kv_block`.
pub fn attention(q_block: usize, kv_block: usize) -> impl Strategy<Value = AttentionOptions> {
    let lens = proptest::collection::vec((around(q_block), around(kv_block)), 1..4);
    let shape = (
        select(vec![(1, 1), (4, 4), (4, 2), (6, 1), (8, 2)]),
        select(vec![(8, 8), (16, 16), (64, 64), (80, 80), (24, 16), (33, 20), (128, 128)]),
        lens,
        layout(),
        select(vec![KvLayout::Ragged, KvLayout::Cache, KvLayout::Paged(16), KvLayout::Paged(5)]),
    );
    let scores = (
        proptest::option::weighted(0.3, select(vec![0.05, 0.7])),
        mask(),
        proptest::option::weighted(0.3, select(vec![2.0, 30.0])),
        select(vec![DenseBias::None, DenseBias::None, DenseBias::PerHead, DenseBias::PerKey]),
        select(vec![DenseMask::None, DenseMask::None, DenseMask::Full, DenseMask::PerKey]),
        select(vec![Alibi::None, Alibi::None, Alibi::Distance, Alibi::Positions]),
        proptest::option::weighted(0.3, any::<bool>()),
        select(vec![Sinks::None, Sinks::Finite, Sinks::WithMinusInf]),
        any::<bool>(),
        any::<bool>(),
    );
    (shape, scores).prop_map(|((heads, dims, lens, layout, kv), s)| AttentionOptions {
        heads,
        dims,
        scale: s.0,
        mask: s.1,
        softcap: s.2,
        bias: s.3,
        dense_mask: s.4,
        alibi: s.5,
        relative_bias: s.6,
        sinks: s.7,
        kv,
        lens,
        left_padding: s.8,
        starts: s.9,
        layout,
    })
}

/// Tokens, heads, outputs and inputs of a product: around the CPU's tiles (1 to 12 tokens), blocks (96), panels (32) and blocks of inputs.
pub fn linear() -> impl Strategy<Value = [usize; 4]> {
    let tokens = prop_oneof![0usize..14, 22usize..27, 94usize..99, Just(150), Just(193)];
    let outputs = prop_oneof![0usize..4, 15usize..18, 30usize..35, 63usize..67, Just(130)];
    let inputs = prop_oneof![0usize..4, 30usize..35, 255usize..260, Just(700)];
    (tokens, 1usize..4, outputs, inputs)
        .prop_map(|(tokens, heads, outputs, inputs)| [tokens, if tokens > 30 { 1 } else { heads }, outputs, inputs])
}

/// Any valid router; `num_experts` divides by 4 in half of the cases.
pub fn router() -> impl Strategy<Value = Router> {
    let kind = (
        select(vec![1usize, 2, 7, 8, 16, 60, 64, 128, 160]),
        1usize..9,
        select(vec![Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw]),
        select(vec![SelectOn::Scores, SelectOn::Logits]),
        select(vec![
            Selection::TopK,
            Selection::TopK,
            Selection::TopK,
            Selection::ExpertChoice,
            Selection::Sinkhorn { iterations: 3 },
            Selection::SparseMixer { jitter_eps: 0.1 },
            Selection::Prototypes,
        ]),
        proptest::option::weighted(0.5, select(vec![GroupScore::Max, GroupScore::Top2Sum])),
    );
    let weights = (
        select(vec![
            Renormalize::None,
            Renormalize::sum(),
            Renormalize::Sum { eps: 1e-20, floor: 0.0 },
            Renormalize::Sum { eps: 0.0, floor: 0.5 },
            Renormalize::L2,
            Renormalize::Softmax,
        ]),
        select(vec![1.0, 2.5]),
        proptest::option::weighted(0.4, select(vec![CapacityLimit::Tokens(2), CapacityLimit::Factor(1.25)])),
        (any::<bool>(), any::<bool>(), proptest::option::of(1usize..9), any::<bool>()),
        select(vec![None, Some(AuxLoss::TopK), Some(AuxLoss::Switch { group_len: Some(5) })]),
    );
    (kind, weights).prop_map(|((experts, top_k, score, select_on, selection, groups), w)| {
        let mut r = Router::new(experts, top_k.min(experts));
        (r.score, r.select_on, r.selection) = (score, select_on, selection);
        (r.renormalize, r.scaling_factor, r.aux_loss) = (w.0, w.1, w.4);
        let (by_score, after_drop, group_len, random_second) = w.3;
        r.capacity = w.2.map(|limit| {
            let mut c = Capacity::new(limit);
            c.order = if by_score { CapacityOrder::Score } else { CapacityOrder::Position };
            c.normalize_after_drop = after_drop;
            c.group_len = group_len;
            c
        });
        if let (Some(score), true, Selection::TopK) = (groups, experts.is_multiple_of(4) && experts > 4, r.selection) {
            r.groups = Some(ExpertGroups::new(4, 2, score));
            r.top_k = r.top_k.min(experts / 2);
        }
        match r.selection {
            Selection::ExpertChoice => {
                let limit = w.2.unwrap_or(CapacityLimit::Factor(1.0));
                r.capacity = Some(Capacity::new(limit));
                if r.renormalize == Renormalize::Softmax {
                    r.renormalize = Renormalize::None;
                }
            }
            Selection::SparseMixer { .. } if experts < 2 => r.selection = Selection::TopK,
            Selection::SparseMixer { .. } => r.top_k = 2,
            Selection::Prototypes => r.top_k = (1..=r.top_k).rev().find(|k| experts.is_multiple_of(*k)).unwrap_or(1),
            Selection::TopK if r.top_k == 2 && random_second => r.second_expert = SecondExpert::Random,
            _ => {}
        }
        r.validate().expect("the strategy makes valid routers");
        r
    })
}

/// Any block with sizes around the blocking.
pub fn ffn(hidden_block: usize, inter_block: usize) -> impl Strategy<Value = Ffn> {
    let activation = select(vec![
        Activation::Silu,
        Activation::GeluErf,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::ReluSquared,
        Activation::SwigluClamped { alpha: 1.702, limit: 1.0 },
    ]);
    (around_from_one(hidden_block), around_from_one(inter_block), activation, any::<[bool; 3]>()).prop_map(
        |(hidden, inter, activation, [gated, up_bias, down_bias])| {
            let clamped = matches!(activation, Activation::SwigluClamped { .. });
            let mut ffn = if gated || clamped {
                Ffn::gated(hidden, inter, activation)
            } else {
                Ffn::plain(hidden, inter, activation)
            };
            (ffn.up_bias, ffn.down_bias) = (up_bias, down_bias);
            ffn
        },
    )
}

/// Any call of the experts, with the number of tokens around `row_block`; sometimes a slice of the experts.
pub fn experts(
    row_block: usize,
    hidden_block: usize,
    inter_block: usize,
) -> impl Strategy<Value = (ExpertFfn, ExpertOptions)> {
    let options = (
        around(row_block),
        1usize..5,
        select(vec![GateUp::Separate, GateUp::Halves, GateUp::Interleaved]),
        layout(),
        select(vec![(1, 0, 1), (4, 0, 4), (8, 0, 8), (8, 3, 4), (8, 5, 0)]),
        select(vec![WeightOn::Output, WeightOn::Input]),
        select(vec![1.0, 0.5]),
    );
    (ffn(hidden_block, inter_block), options).prop_map(
        |(ffn, (num_tokens, slots, gate_up, layout, slice, on, scale))| {
            let mut spec = ExpertFfn::new(slice.0, ffn);
            (spec.first_expert, spec.num_local_experts) = (slice.1, slice.2);
            (spec.weight_on, spec.combine_scale) = (on, scale);
            (spec, ExpertOptions { num_tokens, slots: slots.min(slice.0), gate_up, layout })
        },
    )
}
