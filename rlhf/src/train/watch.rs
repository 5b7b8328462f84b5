//! What a training tells while it runs.

use std::{collections::BTreeMap, time::Duration};

/// What it is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Steps.
    Training,
    /// Held-out rows.
    Evaluating,
}

/// Where a training is.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress<'a> {
    /// What it is doing.
    pub stage: Stage,
    /// Steps taken.
    pub step: u64,
    /// All steps.
    pub steps: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Tokens computed.
    pub tokens: u64,
    /// The last step's metrics, `loss`, `grad_norm` and `learning_rate` among them; those of an evaluation begin with `eval_`.
    pub metrics: &'a BTreeMap<String, f64>,
    /// Since this process began to train.
    pub elapsed: Duration,
    /// Until the last step, at the pace so far.
    pub remaining: Option<Duration>,
}

/// What the listener wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    #[default]
    Continue,
    /// Keep a checkpoint and stop; the same training can go on later.
    Stop,
}

/// The time that `left` steps will take, when `done` took `elapsed`. None before the first.
pub fn remaining(elapsed: Duration, done: u64, left: u64) -> Option<Duration> {
    let seconds = elapsed.as_secs_f64() * left as f64 / done as f64;
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_the_beginning_did() {
        assert_eq!(remaining(Duration::from_secs(10), 5, 20), Some(Duration::from_secs(40)));
        assert_eq!(remaining(Duration::from_secs(10), 0, 20), None);
        assert_eq!(remaining(Duration::from_secs(10), 5, 0), Some(Duration::ZERO));
    }
}
