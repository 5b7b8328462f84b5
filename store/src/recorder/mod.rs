//! From the request path to the disk.
//!
//! Answers: a bounded queue, one task that writes what has gathered in one transaction; when the queue is full or the database is away,
//! the spill log. Feedback: the same, but the sender waits until its transaction, or its flush of the spill log, is on the disk.
//! A third task brings the spill log into the database when that is back, trying less and less often, at most every 5 seconds.
//!
//! Every record is written under its id, and an id that is there already is left as it is: whatever is written twice (an answer to a
//! commit got lost, a process was killed between a commit and the end of a segment) is there once.
//!
//! Answers in the queue are in memory: a killed process loses those of its last milliseconds. Feedback that was acknowledged is never lost.

mod answers;
mod feedback;
mod replay;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::commit::{self, Trouble};
use crate::error::{Full, StoreError};
use crate::ids::IdKey;
use crate::inferences::size_of;
use crate::journal::frame::frame_answer;
use crate::journal::{Journal, Refused};
use crate::judgements::Acknowledged;
use crate::records::{Feedback, Inference};
use crate::store::{StoreOptions, lock};
use crate::{DataDir, Database, journal, retention};

/// Most bytes of answers in the queue, whatever their number.
const QUEUE_BYTES: usize = 256 << 20;
/// Requests with feedback that wait for the writer; more wait before the queue.
const FEEDBACK_QUEUE: usize = 1024;

/// What the tasks share.
pub(crate) struct Shared {
    database: Database,
    ids: IdKey,
    journal: Arc<Journal>,
    away: AtomicBool,
    /// The replay task has something to do.
    wake: Notify,
    /// One replay at a time.
    replaying: tokio::sync::Mutex<()>,
    queued: AtomicUsize,
    queued_bytes: AtomicUsize,
}

pub(crate) struct Recorder {
    mode: Mode,
    database: Database,
    ids: IdKey,
    data: DataDir,
}

enum Mode {
    Server { shared: Arc<Shared>, answers: mpsc::Sender<answers::Message>, feedback: mpsc::Sender<feedback::Sent>, tasks: Tasks },
    Command,
}

struct Tasks {
    closing: watch::Sender<bool>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Recorder {
    pub(crate) async fn start(database: Database, ids: IdKey, options: &StoreOptions) -> Result<Self, StoreError> {
        let journal = Journal::open(spill_folder(&options.data), options.spill_bytes)?;
        let shared = Arc::new(Shared::new(database.clone(), ids.clone(), journal));
        let (closing, watch) = watch::channel(false);
        let (answers, inbox) = mpsc::channel(options.queue.max(1));
        let (feedback, sent) = mpsc::channel(FEEDBACK_QUEUE);
        let mut handles = vec![
            tokio::spawn(answers::write(shared.clone(), inbox, watch.clone())),
            tokio::spawn(feedback::write(shared.clone(), sent, watch.clone())),
            tokio::spawn(replay::run(shared.clone(), watch.clone())),
        ];
        if options.retention.max_age.is_some() || options.retention.max_bytes.is_some() {
            handles.push(tokio::spawn(retention::run(database.clone(), options.retention, watch)));
        }
        let tasks = Tasks { closing, handles: Mutex::new(handles) };
        Ok(Self { mode: Mode::Server { shared, answers, feedback, tasks }, database, ids, data: options.data.clone() })
    }

    pub(crate) fn direct(database: Database, ids: IdKey, data: DataDir) -> Self {
        Self { mode: Mode::Command, database, ids, data }
    }

    pub(crate) fn record(&self, answer: Inference) -> Result<(), Full> {
        let Mode::Server { shared, answers, .. } = &self.mode else { return Err(Full) };
        let bytes = size_of(&answer);
        let mut answer = Box::new(answer);
        if shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= QUEUE_BYTES {
            let depth = shared.queued.fetch_add(1, Ordering::Relaxed) + 1;
            match answers.try_send(answers::Message::Answer(answer, bytes)) {
                Ok(()) => {
                    metrics::gauge!("tidemill:store_queue_depth").set(depth as f64);
                    return Ok(());
                }
                Err(mpsc::error::TrySendError::Full(message) | mpsc::error::TrySendError::Closed(message)) => {
                    shared.queued.fetch_sub(1, Ordering::Relaxed);
                    let answers::Message::Answer(unsent, _) = message else { return Err(Full) };
                    answer = unsent;
                }
            }
        }
        shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        // Not flushed: like the queue, this does not outlive the machine, and nobody waits for a disk.
        match shared.journal.append(&frame_answer(&answer)) {
            Ok(_) => {
                shared.spilled(1);
                shared.wake.notify_one();
                Ok(())
            }
            Err(refused) => {
                if let Refused::Io(error) = refused {
                    tracing::error!(%error, "an answer could not be written to the spill log");
                }
                metrics::counter!("tidemill:store_dropped_records_total").increment(1);
                Err(Full)
            }
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        let Mode::Server { shared, answers, .. } = &self.mode else { return true };
        // The requests that run now need room as well: half a queue, or some of the log.
        let queue =
            answers.capacity() > answers.max_capacity() / 2 && shared.queued_bytes.load(Ordering::Relaxed) < QUEUE_BYTES / 2;
        let reserve = (shared.journal.limit() / 8).min(64 << 20);
        queue || shared.journal.room() > reserve
    }

    pub(crate) fn away(&self) -> bool {
        match &self.mode {
            Mode::Server { shared, .. } => shared.away.load(Ordering::Relaxed),
            Mode::Command => false,
        }
    }

    pub(crate) async fn add_feedback(&self, feedback: Vec<Feedback>) -> Result<Vec<Acknowledged>, StoreError> {
        match &self.mode {
            Mode::Server { feedback: queue, .. } => {
                let (answer, result) = oneshot::channel();
                queue.send(feedback::Sent { feedback, answer }).await.map_err(|_| StoreError::Closed)?;
                result.await.map_err(|_| StoreError::Closed)?
            }
            Mode::Command => Ok(commit::feedback(&self.database, &self.ids, &feedback.iter().collect::<Vec<_>>()).await?),
        }
    }

    /// Brings everything that waits into the database, or says why that cannot be.
    pub(crate) async fn settle(&self) -> Result<(), StoreError> {
        match &self.mode {
            Mode::Server { shared, .. } => {
                self.flush().await;
                Ok(replay::replay(shared).await?)
            }
            // A server that runs replays its own spill log, and leaves out what has been erased by then.
            Mode::Command => match self.data.lock() {
                Ok(_lock) if spill_folder(&self.data).exists() => {
                    let journal = Journal::open(spill_folder(&self.data), u64::MAX)?;
                    Ok(replay::replay(&Shared::new(self.database.clone(), self.ids.clone(), journal)).await?)
                }
                _ => Ok(()),
            },
        }
    }

    /// Deletes what the spill log kept of damaged segments.
    pub(crate) fn remove_damaged(&self) -> Result<(), StoreError> {
        journal::remove_damaged(&spill_folder(&self.data))
    }

    pub(crate) async fn flush(&self) {
        if let Mode::Server { answers, .. } = &self.mode {
            let (done, wait) = oneshot::channel();
            if answers.send(answers::Message::Flush(done)).await.is_ok() {
                wait.await.ok();
            }
        }
    }

    pub(crate) async fn close(&self) {
        let Mode::Server { tasks, shared, .. } = &self.mode else { return };
        tasks.closing.send_replace(true);
        let handles = std::mem::take(&mut *lock(&tasks.handles));
        for handle in handles {
            handle.await.ok();
        }
        let waiting = shared.journal.bytes();
        if waiting > 0 {
            tracing::warn!(bytes = waiting, "records wait in the spill log; the next start writes them to the database");
        }
    }
}

impl Shared {
    fn new(database: Database, ids: IdKey, journal: Journal) -> Self {
        Self {
            database,
            ids,
            journal: Arc::new(journal),
            away: AtomicBool::new(false),
            wake: Notify::new(),
            replaying: tokio::sync::Mutex::new(()),
            queued: AtomicUsize::new(0),
            queued_bytes: AtomicUsize::new(0),
        }
    }

    fn spilled(&self, records: u64) {
        metrics::counter!("tidemill:store_spilled_records_total").increment(records);
        metrics::gauge!("tidemill:store_spill_bytes").set(self.journal.bytes() as f64);
    }

    fn went_away(&self, why: &str) {
        if !self.away.swap(true, Ordering::Relaxed) {
            tracing::error!(why, "the database is away; records go to the spill log until it is back");
            metrics::gauge!("tidemill:store_database_up").set(0.0);
        }
        self.wake.notify_one();
    }

    fn is_back(&self) {
        if self.away.swap(false, Ordering::Relaxed) {
            tracing::info!("the database is back");
        }
        metrics::gauge!("tidemill:store_database_up").set(1.0);
    }
}

impl From<Trouble> for StoreError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Away(why) => {
                tracing::warn!(why, "the database does not answer");
                Self::Away
            }
            Trouble::Refused(error) => Self::Database(error),
        }
    }
}

fn spill_folder(data: &DataDir) -> std::path::PathBuf {
    data.root().join("spill")
}

fn committed(kind: &'static str, records: usize, took: Duration) {
    metrics::histogram!("tidemill:store_commit_seconds", "kind" => kind).record(took.as_secs_f64());
    metrics::counter!("tidemill:store_written_records_total", "kind" => kind).increment(records as u64);
}

/// The server is shutting down, or the store is gone.
async fn is_closing(closing: &mut watch::Receiver<bool>) {
    closing.wait_for(|closing| *closing).await.ok();
}
