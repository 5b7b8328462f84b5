//! The machine code of kernel files, compiled when it is first needed and kept on disk.

use std::path::{Path, PathBuf};

use super::compile::{OPTIONS, compile, text};
use super::device::Source;
use super::libraries::{Library, check_compiler, compiler_version};
use crate::error::KernelError;

/// Where a card's machine code comes from.
pub trait Images {
    /// That of each of these files, in their order. `driver`: the version that must take it.
    fn all(&self, sources: &[Source], architecture: &str, driver: i32) -> Vec<Result<Vec<u8>, KernelError>>;
    /// That of a file whose code the driver refuses, made anew; `None` when it was new.
    fn anew(&self, source: Source, architecture: &str, driver: i32) -> Option<Result<Vec<u8>, KernelError>>;
}

/// From NVRTC, kept in a folder where there is one.
pub struct Compiled<'a> {
    /// The folder.
    pub cache: Option<&'a Path>,
}

impl Images for Compiled<'_> {
    fn all(&self, sources: &[Source], architecture: &str, driver: i32) -> Vec<Result<Vec<u8>, KernelError>> {
        images(sources, architecture, self.cache, Some(driver))
    }

    fn anew(&self, source: Source, architecture: &str, driver: i32) -> Option<Result<Vec<u8>, KernelError>> {
        let folder = self.cache?;
        // What was kept may be from another compiler than the driver wants.
        let _ = std::fs::remove_file(kept_at(folder, source, architecture));
        Some(image_of(source, architecture, Some(folder), Some(driver)))
    }
}

/// Compiles all kernel files for an architecture (`sm_90a`) into `cache`, for a machine that has a driver and no NVRTC.
pub fn prepare(architecture: &str, cache: &Path) -> Result<(), KernelError> {
    let sources: Vec<Source> = Source::ALL.into_iter().filter(|source| source.is_for(architecture)).collect();
    images(&sources, architecture, Some(cache), None).into_iter().collect::<Result<Vec<_>, _>>()?;
    match sources.into_iter().map(|source| kept_at(cache, source, architecture)).find(|path| !path.is_file()) {
        Some(path) => Err(KernelError::Device(format!("{} could not be written; choose a folder that can be", path.display()))),
        None => Ok(()),
    }
}

/// The machine code of a file, from the cache or the compiler.
fn image_of(source: Source, architecture: &str, cache: Option<&Path>, driver: Option<i32>) -> Result<Vec<u8>, KernelError> {
    let kept = cache.map(|folder| kept_at(folder, source, architecture));
    if let Some(found) = kept.as_deref().and_then(read_kept) {
        return Ok(found);
    }
    Library::Nvrtc.require()?;
    check_compiler(compiler_version()?, driver)?;
    let compiled = compile(source, architecture, false)?;
    if let Some(path) = kept {
        keep(&path, &compiled.cubin);
    }
    Ok(compiled.cubin)
}

/// That of several files, each compiled by a thread of its own. `driver`: the version that must take it, where there is one.
fn images(
    sources: &[Source],
    architecture: &str,
    cache: Option<&Path>,
    driver: Option<i32>,
) -> Vec<Result<Vec<u8>, KernelError>> {
    std::thread::scope(|scope| {
        let compile = |source: &Source| {
            let source = *source;
            scope.spawn(move || image_of(source, architecture, cache, driver))
        };
        let workers: Vec<_> = sources.iter().map(compile).collect();
        let failed = |_| Err(KernelError::Device("a compiling thread failed".into()));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(failed)).collect()
    })
}

fn kept_at(folder: &Path, source: Source, architecture: &str) -> PathBuf {
    let hash = blake3::hash([OPTIONS, &text(source)].concat().as_bytes()).to_hex();
    folder.join(format!("{}-{architecture}-{}.cubin", source.name(), &hash[..32]))
}

/// Keeps an image behind its hash. A folder that cannot be written costs the next start a few seconds and nothing else.
pub(super) fn keep(path: &Path, image: &[u8]) {
    let unique = path.with_extension(format!("{}.tmp", std::process::id()));
    let content = [blake3::hash(image).as_bytes(), image].concat();
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&unique, content));
    if written.and_then(|()| std::fs::rename(&unique, path)).is_err() {
        // What is left of it is of no use.
        let _ = std::fs::remove_file(&unique);
    }
}

/// An image that was kept; `None` when there is none, or when its bytes are not those that were kept.
pub(super) fn read_kept(path: &Path) -> Option<Vec<u8>> {
    let content = std::fs::read(path).ok()?;
    let (hash, image) = content.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(image).as_bytes() == hash).then(|| image.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_image_is_used_only_as_it_was_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = kept_at(&folder.path().join("not there yet"), Source::Rows, "sm_80");
        assert_eq!(read_kept(&path), None);
        keep(&path, b"machine code");
        assert_eq!(read_kept(&path).as_deref(), Some(&b"machine code"[..]));
        assert_ne!(path, kept_at(path.parent().unwrap(), Source::Rows, "sm_90a"));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.pop();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_kept(&path), None);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(read_kept(&path), None);
        // No temporary file stays.
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
