//! What is done to the scores of a tile besides the scale: soft-cap, biases, and the keys that a row does not see.
//!
//! Tiles that every row of a panel sees in full, in calls without soft-cap, bias and mask, never come here.

use super::problem::{Block, Problem};
use super::{MAX_WIDTH, TILE};
use crate::args::Sequence;
use crate::cpu::Float;
use crate::cpu::math::tanh;
use crate::cpu::simd::Simd;
use crate::spec::{Attention, RelativeBias};

/// Which keys the rows of one panel see by position: `first[lane] .. end[lane]`, empty for lanes without a row.
#[derive(Clone, Copy)]
pub struct Ranges {
    first: [usize; MAX_WIDTH],
    end: [usize; MAX_WIDTH],
    /// Keys that any row sees lie in `any.0 .. any.1`; empty if `any.0 >= any.1`.
    pub any: (usize, usize),
    /// Keys that every row sees.
    all: (usize, usize),
}

impl Ranges {
    /// Of the rows `row .. row + rows` of a block's sequence and head.
    pub fn new(spec: &Attention, sequence: &Sequence, row: usize, rows: usize) -> Self {
        let group = spec.group_size();
        let mut ranges =
            Ranges { first: [0; MAX_WIDTH], end: [0; MAX_WIDTH], any: (usize::MAX, 0), all: (0, usize::MAX) };
        for lane in 0..rows {
            let range = sequence.visible_rows(spec, (row + lane) / group);
            ranges.all = (ranges.all.0.max(range.start), ranges.all.1.min(range.end));
            if range.start < range.end {
                ranges.first[lane] = range.start;
                ranges.end[lane] = range.end;
                ranges.any = (ranges.any.0.min(range.start), ranges.any.1.max(range.end));
            }
        }
        ranges
    }

    /// The part of the tile at `start` that any row sees, widened to multiples of `step`; empty if the first is not below
    /// the second.
    pub fn in_tile(&self, start: usize, step: usize) -> (usize, usize) {
        let first = self.any.0.saturating_sub(start).min(TILE);
        let end = self.any.1.saturating_sub(start).min(TILE);
        (first / step * step, end.next_multiple_of(step))
    }

    /// Whether every row sees all of `first .. end` of the tile at `start`.
    pub fn covers(&self, start: usize, (first, end): (usize, usize)) -> bool {
        self.all.0 <= start + first && start + end <= self.all.1
    }
}

/// Bucket of the relative bias by distance, for the distances that are used most.
#[derive(Clone, Copy)]
pub struct Buckets<'a> {
    bias: RelativeBias,
    /// Of the distances `-reach ..= reach`.
    near: &'a [u32],
    reach: i64,
}

impl<'a> Buckets<'a> {
    /// Entries of the table. Farther distances are computed one by one; from `max_distance` on there is one bucket.
    pub fn len(bias: &RelativeBias) -> usize {
        2 * bias.max_distance.min(1024) + 1
    }

    /// Fills the table.
    pub fn new(bias: RelativeBias, table: &'a mut [u32]) -> Self {
        let reach = (table.len() / 2) as i64;
        for (i, bucket) in table.iter_mut().enumerate() {
            *bucket = bias.bucket(i as i64 - reach) as u32;
        }
        Buckets { bias, near: table, reach }
    }

    fn at(&self, distance: i64) -> usize {
        let distance = distance.clamp(-(self.bias.max_distance as i64), self.bias.max_distance as i64);
        match self.near.get((distance + self.reach) as usize) {
            Some(bucket) if distance >= -self.reach => *bucket as usize,
            _ => self.bias.bucket(distance),
        }
    }
}

/// Fills `added[j][lane]` with what the explicit mask, the bias and the relative bias add to the scores of a panel, -inf for
/// hidden keys, and marks in `seen` the keys that a row sees.
///
/// * `added`: `[TILE][width]`; only keys that some row sees by position are written
pub fn added_terms<T: Float>(
    problem: &Problem<'_, T>,
    block: &Block,
    panel: usize,
    ranges: &Ranges,
    start: usize,
    added: &mut [f32],
    seen: &mut [bool; TILE],
) {
    let width = block.width;
    let sequence = &block.sequence;
    let rows = block.panel_rows(panel);
    let first = ranges.any.0.saturating_sub(start).min(TILE);
    let end = ranges.any.1.saturating_sub(start).min(TILE);
    for lane in 0..rows {
        let (token, head) = block.token_and_head(problem.spec, panel * width + lane);
        let (lane_first, lane_end) = (ranges.first[lane], ranges.end[lane]);
        let position = sequence.q_start + token as i64;
        // Rows of the broadcast arrays: where the row of this query and head starts, and whether it has one value for all keys.
        let mask = problem.input.mask.map(|mask| {
            let strides = mask.broadcast_strides();
            let at = sequence.index * strides[0] + head * strides[1] + token * strides[2];
            (&mask.data()[at..], strides[3])
        });
        let bias = problem.input.bias.map(|bias| {
            let strides = bias.broadcast_strides();
            let at = sequence.index * strides[0] + head * strides[1] + token * strides[2];
            (&bias.data()[at..], strides[3])
        });
        for j in first..end {
            let key = start + j;
            let mut value = 0.0;
            if let Some((row, stride)) = bias {
                value += row[key * stride];
            }
            if let (Some(buckets), Some(table)) = (problem.buckets, problem.input.relative_bias) {
                let distance = sequence.k_start + key as i64 - position;
                value += table.at([buckets.at(distance), head]);
            }
            if mask.is_some_and(|(row, stride)| row[key * stride] == 0) {
                value = f32::NEG_INFINITY;
            }
            added[j * width + lane] = value;
            seen[j] |= value != f32::NEG_INFINITY && (lane_first..lane_end).contains(&key);
        }
    }
}

/// Which scores are in hand.
#[derive(Clone, Copy)]
pub struct Place {
    pub panel: usize,
    /// Key row of the first row of the tile.
    pub start: usize,
    /// Rows of the tile that the panel sees.
    pub rows: (usize, usize),
}

/// Turns dot products into final scores, in place: scale, soft-cap, what [`added_terms`] tells, ALiBi. (The range of visible
/// keys comes after: [`hide`].)
#[inline(always)]
pub fn apply_terms<S: Simd, T: Float, const VECS: usize>(
    simd: S,
    problem: &Problem<'_, T>,
    block: &Block,
    place: Place,
    added: Option<&[f32]>,
    scores: &mut [f32],
) {
    let Place { panel, start, rows: (first, end) } = place;
    let width = VECS * S::LANES;
    let spec = problem.spec;
    let scale = simd.splat(spec.softmax_scale as f32);
    let hidden = simd.splat(f32::NEG_INFINITY);
    // ALiBi: slope of each lane's head, and the distance of its query from the first key of the tile.
    let (mut slopes, mut distances) = ([0.0f32; MAX_WIDTH], [0.0f32; MAX_WIDTH]);
    if let Some(all) = problem.input.alibi_slopes {
        for lane in 0..block.panel_rows(panel) {
            let (token, head) = block.token_and_head(spec, panel * width + lane);
            let sequence = &block.sequence;
            slopes[lane] = all[head];
            distances[lane] = (sequence.q_start + token as i64 - sequence.k_start - start as i64) as f32;
        }
    }
    let positions = problem.input.alibi_positions.map(|positions| {
        let strides = positions.broadcast_strides();
        &positions.data()[block.sequence.index * strides[0] + start..]
    });
    for j in first..end {
        for v in 0..VECS {
            let at = j * width + v * S::LANES;
            let mut s = simd.mul(simd.load(&scores[at..]), scale);
            if let Some(cap) = spec.softcap {
                let cap = simd.splat(cap as f32);
                s = simd.mul(cap, tanh(simd, simd.div(s, cap)));
            }
            if spec.alibi {
                let slope = simd.load(&slopes[v * S::LANES..]);
                let (slope, factor) = match positions {
                    // Keys beyond the sequence's last have no position; they are hidden.
                    Some(positions) => (slope, simd.splat(positions.get(j).copied().unwrap_or(0.0))),
                    None => {
                        let distance = simd.sub(simd.load(&distances[v * S::LANES..]), simd.splat(j as f32));
                        (simd.neg(slope), simd.abs(distance))
                    }
                };
                s = simd.fma(slope, factor, s);
            }
            if let Some(added) = added {
                let added = simd.load(&added[at..]);
                s = simd.select(simd.le(added, hidden), hidden, simd.add(s, added));
            }
            simd.store(&mut scores[at..], s);
        }
    }
}

/// Sets the scores that the explicit mask hides to -inf and leaves the others as they are.
#[inline(always)]
pub fn hide_masked<S: Simd, const VECS: usize>(
    simd: S,
    (first, end): (usize, usize),
    added: &[f32],
    scores: &mut [f32],
) {
    let width = VECS * S::LANES;
    let hidden = simd.splat(f32::NEG_INFINITY);
    for at in (first * width..end * width).step_by(S::LANES) {
        let is_hidden = simd.le(simd.load(&added[at..]), hidden);
        let s = simd.select(is_hidden, hidden, simd.load(&scores[at..]));
        simd.store(&mut scores[at..], s);
    }
}

/// Sets the scores of keys outside each row's range to -inf.
#[inline(always)]
pub fn hide<S: Simd, const VECS: usize>(
    simd: S,
    ranges: &Ranges,
    start: usize,
    (first, end): (usize, usize),
    scores: &mut [f32],
) {
    let width = VECS * S::LANES;
    let hidden = simd.splat(f32::NEG_INFINITY);
    let relative = |key: usize| key.saturating_sub(start).min(TILE) as f32;
    let (mut firsts, mut ends) = ([0.0f32; MAX_WIDTH], [0.0f32; MAX_WIDTH]);
    for lane in 0..width {
        firsts[lane] = relative(ranges.first[lane]);
        ends[lane] = relative(ranges.end[lane]);
    }
    for v in 0..VECS {
        let (row_first, row_end) = (simd.load(&firsts[v * S::LANES..]), simd.load(&ends[v * S::LANES..]));
        for j in first..end {
            let at = j * width + v * S::LANES;
            let key = simd.splat(j as f32);
            let s = simd.select(simd.lt(key, row_end), simd.load(&scores[at..]), hidden);
            simd.store(&mut scores[at..], simd.select(simd.le(row_first, key), s, hidden));
        }
    }
}
