//! Rows of an output, written by several workers.

use super::level::{Level, dispatch};
use super::parallel::{self, Shared};
use super::simd::{Kernel, Simd};
use crate::view::ViewMut;
use std::ops::Range;

/// Work that is worth an item of its own, in values touched: about 10 us, of which taking an item is a small part.
const ITEM_VALUES: usize = 1 << 15;

/// Rows that one item takes when a row touches so many values.
pub fn rows_per_item(values_per_row: usize) -> usize {
    (ITEM_VALUES / values_per_row.max(1)).max(1)
}

/// Work on a range of rows at a level: [`for_rows`] runs it.
pub trait RowKernel: Sync {
    /// Computes these rows; `worker` names scratch memory, as in [`parallel::run`].
    fn eval<S: Simd>(&self, simd: S, worker: usize, rows: Range<usize>);
}

struct Item<'a, K>(&'a K, usize, Range<usize>);

impl<K: RowKernel> Kernel for Item<'_, K> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        self.0.eval(simd, self.1, self.2);
    }
}

/// All rows, `per_item` at a time, in parallel. Which rows share an item must not matter.
pub fn for_rows<K: RowKernel>(level: Level, rows: usize, per_item: usize, kernel: &K) {
    parallel::run(rows.div_ceil(per_item), |worker, item| {
        let rows = item * per_item..rows.min((item + 1) * per_item);
        dispatch(level, Item(kernel, worker, rows));
    });
}

/// Workers that [`for_rows`] uses.
pub fn workers(rows: usize, per_item: usize) -> usize {
    parallel::workers_for(rows.div_ceil(per_item))
}

/// A view that several workers write, each its own rows.
#[derive(Clone, Copy)]
pub struct SharedView<'a, T, const N: usize> {
    data: Shared<'a, T>,
    shape: [usize; N],
    strides: [usize; N],
}

impl<'a, T, const N: usize> SharedView<'a, T, N> {
    /// Of a view that was accepted by [`ViewMut::check`], so that its rows are disjoint.
    pub fn new(view: &'a mut ViewMut<'_, T, N>) -> Self {
        let (shape, strides) = (view.shape(), view.strides());
        SharedView { data: Shared::new(view.data_mut()), shape, strides }
    }

    /// The contiguous last dimension at the leading indices (`N - 1` of them).
    ///
    /// # Panics
    /// If the row is not inside the slice.
    ///
    /// # Safety
    /// While the result lives, nobody else may have the same row.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, index: &[usize]) -> &'a mut [T] {
        // SAFETY: the caller has the whole row.
        unsafe { self.part(index, 0, self.shape[N - 1]) }
    }

    /// Columns `at..at + len` of a row.
    ///
    /// # Panics
    /// If they are not inside the row and the slice.
    ///
    /// # Safety
    /// While the result lives, nobody else may have any of them.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, index: &[usize], at: usize, len: usize) -> &'a mut [T] {
        assert!(index.len() + 1 == N && at + len <= self.shape[N - 1]);
        let mut offset = 0;
        for ((i, n), stride) in index.iter().zip(self.shape).zip(self.strides) {
            debug_assert!(*i < n);
            offset += i * stride;
        }
        // SAFETY: elements of a checked view are disjoint, and the caller has these alone.
        unsafe { self.data.part(offset + at, len) }
    }
}

/// The leading indices of row `row` of an array, rows counted in order.
#[inline(always)]
pub fn unravel<const N: usize>(shape: &[usize; N], mut row: usize) -> [usize; N] {
    let mut index = [0; N];
    for i in (0..N - 1).rev() {
        index[i] = row % shape[i];
        row /= shape[i];
    }
    index
}
