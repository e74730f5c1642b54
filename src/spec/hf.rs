//! From a Hugging Face `config.json` to the specifications of a model's layers.

mod decoder;
mod encoder;
mod families;
mod fields;
mod logits;
mod rope;
mod sigmoid;
mod softmax;

use super::{Layer, Norm, Rope, WeightFormat};
use crate::element::Dtype;
use crate::error::{Error, Result};
use fields::{Fields, describe};
use serde_json::Value;

/// Families of models that the reader knows, by the `model_type` of their configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `switch_transformers`: Switch Transformers, the encoder.
    Switch,
    /// `nllb-moe`: NLLB-MoE, the encoder.
    NllbMoe,
    /// `mixtral`.
    Mixtral,
    /// `olmoe`.
    Olmoe,
    /// `qwen2_moe`: Qwen1.5-MoE and Qwen2-57B-A14B.
    Qwen2Moe,
    /// `qwen3_moe`.
    Qwen3Moe,
    /// `qwen3_next`: one layer in four; the others are gated delta-nets.
    Qwen3Next,
    /// `deepseek_v2`.
    DeepseekV2,
    /// `deepseek_v3`, and `kimi_k2`, which is the same model with other sizes.
    DeepseekV3,
    /// `gpt_oss`.
    GptOss,
    /// `glm4_moe`: GLM-4.5.
    Glm4Moe,
    /// `llama4_text`, and the `text_config` of `llama4`.
    Llama4,
    /// `phimoe`: Phi-3.5-MoE.
    PhiMoe,
    /// `granitemoe`.
    GraniteMoe,
    /// `dbrx`.
    Dbrx,
    /// `jamba`: the attention layers; the others are Mamba.
    Jamba,
    /// `minimax_m2`.
    MiniMaxM2,
    /// `ernie4_5_moe`.
    Ernie45Moe,
    /// `llama`: dense.
    Llama,
    /// `mistral`: dense.
    Mistral,
}

/// What a model's `config.json` says: facts of the whole model, and each layer as a [`Layer`].
///
/// Both spellings are read: the older one (`torch_dtype`, `rope_theta`, `rope_scaling`) and that of transformers 5
/// (`dtype`, `rope_parameters`). A field that is missing or null has the default of the family's configuration class;
/// where null means "none" there (`sliding_window`, `q_lora_rank`, ...), it does here. A value that is not implemented is
/// an error that names the field, never a default. Fields without meaning for the computation are passed over.
///
/// The layers are those of inference: dropout and jitter are left out. What a configuration cannot know is left to the
/// caller: where a router counts its capacity per row of the batch (Switch), set [`super::Capacity::group_len`] to the length
/// of a row.
///
/// ```
/// let config = gatefold::spec::HfConfig::from_json(r#"{"model_type": "mixtral", "num_hidden_layers": 2}"#)?;
/// assert_eq!((config.num_layers, config.hidden_size), (2, 4096));
/// assert_eq!(config.layer(1)?.attention().num_kv_heads, 8);
/// # Ok::<(), gatefold::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HfConfig {
    /// The family.
    pub family: Family,
    /// Layers; of an encoder-decoder model those of the encoder.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// `max_position_embeddings`, where the family has one.
    pub max_position: Option<usize>,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The output head has a bias.
    pub head_bias: bool,
    /// Factor on the embedded tokens.
    pub embedding_multiplier: f64,
    /// Sinusoidal embeddings of the position are added to the embedded tokens (NLLB-MoE).
    pub sinusoidal_positions: bool,
    /// The logits are divided by this.
    pub logits_scaling: f64,
    /// The norm behind the last layer.
    pub final_norm: Norm,
    /// Element type of the weights, where the configuration says one.
    pub dtype: Option<Dtype>,
    /// How the checkpoint stores its weights (those of the experts: `Mxfp4`). The layers say [`WeightFormat::Float`] all the same:
    /// set [`super::ExpertFfn::weight_format`] to run on stored weights as they are.
    pub weight_format: WeightFormat,
    /// The different layers that occur; of those that are no attention and feed-forward, what they are.
    kinds: Vec<Result<Layer, String>>,
    /// Which of them each layer is.
    layers: Vec<usize>,
    /// The rotary embedding of all layers for sequences beyond so many positions.
    long_rope: Option<(usize, Rope)>,
}

impl HfConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Parse`] naming the field, for text that is not JSON, an unknown `model_type`, a value of the wrong type or
    /// beyond any sane size, one that is not implemented, or sizes that do not fit one another; [`Error::Unsupported`] for a rotary embedding that is no
    /// function of the position alone.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_slice(text.as_bytes())
    }

    /// [`HfConfig::from_json`] of bytes, which need not be UTF-8.
    ///
    /// # Errors
    /// As there.
    pub fn from_slice(bytes: &[u8]) -> Result<Self> {
        let parse = |expected: &str, found: String| Error::Parse {
            source_name: "config.json".into(),
            expected: expected.into(),
            found,
        };
        let value: Value = serde_json::from_slice(bytes).map_err(|e| parse("JSON", e.to_string()))?;
        let map = value.as_object().ok_or_else(|| parse("an object", describe(&value)))?;
        let outer = Fields::new(map, "");
        let inner = if outer.word("model_type")? == Some("llama4") { outer.object("text_config")? } else { None };
        let f = inner.as_ref().unwrap_or(&outer);
        let (family, build) = families::find(f)?;
        let mut config = build(f)?;
        config.family = family;
        config.dtype = match dtype(f)? {
            Some(dtype) => Some(dtype),
            None => dtype(&outer)?,
        };
        config.weight_format = weight_format(f, &outer)?;
        if inner.is_some() && f.get("tie_word_embeddings").is_none() {
            config.tie_word_embeddings = outer.flag("tie_word_embeddings", config.tie_word_embeddings)?;
        }
        families::check_unread(f)?;
        config.final_norm.validate()?;
        for (kind, layer) in config.kinds.iter().enumerate() {
            let Ok(layer) = layer else { continue };
            let n = config.layers.iter().position(|k| *k == kind).unwrap_or_default();
            layer.validate().map_err(|e| in_layer(n, e))?;
            config.layer_with_long_rope(layer).validate().map_err(|e| in_layer(n, e))?;
        }
        Ok(config)
    }

    /// Layer `n`, for sequences within the context length of training (this matters to longrope alone).
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming a layer that is neither attention nor feed-forward (Mamba, delta-net), or that attends
    /// to another sequence (`n` from `num_layers` on: the decoder of an encoder-decoder model). [`Error::Value`] beyond the last.
    pub fn layer(&self, n: usize) -> Result<Layer> {
        match self.layers.get(n).map(|kind| &self.kinds[*kind]) {
            Some(Ok(layer)) => Ok(layer.clone()),
            Some(Err(what)) => Err(Error::unsupported("the layer specification", format!("layer {n}: {what}"))),
            None => Err(Error::value("layer", format!("below {}", self.layers.len()), n)),
        }
    }

    /// Layer `n` for sequences of `seq_len` positions: beyond the context length of training, longrope takes its long
    /// factors for all positions.
    ///
    /// # Errors
    /// Those of [`HfConfig::layer`].
    pub fn layer_for(&self, n: usize, seq_len: usize) -> Result<Layer> {
        let layer = self.layer(n)?;
        let is_long = self.long_rope.as_ref().is_some_and(|(original, _)| seq_len > *original);
        Ok(if is_long { self.layer_with_long_rope(&layer) } else { layer })
    }

    fn layer_with_long_rope(&self, layer: &Layer) -> Layer {
        let mut layer = layer.clone();
        if let (Some((_, long)), super::AttentionBlock::Gqa(block)) = (&self.long_rope, &mut layer.attention)
            && block.rope.is_some()
        {
            block.rope = Some(long.clone());
        }
        layer
    }
}

/// What [`Layer::validate`] says, as an error of the configuration.
fn in_layer(n: usize, error: Error) -> Error {
    let (argument, expected, found) = match error {
        Error::Value { argument, expected, found } => (argument, expected, found),
        Error::Len { argument, expected, found } => (argument, format!("{expected} values"), found.to_string()),
        other => return other,
    };
    Error::Parse { source_name: format!("config.json, layer {n}, `{argument}`"), expected, found }
}

/// `dtype`, or `torch_dtype` in the older spelling.
fn dtype(f: &Fields) -> Result<Option<Dtype>> {
    let (new, old) = (f.word("dtype")?, f.word("torch_dtype")?);
    let name = if new.is_some() { "dtype" } else { "torch_dtype" };
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(f.error("torch_dtype", format!("\"{new}\" as in `dtype`"), format!("\"{old}\"")));
    }
    match new.or(old) {
        None => Ok(None),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some("bfloat16") => Ok(Some(Dtype::BF16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some(other) => Err(f.error(name, fields::one_of(&["float32", "bfloat16", "float16"]), describe(&other.into()))),
    }
}

/// How the checkpoint stores its weights, from the model's `quantization_config` or that of what surrounds it.
fn weight_format(f: &Fields, outer: &Fields) -> Result<WeightFormat> {
    let Some(q) = f.object("quantization_config")?.or(outer.object("quantization_config")?) else {
        return Ok(WeightFormat::Float);
    };
    match q.word("quant_method")? {
        Some("mxfp4") => Ok(WeightFormat::Mxfp4),
        Some("fp8") => {
            q.expect_word("fmt", &["e4m3", "float8_e4m3fn"])?;
            match q.numbers("weight_block_size", 2)? {
                Some(block) if block == [128.0, 128.0] => Ok(WeightFormat::Fp8Block),
                Some(block) => Err(q.error("weight_block_size", "[128, 128]", format!("{block:?}"))),
                None => Err(q.error("weight_block_size", "[128, 128]", "nothing")),
            }
        }
        Some(other) => Err(q.error("quant_method", "\"mxfp4\" or \"fp8\"", describe(&other.into()))),
        None => Err(q.error("quant_method", "\"mxfp4\" or \"fp8\"", "nothing")),
    }
}
