//! Instances of the matrix products: experts of a mixture, linear layers.

use super::{DTYPES, Instance, Value};

/// A row tile and what goes with it.
#[derive(Clone, Copy)]
struct Tile {
    /// Rows of one tile.
    rows: u32,
    /// Rows of weights of one tile, those of gate and up together.
    weights: u32,
    threads: u32,
    /// Stages of the ring, what every device has room for (99 KiB), and more where they cost no block.
    stages: [u32; 2],
    /// Blocks that the registers of a multiprocessor hold.
    ctas: u32,
}

/// 16 rows and fewer are bound by the bytes of the weights: more blocks, deeper rings. 128 rows are bound by the products.
///
/// There are no tiles of 8 rows with exchanged operands (16 rows of weights, 8 tokens). Counted in the simulator, their main loop takes
/// 2400 warp instructions for 64 KiB of weights where that of 16 rows takes 2720, gated 4992 against 5632 for 128 KiB: 27.3 bytes an
/// instruction against 24.1. What a block has in flight is the same, its stages but one of 8 KiB of weights; a stage has 9 KiB instead of
/// 10, so that 227 KiB hold four blocks instead of three. An eighth of the instructions of a loop that waits for memory is not worth a fifth list of tiles in the sort, eight instances,
/// and a second layout of the sums, whose equal bits would rest on tensor cores that add alike for exchanged operands, which nobody
/// promises. What does count is rows of weights in a tile: the loop's fixed part is shared by 64 of them.
const TILES: [Tile; 4] = [
    Tile { rows: 16, weights: 64, threads: 128, stages: [6, 8], ctas: 4 },
    Tile { rows: 32, weights: 64, threads: 128, stages: [6, 8], ctas: 4 },
    Tile { rows: 64, weights: 128, threads: 128, stages: [4, 5], ctas: 2 },
    Tile { rows: 128, weights: 128, threads: 256, stages: [3, 4], ctas: 2 },
];

/// Without tensor cores: products bound all but the fewest rows, and their operands come through registers.
const F32_TILES: [Tile; 4] = [
    Tile { rows: 16, weights: 128, threads: 128, stages: [4, 5], ctas: 4 },
    Tile { rows: 32, weights: 128, threads: 128, stages: [4, 5], ctas: 3 },
    Tile { rows: 64, weights: 128, threads: 128, stages: [4, 5], ctas: 2 },
    Tile { rows: 128, weights: 128, threads: 256, stages: [3, 4], ctas: 1 },
];

/// Adds them to the table.
pub fn add(table: &mut Vec<Instance>) {
    for (dtype, _) in DTYPES {
        for tile in if dtype == "f32" { F32_TILES } else { TILES } {
            add_instance(table, tile, dtype, dtype, "");
            add_instance(table, tile, dtype, dtype, "_gated");
            if dtype != "f32" {
                add_instance(table, tile, dtype, "f32", "");
                add_instance(table, tile, dtype, "f32", "_gated");
            }
            // For one matrix per head, which is small.
            if [16, 64].contains(&tile.rows) {
                add_instance(table, tile, dtype, dtype, "_transposed");
            }
        }
    }
    // The tiles of 16-bit products, half as many k in one.
    for tile in TILES {
        add_instance(table, tile, "tf32", "f32", "");
        add_instance(table, tile, "tf32", "f32", "_gated");
    }
}

/// `products`: the type of the values that are multiplied, which is that of the arrays but for tf32.
fn add_instance(table: &mut Vec<Instance>, tile: Tile, products: &'static str, out: &'static str, suffix: &str) {
    use Value::{Dtype, Flag, Int};
    let tf32 = products == "tf32";
    let dtype = if tf32 { "f32" } else { products };
    // Sums that leave the tensor core need registers on their way.
    let ctas = if out != dtype && tile.rows == 128 { 1 } else { tile.ctas };
    let types = if out == dtype { products.to_string() } else { format!("{dtype}_{out}") };
    let gated = suffix == "_gated";
    table.push(Instance {
        template: "grouped_gemm",
        variant: format!("{types}_m{}{suffix}", tile.rows),
        version: "7.0",
        target: "sm_80",
        values: vec![
            ("DTYPE", Dtype(dtype)),
            ("OUT", Dtype(out)),
            ("TF32", Flag(tf32)),
            ("GATED", Flag(gated)),
            ("TRANSPOSED", Flag(suffix == "_transposed")),
            ("TILE_M", Int(tile.rows)),
            ("TILE_N", Int(tile.weights)),
            ("THREADS", Int(tile.threads)),
            ("STAGES", Int(tile.stages[0])),
            ("DEEP_STAGES", Int(tile.stages[1])),
            ("CTAS", Int(ctas)),
            ("STAGE_BYTES", Int((tile.rows + tile.weights) * 128)),
            ("TILE_COLS", Int(tile.weights / if gated { 2 } else { 1 })),
            ("SUPER_TILES", Int(16)),
        ],
    });
}
