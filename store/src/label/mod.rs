//! Queues of answer pairs that people compare: tasks, leases, verdicts.
//!
//! [`Labels`] is the SQL, [`Queue`], [`Task`] and [`Assignment`] its rows. Times are microseconds since 1970 and come in as
//! arguments.
//!
//! Invariants, on both databases and with any number of gateways: one person at a time holds a task's lease; nobody judges a task
//! twice; a task gets exactly `overlap` verdicts from its queue, and then no lease; a verdict and its feedback row are one
//! transaction. Gold tasks, whose right verdict is known, are for everyone once and never done.

mod assignment;
mod draft;
mod error;
mod external;
mod feedback_row;
mod judgement;
mod lease;
mod queue;
mod task;
mod verdict;

pub(crate) use assignment::forget_annotator;
pub use assignment::{Assignment, State, a_is_left};
pub use draft::{Draft, NewDraft};
pub use error::LabelError;
pub use external::{Applied, External, Outcome, Refused};
pub use judgement::{Judgement, Progress};
pub use lease::{Lease, gold_turn};
pub use queue::{NewQueue, Queue};
pub use task::{NewTask, Task, TaskState};
pub use verdict::{Undone, Verdict};

use crate::database::Database;

/// The labeling tables of a database. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Labels {
    database: Database,
}

impl Labels {
    /// Over `database`, whose tables are there.
    pub fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }
}
