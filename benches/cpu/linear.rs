//! `linear`: the query projection of a layer for a prompt of 512 tokens.

use crate::support::array::Array;
use crate::{Suite, Work, check, layer, random, samples};
use gatefold::cpu::{Cpu, Float, PackedLinear, linear};
use gatefold::reference;
use half::{bf16, f16};

const TOKENS: usize = 512;

pub fn benches(suite: &mut Suite) {
    projection::<f32>(suite, "qwen3-30b-a3b");
    projection::<bf16>(suite, "qwen3-30b-a3b");
    projection::<f16>(suite, "qwen3-30b-a3b");
    projection::<bf16>(suite, "mixtral-8x7b");
}

fn projection<T: Float>(suite: &mut Suite, model: &str) {
    let layer = layer(model, 0);
    let inputs = layer.hidden_size;
    let outputs = layer.attention().num_heads * layer.attention().head_dim;
    let work = Work::Flops(2 * TOKENS * inputs * outputs);
    suite.bench("linear", model, T::DTYPE, work, || {
        let weight = random::<T>(1, &[outputs, inputs], (inputs as f64).sqrt().recip());
        let x = random::<T>(2, &[TOKENS, inputs], 1.0);
        let packed = PackedLinear::pack(weight.view()).expect("a matrix");
        let (mut cpu, mut out) = (Cpu::new().expect("a level"), Array::<T>::zeros(&[TOKENS, outputs]));
        linear(&mut cpu, x.view(), &packed, None, out.view_mut()).expect("shapes that fit");

        let rows = samples(TOKENS);
        let mut truth = Array::<f64>::zeros(&[rows.len(), outputs]);
        reference::linear::<_, _, f32>(x.pick(&rows).view(), weight.view(), None, truth.view_mut())
            .expect("shapes that fit");
        check(&format!("linear/{model}"), &out.pick(&rows), &truth);
        move || linear(&mut cpu, x.view(), &packed, None, out.view_mut()).expect("shapes that fit")
    });
}
