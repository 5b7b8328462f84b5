use super::*;
use serde_json::json;

fn body(extra: Value) -> Value {
    let mut body = json!({"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn blocks_become_the_messages_that_templates_read() {
    let request = MessagesRequest::parse(&body(json!({
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Emden"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "wet"}], "is_error": true},
                {"type": "text", "text": "And?"}, {"type": "text", "text": "Well?"}]},
        ],
    })))
    .unwrap();
    assert_eq!(
        Value::Array(request.chat.prompt.messages),
        json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Emden"}}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "Error: wet"},
            {"role": "user", "content": "And?\nWell?"},
        ])
    );
    assert!(request.chat.prompt.add_generation_prompt && !request.thinking && !request.stream);
}

#[test]
fn a_last_turn_of_the_assistants_is_continued() {
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]);
    let prompt = MessagesRequest::parse(&body(json!({"messages": messages}))).unwrap().chat.prompt;
    assert!(prompt.continue_final_message && !prompt.add_generation_prompt);
}

#[test]
fn choices_of_tools_have_other_names_here() {
    let tools = json!([{"name": "f", "input_schema": {"type": "object"}}]);
    let choice = |choice: Value| {
        let chat = MessagesRequest::parse(&body(json!({"tools": tools, "tool_choice": choice}))).unwrap().chat;
        (chat.tool_choice, chat.parallel_tool_calls)
    };
    assert_eq!(choice(json!({"type": "any", "disable_parallel_tool_use": true})), (ToolChoice::Required, false));
    assert_eq!(choice(json!({"type": "tool", "name": "f"})), (ToolChoice::Named("f".into()), true));
    assert_eq!(choice(json!({"type": "none"})), (ToolChoice::None, true));
}

#[test]
fn each_rejection_names_its_path() {
    let messages = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let tool = |tool: Value| json!({"tools": [tool]});
    for (extra, param) in [
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages.0.role"),
        (json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}), "messages"),
        (messages(json!(5)), "messages.0.content"),
        (messages(json!([])), "messages.0.content"),
        (messages(json!([{"type": "image", "source": {}}])), "messages.0.content.0.type"),
        (messages(json!([{"type": "text"}])), "messages.0.content.0.text"),
        (messages(json!([{"type": "tool_result", "content": "x"}])), "messages.0.content.0.tool_use_id"),
        (messages(json!([{"type": "tool_use", "id": "a", "name": "f", "input": {}}])), "messages.0.content.0.type"),
        (json!({"system": 7}), "system"),
        (json!({"temperature": 1.5}), "temperature"),
        (json!({"stop_sequences": [""]}), "stop_sequences.0"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 5}}), "thinking.budget_tokens"),
        (json!({"thinking": {"type": "deep"}}), "thinking.type"),
        (json!({"output_config": {"format": {"type": "xml"}}}), "output_config.format.type"),
        (tool(json!({"name": "f"})), "tools.0.input_schema"),
        (tool(json!({"type": "web_search_20250305", "name": "web_search"})), "tools.0.type"),
        (tool(json!({"name": "a b", "input_schema": {}})), "tools.0.name"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "tool", "name": "f"}}), "tool_choice.name"),
        (json!({"metadata": {"user": "x"}}), "metadata.user"),
        (json!({"max_completion_tokens": 5}), "max_completion_tokens"),
    ] {
        let error = MessagesRequest::parse(&body(extra.clone())).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{extra}: {}", error.message);
    }
}
