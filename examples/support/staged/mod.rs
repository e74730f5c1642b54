//! The CUDA backend's functions on arrays of the host: copied to the device as they lie (strides and all), run there, copied
//! back. For tests and examples, where the arguments are those of the reference; a framework keeps its arrays on the device, as
//! `resident` does.
//!
//! One module per family, with the names and arguments of `gatefold::cpu`, after a [`Driver`](gatefold::cuda::driver::Driver).
#![allow(dead_code, unused_imports)] // each user takes its own part

mod arrays;
mod attention;
mod glue;
mod linear;
mod linear_attention;
mod merge;
mod moe;
mod qkv;
mod route;

pub use arrays::{Staged, StagedMut, vector};
pub use attention::attention;
pub use glue::{add, norm, sigmoid_mul};
pub use linear::{
    linear, linear_heads, linear_heads_with, linear_with, mla_absorb_query, mla_absorb_query_with, mla_project_value,
};
pub use linear_attention::{retention, wkv};
pub use merge::merge;
pub use moe::{
    StagedExperts, StagedFfn, StagedMoe, StagedRouting, expert_ffn, expert_ffn_with, mlp, mlp_with, moe, moe_with,
    router_logits_with,
};
pub use qkv::{kv_append, prepare_qkv, prepare_qkv_append, rope};
pub use route::{StagedRoute, route, router_logits};
