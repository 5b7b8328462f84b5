//! What an answer is worth: functions of its text, programs, reward models, and weighted sums of them.
//!
//! A [`RewardFunction`] is configuration; [`Rewards`] are such functions ready to judge. Those that look at the text are pure;
//! [`program`] and [`model`] hold the others, [`grader`] those of OpenAI's API. The same answers get the same rewards, as far as a program keeps to that.

mod error;
mod function;
pub mod grader;
mod json;
pub mod model;
pub mod program;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value};

use crate::dataset::Message;

pub use error::RewardError;
pub use function::{Judge, LengthUnit, RewardFunction};

/// What is judged.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The conversation that it answers.
    pub prompt: &'a [Message],
    /// What else the prompt's row says, as the expected answer.
    pub columns: &'a Map<String, Value>,
    /// Its text, without special tokens.
    pub text: &'a str,
    /// How many tokens were sampled.
    pub tokens: usize,
    /// It ended by itself, and was not cut off.
    pub ended: bool,
}

/// Judges answers. `None` is no opinion, which counts for nothing.
pub trait Score: Send + Sync {
    /// One reward per answer, in order.
    fn score(&self, answers: &[Answer<'_>]) -> Result<Vec<Option<f64>>, RewardError>;

    /// Names by its content what it judges with beside its configuration: a reward model's numbers.
    fn digest(&self) -> Option<String> {
        None
    }
}

struct Weighed {
    name: String,
    weight: f64,
    score: Box<dyn Score>,
}

/// Functions that are ready to judge, with their weights.
pub struct Rewards(Vec<Weighed>);

/// What answers got.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// By function: its name and one reward per answer.
    pub each: Vec<(String, Vec<Option<f64>>)>,
    /// The weighted sum of each answer's rewards; 0 where nobody had an opinion.
    pub total: Vec<f64>,
}

/// Whether functions and weights make sense, each and together; reward models are looked for when they are opened.
pub fn check(functions: &[RewardFunction], weights: Option<&[f64]>) -> Result<(), RewardError> {
    let wrong = |text: String| Err(RewardError::Setting(text));
    if functions.is_empty() {
        return wrong("reward_funcs says what answers are rewarded for; name at least one, as {\"type\": \"json\"}".to_owned());
    }
    if let Some(weights) = weights {
        if weights.len() != functions.len() {
            let (given, needed) = (weights.len(), functions.len());
            return wrong(format!("reward_weights has {given} numbers for {needed} reward_funcs; give one for each"));
        }
        if let Some(bad) = weights.iter().find(|weight| !weight.is_finite()) {
            return wrong(format!("reward_weights must be finite numbers, one is {bad}"));
        }
    }
    let mut names: Vec<&str> = functions.iter().map(RewardFunction::name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return wrong(format!("two reward_funcs are called {}; give each a \"name\" of its own", twice[0]));
    }
    functions.iter().try_for_each(RewardFunction::check)
}

/// Makes a function ready that needs more than the answer's text: [`Judge::RewardModel`] or [`Judge::Grader`].
pub type OpenJudge<'a> = &'a mut dyn FnMut(&Judge) -> Result<Box<dyn Score>, RewardError>;

impl Rewards {
    /// Makes the functions ready; `weights` has one number for each, 1 without. `open` is asked for reward models and
    /// graders.
    pub fn new(functions: &[RewardFunction], weights: Option<&[f64]>, open: OpenJudge<'_>) -> Result<Self, RewardError> {
        let ready = |(index, function): (usize, &RewardFunction)| {
            let weight = weights.and_then(|weights| weights.get(index)).copied().unwrap_or(1.0);
            let score = match &function.judge {
                judge @ (Judge::RewardModel { .. } | Judge::Grader { .. }) => open(judge)?,
                judge => judge.ready()?,
            };
            Ok::<_, RewardError>(Weighed { name: function.name().to_owned(), weight, score })
        };
        Ok(Self(functions.iter().enumerate().map(ready).collect::<Result<_, _>>()?))
    }

    /// Functions of one's own: their names, weights, and what they do.
    pub fn of(functions: impl IntoIterator<Item = (String, f64, Box<dyn Score>)>) -> Self {
        Self(functions.into_iter().map(|(name, weight, score)| Weighed { name, weight, score }).collect())
    }

    /// The contents that functions judge with beside their configuration, by the functions' names.
    pub fn digests(&self) -> BTreeMap<String, String> {
        self.0.iter().filter_map(|weighed| Some((weighed.name.clone(), weighed.score.digest()?))).collect()
    }

    /// Judges answers. A reward that is no number is an error: it would spoil the model.
    pub fn score(&self, answers: &[Answer<'_>]) -> Result<Scores, RewardError> {
        let mut scores = Scores { each: Vec::with_capacity(self.0.len()), total: vec![0.0; answers.len()] };
        for Weighed { name, weight, score } in &self.0 {
            let found = score.score(answers)?;
            if let Some(bad) = found.iter().flatten().find(|reward| !reward.is_finite()) {
                return Err(RewardError::NotFinite { name: name.clone(), reward: *bad });
            }
            for (total, reward) in scores.total.iter_mut().zip(&found) {
                *total += weight * reward.unwrap_or(0.0);
            }
            scores.each.push((name.clone(), found));
        }
        if !answers.is_empty() && scores.each.iter().all(|(_, rewards)| rewards.iter().all(Option::is_none)) {
            return Err(RewardError::NoOpinion);
        }
        Ok(scores)
    }
}

/// What `judge` says of each answer, in order; up to `threads` are judged at once.
fn in_parallel<T: Send>(answers: &[Answer<'_>], threads: usize, judge: impl Fn(&Answer<'_>) -> T + Sync) -> Vec<T> {
    if threads <= 1 || answers.len() <= 1 {
        return answers.iter().map(judge).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut found = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(answer) = answers.get(index) else { return found };
            found.push((index, judge(answer)));
        }
    };
    let mut found: Vec<(usize, T)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads.min(answers.len())).map(|_| scope.spawn(work)).collect();
        let mut found = work();
        for worker in workers {
            found.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        found
    });
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().map(|(_, said)| said).collect()
}
