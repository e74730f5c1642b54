//! Tensor maps: what `cp.async.bulk.tensor` in tile mode reads and writes.
//!
//! A plain struct with the arguments of `cuTensorMapEncodeTiled`, validated by the rules of that function's documentation, and the walk over
//! one box: which bytes of shared memory belong to which bytes of the tensor, and which lie outside of it. Dimension 0 is the innermost.
//! The 128-byte object that a kernel receives is opaque on hardware; here it is our own serialisation.

use super::smem::Swizzle;

/// Element type (`CUtensorMapDataType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ElementType {
    U8,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F64,
    Bf16,
    F32Ftz,
    Tf32,
    Tf32Ftz,
}

impl ElementType {
    /// All, in the order of their `CUtensorMapDataType` values.
    pub const ALL: [ElementType; 13] = {
        use ElementType::*;
        [U8, U16, U32, S32, U64, S64, F16, F32, F64, Bf16, F32Ftz, Tf32, Tf32Ftz]
    };
    /// Size of an element.
    pub const fn bytes(self) -> u32 {
        use ElementType::*;
        match self {
            U8 => 1,
            U16 | F16 | Bf16 => 2,
            U32 | S32 | F32 | F32Ftz | Tf32 | Tf32Ftz => 4,
            U64 | S64 | F64 => 8,
        }
    }
    /// Whether the type is a floating-point type.
    pub const fn is_float(self) -> bool {
        use ElementType::*;
        matches!(self, F16 | F32 | F64 | Bf16 | F32Ftz | Tf32 | Tf32Ftz)
    }
}

/// What a load writes for elements outside the tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OobFill {
    /// Zeros.
    #[default]
    Zero,
    /// The special NaN (floating-point types only). Its bits are not documented; here every bit is set.
    Nan,
}

/// Arguments of `cuTensorMapEncodeTiled`, without interleaving.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorMap {
    /// Element type.
    pub element: ElementType,
    /// Global address.
    pub address: u64,
    /// Sizes in elements, innermost first; their number is the rank, 1 to 5.
    pub dims: Vec<u64>,
    /// Strides in bytes of dimensions 1 and up (`rank - 1` of them).
    pub strides: Vec<u64>,
    /// Box in elements, one per dimension.
    pub box_dims: Vec<u32>,
    /// Step per dimension, 1 to 8.
    pub element_strides: Vec<u32>,
    /// Permutation in shared memory.
    pub swizzle: Swizzle,
    /// Values outside.
    pub oob_fill: OobFill,
}

/// One contiguous run of a box: at most 16 bytes, within one 16-byte chunk of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// Physical shared address, swizzle applied.
    pub shared: u32,
    /// Length in bytes.
    pub len: u32,
    /// Global address of the first byte; `None` outside the tensor.
    pub global: Option<u64>,
}

const MAGIC: u32 = 0x5053_4d54;

impl TensorMap {
    /// A dense row-major tensor: `dims` and `box_dims` innermost first, strides from the dims.
    pub fn dense(element: ElementType, address: u64, dims: &[u64], box_dims: &[u32], swizzle: Swizzle) -> Self {
        let mut strides = Vec::new();
        let mut stride = u64::from(element.bytes());
        for dim in dims.iter().take(dims.len().saturating_sub(1)) {
            stride *= dim;
            strides.push(stride);
        }
        TensorMap {
            element,
            address,
            dims: dims.to_vec(),
            strides,
            box_dims: box_dims.to_vec(),
            element_strides: vec![1; dims.len()],
            swizzle,
            oob_fill: OobFill::Zero,
        }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The rules of `cuTensorMapEncodeTiled`; the error names the argument and the number.
    pub fn validate(&self) -> Result<(), String> {
        let rank = self.rank();
        let size = u64::from(self.element.bytes());
        let fail = |text: String| Err(format!("tensor map: {text}"));
        if !(1..=5).contains(&rank) {
            return fail(format!("rank {rank} is not 1 to 5"));
        }
        for (name, len, want) in [
            ("strides", self.strides.len(), rank - 1),
            ("box_dims", self.box_dims.len(), rank),
            ("element_strides", self.element_strides.len(), rank),
        ] {
            if len != want {
                return fail(format!("{name} has {len} entries, a tensor of rank {rank} asks for {want}"));
            }
        }
        if !self.address.is_multiple_of(16) {
            return fail(format!("address {:#x} is not 16-byte aligned", self.address));
        }
        for (i, &dim) in self.dims.iter().enumerate() {
            if dim == 0 || dim > 1 << 32 {
                return fail(format!("dims[{i}] = {dim} is not 1 to 2^32"));
            }
        }
        for (i, &stride) in self.strides.iter().enumerate() {
            if stride % 16 != 0 || stride >= 1 << 40 {
                return fail(format!("strides[{i}] = {stride} is not a multiple of 16 below 2^40"));
            }
        }
        for (i, &extent) in self.box_dims.iter().enumerate() {
            if !(1..=256).contains(&extent) {
                return fail(format!("box_dims[{i}] = {extent} is not 1 to 256"));
            }
        }
        for (i, &step) in self.element_strides.iter().enumerate() {
            if !(1..=8).contains(&step) {
                return fail(format!("element_strides[{i}] = {step} is not 1 to 8"));
            }
        }
        let inner = u64::from(self.box_dims[0]) * size;
        if inner % 16 != 0 {
            return fail(format!("inner box of {inner} bytes is not a multiple of 16"));
        }
        if self.swizzle != Swizzle::None && inner > u64::from(self.swizzle.width()) {
            return fail(format!("inner box of {inner} bytes is wider than the swizzle of {}", self.swizzle.width()));
        }
        if self.oob_fill == OobFill::Nan && !self.element.is_float() {
            return fail("NaN fill of an integer type".into());
        }
        Ok(())
    }

    /// Elements of the box along dimension `i`: `ceil(box / element stride)`; the innermost dimension has no element stride without
    /// interleaving.
    pub fn count(&self, i: usize) -> u32 {
        if i == 0 { self.box_dims[0] } else { self.box_dims[i].div_ceil(self.element_strides[i]) }
    }

    /// Bytes of a full box: what one copy adds to the transaction count, also where it is clipped.
    pub fn box_bytes(&self) -> u32 {
        (0..self.rank()).map(|i| self.count(i)).product::<u32>() * self.element.bytes()
    }

    /// Bytes from one row of the box to the next in shared memory: the whole swizzle width where there is one (CUDA C++ programming guide,
    /// "Tensor memory access swizzle": shared memory must accommodate the full swizzle width).
    pub fn shared_pitch(&self) -> u32 {
        let inner = self.box_dims[0] * self.element.bytes();
        if self.swizzle == Swizzle::None { inner } else { self.swizzle.width() }
    }

    /// Walks the box at element coordinates `coords` (innermost first), whose shared image starts at `shared`.
    ///
    /// # Panics
    /// If `coords` has not one entry per dimension.
    pub fn for_each_run(&self, coords: &[i32], shared: u32, mut visit: impl FnMut(Run)) {
        assert_eq!(coords.len(), self.rank());
        let size = i64::from(self.element.bytes());
        let inner = i64::from(self.box_dims[0]) * size;
        let rows: u32 = (1..self.rank()).map(|i| self.count(i)).product();
        for row in 0..rows {
            // position of this row in the outer dimensions
            let mut rest = row;
            let mut inside = true;
            let mut address = self.address as i64;
            for i in 1..self.rank() {
                let index = rest % self.count(i);
                rest /= self.count(i);
                let at = i64::from(coords[i]) + i64::from(index * self.element_strides[i]);
                inside &= at >= 0 && (at as u64) < self.dims[i];
                address = address.wrapping_add(at.wrapping_mul(self.strides[i - 1] as i64));
            }
            let logical = shared + row * self.shared_pitch();
            // bytes of this row of the box that lie inside the tensor
            let first = i64::from(coords[0]);
            let (from, to) = if inside {
                let low = (-first).clamp(0, i64::from(self.box_dims[0]));
                let high = (self.dims[0] as i64 - first).clamp(low, i64::from(self.box_dims[0]));
                (low * size, high * size)
            } else {
                (0, 0)
            };
            let mut at = 0;
            while at < inner {
                let mut end = (at / 16 + 1) * 16;
                for edge in [from, to, inner] {
                    if at < edge {
                        end = end.min(edge);
                    }
                }
                let valid = at >= from && at < to;
                visit(Run {
                    shared: self.swizzle.apply(logical + at as u32),
                    len: (end - at) as u32,
                    global: valid.then(|| address.wrapping_add(first * size + at) as u64),
                });
                at = end;
            }
        }
    }

    /// One byte of the fill value, at byte `offset` of an element (all bytes are alike).
    pub fn fill_byte(&self) -> u8 {
        if self.oob_fill == OobFill::Nan { 0xff } else { 0 }
    }

    /// The 128-byte object that a kernel takes as `.param .align 64 .b8 map[128]`.
    ///
    /// # Panics
    /// If the map is not valid.
    pub fn to_bytes(&self) -> [u8; 128] {
        self.validate().expect("a valid tensor map");
        let mut out = Vec::with_capacity(128);
        out.extend(MAGIC.to_le_bytes());
        let element = ElementType::ALL.iter().position(|&e| e == self.element).unwrap_or(0);
        let swizzle = Swizzle::ALL.iter().position(|&s| s == self.swizzle).unwrap_or(0);
        out.extend([element as u8, swizzle as u8, u8::from(self.oob_fill == OobFill::Nan), self.rank() as u8]);
        out.extend(self.address.to_le_bytes());
        for i in 0..5 {
            out.extend(self.dims.get(i).copied().unwrap_or(0).to_le_bytes());
            out.extend((self.box_dims.get(i).copied().unwrap_or(0) as u16).to_le_bytes());
            out.push(self.element_strides.get(i).copied().unwrap_or(0) as u8);
            if i > 0 {
                out.extend(self.strides.get(i - 1).copied().unwrap_or(0).to_le_bytes());
            }
        }
        out.resize(128, 0);
        out.try_into().expect("128 bytes")
    }

    /// Reads the object back; `None` if the bytes are not one.
    pub fn from_bytes(bytes: &[u8; 128]) -> Option<Self> {
        let mut at = 0;
        let mut take = |n: usize| {
            let mut value = [0u8; 8];
            value[..n].copy_from_slice(&bytes[at..at + n]);
            at += n;
            u64::from_le_bytes(value)
        };
        if take(4) != u64::from(MAGIC) {
            return None;
        }
        let (element, swizzle, nan, rank) = (take(1) as usize, take(1) as usize, take(1), take(1) as usize);
        let mut map = TensorMap {
            element: *ElementType::ALL.get(element)?,
            address: take(8),
            dims: Vec::new(),
            strides: Vec::new(),
            box_dims: Vec::new(),
            element_strides: Vec::new(),
            swizzle: *Swizzle::ALL.get(swizzle)?,
            oob_fill: if nan == 1 { OobFill::Nan } else { OobFill::Zero },
        };
        for i in 0..rank.min(5) {
            map.dims.push(take(8));
            map.box_dims.push(take(2) as u32);
            map.element_strides.push(take(1) as u32);
            if i > 0 {
                map.strides.push(take(8));
            }
        }
        map.validate().ok()?;
        Some(map)
    }
}

#[cfg(test)]
mod tests {
    use super::super::smem::{Descriptor, Major};
    use super::*;

    fn map_2d(swizzle: Swizzle) -> TensorMap {
        TensorMap::dense(ElementType::Bf16, 0x10000, &[80, 50], &[swizzle.width() / 2, 24], swizzle)
    }

    #[test]
    fn the_rules_of_the_driver() {
        let good = map_2d(Swizzle::B128);
        assert_eq!(good.validate(), Ok(()));
        assert_eq!(good.strides, [160]);
        type Edit = fn(&mut TensorMap);
        let faults: [(&str, Edit); 15] = [
            ("rank 0", |m| m.dims.clear()),
            ("rank 6", |m| m.dims = vec![16; 6]),
            ("strides has", |m| m.strides.push(16)),
            ("box_dims has", |m| m.box_dims.push(16)),
            ("element_strides has", |m| m.element_strides.push(1)),
            ("address", |m| m.address += 8),
            ("dims[1]", |m| m.dims[1] = 0),
            ("dims[0]", |m| m.dims[0] = (1 << 32) + 1),
            ("strides[0]", |m| m.strides[0] = 168),
            ("strides[0]", |m| m.strides[0] = 1 << 40),
            ("box_dims[1]", |m| m.box_dims[1] = 257),
            ("element_strides[1]", |m| m.element_strides[1] = 9),
            ("not a multiple of 16", |m| m.box_dims[0] = 12),
            ("wider than the swizzle", |m| m.box_dims[0] = 72),
            ("NaN fill", |m| (m.element, m.oob_fill, m.box_dims[0]) = (ElementType::U16, OobFill::Nan, 64)),
        ];
        for (text, edit) in faults {
            let mut map = good.clone();
            edit(&mut map);
            let error = map.validate().expect_err(text);
            assert!(error.contains(text), "{error} does not mention {text}");
        }
    }

    #[test]
    fn bytes_round_trip() {
        for swizzle in Swizzle::ALL {
            let mut map = map_2d(swizzle);
            map.element_strides[1] = 3;
            map.oob_fill = OobFill::Nan;
            assert_eq!(TensorMap::from_bytes(&map.to_bytes()), Some(map));
        }
        let five = TensorMap::dense(ElementType::F32, 1 << 40, &[64, 3, 5, 7, 9], &[8, 1, 2, 3, 4], Swizzle::B32);
        assert_eq!(TensorMap::from_bytes(&five.to_bytes()), Some(five));
        assert_eq!(TensorMap::from_bytes(&[0; 128]), None);
    }

    /// Element by element from the definition: global coordinate = box coordinate + start, outside means fill.
    fn check_box(map: &TensorMap, coords: &[i32]) {
        let size = map.element.bytes();
        let rank = map.rank();
        let mut runs = std::collections::HashMap::new();
        map.for_each_run(coords, 0x2000, |run| {
            assert!(run.len <= 16 && run.shared / 16 == (run.shared + run.len - 1) / 16);
            for i in 0..run.len {
                assert!(runs.insert(run.shared + i, run.global.map(|g| g + u64::from(i))).is_none());
            }
        });
        assert_eq!(runs.len() as u32, map.box_bytes());
        let counts: Vec<u32> = (0..rank).map(|i| map.count(i)).collect();
        let total: u32 = counts.iter().product();
        for element in 0..total {
            let mut rest = element;
            let mut inside = true;
            let mut global = map.address as i128;
            let mut row = 0;
            let mut inner = 0;
            let mut pitch = 1;
            for i in 0..rank {
                let index = rest % counts[i];
                rest /= counts[i];
                let step = if i == 0 { 1 } else { map.element_strides[i] };
                let at = i128::from(coords[i]) + i128::from(index * step);
                inside &= at >= 0 && at < i128::from(map.dims[i]);
                global += at * if i == 0 { i128::from(size) } else { i128::from(map.strides[i - 1]) };
                if i == 0 {
                    inner = index;
                } else {
                    row += index * pitch;
                    pitch *= counts[i];
                }
            }
            let logical = 0x2000 + row * map.shared_pitch() + inner * size;
            for byte in 0..size {
                let got = runs[&map.swizzle.apply(logical + byte)];
                assert_eq!(
                    got,
                    inside.then_some((global + i128::from(byte)) as u64),
                    "{map:?} {coords:?} element {element}"
                );
            }
        }
    }

    #[test]
    fn boxes_element_by_element() {
        for swizzle in Swizzle::ALL {
            for coords in [[0, 0], [-3, 0], [70, 40], [5, -7], [200, 0], [0, 60], [-500, -500], [77, 49]] {
                check_box(&map_2d(swizzle), &coords);
                let mut stepped = map_2d(swizzle);
                stepped.element_strides = vec![2, 3];
                check_box(&stepped, &coords);
            }
        }
        for element in ElementType::ALL {
            let inner = 32 / element.bytes();
            let one = TensorMap::dense(element, 0x40, &[100], &[inner], Swizzle::None);
            for at in [-5, 0, 90, 99, 100] {
                check_box(&one, &[at]);
            }
            let five = TensorMap::dense(element, 0x100, &[64, 3, 5, 4, 2], &[inner, 2, 3, 2, 2], Swizzle::B32);
            check_box(&five, &[-2, 1, 3, 3, 1]);
            check_box(&five, &[60, -1, 0, 0, 0]);
        }
    }

    /// A tile copied in by a tensor map and read through a descriptor gives the matrix back, for every swizzle and both majors.
    #[test]
    fn copies_meet_descriptors() {
        for swizzle in [Swizzle::B32, Swizzle::B64, Swizzle::B128] {
            let width = swizzle.width();
            // K-major: tensor [64 rows][width bytes of k], 8- and 16-bit elements
            for (element, bytes) in [(ElementType::U8, 1u32), (ElementType::Bf16, 2), (ElementType::F32, 4)] {
                let map = TensorMap::dense(element, 0, &[u64::from(width / bytes), 64], &[width / bytes, 64], swizzle);
                let global: Vec<u8> = (0..64 * width).map(|i| (i * 7 + i / 256) as u8).collect();
                let mut smem = vec![0u8; 1 << 18];
                map.for_each_run(&[0, 0], 2048, |run| {
                    let (at, from) = (run.shared as usize, run.global.unwrap() as usize);
                    smem[at..at + run.len as usize].copy_from_slice(&global[from..from + run.len as usize]);
                });
                for k_step in 0..width / 32 {
                    let d = Descriptor {
                        start: 2048 + 32 * k_step,
                        leading: 16,
                        stride: 8 * width,
                        base_offset: 0,
                        swizzle,
                    };
                    let k = (32 / bytes) as usize;
                    let mut out = vec![0; 64 * k];
                    d.gather(Major::K, 64, bytes as usize, |a| smem[a as usize..][..16].try_into().unwrap(), &mut out);
                    for (i, &got) in out.iter().enumerate() {
                        let at = i / k * width as usize + (32 * k_step) as usize + i % k * bytes as usize;
                        let want = global[at..at + bytes as usize].iter().rev().fold(0, |x, &b| x << 8 | u32::from(b));
                        assert_eq!(got, want, "{swizzle:?} {element:?}");
                    }
                }
            }
            // MN-major: tensor [32 of k][128 rows], boxes of [width / 2 rows, 32 of k] side by side
            let map = TensorMap::dense(ElementType::F16, 0, &[128, 32], &[width / 2, 32], swizzle);
            let box_bytes = map.box_bytes();
            let mut smem = vec![0u8; 1 << 18];
            for part in 0..256 / width {
                map.for_each_run(&[(part * width / 2) as i32, 0], 4096 + part * box_bytes, |run| {
                    for i in 0..run.len {
                        let element = (run.global.unwrap() as u32 + i) / 2;
                        smem[(run.shared + i) as usize] = (element >> (8 * (i % 2))) as u8;
                    }
                });
            }
            for k_step in 0..2 {
                let d = Descriptor {
                    start: 4096 + 16 * width * k_step,
                    leading: box_bytes,
                    stride: 8 * width,
                    base_offset: 0,
                    swizzle,
                };
                let mut out = vec![0; 128 * 16];
                d.gather(Major::Mn, 128, 2, |a| smem[a as usize..][..16].try_into().unwrap(), &mut out);
                for (i, &got) in out.iter().enumerate() {
                    let (r, k) = (i / 16, i % 16);
                    assert_eq!(got as usize, (16 * k_step as usize + k) * 128 + r, "{swizzle:?}");
                }
            }
        }
    }
}
