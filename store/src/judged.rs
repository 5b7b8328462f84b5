//! The texts that feedback is about, without the tokens.

use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};

use crate::Database;
use crate::error::StoreError;
use crate::statement::list;

/// Ids per statement.
const PART: usize = 500;

/// A choice with what its inference says about it.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgedAnswer {
    /// Id of the choice.
    pub id: String,
    /// Id of the inference.
    pub inference: String,
    /// `chat` or `completion`.
    pub endpoint: String,
    /// Served name.
    pub model: String,
    /// Variant of a rollout.
    pub variant: Option<String>,
    /// The person who asked.
    pub user_key: Option<String>,
    /// `ok`, `cancelled` or `failed`.
    pub status: String,
    /// As the API says it.
    pub finish_reason: Option<String>,
    /// The request's messages, as JSON; `None` when they were not recorded.
    pub messages: Option<String>,
    /// What the model wrote; `None` when it was not recorded.
    pub text: Option<String>,
    /// The text taken apart, as JSON, where it holds reasoning or calls.
    pub message: Option<String>,
    /// The request's parameters, as JSON.
    pub params: Option<String>,
}

/// A pair of texts in a labeling queue.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgedTask {
    /// Id of the task.
    pub id: String,
    /// Messages.
    pub prompt: Value,
    /// First answer.
    pub answer_a: String,
    /// Second answer.
    pub answer_b: String,
}

/// Those of the choices that are recorded, in any order.
pub async fn judged_answers(database: &Database, ids: &[String]) -> Result<Vec<JudgedAnswer>, StoreError> {
    let select = "SELECT c.id, c.inference_id, i.endpoint, i.model, i.variant, i.user_key, i.status, c.finish_reason, i.messages, \
                  c.output_text, c.message, i.params FROM choices c JOIN inferences i ON i.id = c.inference_id WHERE c.id IN";
    let row = |row: &AnyRow| {
        Ok(JudgedAnswer {
            id: row.try_get(0)?,
            inference: row.try_get(1)?,
            endpoint: row.try_get(2)?,
            model: row.try_get(3)?,
            variant: row.try_get(4)?,
            user_key: row.try_get(5)?,
            status: row.try_get(6)?,
            finish_reason: row.try_get(7)?,
            messages: row.try_get(8)?,
            text: row.try_get(9)?,
            message: row.try_get(10)?,
            params: row.try_get(11)?,
        })
    };
    by_ids(database, select, ids, row).await
}

/// Those of the labeling tasks that are there, in any order.
pub async fn judged_tasks(database: &Database, ids: &[String]) -> Result<Vec<JudgedTask>, StoreError> {
    let select = "SELECT id, prompt, answer_a, answer_b FROM label_tasks WHERE id IN";
    let row = |row: &AnyRow| {
        let id: String = row.try_get(0)?;
        let prompt = serde_json::from_str(&row.try_get::<String, _>(1)?).map_err(|error| StoreError::Row {
            table: "label_tasks",
            id: id.clone(),
            reason: error.to_string(),
        })?;
        Ok(JudgedTask { id, prompt, answer_a: row.try_get(2)?, answer_b: row.try_get(3)? })
    };
    by_ids(database, select, ids, row).await
}

async fn by_ids<T>(
    database: &Database,
    select: &str,
    ids: &[String],
    make: impl Fn(&AnyRow) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let mut found = Vec::with_capacity(ids.len());
    for part in ids.chunks(PART) {
        let mut query = sqlx::query(AssertSqlSafe(format!("{select} {}", list(1, part.len()))));
        for id in part {
            query = query.bind(id.clone());
        }
        for row in query.fetch_all(database.read()).await? {
            found.push(make(&row)?);
        }
    }
    Ok(found)
}
