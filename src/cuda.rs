//! The GPU backend: hand-written PTX for NVIDIA GPUs from A100 on, compiled by the driver at run time.
//!
//! Nothing is needed to build it, and a machine without a driver or a GPU gets [`Error::NoDevice`](crate::Error::NoDevice)
//! instead of a panic. Three layers:
//!
//! 1. A **plan** ([`NormPlan`], [`ElementwisePlan`], ...): from shapes, element type and strides to kernel and grid.
//!    Pure data, made and tested without a GPU; all errors of shape are found here.
//! 2. Its **launch**: `unsafe`, on device pointers as `u64` and any stream of any library. Does not allocate, copy or
//!    wait, so it can be captured into a graph once `warmup` has loaded the kernels.
//! 3. **Safe calls** on borrowed device memory ([`DeviceView`]), with the names and arguments of [`cpu`](crate::cpu), after a
//!    [`Queue`] instead of a `Cpu`. Arrays of cudarc are lent to them by `Lent` and `LentMut`.
//!
//! [`Device`] needs feature `cuda`; plans do not.

mod attention;
mod combine;
#[cfg(feature = "cuda")]
mod device;
#[doc(hidden)]
pub mod driver;
mod elementwise;
mod expert_ffn;
mod ffn;
mod group_tokens;
mod grouped_gemm;
#[doc(hidden)]
pub mod kernels;
#[cfg(feature = "cuda")]
mod lent;
mod linear;
mod memory;
mod mla;
mod moe;
mod norm;
mod qkv;
mod retention;
mod route;
mod router_logits;
mod rows;
#[cfg(feature = "cuda")]
mod sys;
mod wkv;

pub use attention::{
    AttentionArgs, AttentionInput, AttentionOutput, AttentionPlan, AttentionProblem, Kv, KvShape, Merge, MergeArgs,
    MergePlan, attention, merge,
};
pub use combine::{Combine, CombineArgs, CombineInput, CombinePlan, CombineSharedArgs, combine};
#[cfg(feature = "cuda")]
pub use device::Device;
pub use driver::Stream;
pub use elementwise::{ElementwiseArgs, ElementwiseOp, ElementwisePlan, ElementwiseProblem, add, sigmoid_mul};
pub use expert_ffn::{ExpertFfnArgs, ExpertFfnPlan, ExpertFfnProblem, Routing, expert_ffn};
pub use ffn::{ExpertWeights, FfnArgs, FfnStrides, FfnWeights, MlpArgs, MlpPlan, MlpProblem, mlp};
pub use group_tokens::{
    GroupTokens, GroupTokensArgs, GroupTokensOutput, GroupTokensPlan, GroupWeightsArgs, group_tokens,
};
pub use grouped_gemm::{F32Products, GemmRows, GroupedGemm, GroupedGemmArgs, GroupedGemmPlan};
#[cfg(feature = "cuda")]
pub use lent::{Lent, LentMut};
pub use linear::{linear, linear_heads};
pub use memory::{DeviceView, DeviceViewMut, Queue};
pub use mla::{mla_absorb_query, mla_project_value};
pub use moe::{MoeArgs, MoeInput, MoeOutput, MoePlan, MoeProblem, MoeRouting, MoeWeights, moe};
pub use norm::{NormArgs, NormPlan, NormProblem, ResidualArgs, norm};
pub use qkv::{
    KvCache, KvCacheMut, KvRows, QkvArgs, QkvArrays, QkvCache, QkvInput, QkvOutput, QkvPlan, QkvProblem, RopeTable,
    kv_append, prepare_qkv, prepare_qkv_append, rope,
};
pub use retention::{RetentionArgs, RetentionInput, RetentionOutput, RetentionPlan, RetentionProblem, retention};
pub use route::{Route, RouteArgs, RouteInput, RouteOutput, RoutePlan, route};
pub use router_logits::{RouterLogits, RouterLogitsArgs, RouterLogitsPlan, router_logits};
pub use wkv::{WkvArgs, WkvInput, WkvOutput, WkvPlan, WkvProblem, wkv};
