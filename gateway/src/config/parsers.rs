//! `tool_parser` and `reasoning_parser`, for all models or in `[parsers.MODEL]` for one.

use crate::config::ConfigError;
use crate::config::layer::Layer;
use crate::config::tables::{known, tables as named};
use crate::openai::parse::{CallFormat, ParserChoice, ReasoningTags};
use std::collections::BTreeMap;

/// Which parsers are used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParserConfig {
    /// For models without a table of their own.
    pub default: ParserChoice,
    /// By served model.
    pub models: BTreeMap<String, ParserChoice>,
}

impl ParserConfig {
    /// For a served model: its own table's keys go before the general ones.
    pub fn of(&self, model: &str) -> ParserChoice {
        let own = self.models.get(model).copied().unwrap_or_default();
        ParserChoice { calls: own.calls.or(self.default.calls), reasoning: own.reasoning.or(self.default.reasoning) }
    }
}

/// A family of tool calls, or `auto`.
pub fn tool_parser(text: &str) -> Result<Option<CallFormat>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let names = || CallFormat::all().map(|format| format.name()).collect::<Vec<_>>().join(", ");
    CallFormat::by_name(text).map(Some).ok_or_else(|| format!("expected auto, {}", names()))
}

/// The marks around reasoning, `none`, or `auto`.
pub fn reasoning_parser(text: &str) -> Result<Option<Option<ReasoningTags>>, String> {
    let names = || ReasoningTags::ALL.map(|tags| tags.name).join(", ");
    match text {
        "auto" => Ok(None),
        "none" => Ok(Some(None)),
        _ => match ReasoningTags::ALL.into_iter().find(|tags| tags.name == text) {
            Some(tags) => Ok(Some(Some(tags))),
            None => Err(format!("expected auto, none, {}", names())),
        },
    }
}

/// `[parsers.MODEL]`.
pub fn tables(layers: &[Layer]) -> Result<BTreeMap<String, ParserChoice>, ConfigError> {
    let mut models = BTreeMap::new();
    for table in named(layers, "parsers") {
        known(table, &["tool_parser", "reasoning_parser"])?;
        let choice = ParserChoice {
            calls: table.get("tool_parser").map_or(Ok(None), |s| s.parse(tool_parser))?,
            reasoning: table.get("reasoning_parser").map_or(Ok(None), |s| s.parse(reasoning_parser))?,
        };
        models.insert(table.name.clone(), choice);
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_own_table_goes_first() {
        let choice = |calls: &str, reasoning: &str| ParserChoice {
            calls: tool_parser(calls).unwrap(),
            reasoning: reasoning_parser(reasoning).unwrap(),
        };
        let models = [("a".to_owned(), choice("auto", "none"))].into();
        let config = ParserConfig { default: choice("mistral", "think"), models };
        assert_eq!(config.of("a"), choice("mistral", "none"));
        assert_eq!(config.of("b"), choice("mistral", "think"));
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        assert!(tool_parser("mystery").unwrap_err().contains("hermes, llama3_json"));
        assert!(reasoning_parser("mystery").unwrap_err().contains("none, seed"));
    }
}
