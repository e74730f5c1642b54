//! candle and the `gemm` crate on the workloads of `run.py`, on command: see `peer.py` for the commands.
//!
//! `RAYON_NUM_THREADS` says how many threads both use. Answers are what a caller of the library gets: new tensors.

use candle_core::{D, DType, Device, Error, Result, Tensor, WithDType};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::{silu, softmax_last_dim};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

const CPU: Device = Device::Cpu;

/// Answers of one call, by name.
type Outputs = BTreeMap<&'static str, Tensor>;

/// Calls with one of the inputs, and how its answer becomes what is compared.
struct Variant {
    inputs: usize,
    next: usize,
    call: Box<dyn FnMut(usize) -> Result<Outputs>>,
    finish: fn(Tensor) -> Result<Tensor>,
}

/// The arrays of a folder.
struct Arrays {
    folder: PathBuf,
    table: Value,
}

impl Arrays {
    fn read(folder: &Path) -> Result<Arrays> {
        let text = std::fs::read_to_string(folder.join("arrays.json"))?;
        Ok(Arrays { folder: folder.into(), table: serde_json::from_str(&text).map_err(Error::wrap)? })
    }

    /// Shape, strides, start.
    fn layout(&self, name: &str) -> (Vec<usize>, Vec<usize>, usize) {
        let list = |key: &str| -> Vec<usize> {
            self.table[name][key].as_array().into_iter().flatten().filter_map(|n| Some(n.as_u64()? as usize)).collect()
        };
        (list("shape"), list("strides"), self.table[name]["start"].as_u64().unwrap_or(0) as usize)
    }

    fn bytes(&self, name: &str) -> Result<(Vec<u8>, DType)> {
        let text = |key: &str| self.table[name][key].as_str().unwrap_or_default();
        let dtype = match text("dtype") {
            "bf16" => DType::BF16,
            "f16" => DType::F16,
            "f32" => DType::F32,
            other => return Err(Error::msg(format!("{name}: type {other}"))),
        };
        Ok((std::fs::read(self.folder.join(text("file")))?, dtype))
    }

    /// An array without gaps.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let (bytes, dtype) = self.bytes(name)?;
        Tensor::from_raw_buffer(&bytes, dtype, &self.layout(name).0, &CPU)
    }

    /// The matrices of an array of three dimensions, each a tensor of its own.
    fn matrices(&self, name: &str) -> Result<Vec<Tensor>> {
        let (bytes, dtype) = self.bytes(name)?;
        let (shape, strides, start) = self.layout(name);
        let size = dtype.size_in_bytes();
        let matrix = |i: usize| {
            let at = (start + i * strides[0]) * size;
            Tensor::from_raw_buffer(&bytes[at..at + shape[1] * shape[2] * size], dtype, &shape[1..], &CPU)
        };
        (0..shape[0]).map(matrix).collect()
    }
}

fn one(name: &'static str, tensor: Tensor) -> Outputs {
    BTreeMap::from([(name, tensor)])
}

// ----------------------------------------------------------------------------- the workloads

/// The best few experts of each row with weights of sum 1, as lists of the host, in the steps of candle-transformers.
fn choose(logits: &Tensor, top_k: usize) -> Result<(Vec<Vec<u32>>, Vec<Vec<f32>>)> {
    let scores = softmax_last_dim(logits)?;
    let ids = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, top_k)?.contiguous()?;
    let weights = scores.gather(&ids, D::Minus1)?.to_dtype(DType::F32)?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    Ok((ids.to_vec2()?, weights.to_vec2()?))
}

/// Router, then one expert after the other on the rows that chose it.
fn mixture(arrays: &Arrays) -> Result<Variant> {
    let router = arrays.tensor("router")?;
    let [gate, up, down] = ["gate", "up", "down"].map(|name| arrays.matrices(name));
    let (gate, up, down) = (gate?, up?, down?);
    let top_k = *arrays.layout("ids").0.last().unwrap_or(&1);
    let x = arrays.tensor("x")?;
    let inputs = x.dim(0)?;
    let call = move |input: usize| {
        let x = x.get(input)?;
        let (ids, weights) = choose(&x.matmul(&router.t()?)?, top_k)?;
        let mut rows: Vec<(Vec<u32>, Vec<f32>)> = vec![Default::default(); gate.len()];
        for (row, (ids, weights)) in ids.iter().zip(&weights).enumerate() {
            for (id, weight) in ids.iter().zip(weights) {
                rows[*id as usize].0.push(row as u32);
                rows[*id as usize].1.push(*weight);
            }
        }
        let mut out = x.zeros_like()?;
        for (expert, (rows, weights)) in rows.into_iter().enumerate().filter(|(_, (rows, _))| !rows.is_empty()) {
            let len = rows.len();
            let rows = Tensor::from_vec(rows, len, &CPU)?;
            let weights = Tensor::from_vec(weights, (len, 1), &CPU)?.to_dtype(x.dtype())?;
            let part = x.index_select(&rows, 0)?;
            let inner = (silu(&part.matmul(&gate[expert].t()?)?)? * part.matmul(&up[expert].t()?)?)?;
            let part = inner.matmul(&down[expert].t()?)?.broadcast_mul(&weights)?;
            out = out.index_add(&rows, &part, 0)?;
        }
        Ok(one("out", out))
    };
    Ok(Variant { inputs, next: 0, call: Box::new(call), finish: Ok })
}

fn attention(arrays: &Arrays) -> Result<Variant> {
    let (q, k, v) = (arrays.tensor("q")?.unsqueeze(0)?, arrays.tensor("k")?, arrays.tensor("v")?);
    let (copies, queries, scale) = (k.dim(0)?, q.dim(1)?, 1.0 / (q.dim(3)? as f32).sqrt());
    let caches = (0..copies).map(|i| Ok((k.narrow(0, i, 1)?.copy()?, v.narrow(0, i, 1)?.copy()?)));
    let caches = caches.collect::<Result<Vec<_>>>()?;
    let call = move |input: usize| {
        let (k, v) = &caches[input];
        let mask = if queries == 1 { AttnMask::None } else { AttnMask::causal() };
        let out = match q.dtype() {
            DType::F32 => flash_attn::<f32>(&q, k, v, scale, mask, None, None)?,
            DType::F16 => flash_attn::<f16>(&q, k, v, scale, mask, None, None)?,
            _ => flash_attn::<bf16>(&q, k, v, scale, mask, None, None)?,
        };
        Ok(one("out", out))
    };
    // [1, heads, queries, width] to [queries, heads, width]
    let finish = |out: Tensor| out.squeeze(0)?.transpose(0, 1)?.contiguous();
    Ok(Variant { inputs: copies, next: 0, call: Box::new(call), finish })
}

/// Keys and values repeated for every query head, two products and a softmax: what most models of candle-transformers do on CPUs.
fn attention_by_matmul(arrays: &Arrays) -> Result<Variant> {
    let heads_first = |x: Tensor| x.transpose(1, 2)?.contiguous();
    let (q, k, v) = (arrays.tensor("q")?.unsqueeze(0)?, arrays.tensor("k")?, arrays.tensor("v")?);
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let (_, heads, queries, width) = q.dims4()?;
    let (copies, kv_heads, keys, _) = k.dims4()?;
    let caches = (0..copies).map(|i| Ok((k.narrow(0, i, 1)?.copy()?, v.narrow(0, i, 1)?.copy()?)));
    let caches = caches.collect::<Result<Vec<_>>>()?;
    let hidden = (0..queries * keys).map(|at| if at % keys > at / keys { f32::NEG_INFINITY } else { 0.0 });
    let mask = (queries > 1).then(|| Tensor::from_iter(hidden, &CPU)?.reshape((queries, keys))?.to_dtype(q.dtype()));
    let mask = mask.transpose()?;
    let repeat = move |x: &Tensor| Tensor::cat(&vec![x; heads / kv_heads], 2)?.reshape((1, heads, keys, width));
    let call = move |input: usize| {
        let (k, v) = (repeat(&caches[input].0)?, repeat(&caches[input].1)?);
        let mut scores = (q.matmul(&k.t()?)? / (width as f64).sqrt())?;
        if let Some(mask) = &mask {
            scores = scores.broadcast_add(mask)?;
        }
        // In bf16 the sum of the softmax stops growing at 256: answers of later rows would be wrong.
        let shares = softmax_last_dim(&scores.to_dtype(DType::F32)?)?.to_dtype(q.dtype())?;
        Ok(one("out", shares.matmul(&v)?))
    };
    let finish = |out: Tensor| out.squeeze(0)?.transpose(0, 1)?.contiguous();
    Ok(Variant { inputs: copies, next: 0, call: Box::new(call), finish })
}

fn matmul(arrays: &Arrays) -> Result<Variant> {
    let (x, weight) = (arrays.tensor("x")?, arrays.tensor("weight")?);
    let call = move |_: usize| Ok(one("out", x.matmul(&weight.t()?)?));
    Ok(Variant { inputs: 1, next: 0, call: Box::new(call), finish: Ok })
}

/// `x * weight^T` by the `gemm` crate itself.
fn product<T: WithDType>(arrays: &Arrays, zero: T, one_: T) -> Result<Variant> {
    let (x, weight) = (arrays.tensor("x")?, arrays.tensor("weight")?);
    let ((m, k), n) = (x.dims2()?, weight.dim(0)?);
    let (x, weight) = (x.flatten_all()?.to_vec1::<T>()?, weight.flatten_all()?.to_vec1::<T>()?);
    let threads = candle_core::utils::get_num_threads();
    let call = move |_: usize| {
        let mut out = vec![zero; m * n];
        let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
        let (columns, inner) = (n as isize, k as isize);
        // SAFETY: `out` holds m rows of n, `x` m rows of k, `weight` n rows of k numbers, as the tensors' shapes said; the
        // strides are (column, row) of each, for the weight of its transpose.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                columns,
                false,
                x.as_ptr(),
                1,
                inner,
                weight.as_ptr(),
                inner,
                1,
                zero,
                one_,
                false,
                false,
                false,
                parallelism,
            );
        }
        Ok(one("out", Tensor::from_vec(out, (m, n), &CPU)?))
    };
    Ok(Variant { inputs: 1, next: 0, call: Box::new(call), finish: Ok })
}

fn route(arrays: &Arrays) -> Result<Variant> {
    let logits = arrays.tensor("logits")?;
    let top_k = *arrays.layout("ids").0.last().unwrap_or(&1);
    let call = move |_: usize| {
        let (ids, weights) = choose(&logits, top_k)?;
        let mut counts = vec![0u32; logits.dim(1)?];
        ids.iter().flatten().for_each(|id| counts[*id as usize] += 1);
        std::hint::black_box(counts);
        Ok(BTreeMap::from([("ids", Tensor::new(ids, &CPU)?), ("out", Tensor::new(weights, &CPU)?)]))
    };
    Ok(Variant { inputs: 1, next: 0, call: Box::new(call), finish: Ok })
}

fn variants(id: &str, dtype: &str, arrays: &Arrays) -> Vec<(&'static str, Result<Variant>)> {
    match id.split('.').next().unwrap_or_default() {
        "W1" | "W2" | "W3" => vec![("candle experts", mixture(arrays))],
        "W4" | "W5" => {
            // In bf16 and f16 one call of W4 takes a minute, 200 times as long as the products.
            let is_endless = id == "W4" && dtype != "f32";
            let why = || Err(Error::msg("45 s (bf16) and 68 s (f16) for a call on 2 cores of Zen 5"));
            let flash = if is_endless { why() } else { attention(arrays) };
            vec![("candle flash_attn", flash), ("candle matmul, softmax", attention_by_matmul(arrays))]
        }
        "W6" => {
            let mut found = vec![("candle matmul", matmul(arrays))];
            match dtype {
                "f32" => found.push(("gemm crate", product(arrays, 0.0f32, 1.0))),
                "f16" => found.push(("gemm crate", product(arrays, f16::ZERO, f16::ONE))),
                _ => {}
            }
            found
        }
        _ => vec![("candle route", route(arrays))],
    }
}

// ----------------------------------------------------------------------------- commands

/// Calls once with every input and writes the answers, as f32, for `run.py` to compare.
fn first_answers(name: &str, variant: &mut Variant, folder: &Path) -> Result<()> {
    let mut files: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for input in 0..variant.inputs {
        for (key, tensor) in (variant.call)(input)? {
            let answer = (variant.finish)(tensor)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            files.entry(key).or_default().extend(answer.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
    for (key, bytes) in files {
        std::fs::write(folder.join(format!("{key}.{name}.bin")), bytes)?;
    }
    Ok(())
}

fn prepare(made: &mut BTreeMap<String, Variant>, id: &str, dtype: &str, folder: &Path) -> Result<Value> {
    made.clear(); // their memory, before the next ones'
    let arrays = Arrays::read(folder)?;
    let (mut names, mut failed) = (Vec::new(), BTreeMap::new());
    for (name, variant) in variants(id, dtype, &arrays) {
        let ready = variant.and_then(|mut variant| {
            first_answers(name, &mut variant, folder)?;
            Ok(variant)
        });
        match ready {
            Ok(variant) => {
                names.push(name);
                made.insert(name.into(), variant);
            }
            Err(error) => {
                failed.insert(name, error.to_string().lines().next().unwrap_or_default().to_string());
            }
        }
    }
    Ok(json!({ "variants": names, "failed": failed }))
}

fn run(variant: &mut Variant, calls: usize) -> Result<Value> {
    let mut seconds = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        let out = (variant.call)(variant.next)?;
        seconds.push(start.elapsed().as_secs_f64());
        drop(out);
        variant.next = (variant.next + 1) % variant.inputs;
    }
    Ok(json!({ "seconds": seconds }))
}

fn main() {
    let mut made = BTreeMap::new();
    for line in std::io::stdin().lines() {
        let Ok(line) = line else { return };
        let answer = match line.split('\t').collect::<Vec<_>>()[..] {
            ["prepare", id, dtype, folder] => prepare(&mut made, id, dtype, Path::new(folder)),
            ["run", name, calls] => match (made.get_mut(name), calls.parse()) {
                (Some(variant), Ok(calls)) => run(variant, calls),
                _ => Err(Error::msg(format!("cannot run {name} {calls} times"))),
            },
            ["versions"] => Ok(json!({ "candle": "0.11.1", "gemm crate": "0.19.0" })),
            _ => Err(Error::msg(format!("unknown command: {line}"))),
        };
        println!("{}", answer.unwrap_or_else(|error| json!({ "error": error.to_string() })));
    }
}
