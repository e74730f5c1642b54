//! wgmma (PTX ISA 9.7.15): each warp of the group computes its 16 rows.
//!
//! The result is computed at issue and the registers stay closed until the wait; operands in shared memory count as being read
//! until then, so that an overwrite in between is a finding whatever the schedule.

use crate::clock::Tag;
use crate::exec::{Flow, aligned, check, check_pred, clash_finding, input};
use crate::finding::Finding;
use crate::model::fragment::Fragment;
use crate::model::mma::{self, Accumulator, Spec, Unit};
use crate::model::smem::{Descriptor, Major};
use crate::op::{Instr, Lanes, Reg, Src, Wgmma, WgmmaA};
use crate::ptx::types::Ty;
use crate::state::{Cluster, Cx, Site, Warp};

/// `wgmma.fence`
pub(crate) fn fence(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr) -> Flow {
    let warp = &mut cl.warps[w];
    if let Err(flow) = aligned(cx, warp, instr) {
        return flow;
    }
    warp.hopper.fences += 1;
    warp.any_busy = true;
    Flow::Next
}

/// `wgmma.commit_group`
pub(crate) fn commit(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr) -> Flow {
    let warp = &mut cl.warps[w];
    if let Err(flow) = aligned(cx, warp, instr) {
        return flow;
    }
    let state = &mut warp.hopper;
    state.wgmma_groups.push_back(state.wgmma_seq);
    state.wgmma_seq += 1;
    Flow::Next
}

/// `wgmma.wait_group`
pub(crate) fn wait(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr, groups: u32) -> Flow {
    let warp = &mut cl.warps[w];
    if let Err(flow) = aligned(cx, warp, instr) {
        return flow;
    }
    let mut reached = 0;
    while warp.hopper.wgmma_groups.len() > groups as usize {
        reached = warp.hopper.wgmma_groups.pop_front().unwrap_or(0);
    }
    if reached == 0 {
        return Flow::Next;
    }
    let component = warp.component + 2;
    warp.clock.raise(component, reached);
    while warp.hopper.wgmma_regs.front().is_some_and(|r| r.0 <= reached) {
        let Some((seq, regs)) = warp.hopper.wgmma_regs.pop_front() else { break };
        for d in regs {
            if warp.busy[d as usize] == seq {
                warp.busy[d as usize] = 0;
                warp.init[d as usize] = u32::MAX;
            }
        }
    }
    Flow::Next
}

/// Marks a register as owned by the group `seq`.
fn own(warp: &mut Warp, d: Reg, seq: u32) {
    warp.busy[d as usize] = seq;
    warp.init[d as usize] = 0;
}

/// Was a register written since the last fence?
fn unfenced(cx: &mut Cx<'_>, warp: &Warp, reg: Reg, role: &str) -> bool {
    if warp.hopper.written[reg as usize] <= warp.hopper.fences && warp.hopper.fences > 0 {
        return false;
    }
    let name = &cx.kernel.reg_names[reg as usize];
    let values = format!("{role} register `{name}` was written since the last wgmma.fence");
    cx.report(warp.site(), None, Finding::MissingWgmmaFence, values);
    true
}

/// `wgmma.mma_async`
pub(crate) fn issue(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr, op: &Wgmma) -> Flow {
    let kernel = cx.kernel;
    let warp = &mut cl.warps[w];
    let mask = match aligned(cx, warp, instr) {
        Ok(mask) => mask,
        Err(flow) => return flow,
    };
    let site = warp.site();
    if mask != u32::MAX || !cl.ctas[warp.cta].num_warps.is_multiple_of(4) {
        let values = format!("wgmma needs whole warpgroups; lanes {mask:#010x}");
        cx.report(site, None, Finding::DivergentCollective, values);
        return Flow::Hold;
    }
    let (n, k) = (usize::from(op.n), usize::from(op.k));
    let seq = warp.hopper.wgmma_seq;
    let tag = Tag::new(warp.component + 2, seq);
    let (ia, ib) = (input(op.a_ty), input(op.b_ty));
    let acc = match op.d_ty {
        Ty::S32 => Accumulator::S32(op.satfinite),
        Ty::F16 => Accumulator::F16,
        _ => Accumulator::F32,
    };
    let add = match op.scale_d {
        Ok(p) => {
            check_pred(cx, warp, p, mask);
            warp.pred(p) & 1 != 0
        }
        Err(constant) => constant,
    };
    // Accumulators: closed ones may only belong to a wgmma (of the same shape); others need a fence since they were written.
    for &d in &op.d {
        if warp.busy[d as usize] == 0 {
            if add {
                check(cx, warp, Src(d), mask);
            }
            if unfenced(cx, warp, d, "accumulator") {
                break;
            }
        }
    }
    let acc_bits = if op.d_ty == Ty::F16 { 16 } else { 32 };
    let mut tiles = std::mem::take(&mut cx.tiles);
    let [ta, tb, tc, td] = &mut tiles;
    ta.resize(16 * k, 0);
    tb.resize(n * k, 0);
    tc.resize(16 * n, 0);
    td.resize(16 * n, 0);
    // A
    let rows = (16 * (warp.id % 4)) as usize;
    match &op.a {
        WgmmaA::Regs(regs) => {
            for r in regs {
                if r.0 & Src::CONST != 0 {
                    continue;
                }
                if warp.busy[r.0 as usize] == 0 {
                    check(cx, warp, *r, mask);
                    unfenced(cx, warp, r.0, "A");
                }
            }
            Fragment::a(ia.bits(), k).gather(|r| warp.get(kernel, regs[r]), ta);
        }
        WgmmaA::Descriptor(d) => {
            let Some(desc) = descriptor(cx, warp, *d, op.mn_major[0]) else { return Flow::Hold };
            read(cx, cl, w, desc, op.mn_major[0], rows, 16, k, tag, ta);
        }
    }
    if cx.dead {
        return Flow::Hold;
    }
    let warp = &mut cl.warps[w];
    let Some(desc) = descriptor(cx, warp, op.b, op.mn_major[1]) else { return Flow::Hold };
    read(cx, cl, w, desc, op.mn_major[1], 0, n, k, tag, tb);
    if cx.dead {
        return Flow::Hold;
    }
    for (negate, tile, input) in [(op.negate[0], &mut *ta, ia), (op.negate[1], &mut *tb, ib)] {
        if negate {
            let sign = 1u32 << (input.bits() - 1);
            tile.iter_mut().for_each(|v| *v ^= sign);
        }
    }
    let warp = &mut cl.warps[w];
    if add {
        Fragment::c(acc_bits, n).gather(|r| &warp.regs[op.d[r] as usize], tc);
    } else {
        tc.fill(0);
    }
    let spec = Spec { a: ia, b: ib, acc, unit: Unit::Wgmma, numerics: cx.config.numerics };
    mma::tile(&spec, 16, n, k, ta, tb, tc, td, &mut cx.scratch);
    Fragment::c(acc_bits, n).scatter(td, |r, lanes: Lanes| warp.regs[op.d[r] as usize] = lanes);
    cx.tiles = tiles;
    let mut regs = op.d.clone();
    for &d in &op.d {
        own(warp, d, seq);
    }
    if let WgmmaA::Regs(a) = &op.a {
        for r in a.iter().filter(|r| r.0 & Src::CONST == 0) {
            own(warp, r.0, seq);
            regs.push(r.0);
        }
    }
    warp.hopper.wgmma_regs.push_back((seq, regs));
    if warp.spin.is_none() {
        cx.counters.mma_flops += (2 * 16 * n * k) as u64;
    }
    Flow::Next
}

/// The descriptor in a register, the same in every lane.
fn descriptor(cx: &mut Cx<'_>, warp: &Warp, src: Src, mn_major: bool) -> Option<Descriptor> {
    check(cx, warp, src, u32::MAX);
    let lanes = warp.get(cx.kernel, src);
    let bits = lanes[0];
    let site = warp.site();
    if let Some(lane) = (0..32).find(|&i| lanes[i] != bits) {
        let text = format!("the descriptor differs between lanes: {bits:#x}, {:#x}", lanes[lane]);
        cx.report(site, Some(lane as u32), Finding::BadDescriptor, text);
        return None;
    }
    let descriptor = Descriptor::decode(bits);
    if descriptor.is_none() {
        let text = format!("descriptor {bits:#x} has a reserved bit (major {})", if mn_major { "MN" } else { "K" });
        cx.report(site, None, Finding::BadDescriptor, text);
    }
    descriptor
}

/// Reads `count` rows from `first` on of an operand in shared memory as a dense tile.
#[allow(clippy::too_many_arguments)]
fn read(
    cx: &mut Cx<'_>,
    cl: &mut Cluster,
    w: usize,
    desc: Descriptor,
    mn_major: bool,
    first: usize,
    count: usize,
    k: usize,
    tag: Tag,
    out: &mut [u32],
) {
    let Cluster { warps, ctas, parties, .. } = cl;
    let warp = &warps[w];
    let site: Site = warp.site();
    let shared = &mut ctas[warp.cta].shared;
    let generic = |c: u32| parties[c as usize].is_generic();
    let mut chunk = |address: u32| -> [u8; 16] {
        let at = address as usize;
        if at + 16 > shared.data.len() {
            let values = format!("the descriptor leads to {at:#x}, shared memory has {} bytes", shared.data.len());
            cx.report(site, None, Finding::OutOfBounds, values);
            return [0; 16];
        }
        let fenced = Some((&warp.proxy_clock, &generic as &dyn Fn(u32) -> bool));
        if let Some((byte, clash)) = shared.read(at, 16, tag, &warp.clock, false, fenced) {
            let (finding, values) = clash_finding(parties, clash, byte, false);
            cx.report(site, None, finding, values);
        }
        shared.data[at..at + 16].try_into().unwrap_or([0; 16])
    };
    let bytes = 32 / k;
    if !mn_major {
        // rows are counted in groups of 8, one stride apart
        let desc = Descriptor { start: desc.start + (first / 8) as u32 * desc.stride, ..desc };
        desc.gather(Major::K, count, bytes, &mut chunk, out);
        return;
    }
    for r in (0..count).step_by(8) {
        for col in 0..k {
            let data = chunk(desc.chunk_mn_major((first + r) as u32, col as u32));
            for i in 0..8 {
                out[(r + i) * k + col] = u32::from(u16::from_le_bytes([data[2 * i], data[2 * i + 1]]));
            }
        }
    }
}
