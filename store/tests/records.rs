//! What is written can be read back, on both databases.

use crate::support::{answer, each, thumb};
use serde_json::json;
use tidemill_store::records::{Feedback, Kind};
use tidemill_store::{FeedbackChange, FeedbackFilter, InferenceFilter, Order, Scope, StoreError};

#[test]
fn an_answer_comes_back_as_it_was_by_its_id_and_by_its_choices() {
    each(async |place| {
        let store = place.open().await;
        let one = answer(&store, "ann");
        let two = answer(&store, "bob");
        store.record(one.clone()).unwrap();
        store.record(two.clone()).unwrap();
        store.flush().await;
        assert_eq!(store.inference(one.id).await.unwrap().unwrap(), one);
        assert_eq!(store.inference(one.choices[1].id).await.unwrap().unwrap(), one);
        assert_eq!(store.inference(store.issue_id()).await.unwrap(), None);
        assert!(store.conversation_exists("talk-ann").await.unwrap());
        assert!(!store.conversation_exists("talk-zoe").await.unwrap());

        let all = store.list_inferences(&InferenceFilter { limit: Some(1), ..Default::default() }).await.unwrap();
        assert_eq!((all.items, all.has_more), (vec![two.clone()], true));
        let rest = store.list_inferences(&InferenceFilter { after: Some(two.id), ..Default::default() }).await.unwrap();
        assert_eq!((rest.items, rest.has_more), (vec![one.clone()], false));

        store.add_feedback(vec![thumb(&store, two.choices[1].id, "rater")]).await.unwrap();
        let judged = InferenceFilter { with_feedback: Some(Kind::Thumb), ..Default::default() };
        assert_eq!(store.list_inferences(&judged).await.unwrap().items, vec![two.clone()]);
        let other = InferenceFilter { with_feedback: Some(Kind::Comment), ..Default::default() };
        assert!(store.list_inferences(&other).await.unwrap().items.is_empty());
        let many = InferenceFilter {
            model: Some("m".into()),
            variant: Some("b".into()),
            user_key: Some("ann".into()),
            conversation: Some("talk-ann".into()),
            since: Some(one.created),
            until: Some(one.created + 1),
            compare: Some(true),
            order: Order::OldestFirst,
            ..Default::default()
        };
        assert_eq!(store.list_inferences(&many).await.unwrap().items, vec![one]);
        store.close().await;
    });
}

#[test]
fn feedback_comes_back_edits_keep_what_was_and_a_withdrawal_only_marks() {
    each(async |place| {
        let store = place.open().await;
        let (a, b) = (store.issue_id(), store.issue_id());
        let plain = thumb(&store, a, "ann");
        let comparison = Feedback {
            kind: Kind::Comparison,
            targets: vec![a.to_string(), b.to_string()],
            value: json!({"candidates": [a, b], "ranking": [[a], [b]], "both_bad": false, "shown": [b, a]}),
            number: None,
            ..thumb(&store, a, "ann")
        };
        let sent = store.add_feedback(vec![plain.clone(), comparison.clone()]).await.unwrap();
        assert_eq!(
            sent.iter().map(|one| (one.id, one.duplicate)).collect::<Vec<_>>(),
            [(plain.id, false), (comparison.id, false)]
        );
        assert_eq!(store.feedback(plain.id).await.unwrap().unwrap(), plain);
        assert_eq!(store.feedback(comparison.id).await.unwrap().unwrap(), comparison);
        assert_eq!(store.feedback(a).await.unwrap(), None);

        let change =
            FeedbackChange { value: Some((json!(false), Some(0.0))), tags: Some(vec!["z".into()]), ..Default::default() };
        let edited = store.edit_feedback(plain.id, change.clone()).await.unwrap().unwrap();
        assert_eq!((edited.revision, &edited.value, edited.number, &edited.author), (2, &json!(false), Some(0.0), &plain.author));
        assert!(edited.updated > plain.updated);
        assert_eq!(store.edit_feedback(plain.id, change).await.unwrap().unwrap(), edited, "the same again is no new revision");
        let gone = store.withdraw_feedback(plain.id).await.unwrap().unwrap();
        assert!(gone.withdrawn && gone.revision == 3);
        assert_eq!(store.feedback(plain.id).await.unwrap().unwrap(), gone);
        assert_eq!(store.withdraw_feedback(a).await.unwrap(), None);
        let revisions: Vec<(i64, String)> = sqlx::query_as("SELECT revision, body FROM feedback_revisions ORDER BY revision")
            .fetch_all(store.database().read())
            .await
            .unwrap();
        assert_eq!(revisions.iter().map(|(revision, _)| *revision).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(serde_json::from_str::<Feedback>(&revisions[0].1).unwrap(), plain);

        let moved = FeedbackChange { targets: Some(vec![b.to_string(), a.to_string()]), ..Default::default() };
        assert_eq!(store.edit_feedback(comparison.id, moved).await.unwrap().unwrap().target, b.to_string());
        let list = async |filter: FeedbackFilter| -> Vec<_> {
            store.list_feedback(&filter).await.unwrap().items.into_iter().map(|one| one.id).collect()
        };
        let any = FeedbackFilter::default;
        assert_eq!(list(any()).await, [comparison.id, plain.id]);
        assert_eq!(list(FeedbackFilter { order: Order::OldestFirst, ..any() }).await, [plain.id, comparison.id]);
        assert_eq!(list(FeedbackFilter { target: Some(b.to_string()), ..any() }).await, [comparison.id]);
        assert_eq!(list(FeedbackFilter { withdrawn: Some(true), ..any() }).await, [plain.id]);
        assert_eq!(list(FeedbackFilter { tag: Some("z".into()), ..any() }).await, [plain.id]);
        assert_eq!(list(FeedbackFilter { tag: Some("a \"b\"".into()), ..any() }).await, [comparison.id]);
        assert!(list(FeedbackFilter { tag: Some("b".into()), ..any() }).await.is_empty());
        assert_eq!(
            list(FeedbackFilter { kind: Some(Kind::Comparison), author: Some("ann".into()), ..any() }).await,
            [comparison.id]
        );
        assert!(list(FeedbackFilter { until: Some(plain.created), ..any() }).await.is_empty());
        store.close().await;
    });
}

#[test]
fn of_two_keys_that_are_made_at_once_one_gets_the_name() {
    each(async |place| {
        let (store, other) = (place.open().await, place.open().await);
        for round in 0..8 {
            let name = format!("app{round}");
            let (one, two) = tokio::join!(store.create_key(&name, &[Scope::Chat]), other.create_key(&name, &[Scope::Chat]));
            assert_eq!(usize::from(one.is_ok()) + usize::from(two.is_ok()), 1);
            assert!(matches!(one.and(two), Err(StoreError::KeyName(taken)) if taken == name));
            store.revoke_key(&name, "boss").await.unwrap().unwrap();
            other.create_key(&name, &[Scope::Chat]).await.unwrap();
        }
        store.close().await;
        other.close().await;
    });
}
