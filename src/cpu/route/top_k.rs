//! The `k` best of one row: a tournament of sorting networks in vector registers.
//!
//! Every value and its index become one `f64` that compares as the contract asks: by value, equal values by lower index,
//! NaN below every number. All keys of a row differ, so the networks need only minimum and maximum.

use crate::cpu::simd::Simd;

/// Results of one pass of the tournament, and registers of a sorted column.
const PASS: usize = 8;

/// Passes cost as much as the row is long; beyond so many a sort is cheaper.
const MOST_PASSES: usize = 8;

/// Low bits of a key, which hold the index: an `f32` leaves 29 of the 52 fraction bits of an `f64` free.
const INDEX_MASK: i64 = (1 << 29) - 1;

/// Below every key.
const NOTHING: f64 = f64::NEG_INFINITY;

/// Keys that [`keys`] writes for a row of so many values: whole rounds of the tournament at any level.
pub fn num_keys(len: usize) -> usize {
    // 8 registers of 8 values.
    len.next_multiple_of(64)
}

/// The key of one value.
///
/// Zeros of both signs and values that are not finite become normal numbers first: infinity carries no index, and zeros
/// with one would be subnormal, which a caller that flushes subnormals would take for equal.
#[inline(always)]
fn key(value: f32, index: i64) -> f64 {
    const ZERO: f64 = f64::from_bits((1023 - 200) << 52); // 2^-200, below the smallest f32
    const INFINITE: f64 = f64::from_bits((1023 + 200) << 52); // 2^200, above the largest
    let x = f64::from(value);
    let x = if x == 0.0 { ZERO } else { x };
    let x = if x < INFINITE { x } else { INFINITE };
    let x = if x > -INFINITE { x } else { -INFINITE };
    let x = if value.is_nan() { -2.0 * INFINITE } else { x };
    // A lower index is a larger key: more magnitude above zero, less below.
    let bits = x.to_bits() as i64;
    f64::from_bits((bits | ((index ^ !(bits >> 63)) & INDEX_MASK)) as u64)
}

/// The index in a key.
#[inline(always)]
pub fn index(key: f64) -> usize {
    let bits = key.to_bits() as i64;
    ((bits ^ !(bits >> 63)) & INDEX_MASK) as usize
}

/// Keys of a row; `keys` holds [`num_keys`] values.
#[inline(always)]
pub fn write_keys(values: &[f32], keys: &mut [f64]) {
    let (used, rest) = keys.split_at_mut(values.len());
    for (i, (out, value)) in used.iter_mut().zip(values).enumerate() {
        *out = key(*value, i as i64);
    }
    rest.fill(NOTHING);
}

/// The best `best.len()` of the keys, best first: [`index`] tells which they are. `keys` is left in any order.
#[inline(always)]
pub fn top_k<S: Simd>(simd: S, keys: &mut [f64], best: &mut [f64]) {
    if best.len() > PASS * MOST_PASSES {
        keys.sort_unstable_by(|a, b| b.total_cmp(a));
        best.copy_from_slice(&keys[..best.len()]);
        return;
    }
    let mut bound = f64::INFINITY;
    for (pass, part) in best.chunks_mut(PASS).enumerate() {
        if pass > 0 {
            // What the passes before have found is out.
            for key in keys.iter_mut() {
                *key = if *key < bound { *key } else { NOTHING };
            }
        }
        let found = best_of_pass(simd, keys);
        part.copy_from_slice(&found[..part.len()]);
        bound = part[part.len() - 1];
    }
}

/// The best eight keys, best first.
#[inline(always)]
fn best_of_pass<S: Simd>(simd: S, keys: &[f64]) -> [f64; PASS] {
    let lanes = S::LANES / 2;
    let mut rounds = keys.chunks_exact(PASS * lanes);
    // Each lane keeps the best eight of its column.
    let mut best = match rounds.next() {
        Some(round) => sorted_columns(simd, round),
        None => return [NOTHING; PASS],
    };
    for round in rounds {
        best = merge(simd, &best, &sorted_columns(simd, round));
    }
    // Then lanes meet, until lane 0 has met them all.
    for by in [4, 2, 1] {
        if by < lanes {
            let mut other = best;
            for x in &mut other {
                *x = simd.shift_f64(*x, by);
            }
            best = merge(simd, &best, &other);
        }
    }
    let mut keys = [NOTHING; PASS];
    for i in 0..PASS {
        keys[i] = simd.first_f64(best[i]);
    }
    keys
}

/// Eight registers of keys, sorted lane by lane.
#[inline(always)]
fn sorted_columns<S: Simd>(simd: S, round: &[f64]) -> [S::F64; PASS] {
    let mut x = [simd.load_f64(round); PASS];
    for i in 1..PASS {
        x[i] = simd.load_f64(&round[i * (S::LANES / 2)..]);
    }
    sort(simd, &mut x);
    x
}

/// The larger to `i`, the smaller to `j`.
#[inline(always)]
fn order<S: Simd>(simd: S, x: &mut [S::F64; PASS], i: usize, j: usize) {
    (x[i], x[j]) = (simd.max_f64(x[i], x[j]), simd.min_f64(x[i], x[j]));
}

/// Sorts eight registers lane by lane, largest first: Batcher's odd-even merge sort, 19 exchanges.
///
/// Line by line, because a loop over pairs is not unrolled and keeps the registers in memory.
#[inline(always)]
fn sort<S: Simd>(simd: S, x: &mut [S::F64; PASS]) {
    order(simd, x, 0, 1);
    order(simd, x, 2, 3);
    order(simd, x, 4, 5);
    order(simd, x, 6, 7);
    order(simd, x, 0, 2);
    order(simd, x, 1, 3);
    order(simd, x, 4, 6);
    order(simd, x, 5, 7);
    order(simd, x, 1, 2);
    order(simd, x, 5, 6);
    order(simd, x, 0, 4);
    order(simd, x, 1, 5);
    order(simd, x, 2, 6);
    order(simd, x, 3, 7);
    order(simd, x, 2, 4);
    order(simd, x, 3, 5);
    order(simd, x, 1, 2);
    order(simd, x, 3, 4);
    order(simd, x, 5, 6);
}

/// The best eight of two sorted eights, sorted: the larger of opposite ends are a bitonic sequence.
#[inline(always)]
fn merge<S: Simd>(simd: S, a: &[S::F64; PASS], b: &[S::F64; PASS]) -> [S::F64; PASS] {
    let mut x = *a;
    for i in 0..PASS {
        x[i] = simd.max_f64(a[i], b[PASS - 1 - i]);
    }
    order(simd, &mut x, 0, 4);
    order(simd, &mut x, 1, 5);
    order(simd, &mut x, 2, 6);
    order(simd, &mut x, 3, 7);
    order(simd, &mut x, 0, 2);
    order(simd, &mut x, 1, 3);
    order(simd, &mut x, 4, 6);
    order(simd, &mut x, 5, 7);
    order(simd, &mut x, 0, 1);
    order(simd, &mut x, 2, 3);
    order(simd, &mut x, 4, 5);
    order(simd, &mut x, 6, 7);
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::level::{Level, dispatch};
    use crate::cpu::simd::Kernel;

    struct Run<'a>(&'a mut [f64], &'a mut [f64]);
    impl Kernel for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            top_k(simd, self.0, self.1);
        }
    }

    /// By value, then by index; NaN last.
    fn expected(values: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        let rank = |v: f32| if v.is_nan() { (0, 0.0) } else { (1, v + 0.0) };
        order.sort_by(|a, b| {
            let (a, b) = (rank(values[*a]), rank(values[*b]));
            b.partial_cmp(&a).unwrap()
        });
        order
    }

    #[test]
    fn order_of_awkward_values() {
        let awkward = [
            0.0,
            -0.0,
            1e-45,
            -1e-45,
            1e-40,
            1.0,
            1.0 + f32::EPSILON,
            1.0 - f32::EPSILON / 2.0,
            -1.0,
            f32::MAX,
            f32::MIN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            -f32::NAN,
        ];
        let mut state = 3u32;
        for len in [1, 2, 5, 8, 15, 16, 17, 60, 63, 64, 65, 128, 200, 1024, 1500] {
            for mode in 0..4 {
                let values: Vec<f32> = (0..len)
                    .map(|_| {
                        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                        match mode {
                            0 => f32::from_bits(state),
                            1 => awkward[(state >> 16) as usize % awkward.len()],
                            2 => ((state >> 24) as f32 - 128.0) / 16.0,
                            _ => 0.25,
                        }
                    })
                    .collect();
                let want = expected(&values);
                for k in [1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 64, 65, len / 2, len] {
                    if k == 0 || k > len {
                        continue;
                    }
                    for level in Level::available() {
                        let mut keys = vec![f64::NAN; num_keys(len)];
                        let mut best = vec![0.0; k];
                        write_keys(&values, &mut keys);
                        dispatch(level, Run(&mut keys, &mut best));
                        let got: Vec<usize> = best.iter().map(|key| index(*key)).collect();
                        assert_eq!(got, want[..k], "{len} values, mode {mode}, best {k}, at {level}");
                    }
                }
            }
        }
    }
}
