//! Options of a router.

use super::Table;
use gatefold::spec::{
    AuxLoss, Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Renormalize, Router, Score,
    SecondExpert, SelectOn, Selection,
};

/// A router of 8 experts and what the call gives it.
#[derive(Clone)]
pub struct Call {
    pub spec: Router,
    pub order: CapacityOrder,
    pub group_len: Option<usize>,
    pub after_drop: bool,
    pub bias: bool,
    pub token_mask: bool,
    pub loss_mask: bool,
}

const EXPERTS: usize = 8;

pub fn base() -> Call {
    Call {
        spec: Router::new(EXPERTS, 2),
        order: CapacityOrder::Position,
        group_len: None,
        after_drop: false,
        bias: false,
        token_mask: false,
        loss_mask: false,
    }
}

/// The capacity's own options are values of their own, put together here.
pub fn finish(mut call: Call) -> Call {
    if let Some(capacity) = &mut call.spec.capacity {
        capacity.order = call.order;
        capacity.group_len = call.group_len;
        capacity.normalize_after_drop = call.after_drop;
    }
    call
}

/// Whether the call is legal, and none of its options is without effect for want of a capacity.
pub fn valid(call: &Call) -> bool {
    let call = finish(call.clone());
    let selection = call.spec.selection;
    let needs_capacity = call.order != CapacityOrder::Position || call.group_len.is_some() || call.after_drop;
    call.spec.validate().is_ok()
        && (!needs_capacity || call.spec.capacity.is_some())
        && (!call.bias || matches!(selection, Selection::TopK | Selection::Prototypes))
}

pub fn table() -> Table<Call> {
    Table::new(vec![
        ("top_k", vec![("2", |_| {}), ("1", |c| c.spec.top_k = 1), ("4", |c| c.spec.top_k = 4)]),
        (
            "score",
            vec![
                ("softmax", |_| {}),
                ("sigmoid", |c| c.spec.score = Score::Sigmoid),
                ("sqrt-softplus", |c| c.spec.score = Score::SqrtSoftplus),
                ("raw", |c| c.spec.score = Score::Raw),
            ],
        ),
        ("select_on", vec![("scores", |_| {}), ("logits", |c| c.spec.select_on = SelectOn::Logits)]),
        (
            "groups",
            vec![
                ("no", |_| {}),
                ("max", |c| c.spec.groups = Some(ExpertGroups::new(4, 2, GroupScore::Max))),
                ("top2", |c| c.spec.groups = Some(ExpertGroups::new(4, 2, GroupScore::Top2Sum))),
            ],
        ),
        (
            "selection",
            vec![
                ("top-k", |_| {}),
                ("expert choice", |c| c.spec.selection = Selection::ExpertChoice),
                ("sinkhorn", |c| c.spec.selection = Selection::Sinkhorn { iterations: 4 }),
                ("sparse mixer", |c| c.spec.selection = Selection::SparseMixer { jitter_eps: 0.2 }),
                ("prototypes", |c| c.spec.selection = Selection::Prototypes),
            ],
        ),
        (
            "renormalize",
            vec![
                ("no", |_| {}),
                ("sum", |c| c.spec.renormalize = Renormalize::Sum { eps: 1e-6, floor: 0.0 }),
                ("floor", |c| c.spec.renormalize = Renormalize::Sum { eps: 0.0, floor: 0.7 }),
                ("l2", |c| c.spec.renormalize = Renormalize::L2),
                ("softmax", |c| c.spec.renormalize = Renormalize::Softmax),
            ],
        ),
        ("scaling", vec![("1", |_| {}), ("2.5", |c| c.spec.scaling_factor = 2.5)]),
        (
            "capacity",
            vec![
                ("no", |_| {}),
                ("3", |c| c.spec.capacity = Some(Capacity::new(CapacityLimit::Tokens(3)))),
                ("factor", |c| c.spec.capacity = Some(Capacity::new(CapacityLimit::Factor(0.6)))),
            ],
        ),
        ("order", vec![("position", |_| {}), ("score", |c| c.order = CapacityOrder::Score)]),
        ("group_len", vec![("all", |_| {}), ("9", |c| c.group_len = Some(9))]),
        ("after_drop", vec![("no", |_| {}), ("yes", |c| c.after_drop = true)]),
        ("second", vec![("always", |_| {}), ("random", |c| c.spec.second_expert = SecondExpert::Random)]),
        ("bias", vec![("no", |_| {}), ("yes", |c| c.bias = true)]),
        ("token_mask", vec![("no", |_| {}), ("yes", |c| c.token_mask = true)]),
        ("loss_mask", vec![("no", |_| {}), ("yes", |c| c.loss_mask = true)]),
        (
            "aux_loss",
            vec![
                ("no", |_| {}),
                ("top-k", |c| c.spec.aux_loss = Some(AuxLoss::TopK)),
                ("switch", |c| c.spec.aux_loss = Some(AuxLoss::Switch { group_len: None })),
                ("switch by 7", |c| c.spec.aux_loss = Some(AuxLoss::Switch { group_len: Some(7) })),
            ],
        ),
    ])
}
