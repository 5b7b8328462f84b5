//! Whole cycles of values: good ones, refused ones, and ones that are killed at every place.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::machine::ATTEMPTS;
use super::*;
use crate::dataset::Query;
use crate::evaluate::{GateCheck, GateReport, Gates};
use crate::quality::{Check, Status};

const NAME: &str = "shorter";
const ENOUGH: Counts = Counts { preferences: 10, raters: 3 };
const GOOD_WAY: [Word; 7] =
    [Word::Snapshot, Word::Quality, Word::Training, Word::Evaluation, Word::Canary, Word::Promoted, Word::Waiting];

fn policy() -> Policy {
    Policy {
        model: "assistant".into(),
        base: "base".into(),
        dataset: "shorter".into(),
        when: When { preferences: 10, raters: 3, at: None, need: Need::All },
        feedback: Query { held_out: 0.25, ..Query::default() },
        window: Some(60),
        quality: QualityRule { allow: vec!["length_bias".into()], ..QualityRule::default() },
        recipe: json!({"type": "dpo"}),
        measuring: Measuring {
            text: Some("ordinary.txt".into()),
            prompts: 5,
            max_tokens: 64,
            temperature: 1.0,
            seed: 0,
            rules: Vec::new(),
            weights: None,
            keep: Measuring::KEEP,
        },
        gates: Gates::default(),
        rollout: json!({"kind": "canary"}),
    }
}

fn check(name: &str, status: Status) -> Check {
    Check {
        name: name.into(),
        status,
        value: None,
        interval: None,
        threshold: None,
        explanation: format!("what {name} found"),
        examples: Vec::new(),
    }
}

fn gate(name: &str, passed: bool) -> GateCheck {
    GateCheck {
        gate: name.into(),
        passed,
        value: Some(0.4),
        threshold: 0.5,
        finding: format!("{name} is 0.4"),
        change: (!passed).then(|| "train on more".to_owned()),
    }
}

fn report(checks: &[GateCheck]) -> GateReport {
    GateReport { passed: !checks.is_empty() && checks.iter().all(|check| check.passed), checks: checks.to_vec() }
}

/// Where all the work is, as it is after a kill, too. What has an effect is kept by its key.
#[derive(Clone, Debug, Default)]
struct World {
    effects: BTreeSet<String>,
}

impl World {
    fn done(&mut self, act: &Act) {
        self.effects.insert(act.key.to_string());
    }

    fn see(&self, wheel: &Flywheel) -> Seen {
        let done = self.effects.contains(&wheel.key(NAME).to_string());
        match wheel.state.word() {
            Word::Waiting => Seen::Feedback(ENOUGH),
            Word::Quality => Seen::Report { checks: vec![check("size", Status::Pass)], tainted: false },
            _ if !done => Seen::Nothing,
            Word::Snapshot => Seen::Snapshot { dataset: "shorter@1".into(), numbers: json!({"train": 30}) },
            Word::Training => Seen::Adapter { adapter: "a@1".into(), numbers: Value::Null },
            Word::Evaluation => Seen::Gates(report(&[gate("accuracy", true)])),
            Word::Canary => Seen::Promoted { why: "everything is met".into(), numbers: Value::Null },
            Word::Promoted | Word::Refused | Word::RolledBack => Seen::Cleared,
        }
    }
}

/// What comes next, as the store would keep it.
fn kept(wheel: &Flywheel) -> Flywheel {
    serde_json::from_str(&serde_json::to_string(wheel).unwrap()).unwrap()
}

/// Takes a loop on by what is seen; the note where a state was entered.
fn seen(wheel: &mut Flywheel, seen: &Seen, now: i64) -> Option<Note> {
    let (next, note) = step(NAME, wheel, Some(&policy()), seen, now).next?;
    *wheel = kept(&next);
    assert_eq!(*wheel, next);
    Some(note)
}

/// A loop in this state, on the good way.
fn at(word: Word) -> Flywheel {
    let (mut wheel, mut world) = (Flywheel::new(0), World::default());
    while wheel.state.word() != word {
        let found = world.see(&wheel);
        match step(NAME, &wheel, Some(&policy()), &found, 5).act {
            Some(act) => world.done(&act),
            None => assert!(seen(&mut wheel, &found, 5).is_some()),
        }
    }
    wheel
}

#[test]
fn a_good_cycle_goes_through_every_gate_to_a_promotion_and_waits_for_what_is_new() {
    let (mut wheel, mut world, mut way) = (Flywheel::new(1), World::default(), Vec::new());
    for now in 10.. {
        let found = world.see(&wheel);
        let step = step(NAME, &wheel, Some(&policy()), &found, now);
        if let Some(act) = &step.act {
            assert_eq!(act.key, wheel.key(NAME));
            world.done(act);
        }
        let Some((next, note)) = step.next else { continue };
        assert!(note.is_state());
        way.push(note.state);
        wheel = next;
        if note.state == Word::Waiting {
            assert_eq!((wheel.cycle, wheel.counted_from), (1, 10), "what came since the cycle began is new");
            break;
        }
    }
    assert_eq!(way, GOOD_WAY);
    assert_eq!(world.effects.len(), 5);
}

#[test]
fn the_snapshot_is_of_the_feedback_before_the_cycle_whenever_it_is_asked_for() {
    let policy = policy();
    let query = policy.query(100_000_000);
    assert_eq!((query.since, query.until, query.held_out), (Some(40_000_000), Some(100_000_000), 0.25));
    let bounded = Policy { window: None, feedback: Query { since: Some(3), until: Some(9), ..Query::default() }, ..policy };
    assert_eq!((bounded.query(100).since, bounded.query(100).until, bounded.query(5).until), (Some(3), Some(9), Some(5)));
}

#[test]
fn a_quality_gate_says_which_check_shut_it_and_lets_be_what_the_policy_lets_be() {
    let look = |checks: Vec<Check>, tainted| {
        let mut wheel = at(Word::Quality);
        let note = seen(&mut wheel, &Seen::Report { checks, tainted }, 7).unwrap();
        (wheel.state.word(), note)
    };
    let allowed = vec![check("length_bias", Status::Fail), check("drift", Status::Warn), check("size", Status::NotApplicable)];
    let (word, note) = look(allowed.clone(), false);
    assert_eq!((word, &note.numbers["warn"]), (Word::Training, &json!(["drift"])));
    let (word, note) = look(vec![check("size", Status::Fail)], false);
    assert_eq!((word, note.why.as_str(), note.is_end()), (Word::Refused, "size: what size found", true));
    assert!(note.findings[0].change.contains("quality.allow = [\"size\"]"), "{note:?}");
    let (word, note) = look(allowed, true);
    assert_eq!((word, note.findings[0].of.as_str()), (Word::Refused, "tainted"));

    let mut wheel = at(Word::Quality);
    wheel.state.cycle_mut().unwrap().policy.quality.strict = true;
    let warned = Seen::Report { checks: vec![check("drift", Status::Warn)], tainted: false };
    assert_eq!(seen(&mut wheel, &warned, 7).unwrap().state, Word::Refused);
}

#[test]
fn a_shut_gate_refuses_with_what_would_open_it_and_nothing_open_is_no_pass() {
    let mut wheel = at(Word::Evaluation);
    let shut = report(&[gate("accuracy", false), gate("text_loss", true), gate("kl_per_token", false)]);
    let note = seen(&mut wheel, &Seen::Gates(shut), 7).unwrap();
    assert_eq!(note.why, "accuracy: accuracy is 0.4; kl_per_token: kl_per_token is 0.4");
    let changes: Vec<(&str, &str)> = note.findings.iter().map(|finding| (finding.of.as_str(), finding.change.as_str())).collect();
    assert_eq!(changes, [("accuracy", "train on more"), ("kl_per_token", "train on more")]);
    assert_eq!(note.numbers["gates"].as_array().unwrap().len(), 3);
    assert_eq!(step(NAME, &wheel, Some(&policy()), &Seen::Nothing, 8).act.unwrap().work, Work::Clear);
    assert_eq!(seen(&mut wheel, &Seen::Cleared, 9).unwrap().state, Word::Waiting);

    let mut wheel = at(Word::Evaluation);
    let note = seen(&mut wheel, &Seen::Gates(report(&[])), 7).unwrap();
    assert_eq!((note.state, note.findings[0].of.as_str()), (Word::Refused, "gates"));
}

#[test]
fn a_rollback_ends_the_cycle_with_its_reason() {
    let mut wheel = at(Word::Canary);
    let note = seen(
        &mut wheel,
        &Seen::RolledBack { why: "the guardrail error_rate is broken".into(), numbers: json!({"exposures": [5, 4]}) },
        7,
    )
    .unwrap();
    assert_eq!((note.state, note.why.as_str()), (Word::RolledBack, "the guardrail error_rate is broken"));
    assert_eq!(note.numbers["exposures"], json!([5, 4]));
}

#[test]
fn what_fails_is_tried_again_and_then_given_up() {
    let failed = |lasting| Seen::Failed { why: "the disk is full".into(), change: "make room".into(), lasting };
    for word in [Word::Snapshot, Word::Training, Word::Evaluation, Word::Canary] {
        let mut wheel = at(word);
        for _ in 1..ATTEMPTS {
            let note = seen(&mut wheel, &failed(false), 7).unwrap();
            assert!(!note.is_state() && note.action == "failed", "{note:?}");
            assert_eq!(wheel.state.word(), word);
            assert!(step(NAME, &wheel, Some(&policy()), &Seen::Nothing, 7).act.is_some(), "it is tried again");
        }
        let note = seen(&mut wheel, &failed(false), 8).unwrap();
        assert_eq!((note.state, note.why.as_str()), (Word::Refused, format!("{}: the disk is full", word.as_str()).as_str()));
        assert_eq!(note.findings[0].change, "make room");
        let mut wheel = at(word);
        assert_eq!(seen(&mut wheel, &failed(true), 8).unwrap().state, Word::Refused);
        // Clearing away is tried until it works.
        assert_eq!(step(NAME, &wheel, Some(&policy()), &failed(true), 9), Step::default());
    }
    let mut wheel = at(Word::Training);
    seen(&mut wheel, &failed(false), 7);
    seen(&mut wheel, &Seen::Adapter { adapter: "a@1".into(), numbers: Value::Null }, 8);
    assert_eq!(wheel.state.cycle().unwrap().attempts, 0, "each state has its own tries");
}

#[test]
fn a_cycle_keeps_the_policy_that_it_began_with() {
    let mut wheel = at(Word::Snapshot);
    let other = Policy { quality: QualityRule::default(), dataset: "other".into(), ..policy() };
    let found = Seen::Snapshot { dataset: "shorter@1".into(), numbers: Value::Null };
    wheel = step(NAME, &wheel, Some(&other), &found, 7).next.unwrap().0;
    assert_eq!(wheel.state.cycle().unwrap().policy, policy());
    // Also where the loop is not configured any more; a new one does not begin then.
    let allowed = Seen::Report { checks: vec![check("length_bias", Status::Fail)], tainted: false };
    assert_eq!(step(NAME, &wheel, None, &allowed, 8).next.unwrap().0.state.word(), Word::Training);
    assert_eq!(step(NAME, &Flywheel::new(0), None, &Seen::Feedback(ENOUGH), 8), Step::default());
}

#[test]
fn people_may_pause_resume_and_run() {
    let few = Seen::Feedback(Counts::default());
    let mut wheel = Flywheel::new(0);
    let wanted = |wheel: &Flywheel, wanted| wish(wheel, wanted, "key ann", 3).unwrap();
    let (asked, note) = wanted(&wheel, Wish::Run).unwrap();
    assert_eq!((note.action.as_str(), wanted(&asked, Wish::Run), wanted(&wheel, Wish::Resume)), ("asked", None, None));
    let (paused, _) = wanted(&asked, Wish::Pause).unwrap();
    assert_eq!((paused.asked.clone(), wanted(&paused, Wish::Pause)), (None, None));
    assert_eq!(wish(&paused, Wish::Run, "key ann", 4), Err(WishError::Paused));
    for found in [&few, &Seen::Feedback(ENOUGH), &Seen::Nothing] {
        assert_eq!(step(NAME, &paused, Some(&policy()), found, 5), Step::default());
    }
    let (resumed, _) = wanted(&paused, Wish::Resume).unwrap();
    assert_eq!(resumed, wheel);
    assert!(seen(&mut wheel, &few, 5).is_none());
    wheel = asked;
    let note = seen(&mut wheel, &few, 5).unwrap();
    assert_eq!((note.why.as_str(), wheel.cycle, wheel.asked.as_ref()), ("key ann wanted it", 1, None));
    assert_eq!(wish(&wheel, Wish::Run, "key ann", 6), Err(WishError::Underway(1)));
    // A paused loop leaves its work alone, wherever it is.
    for word in [Word::Snapshot, Word::Training, Word::Evaluation, Word::Canary, Word::Promoted] {
        let paused = wanted(&at(word), Wish::Pause).unwrap().0;
        assert_eq!(step(NAME, &paused, Some(&policy()), &Seen::Nothing, 5), Step::default());
    }
}

/// A kill, and where it falls.
#[derive(Clone, Copy, Debug)]
enum Kill {
    No,
    BeforeTheAct,
    AfterTheAct,
    Between,
}

fn any_seen() -> impl Strategy<Value = Seen> {
    let words = prop_oneof![Just(Status::Pass), Just(Status::Warn), Just(Status::Fail), Just(Status::NotApplicable)];
    let checks = prop::collection::vec(("[a-c]|length_bias", words), 0..3)
        .prop_map(|checks| checks.iter().map(|(name, status)| check(name, *status)).collect::<Vec<_>>());
    let gates = prop::collection::vec(any::<bool>(), 0..3)
        .prop_map(|open| Seen::Gates(report(&open.iter().map(|open| gate("accuracy", *open)).collect::<Vec<_>>())));
    prop_oneof![
        (0u64..20, 0u64..5).prop_map(|(preferences, raters)| Seen::Feedback(Counts { preferences, raters })),
        Just(Seen::Nothing),
        Just(Seen::Underway),
        Just(Seen::Snapshot { dataset: "shorter@1".into(), numbers: Value::Null }),
        (checks, any::<bool>()).prop_map(|(checks, tainted)| Seen::Report { checks, tainted }),
        Just(Seen::Adapter { adapter: "a@1".into(), numbers: Value::Null }),
        gates,
        Just(Seen::Promoted { why: "met".into(), numbers: Value::Null }),
        Just(Seen::RolledBack { why: "broken".into(), numbers: Value::Null }),
        Just(Seen::Cleared),
        any::<bool>().prop_map(|lasting| Seen::Failed { why: "no".into(), change: "yes".into(), lasting }),
    ]
}

proptest! {
    #[test]
    fn killed_anywhere_it_goes_on_and_does_everything_once(
        kills in prop::collection::vec(prop_oneof![
            2 => Just(Kill::No), 1 => Just(Kill::BeforeTheAct), 1 => Just(Kill::AfterTheAct), 1 => Just(Kill::Between),
        ], 0..60),
    ) {
        let (mut store, mut world, mut way) = (Flywheel::new(0), World::default(), Vec::new());
        let mut acts: Vec<String> = Vec::new();
        let mut kills = kills.into_iter();
        for now in 1..500 {
            let kill = kills.next().unwrap_or(Kill::No);
            // What a server finds when it starts: only what was kept.
            let wheel = kept(&store);
            let step = step(NAME, &wheel, Some(&policy()), &world.see(&wheel), now);
            if let Some(act) = step.act {
                if !matches!(kill, Kill::BeforeTheAct) {
                    acts.push(act.key.to_string());
                    world.done(&act);
                }
            } else if let Some((next, note)) = step.next && !matches!(kill, Kill::Between) {
                store = next;
                way.push(note.state);
            }
            if way.last() == Some(&Word::Waiting) {
                break;
            }
        }
        prop_assert_eq!(&way, &GOOD_WAY);
        let keys: BTreeSet<String> = acts.into_iter().collect();
        prop_assert_eq!(keys, world.effects);
    }

    #[test]
    fn whatever_is_seen_nothing_goes_around_a_gate(steps in prop::collection::vec((any_seen(), any::<bool>()), 0..200)) {
        let mut wheel = Flywheel::new(0);
        let (mut fit, mut open) = (false, false);
        for (now, (found, clear)) in (1..).zip(steps) {
            // Random looks rarely fit: now and then the one that takes it on.
            let found = if clear { World { effects: BTreeSet::from([wheel.key(NAME).to_string()]) }.see(&wheel) } else { found };
            let before = wheel.clone();
            let Step { next, act } = step(NAME, &wheel, Some(&policy()), &found, now);
            if let Some(act) = act {
                prop_assert_eq!(&found, &Seen::Nothing);
                prop_assert_eq!(act.key, wheel.key(NAME));
                let canary = matches!(act.work, Work::Canary { .. });
                prop_assert!(!canary || (fit && open), "rolled out behind a shut gate");
            }
            let Some((next, note)) = next else { continue };
            prop_assert_eq!(kept(&next), next.clone());
            prop_assert_eq!(note.state, next.state.word());
            prop_assert!(next.cycle == before.cycle || (next.cycle == before.cycle + 1 && note.state == Word::Snapshot));
            match (&found, note.state) {
                (_, Word::Snapshot) if note.is_state() => (fit, open) = (false, false),
                (Seen::Report { checks, tainted }, Word::Training) => {
                    fit = !tainted && checks.iter().all(|check| check.status != Status::Fail || check.name == "length_bias");
                }
                (Seen::Gates(report), Word::Canary) => open = report.passed,
                _ => {}
            }
            prop_assert!(note.state != Word::Promoted || (fit && open));
            if note.state == Word::Refused && note.is_state() {
                prop_assert!(!note.findings.is_empty() && note.findings.iter().all(|finding| !finding.change.is_empty()));
            }
            wheel = next;
        }
    }
}
