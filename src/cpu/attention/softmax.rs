//! Online softmax of a panel: running maximum and sum of each row, one row to a lane.
//!
//! A partial result is `(max, sum, out)` with `sum = sum_j exp(s[j] - max)` and `out = sum_j exp(s[j] - max) v[j]`. Keys that a
//! row does not see have the score -inf; they add exact zeros, and a tile or a partial result of such keys alone changes
//! nothing, bit for bit (but for the sign of a zero, which the end removes). That is why skipping them is allowed.
//!
//! Milakov and Gimelshein 2018, arXiv:1805.02867.

use super::operand::Operand;
use crate::cpu::math::exp;
use crate::cpu::simd::Simd;

/// `exp(scale * s - max)` where `max` is at least the product or `s` is NaN: 1 for both infinite, 0 for a product of -inf,
/// also if `max` is.
#[inline(always)]
pub fn weight<S: Simd>(simd: S, s: S::F32, scale: S::F32, minus_max: S::F32) -> S::F32 {
    let difference = simd.fma(s, scale, minus_max);
    let infinite = simd.le(simd.splat(f32::INFINITY), simd.mul(s, scale));
    exp(simd, simd.select(infinite, simd.zero(), difference))
}

/// `-max`, and 0 for a maximum of -inf.
#[inline(always)]
pub fn negated<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.select(simd.le(max, simd.splat(f32::NEG_INFINITY)), simd.zero(), simd.neg(max))
}

/// Takes the scores `scale * scores[j]` for `j` in `first..end` into `max` and `sum`, replaces them by their softmax weights,
/// and tells the factor on `out` so far.
///
/// * `scores`: `[TILE][VECS * LANES]`, becomes `[TILE / DEPTH][VECS * LANES]` of `E`
/// * `max`, `sum`, `decay`: `[VECS * LANES]`
#[inline(always)]
pub fn update<S: Simd, E: Operand, const VECS: usize>(
    simd: S,
    scores: &mut [f32],
    (first, end): (usize, usize),
    scale: f32,
    max: &mut [f32],
    sum: &mut [f32],
    decay: &mut [f32],
) {
    let width = VECS * S::LANES;
    let scale = simd.splat(scale);
    let mut top = [simd.splat(f32::NEG_INFINITY); VECS];
    for row in scores[first * width..end * width].chunks_exact(width) {
        for v in 0..VECS {
            top[v] = simd.max(simd.load(&row[v * S::LANES..]), top[v]); // a NaN score leaves the maximum as it is
        }
    }
    let mut minus_max = [simd.zero(); VECS];
    let mut sums = [simd.zero(); VECS];
    for v in 0..VECS {
        let at = v * S::LANES;
        let old = simd.load(&max[at..]);
        let new = simd.max(simd.mul(top[v], scale), old);
        minus_max[v] = negated(simd, new);
        simd.store(&mut max[at..], new);
        simd.store(&mut decay[at..], weight(simd, old, simd.splat(1.0), minus_max[v]));
    }
    let mut is_finite = true;
    for v in 0..VECS {
        is_finite &= simd.max_lane(simd.neg(minus_max[v])) < f32::INFINITY;
    }
    if is_finite {
        replace::<S, E, VECS, true>(simd, scores, (first, end), (scale, &minus_max), &mut sums);
    } else {
        replace::<S, E, VECS, false>(simd, scores, (first, end), (scale, &minus_max), &mut sums);
    }
    for v in 0..VECS {
        let at = v * S::LANES;
        let sum = &mut sum[at..];
        simd.store(sum, simd.fma(simd.load(sum), simd.load(&decay[at..]), sums[v]));
    }
}

/// Replaces the scores by their weights and adds these up. `IS_FINITE`: no maximum is inf, so that no product is.
#[inline(always)]
fn replace<S: Simd, E: Operand, const VECS: usize, const IS_FINITE: bool>(
    simd: S,
    scores: &mut [f32],
    (first, end): (usize, usize),
    (scale, minus_max): (S::F32, &[S::F32; VECS]),
    sums: &mut [S::F32; VECS],
) {
    let width = VECS * S::LANES;
    for j in (first..end).step_by(E::DEPTH) {
        for v in 0..VECS {
            let mut weights = [simd.zero(); 2];
            for d in 0..E::DEPTH {
                let s = simd.load(&scores[(j + d) * width + v * S::LANES..]);
                weights[d] = if IS_FINITE {
                    exp(simd, simd.fma(s, scale, minus_max[v]))
                } else {
                    weight(simd, s, scale, minus_max[v])
                };
                sums[v] = simd.add(sums[v], weights[d]);
            }
            // Row j / DEPTH: with pairs the weights follow behind the scores that are read.
            let dst: &mut [E] = bytemuck::cast_slice_mut(scores);
            E::store_weights(simd, weights, &mut dst[j / E::DEPTH * width + v * S::LANES..]);
        }
    }
}

/// A partial result of one panel.
pub struct Partial<'a> {
    /// `[VECS * LANES]`
    pub max: &'a mut [f32],
    /// `[VECS * LANES]`
    pub sum: &'a mut [f32],
    /// `[columns][VECS * LANES]`
    pub out: &'a mut [f32],
}

impl<'a> Partial<'a> {
    /// Values that a partial result of `width` rows takes.
    pub const fn len(width: usize, columns: usize) -> usize {
        (columns + 2) * width
    }

    /// The first [`Partial::len`] values.
    #[inline(always)]
    pub fn new(memory: &'a mut [f32], width: usize, columns: usize) -> Self {
        let (max, rest) = memory[..Self::len(width, columns)].split_at_mut(width);
        let (sum, out) = rest.split_at_mut(width);
        Partial { max, sum, out }
    }

    /// No key yet.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }

    /// Takes the keys of `other` in. Results are the same bits whoever does it, in whatever place, in the same order.
    #[inline(always)]
    pub fn fold<S: Simd, const VECS: usize>(&mut self, simd: S, other: &Partial<'_>) {
        let width = VECS * S::LANES;
        let one = simd.splat(1.0);
        let (mut keep, mut take) = ([simd.zero(); VECS], [simd.zero(); VECS]);
        for v in 0..VECS {
            let at = v * S::LANES;
            let (old, new) = (simd.load(&self.max[at..]), simd.load(&other.max[at..]));
            let max = simd.max(new, old);
            let minus_max = negated(simd, max);
            keep[v] = weight(simd, old, one, minus_max);
            take[v] = weight(simd, new, one, minus_max);
            simd.store(&mut self.max[at..], max);
            let taken = simd.mul(simd.load(&other.sum[at..]), take[v]);
            let sum = simd.fma(simd.load(&self.sum[at..]), keep[v], taken);
            simd.store(&mut self.sum[at..], sum);
        }
        for (mine, theirs) in self.out.chunks_exact_mut(width).zip(other.out.chunks_exact(width)) {
            for v in 0..VECS {
                let at = v * S::LANES;
                let taken = simd.mul(simd.load(&theirs[at..]), take[v]);
                let folded = simd.fma(simd.load(&mine[at..]), keep[v], taken);
                simd.store(&mut mine[at..], folded);
            }
        }
    }

    /// Turns `out` into the result, with a sink's score of each row taken into the sum, and `max`, `sum` into those with it.
    #[inline(always)]
    pub fn finish<S: Simd, const VECS: usize>(&mut self, simd: S, sinks: Option<&[f32]>) {
        let width = VECS * S::LANES;
        let mut factor = [simd.zero(); VECS];
        for v in 0..VECS {
            let at = v * S::LANES;
            let (mut max, mut sum) = (simd.load(&self.max[at..]), simd.load(&self.sum[at..]));
            let mut keep = simd.splat(1.0);
            if let Some(sinks) = sinks {
                let one = simd.splat(1.0);
                let sink = simd.load(&sinks[at..]);
                let old = max;
                max = simd.max(sink, old);
                let minus_max = negated(simd, max);
                keep = weight(simd, old, one, minus_max);
                sum = simd.fma(sum, keep, weight(simd, sink, one, minus_max));
            }
            simd.store(&mut self.max[at..], max);
            simd.store(&mut self.sum[at..], sum);
            factor[v] = simd.div(keep, sum);
        }
        for row in self.out.chunks_exact_mut(width) {
            for v in 0..VECS {
                let at = v * S::LANES;
                // + 0 turns -0 into 0: the sign of a zero may tell which hidden keys were skipped.
                let result = simd.add(simd.mul(simd.load(&row[at..]), factor[v]), simd.zero());
                simd.store(&mut row[at..], result);
            }
        }
    }
}
