//! The PTX of this crate: one module of one entry per instance, written by `build.rs` from the templates in `kernels/`.
//!
//! Everything that the host must know about a kernel (its name, block size, parameters, tile sizes) is generated from
//! the same values as the text, so the two cannot disagree.

/// A kernel: its text and what a launch needs to know about it.
#[derive(Debug)]
pub struct Kernel {
    /// Name of the entry, unique in the crate.
    pub entry: &'static str,
    /// The whole module.
    pub ptx: &'static str,
    /// PTX version that the text asks for.
    pub version: (u32, u32),
    /// Compute capability that the text asks for, as 80 or 90.
    pub sm: u32,
    /// Runs on exactly that compute capability (`sm_90a`), not on newer ones.
    pub exact: bool,
    /// Threads of a block, always along x.
    pub threads: u32,
    /// Parameters in order.
    pub params: &'static [Param],
    /// Shared memory that the text declares, in bytes.
    pub static_shared_bytes: u32,
    /// Also takes shared memory whose size the launch gives.
    pub dynamic_shared: bool,
}

/// One kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in the text.
    pub name: &'static str,
    /// Where it lies in the parameter block.
    pub offset: usize,
    /// Its size.
    pub bytes: usize,
}

// Two kernels are the same if they have the same name: `build.rs` has seen to it that names are unique.
impl PartialEq for Kernel {
    fn eq(&self, other: &Self) -> bool {
        self.entry == other.entry
    }
}

impl Eq for Kernel {}

impl std::hash::Hash for Kernel {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.entry.hash(state);
    }
}

impl Kernel {
    /// Bytes of the parameter block.
    pub fn param_bytes(&self) -> usize {
        self.params.last().map_or(0, |last| last.offset + last.bytes)
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
