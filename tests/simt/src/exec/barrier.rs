//! Barriers of the block and of the cluster (PTX ISA 9.7.13.1, 9.7.13.3).

use super::{Flow, aligned, check, check_pred, store};
use crate::finding::Finding;
use crate::op::{BarOp, Instr, Op};
use crate::state::{Bar, Cluster, Cx, Hold};

/// `bar.sync`, `bar.arrive`, `bar.red`.
pub(super) fn block(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr) -> Flow {
    let Op::Bar { op, id, count, input, d } = &instr.op else { unreachable!("a barrier") };
    let kernel = cx.kernel;
    let warp = &mut cl.warps[w];
    let mask = match aligned(cx, warp, instr) {
        Ok(mask) => mask,
        Err(flow) => return flow,
    };
    let first = mask.trailing_zeros() as usize;
    let site = warp.site();
    let misuse = |cx: &mut Cx<'_>, text: String| cx.report(site, None, Finding::BarrierMisuse, text);
    check(cx, warp, *id, mask);
    let ids = *warp.get(kernel, *id);
    let number = ids[first];
    if (0..32).any(|i| mask >> i & 1 != 0 && ids[i] != number) || number > 15 {
        misuse(cx, format!("the barrier number {number} differs between lanes or is not in 0..16"));
        return Flow::Hold;
    }
    let cta = &mut cl.ctas[warp.cta];
    let whole = 32 * cta.num_warps as u32;
    let expected = match count {
        None => whole,
        Some(count) => {
            check(cx, warp, *count, mask);
            let counts = warp.get(kernel, *count);
            let n = counts[first] as u32;
            if (0..32).any(|i| mask >> i & 1 != 0 && counts[i] as u32 != n)
                || n == 0
                || !n.is_multiple_of(32)
                || n > whole
            {
                misuse(cx, format!("a count of {n} threads in a block of {whole}"));
                return Flow::Hold;
            }
            n
        }
    };
    let bar = &mut cta.bars[number as usize];
    if bar.arrived > 0 && bar.expected != expected {
        let text = format!("barrier {number} expects {} threads, this warp says {expected}", bar.expected);
        misuse(cx, text);
        return Flow::Hold;
    }
    if bar.arrived_warps >> warp.id & 1 != 0 {
        misuse(cx, format!("warp {} arrives at barrier {number} twice in one phase", warp.id));
        return Flow::Hold;
    }
    cx.counters.barriers += 1;
    if bar.arrived == 0 {
        bar.all = true;
        bar.any = false;
        bar.count = 0;
    }
    if let Some(p) = input {
        check_pred(cx, warp, *p, mask);
        let bits = warp.pred(*p) & mask;
        bar.all &= bits == mask;
        bar.any |= bits != 0;
        bar.count += bits.count_ones();
        bar.reduces = true;
    }
    bar.expected = expected;
    bar.arrived += 32;
    bar.arrived_warps |= 1 << warp.id;
    bar.clock.join(&warp.clock);
    bar.proxy_clock.join(&warp.proxy_clock);
    warp.tick();
    let waits = *op != BarOp::Arrive;
    if waits {
        bar.waiting.push(w);
        warp.hold = Hold::Barrier(number as u8);
    }
    if bar.arrived == bar.expected {
        release(cx, cl, w, number as usize);
    }
    let warp = &mut cl.warps[w];
    if waits && warp.hold != Hold::None {
        warp.pc += 1;
        // The result of a reduction is stored when the barrier opens.
        let _ = d;
        return Flow::Hold;
    }
    Flow::Next
}

/// Opens barrier `number` of the block of warp `w`.
fn release(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, number: usize) {
    let cta = cl.warps[w].cta;
    let bar = std::mem::take(&mut cl.ctas[cta].bars[number]);
    for &other in &bar.waiting {
        let warp = &mut cl.warps[other];
        warp.hold = Hold::None;
        warp.clock.join(&bar.clock);
        warp.meet_lanes(u32::MAX);
        warp.proxy_clock.join(&bar.proxy_clock);
        if bar.reduces {
            // The warp stands behind its barrier, except the one that opens it.
            let pc = if other == w { warp.pc } else { warp.pc - 1 };
            reduce(cx, warp, pc, &bar);
        }
    }
}

fn reduce(cx: &mut Cx<'_>, warp: &mut crate::state::Warp, pc: u32, bar: &Bar) {
    let Op::Bar { op, d, .. } = cx.kernel.code[pc as usize].op else { return };
    let mask = warp.live;
    match op {
        BarOp::RedAnd => warp.put_pred(d, if bar.all { u32::MAX } else { 0 }, mask),
        BarOp::RedOr => warp.put_pred(d, if bar.any { u32::MAX } else { 0 }, mask),
        BarOp::RedPopc => store(cx, warp, d, &[u64::from(bar.count); 32], mask),
        BarOp::Sync | BarOp::Arrive => {}
    }
}

/// `barrier.cluster.arrive`
pub(super) fn cluster_arrive(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr, release: bool) -> Flow {
    let warp = &mut cl.warps[w];
    if let Err(flow) = aligned(cx, warp, instr) {
        return flow;
    }
    let bar = &mut cl.hopper.barrier;
    if warp.hopper.cluster_arrived {
        let text = "`barrier.cluster.arrive` twice without a wait".to_string();
        cx.report(warp.site(), None, Finding::BarrierMisuse, text);
        return Flow::Hold;
    }
    cx.counters.barriers += 1;
    warp.hopper.cluster_arrived = true;
    warp.hopper.cluster_phase = bar.phase;
    bar.arrived += 1;
    if release {
        bar.clock.join(&warp.clock);
        bar.proxy_clock.join(&warp.proxy_clock);
        warp.tick();
    } else if let Some(clock) = &warp.fence_clock {
        bar.clock.join(clock);
        bar.proxy_clock.join(&warp.proxy_clock);
    }
    open_cluster(cl);
    Flow::Next
}

/// Opens the cluster barrier when every warp that runs has arrived (exited warps count as arrived, 9.7.13.3).
fn open_cluster(cl: &mut Cluster) {
    let exited = cl.warps.iter().filter(|w| w.hold == Hold::Exited && !w.hopper.cluster_arrived).count();
    let bar = &mut cl.hopper.barrier;
    if bar.arrived == 0 || bar.arrived + exited < cl.warps.len() {
        return;
    }
    bar.arrived = 0;
    bar.phase += 1;
    bar.done_clock = std::mem::take(&mut bar.clock);
    bar.done_proxy_clock = std::mem::take(&mut bar.proxy_clock);
    for warp in &mut cl.warps {
        if warp.hold == Hold::Cluster {
            warp.hold = Hold::None;
            warp.clock.join(&cl.hopper.barrier.done_clock);
            warp.meet_lanes(u32::MAX);
            warp.proxy_clock.join(&cl.hopper.barrier.done_proxy_clock);
            warp.hopper.cluster_arrived = false;
        }
    }
    let blocks: Vec<u32> = cl.ctas.iter().map(|c| c.linear).collect();
    for cta in &mut cl.ctas {
        cta.known.extend(&blocks);
    }
}

/// `barrier.cluster.wait`
pub(super) fn cluster_wait(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr) -> Flow {
    let warp = &mut cl.warps[w];
    if let Err(flow) = aligned(cx, warp, instr) {
        return flow;
    }
    if !warp.hopper.cluster_arrived {
        let text = "`barrier.cluster.wait` without an arrive".to_string();
        cx.report(warp.site(), None, Finding::BarrierMisuse, text);
        return Flow::Hold;
    }
    if warp.hopper.cluster_phase < cl.hopper.barrier.phase {
        warp.hopper.cluster_arrived = false;
        warp.clock.join(&cl.hopper.barrier.done_clock);
        warp.meet_lanes(u32::MAX);
        warp.proxy_clock.join(&cl.hopper.barrier.done_proxy_clock);
        return Flow::Next;
    }
    warp.hold = Hold::Cluster;
    warp.pc += 1;
    Flow::Hold
}

/// A warp has ended: the cluster barrier counts it as arrived.
pub(super) fn warp_exited(_cx: &mut Cx<'_>, cl: &mut Cluster, _w: usize) {
    open_cluster(cl);
}
