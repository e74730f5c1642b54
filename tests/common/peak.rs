//! An allocator that knows how much memory a thread has held at most: what readers of untrusted bytes take must be justified by the
//! bytes. A test binary makes it its own with `#[global_allocator]`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts bytes per thread, so that tests do not see one another.
pub struct Peak;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn change(bytes: isize) {
    // While a thread ends its values are gone, and nobody asks.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + bytes);
        MOST.with(|most| most.set(most.get().max(now.get())));
    });
}

// SAFETY: everything is passed on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Peak {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        change(layout.size() as isize);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        change(-(layout.size() as isize));
        // SAFETY: the caller's promise about `start` and `layout` is passed on.
        unsafe { System.dealloc(start, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        change(layout.size() as isize);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        change(new_size as isize - layout.size() as isize);
        // SAFETY: the caller's promise about `start`, `layout` and `new_size` is passed on.
        unsafe { System.realloc(start, layout, new_size) }
    }
}

/// Runs on this thread; fails if it held more than `bytes` at a time beyond what was held before.
#[track_caller]
pub fn within<R>(bytes: usize, run: impl FnOnce() -> R) -> R {
    let before = NOW.with(Cell::get);
    MOST.with(|most| most.set(before));
    let result = run();
    let most = MOST.with(Cell::get) - before;
    assert!(most as usize <= bytes, "{most} bytes of memory, expected at most {bytes}");
    result
}
