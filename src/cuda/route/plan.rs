//! The plan of a call of routing: its kernels in order, and what a launch checks.

use super::coupled::{Coupled, is_coupled};
use super::losses::Losses;
use super::problem::{Route, RouteArgs};
use super::tokens::{Extra, Gives, Tokens};
use crate::cuda::driver::{Driver, Launch, Stream};
use crate::cuda::kernels::{Kernel, route_clear};
use crate::cuda::memory::Parts;
use crate::cuda::rows::{Rows, stride_bytes};
use crate::element::Dtype;
use crate::error::{Error, Result, check_presence, why};

/// [`Route`] with its kernels, their grids and the workspace. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RoutePlan {
    num_tokens: usize,
    num_experts: usize,
    slots: usize,
    logits_stride_bytes: u64,
    ids_stride_bytes: u64,
    weights_stride_bytes: u64,
    /// Width and stride in bytes of `expert_tokens`.
    expert_tokens: Option<(usize, u64)>,
    selection_bias: bool,
    aux_loss: bool,
    z_loss: bool,
    choice: Choice,
    losses: Option<Losses>,
    workspace_bytes: usize,
}

/// How tokens and experts find each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Choice {
    /// Each token by itself.
    Tokens(Tokens),
    Coupled(Coupled),
}

impl RoutePlan {
    /// Chooses kernels and lays out the workspace.
    ///
    /// # Errors
    /// Those of [`Router::validate`](crate::spec::Router::validate); [`Error::Value`] and [`Error::Stride`] for sizes and strides;
    /// [`Error::Presence`] for an array that the specification does not have; [`Error::Unsupported`] for more than 1024
    /// experts or 32 experts per token.
    pub fn new(problem: &Route) -> Result<Self> {
        problem.check()?;
        let spec = &problem.spec;
        let mut parts = Parts::default();
        let choice = if is_coupled(spec) {
            Choice::Coupled(Coupled::new(problem, &mut parts)?)
        } else {
            Choice::Tokens(Tokens::new(problem, Gives::Weights, false)?)
        };
        let losses = Losses::new(problem, &mut parts)?;
        let bytes = |name, rows, stride| stride_bytes(name, Dtype::F32, rows, stride);
        let expert_tokens = match problem.expert_tokens_stride {
            Some(stride) => {
                let width = spec.expert_choice_tokens(problem.num_tokens);
                Some((width, bytes("expert_tokens", spec.num_experts, stride)?))
            }
            None => None,
        };
        Ok(RoutePlan {
            num_tokens: problem.num_tokens,
            num_experts: spec.num_experts,
            slots: spec.slots(),
            logits_stride_bytes: bytes("logits", problem.num_tokens, problem.logits_stride)?,
            ids_stride_bytes: bytes("topk_ids", problem.num_tokens, problem.topk_ids_stride)?,
            weights_stride_bytes: bytes("topk_weights", problem.num_tokens, problem.topk_weights_stride)?,
            expert_tokens,
            selection_bias: problem.selection_bias,
            aux_loss: problem.aux_loss,
            z_loss: problem.z_loss,
            choice,
            losses,
            workspace_bytes: parts.bytes(),
        })
    }

    /// Names of the kernels that a launch may use, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        self.used().into_iter().map(|kernel| kernel.entry).collect()
    }

    fn used(&self) -> Vec<&'static Kernel> {
        let mut used = vec![clear_kernel()];
        match &self.choice {
            Choice::Tokens(tokens) => used.push(tokens.kernel()),
            Choice::Coupled(coupled) => used.extend(coupled.kernels()),
        }
        used.extend(self.losses.iter().flat_map(Losses::kernels));
        used
    }

    /// Device memory that [`RoutePlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.used().into_iter().try_for_each(|kernel| driver.load(kernel))
    }

    /// Queues the work on a stream. Does not wait; after [`RoutePlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned to the element (the workspace: to 256); [`Error::Presence`] if an
    /// array is there that the plan does not have, or the other way round; [`Error::Overlap`] if an output shares memory with
    /// another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended;
    /// no other work writes the inputs or touches the outputs and the workspace meanwhile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &RouteArgs, stream: Stream) -> Result<()> {
        self.check(args)?;
        let (counts, dropped) = (args.tokens_per_expert.unwrap_or(0), args.dropped.unwrap_or(0));
        if counts != 0 || dropped != 0 {
            let params = route_clear::Params {
                counts_ptr: counts,
                dropped_ptr: dropped,
                num_experts: self.num_experts as u32, // at most 1024
            };
            // SAFETY: both arrays were checked above, their sizes are the caller's promise.
            unsafe { driver.launch(clear_kernel(), &Launch::grid([1; 3]), &params.to_bytes(), stream)? };
        }
        match &self.choice {
            Choice::Tokens(tokens) => {
                let extra = Extra { counts, ..Extra::default() };
                if self.num_tokens > 0 {
                    // SAFETY: `check` has seen the pointers, the rest is the caller's promise.
                    unsafe { tokens.launch(driver, args, extra, stream)? };
                }
            }
            // SAFETY: as above.
            Choice::Coupled(coupled) => unsafe { coupled.launch(driver, args, stream)? },
        }
        if let Some(losses) = &self.losses {
            // SAFETY: as above.
            unsafe { losses.launch(driver, args, stream)? };
        }
        Ok(())
    }

    /// Presence, alignment and overlap of the arrays.
    fn check(&self, args: &RouteArgs) -> Result<()> {
        for (name, given, wanted) in [
            ("selection_bias", args.selection_bias.is_some(), self.selection_bias),
            ("expert_tokens", args.expert_tokens.is_some(), self.expert_tokens.is_some()),
            ("aux_loss", args.aux_loss.is_some(), self.aux_loss),
            ("z_loss", args.z_loss.is_some(), self.z_loss),
        ] {
            check_presence(name, given.then_some(()), wanted, why::PLAN)?;
        }
        if self.workspace_bytes > 0 && (args.workspace == 0 || !args.workspace.is_multiple_of(256)) {
            let found = format_args!("{:#x}", args.workspace);
            return Err(Error::value("workspace", "a device pointer that is a multiple of 256", found));
        }
        let (tokens, experts) = (self.num_tokens, self.num_experts);
        let rows = |name, ptr, num_rows, width: usize, size: u64, stride_bytes| {
            let row_bytes = width as u64 * size;
            (Rows { name, ptr, num_rows, row_bytes, stride_bytes }, size)
        };
        let flat = |name, ptr: Option<u64>, width, size| ptr.map(|ptr| rows(name, ptr, 1, width, size, 0));
        let some = |ptr| if tokens > 0 { Some(ptr) } else { None };
        let inputs = [
            some(args.logits).map(|ptr| rows("logits", ptr, tokens, experts, 4, self.logits_stride_bytes)),
            flat("selection_bias", args.selection_bias, experts, 4),
            flat("token_mask", args.token_mask.filter(|_| tokens > 0), tokens, 1),
            flat("loss_mask", args.loss_mask.filter(|_| tokens > 0), tokens, 1),
        ];
        let workspace = Some(args.workspace).filter(|_| self.workspace_bytes > 0);
        let outputs = [
            some(args.topk_ids).map(|ptr| rows("topk_ids", ptr, tokens, self.slots, 4, self.ids_stride_bytes)),
            some(args.topk_weights).map(|p| rows("topk_weights", p, tokens, self.slots, 4, self.weights_stride_bytes)),
            flat("tokens_per_expert", args.tokens_per_expert, experts, 4),
            flat("dropped", args.dropped, 1, 8),
            self.expert_tokens
                .zip(args.expert_tokens)
                .filter(|((width, _), _)| *width > 0)
                .map(|((width, stride), ptr)| rows("expert_tokens", ptr, experts, width, 4, stride)),
            flat("aux_loss", args.aux_loss, 1, 4),
            flat("z_loss", args.z_loss, 1, 4),
            flat("workspace", workspace, self.workspace_bytes, 1),
        ];
        inputs.iter().chain(&outputs).flatten().try_for_each(|(rows, size)| rows.check_size(*size))?;
        for (i, (output, _)) in outputs.iter().enumerate().filter_map(|(i, rows)| Some((i, rows.as_ref()?))) {
            let others = inputs.iter().chain(&outputs[..i]).flatten();
            others.into_iter().try_for_each(|(other, _)| output.check_separate(other))?;
        }
        Ok(())
    }
}

fn clear_kernel() -> &'static Kernel {
    &route_clear::INSTANCES[0].kernel
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{AuxLoss, Renormalize, Router, Score, Selection};

    fn kernels(problem: &Route) -> Vec<&'static str> {
        RoutePlan::new(problem).unwrap().kernels()
    }

    #[test]
    fn which_kernels() {
        for (experts, entry) in [
            (1, "gatefold_route_e32"),
            (32, "gatefold_route_e32"),
            (33, "gatefold_route_e64"),
            (128, "gatefold_route_e128"),
            (160, "gatefold_route_e256"),
            (384, "gatefold_route_e512"),
            (1024, "gatefold_route_e1024"),
        ] {
            assert_eq!(kernels(&Route::new(&Router::new(experts, 1), 5)), ["gatefold_route_clear_f64", entry]);
        }
        let mut router = Router::new(12, 2);
        router.selection = Selection::Prototypes;
        assert_eq!(kernels(&Route::new(&router, 5))[1], "gatefold_route_prototypes_f32");
        router.selection = Selection::SparseMixer { jitter_eps: 0.1 };
        router.aux_loss = Some(AuxLoss::TopK);
        let with_losses = Route { aux_loss: true, ..Route::new(&router, 5) };
        assert_eq!(kernels(&with_losses)[1], "gatefold_route_sparse_mixer_f32");
        assert_eq!(kernels(&with_losses)[2], "gatefold_route_losses_e32");
        // One chunk of 5 tokens: 2 * 12 + 2 sums; one group: 3. Parts begin at multiples of 256 bytes.
        assert_eq!(RoutePlan::new(&with_losses).unwrap().workspace_bytes(), 256 + 256);
    }

    #[test]
    fn plans_tell_routers_apart() {
        let plan = |edit: fn(&mut Router)| {
            let mut router = Router::new(16, 2);
            edit(&mut router);
            RoutePlan::new(&Route::new(&router, 3)).unwrap()
        };
        let first = plan(|_| {});
        assert_eq!(first, plan(|_| {}));
        assert_ne!(first, plan(|r| r.score = Score::Sigmoid));
        assert_ne!(first, plan(|r| r.renormalize = Renormalize::L2));
        assert_ne!(first, plan(|r| r.scaling_factor = 1.5));
    }

    #[test]
    fn bad_problems() {
        let message = |problem: Route| RoutePlan::new(&problem).unwrap_err().to_string();
        let good = || Route::new(&Router::new(16, 2), 3);
        assert_eq!(message(Route::new(&Router::new(1025, 2), 3)), "unsupported by cuda: 1025 experts (at most 1024)");
        assert_eq!(
            message(Route::new(&Router::new(64, 33), 3)),
            "unsupported by cuda: 33 experts per token (at most 32)"
        );
        assert_eq!(
            message(Route { topk_ids_stride: 1, ..good() }),
            "`topk_ids` has strides [1, 1], expected rows that do not overlap (at least 2 apart)"
        );
        assert_eq!(
            message(Route { aux_loss: true, ..good() }),
            "`aux_loss` is given, expected it to be absent: the specification names no auxiliary loss"
        );
        assert_eq!(
            message(Route { num_tokens: 1 << 31, ..good() }),
            "`num_tokens` is 2147483648, expected at most 2147483647"
        );
    }

    #[test]
    fn bad_arguments() {
        let plan = RoutePlan::new(&Route::new(&Router::new(16, 2), 3)).unwrap();
        let message = |args: RouteArgs| plan.check(&args).unwrap_err().to_string();
        let good = RouteArgs::new(0x1000, 0x2000, 0x3000);
        assert!(plan.check(&good).is_ok());
        assert_eq!(
            message(RouteArgs { logits: 0x1002, ..good }),
            "`logits` is 0x1002, expected a device pointer that is a multiple of 4"
        );
        assert_eq!(
            message(RouteArgs { dropped: Some(0x4004), ..good }),
            "`dropped` is 0x4004, expected a device pointer that is a multiple of 8"
        );
        assert_eq!(
            message(RouteArgs { topk_weights: 0x1004, ..good }),
            "`topk_weights` overlaps `logits`, expected separate memory"
        );
        assert_eq!(
            message(RouteArgs { selection_bias: Some(0x5000), ..good }),
            "`selection_bias` is given, expected it to be absent: the plan has none"
        );
    }
}
