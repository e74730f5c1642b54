//! The machine's limits, measured: multiply-adds, bytes from memory and from the caches, with all threads of the current rayon
//! pool.
//!
//! Other load only ever makes a machine slower, so the best of thousands of short rounds counts: one that nobody disturbed, the
//! clock and the vector units long up to speed. All threads do a round at the same time, each on a core of its own.

use rayon::prelude::*;
use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What the machine can do at best.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// FLOP/s of multiply-adds in the instructions that the level uses for this element type.
    pub flops: f64,
    /// Bytes per second read from memory that no cache holds.
    pub bytes: f64,
}

impl Roof {
    /// Of a device whose limits nobody has written down.
    pub const UNKNOWN: Roof = Roof { flops: f64::NAN, bytes: f64::NAN };

    /// Dense products in bf16 and memory of a GPU by its name, from NVIDIA's data sheets.
    pub fn of_gpu(name: &str) -> Option<Roof> {
        let known = [("H200", 989.5e12, 4.8e12), ("H100", 989.5e12, 3.35e12), ("A100", 312e12, 1.555e12)];
        let found = known.into_iter().find(|(part, ..)| name.contains(part));
        found.map(|(_, flops, bytes)| Roof { flops, bytes })
    }

    /// Measures both; takes about a second. `pairs`: the level multiplies pairs of bf16.
    pub fn measure(level: &str, pairs: bool) -> Roof {
        Roof { flops: flops(level, pairs), bytes: bandwidth() }
    }

    /// The better of two measurements, each number by itself.
    pub fn max(self, other: Roof) -> Roof {
        Roof { flops: self.flops.max(other.flops), bytes: self.bytes.max(other.bytes) }
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

/// Everything that [`Roof`] holds, for every kind of arithmetic and every level of memory. What a machine or a level does not
/// have, or does not tell, is 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Threads that were measured together.
    pub threads: usize,
    /// FLOP/s of f32 multiply-adds.
    pub single: f64,
    /// FLOP/s of multiply-adds of pairs of bf16.
    pub pairs: f64,
    /// Bytes per second read from each thread's second level of cache.
    pub l2: f64,
    /// Bytes per second read from the third level, by all threads together.
    pub l3: f64,
    /// Bytes per second read from memory.
    pub memory: f64,
}

impl Limits {
    /// Measures all; takes about two seconds.
    pub fn measure(level: &str) -> Limits {
        let threads = rayon::current_num_threads();
        let (l2, l3) = (cache_bytes(2), cache_bytes(3));
        // Well inside the one cache, well outside the one before. Other machines may share a third level with this one.
        let (in_l2, in_l3) = (l2 / 2, (2 * l2).max((l3 / (2 * threads)).min(6 * MIB)));
        Limits {
            threads,
            single: flops(level, false),
            pairs: if level == "avx512bf16" { flops(level, true) } else { 0.0 },
            l2: if l2 > 0 { cached(in_l2) } else { 0.0 },
            l3: if l3 > 0 { cached(in_l3) } else { 0.0 },
            memory: bandwidth(),
        }
    }

    /// The better of two measurements, each number by itself.
    pub fn max(self, other: Limits) -> Limits {
        Limits {
            threads: self.threads,
            single: self.single.max(other.single),
            pairs: self.pairs.max(other.pairs),
            l2: self.l2.max(other.l2),
            l3: self.l3.max(other.l3),
            memory: self.memory.max(other.memory),
        }
    }

    /// What bounds work on one element type.
    pub fn roof(&self, is_bf16: bool) -> Roof {
        let flops = if is_bf16 && self.pairs > 0.0 { self.pairs } else { self.single };
        Roof { flops, bytes: self.memory }
    }
}

/// Bytes of a level of cache, 0 where the system does not tell.
fn cache_bytes(level: usize) -> usize {
    let read = |index: usize, what: &str| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{what}");
        Some(std::fs::read_to_string(path).ok()?.trim().to_string())
    };
    let size = |index: usize| {
        let is_it = read(index, "level")? == level.to_string() && read(index, "type")? != "Instruction";
        let kib: usize = read(index, "size")?.strip_suffix('K')?.parse().ok()?;
        is_it.then_some(kib * 1024)
    };
    (0..8).find_map(size).unwrap_or(0)
}

/// Bytes of the last level of cache, where the system tells.
pub fn last_level_cache() -> Option<f64> {
    (1..=4).map(cache_bytes).filter(|bytes| *bytes > 0).max().map(|bytes| bytes as f64)
}

/// Seconds of the fastest round in `duration`. Every thread of the pool calls `work(round, thread)` once in each, all at the
/// same time; the round lasts from the first start to the last end.
fn fastest_round(duration: Duration, work: impl Fn(usize, usize) + Sync) -> f64 {
    let (threads, begin) = (rayon::current_num_threads(), Instant::now());
    let (arrived, end) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
    let times: Vec<Vec<(Instant, Instant)>> = rayon::broadcast(|thread| {
        let before = affinity::pin(thread.index(), threads);
        let mut times = Vec::new();
        for round in 0.. {
            if thread.index() == 0 && begin.elapsed() > duration {
                end.store(round, Ordering::Relaxed); // seen by all who see the arrival below
            }
            arrived.fetch_add(1, Ordering::AcqRel);
            let mut spins = 0;
            while arrived.load(Ordering::Acquire) < (round + 1) * threads {
                spins += 1;
                // Threads without cores of their own must come to run, too.
                if spins % (1 << 14) == 0 { std::thread::yield_now() } else { spin_loop() }
            }
            if round >= end.load(Ordering::Relaxed) {
                break;
            }
            let start = Instant::now();
            work(round, thread.index());
            times.push((start, Instant::now()));
        }
        affinity::restore(before);
        times
    });
    let seconds = |round: usize| {
        let start = times.iter().map(|t| t[round].0).min();
        let end = times.iter().map(|t| t[round].1).max();
        start.zip(end).map_or(f64::INFINITY, |(start, end)| (end - start).as_secs_f64())
    };
    (0..times[0].len()).map(seconds).fold(f64::INFINITY, f64::min)
}

/// Cores for threads: on a busy machine the system lets two threads of a pool share one for seconds.
#[cfg(target_os = "linux")]
mod affinity {
    // Of the C library, which std links.
    unsafe extern "C" {
        fn sched_getaffinity(thread: i32, bytes: usize, cores: *mut Cores) -> i32;
        fn sched_setaffinity(thread: i32, bytes: usize, cores: *const Cores) -> i32;
    }

    /// A bit for each core: 1024 of them, as in the C library.
    pub type Cores = [u64; 16];

    /// Pins this thread to the core of its number among those that it may use, if there are as many as threads (with fewer
    /// threads the system chooses better: numbers do not tell which cores are halves of one). Gives the cores of before.
    pub fn pin(thread: usize, threads: usize) -> Option<Cores> {
        let mut cores: Cores = [0; 16];
        // SAFETY: `cores` has the size that is told; thread 0 is the one that calls.
        let found = unsafe { sched_getaffinity(0, size_of::<Cores>(), &mut cores) } == 0;
        let usable = (0..1024).filter(|core| cores[core / 64] >> (core % 64) & 1 == 1);
        let core = usable.clone().nth(thread).filter(|_| found && usable.count() == threads)?;
        let mut only: Cores = [0; 16];
        only[core / 64] = 1 << (core % 64);
        restore(Some(only));
        Some(cores)
    }

    /// Lets this thread use these cores.
    pub fn restore(cores: Option<Cores>) {
        if let Some(cores) = cores {
            // SAFETY: as above. Where it fails, the thread keeps the cores that it has.
            unsafe { sched_setaffinity(0, size_of::<Cores>(), &cores) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod affinity {
    pub fn pin(_: usize, _: usize) -> Option<()> {
        None
    }
    pub fn restore(_: Option<()>) {}
}

/// Iterations in one call of a kernel: about 0.1 ms, far less than a scheduler's time slice.
const ROUNDS: usize = 60_000;

/// FLOPs of one call on every thread over the time of the fastest round.
fn flops(level: &str, pairs: bool) -> f64 {
    let (kernel, flops_per_round): (fn() -> f32, usize) = kernel(level, pairs);
    let seconds = fastest_round(Duration::from_millis(300), |_, _| {
        black_box(kernel());
    });
    (rayon::current_num_threads() * ROUNDS * flops_per_round) as f64 / seconds
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
        (portable, 2 * PORTABLE)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn kernel(_: &str, _: bool) -> (fn() -> f32, usize) {
    (portable, 2 * PORTABLE)
}

/// Accumulators of [`portable`]: with 48 the compiler keeps them in memory.
const PORTABLE: usize = 32;

/// What the compiler makes of plain multiply and add for the build's own target.
fn portable() -> f32 {
    let mut acc = [1.0f32; PORTABLE];
    let (a, b) = (black_box(0.999_999_9f32), black_box(1e-9f32));
    for _ in 0..ROUNDS {
        for x in &mut acc {
            *x = *x * a + b;
        }
    }
    acc.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Line, ROUNDS};
    use std::arch::x86_64::*;
    use std::array::from_fn;
    use std::hint::black_box;

    /// Independent accumulators: more than latency times issue width (6 times 2 for `vdpbf16ps` on Zen 5: 12 reached 91 % of what
    /// 14 do), and with two operands they just fit the 16 registers of AVX2.
    pub const CHAINS: usize = 14;

    /// `CHAINS` multiply-adds of 16 numbers a round.
    #[target_feature(enable = "avx512f")]
    pub fn fma_zmm() -> f32 {
        let mut acc: [_; CHAINS] = from_fn(|i| _mm512_set1_ps(i as f32));
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
        let mut acc: [_; CHAINS] = from_fn(|i| _mm512_set1_ps(i as f32));
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
        let mut acc: [_; CHAINS] = from_fn(|i| _mm256_set1_ps(i as f32));
        let (a, b) = (_mm256_set1_ps(black_box(1e-9)), _mm256_set1_ps(black_box(1.0)));
        for _ in 0..ROUNDS {
            for x in &mut acc {
                *x = _mm256_fmadd_ps(a, b, *x);
            }
        }
        let sum = acc.iter().fold(_mm256_setzero_ps(), |s, x| _mm256_add_ps(s, *x));
        _mm_cvtss_f32(_mm256_castps256_ps128(sum))
    }

    /// 64 bytes a load.
    #[target_feature(enable = "avx512f")]
    pub fn read_zmm(lines: &[Line]) -> u64 {
        let quarter = lines.len() / 4;
        let streams = [0, 1, 2, 3].map(|stream| &lines[stream * quarter..][..quarter]);
        let mut sums = [_mm512_setzero_si512(); 4];
        for line in 0..quarter {
            for (sum, stream) in sums.iter_mut().zip(streams) {
                // SAFETY: a `Line` is 64 bytes.
                *sum = _mm512_xor_si512(*sum, unsafe { _mm512_load_si512((&raw const stream[line]).cast()) });
            }
        }
        sums.iter().fold(0, |all, sum| all ^ _mm512_reduce_add_epi64(*sum) as u64)
    }

    /// 32 bytes a load.
    #[target_feature(enable = "avx2")]
    pub fn read_ymm(lines: &[Line]) -> u64 {
        super::read_any(lines)
    }
}

/// A line of cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u64; 8]);

const MIB: usize = 1 << 20;
/// What a thread reads in a round: 0.2 ms at 40 GB/s.
const PIECE: usize = 8 * MIB;

/// Bytes per second of reading an array that is larger than any cache, piece after piece.
fn bandwidth() -> f64 {
    let threads = rayon::current_num_threads();
    let bytes = (16 * threads * PIECE).clamp(384 * MIB, 1024 * MIB);
    let data: Vec<Line> = (0..bytes / size_of::<Line>()).into_par_iter().map(|i| Line([i as u64; 8])).collect();
    let piece = PIECE.min(bytes / (4 * threads)) / size_of::<Line>();
    let pieces = data.len() / piece;
    let seconds = fastest_round(Duration::from_millis(500), |round, thread| {
        let start = (round * threads + thread) % pieces * piece;
        black_box(read(&data[start..start + piece]));
    });
    (threads * piece * size_of::<Line>()) as f64 / seconds
}

/// An array to read plainly, in turn with calls that memory bounds: what memory gives changes within seconds where other
/// machines share it, so the best of a minute ago says little about a call.
pub struct PlainRead {
    data: Vec<Line>,
    next: usize,
}

impl PlainRead {
    /// Lines of a piece that a thread reads at a time: 1 MiB.
    const PIECE: usize = MIB / size_of::<Line>();

    /// An array that no cache holds.
    pub fn new() -> PlainRead {
        let data = (0..512 * Self::PIECE).into_par_iter().map(|i| Line([i as u64; 8])).collect();
        PlainRead { data, next: 0 }
    }

    /// Seconds of reading `bytes` with all threads; each call goes on where the one before ended.
    pub fn seconds(&mut self, bytes: f64) -> f64 {
        let (pieces, all) = ((bytes / MIB as f64).ceil() as usize, self.data.len() / Self::PIECE);
        let (data, first) = (&self.data, self.next);
        let start = Instant::now();
        rayon::broadcast(|thread| {
            for piece in (thread.index()..pieces).step_by(thread.num_threads()) {
                black_box(read(&data[(first + piece) % all * Self::PIECE..][..Self::PIECE]));
            }
        });
        self.next = (first + pieces) % all;
        start.elapsed().as_secs_f64() * bytes / (pieces * MIB) as f64
    }
}

/// Bytes per second of reading again and again: on each thread so many bytes of its own, which stay in a cache.
fn cached(bytes: usize) -> f64 {
    let (threads, part) = (rayon::current_num_threads(), bytes / size_of::<Line>());
    let data: Vec<Line> = (0..threads * part).into_par_iter().map(|i| Line([i as u64; 8])).collect();
    let times = (PIECE / bytes).max(1);
    let seconds = fastest_round(Duration::from_millis(300), |_, thread| {
        for _ in 0..times {
            black_box(read(black_box(&data[thread * part..(thread + 1) * part])));
        }
    });
    (threads * times * part * size_of::<Line>()) as f64 / seconds
}

/// Reads all lines with the widest loads there are.
fn read(lines: &[Line]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512 F was detected.
        return unsafe { x86::read_zmm(lines) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 was detected.
        return unsafe { x86::read_ymm(lines) };
    }
    read_any(lines)
}

/// Reads all lines, as four streams, which the hardware prefetches each by itself: while one stops at the end of a page, three
/// go on. 2 threads of a Zen 5 so reach 80 GB/s, 67 with one stream, 30 with sixteen (more than the prefetcher follows); AVX-512
/// loads make it 81, prefetch instructions 63 to 79, and huge pages change nothing.
#[inline(always)]
fn read_any(lines: &[Line]) -> u64 {
    let quarter = lines.len() / 4;
    let streams = [0, 1, 2, 3].map(|stream| &lines[stream * quarter..][..quarter]);
    let mut sums = [0u64; 8];
    for line in 0..quarter {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum ^= streams[0][line].0[i] ^ streams[1][line].0[i] ^ streams[2][line].0[i] ^ streams[3][line].0[i];
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}
