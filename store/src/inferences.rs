//! Answers in the database.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::page::{self, Order, Page};
use crate::records::{Choice, Exposure, Inference, Kind, Status};
use crate::statement::{Insert, Select, clean, clean_option, list, number};

/// Which answers; everything absent is any.
#[derive(Clone, Debug, Default)]
pub struct InferenceFilter {
    /// Served model.
    pub model: Option<String>,
    /// Variant of a rollout.
    pub variant: Option<String>,
    /// The person who asked.
    pub user_key: Option<String>,
    /// The conversation.
    pub conversation: Option<String>,
    /// Created at or after, in microseconds since 1970.
    pub since: Option<i64>,
    /// Created before.
    pub until: Option<i64>,
    /// Made to be compared, or not.
    pub compare: Option<bool>,
    /// One of the choices has feedback of this kind that is not withdrawn.
    pub with_feedback: Option<Kind>,
    /// The last id of the page before.
    pub after: Option<Uuid>,
    /// 20 unless said, at most [`crate::MAX_PAGE`].
    pub limit: Option<usize>,
    /// Which end first.
    pub order: Order,
}

const INFERENCES: Insert = Insert {
    table: "inferences",
    columns: &[
        "id",
        "created",
        "endpoint",
        "model",
        "adapter",
        "variant",
        "conversation",
        "key_id",
        "user_key",
        "status",
        "compare",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
        "first_token_us",
        "duration_us",
        "config_hash",
        "metadata",
        "params",
        "messages",
        "prompt_text",
        "prompt_ids",
        "rollout_id",
        "arm",
        "unit",
        "refused",
        "place",
        "bytes",
    ],
};

const CHOICES: Insert = Insert {
    table: "choices",
    columns: &[
        "id",
        "inference_id",
        "position",
        "finish_reason",
        "output_text",
        "message",
        "output_ids",
        "logprobs",
        "raw_logprobs",
        "mean_logprob:number",
        "tokens",
    ],
};

/// Writes the answers whose ids are not there yet, within the caller's transaction; returns the ids of those that were new.
pub(crate) async fn insert(connection: &mut AnyConnection, rows: &[Inference]) -> Result<HashSet<String>, sqlx::Error> {
    let mut new = HashSet::new();
    for part in Insert::parts(rows) {
        let mut query = sqlx::query(AssertSqlSafe(INFERENCES.text(part.len())));
        for row in part {
            query = query
                .bind(row.id.to_string())
                .bind(row.created)
                .bind(&*row.endpoint)
                .bind(clean(&row.model).into_owned())
                .bind(row.adapter as i64)
                .bind(clean_option(row.variant.as_deref()))
                .bind(clean_option(row.conversation.as_deref()))
                .bind(row.key_id.as_deref())
                .bind(clean_option(row.user_key.as_deref()))
                .bind(row.status.as_str())
                .bind(i64::from(row.compare))
                .bind(i64::from(row.prompt_tokens))
                .bind(i64::from(row.cached_tokens))
                .bind(i64::from(row.output_tokens))
                .bind(row.first_token_us)
                .bind(row.duration_us)
                .bind(&*row.config_hash)
                .bind(json(&row.metadata))
                .bind(row.params.as_ref().map(json))
                .bind(row.messages.as_ref().map(json))
                .bind(clean_option(row.prompt_text.as_deref()))
                .bind(bytes_of_ids(&row.prompt_ids))
                .bind(row.exposure.map(|exposure| exposure.rollout.to_string()))
                .bind(row.exposure.map(|exposure| i64::from(exposure.arm)))
                .bind(row.exposure.map(|exposure| exposure.unit))
                .bind(row.exposure.and_then(|exposure| exposure.refused).map(i64::from))
                .bind(row.exposure.and_then(|exposure| exposure.place).map(i64::from))
                .bind(size_of(row) as i64);
        }
        for row in query.fetch_all(&mut *connection).await? {
            new.insert(row.try_get(0)?);
        }
    }
    let choices: Vec<(Uuid, usize, &Choice)> =
        rows.iter().flat_map(|row| row.choices.iter().enumerate().map(|(position, choice)| (row.id, position, choice))).collect();
    for part in Insert::parts(&choices) {
        let mut query = sqlx::query(AssertSqlSafe(CHOICES.text(part.len())));
        for (inference, position, choice) in part {
            query = query
                .bind(choice.id.to_string())
                .bind(inference.to_string())
                .bind(*position as i64)
                .bind(choice.finish_reason.as_deref())
                .bind(clean_option(choice.output_text.as_deref()))
                .bind(choice.message.as_ref().map(json))
                .bind(bytes_of_ids(&choice.output_ids))
                .bind(bytes_of_floats(&choice.logprobs))
                .bind(bytes_of_floats(&choice.raw_logprobs))
                .bind(number(choice.mean_logprob))
                .bind(i64::from(choice.tokens));
        }
        query.fetch_all(&mut *connection).await?;
    }
    Ok(new)
}

/// About what a record takes, in bytes: the text and the tokens.
pub(crate) fn size_of(row: &Inference) -> usize {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let choices: usize = row
        .choices
        .iter()
        .map(|choice| {
            let message = choice.message.as_ref().map_or(0, size_of_json);
            200 + text(&choice.output_text)
                + message
                + 4 * (choice.output_ids.len() + choice.logprobs.len() + choice.raw_logprobs.len())
        })
        .sum();
    let messages = row.messages.as_ref().map_or(0, size_of_json);
    let metadata: usize = row.metadata.iter().map(|(name, value)| name.len() + size_of_json(value)).sum();
    500 + text(&row.prompt_text) + 4 * row.prompt_ids.len() + messages + metadata + choices
}

fn size_of_json(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len() + 3,
        Value::Array(items) => 2 + items.iter().map(size_of_json).sum::<usize>(),
        Value::Object(fields) => 2 + fields.iter().map(|(name, value)| name.len() + 4 + size_of_json(value)).sum::<usize>(),
    }
}

/// The answer of this id, or the one that has a choice of this id.
pub(crate) async fn find(database: &Database, id: Uuid) -> Result<Option<Inference>, StoreError> {
    let query = "SELECT inferences.* FROM inferences WHERE id = $1 \
                 UNION ALL SELECT inferences.* FROM choices JOIN inferences ON inferences.id = choices.inference_id \
                 WHERE choices.id = $1 AND choices.inference_id <> $1";
    let row = sqlx::query(query).bind(id.to_string()).fetch_optional(database.read()).await?;
    match row {
        Some(row) => Ok(with_choices(database, vec![read(&row)?]).await?.pop()),
        None => Ok(None),
    }
}

/// How many answers there are of some sort, and from when to when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AnswerSpan {
    /// How many.
    pub answers: u64,
    /// The first, in microseconds since 1970.
    pub first: Option<i64>,
    /// The last.
    pub last: Option<i64>,
}

/// The answers of an adapter with these contents.
pub(crate) async fn span_of(database: &Database, generation: u64) -> Result<AnswerSpan, StoreError> {
    // The second condition is the index's own.
    let text = "SELECT COUNT(*), MIN(created), MAX(created) FROM inferences WHERE adapter = $1 AND adapter <> 0";
    let row = sqlx::query(text).bind(generation as i64).fetch_one(database.read()).await?;
    Ok(AnswerSpan { answers: row.try_get::<i64, _>(0)?.unsigned_abs(), first: row.try_get(1)?, last: row.try_get(2)? })
}

/// A page of answers.
pub(crate) async fn find_all(database: &Database, filter: &InferenceFilter) -> Result<Page<Inference>, StoreError> {
    let limit = page::limit(filter.limit);
    let mut select = Select::new("SELECT * FROM inferences");
    select.text_option("model = ?", filter.model.as_deref());
    select.text_option("variant = ?", filter.variant.as_deref());
    select.text_option("user_key = ?", filter.user_key.as_deref());
    select.text_option("conversation = ?", filter.conversation.as_deref());
    select.integer("created >= ?", filter.since);
    select.integer("created < ?", filter.until);
    select.integer("compare = ?", filter.compare.map(i64::from));
    select.text_option(
        "EXISTS (SELECT 1 FROM choices JOIN feedback_targets ON feedback_targets.target = choices.id \
         JOIN feedback ON feedback.id = feedback_targets.feedback_id \
         WHERE choices.inference_id = inferences.id AND feedback.withdrawn = 0 AND feedback.kind = ?)",
        filter.with_feedback.map(Kind::as_str),
    );
    select.text_option(&filter.order.after("id"), filter.after.map(|id| id.to_string()).as_deref());
    select.end(&format!(" ORDER BY id {} LIMIT {}", filter.order.sql(), limit + 1));
    let rows = select.query().fetch_all(database.read()).await?;
    let page = Page::of(rows.iter().map(read).collect::<Result<Vec<_>, _>>()?, limit);
    Ok(Page { items: with_choices(database, page.items).await?, has_more: page.has_more })
}

async fn with_choices(database: &Database, mut inferences: Vec<Inference>) -> Result<Vec<Inference>, StoreError> {
    let mut of: HashMap<String, Vec<Choice>> = HashMap::new();
    for part in inferences.chunks(250) {
        let text = format!("SELECT * FROM choices WHERE inference_id IN {} ORDER BY inference_id, position", list(1, part.len()));
        let mut query = sqlx::query(AssertSqlSafe(text));
        for inference in part {
            query = query.bind(inference.id.to_string());
        }
        for row in query.fetch_all(database.read()).await? {
            of.entry(row.try_get("inference_id")?).or_default().push(read_choice(&row)?);
        }
    }
    for inference in &mut inferences {
        inference.choices = of.remove(&inference.id.to_string()).unwrap_or_default();
    }
    Ok(inferences)
}

fn read(row: &AnyRow) -> Result<Inference, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: &str| StoreError::Row { table: "inference", id: id.clone(), reason: reason.to_owned() };
    let status: String = row.try_get("status")?;
    Ok(Inference {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID"))?,
        created: row.try_get("created")?,
        endpoint: row.try_get("endpoint")?,
        model: row.try_get("model")?,
        adapter: row.try_get::<i64, _>("adapter")? as u64,
        variant: row.try_get("variant")?,
        conversation: row.try_get("conversation")?,
        key_id: row.try_get("key_id")?,
        user_key: row.try_get("user_key")?,
        status: Status::parse(&status).ok_or_else(|| bad("unknown status"))?,
        compare: row.try_get::<i64, _>("compare")? != 0,
        prompt_tokens: count(row, "prompt_tokens")?,
        cached_tokens: count(row, "cached_tokens")?,
        output_tokens: count(row, "output_tokens")?,
        first_token_us: row.try_get("first_token_us")?,
        duration_us: row.try_get("duration_us")?,
        config_hash: row.try_get("config_hash")?,
        metadata: parse(row, "metadata").map_err(|reason| bad(&reason))?.unwrap_or_default(),
        params: parse(row, "params").map_err(|reason| bad(&reason))?,
        messages: parse(row, "messages").map_err(|reason| bad(&reason))?,
        prompt_text: row.try_get("prompt_text")?,
        prompt_ids: ids_of_bytes(row.try_get("prompt_ids")?),
        exposure: exposure(row)?,
        choices: Vec::new(),
    })
}

fn exposure(row: &AnyRow) -> Result<Option<Exposure>, sqlx::Error> {
    let (rollout, arm, unit): (Option<String>, Option<i64>, Option<i64>) =
        (row.try_get("rollout_id")?, row.try_get("arm")?, row.try_get("unit")?);
    let (refused, place): (Option<i64>, Option<i64>) = (row.try_get("refused")?, row.try_get("place")?);
    let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
    // Our own writing: half an exposure is none.
    Ok(rollout.as_deref().and_then(|rollout| Uuid::try_parse(rollout).ok()).zip(arm).zip(unit).map(|((rollout, arm), unit)| {
        let (refused, place) = (refused.map(|refused| refused != 0), place.map(number));
        Exposure { rollout, arm: number(arm), unit, refused, place }
    }))
}

fn read_choice(row: &AnyRow) -> Result<Choice, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "choice", id: id.clone(), reason };
    Ok(Choice {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID".into()))?,
        finish_reason: row.try_get("finish_reason")?,
        output_text: row.try_get("output_text")?,
        message: parse(row, "message").map_err(bad)?,
        output_ids: ids_of_bytes(row.try_get("output_ids")?),
        logprobs: floats_of_bytes(row.try_get("logprobs")?),
        raw_logprobs: floats_of_bytes(row.try_get("raw_logprobs")?),
        mean_logprob: row.try_get("mean_logprob")?,
        tokens: count(row, "tokens")?,
    })
}

fn count(row: &AnyRow, column: &str) -> Result<u32, sqlx::Error> {
    Ok(row.try_get::<i64, _>(column)?.clamp(0, i64::from(u32::MAX)) as u32)
}

/// JSON of values that always have one.
pub(crate) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

/// The JSON of a column, if it is not NULL; an error says which column.
pub(crate) fn parse<T: for<'de> Deserialize<'de>>(row: &AnyRow, column: &str) -> Result<Option<T>, String> {
    let text: Option<String> = row.try_get(column).map_err(|error| error.to_string())?;
    text.map(|text| serde_json::from_str(&text)).transpose().map_err(|error| format!("{column}: {error}"))
}

fn bytes_of_ids(ids: &[u32]) -> Option<Vec<u8>> {
    (!ids.is_empty()).then(|| ids.iter().flat_map(|id| id.to_le_bytes()).collect())
}

fn bytes_of_floats(floats: &[f32]) -> Option<Vec<u8>> {
    (!floats.is_empty()).then(|| floats.iter().flat_map(|float| float.to_le_bytes()).collect())
}

fn ids_of_bytes(bytes: Option<Vec<u8>>) -> Vec<u32> {
    bytes.unwrap_or_default().as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect()
}

fn floats_of_bytes(bytes: Option<Vec<u8>>) -> Vec<f32> {
    bytes.unwrap_or_default().as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}
