//! Builds in the background.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tidemill_rlhf::dataset::{DatasetError, Datasets, Query, Stage, Watch};
use tidemill_rlhf::quality::QualityOptions;
use tidemill_store::{Actor, Job, JobState, Jobs, Store, StoreError};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::clock::now;

/// Builds that run or wait; more are refused.
const MAX_BUILDS: usize = 8;
/// A running build writes down where it is this often. A job that is silent for a minute counts as lost.
const REPORT: Duration = Duration::from_secs(1);

/// Builds datasets, one at a time. Cloning is cheap.
#[derive(Clone)]
pub struct DatasetJobs {
    store: Store,
    datasets: Datasets,
    turn: Arc<Semaphore>,
    running: Running,
    closed: Arc<AtomicBool>,
}

type Running = Arc<Mutex<HashMap<Uuid, Arc<Watch>>>>;

/// A build's place among those that run or wait; free again when it is dropped, which also happens when whoever asked leaves before
/// the build has begun.
struct Place {
    id: Uuid,
    running: Running,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.id);
    }
}

fn lock(running: &Running) -> MutexGuard<'_, HashMap<Uuid, Arc<Watch>>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A build that was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Enough of them run or wait.
    #[error("{MAX_BUILDS} dataset builds run or wait already; try again when one has ended")]
    Full,
    /// On the way out.
    #[error("the server is shutting down; send the request again")]
    Closing,
    /// The job cannot be written down.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl DatasetJobs {
    /// Over a store, with tables under `root`, a path or URL.
    pub fn new(store: Store, root: &str) -> Self {
        let datasets = Datasets::new(store.clone(), root);
        Self { store, datasets, turn: Arc::new(Semaphore::new(1)), running: Arc::default(), closed: Arc::default() }
    }

    /// The snapshots.
    pub fn datasets(&self) -> &Datasets {
        &self.datasets
    }

    /// Takes a build that somebody wants, and returns its job.
    pub async fn start(&self, name: String, query: Query, options: QualityOptions, by: Actor) -> Result<Job, Refused> {
        let id = self.store.issue_id();
        let watch = Arc::new(Watch::default());
        let place = {
            let mut running = lock(&self.running);
            if self.closed.load(Ordering::Acquire) {
                return Err(Refused::Closing);
            }
            if running.len() >= MAX_BUILDS {
                return Err(Refused::Full);
            }
            running.insert(id, watch.clone());
            Place { id, running: self.running.clone() }
        };
        let jobs = Jobs::new(self.store.database());
        let spec = json!({ "name": name, "query": query });
        let act = self.store.act(&by, "dataset.build").to(&name).with(json!({ "job": id }));
        jobs.insert(id, "dataset.build", &spec, act).await?;
        let job = jobs.find(id, now()).await?.ok_or(StoreError::Closed)?;
        let datasets = self.datasets.acting_as(by);
        tokio::spawn(self.clone().run(place, datasets, name, query, options, watch));
        Ok(job)
    }

    async fn run(self, place: Place, datasets: Datasets, name: String, query: Query, options: QualityOptions, watch: Arc<Watch>) {
        let id = place.id;
        let jobs = Jobs::new(self.store.database());
        let work = {
            let (turn, watch) = (self.turn.clone(), watch.clone());
            // Sorting, checking and compressing rows would hold up the threads that move bytes.
            tokio::task::spawn_blocking(move || {
                tokio::runtime::Handle::current().block_on(async {
                    let _turn = turn.acquire().await;
                    watch.go_on()?;
                    datasets.build(&name, &query, &options, &watch).await
                })
            })
        };
        tokio::pin!(work);
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                () = tokio::time::sleep(REPORT) => {
                    let progress = watch.progress();
                    let state = if progress.stage == Stage::Waiting { JobState::Queued } else { JobState::Running };
                    // A report that is missed is followed by another.
                    if let Err(error) = jobs.update(id, state, &json!(progress), None, now()).await {
                        tracing::warn!(%id, %error, "cannot write down how far a dataset is");
                    }
                }
            }
        };
        let (state, progress, error) = match done {
            Ok(Ok(snapshot)) => {
                let made = format!("{}@{}", snapshot.name, snapshot.version);
                tracing::info!(%id, dataset = made, verdict = snapshot.verdict, "dataset built");
                (JobState::Succeeded, json!({ "dataset": made, "verdict": snapshot.verdict }), None)
            }
            Ok(Err(DatasetError::Interrupted)) => (JobState::Cancelled, Value::Object(Default::default()), None),
            Ok(Err(error)) => {
                tracing::warn!(%id, %error, "dataset not built");
                (JobState::Failed, json!(watch.progress()), Some(public(&error)))
            }
            Err(error) => {
                tracing::error!(%id, %error, "a dataset build broke off");
                (JobState::Failed, json!(watch.progress()), Some("an internal error, which the server's log shows".to_owned()))
            }
        };
        if let Err(error) = jobs.update(id, state, &progress, error.as_deref(), now()).await {
            tracing::error!(%id, %error, "cannot write down how a dataset build ended");
        }
    }

    /// The job of this id.
    pub async fn find(&self, id: Uuid) -> Result<Option<Job>, StoreError> {
        Jobs::new(self.store.database()).find(id, now()).await
    }

    /// Asks a build of this server to stop; whether there is one.
    pub fn cancel(&self, id: Uuid) -> bool {
        lock(&self.running).get(&id).map(|watch| watch.stop()).is_some()
    }

    /// Takes no more, stops those that run, and waits until they have said so.
    pub async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        lock(&self.running).values().for_each(|watch| watch.stop());
        while !lock(&self.running).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What a client may read: faults of the database and the storage are for the log.
pub fn public(error: &DatasetError) -> String {
    match error {
        DatasetError::Store(_) => "the database failed; the server's log says how".to_owned(),
        DatasetError::Delta(_) => "the datasets' storage failed; the server's log says how".to_owned(),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_store::{DataDir, StoreOptions};

    #[tokio::test]
    async fn who_leaves_before_a_build_has_begun_leaves_no_place_taken() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(StoreOptions::new(DataDir::new(folder.path()))).await.unwrap();
        let jobs = DatasetJobs::new(store.clone(), &folder.path().to_string_lossy());
        // The job cannot be written down while this connection is out.
        let held = store.database().write().acquire().await.unwrap();
        for _ in 0..=MAX_BUILDS {
            let start = jobs.start("d".into(), Query::default(), QualityOptions::default(), "server".into());
            assert!(tokio::time::timeout(Duration::from_millis(20), start).await.is_err(), "it waits for the database");
        }
        drop(held);
        tokio::time::timeout(Duration::from_secs(60), jobs.close()).await.unwrap();
        store.close().await;
    }
}
