//! What a training is told, under TRL's and transformers' names and with their defaults.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::TrainError;
use crate::{
    collate::{Caps, EncodeOptions, Plan, Teaches, Truncation},
    loss::PairLoss,
    optimizer::{AdamW, Schedule, SchedulerType},
};

/// The trainers that learn from a dataset.
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
}

/// DPO's losses, under TRL's names.
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
}

/// Everything that a training is told. Fields that only some methods use are refused by the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Which trainer.
    pub method: Method,

    /// Peak learning rate. Default: sft 2e-5, reward 1e-4, the others 1e-6.
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

    /// Rows of a batch. A step takes this times `gradient_accumulation_steps`; how many are computed at once is up to
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

    /// Most tokens of a prompt with a completion; null for no limit.
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
    /// The metric of the evaluation that says which is best.
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
    /// of rewards; default 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// dpo: which loss; default sigmoid.
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

mod defaults {
    pub(super) fn adam_beta1() -> f64 {
        0.9
    }
    pub(super) fn adam_beta2() -> f64 {
        0.999
    }
    pub(super) fn adam_epsilon() -> f64 {
        1e-8
    }
    pub(super) fn max_grad_norm() -> f64 {
        1.0
    }
    pub(super) fn per_device_train_batch_size() -> usize {
        8
    }
    pub(super) fn gradient_accumulation_steps() -> usize {
        1
    }
    pub(super) fn tokens_per_batch() -> usize {
        4096
    }
    pub(super) fn num_train_epochs() -> f64 {
        3.0
    }
    pub(super) fn max_steps() -> i64 {
        -1
    }
    pub(super) fn seed() -> u64 {
        42
    }
    pub(super) fn yes() -> bool {
        true
    }
    pub(super) fn max_length() -> Option<usize> {
        Some(1024)
    }
    pub(super) fn logging_steps() -> u64 {
        10
    }
    pub(super) fn save_steps() -> u64 {
        500
    }
    pub(super) fn metric_for_best_model() -> String {
        "eval_loss".to_owned()
    }
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
        config.objective()?;
        Ok(config)
    }

    /// Checks every field, and says what is minimised.
    pub fn objective(&self) -> Result<Objective, TrainError> {
        self.check_ranges()?;
        self.check_belonging()?;
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
        };
        if epsilon > 0.0 && plain != PairLoss::Sigmoid {
            return Err(config("label_smoothing is for loss_type sigmoid and robust; leave it out"));
        }
        Ok(plain)
    }

    fn check_ranges(&self) -> Result<(), TrainError> {
        let positive = [
            ("learning_rate", self.learning_rate()),
            ("adam_epsilon", self.adam_epsilon),
            ("num_train_epochs", self.num_train_epochs),
            ("beta", self.beta.unwrap_or(1.0)),
            ("per_device_train_batch_size", self.per_device_train_batch_size as f64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as f64),
            ("tokens_per_batch", self.tokens_per_batch as f64),
            ("logging_steps", self.logging_steps as f64),
            ("save_steps", self.save_steps as f64),
            ("eval_steps", self.eval_steps.unwrap_or(1) as f64),
            ("save_total_limit", self.save_total_limit.unwrap_or(1) as f64),
            ("early_stopping_patience", self.early_stopping_patience.unwrap_or(1) as f64),
            ("max_rater_share", self.max_rater_share.unwrap_or(1.0)),
            ("max_user_share", self.max_user_share.unwrap_or(1.0)),
        ];
        for (name, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(config(format!("{name} must be above 0, it is {value}")));
            }
        }
        let weights = [("rater_weights", &self.rater_weights), ("user_weights", &self.user_weights)];
        let weights = weights.into_iter().flat_map(|(name, weights)| weights.values().map(move |weight| (name, *weight)));
        let not_negative = [
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("early_stopping_threshold", self.early_stopping_threshold),
            ("rpo_alpha", self.rpo_alpha.unwrap_or(0.0)),
            ("desirable_weight", self.desirable_weight.unwrap_or(0.0)),
            ("undesirable_weight", self.undesirable_weight.unwrap_or(0.0)),
            ("simpo_gamma", self.simpo_gamma.unwrap_or(0.0)),
            ("center_rewards_coefficient", self.center_rewards_coefficient.unwrap_or(0.0)),
        ];
        for (name, value) in not_negative.into_iter().chain(weights) {
            if !(value.is_finite() && value >= 0.0) {
                return Err(config(format!("{name} must be 0 or above, it is {value}")));
            }
        }
        let below = [
            ("adam_beta1", self.adam_beta1, 1.0),
            ("adam_beta2", self.adam_beta2, 1.0),
            ("warmup_ratio", self.warmup_ratio, 1.0),
            ("label_smoothing", self.label_smoothing.unwrap_or(0.0), 0.5),
        ];
        for (name, value, limit) in below {
            if !(0.0..limit).contains(&value) {
                return Err(config(format!("{name} must be at least 0 and below {limit}, it is {value}")));
            }
        }
        if self.max_length.is_some_and(|length| length < 2) {
            return Err(config("max_length must leave room for a prompt and a completion: at least 2, or null"));
        }
        if self.max_steps < -1 || self.max_steps == 0 {
            return Err(config(format!("max_steps must be above 0, or -1 for epochs; it is {}", self.max_steps)));
        }
        Ok(())
    }

    fn check_belonging(&self) -> Result<(), TrainError> {
        use Method::{Dpo, Kto, Orpo, Reward, Sft, Simpo};
        let fields: [(&str, bool, &[Method]); 10] = [
            ("beta", self.beta.is_some(), &[Dpo, Kto, Orpo, Simpo]),
            ("loss_type", self.loss_type.is_some(), &[Dpo]),
            ("label_smoothing", self.label_smoothing.is_some(), &[Dpo]),
            ("rpo_alpha", self.rpo_alpha.is_some(), &[Dpo]),
            ("precompute_ref_log_probs", self.precompute_ref_log_probs.is_some(), &[Dpo, Kto]),
            ("desirable_weight", self.desirable_weight.is_some(), &[Kto]),
            ("undesirable_weight", self.undesirable_weight.is_some(), &[Kto]),
            ("simpo_gamma", self.simpo_gamma.is_some(), &[Simpo]),
            ("center_rewards_coefficient", self.center_rewards_coefficient.is_some(), &[Reward]),
            ("assistant_only_loss", self.assistant_only_loss.is_some(), &[Sft]),
        ];
        match fields.into_iter().find(|(_, given, methods)| *given && !methods.contains(&self.method)) {
            Some((name, ..)) => Err(config(format!("{name} is not used by {:?}; leave it out", self.method).to_lowercase())),
            None => Ok(()),
        }
    }

    /// Peak learning rate.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate.unwrap_or(match self.method {
            Method::Sft => 2e-5,
            Method::Reward => 1e-4,
            Method::Dpo | Method::Kto | Method::Orpo | Method::Simpo => 1e-6,
        })
    }

    /// Whether the adapter's dropout is on.
    pub fn dropout(&self) -> bool {
        !self.disable_dropout.unwrap_or(self.method != Method::Sft)
    }

    /// Whether more of the metric is better.
    pub fn greater_is_better(&self) -> bool {
        self.greater_is_better.unwrap_or(!self.metric_for_best_model.ends_with("loss"))
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
            batch: self.per_device_train_batch_size * self.gradient_accumulation_steps,
            epochs: self.num_train_epochs,
            max_steps: u64::try_from(self.max_steps).ok(),
            shuffle: self.shuffle,
            seed: self.seed,
        }
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

    /// What of the rows the method learns from.
    pub fn teaches(&self) -> Teaches {
        match self.method {
            Method::Sft => Teaches::Imitation,
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_method_alone_is_a_configuration_with_the_fields_own_defaults() {
        let config = TrainConfig::from_json(json!({"method": "dpo"})).unwrap();
        assert_eq!((config.learning_rate(), config.dropout(), config.max_length), (1e-6, false, Some(1024)));
        let expected = Objective::Dpo { loss: PairLoss::Sigmoid, beta: 0.1, imitate: 0.0 };
        assert_eq!(config.objective().unwrap(), expected);
        assert_eq!(TrainConfig::new(Method::Dpo), config);
        assert!(TrainConfig::new(Method::Sft).dropout());
        let again = TrainConfig::from_json(serde_json::to_value(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn losses_have_trls_names() {
        let loss = |name: &str, epsilon: f64| {
            let fields = json!({"method": "dpo", "loss_type": name, "label_smoothing": epsilon});
            match TrainConfig::from_json(fields).unwrap().objective().unwrap() {
                Objective::Dpo { loss, .. } => loss,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(loss("sigmoid", 0.1), PairLoss::Conservative { epsilon: 0.1 });
        assert_eq!(loss("robust", 0.1), PairLoss::Robust { epsilon: 0.1 });
        let plain = [
            ("hinge", PairLoss::Hinge),
            ("ipo", PairLoss::Ipo),
            ("sigmoid_norm", PairLoss::SigmoidNorm),
            ("apo_zero", PairLoss::ApoZero),
        ];
        for (name, expected) in plain {
            assert_eq!(loss(name, 0.0), expected);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (fields, expected) in [
            (json!({"method": "dpo", "betta": 0.1}), "unknown field `betta`"),
            (json!({"method": "ppo"}), "unknown variant `ppo`"),
            (json!({"beta": 0.1}), "missing field `method`"),
            (json!({"method": "sft", "beta": 0.1}), "beta is not used by sft; leave it out"),
            (json!({"method": "dpo", "beta": 0}), "beta must be above 0, it is 0"),
            (
                json!({"method": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}),
                "label_smoothing is for loss_type sigmoid and robust",
            ),
            (json!({"method": "dpo", "label_smoothing": 0.5}), "label_smoothing must be at least 0 and below 0.5"),
            (json!({"method": "sft", "max_steps": 0}), "max_steps must be above 0, or -1 for epochs"),
            (json!({"method": "sft", "learning_rate": -1.0}), "learning_rate must be above 0"),
            (json!({"method": "sft", "rater_weights": {"r": -1.0}}), "rater_weights must be 0 or above"),
            (json!({"method": "sft", "max_length": 1}), "max_length must leave room"),
        ] {
            let error = TrainConfig::from_json(fields).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn warm_up_is_given_in_steps_or_as_a_share() {
        let mut config = TrainConfig { warmup_ratio: 0.1, ..TrainConfig::new(Method::Sft) };
        assert_eq!(config.schedule(25).warmup, 3);
        config.warmup_steps = 7;
        assert_eq!(config.schedule(25).warmup, 7);
    }
}
