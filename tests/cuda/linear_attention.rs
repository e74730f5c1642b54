//! Linear attention: retention in its forms and RWKV-4's `wkv`.

use crate::common::glue_case::WIDTHS;
use crate::common::linear_case::{RetentionCase, WithState, WkvCase, assert_with_state};
use crate::common::simulator::Simulator;
use crate::common::{Array, Layout, Rng, assert_rows, seed};
use crate::{on_devices, on_gpu, staged, with_type};
use gatefold::cpu::{self, Cpu};
use gatefold::cuda::driver::Driver;
use gatefold::spec::{Retention, RetentionForm};
use gatefold::{Dtype, Element, reference};
use half::bf16;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

fn check_wkv<T: Element>(driver: &dyn Driver, shape: [usize; 3], layout: Layout, with_state: bool, seed: u64) {
    let case = WkvCase::<T>::new(shape, layout, with_state, seed);
    let (out, state) = case.run(|input, output| staged::wkv(driver, input, output));
    let what = format!("{} {shape:?} {layout:?} state {with_state}, seed {seed}", T::DTYPE);
    assert_with_state(&what, (&out, &state), &case.expected(), shape[2]);
}

#[test]
fn wkvs() {
    let seed = seed();
    on_devices(true, |driver| {
        let mut rng = Rng::new(seed);
        for _ in 0..60 {
            let shape = [1 + rng.below(3), *rng.pick(&[0, 1, 2, 9, 40]), *rng.pick(&WIDTHS)];
            let (layout, with_state) = (*rng.pick(&Layout::ALL), rng.chance(0.5));
            with_type!(*rng.pick(&DTYPES), check_wkv(driver, shape, layout, with_state, rng.next()));
        }
    });
}

fn check_retention<T: Element>(
    driver: &dyn Driver,
    spec: &Retention,
    n: usize,
    layout: Layout,
    with_state: bool,
    seed: u64,
) {
    let case = RetentionCase::<T>::new(spec, n, layout, with_state, seed);
    let (out, state) = case.run(|spec, input, output| staged::retention(driver, spec, input, output));
    let what = format!("{} {spec:?}, {n} tokens, {layout:?}, state {with_state}, seed {seed}", T::DTYPE);
    assert_with_state(&what, (&out, &state), &case.expected(), spec.value_dim);
}

#[test]
fn retentions() {
    let forms = [
        RetentionForm::Parallel,
        RetentionForm::Recurrent,
        RetentionForm::Chunkwise(1),
        RetentionForm::Chunkwise(5),
        RetentionForm::Chunkwise(100),
    ];
    let seed = seed();
    on_devices(true, |driver| {
        let mut rng = Rng::new(seed);
        for _ in 0..60 {
            let (heads, dim, value_dim) =
                *rng.pick(&[(1, 1, 16), (2, 8, 16), (3, 17, 5), (2, 32, 33), (1, 64, 64), (1, 33, 31)]);
            let mut spec = Retention::new(heads, dim, value_dim);
            spec.form = *rng.pick(&forms);
            let (n, layout, with_state) =
                (*rng.pick(&[0, 1, 2, 7, 16, 17, 33]), *rng.pick(&Layout::ALL), rng.chance(0.5));
            with_type!(*rng.pick(&DTYPES), check_retention(driver, &spec, n, layout, with_state, rng.next()));
        }
    });
}

// --- bits -------------------------------------------------------------------------------------------------------------

fn run_wkv<T: Element>(driver: &dyn Driver, case: &WkvCase<T>) -> WithState<T, f32> {
    case.run(|input, output| staged::wkv(driver, input, output))
}

fn run_retention<T: Element>(driver: &dyn Driver, case: &RetentionCase<T>) -> WithState<T, f32> {
    case.run(|spec, input, output| staged::retention(driver, spec, input, output))
}

/// Elements of an array by ranges of its three dimensions.
fn part<T: Element>(x: &Array<T, 3>, ranges: [std::ops::Range<usize>; 3]) -> Array<T, 3> {
    let [a, b, c] = ranges.clone();
    let values: Vec<T> = a
        .flat_map(|i| b.clone().map(move |j| (i, j)))
        .flat_map(|(i, j)| c.clone().map(move |k| [i, j, k]))
        .map(|index| x.at(index))
        .collect();
    Array::new(ranges.map(|range| range.len()), Layout::Contiguous, &values)
}

/// Bits as an array of three dimensions.
fn whole<T: Element>(shape: [usize; 3], values: &[T]) -> Array<T, 3> {
    Array::new(shape, Layout::Contiguous, values)
}

fn assert_same<T: Element>(what: &str, got: &[T], want: &Array<T, 3>) {
    assert_eq!(bytemuck::cast_slice::<T, u8>(got), bytemuck::cast_slice::<T, u8>(&want.values()), "{what}");
}

fn check_wkv_bits<T: Element>(driver: &dyn Driver) {
    let shape @ [batch, seq, channels] = [4, 23, 70];
    let all = WkvCase::<T>::new(shape, Layout::Contiguous, true, 8);
    let (out, state) = run_wkv(driver, &all);
    assert!(run_wkv(driver, &all) == (out.clone(), state.clone()), "run to run");
    let (out, state) = (whole(shape, &out), whole([3, batch, channels], &state));
    let piece = |batches: std::ops::Range<usize>, tokens: std::ops::Range<usize>, state: &Array<f32, 3>| {
        let at = |x| part(x, [batches.clone(), tokens.clone(), 0..channels]);
        let (k, v) = (at(&all.k), at(&all.v));
        let (decay, first) = (all.decay.clone(), all.first.clone());
        let state = Some(part(state, [0..3, batches.clone(), 0..channels]));
        run_wkv(driver, &WkvCase { k, v, decay, first, state, layout: Layout::Padded })
    };
    let before = all.state.as_ref().unwrap();
    for batches in [0..1, 3..4, 1..3] {
        let (some, after) = piece(batches.clone(), 0..seq, before);
        assert_same("out", &some, &part(&out, [batches.clone(), 0..seq, 0..channels]));
        assert_same("state", &after, &part(&state, [0..3, batches, 0..channels]));
    }
    for cut in [1, 7, 22] {
        let (head, between) = piece(0..batch, 0..cut, before);
        let (tail, after) = piece(0..batch, cut..seq, &whole([3, batch, channels], &between));
        assert_same("first tokens", &head, &part(&out, [0..batch, 0..cut, 0..channels]));
        assert_same("last tokens", &tail, &part(&out, [0..batch, cut..seq, 0..channels]));
        assert_same("state", &after, &state);
    }
}

/// A sequence alone, among others, at once or in pieces with the state between them, and again: the same bits.
#[test]
fn wkv_bits_in_any_batch_and_run() {
    on_devices(true, |driver| {
        check_wkv_bits::<bf16>(driver);
        check_wkv_bits::<f32>(driver);
    });
}

fn check_retention_bits<T: Element>(driver: &dyn Driver, form: RetentionForm) {
    let (heads, dim, value_dim, n) = (3, 33, 70, 37);
    let case = |n, heads: std::ops::Range<usize>, columns: std::ops::Range<usize>, tokens: std::ops::Range<usize>| {
        let mut spec = Retention::new(3, dim, value_dim);
        spec.form = form;
        let mut case = RetentionCase::<T>::new(&spec, n, Layout::Contiguous, true, 9);
        (case.spec.num_heads, case.spec.value_dim) = (heads.len(), columns.len());
        case.q = part(&case.q, [tokens.clone(), heads.clone(), 0..dim]);
        case.k = part(&case.k, [tokens.clone(), heads.clone(), 0..dim]);
        case.v = part(&case.v, [tokens, heads.clone(), columns.clone()]);
        case.state = case.state.map(|state| part(&state, [heads.clone(), 0..dim, columns]));
        case.decay = case.decay[heads].to_vec();
        case
    };
    let all = case(n, 0..heads, 0..value_dim, 0..n);
    let (out, state) = run_retention(driver, &all);
    assert!(run_retention(driver, &all) == (out.clone(), state.clone()), "run to run");
    let (out, state) = (whole([n, heads, value_dim], &out), whole([heads, dim, value_dim], &state));
    for (some, columns) in [(0..1, 0..70), (2..3, 0..70), (1..3, 0..33), (0..3, 5..6)] {
        let (few, after) = run_retention(driver, &case(n, some.clone(), columns.clone(), 0..n));
        assert_same(&format!("heads {some:?}, {form:?}"), &few, &part(&out, [0..n, some.clone(), columns.clone()]));
        assert_same(&format!("state of {some:?}, {form:?}"), &after, &part(&state, [some, 0..dim, columns]));
    }
    for tokens in [1, 16, 17, 30] {
        let (first, _) = run_retention(driver, &case(n, 0..heads, 0..value_dim, 0..tokens));
        assert_same(&format!("first {tokens}, {form:?}"), &first, &part(&out, [0..tokens, 0..heads, 0..value_dim]));
    }
    // Where the form steps from state to state, a cut at a step changes nothing.
    let cut = match form {
        RetentionForm::Recurrent => 13,
        RetentionForm::Chunkwise(size) => 2 * size,
        _ => return,
    };
    let (head, between) = run_retention(driver, &case(n, 0..heads, 0..value_dim, 0..cut));
    let mut rest = case(n, 0..heads, 0..value_dim, cut..n);
    rest.state = Some(whole([heads, dim, value_dim], &between));
    let (tail, after) = run_retention(driver, &rest);
    assert_same("first tokens", &head, &part(&out, [0..cut, 0..heads, 0..value_dim]));
    assert_same("last tokens", &tail, &part(&out, [cut..n, 0..heads, 0..value_dim]));
    assert_same("state", &after, &state);
}

/// A head alone or among others, some of its columns, the first tokens without those after them, in pieces, and again: the same bits.
#[test]
fn retention_bits_in_any_batch_and_run() {
    on_devices(true, |driver| {
        for form in [RetentionForm::Parallel, RetentionForm::Recurrent, RetentionForm::Chunkwise(8)] {
            check_retention_bits::<bf16>(driver, form);
            check_retention_bits::<f32>(driver, form);
        }
    });
}

// --- counters ---------------------------------------------------------------------------------------------------------

/// Warp instructions, wavefronts of shared memory without conflicts, sectors; of 32 more tokens, so without what a call costs anyway.
#[test]
fn linear_attention_counters() {
    let count = |run: &dyn Fn(&Simulator)| {
        let simulator = Simulator::new(false);
        run(&simulator);
        let [(entry, c)] = simulator.take_counters()[..] else { panic!("one launch") };
        assert_eq!(c.shared_wavefronts, c.shared_ideal_wavefronts, "{entry}: bank conflicts");
        (entry, [c.instructions, c.shared_wavefronts, c.global_sectors])
    };
    let more = |run: &dyn Fn(&Simulator, usize)| {
        let ((entry, few), (_, many)) = (count(&|sim| run(sim, 32)), count(&|sim| run(sim, 64)));
        (entry, [0, 1, 2].map(|i| many[i] - few[i]))
    };
    let mut found = vec![more(&|sim, n| {
        run_wkv(sim, &WkvCase::<bf16>::new([1, n, 64], Layout::Contiguous, true, 10));
    })];
    // Three arrays of 64 columns, each sector once.
    assert_eq!(found[0].1[2], 3 * 32 * 64 * 2 / 32);
    for form in [RetentionForm::Recurrent, RetentionForm::Chunkwise(16), RetentionForm::Parallel] {
        found.push(more(&|sim, n| {
            let mut spec = Retention::new(1, 64, 64);
            spec.form = form;
            run_retention(sim, &RetentionCase::<bf16>::new(&spec, n, Layout::Contiguous, true, 11));
        }));
    }
    for (entry, cost) in &found {
        println!("{entry}: {cost:?}, {:.3} instructions per element", cost[0] as f64 / (32.0 * 64.0));
    }
    let expected = [
        ("gatefold_wkv_bf16", [8448, 0, 384]),
        ("gatefold_retention_bf16", [97152, 8192, 8448]),
        ("gatefold_retention_bf16", [171_076, 12800, 13888]),
        ("gatefold_retention_bf16", [404_396, 12544, 40516]),
    ];
    assert_eq!(found, expected);
}

/// Channels of RWKV-4 7B, heads of RetNet, where there is a GPU. A long prompt takes the naive method too long: of it, the outputs are
/// compared with the token by token form in f64, by the errors of the CPU's.
#[test]
fn real_sizes() {
    fn check_prompt(driver: &dyn Driver, heads: usize, dim: usize, n: usize) {
        let mut spec = Retention::new(heads, dim, 2 * dim);
        spec.form = RetentionForm::Recurrent;
        let case = RetentionCase::<bf16>::new(&spec, n, Layout::Contiguous, true, 3);
        let (truth, _) = case.run::<f64, f64>(reference::retention);
        let cpu = &mut Cpu::new().unwrap();
        let (naive, _) = case.run::<bf16, f32>(|spec, input, output| cpu::retention(cpu, spec, input, output));
        assert_rows("out", &run_retention(driver, &case).0, &truth, &naive, 2 * dim);
    }
    on_devices(true, |driver| check_prompt(driver, 2, 32, 40));
    on_gpu(|driver| {
        check_wkv::<bf16>(driver, [2, 512, 4096], Layout::Contiguous, true, 1);
        let mut spec = Retention::new(8, 256, 512);
        spec.form = RetentionForm::Recurrent;
        check_retention::<bf16>(driver, &spec, 9, Layout::Contiguous, true, 2);
        check_prompt(driver, 8, 256, 1024);
    });
}
