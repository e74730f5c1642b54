//! `simt LAUNCH.json`: runs one kernel as a file describes it. Exit status 0: clean, 1: findings, 2: a PTX or launch error.

use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1).filter(|a| a != "--help" && a != "-h") else {
        eprintln!("usage: simt LAUNCH.json        (see tests/simt/README.md for the fields)");
        return ExitCode::from(2);
    };
    match simt::runner::run_file(std::path::Path::new(&path)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(2)
        }
    }
}
