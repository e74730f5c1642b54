//! Arrays of the host on the device.

use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{DeviceView, DeviceViewMut, Stream};
use gatefold::{Result, View, ViewMut};

/// A copy of everything that a view can reach, with its shape and strides.
pub struct Staged<'a, T, const N: usize> {
    buffer: Buffer<'a>,
    len: usize,
    shape: [usize; N],
    strides: [usize; N],
    _type: std::marker::PhantomData<T>,
}

impl<'a, T: bytemuck::Pod, const N: usize> Staged<'a, T, N> {
    /// Copies the slice behind the view.
    pub fn new(driver: &'a dyn Driver, view: View<'_, T, N>) -> Result<Self> {
        let buffer = Buffer::from_slice(driver, view.data())?;
        let (shape, strides) = (view.shape(), view.strides());
        Ok(Staged { buffer, len: view.data().len(), shape, strides, _type: std::marker::PhantomData })
    }

    /// [`Staged::new`] of what may be absent.
    pub fn option(driver: &'a dyn Driver, view: Option<View<'_, T, N>>) -> Result<Option<Self>> {
        view.map(|view| Staged::new(driver, view)).transpose()
    }

    /// The array on the device.
    pub fn view(&self) -> DeviceView<'_, T, N> {
        // SAFETY: the buffer holds `len` elements and is borrowed for as long as the view lives.
        unsafe { DeviceView::from_raw(self.buffer.ptr(), self.len, self.shape, self.strides) }
    }
}

/// A vector on the device.
pub fn vector<'a, T: bytemuck::Pod>(driver: &'a dyn Driver, data: &[T]) -> Result<Staged<'a, T, 1>> {
    Staged::new(driver, View::new(data, [data.len()]))
}

/// An array that the device writes: what is around its elements is copied to the device too, and back, so that guards hold.
pub struct StagedMut<'a, T, const N: usize> {
    staged: Staged<'a, T, N>,
}

impl<'a, T: bytemuck::Pod, const N: usize> StagedMut<'a, T, N> {
    /// Copies the slice behind the view.
    pub fn new(driver: &'a dyn Driver, view: &ViewMut<'_, T, N>) -> Result<Self> {
        Ok(StagedMut { staged: Staged::new(driver, view.as_view())? })
    }

    /// The array on the device.
    pub fn view(&mut self) -> DeviceViewMut<'_, T, N> {
        let Staged { buffer, len, shape, strides, .. } = &self.staged;
        // SAFETY: the buffer holds `len` elements and is borrowed mutably for as long as the view lives.
        unsafe { DeviceViewMut::from_raw(buffer.ptr(), *len, *shape, *strides) }
    }

    /// Waits for the stream and copies everything back.
    pub fn finish(self, stream: Stream, mut view: ViewMut<'_, T, N>) -> Result<()> {
        let data = self.staged.buffer.to_vec::<T>(stream)?;
        view.data_mut().copy_from_slice(&data[..self.staged.len]);
        Ok(())
    }
}
