//! How fast the simulator runs, with every check on: `cargo bench -p simt`.

use simt::model::smem::Swizzle;
use simt::model::tensor_map::{ElementType, TensorMap};
use simt::{Finding, Launch, Module, Sim};

/// An elementwise loop: loads, f32 arithmetic, shared memory, barriers.
const SCALAR: &str = ".version 8.0
.target sm_80
.address_size 64
.visible .entry scalar(.param .u64 x, .param .u64 y)
{
    .reg .pred p;
    .reg .b32 tid, i, slot, base, cta, index;
    .reg .f32 a, b, c;
    .reg .b64 px, py, off;
    .shared .align 4 .b8 buf[1024];
    ld.param.u64 px, [x];
    ld.param.u64 py, [y];
    mov.u32 tid, %tid.x;
    mov.u32 cta, %ctaid.x;
    mad.lo.u32 index, cta, 256, tid;
    mul.wide.u32 off, index, 4;
    add.u64 px, px, off;
    add.u64 py, py, off;
    shl.b32 slot, tid, 2;
    mov.u32 base, buf;
    add.u32 slot, slot, base;
    mov.f32 c, 0f00000000;
    mov.u32 i, 0;
LOOP:
    ld.global.f32 a, [px];
    fma.rn.f32 b, a, 0f3F000000, c;
    add.f32 c, b, a;
    st.shared.f32 [slot], c;
    bar.sync 0;
    xor.b32 index, slot, 4;
    ld.shared.f32 b, [index];
    bar.sync 0;
    mul.f32 c, b, 0f3F000000;
    ex2.approx.f32 b, c;
    max.f32 c, b, a;
    add.u32 i, i, 1;
    setp.lt.u32 p, i, 200;
    @p bra LOOP;
    st.global.f32 [py], c;
    ret;
}";

/// A 64 x 64 x 64 step from shared memory, over and over: ldmatrix and mma.
fn mma_text() -> String {
    let mut body = String::new();
    for k in 0..4 {
        body += &format!("    add.u32 r0, a_row, {};\n", 32 * k);
        body += "    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {A0, A1, A2, A3}, [r0];\n";
        for j in 0..4 {
            body += &format!("    add.u32 r0, b_row, {};\n", 32 * k + j * 16 * 144);
            body += "    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {B0, B1, B2, B3}, [r0];\n";
            for h in 0..2 {
                let c = 8 * j + 4 * h;
                let acc = format!("{{C{c}, C{}, C{}, C{}}}", c + 1, c + 2, c + 3);
                body += &format!(
                    "    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {acc}, {{A0, A1, A2, A3}}, {{B{}, B{}}}, {acc};\n",
                    2 * h,
                    2 * h + 1
                );
            }
        }
    }
    let zero: String = (0..32).map(|i| format!("    mov.f32 C{i}, 0f00000000;\n")).collect();
    format!(
        ".version 8.0
.target sm_80
.address_size 64
.visible .entry tile(.param .u64 out)
{{
    .reg .pred p;
    .reg .b32 tid, i, r0, r1, a_row, b_row, base, A<4>, B<4>;
    .reg .f32 C<32>;
    .reg .b64 po;
    .shared .align 16 .b8 buf[18432];
    mov.u32 tid, %tid.x;
    mov.u32 base, buf;
    mov.u32 i, tid;
FILL:
    shl.b32 r0, i, 2;
    add.u32 r0, r0, base;
    and.b32 r1, i, 7;
    or.b32 r1, r1, 0x3F803E80;
    st.shared.u32 [r0], r1;
    add.u32 i, i, 128;
    setp.lt.u32 p, i, 4608;
    @p bra FILL;
    bar.sync 0;
    and.b32 r0, tid, 31;
    and.b32 r1, r0, 15;
    mul.lo.u32 a_row, r1, 144;
    shr.u32 r1, r0, 4;
    shl.b32 r1, r1, 4;
    add.u32 a_row, a_row, r1;
    add.u32 a_row, a_row, base;
    shr.u32 r1, tid, 5;
    mul.lo.u32 r1, r1, 2304;
    add.u32 b_row, a_row, 9216;
    add.u32 a_row, a_row, r1;
{zero}
    mov.u32 i, 0;
LOOP:
{body}
    add.u32 i, i, 1;
    setp.lt.u32 p, i, 400;
    @p bra LOOP;
    ld.param.u64 po, [out];
    setp.eq.u32 p, tid, 0;
    @p st.global.f32 [po], C0;
    ret;
}}"
    )
}

/// Seconds that this thread has been on a core, so that other work on the machine does not count; wall time where the kernel
/// does not tell.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    match text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()) {
        Some(ns) => ns * 1e-9,
        None => std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |d| d.as_secs_f64()),
    }
}

fn main() {
    println!("checks on: all of {:?}", Finding::ALL);
    let m = Module::parse("scalar.ptx", SCALAR).unwrap();
    let mut sim = Sim::new();
    let x = sim.upload(&vec![0.5f32; 256 * 64]);
    let y = sim.alloc(4 * 256 * 64);
    let launch = Launch::new([64, 1, 1], [256, 1, 1]).arg(x).arg(y);
    let start = cpu_seconds();
    let report = sim.launch(&m, "scalar", &launch).unwrap();
    report.assert_clean();
    let seconds = cpu_seconds() - start;
    println!("scalar: {:.2} M warp-instructions/s", report.counters.instructions as f64 / seconds / 1e6);

    let m = Module::parse("tile.ptx", &mma_text()).unwrap();
    let out = sim.alloc(4);
    for (name, numerics) in [("exact", None), ("fast", Some(simt::model::mma::Numerics::Fast))] {
        let mut launch = Launch::new([1, 1, 1], [128, 1, 1]).arg(out);
        launch.numerics = numerics;
        let start = cpu_seconds();
        let report = sim.launch(&m, "tile", &launch).unwrap();
        report.assert_clean();
        let seconds = cpu_seconds() - start;
        let flops = report.counters.mma_flops as f64 / seconds / 1e9;
        let rate = report.counters.instructions as f64 / seconds / 1e6;
        println!("mma.sync bf16, {name}: {flops:.2} GFLOP/s, {rate:.2} M warp-instructions/s");
    }

    // The warp-specialised pipeline of the tests: TMA, mbarriers, wgmma.
    let m = Module::parse("gemm_pipeline.ptx", include_str!("../tests/kernels/gemm_pipeline.ptx")).unwrap();
    let (rows, cols, k) = (64 * 2, 128 * 2, 1024u32);
    let values = |n: u32| -> Vec<u16> { (0..n).map(|i| 0x3f00 | (i % 61) as u16).collect() };
    let (a, b) = (sim.upload(&values(rows * k)), sim.upload(&values(cols * k)));
    let c = sim.alloc(u64::from(4 * rows * cols));
    let map = |address, rows: u32, box_rows| {
        TensorMap::dense(ElementType::Bf16, address, &[u64::from(k), u64::from(rows)], &[64, box_rows], Swizzle::B128)
    };
    let dims = [u64::from(cols), u64::from(rows)];
    let map_c = TensorMap::dense(ElementType::F32, c, &dims, &[32, 64], Swizzle::B128);
    for (name, numerics) in [("exact", None), ("fast", Some(simt::model::mma::Numerics::Fast))] {
        let mut launch = Launch::new([cols / 128, rows / 64, 1], [256, 1, 1]).smem(106_544);
        launch = launch.arg(&map(a, rows, 64)).arg(&map(b, cols, 128)).arg(&map_c).arg(k);
        launch.numerics = numerics;
        let start = cpu_seconds();
        let report = sim.launch(&m, "gemm_pipeline", &launch).unwrap();
        report.assert_clean();
        let seconds = cpu_seconds() - start;
        println!("wgmma bf16 with TMA, {name}: {:.2} GFLOP/s", report.counters.mma_flops as f64 / seconds / 1e9);
    }
}
