//! Who did what to what, for good.

use serde_json::Value;
use sqlx::AnyConnection;
use uuid::Uuid;

use crate::inferences::json;
use crate::statement::clean;

/// An act. The audit outlives an erasure: no detail of it names a person.
pub(crate) struct Act<'a> {
    /// UUIDv7.
    pub(crate) id: Uuid,
    /// Microseconds since 1970.
    pub(crate) at: i64,
    /// Who.
    pub(crate) actor: &'a str,
    /// What.
    pub(crate) action: &'a str,
    /// To what.
    pub(crate) subject: &'a str,
    /// With what.
    pub(crate) detail: &'a Value,
}

impl Act<'_> {
    /// Writes it down, within the caller's transaction.
    pub(crate) async fn write(&self, sql: &mut AnyConnection) -> Result<(), sqlx::Error> {
        let text = "INSERT INTO audit (id, at, actor, action, subject, detail) VALUES ($1, $2, $3, $4, $5, $6)";
        sqlx::query(text)
            .bind(self.id.to_string())
            .bind(self.at)
            .bind(clean(self.actor).into_owned())
            .bind(clean(self.action).into_owned())
            .bind(clean(self.subject).into_owned())
            .bind(clean(&json(self.detail)).into_owned())
            .execute(sql)
            .await
            .map(drop)
    }
}
