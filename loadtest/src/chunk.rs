//! What a stream chunk says, read by looking for its keys instead of parsing it: the generator shares its cores with the
//! server it measures.
//!
//! Looking for `"key":` is exact, because inside a JSON string every quote is escaped: the bytes `"key":` cannot be text.

/// Token counts as the server reports them in its usage chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
}

/// What one payload means for the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chunk {
    /// It carries generated text.
    pub has_content: bool,
    /// It reports usage.
    pub usage: Option<Usage>,
    /// It is an error object.
    pub is_error: bool,
    /// It is the end mark.
    pub is_done: bool,
}

impl Chunk {
    /// Reads the payload of a `data:` line.
    pub fn read(data: &[u8]) -> Self {
        if data == b"[DONE]" {
            return Self { is_done: true, ..Self::default() };
        }
        Self {
            has_content: ["text", "content", "reasoning_content", "reasoning"]
                .iter()
                .any(|key| values(data, key).any(|value| value.first() == Some(&b'"') && value.get(1) != Some(&b'"'))),
            usage: values(data, "usage").find(|value| value.first() == Some(&b'{')).and_then(|value| {
                Some(Usage {
                    prompt_tokens: number(value, "prompt_tokens")?,
                    completion_tokens: number(value, "completion_tokens")?,
                })
            }),
            is_error: values(data, "error").any(|value| matches!(value.first(), Some(b'{' | b'"'))),
            is_done: false,
        }
    }
}

/// The bytes from each value of `key` on.
fn values<'a>(data: &'a [u8], key: &'a str) -> impl Iterator<Item = &'a [u8]> {
    let mut rest = data;
    std::iter::from_fn(move || {
        loop {
            let at = rest.windows(key.len() + 2).position(|window| {
                window.first() == Some(&b'"') && window.last() == Some(&b'"') && &window[1..=key.len()] == key.as_bytes()
            })?;
            rest = &rest[at + key.len() + 2..];
            let value = rest.trim_ascii_start();
            if let Some(value) = value.strip_prefix(b":") {
                return Some(value.trim_ascii_start());
            }
        }
    })
}

fn number(data: &[u8], key: &str) -> Option<u64> {
    let value = values(data, key).next()?;
    let digits = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_and_chat_chunks_with_text_have_content() {
        for data in [
            r#"{"choices":[{"text":" the","index":0,"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#"{"choices": [{"index": 0, "delta": {"role": "assistant", "content": "\"text\":\"\""}}]}"#,
            r#"{"choices":[{"delta":{"content":null,"reasoning_content":"so"}}]}"#,
        ] {
            let chunk = Chunk::read(data.as_bytes());
            assert!(chunk.has_content && !chunk.is_error && chunk.usage.is_none(), "{data}");
        }
    }

    #[test]
    fn role_finish_and_empty_chunks_have_none() {
        for data in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#,
            r#"{"choices":[{"text":"","finish_reason":"length"}]}"#,
            r#"{"choices":[],"model":"text"}"#,
        ] {
            assert!(!Chunk::read(data.as_bytes()).has_content, "{data}");
        }
    }

    #[test]
    fn usage_is_read_in_any_key_order_and_beside_other_counts() {
        let data = br#"{"choices":[],"usage":{"completion_tokens":64,"prompt_tokens": 131,"total_tokens":195,
            "prompt_tokens_details":{"cached_tokens":16}}}"#;
        assert_eq!(Chunk::read(data).usage, Some(Usage { prompt_tokens: 131, completion_tokens: 64 }));
    }

    #[test]
    fn errors_and_the_end_mark_are_told_from_text_about_errors() {
        assert!(Chunk::read(br#"{"error":{"message":"context too long"}}"#).is_error);
        assert!(!Chunk::read(br#"{"choices":[{"text":"an \"error\": {"}],"error":null}"#).is_error);
        assert!(Chunk::read(b"[DONE]").is_done);
    }
}
