use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    let variables = json!({"bos_token": "<s>", "eos_token": "</s>"});
    ChatTemplate::new(source, None, variables.as_object().unwrap().clone()).unwrap()
}

fn render(source: &str, input: &ChatInput<'_>) -> Result<String, TemplateError> {
    template(source).render(input)
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' \
                      }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// `tests/goldens/jinja2.json` is made by `tests/oracle/jinja2_features.py`.
#[test]
fn what_templates_use_renders_as_jinja2_renders_it() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/jinja2.json");
    let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let input = ChatInput {
        messages: expected["messages"].as_array().unwrap(),
        tools: expected["tools"].as_array().map(Vec::as_slice),
        add_generation_prompt: true,
        ..ChatInput::default()
    };
    let mut wrong = Vec::new();
    for case in expected["cases"].as_array().unwrap() {
        let rendered = ChatTemplate::new(case["template"].as_str().unwrap(), None, template("").variables)
            .map_err(TemplateError::Failed)
            .and_then(|template| template.render(&input));
        let expected = match case.get("raises") {
            Some(text) => Err(TemplateError::Raised(text.as_str().unwrap().to_owned())),
            None => Ok(case["text"].as_str().unwrap().to_owned()),
        };
        if rendered != expected {
            wrong.push(format!("{}:\n  ours   {rendered:?}\n  jinja2 {expected:?}", case["name"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_the_request_brings_cannot_replace_the_conversation() {
    let messages = [json!({"role": "user", "content": "hi"})];
    let variables = json!({"messages": [], "eos_token": "!", "extra": [1, 2]});
    let input = ChatInput { messages: &messages, variables: variables.as_object(), ..ChatInput::default() };
    let text =
        render("{{ messages | length }}{{ bos_token }}{{ eos_token }}{{ extra | tojson }}{{ tools is none }}", &input).unwrap();
    assert_eq!(text, "1<s>![1, 2]True");
}

#[test]
fn the_date_is_the_given_one() {
    let input = ChatInput { now: Some(951_782_400), ..ChatInput::default() };
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &input).unwrap(), "29 Feb 2000");
    let now = render("{{ strftime_now('%Y') }}", &ChatInput::default()).unwrap();
    assert!(now.parse::<u32>().unwrap() >= 2024, "{now}");
}

#[test]
fn tools_choose_the_template_made_for_them() {
    let template = ChatTemplate::new("plain", Some("{{ tools | length }} tools"), Map::new()).unwrap();
    assert_eq!(template.render(&ChatInput::default()).unwrap(), "plain");
    let tools = [json!({"type": "function"})];
    assert_eq!(template.render(&ChatInput { tools: Some(&tools), ..ChatInput::default() }).unwrap(), "1 tools");
    assert_eq!(template.tool_source(), Some("{{ tools | length }} tools"));
    let both = ChatTemplate::new("{% if tools %}{% endif %}", None, Map::new()).unwrap();
    assert_eq!(
        (both.tool_source(), ChatTemplate::new("plain", None, Map::new()).unwrap().tool_source()),
        (Some(both.source()), None)
    );
}

#[test]
fn the_last_message_can_be_left_open() {
    let messages = [json!({"role": "user", "content": "Say it"}), json!({"role": "assistant", "content": "It is "})];
    let open = ChatInput { messages: &messages, continue_final_message: true, ..ChatInput::default() };
    assert_eq!(render(CHATML, &open).unwrap(), "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\nIt is ");
    // A template that trims gives back the trimmed text.
    assert_eq!(render("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", &open).unwrap(), "[Say it][It is");

    let both = ChatInput { add_generation_prompt: true, ..open };
    assert!(matches!(render(CHATML, &both), Err(TemplateError::Continue(_))));
    assert!(matches!(render("{{ messages[0].content }}", &open), Err(TemplateError::Continue(_))));
    let parts = [json!({"role": "assistant", "content": [{"type": "text", "text": "Half"}]})];
    let open = ChatInput { messages: &parts, continue_final_message: true, ..ChatInput::default() };
    assert_eq!(render("<{{ messages[0].content[0].text }}>", &open).unwrap(), "<Half");
    assert!(matches!(render("x", &ChatInput { messages: &[], ..open }), Err(TemplateError::Continue(_))));
}

#[test]
fn a_template_that_does_not_fit_is_an_error_that_says_where() {
    let messages = [json!({"role": "user"})];
    let error = render(
        "{% for m in messages %}\n{{ '<' + m.content }}{% endfor %}",
        &ChatInput { messages: &messages, ..ChatInput::default() },
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("chat template") && error.contains("line 2"), "{error}");
    for broken in ["{% if %}", "{{ x", "{% for a in b %}", "{% nonsense %}", "{{ 'x' | nofilter }}"] {
        let made = ChatTemplate::new(broken, None, Map::new());
        let failed = made.is_err() || made.is_ok_and(|template| template.render(&ChatInput::default()).is_err());
        assert!(failed, "{broken}");
    }
}

#[test]
fn runaway_templates_end() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% set ns = namespace(x='x') %}{% for a in range(99999) %}{% for b in range(99999) %}{% set ns.x = 'y' %}{% endfor %}{% endfor %}",
    ] {
        let error = render(source, &ChatInput::default()).unwrap_err();
        assert!(matches!(error, TemplateError::Failed(_)), "{error}");
    }
}

#[test]
fn data_nested_too_deep_is_an_error() {
    let mut value = json!(1);
    for _ in 0..400 {
        value = json!([value]);
    }
    let messages = [json!({"role": "user", "content": value})];
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    for source in ["{{ messages | tojson }}", "{{ messages }}"] {
        assert!(matches!(render(source, &input), Err(TemplateError::Failed(_))), "{source}");
    }
}

#[test]
fn a_tag_that_never_ends_is_an_error_not_a_panic() {
    for source in ["{%}", "{% ", "a {%}", "{%%}", "{%-%}"] {
        assert!(ChatTemplate::new(source, None, serde_json::Map::new()).is_err(), "{source}");
    }
}
