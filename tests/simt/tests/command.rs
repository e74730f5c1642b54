//! The command: what it reads, what it writes, how it ends.

use std::path::{Path, PathBuf};
use std::process::Command;

const SCALE: &str = ".version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .u64 x, .param .u64 y, .param .u32 n, .param .f32 factor)
{
    .reg .pred past;
    .reg .b32 i, len, cta;
    .reg .f32 a, f;
    .reg .b64 px, py, off;
    ld.param.u64 px, [x];
    ld.param.u64 py, [y];
    ld.param.u32 len, [n];
    ld.param.f32 f, [factor];
    mov.u32 cta, %ctaid.x;
    mov.u32 i, %tid.x;
    mad.lo.u32 i, cta, 64, i;
    setp.ge.u32 past, i, len;
    @past bra DONE;
    mul.wide.u32 off, i, 4;
    add.u64 px, px, off;
    add.u64 py, py, off;
    ld.global.f32 a, [px];
    mul.f32 a, a, f;
    st.global.f32 [py], a;
DONE:
    ret;
}
";

fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn run(dir: &Path, launch: &str) -> (Option<i32>, String) {
    let path = dir.join("launch.json");
    std::fs::write(&path, launch).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_simt")).arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code(), text)
}

fn launch(n: u32, extra: &str) -> String {
    format!(
        r#"{{"ptx": "scale.ptx", "grid": [2], "block": [64], "mode": "both", "seeds": [0, 3],
            "args": [{{"buffer": {{"name": "x", "dtype": "f32", "fill": [1, 2.5, -4]}}}},
                     {{"buffer": {{"name": "y", "dtype": "f32", "len": 3, "fill": "uninit"}}}},
                     {{"u32": {n}}}, {{"f32": 0.5}}],
            "output": "out.safetensors", "report": "report.json"{extra}}}"#
    )
}

#[test]
fn clean_findings_and_errors() {
    let dir = folder("command");
    std::fs::write(dir.join("scale.ptx"), SCALE).unwrap();
    let (code, text) = run(&dir, &launch(3, ""));
    assert_eq!(code, Some(0), "{text}");
    let data = std::fs::read(dir.join("out.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&data).unwrap();
    let y = tensors.tensor("y").unwrap();
    let values: Vec<f32> = y.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values, [0.5, 1.25, -2.0]);

    let (code, text) = run(&dir, &launch(4, ""));
    assert_eq!(code, Some(1), "{text}");
    let report: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("report.json")).unwrap()).unwrap();
    assert_eq!(report.as_array().unwrap().len(), 4, "two modes, two seeds");
    let found = &report[0]["findings"][0];
    assert_eq!(found["finding"], "OutOfBounds");
    assert_eq!(found["text"], "ld.global.f32 a, [px];");
    assert_eq!((found["line"].as_u64(), found["lane"].as_u64()), (Some(22), Some(3)));

    let (code, text) = run(&dir, &launch(3, r#", "colour": 1"#));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("colour"), "{text}");
    std::fs::write(dir.join("scale.ptx"), SCALE.replace("mul.f32", "mul.rnd.f32")).unwrap();
    let (code, text) = run(&dir, &launch(3, ""));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("scale.ptx:23") && text.contains(".rnd"), "{text}");
}

/// The launch file that the README shows, on a kernel that takes its arguments.
#[test]
fn the_example_of_the_readme_runs() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let example = readme.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a JSON example");
    let dir = folder("readme");
    std::fs::write(dir.join("scale.ptx"), SCALE_BF16).unwrap();
    let (code, text) = run(&dir, example);
    assert_eq!(code, Some(0), "{text}");
    let data = std::fs::read(dir.join("buffers.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&data).unwrap();
    let bytes = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
    let x: Vec<f32> =
        bytes("x").chunks(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect();
    let y: Vec<f32> = bytes("y").chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(x.len(), 512);
    assert_eq!(y, x.iter().map(|x| 0.125 * x).collect::<Vec<_>>());
    // both modes under 8 seeds
    let report = std::fs::read_to_string(dir.join("report.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&report).unwrap().as_array().unwrap().len(), 16);
}

/// The arguments of the README's example; the map is for a reader of tiles.
const SCALE_BF16: &str = ".version 8.0
.target sm_90
.address_size 64
.visible .entry scale(
    .param .u64 x,
    .param .u64 y,
    .param .u32 n,
    .param .f32 factor,
    .param .align 64 .b8 map[128])
{
    .reg .pred past;
    .reg .b16 h;
    .reg .b32 i, len, cta;
    .reg .f32 a, f;
    .reg .b64 px, py, off;
    ld.param.u64 px, [x];
    ld.param.u64 py, [y];
    ld.param.u32 len, [n];
    ld.param.f32 f, [factor];
    mov.u32 cta, %ctaid.x;
    mov.u32 i, %tid.x;
    mad.lo.u32 i, cta, 128, i;
    setp.ge.u32 past, i, len;
    @past bra DONE;
    mul.wide.u32 off, i, 2;
    add.u64 px, px, off;
    add.u64 py, py, off;
    add.u64 py, py, off;
    ld.global.b16 h, [px];
    cvt.f32.bf16 a, h;
    mul.f32 a, a, f;
    st.global.f32 [py], a;
DONE:
    ret;
}
";
