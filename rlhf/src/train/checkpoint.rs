//! Everything that a training needs to go on, in folders that are whole or absent.
//!
//! `checkpoint-N` holds `parameters.safetensors`, `optimizer.safetensors` and `state.json` after step N. It is written under another
//! name, synced and renamed, so that a process killed at any moment finds the last whole one.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{TrainError, metrics::Bits};
use crate::durable;

const PARAMETERS: &str = "parameters.safetensors";
const MOMENTS: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Best {
    pub(super) step: u64,
    /// The metric as bits: it is compared again after a restart.
    pub(super) bits: u64,
}

/// What makes two trainings the same one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) configuration: String,
    pub(super) data: String,
    pub(super) model: String,
    /// Contents that judge answers, by the names of their functions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) judges: BTreeMap<String, String>,
}

/// Where a training is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) identity: Identity,
    /// Steps taken.
    pub(super) step: u64,
    /// Tokens computed.
    pub(super) tokens: u64,
    /// Length of the log.
    pub(super) log_bytes: u64,
    /// What was measured since the last line of the log.
    pub(super) window: Bits,
    /// Steps that each parameter has taken.
    pub(super) optimizer_steps: BTreeMap<String, u64>,
    pub(super) best: Option<Best>,
    /// Evaluations since the best.
    pub(super) waited: u64,
    /// Whether it was ended before its last step because nothing got better.
    pub(super) ended_early: bool,
    /// Whatever the trainer keeps from step to step.
    pub(super) trainer: Value,
    /// BLAKE3 of the other files.
    pub(super) files: BTreeMap<String, String>,
}

/// A checkpoint that was read and is whole.
pub(super) struct Checkpoint {
    pub(super) state: State,
    pub(super) parameters: Vec<u8>,
    pub(super) moments: Vec<u8>,
}

/// A training's folder; nobody else uses it while this lives.
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Opens or creates it, and removes what an earlier process left half-done.
    pub(super) fn open(path: &Path) -> Result<Self, TrainError> {
        let io = || TrainError::io(path);
        fs::create_dir_all(path).map_err(io())?;
        let lock = File::create(path.join(".lock")).map_err(io())?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(io()(error)),
        }
        for entry in fs::read_dir(path).map_err(io())? {
            let entry = entry.map_err(io())?;
            if entry.file_name().to_string_lossy().starts_with(".half-") {
                fs::remove_dir_all(entry.path()).map_err(TrainError::io(&entry.path()))?;
            }
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The last whole checkpoint. One of another training is refused.
    pub(super) fn latest(&self, identity: &Identity) -> Result<Option<Checkpoint>, TrainError> {
        for step in self.steps()?.into_iter().rev() {
            match self.read(step) {
                Ok(checkpoint) => {
                    let found = &checkpoint.state.identity;
                    let differs = [
                        (found.configuration != identity.configuration, "configuration"),
                        (found.data != identity.data, "dataset"),
                        (found.model != identity.model, "model, adapter or precision"),
                        (found.judges != identity.judges, "reward model"),
                    ];
                    return match differs.into_iter().find(|(differs, _)| *differs) {
                        Some((_, what)) => Err(TrainError::OtherTraining { path: self.path.clone(), what }),
                        None => Ok(Some(checkpoint)),
                    };
                }
                Err(TrainError::Checkpoint(detail)) => {
                    tracing::warn!(step, detail, "a damaged checkpoint is passed over; training goes on from the one before");
                }
                Err(other) => return Err(other),
            }
        }
        Ok(None)
    }

    /// One checkpoint.
    pub(super) fn read(&self, step: u64) -> Result<Checkpoint, TrainError> {
        let folder = self.place(step);
        let bytes = |name: &str| fs::read(folder.join(name)).map_err(|error| damaged(&folder, name, &error.to_string()));
        let state: State = serde_json::from_slice(&bytes(STATE)?).map_err(|error| damaged(&folder, STATE, &error.to_string()))?;
        let checked = |name: &str| {
            let bytes = bytes(name)?;
            if state.files.get(name) == Some(&hash(&bytes)) { Ok(bytes) } else { Err(damaged(&folder, name, "its hash differs")) }
        };
        let (parameters, moments) = (checked(PARAMETERS)?, checked(MOMENTS)?);
        Ok(Checkpoint { state, parameters, moments })
    }

    /// Writes a checkpoint, then removes the oldest beyond `limit`, but neither this one nor the best.
    pub(super) fn save(
        &self,
        mut state: State,
        parameters: &[u8],
        moments: &[u8],
        limit: Option<usize>,
    ) -> Result<(), TrainError> {
        let (place, half) = (self.place(state.step), self.half(state.step));
        state.files = [(PARAMETERS, parameters), (MOMENTS, moments)].map(|(name, bytes)| (name.to_owned(), hash(bytes))).into();
        let json = serde_json::to_vec_pretty(&state).map_err(|error| damaged(&place, STATE, &error.to_string()))?;
        let files = [(PARAMETERS, parameters), (MOMENTS, moments), (STATE, &json)];
        let write = || {
            if half.exists() {
                fs::remove_dir_all(&half)?;
            }
            fs::create_dir(&half)?;
            files.iter().try_for_each(|(name, bytes)| durable::write(&half.join(name), bytes))?;
            durable::sync_folder(&half)?;
            // The same step again: after a cancelled run went on, or to end early. A folder cannot be renamed onto another.
            if place.exists() {
                self.remove(state.step)?;
            }
            fs::rename(&half, &place)?;
            durable::sync_folder(&self.path)
        };
        write().map_err(TrainError::io(&place))?;
        if let Some(limit) = limit {
            let mut steps = self.steps()?;
            let best = state.best.map(|best| best.step);
            while steps.len() > limit {
                let Some(oldest) = steps.iter().position(|step| Some(*step) != best && *step != state.step) else { break };
                let step = steps.remove(oldest);
                self.remove(step).map_err(TrainError::io(&self.place(step)))?;
            }
        }
        Ok(())
    }

    /// Steps that have a checkpoint, ascending.
    pub(super) fn steps(&self) -> Result<Vec<u64>, TrainError> {
        let entries = fs::read_dir(&self.path).map_err(TrainError::io(&self.path))?;
        let number = |name: &str| name.strip_prefix("checkpoint-")?.parse().ok();
        let mut steps: Vec<u64> = entries.flatten().filter_map(|entry| number(&entry.file_name().to_string_lossy())).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// In two steps, so that no checkpoint is ever in part there.
    fn remove(&self, step: u64) -> std::io::Result<()> {
        let gone = self.path.join(format!(".half-gone-{step}"));
        fs::rename(self.place(step), &gone)?;
        fs::remove_dir_all(&gone)
    }

    fn place(&self, step: u64) -> PathBuf {
        self.path.join(format!("checkpoint-{step}"))
    }

    fn half(&self, step: u64) -> PathBuf {
        self.path.join(format!(".half-{step}"))
    }
}

pub(super) fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn damaged(folder: &Path, name: &str, detail: &str) -> TrainError {
    TrainError::Checkpoint(format!("{}: {detail}", folder.join(name).display()))
}
