//! The state of a running launch: warps, blocks, clusters, and what they share.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::clock::{Clock, Tag};
use crate::counters::Counters;
use crate::finding::{Finding, Found, Mode, Severity};
use crate::global::Global;
use crate::model::approx::Approx;
use crate::model::mma::{Numerics, Scratch};
use crate::op::{Kernel, Lanes, PredSrc, Reg, Space, Special, Src};
use crate::shadow::{GlobalShadow, Shared};
use crate::window;

/// Everything a launch is told.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub dynamic_smem: u32,
    pub seed: u64,
    pub mode: Mode,
    pub numerics: Numerics,
    pub max_steps: u64,
    /// Clusters in flight at a time.
    pub resident: usize,
}

/// A small generator: splitmix64.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (((self.next() >> 32) * n as u64) >> 32) as usize
    }
}

/// What belongs to the launch as a whole.
pub(crate) struct Cx<'a> {
    pub kernel: &'a Kernel,
    pub config: &'a Config,
    pub global: &'a mut Global,
    pub params: &'a [u8],
    pub rng: Rng,
    pub counters: Counters,
    pub found: Vec<Found>,
    /// A fatal finding: stop.
    pub dead: bool,
    pub approx: Approx,
    pub steps: u64,
    /// The current instruction is in the counters.
    pub counted: bool,
    pub scratch: Scratch,
    pub tiles: [Vec<u32>; 4],
    /// Shared memories of blocks that have ended, for those to come.
    pub shared_pool: Vec<Shared>,
    /// Blocks known to whoever acquires at this global address.
    pub released: HashMap<u64, HashSet<u32>>,
}

/// Where an instruction runs, for reports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    pub block: [u32; 3],
    pub warp: u32,
    pub pc: u32,
}

/// At most this many different findings are kept.
const MAX_FOUND: usize = 64;

impl Cx<'_> {
    /// Takes the current instruction out of the counters again: a poll that failed.
    pub(crate) fn uncount(&mut self, class: crate::op::Class, lanes: u32) {
        if std::mem::take(&mut self.counted) {
            self.counters.uncount(class, lanes);
        }
    }

    /// Records a finding; a fatal one ends the run.
    #[cold]
    pub(crate) fn report(&mut self, site: Site, lane: Option<u32>, finding: Finding, values: String) {
        self.dead |= finding.severity() == Severity::Fatal;
        let line = self.kernel.code[site.pc as usize].line;
        if let Some(found) = self.found.iter_mut().find(|f| f.finding == finding && f.line == line) {
            found.count += 1;
            return;
        }
        if self.found.len() >= MAX_FOUND {
            self.dead = true;
            return;
        }
        let source = &self.kernel.source;
        self.found.push(Found {
            finding,
            kernel: self.kernel.name.clone(),
            file: source.file.clone(),
            line,
            text: source.lines.get(line as usize - 1).cloned().unwrap_or_default(),
            block: site.block,
            warp: site.warp,
            lane,
            values,
            count: 1,
        });
    }
}

/// What a component of the clocks stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Party {
    Warp {
        cta: u32,
        warp: u32,
    },
    CpAsync {
        cta: u32,
        warp: u32,
    },
    Wgmma {
        cta: u32,
        warp: u32,
    },
    Bulk {
        cta: u32,
        warp: u32,
    },
    /// Transfers that signal an mbarrier, and the mbarrier object itself.
    Mbarrier {
        cta: u32,
        address: u32,
    },
}

impl Party {
    /// Does it access memory through the generic proxy?
    pub(crate) fn is_generic(self) -> bool {
        matches!(self, Party::Warp { .. } | Party::CpAsync { .. })
    }

    pub(crate) fn is_async(self) -> bool {
        !matches!(self, Party::Warp { .. })
    }
}

impl std::fmt::Display for Party {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Party::Warp { cta, warp } => write!(f, "warp {warp} of block rank {cta}"),
            Party::CpAsync { cta, warp } => write!(f, "a cp.async of warp {warp} of block rank {cta}"),
            Party::Wgmma { cta, warp } => write!(f, "a wgmma of warp {warp} of block rank {cta}"),
            Party::Bulk { cta, warp } => write!(f, "a bulk copy of warp {warp} of block rank {cta}"),
            Party::Mbarrier { cta, address } => {
                write!(f, "a transfer that signals the mbarrier at {address:#x} of block rank {cta}")
            }
        }
    }
}

/// Why a whole warp does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    None,
    /// In a barrier of the block.
    Barrier(u8),
    /// In `barrier.cluster.wait`.
    Cluster,
    /// In `setmaxnreg.inc`, for this many registers per thread.
    Registers(u32),
    /// Waits for the other warps of its warpgroup.
    Exited,
}

/// One `cp.async` instruction of a warp whose wait has not come yet.
#[derive(Debug)]
pub(crate) struct PendingCopy {
    /// Lanes that have not waited for it.
    pub mask: u32,
    pub bytes: u8,
    /// Commits of each lane before it.
    pub group: [u32; 32],
    /// Counter of its tag.
    pub seq: [u32; 32],
    pub dst: [u32; 32],
    /// What will land; `None` if it has landed already.
    pub data: Option<Box<[u8; 512]>>,
}

/// A warp of 32 lanes.
pub(crate) struct Warp {
    /// In its block.
    pub id: u32,
    /// Index of its block in the cluster.
    pub cta: usize,
    pub block: [u32; 3],
    pub component: u32,
    pub regs: Vec<Lanes>,
    /// Lanes in which a register has a value.
    pub init: Vec<u32>,
    pub preds: Vec<u32>,
    pub pred_init: Vec<u32>,
    /// Program counters; those of active lanes are stale, `pc` holds.
    pub pcs: [u32; 32],
    pub pc: u32,
    pub live: u32,
    pub active: u32,
    /// Lanes that wait at a warp-level collective for others.
    pub waiting: u32,
    /// Lanes that wait for an mbarrier.
    pub parked: u32,
    /// The lowest program counter of lanes that could run instead: meeting it means a chance to join.
    pub other: u32,
    /// Jumps back since other lanes ran that could run now, and how many are too many.
    pub loops: u32,
    pub loop_limit: u32,
    pub hold: Hold,
    pub clock: Clock,
    /// What lanes did before their warp's counter reached this is ordered before each lane.
    pub lane_seen: [u32; 32],
    /// What the asynchronous proxy may rely on.
    pub proxy_clock: Clock,
    /// The clock at the last thread fence: what a relaxed store releases.
    pub fence_clock: Option<Clock>,
    /// What relaxed loads have seen: acquired at the next fence.
    pub pending_acquire: Clock,
    /// A fence of gpu scope since the last store to global memory.
    pub fenced_wide: bool,
    /// The group of `wgmma`s in flight that owns a register, or 0.
    pub busy: Vec<u32>,
    /// Writes to registers are watched: the kernel has a `wgmma`.
    pub any_busy: bool,
    pub local: Vec<u8>,
    pub local_init: Vec<bool>,
    /// `cp.async`: commits so far and counter of new copies, per lane; copies not waited for.
    pub cp_commits: [u32; 32],
    pub cp_seq: [u32; 32],
    pub cp_pending: VecDeque<PendingCopy>,
    /// The instruction whose failed poll began a stretch that is not counted.
    pub spin: Option<(u32, u32)>,
    pub hopper: crate::hopper::WarpState,
}

/// A barrier of a block.
#[derive(Debug, Default)]
pub(crate) struct Bar {
    pub expected: u32,
    pub arrived: u32,
    pub arrived_warps: u64,
    pub waiting: Vec<usize>,
    pub clock: Clock,
    pub proxy_clock: Clock,
    pub all: bool,
    pub any: bool,
    pub count: u32,
    pub reduces: bool,
}

/// A block.
pub(crate) struct Cta {
    pub block: [u32; 3],
    pub linear: u32,
    pub shared: Shared,
    pub bars: Vec<Bar>,
    pub num_warps: usize,
    /// Other blocks whose writes are ordered before this block's accesses.
    pub known: HashSet<u32>,
    pub hopper: crate::hopper::CtaState,
}

/// A cluster of blocks; a single block where there are none.
pub(crate) struct Cluster {
    pub warps: Vec<Warp>,
    pub ctas: Vec<Cta>,
    pub parties: Vec<Party>,
    /// Clocks released at shared or global addresses.
    pub sync: HashMap<u64, Clock>,
    /// Who touched which global memory.
    pub global: GlobalShadow,
    pub running: usize,
    pub hopper: crate::hopper::ClusterState,
}

impl Warp {
    #[inline]
    pub(crate) fn get<'b>(&'b self, kernel: &'b Kernel, src: Src) -> &'b Lanes {
        if src.0 & Src::CONST != 0 {
            &kernel.consts[(src.0 & !Src::CONST) as usize]
        } else {
            &self.regs[src.0 as usize]
        }
    }

    /// Stores a result in the lanes of `mask`.
    #[inline]
    pub(crate) fn put(&mut self, d: Reg, values: &Lanes, mask: u32) {
        let reg = &mut self.regs[d as usize];
        if mask == u32::MAX {
            *reg = *values;
        } else {
            for i in 0..32 {
                if mask >> i & 1 != 0 {
                    reg[i] = values[i];
                }
            }
        }
        self.init[d as usize] |= mask;
    }

    pub(crate) fn pred(&self, p: PredSrc) -> u32 {
        let bits = self.preds[p.reg as usize];
        if p.negated { !bits } else { bits }
    }

    #[inline]
    pub(crate) fn put_pred(&mut self, p: u16, bits: u32, mask: u32) {
        let reg = &mut self.preds[p as usize];
        *reg = *reg & !mask | bits & mask;
        self.pred_init[p as usize] |= mask;
    }

    /// The tag of an access by this warp now.
    #[inline]
    pub(crate) fn tag(&self) -> Tag {
        Tag::new(self.component, self.clock.get(self.component))
    }

    /// After a release: later accesses are not covered by it.
    pub(crate) fn tick(&mut self) {
        let now = self.clock.get(self.component);
        self.clock.set(self.component, now + 1);
    }

    /// The lanes of `mask` have synchronised with the rest of their warp: what any lane has done is ordered before what they do.
    pub(crate) fn meet_lanes(&mut self, mask: u32) {
        self.tick();
        let now = self.clock.get(self.component);
        for (lane, seen) in self.lane_seen.iter_mut().enumerate() {
            if mask >> lane & 1 != 0 {
                *seen = now;
            }
        }
    }

    pub(crate) fn site(&self) -> Site {
        Site { block: self.block, warp: self.id, pc: self.pc }
    }

    /// Lanes that could run now.
    pub(crate) fn ready(&self) -> u32 {
        if self.hold == Hold::None { self.live & !self.waiting & !self.parked } else { 0 }
    }
}

impl Cluster {
    /// Builds the cluster whose first block has the coordinates `origin`.
    pub(crate) fn new(cx: &mut Cx<'_>, origin: [u32; 3]) -> Cluster {
        let (kernel, config) = (cx.kernel, cx.config);
        let [cw, ch, cd] = config.cluster;
        let threads = config.block.iter().product::<u32>();
        let num_warps = threads.div_ceil(32) as usize;
        let smem = kernel.static_smem + config.dynamic_smem;
        let mut cluster = Cluster {
            warps: vec![],
            ctas: vec![],
            parties: vec![],
            sync: HashMap::new(),
            global: GlobalShadow::default(),
            running: 0,
            hopper: crate::hopper::ClusterState::default(),
        };
        for rank in 0..cw * ch * cd {
            let inside = [rank % cw, rank / cw % ch, rank / (cw * ch)];
            let block: [u32; 3] = std::array::from_fn(|i| origin[i] + inside[i]);
            let linear = block[0] + config.grid[0] * (block[1] + config.grid[1] * block[2]);
            // Shared memory begins with whatever was there: noise, or what an earlier block left.
            let shared = cx.shared_pool.pop().unwrap_or_else(|| {
                let mut shared = Shared::new(smem as usize);
                let mut noise = Rng(config.seed ^ (u64::from(linear) << 20));
                for chunk in shared.data.chunks_mut(8) {
                    let bytes = noise.next().to_le_bytes();
                    chunk.copy_from_slice(&bytes[..chunk.len()]);
                }
                shared
            });
            cluster.ctas.push(Cta {
                block,
                linear,
                shared,
                bars: (0..16).map(|_| Bar::default()).collect(),
                num_warps,
                known: HashSet::new(),
                hopper: crate::hopper::CtaState::new(smem as usize),
            });
            for id in 0..num_warps as u32 {
                let lanes = (threads - 32 * id).min(32);
                let live = u32::MAX >> (32 - lanes);
                let warp = Warp::new(cx, &mut cluster.parties, rank, id, live, block, inside);
                cluster.warps.push(warp);
            }
        }
        cluster.running = cluster.warps.len();
        cluster
    }
}

impl Warp {
    fn new(
        cx: &Cx<'_>,
        parties: &mut Vec<Party>,
        rank: u32,
        id: u32,
        live: u32,
        block: [u32; 3],
        inside: [u32; 3],
    ) -> Warp {
        let kernel = cx.kernel;
        let component = parties.len() as u32;
        let (cta, warp) = (rank, id);
        parties.extend([Party::Warp { cta, warp }, Party::CpAsync { cta, warp }]);
        if kernel.uses.wgmma || kernel.uses.bulk {
            parties.extend([Party::Wgmma { cta, warp }, Party::Bulk { cta, warp }]);
        }
        let mut clock = Clock::default();
        clock.set(component, 1);
        let mut w = Warp {
            id,
            cta: rank as usize,
            block,
            component,
            regs: vec![[0; 32]; kernel.num_regs],
            init: vec![0; kernel.num_regs],
            preds: vec![0; kernel.num_preds],
            pred_init: vec![0; kernel.num_preds],
            pcs: [0; 32],
            pc: 0,
            live,
            active: 0,
            waiting: 0,
            parked: 0,
            other: 0,
            loops: 0,
            loop_limit: crate::exec::LOOPS,
            hold: Hold::None,
            clock,
            lane_seen: [1; 32],
            proxy_clock: Clock::default(),
            fence_clock: None,
            pending_acquire: Clock::default(),
            fenced_wide: false,
            busy: vec![0; kernel.num_regs],
            any_busy: kernel.uses.wgmma,
            local: vec![],
            local_init: vec![],
            cp_commits: [0; 32],
            cp_seq: [1; 32],
            cp_pending: VecDeque::new(),
            spin: None,
            hopper: crate::hopper::WarpState::new(kernel, cx.config.block.iter().product()),
        };
        for &(reg, special) in &kernel.specials {
            w.regs[reg as usize] =
                std::array::from_fn(|lane| special_value(cx, special, id, lane as u32, block, inside));
            w.init[reg as usize] = u32::MAX;
        }
        w
    }
}

fn special_value(cx: &Cx<'_>, special: Special, warp: u32, lane: u32, block: [u32; 3], inside: [u32; 3]) -> u64 {
    let config = cx.config;
    let [bx, by, _] = config.block;
    let thread = 32 * warp + lane;
    let tid = [thread % bx, thread / bx % by, thread / (bx * by)];
    let cluster = config.cluster;
    let num_warps = config.block.iter().product::<u32>().div_ceil(32);
    u64::from(match special {
        Special::Tid(i) => tid[i],
        Special::Ntid(i) => config.block[i],
        Special::Ctaid(i) => block[i],
        Special::Nctaid(i) => config.grid[i],
        Special::LaneId => lane,
        Special::WarpId => warp,
        Special::NWarpId => num_warps,
        Special::LaneMaskEq => 1 << lane,
        Special::LaneMaskLt => (1 << lane) - 1,
        Special::LaneMaskLe => u32::MAX >> (31 - lane),
        Special::LaneMaskGt => !(u32::MAX >> (31 - lane)),
        Special::LaneMaskGe => !((1 << lane) - 1),
        Special::SmId => (block[0] + block[1] * 7 + block[2] * 13) % 132,
        Special::NSmId => 132,
        Special::GridId => 1,
        Special::DynamicSmemSize => config.dynamic_smem,
        Special::TotalSmemSize => cx.kernel.static_smem + config.dynamic_smem,
        Special::ClusterCtaid(i) => inside[i],
        Special::ClusterNctaid(i) => cluster[i],
        Special::ClusterCtaRank => inside[0] + cluster[0] * (inside[1] + cluster[1] * inside[2]),
        Special::ClusterNctaRank => cluster.iter().product(),
        Special::ClusterId(i) => block[i] / cluster[i],
        Special::NClusterId(i) => config.grid[i] / cluster[i],
    })
}

/// The block that a shared address points to, and the offset there.
pub(crate) fn shared_target(address: u64, own: usize, ctas: usize) -> Option<(usize, usize)> {
    let rank = (address >> window::RANK_SHIFT) as usize;
    let offset = (address & ((1 << window::RANK_SHIFT) - 1)) as usize;
    match rank {
        0 => Some((own, offset)),
        r if r <= ctas => Some((r - 1, offset)),
        _ => None,
    }
}

/// The space and address there of lane addresses in `space`.
#[inline]
pub(crate) fn resolve(space: Space, address: u64) -> (Space, u64) {
    match space {
        Space::Generic => window::from_generic(address),
        Space::Shared | Space::SharedCluster => {
            // A shared address may come as a 64-bit register that holds the offset.
            (Space::SharedCluster, address & 0xffff_ffff)
        }
        Space::Const | Space::Global => (Space::Global, address),
        other => (other, address),
    }
}
