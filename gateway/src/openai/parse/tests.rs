use super::*;
use crate::openai::chat_output::{ChatChoice, ToolCall};
use proptest::prelude::*;

const WEATHER: &str =
    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\", \"days\": [1, 2]}}\n</tool_call>";

fn format(calls: CallFormat) -> OutputFormat {
    let schema = serde_json::json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}});
    let function = |name: &str| Function { name: name.to_owned(), schema: Some(schema.clone()) };
    OutputFormat { calls: Some(calls), functions: ["weather", "time"].map(function).into(), ..OutputFormat::default() }
}

fn family(name: &str) -> OutputFormat {
    format(CallFormat::by_name(name).unwrap())
}

fn hermes() -> OutputFormat {
    format(CallFormat::Json(&JsonSyntax::HERMES))
}

/// What the pieces of a text make, joined.
fn joined<'a>(format: &OutputFormat, pieces: impl IntoIterator<Item = &'a str>) -> ChatChoice {
    let mut parser = Parser::new(format, 0);
    let mut deltas = Vec::new();
    for piece in pieces {
        parser.push(piece, false, &mut deltas);
    }
    parser.push("", true, &mut deltas);
    let mut choice = ChatChoice::default();
    for delta in deltas {
        choice.add(delta);
    }
    assert!(parser.pending.is_empty(), "{}", parser.pending);
    choice
}

fn read(format: &OutputFormat, text: &str) -> ChatChoice {
    joined(format, [text])
}

fn calls(choice: &ChatChoice) -> Vec<(&str, &str)> {
    choice.calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect()
}

#[test]
fn a_call_between_marks_is_a_call_and_what_is_around_it_is_content() {
    let choice = read(&hermes(), &format!("Let me look.\n\n{WEATHER}\n{WEATHER}"));
    let arguments = "{\"city\": \"Emden\", \"days\": [1, 2]}";
    assert_eq!(choice.text, "Let me look.");
    assert_eq!(calls(&choice), [("weather", arguments), ("weather", arguments)]);
    let ToolCall { id, .. } = &choice.calls[0];
    assert!(id.len() == 29 && id.starts_with("call_") && *id != choice.calls[1].id, "{id}");
}

#[test]
fn the_shapes_that_models_write_are_understood() {
    for (text, name, arguments) in [
        ("{\"arguments\": {\"a\": 1}, \"name\": \"f\"}", "f", "{\"a\": 1}"),
        ("{\"name\": \"f\"}", "f", "{}"),
        ("{\"name\": \"f\", \"arguments\": null}", "f", "{}"),
        ("{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}", "f", "{\"a\": 1}"),
        ("{\"id\": 7, \"name\": \"f\", \"parameters\": {\"s\": \"}\\\"]\"}, \"x\": [{}]}", "f", "{\"s\": \"}\\\"]\"}"),
        ("{\"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": {}}}", "f", "{}"),
        ("[{\"name\": \"f\", \"arguments\": {}}]", "f", "{}"),
        ("{\"name\": \"\\u0066\", \"arguments\": {}}}", "f", "{}"),
    ] {
        let choice = read(&hermes(), &format!("<tool_call>{text}</tool_call>"));
        assert_eq!((choice.text.as_str(), calls(&choice)), ("", vec![(name, arguments)]), "{text}");
    }
}

#[test]
fn what_is_no_call_stays_content() {
    for text in [
        "a < b and <tool> and <tool_cal",
        "<tool_call>",
        "<tool_call>\nnothing</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": 5}</tool_call>",
        "<tool_call>{\"name\": \"f",
        "{\"name\": \"weather\", \"arguments\": {}}",
        "  spaces around  ",
    ] {
        let choice = read(&hermes(), text);
        assert!(choice.calls.is_empty(), "{text}");
        assert_eq!(choice.text, text);
    }
}

/// Each family's calls, as its models' templates and documentation write them.
const FAMILIES: [(&str, &str); 20] = [
    (
        "hermes",
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>",
    ),
    ("llama3_json", "{\"name\": \"weather\", \"parameters\": {\"city\": \"Emden\"}}; {\"name\": \"time\", \"parameters\": {}}"),
    (
        "llama3_json",
        "<|python_tag|>{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {\"city\": \"Emden\"}}{\"name\": \"time\"}",
    ),
    (
        "mistral",
        "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}, {\"name\": \"time\", \"arguments\": {}}]",
    ),
    (
        "mistral",
        "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}, \"id\": \"D681PevKs\"}, {\"arguments\": {}, \"name\": \"time\"}]",
    ),
    ("mistral_v11", "[TOOL_CALLS]weather[ARGS]{\"city\": \"Emden\"}[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{}"),
    ("mistral_v11", "[TOOL_CALLS]weather{\"city\": \"Emden\"}[TOOL_CALLS]time{}"),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Emden\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Emden\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{\"city\": \"Emden\"}<|tool_call_end|><|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        "granite",
        "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}, {\"name\": \"time\", \"arguments\": {}}]",
    ),
    ("granite", "<tool_call>[{\"arguments\": {\"city\": \"Emden\"}, \"name\": \"weather\"}, {\"name\": \"time\"}]"),
    (
        "phi4_mini_json",
        "functools[{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}, {\"name\": \"time\", \"arguments\": {}}]",
    ),
    (
        "jamba",
        "<tool_calls>[\n {\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}},\n {\"name\": \"time\", \"arguments\": {}}\n]</tool_calls>",
    ),
    (
        "internlm",
        "<|action_start|><|plugin|>\n{\"name\": \"weather\", \"parameters\": {\"city\": \"Emden\"}}<|action_end|><|action_start|><|plugin|>{\"name\": \"time\"}<|action_end|>",
    ),
    ("pythonic", "[weather(city='Emden'), time()]"),
    ("pythonic", "<|python_start|>[weather(city=\"Emden\"), time()]<|python_end|>"),
    (
        "qwen3_coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nEmden\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
    ),
    (
        "glm45",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Emden</arg_value>\n</tool_call>\n<tool_call>time\n</tool_call>",
    ),
    ("xlam", "[{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}, {\"name\": \"time\", \"arguments\": {}}]"),
];

#[test]
fn every_family_is_understood() {
    for (name, text) in FAMILIES {
        let choice = read(&family(name), text);
        // Where the arguments are not JSON in the text, their white space is ours.
        let found: Vec<(&str, String)> = calls(&choice).into_iter().map(|(name, text)| (name, text.replace(' ', ""))).collect();
        let expected = vec![("weather", "{\"city\":\"Emden\"}".to_owned()), ("time", "{}".to_owned())];
        assert_eq!((choice.text.as_str(), found), ("", expected), "{name}: {text}");
    }
}

#[test]
fn an_object_without_marks_is_a_call_only_of_a_known_function_and_alone() {
    for text in [
        "{\"name\": \"Ada\", \"age\": 36}",
        "{\"name\": \"Ada\", \"parameters\": {}}",
        "Sure: {\"name\": \"weather\", \"parameters\": {}}",
        "[1, 2]",
        "[",
        "{",
        "{}",
    ] {
        let choice = read(&family("llama3_json"), text);
        assert_eq!((choice.text.as_str(), choice.calls.len()), (text, 0), "{text}");
    }
}

#[test]
fn a_mark_before_what_is_no_name_stays_content() {
    for (name, text) in [
        ("mistral_v11", "[TOOL_CALLS]not a name{\"a\": 1}"),
        ("mistral_v11", "[TOOL_CALLS]"),
        ("mistral_v11", "[TOOL_CALLS]weather"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>"),
    ] {
        let choice = read(&family(name), text);
        assert_eq!((choice.text.as_str(), choice.calls.len()), (text, 0));
    }
}

#[test]
fn tagged_values_have_the_types_of_their_schema() {
    let text =
        "<tool_call><function=weather><parameter=city>7</parameter><parameter=days>\n[1, 2]\n</parameter></function></tool_call>";
    assert_eq!(calls(&read(&family("qwen3_coder"), text)), [("weather", "{\"city\": \"7\", \"days\": [1,2]}")]);
    // Cut off: what there was.
    let cut = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Emden</arg_value>\n<arg_key>da";
    assert_eq!(calls(&read(&family("glm45"), cut)), [("weather", "{\"city\": \"Emden\"")]);
    for text in ["<tool_call>", "<tool_call></tool_call> x", "[weather(1)]", "[weather", "[other()]"] {
        for name in ["qwen3_coder", "glm45", "pythonic"] {
            let choice = read(&family(name), text);
            assert!(choice.calls.is_empty() || name == "glm45" && text.contains("weather"), "{name}: {text}");
            assert_eq!(choice.text, text, "{name}");
        }
    }
}

#[test]
fn a_cut_off_call_keeps_what_there_was_of_its_arguments() {
    let choice = read(&hermes(), "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"b");
    assert_eq!(calls(&choice), [("f", "{\"a\": \"b")]);
    let choice = read(&hermes(), "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}, nonsense</tool_call> Done.");
    assert_eq!((choice.text.as_str(), calls(&choice)), ("Done.", vec![("f", "{\"a\": 1}")]));
}

#[test]
fn only_the_first_call_counts_where_calls_are_not_parallel() {
    let format = OutputFormat { single_call: true, ..hermes() };
    let choice = read(&format, &format!("{WEATHER}{WEATHER} x"));
    assert_eq!((choice.calls.len(), choice.text.as_str()), (1, "x"));
}

#[test]
fn reasoning_comes_before_content_and_calls() {
    let format = OutputFormat { reasoning: Some(ReasoningTags::THINK), ..hermes() };
    let choice = read(&format, &format!("<think>\nHm: <tool_call>?\n</think>\n\nWell. {WEATHER}"));
    assert_eq!((choice.reasoning.as_str(), choice.text.as_str(), choice.calls.len()), ("Hm: <tool_call>?", "Well.", 1));
    // No marks, marks in the middle, an empty thought, one that never ends.
    for (text, reasoning, content) in [
        ("Hello", "", "Hello"),
        (" <thin", "", " <thin"),
        ("Use <think> and </think>.", "", "Use <think> and </think>."),
        ("<think>\n\n</think>\n\nYes", "", "Yes"),
        ("<think>So", "So", ""),
    ] {
        let choice = read(&format, text);
        assert_eq!((choice.reasoning.as_str(), choice.text.as_str()), (reasoning, content), "{text}");
    }
    // The template wrote the opening mark.
    let open = OutputFormat { in_reasoning: true, ..format };
    for text in ["Hm.\n</think>\nYes", "<think>\nHm.</think>Yes"] {
        let choice = read(&open, text);
        assert_eq!((choice.reasoning.as_str(), choice.text.as_str()), ("Hm.", "Yes"), "{text}");
    }
}

#[test]
fn without_tools_and_reasoning_all_is_content() {
    let text = format!("<think>x</think> {WEATHER}");
    assert_eq!(read(&OutputFormat::default(), &text).text, text);
}

fn record(token: u32) -> TokenRecord {
    TokenRecord { token, logprob: 0.0, processed_logprob: 0.0, top: Vec::new(), processed_top: Vec::new() }
}

#[test]
fn every_token_belongs_to_a_text_or_is_a_mark() {
    let format = OutputFormat { reasoning: Some(ReasoningTags::THINK), ..hermes() };
    let mut parser = Parser::new(&format, 0);
    let (mut texts, mut marks) = (Vec::new(), Vec::new());
    let pieces = [
        "<think>",
        "\n",
        "Hm",
        "</think>",
        "\n\n",
        "",
        "So",
        " <",
        " b",
        "<tool",
        "_call>",
        "{\"name\": \"f\"",
        "}",
        "</tool_call>",
    ];
    for (token, text) in pieces.iter().enumerate() {
        let mut deltas = Vec::new();
        parser.token(record(token as u32), true, text, &mut deltas);
        for delta in deltas {
            let (records, silent) = parser.take_tokens();
            texts.push((delta, records.iter().map(|record| record.token).collect::<Vec<_>>()));
            marks.extend(silent);
        }
    }
    let mut deltas = Vec::new();
    parser.end("", &mut deltas);
    marks.extend(parser.take_tokens().1);
    assert_eq!(deltas, []);
    let of = |wanted: &str| {
        texts
            .iter()
            .find(|(delta, _)| matches!(delta, Delta::Text(text) | Delta::Reasoning(text) if text == wanted))
            .map(|(_, tokens)| tokens.clone())
    };
    assert_eq!((of("Hm"), of("So"), of(" < b")), (Some(vec![2]), Some(vec![5, 6]), Some(vec![7, 8])));
    let mut all: Vec<u32> = texts.iter().flat_map(|(_, tokens)| tokens.clone()).chain(marks.iter().copied()).collect();
    all.sort_unstable();
    assert_eq!(all, (0..pieces.len() as u32).collect::<Vec<_>>());
    assert!([0, 1, 3, 4, 9, 10, 13].iter().all(|mark| marks.contains(mark)), "{marks:?}");
    assert_eq!(parser.reasoning_tokens(), 4);
}

/// Texts out of which answers, whole and broken, are put together.
fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        Just("<think>"),
        Just("</think>"),
        Just("<tool_call>"),
        Just("</tool_call>"),
        Just("{\"name\": \"weather\", \"arguments\": {\"a\": \"}\\\"\"}}"),
        Just("{\"name\": "),
        Just("\"f\""),
        Just("{"),
        Just("}"),
        Just("["),
        Just("]"),
        Just(", "),
        Just("; "),
        Just("\n"),
        Just("  "),
        Just("<"),
        Just("tool"),
        Just("é🌊"),
        Just("\"arguments\": "),
        Just("\"function\": "),
        Just("null"),
        Just("12"),
        Just(WEATHER),
    ];
    proptest::collection::vec(fragment, 0..14).prop_map(|parts| parts.concat())
}

/// The same for the marks of any family.
fn family_fragments() -> impl Strategy<Value = (&'static str, String)> {
    (0..FAMILIES.len()).prop_flat_map(|index| {
        let (name, whole) = FAMILIES[index];
        let mut parts: Vec<String> = CallFormat::by_name(name).unwrap().marks().iter().map(|mark| mark[..].to_owned()).collect();
        let more = [
            "{\"name\": \"weather\", \"arguments\": {}}",
            "weather",
            "{",
            "}",
            "[",
            "]",
            ", ",
            ";",
            "\n",
            " ",
            "{\"a\": 1}",
            "text",
            "```",
            "function",
        ];
        parts.extend(more.map(str::to_owned));
        parts.push(whole.to_owned());
        let fragment = proptest::sample::select(parts);
        proptest::collection::vec(fragment, 0..10).prop_map(move |parts| (name, parts.concat()))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn every_family_means_the_same_however_its_text_is_cut((name, text) in family_fragments(), cut in 0usize..300) {
        let format = family(name);
        let whole = read(&format, &text);
        let characters: Vec<String> = text.chars().map(String::from).collect();
        prop_assert_eq!(joined(&format, characters.iter().map(String::as_str)), whole.clone());
        let cut = (0..=cut.min(text.len())).rev().find(|cut| text.is_char_boundary(*cut)).unwrap_or(0);
        prop_assert_eq!(joined(&format, [&text[..cut], &text[cut..]]), whole);
    }

    #[test]
    fn however_a_text_is_cut_it_means_the_same(text in fragments(), cuts in proptest::collection::vec(0usize..200, 0..12), open: bool) {
        let format = OutputFormat { reasoning: Some(ReasoningTags::THINK), in_reasoning: open, ..hermes() };
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]);
        let whole = read(&format, &text);
        prop_assert_eq!(joined(&format, pieces), whole.clone());
        let characters: Vec<String> = text.chars().map(String::from).collect();
        prop_assert_eq!(joined(&format, characters.iter().map(String::as_str)), whole);
    }
}
