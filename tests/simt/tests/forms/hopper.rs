//! sm_90 and sm_90a: mbarriers, bulk copies, `wgmma` (PTX ISA 9.7.13.15, 9.7.9.25, 9.7.15).

use simt::model::float::{BF16, E4M3, E5M2, F16, F32, TF32};

use super::matrix::{Oracle, a_position, c_position, raw};
use super::{Domain, Element, Form, block, ident};

pub fn add(all: &mut Vec<Form>) {
    wgmma_float(all);
    wgmma_integer(all);
    wgmma_layouts(all);
}

/// Three pieces of text shared by the `wgmma` bodies: every thread stores 16-byte chunks of A and B as generic writes, fences, and builds the
/// descriptors.
const FENCE: &str = "fence.proxy.async.shared::cta;\nbar.sync 0;";

fn descriptor(name: &str, base: &str, offset: u32, leading: u32, stride: u32, mode: u64) -> String {
    let constant = u64::from(leading / 16) << 16 | u64::from(stride / 16) << 32 | mode << 62;
    format!(
        ".reg .b64 {name};\nadd.u32 q, {base}, {offset};\nshr.u32 q, q, 4;\ncvt.u64.u32 {name}, q;\nor.b64 {name}, {name}, {:#018x};\n",
        constant
    )
}

fn registers(prefix: &str, n: usize) -> String {
    (0..n).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>().join(", ")
}

fn wgmma_float(all: &mut Vec<Form>) {
    let types = [
        ("f32", "f16", "f16", Element::F16, Element::F16),
        ("f16", "f16", "f16", Element::F16, Element::F16),
        ("f32", "bf16", "bf16", Element::Bf16, Element::Bf16),
        ("f32", "tf32", "tf32", Element::Tf32, Element::Tf32),
        ("f32", "e4m3", "e4m3", Element::E4m3, Element::E4m3),
        ("f32", "e4m3", "e5m2", Element::E4m3, Element::E5m2),
        ("f32", "e5m2", "e4m3", Element::E5m2, Element::E4m3),
        ("f32", "e5m2", "e5m2", Element::E5m2, Element::E5m2),
        ("f16", "e4m3", "e4m3", Element::E4m3, Element::E4m3),
        ("f16", "e5m2", "e5m2", Element::E5m2, Element::E5m2),
    ];
    for (d, a, b, ea, eb) in types {
        let format = |name: &str| match name {
            "f16" => F16,
            "bf16" => BF16,
            "tf32" => TF32,
            "e4m3" => E4M3,
            "e5m2" => E5M2,
            _ => F32,
        };
        let bits = format(a).width() as usize;
        let k = 256 / bits;
        let fp8 = bits == 8;
        let acc = format(d);
        let oracle = Oracle {
            a: format(a),
            b: format(b),
            acc,
            fraction: if fp8 { 13 } else { 25 },
            result_bits: if fp8 { 13 } else { 23 },
        };
        for n in (8..=256usize).step_by(8) {
            // above 64 columns: one block, no C
            let wide = n > 64;
            for from_registers in [false, true] {
                // the wide shapes once for every row of the table of types
                let main = d == "f32" && a == b && a != "e5m2";
                if wide && (from_registers != (n % 16 == 0) || !main) {
                    continue;
                }
                // 16-bit types take two immediates for the major order, others none; 16 columns also test the sign immediates and scale-d
                let negate = n == 16;
                let scales = if negate { "-1, -1" } else { "1, 1" };
                let trans = match (bits, from_registers) {
                    (16, false) => ", 0, 0",
                    (16, true) => ", 0",
                    _ => "",
                };
                let nd = n / 2 * acc.width() as usize / 32;
                let m = format!("wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b}");
                let mut form = block(String::new(), "sm_90a", &[], &[], "", |_| vec![]);
                form.name = format!("{}_{}", ident(&m), if from_registers { "rs" } else { "ss" });
                form.threads = 128;
                // operands come as 32-bit words so that they are sensible numbers: A (4 words), B (4 words), C
                form.inputs = vec![(32, Domain::Matrix(ea)); 4];
                // 2 n chunks of B, up to four per thread
                let nb = (2 * n).div_ceil(128);
                form.inputs.extend(vec![(32, Domain::Matrix(eb)); 4 * nb]);
                let first_c = 4 + 4 * nb;
                let num_c = if wide { 0 } else { nd };
                let c_element = if d == "f16" { Element::F16 } else { Element::F32 };
                form.inputs.extend(vec![(32, Domain::Matrix(c_element)); num_c]);
                form.inputs.push((32, Domain::Below(if wide { 1 } else { 2 })));
                form.outputs = vec![32; nd];
                form.blocks = if n > 16 { 1 } else { 8 };
                let scale_input = first_c + num_c;
                let mut body = String::from(
                    ".shared .align 128 .b8 smem[10240];\n.reg .b32 p, q, scale;\n.reg .pred use_d, has_b;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 16, p;\n",
                );
                if !from_registers {
                    body += "st.shared.v4.b32 [q], {a0, a1, a2, a3};\n";
                }
                for part in 0..nb {
                    let list = (4 + 4 * part..8 + 4 * part).map(|i| format!("a{i}")).collect::<Vec<_>>().join(", ");
                    body += &format!(
                        "setp.lt.u32 has_b, tid, {};\n@has_b st.shared.v4.b32 [q + {}], {{{list}}};\n",
                        2 * n - 128 * part,
                        2048 * (part + 1)
                    );
                }
                body += FENCE;
                body += "\n";
                // chunk (row, half) of A at 16 (row + 64 half): stride between groups of 8 rows 128, leading between halves 1024
                body += &descriptor("da", "p", 0, 1024, 128, 0);
                body += &descriptor("db", "p", 2048, 16 * n as u32, 128, 0);
                for i in 0..nd {
                    body += &if wide {
                        format!("mov.b32 d{i}, 0;\n")
                    } else {
                        format!("mov.b32 d{i}, a{};\n", first_c + i)
                    };
                }
                // the predicate must be the same in all threads: thread 0's
                body += &format!(
                    ".shared .align 4 .b8 flag[4];\n.reg .b32 f;\nmov.u32 f, flag;\nsetp.eq.u32 has_b, tid, 0;\n@has_b st.shared.u32 [f], a{scale_input};\n\
                     bar.sync 0;\nld.shared.u32 scale, [f];\nsetp.ne.u32 use_d, scale, 0;\n"
                );
                let a_text = if from_registers { "{a0, a1, a2, a3}" } else { "da" };
                body += &format!(
                    "wgmma.fence.sync.aligned;\n{m} {{{}}}, {a_text}, db, use_d, {scales}{trans};\nwgmma.commit_group.sync.aligned;\n\
                     wgmma.wait_group.sync.aligned 0;",
                    registers("d", nd)
                );
                form.body = body;
                form.expect = super::Expect::Block(Box::new(move |v| {
                    let words = |first: usize, t: usize, i: usize| raw(v, first, t, bits, i);
                    let per = 128 / bits;
                    let word_b = |chunk: usize, i: usize| words(4 + 4 * (chunk / 128), chunk % 128, i);
                    let rows_b: Vec<Vec<u32>> =
                        (0..n).map(|r| (0..k).map(|i| word_b(r + n * (i / per), i % per)).collect()).collect();
                    let rows_a: Vec<Vec<u32>> = if from_registers {
                        let mut rows = vec![vec![0; k]; 64];
                        for t in 0..128 {
                            for i in 0..4 * 32 / bits {
                                let (row, col) = a_position(bits, t % 32, i);
                                rows[16 * (t / 32) + row][col] = words(0, t, i);
                            }
                        }
                        rows
                    } else {
                        (0..64).map(|r| (0..k).map(|i| words(0, r + 64 * (i / per), i % per)).collect()).collect()
                    };
                    let width = acc.width() as usize;
                    let scale = v[scale_input][0];
                    let mut out = vec![vec![0; 128]; nd];
                    for t in 0..128 {
                        for i in 0..n / 2 {
                            let (row, col) = c_position(t % 32, i);
                            let c = if scale == 0 { 0 } else { raw(v, first_c, t, width, i) };
                            let pairs: Vec<_> =
                                rows_a[16 * (t / 32) + row].iter().copied().zip(rows_b[col].iter().copied()).collect();
                            // both operands negated: the product is the same
                            out[i * width / 32][t] |= u64::from(oracle.dot(&pairs, c)) << (i * width % 32);
                        }
                    }
                    out
                }));
                all.push(form);
            }
        }
    }
}

fn wgmma_integer(all: &mut Vec<Form>) {
    let mut shapes = vec![];
    for (a, b) in [("s8", "s8"), ("u8", "u8"), ("s8", "u8"), ("u8", "s8")] {
        shapes.extend([(a, b, false, 8), (a, b, true, 8)]);
    }
    // 9.7.15.2: 8-bit integers have 8, 24 and the multiples of 16
    shapes.extend([24].into_iter().chain((16..=256).step_by(16)).map(|n| ("s8", "u8", false, n)));
    for (a, b, satfinite, n) in shapes {
        for from_registers in [false, true] {
            all.push(wgmma_integer_form(a, b, satfinite, n, from_registers));
        }
    }
}

/// One shape; D starts from C for 8 columns and from 0 for more.
fn wgmma_integer_form(a: &'static str, b: &'static str, satfinite: bool, n: usize, from_registers: bool) -> Form {
    let (nd, nb) = (n / 2, (2 * n).div_ceil(128));
    let (first_c, num_c) = (4 + 4 * nb, if n == 8 { 4 } else { 0 });
    let sat = if satfinite { ".satfinite" } else { "" };
    let m = format!("wgmma.mma_async.sync.aligned.m64n{n}k32{sat}.s32.{a}.{b}");
    let name = format!("{}_{}", ident(&m), if from_registers { "rs" } else { "ss" });
    let mut form = block(name, "sm_90a", &[], &vec![32; nd], "", |_| vec![]);
    form.threads = 128;
    form.blocks = if n == 8 { 8 } else { 1 };
    form.inputs = vec![(32, Domain::Matrix(Element::Int8)); first_c];
    form.inputs.extend(vec![(32, Domain::Int(32)); num_c]);
    let store_a = if from_registers { "" } else { "st.shared.v4.b32 [q], {a0, a1, a2, a3};\n" };
    let mut body = format!(
        ".shared .align 128 .b8 smem[10240];\n.reg .b32 p, q;\n.reg .pred has_b;\nmov.u32 p, smem;\nmad.lo.u32 q, tid, 16, p;\n{store_a}"
    );
    for part in 0..nb {
        let list = (4 + 4 * part..8 + 4 * part).map(|i| format!("a{i}")).collect::<Vec<_>>().join(", ");
        let (chunks, at) = (2 * n - 128 * part, 2048 * (part + 1));
        body += &format!("setp.lt.u32 has_b, tid, {chunks};\n@has_b st.shared.v4.b32 [q + {at}], {{{list}}};\n");
    }
    body += FENCE;
    body += "\n";
    body += &descriptor("da", "p", 0, 1024, 128, 0);
    body += &descriptor("db", "p", 2048, 16 * n as u32, 128, 0);
    for i in 0..num_c {
        body += &format!("mov.b32 d{i}, a{};\n", first_c + i);
    }
    body += &format!(
        "wgmma.fence.sync.aligned;\n{m} {{{}}}, {}, db, {};\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;",
        registers("d", nd),
        if from_registers { "{a0, a1, a2, a3}" } else { "da" },
        u32::from(num_c > 0)
    );
    form.body = body;
    form.expect = super::Expect::Block(Box::new(move |v| {
        let read = |ty: &str, x: u32| if ty == "s8" { i64::from(x as u8 as i8) } else { i64::from(x) };
        let mut rows_a = vec![vec![0; 32]; 64];
        for t in 0..128 {
            for i in 0..16 {
                let (row, col) = if from_registers {
                    let (row, col) = a_position(8, t % 32, i);
                    (16 * (t / 32) + row, col)
                } else {
                    (t % 64, 16 * (t / 64) + i)
                };
                rows_a[row][col] = read(a, raw(v, 0, t, 8, i));
            }
        }
        let element_b = |r: usize, i: usize| {
            let chunk = r + n * (i / 16);
            read(b, raw(v, 4 + 4 * (chunk / 128), chunk % 128, 8, i % 16))
        };
        let rows_b: Vec<Vec<i64>> = (0..n).map(|r| (0..32).map(|i| element_b(r, i)).collect()).collect();
        let one = |t: usize, i: usize| {
            let (row, col) = c_position(t % 32, i);
            let dot: i64 = rows_a[16 * (t / 32) + row].iter().zip(&rows_b[col]).map(|(x, y)| x * y).sum();
            let sum = dot + if num_c > 0 { i64::from(v[first_c + i][t] as i32) } else { 0 };
            u64::from(if satfinite { sum.clamp(i32::MIN.into(), i32::MAX.into()) } else { sum } as u32)
        };
        (0..nd).map(|i| (0..128).map(|t| one(t, i)).collect()).collect()
    }));
    form
}

/// Every swizzle and both major orders, on bf16 m64n64k16: chunks are placed by the canonical layouts of 9.7.15.5.1 and swizzled by hand.
fn wgmma_layouts(all: &mut Vec<Form>) {
    for (mode, width, bits) in [(0u64, 16u32, 0u32), (3, 32, 1), (2, 64, 3), (1, 128, 7)] {
        for major in ["k", "mn"] {
            let mut form =
                block(format!("wgmma_layout_{major}_major_swizzle_{width}"), "sm_90a", &[], &[32; 32], "", |_| vec![]);
            form.threads = 128;
            form.blocks = 4;
            form.inputs = vec![(32, Domain::Matrix(Element::Bf16)); 8];
            // logical byte offset of this thread's chunk; both operands have 64 rows and one k-step of 16
            let (place, leading, stride, immediates) = if major == "k" {
                // row = tid % 64, half = tid / 64
                let half = if mode == 0 { 1024 } else { 16 };
                (
                    format!(
                        "and.b32 r, tid, 63;\nshr.u32 h, tid, 6;\nmul.lo.u32 o, r, {width};\nmad.lo.u32 o, h, {half}, o;\n"
                    ),
                    if mode == 0 { 1024 } else { 16 },
                    8 * width,
                    "0, 0",
                )
            } else {
                // rows 8 (tid % 8) .. + 8 at k = tid / 8
                let span = width / 2;
                if mode == 0 {
                    (
                        "and.b32 r, tid, 7;\nshr.u32 h, tid, 3;\nmul.lo.u32 o, r, 256;\nand.b32 q, h, 7;\nmad.lo.u32 o, q, 16, o;\nshr.u32 q, h, 3;\n\
                         mad.lo.u32 o, q, 128, o;\n"
                            .to_string(),
                        128,
                        256,
                        "1, 1",
                    )
                } else {
                    let per = span / 8; // chunks side by side
                    (
                        format!(
                            "and.b32 r, tid, 7;\nshr.u32 h, tid, 3;\nand.b32 q, r, {};\nmul.lo.u32 o, q, 16;\nshr.u32 q, r, {};\nmad.lo.u32 o, q, {}, o;\n\
                             and.b32 q, h, 7;\nmad.lo.u32 o, q, {width}, o;\nshr.u32 q, h, 3;\nmad.lo.u32 o, q, {}, o;\n",
                            per - 1,
                            per.trailing_zeros(),
                            16 * width,
                            8 * width
                        ),
                        16 * width,
                        8 * width,
                        "1, 1",
                    )
                }
            };
            let swizzle = format!("shr.u32 q, o, 7;\nand.b32 q, q, {bits};\nshl.b32 q, q, 4;\nxor.b32 o, o, q;\n");
            let mut body = format!(
                ".shared .align 1024 .b8 smem[16384];\n.reg .b32 p, q, r, h, o;\nmov.u32 p, smem;\n{place}{swizzle}add.u32 o, o, p;\n\
                 st.shared.v4.b32 [o], {{a0, a1, a2, a3}};\nst.shared.v4.b32 [o + 8192], {{a4, a5, a6, a7}};\n{FENCE}\n"
            );
            body += &descriptor("da", "p", 0, leading, stride, mode);
            body += &descriptor("db", "p", 8192, leading, stride, mode);
            body += &format!(
                "wgmma.fence.sync.aligned;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{{}}}, da, db, 0, 1, 1, {immediates};\n\
                 wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;",
                registers("d", 32)
            );
            form.body = body;
            let oracle = Oracle { a: BF16, b: BF16, acc: F32, fraction: 25, result_bits: 23 };
            form.expect = super::Expect::Block(Box::new(move |v| {
                let rows = |first: usize| -> Vec<Vec<u32>> {
                    (0..64)
                        .map(|r| {
                            (0..16)
                                .map(|k| {
                                    if major == "k" {
                                        raw(v, first, r + 64 * (k / 8), 16, k % 8)
                                    } else {
                                        raw(v, first, r / 8 + 8 * k, 16, r % 8)
                                    }
                                })
                                .collect()
                        })
                        .collect()
                };
                let (a, b) = (rows(0), rows(4));
                (0..32)
                    .map(|i| {
                        (0..128)
                            .map(|t| {
                                let (row, col) = c_position(t % 32, i);
                                let pairs: Vec<_> =
                                    a[16 * (t / 32) + row].iter().copied().zip(b[col].iter().copied()).collect();
                                u64::from(oracle.dot(&pairs, 0))
                            })
                            .collect()
                    })
                    .collect()
            }));
            all.push(form);
        }
    }
}
