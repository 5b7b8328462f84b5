//! What answers count for in rollouts, summed up by arm.
//!
//! An exposure is part of an answer's record ([`crate::records::Exposure`]); here are the sums that a rollout is judged by. Answers that
//! the client broke off count as exposures and as nothing else: they say nothing of the variant.

use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::patience::at_length;
use crate::records::Kind;
use crate::statement::clean;

/// What an arm's answers were like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArmCounts {
    /// Which arm.
    pub arm: u32,
    /// Different units that it answered.
    pub units: u64,
    /// Answers that ended, well or not.
    pub answers: u64,
    /// Of these, those that failed.
    pub failed: u64,
    /// Answers that ended well.
    pub complete: u64,
    /// Of these, those cut off at their limit.
    pub truncated: u64,
    /// Answers of which it is known whether they refuse.
    pub read: u64,
    /// Of these, those that do.
    pub refused: u64,
    /// Σ tokens of the answers that ended well.
    pub tokens: u64,
}

/// Judgements of an arm's answers: one number for each unit, the mean of what was said of its answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UnitSums {
    /// Which arm.
    pub arm: u32,
    /// Units of whose answers somebody said something.
    pub units: u64,
    /// Σ of their means.
    pub sum: f64,
    /// Σ of the squares of their means.
    pub squares: f64,
}

/// What is known of every answer, and averaged over a unit's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitValue {
    /// 1 where it failed.
    Failed,
    /// 1 where it was cut off at its limit, of those that ended well.
    Truncated,
    /// 1 where it refuses, of those of which that is known.
    Refused,
    /// Its tokens, of those that ended well.
    Tokens,
    /// How far its model has moved from the base, of those that were scored ([`crate::BaseScores`]).
    KlToBase,
    /// The base's mean log-probability of its tokens, of the same.
    LogprobToBase,
}

/// What counts once in a quantile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Each {
    /// Every answer.
    Answer,
    /// Every unit: its answers share its weight.
    Unit,
}

/// The time to the first token in an arm. Who broke off, or was told of a failure, after waiting longer than the bound without one has
/// waited too long as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstTokens {
    /// Answers that have one, or were waited for too long; or the units that asked for them.
    pub count: u64,
    /// The quantile's value, in microseconds; `None` without any.
    pub value_us: Option<i64>,
    /// Answers that took longer than the bound.
    pub above: u64,
}

/// How long an arm's answers were waited for. A stall has no first token: without those who gave up on it, it would look like nothing at
/// all.
const WAITED: &str = "FROM (SELECT unit, CASE WHEN first_token_us IS NULL AND status <> 'ok' AND duration_us > $4 THEN duration_us \
     ELSE first_token_us END AS waited FROM inferences WHERE rollout_id = $1 AND arm = $2 AND created >= $3) AS answers \
     WHERE waited IS NOT NULL";

/// The exposures of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Exposures {
    database: Database,
}

impl Exposures {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// The arms of a rollout that answered since then (microseconds since 1970), by arm.
    pub async fn counts(&self, rollout: Uuid, since: i64) -> Result<Vec<ArmCounts>, StoreError> {
        at_length(async {
            let sum = |condition: &str| format!("CAST(COALESCE(SUM(CASE WHEN {condition} THEN 1 ELSE 0 END), 0) AS BIGINT)");
            let text = format!(
                "SELECT i.arm, COUNT(DISTINCT i.unit), {}, {}, {}, {}, {}, {}, \
                 CAST(COALESCE(SUM(CASE WHEN i.status = 'ok' THEN i.output_tokens ELSE 0 END), 0) AS BIGINT) FROM inferences i \
                 LEFT JOIN choices c ON c.id = i.id WHERE i.rollout_id = $1 AND i.created >= $2 GROUP BY i.arm ORDER BY i.arm",
                sum("i.status <> 'cancelled'"),
                sum("i.status = 'failed'"),
                sum("i.status = 'ok'"),
                sum("i.status = 'ok' AND c.finish_reason = 'length'"),
                sum("i.refused IS NOT NULL"),
                sum("i.refused = 1"),
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(rollout.to_string()).bind(since);
            let rows = query.fetch_all(self.database.read()).await?;
            let arm = |row: &AnyRow| {
                let count = |index: usize| row.try_get::<i64, _>(index).map(i64::unsigned_abs);
                Ok(ArmCounts {
                    arm: u32::try_from(row.try_get::<i64, _>(0)?).unwrap_or(u32::MAX),
                    units: count(1)?,
                    answers: count(2)?,
                    failed: count(3)?,
                    complete: count(4)?,
                    truncated: count(5)?,
                    read: count(6)?,
                    refused: count(7)?,
                    tokens: count(8)?,
                })
            };
            rows.iter().map(arm).collect()
        })
        .await
    }

    /// The units of each arm whose answers began since then and before `until` (microseconds since 1970), by arm.
    pub async fn units(&self, rollout: Uuid, since: i64, until: i64) -> Result<Vec<(u32, u64)>, StoreError> {
        const TEXT: &str = "SELECT arm, COUNT(DISTINCT unit) FROM inferences \
             WHERE rollout_id = $1 AND created >= $2 AND created < $3 GROUP BY arm ORDER BY arm";
        at_length(async {
            let query = sqlx::query(TEXT).bind(rollout.to_string()).bind(since).bind(until);
            let rows = query.fetch_all(self.database.read()).await?;
            let units = |row: &AnyRow| {
                let arm = u32::try_from(row.try_get::<i64, _>(0)?).unwrap_or(u32::MAX);
                Ok((arm, row.try_get::<i64, _>(1)?.unsigned_abs()))
            };
            rows.iter().map(units).collect()
        })
        .await
    }

    /// The time to the first token of an arm's answers: its `quantile`, from 0 to 1, and how many took longer than `bound` microseconds.
    pub async fn first_tokens(
        &self,
        rollout: Uuid,
        arm: u32,
        since: i64,
        quantile: f64,
        bound: i64,
        each: Each,
    ) -> Result<FirstTokens, StoreError> {
        at_length(async {
            let count = match each {
                Each::Answer => "COUNT(*)",
                Each::Unit => "COUNT(DISTINCT unit)",
            };
            let text =
                format!("SELECT {count}, CAST(COALESCE(SUM(CASE WHEN waited > $4 THEN 1 ELSE 0 END), 0) AS BIGINT) {WAITED}");
            let query = sqlx::query(AssertSqlSafe(text)).bind(rollout.to_string()).bind(i64::from(arm)).bind(since).bind(bound);
            let counted = query.fetch_one(self.database.read()).await?;
            let (count, above) = (counted.try_get::<i64, _>(0)?.unsigned_abs(), counted.try_get::<i64, _>(1)?.unsigned_abs());
            // The smallest value that so large a share does not exceed; weights are added up with rounding.
            let share = quantile.clamp(0.0, 1.0) * count as f64 * (1.0 - 1e-9);
            Ok(FirstTokens { count, value_us: self.first_token_above(rollout, arm, since, share, bound, each).await?, above })
        })
        .await
    }

    /// The shortest time to the first token, among those of [`Exposures::first_tokens`], that more than `weight` of an arm's answers or units
    /// do not exceed; of a unit that part of its answers counts which does not. `None` where all of them are not more.
    pub async fn first_token_above(
        &self,
        rollout: Uuid,
        arm: u32,
        since: i64,
        weight: f64,
        bound: i64,
        each: Each,
    ) -> Result<Option<i64>, StoreError> {
        at_length(async {
            let one = match each {
                Each::Answer => "1",
                Each::Unit => "1.0 / COUNT(*) OVER (PARTITION BY unit)",
            };
            let text = format!(
                "SELECT MIN(waited) FROM (SELECT waited, SUM(weight) OVER (ORDER BY waited) AS reached FROM (\
                     SELECT waited, CAST({one} AS DOUBLE PRECISION) AS weight {WAITED}) AS weighed) AS added WHERE reached > $5"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(rollout.to_string()).bind(i64::from(arm)).bind(since).bind(bound);
            let found = query.bind(weight).fetch_one(self.database.read()).await?;
            Ok(found.try_get(0)?)
        })
        .await
    }

    /// What the answers since then were like, by arm: of each unit the mean of its answers, so that a unit that asked often counts once.
    pub async fn unit_means(&self, rollout: Uuid, since: i64, value: UnitValue) -> Result<Vec<UnitSums>, StoreError> {
        at_length(async {
            let flag = |condition: &str| format!("CASE WHEN {condition} THEN 1.0 ELSE 0.0 END");
            let (each, counted) = match value {
                UnitValue::Failed => (flag("i.status = 'failed'"), "i.status <> 'cancelled'"),
                UnitValue::Truncated => (flag("c.finish_reason = 'length'"), "i.status = 'ok'"),
                UnitValue::Refused => (flag("i.refused = 1"), "i.refused IS NOT NULL"),
                UnitValue::Tokens => ("CAST(i.output_tokens AS DOUBLE PRECISION)".to_owned(), "i.status = 'ok'"),
                UnitValue::KlToBase => ("i.kl_to_base".to_owned(), "i.kl_to_base IS NOT NULL"),
                UnitValue::LogprobToBase => ("i.logprob_to_base".to_owned(), "i.logprob_to_base IS NOT NULL"),
            };
            let text = format!(
                "SELECT arm, COUNT(*), CAST(SUM(mean) AS DOUBLE PRECISION), CAST(SUM(mean * mean) AS DOUBLE PRECISION) FROM (\
                     SELECT i.arm AS arm, i.unit AS unit, CAST(AVG({each}) AS DOUBLE PRECISION) AS mean FROM inferences i \
                     LEFT JOIN choices c ON c.id = i.id WHERE i.rollout_id = $1 AND i.created >= $2 AND {counted} GROUP BY i.arm, i.unit\
                 ) AS units GROUP BY arm ORDER BY arm"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(rollout.to_string()).bind(since);
            query.fetch_all(self.database.read()).await?.iter().map(unit_sums).collect()
        })
        .await
    }

    /// What people said of the answers since then, by arm: thumbs, ratings, or a metric by its name. Of a conversation, what was said
    /// counts for the unit once. Two applications may call conversations alike: what came with a key is about that key's, where it has any.
    pub async fn judgements(
        &self,
        rollout: Uuid,
        since: i64,
        kind: Kind,
        metric: Option<&str>,
    ) -> Result<Vec<UnitSums>, StoreError> {
        // An absent name is the empty one, as no metric is called.
        const SAID: &str = "f.withdrawn = 0 AND f.kind = $3 AND COALESCE(f.metric, '') = $4 AND f.number IS NOT NULL";
        at_length(async {
            let text = format!(
                "SELECT arm, COUNT(*), CAST(SUM(mean) AS DOUBLE PRECISION), CAST(SUM(mean * mean) AS DOUBLE PRECISION) FROM (\
                     SELECT arm, unit, AVG(number) AS mean FROM (\
                         SELECT i.arm AS arm, i.unit AS unit, f.id AS id, f.number AS number FROM inferences i \
                             JOIN choices c ON c.inference_id = i.id JOIN feedback f ON f.target = c.id \
                             WHERE i.rollout_id = $1 AND i.created >= $2 AND {SAID} \
                         UNION SELECT i.arm, i.unit, f.id, f.number FROM inferences i \
                             JOIN feedback f ON f.target = i.conversation AND f.target_kind = 'conversation' \
                             WHERE i.rollout_id = $1 AND i.created >= $2 AND {SAID} AND (\
                                 COALESCE(f.key_id, '') = COALESCE(i.key_id, '') OR NOT EXISTS (SELECT 1 FROM inferences own \
                                     WHERE own.conversation = f.target AND COALESCE(own.key_id, '') = COALESCE(f.key_id, '')))\
                     ) AS said GROUP BY arm, unit\
                 ) AS units GROUP BY arm ORDER BY arm"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(rollout.to_string()).bind(since).bind(kind.as_str());
            let rows = query.bind(clean(metric.unwrap_or_default()).into_owned()).fetch_all(self.database.read()).await?;
            rows.iter().map(unit_sums).collect()
        })
        .await
    }
}

fn unit_sums(row: &AnyRow) -> Result<UnitSums, StoreError> {
    Ok(UnitSums {
        arm: u32::try_from(row.try_get::<i64, _>(0)?).unwrap_or(u32::MAX),
        units: row.try_get::<i64, _>(1)?.unsigned_abs(),
        sum: row.try_get(2)?,
        squares: row.try_get(3)?,
    })
}
