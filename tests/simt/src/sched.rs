//! The scheduler: which cluster, which warp, for how long. Everything random comes from the seed.

use std::collections::BTreeMap;

use crate::exec;
use crate::finding::Finding;
use crate::state::{Cluster, Cx, Hold, Warp};

/// Runs the whole grid.
pub(crate) fn run(cx: &mut Cx<'_>) {
    let (grid, cluster) = (cx.config.grid, cx.config.cluster);
    let counts: [u32; 3] = std::array::from_fn(|i| grid[i] / cluster[i]);
    let total = counts.iter().map(|c| *c as usize).product::<usize>();
    let mut order: Vec<u32> = (0..total as u32).collect();
    for i in (1..total).rev() {
        order.swap(i, cx.rng.below(i + 1));
    }
    let mut order = order.into_iter();
    let mut resident: Vec<Cluster> = vec![];
    loop {
        while resident.len() < cx.config.resident.max(1) {
            let Some(n) = order.next() else { break };
            let at = [n % counts[0], n / counts[0] % counts[1], n / (counts[0] * counts[1])];
            resident.push(Cluster::new(cx, std::array::from_fn(|i| at[i] * cluster[i])));
        }
        if resident.is_empty() {
            return;
        }
        let which = cx.rng.below(resident.len());
        turn(cx, &mut resident[which]);
        if cx.dead {
            return;
        }
        if resident[which].running == 0 && crate::hopper::finish(cx, &mut resident[which]) {
            for cta in resident.swap_remove(which).ctas {
                let mut shared = cta.shared;
                shared.reset();
                cx.shared_pool.push(shared);
            }
        }
    }
}

/// One turn of one cluster: a warp runs for a while, or the asynchronous engine makes a step.
fn turn(cx: &mut Cx<'_>, cl: &mut Cluster) {
    // Stay with a cluster for some turns: its state is warm.
    for _ in 0..16 {
        let pending = crate::hopper::pending(cl);
        let count = cl.warps.len();
        let start = cx.rng.below(count);
        let ready = (0..count).map(|i| (start + i) % count).find(|&i| cl.warps[i].ready() != 0);
        match ready {
            Some(_) if pending > 0 && cx.rng.below(if crate::hopper::late(cx) { 256 } else { 8 }) == 0 => {
                crate::hopper::step(cx, cl)
            }
            Some(w) => {
                let quantum = 1 + cx.rng.below(200);
                exec::run(cx, cl, w, quantum);
            }
            None if pending > 0 => crate::hopper::step(cx, cl),
            None if cl.running == 0 => return,
            None => {
                deadlock(cx, cl);
                return;
            }
        }
        if cx.dead {
            return;
        }
    }
}

/// Nothing in the cluster can go on: says why.
fn deadlock(cx: &mut Cx<'_>, cl: &mut Cluster) {
    let exited = cl.warps.iter().filter(|w| w.hold == Hold::Exited).count();
    let values = whereabouts(cx, cl);
    for warp in cl.warps.iter_mut().filter(|w| w.hold != Hold::Exited) {
        warp.pc = stands(warp, warp.live.trailing_zeros() as usize);
    }
    let Some(warp) = cl.warps.iter().find(|w| w.hold != Hold::Exited) else { return };
    // Partners that have exited, or a barrier that a part of the warps never reaches.
    let finding = match warp.hold {
        Hold::Barrier(_) if exited > 0 => Finding::BarrierMisuse,
        Hold::Registers(_) => Finding::RegistersExceeded,
        _ => Finding::Deadlock,
    };
    cx.report(warp.site(), None, finding, values);
}

/// Where a lane of a warp that does not run stands. A warp held by a barrier stands behind it already.
fn stands(warp: &Warp, lane: usize) -> u32 {
    match warp.hold {
        Hold::None if warp.active >> lane & 1 != 0 => warp.pc,
        Hold::None => warp.pcs[lane],
        Hold::Barrier(_) | Hold::Cluster => warp.pc.saturating_sub(1),
        Hold::Registers(_) | Hold::Exited => warp.pc,
    }
}

/// Where the warps of a cluster stand, their lanes apart if they are apart; of many warps the first.
pub(crate) fn whereabouts(cx: &Cx<'_>, cl: &Cluster) -> String {
    let exited = cl.warps.iter().filter(|w| w.hold == Hold::Exited).count();
    let mut text = format!("{} warps are left, {exited} have exited", cl.warps.len() - exited);
    for warp in cl.warps.iter().filter(|w| w.hold != Hold::Exited).take(8) {
        let mut groups: BTreeMap<u32, u32> = BTreeMap::new();
        for lane in (0..32).filter(|lane| warp.live >> lane & 1 != 0) {
            *groups.entry(cx.kernel.code[stands(warp, lane) as usize].line).or_default() |= 1 << lane;
        }
        text += &format!("; block {:?} warp {}", warp.block, warp.id);
        for (line, lanes) in groups {
            let state = match warp.hold {
                Hold::None if lanes & warp.parked != 0 => "waits for an mbarrier".to_string(),
                Hold::None if lanes & warp.waiting != 0 => "waits for the other lanes".to_string(),
                Hold::None => "runs".to_string(),
                Hold::Barrier(number) => format!("waits at barrier {number}"),
                Hold::Cluster => "waits at the cluster barrier".to_string(),
                Hold::Registers(n) => format!("waits for {n} registers"),
                Hold::Exited => String::new(),
            };
            let which = if lanes == warp.live { String::new() } else { format!(", lanes {lanes:#010x}") };
            text += &format!("{which} at line {line} ({state})");
        }
    }
    text
}
