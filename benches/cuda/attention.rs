//! `prefill`: a prompt, all at once. `decode`: one token of each sequence against its cache.

use crate::case::{Case, Job, Twin, compare, random, samples};
use crate::support::array::Array;
use crate::support::folder::Folder;
use gatefold::args;
use gatefold::cuda::{AttentionInput, AttentionOutput, Device, Kv, Queue, attention};
use gatefold::spec::Attention;
use gatefold::{Element, Result, View, reference};
use half::bf16;

/// Query heads, key/value heads, width.
const HEADS: [(usize, usize, usize); 3] = [(32, 8, 64), (32, 8, 128), (16, 4, 256)];

pub fn cases(cases: &mut Vec<Case>) {
    for (heads, kv_heads, width) in HEADS {
        for causal in [true, false] {
            for len in [1024, 4096, 16384, 32768] {
                let spec = if causal { Attention::causal } else { Attention::new }(heads, kv_heads, width);
                let pairs = if causal { len * (len + 1) / 2 } else { len * len };
                let mask = if causal { "causal" } else { "full" };
                cases.push(Case {
                    name: format!("prefill/{heads}x{width}_{mask}/{len}/bf16"),
                    kind: "prefill",
                    dtype: bf16::DTYPE,
                    flops: 4.0 * (pairs * heads * width) as f64,
                    make: Box::new(move |device| Ok(Box::new(Prompt::<bf16>::new(device, &spec, len)?))),
                });
            }
        }
    }
    for batch in [1, 32] {
        for rows in [1024, 8192, 32768, 131_072] {
            let spec = Attention::causal(32, 8, 128);
            cases.push(Case {
                name: format!("decode/32x128/{batch}x{rows}/bf16"),
                kind: "decode",
                dtype: bf16::DTYPE,
                flops: 4.0 * (batch * rows * 32 * 128) as f64,
                make: Box::new(move |device| Ok(Box::new(Step::<bf16>::new(device, &spec, batch, rows)?))),
            });
        }
    }
}

/// One sequence that attends to itself.
struct Prompt<T> {
    spec: Attention,
    queue: Queue<'static>,
    q: Twin<T>,
    k: Twin<T>,
    v: Twin<T>,
    out: Twin<T>,
}

impl<T: Element> Prompt<T> {
    fn new(device: &'static Device, spec: &Attention, len: usize) -> Result<Self> {
        let array = |seed, heads| Twin::new(device, random::<T>(seed, &[len, heads, spec.head_dim], 1.0));
        Ok(Prompt {
            spec: spec.clone(),
            queue: Queue::new(device),
            q: array(1, spec.num_heads)?,
            k: array(2, spec.num_kv_heads)?,
            v: array(3, spec.num_kv_heads)?,
            out: Twin::zeros(device, &[len, spec.num_heads, spec.value_dim])?,
        })
    }
}

/// The three dimensions of an array.
fn dims<T>(array: &Array<T>) -> [usize; 3] {
    array.shape[..].try_into().expect("three dimensions")
}

impl<T: Element> Job for Prompt<T> {
    fn call(&mut self) -> Result<()> {
        let Prompt { spec, queue, q, k, v, out } = self;
        let kv = Kv::ragged(k.view(dims(&k.host)), v.view(dims(&v.host)), None);
        let input = AttentionInput::new(q.view(dims(&q.host)), kv);
        let shape = dims(&out.host);
        attention(queue, spec, &input, AttentionOutput::new(out.view_mut(shape)))
    }

    fn check(&mut self) -> std::result::Result<(), String> {
        self.call().and_then(|()| self.out.fetch().map(|_| ())).map_err(|e| e.to_string())?;
        let (spec, rows) = (&self.spec, samples(self.q.host.shape[0]));
        let mut truth = Array::<f64>::zeros(&[rows.len(), spec.num_heads, spec.value_dim]);
        let width = spec.num_heads * spec.value_dim;
        for (row, truth) in rows.iter().zip(truth.data.chunks_mut(width)) {
            let q = self.q.host.clone().flat(self.q.host.shape[0]).pick(&[*row]);
            let kv = args::Kv::ragged(self.k.host.view(), self.v.host.view(), None);
            let position = [*row as i64];
            let mut input =
                args::AttentionInput::<T, f32>::new(View::new(&q.data, [1, spec.num_heads, spec.head_dim]), kv);
            input.q_start = Some(&position);
            let out = gatefold::ViewMut::new(truth, [1, spec.num_heads, spec.value_dim]);
            reference::attention(spec, &input, args::AttentionOutput::new(out)).map_err(|e| e.to_string())?;
        }
        compare(&self.out.host, &rows, &truth)
    }

    fn write(&mut self, folder: &mut Folder) -> std::io::Result<()> {
        for (name, twin) in [("q", &self.q), ("k", &self.k), ("v", &self.v), ("out", &self.out)] {
            folder.array(name, &twin.host)?;
        }
        folder.note("q", "causal", self.spec.mask.causal);
        Ok(())
    }

    fn bytes(&self) -> f64 {
        let len = |twin: &Twin<T>| twin.host.data.len();
        ((len(&self.q) + len(&self.k) + len(&self.v) + len(&self.out)) * size_of::<T>()) as f64
    }
}

/// One token of each of some sequences of the same length.
struct Step<T> {
    spec: Attention,
    queue: Queue<'static>,
    q: Twin<T>,
    k: Twin<T>,
    v: Twin<T>,
    out: Twin<T>,
    cu_seqlens_q: Twin<u32>,
    kv_lens: Twin<u32>,
}

impl<T: Element> Step<T> {
    fn new(device: &'static Device, spec: &Attention, batch: usize, rows: usize) -> Result<Self> {
        let cache = |seed| Twin::new(device, random::<T>(seed, &[batch, rows, spec.num_kv_heads, spec.head_dim], 1.0));
        let sums = (0..=batch as u32).collect();
        Ok(Step {
            spec: spec.clone(),
            queue: Queue::new(device),
            q: Twin::new(device, random::<T>(1, &[batch, spec.num_heads, spec.head_dim], 1.0))?,
            k: cache(2)?,
            v: cache(3)?,
            out: Twin::zeros(device, &[batch, spec.num_heads, spec.value_dim])?,
            cu_seqlens_q: Twin::new(device, Array::new(sums, &[batch + 1]))?,
            kv_lens: Twin::new(device, Array::new(vec![rows as u32; batch], &[batch]))?,
        })
    }
}

impl<T: Element> Job for Step<T> {
    fn call(&mut self) -> Result<()> {
        let Step { spec, queue, q, k, v, out, cu_seqlens_q, kv_lens } = self;
        let shape: [usize; 4] = k.host.shape[..].try_into().expect("four dimensions");
        let kv = Kv::cache(k.view(shape), v.view(shape), kv_lens.view([shape[0]]));
        let mut input = AttentionInput::new(q.view(dims(&q.host)), kv);
        input.cu_seqlens_q = Some(cu_seqlens_q.view([shape[0] + 1]));
        input.max_q_len = Some(1);
        let shape = dims(&out.host);
        attention(queue, spec, &input, AttentionOutput::new(out.view_mut(shape)))
    }

    fn check(&mut self) -> std::result::Result<(), String> {
        self.call().and_then(|()| self.out.fetch().map(|_| ())).map_err(|e| e.to_string())?;
        let (spec, [batch, rows]) = (&self.spec, [self.k.host.shape[0], self.k.host.shape[1]]);
        let sampled = samples(batch);
        let mut truth = Array::<f64>::zeros(&[sampled.len(), spec.num_heads, spec.value_dim]);
        let width = spec.num_heads * spec.value_dim;
        for (seq, truth) in sampled.iter().zip(truth.data.chunks_mut(width)) {
            let q = self.q.host.clone().flat(batch).pick(&[*seq]);
            let part = |array: &'_ Twin<T>| {
                let len = array.host.data.len() / batch;
                len * seq..len * (seq + 1)
            };
            let shape = [rows, spec.num_kv_heads, spec.head_dim];
            let k = View::new(&self.k.host.data[part(&self.k)], shape);
            let v = View::new(&self.v.host.data[part(&self.v)], shape);
            let q = View::new(&q.data, [1, spec.num_heads, spec.head_dim]);
            let input = args::AttentionInput::<T, f32>::new(q, args::Kv::ragged(k, v, None));
            let out = gatefold::ViewMut::new(truth, [1, spec.num_heads, spec.value_dim]);
            reference::attention(spec, &input, args::AttentionOutput::new(out)).map_err(|e| e.to_string())?;
        }
        compare(&self.out.host, &sampled, &truth)
    }

    fn write(&mut self, folder: &mut Folder) -> std::io::Result<()> {
        for (name, twin) in [("q", &self.q), ("k", &self.k), ("v", &self.v), ("out", &self.out)] {
            folder.array(name, &twin.host)?;
        }
        Ok(())
    }

    fn bytes(&self) -> f64 {
        ((self.k.host.data.len() + self.v.host.data.len()) * size_of::<T>()) as f64
    }
}
