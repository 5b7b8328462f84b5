//! What can go wrong with a queue.

/// Errors of labeling.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// The database is away, slow or broken.
    #[error("the database failed: {0}; see that it runs and has room, and try again")]
    Database(#[source] sqlx::Error),
    /// The same, from the rest of the store.
    #[error(transparent)]
    Store(#[from] crate::StoreError),
    /// Two queues cannot have one name.
    #[error("there is a queue '{0}' already; choose another name")]
    NameTaken(String),
    /// No queue has this id or name.
    #[error("there is no queue '{0}'; GET /v1/labeling/queues lists them")]
    NoQueue(String),
    /// No task has this id.
    #[error("there is no task '{0}'")]
    NoTask(uuid::Uuid),
    /// No assignment of this person has this id.
    #[error("there is no assignment '{0}' of yours; fetch the next task")]
    NoAssignment(uuid::Uuid),
    /// The lease ran out and someone else has the task, or it is done.
    #[error("the lease on this task ran out and someone else has it now; fetch the next task")]
    LeaseLost,
    /// Judged or skipped before, and differently.
    #[error("you have already judged or skipped this task; undo that first")]
    AlreadyJudged,
    /// Nothing of this person can be taken back.
    #[error("there is nothing to undo in this queue")]
    NothingToUndo,
}

impl From<sqlx::Error> for LabelError {
    fn from(error: sqlx::Error) -> Self {
        match crate::StoreError::from(error) {
            crate::StoreError::Database(error) => Self::Database(error),
            other => Self::Store(other),
        }
    }
}

impl LabelError {
    /// A row that does not hold what the schema says.
    pub(super) fn corrupt(what: &str, text: &str) -> Self {
        Self::Database(sqlx::Error::Decode(format!("'{text}' is no {what}").into()))
    }
}
