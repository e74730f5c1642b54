//! Scratch memory that the caller owns: one aligned buffer that grows on demand and is carved into typed parts.

use super::pages::{HUGE, ask_for_huge};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of the buffer and of every part: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// From this size on bytes lie in huge pages, where the system has some.
const HUGE_FROM: usize = 2 * HUGE;

/// Bytes in fixed place, aligned to [`ALIGN`] at least, zero at first.
pub struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the bytes are owned as by a `Box<[u8]>`.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// No bytes, no allocation.
    pub const fn empty() -> Self {
        AlignedBytes { start: NonNull::without_provenance(std::num::NonZero::new(ALIGN).unwrap()), len: 0 }
    }

    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return AlignedBytes::empty();
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is `len`, which is not 0.
        let start = unsafe { alloc(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        if layout.align() == HUGE {
            ask_for_huge(start.as_ptr(), len);
        }
        // SAFETY: `start` points to `len` bytes.
        unsafe { start.as_ptr().write_bytes(0, len) };
        AlignedBytes { start, len }
    }

    fn layout(len: usize) -> Layout {
        let align = if len >= HUGE_FROM { HUGE } else { ALIGN };
        Layout::from_size_align(len, align).expect("more bytes than an address space has")
    }

    /// All bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start` points to `len` initialised bytes that `self` owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// All bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `start` points to `len` initialised bytes that `self` owns, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: `start` was allocated by `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) }
        }
    }
}

/// Bytes that a part of `len` values takes: a multiple of [`ALIGN`]. Saturates.
pub const fn part_bytes<T>(len: usize) -> usize {
    let bytes = len.saturating_mul(size_of::<T>());
    if bytes > usize::MAX - ALIGN { usize::MAX } else { bytes.next_multiple_of(ALIGN) }
}

/// The buffer. A call that needs more than there is makes it grow, which is the only allocation that a call does; after
/// [`Workspace::reserve`] with the size that the function's `*_workspace_bytes` tells there is none.
pub struct Workspace {
    buffer: AlignedBytes,
}

impl Workspace {
    /// Empty.
    pub const fn new() -> Self {
        Workspace { buffer: AlignedBytes::empty() }
    }

    /// Makes room. What was in the buffer is lost.
    pub fn reserve(&mut self, bytes: usize) {
        if bytes > self.buffer.len {
            self.buffer = AlignedBytes::empty(); // the old one goes first
            self.buffer = AlignedBytes::zeroed(part_bytes::<u8>(bytes));
        }
    }

    /// Size now.
    pub fn bytes(&self) -> usize {
        self.buffer.len
    }

    /// Room for `bytes`, to be carved. The contents are whatever was there.
    pub fn carve(&mut self, bytes: usize) -> Carver<'_> {
        self.reserve(bytes);
        Carver { rest: self.buffer.as_mut_slice() }
    }
}

/// Hands out disjoint parts of a workspace. Their contents are whatever was there.
pub struct Carver<'a> {
    rest: &'a mut [u8],
}

impl<'a> Carver<'a> {
    /// The next `len` values, aligned to [`ALIGN`].
    ///
    /// # Panics
    /// If the workspace is too small: the size asked from [`Workspace::carve`] was wrong.
    pub fn part<T: bytemuck::Pod>(&mut self, len: usize) -> &'a mut [T] {
        let bytes = part_bytes::<T>(len);
        let rest = std::mem::take(&mut self.rest);
        assert!(bytes <= rest.len(), "a workspace part takes {bytes} bytes, {} are left", rest.len());
        let (part, rest) = rest.split_at_mut(bytes);
        self.rest = rest;
        bytemuck::cast_slice_mut(&mut part[..len * size_of::<T>()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_disjoint() {
        let mut workspace = Workspace::new();
        assert_eq!(workspace.bytes(), 0);
        let bytes = part_bytes::<f32>(5) + part_bytes::<u16>(0) + part_bytes::<u8>(65) + part_bytes::<u64>(1);
        assert_eq!(bytes, 64 + 128 + 64);
        let mut carver = workspace.carve(bytes);
        let a = carver.part::<f32>(5);
        let b = carver.part::<u16>(0);
        let c = carver.part::<u8>(65);
        let d = carver.part::<u64>(1);
        for address in [a.as_ptr() as usize, c.as_ptr() as usize, d.as_ptr() as usize] {
            assert_eq!(address % ALIGN, 0);
        }
        a.fill(1.0);
        c.fill(2);
        d.fill(3);
        assert_eq!((a.len(), b.len(), c.len(), d.len()), (5, 0, 65, 1));
        assert!(a.iter().all(|a| *a == 1.0) && c.iter().all(|c| *c == 2));
        assert_eq!(workspace.bytes(), bytes);
        workspace.reserve(10);
        assert_eq!(workspace.bytes(), bytes);
        workspace.reserve(bytes + 1);
        assert_eq!(workspace.bytes(), bytes + 64);
        assert_eq!(part_bytes::<f32>(usize::MAX / 2), usize::MAX);
    }
}
