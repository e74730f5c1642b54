//! Who holds which element: the register fragments of matrix instructions.
//!
//! With `lane = 4 g + t`, every fragment of `mma.sync` and `wgmma` (accumulators, and A in registers) has the same shape: the elements of one
//! register lie in one row, `g` picks the row inside a group of 8, `t` a run of neighbouring columns, and the register number shifts the
//! group and the run. So a fragment is a base per register and two strides, and gathering is two short loops.
//!
//! Sources: PTX ISA 9.7.14.5.7 to 9.7.14.5.11 (mma), 9.7.15.5.1 (wgmma), 9.7.14.5.15 to 9.7.14.5.17 (ldmatrix, stmatrix, movmatrix). Of a
//! warpgroup, warp `w` holds rows `16 w ..` of the 64; the functions below speak of the 16 rows of one warp.

/// Lanes of a warp.
pub const LANES: usize = 32;

/// A register as the interpreter stores it.
pub trait Reg: Copy {
    /// The low 32 bits.
    fn low(self) -> u32;
    /// A register that holds `bits`.
    fn from_low(bits: u32) -> Self;
}

impl Reg for u32 {
    #[inline(always)]
    fn low(self) -> u32 {
        self
    }
    #[inline(always)]
    fn from_low(bits: u32) -> u32 {
        bits
    }
}

impl Reg for u64 {
    #[inline(always)]
    fn low(self) -> u32 {
        self as u32
    }
    #[inline(always)]
    fn from_low(bits: u32) -> u64 {
        u64::from(bits)
    }
}

/// Which matrix a fragment is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Matrix {
    /// A, `[16, k]`.
    A,
    /// B as its transpose `[8, k]`, so that both operands are contiguous in k.
    B,
    /// C or D, `[16, n]`.
    C,
}

/// One warp's fragment of a matrix, 16 (for B: 8) rows of `cols` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// The matrix.
    pub matrix: Matrix,
    /// Bits of an element: 8, 16 or 32 for A and B, 16 or 32 for C.
    pub bits: u32,
    /// k for A and B, n for C.
    pub cols: usize,
}

impl Fragment {
    /// Fragment of A with `k` columns of `bits`-bit elements.
    pub const fn a(bits: u32, k: usize) -> Self {
        Fragment { matrix: Matrix::A, bits, cols: k }
    }
    /// Fragment of B.
    pub const fn b(bits: u32, k: usize) -> Self {
        Fragment { matrix: Matrix::B, bits, cols: k }
    }
    /// Fragment of C or D.
    pub const fn c(bits: u32, n: usize) -> Self {
        Fragment { matrix: Matrix::C, bits, cols: n }
    }
    /// Rows of the dense matrix.
    pub const fn rows(self) -> usize {
        if matches!(self.matrix, Matrix::B) { 8 } else { 16 }
    }
    /// Elements in one 32-bit register.
    pub const fn parts(self) -> usize {
        32 / self.bits as usize
    }
    /// Registers per lane.
    pub const fn regs(self) -> usize {
        self.rows() * self.cols / (LANES * self.parts())
    }
    /// Elements of the dense matrix.
    pub const fn len(self) -> usize {
        self.rows() * self.cols
    }
    /// Whether the matrix has no element.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Row and first column of register `reg` for `g = t = 0`, and the columns from one `t` to the next.
    const fn base(self, reg: usize) -> (usize, usize, usize) {
        let parts = self.parts();
        match self.matrix {
            Matrix::A => (8 * (reg % 2), 4 * parts * (reg / 2), parts),
            Matrix::B => (0, 4 * parts * reg, parts),
            Matrix::C if parts == 1 => (8 * (reg / 2 % 2), 8 * (reg / 4) + reg % 2, 2),
            Matrix::C => (8 * (reg % 2), 8 * (reg / 2), 2),
        }
    }

    /// `(row, column)` of element `part` (0 = lowest bits) of register `reg` of `lane`.
    pub const fn position(self, lane: usize, reg: usize, part: usize) -> (usize, usize) {
        let (row, col, step) = self.base(reg);
        (row + lane / 4, col + lane % 4 * step + part)
    }

    /// Collects the dense matrix, row-major, from registers; `reg(i)` is the i-th register of the operand.
    #[inline]
    pub fn gather<'a, R: Reg + 'a>(self, reg: impl Fn(usize) -> &'a [R; LANES], out: &mut [u32]) {
        assert_eq!(out.len(), self.len());
        let parts = self.parts();
        let mask = (u64::MAX >> (64 - self.bits)) as u32;
        for r in 0..self.regs() {
            let lanes = reg(r);
            let (row, col, step) = self.base(r);
            for g in 0..8 {
                let line = &mut out[(row + g) * self.cols..(row + g + 1) * self.cols];
                for t in 0..4 {
                    let value = lanes[4 * g + t].low();
                    for part in 0..parts {
                        line[col + t * step + part] = value.wrapping_shr(part as u32 * self.bits) & mask;
                    }
                }
            }
        }
    }

    /// Spreads a dense matrix over registers: the inverse of [`gather`](Self::gather).
    #[inline]
    pub fn scatter<R: Reg>(self, dense: &[u32], mut store: impl FnMut(usize, [R; LANES])) {
        assert_eq!(dense.len(), self.len());
        let parts = self.parts();
        for r in 0..self.regs() {
            let (row, col, step) = self.base(r);
            let mut lanes = [R::from_low(0); LANES];
            for g in 0..8 {
                let line = &dense[(row + g) * self.cols..(row + g + 1) * self.cols];
                for t in 0..4 {
                    let mut value = 0;
                    for part in 0..parts {
                        value |= line[col + t * step + part].wrapping_shl(part as u32 * self.bits);
                    }
                    lanes[4 * g + t] = R::from_low(value);
                }
            }
            store(r, lanes);
        }
    }
}

/// The eight 16-byte rows of an 8 x 8 matrix of 16-bit elements.
pub type Rows = [[u8; 16]; 8];

#[inline]
fn element(rows: &Rows, row: usize, col: usize) -> u32 {
    u32::from(u16::from_le_bytes([rows[row][2 * col], rows[row][2 * col + 1]]))
}

/// The register that `ldmatrix` fills from one 8 x 8 matrix: lane `4g + t` gets row g, columns 2t and 2t + 1; with `trans` rows 2t and 2t + 1
/// of column g. Row r of matrix i is at the address of lane `8 i + r`.
pub fn load_matrix(rows: &Rows, trans: bool) -> [u32; LANES] {
    std::array::from_fn(|lane| {
        let (g, t) = (lane / 4, lane % 4);
        if trans {
            element(rows, 2 * t, g) | element(rows, 2 * t + 1, g) << 16
        } else {
            element(rows, g, 2 * t) | element(rows, g, 2 * t + 1) << 16
        }
    })
}

/// The rows that `stmatrix` writes from one register: the inverse of [`load_matrix`].
pub fn store_matrix(reg: &[u32; LANES], trans: bool) -> Rows {
    let mut rows = [[0; 16]; 8];
    for (lane, &value) in reg.iter().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for part in 0..2 {
            let (row, col) = if trans { (2 * t + part, g) } else { (g, 2 * t + part) };
            let half = ((value >> (16 * part)) as u16).to_le_bytes();
            rows[row][2 * col..2 * col + 2].copy_from_slice(&half);
        }
    }
    rows
}

/// `movmatrix.sync.aligned.m8n8.trans.b16`: the 8 x 8 matrix in one register, transposed.
pub fn transpose_matrix(reg: &[u32; LANES]) -> [u32; LANES] {
    load_matrix(&store_matrix(reg, false), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(row, col)` of one element, from the formulas of the ISA, which speak of `groupID = lane >> 2`, `threadID_in_group = lane % 4` and the
    /// element index i within the fragment vector (`a0 .. a7`, `b0 ..`, `c0 ..`).
    fn isa(matrix: Matrix, bits: u32, k: usize, lane: usize, i: usize) -> (usize, usize) {
        let (group, t) = (lane >> 2, lane % 4);
        match (matrix, bits, k) {
            // 9.7.14.5.8, mma.m16n8k16 with 16-bit types: a_i with i in 0..8
            (Matrix::A, 16, 16) => {
                let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
                (row, t * 2 + (i & 1) + if i < 4 { 0 } else { 8 })
            }
            (Matrix::B, 16, 16) => (group, t * 2 + (i & 1) + if i < 2 { 0 } else { 8 }),
            // 9.7.14.5.7, mma.m16n8k8 with 16-bit types
            (Matrix::A, 16, 8) => (if i < 2 { group } else { group + 8 }, t * 2 + (i & 1)),
            (Matrix::B, 16, 8) => (group, t * 2 + (i & 1)),
            // mma.m16n8k8 with .tf32
            (Matrix::A, 32, 8) => (if i == 0 || i == 2 { group } else { group + 8 }, if i < 2 { t } else { t + 4 }),
            (Matrix::B, 32, 8) => (group, if i == 0 { t } else { t + 4 }),
            // mma.m16n8k4 with .tf32
            (Matrix::A, 32, 4) => (if i == 0 { group } else { group + 8 }, t),
            (Matrix::B, 32, 4) => (group, t),
            // 9.7.14.5.10, mma.m16n8k32 with 8-bit types: a_i with i in 0..16
            (Matrix::A, 8, 32) => {
                let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
                (row, t * 4 + (i & 3) + if i < 8 { 0 } else { 16 })
            }
            (Matrix::B, 8, 32) => (group, t * 4 + (i & 3) + if i < 4 { 0 } else { 16 }),
            // 9.7.14.5.9, mma.m16n8k16 with 8-bit types
            (Matrix::A, 8, 16) => (if i < 4 { group } else { group + 8 }, t * 4 + (i & 3)),
            (Matrix::B, 8, 16) => (group, t * 4 + (i & 3)),
            // accumulators of all m16n8 shapes: c_i with i in 0..4; wgmma 9.7.15.5.1: d_i repeats every 8 columns
            (Matrix::C, _, _) => (if i % 4 < 2 { group } else { group + 8 }, i / 4 * 8 + t * 2 + (i & 1)),
            _ => unreachable!(),
        }
    }

    fn all() -> Vec<Fragment> {
        let mut all = Vec::new();
        for (bits, k) in [(16, 16), (16, 8), (32, 8), (32, 4), (8, 32), (8, 16)] {
            all.extend([Fragment::a(bits, k), Fragment::b(bits, k)]);
        }
        for n in (8..=256).step_by(8) {
            all.extend([Fragment::c(32, n), Fragment::c(16, n)]);
        }
        all
    }

    #[test]
    fn positions_are_those_of_the_isa() {
        for fragment in all() {
            for lane in 0..LANES {
                for reg in 0..fragment.regs() {
                    for part in 0..fragment.parts() {
                        let i = reg * fragment.parts() + part;
                        let want = isa(fragment.matrix, fragment.bits, fragment.cols, lane, i);
                        assert_eq!(fragment.position(lane, reg, part), want, "{fragment:?} lane {lane} element {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn register_counts_are_those_of_the_isa() {
        assert_eq!((Fragment::a(16, 16).regs(), Fragment::b(16, 16).regs()), (4, 2));
        assert_eq!((Fragment::a(16, 8).regs(), Fragment::b(16, 8).regs()), (2, 1));
        assert_eq!((Fragment::a(32, 8).regs(), Fragment::b(32, 8).regs()), (4, 2));
        assert_eq!((Fragment::a(32, 4).regs(), Fragment::b(32, 4).regs()), (2, 1));
        assert_eq!((Fragment::a(8, 32).regs(), Fragment::b(8, 32).regs()), (4, 2));
        assert_eq!((Fragment::a(8, 16).regs(), Fragment::b(8, 16).regs()), (2, 1));
        assert_eq!((Fragment::c(32, 8).regs(), Fragment::c(16, 8).regs()), (4, 2));
        assert_eq!((Fragment::c(32, 256).regs(), Fragment::c(16, 256).regs()), (128, 64));
    }

    #[test]
    fn every_element_has_one_owner_and_gather_inverts_scatter() {
        for fragment in all() {
            let mut seen = vec![0; fragment.len()];
            for lane in 0..LANES {
                for reg in 0..fragment.regs() {
                    for part in 0..fragment.parts() {
                        let (row, col) = fragment.position(lane, reg, part);
                        seen[row * fragment.cols + col] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{fragment:?}");

            let mask = (u64::MAX >> (64 - fragment.bits)) as u32;
            let dense: Vec<u32> = (0..fragment.len() as u32).map(|i| i.wrapping_mul(2654435761) & mask).collect();
            let mut regs = vec![[0u64; LANES]; fragment.regs()];
            fragment.scatter(&dense, |r, lanes| regs[r] = lanes);
            for lane in 0..LANES {
                for reg in 0..fragment.regs() {
                    for part in 0..fragment.parts() {
                        let (row, col) = fragment.position(lane, reg, part);
                        let got = regs[reg][lane] as u32 >> (part as u32 * (fragment.bits % 32)) & mask;
                        assert_eq!(got, dense[row * fragment.cols + col]);
                    }
                }
            }
            let mut back = vec![0; fragment.len()];
            fragment.gather(|r| &regs[r], &mut back);
            assert_eq!(back, dense);
        }
    }

    #[test]
    fn two_score_blocks_are_the_next_a_fragment() {
        // packing neighbouring C blocks pairwise gives the A fragment of k16 (flash attention's P)
        let (a, c) = (Fragment::a(16, 16), Fragment::c(16, 16));
        for lane in 0..LANES {
            for reg in 0..4 {
                for part in 0..2 {
                    assert_eq!(a.position(lane, reg, part), c.position(lane, reg, part));
                }
            }
        }
    }

    fn numbered() -> Rows {
        std::array::from_fn(|row| {
            let mut bytes = [0; 16];
            for col in 0..8 {
                bytes[2 * col..2 * col + 2].copy_from_slice(&((row * 8 + col) as u16).to_le_bytes());
            }
            bytes
        })
    }

    #[test]
    fn matrix_loads_and_stores() {
        // 9.7.14.5.15: thread 0 holds row 0 columns 0, 1; thread 5 row 1 columns 2, 3; thread 31 row 7 columns 6, 7
        let plain = load_matrix(&numbered(), false);
        assert_eq!((plain[0], plain[5], plain[31]), (1 << 16, 10 | (11 << 16), 62 | 63 << 16));
        let trans = load_matrix(&numbered(), true);
        assert_eq!((trans[0], trans[5], trans[31]), (8 << 16, 17 | 25 << 16, 55 | 63 << 16));
        for t in [false, true] {
            assert_eq!(store_matrix(&load_matrix(&numbered(), t), t), numbered());
        }
        assert_eq!(transpose_matrix(&plain), trans);
        assert_eq!(transpose_matrix(&trans), plain);
    }
}
