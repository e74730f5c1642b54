//! Pure models of what the instructions compute: no simulator state, no memory, no lanes that wait. Each is written from the PTX ISA
//! document and tested against its formulas and tables, so that the interpreter above only moves bits to and from them.

pub mod approx;
pub mod float;
pub mod mma;
