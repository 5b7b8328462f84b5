//! Which models to serve and where they lie. The one place that turns what a person types into a path.

use crate::config::{ConfigError, Origin};
use crate::pull::catalog;
use std::path::{Path, PathBuf};
use tidemill_store::DataDir;

/// The model that `tidemill pull` fetches and `tidemill serve` runs when nobody names one.
pub use crate::pull::catalog::DEFAULT_MODEL;

/// A model found on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// Name that clients use.
    pub name: String,
    /// A GGUF file or a directory.
    pub path: PathBuf,
}

/// An adapter that is loaded at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraModule {
    /// `adapter`, of the first model, or `base:adapter`.
    pub name: String,
    /// The folder that PEFT wrote.
    pub path: PathBuf,
}

/// Reads `NAME=PATH`, as often as it is given.
pub fn lora_modules(texts: &[(String, Origin)]) -> Result<Vec<LoraModule>, ConfigError> {
    let module = |(text, origin): &(String, Origin)| {
        let parts = text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty());
        let message = || format!("`{text}` should be NAME=PATH, with the folder of the adapter");
        let (name, path) = parts.ok_or_else(|| ConfigError::Value { place: origin.to_string(), message: message() })?;
        Ok(LoraModule { name: name.to_owned(), path: PathBuf::from(path) })
    };
    texts.iter().map(module).collect()
}

/// Where pulled models lie.
pub fn models_dir(data: &Path) -> PathBuf {
    DataDir::new(data).models()
}

/// Finds each model; without any, the default one, or the only one that was pulled.
pub fn resolve_all(models: &[(String, Origin)], data: &Path) -> Result<Vec<ModelSpec>, ConfigError> {
    let data = DataDir::new(data);
    if models.is_empty() {
        return Ok(vec![default_model(&data)?]);
    }
    let mut found: Vec<ModelSpec> = Vec::with_capacity(models.len());
    for (text, origin) in models {
        let model = resolve(text, origin, &data)?;
        if found.iter().any(|other| other.name == model.name) {
            let message = format!("two models are called `{}`; give one of them another name with NAME=PATH", model.name);
            return Err(ConfigError::Value { place: origin.to_string(), message });
        }
        found.push(model);
    }
    Ok(found)
}

fn default_model(data: &DataDir) -> Result<ModelSpec, ConfigError> {
    if let Some((folder, record)) = data.find_model(DEFAULT_MODEL)? {
        return Ok(ModelSpec { path: record.entry_path(&folder), name: record.name });
    }
    let mut pulled = data.list_models()?;
    match (pulled.pop(), pulled.len()) {
        (Some((folder, record)), 0) => Ok(ModelSpec { path: record.entry_path(&folder), name: record.name }),
        (None, _) => Err(ConfigError::Model(format!(
            "there is no model in {} yet: run `tidemill pull` for the default one, or name one with --model PATH",
            data.models().display()
        ))),
        (Some(last), _) => {
            pulled.push(last);
            let names: Vec<_> = pulled.into_iter().map(|(_, record)| record.name).collect();
            Err(ConfigError::Model(format!("several models were pulled: choose with --model {}", names.join(" or --model "))))
        }
    }
}

/// A path that exists; else `NAME=` before a path or pulled name; else a pulled name.
fn resolve(text: &str, origin: &Origin, data: &DataDir) -> Result<ModelSpec, ConfigError> {
    if let Some(model) = locate(text, data)? {
        return Ok(model);
    }
    let not_found = |what: &str| {
        let models = data.models();
        // Only what could be a model's name can be pulled; a mistyped path cannot.
        let next_step = match data.model_folder(what) {
            Ok(_) => format!("nothing of that name in {}; fetch it with `tidemill pull {what}`", models.display()),
            Err(_) => "it is not a model's name either; correct the path, or fetch a model with `tidemill pull`".to_owned(),
        };
        let message = format!("no model `{what}`: there is no such file or directory, and {next_step}");
        ConfigError::Value { place: origin.to_string(), message }
    };
    let Some((name, rest)) = text.split_once('=') else { return Err(not_found(text)) };
    if name.is_empty() || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        let message = format!("`{text}` needs a name without spaces before the `=`");
        return Err(ConfigError::Value { place: origin.to_string(), message });
    }
    let model = locate(rest, data)?.ok_or_else(|| not_found(rest))?;
    Ok(ModelSpec { name: name.to_owned(), ..model })
}

fn locate(text: &str, data: &DataDir) -> Result<Option<ModelSpec>, ConfigError> {
    let path = Path::new(text);
    if path.exists() {
        return Ok(Some(ModelSpec { name: name_of(path), path: path.to_owned() }));
    }
    // A text that cannot be a pulled model's name simply names none.
    let name = catalog::find(text).map_or(text, |entry| entry.name);
    match data.find_model(name) {
        Ok(Some((folder, record))) => Ok(Some(ModelSpec { path: record.entry_path(&folder), name: record.name })),
        Ok(None) | Err(tidemill_store::StoreError::Name(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The directory's name, or the file's without its ending.
fn name_of(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if whole.is_dir() { whole.file_name() } else { whole.file_stem() };
    name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_store::ModelRecord;

    fn pulled(data: &DataDir, name: &str) {
        let folder = data.model_folder(name).unwrap();
        std::fs::create_dir_all(&folder).unwrap();
        let record = ModelRecord {
            name: name.into(),
            source: "test".into(),
            revision: String::new(),
            entry: "m.gguf".into(),
            files: vec![],
        };
        record.write(&folder).unwrap();
    }

    fn resolve_one(text: &str, data: &DataDir) -> Result<ModelSpec, ConfigError> {
        resolve(text, &Origin::Flag("model"), data)
    }

    #[test]
    fn a_path_a_named_path_and_a_pulled_name_are_found() {
        let temp = tempfile::tempdir().unwrap();
        let data = DataDir::new(temp.path().join("data"));
        let file = temp.path().join("tiny=x.Q4.gguf");
        std::fs::write(&file, "").unwrap();
        pulled(&data, "org/m");
        let path = file.to_str().unwrap();
        assert_eq!(resolve_one(path, &data).unwrap().name, "tiny=x.Q4");
        assert_eq!(resolve_one(&format!("chat={path}"), &data).unwrap(), ModelSpec { name: "chat".into(), path: file.clone() });
        assert_eq!(resolve_one("org/m", &data).unwrap().path, data.models().join("org--m/m.gguf"));
        assert_eq!(resolve_one("mine=org/m", &data).unwrap().name, "mine");
        pulled(&data, DEFAULT_MODEL);
        assert_eq!(resolve_one("smollm2", &data).unwrap().name, DEFAULT_MODEL, "what `pull` takes, `--model` takes");
    }

    #[test]
    fn a_missing_model_says_how_to_get_it() {
        let temp = tempfile::tempdir().unwrap();
        let data = DataDir::new(temp.path());
        let message = resolve_one("nowhere/to-be-found", &data).unwrap_err().to_string();
        assert!(message.starts_with("--model: ") && message.contains("tidemill pull nowhere/to-be-found"), "{message}");
        let message = resolve_one("/nowhere/x.gguf", &data).unwrap_err().to_string();
        assert!(message.contains("correct the path"), "{message}");
        let message = resolve_all(&[], temp.path()).unwrap_err().to_string();
        assert!(message.contains("run `tidemill pull`"), "{message}");
    }

    #[test]
    fn without_a_name_the_default_goes_first_then_the_only_one() {
        let temp = tempfile::tempdir().unwrap();
        let data = DataDir::new(temp.path());
        pulled(&data, "b");
        assert_eq!(resolve_all(&[], temp.path()).unwrap()[0].name, "b");
        pulled(&data, "c");
        let message = resolve_all(&[], temp.path()).unwrap_err().to_string();
        assert!(message.contains("--model b or --model c"), "{message}");
        pulled(&data, DEFAULT_MODEL);
        assert_eq!(resolve_all(&[], temp.path()).unwrap()[0].name, DEFAULT_MODEL);
    }

    #[test]
    fn two_models_of_one_name_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        pulled(&DataDir::new(temp.path()), "a");
        let twice = [("a".to_owned(), Origin::Flag("model")), ("a".to_owned(), Origin::Flag("model"))];
        assert!(resolve_all(&twice, temp.path()).unwrap_err().to_string().contains("two models are called `a`"));
    }
}
