use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;
use tidemill_store::{Snapshot, Sources};

use super::*;

fn golden(place: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(place)
}

async fn open() -> (TempDir, Store, Registry) {
    let folder = tempfile::tempdir().unwrap();
    let data = DataDir::new(folder.path());
    let store = Store::open_for_command(&data, None).await.unwrap();
    let registry = Registry::new(&store, &data);
    (folder, store, registry)
}

fn tiny() -> Base {
    Base::of("tiny", &ModelFiles::open(&golden("llama")).unwrap())
}

#[tokio::test]
async fn an_adapter_is_kept_with_its_files_and_found_by_every_name() {
    let (folder, _store, registry) = open().await;
    let made = registry.register(&golden("llama/adapters/some"), Lineage::new("support", tiny())).await.unwrap();
    assert_eq!((made.state, made.base.as_str()), (AdapterState::Candidate, "tiny"));
    assert!(made.base_hash.as_ref().is_some_and(|hash| hash.len() == 64));
    assert!(made.content_hash.len() == 64 && made.lineage["lora"]["r"] == 8, "{made:?}");
    let place = folder.path().join("adapters").join(format!("{:016x}", made.generation));
    assert!(place.join("adapter_model.safetensors").is_file() && place.join("adapter_config.json").is_file());
    assert_eq!(fs::read_dir(folder.path().join("adapters")).unwrap().count(), 1, "nothing is left beside it");
    assert_eq!(registry.open(&made).await.unwrap().generation().0, made.generation);

    registry.serve("support", false).await.unwrap();
    registry.alias("champion", "support").await.unwrap();
    let short = format!("tiny:support@{:04x}", made.generation >> 48);
    for name in ["support", "tiny:support", &made.reference(), &short, "champion", "tiny:champion", &made.id.to_string()] {
        assert_eq!(registry.get(name).await.unwrap().id, made.id, "{name}");
    }
    for name in ["other", "other:support", "support@ffff", "other:champion", &Uuid::now_v7().to_string()] {
        assert!(matches!(registry.get(name).await, Err(RegistryError::NotFound(_))), "{name}");
    }
    registry.unalias("champion", None).await.unwrap();
    assert!(registry.get("champion").await.is_err());
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let (folder, _store, registry) = open().await;
    let wrong = registry.register(&golden("qwen3/adapters/all"), Lineage::new("a", tiny())).await;
    assert!(matches!(&wrong, Err(RegistryError::Files(error)) if error.to_string().contains("another base model")), "{wrong:?}");
    let none = registry.register(&golden("llama"), Lineage::new("a", tiny())).await;
    assert!(matches!(none, Err(RegistryError::Files(_))));
    let id = Uuid::now_v7().to_string();
    for name in ["", "a b", "a:b", "a@1", "../a", ".a", "ä", &"a".repeat(101), &id] {
        let made = registry.register(&golden("llama/adapters/all"), Lineage::new(name, tiny())).await;
        assert!(matches!(made, Err(RegistryError::Name(_))), "{name}");
    }
    let made = Lineage { snapshot: Some("d@3".into()), ..Lineage::new("a", tiny()) };
    assert!(matches!(registry.register(&golden("llama/adapters/all"), made).await, Err(RegistryError::Dataset(_))));
    let made = Lineage { parent: Some("p".into()), ..Lineage::new("a", tiny()) };
    assert!(matches!(registry.register(&golden("llama/adapters/all"), made).await, Err(RegistryError::NotFound(_))));
    let left = fs::read_dir(folder.path().join("adapters")).map_or(0, Iterator::count);
    assert_eq!((left, registry.list(&AdapterFilter::default()).await.unwrap().items.len()), (0, 0));
}

#[tokio::test]
async fn the_lineage_names_what_is_behind_an_adapter() {
    let (_folder, store, registry) = open().await;
    let snapshot = Snapshot {
        id: store.issue_id(),
        name: "thumbs".into(),
        version: 2,
        created: 1,
        query: Value::Null,
        content_hash: String::new(),
        location: String::new(),
        table_version: 2,
        row_counts: Value::Null,
        verdict: "pass".into(),
        report: Value::Null,
        tainted: None,
    };
    let sources: Sources = [("rater", ["ann".to_owned(), "bob".to_owned()].into())].into();
    Snapshots::new(store.database()).insert(&snapshot, &sources, false, store.act("ann", "dataset.make")).await.unwrap();
    let parent = registry.register(&golden("llama/adapters/some"), Lineage::new("first", tiny())).await.unwrap();
    let lineage = Lineage {
        snapshot: Some("thumbs@2".into()),
        parent: Some("first".into()),
        job: Some("ftjob-1".into()),
        config: json!({"method": "dpo"}),
        metrics: json!({"eval_loss": 0.5}),
        ..Lineage::new("second", tiny())
    };
    let made = registry.register(&golden("llama/adapters/all"), lineage).await.unwrap();
    assert_eq!((made.snapshot, made.parent, made.job.as_deref()), (Some(snapshot.id), Some(parent.id), Some("ftjob-1")));
    assert_eq!(made.lineage["raters"], json!(["ann", "bob"]));
    assert_eq!((&made.lineage["dataset"], &made.lineage["parent"]), (&json!("thumbs@2"), &json!(parent.reference())));
    assert!(made.lineage["code_version"].as_str().unwrap().starts_with("tidemill "));
    assert_eq!((&made.lineage["config"]["method"], &made.metrics["eval_loss"]), (&json!("dpo"), &json!(0.5)));
    let erased = store.erase_user("ann", "operator").await.unwrap();
    assert_eq!(erased.adapters, [made.reference()]);
    let marked = registry.get("second").await.unwrap();
    assert!(marked.tainted.is_some() && !marked.lineage.to_string().contains("ann"), "{marked:?}");
}

#[tokio::test]
async fn a_damaged_folder_is_noticed_and_mended_by_registering_again() {
    let (folder, _store, registry) = open().await;
    let made = registry.register(&golden("llama/adapters/all"), Lineage::new("a", tiny())).await.unwrap();
    let tensors = folder.path().join(&made.location).join("adapter_model.safetensors");
    let whole = fs::read(&tensors).unwrap();
    // Another number: the file reads well and holds something else.
    let mut other = whole.clone();
    let last = other.len() - 2;
    other[last] ^= 1;
    fs::write(&tensors, &other).unwrap();
    assert!(matches!(registry.open(&made).await, Err(RegistryError::Changed { .. })));
    assert!(registry.serve("a", false).await.is_err());
    fs::write(&tensors, &whole[..100]).unwrap();
    assert!(matches!(registry.serve("a", false).await, Err(RegistryError::Files(_))));
    assert_eq!(registry.get("a").await.unwrap().state, AdapterState::Candidate);
    let again = registry.register(&golden("llama/adapters/all"), Lineage::new("a", tiny())).await.unwrap();
    assert_eq!(again.id, made.id);
    registry.serve("a", false).await.unwrap();
    assert_eq!(fs::read_dir(folder.path().join("adapters")).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registering_the_same_adapter_at_once_makes_one() {
    let (folder, _store, registry) = open().await;
    let registry = Arc::new(registry);
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let registry = Arc::clone(&registry);
            tokio::spawn(
                async move { registry.register(&golden("llama/adapters/all"), Lineage::new("a", Base::named("tiny"))).await },
            )
        })
        .collect();
    let mut ids = Vec::new();
    for task in tasks {
        ids.push(task.await.unwrap().unwrap().id);
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
    assert_eq!(fs::read_dir(folder.path().join("adapters")).unwrap().count(), 1);
}

#[tokio::test]
async fn what_a_training_wrote_down_is_the_lineage() {
    let (folder, _store, registry) = open().await;
    let first = registry.register(&golden("llama/adapters/some"), Lineage::new("first", tiny())).await.unwrap();
    let training = folder.path().join("training");
    let all = Adapter::read(&golden("llama/adapters/all")).unwrap();
    all.write(&training.join(ADAPTER)).unwrap();
    let told = json!({
        "base": {"name": "tiny", "digest": tiny().hash},
        "parent": registry.folder(&first.location),
        "data": {"source": "pairs@1", "content_hash": "of a store elsewhere", "raters": ["ann"], "train": 7},
        "config": {"method": "dpo"},
        "lora": {"r": 4},
        "code_version": "9.9.9",
        "metrics": {"eval_loss": 0.25},
    });
    fs::write(training.join(LINEAGE), told.to_string()).unwrap();
    let made = registry.register_training(&training, "second", tiny(), Some("job-1".into())).await.unwrap();
    assert_eq!((made.parent, made.snapshot, made.job.as_deref()), (Some(first.id), None, Some("job-1")));
    assert_eq!((&made.lineage["raters"], &made.lineage["code_version"]), (&json!(["ann"]), &json!("tidemill 9.9.9")));
    assert_eq!((&made.lineage["config"]["train"]["method"], &made.metrics["eval_loss"]), (&json!("dpo"), &json!(0.25)));
    // The same shapes with other numbers in them are another model.
    let other = json!({"base": {"name": "tiny", "digest": "x".repeat(64)}, "metrics": {}});
    fs::write(training.join(LINEAGE), other.to_string()).unwrap();
    let refused = registry.register_training(&training, "third", tiny(), None).await;
    assert!(
        matches!(&refused, Err(error @ RegistryError::OtherBase { .. }) if error.to_string().contains("xxxxxxxxxxxx…")),
        "{refused:?}"
    );
    let any = Base { hash: None, ..tiny() };
    let third = registry.register_training(&training, "third", any, None).await.unwrap();
    assert_eq!((third.base_hash, third.generation), (None, made.generation));
    let evaluated = registry.evaluated(made.id, &json!({"rows": "pairs@1"})).await.unwrap();
    assert_eq!((&evaluated.metrics["evaluation"]["rows"], &evaluated.metrics["eval_loss"]), (&json!("pairs@1"), &json!(0.25)));

    let out = folder.path().join("exported");
    registry.export(&made, &out).await.unwrap();
    assert_eq!(Adapter::read(&out).unwrap().digest(), all.digest());
    assert!(matches!(registry.export(&made, &out).await, Err(RegistryError::Exists(_))));
}
