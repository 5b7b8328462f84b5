//! Answers that must be JSON.

use jsonschema::Validator;
use serde_json::Value;

use super::{Answer, RewardError, Score};

/// 1 for an answer that is one JSON value, whitespace around it allowed, and 0 for any other.
pub(super) struct Json {
    /// A bare string, number, truth or null counts too. Such answers are easy, and seldom what is meant.
    pub any: bool,
}

impl Score for Json {
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError> {
        let good = |answer: &Answer<'_>| match serde_json::from_str::<Value>(answer.text) {
            Ok(value) => self.any || value.is_object() || value.is_array(),
            Err(_) => false,
        };
        Ok(answers.iter().map(|answer| Some(f64::from(u8::from(good(answer))))).collect())
    }
}

/// 1 for an answer that is JSON and valid by a schema; with `partial`, half of it for JSON that is not valid.
pub(super) struct Schema {
    validator: Validator,
    partial: bool,
}

impl Schema {
    /// Compiles a schema; where it names no draft, it is one of 2020-12. References to elsewhere are refused.
    pub fn new(schema: &Value, partial: bool) -> Result<Self, String> {
        let validator = jsonschema::validator_for(schema).map_err(|error| format!("schema: {error}"))?;
        Ok(Self { validator, partial })
    }
}

impl Score for Schema {
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError> {
        let reward = |answer: &Answer<'_>| match serde_json::from_str::<Value>(answer.text) {
            Ok(value) if self.validator.is_valid(&value) => 1.0,
            Ok(_) if self.partial => 0.5,
            _ => 0.0,
        };
        Ok(answers.iter().map(|answer| Some(reward(answer))).collect())
    }
}
