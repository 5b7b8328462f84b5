//! Options that change what a model computes and that nothing here computes. They are refused by name: a model that answers a little
//! wrong is worse than one that does not start.

use std::path::Path;

use serde_json::{Map, Value};

use super::Family;
use crate::gguf::Gguf;
use crate::load_error::LoadError;

/// Fields of `config.json`, each with the number that leaves the result as it is; null, false, 0 and an empty list always do.
const FIELDS: [(&str, f64); 19] = [
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("query_pre_attn_scalar", 0.0),
    ("attention_multiplier", 0.0),
    ("embedding_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("logits_scaling", 1.0),
    ("logit_scale", 1.0),
    ("clip_qkv", 0.0),
    ("qk_layernorm", 0.0),
    ("alibi", 0.0),
    ("no_rope_layers", 0.0),
    ("attention_chunk_size", 0.0),
    ("attn_temperature_tuning", 0.0),
    ("sliding_window_pattern", 0.0),
    ("use_bidirectional_attention", 0.0),
    ("first_k_dense_replace", 0.0),
    ("n_shared_experts", 0.0),
    ("routed_scaling_factor", 1.0),
];

/// The same of GGUF, behind the architecture's name.
const KEYS: [(&str, f64); 10] = [
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("attention.scale", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("logit_scale", 1.0),
    ("leading_dense_block_count", 0.0),
    ("expert_weights_scale", 1.0),
    // Softmax.
    ("expert_gating_func", 1.0),
];

/// What of both lists a family computes with.
fn computes(family: Family, name: &str) -> bool {
    match family {
        Family::Gemma2 => {
            ["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention.scale"].contains(&name)
        }
        Family::Gemma3 => {
            let own = ["final_logit_softcapping", "query_pre_attn_scalar", "sliding_window_pattern", "attention.scale"];
            own.contains(&name)
        }
        Family::Mpt => name == "attention.max_alibi_bias",
        _ => false,
    }
}

const INSTEAD: &str = "no model here computes with it";

/// Looks through a `config.json`.
pub(super) fn in_json(path: &Path, family: Family, fields: &Map<String, Value>) -> Result<(), LoadError> {
    for (name, neutral) in FIELDS.into_iter().filter(|(name, _)| !computes(family, name)) {
        let changes = match fields.get(name) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Number(number)) => number.as_f64().is_none_or(|number| number != 0.0 && number != neutral),
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        if changes {
            return Err(LoadError::unsupported(path, name, fields[name].to_string(), INSTEAD));
        }
    }
    Ok(())
}

/// Looks through the metadata of a GGUF file.
pub(super) fn in_gguf(gguf: &Gguf, family: Family, architecture: &str) -> Result<(), LoadError> {
    for (name, neutral) in KEYS.into_iter().filter(|(name, _)| !computes(family, name)) {
        let key = format!("{architecture}.{name}");
        if let Some(number) = gguf.number(&key)?.filter(|&number| number != 0.0 && number != neutral) {
            return Err(LoadError::unsupported(gguf.path(), key, number.to_string(), INSTEAD));
        }
    }
    Ok(())
}
