//! Statements to a [`Kernel`]: names become register numbers, labels become targets, operands are checked against types.

pub(crate) mod floor;
mod hopper;
mod instr;
mod matrix;
mod memory;
mod special;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::op::{Addr, Instr, Kernel, Op, ParamSlot, PredSrc, Reg, Source, Space, Src, Uses};
use crate::ptx::PtxError;
use crate::ptx::parse::{Ast, Entry, Operand, RawInstr, Stmt, Var, VarSpace};
use crate::ptx::types::{Class as TyClass, Ty};
use crate::window;

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
enum Sym {
    Reg(Ty, Reg),
    Pred(u16),
    /// A variable: its space and its address there.
    Var(Space, u64),
}

/// A `.global` or `.const` variable: where it lies in the module's window, and its first bytes.
#[derive(Debug)]
pub(crate) struct ModuleVar {
    pub address: u64,
    pub bytes: u64,
    pub init: Vec<u8>,
}

type Res<T> = Result<T, String>;

/// Shared memory that a kernel may declare; more is dynamic.
const MAX_STATIC_SMEM: u64 = 48 << 10;

/// Where a branch to a label stands: (instruction, label, scopes open there).
type Fixup = (usize, String, Vec<usize>, u32);

pub(crate) struct Decoder<'a> {
    file: &'a str,
    text: &'a str,
    source: &'a Arc<Source>,
    scopes: Vec<(usize, HashMap<String, Sym>)>,
    labels: HashMap<(usize, String), u32>,
    fixups: Vec<Fixup>,
    consts: HashMap<u64, u16>,
    num_scopes: usize,
    static_smem: u64,
    local_bytes: u64,
    kernel: Kernel,
}

/// Decodes every entry of a module.
pub(crate) fn decode(file: &str, text: &str, ast: &Ast) -> Result<(Vec<Kernel>, Vec<ModuleVar>), PtxError> {
    let arch = ast.target.trim_start_matches("sm_").trim_end_matches('a').parse().unwrap_or(80);
    let source = Arc::new(Source {
        file: file.into(),
        lines: text.lines().map(|l| l.trim().to_string()).collect(),
        arch,
        version: ast.version,
        sm_90a: ast.target == "sm_90a",
    });
    let mut vars = vec![];
    let mut next = window::MODULE_VARS;
    for var in ast.vars.iter().filter(|v| matches!(v.space, VarSpace::Global | VarSpace::Const)) {
        next = next.next_multiple_of(var.align.max(16));
        let Some(bytes) = var.bytes else {
            return Err(PtxError::new(file, var.line, text, "a `.global` array needs a length".into()));
        };
        vars.push(ModuleVar { address: next, bytes, init: var.init.clone() });
        next += bytes + 256;
    }
    let mut names = HashSet::new();
    let named = ast.vars.iter().map(|v| (v.line, &v.name)).chain(ast.entries.iter().map(|e| (e.line, &e.name)));
    for (line, name) in named {
        if !names.insert(name) {
            return Err(PtxError::new(file, line, text, format!("`{name}` is declared twice")));
        }
    }
    let mut kernels = vec![];
    for entry in &ast.entries {
        kernels.push(Decoder::new(file, text, &source).entry(ast, entry, &vars)?);
    }
    Ok((kernels, vars))
}

impl<'a> Decoder<'a> {
    fn new(file: &'a str, text: &'a str, source: &'a Arc<Source>) -> Self {
        let kernel = Kernel {
            name: String::new(),
            code: vec![],
            consts: vec![],
            num_regs: 0,
            num_preds: 0,
            reg_names: vec![],
            pred_names: vec![],
            specials: vec![],
            params: vec![],
            param_bytes: 0,
            static_smem: 0,
            local_bytes: 0,
            reqntid: None,
            maxntid: None,
            maxnreg: None,
            reqcluster: None,
            uses: Uses::default(),
            source: source.clone(),
        };
        Decoder {
            file,
            text,
            source,
            scopes: vec![],
            labels: HashMap::new(),
            fixups: vec![],
            consts: HashMap::new(),
            num_scopes: 0,
            static_smem: 0,
            local_bytes: 0,
            kernel,
        }
    }

    fn error(&self, line: u32, message: impl Into<String>) -> PtxError {
        PtxError::new(self.file, line, self.text, message.into())
    }

    fn open(&mut self) {
        self.scopes.push((self.num_scopes, HashMap::new()));
        self.num_scopes += 1;
    }

    fn declare(&mut self, line: u32, name: String, sym: Sym) -> Result<(), PtxError> {
        let (number, scope) = self.scopes.last_mut().expect("a scope is open");
        let is_label = self.labels.contains_key(&(*number, name.clone()));
        if scope.insert(name.clone(), sym).is_some() || is_label {
            return Err(self.error(line, format!("`{name}` is declared twice")));
        }
        Ok(())
    }

    fn entry(mut self, ast: &Ast, entry: &Entry, vars: &[ModuleVar]) -> Result<Kernel, PtxError> {
        self.kernel.name = entry.name.clone();
        self.kernel.reqntid = entry.reqntid;
        self.kernel.maxntid = entry.maxntid;
        self.kernel.maxnreg = entry.maxnreg;
        self.kernel.reqcluster = entry.reqnctapercluster;
        if entry.reqnctapercluster.is_some() || entry.explicit_cluster {
            let what = if entry.explicit_cluster { ".explicitcluster" } else { ".reqnctapercluster" };
            self.require(what, floor::CLUSTERS).map_err(|m| self.error(entry.line, m))?;
        }
        self.open();
        // Static shared variables first, wherever they stand; dynamic shared memory begins after them.
        let body_vars = entry.body.iter().filter_map(|s| if let Stmt::Var(v) = s { Some(v) } else { None });
        let shared: Vec<&Var> = ast.vars.iter().chain(body_vars).filter(|v| v.space == VarSpace::Shared).collect();
        let mut address_of = HashMap::new();
        for var in shared.iter().filter(|v| !v.is_extern) {
            let bytes = var.bytes.ok_or_else(|| self.error(var.line, "a shared array needs a length"))?;
            let at = self.static_smem.next_multiple_of(var.align);
            address_of.insert((var.line, var.name.clone()), at);
            self.static_smem = at.saturating_add(bytes);
            if self.static_smem > MAX_STATIC_SMEM {
                let message =
                    format!("more than {MAX_STATIC_SMEM} bytes of shared memory: `.extern` has no such limit");
                return Err(self.error(var.line, message));
            }
        }
        let align = shared.iter().filter(|v| v.is_extern).map(|v| v.align.max(16)).max();
        if let Some(align) = align {
            self.static_smem = self.static_smem.next_multiple_of(align);
        }
        for var in shared.iter().filter(|v| v.is_extern) {
            address_of.insert((var.line, var.name.clone()), self.static_smem);
        }
        let mut global = vars.iter();
        for var in &ast.vars {
            let sym = match var.space {
                VarSpace::Shared => Sym::Var(Space::Shared, address_of[&(var.line, var.name.clone())]),
                VarSpace::Global => Sym::Var(Space::Global, global.next().map_or(0, |v| v.address)),
                VarSpace::Const => Sym::Var(Space::Const, global.next().map_or(0, |v| v.address)),
                _ => return Err(self.error(var.line, "this state space does not belong at module level")),
            };
            self.declare(var.line, var.name.clone(), sym)?;
        }
        self.open();
        let mut offset = 0u64;
        for p in &entry.params {
            let bytes = p.bytes.ok_or_else(|| self.error(p.line, "a parameter needs a size"))?;
            offset = offset.next_multiple_of(p.align.max(u64::from(p.ty.bytes())));
            self.kernel.params.push(ParamSlot { name: p.name.clone(), offset: offset as u32, bytes: bytes as u32 });
            self.declare(p.line, p.name.clone(), Sym::Var(Space::Param, window::PARAM + offset))?;
            offset = offset.saturating_add(bytes);
        }
        if offset > 4096 {
            return Err(self.error(entry.line, format!("{offset} bytes of parameters, the limit is 4096")));
        }
        self.kernel.param_bytes = offset as u32;
        for stmt in &entry.body {
            self.statement(stmt, &address_of)?;
        }
        // Falling off the end is a return.
        let line = self.kernel.code.last().map_or(entry.line, |i| i.line);
        let class = crate::op::Class::Control;
        self.kernel.code.push(Instr { op: Op::Exit, guard: None, line, class });
        for (at, label, scopes, line) in std::mem::take(&mut self.fixups) {
            let target = scopes.iter().rev().find_map(|s| self.labels.get(&(*s, label.clone())));
            let Some(&target) = target else { return Err(self.error(line, format!("no label `{label}`"))) };
            self.kernel.code[at].op = Op::Bra { target };
        }
        self.kernel.static_smem = self.static_smem as u32;
        self.kernel.local_bytes = self.local_bytes as u32;
        Ok(self.kernel)
    }

    fn statement(&mut self, stmt: &Stmt, address_of: &HashMap<(u32, String), u64>) -> Result<(), PtxError> {
        match stmt {
            Stmt::Open => self.open(),
            Stmt::Close => {
                self.scopes.pop();
            }
            Stmt::Label(line, name) => {
                let (scope, names) = self.scopes.last().expect("a scope is open");
                if names.contains_key(name) {
                    return Err(self.error(*line, format!("`{name}` is declared twice")));
                }
                if name.contains('.') {
                    return Err(self.error(*line, format!("`{name}` cannot be a label")));
                }
                if self.labels.insert((*scope, name.clone()), self.kernel.code.len() as u32).is_some() {
                    return Err(self.error(*line, format!("label `{name}` stands twice")));
                }
            }
            Stmt::Regs(line, ty, names) => {
                for (name, count) in names {
                    for i in 0..count.unwrap_or(1) {
                        let name = if count.is_some() { format!("{name}{i}") } else { name.clone() };
                        let sym = self.new_register(*ty, &name).map_err(|m| self.error(*line, m))?;
                        self.declare(*line, name, sym)?;
                    }
                }
            }
            Stmt::Var(var) => {
                let sym = match var.space {
                    VarSpace::Shared => Sym::Var(Space::Shared, address_of[&(var.line, var.name.clone())]),
                    VarSpace::Local => {
                        let bytes = var.bytes.ok_or_else(|| self.error(var.line, "a local array needs a length"))?;
                        let at = self.local_bytes.next_multiple_of(var.align);
                        self.local_bytes = at + bytes;
                        Sym::Var(Space::Local, at)
                    }
                    _ => return Err(self.error(var.line, "declare this variable at module level")),
                };
                self.declare(var.line, var.name.clone(), sym)?;
            }
            Stmt::Instr(raw) => {
                let instr = self.instr(raw).map_err(|m| self.error(raw.line, m))?;
                self.kernel.code.push(instr);
            }
        }
        Ok(())
    }

    fn new_register(&mut self, ty: Ty, name: &str) -> Res<Sym> {
        if ty == Ty::Pred {
            self.kernel.pred_names.push(name.into());
            self.kernel.num_preds += 1;
            return Ok(Sym::Pred(self.kernel.num_preds as u16 - 1));
        }
        let is_small = matches!(ty, Ty::E4m3 | Ty::E5m2 | Ty::E4m3x2 | Ty::E5m2x2);
        if ty.bits() == 128 || is_small || matches!(ty, Ty::Tf32 | Ty::Bf16 | Ty::Bf16x2) {
            return Err(format!("registers of type {ty:?} are not supported"));
        }
        if self.kernel.num_regs >= usize::from(Src::CONST) / 2 {
            return Err("too many registers".into());
        }
        self.kernel.reg_names.push(name.into());
        self.kernel.num_regs += 1;
        Ok(Sym::Reg(ty, self.kernel.num_regs as Reg - 1))
    }

    fn lookup(&self, name: &str) -> Option<Sym> {
        self.scopes.iter().rev().find_map(|(_, names)| names.get(name).copied())
    }

    fn constant(&mut self, value: u64) -> Src {
        let next = self.kernel.consts.len() as u16;
        let index = *self.consts.entry(value).or_insert(next);
        if index == next {
            self.kernel.consts.push([value; 32]);
        }
        Src(Src::CONST | index)
    }

    /// An immediate as the bits of `ty`.
    fn immediate(&mut self, operand: &Operand, ty: Ty) -> Res<Src> {
        let bits = ty.bits();
        let value = match *operand {
            Operand::Int(v) => {
                if ty.class() == TyClass::Float || matches!(ty, Ty::Bf16 | Ty::Bf16x2) {
                    return Err(format!("an integer literal does not fit type {ty:?}"));
                }
                let (low, high) = (-(1i128 << (bits - 1)), 1i128 << bits);
                if !(low..high).contains(&v) {
                    return Err(format!("{v} does not fit {bits} bits"));
                }
                v as u64 & mask(bits)
            }
            Operand::F32(v) if matches!(ty, Ty::F32 | Ty::B32) => u64::from(v),
            Operand::F64(v) if ty == Ty::F32 => u64::from((f64::from_bits(v) as f32).to_bits()),
            Operand::F64(v) if matches!(ty, Ty::F64 | Ty::B64) => v,
            _ => return Err(format!("this literal does not fit type {ty:?}")),
        };
        Ok(self.constant(value))
    }

    /// A register that agrees with `ty` (same size; not integer against float), a special register or a literal.
    fn src(&mut self, operand: &Operand, ty: Ty) -> Res<Src> {
        self.src_sized(operand, ty, false)
    }

    /// As [`Self::src`], but with `wider` the register may be wider than the type, as `st` and `cvt` allow.
    fn src_sized(&mut self, operand: &Operand, ty: Ty, wider: bool) -> Res<Src> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Sym::Reg(have, reg)) => {
                    agree(name, have, ty, wider)?;
                    Ok(Src(reg))
                }
                Some(Sym::Pred(_)) => Err(format!("`{name}` is a predicate, expected {ty:?}")),
                Some(Sym::Var(_, address)) => {
                    if ty.class() == TyClass::Float || ty.bits() < 32 {
                        return Err(format!("the address of `{name}` does not fit type {ty:?}"));
                    }
                    Ok(self.constant(address))
                }
                None => {
                    let special = special::parse(name).ok_or_else(|| format!("`{name}` is not declared"))?;
                    if special::of_clusters(special) {
                        self.require(name, floor::CLUSTERS)?;
                    }
                    if special::bits(special) != ty.bits() || ty.class() == TyClass::Float {
                        return Err(format!("`{name}` does not fit type {ty:?}"));
                    }
                    if let Some(&(reg, _)) = self.kernel.specials.iter().find(|(_, s)| *s == special) {
                        return Ok(Src(reg));
                    }
                    let reg = self.kernel.num_regs as Reg;
                    self.kernel.num_regs += 1;
                    self.kernel.reg_names.push(name.clone());
                    self.kernel.specials.push((reg, special));
                    Ok(Src(reg))
                }
            },
            Operand::Symbol(name, offset) => match self.lookup(name) {
                Some(Sym::Var(_, address)) if ty.bits() >= 32 => {
                    Ok(self.constant(address.wrapping_add(*offset as u64)))
                }
                _ => Err(format!("`{name}` is not a variable")),
            },
            other => self.immediate(other, ty),
        }
    }

    fn dst(&mut self, operand: &Operand, ty: Ty) -> Res<Reg> {
        Ok(self.dst_sized(operand, ty, false)?.0)
    }

    /// A destination and the width of its register.
    fn dst_sized(&mut self, operand: &Operand, ty: Ty, wider: bool) -> Res<(Reg, u32)> {
        let Operand::Name(name) = operand else { return Err("the destination is a register".into()) };
        match self.lookup(name) {
            Some(Sym::Reg(have, reg)) => {
                agree(name, have, ty, wider)?;
                Ok((reg, have.bits()))
            }
            Some(_) => Err(format!("`{name}` is not a register of type {ty:?}")),
            None => Err(format!("`{name}` is not declared")),
        }
    }

    /// A destination that may be `_`.
    fn dst_or_sink(&mut self, operand: &Operand, ty: Ty) -> Res<Option<Reg>> {
        if *operand == Operand::Sink { Ok(None) } else { self.dst(operand, ty).map(Some) }
    }

    fn pred_dst(&mut self, operand: &Operand) -> Res<u16> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Sym::Pred(p)) => Ok(p),
                _ => Err(format!("`{name}` is not a predicate")),
            },
            _ => Err("expected a predicate".into()),
        }
    }

    fn pred_src(&mut self, operand: &Operand) -> Res<PredSrc> {
        match operand {
            Operand::Name(name) | Operand::Not(name) => match self.lookup(name) {
                Some(Sym::Pred(reg)) => Ok(PredSrc { reg, negated: matches!(operand, Operand::Not(_)) }),
                _ => Err(format!("`{name}` is not a predicate")),
            },
            _ => Err("expected a predicate".into()),
        }
    }

    /// `[base + offset]`, without coordinates.
    fn addr(&mut self, operand: &Operand, space: Space) -> Res<Addr> {
        match operand {
            Operand::Address { base, offset, coords: None } => {
                if let (Operand::Name(name), Space::Generic) = (&**base, space)
                    && let Some(Sym::Var(Space::Param, _)) = self.lookup(name)
                {
                    return Err(format!("`{name}` is a parameter: the instruction names no `.param`"));
                }
                let base = self.addr_base(base, space)?;
                Ok(Addr { space, base, offset: *offset })
            }
            _ => Err("expected an address in brackets".into()),
        }
    }

    fn addr_base(&mut self, base: &Operand, space: Space) -> Res<Src> {
        let Operand::Name(name) = base else {
            return match space {
                Space::Local => Ok(self.constant(0)),
                _ => Err("an address without a register or a variable needs `.local`".into()),
            };
        };
        match self.lookup(name) {
            Some(Sym::Reg(ty, reg)) => {
                let narrow = matches!(space, Space::Shared | Space::SharedCluster | Space::Local | Space::Param);
                if ty.class() == TyClass::Float || !(ty.bits() == 64 || ty.bits() == 32 && narrow) {
                    return Err(format!("`{name}` of type {ty:?} cannot hold an address of this space"));
                }
                Ok(Src(reg))
            }
            Some(Sym::Var(have, address)) => {
                let fits = have == space || space == Space::SharedCluster && have == Space::Shared;
                match (fits, space) {
                    (true, _) => Ok(self.constant(address)),
                    (false, Space::Generic) => Ok(self.constant(window::to_generic(have, address))),
                    _ => Err(format!("`{name}` lies in another state space")),
                }
            }
            _ => Err(format!("`{name}` is not an address")),
        }
    }

    /// A register, or a literal that is at most `most`.
    fn at_most(&mut self, operand: &Operand, most: i128) -> Res<Src> {
        match *operand {
            Operand::Int(n) if !(0..=most).contains(&n) => Err(format!("{n} is out of range, expected 0 to {most}")),
            _ => self.src(operand, Ty::U32),
        }
    }

    /// Exactly `n` operands.
    fn count(raw: &RawInstr, n: std::ops::RangeInclusive<usize>) -> Res<()> {
        if n.contains(&raw.operands.len()) {
            return Ok(());
        }
        let want = if n.start() == n.end() { n.start().to_string() } else { format!("{} to {}", n.start(), n.end()) };
        Err(format!("`{}` takes {want} operands, found {}", raw.opcode, raw.operands.len()))
    }
}

pub(crate) fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// PTX ISA 9.6: sizes agree, and an integer register does not serve a floating-point type or the reverse.
fn agree(name: &str, have: Ty, want: Ty, wider: bool) -> Res<()> {
    let size_fits = have.bits() == want.bits()
        || (wider || want.bits() == 8) && have.bits() > want.bits() && have.class() != TyClass::Float;
    // Packed and short floats come in registers of bits, or of just that type
    let is_packed = |ty| matches!(ty, Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2);
    let class_fits = have.class() == TyClass::Bits
        || have == want
        || !is_packed(want) && (want.class() == TyClass::Bits || have.class() == want.class() && !is_packed(have));
    if size_fits && class_fits {
        return Ok(());
    }
    Err(format!("`{name}` has type {have:?}, the instruction needs {want:?}"))
}
