//! MPT's `config.json`, whose fields have names of their own.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{Family, ModelConfig, RopeScaling};
use crate::generation_defaults::one_or_many;
use crate::load_error::LoadError;

/// `config.json`; what it leaves out has the default of transformers' `MptConfig`.
#[derive(Deserialize)]
pub(super) struct Fields {
    d_model: Option<usize>,
    n_heads: Option<usize>,
    n_layers: Option<usize>,
    /// Width of the feed-forward part over that of the stream.
    expansion_ratio: Option<usize>,
    max_seq_len: Option<usize>,
    vocab_size: Option<usize>,
    layer_norm_epsilon: Option<f64>,
    norm_type: Option<String>,
    no_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attn_config: Attention,
    #[serde(default)]
    ffn_config: FeedForward,
    quantization_config: Option<Value>,
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
}

#[derive(Default, Deserialize)]
struct Attention {
    attn_type: Option<String>,
    alibi: Option<bool>,
    alibi_bias_max: Option<f64>,
    clip_qkv: Option<f64>,
    softmax_scale: Option<f64>,
    #[serde(default)]
    qk_ln: bool,
    #[serde(default)]
    qk_gn: bool,
    #[serde(default)]
    rope: bool,
    #[serde(default)]
    prefix_lm: bool,
    /// -1: none.
    sliding_window_size: Option<i64>,
}

#[derive(Default, Deserialize)]
struct FeedForward {
    ffn_type: Option<String>,
    ffn_act_fn: Option<Activation>,
}

#[derive(Deserialize)]
struct Activation {
    name: Option<String>,
    /// Of gelu: "none" or "tanh".
    approximate: Option<String>,
}

impl Fields {
    pub fn config(&self, path: &Path) -> Result<ModelConfig, LoadError> {
        let Self { attn_config: attention, .. } = self;
        self.refuse(path)?;
        let (hidden, heads) = (self.d_model.unwrap_or(2048), self.n_heads.unwrap_or(16));
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(LoadError::invalid(path, "n_heads", format!("is {heads}, by which d_model, {hidden}, is not divisible")));
        }
        Ok(ModelConfig {
            family: Family::Mpt,
            hidden,
            intermediate: self.expansion_ratio.unwrap_or(4).saturating_mul(hidden),
            experts: None,
            layers: self.n_layers.unwrap_or(24),
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            vocabulary: self.vocab_size.unwrap_or(50_368),
            max_positions: self.max_seq_len.unwrap_or(2048),
            rms_eps: self.layer_norm_epsilon.unwrap_or(1e-5) as f32,
            layer_norm: true,
            // 0 is none, as for transformers.
            clip_qkv: attention.clip_qkv.filter(|&limit| limit != 0.0).map(|limit| limit as f32),
            alibi: Some(attention.alibi_bias_max.unwrap_or(8.0)),
            softmax_scale: attention.softmax_scale.map(|scale| scale as f32),
            gated: false,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            sliding_window: None,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(true),
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            gemma: None,
        })
    }

    /// What nothing here computes with, by name.
    fn refuse(&self, path: &Path) -> Result<(), LoadError> {
        let Self { attn_config: attention, .. } = self;
        let unsupported = |field: &str, found: String, instead: &str| Err(LoadError::unsupported(path, field, found, instead));
        if self.quantization_config.is_some() {
            let instead = "use the unquantised model, or a GGUF file of it";
            return unsupported("quantization_config", "a quantised safetensors model".to_owned(), instead);
        }
        if self.no_bias == Some(false) {
            return unsupported("no_bias", "false".to_owned(), "models without biases are");
        }
        if let Some(name) = self.norm_type.as_deref().filter(|name| !name.ends_with("layernorm")) {
            return unsupported("norm_type", format!("\"{name}\""), "models use \"layernorm\" or \"low_precision_layernorm\"");
        }
        if let Some(name) = attention.attn_type.as_deref().filter(|&name| name != "multihead_attention") {
            return unsupported("attn_config.attn_type", format!("\"{name}\""), "models use \"multihead_attention\"");
        }
        if attention.alibi == Some(false) {
            return unsupported("attn_config.alibi", "false".to_owned(), "positions are told by ALiBi");
        }
        let switches = [
            ("attn_config.qk_ln", attention.qk_ln),
            ("attn_config.qk_gn", attention.qk_gn),
            ("attn_config.rope", attention.rope),
            ("attn_config.prefix_lm", attention.prefix_lm),
        ];
        if let Some((field, _)) = switches.into_iter().find(|(_, set)| *set) {
            return unsupported(field, "true".to_owned(), "models without it are");
        }
        if let Some(window) = attention.sliding_window_size.filter(|&window| window != -1) {
            return unsupported("attn_config.sliding_window_size", window.to_string(), "full attention is");
        }
        if let Some(name) = self.ffn_config.ffn_type.as_deref().filter(|&name| name != "mptmlp") {
            return unsupported("ffn_config.ffn_type", format!("\"{name}\""), "models use \"mptmlp\"");
        }
        if let Some(Activation { name, approximate }) = &self.ffn_config.ffn_act_fn {
            const INSTEAD: &str = "models use \"gelu\", not approximated";
            if let Some(name) = name.as_deref().filter(|&name| name != "gelu") {
                return unsupported("ffn_config.ffn_act_fn", format!("\"{name}\""), INSTEAD);
            }
            if let Some(how) = approximate.as_deref().filter(|&how| how != "none") {
                return unsupported("ffn_config.ffn_act_fn.approximate", format!("\"{how}\""), INSTEAD);
            }
        }
        Ok(())
    }
}
