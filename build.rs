//! Expands the PTX templates of `kernels/` and writes the Rust side of every instance from the same values.
//!
//! Needs no CUDA toolkit, no GPU and no network; the same sources give the same bytes. What comes out, in `OUT_DIR`:
//! one `.ptx` file per instance, and `kernels.rs` with its entry name, tile sizes and parameters (see `src/cuda/kernels.rs`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value as Scalar};

#[path = "kernels/instances.rs"]
mod instances;
use instances::{Instance, Value};

const KERNELS: &str = "kernels";
const SIMULATOR: &str = "tests/simt/Cargo.toml";

/// Fields of a header in their order; all must be there but `Budget`, which trivial kernels leave out.
const HEADER: [&str; 6] = ["Requires", "Launch", "Bound by", "Budget", "Numerics", "Checked"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={KERNELS}");
    // Examples run in the simulator where the repository has it; the package does not.
    println!("cargo::rustc-check-cfg=cfg(gatefold_simulator)");
    if Path::new(SIMULATOR).exists() {
        println!("cargo::rerun-if-changed={SIMULATOR}");
        println!("cargo::rustc-cfg=gatefold_simulator");
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let out = Path::new(&out);
    let templates = templates();

    // By template, in the order of the table.
    let mut families: Vec<(&str, Vec<(Instance, Module)>)> = Vec::new();
    let mut hash = Hash::new();
    for instance in instances::instances() {
        let entry = format!("gatefold_{}_{}", instance.template, instance.variant);
        let text = expand(&templates, &instance, &entry);
        let module = Module::read(&text, &entry, &instance).unwrap_or_else(|problem| panic!("{entry}: {problem}"));
        let text = without_layout(&text);
        hash.write(text.as_bytes());
        fs::write(out.join(format!("{entry}.ptx")), &text).expect("OUT_DIR is writable");
        match families.iter_mut().find(|(template, _)| *template == instance.template) {
            Some((_, members)) => members.push((instance, module)),
            None => families.push((instance.template, vec![(instance, module)])),
        }
    }

    let mut rust = String::from("// Written by build.rs from kernels/instances.rs and the templates.\n\n");
    writeln!(rust, "/// Hash of the text of all instances.\npub const CONTENT_HASH: u64 = 0x{:016x};\n", hash.0)
        .unwrap();
    let mut all = String::new();
    for (template, members) in &families {
        write_family(&mut rust, template, members).unwrap_or_else(|problem| panic!("{template}: {problem}"));
        for i in 0..members.len() {
            writeln!(all, "    &{template}::INSTANCES[{i}].kernel,").unwrap();
        }
    }
    writeln!(rust, "/// Every kernel of this crate.\npub static ALL: &[&Kernel] = &[\n{all}];").unwrap();
    fs::write(out.join("kernels.rs"), rust).expect("OUT_DIR is writable");
}

// --- expansion -------------------------------------------------------------------------------------------------------

/// The template engine with the syntax of `kernels/README.md`.
fn templates() -> Environment<'static> {
    let mut templates = Environment::new();
    templates.set_syntax(
        SyntaxConfig::builder()
            .block_delimiters("<%", "%>")
            .variable_delimiters("${", "}")
            .comment_delimiters("<#", "#>")
            .line_statement_prefix("//%")
            .line_comment_prefix("//##")
            .keep_trailing_newline(true)
            .trim_blocks(true)
            .build()
            .expect("the delimiters differ"),
    );
    templates.set_undefined_behavior(UndefinedBehavior::Strict);
    templates.set_loader(|name| match fs::read_to_string(Path::new(KERNELS).join(name)) {
        Ok(text) => Ok(Some(text)),
        Err(_) => Ok(None),
    });
    // The lines of a macro end in a newline of their own, and so does the line that calls it: one is enough.
    templates.set_formatter(|out, state, value| match value.as_str() {
        Some(text) => out.write_str(text.strip_suffix('\n').unwrap_or(text)).map_err(minijinja::Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    templates.add_function("f32", |value: f64| format!("0f{:08X}", (value as f32).to_bits()));
    templates.add_function("f64", |value: f64| format!("0d{:016X}", value.to_bits()));
    templates
}

fn expand(templates: &Environment<'_>, instance: &Instance, entry: &str) -> String {
    let mut values: BTreeMap<&str, Scalar> = BTreeMap::new();
    values.insert("ENTRY", entry.into());
    values.insert("VERSION", instance.version.into());
    values.insert("TARGET", instance.target.into());
    for (name, value) in &instance.values {
        let value = match *value {
            Value::Int(value) => value.into(),
            Value::Flag(value) => value.into(),
            Value::Dtype(value) => value.into(),
        };
        assert!(values.insert(name, value).is_none(), "{entry}: {name} stands twice in the table");
    }
    let name = format!("{}.ptx", instance.template);
    let template = templates.get_template(&name).unwrap_or_else(|error| panic!("{KERNELS}/{name}: {error}"));
    template.render(values).unwrap_or_else(|error| panic!("{entry}: {error}"))
}

/// What goes into the binary: the header as it is; after it one blank between words, no remarks but the headings of sections.
/// Columns and remarks are for the reader of a template, and would be a quarter of the bytes.
fn without_layout(text: &str) -> String {
    let (header, code) = text.split_at(text.find("\n.version").expect("read before") + 1);
    let mut out = String::from(header);
    for line in code.lines().map(str::trim) {
        let line = match line.split_once("//") {
            Some((_, remark)) if !remark.starts_with(" ---") => line.split("//").next().unwrap_or_default(),
            _ => line,
        };
        let mut words = line.split_ascii_whitespace();
        if let Some(first) = words.next() {
            out.push_str(first);
            words.for_each(|word| {
                out.push(' ');
                out.push_str(word);
            });
            out.push('\n');
        }
    }
    out
}

// --- what the expanded text says -------------------------------------------------------------------------------------

/// A kernel parameter.
#[derive(Debug, PartialEq)]
struct Param {
    name: String,
    rust_type: &'static str,
    offset: u32,
    bytes: u32,
}

/// Facts read from the expanded text, so that the Rust side repeats nothing by hand.
struct Module {
    params: Vec<Param>,
    threads: u32,
    static_shared_bytes: u32,
    dynamic_shared: bool,
}

impl Module {
    fn read(text: &str, entry: &str, instance: &Instance) -> Result<Module, String> {
        if let Some(line) = text.lines().find(|line| !line.is_ascii()) {
            return Err(format!("PTX is ASCII, but a line reads `{line}`"));
        }
        let header: Vec<&str> = text.lines().take_while(|line| !line.starts_with(".version")).collect();
        let mut rest = header.iter();
        for field in HEADER {
            let prefix = format!("//   {field} ");
            if field == "Budget" && !header.iter().any(|line| line.starts_with(&prefix)) {
                continue;
            }
            rest.find(|line| line.starts_with(&prefix)).ok_or(format!("the header lacks `{field}`, or the order"))?;
        }
        let once = |prefix: &str| {
            let mut found = text.lines().map(str::trim).filter_map(|line| line.strip_prefix(prefix));
            match (found.next(), found.next()) {
                (Some(rest), None) => Ok(rest.trim_end_matches([';', '(']).trim()),
                _ => Err(format!("`{prefix}` must stand exactly once at the start of a line")),
            }
        };
        let is = |prefix: &str, expected: &str| match once(prefix)? {
            found if found == expected => Ok(()),
            found => Err(format!("`{prefix}` is `{found}`, the table says `{expected}`")),
        };
        is(".version ", instance.version)?;
        is(".target ", instance.target)?;
        is(".address_size ", "64")?;
        is(".visible .entry ", entry)?;
        let threads = once(".reqntid ")?.split(',').next().unwrap_or_default();
        let threads = threads.parse().map_err(|_| format!("`.reqntid` is `{threads}`"))?;

        let mut params: Vec<Param> = Vec::new();
        let mut static_shared_bytes: u32 = 0;
        let mut dynamic_shared = false;
        for line in text.lines().map(|line| line.split("//").next().unwrap_or_default().trim()) {
            if let Some(rest) = line.strip_prefix(".param ") {
                let mut words = rest.trim_end_matches([',', ')']).split_whitespace();
                let (Some(ptx_type), Some(name), None) = (words.next(), words.next(), words.next()) else {
                    return Err(format!("a parameter reads `{line}`, expected `.param .type name`"));
                };
                let (rust_type, bytes) = match ptx_type {
                    ".u64" => ("u64", 8),
                    ".u32" => ("u32", 4),
                    ".f32" => ("f32", 4),
                    _ => return Err(format!("parameter `{name}` has type `{ptx_type}`")),
                };
                let end = params.last().map_or(0, |last| last.offset + last.bytes);
                params.push(Param { name: name.into(), rust_type, offset: end.next_multiple_of(bytes), bytes });
            } else if let Some(rest) = line.strip_prefix(".shared .align 16 .b8 ") {
                let size = rest.split(['[', ']']).nth(1).and_then(|size| size.parse::<u32>().ok());
                let size = size.ok_or(format!("shared memory reads `{line}`"))?;
                static_shared_bytes = static_shared_bytes.next_multiple_of(16) + size;
            } else if line.starts_with(".extern .shared .align ") {
                dynamic_shared = true;
            } else if line.contains(".shared ") && line.starts_with('.') {
                return Err(format!("shared memory is one `.shared .align 16 .b8 name[bytes];` a line, not `{line}`"));
            }
        }
        Ok(Module { params, threads, static_shared_bytes, dynamic_shared })
    }
}

// --- the Rust side ---------------------------------------------------------------------------------------------------

/// Writes `mod <template>`: the parameters as a struct, the instances as a table.
fn write_family(rust: &mut String, template: &str, members: &[(Instance, Module)]) -> Result<(), String> {
    let (first, module) = &members[0];
    for (instance, other) in members {
        if other.params != module.params {
            return Err(format!("instance {} has other parameters than {}", instance.variant, first.variant));
        }
        let names = |instance: &Instance| -> Vec<_> {
            instance.values.iter().map(|(name, value)| (*name, std::mem::discriminant(value))).collect()
        };
        if names(instance) != names(first) {
            return Err(format!("instance {} has other values than {}", instance.variant, first.variant));
        }
    }
    let params = &module.params;
    let size = params.last().map_or(0, |last| last.offset + last.bytes);
    (|| -> std::fmt::Result {
        writeln!(rust, "/// `kernels/{template}.ptx`.\npub mod {template} {{")?;
        writeln!(rust, "    use super::{{Kernel, Param}};")?;
        if first.values.iter().any(|(_, value)| matches!(value, Value::Dtype(_))) {
            writeln!(rust, "    use crate::element::Dtype;")?;
        }
        writeln!(rust)?;

        writeln!(rust, "    /// What the kernel takes.\n    #[derive(Clone, Copy, Debug)]\n    pub struct Params {{")?;
        for param in params {
            writeln!(rust, "        /// `{}`.\n        pub {}: {},", param.name, param.name, param.rust_type)?;
        }
        writeln!(rust, "    }}\n\n    impl Params {{")?;
        writeln!(rust, "        /// The parameter block, as the kernel reads it.")?;
        writeln!(rust, "        pub fn to_bytes(&self) -> [u8; {size}] {{\n            let mut bytes = [0; {size}];")?;
        for Param { name, offset, bytes, .. } in params {
            let end = offset + bytes;
            writeln!(rust, "            bytes[{offset}..{end}].copy_from_slice(&self.{name}.to_ne_bytes());")?;
        }
        writeln!(rust, "            bytes\n        }}\n    }}\n")?;
        writeln!(rust, "    const PARAMS: &[Param] = &[")?;
        for Param { name, offset, bytes, .. } in params {
            writeln!(rust, "        Param {{ name: \"{name}\", offset: {offset}, bytes: {bytes} }},")?;
        }
        writeln!(rust, "    ];\n")?;

        writeln!(rust, "    /// An entry and the values that its text was made with.")?;
        writeln!(rust, "    #[derive(Debug)]\n    pub struct Instance {{")?;
        writeln!(rust, "        /// The entry.\n        pub kernel: Kernel,")?;
        for (name, value) in &first.values {
            let field = match value {
                Value::Int(_) => "u32",
                Value::Flag(_) => "bool",
                Value::Dtype(_) => "Dtype",
            };
            writeln!(rust, "        /// `{name}` of the template.\n        pub {}: {field},", name.to_lowercase())?;
        }
        writeln!(rust, "    }}\n\n    /// All instances of this template.")?;
        writeln!(rust, "    pub static INSTANCES: [Instance; {}] = [", members.len())?;
        for (instance, module) in members {
            let entry = format!("gatefold_{template}_{}", instance.variant);
            let sm = instance.target.trim_start_matches("sm_");
            let exact = sm.ends_with(['a', 'f']);
            let sm = sm.trim_end_matches(['a', 'f']);
            let version = instance.version.replace('.', ", ");
            writeln!(rust, "        Instance {{\n            kernel: Kernel {{\n                entry: \"{entry}\",")?;
            writeln!(rust, "                ptx: include_str!(concat!(env!(\"OUT_DIR\"), \"/{entry}.ptx\")),")?;
            writeln!(
                rust,
                "                version: ({version}),\n                sm: {sm},\n                exact: {exact},"
            )?;
            writeln!(rust, "                threads: {},\n                params: PARAMS,", module.threads)?;
            writeln!(rust, "                static_shared_bytes: {},", module.static_shared_bytes)?;
            writeln!(rust, "                dynamic_shared: {},\n            }},", module.dynamic_shared)?;
            for (name, value) in &instance.values {
                let value = match value {
                    Value::Int(value) => value.to_string(),
                    Value::Flag(value) => value.to_string(),
                    Value::Dtype(value) => format!("Dtype::{}", value.to_uppercase()),
                };
                writeln!(rust, "            {}: {value},", name.to_lowercase())?;
            }
            writeln!(rust, "        }},")?;
        }
        writeln!(rust, "    ];\n}}\n")
    })()
    .map_err(|error| error.to_string())
}

/// FNV-1a, 64 bits.
struct Hash(u64);

impl Hash {
    fn new() -> Self {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
