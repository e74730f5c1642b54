//! mbarrier objects (PTX ISA 9.7.13.15).
//!
//! A phase is complete when no arrival is missing and the transaction count is zero. What arrives releases its clock into the
//! phase; whoever sees the phase complete acquires all of it.

use super::{Mbarrier, Waiting};
use crate::clock::{Clock, Tag};
use crate::exec::{Flow, addresses, check, clash_finding, lanes, store};
use crate::finding::Finding;
use crate::op::{Addr, Class, MbarKind, MbarOp, Space};
use crate::state::{Cluster, Cx, Party, Site, resolve, shared_target};

/// The largest transaction and arrival counts (9.7.13.15.2).
const MAX_COUNT: u64 = (1 << 20) - 1;

fn misuse(cx: &mut Cx<'_>, site: Site, lane: usize, text: String) {
    cx.report(site, Some(lane as u32), Finding::MbarrierMisuse, text);
}

/// Block and offset of an mbarrier at a lane's address; reports what is no place for one.
pub(super) fn locate(
    cx: &mut Cx<'_>,
    cl: &Cluster,
    w: usize,
    space: Space,
    address: u64,
    lane: usize,
) -> Option<(usize, usize)> {
    let warp = &cl.warps[w];
    let (found, at) = resolve(space, address);
    let target = if found == Space::SharedCluster { shared_target(at, warp.cta, cl.ctas.len()) } else { None };
    let target = target.filter(|t| t.1 + 8 <= cl.ctas[t.0].shared.data.len());
    if target.is_none() {
        let values = format!("mbarrier address {address:#x}");
        cx.report(warp.site(), Some(lane as u32), Finding::OutOfBounds, values);
        return None;
    }
    if !address.is_multiple_of(8) {
        let values = format!("mbarrier address {address:#x}");
        cx.report(warp.site(), Some(lane as u32), Finding::Misaligned, values);
        return None;
    }
    target
}

/// The initialised mbarrier there. With `proxy`, it will be used by the asynchronous proxy.
pub(super) fn lookup(
    cx: &mut Cx<'_>,
    cl: &Cluster,
    w: usize,
    place: (usize, usize),
    lane: usize,
    proxy: bool,
) -> Option<usize> {
    let warp = &cl.warps[w];
    let Some(index) = cl.ctas[place.0].hopper.find(place.1) else {
        misuse(cx, warp.site(), lane, format!("no mbarrier is initialised at {:#x}", place.1));
        return None;
    };
    let m = &cl.ctas[place.0].hopper.mbarriers[index];
    let by = cl.parties[m.init.component() as usize];
    if !warp.clock.covers(m.init) {
        let text = format!("the mbarrier at {:#x} was initialised by {by}, which is not ordered before this", place.1);
        misuse(cx, warp.site(), lane, text);
        return None;
    }
    if proxy && !warp.proxy_clock.covers(m.init) {
        let values = format!(
            "the mbarrier at {:#x} was initialised by {by} without fence.mbarrier_init or fence.proxy.async since",
            place.1
        );
        cx.report(warp.site(), Some(lane as u32), Finding::MissingProxyFence, values);
    }
    Some(index)
}

pub(crate) fn execute(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, op: &MbarOp, mask: u32) -> Flow {
    if mask == 0 {
        return Flow::Next;
    }
    let warp = &cl.warps[w];
    let site = warp.site();
    if op.kind == MbarKind::PendingCount {
        check(cx, warp, op.addr.base, mask);
        let out = warp.get(cx.kernel, op.addr.base).map(|state| state & MAX_COUNT);
        if let Some(d) = op.dst {
            store(cx, &mut cl.warps[w], d, &out, mask);
        }
        return Flow::Next;
    }
    let raw = addresses(cx, warp, op.addr, mask);
    let mut values = [0u64; 32];
    if let Some(v) = op.value {
        check(cx, warp, v, mask);
        values = *warp.get(cx.kernel, v);
    }
    if let MbarKind::Wait { parity, blocking } = op.kind {
        return wait(cx, cl, w, op, &raw, &values, mask, parity, blocking);
    }
    let mut out = [0u64; 32];
    for lane in lanes(mask) {
        let Some(place) = locate(cx, cl, w, op.addr.space, raw[lane], lane) else { return Flow::Hold };
        if op.kind == MbarKind::Init {
            init(cx, cl, w, place, values[lane], lane);
            if cx.dead {
                return Flow::Hold;
            }
            continue;
        }
        let Some(index) = lookup(cx, cl, w, place, lane, false) else { return Flow::Hold };
        let Cluster { warps, ctas, .. } = &mut *cl;
        let warp = &warps[w];
        let cta = &mut ctas[place.0];
        let m = &mut cta.hopper.mbarriers[index];
        let value = values[lane];
        match op.kind {
            MbarKind::Inval => {
                m.valid = false;
                cta.hopper.slots[place.1 / 8] = 0;
                cta.shared.forget(place.1, 8);
            }
            MbarKind::ExpectTx => {
                m.tx += value as i64;
                m.expected_at = Some(site);
            }
            MbarKind::CompleteTx => {
                m.tx -= value as i64;
                settle(cx, cl, place.0, index);
            }
            MbarKind::Arrive { expect, no_complete, drop } => {
                out[lane] = m.completed << 20 | m.missing as u64 & MAX_COUNT;
                if expect {
                    m.tx += value as i64;
                    m.expected_at = Some(site);
                }
                let n = if expect || op.value.is_none() { 1 } else { value as i64 };
                if drop {
                    m.count = m.count.saturating_sub(n as u32);
                }
                if !op.relaxed {
                    m.clock.join(&warp.clock);
                    m.proxy_clock.join(&warp.proxy_clock);
                }
                m.missing -= n;
                if n < 1 || m.missing < 0 {
                    let text = format!("{n} arrivals at {:#x}, {} were missing", place.1, m.missing + n);
                    misuse(cx, site, lane, text);
                } else if no_complete && m.missing == 0 && m.tx == 0 {
                    misuse(cx, site, lane, "`.noComplete` completes the phase".into());
                } else {
                    settle(cx, cl, place.0, index);
                }
            }
            _ => unreachable!("handled above"),
        }
        let m = &cl.ctas[place.0].hopper.mbarriers[index];
        if m.tx.unsigned_abs() > MAX_COUNT {
            let text = format!("a transaction count of {}", m.tx);
            misuse(cx, site, lane, text);
        }
        if cx.dead {
            return Flow::Hold;
        }
    }
    let warp = &mut cl.warps[w];
    if matches!(op.kind, MbarKind::Arrive { .. } | MbarKind::Init) {
        warp.tick();
    }
    if let Some(d) = op.dst {
        store(cx, warp, d, &out, mask);
    }
    Flow::Next
}

fn init(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, place: (usize, usize), count: u64, lane: usize) {
    let Cluster { warps, ctas, parties, .. } = cl;
    let warp = &warps[w];
    let (site, offset) = (warp.site(), place.1);
    let cta = &mut ctas[place.0];
    if !(1..=MAX_COUNT).contains(&count) {
        return misuse(cx, site, lane, format!("an arrival count of {count}"));
    }
    if place.0 != warp.cta {
        return misuse(cx, site, lane, "the mbarrier of another block is initialised".into());
    }
    if cta.hopper.find(offset).is_some() {
        return misuse(cx, site, lane, format!("the mbarrier at {offset:#x} is initialised already"));
    }
    if let Some((byte, clash)) = cta.shared.write(offset, 8, warp.tag(), &warp.clock, None) {
        let (finding, values) = clash_finding(parties, clash, byte, true);
        cx.report(site, Some(lane as u32), finding, values);
    }
    // An mbarrier made anew at the same place goes on with its component and counter.
    let known = cta.hopper.mbarriers.iter().position(|m| m.offset == offset as u32);
    let (component, counter) = match known {
        Some(i) => (cta.hopper.mbarriers[i].component, cta.hopper.mbarriers[i].counter),
        None => (parties.len() as u32, 0),
    };
    if known.is_none() {
        if parties.len() + 1 >= Tag::MAX_COMPONENTS {
            return misuse(cx, site, lane, "more mbarriers than the simulator can follow".into());
        }
        parties.push(Party::Mbarrier { cta: place.0 as u32, address: offset as u32 });
    }
    cta.shared.retag(offset, 8, warp.tag(), Tag::new(component, Tag::NEVER));
    let mbarrier = Mbarrier {
        offset: offset as u32,
        valid: true,
        count: count as u32,
        missing: count as i64,
        tx: 0,
        completed: 0,
        component,
        counter,
        init: warp.tag(),
        clock: Clock::default(),
        proxy_clock: Clock::default(),
        done_clock: Clock::default(),
        done_proxy_clock: Clock::default(),
        expected_at: None,
    };
    let index = known.unwrap_or(cta.hopper.mbarriers.len());
    if index == cta.hopper.mbarriers.len() {
        cta.hopper.mbarriers.push(mbarrier);
    } else {
        cta.hopper.mbarriers[index] = mbarrier;
    }
    cta.hopper.slots[offset / 8] = index as u16 + 1;
}

/// Completes the phase if nothing is missing, and wakes those who wait.
pub(super) fn settle(cx: &mut Cx<'_>, cl: &mut Cluster, cta: usize, index: usize) {
    let m = &mut cl.ctas[cta].hopper.mbarriers[index];
    if m.missing != 0 || m.tx != 0 {
        return;
    }
    m.completed += 1;
    m.counter += 1;
    m.missing = i64::from(m.count);
    m.done_clock = std::mem::take(&mut m.clock);
    m.done_proxy_clock = std::mem::take(&mut m.proxy_clock);
    m.done_clock.raise(m.component, m.counter);
    let (completed, offset) = (m.completed, m.offset);
    cl.hopper.idle_polls = 0;
    for warp in &mut cl.warps {
        let Some(wait) = &mut warp.hopper.waiting else { continue };
        if (wait.cta, wait.index) != (cta, index) {
            continue;
        }
        if wait.ready {
            let site = Site { block: warp.block, warp: warp.id, pc: wait.pc };
            let values = format!(
                "phase {} of the mbarrier at {offset:#x} was complete, and phase {} is too before the warp looked",
                wait.until - 1,
                completed - 1
            );
            warp.hopper.waiting = None;
            cx.report(site, None, Finding::PhaseLag, values);
        } else {
            wait.ready = completed >= wait.until;
        }
        warp.parked = 0;
    }
}

#[allow(clippy::too_many_arguments)]
fn wait(
    cx: &mut Cx<'_>,
    cl: &mut Cluster,
    w: usize,
    op: &MbarOp,
    raw: &[u64; 32],
    values: &[u64; 32],
    mask: u32,
    parity: bool,
    blocking: bool,
) -> Flow {
    let mut yes = 0;
    let site = cl.warps[w].site();
    for lane in lanes(mask) {
        let Some(place) = locate(cx, cl, w, op.addr.space, raw[lane], lane) else { return Flow::Hold };
        let Some(index) = lookup(cx, cl, w, place, lane, false) else { return Flow::Hold };
        let Cluster { warps, ctas, .. } = &mut *cl;
        let warp = &mut warps[w];
        let m = &ctas[place.0].hopper.mbarriers[index];
        let completed = m.completed;
        let seen = warp.hopper.seen.iter_mut().find(|s| (s.0, s.1) == (place.0, index));
        let done = if parity {
            // the phase of the other parity is current, so the one of this parity is complete
            completed & 1 != values[lane] & 1
        } else {
            completed > values[lane] >> 20
        };
        if done {
            yes |= 1 << lane;
            match seen {
                Some(s) => s.2 = completed,
                None => warp.hopper.seen.push((place.0, index, completed)),
            }
            if !op.relaxed {
                warp.clock.join(&m.done_clock);
                warp.meet_lanes(u32::MAX);
                warp.proxy_clock.join(&m.done_proxy_clock);
            }
            warp.hopper.waiting = None;
            continue;
        }
        // Parity p asks for the first phase of that parity after the last one seen; a first look for parity 0 means phase 0.
        let last = seen.map(|s| s.2);
        let wanted = values[lane] & 1;
        let asked = match last {
            Some(seen) => Some(seen + u64::from(seen & 1 != wanted)),
            None => (wanted == 0).then_some(0),
        };
        if let (true, Some(asked)) = (parity, asked)
            && completed >= asked + 2
        {
            let values = format!(
                "the mbarrier at {:#x} has completed {completed} phases, this warp has seen {} and asks for number {asked}",
                place.1,
                last.unwrap_or(0)
            );
            cx.report(site, Some(lane as u32), Finding::PhaseLag, values);
        }
        let until = if parity { completed + 1 } else { (values[lane] >> 20) + 1 };
        warp.hopper.waiting = Some(Waiting { cta: place.0, index, until, ready: false, pc: warp.pc });
    }
    if cl.ctas.len() > 1 && yes != 0 {
        let blocks: Vec<u32> = cl.ctas.iter().map(|c| c.linear).collect();
        let cta = cl.warps[w].cta;
        cl.ctas[cta].known.extend(blocks);
    }
    let d = op.dst.unwrap_or(0);
    if yes == mask {
        cl.warps[w].put_pred(d, u32::MAX, mask);
        return Flow::Next;
    }
    let warp = &mut cl.warps[w];
    if blocking && cx.rng.below(4) != 0 {
        // The thread sleeps until the mbarrier changes; the attempt is not counted.
        cx.uncount(Class::Sync, mask);
        for i in lanes(warp.active & !mask) {
            warp.pcs[i] = warp.pc + 1;
        }
        for i in lanes(mask) {
            warp.pcs[i] = warp.pc;
        }
        warp.parked |= mask;
        warp.active = 0;
        return Flow::Reselect;
    }
    // The time limit of try_wait, or test_wait: the loop around it is not counted.
    cx.uncount(Class::Sync, mask);
    warp.spin = Some((warp.pc, 8));
    warp.put_pred(d, yes, mask);
    super::idle_poll(cx, cl, site);
    Flow::Next
}

/// `cp.async.mbarrier.arrive`: the lanes arrive when their copies so far have landed.
pub(crate) fn later_arrive(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, addr: Addr, noinc: bool, mask: u32) {
    let raw = addresses(cx, &cl.warps[w], addr, mask);
    for lane in lanes(mask) {
        let Some(place) = locate(cx, cl, w, addr.space, raw[lane], lane) else { return };
        let Some(index) = lookup(cx, cl, w, place, lane, false) else { return };
        if !noinc {
            cl.ctas[place.0].hopper.mbarriers[index].missing += 1;
        }
        let warp = &mut cl.warps[w];
        let transfer = super::bulk::Transfer::copies(warp.site(), w, lane, warp.cp_seq[lane], (place.0, index));
        warp.cp_seq[lane] += 1;
        cl.hopper.transfers.push(transfer);
    }
}

/// Arrivals by copies: like an arrive whose release is the copies alone.
pub(super) fn arrive_copies(cx: &mut Cx<'_>, cl: &mut Cluster, site: Site, place: (usize, usize), what: (u32, u32)) {
    let m = &mut cl.ctas[place.0].hopper.mbarriers[place.1];
    m.clock.raise(what.0, what.1);
    m.missing -= 1;
    if m.missing < 0 {
        let text = format!("more arrivals at {:#x} than expected", m.offset);
        cx.report(site, None, Finding::MbarrierMisuse, text);
        return;
    }
    settle(cx, cl, place.0, place.1);
}
