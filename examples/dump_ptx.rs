//! Writes every PTX module of the crate to a directory, one file per entry: what a GPU's driver would be given.
//!
//! `cargo run --example dump_ptx -- DIR`

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

use gatefold::cuda::kernels;

fn main() -> ExitCode {
    let mut args = env::args_os().skip(1);
    let (Some(dir), None) = (args.next().map(PathBuf::from), args.next()) else {
        eprintln!("usage: dump_ptx DIR");
        return ExitCode::from(2);
    };
    if let Err(error) = fs::create_dir_all(&dir) {
        eprintln!("cannot make {}: {error}", dir.display());
        return ExitCode::FAILURE;
    }
    let mut bytes = 0;
    for kernel in kernels::ALL {
        let path = dir.join(kernel.entry).with_extension("ptx");
        if let Err(error) = fs::write(&path, kernel.ptx) {
            eprintln!("cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        bytes += kernel.ptx.len();
    }
    println!("{} kernels, {bytes} bytes, content hash {:016x}", kernels::ALL.len(), kernels::CONTENT_HASH);
    ExitCode::SUCCESS
}
