//! Where bytes lie in shared memory: swizzles and the matrix descriptors of `wgmma`.
//!
//! A swizzle of W bytes permutes 16-byte chunks: address bits 4.. are XORed with address bits 7.. (three of them for W = 128, two for 64, one
//! for 32). It applies to the absolute shared address, for tensor copies and for `wgmma` alike, so both see the same bytes as long as
//! they agree on W (PTX ISA 5.5.7, 9.7.15.5.1).
//!
//! A descriptor places logical elements: r is the row of A (or column of B), k the position along the summed dimension.

/// Permutation of 16-byte chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// No permutation.
    #[default]
    None,
    /// Chunks within 32 bytes.
    B32,
    /// Chunks within 64 bytes.
    B64,
    /// Chunks within 128 bytes.
    B128,
}

impl Swizzle {
    /// All modes.
    pub const ALL: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

    /// Bytes of a row that the permutation stays within; 16 without one.
    pub const fn width(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }
    /// Bytes after which the pattern repeats; a tile that starts at a multiple needs no base offset.
    pub const fn period(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 256,
            Swizzle::B64 => 512,
            Swizzle::B128 => 1024,
        }
    }
    const fn mask(self) -> u32 {
        match self {
            Swizzle::None => 0,
            Swizzle::B32 => 1,
            Swizzle::B64 => 3,
            Swizzle::B128 => 7,
        }
    }
    /// The physical address of the byte with logical (unswizzled) address `address`. An involution.
    #[inline(always)]
    pub const fn apply(self, address: u32) -> u32 {
        address ^ ((address >> 7 & self.mask()) << 4)
    }
    /// The same for a pattern that starts `base_offset` rows of 128 bytes off a multiple of its period.
    #[inline(always)]
    pub const fn apply_from(self, address: u32, base_offset: u32) -> u32 {
        address ^ (((address >> 7).wrapping_sub(base_offset) & self.mask()) << 4)
    }
}

/// Which dimension of an operand is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Major {
    /// Contiguous along k (`imm-trans` 0).
    K,
    /// Contiguous along the rows of A or the columns of B (`imm-trans` 1; 16-bit types only).
    Mn,
}

/// A decoded `wgmma` matrix descriptor; offsets in bytes (PTX ISA 9.7.15.5.1.2, "Matrix Descriptor Format").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Start address in shared memory.
    pub start: u32,
    /// Leading-dimension byte offset.
    pub leading: u32,
    /// Stride-dimension byte offset.
    pub stride: u32,
    /// Base offset, 0 to 7.
    pub base_offset: u32,
    /// Swizzle mode.
    pub swizzle: Swizzle,
}

impl Descriptor {
    /// Decodes bits 0-13 start, 16-29 leading, 32-45 stride (each in units of 16 bytes), 49-51 base offset, 62-63 swizzle. `None` if a
    /// reserved bit is set.
    pub const fn decode(bits: u64) -> Option<Self> {
        const USED: u64 = 0x3fff | 0x3fff << 16 | 0x3fff << 32 | 7 << 49 | 3 << 62;
        if bits & !USED != 0 {
            return None;
        }
        Some(Descriptor {
            start: (bits & 0x3fff) as u32 * 16,
            leading: (bits >> 16 & 0x3fff) as u32 * 16,
            stride: (bits >> 32 & 0x3fff) as u32 * 16,
            base_offset: (bits >> 49 & 7) as u32,
            swizzle: match bits >> 62 {
                0 => Swizzle::None,
                1 => Swizzle::B128,
                2 => Swizzle::B64,
                _ => Swizzle::B32,
            },
        })
    }

    /// The inverse of [`decode`](Self::decode): `matrix-descriptor-encode(x) = (x & 0x3FFFF) >> 4`.
    pub const fn encode(self) -> u64 {
        const fn field(x: u32) -> u64 {
            ((x & 0x3ffff) >> 4) as u64
        }
        let mode = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B128 => 1,
            Swizzle::B64 => 2,
            Swizzle::B32 => 3,
        };
        field(self.start)
            | field(self.leading) << 16
            | field(self.stride) << 32
            | (self.base_offset as u64) << 49
            | mode << 62
    }

    /// Physical address of the 16-byte chunk with row `r` and byte `k_bytes` along k (a multiple of 16), of a K-major operand.
    #[inline(always)]
    pub const fn chunk_k_major(self, r: u32, k_bytes: u32) -> u32 {
        let width = self.swizzle.width();
        let within = if matches!(self.swizzle, Swizzle::None) { k_bytes / 16 * self.leading } else { k_bytes };
        self.physical((r % 8) * width + r / 8 * self.stride + within)
    }

    /// Physical address of the 16-byte chunk with rows `r .. r + 8` (`r` a multiple of 8) of one `k`, of an MN-major operand of 16-bit elements.
    #[inline(always)]
    pub const fn chunk_mn_major(self, r: u32, k: u32) -> u32 {
        let width = self.swizzle.width();
        let span = width / 2; // rows of 16-bit elements side by side
        let (far_r, far_k) = if matches!(self.swizzle, Swizzle::None) {
            (self.stride, self.leading)
        } else {
            (self.leading, self.stride)
        };
        self.physical(r % span * 2 + r / span * far_r + k % 8 * width + k / 8 * far_k)
    }

    #[inline(always)]
    const fn physical(self, offset: u32) -> u32 {
        // 18 address bits: what the descriptor can express
        self.swizzle.apply_from((self.start + offset) & 0x3ffff, self.base_offset)
    }

    /// Reads the operand as a dense `[rows, k]` matrix of raw elements, k contiguous: the form that the tile model takes. One instruction
    /// always spans 32 bytes of k, so `k = 32 / element_bytes`. `read` returns the 16 bytes at a physical address.
    ///
    /// # Panics
    /// For an MN-major operand whose elements are not 16-bit, which the ISA does not have.
    #[inline]
    pub fn gather(
        self,
        major: Major,
        rows: usize,
        element_bytes: usize,
        mut read: impl FnMut(u32) -> [u8; 16],
        out: &mut [u32],
    ) {
        let k = 32 / element_bytes;
        assert_eq!(out.len(), rows * k);
        match major {
            Major::K => {
                for (r, line) in out.chunks_exact_mut(k).enumerate() {
                    for (half, elements) in line.chunks_exact_mut(k / 2).enumerate() {
                        let chunk = read(self.chunk_k_major(r as u32, 16 * half as u32));
                        for (element, bytes) in elements.iter_mut().zip(chunk.chunks_exact(element_bytes)) {
                            *element = bytes.iter().rev().fold(0, |x, &byte| x << 8 | u32::from(byte));
                        }
                    }
                }
            }
            Major::Mn => {
                assert_eq!(element_bytes, 2, "MN-major operands are 16-bit");
                for r in (0..rows).step_by(8) {
                    for col in 0..k {
                        let chunk = read(self.chunk_mn_major(r as u32, col as u32));
                        for (i, bytes) in chunk.chunks_exact(2).enumerate() {
                            out[(r + i) * k + col] = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swizzles_are_the_tables_of_the_isa() {
        // 5.5.7: with 128-byte rows of chunks 0..8, row j shows chunk i at position i ^ (j % 8) for 128B,
        // i ^ (j / 2 % 4) within 64-byte rows for 64B, i ^ (j / 4 % 2) within 32-byte rows for 32B
        for swizzle in Swizzle::ALL {
            let width = swizzle.width();
            for row in 0..64 {
                for chunk in 0..width / 16 {
                    let flip = match swizzle {
                        Swizzle::None => 0,
                        Swizzle::B32 => row / 4 % 2,
                        Swizzle::B64 => row / 2 % 4,
                        Swizzle::B128 => row % 8,
                    };
                    let logical = row * width + chunk * 16;
                    assert_eq!(swizzle.apply(logical), row * width + (chunk ^ flip) * 16, "{swizzle:?} {row} {chunk}");
                }
            }
            for address in 0..4096 {
                assert_eq!(swizzle.apply(swizzle.apply(address)), address);
                assert_eq!(swizzle.apply(address) & 15, address & 15);
                assert_eq!(swizzle.apply(address + swizzle.period()), swizzle.apply(address) + swizzle.period());
            }
        }
    }

    #[test]
    fn descriptors_round_trip() {
        for swizzle in Swizzle::ALL {
            for (start, leading, stride, base_offset) in
                [(0, 16, 1024, 0), (0x3fff0, 0x3fff0, 0x3fff0, 7), (0x1240, 128, 256, 3)]
            {
                let descriptor = Descriptor { start, leading, stride, base_offset, swizzle };
                assert_eq!(Descriptor::decode(descriptor.encode()), Some(descriptor));
            }
        }
        // 128B swizzle at 0x400, LBO 16, SBO 1024: mode 1 in bits 62-63
        assert_eq!(
            Descriptor { start: 0x400, leading: 16, stride: 1024, base_offset: 0, swizzle: Swizzle::B128 }.encode(),
            1 << 62 | 64 << 32 | 1 << 16 | 0x40
        );
        for reserved in [14, 15, 30, 31, 46, 48, 52, 61] {
            assert_eq!(Descriptor::decode(1 << reserved), None, "bit {reserved}");
        }
    }

    #[test]
    fn k_major_canonical_layouts() {
        // 9.7.15.5.1, canonical K-major layouts in units of 128 bits (T elements):
        //   none  ((8, m), (T, 2k)) : ((1T, SBO), (1, LBO))
        //   W     ((8, m), (T, 2k)) : ((W/16 T, SBO), (1, T))
        for swizzle in Swizzle::ALL {
            let d = Descriptor { start: 4096, leading: 2048, stride: 512 * 3, base_offset: 0, swizzle };
            for r in 0..64 {
                for chunk in 0..2 {
                    let inner = if swizzle == Swizzle::None { chunk * 2048 } else { chunk * 16 };
                    let logical = 4096 + (r % 8) * swizzle.width() + r / 8 * 1536 + inner;
                    assert_eq!(d.chunk_k_major(r, chunk * 16), swizzle.apply(logical));
                }
            }
        }
    }

    #[test]
    fn mn_major_canonical_layouts() {
        // canonical MN-major layouts of 16-bit types, in bytes: none ((8, 1, m), (8, k)) : ((2, 16, SBO), (16, LBO));
        // W ((8, W/16, m), (8, k)) : ((2, 16, LBO), (W, SBO))
        for swizzle in Swizzle::ALL {
            let d = Descriptor { start: 8192, leading: 4096, stride: 1024, base_offset: 0, swizzle };
            let w = swizzle.width();
            for r in (0..128).step_by(8) {
                for k in 0..16 {
                    let logical = 8192
                        + if swizzle == Swizzle::None {
                            r / 8 * 1024 + k % 8 * 16 + k / 8 * 4096
                        } else {
                            r % (w / 2) * 2 + r / (w / 2) * 4096 + k % 8 * w + k / 8 * 1024
                        };
                    assert_eq!(d.chunk_mn_major(r, k), swizzle.apply(logical), "{swizzle:?} {r} {k}");
                }
            }
        }
    }

    #[test]
    fn gather_inverts_a_tile_written_with_the_same_descriptor() {
        for swizzle in Swizzle::ALL {
            for (major, element_bytes) in [(Major::K, 1), (Major::K, 2), (Major::K, 4), (Major::Mn, 2)] {
                let k = 32 / element_bytes;
                let d = Descriptor {
                    start: 2048,
                    leading: if swizzle == Swizzle::None { 8192 } else { 16384 },
                    stride: if swizzle == Swizzle::None { 128 } else { 8 * swizzle.width() },
                    base_offset: 0,
                    swizzle,
                };
                let d = if major == Major::Mn && swizzle == Swizzle::None {
                    Descriptor { stride: 256, leading: 128, ..d }
                } else {
                    d
                };
                let mut smem = vec![0u8; 1 << 18];
                let value = |r: usize, c: usize| (r * k + c) as u32 & (u64::MAX >> (64 - 8 * element_bytes)) as u32;
                let mut touched = std::collections::HashSet::new();
                for r in 0..64 {
                    for c in 0..k {
                        let at = match major {
                            Major::K => {
                                d.chunk_k_major(r as u32, (c * element_bytes / 16 * 16) as u32) as usize
                                    + c * element_bytes % 16
                            }
                            Major::Mn => d.chunk_mn_major(r as u32 / 8 * 8, c as u32) as usize + r % 8 * 2,
                        };
                        assert!(touched.insert(at), "two elements at {at}");
                        smem[at..at + element_bytes].copy_from_slice(&value(r, c).to_le_bytes()[..element_bytes]);
                    }
                }
                let mut out = vec![0; 64 * k];
                d.gather(
                    major,
                    64,
                    element_bytes,
                    |at| smem[at as usize..at as usize + 16].try_into().unwrap(),
                    &mut out,
                );
                for (i, &got) in out.iter().enumerate() {
                    assert_eq!(got, value(i / k, i % k));
                }
            }
        }
    }

    #[test]
    fn base_offset_shifts_the_pattern() {
        // a 128B pattern that begins at 0x480 = 1024 + 128: base offset (0x480 >> 7) & 7 = 1, and its first row is not permuted
        let d = Descriptor { start: 0x480, leading: 16, stride: 1024, base_offset: 1, swizzle: Swizzle::B128 };
        for r in 0..8 {
            assert_eq!(d.chunk_k_major(r, 0), 0x480 + r * 128 + r * 16 % 128);
        }
    }
}
