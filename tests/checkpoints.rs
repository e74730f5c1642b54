//! Every checkpoint of `tests/checkpoints`, layer by layer from its token ids, against the recorded hidden states.

#![cfg(feature = "serde")]

#[path = "../examples/support/mod.rs"]
mod support;

use gatefold::cpu::{Cpu, Level};
use std::path::{Path, PathBuf};
use support::backend::{Backend, Reference};
use support::checkpoint::{Checkpoint, Compared};
use support::cpu::CpuBackend;

fn directories() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints");
    let entries = std::fs::read_dir(root).expect("the checkpoints are part of the repository");
    let mut all: Vec<PathBuf> = entries.map(|e| e.expect("a directory entry").path()).filter(|p| p.is_dir()).collect();
    all.sort();
    all
}

fn check<B: Backend>(b: &mut B, tolerance: f64) {
    let directories = directories();
    assert_eq!(directories.len(), 7);
    for directory in directories {
        let model = Checkpoint::read(&directory).unwrap_or_else(|what| panic!("{what}"));
        let compared = model.compare(b, model.config.num_layers - 1).unwrap_or_else(|what| panic!("{what}"));
        // Two layers are recorded, for one prompt, a long one, and a padded batch.
        assert_eq!(compared.len(), 6, "{}", directory.display());
        for Compared { case, layer, error, .. } in compared {
            let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            assert!(error <= tolerance, "{name} {case} layer {layer} {}: {error:.1e}", b.name());
        }
    }
}

#[test]
fn reference() {
    check(&mut Reference, 1e-10);
}

#[test]
fn cpu_f32() {
    for level in Level::available() {
        check(&mut CpuBackend::<f32>::new(Cpu::with_level(level)), 1e-5);
    }
}
