//! What a case is, arrays on the device, and the clock.

use crate::support::array::Array;
use crate::support::clock::ColdClock;
use crate::support::folder::Folder;
use crate::support::measure::near;
use crate::support::random::Maker;
use gatefold::cuda::driver::Buffer;
use gatefold::cuda::{Device, DeviceView, DeviceViewMut, Stream};
use gatefold::spec::{HfConfig, Layer, Mlp, Moe};
use gatefold::{Dtype, Element, Result};

/// A call on prepared arrays.
pub trait Job {
    /// Queues it on the legacy default stream.
    fn call(&mut self) -> Result<()>;
    /// Calls, waits, and tells the seconds.
    fn seconds(&mut self, timer: &Timer) -> std::result::Result<f64, String> {
        let time = timer.0.time(Stream::LEGACY, || self.call());
        time.map(|time| time.as_secs_f64()).map_err(|error| error.to_string())
    }
    /// Calls, then compares sampled rows with the reference.
    fn check(&mut self) -> std::result::Result<(), String>;
    /// Inputs, and the answer of the last call as `out`.
    fn write(&mut self, folder: &mut Folder) -> std::io::Result<()>;
    /// What must be moved at least.
    fn bytes(&self) -> f64;
}

/// A line of the table.
pub struct Case {
    /// `group/model or shape/size/type`.
    pub name: String,
    /// What the peers do with it (`peers.py`).
    pub kind: &'static str,
    pub dtype: Dtype,
    /// A multiply-add counts as two; 0 where arithmetic does not matter.
    pub flops: f64,
    pub make: Box<dyn Fn(&'static Device) -> Result<Box<dyn Job>>>,
}

/// An array on the device and on the host.
pub struct Twin<T> {
    pub host: Array<T>,
    buffer: Buffer<'static>,
}

impl<T: bytemuck::Pod> Twin<T> {
    pub fn new(device: &'static Device, host: Array<T>) -> Result<Self> {
        Ok(Twin { buffer: Buffer::from_slice(device, &host.data)?, host })
    }

    pub fn zeros(device: &'static Device, shape: &[usize]) -> Result<Self> {
        Twin::new(device, Array::new(vec![T::zeroed(); shape.iter().product()], shape))
    }

    /// With `N` dimensions; a part of them may be joined or left out as long as the number of elements is the same.
    pub fn view<const N: usize>(&self, shape: [usize; N]) -> DeviceView<'_, T, N> {
        let mut strides = [1; N];
        for i in (1..N).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        // SAFETY: the buffer was made with the length of `host`, and is borrowed for as long as the view lives.
        unsafe { DeviceView::from_raw(self.buffer.ptr(), self.host.data.len(), shape, strides) }
    }

    pub fn view_mut<const N: usize>(&mut self, shape: [usize; N]) -> DeviceViewMut<'_, T, N> {
        let view = self.view(shape);
        let (ptr, strides) = (view.ptr(), view.strides());
        // SAFETY: as in `view`, borrowed mutably.
        unsafe { DeviceViewMut::from_raw(ptr, self.host.data.len(), shape, strides) }
    }

    /// Waits, and brings what the device has.
    pub fn fetch(&mut self) -> Result<&Array<T>> {
        self.host.data = self.buffer.to_vec(Stream::LEGACY)?;
        Ok(&self.host)
    }
}

/// Times calls with a cold L2 cache.
pub struct Timer(ColdClock);

impl Timer {
    pub fn new(device: &'static Device) -> Result<Timer> {
        ColdClock::new(device).map(Timer)
    }

    /// Seconds of each of so many calls.
    pub fn seconds(&self, job: &mut dyn Job, calls: usize) -> std::result::Result<Vec<f64>, String> {
        (0..calls).map(|_| job.seconds(self)).collect()
    }
}

/// A model of `tests/configs`.
fn config(model: &str) -> HfConfig {
    let path = format!("{}/tests/configs/{model}.json", env!("CARGO_MANIFEST_DIR"));
    // A bench that was carried to another machine finds them where it is started.
    let text =
        std::fs::read_to_string(&path).or_else(|_| std::fs::read_to_string(format!("tests/configs/{model}.json")));
    let text = text.unwrap_or_else(|e| panic!("{path}: {e}"));
    HfConfig::from_json(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The mixture of a model's first layer that is one.
pub fn mixture(model: &str) -> Moe {
    let config = config(model);
    let layer = |number| -> Option<Layer> { config.layer(number).ok() };
    let moe = (0..config.num_layers).find_map(|number| match layer(number)?.mlp {
        Mlp::Moe(moe) => Some(*moe),
        _ => None,
    });
    moe.unwrap_or_else(|| panic!("{model} has no mixture"))
}

/// Random numbers with mean 0; the same ones for a seed, whatever the type.
pub fn random<T: Element>(seed: u64, shape: &[usize], deviation: f64) -> Array<T> {
    Maker::new(seed, &|_| ()).array(shape, deviation)
}

/// The first, the middle and the last.
pub fn samples(rows: usize) -> Vec<usize> {
    let mut samples = vec![0, rows / 2, rows - 1];
    samples.dedup();
    samples
}

/// What the reference says of sampled rows, set against ours.
pub fn compare<T: Element>(got: &Array<T>, rows: &[usize], truth: &Array<f64>) -> std::result::Result<(), String> {
    let got = got.clone().flat(got.shape[0]).pick(rows);
    near(&got, &truth.clone().flat(rows.len()))
}
