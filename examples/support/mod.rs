//! What the examples and the golden tests share: host arrays, one trait over the backends, a layer as a sequence of their
//! functions, readers of files, and measures of error.
//!
//! Nothing here is part of the library: it is written against the public API, as a framework would be.

// Each example uses its own part.
#![allow(dead_code)]

pub mod array;
pub mod backend;
pub mod checkpoint;
pub mod cpu;
pub mod golden;
pub mod layer;
pub mod measure;
pub mod naive;
pub mod random;
pub mod roof;
pub mod stored;
pub mod tensors;
pub mod textbook;
pub mod verify;
