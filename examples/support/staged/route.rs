//! Routing.

use super::{Staged, StagedMut, vector};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::spec::Router;
use gatefold::{Result, ViewMut, args};

/// As `cpu::route`.
pub fn route(
    driver: &dyn Driver,
    spec: &Router,
    input: &args::RouteInput<'_>,
    mut output: args::RouteOutput<'_>,
) -> Result<()> {
    let mut queue = Queue::new(driver);
    let logits = Staged::new(driver, input.logits)?;
    let flat = |mask: Option<&[u8]>| mask.map(|mask| vector(driver, mask)).transpose();
    let bias = input.selection_bias.map(|bias| vector(driver, bias)).transpose()?;
    let (token_mask, loss_mask) = (flat(input.token_mask)?, flat(input.loss_mask)?);
    let mut on_device = cuda::RouteInput::new(logits.view());
    on_device.selection_bias = bias.as_ref().map(Staged::view);
    on_device.token_mask = token_mask.as_ref().map(Staged::view);
    on_device.loss_mask = loss_mask.as_ref().map(Staged::view);
    on_device.seed = input.seed;

    let mut ids = StagedMut::new(driver, &output.topk_ids)?;
    let mut weights = StagedMut::new(driver, &output.topk_weights)?;
    let mut counts = output.tokens_per_expert.map(flat_mut);
    let mut dropped = output.dropped.map(one);
    let (mut aux, mut z) = (output.aux_loss.map(one), output.z_loss.map(one));
    let mut counts_there = stage(driver, &counts)?;
    let mut dropped_there = stage(driver, &dropped)?;
    let (mut aux_there, mut z_there) = (stage(driver, &aux)?, stage(driver, &z)?);
    let mut tokens = output.expert_tokens.as_ref().map(|tokens| StagedMut::new(driver, tokens)).transpose()?;
    let mut out = cuda::RouteOutput::new(ids.view(), weights.view());
    out.tokens_per_expert = counts_there.as_mut().map(StagedMut::view);
    out.dropped = dropped_there.as_mut().map(StagedMut::view);
    out.expert_tokens = tokens.as_mut().map(StagedMut::view);
    out.aux_loss = aux_there.as_mut().map(StagedMut::view);
    out.z_loss = z_there.as_mut().map(StagedMut::view);
    cuda::route(&mut queue, spec, &on_device, out)?;

    let stream = queue.stream();
    ids.finish(stream, output.topk_ids)?;
    weights.finish(stream, output.topk_weights)?;
    if let (Some(there), Some(here)) = (tokens, output.expert_tokens.take()) {
        there.finish(stream, here)?;
    }
    fetch(counts_there, counts.take(), stream)?;
    fetch(dropped_there, dropped.take(), stream)?;
    fetch(aux_there, aux.take(), stream)?;
    fetch(z_there, z.take(), stream)
}

/// A vector that is written.
fn flat_mut<T>(data: &mut [T]) -> ViewMut<'_, T, 1> {
    let len = data.len();
    ViewMut::new(data, [len])
}

/// A number that is written.
fn one<T>(value: &mut T) -> ViewMut<'_, T, 1> {
    flat_mut(std::slice::from_mut(value))
}

fn stage<'a, T: bytemuck::Pod>(
    driver: &'a dyn Driver,
    view: &Option<ViewMut<'_, T, 1>>,
) -> Result<Option<StagedMut<'a, T, 1>>> {
    view.as_ref().map(|view| StagedMut::new(driver, view)).transpose()
}

fn fetch<T: bytemuck::Pod>(
    there: Option<StagedMut<'_, T, 1>>,
    here: Option<ViewMut<'_, T, 1>>,
    stream: cuda::Stream,
) -> Result<()> {
    match (there, here) {
        (Some(there), Some(here)) => there.finish(stream, here),
        _ => Ok(()),
    }
}
