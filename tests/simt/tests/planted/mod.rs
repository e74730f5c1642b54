//! The files of `faults/`: a faulty kernel and its clean twin in one text. See the README there.

#![allow(dead_code)] // each reader uses a part

/// One file.
pub struct Planted {
    pub name: String,
    pub text: String,
    pub finding: String,
}

impl Planted {
    /// Every file, by name.
    pub fn all() -> Vec<Planted> {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults");
        let mut all: Vec<Planted> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "ptx"))
            .map(|path| {
                let text = std::fs::read_to_string(&path).unwrap();
                let finding =
                    text.lines().find_map(|l| l.strip_prefix("//! finding ")).expect("a finding").trim().to_string();
                Planted { name: path.file_stem().unwrap().to_string_lossy().into_owned(), text, finding }
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The text of one kernel and the numbers of its `here` lines.
    pub fn render(&self, faulty: bool) -> (String, Vec<u32>) {
        let (mut out, mut here, mut number) = (String::new(), vec![], 0);
        for line in self.text.lines() {
            let (code, marks) =
                if line.starts_with("//!") { (line, "") } else { line.split_once("//!").unwrap_or((line, "")) };
            let has = |mark: &str| marks.split_whitespace().any(|m| m == mark);
            if has(if faulty { "clean" } else { "fault" }) {
                continue;
            }
            number += 1;
            if has("here") {
                here.push(number);
            }
            out += code.trim_end();
            out += "\n";
        }
        (out, here)
    }

    /// A number of the `launch` line.
    pub fn launch_value(&self, faulty: bool, key: &str, default: u64) -> u64 {
        let line = |prefix: &str| self.text.lines().find_map(|l| l.strip_prefix(prefix));
        let own = if faulty { line("//! launch fault ") } else { None };
        let words = own.or_else(|| line("//! launch ")).expect("a launch line");
        let mut words = words.split_whitespace();
        while let Some(word) = words.next() {
            if word == key {
                return words.next().unwrap().parse().unwrap();
            }
        }
        default
    }
}
