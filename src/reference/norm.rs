//! Norms, and the two element-wise functions of a layer.

use crate::args::{check_elementwise, check_norm};
use crate::spec::{Norm, NormKind};
use crate::view::{View, ViewMut};
use crate::{Element, Result};

/// RMS norm or layer norm over the last dimension.
///
/// ```text
/// rms:    out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
/// layer:  out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * (weight + weight_offset) + bias
/// ```
///
/// * `x`, `out`: `[.., width]`; `weight`, `bias`: `[width]`. Without a weight there is no factor at all.
///
/// # Errors
/// Those of [`Norm::validate`]; [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`];
/// [`crate::Error::Presence`] for a bias that the specification does not have, or lacks. Nothing is written then.
///
/// Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
pub fn norm<T: Element, S: Element, const N: usize>(
    spec: &Norm,
    x: View<'_, T, N>,
    weight: Option<&[S]>,
    bias: Option<&[S]>,
    mut out: ViewMut<'_, f64, N>,
) -> Result<()> {
    check_norm(spec, &x, weight, bias, &out)?;
    for_each_row(&x.shape(), |index| {
        let row: Vec<f64> = x.row(index).iter().map(|x| x.to_f64()).collect();
        out.row_mut(index).copy_from_slice(&normalize(spec, &row, weight, bias));
    });
    Ok(())
}

/// One row, normalised.
pub(super) fn normalize<S: Element>(spec: &Norm, x: &[f64], weight: Option<&[S]>, bias: Option<&[S]>) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = match spec.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => x.iter().sum::<f64>() / n,
    };
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let root = (variance + spec.eps).sqrt();
    x.iter()
        .enumerate()
        .map(|(i, x)| {
            let factor = weight.map_or(1.0, |w| w[i].to_f64() + spec.weight_offset);
            (x - mean) / root * factor + bias.map_or(0.0, |b| b[i].to_f64())
        })
        .collect()
}

/// All indices of the dimensions but the last; none if there are no elements.
fn for_each_row(shape: &[usize], mut f: impl FnMut(&[usize])) {
    if shape.contains(&0) {
        return;
    }
    let leading = &shape[..shape.len() - 1];
    let mut index = vec![0; leading.len()];
    for mut row in 0..leading.iter().product() {
        for (i, n) in index.iter_mut().zip(leading).rev() {
            *i = row % n;
            row /= n;
        }
        f(&index);
    }
}

/// The residual sum: `out = x + multiplier * y`.
///
/// * `x`, `y`, `out`: `[num_tokens, hidden_size]`
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`]. Nothing is written then.
pub fn add<T: Element>(
    x: View<'_, T, 2>,
    y: View<'_, T, 2>,
    multiplier: f64,
    mut out: ViewMut<'_, f64, 2>,
) -> Result<()> {
    check_elementwise(&x, "y", &y, &out)?;
    for_each_row(&x.shape(), |t| {
        for (out, (x, y)) in out.row_mut(t).iter_mut().zip(x.row(t).iter().zip(y.row(t))) {
            *out = x.to_f64() + multiplier * y.to_f64();
        }
    });
    Ok(())
}

/// An output gate: `out = x * sigmoid(gate)`.
///
/// * `x`, `gate`, `out`: `[num_tokens, width]`
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`]. Nothing is written then.
pub fn sigmoid_mul<T: Element>(x: View<'_, T, 2>, gate: View<'_, T, 2>, mut out: ViewMut<'_, f64, 2>) -> Result<()> {
    check_elementwise(&x, "gate", &gate, &out)?;
    for_each_row(&x.shape(), |t| {
        for (out, (x, gate)) in out.row_mut(t).iter_mut().zip(x.row(t).iter().zip(gate.row(t))) {
            *out = x.to_f64() * sigmoid(gate.to_f64());
        }
    });
    Ok(())
}

/// `1 / (1 + exp(-x))`
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
