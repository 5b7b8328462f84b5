//! A merged GGUF file: the base's, with other matrices in it; or a base in safetensors, with its metadata written anew.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use tidemill_kernels::Format;

use super::content::Content;
use super::matrix::Order;
use super::{MergeError, Merged, adapted, all_weights, at, weight};
use crate::adapter::{Adapter, Pair};
use crate::gguf::{Description, Gguf, Pairs, Planned, padding, storage_number, tensor_bytes};
use crate::load_error::LoadError;
use crate::model::weight_names::{Naming, Weight};
use crate::model_config::{RopeScaling, Yarn};
use crate::model_files::ModelFiles;

/// What says that a model lies in several files.
const SPLIT: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];
/// Where tensors begin, in files of our own.
const ALIGNMENT: usize = 32;
/// The divisors of rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A tensor of the file to be.
struct Tensor<'a> {
    planned: Planned,
    content: Content<'a>,
    order: Order,
}

/// From a base in GGUF, in one file or several: one file with the same tensors.
pub(super) fn copy(base: &ModelFiles, adapter: &Adapter, to: &Path, storage: Option<Format>) -> Result<Merged, MergeError> {
    let parts = base.weight_files().iter().map(|file| Gguf::open(&file.path)).collect::<Result<Vec<_>, LoadError>>()?;
    let Some(first) = parts.first() else {
        return Err(MergeError::Unsupported("the base has no weight files".into()));
    };
    let changed: HashMap<String, &Pair> =
        adapter.pairs.iter().map(|pair| (base.naming().name(weight(pair.layer, pair.projection)), pair)).collect();
    let mut tensors = Vec::new();
    for part in &parts {
        for Description { name, shape, storage: number, bytes } in part.descriptions()? {
            tensors.push(match changed.get(&name).copied() {
                Some(pair) => {
                    let matrix = adapted(base, pair)?;
                    let storage = storage.unwrap_or_else(|| plain(matrix.format));
                    let (content, len) = Content::matrix(&name, matrix, Some(pair), storage);
                    Tensor {
                        planned: Planned { name, shape, storage: storage_number(storage), len },
                        content,
                        order: Order::File,
                    }
                }
                // Also what we could not read.
                None => {
                    let bytes = part.file.map.get(bytes).unwrap_or_default();
                    let planned = Planned { name, shape, storage: number, len: bytes.len() };
                    Tensor { planned, content: Content::Copied(bytes), order: Order::File }
                }
            });
        }
    }
    let bytes = write(to, &first.pairs(&SPLIT)?, &tensors, first.alignment())?;
    Ok(Merged { matrices: changed.len(), bytes })
}

/// From a base in safetensors: under the names, in the row order and with the metadata that llama.cpp's converter gives them.
pub(super) fn from_safetensors(
    base: &ModelFiles,
    adapter: &Adapter,
    to: &Path,
    storage: Option<Format>,
) -> Result<Merged, MergeError> {
    let config = base.config();
    if matches!(config.rope_scaling, RopeScaling::Yarn(Yarn { truncate: false, .. })) {
        return Err(MergeError::Unsupported(format!(
            "{}: GGUF has no rope_scaling.truncate false; merge into a folder of safetensors",
            base.path().display()
        )));
    }
    let changed: HashMap<Weight, &Pair> = adapter.pairs.iter().map(|pair| (weight(pair.layer, pair.projection), pair)).collect();
    let mut tensors = Vec::new();
    tensors.extend(config.rope_factors().map(|factors| vector(ROPE_FACTORS.to_owned(), factors)));
    let mut formats: HashMap<Format, usize> = HashMap::new();
    for weight in all_weights(base)? {
        let name = Naming::Gguf.name(weight);
        let (rows, columns) = config.shape_of(weight);
        let order = config.gguf_row_order(weight, rows);
        if columns == 1 {
            let values = base.vector(weight)?;
            tensors.push(vector(
                name,
                match order {
                    Some(order) => reordered(&values, &order),
                    None => values,
                },
            ));
            continue;
        }
        let matrix = base.matrix(weight)?;
        let pair = changed.get(&weight).copied();
        let storage = storage.filter(|_| pair.is_some()).unwrap_or(matrix.format);
        let (content, len) = Content::matrix(&name, matrix, pair, storage);
        *formats.entry(storage).or_default() += len;
        let planned = Planned { name, shape: vec![rows, columns], storage: storage_number(storage), len };
        tensors.push(Tensor { planned, content, order: order.map_or(Order::File, Order::Of) });
    }
    let most = formats.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(Format::F32, |(format, _)| format);
    let bytes = write(to, &metadata(base, most)?, &tensors, ALIGNMENT)?;
    Ok(Merged { matrices: changed.len(), bytes })
}

/// Everything that a reader needs beside the tensors.
fn metadata(base: &ModelFiles, most: Format) -> Result<Pairs, MergeError> {
    let pairs = Pairs::default().text("general.type", "model").text("general.name", base.name());
    // llama.cpp's `llama_ftype`: what most of the file is.
    let file_type = match most {
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q8_0 => 7,
        Format::Bf16 => 32,
        _ => 0,
    };
    let pairs = pairs.u32("general.file_type", file_type).u32("general.quantization_version", 2);
    let pairs = base.config().to_gguf(pairs);
    let mut pairs = base.tokenizer().to_gguf(&base.path().join("tokenizer.json"), base.config().vocabulary, pairs)?;
    let eos = base.tokenizer().special_tokens().eos;
    // A GGUF file has room for three tokens that end a turn.
    let others = base.end_of_turn().iter().filter(|token| Some(**token) != eos);
    for (key, token) in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"].into_iter().zip(others) {
        pairs = pairs.u32(key, *token);
    }
    let Some(template) = base.chat_template() else { return Ok(pairs) };
    pairs = pairs.text("tokenizer.chat_template", template.source());
    Ok(match template.tool_source().filter(|tools| *tools != template.source()) {
        Some(tools) => pairs.texts("tokenizer.chat_templates", &["tool_use"]).text("tokenizer.chat_template.tool_use", tools),
        None => pairs,
    })
}

fn vector(name: String, values: Vec<f32>) -> Tensor<'static> {
    let shape = vec![values.len()];
    let len = tensor_bytes(Format::F32, &shape).unwrap_or(0);
    let planned = Planned { name, shape, storage: storage_number(Format::F32), len };
    Tensor { planned, content: Content::Vector(values), order: Order::File }
}

/// Value `i` goes to place `order[i]`.
fn reordered(values: &[f32], order: &[u32]) -> Vec<f32> {
    let mut placed = vec![0.0; values.len()];
    for (value, place) in values.iter().zip(order) {
        placed[*place as usize] = *value;
    }
    placed
}

/// Writes a file; returns its size.
fn write(to: &Path, pairs: &Pairs, tensors: &[Tensor<'_>], alignment: usize) -> Result<u64, MergeError> {
    let planned: Vec<Planned> = tensors.iter().map(|tensor| tensor.planned.clone()).collect();
    let head = pairs.before_data(&planned, alignment);
    let mut out = BufWriter::with_capacity(1 << 20, at("create", to, File::create(to))?);
    at("write", to, out.write_all(&head))?;
    let mut written = head.len();
    for Tensor { planned, content, order } in tensors {
        content.write(order, to, &mut out)?;
        let zeros = padding(planned.len, alignment);
        at("write", to, out.write_all(&vec![0; zeros]))?;
        written += planned.len + zeros;
    }
    at("write", to, out.flush())?;
    at("write", to, out.get_ref().sync_all())?;
    Ok(written as u64)
}

/// Quantising again would round away what the adapter adds.
fn plain(own: Format) -> Format {
    if own.block_len() == 1 { own } else { Format::F16 }
}
