use super::*;
use crate::rollout::hash::in_namespace;
use crate::rollout::statistics::sample_ratio;
use crate::rollout::statistics::special::chi_square_tail;
use proptest::prelude::*;
use serde_json::json;

fn spec(name: &str, more: serde_json::Value) -> Spec {
    let mut body = json!({
        "name": name, "model": "assistant", "kind": "ab", "arms": [{"variant": "old"}, {"variant": format!("new-{name}")}],
        "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Spec::parse(&body).unwrap()
}

fn experiment(name: &str, coverage: f64) -> Experiment {
    Experiment::new(&spec(name, json!({})), coverage, &[0.5, 0.5])
}

fn table(experiments: Vec<Experiment>) -> Table {
    Table::new("old".to_owned(), Vec::new(), experiments).unwrap()
}

fn user(name: &str) -> Unit<'_> {
    Unit { user: Some(name), request: "r", ..Unit::default() }
}

fn arm(table: &Table, name: &str) -> Option<(usize, usize)> {
    match assign(table, &user(name)).reason {
        Reason::Arm { experiment, arm, .. } => Some((experiment, arm)),
        _ => None,
    }
}

#[test]
fn arms_and_inclusion_are_uniform() {
    let three = spec("uniform", json!({"arms": [{"variant": "a"}, {"variant": "b"}, {"variant": "c"}]}));
    let one = table(vec![Experiment::new(&three, 0.3, &[0.2, 0.5, 0.3])]);
    let mut counts = [0u64; 4];
    for id in 0..100_000 {
        counts[arm(&one, &format!("user-{id}")).map_or(3, |(_, arm)| arm)] += 1;
    }
    let test = sample_ratio(&counts, &[0.06, 0.15, 0.09, 0.7]).unwrap();
    assert!(test.p_value > 0.01, "{counts:?} {test:?}");
}

#[test]
fn uuids_and_numbers_are_spread_as_evenly_as_names() {
    for (kind, key) in [
        ("number", (|id| id.to_string()) as fn(u64) -> String),
        ("uuid", |id| format!("{:08x}-0000-7000-8000-{:012x}", id * 2_654_435_761 % (1 << 32), id)),
        ("mail", |id| format!("person{id}@example.com")),
    ] {
        let one = table(vec![experiment(kind, 1.0)]);
        let mut counts = [0u64; 2];
        (0..40_000).for_each(|id| counts[arm(&one, &key(id)).unwrap().1] += 1);
        assert!(sample_ratio(&counts, &[0.5, 0.5]).unwrap().p_value > 0.01, "{kind}: {counts:?}");
    }
}

#[test]
fn experiments_are_independent_and_so_are_inclusion_and_arm() {
    // Whether a unit is in at 30 %, and its arm, of two experiments: 16 cells, each as large as the product of its margins says.
    let tables = ["first", "second"].map(|name| (table(vec![experiment(name, 1.0)]), table(vec![experiment(name, 0.3)])));
    let mut cells = [[0f64; 4]; 4];
    for id in 0..100_000 {
        let name = format!("user-{id}");
        let place = |(all, some): &(Table, Table)| 2 * arm(all, &name).unwrap().1 + usize::from(arm(some, &name).is_some());
        cells[place(&tables[0])][place(&tables[1])] += 1.0;
    }
    let expected = |cell: usize| 0.5 * if cell % 2 == 1 { 0.3 } else { 0.7 };
    let chi: f64 = (0..16)
        .map(|cell| {
            let count = 100_000.0 * expected(cell / 4) * expected(cell % 4);
            (cells[cell / 4][cell % 4] - count).powi(2) / count
        })
        .sum();
    let p_value = chi_square_tail(chi, 15.0);
    assert!(p_value > 0.01, "{p_value} {cells:?}");
}

#[test]
fn layers_exclude_each_other_and_refuse_a_part_that_is_taken() {
    let part = |name: &str, from: f64, to: f64| {
        let spec = spec(name, json!({"layer": {"name": "tone", "from": from, "to": to}}));
        Experiment::new(&spec, 1.0, &[0.5, 0.5])
    };
    let both = table(vec![part("a", 0.0, 0.4), part("b", 0.4, 1.0)]);
    let mut counts = [0u64; 2];
    for id in 0..20_000 {
        let name = format!("user-{id}");
        let (experiment, _) = arm(&both, &name).expect("the two parts are the whole layer");
        counts[experiment] += 1;
        assert_eq!(experiment == 0, in_namespace(&name, "tone", Range { from: 0.0, to: 0.4 }));
    }
    assert!(sample_ratio(&counts, &[0.4, 0.6]).unwrap().p_value > 0.01, "{counts:?}");
    let clash = Table::new("old".into(), Vec::new(), vec![part("a", 0.0, 0.5), part("b", 0.4, 1.0)]).unwrap_err();
    assert_eq!((clash.first.as_str(), clash.second.as_str()), ("a", "b"));
    assert!(clash.to_string().contains("tone"));
}

#[test]
fn the_held_out_meet_no_experiment_and_are_the_same_for_all() {
    let holdouts = vec![Holdout::new("2026", 0.1)];
    let held = Table::new("old".into(), holdouts, vec![experiment("a", 1.0), experiment("b", 1.0)]).unwrap();
    let names: Vec<String> = (0..20_000).map(|id| format!("user-{id}")).collect();
    let out = names.iter().filter(|name| assign(&held, &user(name)).reason == Reason::Holdout).count();
    assert!((1850..2150).contains(&out), "{out}");
    assert!(names.iter().all(|name| (arm(&held, name).is_none()) == (assign(&held, &user(name)).reason == Reason::Holdout)));
}

#[test]
fn a_unit_sticks_to_the_user_else_the_conversation_else_the_request() {
    let by = |sticky: &str, unit: &Unit<'_>| {
        let spec = spec("sticky", json!({"sticky": sticky}));
        let one = table(vec![Experiment::new(&spec, 1.0, &[0.5, 0.5])]);
        match assign(&one, unit).reason {
            Reason::Arm { by, arm, .. } => (by, arm),
            other => panic!("{other:?}"),
        }
    };
    let all = Unit { user: Some("ann"), conversation: Some("talk"), request: "r1", forced: None };
    let no_user = Unit { user: None, ..all };
    let nothing = Unit { conversation: None, ..no_user };
    let kinds = |sticky| [all, no_user, nothing].map(|unit| by(sticky, &unit).0);
    assert_eq!(kinds("user"), [Sticky::User, Sticky::Conversation, Sticky::Request]);
    assert_eq!(kinds("conversation"), [Sticky::Conversation, Sticky::Conversation, Sticky::Request]);
    assert_eq!(kinds("request"), [Sticky::Request; 3]);
    for request in 0..50 {
        let request = format!("r{request}");
        assert_eq!(by("user", &Unit { request: &request, ..all }), by("user", &all));
    }
}

#[test]
fn a_tester_gets_what_the_header_asks_for_and_counts_for_nothing() {
    let one = table(vec![experiment("a", 0.0)]);
    let forced = |name| assign(&one, &Unit { forced: Some(name), ..user("ann") });
    assert_eq!((forced("new-a").variant, forced("new-a").reason), ("new-a", Reason::Forced));
    assert_eq!(forced("old").reason, Reason::Forced);
    assert!(!one.knows("nothing") && one.knows("new-a"));
    assert_eq!(forced("nothing").reason, Reason::Stable);
}

#[test]
fn a_shadow_changes_nobodys_answer() {
    let shadow = spec("shadow", json!({"kind": "shadow", "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.1}}]}));
    let shadow = Experiment::new(&shadow, 0.5, &[0.5, 0.5]);
    let (with, without) = (table(vec![shadow, experiment("a", 0.4)]), table(vec![experiment("a", 0.4)]));
    let mut mirrored = 0;
    for id in 0..4000 {
        let name = format!("user-{id}");
        let (one, other) = (assign(&with, &user(&name)), assign(&without, &user(&name)));
        assert_eq!(one.variant, other.variant);
        mirrored += usize::from(one.mirror == Some(0));
    }
    assert!((1850..2150).contains(&mirrored), "{mirrored}");
}

/// The same inputs give the same answers in every version of this program: units must not move when it is upgraded.
#[test]
fn the_assignment_of_these_users_is_fixed_for_ever() {
    let one = table(vec![experiment("fixed", 0.5)]);
    let arms: Vec<Option<usize>> = (0..12).map(|id| arm(&one, &format!("user-{id}")).map(|(_, arm)| arm)).collect();
    assert_eq!(arms, FIXED);
}

const FIXED: [Option<usize>; 12] = [None, Some(1), None, Some(0), None, Some(0), Some(1), Some(0), None, Some(0), Some(0), None];

proptest! {
    #[test]
    fn raising_the_traffic_removes_nobody_and_moves_nobody(
        low in 0.0f64..1.0, more in 0.0f64..1.0, users in prop::collection::vec("[a-zé😀0-9-]{1,24}", 1..60), seed in "[a-z]{1,8}",
    ) {
        let high = (low + more).min(1.0);
        let at = |coverage| table(vec![experiment(&seed, coverage)]);
        let (before, after) = (at(low), at(high));
        for name in &users {
            if let Some(place) = arm(&before, name) {
                prop_assert_eq!(arm(&after, name), Some(place));
            }
        }
    }

    #[test]
    fn raising_a_canarys_weight_takes_nobody_off_the_canary(
        low in 0.001f64..0.999, high in 0.001f64..0.999, treated in 0.05f64..0.95,
        users in prop::collection::vec("[a-zé😀0-9-]{1,24}", 1..60),
    ) {
        let canary = spec("canary", json!({
            "kind": "canary", "steps": [{"set_weight": 5}],
            "arms": [{"variant": "old", "weight": 1.0 - treated}, {"variant": "new", "weight": treated}],
        }));
        let at = |weight: f64| {
            let (coverage, weights) = canary.at_weight(weight);
            table(vec![Experiment::new(&canary, coverage, &weights)])
        };
        let (before, after) = (at(low.min(high)), at(low.max(high)));
        for name in &users {
            if assign(&before, &user(name)).variant == "new" {
                prop_assert_eq!(assign(&after, &user(name)).variant, "new");
            }
        }
    }
}
