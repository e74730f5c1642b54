//! `cpu::linear` and `cpu::linear_heads` at every level against sums in f64.

mod common;

use common::sums::{assert_sums, bits, naive_sum, starts_for, with_threads};
use common::{Array, Layout, Output, Rng};
use gatefold::cpu::{self, Cpu, Float, Level, PackedLinear};
use gatefold::{Dtype, Error, View, ViewMut};
use half::{bf16, f16};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    heads: usize,
    outputs: usize,
    inputs: usize,
    layouts: [Layout; 3],
    bias: bool,
    transposed: bool,
    threads: usize,
    seed: u64,
}

/// Around the tiles (1 to 12 tokens), the blocks (96), the panels (32) and the blocks of k.
fn cases() -> impl Strategy<Value = Case> {
    let layouts = prop::array::uniform3(common::strategies::layout());
    (common::strategies::linear(), layouts, any::<[bool; 2]>(), 1usize..4, any::<u64>()).prop_map(
        |([tokens, heads, outputs, inputs], layouts, [bias, transposed], threads, seed)| Case {
            tokens,
            heads,
            outputs,
            inputs,
            layouts,
            bias,
            transposed,
            threads,
            seed,
        },
    )
}

/// `[heads][outputs][inputs]` of a weight stored either way.
fn weight_at<W: Float>(case: &Case, weight: &View<'_, W, 3>, head: usize, output: usize, input: usize) -> W {
    weight.at(if case.transposed { [head, input, output] } else { [head, output, input] })
}

fn run<T: Float, W: Float, O: Float>(case: Case) {
    let Case { tokens, heads, outputs, inputs, layouts, .. } = case;
    let mut rng = Rng::new(case.seed);
    let shape = [tokens, heads, inputs];
    let x = Array::new(shape, layouts[0], &rng.normals::<T>(tokens * heads * inputs, 1.0));
    let x = x.view();
    let shape = if case.transposed { [heads, inputs, outputs] } else { [heads, outputs, inputs] };
    let weight = Array::new(shape, layouts[1], &rng.normals::<W>(heads * outputs * inputs, 1.0));
    let weight = weight.view();
    let one_head = heads == 1;
    let bias: Option<Vec<f32>> = (case.bias && one_head).then(|| rng.normals(outputs, 1.0));

    let (mut truth, mut naive, mut terms) = (Vec::new(), Vec::new(), Vec::new());
    let starts = starts_for(tokens * heads * outputs);
    for t in 0..tokens {
        for h in 0..heads {
            for o in 0..outputs {
                let mut exact = 0f64;
                terms.clear();
                for i in 0..inputs {
                    let (x, w) = (x.at([t, h, i]), weight_at(&case, &weight, h, o, i));
                    exact += x.to_f64() * w.to_f64();
                    terms.push(x.to_f32() * w.to_f32());
                }
                let bias = bias.as_ref().map_or(0.0, |b| b[o]);
                truth.push(exact + f64::from(bias));
                naive.push(O::from_f32(naive_sum(&terms, bias, exact + f64::from(bias), starts)));
            }
        }
    }

    let packed = with_threads(case.threads, || match case.transposed {
        false => PackedLinear::pack_heads(weight).unwrap(),
        true => PackedLinear::pack_heads_transposed(weight).unwrap(),
    });
    assert_eq!(packed.bytes(), heads * PackedLinear::packed_bytes(outputs, inputs, W::DTYPE));
    for level in Level::available() {
        let what = format!("{case:?} {level} {:?} x {:?} -> {:?}", T::DTYPE, W::DTYPE, O::DTYPE);
        let call = |first: usize, count: usize, threads: usize| {
            let mut cpu = Cpu::with_level(level);
            let mut out = Output::<O, 3>::new([count, heads, outputs], layouts[2]);
            let from = &x.data()[(first * x.strides()[0]).min(x.data().len())..];
            let x = View::with_strides(from, [count, heads, inputs], x.strides());
            with_threads(threads, || {
                cpu.reserve(cpu::linear_workspace_bytes::<T>(&cpu, &packed, count));
                let reserved = cpu.workspace_bytes();
                if one_head {
                    let x = View::with_strides(x.data(), [count, inputs], [x.strides()[0], 1]);
                    let mut view = out.view();
                    let strides = view.strides();
                    let out = ViewMut::with_strides(view.data_mut(), [count, outputs], [strides[0], 1]);
                    cpu::linear(&mut cpu, x, &packed, bias.as_deref(), out).unwrap();
                } else {
                    cpu::linear_heads(&mut cpu, x, &packed, out.view()).unwrap();
                }
                assert_eq!(cpu.workspace_bytes(), reserved, "{what}: the workspace grew");
            });
            out.finish("out")
        };
        let all = call(0, tokens, case.threads);
        assert_sums(&what, &all, &truth, &naive, outputs);
        // The same bits with other threads, and for a part of the tokens.
        let all = bits(&all);
        assert!(all == bits(&call(0, tokens, 4 - case.threads)), "{what}: another number of threads");
        if tokens > 0 {
            let first = case.seed as usize % tokens;
            let count = 1 + (case.seed >> 20) as usize % (tokens - first);
            let row = heads * outputs;
            let part = bits(&call(first, count, case.threads));
            assert!(all[first * row..(first + count) * row] == part, "{what}: tokens {first}..+{count} alone");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn f32_f32_f32(case in cases()) { run::<f32, f32, f32>(case); }
    #[test]
    fn bf16_bf16_bf16(case in cases()) { run::<bf16, bf16, bf16>(case); }
    #[test]
    fn bf16_bf16_f32(case in cases()) { run::<bf16, bf16, f32>(case); }
    #[test]
    fn f32_bf16_f32(case in cases()) { run::<f32, bf16, f32>(case); }
    #[test]
    fn f16_f16_f16(case in cases()) { run::<f16, f16, f16>(case); }
    #[test]
    fn bf16_f32_f32(case in cases()) { run::<bf16, f32, f32>(case); }
    #[test]
    fn mixed(case in cases()) {
        run::<f32, f16, bf16>(case);
        run::<f16, bf16, f32>(case);
        run::<f16, f32, f16>(case);
        run::<bf16, f16, bf16>(case);
    }
}

/// One-hot weights copy the input, exactly.
#[test]
fn a_permutation_is_exact() {
    let (tokens, width) = (37, 70);
    let x: Vec<f32> = Rng::new(3).normals(tokens * width, 5.0);
    let mut weight = vec![0f32; width * width];
    for o in 0..width {
        weight[o * width + (o * 3) % width] = 1.0;
    }
    let packed = PackedLinear::pack(View::new(&weight, [width, width])).unwrap();
    for level in Level::available() {
        let mut out = vec![0f32; tokens * width];
        let view = ViewMut::new(&mut out, [tokens, width]);
        cpu::linear(&mut Cpu::with_level(level), View::new(&x, [tokens, width]), &packed, None, view).unwrap();
        for t in 0..tokens {
            for o in 0..width {
                assert_eq!(out[t * width + o], x[t * width + (o * 3) % width]);
            }
        }
    }
}

/// NaN and infinity stay in their token.
#[test]
fn nan_stays_in_its_token() {
    let (tokens, width) = (15, 40);
    let mut x: Vec<f32> = Rng::new(4).normals(tokens * width, 1.0);
    x[7 * width + 3] = f32::NAN;
    x[9 * width + 3] = f32::INFINITY;
    let weight: Vec<f32> = Rng::new(5).normals(width * width, 1.0);
    let packed = PackedLinear::pack(View::new(&weight, [width, width])).unwrap();
    for level in Level::available() {
        let mut out = vec![0f32; tokens * width];
        let view = ViewMut::new(&mut out, [tokens, width]);
        cpu::linear(&mut Cpu::with_level(level), View::new(&x, [tokens, width]), &packed, None, view).unwrap();
        for (t, row) in out.chunks(width).enumerate() {
            let expected = |y: &f32| match t {
                7 => y.is_nan(),
                9 => y.is_infinite(),
                _ => y.is_finite(),
            };
            assert!(row.iter().all(expected), "token {t} at {level}");
        }
    }
}

#[test]
fn errors_name_the_argument_and_nothing_is_written() {
    let (x, weight, bias) = (vec![0f32; 100], vec![0f32; 100], vec![0f32; 9]);
    let packed = PackedLinear::pack(View::new(&weight, [10, 10])).unwrap();
    let heads = PackedLinear::pack_heads(View::new(&weight, [2, 5, 10])).unwrap();
    let mut cpu = Cpu::new().unwrap();
    let mut out = vec![7f32; 100];
    let mut fails = |x: View<'_, f32, 2>,
                     w: &PackedLinear,
                     bias: Option<&[f32]>,
                     shape: [usize; 2],
                     strides: [usize; 2],
                     want: &str| {
        let error = cpu::linear(&mut cpu, x, w, bias, ViewMut::with_strides(&mut out, shape, strides)).unwrap_err();
        assert_eq!(error.to_string(), want);
        assert!(out.iter().all(|x| *x == 7.0));
    };
    let good = View::new(&x, [10, 10]);
    fails(View::new(&x, [5, 20]), &packed, None, [5, 10], [10, 1], "`x` has shape [5, 20], expected [5, 10]");
    fails(
        View::new(&x[1..], [10, 10]),
        &packed,
        None,
        [10, 10],
        [10, 1],
        "`x` has 99 elements, its shape asks for 100",
    );
    fails(good, &packed, Some(&bias), [10, 10], [10, 1], "`bias` has 9 elements, its shape asks for 10");
    fails(good, &packed, None, [9, 10], [10, 1], "`out` has shape [9, 10], expected [10, 10]");
    fails(good, &packed, None, [10, 10], [9, 1], "`out` has strides [9, 1], expected rows that do not overlap");
    fails(good, &packed, None, [10, 10], [11, 1], "`out` has 100 elements, its shape asks for 109");
    fails(good, &heads, None, [10, 10], [10, 1], "`weight` is 2 heads, expected one matrix, not one per head");
    let strided = View::with_strides(&x, [10, 5], [10, 2]);
    let want = "`x` has strides [10, 2], expected the last dimension contiguous (stride 1)";
    let five = PackedLinear::pack(View::new(&weight, [10, 5])).unwrap();
    fails(strided, &five, None, [10, 10], [10, 1], want);
    assert!(matches!(PackedLinear::pack(View::new(&weight, [11, 10])), Err(Error::Len { .. })));
    let three = View::new(&x, [5, 2, 10]);
    let error = cpu::linear_heads(&mut cpu, three, &heads, ViewMut::new(&mut out, [5, 2, 6])).unwrap_err();
    assert_eq!(error.to_string(), "`out` has shape [5, 2, 6], expected [5, 2, 5]");
}

#[test]
fn sizes_are_known_beforehand() {
    assert_eq!(PackedLinear::packed_bytes(33, 5, Dtype::F32), 64 * 5 * 4);
    assert_eq!(PackedLinear::packed_bytes(32, 5, Dtype::BF16), 32 * 6 * 2);
    assert_eq!(PackedLinear::packed_bytes(1, 5, Dtype::F16), 32 * 5 * 2);
    assert_eq!(PackedLinear::packed_bytes(usize::MAX / 2, 5, Dtype::F16), usize::MAX);
}
