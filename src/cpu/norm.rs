//! Norms over the last dimension, and the element-wise functions of a layer.

use super::rows::{RowKernel, SharedView, for_rows, rows_per_item, unravel};
use super::simd::{MAX_LANES, Simd};
use super::{Cpu, Float, math};
use crate::Result;
use crate::args::{check_elementwise, check_norm};
use crate::spec::{Norm, NormKind};
use crate::view::{View, ViewMut};
use std::ops::Range;

/// RMS norm or layer norm over the last dimension.
///
/// ```text
/// rms:    out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
/// layer:  out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * (weight + weight_offset) + bias
/// ```
///
/// * `x`, `out`: `[.., width]`; `weight`, `bias`: `[width]`. Without a weight there is no factor at all.
///
/// Sums are taken in f32, in f64 where the squares would leave the range of f32; one rounding to `O` at the end. No row is a
/// legal call, and so are rows of no columns.
///
/// # Errors
/// Those of [`Norm::validate`]; [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride),
/// [`Error::Len`](crate::Error::Len); [`Error::Presence`](crate::Error::Presence) for a bias that the specification does not
/// have, or lacks. Nothing is written then.
///
/// Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
pub fn norm<T: Float, O: Float, const N: usize>(
    cpu: &mut Cpu,
    spec: &Norm,
    x: View<'_, T, N>,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    mut out: ViewMut<'_, O, N>,
) -> Result<()> {
    check_norm(spec, &x, weight, bias, &out)?;
    let shape = x.shape();
    // Without elements the other sizes may be anything, also too large for a product.
    if shape.contains(&0) {
        return Ok(());
    }
    let (rows, width) = (shape[..N - 1].iter().product(), shape[N - 1]);
    let kernel = NormRows { row: RowNorm::new(spec, weight, bias), x, out: SharedView::new(&mut out) };
    for_rows(cpu.level, rows, rows_per_item(2 * width), &kernel);
    Ok(())
}

struct NormRows<'a, T, O, const N: usize> {
    row: RowNorm<'a>,
    x: View<'a, T, N>,
    out: SharedView<'a, O, N>,
}

impl<T: Float, O: Float, const N: usize> RowKernel for NormRows<'_, T, O, N> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, _: usize, rows: Range<usize>) {
        for row in rows {
            let index = unravel(&self.x.shape(), row);
            // SAFETY: every row belongs to one item.
            let out = unsafe { self.out.row(&index[..N - 1]) };
            self.row.apply(simd, self.x.row(&index[..N - 1]), out);
        }
    }
}

/// A norm, ready for rows.
pub(super) struct RowNorm<'a> {
    kind: NormKind,
    eps: f64,
    weight_offset: f64,
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
}

impl<'a> RowNorm<'a> {
    pub(super) fn new(spec: &Norm, weight: Option<&'a [f32]>, bias: Option<&'a [f32]>) -> Self {
        RowNorm { kind: spec.kind, eps: spec.eps, weight_offset: spec.weight_offset, weight, bias }
    }

    /// One row into another.
    #[inline(always)]
    pub(super) fn apply<S: Simd, T: Float, O: Float>(&self, simd: S, x: &[T], out: &mut [O]) {
        let Some(moments) = self.moments(simd, x) else {
            return self.apply_f64(x, out);
        };
        let whole = x.len() / S::LANES * S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            let y = self.scale(simd, moments, T::load(simd, &x[at..]), at..at + S::LANES);
            O::store(simd, &mut out[at..], y);
        }
        if whole < x.len() {
            let y = self.scale(simd, moments, T::load_partial(simd, &x[whole..]), whole..x.len());
            O::store_partial(simd, &mut out[whole..], y);
        }
    }

    /// A row in place.
    #[inline(always)]
    pub(super) fn apply_in_place<S: Simd>(&self, simd: S, x: &mut [f32]) {
        let Some(moments) = self.moments(simd, x) else {
            return self.apply_in_place_f64(x);
        };
        let whole = x.len() / S::LANES * S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            let y = self.scale(simd, moments, simd.load(&x[at..]), at..at + S::LANES);
            simd.store(&mut x[at..], y);
        }
        if whole < x.len() {
            let y = self.scale(simd, moments, simd.load_partial(&x[whole..]), whole..x.len());
            simd.store_partial(&mut x[whole..], y);
        }
    }

    /// Some columns of a row, normalised.
    #[inline(always)]
    fn scale<S: Simd>(&self, simd: S, [mean, inverse]: [f32; 2], x: S::F32, columns: Range<usize>) -> S::F32 {
        let mut y = simd.mul(simd.sub(x, simd.splat(mean)), simd.splat(inverse));
        if let Some(weight) = self.weight {
            let offset = simd.splat(self.weight_offset as f32);
            y = simd.mul(y, simd.add(simd.load_partial(&weight[columns.clone()]), offset));
        }
        match self.bias {
            Some(bias) => simd.add(y, simd.load_partial(&bias[columns])),
            None => y,
        }
    }

    /// The mean (0 for an RMS norm) and `1 / sqrt(mean((x - mean)^2) + eps)`. `None` if the squares come near the ends of the
    /// range of f32, where they have lost bits or are infinite.
    #[inline(always)]
    fn moments<S: Simd, T: Float>(&self, simd: S, x: &[T]) -> Option<[f32; 2]> {
        let n = x.len() as f64;
        let mean = match self.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => (f64::from(sum::<S, T, false>(simd, x, 0.0)) / n) as f32,
        };
        let squares = sum::<S, T, true>(simd, x, mean);
        let inverse = (f64::from(squares) / n + self.eps).sqrt().recip();
        (1e-30..1e30).contains(&squares).then_some([mean, inverse as f32])
    }

    /// [`RowNorm::apply`] in f64.
    #[cold]
    fn apply_f64<T: Float, O: Float>(&self, x: &[T], out: &mut [O]) {
        let [mean, root] = self.moments_f64(x);
        for (i, (out, x)) in out.iter_mut().zip(x).enumerate() {
            *out = O::from_f64(self.scale_f64((x.to_f64() - mean) / root, i));
        }
    }

    /// [`RowNorm::apply_in_place`] in f64.
    #[cold]
    fn apply_in_place_f64(&self, x: &mut [f32]) {
        let [mean, root] = self.moments_f64(x);
        for (i, x) in x.iter_mut().enumerate() {
            *x = self.scale_f64((f64::from(*x) - mean) / root, i) as f32;
        }
    }

    fn scale_f64(&self, y: f64, i: usize) -> f64 {
        let factor = self.weight.map_or(1.0, |w| f64::from(w[i]) + self.weight_offset);
        y * factor + self.bias.map_or(0.0, |b| f64::from(b[i]))
    }

    /// The mean and `sqrt(mean((x - mean)^2) + eps)`.
    fn moments_f64<T: Float>(&self, x: &[T]) -> [f64; 2] {
        let n = x.len() as f64;
        let mean = match self.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => x.iter().map(|x| x.to_f64()).sum::<f64>() / n,
        };
        let squares = x.iter().map(|x| (x.to_f64() - mean).powi(2)).sum::<f64>();
        [mean, (squares / n + self.eps).sqrt()]
    }
}

/// The sum of `x - center` over a row, or of its square, in four vectors of partial sums.
#[inline(always)]
fn sum<S: Simd, T: Float, const SQUARE: bool>(simd: S, x: &[T], center: f32) -> f32 {
    let mut parts = [simd.zero(); 4];
    let whole = x.len() / (4 * S::LANES) * (4 * S::LANES);
    for at in (0..whole).step_by(4 * S::LANES) {
        for (i, part) in parts.iter_mut().enumerate() {
            *part = simd.add(*part, term::<S, SQUARE>(simd, T::load(simd, &x[at + i * S::LANES..]), center));
        }
    }
    for (part, tail) in parts.iter_mut().zip(x[whole..].chunks(S::LANES)) {
        let mut values = [0.0; MAX_LANES];
        simd.store(&mut values, term::<S, SQUARE>(simd, T::load_partial(simd, tail), center));
        // Lanes past the end of the row do not count.
        *part = simd.add(*part, simd.load_partial(&values[..tail.len()]));
    }
    simd.sum(simd.add(simd.add(parts[0], parts[1]), simd.add(parts[2], parts[3])))
}

#[inline(always)]
fn term<S: Simd, const SQUARE: bool>(simd: S, x: S::F32, center: f32) -> S::F32 {
    let d = simd.sub(x, simd.splat(center));
    if SQUARE { simd.mul(d, d) } else { d }
}

/// The residual sum: `out = x + multiplier * y`, one rounding to `O` at the end.
///
/// * `x`, `y`, `out`: `[num_tokens, hidden_size]`
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride), [`Error::Len`](crate::Error::Len). Nothing
/// is written then.
pub fn add<T: Float, O: Float>(
    cpu: &mut Cpu,
    x: View<'_, T, 2>,
    y: View<'_, T, 2>,
    multiplier: f64,
    mut out: ViewMut<'_, O, 2>,
) -> Result<()> {
    check_elementwise(&x, "y", &y, &out)?;
    let [rows, width] = x.shape();
    if rows == 0 || width == 0 {
        return Ok(());
    }
    let kernel = ZipRows { op: Residual(multiplier as f32), x, y, out: SharedView::new(&mut out) };
    for_rows(cpu.level, rows, rows_per_item(3 * width), &kernel);
    Ok(())
}

/// An output gate: `out = x * sigmoid(gate)`, one rounding to `O` at the end.
///
/// * `x`, `gate`, `out`: `[num_tokens, width]`
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride), [`Error::Len`](crate::Error::Len). Nothing
/// is written then.
pub fn sigmoid_mul<T: Float, O: Float>(
    cpu: &mut Cpu,
    x: View<'_, T, 2>,
    gate: View<'_, T, 2>,
    mut out: ViewMut<'_, O, 2>,
) -> Result<()> {
    check_elementwise(&x, "gate", &gate, &out)?;
    let [rows, width] = x.shape();
    if rows == 0 || width == 0 {
        return Ok(());
    }
    let kernel = ZipRows { op: Gate, x, y: gate, out: SharedView::new(&mut out) };
    for_rows(cpu.level, rows, rows_per_item(6 * width), &kernel);
    Ok(())
}

/// What becomes of two vectors.
trait Zip: Sync {
    fn eval<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32;
}

struct Residual(f32);

impl Zip for Residual {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, x: S::F32, y: S::F32) -> S::F32 {
        simd.fma(simd.splat(self.0), y, x)
    }
}

struct Gate;

impl Zip for Gate {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, x: S::F32, gate: S::F32) -> S::F32 {
        simd.mul(x, math::sigmoid(simd, gate))
    }
}

struct ZipRows<'a, F, T, O> {
    op: F,
    x: View<'a, T, 2>,
    y: View<'a, T, 2>,
    out: SharedView<'a, O, 2>,
}

impl<F: Zip, T: Float, O: Float> RowKernel for ZipRows<'_, F, T, O> {
    #[inline(always)]
    fn eval<S: Simd>(&self, simd: S, _: usize, rows: Range<usize>) {
        for row in rows {
            let (x, y) = (self.x.row(&[row]), self.y.row(&[row]));
            // SAFETY: every row belongs to one item.
            let out = unsafe { self.out.row(&[row]) };
            let whole = x.len() / S::LANES * S::LANES;
            for at in (0..whole).step_by(S::LANES) {
                O::store(simd, &mut out[at..], self.op.eval(simd, T::load(simd, &x[at..]), T::load(simd, &y[at..])));
            }
            if whole < x.len() {
                let (x, y) = (T::load_partial(simd, &x[whole..]), T::load_partial(simd, &y[whole..]));
                O::store_partial(simd, &mut out[whole..], self.op.eval(simd, x, y));
            }
        }
    }
}
