//! Which models are served, and how far each one is.

use crate::http::error::ApiError;
use crate::upstream::Upstream;
use std::sync::{Arc, OnceLock};

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
}

impl Registry {
    /// Names the models; none is loaded yet.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self { slots: names.into_iter().map(|name| Slot { name, upstream: OnceLock::new() }).collect() }
    }

    /// Puts a loaded model in its place; `false` when the name is unknown or already taken.
    pub fn loaded(&self, name: &str, upstream: Upstream) -> bool {
        self.slots.iter().find(|slot| slot.name == name).is_some_and(|slot| slot.upstream.set(upstream).is_ok())
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
    /// it). Without a name, the first model.
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
        let of_base = |slot: &&Slot| name.strip_prefix(slot.name.as_str()).is_some_and(|rest| rest.starts_with(':'));
        if let Some(slot) = self.slots.iter().find(of_base) {
            let Upstream::Local(model) = slot.answering()?;
            let adapter = model.engine().adapter(&name[slot.name.len() + 1..]);
            let adapter = adapter.ok_or_else(|| ApiError::model_not_found(name))?;
            return Ok(Upstream::Local(Arc::new(model.adapted(name, adapter))));
        }
        let adapted = |Upstream::Local(model): &Upstream| {
            let adapter = model.engine().adapter(name)?;
            Some(Upstream::Local(Arc::new(model.adapted(name, adapter))))
        };
        self.ready().find_map(adapted).ok_or_else(|| ApiError::model_not_found(name))
    }
}

impl Slot {
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
