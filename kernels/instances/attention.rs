//! Instances of attention: head widths in buckets, padded with zeros.

use super::{Instance, Value};

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::{Dtype, Int};
    // Widths of keys and values, rows of a CTA, keys of a tile. Four warps: two row blocks of 16 each where there are 128 rows, which
    // reads K and V from shared memory half as often; the tiles of keys are what then leaves the registers without a spill. Two
    // shapes of one width have the same tiles of keys, so that they give the same bits.
    for (head_dim, value_dim, rows, kv_tile) in [
        (64, 64, 64, 64),
        (64, 64, 128, 64),
        (80, 80, 128, 64),
        (96, 96, 128, 32),
        (128, 128, 64, 32),
        (128, 128, 128, 32),
        (192, 128, 128, 32),
        (192, 192, 64, 32),
        (256, 256, 64, 32),
    ] {
        for dtype in ["bf16", "f16"] {
            // Rows an odd number of 16 bytes apart.
            let pitch = |width: u32| 16 * ((width / 8) | 1);
            table.push(Instance {
                template: "attention_prefill",
                variant: format!("{dtype}_d{head_dim}_{value_dim}_m{rows}"),
                version: "7.0",
                target: "sm_80",
                values: vec![
                    ("DTYPE", Dtype(dtype)),
                    ("HEAD_DIM", Int(head_dim)),
                    ("VALUE_DIM", Int(value_dim)),
                    ("ROWS", Int(rows)),
                    ("KV_TILE", Int(kv_tile)),
                    ("THREADS", Int(128)),
                    ("SHARED_BYTES", Int((rows + kv_tile) * pitch(head_dim) + kv_tile * pitch(value_dim))),
                ],
            });
        }
    }
    for width in [64, 128, 256] {
        table.push(Instance {
            template: "attention_f32",
            variant: format!("d{width}"),
            version: "7.0",
            target: "sm_80",
            values: vec![
                ("WIDTH", Int(width)),
                ("ROWS", Int(16)),
                ("KV_TILE", Int(32)),
                ("THREADS", Int(128)),
                ("SHARED_BYTES", Int(4 * (16 * (width + 4) + 32 * (width + 1) + 32 * width))),
            ],
        });
    }
}
