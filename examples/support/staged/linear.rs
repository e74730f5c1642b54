//! Linear layers.

use super::{Staged, StagedMut, vector};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::{Element, Result, View, ViewMut};

/// [`cuda::linear`].
pub fn linear<T: Element, O: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 2>,
    weight: View<'_, T, 2>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    linear_with(driver, x, &Staged::new(driver, weight)?, bias, out)
}

/// [`linear`] with a weight that is on the device already.
pub fn linear_with<T: Element, O: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 2>,
    weight: &Staged<'_, T, 2>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    let mut queue = Queue::new(driver);
    let x = Staged::new(driver, x)?;
    let bias = bias.map(|bias| vector(driver, bias)).transpose()?;
    let mut result = StagedMut::new(driver, &out)?;
    cuda::linear(&mut queue, x.view(), weight.view(), bias.as_ref().map(Staged::view), result.view())?;
    result.finish(queue.stream(), out)
}

/// [`cuda::linear_heads`].
pub fn linear_heads<T: Element, O: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 3>,
    weight: View<'_, T, 3>,
    out: ViewMut<'_, O, 3>,
) -> Result<()> {
    let mut queue = Queue::new(driver);
    let (x, weight) = (Staged::new(driver, x)?, Staged::new(driver, weight)?);
    let mut result = StagedMut::new(driver, &out)?;
    cuda::linear_heads(&mut queue, x.view(), weight.view(), result.view())?;
    result.finish(queue.stream(), out)
}
