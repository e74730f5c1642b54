//! A launch of a plan allocates nothing, neither on the device nor on the host: counted by an allocator, on a driver that does
//! nothing. So it can be captured into a graph, and costs no more than the driver's own call. And it asks for no more shared memory
//! than a device has, on devices of three sizes.

use gatefold::cuda::driver::{Driver, Launch, Limits};
use gatefold::cuda::kernels::Kernel;
use gatefold::cuda::*;
use gatefold::spec::*;
use gatefold::{Dtype, Result};
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "common/allocations.rs"]
mod allocations;
use allocations::ALLOCATIONS;

/// Counts launches and refuses everything else.
struct Nothing {
    limits: Limits,
    launches: AtomicUsize,
}

impl Driver for Nothing {
    fn limits(&self) -> Limits {
        self.limits
    }
    fn allocate(&self, _: usize) -> Result<u64> {
        panic!("a launch allocates on the device")
    }
    unsafe fn free(&self, _: u64) -> Result<()> {
        panic!("a launch frees")
    }
    unsafe fn copy_to_device(&self, _: u64, _: &[u8]) -> Result<()> {
        panic!("a launch copies")
    }
    unsafe fn copy_to_host(&self, _: &mut [u8], _: u64) -> Result<()> {
        panic!("a launch copies")
    }
    fn load(&self, _: &'static Kernel) -> Result<()> {
        panic!("a launch loads")
    }
    unsafe fn launch(&self, kernel: &'static Kernel, launch: &Launch, params: &[u8], _: Stream) -> Result<()> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        let shared_bytes = kernel.static_shared_bytes + launch.dynamic_shared_bytes;
        assert!(shared_bytes <= self.limits.shared_bytes, "{}: {shared_bytes} bytes of shared memory", kernel.entry);
        launch.check(kernel, &self.limits(), params)
    }
    fn synchronize(&self, _: Stream) -> Result<()> {
        panic!("a launch waits")
    }
}

/// The address of an array, far from all others.
fn at(i: u64) -> u64 {
    i << 32
}

/// Launches, and counts what was allocated meanwhile.
fn check(name: &str, limits: Limits, launch: impl Fn(&Nothing) -> Result<()>) {
    let driver = Nothing { limits, launches: AtomicUsize::new(0) };
    let before = ALLOCATIONS.get();
    let result = launch(&driver);
    let count = ALLOCATIONS.get() - before;
    result.unwrap_or_else(|error| panic!("{name}, {limits:?}: {error}"));
    assert_eq!(count, 0, "{name} allocates, {limits:?}");
    assert!(driver.launches.load(Ordering::Relaxed) > 0, "{name} launches nothing, {limits:?}");
}

/// The shared memory that a CTA may ask for: RTX, A100, H100.
const DEVICES: [Limits; 3] =
    [Limits::new(89, 128, 99 << 10), Limits::new(80, 108, 163 << 10), Limits::new(90, 132, 227 << 10)];
const STREAM: Stream = Stream::LEGACY;

/// `plan.launch` on a driver that follows no pointer, for each of the devices: `limits`.
macro_rules! check {
    (|$limits:ident| $plan:expr, $args:expr) => {
        for $limits in &DEVICES {
            let (plan, args) = ($plan, $args);
            // SAFETY: nothing is launched, so no pointer is followed.
            check(stringify!($plan), *$limits, |driver| unsafe { plan.launch(driver, &args, STREAM) });
        }
    };
    ($plan:expr, $args:expr) => {
        check!(|_limits| $plan, $args)
    };
}

#[test]
fn rows() {
    let norm = NormProblem::new(Norm::rms(1e-6), Dtype::BF16, 5, 64);
    check!(NormPlan::new(&norm).unwrap(), NormArgs::new(at(1), at(2)).with_weight(at(3)).with_residual(at(4), at(5)));
    for op in [ElementwiseOp::add(0.5), ElementwiseOp::SigmoidMul, ElementwiseOp::SiluMul] {
        let problem = ElementwiseProblem::new(op, Dtype::F16, 5, 63);
        check!(ElementwisePlan::new(&problem).unwrap(), ElementwiseArgs::new(at(1), at(2), at(3)));
    }
    let merge = Merge::new(Dtype::F32, [3, 5, 4, 64]);
    check!(MergePlan::new(&merge).unwrap(), MergeArgs::new(at(1), at(2), at(3)).with_lse(at(4)));
    let combine = Combine::new(Dtype::BF16, 5, 2, 64);
    let args = CombineArgs::new(at(1), at(2), at(3)).with_weights(at(4)).with_shared(at(5), Some(at(6)));
    check!(CombinePlan::new(&combine).unwrap(), args.with_residual(at(7)));
    // The most slots of a token, and the most experts to sort by
    let combine = Combine::new(Dtype::F32, 5, 3071, 64);
    check!(CombinePlan::new(&combine).unwrap(), CombineArgs::new(at(1), at(2), at(3)).with_weights(at(4)));
    let experts = ExpertFfn::new(2048, Ffn::gated(256, 128, Activation::Silu));
    for num_tokens in [1, 5000] {
        let sort = GroupTokensArgs::new(at(1), at(2), at(3), at(4), at(5), at(6)).with_workspace(at(7));
        check!(GroupTokensPlan::new(&GroupTokens::new(&experts, num_tokens, 8)).unwrap(), sort);
    }
}

/// Two sequences with a cache.
fn attend(spec: &Attention, dtype: Dtype, tokens: usize, max_q_len: usize) {
    let mut problem = AttentionProblem::new(spec.clone(), dtype, 2, tokens, KvShape::cache(4096));
    (problem.max_q_len, problem.max_kv_len) = (max_q_len, 4096);
    let mut args = AttentionArgs::new(at(1), at(2), at(2), at(4));
    (args.cu_seqlens_q, args.kv_lens, args.workspace) = (Some(at(5)), Some(at(6)), at(7));
    if spec.head_dim <= 256 {
        args.v = at(3);
    } else {
        problem.v_strides = problem.k_strides;
    }
    check!(|limits| AttentionPlan::new(&problem, limits).unwrap(), args);
}

#[test]
fn attention() {
    let mut spec = Attention::new(8, 2, 64);
    spec.mask.causal = true;
    let widths = [(64, 64), (128, 128), (192, 128), (256, 256)];
    for (head_dim, value_dim) in widths {
        (spec.head_dim, spec.value_dim) = (head_dim, value_dim);
        for (tokens, max_q_len) in [(2, 1), (80, 40), (400, 200)] {
            attend(&spec, Dtype::BF16, tokens, max_q_len);
            attend(&spec, Dtype::F32, tokens, max_q_len);
        }
    }
    // Latent rows, whose values are their first columns
    let mla = Mla::new(128, 512, 128, 64, 128);
    let absorbed = mla.absorbed(&mla.expanded());
    attend(&absorbed, Dtype::BF16, 2, 1);
    attend(&absorbed, Dtype::F32, 2, 1);
    let problem = QkvProblem::new(QkvPrep::new(8, 2, 64), Dtype::BF16, 5, 100);
    let mut args = QkvArgs::default();
    (args.q, args.k, args.v, args.q_out, args.k_out, args.v_out) = (at(1), at(2), at(3), at(4), at(5), at(6));
    args.positions = at(7);
    check!(QkvPlan::new(&problem).unwrap(), args);
}

#[test]
fn linear_attention() {
    let mut args = RetentionArgs::default();
    (args.q, args.k, args.v, args.decay, args.out) = (at(1), at(2), at(3), at(4), at(5));
    (args.state_in, args.state_out) = (at(6), at(7));
    // Up to the widest key
    for head_dim in [32, 792] {
        let problem = RetentionProblem::new(Retention::new(4, head_dim, 64), Dtype::BF16, 37);
        check!(RetentionPlan::new(&problem).unwrap(), args);
    }
    let mut args = WkvArgs::default();
    (args.k, args.v, args.decay, args.first, args.out) = (at(1), at(2), at(3), at(4), at(5));
    (args.state_in, args.state_out) = (at(6), at(7));
    check!(WkvPlan::new(&WkvProblem::new(Dtype::F32, 2, 9, 100)).unwrap(), args);
}

#[test]
fn mixtures() {
    for num_tokens in [1, 40, 5000] {
        let mut router = Router::new(64, 8);
        router.groups = Some(ExpertGroups::new(8, 4, GroupScore::Top2Sum));
        let logits = RouterLogits::new(Dtype::BF16, num_tokens, 64, 256);
        let args = RouterLogitsArgs::new(at(1), at(2), at(3));
        check!(|limits| RouterLogitsPlan::new(&logits, limits).unwrap(), args);
        let route = RouteArgs::new(at(1), at(2), at(3));
        check!(RoutePlan::new(&Route::new(&router, num_tokens)).unwrap(), route);
        let experts = ExpertFfn::new(64, Ffn::gated(256, 128, Activation::Silu));
        let sort = GroupTokensArgs::new(at(1), at(2), at(3), at(4), at(5), at(6)).with_workspace(at(7));
        check!(GroupTokensPlan::new(&GroupTokens::new(&experts, num_tokens, 8)).unwrap(), sort);
        let product = GroupedGemm::linear(Dtype::BF16, num_tokens, 256, 128);
        let args = GroupedGemmArgs::new(at(1), at(2), at(3));
        check!(|limits| GroupedGemmPlan::new(&product, limits).unwrap(), args);
        let product = GroupedGemm::linear(Dtype::F32, num_tokens, 256, 128);
        check!(|limits| GroupedGemmPlan::new(&product, limits).unwrap(), args);
        let weights = FfnArgs::new(at(1), at(2), at(3));
        let block = MlpProblem::new(&experts.ffn, Dtype::BF16, num_tokens);
        check!(|limits| MlpPlan::new(&block, limits).unwrap(), MlpArgs::new(at(4), weights, at(5), at(6)));
        let problem = ExpertFfnProblem::new(&experts, Dtype::BF16, num_tokens, 8);
        let args = ExpertFfnArgs::new(at(4), at(5), at(6), weights, at(7), at(8));
        check!(|limits| ExpertFfnPlan::new(&problem, limits).unwrap(), args);
        let mut spec = Moe::new(router, experts);
        let mut shared = SharedExpert::new(experts.ffn);
        shared.sigmoid_gate = true;
        spec.shared = Some(shared);
        let mut args = MoeArgs::new(at(4), at(5), weights, at(6), at(7));
        (args.shared, args.shared_gate) = (Some(FfnArgs::new(at(8), at(9), at(10))), Some(at(11)));
        check!(|limits| MoePlan::new(&MoeProblem::new(&spec, Dtype::BF16, num_tokens), limits).unwrap(), args);
    }
}

/// Routers whose tokens are coupled take several steps, and losses three more.
#[test]
fn routers() {
    let mut score = Capacity::new(CapacityLimit::Factor(1.0));
    score.order = CapacityOrder::Score;
    let position = Capacity::new(CapacityLimit::Factor(1.0));
    for num_tokens in [1, 40, 5000] {
        for (selection, capacity, second_expert) in [
            (Selection::TopK, None, SecondExpert::Always),
            (Selection::TopK, Some(position), SecondExpert::Always),
            (Selection::TopK, Some(score), SecondExpert::Random),
            (Selection::ExpertChoice, Some(position), SecondExpert::Always),
            (Selection::Sinkhorn { iterations: 3 }, Some(score), SecondExpert::Always),
            (Selection::SparseMixer { jitter_eps: 0.1 }, None, SecondExpert::Always),
            (Selection::Prototypes, None, SecondExpert::Always),
        ] {
            let mut router = Router::new(64, 2);
            (router.selection, router.capacity, router.second_expert) = (selection, capacity, second_expert);
            router.aux_loss = Some(AuxLoss::Switch { group_len: Some(100) });
            let mut problem = Route::new(&router, num_tokens);
            (problem.aux_loss, problem.z_loss) = (true, true);
            let mut args = RouteArgs::new(at(1), at(2), at(3));
            (args.tokens_per_expert, args.dropped) = (Some(at(4)), Some(at(5)));
            (args.aux_loss, args.z_loss, args.workspace) = (Some(at(6)), Some(at(7)), at(8));
            check!(RoutePlan::new(&problem).unwrap(), args);
        }
    }
}

/// Every plan of the backend is launched here.
#[test]
fn no_plan_is_missing() {
    let exports =
        include_str!("../src/cuda.rs").split("pub use ").skip(1).flat_map(|list| list.split(['{', '}', ',', ';', ' ']));
    let plans: Vec<&str> = exports.map(str::trim).filter(|name| name.ends_with("Plan")).collect();
    assert!(plans.len() >= 12, "{plans:?}");
    for plan in plans {
        let launched = ["check!(", "check!(|limits| "].map(|check| format!("{check}{plan}::new("));
        assert!(launched.iter().any(|text| include_str!("cuda_alloc.rs").contains(text)), "{plan} is not launched");
    }
}
