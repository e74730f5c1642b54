//! The workloads: which there are, how much each has to do, and which share of the limit it is meant to reach.

use gatefold::Dtype;

/// A call that is timed.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// What `--only` selects by; a prefix will do.
    pub id: &'static str,
    pub about: &'static str,
    pub kind: Kind,
    /// Shares of the limit aimed at in f32 and in bf16, with AVX-512; 0 for none.
    pub goals: [f64; 2],
}

/// Shapes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Router, experts and weighted sum.
    Moe { hidden: usize, inner: usize, experts: usize, top_k: usize, tokens: usize },
    /// Causal attention of the last `queries` of `keys` rows, 32 query heads and 4 key/value heads of width 128.
    Attention { queries: usize, keys: usize },
    /// `x * weight^T`, `weight` packed beforehand.
    Linear { rows: usize, outputs: usize, inputs: usize },
    /// Experts, weights and counts from logits.
    Route { tokens: usize, experts: usize, top_k: usize },
}

const QWEN3: [usize; 4] = [2048, 768, 128, 8];

const fn qwen3(tokens: usize) -> Kind {
    let [hidden, inner, experts, top_k] = QWEN3;
    Kind::Moe { hidden, inner, experts, top_k, tokens }
}

/// All of them. `W2` and `W5` read each time what no cache holds: they take turns over inputs and over copies of the keys.
pub const WORKLOADS: [Workload; 9] = [
    Workload { id: "W1", about: "experts of Qwen3-30B, 512 tokens", kind: qwen3(512), goals: [0.81, 0.82] },
    Workload { id: "W2.1", about: "the same, 1 token", kind: qwen3(1), goals: [0.92, 0.92] },
    Workload { id: "W2.8", about: "the same, 8 tokens", kind: qwen3(8), goals: [0.91, 0.91] },
    Workload {
        id: "W3",
        about: "2 of 8 experts of 3584, 256 tokens",
        kind: Kind::Moe { hidden: 1024, inner: 3584, experts: 8, top_k: 2, tokens: 256 },
        goals: [0.84, 0.84],
    },
    Workload {
        id: "W4",
        about: "attention, prompt of 2048",
        kind: Kind::Attention { queries: 2048, keys: 2048 },
        goals: [0.78, 0.60],
    },
    Workload {
        id: "W5",
        about: "attention, 1 query, 8192 keys",
        kind: Kind::Attention { queries: 1, keys: 8192 },
        goals: [0.85, 0.82],
    },
    Workload {
        id: "W6.1024",
        about: "linear, 1024 x 1024 x 1024",
        kind: Kind::Linear { rows: 1024, outputs: 1024, inputs: 1024 },
        goals: [0.0, 0.0],
    },
    Workload {
        id: "W6.4096",
        about: "linear, 512 x 4096 x 4096",
        kind: Kind::Linear { rows: 512, outputs: 4096, inputs: 4096 },
        goals: [0.93, 0.91],
    },
    Workload {
        id: "W7",
        about: "routing, 4096 tokens, 8 of 128",
        kind: Kind::Route { tokens: 4096, experts: 128, top_k: 8 },
        goals: [0.0, 0.0],
    },
];

/// Milliseconds aimed at for `W7`, which no limit bounds: with one thread, with more.
const ROUTE_GOALS: [f64; 2] = [0.9, 0.5];
/// f16 is to reach this share of the rate of f32 where arithmetic bounds it, of bf16 where memory does.
const F16_SHARE: f64 = 0.9;
/// Of AVX2's own limit, where arithmetic bounds the work.
const AVX2_SHARE: f64 = 0.8;
/// Of memory, for decoding on one thread.
const ONE_THREAD_SHARE: f64 = 0.85;

/// What is aimed at.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    None,
    /// Of the limit.
    Share(f64),
    Milliseconds(f64),
}

impl Workload {
    /// Whether the type exists there: logits are f32 always.
    pub fn has(&self, dtype: Dtype) -> bool {
        dtype == Dtype::F32 || !matches!(self.kind, Kind::Route { .. })
    }

    /// Whether memory bounds it.
    pub fn is_decode(&self) -> bool {
        match self.kind {
            Kind::Moe { tokens, .. } => tokens <= 8,
            Kind::Attention { queries, .. } => queries == 1,
            Kind::Linear { .. } | Kind::Route { .. } => false,
        }
    }

    /// What is aimed at on so many threads.
    pub fn goal(&self, dtype: Dtype, threads: usize, level: &str) -> Goal {
        if matches!(self.kind, Kind::Route { .. }) {
            return Goal::Milliseconds(ROUTE_GOALS[usize::from(threads > 1)]);
        }
        let [single, pairs] = self.goals;
        let share = match dtype {
            _ if level == "portable" => 0.0,
            Dtype::F32 if level == "avx2" && matches!(self.id, "W1" | "W6.4096") => AVX2_SHARE,
            _ if level == "avx2" => 0.0,
            Dtype::F16 if self.is_decode() => F16_SHARE * pairs,
            Dtype::F16 => F16_SHARE * single,
            _ if threads == 1 && matches!(self.id, "W2.1" | "W2.8") => ONE_THREAD_SHARE,
            Dtype::BF16 => pairs,
            _ => single,
        };
        if share == 0.0 { Goal::None } else { Goal::Share(share) }
    }

    /// Multiply-adds count as two. Of causal attention the half that is visible; the router of a mixture is not counted.
    pub fn flops(&self) -> f64 {
        let product = |of: &[usize]| of.iter().map(|n| *n as f64).product::<f64>();
        match self.kind {
            Kind::Moe { hidden, inner, top_k, tokens, .. } => 6.0 * product(&[hidden, inner, top_k, tokens]),
            Kind::Attention { queries: 1, keys } => 4.0 * product(&[32, 128, keys]),
            Kind::Attention { queries, keys } => 2.0 * product(&[32, 128, queries, keys]),
            Kind::Linear { rows, outputs, inputs } => 2.0 * product(&[rows, outputs, inputs]),
            Kind::Route { .. } => 0.0,
        }
    }
}
