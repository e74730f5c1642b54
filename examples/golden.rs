//! Runs every file of a directory in the golden format through the public API.
//!
//! ```text
//! cargo run --release --example golden -- DIR [--backend reference|cpu|cuda|sim] [--level L] [--dtype f32|bf16|f16]
//! ```
//!
//! One line per file and section: `ok`, `FAIL` or `unsupported` with the reason, the level that was really used, the error
//! and the tolerance. In f32 the error is the format's measure against the stored f64 truth; in bf16 and f16 it is the
//! largest share of what the numerical contract allows, against the reference on the rounded inputs. Exit code 1 on a FAIL.

mod support;

use clap::{Parser, ValueEnum};
use gatefold::Dtype;
use gatefold::cpu::Level;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use support::golden::{Case, Line, Outcome, Runner};

#[derive(Clone, Copy, ValueEnum)]
enum BackendName {
    Reference,
    Cpu,
    Cuda,
    Sim,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
    F16,
}

/// Checks a directory of golden files.
#[derive(Parser)]
struct Options {
    /// Directory with files in the golden format.
    directory: PathBuf,
    /// What computes.
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// CPU level; the best one if absent.
    #[arg(long)]
    level: Option<String>,
    /// Element type of activations and weights.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            eprintln!("golden: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool, String> {
    // Where a device is used, it lives as long as the run.
    #[cfg(feature = "cuda")]
    let device: gatefold::cuda::Device;
    #[cfg(gatefold_simulator)]
    let simulator = support::simulator::Simulator::new(false);
    let runner = match options.backend {
        BackendName::Reference => Runner::Reference,
        BackendName::Cpu => Runner::Cpu(match &options.level {
            Some(name) => Level::by_name(name).map_err(|e| e.to_string())?,
            None => Level::detect().map_err(|e| e.to_string())?,
        }),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => {
            device = gatefold::cuda::Device::open(0).map_err(|e| e.to_string())?;
            Runner::Device(&device, "cuda")
        }
        #[cfg(not(feature = "cuda"))]
        BackendName::Cuda => return Err("unsupported: this build has no feature cuda".into()),
        #[cfg(gatefold_simulator)]
        BackendName::Sim => Runner::Device(&simulator, "simulator"),
        #[cfg(not(gatefold_simulator))]
        BackendName::Sim => {
            return Err("unsupported: the simulator is part of the repository, not of the package".into());
        }
    };
    let dtype = match options.dtype {
        DtypeName::F32 => Dtype::F32,
        DtypeName::Bf16 => Dtype::BF16,
        DtypeName::F16 => Dtype::F16,
    };
    let directory = &options.directory;
    let entries = std::fs::read_dir(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    let (mut ok, mut failed, mut unsupported) = (0, 0, 0);
    let mut stdout = std::io::stdout().lock();
    for path in &files {
        let file = path.file_stem().unwrap_or_default().to_string_lossy();
        let lines = match Case::read(path) {
            Ok(case) => case.sections().iter().flat_map(|s| case.run(s, runner, dtype)).collect(),
            Err(what) => vec![Line { section: "-".into(), used: "-".into(), outcome: Outcome::Fail { what } }],
        };
        for Line { section, used, outcome } in lines {
            let (count, word, text) = match outcome {
                Outcome::Ok { error, tolerance } => (&mut ok, "ok", format!("{error:.1e} of {tolerance:.0e}")),
                Outcome::Fail { what } => (&mut failed, "FAIL", what),
                Outcome::Unsupported { why } => (&mut unsupported, "unsupported", why),
            };
            *count += 1;
            writeln!(stdout, "{word:11} {file:42} {section:9} {used:16} {text}").map_err(|e| e.to_string())?;
        }
    }
    writeln!(stdout, "{ok} ok, {failed} failed, {unsupported} unsupported").map_err(|e| e.to_string())?;
    Ok(failed == 0)
}
