//! The GEMM core: `c[t, o] = sum_k a[t, k] w[o, k]` with weights packed once, at load.
//!
//! ```text
//! panel   32 outputs: [k][32] for f32 and f16, [k / 2][32][2] for bf16 (what `vdpbf16ps` reads); every level reads the same
//! tile    up to 12 tokens x 32 outputs, accumulated in registers over a block of k by one micro-kernel (`tile`)
//! block   up to 8 tiles of tokens x some panels, over all k: what one worker computes at a time (`multiply`)
//! ```
//!
//! The sum of an element runs over k in order, in one f32 accumulator, whatever the tile, the block or the number of
//! tokens; between blocks of k it is stored as f32 and taken up again. So a token's result is the same bits alone or among
//! others. Packing of activations and what becomes of a finished tile are the caller's ([`Activations`], [`Epilogue`]).

pub mod cache;
pub mod pack;
pub mod product;
mod tile;

use super::simd::Simd;
use product::Product;
use std::ops::Range;
use tile::Ahead;

/// Outputs (rows of a weight matrix) in a panel.
pub const PANEL: usize = 32;

/// Most tokens in a tile at any level.
pub const MAX_TILE: usize = 12;

/// Tiles of tokens in a block.
const BLOCK_TILES: usize = 8;

/// Tokens in a block.
pub const fn block_tokens(tile_tokens: usize) -> usize {
    BLOCK_TILES * tile_tokens
}

/// Panels that `outputs` rows fill.
pub const fn num_panels(outputs: usize) -> usize {
    outputs.div_ceil(PANEL)
}

/// Rows of the next tile when `left` tokens remain: full tiles, the last two of about equal size. Sizes are those that the
/// micro-kernel has, so the last tile may have a row or two more than tokens.
const fn tile_rows(tile_tokens: usize, left: usize) -> usize {
    let wanted = if left >= 2 * tile_tokens {
        tile_tokens
    } else if left > tile_tokens {
        left.div_ceil(2)
    } else {
        left
    };
    let rows = if wanted <= 4 { wanted } else { wanted.next_multiple_of(2) };
    if rows < tile_tokens { rows } else { tile_tokens }
}

/// One tile of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileSpan {
    /// First token, within the block.
    pub token: usize,
    /// Tokens.
    pub tokens: usize,
    /// First row, within the packed rows of the block.
    pub row: usize,
    /// Rows: at least `tokens`.
    pub rows: usize,
}

/// The tiles of a block of `tokens` tokens, in order.
pub fn tiles(tile_tokens: usize, tokens: usize) -> impl Iterator<Item = TileSpan> {
    let (mut token, mut row) = (0, 0);
    std::iter::from_fn(move || {
        if token == tokens {
            return None;
        }
        let rows = tile_rows(tile_tokens, tokens - token);
        let span = TileSpan { token, tokens: rows.min(tokens - token), row, rows };
        token += span.tokens;
        row += rows;
        Some(span)
    })
}

/// Packed rows of `tokens` tokens, cut into blocks and those into tiles.
pub fn padded_rows(tile_tokens: usize, tokens: usize) -> usize {
    let block = block_tokens(tile_tokens);
    let whole = tokens / block * block;
    whole + tiles(tile_tokens, tokens - whole).map(|tile| tile.rows).sum::<usize>()
}

/// Where a block's activations come from, as words of tiles: `[k words][rows]`.
pub trait Activations<S: Simd, P: Product> {
    /// Called before the tiles of a range of steps are asked for; ranges come in order.
    fn prepare(&mut self, simd: S, steps: Range<usize>);
    /// The words of a tile for the range of steps last prepared.
    fn tile(&self, tile: TileSpan, steps: Range<usize>) -> &[P::A];
}

/// What becomes of a finished tile.
pub trait Epilogue<S: Simd> {
    /// `c`: `[rows][PANEL]`, the sums, which may be overwritten. `panel` counts within the weights.
    fn tile(&mut self, simd: S, panel: usize, tile: TileSpan, c: &mut [f32]);
}

/// Sizes of a block's loops.
#[derive(Clone, Copy, Debug)]
pub struct Blocking {
    /// Steps of k that one call of the micro-kernel runs.
    pub steps: usize,
    /// Most panels in a block.
    pub panels: usize,
}

impl Blocking {
    /// For blocks of at most `tokens` tokens.
    ///
    /// A chunk of a panel (128 bytes a step) serves every tile of the block from L1 or L2, and the words of the block's tiles
    /// serve every panel from L2, with the sums between them. With one tile a chunk is used once: then k is not cut.
    pub fn new<P: Product>(tile_tokens: usize, tokens: usize, all_steps: usize) -> Blocking {
        let caches = cache::sizes();
        let tokens = tokens.min(block_tokens(tile_tokens)).max(1);
        let steps = if tokens <= tile_tokens {
            let fit = caches.l2 / 4 / (tokens * P::A_WORDS * 4);
            all_steps.min(fit.max(256))
        } else {
            // Equal parts: a short last block would load and store the sums for little work.
            let most = (caches.l1 * 2 / 3 / 128).max(64);
            all_steps.div_ceil(all_steps.div_ceil(most).max(1))
        };
        let sums = tokens.next_multiple_of(2) * PANEL * 4;
        let panels = (caches.l2 * 3 / 8 / sums).max(1);
        Blocking { steps: steps.max(1), panels }
    }

    /// f32 values that [`multiply`] needs as scratch for a block.
    pub fn sums_len(&self, tile_tokens: usize, tokens: usize, panels: usize, all_steps: usize) -> usize {
        if all_steps <= self.steps {
            MAX_TILE * PANEL
        } else {
            padded_rows(tile_tokens, tokens.min(block_tokens(tile_tokens))) * panels * PANEL
        }
    }
}

/// How many panels an item takes: few enough that `blocks` blocks give every worker several items, at most `most`.
pub fn panels_per_item(panels: usize, most: usize, blocks: usize, workers: usize) -> usize {
    const ITEMS_PER_WORKER: usize = 6; // a slow worker then holds up the others by a sixth of its share at most
    let wanted_items = if workers == 1 { 1 } else { ITEMS_PER_WORKER * workers };
    let groups = wanted_items.div_ceil(blocks.max(1)).max(panels.div_ceil(most.max(1)));
    panels.div_ceil(groups.max(1)).max(1)
}

/// A block: all tokens against `panels`, over all k. `weights` holds all panels of the matrix, `steps * STEP_WEIGHTS` values
/// each; `sums` as [`Blocking::sums_len`] says; `following` are weights that this worker will read next, if that is known.
///
/// With several tiles, each asks for its share of the next chunk of weights, so that memory works while the tiles compute: else
/// the first tile of a chunk would wait for memory and the others leave it idle. A lone tile is bound by memory anyway, and
/// reads a stream that the hardware foresees.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn multiply<S: Simd, P: Product>(
    simd: S,
    tokens: usize,
    steps: usize,
    panels: Range<usize>,
    weights: &[P::W],
    following: Option<&[P::W]>,
    blocking: Blocking,
    activations: &mut impl Activations<S, P>,
    sums: &mut [f32],
    epilogue: &mut impl Epilogue<S>,
) {
    let panel_len = steps * P::STEP_WEIGHTS;
    let rows: usize = tiles(S::TILE_TOKENS, tokens).map(|tile| tile.rows).sum();
    let num_tiles = tiles(S::TILE_TOKENS, tokens).count();
    let whole = steps <= blocking.steps;
    let mut start = 0;
    loop {
        let end = (start + blocking.steps).min(steps);
        activations.prepare(simd, start..end);
        for panel in panels.clone() {
            let chunk = &weights[panel * panel_len + start * P::STEP_WEIGHTS..][..(end - start) * P::STEP_WEIGHTS];
            let next = if panel + 1 < panels.end {
                weights.as_ptr().wrapping_add((panel + 1) * panel_len + start * P::STEP_WEIGHTS)
            } else if end < steps {
                weights.as_ptr().wrapping_add(panels.start * panel_len + end * P::STEP_WEIGHTS)
            } else {
                following.map_or(chunk.as_ptr(), <[P::W]>::as_ptr)
            };
            let stride = if num_tiles > 1 { (P::STEP_WEIGHTS * size_of::<P::W>()).div_ceil(num_tiles) } else { 0 };
            for (i, tile) in tiles(S::TILE_TOKENS, tokens).enumerate() {
                let ahead = Ahead { at: next.cast::<u8>().wrapping_add(i * stride * (end - start)), stride };
                let at = if whole { 0 } else { ((panel - panels.start) * rows + tile.row) * PANEL };
                let c = &mut sums[at..][..tile.rows * PANEL];
                tile::tile::<S, P>(simd, tile.rows, activations.tile(tile, start..end), chunk, c, start == 0, ahead);
                if end == steps {
                    epilogue.tile(simd, panel, tile, c);
                }
            }
        }
        if end == steps {
            break;
        }
        start = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_tokens() {
        for tile_tokens in [4, 6, 12] {
            for tokens in 0..200 {
                let (mut token, mut row) = (0, 0);
                for tile in tiles(tile_tokens, tokens) {
                    assert_eq!((tile.token, tile.row), (token, row));
                    assert!(tile.tokens > 0 && tile.tokens <= tile.rows && tile.rows <= tile_tokens);
                    assert!(tile.rows - tile.tokens <= 1);
                    assert!(tile.rows <= 4 || tile.rows % 2 == 0);
                    token += tile.tokens;
                    row += tile.rows;
                }
                assert_eq!(token, tokens);
                // Whole blocks have no padding, so the rows of a block start at its first token.
                assert_eq!(padded_rows(tile_tokens, block_tokens(tile_tokens) * 3), block_tokens(tile_tokens) * 3);
                assert!(padded_rows(tile_tokens, tokens) <= tokens + 1);
            }
        }
    }

    #[test]
    fn items_are_shared_out() {
        assert_eq!(panels_per_item(128, 24, 6, 1), 22);
        assert_eq!(panels_per_item(128, 24, 6, 64), 2);
        assert_eq!(panels_per_item(48, 24, 0, 2), 4);
        assert_eq!(panels_per_item(1, 24, 1, 8), 1);
        assert_eq!(panels_per_item(0, 24, 1, 8), 1);
    }
}
