//! Constant expressions (PTX ISA 4.5.4): integers with the usual operators, float literals alone.

use super::PtxError;
use super::lex::Token;
use super::parse::Parser;

/// The value of a constant expression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Expr {
    Int(i128),
    F32(u32),
    F64(u64),
}

type Res<T> = Result<T, PtxError>;

type Apply = fn(i128, i128) -> Option<i128>;

/// Binding strength and meaning of a binary operator.
fn binary(op: &str) -> Option<(u32, Apply)> {
    Some(match op {
        "|" => (1, |a, b| Some(a | b)),
        "&" => (2, |a, b| Some(a & b)),
        "<<" => (3, |a, b| a.checked_shl(b as u32)),
        ">>" => (3, |a, b| a.checked_shr(b as u32)),
        "+" => (4, i128::checked_add),
        "-" => (4, i128::checked_sub),
        "*" => (5, i128::checked_mul),
        "/" => (5, i128::checked_div),
        _ => return None,
    })
}

impl Parser<'_> {
    /// Reads one constant expression.
    pub(crate) fn expr(&mut self) -> Res<Expr> {
        self.expr_above(0)
    }

    fn expr_above(&mut self, floor: u32) -> Res<Expr> {
        let mut left = self.unary()?;
        while let Some(Token::Punct(op)) = self.peek() {
            let Some((strength, apply)) = binary(op) else { break };
            if strength <= floor {
                break;
            }
            self.next()?;
            let right = self.expr_above(strength)?;
            let (Expr::Int(a), Expr::Int(b)) = (left, right) else {
                return self.error("only integers have operators");
            };
            match apply(a, b) {
                Some(v) => left = Expr::Int(v),
                None => return self.error("the expression overflows"),
            }
        }
        Ok(left)
    }

    fn unary(&mut self) -> Res<Expr> {
        if self.eat("-") {
            return Ok(match self.unary()? {
                Expr::Int(v) => Expr::Int(-v),
                Expr::F32(v) => Expr::F32(v ^ 1 << 31),
                Expr::F64(v) => Expr::F64(v ^ 1 << 63),
            });
        }
        if self.eat("(") {
            let v = self.expr()?;
            self.expect(")")?;
            return Ok(v);
        }
        match self.next()? {
            Token::Int(v) => Ok(Expr::Int(i128::from(v))),
            Token::F32(v) => Ok(Expr::F32(v)),
            Token::F64(v) => Ok(Expr::F64(v)),
            other => self.error(format!("expected a constant, found {other:?}")),
        }
    }
}
