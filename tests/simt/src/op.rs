//! The decoded form of a kernel: what the interpreter runs, compact and resolved.

use std::sync::Arc;

use crate::alu_float::Conversion;
use crate::model::approx::Function;
use crate::model::float::{Cvt, Format};
use crate::ptx::types::Ty;

/// One value per lane. Narrow values are zero-extended.
pub(crate) type Lanes = [u64; 32];

pub(crate) type F1 = fn(&mut Lanes, &Lanes);
pub(crate) type F2 = fn(&mut Lanes, &Lanes, &Lanes);
pub(crate) type F3 = fn(&mut Lanes, &Lanes, &Lanes, &Lanes);
/// A comparison: one result bit per lane.
pub(crate) type Compare = fn(&Lanes, &Lanes) -> u32;

/// A register of the warp.
pub(crate) type Reg = u16;

/// A source operand: a register, or (top bit) an entry of the kernel's table of constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Src(pub u16);

impl Src {
    pub(crate) const CONST: u16 = 0x8000;
}

/// A predicate operand, possibly negated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PredSrc {
    pub reg: u16,
    pub negated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BoolOp {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    SharedCluster,
    Local,
    Const,
    Param,
}

/// Memory order and scope of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// A plain access: may not race.
    Weak,
    /// `.volatile`, `.relaxed`: may meet other strong accesses.
    Relaxed,
    Acquire,
    Release,
    AcqRel,
}

impl Order {
    pub(crate) fn acquires(self) -> bool {
        matches!(self, Order::Acquire | Order::AcqRel)
    }
    pub(crate) fn releases(self) -> bool {
        matches!(self, Order::Release | Order::AcqRel)
    }
}

/// `[base + offset]` in a state space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addr {
    pub space: Space,
    pub base: Src,
    pub offset: i64,
}

/// A load or a store.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub addr: Addr,
    pub order: Order,
    /// `.nc`: the data must not be written by this launch.
    pub read_only: bool,
    pub bytes: u8,
    /// Loads: sign-extend to the register.
    pub signed: bool,
    /// Width of the destination register for a sign extension.
    pub reg_bits: u8,
    pub regs: Vec<Option<Src>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// How an atomic treats its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomType {
    Unsigned,
    Signed,
    F32,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
}

#[derive(Clone, Debug)]
pub(crate) struct Atom {
    pub addr: Addr,
    pub order: Order,
    pub op: AtomOp,
    pub ty: AtomType,
    pub bytes: u8,
    pub dst: Option<Reg>,
    pub b: Src,
    pub c: Option<Src>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarOp {
    Sync,
    Arrive,
    RedAnd,
    RedOr,
    RedPopc,
}

/// Shape and types of an `mma.sync.m16n8k*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmaKind {
    pub k: u8,
    pub a: Ty,
    pub b: Ty,
    /// Type of C and D.
    pub c: Ty,
    pub d: Ty,
    pub satfinite: bool,
}

/// Registers and layout of an mma.
#[derive(Clone, Debug)]
pub(crate) struct Mma {
    pub kind: MmaKind,
    pub a: Vec<Src>,
    pub b: Vec<Src>,
    pub c: Vec<Src>,
    pub d: Vec<Reg>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    A1 {
        f: F1,
        d: Reg,
        a: Src,
    },
    A2 {
        f: F2,
        d: Reg,
        a: Src,
        b: Src,
    },
    /// `shl`, `shr` of values with this many bits.
    Shift {
        f: F2,
        bits: u8,
        d: Reg,
        a: Src,
        b: Src,
    },
    A3 {
        f: F3,
        d: Reg,
        a: Src,
        b: Src,
        c: Src,
    },
    /// Integer division and remainder: as `A2`, a zero divisor is reported.
    Div {
        f: F2,
        d: Reg,
        a: Src,
        b: Src,
    },
    /// An approximate function; `pair` applies it to both halves.
    Approx {
        function: Function,
        format: Format,
        ftz: bool,
        pair: bool,
        d: Reg,
        a: Src,
    },
    /// The result has `bits` bits; where the register is wider it is extended, with the sign if `signed`.
    Cvt {
        how: Conversion,
        d: Reg,
        a: Src,
        bits: u8,
        reg_bits: u8,
        signed: bool,
    },
    /// Two f32 to a packed pair, the first to the upper half.
    CvtPack {
        to: Format,
        how: Cvt,
        d: Reg,
        a: Src,
        b: Src,
    },
    Lop3 {
        d: Reg,
        a: Src,
        b: Src,
        c: Src,
        table: u8,
    },
    Bfi {
        d: Reg,
        a: Src,
        b: Src,
        pos: Src,
        len: Src,
        bits: u8,
    },
    DivApprox {
        full: bool,
        ftz: bool,
        d: Reg,
        a: Src,
        b: Src,
    },
    Setp(Box<Setp>),
    /// `d = p ? a : b`
    Selp {
        d: Reg,
        a: Src,
        b: Src,
        p: PredSrc,
    },
    PredLogic {
        op: BoolOp,
        d: u16,
        a: PredSrc,
        b: PredSrc,
    },
    /// `d = a` between predicates; `not` is a negated source.
    PredMov {
        d: u16,
        a: PredSrc,
    },
    PredConst {
        d: u16,
        value: bool,
    },
    /// Registers, lowest first, to one wide register.
    Pack {
        d: Reg,
        bits: u8,
        parts: Box<[Src]>,
    },
    /// One wide register to registers, lowest first; `None` is the sink.
    Unpack {
        a: Src,
        bits: u8,
        parts: Box<[Option<Reg>]>,
    },
    /// `%clock`, `%clock64`, `%globaltimer`
    Clock {
        d: Reg,
        bits: u8,
    },
    IsSpace {
        d: u16,
        a: Src,
        space: Space,
    },
    /// Generic address to or from a space window.
    Cvta {
        d: Reg,
        a: Src,
        space: Space,
        to: bool,
    },
    Mapa {
        d: Reg,
        a: Src,
        b: Src,
        generic: bool,
    },
    CtaRank {
        d: Reg,
        a: Src,
        generic: bool,
    },
    Ld(Box<Access>),
    St(Box<Access>),
    Atom(Box<Atom>),
    /// Hints: the address is checked, nothing else happens.
    Prefetch {
        addr: Addr,
    },
    Discard {
        addr: Addr,
        bytes: u32,
    },
    Shfl {
        mode: ShflMode,
        d: Reg,
        p: Option<u16>,
        a: Src,
        b: Src,
        c: Src,
        members: Src,
    },
    Vote {
        mode: VoteMode,
        d: u16,
        a: PredSrc,
        members: Src,
    },
    Match {
        all: bool,
        d: Reg,
        p: Option<u16>,
        a: Src,
        members: Src,
    },
    Redux {
        op: AtomOp,
        signed: bool,
        d: Reg,
        a: Src,
        members: Src,
    },
    ActiveMask {
        d: Reg,
    },
    Elect {
        d: Option<Reg>,
        p: u16,
        members: Src,
    },
    BarWarp {
        members: Src,
    },
    Bar {
        op: BarOp,
        id: Src,
        count: Option<Src>,
        input: Option<PredSrc>,
        d: u16,
    },
    ClusterArrive {
        release: bool,
    },
    ClusterWait,
    /// Thread fence; the scope reaches other blocks.
    Fence {
        wide: bool,
    },
    /// `fence.proxy.async`, `fence.mbarrier_init`
    ProxyFence {
        init: bool,
    },
    CpAsync {
        dst: Addr,
        src: Addr,
        bytes: u8,
        src_bytes: Option<Src>,
        ignore: Option<PredSrc>,
    },
    CpCommit,
    /// `None` waits for all, committed or not.
    CpWait {
        pending: Option<u32>,
    },
    /// Arrive on the mbarrier when the copies so far are done.
    CpArrive {
        addr: Addr,
        noinc: bool,
    },
    LdMatrix {
        addr: Addr,
        trans: bool,
        d: Box<[Reg]>,
    },
    StMatrix {
        addr: Addr,
        trans: bool,
        a: Box<[Src]>,
    },
    MovMatrix {
        d: Reg,
        a: Src,
    },
    Mma(Box<Mma>),
    Mbarrier(Box<MbarOp>),
    Bulk(Box<BulkOp>),
    BulkCommit,
    BulkWait {
        pending: u32,
        read: bool,
    },
    StAsync {
        addr: Addr,
        mbar: Addr,
        bytes: u8,
        regs: Box<[Src]>,
    },
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        pending: u32,
    },
    Wgmma(Box<Wgmma>),
    SetMaxNReg {
        inc: bool,
        count: u32,
    },
    Bra {
        target: u32,
    },
    Exit,
    Trap,
    Nop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MbarKind {
    Init,
    Inval,
    ExpectTx,
    CompleteTx,
    /// `value` arrivals, after expecting `tx` bytes if `expect`.
    Arrive {
        expect: bool,
        no_complete: bool,
        drop: bool,
    },
    Wait {
        parity: bool,
        blocking: bool,
    },
    PendingCount,
}

/// An instruction on an mbarrier.
#[derive(Clone, Debug)]
pub(crate) struct MbarOp {
    pub kind: MbarKind,
    /// For `PendingCount` the state, in `base`.
    pub addr: Addr,
    /// Count, transaction count, state or parity.
    pub value: Option<Src>,
    /// State or count; for waits the predicate.
    pub dst: Option<u16>,
    pub relaxed: bool,
}

/// What a bulk or tensor copy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BulkKind {
    /// Global to shared memory, signals an mbarrier.
    Load,
    /// Shared memory to that of another block, signals an mbarrier there.
    Peer,
    /// Shared to global memory, in a bulk group.
    Store,
    /// The same with a reduction.
    Reduce(AtomOp, AtomType, u8),
    Prefetch,
}

/// A bulk copy, or with `coords` a tensor copy.
#[derive(Clone, Debug)]
pub(crate) struct BulkOp {
    pub kind: BulkKind,
    /// Shared side: destination of a load, source of a store.
    pub shared: Option<Addr>,
    /// Global address, tensor map, or for `Peer` the source.
    pub other: Addr,
    pub coords: Option<Vec<Src>>,
    pub size: Option<Src>,
    pub mbar: Option<Addr>,
    pub multicast: Option<Src>,
}

/// Where a wgmma has A.
#[derive(Clone, Debug)]
pub(crate) enum WgmmaA {
    Descriptor(Src),
    Regs(Vec<Src>),
}

/// `wgmma.mma_async`
#[derive(Clone, Debug)]
pub(crate) struct Wgmma {
    pub n: u16,
    pub k: u8,
    pub a_ty: Ty,
    pub b_ty: Ty,
    pub d_ty: Ty,
    pub satfinite: bool,
    pub a: WgmmaA,
    pub b: Src,
    pub d: Vec<Reg>,
    /// Add D, or begin with zero.
    pub scale_d: Result<PredSrc, bool>,
    pub negate: [bool; 2],
    /// Contiguous along m, n instead of k.
    pub mn_major: [bool; 2],
}

/// A comparison with its combination and up to two predicate results, or (for `set`) a register.
#[derive(Clone, Debug)]
pub(crate) struct Setp {
    pub f: Compare,
    pub a: Src,
    pub b: Src,
    pub p: Option<u16>,
    pub q: Option<u16>,
    pub with: Option<(BoolOp, PredSrc)>,
    /// `set`: register and the value that stands for true.
    pub value: Option<(Reg, u64)>,
}

/// Counter class of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Integer, logic, shift, comparison, selection, moves.
    Integer,
    /// Scalar floating point.
    Float,
    /// `cvt`.
    Convert,
    /// Approximate functions and square roots, reciprocals, divisions.
    Special,
    /// `ld`, `st`, `atom`, `red` and hints on global or generic addresses.
    Global,
    /// The same on shared memory, `ldmatrix` and `stmatrix` included.
    Shared,
    /// Loads of parameters and constants, local memory.
    Other,
    /// `shfl`, `vote`, `match`, `redux`, `elect`, `movmatrix`.
    Warp,
    /// `mma`, `wgmma`.
    Matrix,
    /// `cp.async` and bulk or tensor copies.
    Copy,
    /// Barriers, mbarriers, fences, waits.
    Sync,
    /// Branches and exits.
    Control,
}

impl Class {
    /// All classes, in the order of the counters.
    pub const ALL: [Class; 12] = [
        Class::Integer,
        Class::Float,
        Class::Convert,
        Class::Special,
        Class::Global,
        Class::Shared,
        Class::Other,
        Class::Warp,
        Class::Matrix,
        Class::Copy,
        Class::Sync,
        Class::Control,
    ];
}

/// An instruction ready to run.
#[derive(Clone, Debug)]
pub(crate) struct Instr {
    pub op: Op,
    pub guard: Option<PredSrc>,
    pub line: u32,
    pub class: Class,
}

/// A kernel parameter: where it lies in the parameter block.
#[derive(Clone, Debug)]
pub(crate) struct ParamSlot {
    pub name: String,
    pub offset: u32,
    pub bytes: u32,
}

/// A special register that a kernel reads, kept in an ordinary register from the start of the warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    LaneId,
    WarpId,
    NWarpId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    SmId,
    NSmId,
    GridId,
    DynamicSmemSize,
    TotalSmemSize,
    ClusterCtaid(usize),
    ClusterNctaid(usize),
    ClusterCtaRank,
    ClusterNctaRank,
    ClusterId(usize),
    NClusterId(usize),
}

/// A kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub name: String,
    pub code: Vec<Instr>,
    pub consts: Vec<Lanes>,
    /// Registers, special ones included.
    pub num_regs: usize,
    pub num_preds: usize,
    pub reg_names: Vec<String>,
    pub pred_names: Vec<String>,
    pub specials: Vec<(Reg, Special)>,
    pub params: Vec<ParamSlot>,
    pub param_bytes: u32,
    pub static_smem: u32,
    pub local_bytes: u32,
    pub reqntid: Option<[u32; 3]>,
    pub maxntid: Option<[u32; 3]>,
    pub maxnreg: Option<u32>,
    pub reqcluster: Option<[u32; 3]>,
    pub uses: Uses,
    pub source: Arc<Source>,
}

/// Which asynchronous agents a kernel needs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Uses {
    pub cp_async: bool,
    pub wgmma: bool,
    pub bulk: bool,
}

/// The file a kernel came from, for reports.
#[derive(Debug)]
pub(crate) struct Source {
    pub file: String,
    pub lines: Vec<String>,
    pub arch: u32,
    /// `.version` of the module.
    pub version: (u32, u32),
    /// Target `sm_90a`, with the instructions that only this chip has.
    pub sm_90a: bool,
}
