//! What is removed on request, and what by itself.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::time::Duration;

use support::proxy::{Proxy, Wire, eventually};
use support::{Place, answer, each, on_postgres, postgres, thumb};
use tidemill_store::records::{Feedback, TargetKind};
use tidemill_store::{FeedbackFilter, InferenceFilter, Retention, Store, StoreOptions, retention};

async fn run(store: &Store, text: &'static str, values: &[&str]) {
    let mut query = sqlx::query(text);
    for value in values {
        query = query.bind((*value).to_owned());
    }
    query.execute(store.database().write()).await.unwrap();
}

async fn one(store: &Store, text: &'static str) -> String {
    let (found,): (String,) = sqlx::query_as(text).fetch_one(store.database().read()).await.unwrap();
    found
}

#[test]
fn a_person_is_removed_everywhere_and_what_was_made_from_them_is_marked() {
    each(async |place| {
        let store = place.open().await;
        let (hers, his) = (answer(&store, "ann@example.org"), answer(&store, "bob"));
        store.record(his.clone()).unwrap();
        let by_her = thumb(&store, his.id, "ann@example.org");
        let on_hers = thumb(&store, hers.choices[1].id, "rater");
        let on_her_talk = Feedback {
            target: "talk-ann@example.org".into(),
            targets: vec!["talk-ann@example.org".into()],
            target_kind: TargetKind::Conversation,
            ..thumb(&store, hers.id, "rater")
        };
        let stays = thumb(&store, his.id, "rater");
        store.add_feedback(vec![by_her.clone(), on_hers.clone(), on_her_talk, stays.clone()]).await.unwrap();
        store.withdraw_feedback(on_hers.id).await.unwrap();

        let task = "INSERT INTO label_tasks (id, queue_id, created, source, prompt, answer_a, answer_b, candidate_a, candidate_b, verdicts, done, \
                    leased_until) VALUES ($1, 'q', 1, $1, '[]', 'a', 'b', $2, $3, 0, 0, 0)";
        run(&store, task, &["t1", &his.id.to_string(), &hers.choices[1].id.to_string()]).await;
        run(&store, task, &["t2", &his.id.to_string(), &his.choices[1].id.to_string()]).await;
        let assignment = "INSERT INTO label_assignments (id, queue_id, task_id, annotator, state, a_is_left, started) \
                          VALUES ($1, 'q', $2, $3, 'leased', 1, 1)";
        run(&store, assignment, &["a1", "t1", "rater"]).await;
        run(&store, assignment, &["a2", "t2", "ann@example.org"]).await;
        run(&store, assignment, &["a3", "t2", "rater"]).await;
        let snapshot = "INSERT INTO snapshots (id, name, version, created, query, content_hash, location, table_version, row_counts, verdict, \
                        report) VALUES ($1, $2, 1, 1, '', '', '', 1, '{}', '', '')";
        let source = "INSERT INTO snapshot_sources (snapshot_id, kind, source) VALUES ($1, $2, $3)";
        for (id, kind, of) in [
            ("s1", "inference", hers.id.to_string()),
            ("s2", "rater", "ann@example.org".into()),
            ("s3", "inference", his.id.to_string()),
        ] {
            run(&store, snapshot, &[id, id]).await;
            run(&store, source, &[id, kind, &of]).await;
        }
        let adapter = "INSERT INTO adapters (id, created, name, generation, base, content_hash, location, snapshot_id, metrics) \
                       VALUES ($1, 1, $1, 7, $2, '', '', $3, '{}')";
        run(&store, adapter, &["first", "base", "s1"]).await;
        run(&store, adapter, &["second", "first@7", "s3"]).await;
        run(&store, adapter, &["other", "base", "s3"]).await;

        // Still in the queue when the erasure begins.
        store.record(hers.clone()).unwrap();
        let erased = store.erase_user("ann@example.org").await.unwrap();
        assert_eq!((erased.inferences, erased.feedback, erased.labels), (1, 3, 1));
        assert_eq!(erased.snapshots, ["s1@1", "s2@1"]);
        assert_eq!(erased.adapters, ["first@7", "second@7"]);

        let answers = store.list_inferences(&InferenceFilter::default()).await.unwrap().items;
        assert_eq!(answers, vec![his.clone()]);
        assert_eq!(store.inference(hers.choices[1].id).await.unwrap(), None);
        assert_eq!(store.list_feedback(&FeedbackFilter::default()).await.unwrap().items, vec![stays]);
        let count = async |text| -> i64 { sqlx::query_as::<_, (i64,)>(text).fetch_one(store.database().read()).await.unwrap().0 };
        assert_eq!(count("SELECT COUNT(*) FROM feedback_revisions").await, 0);
        assert_eq!(count("SELECT COUNT(*) FROM feedback_targets").await, 1);
        assert_eq!(count("SELECT COUNT(*) FROM choices").await, 2);
        assert_eq!(one(&store, "SELECT id FROM label_tasks").await, "t2");
        assert_eq!(one(&store, "SELECT id FROM label_assignments").await, "a3");
        assert_eq!(count("SELECT COUNT(*) FROM snapshots WHERE tainted IS NULL").await, 1);
        assert_eq!(count("SELECT COUNT(*) FROM adapters WHERE tainted IS NULL").await, 1);
        let audit = one(&store, "SELECT subject || detail FROM audit WHERE action = 'erase'").await;
        assert!(!audit.contains("ann") && audit.contains("\"inferences\":1"), "{audit}");
        assert_eq!(count("SELECT COUNT(*) FROM snapshot_sources WHERE source LIKE '%ann%'").await, 0);

        // What comes late, out of a log, is left out; what comes anew is a new record.
        store.record(hers.clone()).unwrap();
        let anew =
            tidemill_store::records::Inference { id: store.issue_id(), created: i64::MAX, choices: vec![], ..hers.clone() };
        store.record(anew.clone()).unwrap();
        store.flush().await;
        assert_eq!(store.inference(hers.id).await.unwrap(), None);
        assert_eq!(store.inference(anew.id).await.unwrap(), Some(anew));
        assert_eq!(store.erase_user("nobody").await.unwrap(), Default::default());
        store.close().await;
    });
}

#[test]
fn erasure_by_a_command_reaches_what_waits_in_a_spill_log() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let proxy = Proxy::to(place.url.as_deref().unwrap()).await;
        let options = StoreOptions { url: Some(proxy.address.clone()), ..place.options() };
        let count = async |store: &Store| {
            let answers = store.list_inferences(&InferenceFilter::default()).await.unwrap().items.len();
            (answers, store.list_feedback(&FeedbackFilter::default()).await.unwrap().items.len())
        };
        for server_runs in [true, false] {
            let lock = place.data().lock().unwrap();
            let store = Store::open(options.clone()).await.unwrap();
            proxy.set(Wire::Cut);
            let hers = answer(&store, "ann");
            store.record(hers.clone()).unwrap();
            store
                .add_feedback(vec![thumb(&store, hers.choices[1].id, "rater"), thumb(&store, store.issue_id(), "ann")])
                .await
                .unwrap();
            store.flush().await;
            let command = Store::open_for_command(&place.data(), place.url.as_deref()).await.unwrap();
            if server_runs {
                // The log belongs to the server: what is in it is left out when it arrives.
                assert_eq!(command.erase_user("ann").await.unwrap(), Default::default());
                proxy.set(Wire::Up);
                eventually("the log is empty", async || {
                    std::fs::read_dir(place.folder.path().join("spill")).unwrap().count() == 0
                })
                .await;
                store.close().await;
            } else {
                store.close().await;
                drop(lock);
                // Marks of the erasure before are older than these.
                sqlx::query("DELETE FROM erasures").execute(command.database().write()).await.unwrap();
                let erased = command.erase_user("ann").await.unwrap();
                assert_eq!((erased.inferences, erased.feedback), (1, 2));
                proxy.set(Wire::Up);
            }
            assert_eq!(count(&command).await, (0, 0));
            command.close().await;
        }
    });
}

#[test]
fn age_takes_every_old_answer_and_size_spares_judged_ones_and_feedback_stays() {
    each(async |place| {
        let store = place.open().await;
        let hour = 3_600_000_000;
        let make = |hours: i64| tidemill_store::records::Inference { created: hours * hour, ..answer(&store, "ann") };
        let (ancient, old, judged, middle, new) = (make(1), make(5), make(6), make(7), make(8));
        for one in [&ancient, &old, &judged, &middle, &new] {
            store.record(one.clone()).unwrap();
        }
        store.flush().await;
        store.add_feedback(vec![thumb(&store, ancient.id, "r"), thumb(&store, judged.choices[1].id, "r")]).await.unwrap();
        let left = async || -> Vec<i64> {
            let filter = InferenceFilter { order: tidemill_store::Order::OldestFirst, ..Default::default() };
            store.list_inferences(&filter).await.unwrap().items.iter().map(|one| one.created / hour).collect()
        };
        let age = Retention { max_age: Some(Duration::from_secs(5 * 3600)), max_bytes: None };
        assert_eq!(retention::apply(store.database(), age, 9 * hour).await.unwrap(), 1);
        assert_eq!(left().await, [5, 6, 7, 8]);
        assert_eq!(retention::apply(store.database(), age, 9 * hour).await.unwrap(), 0);

        let (total,): (i64,) =
            sqlx::query_as("SELECT CAST(SUM(bytes) AS BIGINT) FROM inferences").fetch_one(store.database().read()).await.unwrap();
        let size = |share: f64| Retention { max_age: None, max_bytes: Some((total as f64 * share) as u64) };
        assert_eq!(retention::apply(store.database(), size(1.0), 0).await.unwrap(), 0);
        assert_eq!(retention::apply(store.database(), size(0.5), 0).await.unwrap(), 2);
        assert_eq!(left().await, [6, 8]);
        assert_eq!(retention::apply(store.database(), size(0.25), 0).await.unwrap(), 1);
        assert_eq!(left().await, [6], "the judged one is older and stays");
        assert_eq!(retention::apply(store.database(), size(0.0), 0).await.unwrap(), 1);
        assert_eq!(store.list_feedback(&FeedbackFilter::default()).await.unwrap().items.len(), 2);
        let (choices,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM choices").fetch_one(store.database().read()).await.unwrap();
        assert_eq!(choices, 0);
        store.close().await;
    });
}
