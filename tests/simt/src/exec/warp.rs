//! Instructions that exchange values between the lanes of a warp (PTX ISA 9.7.9.6, 9.7.13.4 to 9.7.13.15).

use super::{Flow, check, check_pred, gather, store};
use crate::finding::Finding;
use crate::op::{AtomOp, Instr, Lanes, Op, ShflMode, Space, Src, VoteMode};
use crate::state::{Cx, Warp};
use crate::window;

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |i| mask >> i & 1 != 0)
}

/// Brings together the lanes that a member mask names; the lanes that execute, or what to do instead.
fn meet(cx: &mut Cx<'_>, warp: &mut Warp, instr: &Instr, members: Src) -> Result<u32, Flow> {
    check(cx, warp, members, warp.active);
    let values = *warp.get(cx.kernel, members);
    let need = lanes(warp.active).fold(0, |m, i| m | values[i] as u32);
    if !gather(warp, need) {
        return Err(Flow::Reselect);
    }
    let mask = match instr.guard {
        Some(p) => warp.active & warp.pred(p),
        None => warp.active,
    };
    check(cx, warp, members, mask);
    for i in lanes(mask) {
        let named = values[i] as u32;
        let missing =
            named & warp.live & !lanes(mask).filter(|&j| values[j] as u32 == named).fold(0, |m, j| m | 1 << j);
        if missing != 0 || named >> i & 1 == 0 {
            let text = if missing != 0 {
                format!("the member mask {named:#010x} names lanes {missing:#010x}, which do not execute this")
            } else {
                format!("the member mask {named:#010x} does not name the lane itself")
            };
            cx.report(warp.site(), Some(i as u32), Finding::DivergentCollective, text);
            return Err(Flow::Hold);
        }
    }
    Ok(mask)
}

pub(super) fn bar_warp(cx: &mut Cx<'_>, warp: &mut Warp, instr: &Instr, members: Src) -> Flow {
    match meet(cx, warp, instr, members) {
        Ok(mask) => {
            warp.meet_lanes(mask);
            Flow::Next
        }
        Err(flow) => flow,
    }
}

pub(super) fn collective(cx: &mut Cx<'_>, warp: &mut Warp, instr: &Instr) -> Flow {
    let members = match &instr.op {
        Op::Shfl { members, .. }
        | Op::Vote { members, .. }
        | Op::Match { members, .. }
        | Op::Redux { members, .. }
        | Op::Elect { members, .. } => *members,
        _ => unreachable!("not a collective"),
    };
    let mask = match meet(cx, warp, instr, members) {
        Ok(mask) => mask,
        Err(flow) => return flow,
    };
    let groups = *warp.get(cx.kernel, members);
    let mut out = [0u64; 32];
    let mut bits = 0;
    let mut rest = mask;
    while rest != 0 {
        let named = groups[rest.trailing_zeros() as usize] as u32;
        let group = named & mask;
        rest &= !group;
        one_group(cx, warp, &instr.op, group, &mut out, &mut bits);
    }
    match instr.op {
        Op::Shfl { d, p, .. } | Op::Match { d, p, .. } => {
            store(cx, warp, d, &out, mask);
            if let Some(p) = p {
                warp.put_pred(p, bits, mask);
            }
        }
        Op::Vote { mode: VoteMode::Ballot, d, .. } | Op::Redux { d, .. } => store(cx, warp, d, &out, mask),
        Op::Vote { d, .. } => warp.put_pred(d, bits, mask),
        Op::Elect { d, p, .. } => {
            if let Some(d) = d {
                store(cx, warp, d, &out, mask);
            }
            warp.put_pred(p, bits, mask);
        }
        _ => {}
    }
    Flow::Next
}

fn one_group(cx: &mut Cx<'_>, warp: &Warp, op: &Op, group: u32, out: &mut Lanes, bits: &mut u32) {
    let kernel = cx.kernel;
    match op {
        Op::Shfl { mode, a, b, c, .. } => {
            check(cx, warp, *a, group);
            check(cx, warp, *b, group);
            check(cx, warp, *c, group);
            let (a, b, c) = (warp.get(kernel, *a), warp.get(kernel, *b), warp.get(kernel, *c));
            for lane in lanes(group) {
                let (by, clamp, segment) = (b[lane] as i32 & 31, c[lane] as i32 & 31, c[lane] as i32 >> 8 & 31);
                let me = lane as i32;
                let max = me & segment | clamp & !segment;
                let (from, inside) = match mode {
                    ShflMode::Up => (me - by, me - by >= max),
                    ShflMode::Down => (me + by, me + by <= max),
                    ShflMode::Bfly => (me ^ by, me ^ by <= max),
                    ShflMode::Idx => {
                        let j = me & segment | by & !segment;
                        (j, j <= max)
                    }
                };
                let from = if inside { from as usize & 31 } else { lane };
                if group >> from & 1 == 0 {
                    let values = format!("reads lane {from}, which does not take part");
                    cx.report(warp.site(), Some(lane as u32), Finding::DivergentCollective, values);
                }
                out[lane] = a[from];
                *bits |= u32::from(inside) << lane;
            }
        }
        Op::Vote { mode, a, .. } => {
            check_pred(cx, warp, *a, group);
            let yes = warp.pred(*a) & group;
            let result = match mode {
                VoteMode::All => yes == group,
                VoteMode::Any => yes != 0,
                VoteMode::Uni => yes == group || yes == 0,
                VoteMode::Ballot => false,
            };
            for lane in lanes(group) {
                out[lane] = u64::from(yes);
                *bits |= u32::from(result) << lane;
            }
        }
        Op::Match { all, a, .. } => {
            check(cx, warp, *a, group);
            let a = warp.get(kernel, *a);
            for lane in lanes(group) {
                let same = lanes(group).filter(|&i| a[i] == a[lane]).fold(0u32, |m, i| m | 1 << i);
                let found = !all || same == group;
                out[lane] = if found { u64::from(same) } else { 0 };
                *bits |= u32::from(found) << lane;
            }
        }
        Op::Redux { op, signed, a, .. } => {
            check(cx, warp, *a, group);
            let a = warp.get(kernel, *a);
            let values = lanes(group).map(|i| a[i] as u32);
            let join = |x: u32, y: u32| match (op, signed) {
                (AtomOp::Add, _) => x.wrapping_add(y),
                (AtomOp::Min, true) => (x as i32).min(y as i32) as u32,
                (AtomOp::Max, true) => (x as i32).max(y as i32) as u32,
                (AtomOp::Min, false) => x.min(y),
                (AtomOp::Max, false) => x.max(y),
                (AtomOp::And, _) => x & y,
                (AtomOp::Or, _) => x | y,
                _ => x ^ y,
            };
            let result = u64::from(values.reduce(join).unwrap_or(0));
            for lane in lanes(group) {
                out[lane] = result;
            }
        }
        _ => {
            let leader = group.trailing_zeros();
            for lane in lanes(group) {
                out[lane] = u64::from(leader);
            }
            *bits |= 1 << leader;
        }
    }
}

/// `isspacep`: does a generic address lie in the window of a space?
pub(super) fn in_space(space: Space, address: u64) -> bool {
    let (have, at) = window::from_generic(address);
    match space {
        // the window of the own block is part of that of the cluster
        Space::Shared => have == Space::SharedCluster && at >> window::RANK_SHIFT == 0,
        Space::Const => false,
        other => have == other,
    }
}

/// `mapa`, `getctarank` (9.7.9.23, 9.7.9.24).
pub(super) fn cluster_address(cx: &mut Cx<'_>, warp: &mut Warp, op: &Op, ctas: usize, mask: u32) {
    let kernel = cx.kernel;
    let mut out = [0u64; 32];
    let offset_mask = (1u64 << window::RANK_SHIFT) - 1;
    match *op {
        Op::Mapa { d, a, b, generic } => {
            check(cx, warp, a, mask);
            check(cx, warp, b, mask);
            let (a, b) = (*warp.get(kernel, a), *warp.get(kernel, b));
            for i in lanes(mask) {
                if b[i] as usize >= ctas {
                    let values = format!("block {} of a cluster of {ctas}", b[i]);
                    cx.report(warp.site(), Some(i as u32), Finding::OutOfBounds, values);
                }
                let base = if generic { window::SHARED } else { 0 };
                out[i] = base + ((b[i] + 1) << window::RANK_SHIFT) + (a[i] & offset_mask);
            }
            store(cx, warp, d, &out, mask);
        }
        Op::CtaRank { d, a, generic } => {
            check(cx, warp, a, mask);
            let a = *warp.get(kernel, a);
            for i in lanes(mask) {
                let at = if generic { window::from_generic(a[i]).1 } else { a[i] };
                out[i] = match at >> window::RANK_SHIFT {
                    0 => warp.cta as u64,
                    rank => rank - 1,
                };
            }
            store(cx, warp, d, &out, mask);
        }
        _ => {}
    }
}
