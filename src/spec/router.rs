//! Which experts a token goes to, and with what weight.

use super::{finite, non_negative_number, positive, positive_number};
use crate::error::{Error, Result};

/// From a logit to a score: f64 arithmetic in exactly the order written here, on every CPU backend, so that scores (and the
/// experts that they choose) are the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Score {
    /// `exp(l) / sum_e exp(l_e)` over all experts (with [`Selection::Prototypes`]: over the experts of the group).
    ///
    /// With `m` the largest logit (NaN does not count) and `x_e = exp(l_e - m)`, 1 where `l_e = m`: `x / sum_e x_e`, the sum over
    /// ascending `e`. Where the largest logit is infinite, the experts that have it share the weight.
    #[default]
    Softmax,
    /// `1 / (1 + exp(-l))`.
    Sigmoid,
    /// `sqrt(ln(1 + exp(l)))`, computed as `sqrt(max(l, 0) + ln_1p(exp(-|l|)))`.
    SqrtSoftplus,
    /// The logit itself.
    Raw,
}

/// What top-k compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum SelectOn {
    /// The scores: score, then top-k.
    #[default]
    Scores,
    /// The logits: top-k, then score. Softmax over only the selected logits is [`Score::Raw`] with [`Renormalize::Softmax`].
    Logits,
}

/// How the experts of a token are found from the selection values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Selection {
    /// The `top_k` largest.
    #[default]
    TopK,
    /// Each expert takes its best tokens, as many as [`Router::capacity`] says (Zhou et al. 2022, arXiv:2202.09368).
    /// Equal values go to the lower token. A token may end with none or with all experts.
    ExpertChoice,
    /// The `top_k` largest of the logits balanced by Sinkhorn's iteration (Clark et al. 2022, arXiv:2202.01169; as in
    /// Megatron-LM): with `c[t, e] = exp(l[t, e] - max_e l[t, e])`, and `col = 1` at the start, each iteration sets
    /// `row[t] = 1 / (T * (sum_e col[e] c[t, e] + 1e-8))`, then `col[e] = 1 / (E * (sum_t row[t] c[t, e] + 1e-8))`; top-k
    /// compares `row[t] * c[t, e] * col[e]` in f32. All sums ascend, `T` counts the unmasked tokens, which alone take part; `c = 1` where
    /// the logit is the largest. Weights are the scores, not the balanced values.
    Sinkhorn {
        /// Iterations; at least 1.
        iterations: usize,
    },
    /// Phi-3.5-MoE's two experts (Liu et al. 2023, arXiv:2310.00811, at inference): the first is `e1 = argmax l`, its weight
    /// the softmax at `e1` over the experts but those with `(l[e1] - l) / max(|l|, l[e1]) > 2 jitter_eps`; the second is the same
    /// among the others with `l[e2]` for `l[e1]` (`e1` left out of the softmax). `top_k` is 2; score, renormalisation and scaling do
    /// not apply. The best are found on f32 logits, the rest is f64; 0 / 0 in the test leaves an expert in.
    SparseMixer {
        /// Width of the band of logits that count as near the best.
        jitter_eps: f64,
    },
    /// M6-T (Yang et al. 2021, arXiv:2105.15082): the experts lie in `top_k` consecutive groups of equal size, each group
    /// gives its best. Slot `s` is the choice of group `s`.
    Prototypes,
}

/// How the weights of a token's selected experts are brought to scale.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Renormalize {
    /// The scores as they are.
    #[default]
    None,
    /// `w / max(sum(w) + eps, floor)`.
    Sum {
        /// Added to the sum.
        eps: f64,
        /// Least divisor.
        floor: f64,
    },
    /// `w / sqrt(sum(w^2))`.
    L2,
    /// Softmax over the selected.
    Softmax,
}

impl Renormalize {
    /// `w / sum(w)`.
    pub const fn sum() -> Self {
        Renormalize::Sum { eps: 0.0, floor: 0.0 }
    }
}

/// Value of a group of experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum GroupScore {
    /// Its largest selection value.
    #[default]
    Max,
    /// The sum of its two largest, in f32.
    Top2Sum,
}

/// Experts lie in consecutive groups of equal size; only the best groups can be selected from. Equal groups: the lower one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct ExpertGroups {
    /// Groups; divides the number of experts.
    pub num_groups: usize,
    /// Groups that are kept.
    pub top_groups: usize,
    /// Value of a group.
    pub score: GroupScore,
}

impl ExpertGroups {
    /// All three fields.
    pub const fn new(num_groups: usize, top_groups: usize, score: GroupScore) -> Self {
        ExpertGroups { num_groups, top_groups, score }
    }
}

/// How many tokens an expert serves at most, per group of tokens. Masked tokens count as tokens of their group here, so that
/// the limit does not depend on the data; a last group that is shorter has fewer tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum CapacityLimit {
    /// That many.
    Tokens(usize),
    /// `ceil(factor * tokens_in_group * slots / num_experts)`, at least 1; `slots` is `top_k`. For expert choice, too.
    Factor(f64),
}

/// In which order tokens queue for an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum CapacityOrder {
    /// By position.
    #[default]
    Position,
    /// The largest softmax probability of a token first (the f32 value), equal ones by position.
    Score,
}

/// Each expert serves at most so many tokens (GShard, arXiv:2006.16668; Switch, arXiv:2101.03961).
///
/// First every token's slot 0 queues (its best expert), then every token's slot 1 behind all requests of slot 0 for that
/// expert, those already dropped included, and so on. A request beyond the limit is dropped: id -1, weight 0. Masked
/// tokens do not queue.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Capacity {
    /// Tokens per expert and group of tokens.
    pub limit: CapacityLimit,
    /// Order of the queue.
    pub order: CapacityOrder,
    /// Consecutive tokens that form a group (a row of the batch); `None`: all tokens of the call.
    pub group_len: Option<usize>,
    /// Whether dropped slots (for capacity, or a second expert that is not used) count as 0 in [`Router::renormalize`], of softmax: as
    /// -inf; otherwise as if nothing were dropped.
    pub normalize_after_drop: bool,
}

impl Capacity {
    /// By position, all tokens of the call one group.
    pub const fn new(limit: CapacityLimit) -> Self {
        Capacity { limit, order: CapacityOrder::Position, group_len: None, normalize_after_drop: false }
    }

    /// The limit for a group of so many tokens.
    pub fn tokens(&self, group_tokens: usize, slots: usize, num_experts: usize) -> usize {
        match self.limit {
            CapacityLimit::Tokens(n) => n,
            CapacityLimit::Factor(factor) => {
                let exact = factor * group_tokens as f64 * slots as f64 / num_experts as f64;
                (exact.ceil() as usize).max(1)
            }
        }
    }
}

/// Whether a token's second expert is used (GShard).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum SecondExpert {
    /// Always.
    #[default]
    Always,
    /// With probability `min(1, 2 w)`, `w` its weight after renormalisation and before scaling: kept if
    /// `u < 2 w` (in f32), where `u` is draw 0 of the token ([`crate::random::uniform`]). A second expert that is not used
    /// does not queue.
    Random,
}

/// Auxiliary load-balancing loss. `p` is the softmax of the logits over all experts, whatever the score; the largest `p` are found on
/// the f32 logits, ties to the lower expert. Masked tokens do not count; no token that counts: 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum AuxLoss {
    /// `E * sum_e f_e P_e`: `f_e` how often `e` is among the `top_k` largest `p` of a token, per token; `P_e` the mean of `p`.
    TopK,
    /// `E^2 * mean over (group, e) of f_e P_e`: `f_e` the fraction of the group's tokens whose largest `p` is `e`, before any
    /// dropping; `P_e` the mean of `p` over the group. Groups are `group_len` consecutive tokens (`None`: all); a group without a
    /// token that counts is left out of the mean.
    Switch {
        /// Tokens per group.
        group_len: Option<usize>,
    },
}

/// From router logits to the experts of each token and their weights.
///
/// Per token, with logits `l`:
/// 1. `score = score_fn(l)`; the selection value is `score` or `l` ([`Router::select_on`]), plus the selection bias of the
///    call, which chooses but does not weigh
/// 2. experts outside the best groups ([`Router::groups`]) are out
/// 3. `topk_ids`: the largest selection values, best first; equal values go to the lower expert, NaN ranks below every number
/// 4. `w = score[topk_ids]`, [`Router::renormalize`], times [`Router::scaling_factor`]
/// 5. [`Router::second_expert`] and [`Router::capacity`] may drop a slot: id -1, weight 0
///
/// Selection compares f32 values: the logits where the score rises with the logit and neither bias nor a group sum
/// enters ([`Router::selects_on_logits`]), else the f32 score (computed in f64 as [`Score`] says, rounded once) plus the bias in f32. A
/// group's sum is an f32 sum too; a NaN makes it NaN.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Router {
    /// Experts.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// From logit to score.
    pub score: Score,
    /// What top-k compares.
    pub select_on: SelectOn,
    /// Experts in groups, of which only the best count.
    pub groups: Option<ExpertGroups>,
    /// How the experts are found.
    pub selection: Selection,
    /// Scale of the weights.
    pub renormalize: Renormalize,
    /// Factor on the weights, after renormalisation.
    pub scaling_factor: f64,
    /// Limit per expert; for [`Selection::ExpertChoice`] the tokens that an expert takes.
    pub capacity: Option<Capacity>,
    /// Whether the second expert is used; needs `top_k` 2 if it is not always.
    pub second_expert: SecondExpert,
    /// Training: the router's input is multiplied by `1 + jitter * (2 u - 1)`, `u` draw `d` of the token for column `d`
    /// ([`crate::random::uniform`]).
    pub jitter: Option<f64>,
    /// Which auxiliary loss, where the call asks for one.
    pub aux_loss: Option<AuxLoss>,
}

impl Default for Router {
    fn default() -> Self {
        Router::new(1, 1)
    }
}

impl Router {
    /// Softmax over all experts, then top-k, not renormalised.
    pub fn new(num_experts: usize, top_k: usize) -> Self {
        Router {
            num_experts,
            top_k,
            score: Score::Softmax,
            select_on: SelectOn::Scores,
            groups: None,
            selection: Selection::TopK,
            renormalize: Renormalize::None,
            scaling_factor: 1.0,
            capacity: None,
            second_expert: SecondExpert::Always,
            jitter: None,
            aux_loss: None,
        }
    }

    /// Columns of `topk_ids` and `topk_weights`: `top_k`, for expert choice `num_experts`.
    pub fn slots(&self) -> usize {
        if self.selection == Selection::ExpertChoice { self.num_experts } else { self.top_k }
    }

    /// Tokens that an expert takes under [`Selection::ExpertChoice`], out of `num_tokens`: the capacity, at most `num_tokens`.
    pub fn expert_choice_tokens(&self, num_tokens: usize) -> usize {
        let limit = self.capacity.map_or(0, |c| c.tokens(num_tokens, self.top_k, self.num_experts));
        limit.min(num_tokens)
    }

    /// Whether selection compares logits: where that is asked for, or in place of scores where the order is the same, because the score never
    /// falls as the logit rises, and neither a bias nor a sum enters. Expert choice compares tokens, and a softmax over experts
    /// does not keep their order.
    pub fn selects_on_logits(&self, has_selection_bias: bool) -> bool {
        let sums = self.groups.is_some_and(|g| g.score == GroupScore::Top2Sum);
        let across_tokens = self.selection == Selection::ExpertChoice && self.score == Score::Softmax;
        self.select_on == SelectOn::Logits
            || self.score == Score::Raw
            || (!has_selection_bias && !sums && !across_tokens)
    }

    /// # Errors
    /// [`Error::Value`] for a size of 0, `top_k` above the selectable experts, groups that do not divide, numbers outside
    /// their range, options that exclude one another.
    pub fn validate(&self) -> Result<()> {
        positive("num_experts", self.num_experts)?;
        if self.num_experts > i32::MAX as usize {
            return Err(Error::value("num_experts", "at most 2^31 - 1", self.num_experts));
        }
        positive("top_k", self.top_k)?;
        let mut selectable = self.num_experts;
        if let Some(g) = &self.groups {
            positive("num_groups", g.num_groups)?;
            if !self.num_experts.is_multiple_of(g.num_groups) {
                let expected = format!("a divisor of num_experts ({})", self.num_experts);
                return Err(Error::value("num_groups", expected, g.num_groups));
            }
            if g.top_groups == 0 || g.top_groups > g.num_groups {
                let expected = format!("1 to num_groups ({})", g.num_groups);
                return Err(Error::value("top_groups", expected, g.top_groups));
            }
            let group_size = self.num_experts / g.num_groups;
            if g.score == GroupScore::Top2Sum && group_size < 2 {
                return Err(Error::value("num_groups", "groups of at least 2 experts for a sum of two", g.num_groups));
            }
            if self.selection != Selection::TopK {
                return Err(Error::value("groups", "none unless selection is TopK", format!("{:?}", self.selection)));
            }
            selectable = g.top_groups * group_size;
        }
        if self.top_k > selectable {
            return Err(Error::value("top_k", format!("at most the selectable experts ({selectable})"), self.top_k));
        }
        match self.selection {
            Selection::TopK => {}
            Selection::ExpertChoice => {
                let Some(capacity) = &self.capacity else {
                    return Err(Error::missing("capacity", "an expert that chooses needs a number of tokens"));
                };
                if capacity.group_len.is_some() {
                    return Err(Error::value("capacity.group_len", "none for expert choice", "a number"));
                }
                if self.renormalize == Renormalize::Softmax {
                    return Err(Error::value("renormalize", "None, Sum or L2 for expert choice", "Softmax"));
                }
            }
            Selection::Sinkhorn { iterations } => positive("sinkhorn.iterations", iterations)?,
            Selection::SparseMixer { jitter_eps } => {
                non_negative_number("sparsemixer.jitter_eps", jitter_eps)?;
                if self.top_k != 2 {
                    return Err(Error::value("top_k", "2 for the sparse mixer", self.top_k));
                }
            }
            Selection::Prototypes => {
                if !self.num_experts.is_multiple_of(self.top_k) {
                    let expected = format!("a divisor of num_experts ({}) for prototypes", self.num_experts);
                    return Err(Error::value("top_k", expected, self.top_k));
                }
            }
        }
        if let Renormalize::Sum { eps, floor } = self.renormalize {
            non_negative_number("renormalize.eps", eps)?;
            non_negative_number("renormalize.floor", floor)?;
        }
        finite("scaling_factor", self.scaling_factor)?;
        if let Some(capacity) = &self.capacity {
            match capacity.limit {
                CapacityLimit::Tokens(n) => positive("capacity.limit", n)?,
                CapacityLimit::Factor(factor) => positive_number("capacity.limit", factor)?,
            }
            if let Some(len) = capacity.group_len {
                positive("capacity.group_len", len)?;
            }
        }
        if self.second_expert == SecondExpert::Random && (self.top_k != 2 || self.selection != Selection::TopK) {
            return Err(Error::value("second_expert", "Always unless top_k is 2 and selection TopK", "Random"));
        }
        if let Some(jitter) = self.jitter
            && !(0.0..1.0).contains(&jitter)
        {
            return Err(Error::value("jitter", "at least 0 and below 1", jitter));
        }
        if let Some(AuxLoss::Switch { group_len: Some(len) }) = self.aux_loss {
            positive("aux_loss.group_len", len)?;
        }
        Ok(())
    }
}
