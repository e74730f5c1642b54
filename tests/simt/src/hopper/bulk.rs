//! Bulk and tensor copies (PTX ISA 9.7.9.25.4, 9.7.9.25.5), `st.async`, and the arrivals of `cp.async`.

use super::mbarrier::{arrive_copies, locate, lookup, settle};
use crate::clock::Tag;
use crate::exec::{self, addresses, apply, check, clash_finding, global_fault, lanes};
use crate::finding::Finding;
use crate::global::GlobalFault;
use crate::model::tensor_map::{ElementType, Run, TensorMap};
use crate::op::{Addr, AtomOp, AtomType, BulkKind, BulkOp, Space, Src};
use crate::state::{Cluster, Cx, Site, resolve, shared_target};
use crate::window;

/// An operation of the asynchronous engine.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub id: u64,
    pub site: Site,
    pub warp: usize,
    pub kind: Kind,
}

type Reduction = (AtomOp, AtomType, u8);

#[derive(Debug)]
pub(crate) enum Kind {
    /// Global to shared memory of some blocks, with the mbarrier of each.
    Load { dests: Vec<(usize, usize)>, runs: Vec<Run>, fill: u8, bytes: u32 },
    /// Shared to global memory; `data` once the source has been read.
    Store { cta: usize, runs: Vec<Run>, reduce: Option<Reduction>, data: Option<Vec<u8>> },
    /// Bytes on their way to another block.
    Data { cta: usize, mbarrier: usize, offset: usize, bytes: Vec<u8> },
    /// The `cp.async` of a lane up to a counter, which then arrives.
    Copies { lane: usize, seq: u32, place: (usize, usize) },
}

impl Transfer {
    /// Does its end signal an mbarrier?
    pub(crate) fn signals(&self) -> bool {
        !matches!(self.kind, Kind::Store { .. })
    }

    pub(super) fn copies(site: Site, warp: usize, lane: usize, seq: u32, place: (usize, usize)) -> Transfer {
        Transfer { id: 0, site, warp, kind: Kind::Copies { lane, seq, place } }
    }
}

fn bad(cx: &mut Cx<'_>, site: Site, lane: usize, text: String) {
    cx.report(site, Some(lane as u32), Finding::BadDescriptor, text);
}

/// The tensor map at a generic address.
fn read_map(cx: &mut Cx<'_>, cl: &Cluster, w: usize, address: u64, lane: usize) -> Option<TensorMap> {
    let warp = &cl.warps[w];
    let site = warp.site();
    if !address.is_multiple_of(64) {
        let values = format!("tensor map at {address:#x}, which is not a multiple of 64");
        cx.report(site, Some(lane as u32), Finding::Misaligned, values);
        return None;
    }
    let mut bytes = [0u8; 128];
    match resolve(Space::Generic, address) {
        (Space::Param, at) => {
            let at = (at - window::PARAM) as usize;
            match cx.params.get(at..at + 128) {
                Some(found) => bytes.copy_from_slice(found),
                None => {
                    let values = format!("tensor map at {address:#x}, parameters have {} bytes", cx.params.len());
                    cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
                    return None;
                }
            }
        }
        (Space::Global, at) => {
            let cta = &cl.ctas[warp.cta];
            for (i, chunk) in bytes.chunks_mut(16).enumerate() {
                let at = at + 16 * i as u64;
                let known = |b| cta.known.contains(&b);
                if let Err(fault) = cx.global.read(at, chunk, cta.linear, false, false, known) {
                    global_fault(cx, site, lane, at, 16, fault);
                    return None;
                }
            }
        }
        _ => {
            bad(cx, site, lane, format!("a tensor map cannot be at {address:#x}"));
            return None;
        }
    }
    let map = TensorMap::from_bytes(&bytes);
    if map.is_none() {
        bad(cx, site, lane, format!("no tensor map at {address:#x}"));
    }
    map
}

/// Bulk copies go in pieces of 16 bytes.
fn pieces(shared: u32, global: u64, bytes: u32) -> Vec<Run> {
    (0..bytes / 16)
        .map(|i| Run { shared: shared + 16 * i, len: 16, global: Some(global + 16 * u64::from(i)) })
        .collect()
}

/// The reduction of a tensor copy takes its type from the map.
fn element_type(element: ElementType) -> (AtomType, u8) {
    let bytes = element.bytes() as u8;
    let ty = match element {
        ElementType::F32 => AtomType::F32,
        ElementType::F16 => AtomType::F16,
        ElementType::Bf16 => AtomType::Bf16,
        ElementType::S32 | ElementType::S64 => AtomType::Signed,
        _ => AtomType::Unsigned,
    };
    (ty, bytes)
}

/// Issues a bulk or tensor copy.
pub(crate) fn issue(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, op: &BulkOp, mask: u32) {
    if mask == 0 {
        return;
    }
    let kernel = cx.kernel;
    let warp = &cl.warps[w];
    let others = addresses(cx, warp, op.other, mask);
    let shared = op.shared.map(|s| addresses(cx, warp, s, mask));
    let mbars = op.mbar.map(|m| addresses(cx, warp, m, mask));
    let mut operands: Vec<Src> = op.coords.clone().unwrap_or_default();
    operands.extend(op.size);
    operands.extend(op.multicast);
    for s in operands {
        check(cx, warp, s, mask);
    }
    for lane in lanes(mask) {
        let at = |s: Src| cl.warps[w].get(kernel, s)[lane];
        let size = op.size.map(|s| at(s) as u32);
        let coords: Option<Vec<i32>> = op.coords.as_ref().map(|c| c.iter().map(|s| at(*s) as i32).collect());
        let multicast = op.multicast.map(|s| at(s) as u32);
        let shared = shared.as_ref().map(|s| s[lane]);
        let mbar = mbars.as_ref().map(|m| m[lane]);
        one(cx, cl, w, op, lane, others[lane], shared, mbar, size, coords, multicast);
        if cx.dead {
            return;
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn one(
    cx: &mut Cx<'_>,
    cl: &mut Cluster,
    w: usize,
    op: &BulkOp,
    lane: usize,
    other: u64,
    shared: Option<u64>,
    mbar: Option<u64>,
    size: Option<u32>,
    coords: Option<Vec<i32>>,
    multicast: Option<u32>,
) {
    let site = cl.warps[w].site();
    let own = cl.warps[w].cta;
    let map = match &coords {
        Some(coords) => {
            let Some(map) = read_map(cx, cl, w, other, lane) else { return };
            if coords.len() != map.rank() {
                let text = format!("{} coordinates for a map of rank {}", coords.len(), map.rank());
                return bad(cx, site, lane, text);
            }
            Some(map)
        }
        None => None,
    };
    if op.kind == BulkKind::Prefetch {
        return;
    }
    let bytes = map.as_ref().map_or(size.unwrap_or(0), TensorMap::box_bytes);
    // The shared side.
    let Some(address) = shared else { return };
    let place = shared_target(resolve(Space::SharedCluster, address).1, own, cl.ctas.len());
    let align = if map.is_some() { 128 } else { 16 };
    let pitch =
        map.as_ref().map_or(bytes, |m| m.shared_pitch() * (m.box_bytes() / (m.box_dims[0] * m.element.bytes())));
    let Some((target, offset)) = place.filter(|p| p.1 + pitch as usize <= cl.ctas[p.0].shared.data.len()) else {
        let values = format!("shared address {address:#x}, {pitch} bytes");
        cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
        return;
    };
    let global_bad = map.is_none() && op.kind != BulkKind::Peer && !other.is_multiple_of(16);
    if offset % align != 0 || global_bad || !bytes.is_multiple_of(16) {
        let values = format!("shared {offset:#x} (multiple of {align}), global {other:#x}, {bytes} bytes");
        cx.report(site, Some(lane as u32), Finding::Misaligned, values);
        return;
    }
    let runs = match (&map, coords) {
        (Some(map), Some(coords)) => {
            let mut runs = vec![];
            map.for_each_run(&coords, offset as u32, |run| runs.push(run));
            runs
        }
        _ => pieces(offset as u32, other, bytes),
    };
    if cl.warps[w].spin.is_none() {
        cx.counters.tma_bytes += u64::from(bytes) * u64::from(multicast.map_or(1, u32::count_ones));
    }
    let id = cl.hopper.next_id;
    cl.hopper.next_id += 1;
    let kind = match op.kind {
        BulkKind::Load => {
            let Some(signal) = mbar.and_then(|m| locate(cx, cl, w, Space::SharedCluster, m, lane)) else { return };
            if signal.0 != target {
                return bad(cx, site, lane, "the mbarrier is not in the block of the destination".into());
            }
            let targets: Vec<usize> = match multicast {
                Some(mask) => lanes(mask).collect(),
                None => vec![target],
            };
            let mut dests = vec![];
            for cta in targets {
                if cta >= cl.ctas.len() {
                    let values = format!("multicast to block {cta} of a cluster of {}", cl.ctas.len());
                    cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
                    return;
                }
                let Some(index) = lookup(cx, cl, w, (cta, signal.1), lane, true) else { return };
                dests.push((cta, index));
                claim(cx, cl, w, lane, cta, index, &runs);
            }
            Kind::Load { dests, runs, fill: map.map_or(0, |m| m.fill_byte()), bytes }
        }
        BulkKind::Store | BulkKind::Reduce(..) => {
            if target != own {
                return bad(cx, site, lane, "the source is in another block".into());
            }
            read_source(cx, cl, w, lane, &runs);
            let record = super::BulkRecord {
                id,
                lane,
                group: cl.warps[w].hopper.bulk_commits[lane],
                seq: cl.warps[w].hopper.bulk_seq,
                read: false,
            };
            cl.warps[w].hopper.bulks.push(record);
            let reduce = match (op.kind, map) {
                (BulkKind::Reduce(op, ..), Some(map)) => {
                    let (ty, bytes) = element_type(map.element);
                    Some((op, ty, bytes))
                }
                (BulkKind::Reduce(op, ty, bytes), None) => Some((op, ty, bytes)),
                _ => None,
            };
            Kind::Store { cta: own, runs, reduce, data: None }
        }
        BulkKind::Peer => {
            let Some((_, from)) = shared_target(other & 0xffff_ffff, own, cl.ctas.len()).filter(|p| {
                p.0 == own && p.1 + bytes as usize <= cl.ctas[own].shared.data.len() && p.1.is_multiple_of(16)
            }) else {
                let values = format!("source address {other:#x}, {bytes} bytes");
                cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
                return;
            };
            read_source(cx, cl, w, lane, &pieces(from as u32, 0, bytes));
            let data = cl.ctas[own].shared.data[from..from + bytes as usize].to_vec();
            let Some(kind) = send(cx, cl, w, lane, (target, offset), mbar, data) else { return };
            kind
        }
        BulkKind::Prefetch => return,
    };
    cl.hopper.transfers.push(Transfer { id, site, warp: w, kind });
}

/// The destination bytes belong to the transfer from now on.
fn claim(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, lane: usize, cta: usize, index: usize, runs: &[Run]) {
    let Cluster { warps, ctas, parties, .. } = cl;
    let warp = &warps[w];
    let block = &mut ctas[cta];
    let tag = Tag::new(block.hopper.mbarriers[index].component, Tag::NEVER);
    let generic = |c: u32| parties[c as usize].is_generic();
    for run in runs {
        let fenced = Some((&warp.proxy_clock, &generic as &dyn Fn(u32) -> bool));
        let clash = block.shared.write(run.shared as usize, run.len as usize, tag, &warp.clock, fenced);
        if let Some((byte, clash)) = clash {
            let (finding, values) = clash_finding(parties, clash, byte, true);
            cx.report(warp.site(), Some(lane as u32), finding, values);
        }
    }
}

/// The source of a store: read through the asynchronous proxy until the wait.
fn read_source(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, lane: usize, runs: &[Run]) {
    let Cluster { warps, ctas, parties, .. } = cl;
    let warp = &warps[w];
    let tag = Tag::new(warp.component + 3, warp.hopper.bulk_seq);
    let generic = |c: u32| parties[c as usize].is_generic();
    for run in runs {
        let fenced = Some((&warp.proxy_clock, &generic as &dyn Fn(u32) -> bool));
        let shared = &mut ctas[warp.cta].shared;
        let clash = shared.read(run.shared as usize, run.len as usize, tag, &warp.clock, false, fenced);
        if let Some((byte, clash)) = clash {
            let (finding, values) = clash_finding(parties, clash, byte, false);
            cx.report(warp.site(), Some(lane as u32), finding, values);
        }
    }
}

/// Bytes for the shared memory of a block that signal an mbarrier there.
fn send(
    cx: &mut Cx<'_>,
    cl: &mut Cluster,
    w: usize,
    lane: usize,
    to: (usize, usize),
    mbar: Option<u64>,
    bytes: Vec<u8>,
) -> Option<Kind> {
    let signal = mbar.and_then(|m| locate(cx, cl, w, Space::SharedCluster, m, lane))?;
    let site = cl.warps[w].site();
    if signal.0 != to.0 {
        bad(cx, site, lane, "the mbarrier is not in the block of the destination".into());
        return None;
    }
    let mbarrier = lookup(cx, cl, w, signal, lane, false)?;
    let runs = [Run { shared: to.1 as u32, len: bytes.len() as u32, global: None }];
    claim(cx, cl, w, lane, to.0, mbarrier, &runs);
    Some(Kind::Data { cta: to.0, mbarrier, offset: to.1, bytes })
}

/// `st.async` (9.7.9.12).
#[allow(clippy::too_many_arguments)]
pub(crate) fn peer_store(
    cx: &mut Cx<'_>,
    cl: &mut Cluster,
    w: usize,
    addr: Addr,
    mbar: Addr,
    size: usize,
    regs: &[Src],
    mask: u32,
) {
    let warp = &cl.warps[w];
    let targets = addresses(cx, warp, addr, mask);
    let signals = addresses(cx, warp, mbar, mask);
    for r in regs {
        check(cx, warp, *r, mask);
    }
    for lane in lanes(mask) {
        let warp = &cl.warps[w];
        let site = warp.site();
        let bytes: Vec<u8> =
            regs.iter().flat_map(|r| warp.get(cx.kernel, *r)[lane].to_le_bytes()[..size].to_vec()).collect();
        let n = bytes.len();
        let place = shared_target(targets[lane] & 0xffff_ffff, warp.cta, cl.ctas.len());
        let Some(to) = place.filter(|p| p.1 + n <= cl.ctas[p.0].shared.data.len()) else {
            let values = format!("shared address {:#x}, {n} bytes", targets[lane]);
            cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
            return;
        };
        if !to.1.is_multiple_of(n) {
            let values = format!("shared address {:#x}, {n} bytes", targets[lane]);
            cx.report(site, Some(lane as u32), Finding::Misaligned, values);
            return;
        }
        let Some(kind) = send(cx, cl, w, lane, to, Some(signals[lane]), bytes) else { return };
        cl.hopper.transfers.push(Transfer { id: 0, site, warp: w, kind });
    }
}

/// Performs a transfer.
pub(super) fn complete(cx: &mut Cx<'_>, cl: &mut Cluster, mut transfer: Transfer) {
    let site = transfer.site;
    let own = cl.warps[transfer.warp].cta;
    capture(cl, &mut transfer);
    match transfer.kind {
        Kind::Load { dests, runs, fill, bytes } => {
            for run in &runs {
                let mut data = [fill; 16];
                let data = &mut data[..run.len as usize];
                if let Some(at) = run.global {
                    let cta = &cl.ctas[own];
                    let known = |b| cta.known.contains(&b);
                    if let Err(fault) = cx.global.read(at, data, cta.linear, false, false, known) {
                        global_fault(cx, site, 0, at, run.len as usize, fault);
                        if cx.dead {
                            return;
                        }
                    }
                }
                for &(cta, index) in &dests {
                    let at = run.shared as usize;
                    let block = &mut cl.ctas[cta];
                    let m = &block.hopper.mbarriers[index];
                    let (from, to) = (Tag::new(m.component, Tag::NEVER), Tag::new(m.component, m.counter + 1));
                    block.shared.data[at..at + data.len()].copy_from_slice(data);
                    block.shared.retag(at, data.len(), from, to);
                }
            }
            for (cta, index) in dests {
                signal(cx, cl, site, cta, index, bytes);
            }
        }
        Kind::Store { cta, runs, reduce, data } => {
            let data = data.unwrap_or_default();
            let mut at = 0;
            for run in &runs {
                let bytes = &data[at..at + run.len as usize];
                at += bytes.len();
                if let Some(address) = run.global {
                    write_global(cx, cl, site, cta, address, bytes, reduce);
                    if cx.dead {
                        return;
                    }
                }
            }
        }
        Kind::Data { cta, mbarrier, offset, bytes } => {
            let block = &mut cl.ctas[cta];
            let m = &block.hopper.mbarriers[mbarrier];
            let (from, to) = (Tag::new(m.component, Tag::NEVER), Tag::new(m.component, m.counter + 1));
            block.shared.data[offset..offset + bytes.len()].copy_from_slice(&bytes);
            block.shared.retag(offset, bytes.len(), from, to);
            signal(cx, cl, site, cta, mbarrier, bytes.len() as u32);
        }
        Kind::Copies { lane, seq, place } => {
            exec::land_copies(cl, transfer.warp, lane, seq);
            let component = cl.warps[transfer.warp].component + 1;
            arrive_copies(cx, cl, site, place, (component, seq));
        }
    }
}

/// `complete_tx` on an mbarrier.
fn signal(cx: &mut Cx<'_>, cl: &mut Cluster, site: Site, cta: usize, index: usize, bytes: u32) {
    let m = &mut cl.ctas[cta].hopper.mbarriers[index];
    if !m.valid {
        let text = format!("a transfer signals the mbarrier at {:#x}, which is invalidated", m.offset);
        cx.report(site, None, Finding::MbarrierMisuse, text);
        return;
    }
    m.tx -= i64::from(bytes);
    settle(cx, cl, cta, index);
}

/// Reads the source of a store, if that is still to be done.
fn capture(cl: &Cluster, transfer: &mut Transfer) {
    if let Kind::Store { cta, runs, data, .. } = &mut transfer.kind
        && data.is_none()
    {
        let shared = &cl.ctas[*cta].shared.data;
        let bytes = runs.iter().flat_map(|r| &shared[r.shared as usize..(r.shared + r.len) as usize]).copied();
        *data = Some(bytes.collect());
    }
}

fn write_global(
    cx: &mut Cx<'_>,
    cl: &Cluster,
    site: Site,
    cta: usize,
    address: u64,
    bytes: &[u8],
    reduce: Option<Reduction>,
) {
    let block = &cl.ctas[cta];
    let known = |b| block.known.contains(&b);
    let mut data = [0u8; 16];
    let data = &mut data[..bytes.len()];
    data.copy_from_slice(bytes);
    if let Some((op, ty, size)) = reduce {
        let size = usize::from(size);
        let mut old = [0u8; 16];
        let old = &mut old[..bytes.len()];
        if let Err(fault) = cx.global.read(address, old, block.linear, true, false, known) {
            global_fault(cx, site, 0, address, bytes.len(), fault);
        }
        let value = |b: &[u8]| b.iter().rev().fold(0u64, |x, y| x << 8 | u64::from(*y));
        for (new, old) in data.chunks_mut(size).zip(old.chunks(size)) {
            let sum = apply(op, ty, size as u8, value(old), value(new), 0, true);
            new.copy_from_slice(&sum.to_le_bytes()[..size]);
        }
    }
    match cx.global.write(address, data, block.linear, reduce.is_some(), known) {
        Ok(()) => {}
        Err(GlobalFault::Foreign(other)) => {
            let values = format!("address {address:#x} was written by block number {other} too");
            cx.report(site, None, Finding::GlobalWriteConflict, values);
        }
        Err(fault) => global_fault(cx, site, 0, address, bytes.len(), fault),
    }
}

/// `cp.async.bulk.commit_group`
pub(crate) fn commit(cl: &mut Cluster, w: usize, mask: u32) {
    let state = &mut cl.warps[w].hopper;
    for lane in lanes(mask) {
        state.bulk_commits[lane] += 1;
    }
    state.bulk_seq += 1;
}

/// `cp.async.bulk.wait_group`: at most `groups` groups of each lane stay open; with `read` only their sources must be free.
pub(crate) fn wait(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, groups: u32, read: bool, mask: u32) {
    let state = &mut cl.warps[w].hopper;
    let commits = state.bulk_commits;
    let (mut done, open): (Vec<_>, Vec<_>) = std::mem::take(&mut state.bulks)
        .into_iter()
        .partition(|b| mask >> b.lane & 1 != 0 && b.group + groups < commits[b.lane]);
    state.bulks = open;
    // What a `.read` has seen stays open for the wait that covers the writes.
    for record in &mut done {
        let Some(i) = cl.hopper.transfers.iter().position(|t| !t.signals() && t.id == record.id) else { continue };
        let mut transfer = cl.hopper.transfers.swap_remove(i);
        if read {
            capture(cl, &mut transfer);
            cl.hopper.transfers.push(transfer);
        } else {
            complete(cx, cl, transfer);
        }
        record.read = read;
    }
    let state = &mut cl.warps[w].hopper;
    let reached = state.bulks.iter().filter(|b| !b.read).map(|b| b.seq - 1).min().unwrap_or(state.bulk_seq - 1);
    if read {
        state.bulks.extend(done);
    }
    let warp = &mut cl.warps[w];
    warp.clock.raise(warp.component + 3, reached);
}
