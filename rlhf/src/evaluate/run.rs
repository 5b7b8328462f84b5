//! Measures models one after the other.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use tidemill_engine::{Adapter, AdapterRefused, Engine, EngineOptions, ModelFiles, StartError};

use super::answers::{self, Answer, AnswerError, Sampling};
use super::duel::{self, Verdict};
use super::preferences;
use super::report::{Contender, Evaluation, Example};
use super::text;
use crate::collate::{Encoder, Sample, Teaches};
use crate::dataset::{Message, Row};
use crate::job::{JobError, reward_model};
use crate::model::{Model, ModelOptions};
use crate::train::{Pass, TrainConfig};

/// What is evaluated, and on what.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The base model's name and place.
    pub base: crate::job::Base,
    /// Names and folders of the adapters: one against the base, or two against each other.
    pub adapters: Vec<(String, PathBuf)>,
    /// Comparisons and prompts, and where they came from.
    pub rows: Vec<Row>,
    /// See `rows`.
    pub source: String,
    /// The β of implicit rewards.
    pub beta: f64,
    /// Ordinary text.
    pub text: Option<String>,
    /// Prompts to answer, 0 for none.
    pub prompts: usize,
    /// How answers are drawn.
    pub sampling: Sampling,
    /// How the differentiable model computes.
    pub model: ModelOptions,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Held-out comparisons.
    Comparisons,
    /// Ordinary text.
    Text,
    /// Answers.
    Answers,
    /// The duel.
    Duel,
}

/// Says whose answer to the conversation is better.
pub type Judge<'a> = &'a mut dyn FnMut(&[Message], &str, &str) -> Result<Verdict, EvaluateError>;

/// Who decides the duel of the first two contenders.
pub enum Referee<'a> {
    /// Nobody.
    None,
    /// A reward model: the folder of its adapter and head.
    RewardModel(PathBuf),
    /// Anybody; with the name that the report gives them.
    Judge(String, Judge<'a>),
}

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// The model, rows or adapters.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The engine does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The engine refuses an adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterRefused),
    /// Answers.
    #[error(transparent)]
    Answer(#[from] AnswerError),
    /// The arithmetic.
    #[error(transparent)]
    Graph(#[from] candle_core::Error),
    /// The judge.
    #[error("the judge: {0}")]
    Judge(String),
    /// Nothing to do.
    #[error("{0}")]
    Nothing(String),
}

/// Measures everything. `watch` hears what is being done, how much of it is done, and how much there is.
pub fn evaluate(
    trial: &Trial,
    referee: Referee<'_>,
    watch: &mut dyn FnMut(Work, &str, usize, usize),
) -> Result<Evaluation, EvaluateError> {
    if trial.adapters.is_empty() {
        return Err(EvaluateError::Nothing("name an adapter to evaluate".to_owned()));
    }
    let files = Arc::new(ModelFiles::open(&trial.base.path).map_err(JobError::from)?);
    let comparisons = encoded(&files, trial, Teaches::Comparison)?;
    let prompts = prompts(&files, trial)?;
    if comparisons.is_empty() && prompts.is_empty() && trial.text.is_none() {
        let text = format!("{} holds no comparison and no prompt; name rows, or a --text", trial.source);
        return Err(EvaluateError::Nothing(text));
    }
    let text_tokens = match &trial.text {
        Some(text) => files.tokenizer().encode(text, true, false).map_err(|error| EvaluateError::Nothing(error.to_string()))?,
        None => Vec::new(),
    };
    let engine = if prompts.is_empty() { None } else { Some(engine(trial)?) };
    let ids: Vec<Vec<u32>> = prompts.iter().map(|(_, tokens)| tokens.clone()).collect();

    let mut contenders = Vec::new();
    let mut said: Vec<Vec<Answer>> = Vec::new();
    let answer = |name: &str, folder: Option<&PathBuf>, watch: &mut dyn FnMut(Work, &str, usize, usize)| {
        let Some(engine) = &engine else { return Ok::<_, EvaluateError>(Vec::new()) };
        let lease = folder.map(|folder| engine.load_adapter(name, folder, true, 0)).transpose()?;
        let total = ids.len();
        Ok(answers::draw(engine, lease.as_ref(), &ids, trial.sampling, |done| watch(Work::Answers, name, done, total))?)
    };
    let mut base_text = None;
    for (name, folder) in &trial.adapters {
        let adapter = Adapter::read(folder).map_err(JobError::from)?;
        let model = Model::with_adapter(Arc::clone(&files), &adapter, trial.model).map_err(JobError::from)?;
        let total = 2 * comparisons.len();
        let margins =
            preferences::implicit_margins(&model, &comparisons, trial.beta, |done| watch(Work::Comparisons, name, done, total))?;
        watch(Work::Text, name, 0, 1);
        let text = text::loss(&model, &text_tokens, Pass::EVALUATE)?;
        if base_text.is_none() {
            base_text = text::loss(&model, &text_tokens, Pass::REFERENCE)?;
        }
        let answers = answer(name, Some(folder), watch)?;
        let divergence = answers::divergence(&model, &ids, &answers)?;
        contenders.push(Contender {
            name: name.clone(),
            digest: Some(adapter.digest().iter().map(|byte| format!("{byte:02x}")).collect()),
            preferences: preferences::agreement(&margins),
            text,
            answers: answers::drift(&answers, divergence),
        });
        said.push(answers);
    }
    let answers = answer("base", None, watch)?;
    contenders.push(Contender {
        name: "base".to_owned(),
        text: base_text,
        answers: answers::drift(&answers, None),
        ..Contender::default()
    });
    said.push(answers);

    let mut examples: Vec<Example> = prompts
        .iter()
        .enumerate()
        .map(|(index, (messages, _))| Example {
            prompt: messages.last().map(|last| last.content.clone()).unwrap_or_default(),
            answers: said.iter().map(|answers| answers[index].text.clone()).collect(),
            verdict: None,
        })
        .collect();
    let (judge, verdicts) = decide(&files, trial, referee, &prompts, [&said[0], &said[1]], watch)?;
    examples.iter_mut().zip(&verdicts).for_each(|(example, verdict)| example.verdict = Some(*verdict));
    Ok(Evaluation {
        base: trial.base.name.clone(),
        base_digest: files.digest(),
        rows: trial.source.clone(),
        sampling: trial.sampling,
        contenders,
        judge,
        duel: duel::score(&verdicts),
        examples,
    })
}

fn encoded(files: &ModelFiles, trial: &Trial, teaches: Teaches) -> Result<Vec<Sample>, EvaluateError> {
    let template = files.chat_template().ok_or_else(|| JobError::Template(trial.base.name.clone()))?;
    // Encoded as training encodes them, with its defaults.
    let options = TrainConfig::new(crate::train::Method::Dpo).encoding();
    Ok(Encoder::new(template, files.tokenizer(), options).rows(&trial.rows, teaches).samples)
}

type Prompt<'a> = (&'a [Message], Vec<u32>);

/// The first prompts of the rows, each once, as messages and as tokens.
fn prompts<'a>(files: &ModelFiles, trial: &'a Trial) -> Result<Vec<Prompt<'a>>, EvaluateError> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    let template = files.chat_template().ok_or_else(|| JobError::Template(trial.base.name.clone()))?;
    let options = TrainConfig::new(crate::train::Method::Dpo).encoding();
    let encoder = Encoder::new(template, files.tokenizer(), options);
    for row in &trial.rows {
        if found.len() == trial.prompts {
            break;
        }
        let messages = row.example.prompt();
        if let Some(tokens) = encoder.prompt(row).filter(|tokens| !tokens.is_empty() && seen.insert(tokens.clone())) {
            found.push((messages, tokens));
        }
    }
    Ok(found)
}

fn engine(trial: &Trial) -> Result<Engine, EvaluateError> {
    let defaults = EngineOptions::new(&trial.base.path);
    let threads = Some(trial.model.threads).filter(|threads| *threads > 0);
    let adapters = trial.adapters.len();
    Ok(Engine::start(EngineOptions { threads, max_adapters: adapters, ..defaults }, &mut |_, _| {})?)
}

/// Verdicts over the first two contenders' answers, and who gave them.
fn decide(
    files: &Arc<ModelFiles>,
    trial: &Trial,
    referee: Referee<'_>,
    prompts: &[Prompt<'_>],
    [first, second]: [&[Answer]; 2],
    watch: &mut dyn FnMut(Work, &str, usize, usize),
) -> Result<(Option<String>, Vec<Verdict>), EvaluateError> {
    match referee {
        Referee::None => Ok((None, Vec::new())),
        Referee::RewardModel(folder) => {
            let (model, head) = reward_model(files, &folder, trial.model)?;
            let completion = |answer: &Answer| crate::collate::Completion { tokens: answer.tokens.clone(), learnt: None };
            let samples: Vec<Sample> = prompts
                .iter()
                .zip(first.iter().zip(second))
                .map(|((_, prompt), (first, second))| Sample {
                    prompt: prompt.clone(),
                    completions: vec![completion(first), completion(second)],
                    ..Sample::default()
                })
                .collect();
            watch(Work::Duel, "reward model", 0, samples.len());
            let rewards = preferences::rewards(&model, &head, &samples)?;
            let verdicts = rewards.chunks_exact(2).map(|pair| duel::by_score(pair[0], pair[1])).collect();
            Ok((Some(folder.display().to_string()), verdicts))
        }
        Referee::Judge(name, judge) => {
            let mut verdicts = Vec::with_capacity(prompts.len());
            for ((messages, _), (first, second)) in prompts.iter().zip(first.iter().zip(second)) {
                let in_order = judge(messages, &first.text, &second.text)?;
                let swapped = judge(messages, &second.text, &first.text)?;
                verdicts.push(duel::by_judge(in_order, swapped));
                watch(Work::Duel, &name, verdicts.len(), prompts.len());
            }
            Ok((Some(name), verdicts))
        }
    }
}
