//! Who answered how much. The sums are kept beside the answers by the transactions that write and erase those, so that to look at a month
//! is not to read it.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{AnyConnection, AssertSqlSafe, Row};

use crate::Database;
use crate::error::StoreError;
use crate::patience::at_length;
use crate::records::{Inference, Status};
use crate::statement::{clean, list};

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

/// Lengths of the stretches that are summed up in the database, in microseconds: five minutes for hours and days, three hours for weeks
/// and months.
const GRAINS: [i64; 2] = [300_000_000, 10_800_000_000];
/// What is summed up, as the table calls it and in the order of [`Counted`]'s numbers.
const COUNTS: [&str; 8] =
    ["answers", "failed", "cancelled", "prompt_tokens", "cached_tokens", "output_tokens", "begun", "first_token_us"];
/// Sums that one statement writes.
const PART: usize = 16;
/// Ids that one statement reads.
const IDS: usize = 500;

/// When the stretch of this length begins that a moment is in.
fn start_of(at: i64, grain: i64) -> i64 {
    at.div_euclid(grain) * grain
}

/// What some answers add to the sums: by length of the stretch, its begin, model and variant.
#[derive(Debug, Default)]
pub(crate) struct Counted(BTreeMap<(i64, i64, String, String), [i64; COUNTS.len()]>);

impl Counted {
    fn count(&mut self, created: i64, model: &str, variant: &str, numbers: [i64; COUNTS.len()]) {
        for grain in GRAINS {
            let key = (grain, start_of(created, grain), model.to_owned(), variant.to_owned());
            let sums = self.0.entry(key).or_default();
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
        }
    }

    /// Of these answers.
    pub(crate) fn of<'a>(rows: impl IntoIterator<Item = &'a Inference>) -> Self {
        let mut counted = Self::default();
        for row in rows {
            let numbers = [
                1,
                i64::from(row.status == Status::Failed),
                i64::from(row.status == Status::Cancelled),
                i64::from(row.prompt_tokens),
                i64::from(row.cached_tokens),
                i64::from(row.output_tokens),
                i64::from(row.first_token_us.is_some()),
                row.first_token_us.unwrap_or_default(),
            ];
            counted.count(row.created, &clean(&row.model), &clean(row.variant.as_deref().unwrap_or_default()), numbers);
        }
        counted
    }

    /// Of the answers in the database that have these ids.
    pub(crate) async fn stored(sql: &mut AnyConnection, ids: &BTreeSet<String>) -> Result<Self, sqlx::Error> {
        let mut counted = Self::default();
        let ids: Vec<&String> = ids.iter().collect();
        for part in ids.chunks(IDS) {
            let text = format!(
                "SELECT created, model, COALESCE(variant, ''), CAST(1 AS BIGINT), \
                 CAST(CASE WHEN status = 'failed' THEN 1 ELSE 0 END AS BIGINT), \
                 CAST(CASE WHEN status = 'cancelled' THEN 1 ELSE 0 END AS BIGINT), prompt_tokens, cached_tokens, output_tokens, \
                 CAST(CASE WHEN first_token_us IS NULL THEN 0 ELSE 1 END AS BIGINT), COALESCE(first_token_us, 0) \
                 FROM inferences WHERE id IN {}",
                list(1, part.len())
            );
            let mut query = sqlx::query(AssertSqlSafe(text));
            for id in part {
                query = query.bind((*id).clone());
            }
            for row in query.fetch_all(&mut *sql).await? {
                let (model, variant): (String, String) = (row.try_get(1)?, row.try_get(2)?);
                let mut numbers = [0; COUNTS.len()];
                for (place, number) in numbers.iter_mut().enumerate() {
                    *number = row.try_get(3 + place)?;
                }
                counted.count(row.try_get(0)?, &model, &variant, numbers);
            }
        }
        Ok(counted)
    }

    /// Adds them, within the caller's transaction: always in the same order, so that of two who add neither waits for the other.
    pub(crate) async fn add_to(self, sql: &mut AnyConnection) -> Result<(), sqlx::Error> {
        let sums: Vec<_> = self.0.into_iter().collect();
        for part in sums.chunks(PART) {
            let mut query = sqlx::query(AssertSqlSafe(addition(part.len())));
            for ((width, start, model, variant), numbers) in part {
                query = query.bind(*width).bind(*start).bind(model.clone()).bind(variant.clone());
                for number in numbers {
                    query = query.bind(*number);
                }
            }
            query.execute(&mut *sql).await?;
        }
        Ok(())
    }

    /// Takes them away again.
    pub(crate) async fn take_from(mut self, sql: &mut AnyConnection) -> Result<(), sqlx::Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        self.0.values_mut().flatten().for_each(|number| *number = -*number);
        self.add_to(sql).await?;
        sqlx::query("DELETE FROM traffic WHERE answers <= 0").execute(sql).await?;
        Ok(())
    }
}

/// The statement that adds so many sums.
fn addition(rows: usize) -> String {
    let width = 4 + COUNTS.len();
    let values: Vec<String> = (0..rows).map(|row| list(1 + row * width, width)).collect();
    let sums: Vec<String> = COUNTS.iter().map(|column| format!("{column} = traffic.{column} + excluded.{column}")).collect();
    format!(
        "INSERT INTO traffic (width, start, model, variant, {}) VALUES {} \
         ON CONFLICT (width, start, model, variant) DO UPDATE SET {}",
        COUNTS.join(", "),
        values.join(", "),
        sums.join(", ")
    )
}

impl Traffic {
    /// The shortest stretch, in microseconds.
    pub const FINEST: i64 = GRAINS[0];

    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Answers from `since` until before `until`, in stretches of `width` microseconds that begin at multiples of it; those without
    /// answers are absent. By model, variant and time. A width is in whole [`Traffic::FINEST`], and `since` is taken down to such a
    /// stretch, or to one of three hours where the width is in those.
    pub async fn sums(&self, since: i64, until: i64, width: i64) -> Result<Vec<TrafficSum>, StoreError> {
        at_length(async {
            let width = (width.max(1) + Self::FINEST - 1) / Self::FINEST * Self::FINEST;
            let grain = GRAINS.into_iter().rev().find(|grain| width % grain == 0).unwrap_or(Self::FINEST);
            let sums: Vec<String> = COUNTS.iter().map(|column| format!("CAST(SUM({column}) AS BIGINT)")).collect();
            let text = format!(
                "SELECT model, variant, start / {width} * {width}, {} FROM traffic \
                 WHERE width = $1 AND start >= $2 AND start < $3 GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
                sums.join(", "),
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(grain).bind(start_of(since, grain)).bind(until);
            let rows = query.fetch_all(self.database.read()).await?;
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
