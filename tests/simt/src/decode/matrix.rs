//! Matrix instructions of a warp.

use super::instr::space;
use super::{Decoder, Res};
use crate::op::{Class, Mma, MmaKind, Op, Space};
use crate::ptx::grammar::Mods;
use crate::ptx::parse::{Operand, RawInstr};
use crate::ptx::types::{Class as TyClass, Ty};

/// The operands in braces, `n` of them.
pub(super) fn vector(operand: &Operand, n: usize) -> Res<Vec<&Operand>> {
    match operand {
        Operand::Vector(v) if v.len() == n => Ok(v.iter().collect()),
        Operand::Vector(v) => Err(format!("expected {n} registers, found {}", v.len())),
        _ => Err(format!("expected {n} registers in braces")),
    }
}

impl Decoder<'_> {
    pub(super) fn matrix(&mut self, raw: &RawInstr, m: &Mods) -> Res<(Op, Class)> {
        let o = &raw.operands;
        let count = match m.one_of(&["x1", "x2", "x4"]) {
            Some("x2") => 2,
            Some("x4") => 4,
            _ => 1,
        };
        Ok(match m.opcode {
            "ldmatrix" | "stmatrix" => {
                Self::count(raw, 2..=2)?;
                let load = m.opcode == "ldmatrix";
                let addr = self.addr(
                    &o[usize::from(load)],
                    if space(m) == Space::Generic { Space::Generic } else { Space::Shared },
                )?;
                let trans = m.has("trans");
                let regs = vector(&o[usize::from(!load)], count)?;
                let op = if load {
                    let d = regs.iter().map(|r| self.dst(r, Ty::B32)).collect::<Res<_>>()?;
                    Op::LdMatrix { addr, trans, d }
                } else {
                    let a = regs.iter().map(|r| self.src(r, Ty::B32)).collect::<Res<_>>()?;
                    Op::StMatrix { addr, trans, a }
                };
                (op, Class::Shared)
            }
            "movmatrix" => {
                Self::count(raw, 2..=2)?;
                (Op::MovMatrix { d: self.dst(&o[0], Ty::B32)?, a: self.src(&o[1], Ty::B32)? }, Class::Warp)
            }
            _ => (self.mma(raw, m)?, Class::Matrix),
        })
    }

    fn mma(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        Self::count(raw, 4..=4)?;
        let o = &raw.operands;
        let (d, a, b, c) = (m.ty(3), m.ty(2), m.ty(1), m.ty(0));
        let k = match m.slot(2) {
            Some("m16n8k4") => 4,
            Some("m16n8k8") => 8,
            Some("m16n8k16") => 16,
            _ => 32,
        };
        let bits = if a == Ty::Tf32 { 32 } else { a.bits() };
        let a_regs = (16 * k * bits / 32 / 32) as usize;
        let c_regs = |ty: Ty| if ty == Ty::F16 { 2 } else { 4 };
        let acc = |ty: Ty| if ty == Ty::F16 { Ty::F16x2 } else { ty };
        if (c, d) == (Ty::F32, Ty::F16) {
            return Err("with a sum in f32 the result is f32".into());
        }
        // Values of these types come packed
        let packed = if a.class() == TyClass::Int { Ty::U32 } else { Ty::Bf16x2 };
        let kind = MmaKind { k: k as u8, a, b, c, d, satfinite: m.has("satfinite") };
        let a = vector(&o[1], a_regs)?.iter().map(|r| self.src(r, packed)).collect::<Res<_>>()?;
        let b = vector(&o[2], a_regs / 2)?.iter().map(|r| self.src(r, packed)).collect::<Res<_>>()?;
        let c = vector(&o[3], c_regs(kind.c))?.iter().map(|r| self.src(r, acc(kind.c))).collect::<Res<_>>()?;
        let d = vector(&o[0], c_regs(kind.d))?.iter().map(|r| self.dst(r, acc(kind.d))).collect::<Res<_>>()?;
        Ok(Op::Mma(Box::new(Mma { kind, a, b, c, d })))
    }
}
