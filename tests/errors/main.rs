//! Every error of the public API: the message, word for word (`messages.txt`), and that nothing was written.
//!
//! The checks stand in `args` and `spec`, which all backends share; they are run through the reference, and through the CPU backend where that
//! has checks of its own (packed weights). A last test reads the list of variants of [`Error`] and fails for one that nothing here or in the
//! tests of its backend produces.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod moe;
mod qkv;
mod specs;

use gatefold::{Error, Result};

/// Named errors, in order.
#[derive(Default)]
pub(crate) struct Found(Vec<(String, Error)>);

impl Found {
    fn add<T>(&mut self, name: &str, result: Result<T>) {
        match result {
            Err(error) => self.0.push((name.into(), error)),
            Ok(_) => panic!("{name}: no error"),
        }
    }
}

fn all() -> Found {
    let mut found = Found::default();
    specs::errors(&mut found);
    attention::errors(&mut found);
    qkv::errors(&mut found);
    moe::errors(&mut found);
    found
}

/// `GATEFOLD_WRITE_MESSAGES=path` writes the messages there, for a new version of the file.
#[test]
fn messages() {
    let text: String = all().0.iter().map(|(name, error)| format!("{name}: {error}\n")).collect();
    if let Ok(path) = std::env::var("GATEFOLD_WRITE_MESSAGES") {
        std::fs::write(path, &text).unwrap();
        return;
    }
    let on_cuda = |line: &&str| ["ElementwisePlan", "QkvPlan"].iter().any(|plan| line.starts_with(plan));
    let here = |line: &&str| cfg!(feature = "cuda") || !on_cuda(line);
    let expected: Vec<&str> = include_str!("messages.txt").lines().filter(here).collect();
    for (found, expected) in text.lines().zip(&expected) {
        assert_eq!(found, *expected);
    }
    assert_eq!(text.lines().count(), expected.len());
}

/// A message names the argument, what was expected and what was found.
#[test]
fn messages_say_what_was_expected_and_found() {
    for (name, error) in all().0 {
        let text = error.to_string();
        let (what, rest) = text.split_once(", ").unwrap_or((&text, ""));
        assert!(what.contains('`') || matches!(error, Error::Unsupported { .. }), "{name}: {text}");
        let says = ["expected", "its shape asks for"].iter().any(|word| rest.contains(word));
        assert!(says || matches!(error, Error::Unsupported { .. }), "{name}: {text}");
    }
}

/// Variants from the source of the type (without the feature `cuda` nothing refuses an element type), against those that tests produce.
#[test]
#[cfg(feature = "cuda")]
fn every_variant_is_produced_by_a_test() {
    let source = include_str!("../../src/error.rs");
    let body = source.split("pub enum Error {").nth(1).unwrap().split("\n}\n").next().unwrap();
    let variants: Vec<&str> = body
        .lines()
        .filter_map(|l| l.strip_prefix("    ")?.strip_suffix(" {"))
        .filter(|l| !l.starts_with(' '))
        .collect();
    assert!(variants.len() >= 11 && variants.contains(&"Overlap"), "{variants:?}");
    let here: Vec<String> = all().0.iter().map(|(_, error)| format!("{error:?}")).collect();
    // What needs a driver or a file is produced where that is tested.
    let elsewhere = [
        ("NoDevice", include_str!("../cuda_driver.rs")),
        ("Driver", include_str!("../cuda_driver.rs")),
        ("Parse", include_str!("../config_input.rs")),
    ];
    for variant in variants {
        let produced = here.iter().any(|error| error.starts_with(&format!("{variant} ")))
            || elsewhere
                .iter()
                .any(|(name, tests)| *name == variant && tests.contains(&format!("Error::{variant} {{")));
        assert!(produced, "no test produces Error::{variant}");
    }
}
