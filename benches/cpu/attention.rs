//! `attention/prefill` and `attention/decode`.

use crate::support::array::Array;
use crate::{Suite, Work, check, layer, random, samples};
use gatefold::args::{AttentionInput, AttentionOutput, Kv};
use gatefold::cpu::{Cpu, Float, attention};
use gatefold::spec::{Attention, AttentionBlock};
use gatefold::{View, reference};
use half::{bf16, f16};

/// A prompt, all at once.
const PROMPT: usize = 2048;
/// Rows in the cache that one new token sees.
const CACHED: usize = 8192;
/// Keys and values of all copies together: larger than most last-level caches.
const CACHE_BYTES: usize = 512 << 20;

/// Grouped queries (Qwen3); sinks, in the prompt with a window of 128 (gpt-oss, layers 0 and 1); latent attention, in the
/// prompt as 16 heads of 192, then absorbed: 16 queries of 576 on one latent row (DeepSeek-V2).
pub fn benches(suite: &mut Suite) {
    prefill::<f32>(suite, "qwen3-30b-a3b");
    prefill::<bf16>(suite, "qwen3-30b-a3b");
    prefill::<f16>(suite, "qwen3-30b-a3b");
    prefill::<bf16>(suite, "gpt-oss-20b");
    prefill::<bf16>(suite, "deepseek-v2-lite");
    decode::<f32>(suite, "qwen3-30b-a3b");
    decode::<bf16>(suite, "qwen3-30b-a3b");
    decode::<f16>(suite, "qwen3-30b-a3b");
    decode::<bf16>(suite, "gpt-oss-20b");
    decode::<bf16>(suite, "deepseek-v2-lite");
}

/// Keys and values `[copies, rows, num_kv_heads, width]`; without values, they are the first columns of the keys.
struct Cache<T> {
    k: Array<T>,
    v: Option<Array<T>>,
}

impl<T: Float> Cache<T> {
    fn random(spec: &Attention, copies: usize, rows: usize, shares: bool) -> Cache<T> {
        let array = |seed, width| random(seed, &[copies, rows, spec.num_kv_heads, width], 1.0);
        Cache { k: array(1, spec.head_dim), v: (!shares).then(|| array(2, spec.value_dim)) }
    }

    /// One of the copies.
    fn copy(&self, spec: &Attention, copy: usize) -> Kv<'_, T> {
        let [copies, rows, heads, width] = self.k.view().shape();
        let part = |array: &Array<T>| array.data.len() / copies * copy;
        let k = View::new(&self.k.data[part(&self.k)..], [rows, heads, width]);
        let v = match &self.v {
            Some(v) => View::new(&v.data[part(v)..], [rows, heads, spec.value_dim]),
            None => View::with_strides(k.data(), [rows, heads, spec.value_dim], k.strides()),
        };
        Kv::ragged(k, v, None)
    }
}

fn sinks(spec: &Attention) -> Option<Vec<f32>> {
    spec.sinks.then(|| random::<f32>(3, &[spec.num_heads], 1.0).data)
}

/// The tokens of `q` against a cache; they are its last rows.
fn run<T: Float>(
    cpu: &mut Cpu,
    spec: &Attention,
    q: &Array<T>,
    kv: Kv<'_, T>,
    sinks: Option<&[f32]>,
    out: &mut Array<T>,
) {
    let mut input = AttentionInput::new(q.view(), kv);
    input.sinks = sinks;
    attention(cpu, spec, &input, AttentionOutput::new(out.view_mut())).expect("shapes that fit");
}

/// Compares some of the query rows, the last of which is the cache's last row.
fn check_rows<T: Float>(
    what: &str,
    spec: &Attention,
    q: &Array<T>,
    kv: Kv<'_, T>,
    sinks: Option<&[f32]>,
    out: &Array<T>,
) {
    let num_tokens = q.shape[0];
    for row in samples(num_tokens) {
        let position = [(kv.len(0) - num_tokens + row) as i64];
        let one = q.clone().flat(num_tokens).pick(&[row]).reshape(&[1, spec.num_heads, spec.head_dim]);
        let mut input = AttentionInput::new(one.view(), kv);
        input.q_start = Some(&position);
        input.sinks = sinks;
        let mut truth = Array::<f64>::zeros(&[1, spec.num_heads, spec.value_dim]);
        reference::attention(spec, &input, AttentionOutput::new(truth.view_mut())).expect("shapes that fit");
        let got = out.clone().flat(num_tokens).pick(&[row]).reshape(&truth.shape);
        check(&format!("{what}, token {row}"), &got, &truth);
    }
}

fn prefill<T: Float>(suite: &mut Suite, model: &str) {
    let spec = layer(model, 0).attention().clone();
    let end = PROMPT as i64;
    let visible = |i| {
        let range = spec.mask.visible_range(i);
        (range.end.min(end) - range.start.max(0)) as usize
    };
    let pairs: usize = (0..end).map(visible).sum();
    let work = Work::Flops(2 * pairs * spec.num_heads * (spec.head_dim + spec.value_dim));
    suite.bench("attention/prefill", model, T::DTYPE, work, || {
        let cache = Cache::<T>::random(&spec, 1, PROMPT, false);
        let q = random::<T>(4, &[PROMPT, spec.num_heads, spec.head_dim], 1.0);
        let mut out = Array::<T>::zeros(&[PROMPT, spec.num_heads, spec.value_dim]);
        let (mut cpu, sinks) = (Cpu::new().expect("a level"), sinks(&spec));
        run(&mut cpu, &spec, &q, cache.copy(&spec, 0), sinks.as_deref(), &mut out);
        let what = format!("attention/prefill/{model}");
        check_rows(&what, &spec, &q, cache.copy(&spec, 0), sinks.as_deref(), &out);
        let spec = &spec;
        move || run(&mut cpu, spec, &q, cache.copy(spec, 0), sinks.as_deref(), &mut out)
    });
}

fn decode<T: Float>(suite: &mut Suite, model: &str) {
    let block = layer(model, 1).attention;
    let (spec, shares) = match &block {
        AttentionBlock::Mla(block) => (block.mla.absorbed(&block.attention), true),
        AttentionBlock::Gqa(block) => (block.attention.clone(), false),
        other => panic!("{model}: attention {other:?}"),
    };
    let width = spec.head_dim + if shares { 0 } else { spec.value_dim };
    let bytes = CACHED * spec.num_kv_heads * width * T::DTYPE.size_bytes();
    let copies = if suite.is_timed() { CACHE_BYTES.div_ceil(bytes) } else { 2 };
    suite.bench("attention/decode", model, T::DTYPE, Work::Bytes(bytes), || {
        let cache = Cache::<T>::random(&spec, copies, CACHED, shares);
        let q = random::<T>(4, &[1, spec.num_heads, spec.head_dim], 1.0);
        let mut out = Array::<T>::zeros(&[1, spec.num_heads, spec.value_dim]);
        let (mut cpu, sinks) = (Cpu::new().expect("a level"), sinks(&spec));
        run(&mut cpu, &spec, &q, cache.copy(&spec, 0), sinks.as_deref(), &mut out);
        let what = format!("attention/decode/{model}");
        check_rows(&what, &spec, &q, cache.copy(&spec, 0), sinks.as_deref(), &out);
        let (spec, mut copy) = (&spec, 0);
        move || {
            copy = (copy + 1) % copies;
            run(&mut cpu, spec, &q, cache.copy(spec, copy), sinks.as_deref(), &mut out);
        }
    });
}
