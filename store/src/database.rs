//! Pools of connections, one to read and one to write, to SQLite or Postgres, spoken to with the same statements.

use crate::error::StoreError;
use sqlx::any::AnyPoolOptions;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AnyPool, AssertSqlSafe, Connection, SqlSafeStr};
use std::path::Path;
use std::time::Duration;

/// How long closing waits for a pool.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// Which SQL is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Embedded, one writer.
    Sqlite,
    /// A server, shared by several gateways.
    Postgres,
}

/// A database whose tables are there. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Database {
    dialect: Dialect,
    read: AnyPool,
    write: AnyPool,
}

impl Database {
    /// Opens `url` (`postgres://…` or `sqlite:…`) and brings its tables up to date. A Postgres that does not answer within
    /// `patience` is an error.
    pub async fn open(url: &str, patience: Duration) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let dialect = match url.split(':').next() {
            Some("postgres" | "postgresql") => Dialect::Postgres,
            Some("sqlite") => Dialect::Sqlite,
            _ => return Err(StoreError::Url(without_password(url))),
        };
        let pool = |connections: u32| {
            AnyPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(patience)
                .after_connect(move |connection, _| {
                    Box::pin(async move {
                        if dialect == Dialect::Sqlite {
                            // FULL: a commit is on the disk, not merely with the operating system, before it is acknowledged.
                            for pragma in [
                                "PRAGMA journal_mode = WAL",
                                "PRAGMA synchronous = FULL",
                                "PRAGMA busy_timeout = 10000",
                                // What is deleted is overwritten, not merely forgotten.
                                "PRAGMA secure_delete = ON",
                                "PRAGMA temp_store = MEMORY",
                                "PRAGMA cache_size = -32768",
                            ] {
                                sqlx::query(pragma).execute(&mut *connection).await?;
                            }
                        }
                        Ok(())
                    })
                })
                // Before a connection goes back into the pool it is asked whether it is well. Without an end to waiting for that, each
                // one that the network has swallowed would be missing from the pool until TCP gives up.
                .after_release(move |connection, _| {
                    Box::pin(async move {
                        if dialect == Dialect::Sqlite {
                            return Ok(true);
                        }
                        match tokio::time::timeout(patience, connection.ping()).await {
                            Ok(answer) => answer.map(|()| true),
                            Err(_) => Err(sqlx::Error::PoolTimedOut),
                        }
                    })
                })
        };
        let database = match dialect {
            // SQLite has one writer at a time: waiting for it in the pool costs less than colliding at the file.
            Dialect::Sqlite => Self { dialect, read: pool(4).connect_lazy(url)?, write: pool(1).connect(url).await? },
            // Two pools here, too: readers that are slow must not look to the recorder like a database that is away.
            Dialect::Postgres => Self { dialect, read: pool(10).connect_lazy(url)?, write: pool(6).connect(url).await? },
        };
        database.migrate().await?;
        Ok(database)
    }

    /// The database file of a data directory.
    pub fn sqlite_url(file: &Path) -> String {
        // The URL's own syntax must not be read into a path.
        let path: String = file
            .to_string_lossy()
            .chars()
            .flat_map(|c| match c {
                '%' | '?' | '#' | ' ' => format!("%{:02X}", u32::from(c)).chars().collect::<Vec<_>>(),
                _ => vec![c],
            })
            .collect();
        format!("sqlite:{path}?mode=rwc")
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        let bytes = match self.dialect {
            Dialect::Sqlite => "BLOB",
            Dialect::Postgres => "BYTEA",
        };
        let migrations = MIGRATIONS.iter().map(|&(version, description, text)| {
            let sql = AssertSqlSafe(text.replace(" BYTES", &format!(" {bytes}"))).into_sql_str();
            Migration::new(version, description.into(), MigrationType::Simple, sql, false)
        });
        Migrator::with_migrations(migrations.collect()).run(&self.write).await?;
        Ok(())
    }

    /// Which SQL is spoken.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// For statements that only read.
    pub fn read(&self) -> &AnyPool {
        &self.read
    }

    /// For everything else. On SQLite this is a single connection: hold it briefly, and never while waiting for `read`.
    pub fn write(&self) -> &AnyPool {
        &self.write
    }

    /// Waits until open connections are back and closes them. Those that the network has swallowed are left to the system.
    pub async fn close(&self) {
        for pool in [&self.write, &self.read] {
            tokio::time::timeout(LAST_WORDS, pool.close()).await.ok();
        }
    }

    /// SQLite: moves what is in the write-ahead log into the database file and cuts the log to nothing. `false`: readers or writers
    /// were in the way for too long, and some of it is still in the log.
    pub(crate) async fn empty_log(&self) -> Result<bool, sqlx::Error> {
        if self.dialect != Dialect::Sqlite {
            return Ok(true);
        }
        let (busy, _, _): (i64, i64, i64) = sqlx::query_as("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&self.write).await?;
        Ok(busy == 0)
    }
}

const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "records", include_str!("../migrations/0001_records.sql")),
    (2, "responses", include_str!("../migrations/0002_responses.sql")),
    (3, "files", include_str!("../migrations/0003_files.sql")),
    (4, "keys", include_str!("../migrations/0004_keys.sql")),
    (5, "indexes", include_str!("../migrations/0005_indexes.sql")),
    (6, "structured answers", include_str!("../migrations/0006_structured_answers.sql")),
    (7, "label progress", include_str!("../migrations/0007_label_progress.sql")),
    (8, "adapters", include_str!("../migrations/0008_adapters.sql")),
    (9, "fine-tuning", include_str!("../migrations/0009_fine_tuning.sql")),
    (10, "rollouts", include_str!("../migrations/0010_rollouts.sql")),
    (11, "keeper", include_str!("../migrations/0011_keeper.sql")),
    (12, "loops", include_str!("../migrations/0012_loops.sql")),
    (13, "governance", include_str!("../migrations/0013_governance.sql")),
    (14, "base scores", include_str!("../migrations/0014_base_scores.sql")),
    (16, "housekeeping", include_str!("../migrations/0016_housekeeping.sql")),
    (17, "under way", include_str!("../migrations/0017_under_way.sql")),
];

fn without_password(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => format!("{}://…{}", &url[..scheme], &url[at..]),
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_never_shows_the_password() {
        assert_eq!(without_password("mysql://me:secret@db/x"), "mysql://…@db/x");
        assert_eq!(without_password("nonsense"), "nonsense");
    }

    #[tokio::test]
    async fn tables_are_made_once_and_found_again() {
        let temp = tempfile::tempdir().unwrap();
        let url = Database::sqlite_url(&temp.path().join("a b?%#.db"));
        for _ in 0..2 {
            let database = Database::open(&url, Duration::from_secs(5)).await.unwrap();
            let (rows,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM inferences").fetch_one(database.read()).await.unwrap();
            assert_eq!(rows, 0);
            database.close().await;
        }
        assert!(temp.path().join("a b?%#.db").exists());
    }
}
