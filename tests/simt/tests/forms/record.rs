//! The text form of recorded outputs: written by the recorder, read by the replay.

use super::{Expect, Form};

/// FNV-1a over 64-bit words.
pub fn hash(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |h, w| {
        w.to_le_bytes().iter().fold(h, |h: u64, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
    })
}

/// Slots that are written out in full.
pub fn shown(form: &Form) -> usize {
    match form.expect {
        Expect::Approx { .. } | Expect::Division { .. } => form.output_len(),
        _ => form.output_len().min(64),
    }
}

/// One line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The form.
    pub name: String,
    /// Hash of its text and input slots.
    pub inputs: u64,
    /// Hash of all output slots.
    pub outputs: u64,
    /// The first output slots.
    pub slots: Vec<u64>,
}

/// Hash of what a recording depends on.
pub fn inputs_hash(form: &Form) -> u64 {
    let mut words = form.input_slots();
    words.extend(form.body.bytes().map(u64::from));
    hash(&words)
}

impl Line {
    /// The line for these outputs.
    pub fn new(form: &Form, outputs: &[u64]) -> Line {
        Line {
            name: form.name.clone(),
            inputs: inputs_hash(form),
            outputs: hash(outputs),
            slots: outputs[..shown(form)].to_vec(),
        }
    }

    /// As text.
    pub fn text(&self) -> String {
        let slots: Vec<String> = self.slots.iter().map(|s| format!("{s:x}")).collect();
        format!("form {} {:016x} {:016x} {}", self.name, self.inputs, self.outputs, slots.join(" "))
    }

    /// From text; `None` for a line of another kind.
    pub fn parse(text: &str) -> Option<Line> {
        let mut words = text.strip_prefix("form ")?.split(' ');
        let name = words.next()?.to_string();
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (inputs, outputs) = (number()?, number()?);
        let slots = std::iter::from_fn(number).collect();
        Some(Line { name, inputs, outputs, slots })
    }
}

/// Value of a header line.
pub fn header<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '))
}
