//! The keys that were sent lately.
//!
//! A key that was looked up is believed for [`FRESH`] without asking again. When the database does not answer then, it is believed for
//! the configured grace; a key that nobody has sent in that time cannot be told from an invented one, and is refused until the
//! database is back. A secret is found by its hash: an attacker who can time the search learns about the hash of a guess, which says nothing
//! about the hash of a secret; the whole hashes are compared in constant time all the same.

use blake3::Hash;
use moka::future::Cache;
use std::sync::atomic::{AtomicU64, Ordering};
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
    unknown: Cache<[u8; 32], ()>,
    changes: AtomicU64,
    failed: Mutex<Option<Instant>>,
}

#[derive(Clone)]
struct Entry {
    hash: Hash,
    key: Arc<ApiKey>,
    confirmed: Instant,
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
        let changes = AtomicU64::new(store.key_changes());
        Self { store, grace, known, unknown, changes, failed: Mutex::new(None) }
    }

    /// Whose secret it is, at `now` in microseconds since 1970.
    pub async fn find(&self, secret: &str, now: i64) -> Result<Known, StoreError> {
        self.forget_if_changed();
        let hash = blake3::hash(secret.as_bytes());
        // The comparison of hashes takes the same time whatever they are.
        let entry = self.known.get(hash.as_bytes()).await.filter(|entry| entry.hash == hash);
        if let Some(entry) = &entry
            && entry.confirmed.elapsed() < FRESH
        {
            return Ok(alive(&entry.key, now));
        }
        if entry.is_none() && self.unknown.get(hash.as_bytes()).await.is_some() {
            return Ok(Known::Nobody);
        }
        match (self.ask(secret, entry.is_some()).await, entry) {
            (Ok(Some(key)), _) => {
                let key = Arc::new(key);
                let entry = Entry { hash, key: Arc::clone(&key), confirmed: Instant::now() };
                self.known.insert(*hash.as_bytes(), entry).await;
                Ok(alive(&key, now))
            }
            (Ok(None), entry) => {
                self.known.invalidate(hash.as_bytes()).await;
                self.unknown.insert(*hash.as_bytes(), ()).await;
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

    /// A key that this process has changed or revoked is not believed any more.
    fn forget_if_changed(&self) {
        let changes = self.store.key_changes();
        if self.changes.swap(changes, Ordering::AcqRel) != changes {
            self.known.invalidate_all();
            self.unknown.invalidate_all();
        }
    }
}

fn alive(key: &Arc<ApiKey>, now: i64) -> Known {
    if key.has_expired(now) { Known::Expired } else { Known::Key(Arc::clone(key)) }
}
