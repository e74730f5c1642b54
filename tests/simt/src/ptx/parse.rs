//! Tokens to statements: directives, declarations, labels and instructions, not yet resolved.

use super::lex::{Lexeme, Token, lex};
use super::types::{Class, Ty};
use super::{PtxError, parse_expr::Expr};
use crate::decode::floor::version_of_target;

/// A whole file.
pub(crate) struct Ast {
    pub version: (u32, u32),
    pub target: String,
    pub vars: Vec<Var>,
    pub entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VarSpace {
    Shared,
    Global,
    Const,
    Local,
    Param,
}

/// A variable or a kernel parameter.
#[derive(Clone, Debug)]
pub(crate) struct Var {
    pub line: u32,
    pub name: String,
    pub space: VarSpace,
    pub ty: Ty,
    pub align: u64,
    /// `None` for an array without a length (`.extern .shared x[];`).
    pub bytes: Option<u64>,
    pub init: Vec<u8>,
    pub is_extern: bool,
}

/// A kernel.
pub(crate) struct Entry {
    pub line: u32,
    pub name: String,
    pub params: Vec<Var>,
    pub reqntid: Option<[u32; 3]>,
    pub maxntid: Option<[u32; 3]>,
    pub maxnreg: Option<u32>,
    pub reqnctapercluster: Option<[u32; 3]>,
    pub explicit_cluster: bool,
    pub body: Vec<Stmt>,
}

/// One statement of a body, in source order.
pub(crate) enum Stmt {
    Open,
    Close,
    /// Registers: a name, or a name with a count (`r<8>`).
    Regs(u32, Ty, Vec<(String, Option<u32>)>),
    Var(Var),
    Label(u32, String),
    Instr(RawInstr),
}

/// An instruction as written.
pub(crate) struct RawInstr {
    pub line: u32,
    /// `@p` or `@!p`: (negated, name).
    pub guard: Option<(bool, String)>,
    pub opcode: String,
    pub mods: Vec<String>,
    pub operands: Vec<Operand>,
}

impl RawInstr {
    /// The opcode with its modifiers.
    pub(crate) fn full_name(&self) -> String {
        std::iter::once(&self.opcode).chain(&self.mods).cloned().collect::<Vec<_>>().join(".")
    }
}

/// An operand as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// A register, a special register, a variable or a label.
    Name(String),
    Not(String),
    Int(i128),
    F32(u32),
    F64(u64),
    Sink,
    Vector(Vec<Operand>),
    /// `a|b`
    Pair(Box<Operand>, Box<Operand>),
    /// `[base + offset]`, `[base, {coordinates}]`; the base of an absolute address is `Int(0)`.
    Address {
        base: Box<Operand>,
        offset: i64,
        coords: Option<Vec<Operand>>,
    },
    /// `variable + offset`
    Symbol(String, i64),
}

pub(crate) struct Parser<'a> {
    file: &'a str,
    text: &'a str,
    tokens: Vec<Lexeme>,
    at: usize,
}

type Res<T> = Result<T, PtxError>;

/// Parses a whole file.
pub(crate) fn parse(file: &str, text: &str) -> Res<Ast> {
    Parser { file, text, tokens: lex(file, text)?, at: 0 }.module()
}

impl Parser<'_> {
    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |l| l.line)
    }

    pub(crate) fn error<T>(&self, message: impl Into<String>) -> Res<T> {
        Err(PtxError::new(self.file, self.line(), self.text, message.into()))
    }

    pub(crate) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|l| &l.token)
    }

    pub(crate) fn next(&mut self) -> Res<Token> {
        match self.tokens.get(self.at) {
            Some(l) => {
                self.at += 1;
                Ok(l.token.clone())
            }
            None => self.error("unexpected end of the file"),
        }
    }

    pub(crate) fn is(&self, punct: &str) -> bool {
        matches!(self.peek(), Some(Token::Punct(p)) if *p == punct)
    }

    pub(crate) fn eat(&mut self, punct: &str) -> bool {
        let yes = self.is(punct);
        self.at += usize::from(yes);
        yes
    }

    pub(crate) fn expect(&mut self, punct: &str) -> Res<()> {
        if self.eat(punct) { Ok(()) } else { self.error(format!("expected `{punct}`")) }
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Some(Token::Word(w)) if w == word)
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let yes = self.is_word(word);
        self.at += usize::from(yes);
        yes
    }

    fn word(&mut self) -> Res<String> {
        match self.next()? {
            Token::Word(w) => Ok(w),
            _ => {
                self.at -= 1;
                self.error("expected a word")
            }
        }
    }

    fn int(&mut self) -> Res<u64> {
        match self.expr()? {
            Expr::Int(v) => u64::try_from(v).or_else(|_| self.error("expected a non-negative integer")),
            _ => self.error("expected an integer"),
        }
    }

    fn module(mut self) -> Res<Ast> {
        let mut ast = Ast { version: (0, 0), target: String::new(), vars: vec![], entries: vec![] };
        let mut heads = vec![];
        while self.peek().is_some() {
            let word = match self.peek() {
                Some(Token::Word(w)) => w.clone(),
                _ => return self.error("expected a directive"),
            };
            match word.as_str() {
                ".version" | ".target" | ".address_size" if heads.contains(&word) => {
                    return self.error(format!("`{word}` stands twice"));
                }
                ".version" => {
                    self.at += 1;
                    let Token::F64(bits) = self.next()? else { return self.error("expected a version like 8.0") };
                    let v = f64::from_bits(bits);
                    ast.version = (v as u32, ((v.fract() * 10.0).round()) as u32);
                }
                ".target" => {
                    self.at += 1;
                    ast.target = self.word()?;
                    if !matches!(
                        ast.target.as_str(),
                        "sm_80" | "sm_86" | "sm_89" | "sm_90" | "sm_90a" | "sm_100" | "sm_120"
                    ) {
                        return self.error(format!("target `{}` is not supported", ast.target));
                    }
                }
                ".address_size" => {
                    self.at += 1;
                    if self.int()? != 64 {
                        return self.error("only `.address_size 64` is supported");
                    }
                }
                ".visible" | ".entry" => {
                    self.eat_word(".visible");
                    if self.eat_word(".entry") {
                        let entry = self.entry()?;
                        ast.entries.push(entry);
                    } else {
                        self.variables(&mut ast.vars)?;
                    }
                }
                ".file" => self.skip_line(),
                ".extern" | ".shared" | ".global" | ".const" => self.variables(&mut ast.vars)?,
                _ => return self.error(format!("unknown directive `{word}`")),
            }
            heads.push(word);
        }
        if ast.version == (0, 0) || ast.target.is_empty() {
            self.at = 0;
            return self.error("a module starts with `.version` and `.target`");
        }
        let (oldest, found) = (version_of_target(&ast.target), ast.version);
        if found < oldest {
            self.at = 0;
            return self.error(format!(
                "target `{}` needs PTX {}.{} or newer, the module has `.version {}.{}`",
                ast.target, oldest.0, oldest.1, found.0, found.1
            ));
        }
        Ok(ast)
    }

    /// `.file` and `.loc` carry nothing that runs: they end with their line.
    fn skip_line(&mut self) {
        let line = self.line();
        while self.peek().is_some() && self.line() == line {
            self.at += 1;
        }
    }

    fn entry(&mut self) -> Res<Entry> {
        let line = self.line();
        let name = self.word()?;
        let mut entry = Entry {
            line,
            name,
            params: vec![],
            reqntid: None,
            maxntid: None,
            maxnreg: None,
            reqnctapercluster: None,
            explicit_cluster: false,
            body: vec![],
        };
        if self.eat("(") {
            while !self.eat(")") {
                if !self.eat_word(".param") {
                    return self.error("expected `.param`");
                }
                let var = self.variable(VarSpace::Param, false)?;
                entry.params.push(var);
                if !self.is(")") {
                    self.expect(",")?;
                    if self.is(")") {
                        return self.error("expected `.param`");
                    }
                }
            }
        }
        while !self.is("{") {
            match self.word()?.as_str() {
                ".reqntid" => entry.reqntid = Some(self.triple()?),
                ".maxntid" => entry.maxntid = Some(self.triple()?),
                ".reqnctapercluster" => entry.reqnctapercluster = Some(self.triple()?),
                ".minnctapersm" => {
                    self.positive()?;
                }
                ".maxnreg" => entry.maxnreg = Some(self.positive()?),
                ".explicitcluster" => entry.explicit_cluster = true,
                ".pragma" => self.pragma()?,
                other => {
                    self.at -= 1;
                    return self.error(format!("unknown kernel directive `{other}`"));
                }
            }
        }
        if entry.reqntid.is_some() && entry.maxntid.is_some() {
            return self.error("`.reqntid` and `.maxntid` exclude each other");
        }
        self.expect("{")?;
        let mut depth = 1;
        while depth > 0 {
            if self.eat("{") {
                depth += 1;
                entry.body.push(Stmt::Open);
            } else if self.eat("}") {
                depth -= 1;
                if depth > 0 {
                    entry.body.push(Stmt::Close);
                }
            } else {
                self.statement(&mut entry.body)?;
            }
        }
        Ok(entry)
    }

    fn triple(&mut self) -> Res<[u32; 3]> {
        let mut out = [1; 3];
        for (i, v) in out.iter_mut().enumerate() {
            if i > 0 && !self.eat(",") {
                break;
            }
            *v = self.positive()?;
        }
        Ok(out)
    }

    fn positive(&mut self) -> Res<u32> {
        match self.int()? {
            n @ 1..=0xFFFF_FFFF => Ok(n as u32),
            n => self.error(format!("expected a positive number of 32 bits, found {n}")),
        }
    }

    /// A name to declare.
    fn name(&mut self) -> Res<String> {
        let name = self.word()?;
        if matches!(name.as_str(), "_" | "WARP_SZ") || name.contains('.') {
            return self.error(format!("`{name}` cannot be declared"));
        }
        Ok(name)
    }

    fn pragma(&mut self) -> Res<()> {
        match self.next()? {
            Token::Str(_) => self.expect(";"),
            _ => self.error("expected a string"),
        }
    }

    fn statement(&mut self, body: &mut Vec<Stmt>) -> Res<()> {
        let line = self.line();
        let word = match self.peek() {
            Some(Token::Word(w)) => w.clone(),
            Some(Token::Punct("@")) => return self.instruction(body),
            _ => return self.error("expected a statement"),
        };
        match word.as_str() {
            ".reg" => {
                self.at += 1;
                let ty = self.ty()?;
                let mut names = vec![];
                loop {
                    let name = self.name()?;
                    let count = if self.eat("<") {
                        let n = self.primary_int()?;
                        self.expect(">")?;
                        Some(n as u32)
                    } else {
                        None
                    };
                    names.push((name, count));
                    if !self.eat(",") {
                        break;
                    }
                }
                self.expect(";")?;
                body.push(Stmt::Regs(line, ty, names));
            }
            ".extern" => {
                return self.error("`.extern` belongs at module level, before the kernels that use the variable");
            }
            ".shared" | ".local" | ".global" | ".const" => {
                let mut vars = vec![];
                self.variables(&mut vars)?;
                body.extend(vars.into_iter().map(Stmt::Var));
            }
            ".loc" | ".file" => self.skip_line(),
            ".pragma" => {
                self.at += 1;
                self.pragma()?;
            }
            w if w.starts_with('.') => return self.error(format!("unknown directive `{w}`")),
            _ => {
                if matches!(self.tokens.get(self.at + 1), Some(Lexeme { token: Token::Punct(":"), .. })) {
                    self.at += 2;
                    body.push(Stmt::Label(line, word));
                } else {
                    return self.instruction(body);
                }
            }
        }
        Ok(())
    }

    /// A count in `<...>`: a plain integer or name-free product, so that `>` ends it.
    fn primary_int(&mut self) -> Res<u64> {
        match self.next()? {
            Token::Int(v) => Ok(v),
            _ => self.error("expected a register count"),
        }
    }

    fn ty(&mut self) -> Res<Ty> {
        let word = self.word()?;
        match word.strip_prefix('.').and_then(Ty::parse) {
            Some(ty) => Ok(ty),
            None => {
                self.at -= 1;
                self.error(format!("`{word}` is not a type"))
            }
        }
    }

    fn variables(&mut self, out: &mut Vec<Var>) -> Res<()> {
        let is_extern = self.eat_word(".extern");
        let space = match self.word()?.as_str() {
            ".shared" => VarSpace::Shared,
            ".global" => VarSpace::Global,
            ".const" => VarSpace::Const,
            ".local" => VarSpace::Local,
            other => {
                self.at -= 1;
                return self.error(format!("unknown state space `{other}`"));
            }
        };
        let var = self.variable(space, is_extern)?;
        self.expect(";")?;
        out.push(var);
        Ok(())
    }

    /// `[.align n] .type name [dims] [= {values}]`
    fn variable(&mut self, space: VarSpace, is_extern: bool) -> Res<Var> {
        let line = self.line();
        let mut align = None;
        let mut ty = None;
        while let Some(Token::Word(w)) = self.peek() {
            if w == ".align" {
                self.at += 1;
                let n = self.int()?;
                if !n.is_power_of_two() {
                    return self.error("an alignment is a power of two");
                }
                align = Some(n);
            } else if w == ".ptr" || w == ".global" && space == VarSpace::Param {
                self.at += 1; // `.param .u64 .ptr .global .align 16 x`: an attribute of the pointer, checked at each access
            } else if w.starts_with('.') && ty.is_none() {
                ty = Some(self.ty()?);
            } else {
                break;
            }
        }
        let Some(ty) = ty else { return self.error("a declaration needs a type") };
        if ty == Ty::Pred {
            return self.error("a predicate is a register");
        }
        let name = self.name()?;
        let size = u64::from(ty.bytes());
        let mut bytes = Some(size);
        while self.eat("[") {
            if self.eat("]") {
                bytes = None;
            } else {
                let n = u64::from(self.positive()?);
                bytes = bytes.map(|b| b.saturating_mul(n));
                self.expect("]")?;
            }
        }
        let mut init = vec![];
        if self.eat("=") {
            if !matches!(space, VarSpace::Global | VarSpace::Const) {
                return self.error("only `.global` and `.const` variables have an initial value");
            }
            let braces = self.eat("{");
            loop {
                let value = match self.expr()? {
                    Expr::Int(v) => v as u64,
                    _ if ty.class() != Class::Float => {
                        return self.error(format!("a floating-point literal does not fit type {ty:?}"));
                    }
                    Expr::F32(v) => u64::from(v),
                    Expr::F64(v) if ty == Ty::F32 => u64::from((f64::from_bits(v) as f32).to_bits()),
                    Expr::F64(v) => v,
                };
                init.extend_from_slice(&value.to_le_bytes()[..size as usize]);
                if !(braces && self.eat(",")) {
                    break;
                }
            }
            if braces {
                self.expect("}")?;
            }
            if bytes.is_some_and(|bytes| init.len() as u64 > bytes) {
                return self.error(format!("more initial values than `{name}` has elements"));
            }
        }
        // A pointer parameter's `.align` speaks of what it points to.
        let align = if space == VarSpace::Param && ty == Ty::U64 { size } else { align.unwrap_or(size) };
        Ok(Var { line, name, space, ty, align, bytes, init, is_extern })
    }

    fn instruction(&mut self, body: &mut Vec<Stmt>) -> Res<()> {
        let line = self.line();
        let guard = if self.eat("@") {
            let negated = self.eat("!");
            Some((negated, self.word()?))
        } else {
            None
        };
        let word = self.word()?;
        let mut parts = word.split('.').map(str::to_string);
        let opcode = parts.next().unwrap_or_default();
        let mut operands = vec![];
        if !self.is(";") {
            loop {
                operands.push(self.operand()?);
                if !self.eat(",") {
                    break;
                }
            }
        }
        self.expect(";")?;
        body.push(Stmt::Instr(RawInstr { line, guard, opcode, mods: parts.collect(), operands }));
        Ok(())
    }

    fn operand(&mut self) -> Res<Operand> {
        let first = self.simple_operand()?;
        if self.eat("|") {
            let second = self.simple_operand()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn list(&mut self) -> Res<Vec<Operand>> {
        let mut items = vec![];
        while !self.eat("}") {
            items.push(self.simple_operand()?);
            if !self.is("}") {
                self.expect(",")?;
            }
        }
        Ok(items)
    }

    fn simple_operand(&mut self) -> Res<Operand> {
        match self.peek() {
            Some(Token::Punct("{")) => {
                self.at += 1;
                Ok(Operand::Vector(self.list()?))
            }
            Some(Token::Punct("[")) => {
                self.at += 1;
                self.address()
            }
            Some(Token::Punct("!")) => {
                self.at += 1;
                Ok(Operand::Not(self.word()?))
            }
            Some(Token::Word(w)) => {
                let w = w.clone();
                self.at += 1;
                if w == "_" {
                    return Ok(Operand::Sink);
                }
                if self.is("+") || self.is("-") {
                    let offset = self.signed_offset()?;
                    return Ok(Operand::Symbol(w, offset));
                }
                Ok(Operand::Name(w))
            }
            _ => Ok(match self.expr()? {
                Expr::Int(v) => Operand::Int(v),
                Expr::F32(v) => Operand::F32(v),
                Expr::F64(v) => Operand::F64(v),
            }),
        }
    }

    fn signed_offset(&mut self) -> Res<i64> {
        if self.is("-") {
            return self.error("an offset is added: `+ -4`");
        }
        self.expect("+")?;
        match self.expr()? {
            Expr::Int(v) => Ok(v as i64),
            _ => self.error("an offset is an integer"),
        }
    }

    fn address(&mut self) -> Res<Operand> {
        let base = match self.peek() {
            Some(Token::Word(w)) => {
                let w = w.clone();
                self.at += 1;
                Operand::Name(w)
            }
            _ => match self.expr()? {
                Expr::Int(v) => {
                    self.expect("]")?;
                    let base = Box::new(Operand::Int(0));
                    return Ok(Operand::Address { base, offset: v as i64, coords: None });
                }
                _ => return self.error("an address is an integer"),
            },
        };
        let offset = if self.is("+") || self.is("-") { self.signed_offset()? } else { 0 };
        let mut coords = None;
        if self.eat(",") {
            self.expect("{")?;
            coords = Some(self.list()?);
        }
        self.expect("]")?;
        Ok(Operand::Address { base: Box::new(base), offset, coords })
    }
}
