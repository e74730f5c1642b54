//! What the examples and the golden tests share: host arrays, one trait over the backends, a layer as a sequence of their
//! functions, readers of files, and measures of error.
//!
//! Nothing here is part of the library: it is written against the public API, as a framework would be.

// Each example uses its own part.
#![allow(dead_code)]

pub mod array;
pub mod backend;
pub mod checkpoint;
#[cfg(feature = "cuda")]
pub mod clock;
pub mod cpu;
pub mod device;
pub mod folder;
pub mod golden;
pub mod layer;
pub mod measure;
pub mod naive;
pub mod random;
pub mod resident;
pub mod roof;
/// The simulator that the tests use: in the repository, not in the package.
#[cfg(gatefold_simulator)]
#[path = "../../tests/common/simulator.rs"]
pub mod simulator;
pub mod staged;
pub mod stored;
pub mod tensors;
pub mod textbook;
pub mod verify;

/// Of the simulator: the order in which it runs warps.
#[cfg(gatefold_simulator)]
fn seed() -> u64 {
    1
}
