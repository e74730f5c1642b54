//! NVIDIA's own assembler on every PTX text of these tests: what the simulator runs is PTX, and what an older target or an older PTX version
//! lacks is refused by both. `$PTXAS` names the assembler, `.ci/run kernels` sets it; without it the tests print SKIPPED.

mod forms;
mod planted;
#[path = "../../common/skip.rs"]
mod skip;
mod wrong;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use forms::Form;
use simt::Module;

/// The assembler that `$PTXAS` names.
fn ptxas() -> Option<PathBuf> {
    let Some(path) = std::env::var_os("PTXAS").map(PathBuf::from) else {
        skip::skipped("$PTXAS names no ptxas");
        return None;
    };
    let runs = Command::new(&path).arg("--version").output().is_ok_and(|o| o.status.success());
    assert!(runs, "$PTXAS is {}, which does not run", path.display());
    Some(path)
}

/// What ptxas complains about in `text`, with the line, and whether it refuses it. A fatal error hides those behind it.
fn assemble(ptxas: &Path, name: &str, target: &str, text: &str) -> (bool, Vec<(usize, String)>) {
    let file = std::env::temp_dir().join(format!("simt-{}-{name}.ptx", std::process::id()));
    std::fs::write(&file, text).unwrap();
    // Optimising takes most of the time and refuses nothing.
    let output = Command::new(ptxas).args(["-O0", "-arch", target, "-o", "/dev/null"]).arg(&file).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // ptxas FILE, line 7; error   : ...
    let complaints = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once(", line ")?;
        let (number, message) = rest.split_once(';')?;
        if message.trim_start().starts_with("warning") {
            return None;
        }
        Some((number.parse().ok()?, message.trim().to_string()))
    });
    let mut complaints: Vec<_> = complaints.collect();
    if complaints.is_empty() && !output.status.success() {
        complaints.push((0, said));
    }
    (!output.status.success(), complaints)
}

/// What ptxas says about each text that it refuses; the texts are (name, target, text).
fn refusals(ptxas: &Path, texts: &[(String, String)]) -> Vec<String> {
    let refusal = |(name, text): &(String, String)| {
        let target = text.lines().find_map(|l| l.strip_prefix(".target ")).expect("a target").trim();
        let (refused, complaints) = assemble(ptxas, name, target, text);
        refused.then(|| format!("{name}: {complaints:?}"))
    };
    std::thread::scope(|scope| {
        let halves = texts.chunks(texts.len().div_ceil(2));
        let threads: Vec<_> = halves.map(|half| scope.spawn(|| half.iter().filter_map(refusal).collect())).collect();
        threads.into_iter().flat_map(|t| -> Vec<String> { t.join().unwrap() }).collect()
    })
}

#[test]
fn ptxas_accepts_every_text() {
    let Some(ptxas) = ptxas() else { return };
    // All micro-kernels of a target in one module: a process for each would take minutes.
    let mut modules: BTreeMap<&str, String> = BTreeMap::new();
    let forms = forms::all();
    for form in &forms {
        let text = form.ptx();
        let module = modules.entry(form.target).or_insert_with(|| text[..text.find(".visible").unwrap()].to_string());
        *module += &form.entry();
    }
    let mut texts: Vec<(String, String)> = modules.into_iter().map(|(t, text)| (format!("forms-{t}"), text)).collect();
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        texts.push((name, std::fs::read_to_string(&path).unwrap()));
    }
    for planted in planted::Planted::all() {
        for (kind, faulty) in [("fault", true), ("twin", false)] {
            texts.push((format!("{}-{kind}", planted.name), planted.render(faulty).0));
        }
    }
    let failures = refusals(&ptxas, &texts);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    println!("{} forms and {} other texts assemble", forms.len(), texts.len() - 5);
}

#[test]
fn ptxas_refuses_every_wrong_text() {
    let Some(ptxas) = ptxas() else { return };
    let texts = wrong::TEXTS.iter().map(|(place, change, _)| (*place, *change));
    let verdicts = texts.map(|(place, change)| assemble(&ptxas, "wrong", "sm_80", &wrong::text(place, change)).0);
    let accepted = wrong::TEXTS.iter().zip(verdicts).filter(|(_, refused)| !refused).map(|(text, _)| text.1);
    assert_eq!(accepted.collect::<Vec<_>>(), [""; 0]);
    assert_eq!(assemble(&ptxas, "right", "sm_80", &wrong::text("", "")), (false, vec![]));
    println!("{} wrong texts are refused", wrong::TEXTS.len());
}

/// The forms that ptxas refuses for a target and a version, with its reasons. All are in one module, again and again without those it refused,
/// until it has nothing more to say; an error of our own in the first kernel saves the time of generating code.
fn refused<'a>(ptxas: &Path, forms: &[&'a Form], target: &str, version: &str) -> BTreeMap<&'a str, String> {
    const BROKEN: &str = ".visible .entry broken() { add.u32 nope, nope, nope; }\n";
    let mut refused = BTreeMap::new();
    loop {
        let mut text = forms::header(target, version) + BROKEN;
        let broken = text.lines().count();
        let mut lines = broken;
        let mut ends = vec![];
        let rest: Vec<&Form> = forms.iter().copied().filter(|f| !refused.contains_key(f.name.as_str())).collect();
        for form in &rest {
            let entry = form.entry();
            lines += entry.lines().count();
            ends.push(lines);
            text += &entry;
        }
        let before = refused.len();
        for (line, message) in assemble(ptxas, &format!("floor-{target}-{version}"), target, &text).1 {
            assert!(line >= broken, "ptxas for {target}, PTX {version}: {message}");
            if line > broken {
                let index = ends.partition_point(|&end| end < line);
                refused.entry(rest[index].name.as_str()).or_insert(message);
            }
        }
        if refused.len() == before {
            return refused;
        }
    }
}

/// For every target and version, the simulator refuses the forms that ptxas refuses, and no other.
#[test]
fn older_targets_and_versions_refuse_what_ptxas_refuses() {
    let Some(ptxas) = ptxas() else { return };
    let all = forms::all();
    let mut failures = vec![];
    let mut compared = 0;
    for (target, versions) in [
        ("sm_80", &["7.0", "7.1", "7.4", "7.7", "7.8", "8.0", "8.1", "8.6"][..]),
        ("sm_89", &["7.8", "8.0", "8.1", "8.3", "8.4", "8.6"]),
        ("sm_90", &["7.8", "8.0", "8.1", "8.5", "8.6"]),
        ("sm_90a", &["8.0", "8.1", "8.3", "8.4", "8.6"]),
        ("sm_100", &["8.6", "8.7", "8.8"]),
    ] {
        // What an old version accepts the newer ones accept.
        let mut open: Vec<&Form> = all.iter().collect();
        for version in versions {
            let theirs = refused(&ptxas, &open, target, version);
            let parsed = open.iter().map(|f| (f.name.as_str(), Module::parse(&f.name, &f.ptx_for(target, version))));
            let ours: BTreeMap<&str, String> = parsed.filter_map(|(n, r)| Some((n, r.err()?.to_string()))).collect();
            compared += open.len();
            let names: BTreeSet<&str> = theirs.keys().chain(ours.keys()).copied().collect();
            for name in &names {
                if theirs.contains_key(name) != ours.contains_key(name) {
                    let said = |of: &BTreeMap<&str, String>| of.get(name).map_or("accepts it".into(), String::clone);
                    failures.push(format!(
                        "{name} for {target}, PTX {version}: ptxas {}; here {}",
                        said(&theirs),
                        said(&ours)
                    ));
                }
            }
            open.retain(|f| names.contains(f.name.as_str()));
        }
    }
    assert!(failures.is_empty(), "{} of {compared} differ:\n{}", failures.len(), failures.join("\n"));
    println!("{compared} decisions agree");
}

/// The forms again with one modifier of one instruction exchanged, added or left out, in every way that the decoder takes.
fn variants(forms: &[Form]) -> Vec<(String, Form)> {
    let mut seen = BTreeSet::new();
    let mut variants = vec![];
    for form in forms {
        for (at, line) in form.body.lines().enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(word) = words.iter().find(|w| !w.starts_with('@')) else { continue };
            let old = word.trim_end_matches(';');
            for new in simt::coverage::neighbours(old) {
                if !seen.insert(new.clone()) {
                    continue;
                }
                let replaced = form.body.lines().enumerate().map(|(i, l)| match i == at {
                    true => l.replacen(old, &new, 1),
                    false => l.to_string(),
                });
                let body = replaced.collect::<Vec<_>>().join("\n");
                let name = format!("variant_{}", variants.len());
                let mut variant = forms::lane(name, form.target, &form.inputs, &form.outputs, body, |_| vec![]);
                (variant.threads, variant.cluster, variant.map) = (form.threads, form.cluster, form.map.clone());
                let target = if form.target == "sm_100" { "sm_100" } else { "sm_90a" };
                if Module::parse(&variant.name, &variant.ptx_for(target, "8.8")).is_ok() {
                    variants.push((new, variant));
                }
            }
        }
    }
    variants
}

/// Combinations of modifiers that no form has: what the decoder takes of them, ptxas takes.
#[test]
fn ptxas_accepts_what_the_decoder_accepts() {
    let Some(ptxas) = ptxas() else { return };
    let variants = variants(&forms::all());
    let mut failures = vec![];
    for target in ["sm_90a", "sm_100"] {
        let of_target = |f: &Form| (f.target == "sm_100") == (target == "sm_100");
        let forms: Vec<&Form> = variants.iter().map(|(_, f)| f).filter(|f| of_target(f)).collect();
        let refused = refused(&ptxas, &forms, target, "8.8");
        let named = variants.iter().filter_map(|(new, f)| Some(format!("{new}: {}", refused.get(f.name.as_str())?)));
        failures.extend(named);
    }
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), variants.len(), failures.join("\n"));
    println!("{} variants of the forms assemble", variants.len());
}

/// The target that a form is tested on is the oldest that has it.
#[test]
fn forms_name_their_oldest_target() {
    let order = ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100"];
    let mut failures = vec![];
    for form in forms::all() {
        let older = &order[..order.iter().position(|t| *t == form.target).unwrap()];
        if let Some(t) = older.iter().find(|t| Module::parse(&form.name, &form.ptx_for(t, "8.8")).is_ok()) {
            failures.push(format!("{} is accepted for {t}", form.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
