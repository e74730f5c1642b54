//! The tile model against an independent one in exact rational arithmetic (i128 over a fixed point grid), element by element, and hand-worked
//! cases of alignment and truncation.

use super::*;

fn rng(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

const FLOATS: [Input; 5] = [Input::F16, Input::Bf16, Input::Tf32, Input::E4m3, Input::E5m2];

fn spec(input: Input, acc: Accumulator, unit: Unit, numerics: Numerics) -> Spec {
    Spec { a: input, b: input, acc, unit, numerics }
}

/// A finite pattern whose exponent is near that of 1, so that sums align partly.
fn pattern(input: Input, state: &mut u64) -> u32 {
    let spread = (rng(state) % 25) as i32 - 12;
    let value = (rng(state) as i32 as f64) / 2f64.powi(31) * 2f64.powi(spread);
    match rng(state) % 16 {
        0 => 0,
        1 => input.format().encode(value * 2f64.powi(-14), Round::Zero, true),
        _ => input.format().encode(value, Round::Zero, true),
    }
}

/// The alignment model written the slow way: `f64` exponents from the definition, sums in i128.
fn by_definition(input: Input, acc: Accumulator, w: Widths, a: &[u32], b: &[u32], c: u32) -> u32 {
    let exponent = |format: Format, x: f64| {
        let e = if x == 0.0 { return None } else { x.abs().log2().floor() as i32 };
        Some(e.max(1 - format.bias()))
    };
    let format = input.format();
    let format_c = acc_format(acc);
    let mut current = c;
    let per_step = a.len() / w.steps;
    for step in 0..w.steps {
        let mut terms: Vec<(f64, i32)> = Vec::new();
        for i in step * per_step..(step + 1) * per_step {
            let (x, y) = (format.decode(a[i]), format.decode(b[i]));
            if let (Some(ex), Some(ey)) = (exponent(format, x), exponent(format, y)) {
                terms.push((x * y, ex + ey));
            }
        }
        let c = format_c.decode(current);
        if c.is_infinite() {
            return current; // an earlier step overflowed
        }
        if let Some(e) = exponent(format_c, c) {
            terms.push((c, e));
        }
        let Some(largest) = terms.iter().map(|t| t.1).max() else { return 0 };
        let grid = 2f64.powi(largest - w.fraction as i32);
        let sum: i128 = terms.iter().map(|t| (t.0 / grid).trunc() as i128).sum();
        let exact = sum as f64 * grid;
        current = if sum == 0 {
            0
        } else if acc == Accumulator::F16 {
            F16.encode(exact, Round::Nearest, false)
        } else {
            let narrow = Format { exp_bits: 8, frac_bits: w.result, pad_bits: 23 - w.result, has_inf: true };
            narrow.encode(exact, Round::Zero, false)
        };
    }
    current
}

#[test]
fn tiles_follow_the_definition() {
    let mut state = 0x1234_5678_9abc_def1;
    let mut scratch = Scratch::default();
    for input in FLOATS {
        let k = 256 / input.bits() as usize;
        for acc in [Accumulator::F32, Accumulator::F16] {
            for unit in [Unit::Mma, Unit::Wgmma] {
                for arch in [Arch::Ampere, Arch::Ada, Arch::Hopper, Arch::Blackwell] {
                    let spec = spec(input, acc, unit, Numerics::Exact(arch));
                    for _ in 0..12 {
                        let a: Vec<u32> = (0..16 * k).map(|_| pattern(input, &mut state)).collect();
                        let b: Vec<u32> = (0..16 * k).map(|_| pattern(input, &mut state)).collect();
                        let c: Vec<u32> = (0..256)
                            .map(|i| match i % 5 {
                                0 => 0,
                                _ => acc_format(acc).encode(
                                    (rng(&mut state) as i32 as f64) * 2f64.powi(-30 + (i % 7)),
                                    Round::Nearest,
                                    true,
                                ),
                            })
                            .collect();
                        let mut d = vec![0; 256];
                        tile(&spec, 16, 16, k, &a, &b, &c, &mut d, &mut scratch);
                        let w = widths(&spec, arch, k);
                        for row in 0..16 {
                            for col in 0..16 {
                                let want = by_definition(
                                    input,
                                    acc,
                                    w,
                                    &a[row * k..(row + 1) * k],
                                    &b[col * k..(col + 1) * k],
                                    c[row * 16 + col],
                                );
                                assert_eq!(d[row * 16 + col], want, "{spec:?} {row} {col}");
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn mixed_fp8_types() {
    let mut scratch = Scratch::default();
    let spec = Spec {
        a: Input::E4m3,
        b: Input::E5m2,
        acc: Accumulator::F32,
        unit: Unit::Mma,
        numerics: Numerics::Exact(Arch::Hopper),
    };
    let a = vec![E4M3.encode(1.875, Round::Nearest, true); 16 * 32];
    let b = vec![E5M2.encode(-1.75, Round::Nearest, true); 8 * 32];
    let mut d = vec![0; 128];
    tile(&spec, 16, 8, 32, &a, &b, &[0; 128], &mut d, &mut scratch);
    assert!(d.iter().all(|&x| f32::from_bits(x) == -32.0 * 1.875 * 1.75));
}

/// One output element of an m16n8k16 f16 product with the given products `a[i] * 1` and C.
fn one(arch: Arch, a: &[f64], c: f64) -> f32 {
    let spec = spec(Input::F16, Accumulator::F32, Unit::Mma, Numerics::Exact(arch));
    let mut av = vec![0; 256];
    let mut bv = vec![0; 128];
    for (i, &x) in a.iter().enumerate() {
        // a value beyond f16 is split into two factors
        let scale = if x != 0.0 && x.abs() < 2f64.powi(-14) { 2f64.powi(-12) } else { 1.0 };
        av[i] = F16.encode(x / scale, Round::Nearest, false);
        bv[i] = F16.encode(scale, Round::Nearest, false);
    }
    let mut cv = vec![0; 128];
    cv[0] = (c as f32).to_bits();
    let mut d = vec![0; 128];
    tile(&spec, 16, 8, 16, &av, &bv, &cv, &mut d, &mut Scratch::default());
    f32::from_bits(d[0])
}

#[test]
fn terms_below_the_kept_bits_are_truncated_one_by_one() {
    // C = 1 keeps bits down to 2^-24 on Ampere, 2^-25 on Hopper; two halves of that bit are lost because each is cut before the sum
    let e = |n: i32| 2f64.powi(n);
    assert_eq!(one(Arch::Ampere, &[e(-24), e(-24)], 1.0), 1.0 + f32::EPSILON);
    assert_eq!(one(Arch::Ampere, &[e(-25), e(-25), e(-25), e(-25)], 1.0), 1.0);
    assert_eq!(one(Arch::Hopper, &[e(-25), e(-25), e(-25), e(-25)], 1.0), 1.0 + f32::EPSILON);
    assert_eq!(one(Arch::Hopper, &[e(-26); 8], 1.0), 1.0);
    // truncation towards zero on both sides
    assert_eq!(one(Arch::Hopper, &[-e(-26); 8], 1.0), 1.0);
    assert_eq!(one(Arch::Hopper, &[-e(-25)], 1.0), 1.0 - f32::EPSILON / 2.0);
    // f32 result by truncation: 1 + 3 * 2^-25 is cut to 1
    assert_eq!(one(Arch::Hopper, &[e(-25), e(-25), e(-25)], 1.0), 1.0);
}

#[test]
fn ampere_takes_k_in_two_halves() {
    // 2^12 in the low half is cancelled only in the high half: the small term of the low half is cut against it
    let mut a = vec![0.0; 16];
    a[0] = 4096.0;
    a[1] = 2f64.powi(-14);
    a[8] = -4096.0;
    assert_eq!(one(Arch::Ampere, &a, 0.0), 0.0);
    // on Hopper one step keeps 25 bits below 2^12: 2^-14 is just below them
    assert_eq!(one(Arch::Hopper, &a, 0.0), 0.0);
    a[1] = 2f64.powi(-13);
    assert_eq!(one(Arch::Hopper, &a, 0.0), 2f32.powi(-13));
    // Ampere keeps 24 bits: 2^-12 survives the first half only as far as f32 has room, which it has not
    a[1] = 2f64.powi(-12);
    assert_eq!(one(Arch::Ampere, &a, 0.0), 0.0);
    a[1] = 2f64.powi(-11);
    assert_eq!(one(Arch::Ampere, &a, 0.0), 2f32.powi(-11));
    let first = widths(&spec(Input::F16, Accumulator::F32, Unit::Mma, Numerics::Fast), Arch::Ampere, 16);
    assert_eq!(first, Widths { fraction: 24, steps: 2, result: 23 });
    let half = widths(&spec(Input::F16, Accumulator::F32, Unit::Mma, Numerics::Fast), Arch::Ampere, 8);
    assert_eq!(half.steps, 1);
    let tf32 = widths(&spec(Input::Tf32, Accumulator::F32, Unit::Mma, Numerics::Fast), Arch::Ampere, 8);
    assert_eq!(tf32.steps, 2);
}

#[test]
fn wgmma_fp8_keeps_13_bits() {
    let spec = spec(Input::E4m3, Accumulator::F32, Unit::Wgmma, Numerics::Exact(Arch::Hopper));
    let a = vec![E4M3.encode(1.0, Round::Nearest, true); 16 * 32];
    let mut b = vec![0; 8 * 32];
    b[0] = E4M3.encode(2f64.powi(-9), Round::Nearest, true);
    let mut d = vec![0; 128];
    // 64 + 2^-9: 2^-9 is 15 bits below 64
    tile(&spec, 16, 8, 32, &a, &b, &[64f32.to_bits(); 128], &mut d, &mut Scratch::default());
    assert_eq!(f32::from_bits(d[0]), 64.0);
    tile(&spec, 16, 8, 32, &a, &b, &[8f32.to_bits(); 128], &mut d, &mut Scratch::default());
    assert_eq!(f32::from_bits(d[0]), 8.0 + 2f32.powi(-9));
    // C itself is cut to 13 bits
    tile(&spec, 16, 8, 32, &a, &b, &[(1.0f32 + 2f32.powi(-14)).to_bits(); 128], &mut d, &mut Scratch::default());
    assert_eq!(f32::from_bits(d[0]), 1.0 + 2f32.powi(-9));
}

#[test]
fn tf32_ignores_the_low_13_bits() {
    for numerics in [Numerics::Exact(Arch::Hopper), Numerics::Fast] {
        let spec = spec(Input::Tf32, Accumulator::F32, Unit::Mma, numerics);
        let a = vec![1.0f32.to_bits() | 0x1fff; 16 * 8];
        let b = vec![2.0f32.to_bits() | 0x1fff; 8 * 8];
        let mut d = vec![0; 128];
        tile(&spec, 16, 8, 8, &a, &b, &[0; 128], &mut d, &mut Scratch::default());
        assert!(d.iter().all(|&x| f32::from_bits(x) == 16.0));
    }
}

#[test]
fn infinities_and_nans() {
    let (inf, one, zero) = (0x7c00, 0x3c00, 0);
    for numerics in [Numerics::Exact(Arch::Ampere), Numerics::Exact(Arch::Hopper), Numerics::Fast] {
        for (acc, want_inf, want_nan) in
            [(Accumulator::F32, 0x7f80_0000, 0x7fff_ffff), (Accumulator::F16, 0x7c00, 0x7fff)]
        {
            let spec = spec(Input::F16, acc, Unit::Mma, numerics);
            let run = |x: u32, y: u32, c: u32| {
                let mut a = vec![one; 16 * 16];
                let mut b = vec![one; 8 * 16];
                (a[3], b[3]) = (x, y);
                let mut cs = vec![0; 128];
                cs[0] = c;
                let mut d = vec![0; 128];
                tile(&spec, 16, 8, 16, &a, &b, &cs, &mut d, &mut Scratch::default());
                (d[0], d[127])
            };
            let sixteen = if acc == Accumulator::F16 { 0x4c00 } else { 16f32.to_bits() };
            assert_eq!(run(inf, one, 0), (want_inf, sixteen));
            let sign = if acc == Accumulator::F16 { 0x8000 } else { 0x8000_0000 };
            assert_eq!(run(inf | 0x8000, one, 0).0, want_inf | sign);
            assert_eq!(run(inf, zero, 0), (want_nan, sixteen));
            assert_eq!(run(0x7e01, one, 0).0, want_nan);
            assert_eq!(run(one, one, want_inf).0, want_inf);
            assert_eq!(run(inf | 0x8000, one, want_inf).0, want_nan);
            assert_eq!(run(one, one, want_inf | 1).0, want_nan);
        }
    }
}

#[test]
fn overflow_becomes_infinity_and_subnormals_survive() {
    let big = vec![BF16.encode(2f64.powi(100), Round::Nearest, false); 16 * 16];
    let tiny = vec![BF16.encode(2f64.powi(-70), Round::Nearest, false); 16 * 16];
    let spec = spec(Input::Bf16, Accumulator::F32, Unit::Mma, Numerics::Exact(Arch::Hopper));
    let mut d = vec![0; 256];
    tile(&spec, 16, 16, 16, &big, &big, &[0; 256], &mut d, &mut Scratch::default());
    assert!(d.iter().all(|&x| x == 0x7f80_0000));
    tile(&spec, 16, 16, 16, &tiny, &tiny, &[0; 256], &mut d, &mut Scratch::default());
    assert!(d.iter().all(|&x| f64::from(f32::from_bits(x)) == 2f64.powi(-136)));
}

#[test]
fn integers_are_exact() {
    let mut state = 5;
    for (a_type, b_type) in
        [(Input::S8, Input::S8), (Input::U8, Input::U8), (Input::S8, Input::U8), (Input::U8, Input::S8)]
    {
        for saturate in [false, true] {
            let spec = Spec {
                a: a_type,
                b: b_type,
                acc: Accumulator::S32(saturate),
                unit: Unit::Mma,
                numerics: Numerics::Fast,
            };
            let a: Vec<u32> = (0..512).map(|_| rng(&mut state) as u32 & 0xff).collect();
            let b: Vec<u32> = (0..256).map(|_| rng(&mut state) as u32 & 0xff).collect();
            let c: Vec<u32> = (0..128).map(|i| if i % 2 == 0 { rng(&mut state) as u32 } else { 0x7fff_fff0 }).collect();
            let mut d = vec![0; 128];
            tile(&spec, 16, 8, 32, &a, &b, &c, &mut d, &mut Scratch::default());
            for row in 0..16 {
                for col in 0..8 {
                    let value = |t: Input, x: u32| {
                        if t == Input::S8 { x as i64 - if x > 127 { 256 } else { 0 } } else { x as i64 }
                    };
                    let dot: i64 =
                        (0..32).map(|i| value(a_type, a[row * 32 + i]) * value(b_type, b[col * 32 + i])).sum();
                    let sum = dot + i64::from(c[row * 8 + col] as i32);
                    let want = if saturate { sum.clamp(i32::MIN.into(), i32::MAX.into()) } else { sum } as u32;
                    assert_eq!(d[row * 8 + col], want);
                }
            }
        }
    }
}

#[test]
fn fast_is_close_to_the_real_sum() {
    let mut state = 77;
    for input in FLOATS {
        let k = 256 / input.bits() as usize;
        let spec = spec(input, Accumulator::F32, Unit::Mma, Numerics::Fast);
        let a: Vec<u32> = (0..16 * k).map(|_| pattern(input, &mut state)).collect();
        let b: Vec<u32> = (0..8 * k).map(|_| pattern(input, &mut state)).collect();
        let mut d = vec![0; 128];
        tile(&spec, 16, 8, k, &a, &b, &[1f32.to_bits(); 128], &mut d, &mut Scratch::default());
        for row in 0..16 {
            for col in 0..8 {
                let products =
                    (0..k).map(|i| input.format().decode(a[row * k + i]) * input.format().decode(b[col * k + i]));
                let (sum, size) = products.fold((1.0, 1.0), |(s, t): (f64, f64), p| (s + p, t + p.abs()));
                let got = f64::from(f32::from_bits(d[row * 8 + col]));
                assert!((got - sum).abs() <= size * 2f64.powi(-24) * (k + 1) as f64);
            }
        }
    }
}

#[test]
fn every_pattern_widens_to_f32() {
    for input in [Input::F16, Input::Bf16, Input::E4m3, Input::E5m2] {
        for bits in 0..1u32 << input.bits() {
            let (got, want) = (to_f32(input, bits), input.format().decode(bits));
            assert!(f64::from(got) == want || (got.is_nan() && want.is_nan()), "{input:?} {bits:#x}");
        }
    }
}

/// Prints the speed of both models; `cargo test -p simt --release -- --ignored --nocapture speed_of_tiles`.
#[test]
#[ignore = "a measurement"]
fn speed_of_tiles() {
    let mut state = 9;
    for (input, unit, n) in [
        (Input::Bf16, Unit::Mma, 8),
        (Input::F16, Unit::Mma, 8),
        (Input::E4m3, Unit::Mma, 8),
        (Input::Bf16, Unit::Wgmma, 128),
    ] {
        let k = 256 / input.bits() as usize;
        for numerics in [Numerics::Exact(Arch::Ampere), Numerics::Exact(Arch::Hopper), Numerics::Fast] {
            let spec = spec(input, Accumulator::F32, unit, numerics);
            let a: Vec<u32> = (0..16 * k).map(|_| pattern(input, &mut state)).collect();
            let b: Vec<u32> = (0..n * k).map(|_| pattern(input, &mut state)).collect();
            let mut d = vec![0; 16 * n];
            let c = vec![0; 16 * n];
            let mut scratch = Scratch::default();
            let runs = 200_000 / n;
            let start = std::time::Instant::now();
            for _ in 0..runs {
                tile(&spec, 16, n, k, &a, &b, &c, &mut d, &mut scratch);
            }
            let flops = (2 * 16 * n * k * runs) as f64;
            println!(
                "{input:?} {unit:?} n={n} {numerics:?}: {:.2} GFLOP/s",
                flops / start.elapsed().as_secs_f64() / 1e9
            );
        }
    }
}
