//! Attention of many queries: `attention_prefill` (16 bits) and `attention_f32`.

use crate::budget::budget;
use crate::common::attention_case::KvLayout;
use crate::common::simulator::Simulator;
use crate::common::{AttentionCase, AttentionOptions, AttentionPairs, Layout, Rng, assert_rows, naive, seed};
use crate::{on_devices, on_gpu, staged};
use gatefold::args::{self, AttentionInput, AttentionOutput};
use gatefold::cuda::driver::{Buffer, Driver, Limits};
use gatefold::cuda::{
    self, AttentionArgs, AttentionPlan, AttentionProblem, DeviceView, DeviceViewMut, KvShape, Queue, Stream,
};
use gatefold::spec::{Attention, Mask, RelativeBias};
use gatefold::{Dtype, Element, Error, View, ViewMut, reference};
use half::{bf16, f16};
use simt::Class;

mod bugs;

/// The options with a sequence of so many queries that the call takes the kernels for many of them, whatever its others are.
pub fn prefill(options: &AttentionOptions) -> AttentionOptions {
    let mut options = options.clone();
    options.lens.push((64 / (options.heads.0 / options.heads.1) + 1, 3));
    options
}

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

/// The widths that only f32 takes, and the layouts, are left to it.
fn check_all(driver: &dyn Driver, options: &AttentionOptions, seed: u64) {
    check(driver, &AttentionCase::<f32>::new(&prefill(options), seed));
    check_16_bits(driver, options, seed);
}

fn check_16_bits(driver: &dyn Driver, options: &AttentionOptions, seed: u64) {
    let options = prefill(options);
    let mut aligned = options.clone();
    aligned.dims = (options.dims.0.next_multiple_of(8), options.dims.1.next_multiple_of(8));
    aligned.layout = if options.layout == Layout::Contiguous { Layout::Contiguous } else { Layout::Aligned };
    check(driver, &AttentionCase::<bf16>::new(&aligned, seed));
    check(driver, &AttentionCase::<f16>::new(&aligned, seed));
}

/// Lengths around the tiles of queries (16, 64, 128) and of keys (32, 64), every bucket of widths.
#[test]
fn shapes() {
    on_devices(false, |driver| {
        let mut rng = Rng::new(seed());
        let widths = [
            (8, 8),
            (64, 64),
            (72, 40),
            (80, 80),
            (96, 96),
            (128, 128),
            (40, 120),
            (192, 128),
            (136, 160),
            (256, 256),
            (33, 5),
        ];
        let lens = [
            (0, 0),
            (0, 5),
            (3, 0),
            (1, 1),
            (2, 1),
            (15, 31),
            (16, 32),
            (17, 33),
            (5, 64),
            (40, 20),
            (63, 65),
            (64, 63),
        ];
        for (i, lens) in lens.into_iter().enumerate() {
            let heads = *rng.pick(&[(1, 1), (4, 2), (3, 1)]);
            let mut options = AttentionOptions::new(heads, 0, &[lens]);
            options.dims = widths[i % widths.len()];
            options.kv = *rng.pick(&[KvLayout::Ragged, KvLayout::Cache, KvLayout::Paged(16), KvLayout::Paged(7)]);
            options.layout = *rng.pick(&Layout::ALL);
            options.mask.causal = i % 2 == 0;
            check_all(driver, &options, rng.next());
        }
        for (i, lens) in [(65, 130), (127, 129), (128, 128), (129, 33), (66, 200)].into_iter().enumerate() {
            let mut options = AttentionOptions::new((2, 1), [64, 128, 96, 128, 64][i], &[lens]);
            options.mask.causal = i % 2 == 0;
            check_all(driver, &options, rng.next());
        }
    });
}

/// Every pair of values of two options.
const PAIRS: AttentionPairs<'_> = AttentionPairs {
    heads: &[(2, 2), (4, 2), (3, 1)],
    dims: &[(16, 16), (40, 72), (64, 32)],
    lens: &[&[(5, 66), (0, 3), (18, 40)], &[(20, 70)], &[(3, 30), (17, 17), (1, 70), (0, 0)]],
    window_left: 40,
    page: 5,
    sinks: true,
};

#[test]
fn pairs_of_options_f32() {
    on_devices(false, |driver| {
        PAIRS.check(2, |options, seed| {
            check(driver, &AttentionCase::<f32>::new(&prefill(options), seed));
        });
    });
}

#[test]
fn pairs_of_options_16_bits() {
    on_devices(false, |driver| PAIRS.check(2, |options, seed| check_16_bits(driver, options, seed)));
}

/// Pages of any size, one row up to several tiles.
#[test]
fn page_sizes() {
    on_devices(false, |driver| {
        for (i, page) in [1, 7, 16, 64, 100].into_iter().enumerate() {
            let mut options = AttentionOptions::new((2, 1), 64, &[(20, 150), (3, 65)]);
            options.kv = KvLayout::Paged(page);
            options.mask.causal = true;
            check_all(driver, &options, i as u64);
        }
    });
}

/// Scores so large that a product with log2 e has no digits left for a weight, and the sums that a soft-cap makes small again.
#[test]
fn large_scores() {
    on_devices(false, |driver| {
        for (i, scale) in [8.0, 1e3, 1e6, 1e12].into_iter().enumerate() {
            let mut options = AttentionOptions::new((2, 1), 64, &[(20, 100)]);
            options.scale = Some(scale);
            options.mask.causal = i % 2 == 1;
            check_all(driver, &options, i as u64);
            options.softcap = Some(5.0);
            check_all(driver, &options, i as u64);
        }
    });
}

/// Infinite and NaN scores and sinks follow the limit of the formula, as the reference does; alone, and behind a tile of hidden keys.
fn check_infinite<T: Element>(driver: &dyn Driver) {
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
    let mut spec = Attention::new(1, 1, 8);
    spec.sinks = true;
    let queries = 65;
    let q = vec![T::from_f32(0.5); queries * 8];
    for (bias, sink) in cases {
        for hidden in [0, 98] {
            let rows = hidden + 3;
            let value =
                |i: usize| T::from_f32(if i / 8 < hidden { 0.0 } else { (i % 8 + i / 8 - hidden) as f32 * 0.25 });
            let k: Vec<T> = (0..rows * 8).map(value).collect();
            let bias: Vec<f32> = [vec![-inf; hidden], bias.to_vec()].concat();
            let kv = args::Kv::ragged(View::new(&k, [rows, 1, 8]), View::new(&k, [rows, 1, 8]), None);
            let mut input = AttentionInput::new(View::new(&q, [queries, 1, 8]), kv);
            input.bias = Some(View::new(&bias, [1, 1, 1, rows]));
            let sinks = [sink];
            input.sinks = Some(&sinks);
            let (mut truth, mut truth_lse) = (vec![0.0; queries * 8], vec![0.0; queries]);
            let output = AttentionOutput::with_lse(
                ViewMut::new(&mut truth, [queries, 1, 8]),
                ViewMut::new(&mut truth_lse, [queries, 1]),
            );
            reference::attention(&spec, &input, output).unwrap();
            let (mut out, mut lse) = (vec![T::from_f32(7.0); queries * 8], vec![7.0f32; queries]);
            let output = AttentionOutput::with_lse(
                ViewMut::new(&mut out, [queries, 1, 8]),
                ViewMut::new(&mut lse, [queries, 1]),
            );
            staged::attention(driver, &spec, &input, output).unwrap();
            let near = |x: f64, y: f64, e: f64| (x.is_nan() && y.is_nan()) || x == y || (x - y).abs() < e * y.abs();
            let out_good = out.iter().zip(&truth).all(|(x, y)| near(x.to_f64(), *y, 1e-2));
            let lse_good = lse.iter().zip(&truth_lse).all(|(x, y)| near(f64::from(*x), *y, 1e-5));
            assert!(
                out_good && lse_good,
                "{} {:?}, {sink}: {:?} {:?}, expected {:?} {:?}",
                T::DTYPE,
                &bias[hidden..],
                &out[..8],
                &lse[..1],
                &truth[..8],
                &truth_lse[..1]
            );
        }
    }
}

#[test]
fn infinite_and_nan_f32() {
    on_devices(false, check_infinite::<f32>);
}

#[test]
fn infinite_and_nan_16_bits() {
    on_devices(false, |driver| {
        check_infinite::<bf16>(driver);
        check_infinite::<f16>(driver);
    });
}

/// T5's buckets as far as distances go; the logarithm is the specification's own.
#[test]
fn far_relative_bias() {
    on_devices(false, |driver| {
        for (i, max_distance) in [3, 20, 129, 1 << 40].into_iter().enumerate() {
            for (buckets, both) in [(8, true), (32, true), (32, false), (64, false), (128, true)] {
                let mut options = AttentionOptions::new((2, 1), 16, &[(40, 200)]);
                options.relative_bias = Some(both);
                options.starts = i == 3;
                let mut case = AttentionCase::<f32>::new(&options, 9);
                if max_distance <= buckets {
                    continue; // within the exact ones
                }
                case.spec.relative_bias = Some(RelativeBias::new(buckets, max_distance, both));
                let table: Vec<f32> = Rng::new(3).normals(buckets * 2, 1.0);
                case.relative_bias = Some(crate::common::Array::new([buckets, 2], Layout::Padded, &table));
                check(driver, &case);
            }
        }
    });
}

// --- bits -------------------------------------------------------------------------------------------------------------

/// One sequence: `[len, heads, width]` each.
struct Tokens<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Element> Tokens<T> {
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
fn call<T: Element>(
    driver: &dyn Driver,
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
        None => {
            args::Kv::ragged(View::new(&k, [rows, kv_heads, dk]), View::new(&v, [rows, kv_heads, dv]), Some(&cu_kv))
        }
        Some(size) => args::Kv::paged(
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
    staged::attention(driver, spec, &input, output).unwrap();
    (out, lse)
}

fn bits<T: Element>((out, lse): &(Vec<T>, Vec<f32>)) -> (Vec<u8>, Vec<u8>) {
    (bytemuck::cast_slice(out).to_vec(), bytemuck::cast_slice(lse).to_vec())
}

/// The same bits in one call, in chunks, in a batch, in pages, twice (Dao-AILab/flash-attention#1897, #2450, #2604).
fn check_bits<T: Element>(driver: &dyn Driver) {
    let mut rng = Rng::new(seed());
    for (heads, dims, window, softcap, sinks) in [
        ((2, 1), (64, 64), None, None, false),
        ((2, 2), (128, 96), Some(50), None, true),
        ((1, 1), (40, 24), None, Some(20.0), true),
    ] {
        let mut spec = Attention::causal(heads.0, heads.1, dims.0);
        spec.value_dim = dims.1;
        spec.mask.window_left = window;
        spec.softcap = softcap;
        spec.sinks = sinks;
        let logits: Vec<f32> = rng.normals(heads.0, 1.0);
        let len = 140;
        let (tokens, other) = (Tokens::<T>::new(&spec, len, &mut rng), Tokens::<T>::new(&spec, 90, &mut rng));
        let whole = call(driver, &spec, &logits, &[(&tokens, 0..len)], None);
        assert!(bits(&whole) == bits(&call(driver, &spec, &logits, &[(&tokens, 0..len)], None)), "twice");
        for page in [1, 7, 16, 64] {
            let paged = call(driver, &spec, &logits, &[(&tokens, 0..len)], Some(page));
            assert!(bits(&whole) == bits(&paged), "pages of {page}");
        }
        let width = heads.0 * dims.1;
        for range in [0..1, 1..6, 6..50, 50..130, 130..140, 63..64, 64..65, 139..140] {
            let rows = |at: usize, (out, lse): &(Vec<T>, Vec<f32>)| {
                let end = at + range.len();
                bits(&(out[at * width..end * width].to_vec(), lse[at * heads.0..end * heads.0].to_vec()))
            };
            // Between others, one of which makes the call a prefill.
            let filler = 20..20 + 64 / spec.group_size() + 6;
            let batch = [(&other, 3..9), (&tokens, range.clone()), (&other, 0..0), (&other, filler)];
            for page in [None, Some(16)] {
                let found = call(driver, &spec, &logits, &batch, page);
                assert!(
                    rows(range.start, &whole) == rows(6, &found),
                    "{} {range:?} in a batch, pages {page:?}",
                    T::DTYPE
                );
            }
        }
    }
}

#[test]
fn same_bits() {
    on_devices(true, |driver| {
        check_bits::<bf16>(driver);
        check_bits::<f16>(driver);
        check_bits::<f32>(driver);
    });
}

/// Asking for `lse` changes no bit of `out`, although it is summed on its own.
#[test]
fn lse_leaves_out_as_it_is() {
    on_devices(true, |driver| {
        for (dim, scale) in [(64, None), (128, Some(1e6))] {
            let mut options = AttentionOptions::new((2, 1), dim, &[(100, 150)]);
            options.scale = scale;
            let case = AttentionCase::<bf16>::new(&options, 1);
            let [with, without] = [true, false].map(|wants_lse| {
                case.run(|spec, input, mut output| {
                    output.lse = output.lse.filter(|_| wants_lse);
                    staged::attention::<bf16>(driver, spec, input, output)
                })
            });
            assert!(with.out == without.out, "head_dim {dim}");
        }
    });
}

// --- what the device says ---------------------------------------------------------------------------------------------

/// Lengths, prefix sums and pages out of range lead nowhere: the simulator reports every access outside of an array.
#[test]
fn hostile_lengths() {
    on_devices(false, |driver| {
        let (rows, dim, seqs) = (80, 64, 2);
        let data: Vec<bf16> = Rng::new(6).normals(rows * dim, 1.0);
        let [q, k, v] = [(); 3].map(|()| Buffer::from_slice(driver, &data).unwrap());
        let out = Buffer::from_slice(driver, &data).unwrap();
        // SAFETY: each buffer holds the elements that its view names, and outlives the calls, after which the queue waits.
        let view = |buffer: &Buffer<'_>, shape: [usize; 3]| unsafe {
            DeviceView::<bf16, 3>::from_raw(buffer.ptr(), rows * dim, shape, [dim, dim, 1])
        };
        let mut queue = Queue::new(driver);
        for sums in [[0, 90, 7], [50, 20, u32::MAX], [u32::MAX, 0, 80], [5, 5, 79]] {
            for pages in [None, Some([0, 9, u32::MAX, 3])] {
                let cu = Buffer::from_slice(driver, &sums).unwrap();
                let begin = Buffer::from_slice(driver, &[u32::MAX, 3]).unwrap();
                let starts = Buffer::from_slice(driver, &[i64::MAX, i64::MIN]).unwrap();
                let table = Buffer::from_slice(driver, &pages.unwrap_or_default()).unwrap();
                // SAFETY: as above.
                let (cu, lens, begin, starts, table) = unsafe {
                    (
                        DeviceView::<u32, 1>::from_raw(cu.ptr(), 3, [3], [1]),
                        DeviceView::<u32, 1>::from_raw(cu.ptr(), 2, [2], [1]),
                        DeviceView::<u32, 1>::from_raw(begin.ptr(), 2, [2], [1]),
                        DeviceView::<i64, 1>::from_raw(starts.ptr(), 2, [2], [1]),
                        DeviceView::<u32, 2>::from_raw(table.ptr(), 4, [seqs, 2], [2, 1]),
                    )
                };
                let shape = [rows, 1, dim];
                let kv = match pages {
                    None => cuda::Kv::ragged(view(&k, shape), view(&v, shape), Some(cu)),
                    Some(_) => {
                        let paged = |buffer| view(buffer, shape).reshape([4, 20, 1, dim]);
                        cuda::Kv::paged(paged(&k), paged(&v), table, lens)
                    }
                };
                let mut input = cuda::AttentionInput::new(view(&q, shape), kv);
                input.cu_seqlens_q = Some(cu);
                input.kv_begin = Some(begin);
                input.q_start = Some(starts);
                // SAFETY: as above; nothing else uses `out`.
                let result = unsafe { DeviceViewMut::<bf16, 3>::from_raw(out.ptr(), rows * dim, shape, [dim, dim, 1]) };
                let mut spec = Attention::causal(1, 1, dim);
                spec.mask.chunk = Some(3);
                cuda::attention(&mut queue, &spec, &input, cuda::AttentionOutput::new(result)).unwrap();
                queue.synchronize().unwrap();
            }
        }
    });
}

/// Rows that are not aligned, and arrays that are not, are typed errors in 16 bits (pytorch/pytorch#170813, deepseek-ai/DeepGEMM#96).
#[test]
fn pytorch_170813_unaligned_is_an_error() {
    let driver = &Simulator::new(false);
    let options = AttentionOptions { layout: Layout::Padded, ..AttentionOptions::new((2, 1), 64, &[(80, 80)]) };
    let case = AttentionCase::<bf16>::new(&options, 1);
    let mut out = crate::common::Output::<bf16, 3>::new([80, 2, 64], Layout::Contiguous);
    let error = staged::attention(driver, &case.spec, &case.input(), AttentionOutput::new(out.view())).unwrap_err();
    assert!(matches!(&error, Error::Stride { argument, .. } if argument == "q"), "{error}");
    let problem = AttentionProblem::new(Attention::new(1, 1, 64), Dtype::BF16, 1, 80, KvShape::ragged(80));
    let plan = AttentionPlan::new(&problem, &driver.limits()).unwrap();
    // SAFETY: nothing runs, because the pointer is refused.
    let error =
        unsafe { plan.launch(driver, &AttentionArgs::new(0x100, 0x204, 0x300, 0x400), Stream::LEGACY).unwrap_err() };
    assert_eq!(error.to_string(), "`k` is 0x204, expected a device pointer that is a multiple of 16");
}

// --- plans ------------------------------------------------------------------------------------------------------------

/// Every width has a kernel on devices with 99, 163 and 227 KiB, the same on all.
#[test]
fn plans() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for (head_dim, value_dim, max_q_len, expected) in [
            (64, 64, 40, "d64_64_m64"),
            (64, 64, 4096, "d64_64_m128"),
            (72, 80, 64, "d80_80_m128"),
            (80, 80, 4096, "d80_80_m128"),
            (88, 80, 4096, "d96_96_m128"),
            (128, 128, 64, "d128_128_m64"),
            (128, 64, 4096, "d128_128_m128"),
            (192, 128, 4096, "d192_128_m128"),
            (128, 192, 4096, "d192_192_m64"),
            (200, 256, 4096, "d256_256_m64"),
        ] {
            for shared_kib in [99, 163, 227] {
                let mut spec = Attention::causal(32, 8, head_dim);
                spec.value_dim = value_dim;
                let mut problem = AttentionProblem::new(spec, dtype, 4, 8192, KvShape::paged(1000, 16, 256));
                problem.max_q_len = max_q_len;
                let plan = AttentionPlan::new(&problem, &Limits::new(80, 108, shared_kib << 10)).unwrap();
                let width = [64, 128, 256].into_iter().find(|w| *w >= head_dim.max(value_dim)).unwrap();
                let name = match dtype {
                    Dtype::F32 => format!("gatefold_attention_f32_d{width}"),
                    _ => format!("gatefold_attention_prefill_{dtype}_{expected}"),
                };
                assert_eq!(plan.kernels(), [name]);
                assert_eq!(plan.workspace_bytes(), 0);
            }
        }
    }
}

// --- counters ---------------------------------------------------------------------------------------------------------

/// What tiles of keys cost CTAs that see all of them: no bank conflicts, whole sectors, as many MMAs as the header says, and no more
/// instructions than these; `lse` costs instructions alone.
#[test]
fn counters() {
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for (kernel, heads, dims, rows, tile, recorded) in [
        ("d64_64_m64", 2, (64, 64), 64, 64, [15456, 35648]),
        ("d64_64_m128", 1, (64, 64), 128, 64, [12880, 32864]),
        ("d80_80_m128", 1, (80, 80), 128, 64, [14256, 34240]),
        ("d96_96_m128", 1, (96, 96), 128, 32, [9768, 19352]),
        ("d128_128_m64", 2, (128, 128), 64, 32, [13200, 21232]),
        ("d128_128_m128", 1, (128, 128), 128, 32, [10920, 20504]),
        ("d192_128_m128", 1, (192, 128), 128, 32, [11784, 21368]),
        ("d192_192_m64", 2, (192, 192), 64, 32, [16272, 24304]),
        ("d256_256_m64", 2, (256, 256), 64, 32, [19344, 27376]),
    ] {
        let counted = |kv_len: usize, wants_lse: bool| {
            let simulator = Simulator::new(false);
            let mut options = AttentionOptions::new((heads, 1), 0, &[(rows, kv_len)]);
            options.dims = dims;
            let case = AttentionCase::<bf16>::new(&options, 1);
            case.run(|spec, input, mut output| {
                output.lse = output.lse.filter(|_| wants_lse);
                staged::attention::<bf16>(&simulator, spec, input, output)
            });
            let [(entry, counters)] = simulator.take_counters()[..] else { panic!("one launch") };
            assert_eq!(entry, format!("gatefold_attention_prefill_bf16_{kernel}"));
            (entry, counters)
        };
        let cost = [false, true].map(|wants_lse| {
            let ((entry, few), (_, many)) = (counted(2 * tile, wants_lse), counted(6 * tile, wants_lse));
            assert_eq!(many.conflict_degree(), 1.0, "{entry}");
            let bytes = (heads * 4 * tile * (dims.0 + dims.1) * 2) as u64;
            assert_eq!(many.global_bytes - few.global_bytes, bytes, "{entry}: keys and values, each once per head");
            assert_eq!(many.global_sectors - few.global_sectors, bytes / 32, "{entry}: in whole sectors");
            let flops = many.mma_flops - few.mma_flops;
            assert_eq!(flops, (heads * 2 * rows * 4 * tile * (dims.0 + dims.1)) as u64, "{entry}");
            let mmas = many.class(Class::Matrix) - few.class(Class::Matrix);
            assert_eq!(mmas, (heads * 4 * 4) as u64 * budget(entry)[0], "{entry}: 4 warps, 4 tiles of each head");
            let instructions = many.instructions - few.instructions;
            let each = instructions as f64 / mmas as f64;
            println!("{entry}, lse {wants_lse}: {instructions} instructions for {mmas} MMAs, {each:.2} each");
            instructions
        });
        found.push((kernel, cost));
        expected.push((kernel, recorded));
    }
    assert_eq!(found, expected, "instructions for 4 tiles of each head, without and with lse");
}

/// The same in f32, per multiply-add of a warp instead of an MMA.
#[test]
fn counters_f32() {
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for (dim, recorded) in [(64, 296_064), (128, 462_976), (256, 796_800)] {
        let (rows, tile) = (16, 32);
        let counted = |kv_len: usize| {
            let simulator = Simulator::new(false);
            // Eight heads, so that the call is no decode.
            let options = AttentionOptions::new((8, 1), dim, &[(rows, kv_len)]);
            let case = AttentionCase::<f32>::new(&options, 1);
            case.run(|spec, input, output| staged::attention::<f32>(&simulator, spec, input, output));
            let [(entry, counters)] = simulator.take_counters()[..] else { panic!("one launch") };
            (entry, counters)
        };
        let ((entry, few), (_, many)) = (counted(2 * tile), counted(6 * tile));
        assert_eq!(entry, format!("gatefold_attention_f32_d{dim}"));
        assert_eq!(many.conflict_degree(), 1.0, "{entry}");
        let bytes = (8 * 4 * tile * 2 * dim * 4) as u64;
        assert_eq!(many.global_bytes - few.global_bytes, bytes, "{entry}: keys and values, each once per head");
        assert_eq!(many.global_sectors - few.global_sectors, bytes / 32, "{entry}: in whole sectors");
        let warps = 8 * 4 * 4; // of the tiles of all heads
        let [fma, keys, outputs, ..] = budget(entry)[..] else { panic!("{entry}: what its header has") };
        assert_eq!((keys, warps * fma), (tile as u64, (8 * 4 * tile * 2 * dim * rows / 32) as u64), "{entry}");
        // Besides the products: a factor for each output, and the softmax, which is the same for all widths.
        let floats = many.class(Class::Float) - few.class(Class::Float);
        let instructions = many.instructions - few.instructions;
        println!("{entry}: {instructions} instructions, {:.2} per FMA", instructions as f64 / (warps * fma) as f64);
        found.push((dim, instructions, floats - warps * (fma + outputs)));
        expected.push((dim, recorded, warps * 4 * 38));
    }
    assert_eq!(found, expected, "instructions for 4 tiles of 8 heads, those of the softmax");
}

/// Real sizes, where there is a GPU.
#[test]
fn real_sizes() {
    on_gpu(|driver| {
        for (heads, dim, lens, kv) in [
            ((8, 2), 128, vec![(1024, 1024), (300, 2000)], KvLayout::Ragged),
            ((4, 4), 64, vec![(2000, 2000)], KvLayout::Cache),
            ((4, 1), 256, vec![(700, 900)], KvLayout::Paged(16)),
        ] {
            let mut options = AttentionOptions::new(heads, dim, &lens);
            options.kv = kv;
            options.mask = Mask::causal();
            check_all(driver, &options, 1);
        }
    });
}
