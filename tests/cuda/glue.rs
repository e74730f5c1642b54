//! Norms, products and what else stands around attention and experts.

use crate::common::glue_case::{AppendCase, NormCase as AnyNormCase, PairCase, QkvCase, RopeCase, WIDTHS};
use crate::common::pairs::pairwise;
use crate::common::simulator::Simulator;
use crate::common::{Array, Layout as Strides, Output, Rng, assert_rows, naive, seed};
use crate::{on_devices, on_gpu, staged, with_type};
use gatefold::args::{KvCache, KvCacheMut};
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{
    ElementwiseArgs, ElementwiseOp, ElementwisePlan, ElementwiseProblem, NormArgs, NormPlan, NormProblem, Stream,
};
use gatefold::random::uniform;
use gatefold::spec::{Norm, NormKind, QTemperature, QkNorm, QkvPrep, Rope, RopeStyle};
use gatefold::{Dtype, Element, View, ViewMut, reference};
use half::{bf16, f16};

// --- matrices ---------------------------------------------------------------------------------------------------------

/// What stands wherever no row is: kernels must leave it alone.
const GUARD: f32 = -77.0;

/// Rows with a distance between them, some elements behind the start of their memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    num_rows: usize,
    width: usize,
    stride: usize,
    lead: usize,
}

impl Layout {
    fn new(num_rows: usize, width: usize) -> Self {
        Layout { num_rows, width, stride: width, lead: 0 }
    }

    fn row(&self, row: usize) -> std::ops::Range<usize> {
        let start = self.lead + row * self.stride;
        start..start + self.width
    }

    fn len(&self) -> usize {
        self.lead + self.num_rows * self.stride + 16
    }

    /// Memory with these rows and guards around them.
    fn spread<T: Element>(&self, rows: &[T]) -> Vec<T> {
        let mut memory = vec![T::from_f32(GUARD); self.len()];
        for (i, row) in rows.chunks_exact(self.width).enumerate() {
            memory[self.row(i)].copy_from_slice(row);
        }
        memory
    }

    /// The rows, after checking the guards.
    fn gather<T: Element>(&self, memory: &[T]) -> Vec<T> {
        let mut guards = memory.to_vec();
        let mut rows = Vec::new();
        for i in 0..self.num_rows {
            rows.extend_from_slice(&memory[self.row(i)]);
            guards[self.row(i)].fill(T::from_f32(GUARD));
        }
        assert!(guards.iter().all(|x| x.to_f32() == GUARD), "written outside of the rows of {self:?}");
        rows
    }
}

/// A matrix on the device.
struct Matrix<'a> {
    buffer: Buffer<'a>,
    layout: Layout,
    ptr: u64,
}

impl<'a> Matrix<'a> {
    fn new<T: Element>(driver: &'a dyn Driver, layout: Layout, rows: &[T]) -> Self {
        let buffer = Buffer::from_slice(driver, &layout.spread(rows)).unwrap();
        let ptr = buffer.ptr() + (layout.lead * size_of::<T>()) as u64;
        Matrix { buffer, layout, ptr }
    }

    fn rows<T: Element>(&self) -> Vec<T> {
        self.layout.gather(&self.buffer.to_vec::<T>(Stream::LEGACY).unwrap())
    }
}

/// Numbers in `[-scale, scale)`, the same for the same seed.
fn random<T: Element>(seed: u64, len: usize, scale: f32) -> Vec<T> {
    (0..len as u64).map(|i| T::from_f32((uniform(seed, i, 0) * 2.0 - 1.0) * scale)).collect()
}

fn bits<T: Element>(data: &[T]) -> &[u8] {
    bytemuck::cast_slice(data)
}

// --- rms_norm ---------------------------------------------------------------------------------------------------------

/// One call of `rms_norm`.
#[derive(Clone, Copy, Debug)]
struct NormCase {
    layout: Layout,
    norm: Norm,
    weight: bool,
    /// Factor on `x` where a residual is added.
    residual: Option<f64>,
    in_place: bool,
    scale: f32,
}

impl NormCase {
    fn new(layout: Layout) -> Self {
        NormCase { layout, norm: Norm::rms(1e-6), weight: true, residual: None, in_place: false, scale: 2.0 }
    }
}

/// `out`, and `residual_out` where there is one, from the device.
fn run_norm<T: Element, W: Element>(
    driver: &dyn Driver,
    case: &NormCase,
    x: &[T],
    weight: &[W],
    residual: &[T],
) -> (Vec<T>, Option<Vec<T>>) {
    let Layout { num_rows, width, stride, lead } = case.layout;
    let mut problem = NormProblem::new(case.norm, T::DTYPE, num_rows, width);
    problem.weight_dtype = W::DTYPE;
    problem.residual_multiplier = case.residual.unwrap_or(1.0);
    problem.x_strides[2] = stride;
    problem.residual_stride = stride;
    problem.residual_out_stride = stride;
    problem.out_strides[2] = stride;
    let plan = NormPlan::new(&problem).unwrap();
    assert_eq!(plan.workspace_bytes(), 0);
    plan.warmup(driver).unwrap();

    let x = Matrix::new(driver, case.layout, x);
    let weight = Matrix::new(driver, Layout { lead, ..Layout::new(1, width) }, weight);
    let residual = Matrix::new(driver, case.layout, residual);
    let blank = vec![T::from_f32(0.0); num_rows * width];
    let out = Matrix::new(driver, case.layout, &blank);
    let sum = Matrix::new(driver, case.layout, &blank);
    let (out, sum) = if case.in_place { (&x, &residual) } else { (&out, &sum) };
    let mut args = NormArgs::new(x.ptr, out.ptr);
    if case.weight {
        args = args.with_weight(weight.ptr);
    }
    if case.residual.is_some() {
        args = args.with_residual(residual.ptr, sum.ptr);
    }
    // SAFETY: all matrices have the plan's shape and strides and outlive the reads below, which wait.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    (out.rows(), case.residual.map(|_| sum.rows()))
}

fn check_norm<T: Element, W: Element>(driver: &dyn Driver, case: &NormCase) {
    let Layout { num_rows, width, .. } = case.layout;
    let what = format!("{} with {} weights, {case:?}", T::DTYPE, W::DTYPE);
    let x: Vec<T> = random(1, num_rows * width, case.scale);
    let residual: Vec<T> = random(2, num_rows * width, case.scale);
    let weight: Vec<W> = random(3, width, 2.0);
    let (out, sum) = run_norm(driver, case, &x, &weight, &residual);

    let shape = [num_rows, width];
    let mut true_sum: Vec<f64> = x.iter().map(|x| x.to_f64()).collect();
    if let Some(factor) = case.residual {
        let (x, residual) = (View::new(&x, shape), View::new(&residual, shape));
        reference::add(residual, x, factor, ViewMut::new(&mut true_sum, shape)).unwrap();
    }
    let mut truth = vec![0.0; num_rows * width];
    let weight: Vec<f32> = weight.iter().map(|w| w.to_f32()).collect();
    let weight = case.weight.then_some(&weight[..]);
    reference::norm(&case.norm, View::new(&true_sum, shape), weight, None, ViewMut::new(&mut truth, shape)).unwrap();

    // The textbook method, rounded where the kernel stores.
    let mut stored = x.clone();
    if let Some(factor) = case.residual {
        let add = |(x, r): (&T, &T)| T::from_f32(r.to_f32() + factor as f32 * x.to_f32());
        stored = x.iter().zip(&residual).map(add).collect();
        assert_rows(&format!("residual_out, {what}"), &sum.unwrap(), &true_sum, &stored, width);
    }
    let naive: Vec<T> = naive::norm(&case.norm, &View::new(&stored, shape), weight, None);
    assert_rows(&format!("out, {what}"), &out, &truth, &naive, width);
}

/// Layouts around what one thread, one vector and one round of the kernel cover.
fn layouts(widths: &[usize]) -> Vec<Layout> {
    let mut layouts = Vec::new();
    for &width in widths {
        layouts.push(Layout::new(3, width));
        layouts.push(Layout { stride: width.next_multiple_of(8) + 8, ..Layout::new(2, width) });
        layouts.push(Layout { stride: width + 3, lead: 1, ..Layout::new(2, width) });
    }
    layouts
}

fn check_norms<T: Element, W: Element>(driver: &dyn Driver) {
    for layout in layouts(&[1, 3, 7, 8, 9, 64, 1023, 1024, 2048, 2056, 8192, 8200]) {
        check_norm::<T, W>(driver, &NormCase::new(layout));
    }
    for layout in layouts(&[40, 4104]) {
        let plain = NormCase::new(layout);
        for in_place in [false, true] {
            check_norm::<T, W>(driver, &NormCase { in_place, weight: false, ..plain });
            check_norm::<T, W>(driver, &NormCase { in_place, residual: Some(1.0), ..plain });
            check_norm::<T, W>(driver, &NormCase { in_place, residual: Some(0.22), weight: false, ..plain });
        }
        let mut norm = Norm::rms(1e-5);
        norm.weight_offset = 1.0;
        check_norm::<T, W>(driver, &NormCase { norm, ..plain });
        check_norm::<T, W>(driver, &NormCase { scale: 1e-4, ..plain });
        check_norm::<T, W>(driver, &NormCase { scale: 3e3, norm: Norm::rms(0.0), ..plain });
    }
}

#[test]
fn rms_norm() {
    on_devices(false, |driver| {
        check_norms::<bf16, f32>(driver);
        check_norms::<bf16, bf16>(driver);
        check_norms::<f16, f32>(driver);
        check_norms::<f16, f16>(driver);
        check_norms::<f32, f32>(driver);
    });
}

/// A token's bits do not depend on its neighbours, on the alignment of its row, or on the run; a NaN stays in its row.
fn check_norm_bits<T: Element>(driver: &dyn Driver) {
    for width in [8, 2048, 8216] {
        let x: Vec<T> = random(4, 5 * width, 2.0);
        let weight: Vec<f32> = random(5, width, 2.0);
        let run = |layout: Layout, x: &[T]| {
            let case = NormCase { residual: Some(0.5), ..NormCase::new(layout) };
            run_norm(driver, &case, x, &weight, x)
        };
        let (out, sum) = run(Layout::new(5, width), &x);
        assert_eq!(bits(&run(Layout::new(5, width), &x).0), bits(&out));
        let unaligned = run(Layout { stride: width + 1, lead: 1, ..Layout::new(5, width) }, &x);
        assert_eq!(bits(&unaligned.0), bits(&out), "{} of {width}", T::DTYPE);
        assert_eq!(bits(&unaligned.1.unwrap()), bits(&sum.unwrap()), "{} of {width}", T::DTYPE);
        let alone = run(Layout::new(1, width), &x[2 * width..3 * width]).0;
        assert_eq!(bits(&alone), bits(&out[2 * width..3 * width]), "{} of {width}", T::DTYPE);

        let mut poisoned = x.clone();
        poisoned[3 * width + 5] = T::from_f32(f32::NAN);
        let found = run(Layout::new(5, width), &poisoned).0;
        assert!(found[3 * width..4 * width].iter().all(|x| x.to_f32().is_nan()));
        assert_eq!(bits(&found[..3 * width]), bits(&out[..3 * width]));
        assert_eq!(bits(&found[4 * width..]), bits(&out[4 * width..]));
    }
}

#[test]
fn rms_norm_bits() {
    on_devices(true, |driver| {
        check_norm_bits::<bf16>(driver);
        check_norm_bits::<f16>(driver);
        check_norm_bits::<f32>(driver);
    });
}

// --- silu_mul ---------------------------------------------------------------------------------------------------------

/// `out` from the device. In place, `out` is `gate`; as halves, `gate` and `up` are the columns of one matrix.
fn run_silu<T: Element>(driver: &dyn Driver, layout: Layout, in_place: bool, gate: &[T], up: &[T]) -> Vec<T> {
    let Layout { num_rows, width, stride, .. } = layout;
    let mut problem = ElementwiseProblem::new(ElementwiseOp::SiluMul, T::DTYPE, num_rows, width);
    problem.x_stride = stride;
    problem.y_stride = stride;
    problem.out_stride = stride;
    let plan = ElementwisePlan::new(&problem).unwrap();
    assert_eq!(plan.workspace_bytes(), 0);
    plan.warmup(driver).unwrap();
    let gate = Matrix::new(driver, layout, gate);
    let up = Matrix::new(driver, layout, up);
    let out = Matrix::new(driver, layout, &vec![T::from_f32(0.0); num_rows * width]);
    let out = if in_place { &gate } else { &out };
    // SAFETY: all matrices have the plan's shape and strides and outlive the read below, which waits.
    unsafe { plan.launch(driver, &ElementwiseArgs::new(gate.ptr, up.ptr, out.ptr), Stream::LEGACY).unwrap() };
    out.rows()
}

fn check_silu<T: Element>(driver: &dyn Driver, layout: Layout, in_place: bool, gate: &[T], up: &[T]) {
    let shape = [layout.num_rows, layout.width];
    let mut truth = vec![0.0; gate.len()];
    let view = View::new(gate, shape);
    reference::sigmoid_mul(view, view, ViewMut::new(&mut truth, shape)).unwrap();
    truth.iter_mut().zip(up).for_each(|(truth, up)| *truth *= up.to_f64());
    let naive = |(g, u): (&T, &T)| T::from_f32(g.to_f32() / (1.0 + (-g.to_f32()).exp()) * u.to_f32());
    let naive: Vec<T> = gate.iter().zip(up).map(naive).collect();
    let found = run_silu(driver, layout, in_place, gate, up);
    assert_rows(&format!("{} {layout:?}", T::DTYPE), &found, &truth, &naive, layout.width);
}

fn check_silus<T: Element>(driver: &dyn Driver) {
    for layout in layouts(&[1, 3, 4, 7, 8, 9, 511, 512, 520, 1024, 1032, 2049]) {
        for (seed, scale) in [(6, 4.0), (7, 30.0)] {
            let len = layout.num_rows * layout.width;
            check_silu::<T>(driver, layout, seed == 7, &random(seed, len, scale), &random(8, len, 2.0));
        }
    }
    // One row each, so that each is measured by its own size: zeros, where exp overflows, where the result is subnormal.
    let special = [
        0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 87.0, -87.0, -88.5, -89.5, -95.0, -103.0, -105.0, -109.0, -111.0,
        -300.0, 1e30, -1e30, -3e38,
    ];
    let gate: Vec<T> = special.iter().map(|x| T::from_f32(*x)).collect();
    let up: Vec<T> = vec![T::from_f32(1.0); gate.len()];
    check_silu::<T>(driver, Layout::new(gate.len(), 1), false, &gate, &up);
    let infinite: Vec<T> = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0].map(T::from_f32).to_vec();
    check_silu::<T>(driver, Layout::new(1, 4), false, &infinite, &[1.0; 4].map(T::from_f32));
    check_silu::<T>(driver, Layout::new(1, 4), false, &[1.0; 4].map(T::from_f32), &infinite);
}

#[test]
fn silu_mul() {
    on_devices(false, |driver| {
        check_silus::<bf16>(driver);
        check_silus::<f16>(driver);
        check_silus::<f32>(driver);
    });
}

/// `gate` and `up` as halves of one matrix, the result over the gate; and the same bits wherever the rows lie.
fn check_silu_bits<T: Element>(driver: &dyn Driver) {
    let width = 1048;
    let both: Vec<T> = random(9, 3 * 2 * width, 4.0);
    let (gate, up): (Vec<&[T]>, Vec<&[T]>) = both.chunks_exact(2 * width).map(|row| row.split_at(width)).unzip();
    let (gate, up) = (gate.concat(), up.concat());
    let out = run_silu(driver, Layout::new(3, width), false, &gate, &up);
    let unaligned = Layout { stride: width + 1, lead: 1, ..Layout::new(3, width) };
    assert_eq!(bits(&run_silu(driver, unaligned, false, &gate, &up)), bits(&out), "{}", T::DTYPE);
    let alone = run_silu(driver, Layout::new(1, width), true, &gate[width..2 * width], &up[width..2 * width]);
    assert_eq!(bits(&alone), bits(&out[width..2 * width]), "{}", T::DTYPE);

    let mut problem = ElementwiseProblem::new(ElementwiseOp::SiluMul, T::DTYPE, 3, width);
    problem.x_stride = 2 * width;
    problem.y_stride = 2 * width;
    problem.out_stride = 2 * width;
    let memory = Matrix::new(driver, Layout::new(3, 2 * width), &both);
    let half = memory.ptr + (width * size_of::<T>()) as u64;
    let args = ElementwiseArgs::new(memory.ptr, half, memory.ptr);
    // SAFETY: `memory` holds both halves and outlives the read below, which waits.
    unsafe { ElementwisePlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
    for (i, row) in memory.rows::<T>().chunks_exact(2 * width).enumerate() {
        assert_eq!(bits(&row[..width]), bits(&out[i * width..(i + 1) * width]), "{}", T::DTYPE);
        assert_eq!(bits(&row[width..]), bits(&up[i * width..(i + 1) * width]), "{}", T::DTYPE);
    }
}

#[test]
fn silu_mul_bits() {
    on_devices(true, |driver| {
        check_silu_bits::<bf16>(driver);
        check_silu_bits::<f16>(driver);
        check_silu_bits::<f32>(driver);
    });
}

// --- far rows ---------------------------------------------------------------------------------------------------------

/// Two rows more than 2^31 elements apart, in place: offsets that do not fit 32 bits. Needs 4.3 GB on the device.
fn check_far_rows(driver: &dyn Driver) {
    let (width, stride) = (64, (1_usize << 31) + 64);
    let far = Buffer::new(driver, (stride + width) * 2).unwrap();
    let rows: Vec<bf16> = random(10, 2 * width, 2.0);
    let up: Vec<bf16> = random(11, 2 * width, 2.0);
    let addresses = [far.ptr(), far.ptr() + (stride * 2) as u64];
    let write = || {
        for (row, address) in rows.chunks_exact(width).zip(addresses) {
            // SAFETY: both addresses have room for a row, and nothing runs.
            unsafe { driver.copy_to_device(address, bits(row)).unwrap() };
        }
    };
    let read = || -> Vec<bf16> {
        driver.synchronize(Stream::LEGACY).unwrap();
        let mut found = vec![bf16::ZERO; 2 * width];
        for (row, address) in found.chunks_exact_mut(width).zip(addresses) {
            // SAFETY: both addresses hold a row, and nothing runs.
            unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(row), address).unwrap() };
        }
        found
    };

    write();
    let up_near = Matrix::new(driver, Layout::new(2, width), &up);
    let mut problem = ElementwiseProblem::new(ElementwiseOp::SiluMul, bf16::DTYPE, 2, width);
    problem.x_stride = stride;
    problem.out_stride = stride;
    let args = ElementwiseArgs::new(far.ptr(), up_near.ptr, far.ptr());
    // SAFETY: `far` holds two rows `stride` apart, `up_near` two contiguous ones.
    unsafe { ElementwisePlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
    let found = read();
    assert_eq!(bits(&found), bits(&run_silu(driver, Layout::new(2, width), false, &rows, &up)));

    write();
    let norm = Norm::rms(1e-6);
    let mut problem = NormProblem::new(norm, bf16::DTYPE, 2, width);
    problem.x_strides[2] = stride;
    problem.out_strides[2] = stride;
    // SAFETY: `far` holds two rows `stride` apart.
    unsafe {
        let plan = NormPlan::new(&problem).unwrap();
        plan.launch(driver, &NormArgs::new(far.ptr(), far.ptr()), Stream::LEGACY).unwrap();
    }
    let found = read();
    let near = NormCase { weight: false, ..NormCase::new(Layout::new(2, width)) };
    assert_eq!(bits(&found), bits(&run_norm::<bf16, f32>(driver, &near, &rows, &vec![0.0; width], &rows).0));
}

#[test]
fn far_rows() {
    on_devices(true, |driver| {
        check_far_rows(driver);
    });
}

// --- the cases of every backend ---------------------------------------------------------------------------------------

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];
const STYLES: [RopeStyle; 3] = [RopeStyle::Half, RopeStyle::Interleaved, RopeStyle::InterleavedToHalf];

/// Runs a check in the simulator, with and without errors of approximate instructions, and on a GPU where there is one. Seeds
/// differ from call to call.
fn with_seeds(count: usize, check: impl Fn(&dyn Driver, &mut Rng)) {
    let seed = seed();
    for exact in [false, true] {
        on_devices(exact, |driver| {
            let mut rng = Rng::new(seed ^ u64::from(exact));
            (0..count).for_each(|_| check(driver, &mut rng));
        });
    }
}

fn check_any_norm<T: Element>(
    driver: &dyn Driver,
    spec: &Norm,
    shape: [usize; 3],
    layout: Strides,
    weighted: bool,
    seed: u64,
) {
    let case = AnyNormCase::<T>::new(spec, shape, layout, weighted, seed);
    let (truth, naive) = case.expected::<T>();
    let norm = |case: &AnyNormCase<T>| case.run(|s, x, w, b, out| staged::norm(driver, s, x, w, b, out));
    let got = norm(&case);
    let what = format!("{} {spec:?} of {shape:?}, {layout:?}, weight {weighted}, seed {seed}", T::DTYPE);
    assert_rows(&what, &got, &truth, &naive, shape[2]);
    if shape[0] > 0 {
        let last = shape[0] - 1;
        let alone = norm(&case.alone(last));
        assert_eq!(bits(&alone), bits(&got[last * shape[1] * shape[2]..]), "alone, {what}");
    }
}

#[test]
fn norms() {
    with_seeds(60, |driver, rng| {
        let mut spec = Norm::rms(*rng.pick(&[1e-6, 1e-3]));
        spec.kind = *rng.pick(&[NormKind::Rms, NormKind::Layer]);
        spec.weight_offset = *rng.pick(&[0.0, 1.0]);
        spec.bias = spec.kind == NormKind::Layer && rng.chance(0.5);
        let shape = [rng.below(4), 1 + rng.below(3), *rng.pick(&WIDTHS)];
        let (layout, weighted) = (*rng.pick(&Strides::ALL), rng.chance(0.7));
        with_type!(*rng.pick(&DTYPES), check_any_norm(driver, &spec, shape, layout, weighted, rng.next()));
    });
}

/// Layer norm over several rounds of the kernel, in both alignments, with the same bits.
#[test]
fn layer_norms_of_wide_rows() {
    on_devices(true, |driver| {
        for width in [8192 + 8, 2 * 8192, 4096] {
            let mut spec = Norm::layer(1e-5);
            spec.bias = true;
            with_type!(Dtype::BF16, check_any_norm(driver, &spec, [2, 1, width], Strides::Padded, true, 3));
            with_type!(Dtype::F32, check_any_norm(driver, &spec, [2, 1, width], Strides::Contiguous, true, 4));
            let [contiguous, padded] = [Strides::Contiguous, Strides::Padded].map(|layout| {
                let case = AnyNormCase::<f16>::new(&spec, [2, 1, width], layout, true, 5);
                case.run(|s, x, w, b, out| staged::norm(driver, s, x, w, b, out))
            });
            assert_eq!(bits(&contiguous), bits(&padded));
        }
    });
}

/// Views of one and of four dimensions; five are refused.
#[test]
fn norms_of_other_dimensions() {
    on_devices(true, |driver| {
        let values: Vec<f32> = random(20, 2 * 3 * 4 * 24, 2.0);
        let weight: Vec<f32> = random(21, 24, 1.0);
        let norm = Norm::layer(1e-6);
        let x = Array::new([2, 3, 4, 24], Strides::Permuted, &values);
        let mut out = Output::new([2, 3, 4, 24], Strides::Permuted);
        staged::norm(driver, &norm, x.view(), Some(&weight), None, out.view()).unwrap();
        let got = out.finish("out");
        for (row, x) in values.chunks_exact(24).enumerate() {
            let mut out = Output::new([24], Strides::Contiguous);
            staged::norm(driver, &norm, View::new(x, [24]), Some(&weight), None, out.view()).unwrap();
            assert_eq!(bits(&out.finish("out")), bits(&got[24 * row..][..24]));
        }
        let mut out = [0.0; 24];
        let x = View::new(&values, [1, 1, 1, 1, 24]);
        let error = staged::norm(driver, &norm, x, None, None, ViewMut::new(&mut out, [1, 1, 1, 1, 24])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unsupported by cuda: a norm of an array with more than three leading dimensions"
        );
    });
}

/// Rows whose squares f32 cannot hold, with and without an epsilon.
#[test]
fn norms_of_very_large_and_very_small_rows() {
    on_devices(true, |driver| {
        for eps in [0.0, 1e-6, 1e-30] {
            for scale in [1e-42f32, 1e-30, 1e-20, 1e18, 1e25, 3e38] {
                for spec in [Norm::rms(eps), Norm::layer(eps)] {
                    let x: Vec<f32> = (0..70).map(|i| scale * ((i * 37 % 70) as f32 / 70.0 - 0.4)).collect();
                    let shape = [1, 70];
                    let x = View::new(&x, shape);
                    let (mut truth, mut got) = ([0.0; 70], [0.0f32; 70]);
                    reference::norm::<_, f32, 2>(&spec, x, None, None, ViewMut::new(&mut truth, shape)).unwrap();
                    staged::norm(driver, &spec, x, None, None, ViewMut::new(&mut got, shape)).unwrap();
                    for (got, truth) in got.iter().zip(&truth) {
                        let close = (f64::from(*got) - truth).abs() <= 1e-6 * (1.0 + truth.abs());
                        assert!(close, "{spec:?} of {scale:e}: {got:e}, expected {truth:e}");
                    }
                }
            }
        }
    });
}

fn check_elementwise<T: Element>(driver: &dyn Driver, shape: [usize; 2], layout: Strides, multiplier: f64, seed: u64) {
    let case = PairCase::<T>::new(shape, layout, seed);
    let what = format!("{} {shape:?} {layout:?} {multiplier}, seed {seed}", T::DTYPE);
    let (truth, naive) = case.sum(multiplier);
    let got = case.run::<T>(|x, y, out| staged::add(driver, x, y, multiplier, out));
    assert_rows(&format!("add, {what}"), &got, &truth, &naive, shape[1]);
    let (truth, naive) = case.gated();
    let got = case.run::<T>(|x, y, out| staged::sigmoid_mul(driver, x, y, out));
    assert_rows(&format!("sigmoid_mul, {what}"), &got, &truth, &naive, shape[1]);
}

#[test]
fn elementwise() {
    with_seeds(40, |driver, rng| {
        let shape = [rng.below(4), *rng.pick(&WIDTHS)];
        let (layout, multiplier) = (*rng.pick(&Strides::ALL), *rng.pick(&[1.0, 0.22, -3.0]));
        with_type!(*rng.pick(&DTYPES), check_elementwise(driver, shape, layout, multiplier, rng.next()));
    });
}

fn check_rope<T: Element>(
    driver: &dyn Driver,
    shape: [usize; 3],
    style: RopeStyle,
    rotary_dim: usize,
    layout: Strides,
    seed: u64,
) {
    let case = RopeCase::<T>::new(shape, style, rotary_dim, layout, seed);
    let (truth, naive) = case.expected();
    let got = case.run::<T>(|s, x, p, table, out| staged::rope(driver, s, x, p, table, out));
    let what = format!("{} {shape:?} {style:?} {rotary_dim} {layout:?}, seed {seed}", T::DTYPE);
    assert_rows(&what, &got, &truth, &naive, shape[2]);
}

#[test]
fn rotations() {
    let dims = [(2, 2), (8, 4), (16, 16), (33, 20), (64, 64), (64, 32), (80, 80), (128, 128), (130, 66), (1040, 1040)];
    with_seeds(60, |driver, rng| {
        let (dim, rotary_dim) = *rng.pick(&dims);
        let shape = [rng.below(4), 1 + rng.below(4), dim];
        let (style, layout) = (*rng.pick(&STYLES), *rng.pick(&Strides::ALL));
        with_type!(*rng.pick(&DTYPES), check_rope(driver, shape, style, rotary_dim, layout, rng.next()));
    });
}

// --- q, k and v -------------------------------------------------------------------------------------------------------

fn check_prepare_qkv<T: Element>(driver: &dyn Driver, spec: &QkvPrep, n: usize, layout: Strides, seed: u64) {
    let case = QkvCase::<T>::new(spec, n, layout, seed);
    let expected = case.expected();
    let prepare = |case: &QkvCase<T>| case.run::<T>(|s, input, out| staged::prepare_qkv(driver, s, input, out));
    let [q, k, v] = prepare(&case);
    let what = format!("{} {spec:?}, {n} tokens, {layout:?}, seed {seed}", T::DTYPE);
    expected.check(&what, spec.head_dim, [&q, &k, &v]);
    if n > 1 {
        let alone = prepare(&case.alone(n - 1));
        assert_eq!(bits(&alone[0]), bits(&q[q.len() - alone[0].len()..]), "q alone, {what}");
        assert_eq!(bits(&alone[1]), bits(&k[k.len() - alone[1].len()..]), "k alone, {what}");
    }
}

/// Every pair of two options of [`QkvPrep`], element type and layout.
#[test]
fn prepared_qkv() {
    let heads = [(1, 1), (4, 2), (6, 1), (3, 3)];
    let dims = [(8, 8, 8), (16, 16, 8), (33, 20, 32), (64, 64, 64), (80, 40, 20), (128, 128, 128), (256, 64, 64)];
    let norms = [None, Some(QkNorm::PerHead), Some(QkNorm::Full), Some(QkNorm::L2AfterRope)];
    let tokens = [0, 1, 2, 5];
    let sizes = [heads.len(), dims.len(), norms.len(), 2, 3, 4, 2, tokens.len(), 3, 3];
    for approx in [true, false] {
        let table = pairwise(&sizes, seed() ^ u64::from(approx), |_| true);
        println!("prepare_qkv: {} of {} pairs in {} calls", table.covered, table.total, table.rows.len());
        assert_eq!(table.covered, table.total);
        on_devices(!approx, |driver| {
            for (i, row) in table.rows.iter().enumerate() {
                let ((heads, kv_heads), (dim, value_dim, rotary_dim)) = (heads[row[0]], dims[row[1]]);
                let mut spec = QkvPrep::new(heads, kv_heads, dim);
                (spec.value_dim, spec.qk_norm) = (value_dim, norms[row[2]]);
                spec.norm.weight_offset = row[3] as f64;
                spec.clip = [None, Some(0.5), Some(2.0)][row[4]];
                spec.rope = (row[5] > 0).then(|| Rope::new(STYLES[row[5] - 1], rotary_dim, 1000.0));
                spec.q_temperature = (row[6] > 0).then(|| QTemperature::new(8.0, 0.1));
                let (n, layout, seed) = (tokens[row[7]], Strides::ALL[row[8]], i as u64);
                with_type!(DTYPES[row[9]], check_prepare_qkv(driver, &spec, n, layout, seed));
            }
        });
    }
}

/// Aligned and unaligned kernels give the same bits.
#[test]
fn prepared_qkv_bits() {
    on_devices(true, |driver| {
        for norm in [QkNorm::PerHead, QkNorm::Full, QkNorm::L2AfterRope] {
            for style in STYLES {
                let mut spec = QkvPrep::new(4, 2, 128);
                (spec.qk_norm, spec.rope) = (Some(norm), Some(Rope::new(style, 64, 1000.0)));
                let run = |layout| {
                    let mut case = QkvCase::<bf16>::new(&spec, 3, layout, 30);
                    case.tables = case.tables.map(|table| table.with_layout(layout));
                    case.run::<bf16>(|s, input, out| staged::prepare_qkv(driver, s, input, out)).concat()
                };
                assert_eq!(bits(&run(Strides::Contiguous)), bits(&run(Strides::Padded)), "{norm:?} {style:?}");
            }
        }
    });
}

fn check_append<T: Element>(driver: &dyn Driver) {
    for layout in Strides::ALL {
        for paged in [false, true] {
            // Those of latent attention have keys alone.
            for dims in [[16, 5], [64, 64], [8, 24], [80, 0], [13, 0]] {
                let case = AppendCase::<T>::new(3, dims, paged, layout, 31);
                let want = case.run(reference::kv_append);
                let got = case.run(|input, cache| staged::kv_append(driver, input, cache));
                assert_eq!(bits(&got), bits(&want), "{} {layout:?}, paged: {paged}, {dims:?}", T::DTYPE);
            }
        }
    }
}

#[test]
fn kv_append_copies() {
    on_devices(true, |driver| {
        check_append::<bf16>(driver);
        check_append::<f16>(driver);
        check_append::<f32>(driver);
    });
}

/// A copy keeps every bit of a NaN.
#[test]
fn kv_append_keeps_nans() {
    on_devices(true, |driver| {
        let x: Vec<bf16> = (0..16u16).map(|i| bf16::from_bits(0x7F81 + 3 * i + ((i & 1) << 15))).collect();
        let mut cache = [[bf16::ZERO; 32]; 2];
        let [k, v] = &mut cache;
        let new = View::new(&x, [1, 1, 16]);
        let cache_views = KvCacheMut::contiguous(ViewMut::new(k, [1, 2, 1, 16]), ViewMut::new(v, [1, 2, 1, 16]));
        staged::kv_append(driver, &KvCache::new(new, new, None, &[1]), cache_views).unwrap();
        for cache in &cache {
            assert_eq!(bits(&cache[16..]), bits(&x));
            assert_eq!(bits(&cache[..16]), bits(&[bf16::ZERO; 16]));
        }
    });
}

/// The fused call writes what the two calls write, bit for bit, contiguous and paged.
#[test]
fn prepared_into_the_cache() {
    on_devices(true, |driver| {
        for (norm, paged) in [QkNorm::PerHead, QkNorm::Full, QkNorm::L2AfterRope].into_iter().zip([true, false, true]) {
            let mut spec = QkvPrep::new(6, 3, 64);
            (spec.value_dim, spec.qk_norm, spec.clip) = (32, Some(norm), Some(2.0));
            spec.rope = Some(Rope::new(RopeStyle::Half, 32, 1000.0));
            let layout = if paged { Strides::Padded } else { Strides::Contiguous };
            let case = QkvCase::<f16>::new(&spec, 11, layout, 32);
            let mut append = AppendCase::<f16>::new(3, [64, 32], paged, layout, 33);
            let [q, k, v] = case.run::<f16>(|s, input, out| staged::prepare_qkv(driver, s, input, out));
            append.new = [Array::new([11, 3, 64], layout, &k), Array::new([11, 3, 32], layout, &v)];
            let want = append.run(|input, cache| staged::kv_append(driver, input, cache));
            let mut out = Output::new([11, 6, 64], layout);
            let got = append.run_into(|cache| {
                let rows = (Some(&append.cu_seqlens[..]), &append.kv_lens[..]);
                staged::prepare_qkv_append(driver, &spec, &case.input(), rows, out.view(), cache)
            });
            assert_eq!(bits(&out.finish("q")), bits(&q));
            assert_eq!(bits(&got), bits(&want));
        }
    });
}

/// Lengths, prefix sums and pages from the device that lead out of the arrays: nothing is written there, and rows that have a
/// place get it.
#[test]
fn append_out_of_range() {
    on_devices(true, |driver| {
        let x: Vec<f32> = random(34, 6 * 8, 2.0);
        let new = View::new(&x, [6, 1, 8]);
        // Pages of 2 rows, 3 pages; sequence 0 has room for its first row only, sequence 1 names a page that does not exist.
        type Case<'a> = (&'a [u32], [u32; 2], [u32; 4], [Option<usize>; 6]);
        let cases: [Case<'_>; 5] = [
            (&[0, 2, 6], [3, 0], [0, 1, 7, 2], [Some(3), None, None, None, Some(4), Some(5)]),
            (&[0, 2, 6], [u32::MAX, 2], [0, 1, 7, 2], [None, None, Some(4), Some(5), None, None]),
            (&[0, 9, 6], [0, 0], [0, 1, 2, 2], [Some(0), Some(1), Some(2), Some(3), None, None]),
            (&[3, 4, 5], [0, 0], [0, 1, 2, u32::MAX], [None, None, None, Some(0), Some(4), None]),
            (&[u32::MAX, 0, 0], [0, 0], [0, 1, 2, 2], [None; 6]),
        ];
        for (sums, lens, table, places) in cases {
            let mut cache = [[0.0f32; 48]; 2];
            let [k, v] = &mut cache;
            let table = View::new(&table, [2, 2]);
            let views = KvCacheMut::paged(ViewMut::new(k, [3, 2, 1, 8]), ViewMut::new(v, [3, 2, 1, 8]), table);
            staged::kv_append(driver, &KvCache::new(new, new, Some(sums), &lens), views).unwrap();
            let mut want = [0.0; 48];
            for (token, place) in places.iter().enumerate() {
                if let Some(place) = place {
                    want[8 * place..][..8].copy_from_slice(&x[8 * token..][..8]);
                }
            }
            assert_eq!(cache, [want; 2], "{sums:?} {lens:?} {table:?}");
        }
    });
}

/// Positions beyond the table count as its last row.
#[test]
fn positions_out_of_range() {
    on_devices(true, |driver| {
        let run = |positions: &[u32]| {
            let mut case = RopeCase::<f32>::new([2, 2, 16], RopeStyle::Interleaved, 16, Strides::Padded, 35);
            case.positions = positions.to_vec();
            case.run::<f32>(|s, x, p, table, out| staged::rope(driver, s, x, p, table, out))
        };
        assert_eq!(bits(&run(&[50, u32::MAX])), bits(&run(&[49, 49])));
    });
}

/// The temperature of far positions: whole steps, however far.
#[test]
fn temperature_of_far_positions() {
    on_devices(true, |driver| {
        let mut spec = QkvPrep::new(1, 1, 1);
        for floor_scale in [1.0, 3.0, 8192.0, 4294967295.0] {
            spec.q_temperature = Some(QTemperature::new(floor_scale, 0.7));
            let mut case = QkvCase::<f32>::new(&spec, 8, Strides::Contiguous, 36);
            case.positions = vec![0, 1, 8190, 8191, 16383, 16_777_216, u32::MAX - 1, u32::MAX];
            (0..8).for_each(|t| case.q.set([t, 0, 0], 1.0));
            let expected = case.expected();
            let [q, k, v] = case.run::<f32>(|s, input, out| staged::prepare_qkv(driver, s, input, out));
            expected.check(&format!("floor_scale {floor_scale}"), 1, [&q, &k, &v]);
        }
    });
}

// --- counters ---------------------------------------------------------------------------------------------------------

/// What one launch costs: warp instructions, wavefronts of shared memory, sectors of global memory; no bank conflict. With `whole`
/// every sector is used whole.
fn cost(simulator: &Simulator, whole: bool) -> (&'static str, [u64; 3]) {
    let [(entry, c)] = simulator.take_counters()[..] else { panic!("one launch") };
    assert_eq!(c.shared_wavefronts, c.shared_ideal_wavefronts, "{entry}: bank conflicts");
    assert!(!whole || c.global_bytes == 32 * c.global_sectors, "{entry}: sectors that are not used whole");
    (entry, [c.instructions, c.shared_wavefronts, c.global_sectors])
}

/// 4 rows of 4096 columns: no array is read more often than it must be, and no more instructions than these.
#[test]
fn glue_counters() {
    let (rows, width) = (4, 4096);
    let elements = (rows * width) as u64;
    let simulator = &Simulator::new(false);
    let (mut found, mut sectors) = (Vec::new(), Vec::new());
    let x: Vec<bf16> = random(40, rows * width, 2.0);
    let f32s: Vec<f32> = random(41, rows * width, 2.0);
    let weight: Vec<f32> = random(42, width, 2.0);

    run_silu(simulator, Layout::new(rows, width), false, &x, &x);
    found.push(cost(simulator, true));
    run_silu(simulator, Layout::new(rows, width), false, &f32s, &f32s);
    found.push(cost(simulator, true));
    sectors.extend([3 * elements * 2 / 32, 3 * elements * 4 / 32]);
    // A norm reads its rows twice: the sums need all of a row. With a residual it reads what it has stored.
    let case = NormCase::new(Layout::new(rows, width));
    // Two vectors of f32 weights for one of bf16: each request uses half of its sectors, and the next one the other half.
    let weights = elements * 4 / 32;
    run_norm(simulator, &case, &x, &weight, &x);
    found.push(cost(simulator, false));
    run_norm(simulator, &NormCase { residual: Some(1.0), ..case }, &x, &weight, &x);
    found.push(cost(simulator, false));
    run_norm(simulator, &case, &f32s, &weight, &f32s);
    found.push(cost(simulator, true));
    run_norm(simulator, &NormCase { layout: Layout { lead: 1, ..case.layout }, ..case }, &x, &weight, &x);
    found.push(cost(simulator, false));
    let x_bytes = elements * 2;
    sectors.extend([3 * x_bytes / 32 + 2 * weights, 5 * x_bytes / 32 + 2 * weights, 3 * elements * 4 / 32 + weights]);

    let expected = [
        ("gatefold_elementwise_bf16", [10624, 0, 3072]),
        ("gatefold_elementwise_f32", [25856, 0, 6144]),
        ("gatefold_norm_bf16_f32", [20480, 288, 7168]),
        ("gatefold_norm_bf16_f32", [27136, 288, 9216]),
        ("gatefold_norm_f32", [13056, 288, 8192]),
        ("gatefold_norm_bf16_f32_unaligned", [23712, 288, 41152]),
    ];
    for (entry, cost) in &found {
        println!("{entry}: {cost:?}, {:.3} instructions per element", cost[0] as f64 / elements as f64);
    }
    assert_eq!(found[..sectors.len()].iter().map(|(_, cost)| cost[2]).collect::<Vec<_>>(), sectors);
    assert_eq!(found, expected);
}

/// 8 tokens of 8 heads of queries, 2 of keys and values, 128 wide: a copy moves each sector once.
#[test]
fn qkv_counters() {
    let simulator = &Simulator::new(false);
    let mut found = Vec::new();
    let (n, heads, kv_heads, dim) = (8, 8, 2, 128);
    for (norm, rope) in [
        (None, false),
        (None, true),
        (Some(QkNorm::PerHead), true),
        (Some(QkNorm::L2AfterRope), true),
        (Some(QkNorm::Full), true),
    ] {
        let mut spec = QkvPrep::new(heads, kv_heads, dim);
        spec.qk_norm = norm;
        spec.rope = rope.then(|| Rope::new(RopeStyle::Half, dim, 1000.0));
        let mut case = QkvCase::<bf16>::new(&spec, n, Strides::Contiguous, 43);
        case.tables = case.tables.map(|table| table.with_layout(Strides::Contiguous));
        case.run::<bf16>(|s, input, out| staged::prepare_qkv(simulator, s, input, out));
        let (entry, cost) = cost(simulator, false);
        found.push((norm, rope, cost));
        assert_eq!(entry, "gatefold_qkv_bf16");
    }
    let elements = (n * (heads + 2 * kv_heads) * dim) as f64;
    for (norm, rope, cost) in &found {
        println!("{norm:?}, rotation {rope}: {cost:?}, {:.3} instructions per element", cost[0] as f64 / elements);
    }
    // Copies move each sector once, in and out.
    assert_eq!(found[0].2[2], (2 * n * (heads + 2 * kv_heads) * dim * 2 / 32) as u64);
    let expected = [
        (None, false, [3652, 0, 1536]),
        (None, true, [6652, 0, 2324]),
        (Some(QkNorm::PerHead), true, [11192, 0, 3604]),
        (Some(QkNorm::L2AfterRope), true, [11512, 0, 3732]),
        (Some(QkNorm::Full), true, [35928, 320, 5568]),
    ];
    assert_eq!(found, expected);
}

/// Rows of DeepSeek-V3 and heads of Qwen3-30B-A3B (`tests/configs`), where there is a GPU.
#[test]
fn real_sizes() {
    on_gpu(|driver| {
        check_any_norm::<bf16>(driver, &Norm::rms(1e-6), [512, 1, 7168], Strides::Contiguous, true, 1);
        check_any_norm::<f32>(driver, &Norm::layer(1e-5), [512, 1, 7168], Strides::Contiguous, true, 2);
        let mut spec = QkvPrep::new(32, 4, 128);
        (spec.qk_norm, spec.rope) = (Some(QkNorm::PerHead), Some(Rope::new(RopeStyle::Half, 128, 1e6)));
        check_prepare_qkv::<bf16>(driver, &spec, 1024, Strides::Contiguous, 3);
        check_prepare_qkv::<f32>(driver, &spec, 1024, Strides::Contiguous, 4);
    });
}
