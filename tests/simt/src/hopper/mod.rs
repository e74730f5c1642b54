//! The asynchronous half of the machine (sm_90): mbarriers, bulk and tensor copies, wgmma.
//!
//! Transfers sit in a list until the engine, one more party of the scheduler, performs one. Data therefore arrives at a random
//! time, and under every third seed only when no warp can go on without it: as late as legal.

mod bulk;
mod mbarrier;
mod wgmma;

use std::collections::VecDeque;

use crate::clock::{Clock, Tag};
use crate::finding::Finding;
use crate::op::{Kernel, Reg};
use crate::sim::REGISTERS;
use crate::state::{Cluster, Cx, Hold, Site};

pub(crate) use bulk::{commit, issue, peer_store, wait as bulk_wait};
pub(crate) use mbarrier::{execute as mbarrier, later_arrive};
pub(crate) use wgmma::{commit as wgmma_commit, fence as wgmma_fence, issue as wgmma, wait as wgmma_wait};

/// A wait on an mbarrier that has not succeeded yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub cta: usize,
    pub index: usize,
    /// Succeeds once this many phases are complete, while the parity is right.
    pub until: u64,
    /// The phase is complete; the warp has not looked since.
    pub ready: bool,
    pub pc: u32,
}

/// A bulk store that its thread has not waited for.
#[derive(Debug)]
pub(crate) struct BulkRecord {
    pub id: u64,
    pub lane: usize,
    /// Commits of the lane before it.
    pub group: u32,
    pub seq: u32,
    /// A `wait_group.read` has seen its source free; the destination is still open.
    pub read: bool,
}

/// Per warp.
#[derive(Debug, Default)]
pub(crate) struct WarpState {
    /// Between `barrier.cluster.arrive` and `.wait`.
    pub cluster_arrived: bool,
    pub cluster_phase: u64,
    pub waiting: Option<Waiting>,
    /// Phases seen complete, per (block, mbarrier).
    pub seen: Vec<(usize, usize, u64)>,
    pub bulk_commits: [u32; 32],
    pub bulk_seq: u32,
    pub bulks: Vec<BulkRecord>,
    /// `wgmma`: counter of the open group, committed groups, registers in flight.
    pub wgmma_seq: u32,
    pub wgmma_groups: VecDeque<u32>,
    pub wgmma_regs: VecDeque<(u32, Vec<Reg>)>,
    /// Number of `wgmma.fence`s, and that number when each register was last written.
    pub fences: u32,
    pub written: Vec<u32>,
    /// Registers per thread.
    pub registers: u32,
}

impl WarpState {
    pub(crate) fn new(kernel: &Kernel, threads: u32) -> Self {
        let written = if kernel.uses.wgmma { vec![0; kernel.num_regs] } else { vec![] };
        let registers = kernel.maxnreg.unwrap_or((REGISTERS / threads.next_multiple_of(128).max(1)).min(255) & !7);
        WarpState { bulk_seq: 1, wgmma_seq: 1, written, registers, ..WarpState::default() }
    }

    /// A register was written by an ordinary instruction.
    pub(crate) fn touched(&mut self, d: Reg) {
        if let Some(written) = self.written.get_mut(d as usize) {
            *written = self.fences + 1;
        }
    }
}

/// An mbarrier object.
#[derive(Debug)]
pub(crate) struct Mbarrier {
    pub offset: u32,
    pub valid: bool,
    /// Arrivals per phase, and those missing in this one.
    pub count: u32,
    pub missing: i64,
    pub tx: i64,
    pub completed: u64,
    /// Component of the transfers that signal it; its counter is the number of completed phases plus one.
    pub component: u32,
    pub counter: u32,
    pub init: Tag,
    pub clock: Clock,
    pub proxy_clock: Clock,
    pub done_clock: Clock,
    pub done_proxy_clock: Clock,
    /// The last instruction that expected bytes.
    pub expected_at: Option<Site>,
}

/// Per block.
#[derive(Debug)]
pub(crate) struct CtaState {
    pub mbarriers: Vec<Mbarrier>,
    /// Number + 1 of the mbarrier at each multiple of 8 bytes.
    pub slots: Vec<u16>,
    /// Registers given back by `setmaxnreg.dec`.
    pub pool: u32,
}

impl CtaState {
    pub(crate) fn new(smem: usize) -> Self {
        CtaState { mbarriers: vec![], slots: vec![0; smem / 8 + 1], pool: 0 }
    }

    pub(crate) fn find(&self, offset: usize) -> Option<usize> {
        let n = *self.slots.get(offset / 8)? as usize;
        n.checked_sub(1).filter(|&i| self.mbarriers[i].valid)
    }
}

/// The barrier of a cluster.
#[derive(Debug, Default)]
pub(crate) struct ClusterBarrier {
    pub phase: u64,
    pub arrived: usize,
    pub clock: Clock,
    pub proxy_clock: Clock,
    /// Clocks of the phase that completed last.
    pub done_clock: Clock,
    pub done_proxy_clock: Clock,
}

/// Per cluster.
#[derive(Debug, Default)]
pub(crate) struct ClusterState {
    pub barrier: ClusterBarrier,
    pub transfers: Vec<bulk::Transfer>,
    pub next_id: u64,
    /// Polls that failed since anything happened.
    pub idle_polls: u64,
}

/// Polls without any event after which the cluster counts as dead.
const MAX_IDLE_POLLS: u64 = 200_000;

/// Operations under way that the engine could complete.
pub(crate) fn pending(cl: &Cluster) -> usize {
    cl.hopper.transfers.len()
}

/// Does the engine hold back while warps can run?
pub(crate) fn late(cx: &Cx<'_>) -> bool {
    cx.config.seed % 3 == 1
}

/// One step of the engine: completes a transfer.
pub(crate) fn step(cx: &mut Cx<'_>, cl: &mut Cluster) {
    let which = cx.rng.below(cl.hopper.transfers.len());
    let transfer = cl.hopper.transfers.swap_remove(which);
    cl.hopper.idle_polls = 0;
    bulk::complete(cx, cl, transfer);
}

/// A poll failed: is everybody only polling?
pub(crate) fn idle_poll(cx: &mut Cx<'_>, cl: &mut Cluster, site: Site) {
    cl.hopper.idle_polls += 1;
    if cl.hopper.idle_polls > MAX_IDLE_POLLS && cl.hopper.transfers.is_empty() {
        let values = "warps poll mbarriers and nothing is under way that could complete one".to_string();
        cx.report(site, None, Finding::Deadlock, values);
    }
}

/// All warps of the cluster have ended: is anything left to do? Checks what must not be left open.
pub(crate) fn finish(cx: &mut Cx<'_>, cl: &mut Cluster) -> bool {
    if let Some(load) = cl.hopper.transfers.iter().find(|t| t.signals()) {
        let values = "the block has ended before this transfer".to_string();
        cx.report(load.site, None, Finding::OpenTransactionsAtExit, values);
        return true;
    }
    if !cl.hopper.transfers.is_empty() {
        return false;
    }
    for cta in &cl.ctas {
        for m in cta.hopper.mbarriers.iter().filter(|m| m.valid && m.tx != 0) {
            let site = m.expected_at.unwrap_or(Site { block: cta.block, warp: 0, pc: 0 });
            let values = format!("the mbarrier at {:#x} still expects {} bytes", m.offset, m.tx);
            cx.report(site, None, Finding::OpenTransactionsAtExit, values);
        }
    }
    true
}

/// Bulk copies and wgmmas of these lanes that were not waited for.
pub(crate) fn check_exit(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, mask: u32) {
    let warp = &cl.warps[w];
    if let Some(b) = warp.hopper.bulks.iter().find(|b| mask >> b.lane & 1 != 0 && !b.read) {
        let values = "bulk copies were not waited for".to_string();
        cx.report(warp.site(), Some(b.lane as u32), Finding::OpenGroupsAtExit, values);
    }
    if !warp.hopper.wgmma_regs.is_empty() {
        let values = "wgmma operations were not waited for".to_string();
        cx.report(warp.site(), None, Finding::OpenGroupsAtExit, values);
    }
}

/// `setmaxnreg` (9.7.20.5). True if the warp can go on.
pub(crate) fn set_registers(cx: &mut Cx<'_>, cl: &mut Cluster, w: usize, inc: bool, count: u32) -> bool {
    let warp = &mut cl.warps[w];
    let cta = &mut cl.ctas[warp.cta];
    let have = warp.hopper.registers;
    if inc != (count >= have) && count != have {
        let text = format!("from {have} to {count} registers with the wrong direction");
        cx.report(warp.site(), None, Finding::RegistersExceeded, text);
        return true;
    }
    if !inc {
        cta.hopper.pool += (have - count) * 32;
        warp.hopper.registers = count;
        let block = warp.cta;
        for other in cl.warps.iter_mut().filter(|o| o.cta == block) {
            if matches!(other.hold, Hold::Registers(_)) {
                other.hold = Hold::None;
            }
        }
        return true;
    }
    let need = (count - have) * 32;
    if cta.hopper.pool < need {
        warp.hold = Hold::Registers(count);
        return false;
    }
    cta.hopper.pool -= need;
    warp.hopper.registers = count;
    true
}
