//! A feedback as the API shows it.

use serde_json::{Value, json};
use tidemill_store::records::Feedback;

/// The object; times are in seconds since 1970.
pub fn to_json(feedback: &Feedback) -> Value {
    json!({
        "id": feedback.id,
        "object": "feedback",
        "created": feedback.created.div_euclid(1_000_000),
        "updated": feedback.updated.div_euclid(1_000_000),
        "revision": feedback.revision,
        "withdrawn": feedback.withdrawn,
        "target": feedback.target,
        "target_kind": feedback.target_kind.as_str(),
        "kind": feedback.kind.as_str(),
        "metric": feedback.metric,
        "value": feedback.value,
        "number": feedback.number,
        "author": feedback.author,
        "source": feedback.source,
        "latency_ms": feedback.latency_ms,
        "tags": feedback.tags,
        "task_id": feedback.task_id,
    })
}
