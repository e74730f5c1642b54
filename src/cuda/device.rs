//! One GPU: its primary context and the kernels loaded into it.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use crate::cuda::driver::{Driver, Launch, Limits, Recorder, Stream};
use crate::cuda::kernels::{self, Kernel};
use crate::cuda::sys::{
    Api, CUcontext, CUdevice, CUdevice_attribute, CUevent, CUfunction, CUfunction_attribute, CUgraphExec,
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUstream,
    CUstreamCaptureMode,
};
use crate::error::{Error, Result};

/// The oldest compute capability that any kernel of this crate runs on: A100.
const MIN_SM: u32 = 80;

/// Largest number of parameters of a kernel of this crate.
const MAX_PARAMS: usize = {
    let (mut most, mut i) = (0, 0);
    while i < kernels::ALL.len() {
        let params = kernels::ALL[i].params.len();
        most = if params > most { params } else { most };
        i += 1;
    }
    most
};

/// A CUDA device, with the kernels of this crate that are loaded on it.
///
/// It holds the device's primary context, which it shares with every other library in the process, so pointers and
/// streams of theirs are valid here. Each call makes that context current and puts the previous one back. A `Device`
/// may be used by many threads at once.
pub struct Device {
    api: Arc<Api>,
    handle: CUdevice,
    context: Context,
    ordinal: usize,
    name: String,
    memory_bytes: usize,
    limits: Limits,
    modules: RwLock<HashMap<&'static str, Module>>,
}

/// The primary context of a device.
#[derive(Clone, Copy)]
struct Context(CUcontext);

// SAFETY: a context handle may be used by any thread at any time (CUDA driver API, "the driver API is thread-safe").
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Module {
    module: CUmodule,
    function: CUfunction,
}

// SAFETY: module and function handles may be used by any thread; they are unloaded only when the `Device` is dropped.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// Keeps the device's context current for this thread, then puts the previous one back.
struct Current<'a> {
    api: &'a Api,
    pushed: bool,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: `popped` is a context handle; this thread pushed one and pops it again.
            if let Err(error) = unsafe { self.api.context_pop("the previous context", &mut popped) } {
                log::warn!("{error}");
            }
        }
    }
}

impl Device {
    /// Number of CUDA devices that this process can see; never 0.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is no driver, one that is too old (CUDA 11.8 is needed), or no visible device;
    /// [`Error::Driver`] if the driver does not start. No panic, whatever is installed.
    pub fn count() -> Result<usize> {
        Api::get()?.count()
    }

    /// Opens a device by its number, counted from 0 among those that `CUDA_VISIBLE_DEVICES` leaves visible.
    ///
    /// # Errors
    /// As [`Device::count`]; [`Error::Value`] if there is no device of that number; [`Error::NoDevice`] if its compute
    /// capability is below 8.0.
    pub fn open(ordinal: usize) -> Result<Device> {
        Device::with_api(Api::get()?, ordinal)
    }

    /// [`Device::open`] with another driver library, for tests.
    ///
    /// # Errors
    /// As [`Device::open`].
    #[doc(hidden)]
    pub fn open_with(library: &Path, ordinal: usize) -> Result<Device> {
        Device::with_api(Arc::new(Api::open([OsStr::new(library)].into_iter())?), ordinal)
    }

    fn with_api(api: Arc<Api>, ordinal: usize) -> Result<Device> {
        let count = api.count()?;
        if ordinal >= count {
            let expected = format!("a device number below {count}");
            return Err(Error::value("ordinal", expected, ordinal));
        }
        let about = format!("device {ordinal}");
        let mut handle = 0;
        // SAFETY: `handle` is a device handle; the ordinal is below the count, so it fits.
        unsafe { api.device_get(&about, &mut handle, ordinal as c_int)? };
        let mut name = [0; 256];
        // SAFETY: `name` has the length given.
        unsafe { api.device_name(&about, name.as_mut_ptr(), name.len() as c_int, handle)? };
        name[name.len() - 1] = 0;
        // SAFETY: `name` ends in NUL, put there above at the latest.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();

        use CUdevice_attribute as Attribute;
        let major = api.attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = api.attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let num_sms = api.attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared = api.attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let limits = Limits::new(major * 10 + minor, num_sms, shared);
        if limits.sm < MIN_SM {
            return Err(Error::NoDevice {
                device: "CUDA".into(),
                expected: format!("compute capability {}.{} or newer", MIN_SM / 10, MIN_SM % 10),
                found: format!("{name} with {major}.{minor}"),
            });
        }
        let mut memory_bytes = 0;
        // SAFETY: `memory_bytes` is a size_t.
        unsafe { api.device_memory(&about, &mut memory_bytes, handle)? };
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a context handle; released once, when the device is dropped.
        unsafe { api.context_retain(&about, &mut context, handle)? };
        let context = Context(context);
        Ok(Device { api, handle, context, ordinal, name, memory_bytes, limits, modules: RwLock::default() })
    }

    /// The number it was opened with.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its memory, free or not.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// CUDA version that its driver speaks: `(12, 8)`.
    pub fn driver_version(&self) -> (u32, u32) {
        self.api.version()
    }

    /// Time that the device needs for what `work` queues on a stream, in microseconds, by two events around it. Waits.
    ///
    /// # Errors
    /// That of `work`; [`Error::Driver`], also for what the work did wrong; [`Error::Unsupported`] if the driver has no events.
    ///
    /// # Safety
    /// `stream` belongs to this device.
    #[doc(hidden)]
    pub unsafe fn time_us(&self, stream: Stream, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let (start, end) = (self.new_event()?, self.new_event()?);
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        let _current = self.make_current()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive and recorded; `milliseconds` is an f32.
        unsafe {
            self.api.event_synchronize("the end of the work", end.handle)?;
            self.api.event_elapsed("the work", &mut milliseconds, start.handle, end.handle)?;
        }
        Ok(f64::from(milliseconds) * 1e3)
    }

    fn new_event(&self) -> Result<Event<'_>> {
        let _current = self.make_current()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is an event handle; 0 are the flags of an event that takes the time.
        unsafe { self.api.event_create("an event", &mut handle, 0)? };
        Ok(Event { device: self, handle })
    }

    fn make_current(&self) -> Result<Current<'_>> {
        let mut current = std::ptr::null_mut();
        // SAFETY: `current` is a context handle.
        unsafe { self.api.context_current("this thread", &mut current)? };
        let pushed = current != self.context.0;
        if pushed {
            // SAFETY: the context is retained for as long as the device exists.
            unsafe { self.api.context_push(&self.name, self.context.0)? };
        }
        Ok(Current { api: &self.api, pushed })
    }

    /// The kernel's function, loaded if it is not yet. Its context must be current.
    fn function(&self, kernel: &'static Kernel) -> Result<CUfunction> {
        // A thread that panicked while it held the lock cannot have left a half-made entry: entries are inserted whole.
        if let Some(module) = self.modules.read().unwrap_or_else(PoisonError::into_inner).get(kernel.entry) {
            return Ok(module.function);
        }
        let mut modules = self.modules.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(kernel.entry) {
            return Ok(module.function);
        }
        let module = self.load_module(kernel)?;
        modules.insert(kernel.entry, module);
        Ok(module.function)
    }

    fn load_module(&self, kernel: &'static Kernel) -> Result<Module> {
        if self.limits.sm < kernel.sm || kernel.exact && self.limits.sm != kernel.sm {
            let only = if kernel.exact { "exactly" } else { "at least" };
            let case =
                format!("{} needs {only} sm_{}, {} is sm_{}", kernel.entry, kernel.sm, self.name, self.limits.sm);
            return Err(Error::unsupported("cuda", case));
        }
        let start = Instant::now();
        let nul = |_| Error::value(kernel.entry, "PTX without NUL bytes", "a NUL byte");
        let ptx = CString::new(kernel.ptx).map_err(nul)?;
        let entry = CString::new(kernel.entry).map_err(nul)?;
        let module = self.api.load_ptx(kernel.entry, &ptx)?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module was just loaded, `entry` ends in NUL.
        let mut result = unsafe { self.api.module_function(kernel.entry, &mut function, module, entry.as_ptr()) };
        if result.is_ok() && kernel.dynamic_shared {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = self.limits.shared_bytes.saturating_sub(kernel.static_shared_bytes) as c_int;
            // SAFETY: the function is of the module just loaded.
            result = unsafe { self.api.function_set(kernel.entry, function, attribute, bytes) };
        }
        if let Err(error) = result {
            // SAFETY: loaded above, and nothing has used it.
            if let Err(unload) = unsafe { self.api.module_unload(kernel.entry, module) } {
                log::warn!("{unload}");
            }
            return Err(error);
        }
        log::debug!("{} loaded on {} in {} us", kernel.entry, self.name, start.elapsed().as_micros());
        Ok(Module { module, function })
    }
}

impl Driver for Device {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn context(&self) -> u64 {
        self.context.0.expose_provenance() as u64
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let _current = self.make_current()?;
        let mut ptr = 0;
        // SAFETY: `ptr` is a device pointer.
        unsafe { self.api.allocate(&format!("{bytes} bytes"), &mut ptr, bytes)? };
        Ok(ptr)
    }

    unsafe fn free(&self, ptr: u64) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { self.api.free("device memory", ptr) }
    }

    unsafe fn copy_to_device(&self, dst: u64, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        let _current = self.make_current()?;
        // SAFETY: `src` is a slice; the caller promises room at `dst`.
        unsafe { self.api.copy_to_device("device memory", dst, src.as_ptr().cast(), src.len()) }
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: u64) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        let _current = self.make_current()?;
        // SAFETY: `dst` is a slice; the caller promises as many bytes at `src`.
        unsafe { self.api.copy_to_host("device memory", dst.as_mut_ptr().cast(), src, dst.len()) }
    }

    fn load(&self, kernel: &'static Kernel) -> Result<()> {
        let _current = self.make_current()?;
        self.function(kernel).map(|_| ())
    }

    unsafe fn launch(&self, kernel: &'static Kernel, launch: &Launch, params: &[u8], stream: Stream) -> Result<()> {
        launch.check(kernel, &self.limits, params)?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_PARAMS];
        if kernel.params.len() > MAX_PARAMS {
            let expected = format!("at most {MAX_PARAMS} parameters");
            return Err(Error::value(kernel.entry, expected, kernel.params.len()));
        }
        for (pointer, param) in pointers.iter_mut().zip(kernel.params) {
            // The driver only reads; `check` has seen that the block is as long as the last parameter's end.
            *pointer = params[param.offset..param.offset + param.bytes].as_ptr().cast_mut().cast();
        }
        let [x, y, z] = launch.cluster;
        let mut attributes = [attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE); 2];
        let mut num_attributes = 0;
        if launch.cluster != [1; 3] {
            let cluster = &mut attributes[num_attributes];
            *cluster = attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
            cluster.value.clusterDim.x = x;
            cluster.value.clusterDim.y = y;
            cluster.value.clusterDim.z = z;
            num_attributes += 1;
        }
        if launch.programmatic {
            let programmatic = &mut attributes[num_attributes];
            *programmatic = attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
            programmatic.value.programmaticStreamSerializationAllowed = 1;
            num_attributes += 1;
        }
        let config = CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.dynamic_shared_bytes,
            hStream: stream_handle(stream),
            attrs: attributes.as_mut_ptr(),
            numAttrs: num_attributes as c_uint,
        };
        let _current = self.make_current()?;
        let function = self.function(kernel)?;
        // SAFETY: `config` and its attributes, `pointers` and the block they point into outlive the call; the function is
        // loaded in the current context; what the parameters mean is the caller's promise.
        unsafe { self.api.launch(kernel.entry, &config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: a stream handle is all it takes; an invalid one is an error that the driver reports.
        unsafe { self.api.synchronize("the stream", stream_handle(stream)) }
    }
}

impl Recorder for Device {
    fn create_stream(&self) -> Result<Stream> {
        const NON_BLOCKING: c_uint = 1; // CU_STREAM_NON_BLOCKING
        let _current = self.make_current()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is a stream handle.
        unsafe { self.api.stream_create("a stream", &mut stream, NON_BLOCKING)? };
        Ok(Stream::from_raw(stream.expose_provenance() as u64))
    }

    unsafe fn destroy_stream(&self, stream: Stream) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { self.api.stream_destroy("the stream", stream_handle(stream)) }
    }

    unsafe fn record(&self, stream: Stream, work: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        let handle = stream_handle(stream);
        let _current = self.make_current()?;
        // Calls of this thread that cannot be captured are refused; other threads are left alone.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and this crate's own, the caller's promise.
        unsafe { self.api.capture_begin("the stream", handle, mode)? };
        let worked = work();
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: capture began above; `graph` is a graph handle.
        let ended = unsafe { self.api.capture_end("the stream", handle, &mut graph) };
        let made = worked.and(ended).and_then(|()| {
            // SAFETY: `graph` is the graph just captured, `exec` a handle.
            unsafe { self.api.graph_instantiate("the captured work", &mut exec, graph, 0) }
        });
        if !graph.is_null() {
            // SAFETY: captured above; an executable graph does not need it.
            unsafe { self.api.graph_destroy("the captured work", graph)? };
        }
        made.map(|()| exec.expose_provenance() as u64)
    }

    unsafe fn replay(&self, recording: u64, stream: Stream) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { self.api.graph_launch("the graph", graph_handle(recording), stream_handle(stream)) }
    }

    unsafe fn forget(&self, recording: u64) -> Result<()> {
        let _current = self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { self.api.graph_exec_destroy("the graph", graph_handle(recording)) }
    }
}

/// A point in a stream whose time is taken.
struct Event<'a> {
    device: &'a Device,
    handle: CUevent,
}

impl Event<'_> {
    fn record(&self, stream: Stream) -> Result<()> {
        let _current = self.device.make_current()?;
        // SAFETY: the event is alive; an invalid stream is an error that the driver reports.
        unsafe { self.device.api.event_record("an event", self.handle, stream_handle(stream)) }
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; the driver itself waits for an event that has not happened.
        let destroy = |_| unsafe { self.device.api.event_destroy("an event", self.handle) };
        if let Err(error) = self.device.make_current().and_then(destroy) {
            log::warn!("{error}");
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let modules = std::mem::take(self.modules.get_mut().unwrap_or_else(PoisonError::into_inner));
        if let Ok(_current) = self.make_current() {
            for (entry, module) in modules {
                // SAFETY: loaded by this device and unloaded only here.
                if let Err(error) = unsafe { self.api.module_unload(entry, module.module) } {
                    log::warn!("{error}");
                }
            }
        }
        // SAFETY: retained once in `with_api`, released once here.
        if let Err(error) = unsafe { self.api.context_release(&self.name, self.handle) } {
            log::warn!("{error}");
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({}: {}, sm_{})", self.ordinal, self.name, self.limits.sm)
    }
}

fn stream_handle(stream: Stream) -> CUstream {
    std::ptr::with_exposed_provenance_mut(stream.as_raw() as usize)
}

fn graph_handle(recording: u64) -> CUgraphExec {
    std::ptr::with_exposed_provenance_mut(recording as usize)
}

fn attribute(id: CUlaunchAttributeID) -> CUlaunchAttribute {
    CUlaunchAttribute { id, pad: [0; 4], value: CUlaunchAttributeValue { pad: [0; 64] } }
}
