//! Seeded numbers.

use gatefold::Element;

/// SplitMix64: small, fast, good enough for test data (Steele et al. 2014).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `0 .. n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// In `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Normal numbers with this standard deviation.
    pub fn normals<T: Element>(&mut self, len: usize, deviation: f64) -> Vec<T> {
        (0..len).map(|_| T::from_f64(deviation * self.normal())).collect()
    }

    /// About one in eight numbers becomes one that arithmetic likes to get wrong: zeros of both signs, the least and other subnormals of
    /// the type, tiny and large ones. None is so large that a sum of a thousand products overflows f32.
    pub fn sprinkle<T: Element>(&mut self, data: &mut [T]) {
        for x in data {
            if self.chance(0.125) {
                let least = match T::DTYPE {
                    gatefold::Dtype::F16 => 6e-8,
                    _ => 1.5e-45,
                };
                let value =
                    *self.pick(&[0.0, -0.0, least, -least, 3.0 * least, 1e-7, -1e-4, 1.0, -1.0, 300.0, -1000.0]);
                *x = T::from_f64(value);
            }
        }
    }

    /// A permutation of `0 .. n`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
