//! Judging, skipping, and taking back.

use super::{Assignment, LabelError, Labels, Lease, Queue, State, Task, feedback_row};
use crate::judgements;
use crate::patience::patiently;
use crate::statement::clean;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Which answer is better. Of the task's answers, not of the sides of a screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// `answer_a`.
    A,
    /// `answer_b`.
    B,
    /// Equally good.
    Tie,
    /// Neither is acceptable.
    BothBad,
}

impl Verdict {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::A => "a",
            Verdict::B => "b",
            Verdict::Tie => "tie",
            Verdict::BothBad => "both_bad",
        }
    }

    pub(super) fn from_text(text: &str) -> Result<Self, LabelError> {
        match text {
            "a" => Ok(Verdict::A),
            "b" => Ok(Verdict::B),
            "tie" => Ok(Verdict::Tie),
            "both_bad" => Ok(Verdict::BothBad),
            _ => Err(LabelError::corrupt("verdict", text)),
        }
    }
}

/// What was taken back.
#[derive(Clone, Debug, PartialEq)]
pub struct Undone {
    /// The feedback that is withdrawn now; a skip had none.
    pub feedback_id: Option<Uuid>,
    /// The task again, unless someone else has it at the moment.
    pub again: Lease,
}

impl Labels {
    /// Stores a verdict and its feedback. The same verdict again changes nothing. `finished` is when the person decided;
    /// `key_id` is the API key they signed in with.
    pub async fn submit(
        &self,
        id: Uuid,
        annotator: &str,
        verdict: Verdict,
        finished: i64,
        key_id: Option<&str>,
    ) -> Result<Assignment, LabelError> {
        patiently(async {
            let own = self.own(id, annotator).await?;
            if own.state != State::Leased {
                return settled(own, |own| own.verdict == Some(verdict));
            }
            let (queue, task) = self.around(&own).await?;
            let mut transaction = self.database.write().begin().await?;
            // An expired lease that nobody took in the meantime still counts: work is not thrown away for being slow.
            let counted = sqlx::query(
                "UPDATE label_tasks SET verdicts = verdicts + 1, leased_by = NULL, leased_until = 0,
                 done = CASE WHEN gold IS NULL AND verdicts + 1 >= $3 THEN 1 ELSE 0 END
                 WHERE id = $1 AND leased_by = $2 AND done = 0
                 AND EXISTS (SELECT 1 FROM label_assignments a WHERE a.id = $4 AND a.state = 'leased')",
            )
            .bind(own.task_id.to_string())
            .bind(annotator)
            .bind(i64::from(queue.overlap))
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
            if counted.rows_affected() == 0 {
                transaction.rollback().await?;
                return self.lost(id, annotator, |own| own.verdict == Some(verdict)).await;
            }
            let feedback = feedback_row::comparison(&queue, &task, &own, verdict, finished, "console", key_id);
            judgements::insert(&mut transaction, &[&feedback]).await?;
            sqlx::query(
                "UPDATE label_assignments SET state = 'done', verdict = $2, reason = NULL, feedback_id = $3, finished = $4 WHERE id = $1",
            )
            .bind(id.to_string())
            .bind(verdict.as_str())
            .bind(feedback.id.to_string())
            .bind(finished)
            .execute(&mut *transaction)
            .await?;
            transaction.commit().await?;
            let (state, verdict) = (State::Done, Some(verdict));
            Ok(Assignment { state, verdict, feedback_id: Some(feedback.id), finished: Some(finished), ..own })
        })
        .await
    }

    /// Passes a task over for good, for this person.
    pub async fn skip(&self, id: Uuid, annotator: &str, reason: &str, finished: i64) -> Result<Assignment, LabelError> {
        patiently(async {
            let own = self.own(id, annotator).await?;
            if own.state != State::Leased {
                return settled(own, |own| own.state == State::Skipped);
            }
            let mut transaction = self.database.write().begin().await?;
            let released = sqlx::query(
                "UPDATE label_tasks SET leased_by = NULL, leased_until = 0 WHERE id = $1 AND leased_by = $2 AND done = 0
                 AND EXISTS (SELECT 1 FROM label_assignments a WHERE a.id = $3 AND a.state = 'leased')",
            )
            .bind(own.task_id.to_string())
            .bind(annotator)
            .bind(id.to_string())
            .execute(&mut *transaction)
            .await?;
            if released.rows_affected() == 0 {
                transaction.rollback().await?;
                return self.lost(id, annotator, |own| own.state == State::Skipped).await;
            }
            sqlx::query("UPDATE label_assignments SET state = 'skipped', reason = $2, finished = $3 WHERE id = $1")
                .bind(id.to_string())
                .bind(clean(reason).into_owned())
                .bind(finished)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
            let (state, reason) = (State::Skipped, Some(reason.to_owned()));
            Ok(Assignment { state, reason, finished: Some(finished), ..own })
        })
        .await
    }

    /// Takes back the person's last verdict or skip in this queue and gives the task to them again.
    pub async fn undo(&self, queue: &Queue, annotator: &str, now: i64) -> Result<Undone, LabelError> {
        patiently(async {
            let last: Option<(String,)> = sqlx::query_as(
                "SELECT id FROM label_assignments WHERE queue_id = $1 AND annotator = $2 AND state IN ('done', 'skipped')
                 AND external IS NULL ORDER BY finished DESC, id DESC LIMIT 1",
            )
            .bind(queue.id.to_string())
            .bind(annotator)
            .fetch_optional(self.database.read())
            .await?;
            let (id,) = last.ok_or(LabelError::NothingToUndo)?;
            let own = self.own(super::task::uuid(&id)?, annotator).await?;
            let mut transaction = self.database.write().begin().await?;
            // The task's row first, as whoever judges, imports or erases does: two that take locks in one order cannot block each other.
            sqlx::query(
                "UPDATE label_tasks SET verdicts = verdicts - $2,
                 done = CASE WHEN gold IS NULL AND verdicts - $2 >= $3 THEN 1 ELSE 0 END WHERE id = $1",
            )
            .bind(own.task_id.to_string())
            .bind(i64::from(own.state == State::Done))
            .bind(i64::from(queue.overlap))
            .execute(&mut *transaction)
            .await?;
            let taken_back = sqlx::query(
                "UPDATE label_assignments SET state = 'undone', verdict = NULL, reason = NULL, feedback_id = NULL, finished = NULL
                 WHERE id = $1 AND state = $2 AND COALESCE(feedback_id, '') = $3",
            )
            .bind(&id)
            .bind(if own.state == State::Done { "done" } else { "skipped" })
            .bind(own.feedback_id.map(|id| id.to_string()).unwrap_or_default())
            .execute(&mut *transaction)
            .await?;
            if taken_back.rows_affected() == 0 {
                // Something was faster, such as a second press of the key.
                return Err(LabelError::NothingToUndo);
            }
            if let Some(feedback) = own.feedback_id {
                judgements::edit_within(&mut transaction, feedback, now, |feedback| feedback.withdrawn = true).await?;
            }
            transaction.commit().await?;
            let until = now.saturating_add(i64::from(queue.lease_seconds) * 1_000_000);
            let again = match self.claim(queue.id, &own.task_id.to_string(), annotator, now, until).await? {
                Some(assignment) => self.work(assignment).await?,
                None => Lease::Empty,
            };
            Ok(Undone { feedback_id: own.feedback_id, again })
        })
        .await
    }

    async fn around(&self, own: &Assignment) -> Result<(Queue, Task), LabelError> {
        let task = self.task(own.task_id).await?.ok_or(LabelError::NoAssignment(own.id))?;
        Ok((self.queue(&own.queue_id.to_string()).await?, task))
    }

    /// The task is not this person's any more: because of this very request sent twice, or because of someone else.
    async fn lost(&self, id: Uuid, annotator: &str, same: impl Fn(&Assignment) -> bool) -> Result<Assignment, LabelError> {
        match self.own(id, annotator).await? {
            own if own.state == State::Leased => Err(LabelError::LeaseLost),
            own => settled(own, same),
        }
    }
}

fn settled(own: Assignment, same: impl Fn(&Assignment) -> bool) -> Result<Assignment, LabelError> {
    match own.state {
        State::Done | State::Skipped if same(&own) => Ok(own),
        State::Done | State::Skipped => Err(LabelError::AlreadyJudged),
        State::Leased | State::Undone => Err(LabelError::LeaseLost),
    }
}
