//! The head of a reward model, beside its adapter or in the folder of the model.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Var};
use tidemill_engine::{Adapter, ModelFiles};

use super::JobError;
use crate::batch::Packed;
use crate::collate::{EncodeOptions, Encoder, Sample, Teaches};
use crate::dataset::{Example, Message, Origin, Row};
use crate::durable;
use crate::model::{Model, ModelOptions, Pass};
use crate::parameters::Parameter;
use crate::reward::model::RewardModel;
use crate::tensors::{self, Lists};
use crate::train::{Head, Prompt, TrainConfig, TrainError};

/// The file.
const HEAD: &str = "head.safetensors";
/// The tensor's name.
const WEIGHT: &str = "score.weight";
/// What a folder has that holds a model of its own, and no adapter.
const MODEL_CONFIG: &str = "config.json";

/// Writes a head into the folder of its adapter or model.
pub(super) fn write(head: &Head, folder: &Path) -> Result<(), JobError> {
    let values = head.weight.values().map_err(TrainError::from)?;
    let bytes = tensors::write([(head.weight.name.clone(), values.as_slice())]).map_err(TrainError::from)?;
    let path = folder.join(HEAD);
    durable::replace(&path, &bytes).map_err(JobError::io(&path))
}

/// What a training left in `folder`: the base of `files` with `adapter`, and a head where it is a reward model.
pub(crate) fn measured_model(
    files: &Arc<ModelFiles>,
    folder: &Path,
    adapter: &Adapter,
    options: ModelOptions,
) -> Result<(Model, Option<Head>), JobError> {
    let head = if folder.join(HEAD).exists() { Some(read(files, folder)?) } else { None };
    Ok((Model::with_adapter(Arc::clone(files), adapter, options)?, head))
}

/// What a model is to judge: answers to these prompts, of at most so many tokens of the model that gives them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked<'a> {
    pub prompts: &'a [Prompt],
    pub held_out: &'a [Prompt],
    pub answer: usize,
}

impl Asked<'_> {
    /// Most tokens of a prompt and its answer to the judge of `files`, which has a tokenizer and a template of its own. What an answer will be
    /// nobody knows: it gets twice as many as the model that gives it has. `None` where nothing is asked.
    fn longest(self, files: &ModelFiles, config: &TrainConfig) -> Result<Option<usize>, JobError> {
        let mut prompts = self.prompts.iter().chain(self.held_out).peekable();
        if prompts.peek().is_none() {
            return Ok(None);
        }
        let template = files.chat_template().ok_or_else(|| JobError::Template(files.path().display().to_string()))?;
        // Whole, to see what is cut.
        let options = EncodeOptions { max_length: None, ..config.encoding() };
        let encoder = Encoder::new(template, files.tokenizer(), options);
        let tokens = |prompt: &Prompt| {
            let (prompt, completion) = (prompt.question.messages.clone(), vec![Message::assistant(".")]);
            let row = Row::new(Example::Demonstration { prompt, completion }, Origin::default());
            encoder.rows(std::slice::from_ref(&row), Teaches::Imitation).samples.first().map_or(1, Sample::tokens)
        };
        let longest = prompts.map(tokens).max().unwrap_or(1).saturating_add(self.answer.saturating_mul(2));
        Ok(Some(longest.min(config.encoding().max_length.unwrap_or(usize::MAX))))
    }
}

/// A reward model as a training leaves it in `folder`: an adapter on the base of `beside`, or a model of its own. It computes where `beside`
/// does. `config` says how conversations become tokens; the largest batch of what is `asked` is rehearsed.
pub(super) fn reward_model(
    beside: &Model,
    folder: &Path,
    options: ModelOptions,
    config: &TrainConfig,
    asked: Asked<'_>,
) -> Result<RewardModel, JobError> {
    let whole = folder.join(MODEL_CONFIG).is_file();
    let files = if whole { Arc::new(ModelFiles::open(folder)?) } else { Arc::clone(beside.files()) };
    let head = read(&files, folder)?;
    let mut hasher = blake3::Hasher::new();
    let model = if whole {
        Model::untrained(Arc::clone(&files), options)?
    } else {
        let adapter = Adapter::read(folder)?;
        hasher.update(&adapter.digest());
        Model::with_adapter(Arc::clone(&files), &adapter, options)?
    };
    let model = model.computing_beside(beside)?;
    if model.device().is_some()
        && let Some(longest) = asked.longest(&files, config)?
    {
        let rows = config.tokens_per_batch.max(longest);
        let read: Vec<u32> = (0..rows as u32).collect();
        model.rehearse(&Packed::of_size(rows, longest, 0), &read, Pass::EVALUATE)?;
    }
    hasher.update(model.base().as_bytes());
    for value in head.weight.values().map_err(TrainError::from)? {
        hasher.update(&value.to_le_bytes());
    }
    let (encoding, budget, digest) = (config.encoding(), config.tokens_per_batch, hasher.finalize().to_hex().to_string());
    Ok(RewardModel { model: Box::new(model), head, files, encoding, budget, digest })
}

fn read(files: &ModelFiles, folder: &Path) -> Result<Head, JobError> {
    let path = folder.join(HEAD);
    let bytes = std::fs::read(&path).map_err(JobError::io(&path))?;
    let width = files.config().hidden;
    let values = Lists::read(&bytes).and_then(|lists| lists.get(WEIGHT, width)).map_err(TrainError::from)?;
    let var = Var::from_vec(values, width, &Device::Cpu).map_err(TrainError::from)?;
    Ok(Head { weight: Parameter { name: WEIGHT.to_owned(), var } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Method, Question};
    use serde_json::Map;

    #[test]
    fn a_judge_is_asked_of_prompts_in_its_own_tokens_and_of_answers_twice_as_long() {
        let files = ModelFiles::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/qwen2"))).unwrap();
        let prompt = |words: usize| {
            let messages = vec![Message { role: "user".to_owned(), ..Message::assistant(&"word ".repeat(words)) }];
            let question = Question { id: words.to_string(), messages, columns: Map::new(), now: 0 };
            // Of a model whose tokens are longer.
            Prompt { question, tokens: vec![0; words.div_ceil(8)] }
        };
        let (short, long) = ([prompt(4)], [prompt(40)]);
        let mut config = TrainConfig::new(Method::Grpo);
        config.max_length = None;
        let longest = |asked: Asked<'_>, config: &TrainConfig| asked.longest(&files, config).unwrap();
        let asked = |answer| Asked { prompts: &short, held_out: &long, answer };
        let whole = longest(asked(5), &config).unwrap();
        assert!(whole > 40 + 10, "{whole}");
        assert_eq!(longest(asked(9), &config), Some(whole + 8));
        assert_eq!(longest(Asked { held_out: &[], ..asked(5) }, &config).map(|short| short + 36 <= whole), Some(true));
        config.max_length = Some(20);
        assert_eq!(longest(asked(5), &config), Some(20));
        assert_eq!(longest(Asked::default(), &config), None);
    }
}
