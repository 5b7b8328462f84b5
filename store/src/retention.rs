//! What is deleted by itself: answers that are too old, and the oldest when all of them take too much room.
//!
//! - **By age**: every answer, judged or not, with its prompt and choices, and every stored chat and response. An age limit is a promise
//!   to the people who wrote the prompts.
//! - **By size**: the oldest without feedback first, stored chats and responses among them, and judged ones only when no others are
//!   left: a judgement without its answer teaches nothing. The size is that of text and tokens; the files are larger, and SQLite's file
//!   keeps its length and fills the gaps.
//! - **In a rollout that runs**, an answer loses its texts, tokens and person, and what the rollout counts stays until it is over: sums that
//!   shrink while somebody looks at them would promise more than they hold, and oldest-first would take the judged and the others unevenly.
//! - **Never**: feedback, which is small and somebody's work (withdrawing and erasure remove it), labeling tasks, which hold their own
//!   copy of both answers, and snapshots, which hold their own copy of their rows. The lineage of a snapshot keeps the ids of answers
//!   that are gone.
//!
//! Deleted in small transactions with pauses: on SQLite, feedback waits behind each of them.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, Row};
use tokio::sync::watch;

use crate::error::StoreError;
use crate::statement::list;
use crate::store::now_us;
use crate::{Database, Dialect, Retention};

const PART: i64 = 200;
const PAUSE: Duration = Duration::from_millis(20);
const INTERVAL: Duration = Duration::from_secs(60);
/// The name of the lock: "tm" and "ret" in ASCII.
const LOCK: i64 = 0x746d_0072_6574;

const JUDGED: &str = "EXISTS (SELECT 1 FROM choices JOIN feedback_targets ON feedback_targets.target = choices.id \
                      WHERE choices.inference_id = inferences.id)";

pub(crate) async fn run(database: Database, retention: Retention, mut closing: watch::Receiver<bool>) {
    loop {
        let work = async {
            match apply(&database, retention, now_us()).await {
                Ok(0) => {}
                Ok(deleted) => tracing::info!(deleted, "answers beyond the retention limits were deleted"),
                Err(error) => tracing::warn!(%error, "the retention limits could not be applied; trying again in a minute"),
            }
            tokio::time::sleep(INTERVAL).await;
        };
        tokio::select! {
            _ = closing.wait_for(|closing| *closing) => return,
            () = work => {}
        }
    }
}

/// Whether an answer counts in a rollout that runs.
const COUNTS: &str = "CASE WHEN rollout_id IN (SELECT id FROM rollouts WHERE ended IS NULL) THEN 1 ELSE 0 END";
/// About what an answer takes of which only that is left.
const STRIPPED_BYTES: i64 = 700;

/// Deletes what is beyond the limits at `now`, in microseconds since 1970, and says how many answers, stored chats and responses that were;
/// those that a rollout counts on are among them when they have lost their texts.
/// On Postgres one gateway at a time does so: two that count down from the same total side by side would delete more than is too much.
pub async fn apply(database: &Database, retention: Retention, now: i64) -> Result<u64, StoreError> {
    if database.dialect() == Dialect::Sqlite {
        return apply_alone(database, retention, now).await;
    }
    let mut lock = database.write().begin().await?;
    let text = "SELECT CASE WHEN pg_try_advisory_xact_lock($1) THEN 1 ELSE 0 END";
    let (ours,): (i32,) = sqlx::query_as(text).bind(LOCK).fetch_one(&mut *lock).await?;
    let deleted = if ours == 1 { apply_alone(database, retention, now).await } else { Ok(0) };
    lock.commit().await?;
    deleted
}

async fn apply_alone(database: &Database, retention: Retention, now: i64) -> Result<u64, StoreError> {
    // What was kept for rollouts that are over; it was told when it lost its texts.
    loop {
        let text = format!(
            "SELECT id FROM inferences WHERE stripped = 1 AND rollout_id IN (SELECT id FROM rollouts WHERE ended IS NOT NULL) LIMIT {PART}"
        );
        let rows = sqlx::query(AssertSqlSafe(text)).fetch_all(database.read()).await?;
        let ids: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        if ids.is_empty() {
            break;
        }
        delete(database, Place::Answers, &ids).await?;
    }
    let mut deleted = 0;
    if let Some(age) = retention.max_age {
        let before = now.saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
        for place in Place::ALL {
            loop {
                let (table, counts, whole) = match place {
                    Place::Answers => (place.table(), COUNTS, " AND stripped IS NULL"),
                    Place::Chats | Place::Responses => (place.table(), "0", ""),
                };
                let text = format!(
                    "SELECT id, CAST({counts} AS BIGINT) FROM {table} WHERE created < $1{whole} ORDER BY created LIMIT {PART}"
                );
                let rows = sqlx::query(AssertSqlSafe(text)).bind(before).fetch_all(database.read()).await?;
                if rows.is_empty() {
                    break;
                }
                let (mut gone, mut bare) = (Vec::new(), Vec::new());
                for row in &rows {
                    if row.try_get::<i64, _>(1)? == 1 { &mut bare } else { &mut gone }.push(row.try_get(0)?);
                }
                deleted += delete(database, place, &gone).await? + strip(database, &bare).await?;
            }
        }
    }
    if let Some(most) = retention.max_bytes {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let mut total = 0i64;
        for place in Place::ALL {
            let text = format!("SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM {}", place.table());
            let row = sqlx::query(AssertSqlSafe(text)).fetch_one(database.read()).await?;
            total = total.saturating_add(row.try_get(0)?);
        }
        metrics::gauge!("tidemill:store_answer_bytes").set(total as f64);
        let unjudged = format!(
            "SELECT * FROM (SELECT id, bytes, created, CAST(3 * {COUNTS} AS BIGINT) AS place FROM inferences \
                 WHERE stripped IS NULL AND NOT {JUDGED} \
             UNION ALL SELECT id, bytes, created, CAST(1 AS BIGINT) AS place FROM stored_chats \
             UNION ALL SELECT id, bytes, created, CAST(2 AS BIGINT) AS place FROM responses) AS things ORDER BY created LIMIT {PART}"
        );
        let judged = format!(
            "SELECT id, bytes, created, CAST(3 * {COUNTS} AS BIGINT) AS place FROM inferences \
             WHERE stripped IS NULL AND {JUDGED} ORDER BY created LIMIT {PART}"
        );
        for text in [unjudged, judged] {
            while total > most {
                // By place; the last are answers that lose their texts.
                let mut oldest: [Vec<String>; 4] = Default::default();
                for row in sqlx::query(AssertSqlSafe(text.clone())).fetch_all(database.read()).await? {
                    if total <= most {
                        break;
                    }
                    let place = usize::try_from(row.try_get::<i64, _>("place")?).unwrap_or_default();
                    oldest[place.min(3)].push(row.try_get("id")?);
                    let bytes = row.try_get::<i64, _>("bytes")?;
                    total -= if place == 3 { (bytes - STRIPPED_BYTES).max(0) } else { bytes };
                }
                if oldest.iter().all(Vec::is_empty) {
                    break;
                }
                for (place, ids) in Place::ALL.into_iter().zip(&oldest) {
                    deleted += delete(database, place, ids).await?;
                }
                deleted += strip(database, &oldest[3]).await?;
            }
        }
    }
    metrics::counter!("tidemill:store_expired_answers_total").increment(deleted);
    Ok(deleted)
}

/// Where texts lie that grow old.
#[derive(Clone, Copy)]
enum Place {
    Answers,
    Chats,
    Responses,
}

impl Place {
    const ALL: [Self; 3] = [Self::Answers, Self::Chats, Self::Responses];

    fn table(self) -> &'static str {
        match self {
            Self::Answers => "inferences",
            Self::Chats => "stored_chats",
            Self::Responses => "responses",
        }
    }

    /// What is deleted, by the column that holds the thing's id; the thing itself is first.
    fn deletions(self) -> &'static [&'static str] {
        match self {
            Self::Answers => &["DELETE FROM inferences WHERE id IN", "DELETE FROM choices WHERE inference_id IN"],
            Self::Chats => &["DELETE FROM stored_chats WHERE id IN", "DELETE FROM stored_chat_metadata WHERE chat_id IN"],
            Self::Responses => &["DELETE FROM responses WHERE id IN"],
        }
    }
}

async fn delete(database: &Database, place: Place, ids: &[String]) -> Result<u64, StoreError> {
    if ids.is_empty() {
        return Ok(0);
    }
    let mut connection = database.write().acquire().await?;
    let mut transaction = connection.begin().await?;
    let mut deleted = 0;
    // In the order in which answers are written and erased: on Postgres these meet.
    for (index, text) in place.deletions().iter().enumerate() {
        let counts = index == 0;
        let mut query = sqlx::query(AssertSqlSafe(format!("{text} {}", list(1, ids.len()))));
        for id in ids {
            query = query.bind(id.clone());
        }
        let gone = query.execute(&mut *transaction).await?.rows_affected();
        deleted += if counts { gone } else { 0 };
    }
    transaction.commit().await?;
    drop(connection);
    tokio::time::sleep(PAUSE).await;
    Ok(deleted)
}

/// Takes texts, tokens and person from answers that a rollout counts on. A conversation stays named where somebody has judged it, which
/// says the same; the API's key stays, as with all that is counted.
async fn strip(database: &Database, ids: &[String]) -> Result<u64, StoreError> {
    if ids.is_empty() {
        return Ok(0);
    }
    let list = list(1, ids.len());
    let judged = "EXISTS (SELECT 1 FROM feedback WHERE feedback.target = inferences.conversation AND feedback.target_kind = 'conversation')";
    let statements = [
        format!(
            "UPDATE inferences SET stripped = 1, bytes = {STRIPPED_BYTES}, user_key = NULL, metadata = '{{}}', params = NULL, \
             messages = NULL, prompt_text = NULL, prompt_ids = NULL, \
             conversation = CASE WHEN {judged} THEN conversation ELSE NULL END WHERE id IN {list}"
        ),
        format!(
            "UPDATE choices SET output_text = NULL, message = NULL, output_ids = NULL, logprobs = NULL, raw_logprobs = NULL \
             WHERE inference_id IN {list}"
        ),
    ];
    let mut connection = database.write().acquire().await?;
    let mut transaction = connection.begin().await?;
    let mut stripped = 0;
    for (index, text) in statements.into_iter().enumerate() {
        let mut query = sqlx::query(AssertSqlSafe(text));
        for id in ids {
            query = query.bind(id.clone());
        }
        let done = query.execute(&mut *transaction).await?.rows_affected();
        stripped += if index == 0 { done } else { 0 };
    }
    transaction.commit().await?;
    drop(connection);
    tokio::time::sleep(PAUSE).await;
    Ok(stripped)
}
