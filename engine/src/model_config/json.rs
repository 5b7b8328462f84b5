//! Configurations from `config.json`.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::yarn::{BETAS, Yarn};
use super::{ExpertConfig, Family, ModelConfig, RopeScaling, SUPPORTED_FAMILIES, dbrx, gemma, mpt, refused};
use crate::generation_defaults::one_or_many;
use crate::load_error::LoadError;

/// `config.json` as transformers writes it; what a family leaves out has that family's default.
#[derive(Deserialize)]
struct Fields {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    /// Where transformers 5 puts `rope_theta` and `rope_scaling`.
    rope_parameters: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    /// Left out is not the same as null.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    use_sliding_window: Option<bool>,
    /// The first layer with a window, of families that have one on some.
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    /// Whether q, k and v have biases in Qwen2-MoE.
    qkv_bias: Option<bool>,
    num_experts: Option<usize>,
    /// Mixtral's name for it.
    num_local_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    norm_topk_prob: Option<bool>,
    moe_intermediate_size: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    decoder_sparse_step: Option<usize>,
    mlp_only_layers: Option<Vec<usize>>,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
    #[serde(default, deserialize_with = "one_or_many")]
    eos_token_id: Vec<u32>,
}

/// How positions rotate queries and keys.
#[derive(Clone, Default, PartialEq, Deserialize)]
pub(super) struct Rope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// Its name before transformers 4.43, whose files have both.
    #[serde(rename = "type")]
    kind: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
    /// Families with two kinds of layers have one of these for each.
    full_attention: Option<Value>,
    sliding_attention: Option<Value>,
}

/// That a field is there, be it null.
pub(super) fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl ModelConfig {
    /// Reads `config.json`; also gives the end-of-turn tokens that it names.
    pub(crate) fn from_json(path: &Path) -> Result<(Self, Vec<u32>), LoadError> {
        let text = std::fs::read(path).map_err(|error| LoadError::io(path, error))?;
        // Checked first, because another family's file may lack the fields below.
        let family = family(path, &text)?;
        let all: Map<String, Value> = parsed(path, &text)?;
        refused::in_json(path, family, &all)?;
        let (config, ends) = match family {
            Family::Dbrx => {
                let fields: dbrx::Fields = parsed(path, &text)?;
                (fields.config(path)?, fields.eos_token_id)
            }
            Family::Mpt => {
                let fields: mpt::Fields = parsed(path, &text)?;
                (fields.config(path)?, fields.eos_token_id)
            }
            Family::Gemma2 | Family::Gemma3 => gemma(path, family, &text, &all)?,
            _ => {
                let fields: Fields = parsed(path, &text)?;
                (fields.config(path, family)?, fields.eos_token_id)
            }
        };
        config.check(path)?;
        Ok((config, ends))
    }
}

fn parsed<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(text)
        .map_err(|error| LoadError::invalid(path, "configuration", format!("{error}; fetch the file again")))
}

/// Gemma 3 with a part that sees images has the decoder's fields inside; that part is not served.
fn gemma(path: &Path, family: Family, text: &[u8], all: &Map<String, Value>) -> Result<(ModelConfig, Vec<u32>), LoadError> {
    let outer: gemma::Fields = parsed(path, text)?;
    let Some(inner) = all.get("text_config") else { return Ok((outer.config(path, family)?, outer.eos_token_id)) };
    if outer.is_quantised() {
        return outer.config(path, family).map(|config| (config, Vec::new()));
    }
    refused::in_json(path, family, &parsed(path, inner.to_string().as_bytes())?)?;
    let fields: gemma::Fields = parsed(path, inner.to_string().as_bytes())?;
    let ends = if outer.eos_token_id.is_empty() { fields.eos_token_id.clone() } else { outer.eos_token_id };
    Ok((fields.config(path, family)?, ends))
}

fn family(path: &Path, text: &[u8]) -> Result<Family, LoadError> {
    #[derive(Deserialize)]
    struct Names {
        architectures: Option<Vec<String>>,
        model_type: Option<String>,
    }
    let names: Names = parsed(path, text)?;
    let architecture = names.architectures.unwrap_or_default().into_iter().next();
    let (field, name) = match (architecture, names.model_type) {
        (Some(name), _) => ("architectures", name),
        (None, Some(name)) => ("model_type", name),
        (None, None) => return Err(LoadError::invalid(path, "architectures", "missing; this is no model's config.json")),
    };
    Ok(match name.as_str() {
        "LlamaForCausalLM" | "LlamaModel" | "llama" => Family::Llama,
        "MistralForCausalLM" | "MistralModel" | "mistral" => Family::Mistral,
        "Qwen2ForCausalLM" | "Qwen2Model" | "qwen2" => Family::Qwen2,
        "Qwen3ForCausalLM" | "Qwen3Model" | "qwen3" => Family::Qwen3,
        "MixtralForCausalLM" | "MixtralModel" | "mixtral" => Family::Mixtral,
        "Qwen2MoeForCausalLM" | "Qwen2MoeModel" | "qwen2_moe" => Family::Qwen2Moe,
        "Qwen3MoeForCausalLM" | "Qwen3MoeModel" | "qwen3_moe" => Family::Qwen3Moe,
        "DbrxForCausalLM" | "dbrx" => Family::Dbrx,
        "Gemma2ForCausalLM" | "Gemma2Model" | "gemma2" => Family::Gemma2,
        "Gemma3ForCausalLM" | "Gemma3TextModel" | "gemma3_text" => Family::Gemma3,
        "Gemma3ForConditionalGeneration" | "Gemma3Model" | "gemma3" => Family::Gemma3,
        "MptForCausalLM" | "MPTForCausalLM" | "mpt" => Family::Mpt,
        _ => return Err(LoadError::unsupported(path, field, format!("\"{name}\""), SUPPORTED_FAMILIES)),
    })
}

impl Fields {
    fn config(&self, path: &Path, family: Family) -> Result<ModelConfig, LoadError> {
        if self.quantization_config.is_some() {
            let instead = "use the unquantised model, or a GGUF file of it";
            return Err(LoadError::unsupported(path, "quantization_config", "a quantised safetensors model", instead));
        }
        if let Some(activation) = self.hidden_act.as_deref().filter(|&name| name != "silu") {
            return Err(LoadError::unsupported(path, "hidden_act", format!("\"{activation}\""), "models use \"silu\""));
        }
        if self.num_attention_heads == 0 {
            return Err(LoadError::invalid(path, "num_attention_heads", "is 0"));
        }
        // What a file leaves out is the default of the family's configuration class in transformers.
        let (theta, positions, eps) = match family {
            Family::Llama => (10_000.0, 2048, 1e-6),
            Family::Mistral => (10_000.0, 4096 * 32, 1e-6),
            Family::Mixtral => (1_000_000.0, 4096 * 32, 1e-5),
            _ => (10_000.0, 32_768, 1e-6),
        };
        let shared_out = self.hidden_size / self.num_attention_heads;
        let (default_head_dim, default_kv_heads) = match family {
            Family::Qwen3 => (128, 32),
            Family::Mistral | Family::Mixtral => (shared_out, 8),
            Family::Qwen2Moe => (shared_out, 16),
            Family::Qwen3Moe => (shared_out, 4),
            _ => (shared_out, self.num_attention_heads),
        };
        let is_qwen2 = matches!(family, Family::Qwen2 | Family::Qwen2Moe);
        let experts = self.experts(path, family)?;
        let rope = Rope::of(path, self.rope_parameters.as_ref(), self.rope_scaling.as_ref())?;
        let rotated = rope.partial_rotary_factor.or(self.partial_rotary_factor).unwrap_or(1.0);
        if rotated != 1.0 {
            return Err(LoadError::unsupported(path, "partial_rotary_factor", rotated.to_string(), "only 1 is"));
        }
        let max_positions = rope.positions(self.max_position_embeddings.unwrap_or(positions));
        Ok(ModelConfig {
            family,
            hidden: self.hidden_size,
            intermediate: match family {
                Family::Qwen2Moe => self.moe_intermediate_size.unwrap_or(1408),
                Family::Qwen3Moe => self.moe_intermediate_size.unwrap_or(768),
                _ => self.intermediate_size,
            },
            experts,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(default_kv_heads),
            head_dim: self.head_dim.unwrap_or(default_head_dim),
            vocabulary: self.vocab_size,
            max_positions,
            rms_eps: self.rms_norm_eps.unwrap_or(eps) as f32,
            layer_norm: false,
            clip_qkv: None,
            alibi: None,
            softmax_scale: None,
            gated: true,
            rope_theta: rope.rope_theta.or(self.rope_theta).unwrap_or(theta),
            rope_scaling: rope.scaling(path, max_positions)?,
            sliding_window: self.window(path, family)?,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(false),
            qkv_bias: if is_qwen2 { self.qkv_bias.unwrap_or(true) } else { self.attention_bias.unwrap_or(false) },
            output_bias: !is_qwen2 && self.attention_bias.unwrap_or(false),
            mlp_bias: self.mlp_bias.unwrap_or(false),
            qk_norm: matches!(family, Family::Qwen3 | Family::Qwen3Moe),
            gemma: None,
        })
    }

    fn experts(&self, path: &Path, family: Family) -> Result<Option<ExpertConfig>, LoadError> {
        let (count, each) = match family {
            Family::Mixtral => (8, 2),
            Family::Qwen2Moe => (60, 4),
            Family::Qwen3Moe => (128, 8),
            _ => return Ok(None),
        };
        let instead = "only models whose layers all have experts are";
        if let Some(step) = self.decoder_sparse_step.filter(|&step| step != 1) {
            return Err(LoadError::unsupported(path, "decoder_sparse_step", step.to_string(), instead));
        }
        if let Some(layers) = self.mlp_only_layers.as_ref().filter(|layers| !layers.is_empty()) {
            return Err(LoadError::unsupported(path, "mlp_only_layers", format!("{layers:?}"), instead));
        }
        Ok(Some(ExpertConfig {
            count: self.num_local_experts.or(self.num_experts).unwrap_or(count),
            each: self.num_experts_per_tok.unwrap_or(each),
            normalised: family == Family::Mixtral || self.norm_topk_prob.unwrap_or(false),
            shared: (family == Family::Qwen2Moe).then(|| self.shared_expert_intermediate_size.unwrap_or(5632)),
        }))
    }

    /// The window of all layers. There is none that some layers have and others have not.
    fn window(&self, path: &Path, family: Family) -> Result<Option<usize>, LoadError> {
        const FULL: &str = "full_attention";
        const SLIDING: &str = "sliding_attention";
        let types = self.layer_types.as_deref().unwrap_or_default();
        if let Some(other) = types.iter().find(|name| ![FULL, SLIDING].contains(&name.as_str())) {
            let instead = "layers of full_attention or of sliding_attention are";
            return Err(LoadError::unsupported(path, "layer_types", format!("\"{other}\""), instead));
        }
        let listed = types.iter().filter(|name| *name == SLIDING).count();
        let (window, sliding, layers) = match family {
            Family::Llama | Family::Dbrx | Family::Mpt | Family::Gemma2 | Family::Gemma3 => (None, listed, types.len()),
            // On all layers; the types of layers say nothing.
            Family::Mistral | Family::Mixtral if listed == 0 || listed == types.len() => {
                let default = (family == Family::Mistral).then_some(4096);
                return Ok(self.sliding_window.unwrap_or(default));
            }
            Family::Mistral | Family::Mixtral => (self.sliding_window.unwrap_or(None), listed, types.len()),
            Family::Qwen2 | Family::Qwen3 | Family::Qwen2Moe | Family::Qwen3Moe => {
                let window = if self.use_sliding_window == Some(true) { self.sliding_window.unwrap_or(Some(4096)) } else { None };
                // What a file leaves out is the default of transformers' configuration classes.
                let from = self.max_window_layers.unwrap_or(28);
                match types.len() {
                    0 if window.is_some() => (window, self.num_hidden_layers.saturating_sub(from), self.num_hidden_layers),
                    layers => (window, listed, layers),
                }
            }
        };
        match (sliding, window) {
            (0, _) => Ok(None),
            (_, None) => {
                let detail = "names layers with a window, but there is no sliding_window in use".to_owned();
                Err(LoadError::invalid(path, "layer_types", detail))
            }
            (sliding, window) if sliding == layers => Ok(window),
            _ => {
                let instead = "set use_sliding_window to false if the context stays below the window";
                Err(LoadError::unsupported(path, "use_sliding_window", "a window on some of the layers", instead))
            }
        }
    }
}

impl Rope {
    /// What a file says, in the field of transformers 4 (`rope_scaling`) or in that of 5.
    pub fn of(path: &Path, parameters: Option<&Rope>, scaling: Option<&Rope>) -> Result<Rope, LoadError> {
        let rope = match (parameters, scaling) {
            (Some(new), Some(old)) => {
                if (Rope { rope_theta: new.rope_theta, ..old.clone() }) != *new {
                    let detail = "differs from rope_parameters; remove the one that is not the model's".to_owned();
                    return Err(LoadError::invalid(path, "rope_scaling", detail));
                }
                Rope { rope_theta: new.rope_theta.or(old.rope_theta), ..new.clone() }
            }
            (Some(one), None) | (None, Some(one)) => one.clone(),
            (None, None) => Rope::default(),
        };
        if rope.full_attention.is_some() || rope.sliding_attention.is_some() {
            let (found, instead) = ("a rotation for each type of layers", "one for all layers is");
            return Err(LoadError::unsupported(path, "rope_parameters", found, instead));
        }
        Ok(rope)
    }

    /// What it is called.
    pub fn kind(&self) -> Option<&str> {
        self.rope_type.as_deref().or(self.kind.as_deref())
    }

    /// Whether frequencies are as in pre-training.
    pub fn is_plain(&self) -> bool {
        matches!(self.kind(), None | Some("default"))
    }

    /// Base of the frequencies.
    pub fn theta(&self) -> Option<f64> {
        self.rope_theta
    }

    /// Positions of a model whose file says so many: publishers add YaRN to a file that keeps saying those of pre-training.
    pub fn positions(&self, max_positions: usize) -> usize {
        let stretched = self.original_max_position_embeddings.zip(self.factor).filter(|_| self.kind() == Some("yarn"));
        stretched.map_or(max_positions, |(original, factor)| max_positions.max((original as f64 * factor) as usize))
    }

    pub fn scaling(&self, path: &Path, max_positions: usize) -> Result<RopeScaling, LoadError> {
        const FIELD: &str = "rope_scaling";
        let need = |name: &str, value: Option<f64>| {
            let value = value.ok_or_else(|| LoadError::invalid(path, FIELD, format!("{name} is missing")))?;
            if value.is_finite() && value > 0.0 {
                return Ok(value);
            }
            Err(LoadError::invalid(path, FIELD, format!("{name} is {value}, it must be above 0")))
        };
        match self.kind() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: need("factor", self.factor)? }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: need("factor", self.factor)?,
                low_freq_factor: need("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", self.high_freq_factor)?,
                original_positions: self.original_max_position_embeddings.unwrap_or(max_positions),
            }),
            Some("yarn") => {
                let factor = need("factor", self.factor)?;
                // 0 is as if it were not there, as in transformers.
                let beta = |name, value: Option<f64>, other| need(name, value.filter(|&value| value != 0.0).or(Some(other)));
                let scales = self.mscale.zip(self.mscale_all_dim).filter(|&(mscale, all)| mscale != 0.0 && all != 0.0);
                let attention = self.attention_factor.unwrap_or_else(|| Yarn::attention(factor, scales));
                let original_positions = self.original_max_position_embeddings.unwrap_or(max_positions);
                need("original_max_position_embeddings", Some(original_positions as f64))?;
                Ok(RopeScaling::Yarn(Yarn {
                    factor,
                    attention: need("attention_factor", Some(attention))?,
                    beta_fast: beta("beta_fast", self.beta_fast, BETAS.0)?,
                    beta_slow: beta("beta_slow", self.beta_slow, BETAS.1)?,
                    truncate: self.truncate.unwrap_or(true),
                    original_positions,
                }))
            }
            Some(other) => {
                let instead =
                    "supported are default, linear, llama3 and yarn; without rope_scaling the model serves its original context";
                Err(LoadError::unsupported(path, FIELD, format!("\"{other}\""), instead))
            }
        }
    }
}
