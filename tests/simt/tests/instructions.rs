//! Every instruction form against the PTX ISA: each micro-kernel of `forms/` runs in the simulator, under both modes, and its outputs are
//! compared to what the document's formulas and tables say.

mod forms;

use std::collections::BTreeSet;

use simt::model::mma::{Arch, Numerics};
use simt::model::tensor_map::TensorMap;
use simt::{Launch, Mode, Module, Report, Sim};

/// Runs a form and returns its outputs.
fn run(form: &forms::Form, seed: u64, mode: Mode) -> Result<(Vec<u64>, Report), String> {
    let module = Module::parse(&format!("{}.ptx", form.name), &form.ptx()).map_err(|e| e.to_string())?;
    let mut sim = Sim::new();
    let input = sim.upload(&form.input_slots());
    // narrow outputs leave the upper bytes of their slot alone
    let out = sim.upload(&vec![0u64; form.output_len()]);
    let scratch = sim.alloc(4096 * u64::from(form.blocks));
    let mut launch = Launch::new([form.blocks, 1, 1], [form.threads, 1, 1])
        .cluster([form.cluster, 1, 1])
        .arg(input)
        .arg(out)
        .arg(scratch)
        .seed(seed)
        .mode(mode)
        .numerics(Numerics::Exact(Arch::Hopper));
    if let Some((map, base)) = &form.map {
        let at = if *base == forms::Base::Input { input } else { scratch };
        launch = launch.arg(&TensorMap { address: map.address + at, ..map.clone() });
    }
    let report = sim.launch(&module, &form.name, &launch).map_err(|e| e.to_string())?;
    Ok((sim.read(out, form.output_len()), report))
}

#[test]
fn every_form_is_what_the_isa_says() {
    let mut failures = vec![];
    let forms = forms::all();
    let count = forms.len();
    for form in &forms {
        for (seed, mode) in [(1, Mode::LockStep), (2, Mode::Split)] {
            let result = run(form, seed, mode).and_then(|(out, report)| {
                if !report.is_clean() {
                    return Err(format!("{}: {report}", form.name));
                }
                form.check(&out)
            });
            if let Err(e) = result {
                failures.push(e);
                break;
            }
        }
    }
    for failure in &failures {
        eprintln!("{failure}");
    }
    assert!(failures.is_empty(), "{} of {count} forms failed", failures.len());
}

/// Whatever the decoder accepts, some test runs.
#[test]
fn every_modifier_of_the_grammar_is_exercised() {
    let mut missing: BTreeSet<String> = simt::coverage::known().into_iter().collect();
    let mut cover = |file: &str, text: &str| match simt::coverage::used(file, text) {
        Ok(used) => used.iter().for_each(|u| {
            missing.remove(u);
        }),
        Err(e) => panic!("{e}"),
    };
    for form in forms::all() {
        cover(&form.name, &form.ptx());
    }
    for dir in ["kernels", "faults"] {
        for entry in std::fs::read_dir(format!("{}/tests/{dir}", env!("CARGO_MANIFEST_DIR"))).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "ptx") {
                cover(&path.to_string_lossy(), &std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let missing: Vec<String> = missing.into_iter().collect();
    assert!(missing.is_empty(), "{} modifiers without a test:\n{}", missing.len(), missing.join("\n"));
}

/// Writes every micro-kernel to the directory in `FORMS_DIR`, for a look or for ptxas.
#[test]
fn write_all() {
    let Ok(dir) = std::env::var("FORMS_DIR") else { return };
    for form in forms::all() {
        std::fs::write(format!("{dir}/{}.ptx", form.name), form.ptx()).unwrap();
    }
}
