//! The ties between answers, snapshots and adapters, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{adapter, answer, each, snapshot};
use tidemill_store::records::Inference;
use tidemill_store::{AdapterOrigin, Adapters, AnswerSpan, RegisteredAdapter, Snapshots, Sources};
use uuid::Uuid;

#[test]
fn ties_are_followed_both_ways() {
    each(async |place| {
        let store = place.open().await;
        let (snapshots, adapters) = (Snapshots::new(store.database()), Adapters::new(&store));
        let (early, late) = (snapshot(&store, "early"), snapshot(&store, "late"));
        let early_sources: Sources = [
            ("rater", ["ann".to_owned(), "bob".to_owned()].into()),
            ("feedback", ["f1".to_owned()].into()),
            // A user of a rater's name is another sort of source.
            ("user", ["cleo".to_owned()].into()),
        ]
        .into();
        let late_sources: Sources = [("rater", ["ann".to_owned(), "cleo".to_owned()].into())].into();
        for (snapshot, sources) in [(&early, &early_sources), (&late, &late_sources)] {
            snapshots.insert(snapshot, sources, false, store.act("ann", "dataset.make")).await.unwrap();
        }
        assert_eq!(snapshots.by_id(late.id).await.unwrap(), Some(late.clone()));
        assert_eq!(snapshots.by_id(Uuid::nil()).await.unwrap(), None);
        let of = async |kind: &str, source: &str| snapshots.made_from(kind, source).await.unwrap();
        assert_eq!(of("rater", "ann").await, [early.clone(), late.clone()]);
        assert_eq!((of("rater", "cleo").await, of("user", "cleo").await), (vec![late.clone()], vec![early.clone()]));
        assert_eq!((of("feedback", "f1").await, of("inference", "f1").await), (vec![early.clone()], vec![]));
        let counts = snapshots.source_counts(early.id).await.unwrap();
        assert_eq!(counts, [("feedback".to_owned(), 1), ("rater".to_owned(), 2), ("user".to_owned(), 1)].into());

        let big = u64::MAX >> 1;
        let first = RegisteredAdapter { snapshot: Some(early.id), job: Some("ftjob-1".into()), ..adapter(&store, "a", big) };
        let child = RegisteredAdapter { parent: Some(first.id), ..adapter(&store, "a", 2) };
        let twin = RegisteredAdapter { name: "twin".into(), ..adapter(&store, "twin", big) };
        for adapter in [&first, &child, &twin] {
            adapters.insert(adapter, "ann").await.unwrap();
        }
        let made = async |origin| {
            let found = adapters.made_from(origin).await.unwrap();
            found.into_iter().map(|adapter| adapter.id).collect::<Vec<_>>()
        };
        assert_eq!(made(AdapterOrigin::Generation(big)).await, [first.id, twin.id]);
        assert_eq!(made(AdapterOrigin::Snapshot(early.id)).await, [first.id]);
        assert_eq!(made(AdapterOrigin::Parent(first.id)).await, [child.id]);
        assert_eq!(made(AdapterOrigin::Job("ftjob-1")).await, [first.id]);
        assert!(made(AdapterOrigin::Snapshot(late.id)).await.is_empty());

        for (created, generation) in [(30, big), (10, big), (20, 2), (5, 0)] {
            store.record(Inference { created, adapter: generation, ..answer(&store, "u") }).unwrap();
        }
        store.flush().await;
        let span = async |generation| store.answers_of(generation).await.unwrap();
        assert_eq!(span(big).await, AnswerSpan { answers: 2, first: Some(10), last: Some(30) });
        assert_eq!(span(2).await.answers, 1);
        assert_eq!((span(0).await, span(7).await), (AnswerSpan::default(), AnswerSpan::default()));
        store.close().await;
    });
}
