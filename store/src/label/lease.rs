//! Handing out tasks.

use super::assignment::{self, mix};
use super::queue::Queue;
use super::task::{self, Task};
use super::{Assignment, LabelError, Labels, a_is_left};
use crate::patience::at_length;
use uuid::Uuid;

/// Tasks that are looked at in one go; when others take all of them first, the next go sees new ones.
const CANDIDATES: i64 = 8;
/// Goes before the queue counts as empty.
const GOES: usize = 16;

/// What a person who asks for work gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Lease {
    /// A task, theirs until the lease runs out.
    Work(Box<Task>, Assignment),
    /// Nothing for them now.
    Empty,
}

/// Whether a person's next task should be a gold one: decided by the queue, the person and how many they have finished, so that it
/// can neither be guessed nor rerolled by asking again.
pub fn gold_turn(queue: Uuid, annotator: &str, finished: u64, share: f64) -> bool {
    let (high, low) = queue.as_u64_pair();
    let seed = annotator.bytes().fold(mix(high ^ mix(low)), |hash, byte| mix(hash ^ u64::from(byte)));
    // 53 random bits are a fraction below 1.
    let fraction = (mix(seed ^ mix(finished)) >> 11) as f64 / (1_u64 << 53) as f64;
    fraction < share
}

impl Labels {
    /// The next task for `annotator`: the one on their screen already, or one that nobody else holds and they have not judged.
    pub async fn lease(&self, queue: &Queue, annotator: &str, now: i64) -> Result<Lease, LabelError> {
        at_length(async {
            let until = now.saturating_add(i64::from(queue.lease_seconds) * 1_000_000);
            if queue.closed.is_some() {
                return Ok(Lease::Empty);
            }
            if let Some(current) = self.renewed(queue, annotator, until).await? {
                return Ok(current);
            }
            let finished = self.finished_by(queue.id, annotator).await?;
            let gold_first = gold_turn(queue.id, annotator, finished, queue.gold_share) || !self.has_plain(queue).await?;
            if gold_first && let Some(work) = self.take(queue, annotator, true, now, until).await? {
                return Ok(work);
            }
            Ok(self.take(queue, annotator, false, now, until).await?.unwrap_or(Lease::Empty))
        })
        .await
    }

    /// What the person holds, for longer.
    async fn renewed(&self, queue: &Queue, annotator: &str, until: i64) -> Result<Option<Lease>, LabelError> {
        let found: Option<(String,)> = sqlx::query_as(
            "SELECT a.id FROM label_assignments a JOIN label_tasks t ON t.id = a.task_id
             WHERE a.queue_id = $1 AND a.annotator = $2 AND a.state = 'leased' AND t.leased_by = $2 AND t.done = 0
             ORDER BY a.started DESC, a.id DESC LIMIT 1",
        )
        .bind(queue.id.to_string())
        .bind(annotator)
        .fetch_optional(self.database.read())
        .await?;
        let Some((id,)) = found else { return Ok(None) };
        let renewed = sqlx::query(
            "UPDATE label_tasks SET leased_until = $3 WHERE done = 0 AND leased_by = $2
             AND id = (SELECT task_id FROM label_assignments WHERE id = $1 AND state = 'leased')",
        )
        .bind(&id)
        .bind(annotator)
        .bind(until)
        .execute(self.database.write())
        .await?;
        if renewed.rows_affected() == 0 {
            return Ok(None);
        }
        Ok(Some(self.work(task::uuid(&id)?).await?))
    }

    pub(super) async fn work(&self, assignment_id: Uuid) -> Result<Lease, LabelError> {
        let assignment = self.assignment(assignment_id).await?.ok_or(LabelError::NoAssignment(assignment_id))?;
        let task = self.task(assignment.task_id).await?.ok_or(LabelError::NoAssignment(assignment_id))?;
        Ok(Lease::Work(Box::new(task), assignment))
    }

    /// Whether the queue has any task that is not gold.
    async fn has_plain(&self, queue: &Queue) -> Result<bool, LabelError> {
        let sql = "SELECT 1 FROM label_tasks WHERE queue_id = $1 AND gold IS NULL LIMIT 1";
        Ok(sqlx::query(sql).bind(queue.id.to_string()).fetch_optional(self.database.read()).await?.is_some())
    }

    async fn take(&self, queue: &Queue, annotator: &str, gold: bool, now: i64, until: i64) -> Result<Option<Lease>, LabelError> {
        // Started tasks first, so that they get all their verdicts early; then the oldest.
        let sql = format!(
            "SELECT t.id FROM label_tasks t WHERE t.queue_id = $1 AND t.done = 0 AND t.leased_until <= $3 AND t.gold IS {} NULL
             AND NOT EXISTS (SELECT 1 FROM label_assignments a WHERE a.task_id = t.id AND a.annotator = $2 AND a.state IN ('done', 'skipped'))
             ORDER BY {} t.id LIMIT $4",
            if gold { "NOT" } else { "" },
            if gold { "" } else { "t.verdicts DESC," },
        );
        for _ in 0..GOES {
            let candidates: Vec<(String,)> = sqlx::query_as(sqlx::AssertSqlSafe(sql.clone()))
                .bind(queue.id.to_string())
                .bind(annotator)
                .bind(now)
                .bind(CANDIDATES)
                .fetch_all(self.database.read())
                .await?;
            if candidates.is_empty() {
                return Ok(None);
            }
            for (task_id,) in candidates {
                if let Some(assignment) = self.claim(queue.id, &task_id, annotator, now, until).await? {
                    return self.work(assignment).await.map(Some);
                }
            }
        }
        Ok(None)
    }

    /// Takes one task, unless someone was faster. The conditional update is what decides.
    pub(super) async fn claim(
        &self,
        queue_id: Uuid,
        task_id: &str,
        annotator: &str,
        now: i64,
        until: i64,
    ) -> Result<Option<Uuid>, LabelError> {
        let mut transaction = self.database.write().begin().await?;
        let claimed = sqlx::query(
            "UPDATE label_tasks SET leased_by = $2, leased_until = $4 WHERE id = $1 AND done = 0 AND leased_until <= $3
             AND NOT EXISTS (SELECT 1 FROM label_assignments a WHERE a.task_id = $1 AND a.annotator = $2 AND a.state IN ('done', 'skipped'))",
        )
        .bind(task_id)
        .bind(annotator)
        .bind(now)
        .bind(until)
        .execute(&mut *transaction)
        .await?;
        if claimed.rows_affected() == 0 {
            return Ok(None);
        }
        let id = Uuid::now_v7();
        // Drawn, not derived from the id: the person sees that one, and could work out which answer is which.
        let a_is_left = a_is_left(Uuid::now_v7());
        // A person whose lease ran out, or who took the verdict back, goes on with the same assignment and the same sides.
        let (id,): (String,) = sqlx::query_as(
            "INSERT INTO label_assignments (id, queue_id, task_id, annotator, state, a_is_left, started)
             VALUES ($1,$2,$3,$4,'leased',$5,$6)
             ON CONFLICT (task_id, annotator) DO UPDATE SET state = 'leased', started = excluded.started
             RETURNING id",
        )
        .bind(id.to_string())
        .bind(queue_id.to_string())
        .bind(task_id)
        .bind(annotator)
        .bind(i64::from(a_is_left))
        .bind(now)
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(Some(task::uuid(&id)?))
    }

    /// The person's assignment with this id.
    pub(super) async fn own(&self, id: Uuid, annotator: &str) -> Result<Assignment, LabelError> {
        let sql = sqlx::AssertSqlSafe(format!(
            "SELECT {} FROM label_assignments a WHERE a.id = $1 AND a.annotator = $2",
            assignment::COLUMNS
        ));
        let query = sqlx::query_as(sql).bind(id.to_string()).bind(annotator);
        let row: Option<assignment::Row> = query.fetch_optional(self.database.read()).await?;
        row.map_or(Err(LabelError::NoAssignment(id)), assignment::assignment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gold_comes_at_its_share_and_cannot_be_rerolled() {
        let queue = Uuid::from_u128(7);
        let turns = |who: &str| (0..10_000).filter(|&n| gold_turn(queue, who, n, 0.1)).collect::<Vec<u64>>();
        let ann = turns("ann");
        assert!((880..=1120).contains(&ann.len()), "{}", ann.len());
        assert_eq!(ann, turns("ann"));
        assert_ne!(ann, turns("bob"));
        assert!(!gold_turn(queue, "ann", 1, 0.0) && gold_turn(queue, "ann", 1, 1.0));
    }
}
