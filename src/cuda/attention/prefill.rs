//! Attention of many query rows: prompts, appended tokens, encoders.

use super::AttentionArgs;
use super::problem::{Geometry, attention_params};
use crate::cuda::driver::{Driver, Launch, Limits, Stream};
use crate::cuda::kernels::{Kernel, attention_f32, attention_prefill};
use crate::element::Dtype;
use crate::error::{Error, Result};

/// A call of the prefill kernels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PrefillPlan {
    geometry: Geometry,
    kernel: &'static Kernel,
    shared_bytes: u32,
    /// Tiles of query rows per head and sequence.
    num_tiles: u32,
    /// CTAs; 0 if there is nothing to do.
    grid: u32,
}

impl PrefillPlan {
    /// Chooses the kernel: the narrowest for the widths of the heads; of two with the same widths, and so the same bits, the
    /// one with short tiles where no sequence fills a long one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for heads of more than 256 columns, more shared memory than `limits` allow, or more CTAs than a grid
    /// has; [`Error::Stride`] for heads of 16-bit elements that do not begin at multiples of 16 bytes.
    pub fn new(geometry: Geometry, limits: &Limits) -> Result<Self> {
        let (head_dim, value_dim) = (geometry.head_dim, geometry.value_dim);
        if head_dim > 256 || value_dim > 256 {
            return Err(Error::unsupported(
                "cuda",
                format!("prefill with heads of {head_dim} and {value_dim} columns: above 256"),
            ));
        }
        let (kernel, rows, shared_bytes) = if geometry.dtype == Dtype::F32 {
            let fits = |i: &&attention_f32::Instance| i.width >= head_dim.max(value_dim);
            let found = attention_f32::INSTANCES.iter().filter(fits).min_by_key(|i| i.width);
            found.map(|i| (&i.kernel, i.rows, i.shared_bytes))
        } else {
            if let Some((argument, found)) = geometry.unaligned_argument() {
                let expected = "heads that begin at multiples of 16 bytes and are as long (in bytes here)".into();
                let found = found.iter().map(|bytes| *bytes as usize).collect();
                return Err(Error::Stride { argument: argument.into(), expected, found });
            }
            let fits = |i: &&attention_prefill::Instance| {
                i.dtype == geometry.dtype && i.head_dim >= head_dim && i.value_dim >= value_dim
            };
            let narrowest = attention_prefill::INSTANCES.iter().filter(fits).min_by_key(|i| (i.head_dim, i.value_dim));
            let same = |i: &&attention_prefill::Instance| {
                narrowest.is_some_and(|n| (n.head_dim, n.value_dim) == (i.head_dim, i.value_dim))
            };
            let wanted = if geometry.max_q_len <= 64 { 64 } else { 128 };
            let found =
                attention_prefill::INSTANCES.iter().filter(fits).filter(same).min_by_key(|i| i.rows.abs_diff(wanted));
            found.map(|i| (&i.kernel, i.rows, i.shared_bytes))
        }
        .ok_or_else(|| Error::unsupported("cuda", format!("prefill of {}", geometry.dtype)))?;
        let needed = shared_bytes + kernel.static_shared_bytes;
        if needed > limits.shared_bytes {
            let case =
                format!("{}: {needed} bytes of shared memory on a device with {}", kernel.entry, limits.shared_bytes);
            return Err(Error::unsupported("cuda", case));
        }
        let num_tiles = geometry.max_q_len.div_ceil(rows);
        let ctas = u64::from(num_tiles) * u64::from(geometry.num_heads);
        let grid = ctas.checked_mul(u64::from(geometry.num_seqs)).filter(|ctas| *ctas <= i32::MAX as u64);
        let grid = grid.ok_or_else(|| {
            let (heads, seqs) = (geometry.num_heads, geometry.num_seqs);
            Error::unsupported(
                "cuda",
                format!("{num_tiles} tiles of {heads} heads of {seqs} sequences: 2^31 CTAs or more"),
            )
        })?;
        Ok(PrefillPlan { geometry, kernel, shared_bytes, num_tiles, grid: grid as u32 })
    }

    pub fn kernel(&self) -> &'static str {
        self.kernel.entry
    }

    /// # Errors
    /// As [`AttentionPlan::warmup`](super::AttentionPlan::warmup).
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        driver.load(self.kernel)
    }

    /// # Errors
    /// As [`AttentionPlan::launch`](super::AttentionPlan::launch).
    ///
    /// # Safety
    /// As [`AttentionPlan::launch`](super::AttentionPlan::launch).
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &AttentionArgs, stream: Stream) -> Result<()> {
        if self.grid == 0 {
            return Ok(());
        }
        self.geometry.check_args(args)?;
        let mut launch = Launch::grid([self.grid, 1, 1]);
        launch.dynamic_shared_bytes = self.shared_bytes;
        if self.geometry.dtype == Dtype::F32 {
            let params = attention_params!(attention_f32, &self.geometry, args, { num_tiles: self.num_tiles });
            // SAFETY: pointers are not null and aligned, checked above; the kernel stays inside of what the problem describes
            // whatever lengths and pages say; the rest is the caller's promise.
            return unsafe { driver.launch(self.kernel, &launch, &params.to_bytes(), stream) };
        }
        for (name, ptr) in [("q", args.q), ("k", args.k), ("v", args.v), ("out", args.out)] {
            if !ptr.is_multiple_of(16) {
                let expected = "a device pointer that is a multiple of 16";
                return Err(Error::value(name, expected, format_args!("{ptr:#x}")));
            }
        }
        let params = attention_params!(attention_prefill, &self.geometry, args, { num_tiles: self.num_tiles });
        // SAFETY: as above, and all rows begin at multiples of 16 bytes.
        unsafe { driver.launch(self.kernel, &launch, &params.to_bytes(), stream) }
    }
}
