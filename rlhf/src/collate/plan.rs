//! Which rows a step takes: a function of the seed and the step's number, so that a training can go on at any step.

use crate::random::{Random, mix};

/// The order of rows over the epochs of a training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Rows of the dataset.
    pub rows: usize,
    /// Rows of a step; the last of an epoch may have fewer.
    pub batch: usize,
    /// How often each row is seen.
    pub epochs: f64,
    /// Stops earlier, or goes on longer, when given.
    pub max_steps: Option<u64>,
    /// Another order in each epoch; otherwise that of the dataset.
    pub shuffle: bool,
    /// Of the shuffling.
    pub seed: u64,
}

impl Plan {
    /// Steps of one epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        (self.rows.div_ceil(self.batch.max(1)) as u64).max(1)
    }

    /// Steps of the training.
    pub fn steps(&self) -> u64 {
        match self.max_steps {
            Some(steps) => steps,
            None if self.rows == 0 => 0,
            None => (self.epochs * self.steps_per_epoch() as f64).ceil() as u64,
        }
    }

    /// The epoch's number after `steps` steps.
    pub fn epoch(&self, steps: u64) -> f64 {
        steps as f64 / self.steps_per_epoch() as f64
    }

    /// The rows of step `step`, the first being 0.
    pub fn step(&self, step: u64) -> Vec<usize> {
        let (epoch, within) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        let mut order: Vec<usize> = (0..self.rows).collect();
        if self.shuffle {
            Random::new(mix(mix(self.seed) ^ epoch)).shuffle(&mut order);
        }
        order.into_iter().skip(within * self.batch).take(self.batch).collect()
    }
}
