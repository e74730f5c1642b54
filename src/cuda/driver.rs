//! What the CUDA backend asks of whatever runs its kernels: memory, copies, loading, launching.
//!
//! [`Driver`] has two implementations, the CUDA driver (`cuda::Device`) and the simulator that the tests use. Plans and
//! launches are written against it, so that a test of one is a test of the other.

use crate::cuda::kernels::Kernel;
use crate::error::{Error, Result};

/// A CUDA stream by its handle: of this crate or of any other, also the special ones.
///
/// 0 is the legacy default stream, 1 is the same by its explicit name, 2 the default stream of the calling thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stream(u64);

impl Stream {
    /// The legacy default stream.
    pub const LEGACY: Stream = Stream(0);

    /// The stream with this handle (a `CUstream` or `cudaStream_t` as a number).
    pub const fn from_raw(handle: u64) -> Self {
        Stream(handle)
    }

    /// The handle.
    pub const fn as_raw(self) -> u64 {
        self.0
    }
}

/// What a device allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Limits {
    /// Compute capability as one number: 80, 90, 120.
    pub sm: u32,
    /// Multiprocessors.
    pub num_sms: u32,
    /// Largest shared memory of a CTA (thread block), in bytes, for kernels that ask for more than the usual 48 KiB.
    pub shared_bytes: u32,
}

impl Limits {
    /// Limits by value.
    pub const fn new(sm: u32, num_sms: u32, shared_bytes: u32) -> Self {
        Limits { sm, num_sms, shared_bytes }
    }
}

/// How a kernel is launched, besides its parameters. The threads of a CTA are the kernel's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Launch {
    /// CTAs along x, y, z.
    pub grid: [u32; 3],
    /// Shared memory beyond what the kernel's text declares.
    pub dynamic_shared_bytes: u32,
    /// CTAs of a cluster along x, y, z; `[1, 1, 1]` without clusters.
    pub cluster: [u32; 3],
    /// Start before the previous kernel of the stream has ended; the kernel itself must wait (`griddepcontrol`). No kernel of
    /// this crate does so, and so no plan sets it.
    pub programmatic: bool,
}

impl Launch {
    /// A plain launch of so many CTAs.
    pub const fn grid(grid: [u32; 3]) -> Self {
        Launch { grid, dynamic_shared_bytes: 0, cluster: [1; 3], programmatic: false }
    }

    /// The rules that hold on every device, with `params` the parameter block.
    ///
    /// # Errors
    /// [`Error::Value`] naming the kernel and the rule.
    pub fn check(&self, kernel: &Kernel, limits: &Limits, params: &[u8]) -> Result<()> {
        let fail = |what: &str, expected: String, found: String| {
            Err(Error::value(format!("{what} of {}", kernel.entry), expected, found))
        };
        const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
        if self.grid.iter().zip(MAX_GRID).any(|(n, max)| *n == 0 || *n > max) {
            return fail("grid", format!("1 to {MAX_GRID:?} CTAs"), format!("{:?}", self.grid));
        }
        if self.cluster.iter().zip(self.grid).any(|(n, ctas)| *n == 0 || ctas % *n != 0) {
            return fail("cluster", format!("a divisor of the grid {:?}", self.grid), format!("{:?}", self.cluster));
        }
        if params.len() != kernel.param_bytes() {
            return fail("parameters", format!("{} bytes", kernel.param_bytes()), format!("{} bytes", params.len()));
        }
        let shared = u64::from(kernel.static_shared_bytes) + u64::from(self.dynamic_shared_bytes);
        if self.dynamic_shared_bytes > 0 && !kernel.dynamic_shared || shared > u64::from(limits.shared_bytes) {
            let dynamic = if kernel.dynamic_shared { "" } else { ", none of it dynamic" };
            return fail(
                "shared memory",
                format!("at most {} bytes{dynamic}", limits.shared_bytes),
                format!("{shared}, {} of it dynamic", self.dynamic_shared_bytes),
            );
        }
        Ok(())
    }
}

/// Runs kernels: the CUDA driver, or the simulator.
///
/// Device memory is a 64-bit address. Copies and [`Driver::synchronize`] return when the work is done; launches do not
/// wait. Nothing here panics on what a device or its driver answers.
pub trait Driver: Send + Sync {
    /// What the device allows.
    fn limits(&self) -> Limits;

    /// What tells its memory and streams from those of other devices of the same process: the address of its context.
    fn context(&self) -> u64 {
        0
    }

    /// Device memory of at least `bytes` bytes, aligned to 256, its contents undefined.
    ///
    /// # Errors
    /// [`Error::Driver`] if there is not enough.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives memory back.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `ptr` came from [`Driver::allocate`] of this driver, was not freed, and no running kernel uses it.
    unsafe fn free(&self, ptr: u64) -> Result<()>;

    /// Copies from the host.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `dst` has room for `src`, and no running kernel uses those bytes.
    unsafe fn copy_to_device(&self, dst: u64, src: &[u8]) -> Result<()>;

    /// Copies to the host.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `src` holds `dst.len()` bytes, and no running kernel writes them.
    unsafe fn copy_to_host(&self, dst: &mut [u8], src: u64) -> Result<()>;

    /// Makes a kernel ready, so that its launch does not compile or load anything. Does nothing the second time.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device cannot run it, [`Error::Driver`] with the compiler's log if it does not load.
    fn load(&self, kernel: &'static Kernel) -> Result<()>;

    /// Queues a kernel on a stream; loads it first if [`Driver::load`] has not.
    ///
    /// # Errors
    /// As [`Launch::check`] and [`Driver::load`]; [`Error::Driver`] if the driver refuses the launch.
    ///
    /// # Safety
    /// The parameters are what the kernel's header requires: pointers to memory of this device that lives until the
    /// kernel has ended, large enough, and not written by others meanwhile. `stream` belongs to this device.
    unsafe fn launch(&self, kernel: &'static Kernel, launch: &Launch, params: &[u8], stream: Stream) -> Result<()>;

    /// Waits until all work queued on a stream is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what earlier launches did wrong.
    fn synchronize(&self, stream: Stream) -> Result<()>;
}

/// What tests and benches ask beyond [`Driver`]: streams of their own, and work recorded once and run many times (a CUDA
/// graph). Nothing in this crate needs it.
pub trait Recorder: Driver {
    /// A stream that does not wait for the legacy default stream, nor that for it.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::Unsupported`] if the driver has none.
    fn create_stream(&self) -> Result<Stream>;

    /// Gives a stream back; what is queued on it still runs.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `stream` came from [`Recorder::create_stream`] of this driver, and nobody uses it any more.
    unsafe fn destroy_stream(&self, stream: Stream) -> Result<()>;

    /// Records what `work` launches on `stream` instead of running it, and gives the handle of the recording. What cannot be
    /// recorded (memory, copies, waiting, a kernel that is not loaded) fails meanwhile, on this thread at least.
    ///
    /// # Errors
    /// That of `work`; [`Error::Driver`]; [`Error::Unsupported`] if the driver cannot record.
    ///
    /// # Safety
    /// `stream` came from [`Recorder::create_stream`] of this driver, and nobody else launches on it meanwhile.
    unsafe fn record(&self, stream: Stream, work: &mut dyn FnMut() -> Result<()>) -> Result<u64>;

    /// Queues all launches of a recording.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// The recording is alive; what its launches were promised (see [`Driver::launch`]) holds once more.
    unsafe fn replay(&self, recording: u64, stream: Stream) -> Result<()>;

    /// Gives a recording back.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    /// `recording` came from [`Recorder::record`] of this driver, is not used any more, and none of its launches runs.
    unsafe fn forget(&self, recording: u64) -> Result<()>;
}

/// Device memory that frees itself.
pub struct Buffer<'a> {
    driver: &'a dyn Driver,
    ptr: u64,
    bytes: usize,
}

impl<'a> Buffer<'a> {
    /// Memory with undefined contents.
    ///
    /// # Errors
    /// As [`Driver::allocate`].
    pub fn new(driver: &'a dyn Driver, bytes: usize) -> Result<Self> {
        Ok(Buffer { driver, ptr: driver.allocate(bytes.max(1))?, bytes })
    }

    /// Memory with these elements.
    ///
    /// # Errors
    /// As [`Driver::allocate`] and [`Driver::copy_to_device`].
    pub fn from_slice<T: bytemuck::NoUninit>(driver: &'a dyn Driver, data: &[T]) -> Result<Self> {
        let data: &[u8] = bytemuck::cast_slice(data);
        let buffer = Buffer::new(driver, data.len())?;
        // SAFETY: the buffer was made with the length of `data` just now, so nothing else uses it.
        unsafe { driver.copy_to_device(buffer.ptr, data)? };
        Ok(buffer)
    }

    /// The elements, as many as fit.
    ///
    /// # Errors
    /// As [`Driver::copy_to_host`].
    pub fn to_vec<T: bytemuck::Pod>(&self, stream: Stream) -> Result<Vec<T>> {
        self.driver.synchronize(stream)?;
        let mut data = vec![T::zeroed(); self.bytes / size_of::<T>()];
        // SAFETY: `data` is no longer than the buffer, and `stream`, which the caller used to write it, is idle.
        unsafe { self.driver.copy_to_host(bytemuck::cast_slice_mut(&mut data), self.ptr)? };
        Ok(data)
    }

    /// Where it lies.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // SAFETY: `ptr` is from `allocate` of the same driver and freed only here. The driver itself waits for kernels
        // that still run.
        if let Err(error) = unsafe { self.driver.free(self.ptr) } {
            log::warn!("device memory was not freed: {error}");
        }
    }
}
