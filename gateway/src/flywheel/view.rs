//! A loop as people see it: where it stands, what it waits for and how far that is, and what became of its cycles. All of it is in the
//! store, so the command line shows the same as the API.

use crate::flywheel::sight::{counts, rollout};
use crate::flywheel::{candidate, standing_of};
use crate::http::job_name;
use serde_json::{Value, json};
use tidemill_rlhf::flywheel::{Flywheel, Note, Policy, State, Word};
use tidemill_store::{FineTuningJob, FineTunings, LoopRow, LoopStep, Loops, Store, StoreError, Viewer};

fn seconds(micros: i64) -> i64 {
    micros.div_euclid(1_000_000)
}

/// The loop of this name, with its last cycles, the newest first. None where there is neither a policy nor a row. `here` is the place of the
/// data directory that is asked about, where a server has owned it.
pub async fn standing(
    store: &Store,
    name: &str,
    policy: Option<&Policy>,
    cycles: u64,
    here: Option<&str>,
    now: i64,
) -> Result<Option<Value>, StoreError> {
    let rows = Loops::new(store);
    let row = rows.find(name).await?;
    if row.is_none() && policy.is_none() {
        return Ok(None);
    }
    let wheel = row.as_ref().map(standing_of).transpose()?.unwrap_or_else(|| Flywheel::new(now));
    let steps = rows.steps(name, cycles).await?;
    let waits_for = waits_for(store, name, policy, &wheel, here, now).await?;
    // A cycle goes on with the policy that it began with.
    let own = wheel.state.cycle().map(|cycle| &cycle.policy).or(policy);
    Ok(Some(json!({
        "object": "loop",
        "id": name,
        "configured": policy.is_some(),
        "model": own.map(|policy| &policy.model),
        "base": own.map(|policy| &policy.base),
        "dataset": own.map(|policy| &policy.dataset),
        "state": wheel.state.word(),
        "paused": wheel.paused,
        "asked": wheel.asked,
        "cycle": wheel.cycle,
        "created_at": row.as_ref().map(|row: &LoopRow| seconds(row.created)),
        "updated_at": row.as_ref().map(|row| seconds(row.updated)),
        "waits_for": waits_for,
        "policy": own,
        "cycles": told(&steps),
    })))
}

/// What a loop waits for, in words and numbers.
async fn waits_for(
    store: &Store,
    name: &str,
    policy: Option<&Policy>,
    wheel: &Flywheel,
    here: Option<&str>,
    now: i64,
) -> Result<Value, StoreError> {
    let said = |text: &str| Ok(json!({ "text": text }));
    if wheel.paused {
        return said("a person: it is paused");
    }
    match &wheel.state {
        State::Waiting { .. } => {
            let Some(policy) = policy else { return said("nothing: it is not in the configuration any more") };
            if let Some(by) = &wheel.asked {
                return said(&format!("the server's next look: {by} wants a cycle"));
            }
            let progress = policy.when.progress(counts(store, policy, wheel.counted_from, now).await?);
            let mut value = json!(progress);
            value["text"] = json!(progress.to_string());
            Ok(value)
        }
        State::Snapshot { .. } => said("its snapshot"),
        State::Quality { dataset, .. } => said(&format!("the report of {dataset}")),
        State::Training { cycle, .. } => {
            let job = FineTunings::new(store.database()).find(wheel.key(name).id("job", cycle.started), &Viewer::Anyone).await?;
            let Some(job) = job else { return said("its training's files") };
            Ok(training(&job, here))
        }
        State::Evaluation { adapter, .. } => said(&format!("the evaluation of {adapter}")),
        State::Canary { cycle, .. } => {
            let Some(found) = rollout(store, name, wheel.cycle, cycle.started).await? else {
                return said("its rollout to start");
            };
            let (status, reason) = (&found.state["status"], found.latest["reason"].as_str().unwrap_or_default());
            let text = format!("its rollout {}: {reason}", found.name);
            Ok(json!({ "text": text, "rollout": candidate(name, wheel.cycle), "status": status["kind"] }))
        }
        State::Promoted { .. } | State::Refused { .. } | State::RolledBack { .. } => said("what it needed to be cleared away"),
    }
}

/// A training that is waited for. Only the server that has its files can go on with it.
fn training(job: &FineTuningJob, here: Option<&str>) -> Value {
    let (name, elsewhere) = (job_name(job.draft.id), here.is_some_and(|here| here != job.draft.place));
    let mut text = match job.steps {
        0 => format!("its training: {}", job.state.as_str()),
        steps => format!("its training: {}, step {} of {steps}", job.state.as_str(), job.step),
    };
    if elsewhere {
        text += &format!(
            "; its files are in the data directory of another server, and it goes on while that one runs. If that is gone for good, \
             cancel {name} and run the loop again"
        );
    }
    json!({ "text": text, "job": name, "step": job.step, "steps": job.steps, "elsewhere": elsewhere })
}

/// Cycles, the newest first, each with what happened in it, the oldest first.
fn told(steps: &[LoopStep]) -> Vec<Value> {
    let mut cycles: Vec<Value> = steps
        .chunk_by(|one, other| one.cycle == other.cycle)
        // What happened before the first.
        .filter(|steps| steps[0].cycle > 0)
        .map(|steps| {
            let notes: Vec<(&LoopStep, Note)> =
                steps.iter().filter_map(|step| Some((step, serde_json::from_value(step.body.clone()).ok()?))).collect();
            let began = notes.iter().find(|(_, note)| note.is_state() && note.state == Word::Snapshot);
            let end = notes.iter().map(|(_, note)| note).find(|note| note.is_end());
            json!({
                "cycle": steps[0].cycle,
                "began_at": began.map(|(_, note)| seconds(note.at)),
                "ended_at": end.map(|note| seconds(note.at)),
                "outcome": end.map(|note| note.state),
                "why": end.map(|note| &note.why),
                "findings": end.map(|note| &note.findings).filter(|findings| !findings.is_empty()),
                "steps": notes.iter().map(|(step, note)| json!({
                    "at": seconds(note.at),
                    "state": note.state,
                    "action": note.action,
                    "by": step.actor,
                    "why": note.why,
                    "numbers": note.numbers,
                })).collect::<Vec<_>>(),
            })
        })
        .collect();
    cycles.reverse();
    cycles
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_rlhf::flywheel::Finding;

    fn happened(version: i64, cycle: u64, state: Word, action: &str) -> LoopStep {
        let findings = vec![Finding { of: "accuracy".into(), found: "9 of 20".into(), change: "train on more".into() }];
        let note = Note {
            at: version * 1_000_000,
            cycle,
            state,
            action: action.into(),
            why: format!("why {version}"),
            findings: if state == Word::Refused { findings } else { Vec::new() },
            numbers: json!({"version": version}),
        };
        LoopStep { version, at: note.at, cycle, state: state.as_str().into(), actor: "loop:a".into(), body: json!(note) }
    }

    #[test]
    fn cycles_are_told_with_their_outcome_and_what_would_change_it() {
        let steps = [
            happened(1, 0, Word::Waiting, "paused"),
            happened(2, 1, Word::Snapshot, "snapshot"),
            happened(3, 1, Word::Snapshot, "failed"),
            happened(4, 1, Word::Refused, "refused"),
            happened(5, 1, Word::Waiting, "waiting"),
            happened(6, 2, Word::Snapshot, "snapshot"),
        ];
        let cycles = told(&steps);
        assert_eq!(cycles.len(), 2);
        assert_eq!((&cycles[0]["cycle"], &cycles[0]["outcome"], &cycles[0]["ended_at"]), (&json!(2), &Value::Null, &Value::Null));
        let first = &cycles[1];
        assert_eq!(
            (&first["began_at"], &first["ended_at"], &first["outcome"], &first["why"]),
            (&json!(2), &json!(4), &json!("refused"), &json!("why 4"))
        );
        assert_eq!(first["findings"][0]["change"], "train on more");
        assert_eq!(first["steps"].as_array().unwrap().len(), 4);
        assert_eq!((&first["steps"][1]["action"], &first["steps"][1]["by"]), (&json!("failed"), &json!("loop:a")));
        assert!(told(&[]).is_empty());
    }
}
