//! Replays what a GPU has computed: every file in `vectors/` against the simulator in `Exact` mode, bit for bit. See `vectors/README.md`.

mod forms;
#[path = "../../common/skip.rs"]
mod skip;

use forms::record::{Line, hash, header, inputs_hash};
use forms::{Expect, Form};
use simt::model::mma::{Arch, Numerics};
use simt::model::tensor_map::TensorMap;
use simt::{Launch, Module, Sim};

fn simulate(form: &Form, arch: Arch) -> Vec<u64> {
    let module = Module::parse(&form.name, &form.ptx()).unwrap_or_else(|e| panic!("{e}"));
    let mut sim = Sim::new();
    let input = sim.upload(&form.input_slots());
    let out = sim.upload(&vec![0u64; form.output_len()]);
    let scratch = sim.alloc(4096 * u64::from(form.blocks));
    let mut launch = Launch::new([form.blocks, 1, 1], [form.threads, 1, 1])
        .cluster([form.cluster, 1, 1])
        .arg(input)
        .arg(out)
        .arg(scratch)
        .numerics(Numerics::Exact(arch));
    if let Some((map, base)) = &form.map {
        let at = if *base == forms::Base::Input { input } else { scratch };
        launch = launch.arg(&TensorMap { address: map.address + at, ..map.clone() });
    }
    sim.launch(&module, &form.name, &launch).unwrap_or_else(|e| panic!("{e}")).assert_clean();
    sim.read(out, form.output_len())
}

/// Compares one recorded form.
fn compare(form: &Form, line: &Line, arch: Arch) -> Result<(), String> {
    if line.inputs != inputs_hash(form) {
        return Err(format!("{}: the form has changed since: record again", form.name));
    }
    match form.expect {
        // the hardware must keep the documented bound; the simulator errs within the same bound, but elsewhere
        Expect::Approx { .. } | Expect::Division { .. } => {
            form.check(&line.slots).map_err(|e| format!("hardware: {e}"))
        }
        _ => {
            let got = simulate(form, arch);
            if let Some(i) = (0..line.slots.len()).find(|&i| got[i] != line.slots[i]) {
                return Err(format!("{}: slot {i}: simulated {:#x}, recorded {:#x}", form.name, got[i], line.slots[i]));
            }
            if hash(&got) == line.outputs {
                Ok(())
            } else {
                Err(format!("{}: a slot beyond {} differs", form.name, line.slots.len()))
            }
        }
    }
}

#[test]
fn recorded_vectors_replay_bit_for_bit() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors");
    let files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "txt"))
        .collect();
    if files.is_empty() {
        skip::skipped("nothing is recorded in tests/simt/vectors (see its README)");
        return;
    }
    let all = forms::all();
    let mut failures = vec![];
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let arch = match header(&text, "compute").unwrap_or("") {
            "8.9" => Arch::Ada,
            "9.0" => Arch::Hopper,
            c if c.starts_with("8.") => Arch::Ampere,
            _ => Arch::Blackwell,
        };
        println!("{}: {}", path.display(), header(&text, "device").unwrap_or("?"));
        for line in text.lines().filter_map(Line::parse) {
            match all.iter().find(|f| f.name == line.name) {
                Some(form) => failures.extend(compare(form, &line, arch).err()),
                None => failures.push(format!("{}: there is no such form any more: record again", line.name)),
            }
        }
    }
    assert!(failures.is_empty(), "{} differences:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn lines_survive_the_text_form() {
    let all = forms::all();
    for form in all.iter().step_by(97) {
        let outputs: Vec<u64> = (0..form.output_len() as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        let line = Line::new(form, &outputs);
        assert_eq!(Line::parse(&line.text()), Some(line.clone()));
        assert_eq!(line.outputs, hash(&outputs));
    }
    assert_eq!(Line::parse("device NVIDIA H200"), None);
    assert_eq!(header("device NVIDIA H200\ncompute 9.0\n", "compute"), Some("9.0"));
}
