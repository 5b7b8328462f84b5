//! Datasets: rows of training examples, each with the feedback and the people behind it.
//!
//! [`build`] turns feedback into rows, as a function of values. [`format`] reads and writes a row as a line of JSON, [`import`] reads
//! whole files. [`table`] keeps snapshots as versions of a Delta Lake table, and [`snapshot`] ties it together: a snapshot exists
//! once its row is in the store, and never changes.

pub mod answer;
pub mod build;
pub mod control;
mod counts;
mod error;
pub mod format;
pub mod gather;
pub mod import;
mod lineage;
mod metrics;
pub mod query;
pub mod row;
pub mod snapshot;
pub mod stored;
pub mod table;
mod votes;
pub mod watch;

pub use build::{Built, build};
pub use counts::{Counts, LeftOut};
pub use error::DatasetError;
pub use query::Query;
pub use row::{Example, Message, Origin, Position, Row};
pub use snapshot::Datasets;
pub use stored::StoredRow;
pub use watch::{Progress, Stage, Watch};
