//! Compiled constraints, kept for the next request that asks for the same.

use crate::http::error::ApiError;
use crate::openai::response_format::Constrained;
use moka::future::Cache;
use std::sync::Arc;
use std::time::Duration;
use tidemill_engine::{ConstraintKey, Engine, Grammar};
use tokio::sync::Semaphore;

/// Grammars that are kept; the least used go first.
const KEPT: u64 = 256;
/// A grammar that nobody asks for is dropped after this.
const IDLE: Duration = Duration::from_secs(3600);
/// Compilations at a time: the cores belong to the engine. More wait their turn.
const AT_A_TIME: usize = 1;

/// The compiled constraints of one model. Those who ask for the same at the same time wait for one compilation; failures are not
/// kept.
pub(super) struct Grammars {
    cache: Cache<ConstraintKey, Arc<Grammar>>,
    turns: Semaphore,
}

impl Default for Grammars {
    fn default() -> Self {
        let cache = Cache::builder().max_capacity(KEPT).time_to_idle(IDLE).build();
        Self { cache, turns: Semaphore::new(AT_A_TIME) }
    }
}

impl Grammars {
    pub(super) async fn get(&self, engine: &Engine, constrained: &Constrained) -> Result<Arc<Grammar>, ApiError> {
        let compile = async {
            let broken = || ApiError::fault("The server failed to compile the constraint; send the request again.");
            let _turn = self.turns.acquire().await.map_err(|_| broken())?;
            let (engine, constraint) = (engine.clone(), constrained.constraint.clone());
            let compiled = tokio::task::spawn_blocking(move || engine.compile(&constraint)).await.map_err(|_| broken())?;
            compiled.map_err(|error| constrained.refused(&error))
        };
        self.cache.try_get_with(constrained.constraint.key(), compile).await.map_err(|error| ApiError::clone(&error))
    }
}
