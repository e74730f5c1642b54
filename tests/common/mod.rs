//! Shared test harness: seeded data, strided arrays with guard values, the derived tolerance with the naive method behind it, and whole
//! cases (all arguments of a call, owned) that run on any backend.
//!
//! A test makes a case from options and a seed, runs it once with the reference and once with what it tests, and compares
//! row by row:
//!
//! ```ignore
//! let case = AttentionCase::<bf16>::new(&options, seed);
//! let truth = case.run(reference::attention);
//! let got = case.run(|spec, input, output| cpu::attention(&mut cpu, spec, input, output));
//! let naive = naive::attention(&case.spec, &case.input(), naive::Store::Storage);
//! assert_rows("out", &got.out, &truth.out, &naive.out, case.spec.value_dim);
//! ```
#![allow(dead_code, unused_imports)] // Every test uses another part.

/// A value with some fields changed: specifications cannot be written as struct literals outside of their crate.
#[macro_export]
macro_rules! with {
    ($base:expr, $($field:ident: $value:expr),+ $(,)?) => {{
        let mut value = $base;
        $(value.$field = $value;)+
        value
    }};
}

pub mod attention_case;
pub mod attention_pairs;
pub mod buffer;
pub mod data;
pub mod glue_case;
pub mod linear_case;
pub mod mixture_case;
pub mod mixtures;
pub mod moe_case;
pub mod naive;
pub mod pairs;
pub mod routing;
pub mod simulator;
pub mod skip;
pub mod strategies;
pub mod sums;
pub mod tables;
pub mod tolerance;

pub use attention_case::{AttentionCase, AttentionOptions, AttentionResult};
pub use attention_pairs::AttentionPairs;
pub use buffer::{Array, Layout, Output};
pub use data::Rng;
pub use mixture_case::{MoeCase, MoeResult};
pub use moe_case::{ExpertCase, ExpertOptions, GateUp, RouteCase, RouteResult};
pub use tolerance::{assert_close, assert_rows, check_rows};

/// The seed of a test: `GATEFOLD_TEST_SEED`, else a constant. Printed, so that a failure tells how to come back.
pub fn seed() -> u64 {
    let seed = match std::env::var("GATEFOLD_TEST_SEED") {
        Ok(text) => text.parse().expect("GATEFOLD_TEST_SEED is a number"),
        Err(_) => 20_260_101,
    };
    println!("GATEFOLD_TEST_SEED={seed}");
    seed
}

/// Names of all functions of the CPU backend but those that tell the size of a workspace, from its list of exports.
pub fn cpu_functions() -> Vec<&'static str> {
    let exports = include_str!("../../src/cpu.rs").lines();
    let names: Vec<&str> = exports
        .filter_map(|line| line.strip_prefix("pub use ")?.split_once("::"))
        .flat_map(|(_, names)| names.split(['{', '}', ',', ';', ' ']))
        .filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()) && !name.ends_with("_workspace_bytes"))
        .collect();
    assert!(names.len() >= 19 && names.contains(&"moe"), "{names:?}");
    names
}
