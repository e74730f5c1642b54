//! How other programs get the same numbers: raw files with a table of what is in them, and calls on command.
//!
//! [`serve`] reads commands from its input, fields separated by tabs, and answers each with a line of JSON:
//!
//! ```text
//! prepare  W1  bf16  FOLDER    makes and checks a workload, writes its inputs and answers into the folder
//! run  gatefold  5             calls five times: {"seconds": [...]}
//! limits                       measures the machine's limits for as many threads
//! ```

use crate::job::{Job, Kept, prepare};
pub use crate::support::folder::Folder;
use crate::support::roof::Limits;
use crate::work::{WORKLOADS, Workload};
use gatefold::cpu::{Float, Level};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// Answers commands until the input ends.
pub fn serve(level: Level) -> Result<(), String> {
    let mut job: Option<Box<dyn Job>> = None;
    let mut input = String::new();
    loop {
        input.clear();
        if std::io::stdin().read_line(&mut input).map_err(|e| e.to_string())? == 0 {
            return Ok(());
        }
        let answer = match input.trim_end().split('\t').collect::<Vec<_>>()[..] {
            ["prepare", id, dtype, folder] => {
                job = None; // its memory, before the next one's
                start(id, dtype, Path::new(folder), level).map(|(made, answer)| {
                    job = Some(made);
                    answer
                })
            }
            ["run", "gatefold", calls] => match (&mut job, calls.parse()) {
                (Some(job), Ok(calls)) => time(job.as_mut(), calls).map(|seconds| json!({ "seconds": seconds })),
                _ => Err("run: nothing is prepared, or this is no number of calls".into()),
            },
            ["limits"] => {
                let limits = Limits::measure(level.name());
                Ok(json!({
                    "threads": limits.threads, "f32_gflop_s": limits.single / 1e9, "bf16_gflop_s": limits.pairs / 1e9,
                    "l2_gb_s": limits.l2 / 1e9, "l3_gb_s": limits.l3 / 1e9, "memory_gb_s": limits.memory / 1e9,
                }))
            }
            _ => Err(format!("unknown command: {}", input.trim())),
        };
        println!("{}", answer.unwrap_or_else(|error| json!({ "error": error })));
    }
}

/// Seconds of each of so many calls.
pub fn time(job: &mut dyn Job, calls: usize) -> Result<Vec<f64>, String> {
    (0..calls)
        .map(|_| {
            let start = Instant::now();
            job.call().map_err(|e| e.to_string())?;
            Ok(start.elapsed().as_secs_f64())
        })
        .collect()
}

fn start(id: &str, dtype: &str, folder: &Path, level: Level) -> Result<(Box<dyn Job>, Value), String> {
    let work = WORKLOADS.iter().find(|work| work.id == id).ok_or_else(|| format!("unknown workload {id}"))?;
    match dtype {
        "f32" => start_with::<f32>(work, folder, level),
        "bf16" => start_with::<bf16>(work, folder, level),
        "f16" => start_with::<f16>(work, folder, level),
        _ => Err(format!("unknown type {dtype}")),
    }
}

fn start_with<T: Float>(work: &Workload, path: &Path, level: Level) -> Result<(Box<dyn Job>, Value), String> {
    if !work.has(T::DTYPE) {
        return Err(format!("{} has no {}", work.id, T::DTYPE));
    }
    let mut job = prepare::<T>(work, level, &mut Kept::default())?;
    job.check()?;
    let mut folder = Folder::new(path).map_err(|e| format!("{}: {e}", path.display()))?;
    job.write(&mut folder).and_then(|()| folder.finish()).map_err(|e| format!("{}: {e}", path.display()))?;
    let answer = json!({
        "variants": ["gatefold"], "flops": work.flops(), "bytes": job.bytes(), "is_decode": work.is_decode(),
        "about": work.about, "level": level.name(), "threads": rayon::current_num_threads(),
    });
    Ok((job, answer))
}
