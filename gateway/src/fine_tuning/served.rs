//! The models that jobs made: adapters of the registry, under aliases that the API has for them.
//!
//! This is the one place that knows what of a job's folder becomes a model and how it comes to be served.

use crate::fine_tuning::spec::{adapter_name, checkpoint_name, model_name};
use crate::fine_tuning::{DATASET, is_of_loop};
use crate::http::{App, job_name};
use crate::upstream::{LocalModel, Registry as Models};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;
use tidemill_engine::AdapterError;
use tidemill_rlhf::job::{ADAPTER, EpochAdapter, JobError, epoch_adapters};
use tidemill_rlhf::registry::{Base, Lineage, RegistryError};
use tidemill_store::{Actor, AdapterRefusal, FineTuningDraft, FineTuningJob, StoreError};

/// Why a model did not come about.
#[derive(Debug, thiserror::Error)]
pub enum NotMade {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The job's folder.
    #[error(transparent)]
    Folder(#[from] JobError),
}

impl NotMade {
    /// Whether it stays so however often it is tried: not a fault of the disk or the database.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Registry(
                RegistryError::Store(_)
                | RegistryError::Folder { .. }
                | RegistryError::Files(AdapterError::Io { .. })
                | RegistryError::Interrupted,
            ) => false,
            Self::Registry(RegistryError::Refused(refusal)) => !matches!(refusal, AdapterRefusal::Store(_)),
            Self::Registry(_) => true,
            Self::Folder(_) => false,
        }
    }
}

/// A model that can be asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// After which step, where it is not the last.
    pub step: Option<u64>,
    /// Its name in the API.
    pub name: String,
    /// What was measured at its step.
    pub metrics: Map<String, Value>,
    /// Why it is not served at this moment.
    pub problem: Option<String>,
}

/// The base model of this name, if it answers.
pub fn base(models: &Models, name: &str) -> Option<Arc<LocalModel>> {
    let found = models.states().any(|(known, _)| known == name);
    models.find_local_base(Some(name)).ok().filter(|_| found)
}

/// Registers what a job made in `folder` and puts it into service: the models of earlier epochs, and the last. A loop's stays a candidate
/// under the name that the registry has for it. Doing so again changes nothing.
pub async fn publish(app: &App, draft: &FineTuningDraft, folder: &Path) -> Result<Vec<Model>, NotMade> {
    let base = match base(&app.registry, &draft.base) {
        Some(model) => app.adapters.base(&model).await,
        None => Base::named(&draft.base),
    };
    let registry = app.adapters.registry().acting_as(job_name(draft.id));
    let last = model_name(&draft.base, draft.suffix.as_deref(), draft.id);
    let name = adapter_name(draft.suffix.as_deref(), draft.id, None);
    let lineage = registry.lineage_of(folder, &name, base, Some(job_name(draft.id))).await?;
    if is_of_loop(draft) {
        let of = |metadata: &Map<String, Value>| metadata.get(DATASET).and_then(Value::as_str).map(str::to_owned);
        let lineage = Lineage { snapshot: draft.metadata.as_ref().and_then(of), ..lineage };
        let metrics = lineage.metrics.as_object().cloned().unwrap_or_default();
        registry.register(&folder.join(ADAPTER), lineage).await?;
        return Ok(vec![Model { step: None, name, metrics, problem: None }]);
    }
    let mut made = Vec::new();
    for EpochAdapter { step, folder, metrics } in epoch_adapters(folder)? {
        let name = adapter_name(draft.suffix.as_deref(), draft.id, Some(step));
        let lineage = Lineage { name, metrics: Value::Object(metrics.clone()), ..lineage.clone() };
        made.push((folder, lineage, Model { step: Some(step), name: checkpoint_name(&last, step), metrics, problem: None }));
    }
    let metrics = lineage.metrics.as_object().cloned().unwrap_or_default();
    made.push((folder.join(ADAPTER), lineage, Model { step: None, name: last, metrics, problem: None }));
    let mut models = Vec::with_capacity(made.len());
    let mut ids = Vec::with_capacity(made.len());
    for (folder, lineage, mut model) in made {
        let kept = registry.register(&folder, lineage).await?;
        let id = kept.id.to_string();
        match registry.serve(&id, false).await {
            Ok(_) => drop(registry.alias(&model.name, &id).await?),
            Err(error @ RegistryError::Refused(AdapterRefusal::Tainted(_))) => model.problem = Some(error.to_string()),
            Err(error) => return Err(error.into()),
        }
        ids.push(kept.id);
        models.push(model);
    }
    follow(app).await;
    for (model, id) in models.iter_mut().zip(ids) {
        model.problem = model.problem.take().or_else(|| app.adapters.problem(id));
    }
    if app.registry.states().all(|(known, _)| known != draft.base) {
        models.iter_mut().for_each(|model| {
            model.problem = Some(format!("its base model `{}` is not served here; start the server with it", draft.base));
        });
    }
    Ok(models)
}

/// Registers what jobs made before the registry kept such models.
pub async fn publish_older(app: &App, jobs: &[FineTuningJob], root: &Path) {
    for FineTuningJob { draft, .. } in jobs {
        let folder = super::folder_of(root, draft.id);
        if !folder.join(ADAPTER).is_dir() {
            continue;
        }
        match publish(app, draft, &folder).await {
            // The registry has it now.
            Ok(_) => drop(std::fs::remove_dir_all(folder.join(ADAPTER))),
            Err(error) => tracing::warn!(job = %draft.id, %error, "a fine-tuned model is not served"),
        }
    }
}

/// Takes a job's models out of service; requests that they are answering end well. Their adapters stay in the registry, retired. An
/// error when somebody's alias leads to one of them: nothing has changed then.
pub async fn withdraw(app: &App, models: &[String], actor: &Actor) -> Result<(), RegistryError> {
    let registry = app.adapters.registry().acting_as(actor);
    let aliases = registry.aliases().await?;
    let led: Vec<_> = aliases.iter().filter(|alias| models.contains(&alias.name)).collect();
    for own in &led {
        let others = aliases.iter().filter(|alias| alias.adapter == own.adapter && !models.contains(&alias.name));
        let others: Vec<String> = others.map(|alias| alias.name.clone()).collect();
        if !others.is_empty() {
            return Err(AdapterRefusal::Aliased { adapter: own.name.clone(), aliases: others }.into());
        }
    }
    for own in led {
        registry.withdraw(&own.name, Some(&own.base)).await?;
    }
    follow(app).await;
    Ok(())
}

/// The folder of the adapter that a model of this name is; `None` when there is none.
pub async fn folder_of_model(app: &App, name: &str) -> Result<Option<std::path::PathBuf>, StoreError> {
    match app.adapters.registry().get(name).await {
        Ok(adapter) => Ok(Some(app.adapters.registry().folder(&adapter.location))),
        Err(RegistryError::Store(error)) => Err(error),
        Err(_) => Ok(None),
    }
}

async fn follow(app: &App) {
    // The change is made; where the store cannot be read now, it is in force as soon as that can be.
    if let Err(error) = app.adapters.follow().await {
        tracing::warn!(%error, "a change of fine-tuned models is not in force yet");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_more_attempts_cannot_change_ends_a_job() {
        let other = || RegistryError::OtherBase { adapter: "a".into(), wanted: "x".into(), found: "y".into() };
        let disk = || RegistryError::Folder { path: "/data".into(), source: std::io::Error::other("full") };
        for (error, is_final) in [
            (other(), true),
            (RegistryError::NotFound("parent".into()), true),
            (AdapterRefusal::Revoked("a".into()).into(), true),
            (disk(), false),
            (AdapterError::Io { action: "read", path: "/data".into(), source: std::io::Error::other("broken") }.into(), false),
            (RegistryError::Interrupted, false),
        ] {
            let text = error.to_string();
            assert_eq!(NotMade::from(error).is_final(), is_final, "{text}");
        }
    }
}
