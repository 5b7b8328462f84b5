//! The head of a reward model, beside its adapter.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Var};
use tidemill_engine::{Adapter, ModelFiles};

use super::JobError;
use crate::durable;
use crate::model::{Model, ModelOptions};
use crate::parameters::Parameter;
use crate::tensors::{self, Lists};
use crate::train::{Head, TrainError};

/// The file.
const HEAD: &str = "head.safetensors";
/// The tensor's name.
const WEIGHT: &str = "score.weight";

/// Writes a head into its adapter's folder.
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

/// A reward model as a training leaves it in `folder`, on the base of `files`.
pub fn reward_model(files: &Arc<ModelFiles>, folder: &Path, options: ModelOptions) -> Result<(Model, Head), JobError> {
    let adapter = Adapter::read(folder)?;
    let head = read(files, folder)?;
    Ok((Model::with_adapter(Arc::clone(files), &adapter, options)?, head))
}

fn read(files: &ModelFiles, folder: &Path) -> Result<Head, JobError> {
    let path = folder.join(HEAD);
    let bytes = std::fs::read(&path).map_err(JobError::io(&path))?;
    let width = files.config().hidden;
    let values = Lists::read(&bytes).and_then(|lists| lists.get(WEIGHT, width)).map_err(TrainError::from)?;
    let var = Var::from_vec(values, width, &Device::Cpu).map_err(TrainError::from)?;
    Ok(Head { weight: Parameter { name: WEIGHT.to_owned(), var } })
}
