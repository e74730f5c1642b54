//! The CPU backend: the functions of the crate on slices in `f32`, `bf16` and `f16`, with SIMD instructions found at run time.
//!
//! Every function takes a [`Cpu`] first: the instructions to use ([`Level`]) and a workspace. Threads are those of the rayon
//! pool that the caller is in. Results do not depend on the number of threads.

mod any;
mod attention;
mod expert_ffn;
mod float;
mod gemm;
mod level;
mod linear;
mod math;
mod mla;
mod moe;
mod norm;
mod pages;
mod parallel;
mod qkv;
mod retention;
mod route;
mod router_logits;
mod rows;
mod simd;
mod wkv;
mod workspace;

pub use attention::{attention, attention_workspace_bytes, merge, merge_workspace_bytes};
pub use expert_ffn::{PackedExperts, PackedFfn, expert_ffn, expert_ffn_workspace_bytes, mlp, mlp_workspace_bytes};
pub use float::Float;
pub use level::Level;
pub use linear::{PackedLinear, linear, linear_heads, linear_workspace_bytes};
pub use mla::{PackedMla, mla_absorb_query, mla_project_value, mla_workspace_bytes};
pub use moe::{PackedMoe, moe, moe_workspace_bytes};
pub use norm::{add, norm, sigmoid_mul};
pub use qkv::{kv_append, prepare_qkv, prepare_qkv_workspace_bytes, rope, rope_workspace_bytes};
pub use retention::{retention, retention_workspace_bytes};
pub use route::{route, route_workspace_bytes};
pub use router_logits::{router_logits, router_logits_workspace_bytes};
pub use wkv::{wkv, wkv_workspace_bytes};

use crate::error::Result;
use workspace::Workspace;

/// The instructions that calls use, and their workspace: make one and keep it.
pub struct Cpu {
    pub(crate) level: Level,
    pub(crate) workspace: Workspace,
}

impl Cpu {
    /// The best level of this machine, or what `GATEFOLD_CPU_LEVEL` caps it to; an empty workspace.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if `GATEFOLD_CPU_LEVEL` is not a level's name.
    pub fn new() -> Result<Cpu> {
        Ok(Cpu::with_level(Level::detect()?))
    }

    /// A chosen level; an empty workspace.
    pub const fn with_level(level: Level) -> Cpu {
        Cpu { level, workspace: Workspace::new() }
    }

    /// The level that calls use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Makes the workspace at least so large. A call that needs more makes it grow, which is the only heap allocation that a
    /// call does; reserve what the function's `*_workspace_bytes` tells, and there is none.
    pub fn reserve(&mut self, bytes: usize) {
        self.workspace.reserve(bytes);
    }

    /// Size of the workspace now.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.bytes()
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = f.debug_struct("Cpu");
        fields.field("level", &self.level).field("workspace_bytes", &self.workspace_bytes()).finish()
    }
}
