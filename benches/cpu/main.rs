//! Speed of the CPU backend on shapes of real models (`tests/configs`).
//!
//! ```text
//! cargo bench --bench cpu                       all
//! cargo bench --bench cpu -- moe/decode         those whose name contains this
//! cargo bench --bench cpu -- --test             each once: are the answers right?
//! RAYON_NUM_THREADS=1 cargo bench --bench cpu   on one thread
//! ```
//!
//! Names are `group/model/dtype`. Before a bench is timed, sampled rows of its answer are compared with the reference.
//! Throughput is in FLOPs ("elements") where arithmetic bounds the speed (`attention/prefill`, `moe/prefill`, `linear`), in
//! bytes that must come from memory for `attention/decode` and `moe/decode`, in tokens for `route`. A table at the end sets
//! the fastest call of each bench against the machine's limits, which are measured before and after: other load only ever
//! makes a call slower.
//!
//! Decoding finds neither keys nor weights in a cache: the calls take turns over copies of the keys, together far larger than
//! a last-level cache, and over tokens that choose other experts. At most 3.5 GB of memory are in use.

mod attention;
mod linear;
mod moe;
mod route;
#[path = "../../examples/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use gatefold::Dtype;
use gatefold::cpu::{Cpu, Float};
use gatefold::spec::{HfConfig, Layer, Mlp, Moe};
use std::time::{Duration, Instant};
use support::array::Array;
use support::measure::near;
use support::random::Maker;
use support::roof::Roof;

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().build().expect("a pool of threads");
    pool.install(|| {
        let mut suite = Suite::new();
        attention::benches(&mut suite);
        route::benches(&mut suite);
        moe::benches(&mut suite);
        linear::benches(&mut suite);
        suite.finish();
    });
}

/// What one call has to do.
#[derive(Clone, Copy)]
pub enum Work {
    /// Multiply-adds count as two.
    Flops(usize),
    /// Read from memory.
    Bytes(usize),
    /// Tokens to route.
    Tokens(usize),
}

struct Outcome {
    name: String,
    dtype: Dtype,
    work: Work,
    fastest: Duration,
}

/// Runs benches and keeps their fastest calls.
pub struct Suite {
    criterion: Criterion,
    level: &'static str,
    /// Of f32 multiply-adds and of pairs of bf16; `None` where nothing is timed.
    roofs: Option<[Roof; 2]>,
    outcomes: Vec<Outcome>,
}

impl Suite {
    fn new() -> Suite {
        let criterion = Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(500))
            .measurement_time(Duration::from_millis(2500))
            .configure_from_args();
        let given = |name: &str| std::env::args().any(|arg| arg == name);
        let is_timed = given("--bench") && !given("--test") && !given("--list");
        let level = Cpu::new().expect("a level").level().name();
        Suite { criterion, level, roofs: is_timed.then(|| roofs(level)), outcomes: Vec::new() }
    }

    /// Whether times are taken; otherwise every bench runs once, and may be smaller.
    pub fn is_timed(&self) -> bool {
        self.roofs.is_some()
    }

    /// `prepare` gives the call to time, after it has checked its answer; it runs only if the bench is asked for.
    pub fn bench<F: FnMut()>(
        &mut self,
        group: &str,
        model: &str,
        dtype: Dtype,
        work: Work,
        prepare: impl FnOnce() -> F,
    ) {
        let (mut prepare, mut call, mut fastest) = (Some(prepare), None, Duration::MAX);
        let name = format!("{group}/{model}/{dtype}");
        let mut group = self.criterion.benchmark_group(group);
        group.sampling_mode(SamplingMode::Flat).throughput(match work {
            Work::Flops(n) | Work::Tokens(n) => Throughput::Elements(n as u64),
            Work::Bytes(n) => Throughput::Bytes(n as u64),
        });
        group.bench_function(BenchmarkId::new(model, dtype), |bencher| {
            let call = call.get_or_insert_with(|| prepare.take().expect("prepared once")());
            bencher.iter_custom(|calls| {
                let mut total = Duration::ZERO;
                for _ in 0..calls {
                    let start = Instant::now();
                    call();
                    let time = start.elapsed();
                    total += time;
                    fastest = fastest.min(time);
                }
                total
            });
        });
        group.finish();
        if call.is_some() {
            self.outcomes.push(Outcome { name, dtype, work, fastest });
        }
    }

    fn finish(self) {
        self.criterion.final_summary();
        let Some(before) = self.roofs else { return };
        let after = roofs(self.level);
        let [single, pairs] = [0, 1].map(|i| before[i].max(after[i]));
        println!("Limits of {} threads, measured, level {}:", rayon::current_num_threads(), self.level);
        println!("  multiply-adds of f32    {:8.1} GFLOP/s", single.flops / 1e9);
        println!("  of pairs of bf16        {:8.1} GFLOP/s", pairs.flops / 1e9);
        let memory = single.bytes.max(pairs.bytes);
        println!("  memory                  {:8.1} GB/s\n", memory / 1e9);
        println!("{:44} {:>11} {:>17} {:>9}", "", "fastest", "rate", "of limit");
        for outcome in &self.outcomes {
            let seconds = outcome.fastest.as_secs_f64();
            let peak = if outcome.dtype == Dtype::BF16 { pairs.flops } else { single.flops };
            let (amount, unit, limit) = match outcome.work {
                Work::Flops(n) => (n as f64 / 1e9, "GFLOP/s", Some(peak / 1e9)),
                Work::Bytes(n) => (n as f64 / 1e9, "GB/s", Some(memory / 1e9)),
                Work::Tokens(n) => (n as f64 / 1e6, "Mtoken/s", None),
            };
            let rate = amount / seconds;
            let share = limit.map_or("-".into(), |limit| format!("{:.0} %", 100.0 * rate / limit));
            println!("{:44} {:8.3} ms {rate:8.1} {unit:8} {share:>9}", outcome.name, seconds * 1e3);
        }
    }
}

fn roofs(level: &str) -> [Roof; 2] {
    [false, true].map(|pairs| Roof::measure(level, pairs))
}

/// A model of `tests/configs`.
fn config(model: &str) -> HfConfig {
    let path = format!("{}/tests/configs/{model}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    HfConfig::from_json(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// One of a model's layers.
pub fn layer(model: &str, number: usize) -> Layer {
    config(model).layer(number).unwrap_or_else(|e| panic!("{model}, layer {number}: {e}"))
}

/// The mixture of the first layer that is one.
pub fn mixture(model: &str) -> Moe {
    let config = config(model);
    let moe = (0..config.num_layers).find_map(|number| match config.layer(number).ok()?.mlp {
        Mlp::Moe(moe) => Some(*moe),
        _ => None,
    });
    moe.unwrap_or_else(|| panic!("{model} has no mixture"))
}

/// Random numbers with mean 0; the same ones for a seed, whatever the type.
pub fn random<T: Float>(seed: u64, shape: &[usize], deviation: f64) -> Array<T> {
    Maker::new(seed, &|_| ()).array(shape, deviation)
}

/// The first, the middle and the last.
pub fn samples(rows: usize) -> Vec<usize> {
    let mut samples = vec![0, rows / 2, rows - 1];
    samples.dedup();
    samples
}

/// Panics if the answer is not the reference's, as [`near`] judges.
pub fn check<T: Float>(what: &str, got: &Array<T>, truth: &Array<f64>) {
    near(got, truth).unwrap_or_else(|problem| panic!("{what}, {problem}"));
}
