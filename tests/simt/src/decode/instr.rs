//! Instructions of computation, comparison, conversion and control.

use super::floor::Floor;
use super::{Decoder, Res};
use crate::alu_double;
use crate::alu_float::{self, Conversion, Flags};
use crate::alu_int::{self, f1, f3};
use crate::model::approx::Function;
use crate::model::float::{Cvt, Round};
use crate::op::{AtomOp, BarOp, BoolOp, Class, Instr, Op, PredSrc, Setp, ShflMode, Space, Src, VoteMode};
use crate::ptx::grammar::Mods;
use crate::ptx::parse::{Operand, RawInstr};
use crate::ptx::types::Ty;

impl Decoder<'_> {
    pub(super) fn instr(&mut self, raw: &RawInstr) -> Res<Instr> {
        let mods = Mods::find(&raw.opcode, &raw.mods)?;
        self.require(&raw.full_name(), Floor::of(&mods, self.source.arch))?;
        let guard = match &raw.guard {
            Some((true, name)) => Some(self.pred_src(&Operand::Not(name.clone()))?),
            Some((false, name)) => Some(self.pred_src(&Operand::Name(name.clone()))?),
            None => None,
        };
        // Tried with ptxas: no other instruction reads them
        let reads_specials = mods.opcode == "mov" || (mods.opcode, mods.form) == ("cvt", "int");
        if let (false, Some(name)) = (reads_specials, raw.operands.iter().find_map(|o| self.special(o))) {
            return Err(format!("`{name}` is read by `mov` and by `cvt` between integers"));
        }
        let (op, class) = self.op(raw, &mods)?;
        Ok(Instr { op, guard, line: raw.line, class })
    }

    fn op(&mut self, raw: &RawInstr, m: &Mods) -> Res<(Op, Class)> {
        let o = &raw.operands;
        let n = |n: usize| Self::count(raw, n..=n);
        let flags = Flags { ftz: m.has("ftz"), sat: m.has("sat"), relu: m.has("relu"), nan: m.has("NaN") };
        Ok(match (m.opcode, m.form) {
            ("and" | "or" | "xor" | "not", _) if m.ty(0) == Ty::Pred => (self.logic_pred(raw, m)?, Class::Integer),
            ("add" | "sub" | "mul" | "min" | "max" | "and" | "or" | "xor", "int") => {
                n(3)?;
                let (ty, variant) = (m.ty(0), m.slot(0));
                if variant == Some("sat") && ty != Ty::S32 {
                    return Err("`.sat` needs type s32".into());
                }
                let wide = variant == Some("wide");
                if wide && ty.bits() == 64 {
                    return Err("`.wide` needs 16-bit or 32-bit sources".into());
                }
                let f = alu_int::binary(m.opcode, variant, ty);
                let d = self.dst(&o[0], if wide { widened(ty) } else { ty })?;
                (Op::A2 { f, d, a: self.src(&o[1], ty)?, b: self.src(&o[2], ty)? }, Class::Integer)
            }
            ("div" | "rem", "int") => {
                n(3)?;
                let ty = m.ty(0);
                let f = alu_int::binary(m.opcode, None, ty);
                (
                    Op::Div { f, d: self.dst(&o[0], ty)?, a: self.src(&o[1], ty)?, b: self.src(&o[2], ty)? },
                    Class::Integer,
                )
            }
            ("mad", _) => {
                n(4)?;
                let ty = m.ty(0);
                let variant = m.slot(0).unwrap_or("lo");
                if variant == "wide" && ty.bits() == 64 {
                    return Err("`.wide` needs 16-bit or 32-bit sources".into());
                }
                let wide = if variant == "wide" { widened(ty) } else { ty };
                let f = alu_int::mad(variant, ty);
                let (a, b) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?);
                (Op::A3 { f, d: self.dst(&o[0], wide)?, a, b, c: self.src(&o[3], wide)? }, Class::Integer)
            }
            ("abs" | "neg" | "not" | "popc" | "clz" | "brev", "int") => {
                n(2)?;
                let ty = m.ty(0);
                let to = if matches!(m.opcode, "popc" | "clz") { Ty::U32 } else { ty };
                let f = alu_int::unary(m.opcode, ty);
                (Op::A1 { f, d: self.dst(&o[0], to)?, a: self.src(&o[1], ty)? }, Class::Integer)
            }
            ("shl" | "shr", _) => {
                n(3)?;
                let ty = m.ty(0);
                let f = alu_int::binary(m.opcode, None, ty);
                let (d, a, b) = (self.dst(&o[0], ty)?, self.src(&o[1], ty)?, self.src(&o[2], Ty::U32)?);
                (Op::Shift { f, bits: ty.bits() as u8, d, a, b }, Class::Integer)
            }
            ("shf", _) => {
                let f = alu_int::shf(m.has("l"), m.has("wrap"));
                (self.three(raw, f, [Ty::B32, Ty::B32, Ty::B32, Ty::U32])?, Class::Integer)
            }
            ("bfe", _) => {
                let ty = m.ty(0);
                n(4)?;
                let (a, pos, len) = (self.src(&o[1], ty)?, self.at_most(&o[2], 255)?, self.at_most(&o[3], 255)?);
                (Op::A3 { f: alu_int::bfe(ty), d: self.dst(&o[0], ty)?, a, b: pos, c: len }, Class::Integer)
            }
            ("prmt", _) => (self.three(raw, alu_int::prmt(), [Ty::B32; 4])?, Class::Integer),
            ("bfi", _) => {
                n(5)?;
                let ty = m.ty(0);
                let (a, b) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?);
                let (pos, len) = (self.at_most(&o[3], 255)?, self.at_most(&o[4], 255)?);
                (Op::Bfi { d: self.dst(&o[0], ty)?, a, b, pos, len, bits: ty.bits() as u8 }, Class::Integer)
            }
            ("lop3", _) => {
                n(5)?;
                let Operand::Int(table @ 0..=255) = o[4] else { return Err("the table is a literal below 256".into()) };
                let (a, b, c) = (self.src(&o[1], Ty::B32)?, self.src(&o[2], Ty::B32)?, self.src(&o[3], Ty::B32)?);
                (Op::Lop3 { d: self.dst(&o[0], Ty::B32)?, a, b, c, table: table as u8 }, Class::Integer)
            }
            ("add" | "sub" | "mul" | "div" | "min" | "max", "f64") => {
                n(3)?;
                let (a, b) = (self.src(&o[1], Ty::F64)?, self.src(&o[2], Ty::F64)?);
                let class = if m.opcode == "div" { Class::Special } else { Class::Float };
                (Op::A2 { f: alu_double::binary(m.opcode), d: self.dst(&o[0], Ty::F64)?, a, b }, class)
            }
            ("fma", "f64") => (self.three(raw, alu_double::fma(), [Ty::F64; 4])?, Class::Float),
            ("sqrt" | "rcp" | "abs" | "neg", "f64") => {
                n(2)?;
                let class = if matches!(m.opcode, "abs" | "neg") { Class::Float } else { Class::Special };
                let f = alu_double::unary(m.opcode);
                (Op::A1 { f, d: self.dst(&o[0], Ty::F64)?, a: self.src(&o[1], Ty::F64)? }, class)
            }
            ("add" | "sub" | "mul" | "min" | "max", _) => {
                n(3)?;
                let ty = m.ty(0);
                let f = alu_float::binary(m.opcode, ty, flags);
                (Op::A2 { f, d: self.dst(&o[0], ty)?, a: self.src(&o[1], ty)?, b: self.src(&o[2], ty)? }, Class::Float)
            }
            ("fma", _) => {
                let ty = m.ty(0);
                (self.three(raw, alu_float::fma(ty, flags), [ty; 4])?, Class::Float)
            }
            ("abs" | "neg", _) => {
                n(2)?;
                let ty = m.ty(0);
                let f = alu_float::sign(m.opcode, ty, flags.ftz);
                (Op::A1 { f, d: self.dst(&o[0], ty)?, a: self.src(&o[1], ty)? }, Class::Float)
            }
            ("div", _) => {
                n(3)?;
                let (d, a, b) = (self.dst(&o[0], Ty::F32)?, self.src(&o[1], Ty::F32)?, self.src(&o[2], Ty::F32)?);
                let op = if m.has("rn") {
                    Op::A2 { f: alu_float::div_rn(flags.ftz), d, a, b }
                } else {
                    Op::DivApprox { full: m.has("full"), ftz: flags.ftz, d, a, b }
                };
                (op, Class::Special)
            }
            ("sqrt" | "rcp" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh", _) => {
                n(2)?;
                let ty = m.ty(0);
                let (d, a) = (self.dst(&o[0], ty)?, self.src(&o[1], ty)?);
                if m.has("rn") {
                    return Ok((Op::A1 { f: alu_float::exact_unary(m.opcode, flags.ftz), d, a }, Class::Special));
                }
                let function = match m.opcode {
                    "sqrt" => Function::Sqrt,
                    "rcp" => Function::Rcp,
                    "rsqrt" => Function::Rsqrt,
                    "ex2" => Function::Ex2,
                    "lg2" => Function::Lg2,
                    "sin" => Function::Sin,
                    "cos" => Function::Cos,
                    _ => Function::Tanh,
                };
                let pair = matches!(ty, Ty::F16x2 | Ty::Bf16x2);
                let format = alu_float::format(ty);
                (Op::Approx { function, format, ftz: flags.ftz, pair, d, a }, Class::Special)
            }
            ("setp", _) => (self.setp(raw, m)?, Class::Integer),
            ("set", _) => (self.set(raw, m)?, Class::Integer),
            ("selp", _) => {
                n(4)?;
                let ty = m.ty(0);
                let (a, b) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?);
                (Op::Selp { d: self.dst(&o[0], ty)?, a, b, p: self.pred_src(&o[3])? }, Class::Integer)
            }
            ("slct", form) => {
                let ty = m.ty(1);
                // c >= 0 selects a; -0 counts as 0 and NaN selects b (9.7.6.4)
                let f = match (form, flags.ftz) {
                    ("int", _) => f3!(|a: u64, b: u64, c: i32| if c >= 0 { a } else { b }),
                    (_, false) => f3!(|a: u64, b: u64, c: u32| if f32::from_bits(c) >= 0.0 { a } else { b }),
                    (_, true) => f3!(|a: u64, b: u64, c: u32| {
                        let c = crate::model::float::F32.flush(c);
                        if f32::from_bits(c) >= 0.0 { a } else { b }
                    }),
                };
                (self.three(raw, f, [ty, ty, ty, m.ty(0)])?, Class::Integer)
            }
            ("mov", _) => (self.mov(raw, m)?, Class::Integer),
            ("cvt", _) => (self.cvt(raw, m)?, Class::Convert),
            ("bra", _) => {
                n(1)?;
                let Operand::Name(label) = &o[0] else { return Err("expected a label".into()) };
                let scopes = self.scopes.iter().map(|s| s.0).collect();
                self.fixups.push((self.kernel.code.len(), label.clone(), scopes, raw.line));
                (Op::Bra { target: 0 }, Class::Control)
            }
            ("ret" | "exit", _) => (n(0).map(|()| Op::Exit)?, Class::Control),
            ("trap", _) => (n(0).map(|()| Op::Trap)?, Class::Control),
            ("nanosleep", _) => {
                n(1)?;
                self.src(&o[0], Ty::U32)?;
                (Op::Nop, Class::Control)
            }
            ("activemask", _) => {
                n(1)?;
                (Op::ActiveMask { d: self.dst(&o[0], Ty::B32)? }, Class::Warp)
            }
            ("shfl" | "vote" | "match" | "redux" | "elect", _) => (self.warp_op(raw, m)?, Class::Warp),
            ("bar" | "barrier" | "membar" | "fence", _) => (self.barrier(raw, m)?, Class::Sync),
            ("ldmatrix" | "stmatrix" | "movmatrix" | "mma", _) => self.matrix(raw, m)?,
            ("mbarrier" | "wgmma" | "setmaxnreg" | "griddepcontrol", _) | ("st", "async") => self.hopper(raw, m)?,
            ("cp", form) if form.starts_with("bulk") || form.starts_with("tensor") => self.hopper(raw, m)?,
            _ => self.memory(raw, m)?,
        })
    }

    /// The special register that an operand is, if nothing else has its name.
    fn special<'o>(&self, operand: &'o Operand) -> Option<&'o str> {
        match operand {
            Operand::Name(name) if self.lookup(name).is_none() && super::special::parse(name).is_some() => Some(name),
            Operand::Vector(items) => items.iter().find_map(|item| self.special(item)),
            _ => None,
        }
    }

    fn three(&mut self, raw: &RawInstr, f: crate::op::F3, ty: [Ty; 4]) -> Res<Op> {
        Self::count(raw, 4..=4)?;
        let o = &raw.operands;
        let (a, b, c) = (self.src(&o[1], ty[1])?, self.src(&o[2], ty[2])?, self.src(&o[3], ty[3])?);
        Ok(Op::A3 { f, d: self.dst(&o[0], ty[0])?, a, b, c })
    }

    fn logic_pred(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        let o = &raw.operands;
        if m.opcode == "not" {
            Self::count(raw, 2..=2)?;
            let a = self.pred_src(&o[1])?;
            return Ok(Op::PredMov { d: self.pred_dst(&o[0])?, a: PredSrc { negated: !a.negated, ..a } });
        }
        Self::count(raw, 3..=3)?;
        let (a, b) = (self.pred_src(&o[1])?, self.pred_src(&o[2])?);
        Ok(Op::PredLogic { op: bool_op(m.opcode), d: self.pred_dst(&o[0])?, a, b })
    }

    fn combination(&mut self, m: &Mods, raw: &RawInstr) -> Res<Option<(BoolOp, PredSrc)>> {
        match m.slot(1) {
            Some(op) => {
                Self::count(raw, 4..=4)?;
                Ok(Some((bool_op(op), self.pred_src(&raw.operands[3])?)))
            }
            None => Self::count(raw, 3..=3).map(|()| None),
        }
    }

    fn compare(&mut self, m: &Mods, ty: Ty) -> Res<crate::op::Compare> {
        let op = m.slot(0).unwrap_or("eq");
        match m.form {
            "int" => alu_int::compare_int(op, ty),
            "f64" => Ok(alu_double::compare(op)),
            _ => Ok(alu_float::compare_float(op, ty, m.has("ftz"))),
        }
    }

    fn setp(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        let o = &raw.operands;
        let with = self.combination(m, raw)?;
        let ty = m.ty(0);
        let (p, q) = match &o[0] {
            Operand::Pair(p, q) => (Some(self.pred_dst(p)?), Some(self.pred_dst(q)?)),
            p => (Some(self.pred_dst(p)?), None),
        };
        let f = self.compare(m, ty)?;
        let (a, b) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?);
        Ok(Op::Setp(Box::new(Setp { f, a, b, p, q, with, value: None })))
    }

    fn set(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        let o = &raw.operands;
        let with = self.combination(m, raw)?;
        let (to, ty) = (m.ty(1), m.ty(0));
        let yes = if to == Ty::F32 { u64::from(1f32.to_bits()) } else { 0xffff_ffff };
        let f = self.compare(m, ty)?;
        let (a, b) = (self.src(&o[1], ty)?, self.src(&o[2], ty)?);
        Ok(Op::Setp(Box::new(Setp { f, a, b, p: None, q: None, with, value: Some((self.dst(&o[0], to)?, yes)) })))
    }

    fn mov(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        Self::count(raw, 2..=2)?;
        let o = &raw.operands;
        let ty = m.ty(0);
        if ty == Ty::Pred {
            let d = self.pred_dst(&o[0])?;
            return Ok(match o[1] {
                Operand::Int(v @ 0..=1) => Op::PredConst { d, value: v == 1 },
                _ => Op::PredMov { d, a: self.pred_src(&o[1])? },
            });
        }
        let packs = o.iter().any(|o| matches!(o, Operand::Vector(_)));
        if packs && ty.class() != crate::ptx::types::Class::Bits {
            return Err("a vector is moved as `.b32` or `.b64`".into());
        }
        let part = |n: usize| -> Res<Ty> {
            Ok(match ty.bits() / n as u32 {
                16 => Ty::B16,
                32 => Ty::B32,
                _ => return Err(format!("{n} parts do not make up type {ty:?}")),
            })
        };
        if let Operand::Vector(parts) = &o[1] {
            let ty = part(parts.len())?;
            let parts = parts.iter().map(|p| self.src(p, ty)).collect::<Res<_>>()?;
            return Ok(Op::Pack { d: self.dst(&o[0], m.ty(0))?, bits: ty.bits() as u8, parts });
        }
        if let Operand::Vector(parts) = &o[0] {
            let ty = part(parts.len())?;
            let parts = parts.iter().map(|p| self.dst_or_sink(p, ty)).collect::<Res<_>>()?;
            return Ok(Op::Unpack { a: self.src(&o[1], m.ty(0))?, bits: ty.bits() as u8, parts });
        }
        if let Operand::Name(name) = &o[1] {
            let bits = match name.as_str() {
                "%clock" | "%clock_hi" | "%globaltimer_lo" | "%globaltimer_hi" => 32,
                "%clock64" | "%globaltimer" => 64,
                _ => 0,
            };
            if bits != 0 {
                if bits != ty.bits() {
                    return Err(format!("`{name}` has {bits} bits"));
                }
                return Ok(Op::Clock { d: self.dst(&o[0], ty)?, bits: bits as u8 });
            }
        }
        let d = self.dst(&o[0], ty)?;
        Ok(Op::A1 { f: f1!(|a: u64| a), d, a: self.src(&o[1], ty)? })
    }

    fn cvt(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        let o = &raw.operands;
        if m.form == "f64" {
            Self::count(raw, 2..=2)?;
            let (to, from) = (m.ty(1), m.ty(0));
            return Ok(Op::A1 { f: alu_double::convert(to, from), d: self.dst(&o[0], to)?, a: self.src(&o[1], from)? });
        }
        let round = match m.one_of(&["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna"]) {
            Some("rz" | "rzi") => Round::Zero,
            Some("rm" | "rmi") => Round::Down,
            Some("rp" | "rpi") => Round::Up,
            Some("rna") => Round::Away,
            _ => Round::Nearest,
        };
        let how =
            Cvt { round, ftz: m.has("ftz"), sat: m.has("sat"), satfinite: m.has("satfinite"), relu: m.has("relu") };
        let plain = how == Cvt::new(Round::Nearest);
        let (to, from) = (m.ty(1), m.ty(0));
        let (to_format, from_format) = (alu_float::format(to), alu_float::format(from));
        if m.form == "pack" || m.form == "pack8" && from == Ty::F32 {
            Self::count(raw, 3..=3)?;
            let (a, b) = (self.src(&o[1], Ty::F32)?, self.src(&o[2], Ty::F32)?);
            let d = self.dst(&o[0], if m.form == "pack8" { Ty::B16 } else { to })?;
            if m.form == "pack" && plain {
                return Ok(Op::A2 { f: alu_float::pack_rn(to), d, a, b });
            }
            return Ok(Op::CvtPack { to: to_format, how, d, a, b });
        }
        Self::count(raw, 2..=2)?;
        if how.ftz && from != Ty::F32 && to != Ty::F32 {
            return Err("`.ftz` needs an f32 on one side".into());
        }
        let (conversion, d_ty, a_ty) = match m.form {
            "int" => (Conversion::IntInt { from, to, sat: how.sat }, to, from),
            "to_int" => (Conversion::ToInt { from, to, round, ftz: how.ftz }, to, from),
            "from_int" => (Conversion::FromInt { from, to, how }, to, from),
            "round" => (Conversion::Integral { how }, to, from),
            "pack8" => (Conversion::Pair { from: from_format, to: to_format, how }, Ty::B16, Ty::F16x2),
            "unpack8" => (Conversion::Pair { from: from_format, to: to_format, how }, Ty::F16x2, Ty::B16),
            "tf32" => (Conversion::Float { from: from_format, to: to_format, how }, Ty::U32, Ty::F32),
            _ => (Conversion::Float { from: from_format, to: to_format, how }, to, from),
        };
        if m.form == "int" && how.sat && contains(to, from) {
            return Err(format!("`.sat` has nothing to clamp: {to:?} holds every {from:?}"));
        }
        // bf16 has no integer partner in a wider register
        let wider = matches!(m.form, "int" | "to_int" | "from_int") && to != Ty::Bf16 && from != Ty::Bf16;
        let a = self.src_sized(&o[1], a_ty, wider && is_int(a_ty))?;
        let (d, reg_bits) = self.dst_sized(&o[0], d_ty, wider && is_int(d_ty))?;
        Ok(match m.form {
            "widen" if plain => Op::A1 { f: alu_float::widen(from), d, a },
            "narrow" if plain => Op::A1 { f: alu_float::narrow_rn(to), d, a },
            "int" if !how.sat && (from, to, reg_bits) == (Ty::U32, Ty::U64, 64) => Op::A1 { f: f1!(|a: u32| a), d, a },
            "int" if !how.sat && (from, to, reg_bits) == (Ty::S32, Ty::S64, 64) => {
                Op::A1 { f: f1!(|a: i32| i64::from(a)), d, a }
            }
            "int" if !how.sat && (to.bits(), reg_bits) == (32, 32) && from.bits() == 64 => {
                Op::A1 { f: f1!(|a: u32| a), d, a }
            }
            "from_int" if plain && (from, to) == (Ty::U32, Ty::F32) => {
                Op::A1 { f: f1!(|a: u32| (a as f32).to_bits()), d, a }
            }
            "from_int" if plain && (from, to) == (Ty::S32, Ty::F32) => {
                Op::A1 { f: f1!(|a: i32| (a as f32).to_bits()), d, a }
            }
            _ => {
                let (bits, signed) = (d_ty.bits() as u8, d_ty.signed());
                Op::Cvt { how: conversion, d, a, bits, reg_bits: reg_bits as u8, signed }
            }
        })
    }

    fn members(&mut self, operand: &Operand) -> Res<Src> {
        self.src(operand, Ty::U32) // a mask, so no floating-point register
    }

    fn warp_op(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        let o = &raw.operands;
        Ok(match m.opcode {
            "shfl" => {
                Self::count(raw, 5..=5)?;
                let mode = match m.slot(1) {
                    Some("up") => ShflMode::Up,
                    Some("down") => ShflMode::Down,
                    Some("bfly") => ShflMode::Bfly,
                    _ => ShflMode::Idx,
                };
                let (d, p) = match &o[0] {
                    Operand::Pair(d, p) => (self.dst(d, Ty::B32)?, Some(self.pred_dst(p)?)),
                    d => (self.dst(d, Ty::B32)?, None),
                };
                let (a, b, c) = (self.src(&o[1], Ty::B32)?, self.src(&o[2], Ty::B32)?, self.src(&o[3], Ty::B32)?);
                Op::Shfl { mode, d, p, a, b, c, members: self.members(&o[4])? }
            }
            "vote" => {
                Self::count(raw, 3..=3)?;
                let (mode, d) = match m.slot(1) {
                    Some("all") => (VoteMode::All, self.pred_dst(&o[0])?),
                    Some("any") => (VoteMode::Any, self.pred_dst(&o[0])?),
                    Some("uni") => (VoteMode::Uni, self.pred_dst(&o[0])?),
                    _ => (VoteMode::Ballot, self.dst(&o[0], Ty::B32)?),
                };
                Op::Vote { mode, d, a: self.pred_src(&o[1])?, members: self.members(&o[2])? }
            }
            "match" => {
                Self::count(raw, 3..=3)?;
                let (d, p) = match &o[0] {
                    // A mask, so no floating-point register
                    Operand::Pair(d, p) if m.has("all") => (self.dst(d, Ty::U32)?, Some(self.pred_dst(p)?)),
                    d => (self.dst(d, Ty::U32)?, None),
                };
                let ty = m.ty(0);
                Op::Match { all: m.has("all"), d, p, a: self.src(&o[1], ty)?, members: self.members(&o[2])? }
            }
            "redux" => {
                Self::count(raw, 3..=3)?;
                let ty = if m.ty(0) == Ty::B32 { Ty::U32 } else { m.ty(0) };
                let op = atom_op(m.slot(1).unwrap_or("add"));
                let (d, a) = (self.dst(&o[0], ty)?, self.src(&o[1], ty)?);
                Op::Redux { op, signed: ty.signed(), d, a, members: self.members(&o[2])? }
            }
            _ => {
                Self::count(raw, 2..=2)?;
                let Operand::Pair(d, p) = &o[0] else { return Err("expected `d|p`".into()) };
                Op::Elect { d: self.dst_or_sink(d, Ty::B32)?, p: self.pred_dst(p)?, members: self.members(&o[1])? }
            }
        })
    }

    /// How many threads a barrier waits for: whole warps.
    fn threads(&mut self, operand: &Operand) -> Res<Src> {
        match *operand {
            Operand::Int(n) if n % 32 != 0 => Err(format!("{n} threads at a barrier, expected a multiple of 32")),
            _ => self.src(operand, Ty::U32),
        }
    }

    fn barrier(&mut self, raw: &RawInstr, m: &Mods) -> Res<Op> {
        let o = &raw.operands;
        Ok(match (m.opcode, m.form) {
            ("bar", "warp") => {
                Self::count(raw, 1..=1)?;
                Op::BarWarp { members: self.members(&o[0])? }
            }
            ("bar" | "barrier", "cta") => {
                let op = if m.has("sync") { BarOp::Sync } else { BarOp::Arrive };
                Self::count(raw, if op == BarOp::Sync { 1..=2 } else { 2..=2 })?;
                let count = o.get(1).map(|c| self.threads(c)).transpose()?;
                Op::Bar { op, id: self.at_most(&o[0], 15)?, count, input: None, d: 0 }
            }
            ("bar" | "barrier", "red_pred" | "red_popc") => {
                Self::count(raw, 3..=4)?;
                let op = match m.one_of(&["and", "or", "popc"]) {
                    Some("and") => BarOp::RedAnd,
                    Some("or") => BarOp::RedOr,
                    _ => BarOp::RedPopc,
                };
                let d = if op == BarOp::RedPopc { self.dst(&o[0], Ty::U32)? } else { self.pred_dst(&o[0])? };
                let count = if o.len() == 4 { Some(self.threads(&o[2])?) } else { None };
                let input = Some(self.pred_src(&o[o.len() - 1])?);
                Op::Bar { op, id: self.at_most(&o[1], 15)?, count, input, d }
            }
            (_, "cluster_arrive") => {
                Self::count(raw, 0..=0)?;
                Op::ClusterArrive { release: !m.has("relaxed") }
            }
            (_, "cluster_wait") => Self::count(raw, 0..=0).map(|()| Op::ClusterWait)?,
            (_, form @ ("mbarrier_init" | "proxy_async")) => {
                Self::count(raw, 0..=0)?;
                Op::ProxyFence { init: form == "mbarrier_init" }
            }
            ("fence", _) => Self::count(raw, 0..=0).map(|()| Op::Fence { wide: m.has("gpu") || m.has("sys") })?,
            _ => Self::count(raw, 0..=0).map(|()| Op::Fence { wide: !m.has("cta") })?,
        })
    }
}

fn is_int(ty: Ty) -> bool {
    ty.class() == crate::ptx::types::Class::Int
}

/// Whether every value of the integer type `from` is one of `to`.
fn contains(to: Ty, from: Ty) -> bool {
    match (to.signed(), from.signed()) {
        (true, false) => to.bits() > from.bits(),
        (false, true) => false,
        _ => to.bits() >= from.bits(),
    }
}

fn widened(ty: Ty) -> Ty {
    match ty {
        Ty::U16 => Ty::U32,
        Ty::S16 => Ty::S32,
        Ty::U32 => Ty::U64,
        _ => Ty::S64,
    }
}

fn bool_op(name: &str) -> BoolOp {
    match name {
        "and" => BoolOp::And,
        "or" => BoolOp::Or,
        _ => BoolOp::Xor,
    }
}

pub(super) fn atom_op(name: &str) -> AtomOp {
    match name {
        "add" => AtomOp::Add,
        "min" => AtomOp::Min,
        "max" => AtomOp::Max,
        "and" => AtomOp::And,
        "or" => AtomOp::Or,
        "xor" => AtomOp::Xor,
        "exch" => AtomOp::Exch,
        "cas" => AtomOp::Cas,
        "inc" => AtomOp::Inc,
        _ => AtomOp::Dec,
    }
}

pub(super) fn space(m: &Mods) -> Space {
    match m.one_of(&["global", "shared", "shared::cta", "shared::cluster", "local", "const", "param"]) {
        Some("global") => Space::Global,
        Some("shared" | "shared::cta") => Space::Shared,
        Some("shared::cluster") => Space::SharedCluster,
        Some("local") => Space::Local,
        Some("const") => Space::Const,
        Some("param") => Space::Param,
        _ => Space::Generic,
    }
}

/// The class of an access to a space.
pub(super) fn space_class(space: Space) -> Class {
    match space {
        Space::Global | Space::Generic => Class::Global,
        Space::Shared | Space::SharedCluster => Class::Shared,
        _ => Class::Other,
    }
}
