//! Attention of few queries over many keys, and the merge of parts.

use crate::common::attention_case::KvLayout;
use crate::common::tolerance::ulp;
use crate::common::{Array, AttentionCase, AttentionOptions, Layout, Output, Rng, assert_rows, naive, seed};
use crate::{on_devices, staged};
use gatefold::args::AttentionOutput;
use gatefold::cuda::driver::Driver;
use gatefold::spec::Mask;
use gatefold::{Element, ViewMut, reference};
use half::{bf16, f16};

// --- merge ------------------------------------------------------------------------------------------------------------

/// `merge` against the reference, whatever is infinite, NaN or absent.
fn check_merge<T: Element, O: Element>(driver: &dyn Driver, layout: Layout, shape: [usize; 4], rng: &mut Rng) {
    let [parts, tokens, heads, dv] = shape;
    let outs = Array::<T, 4>::new(shape, layout, &rng.normals(parts * tokens * heads * dv, 1.0));
    let mut values: Vec<f32> = rng.normals(parts * tokens * heads, 3.0);
    let special = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, f32::NEG_INFINITY];
    values.iter_mut().filter(|_| rng.chance(0.2)).enumerate().for_each(|(i, x)| *x = special[i % 4]);
    let lses = Array::<f32, 3>::new([parts, tokens, heads], layout, &values);
    let (mut truth, mut truth_lse) = (vec![0.0; tokens * heads * dv], vec![0.0; tokens * heads]);
    let output = AttentionOutput::with_lse(
        ViewMut::new(&mut truth, [tokens, heads, dv]),
        ViewMut::new(&mut truth_lse, [tokens, heads]),
    );
    reference::merge(outs.view(), lses.view(), output).unwrap();
    let mut out = Output::<O, 3>::new([tokens, heads, dv], layout);
    let mut lse = Output::<f32, 2>::new([tokens, heads], layout);
    let output = AttentionOutput::with_lse(out.view(), lse.view());
    staged::merge(driver, outs.view(), lses.view(), output).unwrap();
    // Sums of a few shares, each of them below 1: some roundings of the largest part, and that of the result.
    let out: Vec<f64> = out.finish("out").iter().map(|x| x.to_f64()).collect();
    let lse: Vec<f64> = lse.finish("lse").iter().map(|x| x.to_f64()).collect();
    let rounding = 0.5 * ulp(O::DTYPE, 1.0);
    for (what, got, truth, relative) in [("out", out, truth, rounding), ("lse", lse, truth_lse, 0.0)] {
        for (got, truth) in got.iter().zip(&truth) {
            let same = got.is_nan() && truth.is_nan() || got == truth;
            let allowed = 3e-6 + relative * truth.abs();
            assert!(same || (got - truth).abs() <= allowed, "{what} {shape:?}: {got}, expected {truth}");
        }
    }
}

#[test]
fn merge_is_the_reference() {
    on_devices(false, |driver| {
        let mut rng = Rng::new(seed());
        // Around the 8 warps, the 32 parts of a round, and the 128 columns of a block.
        for shape in [
            [0, 3, 2, 5],
            [1, 1, 1, 1],
            [2, 7, 3, 40],
            [5, 3, 4, 17],
            [3, 0, 2, 4],
            [9, 2, 1, 128],
            [33, 1, 2, 129],
            [300, 1, 1, 33],
            [2, 2, 2, 0],
        ] {
            for layout in Layout::ALL {
                check_merge::<bf16, bf16>(driver, layout, shape, &mut rng);
                check_merge::<bf16, f32>(driver, layout, shape, &mut rng);
                check_merge::<f16, f16>(driver, layout, shape, &mut rng);
                check_merge::<f32, f32>(driver, layout, shape, &mut rng);
                check_merge::<f32, bf16>(driver, layout, shape, &mut rng);
            }
        }
    });
}

/// Parts without weight behind the others, in between, or none: the same bits, also without `lse`.
#[test]
fn merge_bits() {
    on_devices(true, |driver| {
        let mut rng = Rng::new(seed());
        let (tokens, heads, dv) = (3, 2, 130);
        let outs: Vec<f32> = rng.normals(13 * tokens * heads * dv, 1.0);
        let lses: Vec<f32> = rng.normals(13 * tokens * heads, 3.0);
        let run = |parts: usize, pad: usize| {
            let mut outs = outs[..parts * tokens * heads * dv].to_vec();
            outs.resize((parts + pad) * tokens * heads * dv, f32::NAN);
            let mut lses = lses[..parts * tokens * heads].to_vec();
            lses.resize((parts + pad) * tokens * heads, f32::NEG_INFINITY);
            let outs = Array::<f32, 4>::new([parts + pad, tokens, heads, dv], Layout::Contiguous, &outs);
            let lses = Array::<f32, 3>::new([parts + pad, tokens, heads], Layout::Contiguous, &lses);
            let mut out = Output::<f32, 3>::new([tokens, heads, dv], Layout::Padded);
            staged::merge(driver, outs.view(), lses.view(), AttentionOutput::new(out.view())).unwrap();
            out.finish("out").iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        for parts in [1, 5, 13] {
            let alone = run(parts, 0);
            assert_eq!(alone, run(parts, 0), "twice");
            for pad in [1, 40, 300] {
                assert_eq!(alone, run(parts, pad), "{parts} parts and {pad} without weight");
            }
        }
    });
}

// --- attention --------------------------------------------------------------------------------------------------------

/// `cuda::attention` against the reference; gives the share of the tolerance that is used.
fn check<T: Element>(driver: &dyn Driver, case: &AttentionCase<T>) -> f64 {
    let truth = case.run(reference::attention);
    let got = case.run(|spec, input, output| staged::attention(driver, spec, input, output));
    // 16-bit types: the weights are rounded for the product with the values.
    let naive = naive::attention_unlucky(&case.spec, &case.input(), naive::Store::Storage, (&truth.out, &truth.lse));
    let context = |what| format!("{what} of {} {:?}", T::DTYPE, case.options);
    let out = assert_rows(&context("out"), &got.out, &truth.out, &naive.out, case.spec.value_dim);
    out.max(assert_rows(&context("lse"), &got.lse, &truth.lse, &naive.lse, 1))
}

#[allow(dead_code)]
fn check_all(driver: &dyn Driver, options: &AttentionOptions, seed: u64) {
    check(driver, &AttentionCase::<f32>::new(options, seed));
    check(driver, &AttentionCase::<bf16>::new(options, seed));
    check(driver, &AttentionCase::<f16>::new(options, seed));
}

#[test]
fn first_light() {
    on_devices(false, |driver| {
        for (heads, dim, lens) in [((1, 1), 64, (1, 1)), ((4, 2), 64, (1, 70)), ((8, 1), 128, (2, 300))] {
            let mut options = AttentionOptions::new(heads, dim, &[lens]);
            for mask in [Mask::default(), Mask::causal()] {
                options.mask = mask;
                check(driver, &AttentionCase::<bf16>::new(&options, 1));
                check(driver, &AttentionCase::<f16>::new(&options, 1));
                check(driver, &AttentionCase::<f32>::new(&options, 1));
                options.kv = KvLayout::Paged(16);
                check(driver, &AttentionCase::<bf16>::new(&options, 1));
            }
        }
    });
}
