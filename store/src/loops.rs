//! Loops from feedback to adapters: where each stands, and how it came there.
//!
//! A loop's row changes as a whole and by version, together with the row of what happened and the audit: whoever takes it on has read a
//! version and writes the next one. Of two who read the same version the first wins and the other is told.

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};

use crate::Store;
use crate::audit::Actor;
use crate::error::StoreError;
use crate::patience::{at_length, patiently};
use crate::statement::clean;

const COLUMNS: &str = "name, created, updated, cycle, state, version, body";

/// Most steps of one answer: people may pause and resume a cycle as often as they like.
const STEPS: i64 = 5_000;

/// A loop.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoopRow {
    /// By which the configuration knows it.
    pub name: String,
    /// Microseconds since 1970.
    pub created: i64,
    /// When it last changed, in microseconds since 1970.
    pub updated: i64,
    /// Number of its cycle.
    pub cycle: u64,
    /// The word of where it stands.
    pub state: String,
    /// Counts the changes.
    pub version: i64,
    /// Where it stands.
    pub body: Value,
}

/// Something that happened to a loop.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoopStep {
    /// The version that it led to.
    pub version: i64,
    /// Microseconds since 1970.
    pub at: i64,
    /// In which cycle.
    pub cycle: u64,
    /// Where it stood afterwards.
    pub state: String,
    /// Who did it: the loop itself, or somebody.
    pub actor: String,
    /// What happened, and the numbers.
    pub body: Value,
}

/// The next state of a loop.
#[derive(Clone, Debug)]
pub struct LoopChange {
    /// Microseconds since 1970.
    pub at: i64,
    /// The cycle from now on.
    pub cycle: u64,
    /// The word of where it stands from now on.
    pub state: String,
    /// Where it stands from now on.
    pub body: Value,
    /// What the audit calls it, behind `loop.`.
    pub action: String,
    /// Who does it.
    pub actor: Actor,
    /// What happened, and the numbers.
    pub step: Value,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum LoopRefusal {
    /// The database is away, slow or broken.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Somebody else has changed it since it was read.
    #[error("the loop has changed since it was read; look at it again")]
    Changed,
}

impl From<sqlx::Error> for LoopRefusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// The loops of a store. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Loops {
    store: Store,
}

impl Loops {
    /// Over a store.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone() }
    }

    /// The loop of this name, which stands at `body` (whose word is `state`) where it was not there yet.
    pub async fn open(&self, name: &str, state: &str, body: &Value, now: i64) -> Result<LoopRow, StoreError> {
        if let Some(known) = self.find(name).await? {
            return Ok(known);
        }
        patiently(async {
            let text = format!("INSERT INTO loops ({COLUMNS}) VALUES ($1,$2,$2,0,$3,0,$4) ON CONFLICT DO NOTHING");
            sqlx::query(AssertSqlSafe(text))
                .bind(clean(name).into_owned())
                .bind(now)
                .bind(state.to_owned())
                .bind(text_of(body))
                .execute(self.store.database().write())
                .await?;
            Ok::<_, StoreError>(())
        })
        .await?;
        self.find(name).await?.ok_or(StoreError::Away)
    }

    /// The loop of this name.
    pub async fn find(&self, name: &str) -> Result<Option<LoopRow>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM loops WHERE name = $1");
            let query = sqlx::query(AssertSqlSafe(text)).bind(clean(name).into_owned());
            query.fetch_optional(self.store.database().read()).await?.as_ref().map(read_row).transpose()
        })
        .await
    }

    /// All loops, by name.
    pub async fn all(&self) -> Result<Vec<LoopRow>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM loops ORDER BY name");
            let rows = sqlx::query(AssertSqlSafe(text)).fetch_all(self.store.database().read()).await?;
            rows.iter().map(read_row).collect()
        })
        .await
    }

    /// Takes a loop on from the version that was read, with a row of what happened and the audit.
    pub async fn advance(&self, read: &LoopRow, change: &LoopChange) -> Result<LoopRow, LoopRefusal> {
        patiently(async {
            let mut transaction = self.store.database().write().begin().await?;
            let text = format!(
                "UPDATE loops SET updated = $3, cycle = $4, state = $5, version = $6, body = $7 WHERE name = $1 AND version = $2 \
                 RETURNING {COLUMNS}"
            );
            let changed = sqlx::query(AssertSqlSafe(text))
                .bind(clean(&read.name).into_owned())
                .bind(read.version)
                .bind(change.at)
                .bind(change.cycle.cast_signed())
                .bind(change.state.clone())
                .bind(read.version + 1)
                .bind(text_of(&change.body))
                .fetch_optional(&mut *transaction)
                .await?;
            let changed = changed.as_ref().map(read_row).transpose()?.ok_or(LoopRefusal::Changed)?;
            let text = "INSERT INTO loop_steps (name, version, at, cycle, state, actor, body) VALUES ($1,$2,$3,$4,$5,$6,$7)";
            sqlx::query(text)
                .bind(clean(&read.name).into_owned())
                .bind(changed.version)
                .bind(change.at)
                .bind(change.cycle.cast_signed())
                .bind(change.state.clone())
                .bind(clean(&change.actor.name).into_owned())
                .bind(text_of(&change.step))
                .execute(&mut *transaction)
                .await?;
            let detail = json!({ "cycle": change.cycle, "version": changed.version, "why": change.step["why"] });
            let act = self.store.act(&change.actor, format!("loop.{}", change.action));
            act.to(read.name.as_str()).with(detail).at(change.at).write(&mut transaction).await?;
            transaction.commit().await?;
            Ok(changed)
        })
        .await
    }

    /// What happened to a loop in its last `cycles` cycles, the oldest first; at most the last 5,000 steps.
    pub async fn steps(&self, name: &str, cycles: u64) -> Result<Vec<LoopStep>, StoreError> {
        at_length(async {
            let text = format!(
                "SELECT version, at, cycle, state, actor, body FROM loop_steps WHERE name = $1 AND cycle > \
                 (SELECT COALESCE(MAX(cycle), 0) FROM loop_steps WHERE name = $1) - $2 ORDER BY version DESC LIMIT {STEPS}"
            );
            let rows = sqlx::query(AssertSqlSafe(text))
                .bind(clean(name).into_owned())
                .bind(cycles.cast_signed())
                .fetch_all(self.store.database().read())
                .await?;
            rows.iter().rev().map(read_step).collect()
        })
        .await
    }
}

fn text_of(value: &Value) -> String {
    clean(&value.to_string()).into_owned()
}

fn value(row: &AnyRow) -> Result<Value, String> {
    let text: String = row.try_get("body").map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| format!("'body': {error}"))
}

fn count(row: &AnyRow, column: &str) -> Result<u64, StoreError> {
    Ok(row.try_get::<i64, _>(column)?.unsigned_abs())
}

fn read_row(row: &AnyRow) -> Result<LoopRow, StoreError> {
    let name: String = row.try_get("name")?;
    let body = value(row).map_err(|reason| StoreError::Row { table: "loops", id: name.clone(), reason })?;
    Ok(LoopRow {
        name,
        created: row.try_get("created")?,
        updated: row.try_get("updated")?,
        cycle: count(row, "cycle")?,
        state: row.try_get("state")?,
        version: row.try_get("version")?,
        body,
    })
}

fn read_step(row: &AnyRow) -> Result<LoopStep, StoreError> {
    let version: i64 = row.try_get("version")?;
    let bad = |reason| StoreError::Row { table: "loop_steps", id: version.to_string(), reason };
    Ok(LoopStep {
        version,
        at: row.try_get("at")?,
        cycle: count(row, "cycle")?,
        state: row.try_get("state")?,
        actor: row.try_get("actor")?,
        body: value(row).map_err(bad)?,
    })
}
