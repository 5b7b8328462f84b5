//! What Tidemill keeps on disk.
//!
//! [`DataDir`] is the one directory that a server owns: it is locked while a server runs, so that two never share it. [`ModelRecord`]
//! says which model a folder under `models/` holds, where it came from, and the checksum of every file.
//!
//! Invariant: a record is either whole or absent. Files are written beside their place, flushed, and renamed into it.

mod data_dir;
mod error;
mod model_record;

pub use data_dir::{DataDir, DataDirLock};
pub use error::StoreError;
pub use model_record::{ModelFile, ModelRecord};
