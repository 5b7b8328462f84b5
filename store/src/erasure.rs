//! Removing a person.
//!
//! Gone are their answers with prompts and choices, their stored chats and responses with every response that goes on from one of
//! them, the feedback that they gave, anyone's feedback on their answers and conversations
//! with its earlier forms, the labeling tasks made from their answers, and their own assignments as an annotator. Snapshots and
//! adapters that were made from any of it are marked, not deleted: whether to rebuild or to withdraw them is for people to decide. The
//! summary of such a snapshot's report goes, since it names people. So do damaged segments of this data directory's spill log.
//!
//! SQLite overwrites what it deletes (`secure_delete`), and its write-ahead log is emptied afterwards. Postgres does so when it vacuums.
//!
//! What remains is a pseudonym (a keyed hash) of the person and of each answer: in the audit, in place of their name in the lineage of
//! snapshots and adapters, and in `erasures`, by which a record that waited elsewhere (the spill log of another gateway), or a response that was
//! going on from an erased one, is left out when it comes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde::Serialize;
use serde_json::json;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Connection, Row};

use crate::audit::Act;
use crate::error::StoreError;
use crate::ids::IdKey;
use crate::statement::{clean, list};
use crate::{Database, Dialect};

/// What was removed and what was made from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Erasure {
    /// Answers to the person.
    pub inferences: u64,
    /// Stored chats and responses of the person, and responses that go on from those.
    pub stored: u64,
    /// Feedback by the person, and of anyone on these answers.
    pub feedback: u64,
    /// Labeling tasks with these answers.
    pub labels: u64,
    /// Snapshots that hold some of it, `name@version`; they are marked tainted.
    pub snapshots: Vec<String>,
    /// Adapters trained from those, `name@generation`; they are marked tainted.
    pub adapters: Vec<String>,
}

const PART: usize = 500;

pub(crate) async fn erase(database: &Database, ids: &IdKey, user: &str, act: Act) -> Result<Erasure, StoreError> {
    let (begun, now) = (Instant::now(), act.at);
    let user = clean(user).into_owned();
    let pseudonym = ids.pseudonym(&user);
    let mut connection = database.write().acquire().await?;
    // The mark first, by itself: whoever writes an answer of theirs from here on sees it, and whoever wrote one before is seen below.
    mark(&mut connection, std::slice::from_ref(&pseudonym), now).await?;
    let mut transaction = match database.dialect() {
        // SQLite lets nobody write who began by reading and was overtaken by another process: the server, where this is a command.
        Dialect::Sqlite => connection.begin_with("BEGIN IMMEDIATE").await?,
        Dialect::Postgres => connection.begin().await?,
    };
    let sql = &mut *transaction;
    if database.dialect() == Dialect::Postgres {
        // In the order in which all others come to these tables: a verdict holds its task when it writes feedback. Whoever is writing
        // is waited for, and seen below; whoever comes now waits, and sees the marks.
        let lock = "LOCK TABLE label_tasks, label_drafts, inferences, choices, feedback, feedback_targets, stored_chats, responses, \
                    snapshots, snapshot_sources, adapters IN SHARE ROW EXCLUSIVE MODE";
        sqlx::query(lock).execute(&mut *sql).await?;
    }

    let mut answers = texts(sql, "SELECT id FROM inferences WHERE user_key = $1", &user).await?;
    // What a rollout counts names nobody, but the hash by which it tells people apart is theirs.
    let counted = sqlx::query("SELECT id FROM inferences WHERE unit = $1 AND unit IS NOT NULL AND user_key IS NULL");
    for row in counted.bind(ids.unit(&user)).fetch_all(&mut *sql).await? {
        answers.insert(row.try_get(0)?);
    }
    let conversations =
        texts(sql, "SELECT DISTINCT conversation FROM inferences WHERE user_key = $1 AND conversation IS NOT NULL", &user)
            .await?;
    let choices = related(sql, "SELECT id FROM choices WHERE inference_id IN", &answers).await?;
    let mut targets = choices.clone();
    targets.extend(answers.iter().cloned());
    targets.extend(conversations);

    let mut feedback = texts(sql, "SELECT id FROM feedback WHERE author = $1", &user).await?;
    feedback.extend(related(sql, "SELECT feedback_id FROM feedback_targets WHERE target IN", &targets).await?);
    let mut tasks = related(sql, "SELECT id FROM label_tasks WHERE candidate_a IN", &targets).await?;
    tasks.extend(related(sql, "SELECT id FROM label_tasks WHERE candidate_b IN", &targets).await?);

    let chats = texts(sql, "SELECT id FROM stored_chats WHERE user_key = $1", &user).await?;
    let responses = texts(sql, "SELECT id FROM responses WHERE user_key = $1", &user).await?;
    let responses = with_successors(sql, responses).await?;

    let mut sources = feedback.clone();
    sources.extend(targets.iter().cloned());
    sources.extend(tasks.iter().cloned());
    // By their pseudonym, too: a snapshot that was written during an earlier erasure has no other.
    sources.extend([user.clone(), pseudonym.clone()]);
    let snapshots = related(sql, "SELECT DISTINCT snapshot_id FROM snapshot_sources WHERE source IN", &sources).await?;
    let reason = json!({"reason": "erasure", "at": now, "person": pseudonym}).to_string();
    let (snapshots, adapters) = taint(sql, &snapshots, &reason).await?;
    let erasure = Erasure {
        inferences: answers.len() as u64,
        stored: (chats.len() + responses.len()) as u64,
        feedback: feedback.len() as u64,
        labels: tasks.len() as u64,
        snapshots,
        adapters,
    };

    // Of responses, too: what goes on from one may be under way.
    let marks: Vec<String> = targets.union(&responses).map(|target| ids.pseudonym(target)).collect();
    mark(sql, &marks, now).await?;
    let renamed = "UPDATE snapshot_sources SET source = $2 WHERE source = $1";
    sqlx::query(renamed).bind(user.clone()).bind(pseudonym.clone()).execute(&mut *sql).await?;
    crate::adapters::rename_in_lineage(sql, database.dialect(), &user, &pseudonym).await?;
    for (table, column, keys) in [
        ("label_tasks", "id", &tasks),
        ("label_assignments", "task_id", &tasks),
        ("label_external", "task_id", &tasks),
        ("label_drafts", "candidate_a", &targets),
        ("feedback", "id", &feedback),
        ("feedback_revisions", "feedback_id", &feedback),
        ("feedback_targets", "feedback_id", &feedback),
        ("inferences", "id", &answers),
        ("choices", "inference_id", &answers),
        ("stored_chats", "id", &chats),
        ("stored_chat_metadata", "chat_id", &chats),
        ("responses", "id", &responses),
    ] {
        delete(sql, &format!("DELETE FROM {table} WHERE {column} IN"), keys).await?;
    }
    // What they said before someone else was named as the author. A revision is JSON of ours: no value of it has an author inside.
    let position = match database.dialect() {
        Dialect::Sqlite => "DELETE FROM feedback_revisions WHERE instr(body, $1) > 0",
        Dialect::Postgres => "DELETE FROM feedback_revisions WHERE strpos(body, $1) > 0",
    };
    sqlx::query(position).bind(format!("\"author\":{}", json!(user))).execute(&mut *sql).await?;
    crate::label::forget_annotator(sql, &user).await?;
    act.to(&pseudonym).with(json!(erasure)).write(sql).await?;
    // Until here others read what is gone now, and may be making something of it: that is as old as its reading.
    let end = now.saturating_add(i64::try_from(begun.elapsed().as_micros()).unwrap_or(i64::MAX));
    mark(sql, &[pseudonym], end).await?;
    transaction.commit().await?;
    // On SQLite there is no other connection to write with.
    drop(connection);
    if !database.empty_log().await? {
        tracing::warn!(
            "the database is too busy to empty its write-ahead log now; what was erased leaves it within the next writes"
        );
    }
    Ok(erasure)
}

/// The responses, and all that go on from them: each was made with the texts of those before it.
async fn with_successors(sql: &mut AnyConnection, mut found: BTreeSet<String>) -> Result<BTreeSet<String>, sqlx::Error> {
    let mut latest = found.clone();
    while !latest.is_empty() {
        let next = related(sql, "SELECT id FROM responses WHERE previous IN", &latest).await?;
        latest = next.into_iter().filter(|id| found.insert(id.clone())).collect();
    }
    Ok(found)
}

/// Marks the snapshots, and the adapters that were trained from them or from such an adapter; returns their names, sorted.
async fn taint(sql: &mut AnyConnection, ids: &BTreeSet<String>, reason: &str) -> Result<(Vec<String>, Vec<String>), sqlx::Error> {
    let (mut snapshots, mut adapters) = (BTreeSet::new(), BTreeMap::new());
    let mut parents = Vec::new();
    for id in ids {
        let text = "UPDATE snapshots SET tainted = COALESCE(tainted, $2), report = '{}' WHERE id = $1 RETURNING name, version";
        let rows = sqlx::query(text).bind(id.clone()).bind(reason.to_owned()).fetch_all(&mut *sql).await?;
        for row in &rows {
            snapshots.insert(format!("{}@{}", row.try_get::<String, _>(0)?, row.try_get::<i64, _>(1)?));
        }
        let trained = "UPDATE adapters SET tainted = COALESCE(tainted, $2) WHERE snapshot_id = $1 RETURNING id, name, generation";
        parents.extend(marked(sql, trained, id, reason).await?);
    }
    let continued = "UPDATE adapters SET tainted = COALESCE(tainted, $2) WHERE parent = $1 RETURNING id, name, generation";
    while let Some((id, name)) = parents.pop() {
        if adapters.insert(id.clone(), name).is_none() {
            parents.extend(marked(sql, continued, &id, reason).await?);
        }
    }
    let mut adapters: Vec<String> = adapters.into_values().collect();
    adapters.sort_unstable();
    Ok((snapshots.into_iter().collect(), adapters))
}

/// Ids and names of the adapters that the statement marks.
async fn marked(
    sql: &mut AnyConnection,
    text: &'static str,
    key: &str,
    reason: &str,
) -> Result<Vec<(String, String)>, sqlx::Error> {
    let rows = sqlx::query(text).bind(key.to_owned()).bind(reason.to_owned()).fetch_all(sql).await?;
    let read = |row: &AnyRow| Ok((row.try_get(0)?, crate::adapters::reference(&row.try_get::<String, _>(1)?, row.try_get(2)?)));
    rows.iter().map(read).collect()
}

pub(crate) async fn mark(sql: &mut AnyConnection, subjects: &[String], now: i64) -> Result<(), sqlx::Error> {
    for subject in subjects {
        let text = "INSERT INTO erasures (subject, at) VALUES ($1, $2) ON CONFLICT (subject) DO UPDATE SET at = excluded.at";
        sqlx::query(text).bind(subject.clone()).bind(now).execute(&mut *sql).await?;
    }
    Ok(())
}

async fn texts(sql: &mut AnyConnection, query: &'static str, value: &str) -> Result<BTreeSet<String>, sqlx::Error> {
    sqlx::query(query).bind(value.to_owned()).fetch_all(sql).await?.iter().map(|row| row.try_get(0)).collect()
}

async fn related(sql: &mut AnyConnection, query: &str, keys: &BTreeSet<String>) -> Result<BTreeSet<String>, sqlx::Error> {
    let mut found = BTreeSet::new();
    let keys: Vec<&String> = keys.iter().collect();
    for part in keys.chunks(PART) {
        let mut query = sqlx::query(AssertSqlSafe(format!("{query} {}", list(1, part.len()))));
        for key in part {
            query = query.bind((*key).clone());
        }
        for row in query.fetch_all(&mut *sql).await? {
            found.insert(row.try_get(0)?);
        }
    }
    Ok(found)
}

async fn delete(sql: &mut AnyConnection, query: &str, keys: &BTreeSet<String>) -> Result<(), sqlx::Error> {
    let keys: Vec<&String> = keys.iter().collect();
    for part in keys.chunks(PART) {
        let mut query = sqlx::query(AssertSqlSafe(format!("{query} {}", list(1, part.len()))));
        for key in part {
            query = query.bind((*key).clone());
        }
        query.execute(&mut *sql).await?;
    }
    Ok(())
}
