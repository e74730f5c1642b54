//! How a test says that it cannot run here.

use std::fmt::Display;
use std::io::Write;

/// Says aloud that the running test is skipped and why: on the process's own stderr, which the test harness does not
/// capture, so that it is seen although the test passes.
pub fn skipped(reason: impl Display) {
    let thread = std::thread::current();
    let line = format!("SKIPPED {}: {reason}\n", thread.name().unwrap_or("a test"));
    std::io::stderr().write_all(line.as_bytes()).expect("stderr can be written");
}
