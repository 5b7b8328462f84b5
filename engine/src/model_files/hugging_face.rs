//! Models in directories of safetensors.

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{ModelFiles, Weights, end_of_turn, name_of};
use crate::chat_template::ChatTemplate;
use crate::generation_defaults::GenerationDefaults;
use crate::load_error::LoadError;
use crate::model::weight_names::Naming;
use crate::model_config::{Family, ModelConfig};
use crate::pooling::Pooling;
use crate::safetensors_file;
use crate::tensor_file::TensorFile;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::json::content;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

pub(super) fn open(directory: &Path) -> Result<ModelFiles, LoadError> {
    let (config, mut ends) = ModelConfig::from_json(&directory.join("config.json"))?;
    let generation_defaults = GenerationDefaults::read(&directory.join("generation_config.json"))?;
    ends.extend(&generation_defaults.eos_token_id);

    let tokenizer_path = directory.join("tokenizer.json");
    if !tokenizer_path.is_file() {
        return Err(LoadError::not_a_model(directory, "tokenizer.json is missing; fetch it from the same place as the weights"));
    }
    let tokenizer_config = optional_json(&directory.join("tokenizer_config.json"))?;
    let tokenizer = Tokenizer::from_json(&tokenizer_path, &tokenizer_config)?;
    if tokenizer.vocabulary() > config.vocabulary {
        let detail =
            format!("has {} tokens, the model {}; they do not belong together", tokenizer.vocabulary(), config.vocabulary);
        return Err(LoadError::invalid(&tokenizer_path, "vocabulary", detail));
    }
    let chat_template = template(directory, &tokenizer_config)?;

    let paths = weight_files(directory)?;
    let files: Vec<TensorFile> = paths.iter().map(|path| safetensors_file::open(path)).collect::<Result<_, _>>()?;
    let naming = match config.family {
        Family::Dbrx => Naming::Dbrx,
        Family::Mpt => Naming::Mpt,
        _ => Naming::of(files.iter().flat_map(|file| file.tensors.keys())),
    };
    Ok(ModelFiles {
        path: directory.to_owned(),
        name: name_of(&std::path::absolute(directory).map_err(|error| LoadError::io(directory, error))?, false),
        end_of_turn: end_of_turn::collect(&tokenizer, ends),
        config,
        tokenizer,
        chat_template,
        generation_defaults,
        pooling: Pooling::read(directory)?,
        weights: Weights::new(naming, files)?,
    })
}

/// Whether the directory has weights in safetensors.
pub(super) fn has_weights(directory: &Path) -> bool {
    directory.join(INDEX).is_file() || directory.join(SINGLE).is_file()
}

/// The shards that the index names, or the one file.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let index = directory.join(INDEX);
    if !index.is_file() {
        let single = directory.join(SINGLE);
        if single.is_file() {
            return Ok(vec![single]);
        }
        let detail = format!("holds neither {SINGLE} nor {INDEX}; only safetensors weights are read, not pickled ones");
        return Err(LoadError::not_a_model(directory, detail));
    }
    let text = std::fs::read(&index).map_err(|error| LoadError::io(&index, error))?;
    let content: Index =
        serde_json::from_slice(&text).map_err(|error| LoadError::invalid(&index, "weight_map", error.to_string()))?;
    let names: BTreeSet<&String> = content.weight_map.values().collect();
    names
        .into_iter()
        .map(|name| {
            // A downloaded index must not make us open files elsewhere.
            let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            if !inside {
                return Err(LoadError::invalid(&index, "weight_map", format!("\"{name}\" leads out of the directory")));
            }
            let path = directory.join(name);
            if !path.is_file() {
                return Err(LoadError::invalid(&index, "weight_map", format!("the shard \"{name}\" is missing; fetch it too")));
            }
            Ok(path)
        })
        .collect()
}

/// `chat_template.jinja` (newer) or `chat_template` in `tokenizer_config.json`: a text, or a list of named texts.
fn template(directory: &Path, config: &Value) -> Result<Option<ChatTemplate>, LoadError> {
    let file = directory.join("chat_template.jinja");
    let named = |name: &str| {
        let list = config.get("chat_template")?.as_array()?;
        list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?.get("template")?.as_str()
    };
    let (default, origin) = if file.is_file() {
        let text = std::fs::read_to_string(&file).map_err(|error| LoadError::io(&file, error))?;
        (Some(text), file)
    } else {
        let text = config.get("chat_template").and_then(Value::as_str).or_else(|| named("default")).map(str::to_owned);
        (text, directory.join("tokenizer_config.json"))
    };
    let Some(default) = default else { return Ok(None) };
    // transformers gives templates every token of the configuration that ends in `_token`.
    let tokens = config.as_object().into_iter().flatten();
    let tokens = tokens.filter(|(name, _)| name.ends_with("_token"));
    let variables: Map<String, Value> = tokens.filter_map(|(name, token)| Some((name.clone(), content(token)?.into()))).collect();
    ChatTemplate::new(&default, named("tool_use"), variables)
        .map(Some)
        .map_err(|detail| LoadError::invalid(&origin, "chat_template", detail))
}

fn optional_json(path: &Path) -> Result<Value, LoadError> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| LoadError::invalid(path, "content", error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(LoadError::io(path, error)),
    }
}
