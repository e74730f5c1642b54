//! Instances of routers whose tokens are coupled: queues, expert choice, Sinkhorn.

use super::{Instance, Value};

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::Int;
    let mut push = |template, variant: &str, values: &[_]| {
        let (variant, values) = (variant.to_string(), values.to_vec());
        table.push(Instance { template, variant, version: "7.0", target: "sm_80", values });
    };
    for (template, variant) in [
        ("route_weights", "f64"),
        ("route_choice_keys", "f32"),
        ("route_choice_weights", "f64"),
        ("route_sinkhorn_exp", "f64"),
        ("route_sinkhorn_values", "f64"),
    ] {
        push(template, variant, &[("WARPS", Int(4))]);
    }
    push("route_queue", "u32", &[("THREADS", Int(512)), ("ITEMS", Int(8)), ("MAX_EXPERTS", Int(1024))]);
    push("route_digits", "u32", &[("THREADS", Int(256))]);
    push("route_choice_mark", "u32", &[("THREADS", Int(256))]);
    // One thread per sum: small blocks for many of them, loads ahead of the chain of additions.
    push("route_sinkhorn_rows", "f64", &[("THREADS", Int(64)), ("UNROLL", Int(4))]);
    push("route_sinkhorn_columns", "f64", &[("THREADS", Int(32)), ("UNROLL", Int(8))]);
}
