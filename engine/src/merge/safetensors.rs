//! A merged folder of safetensors, with the files that stand beside the weights.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use tidemill_kernels::Format;

use super::content::Content;
use super::matrix::Order;
use super::{MergeError, MergeOptions, Merged, adapted, all_weights, at, weight};
use crate::adapter::{Adapter, Pair};
use crate::model::weight_names::{Naming, Weight};
use crate::model_files::{FileMatrix, ModelFiles};
use crate::tensor_file::{Placement, TensorFile};

/// Files beside the weights, by their endings.
const KEPT: [&str; 6] = ["json", "jinja", "txt", "model", "tiktoken", "md"];

/// One tensor of a file to be.
pub(super) struct Planned<'a> {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub len: usize,
    pub content: Content<'a>,
}

/// From a base in safetensors: the same files with the same tensors.
pub(super) fn copy(base: &ModelFiles, adapter: &Adapter, to: &Path, options: &MergeOptions) -> Result<Merged, MergeError> {
    let naming = base.naming();
    let changed: HashMap<String, &Pair> =
        adapter.pairs.iter().map(|pair| (naming.name(weight(pair.layer, pair.projection)), pair)).collect();
    beside_the_weights(options.files_from.as_deref().unwrap_or_else(|| base.path()), to)?;
    let mut bytes = 0;
    for file in base.weight_files() {
        let mut names: Vec<(&String, &Placement)> = file.tensors.iter().collect();
        names.sort_by_key(|(name, placement)| (placement.bytes.start, *name));
        let planned = names.into_iter().map(|(name, placement)| match changed.get(name) {
            Some(pair) => {
                let matrix = adapted(base, pair)?;
                let storage = options.storage.unwrap_or(matrix.format);
                Ok(merged(name, matrix, Some(pair), storage))
            }
            None => Ok(copied(file, name, placement)),
        });
        let planned = planned.collect::<Result<Vec<_>, MergeError>>()?;
        let name = file.path.file_name().unwrap_or_default();
        bytes += write(&to.join(name), &planned)?;
    }
    Ok(Merged { matrices: changed.len(), bytes })
}

/// From a base in GGUF: one file, under the names and in the order of the publisher.
pub(super) fn from_gguf(base: &ModelFiles, adapter: &Adapter, to: &Path, options: &MergeOptions) -> Result<Merged, MergeError> {
    let own = base.path().parent().filter(|folder| folder.join("config.json").is_file());
    let Some(from) = options.files_from.as_deref().or(own) else {
        return Err(MergeError::Unsupported(
            "a base in GGUF has no config.json and tokenizer.json; name a folder that holds the original's, or merge into GGUF"
                .into(),
        ));
    };
    if base.config().gemma.is_some() && describes_images(&from.join("config.json"))? {
        return Err(MergeError::Unsupported(
            "config.json beside it describes a model that also sees images, whose other part a GGUF file has not; merge into GGUF".into(),
        ));
    }
    beside_the_weights(from, to)?;
    // Of the shards that the original has and this model has not.
    fs::remove_file(to.join("model.safetensors.index.json")).ok();
    let pairs: HashMap<Weight, &Pair> = adapter.pairs.iter().map(|pair| (weight(pair.layer, pair.projection), pair)).collect();
    let mut planned = Vec::new();
    let naming = Naming::of_publisher(base.config().family);
    for weight in all_weights(base)? {
        let name = naming.name(weight);
        if base.config().shape_of(weight).1 == 1 {
            let mut values = base.vector(weight)?;
            if base.config().gemma.is_some() && weight.is_norm() {
                // The publisher's norms multiply with 1 more than what they hold.
                values.iter_mut().for_each(|value| *value -= 1.0);
            }
            planned.push(Planned {
                name,
                dtype: dtype(Format::F32),
                shape: vec![values.len()],
                len: values.len() * 4,
                content: Content::Vector(values),
            });
            continue;
        }
        let matrix = base.matrix(weight)?;
        let own = Some(matrix.format).filter(|format| format.block_len() == 1);
        let storage = options.storage.or(own).unwrap_or(Format::Bf16);
        planned.push(merged(&name, matrix, pairs.get(&weight).copied(), storage));
    }
    let bytes = write(&to.join("model.safetensors"), &planned)?;
    Ok(Merged { matrices: pairs.len(), bytes })
}

/// Whether a `config.json` is of a decoder beside a part that sees images.
fn describes_images(path: &Path) -> Result<bool, MergeError> {
    let text = at("read", path, fs::read(path))?;
    Ok(serde_json::from_slice::<Value>(&text).is_ok_and(|config| config.get("text_config").is_some()))
}

fn merged<'a>(name: &str, matrix: FileMatrix<'a>, pair: Option<&'a Pair>, storage: Format) -> Planned<'a> {
    let shape = vec![matrix.n, matrix.k];
    let (content, len) = Content::matrix(name, matrix, pair, storage);
    Planned { name: name.to_owned(), dtype: dtype(storage), shape, len, content }
}

fn copied<'a>(file: &'a TensorFile, name: &str, placement: &Placement) -> Planned<'a> {
    let bytes = file.map.get(placement.bytes.clone()).unwrap_or_default();
    let dtype = placement.format.clone().map_or_else(|other| other, dtype);
    Planned { name: name.to_owned(), dtype, shape: placement.shape.clone(), len: bytes.len(), content: Content::Copied(bytes) }
}

pub(super) fn dtype(format: Format) -> String {
    match format {
        Format::F32 => "F32".to_owned(),
        Format::F16 => "F16".to_owned(),
        Format::Bf16 => "BF16".to_owned(),
        other => format!("{other:?}"),
    }
}

/// Writes a file; returns its size.
pub(super) fn write(path: &Path, planned: &[Planned<'_>]) -> Result<u64, MergeError> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for Planned { name, dtype, shape, len, .. } in planned {
        let begin = end;
        end += len;
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The format wants the data aligned.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, at("create", path, File::create(path))?);
    at("write", path, out.write_all(&(header.len() as u64).to_le_bytes()))?;
    at("write", path, out.write_all(&header))?;
    for plan in planned {
        plan.content.write(&Order::Publisher, path, &mut out)?;
    }
    at("write", path, out.flush())?;
    at("write", path, out.get_ref().sync_all())?;
    Ok((8 + header.len() + end) as u64)
}

/// Copies configuration, tokenizer, chat template and the index of shards.
pub(super) fn beside_the_weights(from: &Path, to: &Path) -> Result<(), MergeError> {
    for entry in at("read", from, fs::read_dir(from))? {
        let path = at("read", from, entry)?.path();
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if let Some(name) = path.file_name().filter(|_| path.is_file() && KEPT.contains(&ending)) {
            at("copy", &path, fs::copy(&path, to.join(name)))?;
        }
    }
    Ok(())
}
