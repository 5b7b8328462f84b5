//! What is done for a loop. Each act is asked for until its outcome is seen: what is done already is left as it is.

use crate::clock::now;
use crate::datasets::Refused;
use crate::fine_tuning::DATASET;
use crate::flywheel::{Flywheels, Trouble, actor, candidate, lock, policy};
use crate::http::{App, file_name, job_name};
use crate::rollout::keeper::KeeperError;
use crate::rollout::spec::Spec;
use serde_json::{Map, json};
use std::collections::HashSet;
use tidemill_rlhf::dataset::Datasets;
use tidemill_rlhf::dataset::format::{Format, Selection, lines};
use tidemill_rlhf::flywheel::{Act, Cycle, Flywheel, Key, Seen, Word, Work};
use tidemill_rlhf::quality::{QualityOptions, Split};
use tidemill_rlhf::registry::RegistryError;
use tidemill_store::{
    Actor, AdapterRefusal, AdapterState, FileDraft, Files, FineTuningDraft, Incoming, News, Rollout, RolloutRefusal, Rollouts,
    Store, StoreError, Viewer,
};
use uuid::Uuid;

/// How long a file that nobody removed stays, in microseconds.
const FILE_LIFE: i64 = 30 * 86_400_000_000;
/// Parts of the training's files and job in the key of its act.
const TRAIN: &str = "train";
const HELD_OUT: &str = "held_out";
const JOB: &str = "job";

fn failed(why: impl std::fmt::Display, change: &str, lasting: bool) -> Seen {
    Seen::Failed { why: why.to_string(), change: change.to_owned(), lasting }
}

impl Flywheels {
    /// Does it, or begins it; what is seen at once of it.
    pub(super) async fn act(&self, app: &App, act: &Act, wheel: &Flywheel) -> Result<Option<Seen>, Trouble> {
        let Some(cycle) = wheel.state.cycle() else { return Ok(None) };
        match &act.work {
            Work::Snapshot => self.build(app, &act.key, cycle).await,
            Work::Training { dataset } => self.train(app, &act.key, cycle, dataset).await,
            Work::Evaluation { dataset, adapter } => {
                Ok(self.shared.evaluations.begin(&act.key.name, act.key.cycle, cycle, dataset, adapter)?)
            }
            Work::Canary { adapter } => self.roll_out(app, &act.key, cycle, adapter).await,
            Work::Clear => self.clear(app, &act.key, cycle).await.map(Some),
        }
    }

    async fn build(&self, app: &App, key: &Key, cycle: &Cycle) -> Result<Option<Seen>, Trouble> {
        let options = QualityOptions { thresholds: cycle.policy.quality.thresholds.clone(), ..QualityOptions::default() };
        let (dataset, query) = (cycle.policy.dataset.clone(), cycle.policy.query(cycle.started));
        let started = app.datasets.start(dataset, query, options, actor(&key.name).into()).await;
        match started {
            Ok(job) => {
                lock(&self.shared.builds).insert(key.name.clone(), (key.cycle, job.id));
                Ok(None)
            }
            Err(Refused::Store(error)) => Err(error.into()),
            Err(error @ (Refused::Full | Refused::Closing)) => Err(Trouble::Busy(error.to_string())),
        }
    }

    /// Makes the files and the job.
    async fn train(&self, app: &App, key: &Key, cycle: &Cycle, dataset: &str) -> Result<Option<Seen>, Trouble> {
        let policy = &cycle.policy;
        let id = |part: &str| key.id(part, cycle.started);
        let export = |split: Split, file: Uuid| {
            let (datasets, files) = (app.datasets.datasets().clone(), app.files.clone());
            let selection = Selection { kind: policy.feedback.rows.first().copied(), split: Some(split), dropped: false };
            let (dataset, owner, name) = (dataset.to_owned(), actor(&key.name), format!("{}-{}.jsonl", key.name, file));
            let runtime = tokio::runtime::Handle::current();
            // Decompressing rows would hold up the threads that move bytes.
            tokio::task::spawn_blocking(move || {
                runtime.block_on(async move {
                    let draft = FileDraft {
                        key_id: Some(owner),
                        filename: name,
                        purpose: "fine-tune".to_owned(),
                        expires: Some(now() + FILE_LIFE),
                    };
                    keep_rows(&datasets, &files, &dataset, selection, file, draft).await
                })
            })
        };
        let broken = |error: tokio::task::JoinError| Trouble::Disk(std::io::Error::other(error));
        if !export(Split::Train, id(TRAIN)).await.map_err(broken)?? {
            let why = format!("{dataset} has no row to learn from that its report does not drop");
            return Ok(Some(failed(why, "collect more feedback; `tidemill dataset report` says what is wrong with it", true)));
        }
        let held_out = export(Split::HeldOut, id(HELD_OUT)).await.map_err(broken)??;
        let mut metadata = Map::new();
        metadata.insert("tidemill_loop".to_owned(), json!(key.name));
        metadata.insert("tidemill_cycle".to_owned(), json!(key.cycle.to_string()));
        metadata.insert(DATASET.to_owned(), json!(dataset));
        let draft = FineTuningDraft {
            id: id(JOB),
            created: cycle.started,
            key_id: Some(actor(&key.name)),
            model: policy.base.clone(),
            base: policy.base.clone(),
            method: policy.recipe.clone(),
            suffix: Some(key.name.clone()),
            seed: i64::try_from(policy.feedback.seed).unwrap_or(0) & i64::from(i32::MAX),
            training_file: id(TRAIN),
            validation_file: held_out.then(|| id(HELD_OUT)),
            metadata: Some(metadata),
            result_file: id("result"),
            place: app.files.place().to_owned(),
        };
        let news = [News::info(format!("Created by cycle {} of the loop {} from {dataset}.", key.cycle, key.name))];
        let detail = json!({ "model": policy.base, "dataset": dataset, "cycle": key.cycle });
        let act = self.shared.store.act(actor(&key.name), "fine_tuning.create").to(job_name(draft.id)).with(detail);
        if !app.fine_tuning.rows().insert(&draft, &news, act).await? {
            return Err(Trouble::Busy("a file of its training was deleted; it is written again".to_owned()));
        }
        app.fine_tuning.wake();
        Ok(None)
    }

    /// Serves the adapter under a name of its own, and starts the rollout.
    async fn roll_out(&self, app: &App, key: &Key, cycle: &Cycle, adapter: &str) -> Result<Option<Seen>, Trouble> {
        let by = Actor::from(actor(&key.name));
        let registry = app.adapters.registry().acting_as(&by);
        let name = candidate(&key.name, key.cycle);
        let row = match registry.serve(adapter, false).await {
            Ok((row, _)) => row,
            Err(RegistryError::Store(error) | RegistryError::Refused(AdapterRefusal::Store(error))) => return Err(error.into()),
            Err(error) => return Ok(Some(failed(error, "run the loop again: its next snapshot makes another adapter", true))),
        };
        let aliases = registry.aliases().await?;
        if let Some(other) = aliases.iter().find(|alias| alias.name == name && alias.adapter != row.id) {
            let why = format!("the alias '{name}' leads to another adapter of {}", other.base);
            return Ok(Some(failed(why, "remove it with `tidemill adapter unalias`, and run the loop again", true)));
        }
        registry.alias(&name, &row.id.to_string()).await?;
        app.adapters.try_again(row.id);
        app.adapters.follow().await?;
        if let Some(problem) = app.adapters.problem(row.id) {
            return Ok(Some(failed(problem, "make the server able to serve it; GET /v1/adapters says what is served", false)));
        }
        // The control that is called as the model is whatever that serves now.
        let spec = match policy::spec(&cycle.policy, &name, &cycle.policy.model, &name) {
            Ok(spec) => spec,
            Err(error) => return Ok(Some(failed(error.message, "mend `rollout` in the loop's policy", true))),
        };
        match app.rollouts.start(spec, by).await {
            Ok(_) => Ok(None),
            Err(KeeperError::Refused(RolloutRefusal::Store(error))) => Err(error.into()),
            Err(error) => Ok(Some(failed(error, "mend what it says, and run the loop again", false))),
        }
    }

    /// Removes what only this cycle needed, and takes candidates out of service that no rollout names.
    async fn clear(&self, app: &App, key: &Key, cycle: &Cycle) -> Result<Seen, Trouble> {
        let training = Key { state: Word::Training, ..key.clone() };
        for part in [TRAIN, HELD_OUT] {
            let id = training.id(part, cycle.started);
            let Some(file) = app.files.find(id, &Viewer::Anyone, now()).await? else { continue };
            let detail = json!({ "purpose": file.purpose, "bytes": file.bytes, "cycle": key.cycle });
            let act = self.shared.store.act(actor(&key.name), "file.delete").to(file_name(id)).with(detail);
            if !app.files.delete(&file, act).await? {
                return Err(Trouble::Busy("its training still reads its files".to_owned()));
            }
        }
        self.shared.evaluations.forget(&key.name, key.cycle, cycle.policy.measuring.keep)?;
        lock(&self.shared.builds).remove(&key.name);
        let named = named_by_rollouts(&self.shared.store).await?;
        let registry = app.adapters.registry().acting_as(actor(&key.name));
        let aliases = registry.aliases().await?;
        let own = candidate(&key.name, 0);
        let prefix = own.trim_end_matches('0');
        let is_own = |alias: &str| alias.strip_prefix(prefix).is_some_and(|rest| rest.parse::<u64>().is_ok());
        for alias in aliases.iter().filter(|alias| is_own(&alias.name) && !named.contains(&alias.name)) {
            registry.unalias(&alias.name, Some(&alias.base)).await?;
            let id = alias.adapter.to_string();
            if registry.get(&id).await?.state == AdapterState::Serving {
                match registry.retire(&id).await {
                    // Somebody gave it a name of their own.
                    Ok(_) | Err(RegistryError::Refused(AdapterRefusal::Aliased { .. })) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        app.adapters.follow().await?;
        Ok(Seen::Cleared)
    }
}

/// The rows of a snapshot that are selected as a file, unless it is there already; `false` where there are none.
async fn keep_rows(
    datasets: &Datasets,
    files: &Files,
    dataset: &str,
    selection: Selection,
    id: Uuid,
    draft: FileDraft,
) -> Result<bool, Trouble> {
    if files.find(id, &Viewer::Anyone, now()).await?.is_some() {
        return Ok(true);
    }
    let snapshot = datasets.find(dataset).await?;
    let mut rows = datasets.rows(&snapshot).await?;
    let mut content: Incoming = files.receive(id).await?;
    let mut count = 0;
    while let Some(part) = rows.next_rows().await? {
        let part = lines(&part, selection, Format::Tidemill);
        count += part.rows;
        content.write(&part.bytes).await?;
    }
    if count == 0 {
        return Ok(false);
    }
    content.finish(draft, now()).await?;
    Ok(true)
}

/// Names that a rollout's arms lead requests to; of one that was promoted, its arm's.
fn names(rollout: &Rollout) -> Vec<String> {
    let Ok(spec) = serde_json::from_value::<Spec>(rollout.spec.clone()) else { return Vec::new() };
    let promoted = rollout.state["status"]["arm"].as_u64().and_then(|arm| usize::try_from(arm).ok());
    let arms = spec.arms.into_iter().enumerate().filter(|(index, _)| promoted.is_none_or(|arm| arm == *index));
    arms.flat_map(|(_, arm)| [Some(arm.variant), arm.model]).flatten().collect()
}

/// Names that a rollout under way or a promotion that holds leads requests to.
pub(crate) async fn named_by_rollouts(store: &Store) -> Result<HashSet<String>, StoreError> {
    let rollouts = Rollouts::new(store);
    let (promoted, running) = (rollouts.promotions().await?, rollouts.running().await?);
    Ok(promoted.iter().chain(&running).flat_map(names).collect())
}
