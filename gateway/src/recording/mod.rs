//! Which answers are recorded, how much of them, and how they are caught as they pass.

mod params;
mod recorder;
mod refusal;
mod remote;

pub use params::{constrained, to_json};
pub use recorder::{Draft, Recorder};
pub(crate) use recorder::{hand_over, micros};
pub use remote::{RemoteAnswer, RemoteRecord};

use std::collections::BTreeMap;
use tidemill_store::records::Inference;
use uuid::Uuid;

/// How much of an answer is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Everything, so that it can be reproduced and trained on.
    Full,
    /// Who, when, how long, which parameters, how sure; no text and no tokens.
    Metadata,
    /// What a rollout counts, where nothing else is to be recorded: no person, no conversation, nothing of the application's.
    Counted,
    /// Nothing.
    Off,
}

/// Leaves of a record what a rollout counts.
fn only_counted(inference: &mut Inference) {
    inference.user_key = None;
    inference.conversation = None;
    inference.metadata.clear();
    inference.params = None;
}

/// What differs for one model or endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Route {
    /// How much.
    pub level: Option<Level>,
    /// Share of the answers, from 0 to 1.
    pub share: Option<f64>,
}

/// What a deployment records.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    /// How much.
    pub level: Level,
    /// Share of the answers, from 0 to 1.
    pub share: f64,
    /// By served model, or by endpoint (`chat`, `response`, `completion`); a model's goes first.
    pub routes: BTreeMap<String, Route>,
}

impl Default for Recording {
    fn default() -> Self {
        Self { level: Level::Full, share: 1.0, routes: BTreeMap::new() }
    }
}

impl Recording {
    /// Level and share for an endpoint and a model.
    pub fn of(&self, endpoint: &str, model: &str) -> (Level, f64) {
        let routes = [self.routes.get(model), self.routes.get(endpoint)];
        let level = routes.iter().flatten().find_map(|route| route.level).unwrap_or(self.level);
        let share = routes.iter().flatten().find_map(|route| route.share).unwrap_or(self.share);
        (level, share)
    }

    /// How much of one answer. The id alone draws the lot, so that every replica and every later look agrees.
    pub fn level(&self, endpoint: &str, model: &str, id: Uuid) -> Level {
        let (level, share) = self.of(endpoint, model);
        if share >= 1.0 || lot(b"", id) < share { level } else { Level::Off }
    }

    /// Whether answers of this base model are recorded with their tokens, at any endpoint that gives answers.
    pub fn keeps_tokens(&self, model: &str) -> bool {
        ["chat", "response", "completion"].iter().any(|endpoint| {
            let (level, share) = self.of(endpoint, model);
            level == Level::Full && share > 0.0
        })
    }
}

/// A number from 0 to below 1 that is fixed by the id and uniform over ids. Those of two purposes are independent.
pub(crate) fn lot(purpose: &[u8], id: Uuid) -> f64 {
    let mut hash = blake3::Hasher::new();
    hash.update(purpose).update(id.as_bytes());
    let mut first = [0; 4];
    first.copy_from_slice(&hash.finalize().as_bytes()[..4]);
    f64::from(u32::from_le_bytes(first)) / 4_294_967_296.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_route_goes_before_an_endpoints_and_both_before_the_default() {
        let routes = [
            ("m".to_owned(), Route { level: Some(Level::Off), share: None }),
            ("chat".to_owned(), Route { level: Some(Level::Metadata), share: Some(0.5) }),
        ];
        let recording = Recording { routes: routes.into(), ..Recording::default() };
        assert_eq!(recording.of("chat", "m"), (Level::Off, 0.5));
        assert_eq!(recording.of("chat", "other"), (Level::Metadata, 0.5));
        assert_eq!(recording.of("completion", "other"), (Level::Full, 1.0));
    }

    #[test]
    fn tokens_are_kept_where_any_endpoint_records_all() {
        let route = |level, share| Route { level, share };
        let routes = [("m".to_owned(), route(Some(Level::Metadata), None)), ("chat".to_owned(), route(None, Some(0.0)))];
        let recording = Recording { routes: routes.into(), ..Recording::default() };
        assert!(!recording.keeps_tokens("m") && recording.keeps_tokens("other"));
        assert!(!Recording { share: 0.0, ..Recording::default() }.keeps_tokens("m"));
    }

    #[test]
    fn the_lots_of_two_purposes_are_independent() {
        let ids: Vec<Uuid> = (0..10_000u128).map(|n| Uuid::from_u128(n << 64 | n)).collect();
        let both = ids.iter().filter(|id| lot(b"", **id) < 0.5 && lot(b"base score", **id) < 0.5).count();
        // Binomial with p = 0.25: six standard deviations are 260.
        assert!((2240..2760).contains(&both), "{both}");
    }

    #[test]
    fn a_share_of_the_ids_is_recorded_and_always_the_same_ones() {
        let recording = Recording { share: 0.25, ..Recording::default() };
        let recorded = |n: u128| recording.level("chat", "m", Uuid::from_u128(n << 64 | n)) == Level::Full;
        let chosen: Vec<bool> = (0..10_000).map(recorded).collect();
        // Binomial with p = 0.25: six standard deviations are 260.
        let count = chosen.iter().filter(|chosen| **chosen).count();
        assert!((2240..2760).contains(&count), "{count}");
        assert!((0..10_000).zip(&chosen).all(|(n, was)| recorded(n) == *was));
        let none = Recording { share: 0.0, ..Recording::default() };
        assert!((0..1000).all(|n| none.level("chat", "m", Uuid::from_u128(n)) == Level::Off));
    }
}
