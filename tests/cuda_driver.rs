//! How the CUDA backend behaves with drivers and devices that the test machine does not have: against a driver library
//! made for the purpose (`tests/fake_driver`), so without a GPU. Needs a C compiler, else the tests print SKIPPED.
#![cfg(all(feature = "cuda", unix))]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use gatefold::cuda::driver::{Buffer, Driver, Launch, Recorder};
use gatefold::cuda::kernels::{self, Kernel};
use gatefold::cuda::{
    Device, ElementwiseArgs, ElementwiseOp, ElementwisePlan, ElementwiseProblem, NormArgs, NormPlan, NormProblem,
    Queue, Stream,
};
use gatefold::spec::Norm;
use gatefold::{Dtype, Error};

#[path = "common/skip.rs"]
mod skip;
use skip::skipped;

#[path = "common/allocations.rs"]
mod allocations;
use allocations::ALLOCATIONS;

/// Builds the driver with these definitions; `None`, said aloud, where there is no C compiler.
fn driver(name: &str, definitions: &[&str]) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libfake_{name}.so"));
    // Written beside it and renamed, so that a second run of the tests never sees half a library.
    let scratch = path.with_extension(format!("{}.tmp", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_driver/driver.c");
    let mut compiler = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&scratch).arg(source);
    for definition in definitions {
        compiler.arg(format!("-D{definition}"));
    }
    match compiler.output() {
        Ok(output) if output.status.success() => {
            std::fs::rename(&scratch, &path).unwrap();
            Some(path)
        }
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            skipped(format_args!("no C compiler for the fake driver ({error})"));
            None
        }
    }
}

/// What opening device `ordinal` of such a driver says. The library's path is written as LIBRARY.
fn message(name: &str, definitions: &[&str], ordinal: usize) -> Option<String> {
    let path = driver(name, definitions)?;
    let error = Device::open_with(&path, ordinal).expect_err("this driver must not work");
    Some(error.to_string().replace(&path.display().to_string(), "LIBRARY"))
}

/// `message` must be this one, on one line.
fn assert_message(found: Option<String>, expected: &str) {
    if let Some(found) = found {
        assert_eq!(found, expected);
        assert!(!found.contains('\n'));
    }
}

#[test]
fn no_library() {
    let error = Device::open_with(Path::new("/nowhere/libcuda.so.1"), 0).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NoDevice { .. }), "{text}");
    let found = "found none (/nowhere/libcuda.so.1: ";
    assert!(text.starts_with(&format!("no CUDA device: expected the NVIDIA driver's library, {found}")), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn library_without_functions() {
    let found = driver("none", &["cuDriverGetVersion=something_else", "ONLY_VERSION"]);
    let Some(path) = found else { return };
    let text = Device::open_with(&path, 0).unwrap_err().to_string();
    assert!(text.contains("expected a driver for CUDA 11.8 or newer"), "{text}");
    assert!(text.contains("without `cuDriverGetVersion`"), "{text}");
    assert_message(
        message("only_version", &["ONLY_VERSION"], 0),
        "no CUDA device: expected a driver for CUDA 11.8 or newer, found LIBRARY without `cuInit`",
    );
    assert_message(
        message("no_launch", &["NO_LAUNCH"], 0),
        "no CUDA device: expected a driver for CUDA 11.8 or newer, found LIBRARY without `cuLaunchKernelEx`",
    );
}

#[test]
fn old_driver() {
    assert_message(
        message("old", &["VERSION=11040"], 0),
        "no CUDA device: expected a driver for CUDA 11.8 or newer, found LIBRARY for CUDA 11.4",
    );
}

#[test]
fn stub_library() {
    assert_message(
        message("stub", &["STUB"], 0),
        "no CUDA device: expected the NVIDIA driver's library, found LIBRARY, the stub library of a toolkit",
    );
}

#[test]
fn driver_that_does_not_start() {
    assert_message(
        message("sick", &["INIT=999"], 0),
        "`cuInit` failed for LIBRARY: expected success, found CUDA_ERROR_UNKNOWN (999): the fake driver says no",
    );
    // A status that no list has yet.
    assert_message(
        message("unlisted", &["INIT=4321"], 0),
        "`cuInit` failed for LIBRARY: expected success, found an unknown error (4321)",
    );
}

#[test]
fn ordinal_out_of_range() {
    assert_message(message("two", &["COUNT=2"], 2), "`ordinal` is 2, expected a device number below 2");
}

#[test]
fn device_too_old() {
    assert_message(
        message("sm_75", &["SM=75"], 0),
        "no CUDA device: expected compute capability 8.0 or newer, found Fake GPU with 7.5",
    );
}

/// The message depends on the environment, which is set for a process of its own: this test, run again.
#[test]
fn no_visible_device() {
    const LIBRARY: &str = "GATEFOLD_TEST_FAKE_DRIVER";
    if let Some(path) = env::var_os(LIBRARY) {
        println!("MESSAGE {}", Device::open_with(Path::new(&path), 0).unwrap_err());
        return;
    }
    for (name, definition) in [("init_none", "INIT=100"), ("count_none", "COUNT=0")] {
        let Some(path) = driver(name, &[definition]) else { return };
        for (visible, expected) in [
            (None, "none"),
            (Some(""), "none: `CUDA_VISIBLE_DEVICES` is empty, which hides every device"),
            (Some("-1"), "none with `CUDA_VISIBLE_DEVICES=-1`"),
        ] {
            let mut child = Command::new(env::current_exe().unwrap());
            child.args(["--exact", "no_visible_device", "--nocapture"]).env(LIBRARY, &path);
            match visible {
                Some(list) => child.env("CUDA_VISIBLE_DEVICES", list),
                None => child.env_remove("CUDA_VISIBLE_DEVICES"),
            };
            let output = child.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let message = text.lines().find_map(|line| line.split_once("MESSAGE ")).map(|(_, message)| message);
            let expected = format!("no CUDA device: expected at least one visible device, found {expected}");
            assert_eq!(message, Some(expected.as_str()), "{name}, {visible:?}: {text}");
        }
    }
}

/// The driver of this machine, whatever it is: an answer or a typed error, never a panic.
#[test]
fn this_machine() {
    match Device::count() {
        Ok(count) => {
            assert!(count > 0);
            let error = Device::open(count).unwrap_err();
            assert!(matches!(error, Error::Value { .. }), "{error}");
        }
        Err(error) => {
            assert!(matches!(error, Error::NoDevice { .. } | Error::Driver { .. }), "{error}");
            assert_eq!(Device::open(0).unwrap_err(), error, "the same answer every time");
        }
    }
}

#[test]
fn shared_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<Device>();
    check::<ElementwisePlan>();
    check::<gatefold::cuda::NormPlan>();
    check::<Stream>();
    check::<Queue<'_>>();
    check::<gatefold::cuda::DeviceView<'_, f32, 2>>();
    check::<gatefold::cuda::DeviceViewMut<'_, f32, 2>>();
}

/// What the driver has alive: allocations, modules, retained contexts; the depth of the thread's context stack; whether
/// somebody else's context is current.
fn state(library: &libloading::Library) -> [i32; 5] {
    let mut state = [0; 5];
    // SAFETY: `fake_state` writes five ints.
    unsafe {
        library.get::<unsafe extern "C" fn(*mut i32)>(c"fake_state".to_bytes_with_nul()).unwrap()(state.as_mut_ptr())
    };
    state
}

const BROKEN: Kernel = Kernel {
    entry: "gatefold_broken",
    ptx: ".version 7.0\nbroken",
    version: (7, 0),
    sm: 80,
    exact: false,
    threads: 32,
    params: &[],
    static_shared_bytes: 0,
    dynamic_shared: false,
};
static BROKEN_KERNEL: Kernel = BROKEN;
static UNNAMED: Kernel = Kernel { entry: "gatefold_unnamed", ptx: ".version 7.0\n", ..BROKEN };
static DYNAMIC: Kernel =
    Kernel { entry: "gatefold_dynamic", ptx: ".version gatefold_dynamic", dynamic_shared: true, ..BROKEN };
static SM_90A: Kernel =
    Kernel { entry: "gatefold_sm_90a", ptx: ".version gatefold_sm_90a", sm: 90, exact: true, ..BROKEN };

#[test]
fn load() {
    let Some(path) = driver("load", &["SM=120"]) else { return };
    let device = Device::open_with(&path, 1).unwrap();
    assert_eq!((device.ordinal(), device.name(), device.driver_version()), (1, "Fake GPU", (12, 4)));
    assert_eq!(format!("{device:?}"), "Device(1: Fake GPU, sm_120)");

    let error = device.load(&BROKEN_KERNEL).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`cuModuleLoadDataEx` failed for gatefold_broken: expected success, found CUDA_ERROR_INVALID_PTX (218): \
         the fake driver says no\nptxas fake, line 7; error : broken on purpose"
    );
    let error = device.load(&SM_90A).unwrap_err().to_string();
    assert_eq!(error, "unsupported by cuda: gatefold_sm_90a needs exactly sm_90, Fake GPU is sm_120");
    let error = device.load(&UNNAMED).unwrap_err().to_string();
    assert_eq!(
        error,
        "`cuModuleGetFunction` failed for gatefold_unnamed: expected success, found an unknown error (500)"
    );
    device.load(&DYNAMIC).unwrap();

    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(&path).unwrap() };
    assert_eq!(state(&library), [0, 1, 1, 0, 0], "what failed to load is not kept");
    for kernel in kernels::ALL {
        device.load(kernel).unwrap();
        device.load(kernel).unwrap();
    }
    assert_eq!(state(&library), [0, 1 + kernels::ALL.len() as i32, 1, 0, 0]);
    let error = device.allocate(usize::MAX >> 1).unwrap_err();
    assert!(
        matches!(&error, Error::Driver { found, .. } if found.starts_with("CUDA_ERROR_OUT_OF_MEMORY (2)")),
        "{error}"
    );
    drop(device);
    assert_eq!(state(&library), [0, 0, 0, 0, 0]);
}

#[test]
fn launch() {
    let Some(path) = driver("launch", &[]) else { return };
    let device = Device::open_with(&path, 0).unwrap();
    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(&path).unwrap() };
    // SAFETY: takes and returns nothing.
    unsafe { library.get::<unsafe extern "C" fn()>(c"fake_foreign_context".to_bytes_with_nul()).unwrap()() };
    assert_eq!(state(&library), [0, 0, 1, 0, 1]);

    let plan = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::F32, 3, 1024)).unwrap();
    let memory = Buffer::from_slice(&device, &[0_f32; 3 * 3 * 1024]).unwrap();
    let part = |i: u64| memory.ptr() + i * 3 * 1024 * 4;
    plan.warmup(&device).unwrap();
    let record = |stream: Stream| memory.to_vec::<u32>(stream).unwrap()[2 * 3 * 1024..][..14].to_vec();
    let args = ElementwiseArgs::new(part(0), part(1), part(2));
    // SAFETY: `memory` holds three matrices of the plan's shape.
    unsafe { plan.launch(&device, &args, Stream::from_raw(2)).unwrap() };
    let words = record(Stream::from_raw(2));
    assert_eq!(words, [3, 2, 1, 128, 1, 1, 0, 2, 1, 1, 1, 0, part(0) as u32, 1024]);

    // Attributes
    let kernel = kernels::ALL.iter().find(|kernel| kernel.entry == plan.kernel()).unwrap();
    let params = kernels::elementwise::Params {
        x_ptr: part(1),
        y_ptr: part(0),
        out_ptr: part(2),
        x_stride_bytes: 0,
        y_stride_bytes: 0,
        out_stride_bytes: 0,
        width: 7,
        op: 2,
        multiplier: 0.0,
    };
    let mut cluster = Launch::grid([4, 6, 1]);
    cluster.cluster = [2, 3, 1];
    cluster.programmatic = true;
    // SAFETY: the fake driver writes 14 words to `out_ptr`.
    unsafe { device.launch(kernel, &cluster, &params.to_bytes(), Stream::LEGACY).unwrap() };
    let words = record(Stream::LEGACY);
    assert_eq!(words, [4, 6, 1, 128, 1, 1, 0, 0, 2, 3, 1, 1, part(1) as u32, 7]);

    // The kernel with the most parameters: pointers wherever there is room for one.
    let largest = kernels::ALL.iter().max_by_key(|kernel| kernel.params.len()).unwrap();
    let mut pointers = vec![0; largest.param_bytes()];
    for param in largest.params.iter().filter(|param| param.bytes == 8) {
        pointers[param.offset..][..8].copy_from_slice(&part(2).to_le_bytes());
    }
    // SAFETY: the fake driver writes 14 words to the third parameter.
    unsafe { device.launch(largest, &Launch::grid([5, 1, 1]), &pointers, Stream::LEGACY).unwrap() };
    assert_eq!(record(Stream::LEGACY)[..4], [5, 1, 1, largest.threads]);

    // What no device takes
    let refused = |launch: &Launch, params: &[u8]| {
        // SAFETY: refused before anything is launched.
        unsafe { device.launch(kernel, launch, params, Stream::LEGACY) }.unwrap_err().to_string()
    };
    let entry = kernel.entry;
    assert_eq!(
        refused(&Launch::grid([1, 65536, 1]), &params.to_bytes()),
        format!("`grid of {entry}` is [1, 65536, 1], expected 1 to [2147483647, 65535, 65535] CTAs")
    );
    assert_eq!(
        refused(&Launch::grid([1, 1, 1]), &[0; 59]),
        format!("`parameters of {entry}` is 59 bytes, expected 60 bytes")
    );
    cluster.grid = [4, 5, 1];
    assert_eq!(
        refused(&cluster, &params.to_bytes()),
        format!("`cluster of {entry}` is [2, 3, 1], expected a divisor of the grid [4, 5, 1]")
    );
    let mut shared = Launch::grid([1; 3]);
    shared.dynamic_shared_bytes = 4;
    assert_eq!(
        refused(&shared, &params.to_bytes()),
        format!("`shared memory of {entry}` is 4, 4 of it dynamic, expected at most 232448 bytes, none of it dynamic")
    );

    // Many threads, one device
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let out = Buffer::new(&device, 3 * 1024 * 4).unwrap();
                for _ in 0..100 {
                    let args = ElementwiseArgs::new(part(0), part(1), out.ptr());
                    // SAFETY: `out` is this thread's own, with the plan's shape.
                    unsafe { plan.launch(&device, &args, Stream::LEGACY).unwrap() };
                }
                assert_eq!(out.to_vec::<u32>(Stream::LEGACY).unwrap()[..3], [3, 2, 1]);
            });
        }
    });
    drop(memory);
    drop(device);
    assert_eq!(state(&library), [0, 0, 0, 0, 1], "all given back, and the other library's context is current again");
}

/// A launch can be captured into a graph: once the kernels are loaded it allocates nothing, on the host or the device.
#[test]
fn launch_does_not_allocate() {
    let Some(path) = driver("allocate", &[]) else { return };
    let device = Device::open_with(&path, 0).unwrap();
    let memory = Buffer::from_slice(&device, &[0_f32; 5 * 64]).unwrap();
    let part = |i: u64| memory.ptr() + i * 64 * 4;
    let silu = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::F32, 1, 64)).unwrap();
    let norm = NormPlan::new(&NormProblem::new(Norm::rms(1e-6), Dtype::F32, 1, 64)).unwrap();
    silu.warmup(&device).unwrap();
    norm.warmup(&device).unwrap();
    let silu_args = ElementwiseArgs::new(part(0), part(1), part(2));
    let norm_args = NormArgs::new(part(0), part(1)).with_weight(part(2)).with_residual(part(3), part(4));
    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(&path).unwrap() };
    let alive = state(&library);
    let before = ALLOCATIONS.get();
    for _ in 0..10 {
        // SAFETY: `memory` holds five rows of the plans' shape.
        unsafe {
            silu.launch(&device, &silu_args, Stream::LEGACY).unwrap();
            norm.launch(&device, &norm_args, Stream::LEGACY).unwrap();
        }
    }
    assert_eq!(ALLOCATIONS.get(), before);
    assert_eq!(state(&library), alive);
}

/// Streams, graphs and events that the driver has alive.
fn handles(library: &libloading::Library) -> i32 {
    // SAFETY: takes nothing, returns an int.
    unsafe { library.get::<unsafe extern "C" fn() -> i32>(c"fake_handles".to_bytes_with_nul()).unwrap()() }
}

/// One row of three of which a launch writes the third: how often and on which stream it ran.
struct Row<'a> {
    memory: Buffer<'a>,
    plan: ElementwisePlan,
}

impl<'a> Row<'a> {
    fn new(device: &'a dyn Driver) -> Self {
        let plan = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::F32, 1, 64)).unwrap();
        Row { memory: Buffer::from_slice(device, &[0_f32; 3 * 64]).unwrap(), plan }
    }

    fn launch(&self, device: &dyn Driver, stream: Stream) -> gatefold::Result<()> {
        let part = |i: u64| self.memory.ptr() + i * 64 * 4;
        // SAFETY: `memory` holds three rows of the plan's shape.
        unsafe { self.plan.launch(device, &ElementwiseArgs::new(part(0), part(1), part(2)), stream) }
    }

    /// The stream of the last launch; 0 before the first, as for the default stream.
    fn stream(&self) -> u32 {
        self.memory.to_vec::<u32>(Stream::LEGACY).unwrap()[2 * 64 + 7]
    }
}

#[test]
fn recording() {
    let Some(path) = driver("recording", &[]) else { return };
    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(&path).unwrap() };
    let device = Device::open_with(&path, 0).unwrap();
    let row = Row::new(&device);
    let stream = device.create_stream().unwrap();
    // Nothing can be loaded while work is recorded: that is what `warmup` is for.
    // SAFETY: the stream is this test's own.
    let error = unsafe { device.record(stream, &mut || row.launch(&device, stream)) }.unwrap_err();
    assert!(error.to_string().contains("`cuModuleLoadDataEx` failed"), "{error}");
    assert_eq!(handles(&library), 1, "the stream alone is left");
    row.plan.warmup(&device).unwrap();
    for (what, call) in [("cuMemAlloc_v2", 0), ("cuStreamSynchronize", 1), ("cuMemcpyDtoH_v2", 2)] {
        let mut work = || match call {
            0 => Buffer::new(&device, 8).map(|_| ()),
            1 => device.synchronize(stream),
            // SAFETY: `memory` holds four bytes.
            _ => unsafe { device.copy_to_host(&mut [0; 4], row.memory.ptr()) },
        };
        // SAFETY: the stream is this test's own.
        let error = unsafe { device.record(stream, &mut work) }.unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("STREAM_CAPTURE_UNSUPPORTED"), "{error}");
    }
    // SAFETY: the stream is this test's own; `row` outlives the recording.
    unsafe {
        let recording = device.record(stream, &mut || row.launch(&device, stream)).unwrap();
        assert_eq!(row.stream(), 0, "recorded, not run");
        device.replay(recording, Stream::LEGACY).unwrap();
        assert_eq!(row.stream(), stream.as_raw() as u32);
        device.forget(recording).unwrap();
        let time = device.time_us(stream, || row.launch(&device, stream)).unwrap();
        assert_eq!(time, 125.0);
        device.destroy_stream(stream).unwrap();
    }
    assert_eq!(handles(&library), 0);
}

/// A driver without what only tests and benches need still runs everything else.
#[test]
fn driver_without_graphs() {
    let Some(path) = driver("no_graphs", &["NO_GRAPHS"]) else { return };
    let device = Device::open_with(&path, 0).unwrap();
    let row = Row::new(&device);
    row.launch(&device, Stream::from_raw(2)).unwrap();
    assert_eq!(row.stream(), 2);
    let text = device.create_stream().unwrap_err().to_string().replace(&path.display().to_string(), "LIBRARY");
    assert_eq!(text, "unsupported by cuda: LIBRARY without `cuStreamCreate`");
    // SAFETY: the default stream belongs to every device.
    let text = unsafe { device.time_us(Stream::LEGACY, || Ok(())) }.unwrap_err().to_string();
    assert!(text.ends_with("without `cuEventCreate`"), "{text}");
}

/// Two devices in one thread, each with modules and memory of its own, beside the context of another library; several streams
/// on one module; what belongs to one device is not taken by the other.
#[test]
fn several_devices_and_streams() {
    let Some(path) = driver("several", &[]) else { return };
    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(&path).unwrap() };
    // SAFETY: takes and returns nothing.
    unsafe { library.get::<unsafe extern "C" fn()>(c"fake_foreign_context".to_bytes_with_nul()).unwrap()() };
    let devices = [0, 1].map(|ordinal| Device::open_with(&path, ordinal).unwrap());
    let rows = devices.each_ref().map(|device| Row::new(device));
    let streams = devices.each_ref().map(|device| [(); 3].map(|()| device.create_stream().unwrap()));
    for i in 0..3 {
        for (d, device) in devices.iter().enumerate() {
            rows[d].launch(device, streams[d][i]).unwrap();
            assert_eq!(rows[d].stream(), streams[d][i].as_raw() as u32);
        }
    }
    assert_eq!(state(&library)[1], 2, "one module per device, whatever the number of streams");
    let error = rows[0].launch(&devices[0], streams[1][0]).unwrap_err().to_string();
    assert!(error.contains("INVALID_HANDLE"), "a stream of another device: {error}");
    // SAFETY: refused before anything is freed.
    let error = unsafe { devices[0].free(rows[1].memory.ptr()) }.unwrap_err().to_string();
    assert!(error.contains("`cuMemFree_v2` failed"), "memory of another device: {error}");
    // From a thread in which no context was ever current.
    std::thread::scope(|scope| {
        for (d, device) in devices.iter().enumerate() {
            let (row, stream) = (&rows[d], streams[d][2]);
            scope.spawn(move || row.launch(device, stream).unwrap());
        }
    });
    for (device, streams) in devices.iter().zip(streams) {
        // SAFETY: created above, used no more.
        streams.iter().for_each(|stream| unsafe { device.destroy_stream(*stream).unwrap() });
    }
    assert_eq!(state(&library), [2, 2, 2, 0, 1]);
    assert_eq!(handles(&library), 0);
}

/// Whatever goes first: plans belong to no device, two handles of one device share its context but nothing else.
#[test]
fn any_drop_order() {
    let Some(path) = driver("drops", &[]) else { return };
    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(&path).unwrap() };
    let plan = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::F32, 1, 64)).unwrap();
    let (first, second) = (Device::open_with(&path, 0).unwrap(), Device::open_with(&path, 0).unwrap());
    plan.warmup(&first).unwrap();
    plan.warmup(&second).unwrap();
    assert_eq!(state(&library), [0, 4, 2, 0, 0], "two kernels each: for aligned rows and for others");
    drop(first);
    assert_eq!(state(&library), [0, 2, 1, 0, 0]);
    let (old, new) = (Row::new(&second), Row::new(&second));
    let mut queue = Queue::new(&second);
    queue.reserve(1000).unwrap();
    drop(old);
    new.launch(&second, Stream::LEGACY).unwrap();
    assert_eq!(state(&library), [2, 2, 1, 0, 0]);
    drop(queue);
    drop(new);
    drop(second);
    assert_eq!(state(&library), [0; 5]);
    // On another thread than the one that opened it.
    let moved = Device::open_with(&path, 1).unwrap();
    plan.warmup(&moved).unwrap();
    std::thread::spawn(move || drop(moved)).join().unwrap();
    assert_eq!(state(&library), [0; 5]);
    plan.warmup(&Device::open_with(&path, 1).unwrap()).unwrap();
    assert_eq!(state(&library), [0; 5]);
}

/// Arrays of cudarc in safe calls: the stream of the call waits for what was written before, later work waits for the call, and
/// other queues refuse them. cudarc finds its driver by name, so it runs in a process of its own: this test, run again.
#[test]
fn arrays_of_cudarc() {
    const INSIDE: &str = "GATEFOLD_TEST_CUDARC";
    let Some(library) = env::var_os(INSIDE) else {
        let Some(path) = driver("cudarc", &[]) else { return };
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cudarc-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let library = folder.join("libcuda.so");
        std::fs::copy(path, &library).unwrap();
        let mut child = Command::new(env::current_exe().unwrap());
        child
            .args(["--exact", "arrays_of_cudarc", "--nocapture"])
            .env(INSIDE, &library)
            .env("LD_LIBRARY_PATH", &folder);
        let output = child.output().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("CUDARC DONE"), "{text}");
        return;
    };
    use gatefold::cuda::{Lent, LentMut};
    // SAFETY: loading the fake driver again runs nothing.
    let library = unsafe { libloading::Library::new(library).unwrap() };
    let order = || {
        // SAFETY: gives a string that ends in NUL and lives as long as the library.
        let text = unsafe {
            std::ffi::CStr::from_ptr(library
                .get::<unsafe extern "C" fn() -> *const std::ffi::c_char>(c"fake_order".to_bytes_with_nul())
                .unwrap()())
        };
        text.to_str().unwrap().to_owned()
    };
    let device = Device::open(0).unwrap();
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let x = first.clone_htod(&[1.0_f32; 64]).unwrap();
    let mut y = first.alloc_zeros::<f32>(64).unwrap();
    let queue = Queue::on_cudarc(&device, &second).unwrap();
    let plan = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::F32, 1, 64)).unwrap();
    let before = order().len();
    {
        let (x, mut y) = (Lent::new(&x, &second).unwrap(), LentMut::new(&mut y, &second).unwrap());
        let (gate, out) = (x.view([1, 64]), y.view([1, 64]));
        assert_eq!((gate.len(), gate.shape(), out.strides()), (64, [1, 64], [64, 1]));
        let args = ElementwiseArgs::new(gate.ptr(), gate.ptr(), out.ptr());
        // SAFETY: both arrays hold a row of the plan's shape.
        unsafe { plan.launch(queue.driver(), &args, queue.stream()).unwrap() };
    }
    assert_eq!(order()[before..], *"wwwlrr", "three waits, the launch, and a note for each array");
    assert_eq!(second.clone_dtoh(&y).unwrap()[4].to_bits(), 1, "what the fake driver writes down");
    {
        let (x, mut y) = (Lent::new(&x, &second).unwrap(), LentMut::new(&mut y, &second).unwrap());
        let mut other = Queue::new(&device);
        let (x, out) = (x.view([1, 64]), y.view([1, 64]));
        let error = gatefold::cuda::add(&mut other, x, x, 1.0, out).unwrap_err().to_string();
        assert!(error.starts_with("`queue` is stream 0x0, expected stream 0x"), "{error}");
    }
    let other = cudarc::driver::CudaContext::new(1).unwrap();
    let stranger = other.new_stream().unwrap();
    assert!(Lent::new(&x, &stranger).is_err());
    assert!(Queue::on_cudarc(&device, &stranger).is_err());
    queue.synchronize().unwrap();
    println!("CUDARC DONE");
}

#[test]
fn bad_pointers() {
    let Some(path) = driver("pointers", &[]) else { return };
    let device = Device::open_with(&path, 0).unwrap();
    let plan = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::BF16, 2, 16)).unwrap();
    let message = |gate, up, out| {
        // SAFETY: refused before anything is launched.
        unsafe { plan.launch(&device, &ElementwiseArgs::new(gate, up, out), Stream::LEGACY) }.unwrap_err().to_string()
    };
    assert_eq!(message(0, 0x1000, 0x2000), "`gate` is 0x0, expected a device pointer that is a multiple of 2");
    assert_eq!(message(0x1000, 0x2001, 0x3000), "`up` is 0x2001, expected a device pointer that is a multiple of 2");
    assert_eq!(message(0x1000, 0x2000, 0x2010), "`out` overlaps `up`, expected separate memory");
    // No tokens: nothing to check, nothing to launch.
    let none = ElementwisePlan::new(&ElementwiseProblem::new(ElementwiseOp::SiluMul, Dtype::BF16, 0, 16)).unwrap();
    // SAFETY: nothing is launched.
    unsafe { none.launch(&device, &ElementwiseArgs::new(0, 0, 0), Stream::LEGACY).unwrap() };
}
