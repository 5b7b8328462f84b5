//! Both tools behind one word, and a reading into a queue.

use crate::interchange::{Reading, Refusal, Summary, argilla, label_studio};
use serde_json::Value;
use tidemill_store::label::{LabelError, Labels, Queue, Task};

/// Whose files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Label Studio's tasks and its JSON export.
    LabelStudio,
    /// Records as Argilla's SDK and API have them.
    Argilla,
}

impl Format {
    /// A task as the tool takes it.
    pub fn task(self, queue: &Queue, task: &Task) -> Value {
        match self {
            Format::LabelStudio => label_studio::task(queue, task),
            Format::Argilla => argilla::record(queue, task),
        }
    }

    /// What a project or dataset is made from: for Label Studio the body of `POST /api/projects`, for Argilla the settings.
    pub fn project(self, queue: &Queue) -> Value {
        match self {
            Format::LabelStudio => label_studio::project(queue),
            Format::Argilla => argilla::settings(queue),
        }
    }

    /// Reads a file: a list, or the API's `{"items": […]}`. `Err`: it is neither.
    pub fn read(self, file: &Value, all_submitted: bool) -> Result<Reading, &'static str> {
        let items = match self {
            Format::LabelStudio => {
                file.as_array().ok_or("Label Studio's JSON export is a list of tasks; this is something else.")
            }
            Format::Argilla => file
                .as_array()
                .or_else(|| file.get("items").and_then(Value::as_array))
                .ok_or("Argilla's records are a list, or an object with a list `items`; this is something else."),
        }?;
        Ok(match self {
            Format::LabelStudio => label_studio::read_export(items),
            Format::Argilla => argilla::read_records(items, all_submitted),
        })
    }
}

/// Takes a reading into a queue. `now` in microseconds since 1970; `key_id` is the API key that brought it.
pub async fn take(
    labels: &Labels,
    queue: &Queue,
    reading: Reading,
    now: i64,
    key_id: Option<&str>,
) -> Result<Summary, LabelError> {
    let mut summary = Summary { silent: reading.silent, ..Summary::default() };
    reading.refused.into_iter().for_each(|refusal| summary.refuse(refusal));
    let results = labels.import(queue, &reading.judgements, now, key_id).await?;
    for (judgement, result) in reading.judgements.iter().zip(results) {
        match result {
            Ok(applied) => summary.count(applied),
            Err(refused) => {
                let place = format!("{} {}", judgement.tool, judgement.id);
                summary.refuse(Refusal::new(place, refused.to_string()));
            }
        }
    }
    Ok(summary)
}
