//! Where a rollout stands, and what was decided.

use crate::rollout::decision::judge::{Judgement, Measure};
use crate::rollout::statistics::SampleRatio;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Where a rollout stands. Times are microseconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Whether it runs.
    pub status: Status,
    /// When it began.
    pub started: i64,
    /// Who started it.
    #[serde(default)]
    pub started_by: String,
    /// The key that started it, if one did.
    #[serde(default)]
    pub started_key: Option<String>,
    /// Share of the units that take part.
    pub coverage: f64,
    /// Shares of the arms among them.
    pub weights: Vec<f64>,
    /// Since when metrics and exposures are to be counted: the arms' proportion has not changed since, or does not matter.
    pub since: i64,
    /// Since when recent exposures are to be counted: no weight has changed since.
    pub changed: i64,
    /// How often it was begun anew to compare the units with the arms' shares.
    #[serde(default)]
    pub recounts: u32,
    /// A canary's step that is waited for; past the last when all are done.
    pub step: usize,
    /// When that step began.
    pub step_since: i64,
    /// The treatment's exposures when that step began, of those since `since`.
    pub step_exposures: u64,
    /// Measurements that failed, by metric.
    pub failures: BTreeMap<String, u32>,
    /// Measurements in a row that were inconclusive, by metric.
    pub inconclusive: BTreeMap<String, u32>,
    /// A person is waited for.
    pub awaiting: bool,
    /// The person has approved what was waited for.
    pub approved: bool,
    /// Where the promotion led the alias that the public name is.
    #[serde(default)]
    pub alias: Option<AliasMove>,
}

/// How a promotion moves an alias, so that it can be led back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AliasMove {
    /// The adapter that it led to.
    pub from: Uuid,
    /// Since when it did.
    pub since: i64,
    /// The adapter that it leads to from the promotion on.
    pub to: Uuid,
}

/// Whether a rollout runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Status {
    /// Weights may rise.
    Running,
    /// Weights stay as they are; guardrails are watched.
    Paused {
        /// Why.
        reason: PauseReason,
    },
    /// Over: the arm has the traffic.
    Promoted {
        /// Which arm.
        arm: usize,
    },
    /// Over: the control has the traffic.
    RolledBack,
    /// Over: a shadow has shown what it should, and nothing moves.
    Completed,
}

/// Why a rollout is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// A person wanted it; a person resumes.
    Person,
    /// Data are missing or unclear; it goes on by itself when they no longer are.
    Inconclusive,
    /// The arms did not get their shares; a person resumes when the cause is found.
    SampleRatio,
    /// Nothing was decided in time; a person decides.
    Deadline,
}

impl Status {
    /// Whether nothing can change any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Promoted { .. } | Self::RolledBack | Self::Completed)
    }
}

/// What was measured. The tests take observations for independent, and those of one unit are not: where units keep their arm, a unit
/// that answered often is one observation, such as its mean.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Units that each arm has answered since [`State::since`].
    pub exposures: Vec<u64>,
    /// Those of which the shares of the arms can be told: began before every answer that is under way, and of a bandit since
    /// [`State::changed`].
    pub ended: Vec<u64>,
    /// By a metric's name, each arm's measure since [`State::since`]; None where its source gave nothing.
    pub metrics: BTreeMap<String, Vec<Option<Measure>>>,
    /// What the name serves has changed since the rollout began, so that it is not what the treatment is compared with.
    pub displaced: bool,
}

/// What a person wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "act")]
pub enum Act {
    /// Leave the weights as they are.
    Pause,
    /// Go on.
    Resume,
    /// Yes to what is waited for.
    Approve,
    /// Give an arm the traffic, whatever the numbers say.
    Promote {
        /// Which arm.
        arm: usize,
    },
    /// Give the control the traffic, now; of a promotion, give it back to what was served before.
    RollBack,
}

/// Why an act is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActError {
    /// Nothing changes any more.
    #[error("the rollout is over; start a new one")]
    Over,
    /// There is nothing to go on from.
    #[error("the rollout is not paused; `status` says what it waits for")]
    NotPaused,
    /// It stands already.
    #[error("the rollout is paused already; `resume` lets it go on")]
    Paused,
    /// Nobody asked.
    #[error("nothing waits for approval; `status` says what it waits for")]
    NothingToApprove,
    /// No such arm, or the control.
    #[error("arm {0} cannot be promoted; name one of the treatments")]
    NoSuchArm(usize),
    /// A shadow's answers were seen by nobody.
    #[error("a shadow cannot be promoted; start a canary")]
    Shadow,
    /// It needs a key.
    #[error(
        "this rollout is under four eyes: to approve, to promote and to take a promotion back need an API key, and another one than started it"
    )]
    NoKey,
    /// It needs another key.
    #[error(
        "this rollout is under four eyes: the key that started it may neither approve nor promote it, nor take its promotion back; ask the holder of another one"
    )]
    SameKey,
}

/// A row: what was decided, when, and on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Microseconds since 1970.
    pub at: i64,
    /// What was done.
    pub action: Action,
    /// Why, for people.
    pub reason: String,
    /// Who wanted it; None for the rollout itself.
    pub by: Option<String>,
    /// The canary's step afterwards.
    pub step: usize,
    /// Share of the units that take part afterwards.
    pub coverage: f64,
    /// Shares of the arms afterwards.
    pub weights: Vec<f64>,
    /// Units that each arm had answered.
    pub exposures: Vec<u64>,
    /// Whether they fit the arms' shares.
    pub sample_ratio: Option<SampleRatio>,
    /// What each metric said of each treatment.
    pub judgements: Vec<Judgement>,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Action {
    /// It began.
    Start,
    /// Nothing: it waits.
    Hold,
    /// A step is done.
    Step,
    /// A bandit's shares follow what was learnt.
    Reallocate,
    /// Weights stay until the reason is gone.
    Pause {
        /// Why.
        reason: PauseReason,
    },
    /// It goes on.
    Resume,
    /// A person is waited for.
    AwaitApproval,
    /// The person said yes.
    Approve,
    /// An arm has the traffic.
    Promote {
        /// Which arm.
        arm: usize,
    },
    /// The control has the traffic.
    RollBack,
    /// A shadow has shown what it should.
    Complete,
}
