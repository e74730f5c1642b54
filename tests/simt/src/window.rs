//! The generic address space: which numbers mean which state space.
//!
//! Global buffers lie at multiples of 2^44, one per buffer, so that an index finds the buffer and a 32-bit overflow never
//! lands in one. The windows of the other spaces lie below 2^44.

use crate::op::Space;

/// Shared memory: offset plus, for another block of the cluster, `(rank + 1) << 24`.
pub(crate) const SHARED: u64 = 1 << 40;
/// Local memory.
pub(crate) const LOCAL: u64 = 2 << 40;
/// Kernel parameters.
pub(crate) const PARAM: u64 = 3 << 40;
const SIZE: u64 = 1 << 32;
/// Bits of an address within one global buffer.
pub(crate) const BUFFER_BITS: u32 = 44;
/// `.global` and `.const` variables of the module.
pub(crate) const MODULE_VARS: u64 = 1 << BUFFER_BITS;
/// Where the rank of a block stands in a shared address.
pub(crate) const RANK_SHIFT: u32 = 24;

/// The space that a generic address points to, and the address there.
#[inline]
pub(crate) fn from_generic(address: u64) -> (Space, u64) {
    if address >> BUFFER_BITS != 0 {
        return (Space::Global, address);
    }
    match address {
        a if (SHARED..SHARED + SIZE).contains(&a) => (Space::SharedCluster, a - SHARED),
        a if (LOCAL..LOCAL + SIZE).contains(&a) => (Space::Local, a - LOCAL),
        a if (PARAM..PARAM + SIZE).contains(&a) => (Space::Param, a),
        a => (Space::Global, a),
    }
}

/// The generic address of `address` in `space`.
#[inline]
pub(crate) fn to_generic(space: Space, address: u64) -> u64 {
    match space {
        Space::Shared | Space::SharedCluster => SHARED + (address & 0xffff_ffff),
        Space::Local => LOCAL + (address & 0xffff_ffff),
        _ => address,
    }
}
