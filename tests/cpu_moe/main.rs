//! Experts, dense blocks and whole mixtures on the CPU, at every level, against the reference.

#[path = "../common/mod.rs"]
mod common;

mod experts;
mod mixture;
