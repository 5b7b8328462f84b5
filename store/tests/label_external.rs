//! What another tool's judgements do to tasks, assignments and feedback, on both databases.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::{Place, each};
use serde_json::{Value, json};
use tidemill_store::Store;
use tidemill_store::label::*;
use uuid::Uuid;

struct Scene {
    store: Store,
    labels: Labels,
    queue: Queue,
    tasks: Vec<Task>,
}

impl Scene {
    async fn new(place: &Place, overlap: u32) -> Self {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let new = NewQueue {
            name: "q".into(),
            rule: json!({}),
            guidelines: String::new(),
            overlap,
            gold_share: 0.0,
            lease_seconds: 60,
            filled_until: String::new(),
        };
        let queue = labels.create_queue(new, 1, store.act("ann", "labeling.create")).await.unwrap();
        let pair = |n: u32| NewTask {
            source: format!("t{n}"),
            prompt: json!([{"role": "user", "content": "Why?"}]),
            answer_a: "because".into(),
            answer_b: "why not".into(),
            candidate_a: Some(Uuid::from_u128(u128::from(n) + 1)),
            candidate_b: Some(Uuid::from_u128(u128::from(n) + 1001)),
            gold: None,
        };
        let pairs: Vec<NewTask> = (0..3).map(pair).collect();
        labels.add_tasks(queue.id, &pairs, 1).await.unwrap();
        let tasks = labels.list_tasks(queue.id, TaskState::Any, None, 9).await.unwrap();
        Self { store, labels, queue, tasks }
    }

    /// Annotation `id` of `who` on the first task, in the version `version`.
    fn said(&self, id: u32, version: i64, who: &str, outcome: Outcome) -> External {
        External {
            tool: "label-studio",
            id: format!("1/{id}"),
            version: Some(version),
            task_id: self.tasks[0].id,
            annotator: format!("label-studio:{who}"),
            outcome,
            comment: None,
            a_is_left: false,
            finished: Some(version),
            latency_ms: Some(2500),
        }
    }

    async fn take(&self, external: &External) -> Applied {
        let result = self.labels.import(&self.queue, std::slice::from_ref(external), 999, Some("key")).await.unwrap();
        result.into_iter().next().unwrap().unwrap()
    }

    async fn delete(&self, id: u32) -> Applied {
        self.labels.delete_external(&self.queue, "label-studio", &[format!("1/{id}")], 999).await.unwrap()[0]
    }

    /// Feedback that stands, the newest last: author, first of the ranking, revision, comment.
    async fn standing(&self) -> Vec<(String, String, i64, Value)> {
        let rows: Vec<(String, String, i64)> =
            sqlx::query_as("SELECT author, value, revision FROM feedback WHERE withdrawn = 0 ORDER BY created, id")
                .fetch_all(self.store.database().read())
                .await
                .unwrap();
        let first = |value: &Value| {
            value["ranking"][0]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_str().unwrap()[30..].to_owned())
                .collect::<Vec<_>>()
                .join("=")
        };
        rows.into_iter()
            .map(|(author, value, revision)| {
                let value: Value = serde_json::from_str(&value).unwrap();
                (author, first(&value), revision, value["comment"].clone())
            })
            .collect()
    }

    async fn count(&self, table: &str) -> i64 {
        let sql = sqlx::AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
        let (count,): (i64,) = sqlx::query_as(sql).fetch_one(self.store.database().read()).await.unwrap();
        count
    }

    async fn task(&self) -> Task {
        self.labels.task(self.tasks[0].id).await.unwrap().unwrap()
    }
}

const A: Outcome = Outcome::Judged(Verdict::A);
const B: Outcome = Outcome::Judged(Verdict::B);
// The ends of the candidates' ids.
const FIRST: &str = "000001";
const SECOND: &str = "0003e9";

#[test]
fn a_judgement_is_recorded_once_and_an_update_edits_the_same_feedback() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        let created = scene.said(1, 10, "5", A);
        assert_eq!(scene.take(&created).await, Applied::Recorded);
        assert_eq!(scene.take(&created).await, Applied::Unchanged);
        assert_eq!(scene.standing().await, [("label-studio:5".to_owned(), FIRST.to_owned(), 1, Value::Null)]);
        assert!(scene.task().await.done);

        let updated = External { comment: Some("it\0 is shorter".into()), ..scene.said(1, 20, "5", B) };
        assert_eq!(scene.take(&updated).await, Applied::Edited);
        assert_eq!(scene.take(&updated).await, Applied::Unchanged);
        // The first message, late or sent again.
        assert_eq!(scene.take(&created).await, Applied::Unchanged);
        assert_eq!(scene.standing().await, [("label-studio:5".to_owned(), SECOND.to_owned(), 2, json!("it\u{FFFD} is shorter"))]);
        assert_eq!((scene.count("feedback").await, scene.count("feedback_revisions").await), (1, 1));
        let own = scene.labels.assignments_of(scene.tasks[0].id).await.unwrap().remove(0);
        assert_eq!((own.verdict, own.a_is_left, own.finished, own.started), (Some(Verdict::B), false, Some(20), 20 - 2_500_000));
        assert_eq!(own.external.as_deref(), Some("label-studio:1/1"));
        scene.store.close().await;
    });
}

#[test]
fn a_touched_annotation_that_says_the_same_is_no_edit() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        scene.take(&scene.said(1, 10, "5", A)).await;
        assert_eq!(scene.take(&External { finished: Some(10), ..scene.said(1, 20, "5", A) }).await, Applied::Unchanged);
        assert_eq!(scene.standing().await[0].2, 1);
        assert_eq!(scene.take(&scene.said(1, 15, "5", B)).await, Applied::Unchanged, "15 is older than 20");
        scene.store.close().await;
    });
}

#[test]
fn a_deleted_judgement_is_withdrawn_and_stays_deleted() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        let created = scene.said(1, 10, "5", A);
        scene.take(&created).await;
        assert_eq!(scene.delete(1).await, Applied::Withdrawn);
        assert_eq!(scene.delete(1).await, Applied::Unchanged);
        assert_eq!(scene.take(&created).await, Applied::Unchanged);
        assert_eq!(scene.take(&scene.said(1, 30, "5", B)).await, Applied::Unchanged);
        assert_eq!(scene.standing().await, []);
        assert_eq!(scene.count("feedback").await, 1, "withdrawn, not gone");
        assert!(!scene.task().await.done && scene.task().await.verdicts == 0);
        // The person judges anew.
        assert_eq!(scene.take(&scene.said(2, 40, "5", B)).await, Applied::Recorded);
        assert_eq!(scene.standing().await.len(), 1);
        assert_eq!(scene.task().await.verdicts, 1);
        scene.store.close().await;
    });
}

#[test]
fn a_deletion_that_overtakes_its_judgement_wins() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        assert_eq!(scene.delete(1).await, Applied::Unchanged);
        assert_eq!(scene.take(&scene.said(1, 10, "5", A)).await, Applied::Unchanged);
        assert_eq!(scene.standing().await, []);
        scene.store.close().await;
    });
}

#[test]
fn a_skip_withdraws_and_a_verdict_after_it_counts_again() {
    each(async |place| {
        let scene = Scene::new(place, 2).await;
        scene.take(&scene.said(1, 10, "5", A)).await;
        let skip = External { comment: Some("no idea".into()), ..scene.said(1, 20, "5", Outcome::Skipped) };
        assert_eq!(scene.take(&skip).await, Applied::Skipped);
        assert_eq!(scene.standing().await, []);
        let own = scene.labels.assignments_of(scene.tasks[0].id).await.unwrap().remove(0);
        assert_eq!((own.state, own.reason.as_deref()), (State::Skipped, Some("no idea")));
        assert_eq!(scene.take(&scene.said(1, 30, "5", B)).await, Applied::Recorded);
        assert_eq!(scene.standing().await.len(), 1);
        assert_eq!(scene.take(&scene.said(1, 40, "5", Outcome::Open)).await, Applied::Withdrawn);
        assert_eq!(scene.standing().await, []);
        scene.store.close().await;
    });
}

#[test]
fn of_two_annotations_by_one_person_the_newer_counts_and_the_older_comes_back() {
    each(async |place| {
        let scene = Scene::new(place, 2).await;
        scene.take(&scene.said(2, 20, "5", B)).await;
        scene.take(&scene.said(1, 10, "5", A)).await;
        assert_eq!(scene.standing().await.iter().map(|row| row.1.as_str()).collect::<Vec<_>>(), [SECOND]);
        assert_eq!(scene.task().await.verdicts, 1);
        scene.delete(2).await;
        assert_eq!(scene.standing().await.iter().map(|row| row.1.as_str()).collect::<Vec<_>>(), [FIRST]);
        scene.store.close().await;
    });
}

#[test]
fn ground_truth_is_the_tasks_gold_and_not_a_vote() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        scene.take(&scene.said(1, 10, "5", A)).await;
        let gold = scene.said(1, 20, "5", Outcome::Gold(Verdict::A));
        assert_eq!(scene.take(&gold).await, Applied::Gold);
        assert_eq!(scene.take(&gold).await, Applied::Unchanged);
        let task = scene.task().await;
        assert_eq!((task.gold, task.verdicts, task.done), (Some(Verdict::A), 0, false));
        assert_eq!(scene.standing().await, []);
        // Others are measured by it: their verdicts count, and the task is never done.
        scene.take(&scene.said(3, 25, "6", B)).await;
        assert_eq!((scene.task().await.verdicts, scene.task().await.done), (1, false));
        // The star is taken away.
        assert_eq!(scene.take(&scene.said(1, 30, "5", A)).await, Applied::Recorded);
        assert_eq!((scene.task().await.gold, scene.task().await.done), (None, true));
        scene.store.close().await;
    });
}

#[test]
fn without_versions_what_comes_last_stands() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        let said = |outcome| External { version: None, finished: None, ..scene.said(1, 0, "5", outcome) };
        assert_eq!(scene.take(&said(A)).await, Applied::Recorded);
        assert_eq!(scene.take(&said(A)).await, Applied::Unchanged);
        assert_eq!(scene.take(&said(B)).await, Applied::Edited);
        assert_eq!(scene.standing().await[0].1, SECOND);
        scene.store.close().await;
    });
}

#[test]
fn an_annotation_that_changes_hands_moves_to_the_new_person() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        scene.take(&scene.said(1, 10, "5", A)).await;
        scene.take(&scene.said(1, 20, "6", A)).await;
        let standing = scene.standing().await;
        assert_eq!(standing.iter().map(|row| row.0.as_str()).collect::<Vec<_>>(), ["label-studio:6"]);
        assert_eq!(scene.task().await.verdicts, 1);
        scene.store.close().await;
    });
}

#[test]
fn tasks_of_other_queues_and_ids_of_other_tasks_are_refused() {
    each(async |place| {
        let scene = Scene::new(place, 1).await;
        let stranger = External { task_id: Uuid::from_u128(77), ..scene.said(1, 10, "5", A) };
        let elsewhere = External { task_id: scene.tasks[1].id, ..scene.said(2, 30, "5", A) };
        let results =
            scene.labels.import(&scene.queue, &[scene.said(2, 10, "5", A), stranger, elsewhere], 9, None).await.unwrap();
        assert_eq!(results[0], Ok(Applied::Recorded));
        assert_eq!(results[1], Err(Refused::UnknownTask { queue: "q".into(), task: Uuid::from_u128(77) }));
        assert_eq!(results[2], Err(Refused::OtherTask { tool: "label-studio", id: "1/2".into() }));
        assert_eq!(scene.standing().await.len(), 1);
        scene.store.close().await;
    });
}

#[test]
fn the_same_file_from_eight_sides_at_once_is_one_import() {
    each(async |place| {
        let scene = Scene::new(place, 2).await;
        let said = |task: usize, n: u32| External {
            task_id: scene.tasks[task].id,
            ..scene.said(n, i64::from(n), if n.is_multiple_of(2) { "5" } else { "6" }, if n.is_multiple_of(3) { A } else { B })
        };
        let file: Vec<External> = (0..6).map(|n| said((n / 2) as usize, n)).collect();
        let reversed: Vec<External> = file.iter().rev().cloned().collect();
        let mut running = tokio::task::JoinSet::new();
        for side in 0..8 {
            let (labels, queue, file) =
                (scene.labels.clone(), scene.queue.clone(), if side % 2 == 0 { file.clone() } else { reversed.clone() });
            running.spawn(async move { labels.import(&queue, &file, 9, None).await.unwrap() });
        }
        let results: Vec<Applied> = running.join_all().await.into_iter().flatten().map(Result::unwrap).collect();
        assert_eq!(results.iter().filter(|&&applied| applied == Applied::Recorded).count(), 6);
        assert_eq!(results.iter().filter(|&&applied| applied == Applied::Unchanged).count(), 42);
        assert_eq!((scene.count("feedback").await, scene.count("label_assignments").await), (6, 6));
        scene.store.close().await;
    });
}
