//! What a step minimises over answers that were sampled.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::answers::Rollout;
use crate::{
    loss::{
        advantage::{off_policy_weight, truncated_weight},
        policy, sum_by,
    },
    train::{
        config::{Algorithm, Correction, CorrectionMode, LossType, Reinforcement},
        metrics::Metrics,
    },
};

/// What the whole step holds, over which its loss is a mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Totals {
    pub(super) answers: f64,
    pub(super) tokens: f64,
}

/// What a batch's forward pass gave. Labels are the tokens of the answers, one answer after another.
pub(super) struct Seen<'a> {
    /// `[labels]`
    pub(super) log_probs: &'a Tensor,
    /// Estimates of value before each token, `[labels]`.
    pub(super) values: Option<&'a Tensor>,
    pub(super) answers: &'a [&'a Rollout],
}

/// Plain numbers beside the labels.
struct Constants {
    /// Which answer each label belongs to.
    owners: Vec<u32>,
    lengths: Vec<usize>,
    old: Vec<f64>,
    advantages: Vec<f64>,
    /// What each label counts for the sampler's difference.
    weights: Vec<f64>,
}

/// The batch's part of the step's loss, a scalar.
pub(super) fn loss(told: &Reinforcement, seen: &Seen<'_>, totals: Totals, metrics: &mut Metrics) -> Result<Tensor> {
    let now: Vec<f64> = seen.log_probs.to_dtype(DType::F64)?.to_vec1()?;
    let constants = Constants::new(told, seen.answers, &now, metrics)?;
    metrics.add("entropy", -now.iter().sum::<f64>(), now.len() as f64);
    let batch = Batch { told, seen, now, constants, totals };
    match told.algorithm {
        Algorithm::Grpo { loss, beta } => batch.grpo(loss, beta, metrics),
        Algorithm::Rloo => batch.rloo(metrics),
        Algorithm::Ppo { range, weight } => batch.ppo(range, weight, metrics),
    }
}

/// A batch with everything at hand.
struct Batch<'a> {
    told: &'a Reinforcement,
    seen: &'a Seen<'a>,
    /// The labels' log-probabilities as plain numbers.
    now: Vec<f64>,
    constants: Constants,
    totals: Totals,
}

impl Constants {
    fn new(told: &Reinforcement, answers: &[&Rollout], now: &[f64], metrics: &mut Metrics) -> Result<Self> {
        let lengths: Vec<usize> = answers.iter().map(|answer| answer.tokens.len()).collect();
        if lengths.iter().sum::<usize>() != now.len() {
            bail!("{} log-probabilities for {} tokens of answers", now.len(), lengths.iter().sum::<usize>());
        }
        let owners = lengths.iter().enumerate().flat_map(|(index, length)| std::iter::repeat_n(index as u32, *length)).collect();
        let (mut old, mut advantages, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut difference = Difference::default();
        let mut first = 0;
        for answer in answers {
            let length = answer.tokens.len();
            let own: Vec<f64> = match answer.old.as_slice() {
                [] => now[first..first + length].to_vec(),
                kept => kept.iter().map(|value| f64::from(*value)).collect(),
            };
            first += length;
            match answer.advantage.as_slice() {
                [one] => advantages.extend(std::iter::repeat_n(f64::from(*one), length)),
                each => advantages.extend(each.iter().map(|advantage| f64::from(*advantage))),
            }
            let sampled: Vec<f64> = answer.sampled.iter().map(|value| f64::from(*value)).collect();
            difference.add(&own, &sampled, told.correction);
            weights.extend(corrected(&own, &sampled, told.correction));
            old.extend(own);
        }
        difference.measure(told.correction, metrics);
        if [old.len(), advantages.len(), weights.len()] != [now.len(); 3] {
            bail!(
                "answers have {} tokens, but {} old log-probabilities and {} advantages",
                now.len(),
                old.len(),
                advantages.len()
            );
        }
        Ok(Self { owners, lengths, old, advantages, weights })
    }

    /// 1 over the length of each label's answer.
    fn shares(&self) -> impl Iterator<Item = f64> {
        self.owners.iter().map(|owner| 1.0 / self.lengths[*owner as usize] as f64)
    }
}

/// What each token of an answer counts.
fn corrected(trainer: &[f64], sampler: &[f64], correction: Option<Correction>) -> Vec<f64> {
    let Some(Correction { mode, cap }) = correction else { return vec![1.0; trainer.len()] };
    let whole = |weight: fn(f64, f64, f64) -> f64| vec![weight(trainer.iter().sum(), sampler.iter().sum(), cap); trainer.len()];
    let each = |weight: fn(f64, f64, f64) -> f64| trainer.iter().zip(sampler).map(|(t, s)| weight(*t, *s, cap)).collect();
    match mode {
        CorrectionMode::SequenceMask => whole(off_policy_weight),
        CorrectionMode::SequenceTruncate => whole(truncated_weight),
        CorrectionMode::TokenMask => each(off_policy_weight),
        CorrectionMode::TokenTruncate => each(truncated_weight),
    }
}

/// How far the sampler's arithmetic is from the trainer's, over a batch.
#[derive(Default)]
struct Difference {
    /// Of log-probabilities, by token.
    tokens: Vec<f64>,
    /// π_trainer / π_sampler, of what the correction looks at: answers or tokens.
    ratios: Vec<f64>,
}

impl Difference {
    fn add(&mut self, trainer: &[f64], sampler: &[f64], correction: Option<Correction>) {
        let moved = || trainer.iter().zip(sampler).map(|(trainer, sampler)| trainer - sampler);
        self.tokens.extend(moved().map(f64::abs));
        match correction.map(|correction| correction.mode) {
            None => {}
            Some(CorrectionMode::SequenceMask | CorrectionMode::SequenceTruncate) => self.ratios.push(moved().sum::<f64>().exp()),
            Some(CorrectionMode::TokenMask | CorrectionMode::TokenTruncate) => self.ratios.extend(moved().map(f64::exp)),
        }
    }

    fn measure(&self, correction: Option<Correction>, metrics: &mut Metrics) {
        let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        metrics.extend("sampling/sampling_logp_difference/mean", &self.tokens);
        metrics.add("sampling/sampling_logp_difference/max", most(&self.tokens), 1.0);
        let Some(Correction { cap, .. }) = correction else { return };
        let least = self.ratios.iter().copied().fold(f64::INFINITY, f64::min);
        metrics.extend("sampling/importance_sampling_ratio/mean", &self.ratios);
        metrics.add("sampling/importance_sampling_ratio/min", least, 1.0);
        metrics.add("sampling/importance_sampling_ratio/max", most(&self.ratios), 1.0);
        let over: Vec<f64> = self.ratios.iter().map(|ratio| f64::from(u8::from(*ratio > cap))).collect();
        metrics.extend("sampling/importance_sampling_ratio/capped", &over);
    }
}

/// Shares of ratios that were held, by the side and by the sign of the advantage.
fn measure_clips(told: &Reinforcement, pairs: impl Iterator<Item = (f64, f64)>, metrics: &mut Metrics) {
    let (low, high) = told.range;
    for (ratio, advantage) in pairs {
        let (below, above) = (ratio < 1.0 - low && advantage < 0.0, ratio > 1.0 + high && advantage > 0.0);
        metrics.add("clip_ratio/low_mean", f64::from(u8::from(below)), 1.0);
        metrics.add("clip_ratio/high_mean", f64::from(u8::from(above)), 1.0);
        metrics.add("clip_ratio/region_mean", f64::from(u8::from(below || above)), 1.0);
    }
}

impl Batch<'_> {
    /// Numbers as a tensor like the labels'.
    fn like(&self, values: &[f64]) -> Result<Tensor> {
        Tensor::new(values, &Device::Cpu)?.to_dtype(self.seen.log_probs.dtype())
    }

    /// A list of every answer, one after another.
    fn all(&self, list: fn(&Rollout) -> &[f32]) -> Vec<f64> {
        self.seen.answers.iter().flat_map(|answer| list(answer)).map(|value| f64::from(*value)).collect()
    }

    /// The clipped loss of each token, weighed for the sampler's difference, `[labels]`.
    fn clipped(&self, metrics: &mut Metrics) -> Result<Tensor> {
        let Constants { old, advantages, weights, .. } = &self.constants;
        let ratios = self.now.iter().zip(old).map(|(now, old)| (now - old).exp());
        measure_clips(self.told, ratios.zip(advantages.iter().copied()), metrics);
        let (low, high) = self.told.range;
        let losses = policy::clipped(self.seen.log_probs, &self.like(old)?, &self.like(advantages)?, low, high)?;
        losses * self.like(weights)?
    }

    fn grpo(&self, loss: LossType, beta: f64, metrics: &mut Metrics) -> Result<Tensor> {
        let mut losses = self.clipped(metrics)?;
        if beta > 0.0 {
            let divergence = policy::k3(self.seen.log_probs, &self.like(&self.all(|answer| &answer.reference))?)?;
            metrics.extend("kl", &divergence.to_dtype(DType::F64)?.to_vec1()?);
            losses = (losses + (divergence * beta)?)?;
        }
        let Totals { answers, tokens } = self.totals;
        let shares: Vec<f64> = match loss {
            LossType::Grpo => self.constants.shares().map(|share| share / answers).collect(),
            LossType::DrGrpo => vec![1.0 / (answers * self.told.draw.max_tokens as f64); self.now.len()],
            _ => vec![1.0 / tokens; self.now.len()],
        };
        (losses * self.like(&shares)?)?.sum_all()
    }

    fn rloo(&self, metrics: &mut Metrics) -> Result<Tensor> {
        let Constants { owners, lengths, old, advantages, weights } = &self.constants;
        let mut ratios = vec![0.0; lengths.len()];
        for ((owner, now), old) in owners.iter().zip(&self.now).zip(old) {
            ratios[*owner as usize] += now - old;
        }
        // Advantages and weights are constant within an answer.
        let of_answers = |values: &[f64]| -> Vec<f64> {
            let starts = lengths.iter().scan(0, |next, length| Some(std::mem::replace(next, *next + length)));
            starts.map(|start| values[start]).collect()
        };
        let (advantages, weights) = (of_answers(advantages), of_answers(weights));
        measure_clips(self.told, ratios.iter().map(|ratio| ratio.exp()).zip(advantages.iter().copied()), metrics);
        let owners = Tensor::new(owners.as_slice(), &Device::Cpu)?;
        // Differences are summed, not sums subtracted: at the first step they are exactly 0.
        let moved = sum_by(&(self.seen.log_probs - self.like(old)?)?, &owners, lengths.len())?;
        let (low, high) = self.told.range;
        let clipped = policy::clipped(&moved, &moved.zeros_like()?, &self.like(&advantages)?, low, high)?;
        (clipped * self.like(&weights)?)?.sum_all()? / self.totals.answers
    }

    fn ppo(&self, range: f64, weight: f64, metrics: &mut Metrics) -> Result<Tensor> {
        let Some(values) = self.seen.values else { bail!("this loss needs estimates of value") };
        let (before, returns) = (self.all(|answer| &answer.values), self.all(|answer| &answer.returns));
        let tokens = self.totals.tokens;
        let policy = (self.clipped(metrics)?.sum_all()? / tokens)?;
        let value = policy::value(values, &self.like(&before)?, &self.like(&returns)?, range)?;
        let value = (value.sum_all()? / tokens)?;

        let moved = self.now.iter().zip(&self.constants.old).map(|(now, old)| 0.5 * (now - old).powi(2));
        metrics.extend("policy/approxkl_avg", &moved.collect::<Vec<_>>());
        let estimates: Vec<f64> = values.to_dtype(DType::F64)?.to_vec1()?;
        let held = estimates.iter().zip(&before).map(|(now, before)| f64::from(u8::from((now - before).abs() > range)));
        metrics.extend("val/clipfrac_avg", &held.collect::<Vec<_>>());
        let part = self.now.len() as f64 / tokens;
        metrics.add("loss/policy_avg", scalar(&policy)?, part);
        metrics.add("loss/value_avg", scalar(&value)?, part);
        policy + (value * weight)?
    }
}

fn scalar(value: &Tensor) -> Result<f64> {
    value.to_dtype(DType::F64)?.to_scalar()
}

#[cfg(test)]
mod tests;
