//! Norms, products and what else stands around attention and experts.

use crate::common::{assert_rows, naive};
use crate::on_devices;
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{
    ElementwiseArgs, ElementwiseOp, ElementwisePlan, ElementwiseProblem, NormArgs, NormPlan, NormProblem, Stream,
};
use gatefold::random::uniform;
use gatefold::spec::Norm;
use gatefold::{Element, View, ViewMut, reference};
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
