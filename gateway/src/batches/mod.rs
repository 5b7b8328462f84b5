//! Batches: requests in a file, answered when nobody else needs the engine.
//!
//! Every line goes through the same router as any other request, with the rights of the key that made the batch and the lowest
//! priority of all. What was answered is in two files that only grow ([`results`]); a server that was killed looks into them and goes
//! on with the lines that have no row there. Memory is bounded whatever the input's size: lines are read in portions, and only so many
//! run at once.

pub mod input;
pub mod line;
pub mod results;
mod runner;

use crate::batches::runner::Runner;
use crate::clock::now;
use crate::http::App;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidemill_store::{Batches as Rows, Store};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

/// Expired files are looked for this often. Batches that another process wrote down are found then, too.
const SWEEP: Duration = Duration::from_secs(60);
/// At the end, rows that have just been answered get this long to be written.
const LAST_ROWS: Duration = Duration::from_secs(5);

/// Runs the batches of this server. Cloning is cheap.
#[derive(Clone)]
pub struct Batches {
    rows: Rows,
    shared: Arc<Shared>,
}

struct Shared {
    wake: Notify,
    running: Mutex<HashSet<Uuid>>,
    leaving: watch::Sender<bool>,
}

impl Batches {
    /// Over a store. Nothing runs before [`Batches::run`].
    pub fn new(store: &Store) -> Self {
        let (leaving, _) = watch::channel(false);
        let shared = Shared { wake: Notify::new(), running: Mutex::default(), leaving };
        Self { rows: Rows::new(store.database()), shared: Arc::new(shared) }
    }

    /// The rows.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// There is a new one.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
    }

    /// Runs what there is and what comes, until [`Batches::close`]. Files are removed when they expire or are older than `oldest`.
    pub async fn run(self, app: App, oldest: Option<Duration>) {
        let mut leaving = self.shared.leaving.subscribe();
        tokio::select! {
            _ = leaving.wait_for(|leaving| *leaving) => {}
            () = self.keep_running(app, oldest) => {}
        }
    }

    async fn keep_running(&self, app: App, oldest: Option<Duration>) {
        while !app.registry.all_ready() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let runner = Arc::new(Runner::new(self.rows.clone(), app.clone(), self.shared.leaving.subscribe()));
        loop {
            match self.rows.open(app.files.place()).await {
                Ok(open) => open.into_iter().for_each(|id| self.start(&runner, id)),
                Err(error) => tracing::warn!(%error, "cannot look for batches; trying again in a minute"),
            }
            let before = oldest.map_or(i64::MIN, |age| now().saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX)));
            match app.files.remove_expired(now(), before).await {
                Ok(0) => {}
                Ok(removed) => tracing::info!(removed, "files that had expired were removed"),
                Err(error) => tracing::warn!(%error, "expired files could not be removed; trying again in a minute"),
            }
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    fn start(&self, runner: &Arc<Runner>, id: Uuid) {
        if self.running().insert(id) {
            let (batches, runner) = (self.clone(), runner.clone());
            tokio::spawn(async move {
                runner.run(id).await;
                batches.running().remove(&id);
            });
        }
    }

    /// Starts no more lines, and waits until what was answered is written.
    pub async fn close(&self) {
        self.shared.leaving.send_replace(true);
        let written = async {
            while !self.running().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(LAST_ROWS, written).await.is_err() {
            tracing::warn!("some batches were cut off; they go on at the next start");
        }
    }

    fn running(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.shared.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
