//! The sum of a token's experts, with shared expert and residual.

use super::group::SortCase;
use crate::common::assert_rows;
use crate::common::buffer::{Array, Layout, Output};
use crate::common::data::Rng;
use crate::common::simulator::Simulator;
use crate::staged::{Staged, StagedMut};
use crate::{on_devices, on_large_devices};
use gatefold::Element;
use gatefold::cuda::driver::{Buffer, Driver};
use gatefold::cuda::{self, Combine, CombineArgs, CombineInput, CombinePlan, DeviceView, DeviceViewMut, Queue, Stream};
use half::{bf16, f16};

/// What stands around the sum of the routed experts.
#[derive(Clone, Copy, Debug)]
struct Options {
    weights: bool,
    shared: bool,
    gate: bool,
    residual: bool,
    /// `out` is the residual's memory.
    in_place: bool,
    scale: f64,
    multiplier: f64,
    layout: Layout,
}

impl Options {
    fn new() -> Self {
        Options {
            weights: true,
            shared: false,
            gate: false,
            residual: false,
            in_place: false,
            scale: 1.0,
            multiplier: 1.0,
            layout: Layout::Contiguous,
        }
    }

    /// Everything at once.
    fn all() -> Self {
        let plain = Options::new();
        Options { shared: true, gate: true, residual: true, scale: 2.5, multiplier: 0.22, ..plain }
    }
}

/// One call, all arrays row-major.
#[derive(Clone)]
struct Case<T> {
    slots: usize,
    hidden: usize,
    y: Vec<T>,
    position: Vec<u32>,
    weights: Vec<f32>,
    shared: Vec<T>,
    logit: Vec<f32>,
    residual: Vec<T>,
}

impl<T: Element> Case<T> {
    /// Random experts, some assignments of nobody; rows of `y` without an assignment are NaN, as memory that nobody wrote may be.
    fn new(rng: &mut Rng, experts: usize, tokens: usize, slots: usize, hidden: usize) -> Self {
        let sorted = SortCase::random(rng, experts, slots, tokens).expected();
        Case::of(rng, tokens, slots, hidden, sorted.position)
    }

    fn of(rng: &mut Rng, tokens: usize, slots: usize, hidden: usize, position: Vec<u32>) -> Self {
        let mut y = vec![T::from_f32(f32::NAN); tokens * slots * hidden];
        for row in position.iter().filter(|row| **row < (tokens * slots) as u32) {
            y[*row as usize * hidden..][..hidden].copy_from_slice(&rng.normals::<T>(hidden, 1.0));
        }
        let mut weights: Vec<f32> = (0..tokens * slots).map(|_| rng.uniform() as f32).collect();
        for (weight, row) in weights.iter_mut().zip(&position) {
            if *row >= (tokens * slots) as u32 {
                *weight = f32::NAN;
            }
        }
        Case {
            slots,
            hidden,
            y,
            position,
            weights,
            shared: rng.normals(tokens * hidden, 1.0),
            logit: (0..tokens).map(|_| 4.0 * rng.normal() as f32).collect(),
            residual: rng.normals(tokens * hidden, 1.0),
        }
    }

    fn tokens(&self) -> usize {
        self.logit.len()
    }

    /// The token's assignments by row: `(row, weight)`.
    fn assignments(&self, token: usize, options: &Options) -> Vec<(usize, f32)> {
        let mut found: Vec<(usize, f32)> = (token * self.slots..(token + 1) * self.slots)
            .filter(|i| (self.position[*i] as usize) < self.y.len() / self.hidden)
            .map(|i| (self.position[i] as usize, if options.weights { self.weights[i] } else { 1.0 }))
            .collect();
        found.sort_by_key(|(row, _)| *row);
        found
    }

    /// In f64, and as the textbook writes it in f32 with one rounding to the element type.
    fn expected(&self, options: &Options) -> (Vec<f64>, Vec<T>) {
        let (mut truth, mut naive) = (Vec::new(), Vec::new());
        for t in 0..self.tokens() {
            let found = self.assignments(t, options);
            for i in 0..self.hidden {
                let (mut exact, mut single) = (0.0, 0.0);
                for (row, weight) in &found {
                    let y = self.y[row * self.hidden + i];
                    exact += f64::from(*weight) * y.to_f64();
                    single += weight * y.to_f32();
                }
                exact *= options.scale;
                single *= options.scale as f32;
                if options.shared {
                    let (x, logit) = (self.shared[t * self.hidden + i], self.logit[t]);
                    exact += x.to_f64() / if options.gate { 1.0 + (-f64::from(logit)).exp() } else { 1.0 };
                    single += x.to_f32() * if options.gate { 1.0 / (1.0 + (-logit).exp()) } else { 1.0 };
                }
                if options.residual {
                    let x = self.residual[t * self.hidden + i];
                    exact = x.to_f64() + options.multiplier * exact;
                    single = x.to_f32() + options.multiplier as f32 * single;
                }
                truth.push(exact);
                naive.push(T::from_f32(single));
            }
        }
        (truth, naive)
    }

    fn run(&self, driver: &dyn Driver, options: &Options) -> Vec<T> {
        let (tokens, slots, hidden, layout) = (self.tokens(), self.slots, self.hidden, options.layout);
        let matrix = |values: &[T]| Array::new([values.len() / hidden, hidden], layout, values);
        let (y, shared, residual) = (matrix(&self.y), matrix(&self.shared), matrix(&self.residual));
        let weights = Array::new([tokens, slots], layout, &self.weights);
        let logit = Array::new([tokens, 1], layout, &self.logit);
        let mut out = Output::<T, 2>::new([tokens, hidden], layout);
        let stage = |array: &Array<T, 2>| Staged::new(driver, array.view()).unwrap();
        let (y, shared, residual) = (stage(&y), stage(&shared), stage(&residual));
        let stage = |array: &Array<f32, 2>| Staged::new(driver, array.view()).unwrap();
        let (weights, logit) = (stage(&weights), stage(&logit));
        let position = Buffer::from_slice(driver, &self.position).unwrap();
        if options.in_place {
            let values = self.residual.chunks_exact(hidden).enumerate();
            values.for_each(|(t, row)| out.view().row_mut(&[t]).copy_from_slice(row));
        }
        let mut staged = StagedMut::new(driver, &out.view()).unwrap();

        // SAFETY: the buffer holds the positions and outlives the call.
        let at = unsafe { DeviceView::from_raw(position.ptr(), tokens * slots, [tokens, slots], [slots, 1]) };
        let mut input = CombineInput::new(y.view(), at);
        input.topk_weights = options.weights.then(|| weights.view());
        input.shared = options.shared.then(|| shared.view());
        input.shared_logit = (options.shared && options.gate).then(|| logit.view());
        input.residual = options.residual.then(|| residual.view());
        (input.combine_scale, input.residual_multiplier) = (options.scale, options.multiplier);
        if options.in_place && options.residual {
            in_place(driver, &input, staged.view());
        } else {
            cuda::combine(&mut Queue::new(driver), &input, staged.view()).unwrap();
        }
        staged.finish(Stream::LEGACY, out.view()).unwrap();
        out.finish("out")
    }

    fn check(&self, driver: &dyn Driver, options: &Options) {
        let (truth, naive) = self.expected(options);
        let what = format!("{} tokens of {} slots, {} {} columns", self.tokens(), self.slots, self.hidden, T::DTYPE);
        let found = self.run(driver, options);
        assert_rows(&format!("out, {what}, {options:?}"), &found, &truth, &naive, self.hidden);
    }
}

/// The same by pointers, with the residual where `out` is.
fn in_place<T: Element>(driver: &dyn Driver, input: &CombineInput<'_, T>, out: DeviceViewMut<'_, T, 2>) {
    let ([tokens, slots], [rows, hidden]) = (input.position.shape(), input.y.shape());
    let mut problem = Combine::new(T::DTYPE, tokens, slots, hidden);
    problem.num_rows = rows;
    (problem.combine_scale, problem.residual_multiplier) = (input.combine_scale, input.residual_multiplier);
    problem.y_stride = input.y.strides()[0];
    (problem.residual_stride, problem.out_stride) = (out.strides()[0], out.strides()[0]);
    let mut args = CombineArgs::new(input.y.ptr(), input.position.ptr(), out.ptr()).with_residual(out.ptr());
    if let Some(weights) = input.topk_weights {
        problem.topk_weights_stride = weights.strides()[0];
        args = args.with_weights(weights.ptr());
    }
    if let Some(shared) = input.shared {
        problem.shared_stride = shared.strides()[0];
        problem.shared_logit_stride = input.shared_logit.map_or(1, |logit| logit.strides()[0]);
        args = args.with_shared(shared.ptr(), input.shared_logit.map(|logit| logit.ptr()));
    }
    let plan = CombinePlan::new(&problem).unwrap();
    assert_eq!(plan.workspace_bytes(), 0);
    plan.warmup(driver).unwrap();
    // SAFETY: all arrays have the plan's shapes and strides and outlive the read of the result, which waits.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
}

fn bits<T: Element>(data: &[T]) -> &[u8] {
    bytemuck::cast_slice(data)
}

fn check_sums<T: Element>(driver: &dyn Driver) {
    let mut rng = Rng::new(crate::common::seed());
    // Around vectors and what a CTA covers.
    for hidden in [1, 3, 7, 8, 9, 64, 511, 512, 1016, 1024, 1032] {
        for layout in Layout::ALL {
            let case = Case::<T>::new(&mut rng, 5, 2, 3, hidden);
            case.check(driver, &Options { layout, ..Options::all() });
        }
    }
    // Around what a thread has in flight and what a warp reads at once.
    for slots in [0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 70] {
        for experts in [1, 40] {
            let case = Case::<T>::new(&mut rng, experts, 3, slots, 40);
            case.check(driver, &Options::new());
            case.check(driver, &Options::all());
        }
    }
    Case::<T>::new(&mut rng, 4, 0, 2, 16).check(driver, &Options::all());
    let case = Case::<T>::new(&mut rng, 16, 5, 4, 72);
    for i in 0..64 {
        let bit = |n: u32| i >> n & 1 == 1;
        let options = Options {
            weights: bit(0),
            shared: bit(1),
            gate: bit(2),
            residual: bit(3),
            in_place: bit(4),
            scale: if bit(5) { 16.0 } else { 1.0 },
            multiplier: if bit(5) { 0.5 } else { 1.0 },
            layout: Layout::Contiguous,
        };
        case.check(driver, &options);
    }
    // Where exp overflows or vanishes.
    let mut gates = Case::<T>::new(&mut rng, 16, 9, 1, 8);
    gates.logit = vec![0.0, -0.0, 1e-30, 80.0, -80.0, 95.0, -95.0, f32::INFINITY, f32::NEG_INFINITY];
    gates.check(driver, &Options { shared: true, gate: true, ..Options::new() });
}

#[test]
fn combine() {
    on_devices(false, |driver| {
        check_sums::<bf16>(driver);
        check_sums::<f16>(driver);
        check_sums::<f32>(driver);
    });
}

/// vllm-project/vllm#54948, #57016: the same bits on every run, whatever the other tokens, the order of the slots, and where rows lie.
fn check_bits<T: Element>(driver: &dyn Driver) {
    let mut rng = Rng::new(crate::common::seed());
    let (tokens, slots, hidden) = (6, 8, 136);
    let options = Options::all();
    // Distinct experts, as top-k gives them.
    let ids = (0..tokens).flat_map(|_| rng.permutation(20).into_iter().take(slots)).map(|e| e as i32 - 2).collect();
    let mut sorted = SortCase::new(18, slots, ids);
    let case = Case::<T>::of(&mut rng, tokens, slots, hidden, sorted.expected().position);
    let out = case.run(driver, &options);
    assert_eq!(bits(&case.run(driver, &options)), bits(&out));
    let padded = case.run(driver, &Options { layout: Layout::Padded, ..options });
    assert_eq!(bits(&padded), bits(&out), "{}: other strides", T::DTYPE);

    let mut reversed = case.clone();
    for t in 0..tokens {
        let row = t * slots..(t + 1) * slots;
        sorted.ids[row.clone()].reverse();
        reversed.weights[row].reverse();
    }
    let positions = sorted.expected().position;
    let rows = case.position.chunks(slots).flat_map(|row| row.iter().rev());
    for (from, to) in rows.zip(&positions).filter(|(row, _)| (**row as usize) < tokens * slots) {
        let [from, to] = [from, to].map(|row| *row as usize * hidden);
        reversed.y[to..to + hidden].copy_from_slice(&case.y[from..from + hidden]);
    }
    reversed.position = positions;
    assert_eq!(bits(&reversed.run(driver, &options)), bits(&out), "{}: slots in another order", T::DTYPE);

    for t in 0..tokens {
        let (rows, columns) = (t * slots..(t + 1) * slots, t * hidden..(t + 1) * hidden);
        let mut alone = Case {
            position: case.position[rows.clone()].to_vec(),
            weights: case.weights[rows].to_vec(),
            shared: case.shared[columns.clone()].to_vec(),
            logit: vec![case.logit[t]],
            residual: case.residual[columns.clone()].to_vec(),
            ..case.clone()
        };
        let mut order: Vec<u32> = alone.position.iter().copied().filter(|row| *row != u32::MAX).collect();
        order.sort_unstable();
        let gather = |row: &u32| case.y[*row as usize * hidden..][..hidden].to_vec();
        alone.y = order.iter().flat_map(gather).collect();
        alone.y.resize(slots * hidden, T::from_f32(f32::NAN));
        for row in &mut alone.position {
            *row = order.iter().position(|r| r == row).map_or(u32::MAX, |at| at as u32);
        }
        assert_eq!(bits(&alone.run(driver, &options)), bits(&out[columns]), "{}: token {t} alone", T::DTYPE);
    }
}

#[test]
fn combine_bits() {
    on_devices(true, |driver| {
        check_bits::<bf16>(driver);
        check_bits::<f16>(driver);
        check_bits::<f32>(driver);
    });
}

/// Positions that no sort gives: beyond the rows they are skipped, equal ones are added in order of the slots.
#[test]
fn combine_of_garbage() {
    on_devices(false, |driver| {
        let mut rng = Rng::new(crate::common::seed());
        for slots in [8, 50] {
            let (tokens, hidden) = (5, 24);
            let rows = (tokens * slots) as u32;
            let position: Vec<u32> =
                (0..rows).map(|i| [i % 7, rows - 1, rows, u32::MAX - 1, rng.next() as u32][rng.below(5)]).collect();
            Case::<bf16>::of(&mut rng, tokens, slots, hidden, position).check(driver, &Options::all());
        }
    });
}

/// vllm-project/vllm#5938, #34279: rows more than 2^31 elements apart. Needs 21 GB on a device.
#[test]
fn combine_of_far_rows() {
    on_large_devices(|driver| {
        let (hidden, stride) = (64, (1_usize << 31) + 64);
        let mut rng = Rng::new(crate::common::seed());
        let mut near = Case::<bf16>::new(&mut rng, 1, 2, 1, hidden);
        near.position = vec![1, 0];
        near.weights = vec![0.5, 3.0];
        near.y = rng.normals(2 * hidden, 1.0);
        let far = |rows: &[bf16]| {
            let buffer = Buffer::new(driver, (stride + hidden) * 2).unwrap();
            for (i, row) in rows.chunks_exact(hidden).enumerate() {
                // SAFETY: the buffer has room for two rows, and nothing runs.
                unsafe { driver.copy_to_device(buffer.ptr() + (i * stride * 2) as u64, bits(row)).unwrap() };
            }
            buffer
        };
        let (y, shared, residual) = (far(&near.y), far(&near.shared), far(&near.residual));
        let weights = Buffer::from_slice(driver, &near.weights).unwrap();
        let logit = Buffer::from_slice(driver, &near.logit).unwrap();
        let position = Buffer::from_slice(driver, &near.position).unwrap();
        let mut problem = Combine::new(bf16::DTYPE, 2, 1, hidden);
        let options = Options::all();
        (problem.combine_scale, problem.residual_multiplier) = (options.scale, options.multiplier);
        problem.y_stride = stride;
        problem.shared_stride = stride;
        problem.residual_stride = stride;
        problem.out_stride = stride;
        let args = CombineArgs::new(y.ptr(), position.ptr(), residual.ptr())
            .with_weights(weights.ptr())
            .with_shared(shared.ptr(), Some(logit.ptr()))
            .with_residual(residual.ptr());
        // SAFETY: the buffers hold two rows `stride` apart, or two elements.
        unsafe { CombinePlan::new(&problem).unwrap().launch(driver, &args, Stream::LEGACY).unwrap() };
        driver.synchronize(Stream::LEGACY).unwrap();
        let mut found = vec![bf16::ZERO; 2 * hidden];
        for (i, row) in found.chunks_exact_mut(hidden).enumerate() {
            let address = residual.ptr() + (i * stride * 2) as u64;
            // SAFETY: the address holds a row, and nothing runs.
            unsafe { driver.copy_to_host(bytemuck::cast_slice_mut(row), address).unwrap() };
        }
        assert_eq!(bits(&found), bits(&near.run(driver, &options)));
    });
}

/// Arrays that do not fit are typed errors that name the argument, what was expected and what was found; nothing is written.
#[test]
fn combine_errors() {
    type Edit = fn(&mut CombineInput<'static, f32>);
    // Nobody follows these pointers.
    fn at<T, const N: usize>(shape: [usize; N], strides: [usize; N]) -> DeviceView<'static, T, N> {
        let len = 1 + shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum::<usize>();
        // SAFETY: no call below comes as far as a launch.
        unsafe { DeviceView::from_raw(0x10_0000, len, shape, strides) }
    }
    let edits: [(&str, Edit); 13] = [
        ("`y` has 3 elements, its shape asks for 48", |i| {
            // SAFETY: as above.
            i.y = unsafe { DeviceView::from_raw(0x10_0000, 3, [6, 8], [8, 1]) };
        }),
        ("`y` has strides [16, 2], expected the last dimension contiguous (stride 1)", |i| i.y = at([6, 8], [16, 2])),
        ("`out` has shape [3, 8], expected [3, 9]", |i| i.y = at([6, 9], [9, 1])),
        ("`out` has shape [3, 8], expected [4, 8]", |i| i.position = at([4, 2], [2, 1])),
        ("`position` has strides [5, 1], expected [2, 1]", |i| i.position = at([3, 2], [5, 1])),
        ("`topk_weights` has shape [3, 1], expected [3, 2]", |i| i.topk_weights = Some(at([3, 1], [1, 1]))),
        ("`shared` has shape [3, 7], expected [3, 8]", |i| i.shared = Some(at([3, 7], [7, 1]))),
        ("`shared_logit` is given, expected it to be absent: there is no shared expert", |i| {
            i.shared_logit = Some(at([3, 1], [1, 1]))
        }),
        ("`shared_logit` has shape [3, 2], expected [3, 1]", |i| {
            (i.shared, i.shared_logit) = (Some(at([3, 8], [8, 1])), Some(at([3, 2], [2, 1])));
        }),
        ("`residual` has shape [2, 8], expected [3, 8]", |i| i.residual = Some(at([2, 8], [8, 1]))),
        ("`combine_scale` is NaN, expected a finite number in f32", |i| i.combine_scale = f64::NAN),
        ("`residual_multiplier` is 1000000000000000000000000000000000000000, expected", |i| {
            i.residual_multiplier = 1e39
        }),
        ("unsupported by cuda: 3 tokens with 3072 experts each", |i| i.position = at([3, 3072], [3072, 1])),
    ];
    let simulator = Simulator::new(false);
    let mut out = Output::<f32, 2>::new([3, 8], Layout::Contiguous);
    let mut staged = StagedMut::new(&simulator, &out.view()).unwrap();
    let mut fails = |want: &str, input: &CombineInput<'_, f32>| {
        let error = cuda::combine(&mut Queue::new(&simulator), input, staged.view()).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    };
    let good = CombineInput::new(at([6, 8], [8, 1]), at([3, 2], [2, 1]));
    for (want, edit) in edits {
        let mut input = good;
        edit(&mut input);
        fails(want, &input);
    }
    let place = staged.view().ptr();
    let mut overlapping = good;
    // SAFETY: the call refuses it.
    overlapping.y = unsafe { DeviceView::from_raw(place + 32, 48, [6, 8], [8, 1]) };
    let error = cuda::combine(&mut Queue::new(&simulator), &overlapping, staged.view()).unwrap_err();
    assert_eq!(error.to_string(), "`out` overlaps `y`, expected separate memory");
    staged.finish(Stream::LEGACY, out.view()).unwrap();
    out.assert_untouched("out");
    assert!(simulator.take_counters().is_empty(), "something was launched");
}

/// Nothing is moved that need not be: rows in whole sectors, once.
#[test]
fn combine_counters() {
    let simulator = Simulator::new(false);
    let (tokens, slots, hidden) = (4, 8, 2048);
    let position = (0..tokens * slots).map(|i| ((i % slots) * tokens + i / slots) as u32).collect();
    let case = Case::<bf16>::of(&mut Rng::new(1), tokens, slots, hidden, position);
    case.run(&simulator, &Options { shared: true, residual: true, ..Options::new() });
    let counters = simulator.take_counters();
    let [(_, c)] = &counters[..] else { panic!("{} launches", counters.len()) };
    let rows = tokens * slots + 3 * tokens; // y; shared, residual and out
    let lists = tokens * 2 * 2; // position and weight, in each of two CTAs: 32 bytes each
    assert_eq!(c.global_sectors, (rows * hidden * 2 / 32 + lists) as u64);
    assert_eq!(c.conflict_degree(), 1.0);
    assert_eq!(c.instructions / (tokens * 2 * 4) as u64, 484); // per warp
}
