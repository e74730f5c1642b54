//! `cp.async` and its groups (PTX ISA 9.7.9.25.3).
//!
//! A copy reads its source when it is issued and lands at once or, as late as legal, at the wait that covers it: a coin decides.
//! Its bytes belong to the copy until the wait, whichever way the coin fell.

use super::check;
use super::memory::{self, clash_finding};
use crate::clock::Tag;
use crate::finding::Finding;
use crate::op::Op;
use crate::state::{Cluster, Cx, PendingCopy, Warp};

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |i| mask >> i & 1 != 0)
}

pub(super) fn issue(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, op: &Op, mask: u32) {
    let Op::CpAsync { dst, src, bytes, src_bytes, ignore } = op else { unreachable!("a cp.async") };
    if mask == 0 {
        return;
    }
    let kernel = cx.kernel;
    let Cluster { warps, ctas, parties, global, .. } = cl;
    let warp = &mut warps[w];
    let cta = &mut ctas[warp.cta];
    let site = warp.site();
    let n = usize::from(*bytes);
    let targets = memory::addresses(cx, warp, *dst, mask);
    let sources = memory::addresses(cx, warp, *src, mask);
    let mut amounts = [n; 32];
    if let Some(s) = src_bytes {
        check(cx, warp, *s, mask);
        let s = warp.get(kernel, *s);
        for i in lanes(mask) {
            amounts[i] = s[i] as u32 as usize;
            if amounts[i] > n {
                let values = format!("src-size {} is larger than {n}", amounts[i]);
                cx.report(site, Some(i as u32), Finding::OutOfBounds, values);
                return;
            }
        }
    }
    if let Some(p) = ignore {
        let skip = warp.pred(*p);
        for i in lanes(mask & skip) {
            amounts[i] = 0;
        }
    }
    let mut copy =
        PendingCopy { mask, bytes: *bytes, group: warp.cp_commits, seq: warp.cp_seq, dst: [0; 32], data: None };
    let mut data = Box::new([0u8; 512]);
    let reads = lanes(mask).filter(|&i| amounts[i] > 0).fold(0, |m, i| m | 1 << i);
    if warp.spin.is_none() {
        cx.counters.global(&sources, reads, u32::from(*bytes));
        cx.counters.shared(&targets, mask, u32::from(*bytes));
    }
    for i in lanes(mask) {
        let at = targets[i] as usize;
        let tag = Tag::new(warp.component + 1, warp.cp_seq[i]);
        if !memory::shared_bounds(cx, site, i, targets[i], n, cta.shared.data.len()) {
            return;
        }
        if amounts[i] > 0 {
            if !sources[i].is_multiple_of(n as u64) {
                let values = format!("global address {:#x}, copy of {n} bytes", sources[i]);
                cx.report(site, Some(i as u32), Finding::Misaligned, values);
                return;
            }
            let out = &mut data[16 * i..16 * i + amounts[i]];
            let result = cx.global.read(sources[i], out, cta.linear, false, false, |b| cta.known.contains(&b));
            if let Err(fault) = result {
                memory::global_fault(cx, site, i, sources[i], amounts[i], fault);
                if cx.dead {
                    return;
                }
            } else if let Some(clash) = global.read(sources[i], amounts[i], tag, &warp.clock, false) {
                memory::global_race(cx, site, parties, i, sources[i], clash, "read");
            }
        }
        if let Some((byte, clash)) = cta.shared.write(at, n, tag, &warp.clock, None) {
            let (finding, values) = clash_finding(parties, clash, byte, true);
            cx.report(site, Some(i as u32), finding, values);
        }
        copy.dst[i] = at as u32;
    }
    if cx.rng.next() & 1 == 0 {
        write(&mut cta.shared.data, &copy, &data, mask);
    } else {
        copy.data = Some(data);
    }
    warp.cp_pending.push_back(copy);
}

/// Lands the copies of a lane up to counter `seq`; what waits for them learns of it through an mbarrier.
pub(crate) fn land(cl: &mut Cluster, w: usize, lane: usize, seq: u32) {
    let (warp, cta, _) = memory::parts(cl, w);
    for copy in warp.cp_pending.iter_mut().filter(|c| c.mask >> lane & 1 != 0 && c.seq[lane] <= seq) {
        if let Some(data) = &copy.data {
            write(&mut cta.shared.data, copy, data, 1 << lane);
        }
        copy.mask &= !(1 << lane);
    }
    warp.cp_pending.retain(|c| c.mask != 0);
}

fn write(shared: &mut [u8], copy: &PendingCopy, data: &[u8; 512], mask: u32) {
    let n = usize::from(copy.bytes);
    for i in lanes(mask) {
        let at = copy.dst[i] as usize;
        shared[at..at + n].copy_from_slice(&data[16 * i..16 * i + n]);
    }
}

pub(super) fn commit(warp: &mut Warp, mask: u32) {
    for i in lanes(mask) {
        warp.cp_commits[i] += 1;
        warp.cp_seq[i] += 1;
    }
}

/// Waits until at most `pending` committed groups of each lane are open; `None` waits for everything.
pub(super) fn wait(cl: &mut Cluster, w: usize, pending: Option<u32>, mask: u32) {
    let commits = cl.warps[w].cp_commits;
    complete(cl, w, mask, |lane, copy| match pending {
        None => true,
        Some(n) => copy.group[lane] + n < commits[lane],
    });
}

/// Lands the copies of `mask` for which `done` holds and makes them visible to the warp.
pub(crate) fn complete(cl: &mut Cluster, w: usize, mask: u32, done: impl Fn(usize, &PendingCopy) -> bool) {
    let (warp, cta, _) = memory::parts(cl, w);
    if warp.cp_pending.is_empty() {
        return;
    }
    let mut landed = vec![];
    for copy in &mut warp.cp_pending {
        let ready = lanes(mask & copy.mask).filter(|&i| done(i, copy)).fold(0, |m, i| m | 1 << i);
        if let Some(data) = &copy.data {
            write(&mut cta.shared.data, copy, data, ready);
        }
        landed.extend(lanes(ready).map(|i| (copy.dst[i] as usize, usize::from(copy.bytes), copy.seq[i])));
        copy.mask &= !ready;
    }
    warp.cp_pending.retain(|c| c.mask != 0);
    // What every remaining copy comes after is visible.
    let open = warp.cp_pending.iter().flat_map(|c| lanes(c.mask).map(|i| c.seq[i])).min();
    let reached = match open {
        Some(seq) => seq - 1,
        None => warp.cp_seq.iter().copied().max().unwrap_or(0),
    };
    warp.clock.raise(warp.component + 1, reached);
    // Groups are per thread: where other lanes still wait, what this lane waited for counts as written by it now.
    for (at, n, seq) in landed.into_iter().filter(|l| l.2 > reached) {
        cta.shared.retag(at, n, Tag::new(warp.component + 1, seq), warp.tag());
    }
    if open.is_none() {
        // New copies get a counter that is not covered yet.
        warp.cp_seq = [reached + 1; 32];
    }
}
