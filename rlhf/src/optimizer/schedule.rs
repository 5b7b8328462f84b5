//! How the learning rate changes over the steps, as transformers defines it.

use serde::{Deserialize, Serialize};

/// The shape, under transformers' names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// The same all the time, without warm-up.
    Constant,
    /// The same after the warm-up.
    ConstantWithWarmup,
    /// Down to 0 in a straight line.
    #[default]
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
}

/// A shape over a number of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The shape.
    pub shape: SchedulerType,
    /// Steps over which the rate rises from 0.
    pub warmup: u64,
    /// All steps.
    pub total: u64,
}

impl Schedule {
    /// The factor of the peak learning rate that step `step` (the first is 0) uses.
    pub fn factor(self, step: u64) -> f64 {
        if self.shape == SchedulerType::Constant {
            return 1.0;
        }
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.shape {
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.0,
            SchedulerType::Linear => (self.total.saturating_sub(step) as f64 / rest).max(0.0),
            SchedulerType::Cosine => {
                let progress = (step - self.warmup) as f64 / rest;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}
