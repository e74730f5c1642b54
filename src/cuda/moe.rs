//! A mixture of experts on the GPU: router, experts and shared expert, queued one after the other without a word from the host.

use crate::cuda::driver::{Driver, Limits, Stream};
use crate::cuda::expert_ffn::{ExpertFfnArgs, ExpertFfnPlan, ExpertFfnProblem, Routing, SharedRows};
use crate::cuda::ffn::{Block, BlockPlan, BlockRows, ExpertWeights, FfnArgs, FfnStrides, FfnWeights};
use crate::cuda::grouped_gemm::{F32Products, GemmRows, GroupedGemm, GroupedGemmArgs, GroupedGemmPlan};
use crate::cuda::memory::{DeviceView, DeviceViewMut, Home, Parts, Queue};
use crate::cuda::route::{Route, RouteArgs, RouteOutput, RoutePlan};
use crate::cuda::router_logits::{RouterLogits, RouterLogitsArgs, RouterLogitsPlan};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result, check_presence, why};
use crate::spec::{ExpertFfn, Moe};

/// Weights of a mixture of experts. The router's may be of another type than the experts'.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MoeWeights<'a, T, Q = T> {
    /// `[num_experts, hidden_size]`
    pub router: DeviceView<'a, Q, 2>,
    /// `[num_experts]`
    pub router_bias: Option<DeviceView<'a, f32, 1>>,
    /// `[num_experts]`
    pub selection_bias: Option<DeviceView<'a, f32, 1>>,
    /// The routed experts.
    pub experts: ExpertWeights<'a, T>,
    /// The shared expert.
    pub shared: Option<FfnWeights<'a, T>>,
    /// `[1, hidden_size]`: gate of the shared expert.
    pub shared_gate: Option<DeviceView<'a, T, 2>>,
}

impl<'a, T, Q> MoeWeights<'a, T, Q> {
    /// Without biases and shared expert.
    pub const fn new(router: DeviceView<'a, Q, 2>, experts: ExpertWeights<'a, T>) -> Self {
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
                bias.check(name, [experts])?;
            }
        }
        self.experts.check(&spec.experts)?;
        let shared = check_presence("shared", self.shared.as_ref(), spec.shared.is_some(), why::SHARED)?;
        if let (Some(shared), Some(block)) = (shared, &spec.shared) {
            shared.as_expert().check(&ExpertFfn::new(1, block.ffn))?;
        }
        let has_gate = spec.shared.is_some_and(|shared| shared.sigmoid_gate);
        let gate = check_presence("shared_gate", self.shared_gate, has_gate, why::SHARED_GATE)?;
        gate.map_or(Ok(()), |gate| gate.check("shared_gate", [1, hidden]))
    }

    fn homes(&self) -> [Home; 4] {
        [
            self.router.home(),
            self.router_bias.and_then(|view| view.home()),
            self.selection_bias.and_then(|view| view.home()),
            self.shared_gate.and_then(|view| view.home()),
        ]
    }
}

/// Input of a mixture of experts.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MoeInput<'a, T> {
    /// `[num_tokens, hidden_size]`
    pub hidden: DeviceView<'a, T, 2>,
    /// `[num_tokens]`: 0 marks padding: no expert sees it; the shared expert is computed all the same.
    pub token_mask: Option<DeviceView<'a, u8, 1>>,
    /// Experts and weights from outside: the router is not asked.
    pub routing: Option<Routing<'a>>,
    /// Key of the random numbers. A recording (a CUDA graph) keeps it.
    pub seed: u64,
}

impl<'a, T> MoeInput<'a, T> {
    /// Nothing optional.
    pub const fn new(hidden: DeviceView<'a, T, 2>) -> Self {
        MoeInput { hidden, token_mask: None, routing: None, seed: 0 }
    }

    /// Validates the specification and every argument but the weights; gives the number of tokens.
    ///
    /// # Errors
    /// Those of [`Moe::validate`]; [`Error::Shape`], [`Error::Stride`], [`Error::Len`]; [`Error::Presence`] if the routing is
    /// both given and asked for.
    pub fn check(&self, spec: &Moe, output: &MoeOutput<'_, T>) -> Result<usize> {
        spec.validate()?;
        let (hidden, num_tokens) = (spec.experts.ffn.hidden_size, self.hidden.shape()[0]);
        self.hidden.check("hidden", [num_tokens, hidden])?;
        if let Some(mask) = self.token_mask {
            mask.check("token_mask", [num_tokens])?;
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

/// Output of a mixture of experts.
#[derive(Debug)]
#[non_exhaustive]
pub struct MoeOutput<'a, T> {
    /// `[num_tokens, hidden_size]`
    pub out: DeviceViewMut<'a, T, 2>,
    /// The routing, where it is wanted. Must be absent when the routing is an input.
    pub route: Option<RouteOutput<'a>>,
}

impl<'a, T> MoeOutput<'a, T> {
    /// Without the routing.
    pub const fn new(out: DeviceViewMut<'a, T, 2>) -> Self {
        MoeOutput { out, route: None }
    }
}

/// Where the experts of the tokens come from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MoeRouting {
    /// From the router; nobody asks for them.
    Computed,
    /// From the router; the caller wants them, in arrays as this problem describes (its specification and number of tokens are
    /// not read, its logits are contiguous).
    Asked(Route),
    /// From the caller.
    Given {
        /// Experts per token.
        slots: usize,
        /// Elements from one row of `topk_ids` to the next.
        topk_ids_stride: usize,
        /// Elements from one row of `topk_weights` to the next.
        topk_weights_stride: usize,
    },
}

/// What to compute: see [`moe`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MoeProblem {
    /// The mixture.
    pub spec: Moe,
    /// Element type of activations, weights and `out`: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Element type of the router's weights: bf16, f16 or f32.
    pub router_dtype: Dtype,
    /// How f32 is multiplied in the experts, the shared one too; router and gate of the shared expert always in full.
    pub f32_products: F32Products,
    /// Rows; 0 is legal.
    pub num_tokens: usize,
    /// Where the experts of the tokens come from.
    pub routing: MoeRouting,
    /// Elements from one row of `hidden` to the next.
    pub hidden_stride: usize,
    /// Elements from one row of `router` to the next.
    pub router_stride: usize,
    /// How the experts' weights lie.
    pub experts: FfnStrides,
    /// How the shared expert's weights lie.
    pub shared: FfnStrides,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
}

impl MoeProblem {
    /// Contiguous arrays, gate and up separate, the routing computed and not asked for.
    pub fn new(spec: &Moe, dtype: Dtype, num_tokens: usize) -> Self {
        let ffn = &spec.experts.ffn;
        MoeProblem {
            spec: spec.clone(),
            dtype,
            router_dtype: dtype,
            f32_products: F32Products::Full,
            num_tokens,
            routing: MoeRouting::Computed,
            hidden_stride: ffn.hidden_size,
            router_stride: ffn.hidden_size,
            experts: FfnStrides::separate(ffn),
            shared: FfnStrides::separate(spec.shared.as_ref().map_or(ffn, |shared| &shared.ffn)),
            out_stride: ffn.hidden_size,
        }
    }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MoeArgs {
    /// Read.
    pub hidden: u64,
    /// `[num_tokens]` u8, read.
    pub token_mask: Option<u64>,
    /// Key of the random numbers. A recording (a CUDA graph) keeps it.
    pub seed: u64,
    /// Read, if the routing is computed.
    pub router: u64,
    /// f32, read, where the specification has it and the routing is computed.
    pub router_bias: Option<u64>,
    /// f32, read, where the specification has it and the routing is computed.
    pub selection_bias: Option<u64>,
    /// Read.
    pub experts: FfnArgs,
    /// Read, where there is a shared expert.
    pub shared: Option<FfnArgs>,
    /// Read, where the shared expert has a gate.
    pub shared_gate: Option<u64>,
    /// `topk_ids` and `topk_weights`, read, where the routing is given.
    pub given: Option<[u64; 2]>,
    /// Where the routing goes that is asked for; its inputs and its workspace are not read.
    pub route: Option<RouteArgs>,
    /// Written.
    pub out: u64,
    /// [`MoePlan::workspace_bytes`] bytes, a multiple of 256.
    pub workspace: u64,
}

impl MoeArgs {
    /// Without biases and shared expert; the routing is computed and not asked for.
    pub fn new(hidden: u64, router: u64, experts: FfnArgs, out: u64, workspace: u64) -> Self {
        MoeArgs {
            hidden,
            token_mask: None,
            seed: 0,
            router,
            router_bias: None,
            selection_bias: None,
            experts,
            shared: None,
            shared_gate: None,
            given: None,
            route: None,
            out,
            workspace,
        }
    }
}

/// The router's two steps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Routed {
    logits: RouterLogitsPlan,
    route: RoutePlan,
    asked: bool,
}

/// The shared expert's steps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shared {
    block: BlockPlan,
    gate: Option<GroupedGemmPlan>,
}

/// Where things lie in the workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Offsets {
    logits: usize,
    topk_ids: usize,
    topk_weights: usize,
    router: usize,
    shared_rows: usize,
    shared_gate: usize,
    shared_inner: usize,
    experts: usize,
    bytes: usize,
}

/// [`MoeProblem`] with its kernels, grids and workspace. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MoePlan {
    num_tokens: usize,
    routed: Option<Routed>,
    shared: Option<Shared>,
    experts: ExpertFfnPlan,
    offsets: Offsets,
}

impl MoePlan {
    /// Checks the shapes and chooses kernels and grids for a device.
    ///
    /// # Errors
    /// Those of [`Moe::validate`], of [`RouterLogitsPlan::new`], [`RoutePlan::new`] and [`ExpertFfnPlan::new`].
    pub fn new(problem: &MoeProblem, limits: &Limits) -> Result<Self> {
        let &MoeProblem { ref spec, dtype, num_tokens, .. } = problem;
        spec.validate()?;
        let ffn = &spec.experts.ffn;
        let mut parts = Parts::default();
        let mut offsets = Offsets::default();
        let mut experts = ExpertFfnProblem {
            f32_products: problem.f32_products,
            distinct_ids: true,
            hidden_stride: problem.hidden_stride,
            weights: problem.experts,
            out_stride: problem.out_stride,
            ..ExpertFfnProblem::new(&spec.experts, dtype, num_tokens, spec.router.slots())
        };
        let computed = |asked: Option<&Route>| {
            let mut route = asked.cloned().unwrap_or_else(|| Route::new(&spec.router, num_tokens));
            route.spec = spec.router.clone();
            route.num_tokens = num_tokens;
            route.logits_stride = spec.router.num_experts;
            route.selection_bias = spec.selection_bias;
            route
        };
        let route = match &problem.routing {
            MoeRouting::Computed => Some(computed(None)),
            MoeRouting::Asked(route) => Some(computed(Some(route))),
            &MoeRouting::Given { slots, topk_ids_stride, topk_weights_stride } => {
                experts = ExpertFfnProblem {
                    slots,
                    topk_ids_stride,
                    topk_weights_stride,
                    distinct_ids: false, // whoever gives the ids may name an expert twice
                    ..experts
                };
                None
            }
        };
        let routed = match route {
            None => None,
            Some(route) => {
                let asked = problem.routing != MoeRouting::Computed;
                experts.topk_ids_stride = route.topk_ids_stride;
                experts.topk_weights_stride = route.topk_weights_stride;
                let mut logits =
                    RouterLogits::new(dtype, num_tokens, spec.router.num_experts, spec.experts.ffn.hidden_size);
                logits.weight_dtype = problem.router_dtype;
                logits.jitter = spec.router.jitter;
                logits.hidden_stride = problem.hidden_stride;
                logits.weight_stride = problem.router_stride;
                let logits = RouterLogitsPlan::new(&logits, limits)?;
                let route = RoutePlan::new(&route)?;
                offsets.logits = parts.part(num_tokens.saturating_mul(spec.router.num_experts), 4);
                let kept = if asked { 0 } else { num_tokens.saturating_mul(spec.router.slots()) };
                offsets.topk_ids = parts.part(kept, 4);
                offsets.topk_weights = parts.part(kept, 4);
                // One after the other, in the same place.
                offsets.router = parts.part(logits.workspace_bytes().max(route.workspace_bytes()), 1);
                Some(Routed { logits, route, asked })
            }
        };
        let shared = match &spec.shared {
            None => None,
            Some(shared) => {
                let block = Block {
                    ffn: &shared.ffn,
                    strides: &problem.shared,
                    dtype,
                    out_dtype: dtype,
                    f32_products: problem.f32_products,
                    num_blocks: 1,
                    num_tokens,
                    hidden_stride: problem.hidden_stride,
                    out_stride: ffn.hidden_size,
                    rows: GemmRows::Equal(num_tokens),
                };
                let block = BlockPlan::new(&block, limits)?;
                let gate = GroupedGemm {
                    out_dtype: Dtype::F32,
                    a_stride: problem.hidden_stride,
                    ..GroupedGemm::linear(dtype, num_tokens, 1, ffn.hidden_size)
                };
                let gate = shared.sigmoid_gate.then(|| GroupedGemmPlan::new(&gate, limits)).transpose()?;
                offsets.shared_rows = parts.part(num_tokens.saturating_mul(ffn.hidden_size), dtype.size_bytes());
                offsets.shared_gate = parts.part(if gate.is_some() { num_tokens } else { 0 }, 4);
                offsets.shared_inner = parts.part(block.inner_bytes(), 1);
                Some(Shared { block, gate })
            }
        };
        let experts = ExpertFfnPlan::new(&experts, limits)?;
        offsets.experts = parts.part(experts.workspace_bytes(), 1);
        offsets.bytes = parts.bytes();
        Ok(MoePlan { num_tokens, routed, shared, experts, offsets })
    }

    /// Names of the kernels that a launch may use, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        if let Some(routed) = &self.routed {
            names.push(routed.logits.kernel());
            names.extend(routed.route.kernels());
        }
        if let Some(shared) = &self.shared {
            names.extend(shared.block.kernels());
            names.extend(shared.gate.iter().flat_map(GroupedGemmPlan::kernels));
        }
        names.extend(self.experts.kernels());
        names
    }

    /// Device memory that [`MoePlan::launch`] needs besides its arguments: what lies between its kernels.
    pub fn workspace_bytes(&self) -> usize {
        self.offsets.bytes
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        if let Some(routed) = &self.routed {
            routed.logits.warmup(driver)?;
            routed.route.warmup(driver)?;
        }
        if let Some(shared) = &self.shared {
            shared.block.warmup(driver)?;
            shared.gate.iter().try_for_each(|gate| gate.warmup(driver))?;
        }
        self.experts.warmup(driver)
    }

    /// Queues the work on a stream. Does not wait; after [`MoePlan::warmup`] it neither allocates nor loads. Which experts the
    /// tokens go to is known to the device alone, so one recording of a launch serves any tokens.
    ///
    /// # Errors
    /// Those of the launches of its steps; [`Error::Presence`] if an array is there that the mixture does not have, or the other
    /// way round. `out` is not written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the outputs and the workspace meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &MoeArgs, stream: Stream) -> Result<()> {
        self.check(args)?;
        let at = |offset: usize| args.workspace + offset as u64;
        let o = &self.offsets;
        let [topk_ids, topk_weights] = match (&self.routed, args.given, args.route) {
            (Some(routed), ..) => {
                let mut route = match args.route {
                    Some(route) => route,
                    None => RouteArgs::new(0, at(o.topk_ids), at(o.topk_weights)),
                };
                route.logits = at(o.logits);
                route.selection_bias = args.selection_bias;
                route.token_mask = args.token_mask;
                route.loss_mask = None;
                route.seed = args.seed;
                route.workspace = at(o.router);
                let logits = RouterLogitsArgs {
                    bias: args.router_bias,
                    seed: args.seed,
                    workspace: if routed.logits.workspace_bytes() > 0 { at(o.router) } else { 0 },
                    ..RouterLogitsArgs::new(args.hidden, args.router, at(o.logits))
                };
                // SAFETY: the workspace has room for the logits and for each step's own, laid out by `new`; the rest is the
                // caller's promise.
                unsafe {
                    routed.logits.launch(driver, &logits, stream)?;
                    routed.route.launch(driver, &route, stream)?;
                }
                [route.topk_ids, route.topk_weights]
            }
            (None, given, _) => given.unwrap_or_default(),
        };
        if self.num_tokens == 0 {
            return Ok(());
        }
        let mut rows = None;
        if let (Some(shared), Some(weights)) = (&self.shared, &args.shared) {
            let block = BlockRows {
                hidden: args.hidden,
                inner: at(o.shared_inner),
                out: at(o.shared_rows),
                ..BlockRows::default()
            };
            // SAFETY: as above.
            unsafe { shared.block.launch(driver, &block, weights, stream)? };
            if let (Some(gate), Some(weight)) = (&shared.gate, args.shared_gate) {
                let gate_args = GroupedGemmArgs::new(args.hidden, weight, at(o.shared_gate));
                // SAFETY: as above.
                unsafe { gate.launch(driver, &gate_args, stream)? };
            }
            let gate = shared.gate.as_ref().map(|_| at(o.shared_gate));
            rows = Some(SharedRows { rows: at(o.shared_rows), gate });
        }
        let workspace = at(o.experts);
        let experts = ExpertFfnArgs::new(args.hidden, topk_ids, topk_weights, args.experts, args.out, workspace);
        // SAFETY: as above; ids and weights are those of the router, or the caller's.
        unsafe { self.experts.launch_with_shared(driver, &experts, rows, stream) }
    }

    /// What is there and what is not; steps check the rest.
    fn check(&self, args: &MoeArgs) -> Result<()> {
        let (routed, shared) = (self.routed.as_ref(), self.shared.as_ref());
        for (name, given, wanted) in [
            ("given", args.given.is_some(), routed.is_none()),
            ("route", args.route.is_some(), routed.is_some_and(|routed| routed.asked)),
            ("shared", args.shared.is_some(), shared.is_some()),
            ("shared_gate", args.shared_gate.is_some(), shared.is_some_and(|shared| shared.gate.is_some())),
        ] {
            check_presence(name, given.then_some(()), wanted, why::PLAN)?;
        }
        if self.offsets.bytes > 0 && (args.workspace == 0 || !args.workspace.is_multiple_of(256)) {
            let found = format_args!("{:#x}", args.workspace);
            return Err(Error::value("workspace", "a device pointer that is a multiple of 256", found));
        }
        Ok(())
    }
}

/// The caller's arrays for the routing, as problem and pointers.
fn asked_for(queue: &Queue<'_>, route: &Route, output: &RouteOutput<'_>) -> Result<(Route, RouteArgs)> {
    fn home<T, const N: usize>(view: &Option<DeviceViewMut<'_, T, N>>) -> Home {
        view.as_ref().and_then(|view| view.home())
    }
    queue.check_homes(&[
        output.topk_ids.home(),
        output.topk_weights.home(),
        home(&output.tokens_per_expert),
        home(&output.dropped),
        home(&output.expert_tokens),
        home(&output.aux_loss),
        home(&output.z_loss),
    ])?;
    let route = Route {
        topk_ids_stride: output.topk_ids.strides()[0],
        topk_weights_stride: output.topk_weights.strides()[0],
        expert_tokens_stride: output.expert_tokens.as_ref().map(|tokens| tokens.strides()[0]),
        aux_loss: output.aux_loss.is_some(),
        z_loss: output.z_loss.is_some(),
        ..route.clone()
    };
    let args = RouteArgs {
        tokens_per_expert: output.tokens_per_expert.as_ref().map(DeviceViewMut::ptr),
        dropped: output.dropped.as_ref().map(DeviceViewMut::ptr),
        expert_tokens: output.expert_tokens.as_ref().map(DeviceViewMut::ptr),
        aux_loss: output.aux_loss.as_ref().map(DeviceViewMut::ptr),
        z_loss: output.z_loss.as_ref().map(DeviceViewMut::ptr),
        ..RouteArgs::new(0, output.topk_ids.ptr(), output.topk_weights.ptr())
    };
    Ok((route, args))
}

/// A mixture of experts, as [`cpu::moe`](crate::cpu::moe):
///
/// ```text
/// out = expert_ffn(x, route(x)) + g(x) * FFN_shared(x)         g(x) = sigmoid(x . shared_gate), or 1 without a gate
/// ```
///
/// With [`MoeInput::routing`] the router is not asked. Without a shared expert the second term is 0.
///
/// * `hidden`, `out`: `[num_tokens, hidden_size]`
/// * `weights`: as checkpoints have them; the router's of any type
///
/// Logits and routing are those of [`router_logits`](crate::cuda::router_logits()) and [`route`](crate::cuda::route()); experts are
/// added in ascending order in f32, then the shared one, rounded once at the store. See [`expert_ffn`](crate::cuda::expert_ffn()).
/// f32 is multiplied in the experts as [`Queue::f32_products`] tells, elsewhere in full.
/// Which experts the tokens go to is never read back, so prefill and decode can be recorded into a graph.
///
/// # Errors
/// Those of [`MoeInput::check`], [`MoeWeights::check`] and [`MoePlan`]. Nothing is written then.
pub fn moe<T: Element, Q: Element>(
    queue: &mut Queue<'_>,
    spec: &Moe,
    input: &MoeInput<'_, T>,
    weights: &MoeWeights<'_, T, Q>,
    output: MoeOutput<'_, T>,
) -> Result<()> {
    let num_tokens = input.check(spec, &output)?;
    weights.check(spec)?;
    let shared = weights.shared.map(|shared| shared.as_expert());
    queue.check_homes(&[input.hidden.home(), input.token_mask.and_then(|view| view.home()), output.out.home()])?;
    queue.check_homes(&weights.homes())?;
    queue.check_homes(&weights.experts.homes())?;
    shared.iter().try_for_each(|shared| queue.check_homes(&shared.homes()))?;
    let mut problem = MoeProblem::new(spec, T::DTYPE, num_tokens);
    problem.router_dtype = Q::DTYPE;
    problem.f32_products = queue.f32_products();
    problem.hidden_stride = input.hidden.strides()[0];
    problem.router_stride = weights.router.strides()[0];
    problem.experts = weights.experts.strides()?;
    if let Some(shared) = &shared {
        problem.shared = shared.strides()?;
    }
    problem.out_stride = output.out.strides()[0];
    let mut given = None;
    let mut route = None;
    if let Some(routing) = &input.routing {
        queue.check_homes(&[routing.topk_ids.home(), routing.topk_weights.home()])?;
        problem.routing = MoeRouting::Given {
            slots: routing.topk_ids.shape()[1],
            topk_ids_stride: routing.topk_ids.strides()[0],
            topk_weights_stride: routing.topk_weights.strides()[0],
        };
        given = Some([routing.topk_ids.ptr(), routing.topk_weights.ptr()]);
    } else if let Some(output) = &output.route {
        let (asked, args) = asked_for(queue, &Route::new(&spec.router, num_tokens), output)?;
        problem.routing = MoeRouting::Asked(asked);
        route = Some(args);
    }
    let plan = MoePlan::new(&problem, &queue.driver().limits())?;
    let is_routed = given.is_none();
    let args = MoeArgs {
        token_mask: input.token_mask.map(|view| view.ptr()),
        seed: input.seed,
        router_bias: weights.router_bias.filter(|_| is_routed).map(|view| view.ptr()),
        selection_bias: weights.selection_bias.filter(|_| is_routed).map(|view| view.ptr()),
        shared: shared.map(|shared| shared.args()),
        shared_gate: weights.shared_gate.map(|view| view.ptr()),
        given,
        route,
        ..MoeArgs::new(
            input.hidden.ptr(),
            weights.router.ptr(),
            weights.experts.args(),
            output.out.ptr(),
            queue.workspace(plan.workspace_bytes())?,
        )
    };
    // SAFETY: the views are device memory with the plan's shapes and strides, checked above, borrowed from those who own them:
    // what the queue's stream does later comes after this work, also what uses the workspace.
    unsafe { plan.launch(queue.driver(), &args, queue.stream()) }
}
