//! A model whose numbers are all new, in the base's shape.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tidemill_kernels::Format;
use tidemill_kernels::blocks::quantize_row;

use super::content::Content;
use super::safetensors::{Planned, beside_the_weights, dtype, write};
use super::{Container, MergeError, MergeOptions, at, beside, same_model, whole_or_absent};
use crate::gguf::tensor_bytes;
use crate::model::weight_names::{Naming, Weight};
use crate::model_files::ModelFiles;

/// Writes a folder as Hugging Face's tools read it to `to`, which does not exist yet: the base's configuration, tokenizer and chat template,
/// and what `numbers` gives for each weight, output feature by output feature. Matrices are stored as `storage` (f32, f16 or bf16), norms
/// and biases as f32. What stands beside the weights is the base's own, or made from a GGUF file's metadata. Returns the size of the
/// weights.
pub fn write_model(
    base: &ModelFiles,
    numbers: &dyn Fn(Weight) -> Option<Vec<f32>>,
    storage: Format,
    to: &Path,
) -> Result<u64, MergeError> {
    if ![Format::F32, Format::F16, Format::Bf16].contains(&storage) {
        return Err(MergeError::Unsupported("safetensors hold f32, f16 or bf16; choose one of these".into()));
    }
    if base.config().experts.is_some() {
        return Err(MergeError::Unsupported(
            "a mixture of experts is not written anew; only a dense model is trained whole".into(),
        ));
    }
    if base.config().gemma.is_some() {
        return Err(MergeError::Unsupported("a Gemma model is not written anew; it is not trained whole".into()));
    }
    if base.naming().joins_qkv() {
        return Err(MergeError::Unsupported(
            "a model with query, key and value in one matrix is not written anew; it is not trained whole".into(),
        ));
    }
    whole_or_absent(to, |folder| {
        at("create", folder, fs::create_dir(folder))?;
        let own = if base.path().is_dir() { Some(base.path()) } else { base.path().parent() };
        match own.filter(|own| own.join("config.json").is_file()) {
            Some(own) => {
                beside_the_weights(own, folder)?;
                // One file takes the place of the shards.
                fs::remove_file(folder.join("model.safetensors.index.json")).ok();
                store_as(&folder.join("config.json"), storage)?;
            }
            None => beside::write(base, storage, folder)?,
        }
        let planned = base.config().weights().into_iter().map(|weight| plan(base, numbers, storage, weight));
        let bytes = write(&folder.join("model.safetensors"), &planned.collect::<Vec<_>>())?;
        let options = MergeOptions { container: Container::Safetensors, storage: Some(storage), files_from: None };
        same_model(base.config(), folder, &options)?;
        Ok(bytes)
    })
}

fn plan<'a>(
    base: &'a ModelFiles,
    numbers: &'a dyn Fn(Weight) -> Option<Vec<f32>>,
    storage: Format,
    weight: Weight,
) -> Planned<'a> {
    let (n, k) = base.config().shape_of(weight);
    let (shape, storage) = if k == 1 { (vec![n], Format::F32) } else { (vec![n, k], storage) };
    let naming = if base.naming().is_gguf() { Naming::HuggingFace } else { base.naming() };
    let name = naming.name(weight);
    let len = tensor_bytes(storage, &shape).unwrap_or(0);
    let made = {
        let name = name.clone();
        move || -> Result<Vec<u8>, MergeError> {
            let values = numbers(weight).filter(|values| values.len() == n * k);
            let values =
                values.ok_or_else(|| MergeError::Unsupported(format!("{name}: there are no {n} x {k} numbers for it")))?;
            let mut bytes = vec![0; len];
            quantize_row(storage, &values, &mut bytes)?;
            Ok(bytes)
        }
    };
    Planned { name, dtype: dtype(storage), shape, len, content: Content::Made(Box::new(made)) }
}

/// Says in a copied configuration what the weights are stored as now: transformers loads a model as it says.
fn store_as(path: &Path, storage: Format) -> Result<(), MergeError> {
    let text = at("read", path, fs::read(path))?;
    let unreadable = |error: serde_json::Error| MergeError::Unsupported(format!("{}: {error}", path.display()));
    let mut config: Value = serde_json::from_slice(&text).map_err(unreadable)?;
    let name = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    config[name] = json!(beside::torch_name(storage));
    at("write", path, fs::write(path, format!("{config:#}\n")))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::tokenizer::Tokenizer;

    fn goldens(path: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(path)
    }

    /// The numbers of a model's files.
    fn numbers(files: &ModelFiles, weight: Weight) -> Option<Vec<f32>> {
        if files.config().shape_of(weight).1 == 1 {
            return files.vector(weight).ok();
        }
        let matrix = files.matrix(weight).ok()?;
        let row = matrix.format.row_bytes(matrix.k)?;
        let mut values = vec![0.0; matrix.n * matrix.k];
        for (feature, out) in values.chunks_mut(matrix.k).enumerate() {
            let at = matrix.row_order.as_ref().map_or(feature, |order| order[feature] as usize) * row;
            tidemill_kernels::blocks::dequantize_row(matrix.format, &matrix.data[at..at + row], out).unwrap();
        }
        Some(values)
    }

    #[test]
    fn a_model_of_either_container_becomes_a_folder_with_the_same_numbers_and_the_same_tokens() {
        let place = tempfile::tempdir().unwrap();
        for (index, path) in
            ["llama", "qwen2", "qwen3", "llama/llama.gguf", "qwen2/qwen2.gguf", "qwen3/qwen3.gguf"].into_iter().enumerate()
        {
            // Away from the folder, so that a GGUF file has nothing beside it.
            let source = if path.ends_with(".gguf") {
                let copy = place.path().join(format!("{index}")).join("model.gguf");
                fs::create_dir_all(copy.parent().unwrap()).unwrap();
                fs::copy(goldens(path), &copy).unwrap();
                copy
            } else {
                goldens(path)
            };
            let base = ModelFiles::open(&source).unwrap();
            let to = place.path().join(format!("{index}-out"));
            let given = |weight: Weight| numbers(&base, weight);
            let bytes = write_model(&base, &given, Format::F32, &to).unwrap();
            assert!(bytes as usize > 4 * usize::try_from(base.parameters()).unwrap(), "{path}");
            let written = ModelFiles::open(&to).unwrap();
            assert_eq!(written.config(), base.config(), "{path}");
            for weight in base.config().weights() {
                assert_eq!(numbers(&written, weight), numbers(&base, weight), "{path} {weight:?}");
            }
            assert_eq!(written.parameters(), base.parameters(), "{path}");
            assert_eq!(written.end_of_turn(), base.end_of_turn(), "{path}");
            assert_eq!(written.chat_template().unwrap().source(), base.chat_template().unwrap().source(), "{path}");
            let same = |a: &Tokenizer, b: &Tokenizer| {
                for text in ["Hello, world! 123 and  more", "<|im_start|>user\n潮 🌊<|im_end|>", "naïve\tcafé\n\n"] {
                    for special in [false, true] {
                        assert_eq!(
                            a.encode(text, special, true).unwrap(),
                            b.encode(text, special, true).unwrap(),
                            "{path} {text}"
                        );
                    }
                }
                assert_eq!(
                    (a.special_tokens().bos, a.special_tokens().eos),
                    (b.special_tokens().bos, b.special_tokens().eos),
                    "{path}"
                );
            };
            same(written.tokenizer(), base.tokenizer());
            // The same again is refused: nothing is written over.
            assert!(matches!(write_model(&base, &given, Format::F32, &to), Err(MergeError::Exists(_))));
        }
        let names = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        assert!(names(place.path()).iter().all(|name| !name.to_string_lossy().ends_with(".part")));
    }

    #[test]
    fn what_a_configuration_cannot_say_and_numbers_that_are_missing_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let to = place.path().join("out");
        let llama3 = place.path().join("llama3.gguf");
        fs::copy(goldens("llama3/llama3.gguf"), &llama3).unwrap();
        let base = ModelFiles::open(&llama3).unwrap();
        let error = write_model(&base, &|weight| numbers(&base, weight), Format::Bf16, &to).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        let base = ModelFiles::open(&goldens("qwen2")).unwrap();
        let error = write_model(&base, &|_| None, Format::Bf16, &to).unwrap_err().to_string();
        assert!(error.contains("embed_tokens.weight: there are no 448 x 64 numbers"), "{error}");
        assert!(write_model(&base, &|_| None, Format::Q8_0, &to).is_err());
        assert!(!to.exists());
        // Stored in 16 bits: the configuration says so, and norms keep theirs.
        write_model(&base, &|weight| numbers(&base, weight), Format::Bf16, &to).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["torch_dtype"], "bfloat16");
        let written = ModelFiles::open(&to).unwrap();
        assert_eq!(written.vector(Weight::FinalNorm).unwrap(), base.vector(Weight::FinalNorm).unwrap());
        assert_eq!(written.matrix(Weight::Embedding).unwrap().format, Format::Bf16);
    }
}
