//! Whole mixtures bit for bit: from run to run, whatever the other tokens, for every tile and device; and the sum over ranks.

use super::moe::{mixture_of, options, small, with_shared};
use crate::common::simulator::Simulator;
use crate::common::sums::bits;
use crate::common::{Array, ExpertCase, Layout, MoeCase, MoeResult};
use crate::{is_simulated, on_devices, on_gpu};
use gatefold::Element;
use gatefold::cuda::driver::{Driver, Limits};
use gatefold::spec::{
    Capacity, CapacityLimit, CapacityOrder, ExpertGroups, GroupScore, Moe, Renormalize, Score, SecondExpert, Selection,
};
use half::bf16;

/// Every way in which tokens and experts find each other, with a name.
pub fn routers() -> Vec<(&'static str, Moe)> {
    type Edit = fn(&mut Moe);
    let edits: [(&str, Edit); 10] = [
        ("softmax", |_| {}),
        ("top-k, then softmax", |s| {
            (s.router.score, s.router.renormalize, s.router_bias) = (Score::Raw, Renormalize::Softmax, true);
        }),
        ("sigmoid with bias and groups", |s| {
            (s.router.score, s.router.renormalize) = (Score::Sigmoid, Renormalize::sum());
            s.router.groups = Some(ExpertGroups::new(4, 2, GroupScore::Top2Sum));
            (s.selection_bias, s.router.scaling_factor) = (true, 2.5);
        }),
        ("prototypes", |s| s.router.selection = Selection::Prototypes),
        ("sparse mixer", |s| s.router.selection = Selection::SparseMixer { jitter_eps: 0.1 }),
        ("capacity by position", |s| s.router.capacity = Some(Capacity::new(CapacityLimit::Factor(0.75)))),
        ("capacity by score", |s| {
            let mut capacity = Capacity::new(CapacityLimit::Factor(0.75));
            (capacity.order, capacity.normalize_after_drop) = (CapacityOrder::Score, true);
            (s.router.capacity, s.router.renormalize) = (Some(capacity), Renormalize::sum());
        }),
        ("second expert by chance", |s| {
            (s.router.second_expert, s.router.renormalize) = (SecondExpert::Random, Renormalize::sum());
        }),
        ("expert choice", |s| {
            s.router.selection = Selection::ExpertChoice;
            s.router.capacity = Some(Capacity::new(CapacityLimit::Factor(1.0)));
        }),
        ("sinkhorn", |s| s.router.selection = Selection::Sinkhorn { iterations: 3 }),
    ];
    let router = |(name, edit): (&'static str, Edit)| {
        let mut spec = small(2);
        edit(&mut spec);
        (name, spec)
    };
    edits.into_iter().map(router).collect()
}

/// vllm-project/vllm#54948, #31279: the same request gave other logits, because experts were added in the order in which they came.
#[test]
fn the_same_bits_on_every_run() {
    on_devices(true, |driver| {
        for (name, spec) in routers() {
            let spec = with_shared(spec);
            for n in [1, 9, 70] {
                let case = MoeCase::<bf16, bf16, bf16>::new(&spec, options(n, 2), 4).with_mask();
                let first = mixture_of(driver, &case, None, true);
                for _ in 0..3 {
                    assert!(mixture_of(driver, &case, None, true) == first, "{name}, {n} tokens");
                }
            }
        }
    });
}

/// The same call of these tokens, in this order; a token may come twice.
fn of_tokens<T: Element>(case: &MoeCase<T, T, T>, tokens: &[usize]) -> MoeCase<T, T, T> {
    let layout = case.experts.options.layout;
    let width = case.spec.experts.ffn.hidden_size;
    let values = case.experts.hidden.values();
    let rows: Vec<T> = tokens.iter().flat_map(|t| values[t * width..(t + 1) * width].to_vec()).collect();
    let mut other = case.clone();
    for part in [Some(&mut other.experts), other.shared.as_mut()].into_iter().flatten() {
        part.options.num_tokens = tokens.len();
        part.hidden = Array::new([tokens.len(), width], layout, &rows);
    }
    let slots = case.experts.options.slots;
    other.experts.ids = Array::new([tokens.len(), slots], layout, &vec![-1; tokens.len() * slots]);
    other.experts.topk_weights = Array::new([tokens.len(), slots], layout, &vec![0.0; tokens.len() * slots]);
    other
}

/// vllm-project/vllm#57016, #41480: a flag for it did not hold for experts. Here a token's bits are the same alone, between others, at
/// another place, in another order, twice in a batch, and beside NaN.
#[test]
fn the_same_bits_whatever_the_other_tokens() {
    fn check<T: Element>(driver: &dyn Driver) {
        for (name, spec) in routers().into_iter().take(5) {
            let spec = with_shared(spec);
            let case = MoeCase::<T, T, T>::new(&spec, options(90, 2), 8);
            let all = mixture_of(driver, &case, None, true);
            let batches: [(&str, Vec<usize>); 6] = [
                ("alone", vec![41]),
                ("two", vec![3, 41]),
                ("a decode step", vec![41, 7, 8, 9, 10, 11, 12]),
                ("backwards", (0..90).rev().collect()),
                ("all the same", vec![41; 70]),
                ("a long prompt", (0..260).map(|i| (i * 7) % 90).collect()),
            ];
            for (batch, tokens) in batches {
                let part = of_tokens(&case, &tokens);
                assert_rows(&format!("{name}, {batch}"), &mixture_of(driver, &part, None, true), &all, &tokens);
            }
            let mut spoiled = case.clone();
            spoiled.experts.hidden.set([40, 1], T::from_f32(f32::NAN));
            let got = mixture_of(driver, &spoiled, None, true);
            let (got, want) = (&got.out[41 * 40..], &all.out[41 * 40..]);
            assert!(bits(got) == bits(want), "{name}: beside NaN");
        }
    }
    on_devices(true, |driver| {
        check::<bf16>(driver);
        check::<f32>(driver);
    });
}

/// Rows, ids and weights of these tokens are those of the whole batch.
#[track_caller]
fn assert_rows<T: Element>(what: &str, got: &MoeResult<T, f32>, all: &MoeResult<T, f32>, tokens: &[usize]) {
    let width = got.out.len() / tokens.len();
    let (route, all_route) = (got.route.as_ref().unwrap(), all.route.as_ref().unwrap());
    for (i, t) in tokens.iter().enumerate() {
        let (here, there) = (i * width..(i + 1) * width, t * width..(t + 1) * width);
        assert!(bits(&got.out[here]) == bits(&all.out[there]), "{what}: token {t}");
        assert_eq!(route.ids[2 * i..2 * i + 2], all_route.ids[2 * t..2 * t + 2], "{what}: token {t}");
        let weights = [&route.weights[2 * i..2 * i + 2], &all_route.weights[2 * t..2 * t + 2]];
        assert_eq!(bits(weights[0]), bits(weights[1]), "{what}: token {t}");
    }
}

/// The rows of an expert fall into tiles of 16, 32, 64 or 128, by how many they are; small devices take other tiles, and few
/// multiprocessors fewer CTAs. A token's bits are the same in all of them. A GPU has its own limits, and no counters that name the kernels.
#[test]
fn the_same_bits_for_every_row_tile() {
    const ROWS: [usize; 10] = [1, 16, 17, 32, 33, 64, 65, 128, 129, 300];
    fn case<T: Element>() -> MoeCase<T, T, T> {
        MoeCase::new(&with_shared(small(2)), options(1, 2), 3)
    }
    fn check<T: Element>(driver: &dyn Driver) {
        let case = case::<T>();
        let one = mixture_of(driver, &case, None, true);
        for rows in ROWS {
            let tokens = vec![0; rows];
            let got = mixture_of(driver, &of_tokens(&case, &tokens), None, true);
            assert_rows(&format!("{:?}, {rows} rows", T::DTYPE), &got, &one, &tokens);
        }
    }
    fn check_limits<T: Element>() {
        let case = case::<T>();
        let mut names = std::collections::BTreeSet::new();
        let one = mixture_of(&Simulator::new(false), &case, None, true);
        for limits in [Limits::new(90, 132, 227 << 10), Limits::new(80, 108, 163 << 10), Limits::new(86, 3, 99 << 10)] {
            for rows in ROWS {
                let simulator = Simulator::with_limits(false, limits);
                let tokens = vec![0; rows];
                let got = mixture_of(&simulator, &of_tokens(&case, &tokens), None, true);
                assert_rows(&format!("{:?}, {rows} rows, {limits:?}", T::DTYPE), &got, &one, &tokens);
                names.extend(simulator.take_counters().into_iter().map(|(entry, _)| entry));
            }
        }
        for tile in ["m16", "m32", "m64", "m128"] {
            assert!(names.iter().any(|name| name.contains("grouped_gemm") && name.contains(tile)), "{tile}: {names:?}");
        }
    }
    if is_simulated() {
        check_limits::<bf16>();
        check_limits::<f32>();
    }
    on_gpu(|driver| {
        check::<bf16>(driver);
        check::<f32>(driver);
    });
}

/// Experts over ranks: an id outside of a rank's range is nobody's there, so each rank gives its part, ranks add up to the whole, and one
/// without experts gives 0. Every rank routes alike.
#[test]
fn ranks_of_a_mixture_add_up() {
    on_devices(true, |driver| {
        for (name, spec) in routers() {
            let case = MoeCase::<f32, f32, f32>::new(&spec, options(33, 2), 7).with_mask();
            let whole = mixture_of(driver, &case, None, true);
            for ranks in [vec![(0, 3), (3, 5), (8, 0)], vec![(0, 0), (0, 8)], (0..8).map(|e| (e, 1)).collect()] {
                let mut sums = vec![0.0; whole.out.len()];
                for (first, count) in ranks {
                    let rank = rank_of(&case, first, count);
                    let part = mixture_of(driver, &rank, None, true);
                    assert!(part.route == whole.route, "{name}: the rank of {first} + {count} routes otherwise");
                    assert!(count > 0 || part.out.iter().all(|x| x.to_bits() == 0), "{name}: a rank without experts");
                    for (i, row) in part.out.chunks(40).enumerate() {
                        let ids = &whole.route.as_ref().unwrap().ids;
                        let slots = ids.len() / 33;
                        let mine = |id: &i32| (first as i32..(first + count) as i32).contains(id);
                        let is_mine = ids[i * slots..(i + 1) * slots].iter().any(mine);
                        assert!(is_mine || row.iter().all(|x| x.to_bits() == 0), "{name}: token {i} is nobody's here");
                    }
                    sums.iter_mut().zip(part.out).for_each(|(sum, x)| *sum += x);
                }
                for (sum, want) in sums.iter().zip(&whole.out) {
                    assert!((sum - want).abs() <= 1e-6 * (1.0 + want.abs()), "{name}: {sum}, expected {want}");
                }
            }
        }
    });
}

/// The case of a rank that has some of the experts.
pub fn rank_of<T: Element>(case: &MoeCase<T, T, T>, first: usize, count: usize) -> MoeCase<T, T, T> {
    let cut = |array: &Array<T, 3>| {
        let [_, rows, cols] = array.shape();
        let values = &array.values()[first * rows * cols..(first + count) * rows * cols];
        Array::new([count, rows, cols], Layout::Contiguous, values)
    };
    let mut rank = case.clone();
    (rank.spec.experts.first_expert, rank.spec.experts.num_local_experts) = (first, count);
    rank.experts = ExpertCase {
        spec: rank.spec.experts,
        gate_up: case.experts.gate_up.iter().map(cut).collect(),
        down: cut(&case.experts.down),
        ..case.experts.clone()
    };
    rank
}
