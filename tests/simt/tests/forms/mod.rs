//! Micro-kernels, one per instruction form: the text, the inputs, and what the PTX ISA says must come out.
//!
//! The same table serves three readers: the unit test of the simulator (`tests/forms.rs`), the recorder that runs every kernel on a GPU
//! (`examples/record_vectors.rs`), and the replay of what was recorded (`tests/vectors.rs`).
//!
//! A form is a few lines of PTX between loads of its inputs into `a0, a1, ..` and stores of its outputs from `d0, d1, ..`. One block is one
//! case of 32 threads (128 for a warpgroup); operand `j` of thread `t` in block `b` is the 8-byte slot `(b * operands + j) * threads + t`.

#![allow(dead_code)] // each reader uses a part

pub mod approx;
pub mod bulk;
pub mod convert;
pub mod float;
pub mod hopper;
pub mod int;
pub mod matrix;
pub mod memory;
pub mod modifiers;
pub mod record;
pub mod warp;

use simt::model::approx::{Function, bound, exact};
use simt::model::float::Format;
use simt::model::tensor_map::TensorMap;

/// What an input holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// Random bits and the usual integer edges, of this width.
    Int(u32),
    /// Integers below the bound.
    Below(u64),
    /// f32: random patterns, random moderate numbers, special values.
    F32,
    /// f32 in about [-scale, scale], no special values.
    Moderate(u32),
    /// f64: random patterns, random moderate numbers, special values; finite ones alone.
    F64 {
        /// Neither infinite nor NaN.
        finite: bool,
    },
    /// f16 or bf16 patterns of every kind, one per 16 bits.
    F16,
    /// The same as bf16.
    Bf16,
    /// Pairs of the above.
    F16x2,
    /// The same as bf16.
    Bf16x2,
    /// Every byte, in pairs or fours: 8-bit floats and integers.
    Bytes(u32),
    /// Elements of a matrix: mostly moderate, some zeros and subnormals; with special values in some blocks.
    Matrix(Element),
}

/// Elements of matrix operands, packed to 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    F32,
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    Int8,
    Int32,
}

/// Where a tensor map points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The input slots.
    Input,
    /// The scratch memory, 4096 bytes per block.
    Scratch,
}

/// One operand: width of its register and contents.
pub type Input = (u32, Domain);

/// Outputs, `[operand][thread]`.
pub type Values = Vec<Vec<u64>>;

/// Outputs of one thread from its inputs.
pub type PerLane = Box<dyn Fn(&[u64]) -> Vec<u64>>;
/// Outputs of a block from its inputs.
pub type PerBlock = Box<dyn Fn(&Values) -> Values>;
/// Outputs of all blocks from all inputs.
pub type PerLaunch = Box<dyn Fn(&[Values]) -> Vec<Values>>;

/// What must come out.
pub enum Expect {
    /// Exact bits from the inputs of one thread.
    Lane(PerLane),
    /// Exact bits from the inputs of the block.
    Block(PerBlock),
    /// Exact bits from the inputs of all blocks, for what goes through global memory.
    All(PerLaunch),
    /// An approximate function of `a0` within its documented bound.
    Approx { function: Function, format: Format, ftz: bool, pair: bool },
    /// `a0 / a1` of f32 within 2 ulp; the second is `div.approx`, exact in its zero range.
    Division { ftz: bool, full: bool },
    /// Recorded and replayed only.
    Recorded,
}

/// A micro-kernel.
pub struct Form {
    /// Name of the entry and of the recorded vector.
    pub name: String,
    /// The oldest that has the form: `sm_80`, `sm_89`, `sm_90`, `sm_90a`, `sm_100`.
    pub target: &'static str,
    /// Inputs.
    pub inputs: Vec<Input>,
    /// Widths of the outputs.
    pub outputs: Vec<u32>,
    /// Declarations and instructions.
    pub body: String,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks.
    pub blocks: u32,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// A tensor map as fourth parameter `map`, and the buffer that its addresses count from.
    pub map: Option<(TensorMap, Base)>,
    /// Arithmetic on approximate or tensor-core models: what `Exact` must reproduce bit for bit is only the latter.
    pub expect: Expect,
}

/// A form of independent threads.
pub fn lane(
    name: impl Into<String>,
    target: &'static str,
    inputs: &[Input],
    outputs: &[u32],
    body: impl Into<String>,
    expect: impl Fn(&[u64]) -> Vec<u64> + 'static,
) -> Form {
    Form {
        name: name.into(),
        target,
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
        body: body.into(),
        threads: 32,
        blocks: 8,
        cluster: 1,
        map: None,
        expect: Expect::Lane(Box::new(expect)),
    }
}

/// A form whose threads exchange values.
pub fn block(
    name: impl Into<String>,
    target: &'static str,
    inputs: &[Input],
    outputs: &[u32],
    body: impl Into<String>,
    expect: impl Fn(&Values) -> Values + 'static,
) -> Form {
    Form { expect: Expect::Block(Box::new(expect)), ..lane(name, target, inputs, outputs, body, |_| vec![]) }
}

/// Every form.
pub fn all() -> Vec<Form> {
    let mut all = vec![];
    int::add(&mut all);
    float::add(&mut all);
    approx::add(&mut all);
    convert::add(&mut all);
    memory::add(&mut all);
    modifiers::add(&mut all);
    warp::add(&mut all);
    matrix::add(&mut all);
    hopper::add(&mut all);
    bulk::add(&mut all);
    let mut names: Vec<_> = all.iter().map(|f| f.name.clone()).collect();
    names.sort();
    for pair in names.windows(2) {
        assert_ne!(pair[0], pair[1], "two forms of one name");
    }
    all
}

/// Name of an instruction as a form: `add.sat.s32` becomes `add_sat_s32`.
pub fn ident(instruction: &str) -> String {
    instruction.replace("::", "_").replace('.', "_")
}

/// The first lines of a module.
pub fn header(target: &str, version: &str) -> String {
    format!(".version {version}\n.target {target}\n.address_size 64\n\n")
}

impl Form {
    /// The complete module.
    pub fn ptx(&self) -> String {
        // 256-bit accesses are the only ones that ask for more
        self.ptx_for(self.target, if self.target == "sm_100" { "8.8" } else { "8.6" })
    }

    /// The module with another header.
    pub fn ptx_for(&self, target: &str, version: &str) -> String {
        format!("{}{}", header(target, version), self.entry())
    }

    /// The kernel without a header.
    pub fn entry(&self) -> String {
        use std::fmt::Write;
        let mut s = String::new();
        let map = if self.map.is_some() { ",\n    .param .align 64 .b8 map[128]" } else { "" };
        let cluster = match self.cluster {
            1 => String::new(),
            n => format!(".explicitcluster\n.reqnctapercluster {n}, 1, 1\n"),
        };
        writeln!(
            s,
            ".visible .entry {}(\n    .param .u64 p_in,\n    .param .u64 p_out,\n    \
             .param .u64 p_scratch{map})\n{cluster}.reqntid {}, 1, 1\n{{",
            self.name, self.threads
        )
        .unwrap();
        // in, out: this thread's first slots; scratch: 4096 bytes per block
        writeln!(s, "    .reg .b64 in, out, scratch, slot_offset;\n    .reg .b32 tid, slot;").unwrap();
        for (i, (width, _)) in self.inputs.iter().enumerate() {
            writeln!(s, "    .reg .b{width} a{i};").unwrap();
        }
        for (i, width) in self.outputs.iter().enumerate() {
            writeln!(s, "    .reg .b{width} d{i};").unwrap();
        }
        writeln!(
            s,
            "    ld.param.u64 in, [p_in];\n    ld.param.u64 out, [p_out];\n    ld.param.u64 scratch, [p_scratch];\n    mov.u32 tid, %tid.x;\n    \
             mov.u32 slot, %ctaid.x;\n    mul.wide.u32 slot_offset, slot, {};\n    add.s64 in, in, slot_offset;\n    mul.wide.u32 slot_offset, \
             slot, {};\n    add.s64 out, out, slot_offset;\n    mul.wide.u32 slot_offset, slot, 4096;\n    add.s64 scratch, scratch, \
             slot_offset;\n    mul.wide.u32 slot_offset, tid, 8;\n    add.s64 in, in, slot_offset;\n    add.s64 out, out, slot_offset;",
            self.inputs.len() as u32 * self.threads * 8,
            self.outputs.len() as u32 * self.threads * 8,
        )
        .unwrap();
        for (i, (width, _)) in self.inputs.iter().enumerate() {
            writeln!(s, "    ld.global.b{width} a{i}, [in + {}];", i as u32 * self.threads * 8).unwrap();
        }
        writeln!(s).unwrap();
        for line in self.body.lines() {
            writeln!(s, "    {}", line.trim()).unwrap();
        }
        writeln!(s).unwrap();
        for (i, width) in self.outputs.iter().enumerate() {
            writeln!(s, "    st.global.b{width} [out + {}], d{i};", i as u32 * self.threads * 8).unwrap();
        }
        writeln!(s, "    ret;\n}}").unwrap();
        s
    }

    /// The inputs of every block: `[block][operand][thread]`. The same on every machine.
    pub fn input_values(&self) -> Vec<Values> {
        let mut state =
            self.name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
                | 1;
        (0..self.blocks)
            .map(|block| {
                self.inputs
                    .iter()
                    .enumerate()
                    .map(|(operand, &(width, domain))| {
                        (0..self.threads)
                            .map(|thread| {
                                let index = (block * self.threads + thread) as usize;
                                domain.value(width, index, operand, block, &mut state)
                            })
                            .collect()
                    })
                    .collect()
            })
            .collect()
    }

    /// The input buffer in 8-byte slots.
    pub fn input_slots(&self) -> Vec<u64> {
        self.input_values().into_iter().flatten().flatten().collect()
    }

    /// Slots of the output buffer.
    pub fn output_len(&self) -> usize {
        (self.blocks * self.threads) as usize * self.outputs.len()
    }

    /// Compares an output buffer to the expectation; the error names block, thread, operand, inputs and both values.
    pub fn check(&self, out: &[u64]) -> Result<(), String> {
        let inputs = self.input_values();
        let threads = self.threads as usize;
        let got = |block: usize, operand: usize, thread: usize| {
            out[(block * self.outputs.len() + operand) * threads + thread]
        };
        let fail = |block: usize, operand: usize, thread: usize, want: String| {
            let args: Vec<String> = inputs[block].iter().map(|v| format!("{:#x}", v[thread])).collect();
            Err(format!(
                "{}: block {block}, thread {thread}, d{operand} = {:#x}, expected {want}; inputs {}",
                self.name,
                got(block, operand, thread),
                args.join(", ")
            ))
        };
        let want: Vec<Values> = match &self.expect {
            Expect::Recorded => return Ok(()),
            Expect::Block(f) => inputs.iter().map(f).collect(),
            Expect::All(f) => f(&inputs),
            Expect::Lane(f) => inputs
                .iter()
                .map(|values| {
                    let mut out = vec![vec![0; threads]; self.outputs.len()];
                    for thread in 0..threads {
                        let args: Vec<u64> = values.iter().map(|v| v[thread]).collect();
                        for (operand, value) in f(&args).into_iter().enumerate() {
                            out[operand][thread] = value;
                        }
                    }
                    out
                })
                .collect(),
            &Expect::Approx { function, format, ftz, pair } => {
                for (block, values) in inputs.iter().enumerate() {
                    for thread in 0..threads {
                        for half in 0..=u32::from(pair) {
                            let mask = ((1u64 << format.width()) - 1) as u32;
                            let part = |x: u64| (x >> (16 * half)) as u32 & mask;
                            let (x, y) = (part(values[0][thread]), part(got(block, 0, thread)));
                            if let Err(want) = approx_allows(function, format, ftz, x, y) {
                                return fail(block, 0, thread, want);
                            }
                        }
                    }
                }
                return Ok(());
            }
            &Expect::Division { ftz, full } => {
                for (block, values) in inputs.iter().enumerate() {
                    for thread in 0..threads {
                        let (a, b) = (values[0][thread] as u32, values[1][thread] as u32);
                        if let Err(want) = float::division_allows(a, b, ftz, full, got(block, 0, thread) as u32) {
                            return fail(block, 0, thread, want);
                        }
                    }
                }
                return Ok(());
            }
        };
        for (block, values) in want.iter().enumerate() {
            for (operand, lanes) in values.iter().enumerate() {
                for (thread, &value) in lanes.iter().enumerate() {
                    if got(block, operand, thread) != value {
                        return fail(block, operand, thread, format!("{value:#x}"));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether `y` is an allowed `function(x)`.
pub fn approx_allows(function: Function, format: Format, ftz: bool, x: u32, y: u32) -> Result<(), String> {
    let x = if ftz { format.flush(x) } else { x };
    let value = format.decode(x);
    let want = exact(function, value);
    if want.is_nan() {
        return if y == format.nan() { Ok(()) } else { Err(format!("{:#x}", format.nan())) };
    }
    let got = format.decode(y);
    let nearest = format.encode(want, simt::model::float::Round::Nearest, false);
    let flushed = if ftz { format.flush(nearest) } else { nearest };
    let ok = y == flushed
        || (ftz
            && format.is_subnormal(nearest)
            && (y == nearest & format.sign_bit() || got.abs() == format.decode(1 << format.frac_bits)))
        || (want.is_finite()
            && got.is_finite()
            && value != 0.0
            && bound(function, format, value).allows(format, want, got));
    if ok { Ok(()) } else { Err(format!("about {want:e} ({nearest:#x})")) }
}

/// xorshift64
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

const F32_SPECIAL: [u32; 26] = [
    0,
    0x8000_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffff_ffff,
    0x7f80_0001,
    0x3f80_0000,
    0xbf80_0000,
    0x4000_0000,
    0x3f00_0000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x0080_0000,
    0x8080_0000,
    0x007f_ffff,
    0x0000_0001,
    0x8000_0001,
    0x4020_0000,
    0xc020_0000,
    0x4f00_0000,
    0xcf00_0000,
    0x5f00_0000,
    0x477f_f000,
    0x3380_0000,
    0x7e80_0001,
];

/// Infinities and NaN, then finite numbers.
const F64_SPECIAL: [u64; 18] = [
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x4000_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0xffef_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x800f_ffff_ffff_ffff,
    0x0000_0000_0000_0001,
    0x8000_0000_0000_0001,
    0x4330_0000_0000_0001,
    0x3690_0000_0000_0001,
];

impl Domain {
    /// Slot contents number `index` of operand `operand`. Small indices walk through the special values in every combination of the first
    /// two operands, the rest is random.
    fn value(self, width: u32, index: usize, operand: usize, block: u32, state: &mut u64) -> u64 {
        let r = random(state);
        let mask = if width == 64 { u64::MAX } else { (1 << width) - 1 };
        // specials: operand 0 counts fast, operand 1 slowly, others by chance
        let pick = |n: usize| match operand {
            0 if index < 2 * n => Some(index % n),
            1 if index < 2 * n => Some((index * 7 / 5 + index / n) % n),
            _ if r.is_multiple_of(5) => Some((r >> 8) as usize % n),
            _ => None,
        };
        let value = match self {
            Domain::Int(bits) => {
                let top = 1u64 << (bits - 1);
                let edges = [0, 1, 2, top - 1, top, top + 1, mask, mask - 1, 31, 32, 33, 63, 64, 0x5555_5555_5555_5555];
                match pick(edges.len()) {
                    Some(i) => edges[i],
                    None if r & 1 == 0 => random(state) >> (random(state) % u64::from(bits)),
                    None => random(state),
                }
            }
            Domain::Below(n) => r % n,
            Domain::F32 => match pick(F32_SPECIAL.len()) {
                Some(i) => u64::from(F32_SPECIAL[i]),
                None if r & 3 == 0 => r >> 32,
                None => u64::from(moderate(r, 8).to_bits()),
            },
            Domain::Moderate(scale) => u64::from(moderate(r, scale).to_bits()),
            Domain::F64 { finite } => {
                let specials = &F64_SPECIAL[if finite { 4 } else { 0 }..];
                match pick(specials.len()) {
                    Some(i) => specials[i],
                    None if r & 3 == 0 => {
                        let bits = random(state);
                        if finite { bits & !(1 << 62) } else { bits }
                    }
                    None => (f64::from(moderate(r, 30)) + f64::from(moderate(random(state), 30))).to_bits(),
                }
            }
            Domain::F16 | Domain::Bf16 => half(self == Domain::F16, pick(12), r),
            Domain::F16x2 => {
                half(true, pick(12), r) | half(true, pick(12).map(|i| (i * 5 + 3) % 12), random(state)) << 16
            }
            Domain::Bf16x2 => {
                half(false, pick(12), r) | half(false, pick(12).map(|i| (i * 5 + 3) % 12), random(state)) << 16
            }
            Domain::Bytes(n) => {
                let base = index as u64 * u64::from(n);
                (0..n).fold(0, |x, i| {
                    x | (if operand == 0 { base + u64::from(i) } else { r >> (8 * i) } & 0xff) << (8 * i)
                })
            }
            Domain::Matrix(element) => matrix::element_word(element, block, r, state),
        };
        value & mask
    }
}

/// A number whose magnitude is spread over about `2^-scale .. 2^scale`, sometimes an integer or a half.
fn moderate(r: u64, scale: u32) -> f32 {
    let unit = (r >> 40) as f32 / (1u64 << 24) as f32;
    let sign = if r & 4 == 0 { 1.0 } else { -1.0 };
    let exp = (r >> 8) as u32 % (2 * scale + 1);
    let x = sign * (1.0 + unit) * 2f32.powi(exp as i32 - scale as i32);
    if r & 0x18 == 0 { (x * 2.0).round() / 2.0 } else { x }
}

fn half(is_f16: bool, special: Option<usize>, r: u64) -> u64 {
    let f16 = [0, 0x8000, 0x7c00, 0xfc00, 0x7e00, 0xfdff, 0x3c00, 0xbc00, 0x7bff, 0x0400, 0x0001, 0x83ff];
    let bf16 = [0, 0x8000, 0x7f80, 0xff80, 0x7fc0, 0xff81, 0x3f80, 0xbf80, 0x7f7f, 0x0080, 0x0001, 0x807f];
    match special {
        Some(i) => {
            if is_f16 {
                f16[i]
            } else {
                bf16[i]
            }
        }
        None if r & 3 == 0 => r >> 48,
        None if is_f16 => (0x2c00 + (r >> 48) % 0x2000) | ((r >> 8 & 1) << 15),
        None => (0x3c80 + (r >> 48) % 0x0600) | ((r >> 8 & 1) << 15),
    }
}
