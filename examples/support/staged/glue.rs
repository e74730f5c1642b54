//! Norms and element-wise functions.

use super::{Staged, StagedMut, vector};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, DeviceView, Queue};
use gatefold::spec::Norm;
use gatefold::{Element, Result, View, ViewMut};

/// [`cuda::norm`].
pub fn norm<T: Element, const N: usize>(
    driver: &dyn Driver,
    spec: &Norm,
    x: View<'_, T, N>,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, T, N>,
) -> Result<()> {
    let x = Staged::new(driver, x)?;
    let weight = weight.map(|weight| vector(driver, weight)).transpose()?;
    let bias = bias.map(|bias| vector(driver, bias)).transpose()?;
    let mut staged = StagedMut::new(driver, &out)?;
    let mut queue = Queue::new(driver);
    let (weight, bias) = (weight.as_ref().map(Staged::view), bias.as_ref().map(Staged::view));
    cuda::norm(&mut queue, spec, x.view(), weight, bias, staged.view())?;
    staged.finish(queue.stream(), out)
}

/// [`cuda::add`].
pub fn add<T: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 2>,
    y: View<'_, T, 2>,
    multiplier: f64,
    out: ViewMut<'_, T, 2>,
) -> Result<()> {
    pair(driver, x, y, out, |queue, x, y, out| cuda::add(queue, x, y, multiplier, out))
}

/// [`cuda::sigmoid_mul`].
pub fn sigmoid_mul<T: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 2>,
    gate: View<'_, T, 2>,
    out: ViewMut<'_, T, 2>,
) -> Result<()> {
    pair(driver, x, gate, out, cuda::sigmoid_mul)
}

fn pair<T: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 2>,
    y: View<'_, T, 2>,
    out: ViewMut<'_, T, 2>,
    call: impl FnOnce(
        &mut Queue<'_>,
        DeviceView<'_, T, 2>,
        DeviceView<'_, T, 2>,
        cuda::DeviceViewMut<'_, T, 2>,
    ) -> Result<()>,
) -> Result<()> {
    let (x, y) = (Staged::new(driver, x)?, Staged::new(driver, y)?);
    let mut staged = StagedMut::new(driver, &out)?;
    let mut queue = Queue::new(driver);
    call(&mut queue, x.view(), y.view(), staged.view())?;
    staged.finish(queue.stream(), out)
}
