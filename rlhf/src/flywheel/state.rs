//! Where a loop stands, what can be seen of its work, and what follows.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::key::Key;
use super::policy::{Counts, Policy};
use crate::evaluate::GateReport;
use crate::quality::Check;

/// A loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flywheel {
    /// Number of the cycle under way or of the last one; 0 before the first.
    pub cycle: u64,
    /// Feedback from here on is new, in microseconds since 1970.
    pub counted_from: i64,
    /// Nothing is begun and nothing is taken on; what runs goes on by itself.
    pub paused: bool,
    /// Who wants a cycle now, whatever there is.
    pub asked: Option<String>,
    /// Where it stands.
    pub state: State,
}

/// A cycle under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cycle {
    /// When it began, in microseconds since 1970.
    pub started: i64,
    /// The policy that it began with: what is decided later is for the next.
    pub policy: Policy,
    /// How often the act of this state has failed.
    pub attempts: u32,
}

/// Where a loop stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum State {
    /// For feedback.
    Waiting {
        /// Since when, in microseconds since 1970.
        since: i64,
    },
    /// Feedback becomes a snapshot.
    Snapshot {
        /// The cycle.
        cycle: Box<Cycle>,
    },
    /// Its report is looked at.
    Quality {
        /// The cycle.
        cycle: Box<Cycle>,
        /// `NAME@VERSION`.
        dataset: String,
    },
    /// An adapter learns from it.
    Training {
        /// The cycle.
        cycle: Box<Cycle>,
        /// `NAME@VERSION`.
        dataset: String,
    },
    /// The adapter is measured.
    Evaluation {
        /// The cycle.
        cycle: Box<Cycle>,
        /// `NAME@VERSION`.
        dataset: String,
        /// `NAME@GENERATION`.
        adapter: String,
    },
    /// A part of the traffic is the adapter's.
    Canary {
        /// The cycle.
        cycle: Box<Cycle>,
        /// `NAME@GENERATION`.
        adapter: String,
    },
    /// The traffic is the adapter's; what the cycle needed is cleared away.
    Promoted {
        /// The cycle.
        cycle: Box<Cycle>,
        /// `NAME@GENERATION`.
        adapter: String,
    },
    /// A gate was shut or an act failed; what the cycle needed is cleared away.
    Refused {
        /// The cycle.
        cycle: Box<Cycle>,
    },
    /// The rollout gave the traffic back; what the cycle needed is cleared away.
    RolledBack {
        /// The cycle.
        cycle: Box<Cycle>,
    },
}

/// A state's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// [`State::Waiting`]
    Waiting,
    /// [`State::Snapshot`]
    Snapshot,
    /// [`State::Quality`]
    Quality,
    /// [`State::Training`]
    Training,
    /// [`State::Evaluation`]
    Evaluation,
    /// [`State::Canary`]
    Canary,
    /// [`State::Promoted`]
    Promoted,
    /// [`State::Refused`]
    Refused,
    /// [`State::RolledBack`]
    RolledBack,
}

/// What is seen of the work of a state.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// New feedback.
    Feedback(Counts),
    /// Nobody has begun what is to be done, or nobody goes on with it.
    Nothing,
    /// It is being done.
    Underway,
    /// The snapshot is there.
    Snapshot {
        /// `NAME@VERSION`.
        dataset: String,
        /// Its counts.
        numbers: Value,
    },
    /// What its report says, and of whom it must not be trained on any more.
    Report {
        /// All checks.
        checks: Vec<Check>,
        /// A person behind it was erased.
        tainted: bool,
    },
    /// The adapter is registered.
    Adapter {
        /// `NAME@GENERATION`.
        adapter: String,
        /// How it was trained.
        numbers: Value,
    },
    /// What the gates said.
    Gates(GateReport),
    /// The rollout gave the adapter the traffic.
    Promoted {
        /// What it said.
        why: String,
        /// What it stood on.
        numbers: Value,
    },
    /// The rollout ended otherwise.
    RolledBack {
        /// What it said.
        why: String,
        /// What it stood on.
        numbers: Value,
    },
    /// What the cycle needed is cleared away.
    Cleared,
    /// It went wrong.
    Failed {
        /// How.
        why: String,
        /// What would change it.
        change: String,
        /// Trying again cannot help.
        lasting: bool,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Act {
    /// Makes it the same when it is done again.
    pub key: Key,
    /// What.
    pub work: Work,
}

/// What is to be done, in a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Build the snapshot.
    Snapshot,
    /// Train on it.
    Training {
        /// `NAME@VERSION`.
        dataset: String,
    },
    /// Measure the adapter on its held-out rows.
    Evaluation {
        /// `NAME@VERSION`.
        dataset: String,
        /// `NAME@GENERATION`.
        adapter: String,
    },
    /// Serve it and start the rollout.
    Canary {
        /// `NAME@GENERATION`.
        adapter: String,
    },
    /// Clear away what the cycle needed.
    Clear,
}

/// A state that was entered: when, why, and the numbers it stood on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Microseconds since 1970.
    pub at: i64,
    /// The cycle.
    pub cycle: u64,
    /// The state that was entered, or that goes on.
    pub state: Word,
    /// What happened: the state's word, or `paused`, `resumed`, `asked`, `failed`.
    pub action: String,
    /// Why, for people.
    pub why: String,
    /// What stood in the way, and what would change it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
    /// The numbers.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub numbers: Value,
}

/// What stood in the way, and what would change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The check or gate, or the state whose act failed.
    pub of: String,
    /// What was found.
    pub found: String,
    /// What would change it.
    pub change: String,
}

/// What follows from what was seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Where it stands from now on, and why.
    pub next: Option<(Flywheel, Note)>,
    /// What is to be done.
    pub act: Option<Act>,
}

/// What a person wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// A cycle now, whatever there is.
    Run,
    /// To begin nothing more.
    Pause,
    /// To go on.
    Resume,
}

/// Why a wish is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WishError {
    /// One cycle at a time.
    #[error("cycle {0} is under way; wait until it has ended, `tidemill loop status` shows how far it is")]
    Underway(u64),
    /// Nothing begins.
    #[error("the loop is paused; resume it first")]
    Paused,
}

impl Word {
    /// All of them, in the order of a cycle.
    pub const ALL: [Self; 9] = [
        Self::Waiting,
        Self::Snapshot,
        Self::Quality,
        Self::Training,
        Self::Evaluation,
        Self::Canary,
        Self::Promoted,
        Self::Refused,
        Self::RolledBack,
    ];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Snapshot => "snapshot",
            Self::Quality => "quality",
            Self::Training => "training",
            Self::Evaluation => "evaluation",
            Self::Canary => "canary",
            Self::Promoted => "promoted",
            Self::Refused => "refused",
            Self::RolledBack => "rolled_back",
        }
    }

    /// Whether a cycle has ended so.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Promoted | Self::Refused | Self::RolledBack)
    }
}

/// Every state that has a cycle, which it names.
macro_rules! at_work {
    ($cycle:ident) => {
        Self::Snapshot { $cycle }
            | Self::Quality { $cycle, .. }
            | Self::Training { $cycle, .. }
            | Self::Evaluation { $cycle, .. }
            | Self::Canary { $cycle, .. }
            | Self::Promoted { $cycle, .. }
            | Self::Refused { $cycle }
            | Self::RolledBack { $cycle }
    };
}

impl State {
    /// Its word.
    pub fn word(&self) -> Word {
        match self {
            Self::Waiting { .. } => Word::Waiting,
            Self::Snapshot { .. } => Word::Snapshot,
            Self::Quality { .. } => Word::Quality,
            Self::Training { .. } => Word::Training,
            Self::Evaluation { .. } => Word::Evaluation,
            Self::Canary { .. } => Word::Canary,
            Self::Promoted { .. } => Word::Promoted,
            Self::Refused { .. } => Word::Refused,
            Self::RolledBack { .. } => Word::RolledBack,
        }
    }

    /// The cycle, where one is under way.
    pub fn cycle(&self) -> Option<&Cycle> {
        match self {
            Self::Waiting { .. } => None,
            at_work!(cycle) => Some(cycle),
        }
    }

    /// The same, to change it.
    pub(super) fn cycle_mut(&mut self) -> Option<&mut Cycle> {
        match self {
            Self::Waiting { .. } => None,
            at_work!(cycle) => Some(cycle),
        }
    }

    /// The adapter that the state is about.
    pub fn adapter(&self) -> Option<&str> {
        match self {
            Self::Evaluation { adapter, .. } | Self::Canary { adapter, .. } | Self::Promoted { adapter, .. } => Some(adapter),
            _ => None,
        }
    }
}

impl Flywheel {
    /// A loop that has never begun, from `now` on, in microseconds since 1970. Feedback that is there already is new to it.
    pub fn new(now: i64) -> Self {
        Self { cycle: 0, counted_from: 0, paused: false, asked: None, state: State::Waiting { since: now } }
    }

    /// The key of this state's act.
    pub fn key(&self, name: &str) -> Key {
        Key { name: name.to_owned(), cycle: self.cycle, state: self.state.word() }
    }
}
