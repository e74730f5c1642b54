//! The oldest target and the oldest `.version` that have an instruction form, as ptxas 13.0.88 has them. `tests/assemble.rs` gives every
//! form of the tests to ptxas for every target and version, and fails where this table says otherwise.

use super::{Decoder, Res};
use crate::ptx::grammar::Mods;
use crate::ptx::types::Ty;

/// A version of the PTX ISA.
type Version = (u32, u32);

/// The oldest target (compute capability times ten) and PTX version with which something can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Floor {
    target: u32,
    version: Version,
    /// Whether it is of `sm_90a` alone.
    hopper_only: bool,
}

/// Where everything begins: older targets are not simulated.
const OLDEST: Floor = Floor { target: 80, version: (7, 0), hopper_only: false };

/// Blocks that share memory: `.shared::cluster`, `%cluster_ctarank`, `.explicitcluster`.
pub(super) const CLUSTERS: Floor = Floor { target: 90, version: (7, 8), hopper_only: false };

/// The PTX version that a target came with.
pub(crate) fn version_of_target(target: &str) -> Version {
    match target {
        "sm_80" => (7, 0),
        "sm_86" => (7, 1),
        "sm_89" | "sm_90" => (7, 8),
        "sm_90a" => (8, 0),
        "sm_100" => (8, 6),
        _ => (8, 7),
    }
}

impl Floor {
    fn raise(&mut self, target: u32, version: Version) {
        self.target = self.target.max(target);
        self.version = self.version.max(version);
    }

    /// That of an instruction for `arch`: Ada was given some instructions later than Hopper.
    pub(super) fn of(m: &Mods, arch: u32) -> Floor {
        let mut floor = Floor { hopper_only: matches!(m.opcode, "wgmma" | "setmaxnreg"), ..OLDEST };
        modifiers(m, &mut floor);
        match m.opcode {
            "mbarrier" => mbarrier(m, &mut floor),
            "cp" | "st" | "fence" | "prefetch" => copies(m, &mut floor),
            "cvt" => conversions(m, arch, &mut floor),
            _ => others(m, &mut floor),
        }
        floor
    }
}

/// What modifiers of several instructions need.
fn modifiers(m: &Mods, floor: &mut Floor) {
    if m.one_of(&["cluster", "shared::cluster", "multicast::cluster"]).is_some() {
        floor.raise(90, (7, 8));
    }
    // as a state space, and `bar.cta`; ptxas knows no older `cp.async` than 7.0 that would lack it
    if m.has("shared::cta") && (m.opcode, m.form) != ("cp", "async")
        || matches!(m.opcode, "bar" | "barrier") && m.has("cta")
    {
        floor.raise(80, (7, 8));
    }
    if m.hinted() && m.opcode != "prefetch" {
        floor.raise(80, (7, 4));
    }
    let wide =
        matches!(m.opcode, "ld" | "st") && (m.has("v8") && m.ty(0).bits() == 32 || m.has("v4") && m.ty(0).bits() == 64);
    if wide {
        floor.raise(100, (8, 8));
    }
}

fn mbarrier(m: &Mods, floor: &mut Floor) {
    match m.form {
        "tx" | "arrive_tx" => floor.raise(90, (8, 0)),
        "wait" | "wait_parity" if m.has("try_wait") => floor.raise(90, (7, 8)),
        "wait_parity" => floor.raise(80, (7, 1)),
        _ => {}
    }
    if m.one_of(&["acquire", "release"]).is_some() {
        floor.raise(80, (8, 0));
    }
    if m.has("relaxed") {
        // 9.7.13.15: `.relaxed` is younger on an arrive and a wait than on a transaction count
        floor.raise(90, if m.form == "tx" { (8, 0) } else { (8, 6) });
    }
}

/// Copies, and what orders them.
fn copies(m: &Mods, floor: &mut Floor) {
    match (m.opcode, m.form) {
        ("cp", form) if form.starts_with("bulk") || form.starts_with("tensor") => {
            floor.raise(90, (8, 0));
            if form.ends_with("load") && m.has("shared::cta") {
                floor.raise(90, (8, 6)); // as destination
            }
        }
        ("st", "async") => floor.raise(90, (8, 1)),
        ("fence", "mbarrier_init" | "proxy_async") | ("prefetch", "tensormap") => floor.raise(90, (8, 0)),
        ("prefetch", _) if m.one_of(&["L2::evict_last", "L2::evict_normal"]).is_some() => floor.raise(80, (7, 4)),
        _ => {}
    }
}

fn conversions(m: &Mods, arch: u32, floor: &mut Floor) {
    let bf16 = |n: usize| m.ty(n) == Ty::Bf16;
    match m.form {
        "from_int" if bf16(1) => floor.raise(90, (7, 8)),
        "to_int" if bf16(0) => floor.raise(90, (7, 8)),
        "widen" if bf16(0) => floor.raise(80, (7, 1)),
        "tf32" if !m.has("rna") => floor.raise(90, (7, 8)),
        "pack8" | "unpack8" => floor.raise(89, if arch >= 90 { (7, 8) } else { (8, 1) }),
        "narrow" | "pack" if m.has("satfinite") => floor.raise(80, (8, 1)),
        _ => {}
    }
}

fn others(m: &Mods, floor: &mut Floor) {
    let bf16 = |n: usize| matches!(m.ty(n), Ty::Bf16 | Ty::Bf16x2);
    match (m.opcode, m.form) {
        ("add" | "sub" | "mul" | "ex2", "bf16") => floor.raise(90, (7, 8)),
        ("tanh", _) | ("setp", "float") | ("atom" | "red", "half") if bf16(0) => floor.raise(90, (7, 8)),
        ("stmatrix" | "mapa" | "getctarank" | "griddepcontrol", _) => floor.raise(90, (7, 8)),
        ("elect" | "setmaxnreg" | "wgmma", form) => {
            let mixed = form == "int" && m.ty(0) != m.ty(1);
            floor.raise(90, if mixed { (8, 4) } else { (8, 0) });
        }
        ("barrier", "cluster_arrive" | "cluster_wait") => floor.raise(90, (7, 8)),
        ("mma", "fp8") => floor.raise(89, (8, 4)),
        ("createpolicy" | "discard", _) => floor.raise(80, (7, 4)),
        ("isspacep" | "cvta", _) if m.has("param") => floor.raise(80, (7, 7)),
        ("movmatrix", _) => floor.raise(80, (7, 8)),
        _ => {}
    }
}

impl Decoder<'_> {
    /// An error that names the form, what it needs and what the module says, where the module is older than `floor`.
    pub(super) fn require(&self, what: &str, floor: Floor) -> Res<()> {
        let Floor { target, version, hopper_only } = floor;
        let found = self.source.version;
        if hopper_only && !self.source.sm_90a {
            return Err(format!("`{what}` needs target sm_90a, and runs on no other"));
        }
        if self.source.arch < target {
            return Err(format!(
                "`{what}` needs sm_{target} or newer, the module has `.target sm_{}`",
                self.source.arch
            ));
        }
        if found < version {
            let text = |(major, minor)| format!("{major}.{minor}");
            return Err(format!(
                "`{what}` needs PTX {} or newer, the module has `.version {}`",
                text(version),
                text(found)
            ));
        }
        Ok(())
    }
}
