//! What the grammar knows, for tests: that every modifier is exercised, and that the combinations it takes are PTX.

use crate::ptx::grammar::{Mods, all_choices, neighbours as grammar_neighbours};
use crate::ptx::parse::{self, Stmt};
use crate::{PtxError, ptx};

/// Every `opcode/form: modifier` that the decoder knows, sorted.
pub fn known() -> Vec<String> {
    all_choices()
}

/// The instructions that the grammar takes and that differ from this one (`ld.global.u32`) in one modifier: in another choice, or in one
/// more or less.
pub fn neighbours(instruction: &str) -> Vec<String> {
    let mut words = instruction.split('.');
    let opcode = words.next().unwrap_or_default();
    let mods: Vec<String> = words.map(str::to_string).collect();
    let variants = grammar_neighbours(opcode, &mods);
    variants.into_iter().map(|v| std::iter::once(opcode).chain(v).collect::<Vec<_>>().join(".")).collect()
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
