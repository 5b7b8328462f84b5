//! Grammars for answers that must be calls, or whose calls must fit schemas: in the marks that the model itself writes, so that
//! the same parser reads them. And for answers of a form, before which a model may reason.

use crate::openai::parse::{OutputFormat, Writing};
use serde_json::{Value, json};
use tidemill_engine::{Constraint, for_lark};

/// A function and the schema that its arguments must fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Signature {
    /// Its name.
    pub name: String,
    /// Its arguments, as [`tidemill_engine::for_lark`] writes their schema.
    pub arguments: String,
}

/// What an answer with calls may be.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// How calls and reasoning are written.
    pub format: &'a OutputFormat,
    /// Must it be a call?
    pub forced: bool,
    /// Only one.
    pub single: bool,
    /// What it must be where it is no call; `None`: any text.
    pub answer: Option<&'a Constraint>,
}

/// A grammar in llguidance's Lark; `None` where `answer` is of a kind that cannot stand beside calls. `special` is the id of a mark
/// that is a control token: no text matches it, only its id does.
pub fn lark(shape: &Shape<'_>, functions: &[Signature], special: &dyn Fn(&str) -> Option<u32>) -> Option<String> {
    let syntax = shape.format.calls?.constrained();
    let marks: Vec<&str> = syntax.marks().collect();
    let text = |text: &str| literal(text, &marks, special);
    let Writing { start, before, between, after, separator, end } = &syntax.writing;
    let mut rules = vec!["%llguidance {}".to_owned()];
    let first = format!("{start}{before}");
    // The mark that announces a call: what precedes it is content.
    let mark = marks.iter().filter(|mark| first.starts_with(**mark)).max_by_key(|mark| mark.len()).copied();
    let repeat = if shape.single { String::new() } else { format!("({} {} call)*", text(separator), text(before)) };
    let from = |opening: &str| format!("{} call {repeat} {}", text(opening), text(end));
    let main = match (shape.forced, shape.answer, mark) {
        (true, ..) => from(&first),
        (false, Some(answer), _) => {
            rules.push(format!("reply: {}", reply(answer)?));
            format!("{} | reply", from(&first))
        }
        (false, None, Some(mark)) => {
            let times = if shape.single { '?' } else { '*' };
            let rest = from(first.strip_prefix(mark).unwrap_or(&first));
            match special(mark) {
                Some(id) => {
                    rules.push("words: /(?s:.*)/".to_owned());
                    format!("words (<[{id}]> {rest} words){times}")
                }
                None => {
                    rules.push(format!("words[suffix={}]: /(?s:.*)/", quoted(mark)));
                    rules.push(format!("tail: TAIL\nTAIL: /(?s:.*)/ & ~/(?s:.*){}(?s:.*)/", escape(mark)));
                    format!("(words {rest}){times} tail")
                }
            }
        }
        // Nothing announces a call but its first bracket.
        (false, None, None) => {
            rules.push("words: /([^\\[{\\s](?s:.*))?/".to_owned());
            format!("{} | words", from(&first))
        }
    };
    let reasoning = reasoning(shape.format, special, &mut rules);
    rules.push(format!("start: {reasoning}({main})"));
    let call: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
    rules.push(format!("call: {}", call.join(" | ")));
    for (rule, Signature { name, arguments }) in call.iter().zip(functions) {
        rules.push(format!("{rule}: {} {} arguments_{rule} {}", quoted(name), text(between), text(after)));
        rules.push(format!("arguments_{rule}: %json {arguments}"));
    }
    Some(rules.join("\n") + "\n")
}

/// A grammar for an answer without calls, before which there may be reasoning; `None` where there is none, or where `answer` is of a
/// kind that nothing can stand before.
pub fn thoughtful(format: &OutputFormat, answer: &Constraint, special: &dyn Fn(&str) -> Option<u32>) -> Option<String> {
    let mut rules = vec!["%llguidance {}".to_owned(), format!("reply: {}", reply(answer)?)];
    let reasoning = Some(reasoning(format, special, &mut rules)).filter(|reasoning| !reasoning.is_empty())?;
    rules.push(format!("start: {reasoning}reply"));
    Some(rules.join("\n") + "\n")
}

/// The reasoning that may precede the answer.
fn reasoning(format: &OutputFormat, special: &dyn Fn(&str) -> Option<u32>, rules: &mut Vec<String>) -> &'static str {
    let Some(tags) = format.reasoning.filter(|_| !format.reasoned) else { return "" };
    rules.push(match special(tags.close) {
        Some(id) => format!("thought: /(?s:.*)/ <[{id}]> /\\s*/"),
        None => format!("thought: thinking /\\s*/\nthinking[suffix={}]: /(?s:.*)/", quoted(tags.close)),
    });
    if format.in_reasoning {
        return "thought ";
    }
    let open = special(tags.open).map_or_else(|| quoted(tags.open), |id| format!("<[{id}]>"));
    rules.push(format!("opened: {open} thought"));
    "opened? "
}

/// What an answer must be that is no call.
fn reply(constraint: &Constraint) -> Option<String> {
    match constraint {
        Constraint::JsonSchema { schema, strict } => json(schema, *strict),
        Constraint::JsonObject => json(&json!({"type": "object"}), false),
        Constraint::Choice(choices) => Some(choices.iter().map(|choice| quoted(choice)).collect::<Vec<_>>().join(" | ")),
        Constraint::Regex(_) | Constraint::Lark(_) => None,
    }
}

/// `None` for a schema that cannot be honoured; by itself it is refused with the reason.
fn json(schema: &Value, strict: bool) -> Option<String> {
    for_lark(schema, strict).ok().map(|schema| format!("%json {schema}"))
}

/// A text in which marks that are control tokens stand as such.
fn literal(text: &str, marks: &[&str], special: &dyn Fn(&str) -> Option<u32>) -> String {
    let mut parts = Vec::new();
    let mut rest = text;
    let next = |rest: &str| {
        let found = |mark: &&str| Some((rest.find(*mark)?, mark.len(), special(mark)?));
        marks.iter().filter_map(found).min()
    };
    while let Some((start, length, id)) = next(rest) {
        if start > 0 {
            parts.push(quoted(&rest[..start]));
        }
        parts.push(format!("<[{id}]>"));
        rest = &rest[start + length..];
    }
    if !rest.is_empty() || parts.is_empty() {
        parts.push(quoted(rest));
    }
    parts.join(" ")
}

/// A string of Lark, which is one of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The text as a regular expression between slashes.
fn escape(text: &str) -> String {
    text.chars().flat_map(|c| "\\.+*?()|[]{}^$/".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::parse::{Parsers, ReasoningTags};
    fn functions() -> Vec<Signature> {
        vec![Signature { name: "f".into(), arguments: r#"{"type":"object"}"#.into() }]
    }

    fn format(template: &str) -> OutputFormat {
        let parsers = Parsers::detect(template, template);
        OutputFormat { reasoning: parsers.reasoning, calls: Some(parsers.calls), ..OutputFormat::default() }
    }

    #[test]
    fn a_forced_call_is_written_as_the_family_writes_it() {
        let format = format("<tool_call>");
        let shape = Shape { format: &format, forced: true, single: true, answer: None };
        let expected = "%llguidance {}\nstart: (\"<tool_call>\\n{\\\"name\\\": \\\"\" call  \"\")\ncall: call_0\n\
            call_0: \"f\" \"\\\", \\\"arguments\\\": \" arguments_call_0 \"}\\n</tool_call>\"\narguments_call_0: %json {\"type\":\"object\"}\n";
        assert_eq!(lark(&shape, &functions(), &|_| None).unwrap(), expected);
    }

    #[test]
    fn control_tokens_stand_by_their_ids() {
        let format = format("[TOOL_CALLS][ARGS]");
        let shape = Shape { format: &format, forced: false, single: false, answer: None };
        let special = |mark: &str| Some(if mark == "[ARGS]" { 8 } else { 7 });
        let grammar = lark(&shape, &functions(), &special).unwrap();
        assert!(grammar.contains("start: (words (<[7]> \"\" call (\"\" <[7]> call)* \"\" words)*)"), "{grammar}");
        assert!(grammar.contains("call_0: \"f\" <[8]> arguments_call_0 \"\""), "{grammar}");
    }

    #[test]
    fn an_answer_of_a_free_grammar_cannot_stand_beside_calls() {
        let format = format("");
        let answer = Constraint::Lark("start: /a/".into());
        let shape = Shape { format: &format, forced: false, single: false, answer: Some(&answer) };
        assert_eq!(lark(&shape, &functions(), &|_| None), None);
        let answer = Constraint::Choice(vec!["a".into(), "b".into()]);
        let grammar = lark(&Shape { answer: Some(&answer), ..shape }, &functions(), &|_| None).unwrap();
        assert!(grammar.contains("reply: \"a\" | \"b\""), "{grammar}");
    }

    #[test]
    fn an_answer_of_a_form_may_be_thought_about_before() {
        let answer = Constraint::Choice(vec!["a".into()]);
        let open = OutputFormat { reasoning: Some(ReasoningTags::THINK), in_reasoning: true, ..OutputFormat::default() };
        let grammar = thoughtful(&open, &answer, &|_| None).unwrap();
        assert!(grammar.contains("start: thought reply") && grammar.contains("thinking[suffix=\"</think>\"]"), "{grammar}");
        let free = OutputFormat { in_reasoning: false, ..open.clone() };
        assert!(thoughtful(&free, &answer, &|_| Some(9)).unwrap().contains("start: opened? reply"));
        assert_eq!(thoughtful(&OutputFormat { reasoned: true, ..free }, &answer, &|_| None), None);
        assert_eq!(thoughtful(&open, &Constraint::Regex("a".into()), &|_| None), None);
        assert_eq!(thoughtful(&OutputFormat::default(), &answer, &|_| None), None);
    }
}
