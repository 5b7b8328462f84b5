//! What Label Studio's raters said: its JSON export and its webhooks.

use crate::interchange::{Choice, Reading, Refusal, first_is_a, timestamp};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use tidemill_store::label::{External, Outcome};
use uuid::Uuid;

/// What a webhook tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Annotations were made or changed.
    Judged(Reading),
    /// Annotations are gone; these are their ids as in [`External::id`].
    Deleted(Vec<String>),
    /// Something that is no judgement.
    Other(String),
}

#[derive(Deserialize)]
struct TaskFields {
    id: Option<Value>,
    data: serde_json::Map<String, Value>,
    #[serde(default)]
    meta: Value,
}

#[derive(Deserialize)]
struct Annotation {
    id: i64,
    project: i64,
    #[serde(default)]
    result: Vec<Item>,
    completed_by: Option<Person>,
    #[serde(default)]
    was_cancelled: bool,
    #[serde(default)]
    ground_truth: bool,
    updated_at: String,
    /// Seconds.
    lead_time: Option<f64>,
}

/// Newer versions say the number, older ones and some exports the whole user.
#[derive(Deserialize)]
#[serde(untagged)]
enum Person {
    Number(i64),
    User { id: i64, email: Option<String> },
}

#[derive(Deserialize)]
struct Item {
    #[serde(default)]
    from_name: String,
    #[serde(default)]
    value: Value,
}

/// The task that an annotation is about.
#[derive(Clone, Copy)]
struct About {
    task: Uuid,
    first_is_a: bool,
}

/// Reads a JSON export of a project (`exportType=JSON`): an array of tasks with their annotations.
pub fn read_export(tasks: &[Value]) -> Reading {
    let mut reading = Reading::default();
    for (index, task) in tasks.iter().enumerate() {
        let place = task.get("id").map_or_else(|| format!("entry {index}"), |id| format!("task {id}"));
        let Some(annotations) = task.get("annotations").and_then(Value::as_array) else {
            let message = if task.get("annotation_id").is_some() {
                "This is a JSON-MIN export, which lacks what is needed. Export the project as JSON."
            } else {
                "There is no list `annotations`. Export the project as JSON."
            };
            reading.refused.push(Refusal::new(place, message));
            continue;
        };
        if annotations.is_empty() {
            reading.silent += 1;
            continue;
        }
        match about(task) {
            Ok(about) => annotations.iter().for_each(|annotation| reading.add(&place, about, annotation)),
            Err(message) => reading.refused.push(Refusal::new(place, message)),
        }
    }
    reading
}

/// Reads the body of a webhook. `Err`: what is wrong with it as a whole.
pub fn read_event(body: &Value) -> Result<Event, String> {
    let action = body.get("action").and_then(Value::as_str).ok_or("'action' is missing: this is no webhook of Label Studio.")?;
    let field = |name: &str| {
        body.get(name).ok_or_else(|| format!("'{name}' is missing. Switch on 'Send payload' for this webhook in Label Studio."))
    };
    match action {
        "ANNOTATION_CREATED" | "ANNOTATION_UPDATED" | "ANNOTATIONS_CREATED" => {
            let (annotations, tasks) = (many(field("annotation")?), many(field("task")?));
            let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_i64);
            let by_number: HashMap<i64, &Value> = tasks.iter().filter_map(|task| Some((number(task, "id")?, task))).collect();
            let mut reading = Reading::default();
            for annotation in annotations {
                let task = number(annotation, "task").and_then(|number| by_number.get(&number).copied());
                let number = annotation.get("task");
                let place = format!("task {}", number.unwrap_or(&Value::Null));
                match task.ok_or_else(|| "The task is not in the payload.".to_owned()).and_then(about) {
                    Ok(about) => reading.add(&place, about, annotation),
                    Err(message) => reading.refused.push(Refusal::new(place, message)),
                }
            }
            Ok(Event::Judged(reading))
        }
        "ANNOTATIONS_DELETED" => {
            let number = |value: &Value| value.get("id").and_then(Value::as_i64);
            let project = number(field("project")?).ok_or("'project.id' is not a number.")?;
            let ids = many(field("annotations")?).iter().map(|annotation| number(annotation).map(|id| external_id(project, id)));
            Ok(Event::Deleted(ids.collect::<Option<_>>().ok_or("'annotations[].id' is not a number.")?))
        }
        other => Ok(Event::Other(other.chars().take(100).collect())),
    }
}

/// One value or a list of them: bulk actions send lists.
fn many(value: &Value) -> &[Value] {
    match value {
        Value::Array(values) => values,
        one => std::slice::from_ref(one),
    }
}

fn external_id(project: i64, annotation: i64) -> String {
    format!("{project}/{annotation}")
}

fn about(task: &Value) -> Result<About, String> {
    let task = TaskFields::deserialize(task).map_err(|error| format!("The task cannot be read: {error}."))?;
    let Some(id) = task.data.get("tidemill_task") else {
        let number = task.id.unwrap_or(Value::Null);
        return Err(format!(
            "Task {number} did not come from here: it has no `data.tidemill_task`. Import the queue's own export."
        ));
    };
    let id = id
        .as_str()
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| format!("`data.tidemill_task` is {id}, not the id of a task."))?;
    // What the rater saw is in the meta; tasks that went through a table have lost it, and the rule still holds for them.
    let first_is_a = match task.meta.pointer("/tidemill/answer1") {
        None => first_is_a(id),
        Some(Value::String(answer)) if answer == "a" => true,
        Some(Value::String(answer)) if answer == "b" => false,
        Some(other) => return Err(format!("`meta.tidemill.answer1` is {other}, neither \"a\" nor \"b\".")),
    };
    Ok(About { task: id, first_is_a })
}

impl Reading {
    fn add(&mut self, place: &str, about: About, annotation: &Value) {
        match judgement(about, annotation) {
            Ok(judgement) => self.judgements.push(judgement),
            Err(message) => {
                let number = annotation.get("id").unwrap_or(&Value::Null);
                self.refused.push(Refusal::new(format!("{place}, annotation {number}"), message));
            }
        }
    }
}

fn judgement(about: About, annotation: &Value) -> Result<External, String> {
    let annotation = Annotation::deserialize(annotation).map_err(|error| format!("The annotation cannot be read: {error}."))?;
    let finished = timestamp::microseconds(&annotation.updated_at)
        .ok_or_else(|| format!("`updated_at` is '{}', not a time.", annotation.updated_at))?;
    let annotator = match annotation.completed_by {
        Some(Person::User { email: Some(email), .. }) if !email.is_empty() => format!("{}:{email}", super::TOOL),
        Some(Person::User { id, .. } | Person::Number(id)) => format!("{}:{id}", super::TOOL),
        None => return Err("`completed_by` is missing: nobody made this annotation.".to_owned()),
    };
    let (choice, comment) = chosen(&annotation.result)?;
    let outcome = match choice.map(|choice| choice.verdict(about.first_is_a)) {
        _ if annotation.was_cancelled => Outcome::Skipped,
        Some(verdict) if annotation.ground_truth => Outcome::Gold(verdict),
        Some(verdict) => Outcome::Judged(verdict),
        None => Outcome::Open,
    };
    Ok(External {
        tool: super::TOOL,
        id: external_id(annotation.project, annotation.id),
        version: Some(finished),
        task_id: about.task,
        annotator,
        outcome,
        comment,
        a_is_left: about.first_is_a,
        finished: Some(finished),
        latency_ms: annotation.lead_time.filter(|seconds| seconds.is_finite()).map(milliseconds),
    })
}

fn milliseconds(seconds: f64) -> i64 {
    const DAY: f64 = 86_400.0;
    // In range by the clamp: a page that was open for weeks says no more than one that was open for a day.
    (seconds.clamp(0.0, DAY) * 1000.0).round() as i64
}

/// What the rater chose, and the comment.
fn chosen(items: &[Item]) -> Result<(Option<Choice>, Option<String>), String> {
    let (mut choice, mut comment) = (None, None);
    for item in items {
        let found = match item.from_name.as_str() {
            "comparison" => match item.value.get("selected").and_then(Value::as_str) {
                Some("left") => Choice::First,
                Some("right") => Choice::Second,
                _ => return Err(format!("`comparison` is {}, neither left nor right.", item.value)),
            },
            "verdict" => match item.value.pointer("/choices/0").and_then(Value::as_str).map(normal).as_deref() {
                Some("tie") => Choice::Tie,
                Some("both_bad") => Choice::BothBad,
                _ => return Err(format!("`verdict` is {}, neither tie nor both_bad.", item.value)),
            },
            "comment" => {
                let lines = item.value.get("text").map(many).unwrap_or_default();
                let text = lines.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n");
                comment = (!text.trim().is_empty()).then_some(text);
                continue;
            }
            // A control that the team added to the configuration.
            _ => continue,
        };
        if choice.is_some_and(|earlier| earlier != found) {
            return Err("An answer is selected and a verdict besides: which one is meant? Have the rater clear one.".to_owned());
        }
        choice = Some(found);
    }
    Ok((choice, comment))
}

/// `Both bad` and `both-bad` are `both_bad`: without the alias Label Studio keeps what the button says.
fn normal(choice: &str) -> String {
    choice.trim().to_lowercase().replace([' ', '-'], "_")
}
