//! What Tidemill keeps on disk.
//!
//! [`DataDir`] is the one directory that a server owns: it is locked while a server runs, so that two never share it. [`ModelRecord`]
//! says which model a folder under `models/` holds, where it came from, and the checksum of every file. [`Database`] is SQLite or
//! Postgres behind one set of statements; [`records`] are its rows.
//!
//! Invariant: a record is either whole or absent. Files are written beside their place, flushed, and renamed into it; rows are
//! written in transactions that are on the disk before they are acknowledged.

mod data_dir;
mod database;
mod error;
mod model_record;
pub mod records;

pub use data_dir::{DataDir, DataDirLock};
pub use database::{Database, Dialect};
pub use error::StoreError;
pub use model_record::{ModelFile, ModelRecord};
