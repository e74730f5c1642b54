//! Small kernels, hand-written for these tests, give right results in both modes over many seeds: a reduction, a scan, a transpose, GEMMs with
//! `mma.sync` and with `wgmma` + TMA, a warp-specialised pipeline, and clusters.

use std::collections::BTreeSet;

use simt::model::mma::{Arch, Numerics};
use simt::model::smem::Swizzle;
use simt::model::tensor_map::{ElementType, TensorMap};
use simt::{Finding, Launch, Mode, Module, Report, Sim, seeds};

/// Every mode under every seed.
fn runs(count: u64) -> impl Iterator<Item = (u64, Mode)> {
    seeds(count).flat_map(|seed| [(seed, Mode::LockStep), (seed, Mode::Split)])
}

fn load(name: &str) -> Module {
    let path = format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    Module::parse(&format!("{name}.ptx"), &text).unwrap_or_else(|e| panic!("{e}"))
}

/// Launches and insists on a clean report.
fn clean(sim: &mut Sim, module: &Module, entry: &str, launch: &Launch) -> Report {
    let report = sim.launch(module, entry, launch).unwrap_or_else(|e| panic!("{e}"));
    report.assert_clean();
    report
}

/// xorshift64 in [-1, 1)
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn bf16(&mut self) -> u16 {
        (self.unit().to_bits() >> 16) as u16
    }
}

fn widen(x: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(x) << 16))
}

#[test]
fn reduction() {
    let module = load("reduce");
    let mut counters = None;
    for (seed, mode) in runs(30) {
        for n in [1u32, 31, 256, 257, 1000] {
            let mut random = Random(seed * 77 + u64::from(n) + 1);
            let rows = 5;
            // multiples of 2^-10 below 1: every order of the sum is exact
            let data: Vec<f32> = (0..rows * n).map(|_| (random.unit() * 1024.0).round() / 1024.0).collect();
            let mut sim = Sim::new();
            let (input, out) = (sim.upload(&data), sim.alloc(4 * u64::from(rows)));
            let launch = Launch::new([rows, 1, 1], [256, 1, 1]).arg(input).arg(out).arg(n).seed(seed).mode(mode);
            let report = clean(&mut sim, &module, "reduce_sum", &launch);
            for (row, got) in sim.read::<f32>(out, rows as usize).into_iter().enumerate() {
                let want: f32 = data[row * n as usize..(row + 1) * n as usize].iter().sum();
                assert_eq!(got, want, "row {row} of {n}, seed {seed}, {mode:?}");
            }
            // counters do not depend on the schedule: equal for every seed of a mode
            if n == 1000 && mode == Mode::LockStep {
                assert_eq!(*counters.get_or_insert(report.counters), report.counters, "seed {seed}");
            }
        }
    }
}

#[test]
fn scan() {
    let module = load("scan");
    for (seed, mode) in runs(50) {
        let mut random = Random(seed + 5);
        let blocks = 6;
        let data: Vec<u32> = (0..256 * blocks).map(|_| random.next() as u32 % 1000).collect();
        let mut sim = Sim::new();
        let (input, out, total) = (sim.upload(&data), sim.alloc(4 * 256 * u64::from(blocks)), sim.upload(&[0u32]));
        let launch = Launch::new([blocks, 1, 1], [256, 1, 1]).arg(input).arg(out).arg(total).seed(seed).mode(mode);
        clean(&mut sim, &module, "scan_u32", &launch);
        let got = sim.read::<u32>(out, data.len());
        let mut sum = 0;
        for (i, &x) in data.iter().enumerate() {
            sum = if i % 256 == 0 { x } else { sum + x };
            assert_eq!(got[i], sum, "element {i}, seed {seed}, {mode:?}");
        }
        assert_eq!(sim.read::<u32>(total, 1)[0], data.iter().sum::<u32>());
    }
}

#[test]
fn transpose() {
    let module = load("transpose");
    for (seed, mode) in runs(20) {
        for (rows, cols) in [(1u32, 1u32), (32, 32), (33, 31), (70, 100)] {
            let data: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let mut sim = Sim::new();
            let (input, out) = (sim.upload(&data), sim.alloc(4 * u64::from(rows * cols)));
            let launch = Launch::new([cols.div_ceil(32), rows.div_ceil(32), 1], [32, 8, 1])
                .arg(input)
                .arg(out)
                .arg(rows)
                .arg(cols)
                .seed(seed)
                .mode(mode);
            let report = clean(&mut sim, &module, "transpose_f32", &launch);
            let got = sim.read::<f32>(out, data.len());
            for r in 0..rows {
                for c in 0..cols {
                    assert_eq!(got[(c * rows + r) as usize], data[(r * cols + c) as usize]);
                }
            }
            // rows of 33 words keep both directions free of bank conflicts
            if mode == Mode::LockStep {
                assert_eq!(report.counters.conflict_degree(), 1.0, "{rows} x {cols}");
            }
        }
    }
}

/// Bound of one element: products of bf16 are exact in f32; every sum loses at most `2^-22` (twice the truncation to 23 bits) of the partial sums'
/// magnitude, once per fused step of 16 products and once per alignment.
fn check_gemm(got: &[f32], a: &[u16], b: &[u16], m: usize, n: usize, k: usize, what: &str) {
    for i in 0..m {
        for j in 0..n {
            let products = (0..k).map(|x| widen(a[i * k + x]) * widen(b[j * k + x]));
            let (sum, size) = products.fold((0.0, 0.0), |(s, t): (f64, f64), p| (s + p, t + p.abs()));
            let bound = size * 2f64.powi(-22) * (k / 8) as f64 + 1e-30;
            let error = (f64::from(got[i * n + j]) - sum).abs();
            assert!(error <= bound, "{what}: ({i}, {j}) is {}, should be {sum} within {bound:e}", got[i * n + j]);
        }
    }
}

#[test]
fn gemm_with_mma_sync() {
    let module = load("gemm_mma");
    for (seed, mode) in runs(8) {
        for numerics in [Numerics::Exact(Arch::Ampere), Numerics::Exact(Arch::Hopper), Numerics::Fast] {
            let (m, n, k) = (64, 128, 32 * (1 + seed as usize % 4));
            let mut random = Random(seed + 9);
            let a: Vec<u16> = (0..m * k).map(|_| random.bf16()).collect();
            let b: Vec<u16> = (0..n * k).map(|_| random.bf16()).collect();
            let mut sim = Sim::new();
            let (pa, pb, pc) = (sim.upload(&a), sim.upload(&b), sim.alloc(4 * (m * n) as u64));
            let launch = Launch::new([n as u32 / 64, m as u32 / 64, 1], [128, 1, 1])
                .smem(16384)
                .arg(pa)
                .arg(pb)
                .arg(pc)
                .arg(n as u32)
                .arg(k as u32)
                .seed(seed)
                .mode(mode)
                .numerics(numerics);
            let report = clean(&mut sim, &module, "gemm_mma", &launch);
            check_gemm(&sim.read(pc, m * n), &a, &b, m, n, k, &format!("seed {seed}, {mode:?}, {numerics:?}"));
            assert_eq!(report.counters.mma_flops, 2 * (m * n * k) as u64);
            if mode == Mode::LockStep {
                assert_eq!(
                    report.counters.conflict_degree(),
                    1.0,
                    "the XOR keeps ldmatrix and cp.async free of conflicts"
                );
            }
        }
    }
}

fn bf16_map(address: u64, rows: usize, cols: usize, box_rows: u32) -> TensorMap {
    TensorMap::dense(ElementType::Bf16, address, &[cols as u64, rows as u64], &[64, box_rows], Swizzle::B128)
}

#[test]
fn gemm_with_wgmma_and_tma() {
    let module = load("gemm_wgmma");
    for (seed, mode) in runs(8) {
        for numerics in [Numerics::Exact(Arch::Hopper), Numerics::Fast] {
            let (m, n, k) = (64, 128, 64 * (1 + seed as usize % 3));
            let mut random = Random(seed + 19);
            let a: Vec<u16> = (0..m * k).map(|_| random.bf16()).collect();
            let b: Vec<u16> = (0..n * k).map(|_| random.bf16()).collect();
            let mut sim = Sim::new();
            let (pa, pb, pc) = (sim.upload(&a), sim.upload(&b), sim.alloc(4 * (m * n) as u64));
            let launch = Launch::new([n as u32 / 64, m as u32 / 64, 1], [128, 1, 1])
                .smem(16448)
                .arg(&bf16_map(pa, m, k, 64))
                .arg(&bf16_map(pb, n, k, 64))
                .arg(pc)
                .arg(n as u32)
                .arg(k as u32)
                .seed(seed)
                .mode(mode)
                .numerics(numerics);
            clean(&mut sim, &module, "gemm_wgmma", &launch);
            check_gemm(&sim.read(pc, m * n), &a, &b, m, n, k, &format!("seed {seed}, {mode:?}, {numerics:?}"));
        }
    }
}

#[test]
fn warp_specialised_pipeline() {
    let module = load("gemm_pipeline");
    for (seed, mode) in runs(8) {
        for numerics in [Numerics::Exact(Arch::Hopper), Numerics::Fast] {
            let (m, n, k) = (64, 128, 64 * (1 + seed as usize % 7));
            let mut random = Random(seed + 29);
            let a: Vec<u16> = (0..m * k).map(|_| random.bf16()).collect();
            let b: Vec<u16> = (0..n * k).map(|_| random.bf16()).collect();
            let mut sim = Sim::new();
            let (pa, pb, pc) = (sim.upload(&a), sim.upload(&b), sim.alloc(4 * (m * n) as u64));
            let map_c = TensorMap::dense(ElementType::F32, pc, &[n as u64, m as u64], &[32, 64], Swizzle::B128);
            let launch = Launch::new([n as u32 / 128, m as u32 / 64, 1], [256, 1, 1])
                .smem(106_544)
                .arg(&bf16_map(pa, m, k, 64))
                .arg(&bf16_map(pb, n, k, 128))
                .arg(&map_c)
                .arg(k as u32)
                .seed(seed)
                .mode(mode)
                .numerics(numerics);
            clean(&mut sim, &module, "gemm_pipeline", &launch);
            check_gemm(&sim.read(pc, m * n), &a, &b, m, n, k, &format!("seed {seed}, {mode:?}, {numerics:?}"));
        }
    }
}

/// Waits on mbarriers and cluster barriers take as many attempts as the schedule wants; none of them is counted.
#[test]
fn counters_do_not_depend_on_the_schedule() {
    let (pipeline, send) = (load("gemm_pipeline"), load("cluster_send"));
    let mut counters = [None; 2];
    let mut steps = [BTreeSet::new(), BTreeSet::new()];
    for seed in seeds(12) {
        let mut sim = Sim::new();
        let (m, n, k) = (64, 128, 512);
        let (a, b) = (sim.upload(&vec![0x3f80u16; m * k]), sim.upload(&vec![0x3f80u16; n * k]));
        let c = sim.alloc(4 * (m * n) as u64);
        let map_c = TensorMap::dense(ElementType::F32, c, &[n as u64, m as u64], &[32, 64], Swizzle::B128);
        let (map_a, map_b) = (bf16_map(a, m, k, 64), bf16_map(b, n, k, 128));
        let launch =
            Launch::new([1, 1, 1], [256, 1, 1]).smem(106_544).arg(&map_a).arg(&map_b).arg(&map_c).arg(k as u32);
        let first = clean(&mut sim, &pipeline, "gemm_pipeline", &launch.seed(seed));
        let (input, out) = (sim.upload(&[1u32; 512]), sim.alloc(2048));
        let launch = Launch::new([4, 1, 1], [128, 1, 1]).cluster([2, 1, 1]).arg(input).arg(out).seed(seed);
        let second = clean(&mut sim, &send, "cluster_send", &launch);
        for (i, report) in [first, second].into_iter().enumerate() {
            assert_eq!(*counters[i].get_or_insert(report.counters), report.counters, "{}, seed {seed}", report.kernel);
            steps[i].insert(report.steps);
        }
    }
    assert!(steps.iter().all(|s| s.len() > 1 || std::env::var_os("SIMT_SEED").is_some()), "the schedules differ");
}

#[test]
fn cluster_sum_through_distributed_shared_memory() {
    let module = load("cluster_sum");
    for (seed, mode) in runs(40) {
        let mut random = Random(seed + 3);
        let blocks = 8;
        let data: Vec<u32> = (0..128 * blocks).map(|_| random.next() as u32).collect();
        let mut sim = Sim::new();
        let (input, out) = (sim.upload(&data), sim.alloc(4 * u64::from(blocks)));
        let launch =
            Launch::new([blocks, 1, 1], [128, 1, 1]).cluster([4, 1, 1]).arg(input).arg(out).seed(seed).mode(mode);
        clean(&mut sim, &module, "cluster_sum", &launch);
        for (block, got) in sim.read::<u32>(out, blocks as usize).into_iter().enumerate() {
            let cluster = block / 4 * 512;
            assert_eq!(got, data[cluster..cluster + 512].iter().fold(0, |s: u32, &x| s.wrapping_add(x)));
        }
    }
}

#[test]
fn cluster_multicast_loads() {
    let module = load("cluster_multicast");
    for (seed, mode) in runs(40) {
        let pairs = 2u32;
        let data: Vec<u32> = (0..pairs * 2048).map(|i| i * 3 + 1).collect();
        let mut sim = Sim::new();
        let (input, out) = (sim.upload(&data), sim.alloc(4 * 4096 * u64::from(pairs)));
        let map = TensorMap::dense(ElementType::U32, input, &[32, u64::from(64 * pairs)], &[32, 32], Swizzle::None);
        let launch =
            Launch::new([2 * pairs, 1, 1], [128, 1, 1]).cluster([2, 1, 1]).arg(&map).arg(out).seed(seed).mode(mode);
        clean(&mut sim, &module, "cluster_multicast", &launch);
        for (i, got) in sim.read::<u32>(out, 4096 * pairs as usize).into_iter().enumerate() {
            let (block, element) = (i / 2048, i % 2048);
            assert_eq!(got, data[block / 2 * 2048 + element] + block as u32 % 2, "block {block} element {element}");
        }
    }
}

#[test]
fn cluster_sends() {
    let module = load("cluster_send");
    for (seed, mode) in runs(40) {
        let mut random = Random(seed + 3);
        let blocks = 4usize;
        let data: Vec<u32> = (0..128 * blocks).map(|_| random.next() as u32 >> 1).collect();
        let mut sim = Sim::new();
        let (input, out) = (sim.upload(&data), sim.alloc(4 * 128 * blocks as u64));
        let launch = Launch::new([blocks as u32, 1, 1], [128, 1, 1])
            .cluster([2, 1, 1])
            .arg(input)
            .arg(out)
            .seed(seed)
            .mode(mode);
        clean(&mut sim, &module, "cluster_send", &launch);
        for (i, got) in sim.read::<u32>(out, data.len()).into_iter().enumerate() {
            let (block, thread) = (i / 128, i % 128);
            let peer = (block ^ 1) * 128;
            assert_eq!(got, data[peer + thread] + data[peer + (thread + 127) % 128], "block {block} thread {thread}");
        }
    }
}

#[test]
fn split_mode_shows_a_missing_warp_barrier() {
    let module = load("warp_exchange");
    let right: Vec<u32> = (0..32).map(|t| t ^ 1).collect();
    let run = |seed, mode| {
        let mut sim = Sim::new();
        let out = sim.alloc(128);
        let launch = Launch::new([1, 1, 1], [32, 1, 1]).arg(out).seed(seed).mode(mode);
        let report = sim.launch(&module, "warp_exchange", &launch).unwrap();
        assert!(report.has(Finding::SharedRace), "{report}");
        sim.read::<u32>(out, 32)
    };
    assert!((0..20).all(|seed| run(seed, Mode::LockStep) == right));
    let wrong = (0..20).filter(|&seed| run(seed, Mode::Split) != right).count();
    assert!(wrong > 10, "only {wrong} of 20 seeds show the fault");
}

#[test]
fn a_lane_that_polls_lets_the_others_run() {
    let module = load("warp_poll");
    for (seed, mode) in runs(2) {
        let mut sim = Sim::new();
        let out = sim.alloc(4);
        clean(&mut sim, &module, "warp_poll", &Launch::new([1, 1, 1], [32, 1, 1]).arg(out).seed(seed).mode(mode));
        assert_eq!(sim.read::<u32>(out, 1), [7]);
    }
}

#[test]
fn a_step_limit_tells_where_everybody_is() {
    let module = load("warp_poll");
    let mut sim = Sim::new();
    let out = sim.alloc(4);
    let mut launch = Launch::new([1, 1, 1], [32, 1, 1]).arg(out);
    launch.max_steps = 1000;
    let report = sim.launch(&module, "warp_poll", &launch).unwrap();
    let found = &report.findings[0];
    assert_eq!(found.finding, Finding::StepLimit);
    // the poll, and the lanes behind it
    assert!(found.values.contains(", lanes 0x00000001 at line 2"), "{found}");
    assert!(found.values.contains(", lanes 0xfffffffe at line 28 (runs)"), "{found}");
}

#[test]
fn constants_and_initialised_globals() {
    let module = load("constants");
    for (seed, mode) in runs(3) {
        let mut sim = Sim::new();
        let out = sim.alloc(128);
        clean(&mut sim, &module, "constants", &Launch::new([1, 1, 1], [32, 1, 1]).arg(out).seed(seed).mode(mode));
        assert_eq!(sim.read::<u32>(out, 32), (0..32).map(|t| 10 * (t % 4 + 1) + 7).collect::<Vec<u32>>());
    }
}
