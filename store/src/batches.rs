//! Batches: requests in a file, answered in the background.
//!
//! A batch is run by the one server that holds the data directory with its input, so nobody has to take turns. The answers are in two
//! files that only grow; the row says what the batch is and, roughly, how far. It ends in one transaction, in which those files become
//! files that clients see.

use serde::Serialize;
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Connection, Row};
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::files::{self, FileRecord, Viewer};
use crate::inferences::parse;
use crate::page::{Order, Page};
use crate::patience::patiently;
use crate::statement::{Select, clean};

/// States in which something is still to be done.
pub(crate) const OPEN: &str = "('validating','in_progress','finalizing','cancelling')";

const COLUMNS: &str = "id, created, key_id, endpoint, input_file, output_file, error_file, has_output, has_errors, metadata, \
     keep_seconds, state, errors, model, total, completed, failed, token_usage, expires, in_progress_at, finalizing_at, completed_at, \
     failed_at, expired_at, cancelling_at, cancelled_at, place";

/// Where a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchState {
    /// Its input is looked through before anything runs.
    Validating,
    /// Its input was refused.
    Failed,
    /// Requests run.
    InProgress,
    /// All have run.
    Finalizing,
    /// Ended; every request ran.
    Completed,
    /// Ended when its time was over.
    Expired,
    /// Asked to stop.
    Cancelling,
    /// Ended on request.
    Cancelled,
}

impl BatchState {
    const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen.
    pub fn ended(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// Requests of a batch that were counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchProgress {
    /// In the input.
    pub total: u64,
    /// Answered.
    pub completed: u64,
    /// Answered with an error.
    pub failed: u64,
}

/// A batch to be.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchDraft {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// The key that made it, with whose rights its requests run.
    pub key_id: Option<String>,
    /// Path that every request goes to.
    pub endpoint: String,
    /// The file with the requests.
    pub input_file: Uuid,
    /// The file that will hold the answers.
    pub output_file: Uuid,
    /// The file that will hold the errors.
    pub error_file: Uuid,
    /// The client's own pairs.
    pub metadata: Option<Value>,
    /// How long output and errors are kept; `None` is until somebody deletes them.
    pub keep_seconds: Option<i64>,
    /// When it stops, in microseconds since 1970.
    pub expires: i64,
    /// The data directory that has the input.
    pub place: String,
}

/// A batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// What was asked.
    pub draft: BatchDraft,
    /// Where it is.
    pub state: BatchState,
    /// The output is there for clients.
    pub has_output: bool,
    /// The file of errors is there for clients.
    pub has_errors: bool,
    /// What is wrong with the input: objects with `code`, `line`, `message`, `param`.
    pub errors: Option<Value>,
    /// The model, where all requests name the same.
    pub model: Option<String>,
    /// How far it is.
    pub progress: BatchProgress,
    /// Tokens, in the form of the API.
    pub usage: Option<Value>,
    /// When it entered a state, in microseconds since 1970.
    times: Vec<(BatchState, i64)>,
}

impl Batch {
    /// When it entered `state`, in microseconds since 1970.
    pub fn entered(&self, state: BatchState) -> Option<i64> {
        self.times.iter().find(|(of, _)| *of == state).map(|(_, at)| *at)
    }
}

/// How a batch ends.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchOutcome {
    /// The last state.
    pub state: BatchState,
    /// The counts.
    pub progress: BatchProgress,
    /// Tokens, in the form of the API.
    pub usage: Value,
    /// The output, where there is any. Its content lies in its place.
    pub output: Option<FileRecord>,
    /// The errors, where there are any.
    pub errors: Option<FileRecord>,
    /// What was wrong with the input, where that ended it.
    pub problems: Option<Value>,
}

/// The batches of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Batches {
    database: Database,
}

impl Batches {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Writes a new batch; `false` when its input was deleted meanwhile.
    pub async fn insert(&self, draft: &BatchDraft) -> Result<bool, StoreError> {
        patiently(async {
            let text = "INSERT INTO batches (id, created, key_id, endpoint, input_file, output_file, error_file, has_output, has_errors, \
                 metadata, keep_seconds, state, total, completed, failed, expires, place) \
                 SELECT $1,$2,$3,$4,id,$6,$7,0,0,$8,$9,'validating',0,0,0,$10,$11 FROM files WHERE id = $5";
            let inserted = sqlx::query(text)
                .bind(draft.id.to_string())
                .bind(draft.created)
                .bind(draft.key_id.clone())
                .bind(draft.endpoint.clone())
                .bind(draft.input_file.to_string())
                .bind(draft.output_file.to_string())
                .bind(draft.error_file.to_string())
                .bind(draft.metadata.as_ref().map(|metadata| clean(&metadata.to_string()).into_owned()))
                .bind(draft.keep_seconds)
                .bind(draft.expires)
                .bind(draft.place.clone())
                .execute(self.database.write())
                .await?;
            Ok(inserted.rows_affected() > 0)
        })
        .await
    }

    /// The batch of this id, if it is there for `viewer`.
    pub async fn find(&self, id: Uuid, viewer: &Viewer) -> Result<Option<Batch>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM batches WHERE id = $1");
            let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string());
            let found = query.fetch_optional(self.database.read()).await?.as_ref().map(read).transpose()?;
            Ok(found.filter(|batch| viewer.sees(batch.draft.key_id.as_deref())))
        })
        .await
    }

    /// A page of the batches that are there for `viewer`, the newest first.
    pub async fn list(&self, viewer: &Viewer, after: Option<Uuid>, limit: usize) -> Result<Page<Batch>, StoreError> {
        patiently(async {
            let order = Order::NewestFirst;
            let mut select = Select::new(&format!("SELECT {COLUMNS} FROM batches"));
            select.text_option("key_id = ?", viewer.key_id());
            select.text_option(&order.after("id"), after.map(|id| id.to_string()).as_deref());
            select.end(&format!(" ORDER BY id {} LIMIT {}", order.sql(), limit + 1));
            let rows = select.query().fetch_all(self.database.read()).await?;
            Ok(Page::of(rows.iter().map(read).collect::<Result<_, _>>()?, limit))
        })
        .await
    }

    /// Ids of the batches of a data directory in which something is still to be done, the oldest first.
    pub async fn open(&self, place: &str) -> Result<Vec<Uuid>, StoreError> {
        patiently(async {
            let text = format!("SELECT id FROM batches WHERE place = $1 AND state IN {OPEN} ORDER BY id");
            let rows = sqlx::query(AssertSqlSafe(text)).bind(place.to_owned()).fetch_all(self.database.read()).await?;
            let ids = rows.iter().map(|row| row.try_get::<String, _>(0)).collect::<Result<Vec<_>, _>>()?;
            Ok(ids.iter().filter_map(|id| Uuid::try_parse(id).ok()).collect())
        })
        .await
    }

    /// The input is good: requests may run.
    pub async fn begin(&self, id: Uuid, total: u64, model: Option<&str>, now: i64) -> Result<(), StoreError> {
        patiently(async {
            let text = "UPDATE batches SET state = 'in_progress', in_progress_at = $2, total = $3, model = $4 WHERE id = $1 AND state = 'validating'";
            sqlx::query(text)
                .bind(id.to_string())
                .bind(now)
                .bind(total.cast_signed())
                .bind(model.map(|model| clean(model).into_owned()))
                .execute(self.database.write())
                .await?;
            Ok(())
        })
        .await
    }

    /// The input is bad, or cannot be read any more.
    pub async fn fail(&self, id: Uuid, errors: &Value, now: i64) -> Result<(), StoreError> {
        patiently(async {
            let text =
                format!("UPDATE batches SET state = 'failed', failed_at = $2, errors = $3 WHERE id = $1 AND state IN {OPEN}");
            sqlx::query(AssertSqlSafe(text))
                .bind(id.to_string())
                .bind(now)
                .bind(clean(&errors.to_string()).into_owned())
                .execute(self.database.write())
                .await?;
            Ok(())
        })
        .await
    }

    /// Writes down how far a batch is and says in which state it is now; `None` when its row is gone.
    pub async fn report(&self, id: Uuid, progress: BatchProgress, usage: &Value) -> Result<Option<BatchState>, StoreError> {
        patiently(async {
            let text = "UPDATE batches SET completed = $2, failed = $3, token_usage = $4 WHERE id = $1 RETURNING state";
            let row = sqlx::query(text)
                .bind(id.to_string())
                .bind(progress.completed.cast_signed())
                .bind(progress.failed.cast_signed())
                .bind(usage.to_string())
                .fetch_optional(self.database.write())
                .await?;
            row.map(|row| state(&id.to_string(), &row.try_get::<String, _>(0)?)).transpose()
        })
        .await
    }

    /// All requests have run.
    pub async fn finalize(&self, id: Uuid, now: i64) -> Result<(), StoreError> {
        patiently(async {
            let text = "UPDATE batches SET state = 'finalizing', finalizing_at = $2 WHERE id = $1 AND state = 'in_progress'";
            sqlx::query(text).bind(id.to_string()).bind(now).execute(self.database.write()).await?;
            Ok(())
        })
        .await
    }

    /// Asks a batch to stop; `false` when it had ended or was asked before.
    pub async fn cancel(&self, id: Uuid, now: i64) -> Result<bool, StoreError> {
        patiently(async {
            let text = "UPDATE batches SET state = 'cancelling', cancelling_at = $2 WHERE id = $1 \
                        AND state IN ('validating','in_progress','finalizing')";
            let done = sqlx::query(text).bind(id.to_string()).bind(now).execute(self.database.write()).await?;
            Ok(done.rows_affected() > 0)
        })
        .await
    }

    /// Ends a batch and shows its files, in one.
    pub async fn end(&self, id: Uuid, outcome: &BatchOutcome, now: i64) -> Result<(), StoreError> {
        patiently(async {
            let mut connection = self.database.write().acquire().await?;
            let mut transaction = connection.begin().await?;
            let at = format!("{}_at", outcome.state.as_str());
            let text = format!(
                "UPDATE batches SET state = $2, {at} = $3, completed = $4, failed = $5, token_usage = $6, has_output = $7, has_errors = $8, \
                 errors = $9 \
                 WHERE id = $1 AND state IN {OPEN}"
            );
            let ended = sqlx::query(AssertSqlSafe(text))
                .bind(id.to_string())
                .bind(outcome.state.as_str())
                .bind(now)
                .bind(outcome.progress.completed.cast_signed())
                .bind(outcome.progress.failed.cast_signed())
                .bind(outcome.usage.to_string())
                .bind(i64::from(outcome.output.is_some()))
                .bind(i64::from(outcome.errors.is_some()))
                .bind(outcome.problems.as_ref().map(|problems| clean(&problems.to_string()).into_owned()))
                .execute(&mut *transaction)
                .await?;
            if ended.rows_affected() > 0 {
                for file in [&outcome.output, &outcome.errors].into_iter().flatten() {
                    files::insert(&mut transaction, file).await?;
                }
            }
            transaction.commit().await?;
            Ok(())
        })
        .await
    }
}

fn state(id: &str, word: &str) -> Result<BatchState, StoreError> {
    let bad = || StoreError::Row { table: "batch", id: id.to_owned(), reason: format!("'{word}' is no state") };
    BatchState::ALL.into_iter().find(|state| state.as_str() == word).ok_or_else(bad)
}

fn read(row: &AnyRow) -> Result<Batch, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "batch", id: id.clone(), reason };
    let uuid = |column: &str| -> Result<Uuid, StoreError> {
        Uuid::try_parse(&row.try_get::<String, _>(column)?).map_err(|_| bad(format!("'{column}' is no UUID")))
    };
    let json = |column: &str| parse::<Value>(row, column).map_err(bad);
    let count = |column: &str| -> Result<u64, StoreError> { Ok(row.try_get::<i64, _>(column)?.unsigned_abs()) };
    let mut times = Vec::new();
    for state in BatchState::ALL.into_iter().filter(|state| *state != BatchState::Validating) {
        if let Some(at) = row.try_get::<Option<i64>, _>(format!("{}_at", state.as_str()).as_str())? {
            times.push((state, at));
        }
    }
    Ok(Batch {
        draft: BatchDraft {
            id: uuid("id")?,
            created: row.try_get("created")?,
            key_id: row.try_get("key_id")?,
            endpoint: row.try_get("endpoint")?,
            input_file: uuid("input_file")?,
            output_file: uuid("output_file")?,
            error_file: uuid("error_file")?,
            metadata: json("metadata")?,
            keep_seconds: row.try_get("keep_seconds")?,
            expires: row.try_get("expires")?,
            place: row.try_get("place")?,
        },
        state: state(&id, &row.try_get::<String, _>("state")?)?,
        has_output: row.try_get::<i64, _>("has_output")? != 0,
        has_errors: row.try_get::<i64, _>("has_errors")? != 0,
        errors: json("errors")?,
        model: row.try_get("model")?,
        progress: BatchProgress { total: count("total")?, completed: count("completed")?, failed: count("failed")? },
        usage: json("token_usage")?,
        times,
    })
}
