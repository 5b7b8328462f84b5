//! A pair of answers.

use super::{LabelError, Labels, Verdict};
use crate::commit;
use crate::ids::IdKey;
use crate::patience::{at_length, patiently};
use crate::statement::{Insert, clean};
use serde::Serialize;
use serde_json::Value;
use sqlx::AnyConnection;
use uuid::Uuid;

/// A task to be.
#[derive(Clone, Debug, PartialEq)]
pub struct NewTask {
    /// Where it came from; a source enters a queue once.
    pub source: String,
    /// Messages, as the chat API takes them.
    pub prompt: Value,
    /// Text of the first answer.
    pub answer_a: String,
    /// Text of the second answer.
    pub answer_b: String,
    /// Id of the choice that `answer_a` is, when it is ours.
    pub candidate_a: Option<Uuid>,
    /// Id of the choice that `answer_b` is, when it is ours.
    pub candidate_b: Option<Uuid>,
    /// The right verdict, where it is known.
    pub gold: Option<Verdict>,
}

/// A task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Task {
    /// UUIDv7.
    pub id: Uuid,
    /// Its queue.
    pub queue_id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// Where it came from.
    pub source: String,
    /// Messages.
    pub prompt: Value,
    /// Text of the first answer.
    pub answer_a: String,
    /// Text of the second answer.
    pub answer_b: String,
    /// Id of the choice that `answer_a` is, when it is ours.
    pub candidate_a: Option<Uuid>,
    /// Id of the choice that `answer_b` is, when it is ours.
    pub candidate_b: Option<Uuid>,
    /// The right verdict, where it is known; never for the annotators' eyes.
    pub gold: Option<Verdict>,
    /// Verdicts that stand.
    pub verdicts: u32,
    /// It has all its verdicts.
    pub done: bool,
}

/// Which tasks to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskState {
    /// All.
    #[default]
    Any,
    /// Without all their verdicts.
    Open,
    /// With all their verdicts.
    Done,
}

pub(super) const COLUMNS: &str = "t.id, t.queue_id, t.created, t.source, t.prompt, t.answer_a, t.answer_b, t.candidate_a, t.candidate_b, t.gold, t.verdicts, t.done";
pub(super) type Row =
    (String, String, i64, String, String, String, String, Option<String>, Option<String>, Option<String>, i64, i64);

pub(super) fn uuid(text: &str) -> Result<Uuid, LabelError> {
    text.parse().map_err(|_| LabelError::corrupt("id", text))
}

pub(super) fn task(row: Row) -> Result<Task, LabelError> {
    let (id, queue_id, created, source, prompt, answer_a, answer_b, candidate_a, candidate_b, gold, verdicts, done) = row;
    Ok(Task {
        id: uuid(&id)?,
        queue_id: uuid(&queue_id)?,
        created,
        source,
        prompt: serde_json::from_str(&prompt).map_err(|_| LabelError::corrupt("prompt", &prompt))?,
        answer_a,
        answer_b,
        candidate_a: candidate_a.as_deref().map(uuid).transpose()?,
        candidate_b: candidate_b.as_deref().map(uuid).transpose()?,
        gold: gold.as_deref().map(Verdict::from_text).transpose()?,
        verdicts: u32::try_from(verdicts).unwrap_or(0),
        done: done != 0,
    })
}

const TASKS: Insert = Insert {
    table: "label_tasks",
    columns: &[
        "id",
        "queue_id",
        "created",
        "source",
        "prompt",
        "answer_a",
        "answer_b",
        "candidate_a",
        "candidate_b",
        "gold",
        "verdicts",
        "done",
        "leased_until",
    ],
};

pub(super) async fn insert(
    connection: &mut AnyConnection,
    queue_id: Uuid,
    tasks: &[NewTask],
    now: i64,
) -> Result<u64, LabelError> {
    let mut added = 0;
    for part in Insert::parts(tasks) {
        let mut query = sqlx::query(sqlx::AssertSqlSafe(TASKS.text(part.len())));
        for task in part {
            query = query
                .bind(Uuid::now_v7().to_string())
                .bind(queue_id.to_string())
                .bind(now)
                .bind(clean(&task.source).into_owned())
                .bind(task.prompt.to_string())
                .bind(clean(&task.answer_a).into_owned())
                .bind(clean(&task.answer_b).into_owned())
                .bind(task.candidate_a.map(|id| id.to_string()))
                .bind(task.candidate_b.map(|id| id.to_string()))
                .bind(task.gold.map(|gold| gold.as_str().to_owned()))
                .bind(0_i64)
                .bind(0_i64)
                .bind(0_i64);
        }
        added += query.fetch_all(&mut *connection).await?.len() as u64;
    }
    let candidates = tasks.iter().flat_map(|task| [task.candidate_a, task.candidate_b]).flatten().collect();
    let gone = remove_erased(connection, "label_tasks", queue_id, candidates).await?;
    Ok(added.saturating_sub(gone))
}

/// Removes from `table`, `label_tasks` or `label_drafts`, what was made of answers that have been erased since they were read. Asked
/// after the insert, within its transaction: an erasure at the same time has either seen the rows, or its marks are seen here.
pub(super) async fn remove_erased(
    connection: &mut AnyConnection,
    table: &'static str,
    queue_id: Uuid,
    candidates: Vec<Uuid>,
) -> Result<u64, LabelError> {
    let candidates: Vec<String> = candidates.iter().map(Uuid::to_string).collect();
    if candidates.is_empty() {
        return Ok(0);
    }
    let ids = IdKey::load(connection).await?;
    let erased = commit::erased(connection, &ids, candidates.iter().map(String::as_str).collect()).await?;
    let columns = if table == "label_tasks" { "$2 IN (candidate_a, candidate_b)" } else { "candidate_a = $2" };
    let text = format!("DELETE FROM {table} WHERE queue_id = $1 AND {columns}");
    let mut gone = 0;
    for candidate in candidates.iter().filter(|candidate| erased.contains_key(&ids.pseudonym(candidate))) {
        let query = sqlx::query(sqlx::AssertSqlSafe(text.clone())).bind(queue_id.to_string()).bind(candidate.clone());
        gone += query.execute(&mut *connection).await?.rows_affected();
    }
    Ok(gone)
}

impl Labels {
    /// Adds those tasks whose source the queue has not seen. Answers how many that were.
    pub async fn add_tasks(&self, queue_id: Uuid, tasks: &[NewTask], now: i64) -> Result<u64, LabelError> {
        at_length(async {
            let mut transaction = self.database.write().begin().await?;
            let added = insert(&mut transaction, queue_id, tasks, now).await?;
            transaction.commit().await?;
            Ok(added)
        })
        .await
    }

    /// At most `limit` tasks of a queue after the task `after`, the oldest first.
    pub async fn list_tasks(
        &self,
        queue_id: Uuid,
        state: TaskState,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<Vec<Task>, LabelError> {
        at_length(async {
            let state = match state {
                TaskState::Any => "",
                TaskState::Open => "AND t.done = 0",
                TaskState::Done => "AND t.done = 1",
            };
            let sql = sqlx::AssertSqlSafe(format!(
                "SELECT {COLUMNS} FROM label_tasks t WHERE t.queue_id = $1 AND t.id > $2 {state} ORDER BY t.id LIMIT $3"
            ));
            let rows: Vec<Row> = sqlx::query_as(sql)
                .bind(queue_id.to_string())
                .bind(after.map(|id| id.to_string()).unwrap_or_default())
                .bind(i64::from(limit))
                .fetch_all(self.database.read())
                .await?;
            rows.into_iter().map(task).collect()
        })
        .await
    }

    /// The task with this id.
    pub async fn task(&self, id: Uuid) -> Result<Option<Task>, LabelError> {
        patiently(async {
            let sql = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM label_tasks t WHERE t.id = $1"));
            let row: Option<Row> = sqlx::query_as(sql).bind(id.to_string()).fetch_optional(self.database.read()).await?;
            row.map(task).transpose()
        })
        .await
    }

    /// The task with this source.
    pub async fn task_of_source(&self, queue_id: Uuid, source: &str) -> Result<Option<Task>, LabelError> {
        patiently(async {
            let sql = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM label_tasks t WHERE t.queue_id = $1 AND t.source = $2"));
            let query = sqlx::query_as(sql).bind(queue_id.to_string()).bind(source);
            let row: Option<Row> = query.fetch_optional(self.database.read()).await?;
            row.map(task).transpose()
        })
        .await
    }
}
