//! Linear attention: retention in its forms and RWKV-4's `wkv`.

use crate::common::glue_case::WIDTHS;
use crate::common::linear_case::{RetentionCase, WkvCase, assert_with_state};
use crate::common::{Layout, Rng, seed};
use crate::{on_devices, staged, with_type};
use gatefold::cuda::driver::Driver;
use gatefold::spec::{Retention, RetentionForm};
use gatefold::{Dtype, Element};

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
