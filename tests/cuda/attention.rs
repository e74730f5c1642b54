//! Attention of many queries.

use crate::common::attention_case::KvLayout;
use crate::common::{AttentionCase, AttentionOptions, assert_rows, naive};
use crate::{on_devices, staged};
use gatefold::cuda::driver::Driver;
use gatefold::spec::Mask;
use gatefold::{Element, reference};
use half::{bf16, f16};

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
        for (heads, dim, lens) in [((1, 1), 64, (20, 20)), ((4, 2), 64, (70, 70)), ((2, 1), 128, (33, 300))] {
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
