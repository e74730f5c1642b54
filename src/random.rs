//! Random numbers that are the same on every backend: Philox4x32-10, a function of (seed, token, draw).

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 10 rounds over a 128-bit counter.
pub const fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    let mut c = counter;
    let mut round = 0;
    while round < 10 {
        let p0 = 0xD251_1F53u64 * c[0] as u64;
        let p1 = 0xCD9E_8D57u64 * c[2] as u64;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
        round += 1;
    }
    c
}

/// A number in `[0, 1)` with 24 random bits: the first word of Philox with key `seed` and counter `(token, draw)`, both low
/// word first.
pub const fn uniform(seed: u64, token: u64, draw: u64) -> f32 {
    let key = [seed as u32, (seed >> 32) as u32];
    let counter = [token as u32, (token >> 32) as u32, draw as u32, (draw >> 32) as u32];
    (philox4x32(key, counter)[0] >> 8) as f32 / (1u32 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the generator (Random123, `kat_vectors`).
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0, 0], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0, !0], [!0; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_below_one_and_differs() {
        let mut sum = 0.0;
        for token in 0..1000 {
            let u = uniform(7, token, 3);
            assert!((0.0..1.0).contains(&u));
            sum += f64::from(u);
        }
        assert!((sum / 1000.0 - 0.5).abs() < 0.03);
        assert_ne!(uniform(7, 1, 0), uniform(7, 0, 1));
        assert_ne!(uniform(7, 1, 0), uniform(8, 1, 0));
    }
}
