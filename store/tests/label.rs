//! Queues of pairs: the rules, on both databases.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{Place, each};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tidemill_store::label::*;
use tidemill_store::records::{Kind, TargetKind};
use tidemill_store::{FeedbackFilter, Store};
use uuid::Uuid;

const MINUTE: i64 = 60_000_000;

fn new_queue(name: &str, overlap: u32, gold_share: f64) -> NewQueue {
    NewQueue {
        name: name.into(),
        rule: json!({"kind": "none"}),
        guidelines: "Be fair.".into(),
        overlap,
        gold_share,
        lease_seconds: 60,
        filled_until: String::new(),
    }
}

fn pair(source: &str) -> NewTask {
    NewTask {
        source: source.into(),
        prompt: json!([{"role": "user", "content": "Why?"}]),
        answer_a: "because".into(),
        answer_b: "why not".into(),
        candidate_a: None,
        candidate_b: None,
        gold: None,
    }
}

async fn queue_of(store: &Store, labels: &Labels, name: &str, overlap: u32, tasks: usize) -> Queue {
    let queue = labels.create_queue(new_queue(name, overlap, 0.0), 1, store.act("ann", "labeling.create")).await.unwrap();
    let tasks: Vec<NewTask> = (0..tasks).map(|n| pair(&format!("t{n}"))).collect();
    assert_eq!(labels.add_tasks(queue.id, &tasks, 1).await.unwrap(), tasks.len() as u64);
    queue
}

async fn work(labels: &Labels, queue: &Queue, who: &str, now: i64) -> (Task, Assignment) {
    match labels.lease(queue, who, now).await.unwrap() {
        Lease::Work(task, assignment) => (*task, assignment),
        Lease::Empty => panic!("nothing for {who}"),
    }
}

/// All feedback of this kind that stands.
async fn standing(store: &Store) -> usize {
    let filter =
        FeedbackFilter { kind: Some(Kind::Comparison), withdrawn: Some(false), limit: Some(1000), ..FeedbackFilter::default() };
    store.list_feedback(&filter).await.unwrap().items.len()
}

#[test]
fn a_source_enters_a_queue_once_and_a_name_is_taken_once() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 3).await;
        assert!(matches!(
            labels.create_queue(new_queue("q", 1, 0.0), 2, store.act("ann", "labeling.create")).await,
            Err(LabelError::NameTaken(_))
        ));
        assert_eq!(labels.add_tasks(queue.id, &[pair("t1"), pair("t9"), pair("t9")], 2).await.unwrap(), 1);
        let sources: Vec<String> =
            labels.list_tasks(queue.id, TaskState::Open, None, 10).await.unwrap().into_iter().map(|t| t.source).collect();
        assert_eq!(sources, ["t0", "t1", "t2", "t9"]);
        assert_eq!(labels.queue("q").await.unwrap(), labels.queue(&queue.id.to_string()).await.unwrap());
        assert!(matches!(labels.queue("p").await, Err(LabelError::NoQueue(_))));
        store.close().await;
    });
}

#[test]
fn a_task_is_with_one_person_at_a_time_and_comes_back_when_the_lease_runs_out() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 1).await;
        let (task, first) = work(&labels, &queue, "ann", 0).await;
        assert_eq!(work(&labels, &queue, "ann", 5).await.1, first, "asking again gives the same");
        // The second asking renewed the lease, to 5 + one minute.
        assert_eq!(labels.lease(&queue, "bob", MINUTE + 4).await.unwrap(), Lease::Empty);
        let (same, second) = work(&labels, &queue, "bob", MINUTE + 5).await;
        assert_eq!(same.id, task.id);
        assert!(matches!(labels.submit(first.id, "ann", Verdict::A, MINUTE + 6, None).await, Err(LabelError::LeaseLost)));
        assert!(matches!(labels.submit(second.id, "ann", Verdict::A, MINUTE + 6, None).await, Err(LabelError::NoAssignment(_))));
        labels.submit(second.id, "bob", Verdict::B, MINUTE + 7, None).await.unwrap();
        assert_eq!(labels.lease(&queue, "ann", MINUTE + 8).await.unwrap(), Lease::Empty);
        assert!(labels.task(task.id).await.unwrap().unwrap().done);
        store.close().await;
    });
}

#[test]
fn the_id_that_an_annotator_sees_does_not_tell_the_side() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 64).await;
        let mut told = 0;
        for person in 0..64 {
            let (_, own) = work(&labels, &queue, &format!("p{person}"), 0).await;
            told += usize::from(own.a_is_left == a_is_left(own.id));
        }
        // By chance once in 2⁶⁴.
        assert_ne!(told, 64);
        store.close().await;
    });
}

#[test]
fn a_name_that_no_database_can_hold_is_not_found() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        assert!(matches!(labels.queue("a\0b").await, Err(LabelError::NoQueue(_))));
        let filter = FeedbackFilter { author: Some("a\0b".into()), ..FeedbackFilter::default() };
        assert_eq!(store.list_feedback(&filter).await.unwrap().items, []);
        store.close().await;
    });
}

#[test]
fn a_late_verdict_counts_where_nobody_took_the_task() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 1).await;
        let (_, own) = work(&labels, &queue, "ann", 0).await;
        labels.submit(own.id, "ann", Verdict::Tie, 60 * MINUTE, None).await.unwrap();
        assert_eq!(labels.progress(queue.id, 60 * MINUTE).await.unwrap().done, 1);
        store.close().await;
    });
}

#[test]
fn a_verdict_is_feedback_with_the_sides_as_shown_and_undo_withdraws_it() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = labels.create_queue(new_queue("q", 1, 0.0), 1, store.act("ann", "labeling.create")).await.unwrap();
        let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
        let ours = NewTask { candidate_a: Some(a), candidate_b: Some(b), ..pair("ours") };
        labels.add_tasks(queue.id, &[ours], 1).await.unwrap();
        let (_, own) = work(&labels, &queue, "ann", 1_000).await;
        let done = labels.submit(own.id, "ann", Verdict::B, 8_000, Some("key")).await.unwrap();
        assert_eq!(labels.submit(own.id, "ann", Verdict::B, 9_000, None).await.unwrap(), done, "sent twice is stored once");
        assert!(matches!(labels.submit(own.id, "ann", Verdict::A, 9_000, None).await, Err(LabelError::AlreadyJudged)));
        let (a, b) = (a.to_string(), b.to_string());
        let shown = if own.a_is_left { [&a, &b] } else { [&b, &a] };
        let feedback = store.feedback(done.feedback_id.unwrap()).await.unwrap().unwrap();
        assert_eq!(feedback.value, json!({"candidates": [a, b], "ranking": [[b], [a]], "both_bad": false, "shown": shown}));
        assert_eq!(
            (feedback.author.as_deref(), feedback.withdrawn, feedback.target_kind),
            (Some("ann"), false, TargetKind::Completion)
        );
        assert_eq!(
            (feedback.source.as_deref(), feedback.latency_ms, feedback.key_id.as_deref()),
            (Some("console"), Some(7), Some("key"))
        );
        assert_eq!(feedback.targets, [a.clone(), b.clone()]);
        assert_eq!(feedback.tags, ["queue:q"]);

        let undone = labels.undo(&queue, "ann", 10_000).await.unwrap();
        assert_eq!(undone.feedback_id, done.feedback_id);
        let withdrawn = store.feedback(done.feedback_id.unwrap()).await.unwrap().unwrap();
        assert!(withdrawn.withdrawn && withdrawn.revision == 2);
        let Lease::Work(task, again) = undone.again else { panic!("the task was free") };
        assert_eq!((again.id, again.a_is_left, again.verdict), (own.id, own.a_is_left, None));
        assert_eq!((task.verdicts, task.done), (0, false));
        assert!(matches!(labels.undo(&queue, "ann", 11_000).await, Err(LabelError::NothingToUndo)));
        let second = labels.submit(own.id, "ann", Verdict::A, 12_000, None).await.unwrap();
        assert_ne!(second.feedback_id, done.feedback_id);
        let feedback = store.feedback(second.feedback_id.unwrap()).await.unwrap().unwrap();
        assert_eq!(feedback.value["ranking"], json!([[a], [b]]));
        store.close().await;
    });
}

#[test]
fn answers_that_are_not_ours_are_named_by_their_task() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 1).await;
        let (task, own) = work(&labels, &queue, "ann", 0).await;
        let done = labels.submit(own.id, "ann", Verdict::BothBad, 1, None).await.unwrap();
        let feedback = store.feedback(done.feedback_id.unwrap()).await.unwrap().unwrap();
        assert_eq!(feedback.value["ranking"], json!([[format!("{}:a", task.id), format!("{}:b", task.id)]]));
        assert_eq!(feedback.value["both_bad"], true);
        assert_eq!((feedback.target_kind, feedback.targets), (TargetKind::Task, vec![task.id.to_string()]));
        store.close().await;
    });
}

#[test]
fn a_skipped_task_goes_to_others_and_its_reason_stays() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 1).await;
        let (_, own) = work(&labels, &queue, "ann", 0).await;
        labels.skip(own.id, "ann", "not my language", 5).await.unwrap();
        labels.skip(own.id, "ann", "not my language", 6).await.unwrap();
        assert!(matches!(labels.submit(own.id, "ann", Verdict::A, 6, None).await, Err(LabelError::AlreadyJudged)));
        assert_eq!(labels.lease(&queue, "ann", 7).await.unwrap(), Lease::Empty);
        let judgements = labels.judgements(queue.id).await.unwrap();
        assert_eq!(judgements.len(), 1);
        assert_eq!((judgements[0].verdict, judgements[0].reason.as_deref()), (None, Some("not my language")));
        work(&labels, &queue, "bob", 8).await;
        assert!(matches!(labels.undo(&queue, "ann", 9).await.unwrap().again, Lease::Empty), "bob has it now");
        store.close().await;
    });
}

#[test]
fn gold_is_for_everyone_once_and_no_progress() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = labels.create_queue(new_queue("q", 1, 1.0), 1, store.act("ann", "labeling.create")).await.unwrap();
        let gold = |source: &str| NewTask { gold: Some(Verdict::A), ..pair(source) };
        labels.add_tasks(queue.id, &[gold("g1"), gold("g2"), pair("p")], 1).await.unwrap();
        for who in ["ann", "bob"] {
            for _ in 0..2 {
                let (task, own) = work(&labels, &queue, who, 0).await;
                assert!(task.gold.is_some());
                labels.submit(own.id, who, Verdict::A, 1, None).await.unwrap();
            }
        }
        let (task, _) = work(&labels, &queue, "ann", 0).await;
        assert_eq!(task.source, "p", "when gold is used up, plain tasks follow");
        let progress = labels.progress(queue.id, 0).await.unwrap();
        let expected = Progress { tasks: 1, gold: 2, gold_verdicts: 4, leased: 1, ..Progress::default() };
        assert_eq!(progress, expected);
        store.close().await;
    });
}

#[test]
fn a_closed_queue_hands_out_nothing() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 1).await;
        labels.change_queue(queue.id, Some(5), None, store.act("ann", "labeling.change")).await.unwrap();
        let queue = labels.queue("q").await.unwrap();
        assert_eq!((queue.closed, queue.guidelines.as_str()), (Some(5), "Be fair."));
        assert_eq!(labels.lease(&queue, "ann", 6).await.unwrap(), Lease::Empty);
        store.close().await;
    });
}

#[test]
fn a_draft_becomes_a_task_once() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 1).await;
        let first = Uuid::now_v7();
        let new = |source: &str| NewDraft {
            source: source.into(),
            prompt: json!([]),
            answer: Some(("one".to_owned(), first)),
            model: None,
        };
        assert_eq!(labels.add_drafts(queue.id, &[new("t0"), new("d"), new("e")], 1).await.unwrap(), 2, "t0 is a task already");
        assert_eq!(labels.add_drafts(queue.id, &[new("d")], 1).await.unwrap(), 0);
        let drafts = labels.waiting_drafts(9).await.unwrap();
        assert_eq!(drafts[0].answer, Some(("one".to_owned(), first)));
        for _ in 0..2 {
            labels.finish_draft(&drafts[0], &pair("d"), 2).await.unwrap();
        }
        labels.fail_draft(drafts[1].id, "too long").await.unwrap();
        assert_eq!(labels.failures(queue.id, 9).await.unwrap(), [("e".to_owned(), "too long".to_owned())]);
        let progress = labels.progress(queue.id, 0).await.unwrap();
        assert_eq!((progress.tasks, progress.drafts, progress.failed), (2, 0, 1));
        assert!(labels.waiting_drafts(9).await.unwrap().is_empty());
        store.close().await;
    });
}

#[test]
fn a_queue_is_full_by_what_waits_in_it() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 3).await;
        let gold = NewTask { gold: Some(Verdict::A), ..pair("gold") };
        labels.add_tasks(queue.id, &[gold], 1).await.unwrap();
        let draft = NewDraft { source: "d".into(), prompt: json!([]), answer: None, model: None };
        labels.add_drafts(queue.id, &[draft], 1).await.unwrap();
        assert!(labels.is_full(queue.id, 4).await.unwrap() && !labels.is_full(queue.id, 5).await.unwrap());
        let (_, work) = work(&labels, &queue, "ann", 1).await;
        labels.submit(work.id, "ann", Verdict::A, 2, None).await.unwrap();
        assert!(!labels.is_full(queue.id, 4).await.unwrap());
        store.close().await;
    });
}

#[test]
fn of_two_gateways_one_moves_the_cursor() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 1, 0).await;
        assert!(labels.advance(queue.id, "", "5").await.unwrap());
        assert!(!labels.advance(queue.id, "", "6").await.unwrap());
        assert_eq!(labels.queue("q").await.unwrap().filled_until, "5");
        store.close().await;
    });
}

/// Six people on two gateways at once, with skips, undos and leases that run out (the clock jumps), until nothing is left.
async fn crowd(stores: [Store; 2]) {
    const PEOPLE: u64 = 6;
    const OVERLAP: u32 = 3;
    let labels = stores.each_ref().map(|store| Labels::new(store.database()));
    let queue = queue_of(&stores[0], &labels[0], &format!("crowd{}", Uuid::now_v7()), OVERLAP, 40).await;
    let clock = Arc::new(AtomicI64::new(1));
    let holders = Arc::new(std::sync::Mutex::new(HashMap::<Uuid, (String, i64, i64)>::new()));
    let mut people = tokio::task::JoinSet::new();
    for person in 0..PEOPLE {
        let (labels, queue) = (labels[(person % 2) as usize].clone(), queue.clone());
        let (clock, holders) = (clock.clone(), holders.clone());
        people.spawn(async move {
            let who = format!("p{person}");
            let mut state = person;
            // Until all is done: who leaves early would be missed by a task that needs three.
            while labels.progress(queue.id, 0).await.unwrap().done < 40 {
                let now = clock.fetch_add(1_000_000, Ordering::SeqCst);
                // Knuth's MMIX generator; its high bits are the good ones.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let random = state >> 33;
                let (task, own) = match labels.lease(&queue, &who, now).await.unwrap() {
                    Lease::Work(task, own) => (*task, own),
                    Lease::Empty => {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                        continue;
                    }
                };
                let until = now + i64::from(queue.lease_seconds) * 1_000_000;
                let before = holders.lock().unwrap().insert(task.id, (who.clone(), now, until));
                if let Some((other, from, to)) = before {
                    let apart = to <= now || until <= from;
                    assert!(other == who || apart, "{other} had it {from}..{to}, {who} {now}..{until}");
                }
                tokio::task::yield_now().await;
                // One in eight leaves without a word; the lease runs out.
                if random % 8 == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    clock.fetch_add(2 * MINUTE, Ordering::SeqCst);
                    continue;
                }
                let release = |_: &Assignment| {
                    let mut holders = holders.lock().unwrap();
                    if holders.get(&task.id).is_some_and(|(holder, ..)| *holder == who) {
                        holders.remove(&task.id);
                    }
                };
                // The note is removed before the database lets go, so that nobody finds it stale.
                release(&own);
                match labels.submit(own.id, &who, if random % 3 == 0 { Verdict::Tie } else { Verdict::A }, now, None).await {
                    Ok(_) if random % 5 == 0 => {
                        if let Ok(Undone { again: Lease::Work(task, _), .. }) = labels.undo(&queue, &who, now).await {
                            holders.lock().unwrap().insert(task.id, (who.clone(), now, until));
                        }
                    }
                    Ok(_) | Err(LabelError::LeaseLost) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    people.join_all().await;
    let tasks = labels[1].list_tasks(queue.id, TaskState::Any, None, 100).await.unwrap();
    assert_eq!(tasks.len(), 40);
    let judgements = labels[1].judgements(queue.id).await.unwrap();
    for task in tasks {
        assert!(task.done && task.verdicts == OVERLAP, "{task:?}");
        let mut by: Vec<&str> = judgements.iter().filter(|j| j.task_id == task.id).map(|j| j.annotator.as_str()).collect();
        by.sort_unstable();
        by.dedup();
        assert_eq!(by.len(), OVERLAP as usize, "three different people");
    }
    assert_eq!(judgements.len(), 120);
    assert_eq!(standing(&stores[0]).await, 120);
    for store in stores {
        store.close().await;
    }
}

#[test]
fn a_crowd_on_two_gateways_gives_every_task_its_verdicts_and_no_more() {
    each(async |place: &Place| crowd([place.open().await, place.open().await]).await);
}

#[test]
fn erasing_an_annotator_opens_their_tasks_again() {
    each(async |place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let queue = queue_of(&store, &labels, "q", 2, 2).await;
        for who in ["ann", "bob", "ann"] {
            let (_, own) = work(&labels, &queue, who, 0).await;
            labels.submit(own.id, who, Verdict::A, 1, None).await.unwrap();
        }
        let (held, _) = work(&labels, &queue, "bob", 2).await;
        store.erase_user("ann", "operator").await.unwrap();
        assert_eq!(standing(&store).await, 1);
        let tasks = labels.list_tasks(queue.id, TaskState::Open, None, 9).await.unwrap();
        let verdicts: Vec<(bool, u32)> = tasks.iter().map(|task| (task.id == held.id, task.verdicts)).collect();
        assert_eq!(verdicts, [(false, 1), (true, 0)]);
        assert!(labels.judgements(queue.id).await.unwrap().iter().all(|judgement| judgement.annotator == "bob"));
        store.close().await;
    });
}
