//! Time on a GPU: between two events, with a cold L2 cache, and with the host ahead of the device.

use gatefold::Result;
use gatefold::cuda::driver::Buffer;
use gatefold::cuda::{Device, NormArgs, NormPlan, NormProblem, Stream};
use gatefold::{Dtype, spec::Norm};
use std::time::Duration;

/// Larger than five L2 caches of an H200, as rows of a norm.
const FLUSH: [usize; 2] = [8192, 16384];

/// Before the work there runs a kernel that fills the L2 cache with something else; launches are queued meanwhile, so their cost
/// on the host is hidden as far as it is smaller than that.
pub struct ColdClock {
    device: &'static Device,
    other: Buffer<'static>,
    flush: NormPlan,
}

impl ColdClock {
    pub fn new(device: &'static Device) -> Result<Self> {
        let other = Buffer::from_slice(device, &vec![half::bf16::ONE; FLUSH[0] * FLUSH[1]])?;
        let flush = NormPlan::new(&NormProblem::new(Norm::rms(1e-6), Dtype::BF16, FLUSH[0], FLUSH[1]))?;
        flush.warmup(device)?;
        Ok(ColdClock { device, other, flush })
    }

    /// Time of what `work` queues on a stream.
    pub fn time(&self, stream: Stream, work: impl FnMut() -> Result<()>) -> Result<Duration> {
        let args = NormArgs::new(self.other.ptr(), self.other.ptr());
        // SAFETY: `other` holds the rows of the plan, and only this uses it, on one stream at a time: `time_us` waits.
        unsafe { self.flush.launch(self.device, &args, stream)? };
        // SAFETY: the caller's stream is one of the device's, as all its launches are.
        let us = unsafe { self.device.time_us(stream, work)? };
        Ok(Duration::from_secs_f64(us / 1e6))
    }
}
