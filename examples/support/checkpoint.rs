//! Directories in the Hugging Face format: `config.json` and safetensors, sharded or not; from tensor names to the weights of
//! a layer, and from token ids through layers 0 to N.

use super::array::Array;
use super::backend::{Backend, FfnArrays, MoeArrays};
use super::layer::{AttentionWeights, LayerWeights, NormWeights, Options, PackedLayer, Projection, Rows, run};
use super::measure::relative_error;
use super::tensors::{Tensor, Tensors};
use gatefold::Element;
use gatefold::spec::{AttentionBlock, HfConfig, Layer, Mlp, Moe};
use std::path::{Path, PathBuf};

/// A model on disk.
pub struct Checkpoint {
    pub config: HfConfig,
    weights: Tensors,
    directory: PathBuf,
}

/// Positions that a file may name: angles are tabulated up to the largest.
pub const MAX_POSITIONS: usize = 1 << 20;

/// Where a hidden state was compared.
#[derive(Clone, Debug)]
pub struct Compared {
    /// `one`, `long`, `batch`.
    pub case: String,
    pub layer: usize,
    pub tokens: usize,
    /// `max |a - b| / max(1, max |b|)` against the stored f64 truth.
    pub error: f64,
}

impl Checkpoint {
    /// Reads configuration and weights. `expected.safetensors` is not part of the model.
    ///
    /// # Errors
    /// Text that names the file and what is wrong with it.
    pub fn read(directory: &Path) -> Result<Checkpoint, String> {
        let path = directory.join("config.json");
        let text = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let config = HfConfig::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        let index = directory.join("model.safetensors.index.json");
        let weights = if index.exists() {
            Self::read_shards(directory, &index)?
        } else {
            Tensors::read(&directory.join("model.safetensors"))?
        };
        Ok(Checkpoint { config, weights, directory: directory.to_path_buf() })
    }

    fn read_shards(directory: &Path, index: &Path) -> Result<Tensors, String> {
        let broken = |what: String| format!("{}: {what}", index.display());
        let text = std::fs::read(index).map_err(|e| broken(e.to_string()))?;
        let json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| broken(e.to_string()))?;
        let map = json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| broken("no weight_map".into()))?;
        let mut files: Vec<&str> = map.values().filter_map(|f| f.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        let mut all = Tensors::default();
        for file in files {
            if Path::new(file).components().count() != 1 || file.starts_with('.') {
                return Err(broken(format!("{file} is not a file name")));
            }
            all.tensors.extend(Tensors::read(&directory.join(file))?.tensors);
        }
        match map.keys().find(|name| all.get(name).is_none()) {
            Some(name) => Err(broken(format!("tensor {name} is in none of the files"))),
            None => Ok(all),
        }
    }

    /// The first of these tensors that is there.
    fn first(&self, names: &[String]) -> Result<&Tensor, String> {
        names
            .iter()
            .find_map(|n| self.weights.get(n))
            .ok_or_else(|| format!("there is no tensor {}", names.join(" or ")))
    }

    fn vector(&self, name: &str) -> Option<Vec<f64>> {
        self.weights.get(name).map(|t| t.cast::<f64>().data)
    }

    fn projection<W: Element>(&self, name: &str) -> Result<Projection<W>, String> {
        let weight = self.weights.need(&format!("{name}.weight"))?.cast();
        Ok(Projection { weight, bias: self.vector(&format!("{name}.bias")) })
    }

    fn norm(&self, names: &[String]) -> NormWeights {
        let found = |what: &str| names.iter().find_map(|n| self.vector(&format!("{n}.{what}")));
        NormWeights { weight: found("weight"), bias: found("bias") }
    }

    /// One block from three (or two) linear layers.
    fn block<W: Element>(&self, name: &str, gated: bool) -> Result<FfnArrays<W>, String> {
        let part = |names: [&str; 2]| self.first(&names.map(|n| format!("{name}.{n}.weight"))).map(Tensor::cast);
        let bias = |names: [&str; 2]| {
            names.iter().find_map(|n| self.weights.get(&format!("{name}.{n}.bias"))).map(Tensor::cast)
        };
        Ok(FfnArrays {
            gate: if gated { Some(part(["gate_proj", "w1"])?) } else { None },
            up: part(["up_proj", "w3"])?,
            down: part(["down_proj", "w2"])?,
            gate_bias: bias(["gate_proj", "w1"]),
            up_bias: bias(["up_proj", "w3"]),
            down_bias: bias(["down_proj", "w2"]),
        })
    }

    /// Experts that are stored one by one.
    fn separate_experts<W: Element>(&self, name: &str, moe: &Moe) -> Result<FfnArrays<W>, String> {
        let mut all: Vec<FfnArrays<W>> = Vec::new();
        for e in 0..moe.router.num_experts {
            all.push(self.block(&format!("{name}.experts.{e}"), moe.experts.ffn.gated)?);
        }
        let ffn = &moe.experts.ffn;
        let (inter, hidden) = (ffn.intermediate_size, ffn.hidden_size);
        let stack = |part: &dyn Fn(&FfnArrays<W>) -> Array<W>, rows: usize, cols: usize| {
            let mut data = Vec::with_capacity(all.len() * rows * cols);
            for block in &all {
                let matrix = part(block);
                if matrix.shape != [rows, cols] {
                    return Err(format!("{name}.experts: a matrix is {:?}, expected {:?}", matrix.shape, [rows, cols]));
                }
                data.extend_from_slice(&matrix.data);
            }
            Ok(Array::new(data, &[all.len(), rows, cols]))
        };
        let gate = |b: &FfnArrays<W>| b.gate.clone().unwrap_or_default();
        Ok(FfnArrays {
            gate: if ffn.gated { Some(stack(&gate, inter, hidden)?) } else { None },
            up: stack(&|b| b.up.clone(), inter, hidden)?,
            down: stack(&|b| b.down.clone(), hidden, inter)?,
            ..FfnArrays::default()
        })
    }

    /// Experts in one tensor `[experts, in, 2 * inter]`, gate in the even and up in the odd columns (gpt-oss).
    fn stacked_experts<W: Element>(&self, name: &str) -> Result<FfnArrays<W>, String> {
        let both: Array<W> = self.weights.need(&format!("{name}.gate_up_proj"))?.cast();
        let down: Array<W> = self.weights.need(&format!("{name}.down_proj"))?.cast();
        let both_bias: Array<f64> = self.weights.need(&format!("{name}.gate_up_proj_bias"))?.cast();
        let down_bias: Array<f64> = self.weights.need(&format!("{name}.down_proj_bias"))?.cast();
        let shapes = (both.shape.as_slice(), both_bias.shape.as_slice(), down.shape.len());
        let fits =
            matches!(shapes, ([e, _, cols], [experts, width], 3) if e == experts && cols == width && cols % 2 == 0);
        if !fits {
            let found = [&both.shape, &both_bias.shape, &down.shape];
            return Err(format!(
                "{name}: gate_up_proj, its bias and down_proj are {found:?}, which is no set of experts"
            ));
        }
        let every_second = |start: usize| {
            let [experts, _, _]: [usize; 3] = [both.shape[0], both.shape[1], both.shape[2]];
            let data = both_bias.data.iter().skip(start).step_by(2).copied().collect();
            (transposed(&both, start, 2), Array::new(data, &[experts, both.shape[2] / 2]))
        };
        let ((gate, gate_bias), (up, up_bias)) = (every_second(0), every_second(1));
        Ok(FfnArrays {
            gate: Some(gate),
            up,
            down: transposed(&down, 0, 1),
            gate_bias: Some(gate_bias),
            up_bias: Some(up_bias),
            down_bias: Some(down_bias),
        })
    }

    fn mixture<W: Element>(&self, layer: &str, moe: &Moe) -> Result<MoeArrays<W>, String> {
        let name = ["block_sparse_moe", "mlp", "feed_forward"]
            .map(|part| format!("{layer}.{part}"))
            .into_iter()
            .find(|name| ["gate", "router"].iter().any(|g| self.weights.get(&format!("{name}.{g}.weight")).is_some()))
            .ok_or_else(|| format!("{layer} has no router"))?;
        let router = ["gate", "router"].map(|g| format!("{name}.{g}"));
        let biases = |parts: [String; 3]| parts.iter().find_map(|p| self.vector(p));
        let experts = if self.weights.get(&format!("{name}.experts.gate_up_proj")).is_some() {
            self.stacked_experts(&format!("{name}.experts"))?
        } else {
            self.separate_experts(&name, moe)?
        };
        let shared = match moe.shared {
            None => None,
            Some(s) => {
                let names = ["shared_expert", "shared_experts"].map(|p| format!("{name}.{p}"));
                let here = names.iter().find(|n| self.weights.get(&format!("{n}.up_proj.weight")).is_some());
                Some(self.block(here.unwrap_or(&names[0]), s.ffn.gated)?)
            }
        };
        let gate = self.weights.get(&format!("{name}.shared_expert_gate.weight")).map(Tensor::cast);
        Ok(MoeArrays {
            router: self.first(&router.clone().map(|r| format!("{r}.weight")))?.cast(),
            router_bias: router.iter().find_map(|r| self.vector(&format!("{r}.bias"))),
            selection_bias: biases([
                format!("{name}.gate.e_score_correction_bias"),
                format!("{name}.e_score_correction_bias"),
                format!("{name}.moe_statics.e_score_correction_bias"),
            ]),
            experts,
            shared,
            shared_gate: gate,
        })
    }

    /// The weights of a layer, in the names of published decoder checkpoints.
    ///
    /// # Errors
    /// Text that names the tensor that is missing.
    pub fn layer<W: Element>(&self, n: usize, spec: &Layer) -> Result<LayerWeights<W>, String> {
        let layer = format!("model.layers.{n}");
        let name = format!("{layer}.self_attn");
        let proj = |part: &str| self.projection(&format!("{name}.{part}"));
        let vector = |part: &str| self.vector(&format!("{name}.{part}"));
        let attention = match &spec.attention {
            AttentionBlock::Mla(block) => {
                let m = &block.mla;
                let compressed = m.q_lora_rank.is_some();
                let kv_b: Array<W> = self.weights.need(&format!("{name}.kv_b_proj.weight"))?.cast();
                let shape = [m.num_heads, m.nope_dim + m.value_dim, m.kv_lora_rank];
                if kv_b.data.len() != shape.iter().product::<usize>() {
                    return Err(format!("{name}.kv_b_proj.weight is {:?}, expected {shape:?}", kv_b.shape));
                }
                AttentionWeights {
                    q: proj(if compressed { "q_b_proj" } else { "q_proj" })?,
                    q_a: if compressed { Some(proj("q_a_proj")?) } else { None },
                    q_a_norm: vector("q_a_layernorm.weight"),
                    kv_a: Some(proj("kv_a_proj_with_mqa")?),
                    kv_a_norm: vector("kv_a_layernorm.weight"),
                    kv_b: Some(kv_b.reshape(&shape)),
                    out: proj("o_proj")?,
                    ..AttentionWeights::default()
                }
            }
            _ => AttentionWeights {
                q: proj("q_proj")?,
                k: proj("k_proj")?,
                v: proj("v_proj")?,
                out: proj("o_proj")?,
                q_norm: vector("q_norm.weight"),
                k_norm: vector("k_norm.weight"),
                sinks: vector("sinks"),
                ..AttentionWeights::default()
            },
        };
        let mut weights = LayerWeights {
            attn_norm: self.norm(&[format!("{layer}.input_layernorm")]),
            mlp_norm: self.norm(&[format!("{layer}.post_attention_layernorm")]),
            attention,
            ..LayerWeights::default()
        };
        match &spec.mlp {
            Mlp::Moe(moe) => weights.moe = Some(self.mixture(&layer, moe)?),
            Mlp::Dense(ffn) => weights.mlp = Some(self.block(&format!("{layer}.mlp"), ffn.gated)?),
            _ => return Err(format!("{layer} has a feed-forward part that is not read here")),
        }
        Ok(weights)
    }

    /// Embeds the recorded ids, runs layers 0 to `last` one at a time, and compares every hidden state that is recorded.
    ///
    /// # Errors
    /// Text that names what is missing, or the backend's error.
    pub fn compare<B: Backend>(&self, b: &mut B, last: usize) -> Result<Vec<Compared>, String> {
        if last >= self.config.num_layers {
            return Err(format!("layer {last}: expected below {}, the model's layers", self.config.num_layers));
        }
        let expected = Tensors::read(&self.directory.join("expected.safetensors"))?;
        let table: Array<f64> = self.weights.need("model.embed_tokens.weight")?.cast();
        let mut compared = Vec::new();
        let mut cases = Vec::new();
        for case in ["one", "long", "batch"] {
            if let Some(ids) = expected.get(&format!("{case}.input_ids")) {
                let mask = expected.need(&format!("{case}.attention_mask"))?.bools();
                let positions = expected.need(&format!("{case}.position_ids"))?.ints();
                let state = State::new(&ids.ints(), &mask, &positions, &table, self.config.embedding_multiplier)?;
                cases.push((case, state));
            }
        }
        for n in 0..=last {
            let spec = self.config.layer(n).map_err(|e| e.to_string())?;
            let weights = self.layer::<f32>(n, &spec)?;
            let longest = cases.iter().map(|(_, s)| s.longest()).max().unwrap_or(1);
            let packed = PackedLayer::pack(b, &spec, &weights, longest).map_err(|e| e.to_string())?;
            for (case, state) in &mut cases {
                let x = state.hidden.cast::<B::A>();
                let mut cache = packed.cache(state.rows.cu_seqlens.len() - 1, longest);
                let trace =
                    run(b, &packed, &x, &state.rows, &mut cache, &Options::default()).map_err(|e| e.to_string())?;
                state.hidden = trace.out.cast();
                if let Some(truth) = expected.get(&format!("{case}.hidden.{n}.f64")) {
                    let truth = truth.cast::<f64>();
                    let ([rows, width], last) = (truth.rows().shape(), state.places.last().map_or(0, |p| p + 1));
                    if width != state.hidden.rows().shape()[1] || rows < last {
                        return Err(format!(
                            "{case}.hidden.{n}.f64 is {:?}, which are not the hidden states",
                            truth.shape
                        ));
                    }
                    let error = relative_error(&state.hidden.data, &truth.pick(&state.places).data);
                    compared.push(Compared { case: (*case).into(), layer: n, tokens: state.places.len(), error });
                }
            }
        }
        Ok(compared)
    }
}

/// The real tokens of a padded batch, one sequence behind the other.
struct State {
    rows: Rows,
    hidden: Array<f64>,
    /// Row of each token in the padded batch.
    places: Vec<usize>,
}

impl State {
    fn new(
        ids: &Array<i64>,
        mask: &[u8],
        positions: &Array<i64>,
        table: &Array<f64>,
        multiplier: f64,
    ) -> Result<State, String> {
        let [batch, seq]: [usize; 2] =
            ids.shape.as_slice().try_into().map_err(|_| "input_ids has not two dimensions".to_string())?;
        let [vocab, width] = table.rows().shape();
        if mask.len() != batch * seq || positions.data.len() != batch * seq {
            return Err("attention_mask and position_ids have not the shape of input_ids".into());
        }
        let mut rows = Rows { cu_seqlens: vec![0], ..Rows::default() };
        let (mut places, mut data) = (Vec::new(), Vec::new());
        for b in 0..batch {
            for place in (b * seq..(b + 1) * seq).filter(|p| mask[*p] != 0) {
                let id = ids.data[place];
                let row = usize::try_from(id).ok().filter(|id| *id < vocab);
                let row = row.ok_or_else(|| format!("token id {id}: expected below {vocab}"))?;
                data.extend(table.data[row * width..(row + 1) * width].iter().map(|x| x * multiplier));
                let position = positions.data[place];
                let position = u32::try_from(position).ok().filter(|p| (*p as usize) < MAX_POSITIONS);
                rows.positions.push(position.ok_or_else(|| "a position is out of range".to_string())?);
                places.push(place);
            }
            rows.cu_seqlens.push(places.len() as u32);
        }
        Ok(State { hidden: Array::new(data, &[places.len(), width]), rows, places })
    }

    fn longest(&self) -> usize {
        let lens = self.rows.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize);
        let positions = self.rows.positions.iter().map(|p| *p as usize + 1);
        lens.chain(positions).max().unwrap_or(1)
    }
}

/// `[experts, in, out]` to `[experts, out / step, in]`, taking every `step`-th column from `start`.
fn transposed<W: Element>(x: &Array<W>, start: usize, step: usize) -> Array<W> {
    let [experts, rows, cols]: [usize; 3] = [x.shape[0], x.shape[1], x.shape[2]];
    let mut data = Vec::with_capacity(x.data.len() / step);
    for e in 0..experts {
        for c in (start..cols).step_by(step) {
            data.extend((0..rows).map(|r| x.data[(e * rows + r) * cols + c]));
        }
    }
    Array::new(data, &[experts, cols / step, rows])
}
