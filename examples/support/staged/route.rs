//! Routing.

use super::{Staged, StagedMut, vector};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::spec::Router;
use gatefold::{Element, Result, View, ViewMut, args};

/// As `cpu::route`.
pub fn route(
    driver: &dyn Driver,
    spec: &Router,
    input: &args::RouteInput<'_>,
    output: args::RouteOutput<'_>,
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
    let mut there = StagedRoute::new(driver, output)?;
    cuda::route(&mut queue, spec, &on_device, there.output())?;
    there.finish(queue.stream())
}

/// As `cpu::router_logits`, with the weight as it is.
pub fn router_logits<T: Element, W: Element>(
    driver: &dyn Driver,
    spec: &Router,
    hidden: View<'_, T, 2>,
    weight: View<'_, W, 2>,
    bias: Option<&[f32]>,
    seed: u64,
    logits: ViewMut<'_, f32, 2>,
) -> Result<()> {
    let mut queue = Queue::new(driver);
    let (hidden, weight) = (Staged::new(driver, hidden)?, Staged::new(driver, weight)?);
    let bias = bias.map(|bias| vector(driver, bias)).transpose()?;
    let mut out = StagedMut::new(driver, &logits)?;
    let bias = bias.as_ref().map(Staged::view);
    cuda::router_logits(&mut queue, spec, hidden.view(), weight.view(), bias, seed, out.view())?;
    out.finish(queue.stream(), logits)
}

/// Where a routing goes: copies on the device, and the arrays of the host that get them back.
pub struct StagedRoute<'a, 'h> {
    ids: (StagedMut<'a, i32, 2>, ViewMut<'h, i32, 2>),
    weights: (StagedMut<'a, f32, 2>, ViewMut<'h, f32, 2>),
    expert_tokens: Option<(StagedMut<'a, i32, 2>, ViewMut<'h, i32, 2>)>,
    tokens_per_expert: Option<Flat<'a, 'h, u32>>,
    dropped: Option<Flat<'a, 'h, u64>>,
    aux_loss: Option<Flat<'a, 'h, f32>>,
    z_loss: Option<Flat<'a, 'h, f32>>,
}

type Flat<'a, 'h, T> = (StagedMut<'a, T, 1>, ViewMut<'h, T, 1>);

fn flat<'a, 'h, T: bytemuck::Pod>(driver: &'a dyn Driver, data: &'h mut [T]) -> Result<Flat<'a, 'h, T>> {
    let len = data.len();
    let view = ViewMut::new(data, [len]);
    Ok((StagedMut::new(driver, &view)?, view))
}

impl<'a, 'h> StagedRoute<'a, 'h> {
    pub fn new(driver: &'a dyn Driver, output: args::RouteOutput<'h>) -> Result<Self> {
        fn one<'a, 'h, T: bytemuck::Pod>(
            driver: &'a dyn Driver,
            value: Option<&'h mut T>,
        ) -> Result<Option<Flat<'a, 'h, T>>> {
            value.map(|value| flat(driver, std::slice::from_mut(value))).transpose()
        }
        let tokens = output.expert_tokens.map(|view| Ok((StagedMut::new(driver, &view)?, view))).transpose()?;
        Ok(StagedRoute {
            ids: (StagedMut::new(driver, &output.topk_ids)?, output.topk_ids),
            weights: (StagedMut::new(driver, &output.topk_weights)?, output.topk_weights),
            expert_tokens: tokens,
            tokens_per_expert: output.tokens_per_expert.map(|counts| flat(driver, counts)).transpose()?,
            dropped: one(driver, output.dropped)?,
            aux_loss: one(driver, output.aux_loss)?,
            z_loss: one(driver, output.z_loss)?,
        })
    }

    pub fn output(&mut self) -> cuda::RouteOutput<'_> {
        let mut output = cuda::RouteOutput::new(self.ids.0.view(), self.weights.0.view());
        output.expert_tokens = self.expert_tokens.as_mut().map(|(there, _)| there.view());
        output.tokens_per_expert = self.tokens_per_expert.as_mut().map(|(there, _)| there.view());
        output.dropped = self.dropped.as_mut().map(|(there, _)| there.view());
        output.aux_loss = self.aux_loss.as_mut().map(|(there, _)| there.view());
        output.z_loss = self.z_loss.as_mut().map(|(there, _)| there.view());
        output
    }

    /// Waits for the stream and copies everything back.
    pub fn finish(self, stream: cuda::Stream) -> Result<()> {
        fn back<T: bytemuck::Pod>(flat: Option<Flat<'_, '_, T>>, stream: cuda::Stream) -> Result<()> {
            flat.map_or(Ok(()), |(there, here)| there.finish(stream, here))
        }
        self.ids.0.finish(stream, self.ids.1)?;
        self.weights.0.finish(stream, self.weights.1)?;
        self.expert_tokens.map_or(Ok(()), |(there, here)| there.finish(stream, here))?;
        back(self.tokens_per_expert, stream)?;
        back(self.dropped, stream)?;
        back(self.aux_loss, stream)?;
        back(self.z_loss, stream)
    }
}
