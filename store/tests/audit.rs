//! The audit: written with what it tells of, or neither is; read by filters and in pages.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::time::Duration;

use crate::support::{adapter, each, snapshot};
use serde_json::json;
use tidemill_store::label::{Labels, NewQueue};
use tidemill_store::{
    Actor, Adapters, Audit, AuditEntry, AuditFilter, FileDraft, FileRecord, Files, FineTuningDraft, FineTuningState as State,
    FineTunings, Jobs, KeyTerms, News, Order, Scope, Snapshots, Store, StoreError, Viewer,
};

fn ann() -> Actor {
    Actor { name: "key ann".into(), key: Some("0198-a".into()) }
}

async fn all(store: &Store) -> Vec<AuditEntry> {
    let filter = AuditFilter { order: Order::OldestFirst, limit: Some(1000), ..AuditFilter::default() };
    Audit::new(store.database()).list(&filter).await.unwrap().items
}

async fn uploaded(store: &Store, files: &Files) -> FileRecord {
    let mut content = files.receive(store.issue_id()).await.unwrap();
    content.write(b"{}\n").await.unwrap();
    let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "fine-tune".into(), expires: None };
    content.finish(draft, 5).await.unwrap()
}

fn queue(name: &str) -> NewQueue {
    NewQueue {
        name: name.into(),
        rule: json!({"kind": "none"}),
        guidelines: String::new(),
        overlap: 1,
        gold_share: 0.0,
        lease_seconds: 60,
        filled_until: String::new(),
    }
}

async fn fine_tuning(store: &Store, files: &Files) -> FineTuningDraft {
    let file = uploaded(store, files).await;
    FineTuningDraft {
        id: store.issue_id(),
        created: 5,
        key_id: None,
        model: "m".into(),
        base: "m".into(),
        method: json!({"type": "dpo"}),
        suffix: None,
        seed: 7,
        training_file: file.id,
        validation_file: None,
        metadata: None,
        result_file: store.issue_id(),
        place: files.place().to_owned(),
    }
}

#[test]
fn every_change_is_in_the_audit_with_its_hand_and_without_a_secret() {
    each(async |place| {
        let store = place.open().await;
        let (key, secret) = store.create_key_with("app", &[Scope::Chat], None, KeyTerms::default(), &ann()).await.unwrap();
        assert!(matches!(
            store.create_key_with("app", &[], None, KeyTerms::default(), &ann()).await,
            Err(StoreError::KeyName(_))
        ));
        store.change_key("app", |key| key.scopes = vec![Scope::Look], &ann()).await.unwrap().unwrap();
        let (_, newer) = store.rotate_key("app", Duration::ZERO, &ann()).await.unwrap().unwrap();
        store.revoke_key("app", "command line").await.unwrap().unwrap();
        // What is not there is not changed, and nobody has done anything.
        assert_eq!(store.revoke_key("app", &ann()).await.unwrap(), None);
        assert_eq!(store.change_key("app", |_| {}, &ann()).await.unwrap(), None);
        store.erase_user("bob@example.org", &ann()).await.unwrap();
        let acts = all(&store).await;
        let told: Vec<(&str, &str)> = acts.iter().map(|act| (act.action.as_str(), &*act.actor)).collect();
        assert_eq!(
            told,
            [
                ("key.create", "key ann"),
                ("key.change", "key ann"),
                ("key.rotate", "key ann"),
                ("key.revoke", "command line"),
                ("erase", "key ann"),
            ]
        );
        assert!(acts[..4].iter().all(|act| act.subject == "app" && act.detail["id"] == json!(key.id) && act.at > 0));
        assert_eq!((acts[0].actor.key.as_deref(), &acts[3].actor.key), (Some("0198-a"), &None));
        assert_eq!((&acts[1].detail["scopes"], &acts[1].detail["before"]["scopes"]), (&json!(["look"]), &json!(["chat"])));
        let whole = format!("{acts:?}");
        for word in [&secret, &newer, &"bob".to_owned()] {
            assert!(!whole.contains(word.as_str()), "{word} is in {whole}");
        }
        store.close().await;
    });
}

#[test]
fn a_job_is_in_the_audit_as_often_as_somebody_moved_it() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let rows = FineTunings::new(store.database());
        let draft = fine_tuning(&store, &files).await;
        let act = |what: &str| store.act(ann(), format!("fine_tuning.{what}")).to("job").with(json!({"n": 1}));
        assert!(rows.insert(&draft, &[], act("create")).await.unwrap());
        let pause = async || rows.enter(draft.id, &[State::Queued], State::Paused, &[News::info("p")], act("pause")).await;
        assert!(!pause().await.unwrap(), "its files are looked through");
        rows.validated(draft.id, &draft.method, 3, &[], 6).await.unwrap();
        assert!(pause().await.unwrap() && !pause().await.unwrap());
        let acts = all(&store).await;
        let told: Vec<&str> = acts.iter().map(|act| act.action.as_str()).collect();
        assert_eq!(told, ["fine_tuning.create", "fine_tuning.pause"]);
        assert_eq!((acts[1].subject.as_str(), &acts[1].detail), ("job", &json!({"n": 1})));
        store.close().await;
    });
}

#[test]
fn queues_and_deleted_files_are_in_the_audit() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let labels = Labels::new(store.database());
        let act = |what: &str| store.act(ann(), what).to("it").with(json!({"n": 1}));
        let made = labels.create_queue(queue("q"), 1, act("labeling.create")).await.unwrap();
        assert!(labels.create_queue(queue("q"), 1, act("labeling.create")).await.is_err(), "the name is taken");
        labels.change_queue(made.id, Some(5), None, act("labeling.change")).await.unwrap();
        let file = uploaded(&store, &files).await;
        assert!(files.delete(&file, act("file.delete")).await.unwrap());
        assert!(!files.delete(&file, act("file.delete")).await.unwrap(), "it is gone");
        let acts = all(&store).await;
        let told: Vec<(&str, &str, &str)> =
            acts.iter().map(|act| (act.action.as_str(), &*act.actor, act.subject.as_str())).collect();
        let by = |action| (action, "key ann", "it");
        assert_eq!(told, [by("labeling.create"), by("labeling.change"), by("file.delete")]);
        store.close().await;
    });
}

#[test]
fn what_cannot_be_written_down_is_not_done() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let (adapters, rows) = (Adapters::new(&store), FineTunings::new(store.database()));
        let (jobs, snapshots) = (Jobs::new(store.database()), Snapshots::new(store.database()));
        let (_, secret) = store.create_key("app", &[Scope::Chat]).await.unwrap();
        let kept = adapters.insert(&adapter(&store, "a", 1), &ann()).await.unwrap();
        let waiting = fine_tuning(&store, &files).await;
        rows.insert(&waiting, &[], store.act(ann(), "create")).await.unwrap();
        let idle = adapters.insert(&adapter(&store, "idle", 2), &ann()).await.unwrap();
        let idle = adapters.retire(idle.id, &ann()).await.unwrap();
        let labels = Labels::new(store.database());
        let open = labels.create_queue(queue("q"), 1, store.act(ann(), "labeling.create")).await.unwrap();
        let unused = uploaded(&store, &files).await;
        let before = all(&store).await;
        sqlx::query("ALTER TABLE audit RENAME TO audit_away").execute(store.database().write()).await.unwrap();

        let act = || store.act(ann(), "x");
        let (new, built) = (fine_tuning(&store, &files).await, store.issue_id());
        assert!(store.create_key("other", &[Scope::Chat]).await.is_err());
        assert!(store.change_key("app", |key| key.scopes = vec![Scope::Admin], &ann()).await.is_err());
        assert!(store.rotate_key("app", Duration::ZERO, &ann()).await.is_err());
        assert!(store.revoke_key("app", &ann()).await.is_err());
        assert!(adapters.serve(kept.id, false, &ann()).await.is_err());
        assert!(adapters.revoke(kept.id, &ann()).await.is_err());
        assert!(rows.insert(&new, &[], act()).await.is_err());
        assert!(rows.enter(waiting.id, &State::OPEN, State::Cancelled, &[], act()).await.is_err());
        assert!(jobs.insert(built, "dataset.build", &json!({}), act()).await.is_err());
        assert!(snapshots.insert(&snapshot(&store, "d"), &Default::default(), false, act()).await.is_err());
        assert!(labels.create_queue(queue("new"), 1, act()).await.is_err());
        assert!(labels.change_queue(open.id, Some(5), Some("x"), act()).await.is_err());
        assert!(files.delete(&unused, act()).await.is_err());
        assert!(adapters.remove_files(idle.id, None, &ann(), || panic!("it is not written down")).await.is_err());

        sqlx::query("ALTER TABLE audit_away RENAME TO audit").execute(store.database().write()).await.unwrap();
        let found = store.find_key(&secret).await.unwrap().unwrap();
        assert_eq!((found.scopes, store.list_keys().await.unwrap().len()), (vec![Scope::Chat], 1));
        assert_eq!(adapters.find(kept.id).await.unwrap(), Some(kept));
        assert_eq!(adapters.find(idle.id).await.unwrap(), Some(idle));
        assert_eq!(labels.list_queues().await.unwrap(), [open]);
        assert!(files.find(unused.id, &Viewer::Anyone, 0).await.unwrap().is_some() && files.path(unused.id).exists());
        assert_eq!(rows.state(new.id).await.unwrap(), None);
        assert_eq!(rows.find(waiting.id, &Viewer::Anyone).await.unwrap().unwrap().state, State::ValidatingFiles);
        assert_eq!((jobs.find(built, 0).await.unwrap(), snapshots.find("d", None).await.unwrap()), (None, None));
        assert_eq!(all(&store).await, before);
        store.close().await;
    });
}

#[test]
fn acts_are_found_by_who_what_and_when_and_come_in_pages() {
    each(async |place| {
        let store = place.open().await;
        for (by, what, on) in [
            (ann(), "key.create", "app"),
            (Actor::from("command line"), "key.revoke", "app"),
            (Actor::from("key bob"), "adapter.serve", "a@1"),
            (ann(), "keyring", "app"),
        ] {
            store.audit(by, what, on, json!(null)).await.unwrap();
        }
        let audit = Audit::new(store.database());
        let found = async |filter: AuditFilter| {
            let acts = audit.list(&filter).await.unwrap().items;
            acts.into_iter().map(|act| act.action).collect::<Vec<_>>()
        };
        let by = async |who: &str| found(AuditFilter { by: Some(who.into()), ..AuditFilter::default() }).await;
        assert_eq!(by("ann").await, ["keyring", "key.create"]);
        assert_eq!(by("0198-a").await, by("key ann").await);
        assert_eq!((by("bob").await, by("command line").await), (vec!["adapter.serve".into()], vec!["key.revoke".into()]));
        let what = async |what: &str| found(AuditFilter { what: Some(what.into()), ..AuditFilter::default() }).await;
        assert_eq!(what("key").await, ["key.revoke", "key.create"], "a topic is a whole word");
        assert_eq!((what("key.create").await, what("key.").await), (vec!["key.create".into()], vec![]));
        assert_eq!(found(AuditFilter { on: Some("a@1".into()), ..AuditFilter::default() }).await, ["adapter.serve"]);

        let acts = all(&store).await;
        let since = AuditFilter { since: Some(acts[1].at), until: Some(acts[3].at), ..AuditFilter::default() };
        let expected: Vec<_> = acts.iter().rev().filter(|act| (acts[1].at..acts[3].at).contains(&act.at)).collect();
        assert_eq!(found(since).await, expected.iter().map(|act| act.action.clone()).collect::<Vec<_>>());

        let first = audit.list(&AuditFilter { limit: Some(3), ..AuditFilter::default() }).await.unwrap();
        assert_eq!((first.items.len(), first.has_more, first.items[0].id), (3, true, acts[3].id));
        let after = first.items.last().map(|act| act.id);
        let rest = audit.list(&AuditFilter { limit: Some(3), after, ..AuditFilter::default() }).await.unwrap();
        assert_eq!((rest.items.as_slice(), rest.has_more), (&acts[..1], false));
        store.close().await;
    });
}
