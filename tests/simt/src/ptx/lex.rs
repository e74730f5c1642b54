//! Text to tokens: comments go, every token keeps its line.

use super::PtxError;

/// One token. Words may start with `%`, `_` or `$`; a word keeps the dots and `::` that follow it (an opcode with its
/// modifiers is one token), a directive is a word that starts with a dot.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token {
    Word(String),
    Int(u64),
    /// `0fXXXXXXXX`: the bits of an f32.
    F32(u32),
    /// A decimal float or `0dXXXXXXXXXXXXXXXX`: the bits of an f64.
    F64(u64),
    Str(String),
    /// Punctuation, two-character operators included (`<<`, `>>`).
    Punct(&'static str),
}

/// A token and the line (from 1) it stands on.
#[derive(Clone, Debug)]
pub(crate) struct Lexeme {
    pub token: Token,
    pub line: u32,
}

const PUNCT: [&str; 22] =
    ["<<", ">>", "{", "}", "[", "]", "(", ")", "<", ">", ",", ";", ":", "@", "!", "|", "+", "-", "*", "/", "=", "&"];

fn word_start(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'%' | b'$' | b'.')
}

fn word_part(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'.' | b'%')
}

/// Cuts `text` into tokens.
pub(crate) fn lex(file: &str, text: &str) -> Result<Vec<Lexeme>, PtxError> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(text.len() / 4);
    let mut line = 1;
    let mut i = 0;
    let error = |line: u32, message: String| PtxError::new(file, line, text, message);
    'outer: while i < bytes.len() {
        let c = bytes[i];
        if c == b'\n' {
            line += 1;
            i += 1;
        } else if c.is_ascii_whitespace() {
            i += 1;
        } else if bytes[i..].starts_with(b"//") {
            while i < bytes.len() && bytes[i] != b'\n' {
                i += 1;
            }
        } else if bytes[i..].starts_with(b"/*") {
            let end = text[i + 2..].find("*/").ok_or_else(|| error(line, "comment without an end".into()))?;
            line += text[i..i + 2 + end].matches('\n').count() as u32;
            i += end + 4;
        } else if c == b'"' {
            let end = text[i + 1..].find('"').ok_or_else(|| error(line, "string without an end".into()))?;
            out.push(Lexeme { token: Token::Str(text[i + 1..i + 1 + end].into()), line });
            i += end + 2;
        } else if c.is_ascii_digit() {
            let (token, used) = number(&text[i..]).map_err(|m| error(line, m))?;
            out.push(Lexeme { token, line });
            i += used;
        } else if word_start(c) {
            let start = i;
            i += 1;
            while i < bytes.len() && (word_part(bytes[i]) || bytes[i..].starts_with(b"::")) {
                i += if bytes[i] == b':' { 2 } else { 1 };
            }
            out.push(Lexeme { token: Token::Word(text[start..i].into()), line });
        } else {
            for p in PUNCT {
                if bytes[i..].starts_with(p.as_bytes()) {
                    out.push(Lexeme { token: Token::Punct(p), line });
                    i += p.len();
                    continue 'outer;
                }
            }
            let c = text[i..].chars().next().unwrap_or(' ');
            return Err(error(line, format!("unexpected character `{c}`")));
        }
    }
    Ok(out)
}

/// A literal at the start of `text`, and how many bytes it takes. PTX ISA 4.5.
fn number(text: &str) -> Result<(Token, usize), String> {
    let bytes = text.as_bytes();
    let digits = |from: usize, ok: fn(&u8) -> bool| bytes[from..].iter().take_while(|c| ok(c)).count();
    let prefix = if bytes[0] == b'0' && bytes.len() > 1 { bytes[1] } else { b' ' };
    let (token, used) = match prefix {
        b'f' | b'F' | b'd' | b'D' => {
            let want = if prefix | 32 == b'f' { 8 } else { 16 };
            let n = digits(2, u8::is_ascii_hexdigit);
            if n != want {
                return Err(format!("a `0{}` literal has {want} hexadecimal digits, found {n}", prefix as char));
            }
            let bits = u64::from_str_radix(&text[2..2 + n], 16).map_err(|e| e.to_string())?;
            (if want == 8 { Token::F32(bits as u32) } else { Token::F64(bits) }, 2 + n)
        }
        b'x' | b'X' => {
            let n = digits(2, u8::is_ascii_hexdigit);
            (Token::Int(u64::from_str_radix(&text[2..2 + n], 16).map_err(|e| e.to_string())?), 2 + n)
        }
        b'b' | b'B' => {
            let n = digits(2, u8::is_ascii_digit);
            (Token::Int(u64::from_str_radix(&text[2..2 + n], 2).map_err(|e| e.to_string())?), 2 + n)
        }
        _ => {
            let n = digits(0, u8::is_ascii_digit);
            let mut end = n;
            if bytes.get(n) == Some(&b'.') && bytes.get(n + 1).is_some_and(u8::is_ascii_digit) {
                end = n + 1 + digits(n + 1, u8::is_ascii_digit);
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
                let n = digits(end + 1 + sign, u8::is_ascii_digit);
                end += if n > 0 { 1 + sign + n } else { 0 };
            }
            if end > n {
                let value = text[..end].parse::<f64>().map_err(|e| e.to_string())?;
                if value.is_infinite() {
                    return Err(format!("`{}` is too large", &text[..end]));
                }
                (Token::F64(value.to_bits()), end)
            } else if bytes[0] == b'0' && n > 1 {
                (Token::Int(u64::from_str_radix(&text[1..n], 8).map_err(|e| e.to_string())?), n)
            } else {
                (Token::Int(text[..n].parse().map_err(|_| format!("`{}` is too large", &text[..n]))?), n)
            }
        }
    };
    let used = used + usize::from(matches!(token, Token::Int(_)) && matches!(bytes.get(used), Some(b'U')));
    match bytes.get(used) {
        Some(&c) if word_part(c) => Err(format!("`{}` is not a number", &text[..=used])),
        _ => Ok((token, used)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<Token> {
        lex("t", text).unwrap().into_iter().map(|l| l.token).collect()
    }

    #[test]
    fn numbers_of_isa_4_5() {
        use Token::{F32, F64, Int};
        let got = tokens("0x1F 017 0b101 42 42U 0f3F800000 0d3FF0000000000000 1.5 2e3 0");
        let want = [
            Int(31),
            Int(15),
            Int(5),
            Int(42),
            Int(42),
            F32(0x3f80_0000),
            F64(1f64.to_bits()),
            F64(1.5f64.to_bits()),
            F64(2e3f64.to_bits()),
            Int(0),
        ];
        assert_eq!(got, want);
        assert!(lex("t", "0f3F80").is_err());
        assert!(lex("t", "12abc").is_err());
    }

    #[test]
    fn words_keep_dots_and_colons() {
        let got = tokens("@!p ld.global.L2::128B.v2.f32 {%f0, a_1}, [rd + 8]; // c\nL: /* x\n y */ ret;");
        assert_eq!(got[3], Token::Word("ld.global.L2::128B.v2.f32".into()));
        assert_eq!(got[5], Token::Word("%f0".into()));
        let lines: Vec<u32> = lex("t", "a\nb /* \n */ c").unwrap().iter().map(|l| l.line).collect();
        assert_eq!(lines, [1, 2, 3]);
    }
}
