//! One person's work on one task.

use super::{LabelError, Labels, Verdict};
use crate::label::task::uuid;
use crate::patience::patiently;
use serde::Serialize;
use sqlx::AnyConnection;
use uuid::Uuid;

/// Where the work stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// On the person's screen, or was until the lease ran out.
    Leased,
    /// Judged.
    Done,
    /// Passed over for good, with a reason.
    Skipped,
    /// Taken back; the task may come again.
    Undone,
}

/// One person's work on one task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Assignment {
    /// UUIDv7.
    pub id: Uuid,
    /// Queue of the task.
    pub queue_id: Uuid,
    /// The task.
    pub task_id: Uuid,
    /// The person.
    pub annotator: String,
    /// Where the work stands.
    pub state: State,
    /// `answer_a` is shown on the left.
    pub a_is_left: bool,
    /// When judged.
    pub verdict: Option<Verdict>,
    /// When skipped.
    pub reason: Option<String>,
    /// The verdict as feedback.
    pub feedback_id: Option<Uuid>,
    /// When the task was first seen.
    pub started: i64,
    /// When it was judged or skipped.
    pub finished: Option<i64>,
    /// Id in the tool that it was imported from.
    pub external: Option<String>,
}

/// Left and right by an id's own random bits: fair, and the same whenever the id is looked at. Mixed by splitmix64 (Steele, Lea,
/// Flood 2014), so that no single bit of a UUID decides. Whoever knows the id knows the side.
pub fn a_is_left(id: Uuid) -> bool {
    let (high, low) = id.as_u64_pair();
    mix(high ^ mix(low)) & 1 == 0
}

/// The splitmix64 finaliser.
pub(super) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(super) const COLUMNS: &str = "a.id, a.queue_id, a.task_id, a.annotator, a.state, a.a_is_left, a.verdict, a.reason, a.feedback_id, a.started, a.finished, a.external";
pub(super) type Row = (
    String,
    String,
    String,
    String,
    String,
    i64,
    Option<String>,
    Option<String>,
    Option<String>,
    i64,
    Option<i64>,
    Option<String>,
);

pub(super) fn assignment(row: Row) -> Result<Assignment, LabelError> {
    let (id, queue_id, task_id, annotator, state, a_is_left, verdict, reason, feedback_id, started, finished, external) = row;
    Ok(Assignment {
        id: uuid(&id)?,
        queue_id: uuid(&queue_id)?,
        task_id: uuid(&task_id)?,
        annotator,
        state: match state.as_str() {
            "leased" => State::Leased,
            "done" => State::Done,
            "skipped" => State::Skipped,
            "undone" => State::Undone,
            _ => return Err(LabelError::corrupt("state", &state)),
        },
        a_is_left: a_is_left != 0,
        verdict: verdict.as_deref().map(Verdict::from_text).transpose()?,
        reason,
        feedback_id: feedback_id.as_deref().map(uuid).transpose()?,
        started,
        finished,
        external,
    })
}

impl Labels {
    /// The assignment with this id.
    pub async fn assignment(&self, id: Uuid) -> Result<Option<Assignment>, LabelError> {
        patiently(async {
            let sql = sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM label_assignments a WHERE a.id = $1"));
            let row: Option<Row> = sqlx::query_as(sql).bind(id.to_string()).fetch_optional(self.database.read()).await?;
            row.map(assignment).transpose()
        })
        .await
    }

    /// All assignments of a task, the oldest first.
    pub async fn assignments_of(&self, task_id: Uuid) -> Result<Vec<Assignment>, LabelError> {
        patiently(async {
            let sql =
                sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM label_assignments a WHERE a.task_id = $1 ORDER BY a.id"));
            let rows: Vec<Row> = sqlx::query_as(sql).bind(task_id.to_string()).fetch_all(self.database.read()).await?;
            rows.into_iter().map(assignment).collect()
        })
        .await
    }
}

/// Removes all work of a person, within the caller's transaction. Their tasks are open to others again.
pub(crate) async fn forget_annotator(connection: &mut AnyConnection, annotator: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE label_tasks SET verdicts = verdicts - 1, done = 0 WHERE EXISTS (SELECT 1 FROM label_assignments a
         WHERE a.task_id = label_tasks.id AND a.annotator = $1 AND a.state = 'done')",
    )
    .bind(annotator.to_owned())
    .execute(&mut *connection)
    .await?;
    for text in [
        "UPDATE label_tasks SET leased_by = NULL, leased_until = 0 WHERE leased_by = $1",
        "DELETE FROM label_assignments WHERE annotator = $1",
        "DELETE FROM label_external WHERE annotator = $1",
    ] {
        sqlx::query(text).bind(annotator.to_owned()).execute(&mut *connection).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_fair_and_belong_to_the_id() {
        let ids: Vec<Uuid> = (0..4000).map(|_| Uuid::now_v7()).collect();
        let left = ids.iter().filter(|&&id| a_is_left(id)).count();
        // Six standard deviations (31.6 each) around half.
        assert!((1810..=2190).contains(&left), "{left}");
        assert!(ids.iter().all(|&id| a_is_left(id) == a_is_left(id)));
    }
}
