//! Instances of routing: logits, experts and weights of each token, losses.

use super::{Instance, Value};

/// Experts that one lane of a warp holds in registers: instances for up to 32, 64 .. 1024 experts.
const VALUES: [u32; 6] = [1, 2, 4, 8, 16, 32];

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::Int;
    let mut push = |template, variant: String, values| {
        table.push(Instance { template, variant, version: "7.0", target: "sm_80", values });
    };
    for values in VALUES {
        // Exponentials whose latencies overlap; beside many registers of keys, fewer.
        let unroll = if values < 16 { values.min(4) } else { 2 };
        let sizes = vec![("VALUES", Int(values)), ("UNROLL", Int(unroll)), ("WARPS", Int(4))];
        push("route", format!("e{}", 32 * values), sizes);
        let sizes = vec![("VALUES", Int(values)), ("UNROLL", Int(unroll))];
        push("route_losses", format!("e{}", 32 * values), sizes);
    }
    for template in ["route_prototypes", "route_sparse_mixer", "route_largest"] {
        push(template, "f32".into(), vec![("WARPS", Int(4))]);
    }
    for (template, threads) in [("route_clear", 128), ("route_losses_groups", 256), ("route_losses_total", 32)] {
        push(template, "f64".into(), vec![("THREADS", Int(threads))]);
    }
}
