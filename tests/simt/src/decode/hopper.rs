//! Instructions of sm_90: mbarriers, bulk and tensor copies, wgmma.

use super::instr::{atom_op, space};
use super::matrix::vector;
use super::{Decoder, Res};
use crate::op::{Addr, AtomType, BulkKind, BulkOp, Class, MbarKind, MbarOp, Op, Space, Wgmma, WgmmaA};
use crate::ptx::grammar::Mods;
use crate::ptx::parse::{Operand, RawInstr};
use crate::ptx::types::Ty;

/// The class of a reduction's type.
fn atom_type(ty: Ty) -> AtomType {
    match ty {
        Ty::S32 | Ty::S64 => AtomType::Signed,
        Ty::F32 => AtomType::F32,
        Ty::F16 => AtomType::F16,
        Ty::Bf16 => AtomType::Bf16,
        _ => AtomType::Unsigned,
    }
}

impl Decoder<'_> {
    /// `[map, {coordinates}]`
    fn tensor_operand(&mut self, operand: &Operand, dims: usize) -> Res<(Addr, Vec<crate::op::Src>)> {
        let Operand::Address { base, offset, coords: Some(coords) } = operand else {
            return Err("expected `[tensorMap, {coordinates}]`".into());
        };
        if coords.len() != dims {
            return Err(format!("expected {dims} coordinates, found {}", coords.len()));
        }
        let addr = Addr { space: Space::Generic, base: self.addr_base(base, Space::Generic)?, offset: *offset };
        let coords = coords.iter().map(|c| self.src(c, Ty::S32)).collect::<Res<_>>()?;
        Ok((addr, coords))
    }

    pub(super) fn hopper(&mut self, raw: &RawInstr, m: &Mods) -> Res<(Op, Class)> {
        Ok(match m.opcode {
            "mbarrier" => (Op::Mbarrier(Box::new(self.mbarrier(raw, m)?)), Class::Sync),
            "wgmma" => self.wgmma(raw, m)?,
            "setmaxnreg" => {
                Self::count(raw, 1..=1)?;
                let Operand::Int(count @ 24..=256) = raw.operands[0] else { return Err("24 to 256 registers".into()) };
                if count % 8 != 0 {
                    return Err("a multiple of 8 registers".into());
                }
                if self.kernel.reqntid.is_none() && self.kernel.maxntid.is_none() && self.kernel.maxnreg.is_none() {
                    // the assembler ignores the instruction then, with a note only
                    return Err("`setmaxnreg` needs `.reqntid`, `.maxntid` or `.maxnreg`".into());
                }
                (Op::SetMaxNReg { inc: m.has("inc"), count: count as u32 }, Class::Control)
            }
            "griddepcontrol" => Self::count(raw, 0..=0).map(|()| (Op::Nop, Class::Sync))?,
            "st" => {
                Self::count(raw, 3..=3)?;
                let ty = m.ty(0);
                let lanes = match m.one_of(&["v2", "v4"]) {
                    Some("v2") => 2,
                    Some("v4") => 4,
                    _ => 1,
                };
                if lanes * ty.bytes() > 16 {
                    return Err("at most 16 bytes".into());
                }
                self.kernel.uses.bulk = true;
                let data = &raw.operands[1];
                let regs = if lanes == 1 { vec![data] } else { vector(data, lanes as usize)? };
                let regs = regs.iter().map(|r| self.src(r, ty)).collect::<Res<_>>()?;
                let addr = self.addr(&raw.operands[0], Space::SharedCluster)?;
                let mbar = self.addr(&raw.operands[2], Space::SharedCluster)?;
                (Op::StAsync { addr, mbar, bytes: ty.bytes() as u8, regs }, Class::Copy)
            }
            _ => self.bulk(raw, m)?,
        })
    }

    fn mbarrier(&mut self, raw: &RawInstr, m: &Mods) -> Res<MbarOp> {
        let o = &raw.operands;
        let where_ = match space(m) {
            Space::Generic => Space::Generic,
            Space::SharedCluster => Space::SharedCluster,
            _ => Space::Shared,
        };
        let relaxed = m.has("relaxed");
        let simple = |kind, addr, value| MbarOp { kind, addr, value, dst: None, relaxed };
        if m.form == "arrive" && o.len() == 3 {
            self.require("mbarrier.arrive with a count", super::floor::CLUSTERS)?;
        }
        Ok(match m.form {
            "init" => {
                Self::count(raw, 2..=2)?;
                let value = Some(self.src(&o[1], Ty::U32)?);
                simple(MbarKind::Init, self.addr(&o[0], where_)?, value)
            }
            "inval" => {
                Self::count(raw, 1..=1)?;
                simple(MbarKind::Inval, self.addr(&o[0], where_)?, None)
            }
            "tx" => {
                Self::count(raw, 2..=2)?;
                let kind = if m.has("expect_tx") { MbarKind::ExpectTx } else { MbarKind::CompleteTx };
                let value = Some(self.src(&o[1], Ty::U32)?);
                simple(kind, self.addr(&o[0], where_)?, value)
            }
            "arrive" | "arrive_tx" | "no_complete" => {
                let expect = m.form == "arrive_tx";
                let no_complete = m.form == "no_complete";
                Self::count(raw, if expect || no_complete { 3..=3 } else { 2..=3 })?;
                let dst = self.dst_or_sink(&o[0], Ty::B64)?;
                if dst.is_some() && where_ == Space::SharedCluster {
                    return Err("an arrive on `.shared::cluster` returns no state".into());
                }
                let value = o.get(2).map(|v| self.src(v, Ty::U32)).transpose()?;
                let kind = MbarKind::Arrive { expect, no_complete, drop: m.has("arrive_drop") };
                MbarOp { kind, addr: self.addr(&o[1], where_)?, value, dst, relaxed }
            }
            "pending" => {
                Self::count(raw, 2..=2)?;
                let base = self.src(&o[1], Ty::B64)?;
                let addr = Addr { space: Space::Generic, base, offset: 0 };
                let dst = Some(self.dst(&o[0], Ty::U32)?);
                MbarOp { kind: MbarKind::PendingCount, addr, value: None, dst, relaxed }
            }
            form => {
                let parity = form == "wait_parity";
                Self::count(raw, if m.has("try_wait") { 3..=4 } else { 3..=3 })?;
                if let Some(hint) = o.get(3) {
                    self.src(hint, Ty::U32)?;
                }
                let value = Some(self.src(&o[2], if parity { Ty::U32 } else { Ty::B64 })?);
                let kind = MbarKind::Wait { parity, blocking: m.has("try_wait") };
                MbarOp { kind, addr: self.addr(&o[1], where_)?, value, dst: Some(self.pred_dst(&o[0])?), relaxed }
            }
        })
    }

    fn bulk(&mut self, raw: &RawInstr, m: &Mods) -> Res<(Op, Class)> {
        self.kernel.uses.bulk = true;
        let mut o: Vec<&Operand> = raw.operands.iter().collect();
        let found = o.len();
        let wrong = move || format!("`{}` does not take {found} operands", raw.opcode);
        if m.form == "bulk_commit" {
            return Self::count(raw, 0..=0).map(|()| (Op::BulkCommit, Class::Copy));
        }
        if m.form == "bulk_wait" {
            Self::count(raw, 1..=1)?;
            let Operand::Int(n @ 0..=1000) = *o[0] else { return Err("the number of groups is a literal".into()) };
            return Ok((Op::BulkWait { pending: n as u32, read: m.has("read") }, Class::Sync));
        }
        if m.has("L2::cache_hint") {
            let hint = o.pop().ok_or_else(wrong)?;
            self.src(hint, Ty::B64)?;
        }
        let multicast = if m.has("multicast::cluster") {
            let mask = o.pop().ok_or_else(wrong)?;
            Some(self.src(mask, Ty::U16)?)
        } else {
            None
        };
        let op = atom_op(m.one_of(&["add", "min", "max", "and", "or", "xor", "inc", "dec"]).unwrap_or("add"));
        let cluster = if m.has("shared::cluster") { Space::SharedCluster } else { Space::Shared };
        let mut bulk = BulkOp {
            kind: BulkKind::Load,
            shared: None,
            other: Addr { space: Space::Generic, base: crate::op::Src(0), offset: 0 },
            coords: None,
            size: None,
            mbar: None,
            multicast,
        };
        if m.form.starts_with("tensor") {
            let dims = ["1d", "2d", "3d", "4d", "5d"].iter().position(|d| m.has(d)).unwrap_or(0) + 1;
            let tensor = |s: &mut Self, operand: &Operand, bulk: &mut BulkOp| -> Res<()> {
                let (addr, coords) = s.tensor_operand(operand, dims)?;
                (bulk.other, bulk.coords) = (addr, Some(coords));
                Ok(())
            };
            match (m.form, o.as_slice()) {
                ("tensor_load", [dst, map, mbar]) => {
                    bulk.shared = Some(self.addr(dst, cluster)?);
                    tensor(self, map, &mut bulk)?;
                    bulk.mbar = Some(self.addr(mbar, cluster)?);
                }
                ("tensor_store", [map, src]) => {
                    bulk.kind = BulkKind::Store;
                    tensor(self, map, &mut bulk)?;
                    bulk.shared = Some(self.addr(src, Space::Shared)?);
                }
                ("tensor_reduce", [map, src]) => {
                    // the type comes with the map
                    bulk.kind = BulkKind::Reduce(op, AtomType::Unsigned, 0);
                    tensor(self, map, &mut bulk)?;
                    bulk.shared = Some(self.addr(src, Space::Shared)?);
                }
                ("tensor_prefetch", [map]) => {
                    bulk.kind = BulkKind::Prefetch;
                    tensor(self, map, &mut bulk)?;
                }
                _ => return Err(wrong()),
            }
            return Ok((Op::Bulk(Box::new(bulk)), Class::Copy));
        }
        match (m.form, o.as_slice()) {
            ("bulk_load", [dst, src, size, mbar]) => {
                bulk.shared = Some(self.addr(dst, cluster)?);
                bulk.other = self.addr(src, Space::Global)?;
                bulk.size = Some(self.src(size, Ty::U32)?);
                bulk.mbar = Some(self.addr(mbar, cluster)?);
            }
            ("bulk_peer", [dst, src, size, mbar]) => {
                bulk.kind = BulkKind::Peer;
                bulk.shared = Some(self.addr(dst, Space::SharedCluster)?);
                bulk.other = self.addr(src, Space::Shared)?;
                bulk.size = Some(self.src(size, Ty::U32)?);
                bulk.mbar = Some(self.addr(mbar, Space::SharedCluster)?);
            }
            ("bulk_store" | "bulk_reduce", [dst, src, size]) => {
                if m.form == "bulk_reduce" {
                    let ty = m.ty(0);
                    bulk.kind = BulkKind::Reduce(op, atom_type(ty), ty.bytes() as u8);
                } else {
                    bulk.kind = BulkKind::Store;
                }
                bulk.other = self.addr(dst, Space::Global)?;
                bulk.shared = Some(self.addr(src, Space::Shared)?);
                bulk.size = Some(self.src(size, Ty::U32)?);
            }
            ("bulk_prefetch", [src, size]) => {
                bulk.kind = BulkKind::Prefetch;
                bulk.other = self.addr(src, Space::Global)?;
                bulk.size = Some(self.src(size, Ty::U32)?);
            }
            _ => return Err(wrong()),
        }
        Ok((Op::Bulk(Box::new(bulk)), Class::Copy))
    }

    fn wgmma(&mut self, raw: &RawInstr, m: &Mods) -> Res<(Op, Class)> {
        self.kernel.uses.wgmma = true;
        let o = &raw.operands;
        if m.form == "sync" {
            return Ok(match m.slot(0) {
                Some("fence") => Self::count(raw, 0..=0).map(|()| (Op::WgmmaFence, Class::Sync))?,
                Some("commit_group") => Self::count(raw, 0..=0).map(|()| (Op::WgmmaCommit, Class::Sync))?,
                _ => {
                    Self::count(raw, 1..=1)?;
                    let Operand::Int(n @ 0..=7) = o[0] else { return Err("a literal from 0 to 7".into()) };
                    (Op::WgmmaWait { pending: n as u32 }, Class::Sync)
                }
            });
        }
        let shape = m.slot(3).unwrap_or_default();
        let (n, k) = shape[4..].split_once('k').unwrap_or(("8", "16"));
        let (n, k): (u16, u8) = (n.parse().unwrap_or(8), k.parse().unwrap_or(16));
        if m.form == "int" && !(matches!(n, 8 | 24) || n % 16 == 0) {
            return Err(format!("n = {n} is not for integers"));
        }
        let (d_ty, a_ty, b_ty) = (m.ty(2), m.ty(1), m.ty(0));
        let regs = usize::from(n) / if d_ty == Ty::F16 { 4 } else { 2 };
        let in_regs = matches!(o.get(1), Some(Operand::Vector(_)));
        let transposable = matches!(m.form, "half" | "bf16");
        let want = match (m.form, in_regs) {
            ("int", _) => 4,
            (_, true) if transposable => 7,
            (_, false) if transposable => 8,
            _ => 6,
        };
        Self::count(raw, want..=want)?;
        let acc = if d_ty == Ty::F16 { Ty::B32 } else { d_ty };
        let d = vector(&o[0], regs)?.iter().map(|r| self.dst(r, acc)).collect::<Res<Vec<_>>>()?;
        let a = if in_regs {
            WgmmaA::Regs(vector(&o[1], 4)?.iter().map(|r| self.src(r, Ty::B32)).collect::<Res<_>>()?)
        } else {
            WgmmaA::Descriptor(self.src(&o[1], Ty::B64)?)
        };
        let b = self.src(&o[2], Ty::B64)?;
        let scale_d = match o[3] {
            Operand::Int(v @ 0..=1) => Err(v == 1),
            _ => Ok(self.pred_src(&o[3])?),
        };
        let mut negate = [false; 2];
        let mut mn_major = [false; 2];
        if want > 4 {
            for (i, negate) in negate.iter_mut().enumerate() {
                *negate = match o[4 + i] {
                    Operand::Int(1) => false,
                    Operand::Int(-1) => true,
                    _ => return Err("the scale is 1 or -1".into()),
                };
            }
            for (i, operand) in o[6..].iter().enumerate() {
                let Operand::Int(v @ 0..=1) = *operand else { return Err("the transposition is 0 or 1".into()) };
                mn_major[if in_regs { 1 } else { i }] = v == 1;
            }
        }
        let satfinite = m.has("satfinite");
        let op = Wgmma { n, k, a_ty, b_ty, d_ty, satfinite, a, b, d, scale_d, negate, mn_major };
        Ok((Op::Wgmma(Box::new(op)), Class::Matrix))
    }
}
