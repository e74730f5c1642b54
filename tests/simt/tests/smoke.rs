//! Whole small kernels: the first things to look at when the simulator itself is in doubt.

use simt::{Finding, Launch, Mode, Module, Sim};

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

fn module(body: &str) -> Module {
    Module::parse("smoke.ptx", &format!("{HEAD}{body}")).unwrap_or_else(|e| panic!("{e}"))
}

const SUM: &str = "
.visible .entry sum(.param .u64 x, .param .u64 out, .param .u32 n)
{
    .reg .pred p;
    .reg .b32 tid, i, len, slot, other;
    .reg .f32 a, b;
    .reg .b64 px, po, off;
    .shared .align 4 .b8 buf[1024];
    ld.param.u64 px, [x];
    ld.param.u64 po, [out];
    ld.param.u32 len, [n];
    mov.u32 tid, %tid.x;
    mov.f32 a, 0f00000000;
    setp.lt.u32 p, tid, len;
    mul.wide.u32 off, tid, 4;
    add.u64 px, px, off;
    @p ld.global.f32 a, [px];
    shl.b32 slot, tid, 2;
    mov.u32 other, buf;
    add.u32 slot, slot, other;
    st.shared.f32 [slot], a;
    mov.u32 i, 128;
LOOP:
    bar.sync 0;
    setp.lt.u32 p, tid, i;
    @!p bra SKIP;
    shl.b32 other, i, 2;
    add.u32 other, other, slot;
    ld.shared.f32 b, [other];
    ld.shared.f32 a, [slot];
    add.f32 a, a, b;
    st.shared.f32 [slot], a;
SKIP:
    shr.u32 i, i, 1;
    setp.ne.u32 p, i, 0;
    @p bra LOOP;
    setp.eq.u32 p, tid, 0;
    @p st.global.f32 [po], a;
    ret;
}";

fn run_sum(text: &str, seed: u64, mode: Mode) -> (f32, simt::Report) {
    let m = module(text);
    let mut sim = Sim::new();
    let values: Vec<f32> = (0..200).map(|i| i as f32).collect();
    let x = sim.upload(&values);
    let out = sim.alloc(4);
    let launch = Launch::new([1, 1, 1], [256, 1, 1]).arg(x).arg(out).arg(200u32).seed(seed).mode(mode);
    let report = sim.launch(&m, "sum", &launch).unwrap();
    (sim.read(out, 1)[0], report)
}

#[test]
fn reduction() {
    let mut counters = None;
    for mode in [Mode::LockStep, Mode::Split] {
        for seed in 0..10 {
            let (sum, report) = run_sum(SUM, seed, mode);
            report.assert_clean();
            assert_eq!(sum, 199.0 * 100.0);
            if mode == Mode::LockStep {
                assert_eq!(*counters.get_or_insert(report.counters), report.counters);
            }
        }
    }
}

#[test]
fn reduction_without_its_barrier() {
    for seed in 0..10 {
        let (_, report) = run_sum(&SUM.replace("    bar.sync 0;\n", ""), seed, Mode::LockStep);
        assert!(report.has(Finding::SharedRace) || report.has(Finding::UninitShared), "{report}");
    }
}

#[test]
fn errors_name_line_and_text() {
    let e = Module::parse("x.ptx", &format!("{HEAD}{}", SUM.replace("add.f32 a", "add.rx.f32 a"))).unwrap_err();
    assert_eq!(e.text, "add.rx.f32 a, a, b;");
    assert!(e.message.contains(".rx"), "{e}");
}
