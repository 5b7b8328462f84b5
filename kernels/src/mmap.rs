//! A file mapped for reading, behind a safe interface.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// A whole file, read-only. The pages belong to the page cache; nothing is copied.
///
/// The mapping is private. A file that another process *truncates* while it is mapped makes later reads of the lost pages raise
/// SIGBUS, as with every mapped file; model files are written once and renamed into place, never edited.
pub struct Mmap {
    #[cfg(unix)]
    ptr: *const u8,
    #[cfg(unix)]
    len: usize,
    #[cfg(not(unix))]
    bytes: Vec<u8>,
}

// SAFETY: the mapping is read-only and lives as long as the value.
unsafe impl Send for Mmap {}
// SAFETY: as above.
unsafe impl Sync for Mmap {}

impl Mmap {
    /// Maps the file. An empty file gives an empty slice.
    #[cfg(unix)]
    pub fn open(path: impl AsRef<Path>) -> std::io::Result<Mmap> {
        use std::os::fd::AsRawFd;
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(|_| std::io::Error::from(std::io::ErrorKind::FileTooLarge))?;
        if len == 0 {
            return Ok(Mmap { ptr: std::ptr::NonNull::<u8>::dangling().as_ptr(), len: 0 });
        }
        // SAFETY: a fresh read-only private mapping of an open file; the descriptor may close afterwards.
        let ptr = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        if ptr == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Mmap { ptr: ptr.cast(), len })
    }

    /// Reads the file: this target has no mapping.
    #[cfg(not(unix))]
    pub fn open(path: impl AsRef<Path>) -> std::io::Result<Mmap> {
        use std::io::Read;
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        Ok(Mmap { bytes })
    }

    /// The file will be read once from start to end soon: read ahead.
    pub fn advise_sequential(&self) {
        #[cfg(unix)]
        self.advise(libc::MADV_SEQUENTIAL);
    }

    /// The file will be needed soon: start reading it into the page cache.
    pub fn advise_will_need(&self) {
        #[cfg(unix)]
        self.advise(libc::MADV_WILLNEED);
    }

    /// The pages are not needed by this process now; they leave its resident memory and come back from the file when touched.
    pub fn advise_done(&self) {
        #[cfg(unix)]
        self.advise(libc::MADV_DONTNEED);
    }

    #[cfg(unix)]
    fn advise(&self, advice: libc::c_int) {
        if self.len > 0 {
            // SAFETY: the range is our own mapping; on a read-only file mapping none of these advices changes what is read.
            unsafe { libc::madvise(self.ptr.cast_mut().cast(), self.len, advice) };
        }
    }
}

#[cfg(unix)]
impl Drop for Mmap {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: mapped with this length in `open`.
            unsafe { libc::munmap(self.ptr.cast_mut().cast(), self.len) };
        }
    }
}

impl Deref for Mmap {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        #[cfg(unix)]
        // SAFETY: `len` mapped bytes, or none.
        unsafe {
            std::slice::from_raw_parts(self.ptr, self.len)
        }
        #[cfg(not(unix))]
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_reads_back_and_survives_advice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let content: Vec<u8> = (0..100_000u32).map(|i| (i * 31) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let map = Mmap::open(&path).unwrap();
        map.advise_sequential();
        map.advise_will_need();
        assert_eq!(&map[..], &content[..]);
        map.advise_done();
        assert_eq!(&map[..], &content[..]);
    }

    #[test]
    fn an_empty_file_is_an_empty_slice_and_a_missing_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert!(Mmap::open(&path).unwrap().is_empty());
        assert!(Mmap::open(dir.path().join("missing")).is_err());
    }
}
