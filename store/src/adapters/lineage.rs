//! Where adapters come from, and what an erasure there means for them: marks, and names in their lineage.

use serde_json::{Value, json};
use sqlx::AnyConnection;
use uuid::Uuid;

use super::{Adapters, RegisteredAdapter, row};
use crate::error::StoreError;
use crate::ids::IdKey;
use crate::patience::patiently;
use crate::statement::Select;
use crate::{Dialect, commit};

/// What an adapter may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterOrigin<'a> {
    /// These contents, whatever the adapter is called.
    Generation(u64),
    /// A snapshot that it was trained on.
    Snapshot(Uuid),
    /// The adapter that its training went on from.
    Parent(Uuid),
    /// The job that trained it.
    Job(&'a str),
}

impl Adapters {
    /// The adapters that come from there, the oldest first.
    pub async fn made_from(&self, origin: AdapterOrigin<'_>) -> Result<Vec<RegisteredAdapter>, StoreError> {
        patiently(async {
            let mut select = Select::new(&format!("SELECT {} FROM adapters", row::COLUMNS));
            match origin {
                AdapterOrigin::Generation(generation) => select.integer("generation = ?", Some(generation as i64)),
                AdapterOrigin::Snapshot(id) => select.text("snapshot_id = ?", &id.to_string()),
                AdapterOrigin::Parent(id) => select.text("parent = ?", &id.to_string()),
                AdapterOrigin::Job(job) => select.text("job_id = ?", job),
            }
            select.end(" ORDER BY id");
            let rows = select.query().fetch_all(self.store.database().read()).await?;
            rows.iter().map(row::read).collect()
        })
        .await
    }
}

/// Erasure marks the adapters that it finds; one that was not there yet takes the mark of what it was made from.
pub(super) async fn taint_by_origin(sql: &mut AnyConnection, new: &RegisteredAdapter) -> Result<(), sqlx::Error> {
    for (text, origin) in [
        (
            "UPDATE adapters SET tainted = (SELECT tainted FROM snapshots WHERE id = $2) WHERE id = $1 AND tainted IS NULL",
            new.snapshot,
        ),
        (
            "UPDATE adapters SET tainted = (SELECT p.tainted FROM adapters p WHERE p.id = $2) WHERE id = $1 AND tainted IS NULL",
            new.parent,
        ),
    ] {
        if let Some(origin) = origin {
            sqlx::query(text).bind(new.id.to_string()).bind(origin.to_string()).execute(&mut *sql).await?;
        }
    }
    Ok(())
}

/// Puts their pseudonyms in the place of raters who have been erased.
pub(super) async fn forget_erased(
    sql: &mut AnyConnection,
    dialect: Dialect,
    id: Uuid,
    lineage: &Value,
) -> Result<(), sqlx::Error> {
    let mut people = Vec::new();
    texts_in(lineage, &mut people);
    if people.is_empty() {
        return Ok(());
    }
    let ids = IdKey::load(sql).await?;
    let erased = commit::erased(sql, &ids, people.clone()).await?;
    for name in people {
        let pseudonym = ids.pseudonym(name);
        if erased.contains_key(&pseudonym) {
            rename(sql, dialect, name, &pseudonym, Some(id)).await?;
        }
    }
    Ok(())
}

/// Every text of it that could be a person's name: keys and values.
fn texts_in<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => found.push(text),
        Value::Array(items) => items.iter().for_each(|item| texts_in(item, found)),
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            found.push(key);
            texts_in(value, found);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Puts a person's pseudonym in the place of their name in the lineage of all adapters.
pub(crate) async fn rename_in_lineage(
    sql: &mut AnyConnection,
    dialect: Dialect,
    name: &str,
    pseudonym: &str,
) -> Result<(), sqlx::Error> {
    rename(sql, dialect, name, pseudonym, None).await
}

async fn rename(
    sql: &mut AnyConnection,
    dialect: Dialect,
    name: &str,
    pseudonym: &str,
    only: Option<Uuid>,
) -> Result<(), sqlx::Error> {
    let text = match dialect {
        Dialect::Sqlite => "SELECT id, lineage FROM adapters WHERE instr(lineage, $1) > 0 AND (id = $2 OR $2 = '')",
        Dialect::Postgres => "SELECT id, lineage FROM adapters WHERE strpos(lineage, $1) > 0 AND (id = $2 OR $2 = '')",
    };
    let only = only.map_or_else(String::new, |id| id.to_string());
    let rows: Vec<(String, String)> = sqlx::query_as(text).bind(json!(name).to_string()).bind(only).fetch_all(&mut *sql).await?;
    for (id, lineage) in rows {
        let mut lineage: Value = serde_json::from_str(&lineage).unwrap_or_default();
        replace(&mut lineage, name, pseudonym);
        let update = sqlx::query("UPDATE adapters SET lineage = $2 WHERE id = $1").bind(id).bind(lineage.to_string());
        update.execute(&mut *sql).await?;
    }
    Ok(())
}

fn replace(value: &mut Value, name: &str, pseudonym: &str) {
    match value {
        Value::String(text) if text == name => pseudonym.clone_into(text),
        Value::Array(items) => items.iter_mut().for_each(|item| replace(item, name, pseudonym)),
        Value::Object(entries) => {
            if let Some(entry) = entries.shift_remove(name) {
                entries.insert(pseudonym.to_owned(), entry);
            }
            entries.values_mut().for_each(|value| replace(value, name, pseudonym));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_replaced_wherever_it_stands_alone() {
        let mut lineage = json!({"raters": ["ann", "anna"], "config": {"rater_weights": {"ann": 0.5}, "note": "ann said"}});
        replace(&mut lineage, "ann", "x7");
        assert_eq!(lineage, json!({"raters": ["x7", "anna"], "config": {"rater_weights": {"x7": 0.5}, "note": "ann said"}}));
        let mut found = Vec::new();
        texts_in(&lineage, &mut found);
        assert!(found.contains(&"anna") && found.contains(&"rater_weights") && found.contains(&"x7"));
    }
}
