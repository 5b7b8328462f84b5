//! Measures models one after the other.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tidemill_engine::{Adapter, AdapterRefused, Engine, EngineOptions, ModelFiles};

use super::answers::{self, Answer, AnswerError, Sampling};
use super::duel::{self, Verdict};
use super::preferences;
use super::report::{Contender, Evaluation, Example, TrainedOn};
use super::text;
use crate::batch::Packed;
use crate::collate::{Encoder, Sample, Teaches};
use crate::dataset::{Message, Row};
use crate::job::{Asked, JobError, judge_of, measured_model};
use crate::model::{Model, ModelOptions};
use crate::reward::{self, RewardError, RewardFunction, Rewards};
use crate::train::{Head, Pass, Prompt, Question, TrainConfig};
use crate::workplace::Workplace;

/// What is evaluated, and on what.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The base model's name and place.
    pub base: crate::job::Base,
    /// The adapters: one against the base, or two against each other.
    pub adapters: Vec<Entrant>,
    /// Comparisons, and where they came from.
    pub rows: Vec<Row>,
    /// See `rows`.
    pub source: String,
    /// What is asked; [`questions`](crate::train::questions) takes it from rows.
    pub questions: Vec<Question>,
    /// The β of implicit rewards.
    pub beta: f64,
    /// Ordinary text.
    pub text: Option<String>,
    /// How many of the questions are answered, 0 for none.
    pub prompts: usize,
    /// How answers are drawn.
    pub sampling: Sampling,
    /// How the differentiable model computes.
    pub model: ModelOptions,
    /// Where everything computes.
    pub workplace: Workplace,
}

/// An adapter that is measured.
#[derive(Clone, Debug)]
pub struct Entrant {
    /// What the report calls it.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What its lineage says.
    pub trained_on: Option<TrainedOn>,
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
    /// Rules: whose answer earns more.
    Rules(Rules),
    /// Anybody; with the name that the report gives them.
    Judge(String, Judge<'a>),
}

/// Reward functions with their weights, as trainings that sample have them.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// At least one, each with a name of its own.
    pub functions: Vec<RewardFunction>,
    /// One for each; 1 without.
    pub weights: Option<Vec<f64>>,
}

impl Rules {
    /// Checked.
    pub fn new(functions: Vec<RewardFunction>, weights: Option<Vec<f64>>) -> Result<Self, RewardError> {
        reward::check(&functions, weights.as_deref())?;
        Ok(Self { functions, weights })
    }

    /// What the report calls them.
    fn name(&self) -> String {
        let weight = |at: usize| self.weights.as_ref().and_then(|weights| weights.get(at)).copied().unwrap_or(1.0);
        let one = |(at, function): (usize, &RewardFunction)| match weight(at) {
            1.0 => function.name().to_owned(),
            weight => format!("{weight} × {}", function.name()),
        };
        self.functions.iter().enumerate().map(one).collect::<Vec<_>>().join(" + ")
    }
}

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// The model, rows or adapters.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The engine refuses an adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterRefused),
    /// Answers.
    #[error(transparent)]
    Answer(#[from] AnswerError),
    /// The arithmetic.
    #[error(transparent)]
    Graph(#[from] candle_core::Error),
    /// The rules.
    #[error(transparent)]
    Reward(#[from] RewardError),
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
    let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
    // All others compute beside the first, on one copy of the base's weights.
    let mut first = opened(&files, &trial.adapters[0], trial)?;
    first.model = trial.workplace.take(first.model).map_err(JobError::from)?;
    let others = trial.adapters[1..].iter().map(|entrant| opened(&files, entrant, trial)?.beside(&first));
    let others = others.collect::<Result<Vec<_>, EvaluateError>>()?;
    let arbiter = Arbiter::ready(referee, &first.model, &prompts, trial)?;
    let engine = if prompts.is_empty() {
        None
    } else {
        // Of each, as adapters are of several sizes; with that the engine has the rest.
        let batch = largest(&comparisons, &text_tokens, &ids, trial);
        for Opened { model, .. } in std::iter::once(&first).chain(&others) {
            model.rehearse(&batch, &[], Pass::EVALUATE).map_err(JobError::from)?;
        }
        first.model.settle();
        let adapters: Vec<&Adapter> = std::iter::once(&first).chain(&others).map(|opened| &opened.adapter).collect();
        Some(engine(&files, trial, &ids, &first.model, &adapters)?)
    };

    let mut contenders = Vec::new();
    let mut said: Vec<Vec<Answer>> = Vec::new();
    let answer = |name: &str, folder: Option<&PathBuf>, watch: &mut dyn FnMut(Work, &str, usize, usize)| {
        let Some(engine) = &engine else { return Ok::<_, EvaluateError>(Vec::new()) };
        let lease = folder.map(|folder| engine.load_adapter(name, folder, true, 0)).transpose()?;
        let total = ids.len();
        Ok(answers::draw(engine, lease.as_ref(), &ids, trial.sampling, |done| watch(Work::Answers, name, done, total))?)
    };
    let mut base_text = None;
    for (entrant, opened) in trial.adapters.iter().zip(std::iter::once(&first).chain(&others)) {
        let Entrant { name, folder, trained_on } = entrant;
        let Opened { adapter, model, head } = opened;
        let total = 2 * comparisons.len();
        let watching = |done| watch(Work::Comparisons, name, done, total);
        let margins = match head {
            Some(head) => preferences::margins(model, head, &comparisons, watching)?,
            None => preferences::implicit_margins(model, &comparisons, trial.beta, watching)?,
        };
        watch(Work::Text, name, 0, 1);
        let text = text::loss(model, &text_tokens, Pass::EVALUATE)?;
        if base_text.is_none() {
            base_text = text::loss(model, &text_tokens, Pass::REFERENCE)?;
        }
        let answers = answer(name, Some(folder), watch)?;
        let divergence = answers::divergence(model, &ids, &answers)?;
        contenders.push(Contender {
            name: name.clone(),
            digest: Some(adapter.digest().iter().map(|byte| format!("{byte:02x}")).collect()),
            preferences: preferences::agreement(&margins),
            text,
            answers: answers::drift(&answers, divergence),
            trained_on: *trained_on,
            ..Contender::default()
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
        .map(|(index, prompt)| Example {
            prompt: prompt.question.messages.last().map(|last| last.content.clone()).unwrap_or_default(),
            answers: said.iter().map(|answers| answers[index].text.clone()).collect(),
            verdict: None,
        })
        .collect();
    let Decided { judge, verdicts, rewards } = arbiter.decide(&prompts, &said, watch)?;
    contenders.iter_mut().zip(rewards).for_each(|(contender, rewards)| contender.rewards = rewards);
    examples.iter_mut().zip(&verdicts).for_each(|(example, verdict)| example.verdict = Some(*verdict));
    Ok(Evaluation {
        base: trial.base.name.clone(),
        base_digest: files.digest(),
        rows: trial.source.clone(),
        sampling: trial.sampling,
        contenders,
        judge,
        duel: duel::score(&verdicts),
        gates: None,
        examples,
    })
}

fn encoded(files: &ModelFiles, trial: &Trial, teaches: Teaches) -> Result<Vec<Sample>, EvaluateError> {
    let template = files.chat_template().ok_or_else(|| JobError::Template(trial.base.name.clone()))?;
    // Encoded as training encodes them, with its defaults.
    let options = TrainConfig::new(crate::train::Method::Dpo).encoding();
    Ok(Encoder::new(template, files.tokenizer(), options).rows(&trial.rows, teaches).samples)
}

/// The first questions that the template takes and that leave room for an answer, as tokens.
fn prompts(files: &ModelFiles, trial: &Trial) -> Result<Vec<Prompt>, EvaluateError> {
    let template = files.chat_template().ok_or_else(|| JobError::Template(trial.base.name.clone()))?;
    let options = TrainConfig::new(crate::train::Method::Dpo).encoding();
    let encoder = Encoder::new(template, files.tokenizer(), options);
    let prompt = |question: &Question| {
        let tokens = encoder.opening(&question.messages, question.now).ok()?;
        let fits = !tokens.is_empty() && tokens.len() < files.config().max_positions;
        let tokens = fits.then_some(tokens)?;
        Some(Prompt { question: question.clone(), tokens })
    };
    Ok(trial.questions.iter().filter_map(prompt).take(trial.prompts).collect())
}

/// An adapter's model, and its head where it is a reward model.
struct Opened {
    adapter: Adapter,
    model: Model,
    head: Option<Head>,
}

fn opened(files: &Arc<ModelFiles>, entrant: &Entrant, trial: &Trial) -> Result<Opened, EvaluateError> {
    let adapter = Adapter::read(&entrant.folder).map_err(JobError::from)?;
    let (model, head) = measured_model(files, &entrant.folder, &adapter, trial.model)?;
    Ok(Opened { adapter, model, head })
}

impl Opened {
    /// The same, computing where `other` does.
    fn beside(self, other: &Opened) -> Result<Self, EvaluateError> {
        let model = self.model.computing_beside(&other.model).map_err(JobError::from)?;
        Ok(Self { model, ..self })
    }
}

/// A batch of as many rows as those of an evaluation can have, in texts as long as its longest.
fn largest(comparisons: &[Sample], text: &[u32], prompts: &[Vec<u32>], trial: &Trial) -> Packed {
    let answered = prompts.iter().map(|prompt| prompt.len() + trial.sampling.max_tokens);
    let sizes = comparisons.iter().map(Sample::tokens).chain(answered).chain([text.len().min(text::WINDOW)]);
    let (longest, all) = sizes.fold((1, text.len()), |(longest, all), size| (longest.max(size), all + size));
    let rows = all.min(preferences::BUDGET.max(answers::BUDGET)).max(longest);
    Packed::of_size(rows, longest, rows)
}

/// An engine that answers `prompts` with any of `adapters`, beside a model that was rehearsed.
fn engine(
    files: &ModelFiles,
    trial: &Trial,
    prompts: &[Vec<u32>],
    model: &Model,
    adapters: &[&Adapter],
) -> Result<Engine, EvaluateError> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1) + trial.sampling.max_tokens.max(1);
    let options = EngineOptions {
        threads: Some(trial.model.threads).filter(|threads| *threads > 0),
        max_seqs: answers::TOGETHER,
        max_model_len: Some(longest.min(files.config().max_positions)),
        max_adapters: adapters.len(),
        max_adapter_rank: adapters.iter().map(|adapter| adapter.max_rank()).fold(1, usize::max),
        ..EngineOptions::new(&trial.base.path)
    };
    Ok(trial.workplace.start(options, model, adapters.iter().map(|adapter| adapter.bytes()).sum())?)
}

/// Who decided the duel of the first two, and how.
#[derive(Default)]
struct Decided {
    judge: Option<String>,
    /// One per prompt.
    verdicts: Vec<Verdict>,
    /// Mean rewards of each contender, where rules judged.
    rewards: Vec<BTreeMap<String, f64>>,
}

/// A referee ready for work.
enum Arbiter<'a> {
    Nobody,
    /// Called by this name.
    Rules(String, Rewards),
    Judge(String, Judge<'a>),
}

impl<'a> Arbiter<'a> {
    /// Models that judge compute beside `model`.
    fn ready(referee: Referee<'a>, model: &Model, prompts: &[Prompt], trial: &Trial) -> Result<Self, EvaluateError> {
        let (name, rules) = match referee {
            Referee::None => return Ok(Self::Nobody),
            Referee::Judge(name, judge) => return Ok(Self::Judge(name, judge)),
            // The rule that trainings have of it: it reads answers as it was taught to.
            Referee::RewardModel(path) => {
                let name = path.display().to_string();
                (name, Rules { functions: vec![reward::Judge::RewardModel { path }.into()], weights: None })
            }
            Referee::Rules(rules) => (rules.name(), rules),
        };
        let config = TrainConfig::new(crate::train::Method::Grpo);
        let asked = Asked { prompts, held_out: &[], answer: trial.sampling.max_tokens };
        let mut open = |judge: &reward::Judge| judge_of(model, judge, None, trial.model, &config, asked);
        Ok(Self::Rules(name, Rewards::new(&rules.functions, rules.weights.as_deref(), &mut open)?))
    }

    /// `said` has every contender's answers, in their order.
    fn decide(
        self,
        prompts: &[Prompt],
        said: &[Vec<Answer>],
        watch: &mut dyn FnMut(Work, &str, usize, usize),
    ) -> Result<Decided, EvaluateError> {
        let [first, second, ..] = said else { return Ok(Decided::default()) };
        match self {
            Self::Nobody => Ok(Decided::default()),
            Self::Rules(name, rewards) => {
                let (verdicts, rewards) = by_rules(&rewards, prompts, said, watch)?;
                Ok(Decided { judge: Some(name), verdicts, rewards })
            }
            Self::Judge(name, judge) => {
                let mut verdicts = Vec::with_capacity(prompts.len());
                for (prompt, (first, second)) in prompts.iter().zip(first.iter().zip(second)) {
                    let messages = &prompt.question.messages;
                    let in_order = judge(messages, &first.text, &second.text)?;
                    let swapped = judge(messages, &second.text, &first.text)?;
                    verdicts.push(duel::by_judge(in_order, swapped));
                    watch(Work::Duel, &name, verdicts.len(), prompts.len());
                }
                Ok(Decided { judge: Some(name), verdicts, ..Decided::default() })
            }
        }
    }
}

/// A verdict for each prompt, and for each contender what it earns by rule.
type ByRules = (Vec<Verdict>, Vec<BTreeMap<String, f64>>);

/// Of the first two, whose answer earns the larger weighted sum of rewards; and what each contender earns in the mean, by rule.
fn by_rules(
    rules: &Rewards,
    prompts: &[Prompt],
    said: &[Vec<Answer>],
    watch: &mut dyn FnMut(Work, &str, usize, usize),
) -> Result<ByRules, EvaluateError> {
    let (mut totals, mut rewards) = (Vec::new(), Vec::new());
    for (done, answers) in said.iter().enumerate() {
        watch(Work::Duel, "rules", done, said.len());
        let judged: Vec<reward::Answer<'_>> = prompts
            .iter()
            .zip(answers)
            .map(|(prompt, answer)| reward::Answer {
                prompt: &prompt.question.messages,
                columns: &prompt.question.columns,
                text: &answer.text,
                tokens: answer.tokens.len(),
                ended: answer.whole,
            })
            .collect();
        let scores = rules.score(&judged)?;
        let mean = |(name, rewards): (String, Vec<Option<f64>>)| {
            let known: Vec<f64> = rewards.into_iter().flatten().collect();
            (!known.is_empty()).then(|| (name, known.iter().sum::<f64>() / known.len() as f64))
        };
        rewards.push(scores.each.into_iter().filter_map(mean).collect());
        totals.push(scores.total);
    }
    let [first, second, ..] = totals.as_slice() else { return Ok(Default::default()) };
    Ok((first.iter().zip(second).map(|(first, second)| duel::by_score(*first, *second)).collect(), rewards))
}
