//! Pure models of what the instructions compute: no simulator state, no memory, no lanes that wait. Each is written from the PTX ISA
//! document and tested against its formulas and tables, so that the interpreter above only moves bits to and from them.

// Lanes, dimensions and registers index several arrays at once; a zip of them would hide the formula.
#![allow(clippy::needless_range_loop)]

pub mod approx;
pub mod float;
pub mod fragment;
pub mod mma;
pub mod smem;
pub mod tensor_map;
