//! Who did what to what, for good.
//!
//! A row is written in the transaction of the change that it tells of: a change that was acknowledged is in the audit, and one that was
//! not made is not. Nothing here changes or deletes a row, and neither retention nor erasure does.

use std::ops::Deref;

use serde::Serialize;
use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row};
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::inferences::{json, parse};
use crate::keys::ApiKey;
use crate::page::{self, Order, Page};
use crate::patience::at_length;
use crate::statement::{Select, clean, clean_option};

/// Who acts, as the audit names them; reads as the name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Actor {
    /// `key NAME`, `open server` for whoever reaches a server without keys, `command line`, `server`, or what works on its own, such
    /// as a job.
    pub name: String,
    /// The key's id.
    pub key: Option<String>,
}

impl Actor {
    /// Whoever holds the key.
    pub fn of_key(key: &ApiKey) -> Self {
        Self { name: format!("key {}", key.name), key: Some(key.id.to_string()) }
    }

    /// Whether both are the same key, or go by the same name: a key that was made again under its name is the same hand.
    pub fn is(&self, other: &Self) -> bool {
        self.name == other.name || (self.key.is_some() && self.key == other.key)
    }
}

impl From<&str> for Actor {
    fn from(name: &str) -> Self {
        Self { name: name.to_owned(), key: None }
    }
}

impl From<String> for Actor {
    fn from(name: String) -> Self {
        Self { name, key: None }
    }
}

impl From<&Self> for Actor {
    fn from(actor: &Self) -> Self {
        actor.clone()
    }
}

impl Deref for Actor {
    type Target = str;

    fn deref(&self) -> &str {
        &self.name
    }
}

/// An act that is about to be done; [`crate::Store::act`] makes it. The audit outlives an erasure: no detail of it names a person.
#[derive(Clone, Debug)]
pub struct Act {
    pub(crate) id: Uuid,
    pub(crate) at: i64,
    pub(crate) actor: Actor,
    pub(crate) action: String,
    pub(crate) subject: String,
    pub(crate) detail: Value,
}

impl Act {
    /// What it is done to.
    pub fn to(self, subject: impl Into<String>) -> Self {
        Self { subject: subject.into(), ..self }
    }

    /// What there is to know of it; no secrets and no people.
    pub fn with(self, detail: Value) -> Self {
        Self { detail, ..self }
    }

    /// Done at this moment, in microseconds since 1970.
    pub(crate) fn at(self, at: i64) -> Self {
        Self { at, ..self }
    }

    /// Writes it down, within the caller's transaction.
    pub(crate) async fn write(&self, sql: &mut AnyConnection) -> Result<(), sqlx::Error> {
        let text = "INSERT INTO audit (id, at, actor, key_id, action, subject, detail) VALUES ($1, $2, $3, $4, $5, $6, $7)";
        sqlx::query(text)
            .bind(self.id.to_string())
            .bind(self.at)
            .bind(clean(&self.actor.name).into_owned())
            .bind(clean_option(self.actor.key.as_deref()))
            .bind(clean(&self.action).into_owned())
            .bind(clean(&self.subject).into_owned())
            .bind(clean(&json(&self.detail)).into_owned())
            .execute(sql)
            .await
            .map(drop)
    }
}

/// An act that was done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AuditEntry {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub at: i64,
    /// Who.
    pub actor: Actor,
    /// What, such as `key.create`.
    pub action: String,
    /// To what.
    pub subject: String,
    /// With what.
    pub detail: Value,
}

/// Which acts; everything absent is any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Done at or after, in microseconds since 1970.
    pub since: Option<i64>,
    /// Done before.
    pub until: Option<i64>,
    /// Of this actor: the whole name, a key's own name, or its id.
    pub by: Option<String>,
    /// This action, or all of its topic: `key` for `key.create`, `key.revoke`, and so on.
    pub what: Option<String>,
    /// To this subject.
    pub on: Option<String>,
    /// The last id of the page before.
    pub after: Option<Uuid>,
    /// 20 unless said, at most [`crate::MAX_PAGE`].
    pub limit: Option<usize>,
    /// Which end first.
    pub order: Order,
}

/// The audit of a database, to be read. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Audit {
    database: Database,
}

impl Audit {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// A page of acts.
    pub async fn list(&self, filter: &AuditFilter) -> Result<Page<AuditEntry>, StoreError> {
        at_length(async {
            let limit = page::limit(filter.limit);
            let mut select = Select::new("SELECT id, at, actor, key_id, action, subject, detail FROM audit");
            select.integer("at >= ?", filter.since);
            select.integer("at < ?", filter.until);
            select.text_option("(actor = ? OR actor = 'key ' || ? OR key_id = ?)", filter.by.as_deref());
            select.text_option("(action = ? OR substr(action, 1, length(?) + 1) = ? || '.')", filter.what.as_deref());
            select.text_option("subject = ?", filter.on.as_deref());
            select.text_option(&filter.order.after("id"), filter.after.map(|id| id.to_string()).as_deref());
            select.end(&format!(" ORDER BY id {} LIMIT {}", filter.order.sql(), limit + 1));
            let rows = select.query().fetch_all(self.database.read()).await?;
            Ok(Page::of(rows.iter().map(read).collect::<Result<_, _>>()?, limit))
        })
        .await
    }
}

fn read(row: &AnyRow) -> Result<AuditEntry, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = |reason: String| StoreError::Row { table: "audit", id: id.clone(), reason };
    Ok(AuditEntry {
        id: Uuid::try_parse(&id).map_err(|_| bad("its id is no UUID".to_owned()))?,
        at: row.try_get("at")?,
        actor: Actor { name: row.try_get("actor")?, key: row.try_get("key_id")? },
        action: row.try_get("action")?,
        subject: row.try_get("subject")?,
        detail: parse(row, "detail").map_err(bad)?.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_made_again_under_its_name_is_the_same_hand() {
        let actor = |name: &str, key: Option<&str>| Actor { name: name.into(), key: key.map(str::to_owned) };
        let ann = actor("key ann", Some("1"));
        assert!(ann.is(&actor("key ann", Some("2"))) && ann.is(&actor("key bob", Some("1"))));
        assert!(!ann.is(&actor("key bob", Some("2"))) && !actor("a", None).is(&actor("b", None)));
    }
}
