//! Rearranging: weights into panels, once; activations into tiles, as they are used.

use super::product::Product;
use super::{Activations, MAX_TILE, PANEL, TileSpan, num_panels, tiles};
use crate::cpu::any::AnyRow;
use crate::cpu::float::Float;
use crate::cpu::simd::{MAX_LANES, Simd};
use crate::element::Dtype;
use std::ops::Range;

/// k as a panel holds it: even for bf16, the odd one padded with 0.
pub const fn padded_k(dtype: Dtype, k: usize) -> usize {
    match dtype {
        Dtype::BF16 => k.next_multiple_of(2),
        _ => k,
    }
}

/// Values in one panel.
pub const fn panel_len(dtype: Dtype, k: usize) -> usize {
    padded_k(dtype, k).saturating_mul(PANEL)
}

/// Values in all panels of a matrix.
pub const fn packed_len(dtype: Dtype, outputs: usize, k: usize) -> usize {
    num_panels(outputs).saturating_mul(panel_len(dtype, k))
}

/// Fills one panel: `row(output)` gives the weights of an output of the panel (`k` values), or `None` for padding.
pub fn pack_panel<'a, W: Float>(k: usize, row: impl Fn(usize) -> Option<&'a [W]>, panel: &mut [W]) {
    assert_eq!(panel.len(), panel_len(W::DTYPE, k));
    // A cache line of each row at a time.
    const BLOCK: usize = 32;
    let pairs = W::DTYPE == Dtype::BF16;
    for start in (0..padded_k(W::DTYPE, k)).step_by(BLOCK) {
        let end = (start + BLOCK).min(padded_k(W::DTYPE, k));
        for output in 0..PANEL {
            let row = row(output);
            for at in start..end {
                let value = row.and_then(|row| row[..k].get(at).copied()).unwrap_or_default();
                let place = if pairs { (at / 2 * PANEL + output) * 2 + at % 2 } else { at * PANEL + output };
                panel[place] = value;
            }
        }
    }
}

/// Fills one panel from a matrix that is stored `[k, outputs]`: `row(k)` gives the panel's outputs for one k, fewer than
/// [`PANEL`] for the last panel.
pub fn pack_panel_transposed<'a, W: Float>(k: usize, row: impl Fn(usize) -> &'a [W], panel: &mut [W]) {
    assert_eq!(panel.len(), panel_len(W::DTYPE, k));
    let pairs = W::DTYPE == Dtype::BF16;
    panel.fill(W::default());
    for at in 0..k {
        for (output, value) in row(at).iter().enumerate() {
            panel[if pairs { (at / 2 * PANEL + output) * 2 + at % 2 } else { at * PANEL + output }] = *value;
        }
    }
}

/// Rows of activations, by their number in the block.
pub trait Rows: Sync {
    /// The whole row.
    fn row(&self, index: usize) -> AnyRow<'_>;
}

/// Packs rows of the caller's array as the steps of k come up.
pub struct PackedRows<'a, P: Product, R> {
    /// The rows.
    pub rows: R,
    /// Tokens of the block.
    pub tokens: usize,
    /// Room for the padded rows of the block times the words of a block of k.
    pub words: &'a mut [P::A],
}

impl<S: Simd, P: Product, R: Rows> Activations<S, P> for PackedRows<'_, P, R> {
    #[inline(always)]
    fn prepare(&mut self, simd: S, steps: Range<usize>) {
        let words = steps.start * P::A_WORDS..steps.end * P::A_WORDS;
        for tile in tiles(S::TILE_TOKENS, self.tokens) {
            let out = &mut self.words[tile.row * words.len()..][..tile.rows * words.len()];
            pack_tile::<S, P>(simd, |i| self.rows.row(tile.token + i), tile, words.clone(), out);
        }
    }
    #[inline(always)]
    fn tile(&self, tile: TileSpan, steps: Range<usize>) -> &[P::A] {
        let words = steps.len() * P::A_WORDS;
        &self.words[tile.row * words..][..tile.rows * words]
    }
}

/// Words of one transposition.
const CHUNK: usize = 16;

/// `out[word][row]` from rows of the caller's array.
#[inline(always)]
fn pack_tile<'a, S: Simd, P: Product>(
    simd: S,
    row: impl Fn(usize) -> AnyRow<'a>,
    tile: TileSpan,
    words: Range<usize>,
    out: &mut [P::A],
) {
    let rows: [AnyRow<'a>; MAX_TILE] = std::array::from_fn(|i| row(i.min(tile.tokens - 1)));
    // What can be read as whole vectors; then the rest, and the zeros behind the row's end.
    let in_row = (rows[0].len() * P::A_WORDS / P::STEP_K).min(words.end).saturating_sub(words.start);
    let whole = in_row / S::LANES * S::LANES;
    for start in (0..whole).step_by(S::LANES) {
        let mut by_row = [simd.zero(); MAX_LANES];
        for (lanes, row) in by_row.iter_mut().zip(&rows).take(tile.tokens) {
            *lanes = P::lanes(simd, *row, words.start + start);
        }
        store_by_word(simd, &by_row, tile.rows, S::LANES, &mut out[start * tile.rows..]);
    }
    let zero: P::A = bytemuck::Zeroable::zeroed();
    let mut chunk = [[zero; CHUNK]; MAX_TILE];
    for start in (whole..words.len()).step_by(CHUNK) {
        let n = CHUNK.min(words.len() - start);
        let at = words.start + start;
        for (chunk, row) in chunk.iter_mut().zip(&rows).take(tile.tokens) {
            P::words(simd, *row, at..at + n, &mut chunk[..n]);
        }
        transpose(simd, &chunk, tile.rows, &mut out[start * tile.rows..][..n * tile.rows]);
    }
}

/// `out[word][row] = chunk[row][word]` for the first `rows` rows and `out.len() / rows` words.
#[inline(always)]
pub fn transpose<S: Simd, A: bytemuck::Pod>(simd: S, chunk: &[[A; CHUNK]; MAX_TILE], rows: usize, out: &mut [A]) {
    const { assert!(S::TILE_TOKENS <= S::LANES && CHUNK.is_multiple_of(S::LANES)) }
    let words = out.len() / rows;
    for start in (0..words).step_by(S::LANES) {
        let mut by_row = [simd.zero(); MAX_LANES];
        for (lanes, row) in by_row.iter_mut().zip(chunk).take(rows) {
            *lanes = simd.load(&bytemuck::cast_slice::<A, f32>(row)[start..]);
        }
        store_by_word(simd, &by_row, rows, S::LANES.min(words - start), &mut out[start * rows..]);
    }
}

/// `out[word][row]` = lane `word` of `by_row[row]`, bit for bit, for so many words of 4 bytes. What follows them in `out` may
/// be overwritten.
#[inline(always)]
fn store_by_word<S: Simd, A: bytemuck::Pod>(
    simd: S,
    by_row: &[S::F32; MAX_LANES],
    rows: usize,
    words: usize,
    out: &mut [A],
) {
    let out: &mut [f32] = bytemuck::cast_slice_mut(out);
    if rows == 1 {
        return simd.store_partial(&mut out[..words], by_row[0]);
    }
    let mut by_word = [0.0; MAX_LANES * MAX_LANES];
    simd.transpose(by_row, &mut by_word, S::LANES);
    let mut rest = out;
    for lanes in by_word.chunks_exact(S::LANES).take(words) {
        // Lanes past the last row are overwritten by the next word.
        if rest.len() >= S::LANES {
            simd.store(rest, simd.load(lanes));
        } else {
            simd.store_partial(&mut rest[..rows], simd.load(lanes));
        }
        rest = &mut rest[rows..];
    }
}
