//! Loads, stores and atomics again, once for every modifier, type and state space that the other files do not meet: caching and ordering change
//! nothing in one thread, so each of these stores a value and reads it back.

use super::int::{mask, value};
use super::{Domain, Form, ident, lane};

const TYPES: [&str; 14] =
    ["b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f32", "f64"];

/// A place of 16 bytes for every thread in a state space, its address in `p`.
fn place(space: &str) -> &'static str {
    match space {
        "global" | "" => ".reg .b64 p;\nmul.wide.u32 p, tid, 16;\nadd.s64 p, scratch, p;\n",
        "local" => ".local .align 16 .b8 stack[16];\n.reg .b64 p;\nmov.u64 p, stack;\n",
        _ => ".shared .align 16 .b8 smem[512];\n.reg .b32 p;\nmov.u32 p, smem;\nmad.lo.u32 p, tid, 16, p;\n",
    }
}

fn dot(space: &str) -> String {
    if space.is_empty() { String::new() } else { format!(".{space}") }
}

fn target(modifiers: &str) -> &'static str {
    if modifiers.contains("cluster") { "sm_90" } else { "sm_80" }
}

/// `op` stores `a0` and is read back plainly, or is a load of what was stored plainly.
fn round_trip(all: &mut Vec<Form>, op: &str, space: &str, ty: &str) {
    let bits: u32 = ty[1..].parse().unwrap();
    let reg = bits.max(16);
    let plain = space.split("::").next().unwrap_or("");
    let plain = dot(plain);
    let m = format!("{op}.{ty}");
    let is_load = op.starts_with("ld");
    let access = if is_load {
        format!("st{plain}.b{bits} [p], a0;\n{m} d0, [p];")
    } else {
        format!("{m} [p], a0;\nld{plain}.b{bits} d0, [p];")
    };
    let signed = is_load && ty.starts_with('s');
    all.push(lane(
        format!("rt_{}", ident(&m)),
        target(op),
        &[(reg, Domain::Int(reg))],
        &[reg],
        format!("{}{access}", place(space)),
        move |a| vec![value(a[0], bits, signed) as u64 & mask(reg)],
    ));
}

fn vector(all: &mut Vec<Form>, op: &str, space: &str, n: u32, bits: u32) {
    let m = format!("{op}.v{n}.b{bits}");
    let list = |prefix: &str| (0..n).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>().join(", ");
    let plain = dot(space.split("::").next().unwrap_or(""));
    let (load, store) = if op.starts_with("ld") {
        (m.clone(), format!("st{plain}.v{n}.b{bits}"))
    } else {
        (format!("ld{plain}.v{n}.b{bits}"), m.clone())
    };
    let body = format!("{}{store} [p], {{{}}};\n{load} {{{}}}, [p];", place(space), list("a"), list("d"));
    let inputs = vec![(bits, Domain::Int(bits)); n as usize];
    all.push(lane(format!("rt_{}", ident(&m)), target(op), &inputs, &vec![bits; n as usize], body, |a| a.to_vec()));
}

pub fn add(all: &mut Vec<Form>) {
    for ty in TYPES {
        round_trip(all, "ld.weak.global.cg", "global", ty);
        round_trip(all, "st.weak.global.cg", "global", ty);
        round_trip(all, "ld.volatile.global", "global", ty);
        round_trip(all, "st.volatile.global", "global", ty);
        round_trip(all, "ld.relaxed.gpu.global", "global", ty);
        round_trip(all, "st.relaxed.gpu.global", "global", ty);
        round_trip(all, "ld.shared", "shared", ty);
        round_trip(all, "st.shared", "shared", ty);
        round_trip(all, "ld.local", "local", ty);
        round_trip(all, "st.local", "local", ty);
    }
    for space in ["shared", "shared::cta"] {
        for op in [
            "ld.volatile",
            "st.volatile",
            "ld.relaxed.cta",
            "st.relaxed.cta",
            "ld.acquire.cta",
            "st.release.cta",
            "ld.weak",
            "st.weak",
        ] {
            round_trip(all, &format!("{op}.{space}"), space, "u32");
        }
    }
    for space in ["shared", "shared::cta"] {
        for op in ["ld", "st"] {
            let cop = if op == "ld" { "ca" } else { "wb" };
            round_trip(all, &format!("{op}.{space}.{cop}"), space, "u32");
        }
    }
    for op in ["ld", "st"] {
        let cop = if op == "ld" { "ca" } else { "wb" };
        round_trip(all, &format!("{op}.local.{cop}"), "local", "u32");
        round_trip(all, &format!("{op}.local.{}", if op == "ld" { "lu" } else { "cs" }), "local", "u32");
        // shared::cluster addresses of the own block are its shared addresses
        for order in ["weak", "volatile", "relaxed.cluster"] {
            round_trip(all, &format!("{op}.{order}.shared::cluster"), "shared::cluster", "u32");
        }
        round_trip(all, &format!("{op}.shared::cluster.{cop}"), "shared::cluster", "u32");
        for (n, bits) in [(2, 32), (4, 32), (2, 64), (4, 16)] {
            vector(all, &format!("{op}.global.cg"), "global", n, bits);
            vector(all, &format!("{op}.relaxed.gpu.global"), "global", n, bits);
            vector(all, &format!("{op}.volatile.global"), "global", n, bits);
            vector(all, &format!("{op}.local"), "local", n, bits);
        }
    }
    hints(all);
    wide(all);
    constants(all);
    atomics(all);
    let body = ".reg .pred odd;\n.reg .b32 low;\nand.b32 low, tid, 1;\nsetp.eq.u32 odd, low, 1;\nmov.u32 d0, a0;\nbra.uni ON;\nON:\nst.global.b32 [out], d0;\nret.uni;";
    all.push(lane("ret_uni", "sm_80", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
}

fn hints(all: &mut Vec<Form>) {
    let policy = ".reg .b64 policy;\ncreatepolicy.fractional.L2::evict_last.b64 policy, 0f3F800000;\n";
    for prefetch in ["64B", "128B", "256B"] {
        let m = format!("ld.global.cg.L2::cache_hint.L2::{prefetch}.u32");
        let body = format!("{policy}{m} d0, [in], policy;");
        all.push(lane(ident(&m), "sm_80", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
    }
    let body =
        format!("{policy}{}st.global.cs.L2::cache_hint.u32 [p], a0, policy;\nld.global.u32 d0, [p];", place("global"));
    all.push(lane("st_global_cs_L2_cache_hint_u32", "sm_80", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
}

/// 256 bits at a time (9.7.9.8), the only accesses that take an eviction priority of L2.
fn wide(all: &mut Vec<Form>) {
    for (n, bits) in [(8, 32), (4, 64)] {
        for hint in ["", ".cg", ".L2::evict_first", ".L2::evict_last", ".L2::evict_normal"] {
            let list = |prefix: &str| (0..n).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>().join(", ");
            let m = format!("global{hint}.v{n}.b{bits}");
            let body = format!(
                ".reg .b64 p;\nmul.wide.u32 p, tid, 32;\nadd.s64 p, scratch, p;\nst.{m} [p], {{{}}};\nld.{m} {{{}}}, [p];",
                list("a"),
                list("d")
            );
            let (inputs, outputs) = (vec![(bits, Domain::Int(bits)); n], vec![bits; n]);
            all.push(lane(format!("wide_{}", ident(&m)), "sm_100", &inputs, &outputs, body, |a| a.to_vec()));
        }
    }
}

fn constants(all: &mut Vec<Form>) {
    // kernel parameters by address, through every kind of load that the state space has
    let body = ".reg .b64 p, q;\n.reg .pred is;\nmov.b64 p, p_in;\ncvta.param.u64 q, p;\nld.u64 d0, [q];\nsub.u64 d0, d0, d0;\n\
                isspacep.param is, q;\nselp.u64 d0, 1, 0, is;\ncvta.to.param.u64 p, q;\nld.param.u64 d1, [p_scratch];\nsub.u64 d1, d1, d1;";
    all.push(lane("cvta_param_u64", "sm_80", &[(32, Domain::Int(32))], &[64, 64], body, |_| vec![1, 0]));
    for ty in ["u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "f32", "u64", "s64", "b64", "f64"] {
        let bits: u32 = ty[1..].parse().unwrap();
        let reg = bits.max(16);
        let m = format!("ld.param.{ty}");
        // parameters are addresses, whose low bits are zero: 16-byte aligned
        let body = format!("{m} d0, [p_in];\nand.b{reg} d0, d0, 7;");
        all.push(lane(ident(&m), "sm_80", &[(32, Domain::Int(32))], &[reg], body, |_| vec![0]));
    }
}

fn atomics(all: &mut Vec<Form>) {
    for kind in ["atom", "red"] {
        let orders: &[&str] =
            if kind == "atom" { &["relaxed", "acquire", "release", "acq_rel"] } else { &["relaxed", "release"] };
        // (operation with type, width, result)
        type Result = fn(u64, u64) -> u64;
        let ops: [(&str, u32, Result); 5] = [
            ("xor.b32", 32, |x, y| x ^ y),
            ("inc.u32", 32, |x, y| if x >= y { 0 } else { x + 1 }),
            ("add.f32", 32, |x, y| u64::from((f32::from_bits(x as u32) + f32::from_bits(y as u32)).to_bits())),
            ("add.noftz.f16x2", 32, |x, _| x),
            ("max.s64", 64, |x, y| (x as i64).max(y as i64) as u64),
        ];
        for (op, bits, result) in ops {
            // the float forms add zeros (of both halves), which is exact
            let half = op.contains("f16x2");
            let domain = if op == "add.f32" {
                Domain::Moderate(10)
            } else if half {
                Domain::Below(0x7c00)
            } else {
                Domain::Int(bits)
            };
            let mut modifiers = vec![];
            for order in orders {
                for scope in ["cta", "gpu", "sys", "cluster"] {
                    modifiers.push((format!("{kind}.{order}.{scope}.global.{op}"), "global"));
                }
            }
            for space in ["shared", "shared::cta", "shared::cluster"] {
                modifiers.push((format!("{kind}.relaxed.cta.{space}.{op}"), space));
            }
            for (m, space) in modifiers {
                let plain = if space == "global" { "global" } else { "shared" };
                let clear = if half { "and.b32 a0, a0, 0x00007fff;\nmov.b32 a1, 0;\n" } else { "" };
                let copy = if kind == "atom" { String::new() } else { format!("mov.b{bits} d0, a0;\n") };
                let dst = if kind == "atom" { "d0, " } else { "" };
                let body = format!(
                    "{}{clear}st.{plain}.b{bits} [p], a0;\n{copy}{m} {dst}[p], a1;\nld.{plain}.b{bits} d1, [p];",
                    place(space)
                );
                all.push(lane(
                    format!("rt_{}", ident(&m)),
                    target(&m),
                    &[(bits, domain); 2],
                    &[bits, bits],
                    body,
                    move |a| vec![a[0], result(a[0], a[1])],
                ));
            }
        }
    }
}
