//! Pairs whose answers must still be generated. They survive a restart.

use super::task::{NewTask, uuid};
use super::{LabelError, Labels};
use crate::patience::{at_length, patiently};
use crate::statement::{Insert, clean, clean_option};
use serde_json::Value;
use uuid::Uuid;

/// A draft to be.
#[derive(Clone, Debug, PartialEq)]
pub struct NewDraft {
    /// The task's source.
    pub source: String,
    /// Messages.
    pub prompt: Value,
    /// An answer that is there, and the id of the choice that it is.
    pub answer: Option<(String, Uuid)>,
    /// Which model answers; the server's first when absent.
    pub model: Option<String>,
}

/// A draft.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// UUIDv7.
    pub id: Uuid,
    /// Its queue.
    pub queue_id: Uuid,
    /// The task's source.
    pub source: String,
    /// Messages.
    pub prompt: Value,
    /// The answer that is there, and the id of the choice that it is.
    pub answer: Option<(String, Uuid)>,
    /// Which model answers.
    pub model: Option<String>,
}

const DRAFTS: Insert = Insert {
    table: "label_drafts",
    columns: &["id", "queue_id", "created", "source", "prompt", "answer_a", "candidate_a", "model"],
};

type Row = (String, String, String, String, Option<String>, Option<String>, Option<String>);

impl Labels {
    /// Adds those drafts whose source the queue has seen neither as draft nor as task. Answers how many that were.
    pub async fn add_drafts(&self, queue_id: Uuid, drafts: &[NewDraft], now: i64) -> Result<u64, LabelError> {
        at_length(async {
            let mut transaction = self.database.write().begin().await?;
            let mut added = 0_u64;
            for part in Insert::parts(drafts) {
                let mut query = sqlx::query(sqlx::AssertSqlSafe(DRAFTS.text(part.len())));
                for draft in part {
                    query = query
                        .bind(Uuid::now_v7().to_string())
                        .bind(queue_id.to_string())
                        .bind(now)
                        .bind(clean(&draft.source).into_owned())
                        .bind(draft.prompt.to_string())
                        .bind(draft.answer.as_ref().map(|(text, _)| clean(text).into_owned()))
                        .bind(draft.answer.as_ref().map(|(_, id)| id.to_string()))
                        .bind(clean_option(draft.model.as_deref()));
                }
                added += query.fetch_all(&mut *transaction).await?.len() as u64;
            }
            let known = sqlx::query(
                "DELETE FROM label_drafts WHERE queue_id = $1 AND EXISTS
                 (SELECT 1 FROM label_tasks t WHERE t.queue_id = label_drafts.queue_id AND t.source = label_drafts.source)",
            )
            .bind(queue_id.to_string())
            .execute(&mut *transaction)
            .await?;
            let candidates = drafts.iter().filter_map(|draft| Some(draft.answer.as_ref()?.1)).collect();
            let gone = super::task::remove_erased(&mut transaction, "label_drafts", queue_id, candidates).await?;
            transaction.commit().await?;
            Ok(added.saturating_sub(known.rows_affected() + gone))
        })
        .await
    }

    /// At most `limit` drafts of open queues that can still become tasks, the oldest first.
    pub async fn waiting_drafts(&self, limit: u32) -> Result<Vec<Draft>, LabelError> {
        at_length(async {
            let rows: Vec<Row> = sqlx::query_as(
                "SELECT d.id, d.queue_id, d.source, d.prompt, d.answer_a, d.candidate_a, d.model FROM label_drafts d
                 JOIN label_queues q ON q.id = d.queue_id WHERE d.failure IS NULL AND q.closed IS NULL ORDER BY d.id LIMIT $1",
            )
            .bind(i64::from(limit))
            .fetch_all(self.database.read())
            .await?;
            let draft = |(id, queue_id, source, prompt, answer, candidate, model): Row| {
                Ok(Draft {
                    id: uuid(&id)?,
                    queue_id: uuid(&queue_id)?,
                    source,
                    prompt: serde_json::from_str(&prompt).map_err(|_| LabelError::corrupt("prompt", &prompt))?,
                    answer: match (answer, candidate) {
                        (Some(answer), Some(candidate)) => Some((answer, uuid(&candidate)?)),
                        _ => None,
                    },
                    model,
                })
            };
            rows.into_iter().map(draft).collect()
        })
        .await
    }

    /// Sets a draft aside, with the reason.
    pub async fn fail_draft(&self, id: Uuid, why: &str) -> Result<(), LabelError> {
        patiently(async {
            sqlx::query("UPDATE label_drafts SET failure = $2 WHERE id = $1")
                .bind(id.to_string())
                .bind(clean(why).into_owned())
                .execute(self.database.write())
                .await?;
            Ok(())
        })
        .await
    }

    /// The drafts that were set aside, with the reasons: at most `limit`.
    pub async fn failures(&self, queue_id: Uuid, limit: u32) -> Result<Vec<(String, String)>, LabelError> {
        patiently(async {
            let rows = sqlx::query_as(
                "SELECT source, failure FROM label_drafts WHERE queue_id = $1 AND failure IS NOT NULL ORDER BY id LIMIT $2",
            )
            .bind(queue_id.to_string())
            .bind(i64::from(limit))
            .fetch_all(self.database.read())
            .await?;
            Ok(rows)
        })
        .await
    }

    /// Makes a draft a task. Of a draft that is gone nothing is made: another gateway was faster, or its person has been erased while
    /// the answer was generated.
    pub async fn finish_draft(&self, draft: &Draft, task: &NewTask, now: i64) -> Result<(), LabelError> {
        patiently(async {
            let mut transaction = self.database.write().begin().await?;
            super::task::insert(&mut transaction, draft.queue_id, std::slice::from_ref(task), now).await?;
            let ours = sqlx::query("DELETE FROM label_drafts WHERE id = $1")
                .bind(draft.id.to_string())
                .execute(&mut *transaction)
                .await?;
            if ours.rows_affected() == 0 {
                transaction.rollback().await?;
                return Ok(());
            }
            transaction.commit().await?;
            Ok(())
        })
        .await
    }
}
