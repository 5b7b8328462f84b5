//! Tool calls and reasoning on the wire, streamed and whole.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{Setup, chat, post, says};
use serde_json::{Value, json};
use tidemill::openai::parse::{CallFormat, OutputFormat, ReasoningTags};
use tidemill::openai::response_format::Constrained;
use tidemill::openai::tool_grammar::{Shape, Signature, lark};
use tidemill_engine::{Constraint, for_lark};
use uuid::Uuid;

const CHAT: &str = "/v1/chat/completions";
const CALLS: &str = "Both:\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"time\"}\n</tool_call>";
/// Writes tools and reasons, as Qwen 3's does in essence.
const TEMPLATE: &str = "{% for tool in tools or [] %}<tool_call>: {{ tool | tojson }}\n{% endfor %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# <think> #}";

fn setup(script: &str) -> Setup {
    Setup { script: says(script), template: Some(TEMPLATE), ..Setup::default() }
}

fn tools(extra: Value) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let mut body = chat(json!({"tools": [tool("weather"), tool("time")]}));
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_whole_answer_lists_its_calls() {
    let router = setup(CALLS).router();
    let answer = post(&router, CHAT, tools(json!({}))).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    let message = &choice["message"];
    assert_eq!(message["content"], "Both:");
    let calls = message["tool_calls"].as_array().unwrap();
    let functions: Vec<_> = calls.iter().map(|call| call["function"].clone()).collect();
    assert_eq!(
        functions,
        [json!({"name": "weather", "arguments": "{\"city\": \"Emden\"}"}), json!({"name": "time", "arguments": "{}"})]
    );
    assert!(calls.iter().all(|call| call["type"] == "function" && call["id"].as_str().unwrap().starts_with("call_")));
    assert_ne!(calls[0]["id"], calls[1]["id"]);
}

#[tokio::test]
async fn an_answer_that_is_only_a_call_has_no_content() {
    let router = setup("<tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call>").router();
    let message = post(&router, CHAT, tools(json!({}))).await.json()["choices"][0]["message"].clone();
    assert_eq!((&message["content"], message["tool_calls"].as_array().unwrap().len()), (&Value::Null, 1));
}

#[tokio::test]
async fn a_streams_first_delta_of_a_call_names_it_and_the_others_add_arguments() {
    let router = setup(CALLS).router();
    let chunks = post(&router, CHAT, tools(json!({"stream": true}))).await.chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    let deltas = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"][0].as_object().cloned());
    let mut arguments = vec![String::new(); 2];
    let mut begun = Vec::new();
    for delta in deltas {
        let index = delta["index"].as_u64().unwrap() as usize;
        if delta.contains_key("id") {
            assert_eq!(delta.keys().collect::<Vec<_>>(), ["index", "id", "type", "function"]);
            assert_eq!((begun.len(), &delta["function"]["arguments"]), (index, &json!("")));
            begun.push(delta["function"]["name"].as_str().unwrap().to_owned());
        } else {
            assert_eq!(delta.keys().collect::<Vec<_>>(), ["index", "function"]);
            assert_eq!(delta["function"].as_object().unwrap().keys().collect::<Vec<_>>(), ["arguments"]);
            arguments[index].push_str(delta["function"]["arguments"].as_str().unwrap());
        }
    }
    assert_eq!((begun, arguments), (vec!["weather".into(), "time".into()], vec!["{\"city\": \"Emden\"}".into(), "{}".into()]));
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "Both:");
}

#[tokio::test]
async fn without_tools_nothing_is_a_call() {
    let router = setup(CALLS).router();
    for body in [chat(json!({})), tools(json!({"tool_choice": "none"}))] {
        let choice = post(&router, CHAT, body).await.json()["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(CALLS), &json!("stop")));
    }
}

#[tokio::test]
async fn a_call_that_is_cut_off_finishes_by_length() {
    let router = setup(CALLS).router();
    let choice = post(&router, CHAT, tools(json!({"max_tokens": 70}))).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length");
    let arguments = choice["message"]["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!(!arguments.is_empty() && "{\"city\": \"Emden\"}".starts_with(arguments), "{arguments}");
}

#[tokio::test]
async fn calls_may_be_limited_to_one() {
    let router = setup(CALLS).router();
    let message = post(&router, CHAT, tools(json!({"parallel_tool_calls": false}))).await.json()["choices"][0]["message"].clone();
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn the_older_functions_are_answered_in_their_own_way() {
    let router = setup("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>").router();
    let body = |stream: bool| chat(json!({"functions": [{"name": "f"}], "function_call": "auto", "stream": stream}));
    let choice = post(&router, CHAT, body(false)).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "function_call");
    assert_eq!(choice["message"]["function_call"], json!({"name": "f", "arguments": "{\"a\": 1}"}));
    assert!(choice["message"].get("tool_calls").is_none());
    let chunks = post(&router, CHAT, body(true)).await.chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "function_call");
    let deltas: Vec<_> = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["function_call"].as_object()).collect();
    assert_eq!(deltas[0]["name"], "f");
    let arguments: String = deltas.iter().filter_map(|delta| delta["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"a\": 1}");
}

#[tokio::test]
async fn reasoning_is_apart_from_content_and_counted() {
    let router = setup("<think>\nHm.\n</think>\n\nYes").router();
    let answer = post(&router, CHAT, chat(json!({"logprobs": true, "return_token_ids": true}))).await.json();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["message"]["reasoning_content"], &choice["message"]["content"]), (&json!("Hm."), &json!("Yes")));
    // Every byte is a token here. The reasoning begins with the one that completes its mark, and ends with the closing mark.
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], ">\nHm.\n</think>".len());
    let content: Vec<_> = choice["logprobs"]["content"].as_array().unwrap().iter().map(|entry| entry["token"].clone()).collect();
    assert_eq!(content, ["Y", "e", "s"]);
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), "<think>\nHm.\n</think>\n\nYes".len() + 1);
    let chunks = post(&router, CHAT, chat(json!({"stream": true, "return_token_ids": true}))).await.chunks();
    let of = |key: &str| -> String { chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][key].as_str()).collect() };
    assert_eq!((of("reasoning_content").as_str(), of("content").as_str()), ("Hm.", "Yes"));
    let ids: usize = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).map(Vec::len).sum();
    assert_eq!(ids, choice["token_ids"].as_array().unwrap().len());
}

#[tokio::test]
async fn every_familys_grammar_compiles() {
    let app = setup("x").app();
    let model = app.registry.find_local(None).unwrap();
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false});
    let arguments = for_lark(&schema, true).unwrap();
    let functions = ["weather", "time"].map(|name| Signature { name: name.into(), arguments: arguments.clone() });
    let answer = Constraint::JsonObject;
    for calls in CallFormat::all() {
        for (reasoning, in_reasoning) in [(None, false), (Some(ReasoningTags::THINK), false), (Some(ReasoningTags::THINK), true)]
        {
            let format = OutputFormat { reasoning, in_reasoning, calls: Some(calls), ..OutputFormat::default() };
            for (forced, single, answer) in
                [(true, true, None), (true, false, None), (false, false, None), (false, true, Some(&answer))]
            {
                let shape = Shape { format: &format, forced, single, answer };
                for control_token in [None, Some(258)] {
                    let grammar = lark(&shape, &functions, &|_| control_token).unwrap();
                    let constrained = Constrained { constraint: Constraint::Lark(grammar.clone()), param: "tools".into() };
                    if let Err(error) = model.grammar(&constrained).await {
                        panic!("{} {forced} {single}: {}\n{grammar}", calls.name(), error.message);
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn the_schemas_of_calls_are_honoured_as_those_of_answers_are() {
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": 3}}\n</tool_call>";
    let router = setup(call).router();
    let schema = json!({"type": "object", "properties": {"city": {"oneOf": [{"type": "string"}, {"type": "integer"}]}},
        "required": ["city"], "additionalProperties": false});
    let tool = json!({"type": "function", "function": {"name": "weather", "strict": true, "parameters": schema}});
    let answer = post(&router, CHAT, chat(json!({"tools": [tool], "tool_choice": "required"}))).await.json();
    assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"], "{\"city\": 3}", "{answer}");
    // Beside calls an answer's schema is refused by its own name.
    let format = json!({"type": "json_schema", "json_schema": {"name": "a", "strict": true, "schema": {"type": "object"}}});
    let (status, param, _) = post(&router, CHAT, tools(json!({"response_format": format}))).await.error();
    assert_eq!((status, param.as_deref()), (400, Some("response_format.json_schema.schema.additionalProperties")));
}

#[tokio::test]
async fn an_answer_of_a_form_comes_after_the_reasoning_that_the_prompt_has_opened() {
    const OPENED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    let setup = |script: &str| Setup { script: says(script), template: Some(OPENED), ..Setup::default() };
    let router = setup("Hm.\n</think>\n\n{\"a\": 1}").router();
    let answer = post(&router, CHAT, chat(json!({"response_format": {"type": "json_object"}}))).await.json();
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm."), &json!("{\"a\": 1}")), "{answer}");
    // A regular expression leaves no room for it: what it matches is the answer.
    let answer = post(&setup("yes").router(), CHAT, chat(json!({"guided_regex": "[a-z]{3}"}))).await.json();
    let message = &answer["choices"][0]["message"];
    assert_eq!((message.get("reasoning_content"), &message["content"]), (None, &json!("yes")), "{answer}");
}

#[tokio::test]
async fn an_answer_with_calls_is_recorded_as_it_was_written_and_taken_apart() {
    let app = setup(&format!("<think>Hm.</think>{CALLS}")).app();
    let store = app.store.clone();
    let answer = post(&tidemill::http::router(app), CHAT, tools(json!({}))).await.json();
    let id = Uuid::parse_str(answer["id"].as_str().unwrap().strip_prefix("chatcmpl-").unwrap()).unwrap();
    store.flush().await;
    let recorded = store.inference(id).await.unwrap().unwrap();
    let choice = &recorded.choices[0];
    assert_eq!(choice.output_text.as_deref(), Some(format!("<think>Hm.</think>{CALLS}").as_str()));
    let call = |at: usize, name: &str, arguments: Value| json!({"id": format!("call_{at}"), "type": "function", "function": {"name": name, "arguments": arguments}});
    let calls = [call(0, "weather", json!({"city": "Emden"})), call(1, "time", json!({}))];
    assert_eq!(choice.message, Some(json!({"content": "Both:", "reasoning_content": "Hm.", "tool_calls": calls})));
    assert_eq!(recorded.params.unwrap()["tools"].as_array().unwrap().len(), 2);
}
