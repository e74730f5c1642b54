//! Which modifiers of the grammar a PTX text uses: lets a test insist that every one the decoder knows is exercised.

use crate::ptx::grammar::{Mods, all_choices};
use crate::ptx::parse::{self, Stmt};
use crate::{PtxError, ptx};

/// Every `opcode/form: modifier` that the decoder knows, sorted.
pub fn known() -> Vec<String> {
    all_choices()
}

/// Those that `text` uses.
///
/// # Errors
/// As [`Module::parse`](crate::Module::parse).
pub fn used(file: &str, text: &str) -> Result<Vec<String>, PtxError> {
    let ast: ptx::parse::Ast = parse::parse(file, text)?;
    let mut used = vec![];
    for entry in &ast.entries {
        for stmt in &entry.body {
            let Stmt::Instr(raw) = stmt else { continue };
            let mods = Mods::find(&raw.opcode, &raw.mods).map_err(|e| PtxError::new(file, raw.line, text, e))?;
            used.extend(mods.choices());
        }
    }
    used.sort();
    used.dedup();
    Ok(used)
}
