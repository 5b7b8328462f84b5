//! A prompt as people read it.

use serde_json::Value;

/// Who said what, in order. Parts that are not text are named, not shown.
pub fn turns(prompt: &Value) -> Vec<(String, String)> {
    match prompt {
        Value::String(text) => vec![("user".to_owned(), text.clone())],
        Value::Array(messages) => messages.iter().map(turn).collect(),
        other => vec![("user".to_owned(), other.to_string())],
    }
}

fn turn(message: &Value) -> (String, String) {
    let role = message.get("role").and_then(Value::as_str).unwrap_or("user").to_owned();
    let text = match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Vec<_>>().join("\n"),
        _ => String::new(),
    };
    (role, text)
}

fn part(part: &Value) -> String {
    match part.get("text").and_then(Value::as_str) {
        Some(text) => text.to_owned(),
        None => format!("[{}]", part.get("type").and_then(Value::as_str).unwrap_or("part")),
    }
}

/// One text: a lone question as it is, a conversation with each speaker named.
pub fn text(prompt: &Value) -> String {
    let turns = turns(prompt);
    match turns.as_slice() {
        [(role, text)] if role == "user" => text.clone(),
        turns => turns.iter().map(|(role, text)| format!("{role}:\n{text}")).collect::<Vec<_>>().join("\n\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_lone_question_stands_as_it_is_and_a_conversation_names_its_speakers() {
        assert_eq!(text(&json!([{"role": "user", "content": "Why?\n<b>"}])), "Why?\n<b>");
        let talk = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]}]);
        assert_eq!(text(&talk), "system:\nBe brief.\n\nuser:\nHi\n[image_url]");
        assert_eq!(turns(&talk).len(), 2);
    }

    #[test]
    fn odd_prompts_still_show_something() {
        assert_eq!(text(&json!("plain")), "plain");
        assert_eq!(text(&json!([{"role": "assistant", "content": null}])), "assistant:\n");
        assert_eq!(text(&json!([])), "");
        assert_eq!(text(&json!({"x": 1})), "{\"x\":1}");
    }
}
