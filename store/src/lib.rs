//! What Tidemill keeps on disk.
//!
//! [`DataDir`] is the one directory that a server owns: it is locked while a server runs, so that two never share it. [`ModelRecord`]
//! says which model a folder under `models/` holds, where it came from, and the checksum of every file. [`Files`] are what clients
//! upload and batches make. [`Database`] is SQLite or
//! Postgres behind one set of statements; [`records`] are its rows. [`Store`] is all of it for a server: answers leave the request
//! path through a bounded queue, feedback is acknowledged when it is on the disk, and both outlive a database that goes away.
//!
//! Invariant: a record is either whole or absent. Files are written beside their place, flushed, and renamed into it; rows are
//! written in transactions that are on the disk before they are acknowledged.

pub mod adapters;
mod audit;
mod base_scores;
mod batches;
mod commit;
mod comparisons;
mod data_dir;
mod database;
pub mod erasure;
mod error;
mod exposures;
mod files;
mod fine_tuning;
mod ids;
mod inferences;
mod job;
mod journal;
mod judged;
mod judgements;
mod key_terms;
mod keys;
pub mod label;
mod leadership;
mod loops;
mod model_record;
mod page;
mod patience;
mod recorder;
pub mod records;
mod responses;
pub mod retention;
mod rollout_readers;
mod rollouts;
mod snapshot;
mod statement;
mod store;
mod stored_chats;
mod tally;
mod traffic;
mod usage;

pub use adapters::{
    AdapterFilter, AdapterOrigin, AdapterRefusal, AdapterState, Adapters, Alias, RegisteredAdapter, ServedAdapter,
};
pub use audit::{Act, Actor, Audit, AuditEntry, AuditFilter};
pub use base_scores::{BaseScore, BaseScores, Unscored};
pub use batches::{Batch, BatchDraft, BatchOutcome, BatchProgress, BatchState, Batches};
pub use comparisons::{Candidate, Comparison, Comparisons};
pub use data_dir::{DataDir, DataDirLock, write_atomically};
pub use database::{Database, Dialect};
pub use erasure::Erasure;
pub use error::{Full, StoreError};
pub use exposures::{ArmCounts, Each, Exposures, FirstTokens, UnitSums, UnitValue};
pub use files::{FileDraft, FileRecord, Files, Incoming, Viewer};
pub use fine_tuning::{
    FineTuningCheckpoint, FineTuningDraft, FineTuningEvent, FineTuningJob, FineTuningState, FineTunings, Heard, Made, News,
};
pub use inferences::{AnswerSpan, InferenceFilter};
pub use job::{Job, JobState, Jobs};
pub use judged::{JudgedAnswer, JudgedTask, judged_answers, judged_tasks};
pub use judgements::{Acknowledged, FeedbackChange, FeedbackFilter};
pub use key_terms::{KeyTerms, Limits, MAX_WEIGHT, Money, Tier};
pub use keys::{ApiKey, Scope};
pub use leadership::Leadership;
pub use loops::{LoopChange, LoopRefusal, LoopRow, LoopStep, Loops};
pub use model_record::{ModelFile, ModelRecord};
pub use page::{MAX_PAGE, Order, Page};
pub use responses::{Chain, MAX_CHAIN, MAX_CHAIN_BYTES, ResponseStatus, StoredResponse};
pub use rollout_readers::{Readers, RolloutReader};
pub use rollouts::{Rollout, RolloutChange, RolloutDecision, RolloutFilter, RolloutRefusal, Rollouts};
pub use snapshot::{Snapshot, Snapshots, Sources};
pub use store::{Retention, Store, StoreOptions};
pub use stored_chats::{ChatFilter, StoredChat};
pub use tally::{Tally, TallyFilter};
pub use traffic::{Latency, Traffic, TrafficSum};
pub use usage::{Usage, UsageWriter};
