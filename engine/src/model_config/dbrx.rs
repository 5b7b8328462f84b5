//! DBRX's `config.json`, whose fields have names of their own.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::json::{Rope, present};
use super::{ExpertConfig, Family, ModelConfig};
use crate::generation_defaults::one_or_many;
use crate::load_error::LoadError;

/// Added to the variance in DBRX's norms: its files say nothing of it, and this is what PyTorch's norm has.
const LAYER_NORM_EPS: f32 = 1e-5;

/// `config.json`; what it leaves out has the default of transformers' `DbrxConfig`.
#[derive(Deserialize)]
pub(super) struct Fields {
    d_model: Option<usize>,
    n_heads: Option<usize>,
    n_layers: Option<usize>,
    max_seq_len: Option<usize>,
    vocab_size: Option<usize>,
    #[serde(default)]
    attn_config: Attention,
    #[serde(default)]
    ffn_config: FeedForward,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    /// Where transformers 5 has `rope_theta` and `rope_scaling`.
    rope_parameters: Option<Rope>,
    tie_word_embeddings: Option<bool>,
    quantization_config: Option<Value>,
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
}

#[derive(Default, Deserialize)]
struct Attention {
    kv_n_heads: Option<usize>,
    clip_qkv: Option<f64>,
    /// Where publishers and transformers 4 have it.
    rope_theta: Option<f64>,
}

#[derive(Default, Deserialize)]
struct FeedForward {
    ffn_hidden_size: Option<usize>,
    moe_num_experts: Option<usize>,
    moe_top_k: Option<usize>,
    /// Which norm of the chosen experts' weights they are divided by. Left out is not the same as null, which is none.
    #[serde(default, deserialize_with = "present")]
    moe_normalize_expert_weights: Option<Option<f64>>,
    uniform_expert_assignment: Option<bool>,
    ffn_act_fn: Option<Activation>,
}

#[derive(Deserialize)]
struct Activation {
    name: Option<String>,
}

impl Fields {
    pub fn config(&self, path: &Path) -> Result<ModelConfig, LoadError> {
        let unsupported = |field: &str, found: String, instead: &str| Err(LoadError::unsupported(path, field, found, instead));
        let Self { attn_config: attention, ffn_config: experts, .. } = self;
        if self.quantization_config.is_some() {
            let instead = "use the unquantised model, or a GGUF file of it";
            return unsupported("quantization_config", "a quantised safetensors model".to_owned(), instead);
        }
        let (hidden, heads) = (self.d_model.unwrap_or(2048), self.n_heads.unwrap_or(16));
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(LoadError::invalid(path, "n_heads", format!("is {heads}, by which d_model, {hidden}, is not divisible")));
        }
        if let Some(name) = experts.ffn_act_fn.as_ref().and_then(|act| act.name.as_deref()).filter(|&name| name != "silu") {
            return unsupported("ffn_config.ffn_act_fn", format!("\"{name}\""), "models use \"silu\"");
        }
        if experts.uniform_expert_assignment == Some(true) {
            return unsupported("ffn_config.uniform_expert_assignment", "true".to_owned(), "the router chooses");
        }
        let normalised = match experts.moe_normalize_expert_weights.unwrap_or(Some(1.0)) {
            None => false,
            Some(1.0) => true,
            Some(other) => {
                let instead = "their sum (1) is, or none (null)";
                return unsupported("ffn_config.moe_normalize_expert_weights", format!("the {other}-norm of weights"), instead);
            }
        };
        let rope = Rope::of(path, self.rope_parameters.as_ref(), self.rope_scaling.as_ref())?;
        let max_positions = rope.positions(self.max_seq_len.unwrap_or(2048));
        Ok(ModelConfig {
            family: Family::Dbrx,
            hidden,
            intermediate: experts.ffn_hidden_size.unwrap_or(3584),
            experts: Some(ExpertConfig {
                count: experts.moe_num_experts.unwrap_or(4),
                each: experts.moe_top_k.unwrap_or(1),
                normalised,
                shared: None,
            }),
            layers: self.n_layers.unwrap_or(24),
            heads,
            kv_heads: attention.kv_n_heads.unwrap_or(1),
            head_dim: hidden / heads,
            vocabulary: self.vocab_size.unwrap_or(32_000),
            max_positions,
            rms_eps: LAYER_NORM_EPS,
            layer_norm: true,
            clip_qkv: attention.clip_qkv.map(|limit| limit as f32),
            alibi: None,
            softmax_scale: None,
            gated: true,
            rope_theta: rope.theta().or(self.rope_theta).or(attention.rope_theta).unwrap_or(10_000.0),
            rope_scaling: rope.scaling(path, max_positions)?,
            sliding_window: None,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(false),
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            gemma: None,
        })
    }
}
