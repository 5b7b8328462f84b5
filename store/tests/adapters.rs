//! Adapters, their states and aliases, on every database.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support;
use crate::support::{answer, each};
use serde_json::json;
use tidemill_store::{
    AdapterFilter, AdapterRefusal, AdapterState, Adapters, RegisteredAdapter, Snapshot, Snapshots, Sources, Store,
};
use uuid::Uuid;

fn adapter(store: &Store, name: &str, generation: u64) -> RegisteredAdapter {
    RegisteredAdapter {
        base_hash: Some("ba5e".into()),
        lineage: json!({"raters": ["ann"], "config": {"method": "dpo"}}),
        metrics: json!({"eval_loss": 0.25}),
        ..support::adapter(store, name, generation)
    }
}

async fn served(adapters: &Adapters) -> Vec<(String, Vec<String>)> {
    let served = adapters.served().await.unwrap();
    served.into_iter().map(|adapter| (format!("{}@{:x}", adapter.name, adapter.generation), adapter.aliases)).collect()
}

fn row(name: &str, aliases: &[&str]) -> (String, Vec<String>) {
    (name.to_owned(), aliases.iter().map(|alias| (*alias).to_owned()).collect())
}

async fn audit(store: &Store) -> Vec<(String, String)> {
    let text = "SELECT action, subject FROM audit WHERE actor = 'ann' ORDER BY id";
    sqlx::query_as(text).fetch_all(store.database().read()).await.unwrap()
}

#[test]
fn an_adapter_comes_back_as_it_was_written_and_is_registered_once() {
    each(async |place| {
        let store = place.open().await;
        let adapters = Adapters::new(&store);
        // All 63 bits.
        let new = adapter(&store, "support", u64::MAX >> 1);
        assert_eq!(adapters.insert(&new, "ann").await.unwrap(), new);
        assert_eq!(adapters.find(new.id).await.unwrap(), Some(new.clone()));
        let again = RegisteredAdapter { id: store.issue_id(), metrics: json!({}), ..new.clone() };
        assert_eq!(adapters.insert(&again, "ann").await.unwrap(), new, "the same contents are the same adapter");
        let elsewhere = RegisteredAdapter { id: store.issue_id(), base: "other".into(), ..new.clone() };
        adapters.insert(&elsewhere, "ann").await.unwrap();
        let newer = adapter(&store, "support", 2);
        adapters.insert(&newer, "ann").await.unwrap();
        let list = async |filter: AdapterFilter| adapters.list(&filter).await.unwrap();
        assert_eq!(list(AdapterFilter::default()).await.items, [newer.clone(), elsewhere.clone(), new.clone()]);
        let of_base = AdapterFilter { base: Some("base".into()), limit: Some(1), ..Default::default() };
        let page = list(of_base.clone()).await;
        assert_eq!((page.items, page.has_more), (vec![newer.clone()], true));
        assert_eq!(list(AdapterFilter { before: Some(newer.id), ..of_base }).await.items, [new]);
        assert!(list(AdapterFilter { state: Some(AdapterState::Serving), ..Default::default() }).await.items.is_empty());
        let registered: Vec<String> = audit(&store).await.into_iter().map(|(action, _)| action).collect();
        assert_eq!(registered, ["adapter.register"; 3]);
        store.close().await;
    });
}

#[test]
fn serving_replaces_what_no_alias_needs_and_revoking_is_for_good() {
    each(async |place| {
        let store = place.open().await;
        let adapters = Adapters::new(&store);
        let mut made = Vec::new();
        for generation in 1..=3 {
            made.push(adapters.insert(&adapter(&store, "a", generation), "ann").await.unwrap());
        }
        let other = adapters.insert(&adapter(&store, "b", 9), "ann").await.unwrap();
        let [one, two, three] = [made[0].id, made[1].id, made[2].id];
        assert!(matches!(adapters.set_alias("champion", one, "ann").await, Err(AdapterRefusal::NotServed { .. })));
        adapters.serve(one, false, "ann").await.unwrap();
        adapters.serve(other.id, false, "ann").await.unwrap();
        adapters.set_alias("champion", one, "ann").await.unwrap();
        assert_eq!(served(&adapters).await, [row("a@1", &["champion"]), row("b@9", &[])]);
        // The first has an alias and stays; the second has none and goes.
        let (now, retired) = adapters.serve(two, false, "ann").await.unwrap();
        assert_eq!((now.state, retired.len()), (AdapterState::Serving, 0));
        assert!(now.served.is_some());
        let (_, retired) = adapters.serve(three, false, "ann").await.unwrap();
        assert_eq!(retired.iter().map(|adapter| adapter.id).collect::<Vec<_>>(), [two]);
        assert_eq!(served(&adapters).await, [row("a@1", &["champion"]), row("b@9", &[]), row("a@3", &[])]);

        assert!(
            matches!(adapters.retire(one, "ann").await, Err(AdapterRefusal::Aliased { aliases, .. }) if aliases == ["champion"])
        );
        let (_, before) = adapters.set_alias("champion", three, "ann").await.unwrap();
        assert_eq!(before, Some(one));
        assert_eq!(adapters.retire(one, "ann").await.unwrap().state, AdapterState::Retired);
        adapters.set_alias("best", three, "ann").await.unwrap();
        assert_eq!(served(&adapters).await, [row("b@9", &[]), row("a@3", &["best", "champion"])]);

        let (revoked, aliases) = adapters.revoke(three, "ann").await.unwrap();
        assert_eq!((revoked.state, aliases), (AdapterState::Revoked, vec!["best".to_owned(), "champion".to_owned()]));
        assert_eq!(served(&adapters).await, [row("b@9", &[])]);
        assert!(adapters.aliases().await.unwrap().is_empty());
        assert!(
            matches!(adapters.serve(three, true, "ann").await, Err(AdapterRefusal::Revoked(name)) if name == "a@0000000000000003")
        );
        assert!(matches!(adapters.set_alias("x", three, "ann").await, Err(AdapterRefusal::Revoked(_))));
        assert!(matches!(adapters.insert(&adapter(&store, "a", 3), "ann").await, Err(AdapterRefusal::Revoked(_))));
        assert_eq!(adapters.revoke(three, "ann").await.unwrap().0.state, AdapterState::Revoked);
        // What was retired can come back.
        adapters.serve(one, false, "ann").await.unwrap();
        assert_eq!(served(&adapters).await, [row("b@9", &[]), row("a@1", &[])]);
        let changes = audit(&store).await;
        let champion: Vec<&str> =
            changes.iter().filter(|(_, subject)| subject == "champion").map(|(action, _)| action.as_str()).collect();
        assert_eq!(champion, ["adapter.alias", "adapter.alias"]);
        assert!(changes.contains(&("adapter.revoke".into(), "a@0000000000000003".into())));
        store.close().await;
    });
}

#[test]
fn a_withdrawn_name_takes_its_adapter_along_unless_another_leads_there() {
    each(async |place| {
        let store = place.open().await;
        let adapters = Adapters::new(&store);
        let one = adapters.insert(&adapter(&store, "a", 1), "ann").await.unwrap();
        adapters.serve(one.id, false, "ann").await.unwrap();
        for name in ["first", "second", "third"] {
            adapters.set_alias(name, one.id, "ann").await.unwrap();
        }
        assert_eq!(adapters.withdraw_alias(&one.base, "first", "ann").await.unwrap(), one.id);
        assert_eq!(served(&adapters).await, [row("a@1", &["second", "third"])]);
        adapters.remove_alias(&one.base, "third", "ann").await.unwrap();
        adapters.withdraw_alias(&one.base, "second", "ann").await.unwrap();
        assert_eq!(adapters.find(one.id).await.unwrap().unwrap().state, AdapterState::Retired);
        assert!(matches!(adapters.withdraw_alias(&one.base, "second", "ann").await, Err(AdapterRefusal::NoAlias(_))));
        let changes = audit(&store).await;
        assert_eq!(changes.iter().filter(|(action, _)| action == "adapter.retire").count(), 1, "{changes:?}");
        assert_eq!(changes.iter().filter(|(action, _)| action == "adapter.unalias").count(), 3, "{changes:?}");
        store.close().await;
    });
}

#[test]
fn what_was_measured_is_kept_beside_the_metrics_of_the_training() {
    each(async |place| {
        let store = place.open().await;
        let adapters = Adapters::new(&store);
        let made = adapters.insert(&adapter(&store, "a", 1), "ann").await.unwrap();
        for accuracy in [0.5, 0.75] {
            let found = json!({"accuracy": accuracy});
            let evaluated = adapters.evaluated(made.id, &found, "ann").await.unwrap();
            assert_eq!(evaluated.metrics, json!({"eval_loss": 0.25, "evaluation": {"accuracy": accuracy}}));
            assert_eq!(
                adapters.find(made.id).await.unwrap(),
                Some(RegisteredAdapter { metrics: evaluated.metrics, ..made.clone() })
            );
        }
        let actions: Vec<String> = audit(&store).await.into_iter().map(|(action, _)| action).collect();
        assert_eq!(actions, ["adapter.register", "adapter.evaluate", "adapter.evaluate"]);
        assert!(matches!(adapters.evaluated(Uuid::now_v7(), &json!({}), "ann").await, Err(AdapterRefusal::Unknown(_))));
        adapters.serve(made.id, false, "ann").await.unwrap();
        assert_eq!(adapters.served().await.unwrap()[0].base_hash.as_deref(), Some("ba5e"));
        store.close().await;
    });
}

#[test]
fn a_name_means_one_thing() {
    each(async |place| {
        let store = place.open().await;
        let adapters = Adapters::new(&store);
        let a = adapters.insert(&adapter(&store, "a", 1), "ann").await.unwrap();
        adapters.insert(&adapter(&store, "b", 2), "ann").await.unwrap();
        adapters.serve(a.id, false, "ann").await.unwrap();
        for name in ["a", "b", "base"] {
            assert!(matches!(adapters.set_alias(name, a.id, "ann").await, Err(AdapterRefusal::NameTaken { .. })), "{name}");
        }
        adapters.set_alias("champion", a.id, "ann").await.unwrap();
        assert!(matches!(adapters.insert(&adapter(&store, "champion", 3), "ann").await, Err(AdapterRefusal::NameTaken { .. })));
        // An alias of one base says nothing about another's names.
        let elsewhere = RegisteredAdapter { base: "other".into(), ..adapter(&store, "champion", 3) };
        adapters.insert(&elsewhere, "ann").await.unwrap();
        assert!(matches!(adapters.remove_alias("other", "champion", "ann").await, Err(AdapterRefusal::NoAlias(_))));
        assert_eq!(adapters.remove_alias("base", "champion", "ann").await.unwrap(), a.id);
        assert!(matches!(adapters.serve(Uuid::now_v7(), false, "ann").await, Err(AdapterRefusal::Unknown(_))));
        store.close().await;
    });
}

#[test]
fn an_adapter_of_what_was_erased_is_tainted_from_the_start_and_names_nobody() {
    each(async |place| {
        let store = place.open().await;
        let (adapters, snapshots) = (Adapters::new(&store), Snapshots::new(store.database()));
        let hers = answer(&store, "ann");
        store.record(hers.clone()).unwrap();
        store.flush().await;
        let snapshot = Snapshot {
            id: store.issue_id(),
            name: "d".into(),
            version: 1,
            created: 5,
            query: json!({}),
            content_hash: String::new(),
            location: String::new(),
            table_version: 1,
            row_counts: json!({}),
            verdict: "pass".into(),
            report: json!({}),
            tainted: None,
        };
        let sources: Sources = [("inference", [hers.id.to_string()].into()), ("rater", ["ann".to_owned()].into())].into();
        snapshots.insert(&snapshot, &sources, false, store.act("ann", "dataset.make")).await.unwrap();
        let early = RegisteredAdapter { snapshot: Some(snapshot.id), ..adapter(&store, "early", 1) };
        let early = adapters.insert(&early, "trainer").await.unwrap();
        assert_eq!(early.tainted, None);
        assert_eq!(store.erase_user("ann", "operator").await.unwrap().adapters, ["early@0000000000000001"]);
        let early = adapters.find(early.id).await.unwrap().unwrap();
        assert!(early.tainted.is_some() && !early.lineage.to_string().contains("ann"), "{early:?}");

        let late = RegisteredAdapter { snapshot: Some(snapshot.id), ..adapter(&store, "late", 2) };
        let late = adapters.insert(&late, "trainer").await.unwrap();
        assert_eq!(late.tainted, early.tainted);
        assert!(!late.lineage.to_string().contains("ann") && late.lineage.to_string().contains("dpo"), "{}", late.lineage);
        let child = RegisteredAdapter { parent: Some(early.id), lineage: json!({}), ..adapter(&store, "child", 3) };
        assert_eq!(adapters.insert(&child, "trainer").await.unwrap().tainted, early.tainted);
        assert!(matches!(adapters.serve(late.id, false, "boss").await, Err(AdapterRefusal::Tainted(_))));
        assert_eq!(adapters.serve(late.id, true, "boss").await.unwrap().0.state, AdapterState::Serving);
        store.close().await;
    });
}

#[test]
fn files_go_when_nothing_serves_them_and_come_back_with_a_registration() {
    each(async |place| {
        let store = place.open().await;
        let adapters = Adapters::new(&store);
        let (one, twin) = (adapter(&store, "one", 1), adapter(&store, "twin", 1));
        for new in [&one, &twin] {
            adapters.insert(new, "ann").await.unwrap();
        }
        let taken = std::sync::atomic::AtomicUsize::new(0);
        let remove = async |id, since| {
            let take = || {
                taken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Ok(())
            };
            adapters.remove_files(id, since, "ann", take).await
        };
        let times = || taken.load(std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(remove(one.id, None).await, Err(AdapterRefusal::InUse { state: AdapterState::Candidate, .. })));
        adapters.serve(one.id, false, "ann").await.unwrap();
        adapters.set_alias("champion", one.id, "ann").await.unwrap();
        assert!(matches!(remove(one.id, None).await, Err(AdapterRefusal::InUse { state: AdapterState::Serving, .. })));
        adapters.remove_alias("base", "champion", "ann").await.unwrap();
        let retired = adapters.retire(one.id, "ann").await.unwrap();
        assert!(matches!(remove(one.id, Some(retired.updated - 1)).await, Err(AdapterRefusal::Changed(_))));
        let removed = remove(one.id, Some(retired.updated)).await.unwrap();
        assert!(removed.files_removed.is_some() && times() == 0, "the twin has the same files");
        assert_eq!((removed.updated, removed.lineage), (retired.updated, retired.lineage));
        adapters.revoke(twin.id, "ann").await.unwrap();
        remove(twin.id, None).await.unwrap();
        assert_eq!(times(), 1);
        // Once more, after a fault on the way: nothing new, and the folder is asked for again.
        assert_eq!(remove(one.id, None).await.unwrap().files_removed, removed.files_removed);
        assert_eq!(times(), 2);
        let refused = adapters.remove_files(twin.id, None, "ann", || Err(std::io::Error::other("full"))).await;
        assert!(matches!(refused, Err(AdapterRefusal::Folder { .. })));

        assert!(matches!(adapters.serve(one.id, false, "ann").await, Err(AdapterRefusal::FilesRemoved(_))));
        assert!(matches!(adapters.insert(&twin, "ann").await, Err(AdapterRefusal::Revoked(_))));
        assert!(adapters.find(twin.id).await.unwrap().unwrap().files_removed.is_some());
        let again = RegisteredAdapter { id: store.issue_id(), ..one.clone() };
        let restored = adapters.insert(&again, "bob").await.unwrap();
        assert_eq!((restored.id, restored.files_removed, restored.state), (one.id, None, AdapterState::Retired));
        adapters.serve(one.id, false, "ann").await.unwrap();
        let acts: Vec<(String,)> =
            sqlx::query_as("SELECT action || ' ' || actor FROM audit WHERE action LIKE 'adapter.re%' ORDER BY id")
                .fetch_all(store.database().read())
                .await
                .unwrap();
        let acts: Vec<&str> = acts.iter().map(|(act,)| act.as_str()).filter(|act| !act.starts_with("adapter.register")).collect();
        assert_eq!(
            acts,
            [
                "adapter.retire ann",
                "adapter.remove_files ann",
                "adapter.revoke ann",
                "adapter.remove_files ann",
                "adapter.restore bob"
            ]
        );
        store.close().await;
    });
}
