//! What was used on a day, summed over all servers on one database.
//!
//! Every process writes its own count, as an absolute number under its own name, and reads the sum: a write that is repeated because its
//! acknowledgement was lost changes nothing.

use sqlx::Row;
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::key_terms::Money;
use crate::statement::clean;

/// Counts of one subject on one day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests that began.
    pub requests: i64,
    /// Tokens of prompts.
    pub input_tokens: i64,
    /// Of these, found in the prefix cache.
    pub cached_tokens: i64,
    /// Generated tokens.
    pub output_tokens: i64,
    /// By the price table.
    pub cost: Money,
}

impl Usage {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            cached_tokens: self.cached_tokens.saturating_add(other.cached_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            cost: Money(self.cost.0.saturating_add(other.cost.0)),
        }
    }
}

/// The process that counts, unique among all that ever were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageWriter(pub Uuid);

/// Puts `own` in the place of what `writer` wrote before.
pub(crate) async fn write(
    database: &Database,
    writer: UsageWriter,
    subject: &str,
    day: i64,
    own: Usage,
) -> Result<(), StoreError> {
    let text = "INSERT INTO usage_days (subject, day, writer, requests, input_tokens, cached_tokens, output_tokens, cost) \
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (subject, day, writer) DO UPDATE SET \
                requests = excluded.requests, input_tokens = excluded.input_tokens, cached_tokens = excluded.cached_tokens, \
                output_tokens = excluded.output_tokens, cost = excluded.cost";
    sqlx::query(text)
        .bind(clean(subject).into_owned())
        .bind(day)
        .bind(writer.0.to_string())
        .bind(own.requests)
        .bind(own.input_tokens)
        .bind(own.cached_tokens)
        .bind(own.output_tokens)
        .bind(own.cost.0)
        .execute(database.write())
        .await?;
    Ok(())
}

/// What all others than `except` have written.
pub(crate) async fn read(database: &Database, except: Option<UsageWriter>, subject: &str, day: i64) -> Result<Usage, StoreError> {
    // A sum of integers is a decimal in Postgres, and nothing over no rows.
    let sums: Vec<String> = ["requests", "input_tokens", "cached_tokens", "output_tokens", "cost"]
        .iter()
        .map(|column| format!("CAST(COALESCE(SUM({column}), 0) AS BIGINT)"))
        .collect();
    let text = format!("SELECT {} FROM usage_days WHERE subject = $1 AND day = $2 AND writer <> $3", sums.join(", "));
    let except = except.map_or_else(String::new, |writer| writer.0.to_string());
    let query = sqlx::query::<sqlx::Any>(sqlx::AssertSqlSafe(text)).bind(clean(subject).into_owned()).bind(day).bind(except);
    let row = query.fetch_one(database.read()).await?;
    Ok(Usage {
        requests: row.try_get(0)?,
        input_tokens: row.try_get(1)?,
        cached_tokens: row.try_get(2)?,
        output_tokens: row.try_get(3)?,
        cost: Money(row.try_get(4)?),
    })
}
