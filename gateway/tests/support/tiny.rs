//! A tiny real model and adapters that PEFT made for it.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::Setup;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidemill::adapters::AdapterKeeper;
use tidemill::http::App;
use tidemill::rollout::keeper::{Keeper, KeeperRules};
use tidemill::upstream::{LocalModel, Registry, RemoteModel, Upstream};
use tidemill_engine::{Engine, EngineOptions};
use tidemill_kernels::{KvDtype, WeightFormat};
use tidemill_store::DataDir;

/// A file of the model's, or of its adapters'.
pub fn golden(place: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama").join(place)
}

/// A server of the model `tiny`, whose adapters are kept in `folder`.
pub fn app(folder: &Path, setup: Setup) -> App {
    let options = EngineOptions {
        served_name: "tiny".into(),
        kv_memory: Some(16 << 20),
        threads: Some(1),
        weight_format: WeightFormat::F32,
        kv_dtype: KvDtype::F32,
        max_adapters: 3,
        ..EngineOptions::new(golden(""))
    };
    let engine = Engine::start(options, &mut |_, _| {}).unwrap();
    let remotes = RemoteModel::all(&setup.remotes, 7).unwrap();
    let registry = Arc::new(Registry::new(["tiny".to_owned()]).with_remotes(remotes));
    registry.loaded("tiny", Upstream::Local(Arc::new(LocalModel::new(engine, 7))));
    let app = setup.app();
    let adapters = AdapterKeeper::new(&app.store, &DataDir::new(folder), Arc::clone(&registry));
    let rules = KeeperRules { recording: (*app.recording).clone(), ..KeeperRules::default() };
    let metrics = Arc::clone(&app.feedback_metrics);
    let rollouts = Keeper::with_rules(&app.store, Arc::clone(&registry), adapters.clone(), metrics, rules);
    App { adapters, registry, rollouts, ..app }
}
