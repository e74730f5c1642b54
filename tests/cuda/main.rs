//! The GPU backend against the reference: in the simulator, and on a GPU where there is one. Without one that part prints
//! SKIPPED; `GATEFOLD_REQUIRE_CUDA=1` makes that a failure. One module per family of kernels.
#![cfg(feature = "cuda")]

use gatefold::cuda::Device;
use gatefold::cuda::driver::{Driver, Recorder};
use std::sync::{Mutex, PoisonError};

#[path = "../common/mod.rs"]
#[macro_use]
mod common;
/// Calls on arrays of the host: copied to a device, run there, copied back.
#[path = "../../examples/support/staged/mod.rs"]
mod staged;

mod activations;
mod any_attention;
mod attention;
mod budget;
mod combine;
mod coupled;
mod decode;
mod exact;
mod far;
mod field;
mod gemm;
mod glue;
mod group;
mod linear_attention;
mod mixture_bits;
mod moe;
mod products;
mod qkv;
mod recorded;
mod route;
mod route_counters;
mod tf32;

use common::simulator::Simulator;
use common::skip::skipped;

/// Runs a check in the simulator, then on the first GPU, or says that there is none. `exact` checks compare bits, so the
/// simulator's approximate instructions must not err at random.
fn on_devices(exact: bool, check: impl Fn(&dyn Driver)) {
    if is_simulated() {
        check(&Simulator::new(!exact));
    }
    on_gpu(check);
}

/// [`on_devices`] with exact instructions, for checks that take more than 8 GB of a GPU's memory, which has room for one of them at
/// a time. The simulator's memory is only as large as what is written.
fn on_large_devices(check: impl Fn(&dyn Driver)) {
    static ONE: Mutex<()> = Mutex::new(());
    if is_simulated() {
        check(&Simulator::new(false));
    }
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    on_gpu(check);
}

/// `GATEFOLD_SIMULATOR=0` leaves the simulator out, where the GPU's time is short.
fn is_simulated() -> bool {
    std::env::var_os("GATEFOLD_SIMULATOR").is_none_or(|value| value != "0")
}

/// [`on_devices`] with exact instructions, for checks that record launches and run them again.
fn on_recorders(check: impl Fn(&dyn Recorder)) {
    if is_simulated() {
        check(&Simulator::new(false));
    }
    on_first_gpu(|device| check(device));
}

/// Runs a check on the first GPU, or says that there is none: for sizes that are too large for the simulator.
fn on_gpu(check: impl Fn(&dyn Driver)) {
    on_first_gpu(|device| check(device));
}

fn on_first_gpu(check: impl Fn(&Device)) {
    match Device::open(0) {
        Ok(device) => check(&device),
        Err(error) => {
            assert!(std::env::var_os("GATEFOLD_REQUIRE_CUDA").is_none_or(|value| value != "1"), "{error}");
            skipped(format_args!("on a GPU: {error}"));
        }
    }
}
