//! The database goes away under load and comes back.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::proxy::{Proxy, Wire, eventually};
use crate::support::{Place, answer, each, on_postgres, postgres, thumb};
use sqlx::Connection;
use tidemill_store::label::{LabelError, Labels};
use tidemill_store::{Batches, Dialect, FileDraft, Files, Jobs, Snapshots, Store, StoreError, StoreOptions, Viewer};
use uuid::Uuid;

/// Something that makes the database of a place unusable for a while.
enum Outage {
    Wire(Proxy),
    /// SQLite: another process has the file's lock.
    Lock(Option<sqlx::AnyConnection>, String),
}

impl Outage {
    /// And the options with which a store is hit by it.
    async fn of(place: &Place) -> (Self, StoreOptions) {
        match &place.url {
            Some(url) => {
                let proxy = Proxy::to(url).await;
                let url = Some(proxy.address.clone());
                (Self::Wire(proxy), StoreOptions { url, ..place.options() })
            }
            None => (Self::Lock(None, format!("sqlite:{}/tidemill.db", place.folder.path().display())), place.options()),
        }
    }

    async fn begin(&mut self, wire: Wire) {
        match self {
            Self::Wire(proxy) => proxy.set(wire),
            Self::Lock(held, url) => {
                let mut connection = sqlx::AnyConnection::connect(url).await.unwrap();
                eventually("the file's lock is free", async || {
                    sqlx::query("BEGIN EXCLUSIVE").execute(&mut connection).await.is_ok()
                })
                .await;
                *held = Some(connection);
            }
        }
    }

    async fn end(&mut self) {
        match self {
            Self::Wire(proxy) => proxy.set(Wire::Up),
            Self::Lock(held, _) => held.take().unwrap().close().await.unwrap(),
        }
    }
}

async fn count(store: &Store, table: &str) -> (i64, HashSet<Uuid>) {
    let rows: Vec<(String,)> =
        sqlx::query_as(sqlx::AssertSqlSafe(format!("SELECT id FROM {table}"))).fetch_all(store.database().read()).await.unwrap();
    (rows.len() as i64, rows.iter().map(|(id,)| id.parse().unwrap()).collect())
}

/// Four applications and a stream of answers, until told to stop; returns what was accepted and the slowest `record`. `sent` counts
/// the feedback as it is acknowledged.
async fn load(store: Store, stop: Arc<AtomicBool>, sent: Arc<AtomicUsize>) -> (HashSet<Uuid>, HashSet<Uuid>, Duration) {
    let mut senders = Vec::new();
    for _ in 0..4 {
        let (store, stop, sent) = (store.clone(), stop.clone(), sent.clone());
        senders.push(tokio::spawn(async move {
            let mut acknowledged = HashSet::new();
            while !stop.load(Ordering::Relaxed) {
                let one = thumb(&store, store.issue_id(), "rater");
                let id = one.id;
                store.add_feedback(vec![one]).await.unwrap();
                acknowledged.insert(id);
                sent.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            acknowledged
        }));
    }
    let (mut answers, mut slowest) = (HashSet::new(), Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..4 {
            let one = answer(&store, "ann");
            let id = one.id;
            assert!(store.has_room());
            let start = Instant::now();
            store.record(one).unwrap();
            slowest = slowest.max(start.elapsed());
            answers.insert(id);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut feedback = HashSet::new();
    for sender in senders {
        feedback.extend(sender.await.unwrap());
    }
    (answers, feedback, slowest)
}

fn records_go_on_and_are_there_once(wire: Wire) {
    let body = async |place: &Place| {
        let (mut outage, options) = Outage::of(place).await;
        // A queue so small that the spill log is used from within `record`, too.
        let store = Store::open(StoreOptions { queue: 64, ..options }).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicUsize::new(0));
        let load = tokio::spawn(load(store.clone(), stop.clone(), sent.clone()));
        eventually("feedback is acknowledged", async || sent.load(Ordering::Relaxed) > 20).await;
        outage.begin(wire).await;
        let before = sent.load(Ordering::Relaxed);
        // Those that wait for the database wait five seconds, each sender once; a disk that is busy may take longer.
        tokio::time::sleep(Duration::from_secs(8)).await;
        eventually("feedback is accepted during the outage, too", async || sent.load(Ordering::Relaxed) - before > 20).await;
        outage.end().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        stop.store(true, Ordering::Relaxed);
        let (answers, feedback, slowest) = load.await.unwrap();
        eventually("every record is in the database", async || {
            store.flush().await;
            count(&store, "inferences").await.1.len() >= answers.len()
                && count(&store, "feedback").await.1.len() >= feedback.len()
        })
        .await;
        assert_eq!(count(&store, "inferences").await, (answers.len() as i64, answers.clone()));
        assert_eq!(count(&store, "feedback").await, (feedback.len() as i64, feedback.clone()));
        assert_eq!(count(&store, "choices").await.0, 2 * answers.len() as i64);
        assert!(slowest < Duration::from_secs(4), "recording never waits for the database: {slowest:?}");
        eventually("the spill log is empty", async || std::fs::read_dir(place.folder.path().join("spill")).unwrap().count() == 0)
            .await;
        store.close().await;
    };
    match wire {
        Wire::Held => each(body),
        _ => {
            if let Some(server) = postgres() {
                on_postgres(&server, &body);
            }
        }
    }
}

#[test]
fn a_stopped_database_loses_nothing_and_doubles_nothing() {
    records_go_on_and_are_there_once(Wire::Cut);
}

#[test]
fn a_hanging_database_loses_nothing_and_doubles_nothing() {
    records_go_on_and_are_there_once(Wire::Held);
}

#[test]
fn when_queue_and_spill_log_are_full_new_requests_are_turned_away_and_what_was_taken_arrives() {
    each(async |place| {
        let (mut outage, options) = Outage::of(place).await;
        let store = Store::open(StoreOptions { queue: 16, spill_bytes: 100_000, ..options }).await.unwrap();
        outage.begin(Wire::Cut).await;
        let mut taken = HashSet::new();
        let mut turned_away_at = None;
        for number in 0..1000 {
            if turned_away_at.is_none() && !store.has_room() {
                turned_away_at = Some(number);
            }
            let one = answer(&store, "ann");
            let id = one.id;
            if store.record(one).is_err() {
                break;
            }
            taken.insert(id);
            // The writer has to find out that the database is away.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let room_at = turned_away_at.unwrap();
        assert!(
            taken.len() < 1000 && taken.len() >= room_at + 5,
            "room for running requests: asked {room_at}, full {}",
            taken.len()
        );
        let refused = loop {
            match store.add_feedback(vec![thumb(&store, store.issue_id(), "rater")]).await {
                Ok(sent) => assert!(!sent[0].duplicate),
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, StoreError::Full(_)), "{refused}");
        outage.end().await;
        eventually("there is room again", async || {
            store.has_room() && !matches!(count(&store, "inferences").await, (n, _) if n < taken.len() as i64)
        })
        .await;
        assert_eq!(count(&store, "inferences").await.1, taken);
        store.close().await;
    });
}

#[test]
fn feedback_with_an_idempotency_key_is_refused_while_duplicates_cannot_be_known_and_taken_after() {
    each(async |place| {
        let (mut outage, options) = Outage::of(place).await;
        let store = Store::open(options).await.unwrap();
        let keyed =
            || tidemill_store::records::Feedback { idempotency_key: Some("k".into()), ..thumb(&store, store.issue_id(), "a") };
        let first = keyed();
        let sent = store.add_feedback(vec![first.clone()]).await.unwrap();
        assert_eq!((sent[0].id, sent[0].duplicate), (first.id, false));
        outage.begin(Wire::Cut).await;
        assert!(matches!(store.add_feedback(vec![keyed()]).await, Err(StoreError::Away)));
        let plain = thumb(&store, store.issue_id(), "a");
        store.add_feedback(vec![plain.clone()]).await.unwrap();
        outage.end().await;
        eventually("the late one is there", async || store.feedback(plain.id).await.unwrap() == Some(plain.clone())).await;
        // Twice in one request, and again in the next. The row is there a moment before the store believes that the database is.
        let mut sent = Vec::new();
        eventually("keyed feedback is taken", async || match store.add_feedback(vec![keyed(), keyed()]).await {
            Ok(acknowledged) => {
                sent = acknowledged;
                true
            }
            Err(_) => false,
        })
        .await;
        assert!(sent.iter().all(|one| one.duplicate && one.id == first.id));
        let same = keyed();
        let pair = [same.clone(), same.clone()]
            .map(|one| tidemill_store::records::Feedback { idempotency_key: Some("k2".into()), ..one });
        let twin = tidemill_store::records::Feedback { id: store.issue_id(), ..pair[1].clone() };
        let sent = store.add_feedback(vec![pair[0].clone(), twin]).await.unwrap();
        assert_eq!(sent.iter().map(|one| (one.id, one.duplicate)).collect::<Vec<_>>(), [(same.id, false), (same.id, true)]);
        store.close().await;
    });
}

#[test]
fn what_waits_in_the_spill_log_survives_a_restart_and_that_there_are_keys_is_known_without_the_database() {
    each(async |place| {
        let (mut outage, options) = Outage::of(place).await;
        let store = Store::open(options.clone()).await.unwrap();
        let (key, secret) = store.create_key("app", &[tidemill_store::Scope::Chat]).await.unwrap();
        assert_eq!(store.find_key(&secret).await.unwrap(), Some(key));
        assert!(store.any_key().await.unwrap());
        outage.begin(Wire::Cut).await;
        let one = answer(&store, "ann");
        store.record(one.clone()).unwrap();
        let judged = thumb(&store, one.id, "rater");
        store.add_feedback(vec![judged.clone()]).await.unwrap();
        store.flush().await;
        assert!(store.any_key().await.unwrap());
        if place.dialect == Dialect::Sqlite {
            // Closing checkpoints, which needs the lock.
            outage.end().await;
        }
        store.close().await;
        if place.dialect == Dialect::Postgres {
            assert!(std::fs::read_dir(place.folder.path().join("spill")).unwrap().count() > 0);
            outage.end().await;
        }

        let store = Store::open(options).await.unwrap();
        eventually("both are there", async || {
            store.feedback(judged.id).await.unwrap().is_some() && store.inference(one.id).await.unwrap().is_some()
        })
        .await;
        assert_eq!(store.inference(one.id).await.unwrap().unwrap(), one);
        assert_eq!(store.feedback(judged.id).await.unwrap().unwrap(), judged);
        store.close().await;
    });
}

#[test]
fn when_the_spill_log_cannot_be_written_new_requests_are_turned_away() {
    each(async |place| {
        let (mut outage, options) = Outage::of(place).await;
        let store = Store::open(StoreOptions { queue: 64, ..options }).await.unwrap();
        let spill = place.folder.path().join("spill");
        std::fs::remove_dir(&spill).unwrap();
        outage.begin(Wire::Cut).await;
        let mut taken = HashSet::new();
        let mut lost = 0;
        for _ in 0..1000 {
            if !store.has_room() {
                break;
            }
            let one = answer(&store, "ann");
            let id = one.id;
            match store.record(one) {
                Ok(()) => assert!(taken.insert(id)),
                Err(_) => lost += 1,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!store.has_room());
        assert!(lost <= 1, "the first write that fails tells: {lost}");
        std::fs::create_dir(&spill).unwrap();
        outage.end().await;
        eventually("every record is in the database", async || count(&store, "inferences").await.1 == taken).await;
        assert!(store.has_room());
        store.close().await;
    });
}

#[test]
fn readers_that_hold_every_connection_are_no_outage() {
    each(async |place| {
        let store = place.open().await;
        let mut held = Vec::new();
        while let Ok(Ok(connection)) = tokio::time::timeout(Duration::from_secs(1), store.database().read().acquire()).await {
            held.push(connection);
        }
        let one = tidemill_store::records::Feedback { idempotency_key: Some("k".into()), ..thumb(&store, store.issue_id(), "a") };
        store.add_feedback(vec![one]).await.unwrap();
        drop(held);
        assert_eq!(count(&store, "feedback").await.0, 1);
        store.close().await;
    });
}

#[test]
fn connections_that_the_network_has_swallowed_are_given_up() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let proxy = Proxy::to(place.url.as_deref().unwrap()).await;
        let store = Store::open(StoreOptions { url: Some(proxy.address.clone()), ..place.options() }).await.unwrap();
        let sixteen_reads = async || {
            let reads: Vec<_> = (0..16)
                .map(|_| {
                    let store = store.clone();
                    tokio::spawn(async move { store.feedback(store.issue_id()).await.is_ok() })
                })
                .collect();
            let mut answered = 0;
            for read in reads {
                answered += usize::from(read.await.unwrap());
            }
            answered
        };
        assert_eq!(sixteen_reads().await, 16);
        proxy.set(Wire::Lost);
        assert_eq!(sixteen_reads().await, 0);
        let one = answer(&store, "ann");
        store.record(one.clone()).unwrap();
        store.flush().await;
        proxy.set(Wire::Up);
        eventually("reads are answered again", async || sixteen_reads().await == 16).await;
        eventually("what was recorded is there", async || store.inference(one.id).await.is_ok_and(|found| found.is_some())).await;
        store.close().await;
    });
}

/// Whether the call ended by itself, and said that the database is away.
async fn given_up<T>(call: impl Future<Output = Result<T, StoreError>>) -> bool {
    matches!(tokio::time::timeout(Duration::from_secs(50), call).await, Ok(Err(StoreError::Away)))
}

#[test]
fn a_statement_that_never_ends_holds_up_no_call() {
    let Some(server) = postgres() else { return };
    on_postgres(&server, &async |place: &Place| {
        let store = place.open().await;
        let labels = Labels::new(store.database());
        let files = Files::open(&store, &place.data()).await.unwrap();
        let mut held = sqlx::AnyConnection::connect(place.url.as_deref().unwrap()).await.unwrap();
        let lock = "LOCK TABLE label_queues, jobs, batches, files, api_keys, audit, snapshots IN ACCESS EXCLUSIVE MODE";
        for text in ["BEGIN", lock] {
            sqlx::query(text).execute(&mut held).await.unwrap();
        }
        let id = store.issue_id();
        let none = serde_json::Value::Null;
        let (jobs, batches, snapshots) =
            (Jobs::new(store.database()), Batches::new(store.database()), Snapshots::new(store.database()));
        // Few enough for a connection each.
        let reads = tokio::join!(
            given_up(async { labels.queue("q").await.map_err(of_labels) }),
            given_up(jobs.find(id, 0)),
            given_up(batches.find(id, &Viewer::Anyone)),
            given_up(files.find(id, &Viewer::Anyone, 0)),
            given_up(snapshots.find("d", None)),
        );
        assert_eq!(reads, (true, true, true, true, true));
        let writes = tokio::join!(
            given_up(async { labels.change_queue(id, None, None, store.act("a", "b")).await.map_err(of_labels) }),
            given_up(jobs.insert(id, "k", &none, store.act("a", "b"))),
            given_up(batches.cancel(id, 0)),
            given_up(store.create_key("a", &[tidemill_store::Scope::Chat])),
            given_up(store.revoke_key("a", "boss")),
            given_up(store.audit("a", "b", "c", none.clone())),
        );
        assert_eq!(writes, (true, true, true, true, true, true));
        let mut content = files.receive(id).await.unwrap();
        content.write(b"x").await.unwrap();
        let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "batch".into(), expires: None };
        assert!(given_up(content.finish(draft, 0)).await);
        assert!(files.path(id).exists(), "its row may yet come");
        sqlx::query("ROLLBACK").execute(&mut held).await.unwrap();
        eventually("calls are answered again", async || labels.list_queues().await.is_ok()).await;
        store.close().await;
    });
}

fn of_labels(error: LabelError) -> StoreError {
    match error {
        LabelError::Store(error) => error,
        other => panic!("{other}"),
    }
}
