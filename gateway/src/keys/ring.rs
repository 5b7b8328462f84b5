//! The keys that were sent lately.
//!
//! A key that was looked up is believed for [`FRESH`] without asking again. When the database does not answer then, it is believed for
//! the configured grace; a key that nobody has sent in that time cannot be told from an invented one, and is refused until the
//! database is back. A secret is found by its hash: an attacker who can time the search learns about the hash of a guess, which says nothing
//! about the hash of a secret; the whole hashes are compared in constant time all the same.

use blake3::Hash;
use moka::future::Cache;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidemill_store::{ApiKey, Store, StoreError};

/// How long a key is believed without asking again: a key revoked through another process works that much longer.
const FRESH: Duration = Duration::from_secs(5);
/// How long a secret that no key has is refused without asking again.
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// Most keys remembered, and most unknown secrets.
const KEPT: u64 = 10_000;
/// How long the database gets to confirm a key that is known anyway.
const CONFIRM_PATIENCE: Duration = Duration::from_secs(1);
/// After it failed to, it is not asked again for this long.
const REST: Duration = Duration::from_secs(2);

/// Keys by their secrets.
pub struct KeyRing {
    store: Store,
    grace: Duration,
    known: Cache<[u8; 32], Entry>,
    /// With the count of changes, as in [`Entry`].
    unknown: Cache<[u8; 32], u64>,
    failed: Mutex<Option<Instant>>,
}

#[derive(Clone)]
struct Entry {
    hash: Hash,
    key: Arc<ApiKey>,
    confirmed: Instant,
    /// How many changes this process had made to keys before the question was asked: an answer from before a change is worth nothing,
    /// even when it arrives after it.
    changes: u64,
}

/// What is known of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// It is this key's.
    Key(Arc<ApiKey>),
    /// It was this key's, which has expired.
    Expired,
    /// It is no key's.
    Nobody,
}

impl KeyRing {
    /// Over a store. `grace` is how long a key is believed that the database cannot confirm.
    pub fn new(store: Store, grace: Duration) -> Self {
        let known = Cache::builder().max_capacity(KEPT).time_to_live(grace.max(FRESH)).build();
        let unknown = Cache::builder().max_capacity(KEPT).time_to_live(UNKNOWN_FOR).build();
        Self { store, grace, known, unknown, failed: Mutex::new(None) }
    }

    /// Whose secret it is, at `now` in microseconds since 1970.
    pub async fn find(&self, secret: &str, now: i64) -> Result<Known, StoreError> {
        let changes = self.store.key_changes();
        let hash = blake3::hash(secret.as_bytes());
        // The comparison of hashes takes the same time whatever they are.
        let entry = self.known.get(hash.as_bytes()).await.filter(|entry| entry.hash == hash && entry.changes == changes);
        if let Some(entry) = &entry
            && entry.confirmed.elapsed() < FRESH
        {
            return Ok(alive(&entry.key, now));
        }
        if entry.is_none() && self.unknown.get(hash.as_bytes()).await == Some(changes) {
            return Ok(Known::Nobody);
        }
        match (self.ask(secret, entry.is_some()).await, entry) {
            (Ok(Some(key)), _) => {
                let key = Arc::new(key);
                self.remember(hash, &key, changes).await;
                Ok(alive(&key, now))
            }
            (Ok(None), entry) => {
                self.known.invalidate(hash.as_bytes()).await;
                self.unknown.insert(*hash.as_bytes(), changes).await;
                Ok(entry.map_or(Known::Nobody, |entry| match alive(&entry.key, now) {
                    Known::Expired => Known::Expired,
                    _ => Known::Nobody,
                }))
            }
            (Err(_), Some(entry)) if entry.confirmed.elapsed() < self.grace => Ok(alive(&entry.key, now)),
            (Err(error), _) => Err(error),
        }
    }

    /// Asks the database, unless it has just failed to answer.
    async fn ask(&self, secret: &str, known: bool) -> Result<Option<ApiKey>, StoreError> {
        if self.failed().is_some_and(|failed| failed.elapsed() < REST) {
            return Err(StoreError::Away);
        }
        let asked = self.store.find_key(secret);
        let answer = match known {
            true => tokio::time::timeout(CONFIRM_PATIENCE, asked).await.unwrap_or(Err(StoreError::Away)),
            false => asked.await,
        };
        let failed = answer.as_ref().err().map(|error| {
            tracing::warn!(%error, "cannot look up keys; those that were seen lately are believed, others refused");
            Instant::now()
        });
        *self.failed() = failed;
        answer
    }

    fn failed(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn remember(&self, hash: Hash, key: &Arc<ApiKey>, changes: u64) {
        let entry = Entry { hash, key: Arc::clone(key), confirmed: Instant::now(), changes };
        self.known.insert(*hash.as_bytes(), entry).await;
    }
}

fn alive(key: &Arc<ApiKey>, now: i64) -> Known {
    if key.has_expired(now) { Known::Expired } else { Known::Key(Arc::clone(key)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_store::{DataDir, Scope, StoreOptions};

    #[tokio::test]
    async fn a_key_that_was_revoked_while_it_was_looked_up_is_not_believed_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(StoreOptions::new(DataDir::new(folder.path()))).await.unwrap();
        let ring = KeyRing::new(store.clone(), Duration::from_secs(3600));
        let (_, secret) = store.create_key("app", &[Scope::Chat]).await.unwrap();
        // One request has its answer from the database, and is slow to write it down.
        let (asked, found) = (store.key_changes(), store.find_key(&secret).await.unwrap().unwrap());
        store.revoke_key("app", "server").await.unwrap().unwrap();
        assert_eq!(ring.find(&secret, 0).await.unwrap(), Known::Nobody);
        ring.remember(blake3::hash(secret.as_bytes()), &Arc::new(found), asked).await;
        assert_eq!(ring.find(&secret, 0).await.unwrap(), Known::Nobody);
        store.close().await;
    }
}
