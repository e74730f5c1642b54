//! Borrowed arrays: a slice with a shape and strides. The caller owns the memory; nothing here allocates.

use crate::error::{Error, Result};

/// A borrowed array of `N` dimensions, slowest first: element `[i, j, ..]` is `data[i * strides[0] + j * strides[1] + ..]`.
///
/// Strides count elements. The last dimension must be contiguous; other strides are free, also 0 (one row for all).
/// Making a view checks nothing; the function it is passed to does, and names the argument.
#[derive(Debug)]
pub struct View<'a, T, const N: usize> {
    data: &'a [T],
    shape: [usize; N],
    strides: [usize; N],
}

impl<T, const N: usize> Clone for View<'_, T, N> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const N: usize> Copy for View<'_, T, N> {}

/// A borrowed array that is written; otherwise as [`View`]. Its rows must not overlap.
#[derive(Debug)]
pub struct ViewMut<'a, T, const N: usize> {
    data: &'a mut [T],
    shape: [usize; N],
    strides: [usize; N],
}

/// Row-major strides. Products that overflow saturate; [`View::check`] then finds the slice too short.
pub(crate) const fn contiguous<const N: usize>(shape: [usize; N]) -> [usize; N] {
    let mut strides = [1usize; N];
    let mut i = N;
    while i > 1 {
        i -= 1;
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

/// Elements from the first to one past the last, or `None` if that does not fit a `usize`.
pub(crate) fn extent(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (n, stride) in shape.iter().zip(strides) {
        last = last.checked_add((n - 1).checked_mul(*stride)?)?;
    }
    last.checked_add(1)
}

/// The checks that reading needs: the shape as expected, the last dimension contiguous, the slice long enough.
pub(crate) fn check_layout(
    name: &str,
    len: usize,
    shape: &[usize],
    strides: &[usize],
    expected: &[usize],
) -> Result<()> {
    if shape != expected {
        return Err(Error::Shape { argument: name.into(), expected: expected.to_vec(), found: shape.to_vec() });
    }
    if shape.contains(&0) {
        return Ok(());
    }
    if let (Some(n), Some(stride)) = (shape.last(), strides.last())
        && *n > 1
        && *stride != 1
    {
        let expected = "the last dimension contiguous (stride 1)".into();
        return Err(Error::Stride { argument: name.into(), expected, found: strides.to_vec() });
    }
    let needed = extent(shape, strides).unwrap_or(usize::MAX);
    if needed > len {
        return Err(Error::Len { argument: name.into(), expected: needed, found: len });
    }
    Ok(())
}

/// No two index tuples name the same element. Sufficient, and true for every array that is a slice of a larger one:
/// sorted by stride, each dimension steps over all of the smaller ones.
pub(crate) fn check_disjoint(name: &str, shape: &[usize], strides: &[usize]) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut covered = 0;
    loop {
        // The smallest stride above what is covered so far, without a heap: N is at most 4.
        let mut next: Option<(usize, usize)> = None;
        let mut left = 0;
        for (n, stride) in shape.iter().zip(strides) {
            if *n > 1 && (*stride == 0 || *stride >= covered.max(1)) {
                left += 1;
                if next.is_none_or(|(s, _)| *stride < s) {
                    next = Some((*stride, *n));
                }
            }
        }
        let Some((stride, n)) = next else {
            // Every dimension with more than one element must have been stepped over exactly once.
            return Ok(());
        };
        let same = shape.iter().zip(strides).filter(|(m, s)| **m > 1 && **s == stride).count();
        let span = stride.saturating_mul(n - 1).saturating_add(1).saturating_add(covered.saturating_sub(1));
        let blocked = shape.iter().zip(strides).filter(|(m, s)| **m > 1 && **s > stride && **s < span).count();
        if stride == 0 || same > 1 || blocked > 0 || left == 0 {
            let expected = "rows that do not overlap".into();
            return Err(Error::Stride { argument: name.into(), expected, found: strides.to_vec() });
        }
        if span == usize::MAX {
            return Ok(()); // nothing steps over the end of the address space; whether the array fits it is another check
        }
        covered = span;
    }
}

impl<'a, T, const N: usize> View<'a, T, N> {
    /// A contiguous array.
    pub const fn new(data: &'a [T], shape: [usize; N]) -> Self {
        View { data, shape, strides: contiguous(shape) }
    }

    /// An array with strides in elements.
    pub const fn with_strides(data: &'a [T], shape: [usize; N], strides: [usize; N]) -> Self {
        View { data, shape, strides }
    }

    /// Elements per dimension, slowest first.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// Elements between neighbours, per dimension.
    pub const fn strides(&self) -> [usize; N] {
        self.strides
    }

    /// The slice that the view was made from.
    pub const fn data(&self) -> &'a [T] {
        self.data
    }

    /// Checks shape, strides and length against what a function asks for.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Len`], with `name` as the argument's name.
    pub fn check(&self, name: &str, expected: [usize; N]) -> Result<()> {
        check_layout(name, self.data.len(), &self.shape, &self.strides, &expected)
    }

    /// [`View::check`] where every dimension may also be 1, and then stands for all indices.
    ///
    /// # Errors
    /// As [`View::check`].
    pub fn check_broadcast(&self, name: &str, expected: [usize; N]) -> Result<()> {
        let mut wanted = expected;
        for (want, have) in wanted.iter_mut().zip(self.shape) {
            if have == 1 {
                *want = 1;
            }
        }
        if self.shape == wanted {
            self.check(name, wanted)
        } else {
            Err(Error::Shape { argument: name.into(), expected: expected.to_vec(), found: self.shape.to_vec() })
        }
    }

    /// Strides with 0 where the dimension is 1: the array as seen by a larger shape.
    pub fn broadcast_strides(&self) -> [usize; N] {
        std::array::from_fn(|i| if self.shape[i] == 1 { 0 } else { self.strides[i] })
    }

    /// Position of an element in the slice.
    #[inline(always)]
    pub fn offset(&self, index: [usize; N]) -> usize {
        let mut offset = 0;
        for (i, (n, stride)) in index.into_iter().zip(self.shape.into_iter().zip(self.strides)) {
            debug_assert!(i < n);
            offset += i * stride;
        }
        offset
    }

    /// The contiguous last dimension at the leading indices (`N - 1` of them).
    ///
    /// # Panics
    /// If the number of indices is not `N - 1` or they are out of range.
    #[inline(always)]
    pub fn row(&self, index: &[usize]) -> &'a [T] {
        assert_eq!(index.len() + 1, N);
        let mut offset = 0;
        for (i, stride) in index.iter().zip(self.strides) {
            offset += i * stride;
        }
        &self.data[offset..offset + self.shape[N - 1]]
    }
}

impl<T: Copy, const N: usize> View<'_, T, N> {
    /// One element.
    ///
    /// # Panics
    /// If the index lies outside the slice.
    #[inline(always)]
    pub fn at(&self, index: [usize; N]) -> T {
        self.data[self.offset(index)]
    }

    /// One element of an array that was accepted by [`View::check_broadcast`]: dimensions of 1 take any index.
    #[inline(always)]
    pub fn at_broadcast(&self, index: [usize; N]) -> T {
        let mut offset = 0;
        for (i, (n, stride)) in index.into_iter().zip(self.shape.into_iter().zip(self.strides)) {
            offset += if n == 1 { 0 } else { i * stride };
        }
        self.data[offset]
    }
}

impl<'a, T, const N: usize> ViewMut<'a, T, N> {
    /// A contiguous array.
    pub const fn new(data: &'a mut [T], shape: [usize; N]) -> Self {
        ViewMut { data, shape, strides: contiguous(shape) }
    }

    /// An array with strides in elements.
    pub const fn with_strides(data: &'a mut [T], shape: [usize; N], strides: [usize; N]) -> Self {
        ViewMut { data, shape, strides }
    }

    /// Elements per dimension, slowest first.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// Elements between neighbours, per dimension.
    pub const fn strides(&self) -> [usize; N] {
        self.strides
    }

    /// The same array, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T, N> {
        ViewMut { data: self.data, shape: self.shape, strides: self.strides }
    }

    /// The same array, read-only.
    pub fn as_view(&self) -> View<'_, T, N> {
        View { data: self.data, shape: self.shape, strides: self.strides }
    }

    /// The slice that the view was made from.
    pub fn data_mut(&mut self) -> &mut [T] {
        self.data
    }

    /// The slice that the view was made from, for as long as it was borrowed.
    pub fn into_data(self) -> &'a mut [T] {
        self.data
    }

    /// Checks shape, strides and length, and that no element is named twice.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Len`], with `name` as the argument's name.
    pub fn check(&self, name: &str, expected: [usize; N]) -> Result<()> {
        check_layout(name, self.data.len(), &self.shape, &self.strides, &expected)?;
        check_disjoint(name, &self.shape, &self.strides)
    }

    /// The contiguous last dimension at the leading indices (`N - 1` of them), for writing.
    ///
    /// # Panics
    /// If the number of indices is not `N - 1` or they are out of range.
    #[inline(always)]
    pub fn row_mut(&mut self, index: &[usize]) -> &mut [T] {
        assert_eq!(index.len() + 1, N);
        let mut offset = 0;
        for (i, stride) in index.iter().zip(self.strides) {
            offset += i * stride;
        }
        &mut self.data[offset..offset + self.shape[N - 1]]
    }

    /// Writes one element.
    ///
    /// # Panics
    /// If the index lies outside the slice.
    #[inline(always)]
    pub fn set(&mut self, index: [usize; N], value: T) {
        let mut offset = 0;
        for (i, stride) in index.iter().zip(self.strides) {
            offset += i * stride;
        }
        self.data[offset] = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disjoint() {
        let ok = |shape: &[usize], strides: &[usize]| check_disjoint("x", shape, strides).is_ok();
        assert!(ok(&[4, 8], &[8, 1]));
        assert!(ok(&[4, 8], &[100, 1]));
        assert!(!ok(&[4, 8], &[7, 1]));
        assert!(!ok(&[4, 8], &[0, 1]));
        assert!(ok(&[1, 8], &[0, 1]));
        assert!(ok(&[2, 3, 4], &[4, 8, 1])); // heads and tokens swapped
        assert!(!ok(&[2, 3, 4], &[4, 4, 1]));
        assert!(!ok(&[3, 3, 4], &[4, 8, 1]));
        assert!(ok(&[3, 1, 1], &[1, 5, 5]));
        assert!(ok(&[0, 3], &[0, 0]));
    }

    #[test]
    fn too_large_to_count() {
        let view = View::<f32, 2>::new(&[], [usize::MAX, 2]);
        assert!(matches!(view.check("x", [usize::MAX, 2]), Err(Error::Len { .. })));
    }
}
