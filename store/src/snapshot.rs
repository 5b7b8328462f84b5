//! Snapshots of datasets, and what each was made from.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use uuid::Uuid;

use crate::audit::Act;
use crate::error::StoreError;
use crate::ids::IdKey;
use crate::patience::{at_length, patiently};
use crate::statement::{Insert, clean};
use crate::{Database, commit};

/// A snapshot. It exists when its row does, and its content never changes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Snapshot {
    /// UUIDv7.
    pub id: Uuid,
    /// The dataset's name.
    pub name: String,
    /// Counts up within a name; also the version of the table. Numbers may be missing where a build was cut off.
    pub version: i64,
    /// Microseconds since 1970.
    pub created: i64,
    /// What was asked, or what was imported.
    pub query: Value,
    /// BLAKE3 over the rows in order.
    pub content_hash: String,
    /// Path or URL of the table.
    pub location: String,
    /// Version of the table that holds the rows.
    pub table_version: i64,
    /// Counts by kind and part, and what was left out and why.
    pub row_counts: Value,
    /// `pass`, `warn` or `fail`.
    pub verdict: String,
    /// The quality report without its rows; empty after an erasure.
    pub report: Value,
    /// Why it must not be trained on any more, such as an erasure.
    pub tainted: Option<Value>,
}

/// Ids of the records behind a snapshot, by kind: `inference`, `feedback`, `task`, `rater`, `user`.
pub type Sources = BTreeMap<&'static str, std::collections::BTreeSet<String>>;

/// The snapshots of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Snapshots {
    database: Database,
}

const SOURCES: Insert = Insert { table: "snapshot_sources", columns: &["snapshot_id", "kind", "source"] };
const COLUMNS: &str =
    "id, name, version, created, query, content_hash, location, table_version, row_counts, verdict, report, tainted";

impl Snapshots {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Writes a snapshot and its sources; from here on it exists. One made `from_feedback` of this database that was erased while
    /// it was being made is tainted from the start, and does not name the person.
    pub async fn insert(&self, snapshot: &Snapshot, sources: &Sources, from_feedback: bool, act: Act) -> Result<(), StoreError> {
        at_length(async {
            let mut transaction = self.database.write().begin().await?;
            sqlx::query(AssertSqlSafe(format!(
                "INSERT INTO snapshots ({COLUMNS}) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12)"
            )))
            .bind(snapshot.id.to_string())
            .bind(snapshot.name.clone())
            .bind(snapshot.version)
            .bind(snapshot.created)
            .bind(clean(&snapshot.query.to_string()).into_owned())
            .bind(snapshot.content_hash.clone())
            .bind(snapshot.location.clone())
            .bind(snapshot.table_version)
            .bind(snapshot.row_counts.to_string())
            .bind(snapshot.verdict.clone())
            .bind(clean(&snapshot.report.to_string()).into_owned())
            .bind(snapshot.tainted.as_ref().map(Value::to_string))
            .execute(&mut *transaction)
            .await?;
            let all: Vec<(&str, &String)> = sources.iter().flat_map(|(kind, ids)| ids.iter().map(|id| (*kind, id))).collect();
            for part in Insert::parts(&all) {
                let mut query = sqlx::query(AssertSqlSafe(SOURCES.text(part.len())));
                for (kind, source) in part {
                    query = query.bind(snapshot.id.to_string()).bind(*kind).bind(clean(source).into_owned());
                }
                query.fetch_all(&mut *transaction).await?;
            }
            // Erasure marks the snapshots that it finds; one that was not there yet has to look for itself.
            if from_feedback {
                let tainted = sqlx::query(
                    "UPDATE snapshots SET tainted = $2, report = '{}' WHERE id = $1 AND tainted IS NULL AND EXISTS (
                    SELECT 1 FROM snapshot_sources s WHERE s.snapshot_id = $1 AND s.kind = 'feedback'
                    AND NOT EXISTS (SELECT 1 FROM feedback f WHERE f.id = s.source))",
                )
                .bind(snapshot.id.to_string())
                .bind(r#"{"reason":"erasure during the build"}"#)
                .execute(&mut *transaction)
                .await?;
                if tainted.rows_affected() > 0 {
                    forget_erased(&mut transaction, snapshot.id, sources).await?;
                }
            }
            act.write(&mut transaction).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// A version of a dataset, or its newest.
    pub async fn find(&self, name: &str, version: Option<i64>) -> Result<Option<Snapshot>, StoreError> {
        patiently(async {
            let version_is = if version.is_some() { "AND version = $2" } else { "AND version >= $2" };
            let row = sqlx::query(AssertSqlSafe(format!(
                "SELECT {COLUMNS} FROM snapshots WHERE name = $1 {version_is} ORDER BY version DESC LIMIT 1"
            )))
            .bind(clean(name).into_owned())
            .bind(version.unwrap_or(0))
            .fetch_optional(self.database.read())
            .await?;
            row.as_ref().map(snapshot).transpose()
        })
        .await
    }

    /// The snapshot of this id.
    pub async fn by_id(&self, id: Uuid) -> Result<Option<Snapshot>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM snapshots WHERE id = $1");
            let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string());
            query.fetch_optional(self.database.read()).await?.as_ref().map(snapshot).transpose()
        })
        .await
    }

    /// The snapshots that were made from this record or with this person, by kind as in [`Sources`]; the oldest first.
    pub async fn made_from(&self, kind: &str, source: &str) -> Result<Vec<Snapshot>, StoreError> {
        patiently(async {
            let text = format!(
                "SELECT {COLUMNS} FROM snapshots WHERE id IN \
                 (SELECT snapshot_id FROM snapshot_sources WHERE source = $1 AND kind = $2) ORDER BY id"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(clean(source).into_owned()).bind(kind.to_owned());
            query.fetch_all(self.database.read()).await?.iter().map(snapshot).collect()
        })
        .await
    }

    /// How many records of each kind are behind a snapshot.
    pub async fn source_counts(&self, id: Uuid) -> Result<BTreeMap<String, u64>, StoreError> {
        at_length(async {
            let text = "SELECT kind, COUNT(*) FROM snapshot_sources WHERE snapshot_id = $1 GROUP BY kind ORDER BY kind";
            let rows = sqlx::query(text).bind(id.to_string()).fetch_all(self.database.read()).await?;
            let count = |row: &AnyRow| Ok((row.try_get(0)?, row.try_get::<i64, _>(1)?.unsigned_abs()));
            rows.iter().map(count).collect()
        })
        .await
    }

    /// At most `limit` snapshots older than `before`, the newest first; of one name, or of all.
    pub async fn list(&self, name: Option<&str>, before: Option<Uuid>, limit: usize) -> Result<Vec<Snapshot>, StoreError> {
        patiently(async {
            let rows = sqlx::query(AssertSqlSafe(format!(
                "SELECT {COLUMNS} FROM snapshots WHERE (name = $1 OR $1 = '') AND id < $2 ORDER BY id DESC LIMIT $3"
            )))
            .bind(clean(name.unwrap_or_default()).into_owned())
            // After every hexadecimal digit, in every collation.
            .bind(before.map_or_else(|| "g".to_owned(), |id| id.to_string()))
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(self.database.read())
            .await?;
            rows.iter().map(snapshot).collect()
        })
        .await
    }

    /// Ids of one kind behind a snapshot, sorted.
    pub async fn sources(&self, id: Uuid, kind: &str) -> Result<Vec<String>, StoreError> {
        at_length(async {
            let rows = sqlx::query("SELECT source FROM snapshot_sources WHERE snapshot_id = $1 AND kind = $2 ORDER BY source")
                .bind(id.to_string())
                .bind(kind.to_owned())
                .fetch_all(self.database.read())
                .await?;
            Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
        })
        .await
    }
}

/// Puts their pseudonyms in the place of people who have been erased, as erasure does in the snapshots that it finds.
async fn forget_erased(sql: &mut AnyConnection, id: Uuid, sources: &Sources) -> Result<(), StoreError> {
    let ids = IdKey::load(sql).await?;
    let people = ["user", "rater"].iter().filter_map(|kind| sources.get(kind)).flatten();
    let people: Vec<Cow<'_, str>> = people.map(|name| clean(name)).collect();
    let erased = commit::erased(sql, &ids, people.iter().map(AsRef::as_ref).collect()).await?;
    for name in people {
        let pseudonym = ids.pseudonym(&name);
        if erased.contains_key(&pseudonym) {
            sqlx::query("UPDATE snapshot_sources SET source = $3 WHERE snapshot_id = $1 AND source = $2")
                .bind(id.to_string())
                .bind(name.into_owned())
                .bind(pseudonym)
                .execute(&mut *sql)
                .await?;
        }
    }
    Ok(())
}

fn snapshot(row: &AnyRow) -> Result<Snapshot, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "snapshots", id: id.clone(), reason };
    let json = |column: &str| -> Result<Value, StoreError> {
        serde_json::from_str(&row.try_get::<String, _>(column)?).map_err(|error| bad(format!("'{column}': {error}")))
    };
    let tainted: Option<String> = row.try_get("tainted")?;
    Ok(Snapshot {
        id: id.parse().map_err(|_| bad("its id is no UUID".to_owned()))?,
        name: row.try_get("name")?,
        version: row.try_get("version")?,
        created: row.try_get("created")?,
        query: json("query")?,
        content_hash: row.try_get("content_hash")?,
        location: row.try_get("location")?,
        table_version: row.try_get("table_version")?,
        row_counts: json("row_counts")?,
        verdict: row.try_get("verdict")?,
        report: json("report")?,
        // An older note that is no JSON still taints.
        tainted: tainted.map(|text| serde_json::from_str(&text).unwrap_or(Value::String(text))),
    })
}
