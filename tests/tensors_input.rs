//! Readers of safetensors files and of checkpoint directories on what nobody should write: headers that lie, damaged tensors. An error
//! says what is wrong; nothing panics, and memory is justified by the bytes.

#![cfg(feature = "serde")]

#[path = "common/peak.rs"]
mod peak;
#[path = "../examples/support/mod.rs"]
mod support;

use gatefold::Dtype;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use support::backend::Reference;
use support::checkpoint::Checkpoint;
use support::golden::{Case, Runner};
use support::tensors::Tensors;

#[global_allocator]
static PEAK: peak::Peak = peak::Peak;

/// A file with this header, whatever it says.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Reads; the numbers of a tensor are as many as its shape says.
fn read(bytes: &[u8]) -> Result<Tensors, String> {
    let read = peak::within((1 << 16) + 100 * bytes.len(), || Tensors::parse(bytes));
    for tensor in read.iter().flat_map(|tensors| tensors.tensors.values()) {
        assert_eq!(tensor.cast::<f64>().data.len(), tensor.shape().iter().product::<usize>());
    }
    read
}

#[test]
fn headers_that_lie() {
    let tensor = |dtype: &str, shape: Value, offsets: Value| {
        json!({ "a": { "dtype": dtype, "shape": shape, "data_offsets": offsets } }).to_string()
    };
    let data = [0u8; 64];
    assert!(read(&file(&tensor("F32", json!([4, 4]), json!([0, 64])), &data)).is_ok());
    let two = |a: Value, b: Value| {
        let one = |offsets: Value| json!({ "dtype": "U8", "shape": [32], "data_offsets": offsets });
        json!({ "a": one(a), "b": one(b) }).to_string()
    };
    assert!(read(&file(&two(json!([0, 32]), json!([32, 64])), &data)).is_ok());
    let wrong = [
        tensor("F32", json!([4, 5]), json!([0, 64])),
        tensor("F32", json!([4, 5]), json!([0, 80])),
        tensor("F32", json!([4, 4]), json!([64, 0])),
        tensor("F32", json!([4, 4]), json!([4, 68])),
        tensor("F32", json!([4, 3]), json!([0, 48])),
        tensor("F32", json!([1u64 << 62, 16]), json!([0, 64])),
        tensor("F32", json!([u64::MAX]), json!([0, 64])),
        tensor("F32", json!([u64::MAX, 2, 8]), json!([0, u64::MAX])),
        tensor("F64", json!([1u64 << 61]), json!([0, 0])),
        tensor("F32", json!([-4]), json!([0, 64])),
        tensor("F32", json!(16), json!([0, 64])),
        tensor("F32", json!([16]), json!([0])),
        tensor("F32", json!([16]), json!([u64::MAX, u64::MAX])),
        tensor("F99", json!([16]), json!([0, 64])),
        tensor("I16", json!([32]), json!([0, 64])),
        two(json!([0, 32]), json!([0, 32])),
        two(json!([0, 32]), json!([16, 48])),
        two(json!([0, 32]), json!([0, 64])),
        json!({ "a": null }).to_string(),
        json!([1, 2]).to_string(),
        "{".into(),
        "{\"a\":".repeat(5000),
        "[".repeat(100_000),
    ];
    for header in wrong {
        assert!(read(&file(&header, &data)).is_err(), "{}", &header[..header.len().min(200)]);
    }
    // Lengths of the header.
    for len in [0, 1, 65, 1 << 32, 1 << 62, u64::MAX - 7, u64::MAX] {
        let mut bytes = file(&tensor("F32", json!([4, 4]), json!([0, 64])), &data);
        bytes[..8].copy_from_slice(&len.to_le_bytes());
        assert!(read(&bytes).is_err(), "{len}");
    }
    // No tensor, no data.
    assert!(read(&file("{}", &[])).is_ok());
    assert!(read(&file(&tensor("F32", json!([0, u64::MAX]), json!([0, 0])), &[])).is_ok());
    assert!(read(&[]).is_err());
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        (0u64..70).prop_map(Value::from),
        select(vec![1u64 << 32, 1 << 61, u64::MAX - 63, u64::MAX]).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
    ]
}

/// A header of some tensors, most of which do not fit.
fn header() -> impl Strategy<Value = Value> {
    let dtype = select(vec!["F32", "F64", "BF16", "F16", "I64", "I32", "U8", "BOOL", "I8", "F8_E4M3", "F4", "x"]);
    let tensor = (dtype, prop::collection::vec(number(), 0..4), number(), number(), any::<bool>()).prop_map(
        |(dtype, shape, start, end, fits)| {
            // An end that fits the shape, where that is small.
            let size = if dtype.ends_with("64") { 8 } else { 4 };
            let count = shape.iter().try_fold(size, |n: u64, x| x.as_u64().and_then(|x| n.checked_mul(x)));
            let fit = start.as_u64().zip(count).and_then(|(start, count)| start.checked_add(count));
            let end = if fits { fit.map_or(end, Value::from) } else { end };
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] })
        },
    );
    prop::collection::btree_map("[a-d]", tensor, 0..4).prop_map(|map| Value::Object(map.into_iter().collect()))
}

/// Text of the golden format's metadata, found in its recorded files.
fn recorded(kind: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut paths: Vec<PathBuf> = fs::read_dir(root).expect("tests/golden").map(|e| e.expect("entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    paths.sort_by_key(|path| (fs::metadata(path).map_or(u64::MAX, |m| m.len()), path.clone()));
    let has = |path: &PathBuf| {
        let bytes = fs::read(path).expect("a file");
        let case = Tensors::parse(&bytes).and_then(Case::new).expect("a golden file");
        case.sections().iter().any(|section| section == kind).then_some(bytes)
    };
    paths.iter().find_map(has).unwrap_or_else(|| panic!("no golden file has a section {kind}"))
}

/// Runs every section; sizes in the description are no reason for memory that the file does not have.
fn run(case: &Case, file_bytes: usize) {
    for section in case.sections() {
        peak::within((1 << 20) + 200 * file_bytes, || case.run(&section, Runner::Reference, Dtype::F32));
    }
}

/// A small recorded file of each section.
fn golden_files() -> &'static [Vec<u8>] {
    static FILES: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    FILES.get_or_init(|| ["attn", "moe", "layer", "wkv"].map(recorded).into())
}

/// Header and data of a well-formed file.
fn split(bytes: &[u8]) -> (Value, &[u8]) {
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    (serde_json::from_slice(&bytes[8..8 + len]).expect("a header"), &bytes[8 + len..])
}

/// What is done to one tensor of a header: its data stay, so that the file can still be read.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Removed,
    Flat,
    Wrapped,
    Reversed,
    Cut,
}

const DAMAGES: [Damage; 5] = [Damage::Removed, Damage::Flat, Damage::Wrapped, Damage::Reversed, Damage::Cut];

fn num_tensors(bytes: &[u8]) -> usize {
    safetensors::SafeTensors::deserialize(bytes).expect("a file").len()
}

/// The same file with one tensor damaged.
fn damaged(bytes: &[u8], which: usize, damage: Damage) -> Vec<u8> {
    let file = safetensors::SafeTensors::deserialize(bytes).expect("a file");
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).expect("a header");
    let mut names: Vec<&str> = file.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    let chosen = names[which];
    let mut views = Vec::new();
    for name in names {
        let view = file.tensor(name).expect("a tensor");
        let (mut shape, mut data) = (view.shape().to_vec(), view.data());
        if name == chosen {
            match damage {
                Damage::Removed => continue,
                Damage::Flat => shape = vec![shape.iter().product()],
                Damage::Wrapped => shape.insert(0, 1),
                Damage::Reversed => shape.reverse(),
                Damage::Cut => {
                    let Some(first) = shape.first_mut().filter(|n| **n > 0) else { continue };
                    data = &data[..data.len() / *first * (*first - 1)];
                    *first -= 1;
                }
            }
        }
        views.push((name, safetensors::tensor::TensorView::new(view.dtype(), shape, data).expect("a tensor")));
    }
    let metadata: Option<HashMap<String, String>> = header.metadata().clone();
    safetensors::serialize(views, metadata).expect("a file")
}

/// Golden files with any tensor missing or in another shape: an error that says so, or a result.
#[test]
fn golden_files_with_damaged_tensors() {
    for bytes in golden_files() {
        for (tensor, damage) in (0..num_tensors(bytes)).flat_map(|i| DAMAGES.map(|damage| (i, damage))) {
            let case = read(&damaged(bytes, tensor, damage)).and_then(Case::new).expect("the file is well-formed");
            run(&case, bytes.len());
        }
    }
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A table of angles follows the largest position: a file may not ask for one that fills the memory.
#[test]
fn positions_that_no_model_has() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints/llama");
    let scratch = Scratch::new("positions");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(from.join(name), scratch.0.join(name)).expect("copied");
    }
    let mut bytes = fs::read(from.join("expected.safetensors")).expect("a file");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a file");
    let data = file.tensor("one.position_ids").expect("a tensor").data();
    let at = data.as_ptr() as usize - bytes.as_ptr() as usize;
    for position in [1i32 << 20, i32::MAX, i32::MIN, -1] {
        bytes[at..at + 4].copy_from_slice(&position.to_le_bytes());
        fs::write(scratch.0.join("expected.safetensors"), &bytes).expect("written");
        let error = peak::within(1 << 25, || Checkpoint::read(&scratch.0).and_then(|m| m.compare(&mut Reference, 0)));
        assert!(error.is_err_and(|what| what.contains("position")), "{position}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes(len: u8, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&bytes);
        // With a length of the header that fits.
        let mut framed = u64::from(len).to_le_bytes().to_vec();
        framed.extend(bytes);
        let _ = read(&framed);
    }

    #[test]
    fn arbitrary_headers(header in header(), data in prop::collection::vec(any::<u8>(), 0..70)) {
        let _ = read(&file(&header.to_string(), &data));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Golden files whose description says something else.
    #[test]
    fn golden_files_with_another_description(which: Index, field: Index, value in prop_oneof![
        Just(Value::Null), number(), Just(json!("x")), Just(json!({})), Just(json!([3])), Just(json!(true)), Just(json!(0.5)), Just(json!(-1e300)),
    ]) {
        let bytes: &Vec<u8> = which.get(golden_files());
        let (mut header, data) = split(bytes);
        let text = header["__metadata__"]["golden"].as_str().expect("a description").to_string();
        let mut meta: Value = serde_json::from_str(&text).expect("JSON");
        let mut paths = Vec::new();
        field_paths(&meta, String::new(), &mut paths);
        *meta.pointer_mut(&paths[field.index(paths.len())]).expect("a field") = value;
        header["__metadata__"]["golden"] = json!(meta.to_string());
        if let Ok(case) = read(&file(&header.to_string(), data)).and_then(Case::new) {
            run(&case, bytes.len());
        }
    }

    /// Checkpoints with a tensor missing or in another shape.
    #[test]
    fn checkpoints_with_damaged_tensors(
        model in select(vec!["deepseek_v3", "gpt_oss", "llama", "qwen2_moe", "qwen3_moe"]),
        recorded in prop::bool::weighted(0.2),
        tensor: Index,
        damage in select(DAMAGES.to_vec()),
    ) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints").join(model);
        let scratch = Scratch::new("damaged");
        for (name, broken) in [("model.safetensors", !recorded), ("expected.safetensors", recorded)] {
            let bytes = fs::read(from.join(name)).expect("a file");
            let bytes = if broken { damaged(&bytes, tensor.index(num_tensors(&bytes)), damage) } else { bytes };
            fs::write(scratch.0.join(name), bytes).expect("written");
        }
        fs::copy(from.join("config.json"), scratch.0.join("config.json")).expect("copied");
        let model = Checkpoint::read(&scratch.0).expect("the files are well-formed");
        let _ = model.compare(&mut Reference, 0);
    }

    /// Indices of sharded checkpoints, which name files.
    #[test]
    fn indices_of_shards(text in prop_oneof![
        "[a-z{}\":, ]{0,60}",
        prop::collection::btree_map("[a-b]", "[a-z./]{0,12}", 0..3).prop_map(|m| json!({ "weight_map": m }).to_string()),
    ]) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints/llama");
        let scratch = Scratch::new("shards");
        fs::copy(from.join("config.json"), scratch.0.join("config.json")).expect("copied");
        fs::write(scratch.0.join("model.safetensors.index.json"), &text).expect("written");
        if let Ok(model) = Checkpoint::read(&scratch.0) {
            prop_assert!(model.compare(&mut Reference, 0).is_err(), "{}", text);
        }
    }
}

fn field_paths(value: &Value, path: String, out: &mut Vec<String>) {
    if let Value::Object(map) = value {
        for (key, value) in map {
            out.push(format!("{path}/{key}"));
            field_paths(value, format!("{path}/{key}"), out);
        }
    }
}
