//! The CUDA driver library: found at run time, checked, and called. Beside it only `lent` touches cudarc.
//!
//! cudarc's own loader panics where the library or one of its functions is missing, so its functions are not called:
//! the functions that this crate needs are looked up here, once, and a missing one is an error. cudarc gives the types.
//! Statuses are plain integers, because a newer driver may return one that the bindings do not list.

use std::ffi::{CStr, OsStr, OsString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys as cu;
use libloading::Library;

use crate::error::{Error, Result};

pub(super) use cu::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUfunction_attribute, CUgraph,
    CUgraphExec, CUjit_option, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    CUmodule, CUstream, CUstreamCaptureMode,
};

/// What a driver function returns; 0 is success.
type Status = c_int;

const NO_DEVICE: Status = cu::CUresult::CUDA_ERROR_NO_DEVICE as Status;
const STUB_LIBRARY: Status = cu::CUresult::CUDA_ERROR_STUB_LIBRARY as Status;

/// CUDA 11.8, the first with `cuLaunchKernelEx`.
const MIN_VERSION: c_int = 11_080;

/// Names of the library, in the order in which cudarc looks for them, so that both find the same one.
const LIBRARIES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so", "libcuda.so.1"] };

/// The functions, each with the name of its symbol.
///
/// The `raw` ones are called where a status needs more than to be an error; the `checked` ones get a method that makes
/// any status but 0 an error. The `optional` ones serve tests and benches alone: a driver may lack them until they are called.
macro_rules! functions {
    (
        raw { $($raw:ident: $raw_symbol:literal ($($raw_arg:ident: $raw_type:ty),*);)* }
        checked { $($name:ident: $symbol:literal ($($arg:ident: $type:ty),*);)* }
        optional { $($extra:ident: $extra_symbol:literal ($($extra_arg:ident: $extra_type:ty),*);)* }
    ) => {
        /// The driver library and the functions in it that this crate calls.
        pub(super) struct Api {
            $($raw: unsafe extern "C" fn($($raw_arg: $raw_type),*) -> Status,)*
            $($name: unsafe extern "C" fn($($arg: $type),*) -> Status,)*
            $($extra: Option<unsafe extern "C" fn($($extra_arg: $extra_type),*) -> Status>,)*
            /// As it was looked for.
            name: OsString,
            /// CUDA version that the driver speaks, as 1000 * major + 10 * minor.
            version: c_int,
            /// Keeps the functions mapped.
            _library: Library,
        }

        impl Api {
            /// Looks up every function.
            fn resolve(library: Library, name: OsString, version: c_int) -> Result<Api> {
                // SAFETY: the symbol has this signature in the driver API of every version since MIN_VERSION.
                $(let $raw = unsafe { symbol(&library, &name, $raw_symbol)? };)*
                // SAFETY: as above.
                $(let $name = unsafe { symbol(&library, &name, $symbol)? };)*
                // SAFETY: as above, where there is such a symbol.
                $(let $extra = unsafe { symbol(&library, &name, $extra_symbol) }.ok();)*
                Ok(Api { $($raw,)* $($name,)* $($extra,)* name, version, _library: library })
            }

            $(
                /// The driver function of this name; `about` is what an error message says the call was for.
                ///
                /// # Safety
                /// As the driver API's manual asks: pointers valid for what the function reads and writes, handles alive.
                #[allow(clippy::too_many_arguments)] // the driver's signature
                pub(super) unsafe fn $name(&self, about: &str, $($arg: $type),*) -> Result<()> {
                    // SAFETY: the caller's promise, passed on.
                    let status = unsafe { (self.$name)($($arg),*) };
                    if status == 0 { Ok(()) } else { Err(self.error($symbol, about, status, String::new())) }
                }
            )*

            $(
                /// The driver function of this name, or [`Error::Unsupported`] where the driver has none.
                ///
                /// # Safety
                /// As the driver API's manual asks: pointers valid for what the function reads and writes, handles alive.
                pub(super) unsafe fn $extra(&self, about: &str, $($extra_arg: $extra_type),*) -> Result<()> {
                    let Some(function) = self.$extra else {
                        let case = format!("{} without `{}`", self.name.display(), $extra_symbol.to_string_lossy());
                        return Err(Error::unsupported("cuda", case));
                    };
                    // SAFETY: the caller's promise, passed on.
                    let status = unsafe { function($($extra_arg),*) };
                    if status == 0 { Ok(()) } else { Err(self.error($extra_symbol, about, status, String::new())) }
                }
            )*
        }
    };
}

functions! {
    raw {
        init: c"cuInit"(flags: c_uint);
        module_load: c"cuModuleLoadDataEx"(
            module: *mut CUmodule, image: *const c_void, num_options: c_uint, options: *mut CUjit_option, values: *mut *mut c_void
        );
        error_name: c"cuGetErrorName"(error: Status, text: *mut *const c_char);
        error_string: c"cuGetErrorString"(error: Status, text: *mut *const c_char);
    }
    checked {
        device_count: c"cuDeviceGetCount"(count: *mut c_int);
        device_get: c"cuDeviceGet"(device: *mut CUdevice, ordinal: c_int);
        device_name: c"cuDeviceGetName"(name: *mut c_char, len: c_int, device: CUdevice);
        device_attribute: c"cuDeviceGetAttribute"(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
        device_memory: c"cuDeviceTotalMem_v2"(bytes: *mut usize, device: CUdevice);
        context_retain: c"cuDevicePrimaryCtxRetain"(context: *mut CUcontext, device: CUdevice);
        context_release: c"cuDevicePrimaryCtxRelease_v2"(device: CUdevice);
        context_current: c"cuCtxGetCurrent"(context: *mut CUcontext);
        context_push: c"cuCtxPushCurrent_v2"(context: CUcontext);
        context_pop: c"cuCtxPopCurrent_v2"(context: *mut CUcontext);
        allocate: c"cuMemAlloc_v2"(ptr: *mut CUdeviceptr, bytes: usize);
        free: c"cuMemFree_v2"(ptr: CUdeviceptr);
        copy_to_device: c"cuMemcpyHtoD_v2"(dst: CUdeviceptr, src: *const c_void, bytes: usize);
        copy_to_host: c"cuMemcpyDtoH_v2"(dst: *mut c_void, src: CUdeviceptr, bytes: usize);
        synchronize: c"cuStreamSynchronize"(stream: CUstream);
        module_unload: c"cuModuleUnload"(module: CUmodule);
        module_function: c"cuModuleGetFunction"(function: *mut CUfunction, module: CUmodule, name: *const c_char);
        function_set: c"cuFuncSetAttribute"(function: CUfunction, attribute: CUfunction_attribute, value: c_int);
        launch: c"cuLaunchKernelEx"(
            config: *const CUlaunchConfig, function: CUfunction, params: *mut *mut c_void, extra: *mut *mut c_void
        );
    }
    optional {
        stream_create: c"cuStreamCreate"(stream: *mut CUstream, flags: c_uint);
        stream_destroy: c"cuStreamDestroy_v2"(stream: CUstream);
        capture_begin: c"cuStreamBeginCapture_v2"(stream: CUstream, mode: CUstreamCaptureMode);
        capture_end: c"cuStreamEndCapture"(stream: CUstream, graph: *mut CUgraph);
        graph_instantiate: c"cuGraphInstantiateWithFlags"(exec: *mut CUgraphExec, graph: CUgraph, flags: u64);
        graph_destroy: c"cuGraphDestroy"(graph: CUgraph);
        graph_launch: c"cuGraphLaunch"(exec: CUgraphExec, stream: CUstream);
        graph_exec_destroy: c"cuGraphExecDestroy"(exec: CUgraphExec);
        event_create: c"cuEventCreate"(event: *mut CUevent, flags: c_uint);
        event_record: c"cuEventRecord"(event: CUevent, stream: CUstream);
        event_synchronize: c"cuEventSynchronize"(event: CUevent);
        event_elapsed: c"cuEventElapsedTime"(milliseconds: *mut f32, start: CUevent, end: CUevent);
        event_destroy: c"cuEventDestroy_v2"(event: CUevent);
    }
}

impl Api {
    /// The driver of this machine. Looked for once; the answer is kept.
    pub(super) fn get() -> Result<Arc<Api>> {
        static API: OnceLock<Result<Arc<Api>>> = OnceLock::new();
        API.get_or_init(|| Api::open(LIBRARIES.iter().map(OsStr::new)).map(Arc::new)).clone()
    }

    /// Opens the first library there is, looks up what is needed and starts the driver.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a library, with one that is too old or a stub, or where no device is visible;
    /// [`Error::Driver`] for anything else that `cuInit` may say.
    pub(super) fn open<'a>(names: impl Iterator<Item = &'a OsStr>) -> Result<Api> {
        let mut problems = Vec::new();
        for name in names {
            // SAFETY: loading the driver library runs its initialisers, which it is made for.
            match unsafe { Library::new(name) } {
                Ok(library) => return Api::start(library, name.into()),
                Err(error) => {
                    // The loader's own words, which mostly name the library.
                    let reason = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
                    let named = reason.contains(&*name.to_string_lossy());
                    problems.push(if named { reason } else { format!("{}: {reason}", name.display()) });
                }
            }
        }
        let expected = "the NVIDIA driver's library".into();
        Err(no_device(expected, format!("none ({})", problems.join("; "))))
    }

    fn start(library: Library, name: OsString) -> Result<Api> {
        // SAFETY: the symbol has this signature in every version of the driver API.
        let version_of: unsafe extern "C" fn(*mut c_int) -> Status =
            unsafe { symbol(&library, &name, c"cuDriverGetVersion")? };
        let mut version = 0;
        // SAFETY: `version` is a c_int; the function may be called before `cuInit`.
        let status = unsafe { version_of(&mut version) };
        if status == STUB_LIBRARY {
            return Err(stub(&name));
        }
        if status != 0 || version < MIN_VERSION {
            let expected = format!("a driver for CUDA {} or newer", version_text(MIN_VERSION));
            return Err(no_device(expected, format!("{} for CUDA {}", name.display(), version_text(version))));
        }
        let api = Api::resolve(library, name, version)?;
        // SAFETY: flags must be 0, and are.
        match unsafe { (api.init)(0) } {
            0 => {}
            NO_DEVICE => return Err(none_visible()),
            STUB_LIBRARY => return Err(stub(&api.name)),
            status => return Err(api.error(c"cuInit", &api.name.to_string_lossy(), status, String::new())),
        }
        if api.count()? == 0 {
            return Err(none_visible());
        }
        log::debug!("{} speaks CUDA {}", api.name.display(), version_text(version));
        Ok(api)
    }

    /// CUDA version of the driver: (12, 8).
    pub(super) fn version(&self) -> (u32, u32) {
        (self.version as u32 / 1000, self.version as u32 % 1000 / 10)
    }

    /// Visible devices.
    pub(super) fn count(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: `count` is a c_int.
        unsafe { self.device_count("the device count", &mut count)? };
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// An attribute of a device.
    pub(super) fn attribute(&self, device: CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
        let mut value = 0;
        // SAFETY: `value` is a c_int.
        unsafe { self.device_attribute("the device", &mut value, attribute, device)? };
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Loads a module from PTX; what the compiler has to say comes back with the error, or goes to the log.
    pub(super) fn load_ptx(&self, entry: &str, ptx: &CStr) -> Result<CUmodule> {
        const LOG_BYTES: usize = 16 << 10;
        let mut info = vec![0_u8; LOG_BYTES];
        let mut errors = vec![0_u8; LOG_BYTES];
        // Pointer-sized words, whatever the option: a size stands in the pointer itself.
        let mut options = [
            (CUjit_option::CU_JIT_INFO_LOG_BUFFER, info.as_mut_ptr().cast::<c_void>()),
            (CUjit_option::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES, std::ptr::without_provenance_mut(LOG_BYTES)),
            (CUjit_option::CU_JIT_ERROR_LOG_BUFFER, errors.as_mut_ptr().cast::<c_void>()),
            (CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, std::ptr::without_provenance_mut(LOG_BYTES)),
            (CUjit_option::CU_JIT_LOG_VERBOSE, std::ptr::without_provenance_mut(1)),
        ];
        let mut names = options.map(|(name, _)| name);
        let mut values = options.each_mut().map(|(_, value)| *value);
        let mut module = std::ptr::null_mut();
        // SAFETY: `ptx` ends in NUL; `names` and `values` have the count given, and the buffers the sizes given.
        let status = unsafe {
            (self.module_load)(
                &mut module,
                ptx.as_ptr().cast(),
                names.len() as c_uint,
                names.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        if status != 0 {
            return Err(self.error(c"cuModuleLoadDataEx", entry, status, text_of(&errors)));
        }
        for line in text_of(&info).lines() {
            log::trace!("{entry}: {line}");
        }
        Ok(module)
    }

    fn error(&self, call: &CStr, about: &str, status: Status, log: String) -> Error {
        let text = |function: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = std::ptr::null();
            // SAFETY: `text` is a pointer; the driver sets it to a string of its own that is never freed, or to null.
            let status = unsafe { function(status, &mut text) };
            // SAFETY: checked for null; the driver's strings end in NUL.
            (status == 0 && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = text(self.error_name).unwrap_or_else(|| "an unknown error".into());
        let reason = text(self.error_string).map_or(String::new(), |reason| format!(": {reason}"));
        Error::Driver {
            call: call.to_string_lossy().into_owned(),
            argument: about.into(),
            found: format!("{name} ({status}){reason}"),
            log,
        }
    }
}

fn version_text(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Text of a log buffer that the driver has filled.
fn text_of(buffer: &[u8]) -> String {
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..end]).trim().into()
}

fn no_device(expected: String, found: String) -> Error {
    Error::NoDevice { device: "CUDA".into(), expected, found }
}

/// Looks up one function.
///
/// # Safety
/// `F` is a function pointer of the symbol's signature.
unsafe fn symbol<F: Copy>(library: &Library, name: &OsStr, symbol: &CStr) -> Result<F> {
    // SAFETY: the caller's promise.
    match unsafe { library.get::<F>(symbol.to_bytes_with_nul()) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(no_device(
            format!("a driver for CUDA {} or newer", version_text(MIN_VERSION)),
            format!("{} without `{}`", name.display(), symbol.to_string_lossy()),
        )),
    }
}

fn stub(name: &OsStr) -> Error {
    let found = format!("{}, the stub library of a toolkit", name.display());
    no_device("the NVIDIA driver's library".into(), found)
}

/// The driver runs but shows no device; the variable that can hide them is named where it is set.
fn none_visible() -> Error {
    let found = match std::env::var_os("CUDA_VISIBLE_DEVICES") {
        None => "none".into(),
        Some(list) if list.is_empty() => "none: `CUDA_VISIBLE_DEVICES` is empty, which hides every device".into(),
        Some(list) => format!("none with `CUDA_VISIBLE_DEVICES={}`", list.display()),
    };
    no_device("at least one visible device".into(), found)
}
