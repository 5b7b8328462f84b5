//! One request of a batch: a line of its input, and the row that its answer becomes.

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

/// Longest `custom_id`, in characters.
const MAX_CUSTOM_ID: usize = 512;

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The client's own name for it.
    pub custom_id: String,
    /// What the endpoint gets.
    pub body: Value,
}

/// What is wrong with an input, in the form of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// For programs.
    pub code: &'static str,
    /// Names the thing and the fix.
    pub message: String,
    /// The field.
    pub param: Option<&'static str>,
    /// Counted from 1.
    pub line: Option<usize>,
}

impl Problem {
    /// One that is about the whole input.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None, line: None }
    }

    fn field(code: &'static str, param: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param), ..Self::new(code, message) }
    }

    /// In the form of the API.
    pub fn to_json(&self) -> Value {
        json!({ "code": self.code, "line": self.line, "message": self.message, "param": self.param })
    }
}

impl Line {
    /// Reads a line of a batch for `endpoint`.
    pub fn parse(text: &[u8], endpoint: &str) -> Result<Self, Problem> {
        let value: Value = serde_json::from_slice(text)
            .map_err(|error| Problem::new("invalid_json_line", format!("This line is not a JSON object: {error}.")))?;
        let Value::Object(mut line) = value else {
            return Err(Problem::new("invalid_json_line", "This line is not a JSON object."));
        };
        let mut take = |key: &'static str| {
            let missing = || Problem::field("missing_required_parameter", key, format!("Missing required parameter: '{key}'."));
            line.remove(key).filter(|value| !value.is_null()).ok_or_else(missing)
        };
        let (custom_id, method, url, body) = (take("custom_id")?, take("method")?, take("url")?, take("body")?);
        if let Some(key) = line.keys().next() {
            let shown: String = key.chars().take(100).collect();
            return Err(Problem::new("unknown_parameter", format!("Unknown parameter: '{shown}'.")));
        }
        let custom_id = match custom_id {
            Value::String(id) if !id.is_empty() && id.chars().count() <= MAX_CUSTOM_ID => id,
            _ => {
                let message = format!("Invalid 'custom_id': expected a string of 1 to {MAX_CUSTOM_ID} characters.");
                return Err(Problem::field("invalid_custom_id", "custom_id", message));
            }
        };
        if method != "POST" {
            return Err(Problem::field("invalid_method", "method", "Invalid 'method': the only supported value is 'POST'."));
        }
        if url != endpoint {
            let message = format!("Invalid 'url': it must be the batch's endpoint, '{endpoint}'.");
            return Err(Problem::field("mismatched_endpoint", "url", message));
        }
        if !body.is_object() {
            return Err(Problem::field("invalid_body", "body", "Invalid 'body': expected an object."));
        }
        if body.get("stream").is_some_and(|stream| *stream == true) {
            let message = "Invalid 'body.stream': the answers of a batch are not streamed; leave it out.";
            return Err(Problem::field("invalid_body", "body.stream", message));
        }
        if body.get("background").is_some_and(|background| *background == true) {
            let message = "Invalid 'body.background': the batch is the background, and its rows are whole answers; leave it out.";
            return Err(Problem::field("invalid_body", "body.background", message));
        }
        Ok(Self { custom_id, body })
    }

    /// The model that the body names.
    pub fn model(&self) -> Option<&str> {
        self.body.get("model").and_then(Value::as_str)
    }
}

/// The id of a line's row, from which a later look knows the line.
pub fn row_id(batch: Uuid, line: usize) -> String {
    format!("batch_req_{}_{line}", batch.simple())
}

/// The row of a line that got a response, with its end of line. `body` is JSON.
pub fn answered(id: &str, custom_id: &str, status: u16, request_id: &str, body: &[u8]) -> Vec<u8> {
    let flat;
    let body = if body.contains(&b'\n') {
        // Ours never are; but a row is a line.
        flat = serde_json::from_slice::<Value>(body).unwrap_or_default().to_string();
        flat.as_bytes()
    } else {
        body
    };
    let head = format!(
        r#"{{"id":{},"custom_id":{},"response":{{"status_code":{status},"request_id":{},"body":"#,
        json!(id),
        json!(custom_id),
        json!(request_id)
    );
    let mut row = Vec::with_capacity(head.len() + body.len() + 16);
    row.extend_from_slice(head.as_bytes());
    row.extend_from_slice(body);
    row.extend_from_slice(b"},\"error\":null}\n");
    row
}

/// The row of a line that never ran, with its end of line.
pub fn never_ran(id: &str, custom_id: &str, code: &str, message: &str) -> Vec<u8> {
    let row = json!({ "id": id, "custom_id": custom_id, "response": null, "error": { "code": code, "message": message } });
    format!("{row}\n").into_bytes()
}

/// Tokens of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    input: u64,
    cached: u64,
    output: u64,
    reasoning: u64,
}

impl Tokens {
    /// Adds.
    pub fn add(&mut self, other: Self) {
        self.input += other.input;
        self.cached += other.cached;
        self.output += other.output;
        self.reasoning += other.reasoning;
    }

    /// In the form of the API.
    pub fn to_json(self) -> Value {
        json!({
            "input_tokens": self.input,
            "input_tokens_details": { "cached_tokens": self.cached },
            "output_tokens": self.output,
            "output_tokens_details": { "reasoning_tokens": self.reasoning },
            "total_tokens": self.input + self.output,
        })
    }

    /// Of a response, as any of the endpoints writes it.
    pub fn of(body: &[u8]) -> Self {
        serde_json::from_slice::<Answer>(body).map(|answer| answer.tokens()).unwrap_or_default()
    }
}

#[derive(Deserialize, Default)]
struct Answer {
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Usage {
    #[serde(alias = "prompt_tokens")]
    input_tokens: u64,
    #[serde(alias = "prompt_tokens_details")]
    input_tokens_details: Option<Details>,
    #[serde(alias = "completion_tokens")]
    output_tokens: u64,
    #[serde(alias = "completion_tokens_details")]
    output_tokens_details: Option<Details>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Details {
    cached_tokens: u64,
    reasoning_tokens: u64,
}

impl Answer {
    fn tokens(&self) -> Tokens {
        let Some(usage) = &self.usage else { return Tokens::default() };
        Tokens {
            input: usage.input_tokens,
            cached: usage.input_tokens_details.as_ref().map_or(0, |details| details.cached_tokens),
            output: usage.output_tokens,
            reasoning: usage.output_tokens_details.as_ref().map_or(0, |details| details.reasoning_tokens),
        }
    }
}

/// What a row says of its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Which line, counted from 1.
    pub line: usize,
    /// How it went.
    pub result: LineResult,
    /// Of the answer.
    pub tokens: Tokens,
}

/// How a line went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineResult {
    /// Answered.
    Completed,
    /// Answered with an error.
    Failed,
    /// The batch ended before.
    NeverRan,
}

impl Row {
    /// Reads a row that was written earlier; `None` when it is damaged.
    pub fn parse(text: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Written {
            id: String,
            response: Option<Response>,
        }
        #[derive(Deserialize)]
        struct Response {
            status_code: u16,
            body: Answer,
        }
        let written: Written = serde_json::from_slice(text).ok()?;
        let line = written.id.rsplit('_').next()?.parse().ok()?;
        Some(match written.response {
            None => Self { line, result: LineResult::NeverRan, tokens: Tokens::default() },
            Some(response) => Self {
                line,
                result: if response.status_code < 400 { LineResult::Completed } else { LineResult::Failed },
                tokens: response.body.tokens(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "/v1/chat/completions";

    #[test]
    fn each_fault_of_a_line_has_its_code_and_field() {
        let good = json!({"custom_id": "a", "method": "POST", "url": URL, "body": {"model": "m"}});
        let line = Line::parse(good.to_string().as_bytes(), URL).unwrap();
        assert_eq!((line.custom_id.as_str(), line.model()), ("a", Some("m")));
        let with = |key: &str, value: Value| {
            let mut line = good.clone();
            line[key] = value;
            Line::parse(line.to_string().as_bytes(), URL).unwrap_err()
        };
        for (key, value, code, param) in [
            ("custom_id", json!(null), "missing_required_parameter", "custom_id"),
            ("custom_id", json!(""), "invalid_custom_id", "custom_id"),
            ("custom_id", json!("x".repeat(513)), "invalid_custom_id", "custom_id"),
            ("method", json!("GET"), "invalid_method", "method"),
            ("url", json!("/v1/embeddings"), "mismatched_endpoint", "url"),
            ("body", json!([]), "invalid_body", "body"),
            ("body", json!({"stream": true}), "invalid_body", "body.stream"),
            ("body", json!({"background": true}), "invalid_body", "body.background"),
        ] {
            let problem = with(key, value);
            assert_eq!((problem.code, problem.param), (code, Some(param)));
        }
        assert_eq!(with("colour", json!(1)).code, "unknown_parameter");
        assert_eq!(Line::parse(b"[1]", URL).unwrap_err().code, "invalid_json_line");
        assert_eq!(Line::parse(b"{", URL).unwrap_err().code, "invalid_json_line");
    }

    #[test]
    fn a_row_is_one_line_of_json_and_can_be_read_back() {
        let batch = Uuid::from_u128(7);
        let body = br#"{"usage":{"prompt_tokens":5,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}},"x":"\n"}"#;
        let row = answered(&row_id(batch, 12), "a\"b", 200, "r", body);
        assert_eq!(row.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: Value = serde_json::from_slice(&row).unwrap();
        assert_eq!(
            (&value["custom_id"], &value["response"]["body"]["x"], &value["error"]),
            (&json!("a\"b"), &json!("\n"), &json!(null))
        );
        let tokens = Tokens { input: 5, cached: 2, output: 3, reasoning: 0 };
        assert_eq!(Row::parse(&row), Some(Row { line: 12, result: LineResult::Completed, tokens }));
        assert_eq!(tokens.to_json()["total_tokens"], 8);
        let failed = answered(&row_id(batch, 3), "a", 400, "r", b"{\n\"error\": {}}");
        assert_eq!(Row::parse(&failed).unwrap().result, LineResult::Failed);
        assert_eq!(failed.iter().filter(|byte| **byte == b'\n').count(), 1);
        let never = never_ran(&row_id(batch, 4), "a", "batch_expired", "too late");
        assert_eq!(Row::parse(&never).map(|row| (row.line, row.result)), Some((4, LineResult::NeverRan)));
        for torn in 1..row.len() - 2 {
            assert_eq!(Row::parse(&row[..torn]), None);
        }
    }

    #[test]
    fn tokens_are_counted_in_every_endpoints_spelling() {
        let chat = Tokens::of(br#"{"usage":{"prompt_tokens":5,"completion_tokens":3}}"#);
        let responses =
            Tokens::of(br#"{"usage":{"input_tokens":5,"output_tokens":3,"output_tokens_details":{"reasoning_tokens":0}}}"#);
        assert_eq!(chat, responses);
        assert_eq!(Tokens::of(br#"{"usage":{"prompt_tokens":5,"total_tokens":5}}"#).to_json()["total_tokens"], 5);
        assert_eq!(Tokens::of(b"{\"error\":{}}"), Tokens::default());
    }
}
