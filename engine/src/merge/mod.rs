//! An adapter made part of its base: a model of its own, that any program runs which runs the base.
//!
//! A merged matrix is `W + scale · B A`, computed in f32 from what the base's file holds and rounded once to what it is stored as.
//! Everything else is copied byte for byte. The result appears under its name whole or not at all. [`write_model`] writes a model whose
//! numbers are all new.

mod beside;
mod content;
mod error;
mod gguf;
mod matrix;
mod safetensors;
#[cfg(test)]
mod tests;
mod trained;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tidemill_kernels::Format;

use crate::adapter::{Adapter, Pair, Projection};
use crate::load_error::LoadError;
use crate::model::weight_names::{Part, Weight};
use crate::model_config::ModelConfig;
use crate::model_files::{FileMatrix, ModelFiles};

pub use error::MergeError;
pub use trained::write_model;

/// What a merged model is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// A folder as Hugging Face's tools read it.
    Safetensors,
    /// One file.
    Gguf,
}

/// How a model is merged.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// What is written.
    pub container: Container,
    /// What merged matrices are stored as. `None`: what the base stores them as, where that is not quantised; else f16 in GGUF and bf16
    /// in safetensors, which keep what the adapter adds.
    pub storage: Option<Format>,
    /// Folder with `config.json`, tokenizer and chat template of a safetensors model; `None` is the base's own.
    pub files_from: Option<PathBuf>,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Matrices that the adapter changed.
    pub matrices: usize,
    /// Size of the weight files.
    pub bytes: u64,
}

/// Writes the base with the adapter in it to `to`, a folder or a file that does not exist yet.
pub fn merge(base: &ModelFiles, adapter: &Adapter, to: &Path, options: &MergeOptions) -> Result<Merged, MergeError> {
    adapter.check(base.config())?;
    let same_container = (options.container == Container::Gguf) == base.naming().is_gguf();
    if base.config().experts.is_some() && !same_container {
        return Err(MergeError::Unsupported(
            "a mixture of experts is merged into the container that its base has: safetensors into safetensors, GGUF into GGUF"
                .into(),
        ));
    }
    if base.config().gemma.is_some() && options.container == Container::Gguf && !same_container {
        return Err(MergeError::Unsupported(
            "a Gemma model of safetensors is merged into safetensors: its tokenizer is SentencePiece's, which is not written into GGUF; \
             convert the merged folder with llama.cpp's converter"
                .into(),
        ));
    }
    if base.naming().joins_qkv() && !same_container {
        return Err(MergeError::Unsupported(
            "a model with query, key and value in one matrix is merged into the container that its base has: safetensors into safetensors, \
             GGUF into GGUF"
                .into(),
        ));
    }
    whole_or_absent(to, |beside| {
        let merged = write(base, adapter, beside, options)?;
        same_model(base.config(), beside, options)?;
        Ok(merged)
    })
}

/// Has something written under another name, which becomes `to` when it is done.
fn whole_or_absent<T>(to: &Path, write: impl FnOnce(&Path) -> Result<T, MergeError>) -> Result<T, MergeError> {
    if to.exists() {
        return Err(MergeError::Exists(to.to_owned()));
    }
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let parent = to.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
    at("create", parent, fs::create_dir_all(parent))?;
    let beside = parent.join(format!(".{name}.{}.part", std::process::id()));
    let written = write(&beside).and_then(|written| {
        at("rename", to, fs::rename(&beside, to))?;
        at("write", parent, File::open(parent).and_then(|folder| folder.sync_all()))?;
        Ok(written)
    });
    if written.is_err() {
        // What is left over is of no use to anybody.
        let _ = if beside.is_dir() { fs::remove_dir_all(&beside) } else { fs::remove_file(&beside) };
    }
    written
}

fn write(base: &ModelFiles, adapter: &Adapter, beside: &Path, options: &MergeOptions) -> Result<Merged, MergeError> {
    match (options.container, base.naming()) {
        (Container::Gguf, naming) if naming.is_gguf() => gguf::copy(base, adapter, beside, options.storage),
        (Container::Gguf, _) => {
            let merged = gguf::from_safetensors(base, adapter, beside, options.storage)?;
            same_tokens(base, beside)?;
            Ok(merged)
        }
        (Container::Safetensors, naming) => {
            let plain = [None, Some(Format::F32), Some(Format::F16), Some(Format::Bf16)];
            if !plain.contains(&options.storage) {
                return Err(MergeError::Unsupported("safetensors hold f32, f16 or bf16; choose one of these".into()));
            }
            at("create", beside, fs::create_dir(beside))?;
            match naming.is_gguf() {
                true => safetensors::from_gguf(base, adapter, beside, options),
                false => safetensors::copy(base, adapter, beside, options),
            }
        }
    }
}

/// What was written opens, and is the base's architecture.
fn same_model(config: &ModelConfig, written: &Path, options: &MergeOptions) -> Result<(), MergeError> {
    let merged = ModelFiles::open(written)?;
    let sizes = |c: &ModelConfig| {
        (c.gguf_architecture(), c.experts, c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.intermediate, c.vocabulary)
    };
    if sizes(merged.config()) == sizes(config) && merged.config().tied_embeddings == config.tied_embeddings {
        return Ok(());
    }
    let from = options.files_from.as_deref().unwrap_or(Path::new("the base")).display();
    Err(MergeError::Unsupported(format!(
        "config.json in {from} describes another model; name the folder of the base's own publisher"
    )))
}

/// What a tokenizer is asked to find out whether it is the one that it should be: letters, digits, spaces, scripts and a control token.
const PROBE: &str = "Hello, world! It's 3.14 of 12345, WE'LL see.\n\n\t  Ünïcödé 日本語 🙂 fooBar_baz\r\n don't<|im_end|> end ";

/// The tokenizer that was put together from the file's metadata cuts texts as the base's does.
fn same_tokens(base: &ModelFiles, written: &Path) -> Result<(), MergeError> {
    let merged = ModelFiles::open(written)?;
    let tokens = |files: &ModelFiles| files.tokenizer().encode(PROBE, true, true).ok();
    if tokens(&merged).is_some() && tokens(&merged) == tokens(base) {
        return Ok(());
    }
    Err(MergeError::Unsupported(
        "the base's tokenizer is none that a GGUF file can describe; merge into safetensors, and convert those with the converter of its publisher"
            .into(),
    ))
}

/// Every tensor that the base has.
fn all_weights(base: &ModelFiles) -> Result<Vec<Weight>, MergeError> {
    let mut weights = vec![Weight::Embedding];
    for layer in 0..base.config().layers {
        for part in Part::ALL {
            if base.find(Weight::Layer(layer, part))?.is_some() {
                weights.push(Weight::Layer(layer, part));
            }
        }
    }
    weights.push(Weight::FinalNorm);
    weights.extend((!base.config().tied_embeddings).then_some(Weight::Output));
    Ok(weights)
}

/// The matrix that a pair adapts, as the base's files have it.
fn adapted<'a>(base: &'a ModelFiles, pair: &Pair) -> Result<FileMatrix<'a>, LoadError> {
    match pair.projection {
        Projection::DbrxQkv | Projection::MptQkv => base.joined_qkv(pair.layer),
        projection => base.matrix(weight(pair.layer, projection)),
    }
}

/// The matrix that an adapter calls by this name.
fn weight(layer: usize, projection: Projection) -> Weight {
    Weight::Layer(layer, projection.part())
}

fn at<T>(action: &'static str, path: &Path, result: std::io::Result<T>) -> Result<T, MergeError> {
    result.map_err(|source| MergeError::Io { action, path: path.to_owned(), source })
}
