//! Matrix products: linear layers, and rows in groups with a weight matrix each.

use crate::budget::budget;
use crate::common::pairs::pairwise;
use crate::common::simulator::Simulator;
use crate::common::sums::{assert_sums, bits, naive_sum, starts_for};
use crate::common::{Layout, Output, Rng, naive, strategies};
use crate::{on_devices, on_gpu, on_large_devices, staged};
use gatefold::args::FfnWeights;
use gatefold::cuda::driver::{Buffer, Driver, Limits};
use gatefold::cuda::kernels;
use gatefold::cuda::{F32Products, GemmRows, GroupedGemm, GroupedGemmArgs, GroupedGemmPlan, Stream};
use gatefold::spec::{Activation, Ffn, Mla};
use gatefold::{Dtype, Element, View, ViewMut, reference};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use simt::{Class, Counters};

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
    check_tokens::<T, O>(driver, case, &Vec::from_iter(0..case.tokens));
}

/// Compares some of the tokens of a call.
fn check_tokens<T: Element, O: Element>(driver: &dyn Driver, case: &Case, sampled: &[usize]) {
    let Case { tokens, heads, outputs, inputs, .. } = *case;
    let mut rng = Rng::new(case.seed);
    let x = rng.normals::<T>(tokens * heads * inputs, 1.0);
    let weight = rng.normals::<T>(heads * outputs * inputs, 1.0);
    let bias: Option<Vec<f32>> = (case.bias && heads == 1).then(|| rng.normals(outputs, 1.0));
    let (mut truth, mut naive, mut terms) = (Vec::new(), Vec::new(), Vec::new());
    let starts = starts_for(sampled.len() * heads * outputs);
    for i in sampled.iter().flat_map(|t| t * heads..(t + 1) * heads) {
        let x = &x[i * inputs..][..inputs];
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
    let row = |t: &usize| &found[t * heads * outputs..(t + 1) * heads * outputs];
    let found: Vec<O> = sampled.iter().flat_map(row).copied().collect();
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

/// The calls of the CPU's property test, with one output at least, and inputs that are a multiple of 8: rows begin at multiples of
/// 16 bytes.
#[test]
fn any_linear() {
    let strategy = (strategies::linear(), 0..5, any::<[bool; 2]>(), strategies::layout(), any::<u64>());
    on_devices(false, |driver| {
        let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
        let result = TestRunner::new(config).run(&strategy, |(sizes, types, [gaps, bias], out, seed)| {
            let [tokens, heads, outputs, inputs] = sizes;
            let (outputs, inputs) = (outputs.max(1), inputs.next_multiple_of(8).max(8));
            let case = Case { tokens, heads, outputs, inputs, gaps, out, bias, seed };
            match types {
                0 => check::<bf16, bf16>(driver, &case),
                1 => check::<bf16, f32>(driver, &case),
                2 => check::<f16, f16>(driver, &case),
                3 => check::<f16, f32>(driver, &case),
                _ => check::<f32, f32>(driver, &case),
            }
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    });
}

// --- rows in groups ---------------------------------------------------------------------------------------------------

/// How gate and up lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weights {
    /// One array for each, with gaps behind rows and matrices.
    Separate,
    /// Gate rows, then up rows.
    Halves,
    /// Up rows, then gate rows.
    Swapped,
    /// Gate in the even rows, up in the odd ones.
    Interleaved,
}

/// One product of listed rows.
#[derive(Clone, Debug)]
pub struct Grouped {
    /// Rows of each group.
    pub sizes: Vec<usize>,
    pub inputs: usize,
    pub outputs: usize,
    pub gated: bool,
    pub activation: Option<Activation>,
    pub weights: Weights,
    pub bias: bool,
    pub row_weight: bool,
    /// Rows of `a` by number: so many, each used several times.
    pub tokens: Option<usize>,
    /// Elements between rows of `a` and of `out`, beyond their width.
    pub gap: usize,
    pub seed: u64,
    pub products: F32Products,
}

impl Grouped {
    pub fn new(sizes: &[usize], outputs: usize, inputs: usize) -> Self {
        Grouped {
            sizes: sizes.to_vec(),
            inputs,
            outputs,
            gated: false,
            activation: None,
            weights: Weights::Separate,
            bias: false,
            row_weight: false,
            tokens: None,
            gap: 0,
            seed: 1,
            products: F32Products::Full,
        }
    }

    /// A factor of the products, as they take it.
    fn factor<T: Element>(&self, x: T) -> f32 {
        let tf32 = T::DTYPE == Dtype::F32 && self.products == F32Products::Tf32;
        if tf32 { naive::tf32(x.to_f32()) } else { x.to_f32() }
    }

    fn rows(&self) -> usize {
        self.sizes.iter().sum()
    }
}

/// The arguments of a product.
pub struct Data<T> {
    /// `[source rows][inputs]`
    pub a: Vec<T>,
    pub row_token: Vec<u32>,
    pub row_weight: Vec<f32>,
    /// Gate, up: `[groups][outputs][inputs]`
    pub weights: [Vec<T>; 2],
    /// Gate, up: `[groups][outputs]`
    pub biases: [Vec<f32>; 2],
}

impl<T: Element> Data<T> {
    pub fn new(case: &Grouped) -> Self {
        let mut rng = Rng::new(case.seed);
        let (groups, rows) = (case.sizes.len(), case.rows());
        let source = case.tokens.unwrap_or(rows);
        let deviation = 4.0 / (case.inputs as f64).sqrt();
        let mut weight = || rng.normals::<T>(groups * case.outputs * case.inputs, deviation);
        let weights = [weight(), weight()];
        Data {
            a: rng.normals(source * case.inputs, 1.0),
            row_token: (0..rows).map(|r| if case.tokens.is_some() { rng.below(source) } else { r } as u32).collect(),
            row_weight: (0..rows).map(|_| if case.row_weight { rng.uniform() as f32 } else { 1.0 }).collect(),
            weights,
            biases: [0, 1].map(|_| rng.normals(groups * case.outputs, if case.bias { 1.0 } else { 0.0 })),
        }
    }

    fn a_row(&self, case: &Grouped, row: usize) -> &[T] {
        &self.a[self.row_token[row] as usize * case.inputs..][..case.inputs]
    }

    fn weight_row(&self, case: &Grouped, matrix: usize, group: usize, output: usize) -> &[T] {
        &self.weights[matrix][(group * case.outputs + output) * case.inputs..][..case.inputs]
    }
}

/// Memory of rows with distances: what is around is NaN in an input, a guard in an output.
fn spread<T: Element>(values: &[T], width: usize, starts: impl Iterator<Item = usize>, len: usize) -> Vec<T> {
    let mut memory = vec![T::from_f32(f32::NAN); len];
    for (row, start) in values.chunks_exact(width).zip(starts) {
        memory[start..start + width].copy_from_slice(row);
    }
    memory
}

pub const CLASSES: [usize; 4] = [16, 32, 64, 128];

/// The lists of tiles: each group in the class of its size, or all in one.
fn tiles(case: &Grouped, class: Option<usize>, max_tiles: usize) -> ([u32; 4], Vec<u32>) {
    let (mut counts, mut lists, mut begin) = ([0; 4], vec![u32::MAX; 4 * max_tiles * 4], 0);
    for (group, rows) in case.sizes.iter().enumerate() {
        let natural = CLASSES.iter().position(|tile| rows <= tile).unwrap_or(3);
        let class = class.unwrap_or(natural);
        for at in (0..*rows).step_by(CLASSES[class]) {
            let tile = [group, begin + at, CLASSES[class].min(rows - at), 0].map(|x| x as u32);
            let index = class * max_tiles + counts[class] as usize;
            lists[4 * index..4 * index + 4].copy_from_slice(&tile);
            counts[class] += 1;
        }
        begin += rows;
    }
    (counts, lists)
}

/// `out`, from the device. `class`: all rows in tiles of this class, not of that of their group.
pub fn run_grouped<T: Element>(driver: &dyn Driver, case: &Grouped, data: &Data<T>, class: Option<usize>) -> Vec<T> {
    run_grouped_to(driver, case, data, class)
}

/// The same, stored in another type.
fn run_grouped_to<T: Element, O: Element>(
    driver: &dyn Driver,
    case: &Grouped,
    data: &Data<T>,
    class: Option<usize>,
) -> Vec<O> {
    let &Grouped { inputs, outputs, gated, gap, .. } = case;
    let (groups, rows) = (case.sizes.len(), case.rows());
    let max_tiles = rows / 16 + groups;
    let mut problem = GroupedGemm::experts(T::DTYPE, groups, rows, outputs, inputs);
    let max_group_rows = class.map_or(case.sizes.iter().copied().max().unwrap_or(0), |_| rows);
    problem.rows = GemmRows::Listed { max_rows: rows, max_group_rows, max_tiles };
    problem.out_dtype = O::DTYPE;
    problem.gated = gated;
    problem.f32_products = case.products;
    problem.activation = case.activation;
    problem.source_rows = data.a.len() / inputs;
    problem.a_stride = inputs + gap.next_multiple_of(8);
    problem.out_stride = outputs + gap;

    let upload = |memory: &[T]| Buffer::from_slice(driver, memory).unwrap();
    let a_len = problem.source_rows * problem.a_stride;
    let a = upload(&spread(&data.a, inputs, (0..problem.source_rows).map(|r| r * problem.a_stride), a_len));
    // Where row `output` of a matrix of a group begins: matrix 0 is the gate.
    let (row, group, start) = match case.weights {
        Weights::Separate => (inputs + 8, outputs * (inputs + 8) + 16, [groups * (outputs * (inputs + 8) + 16), 0]),
        Weights::Halves => (inputs, 2 * outputs * inputs, [0, outputs * inputs]),
        Weights::Swapped => (inputs, 2 * outputs * inputs, [outputs * inputs, 0]),
        Weights::Interleaved => (2 * inputs, 2 * outputs * inputs, [0, inputs]),
    };
    let mut memory = vec![T::from_f32(f32::NAN); 2 * groups * (group + 16)];
    for matrix in 0..2 {
        for g in 0..groups {
            for o in 0..outputs {
                let at = start[matrix] + g * group + o * row;
                memory[at..at + inputs].copy_from_slice(data.weight_row(case, matrix, g, o));
            }
        }
    }
    let weights = upload(&memory);
    let address = |matrix: usize| weights.ptr() + (start[matrix] * size_of::<T>()) as u64;
    [problem.gate_stride, problem.up_stride] = [row; 2];
    [problem.gate_group_stride, problem.up_group_stride] = [group; 2];
    problem.bias_stride = outputs + gap;
    let bias = [0, 1].map(|matrix| {
        let starts = (0..groups).map(|g| g * problem.bias_stride);
        let memory: Vec<f32> = spread(&data.biases[matrix], outputs, starts, groups * problem.bias_stride);
        Buffer::from_slice(driver, &memory).unwrap()
    });
    let row_token = Buffer::from_slice(driver, &data.row_token).unwrap();
    let row_weight = Buffer::from_slice(driver, &data.row_weight).unwrap();
    let (counts, lists) = tiles(case, class, max_tiles);
    let (counts, lists) = (Buffer::from_slice(driver, &counts).unwrap(), Buffer::from_slice(driver, &lists).unwrap());
    let guard = O::from_f32(-77.0);
    let lead = gap; // not aligned to pairs where the gap is odd
    let out = Buffer::from_slice(driver, &vec![guard; lead + rows * problem.out_stride + 16]).unwrap();

    let plan = GroupedGemmPlan::new(&problem, &driver.limits()).unwrap();
    assert_eq!(plan.workspace_bytes(), 0);
    plan.warmup(driver).unwrap();
    let mut args = GroupedGemmArgs::new(a.ptr(), address(1), out.ptr() + (lead * size_of::<O>()) as u64);
    args = args.with_tiles(counts.ptr(), lists.ptr());
    if gated {
        args = args.with_gate(address(0));
    }
    if case.bias {
        args.gate_bias = Some(bias[0].ptr());
        args.up_bias = Some(bias[1].ptr());
    }
    args.row_token = case.tokens.map(|_| row_token.ptr());
    args.row_weight = case.row_weight.then(|| row_weight.ptr());
    // SAFETY: all buffers have the plan's shapes and strides and outlive the read below, which waits.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    let mut memory = out.to_vec::<O>(Stream::LEGACY).unwrap();
    let mut found = Vec::new();
    for r in 0..rows {
        let row = &mut memory[lead + r * problem.out_stride..][..outputs];
        found.extend_from_slice(row);
        row.fill(guard);
    }
    assert!(memory.iter().all(|x| *x == guard), "written outside of the rows of {case:?}");
    found
}

/// The truth, from `reference::mlp` whose second projection copies what lies between the two.
fn truth<T: Element>(case: &Grouped, data: &Data<T>) -> Vec<f64> {
    let &Grouped { inputs, outputs, gated, .. } = case;
    let width = inputs.max(outputs);
    let mut eye = vec![0.0f64; width * outputs];
    (0..outputs).for_each(|i| eye[i * outputs + i] = 1.0);
    let (mut truth, mut row) = (Vec::new(), 0);
    for (group, size) in case.sizes.iter().enumerate() {
        let matrix = |matrix: usize| -> Vec<f64> {
            let mut wide = vec![0.0; outputs * width];
            for o in 0..outputs {
                let from = data.weight_row(case, matrix, group, o);
                wide[o * width..].iter_mut().zip(from).for_each(|(wide, w)| *wide = w.to_f64());
            }
            wide
        };
        let mut x = vec![0.0f64; size * width];
        for x in x.chunks_exact_mut(width) {
            let factor = f64::from(data.row_weight[row]);
            x.iter_mut().zip(data.a_row(case, row)).for_each(|(x, a)| *x = factor * a.to_f64());
            row += 1;
        }
        let (gate, up) = (matrix(0), matrix(1));
        let biases = [0, 1].map(|matrix| &data.biases[matrix][group * outputs..][..outputs]);
        let Some(activation) = case.activation else {
            for x in x.chunks_exact(width) {
                for (up, bias) in up.chunks_exact(width).zip(biases[1]) {
                    truth.push(x.iter().zip(up).map(|(x, w)| x * w).sum::<f64>() + f64::from(*bias));
                }
            }
            continue;
        };
        let ffn = if gated { Ffn::gated } else { Ffn::plain }(width, outputs, activation);
        let ffn = with!(ffn, up_bias: true);
        let shape = [outputs, width];
        let gate = gated.then(|| View::new(&gate, shape));
        let mut weights = FfnWeights::new(gate, View::new(&up, shape), View::new(&eye, [width, outputs]));
        weights.gate_bias = gated.then_some(biases[0]);
        weights.up_bias = Some(biases[1]);
        let mut inner = vec![0.0; size * width];
        let out = ViewMut::new(&mut inner, [*size, width]);
        reference::mlp::<f64, f64, f32>(&ffn, View::new(&x, [*size, width]), &weights, out).unwrap();
        inner.chunks_exact(width).for_each(|inner| truth.extend_from_slice(&inner[..outputs]));
    }
    truth
}

/// The textbook method, rounded where the kernel stores.
fn naive_grouped<T: Element, O: Element>(case: &Grouped, data: &Data<T>) -> Vec<O> {
    let (mut naive, mut row) = (Vec::new(), 0);
    let starts = starts_for(case.rows() * case.outputs);
    for (group, size) in case.sizes.iter().enumerate() {
        for _ in 0..*size {
            let factor = data.row_weight[row];
            for o in 0..case.outputs {
                let sum = |matrix: usize| {
                    let (a, w) = (data.a_row(case, row), data.weight_row(case, matrix, group, o));
                    let bias = data.biases[matrix][group * case.outputs + o];
                    let terms: Vec<f32> =
                        a.iter().zip(w).map(|(a, w)| factor * case.factor(*a) * case.factor(*w)).collect();
                    let exact = a.iter().zip(w).map(|(a, w)| f64::from(factor) * a.to_f64() * w.to_f64()).sum::<f64>();
                    naive_sum(&terms, bias, exact + f64::from(bias), starts)
                };
                let gate = case.gated.then(|| sum(0));
                let up = sum(1);
                naive.push(O::from_f32(case.activation.map_or(up, |act| naive::inner(act, gate, up))));
            }
            row += 1;
        }
    }
    naive
}

pub fn check_grouped<T: Element, O: Element>(driver: &dyn Driver, case: &Grouped) {
    let data = Data::<T>::new(case);
    check_result(case, &data, &run_grouped_to::<T, O>(driver, case, &data, None));
}

/// Against the reference.
pub fn check_result<T: Element, O: Element>(case: &Grouped, data: &Data<T>, found: &[O]) {
    let what = format!("{case:?} {} -> {}", T::DTYPE, O::DTYPE);
    assert_sums(&what, found, &truth(case, data), &naive_grouped(case, data), case.outputs);
}

pub const ACTIVATIONS: [Activation; 6] = [
    Activation::Silu,
    Activation::GeluErf,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::ReluSquared,
    Activation::SwigluClamped { alpha: 1.702, limit: 3.0 },
];

/// Every pair of options: activation, layout of the weights, biases, router weight on the input, gather, gaps, size.
pub fn check_options<T: Element, O: Element>(driver: &dyn Driver, products: F32Products) {
    let is_clamped = |activation: usize| activation == 5;
    let pairs = pairwise(&[7, 4, 2, 2, 2, 3, 2, 2], crate::common::seed(), |x| {
        let gated = x[6] == 1;
        !(is_clamped(x[0]) && !gated || x[0] == 6 && gated)
    });
    println!("{}: {} of {} pairs in {} cases", T::DTYPE, pairs.covered, pairs.total, pairs.rows.len());
    for (i, x) in pairs.rows.iter().enumerate() {
        let sizes: &[usize] = if x[7] == 1 { &[0, 18, 1, 0, 5] } else { &[3, 0, 33] };
        let mut case = Grouped::new(sizes, [24, 40][i % 2], [40, 136][i / 2 % 2]);
        case.activation = ACTIVATIONS.get(x[0]).copied();
        case.gated = x[6] == 1;
        case.weights = [Weights::Separate, Weights::Halves, Weights::Swapped, Weights::Interleaved][x[1]];
        case.bias = x[2] == 1;
        case.row_weight = x[3] == 1;
        case.tokens = (x[4] == 1).then_some(7);
        case.gap = [0, 3, 8][x[5]];
        case.seed = i as u64;
        case.products = products;
        check_grouped::<T, O>(driver, &case);
    }
}

#[test]
fn grouped_options() {
    on_devices(false, |driver| {
        check_options::<bf16, bf16>(driver, F32Products::Full);
        check_options::<bf16, f32>(driver, F32Products::Full);
        check_options::<f16, f16>(driver, F32Products::Full);
        check_options::<f16, f32>(driver, F32Products::Full);
        check_options::<f32, f32>(driver, F32Products::Full);
    });
}

/// Groups of all sizes around the tiles, none among them; widths around the tiles too.
pub fn check_ragged<T: Element, O: Element>(driver: &dyn Driver, products: F32Products) {
    let sizes = [0, 1, 15, 16, 17, 0, 64, 128, 129, 300, 0];
    for (gated, outputs, inputs) in [(true, 72, 72), (false, 136, 64)] {
        let mut case = Grouped::new(&sizes, outputs, inputs);
        case.gated = gated;
        case.activation = gated.then_some(Activation::Silu);
        case.tokens = Some(90);
        case.products = products;
        check_grouped::<T, O>(driver, &case);
    }
    check_grouped::<T, O>(driver, &Grouped::new(&[0, 0, 0], 8, 8));
    check_grouped::<T, O>(driver, &Grouped::new(&[2], 1, 8));
}

#[test]
fn grouped_ragged() {
    on_devices(false, |driver| {
        check_ragged::<bf16, bf16>(driver, F32Products::Full);
        check_ragged::<bf16, f32>(driver, F32Products::Full);
        check_ragged::<f16, f16>(driver, F32Products::Full);
        check_ragged::<f16, f32>(driver, F32Products::Full);
        check_ragged::<f32, f32>(driver, F32Products::Full);
    });
}

/// A row has the same bits in every class of tiles, with other rows and groups around it, and from run to run.
pub fn check_grouped_bits<T: Element, O: Element>(driver: &dyn Driver, products: F32Products) {
    for (gated, bias) in [(true, false), (false, true)] {
        let mut case = Grouped::new(&[5, 0, 40, 70, 1], 88, 200);
        case.gated = gated;
        case.activation = Some(Activation::GeluTanh);
        case.bias = bias;
        case.products = products;
        let data = Data::<T>::new(&case);
        let all = run_grouped_to::<T, O>(driver, &case, &data, None);
        for class in 0..CLASSES.len() {
            let found = run_grouped_to::<T, O>(driver, &case, &data, Some(class));
            assert!(bits(&found) == bits(&all), "{}, gated: {gated}, class {}", O::DTYPE, CLASSES[class]);
        }
        // Rows 7 .. 20 of the third group alone.
        let mut alone = case.clone();
        alone.sizes = vec![0, 0, 13, 0, 0];
        let from = (5 + 7) * case.inputs;
        let rows = Data { a: data.a[from..from + 13 * case.inputs].to_vec(), row_token: (0..13).collect(), ..data };
        let found = run_grouped_to::<T, O>(driver, &alone, &rows, None);
        let from = (5 + 7) * case.outputs;
        assert!(bits(&found) == bits(&all[from..from + found.len()]), "{}, gated: {gated}, alone", T::DTYPE);
    }
}

#[test]
fn grouped_bits() {
    on_devices(true, |driver| {
        check_grouped_bits::<bf16, bf16>(driver, F32Products::Full);
        check_grouped_bits::<bf16, f32>(driver, F32Products::Full);
        check_grouped_bits::<f16, f16>(driver, F32Products::Full);
        check_grouped_bits::<f16, f32>(driver, F32Products::Full);
        check_grouped_bits::<f32, f32>(driver, F32Products::Full);
    });
}

/// NaN and infinity stay in their row, zero rows and columns past the end do not spread what lies there.
pub fn check_grouped_nan<T: Element>(driver: &dyn Driver, products: F32Products) {
    for activation in ACTIVATIONS {
        let mut case = Grouped::new(&[9, 20], 24, 72);
        case.gated = true;
        case.activation = Some(activation);
        case.products = products;
        let mut data = Data::<T>::new(&case);
        let good = run_grouped(driver, &case, &data, None);
        data.a[4 * case.inputs + 71] = T::from_f32(f32::NAN);
        data.a[13 * case.inputs + 5] = T::from_f32(f32::INFINITY);
        let found = run_grouped(driver, &case, &data, None);
        let naive = naive_grouped::<T, T>(&case, &data);
        for (r, (row, good)) in found.chunks_exact(24).zip(good.chunks_exact(24)).enumerate() {
            if ![4, 13].contains(&r) {
                assert!(bits(row) == bits(good), "{activation:?} {} row {r}", T::DTYPE);
                continue;
            }
            for (x, naive) in row.iter().zip(&naive[24 * r..]) {
                let (x, naive) = (x.to_f64(), naive.to_f64());
                let good = match r {
                    4 => x.is_nan(),
                    _ if naive.is_finite() => x.is_finite(),
                    _ => x.is_nan() == naive.is_nan() && (x.is_nan() || x == naive),
                };
                assert!(good, "{activation:?} {} row {r}: {x}, the textbook has {naive}", T::DTYPE);
            }
        }
    }
}

#[test]
fn grouped_nan() {
    on_devices(true, |driver| {
        check_grouped_nan::<bf16>(driver, F32Products::Full);
        check_grouped_nan::<f16>(driver, F32Products::Full);
        check_grouped_nan::<f32>(driver, F32Products::Full);
    });
}

/// What 256 more columns `k` of one full tile cost, by entry: warp instructions, MMA (or FMA) among them, sectors fetched.
pub fn loop_cost<T: Element, O: Element>(
    class: usize,
    gated: bool,
    products: F32Products,
) -> (&'static str, u64, u64, u64) {
    let sim = Simulator::new(false);
    let scalar = T::DTYPE == Dtype::F32 && products == F32Products::Full;
    cost_of_columns(scalar, |inputs| {
        let mut case = Grouped::new(&[CLASSES[class]], 128, inputs);
        case.weights = Weights::Halves; // rows at whole sectors
        case.gated = gated;
        case.products = products;
        case.activation = gated.then_some(Activation::Silu);
        run_grouped_to::<T, O>(&sim, &case, &Data::<T>::new(&case), Some(class));
        let counters = sim.take_counters();
        *counters.iter().max_by_key(|(_, counters)| counters.instructions).unwrap()
    })
}

/// The cost of 512 columns without that of 256: no bank conflicts, whole sectors, the budget of the header. `scalar`: without MMA.
fn cost_of_columns(scalar: bool, count: impl Fn(usize) -> (&'static str, Counters)) -> (&'static str, u64, u64, u64) {
    let ((entry, short), (_, long)) = (count(256), count(512));
    for counters in [&short, &long] {
        assert_eq!(counters.conflict_degree(), 1.0, "{entry}: bank conflicts");
    }
    let class = if scalar { Class::Float } else { Class::Matrix };
    let sectors = long.global_sectors - short.global_sectors;
    assert_eq!(32 * sectors, long.global_bytes - short.global_bytes, "{entry}: sectors that are not used whole");
    let products = long.class(class) - short.class(class);
    // "32 MMA per 10240 bytes fetched", or "512 FMA per thread and 20480 bytes fetched": what the header says.
    let [per_stage, bytes, ..] = budget(entry)[..] else { panic!("{entry}: what its header has") };
    let kernel = kernels::ALL.iter().find(|kernel| kernel.entry == entry).unwrap();
    let warps = if scalar { u64::from(kernel.threads / 32) } else { 1 };
    assert_eq!(products * bytes, per_stage * warps * 32 * sectors, "{entry}: its budget");
    (entry, long.instructions - short.instructions, products, sectors)
}

/// The main loops: no bank conflicts, whole sectors, and no more instructions than these.
#[test]
fn grouped_counters() {
    let mut found = Vec::new();
    let tiles = || (0..CLASSES.len()).flat_map(|class| [(class, false), (class, true)]);
    found.extend(tiles().map(|(class, gated)| loop_cost::<bf16, bf16>(class, gated, F32Products::Full)));
    found.extend(tiles().map(|(class, gated)| loop_cost::<bf16, f32>(class, gated, F32Products::Full)));
    found.push(loop_cost::<f16, f32>(3, false, F32Products::Full));
    found.extend(tiles().map(|(class, gated)| loop_cost::<f32, f32>(class, gated, F32Products::Full)));
    let expected = [
        ("gatefold_grouped_gemm_bf16_m16", 2720, 256, 2560),
        ("gatefold_grouped_gemm_bf16_m16_gated", 5632, 512, 5120),
        ("gatefold_grouped_gemm_bf16_m32", 3232, 512, 3072),
        ("gatefold_grouped_gemm_bf16_m32_gated", 6656, 1024, 6144),
        ("gatefold_grouped_gemm_bf16_m64", 2960, 1024, 3072),
        ("gatefold_grouped_gemm_bf16_m64_gated", 6016, 2048, 6144),
        ("gatefold_grouped_gemm_bf16_m128", 5408, 2048, 4096),
        ("gatefold_grouped_gemm_bf16_m128_gated", 11008, 4096, 8192),
        ("gatefold_grouped_gemm_bf16_f32_m16", 4160, 256, 2560),
        ("gatefold_grouped_gemm_bf16_f32_m16_gated", 8512, 512, 5120),
        ("gatefold_grouped_gemm_bf16_f32_m32", 5696, 512, 3072),
        ("gatefold_grouped_gemm_bf16_f32_m32_gated", 11584, 1024, 6144),
        ("gatefold_grouped_gemm_bf16_f32_m64", 7264, 1024, 3072),
        ("gatefold_grouped_gemm_bf16_f32_m64_gated", 14624, 2048, 6144),
        ("gatefold_grouped_gemm_bf16_f32_m128", 14016, 2048, 4096),
        ("gatefold_grouped_gemm_bf16_f32_m128_gated", 28224, 4096, 8192),
        ("gatefold_grouped_gemm_f16_f32_m128", 14016, 2048, 4096),
        ("gatefold_grouped_gemm_f32_m16", 22976, 16384, 4608),
        ("gatefold_grouped_gemm_f32_m16_gated", 46144, 32768, 9216),
        ("gatefold_grouped_gemm_f32_m32", 40000, 32768, 5120),
        ("gatefold_grouped_gemm_f32_m32_gated", 80192, 65536, 10240),
        ("gatefold_grouped_gemm_f32_m64", 74048, 65536, 6144),
        ("gatefold_grouped_gemm_f32_m64_gated", 148_288, 131_072, 12288),
        ("gatefold_grouped_gemm_f32_m128", 147_072, 131_072, 8192),
        ("gatefold_grouped_gemm_f32_m128_gated", 294_528, 262_144, 16384),
    ];
    assert_eq!(found, expected);
}

/// Rows, matrices and results more than 2^31 elements apart: offsets that do not fit 32 bits. Needs 13 GB on the device.
fn check_far(driver: &dyn Driver) {
    let (inputs, outputs, far) = (64, 24, (1usize << 31) + 64);
    let mut case = Grouped::new(&[1, 1], outputs, inputs);
    case.seed = 9;
    let data = Data::<bf16>::new(&case);
    let near = run_grouped(driver, &case, &data, None);
    let place = |values: &[bf16], len: usize| {
        let memory = Buffer::new(driver, (far + len) * 2).unwrap();
        for (i, part) in values.chunks_exact(len).enumerate() {
            // SAFETY: the buffer has room for two parts `far` apart, and nothing runs.
            unsafe { driver.copy_to_device(memory.ptr() + (i * far * 2) as u64, bytemuck::cast_slice(part)).unwrap() };
        }
        memory
    };
    let a = place(&data.a, inputs);
    let weights = place(&data.weights[1], outputs * inputs);
    let out = Buffer::new(driver, (far + outputs) * 2).unwrap();
    let mut problem = GroupedGemm::experts(bf16::DTYPE, 2, 2, outputs, inputs);
    let max_tiles = 4;
    problem.rows = GemmRows::Listed { max_rows: 2, max_group_rows: 2, max_tiles };
    problem.a_stride = far;
    problem.up_group_stride = far;
    problem.out_stride = far;
    let (counts, lists) = tiles(&case, None, max_tiles);
    let (counts, lists) = (Buffer::from_slice(driver, &counts).unwrap(), Buffer::from_slice(driver, &lists).unwrap());
    let args = GroupedGemmArgs::new(a.ptr(), weights.ptr(), out.ptr()).with_tiles(counts.ptr(), lists.ptr());
    let plan = GroupedGemmPlan::new(&problem, &driver.limits()).unwrap();
    // SAFETY: the buffers hold two rows, or matrices, `far` apart and outlive the reads below, which wait.
    unsafe { plan.launch(driver, &args, Stream::LEGACY).unwrap() };
    driver.synchronize(Stream::LEGACY).unwrap();
    for (i, near) in near.chunks_exact(outputs).enumerate() {
        let mut row = vec![bf16::ZERO; outputs];
        // SAFETY: `out` holds two rows `far` apart, and nothing runs.
        unsafe {
            driver.copy_to_host(bytemuck::cast_slice_mut(&mut row), out.ptr() + (i * far * 2) as u64).unwrap();
        }
        assert!(bits(&row) == bits(near), "row {i}");
    }
}

#[test]
fn grouped_far() {
    on_large_devices(check_far);
}

/// A layer of 4096 x 4096 and as many tokens, where there is a GPU; some tokens are compared.
#[test]
fn real_sizes() {
    on_devices(false, |driver| check_tokens::<bf16, bf16>(driver, &Case::new(70, 72, 64), &[0, 33, 69]));
    on_gpu(|driver| check_tokens::<bf16, bf16>(driver, &Case::new(4096, 4096, 4096), &[0, 2047, 4095]));
}

/// A device with little shared memory and few multiprocessors: the same bits, CTAs that walk over many tiles.
#[test]
fn small_devices() {
    let mut case = Grouped::new(&[70, 5, 200, 33, 0, 16], 200, 136);
    case.gated = true;
    case.activation = Some(Activation::Silu);
    let data = Data::<bf16>::new(&case);
    let large = run_grouped(&Simulator::new(false), &case, &data, None);
    for shared_kib in [99, 163] {
        let small = Simulator::with_limits(false, Limits::new(80, 3, shared_kib << 10));
        assert!(bits(&run_grouped(&small, &case, &data, None)) == bits(&large), "{shared_kib} KiB");
    }
}

/// The heads of latent attention: each with its own matrix, rows and results interleaved by token.
fn check_heads<T: Element, O: Element>(driver: &dyn Driver) {
    for (i, (tokens, heads)) in [(1, 3), (20, 2), (70, 5), (0, 2)].into_iter().enumerate() {
        let mut case = Case::new(tokens, [40, 130][i % 2], 72);
        case.heads = heads;
        case.gaps = i % 2 == 1;
        case.out = Layout::ALL[i % 3];
        case.seed = i as u64;
        check::<T, O>(driver, &case);
    }
}

#[test]
fn linear_heads() {
    on_devices(false, |driver| {
        check_heads::<bf16, bf16>(driver);
        check_heads::<f16, f32>(driver);
        check_heads::<f32, f32>(driver);
    });
}

/// Long sums, where the truncation of tensor cores adds up: still within twice the error of sums that round.
#[test]
fn linear_long() {
    on_devices(false, |driver| {
        for (tokens, inputs) in [(3, 4096), (2, 14336)] {
            let case = Case::new(tokens, 70, inputs);
            check::<bf16, f32>(driver, &case);
            check::<f16, f32>(driver, &case);
            check::<bf16, bf16>(driver, &case);
            check::<f16, f16>(driver, &case);
            check::<f32, f32>(driver, &case);
        }
    });
}

/// The absorbed form's products with `kv_b`, as it is stored.
fn check_mla<T: Element>(driver: &dyn Driver) {
    for (i, (tokens, heads)) in [(1, 3), (17, 2), (70, 5), (0, 2)].into_iter().enumerate() {
        let (nope, value, rank) = ([24, 128][i % 2], [40, 16][i % 2], [72, 200][i / 2]);
        let spec = Mla::new(heads, rank, nope, 8, value);
        let mut rng = Rng::new(i as u64);
        let kv_b = rng.normals::<T>(heads * (nope + value) * rank, 1.0);
        let kv_b = Aligned::new([heads, nope + value, rank], i % 2 == 1, &kv_b);
        for absorb in [true, false] {
            let (inputs, outputs) = if absorb { (nope, rank) } else { (rank, value) };
            let x = rng.normals::<T>(tokens * heads * inputs, 1.0);
            let x = Aligned::new([tokens, heads, inputs], i % 2 == 0, &x);
            let shape = [tokens, heads, outputs];
            let (mut truth, mut naive) = (vec![0.0; tokens * heads * outputs], Vec::new());
            let result = ViewMut::new(&mut truth, shape);
            if absorb {
                reference::mla_absorb_query(&spec, x.view(), kv_b.view(), result).unwrap();
            } else {
                reference::mla_project_value(&spec, x.view(), kv_b.view(), result).unwrap();
            }
            let starts = starts_for(truth.len());
            for (at, truth) in truth.iter().enumerate() {
                let (t, h, o) = (at / outputs / heads, at / outputs % heads, at % outputs);
                let weight = |k| kv_b.view().at(if absorb { [h, k, o] } else { [h, nope + o, k] }).to_f32();
                let terms: Vec<f32> = (0..inputs).map(|k| x.view().at([t, h, k]).to_f32() * weight(k)).collect();
                naive.push(T::from_f32(naive_sum(&terms, 0.0, *truth, starts)));
            }
            let mut out = Output::<T, 3>::new(shape, Layout::ALL[i % 3]);
            if absorb {
                staged::mla_absorb_query(driver, &spec, x.view(), kv_b.view(), out.view()).unwrap();
            } else {
                staged::mla_project_value(driver, &spec, x.view(), kv_b.view(), out.view()).unwrap();
            }
            let what = format!("{spec:?} {tokens} tokens, absorb: {absorb}, {}", T::DTYPE);
            assert_sums(&what, &out.finish("out"), &truth, &naive, outputs);
        }
    }
}

#[test]
fn mla_products() {
    on_devices(false, |driver| {
        check_mla::<bf16>(driver);
        check_mla::<f16>(driver);
        check_mla::<f32>(driver);
    });
}

/// Transposed weights, of 2 heads with 128 outputs: the main loops as above.
#[test]
fn mla_counters() {
    fn cost<T: Element>(tokens: usize) -> (&'static str, u64, u64, u64) {
        // Two multiprocessors, so that 64 rows of two heads are not cut into smaller tiles.
        let sim = Simulator::with_limits(false, Limits::new(80, 2, 227 << 10));
        cost_of_columns(T::DTYPE == Dtype::F32, |nope| {
            let spec = Mla::new(2, 128, nope, 8, 16);
            let x = vec![T::from_f32(1.0); tokens * 2 * nope];
            let kv_b = vec![T::from_f32(1.0); 2 * (nope + 16) * 128];
            let mut out = vec![T::from_f32(0.0); tokens * 2 * 128];
            let (x, kv_b) = (View::new(&x, [tokens, 2, nope]), View::new(&kv_b, [2, nope + 16, 128]));
            let result = ViewMut::new(&mut out, [tokens, 2, 128]);
            staged::mla_absorb_query(&sim, &spec, x, kv_b, result).unwrap();
            assert!(out.iter().all(|x| x.to_f32() == nope as f32));
            let [counted] = sim.take_counters()[..] else { panic!("one launch") };
            counted
        })
    }
    let found = [cost::<bf16>(16), cost::<bf16>(64), cost::<f32>(16), cost::<f32>(64)];
    let expected = [
        ("gatefold_grouped_gemm_bf16_m16_transposed", 5824, 512, 5120),
        ("gatefold_grouped_gemm_bf16_m64_transposed", 6368, 2048, 6144),
        ("gatefold_grouped_gemm_f32_m16_transposed", 50_816, 32_768, 9216),
        ("gatefold_grouped_gemm_f32_m64_transposed", 152_960, 131_072, 12_288),
    ];
    assert_eq!(found, expected);
}
