//! Loops at work: what `[loop.NAME]` says is done, from feedback to a promoted adapter.
//!
//! The machine is [`tidemill_rlhf::flywheel`], which knows no time, store or process. Here is what it is told ([`sight`]) and what is done
//! for it ([`hands`], [`evaluation`]): a snapshot by the dataset builder, a training by the queue of fine-tuning jobs, an evaluation in a
//! process of its own, a rollout by the keeper. Where a loop stands is a row; so a server that is killed anywhere is followed by one that
//! looks, sees what is done, and goes on. Of several servers on one database one runs the loops.

mod evaluation;
mod gauges;
mod hands;
mod policy;
mod sight;
mod view;
mod wish;

pub(crate) use hands::named_by_rollouts;
#[cfg(test)]
pub(crate) use policy::tests;
pub use policy::{planned as planned_rollout, read as read_policy};
pub use view::standing;
pub use wish::{WishRefusal, follow};

use crate::clock::now;
use crate::fine_tuning::{TrainingDevice, TrainingPriority};
use crate::flywheel::evaluation::Evaluations;
use crate::flywheel::gauges::Gauges;
use crate::http::App;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidemill_rlhf::dataset::DatasetError;
use tidemill_rlhf::flywheel::{Flywheel, Note, Policy, Step, Word, step};
use tidemill_rlhf::registry::RegistryError;
use tidemill_store::{Actor, Leadership, LoopChange, LoopRefusal, LoopRow, Loops, RolloutRefusal, Store, StoreError};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

/// Loops are looked at this often.
const LOOK: Duration = Duration::from_secs(1);
/// States that one look may take a loop through.
const STRIDE: usize = 16;

/// How this server runs loops.
#[derive(Clone, Debug)]
pub struct FlywheelOptions {
    /// What is to be done, by the loop's name.
    pub policies: BTreeMap<String, Policy>,
    /// Folder of the evaluations' folders.
    pub root: PathBuf,
    /// The program that is started as `PROGRAM eval …`.
    pub program: PathBuf,
    /// Threads of an evaluation.
    pub threads: usize,
    /// Where it computes.
    pub device: TrainingDevice,
    /// How urgent it is.
    pub priority: TrainingPriority,
    /// Where the base models lie, by name.
    pub models: BTreeMap<String, PathBuf>,
    /// The server's own directory.
    pub data: PathBuf,
    /// A Postgres URL; `None` is SQLite in the data directory.
    pub database: Option<String>,
    /// Folder or URL of the datasets' tables.
    pub datasets: String,
}

/// Runs the loops of this server. Cloning is cheap.
#[derive(Clone)]
pub struct Flywheels {
    rows: Loops,
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    options: FlywheelOptions,
    wake: Notify,
    leaving: watch::Sender<bool>,
    /// Builds of snapshots under way, by loop: the cycle and the job. They end with this process.
    builds: Mutex<HashMap<String, (u64, Uuid)>>,
    evaluations: Evaluations,
    gauges: Gauges,
    /// Why a loop stands still at this moment, where a fault of ours is in its way.
    problems: Mutex<BTreeMap<String, String>>,
}

/// A fault that passes: the loop goes on later.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("the disk: {0}")]
    Disk(#[from] std::io::Error),
    #[error("the database: {0}")]
    Store(#[from] StoreError),
    #[error("its dataset: {0}")]
    Dataset(#[from] DatasetError),
    #[error("its adapter: {0}")]
    Registry(#[from] RegistryError),
    #[error("its rollout: {0}")]
    Rollout(#[from] RolloutRefusal),
    #[error("the server is busy: {0}")]
    Busy(String),
}

/// What the audit calls a loop.
pub(crate) fn actor(name: &str) -> String {
    format!("{}{name}", crate::fine_tuning::OF_LOOP)
}

/// What a cycle's rollout is called, and the name under which its adapter is served.
pub(crate) fn candidate(name: &str, cycle: u64) -> String {
    format!("loop-{name}-{cycle}")
}

/// Where a row says that its loop stands.
pub(crate) fn standing_of(row: &LoopRow) -> Result<Flywheel, StoreError> {
    let bad = |error: serde_json::Error| StoreError::Row { table: "loops", id: row.name.clone(), reason: error.to_string() };
    serde_json::from_value(row.body.clone()).map_err(bad)
}

/// The next row of a loop.
fn change(next: &Flywheel, note: &Note, actor: Actor) -> LoopChange {
    LoopChange {
        at: note.at,
        cycle: next.cycle,
        state: next.state.word().as_str().to_owned(),
        body: json!(next),
        action: note.action.clone(),
        actor,
        step: json!(note),
    }
}

/// The row of a loop, made where it was not there.
async fn row_of(rows: &Loops, name: &str, now: i64) -> Result<LoopRow, StoreError> {
    let new = Flywheel::new(now);
    rows.open(name, new.state.word().as_str(), &json!(new), now).await
}

impl Flywheels {
    /// Over a store. Nothing runs before [`Flywheels::run`].
    pub fn new(store: &Store, options: FlywheelOptions) -> Self {
        let (leaving, _) = watch::channel(false);
        let shared = Shared {
            store: store.clone(),
            evaluations: Evaluations::new(&options),
            options,
            wake: Notify::new(),
            leaving,
            builds: Mutex::default(),
            gauges: Gauges::default(),
            problems: Mutex::default(),
        };
        Self { rows: Loops::new(store), shared: Arc::new(shared) }
    }

    /// The rows.
    pub fn rows(&self) -> &Loops {
        &self.rows
    }

    /// What is to be done, by the loop's name.
    pub fn policies(&self) -> &BTreeMap<String, Policy> {
        &self.shared.options.policies
    }

    /// The loops, as Prometheus reads them.
    pub fn gauges(&self) -> String {
        self.shared.gauges.render()
    }

    /// Why a loop stands still, where a fault of this server is in its way.
    pub fn problem(&self, name: &str) -> Option<String> {
        lock(&self.shared.problems).get(name).cloned()
    }

    /// There is something to do.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
    }

    /// Runs the loops where this server is the one that does, until [`Flywheels::close`].
    pub async fn run(self, app: App) {
        let mut leaving = self.shared.leaving.subscribe();
        let mut leadership = Leadership::new(self.shared.store.database(), "loops");
        tokio::select! {
            _ = leaving.wait_for(|leaving| *leaving) => {}
            () = self.keep_running(&app, &mut leadership) => {}
        }
        leadership.resign().await;
    }

    async fn keep_running(&self, app: &App, leadership: &mut Leadership) {
        while !app.registry.all_ready() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        loop {
            match leadership.is_mine().await {
                Ok(true) => self.look(app).await,
                // What stands in a loop's way is for the one that runs it to say.
                Ok(false) => {
                    self.shared.gauges.clear();
                    lock(&self.shared.problems).clear();
                }
                Err(error) => tracing::warn!(%error, "cannot tell which server runs the loops; trying again in a moment"),
            }
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// One look at every loop that is configured, or in the middle of a cycle.
    async fn look(&self, app: &App) {
        let mut names: BTreeSet<String> = self.policies().keys().cloned().collect();
        match self.rows.all().await {
            Ok(rows) => names.extend(rows.into_iter().filter(|row| row.state != Word::Waiting.as_str()).map(|row| row.name)),
            Err(error) => tracing::warn!(%error, "cannot look for loops; trying again in a moment"),
        }
        for name in names {
            let mut trouble = None;
            for _ in 0..STRIDE {
                match self.turn(app, &name).await {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        trouble = Some(error.to_string());
                        break;
                    }
                }
            }
            self.tell(&name, trouble);
        }
    }

    /// Says once what is in a loop's way.
    fn tell(&self, name: &str, trouble: Option<String>) {
        let mut problems = lock(&self.shared.problems);
        if let Some(trouble) = &trouble
            && problems.get(name) != Some(trouble)
        {
            tracing::warn!(name, error = trouble, "a loop stands still because of a fault; it is tried again every second");
        }
        match trouble {
            Some(trouble) => problems.insert(name.to_owned(), trouble),
            None => problems.remove(name),
        };
    }

    /// Looks at a loop once and does what follows; `true` when it stands elsewhere now.
    async fn turn(&self, app: &App, name: &str) -> Result<bool, Trouble> {
        let row = row_of(&self.rows, name, now()).await?;
        let wheel = standing_of(&row)?;
        let policy = self.policies().get(name);
        self.shared.gauges.stands(name, &wheel);
        if wheel.paused {
            return Ok(false);
        }
        let seen = self.see(app, name, &wheel).await?;
        let mut next = step(name, &wheel, policy, &seen, now());
        if let Some(act) = next.act.take()
            && let Some(seen) = self.act(app, &act, &wheel).await?
        {
            next = step(name, &wheel, policy, &seen, now());
        }
        let Step { next: Some((next, note)), .. } = next else { return Ok(false) };
        match self.rows.advance(&row, &change(&next, &note, actor(name).into())).await {
            Ok(_) => {
                tracing::info!(
                    name,
                    cycle = note.cycle,
                    state = note.state.as_str(),
                    action = note.action,
                    why = note.why,
                    "a loop"
                );
                // What failed is tried at the next look, not at once.
                Ok(note.is_state())
            }
            // Somebody was first: it is looked at again.
            Err(LoopRefusal::Changed) => Ok(true),
            Err(LoopRefusal::Store(error)) => Err(error.into()),
        }
    }

    /// Begins nothing more, and ends what nobody would hear of any more. It goes on at the next start.
    pub async fn close(&self) {
        self.shared.leaving.send_replace(true);
        self.shared.evaluations.end().await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
