//! Huge pages, asked for where the system has them: large arrays then take 512 times fewer entries of the tables that
//! translate addresses. A request only: nothing depends on the answer.

/// Bytes of a huge page on x86-64 and, mostly, on aarch64.
pub const HUGE: usize = 2 << 20;

/// Asks for huge pages for memory that nothing has written yet and that begins at a multiple of [`HUGE`].
#[cfg(target_os = "linux")]
pub fn ask_for_huge(start: *mut u8, bytes: usize) {
    // Of the C library, which std links.
    unsafe extern "C" {
        fn madvise(start: *mut u8, bytes: usize, advice: i32) -> i32;
    }
    const MADV_HUGEPAGE: i32 = 14;
    // SAFETY: advice changes how memory is kept, not what is in it; the range is whole pages of the caller's allocation.
    unsafe { madvise(start, bytes / HUGE * HUGE, MADV_HUGEPAGE) };
}

/// Asks for huge pages where the system has such requests: this one has none.
#[cfg(not(target_os = "linux"))]
pub fn ask_for_huge(_: *mut u8, _: usize) {}
