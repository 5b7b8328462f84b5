//! The transitions.

use serde_json::{Value, json};

use super::policy::{Policy, QualityRule};
use super::state::{Act, Cycle, Finding, Flywheel, Note, Seen, State, Step, Wish, WishError, Work};
use crate::evaluate::GateReport;
use crate::quality::{Check, Status};

/// Times that an act may fail before its cycle is given up.
pub(super) const ATTEMPTS: u32 = 3;

/// What follows from what is seen of a loop's work. `policy` is what a new cycle would begin with; without one none begins.
pub fn step(name: &str, wheel: &Flywheel, policy: Option<&Policy>, seen: &Seen, now: i64) -> Step {
    if wheel.paused {
        return Step::default();
    }
    match (&wheel.state, seen) {
        (State::Waiting { since }, Seen::Feedback(have)) => {
            let Some(policy) = policy else { return Step::default() };
            let asked = wheel.asked.as_ref().map(|by| format!("{by} wanted it"));
            let Some(why) = asked.or_else(|| policy.when.due(*have, *since, now)) else { return Step::default() };
            let cycle = Box::new(Cycle { started: now, policy: policy.clone(), attempts: 0 });
            let begun = Flywheel { cycle: wheel.cycle + 1, asked: None, ..wheel.clone() };
            enter(&begun, State::Snapshot { cycle }, why, json!(have), now)
        }
        (State::Snapshot { cycle }, Seen::Snapshot { dataset, numbers }) => {
            let next = State::Quality { cycle: fresh(cycle), dataset: dataset.clone() };
            enter(wheel, next, format!("{dataset} is there"), numbers.clone(), now)
        }
        (State::Quality { cycle, dataset }, Seen::Report { checks, tainted }) => {
            let findings = quality(&cycle.policy.quality, checks, *tainted);
            let numbers = of_checks(checks);
            if !findings.is_empty() {
                return refuse(wheel, cycle, findings, numbers, now);
            }
            let next = State::Training { cycle: fresh(cycle), dataset: dataset.clone() };
            enter(wheel, next, format!("the quality of {dataset} will do"), numbers, now)
        }
        (State::Training { cycle, dataset }, Seen::Adapter { adapter, numbers }) => {
            let next = State::Evaluation { cycle: fresh(cycle), dataset: dataset.clone(), adapter: adapter.clone() };
            enter(wheel, next, format!("{adapter} was made of {dataset}"), numbers.clone(), now)
        }
        (State::Evaluation { cycle, adapter, .. }, Seen::Gates(report)) => {
            let (findings, numbers) = (gates(report), json!({ "gates": report.checks }));
            if !report.passed {
                return refuse(wheel, cycle, findings, numbers, now);
            }
            let next = State::Canary { cycle: fresh(cycle), adapter: adapter.clone() };
            enter(wheel, next, format!("all {} gates are open", report.checks.len()), numbers, now)
        }
        (State::Canary { cycle, adapter }, Seen::Promoted { why, numbers }) => {
            let next = State::Promoted { cycle: fresh(cycle), adapter: adapter.clone() };
            enter(wheel, next, why.clone(), numbers.clone(), now)
        }
        (State::Canary { cycle, .. }, Seen::RolledBack { why, numbers }) => {
            enter(wheel, State::RolledBack { cycle: fresh(cycle) }, why.clone(), numbers.clone(), now)
        }
        (State::Promoted { cycle, .. } | State::Refused { cycle } | State::RolledBack { cycle }, Seen::Cleared) => {
            let rested = Flywheel { counted_from: cycle.started, ..wheel.clone() };
            enter(&rested, State::Waiting { since: now }, "for new feedback".to_owned(), Value::Null, now)
        }
        // What is left over does no harm, and clearing it away is tried until it works.
        (State::Promoted { .. } | State::Refused { .. } | State::RolledBack { .. }, Seen::Failed { .. }) => Step::default(),
        (_, Seen::Failed { why, change, lasting }) => failed(wheel, why, change, *lasting, now),
        (_, Seen::Nothing) => Step { next: None, act: act(name, wheel) },
        // What is seen is of another state's work.
        _ => Step::default(),
    }
}

/// What a person wants; None where it is so already.
pub fn wish(wheel: &Flywheel, wish: Wish, by: &str, now: i64) -> Result<Option<(Flywheel, Note)>, WishError> {
    let mut next = wheel.clone();
    let (action, why) = match wish {
        Wish::Run if wheel.paused => return Err(WishError::Paused),
        Wish::Run if !matches!(wheel.state, State::Waiting { .. }) => return Err(WishError::Underway(wheel.cycle)),
        Wish::Run if wheel.asked.is_some() => return Ok(None),
        Wish::Run => {
            next.asked = Some(by.to_owned());
            ("asked", format!("{by} wants a cycle now"))
        }
        Wish::Pause if wheel.paused => return Ok(None),
        Wish::Pause => {
            (next.paused, next.asked) = (true, None);
            ("paused", format!("{by} paused it"))
        }
        Wish::Resume if !wheel.paused => return Ok(None),
        Wish::Resume => {
            next.paused = false;
            ("resumed", format!("{by} resumed it"))
        }
    };
    let note = note(&next, action, why, now);
    Ok(Some((next, note)))
}

/// The act of a state, if it has one.
fn act(name: &str, wheel: &Flywheel) -> Option<Act> {
    let work = match &wheel.state {
        State::Waiting { .. } | State::Quality { .. } => return None,
        State::Snapshot { .. } => Work::Snapshot,
        State::Training { dataset, .. } => Work::Training { dataset: dataset.clone() },
        State::Evaluation { dataset, adapter, .. } => Work::Evaluation { dataset: dataset.clone(), adapter: adapter.clone() },
        State::Canary { adapter, .. } => Work::Canary { adapter: adapter.clone() },
        State::Promoted { .. } | State::Refused { .. } | State::RolledBack { .. } => Work::Clear,
    };
    Some(Act { key: wheel.key(name), work })
}

/// The cycle as the next state has it.
fn fresh(cycle: &Cycle) -> Box<Cycle> {
    Box::new(Cycle { attempts: 0, ..cycle.clone() })
}

fn note(wheel: &Flywheel, action: &str, why: String, now: i64) -> Note {
    let (cycle, state) = (wheel.cycle, wheel.state.word());
    Note { at: now, cycle, state, action: action.to_owned(), why, findings: Vec::new(), numbers: Value::Null }
}

fn enter(wheel: &Flywheel, state: State, why: String, numbers: Value, now: i64) -> Step {
    let next = Flywheel { state, ..wheel.clone() };
    let note = Note { numbers, ..note(&next, next.state.word().as_str(), why, now) };
    Step { next: Some((next, note)), act: None }
}

fn refuse(wheel: &Flywheel, cycle: &Cycle, findings: Vec<Finding>, numbers: Value, now: i64) -> Step {
    let why: Vec<String> = findings.iter().map(|finding| format!("{}: {}", finding.of, finding.found)).collect();
    let Step { next, act } = enter(wheel, State::Refused { cycle: fresh(cycle) }, why.join("; "), numbers, now);
    Step { next: next.map(|(next, note)| (next, Note { findings, ..note })), act }
}

/// An act that went wrong: it is done again, some times.
fn failed(wheel: &Flywheel, why: &str, change: &str, lasting: bool, now: i64) -> Step {
    let mut next = wheel.clone();
    let Some(cycle) = next.state.cycle_mut() else { return Step::default() };
    cycle.attempts += 1;
    let attempts = cycle.attempts;
    if lasting || attempts >= ATTEMPTS {
        let of = wheel.state.word().as_str().to_owned();
        let finding = Finding { of, found: why.to_owned(), change: change.to_owned() };
        return refuse(wheel, &cycle.clone(), vec![finding], Value::Null, now);
    }
    let note = note(&next, "failed", format!("{why}; try {} of {ATTEMPTS} follows", attempts + 1), now);
    Step { next: Some((next, note)), act: None }
}

/// Checks that keep a snapshot from being trained on.
fn quality(rule: &QualityRule, checks: &[Check], tainted: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    if tainted {
        findings.push(Finding {
            of: "tainted".to_owned(),
            found: "a person behind it was erased".to_owned(),
            change: "the next cycle builds another snapshot, without them".to_owned(),
        });
    }
    let stops = |check: &&Check| match check.status {
        Status::Fail => !rule.allow.contains(&check.name),
        Status::Warn => rule.strict && !rule.allow.contains(&check.name),
        Status::Pass | Status::NotApplicable => false,
    };
    findings.extend(checks.iter().filter(stops).map(|check| Finding {
        of: check.name.clone(),
        found: check.explanation.clone(),
        change: format!("mend what the report says, or let it be with `quality.allow = [\"{}\"]`", check.name),
    }));
    findings
}

/// Counts of checks, and the values of those that did not pass.
fn of_checks(checks: &[Check]) -> Value {
    let named = |status: Status| -> Vec<&str> {
        checks.iter().filter(|check| check.status == status).map(|check| check.name.as_str()).collect()
    };
    json!({ "checks": checks.len(), "fail": named(Status::Fail), "warn": named(Status::Warn) })
}

/// Gates that are shut.
fn gates(report: &GateReport) -> Vec<Finding> {
    let shut: Vec<Finding> = report
        .checks
        .iter()
        .filter(|check| !check.passed)
        .map(|check| Finding {
            of: check.gate.clone(),
            found: check.finding.clone(),
            change: check.change.clone().unwrap_or_else(|| "measure it".to_owned()),
        })
        .collect();
    if shut.is_empty() && !report.passed {
        let change = "switch a gate on in `gates`".to_owned();
        return vec![Finding { of: "gates".to_owned(), found: "none was asked, and what was not measured does not pass".to_owned(), change }];
    }
    shut
}

impl Note {
    /// Whether a state was entered, and not only an act tried or a wish told.
    pub fn is_state(&self) -> bool {
        self.action == self.state.as_str()
    }

    /// Whether a cycle ended with it.
    pub fn is_end(&self) -> bool {
        self.is_state() && self.state.is_end()
    }
}
