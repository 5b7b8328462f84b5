//! Which state of the rollouts the servers on one database assign by.
//!
//! Every server reads the rollouts again within a second. Whoever ends one wants to know when the last of them has: each writes down the
//! [`crate::Rollouts::clock`] that it serves. Where one server has the database for itself nothing is written.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Row};
use uuid::Uuid;

use crate::error::StoreError;
use crate::patience::patiently;
use crate::{Dialect, Store};

/// By the database's clock: those of the servers may differ.
const NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)";
/// A server that says nothing for so long is gone, or serves nobody.
const GONE: Duration = Duration::from_secs(10);

/// One server. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct RolloutReader {
    store: Store,
    name: String,
}

/// How many servers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readers {
    /// All that were heard of lately, this one included.
    pub all: u64,
    /// Of these, those that serve the state in question.
    pub serving: u64,
}

impl RolloutReader {
    /// This process on its store.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone(), name: Uuid::now_v7().to_string() }
    }

    fn is_alone(&self) -> bool {
        self.store.database().dialect() == Dialect::Sqlite
    }

    /// What time it is for all servers on the database, in microseconds since 1970: the database's clock, and `own` where one server has the
    /// database for itself.
    pub async fn now(&self, own: i64) -> Result<i64, StoreError> {
        if self.is_alone() {
            return Ok(own);
        }
        patiently(async {
            let row = sqlx::query(AssertSqlSafe(format!("SELECT {NOW}"))).fetch_one(self.store.database().read()).await?;
            Ok(row.try_get(0)?)
        })
        .await
    }

    /// Says that this server assigns by the rollouts of this clock, or by newer ones, and when the oldest of its answers began that will count
    /// in one and has not ended (microseconds since 1970). To be said again within some seconds.
    pub async fn serves(&self, clock: i64, under_way: i64) -> Result<(), StoreError> {
        if self.is_alone() {
            return Ok(());
        }
        patiently(async {
            let text = format!(
                "INSERT INTO rollout_readers (reader, serves, seen, under_way) VALUES ($1, $2, {NOW}, $3) \
                 ON CONFLICT (reader) DO UPDATE SET serves = excluded.serves, seen = excluded.seen, under_way = excluded.under_way"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(self.name.clone()).bind(clock).bind(under_way);
            query.execute(self.store.database().write()).await?;
            // Those that were killed.
            let text = format!("DELETE FROM rollout_readers WHERE seen < {NOW} - {}", 10 * GONE.as_micros());
            sqlx::query(AssertSqlSafe(text)).execute(self.store.database().write()).await?;
            Ok(())
        })
        .await
    }

    /// Who serves the rollouts of this clock.
    pub async fn of(&self, clock: i64) -> Result<Readers, StoreError> {
        if self.is_alone() {
            return Ok(Readers { all: 1, serving: 1 });
        }
        patiently(async {
            let text = format!(
                "SELECT COUNT(*), CAST(COALESCE(SUM(CASE WHEN serves >= $1 THEN 1 ELSE 0 END), 0) AS BIGINT) \
                 FROM rollout_readers WHERE seen > {NOW} - {}",
                GONE.as_micros()
            );
            let row = sqlx::query(AssertSqlSafe(text)).bind(clock).fetch_one(self.store.database().read()).await?;
            let count = |index: usize| row.try_get::<i64, _>(index).map(i64::unsigned_abs);
            Ok(Readers { all: count(0)?, serving: count(1)? })
        })
        .await
    }

    /// When the oldest answer of any server began that will count in a rollout and has not ended, as far as they have said so. `own` is this
    /// server's, in microseconds since 1970.
    pub async fn under_way(&self, own: i64) -> Result<i64, StoreError> {
        if self.is_alone() {
            return Ok(own);
        }
        patiently(async {
            let text = format!("SELECT MIN(under_way) FROM rollout_readers WHERE seen > {NOW} - {}", GONE.as_micros());
            let row = sqlx::query(AssertSqlSafe(text)).fetch_one(self.store.database().read()).await?;
            Ok(row.try_get::<Option<i64>, _>(0)?.map_or(own, |others| others.min(own)))
        })
        .await
    }

    /// Says that this server serves nobody any more.
    pub async fn leave(&self) -> Result<(), StoreError> {
        if self.is_alone() {
            return Ok(());
        }
        patiently(async {
            let query = sqlx::query("DELETE FROM rollout_readers WHERE reader = $1").bind(self.name.clone());
            query.execute(self.store.database().write()).await?;
            Ok(())
        })
        .await
    }
}
