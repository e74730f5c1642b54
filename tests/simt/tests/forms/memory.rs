//! Loads, stores, atomics, asynchronous copies (PTX ISA 9.7.9.8 to 9.7.9.25, 9.7.13.5, 9.7.13.6).
//!
//! Bodies may use `in` and `out` (this thread's first slots), `scratch` (4096 bytes of global memory of the block), `tid`.

use simt::model::float::{BF16, F16, Format, Round};

use super::int::{mask, value};
use super::{Domain, Form, Values, block, ident, lane};

pub fn add(all: &mut Vec<Form>) {
    loads(all);
    stores(all);
    spaces(all);
    atomics(all);
    copies(all);
}

const TYPES: [(&str, u32); 13] = [
    ("b8", 8),
    ("b16", 16),
    ("b32", 32),
    ("b64", 64),
    ("u8", 8),
    ("u16", 16),
    ("u32", 32),
    ("u64", 64),
    ("s8", 8),
    ("s16", 16),
    ("s32", 32),
    ("s64", 64),
    ("f32", 32),
];

fn loads(all: &mut Vec<Form>) {
    let slot = [(64, Domain::Int(64))];
    for (ty, bits) in TYPES.into_iter().chain([("f64", 64)]) {
        // 9.7.9.8: a narrow value is extended into the register by the sign of the type
        let reg = bits.max(16);
        let m = format!("ld.global.{ty}");
        all.push(lane(ident(&m), "sm_80", &slot, &[reg, 32], format!("{m} d0, [in];\nmov.u32 d1, 0;"), move |a| {
            vec![value(a[0], bits, ty.starts_with('s')) as u64 & mask(reg), 0]
        }));
        if bits == 8 && ty != "b8" {
            let m = format!("ld.global.{ty}");
            all.push(lane(
                format!("{}_wide", ident(&m)),
                "sm_80",
                &slot,
                &[32],
                format!("{m} d0, [in + 3];"),
                move |a| vec![value(a[0] >> 24, 8, ty.starts_with('s')) as u64 & mask(32)],
            ));
        }
    }
    // every modifier; hints change nothing
    let mut plain = vec![];
    for cop in ["ca", "cg", "cs", "lu", "cv"] {
        plain.push(format!("ld.global.{cop}.u32"));
    }
    for e in ["evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate"] {
        plain.push(format!("ld.global.L1::{e}.u32"));
    }
    for p in ["64B", "128B", "256B"] {
        plain.push(format!("ld.global.L2::{p}.u32"));
    }
    for m in [
        "ld.u32",
        "ld.weak.global.u32",
        "ld.volatile.global.u32",
        "ld.volatile.u32",
        "ld.relaxed.cta.global.u32",
        "ld.relaxed.gpu.global.u32",
        "ld.relaxed.sys.global.u32",
        "ld.acquire.cta.global.u32",
        "ld.acquire.gpu.global.u32",
        "ld.acquire.sys.global.u32",
        "ld.global.nc.u32",
        "ld.global.ca.nc.u32",
        "ld.global.nc.L1::no_allocate.L2::128B.u32",
        "ld.global.nc.L1::evict_last.u32",
    ] {
        plain.push(m.into());
    }
    for m in plain {
        all.push(lane(ident(&m), "sm_80", &slot, &[32], format!("{m} d0, [in + 4];"), |a| vec![a[0] >> 32]));
    }
    all.push(lane(
        "ld_acquire_cluster_global_u32",
        "sm_90",
        &slot,
        &[32],
        "ld.acquire.cluster.global.u32 d0, [in + 4];",
        |a| vec![a[0] >> 32],
    ));
    all.push(lane(
        "ld_relaxed_cluster_global_u32",
        "sm_90",
        &slot,
        &[32],
        "ld.relaxed.cluster.global.u32 d0, [in + 4];",
        |a| vec![a[0] >> 32],
    ));
    let hint = ".reg .b64 policy;\ncreatepolicy.fractional.L2::evict_last.b64 policy, 0f3F000000;\nld.global.L2::cache_hint.u32 d0, [in + 4], policy;";
    all.push(lane("ld_global_L2_cache_hint_u32", "sm_80", &slot, &[32], hint, |a| vec![a[0] >> 32]));
    for (i, p) in
        ["L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"].into_iter().enumerate()
    {
        let body = format!(
            ".reg .b64 policy;\ncreatepolicy.fractional.{p}.{}.b64 policy, 0f3F800000;\nld.global.nc.L2::cache_hint.u32 d0, [in + 4], policy;",
            if i % 2 == 0 { "L2::evict_unchanged" } else { "L2::evict_first" }
        );
        all.push(lane(format!("createpolicy_{}", ident(p)), "sm_80", &slot, &[32], body, |a| vec![a[0] >> 32]));
    }
    // vectors: the aligned group of slots that this thread's slot is in
    for (n, ty, slots) in [
        (2, "u32", 1),
        (4, "f32", 2),
        (2, "b64", 2),
        (4, "b8", 1),
        (4, "u16", 1),
        (2, "s16", 1),
        (2, "u8", 1),
        (4, "s8", 1),
    ] {
        for m in
            [format!("ld.global.v{n}.{ty}"), format!("ld.global.nc.v{n}.{ty}"), format!("ld.volatile.global.v{n}.{ty}")]
        {
            let bits = ty[1..].parse::<u32>().unwrap();
            let reg = bits.max(16);
            let regs: Vec<String> = (0..n).map(|i| format!("d{i}")).collect();
            let body = format!(".reg .b64 p;\nand.b64 p, in, {};\n{m} {{{}}}, [p];", -(8 * slots), regs.join(", "));
            let outputs = vec![reg; n as usize];
            all.push(block(ident(&m), "sm_80", &slot, &outputs, body, move |v| {
                (0..n)
                    .map(|i| {
                        (0..32usize)
                            .map(|t| {
                                let bit = u32::from(i as u8) * bits;
                                let word =
                                    v[0][t / slots as usize * slots as usize + (bit / 64) as usize] >> (bit % 64);
                                value(word, bits, ty.starts_with('s')) as u64 & mask(reg)
                            })
                            .collect()
                    })
                    .collect()
            }));
        }
    }
    all.push(lane("ld_global_v2_sink", "sm_80", &slot, &[32], "ld.global.v2.u32 {_, d0}, [in];", |a| vec![a[0] >> 32]));
    for m in [
        "prefetch.global.L1",
        "prefetch.global.L2",
        "prefetch.L2",
        "prefetch.global.L2::evict_last",
        "prefetch.global.L2::evict_normal",
    ] {
        all.push(lane(ident(m), "sm_80", &slot, &[64], format!("{m} [in];\nld.global.u64 d0, [in];"), |a| vec![a[0]]));
    }
}

fn stores(all: &mut Vec<Form>) {
    // stored over a background of ones in scratch, read back whole
    for (ty, bits) in TYPES.into_iter().chain([("f64", 64)]) {
        let reg = bits.max(16);
        let m = format!("st.global.{ty}");
        let body = format!(
            ".reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;\nst.global.u64 [p], -1;\n{m} [p], a0;\nld.global.u64 d0, [p];"
        );
        all.push(lane(ident(&m), "sm_80", &[(reg, Domain::Int(reg))], &[64], body, move |a| {
            vec![!mask(bits) | a[0] & mask(bits)]
        }));
    }
    let mut plain: Vec<String> = ["wb", "cg", "cs", "wt"].map(|c| format!("st.global.{c}.u32")).to_vec();
    for e in ["evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate"] {
        plain.push(format!("st.global.L1::{e}.u32"));
    }
    for m in [
        "st.u32",
        "st.weak.global.u32",
        "st.volatile.global.u32",
        "st.volatile.u32",
        "st.relaxed.cta.global.u32",
        "st.relaxed.gpu.global.u32",
        "st.relaxed.sys.global.u32",
        "st.release.cta.global.u32",
        "st.release.gpu.global.u32",
        "st.release.sys.global.u32",
    ] {
        plain.push(m.into());
    }
    for (m, target) in plain.into_iter().map(|m| (m, "sm_80")).chain([
        ("st.release.cluster.global.u32".to_string(), "sm_90"),
        ("st.relaxed.cluster.global.u32".to_string(), "sm_90"),
    ]) {
        let body = format!(
            ".reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;\n{m} [p + 4], a0;\nld.global.u32 d0, [p + 4];"
        );
        all.push(lane(ident(&m), target, &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
    }
    let body = ".reg .b64 p, policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 0f3F800000;\nmul.wide.u32 p, tid, 8;\n\
                add.s64 p, scratch, p;\nst.global.L2::cache_hint.u32 [p], a0, policy;\nld.global.u32 d0, [p];";
    all.push(lane("st_global_L2_cache_hint_u32", "sm_80", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
    for (m, n, bits) in [
        ("st.global.v2.u32", 2u32, 32u32),
        ("st.global.v4.f32", 4, 32),
        ("st.global.v2.b64", 2, 64),
        ("st.volatile.global.v2.u32", 2, 32),
        ("st.volatile.global.v4.u32", 4, 32),
        ("st.global.v4.b16", 4, 16),
        ("st.global.cs.v4.b32", 4, 32),
        ("st.shared.v4.b32", 4, 32),
        ("st.shared.v2.b64", 2, 64),
        ("st.shared.v2.u32", 2, 32),
    ] {
        let args: Vec<String> = (0..n).map(|i| format!("a{i}")).collect();
        let shared = m.contains("shared");
        let address = if shared {
            ".shared .align 16 .b8 smem[512];\n.reg .b32 p;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 16, p;"
        } else {
            ".reg .b64 p;\nmul.wide.u32 p, tid, 16;\nadd.s64 p, scratch, p;"
        };
        let space = if shared { "shared" } else { "global" };
        let back: String = (0..n).map(|i| format!("ld.{space}.b{bits} d{i}, [p + {}];\n", i * bits / 8)).collect();
        let body = format!("{address}\n{m} [p], {{{}}};\n{back}", args.join(", "));
        all.push(lane(
            ident(m),
            "sm_80",
            &vec![(bits, Domain::Int(bits)); n as usize],
            &vec![bits; n as usize],
            body,
            |a| a.to_vec(),
        ));
    }
    let body = "discard.global.L2 [scratch], 128;\n.reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;\nbar.warp.sync 0xffffffff;\n\
                st.global.u32 [p + 128], a0;\nld.global.u32 d0, [p + 128];";
    all.push(lane("discard_global_L2", "sm_80", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
}

fn spaces(all: &mut Vec<Form>) {
    // shared memory, at its window address and through a generic address; the neighbour's value after a barrier
    for (space, store, load) in [
        ("shared", "st.shared.b32", "ld.shared.b32"),
        ("shared_cta", "st.shared::cta.b32", "ld.shared::cta.b32"),
        ("shared_volatile", "st.volatile.shared.b32", "ld.volatile.shared.b32"),
    ] {
        let body = format!(
            ".shared .align 4 .b8 smem[128];\n.reg .b32 p, q;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 4, p;\n{store} [q], a0;\nbar.sync 0;\n\
             add.u32 q, tid, 1;\nand.b32 q, q, 31;\nmad.lo.u32 q, q, 4, p;\n{load} d0, [q];"
        );
        all.push(block(format!("space_{space}"), "sm_80", &[(32, Domain::Int(32))], &[32], body, |v| {
            vec![(0..32).map(|t| v[0][(t + 1) % 32]).collect()]
        }));
    }
    let body = ".shared .align 4 .b8 smem[128];\n.reg .b32 p;\n.reg .b64 g, back;\n.reg .pred ps, pg;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 4, p;\n\
                cvt.u64.u32 g, p;\ncvta.shared.u64 g, g;\nst.u32 [g], a0;\ncvta.to.shared.u64 back, g;\ncvt.u32.u64 p, back;\nld.shared.u32 d0, [p];\n\
                isspacep.shared ps, g;\nselp.u32 d1, 1, 0, ps;\nisspacep.global pg, g;\nselp.u32 d2, 1, 0, pg;\nisspacep.global pg, in;\nselp.u32 d3, 1, 0, pg;";
    all.push(lane("cvta_shared_u64", "sm_80", &[(32, Domain::Int(32))], &[32; 4], body, |a| vec![a[0], 1, 0, 1]));
    let body = ".shared .align 4 .b8 smem[128];\n.reg .b32 p;\n.reg .b64 g, back;\n.reg .pred ps;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 4, p;\n\
                cvt.u64.u32 g, p;\ncvta.shared::cta.u64 g, g;\nst.u32 [g], a0;\ncvta.to.shared::cta.u64 back, g;\ncvt.u32.u64 p, back;\n\
                ld.shared.u32 d0, [p];\nisspacep.shared::cta ps, g;\nselp.u32 d1, 1, 0, ps;\nisspacep.shared::cluster ps, g;\nselp.u32 d2, 1, 0, ps;";
    all.push(lane("cvta_shared_cta_u64", "sm_90", &[(32, Domain::Int(32))], &[32; 3], body, |a| vec![a[0], 1, 1]));
    let body =
        ".reg .b64 g, h;\ncvta.to.global.u64 g, in;\nld.global.u32 d0, [g];\ncvta.global.u64 h, g;\nld.u32 d1, [h];";
    all.push(lane("cvta_global_u64", "sm_80", &[(32, Domain::Int(32))], &[32, 32], body, |a| vec![a[0], a[0]]));
    let body = ".local .align 8 .b8 stack[16];\n.reg .b64 p, g;\n.reg .pred q;\nmov.u64 p, stack;\nst.local.u32 [p + 8], a0;\nld.local.u32 d0, [p + 8];\n\
                cvta.local.u64 g, p;\nld.u32 d1, [g + 8];\ncvta.to.local.u64 p, g;\nld.local.u32 d2, [p + 8];\nisspacep.local q, g;\nselp.u32 d3, 1, 0, q;";
    all.push(lane("space_local", "sm_80", &[(32, Domain::Int(32))], &[32; 4], body, |a| vec![a[0], a[0], a[0], 1]));
}

fn atomics(all: &mut Vec<Form>) {
    for (ty, bits, signed) in [("u32", 32, false), ("s32", 32, true), ("u64", 64, false), ("s64", 64, true)] {
        for op in ["add", "min", "max"] {
            if op == "add" && ty == "s64" {
                continue; // 9.7.13.5: .add takes u32 s32 u64
            }
            atomic(all, op, ty, bits, move |x, y| {
                let (x, y) = (value(x, bits, signed), value(y, bits, signed));
                (match op {
                    "add" => x + y,
                    "min" => x.min(y),
                    _ => x.max(y),
                }) as u64
                    & mask(bits)
            });
        }
    }
    for (op, f) in [("and", (|x, y| x & y) as fn(u64, u64) -> u64), ("or", |x, y| x | y), ("xor", |x, y| x ^ y)] {
        atomic(all, op, "b32", 32, f);
        atomic(all, op, "b64", 64, f);
    }
    atomic(all, "inc", "u32", 32, |x, y| if x >= y { 0 } else { x + 1 });
    atomic(all, "dec", "u32", 32, |x, y| if x == 0 || x > y { y } else { x - 1 });
    for bits in [32, 64] {
        // exchange and compare-and-swap: the old value comes back
        let address = ".reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;";
        let ty = format!("b{bits}");
        let body =
            format!("{address}\nst.global.{ty} [p], a0;\natom.global.exch.{ty} d0, [p], a1;\nld.global.{ty} d1, [p];");
        all.push(lane(
            format!("atom_global_exch_{ty}"),
            "sm_80",
            &[(bits, Domain::Int(bits)); 2],
            &[bits, bits],
            body,
            |a| vec![a[0], a[1]],
        ));
        let body = format!(
            "{address}\n.reg .b{bits} expected;\n.reg .pred same;\nst.global.{ty} [p], a0;\nsetp.eq.u32 same, a2, 0;\n\
             selp.{ty} expected, a0, a1, same;\natom.global.cas.{ty} d0, [p], expected, a1;\nld.global.{ty} d1, [p];"
        );
        let inputs = [(bits, Domain::Int(bits)), (bits, Domain::Int(bits)), (32, Domain::Below(2))];
        all.push(lane(format!("atom_global_cas_{ty}"), "sm_80", &inputs, &[bits, bits], body, |a| {
            vec![a[0], if a[2] == 0 || a[0] == a[1] { a[1] } else { a[0] }]
        }));
    }
    // floating point: 9.7.13.5, rounded to nearest even; f32 on global memory flushes subnormals, .noftz keeps them
    for (ty, bits, format, domain, target) in [
        ("f16", 16, F16, Domain::F16, "sm_80"),
        ("f16x2", 32, F16, Domain::F16x2, "sm_80"),
        ("bf16", 16, BF16, Domain::Bf16, "sm_90"),
        ("bf16x2", 32, BF16, Domain::Bf16x2, "sm_90"),
    ] {
        let add = move |format: Format, x: u32, y: u32| {
            u64::from(format.encode(format.decode(x) + format.decode(y), Round::Nearest, false))
        };
        for op in ["atom", "red"] {
            let m = format!("{op}.global.add.noftz.{ty}");
            let dst = if op == "atom" { "d0, " } else { "" };
            let zero = if op == "atom" { String::new() } else { format!("mov.b{bits} d0, a0;") };
            let body = format!(
                ".reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;\nst.global.b{bits} [p], a0;\n{zero}\n{m} {dst}[p], a1;\nld.global.b{bits} d1, [p];"
            );
            all.push(lane(ident(&m), target, &[(bits, domain); 2], &[bits, bits], body, move |a| {
                let sum = if bits == 16 {
                    add(format, a[0] as u32, a[1] as u32)
                } else {
                    let part = |h: u32| add(format, (a[0] >> h) as u32 & 0xffff, (a[1] >> h) as u32 & 0xffff);
                    part(0) | part(16) << 16
                };
                vec![a[0], sum]
            }));
        }
    }
    for (op, space) in [("atom", "global"), ("red", "global"), ("atom", "shared")] {
        let m = format!("{op}.{space}.add.f32");
        let dst = if op == "atom" { "d0, " } else { "" };
        let zero = if op == "atom" { "" } else { "mov.b32 d0, a0;" };
        let address = if space == "shared" {
            ".shared .align 8 .b8 smem[256];\n.reg .b32 p;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 8, p;"
        } else {
            ".reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;"
        };
        let body = format!("{address}\nst.{space}.f32 [p], a0;\n{zero}\n{m} {dst}[p], a1;\nld.{space}.f32 d1, [p];");
        all.push(lane(ident(&m), "sm_80", &[(32, Domain::Moderate(20)); 2], &[32, 32], body, |a| {
            vec![a[0], u64::from((f32::from_bits(a[0] as u32) + f32::from_bits(a[1] as u32)).to_bits())]
        }));
    }
    // order and scope modifiers; all threads of the block on one address
    let mut orders = vec![];
    for order in ["relaxed", "acquire", "release", "acq_rel"] {
        for scope in ["cta", "gpu", "sys"] {
            orders.push((format!("atom.{order}.{scope}.global.add.u32"), "sm_80"));
        }
        orders.push((format!("atom.{order}.cluster.global.add.u32"), "sm_90"));
    }
    orders.push(("atom.add.u32".into(), "sm_80"));
    for (m, target) in orders {
        let body = format!(
            ".reg .pred first;\nsetp.eq.u32 first, tid, 0;\n@first st.global.u32 [scratch], 0;\nbar.sync 0;\n{m} d1, [scratch], a0;\n\
             bar.sync 0;\nld.global.u32 d0, [scratch];\nmov.u32 d1, 0;"
        );
        all.push(block(ident(&m), target, &[(32, Domain::Int(32))], &[32, 32], body, sum_of_all));
    }
    let mut reds = vec![];
    for order in ["relaxed", "release"] {
        for scope in ["cta", "gpu", "sys"] {
            reds.push((format!("red.{order}.{scope}.global.add.u32"), "sm_80"));
        }
        reds.push((format!("red.{order}.cluster.global.add.u32"), "sm_90"));
    }
    reds.push(("red.add.u32".into(), "sm_80"));
    for (m, target) in reds {
        let body = format!(
            ".reg .pred first;\nsetp.eq.u32 first, tid, 0;\n@first st.global.u32 [scratch], 0;\nbar.sync 0;\n{m} [scratch], a0;\nbar.sync 0;\n\
             ld.global.u32 d0, [scratch];\nmov.u32 d1, 0;"
        );
        all.push(block(ident(&m), target, &[(32, Domain::Int(32))], &[32, 32], body, sum_of_all));
    }
}

fn sum_of_all(v: &Values) -> Values {
    vec![vec![v[0].iter().sum::<u64>() & mask(32); 32], vec![0; 32]]
}

/// `atom` and `red` on global and shared memory: the old value and what stands there afterwards.
fn atomic(all: &mut Vec<Form>, op: &str, ty: &str, bits: u32, f: impl Fn(u64, u64) -> u64 + Copy + 'static) {
    for space in ["global", "shared"] {
        let address = if space == "shared" {
            ".shared .align 8 .b8 smem[256];\n.reg .b32 p;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 8, p;"
        } else {
            ".reg .b64 p;\nmul.wide.u32 p, tid, 8;\nadd.s64 p, scratch, p;"
        };
        for kind in ["atom", "red"] {
            let m = format!("{kind}.{space}.{op}.{ty}");
            let (dst, copy) =
                if kind == "atom" { ("d0, ", String::new()) } else { ("", format!("mov.b{bits} d0, a0;")) };
            let body = format!(
                "{address}\nst.{space}.b{bits} [p], a0;\n{copy}\n{m} {dst}[p], a1;\nld.{space}.b{bits} d1, [p];"
            );
            all.push(lane(ident(&m), "sm_80", &[(bits, Domain::Int(bits)); 2], &[bits, bits], body, move |a| {
                vec![a[0], f(a[0], a[1])]
            }));
        }
    }
}

fn copies(all: &mut Vec<Form>) {
    // every thread copies the aligned group of slots that its slot is in and reads its own half
    let head = ".shared .align 16 .b8 smem[512];\n.reg .b32 p, q;\n.reg .b64 g;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 16, p;\n";
    let mut push = |m: &str, bytes: u32, extra: &str| {
        let slots = if bytes == 16 { 2 } else { 1 };
        let body = format!(
            "{head}and.b64 g, in, {};\n{m} [q], [g], {bytes}{extra};\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.u32 d0, [q + {}];",
            -8 * slots,
            bytes - 4
        );
        all.push(block(
            format!("{}_{bytes}{}", ident(m), if extra.is_empty() { "" } else { "_x" }),
            "sm_80",
            &[(64, Domain::Int(64))],
            &[32],
            body,
            move |v| {
                vec![
                    (0..32usize)
                        .map(|t| match bytes {
                            16 => v[0][t / 2 * 2 + 1] >> 32,
                            8 => v[0][t] >> 32,
                            _ => v[0][t] & mask(32),
                        })
                        .collect(),
                ]
            },
        ));
    };
    push("cp.async.ca.shared.global", 4, "");
    push("cp.async.ca.shared.global", 8, "");
    push("cp.async.ca.shared.global", 16, "");
    push("cp.async.cg.shared.global", 16, "");
    push("cp.async.ca.shared::cta.global", 16, "");
    for p in ["64B", "128B", "256B"] {
        push(&format!("cp.async.cg.shared.global.L2::{p}"), 16, "");
    }
    push("cp.async.ca.shared.global.L2::128B", 8, "");
    // a source size below the size of the copy fills the rest with zeros
    for bytes in [4u64, 8, 16] {
        let body = format!(
            "{head}and.b64 g, in, -16;\ncp.async.ca.shared.global [q], [g], {bytes}, a1;\ncp.async.wait_all;\nld.shared.u32 d0, [q];\nld.shared.u32 d1, [q + {}];",
            bytes - 4
        );
        let inputs = [(64, Domain::Int(64)), (32, Domain::Below(bytes + 1))];
        all.push(block(format!("cp_async_src_size_{bytes}"), "sm_80", &inputs, &[32, 32], body, move |v| {
            let word = |t: usize, at: u64| {
                (0..4).fold(0, |x, i| {
                    let byte = at + i;
                    let slot = v[0][t / 2 * 2 + (byte / 8) as usize];
                    x | if byte < v[1][t] { (slot >> (8 * (byte % 8)) & 0xff) << (8 * i) } else { 0 }
                })
            };
            vec![(0..32).map(|t| word(t, 0)).collect(), (0..32).map(|t| word(t, bytes - 4)).collect()]
        }));
    }
    let hint = format!(
        "{head}.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 0f3F800000;\nand.b64 g, in, -16;\n\
         cp.async.cg.shared.global.L2::cache_hint [q], [g], 16, policy;\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.u32 d0, [q + 12];"
    );
    all.push(block("cp_async_cache_hint", "sm_80", &[(64, Domain::Int(64))], &[32], hint, |v| {
        vec![(0..32usize).map(|t| v[0][t / 2 * 2 + 1] >> 32).collect()]
    }));
    // two groups: the older has landed after wait_group 1
    let body = format!(
        "{head}.shared .align 16 .b8 more[512];\n.reg .b32 r;\nmov.u32 r, more;\nmad.lo.u32 r, tid, 16, r;\nand.b64 g, in, -16;\n\
         cp.async.cg.shared.global [q], [g], 16;\ncp.async.commit_group;\ncp.async.ca.shared.global [r], [in], 8;\ncp.async.commit_group;\n\
         cp.async.wait_group 1;\nld.shared.u32 d0, [q];\ncp.async.wait_group 0;\nld.shared.u32 d1, [r];"
    );
    all.push(block("cp_async_two_groups", "sm_80", &[(64, Domain::Int(64))], &[32, 32], body, |v| {
        vec![
            (0..32usize).map(|t| v[0][t / 2 * 2] & mask(32)).collect(),
            (0..32usize).map(|t| v[0][t] & mask(32)).collect(),
        ]
    }));
}
