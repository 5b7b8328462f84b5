use super::*;
use serde_json::json;

#[test]
fn each_endpoint_names_person_and_conversation_in_its_own_way() {
    let body = json!({
        "user": "u", "safety_identifier": "s", "metadata": {"conversation_id": "m", "user_id": "a"}, "tidemill": {"conversation": "c"},
    });
    assert_eq!(Shape::Chat.keys(&body), (Some("s"), Some("c")));
    assert_eq!(Shape::Message.keys(&body), (Some("a"), None));
    assert_eq!(Shape::Response.keys(&json!({"user": "u", "metadata": {"conversation_id": "m"}})), (Some("u"), Some("m")));
    assert_eq!(Shape::Completion.keys(&json!({"user": "", "tidemill": {"conversation": 7}})), (None, None));
}

#[test]
fn a_variants_defaults_are_written_as_each_endpoint_has_them_and_only_where_the_request_is_silent() {
    let defaults = json!({"temperature": 1.5, "max_tokens": 9, "presence_penalty": 0.5});
    let variant = Variant { defaults: defaults.as_object().unwrap().clone(), ..Variant::plain("v") };
    let written = |shape: Shape, mut body: Value| {
        shape.write(body.as_object_mut().unwrap(), &variant);
        body
    };
    let base = json!({"model": "v", "temperature": 1.5, "presence_penalty": 0.5});
    let with = |key: &str, value: Value| {
        let mut all = base.clone();
        all[key] = value;
        all
    };
    assert_eq!(written(Shape::Chat, json!({"model": "p", "temperature": null})), with("max_tokens", json!(9)));
    assert_eq!(written(Shape::Chat, json!({"max_completion_tokens": 3})), with("max_completion_tokens", json!(3)));
    assert_eq!(written(Shape::Response, json!({})), with("max_output_tokens", json!(16)));
    assert_eq!(written(Shape::Message, json!({"max_tokens": 5})), json!({"model": "v", "max_tokens": 5, "temperature": 1.0}));
}

#[test]
fn what_is_the_variants_fault_and_what_is_not() {
    let coded = |status: u16, code| ApiError::client(StatusCode::from_u16(status).unwrap(), Some(code), "");
    for (error, fault) in [
        (ApiError::model_not_found("m"), Fault::Variant),
        (ApiError::fault("m"), Fault::Variant),
        (ApiError::unavailable(Some("model_loading"), "m", 1), Fault::Variant),
        (coded(504, "upstream_timeout"), Fault::Variant),
        (coded(429, "upstream_rate_limited"), Fault::Variant),
        (ApiError::unavailable(Some("queue_full"), "m", 1), Fault::Elsewhere),
        (coded(504, "deadline_exceeded"), Fault::Elsewhere),
        (coded(429, "rate_limit_exceeded"), Fault::Elsewhere),
        (coded(403, "model_not_allowed"), Fault::Elsewhere),
        (coded(404, "item_not_found"), Fault::Request),
        (ApiError::context_length(1, 2, None, "messages"), Fault::Request),
    ] {
        assert_eq!(Fault::of(&error), fault, "{error:?}");
    }
}
