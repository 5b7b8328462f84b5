//! Trainings that sample their answers: the engine beside the model, and the rewards.

use std::sync::Arc;

use tidemill_engine::ModelFiles;

use super::head::reward_model;
use super::{Job, JobError};
use crate::collate::Plan;
use crate::model::{Model, ModelOptions};
use crate::reward::grader::{Grading, Oracle};
use crate::reward::{Judge, RewardError, Rewards, Score};
use crate::train::{EngineSampler, Online, Reinforcement, TrainConfig, TrainError, engine_for};

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
    /// The trainer, with an engine of its own over the same base.
    pub(super) fn online<'a>(&self, model: &'a Model) -> Result<Online<'a>, JobError> {
        let (config, spec) = (&self.spec.config, &self.spec);
        let told = config.reinforcement()?;
        let rewards = Rewards::new(&config.reward_funcs, config.reward_weights.as_deref(), &mut |judge| self.judge(judge));
        let rewards = rewards.map_err(TrainError::from)?;
        let name = spec.base.name.clone();
        let rank = model.adapter(&name)?.max_rank();
        let prompts = self.prompts.iter().chain(&self.held_out_prompts);
        let longest = prompts.map(|prompt| prompt.tokens.len()).max().unwrap_or(1) + told.draw.max_tokens;
        let sequences = told.group * told.prompts();
        let threads = Some(spec.threads).filter(|threads| *threads > 0);
        let engine = engine_for(&spec.base.path, sequences, longest, rank, threads)?;
        let sampler = EngineSampler::new(engine, move || model.adapter(&name));
        Ok(Online::new(model, config, self.prompts.clone(), self.held_out_prompts.clone(), rewards, sampler)?)
    }

    /// A judge that needs more than the answers' text.
    fn judge(&self, judge: &Judge) -> Result<Box<dyn Score>, RewardError> {
        let options = ModelOptions { threads: self.spec.threads, precision: self.spec.precision, ..ModelOptions::default() };
        judge_of(&self.files, judge, self.oracle.as_ref(), options, &self.spec.config)
    }
}

/// A judge ready for work: a reward model must have been trained here, on the same base or whole, a grader may ask models through `oracle`.
pub(crate) fn judge_of(
    files: &Arc<ModelFiles>,
    judge: &Judge,
    oracle: Option<&Arc<dyn Oracle>>,
    options: ModelOptions,
    config: &TrainConfig,
) -> Result<Box<dyn Score>, RewardError> {
    let folder = match judge {
        Judge::RewardModel { path } => path,
        Judge::Grader { grader } => {
            return Ok(Box::new(Grading { grader: (**grader).clone(), oracle: oracle.cloned() }));
        }
        other => return other.ready(),
    };
    let wrong = |error: JobError| RewardError::Model { path: folder.clone(), detail: error.to_string() };
    Ok(Box::new(reward_model(files, folder, options, config).map_err(wrong)?))
}
