//! What a pulled model is and where it came from.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data_dir::write_atomically;
use crate::error::StoreError;

const FILE_NAME: &str = "tidemill-model.json";

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// Path inside the model's folder.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// Lower-case hexadecimal SHA-256 of the contents.
    pub sha256: String,
}

/// Written last, when every file of a pull is there and its checksum is right: a folder without it is an unfinished pull.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    /// The name that `--model` takes.
    pub name: String,
    /// Where it was fetched from, with its version or commit.
    pub source: String,
    /// The branch, tag or commit that was asked for; empty where there is no choice.
    #[serde(default)]
    pub revision: String,
    /// What `--model` opens, relative to the folder; empty when it is the folder itself.
    pub entry: String,
    /// All files.
    pub files: Vec<ModelFile>,
}

impl ModelRecord {
    /// Reads the record of a folder; `None` when the folder has none.
    pub fn read(folder: &Path) -> Result<Option<Self>, StoreError> {
        let path = folder.join(FILE_NAME);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(StoreError::io("cannot read", &path, error)),
        };
        serde_json::from_str(&text).map(Some).map_err(|error| StoreError::Corrupt { path, reason: error.to_string() })
    }

    /// Writes the record into its folder.
    pub fn write(&self, folder: &Path) -> Result<(), StoreError> {
        let path = folder.join(FILE_NAME);
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| StoreError::Corrupt { path: path.clone(), reason: error.to_string() })?;
        write_atomically(&path, text.as_bytes())
    }

    /// What to open.
    pub fn entry_path(&self, folder: &Path) -> PathBuf {
        if self.entry.is_empty() { folder.to_owned() } else { folder.join(&self.entry) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ModelRecord {
        ModelRecord {
            name: "m".into(),
            source: "test".into(),
            revision: String::new(),
            entry: "a.gguf".into(),
            files: vec![ModelFile { path: "a.gguf".into(), bytes: 3, sha256: "ab".into() }],
        }
    }

    #[test]
    fn a_record_is_read_back_as_written() {
        let temp = tempfile::tempdir().unwrap();
        assert_eq!(ModelRecord::read(temp.path()).unwrap(), None);
        record().write(temp.path()).unwrap();
        assert_eq!(ModelRecord::read(temp.path()).unwrap(), Some(record()));
        assert_eq!(record().entry_path(temp.path()), temp.path().join("a.gguf"));
    }

    #[test]
    fn a_damaged_record_names_its_file() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join(FILE_NAME), "{\"name\": 3}").unwrap();
        let error = ModelRecord::read(temp.path()).unwrap_err().to_string();
        assert!(error.contains(FILE_NAME) && error.contains("tidemill pull"), "{error}");
    }
}
