//! What Gemma 2 and 3 compute otherwise than the other families, and where their files say it.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::json::{Rope, present};
use super::{Family, LARGEST, ModelConfig};
use crate::generation_defaults::one_or_many;
use crate::gguf::Gguf;
use crate::load_error::LoadError;

/// Base of the frequencies of Gemma 3's layers with a window, where a file does not say it. llama.cpp's files never do.
const LOCAL_ROPE_THETA: f64 = 10_000.0;

/// Norms behind attention and feed-forward part, too, before they are added to the residual stream; embeddings scaled; GELU in the place of
/// SiLU; layers that see all positions, and layers that see a window.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemma {
    /// By layer: whether it sees all positions. The others see as many as [`ModelConfig::sliding_window`].
    pub full_attention: Vec<bool>,
    /// Base of the rotary frequencies of layers with a window, which are not stretched; without it they rotate as all others do.
    pub local_rope_theta: Option<f64>,
    /// Scores are divided by the root of it.
    pub query_scalar: f64,
    /// Scores become `cap * tanh(score / cap)`.
    pub attention_cap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
}

impl Gemma {
    /// Every `period`th layer sees all positions.
    fn every(period: usize, layers: usize) -> Vec<bool> {
        // A model of more is refused afterwards, and needs no list.
        (1..=layers.min(LARGEST)).map(|layer| period > 0 && layer.is_multiple_of(period)).collect()
    }

    /// Refuses what contradicts itself.
    pub(super) fn check(&self, config: &ModelConfig, path: &Path) -> Result<(), LoadError> {
        let invalid = |field: &str, detail: String| Err(LoadError::invalid(path, field, detail));
        if self.full_attention.len() != config.layers {
            let detail = format!("names {} layers, the model has {}", self.full_attention.len(), config.layers);
            return invalid("layer_types", detail);
        }
        if config.sliding_window.is_none() && self.full_attention.contains(&false) {
            return invalid("sliding_window", "is missing, but there are layers with a window".to_owned());
        }
        let positive = [
            ("query_pre_attn_scalar", Some(self.query_scalar)),
            ("rope_local_base_freq", self.local_rope_theta),
            ("attn_logit_softcapping", self.attention_cap.map(f64::from)),
            ("final_logit_softcapping", self.logit_cap.map(f64::from)),
        ];
        for (name, value) in positive {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                return invalid(name, format!("is {value}, it must be above 0"));
            }
        }
        Ok(())
    }

    /// From the metadata of a GGUF file. What it leaves out is what llama.cpp takes.
    pub(super) fn of_gguf(gguf: &Gguf, architecture: &str, family: Family, config: &ModelConfig) -> Result<Self, LoadError> {
        let number = |name: &str| gguf.number(&format!("{architecture}.{name}"));
        let cap = |value: Option<f64>| value.filter(|cap| *cap != 0.0).map(|cap| cap as f32);
        let is_second = family == Family::Gemma2;
        let period = gguf.integer(&format!("{architecture}.attention.sliding_window_pattern"))?;
        // The largest of each, told by its layers, divides by the root of the width of a head that all heads together would have.
        let is_largest = config.layers == if is_second { 46 } else { 62 };
        let usual = if is_largest { config.hidden / config.heads } else { config.head_dim };
        let (attention_cap, logit_cap) = if is_second { (Some(50.0), Some(30.0)) } else { (None, None) };
        Ok(Self {
            full_attention: Self::every(period.unwrap_or(if is_second { 2 } else { 6 }), config.layers),
            local_rope_theta: match is_second {
                true => None,
                false => Some(number("rope.freq_base_swa")?.unwrap_or(LOCAL_ROPE_THETA)),
            },
            query_scalar: match number("attention.scale")?.filter(|scale| *scale != 0.0) {
                Some(scale) => 1.0 / (scale * scale),
                None => usual as f64,
            },
            attention_cap: cap(number("attn_logit_softcapping")?.or(attention_cap)),
            logit_cap: cap(number("final_logit_softcapping")?.or(logit_cap)),
        })
    }
}

/// `config.json`; what it leaves out has the default of transformers' `Gemma2Config` or `Gemma3TextConfig`.
#[derive(Deserialize)]
pub(super) struct Fields {
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<Rope>,
    /// Where transformers 5 has all three.
    rope_parameters: Option<LayerRopes>,
    /// Left out is not the same as null.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    /// Which layer sees all positions; transformers 5 has the first name, or says it of each layer.
    #[serde(rename = "_sliding_window_pattern")]
    pattern: Option<usize>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    attn_logit_softcapping: Option<Option<f64>>,
    #[serde(default, deserialize_with = "present")]
    final_logit_softcapping: Option<Option<f64>>,
    hidden_activation: Option<String>,
    quantization_config: Option<Value>,
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
}

/// The rotation of each type of layers, or one for all.
#[derive(Deserialize)]
struct LayerRopes {
    full_attention: Option<Rope>,
    sliding_attention: Option<Rope>,
    #[serde(flatten)]
    all: Rope,
}

impl Fields {
    /// Whether weights are stored in a way that is not read.
    pub fn is_quantised(&self) -> bool {
        self.quantization_config.is_some()
    }

    pub fn config(&self, path: &Path, family: Family) -> Result<ModelConfig, LoadError> {
        let unsupported = |field: &str, found: String, instead: &str| Err(LoadError::unsupported(path, field, found, instead));
        if self.quantization_config.is_some() {
            let instead = "use the unquantised model, or a GGUF file of it";
            return unsupported("quantization_config", "a quantised safetensors model".to_owned(), instead);
        }
        if let Some(name) = self.hidden_activation.as_deref().filter(|&name| name != "gelu_pytorch_tanh") {
            return unsupported("hidden_activation", format!("\"{name}\""), "models use \"gelu_pytorch_tanh\"");
        }
        let is_second = family == Family::Gemma2;
        let layers = self.num_hidden_layers.unwrap_or(26);
        let (rope, local_rope_theta) = self.rotations(path, is_second)?;
        let max_positions = rope.positions(self.max_position_embeddings.unwrap_or(if is_second { 8192 } else { 131_072 }));
        let cap = |value: Option<Option<f64>>, default: f64| match value {
            None => is_second.then_some(default as f32),
            Some(value) => value.map(|cap| cap as f32),
        };
        let bias = self.attention_bias.unwrap_or(false);
        Ok(ModelConfig {
            family,
            hidden: self.hidden_size.unwrap_or(2304),
            intermediate: self.intermediate_size.unwrap_or(9216),
            experts: None,
            layers,
            heads: self.num_attention_heads.unwrap_or(8),
            kv_heads: self.num_key_value_heads.unwrap_or(4),
            head_dim: self.head_dim.unwrap_or(256),
            vocabulary: self.vocab_size.unwrap_or(if is_second { 256_000 } else { 262_208 }),
            max_positions,
            rms_eps: self.rms_norm_eps.unwrap_or(1e-6) as f32,
            layer_norm: false,
            clip_qkv: None,
            alibi: None,
            softmax_scale: None,
            gated: true,
            rope_theta: rope.theta().or(self.rope_theta).unwrap_or(if is_second { 10_000.0 } else { 1_000_000.0 }),
            rope_scaling: rope.scaling(path, max_positions)?,
            sliding_window: self.sliding_window.unwrap_or(Some(4096)),
            tied_embeddings: self.tie_word_embeddings.unwrap_or(true),
            qkv_bias: bias,
            output_bias: bias,
            mlp_bias: false,
            qk_norm: !is_second,
            gemma: Some(Gemma {
                full_attention: self.full_attention(path, is_second, layers)?,
                local_rope_theta,
                query_scalar: self.query_pre_attn_scalar.unwrap_or(256.0),
                attention_cap: cap(self.attn_logit_softcapping, 50.0),
                logit_cap: cap(self.final_logit_softcapping, 30.0),
            }),
        })
    }

    /// The rotation of layers that see all positions, and the base of those with a window where it is another.
    fn rotations(&self, path: &Path, is_second: bool) -> Result<(Rope, Option<f64>), LoadError> {
        let scaling = self.rope_scaling.as_ref();
        let LayerRopes { full_attention: full, sliding_attention: local, all } = match &self.rope_parameters {
            Some(ropes) => ropes,
            None => &LayerRopes { full_attention: None, sliding_attention: None, all: Rope::default() },
        };
        let given = self.rope_parameters.is_some();
        if is_second {
            if full.is_some() || local.is_some() {
                let (found, instead) = ("a rotation for each type of layers", "Gemma 2 has one for all layers");
                return Err(LoadError::unsupported(path, "rope_parameters", found, instead));
            }
            return Ok((Rope::of(path, given.then_some(all), scaling)?, None));
        }
        if given && (full.is_none() || local.is_none() || *all != Rope::default()) {
            let detail = "must have a full_attention and a sliding_attention, and nothing beside them; fetch the file again";
            return Err(LoadError::invalid(path, "rope_parameters", detail));
        }
        if let Some(local) = local.as_ref().filter(|local| !local.is_plain()) {
            let found = local.kind().unwrap_or_default();
            let instead = "layers with a window have the default rotation";
            return Err(LoadError::unsupported(path, "rope_parameters.sliding_attention", format!("\"{found}\""), instead));
        }
        let base = local.as_ref().and_then(Rope::theta).or(self.rope_local_base_freq).unwrap_or(LOCAL_ROPE_THETA);
        Ok((Rope::of(path, full.as_ref(), scaling)?, Some(base)))
    }

    /// By layer: whether it sees all positions.
    fn full_attention(&self, path: &Path, is_second: bool, layers: usize) -> Result<Vec<bool>, LoadError> {
        let Some(types) = &self.layer_types else {
            let pattern = if is_second { None } else { self.pattern.or(self.sliding_window_pattern) };
            return Ok(Gemma::every(pattern.unwrap_or(if is_second { 2 } else { 6 }), layers));
        };
        let full = types.iter().map(|name| match name.as_str() {
            "full_attention" => Ok(true),
            "sliding_attention" => Ok(false),
            other => {
                let instead = "layers of full_attention or of sliding_attention are";
                Err(LoadError::unsupported(path, "layer_types", format!("\"{other}\""), instead))
            }
        });
        full.collect()
    }
}
