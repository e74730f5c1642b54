//! Weights of experts and of feed-forward blocks, rearranged once.

use crate::args::{ExpertWeights, FfnWeights};
use crate::cpu::float::Float;
use crate::cpu::gemm::pack::{pack_panel, packed_len, panel_len};
use crate::cpu::gemm::{PANEL, num_panels};
use crate::cpu::parallel::{self, Shared};
use crate::cpu::workspace::AlignedBytes;
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::spec::{ExpertFfn, Ffn, WeightFormat};
use crate::view::View;

/// Weights of all local experts in panels, for all levels: gate and up share panels (16 rows of each), so that one tile
/// yields both; then down. Biases are f32. Keeps the element type; the caller owns it, any number of threads may use it.
pub struct PackedExperts {
    spec: ExpertFfn,
    dtype: Dtype,
    weights: AlignedBytes,
    biases: AlignedBytes,
}

/// Weights of one dense block: a [`PackedExperts`] with one expert.
#[derive(Debug)]
pub struct PackedFfn(PackedExperts);

/// Sizes of the panels of one expert.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panels {
    /// Inner columns that a panel of gate and up yields: 16 of a gated block, else 32.
    pub inner_per_panel: usize,
    /// Panels of gate and up.
    pub up: usize,
    /// Panels of down.
    pub down: usize,
}

impl Panels {
    pub fn new(ffn: &Ffn) -> Panels {
        let inner_per_panel = if ffn.gated { PANEL / 2 } else { PANEL };
        let up = ffn.intermediate_size.div_ceil(inner_per_panel);
        Panels { inner_per_panel, up, down: num_panels(ffn.hidden_size) }
    }

    /// Values of an expert: those of gate and up, those of down.
    fn values(self, ffn: &Ffn, dtype: Dtype) -> [usize; 2] {
        let up = self.up.saturating_mul(panel_len(dtype, ffn.hidden_size));
        [up, packed_len(dtype, ffn.hidden_size, ffn.intermediate_size)]
    }

    /// Bias values of an expert, in the order of the panels; none without biases.
    fn biases(self, ffn: &Ffn) -> [usize; 2] {
        let len = |has: bool, panels: usize| if has { panels.saturating_mul(PANEL) } else { 0 };
        [len(ffn.up_bias, self.up), len(ffn.down_bias, self.down)]
    }
}

impl PackedExperts {
    /// Bytes that packing takes. Widths are rounded up to 32 rows (gated: 16 of gate and up), inputs of bf16 to 2.
    pub fn packed_bytes(spec: &ExpertFfn, dtype: Dtype) -> usize {
        let panels = Panels::new(&spec.ffn);
        let [up, down] = panels.values(&spec.ffn, dtype);
        let [up_bias, down_bias] = panels.biases(&spec.ffn);
        let weights = up.saturating_add(down).saturating_mul(dtype.size_bytes());
        let biases = up_bias.saturating_add(down_bias).saturating_mul(4);
        weights.saturating_add(biases).saturating_mul(spec.num_local_experts)
    }

    /// Packs the experts, in parallel.
    ///
    /// # Errors
    /// Those of [`ExpertFfn::validate`] and [`ExpertWeights::check`]; [`Error::Unsupported`] for weights that are not stored
    /// as [`WeightFormat::Float`].
    pub fn pack<W: Float, S: Element>(spec: &ExpertFfn, weights: &ExpertWeights<'_, W, S>) -> Result<PackedExperts> {
        spec.validate()?;
        if spec.weight_format != WeightFormat::Float {
            return Err(Error::unsupported("cpu", format!("weight_format {:?}", spec.weight_format)));
        }
        weights.check(spec)?;
        if spec.num_local_experts == 0 {
            let (weights, biases) = (AlignedBytes::empty(), AlignedBytes::empty());
            return Ok(PackedExperts { spec: *spec, dtype: W::DTYPE, weights, biases });
        }
        let (ffn, experts, panels) = (&spec.ffn, spec.num_local_experts, Panels::new(&spec.ffn));
        let [up_len, down_len] = panels.values(ffn, W::DTYPE);
        let mut packed = AlignedBytes::zeroed((up_len + down_len) * experts * W::DTYPE.size_bytes());
        let all = Shared::new(bytemuck::cast_slice_mut::<u8, W>(packed.as_mut_slice()));
        let per_expert = panels.up + panels.down;
        parallel::run(experts * per_expert, |_, item| {
            let (expert, panel) = (item / per_expert, item % per_expert);
            let base = expert * (up_len + down_len);
            if panel < panels.up {
                let len = panel_len(W::DTYPE, ffn.hidden_size);
                // SAFETY: each item has its own panel.
                let out = unsafe { all.part(base + panel * len, len) };
                pack_panel(ffn.hidden_size, |output| up_row(ffn, weights, expert, panel, output), out);
            } else {
                let (panel, len) = (panel - panels.up, panel_len(W::DTYPE, ffn.intermediate_size));
                // SAFETY: each item has its own panel.
                let out = unsafe { all.part(base + up_len + panel * len, len) };
                let row = |output: usize| {
                    let row = panel * PANEL + output;
                    (row < ffn.hidden_size).then(|| weights.down.row(&[expert, row]))
                };
                pack_panel(ffn.intermediate_size, row, out);
            }
        });
        Ok(PackedExperts { spec: *spec, dtype: W::DTYPE, weights: packed, biases: pack_biases(spec, weights) })
    }

    /// What was packed.
    pub fn spec(&self) -> &ExpertFfn {
        &self.spec
    }

    /// Element type of the weights.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.weights.as_slice().len() + self.biases.as_slice().len()
    }

    /// Panels of gate and up, and of down, of one expert.
    pub(super) fn panels<W: Float>(&self, expert: usize) -> [&[W]; 2] {
        let [up, down] = Panels::new(&self.spec.ffn).values(&self.spec.ffn, self.dtype);
        let all = bytemuck::cast_slice::<u8, W>(self.weights.as_slice());
        let (up, down) = all[expert * (up + down)..][..up + down].split_at(up);
        [up, down]
    }

    /// Biases in the order of the panels' outputs, of gate and up, and of down, of one expert.
    pub(super) fn biases(&self, expert: usize) -> [Option<&[f32]>; 2] {
        let [up, down] = Panels::new(&self.spec.ffn).biases(&self.spec.ffn);
        let all = bytemuck::cast_slice::<u8, f32>(self.biases.as_slice());
        let (up, down) = all[expert * (up + down)..][..up + down].split_at(up);
        [(!up.is_empty()).then_some(up), (!down.is_empty()).then_some(down)]
    }

    /// `Ok` if a call's specification is the one that was packed, but for what may change from call to call: the place of the
    /// weight and the scale.
    pub(in crate::cpu) fn check(&self, spec: &ExpertFfn) -> Result<()> {
        let mut packed = self.spec;
        packed.weight_on = spec.weight_on;
        packed.combine_scale = spec.combine_scale;
        if packed == *spec {
            Ok(())
        } else {
            Err(Error::value("weights", format!("packed for {spec:?}"), format!("packed for {packed:?}")))
        }
    }
}

/// Row of an output of a panel of gate and up.
fn up_row<'a, W, S>(
    ffn: &Ffn,
    weights: &ExpertWeights<'a, W, S>,
    expert: usize,
    panel: usize,
    output: usize,
) -> Option<&'a [W]> {
    let (matrix, row): (&View<'a, W, 3>, usize) = match &weights.gate {
        Some(gate) if output < PANEL / 2 => (gate, panel * (PANEL / 2) + output),
        Some(_) => (&weights.up, panel * (PANEL / 2) + output - PANEL / 2),
        None => (&weights.up, panel * PANEL + output),
    };
    (row < ffn.intermediate_size).then(|| matrix.row(&[expert, row]))
}

fn pack_biases<W, S: Element>(spec: &ExpertFfn, weights: &ExpertWeights<'_, W, S>) -> AlignedBytes {
    let (ffn, panels) = (&spec.ffn, Panels::new(&spec.ffn));
    let [up, down] = panels.biases(ffn);
    let mut packed = AlignedBytes::zeroed((up + down) * spec.num_local_experts * 4);
    let all: &mut [f32] = bytemuck::cast_slice_mut(packed.as_mut_slice());
    for expert in 0..if up + down == 0 { 0 } else { spec.num_local_experts } {
        let (up_out, down_out) = all[expert * (up + down)..][..up + down].split_at_mut(up);
        if let Some(bias) = weights.up_bias {
            for (i, x) in bias.row(&[expert]).iter().enumerate() {
                // Up stands behind the gate's 16 in a panel.
                let (panel, output) = (i / panels.inner_per_panel, i % panels.inner_per_panel);
                up_out[panel * PANEL + output + PANEL - panels.inner_per_panel] = x.to_f32();
            }
        }
        if let Some(bias) = weights.gate_bias {
            for (i, x) in bias.row(&[expert]).iter().enumerate() {
                up_out[i / (PANEL / 2) * PANEL + i % (PANEL / 2)] = x.to_f32();
            }
        }
        if let Some(bias) = weights.down_bias {
            for (out, x) in down_out.iter_mut().zip(bias.row(&[expert])) {
                *out = x.to_f32();
            }
        }
    }
    packed
}

impl PackedFfn {
    /// Bytes that packing takes.
    pub fn packed_bytes(spec: &Ffn, dtype: Dtype) -> usize {
        PackedExperts::packed_bytes(&ExpertFfn::new(1, *spec), dtype)
    }

    /// Packs the block, in parallel.
    ///
    /// # Errors
    /// Those of [`Ffn::validate`] and [`FfnWeights::check`].
    pub fn pack<W: Float, S: Element>(spec: &Ffn, weights: &FfnWeights<'_, W, S>) -> Result<PackedFfn> {
        Ok(PackedFfn(PackedExperts::pack(&ExpertFfn::new(1, *spec), &weights.as_expert())?))
    }

    /// What was packed.
    pub fn spec(&self) -> &Ffn {
        &self.0.spec.ffn
    }

    /// Element type of the weights.
    pub fn dtype(&self) -> Dtype {
        self.0.dtype
    }

    /// Memory that it holds.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// The block as the only expert.
    pub(in crate::cpu) fn as_experts(&self) -> &PackedExperts {
        &self.0
    }
}

impl std::fmt::Debug for PackedExperts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedExperts").field("spec", &self.spec).field("dtype", &self.dtype).finish()
    }
}
