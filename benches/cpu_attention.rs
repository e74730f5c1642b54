//! Prefill and decode attention on the CPU: time, rate, and share of the roof that the same run measures.
//!
//! `cargo bench --bench cpu_attention -- [filter]`. Prefill is bound by multiply-adds, decode by memory: its keys and values
//! are another copy each time, together larger than any cache. The best of the repeats counts, because other load on the
//! machine only ever makes a repeat slower.

use gatefold::args::{AttentionInput, AttentionOutput, Kv};
use gatefold::cpu::{self, Cpu, Float};
use gatefold::random::uniform;
use gatefold::spec::Attention;
use gatefold::{Dtype, View, ViewMut, reference};
use half::bf16;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Shortest of the repeats within a second and a half, at least 3.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best, mut count) = (Instant::now(), f64::INFINITY, 0);
    while count < 3 || start.elapsed() < Duration::from_millis(1500) {
        let begin = Instant::now();
        f();
        best = best.min(begin.elapsed().as_secs_f64());
        count += 1;
    }
    best
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// Multiply-adds of one thread, in FLOP/s: f32, and bf16 where there is a dot product.
#[cfg(target_arch = "x86_64")]
fn peak() -> (f64, f64) {
    use std::arch::x86_64::*;
    const STEPS: usize = 20_000;
    #[target_feature(enable = "avx512f")]
    fn f32_512() -> f32 {
        let (x, mut acc) = (_mm512_set1_ps(0.999), [_mm512_set1_ps(1.0); 16]);
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, x, x);
            }
        }
        acc.iter().map(|acc| _mm512_reduce_add_ps(*acc)).sum()
    }
    #[target_feature(enable = "avx2,fma")]
    fn f32_256() -> f32 {
        let (x, mut acc) = (_mm256_set1_ps(0.999), [_mm256_set1_ps(1.0); 12]);
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, x, x);
            }
        }
        acc.iter().map(|acc| _mm256_cvtss_f32(*acc)).sum()
    }
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_512() -> f32 {
        let x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3), _mm512_set1_ps(1e-3));
        let mut acc = [_mm512_set1_ps(1.0); 16];
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, x, x);
            }
        }
        acc.iter().map(|acc| _mm512_reduce_add_ps(*acc)).sum()
    }
    let rate = |flops: f64, f: &dyn Fn() -> f32| {
        flops * STEPS as f64
            / best(|| {
                black_box(f());
            })
    };
    // SAFETY: each is called only where the CPU has its features.
    unsafe {
        let f32_rate = if is_x86_feature_detected!("avx512f") {
            rate(16.0 * 32.0, &|| f32_512())
        } else if is_x86_feature_detected!("fma") {
            rate(12.0 * 16.0, &|| f32_256())
        } else {
            f64::NAN
        };
        let dot = is_x86_feature_detected!("avx512bf16");
        (f32_rate, if dot { rate(16.0 * 64.0, &|| bf16_512()) } else { f32_rate })
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn peak() -> (f64, f64) {
    (f64::NAN, f64::NAN)
}

/// Bytes per second that so many threads read from memory.
fn bandwidth(threads: usize) -> f64 {
    let data = vec![1u64; 32 << 20];
    let time = pool(threads).install(|| {
        best(|| {
            use rayon::prelude::*;
            black_box(
                data.par_chunks(1 << 14).map(|chunk| chunk.iter().fold(0, |sum, x| sum ^ x)).reduce(|| 0, |a, b| a ^ b),
            );
        })
    });
    (data.len() * 8) as f64 / time
}

fn random<T: Float>(len: usize, seed: u64) -> Vec<T> {
    (0..len).map(|i| T::from_f32(2.0 * uniform(seed, i as u64, 0) - 1.0)).collect()
}

/// Keys and values of one layer.
struct Layer<T> {
    k: Vec<T>,
    v: Vec<T>,
}

struct Work {
    name: &'static str,
    spec: Attention,
    q_len: usize,
    kv_len: usize,
    layers: usize,
}

fn run<T: Float>(work: &Work, threads: usize, roof: (f64, f64)) {
    let spec = &work.spec;
    let (heads, kv_heads, dk, dv) = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim);
    let q = random::<T>(work.q_len * heads * dk, 1);
    let first =
        Layer { k: random::<T>(work.kv_len * kv_heads * dk, 2), v: random::<T>(work.kv_len * kv_heads * dv, 3) };
    let layers: Vec<_> = (0..work.layers).map(|_| Layer { k: first.k.clone(), v: first.v.clone() }).collect();
    let mut out = vec![T::default(); work.q_len * heads * dv];
    let mut cpu = Cpu::new().unwrap();
    let mut call = |layer: &Layer<T>| {
        let k = View::new(&layer.k, [work.kv_len, kv_heads, dk]);
        let v = View::new(&layer.v, [work.kv_len, kv_heads, dv]);
        let input = AttentionInput::new(View::new(&q, [work.q_len, heads, dk]), Kv::ragged(k, v, None));
        let output = AttentionOutput::new(ViewMut::new(&mut out, [work.q_len, heads, dv]));
        cpu::attention(&mut cpu, spec, &input, output).unwrap();
    };
    let time = pool(threads).install(|| {
        let mut next = 0;
        best(|| {
            call(&layers[next % layers.len()]);
            next += 1;
        })
    });

    // The answer first: the last query against the reference.
    let last = work.q_len - 1;
    let mut truth = vec![0.0; heads * dv];
    let k = View::new(&first.k, [work.kv_len, kv_heads, dk]);
    let v = View::new(&first.v, [work.kv_len, kv_heads, dv]);
    let input =
        AttentionInput::<_, f32>::new(View::new(&q[last * heads * dk..], [1, heads, dk]), Kv::ragged(k, v, None));
    reference::attention(spec, &input, AttentionOutput::new(ViewMut::new(&mut truth, [1, heads, dv]))).unwrap();
    let error = out[last * heads * dv..].iter().zip(&truth).map(|(x, y)| (x.to_f64() - y).abs()).fold(0.0, f64::max);
    let size = truth.iter().map(|x| x.abs()).fold(0.0, f64::max);
    assert!(error < size * if T::DTYPE == Dtype::F32 { 1e-5 } else { 2e-2 }, "error {error:e} of {size:e}");

    let pairs: usize = (0..work.q_len).map(|i| work.kv_len - work.q_len + i + 1).sum();
    let flops = 2.0 * (pairs * heads * (dk + dv)) as f64;
    let bytes = (work.kv_len * kv_heads * (dk + dv) * size_of::<T>()) as f64;
    let (peak, bandwidth) = roof;
    let bound = (flops / (peak * threads as f64)).max(bytes / bandwidth);
    println!(
        "{:<28} {:>5} {threads} threads, {}: {:9.3} ms  {:7.1} GFLOP/s {:6.1} GB/s  {:3.0} % of the roof",
        work.name,
        T::DTYPE.name(),
        cpu.level(),
        time * 1e3,
        flops / time * 1e-9,
        bytes / time * 1e-9,
        bound / time * 100.0
    );
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let mut mla = Attention::causal(16, 1, 576);
    mla.value_dim = 512;
    let all = [
        Work {
            name: "prefill 2048, 32/4 x 128",
            spec: Attention::causal(32, 4, 128),
            q_len: 2048,
            kv_len: 2048,
            layers: 1,
        },
        Work {
            name: "decode 8192, 32/4 x 128",
            spec: Attention::causal(32, 4, 128),
            q_len: 1,
            kv_len: 8192,
            layers: 12,
        },
        Work { name: "decode 8192, 8/8 x 128", spec: Attention::causal(8, 8, 128), q_len: 1, kv_len: 8192, layers: 12 },
        Work { name: "decode 4096, MLA 16 x 576/512", spec: mla, q_len: 1, kv_len: 4096, layers: 12 },
    ];
    let (f32_peak, bf16_peak) = peak();
    println!("one thread: {:.0} GFLOP/s f32, {:.0} GFLOP/s bf16", f32_peak * 1e-9, bf16_peak * 1e-9);
    for threads in [1, 2] {
        let bandwidth = bandwidth(threads);
        println!("{threads} threads: {:.1} GB/s", bandwidth * 1e-9);
        for work in all.iter().filter(|work| work.name.contains(&filter)) {
            run::<f32>(work, threads, (f32_peak, bandwidth));
            run::<bf16>(work, threads, (bf16_peak, bandwidth));
        }
    }
}
