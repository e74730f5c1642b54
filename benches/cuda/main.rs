//! Speed of the CUDA backend on shapes of real models (`tests/configs`). Without a GPU it prints SKIPPED and ends.
//!
//! ```text
//! cargo bench --bench cuda                       all
//! cargo bench --bench cuda -- moe/qwen3          those whose name contains this
//! cargo bench --bench cuda -- --test             each once: are the answers right?
//! BENCH --serve                                  commands on the input, for benches/compare/gpu (see serve.rs)
//! BENCH --load PLAN                              the other process of a case of `load` (see load.rs)
//! ```
//!
//! Before a case is timed, sampled rows of its answer are compared with the reference. A call is timed on the GPU, between two
//! events, after a kernel that fills the L2 cache with something else; launches are queued meanwhile, so their cost on the host
//! is hidden as far as it is smaller than that. Only `load` is timed on the host. A table at the end sets the median call of each case
//! against the published peaks of the device: FLOPs (dense) or bytes, whichever allows less.

mod attention;
mod case;
mod linear;
mod load;
mod moe;
mod route;
mod serve;
#[path = "../../examples/support/mod.rs"]
mod support;

use case::{Case, Job, Timer};
use criterion::{Criterion, SamplingMode, Throughput};
use gatefold::Dtype;
use gatefold::cuda::Device;
use std::time::Duration;

/// Dense peaks by a part of the device's name: FLOP/s in bf16 or f16, FLOP/s in f32 outside of the tensor cores, bytes/s. From
/// NVIDIA's data sheets.
const ROOFS: [(&str, [f64; 3]); 3] = [
    ("H200", [989.5e12, 66.9e12, 4.8e12]),
    ("H100 80GB HBM3", [989.5e12, 66.9e12, 3.35e12]),
    ("A100", [312e12, 19.5e12, 2.039e12]),
];

fn main() {
    if let Some(plan) = std::env::args().skip_while(|argument| argument != "--load").nth(1) {
        return load::child(&plan);
    }
    let device = match Device::open(0) {
        // One for the whole run: jobs borrow it, and the process ends with it.
        Ok(device) => &*Box::leak(Box::new(device)),
        Err(error) => {
            println!("SKIPPED bench cuda: {error}");
            assert!(std::env::var_os("GATEFOLD_REQUIRE_CUDA").is_none_or(|value| value != "1"), "{error}");
            return;
        }
    };
    let cases = cases();
    if std::env::args().any(|argument| argument == "--serve") {
        return serve::serve(device, &cases);
    }
    run(device, &cases);
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    linear::cases(&mut cases);
    attention::cases(&mut cases);
    route::cases(&mut cases);
    moe::cases(&mut cases);
    load::cases(&mut cases);
    cases
}

/// Criterion's report, then our table.
fn run(device: &'static Device, cases: &[Case]) {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    let timer = Timer::new(device).expect("memory for the timer");
    let roof = ROOFS.iter().find(|(name, _)| device.name().contains(name)).map(|(_, roof)| *roof);
    let mut rows = Vec::new();
    for case in cases {
        let (mut job, mut times) = (None::<Box<dyn Job>>, Vec::new());
        let (group, rest) = case.name.split_once('/').expect("a group and a name");
        let mut group = criterion.benchmark_group(group);
        group.sampling_mode(SamplingMode::Flat);
        if case.flops > 0.0 {
            group.throughput(Throughput::Elements(case.flops as u64));
        }
        group.bench_function(rest, |bencher| {
            let job = job.get_or_insert_with(|| {
                let mut job = (case.make)(device).unwrap_or_else(|error| panic!("{}: {error}", case.name));
                job.check().unwrap_or_else(|problem| panic!("{}: {problem}", case.name));
                job
            });
            bencher.iter_custom(|calls| {
                let found = timer.seconds(job.as_mut(), calls as usize).expect("a call that was checked");
                times.extend_from_slice(&found);
                Duration::from_secs_f64(found.iter().sum())
            });
        });
        group.finish();
        if let Some(job) = job {
            times.sort_by(f64::total_cmp);
            rows.push((case, job.bytes(), times.get(times.len() / 2).copied().unwrap_or(f64::NAN)));
        }
    }
    criterion.final_summary();
    println!("\n{}, CUDA {:?}", device.name(), device.driver_version());
    println!("{:48} {:>12} {:>17} {:>9}", "", "median", "rate", "of roof");
    for (case, bytes, seconds) in rows {
        let peaks = roof.map(|[tensor, single, memory]| {
            (case.flops / if case.dtype == Dtype::F32 { single } else { tensor }, bytes / memory)
        });
        let is_arithmetic = peaks.map_or(case.flops > 200.0 * bytes, |(arithmetic, memory)| arithmetic > memory);
        let share = match peaks {
            Some((a, m)) if a.max(m) > 0.0 => format!("{:.0} %", 100.0 * a.max(m) / seconds),
            _ => "-".into(),
        };
        let (rate, unit) =
            if is_arithmetic { (case.flops / seconds / 1e12, "TFLOP/s") } else { (bytes / seconds / 1e9, "GB/s") };
        println!("{:48} {:9.1} us {rate:9.1} {unit:8} {share:>8}", case.name, seconds * 1e6);
    }
}
