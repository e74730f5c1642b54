//! Borrowed arrays in device memory, and the queue that safe calls go to.

use std::marker::PhantomData;

use crate::cuda::driver::{Buffer, Driver, Stream};
use crate::cuda::grouped_gemm::F32Products;
use crate::error::{Error, Result};
use crate::view::{check_disjoint, check_layout, contiguous, extent};

/// The context and stream whose order protects an array that another library owns; `None` where somebody has promised more.
pub(crate) type Home = Option<(u64, Stream)>;

/// A borrowed array in device memory; otherwise as [`View`](crate::View): strides count elements, the last dimension is contiguous.
#[derive(Debug)]
pub struct DeviceView<'a, T, const N: usize> {
    ptr: u64,
    len: usize,
    shape: [usize; N],
    strides: [usize; N],
    home: Home,
    _memory: PhantomData<&'a T>,
}

impl<T, const N: usize> Clone for DeviceView<'_, T, N> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const N: usize> Copy for DeviceView<'_, T, N> {}

/// A borrowed array in device memory that is written; otherwise as [`DeviceView`]. Its rows must not overlap.
#[derive(Debug)]
pub struct DeviceViewMut<'a, T, const N: usize> {
    view: DeviceView<'a, T, N>,
    _exclusive: PhantomData<&'a mut T>,
}

impl<'a, T, const N: usize> DeviceView<'a, T, N> {
    /// The array of this shape and these strides, in the `len` elements from `ptr` on.
    ///
    /// # Safety
    /// For `'a`, `ptr` is memory of `len` elements on the device of the queue that the view is used with, and only work
    /// that the queue's stream orders before writes it.
    pub const unsafe fn from_raw(ptr: u64, len: usize, shape: [usize; N], strides: [usize; N]) -> Self {
        DeviceView { ptr, len, shape, strides, home: None, _memory: PhantomData }
    }

    /// The same array, for the queue of one stream alone.
    #[cfg(feature = "cuda")]
    pub(crate) const fn at_home(self, home: Home) -> Self {
        DeviceView { home, ..self }
    }

    /// Where it may be used.
    pub(crate) const fn home(&self) -> Home {
        self.home
    }

    /// Address of the first element.
    pub const fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Elements from the first on that belong to the borrowed memory.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether no element belongs to it.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements per dimension, slowest first.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// Elements between neighbours, per dimension.
    pub const fn strides(&self) -> [usize; N] {
        self.strides
    }

    /// The same memory with another shape and row-major strides.
    pub const fn reshape<const M: usize>(&self, shape: [usize; M]) -> DeviceView<'a, T, M> {
        self.with_strides(shape, contiguous(shape))
    }

    /// The same memory with another shape and other strides.
    pub const fn with_strides<const M: usize>(&self, shape: [usize; M], strides: [usize; M]) -> DeviceView<'a, T, M> {
        DeviceView { ptr: self.ptr, len: self.len, shape, strides, home: self.home, _memory: PhantomData }
    }

    /// The array that begins `elements` further.
    ///
    /// # Panics
    /// If that is beyond the end of the memory.
    pub const fn skip(&self, elements: usize) -> Self {
        assert!(elements <= self.len);
        DeviceView { ptr: self.ptr + (elements * size_of::<T>()) as u64, len: self.len - elements, ..*self }
    }

    /// Checks shape, strides and length against what a function asks for.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Len`], with `name` as the argument's name.
    pub fn check(&self, name: &str, expected: [usize; N]) -> Result<()> {
        check_layout(name, self.len, &self.shape, &self.strides, &expected)
    }

    /// [`DeviceView::check`] where every dimension may also be 1, and then stands for all indices.
    ///
    /// # Errors
    /// As [`DeviceView::check`].
    pub fn check_broadcast(&self, name: &str, expected: [usize; N]) -> Result<()> {
        let wanted = std::array::from_fn(|i| if self.shape[i] == 1 { 1 } else { expected[i] });
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

    /// Bytes from the first element to one past the last; saturates.
    pub fn extent_bytes(&self) -> u64 {
        (extent(&self.shape, &self.strides).unwrap_or(usize::MAX) as u64).saturating_mul(size_of::<T>() as u64)
    }

    /// Whether the extents of two arrays meet.
    pub fn meets<U, const M: usize>(&self, other: &DeviceView<'_, U, M>) -> bool {
        let ends = (self.ptr.saturating_add(self.extent_bytes()), other.ptr.saturating_add(other.extent_bytes()));
        self.extent_bytes() > 0 && other.extent_bytes() > 0 && self.ptr < ends.1 && other.ptr < ends.0
    }
}

impl<'a, T, const N: usize> DeviceViewMut<'a, T, N> {
    /// The array of this shape and these strides, in the `len` elements from `ptr` on.
    ///
    /// # Safety
    /// As [`DeviceView::from_raw`], and nothing else reads or writes it meanwhile.
    pub const unsafe fn from_raw(ptr: u64, len: usize, shape: [usize; N], strides: [usize; N]) -> Self {
        // SAFETY: the caller's promise.
        let view = unsafe { DeviceView::from_raw(ptr, len, shape, strides) };
        DeviceViewMut { view, _exclusive: PhantomData }
    }

    /// The same array, for the queue of one stream alone.
    #[cfg(feature = "cuda")]
    pub(crate) const fn at_home(self, home: Home) -> Self {
        DeviceViewMut { view: self.view.at_home(home), _exclusive: PhantomData }
    }

    /// Where it may be used.
    pub(crate) const fn home(&self) -> Home {
        self.view.home
    }

    /// Address of the first element.
    pub const fn ptr(&self) -> u64 {
        self.view.ptr
    }

    /// Elements per dimension, slowest first.
    pub const fn shape(&self) -> [usize; N] {
        self.view.shape
    }

    /// Elements between neighbours, per dimension.
    pub const fn strides(&self) -> [usize; N] {
        self.view.strides
    }

    /// The same array, borrowed for a shorter time.
    pub const fn reborrow(&mut self) -> DeviceViewMut<'_, T, N> {
        DeviceViewMut { view: self.view, _exclusive: PhantomData }
    }

    /// The same array, read-only.
    pub const fn as_view(&self) -> DeviceView<'_, T, N> {
        self.view
    }

    /// The same memory with another shape and other strides.
    pub const fn with_strides<const M: usize>(self, shape: [usize; M], strides: [usize; M]) -> DeviceViewMut<'a, T, M> {
        DeviceViewMut { view: self.view.with_strides(shape, strides), _exclusive: PhantomData }
    }

    /// Checks shape, strides and length, and that no element is named twice.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Len`], with `name` as the argument's name.
    pub fn check(&self, name: &str, expected: [usize; N]) -> Result<()> {
        self.view.check(name, expected)?;
        check_disjoint(name, &self.view.shape, &self.view.strides)
    }
}

/// Where safe calls go: a device, one of its streams, and a workspace. Make one per stream and keep it.
pub struct Queue<'a> {
    driver: &'a dyn Driver,
    stream: Stream,
    workspace: Option<Buffer<'a>>,
    f32_products: F32Products,
}

impl<'a> Queue<'a> {
    /// A queue on the legacy default stream with an empty workspace.
    pub fn new(driver: &'a dyn Driver) -> Self {
        // SAFETY: the default stream belongs to every device.
        unsafe { Queue::on_stream(driver, Stream::LEGACY) }
    }

    /// A queue on any stream with an empty workspace.
    ///
    /// # Safety
    /// `stream` belongs to the device and outlives the queue.
    pub unsafe fn on_stream(driver: &'a dyn Driver, stream: Stream) -> Self {
        Queue { driver, stream, workspace: None, f32_products: F32Products::Full }
    }

    /// A queue on a stream of cudarc, with an empty workspace. Arrays of cudarc come to it through [`Lent`](crate::cuda::Lent)
    /// and [`LentMut`](crate::cuda::LentMut).
    ///
    /// # Errors
    /// [`Error::Value`] if the stream is of another context than the device's primary one.
    #[cfg(feature = "cuda")]
    pub fn on_cudarc(device: &'a crate::cuda::Device, stream: &'a cudarc::driver::CudaStream) -> Result<Self> {
        let (context, stream) = crate::cuda::lent::stream_of(stream);
        if context != device.context() {
            return Err(Error::value("stream", format!("a stream of {}", device.name()), "one of another context"));
        }
        // SAFETY: the stream is of the device's context, and borrowed for as long as the queue lives.
        Ok(unsafe { Queue::on_stream(device, stream) })
    }

    /// The device.
    pub fn driver(&self) -> &'a dyn Driver {
        self.driver
    }

    /// The stream.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// How the calls from here on multiply f32 arrays: [`linear`](super::linear()), [`linear_heads`](super::linear_heads),
    /// [`mla_project_value`](super::mla_project_value), [`mlp`](super::mlp), [`expert_ffn`](super::expert_ffn()) and the experts of
    /// [`moe`](super::moe()). Everything else that is f32 stays f32, the choice of experts too. [`F32Products::Full`] unless set.
    pub fn set_f32_products(&mut self, products: F32Products) {
        self.f32_products = products;
    }

    /// How calls multiply f32 arrays.
    pub fn f32_products(&self) -> F32Products {
        self.f32_products
    }

    /// Whether arrays may be used here: those that are lent to a stream, by this one alone.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub(crate) fn check_homes(&self, homes: &[Home]) -> Result<()> {
        let here = (self.driver.context(), self.stream);
        match homes.iter().flatten().find(|home| **home != here) {
            None => Ok(()),
            Some((_, stream)) => {
                let expected = format!("stream {:#x}, to which its arrays are lent", stream.as_raw());
                Err(Error::value("queue", expected, format_args!("stream {:#x}", self.stream.as_raw())))
            }
        }
    }

    /// Size of the workspace now.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.as_ref().map_or(0, Buffer::bytes)
    }

    /// Makes the workspace at least so large, after waiting for the stream if it must grow. A call that needs more does the
    /// same; reserve what the plan's `workspace_bytes` tells, and no call allocates or waits.
    ///
    /// # Errors
    /// [`Error::Driver`] if there is not enough memory.
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.workspace_bytes() {
            self.driver.synchronize(self.stream)?; // queued work may still use the old one
            self.workspace = None; // which goes first
            self.workspace = Some(Buffer::new(self.driver, bytes)?);
        }
        Ok(())
    }

    /// Address of a workspace of at least `bytes` bytes, aligned to 256; 0 if `bytes` is.
    ///
    /// # Errors
    /// As [`Queue::reserve`].
    pub(crate) fn workspace(&mut self, bytes: usize) -> Result<u64> {
        self.reserve(bytes)?;
        Ok(if bytes == 0 { 0 } else { self.workspace.as_ref().map_or(0, Buffer::ptr) })
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what earlier calls did wrong.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize(self.stream)
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        // Queued work may still use the workspace.
        if self.workspace.is_some()
            && let Err(error) = self.synchronize()
        {
            log::warn!("{error}");
        }
    }
}

/// Carves a workspace into parts that begin at multiples of 256 bytes: the same layout for the size and for the launch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts {
    end: usize,
}

impl Parts {
    /// Offset of the next `len` elements of `size` bytes. Saturates.
    pub(crate) fn part(&mut self, len: usize, size: usize) -> usize {
        let start = self.end;
        let bytes = len.saturating_mul(size);
        self.end =
            start.saturating_add(if bytes > usize::MAX - 255 { usize::MAX } else { bytes.next_multiple_of(256) });
        start
    }

    /// Bytes of all parts.
    pub(crate) fn bytes(&self) -> usize {
        self.end
    }
}
