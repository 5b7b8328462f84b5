//! Configurations from GGUF metadata.

use super::{Family, ModelConfig, RopeScaling, SUPPORTED_FAMILIES};
use crate::gguf::Gguf;
use crate::load_error::LoadError;

const ARCHITECTURE: &str = "general.architecture";

impl ModelConfig {
    /// Reads the metadata, and from the tensors (`shape` says which there are) what the metadata leaves to them: vocabulary,
    /// biases, head norms, tied embeddings, frequencies.
    pub(crate) fn from_gguf<'a>(
        gguf: &Gguf,
        shape: impl Fn(&str) -> Option<&'a [usize]>,
        rope_factors: Option<Vec<f32>>,
    ) -> Result<Self, LoadError> {
        let architecture = gguf.text(ARCHITECTURE)?.ok_or_else(|| gguf.missing(ARCHITECTURE))?;
        let family = match architecture {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            _ => {
                let found = format!("\"{architecture}\"");
                return Err(LoadError::unsupported(gguf.path(), ARCHITECTURE, found, SUPPORTED_FAMILIES));
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        let need = |name: &str| gguf.integer(&key(name))?.ok_or_else(|| gguf.missing(&key(name)));
        if gguf.integer(&key("expert_count"))?.is_some_and(|experts| experts > 0) {
            return Err(LoadError::unsupported(gguf.path(), key("expert_count"), "a mixture of experts", SUPPORTED_FAMILIES));
        }

        let hidden = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        if heads == 0 {
            return Err(LoadError::invalid(gguf.path(), key("attention.head_count"), "is 0"));
        }
        let head_dim = gguf.integer(&key("attention.key_length"))?.unwrap_or(hidden / heads);
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = gguf.integer(&key(name))?.filter(|&other| other != head_dim) {
                let instead = format!("it must be the head dimension {head_dim}");
                return Err(LoadError::unsupported(gguf.path(), key(name), other.to_string(), instead));
            }
        }
        let vocabulary = match shape("token_embd.weight") {
            Some(shape) => shape.first().copied().unwrap_or(0),
            None => need("vocab_size")?,
        };
        let has = |name: &str| shape(name).is_some();
        let eps = key("attention.layer_norm_rms_epsilon");
        let eps = gguf.number(&eps)?.ok_or_else(|| gguf.missing(&eps))?;
        let config = ModelConfig {
            family,
            hidden,
            intermediate: need("feed_forward_length")?,
            layers: need("block_count")?,
            heads,
            kv_heads: gguf.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            vocabulary,
            max_positions: need("context_length")?,
            rms_eps: eps as f32,
            rope_theta: gguf.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: match rope_factors {
                Some(factors) => RopeScaling::Factors(factors),
                None => scaling(gguf, architecture)?,
            },
            sliding_window: gguf.integer(&key("attention.sliding_window"))?.filter(|&window| window > 0),
            tied_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            output_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
            qk_norm: has("blk.0.attn_q_norm.weight"),
        };
        config.check(gguf.path())?;
        Ok(config)
    }
}

fn scaling(gguf: &Gguf, architecture: &str) -> Result<RopeScaling, LoadError> {
    let kind = format!("{architecture}.rope.scaling.type");
    let factor = format!("{architecture}.rope.scaling.factor");
    match gguf.text(&kind)? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => {
            let value = gguf.number(&factor)?.ok_or_else(|| gguf.missing(&factor))?;
            if !(value.is_finite() && value > 0.0) {
                return Err(LoadError::invalid(gguf.path(), factor, format!("is {value}, but must be above 0")));
            }
            Ok(RopeScaling::Linear { factor: value })
        }
        Some(other) => {
            Err(LoadError::unsupported(gguf.path(), kind, format!("\"{other}\""), "supported are none, linear and rope_freqs"))
        }
    }
}
