//! Glue and linear attention on arrays whose rows lie more than 2^31 elements apart, every one of them, in memory that the
//! simulator does not fill: the same bits as on small ones. A GPU has not so much, so these run in the simulator only. Far offsets
//! wrote to wrong places without a word in Dao-AILab/flash-attention#1500, #1311 and fla-org/flash-linear-attention#1080.

use crate::common::Rng;
use crate::common::simulator::Simulator;
use bytemuck::Pod;
use gatefold::Element;
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{
    ElementwiseArgs, ElementwiseOp, ElementwisePlan, ElementwiseProblem, NormArgs, NormPlan, NormProblem, QkvArgs,
    QkvCache, QkvPlan, QkvProblem, RetentionArgs, RetentionPlan, RetentionProblem, Stream, WkvArgs, WkvPlan,
    WkvProblem,
};
use gatefold::spec::{Norm, QTemperature, QkNorm, QkvPrep, Retention, RetentionForm, Rope, RopeStyle};
use half::{bf16, f16};

/// Rows stay at multiples of 16 bytes.
const FAR: usize = (1 << 31) + 64;

/// `[.., width]`: the innermost rows `distance` elements apart, the dimensions around them after one another.
struct Far<'a> {
    driver: &'a dyn Driver,
    buffer: Buffer<'a>,
    /// First elements of the rows, row-major.
    rows: Vec<usize>,
    width: usize,
    /// Of the leading dimensions.
    strides: Vec<usize>,
}

impl<'a> Far<'a> {
    /// With row-major values; without any it is an output.
    fn new<T: Pod>(driver: &'a dyn Driver, shape: &[usize], distance: usize, values: &[T]) -> Self {
        let (width, leading) = (shape[shape.len() - 1], &shape[..shape.len() - 1]);
        let mut strides = vec![distance; leading.len()];
        for i in (1..leading.len()).rev() {
            strides[i - 1] = strides[i] * leading[i];
        }
        let mut rows = vec![0];
        for (n, stride) in leading.iter().zip(&strides) {
            rows = rows.iter().flat_map(|row| (0..*n).map(move |i| row + i * stride)).collect();
        }
        let buffer = Buffer::new(driver, (rows[rows.len() - 1] + width) * size_of::<T>()).unwrap();
        for (row, values) in rows.iter().zip(values.chunks_exact(width)) {
            let address = buffer.ptr() + (row * size_of::<T>()) as u64;
            // SAFETY: the buffer has room for the row, and nothing runs.
            unsafe { driver.copy_to_device(address, bytemuck::cast_slice(values)).unwrap() };
        }
        Far { driver, buffer, rows, width, strides }
    }

    fn ptr(&self) -> u64 {
        self.buffer.ptr()
    }

    /// Strides of `N` leading dimensions.
    fn strides<const N: usize>(&self) -> [usize; N] {
        self.strides[..].try_into().unwrap()
    }

    /// The values, row-major.
    fn values<T: Pod>(&self) -> Vec<T> {
        self.driver.synchronize(Stream::LEGACY).unwrap();
        let mut values = vec![T::zeroed(); self.rows.len() * self.width];
        for (row, values) in self.rows.iter().zip(values.chunks_exact_mut(self.width)) {
            let address = self.ptr() + (row * size_of::<T>()) as u64;
            // SAFETY: the buffer holds the row, and nothing runs.
            unsafe { self.driver.copy_to_host(bytemuck::cast_slice_mut(values), address).unwrap() };
        }
        values
    }
}

fn bits<T: Pod>(data: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(data).to_vec()
}

/// The same bits for rows that are near, far, and far without alignment.
fn check<const N: usize>(run: impl Fn(&dyn Driver, usize) -> [Vec<u8>; N]) {
    let simulator = Simulator::new(false);
    let near = run(&simulator, 64);
    assert!(near.iter().flatten().any(|byte| *byte != 0));
    for distance in [FAR, FAR + 1] {
        assert!(run(&simulator, distance) == near, "rows {distance} elements apart");
    }
}

fn check_elementwise<T: Element>(op: ElementwiseOp) {
    let shape = [3, 40];
    check(|driver, distance| {
        let mut rng = Rng::new(1);
        let [x, y] = [(); 2].map(|()| Far::new(driver, &shape, distance, &rng.normals::<T>(120, 1.0)));
        let out = Far::new::<T>(driver, &shape, distance, &[]);
        let mut problem = ElementwiseProblem::new(op, T::DTYPE, shape[0], shape[1]);
        (problem.x_stride, problem.y_stride, problem.out_stride) = (distance, distance, distance);
        let args = ElementwiseArgs::new(x.ptr(), y.ptr(), out.ptr());
        // SAFETY: all three have the plan's shape and strides and outlive the read below, which waits.
        unsafe { ElementwisePlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        [bits(&out.values::<T>())]
    });
}

#[test]
fn elementwise_1500() {
    for op in [ElementwiseOp::add(0.5), ElementwiseOp::SigmoidMul, ElementwiseOp::SiluMul] {
        check_elementwise::<bf16>(op);
        check_elementwise::<f32>(op);
    }
}

/// Rows in three dimensions, and in one with a residual.
fn check_norm<T: Element>() {
    let shape = [2, 3, 2, 40];
    check(|driver, distance| {
        let mut rng = Rng::new(2);
        let x = Far::new(driver, &shape, distance, &rng.normals::<T>(480, 1.0));
        let out = Far::new::<T>(driver, &shape, distance, &[]);
        let mut problem = NormProblem::new(Norm::layer(1e-5), T::DTYPE, 1, shape[3]);
        problem.rows = [2, 3, 2];
        (problem.x_strides, problem.out_strides) = (x.strides(), out.strides());
        let args = NormArgs::new(x.ptr(), out.ptr());
        // SAFETY: both have the plan's shape and strides and outlive the read below, which waits.
        unsafe { NormPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        [bits(&out.values::<T>())]
    });
    let shape = [3, 40];
    check(|driver, distance| {
        let mut rng = Rng::new(3);
        let [x, residual] = [(); 2].map(|()| Far::new(driver, &shape, distance, &rng.normals::<T>(120, 1.0)));
        let [out, sum] = [(); 2].map(|()| Far::new::<T>(driver, &shape, distance, &[]));
        let weight = Buffer::from_slice(driver, &rng.normals::<f32>(40, 1.0)).unwrap();
        let mut problem = NormProblem::new(Norm::rms(1e-5), T::DTYPE, shape[0], shape[1]);
        (problem.x_strides[2], problem.out_strides[2]) = (distance, distance);
        (problem.residual_stride, problem.residual_out_stride) = (distance, distance);
        let args = NormArgs::new(x.ptr(), out.ptr()).with_weight(weight.ptr()).with_residual(residual.ptr(), sum.ptr());
        // SAFETY: all have the plan's shape and strides and outlive the reads below, which wait.
        unsafe { NormPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        [bits(&out.values::<T>()), bits(&sum.values::<T>())]
    });
}

#[test]
fn norms_1500() {
    check_norm::<bf16>();
    check_norm::<f32>();
}

/// Rows, tables, pages and the block table.
fn check_qkv<T: Element>(norm: QkNorm) {
    let mut spec = QkvPrep::new(4, 2, 16);
    (spec.value_dim, spec.qk_norm, spec.clip) = (8, Some(norm), Some(2.0));
    (spec.rope, spec.q_temperature) = (Some(Rope::new(RopeStyle::Half, 16, 1000.0)), Some(QTemperature::new(2.0, 0.1)));
    let (tokens, positions) = (5, 7);
    check(|driver, distance| {
        let mut rng = Rng::new(4);
        let mut input = |heads: usize, width: usize| {
            Far::new(driver, &[tokens, heads, width], distance, &rng.normals::<T>(tokens * heads * width, 1.0))
        };
        let (q, k, v) = (input(4, 16), input(2, 16), input(2, 8));
        let [cos, sin] = [(); 2].map(|()| Far::new(driver, &[positions, 8], distance, &rng.normals::<f32>(56, 1.0)));
        let q_out = Far::new::<T>(driver, &[tokens, 4, 16], distance, &[]);
        // Pages of two rows; every row that is read below is written.
        let old = rng.normals::<T>(6 * 2 * 2 * 16, 1.0);
        let k_out = Far::new(driver, &[6, 2, 2, 16], distance, &old);
        let v_out = Far::new(driver, &[6, 2, 2, 8], distance, &old);
        let table = Far::new(driver, &[2, 3], distance, &[3u32, 0, 5, 1, 4, 2]);
        let upload = |data: &[u32]| Buffer::from_slice(driver, data).unwrap();
        let (at, sums, lens) = (upload(&[6, 0, 3, 4, 5]), upload(&[0, 2, 5]), upload(&[3, 1]));
        let weights = |heads: usize| vec![0.5f32; if norm == QkNorm::Full { heads * 16 } else { 16 }];
        let [q_norm, k_norm] = [4, 2].map(|heads| Buffer::from_slice(driver, &weights(heads)).unwrap());

        let mut problem = QkvProblem::new(spec.clone(), T::DTYPE, tokens, positions);
        problem.cache = Some(QkvCache::paged(2, 6, 2, 3));
        problem.cache.as_mut().unwrap().pages = Some([3, distance]);
        (problem.q_strides, problem.k_strides, problem.v_strides) = (q.strides(), k.strides(), v.strides());
        (problem.q_out_strides, problem.k_out_strides) = (q_out.strides(), k_out.strides());
        (problem.v_out_strides, problem.cos_stride, problem.sin_stride) = (v_out.strides(), distance, distance);
        let mut args = QkvArgs::default();
        (args.q, args.k, args.v) = (q.ptr(), k.ptr(), v.ptr());
        (args.q_out, args.k_out, args.v_out) = (q_out.ptr(), k_out.ptr(), v_out.ptr());
        (args.q_norm, args.k_norm, args.cos, args.sin) = (q_norm.ptr(), k_norm.ptr(), cos.ptr(), sin.ptr());
        (args.positions, args.cu_seqlens, args.kv_lens) = (at.ptr(), sums.ptr(), lens.ptr());
        args.block_table = table.ptr();
        // SAFETY: all have the plan's shapes and strides and outlive the reads below, which wait.
        unsafe { QkvPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        [bits(&q_out.values::<T>()), bits(&k_out.values::<T>()), bits(&v_out.values::<T>())]
    });
}

#[test]
fn prepared_pages_1500() {
    check_qkv::<bf16>(QkNorm::PerHead);
    check_qkv::<f16>(QkNorm::Full);
    check_qkv::<f32>(QkNorm::PerHead);
}

/// Row numbers, too: behind more rows than 31 bits count.
#[test]
fn append_behind_three_billion_rows_1500() {
    let driver = &Simulator::new(false);
    let (capacity, len, width) = (3_000_000_010_usize, 3_000_000_000_u32, 8);
    let new: Vec<f32> = Rng::new(5).normals(3 * width, 1.0);
    let rows = Buffer::from_slice(driver, &new).unwrap();
    let lens = Buffer::from_slice(driver, &[len]).unwrap();
    let caches = [(); 2].map(|()| Buffer::new(driver, capacity * width * 4).unwrap());
    let mut problem = QkvProblem::new(QkvPrep::new(1, 1, width), f32::DTYPE, 3, 0);
    problem.arrays = gatefold::cuda::QkvArrays::KeyValue;
    let mut cache = QkvCache::contiguous(1, capacity);
    cache.ragged = false;
    let problem = problem.with_cache(cache);
    let mut args = QkvArgs::default();
    (args.k, args.v, args.kv_lens) = (rows.ptr(), rows.ptr(), lens.ptr());
    (args.k_out, args.v_out) = (caches[0].ptr(), caches[1].ptr());
    // SAFETY: the caches have room for `capacity` rows, the others for three, and all outlive the reads below.
    unsafe { QkvPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
    driver.synchronize(Stream::LEGACY).unwrap();
    for cache in &caches {
        let mut found = vec![0.0f32; 3 * width];
        let address = cache.ptr() + u64::from(len) * width as u64 * 4;
        // SAFETY: the cache holds these rows, and nothing runs.
        unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(&mut found), address).unwrap() };
        assert_eq!(found, new);
    }
}

fn check_wkv<T: Element>() {
    let (batch, seq, channels) = (2, 3, 33);
    check(|driver, distance| {
        let mut rng = Rng::new(6);
        let len = batch * seq * channels;
        let [k, v] = [(); 2].map(|()| Far::new(driver, &[batch, seq, channels], distance, &rng.normals::<T>(len, 1.0)));
        let state: Vec<f32> = rng.normals::<f32>(3 * batch * channels, 1.0).iter().map(|x| 1.0 + x.abs()).collect();
        let state_in = Far::new(driver, &[3, batch, channels], distance, &state);
        let out = Far::new::<T>(driver, &[batch, seq, channels], distance, &[]);
        let state_out = Far::new::<f32>(driver, &[3, batch, channels], distance, &[]);
        let [decay, first] = [(); 2].map(|()| Buffer::from_slice(driver, &rng.normals::<f32>(channels, 1.0)).unwrap());
        let mut problem = WkvProblem::new(T::DTYPE, batch, seq, channels);
        (problem.k_strides, problem.v_strides, problem.out_strides) = (k.strides(), v.strides(), out.strides());
        (problem.state_in_strides, problem.state_out_strides) = (state_in.strides(), state_out.strides());
        let mut args = WkvArgs::default();
        (args.k, args.v, args.out, args.decay, args.first) = (k.ptr(), v.ptr(), out.ptr(), decay.ptr(), first.ptr());
        (args.state_in, args.state_out) = (state_in.ptr(), state_out.ptr());
        // SAFETY: all have the plan's shapes and strides and outlive the reads below, which wait.
        unsafe { WkvPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        [bits(&out.values::<T>()), bits(&state_out.values::<f32>())]
    });
}

#[test]
fn wkv_1080() {
    check_wkv::<bf16>();
    check_wkv::<f16>();
    check_wkv::<f32>();
}

fn check_retention<T: Element>(form: RetentionForm) {
    let (n, heads, dim, value_dim) = (18, 2, 5, 33);
    let mut spec = Retention::new(heads, dim, value_dim);
    spec.form = form;
    check(|driver, distance| {
        let mut rng = Rng::new(7);
        let mut input =
            |width: usize| Far::new(driver, &[n, heads, width], distance, &rng.normals::<T>(n * heads * width, 1.0));
        let (q, k, v) = (input(dim), input(dim), input(value_dim));
        let shape = [heads, dim, value_dim];
        let state_in = Far::new(driver, &shape, distance, &rng.normals::<f32>(heads * dim * value_dim, 1.0));
        let state_out = Far::new::<f32>(driver, &shape, distance, &[]);
        let out = Far::new::<T>(driver, &[n, heads, value_dim], distance, &[]);
        let decay = Buffer::from_slice(driver, &[0.75f32, 0.875]).unwrap();
        let mut problem = RetentionProblem::new(spec.clone(), T::DTYPE, n);
        (problem.q_strides, problem.k_strides) = (q.strides(), k.strides());
        (problem.v_strides, problem.out_strides) = (v.strides(), out.strides());
        (problem.state_in_strides, problem.state_out_strides) = (state_in.strides(), state_out.strides());
        let mut args = RetentionArgs::default();
        (args.q, args.k, args.v, args.out, args.decay) = (q.ptr(), k.ptr(), v.ptr(), out.ptr(), decay.ptr());
        (args.state_in, args.state_out) = (state_in.ptr(), state_out.ptr());
        // SAFETY: all have the plan's shapes and strides and outlive the reads below, which wait.
        unsafe { RetentionPlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        [bits(&out.values::<T>()), bits(&state_out.values::<f32>())]
    });
}

#[test]
fn retention_1080() {
    for form in [RetentionForm::Parallel, RetentionForm::Recurrent, RetentionForm::Chunkwise(7)] {
        check_retention::<bf16>(form);
        check_retention::<f32>(form);
    }
}
