//! Arguments of routing, experts and the whole mixture.

use crate::error::{Error, Result, check_len, check_presence, why};
use crate::spec::{ExpertFfn, Ffn, Moe, Router, Selection};
use crate::view::{View, ViewMut};

/// Logits and what goes with them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RouteInput<'a, S = f32> {
    /// `[num_tokens, num_experts]`
    pub logits: View<'a, S, 2>,
    /// `[num_experts]`: chooses but does not weigh.
    pub selection_bias: Option<&'a [S]>,
    /// `[num_tokens]`: 0 marks padding: ids -1, weights 0, no part in queues and losses.
    pub token_mask: Option<&'a [u8]>,
    /// `[num_tokens]`: 0 leaves the token out of the losses, but not out of routing.
    pub loss_mask: Option<&'a [u8]>,
    /// Key of the random numbers.
    pub seed: u64,
}

/// What routing writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct RouteOutput<'a, R = f32> {
    /// `[num_tokens, slots]` (see [`Router::slots`]): expert of each slot, best first; -1 for a dropped slot, a masked token,
    /// an unused slot of expert choice (there experts ascend).
    pub topk_ids: ViewMut<'a, i32, 2>,
    /// `[num_tokens, slots]`: weight of each slot, 0 where the id is -1.
    pub topk_weights: ViewMut<'a, R, 2>,
    /// `[num_experts]`: how often each expert stands in `topk_ids`.
    pub tokens_per_expert: Option<&'a mut [u32]>,
    /// Slots dropped for capacity or because a second expert was not used.
    pub dropped: Option<&'a mut u64>,
    /// Expert choice only, `[num_experts, expert_choice_tokens]`: the tokens of each expert, best first.
    pub expert_tokens: Option<ViewMut<'a, i32, 2>>,
    /// The auxiliary loss of [`Router::aux_loss`].
    pub aux_loss: Option<&'a mut R>,
    /// `mean over tokens of lse(logits)^2` (ST-MoE, arXiv:2202.08906).
    pub z_loss: Option<&'a mut R>,
}

/// Experts and weights of each token: from [`RouteOutput`], or from anywhere else (hash routing, replayed routing).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Routing<'a, S = f32> {
    /// `[num_tokens, slots]`; ids that are not local, and -1, are skipped.
    pub topk_ids: View<'a, i32, 2>,
    /// `[num_tokens, slots]`
    pub topk_weights: View<'a, S, 2>,
}

impl<'a, S> RouteInput<'a, S> {
    /// Nothing but logits.
    pub const fn new(logits: View<'a, S, 2>) -> Self {
        RouteInput { logits, selection_bias: None, token_mask: None, loss_mask: None, seed: 0 }
    }

    /// Validates the specification and every argument; gives the number of tokens.
    ///
    /// # Errors
    /// Those of [`Router::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`] for an array that does not fit;
    /// [`Error::Presence`] for an output that the specification does not have.
    pub fn check<R>(&self, spec: &Router, output: &RouteOutput<'_, R>) -> Result<usize> {
        spec.validate()?;
        let [num_tokens, _] = self.logits.shape();
        self.logits.check("logits", [num_tokens, spec.num_experts])?;
        if let Some(bias) = self.selection_bias {
            check_len("selection_bias", bias.len(), spec.num_experts)?;
            if !matches!(spec.selection, Selection::TopK | Selection::Prototypes) {
                return Err(Error::unexpected("selection_bias", "this selection has none"));
            }
        }
        for (name, mask) in [("token_mask", self.token_mask), ("loss_mask", self.loss_mask)] {
            if let Some(mask) = mask {
                check_len(name, mask.len(), num_tokens)?;
            }
        }
        output.check(spec, num_tokens)?;
        Ok(num_tokens)
    }
}

impl<'a, R> RouteOutput<'a, R> {
    /// Ids and weights only.
    pub const fn new(topk_ids: ViewMut<'a, i32, 2>, topk_weights: ViewMut<'a, R, 2>) -> Self {
        RouteOutput {
            topk_ids,
            topk_weights,
            tokens_per_expert: None,
            dropped: None,
            expert_tokens: None,
            aux_loss: None,
            z_loss: None,
        }
    }

    /// Checks every output against the specification.
    ///
    /// # Errors
    /// As [`RouteInput::check`].
    pub fn check(&self, spec: &Router, num_tokens: usize) -> Result<()> {
        if num_tokens > i32::MAX as usize {
            return Err(Error::value("num_tokens", "at most 2^31 - 1", num_tokens));
        }
        self.topk_ids.check("topk_ids", [num_tokens, spec.slots()])?;
        self.topk_weights.check("topk_weights", [num_tokens, spec.slots()])?;
        if let Some(counts) = &self.tokens_per_expert {
            check_len("tokens_per_expert", counts.len(), spec.num_experts)?;
        }
        if let Some(tokens) = &self.expert_tokens {
            if spec.selection != Selection::ExpertChoice {
                return Err(Error::unexpected("expert_tokens", "only expert choice gives them"));
            }
            tokens.check("expert_tokens", [spec.num_experts, spec.expert_choice_tokens(num_tokens)])?;
        }
        if self.aux_loss.is_some() && spec.aux_loss.is_none() {
            return Err(Error::unexpected("aux_loss", "the specification names no auxiliary loss"));
        }
        Ok(())
    }

    /// The routing that was written, for the experts.
    pub fn routing(&self) -> Routing<'_, R> {
        Routing { topk_ids: self.topk_ids.as_view(), topk_weights: self.topk_weights.as_view() }
    }
}

impl<'a, S> Routing<'a, S> {
    /// Both arrays.
    pub const fn new(topk_ids: View<'a, i32, 2>, topk_weights: View<'a, S, 2>) -> Self {
        Routing { topk_ids, topk_weights }
    }

    /// Checks the shapes for so many tokens.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`].
    pub fn check(&self, num_tokens: usize) -> Result<()> {
        let [_, slots] = self.topk_ids.shape();
        self.topk_ids.check("topk_ids", [num_tokens, slots])?;
        self.topk_weights.check("topk_weights", [num_tokens, slots])
    }
}

/// Weights of one feed-forward block; the views may be any rows of larger arrays.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct FfnWeights<'a, W, S = f32> {
    /// `[intermediate_size, hidden_size]`; gated blocks only.
    pub gate: Option<View<'a, W, 2>>,
    /// `[intermediate_size, hidden_size]`
    pub up: View<'a, W, 2>,
    /// `[hidden_size, intermediate_size]`
    pub down: View<'a, W, 2>,
    /// `[intermediate_size]`
    pub gate_bias: Option<&'a [S]>,
    /// `[intermediate_size]`
    pub up_bias: Option<&'a [S]>,
    /// `[hidden_size]`
    pub down_bias: Option<&'a [S]>,
}

/// Weights of all local experts: `[num_local_experts, out, in]`, `in` contiguous, other strides free. Gate and up may be
/// separate arrays, halves of one, or its alternating rows.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ExpertWeights<'a, W, S = f32> {
    /// `[num_local_experts, intermediate_size, hidden_size]`; gated blocks only.
    pub gate: Option<View<'a, W, 3>>,
    /// `[num_local_experts, intermediate_size, hidden_size]`
    pub up: View<'a, W, 3>,
    /// `[num_local_experts, hidden_size, intermediate_size]`
    pub down: View<'a, W, 3>,
    /// `[num_local_experts, intermediate_size]`
    pub gate_bias: Option<View<'a, S, 2>>,
    /// `[num_local_experts, intermediate_size]`
    pub up_bias: Option<View<'a, S, 2>>,
    /// `[num_local_experts, hidden_size]`
    pub down_bias: Option<View<'a, S, 2>>,
}

impl<'a, W, S> FfnWeights<'a, W, S> {
    /// Without biases.
    pub const fn new(gate: Option<View<'a, W, 2>>, up: View<'a, W, 2>, down: View<'a, W, 2>) -> Self {
        FfnWeights { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }
    }

    /// The same weights as those of the only expert.
    pub fn as_expert(&self) -> ExpertWeights<'a, W, S> {
        ExpertWeights {
            gate: self.gate.map(one),
            up: one(self.up),
            down: one(self.down),
            gate_bias: self.gate_bias.map(row),
            up_bias: self.up_bias.map(row),
            down_bias: self.down_bias.map(row),
        }
    }

    /// Checks shapes and presence.
    ///
    /// # Errors
    /// As [`ExpertWeights::check`].
    pub fn check(&self, ffn: &Ffn) -> Result<()> {
        let (inter, hidden) = (ffn.intermediate_size, ffn.hidden_size);
        if let Some(gate) = check_presence("gate", self.gate, ffn.gated, why::GATE)? {
            gate.check("gate", [inter, hidden])?;
        }
        self.up.check("up", [inter, hidden])?;
        self.down.check("down", [hidden, inter])?;
        for (name, bias, wanted, width) in [
            ("gate_bias", self.gate_bias, ffn.up_bias && ffn.gated, inter),
            ("up_bias", self.up_bias, ffn.up_bias, inter),
            ("down_bias", self.down_bias, ffn.down_bias, hidden),
        ] {
            if let Some(bias) = check_presence(name, bias, wanted, why::BLOCK_BIAS)? {
                check_len(name, bias.len(), width)?;
            }
        }
        Ok(())
    }
}

fn one<T>(view: View<'_, T, 2>) -> View<'_, T, 3> {
    let ([rows, cols], [row, col]) = (view.shape(), view.strides());
    View::with_strides(view.data(), [1, rows, cols], [0, row, col])
}

/// Rows of gate and of up in an array of both; all rows, which then do not fit, if their number is odd.
const fn half_of(rows: usize) -> usize {
    if rows.is_multiple_of(2) { rows / 2 } else { rows }
}

fn row<T>(data: &[T]) -> View<'_, T, 2> {
    View::new(data, [1, data.len()])
}

impl<'a, W, S> ExpertWeights<'a, W, S> {
    /// Gate and up as separate arrays (`gate`: `None` for plain experts), without biases.
    pub const fn separate(gate: Option<View<'a, W, 3>>, up: View<'a, W, 3>, down: View<'a, W, 3>) -> Self {
        ExpertWeights { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }
    }

    /// `gate_up`: `[num_local_experts, 2 * intermediate_size, hidden_size]`, gate rows first, then up rows. An odd number of
    /// rows is found by [`ExpertWeights::check`]: gate and up then have as many rows as the array.
    pub fn halves(gate_up: View<'a, W, 3>, down: View<'a, W, 3>) -> Self {
        let ([experts, rows, cols], strides) = (gate_up.shape(), gate_up.strides());
        let half = [experts, half_of(rows), cols];
        // A view that is too short is found by `check`; the cut must not panic.
        let skip = half[1].saturating_mul(strides[1]).min(gate_up.data().len());
        let gate = View::with_strides(gate_up.data(), half, strides);
        ExpertWeights::separate(Some(gate), View::with_strides(&gate_up.data()[skip..], half, strides), down)
    }

    /// `gate_up`: `[num_local_experts, 2 * intermediate_size, hidden_size]`, gate in the even rows, up in the odd ones; an odd number
    /// of rows as in [`ExpertWeights::halves`].
    pub fn interleaved(gate_up: View<'a, W, 3>, down: View<'a, W, 3>) -> Self {
        let ([experts, rows, cols], [expert, row, col]) = (gate_up.shape(), gate_up.strides());
        let (half, strides) = ([experts, half_of(rows), cols], [expert, row.saturating_mul(2), col]);
        let gate = View::with_strides(gate_up.data(), half, strides);
        let up = View::with_strides(&gate_up.data()[row.min(gate_up.data().len())..], half, strides);
        ExpertWeights::separate(Some(gate), up, down)
    }

    /// The weights of one local expert.
    pub fn expert(&self, local: usize) -> FfnWeights<'a, W, S> {
        let matrix = |view: View<'a, W, 3>| {
            let ([_, rows, cols], [expert, row, col]) = (view.shape(), view.strides());
            View::with_strides(&view.data()[local * expert..], [rows, cols], [row, col])
        };
        FfnWeights {
            gate: self.gate.map(matrix),
            up: matrix(self.up),
            down: matrix(self.down),
            gate_bias: self.gate_bias.map(|b| b.row(&[local])),
            up_bias: self.up_bias.map(|b| b.row(&[local])),
            down_bias: self.down_bias.map(|b| b.row(&[local])),
        }
    }

    /// Checks shapes and presence.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`], [`Error::Len`] for an array that does not fit; [`Error::Presence`] where the
    /// specification and what is given disagree.
    pub fn check(&self, spec: &ExpertFfn) -> Result<()> {
        let (n, ffn) = (spec.num_local_experts, &spec.ffn);
        let (inter, hidden) = (ffn.intermediate_size, ffn.hidden_size);
        if let Some(gate) = check_presence("gate", self.gate, ffn.gated, why::GATE)? {
            gate.check("gate", [n, inter, hidden])?;
        }
        self.up.check("up", [n, inter, hidden])?;
        self.down.check("down", [n, hidden, inter])?;
        for (name, bias, wanted, width) in [
            ("gate_bias", self.gate_bias, ffn.up_bias && ffn.gated, inter),
            ("up_bias", self.up_bias, ffn.up_bias, inter),
            ("down_bias", self.down_bias, ffn.down_bias, hidden),
        ] {
            if let Some(bias) = check_presence(name, bias, wanted, why::BLOCK_BIAS)? {
                bias.check(name, [n, width])?;
            }
        }
        Ok(())
    }
}

/// Weights of a mixture of experts.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MoeWeights<'a, W, S = f32, Q = W> {
    /// `[num_experts, hidden_size]`
    pub router: View<'a, Q, 2>,
    /// `[num_experts]`
    pub router_bias: Option<&'a [S]>,
    /// `[num_experts]`
    pub selection_bias: Option<&'a [S]>,
    /// The routed experts.
    pub experts: ExpertWeights<'a, W, S>,
    /// The shared expert.
    pub shared: Option<FfnWeights<'a, W, S>>,
    /// `[1, hidden_size]`: gate of the shared expert.
    pub shared_gate: Option<View<'a, W, 2>>,
}

impl<'a, W, S, Q> MoeWeights<'a, W, S, Q> {
    /// Without biases and shared expert.
    pub const fn new(router: View<'a, Q, 2>, experts: ExpertWeights<'a, W, S>) -> Self {
        MoeWeights { router, router_bias: None, selection_bias: None, experts, shared: None, shared_gate: None }
    }

    /// Checks shapes and presence.
    ///
    /// # Errors
    /// As [`ExpertWeights::check`].
    pub fn check(&self, spec: &Moe) -> Result<()> {
        let (experts, hidden) = (spec.router.num_experts, spec.experts.ffn.hidden_size);
        self.router.check("router", [experts, hidden])?;
        for (name, bias, wanted) in [
            ("router_bias", self.router_bias, spec.router_bias),
            ("selection_bias", self.selection_bias, spec.selection_bias),
        ] {
            if let Some(bias) = check_presence(name, bias, wanted, why::MIXTURE_BIAS)? {
                check_len(name, bias.len(), experts)?;
            }
        }
        self.experts.check(&spec.experts)?;
        let shared = check_presence("shared", self.shared.as_ref(), spec.shared.is_some(), why::SHARED)?;
        if let (Some(shared), Some(block)) = (shared, &spec.shared) {
            shared.check(&block.ffn)?;
        }
        let has_gate = spec.shared.is_some_and(|shared| shared.sigmoid_gate);
        let gate = check_presence("shared_gate", self.shared_gate, has_gate, why::SHARED_GATE)?;
        gate.map_or(Ok(()), |gate| gate.check("shared_gate", [1, hidden]))
    }
}

/// Input of a mixture of experts.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MoeInput<'a, T, S = f32> {
    /// `[num_tokens, hidden_size]`
    pub hidden: View<'a, T, 2>,
    /// `[num_tokens]`: 0 marks padding (see [`RouteInput::token_mask`]); the shared expert is computed all the same.
    pub token_mask: Option<&'a [u8]>,
    /// Experts and weights from outside: the router is not asked.
    pub routing: Option<Routing<'a, S>>,
    /// Key of the random numbers.
    pub seed: u64,
}

impl<'a, T, S> MoeInput<'a, T, S> {
    /// Nothing optional.
    pub const fn new(hidden: View<'a, T, 2>) -> Self {
        MoeInput { hidden, token_mask: None, routing: None, seed: 0 }
    }
}

/// Output of a mixture of experts.
#[derive(Debug)]
#[non_exhaustive]
pub struct MoeOutput<'a, O, R = f32> {
    /// `[num_tokens, hidden_size]`
    pub out: ViewMut<'a, O, 2>,
    /// The routing, where it is wanted. Must be absent when the routing is an input.
    pub route: Option<RouteOutput<'a, R>>,
}

impl<'a, O, R> MoeOutput<'a, O, R> {
    /// Without the routing.
    pub const fn new(out: ViewMut<'a, O, 2>) -> Self {
        MoeOutput { out, route: None }
    }
}

impl<T, S> MoeInput<'_, T, S> {
    /// Validates the specification and every argument but the weights; gives the number of tokens.
    ///
    /// # Errors
    /// Those of [`Moe::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Presence`] if the routing is
    /// both given and asked for.
    pub fn check<O, R>(&self, spec: &Moe, output: &MoeOutput<'_, O, R>) -> Result<usize> {
        spec.validate()?;
        let (hidden, num_tokens) = (spec.experts.ffn.hidden_size, self.hidden.shape()[0]);
        self.hidden.check("hidden", [num_tokens, hidden])?;
        if let Some(mask) = self.token_mask {
            check_len("token_mask", mask.len(), num_tokens)?;
        }
        if let Some(routing) = &self.routing {
            routing.check(num_tokens)?;
            if output.route.is_some() {
                return Err(Error::unexpected("route", "the routing is an input"));
            }
        }
        if let Some(route) = &output.route {
            route.check(&spec.router, num_tokens)?;
        }
        output.out.check("out", [num_tokens, hidden])?;
        Ok(num_tokens)
    }
}
