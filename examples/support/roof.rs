//! The machine's limits, measured: multiply-adds and bytes from memory, with all threads of the current rayon pool.

use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// What the machine can do at best.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// FLOP/s of multiply-adds in the instructions that the level uses for this element type.
    pub flops: f64,
    /// Bytes per second read from memory that no cache holds.
    pub bytes: f64,
}

impl Roof {
    /// Measures both; takes under a second. `pairs`: the level multiplies pairs of bf16.
    pub fn measure(level: &str, pairs: bool) -> Roof {
        Roof { flops: flops(level, pairs), bytes: bandwidth() }
    }

    /// The least time that so much work can take, in seconds.
    pub fn limit(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.flops).max(bytes / self.bytes)
    }

    /// Whether multiplying takes longer than reading.
    pub fn is_compute_bound(&self, flops: f64, bytes: f64) -> bool {
        flops / self.flops > bytes / self.bytes
    }
}

/// Work of one call of a kernel, per thread.
const ROUNDS: usize = 200_000;

/// The best of several runs on all threads: FLOPs of one call over its time.
fn flops(level: &str, pairs: bool) -> f64 {
    let (kernel, flops_per_round): (fn() -> f32, usize) = kernel(level, pairs);
    let threads = rayon::current_num_threads();
    let mut best = 0.0f64;
    for _ in 0..6 {
        let start = Instant::now();
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
            black_box(kernel());
        });
        best = best.max((threads * ROUNDS * flops_per_round) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(target_arch = "x86_64")]
fn kernel(level: &str, pairs: bool) -> (fn() -> f32, usize) {
    if level == "avx512bf16" && pairs && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512 BF16 was detected above.
        (|| unsafe { x86::pairs_zmm() }, x86::CHAINS * 64)
    } else if level.starts_with("avx512") && is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512 F was detected above.
        (|| unsafe { x86::fma_zmm() }, x86::CHAINS * 32)
    } else if level != "portable" && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA were detected above.
        (|| unsafe { x86::fma_ymm() }, x86::CHAINS * 16)
    } else {
        (portable, 64)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn kernel(_: &str, _: bool) -> (fn() -> f32, usize) {
    (portable, 64)
}

/// What the compiler makes of plain multiply and add for the build's own target: 32 chains.
fn portable() -> f32 {
    let mut acc = [1.0f32; 32];
    let (a, b) = (black_box(1.000_000_1f32), black_box(1e-9f32));
    for _ in 0..ROUNDS {
        for x in &mut acc {
            *x = *x * a + b;
        }
    }
    acc.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::ROUNDS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent accumulators: more than latency times issue width of any core so far.
    pub const CHAINS: usize = 12;

    /// `CHAINS` multiply-adds of 16 numbers a round.
    #[target_feature(enable = "avx512f")]
    pub fn fma_zmm() -> f32 {
        let mut acc = [_mm512_set1_ps(1.0); CHAINS];
        let (a, b) = (_mm512_set1_ps(black_box(1e-9)), _mm512_set1_ps(black_box(1.0)));
        for _ in 0..ROUNDS {
            for x in &mut acc {
                *x = _mm512_fmadd_ps(a, b, *x);
            }
        }
        acc.iter().map(|x| _mm512_reduce_add_ps(*x)).sum()
    }

    /// `CHAINS` multiply-adds of 32 numbers a round.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn pairs_zmm() -> f32 {
        let mut acc = [_mm512_set1_ps(1.0); CHAINS];
        let a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1e-9)), _mm512_set1_ps(black_box(1e-9)));
        let b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(black_box(1.0)));
        for _ in 0..ROUNDS {
            for x in &mut acc {
                *x = _mm512_dpbf16_ps(*x, a, b);
            }
        }
        acc.iter().map(|x| _mm512_reduce_add_ps(*x)).sum()
    }

    /// `CHAINS` multiply-adds of 8 numbers a round.
    #[target_feature(enable = "avx2,fma")]
    pub fn fma_ymm() -> f32 {
        let mut acc = [_mm256_set1_ps(1.0); CHAINS];
        let (a, b) = (_mm256_set1_ps(black_box(1e-9)), _mm256_set1_ps(black_box(1.0)));
        for _ in 0..ROUNDS {
            for x in &mut acc {
                *x = _mm256_fmadd_ps(a, b, *x);
            }
        }
        let sum = acc.iter().fold(_mm256_setzero_ps(), |s, x| _mm256_add_ps(s, *x));
        _mm_cvtss_f32(_mm256_castps256_ps128(sum))
    }
}

/// Bytes per second of reading an array that is larger than any cache, once through.
fn bandwidth() -> f64 {
    let words = 48usize << 20; // 384 MiB
    let data: Vec<u64> = (0..words as u64).into_par_iter().collect();
    let mut best = 0.0f64;
    for _ in 0..4 {
        let start = Instant::now();
        let sum: u64 = data
            .par_chunks(1 << 16)
            .map(|chunk| {
                let mut acc = [0u64; 16];
                for words in chunk.chunks_exact(16) {
                    for (a, w) in acc.iter_mut().zip(words) {
                        *a = a.wrapping_add(*w);
                    }
                }
                acc.iter().fold(0, |s: u64, a| s.wrapping_add(*a))
            })
            .reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        best = best.max((words * 8) as f64 / start.elapsed().as_secs_f64());
    }
    best
}
