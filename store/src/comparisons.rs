//! What people said of pairs of answers that they got at once, one from each arm of a rollout.

use serde_json::Value;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::inferences::parse;
use crate::patience::at_length;

/// Most judgements that are read; of more, the newest.
const MOST: usize = 100_000;

/// A candidate of a judgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The choice's id.
    pub id: String,
    /// Which arm answered; 0 is the control.
    pub arm: u32,
    /// Where the answer stood, from 0.
    pub place: Option<u32>,
}

/// A judgement of answers of one rollout.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// A hash of the key that keeps the places.
    pub unit: i64,
    /// What was said, as feedback has it.
    pub value: Value,
    /// The answers, by arm.
    pub candidates: Vec<Candidate>,
}

/// The comparisons of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Comparisons {
    database: Database,
}

impl Comparisons {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// What was said of answers of a rollout that were given since then (microseconds since 1970), the oldest first.
    pub async fn of(&self, rollout: Uuid, since: i64) -> Result<Vec<Comparison>, StoreError> {
        at_length(async {
            // Each judgement has a row for each candidate that is an answer of the rollout.
            let text = format!(
                "SELECT f.id AS feedback, f.value AS value, i.unit AS unit, i.arm AS arm, i.place AS place, c.id AS choice \
                 FROM inferences i JOIN choices c ON c.inference_id = i.id JOIN feedback_targets t ON t.target = c.id \
                 JOIN feedback f ON f.id = t.feedback_id WHERE i.rollout_id = $1 AND i.created >= $2 AND f.kind = 'comparison' \
                 AND f.withdrawn = 0 ORDER BY f.id DESC, i.arm LIMIT {}",
                2 * MOST
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(rollout.to_string()).bind(since);
            let mut found: Vec<(String, Comparison)> = Vec::new();
            for row in query.fetch_all(self.database.read()).await? {
                let feedback: String = row.try_get("feedback")?;
                let candidate = candidate(&row)?;
                match found.last_mut() {
                    Some((last, comparison)) if *last == feedback => comparison.candidates.push(candidate),
                    _ => {
                        let bad = |reason| StoreError::Row { table: "feedback", id: feedback.clone(), reason };
                        let value = parse(&row, "value").map_err(bad)?.unwrap_or_default();
                        let comparison = Comparison { unit: row.try_get("unit")?, value, candidates: vec![candidate] };
                        found.push((feedback, comparison));
                    }
                }
            }
            found.reverse();
            Ok(found.into_iter().map(|(_, comparison)| comparison).collect())
        })
        .await
    }
}

fn candidate(row: &AnyRow) -> Result<Candidate, sqlx::Error> {
    let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
    let place: Option<i64> = row.try_get("place")?;
    Ok(Candidate { id: row.try_get("choice")?, arm: number(row.try_get("arm")?), place: place.map(number) })
}
