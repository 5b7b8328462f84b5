//! What methods are told that learn from answers that they sample.

use serde::{Deserialize, Serialize};

use super::{LossType, Method, TrainConfig, config};
use crate::{loss::advantage::AdaptiveKl, reward, train::TrainError};

/// What GRPO divides advantages by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardScale {
    /// The deviation of rewards in the group.
    #[default]
    Group,
    /// Their deviation over the whole step.
    Batch,
    /// 1.
    None,
}

/// How much an answer counts by π_trainer / π_sampler, under TRL's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorrectionMode {
    /// Each token by its own ratio, not above the cap.
    TokenTruncate,
    /// Each token by its own ratio, and not at all above the cap.
    TokenMask,
    /// All tokens by the ratio of the whole answer, not above the cap.
    SequenceTruncate,
    /// All tokens by the ratio of the whole answer, and not at all above the cap.
    SequenceMask,
}

/// A mode with its cap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Correction {
    /// How.
    pub mode: CorrectionMode,
    /// Up to which ratio.
    pub cap: f64,
}

/// How answers are sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Most tokens.
    pub max_tokens: usize,
    /// Above 0.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
}

/// What tells good answers from bad ones, from rewards alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Advantages {
    /// RLOO: the reward, less the price of divergence, less the mean of the group's others.
    LeaveOneOut {
        /// Price of a nat of divergence from the reference.
        beta: f64,
        /// Scale over the step.
        normalize: bool,
    },
    /// GRPO: the reward less the group's mean, scaled.
    Group {
        /// By what.
        scale: RewardScale,
    },
    /// PPO: generalised advantage estimation over a value head.
    Estimated {
        /// Price of divergence from the reference at the start.
        kl: AdaptiveKl,
        /// Whether the price follows its target.
        adaptive: bool,
        /// Discount per token.
        gamma: f64,
        /// Trust in the values.
        lambda: f64,
        /// Scale rewards over the step.
        whiten: bool,
        /// Off the reward of an answer that was cut off.
        missing_eos: f64,
    },
}

/// What a step minimises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Algorithm {
    /// Of whole answers.
    Rloo,
    /// Of tokens, normalised as the loss says, with a price of divergence from the reference.
    Grpo {
        /// One of GRPO's.
        loss: LossType,
        /// The price.
        beta: f64,
    },
    /// Of tokens, with a loss of values beside it.
    Ppo {
        /// How far values may move.
        range: f64,
        /// Weight of their loss.
        weight: f64,
    },
}

/// A method that samples, with all that it is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reinforcement {
    /// What a step minimises.
    pub algorithm: Algorithm,
    /// What it takes for good.
    pub advantages: Advantages,
    /// Answers to each prompt.
    pub group: usize,
    /// Answers to each prompt of an evaluation.
    pub evaluated: usize,
    /// Answers of a step.
    pub answers: usize,
    /// How they are sampled.
    pub draw: Draw,
    /// How often answers are learnt from.
    pub iterations: usize,
    /// Steps that each time is cut into.
    pub mini_batches: usize,
    /// How far below and above 1 the ratio of new to old probability may go.
    pub range: (f64, f64),
    /// Weights for the sampler's difference.
    pub correction: Option<Correction>,
    /// Learn nothing from answers that were cut off.
    pub skip_truncated: bool,
}

impl Reinforcement {
    /// Steps that learn from the same answers.
    pub fn uses(&self) -> u64 {
        self.iterations.saturating_mul(self.mini_batches) as u64
    }

    /// Prompts that are answered at once.
    pub fn prompts(&self) -> usize {
        self.answers.saturating_mul(self.mini_batches) / self.group
    }
}

impl TrainConfig {
    /// Checks every field, and says what a method that samples does.
    pub fn reinforcement(&self) -> Result<Reinforcement, TrainError> {
        self.check_fields()?;
        let (rloo, ppo) = (self.method == Method::Rloo, self.method == Method::Ppo);
        if !self.method.samples() {
            return Err(config(format!("{:?} learns from a dataset; it samples nothing", self.method).to_lowercase()));
        }
        self.check_rewards()?;
        let of_tokens = matches!(self.importance_sampling_mode, Some(CorrectionMode::TokenTruncate | CorrectionMode::TokenMask));
        if rloo && of_tokens {
            return Err(config(
                "importance_sampling_mode must be one of whole answers for rloo: sequence_truncate or sequence_mask",
            ));
        }
        let answers = self.step_rows();
        let mini_batches = self.num_mini_batches.unwrap_or(1);
        let group = self.num_generations.unwrap_or(if ppo {
            1
        } else if rloo {
            2
        } else {
            8
        });
        if !ppo && group < 2 {
            return Err(config("num_generations must be at least 2: answers are compared with others to the same prompt"));
        }
        if !answers.saturating_mul(mini_batches).is_multiple_of(group) {
            return Err(config(format!(
                "the answers of a step, per_device_train_batch_size · gradient_accumulation_steps = {answers}, must be a multiple of \
                 num_generations = {group}"
            )));
        }
        let epsilon = if ppo { self.cliprange.unwrap_or(0.2) } else { self.epsilon.unwrap_or(0.2) };
        Ok(Reinforcement {
            algorithm: self.algorithm()?,
            advantages: self.advantages(),
            group,
            evaluated: self.num_generations_eval.unwrap_or(1),
            answers,
            draw: Draw {
                max_tokens: self.max_completion_length.unwrap_or(256),
                temperature: self.temperature.unwrap_or(1.0) as f32,
                top_p: self.top_p.unwrap_or(1.0) as f32,
                top_k: self.top_k.unwrap_or(0),
                min_p: self.min_p.unwrap_or(0.0) as f32,
            },
            iterations: if ppo { self.num_ppo_epochs.unwrap_or(4) } else { self.num_iterations.unwrap_or(1) },
            mini_batches,
            range: (epsilon, self.epsilon_high.unwrap_or(epsilon)),
            correction: self.correction(),
            skip_truncated: self.mask_truncated_completions.unwrap_or(false),
        })
    }

    fn algorithm(&self) -> Result<Algorithm, TrainError> {
        Ok(match self.method {
            Method::Rloo => Algorithm::Rloo,
            Method::Ppo => Algorithm::Ppo { range: self.cliprange_value.unwrap_or(0.2), weight: self.vf_coef.unwrap_or(0.1) },
            _ => match self.loss_type.unwrap_or(LossType::Dapo) {
                loss @ (LossType::Dapo | LossType::Grpo | LossType::DrGrpo) => {
                    Algorithm::Grpo { loss, beta: self.beta.unwrap_or(0.0) }
                }
                _ => return Err(config("loss_type must be one of grpo's: dapo, grpo, dr_grpo")),
            },
        })
    }

    fn advantages(&self) -> Advantages {
        match self.method {
            Method::Rloo => {
                Advantages::LeaveOneOut { beta: self.beta.unwrap_or(0.05), normalize: self.normalize_advantages.unwrap_or(false) }
            }
            Method::Ppo => Advantages::Estimated {
                kl: AdaptiveKl {
                    coefficient: self.kl_coef.unwrap_or(0.05),
                    target: self.kl_target.unwrap_or(f64::INFINITY),
                    horizon: self.kl_horizon.unwrap_or(10_000.0),
                },
                adaptive: self.kl_target.is_some(),
                gamma: self.gamma.unwrap_or(1.0),
                lambda: self.lam.unwrap_or(0.95),
                whiten: self.whiten_rewards.unwrap_or(false),
                missing_eos: self.missing_eos_penalty.unwrap_or(0.0),
            },
            _ => Advantages::Group { scale: self.scale_rewards.unwrap_or_default() },
        }
    }

    fn correction(&self) -> Option<Correction> {
        let by_default = match self.method {
            Method::Rloo => CorrectionMode::SequenceTruncate,
            Method::Ppo => CorrectionMode::TokenTruncate,
            _ => CorrectionMode::SequenceMask,
        };
        let (mode, cap) = (self.importance_sampling_mode.unwrap_or(by_default), self.importance_sampling_cap.unwrap_or(3.0));
        self.importance_sampling_correction.unwrap_or(true).then_some(Correction { mode, cap })
    }

    fn check_rewards(&self) -> Result<(), TrainError> {
        reward::check(&self.reward_funcs, self.reward_weights.as_deref()).map_err(|error| config(error.to_string()))
    }
}
