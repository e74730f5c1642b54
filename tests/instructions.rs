//! Instruction counts of the CPU backend, which say what clocks on a busy machine cannot.
//!
//! * AVX-512 and AVX2: the inner loop of each micro-kernel in this program's own disassembly: its multiply-adds, its instructions, no
//!   access to the stack (a spilled register). Needs `objdump`.
//! * `portable` and `avx2`: instructions that small calls execute, as callgrind counts them. Needs valgrind, which has no AVX-512.
//!
//! They are counts of optimised code without the checks of a debug build: `cargo test --release --test instructions`
//! (`.ci/run instructions`). Counts may fall without a failure: then the numbers here are to be lowered. In other builds, and without
//! the tools, the tests print SKIPPED.

#![cfg(target_arch = "x86_64")]

mod common;

use common::Rng;
use common::skip::skipped;
use gatefold::args::*;
use gatefold::cpu::{self, Cpu, Float, Level};
use gatefold::spec::*;
use gatefold::{View, ViewMut};
use half::{bf16, f16};
use std::process::Command;

/// What is fixed in a call that is counted: enough tokens for tiles of every size.
const TOKENS: usize = 40;
const WIDTH: usize = 96;

/// Where callgrind starts and ends counting.
#[unsafe(no_mangle)]
#[inline(never)]
fn gatefold_counted(call: &mut dyn FnMut()) {
    call();
}

fn x<T: Float>(len: usize) -> Vec<T> {
    Rng::new(len as u64).normals(len, 0.5)
}

/// One of the calls, first to warm up, then counted.
fn call<T: Float>(case: &str, level: Level) {
    let cpu = &mut Cpu::with_level(level);
    let tokens = x::<T>(TOKENS * WIDTH);
    let tokens = View::new(&tokens, [TOKENS, WIDTH]);
    let mut out = vec![T::default(); TOKENS * WIDTH];
    let twice = |run: &mut dyn FnMut()| {
        run();
        gatefold_counted(run);
    };
    match case {
        "linear" => {
            let weight = x::<T>(WIDTH * WIDTH);
            let weight = cpu::PackedLinear::pack(View::new(&weight, [WIDTH, WIDTH])).unwrap();
            twice(&mut || {
                let out = ViewMut::new(&mut out, [TOKENS, WIDTH]);
                cpu::linear(cpu, tokens, &weight, None, out).unwrap();
            });
        }
        "mixture" => {
            let (experts, inner) = (4, 48);
            let ffn = Ffn::gated(WIDTH, inner, Activation::Silu);
            let spec = Moe::new(Router::new(experts, 2), ExpertFfn::new(experts, ffn));
            let weights = x::<T>(experts * WIDTH * inner);
            let [up, down] = [[experts, inner, WIDTH], [experts, WIDTH, inner]].map(|shape| View::new(&weights, shape));
            let router = View::new(&weights[..experts * WIDTH], [experts, WIDTH]);
            let weights = MoeWeights::<T>::new(router, ExpertWeights::separate(Some(up), up, down));
            let packed = cpu::PackedMoe::pack(&spec, &weights).unwrap();
            twice(&mut || {
                let out = MoeOutput::new(ViewMut::new(&mut out, [TOKENS, WIDTH]));
                cpu::moe(cpu, &spec, &MoeInput::new(tokens), &packed, out).unwrap();
            });
        }
        // A prompt, and one token that sees as many keys.
        "prompt" | "decode" => {
            let (heads, dim, queries) = (6, WIDTH / 6, if case == "prompt" { TOKENS } else { 1 });
            let spec = Attention::causal(heads, 1, dim);
            let keys = x::<T>(TOKENS * dim);
            let keys = View::new(&keys, [TOKENS, 1, dim]);
            let q = x::<T>(queries * WIDTH);
            let input = AttentionInput::new(View::new(&q, [queries, heads, dim]), Kv::ragged(keys, keys, None));
            twice(&mut || {
                let out = ViewMut::new(&mut out[..queries * WIDTH], [queries, heads, dim]);
                cpu::attention(cpu, &spec, &input, AttentionOutput::new(out)).unwrap();
            });
        }
        _ => panic!("unknown case {case}"),
    }
}

/// Whether this build has the checks of a debug build; says so.
fn is_checked_build() -> bool {
    if cfg!(debug_assertions) {
        skipped("instructions are counted in `cargo test --release --test instructions`");
    }
    cfg!(debug_assertions)
}

const CASES: [&str; 4] = ["linear", "mixture", "prompt", "decode"];

/// What callgrind runs: `GATEFOLD_COUNTED` names the case, `GATEFOLD_CPU_LEVEL` caps the level.
#[test]
#[ignore = "callgrind runs it"]
fn counted() {
    let case = std::env::var("GATEFOLD_COUNTED").unwrap();
    common::sums::with_threads(1, || call::<f32>(&case, Cpu::new().unwrap().level()));
}

/// Instructions that each call executed when they were last recorded.
const RECORDED: [(&str, [u64; 4]); 2] =
    [("portable", [556_895, 2_205_171, 715_262, 59_585]), ("avx2", [144_026, 620_496, 230_348, 23_489])];

#[test]
fn small_calls_execute_no_more_instructions() {
    // Two compilers need not count alike.
    const MORE: f64 = 1.03;
    if is_checked_build() {
        return;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        return skipped("valgrind is not installed");
    }
    let mut failed = Vec::new();
    for (level, recorded) in RECORDED {
        if Level::by_name(level).is_err() {
            skipped(format!("this machine has no level {level}"));
            continue;
        }
        for (case, recorded) in CASES.iter().zip(recorded) {
            let output = Command::new("valgrind")
                .args(["--tool=callgrind", "--toggle-collect=gatefold_counted", "--callgrind-out-file=/dev/null"])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", "counted", "--ignored", "--test-threads=1"])
                .env("GATEFOLD_COUNTED", case)
                .env("GATEFOLD_CPU_LEVEL", level)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
            let count = text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
            let count: u64 = count.unwrap_or_else(|| panic!("callgrind did not tell a count:\n{text}"));
            println!("{level:9} {case:8} {count:>9} instructions, recorded {recorded}");
            if count as f64 > MORE * recorded as f64 {
                failed.push(format!("{level} {case}: {count} instructions, recorded are {recorded}"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// A loop without a branch inside.
struct Loop {
    instructions: Vec<String>,
}

impl Loop {
    fn count(&self, names: &[&str]) -> usize {
        self.instructions.iter().filter(|text| names.iter().any(|name| text.starts_with(name))).count()
    }

    fn multiply_adds(&self) -> usize {
        self.count(&["vfmadd", "vdpbf16ps"])
    }

    /// Accesses to the stack: registers that did not suffice.
    fn on_stack(&self) -> usize {
        self.instructions.iter().filter(|text| text.contains("(%rsp")).count()
    }

    fn has(&self, part: &str) -> bool {
        self.instructions.iter().any(|text| text.contains(part))
    }

    /// What tells the micro-kernels apart; `None`: not one of them.
    fn kind(&self) -> Option<&'static str> {
        let register = if self.has("%zmm") { "zmm" } else { "ymm" };
        let kind = match (register, self.has("prefetch")) {
            ("zmm", true) if self.has("vdpbf16ps") => "gemm, bf16 pairs, zmm",
            ("zmm", true) if self.has("vcvtph2ps") => "gemm, f16, zmm",
            ("zmm", true) if self.has("vpslld") => "gemm, bf16 widened, zmm",
            ("zmm", true) => "gemm, f32, zmm",
            ("zmm", false) if self.has("vdpbf16ps") => "attention, bf16 pairs, zmm",
            ("zmm", false) => "attention, f32, zmm",
            (_, true) if self.has("vcvtph2ps") => "gemm, f16, ymm",
            (_, true) if self.has("vpslld") => "gemm, bf16 widened, ymm",
            (_, true) => "gemm, f32, ymm",
            _ => return None,
        };
        Some(kind)
    }
}

/// The innermost loops of a disassembly: what lies between a backward jump and its target, if nothing there jumps.
fn loops(disassembly: &str) -> Vec<Loop> {
    let (mut found, mut body) = (Vec::new(), Vec::<(u64, String)>::new());
    for line in disassembly.lines() {
        let Some((address, text)) = line.split_once(":\t") else {
            body.clear(); // a function begins
            continue;
        };
        let Ok(address) = u64::from_str_radix(address.trim(), 16) else { continue };
        let text = text.trim().to_string();
        let is_jump = text.starts_with('j');
        let target = text.split_whitespace().nth(1).and_then(|t| u64::from_str_radix(t, 16).ok()).filter(|_| is_jump);
        body.push((address, text));
        if let Some(start) = target.and_then(|target| body.iter().position(|(at, _)| *at == target)) {
            found.push(Loop { instructions: body[start..].iter().map(|(_, text)| text.clone()).collect() });
        }
        if is_jump {
            body.clear();
        }
    }
    found
}

/// Kind, multiply-adds, most instructions and most accesses to the stack of an iteration, and how many loops there are at least: one
/// for each level. (AVX2 has a register too few to widen pairs of bf16 in.)
const INNER_LOOPS: [(&str, usize, usize, usize, usize); 32] = [
    ("attention, bf16 pairs, zmm", 16, 52, 0, 4),
    ("attention, f32, zmm", 16, 37, 0, 4),
    ("gemm, bf16 pairs, zmm", 8, 19, 0, 1),
    ("gemm, bf16 pairs, zmm", 12, 26, 0, 1),
    ("gemm, bf16 pairs, zmm", 16, 31, 0, 1),
    ("gemm, bf16 pairs, zmm", 20, 38, 0, 1),
    ("gemm, bf16 pairs, zmm", 24, 44, 0, 1),
    ("gemm, bf16 widened, ymm", 8, 23, 0, 1),
    ("gemm, bf16 widened, ymm", 12, 30, 0, 1),
    ("gemm, bf16 widened, ymm", 16, 35, 0, 1),
    ("gemm, bf16 widened, ymm", 24, 50, 2, 1),
    ("gemm, bf16 widened, zmm", 8, 23, 0, 2),
    ("gemm, bf16 widened, zmm", 12, 30, 0, 2),
    ("gemm, bf16 widened, zmm", 16, 35, 0, 2),
    ("gemm, bf16 widened, zmm", 24, 48, 0, 2),
    ("gemm, bf16 widened, zmm", 32, 59, 0, 2),
    ("gemm, bf16 widened, zmm", 40, 72, 0, 2),
    ("gemm, bf16 widened, zmm", 48, 84, 0, 2),
    ("gemm, f16, ymm", 8, 19, 0, 1),
    ("gemm, f16, ymm", 12, 26, 0, 1),
    ("gemm, f16, zmm", 8, 21, 0, 2),
    ("gemm, f16, zmm", 12, 28, 0, 2),
    ("gemm, f16, zmm", 16, 33, 0, 2),
    ("gemm, f16, zmm", 20, 40, 0, 2),
    ("gemm, f16, zmm", 24, 46, 0, 2),
    ("gemm, f32, ymm", 8, 19, 0, 1),
    ("gemm, f32, ymm", 12, 26, 0, 1),
    ("gemm, f32, zmm", 8, 19, 0, 2),
    ("gemm, f32, zmm", 12, 26, 0, 2),
    ("gemm, f32, zmm", 16, 31, 0, 2),
    ("gemm, f32, zmm", 20, 38, 0, 2),
    ("gemm, f32, zmm", 24, 44, 0, 2),
];

#[test]
fn inner_loops_are_as_short_as_they_were() {
    if is_checked_build() {
        return;
    }
    // So that they are part of this program.
    for level in Level::available() {
        for case in CASES {
            call::<f32>(case, level);
            call::<bf16>(case, level);
            call::<f16>(case, level);
        }
    }
    let this = std::env::current_exe().unwrap();
    let Ok(output) = Command::new("objdump").args(["-d", "--no-show-raw-insn"]).arg(this).output() else {
        return skipped("objdump is not installed");
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let all = loops(&String::from_utf8_lossy(&output.stdout));
    let mut table = std::collections::BTreeMap::<_, Vec<&Loop>>::new();
    for of in all.iter().filter(|of| of.multiply_adds() >= 8) {
        if let Some(kind) = of.kind() {
            table.entry((kind, of.multiply_adds())).or_default().push(of);
        }
    }
    for ((kind, multiply_adds), of) in &table {
        let most = of.iter().map(|of| of.instructions.len()).max().unwrap_or(0);
        let most_stack = of.iter().map(|of| of.on_stack()).max().unwrap_or(0);
        println!("(\"{kind}\", {multiply_adds}, {most}, {most_stack}, {}),", of.len());
    }
    let mut failed = Vec::new();
    for (kind, multiply_adds, most, most_stack, copies) in INNER_LOOPS {
        let of = table.get(&(kind, multiply_adds)).map_or(&[][..], Vec::as_slice);
        if of.len() < copies {
            failed.push(format!("{kind}: {} loops of {multiply_adds} multiply-adds, {copies} were recorded", of.len()));
        }
        for of in of {
            if of.instructions.len() > most || of.on_stack() > most_stack {
                failed.push(format!("{kind}, {multiply_adds} multiply-adds: {:#?}", of.instructions));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
