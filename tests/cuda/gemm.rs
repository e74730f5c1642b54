//! Matrix products: linear layers, and rows in groups with a weight matrix each.

use crate::common::sums::{assert_sums, naive_sum, starts_for};
use crate::common::{Layout, Output, Rng};
use crate::{on_devices, staged};
use gatefold::cuda::driver::Driver;
use gatefold::{Element, View, ViewMut};
use half::{bf16, f16};

// --- linear -----------------------------------------------------------------------------------------------------------

/// One call of `linear`, or of `linear_heads` with more than one head.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    heads: usize,
    outputs: usize,
    inputs: usize,
    /// Of `x` and the weight: rows at multiples of 16 bytes; `true`: with gaps.
    gaps: bool,
    out: Layout,
    bias: bool,
    seed: u64,
}

impl Case {
    fn new(tokens: usize, outputs: usize, inputs: usize) -> Self {
        let out = Layout::Contiguous;
        Case { tokens, heads: 1, outputs, inputs, gaps: false, out, bias: false, seed: 1 }
    }
}

/// `[a, b, c]` in rows that begin at multiples of 16 bytes, NaN in the gaps.
struct Aligned<T> {
    data: Vec<T>,
    shape: [usize; 3],
    strides: [usize; 3],
}

impl<T: Element> Aligned<T> {
    fn new(shape: [usize; 3], gaps: bool, values: &[T]) -> Self {
        let [a, b, c] = shape;
        let row = if gaps { c + 8 } else { c };
        let strides = [b * row + if gaps { 16 } else { 0 }, row, 1];
        let mut data = vec![T::from_f32(f32::NAN); a * strides[0]];
        for (i, values) in values.chunks_exact(c).enumerate() {
            let start = i / b * strides[0] + i % b * row;
            data[start..start + c].copy_from_slice(values);
        }
        Aligned { data, shape, strides }
    }

    fn view(&self) -> View<'_, T, 3> {
        View::with_strides(&self.data, self.shape, self.strides)
    }
}

/// A head's rows alone.
fn first_head<T>(view: View<'_, T, 3>, heads_at: usize) -> View<'_, T, 2> {
    let (shape, strides) = (view.shape(), view.strides());
    let at = 1 - heads_at;
    View::with_strides(view.data(), [shape[at], shape[2]], [strides[at], 1])
}

fn run<T: Element, O: Element>(
    driver: &dyn Driver,
    case: &Case,
    x: &[T],
    weight: &[T],
    bias: Option<&[f32]>,
) -> Vec<O> {
    let Case { tokens, heads, outputs, inputs, .. } = *case;
    let x = Aligned::new([tokens, heads, inputs], case.gaps, x);
    let weight = Aligned::new([heads, outputs, inputs], case.gaps, weight);
    let mut out = Output::<O, 3>::new([tokens, heads, outputs], case.out);
    if heads == 1 {
        let mut view = out.view();
        let strides = view.strides();
        let view = ViewMut::with_strides(view.data_mut(), [tokens, outputs], [strides[0], 1]);
        staged::linear(driver, first_head(x.view(), 1), first_head(weight.view(), 0), bias, view).unwrap();
    } else {
        staged::linear_heads(driver, x.view(), weight.view(), out.view()).unwrap();
    }
    out.finish("out")
}

fn check<T: Element, O: Element>(driver: &dyn Driver, case: &Case) {
    let Case { tokens, heads, outputs, inputs, .. } = *case;
    let mut rng = Rng::new(case.seed);
    let x = rng.normals::<T>(tokens * heads * inputs, 1.0);
    let weight = rng.normals::<T>(heads * outputs * inputs, 1.0);
    let bias: Option<Vec<f32>> = (case.bias && heads == 1).then(|| rng.normals(outputs, 1.0));
    let (mut truth, mut naive, mut terms) = (Vec::new(), Vec::new(), Vec::new());
    let starts = starts_for(tokens * heads * outputs);
    for (i, x) in x.chunks_exact(inputs).enumerate() {
        for o in 0..outputs {
            let w = &weight[(i % heads * outputs + o) * inputs..][..inputs];
            let bias = bias.as_ref().map_or(0.0, |b| b[o]);
            let exact = x.iter().zip(w).map(|(x, w)| x.to_f64() * w.to_f64()).sum::<f64>() + f64::from(bias);
            terms.clear();
            terms.extend(x.iter().zip(w).map(|(x, w)| x.to_f32() * w.to_f32()));
            truth.push(exact);
            naive.push(O::from_f32(naive_sum(&terms, bias, exact, starts)));
        }
    }
    let found = run::<T, O>(driver, case, &x, &weight, bias.as_deref());
    let what = format!("{case:?} {:?} -> {:?}", T::DTYPE, O::DTYPE);
    assert_sums(&what, &found, &truth, &naive, outputs);
}

fn check_linears<T: Element, O: Element>(driver: &dyn Driver) {
    for (i, tokens) in [1, 15, 16, 17, 33, 64, 129].into_iter().enumerate() {
        for (j, outputs) in [1, 8, 63, 130].into_iter().enumerate() {
            let mut case = Case::new(tokens, outputs, [8, 64, 72, 200][(i + j) % 4]);
            case.gaps = (i + j) % 2 == 1;
            case.out = Layout::ALL[(i + 2 * j) % 3];
            case.bias = i % 2 == 0;
            case.seed = (10 * i + j) as u64;
            check::<T, O>(driver, &case);
        }
    }
}

#[test]
fn linear() {
    on_devices(false, |driver| {
        check_linears::<bf16, bf16>(driver);
        check_linears::<bf16, f32>(driver);
        check_linears::<f16, f16>(driver);
        check_linears::<f16, f32>(driver);
        check_linears::<f32, f32>(driver);
    });
}
