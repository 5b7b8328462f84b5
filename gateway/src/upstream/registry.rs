//! Which models are served, and how far each one is.

use crate::http::error::ApiError;
use crate::upstream::{AdapterNames, Upstream};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use tidemill_engine::AdapterLease;

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
}

struct Slot {
    name: String,
    upstream: OnceLock<Upstream>,
    registered: RwLock<Arc<AdapterNames<AdapterLease>>>,
}

impl Registry {
    /// Names the models; none is loaded yet.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self {
            slots: names
                .into_iter()
                .map(|name| Slot { name, upstream: OnceLock::new(), registered: RwLock::default() })
                .collect(),
        }
    }

    /// Puts a loaded model in its place; `false` when the name is unknown or already taken.
    pub fn loaded(&self, name: &str, upstream: Upstream) -> bool {
        self.slots.iter().find(|slot| slot.name == name).is_some_and(|slot| slot.upstream.set(upstream).is_ok())
    }

    /// Puts other names of registered adapters in the place of those that the base model had, all at once.
    pub fn name_adapters(&self, base: &str, names: AdapterNames<AdapterLease>) {
        if let Some(slot) = self.slots.iter().find(|slot| slot.name == base) {
            *slot.registered.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(names);
        }
    }

    /// The names of registered adapters that the base model has.
    pub fn adapter_names(&self, base: &str) -> Arc<AdapterNames<AdapterLease>> {
        self.slots.iter().find(|slot| slot.name == base).map(Slot::registered).unwrap_or_default()
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
    pub fn ready(&self) -> impl Iterator<Item = &Upstream> {
        self.slots.iter().filter_map(|slot| slot.upstream.get())
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
    pub fn find_base(&self, name: Option<&str>) -> Result<Upstream, ApiError> {
        let mut slots = self.slots.iter();
        let slot = name.map_or_else(|| slots.next(), |name| self.slots.iter().find(|slot| slot.name == name));
        slot.ok_or_else(|| ApiError::model_not_found(name.unwrap_or_default()))?.answering()
    }

    fn find_adapter(&self, name: &str) -> Result<Upstream, ApiError> {
        // An alias may hold colons, so all of the name is looked for first.
        for slot in &self.slots {
            if let (Some(upstream), Some(adapter)) = (slot.upstream.get(), slot.registered().get(name)) {
                return Ok(upstream.adapted(name, adapter.clone()));
            }
        }
        let of_base = |slot: &&Slot| name.strip_prefix(slot.name.as_str()).is_some_and(|rest| rest.starts_with(':'));
        if let Some(slot) = self.slots.iter().find(of_base) {
            let (upstream, adapter) = (slot.answering()?, &name[slot.name.len() + 1..]);
            let adapter = slot.registered().get(adapter).cloned().or_else(|| upstream.loaded(adapter));
            return adapter.map(|adapter| upstream.adapted(name, adapter)).ok_or_else(|| ApiError::model_not_found(name));
        }
        let adapted = |upstream: &Upstream| Some(upstream.adapted(name, upstream.loaded(name)?));
        self.ready().find_map(adapted).ok_or_else(|| ApiError::model_not_found(name))
    }
}

impl Upstream {
    /// An adapter that is in the engine under a name that somebody chose. What was registered is there by its generation, too, and may
    /// be on its way out.
    fn loaded(&self, name: &str) -> Option<AdapterLease> {
        let Self::Local(model) = self;
        if name.contains('@') { None } else { model.engine().adapter(name) }
    }

    fn adapted(&self, asked: &str, adapter: AdapterLease) -> Self {
        let Self::Local(model) = self;
        Self::Local(Arc::new(model.adapted(asked, adapter)))
    }
}

impl Slot {
    fn registered(&self) -> Arc<AdapterNames<AdapterLease>> {
        Arc::clone(&self.registered.read().unwrap_or_else(PoisonError::into_inner))
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

    #[test]
    fn an_unknown_model_is_404_and_a_loading_one_503() {
        let registry = Registry::new(["a".to_owned()]);
        assert_eq!(registry.find(Some("b")).err().unwrap().status.as_u16(), 404);
        let loading = registry.find(Some("a")).err().unwrap();
        assert_eq!((loading.status.as_u16(), loading.retry_after), (503, Some(1)));
        assert!(!registry.all_ready());
    }
}
