//! The head of a reward model, beside its adapter or in the folder of the model.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Var};
use tidemill_engine::{Adapter, ModelFiles};

use super::JobError;
use crate::batch::Packed;
use crate::durable;
use crate::model::{Model, ModelOptions, Pass};
use crate::parameters::Parameter;
use crate::reward::model::RewardModel;
use crate::tensors::{self, Lists};
use crate::train::{Head, TrainConfig, TrainError};

/// The file.
const HEAD: &str = "head.safetensors";
/// The tensor's name.
const WEIGHT: &str = "score.weight";
/// What a folder has that holds a model of its own, and no adapter.
const MODEL_CONFIG: &str = "config.json";

/// Writes a head into the folder of its adapter or model.
pub(super) fn write(head: &Head, folder: &Path) -> Result<(), JobError> {
    let values = head.weight.values().map_err(TrainError::from)?;
    let bytes = tensors::write([(head.weight.name.clone(), values.as_slice())]).map_err(TrainError::from)?;
    let path = folder.join(HEAD);
    durable::replace(&path, &bytes).map_err(JobError::io(&path))
}

/// What a training left in `folder`: the base of `files` with `adapter`, and a head where it is a reward model.
pub(crate) fn measured_model(
    files: &Arc<ModelFiles>,
    folder: &Path,
    adapter: &Adapter,
    options: ModelOptions,
) -> Result<(Model, Option<Head>), JobError> {
    let head = if folder.join(HEAD).exists() { Some(read(files, folder)?) } else { None };
    Ok((Model::with_adapter(Arc::clone(files), adapter, options)?, head))
}

/// A reward model as a training leaves it in `folder`: an adapter on the base of `beside`, or a model of its own. It computes where `beside`
/// does. `config` says how conversations become tokens; where `longest` says how many of `beside`'s a prompt and its answer have at most, its
/// largest batch is rehearsed.
pub(super) fn reward_model(
    beside: &Model,
    folder: &Path,
    options: ModelOptions,
    config: &TrainConfig,
    longest: Option<usize>,
) -> Result<RewardModel, JobError> {
    let whole = folder.join(MODEL_CONFIG).is_file();
    let files = if whole { Arc::new(ModelFiles::open(folder)?) } else { Arc::clone(beside.files()) };
    let head = read(&files, folder)?;
    let mut hasher = blake3::Hasher::new();
    let model = if whole {
        Model::untrained(Arc::clone(&files), options)?
    } else {
        let adapter = Adapter::read(folder)?;
        hasher.update(&adapter.digest());
        Model::with_adapter(Arc::clone(&files), &adapter, options)?
    };
    let model = model.computing_beside(beside)?;
    if let Some(longest) = longest {
        // Twice as many tokens: a judge has a tokenizer and a template of its own.
        let longest = longest.saturating_mul(2).min(config.encoding().max_length.unwrap_or(usize::MAX));
        let rows = config.tokens_per_batch.max(longest);
        let read: Vec<u32> = (0..rows as u32).collect();
        model.rehearse(&Packed::of_size(rows, longest, 0), &read, Pass::EVALUATE)?;
    }
    hasher.update(model.base().as_bytes());
    for value in head.weight.values().map_err(TrainError::from)? {
        hasher.update(&value.to_le_bytes());
    }
    let (encoding, budget, digest) = (config.encoding(), config.tokens_per_batch, hasher.finalize().to_hex().to_string());
    Ok(RewardModel { model: Box::new(model), head, files, encoding, budget, digest })
}

fn read(files: &ModelFiles, folder: &Path) -> Result<Head, JobError> {
    let path = folder.join(HEAD);
    let bytes = std::fs::read(&path).map_err(JobError::io(&path))?;
    let width = files.config().hidden;
    let values = Lists::read(&bytes).and_then(|lists| lists.get(WEIGHT, width)).map_err(TrainError::from)?;
    let var = Var::from_vec(values, width, &Device::Cpu).map_err(TrainError::from)?;
    Ok(Head { weight: Parameter { name: WEIGHT.to_owned(), var } })
}
