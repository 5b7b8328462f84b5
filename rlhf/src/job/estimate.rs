//! What a training will take, from one of its own steps.

use std::time::{Duration, Instant};

use tidemill_engine::MemoryReport;

use super::JobError;
use crate::collate::Sample;
use crate::model::Model;
use crate::optimizer::{Group, Optimizer};
use crate::train::{Metrics, Offline, Online, Pass, TrainConfig, TrainError, Trainer};

/// What a training will take on this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Numbers that are trained.
    pub parameters: u64,
    /// Steps in all.
    pub steps: u64,
    /// One step, measured.
    pub step: Duration,
    /// Reference log-probabilities of all samples, from the pace of the measured ones.
    pub preparation: Duration,
    /// All steps, without evaluations.
    pub training: Duration,
    /// The most memory that this process has had, in bytes; 0 where the system does not say.
    pub peak_memory: u64,
    /// The most of a card's memory that the model and, where answers are sampled, the engine have held, in bytes, without what its driver
    /// takes; 0 on the processor.
    pub device_memory: u64,
    /// Bytes of a checkpoint on the disk: each number that is trained, and its two moments, in f32. Writing one takes as much memory, too.
    pub checkpoint: u64,
}

/// Bytes of a number in a checkpoint.
const CHECKPOINT: u64 = 3 * size_of::<f32>() as u64;

/// Computes one step of `samples` and throws it away.
pub(super) fn measure(model: &Model, config: &TrainConfig, samples: Vec<Sample>) -> Result<Estimate, JobError> {
    let plan = config.plan(samples.len());
    let all = samples.len();
    // The rows of the first step alone, so that references are computed for them only.
    let first: Vec<Sample> =
        if samples.is_empty() { samples } else { plan.step(0).into_iter().map(|index| samples[index].clone()).collect() };
    let (taken, began) = (first.len(), Instant::now());
    let config = TrainConfig { shuffle: false, max_steps: 1, ..config.clone() };
    let mut trainer = Offline::new(model, &config, first, Vec::new(), None, &mut |_, _| {})?;
    let prepared = began.elapsed();
    // At rate 0 a step of the optimizer takes its time and its memory, and moves nothing.
    let mut optimizer = Optimizer::new(model.parameters(), config.rule(), |_| Group { rate: 1.0, weight_decay: 0.0 });
    // Threads, caches and scratch memory are warm after a first pass.
    let mut step = Duration::ZERO;
    for _ in 0..2 {
        let began = Instant::now();
        std::thread::scope(|scope| {
            let work = || -> Result<(), TrainError> {
                for batch in &trainer.step(0, model)? {
                    let part = trainer.loss(batch, model, Pass::TRAIN, &mut Metrics::default())?;
                    optimizer.accumulate(&part.backward()?)?;
                }
                optimizer.step(0.0, None)?;
                Ok(())
            };
            let thread = std::thread::Builder::new().stack_size(crate::train::STACK).spawn_scoped(scope, work);
            thread.map_err(|source| TrainError::Io { path: "a thread".into(), source })?.join().map_err(|_| TrainError::Thread)?
        })?;
        step = began.elapsed();
    }
    let steps = plan.steps();
    let training = step.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX));
    let preparation = prepared.mul_f64(all as f64 / taken.max(1) as f64);
    estimate(model, steps, step, preparation, training)
}

/// Samples and computes the first step of a trainer that samples, and throws it away. `engine` is the memory of the one that samples.
pub(super) fn sampled(model: &Model, trainer: &mut Online<'_>, engine: &MemoryReport) -> Result<Estimate, JobError> {
    let (steps, began) = (trainer.steps(), Instant::now());
    std::thread::scope(|scope| {
        let work = || -> Result<(), TrainError> {
            for batch in &trainer.step(0, model)? {
                drop(trainer.loss(batch, model, Pass::TRAIN, &mut Metrics::default())?.backward()?);
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().stack_size(crate::train::STACK).spawn_scoped(scope, work);
        thread.map_err(|source| TrainError::Io { path: "a thread".into(), source })?.join().map_err(|_| TrainError::Thread)?
    })?;
    let step = began.elapsed();
    let training = step.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX));
    let mut found = estimate(model, steps, step, Duration::ZERO, training)?;
    if found.device_memory > 0 {
        found.device_memory += (engine.weights + engine.kv + engine.activations) as u64;
    }
    Ok(found)
}

fn estimate(model: &Model, steps: u64, step: Duration, preparation: Duration, training: Duration) -> Result<Estimate, JobError> {
    let parameters = model.parameters().elements() as u64;
    let device_memory = model.device_memory()?.map_or(0, |memory| memory.most as u64);
    let (peak_memory, checkpoint) = (peak_memory(), CHECKPOINT * parameters);
    Ok(Estimate { parameters, steps, step, preparation, training, peak_memory, device_memory, checkpoint })
}

/// The resident set's high-water mark, as Linux tells it.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
