//! A model's own answers: how long they are, how often it refuses, how far they are from what its base would say.

use std::sync::LazyLock;
use std::time::Duration;

use candle_core::Result;
use flume::Receiver;
use regex::Regex;
use serde::{Deserialize, Serialize};
use tidemill_engine::{AdapterLease, Engine, Event, FinishReason, Request, RequestId, SamplingParams, SubmitError, Tenant};

use crate::collate::{Completion, Item, Layout, batches, pack};
use crate::parameters::read;
use crate::statistics::{Proportion, quantile};
use crate::train::{Pass, Policy};

/// Rows computed at once.
pub const BUDGET: usize = 4096;
/// Answers asked for at once.
pub const TOGETHER: usize = 16;
/// A step of a large model on a slow machine; longer than this it hangs.
const PATIENCE: Duration = Duration::from_secs(600);

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Whether it ended by itself.
    pub whole: bool,
}

/// How answers are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Temperature; the divergence is defined at 1.
    pub temperature: f32,
    /// Longest answer.
    pub max_tokens: usize,
    /// Of the draws; each prompt has its own.
    pub seed: u64,
}

/// What answers are like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Answers.
    pub answers: u64,
    /// Middle number of words.
    pub median_words: f64,
    /// Mean number of words.
    pub mean_words: f64,
    /// Those that refuse, by their wording.
    pub refusals: Proportion,
    /// Those that the token limit cut off.
    pub truncated: Proportion,
    /// KL(model ‖ base) per token and per answer, in nats, estimated over the model's own answers (k1: Schulman 2020,
    /// "Approximating KL divergence"); absent for the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_per_token: Option<f64>,
    /// The same per answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_per_answer: Option<f64>,
}

/// Why there are no answers.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The engine refused a prompt.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine failed an answer.
    #[error("an answer failed: {0}")]
    Failed(String),
}

/// Answers to `prompts`, in order. The same prompts, sampling and weights give the same answers.
pub fn draw(
    engine: &Engine,
    adapter: Option<&AdapterLease>,
    prompts: &[Vec<u32>],
    sampling: Sampling,
    mut watch: impl FnMut(usize),
) -> std::result::Result<Vec<Answer>, AnswerError> {
    let mut answers = Vec::with_capacity(prompts.len());
    for (group, together) in prompts.chunks(TOGETHER).enumerate() {
        let submit = |(index, prompt): (usize, &Vec<u32>)| {
            let number = (group * TOGETHER + index) as u64;
            engine.submit(Request {
                id: RequestId(u128::from(number)),
                prompt: prompt.clone(),
                sampling: SamplingParams {
                    temperature: sampling.temperature,
                    max_tokens: Some(sampling.max_tokens),
                    seed: Some(sampling.seed.wrapping_add(number)),
                    ..SamplingParams::default()
                },
                priority: 0,
                cache_salt: None,
                adapter: adapter.cloned(),
                tenant: Tenant::default(),
                deadline: None,
            })
        };
        let streams = together.iter().enumerate().map(submit).collect::<std::result::Result<Vec<_>, _>>()?;
        for stream in streams {
            answers.push(collect(&stream)?);
            watch(answers.len());
        }
    }
    Ok(answers)
}

fn collect(stream: &Receiver<Event>) -> std::result::Result<Answer, AnswerError> {
    let mut answer = Answer { text: String::new(), tokens: Vec::new(), whole: false };
    while let Ok(event) = stream.recv_timeout(PATIENCE) {
        match event {
            Event::Token { record, text, .. } => {
                answer.tokens.push(record.token);
                answer.text.push_str(&text);
            }
            Event::Finished { reason, text, .. } => {
                answer.text.push_str(&text);
                answer.whole = reason == FinishReason::Stop;
            }
            Event::Done(_) => return Ok(answer),
            Event::Failed(reason) => return Err(AnswerError::Failed(reason)),
            Event::Expired => return Err(AnswerError::Failed("it took too long".to_owned())),
            Event::Prompt { .. } => {}
        }
    }
    Err(AnswerError::Failed("the engine does not go on".to_owned()))
}

/// Whether an answer refuses, as English assistants word it. A rule of thumb: it finds drift, not guilt.
pub fn refuses(text: &str) -> bool {
    static WORDING: LazyLock<Option<Regex>> = LazyLock::new(|| {
        let openings = r"(?i)^\W*(?:i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|unfortunately,? i|as an ai\b)";
        let denials =
            r"(?i)\bi (?:can['’]?t|cannot|can not|won['’]?t|am unable to|am not able to|['’]m unable to|['’]m not able to)\b";
        Regex::new(&format!("{openings}|{denials}")).ok()
    });
    // Later in a long answer such words are about something else.
    let beginning: String = text.chars().take(200).collect();
    WORDING.as_ref().is_some_and(|wording| wording.is_match(&beginning))
}

/// What the answers are like. None without any.
pub fn drift(answers: &[Answer], kl: Option<(f64, f64)>) -> Option<Drift> {
    let count = answers.len() as u64;
    let mut words: Vec<f64> = answers.iter().map(|answer| answer.text.split_whitespace().count() as f64).collect();
    words.sort_by(f64::total_cmp);
    let share =
        |test: &dyn Fn(&Answer) -> bool| Proportion::new(answers.iter().filter(|answer| test(answer)).count() as u64, count);
    Some(Drift {
        answers: count,
        median_words: quantile(&words, 0.5)?,
        mean_words: words.iter().sum::<f64>() / count as f64,
        refusals: share(&|answer| refuses(&answer.text))?,
        truncated: share(&|answer| !answer.whole)?,
        kl_per_token: kl.map(|(token, _)| token),
        kl_per_answer: kl.map(|(_, answer)| answer),
    })
}

/// KL(model ‖ base) over the model's own answers at temperature 1: per token and per answer.
pub fn divergence(model: &dyn Policy, prompts: &[Vec<u32>], answers: &[Answer]) -> Result<Option<(f64, f64)>> {
    let completions: Vec<Vec<Completion>> =
        answers.iter().map(|answer| vec![Completion { tokens: answer.tokens.clone(), learnt: None }]).collect();
    let layout = Layout { share_prompt: false, last_row: false };
    let items: Vec<Item<'_>> = prompts
        .iter()
        .zip(&completions)
        .enumerate()
        .filter(|(_, (prompt, completions))| !prompt.is_empty() && !completions[0].tokens.is_empty())
        .map(|(sample, (prompt, completions))| Item { sample, prompt, completions })
        .collect();
    let sizes: Vec<usize> = items.iter().map(|item| item.rows(layout)).collect();
    let (mut sum, mut tokens) = (0.0, 0);
    for batch in batches(&sizes, BUDGET) {
        let micro = pack(batch.iter().map(|place| items[*place]), layout);
        let total = |pass| {
            let log_probs = model.log_probs(&micro.batch, pass)?;
            read(&log_probs, |values| values.iter().map(|value| f64::from(*value)).sum::<f64>())
        };
        sum += total(Pass::EVALUATE)? - total(Pass::REFERENCE)?;
        tokens += micro.batch.labels.len();
    }
    Ok((tokens > 0).then(|| (sum / tokens as f64, sum / items.len() as f64)))
}
