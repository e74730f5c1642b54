//! Loads, stores, atomics, address arithmetic and asynchronous copies.

use super::instr::{atom_op, space, space_class};
use super::{Decoder, Res, Sym};
use crate::op::{Access, Atom, AtomType, Class, Op, Order, Space};
use crate::ptx::grammar::Mods;
use crate::ptx::parse::{Operand, RawInstr};
use crate::ptx::types::Ty;

fn order(m: &Mods) -> Order {
    match m.one_of(&["volatile", "relaxed", "acquire", "release", "acq_rel"]) {
        Some("volatile" | "relaxed") => Order::Relaxed,
        Some("acquire") => Order::Acquire,
        Some("release") => Order::Release,
        Some("acq_rel") => Order::AcqRel,
        _ => Order::Weak,
    }
}

impl Decoder<'_> {
    pub(super) fn memory(&mut self, raw: &RawInstr, m: &Mods) -> Res<(Op, Class)> {
        let o = &raw.operands;
        let space = space(m);
        Ok(match (m.opcode, m.form) {
            ("ld" | "st", _) => {
                let access = self.access(raw, m)?;
                let op = if m.opcode == "ld" { Op::Ld(Box::new(access)) } else { Op::St(Box::new(access)) };
                (op, space_class(space))
            }
            ("atom" | "red", _) => (Op::Atom(Box::new(self.atom(raw, m)?)), space_class(space)),
            ("prefetch", _) => {
                Self::count(raw, 1..=1)?;
                (Op::Prefetch { addr: self.addr(&o[0], space)? }, Class::Other)
            }
            ("createpolicy", _) => {
                Self::count(raw, 1..=2)?;
                let d = self.dst(&o[0], Ty::B64)?;
                if let Some(fraction) = o.get(1) {
                    let value = match *fraction {
                        Operand::F32(bits) => f64::from(f32::from_bits(bits)),
                        Operand::F64(bits) => f64::from_bits(bits),
                        _ => 1.0,
                    };
                    if !(value > 0.0 && value <= 1.0) {
                        return Err(format!("a fraction of {value}, expected more than 0 and at most 1"));
                    }
                    self.src(fraction, Ty::F32)?;
                }
                let a = self.constant(0);
                (Op::A1 { f: crate::alu_int::f1!(|a: u64| a), d, a }, Class::Other)
            }
            ("discard", _) => {
                Self::count(raw, 2..=2)?;
                if o[1] != Operand::Int(128) {
                    return Err("`discard` works on 128 bytes".into());
                }
                (Op::Discard { addr: self.addr(&o[0], space)?, bytes: 128 }, Class::Global)
            }
            ("cvta", _) => {
                Self::count(raw, 2..=2)?;
                let ty = m.ty(0);
                let to = m.has("to");
                let a = match &o[1] {
                    Operand::Name(name) if to && !matches!(self.lookup(name), Some(Sym::Reg(..))) => {
                        return Err("`.to` takes a register".into());
                    }
                    Operand::Name(name) if matches!(self.lookup(name), Some(Sym::Var(have, _)) if have != space) => {
                        return Err(format!("`{name}` lies in another state space"));
                    }
                    // `cvta.shared.u64 d, variable`
                    Operand::Name(_) | Operand::Symbol(..) => self.src(&o[1], ty)?,
                    _ => return Err("expected a register or a variable".into()),
                };
                (Op::Cvta { d: self.dst(&o[0], ty)?, a, space, to }, Class::Integer)
            }
            ("isspacep", _) => {
                Self::count(raw, 2..=2)?;
                (Op::IsSpace { d: self.pred_dst(&o[0])?, a: self.src(&o[1], Ty::U64)?, space }, Class::Integer)
            }
            ("mapa", _) => {
                Self::count(raw, 3..=3)?;
                let ty = m.ty(0);
                let generic = space == Space::Generic;
                let (a, b) = (self.src(&o[1], ty)?, self.src(&o[2], Ty::U32)?);
                (Op::Mapa { d: self.dst(&o[0], ty)?, a, b, generic }, Class::Integer)
            }
            ("getctarank", _) => {
                Self::count(raw, 2..=2)?;
                let ty = m.ty(0);
                let generic = space == Space::Generic;
                (Op::CtaRank { d: self.dst(&o[0], Ty::U32)?, a: self.src(&o[1], ty)?, generic }, Class::Integer)
            }
            ("cp", "async") => (self.cp_async(raw, m)?, Class::Copy),
            ("cp", "commit") => {
                self.kernel.uses.cp_async = true;
                Self::count(raw, 0..=0).map(|()| (Op::CpCommit, Class::Copy))?
            }
            ("cp", "wait") => {
                Self::count(raw, 1..=1)?;
                let Operand::Int(n @ 0..=1000) = o[0] else { return Err("the number of groups is a literal".into()) };
                (Op::CpWait { pending: Some(n as u32) }, Class::Sync)
            }
            ("cp", "wait_all") => Self::count(raw, 0..=0).map(|()| (Op::CpWait { pending: None }, Class::Sync))?,
            ("cp", "mbarrier") => {
                Self::count(raw, 1..=1)?;
                let space = if space == Space::Generic { Space::Generic } else { Space::Shared };
                (Op::CpArrive { addr: self.addr(&o[0], space)?, noinc: m.has("noinc") }, Class::Sync)
            }
            other => return Err(format!("`{}` is not supported yet", other.0)),
        })
    }

    fn access(&mut self, raw: &RawInstr, m: &Mods) -> Res<Access> {
        let o = &raw.operands;
        let space = space(m);
        let load = m.opcode == "ld";
        let hints = usize::from(m.has("L2::cache_hint"));
        Self::count(raw, 2 + hints..=2 + hints)?;
        if hints == 1 {
            self.src(&o[2], Ty::B64)?;
        }
        let ty = m.ty(0);
        let lanes = match m.one_of(&["v2", "v4", "v8"]) {
            Some("v2") => 2,
            Some("v4") => 4,
            Some("v8") => 8,
            _ => 1,
        };
        let bytes = ty.bytes();
        let global = matches!(space, Space::Global | Space::Generic);
        // 9.7.9.8: 256 bits at a time from global memory alone, where the target has that (`floor.rs`)
        let limit = if global && order(m) == Order::Weak { 32 } else { 16 };
        if bytes * lanes > limit || lanes == 8 && bytes != 4 {
            return Err(format!("{lanes} values of {bytes} bytes in one access, the limit here is {limit} bytes"));
        }
        if m.one_of(&["L2::evict_first", "L2::evict_last", "L2::evict_normal"]).is_some() && bytes * lanes != 32 {
            return Err("an eviction priority of L2 needs `.v8` of 32 bits or `.v4` of 64 bits".into());
        }
        if !global && m.hinted() {
            return Err("a hint to the caches needs global memory".into());
        }
        if m.has("nc") && space != Space::Global {
            return Err("`.nc` needs `.global`".into());
        }
        let order = order(m);
        let (data, address) = if load { (&o[0], &o[1]) } else { (&o[1], &o[0]) };
        let addr = self.addr(address, space)?;
        let items: Vec<&Operand> = match data {
            Operand::Vector(items) if items.len() == lanes as usize && lanes > 1 => items.iter().collect(),
            Operand::Vector(_) => return Err(format!("expected {lanes} registers")),
            single if lanes == 1 => vec![single],
            _ => return Err(format!("expected {lanes} registers in braces")),
        };
        let mut widths = items.iter().filter_map(|item| self.register_bits(item));
        if widths.next().is_some_and(|first| widths.any(|other| other != first)) {
            return Err("registers of different widths in one vector".into());
        }
        let mut regs = vec![];
        let mut reg_bits = 0;
        for item in items {
            if load {
                if *item == Operand::Sink {
                    regs.push(None);
                    continue;
                }
                let (reg, bits) = self.dst_sized(item, ty, true)?;
                regs.push(Some(crate::op::Src(reg)));
                reg_bits = bits as u8;
            } else {
                regs.push(Some(self.src_sized(item, ty, true)?));
            }
        }
        Ok(Access { addr, order, read_only: m.has("nc"), bytes: bytes as u8, signed: ty.signed(), reg_bits, regs })
    }

    /// Width of a register.
    fn register_bits(&self, operand: &Operand) -> Option<u32> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Sym::Reg(ty, _)) => Some(ty.bits()),
                _ => None,
            },
            _ => None,
        }
    }

    fn atom(&mut self, raw: &RawInstr, m: &Mods) -> Res<Atom> {
        let o = &raw.operands;
        let space = space(m);
        let op =
            atom_op(m.one_of(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]).unwrap_or("add"));
        let returns = usize::from(m.opcode == "atom");
        let sources = 1 + usize::from(op == crate::op::AtomOp::Cas);
        Self::count(raw, returns + 1 + sources..=returns + 1 + sources)?;
        let name = m.ty(0);
        if name == Ty::S64 && op == crate::op::AtomOp::Add {
            return Err("`add` on 64 bits takes type u64".into());
        }
        let (ty, kind) = match name {
            Ty::S32 | Ty::S64 => (name, AtomType::Signed),
            Ty::F32 => (name, AtomType::F32),
            Ty::F16 => (name, AtomType::F16),
            Ty::F16x2 => (name, AtomType::F16x2),
            Ty::Bf16 => (name, AtomType::Bf16),
            Ty::Bf16x2 => (name, AtomType::Bf16x2),
            _ => (name, AtomType::Unsigned),
        };
        let dst = if returns == 1 { self.dst_or_sink(&o[0], ty)? } else { None };
        let addr = self.addr(&o[returns], space)?;
        let b = self.src(&o[returns + 1], ty)?;
        let c = if sources == 2 { Some(self.src(&o[returns + 2], ty)?) } else { None };
        let order = match order(m) {
            Order::Weak => Order::Relaxed,
            order => order,
        };
        Ok(Atom { addr, order, op, ty: kind, bytes: ty.bytes() as u8, dst, b, c })
    }

    fn cp_async(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        self.kernel.uses.cp_async = true;
        let o = &raw.operands;
        let hints = usize::from(m.has("L2::cache_hint"));
        Self::count(raw, 3 + hints..=4 + hints)?;
        if hints == 1 {
            self.src(&o[o.len() - 1], Ty::B64)?;
        }
        let Operand::Int(bytes @ (4 | 8 | 16)) = o[2] else { return Err("the size is 4, 8 or 16".into()) };
        if m.has("cg") && bytes != 16 {
            return Err("`.cg` copies 16 bytes".into());
        }
        let mut src_bytes = None;
        let mut ignore = None;
        if o.len() == 4 + hints {
            let is_pred = matches!(&o[3], Operand::Name(_) | Operand::Not(_)) && self.pred_src(&o[3]).is_ok();
            if is_pred {
                ignore = Some(self.pred_src(&o[3])?);
            } else {
                src_bytes = Some(self.at_most(&o[3], bytes)?);
            }
        }
        let (dst, src) = (self.addr(&o[0], Space::Shared)?, self.addr(&o[1], Space::Global)?);
        Ok(Op::CpAsync { dst, src, bytes: bytes as u8, src_bytes, ignore })
    }
}
