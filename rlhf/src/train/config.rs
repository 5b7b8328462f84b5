//! What a training is told, under TRL's and transformers' names and with their defaults.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

mod check;
mod defaults;
mod online;
#[cfg(test)]
mod tests;

pub use online::{Advantages, Algorithm, Correction, CorrectionMode, Draw, Reinforcement, RewardScale};

use super::TrainError;
use crate::{
    collate::{Caps, EncodeOptions, Plan, Teaches, Truncation},
    loss::PairLoss,
    optimizer::{AdamW, Schedule, SchedulerType},
    reward::RewardFunction,
};

/// The trainers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Supervised fine-tuning: imitate answers.
    Sft,
    /// A reward model from comparisons.
    Reward,
    /// Direct preference optimisation from comparisons.
    Dpo,
    /// From answers judged by themselves.
    Kto,
    /// Odds-ratio preference optimisation: imitation and comparison at once, without a reference.
    Orpo,
    /// Comparison by mean log-probabilities, without a reference.
    Simpo,
    /// Answers that the model samples are compared with others to the same prompt by their rewards, whole answers at a time.
    Rloo,
    /// The same by rewards relative to their group, token by token.
    Grpo,
    /// The same with a learnt estimate of what rewards to expect.
    Ppo,
}

impl Method {
    /// Whether it learns from answers that the model samples while it is trained, not from a dataset's.
    pub fn samples(self) -> bool {
        matches!(self, Self::Rloo | Self::Grpo | Self::Ppo)
    }
}

/// DPO's and GRPO's losses, under TRL's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// The original; with `label_smoothing` the conservative one (cDPO).
    #[default]
    Sigmoid,
    /// SLiC's hinge.
    Hinge,
    /// A squared distance to a margin, per token.
    Ipo,
    /// Unbiased when `label_smoothing` of the labels are wrong.
    Robust,
    /// The original, per token.
    SigmoidNorm,
    /// Anchored: raises the chosen and lowers the rejected answer, each by itself.
    ApoZero,
    /// GRPO: every token of the step counts alike. Its default. Over a whole step TRL's `bnpo` is the same.
    #[serde(alias = "bnpo")]
    Dapo,
    /// GRPO: every answer counts alike, however long.
    Grpo,
    /// GRPO: every token counts one part of `max_completion_length`, whatever the answers' lengths.
    DrGrpo,
}

/// Everything that a training is told. Fields that only some methods use are refused by the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Which trainer.
    pub method: Method,

    /// Peak learning rate. Default: sft 2e-5, reward 1e-4, ppo 3e-6, the others 1e-6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// How the learning rate changes over the steps.
    #[serde(default)]
    pub lr_scheduler_type: SchedulerType,
    /// Steps over which it rises from 0.
    #[serde(default)]
    pub warmup_steps: u64,
    /// The same as a share of all steps; used when `warmup_steps` is 0.
    #[serde(default)]
    pub warmup_ratio: f64,
    /// AdamW's decay of parameters.
    #[serde(default)]
    pub weight_decay: f64,
    /// AdamW's decay of the mean of gradients.
    #[serde(default = "defaults::adam_beta1")]
    pub adam_beta1: f64,
    /// AdamW's decay of the mean of squared gradients.
    #[serde(default = "defaults::adam_beta2")]
    pub adam_beta2: f64,
    /// Added to AdamW's denominator.
    #[serde(default = "defaults::adam_epsilon")]
    pub adam_epsilon: f64,
    /// Longest gradient; longer ones are shortened to it. 0 for no limit.
    #[serde(default = "defaults::max_grad_norm")]
    pub max_grad_norm: f64,

    /// Rows of a batch; of methods that sample, answers. A step takes this times `gradient_accumulation_steps`; how many are computed at once is up to
    /// `tokens_per_batch` and changes nothing but memory and speed.
    #[serde(default = "defaults::per_device_train_batch_size")]
    pub per_device_train_batch_size: usize,
    /// Batches of a step. Losses are normalised over the whole step.
    #[serde(default = "defaults::gradient_accumulation_steps")]
    pub gradient_accumulation_steps: usize,
    /// Tokens that are computed at once; a longer row is computed alone.
    #[serde(default = "defaults::tokens_per_batch")]
    pub tokens_per_batch: usize,
    /// How often each row is seen.
    #[serde(default = "defaults::num_train_epochs")]
    pub num_train_epochs: f64,
    /// Steps, in place of epochs; −1 for epochs.
    #[serde(default = "defaults::max_steps")]
    pub max_steps: i64,
    /// Of the order of rows, of dropout, and of a new reward head.
    #[serde(default = "defaults::seed")]
    pub seed: u64,
    /// Another order of rows in each epoch; otherwise that of the dataset.
    #[serde(default = "defaults::yes")]
    pub shuffle: bool,

    /// Most tokens of a prompt with a completion; null for no limit. Methods that sample leave out prompts that would not fit.
    #[serde(default = "defaults::max_length")]
    pub max_length: Option<usize>,
    /// What gives way above it.
    #[serde(default)]
    pub truncation_mode: Truncation,
    /// More variables for the chat template.
    #[serde(default)]
    pub chat_template_kwargs: Map<String, Value>,
    /// Switch the adapter's dropout off. Default: off for sft, on for the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disable_dropout: Option<bool>,

    /// Steps between lines of metrics.
    #[serde(default = "defaults::logging_steps")]
    pub logging_steps: u64,
    /// Steps between evaluations on held-out rows; without it, one at the end of each epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<u64>,
    /// Steps between checkpoints.
    #[serde(default = "defaults::save_steps")]
    pub save_steps: u64,
    /// Checkpoints that are kept, the best and the last among them; null for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<usize>,
    /// Go back to the best checkpoint in the end.
    #[serde(default)]
    pub load_best_model_at_end: bool,
    /// The metric of the evaluation that says which is best. Methods that sample take `eval_reward` where this is `eval_loss`.
    #[serde(default = "defaults::metric_for_best_model")]
    pub metric_for_best_model: String,
    /// Whether more of it is better. Default: not for a loss, otherwise yes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub greater_is_better: Option<bool>,
    /// Evaluations without a better metric after which training ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<u64>,
    /// What counts as better: by more than this.
    #[serde(default)]
    pub early_stopping_threshold: f64,

    /// dpo, kto, orpo: how strongly the policy is held to the reference, or the weight of the comparison; default 0.1. simpo: the scale
    /// of rewards; default 2. rloo: price of divergence from the reference within the reward; default 0.05. grpo: its price in the loss;
    /// default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// dpo: which loss; default sigmoid. grpo: default dapo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_type: Option<LossType>,
    /// dpo with sigmoid or robust: share of labels taken to be wrong, below 0.5; default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f64>,
    /// dpo: weight of imitating the chosen answers beside it; default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_alpha: Option<f64>,
    /// dpo, kto: compute the reference's log-probabilities once and keep them; default true. Off only to measure what it is worth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precompute_ref_log_probs: Option<bool>,
    /// kto: weight of good answers; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desirable_weight: Option<f64>,
    /// kto: weight of bad answers; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undesirable_weight: Option<f64>,
    /// simpo: margin between the rewards; default 0.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub simpo_gamma: Option<f64>,
    /// reward: pulls the mean of the two rewards towards 0; default off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub center_rewards_coefficient: Option<f64>,
    /// sft: learn every turn of the assistant, those in the prompt too; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assistant_only_loss: Option<bool>,

    /// rloo, grpo, ppo: what answers are rewarded for; at least one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reward_funcs: Vec<RewardFunction>,
    /// rloo, grpo, ppo: factor of each reward in the sum; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_weights: Option<Vec<f64>>,
    /// rloo, grpo: answers to each prompt, which are compared with one another; default 2 and 8. It divides the answers of a step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_generations: Option<usize>,
    /// rloo, grpo, ppo: answers to each prompt of an evaluation; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_generations_eval: Option<usize>,
    /// rloo, grpo, ppo: most tokens of an answer; default 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_completion_length: Option<usize>,
    /// rloo, grpo, ppo: of sampling, and of the policy whose log-probabilities are taken; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// rloo, grpo, ppo: sample among the likeliest tokens that have this much of the probability; default 1, off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// rloo, grpo, ppo: sample among so many likeliest tokens; default 0, off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// rloo, grpo, ppo: sample among tokens at least so likely as this share of the likeliest; default 0, off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// rloo, grpo: steps that learn from the same answers; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_iterations: Option<usize>,
    /// rloo, grpo: how far below 1 the ratio of new to old probability may go before it earns nothing more; default 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// rloo, grpo: how far above 1; default `epsilon`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epsilon_high: Option<f64>,
    /// grpo: what advantages are divided by: the deviation of rewards in the group, over the whole step, or nothing. Default group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_rewards: Option<RewardScale>,
    /// rloo: shift and scale advantages over the step to mean 0 and deviation 1; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalize_advantages: Option<bool>,
    /// grpo: learn nothing from answers that were cut off; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_truncated_completions: Option<bool>,
    /// rloo, grpo, ppo: weigh answers by how likely the trainer finds them beside the sampler, whose arithmetic differs a little; default
    /// true.
    #[serde(default, alias = "vllm_importance_sampling_correction", skip_serializing_if = "Option::is_none")]
    pub importance_sampling_correction: Option<bool>,
    /// How it weighs. Default: rloo sequence_truncate, grpo sequence_mask, ppo token_truncate.
    #[serde(default, alias = "vllm_importance_sampling_mode", skip_serializing_if = "Option::is_none")]
    pub importance_sampling_mode: Option<CorrectionMode>,
    /// The largest weight; default 3.
    #[serde(default, alias = "vllm_importance_sampling_cap", skip_serializing_if = "Option::is_none")]
    pub importance_sampling_cap: Option<f64>,
    /// ppo: how often each batch of answers is learnt from; default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_ppo_epochs: Option<usize>,
    /// ppo: steps that such an epoch is cut into; default 1. So many times more answers are sampled at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_mini_batches: Option<usize>,
    /// ppo: price of divergence from the reference, per nat; default 0.05.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_coef: Option<f64>,
    /// ppo: divergence per answer that the price aims at; without it the price stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_target: Option<f64>,
    /// ppo: answers over which the price follows; default 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_horizon: Option<f64>,
    /// ppo: how far from 1 the ratio of new to old probability may go; default 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cliprange: Option<f64>,
    /// ppo: how far estimates of value may move from those the answers were sampled with; default 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cliprange_value: Option<f64>,
    /// ppo: weight of the values' loss; default 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_coef: Option<f64>,
    /// ppo: what a later reward is worth, per token; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// ppo: how far advantages look ahead before they trust the values; default 0.95.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lam: Option<f64>,
    /// ppo: scale rewards over the step to deviation 1; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whiten_rewards: Option<bool>,
    /// ppo: taken off the reward of an answer that was cut off; default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_eos_penalty: Option<f64>,

    /// Factor of rows by who judged them; 1 for those not named.
    #[serde(default)]
    pub rater_weights: BTreeMap<String, f64>,
    /// Factor of rows by whose request it was.
    #[serde(default)]
    pub user_weights: BTreeMap<String, f64>,
    /// Largest share of the loss that one rater may have; null for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rater_share: Option<f64>,
    /// Largest share of the loss that one user may have; null for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_user_share: Option<f64>,
}

/// What a step minimises, with its constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Mean negative log-probability per token.
    Sft,
    /// Bradley-Terry.
    Reward {
        /// Pulls the sum of the two rewards towards 0.
        centring: f64,
    },
    /// The DPO family.
    Dpo {
        /// Which of it.
        loss: PairLoss,
        /// Hold to the reference.
        beta: f64,
        /// Weight of imitating the chosen answer.
        imitate: f64,
    },
    /// KTO.
    Kto {
        /// Hold to the reference.
        beta: f64,
        /// Weight of good answers.
        desirable: f64,
        /// Weight of bad answers.
        undesirable: f64,
    },
    /// ORPO.
    Orpo {
        /// Weight of the comparison.
        beta: f64,
    },
    /// SimPO.
    Simpo {
        /// Scale of rewards.
        beta: f64,
        /// Margin.
        gamma: f64,
    },
}

impl TrainConfig {
    /// A method with its defaults.
    pub fn new(method: Method) -> Self {
        // Every other field has a default, so this cannot fail.
        let fields = serde_json::json!({ "method": method });
        serde_json::from_value(fields).unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// Reads a configuration as JSON; the error names the field.
    pub fn from_json(value: Value) -> Result<Self, TrainError> {
        let config: Self = serde_json::from_value(value).map_err(|error| TrainError::Config(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// Checks every field, and says what a method that learns from a dataset minimises.
    pub fn objective(&self) -> Result<Objective, TrainError> {
        self.check_fields()?;
        let beta = |default: f64| self.beta.unwrap_or(default);
        Ok(match self.method {
            Method::Sft => Objective::Sft,
            Method::Reward => Objective::Reward { centring: self.center_rewards_coefficient.unwrap_or(0.0) },
            Method::Dpo => Objective::Dpo { loss: self.pair_loss()?, beta: beta(0.1), imitate: self.rpo_alpha.unwrap_or(0.0) },
            Method::Kto => Objective::Kto {
                beta: beta(0.1),
                desirable: self.desirable_weight.unwrap_or(1.0),
                undesirable: self.undesirable_weight.unwrap_or(1.0),
            },
            Method::Orpo => Objective::Orpo { beta: beta(0.1) },
            Method::Simpo => Objective::Simpo { beta: beta(2.0), gamma: self.simpo_gamma.unwrap_or(0.5) },
            Method::Rloo | Method::Grpo | Method::Ppo => {
                return Err(config(
                    format!("{:?} samples its answers; it does not learn from a dataset's", self.method).to_lowercase(),
                ));
            }
        })
    }

    fn pair_loss(&self) -> Result<PairLoss, TrainError> {
        let (loss_type, epsilon) = (self.loss_type.unwrap_or_default(), self.label_smoothing.unwrap_or(0.0));
        let plain = match loss_type {
            LossType::Sigmoid if epsilon > 0.0 => return Ok(PairLoss::Conservative { epsilon }),
            LossType::Robust => return Ok(PairLoss::Robust { epsilon }),
            LossType::Sigmoid => PairLoss::Sigmoid,
            LossType::Hinge => PairLoss::Hinge,
            LossType::Ipo => PairLoss::Ipo,
            LossType::SigmoidNorm => PairLoss::SigmoidNorm,
            LossType::ApoZero => PairLoss::ApoZero,
            LossType::Dapo | LossType::Grpo | LossType::DrGrpo => {
                return Err(config("loss_type must be one of dpo's: sigmoid, hinge, ipo, robust, sigmoid_norm, apo_zero"));
            }
        };
        if epsilon > 0.0 && plain != PairLoss::Sigmoid {
            return Err(config("label_smoothing is for loss_type sigmoid and robust; leave it out"));
        }
        Ok(plain)
    }

    /// Peak learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(match self.method {
            Method::Sft => 2e-5,
            Method::Reward => 1e-4,
            Method::Ppo => 3e-6,
            Method::Dpo | Method::Kto | Method::Orpo | Method::Simpo | Method::Rloo | Method::Grpo => 1e-6,
        })
    }

    /// Whether the adapter's dropout is on.
    pub fn dropout(&self) -> bool {
        !self.disable_dropout.unwrap_or(self.method != Method::Sft)
    }

    /// The metric that says which evaluation is best. What a method that samples minimises says little, so there it is the reward.
    pub fn best_metric(&self) -> &str {
        let by_default = self.method.samples() && self.metric_for_best_model == defaults::metric_for_best_model();
        if by_default { "eval_reward" } else { &self.metric_for_best_model }
    }

    /// Whether more of the metric is better.
    pub fn greater_is_better(&self) -> bool {
        self.greater_is_better.unwrap_or(!self.best_metric().ends_with("loss"))
    }

    /// AdamW's constants.
    pub fn rule(&self) -> AdamW {
        AdamW { adam_beta1: self.adam_beta1, adam_beta2: self.adam_beta2, adam_epsilon: self.adam_epsilon }
    }

    /// The learning rate's course over `total` steps.
    pub fn schedule(&self, total: u64) -> Schedule {
        let warmup = if self.warmup_steps > 0 { self.warmup_steps } else { (self.warmup_ratio * total as f64).ceil() as u64 };
        Schedule { shape: self.lr_scheduler_type, warmup, total }
    }

    /// The order of `rows` rows.
    pub fn plan(&self, rows: usize) -> Plan {
        Plan {
            rows,
            batch: self.step_rows(),
            epochs: self.num_train_epochs,
            max_steps: u64::try_from(self.max_steps).ok(),
            shuffle: self.shuffle,
            seed: self.seed,
        }
    }

    /// Rows of a step; of methods that sample, answers.
    fn step_rows(&self) -> usize {
        self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps)
    }

    /// How rows become tokens.
    pub fn encoding(&self) -> EncodeOptions {
        EncodeOptions {
            max_length: self.max_length,
            truncation_mode: self.truncation_mode,
            assistant_only_loss: self.assistant_only_loss.unwrap_or(false),
            chat_template_kwargs: self.chat_template_kwargs.clone(),
        }
    }

    /// What of the rows the method learns from; those that sample take the prompts of any.
    pub fn teaches(&self) -> Teaches {
        match self.method {
            Method::Sft | Method::Rloo | Method::Grpo | Method::Ppo => Teaches::Imitation,
            Method::Kto => Teaches::Judgement,
            Method::Reward | Method::Dpo | Method::Orpo | Method::Simpo => Teaches::Comparison,
        }
    }

    /// Bounds of what a person counts.
    pub fn caps(&self) -> Caps {
        Caps {
            rater_weights: self.rater_weights.clone(),
            user_weights: self.user_weights.clone(),
            max_rater_share: self.max_rater_share,
            max_user_share: self.max_user_share,
        }
    }
}

fn config(text: impl Into<String>) -> TrainError {
    TrainError::Config(text.into())
}
