//! Instances of attention's decode: split keys, and the merge of the parts.

use super::{DTYPES, Instance, Value};

/// Sizes of a decode kernel for 16-bit types.
struct Decode {
    /// Widest keys and values; narrower ones are padded with zeros in shared memory.
    cols: (u32, u32),
    /// Values are the first columns of the keys.
    shared_kv: bool,
    /// Rows begin at multiples of 16 bytes, and are as long.
    aligned: bool,
    /// Warps along rows of queries (16 each), and along keys and columns.
    warps: (u32, u32),
    /// Keys of a tile.
    keys: u32,
    /// Tiles in shared memory.
    stages: u32,
    /// Keys of a split.
    split: u32,
    /// CTAs of an SM that ptxas leaves registers for: as many as the shared memory of an H100 has room for, if that spills nothing.
    ctas: u32,
}

/// Bytes fit 99 KiB (RTX) unless there is a twin that does; a split is the same for all twins, so that it never depends on the device.
///
/// Fewer widths than prefill has: memory bounds a decode, and what it reads are keys and values of the true width, padded in shared memory.
/// Warp instructions for a KiB of them, 8 heads on one: 133 at width 64, in the kernel for 128 134 at 80, 112 at 96 and 84 at 128, in that for
/// 256 67 at 192 and 50 at 256. So a width between two kernels costs no more of them than the narrowest does, within 1 %, and no padding is read
/// (`decode_counters_between_widths`).
const DECODES: [Decode; 10] = [
    // Narrow rows in larger tiles: what a tile costs besides its bytes is spread over more of them.
    Decode { ctas: 3, ..Decode::new((64, 64), (1, 4), (64, 3), 256) },
    Decode { aligned: false, ctas: 3, ..Decode::new((64, 64), (1, 4), (64, 3), 256) },
    Decode { ctas: 3, ..Decode::new((128, 128), (1, 4), (32, 4), 256) },
    Decode::new((192, 128), (1, 4), (32, 4), 256),
    Decode::new((256, 256), (1, 4), (32, 2), 256),
    // Rows of any width and address, copied element by element.
    Decode { aligned: false, ..Decode::new((256, 256), (1, 4), (32, 2), 256) },
    // Absorbed MLA: latent rows and values apart; values that are columns of the keys, for few heads and for many.
    Decode::new((576, 512), (1, 2), (16, 2), 512),
    Decode { aligned: false, ..Decode::new((576, 512), (1, 2), (16, 2), 512) },
    Decode { shared_kv: true, ..Decode::new((576, 512), (1, 4), (32, 2), 512) },
    Decode { shared_kv: true, ctas: 1, ..Decode::new((576, 512), (4, 2), (32, 2), 512) },
];

impl Decode {
    const fn new(cols: (u32, u32), warps: (u32, u32), (keys, stages): (u32, u32), split: u32) -> Self {
        Decode { cols, shared_kv: false, aligned: true, warps, keys, stages, split, ctas: 2 }
    }

    /// Dynamic shared memory, as the template lays it out: queries, stages, scores, addresses.
    fn shared_bytes(&self) -> u32 {
        let rows = 16 * self.warps.0;
        let row_bytes = 2 * (self.cols.0 + if self.shared_kv { 0 } else { self.cols.1 });
        let address = if self.shared_kv { 8 } else { 16 };
        rows * 2 * self.cols.0 + self.stages * self.keys * row_bytes + rows * 4 * (self.keys + 8) + self.split * address
    }
}

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    use Value::{Dtype, Flag, Int};
    for dtype in ["bf16", "f16"] {
        for decode in &DECODES {
            let Decode { cols, shared_kv, aligned, warps, keys, stages, split, ctas } = *decode;
            let kind = match (shared_kv, aligned) {
                (true, _) => format!("_shared_{}", 16 * warps.0),
                (false, true) => String::new(),
                (false, false) => "_unaligned".into(),
            };
            table.push(Instance {
                template: "attention_decode",
                variant: format!("{dtype}_{}_{}{kind}", cols.0, cols.1),
                version: "7.0",
                target: "sm_80",
                values: vec![
                    ("DTYPE", Dtype(dtype)),
                    ("KEY_COLS", Int(cols.0)),
                    ("VALUE_COLS", Int(cols.1)),
                    ("SHARED_KV", Flag(shared_kv)),
                    ("ALIGNED", Flag(aligned)),
                    ("ROW_GROUPS", Int(warps.0)),
                    ("COL_GROUPS", Int(warps.1)),
                    ("KEYS", Int(keys)),
                    ("STAGES", Int(stages)),
                    ("SPLIT", Int(split)),
                    ("CTAS", Int(ctas)),
                    ("SHARED_BYTES", Int(decode.shared_bytes())),
                ],
            });
        }
    }
    table.push(Instance {
        template: "attention_decode_f32",
        variant: "f32".into(),
        version: "7.0",
        target: "sm_80",
        values: vec![("ROWS", Int(8)), ("KEYS", Int(16)), ("MAX_VALUE_COLS", Int(512)), ("SPLIT", Int(256))],
    });
    for (parts, _) in DTYPES {
        for (out, _) in DTYPES {
            table.push(Instance {
                template: "attention_merge",
                variant: format!("{parts}_{out}"),
                version: "7.0",
                target: "sm_80",
                values: vec![
                    ("PARTS", Dtype(parts)),
                    ("OUT", Dtype(out)),
                    ("THREADS", Int(256)),
                    ("UNROLL", Int(4)), // with 8 warps: 32 parts at once, a context of 8192 keys
                    ("COLS_PER_CTA", Int(128)),
                ],
            });
        }
    }
}
