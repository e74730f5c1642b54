//! Products of rows with one weight matrix per group: experts of a mixture, heads, and linear layers as the case of one group.

use crate::cuda::driver::{Driver, Launch, Limits, Stream};
use crate::cuda::kernels::{Kernel, grouped_gemm as kernels};
use crate::cuda::rows::{MAX_ROWS, Rows, check_output_stride, check_sizes, stride_bytes};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::spec::Activation;
use crate::view::check_disjoint;

/// What to compute, for the rows `r` of each group `g`:
///
/// ```text
/// sum(w)[r, n] = row_weight[r] * sum_k a[row(r), k] * w[g, n, k] + bias(w)[g, n]
/// out[r, n] = activation(sum(gate)[r, n]) * sum(up)[r, n]       gated
/// out[r, n] = activation(sum(up)[r, n])                         plain; without an activation, the sum itself
/// ```
///
/// * `a`: `[source_rows, inputs]`; `row(r)` is `row_token[r]`, or `r` without
/// * `gate`, `up`: `[num_groups, outputs, inputs]`, each with strides of its own, so that halves of one array, every other row
///   of one, and separate arrays are all the same to the kernel
/// * biases: f32 `[num_groups, outputs]`; `row_weight`: f32, one per row
/// * `out`: `[rows, outputs]`
///
/// Sums are f32 in the order of `k` (in tensor cores 16 products at a time, 8 of tf32), rounded once at the store. A row's bits
/// depend on that row and its group's weights alone: neither on the other rows nor on the tile that it falls into.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GroupedGemm {
    /// Element type of `a` and the weights: bf16, f16 or f32.
    pub dtype: Dtype,
    /// Element type of `out`: `dtype` or f32.
    pub out_dtype: Dtype,
    /// How f32 is multiplied; of no meaning for other types.
    pub f32_products: F32Products,
    /// Which rows belong to which group.
    pub rows: GemmRows,
    /// Weight matrices.
    pub num_groups: usize,
    /// Width of `a`: a multiple of 16 bytes.
    pub inputs: usize,
    /// Width of `out`.
    pub outputs: usize,
    /// Whether there is a gate.
    pub gated: bool,
    /// `up` is `[num_groups, inputs, outputs]`: for equal rows, without a gate, stored in `dtype`.
    pub transposed: bool,
    /// What follows the sums; not `None` with a gate.
    pub activation: Option<Activation>,
    /// Rows of `a`, of a group where [`GroupedGemm::a_group_stride`] is not 0.
    pub source_rows: usize,
    /// Elements from one row of `a` to the next.
    pub a_stride: usize,
    /// Elements from the rows of one group to those of the next; 0: all groups choose from the same rows.
    pub a_group_stride: usize,
    /// Elements from one row of `gate` to the next.
    pub gate_stride: usize,
    /// Elements from one matrix of `gate` to the next.
    pub gate_group_stride: usize,
    /// Elements from one row of `up` to the next.
    pub up_stride: usize,
    /// Elements from one matrix of `up` to the next.
    pub up_group_stride: usize,
    /// Elements from one group's biases to the next.
    pub bias_stride: usize,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
    /// Elements from the rows of one group to those of the next; 0: rows are numbered through all groups.
    pub out_group_stride: usize,
    /// Rows of a tile: 16, 32, 64 or 128; `None`: what suits the device. Has no influence on the result. Rows that are listed
    /// come with their tiles.
    pub tile_rows: Option<usize>,
}

/// How the products of f32 arrays are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum F32Products {
    /// In f32: one fused multiply-add after the other, nothing is rounded before the sum.
    #[default]
    Full,
    /// On tensor cores, which take their factors as tf32: the range of f32 with 11 significant bits. Factors are rounded to nearest,
    /// ties away from zero (from 2^128 - 2^116 on to infinity), products are exact, sums f32. With relative errors of at most 2^-11 in
    /// both factors, a sum is off by about `2^-10 * sum_k |a[k] * w[k]|` at most, where [`F32Products::Full`] is off by some 2^-24 of
    /// it for each addition. Activations are those of 16-bit types, 2 ulp of f32.
    Tf32,
}

/// Which rows belong to which group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GemmRows {
    /// So many rows for each group.
    Equal(usize),
    /// Any number, read from the device: one list of tiles for each number of rows of a tile, 16, 32, 64 and 128.
    Listed {
        /// At most so many rows in all.
        max_rows: usize,
        /// At most so many in one group.
        max_group_rows: usize,
        /// Room of each list, in tiles.
        max_tiles: usize,
    },
}

impl GroupedGemm {
    /// A linear layer: `out[t, o] = sum_i a[t, i] * up[o, i]`, contiguous.
    pub fn linear(dtype: Dtype, num_tokens: usize, outputs: usize, inputs: usize) -> Self {
        GroupedGemm {
            dtype,
            out_dtype: dtype,
            f32_products: F32Products::Full,
            rows: GemmRows::Equal(num_tokens),
            num_groups: 1,
            inputs,
            outputs,
            gated: false,
            transposed: false,
            activation: None,
            source_rows: num_tokens,
            a_stride: inputs,
            a_group_stride: 0,
            gate_stride: inputs,
            gate_group_stride: inputs.saturating_mul(outputs),
            up_stride: inputs,
            up_group_stride: inputs.saturating_mul(outputs),
            bias_stride: outputs,
            out_stride: outputs,
            out_group_stride: 0,
            tile_rows: None,
        }
    }

    /// Experts that get `max_rows` assignments of `num_tokens` tokens, sorted by expert as the lists of tiles say; contiguous.
    pub fn experts(dtype: Dtype, num_experts: usize, max_rows: usize, outputs: usize, inputs: usize) -> Self {
        let rows = GemmRows::Listed { max_rows, max_group_rows: max_rows, max_tiles: max_tiles(max_rows, num_experts) };
        GroupedGemm { rows, num_groups: num_experts, ..GroupedGemm::linear(dtype, max_rows, outputs, inputs) }
    }
}

/// Room that a list of tiles needs, for any share of `max_rows` rows between `num_groups` groups.
pub(crate) fn max_tiles(max_rows: usize, num_groups: usize) -> usize {
    CLASSES.iter().map(|class| tiles_of(*class, max_rows, num_groups)).max().unwrap_or(0)
}

/// Rows of a tile, one list for each. A group with at most so many rows, and more than the next smaller, is in that list; the
/// last takes all larger groups too.
const CLASSES: [usize; 4] = [16, 32, 64, 128];

/// Most tiles of a class.
fn tiles_of(class: usize, max_rows: usize, num_groups: usize) -> usize {
    let least = match class {
        16 => 1,
        class => class / 2 + 1,
    };
    let groups = num_groups.min(max_rows / least);
    // n rows are ceil(n / class) tiles, one more than n / class at most; below the last class one.
    if class == 128 { groups.saturating_add(max_rows / class) } else { groups }
}

/// Device pointers of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupedGemmArgs {
    /// Read.
    pub a: u64,
    /// Read, with a gate.
    pub gate: u64,
    /// Read.
    pub up: u64,
    /// Read, where there is one: f32.
    pub gate_bias: Option<u64>,
    /// Read, where there is one: f32.
    pub up_bias: Option<u64>,
    /// Read, where there is one: u32, below `source_rows`.
    pub row_token: Option<u64>,
    /// Read, where there is one: f32.
    pub row_weight: Option<u64>,
    /// Read where rows are listed: u32 `[4]`, the tiles in each list.
    pub tile_counts: u64,
    /// Read where rows are listed: u32 `[4, max_tiles, 4]`, each group, first row, rows, unused.
    pub tiles: u64,
    /// Written.
    pub out: u64,
}

impl GroupedGemmArgs {
    /// A plain product without biases.
    pub fn new(a: u64, up: u64, out: u64) -> Self {
        GroupedGemmArgs {
            a,
            gate: 0,
            up,
            gate_bias: None,
            up_bias: None,
            row_token: None,
            row_weight: None,
            tile_counts: 0,
            tiles: 0,
            out,
        }
    }

    /// The same with a gate.
    pub fn with_gate(self, gate: u64) -> Self {
        GroupedGemmArgs { gate, ..self }
    }

    /// The same with rows as listed.
    pub fn with_tiles(self, tile_counts: u64, tiles: u64) -> Self {
        GroupedGemmArgs { tile_counts, tiles, ..self }
    }
}

/// [`GroupedGemm`] with its kernels and grids. Pure data.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupedGemmPlan {
    dtype: Dtype,
    out_dtype: Dtype,
    rows: GemmRows,
    num_groups: usize,
    inputs: u32,
    outputs: u32,
    gated: bool,
    activation: ActivationParams,
    a: Layout,
    gate: Layout,
    up: Layout,
    bias: Layout,
    out: Layout,
    /// One for each class of row tiles that may occur.
    passes: [Option<Pass>; CLASSES.len()],
}

/// How an array `[groups, rows, row_bytes]` lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layout {
    groups: u64,
    group_stride_bytes: u64,
    rows: u64,
    stride_bytes: u64,
    row_bytes: u64,
}

/// One launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pass {
    /// Index into the table of instances.
    instance: usize,
    stages: u32,
    col_tiles: u32,
    /// Tiles of each group where rows are not listed.
    group_tiles: u32,
    grid: u32,
}

/// An activation as the kernel takes it; numbers by their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ActivationParams {
    kind: u32,
    slope: u32,
    cubic: u32,
    limit: u32,
    up_offset: u32,
}

impl ActivationParams {
    fn new(activation: Option<Activation>) -> Self {
        let params = |kind, slope: f64, cubic: f64, limit: f64, up_offset: f64| ActivationParams {
            kind,
            slope: (slope as f32).to_bits(),
            cubic: (cubic as f32).to_bits(),
            limit: (limit as f32).to_bits(),
            up_offset: (up_offset as f32).to_bits(),
        };
        let infinity = f64::INFINITY;
        // 1 + tanh(u) = 2 sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        let gelu = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
        match activation {
            None => params(0, 0.0, 0.0, infinity, 0.0),
            Some(Activation::Silu) => params(1, 1.0, 0.0, infinity, 0.0),
            Some(Activation::GeluTanh) => params(1, gelu, 0.044715 * gelu, infinity, 0.0),
            Some(Activation::SwigluClamped { alpha, limit }) => params(1, alpha, 0.0, limit, 1.0),
            Some(Activation::GeluErf) => params(2, 0.0, 0.0, infinity, 0.0),
            Some(Activation::Relu) => params(3, 0.0, 0.0, infinity, 0.0),
            Some(Activation::ReluSquared) => params(4, 0.0, 0.0, infinity, 0.0),
        }
    }
}

impl Layout {
    /// From lengths and strides in elements; the last byte has an address.
    fn new(
        name: &str,
        dtype: Dtype,
        [groups, group_stride]: [usize; 2],
        [rows, stride]: [usize; 2],
        width: usize,
    ) -> Result<Layout> {
        let layout = Layout {
            groups: groups as u64,
            group_stride_bytes: stride_bytes(name, dtype, groups, group_stride)?,
            rows: rows as u64,
            stride_bytes: stride_bytes(name, dtype, rows, stride)?,
            row_bytes: (width * dtype.size_bytes()) as u64, // at most 2^30 elements, seen by `check_sizes`
        };
        if layout.extent_bytes() > i64::MAX as u64 {
            let expected = "an array within 2^63 bytes".into();
            return Err(Error::Stride { argument: name.into(), expected, found: vec![group_stride, stride, 1] });
        }
        Ok(layout)
    }

    /// Every row begins at a multiple of 16 bytes, if the first does.
    fn check_aligned(&self, name: &str, dtype: Dtype) -> Result<()> {
        let aligned = |n: u64, stride: u64| n <= 1 || stride.is_multiple_of(16);
        if aligned(self.groups, self.group_stride_bytes) && aligned(self.rows, self.stride_bytes) {
            return Ok(());
        }
        let size = dtype.size_bytes();
        let expected =
            format!("multiples of {} elements, so that every row begins at a multiple of 16 bytes", 16 / size);
        let found = [self.group_stride_bytes, self.stride_bytes].map(|bytes| bytes as usize / size);
        Err(Error::Stride { argument: name.into(), expected, found: vec![found[0], found[1], 1] })
    }

    /// Both strides are below 2^63, so that 2^31 of them fit 128 bits; the result saturates.
    fn extent_bytes(&self) -> u64 {
        let step = |n: u64, stride: u64| u128::from(n.saturating_sub(1)) * u128::from(stride);
        let bytes = step(self.groups, self.group_stride_bytes) + step(self.rows, self.stride_bytes);
        u64::try_from(bytes + u128::from(self.row_bytes)).unwrap_or(u64::MAX)
    }

    /// For the checks of addresses: exact for one group, else everything between the ends.
    fn rows(&self, name: &'static str, ptr: u64) -> Rows {
        if self.groups > 1 && self.group_stride_bytes > 0 {
            return Rows { name, ptr, num_rows: 1, row_bytes: self.extent_bytes(), stride_bytes: 0 };
        }
        Rows { name, ptr, num_rows: self.rows as usize, row_bytes: self.row_bytes, stride_bytes: self.stride_bytes }
    }
}

/// A flat array for the same checks.
fn flat(name: &'static str, ptr: u64, len: usize) -> Rows {
    Rows { name, ptr, num_rows: 1, row_bytes: (len as u64).saturating_mul(4), stride_bytes: 0 }
}

impl GroupedGemmPlan {
    /// Checks the shapes and chooses kernels and grids for a device.
    ///
    /// # Errors
    /// [`Error::Dtype`]; [`Error::Value`] for sizes that are 0 or above 2^30, `inputs` that is no multiple of 16 bytes, more rows
    /// than 2^31 - 1, a gate without an activation or a clamped SwiGLU without a gate, and `tile_rows` that is none of the four;
    /// [`Error::Stride`] if rows of `a`, `gate` or `up` do not all begin at multiples of 16 bytes, rows of `out` overlap, or an array
    /// leaves the address space; [`Error::Unsupported`] for more than 2^31 tiles, transposed weights as tf32, or a device with less than
    /// 96 KiB of shared memory.
    pub fn new(problem: &GroupedGemm, limits: &Limits) -> Result<Self> {
        let &GroupedGemm { dtype, out_dtype, rows, num_groups, inputs, outputs, gated, activation, .. } = problem;
        if kernels::INSTANCES.iter().all(|i| i.dtype != dtype) {
            return Err(wrong_dtype("a, gate and up", "bf16, f16 or f32", dtype));
        }
        if out_dtype != dtype && out_dtype != Dtype::F32 {
            return Err(wrong_dtype("out", &format!("{dtype} or f32"), out_dtype));
        }
        let (row_bound, group_bound) = match rows {
            GemmRows::Equal(rows) => (rows, rows),
            GemmRows::Listed { max_rows, max_group_rows, .. } => (max_rows, max_group_rows.min(max_rows)),
        };
        check_sizes(("rows", row_bound), ("inputs", inputs))?;
        check_sizes(("source_rows", problem.source_rows), ("outputs", outputs))?;
        if num_groups > MAX_ROWS {
            return Err(Error::value("num_groups", format!("at most {MAX_ROWS}"), num_groups));
        }
        if !(inputs * dtype.size_bytes()).is_multiple_of(16) {
            let expected = format!("a multiple of {} (16 bytes)", 16 / dtype.size_bytes());
            return Err(Error::value("inputs", expected, inputs));
        }
        match activation {
            None if gated => return Err(Error::value("activation", "one, because there is a gate", "none")),
            Some(Activation::SwigluClamped { .. }) if !gated => {
                return Err(Error::value("activation", "another one for a plain product", "SwigluClamped"));
            }
            _ => {}
        }

        let transposed = problem.transposed;
        if transposed && !(outputs * dtype.size_bytes()).is_multiple_of(16) {
            let expected = format!("a multiple of {} (16 bytes) for transposed weights", 16 / dtype.size_bytes());
            return Err(Error::value("outputs", expected, outputs));
        }

        let layout = |name, groups: [usize; 2], rows: [usize; 2], width| {
            let layout = Layout::new(name, dtype, groups, rows, width)?;
            layout.check_aligned(name, dtype)?;
            Ok(layout)
        };
        let a_groups = if problem.a_group_stride == 0 { 1 } else { num_groups };
        let a = layout("a", [a_groups, problem.a_group_stride], [problem.source_rows, problem.a_stride], inputs)?;
        let (up_rows, up_width) = if transposed { (inputs, outputs) } else { (outputs, inputs) };
        let up = layout("up", [num_groups, problem.up_group_stride], [up_rows, problem.up_stride], up_width)?;
        let gate = if gated {
            layout("gate", [num_groups, problem.gate_group_stride], [outputs, problem.gate_stride], inputs)?
        } else {
            up
        };
        let bias = Layout::new("bias", Dtype::F32, [num_groups, problem.bias_stride], [1, 0], outputs)?;
        let out_groups = match rows {
            GemmRows::Equal(_) => num_groups,
            GemmRows::Listed { .. } => 1,
        };
        let out_strides = [problem.out_group_stride, problem.out_stride];
        if out_groups > 1 {
            check_disjoint("out", &[out_groups, row_bound, outputs], &[out_strides[0], out_strides[1], 1])?;
        } else {
            check_output_stride("out", row_bound, outputs, out_strides[1])?;
        }
        let out = Layout::new("out", out_dtype, [out_groups, out_strides[0]], [row_bound, out_strides[1]], outputs)?;

        let tf32 = dtype == Dtype::F32 && problem.f32_products == F32Products::Tf32;
        let choice = Choice { dtype, out_dtype, tf32, gated, transposed, outputs, limits };
        let mut passes = [None; CLASSES.len()];
        match rows {
            _ if row_bound == 0 || num_groups == 0 => {}
            GemmRows::Equal(rows) => {
                let class = match problem.tile_rows {
                    Some(tile) => CLASSES.iter().position(|class| *class == tile),
                    None => Some(choice.class(num_groups, rows)?),
                };
                let Some(class) = class else {
                    let found = problem.tile_rows.unwrap_or(0);
                    return Err(Error::value("tile_rows", "16, 32, 64 or 128", found));
                };
                let group_tiles = rows.div_ceil(CLASSES[class]);
                passes[class] = Some(choice.pass(class, group_tiles.saturating_mul(num_groups), group_tiles)?);
            }
            GemmRows::Listed { .. } => {
                for (class, tile_rows) in CLASSES.into_iter().enumerate() {
                    let tiles = tiles_of(tile_rows, row_bound, num_groups);
                    if tiles > 0 && (class == 0 || group_bound > CLASSES[class - 1]) {
                        passes[class] = Some(choice.pass(class, tiles, 0)?);
                    }
                }
            }
        }
        Ok(GroupedGemmPlan {
            dtype,
            out_dtype,
            rows,
            num_groups,
            inputs: inputs as u32, // at most 2^30, as `outputs`, seen by `check_sizes`
            outputs: outputs as u32,
            gated,
            activation: ActivationParams::new(activation),
            a,
            gate,
            up,
            bias,
            out,
            passes,
        })
    }

    /// Names of the kernels, in the order of their launches.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.passes.iter().flatten().map(|pass| pass.kernel().entry)
    }

    /// Device memory that [`GroupedGemmPlan::launch`] needs besides its arguments.
    pub fn workspace_bytes(&self) -> usize {
        0
    }

    /// Loads the kernels, so that a launch does not.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is too old, [`Error::Driver`] with the compiler's log.
    pub fn warmup(&self, driver: &dyn Driver) -> Result<()> {
        self.passes.iter().flatten().try_for_each(|pass| driver.load(pass.kernel()))
    }

    /// Queues the work on a stream. Does not wait; after [`GroupedGemmPlan::warmup`] it neither allocates nor loads.
    ///
    /// # Errors
    /// [`Error::Value`] if a pointer is null or not aligned (`a`, `gate`, `up` and `tiles` to 16 bytes, others to their elements);
    /// [`Error::Overlap`] if `out` shares memory with another array; [`Error::Driver`]. Nothing is written then.
    ///
    /// # Safety
    /// The pointers are memory of `driver`'s device with the plan's shapes and strides, valid until the work has ended; no other
    /// work writes the inputs or touches `out` meanwhile. `row_token` and `tiles` hold what their descriptions say: rows of `a`,
    /// groups and rows that exist, each row in one tile. `stream` is of that device.
    pub unsafe fn launch(&self, driver: &dyn Driver, args: &GroupedGemmArgs, stream: Stream) -> Result<()> {
        if self.passes.iter().all(Option::is_none) {
            return Ok(());
        }
        let a = self.a.rows("a", args.a);
        let up = self.up.rows("up", args.up);
        let gate = self.gated.then(|| self.gate.rows("gate", args.gate));
        let bias = |name, ptr: Option<u64>| ptr.map(|ptr| self.bias.rows(name, ptr));
        let out = self.out.rows("out", args.out);
        let num_rows = self.out.rows as usize;
        let listed = match self.rows {
            GemmRows::Equal(_) => None,
            GemmRows::Listed { max_tiles, .. } => Some(max_tiles),
        };
        let vectors = [
            Some(a),
            Some(up),
            gate,
            listed.map(|tiles| flat("tiles", args.tiles, tiles.saturating_mul(4 * CLASSES.len()))),
        ];
        let words = [
            bias("gate_bias", args.gate_bias.filter(|_| self.gated)),
            bias("up_bias", args.up_bias),
            args.row_token.map(|ptr| flat("row_token", ptr, num_rows)),
            args.row_weight.map(|ptr| flat("row_weight", ptr, num_rows)),
            listed.map(|_| flat("tile_counts", args.tile_counts, CLASSES.len())),
        ];
        for vector in vectors.iter().flatten() {
            vector.check(self.dtype)?;
            if !vector.aligned() {
                let expected = "a device pointer that is a multiple of 16";
                return Err(Error::value(vector.name, expected, format_args!("{:#x}", vector.ptr)));
            }
            out.check_separate(vector)?;
        }
        for word in words.iter().flatten() {
            word.check(Dtype::F32)?;
            out.check_separate(word)?;
        }
        out.check(self.out_dtype)?;
        let pair_bytes = 2 * self.out_dtype.size_bytes() as u64;
        let pairs = [out.ptr, self.out.stride_bytes, self.out.group_stride_bytes];
        let pairs = pairs.iter().all(|bytes| bytes.is_multiple_of(pair_bytes));

        for (class, pass) in self.passes.iter().enumerate() {
            let Some(pass) = pass else { continue };
            let instance = &kernels::INSTANCES[pass.instance];
            let (tiles_ptr, tile_count_ptr) = match listed {
                None => (0, 0),
                Some(max_tiles) => (args.tiles + (class * max_tiles * 16) as u64, args.tile_counts + 4 * class as u64),
            };
            let group_rows = match self.rows {
                GemmRows::Equal(rows) => rows as u32, // at most 2^31 - 1, seen by `new`
                GemmRows::Listed { .. } => 0,
            };
            let params = kernels::Params {
                a_ptr: a.ptr,
                a_stride_bytes: self.a.stride_bytes,
                a_group_stride_bytes: self.a.group_stride_bytes,
                row_token_ptr: args.row_token.unwrap_or(0),
                row_weight_ptr: args.row_weight.unwrap_or(0),
                gate_ptr: if self.gated { args.gate } else { 0 },
                gate_stride_bytes: self.gate.stride_bytes,
                gate_expert_stride_bytes: self.gate.group_stride_bytes,
                gate_bias_ptr: args.gate_bias.unwrap_or(0),
                up_ptr: up.ptr,
                up_stride_bytes: self.up.stride_bytes,
                up_expert_stride_bytes: self.up.group_stride_bytes,
                up_bias_ptr: args.up_bias.unwrap_or(0),
                bias_stride_bytes: self.bias.group_stride_bytes,
                out_ptr: out.ptr,
                out_stride_bytes: self.out.stride_bytes,
                out_group_stride_bytes: if listed.is_some() { 0 } else { self.out.group_stride_bytes },
                tiles_ptr,
                tile_count_ptr,
                num_groups: self.num_groups as u32, // at most 2^31 - 1, seen by `new`
                group_rows,
                group_tiles: pass.group_tiles,
                col_tiles: pass.col_tiles,
                super_units: instance.super_tiles * pass.col_tiles,
                k: self.inputs,
                n: self.outputs,
                stages: pass.stages,
                pairs: u32::from(pairs),
                activation: self.activation.kind,
                slope: f32::from_bits(self.activation.slope),
                cubic: f32::from_bits(self.activation.cubic),
                limit: f32::from_bits(self.activation.limit),
                up_offset: f32::from_bits(self.activation.up_offset),
            };
            let mut launch = Launch::grid([pass.grid, 1, 1]);
            launch.dynamic_shared_bytes = pass.stages * instance.stage_bytes;
            // SAFETY: pointers are not null and aligned as the kernel requires, checked above; that they hold what the plan
            // describes, and the rest, is the caller's promise.
            unsafe { driver.launch(&instance.kernel, &launch, &params.to_bytes(), stream)? };
        }
        Ok(())
    }
}

impl Pass {
    fn kernel(&self) -> &'static Kernel {
        &kernels::INSTANCES[self.instance].kernel
    }
}

fn wrong_dtype(argument: &str, expected: &str, found: Dtype) -> Error {
    Error::Dtype { argument: argument.into(), expected: expected.into(), found: found.to_string() }
}

/// What the choice of kernel and grid depends on.
struct Choice<'a> {
    dtype: Dtype,
    out_dtype: Dtype,
    tf32: bool,
    gated: bool,
    transposed: bool,
    outputs: usize,
    limits: &'a Limits,
}

impl Choice<'_> {
    fn instance(&self, class: usize) -> Result<usize> {
        self.find(class).ok_or_else(|| {
            let case =
                "transposed weights with a gate, listed rows, tiles of 32 or 128 rows, tf32, or another type of the result";
            Error::unsupported("cuda", case) // all others there are, which a test holds
        })
    }

    /// Index of the instance, if there is one.
    fn find(&self, class: usize) -> Option<usize> {
        kernels::INSTANCES.iter().position(|i| {
            let tile = i.gated == self.gated && i.transposed == self.transposed && i.tile_m as usize == CLASSES[class];
            tile && i.dtype == self.dtype && i.out == self.out_dtype && i.tf32 == self.tf32
        })
    }

    /// The class for groups of so many rows: the smallest tile that takes them at once, or the largest; smaller ones where that
    /// leaves multiprocessors without work, because their CTAs are done sooner.
    fn class(&self, num_groups: usize, rows: usize) -> Result<usize> {
        let first = CLASSES.iter().position(|tile| rows <= *tile).unwrap_or(CLASSES.len() - 1);
        let mut smallest = None;
        for class in (0..=first).rev() {
            let Some(index) = self.find(class) else { continue };
            let col_tiles = self.outputs.div_ceil(kernels::INSTANCES[index].tile_cols as usize);
            let units = rows.div_ceil(CLASSES[class]).saturating_mul(num_groups).saturating_mul(col_tiles);
            if units >= self.limits.num_sms as usize {
                return Ok(class);
            }
            smallest = Some(class);
        }
        smallest.map_or_else(|| self.instance(first).map(|_| first), Ok)
    }

    /// The launch for at most so many row tiles.
    fn pass(&self, class: usize, tiles: usize, group_tiles: usize) -> Result<Pass> {
        let index = self.instance(class)?;
        let instance = &kernels::INSTANCES[index];
        let col_tiles = self.outputs.div_ceil(instance.tile_cols as usize);
        // A unit's number, and the next one of a CTA, fit 32 bits.
        let units = tiles.saturating_mul(col_tiles);
        if units > 1 << 31 {
            return Err(Error::unsupported("cuda", format!("{tiles} x {col_tiles} tiles in one product")));
        }
        let (stages, ctas) = self.stages(instance)?;
        let grid = (units as u32).min(self.limits.num_sms.max(1).saturating_mul(ctas));
        let (col_tiles, group_tiles) = (col_tiles as u32, group_tiles as u32); // factors of `units`
        Ok(Pass { instance: index, stages, col_tiles, group_tiles, grid })
    }

    /// Stages of the ring, and CTAs on a multiprocessor: the deeper ring where it costs no CTA.
    fn stages(&self, instance: &kernels::Instance) -> Result<(u32, u32)> {
        // A multiprocessor has 1 KiB more than its largest CTA, and every CTA takes 1 KiB more than it asks for.
        const RESERVED: u32 = 1 << 10;
        let ctas = |stages: u32| {
            ((self.limits.shared_bytes + RESERVED) / (stages * instance.stage_bytes + RESERVED)).min(instance.ctas)
        };
        let stages =
            if ctas(instance.deep_stages) == ctas(instance.stages) { instance.deep_stages } else { instance.stages };
        if ctas(stages) == 0 {
            let (needed, found) = (instance.stages * instance.stage_bytes, self.limits.shared_bytes);
            return Err(Error::unsupported("cuda", format!("CTAs with {found} bytes of shared memory, not {needed}")));
        }
        Ok((stages, ctas(stages)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Limits = Limits::new(90, 132, 227 << 10);
    const A100: Limits = Limits::new(80, 108, 163 << 10);
    const RTX: Limits = Limits::new(89, 128, 99 << 10);

    fn good() -> GroupedGemm {
        GroupedGemm::linear(Dtype::BF16, 3, 8, 16)
    }

    #[test]
    fn kernels_by_size() {
        let kernels = |problem: &GroupedGemm| -> Vec<&str> {
            let plan = GroupedGemmPlan::new(problem, &H200).unwrap();
            plan.kernels().map(|name| name.trim_start_matches("gatefold_grouped_gemm_")).collect()
        };
        assert_eq!(kernels(&GroupedGemm::linear(Dtype::BF16, 16, 4096, 4096)), ["bf16_m16"]);
        assert_eq!(kernels(&GroupedGemm::linear(Dtype::F16, 4096, 4096, 4096)), ["f16_m128"]);
        assert_eq!(kernels(&GroupedGemm::linear(Dtype::F16, 128, 4096, 4096)), ["f16_m32"], "few tiles: smaller ones");
        assert_eq!(kernels(&GroupedGemm { tile_rows: Some(64), ..good() }), ["bf16_m64"]);
        assert_eq!(kernels(&GroupedGemm { out_dtype: Dtype::F32, ..good() }), ["bf16_f32_m16"]);
        assert_eq!(kernels(&GroupedGemm::linear(Dtype::F32, 0, 8, 16)), [""; 0]);
        let tf32 = |dtype| GroupedGemm { f32_products: F32Products::Tf32, ..GroupedGemm::linear(dtype, 3, 8, 16) };
        assert_eq!(kernels(&tf32(Dtype::F32)), ["tf32_m16"]);
        assert_eq!(kernels(&tf32(Dtype::BF16)), ["bf16_m16"], "the option is for f32");
        let experts = |rows| GroupedGemm {
            gated: true,
            activation: Some(Activation::Silu),
            ..GroupedGemm::experts(Dtype::BF16, 128, rows, 768, 2048)
        };
        assert_eq!(kernels(&experts(8)), ["bf16_m16_gated"]);
        assert_eq!(kernels(&experts(17)), ["bf16_m16_gated", "bf16_m32_gated"]);
        let all = ["bf16_m16_gated", "bf16_m32_gated", "bf16_m64_gated", "bf16_m128_gated"];
        assert_eq!(kernels(&experts(4096 * 8)), all);
    }

    /// Every combination of types, gate and tf32 has a kernel for each class of row tiles.
    #[test]
    fn nothing_is_missing() {
        let types = [Dtype::BF16, Dtype::F16].map(|dtype| [(dtype, dtype, false), (dtype, Dtype::F32, false)]);
        let f32_types = [false, true].map(|tf32| (Dtype::F32, Dtype::F32, tf32));
        for (dtype, out_dtype, tf32) in types.into_iter().flatten().chain(f32_types) {
            for gated in [false, true] {
                let choice = Choice { dtype, out_dtype, tf32, gated, transposed: false, outputs: 8, limits: &H200 };
                (0..CLASSES.len())
                    .for_each(|class| assert!(choice.find(class).is_some(), "{dtype} {out_dtype} {class}"));
            }
        }
    }

    #[test]
    fn rings_fit_every_device() {
        for (index, instance) in kernels::INSTANCES.iter().enumerate() {
            for limits in [&RTX, &A100, &H200] {
                let choice = Choice {
                    dtype: instance.dtype,
                    out_dtype: instance.out,
                    tf32: instance.tf32,
                    gated: instance.gated,
                    transposed: instance.transposed,
                    outputs: 4096,
                    limits,
                };
                let class = CLASSES.iter().position(|class| *class == instance.tile_m as usize).unwrap();
                let pass = choice.pass(class, 1000, 0).unwrap();
                assert_eq!(pass.instance, index);
                let bytes = pass.stages * instance.stage_bytes;
                assert!(bytes <= limits.shared_bytes);
                let ctas = pass.grid.div_ceil(limits.num_sms);
                assert!(ctas * (bytes + 1024) <= limits.shared_bytes + 1024, "{}: {ctas}", instance.kernel.entry);
            }
        }
        let stages = |limits| {
            let choice = Choice {
                dtype: Dtype::BF16,
                out_dtype: Dtype::BF16,
                tf32: false,
                gated: false,
                transposed: false,
                outputs: 4096,
                limits,
            };
            let pass = choice.pass(3, 1000, 0).unwrap();
            (pass.stages, pass.grid)
        };
        assert_eq!(stages(&RTX), (3, 128));
        assert_eq!(stages(&A100), (4, 108), "one CTA either way: the deeper ring");
        assert_eq!(stages(&H200), (3, 264), "two CTAs");
        let none = GroupedGemmPlan::new(&good(), &Limits::new(75, 40, 32 << 10)).unwrap_err();
        assert_eq!(none.to_string(), "unsupported by cuda: CTAs with 32768 bytes of shared memory, not 61440");
    }

    #[test]
    fn room_for_tiles() {
        assert_eq!(max_tiles(0, 8), 0);
        assert_eq!(max_tiles(5, 8), 5);
        assert_eq!(max_tiles(129, 1), 2);
        assert_eq!(max_tiles(1000, 4), 11);
        // Against every share of 300 rows between two groups
        for first in 0..=300usize {
            for class in CLASSES {
                let tiles = |rows: usize| match CLASSES.iter().find(|tile| rows <= **tile).unwrap_or(&128) {
                    found if *found == class => rows.div_ceil(class),
                    _ => 0,
                };
                assert!(tiles(first) + tiles(300 - first) <= tiles_of(class, 300, 2), "{class}: {first}");
            }
        }
    }

    #[test]
    fn bad_arguments() {
        let message = |problem: GroupedGemm| GroupedGemmPlan::new(&problem, &H200).unwrap_err().to_string();
        assert_eq!(
            message(GroupedGemm { dtype: Dtype::F64, ..good() }),
            "`a, gate and up` has element type f64, expected bf16, f16 or f32"
        );
        assert_eq!(
            message(GroupedGemm { out_dtype: Dtype::F16, ..good() }),
            "`out` has element type f16, expected bf16 or f32"
        );
        assert_eq!(
            message(GroupedGemm { inputs: 12, ..good() }),
            "`inputs` is 12, expected a multiple of 8 (16 bytes)"
        );
        assert_eq!(message(GroupedGemm { outputs: 0, ..good() }), "`outputs` is 0, expected 1 to 1073741824");
        assert_eq!(
            message(GroupedGemm { a_stride: 20, ..good() }),
            "`a` has strides [0, 20, 1], expected multiples of 8 elements, so that every row begins at a multiple of 16 bytes"
        );
        assert_eq!(
            message(GroupedGemm { out_stride: 7, ..good() }),
            "`out` has strides [7, 1], expected rows that do not overlap (at least 8 apart)"
        );
        assert_eq!(
            message(GroupedGemm { gated: true, ..good() }),
            "`activation` is none, expected one, because there is a gate"
        );
        let clamped = Some(Activation::SwigluClamped { alpha: 1.0, limit: 1.0 });
        assert_eq!(
            message(GroupedGemm { activation: clamped, ..good() }),
            "`activation` is SwigluClamped, expected another one for a plain product"
        );
        assert_eq!(
            message(GroupedGemm { tile_rows: Some(48), ..good() }),
            "`tile_rows` is 48, expected 16, 32, 64 or 128"
        );
        let two = GroupedGemm { num_groups: 2, out_group_stride: 8, ..good() };
        assert_eq!(message(two), "`out` has strides [8, 8, 1], expected rows that do not overlap");
        let tf32 = GroupedGemm { dtype: Dtype::F32, out_dtype: Dtype::F32, f32_products: F32Products::Tf32, ..good() };
        let transposed = message(GroupedGemm { transposed: true, ..tf32 });
        assert!(transposed.starts_with("unsupported by cuda: transposed weights with"), "{transposed}");
    }
}
