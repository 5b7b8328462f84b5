//! Tokenizers from `tokenizer.json` with `tokenizer_config.json`.

use std::path::Path;

use serde_json::Value;

use super::{SpecialTokens, Tokenizer, contained};
use crate::load_error::LoadError;

impl Tokenizer {
    /// Reads `tokenizer.json`; `config` is the content of `tokenizer_config.json` (or null), which names the tokens with a role.
    pub fn from_json(path: &Path, config: &Value) -> Result<Self, LoadError> {
        let text = std::fs::read(path).map_err(|error| LoadError::io(path, error))?;
        let mut pipeline = contained(|| tokenizers::Tokenizer::from_bytes(&text))
            .map_err(|error| LoadError::invalid(path, "tokenizer", format!("{error}; fetch the file again")))?;
        pipeline.with_padding(None);
        pipeline.with_truncation(None).map_err(|error| LoadError::invalid(path, "truncation", error.to_string()))?;
        // A role that names a token the vocabulary lacks is common and harmless (a padding token added for training).
        let role = |key: &str| content(config.get(key)?).and_then(|token| pipeline.token_to_id(token));
        let roles = SpecialTokens {
            bos: role("bos_token"),
            eos: role("eos_token"),
            unknown: role("unk_token"),
            padding: role("pad_token"),
        };
        Self::assemble(pipeline, roles).map_err(|detail| LoadError::invalid(path, "tokenizer", detail))
    }
}

/// `"<s>"` or `{"content": "<s>", …}`.
pub(crate) fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}
