//! PTX text to a decoded kernel. Whatever is not understood, down to a modifier, is an error with file, line and text.

pub(crate) mod grammar;
mod lex;
pub(crate) mod parse;
pub(crate) mod parse_expr;
pub(crate) mod types;

/// PTX that the simulator does not accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PtxError {
    /// Name of the file, as given by the caller.
    pub file: String,
    /// Line in the file, from 1.
    pub line: u32,
    /// The text of that line.
    pub text: String,
    /// What is wrong.
    pub message: String,
}

impl PtxError {
    pub(crate) fn new(file: &str, line: u32, source: &str, message: String) -> Self {
        let text = source.lines().nth(line.saturating_sub(1) as usize).unwrap_or("").trim().to_string();
        PtxError { file: file.into(), line, text, message }
    }
}

impl std::fmt::Display for PtxError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}\n    {}", self.file, self.line, self.message, self.text)
    }
}

impl std::error::Error for PtxError {}
