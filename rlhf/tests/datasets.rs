//! Datasets over a real store and real Delta tables.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod support;

use serde_json::json;
use std::path::Path;
use support::Fixture;
use tidemill_rlhf::dataset::import::Input;
use tidemill_rlhf::dataset::query::RowKind;
use tidemill_rlhf::dataset::snapshot::ImportOptions;
use tidemill_rlhf::dataset::table::Table;
use tidemill_rlhf::dataset::{DatasetError, Datasets, Example, Query, StoredRow, Watch};
use tidemill_rlhf::quality::QualityOptions;
use tidemill_store::records::Kind;
use tidemill_store::{Snapshot, Snapshots};

async fn rows(datasets: &Datasets, snapshot: &Snapshot) -> Vec<StoredRow> {
    let mut stream = datasets.rows(snapshot).await.unwrap();
    let mut all = Vec::new();
    while let Some(rows) = stream.next_rows().await.unwrap() {
        all.extend(rows);
    }
    all
}

async fn build(datasets: &Datasets, name: &str, query: &Query) -> Result<Snapshot, DatasetError> {
    datasets.build(name, query, &QualityOptions::default(), &Watch::default()).await
}

async fn import(datasets: &Datasets, name: &str, path: &Path, options: &ImportOptions) -> Result<Snapshot, DatasetError> {
    let input = Input::at(path.to_str().unwrap(), None).unwrap();
    let done = datasets.import(name, &input, options, &QualityOptions::default(), &Watch::default()).await?;
    Ok(done.snapshot)
}

/// One of each kind of feedback; returns the ids of the feedback.
async fn judged(fixture: &Fixture) -> Vec<String> {
    let pair = fixture.answer("ann", "Which is the largest planet?", &["Jupiter.", "Saturn."]).await;
    let single = fixture.answer("bob", "Say hello.", &["Helo"]).await;
    let rated =
        [fixture.answer("cid", "Name a colour.", &["Blue"]).await[0], fixture.answer("cid", "Name a colour.", &["No."]).await[0]];
    let ids = [
        fixture.prefer("r1", pair[0], pair[1]).await,
        fixture.judge(Kind::Correction, "r2", &single, json!("Hello!")).await,
        fixture.judge(Kind::Thumb, "r3", &single, json!(false)).await,
        fixture.judge(Kind::Rating, "r1", &rated[..1], json!(1.0)).await,
        fixture.judge(Kind::Rating, "r1", &rated[1..], json!(0.25)).await,
    ];
    ids.map(|id| id.to_string()).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_feedback_becomes_its_rows_with_all_of_its_lineage() {
    let fixture = Fixture::new().await;
    let feedback = judged(&fixture).await;
    let datasets = fixture.datasets();
    let snapshot = build(&datasets, "first", &Query::default()).await.unwrap();
    assert_eq!((snapshot.version, snapshot.table_version), (1, 1));
    let rows = rows(&datasets, &snapshot).await;
    let mut sources: Vec<&str> = rows.iter().map(|row| row.row.origin.source.as_str()).collect();
    sources.sort_unstable();
    assert_eq!(sources, ["comparison", "correction", "correction", "rating", "thumb"]);
    assert_eq!(snapshot.row_counts["kinds"], json!({"demonstration": 1, "preference": 3, "unpaired": 1}));

    let snapshots = Snapshots::new(fixture.store.database());
    let mut expected = feedback.clone();
    expected.sort();
    assert_eq!(snapshots.sources(snapshot.id, "feedback").await.unwrap(), expected);
    assert_eq!(snapshots.sources(snapshot.id, "user").await.unwrap(), ["ann", "bob", "cid"]);
    assert_eq!(snapshots.sources(snapshot.id, "rater").await.unwrap(), ["r1", "r2", "r3"]);
    assert_eq!(snapshots.sources(snapshot.id, "inference").await.unwrap().len(), 4);
    for row in &rows {
        assert!(row.row.origin.feedback.iter().all(|id| feedback.contains(id)));
        assert!(!row.row.origin.feedback.is_empty() && !row.row.origin.inferences.is_empty());
    }
    let report: serde_json::Value = serde_json::from_slice(&datasets.report(&snapshot, false).await.unwrap()).unwrap();
    assert_eq!(report["summary"]["rows"], 5);
    assert!(String::from_utf8(datasets.report(&snapshot, true).await.unwrap()).unwrap().contains("<html"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_stays_as_it_was_and_the_same_data_gives_the_same_hash() {
    let fixture = Fixture::new().await;
    judged(&fixture).await;
    let datasets = fixture.datasets();
    let first = build(&datasets, "d", &Query::default()).await.unwrap();
    let before = rows(&datasets, &first).await;
    let second = build(&datasets, "d", &Query::default()).await.unwrap();
    assert_eq!((second.version, &second.content_hash), (2, &first.content_hash));

    let more = fixture.answer("dora", "And the smallest?", &["Mercury.", "Pluto."]).await;
    fixture.prefer("r9", more[0], more[1]).await;
    let third = build(&datasets, "d", &Query::default()).await.unwrap();
    assert_ne!(third.content_hash, first.content_hash);
    assert_eq!(rows(&datasets, &third).await.len(), before.len() + 1);
    assert_eq!(rows(&datasets, &first).await, before);
    assert_eq!(datasets.find("d@1").await.unwrap(), first);
    assert_eq!(datasets.find("d").await.unwrap(), third);
    assert!(matches!(datasets.find("d@9").await, Err(DatasetError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_was_cut_off_before_its_row_is_neither_seen_nor_in_the_next() {
    let fixture = Fixture::new().await;
    judged(&fixture).await;
    let datasets = fixture.datasets();
    let first = build(&datasets, "d", &Query::default()).await.unwrap();
    // As a process that was killed between the table's version and the store's row leaves it.
    let mut stray = rows(&datasets, &first).await;
    stray.truncate(2);
    let mut writing = Table::open_or_create(&first.location, "d").await.unwrap().write().unwrap();
    for row in stray {
        writing.add(row).await.unwrap();
    }
    assert_eq!(writing.commit(serde_json::Map::new()).await.unwrap().version(), 2);
    // And one that was killed while it wrote Parquet.
    let mut writing = Table::open_or_create(&first.location, "d").await.unwrap().write().unwrap();
    writing.add(rows(&datasets, &first).await.remove(0)).await.unwrap();
    drop(writing);

    assert_eq!(datasets.find("d").await.unwrap(), first);
    let next = build(&datasets, "d", &Query::default()).await.unwrap();
    assert_eq!((next.version, &next.content_hash), (3, &first.content_hash));
    assert_eq!(rows(&datasets, &next).await, rows(&datasets, &first).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_builds_at_once_get_a_version_each_and_no_rows_of_the_other() {
    let fixture = Fixture::new().await;
    judged(&fixture).await;
    let datasets = fixture.datasets();
    let preferences = Query { rows: vec![RowKind::Preference], ..Query::default() };
    let unpaired = Query { rows: vec![RowKind::Unpaired], ..Query::default() };
    let (a, b, c) =
        tokio::join!(build(&datasets, "d", &preferences), build(&datasets, "d", &unpaired), build(&datasets, "d", &preferences));
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    let mut versions = [a.version, b.version, c.version];
    versions.sort_unstable();
    assert_eq!(versions, [1, 2, 3]);
    assert_eq!(rows(&datasets, &b).await.len(), 1);
    assert_eq!(rows(&datasets, &a).await, rows(&datasets, &c).await);
    assert_eq!(rows(&datasets, &a).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erasing_a_person_taints_the_snapshots_that_used_their_rows_and_no_others() {
    let fixture = Fixture::new().await;
    judged(&fixture).await;
    let datasets = fixture.datasets();
    let all = build(&datasets, "all", &Query::default()).await.unwrap();
    let without = Query { exclude_users: vec!["ann".into()], ..Query::default() };
    build(&datasets, "without", &without).await.unwrap();
    assert_eq!(all.tainted, None);
    let erased = fixture.store.erase_user("ann", "operator").await.unwrap();
    assert_eq!(erased.snapshots, ["all@1"]);
    assert!(datasets.find("all").await.unwrap().tainted.is_some());
    assert_eq!(datasets.find("without").await.unwrap().tainted, None);
    // The rater r2 made a row of both.
    let erased = fixture.store.erase_user("r2", "operator").await.unwrap();
    assert_eq!(erased.snapshots, ["all@1", "without@1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_to_learn_from_is_an_error_that_says_why() {
    let fixture = Fixture::new().await;
    let datasets = fixture.datasets();
    let error = build(&datasets, "d", &Query::default()).await.unwrap_err().to_string();
    assert!(error.contains("no feedback matches"), "{error}");
    let pair = fixture.answer("ann", "?", &["a", "b"]).await;
    let tie = json!({"candidates": pair, "ranking": [pair]});
    fixture.judge(Kind::Comparison, "r", &pair, tie).await;
    let error = build(&datasets, "d", &Query::default()).await.unwrap_err().to_string();
    assert!(error.contains("1 tie"), "{error}");
    assert!(matches!(build(&datasets, "../d", &Query::default()).await, Err(DatasetError::Name(_))));
    assert!(matches!(build(&datasets, "d", &Query { held_out: 2.0, ..Query::default() }).await, Err(DatasetError::Query(_))));
    assert!(datasets.list(None, None, 10).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_is_asked_to_stop_leaves_nothing() {
    let fixture = Fixture::new().await;
    judged(&fixture).await;
    let datasets = fixture.datasets();
    let watch = Watch::default();
    watch.stop();
    let stopped = datasets.build("d", &Query::default(), &QualityOptions::default(), &watch).await;
    assert!(matches!(stopped, Err(DatasetError::Interrupted)));
    assert!(matches!(datasets.find("d").await, Err(DatasetError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_lines_are_told_by_number_and_nothing_is_half_imported() {
    let fixture = Fixture::new().await;
    let datasets = fixture.datasets();
    let file = fixture.folder.path().join("pairs.jsonl");
    let good = json!({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."});
    let lines = [
        good.to_string(),
        r#"{"prompt": "Hi", "chosen""#.into(),
        String::new(),
        json!({"prompt": "Hi", "completion": "Hello.", "label": "yes"}).to_string(),
        json!({"prompt": [{"role": "robot", "content": "Hi"}], "chosen": "a", "rejected": "b"}).to_string(),
        json!({"question": "Hi"}).to_string(),
        "[1]".into(),
    ];
    std::fs::write(&file, lines.join("\n")).unwrap();
    let error = import(&datasets, "p", &file, &ImportOptions::default()).await.unwrap_err();
    let DatasetError::Lines(bad) = &error else { panic!("{error}") };
    assert_eq!(bad.first.iter().map(|bad| bad.line).collect::<Vec<_>>(), [2, 4, 5, 6, 7]);
    let text = error.to_string();
    for part in [
        "line 4: 'label' is a string; use true",
        "the role of 'prompt[0]' is 'robot'",
        "its keys are: question",
        "5 lines are no rows",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert!(datasets.list(None, None, 10).await.unwrap().is_empty());
    assert!(!fixture.folder.path().join("datasets").exists());

    let skip = ImportOptions { skip_bad: true, ..ImportOptions::default() };
    let snapshot = import(&datasets, "p", &file, &skip).await.unwrap();
    let rows = rows(&datasets, &snapshot).await;
    assert_eq!((rows.len(), rows[0].row.origin.source.as_str()), (1, "pairs.jsonl:1"));
    assert_eq!(snapshot.row_counts["bad_lines"], 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delta_table_is_imported_at_a_version_and_parquet_with_its_rows() {
    let fixture = Fixture::new().await;
    judged(&fixture).await;
    let datasets = fixture.datasets();
    let first = build(&datasets, "d", &Query { rows: vec![RowKind::Unpaired], ..Query::default() }).await.unwrap();
    let second = build(&datasets, "d", &Query::default()).await.unwrap();
    let both = [(1, &first), (2, &second)];
    for (version, snapshot) in both {
        let input = Input::at(&snapshot.location, Some(version)).unwrap();
        let copy = datasets
            .import("copy", &input, &ImportOptions::default(), &QualityOptions::default(), &Watch::default())
            .await
            .unwrap()
            .snapshot;
        // Lineage, parts and all.
        assert_eq!(rows(&datasets, &copy).await, rows(&datasets, snapshot).await);
        assert_eq!(copy.content_hash, snapshot.content_hash);
    }
    let parquet = std::fs::read_dir(&first.location)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "parquet"))
        .min_by_key(|path| path.metadata().unwrap().len())
        .unwrap();
    let copy = import(&datasets, "parquet", &parquet, &ImportOptions::default()).await.unwrap();
    let rows = rows(&datasets, &copy).await;
    assert!(matches!(&rows[0].row.example, Example::Unpaired { label: false, .. }), "{rows:?}");
}
