//! Expectations from IEEE 754 and from PTX ISA 9.7.9.21 (`cvt`), 9.7.3 and 9.7.4, worked out by exhaustive search over neighbours.

use super::*;

const ROUNDS: [Round; 5] = [Round::Nearest, Round::Zero, Round::Down, Round::Up, Round::Away];
const NARROW: [Format; 4] = [F16, BF16, E4M3, E5M2];

fn rng(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The definition of rounding: the finite neighbours of `x` by linear search over all patterns, then the mode's choice.
fn round_by_search(format: Format, values: &[(f64, u32)], x: f64, round: Round) -> Option<u32> {
    // `values` sorted by value, -0 and +0 merged into +0
    let at = values.partition_point(|v| v.0 < x);
    if at < values.len() && values[at].0 == x {
        return Some(values[at].1);
    }
    if at == 0 || at == values.len() {
        return None; // beyond the finite range: tested separately
    }
    let (low, high) = (values[at - 1], values[at]);
    let (to_low, to_high) = (x - low.0, high.0 - x);
    let even = |bits: u32| bits >> format.pad_bits & 1 == 0;
    let pick_high = match round {
        Round::Nearest => to_high < to_low || (to_high == to_low && even(high.1)),
        Round::Away => to_high < to_low || (to_high == to_low && x > 0.0),
        Round::Zero => x < 0.0,
        Round::Down => false,
        Round::Up => true,
    };
    Some(if pick_high { high.1 } else { low.1 })
}

fn finite_values(format: Format) -> Vec<(f64, u32)> {
    let mut values: Vec<(f64, u32)> = (0..1u32 << format.width())
        .filter(|&b| b & ((1 << format.pad_bits) - 1) == 0 && b != format.sign_bit())
        .map(|b| (format.decode(b), b))
        .filter(|v| v.0.is_finite())
        .collect();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    values
}

#[test]
fn known_patterns() {
    // PTX ISA 5.2.3: ranges of the alternate formats
    assert_eq!(E4M3.decode(0x7e), 448.0);
    assert_eq!(E4M3.decode(0x01), 2f64.powi(-9));
    assert!(E4M3.decode(0x7f).is_nan() && E4M3.decode(0xff).is_nan());
    assert_eq!(E5M2.decode(0x7b), 57344.0);
    assert_eq!(E5M2.decode(0x7c), f64::INFINITY);
    assert_eq!(E5M2.decode(0x01), 2f64.powi(-16));
    assert_eq!(F16.decode(0x7bff), 65504.0);
    assert_eq!(F16.decode(0x0001), 2f64.powi(-24));
    assert_eq!(F16.decode(0xc000), -2.0);
    assert_eq!(BF16.decode(0x3f80), 1.0);
    assert_eq!(BF16.decode(0x0001), 2f64.powi(-133));
    assert_eq!(TF32.decode(0x3f80_0000), 1.0);
    assert_eq!((F32.nan(), F16.nan(), BF16.nan(), E4M3.nan(), E5M2.nan()), (0x7fff_ffff, 0x7fff, 0x7fff, 0x7f, 0x7f));
    assert_eq!((E4M3.max_finite(), E5M2.max_finite(), F16.max_finite()), (0x7e, 0x7b, 0x7bff));
    assert_eq!(TF32.max_finite(), 0x7f7f_e000);
}

#[test]
fn every_pattern_survives_a_round_trip() {
    for format in NARROW {
        for bits in 0..1u32 << format.width() {
            let value = format.decode(bits);
            let want = if format.is_nan(bits) { format.nan() } else { bits };
            for round in ROUNDS {
                assert_eq!(format.encode(value, round, false), want, "{format:?} {bits:#x} {round:?}");
            }
        }
    }
}

#[test]
fn rounding_is_the_nearest_neighbour_of_the_mode() {
    for format in NARROW {
        let values = finite_values(format);
        let mut state = 88172645463325252u64;
        let mut probes: Vec<f64> = Vec::new();
        for pair in values.windows(2).step_by(if format.width() == 16 { 7 } else { 1 }) {
            let middle = (pair[0].0 + pair[1].0) / 2.0; // exact: one bit more than the format
            let spread = (pair[1].0 - pair[0].0) / 1024.0;
            probes.extend([pair[0].0, middle, middle + spread, middle - spread, pair[0].0 + spread]);
        }
        for _ in 0..2000 {
            probes.push(f64::from(f32::from_bits(rng(&mut state) as u32)));
        }
        for x in probes.into_iter().filter(|x| x.is_finite()) {
            for round in ROUNDS {
                let Some(want) = round_by_search(format, &values, x, round) else { continue };
                let got = format.encode(x, round, false);
                let got = if got == format.sign_bit() { 0 } else { got };
                assert_eq!(got, want, "{format:?} {x:e} {round:?}");
                let saturated = format.encode(x, round, true);
                assert_eq!(if saturated == format.sign_bit() { 0 } else { saturated }, want);
            }
        }
    }
}

#[test]
fn sign_of_a_rounded_zero_is_the_sign_of_the_input() {
    for format in NARROW {
        assert_eq!(format.encode(-1e-60, Round::Nearest, false), format.sign_bit());
        assert_eq!(format.encode(-1e-60, Round::Up, false), format.sign_bit());
        assert_eq!(format.encode(-1e-60, Round::Down, false), format.sign_bit() | 1);
        assert_eq!(format.encode(1e-60, Round::Up, false), 1);
        assert_eq!(format.encode(-0.0, Round::Nearest, false), format.sign_bit());
    }
}

#[test]
fn overflow_follows_the_mode_or_satfinite() {
    // 65520 is the tie between 65504 and 2^16: to even means infinity
    assert_eq!(F16.encode(65520.0, Round::Nearest, false), 0x7c00);
    assert_eq!(F16.encode(65519.9, Round::Nearest, false), 0x7bff);
    assert_eq!(F16.encode(65520.0, Round::Zero, false), 0x7bff);
    assert_eq!(F16.encode(1e9, Round::Down, false), 0x7bff);
    assert_eq!(F16.encode(-1e9, Round::Down, false), 0xfc00);
    assert_eq!(F16.encode(1e9, Round::Up, false), 0x7c00);
    assert_eq!(F16.encode(-1e9, Round::Up, false), 0xfbff);
    // .satfinite: |input| > MAX_NORM gives MAX_NORM with the sign, infinity included; NaN stays NaN
    for format in NARROW {
        for round in [Round::Nearest, Round::Zero] {
            assert_eq!(format.encode(f64::INFINITY, round, true), format.max_finite());
            assert_eq!(format.encode(f64::NEG_INFINITY, round, true), format.max_finite() | format.sign_bit());
            assert_eq!(format.encode(1e300, round, true), format.max_finite());
            assert_eq!(format.encode(f64::NAN, round, true), format.nan());
        }
    }
    assert_eq!(E4M3.encode(464.0, Round::Nearest, true), 0x7e);
    assert_eq!(E4M3.encode(1000.0, Round::Nearest, false), 0x7f);
    assert_eq!(E5M2.encode(61440.0, Round::Nearest, false), 0x7c);
}

#[test]
fn tf32_rounds_to_nearest_ties_away() {
    let rna = Cvt::new(Round::Away);
    // 1 + 2^-11 is a tie: away gives 1 + 2^-10, even gives 1
    let tie = (1.0f32 + 2f32.powi(-11)).to_bits();
    assert_eq!(cvt(F32, TF32, tie, rna), 0x3f80_2000);
    assert_eq!(cvt(F32, TF32, tie, Cvt::new(Round::Nearest)), 0x3f80_0000);
    assert_eq!(cvt(F32, TF32, tie, Cvt::new(Round::Zero)), 0x3f80_0000);
    assert_eq!(cvt(F32, TF32, tie | 1 << 31, rna), 0xbf80_2000);
    assert_eq!(cvt(F32, TF32, f32::MAX.to_bits(), rna), 0x7f80_0000);
    assert_eq!(cvt(F32, TF32, f32::MAX.to_bits(), Cvt { satfinite: true, ..rna }), 0x7f7f_e000);
}

#[test]
fn relu_sat_and_ftz() {
    let relu = Cvt { relu: true, ..Cvt::new(Round::Nearest) };
    let sat = Cvt { sat: true, ..Cvt::new(Round::Nearest) };
    let ftz = Cvt { ftz: true, ..Cvt::new(Round::Nearest) };
    for to in [F16, BF16] {
        assert_eq!(cvt(F32, to, (-3.0f32).to_bits(), relu), 0);
        assert_eq!(cvt(F32, to, f32::NEG_INFINITY.to_bits(), relu), 0);
        assert_eq!(cvt(F32, to, 0xffc0_0001, relu), 0x7fff);
    }
    assert_eq!(cvt(F32, BF16, 3.0f32.to_bits(), relu), 0x4040);
    assert_eq!(cvt(F32, F16, 3.0f32.to_bits(), sat), 0x3c00);
    assert_eq!(cvt(F32, F16, (-3.0f32).to_bits(), sat), 0);
    assert_eq!(cvt(F32, F16, f32::NAN.to_bits(), sat), 0);
    assert_eq!(cvt(F32, F16, 0.5f32.to_bits(), sat), 0x3800);
    assert_eq!(cvt(F32, BF16, 0x8000_4000, ftz), 0x8000);
    assert_eq!(cvt(BF16, F32, 0x0001, ftz), 0);
    assert_eq!(cvt(BF16, F32, 0x0001, Cvt::new(Round::Nearest)), 0x0001_0000);
    assert_eq!(cvt(F16, F32, 0x0001, ftz), 2f32.powi(-24).to_bits()); // normal as f32: not flushed
}

#[test]
fn fast_bf16_path_is_the_general_one() {
    let mut state = 1u64;
    for i in 0..2_000_000u32 {
        let bits = if i < 70_000 { i << 15 ^ i } else { rng(&mut state) as u32 };
        assert_eq!(bf16_from_f32_rn(bits), cvt(F32, BF16, bits, Cvt::new(Round::Nearest)), "{bits:#x}");
    }
}

#[test]
fn pairs_put_the_first_source_into_the_upper_half() {
    // PTX ISA 9.7.9.21: for .f16x2 and .e4m3x2 destinations the conversion of a is stored in the upper half, of b in the lower
    let how = Cvt { satfinite: true, ..Cvt::new(Round::Nearest) };
    let (one, two) = (1.0f32.to_bits(), 2.0f32.to_bits());
    assert_eq!(cvt_pair_from_f32(F16, one, two, how), 0x3c00_4000);
    assert_eq!(cvt_pair_from_f32(BF16, one, two, how), 0x3f80_4000);
    assert_eq!(cvt_pair_from_f32(E4M3, one, two, how), 0x3840);
    assert_eq!(cvt_pair_from_f32(E5M2, one, two, how), 0x3c40);
    assert_eq!(cvt_pair(E4M3, F16, 0x3840, how), 0x3c00_4000);
    assert_eq!(cvt_pair(F16, E5M2, 0x3c00_4000, how), 0x3c40);
}

#[test]
fn to_integers() {
    for (x, rni, rzi, rmi, rpi) in
        [(2.5, 2, 2, 2, 3), (3.5, 4, 3, 3, 4), (-2.5, -2, -2, -3, -2), (-0.5, 0, 0, -1, 0), (0.51, 1, 0, 0, 1)]
    {
        for (round, want) in [(Round::Nearest, rni), (Round::Zero, rzi), (Round::Down, rmi), (Round::Up, rpi)] {
            assert_eq!(cvt_to_int(x, round, 32, true) as u32 as i32, want, "{x} {round:?}");
        }
    }
    // out of range clamps; NaN is 0, for 64-bit destinations 1 << 63
    assert_eq!(cvt_to_int(1e30, Round::Zero, 32, true), 0x7fff_ffff);
    assert_eq!(cvt_to_int(-1e30, Round::Zero, 32, true), 0x8000_0000);
    assert_eq!(cvt_to_int(-1.0, Round::Zero, 32, false), 0);
    assert_eq!(cvt_to_int(300.0, Round::Zero, 8, false), 255);
    assert_eq!(cvt_to_int(-300.0, Round::Zero, 8, true), 0x80);
    assert_eq!(cvt_to_int(f64::INFINITY, Round::Zero, 64, false), u64::MAX);
    assert_eq!(cvt_to_int(f64::NAN, Round::Zero, 32, true), 0);
    assert_eq!(cvt_to_int(f64::NAN, Round::Zero, 64, true), 1 << 63);
}

#[test]
fn from_integers_in_every_mode() {
    let mut state = 7u64;
    for i in 0..20_000 {
        let value = i128::from((rng(&mut state) as i64) >> (i % 63));
        let got = cvt_from_int(value, F32, Cvt::new(Round::Nearest));
        assert_eq!(got, (value as f32).to_bits(), "{value}");
        let down = f32::from_bits(cvt_from_int(value, F32, Cvt::new(Round::Down)));
        let up = f32::from_bits(cvt_from_int(value, F32, Cvt::new(Round::Up)));
        assert!(down as i128 <= value && value <= up as i128);
        assert!(down == up || down.next_up() == up);
    }
    assert_eq!(cvt_from_int(i128::from(u64::MAX), F32, Cvt::new(Round::Nearest)), (u64::MAX as f32).to_bits());
    assert_eq!(cvt_from_int(i128::from(u64::MAX), F32, Cvt::new(Round::Zero)), 0x5f7f_ffff);
    assert_eq!(cvt_from_int(65520, F16, Cvt::new(Round::Nearest)), 0x7c00);
    assert_eq!(cvt_from_int(0, F16, Cvt::new(Round::Nearest)), 0);
}

#[test]
fn between_integers() {
    assert_eq!(cvt_int(-1, 8, false, false), 0xff);
    assert_eq!(cvt_int(-1, 8, false, true), 0);
    assert_eq!(cvt_int(300, 8, true, true), 127);
    assert_eq!(cvt_int(i128::from(u64::MAX), 64, true, true), i64::MAX as u64);
    assert_eq!(cvt_int(i128::from(u64::MAX), 64, false, false), u64::MAX);
}

#[test]
fn integral_rounding_keeps_the_sign_of_zero() {
    let bits = |x: f32| x.to_bits();
    assert_eq!(cvt_integral(F32, bits(-0.3), Cvt::new(Round::Nearest)), bits(-0.0));
    assert_eq!(cvt_integral(F32, bits(2.5), Cvt::new(Round::Nearest)), bits(2.0));
    assert_eq!(cvt_integral(F32, bits(-2.5), Cvt::new(Round::Down)), bits(-3.0));
    assert_eq!(cvt_integral(F32, bits(1e20), Cvt::new(Round::Zero)), bits(1e20));
}

#[test]
fn f32_arithmetic_is_ieee_in_every_mode() {
    let mut state = 3u64;
    for i in 0..300_000 {
        // exponents near each other, so that sums cancel and round
        let mut next = || {
            let r = rng(&mut state) as u32;
            if i % 3 == 0 { r } else { r & 0x83ff_ffff | 0x3c00_0000 }
        };
        let (a, b, c) = (next(), next(), next());
        let (x, y, z) = (f32::from_bits(a), f32::from_bits(b), f32::from_bits(c));
        assert_eq!(add(F32, a, b, RN), canonical_f32(x + y));
        assert_eq!(sub(F32, a, b, RN), canonical_f32(x - y));
        assert_eq!(mul(F32, a, b, RN), canonical_f32(x * y));
        assert_eq!(fma(F32, a, b, c, RN), canonical_f32(x.mul_add(y, z)), "{a:#x} {b:#x} {c:#x}");
        assert_eq!(div(a, b, RN), canonical_f32(x / y));
        assert_eq!(sqrt(a, RN), canonical_f32(x.sqrt()));
        for op in 0..4 {
            let run = |round| {
                let mods = Mods { round, ..RN };
                f32::from_bits(match op {
                    0 => add(F32, a, b, mods),
                    1 => fma(F32, a, b, c, mods),
                    2 => div(a, b, mods),
                    _ => sqrt(a, mods),
                })
            };
            let (down, up, zero, near) = (run(Round::Down), run(Round::Up), run(Round::Zero), run(Round::Nearest));
            if near.is_nan() {
                assert!(down.is_nan() && up.is_nan() && zero.is_nan());
                continue;
            }
            assert!(down == up || down.next_up() == up, "{op} {x:e} {y:e} {z:e}: {down:e} {up:e}");
            assert!(near == down || near == up);
            assert_eq!(zero, if down < 0.0 { up } else { down });
        }
    }
}

#[test]
fn directed_rounding_and_zero_signs() {
    let one = 1.0f32.to_bits();
    let down = Mods { round: Round::Down, ..RN };
    assert_eq!(sub(F32, one, one, RN), 0);
    assert_eq!(sub(F32, one, one, down), 0x8000_0000);
    assert_eq!(add(F32, 0, 0, down), 0);
    assert_eq!(add(F32, 0x8000_0000, 0x8000_0000, RN), 0x8000_0000);
    // 1/3 is below its nearest f32
    let third = |round| div(one, 3.0f32.to_bits(), Mods { round, ..RN });
    assert_eq!((third(Round::Nearest), third(Round::Down), third(Round::Up)), (0x3eaa_aaab, 0x3eaa_aaaa, 0x3eaa_aaab));
    assert_eq!(rcp(0x8000_0000, RN), 0xff80_0000);
    assert_eq!(sqrt((-1.0f32).to_bits(), RN), 0x7fff_ffff);
    assert_eq!(sqrt(0x8000_0000, RN), 0x8000_0000);
    let ftz = Mods { ftz: true, ..RN };
    assert_eq!(add(F32, 0x0000_0001, 0x8000_0002, ftz), 0);
    assert_eq!(mul(F32, 0x0080_0000, 0xbf00_0000, ftz), 0x8000_0000);
    let sat = Mods { sat: true, ..RN };
    assert_eq!(add(F32, one, one, sat), one);
    assert_eq!(add(F32, 0x7f80_0000, 0xff80_0000, sat), 0);
}

#[test]
fn half_arithmetic_rounds_once() {
    // checked against exact rational arithmetic in i128: every f16 is a multiple of 2^-24, every product one of 2^-48
    let exact = |h: u32| (F16.decode(h) * 2f64.powi(24)) as i128;
    let values = finite_values(F16);
    let mut state = 11u64;
    for _ in 0..40_000 {
        let (a, b, c) =
            (rng(&mut state) as u32 & 0xffff, rng(&mut state) as u32 & 0xffff, rng(&mut state) as u32 & 0xffff);
        if [a, b, c].iter().any(|&x| x & 0x7c00 == 0x7c00) {
            continue;
        }
        let sum = exact(a) * exact(b) + (exact(c) << 24); // in units of 2^-48, at most 81 bits
        // order the exact sum against the finite f16 values, scaled alike
        let scaled = |v: &(f64, u32)| (v.0 * 2f64.powi(24)) as i128 * (1 << 24);
        let at = values.partition_point(|v| scaled(v) < sum);
        if at == 0 || at == values.len() {
            continue;
        }
        let want = if scaled(&values[at]) == sum {
            values[at].1
        } else {
            let (low, high) = (&values[at - 1], &values[at]);
            let (to_low, to_high) = (sum - scaled(low), scaled(high) - sum);
            if to_high < to_low || (to_high == to_low && high.1 & 1 == 0) { high.1 } else { low.1 }
        };
        let got = fma(F16, a, b, c, RN);
        assert_eq!(if got == 0x8000 { 0 } else { got }, want, "{a:#x} {b:#x} {c:#x}");
    }
    // a case where rounding to f32 first gives another answer: 1 + (2^-11 + 2^-36)
    let bf = |x: f64| BF16.encode(x, Round::Nearest, false);
    let got = fma(BF16, bf(1.0), bf(1.0), bf(2f64.powi(-30)), RN);
    assert_eq!(got, 0x3f80);
    let tie_plus = fma(BF16, bf(1.0 + 2f64.powi(-7)), bf(1.0 + 2f64.powi(-1)), bf(2f64.powi(-60)), RN);
    assert_eq!(tie_plus, BF16.encode(1.5 + 1.5 * 2f64.powi(-7) + 2f64.powi(-50), Round::Nearest, false));
    let relu = Mods { relu: true, ..RN };
    assert_eq!(fma(F16, 0x3c00, 0xbc00, 0, relu), 0);
    assert_eq!(fma(F16, 0x7c00, 0, 0, relu), 0x7fff);
    assert_eq!(add(F16, 0x7bff, 0x7bff, RN), 0x7c00);
    assert_eq!(mul(F16, 0x0001, 0x3c00, Mods { ftz: true, ..RN }), 0);
    assert_eq!(mul(BF16, 0x0001, 0x3f80, RN), 0x0001);
}

#[test]
fn min_and_max() {
    // PTX ISA 9.7.3.11, 9.7.3.12
    let (nan, one, two) = (0x7fc0_0000, 1.0f32.to_bits(), 2.0f32.to_bits());
    assert_eq!(min_max(F32, one, two, false, false, false), one);
    assert_eq!(min_max(F32, one, two, true, false, false), two);
    assert_eq!(min_max(F32, nan, two, true, false, false), two);
    assert_eq!(min_max(F32, nan, two, true, true, false), 0x7fff_ffff);
    assert_eq!(min_max(F32, nan, nan, true, false, false), 0x7fff_ffff);
    assert_eq!(min_max(F32, 0, 0x8000_0000, true, false, false), 0);
    assert_eq!(min_max(F32, 0, 0x8000_0000, false, false, false), 0x8000_0000);
    assert_eq!(min_max(F32, 0x8000_0000, 0, true, false, false), 0);
    assert_eq!(min_max(F32, 1, 0x8000_0001, true, false, true), 0);
    assert_eq!(min_max(F16, 0xfc00, 0x7e00, true, false, false), 0xfc00);
    assert_eq!(min_max(BF16, 0xbf80, 0xc000, true, false, false), 0xbf80);
}
