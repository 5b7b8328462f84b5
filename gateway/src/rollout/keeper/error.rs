//! Why a rollout was not started or changed.

use crate::rollout::assignment::LayerClash;
use crate::rollout::decision::ActError;
use crate::rollout::table::BadRow;
use tidemill_store::{RolloutRefusal, StoreError};

/// Why nothing was started or done.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The rows refuse.
    #[error(transparent)]
    Refused(#[from] RolloutRefusal),
    /// The state refuses.
    #[error(transparent)]
    Act(#[from] ActError),
    /// A row cannot be read, or two want the same part of a layer.
    #[error(transparent)]
    Row(#[from] BadRow),
    /// The control is not what the model serves.
    #[error("the first arm is the control, which is what `{model}` serves now: `{stable}`, and not `{control}`")]
    Control {
        /// The public model name.
        model: String,
        /// What it serves.
        stable: String,
        /// What was named.
        control: String,
    },
    /// A variant cannot answer.
    #[error("the variant `{variant}` cannot answer: {reason}")]
    Variant {
        /// Which arm.
        arm: usize,
        /// Its name.
        variant: String,
        /// Why not.
        reason: String,
    },
    /// Something newer stands on a promotion.
    #[error("the promotion of `{rollout}` cannot be taken back: {why}")]
    Built {
        /// The rollout that was promoted.
        rollout: String,
        /// What is newer, and what to do.
        why: String,
    },
    /// A metric that nothing records.
    #[error("nothing records the metric `{metric}`: {fix}")]
    Metric {
        /// Which of the spec's metrics.
        index: usize,
        /// Its name.
        metric: String,
        /// What to do.
        fix: String,
    },
}

impl From<StoreError> for KeeperError {
    fn from(error: StoreError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<LayerClash> for KeeperError {
    fn from(clash: LayerClash) -> Self {
        Self::Row(clash.into())
    }
}
