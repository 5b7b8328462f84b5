//! What each subject has used today: this process's count in memory, the other servers' as the database last said.
//!
//! Counts are written every half second, and what others wrote is read again when a second has passed: a daily limit is overdrawn by
//! at most what runs at that moment, on all servers, and what they spent in about a second and a half. A process that is killed loses the
//! half second that it had not written.

use crate::clock::now;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidemill_store::{Money, Store, StoreError, Usage, UsageWriter};

/// How often counts are written.
const WRITE_EVERY: Duration = Duration::from_millis(500);
/// How old the other servers' counts may be.
const READ_EVERY: Duration = Duration::from_secs(1);
/// How long a request waits for them.
const READ_PATIENCE: Duration = Duration::from_secs(1);
/// After the database has failed, it is not asked again for this long.
const REST: Duration = Duration::from_secs(2);

/// Adds up.
pub struct Ledger {
    store: Store,
    writer: UsageWriter,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    entries: HashMap<(String, i64), Entry>,
    failed: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    own: Usage,
    written: Usage,
    others: Usage,
    read: Option<Instant>,
}

/// Days since 1970 in universal time.
pub fn today() -> i64 {
    now().div_euclid(86_400_000_000)
}

impl Ledger {
    /// An empty one, which writes under a name of its own.
    pub fn new(store: Store) -> Self {
        let writer = UsageWriter(store.issue_id());
        Self { store, writer, book: Mutex::default() }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // Each change is one assignment: a panic leaves nothing half done.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts.
    pub fn add(&self, subject: &str, day: i64, usage: Usage) {
        let mut book = self.book();
        match book.entries.get_mut(&(subject.to_owned(), day)) {
            Some(entry) => entry.own = entry.own.plus(usage),
            None => {
                book.entries.insert((subject.to_owned(), day), Entry { own: usage, ..Entry::default() });
            }
        }
    }

    /// What has been used, as far as this process knows.
    pub fn used(&self, subject: &str, day: i64) -> Usage {
        self.book().entries.get(&(subject.to_owned(), day)).map_or_else(Usage::default, |entry| entry.own.plus(entry.others))
    }

    /// What has been spent, as far as this process knows.
    pub fn spent(&self, subject: &str, day: i64) -> Money {
        self.used(subject, day).cost
    }

    /// Reads what others have counted, unless that was done within the last second. While the database is away, this process goes
    /// on with what it knows.
    pub async fn refresh(&self, subject: &str, day: i64) {
        {
            let book = self.book();
            let entry = book.entries.get(&(subject.to_owned(), day));
            let fresh = entry.and_then(|entry| entry.read).is_some_and(|read| read.elapsed() < READ_EVERY);
            if fresh || book.failed.is_some_and(|failed| failed.elapsed() < REST) {
                return;
            }
        }
        let asked = Instant::now();
        let read = tokio::time::timeout(READ_PATIENCE, self.store.usage(Some(self.writer), subject, day)).await;
        match read.unwrap_or(Err(StoreError::Away)) {
            Ok(others) => self.learn(subject, day, others, asked),
            Err(error) => {
                tracing::warn!(%error, "cannot read what a key has used; counting on without the other servers");
                self.book().failed = Some(Instant::now());
            }
        }
    }

    fn learn(&self, subject: &str, day: i64, others: Usage, asked: Instant) {
        let mut book = self.book();
        book.failed = None;
        let entry = book.entries.entry((subject.to_owned(), day)).or_default();
        if entry.read.is_none_or(|read| read <= asked) {
            (entry.others, entry.read) = (others, Some(asked));
        }
    }

    /// Writes what is not written yet. What fails is tried again with the next call.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let today = today();
        let unwritten: Vec<(String, i64, Usage)> = {
            let mut book = self.book();
            // Yesterday's stay for a day: a clock that is put back over midnight, or an answer that looked at it a moment before, would
            // begin the day's count anew and write that in the place of all that was counted.
            book.entries.retain(|(_, day), entry| *day >= today - 1 || entry.own != entry.written);
            let dirty = book.entries.iter().filter(|(_, entry)| entry.own != entry.written);
            dirty.map(|((subject, day), entry)| (subject.clone(), *day, entry.own)).collect()
        };
        for (subject, day, own) in unwritten {
            let asked = Instant::now();
            let others = self.store.write_usage(self.writer, &subject, day, own).await?;
            if let Some(entry) = self.book().entries.get_mut(&(subject.clone(), day)) {
                entry.written = own;
            }
            self.learn(&subject, day, others, asked);
        }
        Ok(())
    }

    /// Writes again and again, until the task is dropped.
    pub async fn keep_writing(self: Arc<Self>) {
        let mut every = tokio::time::interval(WRITE_EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            every.tick().await;
            match self.flush().await {
                Ok(()) => failing = false,
                Err(error) if !std::mem::replace(&mut failing, true) => {
                    tracing::error!(%error, "cannot write what keys have used; it is kept in memory and tried again");
                }
                Err(_) => {}
            }
        }
    }
}
