//! Transactions of many records, with an end to waiting for them.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Any, AnyConnection, AssertSqlSafe, Connection, Row};

use crate::ids::IdKey;
use crate::judgements::Acknowledged;
use crate::records::{Feedback, Inference};
use crate::statement::{clean, list};
use crate::traffic::Counted;
use crate::{Database, Dialect, erasure, inferences, judgements};

/// How long a transaction may take before the database counts as away. What it writes may arrive all the same: ids make that harmless.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a transaction was not confirmed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The database is away, slow, full or busy: the same transaction may succeed later.
    #[error("{0}")]
    Away(String),
    /// The database refuses these records, now and later.
    #[error(transparent)]
    Refused(sqlx::Error),
}

/// What a transaction writes.
#[derive(Clone, Copy)]
enum Batch<'a> {
    /// Answers that are not there yet, except of people who have been erased since.
    Answers(&'a IdKey, &'a [Inference]),
    /// Feedback that is not there yet, except what is by, or about an answer to, people who have been erased since.
    Feedback(&'a IdKey, &'a [&'a Feedback]),
    /// Nothing new: can the database be written? One that is full, or a standby, answers and cannot.
    Ping,
}

pub(crate) async fn answers(database: &Database, ids: &IdKey, rows: &[Inference]) -> Result<(), Trouble> {
    within_patience(database, Batch::Answers(ids, rows)).await.map(|_| ())
}

/// Says in order what became of each.
pub(crate) async fn feedback(database: &Database, ids: &IdKey, rows: &[&Feedback]) -> Result<Vec<Acknowledged>, Trouble> {
    within_patience(database, Batch::Feedback(ids, rows)).await
}

pub(crate) async fn ping(database: &Database) -> Result<(), Trouble> {
    within_patience(database, Batch::Ping).await.map(|_| ())
}

impl Batch<'_> {
    async fn write(self, sql: &mut AnyConnection) -> Result<Vec<Acknowledged>, sqlx::Error> {
        match self {
            Self::Answers(ids, rows) => {
                let mut new = inferences::insert(sql, rows).await?;
                // Asked after the insert: an erasure at the same time has either seen these rows, or its mark is seen here.
                let erased = erased(sql, ids, rows.iter().filter_map(|row| row.user_key.as_deref()).collect()).await?;
                for row in rows {
                    let at = row.user_key.as_deref().and_then(|user| erased.get(&ids.pseudonym(user)));
                    let Some(at) = at.filter(|at| row.created <= **at) else { continue };
                    new.remove(&row.id.to_string());
                    for text in ["DELETE FROM inferences WHERE id = $1", "DELETE FROM choices WHERE inference_id = $1"] {
                        sqlx::query(text).bind(row.id.to_string()).execute(&mut *sql).await?;
                    }
                    // Feedback on it may wait behind it in the same log.
                    let ids_of = row.choices.iter().map(|choice| choice.id.to_string()).chain([row.id.to_string()]);
                    let marks: Vec<String> =
                        ids_of.chain(row.conversation.clone()).map(|target| ids.pseudonym(&target)).collect();
                    erasure::mark(sql, &marks, *at).await?;
                }
                // An id is taken out with its row: of one that is there twice, one was written.
                let written = rows.iter().filter(|row| new.remove(&row.id.to_string()));
                Counted::of(written).add_to(sql).await?;
                Ok(Vec::new())
            }
            Self::Feedback(ids, rows) => {
                let acknowledged = judgements::insert(sql, rows).await?;
                // Asked after the insert, as with answers.
                let erased = erased(sql, ids, rows.iter().flat_map(|row| subjects(row)).collect()).await?;
                let is_erased = |row: &Feedback| {
                    subjects(row).any(|subject| erased.get(&ids.pseudonym(subject)).is_some_and(|at| row.created <= *at))
                };
                for row in rows.iter().filter(|row| is_erased(row)) {
                    for text in ["DELETE FROM feedback WHERE id = $1", "DELETE FROM feedback_targets WHERE feedback_id = $1"] {
                        sqlx::query(text).bind(row.id.to_string()).execute(&mut *sql).await?;
                    }
                }
                Ok(acknowledged)
            }
            Self::Ping => {
                sqlx::query("UPDATE meta SET value = value WHERE name = 'id_key'").execute(sql).await?;
                Ok(Vec::new())
            }
        }
    }
}

/// Whom or what an erasure may have been about.
fn subjects(row: &Feedback) -> impl Iterator<Item = &str> {
    row.author.iter().chain(&row.targets).map(String::as_str)
}

/// Whether the person was erased after `created`. Asked after the insert, within its transaction: an erasure at the same time has
/// either seen the row, or its mark is seen here.
pub(crate) async fn erased_since(
    sql: &mut AnyConnection,
    ids: &IdKey,
    user: Option<&str>,
    created: i64,
) -> Result<bool, sqlx::Error> {
    let Some(user) = user else { return Ok(false) };
    let user = clean(user);
    Ok(erased(sql, ids, vec![&user]).await?.values().any(|at| created <= *at))
}

/// Whether the answer or the response of this id was erased, whenever that was: ids do not come again.
pub(crate) async fn is_erased(sql: &mut AnyConnection, ids: &IdKey, id: &str) -> Result<bool, sqlx::Error> {
    Ok(!erased(sql, ids, vec![id]).await?.is_empty())
}

/// Which of these people or answers have been erased, by pseudonym, and when.
pub(crate) async fn erased(
    sql: &mut AnyConnection,
    ids: &IdKey,
    mut names: Vec<&str>,
) -> Result<HashMap<String, i64>, sqlx::Error> {
    names.sort_unstable();
    names.dedup();
    let mut found = HashMap::new();
    for part in names.chunks(500) {
        let text = format!("SELECT subject, at FROM erasures WHERE subject IN {}", list(1, part.len()));
        let mut query = sqlx::query(AssertSqlSafe(text));
        for name in part {
            query = query.bind(ids.pseudonym(name));
        }
        for row in query.fetch_all(&mut *sql).await? {
            found.insert(row.try_get(0)?, row.try_get(1)?);
        }
    }
    Ok(found)
}

async fn within_patience(database: &Database, batch: Batch<'_>) -> Result<Vec<Acknowledged>, Trouble> {
    let dialect = database.dialect();
    // A server that is up gives a connection at once. SQLite's only writer may be busy with a long erasure.
    let acquire = match dialect {
        Dialect::Postgres => Duration::from_secs(1),
        Dialect::Sqlite => PATIENCE,
    };
    let mut tries = 0;
    loop {
        let connection = match tokio::time::timeout(acquire, database.write().acquire()).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(Trouble::of(dialect, error)),
            Err(_) => return Err(Trouble::Away("it gives no connection".to_owned())),
        };
        match attempt(connection, batch).await {
            // Another transaction was in the way, and the database chose this one to be undone.
            Some(Err(error)) if tries < 3 && is_conflict(&error) => tries += 1,
            Some(Err(error)) => return Err(Trouble::of(dialect, error)),
            Some(Ok(done)) => return Ok(done),
            None => return Err(Trouble::Away(format!("it did not commit within {} s", PATIENCE.as_secs()))),
        }
    }
}

/// `None`: it took too long.
async fn attempt(mut connection: PoolConnection<Any>, batch: Batch<'_>) -> Option<Result<Vec<Acknowledged>, sqlx::Error>> {
    let transaction = async {
        let mut transaction = connection.begin().await?;
        let done = batch.write(&mut transaction).await?;
        transaction.commit().await?;
        Ok(done)
    };
    let result = tokio::time::timeout(PATIENCE, transaction).await;
    if result.is_err() {
        // Given back to the pool it would be asked whether it is well, and hang there.
        drop(connection.detach());
    }
    result.ok()
}

fn is_conflict(error: &sqlx::Error) -> bool {
    // Postgres: serialization_failure and deadlock_detected.
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == "40001" || code == "40P01")
}

impl Trouble {
    fn of(dialect: Dialect, error: sqlx::Error) -> Self {
        let refused = match &error {
            sqlx::Error::Database(database) => {
                let code = database.code().unwrap_or_default();
                match dialect {
                    // Classes 22 (data), 23 (integrity) and 54 (limits, such as an index entry's length) are about the records. The
                    // rest (connection, resources, shutdown, a standby, missing rights or tables) is about the server.
                    Dialect::Postgres => ["22", "23", "54"].iter().any(|class| code.starts_with(class)),
                    // SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH, SQLITE_RANGE.
                    Dialect::Sqlite => matches!(code.parse::<u32>().unwrap_or(0) & 0xFF, 18 | 19 | 20 | 25),
                }
            }
            sqlx::Error::Encode(_) => true,
            _ => false,
        };
        if refused { Self::Refused(error) } else { Self::Away(error.to_string()) }
    }
}
