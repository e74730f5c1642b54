//! Commands for `benches/compare/gpu/run.py`: fields separated by tabs, each answered by a line of JSON.
//!
//! ```text
//! device                    {"name": ..., "cuda": ..}
//! list                      {"cases": [...]}
//! prepare  CASE  FOLDER     makes and checks a case, writes its inputs and its answer into the folder if there are peers
//! run  5                    calls five times: {"seconds": [...]}
//! ```

use crate::case::{Case, Job, Timer};
use crate::support::folder::Folder;
use gatefold::cuda::Device;
use serde_json::{Value, json};
use std::path::Path;

/// Answers commands until the input ends.
pub fn serve(device: &'static Device, cases: &[Case]) {
    let timer = Timer::new(device).expect("memory for the timer");
    let mut job: Option<Box<dyn Job>> = None;
    for line in std::io::stdin().lines() {
        let line = line.expect("text");
        let answer = match line.trim_end().split('\t').collect::<Vec<_>>()[..] {
            ["device"] => Ok(json!({ "name": device.name(), "cuda": device.driver_version() })),
            ["list"] => Ok(json!({ "cases": cases.iter().map(|case| &case.name).collect::<Vec<_>>() })),
            ["prepare", name, folder] => {
                job = None; // its memory, before the next one's
                prepare(device, cases, name, Path::new(folder)).map(|(made, answer)| {
                    job = Some(made);
                    answer
                })
            }
            ["run", calls] => match (&mut job, calls.parse()) {
                (Some(job), Ok(calls)) => timer.seconds(job.as_mut(), calls),
                _ => Err("run: nothing is prepared, or this is no number of calls".into()),
            }
            .map(|seconds| json!({ "seconds": seconds })),
            _ => Err(format!("unknown command: {line}")),
        };
        println!("{}", answer.unwrap_or_else(|error: String| json!({ "error": error })));
    }
}

fn prepare(device: &'static Device, cases: &[Case], name: &str, path: &Path) -> Result<(Box<dyn Job>, Value), String> {
    let case = cases.iter().find(|case| case.name == name).ok_or_else(|| format!("unknown case {name}"))?;
    let mut job = (case.make)(device).map_err(|e| e.to_string())?;
    job.check()?;
    if case.kind != "alone" {
        let written = Folder::new(path).and_then(|mut folder| job.write(&mut folder).and_then(|()| folder.finish()));
        written.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let answer = json!({
        "kind": case.kind, "dtype": case.dtype.name(), "flops": case.flops, "bytes": job.bytes(),
    });
    Ok((job, answer))
}
