//! Adapters as they were at the ends of epochs, in `epochs/` of a job's folder: the last few, and the one that was evaluated best.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::JobError;
use crate::train::{LOG, TrainConfig};

const EPOCHS: &str = "epochs";
const STEP: &str = "step-";

/// One of them.
#[derive(Clone, Debug, PartialEq)]
pub struct EpochAdapter {
    /// Steps that were taken.
    pub step: u64,
    /// Its folder, with PEFT's files.
    pub folder: PathBuf,
    /// What was measured at this step, in training and evaluation.
    pub metrics: Map<String, Value>,
}

pub(super) fn place(folder: &Path, step: u64) -> PathBuf {
    folder.join(EPOCHS).join(format!("{STEP}{step}"))
}

/// Those of a job's folder, the first first.
pub fn epoch_adapters(folder: &Path) -> Result<Vec<EpochAdapter>, JobError> {
    let steps = steps(folder)?;
    if steps.is_empty() {
        return Ok(Vec::new());
    }
    let log = read_log(folder)?;
    let adapter = |step| EpochAdapter { step, folder: place(folder, step), metrics: measured(&log, step) };
    Ok(steps.into_iter().map(adapter).collect())
}

/// Removes those that are neither among the last `keep` nor the best evaluated.
pub(super) fn prune(folder: &Path, keep: usize, config: &TrainConfig) -> Result<(), JobError> {
    let steps = steps(folder)?;
    let old = &steps[..steps.len().saturating_sub(keep)];
    if old.is_empty() {
        return Ok(());
    }
    let log = read_log(folder)?;
    let of = |step: &u64| measured(&log, *step).get(config.best_metric()).and_then(Value::as_f64);
    let better = |one: f64, other: f64| if config.greater_is_better() { one > other } else { one < other };
    let mut best: Option<(u64, f64)> = None;
    for step in &steps {
        // Of equals the first.
        if let Some(value) = of(step).filter(|value| best.is_none_or(|(_, known)| better(*value, known))) {
            best = Some((*step, value));
        }
    }
    for step in old.iter().filter(|step| best.is_none_or(|(best, _)| best != **step)) {
        let path = place(folder, *step);
        fs::remove_dir_all(&path).map_err(JobError::io(&path))?;
    }
    Ok(())
}

/// Steps that have an adapter, ascending.
fn steps(folder: &Path) -> Result<Vec<u64>, JobError> {
    let path = folder.join(EPOCHS);
    let entries = match fs::read_dir(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(JobError::io(&path))?,
    };
    let number = |name: &str| name.strip_prefix(STEP)?.parse().ok();
    let mut steps: Vec<u64> = entries.flatten().filter_map(|entry| number(&entry.file_name().to_string_lossy())).collect();
    steps.sort_unstable();
    Ok(steps)
}

fn read_log(folder: &Path) -> Result<Vec<Map<String, Value>>, JobError> {
    let path = folder.join(LOG);
    let text = fs::read_to_string(&path).map_err(JobError::io(&path))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// All that the log says of a step.
fn measured(log: &[Map<String, Value>], step: u64) -> Map<String, Value> {
    let lines = log.iter().filter(|line| line.get("step").and_then(Value::as_u64) == Some(step));
    lines.flatten().map(|(name, value)| (name.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Method;

    fn folder(losses: &[(u64, Option<f64>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut log = String::new();
        for (step, loss) in losses {
            fs::create_dir_all(place(folder.path(), *step)).unwrap();
            log += &format!("{{\"step\":{step},\"epoch\":1.0,\"loss\":0.5}}\n");
            if let Some(loss) = loss {
                log += &format!("{{\"step\":{step},\"epoch\":1.0,\"eval_loss\":{loss}}}\n");
            }
        }
        fs::write(folder.path().join(LOG), log).unwrap();
        folder
    }

    fn kept(folder: &Path) -> Vec<u64> {
        epoch_adapters(folder).unwrap().into_iter().map(|adapter| adapter.step).collect()
    }

    #[test]
    fn the_last_and_the_best_are_kept() {
        let config = TrainConfig::new(Method::Sft);
        let place = folder(&[(2, Some(1.0)), (4, Some(0.5)), (6, Some(0.5)), (8, Some(2.0)), (10, Some(3.0))]);
        prune(place.path(), 2, &config).unwrap();
        assert_eq!(kept(place.path()), [4, 8, 10]);
        let best = epoch_adapters(place.path()).unwrap().remove(0);
        assert_eq!((&best.metrics["eval_loss"], &best.metrics["loss"]), (&0.5.into(), &0.5.into()));
        let unmeasured = folder(&[(1, None), (2, None), (3, None)]);
        prune(unmeasured.path(), 2, &config).unwrap();
        assert_eq!(kept(unmeasured.path()), [2, 3]);
        assert_eq!(kept(&place.path().join("nowhere")), [] as [u64; 0]);
    }
}
