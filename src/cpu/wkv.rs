//! RWKV-4's `wkv`: a recurrence over tokens, channels side by side in vectors.

use super::rows::{RowKernel, SharedView, for_rows};
use super::simd::Simd;
use super::workspace::part_bytes;
use super::{Cpu, Float, math};
use crate::Result;
use crate::args::{WkvInput, WkvOutput};
use std::ops::Range;

/// Channels that an item takes: a cache line of the narrowest type, and two vectors of the widest.
const CHANNELS: usize = 32;

/// RWKV-4's weighted average of the values so far. Per batch row and channel, with `w = -exp(decay)` and the state
/// `(num, den, max)`, for each token:
///
/// ```text
/// m   = max(max, k + first)
/// out = (e^(max - m) num + e^(k + first - m) v) / (e^(max - m) den + e^(k + first - m))
/// m   = max(max + w, k)
/// num = e^(max + w - m) num + e^(k - m) v,  den = e^(max + w - m) den + e^(k - m),  max = m
/// ```
///
/// * `k`, `v`, `out`: `[batch, seq, channels]`; `decay`, `first`: `[channels]`
/// * `state_in`, `state_out`: `[3, batch, channels]`; the state starts as `(0, 0, -1e38)`
///
/// All in f32, one rounding to `T` at the end. No sequence and no channel is a legal call; without tokens `state_out` is the state
/// that there was.
///
/// # Errors
/// Those of [`WkvInput::check`]. Nothing is written then.
///
/// Peng et al. 2023, arXiv:2305.13048.
pub fn wkv<T: Float>(cpu: &mut Cpu, input: &WkvInput<'_, T>, mut output: WkvOutput<'_, T>) -> Result<()> {
    let [batch, seq, channels] = input.check(&output)?;
    if seq == 0 && output.state_out.is_none() {
        return Ok(());
    }
    let mut carver = cpu.workspace.carve(wkv_workspace_bytes(channels));
    let fade = carver.part::<f32>(channels);
    for (fade, decay) in fade.iter_mut().zip(input.decay) {
        *fade = -f64::from(*decay).exp() as f32;
    }
    let blocks = channels.div_ceil(CHANNELS);
    let kernel = Blocks {
        input,
        fade,
        out: SharedView::new(&mut output.out),
        state_out: output.state_out.as_mut().map(SharedView::new),
        seq,
        channels,
        blocks,
    };
    for_rows(cpu.level, batch * blocks, 1, &kernel);
    Ok(())
}

/// Workspace of [`wkv`].
pub fn wkv_workspace_bytes(channels: usize) -> usize {
    part_bytes::<f32>(channels)
}

struct Blocks<'a, 'b, T> {
    input: &'a WkvInput<'b, T>,
    fade: &'a [f32],
    out: SharedView<'a, T, 3>,
    state_out: Option<SharedView<'a, f32, 3>>,
    seq: usize,
    channels: usize,
    blocks: usize,
}

impl<T: Float> RowKernel for Blocks<'_, '_, T> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, _: usize, items: Range<usize>) {
        for item in items {
            let (b, start) = (item / self.blocks, item % self.blocks * CHANNELS);
            let end = (start + CHANNELS).min(self.channels);
            for at in (start..end).step_by(S::LANES) {
                self.channels(simd, b, at..(at + S::LANES).min(end));
            }
        }
    }
}

impl<T: Float> Blocks<'_, '_, T> {
    /// One vector of channels, over all tokens.
    #[inline(always)]
    fn channels<S: Simd>(&self, simd: S, b: usize, channels: Range<usize>) {
        let (start, width) = (channels.start, channels.len());
        let fade = simd.load_partial(&self.fade[channels.clone()]);
        let first = simd.load_partial(&self.input.first[channels.clone()]);
        let state = |i: usize, initial: f32| match &self.input.state_in {
            Some(state) => simd.load_partial(&state.row(&[i, b])[channels.clone()]),
            None => simd.splat(initial),
        };
        let (mut num, mut den, mut max) = (state(0, 0.0), state(1, 0.0), state(2, -1e38));
        for t in 0..self.seq {
            let k = T::load_partial(simd, &self.input.k.row(&[b, t])[channels.clone()]);
            let v = T::load_partial(simd, &self.input.v.row(&[b, t])[channels.clone()]);

            let boosted = simd.add(k, first);
            let m = simd.max(max, boosted);
            let past = math::exp(simd, simd.sub(max, m));
            let now = math::exp(simd, simd.sub(boosted, m));
            let out = simd.div(simd.fma(past, num, simd.mul(now, v)), simd.fma(past, den, now));
            // SAFETY: every (batch row, channel) belongs to one item, and `part` is of this item's channels alone.
            let row = unsafe { self.out.part(&[b, t], start, width) };
            T::store_partial(simd, row, out);

            let faded = simd.add(max, fade);
            let m = simd.max(faded, k);
            let past = math::exp(simd, simd.sub(faded, m));
            let now = math::exp(simd, simd.sub(k, m));
            num = simd.fma(past, num, simd.mul(now, v));
            den = simd.fma(past, den, now);
            max = m;
        }
        if let Some(out) = &self.state_out {
            for (i, x) in [num, den, max].into_iter().enumerate() {
                // SAFETY: as above.
                simd.store_partial(unsafe { out.part(&[i, b], start, width) }, x);
            }
        }
    }
}
