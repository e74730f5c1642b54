//! The files of `tests/golden` through the reference and every CPU level in every type, through the CUDA backend in the
//! simulator, and the same files under other names with their tensors in another order. Only gradients may be unsupported.

#![cfg(feature = "serde")]

#[path = "../examples/support/mod.rs"]
mod support;

use gatefold::Dtype;
use gatefold::cpu::Level;
use std::path::{Path, PathBuf};
use support::golden::{Case, Line, Outcome, Runner};

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("the golden files are part of the repository");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("a directory entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Every section of every file; gives the number of sections that are right.
fn check(files: &[PathBuf], runner: Runner<'_>, dtype: Dtype) -> usize {
    let (mut ok, mut failures) = (0, Vec::new());
    for path in files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let case = Case::read(path).unwrap_or_else(|what| panic!("{name}: {what}"));
        for section in case.sections() {
            for Line { section, used, outcome } in case.run(&section, runner, dtype) {
                match outcome {
                    Outcome::Ok { .. } => ok += 1,
                    Outcome::Unsupported { .. } if section.starts_with("grad_") => {}
                    other => failures.push(format!("{name} {section} {used} {dtype}: {other:?}")),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    ok
}

#[test]
fn reference() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        assert!(check(&files(&golden()), Runner::Reference, dtype) > 100);
    }
}

#[test]
fn cpu_f32() {
    for level in Level::available() {
        assert!(check(&files(&golden()), Runner::Cpu(level), Dtype::F32) > 100);
    }
}

#[test]
fn cpu_bf16() {
    for level in Level::available() {
        assert!(check(&files(&golden()), Runner::Cpu(level), Dtype::BF16) > 100);
    }
}

#[test]
fn cpu_f16() {
    for level in Level::available() {
        assert!(check(&files(&golden()), Runner::Cpu(level), Dtype::F16) > 100);
    }
}

/// Whole layers, too: norm, projections, rotation, cache, attention, router and experts, in the kernels' own text.
#[test]
#[cfg(gatefold_simulator)]
fn simulator() {
    let simulator = support::simulator::Simulator::new(false);
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        assert!(check(&files(&golden()), Runner::Device(&simulator, "simulator"), dtype) > 100);
    }
}

/// A copy under names that say nothing, the tensors of each file in reverse order of name.
#[test]
fn renamed_and_reshuffled() {
    let copy = std::env::temp_dir().join(format!("gatefold-golden-{}", std::process::id()));
    std::fs::create_dir_all(&copy).expect("a folder for the copy");
    for (i, path) in files(&golden()).iter().enumerate() {
        let bytes = std::fs::read(path).expect("a golden file");
        std::fs::write(copy.join(format!("{:04}.safetensors", (i * 7919) % 10_000)), reshuffled(&bytes))
            .expect("room for the copy");
    }
    let level = Level::best();
    let (a, b) = (
        check(&files(&golden()), Runner::Cpu(level), Dtype::F32),
        check(&files(&copy), Runner::Cpu(level), Dtype::F32),
    );
    std::fs::remove_dir_all(&copy).expect("the copy can be removed");
    assert_eq!(a, b);
}

/// The same safetensors file with its tensors laid out in reverse order of name.
fn reshuffled(bytes: &[u8]) -> Vec<u8> {
    let header_len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..8 + header_len]).expect("the header is JSON");
    let data = &bytes[8 + header_len..];
    let mut names: Vec<String> = header.keys().filter(|k| *k != "__metadata__").cloned().collect();
    names.sort();
    names.reverse();
    // Wide elements first, so that every tensor stays aligned.
    names.sort_by_key(|name| match header[name]["dtype"].as_str() {
        Some("F64" | "I64") => 0,
        Some("F32" | "I32") => 1,
        Some("BF16" | "F16") => 2,
        _ => 3,
    });
    let mut out = Vec::new();
    for name in &names {
        let offsets = header[name]["data_offsets"].clone();
        let place = |i: usize| offsets[i].as_u64().expect("an offset") as usize;
        let start = out.len();
        out.extend_from_slice(&data[place(0)..place(1)]);
        header[name]["data_offsets"] = serde_json::json!([start, out.len()]);
    }
    let mut text = serde_json::to_vec(&header).expect("JSON");
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.extend(out);
    file
}
