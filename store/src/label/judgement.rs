//! What statistics are made from.

use super::task::uuid;
use super::{LabelError, Labels, Verdict};
use crate::patience::{at_length, patiently};
use serde::Serialize;
use std::collections::HashMap;
use uuid::Uuid;

/// One finished assignment beside what was known of its task.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// The task.
    pub task_id: Uuid,
    /// The person.
    pub annotator: String,
    /// `None`: skipped.
    pub verdict: Option<Verdict>,
    /// Why skipped.
    pub reason: Option<String>,
    /// `answer_a` was shown on the left.
    pub a_is_left: bool,
    /// The right verdict, where it is known.
    pub gold: Option<Verdict>,
    /// Microseconds since 1970.
    pub started: i64,
    /// Microseconds since 1970.
    pub finished: i64,
}

/// How far a queue is. Gold tasks are counted apart: they are never done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Tasks without gold ones.
    pub tasks: u64,
    /// Of these, with all their verdicts.
    pub done: u64,
    /// Verdicts on them.
    pub verdicts: u64,
    /// Tasks that someone has on the screen.
    pub leased: u64,
    /// Gold tasks.
    pub gold: u64,
    /// Verdicts on them.
    pub gold_verdicts: u64,
    /// Pairs that wait for an answer to be generated.
    pub drafts: u64,
    /// Pairs whose answer could not be generated.
    pub failed: u64,
}

type Row = (String, String, Option<String>, Option<String>, i64, i64, i64);

/// Both are answered by the index `label_tasks_progress` alone: a task's texts are a thousand times what is counted here.
const GOLD: &str = "SELECT id, gold FROM label_tasks WHERE queue_id = $1 AND done IN (0, 1) AND gold > ''";
const PROGRESS: &str = "SELECT CAST(COALESCE(SUM(CASE WHEN gold IS NULL THEN 1 ELSE 0 END), 0) AS BIGINT),
        CAST(COALESCE(SUM(done), 0) AS BIGINT),
        CAST(COALESCE(SUM(CASE WHEN gold IS NULL THEN verdicts ELSE 0 END), 0) AS BIGINT),
        CAST(COALESCE(SUM(CASE WHEN leased_until > $2 THEN 1 ELSE 0 END), 0) AS BIGINT),
        COUNT(gold),
        CAST(COALESCE(SUM(CASE WHEN gold IS NOT NULL THEN verdicts ELSE 0 END), 0) AS BIGINT)
    FROM label_tasks WHERE queue_id = $1";
const OPEN: &str =
    "SELECT COUNT(*) FROM (SELECT 1 FROM label_tasks WHERE queue_id = $1 AND done = 0 AND gold IS NULL LIMIT $2) AS found";
const DRAFTS: &str =
    "SELECT COUNT(*) FROM (SELECT 1 FROM label_drafts WHERE queue_id = $1 AND failure IS NULL LIMIT $2) AS found";

impl Labels {
    /// All finished assignments of a queue, by time. Reads each of them, and of its tasks the gold ones, without any text.
    pub async fn judgements(&self, queue_id: Uuid) -> Result<Vec<Judgement>, LabelError> {
        at_length(async {
            let rows: Vec<Row> = sqlx::query_as(
                "SELECT task_id, annotator, verdict, reason, a_is_left, started, finished FROM label_assignments
                 WHERE queue_id = $1 AND finished IS NOT NULL ORDER BY finished, id",
            )
            .bind(queue_id.to_string())
            .fetch_all(self.database.read())
            .await?;
            let gold: Vec<(String, String)> =
                sqlx::query_as(GOLD).bind(queue_id.to_string()).fetch_all(self.database.read()).await?;
            let gold: HashMap<String, String> = gold.into_iter().collect();
            let judgement = |(task_id, annotator, verdict, reason, a_is_left, started, finished): Row| {
                let gold = gold.get(&task_id);
                Ok(Judgement {
                    task_id: uuid(&task_id)?,
                    annotator,
                    verdict: verdict.as_deref().map(Verdict::from_text).transpose()?,
                    reason,
                    a_is_left: a_is_left != 0,
                    gold: gold.map(|gold| Verdict::from_text(gold)).transpose()?,
                    started,
                    finished,
                })
            };
            rows.into_iter().map(judgement).collect()
        })
        .await
    }

    /// How far a queue is.
    pub async fn progress(&self, queue_id: Uuid, now: i64) -> Result<Progress, LabelError> {
        at_length(async {
            let (tasks, done, verdicts, leased, gold, gold_verdicts): (i64, i64, i64, i64, i64, i64) =
                sqlx::query_as(PROGRESS).bind(queue_id.to_string()).bind(now).fetch_one(self.database.read()).await?;
            let (all_drafts, failed): (i64, i64) =
                sqlx::query_as("SELECT COUNT(*), COUNT(failure) FROM label_drafts WHERE queue_id = $1")
                    .bind(queue_id.to_string())
                    .fetch_one(self.database.read())
                    .await?;
            let count = |n: i64| u64::try_from(n).unwrap_or(0);
            Ok(Progress {
                tasks: count(tasks),
                done: count(done),
                verdicts: count(verdicts),
                leased: count(leased),
                gold: count(gold),
                gold_verdicts: count(gold_verdicts),
                drafts: count(all_drafts - failed),
                failed: count(failed),
            })
        })
        .await
    }

    /// Whether `most` pairs or more wait, for verdicts or for an answer. Looks at no more than twice that many, however large the queue is.
    pub async fn is_full(&self, queue_id: Uuid, most: u64) -> Result<bool, LabelError> {
        patiently(async {
            let mut open = 0;
            for text in [OPEN, DRAFTS] {
                let (some,): (i64,) = sqlx::query_as(text)
                    .bind(queue_id.to_string())
                    .bind(i64::try_from(most).unwrap_or(i64::MAX))
                    .fetch_one(self.database.read())
                    .await?;
                open += u64::try_from(some).unwrap_or(0);
            }
            Ok(open >= most)
        })
        .await
    }

    /// How many tasks the person has judged or skipped in a queue.
    pub async fn finished_by(&self, queue_id: Uuid, annotator: &str) -> Result<u64, LabelError> {
        patiently(async {
            let (finished,): (i64,) = sqlx::query_as(
                "SELECT COUNT(*) FROM label_assignments WHERE queue_id = $1 AND annotator = $2 AND finished IS NOT NULL",
            )
            .bind(queue_id.to_string())
            .bind(annotator)
            .fetch_one(self.database.read())
            .await?;
            Ok(u64::try_from(finished).unwrap_or(0))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DataDir, Store, StoreOptions};
    use sqlx::Row as _;

    #[tokio::test]
    async fn counts_of_a_queue_read_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(StoreOptions::new(DataDir::new(folder.path()))).await.unwrap();
        for text in [GOLD, PROGRESS, OPEN] {
            let query = sqlx::query::<sqlx::Any>(sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {text}"))).bind("q");
            let rows = query.bind(1_i64).fetch_all(store.database().read()).await.unwrap();
            let plan: Vec<String> = rows.iter().map(|row| row.try_get("detail").unwrap()).collect();
            let covered = |step: &String| step.contains("label_tasks USING COVERING INDEX label_tasks_progress");
            assert!(plan.iter().any(covered), "{text}: {plan:?}");
        }
        store.close().await;
    }
}
