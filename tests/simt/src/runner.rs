//! The command: a launch described in JSON. The fields are in `README.md`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};

use crate::finding::{Found, Mode, Report};
use crate::model::mma::{Arch, Numerics};
use crate::model::smem::Swizzle;
use crate::model::tensor_map::{ElementType, OobFill, TensorMap};
use crate::op::Class;
use crate::sim::{Arg, Launch, Module, Sim};
use crate::state::Rng;

type Res<T> = Result<T, String>;

/// A buffer argument as described.
struct Buffer {
    dtype: Dtype,
    len: usize,
    address: u64,
    /// What it holds before each launch; `None` for uninitialised.
    bytes: Option<Vec<u8>>,
}

/// Runs the launches of a file and writes what it asks for. The number of findings.
///
/// # Errors
/// What is wrong with the file, the PTX or the launch.
pub fn run_file(path: &Path) -> Result<usize, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let file: Value = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    run(&file, dir).map_err(|e| format!("{}: {e}", path.display()))
}

fn run(file: &Value, dir: &Path) -> Res<usize> {
    const FIELDS: [&str; 14] = [
        "ptx",
        "entry",
        "grid",
        "cluster",
        "block",
        "smem",
        "mode",
        "seeds",
        "args",
        "numerics",
        "output",
        "report",
        "max_steps",
        "fill_seed",
    ];
    let object = file.as_object().ok_or("expected an object")?;
    if let Some(unknown) = object.keys().find(|k| !FIELDS.contains(&k.as_str())) {
        return Err(format!("unknown field `{unknown}`"));
    }
    let ptx = dir.join(string(file, "ptx")?);
    let text = std::fs::read_to_string(&ptx).map_err(|e| format!("{}: {e}", ptx.display()))?;
    let module = Module::parse(&ptx.display().to_string(), &text).map_err(|e| e.to_string())?;
    let entry = match file.get("entry") {
        Some(_) => string(file, "entry")?.to_string(),
        None => module.entries().next().ok_or("the module has no entry")?.to_string(),
    };
    let mut launch = Launch::new(triple(file, "grid")?, triple(file, "block")?);
    if file.get("cluster").is_some() {
        launch.cluster = triple(file, "cluster")?;
    }
    launch.smem = file.get("smem").and_then(Value::as_u64).unwrap_or(0) as u32;
    if let Some(steps) = file.get("max_steps").and_then(Value::as_u64) {
        launch.max_steps = steps;
    }
    let modes = match file.get("mode").and_then(Value::as_str) {
        None | Some("lock-step") => vec![Mode::LockStep],
        Some("split") => vec![Mode::Split],
        Some("both") => vec![Mode::LockStep, Mode::Split],
        Some(other) => return Err(format!("`mode` is lock-step, split or both, not `{other}`")),
    };
    launch.numerics = match file.get("numerics").and_then(Value::as_str) {
        None => None,
        Some("fast") => Some(Numerics::Fast),
        Some("ampere") => Some(Numerics::Exact(Arch::Ampere)),
        Some("ada") => Some(Numerics::Exact(Arch::Ada)),
        Some("hopper") => Some(Numerics::Exact(Arch::Hopper)),
        Some(other) => return Err(format!("`numerics` is fast, ampere, ada or hopper, not `{other}`")),
    };
    let seeds: Vec<u64> = match file.get("seeds") {
        None => vec![0],
        Some(Value::Number(n)) => (0..n.as_u64().unwrap_or(1)).collect(),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(_) => return Err("`seeds` is a count or a list".into()),
    };
    let mut sim = Sim::new();
    let mut buffers: HashMap<String, Buffer> = HashMap::new();
    let mut order = vec![];
    let mut rng = Rng(file.get("fill_seed").and_then(Value::as_u64).unwrap_or(0));
    let args = file.get("args").and_then(Value::as_array).cloned().unwrap_or_default();
    // Buffers first, so that a tensor map may name one that stands behind it.
    for (i, arg) in args.iter().enumerate() {
        if let Some(spec) = arg.get("buffer") {
            let name = spec.get("name").and_then(Value::as_str).map_or_else(|| format!("arg{i}"), str::to_string);
            let buffer = make_buffer(&mut sim, spec, dir, &mut rng).map_err(|e| format!("argument {i}: {e}"))?;
            buffers.insert(name.clone(), buffer);
            order.push(name);
        }
    }
    let mut names = order.iter();
    for (i, arg) in args.iter().enumerate() {
        let value = if arg.get("buffer").is_some() {
            Arg::from(names.next().map_or(0, |n| buffers[n].address))
        } else {
            argument(arg, &buffers).map_err(|e| format!("argument {i}: {e}"))?
        };
        launch.args.push(value);
    }
    let mut reports = vec![];
    for mode in modes {
        for &seed in &seeds {
            for b in buffers.values() {
                if let Some(bytes) = &b.bytes {
                    sim.write(b.address, bytes);
                }
            }
            launch.mode = mode;
            launch.seed = seed;
            let report = sim.launch(&module, &entry, &launch).map_err(|e| e.to_string())?;
            print!("{report}");
            reports.push(report);
        }
    }
    if let Some(report) = reports.first() {
        println!("{}", serde_json::to_string_pretty(&counters(report)).unwrap_or_default());
    }
    if let Some(path) = file.get("output").and_then(Value::as_str) {
        write_buffers(&sim, &buffers, &dir.join(path))?;
    }
    if let Some(path) = file.get("report").and_then(Value::as_str) {
        let json = Value::Array(reports.iter().map(report_json).collect());
        let text = serde_json::to_string_pretty(&json).unwrap_or_default();
        std::fs::write(dir.join(path), text).map_err(|e| format!("{path}: {e}"))?;
    }
    Ok(reports.iter().filter(|r| !r.is_clean()).map(|r| r.findings.len()).sum())
}

fn string<'a>(value: &'a Value, name: &str) -> Res<&'a str> {
    value.get(name).and_then(Value::as_str).ok_or_else(|| format!("`{name}` is missing or not a string"))
}

/// One to three numbers; the rest is 1.
fn triple(file: &Value, name: &str) -> Res<[u32; 3]> {
    let mut out = [1; 3];
    match file.get(name) {
        Some(Value::Number(n)) => out[0] = n.as_u64().unwrap_or(1) as u32,
        Some(Value::Array(list)) if list.len() <= 3 => {
            for (out, v) in out.iter_mut().zip(list) {
                *out = v.as_u64().ok_or_else(|| format!("`{name}` holds positive integers"))? as u32;
            }
        }
        _ => return Err(format!("`{name}` is a list of one to three numbers")),
    }
    Ok(out)
}

fn dtype(name: &str) -> Res<Dtype> {
    Ok(match name {
        "f64" => Dtype::F64,
        "f32" => Dtype::F32,
        "f16" => Dtype::F16,
        "bf16" => Dtype::BF16,
        "e4m3" => Dtype::F8_E4M3,
        "e5m2" => Dtype::F8_E5M2,
        "u8" => Dtype::U8,
        "i8" => Dtype::I8,
        "u16" => Dtype::U16,
        "i16" => Dtype::I16,
        "u32" => Dtype::U32,
        "i32" => Dtype::I32,
        "u64" => Dtype::U64,
        "i64" => Dtype::I64,
        other => return Err(format!("unknown dtype `{other}`")),
    })
}

fn make_buffer(sim: &mut Sim, spec: &Value, dir: &Path, rng: &mut Rng) -> Res<Buffer> {
    let mut kind = dtype(string(spec, "dtype")?)?;
    let len = spec.get("len").and_then(Value::as_u64).map(|n| n as usize);
    let size = kind.bitsize() / 8;
    let need = || len.ok_or("`len` is missing".to_string());
    let bytes = match spec.get("fill") {
        Some(Value::String(fill)) => match fill.as_str() {
            "uninit" => None,
            "zeros" => Some(vec![0; need()? * size]),
            "normal" | "uniform" => {
                let mut bytes = Vec::with_capacity(need()? * size);
                for _ in 0..need()? {
                    let unit = |rng: &mut Rng| ((rng.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
                    let value = if fill == "normal" {
                        let (a, b) = (unit(rng), unit(rng));
                        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
                    } else {
                        unit(rng)
                    };
                    put(&mut bytes, kind, value)?;
                }
                Some(bytes)
            }
            other => return Err(format!("`fill` is normal, uniform, zeros, uninit, a list or a file, not `{other}`")),
        },
        Some(Value::Array(values)) => {
            let mut bytes = vec![];
            for v in values {
                match v.as_i64() {
                    Some(v) if !kind_is_float(kind) => bytes.extend_from_slice(&v.to_le_bytes()[..size]),
                    _ => put(&mut bytes, kind, v.as_f64().ok_or("`fill` holds numbers")?)?,
                }
            }
            Some(bytes)
        }
        Some(file @ Value::Object(_)) => {
            let path: PathBuf = dir.join(string(file, "file")?);
            let data = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            let tensors = SafeTensors::deserialize(&data).map_err(|e| format!("{}: {e}", path.display()))?;
            let view = tensors.tensor(string(file, "tensor")?).map_err(|e| e.to_string())?;
            kind = view.dtype();
            Some(view.data().to_vec())
        }
        _ => return Err("`fill` is missing".into()),
    };
    let total = match (&bytes, len) {
        (Some(b), Some(n)) if b.len() != n * size => {
            return Err(format!("`len` asks for {} bytes, the data has {}", n * size, b.len()));
        }
        (Some(b), _) => b.len(),
        (None, _) => need()? * size,
    };
    let address = sim.alloc(total as u64);
    Ok(Buffer { dtype: kind, len: total / (kind.bitsize() / 8), address, bytes })
}

fn kind_is_float(kind: Dtype) -> bool {
    matches!(kind, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

fn put(out: &mut Vec<u8>, kind: Dtype, value: f64) -> Res<()> {
    use crate::model::float::{E4M3, E5M2, Round};
    match kind {
        Dtype::F64 => out.extend(value.to_le_bytes()),
        Dtype::F32 => out.extend((value as f32).to_le_bytes()),
        Dtype::F16 => out.extend(f16::from_f64(value).to_le_bytes()),
        Dtype::BF16 => out.extend(bf16::from_f64(value).to_le_bytes()),
        Dtype::F8_E4M3 => out.push(E4M3.encode(value, Round::Nearest, true) as u8),
        Dtype::F8_E5M2 => out.push(E5M2.encode(value, Round::Nearest, true) as u8),
        _ => return Err("integers are filled with zeros, uninit, a list or a file".into()),
    }
    Ok(())
}

fn argument(arg: &Value, buffers: &HashMap<String, Buffer>) -> Res<Arg> {
    let object = arg.as_object().filter(|o| o.len() == 1).ok_or("expected one field, the type")?;
    let (kind, value) = object.iter().next().ok_or("expected one field")?;
    let int = || value.as_i64().or(value.as_u64().map(|v| v as i64)).ok_or(format!("`{kind}` takes an integer"));
    let float = || value.as_f64().ok_or(format!("`{kind}` takes a number"));
    Ok(match kind.as_str() {
        "u8" | "i8" => Arg::from(int()? as u8),
        "u16" | "i16" => Arg::from(int()? as u16),
        "u32" | "i32" => Arg::from(int()? as u32),
        "u64" | "i64" => Arg::from(int()? as u64),
        "f32" => Arg::from(float()? as f32),
        "f64" => Arg::from(float()?),
        "pointer" => {
            let name = string(value, "buffer")?;
            let buffer = buffers.get(name).ok_or_else(|| format!("no buffer `{name}`"))?;
            Arg::from(buffer.address + value.get("offset_bytes").and_then(Value::as_u64).unwrap_or(0))
        }
        "tensor_map" => Arg::from(&tensor_map(value, buffers)?),
        other => return Err(format!("unknown argument type `{other}`")),
    })
}

fn tensor_map(spec: &Value, buffers: &HashMap<String, Buffer>) -> Res<TensorMap> {
    let name = string(spec, "buffer")?;
    let buffer = buffers.get(name).ok_or_else(|| format!("no buffer `{name}`"))?;
    let list = |name: &str| -> Res<Vec<u64>> {
        let list = spec.get(name).and_then(Value::as_array).ok_or_else(|| format!("`{name}` is a list"))?;
        Ok(list.iter().filter_map(Value::as_u64).collect())
    };
    let element = match buffer.dtype {
        Dtype::BF16 => ElementType::Bf16,
        Dtype::F16 => ElementType::F16,
        Dtype::F32 => ElementType::F32,
        Dtype::U8 | Dtype::I8 | Dtype::F8_E4M3 | Dtype::F8_E5M2 => ElementType::U8,
        Dtype::U32 => ElementType::U32,
        other => return Err(format!("no tensor map of dtype {other:?}")),
    };
    let swizzle = match spec.get("swizzle").and_then(Value::as_u64).unwrap_or(0) {
        0 => Swizzle::None,
        32 => Swizzle::B32,
        64 => Swizzle::B64,
        128 => Swizzle::B128,
        other => return Err(format!("`swizzle` is 0, 32, 64 or 128, not {other}")),
    };
    let box_dims: Vec<u32> = list("box")?.iter().map(|v| *v as u32).collect();
    let mut map = TensorMap::dense(element, buffer.address, &list("dims")?, &box_dims, swizzle);
    if spec.get("strides_bytes").is_some() {
        map.strides = list("strides_bytes")?;
    }
    if spec.get("fill").and_then(Value::as_str) == Some("nan") {
        map.oob_fill = OobFill::Nan;
    }
    map.validate()?;
    Ok(map)
}

fn write_buffers(sim: &Sim, buffers: &HashMap<String, Buffer>, path: &Path) -> Res<()> {
    let data: Vec<(&String, Dtype, usize, Vec<u8>)> = buffers
        .iter()
        .map(|(name, b)| (name, b.dtype, b.len, sim.read::<u8>(b.address, b.len * b.dtype.bitsize() / 8)))
        .collect();
    let mut views = vec![];
    for (name, dtype, len, bytes) in &data {
        let view = TensorView::new(*dtype, vec![*len], bytes).map_err(|e| e.to_string())?;
        views.push(((*name).clone(), view));
    }
    serialize_to_file(views, None, path).map_err(|e| format!("{}: {e}", path.display()))
}

fn counters(report: &Report) -> Value {
    let c = &report.counters;
    let classes: serde_json::Map<String, Value> =
        Class::ALL.iter().map(|k| (format!("{k:?}").to_lowercase(), json!(c.class(*k)))).collect();
    json!({
        "instructions": c.instructions,
        "by_class": classes,
        "lane_occupancy": c.lane_occupancy(),
        "global_requests": c.global_requests,
        "global_sectors": c.global_sectors,
        "sectors_per_request": c.sectors_per_request(),
        "global_bytes": c.global_bytes,
        "shared_requests": c.shared_requests,
        "shared_wavefronts": c.shared_wavefronts,
        "conflict_degree": c.conflict_degree(),
        "mma_flops": c.mma_flops,
        "tma_bytes": c.tma_bytes,
        "barriers": c.barriers,
        "divergent_branches": c.divergent_branches,
    })
}

fn found_json(found: &Found) -> Value {
    json!({
        "finding": format!("{:?}", found.finding),
        "severity": format!("{:?}", found.finding.severity()),
        "kernel": found.kernel,
        "file": found.file,
        "line": found.line,
        "text": found.text,
        "block": found.block,
        "warp": found.warp,
        "lane": found.lane,
        "values": found.values,
        "count": found.count,
    })
}

fn report_json(report: &Report) -> Value {
    json!({
        "kernel": report.kernel,
        "seed": report.seed,
        "mode": format!("{:?}", report.mode),
        "steps": report.steps,
        "findings": report.findings.iter().map(found_json).collect::<Vec<_>>(),
        "counters": counters(report),
    })
}
