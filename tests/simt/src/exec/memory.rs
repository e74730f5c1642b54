//! Loads, stores, atomics and fences (PTX ISA 8, 9.7.9.8 to 9.7.9.12, 9.7.13.5, 9.7.13.6).

use super::{check, check_owner};
use crate::clock::Clock;
use crate::finding::Finding;
use crate::global::GlobalFault;
use crate::model::float::{self, BF16, F16, F32, Mods, RN};
use crate::op::{Access, Addr, Atom, AtomOp, AtomType, Lanes, Order, Space, Src};
use crate::shadow::{Clash, LaneClash};
use crate::state::{Cluster, Cta, Cx, Party, Site, Warp, resolve, shared_target};
use crate::window;

pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |i| mask >> i & 1 != 0)
}

/// The warp, its block, and the names of parties.
pub(crate) fn parts(cl: &mut Cluster, w: usize) -> (&mut Warp, &mut Cta, &[Party]) {
    let warp = &mut cl.warps[w];
    let cta = &mut cl.ctas[warp.cta];
    (warp, cta, &cl.parties)
}

/// Lane addresses; shared addresses wrap at 32 bits.
pub(crate) fn addresses(cx: &mut Cx<'_>, warp: &Warp, addr: Addr, mask: u32) -> Lanes {
    check(cx, warp, addr.base, mask);
    let base = warp.get(cx.kernel, addr.base);
    let mut out = [0; 32];
    let narrow = matches!(addr.space, Space::Shared | Space::SharedCluster | Space::Local);
    for i in 0..32 {
        let a = base[i].wrapping_add(addr.offset as u64);
        out[i] = if narrow && base[i] >> 32 == 0 { a & 0xffff_ffff } else { a };
    }
    out
}

/// Where one lane accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Global(u64),
    /// Block of the cluster, offset.
    Shared(usize, usize),
    Local(usize),
    Param(usize),
}

/// Finds the place of `bytes` bytes at `address`, aligned to `bytes`; reports and gives `None` if there is none.
#[inline]
pub(crate) fn place(
    cx: &mut Cx<'_>,
    warp: &Warp,
    ctas: &[Cta],
    space: Space,
    address: u64,
    bytes: usize,
    lane: usize,
) -> Option<Place> {
    // sizes are powers of two; a mask, because a division per lane is felt
    if address & (bytes as u64 - 1) != 0 {
        let values = format!("address {address:#x}, access of {bytes} bytes");
        cx.report(warp.site(), Some(lane as u32), Finding::Misaligned, values);
        return None;
    }
    let (found, at) = resolve(space, address);
    let (place, limit) = match found {
        Space::SharedCluster => {
            let target = shared_target(at, warp.cta, ctas.len()).filter(|t| space != Space::Shared || t.0 == warp.cta);
            match target {
                Some((cta, offset)) => (Place::Shared(cta, offset), ctas[cta].shared.data.len()),
                None => (Place::Shared(0, at as usize), 0),
            }
        }
        Space::Local => (Place::Local(at as usize), cx.kernel.local_bytes as usize),
        Space::Param => (Place::Param(at.wrapping_sub(window::PARAM) as usize), cx.params.len()),
        _ => return Some(Place::Global(at)),
    };
    let offset = match place {
        Place::Shared(_, o) | Place::Local(o) | Place::Param(o) => o,
        Place::Global(_) => 0,
    };
    if offset.checked_add(bytes).is_none_or(|end| end > limit) {
        let values = format!("address {address:#x} ({place:x?}), access of {bytes} bytes, the space has {limit}");
        cx.report(warp.site(), Some(lane as u32), Finding::OutOfBounds, values);
        return None;
    }
    Some(place)
}

/// Checks alignment and bounds of an access to the block's own shared memory.
#[inline]
pub(crate) fn shared_bounds(cx: &mut Cx<'_>, site: Site, lane: usize, at: u64, bytes: usize, size: usize) -> bool {
    let finding = if at & (bytes as u64 - 1) != 0 {
        Finding::Misaligned
    } else if at as usize + bytes > size {
        Finding::OutOfBounds
    } else {
        return true;
    };
    let values = format!("shared address {at:#x}, access of {bytes} bytes, shared memory has {size}");
    cx.report(site, Some(lane as u32), finding, values);
    false
}

/// Names a clash in shared memory.
pub(crate) fn clash_finding(parties: &[Party], clash: Clash, byte: usize, writing: bool) -> (Finding, String) {
    let me = if writing { "write" } else { "read" };
    let (finding, tag, what) = match clash {
        Clash::Uninit => return (Finding::UninitShared, format!("shared byte {byte:#x} was never written")),
        Clash::Write(tag) => (Finding::SharedRace, tag, "write"),
        Clash::Read(tag) => (Finding::SharedRace, tag, "read"),
        Clash::Unfenced(tag) => {
            let by = parties[tag.component() as usize];
            return (
                Finding::MissingProxyFence,
                format!("shared byte {byte:#x} was last written by {by}, without fence.proxy.async since"),
            );
        }
    };
    let by = parties[tag.component() as usize];
    let finding = match (by, clash) {
        (Party::Mbarrier { address, .. }, _) if (address as usize..address as usize + 8).contains(&byte) => {
            Finding::MbarrierMisuse
        }
        (by, Clash::Write(_)) if by.is_async() && !writing => Finding::AsyncReadTooEarly,
        (by, _) if by.is_async() => Finding::AsyncOverwrite,
        _ => finding,
    };
    (finding, format!("{me} of shared byte {byte:#x}, not ordered after a {what} by {by}"))
}

/// Reports a fault in global memory.
#[cold]
pub(crate) fn global_fault(cx: &mut Cx<'_>, site: Site, lane: usize, address: u64, bytes: usize, fault: GlobalFault) {
    let (finding, values) = match fault {
        GlobalFault::OutOfBounds => {
            let buffer = address >> window::BUFFER_BITS;
            let offset = address & ((1 << window::BUFFER_BITS) - 1);
            let size = cx.global.len(buffer << window::BUFFER_BITS);
            let values = match size {
                Some(size) if size > 0 => {
                    format!("address {address:#x}: byte {offset} of a buffer of {size}, access of {bytes} bytes")
                }
                _ => format!("address {address:#x} is in no buffer, access of {bytes} bytes"),
            };
            (Finding::OutOfBounds, values)
        }
        GlobalFault::Uninit(i) => {
            (Finding::UninitGlobal, format!("byte {:#x} was never written", address + u64::from(i)))
        }
        GlobalFault::Foreign(block) => {
            (Finding::GlobalRace, format!("address {address:#x} was written by block number {block}"))
        }
        GlobalFault::Written => (Finding::ReadOnlyWritten, format!("address {address:#x} is written by this launch")),
    };
    cx.report(site, Some(lane as u32), finding, values);
}

/// Reports a race in shared memory between lanes of one warp.
#[cold]
pub(crate) fn lane_race(cx: &mut Cx<'_>, site: Site, lane: usize, (byte, clash): (usize, LaneClash), me: &str) {
    let (other, what) = match clash {
        LaneClash::Write(other) => (format!("lane {other}"), "write"),
        LaneClash::Read(Some(other)) => (format!("lane {other}"), "read"),
        LaneClash::Read(None) => ("other lanes".to_string(), "read"),
    };
    let values = format!("{me} of shared byte {byte:#x}, after a {what} by {other} of this warp without bar.warp.sync");
    cx.report(site, Some(lane as u32), Finding::SharedRace, values);
}

/// Reports a race in global memory between warps of one cluster.
#[cold]
pub(crate) fn global_race(
    cx: &mut Cx<'_>,
    site: Site,
    parties: &[Party],
    lane: usize,
    address: u64,
    clash: Clash,
    me: &str,
) {
    let (tag, what) = match clash {
        Clash::Write(tag) | Clash::Unfenced(tag) => (tag, "write"),
        Clash::Read(tag) => (tag, "read"),
        Clash::Uninit => return,
    };
    let by = parties[tag.component() as usize];
    let values = format!("{me} at global address {address:#x}, not ordered after a {what} by {by}");
    cx.report(site, Some(lane as u32), Finding::GlobalRace, values);
}

/// The key of an address in the map of releases.
fn sync_key(place: Place) -> u64 {
    match place {
        Place::Global(a) => a,
        Place::Shared(cta, offset) => window::SHARED + ((cta as u64 + 1) << window::RANK_SHIFT) + offset as u64,
        Place::Local(_) | Place::Param(_) => 0,
    }
}

/// What a strong read learns.
fn acquire(
    cx: &Cx<'_>,
    warp: &mut Warp,
    known: &mut std::collections::HashSet<u32>,
    seen: Option<&Clock>,
    key: u64,
    order: Order,
) {
    if let Some(clock) = seen {
        if order.acquires() {
            warp.clock.join(clock);
            warp.meet_lanes(u32::MAX);
        } else {
            warp.pending_acquire.join(clock);
        }
    }
    if let Some(blocks) = cx.released.get(&key) {
        known.extend(blocks);
    }
}

/// What a strong write publishes. A store replaces what was released there, an atomic adds to it.
fn release(cx: &mut Cx<'_>, warp: &Warp, cta: &Cta, slot: &mut Clock, place: Place, order: Order, replaces: bool) {
    if replaces {
        slot.clear();
    }
    if order.releases() {
        slot.join(&warp.clock);
    } else if let Some(clock) = &warp.fence_clock {
        slot.join(clock);
    }
    if let Place::Global(address) = place
        && (order.releases() || warp.fenced_wide)
    {
        let blocks = cx.released.entry(address).or_default();
        blocks.insert(cta.linear);
        blocks.extend(&cta.known);
    }
}

/// A thread fence: what relaxed loads saw is acquired, what is done so far can be released by relaxed stores.
pub(super) fn fence(warp: &mut Warp, wide: bool) {
    let pending = std::mem::take(&mut warp.pending_acquire);
    warp.clock.join(&pending);
    warp.fence_clock = Some(warp.clock.clone());
    warp.fenced_wide |= wide;
    warp.meet_lanes(u32::MAX);
}

/// Counts the requests of an access by space.
fn count(cx: &mut Cx<'_>, warp: &Warp, space: Space, raw: &Lanes, mask: u32, bytes: usize) {
    if warp.spin.is_some() || mask == 0 {
        return;
    }
    let mut masks = [0u32; 2];
    match space {
        Space::Global => masks[0] = mask,
        Space::Shared | Space::SharedCluster => masks[1] = mask,
        Space::Generic => {
            for i in lanes(mask) {
                match window::from_generic(raw[i]).0 {
                    Space::Global => masks[0] |= 1 << i,
                    Space::SharedCluster => masks[1] |= 1 << i,
                    _ => {}
                }
            }
        }
        _ => {}
    }
    if masks[0] != 0 {
        cx.counters.global(raw, masks[0], bytes as u32);
    }
    if masks[1] != 0 {
        cx.counters.shared(raw, masks[1], bytes as u32);
    }
}

#[inline]
fn get_bytes(bytes: &[u8]) -> u64 {
    match *bytes {
        [a] => u64::from(a),
        [a, b] => u64::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    }
}

pub(super) fn load(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, access: &Access, mask: u32) {
    if mask == 0 {
        return;
    }
    let Cluster { warps, ctas, parties, sync, global, .. } = cl;
    let warp = &mut warps[w];
    let raw = addresses(cx, warp, access.addr, mask);
    let size = usize::from(access.bytes);
    let total = size * access.regs.len();
    count(cx, warp, access.addr.space, &raw, mask, total);
    let site = warp.site();
    let strong = access.order != Order::Weak;
    let tag = warp.tag();
    let mut buffer = [0u8; 32];
    for lane in lanes(mask) {
        let Some(place) = place(cx, warp, ctas, access.addr.space, raw[lane], total, lane) else { return };
        let data = &mut buffer[..total];
        match place {
            Place::Shared(rank, at) => {
                let shared = &mut ctas[rank].shared;
                if let Some(clash) = shared.read_by_lane(at, total, tag, lane, warp.lane_seen[lane], strong) {
                    lane_race(cx, site, lane, clash, "read");
                }
                if let Some((byte, clash)) = shared.read(at, total, tag, &warp.clock, strong, None) {
                    let (finding, values) = clash_finding(parties, clash, byte, false);
                    cx.report(site, Some(lane as u32), finding, values);
                }
                data.copy_from_slice(&shared.data[at..at + total]);
            }
            Place::Global(at) => {
                let cta = &mut ctas[warp.cta];
                let result = cx.global.read(at, data, cta.linear, strong, access.read_only, |b| cta.known.contains(&b));
                if let Err(fault) = result {
                    global_fault(cx, site, lane, at, total, fault);
                } else if let Some(clash) = global.read(at, total, tag, &warp.clock, strong) {
                    global_race(cx, site, parties, lane, at, clash, "read");
                }
            }
            Place::Local(at) => {
                let at = lane * cx.kernel.local_bytes as usize + at;
                grow_local(cx, warp);
                if !warp.local_init[at..at + total].iter().all(|i| *i) {
                    let values = "local memory was never written".to_string();
                    cx.report(site, Some(lane as u32), Finding::UninitGlobal, values);
                }
                data.copy_from_slice(&warp.local[at..at + total]);
            }
            Place::Param(at) => data.copy_from_slice(&cx.params[at..at + total]),
        }
        if cx.dead {
            return;
        }
        if strong {
            let key = sync_key(place);
            let cta = warp.cta;
            acquire(cx, warp, &mut ctas[cta].known, sync.get(&key), key, access.order);
        }
        for (reg, bytes) in access.regs.iter().zip(buffer.chunks_exact(size)) {
            let Some(reg) = reg else { continue };
            let mut value = get_bytes(bytes);
            if access.signed && size < 8 {
                let shift = 64 - 8 * size as u32;
                value = ((value << shift) as i64 >> shift) as u64 & crate::decode::mask(u32::from(access.reg_bits));
            }
            warp.regs[reg.0 as usize][lane] = value;
        }
    }
    for reg in access.regs.iter().flatten() {
        warp.init[reg.0 as usize] |= mask;
        if warp.any_busy {
            check_owner(cx, warp, reg.0);
        }
    }
}

fn grow_local(cx: &Cx<'_>, warp: &mut Warp) {
    if warp.local.is_empty() {
        let size = 32 * cx.kernel.local_bytes as usize;
        warp.local = vec![0; size];
        warp.local_init = vec![false; size];
    }
}

pub(super) fn store(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, access: &Access, mask: u32) {
    if mask == 0 {
        return;
    }
    let Cluster { warps, ctas, parties, sync, global, .. } = cl;
    let warp = &mut warps[w];
    let kernel = cx.kernel;
    let raw = addresses(cx, warp, access.addr, mask);
    let size = usize::from(access.bytes);
    let total = size * access.regs.len();
    for reg in access.regs.iter().flatten() {
        check(cx, warp, *reg, mask);
    }
    count(cx, warp, access.addr.space, &raw, mask, total);
    let site = warp.site();
    let strong = access.order != Order::Weak;
    let tag = if strong { warp.tag().strong() } else { warp.tag() };
    let mut values = [[0u8; 32]; 32];
    for (n, reg) in access.regs.iter().enumerate() {
        let reg = warp.get(kernel, reg.unwrap_or(Src(Src::CONST)));
        for lane in lanes(mask) {
            values[lane][n * size..(n + 1) * size].copy_from_slice(&reg[lane].to_le_bytes()[..size]);
        }
    }
    for lane in lanes(mask) {
        let Some(place) = place(cx, warp, ctas, access.addr.space, raw[lane], total, lane) else { return };
        let data = &values[lane][..total];
        match place {
            Place::Shared(rank, at) => {
                let shared = &mut ctas[rank].shared;
                // An equal value changes nothing, whichever store comes last.
                let changes = shared.data[at..at + total] != *data;
                if let Some(clash) = shared.write_by_lane(at, total, tag, lane, warp.lane_seen[lane], changes) {
                    lane_race(cx, site, lane, clash, "write");
                }
                if let Some((byte, clash)) = shared.write(at, total, tag, &warp.clock, None) {
                    let (finding, values) = clash_finding(parties, clash, byte, true);
                    cx.report(site, Some(lane as u32), finding, values);
                }
                shared.data[at..at + total].copy_from_slice(data);
            }
            Place::Global(at) => {
                if !strong {
                    warp.fenced_wide = false;
                }
                let cta = &ctas[warp.cta];
                match cx.global.write(at, data, cta.linear, strong, |b| cta.known.contains(&b)) {
                    Ok(()) => {
                        if let Some(clash) = global.write(at, total, tag, &warp.clock) {
                            global_race(cx, site, parties, lane, at, clash, "write");
                        }
                    }
                    Err(GlobalFault::Foreign(block)) => {
                        let values = format!("address {at:#x} was written by block number {block} too");
                        cx.report(site, Some(lane as u32), Finding::GlobalWriteConflict, values);
                    }
                    Err(fault) => global_fault(cx, site, lane, at, total, fault),
                }
            }
            Place::Local(at) => {
                let at = lane * cx.kernel.local_bytes as usize + at;
                grow_local(cx, warp);
                warp.local[at..at + total].copy_from_slice(data);
                warp.local_init[at..at + total].fill(true);
            }
            Place::Param(_) => {
                let values = "parameters are read-only".to_string();
                cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
            }
        }
        if cx.dead {
            return;
        }
        if strong {
            let slot = sync.entry(sync_key(place)).or_default();
            release(cx, warp, &ctas[warp.cta], slot, place, access.order, true);
        }
    }
    if access.order.releases() {
        warp.tick();
    }
    if let Some((a, b)) = overlap(&raw, mask, total as u64, &values)
        && access.addr.space != Space::Local
    {
        let values = format!("lanes {a} and {b} of one store write different values to {:#x}", raw[b]);
        let shared = resolve(access.addr.space, raw[b]).0 == Space::SharedCluster;
        let finding = if shared { Finding::SharedRace } else { Finding::GlobalWriteConflict };
        cx.report(site, Some(b as u32), finding, values);
    }
}

/// Two lanes of one store that write the same place with different values.
fn overlap(raw: &Lanes, mask: u32, n: u64, values: &[[u8; 32]; 32]) -> Option<(usize, usize)> {
    let mut last = None;
    let increasing = lanes(mask).all(|i| {
        let ok = last.is_none_or(|l: u64| raw[i] >= l.wrapping_add(n));
        last = Some(raw[i]);
        ok
    });
    if increasing {
        return None;
    }
    let mut order = [(0u64, 0usize); 32];
    let mut count = 0;
    for i in lanes(mask) {
        order[count] = (raw[i], i);
        count += 1;
    }
    order[..count].sort_unstable();
    // accesses are aligned to their size, so two of them are equal or apart
    order[..count].windows(2).find(|p| p[0].0 == p[1].0 && values[p[0].1] != values[p[1].1]).map(|p| (p[0].1, p[1].1))
}

/// The new value of an atomic.
pub(crate) fn apply(op: AtomOp, ty: AtomType, bytes: u8, old: u64, b: u64, c: u64, global: bool) -> u64 {
    let bits = 8 * u32::from(bytes);
    let mask = crate::decode::mask(bits);
    let signed = |v: u64| ((v << (64 - bits)) as i64) >> (64 - bits);
    let half = |f: float::Format, pair: bool| {
        let add = |x: u64, y: u64| u64::from(float::add(f, x as u32 & 0xffff, y as u32 & 0xffff, RN));
        add(old, b) | if pair { add(old >> 16, b >> 16) << 16 } else { 0 }
    };
    let half_order =
        |f: float::Format, max: bool| u64::from(float::min_max(f, old as u32, b as u32, max, false, false));
    match (op, ty) {
        (AtomOp::Min, AtomType::F16) => half_order(F16, false),
        (AtomOp::Max, AtomType::F16) => half_order(F16, true),
        (AtomOp::Min, AtomType::Bf16) => half_order(BF16, false),
        (AtomOp::Max, AtomType::Bf16) => half_order(BF16, true),
        // in global memory f32 additions flush subnormals (9.7.13.5)
        (AtomOp::Add, AtomType::F32) => u64::from(float::add(F32, old as u32, b as u32, Mods { ftz: global, ..RN })),
        (AtomOp::Add, AtomType::F16) => half(F16, false),
        (AtomOp::Add, AtomType::F16x2) => half(F16, true),
        (AtomOp::Add, AtomType::Bf16) => half(BF16, false),
        (AtomOp::Add, AtomType::Bf16x2) => half(BF16, true),
        (AtomOp::Add, _) => old.wrapping_add(b) & mask,
        (AtomOp::Min, AtomType::Signed) => signed(old).min(signed(b)) as u64 & mask,
        (AtomOp::Max, AtomType::Signed) => signed(old).max(signed(b)) as u64 & mask,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (AtomOp::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}

pub(super) fn atomic(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, atom: &Atom, mask: u32) {
    if mask == 0 {
        return;
    }
    let Cluster { warps, ctas, parties, sync, global, .. } = cl;
    let warp = &mut warps[w];
    let kernel = cx.kernel;
    let raw = addresses(cx, warp, atom.addr, mask);
    check(cx, warp, atom.b, mask);
    if let Some(c) = atom.c {
        check(cx, warp, c, mask);
    }
    let size = usize::from(atom.bytes);
    count(cx, warp, atom.addr.space, &raw, mask, size);
    let site = warp.site();
    let tag = warp.tag().strong();
    let mut out = [0u64; 32];
    // The order of the lanes is not defined.
    let start = cx.rng.below(32);
    for lane in (0..32).map(|i| (start + i) % 32).filter(|i| mask >> i & 1 != 0) {
        let Some(place) = place(cx, warp, ctas, atom.addr.space, raw[lane], size, lane) else { return };
        let b = warp.get(kernel, atom.b)[lane];
        let c = atom.c.map_or(0, |c| warp.get(kernel, c)[lane]);
        let key = sync_key(place);
        if atom.dst.is_some() {
            let cta = warp.cta;
            acquire(cx, warp, &mut ctas[cta].known, sync.get(&key), key, atom.order);
        }
        match place {
            Place::Shared(rank, at) => {
                let shared = &mut ctas[rank].shared;
                let seen = warp.lane_seen[lane];
                if let Some(clash) = shared.write_by_lane(at, size, tag, lane, seen, true) {
                    lane_race(cx, site, lane, clash, "atomic");
                }
                let clash = shared.read(at, size, tag, &warp.clock, true, None);
                if let Some((byte, clash)) = clash.or(shared.write(at, size, tag, &warp.clock, None)) {
                    let (finding, values) = clash_finding(parties, clash, byte, true);
                    cx.report(site, Some(lane as u32), finding, values);
                }
                out[lane] = get_bytes(&shared.data[at..at + size]);
                let new = apply(atom.op, atom.ty, atom.bytes, out[lane], b, c, false);
                shared.data[at..at + size].copy_from_slice(&new.to_le_bytes()[..size]);
            }
            Place::Global(at) => {
                let cta = &ctas[warp.cta];
                let mut data = [0u8; 8];
                let known = |b| cta.known.contains(&b);
                if let Err(fault) = cx.global.read(at, &mut data[..size], cta.linear, true, false, known) {
                    global_fault(cx, site, lane, at, size, fault);
                    if cx.dead {
                        return;
                    }
                }
                out[lane] = get_bytes(&data[..size]);
                let new = apply(atom.op, atom.ty, atom.bytes, out[lane], b, c, true).to_le_bytes();
                if let Err(fault) = cx.global.write(at, &new[..size], cta.linear, true, known) {
                    global_fault(cx, site, lane, at, size, fault);
                }
                let clash = global.read(at, size, tag, &warp.clock, true);
                if let Some(clash) = clash.or(global.write(at, size, tag, &warp.clock)) {
                    global_race(cx, site, parties, lane, at, clash, "atomic");
                }
            }
            Place::Local(_) | Place::Param(_) => {
                let values = "atomics work on global and shared memory".to_string();
                cx.report(site, Some(lane as u32), Finding::OutOfBounds, values);
            }
        }
        if cx.dead {
            return;
        }
        let slot = sync.entry(key).or_default();
        release(cx, warp, &ctas[warp.cta], slot, place, atom.order, false);
    }
    if atom.order.releases() {
        warp.tick();
    }
    if let Some(d) = atom.dst {
        super::store(cx, warp, d, &out, mask);
    }
}

/// `discard.global`: the bytes are undefined afterwards.
pub(super) fn discard(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, addr: Addr, bytes: u32, mask: u32) {
    let warp = &cl.warps[w];
    let raw = addresses(cx, warp, addr, mask);
    for lane in lanes(mask) {
        let Some(place) = place(cx, warp, &cl.ctas, addr.space, raw[lane], bytes as usize, lane) else { return };
        let result = match place {
            Place::Global(at) => cx.global.forget(at, u64::from(bytes)),
            _ => Err(GlobalFault::OutOfBounds),
        };
        if let Err(fault) = result {
            global_fault(cx, warp.site(), lane, raw[lane], bytes as usize, fault);
        }
    }
}
