//! The audit: written with what it tells of, or neither is; read by filters and in pages.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod support;

use std::time::Duration;

use serde_json::json;
use support::each;
use tidemill_store::{
    Actor, Adapters, Audit, AuditEntry, AuditFilter, FileDraft, Files, FineTuningDraft, FineTuningState as State, FineTunings,
    Jobs, KeyTerms, News, Order, RegisteredAdapter, Scope, Snapshot, Snapshots, Store, StoreError, Viewer,
};

fn ann() -> Actor {
    Actor { name: "key ann".into(), key: Some("0198-a".into()) }
}

async fn all(store: &Store) -> Vec<AuditEntry> {
    let filter = AuditFilter { order: Order::OldestFirst, limit: Some(1000), ..AuditFilter::default() };
    Audit::new(store.database()).list(&filter).await.unwrap().items
}

fn adapter(store: &Store) -> RegisteredAdapter {
    RegisteredAdapter {
        id: store.issue_id(),
        name: "a".into(),
        generation: 1,
        base: "base".into(),
        content_hash: "01".into(),
        location: "adapters/01".into(),
        ..RegisteredAdapter::default()
    }
}

fn snapshot(store: &Store) -> Snapshot {
    Snapshot {
        id: store.issue_id(),
        name: "d".into(),
        version: 1,
        created: 5,
        query: json!({}),
        content_hash: "abc".into(),
        location: "/data/x".into(),
        table_version: 1,
        row_counts: json!({"rows": 2}),
        verdict: "pass".into(),
        report: json!({}),
        tainted: None,
    }
}

async fn fine_tuning(store: &Store, files: &Files) -> FineTuningDraft {
    let mut content = files.receive(store.issue_id()).await.unwrap();
    content.write(b"{}\n").await.unwrap();
    let draft = FileDraft { key_id: None, filename: "f".into(), purpose: "fine-tune".into(), expires: None };
    let file = content.finish(draft, 5).await.unwrap();
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
fn what_cannot_be_written_down_is_not_done() {
    each(async |place| {
        let store = place.open().await;
        let files = Files::open(&store, &place.data()).await.unwrap();
        let (adapters, rows) = (Adapters::new(&store), FineTunings::new(store.database()));
        let (jobs, snapshots) = (Jobs::new(store.database()), Snapshots::new(store.database()));
        let (_, secret) = store.create_key("app", &[Scope::Chat]).await.unwrap();
        let kept = adapters.insert(&adapter(&store), &ann()).await.unwrap();
        let waiting = fine_tuning(&store, &files).await;
        rows.insert(&waiting, &[], store.act(ann(), "create")).await.unwrap();
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
        assert!(snapshots.insert(&snapshot(&store), &Default::default(), false, act()).await.is_err());

        sqlx::query("ALTER TABLE audit_away RENAME TO audit").execute(store.database().write()).await.unwrap();
        let found = store.find_key(&secret).await.unwrap().unwrap();
        assert_eq!((found.scopes, store.list_keys().await.unwrap().len()), (vec![Scope::Chat], 1));
        assert_eq!(adapters.find(kept.id).await.unwrap(), Some(kept));
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
