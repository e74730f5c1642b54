//! Runs the micro-kernels of `tests/forms` on the first NVIDIA GPU and records their outputs. See `vectors/README.md`.

#[path = "../tests/forms/mod.rs"]
mod forms;

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::process::ExitCode;

use cudarc::driver::sys;
use forms::record::Line;
use forms::{Base, Form};
use simt::model::smem::Swizzle;
use simt::model::tensor_map::{ElementType, TensorMap};

/// A driver call that failed.
fn check(what: &str, result: sys::CUresult) -> Result<(), String> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: `name` outlives the call; the driver stores a pointer to a static string, or null for an unknown code.
    let text = unsafe {
        sys::cuGetErrorName(result, &mut name);
        if name.is_null() { "unknown error".into() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
    };
    Err(format!("{what}: {text}"))
}

/// The device, its context current on this thread.
struct Device {
    name: String,
    compute: (i32, i32),
    driver: i32,
}

impl Device {
    fn open() -> Result<Device, String> {
        let attribute = |device, which| {
            let mut value: c_int = 0;
            // SAFETY: `value` is a place for one integer, `device` a handle that `cuDeviceGet` returned.
            check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })
                .map(|()| value)
        };
        let mut device: sys::CUdevice = 0;
        let mut context: sys::CUcontext = std::ptr::null_mut();
        let mut name = [0 as c_char; 256];
        let mut driver: c_int = 0;
        // SAFETY: every pointer is to a local of the type that the call fills; `name` has the length that is passed, the last byte of which stays 0.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, 0))?;
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int - 1, device))?;
            check("cuDriverGetVersion", sys::cuDriverGetVersion(&mut driver))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
        }
        use sys::CUdevice_attribute_enum as A;
        let major = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        // SAFETY: the array is zero-terminated, see above.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Device { name, compute: (major, minor), driver })
    }

    fn runs(&self, target: &str) -> bool {
        match target {
            "sm_90a" => self.compute == (9, 0),
            _ => target[3..].parse::<i32>().is_ok_and(|t| t <= self.compute.0 * 10 + self.compute.1),
        }
    }
}

/// Device memory, freed when dropped.
struct Buffer(sys::CUdeviceptr, usize);

impl Buffer {
    fn new(words: &[u64]) -> Result<Buffer, String> {
        let bytes = size_of_val(words).max(8);
        let mut address: sys::CUdeviceptr = 0;
        // SAFETY: `address` is a place for one pointer.
        check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut address, bytes) })?;
        let buffer = Buffer(address, words.len());
        // SAFETY: source and destination have `size_of_val(words)` bytes.
        check("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoD_v2(address, words.as_ptr().cast(), size_of_val(words)) })?;
        Ok(buffer)
    }
    fn read(&self) -> Result<Vec<u64>, String> {
        let mut words = vec![0u64; self.1];
        // SAFETY: source and destination have `8 * self.1` bytes.
        check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), self.0, 8 * self.1) })?;
        Ok(words)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the address came from `cuMemAlloc` and is freed once.
        let _ = unsafe { sys::cuMemFree_v2(self.0) };
    }
}

/// Assembles and runs one form.
fn run(form: &Form) -> Result<Vec<u64>, String> {
    let text = CString::new(form.ptx()).map_err(|e| e.to_string())?;
    let entry = CString::new(form.name.as_str()).map_err(|e| e.to_string())?;
    let mut log = vec![0u8; 8192];
    use sys::CUjit_option_enum as J;
    let mut options = [J::CU_JIT_ERROR_LOG_BUFFER, J::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), log.len() as *mut c_void];
    let mut module: sys::CUmodule = std::ptr::null_mut();
    // SAFETY: `text` is zero-terminated; two options with two values, of which the first is a buffer of the length that the second gives.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    check("cuModuleLoadDataEx", loaded).map_err(|e| {
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        format!("{e}: {}", String::from_utf8_lossy(&log[..end]))
    })?;
    let result = launch(form, module, &entry);
    // SAFETY: the module was loaded above, and its kernel has finished: `launch` reads the result back.
    let _ = unsafe { sys::cuModuleUnload(module) };
    result
}

/// The driver's form of a tensor map whose addresses count from `base`.
fn encode(map: &TensorMap, base: u64) -> Result<sys::CUtensorMap, String> {
    use sys::{
        CUtensorMapDataType_enum as T, CUtensorMapFloatOOBfill_enum as F, CUtensorMapInterleave_enum as I,
        CUtensorMapL2promotion_enum as P, CUtensorMapSwizzle_enum as S,
    };
    if map.element != ElementType::U32 {
        return Err("only u32 tensors are recorded".into());
    }
    let swizzle = match map.swizzle {
        Swizzle::None => S::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::B32 => S::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::B64 => S::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::B128 => S::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    // SAFETY: a plain structure of integers, for which zeros are a value.
    let mut out: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    // SAFETY: all arrays have one entry per dimension (strides one less), as `TensorMap::dense` makes them; `out` is a place for one map.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut out,
            T::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            map.rank() as u32,
            (base + map.address) as *mut c_void,
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.box_dims.as_ptr(),
            map.element_strides.as_ptr(),
            I::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            P::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            F::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", result).map(|()| out)
}

fn launch(form: &Form, module: sys::CUmodule, entry: &CStr) -> Result<Vec<u64>, String> {
    let mut function: sys::CUfunction = std::ptr::null_mut();
    // SAFETY: `module` is loaded, `entry` zero-terminated.
    check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut function, module, entry.as_ptr()) })?;
    let input = Buffer::new(&form.input_slots())?;
    let output = Buffer::new(&vec![0; form.output_len()])?;
    let scratch = Buffer::new(&vec![0; 512 * form.blocks as usize])?;
    let mut addresses = [input.0, output.0, scratch.0];
    let [a, b, c] = &mut addresses;
    let mut arguments: Vec<*mut c_void> = [a, b, c].map(|x| (x as *mut u64).cast()).to_vec();
    let mut encoded = match &form.map {
        Some((map, Base::Input)) => Some(encode(map, input.0)?),
        Some((map, Base::Scratch)) => Some(encode(map, scratch.0)?),
        None => None,
    };
    if let Some(map) = &mut encoded {
        arguments.push((map as *mut sys::CUtensorMap).cast());
    }
    let (blocks, threads): (c_uint, c_uint) = (form.blocks, form.threads);
    // SAFETY: every form takes three 64-bit addresses and, where it has one, a tensor map; the buffers have the sizes that its text uses; the cluster shape is in the text.
    unsafe {
        let stream = std::ptr::null_mut();
        check(
            "cuLaunchKernel",
            sys::cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            ),
        )?;
        check("cuCtxSynchronize", sys::cuCtxSynchronize())?;
    }
    output.read()
}

fn record() -> Result<(), String> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    // cudarc panics where there is no driver
    // SAFETY: loading the driver library runs only its initialisers.
    let probe = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"]
        .iter()
        .any(|name| unsafe { libloading::Library::new(*name) }.is_ok());
    if !probe {
        return Err("no NVIDIA driver here".into());
    }
    let device = Device::open()?;
    println!("{}, compute capability {}.{}, driver {}", device.name, device.compute.0, device.compute.1, device.driver);
    let mut text = format!(
        "device {}\ncompute {}.{}\ndriver {}\n",
        device.name, device.compute.0, device.compute.1, device.driver
    );
    let (mut recorded, mut differ, mut failed, mut left_out) = (0, 0, 0, 0);
    for form in forms::all() {
        if !form.name.starts_with(&filter) {
            continue;
        }
        if !device.runs(form.target) {
            left_out += 1;
            continue;
        }
        match run(&form) {
            Ok(outputs) => {
                recorded += 1;
                text += &Line::new(&form, &outputs).text();
                text += "\n";
                if let Err(e) = form.check(&outputs) {
                    differ += 1;
                    println!("not as expected: {e}");
                }
            }
            Err(e) => {
                failed += 1;
                println!("failed: {}: {e}", form.name);
                if e.contains("ILLEGAL") || e.contains("MISALIGNED") || e.contains("LAUNCH_FAILED") {
                    return Err("the context is lost; the forms so far are not recorded".into());
                }
            }
        }
    }
    println!("{recorded} forms ran, {differ} not as expected, {failed} failed, {left_out} need another device");
    if filter.is_empty() {
        let slug: String =
            device.name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
        let path = format!("{}/vectors/{slug}_driver_{}.txt", env!("CARGO_MANIFEST_DIR"), device.driver);
        std::fs::write(&path, text).map_err(|e| format!("{path}: {e}"))?;
        println!("{path}");
    }
    Ok(())
}

fn main() -> ExitCode {
    match record() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
