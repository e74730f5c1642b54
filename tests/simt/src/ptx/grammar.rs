//! Which modifiers each opcode takes: one table, read by the decoder and by the test that asks for a test of every entry.
//!
//! A row is `(opcode, form, slots)`. Slots are in the order of the PTX ISA's syntax line; `a|b` are alternatives, `?`
//! marks a slot that may be absent. The form names the row for the decoder.

use std::collections::HashMap;
use std::sync::OnceLock;

use super::types::Ty;

const INT: &str = "u16|u32|u64|s16|s32|s64";
const CMP_INT: &str = "eq|ne|lt|le|gt|ge|lo|ls|hi|hs";
const CMP_FLOAT: &str = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan";
const SHARED: &str = "shared|shared::cta";
const SPACES: &str = "global|shared|shared::cta|shared::cluster|local|const|param";
const STORE_SPACES: &str = "global|shared|shared::cta|shared::cluster|local";
const ATOM_SPACES: &str = "global|shared|shared::cta|shared::cluster";
const MEM_TYPES: &str = "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64";
const L1_EVICT: &str = "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate";
const L2_EVICT: &str = "L2::evict_normal|L2::evict_first|L2::evict_last";
const PREFETCH: &str = "L2::64B|L2::128B|L2::256B";
const SCOPE: &str = "cta|cluster|gpu|sys";
const RND: &str = "rn|rz|rm|rp";
/// 9.7.15.2: integers have fewer shapes.
const WGMMA_INT: &str = "m64n8k32|m64n16k32|m64n24k32|m64n32k32|m64n48k32|m64n64k32|m64n80k32|m64n96k32|m64n112k32|m64n128k32|\
    m64n144k32|m64n160k32|m64n176k32|m64n192k32|m64n208k32|m64n224k32|m64n240k32|m64n256k32";

/// The table. Upper-case words stand for the lists above.
const TABLE: &[(&str, &str, &str)] = &[
    // PTX ISA 9.7.1 integer arithmetic
    ("add", "int", "sat? INT"),
    ("sub", "int", "sat? INT"),
    ("mul", "int", "lo|hi|wide INT"),
    ("mad", "int", "lo|hi|wide INT"),
    ("div", "int", "INT"),
    ("rem", "int", "INT"),
    ("min", "int", "INT"),
    ("max", "int", "INT"),
    ("abs", "int", "s16|s32|s64"),
    ("neg", "int", "s16|s32|s64"),
    ("popc", "int", "b32|b64"),
    ("clz", "int", "b32|b64"),
    ("brev", "int", "b32|b64"),
    ("bfe", "int", "u32|u64|s32|s64"),
    ("bfi", "int", "b32|b64"),
    // 9.7.8 logic and shift
    ("and", "int", "pred|b16|b32|b64"),
    ("or", "int", "pred|b16|b32|b64"),
    ("xor", "int", "pred|b16|b32|b64"),
    ("not", "int", "pred|b16|b32|b64"),
    ("shl", "int", "b16|b32|b64"),
    ("shr", "int", "b16|b32|b64|u16|u32|u64|s16|s32|s64"),
    ("shf", "int", "l|r wrap|clamp b32"),
    ("lop3", "int", "b32"),
    ("prmt", "int", "b32"),
    // 9.7.3 f32, 9.7.4 half precision
    ("add", "f32", "rn? ftz? sat? f32"),
    ("sub", "f32", "rn? ftz? sat? f32"),
    ("mul", "f32", "rn? ftz? sat? f32"),
    ("fma", "f32", "rn ftz? sat? f32"),
    ("add", "half", "rn? ftz? sat? f16|f16x2"),
    ("sub", "half", "rn? ftz? sat? f16|f16x2"),
    ("mul", "half", "rn? ftz? sat? f16|f16x2"),
    ("add", "bf16", "rn? bf16|bf16x2"),
    ("sub", "bf16", "rn? bf16|bf16x2"),
    ("mul", "bf16", "rn? bf16|bf16x2"),
    ("fma", "half", "rn ftz? sat|relu? f16|f16x2"),
    ("fma", "bf16", "rn relu? bf16|bf16x2"),
    ("min", "f32", "ftz? NaN? f32"),
    ("max", "f32", "ftz? NaN? f32"),
    ("min", "half", "ftz? NaN? f16|f16x2"),
    ("max", "half", "ftz? NaN? f16|f16x2"),
    ("min", "bf16", "NaN? bf16|bf16x2"),
    ("max", "bf16", "NaN? bf16|bf16x2"),
    ("abs", "float", "ftz? f32|f16|f16x2"),
    ("neg", "float", "ftz? f32|f16|f16x2"),
    ("abs", "bf16", "bf16|bf16x2"),
    ("neg", "bf16", "bf16|bf16x2"),
    ("div", "f32", "full|approx|rn ftz? f32"),
    ("sqrt", "f32", "approx|rn ftz? f32"),
    ("rcp", "f32", "approx|rn ftz? f32"),
    ("rsqrt", "f32", "approx ftz? f32"),
    ("ex2", "f32", "approx ftz? f32"),
    ("ex2", "half", "approx f16|f16x2"),
    ("ex2", "bf16", "approx ftz bf16|bf16x2"),
    ("lg2", "f32", "approx ftz? f32"),
    ("sin", "f32", "approx ftz? f32"),
    ("cos", "f32", "approx ftz? f32"),
    ("tanh", "any", "approx f32|f16|f16x2|bf16|bf16x2"),
    // 9.7.3 f64
    ("add", "f64", "rn? f64"),
    ("sub", "f64", "rn? f64"),
    ("mul", "f64", "rn? f64"),
    ("fma", "f64", "rn f64"),
    ("div", "f64", "rn f64"),
    ("sqrt", "f64", "rn f64"),
    ("rcp", "f64", "rn f64"),
    ("min", "f64", "f64"),
    ("max", "f64", "f64"),
    ("abs", "f64", "f64"),
    ("neg", "f64", "f64"),
    // 9.7.6, 9.7.7 comparison and selection
    ("setp", "int", "CMP_INT and|or|xor? b16|b32|b64|u16|u32|u64|s16|s32|s64"),
    ("setp", "float", "CMP_FLOAT and|or|xor? ftz? f32|f16"),
    ("setp", "float", "CMP_FLOAT and|or|xor? bf16"),
    ("setp", "f64", "CMP_FLOAT and|or|xor? f64"),
    ("set", "int", "CMP_INT and|or|xor? u32|s32|f32 b16|b32|b64|u16|u32|u64|s16|s32|s64"),
    ("set", "float", "CMP_FLOAT and|or|xor? ftz? u32|s32|f32 f32"),
    ("selp", "any", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"),
    ("slct", "int", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32 s32"),
    ("slct", "float", "ftz? b16|b32|b64|u16|u32|u64|s16|s32|s64|f32 f32"),
    // 9.7.9 data movement and conversion
    ("mov", "any", "pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"),
    ("cvt", "int", "sat? u8|u16|u32|u64|s8|s16|s32|s64 u8|u16|u32|u64|s8|s16|s32|s64"),
    ("cvt", "to_int", "rni|rzi|rmi|rpi ftz? sat? u8|u16|u32|u64|s8|s16|s32|s64 f32|f16"),
    ("cvt", "to_int", "rni|rzi|rmi|rpi INT bf16"),
    ("cvt", "from_int", "RND sat? f32|f16 u8|u16|u32|u64|s8|s16|s32|s64"),
    ("cvt", "from_int", "RND bf16 INT"),
    ("cvt", "widen", "ftz? sat? f32 f16"),
    ("cvt", "widen", "f32 bf16"),
    ("cvt", "f64", "f64 f32"),
    ("cvt", "f64", "rn f32 f64"),
    ("cvt", "f64", "rn f64 u32|u64|s32|s64"),
    ("cvt", "round", "rni|rzi|rmi|rpi ftz? sat? f32 f32"),
    ("cvt", "narrow", "rn|rz relu? satfinite? f16|bf16 f32"),
    ("cvt", "narrow", "rm|rp f16|bf16 f32"),
    ("cvt", "pack", "rn|rz relu? satfinite? f16x2|bf16x2 f32"),
    ("cvt", "tf32", "rna tf32 f32"),
    ("cvt", "tf32", "rn|rz relu? tf32 f32"),
    ("cvt", "pack8", "rn satfinite relu? e4m3x2|e5m2x2 f32|f16x2"),
    ("cvt", "unpack8", "rn relu? f16x2 e4m3x2|e5m2x2"),
    ("cvta", "any", "to? global|shared|shared::cta|shared::cluster|local|const|param u64"),
    ("isspacep", "any", "global|shared|shared::cta|shared::cluster|local|param"),
    ("ld", "weak", "weak? SPACES? L1_EVICT? L2_EVICT? L2::cache_hint? PREFETCH? v2|v4|v8? MEM_TYPES"),
    ("ld", "weak", "SPACES? nc L1_EVICT? L2_EVICT? L2::cache_hint? PREFETCH? v2|v4|v8? MEM_TYPES"),
    ("ld", "cop", "weak? STORE_SPACES? ca|cg|cs|lu|cv L2::cache_hint? PREFETCH? v2|v4|v8? MEM_TYPES"),
    ("ld", "cop", "STORE_SPACES? ca|cg|cs nc L2::cache_hint? PREFETCH? v2|v4|v8? MEM_TYPES"),
    ("ld", "volatile", "volatile ATOM_SPACES? v2|v4? MEM_TYPES"),
    ("ld", "strong", "relaxed|acquire SCOPE ATOM_SPACES? v2|v4? MEM_TYPES"),
    ("st", "weak", "weak? STORE_SPACES? L1_EVICT? L2_EVICT? L2::cache_hint? v2|v4|v8? MEM_TYPES"),
    ("st", "cop", "weak? STORE_SPACES? wb|cg|cs|wt L2::cache_hint? v2|v4|v8? MEM_TYPES"),
    ("st", "volatile", "volatile ATOM_SPACES? v2|v4? MEM_TYPES"),
    ("st", "strong", "relaxed|release SCOPE ATOM_SPACES? v2|v4? MEM_TYPES"),
    ("prefetch", "any", "global? L1|L2|L2::evict_last|L2::evict_normal"),
    ("prefetch", "tensormap", "param? tensormap"),
    (
        "createpolicy",
        "any",
        "fractional L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged L2::evict_first|L2::evict_unchanged? b64",
    ),
    ("discard", "any", "global? L2"),
    ("mapa", "any", "shared::cluster? u32|u64"),
    ("getctarank", "any", "shared::cluster? u32|u64"),
    // 9.7.13 synchronisation
    ("atom", "int", "relaxed|acquire|release|acq_rel? SCOPE? ATOM_SPACES? add|min|max u32|u64|s32|s64"),
    ("atom", "bits", "relaxed|acquire|release|acq_rel? SCOPE? ATOM_SPACES? and|or|xor|exch|cas b32|b64"),
    ("atom", "wrap", "relaxed|acquire|release|acq_rel? SCOPE? ATOM_SPACES? inc|dec u32"),
    ("atom", "float", "relaxed|acquire|release|acq_rel? SCOPE? ATOM_SPACES? add f32"),
    ("atom", "half", "relaxed|acquire|release|acq_rel? SCOPE? ATOM_SPACES? add noftz f16|f16x2|bf16|bf16x2"),
    ("red", "int", "relaxed|release? SCOPE? ATOM_SPACES? add|min|max u32|u64|s32|s64"),
    ("red", "bits", "relaxed|release? SCOPE? ATOM_SPACES? and|or|xor b32|b64"),
    ("red", "wrap", "relaxed|release? SCOPE? ATOM_SPACES? inc|dec u32"),
    ("red", "float", "relaxed|release? SCOPE? ATOM_SPACES? add f32"),
    ("red", "half", "relaxed|release? SCOPE? ATOM_SPACES? add noftz f16|f16x2|bf16|bf16x2"),
    ("bar", "warp", "warp sync"),
    ("bar", "cta", "cta? sync|arrive"),
    ("bar", "red_pred", "cta? red and|or pred"),
    ("bar", "red_popc", "cta? red popc u32"),
    ("barrier", "cta", "cta? sync|arrive aligned?"),
    ("barrier", "red_pred", "cta? red and|or aligned? pred"),
    ("barrier", "red_popc", "cta? red popc aligned? u32"),
    ("barrier", "cluster_arrive", "cluster arrive release|relaxed? aligned?"),
    ("barrier", "cluster_wait", "cluster wait acquire? aligned?"),
    ("membar", "any", "cta|gl|sys"),
    ("fence", "thread", "sc|acq_rel? SCOPE"),
    ("fence", "mbarrier_init", "mbarrier_init release cluster"),
    ("fence", "proxy_async", "proxy async global|shared::cta|shared::cluster?"),
    ("shfl", "any", "sync up|down|bfly|idx b32"),
    ("vote", "pred", "sync all|any|uni pred"),
    ("vote", "ballot", "sync ballot b32"),
    ("match", "any", "any|all sync b32|b64"),
    ("redux", "arith", "sync add|min|max u32|s32"),
    ("redux", "bits", "sync and|or|xor b32"),
    ("activemask", "any", "b32"),
    ("elect", "any", "sync"),
    // 9.7.9.25 asynchronous copies
    ("cp", "async", "async ca|cg shared|shared::cta global L2::cache_hint? PREFETCH?"),
    ("cp", "commit", "async commit_group"),
    ("cp", "wait", "async wait_group"),
    ("cp", "wait_all", "async wait_all"),
    ("cp", "mbarrier", "async mbarrier arrive noinc? shared|shared::cta? b64"),
    // 9.7.14 matrices
    ("ldmatrix", "any", "sync aligned m8n8 x1|x2|x4 trans? SHARED? b16"),
    ("stmatrix", "any", "sync aligned m8n8 x1|x2|x4 trans? SHARED? b16"),
    ("movmatrix", "any", "sync aligned m8n8 trans b16"),
    ("mma", "f16", "sync aligned m16n8k8|m16n8k16 row col f16|f32 f16 f16 f16|f32"),
    ("mma", "bf16", "sync aligned m16n8k8|m16n8k16 row col f32 bf16 bf16 f32"),
    ("mma", "tf32", "sync aligned m16n8k4|m16n8k8 row col f32 tf32 tf32 f32"),
    ("mma", "int", "sync aligned m16n8k16|m16n8k32 row col satfinite? s32 u8|s8 u8|s8 s32"),
    ("mma", "fp8", "sync aligned m16n8k32 row col f32 e4m3|e5m2 e4m3|e5m2 f32"),
    // 9.7.13.15 mbarrier
    ("mbarrier", "init", "init SHARED? b64"),
    ("mbarrier", "inval", "inval SHARED? b64"),
    // an order and its scope stand together or not at all
    ("mbarrier", "tx", "expect_tx|complete_tx shared|shared::cta|shared::cluster? b64"),
    ("mbarrier", "tx", "expect_tx|complete_tx relaxed cta|cluster shared|shared::cta|shared::cluster? b64"),
    ("mbarrier", "arrive", "arrive|arrive_drop shared|shared::cta|shared::cluster? b64"),
    ("mbarrier", "arrive", "arrive|arrive_drop release|relaxed cta|cluster shared|shared::cta|shared::cluster? b64"),
    ("mbarrier", "arrive_tx", "arrive|arrive_drop expect_tx shared|shared::cta|shared::cluster? b64"),
    (
        "mbarrier",
        "arrive_tx",
        "arrive|arrive_drop expect_tx release|relaxed cta|cluster shared|shared::cta|shared::cluster? b64",
    ),
    ("mbarrier", "no_complete", "arrive|arrive_drop noComplete SHARED? b64"),
    ("mbarrier", "no_complete", "arrive|arrive_drop noComplete release cta SHARED? b64"),
    ("mbarrier", "wait", "test_wait|try_wait SHARED? b64"),
    ("mbarrier", "wait", "test_wait|try_wait acquire|relaxed cta|cluster SHARED? b64"),
    ("mbarrier", "wait_parity", "test_wait|try_wait parity SHARED? b64"),
    ("mbarrier", "wait_parity", "test_wait|try_wait parity acquire|relaxed cta|cluster SHARED? b64"),
    ("mbarrier", "pending", "pending_count b64"),
    // 9.7.9.25.4, 9.7.9.25.5, 9.7.9.27 bulk and tensor copies
    (
        "cp",
        "bulk_load",
        "async bulk shared::cluster global mbarrier::complete_tx::bytes multicast::cluster? L2::cache_hint?",
    ),
    ("cp", "bulk_load", "async bulk shared::cta global mbarrier::complete_tx::bytes L2::cache_hint?"),
    ("cp", "bulk_peer", "async bulk shared::cluster shared::cta mbarrier::complete_tx::bytes"),
    ("cp", "bulk_store", "async bulk global shared::cta bulk_group L2::cache_hint?"),
    ("cp", "bulk_reduce", "reduce async bulk global shared::cta bulk_group L2::cache_hint? add u32|s32|u64|f32"),
    ("cp", "bulk_reduce", "reduce async bulk global shared::cta bulk_group L2::cache_hint? add noftz f16|bf16"),
    (
        "cp",
        "bulk_reduce",
        "reduce async bulk global shared::cta bulk_group L2::cache_hint? min|max u32|s32|u64|s64|f16|bf16",
    ),
    ("cp", "bulk_reduce", "reduce async bulk global shared::cta bulk_group L2::cache_hint? inc|dec u32"),
    ("cp", "bulk_reduce", "reduce async bulk global shared::cta bulk_group L2::cache_hint? and|or|xor b32|b64"),
    ("cp", "bulk_prefetch", "async bulk prefetch L2 global L2::cache_hint?"),
    ("cp", "bulk_commit", "async bulk commit_group"),
    ("cp", "bulk_wait", "async bulk wait_group read?"),
    (
        "cp",
        "tensor_load",
        "async bulk tensor DIM shared::cluster global tile? mbarrier::complete_tx::bytes multicast::cluster? L2::cache_hint?",
    ),
    (
        "cp",
        "tensor_load",
        "async bulk tensor DIM shared::cta global tile? mbarrier::complete_tx::bytes L2::cache_hint?",
    ),
    ("cp", "tensor_store", "async bulk tensor DIM global shared::cta tile? bulk_group L2::cache_hint?"),
    (
        "cp",
        "tensor_reduce",
        "reduce async bulk tensor DIM global shared::cta add|min|max|and|or|xor|inc|dec tile? bulk_group L2::cache_hint?",
    ),
    ("cp", "tensor_prefetch", "async bulk prefetch tensor DIM L2 global tile? L2::cache_hint?"),
    ("st", "async", "async weak? shared::cluster? mbarrier::complete_tx::bytes v2|v4? b32|b64|u32|u64|s32|s64|f32"),
    // 9.7.15 wgmma
    ("wgmma", "sync", "fence|commit_group|wait_group sync aligned"),
    ("wgmma", "half", "mma_async sync aligned WGMMA_K16 f16|f32 f16 f16"),
    ("wgmma", "bf16", "mma_async sync aligned WGMMA_K16 f32 bf16 bf16"),
    ("wgmma", "tf32", "mma_async sync aligned WGMMA_K8 f32 tf32 tf32"),
    ("wgmma", "fp8", "mma_async sync aligned WGMMA_K32 f16|f32 e4m3|e5m2 e4m3|e5m2"),
    ("wgmma", "int", "mma_async sync aligned WGMMA_INT satfinite? s32 u8|s8 u8|s8"),
    ("setmaxnreg", "any", "inc|dec sync aligned u32"),
    ("griddepcontrol", "any", "launch_dependents|wait"),
    // 9.7.12 control flow
    ("bra", "any", "uni?"),
    ("ret", "any", "uni?"),
    ("exit", "any", ""),
    ("trap", "any", ""),
    ("nanosleep", "any", "u32"),
];

/// One row, taken apart.
pub(crate) struct Form {
    pub opcode: &'static str,
    pub form: &'static str,
    pub slots: Vec<Slot>,
}

pub(crate) struct Slot {
    pub choices: Vec<&'static str>,
    pub optional: bool,
}

/// The shapes of wgmma with one k: every n from 8 to 256 in steps of 8.
fn wgmma_shapes(k: u32) -> &'static str {
    static SHAPES: OnceLock<[String; 3]> = OnceLock::new();
    let all = SHAPES.get_or_init(|| {
        [8, 16, 32].map(|k| (1..=32).map(|n| format!("m64n{}k{k}", 8 * n)).collect::<Vec<_>>().join("|"))
    });
    &all[k.trailing_zeros() as usize - 3]
}

fn expand(word: &'static str) -> Vec<&'static str> {
    word.split('|')
        .flat_map(|part| match part {
            "INT" => INT.split('|'),
            "CMP_INT" => CMP_INT.split('|'),
            "CMP_FLOAT" => CMP_FLOAT.split('|'),
            "SHARED" => SHARED.split('|'),
            "SPACES" => SPACES.split('|'),
            "STORE_SPACES" => STORE_SPACES.split('|'),
            "ATOM_SPACES" => ATOM_SPACES.split('|'),
            "MEM_TYPES" => MEM_TYPES.split('|'),
            "L1_EVICT" => L1_EVICT.split('|'),
            "L2_EVICT" => L2_EVICT.split('|'),
            "PREFETCH" => PREFETCH.split('|'),
            "SCOPE" => SCOPE.split('|'),
            "RND" => RND.split('|'),
            "DIM" => "1d|2d|3d|4d|5d".split('|'),
            "WGMMA_K8" => wgmma_shapes(8).split('|'),
            "WGMMA_K16" => wgmma_shapes(16).split('|'),
            "WGMMA_K32" => wgmma_shapes(32).split('|'),
            "WGMMA_INT" => WGMMA_INT.split('|'),
            other => other.split('|'),
        })
        .collect()
}

/// The rows, by opcode.
pub(crate) fn forms() -> &'static HashMap<&'static str, Vec<Form>> {
    static FORMS: OnceLock<HashMap<&'static str, Vec<Form>>> = OnceLock::new();
    FORMS.get_or_init(|| {
        let mut map: HashMap<&'static str, Vec<Form>> = HashMap::new();
        for &(opcode, form, slots) in TABLE {
            let slots = slots
                .split_whitespace()
                .map(|s| Slot { choices: expand(s.trim_end_matches('?')), optional: s.ends_with('?') })
                .collect();
            map.entry(opcode).or_default().push(Form { opcode, form, slots });
        }
        map
    })
}

/// Every `opcode/form: modifier` that the decoder knows, sorted.
pub(crate) fn all_choices() -> Vec<String> {
    let mut out = vec![];
    for form in forms().values().flatten() {
        if form.slots.is_empty() {
            out.push(format!("{}/{}:", form.opcode, form.form));
        }
        for slot in &form.slots {
            out.extend(slot.choices.iter().map(|c| format!("{}/{}: {c}", form.opcode, form.form)));
        }
    }
    out.sort();
    out.dedup();
    out
}

/// Every choice of modifiers that differs from `mods` in one slot of its row.
pub(crate) fn neighbours(opcode: &str, mods: &[String]) -> Vec<Vec<&'static str>> {
    let mut out = vec![];
    for row in forms().get(opcode).into_iter().flatten() {
        let mut chosen = vec![None; row.slots.len()];
        if fit(&row.slots, mods, &mut chosen).is_err() {
            continue;
        }
        for (i, slot) in row.slots.iter().enumerate() {
            let absent = slot.optional.then_some(None);
            for choice in slot.choices.iter().copied().map(Some).chain(absent).filter(|c| *c != chosen[i]) {
                out.push((0..chosen.len()).filter_map(|j| if i == j { choice } else { chosen[j] }).collect());
            }
        }
        break;
    }
    out
}

/// The modifiers of one instruction, matched to a row.
pub(crate) struct Mods {
    pub opcode: &'static str,
    pub form: &'static str,
    chosen: Vec<Option<&'static str>>,
}

impl Mods {
    /// Finds the row of `opcode` that takes exactly `mods`.
    pub(crate) fn find(opcode: &str, mods: &[String]) -> Result<Mods, String> {
        let Some(rows) = forms().get(opcode) else { return Err(format!("unknown instruction `{opcode}`")) };
        let mut furthest = 0;
        for row in rows {
            let mut chosen = vec![None; row.slots.len()];
            match fit(&row.slots, mods, &mut chosen) {
                Ok(()) => return Ok(Mods { opcode: row.opcode, form: row.form, chosen }),
                Err(n) => furthest = furthest.max(n),
            }
        }
        Err(match mods.get(furthest) {
            Some(m) => format!("`{opcode}` does not take modifier `.{m}` there"),
            None => format!("`{opcode}` lacks a modifier at its end"),
        })
    }

    /// Is this modifier present?
    pub(crate) fn has(&self, name: &str) -> bool {
        self.chosen.iter().flatten().any(|c| *c == name)
    }

    /// Is there a hint to the caches, a cache operator excepted?
    pub(crate) fn hinted(&self) -> bool {
        self.chosen.iter().flatten().any(|c| c.starts_with("L1::") || c.starts_with("L2::"))
    }

    /// The modifier in slot `i` of the row.
    pub(crate) fn slot(&self, i: usize) -> Option<&'static str> {
        self.chosen[i]
    }

    /// The first of `names` that is present.
    pub(crate) fn one_of(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|n| self.has(n))
    }

    /// The type in the `n`-th slot from the end.
    pub(crate) fn ty(&self, n: usize) -> Ty {
        let name = self.chosen[self.chosen.len() - 1 - n];
        name.and_then(Ty::parse).expect("the grammar has a type in this slot")
    }

    /// `opcode/form: modifier` for each modifier present.
    pub(crate) fn choices(&self) -> impl Iterator<Item = String> + '_ {
        let bare = self.chosen.is_empty().then(|| format!("{}/{}:", self.opcode, self.form));
        self.chosen.iter().flatten().map(|c| format!("{}/{}: {c}", self.opcode, self.form)).chain(bare)
    }
}

/// Fits `mods` to `slots`; on failure, how many modifiers fitted. Tries to skip an optional slot even where it would match.
fn fit(slots: &[Slot], mods: &[String], chosen: &mut [Option<&'static str>]) -> Result<(), usize> {
    let Some(slot) = slots.first() else {
        return if mods.is_empty() { Ok(()) } else { Err(0) };
    };
    let mut best = 0;
    if let Some(m) = mods.first()
        && let Some(choice) = slot.choices.iter().find(|c| *c == m)
    {
        chosen[0] = Some(choice);
        match fit(&slots[1..], &mods[1..], &mut chosen[1..]) {
            Ok(()) => return Ok(()),
            Err(n) => best = n + 1,
        }
        chosen[0] = None;
    }
    if slot.optional {
        match fit(&slots[1..], mods, &mut chosen[1..]) {
            Ok(()) => return Ok(()),
            Err(n) => best = best.max(n),
        }
    }
    Err(best)
}
