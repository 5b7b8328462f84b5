//! Argilla: dataset settings and records as its Python SDK (2.x) writes and reads them. What its annotators said is read in
//! [`response`].
//!
//! A record's id is our task's; which of our answers is `answer1` is in metadata that annotators do not see.

mod response;

pub use response::read_records;

use crate::interchange::{first_is_a, transcript};
use serde_json::{Value, json};
use tidemill_store::label::{Queue, Task};

/// For feedback and for ids of judgements.
pub const TOOL: &str = "argilla";

/// A dataset's settings, for `rg.Settings.from_json`.
pub fn settings(queue: &Queue) -> Value {
    let field = |name: &str, title: &str, kind: &str| json!({"name": name, "title": title, "required": true, "type": kind, "settings": {"type": kind, "use_markdown": true}});
    let option = |value: &str, text: &str| json!({"value": value, "text": text});
    json!({
        "guidelines": if queue.guidelines.trim().is_empty() { Value::Null } else { json!(queue.guidelines) },
        "fields": [field("prompt", "Prompt", "chat"), field("answer1", "Answer 1", "text"), field("answer2", "Answer 2", "text")],
        "questions": [
            {
                "name": "preference",
                "title": "Which answer is better?",
                "required": true,
                "type": "label_selection",
                "settings": {
                    "type": "label_selection",
                    "options": [
                        option("answer1", "Answer 1"), option("answer2", "Answer 2"), option("tie", "Tie"), option("both_bad", "Both bad"),
                    ],
                    "visible_options": 4,
                },
            },
            {"name": "comment", "title": "Why?", "required": false, "type": "text", "settings": {"type": "text", "use_markdown": false}},
        ],
        "vectors": [],
        "metadata": [{
            "name": "tidemill_answer1",
            "title": "tidemill_answer1",
            "visible_for_annotators": false,
            "settings": {"type": "terms", "values": ["a", "b"], "visible_for_annotators": false},
        }],
        "allow_extra_metadata": true,
        "distribution": {"strategy": "overlap", "min_submitted": queue.overlap.max(1)},
        "mapping": null,
    })
}

/// A record, for `rg.Record.from_dict` and `dataset.records.from_json`.
pub fn record(queue: &Queue, task: &Task) -> Value {
    let a_first = first_is_a(task.id);
    let (answer1, answer2) = if a_first { (&task.answer_a, &task.answer_b) } else { (&task.answer_b, &task.answer_a) };
    let prompt: Vec<Value> =
        transcript::turns(&task.prompt).into_iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({
        "id": task.id,
        "fields": {"prompt": prompt, "answer1": answer1, "answer2": answer2},
        "metadata": {"tidemill_answer1": if a_first { "a" } else { "b" }, "tidemill_queue": queue.name},
        "suggestions": {},
        "responses": {},
        "vectors": {},
    })
}

#[cfg(test)]
mod tests;
