//! What the model's publisher recommends for sampling.

use std::path::Path;

use serde::{Deserialize, Deserializer};

use crate::load_error::LoadError;

/// Sampling defaults from `generation_config.json`; a field that the file leaves out is `None`. A request's own values go first.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct GenerationDefaults {
    /// `Some(false)` means greedy, whatever the temperature says.
    pub do_sample: Option<bool>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// 1 is off.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<usize>,
    /// End-of-turn tokens.
    #[serde(default, deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
}

impl GenerationDefaults {
    /// Reads `generation_config.json`; a model without one has no defaults.
    pub(crate) fn read(path: &Path) -> Result<Self, LoadError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(LoadError::io(path, error)),
        };
        serde_json::from_slice(&text).map_err(|error| LoadError::invalid(path, "generation defaults", error.to_string()))
    }
}

/// Accepts `7`, `[7, 9]` and `null`.
pub(crate) fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a token id or a list of token ids")]
    enum OneOrMany {
        One(u32),
        Many(Vec<u32>),
        None,
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(id) => vec![id],
        OneOrMany::Many(ids) => ids,
        OneOrMany::None => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_publishers_write() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("generation_config.json");
        let text =
            r#"{"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true}"#;
        std::fs::write(&path, text).unwrap();
        let defaults = GenerationDefaults::read(&path).unwrap();
        assert_eq!(defaults.eos_token_id, [2, 7]);
        assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (Some(0.6), Some(20), Some(0.95)));
        assert_eq!((defaults.do_sample, defaults.min_p), (Some(true), None));
        for (text, expected) in [(r#"{"eos_token_id": 3}"#, vec![3]), (r#"{"eos_token_id": null}"#, vec![]), ("{}", vec![])] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(GenerationDefaults::read(&path).unwrap().eos_token_id, expected, "{text}");
        }
    }

    #[test]
    fn a_missing_file_has_no_defaults_and_a_wrong_one_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("generation_config.json");
        assert_eq!(GenerationDefaults::read(&path).unwrap(), GenerationDefaults::default());
        std::fs::write(&path, r#"{"temperature": "hot"}"#).unwrap();
        let error = GenerationDefaults::read(&path).unwrap_err().to_string();
        assert!(error.contains("generation_config.json"), "{error}");
    }
}
