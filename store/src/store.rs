//! The store as the rest of Tidemill sees it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use uuid::Uuid;

use crate::audit::{Act, Actor};
use crate::error::{Full, StoreError};
use crate::ids::IdKey;
use crate::inferences::{self, AnswerSpan, InferenceFilter};
use crate::judgements::{self, Acknowledged, FeedbackChange, FeedbackFilter};
use crate::key_terms::KeyTerms;
use crate::keys::{self, ApiKey, Scope};
use crate::page::Page;
use crate::patience::{PATIENCE, at_length, patiently};
use crate::recorder::Recorder;
use crate::records::{Feedback, Inference};
use crate::statement::clean;
use crate::usage::{self, Usage, UsageWriter};
use crate::{DataDir, Database, Erasure};

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// `postgres://…`; `None` is SQLite in the data directory.
    pub url: Option<String>,
    /// Where SQLite's file and the spill log are. The caller holds its lock.
    pub data: DataDir,
    /// Most answers that wait in memory.
    pub queue: usize,
    /// Most bytes of spill log.
    pub spill_bytes: u64,
    /// What is deleted by itself.
    pub retention: Retention,
}

/// What is deleted by itself; see [`crate::retention`] for what stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Answers older than this go.
    pub max_age: Option<Duration>,
    /// When the answers' text and tokens take more than this, the oldest go, those without feedback first.
    pub max_bytes: Option<u64>,
}

impl StoreOptions {
    /// SQLite in `data`, 4,096 answers in the queue, 1 GiB of spill log, nothing deleted.
    pub fn new(data: DataDir) -> Self {
        Self { url: None, data, queue: 4096, spill_bytes: 1 << 30, retention: Retention::default() }
    }
}

/// Every durable record. Cloning is cheap.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    database: Database,
    ids: IdKey,
    recorder: Recorder,
    key_changes: AtomicU64,
    any_key: Mutex<Option<(bool, Instant)>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("dialect", &self.0.database.dialect()).finish_non_exhaustive()
    }
}

impl Store {
    /// For a server: with the tasks that write, replay the spill log and delete what is old. One server per data directory.
    pub async fn open(options: StoreOptions) -> Result<Self, StoreError> {
        let (database, ids) = connect(&options.data, options.url.as_deref()).await?;
        let recorder = Recorder::start(database.clone(), ids.clone(), &options).await?;
        Ok(Self::of(database, ids, recorder))
    }

    /// Whether there is one already that opening would find, as far as can be told without a connection.
    pub fn is_there(data: &DataDir, url: Option<&str>) -> bool {
        url.is_some() || data.database().is_file()
    }

    /// For a command beside a running server: nothing in the background, and every write goes to the database at once.
    pub async fn open_for_command(data: &DataDir, url: Option<&str>) -> Result<Self, StoreError> {
        let (database, ids) = connect(data, url).await?;
        let recorder = Recorder::direct(database.clone(), ids.clone(), data.clone());
        Ok(Self::of(database, ids, recorder))
    }

    fn of(database: Database, ids: IdKey, recorder: Recorder) -> Self {
        Self(Arc::new(Inner { database, ids, recorder, key_changes: AtomicU64::new(0), any_key: Mutex::default() }))
    }

    /// For statements of other modules.
    pub fn database(&self) -> &Database {
        &self.0.database
    }

    /// The secret behind ids and pseudonyms.
    pub(crate) fn ids(&self) -> &IdKey {
        &self.0.ids
    }

    /// Whether the database did not answer when it was last needed.
    pub fn is_away(&self) -> bool {
        self.0.recorder.away()
    }

    /// A new id; every replica on this database recognises it.
    pub fn issue_id(&self) -> Uuid {
        let mut random = [0; 4];
        // Without random bytes an id is still unlikely to repeat: its time has a resolution of a quarter of a microsecond.
        if getrandom::fill(&mut random).is_err() {
            random = Instant::now().elapsed().subsec_nanos().to_le_bytes();
        }
        self.0.ids.make(since_1970(), u32::from_le_bytes(random))
    }

    /// Whether a replica on this database issued it. The answer itself may not be recorded yet, or not any more.
    pub fn issued(&self, id: Uuid) -> bool {
        self.0.ids.made(id)
    }

    /// What an exposure calls the unit of this key: a number from which the key cannot be guessed.
    pub fn unit_of(&self, key: &str) -> i64 {
        self.0.ids.unit(key)
    }

    /// Takes an answer to be written soon. Never waits for the database: what does not fit into the queue goes to the spill log.
    pub fn record(&self, inference: Inference) -> Result<(), Full> {
        self.0.recorder.record(inference)
    }

    /// Whether the answer of a request that starts now will find room. Ask before running it.
    pub fn has_room(&self) -> bool {
        self.0.recorder.has_room()
    }

    /// Writes feedback and returns when it is on the disk. When the database is away, what has no idempotency key is accepted into
    /// the spill log; with one, the answer is an error, since whether it is a duplicate cannot be known.
    pub async fn add_feedback(&self, feedback: Vec<Feedback>) -> Result<Vec<Acknowledged>, StoreError> {
        self.0.recorder.add_feedback(feedback).await
    }

    /// The feedback of this id.
    pub async fn feedback(&self, id: Uuid) -> Result<Option<Feedback>, StoreError> {
        patiently(judgements::find(&self.0.database, id)).await
    }

    /// A page of feedback.
    pub async fn list_feedback(&self, filter: &FeedbackFilter) -> Result<Page<Feedback>, StoreError> {
        at_length(judgements::find_all(&self.0.database, filter)).await
    }

    /// Changes a feedback and keeps what it was as a revision; a change that changes nothing adds none. `None`: no such feedback.
    pub async fn edit_feedback(&self, id: Uuid, change: FeedbackChange) -> Result<Option<Feedback>, StoreError> {
        patiently(judgements::edit(&self.0.database, id, now_us(), |feedback| change.apply(feedback))).await
    }

    /// Takes a feedback back; it stays, marked. `None`: no such feedback.
    pub async fn withdraw_feedback(&self, id: Uuid) -> Result<Option<Feedback>, StoreError> {
        patiently(judgements::edit(&self.0.database, id, now_us(), |feedback| feedback.withdrawn = true)).await
    }

    /// The answer of this id, or the one that has a choice of this id.
    pub async fn inference(&self, id: Uuid) -> Result<Option<Inference>, StoreError> {
        patiently(inferences::find(&self.0.database, id)).await
    }

    /// A page of answers.
    pub async fn list_inferences(&self, filter: &InferenceFilter) -> Result<Page<Inference>, StoreError> {
        at_length(inferences::find_all(&self.0.database, filter)).await
    }

    /// The answers that an adapter with these contents gave; generation 0 is no adapter's and has none.
    pub async fn answers_of(&self, generation: u64) -> Result<AnswerSpan, StoreError> {
        at_length(inferences::span_of(&self.0.database, generation)).await
    }

    /// Whether an answer of this conversation is recorded.
    pub async fn conversation_exists(&self, id: &str) -> Result<bool, StoreError> {
        let id = clean(id).into_owned();
        let database = &self.0.database;
        patiently(async move {
            let query = sqlx::query("SELECT 1 FROM inferences WHERE conversation = $1 LIMIT 1").bind(id);
            Ok(query.fetch_optional(database.read()).await?.is_some())
        })
        .await
    }

    /// Makes a key on the server's own account; the text is its secret, which is not kept.
    pub async fn create_key(&self, name: &str, scopes: &[Scope]) -> Result<(ApiKey, String), StoreError> {
        self.create_key_with(name, scopes, None, KeyTerms::default(), "server").await
    }

    /// The same on somebody's behalf, for a key that ends by itself at `expires` (microseconds since 1970) or is granted less, or more,
    /// than others.
    pub async fn create_key_with(
        &self,
        name: &str,
        scopes: &[Scope],
        expires: Option<i64>,
        terms: KeyTerms,
        by: impl Into<Actor>,
    ) -> Result<(ApiKey, String), StoreError> {
        let secret = keys::secret_of(random_bytes()?);
        let mut scopes = scopes.to_vec();
        scopes.sort();
        scopes.dedup();
        let (id, prefix) = (self.issue_id(), secret[..8].to_owned());
        let key = ApiKey { id, created: now_us(), name: name.to_owned(), prefix, scopes, revoked: None, expires, terms };
        let _changed = self.changing_keys();
        patiently(keys::insert(&self.0.database, &key, &secret, self.act(by, "key.create"))).await?;
        Ok((key, secret))
    }

    /// All keys, revoked ones too, the oldest first.
    pub async fn list_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        patiently(keys::list(&self.0.database)).await
    }

    /// Changes scopes, end and terms of the key of this id or name; nothing else of it can change. `None`: no key that works is called
    /// so.
    pub async fn change_key(
        &self,
        id_or_name: &str,
        change: impl FnOnce(&mut ApiKey) + Send,
        by: impl Into<Actor>,
    ) -> Result<Option<ApiKey>, StoreError> {
        let _changed = self.changing_keys();
        patiently(keys::change(&self.0.database, id_or_name, change, self.act(by, "key.change"))).await
    }

    /// Gives the key of this id or name a new secret, which is returned and not kept; the old one works for `overlap` more.
    pub async fn rotate_key(
        &self,
        id_or_name: &str,
        overlap: Duration,
        by: impl Into<Actor>,
    ) -> Result<Option<(ApiKey, String)>, StoreError> {
        let secret = keys::secret_of(random_bytes()?);
        let now = now_us();
        let ends = now.saturating_add(i64::try_from(overlap.as_micros()).unwrap_or(i64::MAX));
        let _changed = self.changing_keys();
        let act = self.act(by, "key.rotate");
        let rotated = patiently(keys::rotate(&self.0.database, id_or_name, &secret, now, ends, act)).await?;
        Ok(rotated.map(|key| (key, secret)))
    }

    /// Revokes the key of this id or name. `None`: no key that works is called so.
    pub async fn revoke_key(&self, id_or_name: &str, by: impl Into<Actor>) -> Result<Option<ApiKey>, StoreError> {
        let _changed = self.changing_keys();
        patiently(keys::revoke(&self.0.database, id_or_name, now_us(), self.act(by, "key.revoke"))).await
    }

    /// Counts a change when it is dropped: a change whose acknowledgement was lost, or whose requester has left, may have been made.
    fn changing_keys(&self) -> ChangingKeys<'_> {
        ChangingKeys(self)
    }

    /// How often this process has changed a key: who remembers keys forgets them when it has grown.
    pub fn key_changes(&self) -> u64 {
        self.0.key_changes.load(Ordering::Acquire)
    }

    /// The key that has this secret, is not revoked and has not expired, as the database has it now.
    pub async fn find_key(&self, secret: &str) -> Result<Option<ApiKey>, StoreError> {
        let now = now_us();
        let found = patiently(keys::find(&self.0.database, &keys::hash_of(secret), now)).await?;
        Ok(found.filter(|key| !key.has_expired(now)))
    }

    /// Writes what `writer` has counted for `subject` on `day` (days since 1970) so far, in the place of what it wrote before, and
    /// returns what all others have counted.
    pub async fn write_usage(&self, writer: UsageWriter, subject: &str, day: i64, own: Usage) -> Result<Usage, StoreError> {
        patiently(async {
            usage::write(&self.0.database, writer, subject, day, own).await?;
            usage::read(&self.0.database, Some(writer), subject, day).await
        })
        .await
    }

    /// What everybody but `except` has counted for `subject` on `day` (days since 1970).
    pub async fn usage(&self, except: Option<UsageWriter>, subject: &str, day: i64) -> Result<Usage, StoreError> {
        patiently(usage::read(&self.0.database, except, subject, day)).await
    }

    /// The key of this id, if it is neither revoked nor expired: for work that goes on after the request that began it.
    pub async fn key(&self, id: &str) -> Result<Option<ApiKey>, StoreError> {
        let found = patiently(keys::find_by_id(&self.0.database, id)).await?;
        Ok(found.filter(|key| !key.has_expired(now_us())))
    }

    /// Whether there is any key, a revoked one too; before the first, everything is open. Whoever revokes the last one wants the door shut,
    /// also after the next start.
    pub async fn any_key(&self) -> Result<bool, StoreError> {
        let known = *lock(&self.0.any_key);
        if let Some((any, seen)) = known
            && (seen.elapsed() < Duration::from_secs(1) || self.0.recorder.away())
        {
            return Ok(any);
        }
        match (patiently(keys::any(&self.0.database)).await, known) {
            (Ok(any), _) => {
                *lock(&self.0.any_key) = Some((any, Instant::now()));
                Ok(any)
            }
            (Err(_), Some((any, _))) => Ok(any),
            (Err(error), None) => Err(error),
        }
    }

    /// Removes a person; see [`crate::erasure`]. `user` is what `user_key` and `author` say.
    pub async fn erase_user(&self, user: &str, by: impl Into<Actor>) -> Result<Erasure, StoreError> {
        self.0.recorder.settle().await?;
        let erasure = crate::erasure::erase(&self.0.database, &self.0.ids, user, self.act(by, "erase")).await?;
        self.0.recorder.remove_damaged()?;
        Ok(erasure)
    }

    /// What somebody does now: to be written down with the change itself.
    pub fn act(&self, by: impl Into<Actor>, action: impl Into<String>) -> Act {
        let (id, at) = (self.issue_id(), now_us());
        Act { id, at, actor: by.into(), action: action.into(), subject: String::new(), detail: Value::Null }
    }

    /// Writes down who did what to what, where the change itself is not the store's.
    pub async fn audit(&self, by: impl Into<Actor>, action: &str, subject: &str, detail: Value) -> Result<(), StoreError> {
        let act = self.act(by, action).to(subject).with(detail);
        patiently(async {
            let mut connection = self.0.database.write().acquire().await?;
            Ok(act.write(&mut connection).await?)
        })
        .await
    }

    /// Waits until every answer that was taken is durable: in the database, or in the spill log.
    pub async fn flush(&self) {
        self.0.recorder.flush().await;
    }

    /// The same, and then stops; what is sent afterwards is refused.
    pub async fn close(&self) {
        self.0.recorder.close().await;
        self.0.database.close().await;
    }
}

struct ChangingKeys<'a>(&'a Store);

impl Drop for ChangingKeys<'_> {
    fn drop(&mut self) {
        let Store(inner) = self.0;
        inner.key_changes.fetch_add(1, Ordering::AcqRel);
        *lock(&inner.any_key) = None;
    }
}

async fn connect(data: &DataDir, url: Option<&str>) -> Result<(Database, IdKey), StoreError> {
    let url = match url {
        Some(url) => url.to_owned(),
        None => {
            let root = data.root();
            std::fs::create_dir_all(root).map_err(|error| StoreError::io("cannot create", root, error))?;
            Database::sqlite_url(&data.database())
        }
    };
    let database = Database::open(&url, PATIENCE).await?;
    let fresh: String = random_bytes()?.iter().map(|byte| format!("{byte:02x}")).collect();
    sqlx::query("INSERT INTO meta (name, value) VALUES ('id_key', $1) ON CONFLICT DO NOTHING")
        .bind(fresh)
        .execute(database.write())
        .await?;
    let ids = IdKey::load(&mut *database.write().acquire().await?).await.map_err(|error| match error {
        sqlx::Error::Decode(error) => StoreError::Row { table: "meta", id: "id_key".into(), reason: error.to_string() },
        error => error.into(),
    })?;
    Ok((database, ids))
}

fn random_bytes() -> Result<[u8; 32], StoreError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Random(error.to_string()))?;
    Ok(bytes)
}

pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Microseconds since 1970.
pub(crate) fn now_us() -> i64 {
    since_1970().as_micros() as i64
}

/// A lock whose holder panicked guards data that is whole: nothing is changed in steps under it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
