//! Exchange within a warp and barriers (PTX ISA 9.7.9.6 `shfl`, 9.7.13.1 to 9.7.13.11).

use super::int::mask;
use super::{Domain, Form, block, ident};

pub fn add(all: &mut Vec<Form>) {
    shuffles(all);
    votes(all);
    barriers(all);
    control(all);
}

fn shuffles(all: &mut Vec<Form>) {
    // 9.7.9.6, the pseudocode: c = segment mask << 8 | clamp; bounds within segments of 2^n lanes
    for mode in ["up", "down", "bfly", "idx"] {
        for width in [32u64, 16, 8, 4] {
            let clamp = if mode == "up" { 0 } else { 31 };
            let c = (32 - width) << 8 | clamp;
            let body =
                format!(".reg .pred p;\nshfl.sync.{mode}.b32 d0|p, a0, a1, {c}, 0xffffffff;\nselp.u32 d1, 1, 0, p;");
            // the source lane operand is the same for all lanes but for idx, where each lane asks for its own
            let inputs = [(32, Domain::Int(32)), (32, Domain::Below(32))];
            all.push(block(format!("shfl_sync_{mode}_b32_{width}"), "sm_80", &inputs, &[32, 32], body, move |v| {
                let mut d = vec![vec![0; 32]; 2];
                for lane in 0..32u64 {
                    let b = v[1][lane as usize] & 0x1f;
                    let segmask = c >> 8 & 0x1f;
                    let max_lane = lane & segmask | clamp & !segmask;
                    let min_lane = lane & segmask;
                    let (j, valid) = match mode {
                        "up" => (lane.wrapping_sub(b), lane as i64 - b as i64 >= max_lane as i64),
                        "down" => (lane + b, lane + b <= max_lane),
                        "bfly" => (lane ^ b, lane ^ b <= max_lane),
                        _ => {
                            let j = min_lane | b & !segmask;
                            (j, j <= max_lane)
                        }
                    };
                    let j = if valid { j } else { lane };
                    d[0][lane as usize] = v[0][j as usize];
                    d[1][lane as usize] = u64::from(valid);
                }
                d
            }));
        }
    }
    all.push(block(
        "shfl_sync_idx_nopred",
        "sm_80",
        &[(32, Domain::Int(32))],
        &[32],
        "shfl.sync.idx.b32 d0, a0, 5, 31, 0xffffffff;",
        |v| vec![vec![v[0][5]; 32]],
    ));
    // half of the warp only
    let body = ".reg .pred low;\nsetp.lt.u32 low, tid, 16;\nmov.u32 d0, 7;\n@low shfl.sync.bfly.b32 d0, a0, 1, 31, 0x0000ffff;";
    all.push(block("shfl_sync_half_warp", "sm_80", &[(32, Domain::Int(32))], &[32], body, |v| {
        vec![(0..32).map(|t| if t < 16 { v[0][t ^ 1] } else { 7 }).collect()]
    }));
}

fn votes(all: &mut Vec<Form>) {
    for (mode, f) in [("all", (|x| x.iter().all(|&x| x)) as fn(&[bool]) -> bool), ("any", |x| x.iter().any(|&x| x))] {
        for (name, domain) in [("", Domain::Below(2)), ("_rare", Domain::Below(40))] {
            let compare = if name.is_empty() { "ne" } else { "eq" };
            let body = format!(
                ".reg .pred p, q;\nsetp.{compare}.u32 p, a0, 0;\nvote.sync.{mode}.pred q, p, 0xffffffff;\nselp.u32 d0, 1, 0, q;"
            );
            let negate = !name.is_empty();
            all.push(block(format!("vote_sync_{mode}{name}"), "sm_80", &[(32, domain)], &[32], body, move |v| {
                let x: Vec<bool> = v[0].iter().map(|&x| (x != 0) != negate).collect();
                vec![vec![u64::from(f(&x)); 32]]
            }));
        }
    }
    for (name, n) in [("mixed", 2), ("same", 1)] {
        let body = ".reg .pred p, q;\nsetp.ne.u32 p, a0, 0;\nvote.sync.uni.pred q, p, 0xffffffff;\nselp.u32 d0, 1, 0, q;\nvote.sync.uni.pred q, !p, 0xffffffff;\nselp.u32 d1, 1, 0, q;";
        all.push(block(format!("vote_sync_uni_{name}"), "sm_80", &[(32, Domain::Below(n))], &[32, 32], body, |v| {
            let uniform = u64::from(v[0].iter().all(|&x| (x != 0) == (v[0][0] != 0)));
            vec![vec![uniform; 32]; 2]
        }));
    }
    let body = ".reg .pred p;\nsetp.ne.u32 p, a0, 0;\nvote.sync.ballot.b32 d0, p, 0xffffffff;\nvote.sync.ballot.b32 d1, !p, 0xffffffff;\nactivemask.b32 d2;";
    all.push(block("vote_sync_ballot", "sm_80", &[(32, Domain::Below(2))], &[32; 3], body, |v| {
        let ballot = (0..32).fold(0, |m, t| m | u64::from(v[0][t] != 0) << t);
        vec![vec![ballot; 32], vec![!ballot & mask(32); 32], vec![mask(32); 32]]
    }));
    for bits in [32, 64] {
        let wide = if bits == 64 { "mul.wide.u32 x, a0, 0x10001;" } else { "mov.u32 x, a0;" };
        let body = format!(
            ".reg .b{bits} x;\n.reg .pred p;\n{wide}\nmatch.any.sync.b{bits} d0, x, 0xffffffff;\nmatch.all.sync.b{bits} d1|p, x, 0xffffffff;\nselp.u32 d2, 1, 0, p;"
        );
        for n in [1, 5] {
            all.push(block(
                format!("match_sync_b{bits}_{n}"),
                "sm_80",
                &[(32, Domain::Below(n))],
                &[32; 3],
                body.clone(),
                |v| {
                    let x = &v[0];
                    let any = (0..32).map(|t| (0..32).fold(0, |m, u| m | u64::from(x[t] == x[u]) << u)).collect();
                    let same = x.iter().all(|&y| y == x[0]);
                    vec![any, vec![if same { mask(32) } else { 0 }; 32], vec![u64::from(same); 32]]
                },
            ));
        }
    }
    for (ty, f) in [("u32", false), ("s32", true)] {
        for op in ["add", "min", "max"] {
            let m = format!("redux.sync.{op}.{ty}");
            all.push(block(
                ident(&m),
                "sm_80",
                &[(32, Domain::Int(32))],
                &[32],
                format!("{m} d0, a0, 0xffffffff;"),
                move |v| {
                    let x = v[0].iter().map(|&x| if f { i64::from(x as i32) } else { x as i64 });
                    let d = match op {
                        "add" => x.sum::<i64>(),
                        "min" => x.min().unwrap(),
                        _ => x.max().unwrap(),
                    };
                    vec![vec![d as u64 & mask(32); 32]]
                },
            ));
        }
    }
    for (op, f) in [("and", (|a, b| a & b) as fn(u64, u64) -> u64), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)] {
        let m = format!("redux.sync.{op}.b32");
        all.push(block(
            ident(&m),
            "sm_80",
            &[(32, Domain::Int(32))],
            &[32],
            format!("{m} d0, a0, 0xffffffff;"),
            move |v| vec![vec![v[0].iter().copied().reduce(f).unwrap(); 32]],
        ));
    }
    let body = ".reg .pred p;\nelect.sync d0|p, 0xffffffff;\nselp.u32 d1, 1, 0, p;\nadd.u32 d1, d1, a0;";
    all.push(block("elect_sync", "sm_90", &[(32, Domain::Below(1))], &[32; 2], body, |_| {
        // any one lane may be elected by the document; the lowest is what hardware and simulator choose
        vec![vec![0; 32], (0..32).map(|t| u64::from(t == 0)).collect()]
    }));
}

fn barriers(all: &mut Vec<Form>) {
    // 128 threads: the neighbour warp's value across each kind of barrier
    for (name, target, sync) in [
        ("bar_sync", "sm_80", "bar.sync 1;"),
        ("bar_cta_sync", "sm_80", "bar.cta.sync 2, 128;"),
        ("barrier_sync_aligned", "sm_80", "barrier.sync.aligned 3;"),
        ("barrier_sync", "sm_80", "barrier.sync 3;"),
        ("barrier_cta_sync", "sm_80", "barrier.cta.sync 9, 128;"),
        ("barrier_cta_sync_aligned", "sm_80", "barrier.cta.sync.aligned 15, 128;"),
        ("bar_sync_register", "sm_80", ".reg .b32 id;\nmov.u32 id, 5;\nbar.sync id, 128;"),
    ] {
        let body = format!(
            ".shared .align 4 .b8 smem[512];\n.reg .b32 p, q;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 4, p;\nst.shared.u32 [q], a0;\n{sync}\n\
             xor.b32 q, tid, 64;\nmad.lo.u32 q, q, 4, p;\nld.shared.u32 d0, [q];"
        );
        let mut form = block(name, target, &[(32, Domain::Int(32))], &[32], body, |v| {
            vec![(0..128).map(|t| v[0][t ^ 64]).collect()]
        });
        form.threads = 128;
        all.push(form);
    }
    // producers arrive, consumers sync
    for (name, arrive, sync) in [
        ("bar_arrive", "bar.arrive 4, 128", "bar.sync 4, 128"),
        ("barrier_arrive_aligned", "barrier.cta.arrive.aligned 4, 128", "bar.cta.sync 4, 128"),
        ("bar_cta_arrive", "bar.cta.arrive 4, 128", "barrier.sync.aligned 4, 128"),
        ("barrier_aligned_arrive", "barrier.arrive.aligned 4, 128", "bar.sync 4, 128"),
        ("barrier_arrive", "barrier.arrive 4, 128", "barrier.sync 4, 128"),
    ] {
        let body = format!(
            ".shared .align 4 .b8 smem[512];\n.reg .b32 p, q;\n.reg .pred low;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 4, p;\nsetp.lt.u32 low, tid, 64;\n\
             mov.u32 d0, 1;\n@low bra PRODUCE;\n{sync};\nxor.b32 q, tid, 64;\nmad.lo.u32 q, q, 4, p;\nld.shared.u32 d0, [q];\nbra DONE;\nPRODUCE:\n\
             st.shared.u32 [q], a0;\n{arrive};\nDONE:"
        );
        let mut form = block(name, "sm_80", &[(32, Domain::Int(32))], &[32], body, |v| {
            vec![(0..128).map(|t| if t < 64 { 1 } else { v[0][t ^ 64] }).collect()]
        });
        form.threads = 128;
        all.push(form);
    }
    for (op, red) in [
        ("bar.red", ""),
        ("bar.cta.red", ""),
        ("barrier.red", ""),
        ("barrier.red", ".aligned"),
        ("barrier.cta.red", ".aligned"),
    ] {
        for n in [2, 200] {
            let body = format!(
                ".reg .pred p, q;\nsetp.ne.u32 p, a0, 0;\n{op}.popc{red}.u32 d0, 0, p;\n{op}.and{red}.pred q, 0, p;\nselp.u32 d1, 1, 0, q;\n\
                 {op}.or{red}.pred q, 0, !p;\nselp.u32 d2, 1, 0, q;"
            );
            let mut form = block(
                format!("{}_{n}", ident(&format!("{op}{red}"))),
                "sm_80",
                &[(32, Domain::Below(n))],
                &[32; 3],
                body,
                |v| {
                    let count = v[0].iter().filter(|&&x| x != 0).count() as u64;
                    vec![vec![count; 128], vec![u64::from(count == 128); 128], vec![u64::from(count < 128); 128]]
                },
            );
            form.threads = 128;
            all.push(form);
        }
    }
    // memory fences: message passing between two warps through shared memory with a volatile flag
    for (fence, target) in [
        ("membar.cta", "sm_80"),
        ("membar.gl", "sm_80"),
        ("membar.sys", "sm_80"),
        ("fence.acq_rel.cta", "sm_80"),
        ("fence.acq_rel.gpu", "sm_80"),
        ("fence.acq_rel.sys", "sm_80"),
        ("fence.sc.cta", "sm_80"),
        ("fence.sc.gpu", "sm_80"),
        ("fence.sc.sys", "sm_80"),
        ("fence.acq_rel.cluster", "sm_90"),
        ("fence.sc.cluster", "sm_90"),
    ] {
        let body = format!(
            ".reg .pred first, ready;\n.reg .b32 flag;\nsetp.eq.u32 first, tid, 0;\n@first st.global.u32 [scratch + 8], 0;\nbar.sync 0;\n\
             setp.ge.u32 first, tid, 64;\n@first bra READ;\nsetp.eq.u32 first, tid, 0;\n@!first bra END;\nst.global.u32 [scratch], a0;\n{fence};\n\
             st.relaxed.gpu.global.u32 [scratch + 8], 1;\nEND:\nmov.u32 d0, 5;\nbra DONE;\nREAD:\nld.relaxed.gpu.global.u32 flag, [scratch + 8];\n\
             setp.eq.u32 ready, flag, 1;\n@!ready bra READ;\nbar.warp.sync 0xffffffff;\n{fence};\nld.global.u32 d0, [scratch];\nDONE:"
        );
        let mut form = block(ident(fence), target, &[(32, Domain::Int(32))], &[32], body, |v| {
            vec![(0..128).map(|t| if t < 64 { 5 } else { v[0][0] }).collect()]
        });
        form.threads = 128;
        all.push(form);
    }
}

fn control(all: &mut Vec<Form>) {
    // a loop whose trip count differs per lane, then a uniform branch
    let body = ".reg .b32 i;\n.reg .pred more;\nmov.u32 d0, 0;\nmov.u32 i, a0;\nNEXT:\nsetp.eq.u32 more, i, 0;\n@more bra OUT;\nadd.u32 d0, d0, i;\n\
                sub.u32 i, i, 1;\nbra NEXT;\nOUT:\nbar.warp.sync 0xffffffff;\nbra.uni ON;\nadd.u32 d0, d0, 100;\nON:";
    all.push(block("bra_loop", "sm_80", &[(32, Domain::Below(20))], &[32], body, |v| {
        vec![v[0].iter().map(|&n| n * (n + 1) / 2).collect()]
    }));
    // lanes leave early: what they stored stays
    let body = ".reg .pred odd;\n.reg .b32 low;\nand.b32 low, tid, 1;\nsetp.eq.u32 odd, low, 1;\nmov.u32 d0, a0;\n@!odd bra STAY;\n\
                st.global.b32 [out], 9;\nexit;\nSTAY:\nnanosleep.u32 20;";
    all.push(block("exit_early", "sm_80", &[(32, Domain::Int(32))], &[32], body, |v| {
        vec![(0..32).map(|t| if t % 2 == 1 { 9 } else { v[0][t] }).collect()]
    }));
    // reads of clocks only have to work
    let body = ".reg .b32 c;\n.reg .b64 t, u;\nmov.u32 c, %clock;\nmov.u64 t, %clock64;\nmov.u64 u, %globaltimer;\nmov.u32 c, %smid;\nmov.u32 c, %warpid;\nmov.u32 d0, a0;";
    all.push(block("special_clocks", "sm_80", &[(32, Domain::Int(32))], &[32], body, |v| vec![v[0].clone()]));
}
