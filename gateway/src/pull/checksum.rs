//! Digests of files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::error::PullError;

fn feed(path: &Path, mut update: impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => update(&buffer[..read]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lower-case hexadecimal SHA-256.
pub fn sha256(path: &Path) -> Result<String, PullError> {
    let mut digest = Sha256::new();
    feed(path, |bytes| digest.update(bytes)).map_err(|source| PullError::Io { path: path.to_owned(), source })?;
    Ok(hex(&digest.finalize()))
}

/// The id git gives the contents: SHA-1 over `blob <length>\0` and the bytes.
fn git_blob(path: &Path) -> Result<String, PullError> {
    let io = |source| PullError::Io { path: path.to_owned(), source };
    let mut digest = Sha1::new();
    digest.update(format!("blob {}\0", std::fs::metadata(path).map_err(io)?.len()).as_bytes());
    feed(path, |bytes| digest.update(bytes)).map_err(io)?;
    Ok(hex(&digest.finalize()))
}

/// Compares a file with what was promised; a file that differs is removed, so that the next pull starts it afresh.
/// 64 hexadecimal digits are a SHA-256, 40 a git blob id (how the hub names small files).
pub fn verify(path: &Path, what: &str, expected: &str) -> Result<(), PullError> {
    let found = match expected.len() {
        64 => sha256(path)?,
        40 => git_blob(path)?,
        _ => return Err(PullError::Hub(format!("{what}: the hub gave no checksum ('{expected}')"))),
    };
    if found == expected.to_ascii_lowercase() {
        return Ok(());
    }
    std::fs::remove_file(path).map_err(|source| PullError::Io { path: path.to_owned(), source })?;
    Err(PullError::Checksum { what: what.to_owned(), found, expected: expected.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_agree_with_sha256sum_and_git_hash_object() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("hello");
        std::fs::write(&path, "hello\n").unwrap();
        verify(&path, "hello", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03").unwrap();
        verify(&path, "hello", "ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
    }

    #[test]
    fn a_wrong_file_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("bad");
        std::fs::write(&path, "other").unwrap();
        assert!(matches!(verify(&path, "bad", &"0".repeat(64)), Err(PullError::Checksum { .. })));
        assert!(!path.exists());
    }
}
