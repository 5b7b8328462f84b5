//! What can be seen of the work of a loop's state, from the rows and folders that the work leaves.

use crate::clock::now;
use crate::fine_tuning::Wish;
use crate::flywheel::{Flywheels, Trouble, actor, candidate, lock};
use crate::http::{App, job_name};
use crate::rollout::decision::{State as RolloutState, Status};
use serde_json::{Value, json};
use tidemill_rlhf::dataset::DatasetError;
use tidemill_rlhf::flywheel::{Counts, Cycle, Flywheel, Key, Policy, Seen, State};
use tidemill_rlhf::quality::Check;
use tidemill_store::records::Kind;
use tidemill_store::{
    FineTuningState, JobState, Rollout, RolloutRefusal, Rollouts, Snapshot, Store, StoreError, TallyFilter, Viewer,
};

/// Snapshots, the newest of a name, among which a cycle's is looked for.
const SNAPSHOTS: usize = 50;

/// New feedback of the kinds that a policy takes, since `from`, in microseconds since 1970.
pub(super) async fn counts(store: &Store, policy: &Policy, from: i64, now: i64) -> Result<Counts, StoreError> {
    let query = policy.query(now);
    let filter = TallyFilter {
        kinds: Kind::ALL.into_iter().filter(|kind| query.takes(*kind)).collect(),
        since: Some(query.since.map_or(from, |since| since.max(from))),
        until: query.until,
        tags: query.tags,
        exclude_tags: query.exclude_tags,
        sources: query.sources,
        exclude_authors: query.exclude_raters,
        models: query.models,
    };
    let tally = store.tally(&filter).await?;
    Ok(Counts { preferences: tally.judgements, raters: tally.people })
}

/// The rollout of a cycle, where it was started.
pub(super) async fn rollout(store: &Store, name: &str, cycle: u64, started: i64) -> Result<Option<Rollout>, StoreError> {
    match Rollouts::new(store).find(&candidate(name, cycle)).await {
        // Of another life of this database, whose loops were forgotten, or somebody's own of this name.
        Ok(found) if found.created < started || found.state["started_by"] != actor(name) => Ok(None),
        Ok(found) => Ok(Some(found)),
        Err(RolloutRefusal::Unknown(_)) => Ok(None),
        Err(RolloutRefusal::Store(error)) => Err(error),
        Err(RolloutRefusal::NameTaken(_) | RolloutRefusal::Changed) => Ok(None),
    }
}

fn failed(why: impl Into<String>, change: impl Into<String>, lasting: bool) -> Seen {
    Seen::Failed { why: why.into(), change: change.into(), lasting }
}

impl Flywheels {
    pub(super) async fn see(&self, app: &App, name: &str, wheel: &Flywheel) -> Result<Seen, Trouble> {
        match &wheel.state {
            State::Waiting { .. } => {
                let Some(policy) = self.policies().get(name) else { return Ok(Seen::Nothing) };
                let found = counts(&self.shared.store, policy, wheel.counted_from, now()).await?;
                self.shared.gauges.counts(name, found);
                Ok(Seen::Feedback(found))
            }
            State::Snapshot { cycle } => self.see_snapshot(app, name, wheel.cycle, cycle).await,
            State::Quality { dataset, .. } => see_report(app, dataset).await,
            State::Training { cycle, dataset } => see_training(app, &wheel.key(name), cycle, dataset).await,
            State::Evaluation { adapter, .. } => Ok(self.shared.evaluations.see(name, wheel.cycle, adapter)?),
            State::Canary { cycle, .. } => {
                let found = rollout(&self.shared.store, name, wheel.cycle, cycle.started).await?;
                Ok(found.map_or(Seen::Nothing, |found| see_rollout(&found)))
            }
            State::Promoted { .. } | State::Refused { .. } | State::RolledBack { .. } => Ok(Seen::Nothing),
        }
    }

    async fn see_snapshot(&self, app: &App, name: &str, number: u64, cycle: &Cycle) -> Result<Seen, Trouble> {
        // Before the snapshots are looked through: the row of one that was built is written before its job's.
        let build = lock(&self.shared.builds).get(name).copied().filter(|(of, _)| *of == number);
        let job = match build {
            Some((_, build)) => app.datasets.find(build).await?,
            None => None,
        };
        let until = json!(cycle.policy.query(cycle.started).until);
        let known = app.datasets.datasets().list(Some(&cycle.policy.dataset), None, SNAPSHOTS).await?;
        if let Some(snapshot) = known.iter().find(|snapshot| snapshot.query["feedback"]["until"] == until) {
            lock(&self.shared.builds).remove(name);
            return Ok(Seen::Snapshot { dataset: reference(snapshot), numbers: snapshot.row_counts.clone() });
        }
        let Some(job) = job else { return Ok(Seen::Nothing) };
        match job.state {
            JobState::Queued | JobState::Running => Ok(Seen::Underway),
            // So many newer ones of its name hide it.
            JobState::Succeeded => Ok(Seen::Nothing),
            JobState::Failed | JobState::Cancelled => {
                lock(&self.shared.builds).remove(name);
                let why = job.error.unwrap_or_else(|| "the build was cancelled".to_owned());
                let change = "collect more feedback that the policy's `feedback` takes, or widen it";
                Ok(failed(why, change, job.state == JobState::Cancelled))
            }
        }
    }
}

/// `NAME@VERSION`
fn reference(snapshot: &Snapshot) -> String {
    format!("{}@{}", snapshot.name, snapshot.version)
}

/// The snapshot, or what is seen where it is gone.
async fn snapshot(app: &App, dataset: &str) -> Result<Result<Snapshot, Seen>, Trouble> {
    match app.datasets.datasets().find(dataset).await {
        Ok(snapshot) => Ok(Ok(snapshot)),
        Err(DatasetError::NotFound(_)) => Ok(Err(failed(format!("{dataset} is gone"), "run the loop again", true))),
        Err(error) => Err(error.into()),
    }
}

async fn see_report(app: &App, dataset: &str) -> Result<Seen, Trouble> {
    let snapshot = match snapshot(app, dataset).await? {
        Ok(snapshot) => snapshot,
        Err(gone) => return Ok(gone),
    };
    // After an erasure there is no report, and the snapshot is tainted.
    let checks: Vec<Check> = serde_json::from_value(snapshot.report["checks"].clone()).unwrap_or_default();
    let tainted = snapshot.tainted.is_some();
    if checks.is_empty() && !tainted {
        return Ok(failed(format!("the report of {dataset} cannot be read"), "run the loop again", true));
    }
    Ok(Seen::Report { checks, tainted })
}

async fn see_training(app: &App, key: &Key, cycle: &Cycle, dataset: &str) -> Result<Seen, Trouble> {
    let job = app.fine_tuning.rows().find(key.id("job", cycle.started), &Viewer::Anyone).await?;
    let snapshot = match snapshot(app, dataset).await? {
        Ok(snapshot) => snapshot,
        Err(gone) => return Ok(gone),
    };
    if snapshot.tainted.is_some() {
        // An erasure since its report was looked at: nobody learns from these rows any more.
        if let Some(job) = &job {
            Wish::Cancel.write(&app.store, job.draft.id, actor(&key.name)).await?;
            app.fine_tuning.wake();
        }
        let why = format!("a person behind {dataset} was erased");
        return Ok(failed(why, "the next cycle builds another snapshot, without them", true));
    }
    let Some(job) = job else { return Ok(Seen::Nothing) };
    match (job.state, &job.fine_tuned_model) {
        (FineTuningState::Succeeded, Some(model)) => {
            let adapter = app.adapters.registry().get(model).await?;
            let numbers = json!({
                "job": job_name(job.draft.id),
                "steps": job.step,
                "tokens": job.trained_tokens,
                "metrics": adapter.metrics,
            });
            Ok(Seen::Adapter { adapter: adapter.reference(), numbers })
        }
        (FineTuningState::Succeeded | FineTuningState::Failed, _) => {
            let why = job.error.as_ref().and_then(|error| error["message"].as_str()).unwrap_or("the training made no model");
            let change = format!("mend what `tidemill jobs show {}` says, and run the loop again", job_name(job.draft.id));
            Ok(failed(why, change, true))
        }
        (FineTuningState::Cancelled, _) => Ok(failed("somebody cancelled the training", "run the loop again", true)),
        _ => Ok(Seen::Underway),
    }
}

fn see_rollout(found: &Rollout) -> Seen {
    let Ok(state) = serde_json::from_value::<RolloutState>(found.state.clone()) else {
        return failed(format!("where the rollout '{}' stands cannot be read", found.name), "end it by hand", true);
    };
    let latest = &found.latest;
    let why = latest["reason"].as_str().unwrap_or("it ended").to_owned();
    let numbers = |status: &str| -> Value {
        let ended = found.ended.unwrap_or(found.updated);
        json!({
            "rollout": found.name,
            "id": found.id,
            "status": status,
            "seconds": (ended - found.created) / 1_000_000,
            "exposures": latest["exposures"],
            "judgements": latest["judgements"],
            "by": latest["by"],
        })
    };
    match state.status {
        Status::Running | Status::Paused { .. } => Seen::Underway,
        Status::Promoted { arm } if arm > 0 => Seen::Promoted { why, numbers: numbers("promoted") },
        Status::Promoted { .. } | Status::RolledBack | Status::Completed => {
            Seen::RolledBack { why, numbers: numbers("rolled_back") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn ended(status: Value) -> Rollout {
        let state = json!({
            "status": status, "started": 1, "coverage": 1.0, "weights": [0.5, 0.5], "since": 1, "changed": 1, "step": 0, "step_since": 1,
            "step_exposures": 0, "failures": {}, "inconclusive": {}, "awaiting": false, "approved": false,
        });
        Rollout {
            id: Uuid::nil(),
            created: 1_000_000,
            updated: 5_000_000,
            ended: Some(4_000_000),
            name: "loop-shorter-1".into(),
            model: "m".into(),
            spec: Value::Null,
            state,
            version: 3,
            latest: json!({"reason": "arm 1 meets everything", "exposures": [9, 8], "by": null}),
        }
    }

    #[test]
    fn a_rollout_that_is_over_says_how_and_on_what() {
        let Seen::Promoted { why, numbers } = see_rollout(&ended(json!({"kind": "promoted", "arm": 1}))) else { panic!() };
        assert_eq!(
            (why.as_str(), &numbers["exposures"], &numbers["seconds"]),
            ("arm 1 meets everything", &json!([9, 8]), &json!(3))
        );
        for status in [json!({"kind": "promoted", "arm": 0}), json!({"kind": "rolled_back"}), json!({"kind": "completed"})] {
            assert!(matches!(see_rollout(&ended(status)), Seen::RolledBack { .. }), "no promotion of the adapter");
        }
        for status in [json!({"kind": "running"}), json!({"kind": "paused", "reason": "inconclusive"})] {
            assert_eq!(see_rollout(&ended(status)), Seen::Underway);
        }
        assert!(matches!(see_rollout(&ended(json!("lost"))), Seen::Failed { lasting: true, .. }));
    }
}
