//! Whether what a training is told makes sense.

use super::{Method, TrainConfig, config};
use crate::train::TrainError;

impl TrainConfig {
    /// Checks every field.
    pub fn check(&self) -> Result<(), TrainError> {
        if self.method.samples() { self.reinforcement().map(drop) } else { self.objective().map(drop) }
    }

    pub(super) fn check_fields(&self) -> Result<(), TrainError> {
        self.check_ranges()?;
        self.check_belonging()
    }

    fn check_ranges(&self) -> Result<(), TrainError> {
        let positive = [
            ("learning_rate", self.learning_rate()),
            ("adam_epsilon", self.adam_epsilon),
            ("num_train_epochs", self.num_train_epochs),
            // Of a method that samples it is a price, and may be nothing.
            ("beta", if self.method.samples() { 1.0 } else { self.beta.unwrap_or(1.0) }),
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
            ("num_generations", self.num_generations.unwrap_or(1) as f64),
            ("num_generations_eval", self.num_generations_eval.unwrap_or(1) as f64),
            ("max_completion_length", self.max_completion_length.unwrap_or(1) as f64),
            ("temperature", self.temperature.unwrap_or(1.0)),
            ("top_p", self.top_p.unwrap_or(1.0)),
            ("num_iterations", self.num_iterations.unwrap_or(1) as f64),
            ("epsilon", self.epsilon.unwrap_or(1.0)),
            ("epsilon_high", self.epsilon_high.unwrap_or(1.0)),
            ("importance_sampling_cap", self.importance_sampling_cap.unwrap_or(1.0)),
            ("num_ppo_epochs", self.num_ppo_epochs.unwrap_or(1) as f64),
            ("num_mini_batches", self.num_mini_batches.unwrap_or(1) as f64),
            ("kl_target", self.kl_target.unwrap_or(1.0)),
            ("kl_horizon", self.kl_horizon.unwrap_or(1.0)),
            ("cliprange", self.cliprange.unwrap_or(1.0)),
            ("cliprange_value", self.cliprange_value.unwrap_or(1.0)),
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
            ("beta", self.beta.unwrap_or(0.0)),
            ("kl_coef", self.kl_coef.unwrap_or(0.0)),
            ("vf_coef", self.vf_coef.unwrap_or(0.0)),
            ("missing_eos_penalty", self.missing_eos_penalty.unwrap_or(0.0)),
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
        let at_most = [
            ("temperature", self.temperature, 2.0),
            ("top_p", self.top_p, 1.0),
            ("min_p", self.min_p, 1.0),
            ("gamma", self.gamma, 1.0),
            ("lam", self.lam, 1.0),
        ];
        for (name, value, limit) in at_most {
            if value.is_some_and(|value| !(0.0..=limit).contains(&value)) {
                return Err(config(format!(
                    "{name} must be at least 0 and at most {limit}, it is {}",
                    value.unwrap_or_default()
                )));
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
        use Method::{Dpo, Grpo, Kto, Orpo, Ppo, Reward, Rloo, Sft, Simpo};
        const SAMPLE: &[Method] = &[Rloo, Grpo, Ppo];
        const GROUPS: &[Method] = &[Rloo, Grpo];
        let fields: [(&str, bool, &[Method]); 40] = [
            ("beta", self.beta.is_some(), &[Dpo, Kto, Orpo, Simpo, Rloo, Grpo]),
            ("loss_type", self.loss_type.is_some(), &[Dpo, Grpo]),
            ("label_smoothing", self.label_smoothing.is_some(), &[Dpo]),
            ("rpo_alpha", self.rpo_alpha.is_some(), &[Dpo]),
            ("precompute_ref_log_probs", self.precompute_ref_log_probs.is_some(), &[Dpo, Kto]),
            ("desirable_weight", self.desirable_weight.is_some(), &[Kto]),
            ("undesirable_weight", self.undesirable_weight.is_some(), &[Kto]),
            ("simpo_gamma", self.simpo_gamma.is_some(), &[Simpo]),
            ("center_rewards_coefficient", self.center_rewards_coefficient.is_some(), &[Reward]),
            ("assistant_only_loss", self.assistant_only_loss.is_some(), &[Sft]),
            ("reward_funcs", !self.reward_funcs.is_empty(), SAMPLE),
            ("reward_weights", self.reward_weights.is_some(), SAMPLE),
            ("num_generations", self.num_generations.is_some(), GROUPS),
            ("num_generations_eval", self.num_generations_eval.is_some(), SAMPLE),
            ("max_completion_length", self.max_completion_length.is_some(), SAMPLE),
            ("temperature", self.temperature.is_some(), SAMPLE),
            ("top_p", self.top_p.is_some(), SAMPLE),
            ("top_k", self.top_k.is_some(), SAMPLE),
            ("min_p", self.min_p.is_some(), SAMPLE),
            ("num_iterations", self.num_iterations.is_some(), GROUPS),
            ("epsilon", self.epsilon.is_some(), GROUPS),
            ("epsilon_high", self.epsilon_high.is_some(), GROUPS),
            ("scale_rewards", self.scale_rewards.is_some(), &[Grpo]),
            ("normalize_advantages", self.normalize_advantages.is_some(), &[Rloo]),
            ("mask_truncated_completions", self.mask_truncated_completions.is_some(), &[Grpo]),
            ("importance_sampling_correction", self.importance_sampling_correction.is_some(), SAMPLE),
            ("importance_sampling_mode", self.importance_sampling_mode.is_some(), SAMPLE),
            ("importance_sampling_cap", self.importance_sampling_cap.is_some(), SAMPLE),
            ("num_ppo_epochs", self.num_ppo_epochs.is_some(), &[Ppo]),
            ("num_mini_batches", self.num_mini_batches.is_some(), &[Ppo]),
            ("kl_coef", self.kl_coef.is_some(), &[Ppo]),
            ("kl_target", self.kl_target.is_some(), &[Ppo]),
            ("kl_horizon", self.kl_horizon.is_some(), &[Ppo]),
            ("cliprange", self.cliprange.is_some(), &[Ppo]),
            ("cliprange_value", self.cliprange_value.is_some(), &[Ppo]),
            ("vf_coef", self.vf_coef.is_some(), &[Ppo]),
            ("gamma", self.gamma.is_some(), &[Ppo]),
            ("lam", self.lam.is_some(), &[Ppo]),
            ("whiten_rewards", self.whiten_rewards.is_some(), &[Ppo]),
            ("missing_eos_penalty", self.missing_eos_penalty.is_some(), &[Ppo]),
        ];
        match fields.into_iter().find(|(_, given, methods)| *given && !methods.contains(&self.method)) {
            Some((name, ..)) => Err(config(format!("{name} is not used by {:?}; leave it out", self.method).to_lowercase())),
            None => Ok(()),
        }
    }
}
