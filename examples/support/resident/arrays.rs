//! Row-major arrays in device memory.

use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{DeviceView, DeviceViewMut, Stream};
use gatefold::{Result, View};
use std::marker::PhantomData;

/// Memory for so many elements, undefined until they are written.
pub struct DeviceArray<'d, T> {
    driver: &'d dyn Driver,
    buffer: Buffer<'d>,
    len: usize,
    _type: PhantomData<T>,
}

impl<'d, T: bytemuck::Pod> DeviceArray<'d, T> {
    pub fn new(driver: &'d dyn Driver, len: usize) -> Result<Self> {
        Ok(DeviceArray { driver, buffer: Buffer::new(driver, len * size_of::<T>())?, len, _type: PhantomData })
    }

    /// A row-major array of this shape, from the first element on.
    pub fn view<const N: usize>(&self, shape: [usize; N]) -> DeviceView<'_, T, N> {
        self.strided(0, shape, strides_of(shape))
    }

    pub fn view_mut<const N: usize>(&mut self, shape: [usize; N]) -> DeviceViewMut<'_, T, N> {
        self.strided_mut(0, shape, strides_of(shape))
    }

    /// An array that begins at an element and has these strides.
    pub fn strided<const N: usize>(
        &self,
        start: usize,
        shape: [usize; N],
        strides: [usize; N],
    ) -> DeviceView<'_, T, N> {
        // SAFETY: the buffer holds `len` elements and is borrowed for as long as the view lives.
        let all = unsafe { DeviceView::from_raw(self.buffer.ptr(), self.len, [self.len], [1]) };
        all.skip(start).with_strides(shape, strides)
    }

    pub fn strided_mut<const N: usize>(
        &mut self,
        start: usize,
        shape: [usize; N],
        strides: [usize; N],
    ) -> DeviceViewMut<'_, T, N> {
        let view = self.strided(start, shape, strides);
        // SAFETY: as in `strided`, borrowed mutably.
        unsafe { DeviceViewMut::from_raw(view.ptr(), view.len(), shape, strides) }
    }

    /// Waits for the stream, then copies to the first elements.
    pub fn write(&mut self, stream: Stream, data: &[T]) -> Result<()> {
        assert!(data.len() <= self.len);
        self.driver.synchronize(stream)?;
        // SAFETY: the buffer holds `data`'s elements; the stream, the only one that uses it, is idle.
        unsafe { self.driver.copy_to_device(self.buffer.ptr(), bytemuck::cast_slice(data)) }
    }

    /// Waits for the stream, then brings elements from one on.
    pub fn read(&self, stream: Stream, start: usize, len: usize) -> Result<Vec<T>> {
        assert!(start + len <= self.len);
        self.driver.synchronize(stream)?;
        let mut data = vec![T::zeroed(); len];
        let src = self.buffer.ptr() + (start * size_of::<T>()) as u64;
        // SAFETY: the buffer holds these elements; the stream, the only one that writes them, is idle.
        unsafe { self.driver.copy_to_host(bytemuck::cast_slice_mut(&mut data), src)? };
        Ok(data)
    }
}

fn strides_of<const N: usize>(shape: [usize; N]) -> [usize; N] {
    View::<(), N>::new(&[], shape).strides()
}
