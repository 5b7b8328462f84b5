//! Serves the adapters that the store says are to be served.
//!
//! Every second, and after every change that this server makes, what is in the engines is compared with the store: what is missing is
//! loaded, then the names of a base model are replaced all at once, then what is not needed any more is unloaded. So a name leads to the
//! old adapter or to the new one at every moment, and requests that have begun finish on theirs. An adapter that cannot be loaded is
//! reported and tried again; it keeps nothing else from being served, and its name leads to the generation before until it can.
//!
//! What fine-tuning jobs made may be more than the engine has places for. Such an adapter is there on demand: it has a place while there
//! is one, gives way to another that is asked for, and is loaded again when somebody asks for it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tidemill_engine::{AdapterGeneration, AdapterLease, AdapterRefused, Engine, ModelFiles};
use tidemill_rlhf::registry::{Base, Registry, check_base};
use tidemill_store::{AdapterState, DataDir, ServedAdapter, Store, StoreError};
use uuid::Uuid;

use crate::upstream::{self, AdapterNames, LocalModel, Names, OnDemand};

/// How often the store is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// How long an adapter whose files are wrong is left alone.
const AGAIN: Duration = Duration::from_secs(30);
/// Begins the names of models that fine-tuning jobs made.
const FINE_TUNED: &str = "ft:";

/// Keeps the engines at what the store says. Cloning is cheap.
#[derive(Clone)]
pub struct AdapterKeeper(Arc<Inner>);

struct Inner {
    registry: Registry,
    models: Arc<upstream::Registry>,
    /// One look at a time: what was decided later must not be overtaken.
    loaded: tokio::sync::Mutex<HashMap<String, Held>>,
    problems: Mutex<HashMap<Uuid, Problem>>,
    /// By name; hashing a model reads all of it.
    bases: Mutex<HashMap<String, Base>>,
}

/// What this keeper has put into an engine.
#[derive(Default)]
struct Held {
    /// For good.
    pinned: HashMap<Uuid, AdapterLease>,
    /// Those of them that were replaced by a newer generation of their name, which could not be loaded yet.
    standing_in: HashSet<Uuid>,
    /// Offered on demand, by the name in the engine, which may have given some of them up.
    on_demand: BTreeSet<String>,
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
        let wished = self.0.models.take_wished();
        for model in self.0.models.local() {
            let held = loaded.entry(model.name().to_owned()).or_default();
            self.update(model, &served, &wished, held).await;
        }
        self.problems().retain(|id, _| served.iter().any(|adapter| adapter.id == *id));
        Ok(())
    }

    /// The same for a model that is not among those yet: its adapters are there when it begins to answer.
    pub async fn prepare(&self, model: &LocalModel) -> Result<(), StoreError> {
        let mut loaded = self.0.loaded.lock().await;
        let served = self.0.registry.served().await?;
        let held = loaded.entry(model.name().to_owned()).or_default();
        self.update(model, &served, &BTreeSet::new(), held).await;
        Ok(())
    }

    /// Follows the store for as long as the server runs.
    pub async fn keep_following(self) {
        let mut every = tokio::time::interval(EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut away = false;
        loop {
            tokio::select! {
                _ = every.tick() => {}
                () = self.0.models.wishing() => {}
            }
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

    async fn update(&self, model: &LocalModel, served: &[ServedAdapter], wished: &BTreeSet<String>, held: &mut Held) {
        let (base, engine) = (model.name(), model.engine());
        let own = served.iter().filter(|adapter| adapter.base == base);
        let (on_demand, wanted): (Vec<_>, Vec<_>) = own.partition(|adapter| is_on_demand(adapter));
        let loaded = &mut held.pinned;
        let is_wanted = |id: &Uuid| wanted.iter().any(|adapter| adapter.id == *id);
        let mut leaving: HashMap<Uuid, AdapterLease> = loaded.extract_if(|id, _| !is_wanted(id)).collect();
        // Before the new ones come: theirs may be the places that are needed.
        for lease in leaving.values() {
            engine.pin_adapter(lease.name(), false).ok();
        }
        // A place that was freed may be what was missing.
        let room = leaving.keys().any(|id| !held.standing_in.contains(id));
        for adapter in &wanted {
            if !loaded.contains_key(&adapter.id)
                && (room || self.is_due(adapter.id))
                && let Some(lease) = self.load(model, adapter, true).await
            {
                loaded.insert(adapter.id, lease);
            }
        }
        held.standing_in = self.stand_ins(&wanted, loaded, &self.0.models.adapter_names(base).registered, &leaving).await;
        for (id, lease) in leaving.extract_if(|id, _| held.standing_in.contains(id)) {
            engine.pin_adapter(lease.name(), true).ok();
            loaded.insert(id, lease);
        }
        self.fill(model, &on_demand, wished).await;
        self.publish(base, &wanted, loaded, &on_demand);
        let offered: BTreeSet<String> = on_demand.iter().map(|adapter| reference(adapter)).collect();
        let is_needed = |name: &String| offered.contains(name) || loaded.values().any(|lease| lease.name() == name);
        let before = leaving.values().map(|lease| lease.name().to_owned()).chain(std::mem::take(&mut held.on_demand));
        let gone: Vec<String> = before.filter(|name| !is_needed(name)).collect();
        for name in &gone {
            // Where room was needed, it is gone already.
            engine.unload_adapter(name).ok();
            tracing::info!(adapter = name, model = base, "an adapter is no longer served");
        }
        held.on_demand = offered;
        if !gone.is_empty() {
            self.fill(model, &on_demand, &BTreeSet::new()).await;
            self.publish(base, &wanted, loaded, &on_demand);
        }
    }

    /// Of those that leave, what stands in for a newer generation of its name that is wanted and could not be loaded: what the name led to
    /// so far, unless it must not be served any more.
    async fn stand_ins(
        &self,
        wanted: &[&ServedAdapter],
        loaded: &HashMap<Uuid, AdapterLease>,
        before: &AdapterNames<AdapterLease>,
        leaving: &HashMap<Uuid, AdapterLease>,
    ) -> HashSet<Uuid> {
        let mut standing_in = HashSet::new();
        for adapter in wanted.iter().filter(|adapter| !loaded.contains_key(&adapter.id)) {
            let Some(id) = before.id_of(&adapter.name).filter(|id| leaving.contains_key(id)) else { continue };
            match self.0.registry.get(&id.to_string()).await {
                Ok(old) if old.state == AdapterState::Retired => {
                    standing_in.insert(id);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, adapter = adapter.name, "cannot see whether an older generation may be served")
                }
            }
        }
        standing_in
    }

    /// Loads what was wished for and what there is room for, the newest first.
    async fn fill(&self, model: &LocalModel, on_demand: &[&ServedAdapter], wished: &BTreeSet<String>) {
        let engine = model.engine();
        for adapter in on_demand.iter().rev() {
            let name = reference(adapter);
            let all = engine.adapters();
            let room = all.len() < engine.options().max_adapters;
            let there = all.iter().any(|loaded| loaded.name() == name);
            if there || !self.is_due(adapter.id) || !(room || wished.contains(&name)) {
                continue;
            }
            if self.load(model, adapter, false).await.is_none() && self.is_due(adapter.id) {
                // What is in its way will be gone in a moment.
                self.0.models.wish(&name);
            }
        }
    }

    /// Puts the names of a base model's adapters in the place of those that it had.
    fn publish(&self, base: &str, wanted: &[&ServedAdapter], loaded: &HashMap<Uuid, AdapterLease>, on_demand: &[&ServedAdapter]) {
        let before = self.0.models.adapter_names(base);
        let names =
            Names { registered: AdapterNames::new(wanted, loaded, &before.registered), on_demand: self.offers(on_demand) };
        if !(names.registered.same_as(&before.registered) && names.on_demand == before.on_demand) {
            self.0.models.name_adapters(base, names);
        }
    }

    /// What is there on demand, by the names that lead to it.
    fn offers(&self, on_demand: &[&ServedAdapter]) -> BTreeMap<String, OnDemand> {
        let mut offers = BTreeMap::new();
        for adapter in on_demand.iter().rev() {
            let offer = OnDemand {
                in_engine: reference(adapter),
                generation: AdapterGeneration(adapter.generation),
                created: seconds(adapter),
                listed: true,
                // One that is tried again at once is on its way.
                problem: self.problem(adapter.id).filter(|_| !self.is_due(adapter.id)),
            };
            for name in [adapter.name.clone(), reference(adapter)].into_iter().chain(adapter.aliases.iter().cloned()) {
                let listed = adapter.aliases.contains(&name);
                // The newest generation has the name.
                offers.entry(name).or_insert_with(|| OnDemand { listed, ..offer.clone() });
            }
        }
        offers
    }

    /// Into the engine, under the name that promises its contents; `None` and a problem when that did not work.
    async fn load(&self, model: &LocalModel, adapter: &ServedAdapter, pinned: bool) -> Option<AdapterLease> {
        let name = reference(adapter);
        let loaded = match self.fits(model, &name, adapter).await {
            Ok(()) => self.read(model.engine(), &name, adapter, pinned).await,
            Err(why) => Err((why, AGAIN)),
        };
        let (message, wait) = match loaded {
            Ok(lease) => {
                tracing::info!(adapter = name, model = adapter.base, "an adapter is served");
                self.problems().remove(&adapter.id);
                return Some(lease);
            }
            Err(problem) => problem,
        };
        self.refuse(adapter, &name, message, wait);
        None
    }

    /// Remembers why an adapter is not served, and says so once.
    fn refuse(&self, adapter: &ServedAdapter, name: &str, message: String, wait: Duration) {
        let problem = Problem { message: message.clone(), next: Instant::now() + wait };
        let known = self.problems().insert(adapter.id, problem);
        if known.is_none_or(|known| known.message != message) {
            tracing::error!(adapter = name, model = adapter.base, reason = message, "an adapter cannot be served");
        }
    }

    /// Whether the model's weights are those that the adapter was registered for. Shapes are looked at when it is read.
    async fn fits(&self, model: &LocalModel, name: &str, adapter: &ServedAdapter) -> Result<(), String> {
        let Some(wanted) = adapter.base_hash.as_deref() else {
            tracing::info!(
                adapter = name,
                model = adapter.base,
                "nobody said which weights an adapter was made for; only its shapes are compared"
            );
            return Ok(());
        };
        check_base(name, Some(wanted), self.base(model).await.hash.as_deref()).map_err(|error| error.to_string())
    }

    /// Its files into the engine; else why not, and how long to wait before trying again.
    async fn read(
        &self,
        engine: &Engine,
        name: &str,
        adapter: &ServedAdapter,
        pinned: bool,
    ) -> Result<AdapterLease, (String, Duration)> {
        let (folder, created) = (self.0.registry.folder(&adapter.location), seconds(adapter));
        let (engine, name) = (engine.clone(), name.to_owned());
        match tokio::task::spawn_blocking(move || engine.load_adapter(&name, &folder, pinned, created)).await {
            Ok(Ok(lease)) => Ok(lease),
            // Ends by itself within moments.
            Ok(Err(error @ AdapterRefused::Draining(_))) => Err((error.to_string(), Duration::ZERO)),
            Ok(Err(error)) => Err((error.to_string(), AGAIN)),
            Err(_) => Err(("its files could not be read because of an internal error".to_owned(), AGAIN)),
        }
    }

    fn is_due(&self, id: Uuid) -> bool {
        self.problems().get(&id).is_none_or(|problem| problem.next <= Instant::now())
    }

    fn problems(&self) -> MutexGuard<'_, HashMap<Uuid, Problem>> {
        self.0.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `NAME@GENERATION`
fn reference(adapter: &ServedAdapter) -> String {
    format!("{}@{:016x}", adapter.name, adapter.generation)
}

/// When it was registered, in seconds since 1970.
fn seconds(adapter: &ServedAdapter) -> u64 {
    u64::try_from(adapter.created / 1_000_000).unwrap_or_default()
}

/// Whether nothing but a fine-tuning job's name leads to it. One that somebody gave another name is wanted there at any time.
fn is_on_demand(adapter: &ServedAdapter) -> bool {
    !adapter.aliases.is_empty() && adapter.aliases.iter().all(|alias| alias.starts_with(FINE_TUNED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_job_named_is_there_on_demand() {
        let adapter = |aliases: &[&str]| ServedAdapter {
            id: Uuid::nil(),
            created: 2_000_000,
            name: "ft-1".into(),
            generation: 1,
            base: "b".into(),
            base_hash: None,
            location: String::new(),
            aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        };
        assert!(is_on_demand(&adapter(&["ft:b::1"])));
        assert!(!is_on_demand(&adapter(&["champion", "ft:b::1"])) && !is_on_demand(&adapter(&[])));
        assert_eq!((reference(&adapter(&[])), seconds(&adapter(&[]))), ("ft-1@0000000000000001".to_owned(), 2));
    }
}
