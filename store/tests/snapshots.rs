//! Snapshots and jobs, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::each;
use serde_json::json;
use tidemill_store::{JobState, Jobs, Snapshot, Snapshots, Sources};
use uuid::Uuid;

fn snapshot(name: &str, version: i64) -> Snapshot {
    Snapshot {
        id: Uuid::now_v7(),
        name: name.into(),
        version,
        created: 5,
        query: json!({"feedback": {"rows": []}}),
        content_hash: "abc".into(),
        location: "/data/x".into(),
        table_version: version,
        row_counts: json!({"rows": 3}),
        verdict: "warn".into(),
        report: json!({"checks": []}),
        tainted: None,
    }
}

#[test]
fn a_snapshot_comes_back_with_its_sources_and_a_version_is_given_once() {
    each(async |place| {
        let store = place.open().await;
        let snapshots = Snapshots::new(store.database());
        let (first, second, other) = (snapshot("a", 1), snapshot("a", 4), snapshot("b", 1));
        let ids = |count: usize| (0..count).map(|number| format!("id-{number:04}")).collect();
        let sources: Sources = [("user", ids(2)), ("rater", ids(150)), ("inference", ids(0))].into();
        for each in [&first, &second, &other] {
            snapshots.insert(each, &sources, false, store.act("ann", "dataset.make")).await.unwrap();
        }
        assert!(snapshots.insert(&snapshot("a", 4), &sources, false, store.act("ann", "dataset.make")).await.is_err());
        assert_eq!(snapshots.find("a", None).await.unwrap(), Some(second.clone()));
        assert_eq!(snapshots.find("a", Some(1)).await.unwrap(), Some(first.clone()));
        assert_eq!(snapshots.find("a", Some(2)).await.unwrap(), None);
        assert_eq!(snapshots.find("c", None).await.unwrap(), None);
        assert_eq!(snapshots.list(None, None, 10).await.unwrap(), [other.clone(), second.clone(), first.clone()]);
        assert_eq!(snapshots.list(Some("a"), Some(second.id), 10).await.unwrap(), std::slice::from_ref(&first));
        assert_eq!(snapshots.list(None, None, 1).await.unwrap(), [other]);
        assert_eq!(snapshots.sources(second.id, "rater").await.unwrap().len(), 150);
        assert_eq!(snapshots.sources(second.id, "user").await.unwrap(), ["id-0000", "id-0001"]);
        store.close().await;
    });
}

#[test]
fn a_snapshot_of_feedback_that_is_gone_is_tainted_from_the_start() {
    each(async |place| {
        let store = place.open().await;
        let snapshots = Snapshots::new(store.database());
        let sources: Sources = [("feedback", [Uuid::now_v7().to_string()].into())].into();
        snapshots.insert(&snapshot("built", 1), &sources, true, store.act("ann", "dataset.make")).await.unwrap();
        assert!(snapshots.find("built", None).await.unwrap().unwrap().tainted.is_some());
        // What was imported names feedback of another place.
        snapshots.insert(&snapshot("imported", 1), &sources, false, store.act("ann", "dataset.make")).await.unwrap();
        assert!(snapshots.find("imported", None).await.unwrap().unwrap().tainted.is_none());
        store.close().await;
    });
}

#[test]
fn a_job_tells_where_it_is_and_one_that_falls_silent_has_failed() {
    each(async |place| {
        let store = place.open().await;
        let jobs = Jobs::new(store.database());
        let id = Uuid::now_v7();
        assert_eq!(jobs.find(id, 0).await.unwrap(), None);
        jobs.insert(id, "dataset.build", &json!({"name": "d"}), store.act("ann", "dataset.build")).await.unwrap();
        assert_eq!(jobs.find(id, 200).await.unwrap().unwrap().state, JobState::Queued);
        jobs.update(id, JobState::Running, &json!({"done": 1}), None, 300).await.unwrap();
        let running = jobs.find(id, 300 + 59_000_000).await.unwrap().unwrap();
        assert_eq!((running.state, &running.progress["done"]), (JobState::Running, &json!(1)));
        let silent = jobs.find(id, 300 + 61_000_000).await.unwrap().unwrap();
        assert_eq!(silent.state, JobState::Failed);
        assert!(silent.error.unwrap().contains("start it again"));
        jobs.update(id, JobState::Failed, &json!({}), Some("why\0"), 400).await.unwrap();
        // What has ended stays as it ended.
        jobs.update(id, JobState::Running, &json!({}), None, 500).await.unwrap();
        let ended = jobs.find(id, i64::MAX).await.unwrap().unwrap();
        assert_eq!((ended.state, ended.error.as_deref()), (JobState::Failed, Some("why\u{FFFD}")));
        store.close().await;
    });
}
