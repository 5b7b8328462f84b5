//! Who answered how much, from the recorded answers.

use sqlx::{AssertSqlSafe, Row};

use crate::Database;
use crate::error::StoreError;
use crate::patience::at_length;
use crate::statement::clean;

/// Answers of one model and variant in one stretch of time, summed up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficSum {
    /// Served model.
    pub model: String,
    /// Variant of it, as records call it.
    pub variant: Option<String>,
    /// When the stretch begins, in microseconds since 1970.
    pub start: i64,
    /// All answers.
    pub answers: u64,
    /// Of these, those that failed.
    pub failed: u64,
    /// Of these, those that the client or the server broke off.
    pub cancelled: u64,
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Of these, found in the prefix cache.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub output_tokens: u64,
    /// Answers that have a first token.
    pub begun: u64,
    /// Σ of the times to it, in microseconds.
    pub first_token_us: u64,
}

/// How long one answer took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// To the first token, in microseconds.
    pub first_token_us: Option<i64>,
    /// To the end, in microseconds.
    pub duration_us: i64,
}

/// The traffic in a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Traffic {
    database: Database,
}

impl Traffic {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Answers from `since` until before `until`, in stretches of `width` microseconds that begin at multiples of it; those without
    /// answers are absent. By model, variant and time.
    pub async fn sums(&self, since: i64, until: i64, width: i64) -> Result<Vec<TrafficSum>, StoreError> {
        at_length(async {
            let width = width.max(1);
            let count = |condition: &str| format!("CAST(COALESCE(SUM(CASE WHEN {condition} THEN 1 ELSE 0 END), 0) AS BIGINT)");
            let sum = |column: &str| format!("CAST(COALESCE(SUM({column}), 0) AS BIGINT)");
            let text = format!(
                "SELECT model, COALESCE(variant, ''), created / {width} * {width}, COUNT(*), {}, {}, {}, {}, {}, COUNT(first_token_us), {} \
                 FROM inferences WHERE created >= $1 AND created < $2 GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
                count("status = 'failed'"),
                count("status = 'cancelled'"),
                sum("prompt_tokens"),
                sum("cached_tokens"),
                sum("output_tokens"),
                sum("first_token_us"),
            );
            let rows = sqlx::query(AssertSqlSafe(text)).bind(since).bind(until).fetch_all(self.database.read()).await?;
            let read = |row: &sqlx::any::AnyRow| {
                let count = |index: usize| row.try_get::<i64, _>(index).map(i64::unsigned_abs);
                let variant: String = row.try_get(1)?;
                Ok(TrafficSum {
                    model: row.try_get(0)?,
                    variant: Some(variant).filter(|variant| !variant.is_empty()),
                    start: row.try_get(2)?,
                    answers: count(3)?,
                    failed: count(4)?,
                    cancelled: count(5)?,
                    prompt_tokens: count(6)?,
                    cached_tokens: count(7)?,
                    output_tokens: count(8)?,
                    begun: count(9)?,
                    first_token_us: count(10)?,
                })
            };
            rows.iter().map(read).collect()
        })
        .await
    }

    /// How long the newest `limit` complete answers of a model and variant took that came since then.
    pub async fn latencies(
        &self,
        model: &str,
        variant: Option<&str>,
        since: i64,
        limit: usize,
    ) -> Result<Vec<Latency>, StoreError> {
        at_length(async {
            let text = "SELECT first_token_us, duration_us FROM inferences WHERE created >= $1 AND model = $2 \
                        AND COALESCE(variant, '') = $3 AND status = 'ok' ORDER BY created DESC LIMIT $4";
            let query = sqlx::query(text).bind(since).bind(clean(model).into_owned());
            let query =
                query.bind(clean(variant.unwrap_or_default()).into_owned()).bind(i64::try_from(limit).unwrap_or(i64::MAX));
            let rows = query.fetch_all(self.database.read()).await?;
            let read = |row: &sqlx::any::AnyRow| Ok(Latency { first_token_us: row.try_get(0)?, duration_us: row.try_get(1)? });
            rows.iter().map(read).collect()
        })
        .await
    }
}
