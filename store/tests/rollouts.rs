//! Rollouts, their decisions, and what answers count for in them, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{adapter, answer, each, thumb};
use serde_json::{Value, json};
use tidemill_store::records::{Exposure, Feedback, Inference, Kind, Status, TargetKind};
use tidemill_store::{
    Actor, Adapters, ArmCounts, Dialect, Each, Exposures, FirstTokens, Leadership, Readers, Rollout, RolloutChange,
    RolloutDecision, RolloutFilter, RolloutReader, RolloutRefusal, Rollouts, Store, UnitSums, UnitValue,
};
use uuid::Uuid;

fn rollout(store: &Store, name: &str) -> Rollout {
    Rollout {
        id: store.issue_id(),
        created: 10,
        updated: 10,
        ended: None,
        name: name.into(),
        model: "assistant".into(),
        spec: json!({"kind": "canary", "arms": [0.5, 0.5], "odd": "nul \u{fffd}"}),
        state: json!({"weight": 0.05}),
        version: 0,
        latest: json!({"action": "start"}),
    }
}

fn decision(version: i64, at: i64, action: &str, actor: Option<&str>) -> RolloutDecision {
    RolloutDecision {
        version,
        at,
        action: action.into(),
        actor: actor.map(str::to_owned),
        body: json!({"action": action, "at": at}),
    }
}

fn change(at: i64, action: &str, actor: Option<&str>, keep: bool) -> RolloutChange {
    let over = action == "promote";
    RolloutChange { state: json!({"weight": at}), over, promoted: over, decision: decision(-1, at, action, actor), keep }
}

#[test]
fn of_two_who_saw_the_same_state_one_wins_and_the_other_is_told() {
    each(async |place| {
        let store = place.open().await;
        let rollouts = Rollouts::new(&store);
        let new = rollout(&store, "shorter");
        rollouts.insert(&new, &decision(0, 10, "start", Some("ann")), "ann").await.unwrap();
        assert_eq!(rollouts.find("shorter").await.unwrap(), new);

        let (one, two) = (change(20, "step", None, true), change(21, "roll_back", Some("bob"), false));
        let bob = Actor::from("bob");
        let (first, second) = tokio::join!(rollouts.advance(&new, &one, None), rollouts.advance(&new, &two, Some(&bob)));
        let (won, lost) = if first.is_ok() { (first, second) } else { (second, first) };
        let won = won.unwrap();
        assert!(matches!(lost, Err(RolloutRefusal::Changed)), "{lost:?}");
        assert_eq!((won.version, won.ended), (1, None));
        assert_eq!(rollouts.find(&new.id.to_string()).await.unwrap(), won);

        // What is not worth a row is still the latest; what a person wants has one.
        let held = rollouts.advance(&won, &change(30, "hold", None, false), None).await.unwrap();
        assert_eq!((held.version, &held.latest["action"]), (2, &json!("hold")));
        let over = rollouts.advance(&held, &change(40, "promote", Some("ann"), false), Some(&"ann".into())).await.unwrap();
        assert_eq!((over.version, over.ended), (3, Some(40)));
        let refused = rollouts.advance(&over, &change(50, "roll_back", Some("bob"), true), Some(&bob)).await;
        assert!(matches!(refused, Err(RolloutRefusal::Changed)), "nothing changes when it is over");
        let rows = rollouts.decisions(new.id).await.unwrap();
        let versions: Vec<i64> = rows.iter().map(|row| row.version).collect();
        assert_eq!(versions, [0, 1, 3]);
        assert_eq!((rows[2].action.as_str(), rows[2].actor.as_deref()), ("promote", Some("ann")));
        assert_eq!(rows[2].body, json!({"action": "promote", "at": 40}));

        let audit: Vec<(String, String)> =
            sqlx::query_as("SELECT action, subject FROM audit WHERE action LIKE 'rollout.%' ORDER BY at")
                .fetch_all(store.database().read())
                .await
                .unwrap();
        let actions: Vec<&str> = audit.iter().map(|(action, _)| action.as_str()).collect();
        let by_people = if won.latest["action"] == "step" {
            vec!["rollout.start", "rollout.promote"]
        } else {
            vec!["rollout.start", "rollout.roll_back", "rollout.promote"]
        };
        assert_eq!(actions, by_people);
        assert!(audit.iter().all(|(_, subject)| subject == "shorter"));
    });
}

#[test]
fn a_name_is_free_again_when_its_rollout_is_over() {
    each(async |place| {
        let store = place.open().await;
        let rollouts = Rollouts::new(&store);
        let (first, other, again) = (rollout(&store, "a"), rollout(&store, "b"), rollout(&store, "a"));
        let start = decision(0, 10, "start", Some("ann"));
        rollouts.insert(&first, &start, "ann").await.unwrap();
        let refused = rollouts.insert(&again, &start, "ann").await.unwrap_err();
        assert!(matches!(&refused, RolloutRefusal::NameTaken(name) if name == "a"), "{refused}");
        let other = rollouts.insert(&other, &start, "ann").await.unwrap();
        assert_eq!(rollouts.running().await.unwrap(), [first.clone(), other.clone()]);
        let over = rollouts.advance(&first, &change(20, "promote", None, true), None).await.unwrap();
        let again = rollouts.insert(&again, &start, "ann").await.unwrap();
        assert_eq!(rollouts.find("a").await.unwrap(), again, "the one that runs goes before the one that is over");
        let listed = async |filter: RolloutFilter| rollouts.list(&filter).await.unwrap().items;
        assert_eq!(listed(RolloutFilter::default()).await.len(), 3);
        assert_eq!(listed(RolloutFilter { over: Some(true), ..RolloutFilter::default() }).await, [over]);
        assert_eq!(listed(RolloutFilter { over: Some(false), limit: Some(1), ..RolloutFilter::default() }).await, [again]);
        assert!(listed(RolloutFilter { model: Some("else".into()), ..RolloutFilter::default() }).await.is_empty());
        assert!(matches!(rollouts.find("none").await, Err(RolloutRefusal::Unknown(_))));
    });
}

#[test]
fn the_newest_promotion_of_each_model_is_what_it_serves() {
    each(async |place| {
        let store = place.open().await;
        let rollouts = Rollouts::new(&store);
        let start = decision(0, 10, "start", Some("ann"));
        let (before, mut made) = (rollouts.clock().await.unwrap(), Vec::new());
        assert_eq!((before, rollouts.promotions().await.unwrap().len()), (0, 0));
        for (name, model, action, at) in [
            ("first", "assistant", "promote", 30),
            ("second", "assistant", "promote", 20),
            ("third", "assistant", "step", 40),
            ("other", "else", "promote", 5),
        ] {
            let new = Rollout { model: model.into(), ..rollout(&store, name) };
            rollouts.insert(&new, &start, "ann").await.unwrap();
            made.push(rollouts.advance(&new, &change(at, action, None, true), None).await.unwrap());
        }
        // Whatever the clocks of those who wrote it said.
        assert_eq!(rollouts.promotions().await.unwrap(), [made[1].clone(), made[3].clone()]);
        // Four were made and each has changed once.
        assert_eq!(rollouts.clock().await.unwrap(), 8);
    });
}

/// As it was written.
async fn begun(rollouts: &Rollouts, new: Rollout) -> Rollout {
    rollouts.insert(&new, &decision(0, new.created, "start", Some("ann")), "ann").await.unwrap()
}

/// Each act on a name is by a server whose clock is far behind that of the one before.
#[test]
fn what_happens_to_a_name_later_is_later_whatever_the_clocks_of_servers_say() {
    each(async |place| {
        let store = place.open().await;
        let (rollouts, adapters) = (Rollouts::new(&store), Adapters::new(&store));
        // Towards the end of the century.
        let (ann, ahead) = (Actor::from("ann"), 4_000_000_000_000_000);
        let made = adapters.insert(&adapter(&store, "bot", 1), "ann").await.unwrap();
        adapters.serve(made.id, false, "ann").await.unwrap();
        let alias = async || adapters.aliases().await.unwrap().remove(0);
        adapters.lead_alias_back("assistant", made.id, ahead, "ann").await.unwrap();

        let one = begun(&rollouts, rollout(&store, "one")).await;
        assert!(one.created > alias().await.updated);
        let beside = begun(&rollouts, rollout(&store, "beside")).await;
        assert!(!rollouts.is_displaced(&beside).await.unwrap());
        let one = rollouts.advance(&one, &change(20, "promote", Some("ann"), true), Some(&ann)).await.unwrap();
        let ended = one.ended.unwrap();
        assert!(ended > alias().await.updated && ended > beside.created, "the alias was led before");
        assert!(rollouts.is_displaced(&beside).await.unwrap(), "its control is not what is served any more");
        assert_eq!(rollouts.standing_on(one.id).await.unwrap(), None);

        let above = begun(&rollouts, rollout(&store, "above")).await;
        assert_eq!(rollouts.standing_on(one.id).await.unwrap().map(|row| row.name).as_deref(), Some("above"));
        assert!(!rollouts.is_displaced(&above).await.unwrap());
        adapters.set_alias("assistant", made.id, "ann").await.unwrap();
        assert!(alias().await.updated > ended, "the alias was led afterwards");
        assert!(rollouts.is_displaced(&above).await.unwrap());
        // What happens to other names is nobody's affair.
        let other = begun(&rollouts, Rollout { model: "else".into(), ..rollout(&store, "other") }).await;
        assert_eq!(other.created, 10);
    });
}

#[test]
fn a_promotion_is_taken_back_unless_something_newer_stands_on_it() {
    each(async |place| {
        let store = place.open().await;
        let rollouts = Rollouts::new(&store);
        let ann = Actor::from("ann");
        let promoted = async |name: &str, created: i64, at: i64| {
            let new = begun(&rollouts, Rollout { created, ..rollout(&store, name) }).await;
            rollouts.advance(&new, &change(at, "promote", Some("ann"), true), Some(&ann)).await.unwrap()
        };
        let back = |at: i64| RolloutChange { over: true, promoted: false, ..change(at, "roll_back", Some("ann"), true) };
        let first = promoted("first", 10, 20).await;
        // One that began before what is taken back has another control, and stays.
        let beside = begun(&rollouts, Rollout { created: 35, ..rollout(&store, "beside") }).await;
        let second = promoted("second", 30, 40).await;
        let above = begun(&rollouts, Rollout { created: 40, ..rollout(&store, "above") }).await;
        begun(&rollouts, Rollout { created: 90, model: "else".into(), ..rollout(&store, "elsewhere") }).await;

        let standing = async |on: &Rollout| rollouts.standing_on(on.id).await.unwrap().map(|row| row.name);
        assert_eq!((standing(&first).await.as_deref(), standing(&second).await.as_deref()), (Some("above"), Some("above")));
        let refused = rollouts.take_back(&second, &back(50), &ann).await;
        assert!(matches!(refused, Err(RolloutRefusal::Changed)), "{refused:?}");
        rollouts.advance(&above, &back(60), Some(&ann)).await.unwrap();
        rollouts.advance(&beside, &back(60), Some(&ann)).await.unwrap();
        assert_eq!((standing(&first).await.as_deref(), standing(&second).await), (Some("second"), None));
        assert!(rollouts.take_back(&first, &back(70), &ann).await.is_err());
        assert_eq!(rollouts.promotions_but(second.id).await.unwrap(), std::slice::from_ref(&first));

        let clock = rollouts.clock().await.unwrap();
        let taken = rollouts.take_back(&second, &back(70), &ann).await.unwrap();
        assert_eq!((taken.version, taken.ended, rollouts.clock().await.unwrap()), (second.version + 1, Some(70), clock + 1));
        assert_eq!(rollouts.promotions().await.unwrap(), std::slice::from_ref(&first));
        assert!(rollouts.take_back(&taken, &back(80), &ann).await.is_err(), "once");
        rollouts.take_back(&first, &back(90), &ann).await.unwrap();
        assert!(rollouts.promotions().await.unwrap().is_empty());
        let rows = rollouts.decisions(first.id).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.action.as_str()).collect::<Vec<_>>(), ["start", "promote", "roll_back"]);
    });
}

#[test]
fn who_ends_a_rollout_knows_when_all_servers_do() {
    each(async |place| {
        let store = place.open().await;
        let (one, two) = (RolloutReader::new(&store), RolloutReader::new(&store));
        one.serves(3, 30).await.unwrap();
        two.serves(4, 20).await.unwrap();
        let readers = one.of(4).await.unwrap();
        if place.dialect == Dialect::Sqlite {
            // The only server there is.
            assert_eq!(readers, Readers { all: 1, serving: 1 });
            assert_eq!(one.under_way(50).await.unwrap(), 50);
            return;
        }
        assert_eq!(readers, Readers { all: 2, serving: 1 });
        one.serves(5, 40).await.unwrap();
        assert_eq!(one.of(4).await.unwrap(), Readers { all: 2, serving: 2 });
        assert_eq!((one.under_way(50).await.unwrap(), one.under_way(10).await.unwrap()), (20, 10));
        two.leave().await.unwrap();
        assert_eq!(one.under_way(50).await.unwrap(), 40);
        assert_eq!(one.of(6).await.unwrap(), Readers { all: 1, serving: 0 });
    });
}

#[test]
fn servers_on_one_database_have_its_clock_and_one_alone_its_own() {
    each(async |place| {
        let store = place.open().await;
        let now = RolloutReader::new(&store).now(7).await.unwrap();
        let alone = place.dialect == Dialect::Sqlite;
        // Some day of this century.
        assert!(if alone { now == 7 } else { now > 1_700_000_000_000_000 }, "{now}");
    });
}

#[test]
fn one_server_leads_and_another_one_when_it_is_gone() {
    each(async |place| {
        let store = place.open().await;
        let leadership = |name| Leadership::new(store.database(), name);
        let (mut one, mut two, mut other) = (leadership("rollouts"), leadership("rollouts"), leadership("else"));
        assert!(one.is_mine().await.unwrap() && one.is_mine().await.unwrap() && other.is_mine().await.unwrap());
        if place.dialect == Dialect::Sqlite {
            return;
        }
        assert!(!two.is_mine().await.unwrap());
        // As a server that is killed: nothing is said, the connection ends.
        drop(one);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !two.is_mine().await.unwrap() {
            assert!(std::time::Instant::now() < deadline, "nobody leads");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let mut three = leadership("rollouts");
        assert!(!three.is_mine().await.unwrap());
        two.resign().await;
        while !three.is_mine().await.unwrap() {
            assert!(std::time::Instant::now() < deadline, "nobody leads");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
}

const ROLLOUT: Uuid = Uuid::from_u128(77);

struct Served {
    arm: u32,
    unit: i64,
    status: Status,
    finish: &'static str,
    tokens: u32,
    first_token_us: Option<i64>,
    refused: Option<bool>,
}

fn served(store: &Store, at: i64, served: &Served) -> Inference {
    let mut row = answer(store, &format!("user-{}", served.unit));
    row.created = at;
    row.status = served.status;
    row.output_tokens = served.tokens;
    row.first_token_us = served.first_token_us;
    row.choices[0].finish_reason = Some(served.finish.into());
    row.exposure = Some(Exposure { rollout: ROLLOUT, arm: served.arm, unit: served.unit, refused: served.refused, place: None });
    row
}

#[test]
fn exposures_are_summed_up_by_arm() {
    each(async |place| {
        let store = place.open().await;
        let exposures = Exposures::new(store.database());
        assert_eq!(exposures.counts(ROLLOUT, 0).await.unwrap(), []);
        assert_eq!(exposures.first_tokens(ROLLOUT, 0, 0, 0.99, 5, Each::Unit).await.unwrap(), FirstTokens::default());
        let ok = Served {
            arm: 0,
            unit: 1,
            status: Status::Ok,
            finish: "stop",
            tokens: 10,
            first_token_us: Some(100),
            refused: Some(false),
        };
        for (at, row) in [
            (5, Served { tokens: 1000, ..ok }),
            (10, Served { ..ok }),
            (11, Served { finish: "length", tokens: 30, first_token_us: Some(300), refused: Some(true), ..ok }),
            (12, Served { unit: -2, status: Status::Failed, tokens: 4, first_token_us: None, refused: None, ..ok }),
            (13, Served { unit: -3, status: Status::Cancelled, tokens: 7, first_token_us: Some(200), refused: None, ..ok }),
            (14, Served { arm: 1, unit: i64::MAX, tokens: 2, ..ok }),
        ] {
            store.record(served(&store, at, &row)).unwrap();
        }
        // Another rollout's, and one that counts nowhere.
        let mut elsewhere = served(&store, 15, &ok);
        elsewhere.exposure = elsewhere.exposure.map(|exposure| Exposure { rollout: Uuid::from_u128(78), ..exposure });
        store.record(elsewhere).unwrap();
        store.record(Inference { exposure: None, ..served(&store, 16, &ok) }).unwrap();
        store.flush().await;
        assert_eq!(
            exposures.counts(ROLLOUT, 10).await.unwrap(),
            [
                ArmCounts { arm: 0, units: 3, answers: 3, failed: 1, complete: 2, truncated: 1, read: 2, refused: 1, tokens: 40 },
                ArmCounts { arm: 1, units: 1, answers: 1, complete: 1, read: 1, tokens: 2, ..ArmCounts::default() },
            ]
        );
        let at = async |quantile: f64| exposures.first_tokens(ROLLOUT, 0, 10, quantile, 150, Each::Answer).await.unwrap();
        // The one that failed had none in 5,000 µs.
        assert_eq!(at(0.5).await, FirstTokens { count: 4, value_us: Some(200), above: 3 });
        assert_eq!((at(0.99).await.value_us, at(0.0).await.value_us), (Some(5000), Some(100)));
        let waited = async |each: Each, weights: &[f64]| {
            let mut found = Vec::new();
            for weight in weights {
                found.push(exposures.first_token_above(ROLLOUT, 0, 10, *weight, 150, each).await.unwrap());
            }
            found
        };
        let (first, last) = (Some(100), Some(5000));
        assert_eq!(waited(Each::Answer, &[0.0, 0.9, 1.0, 3.0, 4.0]).await, [first, first, Some(200), last, None]);
        // The answers of 100 and of 300 µs are one unit's.
        assert_eq!(waited(Each::Unit, &[0.0, 0.4, 0.5, 1.6, 2.1, 3.0]).await, [first, first, Some(200), Some(300), last, None]);
        let of_units = exposures.first_tokens(ROLLOUT, 0, 10, 0.5, 150, Each::Unit).await.unwrap();
        assert_eq!(of_units, FirstTokens { count: 3, value_us: Some(200), above: 3 });
        let patient = exposures.first_tokens(ROLLOUT, 0, 10, 0.99, 5000, Each::Answer).await.unwrap();
        assert_eq!(patient, FirstTokens { count: 3, value_us: Some(300), above: 0 });
        // A unit that answered twice counts once, by its mean; what the client broke off says nothing.
        let means = async |value| exposures.unit_means(ROLLOUT, 10, value).await.unwrap();
        let sums = |arm, units, sum, squares| UnitSums { arm, units, sum, squares };
        assert_eq!(means(UnitValue::Tokens).await, [sums(0, 1, 20.0, 400.0), sums(1, 1, 2.0, 4.0)]);
        assert_eq!(means(UnitValue::Failed).await, [sums(0, 2, 1.0, 1.0), sums(1, 1, 0.0, 0.0)]);
        assert_eq!(means(UnitValue::Truncated).await, [sums(0, 1, 0.5, 0.25), sums(1, 1, 0.0, 0.0)]);
        assert_eq!(means(UnitValue::Refused).await, [sums(0, 1, 0.5, 0.25), sums(1, 1, 0.0, 0.0)]);
    });
}

#[test]
fn each_unit_has_one_voice_in_what_is_said_of_an_arm() {
    each(async |place| {
        let store = place.open().await;
        let exposures = Exposures::new(store.database());
        let ok =
            Served { arm: 0, unit: 1, status: Status::Ok, finish: "stop", tokens: 10, first_token_us: Some(100), refused: None };
        let rows = [
            served(&store, 10, &ok),
            served(&store, 11, &ok),
            served(&store, 12, &Served { unit: 2, ..ok }),
            served(&store, 13, &Served { arm: 1, unit: 3, ..ok }),
            served(&store, 1, &Served { arm: 1, unit: 4, ..ok }),
        ];
        for row in &rows {
            store.record(row.clone()).unwrap();
        }
        store.flush().await;
        let said = |target: String, number: f64| Feedback {
            target: target.clone(),
            targets: vec![target],
            value: Value::Bool(number > 0.5),
            number: Some(number),
            ..thumb(&store, rows[0].id, "ann")
        };
        let of = |row: usize, number: f64| said(rows[row].id.to_string(), number);
        let withdrawn = Feedback { withdrawn: true, ..of(2, 0.0) };
        let talk = rows[2].conversation.clone().unwrap();
        let rating = Feedback { kind: Kind::Metric, metric: Some("solved".into()), ..of(2, 0.25) };
        store
            .add_feedback(vec![
                of(0, 1.0),
                of(1, 0.0),
                // Of the second choice, which is an answer, too.
                said(rows[1].choices[1].id.to_string(), 0.0),
                Feedback { target_kind: TargetKind::Conversation, ..said(talk, 1.0) },
                withdrawn,
                rating,
                of(3, 0.0),
                of(4, 1.0),
            ])
            .await
            .unwrap();
        let thumbs = exposures.judgements(ROLLOUT, 10, Kind::Thumb, None).await.unwrap();
        let third = 1.0 / 3.0;
        assert_eq!(thumbs.len(), 2);
        assert_eq!((thumbs[0].arm, thumbs[0].units), (0, 2));
        assert!((thumbs[0].sum - (third + 1.0)).abs() < 1e-12 && (thumbs[0].squares - (third * third + 1.0)).abs() < 1e-12);
        assert_eq!(thumbs[1], UnitSums { arm: 1, units: 1, sum: 0.0, squares: 0.0 });
        let solved = exposures.judgements(ROLLOUT, 10, Kind::Metric, Some("solved")).await.unwrap();
        assert_eq!(solved, [UnitSums { arm: 0, units: 1, sum: 0.25, squares: 0.0625 }]);
        assert_eq!(exposures.judgements(ROLLOUT, 10, Kind::Metric, Some("other")).await.unwrap(), []);
    });
}

#[test]
fn what_an_application_says_of_a_conversation_is_not_about_anothers_of_the_same_name() {
    each(async |place| {
        let store = place.open().await;
        let exposures = Exposures::new(store.database());
        let ok =
            Served { arm: 0, unit: 1, status: Status::Ok, finish: "stop", tokens: 1, first_token_us: Some(1), refused: None };
        for (arm, key) in [(0, "shop"), (1, "desk")] {
            let row = served(&store, 20, &Served { arm, unit: i64::from(arm), ..ok });
            store.record(Inference { conversation: Some("1".into()), key_id: Some(key.into()), ..row }).unwrap();
        }
        store.flush().await;
        let said = async |number: f64, key: Option<&str>| {
            let target = "1".to_owned();
            let feedback = Feedback {
                target_kind: TargetKind::Conversation,
                targets: vec![target.clone()],
                target,
                value: Value::Bool(number > 0.5),
                number: Some(number),
                key_id: key.map(str::to_owned),
                ..thumb(&store, ROLLOUT, "ann")
            };
            store.add_feedback(vec![feedback]).await.unwrap();
            let sums = exposures.judgements(ROLLOUT, 10, Kind::Thumb, None).await.unwrap();
            sums.iter().map(|sums| (sums.arm, sums.sum)).collect::<Vec<_>>()
        };
        assert_eq!(said(1.0, Some("shop")).await, [(0, 1.0)]);
        assert_eq!(said(0.0, Some("desk")).await, [(0, 1.0), (1, 0.0)]);
        // A key that asks nothing, and only says what people thought.
        assert_eq!(said(1.0, Some("ratings")).await, [(0, 1.0), (1, 0.5)]);
    });
}
