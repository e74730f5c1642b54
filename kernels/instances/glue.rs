//! Instances of the glue around attention and experts: norms, products, rotations, copies.

use super::{ALIGNMENTS, DTYPES, Instance, Value};

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::{Dtype, Flag, Int};
    // Norm weights in f32, as the other backends take them, or in the activations' own type, as checkpoints hold them.
    for (dtype, vec) in DTYPES {
        for weight in if dtype == "f32" { vec![dtype] } else { vec![dtype, "f32"] } {
            for (aligned, suffix) in ALIGNMENTS {
                let types = if weight == dtype { dtype.to_string() } else { format!("{dtype}_{weight}") };
                table.push(Instance {
                    template: "norm",
                    variant: format!("{types}{suffix}"),
                    version: "7.0",
                    target: "sm_80",
                    values: vec![
                        ("DTYPE", Dtype(dtype)),
                        ("WEIGHT", Dtype(weight)),
                        ("ALIGNED", Flag(aligned)),
                        ("VEC", Int(vec)),
                        ("NUM_SUMS", Int(4)), // with 256 threads: 8192 columns of 16 bits in one round, most models' width
                        ("THREADS", Int(256)),
                    ],
                });
            }
        }
    }
    for (dtype, vec) in DTYPES {
        for (aligned, suffix) in ALIGNMENTS {
            table.push(Instance {
                template: "elementwise",
                variant: format!("{dtype}{suffix}"),
                version: "7.0",
                target: "sm_80",
                values: vec![
                    ("DTYPE", Dtype(dtype)),
                    ("ALIGNED", Flag(aligned)),
                    ("VEC", Int(vec)),
                    ("THREADS", Int(128)),
                    ("COLS_PER_CTA", Int(128 * vec)),
                ],
            });
        }
    }
    for (dtype, vec) in DTYPES {
        for (aligned, suffix) in ALIGNMENTS {
            table.push(Instance {
                template: "qkv",
                variant: format!("{dtype}{suffix}"),
                version: "7.0",
                target: "sm_80",
                values: vec![
                    ("DTYPE", Dtype(dtype)),
                    ("ALIGNED", Flag(aligned)),
                    ("VEC", Int(vec)),
                    ("THREADS", Int(128)),
                ],
            });
        }
    }
}
