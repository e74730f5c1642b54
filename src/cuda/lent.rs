//! Arrays of cudarc, lent to safe calls.

use std::marker::PhantomData;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};

use crate::cuda::driver::Stream;
use crate::cuda::memory::{DeviceView, DeviceViewMut, Home};
use crate::error::{Error, Result};
use crate::view::contiguous;

/// The context and the handle of a stream.
pub(super) fn stream_of(stream: &CudaStream) -> (u64, Stream) {
    let context = stream.context().cu_ctx().expose_provenance() as u64;
    (context, Stream::from_raw(stream.cu_stream().expose_provenance() as u64))
}

/// An array of cudarc (`CudaSlice`, `CudaView`) that safe calls on one stream read.
///
/// While it is lent, cudarc's own order holds: work on the stream comes after what was last written to the array on any other
/// stream, and what writes or frees the array comes after the calls that were queued before this value was dropped. A view
/// of it goes to the [`Queue`](crate::cuda::Queue) of that stream alone; other queues refuse it.
///
/// ```no_run
/// use cudarc::driver::CudaContext;
/// use gatefold::cuda::{Device, Lent, LentMut, Queue};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::open(0)?; // an error, not a panic, where there is no driver: before the first call of cudarc
/// let context = CudaContext::new(0)?;
/// let stream = context.new_stream()?;
/// let x = stream.clone_htod(&[1.0_f32; 6])?;
/// let mut y = stream.alloc_zeros::<f32>(6)?;
///
/// let mut queue = Queue::on_cudarc(&device, &stream)?;
/// {
///     let (x, mut y) = (Lent::new(&x, &stream)?, LentMut::new(&mut y, &stream)?);
///     gatefold::cuda::add(&mut queue, x.view([2, 3]), x.view([2, 3]), 1.0, y.view([2, 3]))?;
/// }
/// let y = stream.clone_dtoh(&y)?; // after the call, in the order of the stream
/// # let _ = y;
/// # Ok(())
/// # }
/// ```
pub struct Lent<'a, T> {
    ptr: u64,
    len: usize,
    home: Home,
    /// Notes the calls on drop.
    _order: SyncOnDrop<'a>,
    _memory: PhantomData<&'a T>,
}

/// An array of cudarc (`CudaSlice`, `CudaViewMut`) that safe calls on one stream write; otherwise as [`Lent`].
pub struct LentMut<'a, T> {
    array: Lent<'a, T>,
    _exclusive: PhantomData<&'a mut T>,
}

/// Array and stream must be of the same context.
fn check_context<T>(array: &impl DeviceSlice<T>, stream: &CudaStream) -> Result<()> {
    if array.stream().context().cu_ctx() != stream.context().cu_ctx() {
        return Err(Error::value("stream", "a stream of the array's context", "one of another context"));
    }
    Ok(())
}

impl<'a, T> Lent<'a, T> {
    /// Lends an array to a stream, which waits for what was last written to it.
    ///
    /// # Errors
    /// [`Error::Value`] if the stream is of another context.
    pub fn new(array: &'a impl DevicePtr<T>, stream: &'a CudaStream) -> Result<Self> {
        check_context(array, stream)?;
        let len = array.len();
        let (ptr, order) = array.device_ptr(stream);
        Ok(Lent { ptr, len, home: Some(stream_of(stream)), _order: order, _memory: PhantomData })
    }

    /// Its first elements as a row-major array of this shape. Whether they fit is checked by the call.
    pub fn view<const N: usize>(&self, shape: [usize; N]) -> DeviceView<'_, T, N> {
        self.view_with_strides(shape, contiguous(shape))
    }

    /// Its elements as an array of this shape and these strides. Whether they fit is checked by the call.
    pub fn view_with_strides<const N: usize>(&self, shape: [usize; N], strides: [usize; N]) -> DeviceView<'_, T, N> {
        // SAFETY: cudarc's array holds `len` elements and stays borrowed while the view lives; `home` sees to it that only the
        // queue of the stream takes the view, and that stream has waited for the last write.
        unsafe { DeviceView::from_raw(self.ptr, self.len, shape, strides) }.at_home(self.home)
    }
}

impl<'a, T> LentMut<'a, T> {
    /// Lends an array to a stream, which waits for what last used it.
    ///
    /// # Errors
    /// [`Error::Value`] if the stream is of another context.
    pub fn new(array: &'a mut impl DevicePtrMut<T>, stream: &'a CudaStream) -> Result<Self> {
        check_context(array, stream)?;
        let len = array.len();
        let (ptr, order) = array.device_ptr_mut(stream);
        let array = Lent { ptr, len, home: Some(stream_of(stream)), _order: order, _memory: PhantomData };
        Ok(LentMut { array, _exclusive: PhantomData })
    }

    /// Its first elements as a row-major array of this shape. Whether they fit is checked by the call.
    pub fn view<const N: usize>(&mut self, shape: [usize; N]) -> DeviceViewMut<'_, T, N> {
        self.view_with_strides(shape, contiguous(shape))
    }

    /// Its elements as an array of this shape and these strides. Whether they fit is checked by the call.
    pub fn view_with_strides<const N: usize>(
        &mut self,
        shape: [usize; N],
        strides: [usize; N],
    ) -> DeviceViewMut<'_, T, N> {
        let Lent { ptr, len, home, .. } = self.array;
        // SAFETY: as for `Lent`; and the array is borrowed mutably while the view lives.
        unsafe { DeviceViewMut::from_raw(ptr, len, shape, strides) }.at_home(home)
    }
}
