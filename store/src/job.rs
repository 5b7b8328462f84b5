//! Long work, as rows that anyone can look at.

use serde::Serialize;
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::Database;
use crate::audit::Act;
use crate::error::StoreError;
use crate::patience::patiently;
use crate::statement::clean;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Accepted, and waits for its turn.
    Queued,
    /// At work.
    Running,
    /// Ended well.
    Succeeded,
    /// Ended, and the error says why.
    Failed,
    /// Stopped on request.
    Cancelled,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Job {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// Of the last sign of life.
    pub updated: i64,
    /// What sort of work, such as `dataset.build`.
    pub kind: String,
    /// Where it is.
    pub state: JobState,
    /// What was asked.
    pub spec: Value,
    /// How far it is, and at the end what came out.
    pub progress: Value,
    /// Why it failed.
    pub error: Option<String>,
}

/// The jobs of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Jobs {
    database: Database,
}

const COLUMNS: &str = "id, created, updated, kind, state, spec, progress, error";
/// A job that shows no life for so long has lost its process, in microseconds.
const LOST_AFTER: i64 = 60_000_000;

impl JobState {
    fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen.
    pub fn ended(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl Jobs {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Writes a new job, queued, that somebody wants.
    pub async fn insert(&self, id: Uuid, kind: &str, spec: &Value, act: Act) -> Result<(), StoreError> {
        patiently(async {
            let mut transaction = self.database.write().begin().await?;
            sqlx::query(AssertSqlSafe(format!("INSERT INTO jobs ({COLUMNS}) VALUES ($1,$2,$2,$3,'queued',$4,'{{}}',NULL)")))
                .bind(id.to_string())
                .bind(act.at)
                .bind(kind.to_owned())
                .bind(clean(&spec.to_string()).into_owned())
                .execute(&mut *transaction)
                .await?;
            act.write(&mut transaction).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// Says where a job is. One that has ended stays ended.
    pub async fn update(
        &self,
        id: Uuid,
        state: JobState,
        progress: &Value,
        error: Option<&str>,
        now: i64,
    ) -> Result<(), StoreError> {
        patiently(async {
            sqlx::query(
                "UPDATE jobs SET updated = $2, state = $3, progress = $4, error = $5 WHERE id = $1 AND state IN ('queued','running')",
            )
            .bind(id.to_string())
            .bind(now)
            .bind(state.as_str())
            .bind(clean(&progress.to_string()).into_owned())
            .bind(error.map(|error| clean(error).into_owned()))
            .execute(self.database.write())
            .await?;
            Ok(())
        })
        .await
    }

    /// The job of this id. One without a sign of life for a minute is reported as failed: its process is gone.
    pub async fn find(&self, id: Uuid, now: i64) -> Result<Option<Job>, StoreError> {
        patiently(async {
            let row = sqlx::query(AssertSqlSafe(format!("SELECT {COLUMNS} FROM jobs WHERE id = $1")))
                .bind(id.to_string())
                .fetch_optional(self.database.read())
                .await?;
            row.as_ref().map(|row| job(row, now)).transpose()
        })
        .await
    }

    /// Those that are at work or wait for it, the oldest first.
    pub async fn open(&self, now: i64) -> Result<Vec<Job>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM jobs WHERE state IN ('queued', 'running') ORDER BY id");
            let rows = sqlx::query(AssertSqlSafe(text)).fetch_all(self.database.read()).await?;
            let jobs = rows.iter().map(|row| job(row, now)).collect::<Result<Vec<_>, _>>()?;
            // What has lost its process is at work nowhere.
            Ok(jobs.into_iter().filter(|job| !job.state.ended()).collect())
        })
        .await
    }
}

fn job(row: &AnyRow, now: i64) -> Result<Job, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "jobs", id: id.clone(), reason };
    let json = |column: &str| -> Result<Value, StoreError> {
        serde_json::from_str(&row.try_get::<String, _>(column)?).map_err(|error| bad(format!("'{column}': {error}")))
    };
    let state: String = row.try_get("state")?;
    let state = [JobState::Queued, JobState::Running, JobState::Succeeded, JobState::Failed, JobState::Cancelled]
        .into_iter()
        .find(|known| known.as_str() == state)
        .ok_or_else(|| bad(format!("'{state}' is no state")))?;
    let mut job = Job {
        id: id.parse().map_err(|_| bad("its id is no UUID".to_owned()))?,
        created: row.try_get("created")?,
        updated: row.try_get("updated")?,
        kind: row.try_get("kind")?,
        state,
        spec: json("spec")?,
        progress: json("progress")?,
        error: row.try_get("error")?,
    };
    if !job.state.ended() && now - job.updated > LOST_AFTER {
        job.state = JobState::Failed;
        job.error = Some("the server that ran it has stopped; start it again".to_owned());
    }
    Ok(job)
}
