//! A strict PTX simulator: runs the GPU kernels of gatefold on the CPU.

// Lanes and registers index several arrays at once; a zip of them would hide which lane is meant.
#![allow(clippy::needless_range_loop)]

mod alu_double;
mod alu_float;
mod alu_int;
mod clock;
mod counters;
pub mod coverage;
mod decode;
mod exec;
mod finding;
mod global;
mod hopper;
pub mod model;
mod op;
mod ptx;
pub mod runner;
mod sched;
mod shadow;
mod sim;
mod state;
mod window;

pub use counters::Counters;
pub use finding::{Finding, Found, Mode, Report, Severity};
pub use op::Class;
pub use ptx::PtxError;
pub use sim::{Arg, Element, Launch, LaunchError, Module, Sim, seeds};
