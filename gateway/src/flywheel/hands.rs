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
use tidemill_rlhf::registry::{Registry, RegistryError};
use tidemill_store::{
    Actor, AdapterOrigin, AdapterRefusal, AdapterState, Adapters, FileDraft, Files, FineTuningDraft, Incoming, News,
    RegisteredAdapter, Rollout, RolloutRefusal, Rollouts, Store, StoreError, Viewer,
};
use uuid::Uuid;

/// How long a file that nobody removed stays, in microseconds.
const FILE_LIFE: i64 = 30 * 86_400_000_000;
/// How long other servers on the database may take to serve what a new name leads to, in microseconds.
const FOLLOWED: i64 = 5_000_000;
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
            let (datasets, files, store) = (app.datasets.datasets().clone(), app.files.clone(), self.shared.store.clone());
            let selection = Selection { kind: policy.feedback.rows.first().copied(), split: Some(split), dropped: false };
            let (dataset, owner, name) = (dataset.to_owned(), actor(&key.name), format!("{}-{}.jsonl", key.name, file));
            let runtime = tokio::runtime::Handle::current();
            // Decompressing rows would hold up the threads that move bytes.
            tokio::task::spawn_blocking(move || {
                runtime.block_on(async move {
                    if !is_to_be_written(&store, &files, file, &owner).await? {
                        return Ok(true);
                    }
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
        let row = match put_into_service(&registry, adapter).await {
            Ok(row) => row,
            Err(RegistryError::Store(error) | RegistryError::Refused(AdapterRefusal::Store(error))) => return Err(error.into()),
            Err(error) => return Ok(Some(failed(error, "run the loop again: its next snapshot makes another adapter", true))),
        };
        let mut since = now();
        match registry.aliases().await?.into_iter().find(|alias| alias.name == name) {
            Some(alias) if alias.adapter == row.id => since = alias.updated,
            Some(other) => {
                let why = format!("the alias '{name}' leads to another adapter of {}", other.base);
                return Ok(Some(failed(why, "remove it with `tidemill adapter unalias`, and run the loop again", true)));
            }
            None => drop(registry.alias(&name, &row.id.to_string()).await?),
        }
        app.adapters.try_again(row.id);
        app.adapters.follow().await?;
        if let Some(problem) = app.adapters.problem(row.id) {
            return Ok(Some(failed(problem, "make the server able to serve it; GET /v1/adapters says what is served", false)));
        }
        if self.shared.options.database.is_some() && now() - since < FOLLOWED {
            // A server that knew the rollout and not the adapter yet would count its own delay against it.
            return Ok(None);
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
            registry.withdraw(&alias.name, Some(&alias.base)).await?;
        }
        // One that was put into service and got no name: the way to its rollout was barred half-way.
        let job = job_name(training.id(JOB, cycle.started));
        for adapter in Adapters::new(&self.shared.store).made_from(AdapterOrigin::Job(&job)).await? {
            let led_to = aliases.iter().any(|alias| alias.adapter == adapter.id);
            if adapter.state == AdapterState::Serving && !led_to && !named.iter().any(|name| means(name, &adapter)) {
                registry.retire(&adapter.id.to_string()).await?;
            }
        }
        app.adapters.follow().await?;
        Ok(Seen::Cleared)
    }
}

/// The adapter in service. One that is there already is left as it is, so that the audit is told once, however often it is tried.
async fn put_into_service(registry: &Registry, adapter: &str) -> Result<RegisteredAdapter, RegistryError> {
    let known = registry.get(adapter).await?;
    if known.state == AdapterState::Serving && known.tainted.is_none() {
        return Ok(known);
    }
    Ok(registry.serve(adapter, false).await?.0)
}

/// Whether a file of a training is not in this data directory yet. One that another server wrote before it was killed is given up: the
/// job is not made yet, and it will run where its files are.
async fn is_to_be_written(store: &Store, files: &Files, id: Uuid, owner: &str) -> Result<bool, Trouble> {
    let Some(file) = files.find(id, &Viewer::Anyone, now()).await? else { return Ok(true) };
    if file.place == files.place() {
        return Ok(false);
    }
    let detail = json!({ "purpose": file.purpose, "bytes": file.bytes, "place": file.place });
    let act = store.act(owner, "file.delete").to(file_name(id)).with(detail);
    Ok(files.delete(&file, act).await?)
}

/// The rows of a snapshot that are selected as a file; `false` where there are none.
async fn keep_rows(
    datasets: &Datasets,
    files: &Files,
    dataset: &str,
    selection: Selection,
    id: Uuid,
    draft: FileDraft,
) -> Result<bool, Trouble> {
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

/// Whether a request's name means the adapter, without an alias.
fn means(name: &str, adapter: &RegisteredAdapter) -> bool {
    let name = name.strip_prefix(&adapter.base).and_then(|rest| rest.strip_prefix(':')).unwrap_or(name);
    name == adapter.name || name == adapter.reference()
}

/// Names that a rollout's arms lead requests to; of one that was promoted, its arm's.
fn names(rollout: &Rollout) -> Vec<String> {
    let Ok(spec) = serde_json::from_value::<Spec>(rollout.spec.clone()) else { return Vec::new() };
    let promoted = rollout.state["status"]["arm"].as_u64().and_then(|arm| usize::try_from(arm).ok());
    let arms = spec.arms.into_iter().enumerate().filter(|(index, _)| promoted.is_none_or(|arm| arm == *index));
    arms.flat_map(|(_, arm)| [Some(arm.variant), arm.model]).flatten().collect()
}

/// Names that a rollout under way or a promotion that holds leads requests to, or the promotion before it: whoever takes the newest back
/// has the model on that one again with the next request.
pub(crate) async fn named_by_rollouts(store: &Store) -> Result<HashSet<String>, StoreError> {
    let rollouts = Rollouts::new(store);
    let (promoted, mut leading) = (rollouts.promotions().await?, rollouts.running().await?);
    for newest in &promoted {
        leading.extend(rollouts.promotions_but(newest.id).await?);
    }
    Ok(promoted.iter().chain(&leading).flat_map(names).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_store::{DataDir, RolloutChange, RolloutDecision, StoreOptions};

    #[tokio::test]
    async fn a_file_that_a_server_left_behind_is_written_again_where_the_job_will_run() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [first, second] = folders.each_ref().map(|folder| DataDir::new(folder.path()));
        let store = Store::open(StoreOptions::new(first.clone())).await.unwrap();
        let (left, own) = (Files::open(&store, &first).await.unwrap(), Files::open(&store, &second).await.unwrap());
        let id = store.issue_id();
        let keep = async |files: &Files| {
            let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "fine-tune".into(), expires: None };
            files.receive(id).await.unwrap().finish(draft, now()).await.unwrap()
        };
        assert!(is_to_be_written(&store, &own, id, "loop:a").await.unwrap());
        keep(&left).await;
        assert!(!is_to_be_written(&store, &left, id, "loop:a").await.unwrap());
        assert!(is_to_be_written(&store, &own, id, "loop:a").await.unwrap());
        assert_eq!(keep(&own).await.place, own.place());
        assert!(!is_to_be_written(&store, &own, id, "loop:a").await.unwrap());
        store.close().await;
    }

    /// A rollout of these variants on the model, which was promoted.
    async fn promoted(store: &Store, model: &str, control: &str, treatment: &str) {
        let spec = json!({
            "name": treatment, "model": model, "kind": "ab", "arms": [{"variant": control}, {"variant": treatment}],
            "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
        });
        let (rollouts, decision) = (Rollouts::new(store), |action: &str| RolloutDecision {
            version: 0,
            at: now(),
            action: action.to_owned(),
            actor: None,
            body: json!({}),
        });
        let row = Rollout {
            id: store.issue_id(),
            created: now(),
            updated: now(),
            ended: None,
            name: treatment.to_owned(),
            model: model.to_owned(),
            spec: json!(Spec::parse(&spec).unwrap()),
            state: json!({}),
            version: 0,
            latest: json!({}),
        };
        rollouts.insert(&row, &decision("start"), "ann").await.unwrap();
        let state = json!({ "status": { "kind": "promoted", "arm": 1 } });
        let change = RolloutChange { state, over: true, promoted: true, decision: decision("promote"), keep: true };
        rollouts.advance(&row, &change, None).await.unwrap();
    }

    #[tokio::test]
    async fn what_an_undo_would_lead_back_to_is_needed_and_what_lies_before_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(StoreOptions::new(DataDir::new(folder.path()))).await.unwrap();
        for (control, treatment) in [("m", "loop-a-1"), ("loop-a-1", "loop-a-2"), ("loop-a-2", "loop-a-3")] {
            promoted(&store, "m", control, treatment).await;
        }
        promoted(&store, "other", "other", "loop-b-1").await;
        let mut named: Vec<String> = named_by_rollouts(&store).await.unwrap().into_iter().collect();
        named.sort();
        assert_eq!(named, ["loop-a-2", "loop-a-3", "loop-b-1"]);
        store.close().await;
    }
}
