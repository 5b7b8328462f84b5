//! What the base model says of answers that count in rollouts.
//!
//! The rows are the queue: of a rollout the newest answers wait to be scored, and who takes one writes a promise with an end into its row,
//! so that several servers share the work, a server that dies loses nothing, and no answer is scored twice.

use sqlx::Row;
use sqlx::any::AnyRow;
use uuid::Uuid;

use crate::Database;
use crate::error::StoreError;
use crate::patience::{at_length, patiently};

/// Answers of a rollout, the newest, that may wait to be scored. One that is older than so many others is not scored any more.
const WINDOW: i64 = 512;

/// What the base model says of one answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BaseScore {
    /// How far the answer's model has moved from the base, by this answer: nats per token.
    pub kl: f64,
    /// The base's own mean log-probability of the answer's tokens.
    pub logprob: f64,
}

/// An answer that waits to be scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unscored {
    /// Its id.
    pub id: Uuid,
    /// The arm that gave it.
    pub arm: u32,
    /// The base model that did.
    pub model: String,
}

/// The scores of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct BaseScores {
    database: Database,
}

impl BaseScores {
    /// Over a database whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Answers of a rollout since then that can be scored and that nobody is scoring at `now` (microseconds since 1970), the newest first.
    /// An answer whose tokens were not recorded cannot be.
    pub async fn waiting(&self, rollout: Uuid, since: i64, now: i64) -> Result<Vec<Unscored>, StoreError> {
        at_length(async {
            let text = "SELECT n.id, n.arm, n.model FROM (\
                     SELECT id, arm, model, created, status, scoring, kl_to_base, CASE WHEN prompt_ids IS NULL THEN 0 ELSE 1 END AS whole \
                     FROM inferences WHERE rollout_id = $1 AND created >= $2 ORDER BY created DESC LIMIT $4\
                 ) AS n JOIN choices c ON c.id = n.id \
                 WHERE n.status = 'ok' AND n.whole = 1 AND n.kl_to_base IS NULL AND (n.scoring IS NULL OR n.scoring < $3) \
                 AND c.raw_logprobs IS NOT NULL ORDER BY n.created DESC, n.id DESC";
            let query = sqlx::query(text).bind(rollout.to_string()).bind(since).bind(now).bind(WINDOW);
            query.fetch_all(self.database.read()).await?.iter().map(read).collect()
        })
        .await
    }

    /// Promises to score an answer before `until`. `false` where somebody else has, or it is scored or gone.
    pub async fn claim(&self, answer: Uuid, now: i64, until: i64) -> Result<bool, StoreError> {
        patiently(async {
            let text = "UPDATE inferences SET scoring = $3 \
                        WHERE id = $1 AND kl_to_base IS NULL AND (scoring IS NULL OR scoring < $2) AND prompt_ids IS NOT NULL";
            let query = sqlx::query(text).bind(answer.to_string()).bind(now).bind(until);
            Ok(query.execute(self.database.write()).await?.rows_affected() == 1)
        })
        .await
    }

    /// Gives an answer back that could not be scored now.
    pub async fn release(&self, answer: Uuid) -> Result<(), StoreError> {
        self.scoring(answer, None).await
    }

    async fn scoring(&self, answer: Uuid, until: Option<i64>) -> Result<(), StoreError> {
        patiently(async {
            let text = "UPDATE inferences SET scoring = $2 WHERE id = $1 AND kl_to_base IS NULL";
            sqlx::query(text).bind(answer.to_string()).bind(until).execute(self.database.write()).await?;
            Ok(())
        })
        .await
    }

    /// Leaves an answer aside of which nothing can be said.
    pub async fn claim_for_good(&self, answer: Uuid) -> Result<(), StoreError> {
        self.scoring(answer, Some(i64::MAX)).await
    }

    /// Writes a score, unless the answer has one or is gone.
    pub async fn write(&self, answer: Uuid, score: BaseScore) -> Result<bool, StoreError> {
        patiently(async {
            let text = "UPDATE inferences SET kl_to_base = $2, logprob_to_base = $3, scoring = NULL \
                        WHERE id = $1 AND kl_to_base IS NULL";
            let query = sqlx::query(text).bind(answer.to_string()).bind(score.kl).bind(score.logprob);
            Ok(query.execute(self.database.write()).await?.rows_affected() == 1)
        })
        .await
    }
}

fn read(row: &AnyRow) -> Result<Unscored, StoreError> {
    let id: String = row.try_get(0)?;
    let bad = || StoreError::Row { table: "inference", id: id.clone(), reason: "its id is no UUID".to_owned() };
    Ok(Unscored {
        id: Uuid::try_parse(&id).map_err(|_| bad())?,
        arm: u32::try_from(row.try_get::<i64, _>(1)?).unwrap_or(u32::MAX),
        model: row.try_get(2)?,
    })
}
