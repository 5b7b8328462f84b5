//! Fine-tuning jobs: states, events in order, and what is written in one.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::each;
use serde_json::{Map, json};
use tidemill_store::{
    FileDraft, FileRecord, Files, FineTuningCheckpoint, FineTuningDraft, FineTuningState as State, FineTunings, Heard, Made,
    News, Store, Viewer,
};
use uuid::Uuid;

async fn uploaded(store: &Store, files: &Files) -> FileRecord {
    let content = files.receive(store.issue_id()).await.unwrap();
    let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "fine-tune".into(), expires: None };
    content.finish(draft, 1).await.unwrap()
}

fn draft(store: &Store, files: &Files, training: Uuid, key: Option<&str>) -> FineTuningDraft {
    FineTuningDraft {
        id: store.issue_id(),
        created: 5,
        key_id: key.map(str::to_owned),
        model: "m".into(),
        base: "m".into(),
        method: json!({"type": "supervised"}),
        suffix: Some("s".into()),
        seed: 7,
        training_file: training,
        validation_file: None,
        metadata: Some(Map::from_iter([("team".to_owned(), json!("mill"))])),
        result_file: store.issue_id(),
        place: files.place().to_owned(),
    }
}

#[test]
fn a_job_goes_its_way_and_tells_of_it_in_order() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let rows = FineTunings::new(store.database());
        let file = uploaded(&store, &files).await;
        let draft = draft(&store, &files, file.id, Some("k"));
        assert!(rows.insert(&draft, &[News::info("made"), News::info("looking")], store.act("ann", "make")).await.unwrap());
        let id = draft.id;
        let find = async || rows.find(id, &Viewer::Anyone).await.unwrap().unwrap();
        assert_eq!((find().await.draft, find().await.state), (draft, State::ValidatingFiles));
        assert!(rows.find(id, &Viewer::Key("other".into())).await.unwrap().is_none());
        // What is looked through stays.
        assert!(!files.delete(&file, store.act("ann", "file.delete")).await.unwrap());

        // Out of turn: nothing changes.
        assert_eq!(rows.begin(id, 1, &[News::info("no")], 6).await.unwrap(), None);
        assert!(rows.validated(id, &json!({"type": "supervised", "n": 3}), 10, &[News::info("valid")], 6).await.unwrap());
        assert!(files.delete(&file, store.act("ann", "file.delete")).await.unwrap());
        assert_eq!(rows.begin(id, 1, &[], 7).await.unwrap(), Some(1));
        assert_eq!(rows.begin(id, 1, &[], 7).await.unwrap(), Some(2));
        assert!(rows.forgive(id, 7).await.unwrap());
        // For its card, and no longer where somebody wants something else.
        let state = async || rows.state(id).await.unwrap().unwrap();
        assert!(!rows.wait(id, false, 7).await.unwrap());
        assert!(rows.wait(id, true, 7).await.unwrap() && state().await == State::Queued);
        assert!(!rows.wait(id, true, 7).await.unwrap() && rows.forgive(id, 7).await.unwrap());
        assert!(rows.wait(id, false, 7).await.unwrap() && state().await == State::Running);
        assert_eq!(rows.begin(id, 1, &[], 7).await.unwrap(), Some(1));
        let heard = Heard {
            read_bytes: 100,
            step: 2,
            steps: 10,
            evaluated: 2,
            tokens: Some(50),
            estimated_finish: Some(99),
            news: vec![News::metrics("Step 2/10", json!({"step": 2}))],
        };
        assert!(rows.hear(id, &heard, 8).await.unwrap());
        let job = find().await;
        assert_eq!((job.attempts, job.step, job.read_bytes, job.trained_tokens), (0, 2, 100, Some(50)));
        assert_eq!(job.evaluated, 2);
        assert_eq!((job.estimated_finish, job.draft.method["n"].as_i64()), (Some(99), Some(3)));
        assert_eq!(rows.begin(id, 0, &[], 8).await.unwrap(), Some(0));

        // Paused and resumed; what was said meanwhile is taken over.
        assert!(
            rows.enter(id, &[State::Queued, State::Running], State::Paused, &[News::info("paused")], store.act("ann", "pause"))
                .await
                .unwrap()
        );
        assert!(rows.hear(id, &Heard { read_bytes: 120, step: 3, steps: 10, ..Heard::default() }, 9).await.unwrap());
        assert_eq!((find().await.trained_tokens, find().await.estimated_finish), (Some(50), None));
        assert!(!rows.succeed(id, &made(None), &[], 9).await.unwrap());
        assert!(rows.enter(id, &[State::Paused], State::Queued, &[], store.act("bob", "resume")).await.unwrap());
        assert_eq!(rows.begin(id, 1, &[], 10).await.unwrap(), Some(1));

        let result = FileRecord { id: find().await.draft.result_file, purpose: "fine-tune-results".into(), ..file.clone() };
        assert!(rows.succeed(id, &made(Some(result.clone())), &[News::info("done")], 11).await.unwrap());
        let job = find().await;
        assert_eq!((job.state, job.finished, job.has_result, job.served), (State::Succeeded, Some(11), true, true));
        assert!(files.find(result.id, &Viewer::Anyone, 0).await.unwrap().is_some());
        assert!(!rows.hear(id, &heard, 12).await.unwrap() && !rows.fail(id, &json!({}), &[], 12).await.unwrap());
        assert_eq!(rows.find_model("ft:m", &Viewer::Anyone).await.unwrap(), Some(job.clone()));
        assert_eq!(rows.served(files.place(), 5).await.unwrap(), [job]);
        assert!(rows.unserve(id, &[], store.act("ann", "delete")).await.unwrap());
        assert!(rows.served(files.place(), 5).await.unwrap().is_empty());

        let page = rows.events(id, None, 4).await.unwrap();
        let told: Vec<_> = page.items.iter().map(|event| (event.number, event.news.message.as_str())).collect();
        assert_eq!((told, page.has_more), (vec![(6, "done"), (5, "paused"), (4, "Step 2/10"), (3, "valid")], true));
        assert_eq!(page.items[2].news.metrics, Some(json!({"step": 2})));
        let rest = rows.events(id, Some(3), 4).await.unwrap();
        assert_eq!((rest.items.len(), rest.has_more, rest.items[1].created), (2, false, 5));
        let checkpoints = rows.checkpoints(id, None, 10).await.unwrap().items;
        assert_eq!((checkpoints.len(), checkpoints[0].step, checkpoints[0].metrics["train_loss"].as_f64()), (1, 10, Some(0.5)));
        store.close().await;
    });
}

fn made(result: Option<FileRecord>) -> Made {
    let checkpoint = FineTuningCheckpoint { step: 10, created: 11, model: "ft:m".into(), metrics: json!({"train_loss": 0.5}) };
    Made { model: "ft:m".into(), result, checkpoints: vec![checkpoint] }
}

#[test]
fn lists_show_what_is_ones_own_and_has_the_pairs() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let rows = FineTunings::new(store.database());
        let file = uploaded(&store, &files).await;
        let mut ids = Vec::new();
        for key in [Some("a"), Some("b"), Some("a")] {
            let draft = draft(&store, &files, file.id, key);
            rows.insert(&draft, &[], store.act("ann", "make")).await.unwrap();
            ids.push(draft.id);
        }
        let list = async |viewer: &Viewer, value: &str, after, limit| {
            let pairs = [("team".to_owned(), value.to_owned())];
            let page = rows.list(viewer, &pairs, after, limit).await.unwrap();
            (page.items.iter().map(|job| job.draft.id).collect::<Vec<_>>(), page.has_more)
        };
        assert_eq!(list(&Viewer::Anyone, "mill", None, 2).await, (vec![ids[2], ids[1]], true));
        assert_eq!(list(&Viewer::Anyone, "mill", Some(ids[1]), 2).await, (vec![ids[0]], false));
        assert_eq!(list(&Viewer::Key("a".into()), "mill", None, 5).await, (vec![ids[2], ids[0]], false));
        assert_eq!(list(&Viewer::Anyone, "other", None, 5).await, (vec![], false));
        assert_eq!(rows.open(files.place()).await.unwrap().len(), 3);
        assert!(rows.open("elsewhere").await.unwrap().is_empty());
        rows.fail(ids[0], &json!({"code": "c", "message": "m", "param": null}), &[News::error("m")], 9).await.unwrap();
        let failed = rows.find(ids[0], &Viewer::Anyone).await.unwrap().unwrap();
        assert_eq!((failed.state, failed.error.unwrap()["code"].as_str()), (State::Failed, Some("c")));
        assert_eq!(rows.state(store.issue_id()).await.unwrap(), None);
        // A file that is not there any more.
        assert!(!rows.insert(&draft(&store, &files, store.issue_id(), None), &[], store.act("ann", "make")).await.unwrap());
        store.close().await;
    });
}
