//! A server's key: from the environment, or from a file that is read again when it changes. It is shown nowhere.

use crate::http::tls::{Version, version};
use crate::upstream::remote::spec::KeySource;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the file is looked at, while requests come.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The variable is not there.
    #[error("the environment has no variable {0}, which should hold the key")]
    Missing(String),
    /// The file cannot be read.
    #[error("cannot read the key in {0}: {1}")]
    Read(String, std::io::Error),
    /// It can be no header.
    #[error("the key in {0} is empty, or holds what cannot be sent in a header")]
    Unusable(String),
}

/// A key.
pub struct Secret {
    source: KeySource,
    state: Mutex<State>,
}

struct State {
    key: Arc<str>,
    version: Version,
    looked: Instant,
}

impl Secret {
    /// Reads it.
    pub fn open(source: KeySource) -> Result<Self, SecretError> {
        let (key, version) = match &source {
            KeySource::Env(name) => (std::env::var(name).map_err(|_| SecretError::Missing(name.clone()))?, None),
            KeySource::File(path) => read(path)?,
        };
        let key = usable(&key, &source)?;
        Ok(Self { source, state: Mutex::new(State { key, version, looked: Instant::now() }) })
    }

    /// The key at this moment. A file that cannot be read any more leaves the old one.
    pub fn current(&self) -> Arc<str> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let KeySource::File(path) = &self.source
            && state.looked.elapsed() >= LOOK_EVERY
        {
            state.looked = Instant::now();
            if version(path) != state.version {
                match read(path).and_then(|(text, version)| Ok((usable(&text, &self.source)?, version))) {
                    Ok((key, version)) => (state.key, state.version) = (key, version),
                    Err(error) => {
                        tracing::error!(%error, "the key of a server could not be read again; the old one stays in use")
                    }
                }
            }
        }
        Arc::clone(&state.key)
    }

    /// The next request looks at the file, however short ago that was: the server has refused the key.
    pub fn doubt(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.looked = state.looked.checked_sub(LOOK_EVERY).unwrap_or(state.looked);
    }
}

/// `text` without any trace of the key: servers like to repeat what they were sent.
pub fn without(text: &str, key: &str) -> String {
    if key.len() < 4 { text.to_owned() } else { text.replace(key, "…") }
}

fn read(path: &Path) -> Result<(String, Version), SecretError> {
    // Before the reading: what is replaced meanwhile is read again next time.
    let version = version(path);
    let text = std::fs::read_to_string(path).map_err(|error| SecretError::Read(path.display().to_string(), error))?;
    Ok((text, version))
}

fn usable(text: &str, source: &KeySource) -> Result<Arc<str>, SecretError> {
    let key = text.trim();
    if key.is_empty() || !key.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(SecretError::Unusable(match source {
            KeySource::Env(name) => name.clone(),
            KeySource::File(path) => path.display().to_string(),
        }));
    }
    Ok(key.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, "first\n").unwrap();
        let secret = Secret::open(KeySource::File(path.clone())).unwrap();
        assert_eq!(&*secret.current(), "first");
        std::fs::write(&path, "the second").unwrap();
        secret.doubt();
        assert_eq!(&*secret.current(), "the second");
        for broken in ["", "two\nlines"] {
            std::fs::write(&path, broken).unwrap();
            secret.doubt();
            assert_eq!(&*secret.current(), "the second");
        }
        std::fs::remove_file(&path).unwrap();
        secret.doubt();
        assert_eq!(&*secret.current(), "the second");
        assert!(Secret::open(KeySource::File(path)).is_err());
    }

    #[test]
    fn a_missing_variable_is_named() {
        let error = Secret::open(KeySource::Env("TIDEMILL_NO_SUCH_KEY".into())).err().unwrap();
        assert!(error.to_string().contains("TIDEMILL_NO_SUCH_KEY"));
    }

    #[test]
    fn a_key_is_taken_out_of_what_a_server_says() {
        assert_eq!(without("wrong key sk-123456!", "sk-123456"), "wrong key …!");
        assert_eq!(without("abc", ""), "abc");
    }
}
