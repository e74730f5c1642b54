//! `ldmatrix`, `stmatrix`, `movmatrix` and `mma.sync` (PTX ISA 9.7.14.5).

use super::memory::{self, clash_finding, lane_race};
use super::{Flow, aligned, check, store};
use crate::finding::Finding;
use crate::model::fragment::{self, Fragment};
use crate::model::mma::{self, Accumulator, Input, Spec, Unit};
use crate::op::{Addr, Instr, Lanes, Mma, Op, Space};
use crate::ptx::types::Ty;
use crate::state::{Cluster, Cx, Warp, resolve, shared_target};

pub(super) fn execute(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr) -> Flow {
    let warp = &mut cl.warps[w];
    let mask = match aligned(cx, warp, instr) {
        Ok(mask) => mask,
        Err(flow) => return flow,
    };
    if mask != u32::MAX {
        let values = format!("needs 32 lanes, only {mask:#010x} are there");
        cx.report(warp.site(), None, Finding::DivergentCollective, values);
        return Flow::Hold;
    }
    match &instr.op {
        Op::LdMatrix { addr, trans, d } => {
            let Some(rows) = row_addresses(cx, cl, w, *addr, 8 * d.len()) else { return Flow::Hold };
            let (warp, cta, parties) = memory::parts(cl, w);
            let (tag, site) = (warp.tag(), warp.site());
            let mut matrix = [[0u8; 16]; 8];
            for (n, &d) in d.iter().enumerate() {
                for (r, row) in matrix.iter_mut().enumerate() {
                    let at = rows[8 * n + r] as usize;
                    let lane = 8 * n + r;
                    if let Some(clash) = cta.shared.read_by_lane(at, 16, tag, lane, warp.lane_seen[lane], false) {
                        lane_race(cx, site, lane, clash, "read");
                    }
                    if let Some((byte, clash)) = cta.shared.read(at, 16, tag, &warp.clock, false, None) {
                        let (finding, values) = clash_finding(parties, clash, byte, false);
                        cx.report(site, Some(lane as u32), finding, values);
                    }
                    row.copy_from_slice(&cta.shared.data[at..at + 16]);
                }
                let out = fragment::load_matrix(&matrix, *trans).map(u64::from);
                store(cx, warp, d, &out, mask);
            }
        }
        Op::StMatrix { addr, trans, a } => {
            let Some(rows) = row_addresses(cx, cl, w, *addr, 8 * a.len()) else { return Flow::Hold };
            let (warp, cta, parties) = memory::parts(cl, w);
            let (tag, site) = (warp.tag(), warp.site());
            for (n, &a) in a.iter().enumerate() {
                check(cx, warp, a, mask);
                let reg = warp.get(cx.kernel, a).map(|v| v as u32);
                for (r, row) in fragment::store_matrix(&reg, *trans).iter().enumerate() {
                    let at = rows[8 * n + r] as usize;
                    let (lane, changes) = (8 * n + r, cta.shared.data[at..at + 16] != *row);
                    if let Some(clash) = cta.shared.write_by_lane(at, 16, tag, lane, warp.lane_seen[lane], changes) {
                        lane_race(cx, site, lane, clash, "write");
                    }
                    if let Some((byte, clash)) = cta.shared.write(at, 16, tag, &warp.clock, None) {
                        let (finding, values) = clash_finding(parties, clash, byte, true);
                        cx.report(site, Some(lane as u32), finding, values);
                    }
                    cta.shared.data[at..at + 16].copy_from_slice(row);
                }
            }
        }
        Op::MovMatrix { d, a } => {
            check(cx, warp, *a, mask);
            let reg = warp.get(cx.kernel, *a).map(|v| v as u32);
            let out = fragment::transpose_matrix(&reg).map(u64::from);
            store(cx, warp, *d, &out, mask);
        }
        Op::Mma(op) => multiply(cx, warp, op),
        _ => unreachable!("a matrix instruction"),
    }
    Flow::Next
}

/// The shared offsets of the 16-byte rows that the first lanes supply, checked.
fn row_addresses(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, addr: Addr, rows: usize) -> Option<Lanes> {
    let ctas = cl.ctas.len();
    let (warp, cta, _) = memory::parts(cl, w);
    let mask = (u64::MAX >> (64 - rows)) as u32;
    let site = warp.site();
    let raw = memory::addresses(cx, warp, addr, mask);
    let mut out = [0u64; 32];
    for (i, out) in out.iter_mut().enumerate().take(rows) {
        let (space, at) = resolve(addr.space, raw[i]);
        let target = if space == Space::SharedCluster { shared_target(at, warp.cta, ctas) } else { None };
        let Some((rank, offset)) = target.filter(|t| t.0 == warp.cta) else {
            let values = format!("address {:#x} is not in the shared memory of the block", raw[i]);
            cx.report(site, Some(i as u32), Finding::OutOfBounds, values);
            return None;
        };
        debug_assert_eq!(rank, warp.cta);
        if !memory::shared_bounds(cx, site, i, offset as u64, 16, cta.shared.data.len()) {
            return None;
        }
        *out = offset as u64;
    }
    if warp.spin.is_none() {
        cx.counters.shared(&out, mask, 16);
    }
    Some(out)
}

/// The model's type of A or B.
pub(crate) fn input(ty: Ty) -> Input {
    match ty {
        Ty::F16 => Input::F16,
        Ty::Bf16 => Input::Bf16,
        Ty::Tf32 => Input::Tf32,
        Ty::E4m3 => Input::E4m3,
        Ty::E5m2 => Input::E5m2,
        Ty::S8 => Input::S8,
        _ => Input::U8,
    }
}

fn multiply(cx: &mut Cx<'_>, warp: &mut Warp, op: &Mma) {
    let kernel = cx.kernel;
    let kind = op.kind;
    let k = usize::from(kind.k);
    for s in op.a.iter().chain(&op.b).chain(&op.c) {
        check(cx, warp, *s, u32::MAX);
    }
    let (input_a, input_b) = (input(kind.a), input(kind.b));
    // f16 C with f32 D and the reverse: the sum is formed in the wider type
    let acc = match (kind.c, kind.d) {
        (Ty::S32, _) => Accumulator::S32(kind.satfinite),
        (Ty::F16, Ty::F16) => Accumulator::F16,
        _ => Accumulator::F32,
    };
    let spec = Spec { a: input_a, b: input_b, acc, unit: Unit::Mma, numerics: cx.config.numerics };
    let [ta, tb, tc, td] = &mut cx.tiles;
    ta.resize(16 * k, 0);
    tb.resize(8 * k, 0);
    tc.resize(128, 0);
    td.resize(128, 0);
    Fragment::a(input_a.bits(), k).gather(|r| warp.get(kernel, op.a[r]), ta);
    Fragment::b(input_b.bits(), k).gather(|r| warp.get(kernel, op.b[r]), tb);
    let bits = |ty: Ty| if ty == Ty::F16 { 16 } else { 32 };
    Fragment::c(bits(kind.c), 8).gather(|r| warp.get(kernel, op.c[r]), tc);
    if kind.c == Ty::F16 && acc == Accumulator::F32 {
        for c in tc.iter_mut() {
            *c = crate::model::float::canonical_f32(crate::model::float::F16.decode(*c) as f32);
        }
    }
    mma::tile(&spec, 16, 8, k, ta, tb, tc, td, &mut cx.scratch);
    if kind.d == Ty::F16 && acc == Accumulator::F32 {
        use crate::model::float::{Cvt, F16, F32, Round, cvt};
        for d in td.iter_mut() {
            *d = cvt(F32, F16, *d, Cvt::new(Round::Nearest));
        }
    }
    if warp.spin.is_none() {
        cx.counters.mma_flops += 2 * 16 * 8 * k as u64;
    }
    let mut results: [(usize, Lanes); 4] = [(usize::MAX, [0; 32]); 4];
    Fragment::c(bits(kind.d), 8).scatter(td, |r, lanes: Lanes| results[r] = (r, lanes));
    for (r, lanes) in results.iter().filter(|r| r.0 != usize::MAX) {
        store(cx, warp, op.d[*r], lanes, u32::MAX);
    }
}
