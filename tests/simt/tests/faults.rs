//! Planted faults: for every kind of finding a kernel that has it, reported at the right line, and a twin without it that is clean under
//! 100 seeds. The kernels are in `faults/`, see its README for their marks.

mod planted;

use planted::Planted;
use simt::model::smem::Swizzle;
use simt::model::tensor_map::{ElementType, TensorMap};
use simt::{Finding, Launch, Mode, Module, Report, Sim, seeds};

fn run(planted: &Planted, faulty: bool, seed: u64, mode: Mode) -> Result<Report, String> {
    let (text, _) = planted.render(faulty);
    let module = Module::parse(&format!("{}.ptx", planted.name), &text).map_err(|e| e.to_string())?;
    let mut sim = Sim::new();
    let input = sim.upload(&(0..1024u32).collect::<Vec<_>>());
    let out = sim.alloc(65536);
    let value = |key: &str, default: u64| planted.launch_value(faulty, key, default) as u32;
    let mut launch = Launch::new([value("grid", 1), 1, 1], [value("block", 32), 1, 1])
        .cluster([value("cluster", 1), 1, 1])
        .smem(value("smem", 0))
        .arg(input)
        .arg(out)
        .seed(seed)
        .mode(mode);
    launch.max_steps = planted.launch_value(faulty, "steps", 10_000_000);
    if module.params("faulty").unwrap().len() == 3 {
        launch = launch.arg(&TensorMap::dense(ElementType::U32, input, &[32, 32], &[32, 8], Swizzle::None));
    }
    sim.launch(&module, "faulty", &launch).map_err(|e| format!("{}: {e}", planted.name))
}

#[test]
fn every_kind_of_finding_has_a_kernel() {
    let planted = Planted::all();
    for finding in Finding::ALL {
        let name = format!("{finding:?}");
        assert!(planted.iter().any(|p| p.finding == name), "no kernel in tests/faults has the fault {name}");
    }
    for p in &planted {
        assert!(Finding::ALL.iter().any(|f| format!("{f:?}") == p.finding), "{}: no finding {}", p.name, p.finding);
    }
}

/// Checks the runs of one faulty kernel: reported at least once, and never at another line.
fn check_fault(planted: &Planted) -> Result<(), String> {
    let (_, here) = planted.render(true);
    let mut met = false;
    let mut last = String::new();
    for seed in seeds(10) {
        for mode in [Mode::LockStep, Mode::Split] {
            let report = run(planted, true, seed, mode)?;
            for found in report.findings.iter().filter(|f| format!("{:?}", f.finding) == planted.finding) {
                // a fault of the launch has no line
                if !here.is_empty() && !here.contains(&found.line) {
                    return Err(format!("{}: at line {}, not one of {here:?}: {found}", planted.name, found.line));
                }
                if !planted.text.lines().any(|l| l.contains(found.text.trim())) {
                    return Err(format!("{}: `{}` is not a line of the file", planted.name, found.text));
                }
                met = true;
            }
            last = report.to_string();
        }
    }
    if met {
        Ok(())
    } else {
        Err(format!("{}: {} was not reported at {here:?}: {last}", planted.name, planted.finding))
    }
}

#[test]
fn faults_are_reported_at_their_line() {
    let failures: Vec<String> = Planted::all().iter().filter_map(|p| check_fault(p).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Checks the runs of one clean twin.
fn check_twin(planted: &Planted) -> Result<(), String> {
    for seed in seeds(100) {
        for mode in [Mode::LockStep, Mode::Split] {
            let report = run(planted, false, seed, mode)?;
            // not even a note
            if !report.findings.is_empty() {
                return Err(format!("{}: {report}", planted.name));
            }
        }
    }
    Ok(())
}

#[test]
fn clean_twins_are_clean_under_100_seeds() {
    let failures: Vec<String> = Planted::all().iter().filter_map(|p| check_twin(p).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
