//! The calls of the CPU's property test of attention, as prompts and as decodes.

use super::attention::prefill;
use crate::common::{AttentionCase, AttentionOptions, Layout, assert_rows, naive, strategies};
use crate::{on_devices, staged, with_type};
use gatefold::cuda::driver::Driver;
use gatefold::{Dtype, Element, Error, reference};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use std::cell::Cell;

/// Whether the device took the call; if not, its error says what it lacks.
fn check<T: Element>(driver: &dyn Driver, options: &AttentionOptions, seed: u64) -> bool {
    let case = AttentionCase::<T>::new(options, seed);
    let mut refusal = None;
    let got = case.run(|spec, input, output| match staged::attention(driver, spec, input, output) {
        Err(error @ (Error::Unsupported { .. } | Error::Stride { .. })) => {
            refusal = Some(error);
            Ok(())
        }
        other => other,
    });
    if let Some(error) = refusal {
        // Prompts in 16 bits have rows at multiples of 16 bytes; nothing else is refused.
        let (dim, value_dim) = options.dims;
        let is_odd = dim % 8 + value_dim % 8 > 0 || options.layout != Layout::Contiguous;
        let is_prompt = options.lens.iter().any(|lens| lens.0 * (options.heads.0 / options.heads.1) > 64);
        assert!(is_odd && is_prompt && T::DTYPE != Dtype::F32, "{} {options:?}: {error}", T::DTYPE);
        return false;
    }
    let truth = case.run(reference::attention);
    let naive = naive::attention_unlucky(&case.spec, &case.input(), naive::Store::Storage, (&truth.out, &truth.lse));
    let context = |what| format!("{what} of {} {options:?}, seed {seed}", T::DTYPE);
    assert_rows(&context("out"), &got.out, &truth.out, &naive.out, case.spec.value_dim);
    assert_rows(&context("lse"), &got.lse, &truth.lse, &naive.lse, 1);
    true
}

/// Half of the calls with rows at multiples of 16 bytes, so that prompts in 16 bits are among them.
fn check_any(what: &str, cases: u32, calls: impl Strategy<Value = AttentionOptions>) {
    let dtypes = select(vec![Dtype::F32, Dtype::BF16, Dtype::F16]);
    let strategy = (calls, dtypes, any::<bool>(), any::<u64>());
    on_devices(false, |driver| {
        let (taken, refused) = (Cell::new(0), Cell::new(0));
        let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
        let result = TestRunner::new(config).run(&strategy, |(mut options, dtype, is_aligned, seed)| {
            if is_aligned {
                options.dims = (options.dims.0.next_multiple_of(8), options.dims.1.next_multiple_of(8));
                let contiguous = options.layout == Layout::Contiguous;
                options.layout = if contiguous { Layout::Contiguous } else { Layout::Aligned };
            }
            let is_taken = with_type!(dtype, check(driver, &options, seed));
            let count = if is_taken { &taken } else { &refused };
            count.set(count.get() + 1);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{error}"));
        let (taken, refused) = (taken.get(), refused.get());
        println!("{what}: {taken} calls, and {refused} refused: rows of 16 bits that are not aligned");
        assert!(taken > refused);
    });
}

/// Lengths around tiles, and a sequence that makes the call a prompt.
#[test]
fn any_prompt() {
    check_any("prompts", 60, strategies::attention(16, 32).prop_map(|options| prefill(&options)));
}

/// Few queries, and keys around one split and two of them.
#[test]
fn any_decode() {
    check_any("decodes", 100, strategies::attention(2, 130));
}
