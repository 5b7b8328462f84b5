//! What retention and erasure leave of answers that a rollout counts.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::time::Duration;

use crate::support::{answer, each, thumb};
use serde_json::json;
use tidemill_store::records::{Exposure, Feedback, Inference, Kind, TargetKind};
use tidemill_store::{
    Each, Exposures, Retention, Rollout, RolloutChange, RolloutDecision, Rollouts, Store, UnitValue, retention,
};
use uuid::Uuid;

const HOUR: i64 = 3_600_000_000;

fn decision(at: i64) -> RolloutDecision {
    RolloutDecision { version: 0, at, action: "start".into(), actor: None, body: json!({}) }
}

async fn begun(store: &Store) -> Rollout {
    let row = Rollout {
        id: store.issue_id(),
        created: 0,
        updated: 0,
        ended: None,
        name: "r".into(),
        model: "m".into(),
        spec: json!({}),
        state: json!({}),
        version: 0,
        latest: json!({}),
    };
    Rollouts::new(store).insert(&row, &decision(0), "ann").await.unwrap();
    row
}

/// An answer to somebody that hour, in that arm of a rollout.
fn counted(store: &Store, rollout: Uuid, user: &str, hour: i64, arm: u32) -> Inference {
    let exposure = Exposure { rollout, arm, unit: store.unit_of(user), refused: Some(false), place: None };
    Inference { created: hour * HOUR, exposure: Some(exposure), ..answer(store, user) }
}

/// Everything that the rollout is judged by.
async fn sums(store: &Store, rollout: Uuid) -> String {
    let exposures = Exposures::new(store.database());
    let counts = exposures.counts(rollout, 0).await.unwrap();
    let mut means = Vec::new();
    for value in [UnitValue::Failed, UnitValue::Truncated, UnitValue::Refused, UnitValue::Tokens] {
        means.push(exposures.unit_means(rollout, 0, value).await.unwrap());
    }
    let thumbs = exposures.judgements(rollout, 0, Kind::Thumb, None).await.unwrap();
    let first = exposures.first_tokens(rollout, 1, 0, 0.5, 1_000, Each::Answer).await.unwrap();
    format!("{counts:?} {means:?} {thumbs:?} {first:?}")
}

#[test]
fn the_sums_of_a_rollout_that_runs_do_not_shrink_and_texts_go_all_the_same() {
    each(async |place| {
        let store = place.open().await;
        let row = begun(&store).await;
        let users = ["ann", "bob", "cleo", "dan"];
        let answers: Vec<Inference> =
            users.iter().zip(0..).map(|(user, hour)| counted(&store, row.id, user, hour, u32::from(hour % 2 == 1))).collect();
        let other = Inference { created: 0, exposure: None, ..answer(&store, "eve") };
        for answer in answers.iter().chain([&other]) {
            store.record(answer.clone()).unwrap();
        }
        store.flush().await;
        let on_talk = Feedback {
            target: "talk-bob".into(),
            targets: vec!["talk-bob".into()],
            target_kind: TargetKind::Conversation,
            ..thumb(&store, answers[1].id, "bob")
        };
        store.add_feedback(vec![thumb(&store, answers[0].id, "ann"), on_talk]).await.unwrap();
        let before = sums(&store, row.id).await;
        let age = Retention { max_age: Some(Duration::from_secs(2 * 3600)), max_bytes: None };
        let apply = async |limits: Retention| retention::apply(store.database(), limits, 4 * HOUR).await.unwrap();
        assert_eq!(apply(age).await, 3, "ann's, bob's, and eve's, which no rollout counts");
        assert_eq!(sums(&store, row.id).await, before);
        assert_eq!(apply(age).await, 0, "once");
        assert_eq!(store.inference(other.id).await.unwrap(), None);
        let bare = store.inference(answers[0].id).await.unwrap().unwrap();
        assert_eq!((bare.user_key, bare.messages, bare.prompt_text, bare.prompt_ids.len()), (None, None, None, 0));
        assert_eq!((bare.metadata.len(), bare.params, bare.conversation), (0, None, None));
        assert!(bare.choices.iter().all(|choice| choice.output_text.is_none() && choice.output_ids.is_empty()));
        assert!(bare.choices.iter().all(|choice| choice.raw_logprobs.is_empty() && choice.logprobs.is_empty()));
        // By size the others lose theirs, too: what a rollout counts on is all that is left, however small the limit.
        assert_eq!(apply(Retention { max_age: None, max_bytes: Some(0) }).await, 2);
        assert_eq!(sums(&store, row.id).await, before);

        let over = RolloutChange { state: json!({}), over: true, promoted: false, decision: decision(5 * HOUR), keep: false };
        Rollouts::new(&store).advance(&row, &over, None).await.unwrap();
        apply(age).await;
        assert!(Exposures::new(store.database()).counts(row.id, 0).await.unwrap().is_empty(), "when it is over, they go");
        assert_eq!(store.inference(answers[3].id).await.unwrap(), None);
    });
}

#[test]
fn erasure_takes_a_person_out_of_the_sums_also_where_only_those_were_left() {
    each(async |place| {
        let store = place.open().await;
        let row = begun(&store).await;
        for (user, hour) in [("ann", 0), ("ann", 3), ("bob", 0)] {
            store.record(counted(&store, row.id, user, hour, 0)).unwrap();
        }
        // With `--record off` nothing else was ever there.
        store.record(Inference { user_key: None, ..counted(&store, row.id, "ann", 3, 0) }).unwrap();
        store.flush().await;
        let age = Retention { max_age: Some(Duration::from_secs(2 * 3600)), max_bytes: None };
        assert_eq!(retention::apply(store.database(), age, 4 * HOUR).await.unwrap(), 2);
        let counts = async || Exposures::new(store.database()).counts(row.id, 0).await.unwrap()[0];
        assert_eq!((counts().await.units, counts().await.answers), (2, 4));
        assert_eq!(store.erase_user("ann", "boss").await.unwrap().inferences, 3);
        assert_eq!((counts().await.units, counts().await.answers), (1, 1));
    });
}
