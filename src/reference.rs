//! The truth: every function in scalar code that reads like its formula, any element type in, f64 inside and out.
//!
//! Nothing here is fast and nothing is clever: sums run in order, one index at a time, over plain vectors. All other
//! backends have functions of the same names with the same arguments, and are tested against these. The documentation of each
//! function is the definition: formula, shapes, the rule for every edge, errors, source.
//!
//! Rules that hold for all of them:
//! * Zero tokens, sequences without rows and experts without tokens are legal.
//! * When a function returns an error, it has written nothing.
//! * A NaN goes where the formula takes it; functions that couple rows say which rows it may reach.

mod attention;
mod erf;
mod ffn;
mod linear_attention;
mod mla;
mod moe;
mod norm;
mod qkv;
mod route;
mod softmax;

pub use attention::{attention, merge};
pub use ffn::{expert_ffn, linear, mlp};
pub use linear_attention::{retention, wkv};
pub use mla::{mla_absorb_query, mla_project_value};
pub use moe::moe;
pub use norm::{add, norm, sigmoid_mul};
pub use qkv::{kv_append, prepare_qkv, rope};
pub use route::{route, router_logits};
