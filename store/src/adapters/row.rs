//! Rows of adapters and aliases.

use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use uuid::Uuid;

use super::{AdapterState, Alias, RegisteredAdapter, ServedAdapter, clean, clean_option};
use crate::error::StoreError;

pub(super) const COLUMNS: &str = "id, created, updated, name, generation, base, base_hash, content_hash, location, state, served, \
                                  snapshot_id, job_id, parent, lineage, metrics, tainted, files_removed";

/// Whether the row is new.
pub(super) async fn insert(sql: &mut AnyConnection, new: &RegisteredAdapter) -> Result<bool, sqlx::Error> {
    let text = format!(
        "INSERT INTO adapters ({COLUMNS}) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14,$15,$16,$17,$18) ON CONFLICT DO NOTHING"
    );
    let made = sqlx::query(AssertSqlSafe(text))
        .bind(new.id.to_string())
        .bind(new.created)
        .bind(new.updated)
        .bind(clean(&new.name).into_owned())
        .bind(new.generation as i64)
        .bind(clean(&new.base).into_owned())
        .bind(clean_option(new.base_hash.as_deref()))
        .bind(new.content_hash.clone())
        .bind(clean(&new.location).into_owned())
        .bind(new.state.as_str())
        .bind(new.served)
        .bind(new.snapshot.map(|id| id.to_string()))
        .bind(clean_option(new.job.as_deref()))
        .bind(new.parent.map(|id| id.to_string()))
        .bind(clean(&new.lineage.to_string()).into_owned())
        .bind(clean(&new.metrics.to_string()).into_owned())
        .bind(new.tainted.as_ref().map(Value::to_string))
        .bind(new.files_removed)
        .execute(sql)
        .await?;
    Ok(made.rows_affected() > 0)
}

/// The row with these contents, name and base.
pub(super) async fn same(sql: &mut AnyConnection, new: &RegisteredAdapter) -> Result<Option<RegisteredAdapter>, StoreError> {
    let text = format!("SELECT {COLUMNS} FROM adapters WHERE base = $1 AND name = $2 AND generation = $3");
    let query = sqlx::query(AssertSqlSafe(text)).bind(clean(&new.base).into_owned()).bind(clean(&new.name).into_owned());
    query.bind(new.generation as i64).fetch_optional(sql).await?.as_ref().map(read).transpose()
}

/// The row, which nobody else changes until the transaction ends.
pub(super) async fn hold(sql: &mut AnyConnection, id: Uuid) -> Result<Option<RegisteredAdapter>, StoreError> {
    // A write, also on SQLite: a transaction there that began by reading may find that it cannot write any more.
    let text = format!("UPDATE adapters SET updated = updated WHERE id = $1 RETURNING {COLUMNS}");
    let found = sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).fetch_optional(sql).await?;
    found.as_ref().map(read).transpose()
}

/// All rows of a name, held in the same way.
pub(super) async fn hold_named(sql: &mut AnyConnection, base: &str, name: &str) -> Result<Vec<RegisteredAdapter>, StoreError> {
    let text = format!("UPDATE adapters SET updated = updated WHERE base = $1 AND name = $2 RETURNING {COLUMNS}");
    let query = sqlx::query(AssertSqlSafe(text)).bind(clean(base).into_owned()).bind(clean(name).into_owned());
    query.fetch_all(sql).await?.iter().map(read).collect()
}

/// All rows whose files lie there, held in the same way.
pub(super) async fn hold_located(sql: &mut AnyConnection, location: &str) -> Result<Vec<RegisteredAdapter>, StoreError> {
    let text = format!("UPDATE adapters SET updated = updated WHERE location = $1 RETURNING {COLUMNS}");
    let query = sqlx::query(AssertSqlSafe(text)).bind(clean(location).into_owned());
    query.fetch_all(sql).await?.iter().map(read).collect()
}

/// Says when the files went, or with `None` that they are there.
pub(super) async fn set_files_removed(
    sql: &mut AnyConnection,
    id: Uuid,
    at: Option<i64>,
) -> Result<RegisteredAdapter, StoreError> {
    let text = format!("UPDATE adapters SET files_removed = $2 WHERE id = $1 RETURNING {COLUMNS}");
    read(&sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).bind(at).fetch_one(sql).await?)
}

pub(super) async fn set_state(
    sql: &mut AnyConnection,
    id: Uuid,
    state: AdapterState,
    now: i64,
) -> Result<RegisteredAdapter, StoreError> {
    let served = if state == AdapterState::Serving { ", served = $3" } else { "" };
    let text = format!("UPDATE adapters SET state = $2, updated = $3{served} WHERE id = $1 RETURNING {COLUMNS}");
    let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).bind(state.as_str()).bind(now);
    read(&query.fetch_one(sql).await?)
}

pub(super) async fn set_metrics(sql: &mut AnyConnection, id: Uuid, metrics: &Value) -> Result<RegisteredAdapter, StoreError> {
    let text = format!("UPDATE adapters SET metrics = $2 WHERE id = $1 RETURNING {COLUMNS}");
    let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).bind(clean(&metrics.to_string()).into_owned());
    read(&query.fetch_one(sql).await?)
}

/// Names of the aliases that lead to an adapter, ascending.
pub(super) async fn aliases_of(sql: &mut AnyConnection, id: Uuid) -> Result<Vec<String>, StoreError> {
    let query = sqlx::query("SELECT name FROM adapter_aliases WHERE adapter_id = $1 ORDER BY name").bind(id.to_string());
    Ok(query.fetch_all(sql).await?.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

/// Leads an alias to an adapter; returns where it led before.
pub(super) async fn lead(
    sql: &mut AnyConnection,
    adapter: &RegisteredAdapter,
    name: &str,
    now: i64,
) -> Result<Option<Uuid>, StoreError> {
    let (base, name) = (clean(&adapter.base).into_owned(), clean(name).into_owned());
    let before = sqlx::query("SELECT base, name, adapter_id, updated FROM adapter_aliases WHERE base = $1 AND name = $2");
    let before = before.bind(base.clone()).bind(name.clone()).fetch_optional(&mut *sql).await?;
    let text = "INSERT INTO adapter_aliases (base, name, adapter_id, updated) VALUES ($1, $2, $3, $4) \
                ON CONFLICT (base, name) DO UPDATE SET adapter_id = excluded.adapter_id, updated = excluded.updated";
    sqlx::query(text).bind(base).bind(name).bind(adapter.id.to_string()).bind(now).execute(sql).await?;
    Ok(before.as_ref().map(alias).transpose()?.map(|alias| alias.adapter))
}

pub(super) fn alias(row: &AnyRow) -> Result<Alias, StoreError> {
    let name: String = row.try_get("name")?;
    let adapter: String = row.try_get("adapter_id")?;
    let bad = || StoreError::Row { table: "adapter_aliases", id: name.clone(), reason: "it leads to no id".to_owned() };
    let adapter = Uuid::parse_str(&adapter).map_err(|_| bad())?;
    Ok(Alias { base: row.try_get("base")?, adapter, updated: row.try_get("updated")?, name })
}

/// Rows of adapters with one alias each, in order.
pub(super) fn served(rows: &[AnyRow]) -> Result<Vec<ServedAdapter>, StoreError> {
    let mut all: Vec<ServedAdapter> = Vec::new();
    for row in rows {
        let id = id_of(row)?;
        let alias: Option<String> = row.try_get("alias")?;
        if all.last().is_none_or(|last| last.id != id) {
            all.push(ServedAdapter {
                id,
                created: row.try_get("created")?,
                name: row.try_get("name")?,
                generation: row.try_get::<i64, _>("generation")? as u64,
                base: row.try_get("base")?,
                base_hash: row.try_get("base_hash")?,
                location: row.try_get("location")?,
                aliases: Vec::new(),
            });
        }
        if let Some(last) = all.last_mut() {
            last.aliases.extend(alias);
        }
    }
    Ok(all)
}

fn id_of(row: &AnyRow) -> Result<Uuid, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |_| StoreError::Row { table: "adapters", id: id.clone(), reason: "its id is no UUID".to_owned() };
    Uuid::parse_str(&id).map_err(bad)
}

pub(super) fn read(row: &AnyRow) -> Result<RegisteredAdapter, StoreError> {
    let id = id_of(row)?;
    let bad = |reason: String| StoreError::Row { table: "adapters", id: id.to_string(), reason };
    let json = |column: &str| -> Result<Value, StoreError> {
        serde_json::from_str(&row.try_get::<String, _>(column)?).map_err(|error| bad(format!("'{column}': {error}")))
    };
    let uuid = |column: &str| -> Result<Option<Uuid>, StoreError> {
        let text: Option<String> = row.try_get(column)?;
        let text = text.filter(|text| !text.is_empty());
        text.map(|text| Uuid::parse_str(&text).map_err(|_| bad(format!("'{column}' is no UUID")))).transpose()
    };
    let state: String = row.try_get("state")?;
    let tainted: Option<String> = row.try_get("tainted")?;
    Ok(RegisteredAdapter {
        created: row.try_get("created")?,
        updated: row.try_get("updated")?,
        name: row.try_get("name")?,
        generation: row.try_get::<i64, _>("generation")? as u64,
        base: row.try_get("base")?,
        base_hash: row.try_get("base_hash")?,
        content_hash: row.try_get("content_hash")?,
        location: row.try_get("location")?,
        state: AdapterState::ALL
            .into_iter()
            .find(|known| known.as_str() == state)
            .ok_or_else(|| bad(format!("'{state}' is no state")))?,
        served: row.try_get("served")?,
        snapshot: uuid("snapshot_id")?,
        job: row.try_get("job_id")?,
        parent: uuid("parent")?,
        lineage: json("lineage")?,
        metrics: json("metrics")?,
        // An older note that is no JSON still taints.
        tainted: tainted.map(|text| serde_json::from_str(&text).unwrap_or(Value::String(text))),
        files_removed: row.try_get("files_removed")?,
        id,
    })
}
