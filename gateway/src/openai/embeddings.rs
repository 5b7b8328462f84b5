//! `POST /v1/embeddings`: the request, and how vectors are written.

use crate::http::error::ApiError;
use crate::openai::completions::{PromptInput, prompts};
use crate::openai::fields::Fields;
use crate::openai::wire::put;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use serde_json::Value;

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Lists of numbers.
    Float,
    /// Singles in little-endian order, in base64: a third of the bytes.
    Base64,
}

impl Encoding {
    /// The API's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Base64 => "base64",
        }
    }
}

/// An embeddings request whose every field was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingsRequest {
    /// Which model.
    pub model: String,
    /// Each gets a vector, in order.
    pub input: Vec<PromptInput>,
    /// How the vectors are written.
    pub encoding: Encoding,
    /// How long they are, if the request says so.
    pub dimensions: Option<usize>,
    /// Lower runs first.
    pub priority: i32,
}

impl EmbeddingsRequest {
    /// Checks the body.
    pub fn parse(body: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(body)?;
        let model = fields.require("model")?.string()?.to_owned();
        let field = fields.require("input")?;
        let input = prompts(&field)?;
        for (index, text) in input.iter().enumerate() {
            if matches!(text, PromptInput::Text(text) if text.is_empty()) {
                let at = if field.value.is_array() { format!("input.{index}") } else { "input".to_owned() };
                let message = format!("Invalid '{at}': empty string. Expected at least 1 character.");
                return Err(ApiError::invalid(at, "string_below_min_length", message));
            }
        }
        let encoding = match fields.get("encoding_format") {
            None => Encoding::Float,
            Some(field) if field.one_of(&["float", "base64"])? == "base64" => Encoding::Base64,
            Some(_) => Encoding::Float,
        };
        let dimensions = fields.integer("dimensions", 1..=65_536)?.and_then(|n| usize::try_from(n).ok());
        let priority = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.and_then(|p| i32::try_from(p).ok());
        fields.string("user")?;
        fields.finish()?;
        Ok(Self { model, input, encoding, dimensions, priority: priority.unwrap_or(0) })
    }
}

/// The answer's JSON.
pub fn to_json(model: &str, vectors: &[Vec<f32>], encoding: Encoding, tokens: usize) -> Bytes {
    let width = vectors.first().map_or(0, Vec::len);
    let mut out = BytesMut::with_capacity(256 + vectors.len() * (64 + width * 12));
    out.put_slice(b"{\"object\":\"list\",\"data\":[");
    for (index, vector) in vectors.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        out.put_slice(b"{\"object\":\"embedding\",\"index\":");
        put(&mut out, &index);
        out.put_slice(b",\"embedding\":");
        match encoding {
            Encoding::Float => put(&mut out, vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                put(&mut out, &STANDARD.encode(bytes));
            }
        }
        out.put_u8(b'}');
    }
    out.put_slice(b"],\"model\":");
    put(&mut out, model);
    out.put_slice(b",\"usage\":{\"prompt_tokens\":");
    put(&mut out, &tokens);
    out.put_slice(b",\"total_tokens\":");
    put(&mut out, &tokens);
    out.put_slice(b"}}");
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn inputs_are_a_text_texts_tokens_or_lists_of_tokens() {
        let input = |input: Value| EmbeddingsRequest::parse(&json!({"model": "m", "input": input}));
        let (text, tokens) = (PromptInput::Text("a".into()), PromptInput::Tokens(vec![1, 2]));
        assert_eq!(input(json!("a")).unwrap().input, std::slice::from_ref(&text));
        assert_eq!(input(json!(["a", "a"])).unwrap().input, [text.clone(), text]);
        assert_eq!(input(json!([1, 2])).unwrap().input, std::slice::from_ref(&tokens));
        assert_eq!(input(json!([[1, 2], [1, 2]])).unwrap().input, [tokens.clone(), tokens]);
        let long: Vec<&str> = vec!["a"; 2049];
        for (bad, param) in [
            (json!(""), "input"),
            (json!(["a", ""]), "input.1"),
            (json!([]), "input"),
            (json!([[]]), "input.0"),
            (json!(7), "input"),
            (json!(null), "input"),
            (json!(long), "input"),
        ] {
            assert_eq!(input(bad.clone()).unwrap_err().param.as_deref(), Some(param));
        }
        let with = |key: &str, value: Value| {
            let mut body = json!({"model": "m", "input": "a"});
            body[key] = value;
            EmbeddingsRequest::parse(&body)
        };
        assert_eq!(with("encoding_format", json!("base64")).unwrap().encoding, Encoding::Base64);
        for (key, value) in [("encoding_format", json!("int8")), ("dimensions", json!(0)), ("colour", json!(1))] {
            assert_eq!(with(key, value).unwrap_err().param.as_deref(), Some(key));
        }
    }

    #[test]
    fn both_encodings_hold_the_same_singles() {
        let vectors = [vec![0.1_f32, -1.5], vec![f32::MIN_POSITIVE, 3.0]];
        let value: Value = serde_json::from_slice(&to_json("m", &vectors, Encoding::Float, 7)).unwrap();
        assert_eq!(value["data"][0]["embedding"], json!([0.1, -1.5]));
        assert_eq!((&value["data"][1]["index"], &value["usage"]["total_tokens"]), (&json!(1), &json!(7)));
        let value: Value = serde_json::from_slice(&to_json("m", &vectors, Encoding::Base64, 7)).unwrap();
        // 3dcccccd and bfc00000, bytes reversed.
        assert_eq!(value["data"][0]["embedding"], "zczMPQAAwL8=");
    }
}
