//! Texts that are wrong, each in one place: the simulator refuses them with a message of its own (`refused.rs`), and so does ptxas
//! (`assemble.rs`), which is how we know that they are wrong. Found by comparing both on small changes to a kernel.

/// Where the change stands: in the body, the parameters, behind them, or before the kernel; and a part of our message.
pub const TEXTS: &[(&str, &str, &str)] = &[
    // Operands
    ("body", "add.u32 a, %tid.x, b;", "`%tid.x` is read by `mov`"),
    ("body", "cvt.rn.f32.u32 x, %tid.x;", "`%tid.x` is read by `mov`"),
    ("body", "st.global.u32 [d], %ctaid.x;", "`%ctaid.x` is read by `mov`"),
    ("body", "shfl.sync.bfly.b32 a, %laneid, 1, 31, 0xFFFFFFFF;", "`%laneid` is read by `mov`"),
    ("body", "mov.u64 d, %tid.x;", "`%tid.x` does not fit type U64"),
    ("body", "st.global.v2.b16 [d], {h, a};", "different widths"),
    ("body", "ld.global.v2.u16 {h, a}, [d];", "different widths"),
    ("body", "cvta.to.shared.u64 d, buf;", "`.to` takes a register"),
    ("body", "match.any.sync.b32 x, b, 0xFFFFFFFF;", "`x` has type F32"),
    ("body", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 a, [buf];", "expected 1 registers in braces"),
    ("body", MMA_FLOATS, "`x` has type F32"),
    ("body", MMA_SUM, "the result is f32"),
    ("body", "cvt.rn.bf16x2.f32 x, x, y;", "`x` has type F32"),
    ("body", "cvt.rna.tf32.f32 x, y;", "`x` has type F32"),
    ("body", "ex2.approx.f16x2 a, x;", "`x` has type F32"),
    ("body", "fma.rn.bf16x2 a, x, b, c;", "`x` has type F32"),
    ("body", "redux.sync.and.b32 a, x, 0xFFFFFFFF;", "`x` has type F32"),
    ("body", "bar.warp.sync x;", "`x` has type F32"),
    ("body", "vote.sync.all.pred p, q, x;", "`x` has type F32"),
    ("body", "shfl.sync.idx.b32 a, b, 0, 31, x;", "`x` has type F32"),
    ("body", "mov.b32 a, {h, h, h, h};", "4 parts do not make up type B32"),
    ("body", "cvta.global.u64 d, buf;", "`buf` lies in another state space"),
    ("body", "ld.global.b32 a, [16];", "needs `.local`"),
    ("body", "ld.shared.b32 a, [0];", "needs `.local`"),
    ("body", "ld.global.b32 a, [d - 4];", "an offset is added"),
    ("body", "mov.u32 a, buf - 4;", "an offset is added"),
    // Literals
    ("body", "cp.async.cg.shared.global [buf], [d], 16, 17;", "17 is out of range, expected 0 to 16"),
    ("body", "cp.async.ca.shared.global [buf], [d], 4, 5;", "5 is out of range, expected 0 to 4"),
    ("body", "bar.sync 16;", "16 is out of range, expected 0 to 15"),
    ("body", "bar.arrive 16, 64;", "16 is out of range, expected 0 to 15"),
    ("body", "bar.red.or.pred p, 16, q;", "16 is out of range, expected 0 to 15"),
    ("body", "bar.sync 0, 33;", "33 threads at a barrier"),
    ("body", "barrier.arrive 3, 33;", "33 threads at a barrier"),
    ("body", "bar.red.or.pred p, 0, 33, q;", "33 threads at a barrier"),
    ("body", "bfe.u32 a, b, 256, 4;", "256 is out of range, expected 0 to 255"),
    ("body", "bfe.u32 a, b, 4, -1;", "-1 is out of range, expected 0 to 255"),
    ("body", "bfi.b32 a, b, c, 0, 300;", "300 is out of range, expected 0 to 255"),
    ("body", "createpolicy.fractional.L2::evict_first.b64 d, 1.5;", "a fraction of 1.5"),
    ("body", "createpolicy.fractional.L2::evict_first.b64 d, 0f00000000;", "a fraction of 0"),
    ("body", "add.f32 x, y, 1e400;", "`1e400` is too large"),
    // Declarations
    ("body", ".extern .shared .align 16 .b8 dyn[];", "`.extern` belongs at module level"),
    ("body", ".shared .b8 z[];", "a shared array needs a length"),
    ("body", ".shared .b8 z[0];", "expected a positive number"),
    ("body", ".shared .align 4 .b8 z[4] = {1, 2, 3, 4};", "have an initial value"),
    ("body", ".shared .b8 z[49152];", "more than 49152 bytes of shared memory"),
    ("body", ".reg .bf16 z;", "registers of type Bf16"),
    ("body", ".reg .b32 _;", "`_` cannot be declared"),
    ("body", ".reg .b32 z.w;", "`z.w` cannot be declared"),
    ("body", ".reg .b32 ptr;", "`ptr` is declared twice"),
    ("body", "buf: bra buf;", "`buf` is declared twice"),
    ("body", "a: bra a;", "`a` is declared twice"),
    ("body", "ptr: bra ptr;", "`ptr` is declared twice"),
    ("body", "L: mov.u32 a, b; .reg .b32 L;", "`L` is declared twice"),
    ("body", "L.x: bra L.x;", "`L.x` cannot be a label"),
    ("body", "mov.u32 a, b;;", "expected a statement"),
    ("params", ".param .u32 a", "`a` is declared twice"),
    ("params", ".param .pred z", "a predicate is a register"),
    ("params", "", "expected `.param`"),
    ("directives", ".reqntid 0, 1, 1", "expected a positive number"),
    ("directives", ".maxntid 0", "expected a positive number"),
    ("directives", ".maxnreg 0", "expected a positive number"),
    ("directives", ".maxntid 128 .minnctapersm 0", "expected a positive number"),
    ("directives", ".reqntid 32 .maxntid 64", "exclude each other"),
    ("before", ".global .u32 k;", "`k` is declared twice"),
    ("before", ".visible .entry k() { ret; }", "`k` is declared twice"),
    ("before", ".const .u32 z = 1.0;", "does not fit type U32"),
    ("before", ".const .u32 z[2] = {1, 2, 3};", "more initial values than `z`"),
    ("before", ".version 8.3", "`.version` stands twice"),
    ("before", ".target sm_80", "`.target` stands twice"),
    ("before", ".address_size 64", "`.address_size` stands twice"),
];

const MMA_FLOATS: &str =
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {x, y, x, y}, {x, y, x, y}, {x, y}, {x, y, x, y};";

const MMA_SUM: &str = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f32 {a, b}, {a, b, a, b}, {a, b}, {x, y, x, y};";

/// The whole text. Without a change it is right.
pub fn text(place: &str, change: &str) -> String {
    let at = |here: &str| if here == place { change } else { "" };
    let comma = if place == "params" { ", " } else { "" };
    format!(
        "
.version 8.3
.target sm_80
.address_size 64
{}
.visible .entry k(.param .u64 ptr{comma}{})
{}
{{
    .reg .pred p, q;
    .reg .b16 h;
    .reg .b32 a, b, c;
    .reg .f32 x, y;
    .reg .b64 d;
    .shared .align 16 .b8 buf[64];
    {}
    ret;
}}
",
        at("before"),
        at("params"),
        at("directives"),
        at("body")
    )
}
