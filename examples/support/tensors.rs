//! Tensors from safetensors files.

use super::array::Array;
use gatefold::Element;
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::path::Path;

/// One tensor in the type it is stored in.
#[derive(Clone, Debug)]
pub enum Tensor {
    F64(Array<f64>),
    F32(Array<f32>),
    Bf16(Array<bf16>),
    F16(Array<f16>),
    I64(Array<i64>),
    I32(Array<i32>),
    U8(Array<u8>),
}

impl Tensor {
    pub fn shape(&self) -> &[usize] {
        match self {
            Tensor::F64(a) => &a.shape,
            Tensor::F32(a) => &a.shape,
            Tensor::Bf16(a) => &a.shape,
            Tensor::F16(a) => &a.shape,
            Tensor::I64(a) => &a.shape,
            Tensor::I32(a) => &a.shape,
            Tensor::U8(a) => &a.shape,
        }
    }

    /// As numbers of type `T`, rounded once where they do not fit.
    pub fn cast<T: Element>(&self) -> Array<T> {
        let from = |data: Vec<f64>, shape: &[usize]| Array::new(data.into_iter().map(T::from_f64).collect(), shape);
        match self {
            Tensor::F64(a) => a.cast(),
            Tensor::F32(a) => a.cast(),
            Tensor::Bf16(a) => a.cast(),
            Tensor::F16(a) => a.cast(),
            Tensor::I64(a) => from(a.data.iter().map(|x| *x as f64).collect(), &a.shape),
            Tensor::I32(a) => from(a.data.iter().map(|x| f64::from(*x)).collect(), &a.shape),
            Tensor::U8(a) => from(a.data.iter().map(|x| f64::from(*x)).collect(), &a.shape),
        }
    }

    /// As whole numbers.
    pub fn ints(&self) -> Array<i64> {
        match self {
            Tensor::I64(a) => a.clone(),
            Tensor::I32(a) => Array::new(a.data.iter().map(|x| i64::from(*x)).collect(), &a.shape),
            Tensor::U8(a) => Array::new(a.data.iter().map(|x| i64::from(*x)).collect(), &a.shape),
            other => {
                let a = other.cast::<f64>();
                Array::new(a.data.iter().map(|x| *x as i64).collect(), &a.shape)
            }
        }
    }

    /// 0 and 1.
    pub fn bools(&self) -> Vec<u8> {
        self.ints().data.iter().map(|x| u8::from(*x != 0)).collect()
    }

    /// The stored type's name.
    pub fn dtype(&self) -> &'static str {
        match self {
            Tensor::F64(_) => "f64",
            Tensor::F32(_) => "f32",
            Tensor::Bf16(_) => "bf16",
            Tensor::F16(_) => "f16",
            Tensor::I64(_) => "i64",
            Tensor::I32(_) => "i32",
            Tensor::U8(_) => "u8",
        }
    }
}

/// The tensors of one file or of several, by name, and the metadata of the header.
#[derive(Default)]
pub struct Tensors {
    pub tensors: BTreeMap<String, Tensor>,
    pub metadata: BTreeMap<String, String>,
}

/// What the numbers of a tensor are, from little-endian bytes.
fn decode<T: Copy, const N: usize>(bytes: &[u8], shape: &[usize], from: impl Fn([u8; N]) -> T) -> Array<T> {
    let data = bytes.chunks_exact(N).map(|c| from(c.try_into().expect("chunks of N bytes"))).collect();
    Array::new(data, shape)
}

impl Tensors {
    /// Reads the bytes of a safetensors file.
    ///
    /// # Errors
    /// Text that says what is wrong with the bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let file = safetensors::SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let mut out = Tensors::default();
        for (key, value) in header.metadata().iter().flatten() {
            out.metadata.insert(key.clone(), value.clone());
        }
        for (name, view) in file.iter() {
            let (raw, shape) = (view.data(), view.shape());
            let tensor = match view.dtype() {
                safetensors::Dtype::F64 => Tensor::F64(decode(raw, shape, f64::from_le_bytes)),
                safetensors::Dtype::F32 => Tensor::F32(decode(raw, shape, f32::from_le_bytes)),
                safetensors::Dtype::BF16 => Tensor::Bf16(decode(raw, shape, bf16::from_le_bytes)),
                safetensors::Dtype::F16 => Tensor::F16(decode(raw, shape, f16::from_le_bytes)),
                safetensors::Dtype::I64 => Tensor::I64(decode(raw, shape, i64::from_le_bytes)),
                safetensors::Dtype::I32 => Tensor::I32(decode(raw, shape, i32::from_le_bytes)),
                safetensors::Dtype::U8 | safetensors::Dtype::BOOL => Tensor::U8(decode(raw, shape, u8::from_le_bytes)),
                other => return Err(format!("tensor {name} has element type {other:?}, which is not read here")),
            };
            out.tensors.insert(name.to_string(), tensor);
        }
        Ok(out)
    }

    /// Reads one file.
    ///
    /// # Errors
    /// Text that names the file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(&bytes).map_err(|e| format!("{}: {e}", path.display()))
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// Text that names it.
    pub fn need(&self, name: &str) -> Result<&Tensor, String> {
        self.get(name).ok_or_else(|| format!("there is no tensor {name}"))
    }
}
