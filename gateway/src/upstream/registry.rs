//! Which models are served, and how far each one is.

use crate::http::error::ApiError;
use crate::upstream::{AdapterNames, LocalModel, RemoteModel, Upstream};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use tidemill_engine::{AdapterGeneration, AdapterLease};
use tokio::sync::Notify;

/// How far a model is.
#[derive(Clone)]
pub enum LoadState {
    /// Weights are being read.
    Loading,
    /// It answers.
    Ready(Upstream),
}

/// All models of this server, in the order they were named.
pub struct Registry {
    slots: Vec<Slot>,
    /// Adapters on demand that somebody asked for and the engine does not have, by their name there.
    wished: Mutex<BTreeSet<String>>,
    wishing: Notify,
}

struct Slot {
    name: String,
    upstream: OnceLock<Upstream>,
    names: RwLock<Arc<Names>>,
}

/// What requests call the registered adapters of a base model; a value that is replaced as a whole, so that a name which moves from one
/// kind to the other leads somewhere at every moment.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Those that are there at any time.
    pub registered: AdapterNames<AdapterLease>,
    /// Those that may have given way, by the names that lead to them.
    pub on_demand: BTreeMap<String, OnDemand>,
}

/// An adapter that has a place in the engine for as long as nobody asks for another that needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnDemand {
    /// Its name in the engine.
    pub in_engine: String,
    /// Names its contents.
    pub generation: AdapterGeneration,
    /// In seconds since 1970.
    pub created: u64,
    /// Shown in lists.
    pub listed: bool,
    /// Why it could not be loaded.
    pub problem: Option<String>,
}

impl Registry {
    /// Names the models; none is loaded yet.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self {
            slots: names.into_iter().map(|name| Slot { name, upstream: OnceLock::new(), names: RwLock::default() }).collect(),
            wished: Mutex::default(),
            wishing: Notify::new(),
        }
    }

    /// Puts a loaded model in its place; `false` when the name is unknown or already taken.
    pub fn loaded(&self, name: &str, upstream: Upstream) -> bool {
        self.slots.iter().find(|slot| slot.name == name).is_some_and(|slot| slot.upstream.set(upstream).is_ok())
    }

    /// Puts other names of registered adapters in the place of those that the base model had, all at once.
    pub fn name_adapters(&self, base: &str, names: Names) {
        if let Some(slot) = self.slots.iter().find(|slot| slot.name == base) {
            *slot.names.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(names);
        }
    }

    /// Returns when somebody has asked for an adapter that is on demand and not in its engine.
    pub async fn wishing(&self) {
        self.wishing.notified().await;
    }

    /// Remembers that somebody wants an adapter on demand, by its name in the engine. There are no more wishes than there are offers.
    pub fn wish(&self, in_engine: &str) {
        self.wished.lock().unwrap_or_else(PoisonError::into_inner).insert(in_engine.to_owned());
    }

    /// Their names in the engine, each once.
    pub fn take_wished(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.wished.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The names of registered adapters that the base model has.
    pub fn adapter_names(&self, base: &str) -> Arc<Names> {
        self.slots.iter().find(|slot| slot.name == base).map(Slot::names).unwrap_or_default()
    }

    /// Adds models that other servers answer; they are there at once. Their names are none of those that were given before.
    pub fn with_remotes(mut self, remotes: impl IntoIterator<Item = Arc<RemoteModel>>) -> Self {
        self.slots.extend(remotes.into_iter().map(|remote| Slot {
            name: remote.name().to_owned(),
            upstream: OnceLock::from(Upstream::Remote(remote)),
            names: RwLock::default(),
        }));
        self
    }

    /// Names and states.
    pub fn states(&self) -> impl Iterator<Item = (&str, LoadState)> {
        self.slots.iter().map(|slot| {
            let state = slot.upstream.get().map_or(LoadState::Loading, |upstream| LoadState::Ready(upstream.clone()));
            (slot.name.as_str(), state)
        })
    }

    /// Whether every model answers.
    pub fn all_ready(&self) -> bool {
        self.slots.iter().all(|slot| slot.upstream.get().is_some())
    }

    /// Models that answer.
    fn ready(&self) -> impl Iterator<Item = &Upstream> {
        self.slots.iter().filter_map(|slot| slot.upstream.get())
    }

    /// Those of them that run in this process.
    pub fn local(&self) -> impl Iterator<Item = &Arc<LocalModel>> {
        self.ready().filter_map(|upstream| match upstream {
            Upstream::Local(model) => Some(model),
            Upstream::Remote(_) => None,
        })
    }

    /// The remote model of this name.
    pub fn remote(&self, name: &str) -> Option<&Arc<RemoteModel>> {
        self.ready().find_map(|upstream| match upstream {
            Upstream::Remote(model) if model.name() == name => Some(model),
            _ => None,
        })
    }

    /// Like [`Registry::find`], for what needs an engine or a tokenizer.
    pub fn find_local(&self, name: Option<&str>) -> Result<Arc<LocalModel>, ApiError> {
        self.find(name)?.into_local()
    }

    /// Like [`Registry::find_base`], for what needs an engine or a tokenizer.
    pub fn find_local_base(&self, name: Option<&str>) -> Result<Arc<LocalModel>, ApiError> {
        self.find_base(name)?.into_local()
    }

    /// The model that a request names: a base model, `base:adapter`, or an adapter by its name alone (of the first model that has
    /// it). An adapter may be called by an alias; a registered one goes before one that was only loaded. Without a name, the first
    /// model.
    pub fn find(&self, name: Option<&str>) -> Result<Upstream, ApiError> {
        let slot = match name {
            Some(name) => self.slots.iter().find(|slot| slot.name == name),
            None => self.slots.first(),
        };
        match (slot, name) {
            (Some(slot), _) => slot.answering(),
            (None, name) => self.find_adapter(name.unwrap_or_default()),
        }
    }

    /// The base model of this name, or the first.
    fn find_base(&self, name: Option<&str>) -> Result<Upstream, ApiError> {
        let mut slots = self.slots.iter();
        let slot = name.map_or_else(|| slots.next(), |name| self.slots.iter().find(|slot| slot.name == name));
        slot.ok_or_else(|| ApiError::model_not_found(name.unwrap_or_default()))?.answering()
    }

    fn find_adapter(&self, name: &str) -> Result<Upstream, ApiError> {
        // The names of one moment, for every look into them.
        let slots: Vec<(&Slot, Arc<Names>)> = self.slots.iter().map(|slot| (slot, slot.names())).collect();
        // An alias may hold colons, so all of the name is looked for first.
        for (slot, names) in &slots {
            if let (Some(Upstream::Local(model)), Some(adapter)) = (slot.upstream.get(), names.registered.get(name)) {
                return Ok(adapted(model, name, adapter.clone()));
            }
        }
        let of_base = |slot: &Slot| name.strip_prefix(slot.name.as_str()).is_some_and(|rest| rest.starts_with(':'));
        if let Some((slot, names)) = slots.iter().find(|(slot, _)| of_base(slot)) {
            let Upstream::Local(model) = slot.answering()? else { return Err(ApiError::model_not_found(name)) };
            let own = &name[slot.name.len() + 1..];
            if let Some(adapter) = names.registered.get(own) {
                return Ok(adapted(&model, name, adapter.clone()));
            }
            return self.find_on_demand(slot, names, own).unwrap_or_else(|| match loaded(&model, own) {
                Some(adapter) => Ok(adapted(&model, name, adapter)),
                None => Err(ApiError::model_not_found(name)),
            });
        }
        if let Some(found) = slots.iter().find_map(|(slot, names)| self.find_on_demand(slot, names, name)) {
            return found;
        }
        let by_name = |model: &Arc<LocalModel>| Some(adapted(model, name, loaded(model, name)?));
        self.local().find_map(by_name).ok_or_else(|| ApiError::model_not_found(name))
    }

    /// An adapter on demand; where the engine does not have it, it is wished for, and the error says when to come again.
    fn find_on_demand(&self, slot: &Slot, names: &Names, name: &str) -> Option<Result<Upstream, ApiError>> {
        let Upstream::Local(model) = slot.upstream.get()? else { return None };
        let meant = names.on_demand.get(name)?;
        if let Some(adapter) = model.engine().adapter(&meant.in_engine) {
            return Some(Ok(adapted(model, name, adapter)));
        }
        self.wish(&meant.in_engine);
        self.wishing.notify_one();
        let shown: String = name.chars().take(200).collect();
        Some(Err(match &meant.problem {
            None => ApiError::unavailable(
                Some("model_loading"),
                format!("The model `{shown}` had given way to others and is being loaded again; send the request again."),
                1,
            ),
            Some(why) => {
                ApiError::unavailable(Some("model_not_loaded"), format!("The model `{shown}` cannot be loaded now: {why}."), 30)
            }
        }))
    }
}

/// An adapter that is in the engine under a name that somebody chose. What was registered is there by its generation, too, and may be
/// on its way out.
fn loaded(model: &LocalModel, name: &str) -> Option<AdapterLease> {
    if name.contains('@') { None } else { model.engine().adapter(name) }
}

fn adapted(model: &LocalModel, asked: &str, adapter: AdapterLease) -> Upstream {
    Upstream::Local(Arc::new(model.adapted(asked, adapter)))
}

impl Upstream {
    /// The model in this process, or a refusal that names what a remote one can be asked for.
    fn into_local(self) -> Result<Arc<LocalModel>, ApiError> {
        match self {
            Self::Local(model) => Ok(model),
            Self::Remote(model) => {
                let message = format!(
                    "The model `{}` is answered by another server, and this needs a model that is loaded here. Other servers are asked for /v1/chat/completions, /v1/completions and /v1/embeddings.",
                    model.name()
                );
                Err(ApiError::invalid("model", "remote_model", message))
            }
        }
    }
}

impl Slot {
    fn names(&self) -> Arc<Names> {
        Arc::clone(&self.names.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn answering(&self) -> Result<Upstream, ApiError> {
        self.upstream.get().cloned().ok_or_else(|| {
            ApiError::unavailable(
                Some("model_loading"),
                format!("The model `{}` is still loading; GET /ready says when it is there.", self.name),
                1,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::remote::{RemoteSpec, Remotes, ServerSpec};

    #[test]
    fn an_unknown_model_is_404_and_a_loading_one_503() {
        let registry = Registry::new(["a".to_owned()]);
        assert_eq!(registry.find(Some("b")).err().unwrap().status.as_u16(), 404);
        let loading = registry.find(Some("a")).err().unwrap();
        assert_eq!((loading.status.as_u16(), loading.retry_after), (503, Some(1)));
        assert!(!registry.all_ready());
    }

    #[test]
    fn a_remote_model_is_there_at_once_and_refused_where_an_engine_is_needed() {
        let remotes = Remotes {
            servers: vec![ServerSpec::new("s", "http://127.0.0.1:1")],
            models: vec![RemoteSpec::new("far", vec!["s".into()])],
        };
        let registry = Registry::new([]).with_remotes(RemoteModel::all(&remotes, 1).unwrap());
        assert!(registry.all_ready() && registry.remote("far").is_some() && registry.local().next().is_none());
        assert!(matches!(registry.find(Some("far")), Ok(Upstream::Remote(_))));
        let error = registry.find_local(Some("far")).err().unwrap();
        assert_eq!((error.status.as_u16(), error.code.as_deref()), (400, Some("remote_model")));
        assert_eq!(registry.find(Some("far:adapter")).err().unwrap().status.as_u16(), 404);
    }
}
