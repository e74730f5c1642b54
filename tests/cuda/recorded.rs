//! Whole mixtures as recordings (CUDA graphs): what was recorded once serves tokens that go to other experts, with any router, because
//! nothing about the routing is on the host.

use super::mixture_bits::routers;
use super::moe::{mixture_of, options, small, with_shared};
use crate::common::sums::bits;
use crate::common::{ExpertOptions, Layout, MoeCase, MoeResult};
use crate::on_recorders;
use crate::staged::{Staged, StagedMoe, vector};
use gatefold::Element;
use gatefold::cuda::driver::{Buffer, Driver, Recorder};
use gatefold::cuda::{
    self, DeviceViewMut, FfnArgs, FfnStrides, MoeArgs, MoeInput, MoeOutput, MoePlan, MoeProblem, Queue, RouteOutput,
};
use gatefold::spec::{AuxLoss, Selection};
use half::bf16;

/// Every router, for a decode step, a few tokens and a prompt; in the replays other tokens, all tokens alike, and another mask.
#[test]
fn recorded_calls_of_every_router_take_any_routing() {
    on_recorders(|device| {
        for (name, mut spec) in routers() {
            spec.router.aux_loss = Some(AuxLoss::TopK);
            let spec = with_shared(spec);
            for n in [1, 8, 70] {
                let options = ExpertOptions { layout: Layout::Contiguous, ..options(n, 2) };
                let mut first = MoeCase::<bf16, bf16, bf16>::new(&spec, options, 11).with_mask();
                first.token_mask.as_mut().unwrap()[0] = 1;
                let mut alike = first.with_hidden(&first.experts.hidden.values()[..40].repeat(n));
                alike.token_mask = Some((0..n).map(|t| u8::from(t % 3 != 1)).collect());
                let other: Vec<bf16> = first.experts.hidden.values().iter().map(|x| -*x).collect();
                let other = first.with_hidden(&other);
                check_replays(device, &format!("{name}, {n} tokens"), &[first, alike, other]);
            }
        }
    });
}

/// Records the call of the first case, then replays it on the tokens and masks of all of them.
fn check_replays(device: &dyn Recorder, what: &str, cases: &[MoeCase<bf16, bf16, bf16>; 3]) {
    let driver: &dyn Driver = device;
    let want = cases.each_ref().map(|case| mixture_of(driver, case, None, true));
    let route = |result: &MoeResult<bf16, f32>| result.route.clone().unwrap();
    let spec = &cases[0].spec;
    let (n, slots) = (cases[0].num_tokens(), spec.router.slots());
    if n > 1 || spec.router.selection != Selection::ExpertChoice {
        let ids = [0, 1, 2].map(|i| route(&want[i]).ids);
        assert!(ids[0] != ids[2] && (n == 1 || ids[0] != ids[1]), "{what}: the calls route alike");
    }
    let weights = StagedMoe::new(driver, &cases[0].weights()).unwrap();
    let hidden = Staged::new(driver, cases[0].experts.hidden.view()).unwrap();
    let mask = vector(driver, cases[0].token_mask.as_ref().unwrap()).unwrap();
    let out = Buffer::new(driver, n * 40 * 2).unwrap();
    let (ids, chosen) = (Buffer::new(driver, n * slots * 4).unwrap(), Buffer::new(driver, n * slots * 4).unwrap());
    let (counts, dropped) = (Buffer::new(driver, 8 * 4).unwrap(), Buffer::new(driver, 8).unwrap());
    let losses = [Buffer::new(driver, 4).unwrap(), Buffer::new(driver, 4).unwrap()];
    fn all<'a, T, const N: usize>(buffer: &'a Buffer<'_>, shape: [usize; N]) -> DeviceViewMut<'a, T, N> {
        let len = shape.iter().product();
        let strides = std::array::from_fn(|i| shape[i + 1..].iter().product());
        // SAFETY: the buffer holds so many elements, and nothing else uses it while a call runs.
        unsafe { DeviceViewMut::from_raw(buffer.ptr(), len, shape, strides) }
    }
    let call = |queue: &mut Queue<'_>| {
        let mut input = MoeInput::new(hidden.view());
        (input.token_mask, input.seed) = (Some(mask.view()), cases[0].seed);
        let mut route = RouteOutput::new(all(&ids, [n, slots]), all(&chosen, [n, slots]));
        route.tokens_per_expert = Some(all(&counts, [8]));
        route.dropped = Some(all(&dropped, [1]));
        (route.aux_loss, route.z_loss) = (Some(all(&losses[0], [1])), Some(all(&losses[1], [1])));
        let mut output = MoeOutput::new(all(&out, [n, 40]));
        output.route = Some(route);
        cuda::moe(queue, spec, &input, &weights.weights(), output)
    };
    let stream = device.create_stream().unwrap();
    // SAFETY: the stream is of the device, and destroyed after the queue.
    let mut queue = unsafe { Queue::on_stream(driver, stream) };
    call(&mut queue).unwrap(); // loads the kernels and makes room for what lies between them
    let (hidden, mask) = (hidden.view().ptr(), mask.view().ptr());
    // SAFETY: the arrays outlive the recording; the stream is this test's own, and waited for before they are written.
    unsafe {
        let recording = device.record(stream, &mut || call(&mut queue)).unwrap();
        for i in [0, 1, 2, 0] {
            driver.synchronize(stream).unwrap();
            let values = cases[i].experts.hidden.values();
            driver.copy_to_device(hidden, bytemuck::cast_slice(&values)).unwrap();
            driver.copy_to_device(mask, cases[i].token_mask.as_ref().unwrap()).unwrap();
            device.replay(recording, stream).unwrap();
            let (what, route) = (format!("{what}, case {i}"), route(&want[i]));
            assert!(bits(&out.to_vec::<bf16>(stream).unwrap()) == bits(&want[i].out), "{what}");
            assert_eq!(ids.to_vec::<i32>(stream).unwrap(), route.ids, "{what}");
            assert_eq!(bits(&chosen.to_vec::<f32>(stream).unwrap()), bits(&route.weights), "{what}");
            assert_eq!(counts.to_vec::<u32>(stream).unwrap(), route.tokens_per_expert, "{what}");
            assert_eq!(dropped.to_vec::<u64>(stream).unwrap(), [route.dropped], "{what}");
            for (loss, want) in losses.iter().zip([route.aux_loss, route.z_loss]) {
                assert_eq!(bits(&loss.to_vec::<f32>(stream).unwrap()), bits(&[want]), "{what}");
            }
        }
        device.forget(recording).unwrap();
        drop(queue);
        device.destroy_stream(stream).unwrap();
    }
}

/// The same by pointers, on a plan.
#[test]
fn recorded_plans_take_any_routing() {
    on_recorders(|device| {
        check_recording::<bf16>(device, 1);
        check_recording::<bf16>(device, 8);
        check_recording::<f32>(device, 70);
    });
}

fn check_recording<T: Element>(device: &dyn Recorder, num_tokens: usize) {
    let driver: &dyn Driver = device;
    let spec = with_shared(small(2));
    let options = ExpertOptions { layout: Layout::Contiguous, ..options(num_tokens, 2) };
    let [first, other] = [11, 12].map(|seed| MoeCase::<T, T, T>::new(&spec, options, seed));
    // All tokens of the second call choose the same two experts.
    let second = first.with_hidden(&other.experts.hidden.values()[..40].repeat(num_tokens));
    let want = [&first, &second].map(|case| mixture_of(driver, case, None, true));
    let ids = |i: usize| want[i].route.as_ref().unwrap().ids.clone();
    assert!(ids(0) != ids(1), "the calls route alike");

    let copy = |view: &[T]| Buffer::from_slice(driver, view).unwrap();
    let (gate_up, down) = (copy(&first.experts.gate_up[0].values()), copy(&first.experts.down.values()));
    let shared = first.shared.as_ref().unwrap();
    let (shared_gate_up, shared_down) = (copy(&shared.gate_up[0].values()), copy(&shared.down.values()));
    let gate = copy(&first.shared_gate.as_ref().unwrap().values());
    let router = copy(&first.router.values());
    let hidden = copy(&first.experts.hidden.values());
    let out = copy(&vec![T::default(); num_tokens * 40]);
    let up_of = |both: &Buffer<'_>, inter: usize| both.ptr() + (inter * 40 * size_of::<T>()) as u64;

    let mut problem = MoeProblem::new(&spec, T::DTYPE, num_tokens);
    problem.experts = FfnStrides::halves(&spec.experts.ffn);
    problem.shared = FfnStrides::halves(&spec.shared.unwrap().ffn);
    let plan = MoePlan::new(&problem, &driver.limits()).unwrap();
    let workspace = Buffer::new(driver, plan.workspace_bytes()).unwrap();
    let experts = FfnArgs::new(gate_up.ptr(), up_of(&gate_up, 24), down.ptr());
    let mut args = MoeArgs::new(hidden.ptr(), router.ptr(), experts, out.ptr(), workspace.ptr());
    args.shared = Some(FfnArgs::new(shared_gate_up.ptr(), up_of(&shared_gate_up, 32), shared_down.ptr()));
    args.shared_gate = Some(gate.ptr());
    plan.warmup(driver).unwrap();
    let stream = device.create_stream().unwrap();
    // SAFETY: the buffers hold the arrays of the plan and outlive the recording; the stream is this test's own.
    unsafe {
        let recording = device.record(stream, &mut || plan.launch(driver, &args, stream)).unwrap();
        for (case, want) in [&first, &second, &first].into_iter().zip([&want[0], &want[1], &want[0]]) {
            driver.copy_to_device(hidden.ptr(), bytemuck::cast_slice(&case.experts.hidden.values())).unwrap();
            device.replay(recording, stream).unwrap();
            assert!(bits(&out.to_vec::<T>(stream).unwrap()) == bits(&want.out), "{num_tokens} tokens");
        }
        device.forget(recording).unwrap();
        device.destroy_stream(stream).unwrap();
    }
}
