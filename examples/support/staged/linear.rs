//! Linear layers, and the products of latent attention.

use super::{Staged, StagedMut, vector};
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{self, Queue};
use gatefold::spec::Mla;
use gatefold::{Element, Result, View, ViewMut};

/// [`cuda::linear`].
pub fn linear<T: Element, O: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 2>,
    weight: View<'_, T, 2>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    linear_with(&mut Queue::new(driver), x, &Staged::new(driver, weight)?, bias, out)
}

/// [`linear`] with a weight that is on the device already.
pub fn linear_with<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    x: View<'_, T, 2>,
    weight: &Staged<'_, T, 2>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, O, 2>,
) -> Result<()> {
    let driver = queue.driver();
    let x = Staged::new(driver, x)?;
    let bias = bias.map(|bias| vector(driver, bias)).transpose()?;
    let mut result = StagedMut::new(driver, &out)?;
    cuda::linear(queue, x.view(), weight.view(), bias.as_ref().map(Staged::view), result.view())?;
    result.finish(queue.stream(), out)
}

/// [`cuda::linear_heads`].
pub fn linear_heads<T: Element, O: Element>(
    driver: &dyn Driver,
    x: View<'_, T, 3>,
    weight: View<'_, T, 3>,
    out: ViewMut<'_, O, 3>,
) -> Result<()> {
    linear_heads_with(&mut Queue::new(driver), x, weight, out)
}

/// [`linear_heads`] on a queue.
pub fn linear_heads_with<T: Element, O: Element>(
    queue: &mut Queue<'_>,
    x: View<'_, T, 3>,
    weight: View<'_, T, 3>,
    out: ViewMut<'_, O, 3>,
) -> Result<()> {
    let driver = queue.driver();
    let (x, weight) = (Staged::new(driver, x)?, Staged::new(driver, weight)?);
    let mut result = StagedMut::new(driver, &out)?;
    cuda::linear_heads(queue, x.view(), weight.view(), result.view())?;
    result.finish(queue.stream(), out)
}

/// [`cuda::mla_absorb_query`].
pub fn mla_absorb_query<T: Element>(
    driver: &dyn Driver,
    spec: &Mla,
    q_nope: View<'_, T, 3>,
    kv_b: View<'_, T, 3>,
    out: ViewMut<'_, T, 3>,
) -> Result<()> {
    mla_absorb_query_with(&mut Queue::new(driver), spec, q_nope, kv_b, out)
}

/// [`mla_absorb_query`] on a queue.
pub fn mla_absorb_query_with<T: Element>(
    queue: &mut Queue<'_>,
    spec: &Mla,
    q_nope: View<'_, T, 3>,
    kv_b: View<'_, T, 3>,
    out: ViewMut<'_, T, 3>,
) -> Result<()> {
    let driver = queue.driver();
    let (q_nope, kv_b) = (Staged::new(driver, q_nope)?, Staged::new(driver, kv_b)?);
    let mut result = StagedMut::new(driver, &out)?;
    cuda::mla_absorb_query(queue, spec, q_nope.view(), kv_b.view(), result.view())?;
    result.finish(queue.stream(), out)
}

/// [`cuda::mla_project_value`].
pub fn mla_project_value<T: Element>(
    driver: &dyn Driver,
    spec: &Mla,
    latent: View<'_, T, 3>,
    kv_b: View<'_, T, 3>,
    out: ViewMut<'_, T, 3>,
) -> Result<()> {
    let mut queue = Queue::new(driver);
    let (latent, kv_b) = (Staged::new(driver, latent)?, Staged::new(driver, kv_b)?);
    let mut result = StagedMut::new(driver, &out)?;
    cuda::mla_project_value(&mut queue, spec, latent.view(), kv_b.view(), result.view())?;
    result.finish(queue.stream(), out)
}
