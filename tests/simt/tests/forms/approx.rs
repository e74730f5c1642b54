//! Approximate functions (PTX ISA 9.7.3.13 to 9.7.3.22, 9.7.4.9, 9.7.4.10): special values exactly, the rest within the documented bounds.

use simt::model::approx::Function;
use simt::model::float::{BF16, F16, F32};

use super::{Domain, Expect, Form, ident, lane};

pub fn add(all: &mut Vec<Form>) {
    let mut push = |mnemonic: String, target, width, domain, expect| {
        let mut form =
            lane(ident(&mnemonic), target, &[(width, domain)], &[width], format!("{mnemonic} d0, a0;"), |_| vec![]);
        form.blocks = 16;
        form.expect = expect;
        all.push(form);
    };
    for ftz in [false, true] {
        let z = if ftz { ".ftz" } else { "" };
        for (name, function) in [
            ("ex2", Function::Ex2),
            ("lg2", Function::Lg2),
            ("rcp", Function::Rcp),
            ("rsqrt", Function::Rsqrt),
            ("sqrt", Function::Sqrt),
            ("sin", Function::Sin),
            ("cos", Function::Cos),
        ] {
            push(
                format!("{name}.approx{z}.f32"),
                "sm_80",
                32,
                Domain::F32,
                Expect::Approx { function, format: F32, ftz, pair: false },
            );
        }
    }
    let approx = |function, format, ftz, pair| Expect::Approx { function, format, ftz, pair };
    push("tanh.approx.f32".into(), "sm_80", 32, Domain::F32, approx(Function::Tanh, F32, false, false));
    for (name, pair) in [("f16", false), ("f16x2", true)] {
        let (width, domain) = if pair { (32, Domain::F16x2) } else { (16, Domain::F16) };
        push(format!("ex2.approx.{name}"), "sm_80", width, domain, approx(Function::Ex2, F16, false, pair));
        push(format!("tanh.approx.{name}"), "sm_80", width, domain, approx(Function::Tanh, F16, false, pair));
    }
    for (name, pair) in [("bf16", false), ("bf16x2", true)] {
        let (width, domain) = if pair { (32, Domain::Bf16x2) } else { (16, Domain::Bf16) };
        push(format!("ex2.approx.ftz.{name}"), "sm_90", width, domain, approx(Function::Ex2, BF16, true, pair));
        push(format!("tanh.approx.{name}"), "sm_90", width, domain, approx(Function::Tanh, BF16, false, pair));
    }
}
