//! The CPU backend against the machine: measures what the machine can do at most, runs the workloads that the project compares
//! itself by, and says how much of the limit each reaches. Answers are checked against the reference before anything is timed.
//!
//! ```text
//! cargo run --release --example roofline
//! cargo run --release --example roofline -- --only W1,W5 --dtype bf16 --threads 1
//! cargo run --release --example roofline -- --level avx2 --json --plot roofline.svg
//! ```
//!
//! Rate and share are of the median call; the fastest is told, too, since other load only ever makes a call slower. Limits are
//! the best of thousands of short rounds, measured before and after. A share is the least time that the limits allow over the
//! time taken: the longer of arithmetic and of reading every input once from memory. Goals are shares of the limit.
//! Calls that memory bounds take turns with plain reads of as many bytes, by all threads: `of a read` is the median call's rate
//! over the median read's, both of the same seconds.
//! `--serve` is for the comparison with other libraries, in `benches/compare/cpu`.

mod exchange;
mod job;
mod plot;
#[path = "../support/mod.rs"]
mod support;
mod work;

use clap::{Parser, ValueEnum};
use exchange::{serve, time};
use gatefold::Dtype;
use gatefold::cpu::{Float, Level};
use half::{bf16, f16};
use job::{Kept, prepare};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use support::roof::{Limits, PlainRead, last_level_cache};
use work::{Goal, WORKLOADS, Workload};

/// Seconds that the calls of one workload take together, unless `--rounds` says how many there are.
const SECONDS: f64 = 1.0;
/// At least so many calls.
const CALLS: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
    F16,
}

/// Times the CPU backend and sets it against the machine's limits.
#[derive(Parser)]
struct Options {
    /// Workloads, as `W1,W5`; `W2` means all whose name begins so.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Element types of activations and weights; all if absent.
    #[arg(long, value_enum, value_delimiter = ',')]
    dtype: Vec<DtypeName>,
    /// Threads; one per core if absent.
    #[arg(long)]
    threads: Option<usize>,
    /// CPU level; the best one if absent.
    #[arg(long)]
    level: Option<String>,
    /// Timed calls of each workload; as many as take a second if absent.
    #[arg(long)]
    rounds: Option<usize>,
    /// Print JSON in place of the table.
    #[arg(long)]
    json: bool,
    /// Draw limits and workloads into this file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Read commands from the input, for other programs (see `exchange.rs`).
    #[arg(long)]
    serve: bool,
}

/// One line of the table.
pub struct Outcome {
    work: &'static Workload,
    dtype: Dtype,
    bytes: f64,
    /// Sorted.
    seconds: Vec<f64>,
    /// Of plain reads of as many bytes, sorted; none where arithmetic is the limit.
    reads: Vec<f64>,
}

impl Outcome {
    fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Seconds of a plain read over those of a call.
    fn of_read(&self) -> Option<f64> {
        (!self.reads.is_empty()).then(|| median(&self.reads) / self.median())
    }
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

fn main() -> ExitCode {
    let options = Options::parse();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| e.to_string());
    let result = pool(options.threads.unwrap_or(0)).and_then(|all| {
        // The limits of one thread are of interest beside those of all.
        let one = pool(1)?;
        all.install(|| start(&options, &one))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("roofline: {message}");
            ExitCode::from(2)
        }
    }
}

fn start(options: &Options, one: &rayon::ThreadPool) -> Result<(), String> {
    let level = match &options.level {
        Some(name) => Level::by_name(name),
        None => Level::detect(),
    };
    let level = level.map_err(|e| e.to_string())?;
    if options.serve {
        return serve(level);
    }
    if let Some(unknown) = options.only.iter().find(|name| !WORKLOADS.iter().any(|w| w.id.starts_with(*name))) {
        let known = WORKLOADS.map(|w| w.id).join(", ");
        return Err(format!("--only {unknown}: expected some of {known}"));
    }
    if options.rounds == Some(0) {
        return Err("--rounds 0: expected at least 1".into());
    }
    let measure = || [one.install(|| Limits::measure(level.name())), Limits::measure(level.name())];
    let before = measure();
    let mut outcomes = Vec::new();
    let wanted = |dtype| options.dtype.is_empty() || options.dtype.contains(&dtype);
    if wanted(DtypeName::F32) {
        measure_all::<f32>(options, level, &mut outcomes)?;
    }
    if wanted(DtypeName::Bf16) {
        measure_all::<bf16>(options, level, &mut outcomes)?;
    }
    if wanted(DtypeName::F16) {
        measure_all::<f16>(options, level, &mut outcomes)?;
    }
    // Other load may have come or gone.
    let after = measure();
    let limits = [0, 1].map(|i| before[i].max(after[i]));
    outcomes.sort_by_key(|outcome| WORKLOADS.iter().position(|w| w.id == outcome.work.id));
    let report = Report { level, limits, outcomes: &outcomes };
    if options.json {
        println!("{:#}", report.json());
    } else {
        report.print();
    }
    match &options.plot {
        Some(path) => plot::draw(path, level.name(), &limits[1], &outcomes),
        None => Ok(()),
    }
}

/// The workloads that are asked for, in one type.
fn measure_all<T: Float>(options: &Options, level: Level, outcomes: &mut Vec<Outcome>) -> Result<(), String> {
    let wanted = |w: &&Workload| options.only.is_empty() || options.only.iter().any(|name| w.id.starts_with(name));
    let mut plain = PlainRead::new();
    let mut kept = Kept::<T>::default();
    for work in WORKLOADS.iter().filter(wanted).filter(|work| work.has(T::DTYPE)) {
        let failed = |problem| format!("{} {}: {problem}", work.id, T::DTYPE);
        let mut job = prepare::<T>(work, level, &mut kept).map_err(failed)?;
        job.check().map_err(failed)?;
        let begin = Instant::now();
        let (mut seconds, mut reads) = (Vec::new(), Vec::new());
        let is_enough = |calls: usize| match options.rounds {
            Some(rounds) => calls >= rounds,
            None => calls >= CALLS && begin.elapsed().as_secs_f64() >= SECONDS,
        };
        while !is_enough(seconds.len()) {
            if work.is_decode() {
                reads.push(plain.seconds(job.bytes()));
            }
            seconds.extend(time(job.as_mut(), 1).map_err(failed)?);
        }
        seconds.sort_by(f64::total_cmp);
        reads.sort_by(f64::total_cmp);
        outcomes.push(Outcome { work, dtype: T::DTYPE, bytes: job.bytes(), seconds, reads });
    }
    Ok(())
}

struct Report<'a> {
    level: Level,
    /// Of one thread and of all.
    limits: [Limits; 2],
    outcomes: &'a [Outcome],
}

/// A line's numbers.
struct Line {
    rate: f64,
    unit: &'static str,
    share: Option<f64>,
    goal: String,
    /// Small enough to stay in the last-level cache, and faster than memory.
    is_cached: bool,
}

impl Report<'_> {
    fn line(&self, outcome: &Outcome) -> Line {
        let (seconds, flops, bytes) = (outcome.median(), outcome.work.flops(), outcome.bytes);
        let roof = self.limits[1].roof(outcome.dtype == Dtype::BF16);
        let goal = match outcome.work.goal(outcome.dtype, self.limits[1].threads, self.level.name()) {
            Goal::None => "-".into(),
            Goal::Share(share) => format!("{:.0} %", 100.0 * share),
            Goal::Milliseconds(ms) => format!("{ms} ms"),
        };
        if flops == 0.0 {
            return Line { rate: bytes / seconds / 1e9, unit: "GB/s", share: None, goal, is_cached: false };
        }
        let share = roof.limit(flops, bytes) / seconds;
        let is_compute_bound = roof.is_compute_bound(flops, bytes);
        let (amount, unit) = if outcome.work.is_decode() { (bytes, "GB/s") } else { (flops, "GFLOP/s") };
        let is_cached = !is_compute_bound && share > 1.0 && last_level_cache().is_some_and(|size| bytes <= size);
        Line { rate: amount / seconds / 1e9, unit, share: Some(share), goal, is_cached }
    }

    fn print(&self) {
        let [one, all] = self.limits;
        println!("Limits, measured, level {}", self.level.name());
        println!("  {:24} {:>12} {:>12}", "", "1 thread", format!("all {}", all.threads));
        for (name, unit, of) in LIMITS {
            if of(&all) > 0.0 {
                println!("  {name:24} {:>12.1} {:>12.1} {unit}", of(&one) / 1e9, of(&all) / 1e9);
            }
        }
        println!();
        println!(
            "{:8} {:36} {:5} {:>12} {:>12} {:>17} {:>9} {:>9} {:>7}",
            "", "", "", "median", "fastest", "rate", "of limit", "of a read", "goal"
        );
        let mut any_cached = false;
        for outcome in self.outcomes {
            let line = self.line(outcome);
            any_cached |= line.is_cached;
            println!(
                "{:8} {:36} {:5} {:>9.3} ms {:>9.3} ms {:>9.1} {:7} {:>8}{} {:>9} {:>7}",
                outcome.work.id,
                outcome.work.about,
                outcome.dtype.name(),
                outcome.median() * 1e3,
                outcome.seconds[0] * 1e3,
                line.rate,
                line.unit,
                percent(line.share),
                if line.is_cached { '*' } else { ' ' },
                percent(outcome.of_read()),
                line.goal
            );
        }
        if any_cached {
            println!("* reads less than the last-level cache holds: in part from there, not from memory");
        }
    }

    fn json(&self) -> Value {
        let limits = |l: &Limits| -> Value {
            let value = |of: fn(&Limits) -> f64| if of(l) > 0.0 { json!(of(l) / 1e9) } else { Value::Null };
            json!({
                "threads": l.threads, "f32_gflop_s": value(|l| l.single), "bf16_gflop_s": value(|l| l.pairs),
                "l2_gb_s": value(|l| l.l2), "l3_gb_s": value(|l| l.l3), "memory_gb_s": value(|l| l.memory),
            })
        };
        let outcomes = self.outcomes.iter().map(|outcome| {
            let (line, seconds) = (self.line(outcome), &outcome.seconds);
            json!({
                "workload": outcome.work.id, "about": outcome.work.about, "dtype": outcome.dtype.name(),
                "median_ms": outcome.median() * 1e3, "min_ms": seconds[0] * 1e3, "max_ms": seconds[seconds.len() - 1] * 1e3,
                "calls": seconds.len(), "flops": outcome.work.flops(), "bytes": outcome.bytes, "rate": line.rate,
                "unit": line.unit, "of_limit": line.share, "of_read": outcome.of_read(), "goal": line.goal,
            })
        });
        json!({
            "level": self.level.name(), "limits": self.limits.iter().map(limits).collect::<Vec<_>>(),
            "outcomes": outcomes.collect::<Vec<_>>(),
        })
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".into(), |share| format!("{:.0} %", 100.0 * share))
}

type Of = fn(&Limits) -> f64;

/// Names and units of the limits.
const LIMITS: [(&str, &str, Of); 5] = [
    ("f32 multiply-adds", "GFLOP/s", |l| l.single),
    ("bf16 pairs", "GFLOP/s", |l| l.pairs),
    ("second-level cache", "GB/s", |l| l.l2),
    ("third-level cache", "GB/s", |l| l.l3),
    ("memory", "GB/s", |l| l.memory),
];
