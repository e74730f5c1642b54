//! The interpreter: picks the lanes of a warp that run, and executes one instruction after the other.
//!
//! In lock-step mode the lanes with the lowest program counter run. For structured code that is exactly reconvergence at the
//! end of each branch, without any analysis of control flow. In split mode a random subset of the lanes at a random program
//! counter runs for a while. In both, a `.sync` or `.aligned` instruction first waits for the lanes that it names.

mod barrier;
mod copy;
mod matrix;
mod memory;
mod warp;

pub(crate) use copy::land as land_copies;
pub(crate) use matrix::input;
pub(crate) use memory::{addresses, apply, clash_finding, global_fault, lanes};

use crate::finding::{Finding, Mode};
use crate::op::{BoolOp, Class, Instr, Lanes, Op, PredSrc, Reg, Setp, Src};
use crate::state::{Cluster, Cx, Hold, Warp};
use crate::window;

/// Lanes that have jumped back this often while others of their warp could run are taken to poll for what those will write: the
/// others get a turn, as the independent scheduling of threads guarantees (PTX ISA 3.1). No loop that computes is as long.
pub(crate) const LOOPS: u32 = 1 << 18;
/// The same for a warp that has done so before.
const POLLS: u32 = 256;

/// What comes after an instruction.
pub(crate) enum Flow {
    Next,
    /// The program counter is set; the same lanes go on.
    Jump,
    /// The program counters and masks are set: choose lanes again.
    Reselect,
    /// The warp cannot go on now.
    Hold,
}

/// Runs warp `w` for up to `quantum` instructions.
pub(crate) fn run(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, quantum: usize) {
    let kernel = cx.kernel;
    if !select(cx, &mut cl.warps[w]) {
        return;
    }
    let mut split_left = split_length(cx);
    for _ in 0..quantum {
        let warp = &mut cl.warps[w];
        let instr = &kernel.code[warp.pc as usize];
        let mask = match instr.guard {
            None => warp.active,
            Some(p) => {
                check_pred(cx, warp, p, warp.active);
                warp.active & warp.pred(p)
            }
        };
        cx.steps += 1;
        count(cx, warp, instr, mask);
        let flow = step(cx, cl, w, instr, mask);
        if cx.dead {
            return;
        }
        if cx.steps >= cx.config.max_steps {
            step_limit(cx, cl, w);
            return;
        }
        let warp = &mut cl.warps[w];
        split_left -= 1;
        match flow {
            Flow::Next => {
                warp.pc += 1;
                // In split mode lanes part right after they have met: that is where a missing barrier would show.
                let met = cx.config.mode == Mode::Split && instr.class == Class::Sync;
                if warp.pc < warp.other && split_left > 0 && !met {
                    continue;
                }
            }
            Flow::Jump => continue,
            Flow::Reselect => {}
            Flow::Hold => return,
        }
        split_left = split_length(cx);
        if !select(cx, warp) {
            return;
        }
    }
}

/// Too many steps: a loop that has no end, or that polls what nobody writes.
#[cold]
fn step_limit(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize) {
    let values = format!("{} warp instructions; {}", cx.steps, crate::sched::whereabouts(cx, cl));
    cx.report(cl.warps[w].site(), None, Finding::StepLimit, values);
}

fn split_length(cx: &mut Cx<'_>) -> i64 {
    if cx.config.mode == Mode::Split { 1 + cx.rng.below(24) as i64 } else { i64::MAX }
}

/// Counts an instruction, unless it belongs to the loop around a poll that failed.
#[inline]
fn count(cx: &mut Cx<'_>, warp: &mut Warp, instr: &Instr, mask: u32) {
    if let Some((pc, left)) = warp.spin {
        if warp.pc == pc || left == 0 {
            warp.spin = None;
        } else {
            warp.spin = Some((pc, left - 1));
            cx.counted = false;
            return;
        }
    }
    cx.counted = true;
    cx.counters.instruction(instr.class, mask);
}

/// Stores the program counters of the active lanes and chooses the lanes that run next; false if none can.
pub(crate) fn select(cx: &mut Cx<'_>, warp: &mut Warp) -> bool {
    for i in 0..32 {
        if warp.active >> i & 1 != 0 {
            warp.pcs[i] = warp.pc;
        }
    }
    let before = std::mem::take(&mut warp.active);
    let ready = warp.ready();
    if ready == 0 {
        if warp.hold == Hold::None && warp.live != 0 && warp.parked == 0 {
            divergent(cx, warp);
        }
        return false;
    }
    let lanes = |mask: u32| (0..32).filter(move |i| mask >> i & 1 != 0);
    if cx.config.mode == Mode::Split {
        let start = cx.rng.below(32);
        let pick = (0..32).map(|i| (start + i) % 32).find(|i| ready >> i & 1 != 0).unwrap_or(0);
        warp.pc = warp.pcs[pick];
        let same = lanes(ready).filter(|&i| warp.pcs[i] == warp.pc).fold(0, |m, i| m | 1 << i);
        let subset = same & cx.rng.next() as u32;
        warp.active = if cx.rng.below(3) == 0 { same } else { subset | 1 << pick };
        warp.other = u32::MAX;
        return true;
    }
    let next = lanes(ready & !before).map(|i| warp.pcs[i]).min();
    if let (Some(next), true) = (next, warp.loops >= warp.loop_limit) {
        // The others run as far as they can before the lanes that loop are looked at again.
        (warp.loops, warp.loop_limit) = (0, POLLS);
        warp.pc = next;
        warp.active = lanes(ready & !before).filter(|&i| warp.pcs[i] == next).fold(0, |m, i| m | 1 << i);
        warp.other = u32::MAX;
        return true;
    }
    warp.pc = lanes(ready).map(|i| warp.pcs[i]).min().unwrap_or(0);
    warp.other = u32::MAX;
    for i in lanes(ready) {
        if warp.pcs[i] == warp.pc {
            warp.active |= 1 << i;
        } else {
            warp.other = warp.other.min(warp.pcs[i]);
        }
    }
    if warp.active != before {
        warp.loops = 0;
    }
    true
}

/// Every live lane waits at a collective, and not at the same one.
fn divergent(cx: &mut Cx<'_>, warp: &mut Warp) {
    let lane = warp.waiting.trailing_zeros();
    warp.pc = warp.pcs[lane as usize];
    let elsewhere =
        (0..32).filter(|&i| warp.live >> i & 1 != 0 && warp.pcs[i] != warp.pc).fold(0u32, |m, i| m | 1 << i);
    let lines: Vec<u32> = (0..32)
        .filter(|i| elsewhere >> i & 1 != 0)
        .map(|i| cx.kernel.code[warp.pcs[i as usize] as usize].line)
        .collect();
    let values = format!("lanes {elsewhere:#010x} are not here but at line {:?}", lines.first().unwrap_or(&0));
    cx.report(warp.site(), Some(lane), Finding::DivergentCollective, values);
}

/// Brings together the lanes of `need` at this instruction: true when all are here (and active).
pub(crate) fn gather(warp: &mut Warp, need: u32) -> bool {
    if need & !warp.active == 0 {
        return true;
    }
    let pc = warp.pc;
    let here = (0..32)
        .filter(|&i| warp.live >> i & 1 != 0 && (warp.active >> i & 1 != 0 || warp.pcs[i] == pc))
        .fold(0u32, |m, i| m | 1 << i);
    // Lanes at this instruction that are neither active nor waiting have not been chosen yet; they join now.
    if need & !here & warp.live == 0 {
        warp.waiting &= !here;
        warp.active |= here & !warp.parked;
        return need & !warp.active & warp.live == 0;
    }
    warp.waiting |= warp.active;
    false
}

/// An instruction that the whole warp must execute together: the mask to run with, or `None` to wait (or after a finding).
pub(crate) fn aligned(cx: &mut Cx<'_>, warp: &mut Warp, instr: &Instr) -> Result<u32, Flow> {
    if !gather(warp, warp.live) {
        return Err(Flow::Reselect);
    }
    let Some(p) = instr.guard else { return Ok(warp.active) };
    let mask = warp.active & warp.pred(p);
    if mask == 0 {
        return Err(Flow::Next);
    }
    if mask != warp.active {
        let lane = (warp.active & !mask).trailing_zeros();
        let values = format!("the guard holds in lanes {mask:#010x} of {:#010x} only", warp.active);
        cx.report(warp.site(), Some(lane), Finding::DivergentCollective, values);
        return Err(Flow::Next);
    }
    Ok(mask)
}

#[inline]
pub(crate) fn check(cx: &mut Cx<'_>, warp: &Warp, src: Src, mask: u32) {
    if src.0 & Src::CONST == 0 && mask & !warp.init[src.0 as usize] != 0 {
        unreadable(cx, warp, src.0, mask);
    }
}

#[cold]
fn unreadable(cx: &mut Cx<'_>, warp: &Warp, reg: Reg, mask: u32) {
    let name = &cx.kernel.reg_names[reg as usize];
    if warp.busy[reg as usize] != 0 {
        let values = format!("`{name}` is read while a wgmma in flight owns it");
        cx.report(warp.site(), None, Finding::AccumulatorInFlight, values);
        return;
    }
    let lane = (mask & !warp.init[reg as usize]).trailing_zeros();
    let values = format!("`{name}` was never written");
    cx.report(warp.site(), Some(lane), Finding::UninitRegister, values);
}

#[inline]
pub(crate) fn check_pred(cx: &mut Cx<'_>, warp: &Warp, p: PredSrc, mask: u32) {
    let missing = mask & !warp.pred_init[p.reg as usize];
    if missing != 0 {
        let values = format!("`{}` was never written", cx.kernel.pred_names[p.reg as usize]);
        cx.report(warp.site(), Some(missing.trailing_zeros()), Finding::UninitRegister, values);
    }
}

/// Stores a result, unless an asynchronous operation owns the register.
#[inline]
pub(crate) fn store(cx: &mut Cx<'_>, warp: &mut Warp, d: Reg, values: &Lanes, mask: u32) {
    if warp.any_busy {
        check_owner(cx, warp, d);
    }
    warp.put(d, values, mask);
}

#[cold]
pub(crate) fn check_owner(cx: &mut Cx<'_>, warp: &mut Warp, d: Reg) {
    if warp.busy[d as usize] != 0 {
        let name = &cx.kernel.reg_names[d as usize];
        let values = format!("`{name}` is written while a wgmma in flight owns it");
        cx.report(warp.site(), None, Finding::AccumulatorInFlight, values);
    }
    warp.hopper.touched(d);
}

/// Some lane shifts by the width or more; it may be one that does not execute.
#[cold]
fn wide_shift(cx: &mut Cx<'_>, warp: &Warp, amount: Src, bits: u8, mask: u32) {
    let amounts = warp.get(cx.kernel, amount);
    let Some(lane) = lanes(mask).find(|&i| amounts[i] as u32 >= u32::from(bits)) else {
        return;
    };
    let values = format!("{bits} bits are shifted by {}", amounts[lane] as u32);
    cx.report(warp.site(), Some(lane as u32), Finding::ShiftTooWide, values);
}

fn step(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, instr: &Instr, mask: u32) -> Flow {
    let kernel = cx.kernel;
    let warp = &mut cl.warps[w];
    let mut out = [0u64; 32];
    match &instr.op {
        Op::A1 { f, d, a } => {
            check(cx, warp, *a, mask);
            f(&mut out, warp.get(kernel, *a));
            store(cx, warp, *d, &out, mask);
        }
        Op::A2 { f, d, a, b } => {
            check(cx, warp, *a, mask);
            check(cx, warp, *b, mask);
            f(&mut out, warp.get(kernel, *a), warp.get(kernel, *b));
            store(cx, warp, *d, &out, mask);
        }
        Op::Shift { f, bits, d, a, b } => {
            check(cx, warp, *a, mask);
            check(cx, warp, *b, mask);
            let amounts = warp.get(kernel, *b);
            if amounts.iter().any(|&n| n as u32 >= u32::from(*bits)) {
                wide_shift(cx, warp, *b, *bits, mask);
            }
            f(&mut out, warp.get(kernel, *a), warp.get(kernel, *b));
            store(cx, warp, *d, &out, mask);
        }
        Op::A3 { f, d, a, b, c } => {
            check(cx, warp, *a, mask);
            check(cx, warp, *b, mask);
            check(cx, warp, *c, mask);
            f(&mut out, warp.get(kernel, *a), warp.get(kernel, *b), warp.get(kernel, *c));
            store(cx, warp, *d, &out, mask);
        }
        Op::Setp(op) => setp(cx, warp, op, mask),
        Op::Bra { target } => return branch(cx, warp, *target, mask),
        Op::Selp { d, a, b, p } => {
            check_pred(cx, warp, *p, mask);
            check(cx, warp, *a, mask & warp.pred(*p));
            check(cx, warp, *b, mask & !warp.pred(*p));
            let bits = warp.pred(*p);
            let (a, b) = (warp.get(kernel, *a), warp.get(kernel, *b));
            for i in 0..32 {
                out[i] = if bits >> i & 1 != 0 { a[i] } else { b[i] };
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::Div { f, d, a, b } => {
            check(cx, warp, *a, mask);
            check(cx, warp, *b, mask);
            let zeros = (0..32).filter(|&i| mask >> i & 1 != 0 && warp.get(kernel, *b)[i] == 0).min();
            if let Some(lane) = zeros {
                cx.report(warp.site(), Some(lane as u32), Finding::DivisionByZero, "the divisor is 0".into());
            }
            f(&mut out, warp.get(kernel, *a), warp.get(kernel, *b));
            store(cx, warp, *d, &out, mask);
        }
        Op::Approx { function, format, ftz, pair, d, a } => {
            check(cx, warp, *a, mask);
            let a = warp.get(kernel, *a);
            let call = |x: u32| cx.approx.call(*function, *format, x, *ftz);
            for i in (0..32).filter(|i| mask >> i & 1 != 0) {
                let x = a[i] as u32;
                out[i] = u64::from(if *pair { call(x & 0xffff) | call(x >> 16) << 16 } else { call(x) });
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::DivApprox { full, ftz, d, a, b } => {
            check(cx, warp, *a, mask);
            check(cx, warp, *b, mask);
            let (a, b) = (warp.get(kernel, *a), warp.get(kernel, *b));
            for i in (0..32).filter(|i| mask >> i & 1 != 0) {
                let (a, b) = (a[i] as u32, b[i] as u32);
                out[i] = u64::from(if *full { cx.approx.div_full(a, b, *ftz) } else { cx.approx.div(a, b, *ftz) });
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::Cvt { how, d, a, bits, reg_bits, signed } => {
            check(cx, warp, *a, mask);
            let a = warp.get(kernel, *a);
            for i in (0..32).filter(|i| mask >> i & 1 != 0) {
                out[i] = extend_to(how.apply(a[i]), *bits, *reg_bits, *signed);
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::CvtPack { to, how, d, a, b } => {
            check(cx, warp, *a, mask);
            check(cx, warp, *b, mask);
            let (a, b) = (warp.get(kernel, *a), warp.get(kernel, *b));
            for i in (0..32).filter(|i| mask >> i & 1 != 0) {
                out[i] = u64::from(crate::model::float::cvt_pair_from_f32(*to, a[i] as u32, b[i] as u32, *how));
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::Lop3 { d, a, b, c, table } => {
            for s in [a, b, c] {
                check(cx, warp, *s, mask);
            }
            let (a, b, c) = (warp.get(kernel, *a), warp.get(kernel, *b), warp.get(kernel, *c));
            for i in 0..32 {
                out[i] = u64::from(crate::alu_int::lop3(a[i] as u32, b[i] as u32, c[i] as u32, *table));
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::Bfi { d, a, b, pos, len, bits } => {
            for s in [a, b, pos, len] {
                check(cx, warp, *s, mask);
            }
            let (a, b) = (warp.get(kernel, *a), warp.get(kernel, *b));
            let (pos, len) = (warp.get(kernel, *pos), warp.get(kernel, *len));
            for i in 0..32 {
                out[i] = crate::alu_int::insert(a[i], b[i], pos[i] as u32, len[i] as u32, u32::from(*bits));
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::PredLogic { op, d, a, b } => {
            check_pred(cx, warp, *a, mask);
            check_pred(cx, warp, *b, mask);
            let bits = combine(*op, warp.pred(*a), warp.pred(*b));
            warp.put_pred(*d, bits, mask);
        }
        Op::PredMov { d, a } => {
            check_pred(cx, warp, *a, mask);
            let bits = warp.pred(*a);
            warp.put_pred(*d, bits, mask);
        }
        Op::PredConst { d, value } => warp.put_pred(*d, if *value { u32::MAX } else { 0 }, mask),
        Op::Pack { d, bits, parts } => {
            for (n, part) in parts.iter().enumerate() {
                check(cx, warp, *part, mask);
                let part = warp.get(kernel, *part);
                for i in 0..32 {
                    out[i] |= part[i] << (n as u32 * u32::from(*bits));
                }
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::Unpack { a, bits, parts } => {
            check(cx, warp, *a, mask);
            let a = *warp.get(kernel, *a);
            for (n, part) in parts.iter().enumerate() {
                let Some(d) = part else { continue };
                for i in 0..32 {
                    out[i] = a[i] >> (n as u32 * u32::from(*bits)) & crate::decode::mask(u32::from(*bits));
                }
                store(cx, warp, *d, &out, mask);
            }
        }
        Op::Clock { d, bits } => {
            let now = if *bits == 32 { cx.steps & 0xffff_ffff } else { cx.steps };
            store(cx, warp, *d, &[now; 32], mask);
        }
        Op::Cvta { d, a, space, to } => {
            check(cx, warp, *a, mask);
            let a = warp.get(kernel, *a);
            for i in 0..32 {
                out[i] = if *to { from_window(a[i]) } else { window::to_generic(*space, a[i]) };
            }
            store(cx, warp, *d, &out, mask);
        }
        Op::IsSpace { d, a, space } => {
            check(cx, warp, *a, mask);
            let a = *warp.get(kernel, *a);
            let bits = (0..32).fold(0, |m, i| m | u32::from(warp::in_space(*space, a[i])) << i);
            warp.put_pred(*d, bits, mask);
        }
        Op::Trap if mask != 0 => {
            cx.report(warp.site(), Some(mask.trailing_zeros()), Finding::Trap, "trap".into());
        }
        Op::Trap | Op::Nop => {}
        Op::Exit => return exit(cx, cl, w, mask),
        Op::ActiveMask { d } => {
            let active = warp.active;
            store(cx, warp, *d, &[u64::from(active); 32], mask);
        }
        Op::Shfl { .. } | Op::Vote { .. } | Op::Match { .. } | Op::Redux { .. } | Op::Elect { .. } => {
            return warp::collective(cx, warp, instr);
        }
        Op::BarWarp { members } => return warp::bar_warp(cx, warp, instr, *members),
        Op::Mapa { .. } | Op::CtaRank { .. } => warp::cluster_address(cx, warp, &instr.op, cl.ctas.len(), mask),
        Op::Bar { .. } => return barrier::block(cx, cl, w, instr),
        Op::ClusterArrive { release } => return barrier::cluster_arrive(cx, cl, w, instr, *release),
        Op::ClusterWait => return barrier::cluster_wait(cx, cl, w, instr),
        Op::Fence { wide } => memory::fence(warp, *wide),
        Op::ProxyFence { init } => {
            if *init {
                // a release of the initialisation: a relaxed arrive at the cluster barrier may carry it
                warp.fence_clock = Some(warp.clock.clone());
            }
            // The writes of this warp, and its completed cp.async, become visible to the asynchronous proxy.
            let (me, now) = (warp.component, warp.clock.get(warp.component));
            let copies = warp.clock.get(me + 1);
            warp.proxy_clock.raise(me, now);
            warp.proxy_clock.raise(me + 1, copies);
            warp.tick();
        }
        Op::Ld(access) => memory::load(cx, cl, w, access, mask),
        Op::St(access) => memory::store(cx, cl, w, access, mask),
        Op::Atom(atom) => memory::atomic(cx, cl, w, atom, mask),
        Op::Prefetch { addr } => {
            check(cx, warp, addr.base, mask);
        }
        Op::Discard { addr, bytes } => memory::discard(cx, cl, w, *addr, *bytes, mask),
        Op::CpAsync { .. } => copy::issue(cx, cl, w, &instr.op, mask),
        Op::CpCommit => copy::commit(warp, mask),
        Op::CpWait { pending } => copy::wait(cl, w, *pending, mask),
        Op::CpArrive { addr, noinc } => crate::hopper::later_arrive(cx, cl, w, *addr, *noinc, mask),
        Op::Mbarrier(op) => return crate::hopper::mbarrier(cx, cl, w, op, mask),
        Op::Bulk(op) => crate::hopper::issue(cx, cl, w, op, mask),
        Op::BulkCommit => crate::hopper::commit(cl, w, mask),
        Op::BulkWait { pending, read } => crate::hopper::bulk_wait(cx, cl, w, *pending, *read, mask),
        Op::StAsync { addr, mbar, bytes, regs } => {
            crate::hopper::peer_store(cx, cl, w, *addr, *mbar, usize::from(*bytes), regs, mask);
        }
        Op::WgmmaFence => return crate::hopper::wgmma_fence(cx, cl, w, instr),
        Op::WgmmaCommit => return crate::hopper::wgmma_commit(cx, cl, w, instr),
        Op::WgmmaWait { pending } => return crate::hopper::wgmma_wait(cx, cl, w, instr, *pending),
        Op::Wgmma(op) => return crate::hopper::wgmma(cx, cl, w, instr, op),
        Op::SetMaxNReg { inc, count } => {
            if let Err(flow) = aligned(cx, warp, instr) {
                return flow;
            }
            if !crate::hopper::set_registers(cx, cl, w, *inc, *count) {
                cx.uncount(instr.class, mask);
                return Flow::Hold;
            }
        }
        Op::LdMatrix { .. } | Op::StMatrix { .. } | Op::MovMatrix { .. } | Op::Mma(_) => {
            return matrix::execute(cx, cl, w, instr);
        }
    }
    Flow::Next
}

/// `cvta.to`: the address in the window, where a shared address keeps only what `ld.shared` needs.
fn from_window(address: u64) -> u64 {
    window::from_generic(address).1
}

fn extend_to(value: u64, bits: u8, reg_bits: u8, signed: bool) -> u64 {
    if !signed || bits == reg_bits {
        return value;
    }
    let shift = 64 - u32::from(bits);
    ((value << shift) as i64 >> shift) as u64 & crate::decode::mask(u32::from(reg_bits))
}

fn combine(op: BoolOp, a: u32, b: u32) -> u32 {
    match op {
        BoolOp::And => a & b,
        BoolOp::Or => a | b,
        BoolOp::Xor => a ^ b,
    }
}

fn setp(cx: &mut Cx<'_>, warp: &mut Warp, op: &Setp, mask: u32) {
    check(cx, warp, op.a, mask);
    check(cx, warp, op.b, mask);
    let yes = (op.f)(warp.get(cx.kernel, op.a), warp.get(cx.kernel, op.b));
    // `p = cmp op c`, `q = !cmp op c` (9.7.6.2)
    let (mut p, mut q) = (yes, !yes);
    if let Some((with, c)) = op.with {
        check_pred(cx, warp, c, mask);
        let c = warp.pred(c);
        (p, q) = (combine(with, p, c), combine(with, q, c));
    }
    if let Some(d) = op.p {
        warp.put_pred(d, p, mask);
    }
    if let Some(d) = op.q {
        warp.put_pred(d, q, mask);
    }
    if let Some((d, value)) = op.value {
        let out: Lanes = std::array::from_fn(|i| if p >> i & 1 != 0 { value } else { 0 });
        store(cx, warp, d, &out, mask);
    }
}

fn branch(cx: &mut Cx<'_>, warp: &mut Warp, target: u32, taken: u32) -> Flow {
    let stay = warp.active & !taken;
    if taken == 0 {
        return Flow::Next;
    }
    if stay == 0 {
        if target <= warp.pc && warp.other != u32::MAX {
            warp.loops += 1;
            if warp.loops >= warp.loop_limit {
                warp.pc = target;
                return Flow::Reselect;
            }
        }
        warp.pc = target;
        return if target < warp.other && cx.config.mode == Mode::LockStep { Flow::Jump } else { Flow::Reselect };
    }
    if warp.spin.is_none() {
        cx.counters.divergent_branches += 1;
    }
    for i in 0..32 {
        if taken >> i & 1 != 0 {
            warp.pcs[i] = target;
        } else if stay >> i & 1 != 0 {
            warp.pcs[i] = warp.pc + 1;
        }
    }
    warp.active = 0;
    Flow::Reselect
}

fn exit(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, mask: u32) -> Flow {
    let warp = &mut cl.warps[w];
    if mask == 0 {
        return Flow::Next;
    }
    if warp.waiting != 0 {
        // Lanes that end will not come to the collective that others wait at.
        let lane = warp.waiting.trailing_zeros();
        warp.pc = warp.pcs[lane as usize];
        let values = format!("lanes {mask:#010x} have exited");
        cx.report(warp.site(), Some(lane), Finding::DivergentCollective, values);
        return Flow::Hold;
    }
    let open = warp.cp_pending.iter().fold(0, |m, c| m | c.mask) & mask;
    if open != 0 {
        let values = "cp.async copies were not waited for".to_string();
        cx.report(warp.site(), Some(open.trailing_zeros()), Finding::OpenGroupsAtExit, values);
    }
    crate::hopper::check_exit(cx, cl, w, mask);
    let warp = &mut cl.warps[w];
    warp.live &= !mask;
    for i in 0..32 {
        if warp.active & !mask & 1 << i != 0 {
            warp.pcs[i] = warp.pc + 1;
        }
    }
    warp.active = 0;
    if warp.live != 0 {
        return Flow::Reselect;
    }
    warp.hold = Hold::Exited;
    cl.running -= 1;
    barrier::warp_exited(cx, cl, w);
    Flow::Hold
}
