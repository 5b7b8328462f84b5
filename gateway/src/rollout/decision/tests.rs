mod verdicts;

use super::*;
use crate::rollout::spec::Spec;
use proptest::prelude::*;
use serde_json::{Value, json};
use tidemill_store::Actor;

const SECOND: i64 = 1_000_000;

fn spec(more: Value) -> Spec {
    let mut body = json!({
        "name": "r", "model": "assistant", "kind": "canary", "arms": [{"variant": "old"}, {"variant": "new"}],
        "steps": [{"set_weight": 5}, {"pause": 60}, {"set_weight": 20}, {"pause": {"samples": 400}}, {"set_weight": 50}],
        "metrics": [
            {"metric": "error_rate", "guardrail": {"max": 0.05}},
            {"metric": "feedback.thumb", "goal": {"min": 0}},
        ],
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    Spec::parse(&body).unwrap()
}

fn share(successes: u64, trials: u64) -> Option<Measure> {
    Some(Measure::Share { successes, trials })
}

/// Units in each arm; errors of the treatment; thumbs up of control and treatment among a tenth of the units.
fn measured(units: u64, errors: u64, thumbs: Option<[f64; 2]>) -> Measured {
    let given = units / 10;
    let up = |arm: usize| thumbs.and_then(|shares| share((shares[arm] * given as f64).round() as u64, given));
    Measured {
        exposures: vec![units, units],
        ended: vec![units, units],
        metrics: [
            ("error_rate".to_owned(), vec![share(0, units), share(errors, units)]),
            ("goal feedback.thumb".to_owned(), vec![up(0), up(1)]),
        ]
        .into(),
        displaced: false,
    }
}

fn no_chance() -> f64 {
    panic!("only a bandit draws")
}

/// Measures once a second and tells the actions that were not waiting.
fn run(spec: &Spec, state: &mut State, from: i64, measurements: &[Measured]) -> Vec<Decision> {
    let mut rows = Vec::new();
    for (index, measured) in measurements.iter().enumerate() {
        let (next, decision) = measure(spec, state, measured, from + index as i64 * SECOND, &mut no_chance);
        *state = next;
        if decision.action != Action::Hold {
            rows.push(decision);
        }
    }
    rows
}

fn begin(spec: &Spec) -> State {
    let (state, decision) = start(spec, "ann", 0);
    assert_eq!((decision.action, decision.by.as_deref()), (Action::Start, Some("ann")));
    state
}

fn share_of_treatment(state: &State) -> f64 {
    state.coverage * state.weights[1]
}

#[test]
fn a_good_canary_climbs_its_steps_and_is_promoted_by_its_goal() {
    let spec = spec(json!({}));
    let mut state = begin(&spec);
    assert!((share_of_treatment(&state) - 0.05).abs() < 1e-12);
    let good = |units| measured(units, units / 100, Some([0.5, 0.7]));
    // A minute must pass, then 400 units of the treatment after the 300 there were.
    assert!(run(&spec, &mut state, 0, &vec![good(300); 59]).is_empty());
    let rows = run(&spec, &mut state, 60 * SECOND, &vec![good(300); 30]);
    assert_eq!(rows.iter().map(|row| row.step).collect::<Vec<_>>(), [2, 3], "{rows:?}");
    assert!((share_of_treatment(&state) - 0.2).abs() < 1e-12);
    let rows = run(&spec, &mut state, 100 * SECOND, &[good(699), good(700), good(701), good(1000), good(9000)]);
    assert_eq!(rows.len(), 3, "{rows:?}");
    assert!((rows[1].coverage * rows[1].weights[1] - 0.5).abs() < 1e-12);
    assert_eq!(rows[2].action, Action::Promote { arm: 1 });
    assert_eq!((state.status, share_of_treatment(&state)), (Status::Promoted { arm: 1 }, 1.0));
    // The row holds what it stood on.
    let goal = rows[2].judgements.iter().find(|judgement| judgement.metric == "goal feedback.thumb").unwrap();
    assert_eq!((goal.verdict, goal.samples), (Verdict::Met, 900));
    assert!(goal.interval.unwrap().low > 0.0 && rows[2].sample_ratio.unwrap().p_value == 1.0);
    assert_eq!(rows[2].exposures, [9000, 9000]);
}

/// One measurement late in a canary; what follows from it.
#[test]
fn what_follows_from_a_measurement() {
    let promote = Action::Promote { arm: 1 };
    let good = measured(9000, 90, Some([0.5, 0.7]));
    let lopsided = Measured { ended: vec![9000, 8100], ..good.clone() };
    let none_at_all = Measured { metrics: Default::default(), ..good.clone() };
    let nan = {
        let mut nan = good.clone();
        let mean = Measure::Mean { sum: f64::NAN, sum_squares: 1.0, count: 900 };
        nan.metrics.insert("goal feedback.thumb".into(), vec![Some(mean), Some(mean)]);
        nan
    };
    let impossible = {
        let mut impossible = good.clone();
        impossible.metrics.insert("error_rate".into(), vec![share(0, 9000), share(9001, 9000)]);
        impossible
    };
    let nothing: Value = json!({});
    for (name, more, measured, expected) in [
        ("all is met", &nothing, good.clone(), promote),
        (
            "a guardrail is surely broken, though the goal is met",
            &nothing,
            measured(9000, 700, Some([0.5, 0.7])),
            Action::RollBack,
        ),
        ("a guardrail may be broken", &nothing, measured(9000, 460, Some([0.5, 0.7])), Action::Hold),
        (
            "the same, measured and not acted on",
            &json!({"metrics": [
            {"metric": "error_rate", "guardrail": {"max": 0.05}, "dry_run": true},
            {"metric": "feedback.thumb", "goal": {"min": 0}}]}),
            measured(9000, 700, Some([0.5, 0.7])),
            promote,
        ),
        ("the goal is open", &nothing, measured(9000, 90, Some([0.5, 0.51])), Action::Hold),
        ("the goal is surely missed", &nothing, measured(9000, 90, Some([0.7, 0.5])), Action::RollBack),
        ("too few thumbs", &nothing, measured(300, 3, Some([0.0, 1.0])), Action::Hold),
        ("too few units", &json!({"min_exposure": 9001}), good.clone(), Action::Hold),
        (
            "missed, but too few units to believe it",
            &json!({"min_exposure": 9001}),
            measured(9000, 90, Some([0.7, 0.5])),
            Action::Hold,
        ),
        ("no thumbs came", &nothing, measured(9000, 90, None), Action::Hold),
        ("nothing came", &nothing, none_at_all, Action::Hold),
        ("no numbers came", &nothing, nan, Action::Hold),
        ("impossible numbers came", &nothing, impossible, Action::Hold),
        ("units are missing in an arm", &nothing, lopsided, Action::Pause { reason: PauseReason::SampleRatio }),
        // At one look chance would do this once in two thousand times (χ²), and at any of many once in ten.
        ("few units, and more in one arm", &nothing, Measured { ended: vec![10, 33], ..good.clone() }, Action::Hold),
        ("no units have ended", &nothing, Measured { ended: vec![], ..good.clone() }, Action::Hold),
        ("a person must approve", &json!({"approval": true}), good.clone(), Action::AwaitApproval),
        (
            "out of time",
            &json!({"deadline": 500}),
            measured(9000, 90, Some([0.5, 0.51])),
            Action::Pause { reason: PauseReason::Deadline },
        ),
        (
            "out of time, and back",
            &json!({"deadline": 500, "at_deadline": "rollback"}),
            measured(9000, 90, Some([0.5, 0.51])),
            Action::RollBack,
        ),
    ] {
        let spec = spec(more.clone());
        let mut state = begin(&spec);
        state.step = spec.steps.len();
        let (next, decision) = measure(&spec, &state, &measured, 1000 * SECOND, &mut no_chance);
        assert_eq!(decision.action, expected, "{name}: {}", decision.reason);
        let over = matches!(expected, Action::Promote { .. } | Action::RollBack);
        assert_eq!(next.status.is_over(), over, "{name}");
    }
}

#[test]
fn a_variant_that_always_fails_is_rolled_back_after_two_requests_and_without_any_feedback() {
    let spec = spec(json!({}));
    let mut state = begin(&spec);
    let rows = run(&spec, &mut state, SECOND, &[measured(1, 1, None), measured(2, 2, None)]);
    assert_eq!(rows.last().map(|row| row.action), Some(Action::RollBack), "{rows:?}");
    assert_eq!((state.coverage, state.weights), (0.0, vec![1.0, 0.0]));
}

#[test]
fn a_failure_limit_allows_so_many_failures() {
    let spec = spec(json!({"metrics": [{"metric": "error_rate", "guardrail": {"max": 0.05}, "failure_limit": 2}]}));
    let mut state = begin(&spec);
    let (bad, good) = (measured(500, 100, None), measured(5000, 100, None));
    assert!(
        run(&spec, &mut state, SECOND, &[bad.clone(), good.clone(), bad.clone(), good])
            .iter()
            .all(|row| row.action != Action::RollBack)
    );
    assert_eq!(run(&spec, &mut state, 9 * SECOND, &[bad]).last().unwrap().action, Action::RollBack);
}

#[test]
fn a_source_that_is_down_pauses_and_the_rollout_goes_on_when_it_is_back() {
    let spec = spec(json!({}));
    let mut state = begin(&spec);
    let (down, up) = (Measured { metrics: Default::default(), ..measured(300, 0, None) }, measured(300, 3, Some([0.5, 0.5])));
    let rows = run(&spec, &mut state, SECOND, &vec![down.clone(); 20]);
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(rows[0].action, Action::Pause { reason: PauseReason::Inconclusive });
    assert!((share_of_treatment(&state) - 0.05).abs() < 1e-12, "the weight stays");
    let rows = run(&spec, &mut state, 30 * SECOND, &[up]);
    assert_eq!((rows[0].action, state.status), (Action::Resume, Status::Running));
    // A guardrail rolls back while it is paused, too.
    run(&spec, &mut state, 40 * SECOND, &vec![down; 5]);
    let rows = run(&spec, &mut state, 50 * SECOND, &[measured(400, 200, None)]);
    assert_eq!(rows[0].action, Action::RollBack);
}

#[test]
fn a_sample_ratio_mismatch_stays_until_a_person_resumes() {
    let spec = spec(json!({}));
    let mut state = begin(&spec);
    state.step = spec.steps.len();
    let good = measured(9000, 90, Some([0.5, 0.7]));
    let lopsided = Measured { ended: vec![9000, 8100], ..good.clone() };
    let rows = run(&spec, &mut state, SECOND, &[lopsided.clone(), good.clone(), good.clone()]);
    assert_eq!(rows.len(), 1);
    state = act(&spec, &state, Act::Resume, "ann", 9 * SECOND).unwrap().0;
    assert_eq!(run(&spec, &mut state, 10 * SECOND, &[lopsided])[0].action, Action::Pause { reason: PauseReason::SampleRatio });
    state = act(&spec, &state, Act::Resume, "ann", 11 * SECOND).unwrap().0;
    assert_eq!(run(&spec, &mut state, 12 * SECOND, &[good])[0].action, Action::Promote { arm: 1 });
}

#[test]
fn who_resumes_after_a_mismatch_begins_to_count_anew() {
    let spec = spec(json!({}));
    let mut state = begin(&spec);
    state.step_exposures = 70;
    let person = act(&spec, &state, Act::Pause, "ann", 5).unwrap().0;
    let resumed = act(&spec, &person, Act::Resume, "ann", 6).unwrap().0;
    assert_eq!((resumed.since, resumed.changed, resumed.step_exposures, resumed.recounts), (0, 0, 70, 0));
    run(&spec, &mut state, SECOND, &[Measured { ended: vec![9000, 8100], ..measured(9000, 90, None) }]);
    assert_eq!(state.status, Status::Paused { reason: PauseReason::SampleRatio });
    let resumed = act(&spec, &state, Act::Resume, "ann", 9 * SECOND).unwrap().0;
    assert_eq!((resumed.since, resumed.changed, resumed.step_exposures, resumed.recounts), (9 * SECOND, 9 * SECOND, 0, 1));
}

#[test]
fn shares_that_change_often_cry_wolf_no_more_often() {
    let spec = spec(json!({"kind": "ab", "steps": null}));
    // 0.008 at any of many looks.
    let odd = Measured { ended: vec![510, 400], ..measured(900, 9, Some([0.5, 0.5])) };
    let begun = begin(&spec);
    for (recounts, paused) in [(0, true), (1, false), (1000, false)] {
        let state = State { recounts, ..begun.clone() };
        let (next, row) = measure(&spec, &state, &odd, SECOND, &mut no_chance);
        let test = row.sample_ratio.unwrap();
        assert!(test.anytime_p > 0.005 && test.anytime_p < 0.01, "{test:?}");
        assert_eq!(next.status != Status::Running, paused, "{recounts}");
    }
    let limits: f64 = (1..100_000).map(|recounts| 0.01 / f64::from(recounts) / f64::from(recounts + 1)).sum();
    assert!(limits < 0.01);
}

#[test]
fn beside_what_the_name_serves_no_more_nothing_rises_and_a_broken_variant_is_gone_all_the_same() {
    let spec = spec(json!({"deadline": 500}));
    let mut state = begin(&spec);
    state.step = spec.steps.len();
    let good = Measured { displaced: true, ..measured(9000, 90, Some([0.5, 0.7])) };
    let (next, row) = measure(&spec, &state, &good, SECOND, &mut no_chance);
    assert_eq!((row.action, next.status), (Action::Hold, Status::Running));
    assert!(row.reason.contains("not the control any more"), "{}", row.reason);
    let back = Measured { displaced: false, ..good.clone() };
    assert_eq!(measure(&spec, &state, &back, SECOND, &mut no_chance).1.action, Action::Promote { arm: 1 });
    let broken = Measured { displaced: true, ..measured(9000, 900, None) };
    assert_eq!(measure(&spec, &state, &broken, SECOND, &mut no_chance).1.action, Action::RollBack);
    let late = measure(&spec, &state, &good, 600 * SECOND, &mut no_chance).1.action;
    assert_eq!(late, Action::Pause { reason: PauseReason::Deadline });
}

#[test]
fn people_pause_resume_approve_promote_and_roll_back() {
    let spec = spec(json!({"approval": true}));
    let mut state = begin(&spec);
    let good = measured(9000, 90, Some([0.5, 0.7]));
    let try_act = |state: &State, wish| act(&spec, state, wish, "ann", 5 * SECOND).map(|(state, _)| state);
    assert_eq!(try_act(&state, Act::Resume), Err(ActError::NotPaused));
    assert_eq!(try_act(&state, Act::Approve), Err(ActError::NothingToApprove));
    assert_eq!(try_act(&state, Act::Promote { arm: 0 }), Err(ActError::NoSuchArm(0)));
    assert_eq!(try_act(&state, Act::Promote { arm: 2 }), Err(ActError::NoSuchArm(2)));
    state = try_act(&state, Act::Pause).unwrap();
    assert_eq!(try_act(&state, Act::Pause), Err(ActError::Paused));
    assert!(run(&spec, &mut state, 100 * SECOND, &vec![good.clone(); 3]).is_empty(), "paused is paused");
    state = try_act(&state, Act::Resume).unwrap();
    state.step = spec.steps.len();
    assert_eq!(run(&spec, &mut state, 200 * SECOND, std::slice::from_ref(&good))[0].action, Action::AwaitApproval);
    let rolled_back = try_act(&state, Act::RollBack).unwrap();
    state = try_act(&state, Act::Approve).unwrap();
    assert_eq!(state.status, Status::Running, "what was approved is still measured once more");
    assert_eq!(run(&spec, &mut state, 300 * SECOND, &[good])[0].action, Action::Promote { arm: 1 });
    for over in [&state, &rolled_back] {
        for wish in [Act::Pause, Act::Resume, Act::Approve, Act::Promote { arm: 1 }] {
            assert_eq!(try_act(over, wish), Err(ActError::Over));
        }
    }
    assert_eq!(try_act(&rolled_back, Act::RollBack), Err(ActError::Over));
    assert_eq!((share_of_treatment(&rolled_back), share_of_treatment(&state)), (0.0, 1.0));
    // A promotion can be taken back, once.
    let back = try_act(&state, Act::RollBack).unwrap();
    assert_eq!((back.status, share_of_treatment(&back)), (Status::RolledBack, 0.0));
    assert_eq!(try_act(&back, Act::RollBack), Err(ActError::Over));
}

#[test]
fn under_four_eyes_another_key_approves_and_promotes() {
    let key = |name: &str, id: &str| Actor { name: format!("key {name}"), key: Some(id.to_owned()) };
    let (ann, bob) = (key("ann", "1"), key("bob", "2"));
    let spec = spec(json!({"steps": [{"set_weight": 5}, {"approval": true}, {"set_weight": 20}]})).under_four_eyes();
    let (begun, decision) = start(&spec, &ann, 0);
    assert_eq!(decision.by.as_deref(), Some("key ann"));
    let at_approval = |begun: State| State { awaiting: true, ..begun };
    let waiting = at_approval(begun.clone());
    for wanted in [Act::Approve, Act::Promote { arm: 1 }] {
        let refused = |by: &Actor| act(&spec, &waiting, wanted, by, 5).unwrap_err();
        assert_eq!(refused(&ann), ActError::SameKey);
        // Made again under its name, or the same key under another name.
        assert_eq!((refused(&key("ann", "3")), refused(&key("cleo", "1"))), (ActError::SameKey, ActError::SameKey));
        assert_eq!(refused(&"command line".into()), ActError::NoKey);
        assert!(act(&spec, &waiting, wanted, &bob, 5).is_ok());
    }
    // To stop takes nobody else.
    for wanted in [Act::Pause, Act::RollBack] {
        assert!(act(&spec, &waiting, wanted, &ann, 5).is_ok());
    }
    // To take back what two people promoted takes another key as well.
    let promoted = act(&spec, &waiting, Act::Promote { arm: 1 }, &bob, 5).unwrap().0;
    assert_eq!(act(&spec, &promoted, Act::RollBack, &ann, 6), Err(ActError::SameKey));
    assert_eq!(act(&spec, &promoted, Act::RollBack, "command line", 6), Err(ActError::NoKey));
    assert_eq!(act(&spec, &promoted, Act::RollBack, &bob, 6).unwrap().0.status, Status::RolledBack);
    // What the server began by itself, any key may approve.
    let waiting = at_approval(start(&spec, "loop nightly", 0).0);
    assert!(act(&spec, &waiting, Act::Approve, &ann, 5).is_ok());
    // Nothing is promoted by itself, however good it is, and rows from before there were starters are read.
    assert!(spec.approval);
    let mut old = serde_json::to_value(&begun).unwrap();
    old.as_object_mut().unwrap().retain(|name, _| !name.starts_with("started_"));
    assert_eq!(serde_json::from_value::<State>(old).unwrap().started_key, None);
}

#[test]
fn an_approval_step_waits_for_a_person() {
    let spec = spec(json!({"steps": [{"set_weight": 5}, {"approval": true}, {"set_weight": 20}]}));
    let mut state = begin(&spec);
    let good = measured(300, 3, Some([0.5, 0.5]));
    let rows = run(&spec, &mut state, SECOND, &vec![good.clone(); 5]);
    assert!(rows.iter().all(|row| row.action == Action::AwaitApproval) && rows.len() == 5);
    state = act(&spec, &state, Act::Approve, "ann", 9 * SECOND).unwrap().0;
    let rows = run(&spec, &mut state, 10 * SECOND, &vec![good; 2]);
    assert_eq!(rows.iter().map(|row| row.action).collect::<Vec<_>>(), [Action::Step, Action::Step]);
    assert!((share_of_treatment(&state) - 0.2).abs() < 1e-12);
}

#[test]
fn above_half_the_traffic_each_proportion_is_compared_for_itself() {
    let spec = spec(json!({"steps": [{"set_weight": 50}, {"set_weight": 80}]}));
    let mut state = begin(&spec);
    let rows = run(&spec, &mut state, 5 * SECOND, &[measured(300, 3, Some([0.5, 0.5]))]);
    assert_eq!(rows[0].weights.iter().map(|weight| (weight * 100.0).round()).collect::<Vec<_>>(), [20.0, 80.0]);
    assert_eq!((state.since, state.changed, state.step_exposures), (5 * SECOND, 5 * SECOND, 0));
}

#[test]
fn up_to_its_own_weight_a_canary_is_compared_as_one_also_when_a_database_lost_a_digit() {
    let arms = json!([{"variant": "old", "weight": 2}, {"variant": "new", "weight": 1}]);
    let spec = spec(json!({"arms": arms, "steps": [{"set_weight": 5}, {"set_weight": 30}]}));
    let mut state = begin(&spec);
    state.weights[0] -= f64::EPSILON;
    let good = Measured { exposures: vec![400, 200], ended: vec![400, 200], ..measured(300, 3, Some([0.5, 0.5])) };
    assert_eq!(run(&spec, &mut state, 5 * SECOND, &[good])[0].action, Action::Step);
    assert_eq!((state.since, state.changed, state.step_exposures), (0, 5 * SECOND, 200));
}

#[test]
fn of_several_treatments_the_best_that_meets_the_goal_is_promoted_and_all_must_miss_it_for_a_rollback() {
    let spec = spec(json!({"kind": "ab", "steps": null, "arms": [{"variant": "a"}, {"variant": "b"}, {"variant": "c"}]}));
    let arms = |shares: [f64; 3]| Measured {
        exposures: vec![9000; 3],
        ended: vec![9000; 3],
        metrics: [
            ("error_rate".to_owned(), vec![share(0, 9000); 3]),
            ("goal feedback.thumb".to_owned(), shares.map(|p| share((p * 900.0) as u64, 900)).into()),
        ]
        .into(),
        displaced: false,
    };
    for (shares, expected) in [
        ([0.5, 0.65, 0.7], Action::Promote { arm: 2 }),
        ([0.5, 0.7, 0.2], Action::Promote { arm: 1 }),
        ([0.5, 0.51, 0.2], Action::Hold),
        ([0.5, 0.3, 0.2], Action::RollBack),
    ] {
        let state = begin(&spec);
        let (_, decision) = measure(&spec, &state, &arms(shares), SECOND, &mut no_chance);
        assert_eq!(decision.action, expected, "{shares:?}");
    }
}

#[test]
fn a_shadow_completes_and_moves_nothing() {
    let spec = spec(json!({"kind": "shadow", "steps": null, "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.05}}]}));
    let mut state = begin(&spec);
    assert_eq!(act(&spec, &state, Act::Promote { arm: 1 }, "ann", 1).unwrap_err(), ActError::Shadow);
    assert_eq!(run(&spec, &mut state, SECOND, &[measured(5000, 50, None)])[0].action, Action::Complete);
    assert_eq!((state.status, share_of_treatment(&state)), (Status::Completed, 0.0));
}

#[test]
fn a_bandit_moves_to_the_better_arm_above_the_floor_and_ends_when_it_is_sure() {
    let spec = spec(
        json!({"kind": "bandit", "steps": null, "floor": 0.1, "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
        "arms": [{"variant": "a"}, {"variant": "b"}, {"variant": "c"}]}),
    );
    let arms = |counts: [(u64, u64); 3]| Measured {
        exposures: counts.map(|(_, trials)| 10 * trials).into(),
        ended: vec![0; 3],
        metrics: [("goal feedback.thumb".to_owned(), counts.map(|(up, all)| share(up, all)).into())].into(),
        displaced: false,
    };
    let mut random = tidemill_rlhf::random::Random::new(8);
    let state = begin(&spec);
    let (next, decision) = measure(&spec, &state, &arms([(50, 100), (60, 100), (40, 100)]), SECOND, &mut || random.unit());
    assert_eq!(decision.action, Action::Reallocate);
    assert!(next.weights[1] > 0.6 && next.weights.iter().all(|weight| *weight >= 0.1), "{:?}", next.weights);
    assert!((next.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    let sure = |counts| measure(&spec, &next, &arms(counts), 2 * SECOND, &mut || 0.5).1.action;
    assert_eq!(sure([(500, 1000), (700, 1000), (400, 1000)]), Action::Promote { arm: 1 });
    assert_eq!(sure([(700, 1000), (500, 1000), (400, 1000)]), Action::RollBack);
    // Draws alone move nobody to another arm.
    let (again, decision) = measure(&spec, &next, &arms([(50, 100), (60, 100), (40, 100)]), 2 * SECOND, &mut || random.unit());
    assert_eq!((decision.action, &again.weights, again.changed), (Action::Hold, &next.weights, next.changed));
    // Without any answer of the source nothing moves.
    let silent = Measured { metrics: Default::default(), ..arms([(0, 100); 3]) };
    let (same, decision) = measure(&spec, &next, &silent, 3 * SECOND, &mut no_chance);
    assert_eq!((decision.action, &same.weights), (Action::Hold, &next.weights));
}

#[test]
fn states_and_decisions_are_rows_that_read_back_as_they_were() {
    let spec = spec(json!({}));
    let mut state = begin(&spec);
    let rows = run(&spec, &mut state, 100 * SECOND, &[measured(300, 3, None), measured(400, 300, Some([0.5, 0.5]))]);
    for row in rows {
        assert_eq!(serde_json::from_str::<Decision>(&serde_json::to_string(&row).unwrap()).unwrap(), row);
    }
    assert_eq!(serde_json::from_str::<State>(&serde_json::to_string(&state).unwrap()).unwrap(), state);
}

/// Three hundred rollouts each, looked at after every 50 units: what happened how often, and after how many units of the
/// treatment on the median of those that were rolled back.
fn simulate(spec: &Spec, seed: u64, errors: [f64; 2], thumbs: [f64; 2]) -> (usize, usize, u64) {
    let mut random = tidemill_rlhf::random::Random::new(seed);
    let (mut promoted, mut rolled_back) = (0, Vec::new());
    for _ in 0..300 {
        let mut state = begin(spec);
        let (mut wrong, mut up) = ([0u64; 2], [0u64; 2]);
        for look in 1..=80 {
            for arm in 0..2 {
                for unit in 0..50 {
                    wrong[arm] += u64::from(random.unit() < errors[arm]);
                    // One unit in five says something.
                    up[arm] += u64::from(unit % 5 == 0 && random.unit() < thumbs[arm]);
                }
            }
            let units = 50 * look as u64;
            let arms = |counts: [u64; 2], of: u64| counts.map(|count| share(count, of)).to_vec();
            let metrics =
                [("error_rate".to_owned(), arms(wrong, units)), ("goal feedback.thumb".to_owned(), arms(up, units / 5))];
            let measured =
                Measured { exposures: vec![units; 2], ended: vec![units; 2], metrics: metrics.into(), displaced: false };
            state = measure(spec, &state, &measured, look * 30 * SECOND, &mut no_chance).0;
            match state.status {
                Status::Promoted { .. } => promoted += 1,
                Status::RolledBack => rolled_back.push(units),
                _ => continue,
            }
            break;
        }
    }
    rolled_back.sort_unstable();
    (promoted, rolled_back.len(), rolled_back.get(rolled_back.len() / 2).copied().unwrap_or(0))
}

#[test]
fn over_whole_rollouts_equals_rarely_win_the_better_wins_and_the_broken_is_gone_at_once() {
    let spec = spec(json!({"kind": "ab", "steps": null, "tuning": 500}));
    let (promoted, rolled_back, _) = simulate(&spec, 1, [0.02; 2], [0.6; 2]);
    assert!(promoted + rolled_back <= 15, "of equals {promoted} were promoted and {rolled_back} rolled back");
    let (promoted, rolled_back, _) = simulate(&spec, 2, [0.02; 2], [0.6, 0.75]);
    assert!(promoted >= 290 && rolled_back <= 3, "of better ones {promoted} were promoted and {rolled_back} rolled back");
    let (promoted, rolled_back, units) = simulate(&spec, 3, [0.02; 2], [0.75, 0.6]);
    assert!(promoted == 0 && rolled_back >= 290 && units <= 2000, "of worse ones {rolled_back} were rolled back, after {units}");
    let (promoted, rolled_back, units) = simulate(&spec, 4, [0.02, 0.3], [0.6, 0.9]);
    assert!(promoted == 0 && rolled_back == 300 && units <= 50, "of broken ones {rolled_back} were rolled back, after {units}");
}

/// Anything that a source may say.
fn any_measure() -> impl Strategy<Value = Option<Measure>> {
    prop_oneof![
        1 => Just(None),
        4 => (0u64..2000, 0u64..2000).prop_map(|(successes, trials)| Some(Measure::Share { successes, trials })),
        4 => (0u64..1000, 0u64..1000).prop_map(|(one, other)| share(one.min(other), one.max(other))),
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), -1e3f64..1e3].prop_flat_map(|sum| {
            (0u64..900).prop_map(move |count| Some(Measure::Mean { sum, sum_squares: sum.abs() * 9.0, count }))
        }),
        1 => (0u64..900, prop_oneof![Just(f64::NAN), 0f64..9.0]).prop_map(|(count, value)| {
            Some(Measure::Quantile { value, count, above: None, between: None })
        }),
    ]
}

fn any_measured() -> impl Strategy<Value = Measured> {
    let units = prop_oneof![(0u64..20_000).prop_map(|n| vec![n, n]), prop::collection::vec(0u64..20_000, 0..3)];
    let anything = (units, prop::collection::vec(any_measure(), 0..3), prop::collection::vec(any_measure(), 0..3)).prop_map(
        |(exposures, errors, thumbs)| Measured {
            ended: exposures.clone(),
            exposures,
            metrics: [("error_rate".to_owned(), errors), ("goal feedback.thumb".to_owned(), thumbs)].into(),
            displaced: false,
        },
    );
    // Good ones often enough that rollouts come to their end.
    prop_oneof![1 => anything, 3 => (0u64..20_000).prop_map(|units| measured(units, units / 100, Some([0.4, 0.8])))]
}

fn any_act() -> impl Strategy<Value = Option<Act>> {
    prop_oneof![8 => Just(None), 1 => Just(Some(Act::Pause)), 2 => Just(Some(Act::Resume)), 1 => Just(Some(Act::Approve))]
}

proptest! {
    /// Whatever is measured and whenever: over is over, weights only rise until then, nothing panics, and every row can be kept.
    #[test]
    fn no_sequence_of_measurements_breaks_the_rules(
        events in prop::collection::vec((any_measured(), any_act(), 0i64..90), 1..40), approval: bool, kind in 0usize..3,
    ) {
        let shape = [json!({}), json!({"steps": [{"set_weight": 30}, {"set_weight": 60}, {"approval": true}, {"set_weight": 90}]}),
            json!({"kind": "ab", "steps": null})];
        let mut more = shape[kind].clone();
        more["approval"] = approval.into();
        let spec = spec(more);
        let mut state = begin(&spec);
        let mut now = 0;
        for (measured, wish, seconds) in events {
            now += seconds * SECOND;
            if let Some(wish) = wish && let Ok((next, _)) = act(&spec, &state, wish, "ann", now) {
                prop_assert!(!state.status.is_over());
                state = next;
            }
            let (next, row) = measure(&spec, &state, &measured, now, &mut no_chance);
            if state.status.is_over() {
                prop_assert_eq!(&next, &state);
            }
            if next.status != Status::RolledBack {
                prop_assert!(share_of_treatment(&next) >= share_of_treatment(&state) - 1e-12);
            }
            if matches!(row.action, Action::Promote { .. }) {
                let facts: Vec<_> = row.judgements.iter().map(|judgement| judgement.verdict).collect();
                prop_assert_eq!(facts, vec![Verdict::Pass, Verdict::Met]);
                prop_assert!(row.exposures.iter().all(|units| *units >= spec.min_exposure));
                prop_assert!(row.sample_ratio.is_some_and(|test| test.p_value >= 0.001));
                prop_assert!(!approval || state.approved);
            }
            prop_assert_eq!(&measure(&spec, &state, &measured, now, &mut no_chance), &(next.clone(), row.clone()));
            // Numbers may lose their last digit, but none is infinite or no number, which JSON cannot hold.
            let kept = serde_json::to_string(&row).and_then(|text| serde_json::from_str::<Decision>(&text));
            prop_assert_eq!(kept.unwrap().judgements.len(), row.judgements.len());
            state = next;
        }
    }

    #[test]
    fn without_its_goal_nothing_is_ever_promoted(events in prop::collection::vec((any_measured(), 0i64..900), 1..60)) {
        let spec = spec(json!({}));
        let mut state = begin(&spec);
        let mut now = 0;
        for (mut measured, seconds) in events {
            now += seconds * SECOND;
            measured.metrics.remove("goal feedback.thumb");
            state = measure(&spec, &state, &measured, now, &mut no_chance).0;
            let promoted = matches!(state.status, Status::Promoted { .. });
            prop_assert!(!promoted);
        }
    }
}
