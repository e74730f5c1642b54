//! Instances of routing: logits, experts and weights of each token, losses.

use super::{Instance, Value};

/// Experts that one lane of a warp holds in registers: instances for up to 32, 64 .. 1024 experts.
const VALUES: [u32; 6] = [1, 2, 4, 8, 16, 32];

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::Int;
    for values in VALUES {
        table.push(Instance {
            template: "route",
            variant: format!("e{}", 32 * values),
            version: "7.0",
            target: "sm_80",
            values: vec![
                ("VALUES", Int(values)),
                ("UNROLL", Int(values.min(4))), // exponentials whose latencies overlap
                ("WARPS", Int(4)),
            ],
        });
    }
    table.push(Instance {
        template: "route_clear",
        variant: "u32".into(),
        version: "7.0",
        target: "sm_80",
        values: vec![("THREADS", Int(128))],
    });
}
