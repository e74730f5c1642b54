//! Load-balancing loss and z-loss (see [`AuxLoss`]).
//!
//! Sums run over chunks of tokens, then over the chunks in order: the cut depends on the number of experts alone.

use super::{exp, top_k};
use crate::args::{RouteInput, RouteOutput};
use crate::cpu::level::Level;
use crate::cpu::parallel::{self, Shared};
use crate::cpu::rows::{RowKernel, for_rows};
use crate::cpu::simd::Simd;
use crate::cpu::workspace::{Carver, part_bytes};
use crate::spec::{AuxLoss, Router};
use std::ops::Range;

/// Groups of tokens, each cut into chunks.
struct Cut {
    num_tokens: usize,
    group_len: usize,
    chunk: usize,
    chunks_per_group: usize,
}

impl Cut {
    fn new(spec: &Router, num_tokens: usize) -> Self {
        let group_len = match spec.aux_loss {
            Some(AuxLoss::Switch { group_len: Some(len) }) => len.min(num_tokens.max(1)),
            _ => num_tokens.max(1),
        };
        let chunk = (16_384 / spec.num_experts).clamp(8, 256).min(group_len);
        Cut { num_tokens, group_len, chunk, chunks_per_group: group_len.div_ceil(chunk) }
    }

    fn groups(&self) -> usize {
        self.num_tokens.div_ceil(self.group_len)
    }

    fn chunks(&self) -> usize {
        self.groups().saturating_mul(self.chunks_per_group)
    }

    fn tokens(&self, chunk: usize) -> Range<usize> {
        let group = chunk / self.chunks_per_group * self.group_len;
        let end = (group + self.group_len).min(self.num_tokens);
        let start = group + chunk % self.chunks_per_group * self.chunk;
        start.min(end)..(start + self.chunk).min(end)
    }
}

/// Sums of a chunk: `p` and choices of each expert, then the squares and the number of tokens.
fn sums_len(spec: &Router) -> usize {
    let experts = if spec.aux_loss.is_some() { 2 * spec.num_experts } else { 0 };
    experts.saturating_add(2).saturating_add(7) / 8 * 8
}

/// Exponentials, keys and best of a worker.
fn room_len(spec: &Router) -> usize {
    top_k::num_keys(spec.num_experts).saturating_add(spec.num_experts.saturating_mul(2)).saturating_add(7) / 8 * 8
}

/// Workspace of [`losses`].
pub fn workspace_bytes(spec: &Router, num_tokens: usize) -> usize {
    let chunks = Cut::new(spec, num_tokens).chunks();
    part_bytes::<f64>(chunks.saturating_mul(sums_len(spec)))
        .saturating_add(part_bytes::<f64>(parallel::workers_for(chunks).saturating_mul(room_len(spec))))
}

/// Writes the losses that the caller wants.
pub fn losses(
    level: Level,
    carver: &mut Carver<'_>,
    spec: &Router,
    input: &RouteInput<'_>,
    output: &mut RouteOutput<'_>,
) {
    if output.aux_loss.is_none() && output.z_loss.is_none() {
        return;
    }
    let cut = Cut::new(spec, input.logits.shape()[0]);
    let (chunks, sums_len, room_len) = (cut.chunks(), sums_len(spec), room_len(spec));
    let sums = carver.part::<f64>(chunks * sums_len);
    let kernel = Chunks {
        spec,
        input,
        balance: output.aux_loss.is_some(),
        sums: Shared::new(&mut *sums),
        sums_len,
        room: Shared::new(carver.part(parallel::workers_for(chunks) * room_len)),
        room_len,
        cut,
    };
    for_rows(level, chunks, 1, &kernel);
    let cut = kernel.cut;
    let (squares, tokens) = (sums_len - 2, sums_len - 1);

    if let Some(out) = &mut output.z_loss {
        let total: f64 = sums.chunks_exact(sums_len).map(|chunk| chunk[squares]).sum();
        let count: f64 = sums.chunks_exact(sums_len).map(|chunk| chunk[tokens]).sum();
        **out = if count == 0.0 { 0.0 } else { (total / count) as f32 };
    }
    if let (Some(out), Some(loss)) = (&mut output.aux_loss, spec.aux_loss) {
        // The first chunk of a group takes the others in.
        let (mut total, mut groups) = (0.0, 0.0);
        for group in sums.chunks_exact_mut(sums_len * cut.chunks_per_group) {
            let (first, others) = group.split_at_mut(sums_len);
            for other in others.chunks_exact(sums_len) {
                first.iter_mut().zip(other).for_each(|(sum, part)| *sum += part);
            }
            let n = first[tokens];
            if n > 0.0 {
                let (mass, chosen) = first.split_at(spec.num_experts);
                total += mass.iter().zip(chosen).map(|(p, f)| f / n * (p / n)).sum::<f64>();
                groups += 1.0;
            }
        }
        let experts = spec.num_experts as f64;
        let factor = match loss {
            AuxLoss::TopK => experts,
            AuxLoss::Switch { .. } => experts / groups,
        };
        **out = if groups == 0.0 { 0.0 } else { (total * factor) as f32 };
    }
}

struct Chunks<'a, 'b> {
    spec: &'a Router,
    input: &'a RouteInput<'b>,
    balance: bool,
    sums: Shared<'a, f64>,
    sums_len: usize,
    room: Shared<'a, f64>,
    room_len: usize,
    cut: Cut,
}

impl RowKernel for Chunks<'_, '_> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, worker: usize, chunks: Range<usize>) {
        let n = self.spec.num_experts;
        // SAFETY: no two items with the same worker overlap in time.
        let room = unsafe { self.room.part(worker * self.room_len, self.room_len) };
        let (keys, rest) = room.split_at_mut(top_k::num_keys(n));
        let (p, best) = rest.split_at_mut(n);
        let chosen_experts = match self.spec.aux_loss {
            Some(AuxLoss::TopK) => self.spec.top_k,
            _ => 1,
        };
        let best = &mut best[..chosen_experts];
        for chunk in chunks {
            // SAFETY: every chunk belongs to one item.
            let sums = unsafe { self.sums.part(chunk * self.sums_len, self.sums_len) };
            sums.fill(0.0);
            let (sums, ends) = sums.split_at_mut(self.sums_len - 2);
            for t in self.cut.tokens(chunk).filter(|t| self.counts(*t)) {
                let logits = self.input.logits.row(&[t]);
                let max = exp::max(logits);
                let sum = exp::exp_row(logits, max, p);
                // All -inf: the exponentials count as 1, but their sum is 0.
                let lse = if max == f64::NEG_INFINITY && !sum.is_nan() { max } else { max + sum.ln() };
                ends[0] += lse * lse;
                ends[1] += 1.0;
                if self.balance {
                    let (mass, chosen) = sums.split_at_mut(n);
                    let inverse = sum.recip();
                    for (mass, p) in mass.iter_mut().zip(&*p) {
                        *mass += p * inverse;
                    }
                    top_k::write_keys(logits, keys);
                    top_k::top_k(simd, keys, best);
                    for key in &*best {
                        chosen[top_k::index(*key)] += 1.0;
                    }
                }
            }
        }
    }
}

impl Chunks<'_, '_> {
    fn counts(&self, t: usize) -> bool {
        let kept = |mask: Option<&[u8]>| mask.is_none_or(|mask| mask[t] != 0);
        kept(self.input.token_mask) && kept(self.input.loss_mask)
    }
}
