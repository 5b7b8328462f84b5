//! A few lines of shell in the place of the program that trains, for tests of what starts and stops it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A program of this text in `folder`. Another process writes it: one that this process had open for writing could not be run while
/// some other test forks.
pub(super) fn program(folder: &Path, script: &str) -> PathBuf {
    let path = folder.join("program");
    let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
    let status = Command::new("/bin/sh").args(["-c", write, "sh", script]).arg(&path).status();
    assert!(status.is_ok_and(|status| status.success()));
    path
}
