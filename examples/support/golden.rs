//! Files of the golden format (`tests/golden/README.md`): from the metadata to specifications, and through a backend. What comes
//! out is compared in `compare`. Knows nothing of file names.

mod compare;

use super::array::{Array, cast, swap_middle};
use super::backend::{Backend, FfnArrays, MoeArrays, Reference};
use super::checkpoint::MAX_POSITIONS;
use super::cpu::CpuBackend;
use super::device::DeviceBackend;
use super::layer::{AttentionWeights, Cache, LayerWeights, NormWeights, Options, PackedLayer, Projection, Rows, run};
use super::measure::{Contract, relative_error};
use super::naive::{DEVICES, Naive};
use super::stored::Stored;
use super::tensors::Tensors;
use gatefold::args::{
    AttentionInput, AttentionOutput, Kv, MoeInput, MoeOutput, RouteInput, RouteOutput, Routing, WkvInput, WkvOutput,
};
use gatefold::cpu::{Cpu, Float};
use gatefold::cuda::driver::Driver;
use gatefold::spec::*;
use gatefold::{Dtype, Element, View};
use half::{bf16, f16};
use serde_json::Value;
use std::path::Path;

/// What runs the files.
#[derive(Clone, Copy)]
pub enum Runner<'a> {
    Reference,
    Cpu(gatefold::cpu::Level),
    /// A device by its name.
    Device(&'a dyn Driver, &'static str),
}

/// How a section went.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Largest error, in units of `tolerance`'s measure.
    Ok {
        error: f64,
        tolerance: f64,
    },
    Fail {
        what: String,
    },
    Unsupported {
        why: String,
    },
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub section: String,
    pub used: String,
    pub outcome: Outcome,
}

/// A golden file.
pub struct Case {
    tensors: Tensors,
    meta: Value,
}

/// Why a section did not give a number.
enum Stop {
    Unsupported(String),
    Broken(String),
}

impl From<String> for Stop {
    fn from(text: String) -> Self {
        Stop::Broken(text)
    }
}

impl From<gatefold::Error> for Stop {
    fn from(error: gatefold::Error) -> Self {
        match error {
            gatefold::Error::Unsupported { .. } => Stop::Unsupported(error.to_string()),
            other => Stop::Broken(other.to_string()),
        }
    }
}

type Answer<T> = Result<T, Stop>;

fn field<'a>(value: &'a Value, name: &str) -> Answer<&'a Value> {
    value.get(name).ok_or_else(|| Stop::Broken(format!("the metadata has no field {name}")))
}

fn number(value: &Value, name: &str) -> Answer<f64> {
    field(value, name)?.as_f64().ok_or_else(|| Stop::Broken(format!("{name} is not a number")))
}

fn count(value: &Value, name: &str) -> Answer<usize> {
    let n = field(value, name)?.as_u64().ok_or_else(|| Stop::Broken(format!("{name} is not a count")))?;
    Ok(n as usize)
}

fn text<'a>(value: &'a Value, name: &str) -> Answer<&'a str> {
    field(value, name)?.as_str().ok_or_else(|| Stop::Broken(format!("{name} is not text")))
}

fn flag(value: &Value, name: &str) -> bool {
    value.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// A number, or nothing where the field is null or absent.
fn maybe(value: &Value, name: &str) -> Option<f64> {
    value.get(name).and_then(Value::as_f64)
}

fn object<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).filter(|v| v.is_object())
}

impl Case {
    /// Reads a file.
    ///
    /// # Errors
    /// Text that says what is wrong with it.
    pub fn read(path: &Path) -> Result<Case, String> {
        Self::new(Tensors::read(path)?)
    }

    /// From tensors that were read already.
    ///
    /// # Errors
    /// Text that says what is wrong with the metadata.
    pub fn new(tensors: Tensors) -> Result<Case, String> {
        let json = tensors.metadata.get("golden").ok_or("the file has no `golden` entry in its metadata")?;
        let meta: Value = serde_json::from_str(json).map_err(|e| format!("metadata: {e}"))?;
        match meta.get("format").and_then(Value::as_str) {
            Some("golden-1") => Ok(Case { tensors, meta }),
            other => Err(format!("the format is {other:?}, expected golden-1")),
        }
    }

    /// Names of the sections.
    pub fn sections(&self) -> Vec<String> {
        let list = self.meta.get("sections").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|s| s.as_str().map(String::from)).collect()
    }

    fn tolerance(&self, kind: &str) -> f64 {
        let default = if kind == "f64" { 1e-10 } else { 1e-5 };
        self.meta.get("tolerance").and_then(|t| maybe(t, kind)).unwrap_or(default)
    }

    /// A tensor, each number rounded to `dtype` and widened again.
    fn rounded(&self, name: &str, dtype: Dtype) -> Answer<Array<f64>> {
        let tensor = self.tensors.need(name)?;
        Ok(match dtype {
            Dtype::BF16 => tensor.cast::<bf16>().cast(),
            Dtype::F16 => tensor.cast::<f16>().cast(),
            _ => tensor.cast(),
        })
    }

    fn exact(&self, name: &str) -> Answer<Array<f64>> {
        Ok(self.tensors.need(name)?.cast())
    }

    fn vector(&self, name: &str) -> Option<Vec<f64>> {
        self.tensors.get(name).map(|t| t.cast::<f64>().data)
    }

    fn mask(&self, name: &str) -> Option<Vec<u8>> {
        self.tensors.get(name).map(|t| t.bools())
    }

    fn attention_spec(&self) -> Answer<Attention> {
        let a = field(&self.meta, "attn")?;
        let mut spec = Attention::new(count(a, "heads_q")?, count(a, "heads_kv")?, count(a, "dim_qk")?);
        spec.value_dim = count(a, "dim_v")?;
        spec.softmax_scale = number(a, "scale")?;
        spec.mask = Mask {
            causal: flag(a, "causal"),
            window_left: match maybe(a, "window") {
                Some(w) if w < 1.0 => return Err(Stop::Broken(format!("window is {w}, expected at least 1"))),
                w => w.map(|w| w as usize - 1),
            },
            window_right: None,
            chunk: maybe(a, "chunk").map(|c| c as usize),
        };
        spec.softcap = maybe(a, "softcap");
        spec.alibi = self.tensors.get("attn.alibi_slopes").is_some();
        spec.sinks = self.tensors.get("attn.sinks").is_some();
        Ok(spec)
    }

    /// Runs one section.
    pub fn run(&self, section: &str, runner: Runner<'_>, dtype: Dtype) -> Vec<Line> {
        let (used, result) = match runner {
            Runner::Reference => {
                let result = match dtype {
                    Dtype::F32 => self.against_file(section, &mut Reference, "f64"),
                    Dtype::BF16 => self.against_reference(section, &mut Stored::<bf16>::default()),
                    Dtype::F16 => self.against_reference(section, &mut Stored::<f16>::default()),
                    other => Err(Stop::Unsupported(format!("element type {other}"))),
                };
                ("reference".into(), result)
            }
            Runner::Cpu(level) => {
                let cpu = Cpu::with_level(level);
                let result = match dtype {
                    Dtype::F32 => self.against_file(section, &mut CpuBackend::<f32>::new(cpu), "f32"),
                    Dtype::BF16 => self.against_reference(section, &mut CpuBackend::<bf16>::new(cpu)),
                    Dtype::F16 => self.against_reference(section, &mut CpuBackend::<f16>::new(cpu)),
                    other => Err(Stop::Unsupported(format!("element type {other}"))),
                };
                (format!("cpu {}", level.name()), result)
            }
            Runner::Device(driver, name) => {
                let result = match dtype {
                    Dtype::F32 => self.against_file(section, &mut DeviceBackend::<f32>::new(driver, name), "f32"),
                    Dtype::BF16 => self.against_reference(section, &mut DeviceBackend::<bf16>::new(driver, name)),
                    Dtype::F16 => self.against_reference(section, &mut DeviceBackend::<f16>::new(driver, name)),
                    other => Err(Stop::Unsupported(format!("element type {other}"))),
                };
                (name.into(), result)
            }
        };
        let line = |section: &str, outcome| Line { section: section.into(), used: used.clone(), outcome };
        match result {
            Ok(lines) => lines.into_iter().map(|(name, outcome)| line(&name, outcome)).collect(),
            Err(Stop::Unsupported(why)) => vec![line(section, Outcome::Unsupported { why })],
            Err(Stop::Broken(what)) => vec![line(section, Outcome::Fail { what })],
        }
    }

    /// Rows of padding: `[tokens]`, `true` where the query sees no key.
    fn fully_masked(&self) -> Vec<bool> {
        self.mask("attn.fully_masked").unwrap_or_default().iter().map(|m| *m != 0).collect()
    }

    /// The stored truth of attention, with our contract's zeros in the rows that see nothing.
    fn attention_truth(&self) -> Answer<Array<f64>> {
        let mut truth = self.exact("attn.out.f64")?;
        let [_, _, heads, dim]: [usize; 4] = four(&truth)?;
        for (row, dead) in truth.data.chunks_mut((heads * dim).max(1)).zip(self.fully_masked()) {
            if dead {
                row.fill(0.0);
            }
        }
        Ok(truth)
    }

    /// Attention of the file's q, k, v. `dense`: with the stored bias rather than the table it was looked up in.
    fn attention<B: Backend>(&self, b: &mut B, dtype: Dtype, dense: bool) -> Answer<Array<B::A>> {
        let a = field(&self.meta, "attn")?;
        let mut spec = self.attention_spec()?;
        let q = self.rounded("attn.q", dtype)?;
        let (k, v) = (self.rounded("attn.k", dtype)?.cast::<B::A>(), self.rounded("attn.v", dtype)?.cast::<B::A>());
        let [batch, heads, seq_q, dim] = four(&q)?;
        let [_, heads_kv, seq_k, _] = four(&k)?;
        let [_, _, _, value_dim] = four(&v)?;
        let q: Array<B::A> = swap_middle(&q).reshape(&[batch * seq_q, heads, dim]).cast();
        // Keys stay as they are stored, head by head; the view's strides say so.
        let (k_strides, v_strides) = (by_head(heads_kv, seq_k, dim), by_head(heads_kv, seq_k, value_dim));
        let k = View::with_strides(&k.data, [batch, seq_k, heads_kv, dim], k_strides);
        let v = View::with_strides(&v.data, [batch, seq_k, heads_kv, value_dim], v_strides);
        let lens = vec![seq_k as u32; batch];
        let sums: Vec<u32> = (0..=batch).map(|s| (s * seq_q) as u32).collect();
        let starts = |name: &str| Ok::<_, Stop>(vec![number(a, name)? as i64; batch]);
        let (q_start, k_start) = (starts("q_start")?, starts("k_start")?);
        let mut input = AttentionInput::new(q.view(), Kv::cache(k, v, &lens));
        input.cu_seqlens_q = Some(&sums);
        input.q_start = Some(&q_start);
        input.k_start = Some(&k_start);
        let mask = self.mask("attn.key_mask");
        if let Some(mask) = &mask {
            input.mask = Some(View::new(mask, [batch, 1, 1, seq_k]));
        }
        let slopes: Option<Vec<B::S>> = self.vector("attn.alibi_slopes").map(|s| cast(&s));
        let positions: Option<Vec<B::S>> = self.vector("attn.alibi_pos").map(|s| cast(&s));
        if slopes.is_some() {
            input.alibi_slopes = slopes.as_deref();
            input.alibi_positions = positions.as_deref().map(|p| View::new(p, [batch, seq_k]));
        }
        let sinks: Option<Vec<B::S>> = self.vector("attn.sinks").map(|s| cast(&s));
        input.sinks = sinks.as_deref();
        let table: Option<Array<B::S>> = self.tensors.get("attn.rel_bias_table").map(|t| t.cast());
        let bias: Option<Array<B::S>> = self.tensors.get("attn.bias").map(|t| t.cast());
        match (object(a, "rel_bias"), &table) {
            (Some(r), Some(table)) if !dense => {
                let bidirectional = flag(r, "bidirectional");
                spec.relative_bias =
                    Some(RelativeBias::new(count(r, "num_buckets")?, count(r, "max_distance")?, bidirectional));
                input.relative_bias = Some(table.view());
            }
            _ => input.bias = bias.as_ref().map(|x| x.view()),
        }
        let mut out = Array::zeros(&[batch * seq_q, heads, value_dim]);
        b.attention(&spec, &input, AttentionOutput::new(out.view_mut()))?;
        Ok(out)
    }

    /// Whether the file has both a bias and the table it comes from.
    fn has_bias_table(&self) -> bool {
        self.tensors.get("attn.rel_bias_table").is_some()
            && self.meta.get("attn").is_some_and(|a| object(a, "rel_bias").is_some())
    }

    fn moe_spec(&self) -> Answer<Moe> {
        let m = field(&self.meta, "moe")?;
        let (experts, top_k, hidden) = (count(m, "n_experts")?, count(m, "top_k")?, count(m, "hidden")?);
        let params = object(m, "act_params");
        let activation = activation(text(m, "activation")?, params)?;
        let has = |name: &str| self.tensors.get(name).is_some();
        let mut ffn = match text(m, "expert_form")? {
            "gated" => Ffn::gated(hidden, count(m, "inter")?, activation),
            "plain" => Ffn::plain(hidden, count(m, "inter")?, activation),
            other => return Err(Stop::Broken(format!("expert_form {other}"))),
        };
        ffn.up_bias = has("moe.experts.up_bias") || has("moe.experts.gate_bias");
        ffn.down_bias = has("moe.experts.down_bias");
        let mut router = Router::new(experts, top_k);
        router.score = match text(m, "score_fn")? {
            "softmax" | "sparsemixer" => Score::Softmax,
            "sigmoid" => Score::Sigmoid,
            "identity" => Score::Raw,
            other => return Err(Stop::Broken(format!("score_fn {other}"))),
        };
        if text(m, "score_fn")? == "sparsemixer" {
            router.selection = Selection::SparseMixer { jitter_eps: number(m, "jitter_eps")? };
        } else {
            router.select_on = match text(m, "select_on")? {
                "scores" => SelectOn::Scores,
                "logits" => SelectOn::Logits,
                other => return Err(Stop::Broken(format!("select_on {other}"))),
            };
            router.renormalize = match text(m, "weight_norm")? {
                "none" => Renormalize::None,
                "sum" => Renormalize::Sum {
                    eps: maybe(m, "norm_eps").unwrap_or(0.0),
                    floor: maybe(m, "norm_min").unwrap_or(0.0),
                },
                "l2" => Renormalize::L2,
                "softmax_selected" => Renormalize::Softmax,
                other => return Err(Stop::Broken(format!("weight_norm {other}"))),
            };
            router.scaling_factor = maybe(m, "routed_scale").unwrap_or(1.0);
        }
        if let Some(g) = object(m, "groups") {
            let score = match text(g, "group_score")? {
                "max" => GroupScore::Max,
                "top2_sum" => GroupScore::Top2Sum,
                other => return Err(Stop::Broken(format!("group_score {other}"))),
            };
            router.groups = Some(ExpertGroups::new(count(g, "n_group")?, count(g, "topk_group")?, score));
        }
        let seq = self.exact("moe.x")?.shape.get(1).copied().unwrap_or(1);
        if let Some(c) = object(m, "capacity") {
            let mut capacity = Capacity::new(CapacityLimit::Tokens(count(c, "limit")?));
            capacity.order = match text(c, "order")? {
                "position" => CapacityOrder::Position,
                "score" => CapacityOrder::Score,
                other => return Err(Stop::Broken(format!("capacity order {other}"))),
            };
            capacity.group_len = match text(c, "scope")? {
                "row" => Some(seq.max(1)),
                "all" => None,
                other => return Err(Stop::Broken(format!("capacity scope {other}"))),
            };
            capacity.normalize_after_drop = c.get("normalise").and_then(Value::as_str) == Some("after_drop");
            router.capacity = Some(capacity);
        }
        router.aux_loss = match m.get("aux_loss").and_then(Value::as_str) {
            Some("topk_load_balance") => Some(AuxLoss::TopK),
            Some("switch_load_balance") => Some(AuxLoss::Switch { group_len: Some(seq.max(1)) }),
            Some(other) => return Err(Stop::Broken(format!("aux_loss {other}"))),
            None => None,
        };
        let mut block = ExpertFfn::new(experts, ffn);
        block.combine_scale = maybe(m, "combine_scale").unwrap_or(1.0);
        block.weight_on = match text(m, "apply_weight")? {
            "output" => WeightOn::Output,
            "input" => WeightOn::Input,
            other => return Err(Stop::Broken(format!("apply_weight {other}"))),
        };
        if block.weight_on == WeightOn::Input {
            block.combine_scale = 1.0; // the format's formula has no factor on the sum in this case
        }
        let mut moe = Moe::new(router, block);
        moe.router_bias = has("moe.router.bias");
        moe.selection_bias = has("moe.router.correction_bias");
        if let Some(s) = object(m, "shared") {
            let mut shared = SharedExpert::new(Ffn::gated(hidden, count(s, "inter")?, activation));
            shared.sigmoid_gate = match text(s, "gate")? {
                "sigmoid" => true,
                "none" => false,
                other => return Err(Stop::Broken(format!("gate of the shared expert {other}"))),
            };
            moe.shared = Some(shared);
        }
        Ok(moe)
    }

    fn moe_arrays(&self, spec: &Moe, dtype: Dtype) -> Answer<MoeArrays<f64>> {
        let maybe = |name: &str| self.tensors.get(name).map(|t| t.cast::<f64>());
        let matrix = |name: &str| self.rounded(name, dtype);
        let ffn = &spec.experts.ffn;
        let gate = if ffn.gated { Some(matrix("moe.experts.gate")?) } else { None };
        let experts = FfnArrays {
            gate,
            up: matrix("moe.experts.up")?,
            down: matrix("moe.experts.down")?,
            gate_bias: maybe("moe.experts.gate_bias"),
            up_bias: maybe("moe.experts.up_bias"),
            down_bias: maybe("moe.experts.down_bias"),
        };
        let shared = match spec.shared {
            None => None,
            Some(_) => Some(FfnArrays {
                gate: Some(matrix("moe.shared.gate")?),
                up: matrix("moe.shared.up")?,
                down: matrix("moe.shared.down")?,
                ..FfnArrays::default()
            }),
        };
        let gated = spec.shared.is_some_and(|s| s.sigmoid_gate);
        Ok(MoeArrays {
            router: matrix("moe.router.weight")?,
            router_bias: self.vector("moe.router.bias"),
            selection_bias: self.vector("moe.router.correction_bias"),
            experts,
            shared,
            shared_gate: if gated { Some(matrix("moe.shared.router")?) } else { None },
        })
    }

    fn layer_spec(&self) -> Answer<Layer> {
        let l = field(&self.meta, "layer")?;
        let n = field(l, "norm")?;
        let mut norm = match text(n, "type")? {
            "rmsnorm" => Norm::rms(number(n, "eps")?),
            "layernorm" => Norm::layer(number(n, "eps")?),
            other => return Err(Stop::Broken(format!("norm {other}"))),
        };
        norm.weight_offset = maybe(n, "weight_offset").unwrap_or(0.0);
        let rope = self.rope_spec(field(l, "rope")?)?;
        let has = |name: &str| self.tensors.get(name).is_some();
        let spec = self.attention_spec()?;
        let attention = match text(l, "attention")? {
            "gqa" => {
                let mut block = GqaBlock::new(spec);
                block.qkv_bias = has("layer.bq");
                block.out_bias = has("layer.bo");
                block.qk_norm = match l.get("qk_norm").and_then(Value::as_str) {
                    None => None,
                    Some("full_rms") => Some(QkNorm::Full),
                    Some("per_head_rms") => Some(QkNorm::PerHead),
                    Some("l2_after_rope") => Some(QkNorm::L2AfterRope),
                    Some(other) => return Err(Stop::Broken(format!("qk_norm {other}"))),
                };
                block.clip_qkv = maybe(l, "clip_qkv");
                block.rope = rope;
                if let Some(t) = object(l, "q_temperature") {
                    block.q_temperature = Some(QTemperature::new(number(t, "floor_scale")?, number(t, "attn_scale")?));
                }
                AttentionBlock::Gqa(block)
            }
            "mla" => {
                let m = field(l, "mla")?;
                let mut mla = Mla::new(
                    spec.num_heads,
                    count(m, "kv_lora_rank")?,
                    count(m, "nope_dim")?,
                    count(m, "rope_dim")?,
                    count(m, "dim_v")?,
                );
                mla.q_lora_rank = maybe(m, "q_lora_rank").map(|r| r as usize);
                mla.latent_norm_eps = number(m, "latent_norm_eps")?;
                let rope = rope.ok_or_else(|| Stop::Unsupported("latent attention without rotation".into()))?;
                let mut block = MlaBlock::new(mla, rope);
                block.attention = spec;
                AttentionBlock::Mla(block)
            }
            other => return Err(Stop::Broken(format!("attention {other}"))),
        };
        let hidden = self.exact("layer.in")?.shape.last().copied().unwrap_or(0);
        let mlp = match text(l, "mlp")? {
            "moe" => Mlp::Moe(Box::new(self.moe_spec()?)),
            "dense" => {
                let inter = self.exact("layer.mlp.up")?.shape[0];
                let activation = activation(text(l, "dense_activation")?, object(l, "act_params"))?;
                Mlp::Dense(Ffn::gated(hidden, inter, activation))
            }
            other => return Err(Stop::Broken(format!("mlp {other}"))),
        };
        let mut layer = Layer::new(hidden, norm, attention, mlp);
        layer.post_attention_norm = has("layer.norm.attn_out");
        layer.post_mlp_norm = has("layer.norm.mlp_out");
        layer.residual_multiplier = maybe(l, "residual_multiplier").unwrap_or(1.0);
        Ok(layer)
    }

    fn rope_spec(&self, r: &Value) -> Answer<Option<Rope>> {
        let style = match text(r, "style")? {
            "none" => return Ok(None),
            "half" => RopeStyle::Half,
            "interleaved" => RopeStyle::Interleaved,
            "interleaved_to_half" => RopeStyle::InterleavedToHalf,
            other => return Err(Stop::Broken(format!("rope style {other}"))),
        };
        let mut rope = Rope::new(style, count(r, "rotary_dim")?, maybe(r, "theta").unwrap_or(10_000.0));
        if text(r, "type")? != "default" {
            rope.scaling = RopeScaling::given(self.exact("layer.rope.inv_freq")?.data);
        }
        rope.cos_sin_scale = maybe(r, "cos_sin_scale").unwrap_or(1.0);
        Ok(Some(rope))
    }

    fn layer_weights(&self, layer: &Layer, dtype: Dtype) -> Answer<LayerWeights<f64>> {
        let projection = |weight: &str, bias: &str| {
            Ok::<_, Stop>(Projection { weight: self.rounded(weight, dtype)?, bias: self.vector(bias) })
        };
        let attention = match &layer.attention {
            AttentionBlock::Mla(block) => {
                let m = &block.mla;
                let kv_b = self.rounded("layer.mla.wkv_b", dtype)?;
                let compressed = m.q_lora_rank.is_some();
                let shape = [m.num_heads, m.nope_dim + m.value_dim, m.kv_lora_rank];
                if kv_b.data.len() != shape.iter().product::<usize>() {
                    return Err(Stop::Broken(format!("layer.mla.wkv_b is {:?}, expected {shape:?}", kv_b.shape)));
                }
                AttentionWeights {
                    q: projection(if compressed { "layer.mla.wq_b" } else { "layer.mla.wq" }, "")?,
                    q_a: if compressed { Some(projection("layer.mla.wq_a", "")?) } else { None },
                    q_a_norm: self.vector("layer.mla.q_a_norm"),
                    kv_a: Some(projection("layer.mla.wkv_a", "")?),
                    kv_a_norm: self.vector("layer.mla.kv_a_norm"),
                    kv_b: Some(kv_b.reshape(&shape)),
                    out: projection("layer.wo", "layer.bo")?,
                    ..AttentionWeights::default()
                }
            }
            _ => AttentionWeights {
                q: projection("layer.wq", "layer.bq")?,
                k: projection("layer.wk", "layer.bk")?,
                v: projection("layer.wv", "layer.bv")?,
                out: projection("layer.wo", "layer.bo")?,
                q_norm: self.vector("layer.q_norm"),
                k_norm: self.vector("layer.k_norm"),
                sinks: self.vector("attn.sinks"),
                alibi_slopes: self.vector("attn.alibi_slopes"),
                relative_bias: None,
                ..AttentionWeights::default()
            },
        };
        let norm = |name: &str| NormWeights { weight: self.vector(name), bias: None };
        let mut weights = LayerWeights {
            attn_norm: norm("layer.norm.attn_in"),
            mlp_norm: norm("layer.norm.mlp_in"),
            post_attn_norm: norm("layer.norm.attn_out"),
            post_mlp_norm: norm("layer.norm.mlp_out"),
            attention,
            mlp: None,
            moe: None,
        };
        match &layer.mlp {
            Mlp::Moe(moe) => weights.moe = Some(self.moe_arrays(moe, dtype)?),
            _ => {
                weights.mlp = Some(FfnArrays {
                    gate: Some(self.rounded("layer.mlp.gate", dtype)?),
                    up: self.rounded("layer.mlp.up", dtype)?,
                    down: self.rounded("layer.mlp.down", dtype)?,
                    ..FfnArrays::default()
                });
            }
        }
        Ok(weights)
    }

    /// The whole layer from the hidden state; gives the output and the routing that was used.
    fn layer<B: Backend>(&self, b: &mut B, dtype: Dtype, options: &Options) -> Answer<LayerRun<B::A>> {
        if self.tensors.get("attn.bias").is_some() || self.tensors.get("attn.alibi_pos").is_some() {
            return Err(Stop::Unsupported("a whole layer with a stored score bias".into()));
        }
        let spec = self.layer_spec()?;
        let weights = self.layer_weights(&spec, dtype)?;
        // Weights that are rounded already keep their values in the narrower type.
        match dtype {
            Dtype::BF16 => self.layer_with(b, &spec, &weights.cast::<bf16>(), dtype, options),
            Dtype::F16 => self.layer_with(b, &spec, &weights.cast::<f16>(), dtype, options),
            _ => self.layer_with(b, &spec, &weights.cast::<f32>(), dtype, options),
        }
    }

    fn layer_with<B: Backend, W: Float>(
        &self,
        b: &mut B,
        spec: &Layer,
        weights: &LayerWeights<W>,
        dtype: Dtype,
        options: &Options,
    ) -> Answer<LayerRun<B::A>> {
        let l = field(&self.meta, "layer")?;
        let x: Array<B::A> = self.rounded("layer.in", dtype)?.cast();
        let [batch, seq, hidden] = three(&x)?;
        let positions = self.tensors.need("layer.positions")?.ints().data;
        let last = positions.iter().copied().max().unwrap_or(0);
        if positions.len() != seq || positions.iter().any(|p| *p < 0) || last >= MAX_POSITIONS as i64 {
            return Err(Stop::Broken("layer.positions are not positions of the sequence".into()));
        }
        let past_name =
            if matches!(spec.attention, AttentionBlock::Mla(_)) { "layer.mla.past_ckv" } else { "layer.past_k" };
        let past = self.tensors.get(past_name).map_or(0, |t| t.shape().get(2).copied().unwrap_or(0));
        let packed = PackedLayer::pack(b, spec, weights, last as usize + 1)?;
        let mut cache = packed.cache(batch, past + seq);
        if past > 0 {
            self.fill_cache(spec, dtype, past, &mut cache)?;
        }
        cache.k_start = vec![number(l, "past")? as i64 - past as i64; batch];
        let mut rows = Rows::equal(batch, seq, 0);
        rows.positions = (0..batch).flat_map(|_| positions.iter().map(|p| *p as u32)).collect();
        if let Some(mask) = self.mask("attn.key_mask") {
            if mask.len() != batch * (past + seq) {
                return Err(Stop::Broken(format!(
                    "attn.key_mask has {} elements, expected {batch} x {}",
                    mask.len(),
                    past + seq
                )));
            }
            rows.key_mask = Some(Array::new(mask, &[batch, 1, 1, past + seq]));
        }
        if let Mlp::Moe(moe) = &spec.mlp
            && moe.router.capacity.is_some()
        {
            rows.token_mask = self.mask("moe.token_mask");
        }
        let trace = run(b, &packed, &x.reshape(&[batch * seq, hidden]), &rows, &mut cache, options)?;
        let weights = trace.topk_weights.cast();
        Ok(LayerRun { out: trace.out, routing: (trace.topk_ids, weights) })
    }

    fn fill_cache<T: Element>(&self, spec: &Layer, dtype: Dtype, past: usize, cache: &mut Cache<T>) -> Answer<()> {
        let fill = |to: &mut Array<T>, at: usize, name: &str| {
            let from = self.rounded(name, dtype)?;
            let (found @ [batch, heads, rows, width], [seqs, capacity, kv_heads, room]) = (four(&from)?, four(to)?);
            if [batch, heads, rows] != [seqs, kv_heads, past] || past > capacity || at + width > room {
                let expected = [seqs, kv_heads, past, room.saturating_sub(at)];
                return Err(Stop::Broken(format!("{name} is {found:?}, expected at most {expected:?}")));
            }
            let from = swap_middle(&from);
            for b in 0..batch {
                for j in 0..past {
                    for h in 0..heads {
                        let source = &from.data[((b * past + j) * heads + h) * width..][..width];
                        let start = ((b * capacity + j) * heads + h) * room + at;
                        for (to, x) in to.data[start..start + width].iter_mut().zip(source) {
                            *to = T::from_f64(*x);
                        }
                    }
                }
            }
            Ok::<_, Stop>(())
        };
        match &spec.attention {
            AttentionBlock::Mla(block) => {
                fill(&mut cache.k, 0, "layer.mla.past_ckv")?;
                fill(&mut cache.k, block.mla.kv_lora_rank, "layer.mla.past_krope")?;
            }
            _ => {
                fill(&mut cache.k, 0, "layer.past_k")?;
                fill(&mut cache.v, 0, "layer.past_v")?;
            }
        }
        cache.lens.fill(past as u32);
        Ok(())
    }

    /// Rows of `layer.out` that mean something.
    fn live_rows(&self, tokens: usize) -> Vec<usize> {
        let dead = self.fully_masked();
        (0..tokens).filter(|t| !dead.get(*t).copied().unwrap_or(false)).collect()
    }

    /// Forms of latent attention that a layer is run in.
    fn forms(&self) -> Vec<Options> {
        let latent = self.meta.get("layer").and_then(|l| l.get("attention")).and_then(Value::as_str) == Some("mla");
        let absorbed = Options { absorbed: true, ..Options::default() };
        if latent { vec![Options::default(), absorbed] } else { vec![Options::default()] }
    }

    fn wkv<B: Backend>(&self, b: &mut B, dtype: Dtype) -> Answer<WithState<B::A, B::S>> {
        let (k, v) = (self.rounded("wkv.k", dtype)?.cast::<B::A>(), self.rounded("wkv.v", dtype)?.cast::<B::A>());
        let side = |name: &str| Ok::<Vec<B::S>, Stop>(cast(&self.exact(name)?.data));
        let (decay, first) = (side("wkv.decay")?, side("wkv.first")?);
        let state: Option<Array<B::S>> = self.tensors.get("wkv.state_in").map(|t| t.cast());
        let [batch, _, channels] = three(&k)?;
        let (mut out, mut state_out) = (Array::zeros(&k.shape), Array::zeros(&[3, batch, channels]));
        let mut input = WkvInput::new(k.view(), v.view(), &decay, &first);
        input.state_in = state.as_ref().map(Array::view);
        b.wkv(&input, WkvOutput::with_state(out.view_mut(), state_out.view_mut()))?;
        Ok((out, self.tensors.get("wkv.state_out.f64").map(|_| state_out)))
    }
}

/// An output and the state after it.
type WithState<A, S> = (Array<A>, Option<Array<S>>);

struct LayerRun<T> {
    out: Array<T>,
    routing: (Array<i32>, Array<f64>),
}

/// Strides of `[batch, seq, heads, width]` over an array that is stored `[batch, heads, seq, width]`.
fn by_head(heads: usize, seq: usize, width: usize) -> [usize; 4] {
    [heads * seq * width, width, seq * width, 1]
}

fn three<T>(array: &Array<T>) -> Answer<[usize; 3]> {
    array
        .shape
        .as_slice()
        .try_into()
        .map_err(|_| Stop::Broken(format!("expected three dimensions, found {:?}", array.shape)))
}

fn four<T>(array: &Array<T>) -> Answer<[usize; 4]> {
    array
        .shape
        .as_slice()
        .try_into()
        .map_err(|_| Stop::Broken(format!("expected four dimensions, found {:?}", array.shape)))
}

fn activation(name: &str, params: Option<&Value>) -> Answer<Activation> {
    Ok(match name {
        "silu" => Activation::Silu,
        "relu" => Activation::Relu,
        "gelu_erf" => Activation::GeluErf,
        "gelu_tanh" => Activation::GeluTanh,
        "swiglu_clamped" => {
            let params = params.ok_or_else(|| Stop::Broken("swiglu_clamped without act_params".into()))?;
            Activation::SwigluClamped { alpha: number(params, "alpha")?, limit: number(params, "limit")? }
        }
        other => return Err(Stop::Broken(format!("activation {other}"))),
    })
}
