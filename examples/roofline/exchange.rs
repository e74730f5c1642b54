//! How other programs get the same numbers: raw files with a table of what is in them, and calls on command.
//!
//! A folder has one file of raw little-endian bits per array, and `arrays.json`, which gives file, type, shape, strides and start
//! of each, in elements. [`serve`] reads commands from its input, fields separated by tabs, and answers each with a line of JSON:
//!
//! ```text
//! prepare  W1  bf16  FOLDER    makes and checks a workload, writes its inputs and answers into the folder
//! run  gatefold  5             calls five times: {"seconds": [...]}
//! limits                       measures the machine's limits for as many threads
//! ```

use crate::job::{Job, Kept, prepare};
use crate::support::array::Array;
use crate::support::roof::Limits;
use crate::work::{WORKLOADS, Workload};
use gatefold::cpu::{Float, Level};
use gatefold::{Dtype, Element};
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A folder that is being filled.
pub struct Folder {
    path: PathBuf,
    arrays: Map<String, Value>,
}

impl Folder {
    pub fn new(path: &Path) -> std::io::Result<Folder> {
        std::fs::create_dir_all(path)?;
        Ok(Folder { path: path.to_path_buf(), arrays: Map::new() })
    }

    /// The file `NAME.bin`, which views refer to.
    pub fn data<T: Element>(&self, name: &str, array: &Array<T>) -> std::io::Result<()> {
        self.file(name, &array.data, |x, file| match T::DTYPE {
            Dtype::BF16 => file.write_all(&bf16::from_f32(x.to_f32()).to_le_bytes()),
            Dtype::F16 => file.write_all(&f16::from_f32(x.to_f32()).to_le_bytes()),
            Dtype::F32 => file.write_all(&x.to_f32().to_le_bytes()),
            _ => file.write_all(&x.to_f64().to_le_bytes()),
        })
    }

    /// Says where in a file an array lies.
    pub fn view(&mut self, name: &str, file: &str, dtype: Dtype, start: usize, shape: &[usize], strides: &[usize]) {
        self.entry(name, file, dtype.name(), start, shape, strides);
    }

    /// A file with one array.
    pub fn array<T: Element>(&mut self, name: &str, array: &Array<T>) -> std::io::Result<()> {
        self.entry(name, name, T::DTYPE.name(), 0, &array.shape, &contiguous(&array.shape));
        self.data(name, array)
    }

    /// A file with numbers of experts.
    pub fn ids(&mut self, name: &str, ids: &Array<i32>) -> std::io::Result<()> {
        self.entry(name, name, "i32", 0, &ids.shape, &contiguous(&ids.shape));
        self.file(name, &ids.data, |x, file| file.write_all(&x.to_le_bytes()))
    }

    fn entry(&mut self, name: &str, file: &str, dtype: &str, start: usize, shape: &[usize], strides: &[usize]) {
        let entry = json!({
            "file": format!("{file}.bin"), "dtype": dtype, "start": start, "shape": shape, "strides": strides,
        });
        self.arrays.insert(name.into(), entry);
    }

    fn file<T: Copy>(
        &self,
        name: &str,
        data: &[T],
        put: impl Fn(T, &mut BufWriter<std::fs::File>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let file = std::fs::File::create(self.path.join(format!("{name}.bin")))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        data.iter().try_for_each(|x| put(*x, &mut file))?;
        file.flush()
    }

    /// Writes the table.
    pub fn finish(self) -> std::io::Result<()> {
        std::fs::write(self.path.join("arrays.json"), Value::Object(self.arrays).to_string())
    }
}

/// Strides of an array without gaps.
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..strides.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

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
