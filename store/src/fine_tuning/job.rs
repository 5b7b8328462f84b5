//! What a fine-tuning job is.

use serde_json::{Map, Value};
use sqlx::Row;
use sqlx::any::AnyRow;
use uuid::Uuid;

use crate::error::StoreError;
use crate::inferences::parse;

/// Columns of a job, in no order that matters.
pub(super) const COLUMNS: &str = "id, created, key_id, model, base, method, suffix, seed, training_file, validation_file, metadata, result_file, \
     place, state, error, fine_tuned_model, served, has_result, finished, estimated_finish, trained_tokens, step, steps, read_bytes, attempts, evaluated";

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FineTuningState {
    /// Its files are looked through.
    ValidatingFiles,
    /// Waits for its turn, or its process for the card.
    Queued,
    /// Trains.
    Running,
    /// Stands still until somebody resumes it.
    Paused,
    /// Ended; the model is there.
    Succeeded,
    /// Ended; the error says why.
    Failed,
    /// Ended on request.
    Cancelled,
}

impl FineTuningState {
    const ALL: [Self; 7] =
        [Self::ValidatingFiles, Self::Queued, Self::Running, Self::Paused, Self::Succeeded, Self::Failed, Self::Cancelled];
    /// Those in which something is still to be done.
    pub const OPEN: [Self; 4] = [Self::ValidatingFiles, Self::Queued, Self::Running, Self::Paused];

    /// The word in the database, which is the API's where the API has one.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen.
    pub fn ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// A job to be.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTuningDraft {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// The key that made it.
    pub key_id: Option<String>,
    /// The model that learns more: a base model, or one that a job made of it.
    pub model: String,
    /// The base model's name.
    pub base: String,
    /// The method with its hyperparameters, in the form of the API.
    pub method: Value,
    /// Part of the new model's name.
    pub suffix: Option<String>,
    /// Of everything random.
    pub seed: i64,
    /// What is learnt.
    pub training_file: Uuid,
    /// What it is measured on.
    pub validation_file: Option<Uuid>,
    /// The client's own pairs.
    pub metadata: Option<Map<String, Value>>,
    /// The file that will hold the metrics.
    pub result_file: Uuid,
    /// The data directory that has the files, and the training.
    pub place: String,
}

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTuningJob {
    /// What was asked. Once its files are valid, the method's hyperparameters are numbers.
    pub draft: FineTuningDraft,
    /// Where it is.
    pub state: FineTuningState,
    /// Why it failed: an object with `code`, `message`, `param`.
    pub error: Option<Value>,
    /// Name of the new model.
    pub fine_tuned_model: Option<String>,
    /// The new model was not deleted.
    pub served: bool,
    /// The file of metrics is there for clients.
    pub has_result: bool,
    /// When it ended, in microseconds since 1970.
    pub finished: Option<i64>,
    /// When it will, as far as can be told.
    pub estimated_finish: Option<i64>,
    /// Tokens computed.
    pub trained_tokens: Option<u64>,
    /// Steps taken.
    pub step: u64,
    /// All steps; 0 while that is not known.
    pub steps: u64,
    /// How much of what the training says was taken over.
    pub read_bytes: u64,
    /// Processes that ended one after the other without a new step.
    pub attempts: u64,
    /// The step of the last evaluation that was taken over.
    pub evaluated: u64,
}

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTuningEvent {
    /// Counts the job's events from 1.
    pub number: u64,
    /// Microseconds since 1970.
    pub created: i64,
    /// What.
    pub news: News,
}

/// What an event says.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    /// `info`, `warn` or `error`.
    pub level: &'static str,
    /// For people.
    pub message: String,
    /// For programs: metrics of a step, if it is about those.
    pub metrics: Option<Value>,
}

impl News {
    /// Something that is as it should be.
    pub fn info(message: impl Into<String>) -> Self {
        Self { level: "info", message: message.into(), metrics: None }
    }

    /// Something to look at.
    pub fn warn(message: impl Into<String>) -> Self {
        Self { level: "warn", ..Self::info(message) }
    }

    /// Something that ended the job.
    pub fn error(message: impl Into<String>) -> Self {
        Self { level: "error", ..Self::info(message) }
    }

    /// The numbers of a step.
    pub fn metrics(message: impl Into<String>, metrics: Value) -> Self {
        Self { metrics: Some(metrics), ..Self::info(message) }
    }
}

/// A model that can be used as it was after a step.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTuningCheckpoint {
    /// After which step.
    pub step: u64,
    /// Microseconds since 1970.
    pub created: i64,
    /// Its name.
    pub model: String,
    /// In the form of the API.
    pub metrics: Value,
}

pub(super) fn state(id: &str, word: &str) -> Result<FineTuningState, StoreError> {
    let bad = || StoreError::Row { table: "fine-tuning job", id: id.to_owned(), reason: format!("'{word}' is no state") };
    FineTuningState::ALL.into_iter().find(|state| state.as_str() == word).ok_or_else(bad)
}

pub(super) fn read(row: &AnyRow) -> Result<FineTuningJob, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "fine-tuning job", id: id.clone(), reason };
    let uuid = |column: &str, text: &str| Uuid::try_parse(text).map_err(|_| bad(format!("'{column}' is no UUID")));
    let named = |column: &str| -> Result<Uuid, StoreError> { uuid(column, &row.try_get::<String, _>(column)?) };
    let count = |column: &str| -> Result<u64, StoreError> { Ok(row.try_get::<i64, _>(column)?.unsigned_abs()) };
    let flag = |column: &str| -> Result<bool, StoreError> { Ok(row.try_get::<i64, _>(column)? != 0) };
    let validation: Option<String> = row.try_get("validation_file")?;
    Ok(FineTuningJob {
        draft: FineTuningDraft {
            id: named("id")?,
            created: row.try_get("created")?,
            key_id: row.try_get("key_id")?,
            model: row.try_get("model")?,
            base: row.try_get("base")?,
            method: parse(row, "method").map_err(bad)?.unwrap_or_default(),
            suffix: row.try_get("suffix")?,
            seed: row.try_get("seed")?,
            training_file: named("training_file")?,
            validation_file: validation.map(|text| uuid("validation_file", &text)).transpose()?,
            metadata: parse(row, "metadata").map_err(bad)?,
            result_file: named("result_file")?,
            place: row.try_get("place")?,
        },
        state: state(&id, &row.try_get::<String, _>("state")?)?,
        error: parse(row, "error").map_err(bad)?,
        fine_tuned_model: row.try_get("fine_tuned_model")?,
        served: flag("served")?,
        has_result: flag("has_result")?,
        finished: row.try_get("finished")?,
        estimated_finish: row.try_get("estimated_finish")?,
        trained_tokens: row.try_get::<Option<i64>, _>("trained_tokens")?.map(i64::unsigned_abs),
        step: count("step")?,
        steps: count("steps")?,
        read_bytes: count("read_bytes")?,
        attempts: count("attempts")?,
        evaluated: count("evaluated")?,
    })
}

/// The job's id that is a row's first column.
pub(super) fn id_of(row: &AnyRow) -> Result<Uuid, StoreError> {
    let id: String = row.try_get(0)?;
    let bad = |_| StoreError::Row { table: "fine-tuning job", id: id.clone(), reason: "its id is no UUID".to_owned() };
    Uuid::try_parse(&id).map_err(bad)
}

pub(super) fn read_event(row: &AnyRow) -> Result<FineTuningEvent, StoreError> {
    let number = row.try_get::<i64, _>("number")?.unsigned_abs();
    let bad = |reason: String| StoreError::Row { table: "fine-tuning event", id: number.to_string(), reason };
    let level: String = row.try_get("level")?;
    let level = ["info", "warn", "error"].into_iter().find(|known| *known == level);
    Ok(FineTuningEvent {
        number,
        created: row.try_get("created")?,
        news: News {
            level: level.ok_or_else(|| bad("its level is none".to_owned()))?,
            message: row.try_get("message")?,
            metrics: parse(row, "data").map_err(bad)?,
        },
    })
}

pub(super) fn read_checkpoint(row: &AnyRow) -> Result<FineTuningCheckpoint, StoreError> {
    let step = row.try_get::<i64, _>("step")?.unsigned_abs();
    let bad = |reason: String| StoreError::Row { table: "fine-tuning checkpoint", id: step.to_string(), reason };
    Ok(FineTuningCheckpoint {
        step,
        created: row.try_get("created")?,
        model: row.try_get("model")?,
        metrics: parse(row, "metrics").map_err(bad)?.unwrap_or_default(),
    })
}
