//! Which parsers fit a model, by what its chat template writes.

use super::{CallFormat, JsonSyntax, OutputFormat, ReasoningTags};

/// How one model writes reasoning and calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsers {
    /// Marks around reasoning, if it reasons.
    pub reasoning: Option<ReasoningTags>,
    /// Its calls.
    pub calls: CallFormat,
}

impl Parsers {
    /// Reads the signs of a family in the template's text.
    pub fn detect(template: &str) -> Self {
        let reasoning = [ReasoningTags::THINK].into_iter().find(|tags| template.contains(tags.open));
        Self { reasoning, calls: CallFormat::Json(&JsonSyntax::HERMES) }
    }

    /// Every mark that may be a control token, which would otherwise be left out of the text.
    pub fn marks(&self) -> Vec<&'static str> {
        let reasoning = self.reasoning.iter().flat_map(|tags| [tags.open, tags.close]);
        reasoning.chain(self.calls.marks()).collect()
    }

    /// How the answers to a prompt are to be read. `functions`: what may be called.
    pub fn format(&self, prompt: &str, functions: Vec<String>, answer: u128) -> OutputFormat {
        let in_reasoning = self.reasoning.is_some_and(|tags| prompt.trim_end().ends_with(tags.open));
        let calls = (!functions.is_empty()).then_some(self.calls);
        let functions = functions.into();
        OutputFormat { reasoning: self.reasoning, in_reasoning, calls, functions, single_call: false, answer }
    }
}
