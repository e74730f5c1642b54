//! The asynchronous half of the machine (sm_90): mbarriers, bulk and tensor copies, wgmma.

use crate::clock::Clock;
use crate::op::{Kernel, Reg};
use crate::state::{Cluster, Cx};

/// Per warp.
#[derive(Debug, Default)]
pub(crate) struct WarpState {
    /// Between `barrier.cluster.arrive` and `.wait`.
    pub cluster_arrived: bool,
    pub cluster_phase: u64,
}

impl WarpState {
    /// A register was written by an ordinary instruction.
    pub(crate) fn touched(&mut self, _d: Reg) {}
}

/// Per block.
#[derive(Debug)]
pub(crate) struct CtaState {}

impl CtaState {
    pub(crate) fn new(_kernel: &Kernel, _threads: u32) -> Self {
        CtaState {}
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
}

/// Operations under way that the engine could complete.
pub(crate) fn pending(_cl: &Cluster) -> usize {
    0
}

/// One step of the engine.
pub(crate) fn step(_cx: &mut Cx<'_>, _cl: &mut Cluster) {}

/// All warps of the cluster have ended: is anything left to do? Checks what must not be left open.
pub(crate) fn finish(_cx: &mut Cx<'_>, _cl: &mut Cluster) -> bool {
    true
}
