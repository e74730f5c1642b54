//! `moe/prefill` and `moe/decode`: router, experts, shared expert, weighted sum.

use crate::support::array::Array;
use crate::{Suite, Work, check, mixture, random};
use gatefold::args::{ExpertWeights, FfnWeights, MoeInput, MoeOutput, MoeWeights};
use gatefold::cpu::{Cpu, Float, PackedMoe, moe};
use gatefold::spec::{Ffn, Moe};
use gatefold::{View, reference};
use half::{bf16, f16};
use std::cell::LazyCell;

/// Tokens that decoding takes in turns, so that the experts of one call are in no cache for the next.
const DECODED: usize = 64;

/// 128 small experts (Qwen3), 8 large ones (Mixtral), a shared expert (DeepSeek-V2).
pub fn benches(suite: &mut Suite) {
    both::<f32>(suite, "qwen3-30b-a3b", 512);
    both::<bf16>(suite, "qwen3-30b-a3b", 512);
    both::<f16>(suite, "qwen3-30b-a3b", 512);
    both::<bf16>(suite, "mixtral-8x7b", 256);
    both::<bf16>(suite, "deepseek-v2-lite", 512);
}

/// Numbers from one expert's matrix to the next one's in the array that all are cut from.
const STEP: usize = 4099;

/// Weights. The matrices of the experts overlap, each begins [`STEP`] numbers behind the one before: no two are the same, and
/// the memory of a whole mixture is only needed once, packed.
struct Weights<T> {
    spec: Moe,
    router: Array<T>,
    numbers: Array<T>,
    shared: Array<T>,
}

impl<T: Float> Weights<T> {
    fn random(spec: &Moe) -> Weights<T> {
        let (ffn, experts) = (&spec.experts.ffn, spec.experts.num_experts);
        let deviation = (ffn.hidden_size as f64).sqrt().recip();
        let shared = spec.shared.map_or(0, |shared| size(&shared.ffn));
        Weights {
            spec: spec.clone(),
            router: random(1, &[spec.router.num_experts, ffn.hidden_size], deviation),
            numbers: random(2, &[size(ffn) + (experts - 1) * STEP], deviation),
            shared: random(3, &[shared], deviation),
        }
    }

    fn args(&self) -> MoeWeights<'_, T> {
        let (ffn, experts) = (&self.spec.experts.ffn, self.spec.experts.num_experts);
        let [gate, up, down] = matrices(&self.numbers.data, ffn).map(|view| {
            let ([rows, columns], [row, column]) = (view.shape(), view.strides());
            View::with_strides(view.data(), [experts, rows, columns], [STEP, row, column])
        });
        let mut weights = MoeWeights::new(self.router.view(), ExpertWeights::separate(Some(gate), up, down));
        weights.shared = self.spec.shared.map(|shared| {
            let [gate, up, down] = matrices(&self.shared.data, &shared.ffn);
            FfnWeights::new(Some(gate), up, down)
        });
        weights
    }
}

/// Weights of a gated block.
fn size(ffn: &Ffn) -> usize {
    3 * ffn.hidden_size * ffn.intermediate_size
}

/// Gate, up and down, one behind the other.
fn matrices<'a, T>(numbers: &'a [T], ffn: &Ffn) -> [View<'a, T, 2>; 3] {
    let (hidden, inner) = (ffn.hidden_size, ffn.intermediate_size);
    let matrix = |i: usize, shape| View::new(&numbers[i * hidden * inner..], shape);
    [matrix(0, [inner, hidden]), matrix(1, [inner, hidden]), matrix(2, [hidden, inner])]
}

/// Some of the tokens against the reference, with its own router.
fn check_rows<T: Float>(what: &str, weights: &Weights<T>, x: &Array<T>, rows: &[usize], out: &Array<T>) {
    let mut truth = Array::<f64>::zeros(&[rows.len(), x.shape[1]]);
    let x = x.pick(rows);
    let output = MoeOutput::new(truth.view_mut());
    reference::moe(&weights.spec, &MoeInput::new(x.view()), &weights.args(), output).expect("shapes that fit");
    check(what, out, &truth);
}

/// A prompt of so many tokens, and one token at a time, with the same weights.
fn both<T: Float>(suite: &mut Suite, model: &str, tokens: usize) {
    let mut spec = mixture(model);
    if !suite.is_timed() {
        // Where only the answers matter, few experts give them sooner.
        let experts = spec.router.num_experts.min(2 * spec.router.top_k);
        spec.router.num_experts = experts;
        (spec.experts.num_experts, spec.experts.num_local_experts) = (experts, experts);
    }
    let spec = &spec;
    let (ffn, slots) = (&spec.experts.ffn, spec.router.slots());
    let hidden = ffn.hidden_size;
    // What a token is multiplied with; for one token, that is also what is read.
    let per_token =
        spec.router.num_experts * hidden + slots * size(ffn) + spec.shared.map_or(0, |shared| size(&shared.ffn));
    // Made if one of the two is asked for.
    let made = LazyCell::new(|| {
        let weights = Weights::<T>::random(spec);
        let packed = PackedMoe::pack(spec, &weights.args()).expect("weights that fit");
        (weights, packed)
    });

    suite.bench("moe/prefill", model, T::DTYPE, Work::Flops(2 * tokens * per_token), || {
        let (weights, packed) = &*made;
        let (x, mut out) = (random::<T>(4, &[tokens, hidden], 1.0), Array::<T>::zeros(&[tokens, hidden]));
        let mut cpu = Cpu::new().expect("a level");
        let mut call = move |x: &Array<T>, out: &mut Array<T>| {
            moe(&mut cpu, spec, &MoeInput::new(x.view()), packed, MoeOutput::new(out.view_mut())).expect("a fit");
        };
        call(&x, &mut out);
        let rows = [0, tokens - 1];
        check_rows(&format!("moe/prefill/{model}"), weights, &x, &rows, &out.pick(&rows));
        move || call(&x, &mut out)
    });

    let work = Work::Bytes(per_token * T::DTYPE.size_bytes());
    suite.bench("moe/decode", model, T::DTYPE, work, || {
        let (weights, packed) = &*made;
        let (x, mut out) = (random::<T>(5, &[DECODED, hidden], 1.0), Array::<T>::zeros(&[1, hidden]));
        let (mut cpu, mut token) = (Cpu::new().expect("a level"), 0);
        let mut call = move |x: &Array<T>, out: &mut Array<T>| {
            let one = View::new(x.rows().row(&[token]), [1, hidden]);
            moe(&mut cpu, spec, &MoeInput::new(one), packed, MoeOutput::new(out.view_mut())).expect("a fit");
            token = (token + 1) % DECODED;
        };
        call(&x, &mut out);
        check_rows(&format!("moe/decode/{model}"), weights, &x, &[0], &out);
        move || call(&x, &mut out)
    });
}
