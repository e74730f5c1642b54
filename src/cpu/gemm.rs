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

/// Bytes of a line of cache, and f32 values in it.
const LINE_BYTES: usize = 64;
const LINE_SUMS: usize = LINE_BYTES / 4;

/// How far ahead a lone tile asks for its own weights: one page, at whose end the hardware's foresight stops.
const STREAM_AHEAD: usize = 4096;

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

/// Steps of k that one call of the micro-kernel runs in a block of so many packed rows, which has no effect on results.
///
/// A chunk of a panel (128 bytes a step, 64 of f16) serves every tile of the block, and the words of the block's tiles serve
/// every panel, both from L2: a tile of 12 rows reads a step of its chunk in 12 cycles. While they fit there, with the chunk
/// that is being fetched, k is not cut: the sums are then never stored and taken up again, and a chunk is one run of memory,
/// where cut chunks of a panel lie a power of two apart and compete for the same lines. (On a Zen 5, with weights from memory,
/// tiles ran at 73 % of the limit with chunks for L1, 32 KiB, and at 91 % with k uncut.) With one tile a chunk is used once.
fn part_steps<P: Product>(tile_tokens: usize, rows: usize, all_steps: usize) -> usize {
    let l2 = cache::sizes().l2;
    let (words, chunk) = (rows.max(1) * P::A_WORDS * size_of::<P::A>(), P::STEP_WEIGHTS * size_of::<P::W>());
    let (whole, part) = if rows <= tile_tokens {
        let fit = (l2 / 4 / words).max(256);
        (fit, fit)
    } else {
        (l2 * 7 / 8 / (words + 2 * chunk), (l2 / 8 / chunk).max(64))
    };
    // Equal parts: a short last one would load and store the sums for little work.
    if all_steps <= whole { all_steps.max(1) } else { all_steps.div_ceil(all_steps.div_ceil(part)) }
}

/// What the blocks of a call need, whatever their number of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Blocking {
    /// Packed rows of the largest block.
    rows: usize,
    /// Whether some block needs its sums between parts of k.
    is_cut: bool,
    /// Words of scratch for packed activations.
    pub words_len: usize,
    /// Most panels in an item.
    pub panels: usize,
}

impl Blocking {
    /// For blocks of at most `tokens` tokens.
    pub fn new<P: Product>(tile_tokens: usize, tokens: usize, all_steps: usize) -> Blocking {
        let rows = padded_rows(tile_tokens, tokens.clamp(1, block_tokens(tile_tokens)));
        let (mut is_cut, mut words_len) = (false, 0);
        for rows in 1..=rows {
            let steps = part_steps::<P>(tile_tokens, rows, all_steps);
            is_cut |= steps < all_steps;
            words_len = words_len.max(rows * steps * P::A_WORDS);
        }
        // Sums of many panels are read and written once for each part of k, between which they need not stay in L2.
        let panels = if is_cut { (cache::sizes().l2 / (rows * PANEL * 4)).max(1) } else { usize::MAX };
        Blocking { rows, is_cut, words_len, panels }
    }

    /// f32 values that [`multiply`] needs as scratch for a block against so many panels.
    pub fn sums_len(&self, panels: usize) -> usize {
        if self.is_cut { self.rows * panels * PANEL } else { MAX_TILE * PANEL }
    }
}

/// How many panels an item takes: few enough that `blocks` blocks give every worker several items, at most `most`.
pub fn panels_per_item(panels: usize, most: usize, blocks: usize, workers: usize) -> usize {
    const ITEMS_PER_WORKER: usize = 6; // a slow worker then holds up the others by a sixth of its share at most
    let wanted_items = if workers == 1 { 1 } else { ITEMS_PER_WORKER * workers };
    let groups = wanted_items.div_ceil(blocks.max(1)).max(panels.div_ceil(most.max(1)));
    panels.div_ceil(groups.max(1)).max(1)
}

/// What a worker will probably read after a block, to be asked for in time: slices of any length, empty where nothing is known.
pub struct Following<'a, P: Product> {
    /// From the first panel.
    pub weights: &'a [P::W],
    /// Activations that are packed already, all of them.
    pub words: &'a [P::A],
}

impl<P: Product> Following<'_, P> {
    /// Nothing is known.
    pub const NONE: Self = Following { weights: &[], words: &[] };
}

/// A block: all tokens against `panels`, over all k. `weights` holds all panels of the matrix, `steps * STEP_WEIGHTS` values
/// each; `sums` is as long as [`Blocking::sums_len`] says.
///
/// With several tiles, each asks for its share of the next chunk of weights, so that memory works while the tiles compute: else
/// the first tile of a chunk would wait for memory and the others leave it idle. A lone tile is bound by memory anyway, and
/// reads a stream that the hardware foresees, but for f16: a step of 64 bytes leaves no time in which to wait at the end of a page,
/// so it asks for the next page itself. `following` is what this worker will probably read next.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn multiply<S: Simd, P: Product>(
    simd: S,
    tokens: usize,
    steps: usize,
    panels: Range<usize>,
    weights: &[P::W],
    following: Following<'_, P>,
    activations: &mut impl Activations<S, P>,
    sums: &mut [f32],
    epilogue: &mut impl Epilogue<S>,
) {
    let panel_len = steps * P::STEP_WEIGHTS;
    let rows: usize = tiles(S::TILE_TOKENS, tokens).map(|tile| tile.rows).sum();
    let num_tiles = tiles(S::TILE_TOKENS, tokens).count();
    let part = part_steps::<P>(S::TILE_TOKENS, rows, steps);
    let whole = part >= steps;
    let parts = steps.div_ceil(part);
    let mut following_words = following.words.chunks(LINE_BYTES / size_of::<P::A>()).map(<[P::A]>::as_ptr);
    let following_share = following_words.len().div_ceil((parts * panels.len() * num_tiles).max(1));
    let mut start = 0;
    loop {
        let end = (start + part).min(steps);
        activations.prepare(simd, start..end);
        for panel in panels.clone() {
            let chunk = &weights[panel * panel_len + start * P::STEP_WEIGHTS..][..(end - start) * P::STEP_WEIGHTS];
            let next = if panel + 1 < panels.end {
                weights.as_ptr().wrapping_add((panel + 1) * panel_len + start * P::STEP_WEIGHTS)
            } else if end < steps {
                weights.as_ptr().wrapping_add(panels.start * panel_len + end * P::STEP_WEIGHTS)
            } else if following.weights.is_empty() {
                chunk.as_ptr()
            } else {
                following.weights.as_ptr()
            };
            let step_bytes = P::STEP_WEIGHTS * size_of::<P::W>();
            let (first_ahead, stride) = if num_tiles > 1 {
                (next.cast::<u8>(), step_bytes.div_ceil(num_tiles))
            } else if step_bytes <= LINE_BYTES {
                (chunk.as_ptr().cast::<u8>().wrapping_add(STREAM_AHEAD), step_bytes)
            } else {
                (next.cast::<u8>(), 0)
            };
            for (i, tile) in tiles(S::TILE_TOKENS, tokens).enumerate() {
                let ahead = Ahead { at: first_ahead.wrapping_add(i * stride * (end - start)), stride };
                let at = if whole { 0 } else { ((panel - panels.start) * rows + tile.row) * PANEL };
                // The next tile's sums, if there are some.
                if start > 0 {
                    for line in 0..tile.rows * PANEL / LINE_SUMS {
                        simd.prefetch(sums.as_ptr().wrapping_add(at + tile.rows * PANEL + line * LINE_SUMS));
                    }
                }
                for line in following_words.by_ref().take(following_share) {
                    simd.prefetch_l2(line);
                }
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
