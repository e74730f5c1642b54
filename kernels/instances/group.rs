//! Instances of what stands between router and experts: the sort of assignments by expert, and the sum per token.

use super::{ALIGNMENTS, DTYPES, Instance, Value};

/// Most local experts: with them the counts of 16 warps fill 78 KiB of shared memory.
const MAX_EXPERTS: u32 = 2048;

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::{Dtype, Flag, Int};
    // 512 threads with 8 assignments each: 512 tokens of 8 experts in one launch.
    let sort = [("THREADS", Int(512)), ("ITEMS", Int(8)), ("MAX_EXPERTS", Int(MAX_EXPERTS))];
    let round = ("ROUND", Int(4096)); // what group_scatter takes in one round
    let scan = [("THREADS", Int(1024)), ("UNROLL", Int(8))]; // 32 warps: as many parts of the tiles
    for (template, values) in [
        ("group_tokens", sort.to_vec()),
        ("group_count", [&sort[..], &[round]].concat()),
        ("group_scan", scan.to_vec()),
        ("group_scatter", sort.to_vec()),
    ] {
        table.push(Instance { template, variant: "u32".into(), version: "7.0", target: "sm_80", values });
    }
    for (dtype, vec) in DTYPES {
        for (aligned, suffix) in ALIGNMENTS {
            table.push(Instance {
                template: "combine",
                variant: format!("{dtype}{suffix}"),
                version: "7.0",
                target: "sm_80",
                values: vec![
                    ("DTYPE", Dtype(dtype)),
                    ("ALIGNED", Flag(aligned)),
                    ("VEC", Int(vec)),
                    ("UNROLL", Int(4)), // two rounds of loads for 8 experts per token
                    ("THREADS", Int(128)),
                    ("COLS_PER_CTA", Int(128 * vec)),
                ],
            });
        }
    }
}
