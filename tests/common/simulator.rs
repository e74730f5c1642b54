//! The PTX simulator as a `Driver`: plans and launches of the GPU backend run here as they do on a GPU, and whatever a
//! kernel does wrong (memory, races, barriers) fails the test with kernel, line and thread.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gatefold::cuda::Stream;
use gatefold::cuda::driver::{Driver, Launch, Limits, Recorder};
use gatefold::cuda::kernels::Kernel;
use gatefold::{Error, Result};

/// A simulated device.
pub struct Simulator {
    /// Approximate instructions err at random within their bounds; else they are rounded correctly.
    approx_errors: bool,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sim: simt::Sim,
    modules: HashMap<&'static str, simt::Module>,
    /// Seed of the next launch: a new order of warps each time.
    seed: u64,
    /// What every launch counted, in order.
    counters: Vec<(&'static str, simt::Counters)>,
    /// The stream that is being recorded, and what was launched on it so far.
    recording: Option<(Stream, Vec<Recorded>)>,
    recordings: HashMap<u64, Vec<Recorded>>,
    /// Streams and recordings made.
    num_handles: u64,
}

/// A launch, as a CUDA graph keeps it: with the parameters it was recorded with.
#[derive(Clone)]
struct Recorded {
    kernel: &'static Kernel,
    launch: Launch,
    params: Vec<u8>,
}

impl State {
    /// What cannot be recorded fails while something is.
    fn not_recording(&self, call: &str) -> Result<()> {
        if self.recording.is_some() { Err(refused(call, "a stream that is recorded", "no launch")) } else { Ok(()) }
    }
}

impl Simulator {
    /// A device with empty memory. With `approx_errors` a kernel's bits change from launch to launch, as far as its
    /// approximate instructions reach.
    pub fn new(approx_errors: bool) -> Self {
        Simulator::with_limits(approx_errors, Limits::new(90, 132, 227 << 10))
    }

    /// [`Simulator::new`] with the limits of another device.
    pub fn with_limits(approx_errors: bool, limits: Limits) -> Self {
        let state = State { seed: super::seed(), ..State::default() };
        Simulator { approx_errors, limits, state: Mutex::new(state) }
    }

    /// Takes what the launches since the last call counted: entry and counters, in order.
    pub fn take_counters(&self) -> Vec<(&'static str, simt::Counters)> {
        std::mem::take(&mut self.state().counters)
    }

    /// The state, also after a test has failed while it held it: buffers are still dropped.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(call: &str, argument: &str, found: impl std::fmt::Display) -> Error {
    Error::Driver { call: call.into(), argument: argument.into(), found: found.to_string(), log: String::new() }
}

impl Driver for Simulator {
    /// Those of an H200, if no others were given.
    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        state.not_recording("allocate")?;
        Ok(state.sim.alloc(bytes as u64))
    }

    unsafe fn free(&self, ptr: u64) -> Result<()> {
        let freed = self.state().sim.free(ptr);
        if freed { Ok(()) } else { Err(refused("free", &format!("{ptr:#x}"), "no allocation")) }
    }

    unsafe fn copy_to_device(&self, dst: u64, src: &[u8]) -> Result<()> {
        let mut state = self.state();
        state.not_recording("copy_to_device")?;
        state.sim.write(dst, src);
        Ok(())
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: u64) -> Result<()> {
        let state = self.state();
        state.not_recording("copy_to_host")?;
        dst.copy_from_slice(&state.sim.read::<u8>(src, dst.len()));
        Ok(())
    }

    fn load(&self, kernel: &'static Kernel) -> Result<()> {
        let mut state = self.state();
        if !state.modules.contains_key(kernel.entry) {
            state.not_recording("load")?;
            let file = format!("{}.ptx", kernel.entry);
            let module = simt::Module::parse(&file, kernel.ptx).map_err(|e| refused("parse", kernel.entry, e))?;
            state.modules.insert(kernel.entry, module);
        }
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static Kernel, launch: &Launch, params: &[u8], stream: Stream) -> Result<()> {
        launch.check(kernel, &self.limits(), params)?;
        self.load(kernel)?;
        let mut state = self.state();
        let state = &mut *state;
        if let Some((recorded, launches)) = &mut state.recording {
            assert_eq!(*recorded, stream, "a launch on another stream than the recorded one");
            launches.push(Recorded { kernel, launch: *launch, params: params.to_vec() });
            return Ok(());
        }
        state.seed += 1;
        let mut run = simt::Launch::new(launch.grid, [kernel.threads, 1, 1])
            .cluster(launch.cluster)
            .smem(launch.dynamic_shared_bytes)
            .seed(state.seed);
        run.approx_errors = self.approx_errors;
        run.args = kernel.params.iter().map(|p| simt::Arg(params[p.offset..p.offset + p.bytes].to_vec())).collect();
        let report = state.sim.launch(&state.modules[kernel.entry], kernel.entry, &run);
        let report = report.map_err(|e| refused("launch", kernel.entry, e))?;
        report.assert_clean();
        state.counters.push((kernel.entry, report.counters));
        Ok(())
    }

    fn synchronize(&self, _stream: Stream) -> Result<()> {
        self.state().not_recording("synchronize")
    }
}

/// The test double of a captured graph: launches are kept with their parameters and run again on what memory holds then.
impl Recorder for Simulator {
    fn create_stream(&self) -> Result<Stream> {
        let mut state = self.state();
        state.num_handles += 1;
        Ok(Stream::from_raw(0x1000 + state.num_handles))
    }

    unsafe fn destroy_stream(&self, _stream: Stream) -> Result<()> {
        Ok(())
    }

    unsafe fn record(&self, stream: Stream, work: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        self.state().recording = Some((stream, Vec::new()));
        let worked = work();
        let mut state = self.state();
        let launches = state.recording.take().map_or_else(Vec::new, |(_, launches)| launches);
        worked?;
        state.num_handles += 1;
        let recording = state.num_handles;
        state.recordings.insert(recording, launches);
        Ok(recording)
    }

    unsafe fn replay(&self, recording: u64, stream: Stream) -> Result<()> {
        let launches = self.state().recordings[&recording].clone();
        for Recorded { kernel, launch, params } in launches {
            // SAFETY: the caller's promise, passed on.
            unsafe { self.launch(kernel, &launch, &params, stream)? };
        }
        Ok(())
    }

    unsafe fn forget(&self, recording: u64) -> Result<()> {
        let forgotten = self.state().recordings.remove(&recording).is_some();
        if forgotten { Ok(()) } else { Err(refused("forget", "recording", recording)) }
    }
}
