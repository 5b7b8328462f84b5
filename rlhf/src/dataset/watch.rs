//! How far long work is, and whether it should stop.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use serde::Serialize;

use super::error::DatasetError;

/// Parts of the work, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Not yet begun.
    Waiting,
    /// Reads feedback.
    Feedback,
    /// Reads the texts that the feedback is about.
    Answers,
    /// Reads the file to import.
    Reading,
    /// Checks quality.
    Checking,
    /// Writes the table.
    Writing,
}

const STAGES: [Stage; 6] = [Stage::Waiting, Stage::Feedback, Stage::Answers, Stage::Reading, Stage::Checking, Stage::Writing];

/// Progress, as others read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// How much of it is done: feedback, answers, rows, or bytes of a file.
    pub done: u64,
    /// Of how much, where that is known.
    pub total: Option<u64>,
}

/// Shared between the work and who waits for it.
#[derive(Debug, Default)]
pub struct Watch {
    stop: AtomicBool,
    stage: AtomicU8,
    done: AtomicU64,
    /// `u64::MAX` is unknown.
    total: AtomicU64,
}

impl Watch {
    /// Begins a part.
    pub fn enter(&self, stage: Stage, total: Option<u64>) {
        self.stage.store(stage as u8, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// So much more is done.
    pub fn add(&self, amount: u64) {
        self.done.fetch_add(amount, Ordering::Relaxed);
    }

    /// Asks the work to stop at the next good moment.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Asked by the work: an error when it is to stop.
    pub fn go_on(&self) -> Result<(), DatasetError> {
        if self.stop.load(Ordering::Relaxed) { Err(DatasetError::Interrupted) } else { Ok(()) }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let total = self.total.load(Ordering::Relaxed);
        Progress {
            stage: STAGES.get(usize::from(self.stage.load(Ordering::Relaxed))).copied().unwrap_or(Stage::Waiting),
            done: self.done.load(Ordering::Relaxed),
            total: (total != u64::MAX && total != 0).then_some(total),
        }
    }
}
