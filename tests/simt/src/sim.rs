//! The device as a test sees it: memory, modules, launches.

use std::collections::HashMap;

use crate::clock::Tag;
use crate::decode::{self, ModuleVar};
use crate::finding::{Finding, Mode, Report};
use crate::global::Global;
use crate::model::approx::Approx;
use crate::model::mma::{Arch, Numerics, Scratch};
use crate::model::tensor_map::TensorMap;
use crate::op::Kernel;
use crate::ptx::{PtxError, parse};
use crate::sched;
use crate::state::{Config, Cx, Rng, Site};
use crate::window;

/// A plain value that buffers hold.
pub trait Element: Copy {
    /// Bytes of one value.
    const BYTES: usize;
    /// Appends the value, little-endian.
    fn put(self, out: &mut Vec<u8>);
    /// The value in `bytes`, which has [`Self::BYTES`] of them.
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! elements {
    ($($t:ty),*) => {$(
        impl Element for $t {
            const BYTES: usize = size_of::<$t>();
            fn put(self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
            fn get(bytes: &[u8]) -> Self {
                <$t>::from_le_bytes(bytes.try_into().expect("as many bytes as the type has"))
            }
        }
    )*};
}
elements!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, half::f16, half::bf16);

/// A parsed and decoded PTX file.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Kernel>,
    vars: Vec<ModuleVar>,
}

impl Module {
    /// Parses and decodes `text`; `file` names it in messages.
    ///
    /// # Errors
    /// Whatever is not understood, with its line.
    pub fn parse(file: &str, text: &str) -> Result<Module, PtxError> {
        let ast = parse::parse(file, text)?;
        let (kernels, vars) = decode::decode(file, text, &ast)?;
        Ok(Module { kernels, vars })
    }

    /// Names of the kernels.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.kernels.iter().map(|k| k.name.as_str())
    }

    /// Names and sizes of the parameters of a kernel.
    pub fn params(&self, entry: &str) -> Option<Vec<(&str, usize)>> {
        let kernel = self.kernels.iter().find(|k| k.name == entry)?;
        Some(kernel.params.iter().map(|p| (p.name.as_str(), p.bytes as usize)).collect())
    }
}

/// A kernel argument: the bytes of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Arg(pub Vec<u8>);

impl<T: Element> From<T> for Arg {
    fn from(value: T) -> Arg {
        let mut bytes = vec![];
        value.put(&mut bytes);
        Arg(bytes)
    }
}

impl From<&TensorMap> for Arg {
    fn from(map: &TensorMap) -> Arg {
        Arg(map.to_bytes().to_vec())
    }
}

/// How to launch a kernel. Start from [`Launch::new`] and change what differs.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads per block.
    pub block: [u32; 3],
    /// Blocks per cluster.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub smem: u32,
    /// Arguments in order.
    pub args: Vec<Arg>,
    /// Everything random follows from it.
    pub seed: u64,
    /// How lanes run.
    pub mode: Mode,
    /// Sums of the tensor cores; by default those of the module's target, bit for bit.
    pub numerics: Option<Numerics>,
    /// Approximate functions err at random within their bounds; `false` rounds them correctly.
    pub approx_errors: bool,
    /// Steps after which the run is given up.
    pub max_steps: u64,
    /// Clusters in flight at a time.
    pub resident: usize,
}

impl Launch {
    /// One cluster is one block, no dynamic shared memory, no arguments, seed 0.
    pub fn new(grid: [u32; 3], block: [u32; 3]) -> Launch {
        Launch {
            grid,
            block,
            cluster: [1; 3],
            smem: 0,
            args: vec![],
            seed: 0,
            mode: Mode::LockStep,
            numerics: None,
            approx_errors: true,
            max_steps: 1 << 28,
            resident: 3,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<Arg>) -> Launch {
        self.args.push(arg.into());
        self
    }

    /// Sets the bytes of dynamic shared memory.
    #[must_use]
    pub fn smem(mut self, bytes: u32) -> Launch {
        self.smem = bytes;
        self
    }

    /// Sets the cluster shape.
    #[must_use]
    pub fn cluster(mut self, cluster: [u32; 3]) -> Launch {
        self.cluster = cluster;
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Launch {
        self.seed = seed;
        self
    }

    /// Sets the mode.
    #[must_use]
    pub fn mode(mut self, mode: Mode) -> Launch {
        self.mode = mode;
        self
    }

    /// Sets the numerics.
    #[must_use]
    pub fn numerics(mut self, numerics: Numerics) -> Launch {
        self.numerics = Some(numerics);
        self
    }
}

/// A launch that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchError(pub String);

impl std::fmt::Display for LaunchError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LaunchError {}

/// A simulated device.
#[derive(Debug, Default)]
pub struct Sim {
    global: Global,
}

impl Sim {
    /// A device with empty memory.
    pub fn new() -> Sim {
        Sim::default()
    }

    /// A buffer of `bytes` bytes that count as uninitialised; terabytes cost nothing until they are touched. Its address.
    pub fn alloc(&mut self, bytes: u64) -> u64 {
        self.global.alloc(bytes)
    }

    /// A buffer with these values. Its address.
    pub fn upload<T: Element>(&mut self, values: &[T]) -> u64 {
        let address = self.alloc((values.len() * T::BYTES) as u64);
        self.write(address, values);
        address
    }

    /// Writes values at an address.
    ///
    /// # Panics
    /// If they do not fit the buffer.
    #[track_caller]
    pub fn write<T: Element>(&mut self, address: u64, values: &[T]) {
        let mut bytes = Vec::with_capacity(values.len() * T::BYTES);
        for v in values {
            v.put(&mut bytes);
        }
        assert!(self.global.host_write(address, &bytes), "a write of {} bytes at {address:#x}", bytes.len());
    }

    /// Reads `len` values at an address; bytes that nothing wrote read as 0.
    ///
    /// # Panics
    /// If they lie outside of the buffer.
    #[track_caller]
    pub fn read<T: Element>(&self, address: u64, len: usize) -> Vec<T> {
        let mut bytes = vec![0; len * T::BYTES];
        assert!(
            self.global.host_read(address, &mut bytes).is_some(),
            "a read of {} bytes at {address:#x}",
            bytes.len()
        );
        bytes.chunks_exact(T::BYTES).map(T::get).collect()
    }

    /// How many of these bytes neither host nor kernel wrote; `None` if they lie outside of the buffer.
    pub fn unwritten(&self, address: u64, bytes: usize) -> Option<u64> {
        self.global.host_read(address, &mut vec![0; bytes])
    }

    /// Bytes from `address` to the end of its buffer.
    pub fn len_at(&self, address: u64) -> Option<u64> {
        self.global.len(address)
    }

    /// Frees the buffer that begins at `address`; later accesses to it are out of bounds. False if there is none.
    pub fn free(&mut self, address: u64) -> bool {
        self.global.free(address)
    }

    /// Runs a kernel.
    ///
    /// # Errors
    /// [`LaunchError`] if there is no such entry, or arguments, shapes and directives do not fit. What is wrong with the kernel
    /// itself is in the report.
    pub fn launch(&mut self, module: &Module, entry: &str, launch: &Launch) -> Result<Report, LaunchError> {
        let kernel = module
            .kernels
            .iter()
            .find(|k| k.name == entry)
            .ok_or_else(|| LaunchError(format!("no entry `{entry}`")))?;
        let params = check(kernel, launch)?;
        self.global.reset_module(module.vars.last().map_or(0, |v| v.address + v.bytes - window::MODULE_VARS));
        for var in &module.vars {
            // Variables without an initialiser are zero (PTX ISA 5.4.4).
            let mut bytes = var.init.clone();
            bytes.resize(var.bytes as usize, 0);
            self.global.host_write(var.address, &bytes);
        }
        let arch = match kernel.source.arch {
            100.. => Arch::Blackwell,
            90.. => Arch::Hopper,
            89 => Arch::Ada,
            _ => Arch::Ampere,
        };
        let config = Config {
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            dynamic_smem: launch.smem,
            seed: launch.seed,
            mode: launch.mode,
            numerics: launch.numerics.unwrap_or(Numerics::Exact(arch)),
            max_steps: launch.max_steps,
            resident: launch.resident,
        };
        let mut cx = Cx {
            kernel,
            config: &config,
            global: &mut self.global,
            params: &params,
            rng: Rng(launch.seed),
            counters: crate::counters::Counters::default(),
            found: vec![],
            dead: false,
            approx: Approx { seed: launch.approx_errors.then_some(launch.seed) },
            steps: 0,
            counted: false,
            scratch: Scratch::default(),
            tiles: Default::default(),
            shared_pool: vec![],
            released: HashMap::new(),
        };
        check_limits(&mut cx);
        if !cx.dead {
            sched::run(&mut cx);
        }
        let report = Report {
            kernel: entry.into(),
            seed: launch.seed,
            mode: launch.mode,
            findings: cx.found,
            counters: cx.counters,
            steps: cx.steps,
        };
        self.global.settle();
        Ok(report)
    }
}

/// Checks shapes and arguments; the parameter block.
fn check(kernel: &Kernel, launch: &Launch) -> Result<Vec<u8>, LaunchError> {
    let fail = |text: String| Err(LaunchError(format!("{}: {text}", kernel.name)));
    let threads: u64 = launch.block.iter().map(|n| u64::from(*n)).product();
    let ctas: u64 = launch.cluster.iter().map(|n| u64::from(*n)).product();
    if !(1..=1024).contains(&threads) {
        return fail(format!("{threads} threads per block, 1 to 1024 are possible"));
    }
    if launch.grid.contains(&0) || launch.grid.iter().map(|n| u64::from(*n)).product::<u64>() >= 1 << 31 {
        return fail(format!("a grid of {:?}", launch.grid));
    }
    if !(1..=16).contains(&ctas) || (0..3).any(|i| !launch.grid[i].is_multiple_of(launch.cluster[i])) {
        return fail(format!("clusters of {:?} blocks in a grid of {:?}", launch.cluster, launch.grid));
    }
    // What the clocks of happens-before can tell apart, with room for mbarriers.
    let parties = ctas * threads.div_ceil(32) * if kernel.uses.wgmma || kernel.uses.bulk { 4 } else { 2 };
    if parties + 256 > Tag::MAX_COMPONENTS as u64 {
        return fail(format!(
            "a cluster of {} warps is more than the simulator can follow",
            ctas * threads.div_ceil(32)
        ));
    }
    if kernel.reqntid.is_some_and(|r| r != launch.block) {
        return fail(format!("block {:?}, `.reqntid` asks for {:?}", launch.block, kernel.reqntid.unwrap_or_default()));
    }
    if kernel.maxntid.is_some_and(|m| m.iter().map(|n| u64::from(*n)).product::<u64>() < threads) {
        return fail(format!("{threads} threads, more than `.maxntid`"));
    }
    if kernel.reqcluster.is_some_and(|r| r != launch.cluster) {
        return fail(format!("cluster {:?} is not that of `.reqnctapercluster`", launch.cluster));
    }
    if kernel.params.len() != launch.args.len() {
        return fail(format!("{} arguments for {} parameters", launch.args.len(), kernel.params.len()));
    }
    let mut params = vec![0; kernel.param_bytes as usize];
    for (i, (p, arg)) in kernel.params.iter().zip(&launch.args).enumerate() {
        if arg.0.len() != p.bytes as usize {
            return fail(format!("argument {i} has {} bytes, parameter `{}` has {}", arg.0.len(), p.name, p.bytes));
        }
        params[p.offset as usize..(p.offset + p.bytes) as usize].copy_from_slice(&arg.0);
    }
    Ok(params)
}

/// Registers of an SM.
pub(crate) const REGISTERS: u32 = 65_536;

/// Resources that the driver would refuse.
fn check_limits(cx: &mut Cx<'_>) {
    let site = Site { block: [0; 3], warp: 0, pc: 0 };
    let smem = cx.kernel.static_smem + cx.config.dynamic_smem;
    // CUDA C++ programming guide, technical specifications: shared memory per block with opt-in
    let limit = match cx.kernel.source.arch {
        90..=119 => 227 << 10,
        86 | 89 | 120.. => 99 << 10,
        _ => 163 << 10,
    };
    if smem > limit {
        let values = format!("{smem} bytes of shared memory, a block can have {limit}");
        cx.report(site, None, Finding::SharedSizeExceeded, values);
    }
    let threads: u32 = cx.config.block.iter().product();
    if let Some(regs) = cx.kernel.maxnreg
        && regs * threads.next_multiple_of(32) > REGISTERS
    {
        let values = format!("{threads} threads with {regs} registers, an SM has {REGISTERS}");
        cx.report(site, None, Finding::RegistersExceeded, values);
    }
}

/// The seeds of a test: `0..count`, or the one in the environment variable `SIMT_SEED`.
pub fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let one = std::env::var("SIMT_SEED").ok().and_then(|s| s.parse().ok());
    let range = one.map_or(0..count, |s: u64| s..s + 1);
    range.into_iter()
}
