//! Which of several servers on one database does what only one should do.
//!
//! On Postgres it is the one that holds an advisory lock of the session, on a connection of its own: the lock is free again when that
//! connection ends, however it ends. On SQLite the only server there is leads. Two may believe for a moment that they lead, when a
//! connection breaks and only the other side knows; what a leader writes must therefore be refused where somebody else was first.

use sqlx::{AnyConnection, Connection, Row};

use crate::error::StoreError;
use crate::patience::patiently;
use crate::{Database, Dialect};

/// A wish to lead.
#[derive(Debug)]
pub struct Leadership {
    database: Database,
    /// Names what is led, among everything that uses locks on this database.
    key: i64,
    /// Away from the pool, which would give it to others and end it when it is old.
    connection: Option<AnyConnection>,
    /// That connection holds the lock.
    leads: bool,
}

impl Leadership {
    /// In what `name` says.
    pub fn new(database: &Database, name: &str) -> Self {
        let mut key = [0; 8];
        key.copy_from_slice(&blake3::hash(format!("tidemill {name}").as_bytes()).as_bytes()[..8]);
        Self { database: database.clone(), key: i64::from_le_bytes(key), connection: None, leads: false }
    }

    /// Whether this server leads now; one that does not tries to.
    pub async fn is_mine(&mut self) -> Result<bool, StoreError> {
        if self.database.dialect() == Dialect::Sqlite {
            return Ok(true);
        }
        // Taken out while it is asked: one that does not answer in time is closed, and a lock that it may hold is free again.
        let (held, led) = (self.connection.take(), std::mem::take(&mut self.leads));
        let (key, pool) = (self.key, self.database.write());
        let (connection, leads) = patiently::<_, StoreError>(async {
            let mut connection = match held {
                Some(connection) => connection,
                None => pool.acquire().await?.detach(),
            };
            if led {
                connection.ping().await?;
                return Ok((connection, true));
            }
            let text = "SELECT CASE WHEN pg_try_advisory_lock($1) THEN 1 ELSE 0 END";
            let won: i32 = sqlx::query(text).bind(key).fetch_one(&mut connection).await?.try_get(0)?;
            Ok((connection, won == 1))
        })
        .await?;
        (self.connection, self.leads) = (Some(connection), leads);
        Ok(leads)
    }

    /// Lets another server lead.
    pub async fn resign(&mut self) {
        self.leads = false;
        if let Some(connection) = self.connection.take() {
            // The end of the connection ends the lock, in good order or not.
            patiently::<_, StoreError>(async { Ok(connection.close().await?) }).await.ok();
        }
    }
}
