//! What Argilla's annotators said, in the three forms that Argilla gives it out.
//!
//! - The API's records (`GET /api/v1/datasets/{id}/records?include=responses`): everything, with times.
//! - The SDK's `dataset.records.to_list(flatten=True)`: without times, so that the last import stands.
//! - The SDK's `dataset.records.to_json(path)`: without the status, too. A draft there looks like an answer; the caller has to say that
//!   there are none.

use crate::interchange::{Choice, Reading, Refusal, first_is_a, timestamp};
use serde_json::Value;
use std::collections::BTreeMap;
use tidemill_store::label::{External, Outcome};
use uuid::Uuid;

/// One user's answers to one record.
#[derive(Default)]
struct Response<'a> {
    preference: Option<&'a Value>,
    comment: Option<&'a Value>,
    status: Option<&'a str>,
    updated_at: Option<&'a str>,
}

/// Reads records with their responses. `all_submitted`: what has no status was submitted.
pub fn read_records(records: &[Value], all_submitted: bool) -> Reading {
    let mut reading = Reading::default();
    for (index, record) in records.iter().enumerate() {
        let (id, place) = match task_id(record) {
            Ok(id) => (id, format!("record {id}")),
            Err(message) => {
                reading.refused.push(Refusal::new(format!("entry {index}"), message));
                continue;
            }
        };
        match about(record, id).and_then(|first_is_a| Ok((first_is_a, responses(record)?))) {
            Ok((_, responses)) if responses.is_empty() => reading.silent += 1,
            Ok((first_is_a, responses)) => {
                for (user, response) in responses {
                    match judgement(id, first_is_a, &user, &response, all_submitted) {
                        Ok(judgement) => reading.judgements.push(judgement),
                        Err(message) => reading.refused.push(Refusal::new(format!("{place}, user {user}"), message)),
                    }
                }
            }
            Err(message) => reading.refused.push(Refusal::new(place, message)),
        }
    }
    reading
}

fn task_id(record: &Value) -> Result<Uuid, String> {
    // The API calls the id that we gave `external_id`, and has one of its own beside it.
    let id = ["external_id", "id"].into_iter().filter_map(|name| record.get(name)).find(|id| !id.is_null());
    let id = id.ok_or("The record has no `id`.")?;
    id.as_str()
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| format!("The record's id {id} is not the id of a task. Import the queue's own export into Argilla."))
}

fn about(record: &Value, task: Uuid) -> Result<bool, String> {
    let answer1 = record.pointer("/metadata/tidemill_answer1").or_else(|| record.get("tidemill_answer1"));
    match answer1 {
        None | Some(Value::Null) => Ok(first_is_a(task)),
        Some(Value::String(answer)) if answer == "a" => Ok(true),
        Some(Value::String(answer)) if answer == "b" => Ok(false),
        Some(other) => Err(format!("`tidemill_answer1` is {other}, neither \"a\" nor \"b\".")),
    }
}

/// By user, so that several questions of one user come together and the order is always the same.
fn responses(record: &Value) -> Result<BTreeMap<String, Response<'_>>, String> {
    match record.get("responses") {
        Some(Value::Array(responses)) => from_api(responses),
        Some(Value::Object(questions)) => from_nested(questions),
        None if record.as_object().is_some_and(|record| record.keys().any(|key| key.ends_with(".responses"))) => {
            from_flat(record)
        }
        // Flattened, and nobody has answered yet.
        None if record.get("prompt").is_some() => Ok(BTreeMap::new()),
        _ => Err("There are no responses. Fetch the records with `include=responses`.".to_owned()),
    }
}

fn user(id: Option<&Value>) -> Result<String, String> {
    id.and_then(Value::as_str).map(str::to_owned).ok_or_else(|| "A response has no `user_id`.".to_owned())
}

fn from_api(responses: &[Value]) -> Result<BTreeMap<String, Response<'_>>, String> {
    responses
        .iter()
        .map(|response| {
            let value = |question: &str| response.get("values")?.get(question)?.get("value");
            let text = |name: &str| response.get(name).and_then(Value::as_str);
            let (preference, comment) = (value("preference"), value("comment"));
            Ok((
                user(response.get("user_id"))?,
                Response { preference, comment, status: text("status"), updated_at: text("updated_at") },
            ))
        })
        .collect()
}

fn from_nested(questions: &serde_json::Map<String, Value>) -> Result<BTreeMap<String, Response<'_>>, String> {
    let mut by_user: BTreeMap<String, Response<'_>> = BTreeMap::new();
    for (question, responses) in questions {
        for response in responses.as_array().map(Vec::as_slice).unwrap_or_default() {
            let entry = by_user.entry(user(response.get("user_id"))?).or_default();
            entry.set(question, response.get("value"), response.get("status"));
        }
    }
    Ok(by_user)
}

fn from_flat(record: &Value) -> Result<BTreeMap<String, Response<'_>>, String> {
    let mut by_user: BTreeMap<String, Response<'_>> = BTreeMap::new();
    for question in ["preference", "comment"] {
        let column = |name: String| record.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let values = column(format!("{question}.responses"));
        let users = column(format!("{question}.responses.users"));
        let statuses = column(format!("{question}.responses.status"));
        if values.len() != users.len() || (values.len() != statuses.len() && !statuses.is_empty()) {
            return Err(format!("`{question}.responses` and its users and statuses have different lengths."));
        }
        for (index, (value, id)) in values.iter().zip(users).enumerate() {
            by_user.entry(user(Some(id))?).or_default().set(question, Some(value), statuses.get(index));
        }
    }
    Ok(by_user)
}

impl<'a> Response<'a> {
    fn set(&mut self, question: &str, value: Option<&'a Value>, status: Option<&'a Value>) {
        match question {
            "preference" => self.preference = value,
            "comment" => self.comment = value,
            // A question that the team added to the dataset.
            _ => return,
        }
        // One response has one status; it stands beside each of its answers.
        self.status = self.status.or(status.and_then(Value::as_str));
    }
}

fn judgement(
    task_id: Uuid,
    first_is_a: bool,
    user: &str,
    response: &Response<'_>,
    all_submitted: bool,
) -> Result<External, String> {
    let choice = match response.preference {
        None | Some(Value::Null) => None,
        Some(value) => Some(match value.as_str() {
            Some("answer1") => Choice::First,
            Some("answer2") => Choice::Second,
            Some("tie") => Choice::Tie,
            Some("both_bad") => Choice::BothBad,
            _ => return Err(format!("`preference` is {value}, none of answer1, answer2, tie, both_bad.")),
        }),
    };
    let outcome = match (response.status, choice) {
        (Some("submitted"), Some(choice)) => Outcome::Judged(choice.verdict(first_is_a)),
        (Some("submitted"), None) => return Err("Submitted without an answer to `preference`.".to_owned()),
        (Some("draft"), _) => Outcome::Open,
        (Some("discarded"), _) => Outcome::Skipped,
        (Some(other), _) => return Err(format!("The status '{other}' is unknown: submitted, draft and discarded are known.")),
        (None, Some(choice)) if all_submitted => Outcome::Judged(choice.verdict(first_is_a)),
        (None, None) if all_submitted => Outcome::Open,
        (None, _) => {
            return Err("The response has no status, so that a draft cannot be told from an answer. Export with \
                        `records.to_list(flatten=True)`, or say that all responses were submitted."
                .to_owned());
        }
    };
    let time = |text: &str| timestamp::microseconds(text).ok_or_else(|| format!("`updated_at` is '{text}', not a time."));
    let finished = response.updated_at.map(time).transpose()?;
    Ok(External {
        tool: super::TOOL,
        // Argilla keeps one response per user and record.
        id: format!("{task_id}/{user}"),
        version: finished,
        task_id,
        annotator: format!("{}:{user}", super::TOOL),
        outcome,
        comment: response.comment.and_then(Value::as_str).filter(|text| !text.trim().is_empty()).map(str::to_owned),
        a_is_left: first_is_a,
        finished,
        latency_ms: None,
    })
}
