//! The merge of partial attentions.

use super::{Staged, StagedMut};
use gatefold::args::AttentionOutput;
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::{Element, Result, View};

/// `cuda::merge` on arrays of the host.
pub fn merge<T: Element, O: Element>(
    driver: &dyn Driver,
    outs: View<'_, T, 4>,
    lses: View<'_, f32, 3>,
    output: AttentionOutput<'_, O, f32>,
) -> Result<()> {
    let AttentionOutput { out, lse, .. } = output;
    let (outs, lses) = (Staged::new(driver, outs)?, Staged::new(driver, lses)?);
    let mut staged_out = StagedMut::new(driver, &out)?;
    let mut staged_lse = lse.as_ref().map(|lse| StagedMut::new(driver, lse)).transpose()?;
    let mut queue = Queue::new(driver);
    let staged = match &mut staged_lse {
        Some(lse) => cuda::AttentionOutput::with_lse(staged_out.view(), lse.view()),
        None => cuda::AttentionOutput::new(staged_out.view()),
    };
    cuda::merge(&mut queue, outs.view(), lses.view(), staged)?;
    let stream = queue.stream();
    staged_out.finish(stream, out)?;
    staged_lse.zip(lse).map_or(Ok(()), |(staged, lse)| staged.finish(stream, lse))
}
