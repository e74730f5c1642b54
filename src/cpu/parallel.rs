//! Work shared by the threads of the caller's rayon pool, in items that any thread may take.

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many workers [`run`] uses at most, here and now: the threads of the current pool.
pub fn max_workers() -> usize {
    rayon::current_num_threads().max(1)
}

/// How many workers [`run`] uses for so many items.
pub fn workers_for(items: usize) -> usize {
    max_workers().min(items)
}

/// Calls `work(worker, item)` once for each item in `0..items`, in parallel.
///
/// Free workers take the next item from one counter, so give the longest items first. `worker` is below
/// [`workers_for`]`(items)`, and no two calls with the same worker overlap: it names scratch memory. Which worker gets which
/// item differs from run to run; results must not depend on it. With one worker this is a plain loop on this thread. A panic
/// in an item reaches the caller once the other workers are done with theirs.
pub fn run(items: usize, work: impl Fn(usize, usize) + Sync) {
    run_any(items, &work);
}

/// [`run`], compiled once: the machinery of the thread pool is larger than most of the loops that use it.
fn run_any(items: usize, work: &(dyn Fn(usize, usize) + Sync)) {
    let workers = workers_for(items);
    if workers <= 1 {
        for item in 0..items {
            work(0, item);
        }
        return;
    }
    let next = AtomicUsize::new(0);
    (0..workers).into_par_iter().with_max_len(1).for_each(|worker| {
        loop {
            // Relaxed: the counter only hands out numbers; the end of `for_each` orders the memory.
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                break;
            }
            work(worker, item);
        }
    });
}

/// A slice whose parts are written by several workers.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable slice, and `part` makes its callers keep parts disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows the slice until the last copy of the result is gone.
    pub fn new(slice: &'a mut [T]) -> Self {
        Shared { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The values `at..at + len`, to read.
    ///
    /// # Panics
    /// If they are not inside the slice.
    ///
    /// # Safety
    /// While the result lives, nobody may have a part to write that shares a value with it.
    #[inline(always)]
    pub unsafe fn read(&self, at: usize, len: usize) -> &'a [T] {
        assert!(at <= self.len && len <= self.len - at, "part {at}..+{len} of {} values", self.len);
        // SAFETY: `at + len <= self.len` was asserted, `start` points to `self.len` values borrowed for 'a, and the caller
        // lets nobody write them.
        unsafe { std::slice::from_raw_parts(self.start.add(at), len) }
    }

    /// The values `at..at + len`, to write.
    ///
    /// # Panics
    /// If they are not inside the slice.
    ///
    /// # Safety
    /// While the result lives, nobody else may have a part that shares a value with it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at <= self.len && len <= self.len - at, "part {at}..+{len} of {} values", self.len);
        // SAFETY: `at + len <= self.len` was asserted, `start` points to `self.len` values borrowed for 'a, and the caller
        // keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_item_once() {
        for threads in [1, 2, 3, 7] {
            for items in [0, 1, 2, 100] {
                let mut done = vec![0u32; items];
                let mut busy = vec![0u32; threads];
                pool(threads).install(|| {
                    assert_eq!(workers_for(items), threads.min(items));
                    let (done, busy) = (Shared::new(&mut done), Shared::new(&mut busy));
                    run(items, |worker, item| {
                        // SAFETY: no two calls have the same item, and none with the same worker overlap.
                        let (done, busy) = unsafe { (done.part(item, 1), busy.part(worker, 1)) };
                        assert_eq!(busy[0], 0);
                        busy[0] = 1;
                        std::thread::yield_now();
                        done[0] += 1;
                        busy[0] = 0;
                    });
                });
                assert!(done.iter().all(|n| *n == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        for threads in [1, 3] {
            let result = std::panic::catch_unwind(|| {
                pool(threads).install(|| run(50, |_, item| assert_ne!(item, 20, "item 20")));
            });
            assert!(result.is_err());
        }
    }

    #[test]
    #[should_panic(expected = "part 3..+2 of 4 values")]
    fn parts_are_checked() {
        let mut values = [0u8; 4];
        // SAFETY: it panics.
        unsafe { Shared::new(&mut values).part(3, 2) };
    }
}
