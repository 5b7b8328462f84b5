//! Trainings that sample their answers: the engine beside the model, and the rewards.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Var};
use tidemill_engine::Adapter;

use super::run::HEAD;
use super::{Job, JobError};
use crate::collate::Plan;
use crate::model::{Model, ModelOptions};
use crate::parameters::Parameter;
use crate::reward::model::RewardModel;
use crate::reward::{RewardError, Rewards, Score};
use crate::tensors::Lists;
use crate::train::{EngineSampler, Head, Online, Reinforcement, TrainConfig, TrainError, engine_for};

/// The name of a reward head's tensor.
const WEIGHT: &str = "score.weight";

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
    u64::try_from(config.max_steps).unwrap_or(if prompts == 0 { 0 } else { plan.steps() * told.uses() })
}

impl Job {
    /// The trainer, with an engine of its own over the same base.
    pub(super) fn online<'a>(&self, model: &'a Model) -> Result<Online<'a>, JobError> {
        let (config, spec) = (&self.spec.config, &self.spec);
        let told = config.reinforcement()?;
        let rewards =
            Rewards::new(&config.reward_funcs, config.reward_weights.as_deref(), &mut |folder| self.reward_model(folder));
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

    /// A reward model that was trained here on the same base.
    fn reward_model(&self, folder: &Path) -> Result<Box<dyn Score>, RewardError> {
        let wrong = |detail: String| RewardError::Model { path: folder.to_owned(), detail };
        let adapter = Adapter::read(folder).map_err(|error| wrong(error.to_string()))?;
        let path = folder.join(HEAD);
        let bytes = std::fs::read(&path).map_err(|error| {
            wrong(format!("{HEAD} cannot be read ({error}); name the adapter's folder of a training with the method reward"))
        })?;
        let width = self.files.config().hidden;
        let values = Lists::read(&bytes).and_then(|lists| lists.get(WEIGHT, width)).map_err(|error| wrong(error.to_string()))?;
        let var = Var::from_vec(values, width, &Device::Cpu)?;
        let options = ModelOptions { threads: self.spec.threads, precision: self.spec.precision, recompute: false };
        let model = Model::with_adapter(Arc::clone(&self.files), &adapter, options)?;
        Ok(Box::new(RewardModel {
            model: Box::new(model),
            head: Head { weight: Parameter { name: WEIGHT.to_owned(), var } },
            files: Arc::clone(&self.files),
            encoding: self.spec.config.encoding(),
            budget: self.spec.config.tokens_per_batch,
        }))
    }
}
