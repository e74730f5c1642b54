//! The kernels of a Mixture-of-Experts transformer (attention, gated routing, expert feed-forward): SIMD code for CPUs and
//! hand-written PTX for NVIDIA GPUs, each checked against one naive reference.
//!
//! * [`spec`]: what to compute, as plain data that is validated in one place.
//! * [`args`]: what comes with a call: [views](view) of the caller's arrays, and every check of their shapes and strides.
//! * [`mod@reference`]: the truth. Any element type in, f64 inside and out; the formulas, edge rules and sources stand here.
//! * [`cpu`]: the same functions on f32, bf16 and f16 with the instructions found at run time.
//! * [`cuda`]: the same functions on the memory of a GPU, as hand-written PTX that the driver compiles.
//!
//! The caller owns all memory: there is no tensor type. An input that is not legal is an [`Error`] that names the argument, what
//! was expected and what was found, and then nothing is written. What a backend does not have is [`Error::Unsupported`].
//!
//! The README shows a first call, and the example `layer` a whole layer of a real model's shape.

pub mod args;
pub mod cpu;
pub mod cuda;
pub mod element;
pub mod error;
pub mod random;
pub mod reference;
pub mod spec;
pub mod view;

pub use element::{Dtype, Element};
pub use error::{Error, Result};
pub use view::{View, ViewMut};

/// The README's example is compiled and run with the tests of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
