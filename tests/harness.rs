//! The harness itself: naive methods against the reference, guards that notice, tables that cover.

mod common;

use common::*;
use gatefold::spec::Score;
use gatefold::{Dtype, reference};
use half::{bf16, f16};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The naive method in f32 is near the truth, and the tolerance knows.
    #[test]
    fn attention_naive_is_near_the_reference(options in strategies::attention(8, 16), seed in any::<u64>()) {
        let case = AttentionCase::<f32>::new(&options, seed);
        let truth = case.run(reference::attention);
        let naive = naive::attention::<f32, f32>(&case.spec, &case.input(), naive::Store::F32);
        let got: Vec<f64> = naive.out.iter().map(|x| f64::from(*x)).collect();
        assert_close("out", &got, &truth.out, 3e-6);
        let got: Vec<f64> = naive.lse.iter().map(|x| f64::from(*x)).collect();
        assert_close("lse", &got, &truth.lse, 3e-6);
        prop_assert!(truth.out.iter().all(|x| x.is_finite()), "NaN around the arrays has reached the output");
    }

    #[test]
    fn experts_naive_is_near_the_reference((spec, options) in strategies::experts(4, 16, 8), seed in any::<u64>()) {
        let case = ExpertCase::<bf16, f16>::new(&spec, options, seed);
        let weights = case.weights();
        let truth = case.run(|spec, x, routing, out| reference::expert_ffn(spec, x, routing, &weights, out));
        let naive = naive::expert_ffn::<_, _, f32>(&spec, &case.hidden.view(), &case.routing(), &weights, naive::Store::F32);
        let got: Vec<f64> = naive.iter().map(|x| f64::from(*x)).collect();
        assert_close("out", &got, &truth, 1e-5);
    }

    #[test]
    fn routes_are_distinct_and_in_range(spec in strategies::router(), n in 0usize..30, seed in any::<u64>()) {
        let case = RouteCase::new(&spec, n, seed).with_masks();
        let r = case.run(reference::route);
        let mut total = 0;
        for row in r.ids.chunks(spec.slots()) {
            let mut used: Vec<i32> = row.iter().copied().filter(|id| *id >= 0).collect();
            total += used.len();
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(used.len(), row.iter().filter(|id| **id >= 0).count());
            prop_assert!(used.iter().all(|id| (*id as usize) < spec.num_experts));
        }
        prop_assert_eq!(r.tokens_per_expert.iter().sum::<u32>() as usize, total);
        // Raw scores may sum to 0; nothing else divides by it.
        prop_assert!(spec.score == Score::Raw || r.weights.iter().all(|w| w.is_finite()));
    }
}

#[test]
fn guards_notice() {
    let mut out = Output::<f32, 2>::new([2, 3], Layout::Padded);
    out.assert_untouched("out");
    out.view().row_mut(&[1]).fill(1.0);
    out.finish("out");
    assert!(std::panic::catch_unwind(|| out.assert_untouched("out")).is_err());
    let mut beyond = Output::<f32, 2>::new([2, 3], Layout::Padded);
    beyond.view().data_mut()[3] = 0.0; // between the rows
    assert!(std::panic::catch_unwind(|| beyond.finish("out")).is_err());
}

#[test]
fn tolerance_is_per_row() {
    let truth = [1.0, 100.0, 0.0, 1e-3];
    let naive = [1.0f32, 100.0 + 1e-5, 0.0, 1e-3];
    assert!(check_rows("x", &[1.0f32, 100.0 + 1e-5, 0.0, 1e-3], &truth, &naive, 2).is_ok());
    assert!(check_rows("x", &[1.0f32 + 1e-5, 100.0, 0.0, 1e-3], &truth, &naive, 2).is_ok());
    // The second row is small: an error that the first row may have is too much for it.
    assert!(check_rows("x", &[1.0f32, 100.0, 1e-5, 1e-3], &truth, &naive, 2).is_err());
    assert!(check_rows("x", &[f32::NAN; 4], &truth, &naive, 2).is_err());
    assert!(check_rows("x", &[f32::INFINITY], &[f64::INFINITY], &[f32::INFINITY], 1).is_ok());
    assert_eq!(tolerance::ulp(Dtype::F32, 1.0), f64::from(f32::EPSILON));
    assert_eq!(tolerance::ulp(Dtype::BF16, 1.5), 2f64.powi(-7));
    assert_eq!(tolerance::ulp(Dtype::F16, 0.0), f16::from_bits(1).to_f64());
}

#[test]
fn pairs_cover() {
    let table = pairs::pairwise(&[3, 2, 4, 3], 1, |row| !(row[0] == 1 && row[3] == 2));
    assert_eq!(table.covered, table.total);
    assert_eq!(table.impossible, [((0, 1), (3, 2))]);
    assert!(table.rows.len() < 3 * 2 * 4 * 3 / 2);
}
