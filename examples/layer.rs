//! One full transformer layer of a real model's shape on the best device found: norm, projections, RoPE, attention with a KV
//! cache, router, experts, combine; a prompt first, then token by token. Checked against the reference and set against the
//! machine's limits, measured at the start. On a GPU everything stays in its memory, and the step is a recorded graph, too
//! (`support/resident`).
//!
//! ```text
//! cargo run --release --example layer
//! cargo run --release --example layer -- --model mixtral-8x7b --tokens 256 --decode 8
//! cargo run --release --example layer -- --checkpoint tests/checkpoints/qwen3_moe --layer 2 --dtype f32
//! ```

mod support;

use clap::{Parser, ValueEnum};
use gatefold::cpu::{Cpu, Float, Level};
use gatefold::cuda::Stream;
use gatefold::cuda::driver::Recorder;
use gatefold::spec::{AttentionBlock, HfConfig, Layer, Mlp};
use gatefold::{Dtype, Element};
use half::{bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::array::Array;
use support::backend::Backend;
use support::checkpoint::Checkpoint;
use support::cpu::CpuBackend;
use support::device::DeviceBackend;
use support::layer::{Cache, LayerWeights, Options as Run, PackedLayer, Rows, Stage, Trace, run};
use support::random::{Maker, num_weights};
use support::resident::{Clock, DeviceLayer};
use support::roof::{Roof, last_level_cache};
use support::verify::{Checked, Subject, verify};

/// Largest error of a hidden state against the recorded truth, in f32.
const CHECKPOINT_TOLERANCE: f64 = 1e-5;
/// Rows of the prompt that are recomputed by the reference.
const SAMPLES: usize = 4;
/// Timed runs of the prompt; one more before them is not counted.
const REPEATS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
    /// The tests' simulator, which runs the kernels' own text: for small shapes.
    #[cfg(gatefold_simulator)]
    Simulator,
}

/// Runs one transformer layer of a real model's shape.
#[derive(Parser)]
struct Options {
    /// A model of `tests/configs`, or the path of a `config.json`.
    #[arg(long, default_value = "qwen3-30b-a3b")]
    model: String,
    /// Which layer; the first mixture of experts if absent.
    #[arg(long)]
    layer: Option<usize>,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Single tokens after it.
    #[arg(long, default_value_t = 16)]
    decode: usize,
    /// Element type of activations and weights; bf16, for checkpoints f32.
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
    /// CPU level; the best one if absent.
    #[arg(long)]
    level: Option<String>,
    /// Threads; one per core if absent.
    #[arg(long)]
    threads: Option<usize>,
    /// Print JSON in place of the table.
    #[arg(long)]
    json: bool,
    /// A Hugging Face directory: embeds the recorded ids, runs layers 0 to --layer, compares the hidden states.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Key of the random weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut pool = rayon::ThreadPoolBuilder::new();
    if let Some(threads) = options.threads {
        pool = pool.num_threads(threads.max(1));
    }
    let result = pool.build().map_err(|e| e.to_string()).and_then(|pool| pool.install(|| start(&options)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            eprintln!("layer: {message}");
            ExitCode::from(2)
        }
    }
}

/// `false` where a check failed.
fn start(options: &Options) -> Result<bool, String> {
    let level = match &options.level {
        Some(name) => Level::by_name(name),
        None => Level::detect(),
    };
    let level = level.map_err(|e| e.to_string())?;
    let default = if options.checkpoint.is_some() { DtypeName::F32 } else { DtypeName::Bf16 };
    let gpu = gpu(options.device)?;
    match options.dtype.unwrap_or(default) {
        DtypeName::F32 => start_with::<f32>(options, level, gpu.as_ref()),
        DtypeName::Bf16 => start_with::<bf16>(options, level, gpu.as_ref()),
        DtypeName::F16 => start_with::<f16>(options, level, gpu.as_ref()),
    }
}

/// A device that is not the CPU.
#[cfg_attr(not(any(feature = "cuda", gatefold_simulator)), allow(dead_code))] // never made there
struct Gpu {
    device: &'static dyn Recorder,
    /// Of the backend, as checks know it.
    backend: &'static str,
    name: String,
    /// Its limits, where they are known by its name.
    roof: Option<Roof>,
    /// A stream of the device, and the time that work on it takes.
    stream: Stream,
    clock: Box<Clock<'static>>,
}

/// The GPU to compute on: the first one, unless the CPU is asked for, or there is none and nobody insists.
fn gpu(wanted: Device) -> Result<Option<Gpu>, String> {
    if wanted == Device::Cpu {
        return Ok(None);
    }
    #[cfg(gatefold_simulator)]
    if wanted == Device::Simulator {
        return simulator().map(Some).map_err(|e| e.to_string());
    }
    #[cfg(feature = "cuda")]
    match gatefold::cuda::Device::open(0) {
        Ok(device) => return cuda(device).map(Some).map_err(|e| e.to_string()),
        Err(error) if wanted == Device::Cuda => return Err(error.to_string()),
        Err(_) => {}
    }
    if wanted == Device::Cuda {
        return Err("this build has no feature cuda".into());
    }
    Ok(None)
}

#[cfg(feature = "cuda")]
fn cuda(device: gatefold::cuda::Device) -> gatefold::Result<Gpu> {
    let device = &*Box::leak(Box::new(device)); // for the whole run
    let (name, stream) = (device.name().to_owned(), device.create_stream()?);
    let clock = support::clock::ColdClock::new(device)?;
    let clock: Box<Clock<'static>> = Box::new(move |work| clock.time(stream, work));
    Ok(Gpu { device, backend: "cuda", roof: Roof::of_gpu(&name), name, stream, clock })
}

#[cfg(gatefold_simulator)]
fn simulator() -> gatefold::Result<Gpu> {
    let device = &*Box::leak(Box::new(support::simulator::Simulator::new(false)));
    let clock: Box<Clock<'static>> = Box::new(|work| {
        let start = Instant::now();
        work().map(|()| start.elapsed())
    });
    let stream = device.create_stream()?;
    Ok(Gpu { device, backend: "simulator", name: "of the tests".into(), roof: None, stream, clock })
}

fn start_with<T: Float>(options: &Options, level: Level, gpu: Option<&Gpu>) -> Result<bool, String> {
    match (&options.checkpoint, gpu) {
        (Some(directory), None) => {
            checkpoint(options, directory, &mut CpuBackend::<T>::new(Cpu::with_level(level)), "cpu ")
        }
        (Some(directory), Some(gpu)) => {
            checkpoint(options, directory, &mut DeviceBackend::<T>::new(gpu.device, gpu.backend), "")
        }
        (None, _) => random_layer::<T>(options, level, gpu),
    }
}

// ----------------------------------------------------------------------------- a checkpoint

fn checkpoint<B: Backend<S = f32>>(
    options: &Options,
    directory: &Path,
    b: &mut B,
    place: &str,
) -> Result<bool, String> {
    let model = Checkpoint::read(directory)?;
    let last = options.layer.unwrap_or(model.config.num_layers.saturating_sub(1));
    let compared = model.compare(b, last)?;
    let dtype = B::A::DTYPE;
    let used = format!("{place}{} {dtype}", b.name());
    let mut good = true;
    let mut lines = Vec::new();
    for c in &compared {
        let exact = dtype == Dtype::F32;
        let ok = !exact || c.error <= CHECKPOINT_TOLERANCE;
        good &= ok;
        let verdict = if !exact {
            "not judged"
        } else if ok {
            "ok"
        } else {
            "FAIL"
        };
        if options.json {
            lines.push(
                json!({ "case": c.case, "layer": c.layer, "tokens": c.tokens, "error": c.error, "verdict": verdict }),
            );
        } else {
            println!(
                "{verdict:10} hidden.{:<3} {:6} {:3} tokens  {used}  error {:.1e} of {CHECKPOINT_TOLERANCE:.0e}",
                c.layer, c.case, c.tokens, c.error
            );
        }
    }
    if options.json {
        println!("{:#}", json!({ "checkpoint": directory.display().to_string(), "used": used, "compared": lines }));
    } else if compared.is_empty() {
        println!("no hidden state is recorded up to layer {last}");
    }
    Ok(good)
}

// ----------------------------------------------------------------------------- a layer of random weights

/// The text of a configuration, from `tests/configs` or from a path.
fn configuration(model: &str) -> Result<String, String> {
    let known = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configs");
    let named = known.join(format!("{model}.json"));
    let path = if model.contains(['/', '\\']) || !named.exists() { PathBuf::from(model) } else { named };
    std::fs::read_to_string(&path).map_err(|e| {
        let mut names: Vec<String> = std::fs::read_dir(&known)
            .into_iter()
            .flatten()
            .filter_map(|f| f.ok()?.file_name().to_str()?.strip_suffix(".json").map(String::from))
            .collect();
        names.sort();
        format!("--model {model}: {e}; models here: {}", names.join(", "))
    })
}

/// The layer asked for, or the first mixture of experts, or the first layer.
fn choose(config: &HfConfig, wanted: Option<usize>, tokens: usize) -> Result<(usize, Layer), String> {
    let get = |n: usize| config.layer_for(n, tokens);
    let first = || (0..config.num_layers).find(|n| get(*n).is_ok_and(|l| matches!(l.mlp, Mlp::Moe(_))));
    let n = wanted.or_else(first).unwrap_or(0);
    let mut layer = get(n).map_err(|e| e.to_string())?;
    if let Mlp::Moe(moe) = &mut layer.mlp
        && let Some(capacity) = &mut moe.router.capacity
    {
        // The prompt is one row of the batch.
        capacity.group_len = None;
    }
    Ok((n, layer))
}

/// Bytes that the machine can still give, where it says so.
fn available_bytes() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0)
}

fn bar(total: usize, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(total as u64);
    let style = ProgressStyle::with_template("{msg:18} [{bar:40}] {percent:3} %  {elapsed}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.set_message(what);
    bar
}

/// Medians over several runs of the same stages.
fn medians(runs: &[Vec<Stage>]) -> Vec<Stage> {
    let mut out = runs[0].clone();
    for (i, stage) in out.iter_mut().enumerate() {
        let mut times: Vec<Duration> = runs.iter().filter_map(|r| r.get(i)).map(|s| s.time).collect();
        times.sort_unstable();
        stage.time = times[times.len() / 2];
        let mean =
            |of: &dyn Fn(&Stage) -> f64| runs.iter().filter_map(|r| r.get(i)).map(of).sum::<f64>() / runs.len() as f64;
        (stage.flops, stage.bytes) = (mean(&|s| s.flops), mean(&|s| s.bytes));
    }
    out
}

/// A run that can be checked: what was computed, and the cache before and after.
struct Kept<T> {
    trace: Trace<T, f32>,
    rows: Rows,
    before: Cache<T>,
    after: Cache<T>,
    absorbed: bool,
}

struct Measured<T> {
    prefill: Vec<Stage>,
    decode: Vec<Stage>,
    /// The whole step as one graph: of the prompt, of one token.
    graphs: Option<[Duration; 2]>,
    kept: Vec<Kept<T>>,
    max_positions: usize,
}

fn random_layer<T: Float>(options: &Options, level: Level, gpu: Option<&Gpu>) -> Result<bool, String> {
    let began = Instant::now();
    let config = HfConfig::from_json(&configuration(&options.model)?).map_err(|e| e.to_string())?;
    if options.tokens == 0 {
        return Err("--tokens 0: expected at least 1".into());
    }
    let total = options.tokens + options.decode;
    let (number, layer) = choose(&config, options.layer, total)?;
    let encoder = !layer.attention().mask.causal;
    let steps = if encoder { 0 } else { options.decode };

    let elements = num_weights(&layer);
    let needed = 2.2 * (elements * T::DTYPE.size_bytes()) as f64 + 0.6e9;
    if let Some(available) = available_bytes()
        && needed > available
    {
        return Err(format!(
            "layer {number} of {} needs about {:.1} GB (weights, and the packed copy), but {:.1} GB are available; \
             choose a smaller --model",
            options.model,
            needed / 1e9,
            available / 1e9
        ));
    }
    let pairs = level.name() == "avx512bf16" && T::DTYPE == Dtype::BF16;
    let roof_now = || match gpu {
        Some(gpu) => gpu.roof.unwrap_or(Roof::UNKNOWN),
        None => Roof::measure(level.name(), pairs),
    };
    let roof = roof_now();

    let progress = bar(elements, "making weights");
    let advance = |n: usize| progress.inc(n as u64);
    let weights: LayerWeights<T> = Maker::new(options.seed, &advance).layer(&layer);
    progress.finish_and_clear();
    let work = Work { options, layer: &layer, weights: &weights, total, steps };
    let (measured, stores_as) = match gpu {
        Some(gpu) => (work.run_on(gpu)?, gpu.backend),
        None => (work.run(CpuBackend::<T>::new(Cpu::with_level(level)))?, level.name()),
    };
    // Other load may have come or gone.
    let roof = roof.max(roof_now());
    let mut checks = Vec::new();
    for kept in &measured.kept {
        let subject = Subject {
            spec: &layer,
            weights: &weights,
            level: stores_as,
            trace: &kept.trace,
            rows: &kept.rows,
            cache: &kept.after,
            before: &kept.before,
            max_positions: measured.max_positions,
            absorbed: kept.absorbed,
        };
        checks.push(verify(&subject, &samples(kept.trace.input.shape[0])).map_err(|e| e.to_string())?);
    }
    let good = checks.iter().flatten().all(|c| c.share <= 1.0);
    let histogram = tokens_per_expert(&layer, &measured.kept[0].trace.topk_ids);
    let report = Report {
        options,
        number,
        layer: &layer,
        encoder,
        dtype: T::DTYPE,
        used: gpu.map_or(format!("cpu {}", level.name()), |gpu| format!("{} {}", gpu.backend, gpu.name)),
        roof,
        elements,
        prefill: &measured.prefill,
        decode: &measured.decode,
        graphs: measured.graphs,
        checks: &checks,
        histogram: &histogram,
        seconds: began.elapsed().as_secs_f64(),
    };
    if options.json {
        println!("{:#}", report.json())
    } else {
        report.print()
    }
    Ok(good)
}

/// What is packed and run, on any backend.
struct Work<'a, T> {
    options: &'a Options,
    layer: &'a Layer,
    weights: &'a LayerWeights<T>,
    total: usize,
    steps: usize,
}

impl<T: Float> Work<'_, T> {
    fn run<B: Backend<A = T, S = f32>>(&self, mut b: B) -> Result<Measured<T>, String> {
        let progress = bar(1, "packing weights");
        progress.tick();
        let packed = PackedLayer::pack(&mut b, self.layer, self.weights, self.total).map_err(|e| e.to_string())?;
        progress.finish_and_clear();
        measure(self.options, &mut b, &packed, self.steps).map_err(|e| e.to_string())
    }

    fn run_on(&self, gpu: &Gpu) -> Result<Measured<T>, String> {
        let progress = bar(1, "copying weights");
        progress.tick();
        let (layer, weights, tokens) = (self.layer, self.weights, self.options.tokens);
        // SAFETY: the stream is the device's, and both last to the end of the run.
        let layer = unsafe { DeviceLayer::new(gpu.device, gpu.stream, layer, weights, tokens, self.total) };
        let mut layer = layer.map_err(|e| e.to_string())?;
        progress.finish_and_clear();
        measure_on(gpu, self.options, self.layer, &mut layer, self.steps).map_err(|e| e.to_string())
    }
}

/// Rows spread over the prompt, its ends among them.
fn samples(rows: usize) -> Vec<usize> {
    let n = SAMPLES.min(rows);
    let mut picked: Vec<usize> = (0..n).map(|i| if n == 1 { 0 } else { i * (rows - 1) / (n - 1) }).collect();
    picked.dedup();
    picked
}

fn measure<T: Float, B: Backend<A = T, S = f32>>(
    options: &Options,
    b: &mut B,
    packed: &PackedLayer<'_, B>,
    steps: usize,
) -> gatefold::Result<Measured<T>> {
    let (hidden, tokens) = (packed.spec.hidden_size, options.tokens);
    let silent = |_: usize| {};
    let mut maker = Maker::new(options.seed ^ 0x5eed, &silent);
    let prompt: Array<T> = maker.array(&[tokens, hidden], 1.0);
    let rows = Rows::equal(1, tokens, 0);
    let empty = packed.cache(1, tokens + steps);
    let (mut runs, mut kept) = (Vec::new(), Vec::new());
    let mut cache = empty.clone();
    for repeat in 0..=REPEATS {
        cache = empty.clone();
        let trace = run(b, packed, &prompt, &rows, &mut cache, &Run::default())?;
        if repeat > 0 {
            runs.push(trace.stages.clone());
        }
        if repeat == REPEATS {
            let (before, after) = (empty.clone(), cache.clone());
            kept.push(Kept { trace, rows: rows.clone(), before, after, absorbed: false });
        }
    }
    let prefill = medians(&runs);
    let mut runs = Vec::new();
    // Decoding reads the latent cache as it is.
    let absorbed = matches!(packed.spec.attention, AttentionBlock::Mla(_));
    for step in 0..steps {
        let x: Array<T> = maker.array(&[1, hidden], 1.0);
        let rows = Rows::equal(1, 1, tokens + step);
        let before = (step + 1 == steps).then(|| cache.clone());
        let trace = run(b, packed, &x, &rows, &mut cache, &Run { absorbed, ..Run::default() })?;
        runs.push(trace.stages.clone());
        if let Some(before) = before {
            kept.push(Kept { trace, rows, before, after: cache.clone(), absorbed });
        }
    }
    let decode = if runs.is_empty() { Vec::new() } else { medians(&runs) };
    Ok(Measured { prefill, decode, graphs: None, kept, max_positions: tokens + steps })
}

/// [`measure`] on a device: each part of a step by itself, then the whole step as a graph.
fn measure_on<T: Float>(
    gpu: &Gpu,
    options: &Options,
    spec: &Layer,
    layer: &mut DeviceLayer<'_, T>,
    steps: usize,
) -> gatefold::Result<Measured<T>> {
    let (hidden, tokens) = (spec.hidden_size, options.tokens);
    let silent = |_: usize| {};
    let mut maker = Maker::new(options.seed ^ 0x5eed, &silent);
    // SAFETY: the recording is of this layer, whose arrays are alive; nothing else runs on the stream.
    let replay = |recording| (gpu.clock)(&mut || unsafe { gpu.device.replay(recording, gpu.stream) });
    let keep = |layer: &mut DeviceLayer<'_, T>, before: Cache<T>, n: usize, absorbed: bool| {
        let (trace, after) = (layer.trace()?, layer.cache()?);
        let rows = Rows::equal(1, n, before.lens[0] as usize);
        gatefold::Result::Ok(Kept { trace, rows, before, after, absorbed })
    };
    let middle = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    };

    let (prompt, repeats) = (maker.array(&[tokens, hidden], 1.0), if gpu.backend == "cuda" { REPEATS } else { 1 });
    layer.begin(&prompt, 0, false)?;
    let before = layer.cache_of_len(0)?;
    layer.step()?; // loads the kernels, makes the workspace
    let runs: gatefold::Result<Vec<_>> = (0..repeats).map(|_| layer.timed(&gpu.clock)).collect();
    let prefill = medians(&runs?);
    let recording = layer.record(gpu.device)?;
    let times: gatefold::Result<Vec<_>> = (0..repeats).map(|_| replay(recording)).collect();
    let whole_prompt = middle(times?);
    // SAFETY: what was replayed has ended: its time was taken.
    unsafe { gpu.device.forget(recording)? };
    let mut kept = vec![keep(layer, before, tokens, false)?];

    let (mut runs, mut times, mut recording) = (Vec::new(), Vec::new(), None);
    // Decoding reads the latent cache as it is.
    let absorbed = matches!(spec.attention, AttentionBlock::Mla(_));
    for step in 0..steps {
        let before = if step + 1 == steps { Some(layer.cache()?) } else { None };
        layer.begin(&maker.array(&[1, hidden], 1.0), tokens + step, absorbed)?;
        if recording.is_none() {
            layer.step()?;
            recording = Some(layer.record(gpu.device)?); // serves all tokens that follow
        }
        // The same rows again and again: the step reads none of those that it writes.
        runs.push(layer.timed(&gpu.clock)?);
        times.extend(recording.map(replay).transpose()?);
        if let Some(before) = before {
            kept.push(keep(layer, before, 1, absorbed)?);
        }
    }
    if let Some(recording) = recording {
        // SAFETY: as above.
        unsafe { gpu.device.forget(recording)? };
    }
    let decode = if runs.is_empty() { Vec::new() } else { medians(&runs) };
    let graphs = Some([whole_prompt, middle(times)]);
    Ok(Measured { prefill, decode, graphs, kept, max_positions: tokens + steps })
}

fn tokens_per_expert(layer: &Layer, ids: &Array<i32>) -> Vec<usize> {
    let Mlp::Moe(moe) = &layer.mlp else { return Vec::new() };
    let mut counts = vec![0; moe.router.num_experts];
    for id in ids.data.iter().filter(|id| **id >= 0) {
        counts[*id as usize] += 1;
    }
    counts
}

// ----------------------------------------------------------------------------- the report

struct Report<'a> {
    options: &'a Options,
    number: usize,
    layer: &'a Layer,
    encoder: bool,
    dtype: Dtype,
    used: String,
    roof: Roof,
    elements: usize,
    prefill: &'a [Stage],
    decode: &'a [Stage],
    graphs: Option<[Duration; 2]>,
    checks: &'a [Vec<Checked>],
    histogram: &'a [usize],
    seconds: f64,
}

fn time(duration: Duration) -> String {
    let us = duration.as_secs_f64() * 1e6;
    if us < 1e3 { format!("{us:.1} us") } else { format!("{:.2} ms", us / 1e3) }
}

impl Report<'_> {
    fn print(&self) {
        let kind = match (&self.layer.attention, &self.layer.mlp) {
            (AttentionBlock::Mla(_), Mlp::Moe(_)) => "latent attention, mixture of experts",
            (AttentionBlock::Mla(_), _) => "latent attention, dense",
            (_, Mlp::Moe(_)) => "mixture of experts",
            _ => "dense",
        };
        let side = if self.encoder { "encoder" } else { "decoder" };
        println!(
            "{}, {side} layer {}: {kind}, {:.0} M weights, {}",
            self.options.model,
            self.number,
            self.elements as f64 / 1e6,
            self.dtype
        );
        let (gflops, gigabytes) = (self.roof.flops / 1e9, self.roof.bytes / 1e9);
        if self.graphs.is_none() {
            let threads = rayon::current_num_threads();
            let pairs = self.used.ends_with("bf16") && self.dtype == Dtype::BF16;
            let what = if pairs { "bf16 pairs" } else { "f32 multiply-add" };
            println!(
                "{}, {threads} threads; measured limits: {gflops:.0} GFLOP/s ({what}), {gigabytes:.1} GB/s\n",
                self.used
            );
        } else if gflops.is_nan() {
            println!("{}; its limits are not known\n", self.used);
        } else {
            println!("{}; published limits: {gflops:.0} GFLOP/s (bf16), {gigabytes:.0} GB/s\n", self.used);
        }
        let [prompt, token] = self.graphs.map_or([None; 2], |times| times.map(Some));
        self.table(&format!("Prompt of {} tokens", self.options.tokens), self.prefill, prompt);
        if self.encoder {
            println!("An encoder layer has no cache: nothing to decode.\n");
        } else if !self.decode.is_empty() {
            self.table(&format!("One token after it (median of {})", self.options.decode), self.decode, token);
        }
        if !self.histogram.is_empty() {
            self.print_histogram();
        }
        println!(
            "Checked against the f64 reference on sampled rows, each stage from its own input (the whole layer with ids"
        );
        println!(
            "replayed): max |a - b| / max(1, max |b|), and the share of the error that the numerical contract allows."
        );
        println!("{:18} {:>10} {:>7}   {:>10} {:>7}", "", "prompt", "share", "one token", "share");
        for (i, check) in self.checks[0].iter().enumerate() {
            print!("{:18} {:>10.1e} {:>7.2}", check.stage, check.error, check.share);
            if let Some(decode) = self.checks.get(1).and_then(|c| c.get(i)) {
                print!("   {:>10.1e} {:>7.2}", decode.error, decode.share);
            }
            println!();
        }
        let good = self.checks.iter().flatten().all(|c| c.share <= 1.0);
        println!(
            "{} in {:.1} s",
            if good { "All within the contract" } else { "FAIL: an error above the contract" },
            self.seconds
        );
    }

    fn table(&self, title: &str, stages: &[Stage], graph: Option<Duration>) {
        println!("{title}");
        println!("  {:16} {:38} {:>10} {:>14} {:>7}  used", "stage", "shape", "time", "rate", "of roof");
        let (mut total, mut limit) = (0.0, 0.0);
        let cache = if graph.is_some() { None } else { last_level_cache() }; // a GPU's is cold before each stage
        let mut is_cached = false;
        for stage in stages {
            let seconds = stage.time.as_secs_f64();
            let least = self.roof.limit(stage.flops, stage.bytes);
            total += seconds;
            limit += least;
            let is_compute_bound = self.roof.is_compute_bound(stage.flops, stage.bytes);
            let rate = if is_compute_bound {
                format!("{:.3} TFLOP/s", stage.flops / seconds / 1e12)
            } else {
                format!("{:.1} GB/s", stage.bytes / seconds / 1e9)
            };
            // Small stages run out of caches, which the limit of memory says nothing about.
            let share = if self.roof.bytes.is_nan() || stage.bytes < 4e6 && stage.flops == 0.0 {
                "-".into()
            } else {
                format!("{:.0} %", 100.0 * least / seconds)
            };
            let is_faster =
                share != "-" && least > seconds && !is_compute_bound && cache.is_some_and(|c| stage.bytes <= c);
            is_cached |= is_faster;
            println!(
                "  {:16} {:38} {:>10} {rate:>14} {share:>7}{} {}",
                stage.name,
                stage.shape,
                time(stage.time),
                if is_faster { '*' } else { ' ' },
                self.used
            );
        }
        let sum = |name: &str, all: Duration| {
            let share = 100.0 * limit / all.as_secs_f64();
            let share = if share.is_nan() { "-".into() } else { format!("{share:.0} %") };
            println!("  {name:16} {:38} {:>10} {:>14} {share:>7}", "", time(all), "");
        };
        sum("layer", Duration::from_secs_f64(total));
        if let Some(all) = graph {
            sum("layer, one graph", all);
        }
        if let (true, Some(cache)) = (is_cached, cache) {
            let mib = cache / f64::from(1 << 20);
            println!(
                "  * reads less than the last-level cache holds ({mib:.0} MiB): in part from there, not from memory"
            );
        }
        println!();
    }

    fn print_histogram(&self) {
        let most = self.histogram.iter().copied().max().unwrap_or(0).max(1);
        let least = self.histogram.iter().copied().min().unwrap_or(0);
        let mean = self.histogram.iter().sum::<usize>() as f64 / self.histogram.len() as f64;
        let blocks =
            [' ', '\u{2581}', '\u{2582}', '\u{2583}', '\u{2584}', '\u{2585}', '\u{2586}', '\u{2587}', '\u{2588}'];
        println!("Tokens per expert in the prompt: {least} to {most}, mean {mean:.1}");
        for row in self.histogram.chunks(64) {
            let line: String = row.iter().map(|n| blocks[(n * 8).div_ceil(most)]).collect();
            println!("  |{line}|");
        }
        println!();
    }

    fn json(&self) -> Value {
        let stages = |stages: &[Stage]| -> Vec<Value> {
            stages
                .iter()
                .map(|s| {
                    let seconds = s.time.as_secs_f64();
                    json!({
                        "stage": s.name, "shape": s.shape, "time_us": seconds * 1e6, "flops": s.flops, "bytes": s.bytes,
                        "gb_per_s": s.bytes / seconds / 1e9, "tflop_per_s": s.flops / seconds / 1e12,
                        "of_roof": self.roof.limit(s.flops, s.bytes) / seconds,
                    })
                })
                .collect()
        };
        let checks: Vec<Value> = self
            .checks
            .iter()
            .map(|run| run.iter().map(|c| json!({ "stage": c.stage, "error": c.error, "share": c.share })).collect())
            .collect();
        json!({
            "model": self.options.model, "layer": self.number, "dtype": self.dtype.name(), "used": self.used,
            "threads": rayon::current_num_threads(), "tokens": self.options.tokens, "weights": self.elements,
            "roof": { "gflop_per_s": self.roof.flops / 1e9, "gb_per_s": self.roof.bytes / 1e9 },
            "prefill": stages(self.prefill), "decode": stages(self.decode),
            "graph_us": self.graphs.map(|times| times.map(|time| time.as_secs_f64() * 1e6)), "tokens_per_expert": self.histogram,
            "checks": checks, "seconds": self.seconds,
        })
    }
}
