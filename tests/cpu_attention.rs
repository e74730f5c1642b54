//! `cpu::attention` at every level against the reference, and against itself: the bits of a query's result depend on nothing
//! else in the call.

mod common;

use common::attention_case::KvLayout;
use common::{AttentionCase, AttentionOptions, AttentionPairs, Layout, Rng, assert_rows, naive, seed, strategies};
use gatefold::args::{AttentionInput, AttentionOutput, AttentionShape, Kv};
use gatefold::cpu::{self, Cpu, Float, Level};
use gatefold::spec::{Attention, Mask, RelativeBias};
use gatefold::{Error, View, ViewMut, reference};
use half::{bf16, f16};
use proptest::prelude::{ProptestConfig, any, proptest};

/// Every level against the reference, and the levels' results as bits.
fn check<T: Float>(case: &AttentionCase<T>) -> f64 {
    let truth = case.run(reference::attention);
    let mut worst = 0.0f64;
    for level in Level::available() {
        let mut cpu = Cpu::with_level(level);
        let got = case.run(|spec, input, output| cpu::attention(&mut cpu, spec, input, output));
        // Where pairs of bf16 are multiplied, the weights are rounded.
        let store = if level.name() == "avx512bf16" { naive::Store::Storage } else { naive::Store::F32 };
        let naive = naive::attention_unlucky(&case.spec, &case.input(), store, (&truth.out, &truth.lse));
        let context = |what| format!("{what} of {:?} at {level}", case.options);
        worst = worst.max(assert_rows(&context("out"), &got.out, &truth.out, &naive.out, case.spec.value_dim));
        worst = worst.max(assert_rows(&context("lse"), &got.lse, &truth.lse, &naive.lse, 1));
    }
    worst
}

fn check_all(options: &AttentionOptions, seed: u64) {
    check(&AttentionCase::<f32>::new(options, seed));
    check(&AttentionCase::<bf16>::new(options, seed));
    check(&AttentionCase::<f16>::new(options, seed));
}

fn causal() -> Mask {
    Mask::causal()
}

/// Lengths around the panel (16 or 32 rows), the tile (64 keys) and the part (512 keys).
#[test]
fn shapes() {
    let seed = seed();
    let mut rng = Rng::new(seed);
    for lens in [
        (0, 0),
        (0, 5),
        (1, 0),
        (3, 0),
        (1, 1),
        (2, 1),
        (1, 63),
        (1, 64),
        (1, 65),
        (5, 130),
        (33, 33),
        (7, 7),
        (8, 9),
        (1, 511),
        (1, 512),
        (1, 513),
        (2, 600),
        (3, 1030),
        (40, 20),
        (65, 64),
        (130, 200),
    ] {
        for heads in [(1, 1), (4, 2), (8, 1)] {
            let mut options = AttentionOptions::new(heads, 0, &[lens]);
            options.dims = *rng.pick(&[(1, 1), (3, 20), (16, 16), (20, 17), (64, 64), (80, 40), (33, 5)]);
            options.kv = *rng.pick(&[KvLayout::Ragged, KvLayout::Cache, KvLayout::Paged(16), KvLayout::Paged(7)]);
            options.layout = *rng.pick(&Layout::ALL);
            check_all(&options, rng.next());
            options.mask = causal();
            check_all(&options, rng.next());
        }
    }
    // Ten key/value heads: one token's stand in blocks of eight and two.
    for (heads, dims) in [
        ((2, 1), (128, 128)),
        ((16, 1), (576, 512)),
        ((3, 3), (192, 128)),
        ((40, 1), (24, 24)),
        ((1, 1), (2, 300)),
        ((20, 10), (40, 24)),
    ] {
        let mut options = AttentionOptions::new(heads, 0, &[(9, 70), (1, 600)]);
        options.dims = dims;
        options.mask = causal();
        check_all(&options, rng.next());
    }
}

/// Every pair of values of two options.
#[test]
fn pairs_of_options() {
    let pairs = AttentionPairs {
        heads: &[(2, 2), (4, 2), (6, 1), (20, 1)],
        dims: &[(16, 16), (13, 40), (64, 32)],
        lens: &[
            &[(5, 66), (0, 3), (1, 90), (70, 40)],
            &[(1, 130)],
            &[(40, 40), (1, 1), (3, 520)],
            &[(1, 30), (1, 600), (2, 64), (0, 0)],
        ],
        window_left: 70,
        page: 5,
        sinks: false,
    };
    pairs.check(1, check_all);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_call(options in strategies::attention(32, 64), seed in any::<u64>()) {
        check_all(&options, seed);
    }
}

/// One sequence: `[len, heads, width]` each.
struct Tokens<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Float> Tokens<T> {
    fn new(spec: &Attention, len: usize, rng: &mut Rng) -> Self {
        Tokens {
            q: rng.normals(len * spec.num_heads * spec.head_dim, 1.0),
            k: rng.normals(len * spec.num_kv_heads * spec.head_dim, 1.0),
            v: rng.normals(len * spec.num_kv_heads * spec.value_dim, 1.0),
        }
    }
}

/// Which queries of which tokens a call has; the keys reach up to the last query.
type Part<'a, T> = (&'a Tokens<T>, std::ops::Range<usize>);

/// `out` and `lse` of a call with these sequences, `None` for ragged storage, else pages of this many rows.
fn call<T: Float>(
    cpu: &mut Cpu,
    spec: &Attention,
    sinks: &[f32],
    parts: &[Part<'_, T>],
    page: Option<usize>,
) -> (Vec<T>, Vec<f32>) {
    let (heads, kv_heads, dk, dv) = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim);
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cu_q, mut cu_kv, mut lens, mut table) = (vec![0u32], vec![0u32], Vec::new(), Vec::new());
    let page_size = page.unwrap_or(1);
    let max_pages = parts.iter().map(|(_, rows)| rows.end.div_ceil(page_size)).max().unwrap();
    let mut pages = 0;
    for (tokens, rows) in parts {
        q.extend_from_slice(&tokens.q[rows.start * heads * dk..rows.end * heads * dk]);
        k.extend_from_slice(&tokens.k[..rows.end * kv_heads * dk]);
        v.extend_from_slice(&tokens.v[..rows.end * kv_heads * dv]);
        if page.is_some() {
            let filled = rows.end.div_ceil(page_size);
            pages += filled;
            k.resize(pages * page_size * kv_heads * dk, T::from_f32(f32::NAN));
            v.resize(pages * page_size * kv_heads * dv, T::from_f32(f32::NAN));
            table.extend((0..max_pages).map(|p| if p < filled { (pages - filled + p) as u32 } else { u32::MAX }));
        }
        cu_q.push((q.len() / (heads * dk)) as u32);
        cu_kv.push((k.len() / (kv_heads * dk)) as u32);
        lens.push(rows.end as u32);
    }
    let num_tokens = q.len() / (heads * dk);
    let (rows, seqs) = (k.len() / (kv_heads * dk), parts.len());
    let kv = match page {
        None => Kv::ragged(View::new(&k, [rows, kv_heads, dk]), View::new(&v, [rows, kv_heads, dv]), Some(&cu_kv)),
        Some(size) => Kv::paged(
            View::new(&k, [pages, size, kv_heads, dk]),
            View::new(&v, [pages, size, kv_heads, dv]),
            View::new(&table, [seqs, max_pages]),
            &lens,
        ),
    };
    let mut input = AttentionInput::new(View::new(&q, [num_tokens, heads, dk]), kv);
    input.cu_seqlens_q = Some(&cu_q);
    input.sinks = spec.sinks.then_some(sinks);
    let (mut out, mut lse) = (vec![T::default(); num_tokens * heads * dv], vec![0.0; num_tokens * heads]);
    let output = AttentionOutput::with_lse(
        ViewMut::new(&mut out, [num_tokens, heads, dv]),
        ViewMut::new(&mut lse, [num_tokens, heads]),
    );
    cpu::attention(cpu, spec, &input, output).unwrap();
    (out, lse)
}

fn bits<T: Float>((out, lse): &(Vec<T>, Vec<f32>)) -> (Vec<u8>, Vec<u8>) {
    (bytemuck::cast_slice(out).to_vec(), bytemuck::cast_slice(lse).to_vec())
}

/// The same bits in one call, in chunks, one token at a time, in a batch, in pages, with any number of threads, twice.
fn same_bits<T: Float>() {
    let mut rng = Rng::new(seed());
    for (heads, dims, window, softcap, sinks) in [
        ((8, 2), (40, 24), None, None, false),
        ((4, 4), (64, 64), Some(100), Some(20.0), true),
        ((20, 1), (33, 17), None, None, true),
        ((1, 1), (16, 128), Some(3), None, false),
    ] {
        let mut spec = Attention::causal(heads.0, heads.1, dims.0);
        spec.value_dim = dims.1;
        spec.mask.window_left = window;
        spec.softcap = softcap;
        spec.sinks = sinks;
        let logits: Vec<f32> = rng.normals(heads.0, 1.0);
        let len = 600;
        let (tokens, other) = (Tokens::<T>::new(&spec, len, &mut rng), Tokens::<T>::new(&spec, 300, &mut rng));
        for level in Level::available() {
            let cpu = &mut Cpu::with_level(level);
            let whole = call(cpu, &spec, &logits, &[(&tokens, 0..len)], None);
            assert!(bits(&whole) == bits(&call(cpu, &spec, &logits, &[(&tokens, 0..len)], None)), "twice");
            for page in [1, 7, 16, 100] {
                let paged = call(cpu, &spec, &logits, &[(&tokens, 0..len)], Some(page));
                assert!(bits(&whole) == bits(&paged), "pages of {page} at {level}");
            }
            let width = heads.0 * dims.1;
            let rows = |range: &std::ops::Range<usize>| {
                let out = whole.0[range.start * width..range.end * width].to_vec();
                bits(&(out, whole.1[range.start * heads.0..range.end * heads.0].to_vec()))
            };
            let single = [0, 1, 63, 64, 511, 512, 513, 599].map(|i| i..i + 1);
            for range in [0..1, 1..6, 6..37, 37..70, 70..512, 512..600].iter().chain(&single) {
                let alone = call(cpu, &spec, &logits, &[(&tokens, range.clone())], None);
                assert!(rows(range) == bits(&alone), "chunk {range:?} at {level}");
                let batch = [(&other, 3..9), (&tokens, range.clone()), (&other, 0..0), (&other, 299..300)];
                for page in [None, Some(16)] {
                    let (out, lse) = call(cpu, &spec, &logits, &batch, page);
                    let mine =
                        (out[6 * width..out.len() - width].to_vec(), lse[6 * heads.0..lse.len() - heads.0].to_vec());
                    assert!(rows(range) == bits(&mine), "chunk {range:?} in a batch, pages {page:?} at {level}");
                }
            }
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for range in [0..len, 590..592, 599..600] {
                    let part = pool.install(|| call(cpu, &spec, &logits, &[(&tokens, range.clone())], None));
                    assert!(rows(&range) == bits(&part), "{range:?} with {threads} threads at {level}");
                }
            }
        }
    }
}

#[test]
fn same_bits_f32() {
    same_bits::<f32>();
}

#[test]
fn same_bits_bf16() {
    same_bits::<bf16>();
}

#[test]
fn same_bits_f16() {
    same_bits::<f16>();
}

/// Infinite and NaN scores and sinks follow the limit of the formula, as the reference does.
#[test]
fn infinite_and_nan() {
    let inf = f32::INFINITY;
    // Scores of the keys by way of the bias, then the sink.
    let cases: [(&[f32], f32); 11] = [
        (&[0.0, inf, 1.0], -inf),
        (&[inf, 0.0, inf], 3.0),
        (&[0.0, 1.0, 2.0], inf),
        (&[inf, 1.0, 2.0], inf),
        (&[-inf, -inf, -inf], -inf),
        (&[-inf, -inf, -inf], 1.5),
        (&[0.0, -inf, 3e38], -inf),
        (&[-3e38, -inf, -inf], -inf),
        (&[0.0, f32::NAN, 1.0], 0.0),
        (&[f32::NAN, -inf, -inf], -inf),
        (&[1.0, 2.0, 3.0], -inf),
    ];
    let mut spec = Attention::new(1, 1, 2);
    spec.sinks = true;
    let (q, k, v) = ([0.5f32, -1.0], [1.0f32, 0.5, 2.0, 1.0, 4.0, 2.0], [1.0f32, 10.0, 2.0, 20.0, 4.0, 40.0]);
    for (bias, sink) in cases {
        for repeat in [1, 50] {
            // Alone, and behind many hidden keys, so that the scores stand in the second tile.
            let hidden = (repeat - 1) * 2;
            let keys: Vec<f32> = [vec![f32::NAN; hidden * 2], k.to_vec()].concat();
            let values: Vec<f32> = [vec![f32::NAN; hidden * 2], v.to_vec()].concat();
            let bias: Vec<f32> = [vec![-inf; hidden], bias.to_vec()].concat();
            let rows = bias.len();
            let kv = Kv::ragged(View::new(&keys, [rows, 1, 2]), View::new(&values, [rows, 1, 2]), None);
            let mut input = AttentionInput::new(View::new(&q, [1, 1, 2]), kv);
            input.bias = Some(View::new(&bias, [1, 1, 1, rows]));
            let sinks = [sink];
            input.sinks = Some(&sinks);
            let (mut truth, mut truth_lse) = ([0.0; 2], [0.0]);
            let output =
                AttentionOutput::with_lse(ViewMut::new(&mut truth, [1, 1, 2]), ViewMut::new(&mut truth_lse, [1, 1]));
            reference::attention(&spec, &input, output).unwrap();
            for level in Level::available() {
                let (mut out, mut lse) = ([7.0f32; 2], [7.0]);
                let output =
                    AttentionOutput::with_lse(ViewMut::new(&mut out, [1, 1, 2]), ViewMut::new(&mut lse, [1, 1]));
                cpu::attention(&mut Cpu::with_level(level), &spec, &input, output).unwrap();
                let near = |x: f32, y: f64| {
                    (x.is_nan() && y.is_nan()) || x as f64 == y || (x as f64 - y).abs() < 1e-5 * y.abs()
                };
                let good = near(out[0], truth[0]) && near(out[1], truth[1]) && near(lse[0], truth_lse[0]);
                assert!(
                    good,
                    "{:?}, {sink} at {level}: {out:?} {lse:?}, expected {truth:?} {truth_lse:?}",
                    &bias[hidden..]
                );
            }
        }
    }
}

/// Far distances of the relative bias are computed one by one, near ones looked up.
#[test]
fn far_relative_bias() {
    let mut options = AttentionOptions::new((2, 1), 16, &[(3, 2500), (40, 70)]);
    options.relative_bias = Some(true);
    for max_distance in [3, 1024, 1025, 2400, 1 << 40] {
        let mut case = AttentionCase::<f32>::new(&options, 9);
        case.spec.relative_bias = Some(RelativeBias::new(8, max_distance, true));
        check(&case);
    }
}

/// What a call needs is reserved beforehand: the workspace does not grow, whatever the lengths of the sequences.
#[test]
fn workspace_is_known() {
    let mut spec = Attention::causal(8, 2, 64);
    let mut rng = Rng::new(3);
    for threads in [1, 4] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            for (lens, with_mask) in [(vec![1usize, 1], false), (vec![700], false), (vec![3, 900, 1, 1], true)] {
                spec.mask.window_left = with_mask.then_some(50);
                let tokens: Vec<_> = lens.iter().map(|len| Tokens::<bf16>::new(&spec, 1000 + len, &mut rng)).collect();
                let parts: Vec<_> = lens.iter().zip(&tokens).map(|(len, t)| (t, 1000..1000 + len)).collect();
                let max = *lens.iter().max().unwrap();
                let mut shape = AttentionShape::default();
                shape.num_seqs = lens.len();
                shape.num_tokens = lens.iter().sum();
                shape.max_q_len = max;
                shape.max_kv_len = 1000 + max;
                let mut cpu = Cpu::new().unwrap();
                let bytes = cpu::attention_workspace_bytes::<bf16>(&cpu, &spec, &shape, false);
                cpu.reserve(bytes);
                let before = cpu.workspace_bytes();
                call(&mut cpu, &spec, &[], &parts, Some(16));
                assert_eq!(cpu.workspace_bytes(), before);
            }
        });
    }
}

/// An error writes nothing; no tokens and no sequences are no error.
#[test]
fn errors_and_nothing() {
    let options = AttentionOptions::new((2, 1), 16, &[(3, 5)]);
    let case = AttentionCase::<f32>::new(&options, 1);
    let mut cpu = Cpu::new().unwrap();
    let mut out = common::Output::<f32, 3>::new([3, 2, 16], Layout::Padded);
    let mut spec = case.spec.clone();
    spec.value_dim = 15;
    let error = cpu::attention(&mut cpu, &spec, &case.input(), AttentionOutput::new(out.view())).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    spec.value_dim = 16;
    spec.sinks = true;
    let error = cpu::attention(&mut cpu, &spec, &case.input(), AttentionOutput::new(out.view())).unwrap_err();
    assert!(matches!(error, Error::Presence { .. }), "{error}");
    out.assert_untouched("out");
    for lens in [vec![], vec![(0, 0)], vec![(0, 7), (0, 0)]] {
        check_all(&AttentionOptions::new((2, 1), 16, &lens), 1);
    }
}

/// `merge` against the reference, whatever is infinite, NaN or absent; and the merge of parts is the attention over all keys.
#[test]
fn merge_is_the_reference() {
    let mut rng = Rng::new(seed());
    for (parts, tokens, heads, dv) in [(0, 3, 2, 5), (1, 1, 1, 1), (2, 70, 3, 40), (5, 9, 4, 17), (3, 0, 2, 4)] {
        for layout in Layout::ALL {
            let outs = common::Array::<bf16, 4>::new(
                [parts, tokens, heads, dv],
                layout,
                &rng.normals(parts * tokens * heads * dv, 1.0),
            );
            let mut values: Vec<f32> = rng.normals(parts * tokens * heads, 3.0);
            let special = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN];
            values.iter_mut().filter(|_| rng.chance(0.2)).enumerate().for_each(|(i, x)| *x = special[i % 3]);
            let lses = common::Array::<f32, 3>::new([parts, tokens, heads], layout, &values);
            let (mut truth, mut truth_lse) = (vec![0.0; tokens * heads * dv], vec![0.0; tokens * heads]);
            let output = AttentionOutput::with_lse(
                ViewMut::new(&mut truth, [tokens, heads, dv]),
                ViewMut::new(&mut truth_lse, [tokens, heads]),
            );
            reference::merge(outs.view(), lses.view(), output).unwrap();
            for level in Level::available() {
                let mut out = common::Output::<f32, 3>::new([tokens, heads, dv], layout);
                let mut lse = common::Output::<f32, 2>::new([tokens, heads], layout);
                let output = AttentionOutput::with_lse(out.view(), lse.view());
                cpu::merge(&mut Cpu::with_level(level), outs.view(), lses.view(), output).unwrap();
                // Sums of a few shares, each of them below 1: some roundings of the largest part.
                for (got, truth) in [(out.finish("out"), &truth), (lse.finish("lse"), &truth_lse)] {
                    for (got, truth) in got.iter().zip(truth) {
                        let same = got.is_nan() && truth.is_nan() || f64::from(*got) == *truth;
                        assert!(same || (f64::from(*got) - truth).abs() < 3e-6, "{got}, expected {truth} at {level}");
                    }
                }
            }
        }
    }
}
