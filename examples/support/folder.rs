//! Arrays for other programs: a folder with one file of raw little-endian bits per array, and `arrays.json`, which gives file, type,
//! shape, strides and start of each, in elements.

use super::array::Array;
use gatefold::{Dtype, Element};
use serde_json::{Map, Value, json};
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
        self.file(name, bytemuck::cast_slice(&array.data))
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
        self.file(name, bytemuck::cast_slice(&ids.data))
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

    /// Gigabytes: at once, not number by number.
    fn file(&self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        const { assert!(cfg!(target_endian = "little"), "the files are little-endian") };
        std::fs::write(self.path.join(format!("{name}.bin")), bytes)
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
