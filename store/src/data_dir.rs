//! The directory that a server owns.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::StoreError;
use crate::model_record::ModelRecord;

/// `./data` by default. Layout: `models/<name>/` for pulled models, `adapters/<generation>/` for registered adapters, `lock` while a server runs.
#[derive(Clone, Debug)]
pub struct DataDir {
    root: PathBuf,
}

/// Held by a running server; the operating system releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct DataDirLock {
    _file: File,
}

impl DataDir {
    /// Names the directory; nothing is touched yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The database, unless records are kept elsewhere.
    pub fn database(&self) -> PathBuf {
        self.root.join("tidemill.db")
    }

    /// Where pulled models lie.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Where registered adapters lie, each in a folder named by its generation.
    pub fn adapters(&self) -> PathBuf {
        self.root.join("adapters")
    }

    /// The folder of a model: `org/name` becomes `org--name`, as the Hugging Face cache writes it.
    pub fn model_folder(&self, name: &str) -> Result<PathBuf, StoreError> {
        let plain = |part: &str| {
            !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let parts: Vec<&str> = name.split('/').collect();
        if parts.len() > 2 || !parts.iter().all(|part| plain(part)) {
            return Err(StoreError::Name(name.to_owned()));
        }
        Ok(self.models().join(parts.join("--")))
    }

    /// The record of a pulled model, if it is there and complete.
    pub fn find_model(&self, name: &str) -> Result<Option<(PathBuf, ModelRecord)>, StoreError> {
        let folder = self.model_folder(name)?;
        Ok(ModelRecord::read(&folder)?.map(|record| (folder, record)))
    }

    /// All pulled models, by name.
    pub fn list_models(&self) -> Result<Vec<(PathBuf, ModelRecord)>, StoreError> {
        let models = self.models();
        let entries = match fs::read_dir(&models) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::io("cannot list", &models, error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let folder = entry.map_err(|error| StoreError::io("cannot list", &models, error))?.path();
            if let Some(record) = ModelRecord::read(&folder)? {
                found.push((folder, record));
            }
        }
        found.sort_by(|a, b| a.1.name.cmp(&b.1.name));
        Ok(found)
    }

    /// Creates the directory and claims it for this process.
    pub fn lock(&self) -> Result<DataDirLock, StoreError> {
        fs::create_dir_all(&self.root).map_err(|error| StoreError::io("cannot create", &self.root, error))?;
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| StoreError::io("cannot open", &path, error))?;
        match file.try_lock() {
            Ok(()) => Ok(DataDirLock { _file: file }),
            Err(TryLockError::WouldBlock) => Err(StoreError::Locked(self.root.clone())),
            Err(TryLockError::Error(error)) => Err(StoreError::io("cannot lock", &path, error)),
        }
    }
}

/// Writes a file so that after a crash it holds either the old bytes or the new ones.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let beside = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|error| StoreError::io("cannot write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_cannot_take_the_directory_until_the_first_lets_go() {
        let temp = tempfile::tempdir().unwrap();
        let data = DataDir::new(temp.path().join("data"));
        let first = data.lock().unwrap();
        assert!(matches!(data.lock(), Err(StoreError::Locked(_))));
        drop(first);
        data.lock().unwrap();
    }

    #[test]
    fn model_names_stay_inside_the_models_folder() {
        let data = DataDir::new("data");
        assert_eq!(data.model_folder("Qwen/Qwen3-0.6B").unwrap(), Path::new("data/models/Qwen--Qwen3-0.6B"));
        for bad in ["", "..", "../x", "a/b/c", "/etc", "a/../b", "a b", ".hidden", "a/"] {
            assert!(matches!(data.model_folder(bad), Err(StoreError::Name(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_missing_models_folder_lists_nothing() {
        let temp = tempfile::tempdir().unwrap();
        assert!(DataDir::new(temp.path()).list_models().unwrap().is_empty());
    }
}
