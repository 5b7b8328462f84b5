//! Trainings that sample their answers: the engine beside the model, and the rewards.

use std::sync::Arc;

use tidemill_engine::MemoryReport;

use super::head::{Asked, reward_model};
use super::{Job, JobError};
use crate::batch::Packed;
use crate::collate::Plan;
use crate::model::{Model, ModelOptions, Pass};
use crate::reward::grader::{Grading, Oracle};
use crate::reward::{Judge, RewardError, Rewards, Score};
use crate::train::{ADAPTERS, Advantages, EngineSampler, Online, Reinforcement, TrainConfig, TrainError, sampling};

/// Most tokens of a prompt, so that an answer fits behind it.
pub(super) fn longest_prompt(config: &TrainConfig, context: usize) -> Result<usize, JobError> {
    let told = config.reinforcement()?;
    let whole = config.max_length.unwrap_or(context).min(context);
    let room = whole.checked_sub(told.draw.max_tokens).filter(|room| *room > 0);
    let answer = told.draw.max_tokens;
    let fix = || {
        format!(
            "max_completion_length is {answer}, and with a prompt no more than {whole} tokens fit; lower it, or raise max_length"
        )
    };
    Ok(room.ok_or_else(|| TrainError::Config(fix()))?)
}

/// Steps over so many prompts.
pub(super) fn steps(config: &TrainConfig, told: &Reinforcement, prompts: usize) -> u64 {
    let plan = Plan { batch: told.prompts(), max_steps: None, ..config.plan(prompts) };
    u64::try_from(config.max_steps).unwrap_or(if prompts == 0 { 0 } else { plan.steps().saturating_mul(told.uses()) })
}

impl Job {
    /// The trainer, with an engine of its own over the same base, and the memory that the engine has.
    pub(super) fn online<'a>(&self, model: &'a Model) -> Result<(Online<'a>, MemoryReport), JobError> {
        let (config, spec) = (&self.spec.config, &self.spec);
        let told = config.reinforcement()?;
        let prompts = self.prompts.iter().chain(&self.held_out_prompts);
        let prompt = prompts.map(|prompt| prompt.tokens.len()).max().unwrap_or(1);
        let longest = prompt + told.draw.max_tokens;
        let mut judge = |judge: &Judge| self.judge(model, judge, told.draw.max_tokens);
        let rewards = Rewards::new(&config.reward_funcs, config.reward_weights.as_deref(), &mut judge);
        let rewards = rewards.map_err(TrainError::from)?;
        let name = spec.base.name.clone();
        let adapter = model.adapter(&name)?;
        let sequences = told.group * told.prompts();
        let threads = Some(spec.threads).filter(|threads| *threads > 0);
        let batch = largest(prompt, &told, config.tokens_per_batch);
        let valued: Vec<u32> = match told.advantages {
            Advantages::Estimated { .. } => batch.labels.iter().map(|label| label.row).collect(),
            _ => Vec::new(),
        };
        model.rehearse(&batch, &valued, Pass { dropout: config.dropout().then_some(0), ..Pass::TRAIN })?;
        model.settle();
        let options = sampling(&spec.base.path, sequences, longest, adapter.max_rank(), threads);
        let engine = self.workplace.start(options, model, ADAPTERS * adapter.bytes())?;
        let memory = engine.memory().clone();
        let sampler = EngineSampler::new(engine, move || model.adapter(&name));
        let (prompts, held_out) = (self.prompts.clone(), self.held_out_prompts.clone());
        Ok((Online::new(model, config, prompts, held_out, rewards, sampler)?, memory))
    }

    /// A judge that needs more than the answers' text, which have at most `answer` tokens.
    fn judge(&self, model: &Model, judge: &Judge, answer: usize) -> Result<Box<dyn Score>, RewardError> {
        let options = ModelOptions { threads: self.spec.threads, precision: self.spec.precision, ..ModelOptions::default() };
        let asked = Asked { prompts: &self.prompts, held_out: &self.held_out_prompts, answer };
        judge_of(model, judge, self.oracle.as_ref(), options, &self.spec.config, asked)
    }
}

/// A batch of as many rows and labels as they can have: answers to prompts of at most `prompt` tokens, as many as a turn has and `budget`
/// rows hold. Short answers fill a batch better than those of full length do.
fn largest(prompt: usize, told: &Reinforcement, budget: usize) -> Packed {
    let (answer, sequences) = (told.draw.max_tokens, told.group * told.prompts());
    let longest = prompt + answer;
    let rows = budget.max(longest).min(sequences.saturating_mul(longest));
    Packed::of_size(rows, longest, sequences.saturating_mul(answer))
}

/// A judge ready for work: a reward model must have been trained here, on the base of `model` or whole, and computes beside it; a grader may
/// ask models through `oracle`. A reward model is rehearsed for what is `asked`.
pub(crate) fn judge_of(
    model: &Model,
    judge: &Judge,
    oracle: Option<&Arc<dyn Oracle>>,
    options: ModelOptions,
    config: &TrainConfig,
    asked: Asked<'_>,
) -> Result<Box<dyn Score>, RewardError> {
    let folder = match judge {
        Judge::RewardModel { path } => path,
        Judge::Grader { grader } => {
            return Ok(Box::new(Grading { grader: (**grader).clone(), oracle: oracle.cloned() }));
        }
        other => return other.ready(),
    };
    let wrong = |error: JobError| RewardError::Model { path: folder.clone(), detail: error.to_string() };
    Ok(Box::new(reward_model(model, folder, options, config, asked).map_err(wrong)?))
}
