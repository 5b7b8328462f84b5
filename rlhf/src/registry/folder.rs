//! The folders of registered adapters.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tidemill_engine::{Adapter, ModelConfig};

use super::RegistryError;
use crate::durable::sync_folder;

/// An adapter whose files are in their place.
pub(super) struct Kept {
    pub adapter: Adapter,
    /// Within the data directory.
    pub location: String,
}

/// Copies the files of `source` to a folder of `root` that is named by what they hold, and waits until they are on the disk. What is
/// checked is the copy. `config`: the model that they must fit.
pub(super) fn keep(source: &Path, root: &Path, config: Option<&ModelConfig>) -> Result<Kept, RegistryError> {
    // Its own error for a folder that holds no adapter, before anything is copied.
    Adapter::read(source)?;
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let beside = root.join(format!(".{}-{}.part", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let kept = at(root, fs::create_dir_all(root)).and_then(|()| keep_beside(source, root, &beside, config));
    // Gone when it was renamed; what a crash leaves begins with a dot and is in nobody's way.
    fs::remove_dir_all(&beside).ok();
    kept
}

fn keep_beside(source: &Path, root: &Path, beside: &Path, config: Option<&ModelConfig>) -> Result<Kept, RegistryError> {
    copy(source, beside)?;
    let adapter = Adapter::read(beside)?;
    if let Some(config) = config {
        adapter.check(config)?;
    }
    let generation = adapter.generation();
    let place = root.join(generation.to_string());
    let intact = |folder: &Path| Adapter::read(folder).is_ok_and(|there| there.digest() == adapter.digest());
    if !intact(&place) {
        if place.exists() {
            // Damaged since it was registered: the same contents take its place.
            let aside = beside.with_extension("damaged");
            at(&place, fs::rename(&place, &aside))?;
            fs::remove_dir_all(&aside).ok();
        }
        // Another registration of the same contents may have been faster.
        if let Err(error) = fs::rename(beside, &place)
            && !intact(&place)
        {
            return Err(RegistryError::Folder { path: place, source: error });
        }
        at(root, sync_folder(root))?;
    }
    Ok(Kept { adapter, location: format!("adapters/{generation}") })
}

/// Where the folder of an adapter goes before it is removed.
fn aside(place: &Path) -> PathBuf {
    place.with_file_name(format!(".{}.removed", place.file_name().unwrap_or_default().to_string_lossy()))
}

/// Takes a folder out of its place in one step; `false` when there is none.
pub(super) fn set_aside(place: &Path) -> io::Result<bool> {
    let aside = aside(place);
    absent_is_fine(fs::remove_dir_all(&aside))?;
    let was_there = absent_is_fine(fs::rename(place, &aside))?;
    if was_there {
        sync_folder(place.parent().unwrap_or(Path::new(".")))?;
    }
    Ok(was_there)
}

/// Puts back what was [set aside](set_aside).
pub(super) fn put_back(place: &Path) -> io::Result<()> {
    fs::rename(aside(place), place)
}

/// Removes what was [set aside](set_aside).
pub(super) fn remove_aside(place: &Path) -> Result<(), RegistryError> {
    let aside = aside(place);
    at(&aside, absent_is_fine(fs::remove_dir_all(&aside)).map(drop))
}

/// `false` for what is not there.
fn absent_is_fine(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        done => done.map(|()| true),
    }
}

/// Copies a folder to a new one, whole or not at all.
pub(super) fn export(source: &Path, to: &Path) -> Result<(), RegistryError> {
    if to.exists() {
        return Err(RegistryError::Exists(to.to_owned()));
    }
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let parent = to.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
    let beside = parent.join(format!(".{name}.{}.part", std::process::id()));
    at(parent, fs::create_dir_all(parent))?;
    let copied =
        copy(source, &beside).and_then(|()| at(to, fs::rename(&beside, to))).and_then(|()| at(parent, sync_folder(parent)));
    fs::remove_dir_all(&beside).ok();
    copied
}

/// Copies the files of a folder into a new one and waits until they are on the disk.
fn copy(source: &Path, to: &Path) -> Result<(), RegistryError> {
    if to.exists() {
        at(to, fs::remove_dir_all(to))?;
    }
    at(to, fs::create_dir(to))?;
    for entry in at(source, fs::read_dir(source))? {
        let path = at(source, entry)?.path();
        let Some(name) = path.file_name().filter(|_| path.is_file()) else { continue };
        let to = to.join(name);
        at(&path, fs::copy(&path, &to))?;
        at(&to, File::open(&to).and_then(|file| file.sync_all()))?;
    }
    at(to, sync_folder(to))
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, RegistryError> {
    result.map_err(|source| RegistryError::Folder { path: PathBuf::from(path), source })
}
