//! What is removed on request, and what by itself.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::time::Duration;

use crate::support::proxy::{Proxy, Wire, eventually};
use crate::support::{Place, answer, each, on_postgres, on_sqlite, postgres, thumb};
use tidemill_store::label::{Labels, NewDraft, NewQueue, NewTask, TaskState};
use tidemill_store::records::{Feedback, Inference, TargetKind};
use tidemill_store::{
    Erasure, FeedbackChange, FeedbackFilter, InferenceFilter, Retention, Snapshot, Snapshots, Sources, Store, StoreError,
    StoreOptions, retention,
};

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
        let handed_over = thumb(&store, his.id, "ann@example.org");
        store.add_feedback(vec![by_her.clone(), on_hers.clone(), on_her_talk, stays.clone(), handed_over.clone()]).await.unwrap();
        store.withdraw_feedback(on_hers.id).await.unwrap();
        let to_bob = FeedbackChange { author: Some("bob".into()), ..Default::default() };
        let handed_over = store.edit_feedback(handed_over.id, to_bob).await.unwrap().unwrap();

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
                        report) VALUES ($1, $2, 1, 1, '', '', '', 1, '{}', '', '{\"explanation\":\"ann@example.org has most\"}')";
        let source = "INSERT INTO snapshot_sources (snapshot_id, kind, source) VALUES ($1, $2, $3)";
        for (id, kind, of) in [
            ("s1", "inference", hers.id.to_string()),
            ("s2", "rater", "ann@example.org".into()),
            ("s3", "inference", his.id.to_string()),
        ] {
            run(&store, snapshot, &[id, id]).await;
            run(&store, source, &[id, kind, &of]).await;
        }
        let adapter = "INSERT INTO adapters (id, created, name, generation, base, content_hash, location, parent, snapshot_id, lineage, \
                       metrics) VALUES ($1, 1, $1, 7, 'base', '', '', $2, $3, $4, '{}')";
        let lineage = r#"{"raters":["ann@example.org","rater"],"config":{"rater_weights":{"ann@example.org":0.5}}}"#;
        run(&store, adapter, &["first", "", "s1", lineage]).await;
        run(&store, adapter, &["second", "first", "s3", "{}"]).await;
        run(&store, adapter, &["other", "", "s3", "{}"]).await;

        // Still in the queue when the erasure begins.
        store.record(hers.clone()).unwrap();
        let erased = store.erase_user("ann@example.org", "operator").await.unwrap();
        assert_eq!((erased.inferences, erased.feedback, erased.labels), (1, 3, 1));
        assert_eq!(erased.snapshots, ["s1@1", "s2@1"]);
        assert_eq!(erased.adapters, ["first@0000000000000007", "second@0000000000000007"]);

        let answers = store.list_inferences(&InferenceFilter::default()).await.unwrap().items;
        assert_eq!(answers, vec![his.clone()]);
        assert_eq!(store.inference(hers.choices[1].id).await.unwrap(), None);
        assert_eq!(store.list_feedback(&FeedbackFilter::default()).await.unwrap().items, vec![handed_over, stays]);
        let count = async |text| -> i64 { sqlx::query_as::<_, (i64,)>(text).fetch_one(store.database().read()).await.unwrap().0 };
        assert_eq!(count("SELECT COUNT(*) FROM feedback_revisions").await, 0);
        assert_eq!(count("SELECT COUNT(*) FROM feedback_targets").await, 2);
        assert_eq!(count("SELECT COUNT(*) FROM choices").await, 2);
        assert_eq!(one(&store, "SELECT id FROM label_tasks").await, "t2");
        assert_eq!(one(&store, "SELECT id FROM label_assignments").await, "a3");
        assert_eq!(count("SELECT COUNT(*) FROM snapshots WHERE tainted IS NULL").await, 1);
        assert_eq!(
            count("SELECT COUNT(*) FROM snapshots WHERE report LIKE '%ann%'").await,
            1,
            "the report of what has none of her"
        );
        assert_eq!(count("SELECT COUNT(*) FROM adapters WHERE tainted IS NULL").await, 1);
        let lineage = one(&store, "SELECT lineage FROM adapters WHERE id = 'first'").await;
        assert!(!lineage.contains("ann") && lineage.contains("\"rater\"") && lineage.contains("0.5"), "{lineage}");
        let audit = one(&store, "SELECT subject || detail FROM audit WHERE action = 'erase'").await;
        assert!(!audit.contains("ann") && audit.contains("\"inferences\":1"), "{audit}");
        assert_eq!(count("SELECT COUNT(*) FROM snapshot_sources WHERE source LIKE '%ann%'").await, 0);

        // What comes late, out of a log, is left out; what comes anew is a new record.
        store.record(hers.clone()).unwrap();
        let anew = Inference { id: store.issue_id(), created: i64::MAX, choices: vec![], ..hers.clone() };
        store.record(anew.clone()).unwrap();
        store.flush().await;
        assert_eq!(store.inference(hers.id).await.unwrap(), None);
        assert_eq!(store.inference(anew.id).await.unwrap(), Some(anew));
        assert_eq!(store.erase_user("nobody", "operator").await.unwrap(), Default::default());
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
                assert_eq!(command.erase_user("ann", "operator").await.unwrap(), Default::default());
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
                let erased = command.erase_user("ann", "operator").await.unwrap();
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
        let make = |hours: i64| Inference { created: hours * hour, ..answer(&store, "ann") };
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

#[test]
fn retention_on_two_gateways_deletes_as_much_as_on_one() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let (store, other) = (place.open().await, place.open().await);
        let rows: Vec<Inference> = (0..3000).map(|n| Inference { created: n, ..answer(&store, "ann") }).collect();
        for rows in rows.chunks(1000) {
            rows.iter().for_each(|row| store.record(row.clone()).unwrap());
            store.flush().await;
        }
        let bytes = "SELECT CAST(SUM(bytes) AS BIGINT) FROM inferences";
        let total = async || -> i64 { sqlx::query_as::<_, (i64,)>(bytes).fetch_one(store.database().read()).await.unwrap().0 };
        let most = total().await / 2;
        let size = Retention { max_age: None, max_bytes: Some(most as u64) };
        let late = async {
            tokio::time::sleep(Duration::from_millis(40)).await;
            retention::apply(other.database(), size, 0).await.unwrap()
        };
        let (first, second) = tokio::join!(async { retention::apply(store.database(), size, 0).await.unwrap() }, late);
        assert_eq!(first + second, 1500);
        assert!(total().await <= most);
        store.close().await;
        other.close().await;
    });
}

#[test]
fn erasure_by_a_command_succeeds_beside_a_server_that_writes_all_the_time() {
    each(async |place| {
        let store = place.open().await;
        for person in 0..4 {
            for _ in 0..300 {
                store.record(answer(&store, &format!("p{person}"))).unwrap();
            }
            store.flush().await;
        }
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move {
                    loop {
                        store.add_feedback(vec![thumb(&store, store.issue_id(), "rater")]).await.unwrap();
                    }
                })
            })
            .collect();
        let command = Store::open_for_command(&place.data(), place.url.as_deref()).await.unwrap();
        for person in 0..4 {
            assert_eq!(command.erase_user(&format!("p{person}"), "operator").await.unwrap().inferences, 300);
        }
        writers.iter().for_each(tokio::task::JoinHandle::abort);
        command.close().await;
        store.close().await;
    });
}

#[test]
fn not_a_byte_of_an_erased_person_is_left_in_the_files() {
    on_sqlite(&async |place: &Place| {
        const WORDS: &str = "unmistakable words";
        let text = |length: usize| format!("{WORDS} {}", "x".repeat(length));
        let store = place.open().await;
        for n in 0..200 {
            let mut hers = answer(&store, WORDS);
            hers.prompt_text = Some(text(n * 50));
            hers.choices[0].output_text = Some(text(n));
            let said = Feedback { value: text(n).into(), ..thumb(&store, hers.id, "rater") };
            let id = said.id;
            store.record(hers).unwrap();
            store.record(answer(&store, "bob")).unwrap();
            store.add_feedback(vec![said, thumb(&store, store.issue_id(), "rater")]).await.unwrap();
            if n % 3 == 0 {
                let shorter = FeedbackChange { value: Some((WORDS.into(), None)), ..Default::default() };
                store.edit_feedback(id, shorter).await.unwrap();
            }
        }
        let damaged = place.folder.path().join("spill/00000000000000ff.damaged");
        std::fs::write(&damaged, WORDS).unwrap();
        let found = || {
            let files = [place.folder.path().to_owned(), place.folder.path().join("spill")];
            let entries = files.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
            let with = |path: &std::path::PathBuf| {
                let bytes = if path.is_file() { std::fs::read(path).unwrap() } else { Vec::new() };
                bytes.windows(WORDS.len()).any(|window| window == WORDS.as_bytes())
            };
            entries.map(|entry| entry.unwrap().path()).filter(with).collect::<Vec<_>>()
        };
        store.flush().await;
        assert!(found().len() >= 2, "in the database or its log, and in the damaged segment");
        assert_eq!(store.erase_user(WORDS, "operator").await.unwrap().inferences, 200);
        assert_eq!(found(), Vec::<std::path::PathBuf>::new());
        assert_eq!(
            store.list_inferences(&InferenceFilter { limit: Some(1000), ..Default::default() }).await.unwrap().items.len(),
            200
        );
        store.close().await;
    });
}

fn queue() -> NewQueue {
    NewQueue {
        name: "q".into(),
        rule: serde_json::json!({}),
        guidelines: String::new(),
        overlap: 1,
        gold_share: 0.0,
        lease_seconds: 60,
        filled_until: String::new(),
    }
}

fn pair(a: &Inference) -> NewTask {
    NewTask {
        source: a.id.to_string(),
        prompt: serde_json::json!([]),
        answer_a: "first".into(),
        answer_b: "second".into(),
        candidate_a: Some(a.choices[0].id),
        candidate_b: Some(a.choices[1].id),
        gold: None,
    }
}

#[test]
fn a_draft_that_was_erased_while_its_answer_was_generated_becomes_no_task() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = labels.create_queue(queue(), 1, store.act("ann", "labeling.create")).await.unwrap();
        let hers = answer(&store, "ann");
        store.record(hers.clone()).unwrap();
        store.flush().await;
        let answer = Some(("first".to_owned(), hers.id));
        let new = NewDraft { source: hers.id.to_string(), prompt: serde_json::json!(["hers"]), answer, model: None };
        labels.add_drafts(queue.id, &[new], 1).await.unwrap();
        let draft = labels.waiting_drafts(1).await.unwrap().remove(0);
        store.erase_user("ann", "operator").await.unwrap();
        labels.finish_draft(&draft, &pair(&hers), 2).await.unwrap();
        assert!(labels.list_tasks(queue.id, TaskState::Any, None, 9).await.unwrap().is_empty());
        store.close().await;
    });
}

#[test]
fn what_was_read_before_an_erasure_and_is_written_after_it_does_not_stay() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = labels.create_queue(queue(), 1, store.act("ann", "labeling.create")).await.unwrap();
        let (hers, his) = (answer(&store, "ann"), answer(&store, "bob"));
        for recorded in [&hers, &his] {
            store.record(recorded.clone()).unwrap();
        }
        store.flush().await;
        let (on_hers, on_his) = (thumb(&store, hers.id, "rater"), thumb(&store, his.id, "rater"));
        store.erase_user("ann", "operator").await.unwrap();

        // The one who fills queues has both answers in hand.
        assert_eq!(labels.add_tasks(queue.id, &[pair(&hers), pair(&his)], 1).await.unwrap(), 1);
        let draft = |of: &Inference| NewDraft {
            source: format!("draft of {}", of.id),
            prompt: serde_json::json!([]),
            answer: Some(("first".to_owned(), of.id)),
            model: None,
        };
        assert_eq!(labels.add_drafts(queue.id, &[draft(&hers), draft(&his)], 1).await.unwrap(), 1);
        let tasks = labels.list_tasks(queue.id, TaskState::Any, None, 9).await.unwrap();
        assert_eq!(tasks.iter().map(|task| task.source.clone()).collect::<Vec<_>>(), [his.id.to_string()]);
        assert_eq!(labels.waiting_drafts(9).await.unwrap().len(), 1);

        // Somebody's word on them was on its way, through another server.
        store.add_feedback(vec![on_hers.clone(), on_his.clone()]).await.unwrap();
        assert_eq!(store.feedback(on_hers.id).await.unwrap(), None);
        assert!(store.feedback(on_his.id).await.unwrap().is_some());

        // And a snapshot was made of what they said.
        let sources: Sources =
            [("feedback", [on_hers.id.to_string()].into()), ("user", ["ann".to_owned(), "bob".to_owned()].into())].into();
        let snapshot = snapshot();
        let snapshots = Snapshots::new(store.database());
        snapshots.insert(&snapshot, &sources, true, store.act("ann", "dataset.make")).await.unwrap();
        let named = snapshots.sources(snapshot.id, "user").await.unwrap();
        assert!(named.len() == 2 && named.contains(&"bob".to_owned()) && !named.contains(&"ann".to_owned()), "{named:?}");
        store.close().await;
    });
}

fn snapshot() -> Snapshot {
    Snapshot {
        id: uuid::Uuid::now_v7(),
        name: "d".into(),
        version: 1,
        created: 5,
        query: serde_json::json!({}),
        content_hash: "abc".into(),
        location: "/data/x".into(),
        table_version: 1,
        row_counts: serde_json::json!({}),
        verdict: "pass".into(),
        report: serde_json::json!({}),
        tainted: None,
    }
}

/// Begins an erasure of ann that has to wait for a transaction which holds a lock.
async fn erase_behind(store: &Store) -> tokio::task::JoinHandle<Result<Erasure, StoreError>> {
    let erasing = tokio::spawn({
        let store = store.clone();
        async move { store.erase_user("ann", "operator").await }
    });
    // In this database: tests beside this one wait in theirs.
    let waiting = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("the erasure waits", async || {
        sqlx::query_as::<_, (i64,)>(waiting).fetch_one(store.database().read()).await.unwrap().0 > 0
    })
    .await;
    erasing
}

#[test]
fn an_erasure_waits_for_a_snapshot_and_for_a_draft_that_are_being_written() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let store = place.open().await;
        let hers = answer(&store, "ann");
        store.record(hers.clone()).unwrap();
        store.flush().await;
        // Half of what each does: it has not looked for marks yet, or has found none.
        let mut writing = store.database().write().begin().await.unwrap();
        for text in [
            "INSERT INTO snapshots (id, name, version, created, query, content_hash, location, table_version, row_counts, verdict, report)
             VALUES ('s', 'd', 1, 1, '{}', '', '', 1, '{}', 'pass', '{}')",
            "INSERT INTO snapshot_sources (snapshot_id, kind, source) VALUES ('s', 'user', 'ann')",
            "INSERT INTO label_drafts (id, queue_id, created, source, prompt, answer_a, candidate_a) VALUES ('d', 'q', 1, 'x', '[]', 'hers', $1)",
        ] {
            let query = sqlx::query(text);
            let query = if text.contains("$1") { query.bind(hers.id.to_string()) } else { query };
            query.execute(&mut *writing).await.unwrap();
        }
        let erasing = erase_behind(&store).await;
        // Who asks now, and is answered when the erasure is over, had read what was still there.
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let meanwhile = Inference { created: since_1970.as_micros() as i64, ..answer(&store, "ann") };
        writing.commit().await.unwrap();
        assert_eq!(erasing.await.unwrap().unwrap().snapshots, ["d@1"]);
        assert_eq!(one(&store, "SELECT CAST(COUNT(*) AS TEXT) FROM label_drafts").await, "0");
        assert_eq!(one(&store, "SELECT CAST(COUNT(*) AS TEXT) FROM snapshot_sources WHERE source = 'ann'").await, "0");
        store.record(meanwhile.clone()).unwrap();
        store.flush().await;
        assert_eq!(store.inference(meanwhile.id).await.unwrap(), None);
        store.close().await;
    });
}

#[test]
fn an_erasure_waits_for_a_verdict_that_is_being_written_and_neither_fails() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = labels.create_queue(queue(), 1, store.act("ann", "labeling.create")).await.unwrap();
        let hers = answer(&store, "ann");
        store.record(hers.clone()).unwrap();
        store.flush().await;
        labels.add_tasks(queue.id, &[pair(&hers)], 1).await.unwrap();
        // Half of what `submit` does, in its order.
        let mut verdict = store.database().write().begin().await.unwrap();
        sqlx::query("UPDATE label_tasks SET verdicts = 1").execute(&mut *verdict).await.unwrap();
        let erasing = erase_behind(&store).await;
        let text = "INSERT INTO feedback_targets (feedback_id, target) VALUES ('f', 't')";
        sqlx::query(text).execute(&mut *verdict).await.unwrap();
        verdict.commit().await.unwrap();
        assert_eq!(erasing.await.unwrap().unwrap().labels, 1);
        store.close().await;
    });
}
