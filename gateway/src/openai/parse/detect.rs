//! Which parsers fit a model: by what its chat template writes, or as the configuration says.

use super::{CallFormat, Function, JsonSyntax, OutputFormat, ReasoningTags, TaggedSyntax};
use crate::openai::tools::Tool;

/// How one model writes reasoning and calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsers {
    /// Marks around reasoning, if it reasons.
    pub reasoning: Option<ReasoningTags>,
    /// Its calls.
    pub calls: CallFormat,
}

/// What the configuration says of a model's parsers; `None` is `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParserChoice {
    /// `tool_parser`.
    pub calls: Option<CallFormat>,
    /// `reasoning_parser`; `Some(None)` is `none`.
    pub reasoning: Option<Option<ReasoningTags>>,
}

/// What a template holds, and whose it is: the first match decides.
const SIGNS: [(&str, CallFormat); 17] = [
    ("<｜tool▁call▁begin｜>", CallFormat::Json(&JsonSyntax::DEEPSEEK_31)),
    ("<|tool_call_begin|>", CallFormat::Json(&JsonSyntax::KIMI)),
    ("[ARGS]", CallFormat::Json(&JsonSyntax::MISTRAL_11)),
    ("[TOOL_CALLS]", CallFormat::Json(&JsonSyntax::MISTRAL)),
    ("<|python_start|>", CallFormat::Pythonic),
    ("[func_name1(params_name1=params_value1", CallFormat::Pythonic),
    ("<|python_tag|>", CallFormat::Json(&JsonSyntax::LLAMA3)),
    ("{\"name\": function name, \"parameters\"", CallFormat::Json(&JsonSyntax::LLAMA3)),
    ("<|action_start|>", CallFormat::Json(&JsonSyntax::INTERNLM)),
    ("functools", CallFormat::Json(&JsonSyntax::PHI4)),
    ("<|/tool_call|>", CallFormat::Json(&JsonSyntax::PHI4)),
    ("<tool_calls>", CallFormat::Json(&JsonSyntax::JAMBA)),
    ("<|tool_call|>", CallFormat::Json(&JsonSyntax::GRANITE)),
    ("<function=", CallFormat::Tagged(&TaggedSyntax::QWEN3_CODER)),
    ("<arg_key>", CallFormat::Tagged(&TaggedSyntax::GLM45)),
    ("<tool_call>", CallFormat::Json(&JsonSyntax::HERMES)),
    ("xLAM", CallFormat::Json(&JsonSyntax::XLAM)),
];

impl Default for Parsers {
    fn default() -> Self {
        Self::detect("", "")
    }
}

impl Parsers {
    /// Reads the signs of a family in the template's text. Where there are none, calls are written as our own prompt asks.
    ///
    /// `tool_template` is the one for conversations with tools, if any: often the same.
    pub fn detect(template: &str, tool_template: &str) -> Self {
        let shows = |tags: &ReasoningTags| template.contains(tags.open) || template.contains(tags.close);
        let reasoning = ReasoningTags::ALL.into_iter().find(shows);
        let found = SIGNS.iter().find(|(sign, _)| tool_template.contains(sign)).map(|(_, calls)| *calls);
        let calls = match found {
            // Its first versions put the arguments into a fence.
            Some(calls) if calls == CallFormat::Json(&JsonSyntax::DEEPSEEK_31) && tool_template.contains("```json") => {
                CallFormat::Json(&JsonSyntax::DEEPSEEK)
            }
            Some(calls) => calls,
            None => CallFormat::Json(&JsonSyntax::HERMES),
        };
        Self { reasoning, calls }
    }

    /// The same where the configuration does not say otherwise.
    pub fn choose(choice: ParserChoice, template: &str, tool_template: &str) -> Self {
        let found = Self::detect(template, tool_template);
        Self { reasoning: choice.reasoning.unwrap_or(found.reasoning), calls: choice.calls.unwrap_or(found.calls) }
    }

    /// Every mark that may be a control token, which would otherwise be left out of the text.
    pub fn marks(&self) -> Vec<&'static str> {
        let reasoning = self.reasoning.iter().flat_map(|tags| [tags.open, tags.close]);
        reasoning.chain(self.calls.marks()).collect()
    }

    /// How the answers to `prompt` are to be read.
    pub fn format(&self, prompt: &str, tools: &[&Tool], answer: u128) -> OutputFormat {
        let ends_with = |mark: fn(&ReasoningTags) -> &'static str| {
            self.reasoning.is_some_and(|tags| prompt.trim_end().ends_with(mark(&tags)))
        };
        let (in_reasoning, reasoned) = (ends_with(|tags| tags.open), ends_with(|tags| tags.close));
        let function = |tool: &&Tool| Function { name: tool.name.clone(), schema: tool.parameters.clone() };
        let functions = tools.iter().map(function).collect();
        let calls = (!tools.is_empty()).then_some(self.calls);
        OutputFormat { reasoning: self.reasoning, in_reasoning, reasoned, calls, functions, single_call: false, answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_templates_marks_tell_its_family() {
        for (template, calls, reasoning) in [
            ("<|im_start|>", "hermes", None),
            ("within <tool_call></tool_call> XML tags … <think>\\n\\n</think>", "hermes", Some("think")),
            ("{{- '<|python_tag|>' + tool_call.name + '.call(' }}", "llama3_json", None),
            ("[AVAILABLE_TOOLS] … [TOOL_CALLS]", "mistral", None),
            ("[TOOL_CALLS] … [THINK]", "mistral", Some("magistral")),
            (
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] … '```json' … '</think>'",
                "deepseek_v3",
                Some("think"),
            ),
            ("'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>'", "deepseek_v31", None),
            ("[TOOL_CALLS]' + name + '[ARGS]", "mistral_v11", None),
            ("'<tool_call>\\n<function=' + tool_call.name", "qwen3_coder", None),
            ("<tool_call>… <arg_key>… <think>", "glm45", Some("think")),
            ("<|python_start|>[", "pythonic", None),
        ] {
            let parsers = Parsers::detect(template, template);
            assert_eq!((parsers.calls.name(), parsers.reasoning.map(|tags| tags.name)), (calls, reasoning), "{template}");
        }
    }

    #[test]
    fn the_configuration_goes_before_the_template() {
        let choice = ParserChoice { calls: CallFormat::by_name("mistral"), reasoning: Some(None) };
        let parsers = Parsers::choose(choice, "<think>", "<tool_call>");
        assert_eq!((parsers.calls.name(), parsers.reasoning), ("mistral", None));
        assert_eq!(Parsers::choose(ParserChoice::default(), "<think>", "x"), Parsers::detect("<think>", "x"));
    }

    #[test]
    fn the_prompt_may_have_opened_the_reasoning() {
        let parsers = Parsers::detect("<think>", "");
        assert!(parsers.format("<|im_start|>assistant\n<think>\n", &[], 0).in_reasoning);
        assert!(!parsers.format("<|im_start|>assistant\n<think>\n\n</think>\n\n", &[], 0).in_reasoning);
        assert!(!parsers.format("<|im_start|>assistant\n", &[], 0).in_reasoning);
    }
}
