//! A chat answer as one JSON object.

use crate::openai::chat_output::{ChatChoice, ChatCollected, ToolCall};
use crate::openai::chat_stream::{ChatReport, OwnFields};
use crate::openai::wire::{AnswerHead, TokenLogprob, UsageJson, finite, put};
use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tidemill_engine::{TokenRecord, Tokenizer};

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tidemill: Option<OwnFields<'a>>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    /// Null where there are only calls.
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function<'a>>,
    refusal: Option<()>,
    annotations: [(); 0],
}

#[derive(Serialize)]
struct Call<'a> {
    id: &'a str,
    r#type: &'static str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    name: &'a str,
    arguments: &'a str,
}

impl<'a> Message<'a> {
    fn new(content: &'a str, choice: &'a ChatChoice, legacy: bool) -> Self {
        let function = |call: &'a ToolCall| Function { name: &call.name, arguments: &call.arguments };
        let (older, calls) = if legacy { (choice.calls.first(), &[][..]) } else { (None, choice.calls.as_slice()) };
        Self {
            role: "assistant",
            content: (!content.is_empty() || choice.calls.is_empty()).then_some(content),
            reasoning_content: &choice.reasoning,
            tool_calls: calls.iter().map(|call| Call { id: &call.id, r#type: "function", function: function(call) }).collect(),
            function_call: older.map(function),
            refusal: None,
            annotations: [],
        }
    }
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

/// The body of the response.
pub fn to_json(head: &AnswerHead, report: &ChatReport, tokenizer: &Tokenizer, collected: &ChatCollected) -> Bytes {
    let mut out = head.to_json_prefix();
    let echo = report.echo.as_deref().unwrap_or_default();
    for (index, choice) in collected.choices.iter().enumerate() {
        let content = format!("{echo}{}", choice.text);
        let logprobs = report.logprobs.map(|top| Logprobs {
            content: choice.records.iter().map(|r| TokenLogprob::new(tokenizer, r, top)).collect(),
            refusal: None,
        });
        let json = Choice {
            index,
            message: Message::new(&content, choice, report.legacy_calls),
            logprobs,
            finish_reason: choice.finish.map(|reason| report.finish_reason(reason)),
            token_ids: report.prompt_token_ids.is_some().then_some(choice.token_ids.as_slice()),
            tidemill: report.own_fields(index),
        };
        if index > 0 {
            out.put_u8(b',');
        }
        put(&mut out, &json);
    }
    out.put_slice(b"],\"usage\":");
    put(&mut out, &UsageJson::from(collected.usage));
    if let Some(records) = &collected.prompt_logprobs {
        put_field(&mut out, "prompt_logprobs", &prompt_logprobs(tokenizer, records));
    }
    if let Some(ids) = &report.prompt_token_ids {
        put_field(&mut out, "prompt_token_ids", ids);
    }
    out.put_u8(b'}');
    out.freeze()
}

fn put_field<T: Serialize + ?Sized>(out: &mut BytesMut, name: &str, value: &T) {
    out.put_u8(b',');
    put(out, name);
    out.put_u8(b':');
    put(out, value);
}

/// vLLM's form: per prompt token a map from token id to log-probability, rank and text; the first token has none.
pub fn prompt_logprobs(tokenizer: &Tokenizer, records: &[Option<TokenRecord>]) -> Value {
    let entry = |token: u32, logprob: f32, rank: Option<usize>| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": crate::openai::wire::token_text(tokenizer, token)});
    let one = |record: &Option<TokenRecord>| {
        let Some(record) = record else { return Value::Null };
        let mut map = Map::new();
        // Beyond the listed alternatives a token's rank is not known.
        let rank = record.top.iter().position(|(token, _)| *token == record.token).map(|at| at + 1);
        map.insert(record.token.to_string(), entry(record.token, record.logprob, rank));
        for (at, (token, logprob)) in record.top.iter().enumerate() {
            map.entry(token.to_string()).or_insert_with(|| entry(*token, *logprob, Some(at + 1)));
        }
        Value::Object(map)
    };
    records.iter().map(one).collect()
}
