//! From a path on disk to everything a model consists of.

mod end_of_turn;
mod experts;
mod gguf;
mod hugging_face;
mod weights;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::chat_template::ChatTemplate;
use crate::generation_defaults::GenerationDefaults;
use crate::load_error::LoadError;
use crate::model::weight_names::{Naming, Weight};
use crate::model_config::ModelConfig;
use crate::pooling::Pooling;
use crate::tensor_file::{Tensor, TensorFile};
use crate::tokenizer::Tokenizer;

pub use experts::{ExpertPart, Mixture, MixtureMatrix};
pub use weights::FileMatrix;

/// A model on disk: configuration, tokenizer, chat template and defaults are read, weights are mapped and checked when asked for.
pub struct ModelFiles {
    path: PathBuf,
    name: String,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    generation_defaults: GenerationDefaults,
    end_of_turn: Vec<u32>,
    pooling: Result<Pooling, String>,
    weights: Weights,
}

/// What stands between text and tokens.
pub struct Frontend {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text; base models have none.
    pub chat_template: Option<ChatTemplate>,
    /// The publisher's sampling defaults.
    pub generation_defaults: GenerationDefaults,
    /// Every token that ends a turn.
    pub end_of_turn: Vec<u32>,
    /// How vectors of texts are made, or why they cannot be.
    pub pooling: Result<Pooling, String>,
}

/// The mapped files and whose names their tensors have.
pub(crate) struct Weights {
    files: Vec<TensorFile>,
    naming: Naming,
    /// Which file has a tensor.
    index: HashMap<String, usize>,
}

impl ModelFiles {
    /// Opens a `.gguf` file (of a split model: its first part), a directory with `config.json`, `tokenizer.json` and safetensors,
    /// or a directory with one GGUF model. Nothing is fetched.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
        if !metadata.is_dir() {
            return gguf::open(path);
        }
        let models = gguf::models_in(path)?;
        // Some publishers leave the original's config.json beside a GGUF file.
        if path.join("config.json").is_file() && (models.is_empty() || hugging_face::has_weights(path)) {
            return hugging_face::open(path);
        }
        match models.as_slice() {
            [one] => gguf::open(one),
            [] => Err(LoadError::not_a_model(
                path,
                "holds neither config.json with safetensors nor a .gguf file; name the model's own directory or file",
            )),
            several => {
                let names: Vec<_> =
                    several.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy()).collect();
                Err(LoadError::not_a_model(path, format!("holds several models ({}); name one of the files", names.join(", "))))
            }
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name for people: the publisher's where the files say one, else the file's or directory's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sizes and switches.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Chat template; base models have none.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The publisher's sampling defaults.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.generation_defaults
    }

    /// Every token that ends a turn, ascending.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.end_of_turn
    }

    /// Weights in the files (a tied output matrix counts once).
    pub fn parameters(&self) -> u64 {
        let placements = self.weights.files.iter().flat_map(|file| file.tensors.values());
        placements.filter_map(|placement| u64::try_from(placement.elements()?).ok()).fold(0, u64::saturating_add)
    }

    /// Bytes of the weight files.
    pub fn file_bytes(&self) -> u64 {
        self.weights.files.iter().map(|file| file.map.len() as u64).sum()
    }

    /// Names the weights by their content: BLAKE3 of the weight files in hexadecimal digits, those of a model in several files in the order
    /// of their names. Reads all of them.
    pub fn digest(&self) -> String {
        let mut files: Vec<&TensorFile> = self.weights.files.iter().collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut hasher = blake3::Hasher::new();
        for file in files {
            hasher.update(&(file.map.len() as u64).to_le_bytes());
            hasher.update(&file.map);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Closes the weight files; what serving needs beside the weights is left.
    pub fn into_frontend(self) -> Frontend {
        let Self { tokenizer, chat_template, generation_defaults, end_of_turn, pooling, .. } = self;
        Frontend { tokenizer, chat_template, generation_defaults, end_of_turn, pooling }
    }

    /// One line for the start-up text: family, parameters, storage, size.
    pub fn describe(&self) -> String {
        let (millions, megabytes) = (self.parameters() as f64 / 1e6, self.file_bytes() as f64 / 1e6);
        let storage = self.weights.storage();
        let experts = self.config.experts.map_or_else(String::new, |experts| {
            let active = self.active_parameters() as f64 / 1e6;
            format!(", {active:.0} M of them for a token ({} of {} experts)", experts.each, experts.count)
        });
        format!(
            "{} · {:?} · {millions:.0} M parameters in {storage}{experts} · {megabytes:.0} MB · context {}",
            self.name, self.config.family, self.config.max_positions
        )
    }

    /// The tensor that holds `weight`, if the files have it.
    pub(crate) fn find(&self, weight: Weight) -> Result<Option<Tensor<'_>>, LoadError> {
        self.weights.tensor(&self.weights.naming.name(weight))
    }

    /// The tensor that holds `weight`.
    pub(crate) fn need(&self, weight: Weight) -> Result<Tensor<'_>, LoadError> {
        self.find(weight)?.ok_or_else(|| {
            let name = self.weights.naming.name(weight);
            LoadError::invalid(&self.path, name, "the tensor is missing; fetch the model again, all of its files")
        })
    }

    /// The mapped files, in the order of the model's parts.
    pub(crate) fn weight_files(&self) -> &[TensorFile] {
        &self.weights.files
    }

    /// Whose names and conventions the tensors follow.
    pub(crate) fn naming(&self) -> Naming {
        self.weights.naming
    }

    /// Gives the mapped pages back: they are in the backend's packed form now.
    pub(crate) fn weights_are_packed(&self) {
        for file in &self.weights.files {
            file.map.advise_done();
        }
    }
}

impl Weights {
    /// Refuses a tensor that lies in two files.
    fn new(naming: Naming, files: Vec<TensorFile>) -> Result<Self, LoadError> {
        let mut index = HashMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.tensors.keys() {
                if index.insert(name.clone(), number).is_some() {
                    return Err(LoadError::invalid(
                        &file.path,
                        name,
                        "lies in two files; remove the one that is not the model's",
                    ));
                }
            }
        }
        Ok(Self { files, naming, index })
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, LoadError> {
        match self.index.get(name).and_then(|&number| self.files.get(number)) {
            Some(file) => file.tensor(name),
            None => Ok(None),
        }
    }

    /// The storage format that most bytes have.
    fn storage(&self) -> String {
        let mut bytes: HashMap<String, usize> = HashMap::new();
        for placement in self.files.iter().flat_map(|file| file.tensors.values()) {
            let format = match &placement.format {
                Ok(format) => format!("{format:?}"),
                Err(name) => name.clone(),
            };
            *bytes.entry(format).or_default() += placement.bytes.len();
        }
        bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or_else(String::new, |(format, _)| format)
    }
}

/// The last part of a path without its extension.
fn name_of(path: &Path, is_file: bool) -> String {
    let name = if is_file { path.file_stem() } else { path.file_name() };
    name.map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
