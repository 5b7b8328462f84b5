//! Files that clients upload and batches make: a row in the database, the content in the data directory.
//!
//! A content is written beside its place, flushed and renamed before its row is written, so a row always has its content. Contents
//! without a row (a process that was killed between the two) are removed at the next start. Servers that share a database do not
//! share data directories: a row says in which one its content lies. A data directory that was used with another database before
//! has the contents of each in a folder of its own, so that neither takes the other's for leftovers.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use crate::audit::Act;
use crate::batches::OPEN;
use crate::data_dir::write_atomically;
use crate::error::StoreError;
use crate::page::{Order, Page};
use crate::patience::{at_length, patiently};
use crate::statement::{Select, clean};
use crate::{DataDir, Database, Store};

const COLUMNS: &str = "id, created, key_id, filename, purpose, bytes, expires, place";
/// Ending of a content that is still being sent.
const PART: &str = "part";
/// The file beside the contents with the data directory's own name.
const PLACE: &str = "place";
/// Rows that one look for expired files takes.
const SWEEP: i64 = 200;
/// A file that a batch or a fine-tuning job still reads must stay.
const UNUSED: &str = "NOT EXISTS (SELECT 1 FROM batches WHERE batches.input_file = files.id \
                      AND batches.state IN ('validating','in_progress','finalizing','cancelling')) \
                      AND NOT EXISTS (SELECT 1 FROM fine_tuning_jobs WHERE files.id IN (training_file, validation_file) \
                      AND fine_tuning_jobs.state = 'validating_files')";

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRecord {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// The key that it belongs to; `None` when the server had none.
    pub key_id: Option<String>,
    /// As the client called it.
    pub filename: String,
    /// What it is for, such as `batch`.
    pub purpose: String,
    /// Length.
    pub bytes: u64,
    /// When it is removed, in microseconds since 1970.
    pub expires: Option<i64>,
    /// The data directory that has its content.
    pub place: String,
}

/// What is known of a file beside its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDraft {
    /// The key that it will belong to.
    pub key_id: Option<String>,
    /// As the client calls it.
    pub filename: String,
    /// What it is for.
    pub purpose: String,
    /// When it is removed, in microseconds since 1970.
    pub expires: Option<i64>,
}

/// Who looks: files and batches of others are not there for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Viewer {
    /// Sees everything.
    Anyone,
    /// Sees what belongs to the key of this id.
    Key(String),
}

impl Viewer {
    pub(crate) fn key_id(&self) -> Option<&str> {
        match self {
            Self::Anyone => None,
            Self::Key(id) => Some(id),
        }
    }

    /// Whether what belongs to `key_id` is there for them.
    pub fn sees(&self, key_id: Option<&str>) -> bool {
        self.key_id().is_none_or(|own| key_id == Some(own))
    }
}

/// The files of a data directory. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Files {
    database: Database,
    folder: PathBuf,
    place: String,
}

/// A content that is being sent. Dropped before [`Incoming::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Incoming {
    files: Files,
    id: Uuid,
    part: PathBuf,
    file: File,
    bytes: u64,
    kept: bool,
}

impl Files {
    /// Those in `data` that belong to `store`'s database; the caller holds the lock. What a killed process left half-done is removed.
    pub async fn open(store: &Store, data: &DataDir) -> Result<Self, StoreError> {
        let (all, folder) = (data.root().join("files"), folder_in(data, store));
        std::fs::create_dir_all(&folder).map_err(|error| StoreError::io("cannot create", &folder, error))?;
        for named_in in [&all, data.root()] {
            sync_folder(named_in).await.map_err(|error| StoreError::io("cannot flush", named_in, error))?;
        }
        let name = folder.join(PLACE);
        let place = match std::fs::read_to_string(&name) {
            Ok(text) => text.trim().to_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let place = Uuid::now_v7().to_string();
                write_atomically(&name, place.as_bytes())?;
                place
            }
            Err(error) => return Err(StoreError::io("cannot read", &name, error)),
        };
        let files = Self { database: store.database().clone(), folder, place };
        files.remove_strays().await?;
        Ok(files)
    }

    /// The data directory's own name.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The name of a data directory that a server on this database has owned, for commands beside it.
    pub fn place_of(store: &Store, data: &DataDir) -> Option<String> {
        let text = std::fs::read_to_string(folder_in(data, store).join(PLACE)).ok()?;
        Some(text.trim().to_owned())
    }

    /// Where the content of a file lies, in this data directory.
    pub fn path(&self, id: Uuid) -> PathBuf {
        self.folder.join(id.to_string())
    }

    /// Begins a file.
    pub async fn receive(&self, id: Uuid) -> Result<Incoming, StoreError> {
        let part = self.path(id).with_extension(PART);
        let file = File::create_new(&part).await.map_err(|error| StoreError::io("cannot create", &part, error))?;
        Ok(Incoming { files: self.clone(), id, part, file, bytes: 0, kept: false })
    }

    /// The file of this id, if it is there for `viewer` at `now`.
    pub async fn find(&self, id: Uuid, viewer: &Viewer, now: i64) -> Result<Option<FileRecord>, StoreError> {
        patiently(async {
            let text = format!("SELECT {COLUMNS} FROM files WHERE id = $1 AND (expires IS NULL OR expires > $2)");
            let query = sqlx::query(AssertSqlSafe(text)).bind(id.to_string()).bind(now);
            let found = query.fetch_optional(self.database.read()).await?.as_ref().map(read).transpose()?;
            Ok(found.filter(|file| viewer.sees(file.key_id.as_deref())))
        })
        .await
    }

    /// A page of the files that are there for `viewer` at `now`.
    pub async fn list(
        &self,
        viewer: &Viewer,
        purpose: Option<&str>,
        after: Option<Uuid>,
        limit: usize,
        order: Order,
        now: i64,
    ) -> Result<Page<FileRecord>, StoreError> {
        at_length(async {
            let mut select = Select::new(&format!("SELECT {COLUMNS} FROM files"));
            select.text_option("key_id = ?", viewer.key_id());
            select.text_option("purpose = ?", purpose);
            select.text_option(&order.after("id"), after.map(|id| id.to_string()).as_deref());
            select.integer("(expires IS NULL OR expires > ?)", Some(now));
            select.end(&format!(" ORDER BY id {} LIMIT {}", order.sql(), limit + 1));
            let rows = select.query().fetch_all(self.database.read()).await?;
            Ok(Page::of(rows.iter().map(read).collect::<Result<_, _>>()?, limit))
        })
        .await
    }

    /// Removes a file, as somebody wants; `false` when a batch or a fine-tuning job still reads it.
    pub async fn delete(&self, file: &FileRecord, act: Act) -> Result<bool, StoreError> {
        let deleted = patiently(async {
            let mut transaction = self.database.write().begin().await?;
            let text = format!("DELETE FROM files WHERE id = $1 AND {UNUSED}");
            let query = sqlx::query(AssertSqlSafe(text)).bind(file.id.to_string());
            if query.execute(&mut *transaction).await?.rows_affected() == 0 {
                return Ok(false);
            }
            act.write(&mut transaction).await?;
            transaction.commit().await?;
            Ok::<_, StoreError>(true)
        })
        .await?;
        if deleted {
            self.forget(&file.place, file.id).await;
        }
        Ok(deleted)
    }

    /// Bytes of all contents in this data directory.
    pub async fn used(&self) -> Result<u64, StoreError> {
        at_length(async {
            let text = "SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM files WHERE place = $1";
            let (used,): (i64,) = sqlx::query_as(text).bind(self.place.clone()).fetch_one(self.database.read()).await?;
            Ok(used.unsigned_abs())
        })
        .await
    }

    /// Removes the files of this data directory that have expired at `now` or were made before `oldest`, except those that a batch
    /// still reads, and says how many.
    pub async fn remove_expired(&self, now: i64, oldest: i64) -> Result<usize, StoreError> {
        let mut removed = 0;
        loop {
            let text = format!(
                "DELETE FROM files WHERE id IN (SELECT id FROM files WHERE place = $1 AND (expires <= $2 OR created < $3) \
                 AND {UNUSED} LIMIT {SWEEP}) RETURNING id"
            );
            let query = sqlx::query(AssertSqlSafe(text)).bind(self.place.clone()).bind(now).bind(oldest);
            let rows = at_length(async { Ok::<_, StoreError>(query.fetch_all(self.database.write()).await?) }).await?;
            for row in &rows {
                let id: String = row.try_get(0)?;
                if let Ok(id) = Uuid::try_parse(&id) {
                    self.forget(&self.place, id).await;
                }
            }
            removed += rows.len();
            if (rows.len() as i64) < SWEEP {
                return Ok(removed);
            }
        }
    }

    /// Removes a content whose row is gone. One that stays is a stray, which the next start removes.
    async fn forget(&self, place: &str, id: Uuid) {
        if place != self.place {
            return;
        }
        let path = self.path(id);
        if let Err(error) = fs::remove_file(&path).await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a deleted file's content could not be removed; the next start tries again");
        }
    }

    /// Contents that no row and no running batch names.
    async fn remove_strays(&self) -> Result<(), StoreError> {
        let open = format!("FROM batches WHERE place = $1 AND state IN {OPEN}");
        let text =
            format!("SELECT id FROM files WHERE place = $1 UNION SELECT output_file {open} UNION SELECT error_file {open}");
        let query = sqlx::query(AssertSqlSafe(text)).bind(self.place.clone());
        let rows = at_length(async { Ok::<_, StoreError>(query.fetch_all(self.database.read()).await?) }).await?;
        let known: HashSet<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let failed = |error| StoreError::io("cannot list", &self.folder, error);
        for entry in std::fs::read_dir(&self.folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let ours = Uuid::try_parse(stem).is_ok();
            let half = path.extension().is_some_and(|extension| extension == PART);
            if ours && (half || !known.contains(stem)) {
                std::fs::remove_file(&path).map_err(|error| StoreError::io("cannot remove", &path, error))?;
            }
        }
        Ok(())
    }
}

impl Incoming {
    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends.
    pub async fn write(&mut self, data: &[u8]) -> Result<(), StoreError> {
        self.bytes += data.len() as u64;
        self.file.write_all(data).await.map_err(|error| StoreError::io("cannot write", &self.part, error))
    }

    /// The content is whole: it is flushed, put in its place and gets its row.
    pub async fn finish(mut self, draft: FileDraft, now: i64) -> Result<FileRecord, StoreError> {
        let path = self.files.path(self.id);
        let place = async {
            self.file.flush().await?;
            self.file.sync_all().await?;
            fs::rename(&self.part, &path).await?;
            sync_folder(&self.files.folder).await
        };
        place.await.map_err(|error| StoreError::io("cannot write", &path, error))?;
        self.kept = true;
        let FileDraft { key_id, filename, purpose, expires } = draft;
        let place = self.files.place.clone();
        let file = FileRecord { id: self.id, created: now, key_id, filename, purpose, bytes: self.bytes, expires, place };
        let database = &self.files.database;
        let written = patiently(async { insert(&mut *database.write().acquire().await?, &file).await }).await;
        if let Err(error) = written {
            // The row may have arrived all the same. Only when it is surely gone may the content go, too; otherwise the next start sees.
            let gone = sqlx::query("DELETE FROM files WHERE id = $1").bind(file.id.to_string());
            if patiently(async { Ok::<_, StoreError>(gone.execute(database.write()).await?) }).await.is_ok() {
                self.files.forget(&file.place, file.id).await;
            }
            return Err(error);
        }
        Ok(file)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.kept {
            // What stays is removed at the next start.
            std::fs::remove_file(&self.part).ok();
        }
    }
}

/// Where the contents of this database's files lie.
fn folder_in(data: &DataDir, store: &Store) -> PathBuf {
    data.root().join("files").join(store.ids().pseudonym("files"))
}

/// Makes a rename in `folder` outlive a loss of power.
async fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder).await?.sync_all().await
}

pub(crate) async fn insert(sql: &mut AnyConnection, file: &FileRecord) -> Result<(), StoreError> {
    let text = format!("INSERT INTO files ({COLUMNS}) VALUES ($1,$2,$3,$4,$5,$6,$7,$8) ON CONFLICT DO NOTHING");
    sqlx::query(AssertSqlSafe(text))
        .bind(file.id.to_string())
        .bind(file.created)
        .bind(file.key_id.clone())
        .bind(clean(&file.filename).into_owned())
        .bind(file.purpose.clone())
        .bind(file.bytes.cast_signed())
        .bind(file.expires)
        .bind(file.place.clone())
        .execute(sql)
        .await?;
    Ok(())
}

fn read(row: &AnyRow) -> Result<FileRecord, StoreError> {
    let id: String = row.try_get("id")?;
    let bad = || StoreError::Row { table: "file", id: id.clone(), reason: "its id is no UUID".to_owned() };
    Ok(FileRecord {
        id: Uuid::try_parse(&id).map_err(|_| bad())?,
        created: row.try_get("created")?,
        key_id: row.try_get("key_id")?,
        filename: row.try_get("filename")?,
        purpose: row.try_get("purpose")?,
        bytes: row.try_get::<i64, _>("bytes")?.unsigned_abs(),
        expires: row.try_get("expires")?,
        place: row.try_get("place")?,
    })
}
