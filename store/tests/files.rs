//! Files that clients upload: their contents are there as long as their rows are.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::each;
use tidemill_store::{DataDir, FileDraft, FileRecord, Files, Store, StoreOptions, Viewer};

async fn uploaded(store: &Store, files: &Files) -> FileRecord {
    let mut content = files.receive(store.issue_id()).await.unwrap();
    content.write(b"x").await.unwrap();
    let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "batch".into(), expires: None };
    content.finish(draft, 1).await.unwrap()
}

#[test]
fn a_start_removes_what_has_no_row() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let kept = uploaded(&store, &files).await;
        let (stray, half) = (files.path(store.issue_id()), files.path(store.issue_id()).with_extension("part"));
        for path in [&stray, &half] {
            std::fs::write(path, "x").unwrap();
        }
        let again = Files::open(&store, &place.data()).await.unwrap();
        assert_eq!((again.place(), stray.exists(), half.exists()), (files.place(), false, false));
        assert!(again.path(kept.id).exists());
        store.close().await;
    });
}

#[test]
fn a_start_with_another_database_touches_no_content_of_this_one() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let file = uploaded(&store, &files).await;
        // As by a server that was started without its `--database` once: the same data directory, and no rows.
        let elsewhere = tempfile::tempdir().unwrap();
        let other = Store::open(StoreOptions::new(DataDir::new(elsewhere.path()))).await.unwrap();
        let others = Files::open(&other, &place.data()).await.unwrap();
        let theirs = uploaded(&other, &others).await;
        other.close().await;

        let again = Files::open(&store, &place.data()).await.unwrap();
        assert_eq!(again.find(file.id, &Viewer::Anyone, 0).await.unwrap(), Some(file.clone()));
        assert!(again.path(file.id).exists() && others.path(theirs.id).exists());
        store.close().await;
    });
}
