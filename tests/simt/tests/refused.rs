//! What the decoder refuses, and that nothing it is given makes the simulator itself fail.

mod wrong;

use simt::model::smem::Swizzle;
use simt::model::tensor_map::{ElementType, TensorMap};
use simt::{Arg, Launch, Mode, Module, Sim};

const REGS: &str = "
    .reg .pred p, q;
    .reg .b16 h;
    .reg .b32 a, b, c;
    .reg .u32 u;
    .reg .f32 x, y;
    .reg .b64 d, e;
    .shared .align 16 .b8 buf[64];
";

fn parse(target: &str, line: &str) -> Result<Module, simt::PtxError> {
    let text = format!(
        ".version 8.3\n.target {target}\n.address_size 64\n.visible .entry k(.param .u64 ptr)\n{{{REGS}{line}\n    ret;\n}}"
    );
    Module::parse("refused.ptx", &text)
}

#[test]
fn messages() {
    for (target, line, message) in [
        ("sm_80", "frob.u32 a, b, c;", "unknown instruction `frob`"),
        ("sm_80", "add.u32.sat a, b, c;", "does not take modifier `.sat`"),
        ("sm_80", "add.rn.ftz a, b, c;", "lacks a modifier"),
        ("sm_80", "add.ftz.rn.f32 x, x, y;", "does not take modifier `.rn`"),
        ("sm_80", "add.u32 a, b;", "takes 3 operands, found 2"),
        ("sm_80", "add.u32 a, b, nope;", "`nope` is not declared"),
        ("sm_80", "add.u64 d, e, a;", "`a` has type B32"),
        ("sm_80", "add.f32 x, y, u;", "`u` has type U32"),
        ("sm_80", "add.f32 x, y, 1;", "integer literal"),
        ("sm_80", "add.u32 a, b, 4294967296;", "does not fit 32 bits"),
        ("sm_80", "add.u32 a, b, 0f3F800000;", "literal"),
        ("sm_80", "add.u32 p, b, c;", "`p` is not a register"),
        ("sm_80", "add.u32 a, b, p;", "is a predicate"),
        ("sm_80", "add.sat.u32 a, b, c;", "`.sat` needs type s32"),
        ("sm_80", "mul.wide.u64 d, d, d;", "`.wide`"),
        ("sm_80", "setp.lo.s32 p, a, b;", "needs an unsigned type"),
        ("sm_80", "setp.lt.b32 p, a, b;", "needs a signed or unsigned type"),
        ("sm_80", "@a bra L; L:", "is not a predicate"),
        ("sm_80", "bra NOWHERE;", "no label `NOWHERE`"),
        ("sm_80", "{ L: } bra L;", "no label `L`"),
        ("sm_80", "L: L:", "stands twice"),
        ("sm_80", ".reg .b32 a;", "declared twice"),
        ("sm_80", "ld.global.u32 a, [b];", "cannot hold an address"),
        ("sm_80", "ld.global.u32 a, [buf];", "another state space"),
        ("sm_80", "ld.global.v4.u64 {d, e, d, e}, [d];", "`ld.global.v4.u64` needs sm_100 or newer"),
        ("sm_80", "st.global.v8.u16 [d], {h, h, h, h, h, h, h, h};", "8 values of 2 bytes in one access"),
        ("sm_80", "ld.global.v2.u32 a, [d];", "registers in braces"),
        ("sm_80", "ld.shared.nc.u32 a, [buf];", "`.nc` needs `.global`"),
        ("sm_80", "cp.async.cg.shared.global [a], [d], 8;", "copies 16 bytes"),
        ("sm_80", "barrier.aligned.sync 0;", "does not take modifier `.aligned` there"),
        ("sm_80", "mbarrier.try_wait.parity.shared.b64 p, [a], 0;", "needs sm_90"),
        ("sm_80", "mbarrier.arrive.shared.b64 _, [a], 2;", "`mbarrier.arrive with a count` needs sm_90"),
        ("sm_80", "cp.async.bulk.commit_group;", "needs sm_90"),
        ("sm_80", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [a], {b};", "needs sm_90"),
        (
            "sm_80",
            "fence.acq_rel.cluster;",
            "`fence.acq_rel.cluster` needs sm_90 or newer, the module has `.target sm_80`",
        ),
        ("sm_80", "add.bf16x2 a, b, c;", "needs sm_90"),
        ("sm_80", "mov.u32 a, %cluster_ctarank;", "`%cluster_ctarank` needs sm_90"),
        ("sm_80", "cvt.rn.satfinite.e4m3x2.f32 h, x, y;", "needs sm_89"),
        ("sm_90", "wgmma.fence.sync.aligned;", "needs target sm_90a"),
        ("sm_90", "setmaxnreg.inc.sync.aligned.u32 64;", "needs target sm_90a"),
        (
            "sm_90",
            "mbarrier.arrive.relaxed.cta.shared.b64 _, [a];",
            "needs PTX 8.6 or newer, the module has `.version 8.3`",
        ),
        ("sm_90", "mbarrier.arrive.cta.shared.b64 _, [a];", "does not take modifier `.cta` there"),
        ("sm_80", "ld.u64 d, [ptr];", "`ptr` is a parameter"),
        ("sm_80", "cvt.sat.s64.u32 d, a;", "`.sat` has nothing to clamp"),
        ("sm_80", "mov.u32 a, {h, h};", "a vector is moved as"),
        ("sm_80", "ld.weak.global.nc.u32 a, [d];", "does not take modifier `.nc` there"),
        ("sm_100", "", "target `sm_100` needs PTX 8.6 or newer"),
        ("sm_80", "ld.shared.L1::evict_last.b32 a, [buf];", "a hint to the caches needs global memory"),
        ("sm_80", "ld.global.L2::evict_last.b32 a, [d];", "priority of L2"),
        ("sm_90a", "setmaxnreg.inc.sync.aligned.u32 64;", "needs `.reqntid`"),
        ("sm_70", "", "target `sm_70` is not supported"),
        ("sm_80", "lop3.b32 a, b, c, a, 256;", "literal below 256"),
        ("sm_80", "mov.u32 a, %pm0;", "not declared"),
        ("sm_80", "mov.u32 a, 3 + ;", "expected a constant"),
    ] {
        match parse(target, line) {
            Ok(_) => panic!("`{line}` is accepted"),
            Err(e) => assert!(e.to_string().contains(message), "`{line}`: {e}"),
        }
    }
    parse("sm_80", "mov.u32 a, buf + 4*(2+1);").unwrap();
    parse("sm_80", "add.u32 a, b, (1 << 4) + 3 * 2; { .reg .b32 a; mov.u32 a, buf; } ld.shared.u32 a, [buf + 4 * 3];")
        .unwrap();
}

#[test]
fn wrong_texts() {
    Module::parse("right.ptx", &wrong::text("", "")).unwrap();
    for (place, change, message) in wrong::TEXTS {
        match Module::parse("wrong.ptx", &wrong::text(place, change)) {
            Ok(_) => panic!("`{change}` is accepted"),
            Err(e) => assert!(e.to_string().contains(message), "`{change}`: {e}"),
        }
    }
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Kernels of the tests with words exchanged, removed and doubled: an error or a report, never a panic.
#[test]
fn mutants_do_not_break_the_simulator() {
    let mut texts = vec![];
    for dir in ["kernels", "faults"] {
        for entry in std::fs::read_dir(format!("{}/tests/{dir}", env!("CARGO_MANIFEST_DIR"))).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "ptx") {
                texts.push(std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    texts.sort();
    let rounds: usize = std::env::var("SIMT_MUTANTS").ok().and_then(|n| n.parse().ok()).unwrap_or(600);
    let mut state = 12345;
    let mut ran = 0;
    for round in 0..rounds {
        let text = &texts[random(&mut state) as usize % texts.len()];
        let mut words: Vec<String> = text.split_inclusive([' ', '\n', ',', '.', ';']).map(str::to_string).collect();
        for _ in 0..1 + random(&mut state) % 2 {
            let (i, j) = (random(&mut state) as usize % words.len(), random(&mut state) as usize % words.len());
            match random(&mut state) % 5 {
                0 => words[i] = words[j].clone(),
                1 => drop(words.remove(i)),
                2 => words.swap(i, j),
                3 => words[i] = format!("{}{}", random(&mut state) % 300, &words[i][words[i].len() - 1..]),
                _ => words.insert(i, words[j].clone()),
            }
        }
        let mutant = words.concat();
        let Ok(module) = Module::parse("mutant.ptx", &mutant) else { continue };
        let Some(entry) = module.entries().next().map(str::to_string) else { continue };
        let mut sim = Sim::new();
        let data = sim.upload(&vec![0x3f80u16; 1 << 15]);
        let map = TensorMap::dense(ElementType::Bf16, data, &[64, 64], &[64, 64], Swizzle::B128);
        let mut launch = Launch::new([2, 2, 1], [128, 1, 1]).smem(65536).seed(round as u64);
        launch.mode = if round % 2 == 0 { Mode::LockStep } else { Mode::Split };
        launch.max_steps = 20_000;
        for (_, bytes) in module.params(&entry).unwrap() {
            launch.args.push(match bytes {
                128 => Arg::from(&map),
                8 => Arg::from(data),
                n => Arg(vec![1; n]),
            });
        }
        for threads in [32, 64, 128, 256] {
            launch.block = [threads, 1, 1];
            for cluster in [1, 2] {
                launch.cluster = [cluster, 1, 1];
                if sim.launch(&module, &entry, &launch).is_ok() {
                    ran += 1;
                }
            }
        }
    }
    assert!(ran > 50, "only {ran} mutants ran");
}
