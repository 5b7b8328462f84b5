//! The spill log: where records wait, on disk, for a database that is away or slow.
//!
//! Segments `spill/0000000000000001.log` are only appended to and deleted as a whole, when all of their records are in the database.
//! A process that is killed between those two writes the records again; the database ignores ids that it has.

pub(crate) mod frame;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::StoreError;
use crate::store::lock;
use frame::Contents;

/// A segment longer than this is followed by a new one.
const SEGMENT: u64 = 8 << 20;
/// How long a disk that refused a write counts as full: whoever asks for room in the meantime is told that there is none.
const REFUSAL: Duration = Duration::from_secs(5);

pub(crate) struct Journal {
    folder: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

struct State {
    active: Option<Active>,
    /// Lengths of the segments that nothing is appended to any more.
    sealed: BTreeMap<u64, u64>,
    bytes: u64,
    next: u64,
    /// When the disk last refused a write and none has succeeded since.
    refused: Option<Instant>,
}

struct Active {
    number: u64,
    segment: Arc<Segment>,
    bytes: u64,
}

/// A file that frames are appended to.
pub(crate) struct Segment {
    file: File,
    /// Held during a flush.
    flushing: Mutex<()>,
    broken: AtomicBool,
}

impl Segment {
    fn new(file: File) -> Self {
        Self { file, flushing: Mutex::default(), broken: AtomicBool::new(false) }
    }

    /// Brings what was appended to the disk. After a failure every later flush of this segment fails too: the system tells one caller
    /// that pages were lost and then calls them clean, so the next one would hear that all is well.
    pub(crate) fn sync(&self) -> std::io::Result<()> {
        let _one_at_a_time = lock(&self.flushing);
        if self.broken.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("an earlier flush of the same file failed"));
        }
        self.file.sync_data().inspect_err(|_| self.broken.store(true, Ordering::Relaxed))
    }
}

/// Why records were not taken.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The limit is reached, or the disk is full.
    Full,
    /// The disk failed.
    Io(StoreError),
}

impl Journal {
    /// Opens the folder; what an earlier process left there is waiting.
    pub(crate) fn open(folder: PathBuf, limit: u64) -> Result<Self, StoreError> {
        let create = || -> std::io::Result<()> {
            fs::create_dir_all(&folder)?;
            // The folder's own name has to survive the machine, like those of the segments.
            folder.parent().filter(|parent| *parent != Path::new("")).map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        };
        create().map_err(|error| StoreError::io("cannot create", &folder, error))?;
        let (mut sealed, mut last) = (BTreeMap::new(), 0);
        let entries = fs::read_dir(&folder).map_err(|error| StoreError::io("cannot list", &folder, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| StoreError::io("cannot list", &folder, error))?;
            let length = entry.metadata().map_err(|error| StoreError::io("cannot read", &entry.path(), error))?.len();
            let name = entry.file_name();
            let Some((digits, kind)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
            let Ok(number) = u64::from_str_radix(digits, 16) else { continue };
            last = last.max(number);
            if kind == "log" {
                sealed.insert(number, length);
            }
        }
        let bytes = sealed.values().sum();
        let next = last + 1;
        Ok(Self { folder, limit, state: Mutex::new(State { active: None, sealed, bytes, next, refused: None }) })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:016x}.log"))
    }

    /// Appends frames, all or none. The bytes are with the operating system: they survive the process, and the machine after
    /// `sync` of the segment that is returned.
    pub(crate) fn append(&self, frames: &[u8]) -> Result<Arc<Segment>, Refused> {
        let state = &mut *lock(&self.state);
        if state.bytes + frames.len() as u64 > self.limit {
            return Err(Refused::Full);
        }
        let written = self.write(state, frames);
        state.refused = written.is_err().then(Instant::now);
        written.map_err(|error| match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Refused::Full,
            _ => Refused::Io(StoreError::io("cannot write to the spill log in", &self.folder, error)),
        })
    }

    fn write(&self, state: &mut State, frames: &[u8]) -> std::io::Result<Arc<Segment>> {
        let length = frames.len() as u64;
        if state.active.as_ref().is_some_and(|active| active.bytes >= SEGMENT || active.segment.broken.load(Ordering::Relaxed)) {
            state.seal();
        }
        let active = match &mut state.active {
            Some(active) => active,
            none => none.insert(self.create(&mut state.next)?),
        };
        if let Err(error) = (&active.segment.file).write_all(frames) {
            // Half a frame must not stand before whole ones. Reading would step over it, but would call it damage.
            if active.segment.file.set_len(active.bytes).is_err() {
                state.bytes += length;
                active.bytes += length;
                state.seal();
            }
            return Err(error);
        }
        active.bytes += length;
        state.bytes += length;
        Ok(active.segment.clone())
    }

    fn create(&self, next: &mut u64) -> std::io::Result<Active> {
        let number = *next;
        // Used up even if this fails: a name that cannot be had must not be tried for ever.
        *next += 1;
        let path = self.path(number);
        let file = OpenOptions::new().create_new(true).append(true).open(&path)?;
        // The name has to survive the machine, too.
        if let Err(error) = File::open(&self.folder).and_then(|folder| folder.sync_all()) {
            fs::remove_file(path).ok();
            return Err(error);
        }
        Ok(Active { number, segment: Arc::new(Segment::new(file)), bytes: 0 })
    }

    /// The oldest segment that has to be replayed; from now on nothing is appended to it.
    pub(crate) fn oldest(&self) -> Option<u64> {
        let state = &mut *lock(&self.state);
        if state.sealed.is_empty() {
            state.seal();
        }
        state.sealed.keys().next().copied()
    }

    /// What a segment holds.
    pub(crate) fn read(&self, number: u64) -> Result<Contents, StoreError> {
        let path = self.path(number);
        let bytes = fs::read(&path).map_err(|error| StoreError::io("cannot read", &path, error))?;
        Ok(frame::read(&bytes))
    }

    /// Forgets a segment whose records are in the database. One with damage is kept under another name, for people.
    pub(crate) fn remove(&self, number: u64, damaged: bool) -> Result<(), StoreError> {
        let path = self.path(number);
        let gone = if damaged { fs::rename(&path, path.with_extension("damaged")) } else { fs::remove_file(&path) };
        gone.map_err(|error| StoreError::io("cannot remove", &path, error))?;
        let state = &mut *lock(&self.state);
        state.bytes -= state.sealed.remove(&number).unwrap_or(0);
        Ok(())
    }

    /// Bytes that wait.
    pub(crate) fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// Bytes that still fit; none while the disk refuses.
    pub(crate) fn room(&self) -> u64 {
        let state = lock(&self.state);
        let refuses = state.refused.is_some_and(|at| at.elapsed() < REFUSAL);
        if refuses { 0 } else { self.limit.saturating_sub(state.bytes) }
    }

    /// Nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        let state = lock(&self.state);
        state.active.is_none() && state.sealed.is_empty()
    }

    /// The most that it may hold.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }
}

impl State {
    fn seal(&mut self) {
        if let Some(active) = self.active.take() {
            self.sealed.insert(active.number, active.bytes);
        }
    }
}

/// Deletes the damaged segments of a spill folder: whom the bytes in them are about, nobody can say.
pub(crate) fn remove_damaged(folder: &Path) -> Result<(), StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StoreError::io("cannot list", folder, error)),
    };
    for entry in entries {
        let path = entry.map_err(|error| StoreError::io("cannot list", folder, error))?.path();
        if path.extension().is_some_and(|kind| kind == "damaged") {
            fs::remove_file(&path).map_err(|error| StoreError::io("cannot remove", &path, error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
