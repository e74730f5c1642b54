//! Arrays for other programs: a folder with one file of raw little-endian bits per array, and `arrays.json`, which gives file, type,
//! shape, strides and start of each, in elements.

use super::array::Array;
use gatefold::{Dtype, Element};
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

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

    /// A further word about an array in the table.
    pub fn note(&mut self, name: &str, key: &str, value: impl Into<Value>) {
        if let Some(Value::Object(entry)) = self.arrays.get_mut(name) {
            entry.insert(key.into(), value.into());
        }
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
