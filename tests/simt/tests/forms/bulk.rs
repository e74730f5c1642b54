//! mbarriers, bulk and tensor copies, `st.async` and the rest of the asynchronous machinery (PTX ISA 9.7.13.15, 9.7.9.25.4, 9.7.9.25.5,
//! 9.7.9.27, 9.7.9.12).

use simt::model::float::{BF16, F16, Format, Round};
use simt::model::smem::Swizzle;
use simt::model::tensor_map::{ElementType, TensorMap};

use super::int::mask;
use super::{Base, Domain, Expect, Form, Values, block, ident, lane};

pub fn add(all: &mut Vec<Form>) {
    mbarriers(all);
    transactions(all);
    bulk(all);
    reductions(all);
    tensors(all);
    others(all);
}

const BARRIER: &str = ".shared .align 8 .b8 bars[8];\n.reg .b32 bar;\n.reg .pred first, done;\nmov.u32 bar, bars;\nsetp.eq.u32 first, tid, 0;\n";
const WAIT: &str =
    "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [bar], 0;\n@!done bra WAIT;\nbar.warp.sync 0xffffffff;\n";

fn mbarriers(all: &mut Vec<Form>) {
    // message passing: every thread stores, arrives, waits, and reads its neighbour's value
    let exchange = |init: &str, arrive: &str, wait: &str| {
        format!(
            "{BARRIER}.shared .align 4 .b8 smem[128];\n.reg .b32 p, q;\n.reg .b64 state;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 4, p;\n\
             @first {init} [bar], 32;\nbar.sync 0;\nst.shared.u32 [q], a0;\n{arrive};\nWAIT:\n{wait};\n@!done bra WAIT;\nbar.warp.sync 0xffffffff;\n\
             xor.b32 q, tid, 1;\nmad.lo.u32 q, q, 4, p;\nld.shared.u32 d0, [q];\n@first mbarrier.inval.shared::cta.b64 [bar];"
        )
    };
    let neighbour = |v: &Values| vec![(0..32).map(|t| v[0][t ^ 1]).collect()];
    let mut push = |name: String, body: String| {
        let target = if body.contains("try_wait") || body.contains("cluster") { "sm_90" } else { "sm_80" };
        all.push(block(name, target, &[(32, Domain::Int(32))], &[32], body, neighbour));
    };
    let wait = "mbarrier.try_wait.parity.shared::cta.b64 done, [bar], 0";
    for init in ["mbarrier.init.b64", "mbarrier.init.shared.b64", "mbarrier.init.shared::cta.b64"] {
        let inval = if init.contains("::cta") { "mbarrier.inval.shared.b64" } else { "mbarrier.inval.shared::cta.b64" };
        let body = if init.contains("shared") {
            exchange(init, "mbarrier.arrive.shared.b64 state, [bar]", wait)
        } else {
            // through a generic address
            exchange(
                "mbarrier.init.shared.b64",
                "mbarrier.arrive.b64 state, [g]",
                "mbarrier.test_wait.b64 done, [g], state",
            )
            .replace("bar.sync 0;", ".reg .b64 g;\ncvt.u64.u32 g, bar;\ncvta.shared.u64 g, g;\nbar.sync 0;")
        };
        push(format!("exchange_{}", ident(init)), body.replace("mbarrier.inval.shared::cta.b64", inval));
    }
    for order in ["", ".release.cta", ".release.cluster"] {
        for space in ["shared", "shared::cta"] {
            let m = format!("mbarrier.arrive{order}.{space}.b64");
            push(
                format!("exchange_{}", ident(&m)),
                exchange("mbarrier.init.shared.b64", &format!("{m} state, [bar]"), wait),
            );
        }
    }
    for kind in ["test_wait", "try_wait"] {
        for order in ["", ".acquire.cta", ".acquire.cluster"] {
            for (space, parity) in [("shared", false), ("shared::cta", false), ("shared", true), ("shared::cta", true)]
            {
                let m = format!("mbarrier.{kind}{}{order}.{space}.b64", if parity { ".parity" } else { "" });
                let wait = format!("{m} done, [bar], {}", if parity { "0" } else { "state" });
                push(
                    format!("exchange_{}", ident(&m)),
                    exchange("mbarrier.init.shared.b64", "mbarrier.arrive.shared.b64 state, [bar]", &wait),
                );
            }
        }
    }
    let hint = "mbarrier.try_wait.parity.shared::cta.b64 done, [bar], 0, 1000";
    push(
        "exchange_mbarrier_suspend_hint".into(),
        exchange("mbarrier.init.shared.b64", "mbarrier.arrive.shared.b64 state, [bar]", hint),
    );
    let generic = "mbarrier.try_wait.parity.acquire.cta.b64 done, [g], 0";
    push(
        "exchange_mbarrier_wait_generic".into(),
        exchange("mbarrier.init.shared.b64", "mbarrier.arrive.release.cta.shared::cluster.b64 _, [bar]", generic)
            .replace("bar.sync 0;", ".reg .b64 g;\ncvt.u64.u32 g, bar;\ncvta.shared.u64 g, g;\nbar.sync 0;"),
    );
    // an arrival may count for several: thread t arrives t + 1 times
    push(
        "exchange_mbarrier_arrive_count".into(),
        exchange(
            "mbarrier.init.shared.b64",
            ".reg .b32 n;\nadd.u32 n, tid, 1;\nmbarrier.arrive.shared::cta.b64 state, [bar], n",
            wait,
        )
        .replace("[bar], 32;", "[bar], 528;"),
    );
    // relaxed arrivals and waits order nothing: only the completion itself is looked at
    let done = |v: &Values| vec![v[0].clone()];
    for (arrive, wait) in [
        (
            "mbarrier.arrive.relaxed.cta.shared::cta.b64 state, [bar]",
            "mbarrier.test_wait.relaxed.cta.shared::cta.b64 done, [bar], state",
        ),
        (
            "mbarrier.arrive.relaxed.cluster.shared::cta.b64 state, [bar]",
            "mbarrier.try_wait.relaxed.cluster.shared::cta.b64 done, [bar], state",
        ),
        (
            "mbarrier.arrive.relaxed.cta.shared.b64 state, [bar]",
            "mbarrier.test_wait.parity.relaxed.cta.shared::cta.b64 done, [bar], 0",
        ),
        (
            "mbarrier.arrive.relaxed.cta.shared.b64 state, [bar]",
            "mbarrier.try_wait.parity.relaxed.cluster.shared.b64 done, [bar], 0",
        ),
    ] {
        let name =
            format!("relaxed_{}_{}", ident(arrive.split(' ').next().unwrap()), ident(wait.split(' ').next().unwrap()));
        let body = format!(
            "{BARRIER}.reg .b64 state;\n@first mbarrier.init.shared.b64 [bar], 32;\nbar.sync 0;\n{arrive};\nWAIT:\n{wait};\n@!done bra WAIT;\nmov.u32 d0, a0;"
        );
        all.push(block(name, "sm_90", &[(32, Domain::Int(32))], &[32], body, done));
    }
    // a dropped participant is not expected in the next phase
    for drop in [
        "mbarrier.arrive_drop.shared::cta.b64",
        "mbarrier.arrive_drop.release.cta.shared.b64",
        "mbarrier.arrive_drop.release.cluster.shared::cta.b64",
    ] {
        let body = format!(
            "{BARRIER}.reg .b64 state;\n.reg .pred high;\n@first mbarrier.init.shared.b64 [bar], 32;\nbar.sync 0;\nsetp.ge.u32 high, tid, 16;\n\
             @high {drop} state, [bar];\n@!high mbarrier.arrive.shared.b64 state, [bar];\n{WAIT}@!high mbarrier.arrive.shared.b64 state, [bar];\nSECOND:\n\
             mbarrier.try_wait.parity.shared::cta.b64 done, [bar], 1;\n@!done bra SECOND;\nmov.u32 d0, a0;"
        );
        all.push(block(format!("drop_{}", ident(drop)), "sm_90", &[(32, Domain::Int(32))], &[32], body, done));
    }
    // .noComplete: none of these arrivals ends the phase, the last plain one does
    for m in [
        "mbarrier.arrive.noComplete.b64",
        "mbarrier.arrive.noComplete.shared.b64",
        "mbarrier.arrive.noComplete.release.cta.shared::cta.b64",
        "mbarrier.arrive_drop.noComplete.shared.b64",
    ] {
        let at = if m.contains("shared") { "[bar]" } else { "[g]" };
        let body = format!(
            "{BARRIER}.reg .b64 state, g;\n.reg .b32 n;\ncvt.u64.u32 g, bar;\ncvta.shared.u64 g, g;\n@first mbarrier.init.shared.b64 [bar], 65;\n\
             bar.sync 0;\n{m} state, {at}, 2;\nbar.warp.sync 0xffffffff;\n@first mbarrier.arrive.shared.b64 state, [bar];\n{WAIT}mov.u32 d0, a0;"
        );
        all.push(block(
            format!("no_complete_{}", ident(m)),
            "sm_80",
            &[(32, Domain::Int(32))],
            &[32],
            body.replace("try_wait.parity.shared::cta", "test_wait.parity.shared"),
            done,
        ));
    }
    // 9.7.13.15.16: the pending count of the state that an arrival returned
    let body = format!(
        "{BARRIER}.reg .b64 state;\n.reg .b32 n;\nmov.u32 d0, 7;\n@first mbarrier.init.shared.b64 [bar], 7;\nbar.sync 0;\n\
         @first mbarrier.arrive.noComplete.shared.b64 state, [bar], 2;\n@first mbarrier.pending_count.b64 d0, state;\nadd.u32 d0, d0, a0;"
    );
    all.push(block("mbarrier_pending_count", "sm_80", &[(32, Domain::Below(1))], &[32], body, |_| vec![vec![7; 32]]));
    // arrivals triggered by cp.async
    for (m, extra) in [
        ("cp.async.mbarrier.arrive.noinc.shared.b64", ""),
        ("cp.async.mbarrier.arrive.noinc.shared::cta.b64", ""),
        ("cp.async.mbarrier.arrive.noinc.b64", ""),
        ("cp.async.mbarrier.arrive.shared.b64", "mbarrier.arrive.shared.b64 state, [bar];\n"),
        ("cp.async.mbarrier.arrive.shared::cta.b64", "mbarrier.arrive.shared.b64 state, [bar];\n"),
    ] {
        let at = if m.contains("shared") { "[bar]" } else { "[g]" };
        let body = format!(
            "{BARRIER}.shared .align 16 .b8 smem[256];\n.reg .b32 p, q;\n.reg .b64 state, g;\ncvt.u64.u32 g, bar;\ncvta.shared.u64 g, g;\nmov.u32 p, smem;\n\
             mad.lo.u32 q, tid, 8, p;\n@first mbarrier.init.shared.b64 [bar], 32;\nbar.sync 0;\ncp.async.ca.shared.global [q], [in], 8;\n{m} {at};\n{extra}{WAIT}\
             xor.b32 q, tid, 1;\nmad.lo.u32 q, q, 8, p;\nld.shared.u64 d0, [q];\ncp.async.wait_all;"
        );
        all.push(block(format!("on_copy_{}", ident(m)), "sm_90", &[(64, Domain::Int(64))], &[64], body, neighbour));
    }
}

fn transactions(all: &mut Vec<Form>) {
    // a phase that needs one arrival and 48 bytes, of which complete_tx announces the end
    let done = |v: &Values| vec![v[0].clone()];
    for (expect, complete) in [
        ("mbarrier.expect_tx.relaxed.cta.shared::cta.b64", "mbarrier.complete_tx.relaxed.cta.shared::cta.b64"),
        (
            "mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64",
            "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64",
        ),
        ("mbarrier.expect_tx.relaxed.cta.shared.b64", "mbarrier.complete_tx.relaxed.cta.shared.b64"),
        ("mbarrier.expect_tx.shared::cta.b64", "mbarrier.complete_tx.shared::cta.b64"),
    ] {
        let body = format!(
            "{BARRIER}@first mbarrier.init.shared.b64 [bar], 1;\nbar.sync 0;\n@first {expect} [bar], 48;\n@first mbarrier.arrive.shared.b64 _, [bar];\n\
             @first {complete} [bar], 48;\n{WAIT}mov.u32 d0, a0;"
        );
        all.push(block(format!("tx_{}", ident(expect)), "sm_90", &[(32, Domain::Int(32))], &[32], body, done));
    }
    for arrive in ["arrive", "arrive_drop"] {
        for order in ["", ".release.cta", ".release.cluster", ".relaxed.cta", ".relaxed.cluster"] {
            for space in ["shared", "shared::cta", "shared::cluster"] {
                let m = format!("mbarrier.{arrive}.expect_tx{order}.{space}.b64");
                let body = format!(
                    "{BARRIER}@first mbarrier.init.shared.b64 [bar], 1;\nbar.sync 0;\n@first {m} _, [bar], 32;\n\
                     @first mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 32;\n{WAIT}mov.u32 d0, a0;"
                );
                all.push(block(format!("tx_{}", ident(&m)), "sm_90", &[(32, Domain::Int(32))], &[32], body, done));
            }
        }
    }
}

/// The address of the block's first input slot.
const BLOCK_IN: &str = ".reg .b64 base;\nmul.wide.u32 base, tid, 8;\nsub.s64 base, in, base;\n";
const POLICY: &str = ".reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 0f3F800000;\n";

fn bulk(all: &mut Vec<Form>) {
    let neighbour = |v: &Values| vec![(0..32).map(|t| v[0][t ^ 1]).collect()];
    for (m, operands, target) in [
        ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", "", "sm_90"),
        ("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes", "", "sm_90"),
        ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint", ", policy", "sm_90"),
        ("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster", ", everyone", "sm_90"),
    ] {
        let body = format!(
            "{BARRIER}{BLOCK_IN}{POLICY}.reg .b16 everyone;\nmov.u16 everyone, 1;\n.shared .align 16 .b8 smem[256];\n.reg .b32 p, q;\nmov.u32 p, smem;\n\
             @first mbarrier.init.shared.b64 [bar], 1;\n@first fence.mbarrier_init.release.cluster;\nbar.sync 0;\n\
             @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;\n@first {m} [p], [base], 256, [bar]{operands};\n{WAIT}\
             xor.b32 q, tid, 1;\nmad.lo.u32 q, q, 8, p;\nld.shared.u64 d0, [q];"
        );
        all.push(block(ident(m), target, &[(64, Domain::Int(64))], &[64], body, neighbour));
    }
    for fence in ["fence.proxy.async", "fence.proxy.async.shared::cta", "fence.proxy.async.shared::cluster"] {
        for (hint, policy) in [("", ""), (".L2::cache_hint", ", policy")] {
            let m = format!("cp.async.bulk.global.shared::cta.bulk_group{hint}");
            let fence = if fence.ends_with("cluster") { "fence.proxy.async.shared::cta" } else { fence };
            let name = format!("{}_{}", ident(&m), ident(fence));
            if all.iter().any(|f| f.name == name) {
                continue;
            }
            let body = format!(
                "{POLICY}.shared .align 16 .b8 smem[256];\n.reg .b32 p, q;\n.reg .b64 g;\n.reg .pred first;\nsetp.eq.u32 first, tid, 0;\nmov.u32 p, smem;\n\
                 mad.lo.u32 q, tid, 8, p;\nst.shared.u64 [q], a0;\n{fence};\nbar.sync 0;\n@first {m} [scratch], [p], 256{policy};\n\
                 @first cp.async.bulk.commit_group;\n@first cp.async.bulk.wait_group.read 0;\n@first cp.async.bulk.wait_group 0;\nbar.sync 0;\n\
                 xor.b32 q, tid, 1;\nmul.wide.u32 g, q, 8;\nadd.s64 g, scratch, g;\nld.global.u64 d0, [g];"
            );
            all.push(block(name, "sm_90", &[(64, Domain::Int(64))], &[64], body, neighbour));
        }
    }
    for (hint, policy) in [("", ""), (".L2::cache_hint", ", policy")] {
        let m = format!("cp.async.bulk.prefetch.L2.global{hint}");
        let body = format!("{POLICY}{BLOCK_IN}{m} [base], 256{policy};\nmov.b64 d0, a0;");
        all.push(block(ident(&m), "sm_90", &[(64, Domain::Int(64))], &[64], body, |v| vec![v[0].clone()]));
    }
}

fn reductions(all: &mut Vec<Form>) {
    type Op = std::rc::Rc<dyn Fn(u64, u64) -> u64>;
    let mut ops: Vec<(String, u32, Domain, Op)> = vec![];
    for bits in [32u32, 64] {
        let int = Domain::Int(64);
        ops.push((format!("and.b{bits}"), bits, int, std::rc::Rc::new(|x, y| x & y)));
        ops.push((format!("or.b{bits}"), bits, int, std::rc::Rc::new(|x, y| x | y)));
        ops.push((format!("xor.b{bits}"), bits, int, std::rc::Rc::new(|x, y| x ^ y)));
        ops.push((format!("add.u{bits}"), bits, int, std::rc::Rc::new(|x, y| x.wrapping_add(y))));
        let signed = move |x: u64| super::int::value(x, bits, true);
        ops.push((format!("min.s{bits}"), bits, int, std::rc::Rc::new(move |x, y| signed(x).min(signed(y)) as u64)));
        ops.push((format!("max.s{bits}"), bits, int, std::rc::Rc::new(move |x, y| signed(x).max(signed(y)) as u64)));
        ops.push((format!("min.u{bits}"), bits, int, std::rc::Rc::new(|x, y| x.min(y))));
        ops.push((format!("max.u{bits}"), bits, int, std::rc::Rc::new(|x, y| x.max(y))));
    }
    ops.push(("inc.u32".into(), 32, Domain::Int(64), std::rc::Rc::new(|x, y| if x >= y { 0 } else { x + 1 })));
    ops.push(("dec.u32".into(), 32, Domain::Int(64), std::rc::Rc::new(|x, y| if x == 0 || x > y { y } else { x - 1 })));
    ops.push(("add.s32".into(), 32, Domain::Int(64), std::rc::Rc::new(|x, y| x.wrapping_add(y))));
    let halves = |format: Format| -> Op {
        std::rc::Rc::new(move |x, y| {
            u64::from(format.encode(format.decode(x as u32) + format.decode(y as u32), Round::Nearest, false))
        })
    };
    // finite halves: small integers in every 16-bit part
    ops.push(("add.noftz.f16".into(), 16, Domain::Below(0x7000), halves(F16)));
    ops.push(("add.noftz.bf16".into(), 16, Domain::Below(0x7000), halves(BF16)));
    for (op, bits, domain, f) in ops {
        for hint in [false, true] {
            if hint && op != "add.u32" {
                continue;
            }
            let m = format!(
                "cp.reduce.async.bulk.global.shared::cta.bulk_group{}.{op}",
                if hint { ".L2::cache_hint" } else { "" }
            );
            let policy = if hint { ", policy" } else { "" };
            let body = format!(
                "{POLICY}.shared .align 16 .b8 smem[256];\n.reg .b32 p, q;\n.reg .b64 g;\n.reg .pred first;\nsetp.eq.u32 first, tid, 0;\nmov.u32 p, smem;\n\
                 mad.lo.u32 q, tid, 8, p;\nmul.wide.u32 g, tid, 8;\nadd.s64 g, scratch, g;\nst.shared.u64 [q], a1;\nst.global.u64 [g], a0;\n\
                 fence.proxy.async;\nbar.sync 0;\n@first {m} [scratch], [p], 256{policy};\n@first cp.async.bulk.commit_group;\n\
                 @first cp.async.bulk.wait_group 0;\nbar.sync 0;\nld.global.u64 d0, [g];"
            );
            let f = f.clone();
            let name = ident(&m);
            all.push(lane(name, "sm_90", &[(64, domain), (64, domain)], &[64], body, move |a| {
                let part = |x: u64, i: u32| x >> (i * bits) & mask(bits);
                vec![(0..64 / bits).fold(0, |d, i| d | (f(part(a[0], i), part(a[1], i)) & mask(bits)) << (i * bits))]
            }));
        }
    }
    // f32: moderate numbers, whose sum is one IEEE addition
    let m = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32";
    let body = format!(
        ".shared .align 16 .b8 smem[128];\n.reg .b32 p, q;\n.reg .b64 g;\n.reg .pred first;\nsetp.eq.u32 first, tid, 0;\nmov.u32 p, smem;\n\
         mad.lo.u32 q, tid, 4, p;\nmul.wide.u32 g, tid, 4;\nadd.s64 g, scratch, g;\nst.shared.u32 [q], a1;\nst.global.u32 [g], a0;\n\
         fence.proxy.async;\nbar.sync 0;\n@first {m} [scratch], [p], 128;\n@first cp.async.bulk.commit_group;\n@first cp.async.bulk.wait_group 0;\n\
         bar.sync 0;\nld.global.u32 d0, [g];"
    );
    all.push(lane(ident(m), "sm_90", &[(32, Domain::Moderate(20)); 2], &[32], body, |a| {
        vec![u64::from((f32::from_bits(a[0] as u32) + f32::from_bits(a[1] as u32)).to_bits())]
    }));
}

/// Element `coords` of a dense u32 tensor in 8-byte slots.
fn element_at(dims: &[u64], coords: &[i64]) -> Option<usize> {
    let mut index = 0;
    for (&dim, &c) in dims.iter().zip(coords).rev() {
        if c < 0 || c as u64 >= dim {
            return None;
        }
        index = index * dim as usize + c as usize;
    }
    Some(index)
}

/// The position inside the box of element number `i`, innermost first.
fn box_coords(box_dims: &[u32], mut i: u32) -> Vec<i64> {
    box_dims
        .iter()
        .map(|&n| {
            let c = i % n;
            i /= n;
            i64::from(c)
        })
        .collect()
}

fn tensors(all: &mut Vec<Form>) {
    let boxes: [&[u32]; 5] = [&[64], &[8, 8], &[8, 4, 2], &[8, 2, 2, 2], &[4, 2, 2, 2, 2]];
    for rank in 1..=5usize {
        tensor_loads(all, rank, boxes[rank - 1]);
        tensor_stores(all, rank, boxes[rank - 1]);
    }
}

/// The first thread loads a box at coordinates from -2 on; every thread reads two of its elements.
fn tensor_loads(all: &mut Vec<Form>, rank: usize, box_dims: &'static [u32]) {
    let inner: &[u64] = [&[][..], &[32], &[16, 8], &[16, 4, 4], &[8, 4, 4, 2]][rank - 1];
    let blocks = 8u32;
    let total = u64::from(blocks) * (1 + rank as u64) * 64; // u32 elements in the input buffer
    let mut dims = inner.to_vec();
    dims.push(total / inner.iter().product::<u64>());
    let coords = (0..rank).map(|i| format!("c{i}")).collect::<Vec<_>>().join(", ");
    let lower: String = (0..rank).map(|i| format!("sub.s32 c{i}, a{}, 2;\n", i + 1)).collect();
    for (m, operands, target) in [
        ("shared::cluster.global.tile.mbarrier::complete_tx::bytes", "", "sm_90"),
        ("shared::cluster.global.mbarrier::complete_tx::bytes", "", "sm_90"),
        ("shared::cta.global.tile.mbarrier::complete_tx::bytes", "", "sm_90"),
        ("shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint", ", policy", "sm_90"),
        ("shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster", ", everyone", "sm_90"),
    ] {
        let m = format!("cp.async.bulk.tensor.{rank}d.{m}");
        for swizzle in [Swizzle::None, Swizzle::B32] {
            if swizzle == Swizzle::B32 && (rank == 1 || rank == 5 || !operands.is_empty()) {
                continue;
            }
            let mut body = format!(
                "{BARRIER}{POLICY}.reg .b16 everyone;\nmov.u16 everyone, 1;\n.shared .align 1024 .b8 smem[256];\n.reg .b32 p, q, {coords};\n.reg .b64 t;\n\
                 mov.b64 t, map;\ncvta.param.u64 t, t;\nmov.u32 p, smem;\n{lower}@first mbarrier.init.shared.b64 [bar], 1;\n\
                 @first fence.mbarrier_init.release.cluster;\nbar.sync 0;\n@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;\n\
                 @first {m} [p], [t, {{{coords}}}], [bar]{operands};\n{WAIT}mad.lo.u32 q, tid, 8, p;\nld.shared.u64 d0, [q];"
            );
            if operands.is_empty() && swizzle == Swizzle::None && m.contains("cluster.global.tile") {
                let hint = format!("cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile");
                body = body.replace(
                    "bar.sync 0;",
                    &format!("bar.sync 0;\n@first {hint} [t, {{{coords}}}];\n@first {hint}.L2::cache_hint [t, {{{coords}}}], policy;\nprefetch.param.tensormap [map];"),
                );
            }
            let mut inputs = vec![(64, Domain::Int(64))];
            inputs.extend(dims.iter().map(|&d| (32, Domain::Below(d + 3))));
            let name = format!("{}{}", ident(&m), if swizzle == Swizzle::None { "" } else { "_swizzle_32" });
            let mut form = lane(name, target, &inputs, &[64], body, |_| vec![]);
            form.map = Some((TensorMap::dense(ElementType::U32, 0, &dims, box_dims, swizzle), Base::Input));
            let dims = dims.clone();
            form.expect = Expect::All(Box::new(move |inputs| {
                let slots: Vec<u64> = inputs.iter().flatten().flatten().copied().collect();
                let element = |i: usize| slots[i / 2] >> (32 * (i % 2)) & mask(32);
                inputs
                    .iter()
                    .map(|v| {
                        let at = |i: u32| {
                            let inside = box_coords(box_dims, i);
                            let coords: Vec<i64> = (0..rank).map(|r| v[1 + r][0] as i64 - 2 + inside[r]).collect();
                            element_at(&dims, &coords).map_or(0, element)
                        };
                        // a thread reads the 8 bytes at physical offset 8 t: swizzled, chunk c of row r holds chunk c ^ (r / 4 % 2)
                        let logical = |t: u32| {
                            let word = 2 * t;
                            if swizzle == Swizzle::None { word } else { word ^ (word / 32 % 2) << 2 }
                        };
                        vec![(0..32).map(|t| at(logical(t)) | at(logical(t) + 1) << 32).collect()]
                    })
                    .collect()
            }));
            all.push(form);
        }
    }
}

/// Every block owns 128 elements of a tensor over the scratch memory and writes, or reduces, a box of 64 into them.
fn tensor_stores(all: &mut Vec<Form>, rank: usize, box_dims: &'static [u32]) {
    let inner: &[u64] = [&[][..], &[16], &[16, 4], &[16, 2, 2], &[8, 2, 2, 2]][rank - 1];
    let per_block = 128 / inner.iter().product::<u64>();
    let mut dims = inner.to_vec();
    dims.push(8 * per_block);
    let coords = (0..rank).map(|i| format!("c{i}")).collect::<Vec<_>>().join(", ");
    // coordinate 0 may stick out on both sides; the last one selects the block
    let mut place = String::new();
    for i in 0..rank {
        if i + 1 == rank {
            place += &format!("mov.u32 c{i}, %ctaid.x;\nmul.lo.u32 c{i}, c{i}, {per_block};\n");
            if rank == 1 {
                place += "add.u32 c0, c0, a2;\n";
            }
        } else if i == 0 {
            place += "sub.s32 c0, a2, 2;\n";
        } else {
            place += &format!("mov.u32 c{i}, 0;\n");
        }
    }
    let range = if rank == 1 { 64 } else { inner[0] + 2 };
    type Op = fn(u64, u64) -> u64;
    let store: (&str, Op) = ("", |_, y| y);
    let reduces: [(&str, Op); 8] = [
        (".add", |x, y| x + y),
        (".min", |x, y| x.min(y)),
        (".max", |x, y| x.max(y)),
        (".and", |x, y| x & y),
        (".or", |x, y| x | y),
        (".xor", |x, y| x ^ y),
        (".inc", |x, y| if x >= y { 0 } else { x + 1 }),
        (".dec", |x, y| if x == 0 || x > y { y } else { x - 1 }),
    ];
    for (op, f) in [store].into_iter().chain(reduces) {
        for hint in [false, true] {
            if hint && !(op.is_empty() || op == ".add") || rank != 2 && !op.is_empty() && op != ".add" {
                continue;
            }
            let cp = if op.is_empty() { "cp.async" } else { "cp.reduce.async" };
            let m = format!(
                "{cp}.bulk.tensor.{rank}d.global.shared::cta{op}.tile.bulk_group{}",
                if hint { ".L2::cache_hint" } else { "" }
            );
            let policy = if hint { ", policy" } else { "" };
            // background: element e of the block's 128 holds a1 of thread e / 4, times its place
            let body = format!(
                "{POLICY}.shared .align 128 .b8 smem[256];\n.reg .b32 p, q, x, {coords};\n.reg .b64 g, t;\n.reg .pred first;\nsetp.eq.u32 first, tid, 0;\n\
                 mov.b64 t, map;\ncvta.param.u64 t, t;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 8, p;\nst.shared.u64 [q], a0;\n\
                 mov.u32 q, %ctaid.x;\nmul.lo.u32 q, q, 3584;\nmad.lo.u32 q, tid, -16, q;\ncvt.s64.s32 g, q;\nsub.s64 g, scratch, g;\n\
                 st.global.v2.b32 [g], {{a1, a1}};\nst.global.v2.b32 [g + 8], {{a1, a1}};\nfence.proxy.async;\nbar.sync 0;\n{place}\
                 @first {m} [t, {{{coords}}}], [p]{policy};\n@first cp.async.bulk.commit_group;\n@first cp.async.bulk.wait_group 0;\nbar.sync 0;\n\
                 ld.global.v2.b64 {{d0, d1}}, [g];"
            );
            let inputs = [(64, Domain::Int(64)), (32, Domain::Int(32)), (32, Domain::Below(range))];
            let mut form = lane(ident(&m), "sm_90", &inputs, &[64, 64], body, |_| vec![]);
            form.map = Some((TensorMap::dense(ElementType::U32, 0, &dims, box_dims, Swizzle::None), Base::Scratch));
            let dims = dims.clone();
            form.expect = Expect::All(Box::new(move |inputs| {
                let mut memory: Vec<u64> = vec![0; 8 * 128];
                for (b, v) in inputs.iter().enumerate() {
                    (0..128).for_each(|e| memory[128 * b + e] = v[1][e / 4]);
                }
                for (b, v) in inputs.iter().enumerate() {
                    let mut origin = vec![0; rank];
                    origin[0] = v[2][0] as i64 - if rank == 1 { 0 } else { 2 };
                    origin[rank - 1] += b as i64 * per_block as i64;
                    for i in 0..64 {
                        let inside = box_coords(box_dims, i);
                        let coords: Vec<i64> = origin.iter().zip(&inside).map(|(o, c)| o + c).collect();
                        if let Some(at) = element_at(&dims, &coords) {
                            let value = v[0][i as usize / 2] >> (32 * (i % 2)) & mask(32);
                            memory[at] = f(memory[at], value) & mask(32);
                        }
                    }
                }
                (0..8)
                    .map(|b| {
                        let pair = |t: usize, k: usize| {
                            memory[128 * b + 4 * t + 2 * k] | memory[128 * b + 4 * t + 2 * k + 1] << 32
                        };
                        vec![(0..32).map(|t| pair(t, 0)).collect(), (0..32).map(|t| pair(t, 1)).collect()]
                    })
                    .collect()
            }));
            all.push(form);
        }
    }
}

fn others(all: &mut Vec<Form>) {
    // st.async into the own block: a cluster of one
    for (ty, bits, n) in [
        ("b32", 32, 1u32),
        ("u32", 32, 1),
        ("s32", 32, 1),
        ("f32", 32, 1),
        ("b64", 64, 1),
        ("u64", 64, 1),
        ("s64", 64, 1),
        ("b32", 32, 2),
        ("b32", 32, 4),
        ("b64", 64, 2),
    ] {
        let vec = if n == 1 { String::new() } else { format!(".v{n}") };
        let m = format!("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{vec}.{ty}");
        let list = |p: &str| (0..n).map(|i| format!("{p}{i}")).collect::<Vec<_>>().join(", ");
        let (a, loads) = if n == 1 {
            (list("a"), format!("ld.shared.b{bits} d0, [q];"))
        } else {
            (format!("{{{}}}", list("a")), format!("ld.shared.v{n}.b{bits} {{{}}}, [q];", list("d")))
        };
        let bytes = 32 * n * bits / 8;
        let body = format!(
            "{BARRIER}.shared .align 16 .b8 smem[1024];\n.reg .b32 p, q, far, far_bar;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, {}, p;\n\
             @first mbarrier.init.shared.b64 [bar], 1;\n@first fence.mbarrier_init.release.cluster;\nbar.sync 0;\n\
             @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {bytes};\nbar.sync 0;\nmapa.shared::cluster.u32 far, q, 0;\n\
             mapa.shared::cluster.u32 far_bar, bar, 0;\n{m} [far], {a}, [far_bar];\n{WAIT}{loads}",
            n * bits / 8
        );
        all.push(lane(
            ident(&m),
            "sm_90",
            &vec![(bits, Domain::Int(bits)); n as usize],
            &vec![bits; n as usize],
            body,
            |a| a.to_vec(),
        ));
    }
    let body = "fence.proxy.async.global;\nfence.proxy.async.shared::cluster;\nmov.u32 d0, a0;";
    all.push(lane("fence_proxy_async", "sm_90", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
    let body = "griddepcontrol.wait;\nmov.u32 d0, a0;\ngriddepcontrol.launch_dependents;";
    all.push(lane("griddepcontrol", "sm_90", &[(32, Domain::Int(32))], &[32], body, |a| vec![a[0]]));
    // ranks of addresses in a cluster of two blocks
    let body = ".shared .align 4 .b8 smem[4];\n.reg .b32 p, q;\n.reg .b64 g, h;\nmov.u32 p, smem;\nmapa.shared::cluster.u32 q, p, 1;\n\
                getctarank.shared::cluster.u32 d0, q;\ncvt.u64.u32 g, p;\ncvta.shared.u64 g, g;\nmapa.u64 h, g, 1;\ngetctarank.u64 d1, h;\n\
                mov.u32 d2, %cluster_nctarank;\nmov.u32 d3, %cluster_ctarank;\nadd.u32 d3, d3, a0;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;";
    let mut form = lane("cluster_ranks", "sm_90", &[(32, Domain::Below(1))], &[32; 4], body, |_| vec![]);
    form.cluster = 2;
    form.expect = Expect::All(Box::new(|inputs| {
        (0..inputs.len() as u64).map(|b| vec![vec![1; 32], vec![1; 32], vec![2; 32], vec![b % 2; 32]]).collect()
    }));
    all.push(form);
    // an address in the other block, generic and back
    let body = ".shared .align 4 .b8 smem[4];\n.reg .b32 p, q;\n.reg .b64 g, h;\nmov.u32 p, smem;\nxor.b32 q, a0, 1;\nmapa.shared::cluster.u32 q, p, q;\n\
                cvt.u64.u32 h, q;\ncvta.shared::cluster.u64 g, h;\ngetctarank.u64 d0, g;\ncvta.to.shared::cluster.u64 g, g;\nsub.u64 d1, g, h;\n\
                barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;";
    let mut form = lane("cvta_shared_cluster_u64", "sm_90", &[(32, Domain::Below(1))], &[32, 64], body, |_| vec![]);
    form.cluster = 2;
    form.expect = Expect::All(Box::new(|inputs| inputs.iter().map(|_| vec![vec![1; 32], vec![0; 32]]).collect()));
    all.push(form);
}
