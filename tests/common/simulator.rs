//! The PTX simulator as a `Driver`: plans and launches of the GPU backend run here as they do on a GPU, and whatever a
//! kernel does wrong (memory, races, barriers) fails the test with kernel, line and thread.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gatefold::cuda::Stream;
use gatefold::cuda::driver::{Driver, Launch, Limits};
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
        Ok(self.state().sim.alloc(bytes as u64))
    }

    unsafe fn free(&self, ptr: u64) -> Result<()> {
        let freed = self.state().sim.free(ptr);
        if freed { Ok(()) } else { Err(refused("free", &format!("{ptr:#x}"), "no allocation")) }
    }

    unsafe fn copy_to_device(&self, dst: u64, src: &[u8]) -> Result<()> {
        self.state().sim.write(dst, src);
        Ok(())
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: u64) -> Result<()> {
        dst.copy_from_slice(&self.state().sim.read::<u8>(src, dst.len()));
        Ok(())
    }

    fn load(&self, kernel: &'static Kernel) -> Result<()> {
        let mut state = self.state();
        if !state.modules.contains_key(kernel.entry) {
            let file = format!("{}.ptx", kernel.entry);
            let module = simt::Module::parse(&file, kernel.ptx).map_err(|e| refused("parse", kernel.entry, e))?;
            state.modules.insert(kernel.entry, module);
        }
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static Kernel, launch: &Launch, params: &[u8], _stream: Stream) -> Result<()> {
        launch.check(kernel, &self.limits(), params)?;
        self.load(kernel)?;
        let mut state = self.state();
        let state = &mut *state;
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
        Ok(())
    }
}
