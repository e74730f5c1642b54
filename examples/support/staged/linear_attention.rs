//! Linear attention: a state instead of a cache.

use super::{Staged, StagedMut, vector};
use gatefold::args::{RetentionInput, RetentionOutput, WkvInput, WkvOutput};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::spec::Retention;
use gatefold::{Element, Result};

/// [`cuda::wkv`].
pub fn wkv<T: Element>(driver: &dyn Driver, input: &WkvInput<'_, T>, output: WkvOutput<'_, T>) -> Result<()> {
    let (k, v) = (Staged::new(driver, input.k)?, Staged::new(driver, input.v)?);
    let (decay, first) = (vector(driver, input.decay)?, vector(driver, input.first)?);
    let state_in = Staged::option(driver, input.state_in)?;
    let mut out = StagedMut::new(driver, &output.out)?;
    let mut state_out = output.state_out.as_ref().map(|state| StagedMut::new(driver, state)).transpose()?;
    let mut queue = Queue::new(driver);
    let mut staged = cuda::WkvInput::new(k.view(), v.view(), decay.view(), first.view());
    staged.state_in = state_in.as_ref().map(Staged::view);
    let mut written = cuda::WkvOutput::new(out.view());
    written.state_out = state_out.as_mut().map(StagedMut::view);
    cuda::wkv(&mut queue, &staged, written)?;
    out.finish(queue.stream(), output.out)?;
    if let (Some(staged), Some(state)) = (state_out, output.state_out) {
        staged.finish(queue.stream(), state)?;
    }
    Ok(())
}

/// [`cuda::retention`].
pub fn retention<T: Element>(
    driver: &dyn Driver,
    spec: &Retention,
    input: &RetentionInput<'_, T>,
    output: RetentionOutput<'_, T>,
) -> Result<()> {
    let (q, k, v) = (Staged::new(driver, input.q)?, Staged::new(driver, input.k)?, Staged::new(driver, input.v)?);
    let (decay, state_in) = (vector(driver, input.decay)?, Staged::option(driver, input.state_in)?);
    let mut out = StagedMut::new(driver, &output.out)?;
    let mut state_out = output.state_out.as_ref().map(|state| StagedMut::new(driver, state)).transpose()?;
    let mut queue = Queue::new(driver);
    let mut staged = cuda::RetentionInput::new(q.view(), k.view(), v.view(), decay.view());
    staged.state_in = state_in.as_ref().map(Staged::view);
    let mut written = cuda::RetentionOutput::new(out.view());
    written.state_out = state_out.as_mut().map(StagedMut::view);
    cuda::retention(&mut queue, spec, &staged, written)?;
    out.finish(queue.stream(), output.out)?;
    if let (Some(staged), Some(state)) = (state_out, output.state_out) {
        staged.finish(queue.stream(), state)?;
    }
    Ok(())
}
