//! Tools for chat templates that know nothing of them: signatures in the system message, calls and results as tagged text.
//!
//! The tags are those of Hermes and Qwen, which most models have seen; `parse::JsonSyntax::HERMES` reads them.

use serde_json::{Map, Value, json};

/// The conversation in the words of a template that has only roles and content. `has_system`: it writes system messages.
pub fn without_tool_roles(messages: &[Value], tools: &[Value], has_system: bool) -> Vec<Value> {
    let mut out: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        let content = content(message);
        match message["role"].as_str() {
            Some("tool") => {
                let response = format!("<tool_response>\n{content}\n</tool_response>");
                // Templates want turns to alternate: the results of several calls are one turn.
                match out.last_mut().filter(|last| is_response(last)) {
                    Some(last) => last["content"] = format!("{}\n{response}", self::content(last)).into(),
                    None => out.push(json!({"role": "user", "content": response})),
                }
            }
            Some("assistant") if message["tool_calls"].is_array() => {
                let mut message = message.as_object().cloned().unwrap_or_default();
                let calls = message.shift_remove("tool_calls").unwrap_or_default();
                let calls: Vec<String> = calls.as_array().into_iter().flatten().map(call).collect();
                let gap = if content.is_empty() { "" } else { "\n" };
                message.insert("content".into(), format!("{content}{gap}{}", calls.join("\n")).into());
                out.push(Value::Object(message));
            }
            _ => out.push(message.clone()),
        }
    }
    if !tools.is_empty() {
        introduce(&mut out, &signatures(tools), has_system);
    }
    out
}

fn content(message: &Value) -> &str {
    message["content"].as_str().unwrap_or_default()
}

fn is_response(message: &Value) -> bool {
    message["role"] == "user" && content(message).starts_with("<tool_response>")
}

/// A call of an earlier turn as the model would have written it.
fn call(call: &Value) -> String {
    let mut written = Map::new();
    written.insert("name".into(), call["function"]["name"].clone());
    written.insert("arguments".into(), call["function"]["arguments"].clone());
    format!("<tool_call>\n{}\n</tool_call>", Value::Object(written))
}

fn signatures(tools: &[Value]) -> String {
    let list: Vec<String> = tools.iter().map(Value::to_string).collect();
    format!(
        "# Tools\n\nYou can call functions to fulfil the user's request. Their signatures, one per line:\n<tools>\n{}\n</tools>\n\n\
         To call a function, write its name and its arguments as a JSON object between tags, and nothing after it:\n\
         <tool_call>\n{{\"name\": \"function name\", \"arguments\": {{\"argument\": \"value\"}}}}\n</tool_call>\n\
         What the function returns comes back between <tool_response> tags.",
        list.join("\n")
    )
}

/// Puts `text` at the end of the system message, or where the first message can carry it.
fn introduce(messages: &mut Vec<Value>, text: &str, has_system: bool) {
    let role = if has_system { "system" } else { "user" };
    match messages.first_mut().filter(|first| first["role"] == role) {
        Some(first) if has_system => first["content"] = format!("{}\n\n{text}", content(first)).into(),
        Some(first) => first["content"] = format!("{text}\n\n{}", content(first)).into(),
        None => messages.insert(0, json!({"role": role, "content": text})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Vec<Value> {
        vec![
            json!({"role": "user", "content": "Weather?"}),
            json!({"role": "assistant", "content": "", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Emden"}}},
                {"id": "2", "type": "function", "function": {"name": "time", "arguments": {}}}]}),
            json!({"role": "tool", "tool_call_id": "1", "content": "wet"}),
            json!({"role": "tool", "tool_call_id": "2", "content": "noon"}),
        ]
    }

    #[test]
    fn calls_and_results_become_text_and_turns_alternate() {
        let out = without_tool_roles(&talk(), &[], true);
        assert_eq!(out.iter().map(|m| m["role"].as_str().unwrap()).collect::<Vec<_>>(), ["user", "assistant", "user"]);
        assert_eq!(
            out[1],
            json!({"role": "assistant", "content": "<tool_call>\n{\"name\":\"weather\",\"arguments\":{\"city\":\"Emden\"}}\n</tool_call>\n<tool_call>\n{\"name\":\"time\",\"arguments\":{}}\n</tool_call>"})
        );
        assert_eq!(content(&out[2]), "<tool_response>\nwet\n</tool_response>\n<tool_response>\nnoon\n</tool_response>");
    }

    #[test]
    fn signatures_join_the_system_message_or_become_one() {
        let tools = [json!({"type": "function", "function": {"name": "weather"}})];
        let user = json!({"role": "user", "content": "Hi"});
        let out = without_tool_roles(&[json!({"role": "system", "content": "Be brief."}), user.clone()], &tools, true);
        assert!(
            content(&out[0]).starts_with("Be brief.\n\n# Tools") && content(&out[0]).contains("\"weather\"") && out.len() == 2
        );
        let out = without_tool_roles(std::slice::from_ref(&user), &tools, true);
        assert!(out[0]["role"] == "system" && content(&out[0]).starts_with("# Tools") && out[1] == user);
        let out = without_tool_roles(&[user], &tools, false);
        assert!(out.len() == 1 && content(&out[0]).starts_with("# Tools") && content(&out[0]).ends_with("\n\nHi"));
    }
}
