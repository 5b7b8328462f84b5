//! One source of settings: the flags, the environment, or a file.

use crate::config::loops::LoopTable;
use crate::config::{ConfigError, KEYS};
use std::path::PathBuf;

/// Where a setting was written, for error messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag(&'static str),
    /// In the environment.
    Variable(&'static str),
    /// In a file.
    File {
        /// Which.
        path: PathBuf,
        /// First line is 1.
        line: usize,
        /// The key.
        key: &'static str,
    },
    /// In a table of a file.
    Table {
        /// Which file.
        path: PathBuf,
        /// First line is 1.
        line: usize,
        /// Such as `metrics.helpful.max`.
        key: String,
    },
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Flag(key) => write!(f, "--{}", key.replace('_', "-")),
            Origin::Variable(key) => write!(f, "{}", variable(key)),
            Origin::File { path, line, key } => write!(f, "{}:{line}: `{key}`", path.display()),
            Origin::Table { path, line, key } => write!(f, "{}:{line}: `{key}`", path.display()),
        }
    }
}

/// A value as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The text; numbers and booleans of a file are written out.
    pub text: String,
    /// Where it stood.
    pub origin: Origin,
}

impl Setting {
    /// Reads the text; the error names its place.
    pub fn parse<T>(&self, read: impl FnOnce(&str) -> Result<T, String>) -> Result<T, ConfigError> {
        read(self.text.trim()).map_err(|expected| ConfigError::Value {
            place: self.origin.to_string(),
            message: format!("{expected}, not `{}`", self.text),
        })
    }
}

/// A table such as `[metrics.helpful]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTable {
    /// Such as `metrics`.
    pub table: &'static str,
    /// `helpful`.
    pub name: String,
    /// Where it begins.
    pub origin: Origin,
    /// Its keys.
    pub settings: Vec<(String, Setting)>,
}

impl NamedTable {
    /// All values of a key that may have several.
    pub fn list<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a Setting> {
        self.settings.iter().filter(move |(name, _)| name == key).map(|(_, setting)| setting)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().find(|(name, _)| name == key).map(|(_, setting)| setting)
    }
}

/// Settings of one source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    settings: Vec<(&'static str, Setting)>,
    /// Tables, which only a file has.
    pub tables: Vec<NamedTable>,
    /// Those of loops.
    pub loops: Vec<LoopTable>,
}

/// Keys that may have several values: flags given several times, variables with commas, arrays in the file.
pub(super) const LISTS: [&str; 3] = ["model", "lora_modules", "upstream"];

impl Layer {
    /// Adds a setting. Those of [`LISTS`] may be added several times.
    pub fn push(&mut self, key: &'static str, text: String, origin: Origin) {
        self.settings.push((key, Setting { text, origin }));
    }

    /// Adds a flag that was given.
    pub fn flag(&mut self, key: &'static str, text: Option<&String>) {
        if let Some(text) = text {
            self.push(key, text.clone(), Origin::Flag(key));
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().find(|(name, _)| *name == key).map(|(_, setting)| setting)
    }

    /// All values of a key that is a list.
    pub fn list(&self, key: &str) -> Vec<(String, Origin)> {
        let values = self.settings.iter().filter(|(name, _)| *name == key);
        values.map(|(_, setting)| (setting.text.clone(), setting.origin.clone())).collect()
    }
}

fn variable(key: &str) -> String {
    format!("TIDEMILL_{}", key.to_uppercase())
}

/// The settings among the environment's variables, and the file that `TIDEMILL_CONFIG` names. Empty variables count as unset.
///
/// Kubernetes puts variables of its own into a container next to a service called `tidemill`, such as
/// `TIDEMILL_PORT=tcp://10.0.0.7:8080`: those are left alone, and unknown variables are no error.
pub fn from_env(env: impl IntoIterator<Item = (String, String)>) -> (Layer, Option<PathBuf>) {
    let mut layer = Layer::default();
    let mut file = None;
    for (name, text) in env {
        if text.is_empty() || !name.starts_with("TIDEMILL_") {
            continue;
        }
        if name == "TIDEMILL_CONFIG" {
            file = Some(PathBuf::from(text));
        } else if let Some(key) = KEYS.iter().find(|key| variable(key) == name) {
            if text.starts_with("tcp://") || text.starts_with("udp://") {
                continue;
            }
            if LISTS.contains(key) {
                let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
                items.for_each(|item| layer.push(key, item.to_owned(), Origin::Variable(key)));
            } else {
                layer.push(key, text, Origin::Variable(key));
            }
        }
    }
    (layer, file)
}
