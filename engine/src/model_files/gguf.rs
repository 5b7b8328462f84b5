//! Models in GGUF files.

use std::path::{Path, PathBuf};

use super::{ModelFiles, Weights, end_of_turn, name_of};
use crate::chat_template::ChatTemplate;
use crate::generation_defaults::GenerationDefaults;
use crate::gguf::Gguf;
use crate::load_error::LoadError;
use crate::model::weight_names::Naming;
use crate::model_config::ModelConfig;
use crate::pooling::{Pooling, PoolingMode};
use crate::tensor_file::TensorFile;
use crate::tokenizer::Tokenizer;

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NUMBER: &str = "split.no";
const ROPE_FACTORS: &str = "rope_freqs.weight";

pub(super) fn open(path: &Path) -> Result<ModelFiles, LoadError> {
    let first = Gguf::open(path)?;
    let parts = other_parts(&first)?;
    let file_with = |name: &str| std::iter::once(&first.file).chain(&parts).find(|file| file.tensors.contains_key(name));
    let shape = |name: &str| Some(file_with(name)?.tensors.get(name)?.shape.as_slice());
    let rope_factors = match file_with(ROPE_FACTORS) {
        Some(file) => file.tensor(ROPE_FACTORS)?.map(|tensor| tensor.to_f32()).transpose()?,
        None => None,
    };
    let config = ModelConfig::from_gguf(&first, shape, rope_factors)?;
    let tokenizer = Tokenizer::from_gguf(&first)?;
    if tokenizer.vocabulary() > config.vocabulary {
        let detail =
            format!("has {} tokens, the model {}; they do not belong together", tokenizer.vocabulary(), config.vocabulary);
        return Err(LoadError::invalid(path, "tokenizer.ggml.tokens", detail));
    }
    let chat_template = templates(&first, &tokenizer)?;
    let named = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
    let mut ends = Vec::new();
    for key in named {
        ends.extend(first.token_id(key)?);
    }
    let architecture = first.text("general.architecture")?.unwrap_or_default();
    let pooling = PoolingMode::of_gguf(first.integer(&format!("{architecture}.pooling_type"))?.map(|number| number as u64));
    let name = match first.text("general.name")? {
        Some(name) if !name.trim().is_empty() => name.to_owned(),
        _ => name_of(path, true),
    };
    Ok(ModelFiles {
        path: path.to_owned(),
        name,
        end_of_turn: end_of_turn::collect(&tokenizer, ends),
        tokenizer,
        chat_template,
        // Sampling only: which tokens end a turn, the GGUF file says itself.
        generation_defaults: GenerationDefaults::read(&path.with_file_name("generation_config.json"))?,
        pooling: pooling.map(|mode| Pooling { mode, ..Pooling::default() }),
        weights: Weights::new(Naming::of_gguf(config.family), std::iter::once(first.file).chain(parts).collect())?,
        config,
    })
}

/// GGUF models in a directory; of a split one, its first part.
pub(super) fn models_in(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let mut models = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| LoadError::io(directory, error))? {
        let path = entry.map_err(|error| LoadError::io(directory, error))?.path();
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file();
        let is_later_part = part_numbers(&path).is_some_and(|(_, number, _)| number != 1);
        if is_gguf && !is_later_part {
            models.push(path);
        }
    }
    models.sort();
    Ok(models)
}

/// `name-00002-of-00003.gguf` → (`name`, 2, 3).
fn part_numbers(path: &Path) -> Option<(&str, usize, usize)> {
    let (rest, count) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let five_digits = |digits: &str| (digits.len() == 5).then(|| digits.parse().ok()).flatten();
    Some((name, five_digits(number)?, five_digits(count)?))
}

/// The parts of a split model after its first.
fn other_parts(first: &Gguf) -> Result<Vec<TensorFile>, LoadError> {
    let path = first.path();
    let count = first.integer(SPLIT_COUNT)?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let named = part_numbers(path).filter(|&(_, _, parts)| parts == count);
    let Some((name, number, _)) = named else {
        let detail = format!("the model has {count} parts; their names must end in -00001-of-{count:05}.gguf and so on");
        return Err(LoadError::invalid(path, SPLIT_COUNT, detail));
    };
    if number != 1 || first.integer(SPLIT_NUMBER)?.unwrap_or(0) != 0 {
        return Err(LoadError::invalid(path, SPLIT_NUMBER, format!("this is part {number}; name the first part")));
    }
    (2..=count)
        .map(|number| {
            let part = Gguf::open(&path.with_file_name(format!("{name}-{number:05}-of-{count:05}.gguf")))?;
            match part.integer(SPLIT_NUMBER)? {
                Some(index) if index + 1 == number => Ok(part.file),
                _ => Err(LoadError::invalid(part.path(), SPLIT_NUMBER, format!("is not part {number} of the model"))),
            }
        })
        .collect()
}

/// The default template, and named ones as `tokenizer.chat_template.NAME`.
fn templates(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, LoadError> {
    const KEY: &str = "tokenizer.chat_template";
    let Some(default) = gguf.text(KEY)? else { return Ok(None) };
    let tools = gguf.text("tokenizer.chat_template.tool_use")?;
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    let roles = tokenizer.special_tokens();
    let variables = [
        ("bos_token", token(roles.bos)),
        ("eos_token", token(roles.eos)),
        ("unk_token", token(roles.unknown)),
        ("pad_token", token(roles.padding)),
    ];
    let variables = variables.into_iter().filter_map(|(name, token)| Some((name.to_owned(), token?.into()))).collect();
    ChatTemplate::new(default, tools, variables).map(Some).map_err(|detail| LoadError::invalid(gguf.path(), KEY, detail))
}
