//! The micro-kernel: a tile of tokens times a chunk of one panel, in registers.

use super::PANEL;
use super::product::Product;
use crate::cpu::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// What to ask for while a tile is computed: in each step the line at the next address.
#[derive(Clone, Copy)]
pub struct Ahead {
    pub at: *const u8,
    /// Bytes from one step to the next.
    pub stride: usize,
}

/// `c[rows][PANEL] (+)= a[words][rows] * w[k][PANEL]`, where `+=` unless `first`. `a` and `w` hold the same number of steps.
pub fn tile<S: Simd, P: Product>(
    simd: S,
    rows: usize,
    a: &[P::A],
    w: &[P::W],
    c: &mut [f32],
    first: bool,
    ahead: Ahead,
) {
    match rows {
        1 => simd.run(Tile::<P, 1> { a, w, c, first, ahead, product: PhantomData }),
        2 => simd.run(Tile::<P, 2> { a, w, c, first, ahead, product: PhantomData }),
        3 => simd.run(Tile::<P, 3> { a, w, c, first, ahead, product: PhantomData }),
        4 => simd.run(Tile::<P, 4> { a, w, c, first, ahead, product: PhantomData }),
        6 if S::TILE_TOKENS >= 6 => simd.run(Tile::<P, 6> { a, w, c, first, ahead, product: PhantomData }),
        8 if S::TILE_TOKENS >= 8 => simd.run(Tile::<P, 8> { a, w, c, first, ahead, product: PhantomData }),
        10 if S::TILE_TOKENS >= 10 => simd.run(Tile::<P, 10> { a, w, c, first, ahead, product: PhantomData }),
        12 if S::TILE_TOKENS >= 12 => simd.run(Tile::<P, 12> { a, w, c, first, ahead, product: PhantomData }),
        _ => unreachable!("no tile of {rows} rows"),
    }
}

struct Tile<'a, P: Product, const M: usize> {
    a: &'a [P::A],
    w: &'a [P::W],
    c: &'a mut [f32],
    first: bool,
    ahead: Ahead,
    product: PhantomData<P>,
}

impl<P: Product, const M: usize> Kernel for Tile<'_, P, M> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let steps = self.w.len() / P::STEP_WEIGHTS;
        assert!(self.a.len() >= steps * P::A_WORDS * M, "activations of a tile");
        let c = &mut self.c[..M * PANEL];
        // Two vectors of outputs at a time: a whole panel with 16 lanes, half of one with 8.
        for output in (0..PANEL).step_by(2 * S::LANES) {
            let mut acc = [[simd.zero(); 2]; M];
            if !self.first {
                for i in 0..M {
                    acc[i][0] = simd.load(&c[i * PANEL + output..]);
                    acc[i][1] = simd.load(&c[i * PANEL + output + S::LANES..]);
                }
            }
            for step in 0..steps {
                // SAFETY: `w` holds `steps` steps by the division above, and `a` by the assertion.
                let (a, w) = unsafe {
                    let a = self.a.as_ptr().add(step * P::A_WORDS * M);
                    let w = self.w.as_ptr().add(step * P::STEP_WEIGHTS);
                    (std::slice::from_raw_parts(a, P::A_WORDS * M), std::slice::from_raw_parts(w, P::STEP_WEIGHTS))
                };
                if output == 0 {
                    simd.prefetch_l2(self.ahead.at.wrapping_add(step * self.ahead.stride));
                }
                P::step::<S, M>(simd, &mut acc, a, w, output);
            }
            for i in 0..M {
                simd.store(&mut c[i * PANEL + output..], acc[i][0]);
                simd.store(&mut c[i * PANEL + output + S::LANES..], acc[i][1]);
            }
        }
    }
}
