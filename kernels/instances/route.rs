//! Instances of routing: logits, experts and weights of each token, losses.

use super::{ALIGNMENTS, Instance, Value};

/// Experts that one lane of a warp holds in registers: instances for up to 32, 64 .. 1024 experts.
const VALUES: [u32; 6] = [1, 2, 4, 8, 16, 32];

/// Element types of hidden states and weights of the router's logits without tensor cores: two of 16 bits that are equal have
/// them.
const PAIRS: [(&str, &str); 7] = [
    ("f32", "f32"),
    ("f32", "bf16"),
    ("f32", "f16"),
    ("bf16", "f32"),
    ("f16", "f32"),
    ("bf16", "f16"),
    ("f16", "bf16"),
];

/// Tiles on tensor cores: blocks of 16 experts, blocks of 8 tokens, unroll. Without alignment only the first one.
const MMA_TILES: [(u32, u32, u32); 3] = [(1, 1, 4), (1, 4, 2), (4, 4, 1)];

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::{Dtype, Flag, Int};
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
    for dtype in ["bf16", "f16", "f32"] {
        push("router_jitter", dtype.into(), vec![("DTYPE", Dtype(dtype)), ("THREADS", Int(256))]);
    }
    for (dtype, weight) in PAIRS {
        // Tokens and experts of a warp, log2 of the latter, unroll: for few tokens (and any alignment), for many.
        for (name, tokens, experts, unroll, aligned) in
            [("_t2", 2, 1, 4, true), ("_t8", 8, 4, 1, true), ("_unaligned", 2, 1, 4, false)]
        {
            let sizes = vec![
                ("DTYPE", Dtype(dtype)),
                ("WEIGHT", Dtype(weight)),
                ("ALIGNED", Flag(aligned)),
                ("TOKENS", Int(tokens)),
                ("EXPERTS", Int(experts)),
                ("SHIFT", Int(experts.ilog2())),
                ("UNROLL", Int(unroll)),
                ("WARPS", Int(4)),
            ];
            push("router_logits", format!("{dtype}_{weight}{name}"), sizes);
        }
    }
    for dtype in ["bf16", "f16"] {
        for (aligned, suffix) in ALIGNMENTS {
            for (expert_tiles, token_tiles, unroll) in MMA_TILES {
                if !aligned && expert_tiles * token_tiles > 1 {
                    continue;
                }
                let sizes = vec![
                    ("DTYPE", Dtype(dtype)),
                    ("ALIGNED", Flag(aligned)),
                    ("EXPERT_TILES", Int(expert_tiles)),
                    ("TOKEN_TILES", Int(token_tiles)),
                    ("UNROLL", Int(unroll)),
                ];
                push("router_logits_mma", format!("{dtype}_{}x{}{suffix}", 16 * expert_tiles, 8 * token_tiles), sizes);
            }
        }
    }
}
