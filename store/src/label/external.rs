//! Judgements that were made in another tool.
//!
//! `label_external` holds each of them as it was last seen. What counts for a task and a person, their assignment and its feedback, is
//! derived from these rows: it is the newest that stands. So the same judgement again changes nothing, an older one that arrives late
//! changes nothing, and a deleted one stays deleted.

use super::assignment::{self, State};
use super::{Assignment, LabelError, Labels, Queue, Task, Verdict, feedback_row, task};
use crate::judgements;
use crate::patience::at_length;
use crate::records::Feedback;
use crate::statement::{clean, clean_option};
use sqlx::{Any, Transaction};
use uuid::Uuid;

/// Judgements in one transaction: enough that a file of thousands is quick, few enough that others get to write.
const BATCH: usize = 100;

/// What a person said in another tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A verdict.
    Judged(Verdict),
    /// The right verdict, to measure others by; not itself counted as a judgement.
    Gold(Verdict),
    /// Passed over.
    Skipped,
    /// Nothing yet, or nothing any more.
    Open,
}

/// A judgement in another tool.
#[derive(Clone, Debug, PartialEq)]
pub struct External {
    /// The tool's name; the feedback's source.
    pub tool: &'static str,
    /// The judgement's id there, unique in the tool for one queue.
    pub id: String,
    /// When it was last changed there, in microseconds since 1970. Without it, what comes last stands.
    pub version: Option<i64>,
    /// The task.
    pub task_id: Uuid,
    /// The person, with the tool's name in front.
    pub annotator: String,
    /// What was said.
    pub outcome: Outcome,
    /// Why.
    pub comment: Option<String>,
    /// `answer_a` was shown first.
    pub a_is_left: bool,
    /// When it was said, if known.
    pub finished: Option<i64>,
    /// From seeing to judging, if known.
    pub latency_ms: Option<i64>,
}

/// What an import did with a judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// New feedback.
    Recorded,
    /// The feedback says something else now.
    Edited,
    /// The feedback was taken back.
    Withdrawn,
    /// The person passes the task over.
    Skipped,
    /// The task has a right verdict.
    Gold,
    /// Nothing: it was known, is older than what is known, or says nothing.
    Unchanged,
}

/// Why a judgement cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The queue has no such task.
    #[error("queue '{queue}' has no task {task}; import into the queue that the task was exported from")]
    UnknownTask {
        /// Name.
        queue: String,
        /// Id.
        task: Uuid,
    },
    /// Two tools, or two servers of one, use the same id.
    #[error("judgement {id} belongs to another task already; label one queue in one {tool} only")]
    OtherTask {
        /// The tool.
        tool: &'static str,
        /// The judgement's id.
        id: String,
    },
}

impl External {
    /// As the database takes it.
    fn clean(&self) -> Self {
        let (id, annotator) = (clean(&self.id).into_owned(), clean(&self.annotator).into_owned());
        Self { id, annotator, comment: clean_option(self.comment.as_deref()), ..self.clone() }
    }
}

/// A row of `label_external`.
#[derive(Clone, Debug, PartialEq)]
struct Known {
    version: Option<i64>,
    state: String,
    verdict: Option<String>,
    comment: Option<String>,
    task_id: String,
    annotator: String,
    a_is_left: bool,
    finished: i64,
    latency_ms: Option<i64>,
}

/// What to do with a judgement, given what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Ignore,
    Take,
}

fn step(known: Option<&Known>, external: &External) -> Step {
    let Some(known) = known else { return Step::Take };
    if known.state == DELETED {
        return Step::Ignore;
    }
    match (known.version, external.version) {
        (Some(old), Some(new)) if new <= old => Step::Ignore,
        (Some(_), Some(_)) => Step::Take,
        _ if known.says(external) => Step::Ignore,
        _ => Step::Take,
    }
}

impl Known {
    fn says(&self, external: &External) -> bool {
        let (state, verdict) = words(external.outcome);
        self.state == state
            && self.verdict.as_deref() == verdict
            && self.comment == external.comment
            && self.annotator == external.annotator
            && self.a_is_left == external.a_is_left
    }

    fn counts(&self) -> bool {
        self.state == JUDGED
    }
}

const JUDGED: &str = "judged";
const GOLD: &str = "gold";
const SKIPPED: &str = "skipped";
const OPEN: &str = "open";
const DELETED: &str = "deleted";

fn words(outcome: Outcome) -> (&'static str, Option<&'static str>) {
    match outcome {
        Outcome::Judged(verdict) => (JUDGED, Some(verdict.as_str())),
        Outcome::Gold(verdict) => (GOLD, Some(verdict.as_str())),
        Outcome::Skipped => (SKIPPED, None),
        Outcome::Open => (OPEN, None),
    }
}

const COLUMNS: &str = "version, state, verdict, comment, task_id, annotator, a_is_left, finished, latency_ms";
type Row = (Option<i64>, String, Option<String>, Option<String>, String, String, i64, i64, Option<i64>);

fn known(row: Row) -> Known {
    let (version, state, verdict, comment, task_id, annotator, a_is_left, finished, latency_ms) = row;
    Known { version, state, verdict, comment, task_id, annotator, a_is_left: a_is_left != 0, finished, latency_ms }
}

impl Labels {
    /// Takes judgements of another tool into `queue` and says in order what became of each. A task may end with more verdicts than the
    /// queue's overlap: how many people judge is the other tool's affair. `key_id` is the API key that brought them.
    pub async fn import(
        &self,
        queue: &Queue,
        judgements: &[External],
        now: i64,
        key_id: Option<&str>,
    ) -> Result<Vec<Result<Applied, Refused>>, LabelError> {
        at_length(async {
            let mut results = vec![Ok(Applied::Unchanged); judgements.len()];
            // By task: two imports that lock tasks in one order do not wait for each other in a ring.
            let mut order: Vec<usize> = (0..judgements.len()).collect();
            order.sort_by_key(|&at| judgements.get(at).map(|judgement| judgement.task_id));
            for part in order.chunks(BATCH) {
                let mut transaction = self.database.write().begin().await?;
                for &at in part {
                    if let (Some(judgement), Some(result)) = (judgements.get(at), results.get_mut(at)) {
                        *result = take(&mut transaction, queue, &judgement.clean(), now, key_id).await?;
                    }
                }
                transaction.commit().await?;
            }
            Ok(results)
        })
        .await
    }

    /// Takes back judgements that were deleted in the other tool, and remembers that they were, even those never seen before.
    pub async fn delete_external(
        &self,
        queue: &Queue,
        tool: &'static str,
        ids: &[String],
        now: i64,
    ) -> Result<Vec<Applied>, LabelError> {
        at_length(async {
            let mut results = Vec::with_capacity(ids.len());
            for part in ids.chunks(BATCH) {
                let mut transaction = self.database.write().begin().await?;
                let mut tasks = Vec::with_capacity(part.len());
                for id in part {
                    bury(&mut transaction, queue.id, tool, &clean(id), now).await?;
                    tasks.push((find(&mut transaction, queue.id, tool, &clean(id)).await?.map(|known| known.task_id), id));
                }
                // In the order of the tasks, as above.
                tasks.sort();
                for (task_id, id) in tasks {
                    results.push(delete(&mut transaction, queue, tool, &clean(id), &task_id.unwrap_or_default(), now).await?);
                }
                transaction.commit().await?;
            }
            Ok(results)
        })
        .await
    }
}

async fn take(
    transaction: &mut Transaction<'_, Any>,
    queue: &Queue,
    external: &External,
    now: i64,
    key_id: Option<&str>,
) -> Result<Result<Applied, Refused>, LabelError> {
    let Some(task) = locked(transaction, queue, &external.task_id.to_string()).await? else {
        return Ok(Err(Refused::UnknownTask { queue: queue.name.clone(), task: external.task_id }));
    };
    let before = find(transaction, queue.id, external.tool, &external.id).await?;
    if before.as_ref().is_some_and(|known| known.state != DELETED && known.task_id != external.task_id.to_string()) {
        return Ok(Err(Refused::OtherTask { tool: external.tool, id: external.id.clone() }));
    }
    if step(before.as_ref(), external) == Step::Ignore {
        return Ok(Ok(Applied::Unchanged));
    }
    let same = before.as_ref().is_some_and(|known| known.says(external));
    if !write(transaction, queue.id, external, now).await? {
        return Ok(Ok(Applied::Unchanged));
    }
    let mut people = vec![external.annotator.as_str()];
    people.extend(before.as_ref().map(|known| known.annotator.as_str()).filter(|&old| old != external.annotator));
    for person in people {
        settle(transaction, queue, &task, person, external.tool, now, key_id).await?;
    }
    let was_gold = before.as_ref().is_some_and(|known| known.state == GOLD);
    if was_gold || matches!(external.outcome, Outcome::Gold(_)) {
        settle_gold(transaction, queue, &task).await?;
    }
    let counted = before.as_ref().is_some_and(Known::counts);
    Ok(Ok(match external.outcome {
        _ if same => Applied::Unchanged,
        Outcome::Judged(_) if counted => Applied::Edited,
        Outcome::Judged(_) => Applied::Recorded,
        Outcome::Gold(_) => Applied::Gold,
        Outcome::Skipped => Applied::Skipped,
        Outcome::Open if counted => Applied::Withdrawn,
        Outcome::Open => Applied::Unchanged,
    }))
}

/// A deletion may overtake its judgement on the way: a row of its own keeps the judgement from being taken later.
async fn bury(transaction: &mut Transaction<'_, Any>, queue: Uuid, tool: &str, id: &str, now: i64) -> Result<(), LabelError> {
    sqlx::query(
        "INSERT INTO label_external (queue_id, tool, external, state, task_id, annotator, a_is_left, finished)
         VALUES ($1,$2,$3,$4,'','',0,$5) ON CONFLICT (queue_id, tool, external) DO NOTHING",
    )
    .bind(queue.to_string())
    .bind(tool)
    .bind(id)
    .bind(DELETED)
    .bind(now)
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

async fn delete(
    transaction: &mut Transaction<'_, Any>,
    queue: &Queue,
    tool: &str,
    id: &str,
    task_id: &str,
    now: i64,
) -> Result<Applied, LabelError> {
    let Some(task) = locked(transaction, queue, task_id).await? else { return Ok(Applied::Unchanged) };
    let known = find(transaction, queue.id, tool, id).await?;
    let Some(known) = known.filter(|known| known.state != DELETED) else { return Ok(Applied::Unchanged) };
    sqlx::query("UPDATE label_external SET state = $4 WHERE queue_id = $1 AND tool = $2 AND external = $3")
        .bind(queue.id.to_string())
        .bind(tool)
        .bind(id)
        .bind(DELETED)
        .execute(&mut **transaction)
        .await?;
    settle(transaction, queue, &task, &known.annotator, tool, now, None).await?;
    if known.state == GOLD {
        settle_gold(transaction, queue, &task).await?;
    }
    Ok(if known.counts() { Applied::Withdrawn } else { Applied::Unchanged })
}

/// The task, locked until the transaction ends: two imports of one judgement wait for each other.
async fn locked(transaction: &mut Transaction<'_, Any>, queue: &Queue, task_id: &str) -> Result<Option<Task>, LabelError> {
    sqlx::query("UPDATE label_tasks SET verdicts = verdicts WHERE id = $1 AND queue_id = $2")
        .bind(task_id)
        .bind(queue.id.to_string())
        .execute(&mut **transaction)
        .await?;
    let sql = sqlx::AssertSqlSafe(format!("SELECT {} FROM label_tasks t WHERE t.id = $1 AND t.queue_id = $2", task::COLUMNS));
    let row: Option<task::Row> =
        sqlx::query_as(sql).bind(task_id).bind(queue.id.to_string()).fetch_optional(&mut **transaction).await?;
    row.map(task::task).transpose()
}

async fn find(transaction: &mut Transaction<'_, Any>, queue: Uuid, tool: &str, id: &str) -> Result<Option<Known>, LabelError> {
    let sql =
        sqlx::AssertSqlSafe(format!("SELECT {COLUMNS} FROM label_external WHERE queue_id = $1 AND tool = $2 AND external = $3"));
    let row: Option<Row> =
        sqlx::query_as(sql).bind(queue.to_string()).bind(tool).bind(id).fetch_optional(&mut **transaction).await?;
    Ok(row.map(known))
}

/// `false`: it was deleted in the meantime.
async fn write(transaction: &mut Transaction<'_, Any>, queue: Uuid, external: &External, now: i64) -> Result<bool, LabelError> {
    let (state, verdict) = words(external.outcome);
    let written = sqlx::query(
        "INSERT INTO label_external (queue_id, tool, external, version, state, verdict, comment, task_id, annotator, a_is_left, finished, latency_ms)
         VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12)
         ON CONFLICT (queue_id, tool, external) DO UPDATE SET version = excluded.version, state = excluded.state, verdict = excluded.verdict,
         comment = excluded.comment, task_id = excluded.task_id, annotator = excluded.annotator, a_is_left = excluded.a_is_left,
         finished = excluded.finished, latency_ms = excluded.latency_ms WHERE label_external.state <> $13",
    )
    .bind(queue.to_string())
    .bind(external.tool)
    .bind(&external.id)
    .bind(external.version)
    .bind(state)
    .bind(verdict)
    .bind(external.comment.as_deref())
    .bind(external.task_id.to_string())
    .bind(&external.annotator)
    .bind(i64::from(external.a_is_left))
    .bind(external.finished.unwrap_or(now))
    .bind(external.latency_ms)
    .bind(DELETED)
    .execute(&mut **transaction)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Makes the person's assignment, its feedback and the task's count say what the newest judgement that stands says.
async fn settle(
    transaction: &mut Transaction<'_, Any>,
    queue: &Queue,
    task: &Task,
    annotator: &str,
    tool: &str,
    now: i64,
    key_id: Option<&str>,
) -> Result<(), LabelError> {
    let sql = sqlx::AssertSqlSafe(format!(
        "SELECT external, {COLUMNS} FROM label_external WHERE task_id = $1 AND annotator = $2 AND state IN ('judged', 'skipped')
         ORDER BY COALESCE(version, finished) DESC, external DESC LIMIT 1"
    ));
    type Standing = (String, Option<i64>, String, Option<String>, Option<String>, String, String, i64, i64, Option<i64>);
    let standing: Option<Standing> =
        sqlx::query_as(sql).bind(task.id.to_string()).bind(annotator).fetch_optional(&mut **transaction).await?;
    let standing =
        standing.map(|(external, version, state, verdict, comment, task_id, annotator, a_is_left, finished, latency)| {
            (external, known((version, state, verdict, comment, task_id, annotator, a_is_left, finished, latency)))
        });
    let sql = sqlx::AssertSqlSafe(format!(
        "SELECT {} FROM label_assignments a WHERE a.task_id = $1 AND a.annotator = $2",
        assignment::COLUMNS
    ));
    let row: Option<assignment::Row> =
        sqlx::query_as(sql).bind(task.id.to_string()).bind(annotator).fetch_optional(&mut **transaction).await?;
    let current = row.map(assignment::assignment).transpose()?;
    let old_feedback = current.as_ref().and_then(|own| own.feedback_id);
    let Some((external, standing)) = standing else {
        if let Some(own) = current {
            if let Some(feedback) = own.feedback_id {
                withdraw(transaction, feedback, now).await?;
            }
            sqlx::query(
                "UPDATE label_assignments SET state = 'undone', verdict = NULL, reason = NULL, feedback_id = NULL, finished = NULL,
                 external = NULL WHERE id = $1",
            )
            .bind(own.id.to_string())
            .execute(&mut **transaction)
            .await?;
        }
        return recount(transaction, queue, task).await;
    };
    let verdict = standing.verdict.as_deref().filter(|_| standing.counts()).map(Verdict::from_text).transpose()?;
    let own = Assignment {
        id: current.as_ref().map_or_else(Uuid::now_v7, |own| own.id),
        queue_id: queue.id,
        task_id: task.id,
        annotator: annotator.to_owned(),
        state: if verdict.is_some() { State::Done } else { State::Skipped },
        a_is_left: standing.a_is_left,
        verdict,
        reason: standing.comment.clone().filter(|_| verdict.is_none()),
        feedback_id: None,
        started: standing.finished - standing.latency_ms.unwrap_or(0).saturating_mul(1000),
        finished: Some(standing.finished),
        external: Some(format!("{tool}:{external}")),
    };
    let feedback_id = match verdict {
        Some(verdict) => {
            let mut feedback = feedback_row::comparison(queue, task, &own, verdict, standing.finished, tool, key_id);
            feedback.latency_ms = standing.latency_ms;
            if let (Some(comment), Some(value)) = (&standing.comment, feedback.value.as_object_mut()) {
                value.insert("comment".to_owned(), comment.clone().into());
            }
            match old_feedback {
                Some(id) => {
                    rewrite(transaction, id, &feedback, now).await?;
                    Some(id)
                }
                None => {
                    judgements::insert(transaction, &[&feedback]).await?;
                    Some(feedback.id)
                }
            }
        }
        None => {
            if let Some(id) = old_feedback {
                withdraw(transaction, id, now).await?;
            }
            None
        }
    };
    sqlx::query(
        "INSERT INTO label_assignments (id, queue_id, task_id, annotator, state, a_is_left, verdict, reason, feedback_id, started, finished, external)
         VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12)
         ON CONFLICT (task_id, annotator) DO UPDATE SET state = excluded.state, a_is_left = excluded.a_is_left, verdict = excluded.verdict,
         reason = excluded.reason, feedback_id = excluded.feedback_id, started = excluded.started, finished = excluded.finished,
         external = excluded.external",
    )
    .bind(own.id.to_string())
    .bind(queue.id.to_string())
    .bind(task.id.to_string())
    .bind(annotator)
    .bind(if own.state == State::Done { "done" } else { "skipped" })
    .bind(i64::from(own.a_is_left))
    .bind(verdict.map(Verdict::as_str))
    .bind(own.reason.as_deref())
    .bind(feedback_id.map(|id| id.to_string()))
    .bind(own.started)
    .bind(own.finished)
    .bind(own.external.as_deref())
    .execute(&mut **transaction)
    .await?;
    recount(transaction, queue, task).await
}

/// A task has as many verdicts as assignments that are done.
async fn recount(transaction: &mut Transaction<'_, Any>, queue: &Queue, task: &Task) -> Result<(), LabelError> {
    sqlx::query(
        "UPDATE label_tasks SET verdicts = (SELECT COUNT(*) FROM label_assignments a WHERE a.task_id = $1 AND a.state = 'done') WHERE id = $1",
    )
    .bind(task.id.to_string())
    .execute(&mut **transaction)
    .await?;
    sqlx::query("UPDATE label_tasks SET done = CASE WHEN gold IS NULL AND verdicts >= $2 THEN 1 ELSE 0 END WHERE id = $1")
        .bind(task.id.to_string())
        .bind(i64::from(queue.overlap))
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// The task's right verdict is that of the newest gold judgement that stands.
async fn settle_gold(transaction: &mut Transaction<'_, Any>, queue: &Queue, task: &Task) -> Result<(), LabelError> {
    let gold: Option<(Option<String>,)> = sqlx::query_as(
        "SELECT verdict FROM label_external WHERE task_id = $1 AND state = $2 ORDER BY COALESCE(version, finished) DESC, external DESC LIMIT 1",
    )
    .bind(task.id.to_string())
    .bind(GOLD)
    .fetch_optional(&mut **transaction)
    .await?;
    sqlx::query("UPDATE label_tasks SET gold = $2 WHERE id = $1")
        .bind(task.id.to_string())
        .bind(gold.and_then(|(verdict,)| verdict))
        .execute(&mut **transaction)
        .await?;
    recount(transaction, queue, task).await
}

async fn withdraw(transaction: &mut Transaction<'_, Any>, id: Uuid, now: i64) -> Result<(), LabelError> {
    judgements::edit_within(transaction, id, now, |row| row.withdrawn = true).await?;
    Ok(())
}

/// Makes the feedback say what `new` says; the same again changes nothing.
async fn rewrite(transaction: &mut Transaction<'_, Any>, id: Uuid, new: &Feedback, now: i64) -> Result<(), LabelError> {
    judgements::edit_within(transaction, id, now, |row| {
        row.value.clone_from(&new.value);
        row.latency_ms = new.latency_ms;
        row.tags.clone_from(&new.tags);
    })
    .await?;
    Ok(())
}
