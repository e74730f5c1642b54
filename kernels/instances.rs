//! The closed table of kernel instances: every entry that exists, with every value that its template reads.
//!
//! A value is a `${NAME}` in the template and a field of the same name, in lower case, on the Rust side
//! (`cuda::kernels::<template>::Instance`). Nothing else sets a tile size, so host and kernel cannot disagree.

/// A value of an instance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A count or a size; `u32` on the Rust side.
    Int(u32),
    /// A choice; `bool` on the Rust side.
    Flag(bool),
    /// An element type by name; `Dtype` on the Rust side.
    Dtype(&'static str),
}

/// One row of the table: one module with one entry.
#[derive(Clone, Debug)]
pub struct Instance {
    /// `kernels/<template>.ptx`.
    pub template: &'static str,
    /// What stands behind `gatefold_<template>_` in the entry's name.
    pub variant: String,
    /// The lowest PTX version that knows every instruction of the template.
    pub version: &'static str,
    /// The lowest target that runs it.
    pub target: &'static str,
    /// Names and values, in the order of the Rust fields.
    pub values: Vec<(&'static str, Value)>,
}

/// Element types of activations, with the elements in 16 bytes: what one thread loads at once.
pub const DTYPES: [(&str, u32); 3] = [("bf16", 8), ("f16", 8), ("f32", 4)];

/// Aligned instances move 16 bytes an instruction; the others take any address and any width. Same sums, same bits.
pub const ALIGNMENTS: [(bool, &str); 2] = [(true, ""), (false, "_unaligned")];

#[path = "instances/attention.rs"]
mod attention;
#[path = "instances/coupled.rs"]
mod coupled;
#[path = "instances/decode.rs"]
mod decode;
#[path = "instances/gemm.rs"]
mod gemm;
#[path = "instances/glue.rs"]
mod glue;
#[path = "instances/group.rs"]
mod group;
#[path = "instances/linear_attention.rs"]
mod linear_attention;
#[path = "instances/route.rs"]
mod route;

/// All instances.
pub fn instances() -> Vec<Instance> {
    let mut table = Vec::new();
    attention::add(&mut table);
    coupled::add(&mut table);
    decode::add(&mut table);
    gemm::add(&mut table);
    glue::add(&mut table);
    linear_attention::add(&mut table);
    group::add(&mut table);
    route::add(&mut table);
    table
}
