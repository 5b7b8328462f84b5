//! The models that jobs made, on the engine that has their base.
//!
//! This is the one place that knows where a finished adapter lies and how it comes to be served.

use crate::fine_tuning::folder_of;
use crate::upstream::{LocalModel, Registry};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidemill_engine::{AdapterError, AdapterRefused};
use tidemill_rlhf::job::ADAPTER;
use tidemill_store::{FineTuningJob, FineTunings, StoreError};

/// Why a model is not served.
#[derive(Debug, thiserror::Error)]
pub enum NotServed {
    /// Its base is not.
    #[error("its base model `{0}` is not served here; start the server with it")]
    Base(String),
    /// The engine refused.
    #[error(transparent)]
    Refused(#[from] AdapterRefused),
    /// A fault of ours.
    #[error("loading it broke off; the server's log says why")]
    Broken,
}

impl NotServed {
    /// Whether the adapter itself is wrong, so that it never can be.
    pub fn is_final(&self) -> bool {
        let Self::Refused(refused) = self else { return false };
        match refused {
            AdapterRefused::Files(AdapterError::Folder { .. }) => false,
            AdapterRefused::Files(_) | AdapterRefused::Rank { .. } | AdapterRefused::Name(_) => true,
            _ => false,
        }
    }
}

/// The base model of this name, if it answers.
pub fn base(registry: &Registry, name: &str) -> Option<Arc<LocalModel>> {
    let found = registry.states().any(|(known, _)| known == name);
    registry.find_local_base(Some(name)).ok().filter(|_| found)
}

/// Serves the adapter in `folder` under `name`, beside the base model. The same contents under the same name change nothing.
pub async fn serve(registry: &Registry, base: &str, name: &str, folder: PathBuf, created: i64) -> Result<(), NotServed> {
    let model = self::base(registry, base).ok_or_else(|| NotServed::Base(base.to_owned()))?;
    let (engine, name) = (model.engine().clone(), name.to_owned());
    let load = move || engine.load_adapter(&name, &folder, false, created.unsigned_abs() / 1_000_000);
    tokio::task::spawn_blocking(load).await.map_err(|_| NotServed::Broken)??;
    Ok(())
}

/// Serves what the jobs of this data directory made: as many as the engine takes, the newest last, so that the oldest give way.
pub async fn serve_all(rows: &FineTunings, registry: &Registry, root: &Path, place: &str) -> Result<(), StoreError> {
    let most = registry.local().map(|model| model.engine().options().max_adapters).sum();
    let mut jobs = rows.served(place, most).await?;
    jobs.reverse();
    for FineTuningJob { draft, fine_tuned_model, finished, .. } in jobs {
        let Some(name) = fine_tuned_model else { continue };
        let folder = folder_of(root, draft.id).join(ADAPTER);
        if let Err(error) = serve(registry, &draft.base, &name, folder, finished.unwrap_or(draft.created)).await {
            tracing::warn!(model = name, %error, "a fine-tuned model is not served");
        }
    }
    Ok(())
}

/// Takes the model off the engine; requests that it is answering end well.
pub fn withdraw(registry: &Registry, base: &str, name: &str) {
    if let Some(model) = self::base(registry, base)
        && let Err(error) = model.engine().unload_adapter(name)
    {
        tracing::debug!(model = name, %error, "a fine-tuned model was not loaded");
    }
}
