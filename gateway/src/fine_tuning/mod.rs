//! Fine-tuning jobs: a client's files become an adapter that is served under a name of its own.
//!
//! A job lives in a row and in a folder. The row says what is to happen ([`wish`]), and whoever runs it follows; the folder holds the
//! training, which is a process of its own ([`process`]) so that serving keeps its latency. The process says how far it is in a file
//! ([`progress`]), outlives the server, and goes on from its checkpoint when it was killed.

mod device;
mod method;
mod priority;
pub(crate) mod process;
mod progress;
mod rows;
mod runner;
mod served;
mod spec;
#[cfg(test)]
mod stand_in;
mod trainings;
mod turn;
mod wish;

pub use device::TrainingDevice;
pub use method::{Kind, Method};
pub use priority::TrainingPriority;
pub use process::sign_in;
pub use progress::own_names;
pub use served::withdraw;
pub use spec::last_name;
pub(crate) use trainings::escaped;
pub use turn::{take_back, take_turn, turn_file};
pub use wish::Wish;

use crate::fine_tuning::process::Process;
use crate::fine_tuning::runner::{Runner, Task};
use crate::fine_tuning::trainings::Trainings;
use crate::http::App;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidemill_store::{FineTuningDraft, FineTuningJob, FineTuningState as State, FineTunings, Store, StoreError};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};
use uuid::Uuid;

/// Jobs that the command line or another server changed are looked for this often.
const LOOK: Duration = Duration::from_secs(1);
/// Models, the newest, that are looked at when the server starts.
const MODELS: usize = 1000;
/// Graders that are tried out at once. Each holds a thread for as long as its models take.
const GRADINGS: usize = 16;

/// How this server trains.
#[derive(Clone, Debug)]
pub struct FineTuningOptions {
    /// Folder of the jobs' folders.
    pub root: PathBuf,
    /// The program that is started as `PROGRAM train --job FOLDER`.
    pub program: PathBuf,
    /// Jobs that train at once; 0 when this server only takes them.
    pub jobs: usize,
    /// Jobs of one key in which something is still to be done; more are refused.
    pub jobs_per_key: usize,
    /// Threads of each.
    pub threads: usize,
    /// Where each computes.
    pub device: TrainingDevice,
    /// How urgent each is.
    pub priority: TrainingPriority,
    /// The server's own directory.
    pub data: PathBuf,
    /// Where the base models lie, by name.
    pub models: BTreeMap<String, PathBuf>,
}

/// Runs the fine-tuning jobs of this server. Cloning is cheap.
#[derive(Clone)]
pub struct FineTuning {
    rows: FineTunings,
    shared: Arc<Shared>,
}

struct Shared {
    options: FineTuningOptions,
    wake: Notify,
    running: Mutex<HashMap<Uuid, Task>>,
    leaving: watch::Sender<bool>,
    trainings: Trainings,
    gradings: Arc<Semaphore>,
    making: Semaphore,
}

/// Begins the `key_id` of a job that a loop made: what comes of it is a candidate, which the loop puts into service when it may.
pub const OF_LOOP: &str = "loop:";
/// Where such a job's metadata say which snapshot its rows are of.
pub const DATASET: &str = "tidemill_dataset";

/// Whether a loop made the job.
fn is_of_loop(draft: &FineTuningDraft) -> bool {
    draft.key_id.as_ref().is_some_and(|key| key.starts_with(OF_LOOP))
}

/// The folder of a job.
fn folder_of(root: &Path, job: Uuid) -> PathBuf {
    root.join(job.to_string())
}

/// A job's place among those that something is done about.
struct Turn {
    jobs: FineTuning,
    id: Uuid,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.jobs.running().remove(&self.id);
        self.jobs.wake();
    }
}

impl FineTuning {
    /// Over a store. Nothing runs before [`FineTuning::run`].
    pub fn new(store: &Store, options: FineTuningOptions) -> Self {
        let (leaving, _) = watch::channel(false);
        let (running, trainings) = (Mutex::default(), Trainings::default());
        let gradings = Arc::new(Semaphore::new(GRADINGS));
        let making = Semaphore::new(1);
        let shared = Shared { options, wake: Notify::new(), running, leaving, trainings, gradings, making };
        Self { rows: FineTunings::new(store.database()), shared: Arc::new(shared) }
    }

    /// The rows.
    pub fn rows(&self) -> &FineTunings {
        &self.rows
    }

    /// How this server trains.
    pub fn options(&self) -> &FineTuningOptions {
        &self.shared.options
    }

    /// There is something to do.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
    }

    /// Leave to try out a grader, until it is dropped; `None` while as many are tried out as may be.
    pub fn grading(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.shared.gradings).try_acquire_owned().ok()
    }

    /// One's turn to make a job, until it is dropped: how many there are is counted before. `None` never comes, as nobody closes it.
    pub async fn making(&self) -> Option<SemaphorePermit<'_>> {
        self.shared.making.acquire().await.ok()
    }

    /// The trainings under way, as Prometheus reads them.
    pub fn gauges(&self) -> String {
        self.shared.trainings.render()
    }

    /// Whether this server can train the base model of this name.
    pub fn trains(&self, model: &str) -> bool {
        self.shared.options.models.contains_key(model)
    }

    /// Serves what jobs have made, and runs what there is and what comes, until [`FineTuning::close`].
    pub async fn run(self, app: App) {
        let mut leaving = self.shared.leaving.subscribe();
        tokio::select! {
            _ = leaving.wait_for(|leaving| *leaving) => {}
            () = self.keep_running(app) => {}
        }
    }

    async fn keep_running(&self, app: App) {
        while !app.registry.all_ready() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let options = &self.shared.options;
        let place = app.files.place().to_owned();
        loop {
            match self.rows.served(&place, MODELS).await {
                Ok(jobs) => break served::publish_older(&app, &jobs, &options.root).await,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for fine-tuned models; trying again in a moment");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
        let (leaving, trainings) = (self.shared.leaving.subscribe(), self.shared.trainings.clone());
        let runner = Arc::new(Runner::new(self.rows.clone(), app, options.clone(), trainings, leaving));
        while let Err(error) = self.end_strays(&runner).await {
            tracing::warn!(%error, "cannot look for trainings that nobody wants any more; trying again in a moment");
            tokio::time::sleep(LOOK).await;
        }
        let mut known: HashSet<Uuid> = HashSet::new();
        loop {
            match self.rows.open(&place).await {
                Err(error) => tracing::warn!(%error, "cannot look for fine-tuning jobs; trying again in a moment"),
                Ok(mut open) => {
                    let now: HashSet<Uuid> = open.iter().map(|job| job.draft.id).collect();
                    for ended in known.difference(&now) {
                        self.start(&runner, *ended, Task::End);
                    }
                    known = now;
                    for job in open.iter().filter(|job| job.state == State::ValidatingFiles) {
                        self.start(&runner, job.draft.id, Task::LookThrough);
                    }
                    // Of those that wait the oldest goes first, also when its files take longer to look through than a younger one's.
                    let unread = open.iter().filter(|job| job.state == State::ValidatingFiles).map(|job| job.draft.id).min();
                    let waits = |job: &FineTuningJob| unread.is_some_and(|unread| unread < job.draft.id);
                    // What has begun goes before all others: after a restart, it goes on. One that waits for its card is queued and at work.
                    let begun = |job: &FineTuningJob| {
                        let at_work = || matches!(Process::left(&folder_of(&options.root, job.draft.id)), Ok(Some(_)));
                        job.state == State::Running || (job.state == State::Queued && at_work())
                    };
                    open.retain(|job| begun(job) || (job.state == State::Queued && !waits(job)));
                    open.sort_by_cached_key(|job| (!begun(job), job.draft.id));
                    for job in open {
                        if self.training() < options.jobs {
                            self.start(&runner, job.draft.id, Task::Train);
                        }
                    }
                }
            }
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn start(&self, runner: &Arc<Runner>, id: Uuid, task: Task) {
        if let Entry::Vacant(free) = self.running().entry(id) {
            free.insert(task);
            let (jobs, runner) = (self.clone(), runner.clone());
            tokio::spawn(async move {
                // However it ends.
                let _turn = Turn { jobs, id };
                runner.run(id, task).await;
            });
        }
    }

    /// Trainings under way, those that are about to stop among them.
    fn training(&self) -> usize {
        self.running().values().filter(|task| **task != Task::LookThrough).count()
    }

    /// Ends the processes of jobs that were cancelled or paused while no server was there, and removes what the cancelled ones left.
    async fn end_strays(&self, runner: &Arc<Runner>) -> Result<(), StoreError> {
        let Ok(folders) = std::fs::read_dir(&self.shared.options.root) else { return Ok(()) };
        for folder in folders.flatten().map(|entry| entry.path()) {
            let id = folder.file_name().and_then(|name| Uuid::try_parse(name.to_str()?).ok());
            let Some(id) = id else { continue };
            let unwanted = match self.rows.state(id).await? {
                // Another database's, of a server that was started with it.
                None | Some(State::Queued | State::Running) => false,
                Some(State::Cancelled) => true,
                Some(_) => matches!(Process::left(&folder), Ok(Some(_))),
            };
            if unwanted {
                self.start(runner, id, Task::End);
            }
        }
        Ok(())
    }

    /// Tells the trainings to keep a checkpoint and stop, and waits until they have. They go on at the next start.
    pub async fn close(&self) {
        self.shared.leaving.send_replace(true);
        while !self.running().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<Uuid, Task>> {
        self.shared.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
