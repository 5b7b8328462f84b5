//! Serves the adapters that the store says are to be served.
//!
//! Every second, and after every change that this server makes, what is in the engines is compared with the store: what is missing is
//! loaded, then the names of a base model are replaced all at once, then what is not needed any more is unloaded. So a name leads to the
//! old adapter or to the new one at every moment, and requests that have begun finish on theirs. An adapter that cannot be loaded is
//! reported and tried again; it keeps nothing else from being served.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tidemill_engine::{AdapterLease, AdapterRefused, Engine, ModelFiles};
use tidemill_rlhf::registry::{Base, Registry};
use tidemill_store::{DataDir, ServedAdapter, Store, StoreError};
use uuid::Uuid;

use crate::upstream::{self, AdapterNames, LocalModel};

/// How often the store is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// How long an adapter whose files are wrong is left alone.
const AGAIN: Duration = Duration::from_secs(30);

/// Keeps the engines at what the store says. Cloning is cheap.
#[derive(Clone)]
pub struct AdapterKeeper(Arc<Inner>);

struct Inner {
    registry: Registry,
    models: Arc<upstream::Registry>,
    /// One look at a time: what was decided later must not be overtaken.
    loaded: tokio::sync::Mutex<HashMap<String, HashMap<Uuid, AdapterLease>>>,
    problems: Mutex<HashMap<Uuid, Problem>>,
    /// By name; hashing a model reads all of it.
    bases: Mutex<HashMap<String, Base>>,
}

struct Problem {
    message: String,
    /// When to try again.
    next: Instant,
}

impl AdapterKeeper {
    /// For the adapters of `store`, whose files are in `data`, on `models`.
    pub fn new(store: &Store, data: &DataDir, models: Arc<upstream::Registry>) -> Self {
        let registry = Registry::new(store, data);
        let (loaded, problems, bases) = (tokio::sync::Mutex::default(), Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { registry, models, loaded, problems, bases }))
    }

    /// Where adapters are registered.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// What an adapter of this model is made for.
    pub async fn base(&self, model: &LocalModel) -> Base {
        let known = || self.0.bases.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = known().get(model.name()) {
            return base.clone();
        }
        let (engine, name) = (model.engine().clone(), model.name().to_owned());
        let plain = Base { config: engine.adaptable().cloned(), ..Base::named(&name) };
        let read = move || ModelFiles::open(&engine.options().model).ok().map(|files| Base::of(name, &files));
        // Without its files, its sizes are known all the same.
        let Ok(Some(base)) = tokio::task::spawn_blocking(read).await else { return plain };
        known().insert(model.name().to_owned(), base.clone());
        base
    }

    /// Why an adapter that is to be served is not, if that is so.
    pub fn problem(&self, id: Uuid) -> Option<String> {
        self.problems().get(&id).map(|problem| problem.message.clone())
    }

    /// Forgets that an adapter could not be loaded: somebody says that it can be now.
    pub fn try_again(&self, id: Uuid) {
        self.problems().remove(&id);
    }

    /// Serves what the store says at this moment, on all models that answer.
    pub async fn follow(&self) -> Result<(), StoreError> {
        let mut loaded = self.0.loaded.lock().await;
        let served = self.0.registry.served().await?;
        for model in self.0.models.local() {
            self.update(model.name(), model.engine(), &served, loaded.entry(model.name().to_owned()).or_default()).await;
        }
        self.problems().retain(|id, _| served.iter().any(|adapter| adapter.id == *id));
        Ok(())
    }

    /// The same for a model that is not among those yet: its adapters are there when it begins to answer.
    pub async fn prepare(&self, model: &LocalModel) -> Result<(), StoreError> {
        let mut loaded = self.0.loaded.lock().await;
        let served = self.0.registry.served().await?;
        self.update(model.name(), model.engine(), &served, loaded.entry(model.name().to_owned()).or_default()).await;
        Ok(())
    }

    /// Follows the store for as long as the server runs.
    pub async fn keep_following(self) {
        let mut every = tokio::time::interval(EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut away = false;
        loop {
            every.tick().await;
            match self.follow().await {
                Ok(()) => away = false,
                // What is served goes on being served.
                Err(error) if !away => {
                    tracing::warn!(%error, "cannot see which adapters are to be served");
                    away = true;
                }
                Err(_) => {}
            }
        }
    }

    async fn update(&self, base: &str, engine: &Engine, served: &[ServedAdapter], loaded: &mut HashMap<Uuid, AdapterLease>) {
        let wanted: Vec<&ServedAdapter> = served.iter().filter(|adapter| adapter.base == base).collect();
        let is_wanted = |id: &Uuid| wanted.iter().any(|adapter| adapter.id == *id);
        let leaving: Vec<AdapterLease> = loaded.extract_if(|id, _| !is_wanted(id)).map(|(_, lease)| lease).collect();
        // Before the new ones come: theirs may be the places that are needed.
        for lease in &leaving {
            engine.pin_adapter(lease.name(), false).ok();
        }
        for adapter in &wanted {
            if !loaded.contains_key(&adapter.id)
                // A place that was freed may be what was missing.
                && (!leaving.is_empty() || self.is_due(adapter.id))
                && let Some(lease) = self.load(engine, adapter).await
            {
                loaded.insert(adapter.id, lease);
            }
        }
        let before = self.0.models.adapter_names(base);
        let names = AdapterNames::new(&wanted, loaded, &before);
        if !names.same_as(&before) {
            self.0.models.name_adapters(base, names);
        }
        for lease in leaving {
            // Where room was needed, it is gone already.
            engine.unload_adapter(lease.name()).ok();
            tracing::info!(adapter = lease.name(), model = base, "an adapter is no longer served");
        }
    }

    async fn load(&self, engine: &Engine, adapter: &ServedAdapter) -> Option<AdapterLease> {
        let name = format!("{}@{:016x}", adapter.name, adapter.generation);
        let folder = self.0.registry.folder(&adapter.location);
        let created = u64::try_from(adapter.created / 1_000_000).unwrap_or_default();
        let work = {
            let (engine, name) = (engine.clone(), name.clone());
            move || engine.load_adapter(&name, &folder, true, created)
        };
        let (message, wait) = match tokio::task::spawn_blocking(work).await {
            Ok(Ok(lease)) => {
                tracing::info!(adapter = name, model = adapter.base, "an adapter is served");
                self.problems().remove(&adapter.id);
                return Some(lease);
            }
            // Ends by itself within moments.
            Ok(Err(error @ AdapterRefused::Draining(_))) => (error.to_string(), Duration::ZERO),
            Ok(Err(error)) => (error.to_string(), AGAIN),
            Err(_) => ("its files could not be read because of an internal error".to_owned(), AGAIN),
        };
        let problem = Problem { message: message.clone(), next: Instant::now() + wait };
        let known = self.problems().insert(adapter.id, problem);
        if known.is_none_or(|known| known.message != message) {
            tracing::error!(adapter = name, model = adapter.base, reason = message, "an adapter cannot be served");
        }
        None
    }

    fn is_due(&self, id: Uuid) -> bool {
        self.problems().get(&id).is_none_or(|problem| problem.next <= Instant::now())
    }

    fn problems(&self) -> MutexGuard<'_, HashMap<Uuid, Problem>> {
        self.0.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
