//! What the simulator can find wrong with a kernel, and the report of a run.

use crate::counters::Counters;

/// What a finding means for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// Worth a look; a report with nothing else is clean.
    Note,
    /// The kernel is wrong.
    Fault,
    /// The kernel is wrong, and the run stops there, because what follows would mean nothing.
    Fatal,
}

macro_rules! findings {
    ($($(#[$doc:meta])* $name:ident: $severity:ident,)*) => {
        /// A kind of fault. Every kind has a kernel in the tests that has the fault, and a twin that has not.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Finding {
            $($(#[$doc])* $name,)*
        }

        impl Finding {
            /// Every kind.
            pub const ALL: &'static [Finding] = &[$(Finding::$name),*];

            /// How bad it is.
            pub const fn severity(self) -> Severity {
                match self {
                    $(Finding::$name => Severity::$severity,)*
                }
            }
        }
    };
}

findings! {
    /// An access outside every buffer, the shared memory of the block, local memory or the parameters.
    OutOfBounds: Fatal,
    /// An address that is not a multiple of the access size (or of what the instruction asks for).
    Misaligned: Fatal,
    /// A register is read that nothing wrote.
    UninitRegister: Fault,
    /// Shared memory is read that nothing wrote.
    UninitShared: Fault,
    /// Global or local memory is read that neither host nor kernel wrote.
    UninitGlobal: Fault,
    /// Two accesses to one byte of shared memory, at least one a write, that nothing orders: by two warps, or by two lanes of one
    /// warp, which only `bar.warp.sync` and stronger synchronisation order; or two lanes of one store that write different values.
    SharedRace: Fault,
    /// Two blocks write one byte of global memory without atomics and without synchronisation, or two lanes of one store write
    /// different values to it.
    GlobalWriteConflict: Fault,
    /// A block reads what another block of the launch wrote, or two warps of a block access one byte and one of them writes it,
    /// without synchronisation.
    GlobalRace: Fault,
    /// `ld.global.nc` on data that this launch writes.
    ReadOnlyWritten: Fault,
    /// Data of an asynchronous copy is read before it was waited for.
    AsyncReadTooEarly: Fault,
    /// Memory that an asynchronous operation still reads or writes is written.
    AsyncOverwrite: Fault,
    /// Data written by ordinary stores is used by the asynchronous proxy without `fence.proxy.async`.
    MissingProxyFence: Fault,
    /// `wgmma` uses registers written since the last `wgmma.fence`.
    MissingWgmmaFence: Fault,
    /// A register that a `wgmma` in flight owns is read or written.
    AccumulatorInFlight: Fault,
    /// A `.sync` or `.aligned` instruction that not all lanes it names execute together.
    DivergentCollective: Fatal,
    /// A barrier with a wrong count, arrived at twice, or waited for by warps whose partners have exited.
    BarrierMisuse: Fatal,
    /// An mbarrier that is not initialised, initialised twice, overflown, or accessed as data.
    MbarrierMisuse: Fatal,
    /// A waiter missed a phase of an mbarrier: the next one completed before it looked.
    PhaseLag: Fault,
    /// A wgmma descriptor or tensor map that the hardware would not accept, or that does not fit the instruction.
    BadDescriptor: Fatal,
    /// Every warp waits and nothing is under way that could wake one.
    Deadlock: Fatal,
    /// The run took more steps than allowed.
    StepLimit: Fatal,
    /// A thread ends with asynchronous copies that it did not commit or wait for.
    OpenGroupsAtExit: Fault,
    /// A block ends while bytes are still expected by an mbarrier.
    OpenTransactionsAtExit: Fault,
    /// Static and dynamic shared memory are more than the target has.
    SharedSizeExceeded: Fatal,
    /// The warps of a block own more registers than there are.
    RegistersExceeded: Fatal,
    /// Integer division by zero.
    DivisionByZero: Fault,
    /// A shift by the width of its type or more. The result is defined, 0 or the sign, but seldom what was meant.
    ShiftTooWide: Note,
    /// `trap` was executed.
    Trap: Fatal,
}

/// One finding with where and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What is wrong.
    pub finding: Finding,
    /// Entry of the kernel.
    pub kernel: String,
    /// File name of the module.
    pub file: String,
    /// Line of the instruction, from 1.
    pub line: u32,
    /// The text of that line.
    pub text: String,
    /// `%ctaid` of the block.
    pub block: [u32; 3],
    /// Warp in the block.
    pub warp: u32,
    /// Lane in the warp, where one is to blame.
    pub lane: Option<u32>,
    /// Addresses, values and the other party.
    pub values: String,
    /// How often this kind was met on this line.
    pub count: u64,
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [x, y, z] = self.block;
        writeln!(f, "{}:{}: {:?}: {}", self.file, self.line, self.finding, self.values)?;
        write!(f, "    {}\n    in {}, block ({x}, {y}, {z}), warp {}", self.text, self.kernel, self.warp)?;
        if let Some(lane) = self.lane {
            write!(f, ", lane {lane}")?;
        }
        if self.count > 1 {
            write!(f, " ({} times)", self.count)?;
        }
        Ok(())
    }
}

/// How lanes of a warp run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// Lanes at the same instruction run together; the lowest instruction goes first.
    #[default]
    LockStep,
    /// Random subsets of lanes run ahead until a warp-level synchronisation: exposes missing ones.
    Split,
}

/// The outcome of a launch.
#[derive(Clone, Debug)]
pub struct Report {
    /// Entry of the kernel.
    pub kernel: String,
    /// The seed that repeats this run.
    pub seed: u64,
    /// How lanes ran.
    pub mode: Mode,
    /// What was found, in order of occurrence, one entry per kind and line.
    pub findings: Vec<Found>,
    /// Counts that do not depend on the schedule.
    pub counters: Counters,
    /// Warp instructions that were executed in this schedule, spins included.
    pub steps: u64,
}

impl Report {
    /// Nothing was found, notes aside.
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|f| f.finding.severity() == Severity::Note)
    }

    /// Whether this kind was found.
    pub fn has(&self, finding: Finding) -> bool {
        self.findings.iter().any(|f| f.finding == finding)
    }

    /// Panics with the whole report unless nothing was found.
    ///
    /// # Panics
    /// If there are findings other than notes.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(self.is_clean(), "{self}");
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let n = self.findings.len();
        writeln!(f, "{}: {n} findings, seed {}, mode {:?}", self.kernel, self.seed, self.mode)?;
        for found in &self.findings {
            writeln!(f, "{found}")?;
        }
        Ok(())
    }
}
