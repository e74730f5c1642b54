//! A strict PTX simulator: runs the GPU kernels of gatefold on the CPU.

pub mod model;
