//! Exponentials and scores in f64, many at a time: what softmax and sigmoid of a router need, to a few units in the last
//! place of f64, so that a weight is right to half a unit of f32.
//!
//! Plain loops that the compiler turns into vectors of the level they are inlined into; no fused multiply-add, so that all
//! levels give the same bits.

use crate::spec::Score;

/// `e^x`. Results that are subnormal in f64 are 0.
#[inline(always)]
pub fn exp(x: f64) -> f64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it leaves an integer in the low bits
    const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000); // 33 bits: n LN2_HIGH is exact
    const LN2_LOW: f64 = std::f64::consts::LN_2 - LN2_HIGH + 2.319_046_813_846_3e-17; // and what LN_2 itself lacks
    const LEAST: f64 = -708.0;
    const MOST: f64 = 709.7;
    let inside = if x > LEAST { x } else { LEAST };
    let inside = if inside < MOST { inside } else { MOST };
    // x = n ln 2 + r, |r| <= ln 2 / 2 (Cody and Waite 1980).
    let shifted = inside * std::f64::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = inside - n * LN2_HIGH - n * LN2_LOW;
    // Taylor's series: the first term left out is below 2^-57 of the sum.
    const COEFFICIENTS: [f64; 13] = [
        1.0 / 2.0,
        1.0 / 6.0,
        1.0 / 24.0,
        1.0 / 120.0,
        1.0 / 720.0,
        1.0 / 5_040.0,
        1.0 / 40_320.0,
        1.0 / 362_880.0,
        1.0 / 3_628_800.0,
        1.0 / 39_916_800.0,
        1.0 / 479_001_600.0,
        1.0 / 6_227_020_800.0,
        1.0 / 87_178_291_200.0,
    ];
    let mut p = COEFFICIENTS[12];
    for c in COEFFICIENTS[..12].iter().rev() {
        p = p * r + c;
    }
    let e = 1.0 + (r + r * r * p);
    let e = f64::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 52));
    let e = if x > MOST { f64::INFINITY } else { e };
    let e = if x < LEAST { 0.0 } else { e };
    if x.is_nan() { x } else { e }
}

/// `e^(x - max)`, and 1 for `x = max` also where both are infinite.
#[inline(always)]
pub fn exp_below(x: f64, max: f64) -> f64 {
    exp(if x == max { 0.0 } else { x - max })
}

/// `e^(x - max)` of a row, and their sum.
#[inline(always)]
pub fn exp_row(logits: &[f32], max: f64, out: &mut [f64]) -> f64 {
    for (out, l) in out.iter_mut().zip(logits) {
        *out = exp_below(f64::from(*l), max);
    }
    sum(&out[..logits.len()])
}

/// A sum in eight parts, which are vectors.
#[inline(always)]
fn sum(values: &[f64]) -> f64 {
    let (whole, rest) = values.as_chunks::<8>();
    let mut parts = [0.0; 8];
    for chunk in whole {
        for (part, value) in parts.iter_mut().zip(chunk) {
            *part += value;
        }
    }
    let rest: f64 = rest.iter().sum();
    let [a, b, c, d, e, f, g, h] = parts;
    ((a + b) + (c + d)) + ((e + f) + (g + h)) + rest
}

/// The largest value of a row; NaN does not count, nothing gives `-inf`.
#[inline(always)]
pub fn max(values: &[f32]) -> f64 {
    let (whole, rest) = values.as_chunks::<16>();
    let mut parts = [f32::NEG_INFINITY; 16];
    for chunk in whole {
        for (part, value) in parts.iter_mut().zip(chunk) {
            *part = if *value > *part { *value } else { *part };
        }
    }
    f64::from(parts.iter().chain(rest).fold(f32::NEG_INFINITY, |max, value| if *value > max { *value } else { max }))
}

/// Scores of a row in f32: those of [`super::exact`], rounded once, to the bit.
///
/// They are computed fast, with a bound on the error; a row in which that could change a rounding (about one in a thousand) is
/// computed again by the exact formula. `room` holds as many values as the row.
#[inline(always)]
pub fn scores_f32(score: Score, logits: &[f32], room: &mut [f64], out: &mut [f32]) {
    let room = &mut room[..logits.len()];
    // Units of 2^-53: a few for the exponential and the division, and one for each addition, there and here.
    let margin = (16 + 2 * logits.len()) as f64 * f64::EPSILON;
    match score {
        Score::Softmax => {
            let max = max(logits);
            let inverse = exp_row(logits, max, room).recip();
            for x in room.iter_mut() {
                *x *= inverse;
            }
        }
        Score::Sigmoid => {
            for (x, l) in room.iter_mut().zip(logits) {
                *x = 1.0 / (1.0 + exp(-f64::from(*l)));
            }
        }
        _ => return super::exact::scores_f32(score, logits, out),
    }
    let mut unsure = false;
    for (out, x) in out.iter_mut().zip(room) {
        *out = *x as f32;
        unsure |= (*x * (1.0 - margin)) as f32 != (*x * (1.0 + margin)) as f32;
    }
    if unsure {
        super::exact::scores_f32(score, logits, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst: f64 = 0.0;
        for i in -7_080_000..7_097_000i64 {
            let x = i as f64 * 1e-4 + 1e-9;
            let (got, want) = (exp(x), x.exp());
            worst = worst.max(((got - want) / want).abs() / f64::EPSILON);
        }
        println!("{worst} ulp");
        assert!(worst <= 2.0, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(f64::INFINITY), f64::INFINITY);
        assert_eq!(exp(800.0), f64::INFINITY);
        assert_eq!(exp(-800.0), 0.0);
        assert!(exp(f64::NAN).is_nan());
    }

    #[test]
    fn scores_are_those_of_the_exact_formula() {
        let mut state = 5u32;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for round in 0..20_000 {
            let len = [1, 5, 8, 64, 100][round % 5];
            let size = [1.0, 5.0, 30.0, 300.0][round % 4];
            let mut logits: Vec<f32> = (0..len).map(|_| next() * size).collect();
            match round % 97 {
                0 => logits[0] = f32::INFINITY,
                1 => logits.fill(f32::NEG_INFINITY),
                2 => logits[len / 2] = f32::NAN,
                3 => logits[len / 2] = f32::NEG_INFINITY,
                _ => {}
            }
            for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Raw] {
                let (mut room, mut got, mut want) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
                scores_f32(score, &logits, &mut room, &mut got);
                super::super::exact::scores_f32(score, &logits, &mut want);
                for (got, want) in got.iter().zip(&want) {
                    assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{got} {want}");
                }
            }
        }
    }
}
